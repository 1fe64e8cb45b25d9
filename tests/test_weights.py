"""Weights in the package and in folders."""
import hashlib
import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path
from urllib.error import HTTPError, URLError

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from timm_sot.export.score import evaluate
from timm_sot.weights import DamagedDownload, check_download, explained, packaged_weights, with_readable_folder

ROOT = Path(__file__).parents[1]
HUB = ROOT / 'hub'
MODELS = sorted(path.name for path in HUB.glob('cct_*'))
NAME = 'cct_2_sot_qk.cifar10'
PICKLES_ARE_SAFE = tuple(map(int, re.findall(r'\d+', timm.__version__)[:3])) >= (1, 0, 26)


def logits(model):
    torch.manual_seed(0)
    with torch.no_grad():
        return model.eval()(torch.randn(2, model.in_chans, *model.img_size))


def test_every_small_model_has_weights():
    assert timm.list_models('cct*', pretrained=True) == MODELS
    defaults = [f'{name}.cifar10' for name in timm.list_models('cct_2*')]
    assert MODELS == sorted([*defaults, *(f'cct_2_sot_shares.e{epochs}_cifar10' for epochs in (200, 300))])
    for name in timm.list_models('cct*'):
        cfg = timm.get_pretrained_cfg(name)
        # a default that names an account of somebody else would let them choose the weights
        assert not cfg.hf_hub_id and not cfg.url
        expected = ('cifar10', packaged_weights(f'{name}.cifar10')) if cfg.has_weights else (None, None)
        assert (cfg.tag, cfg.file) == expected


HASHES = {  # SHA-256 of the weights, its first digits
    'cct_2.cifar10': 'c1508c207013a574',
    'cct_2_sot_q.cifar10': '18e34db51f856a85',
    'cct_2_sot_q_nosoftmax.cifar10': 'e5c000c60a818a07',
    'cct_2_sot_qk.cifar10': '871149a369158377',
    'cct_2_sot_qk_nosoftmax.cifar10': 'd5088aad623d6fa0',
    'cct_2_sot_qkt.cifar10': 'c4df6600971dfcf8',
    'cct_2_sot_shares.cifar10': '27e3f4bffadbf268',
    'cct_2_sot_shares.e200_cifar10': '61208b04de2168f4',
    'cct_2_sot_shares.e300_cifar10': '59a117575d2fb612',
}


def test_weights_are_those_of_their_cards():
    """Most have the same shapes: another model's would load, too."""
    assert sorted(HASHES) == MODELS
    for name, start in HASHES.items():
        assert hashlib.sha256((HUB / name / 'model.safetensors').read_bytes()).hexdigest().startswith(start), name


@pytest.mark.parametrize('name', MODELS)
def test_package_and_folder(name):
    assert sorted(path.name for path in (HUB / name).iterdir()) == ['README.md', 'config.json', 'model.safetensors']
    weights = load_file(HUB / name / 'model.safetensors')
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert 1e6 < (HUB / name / 'model.safetensors').stat().st_size < 1.3e6
    expected = logits(timm.create_model(f'local-dir:{HUB / name}', pretrained=True))
    model, _, tag = name.partition('.')
    for source in (name, model):
        is_meant = source == name or tag == 'cifar10'
        assert torch.equal(logits(timm.create_model(source, pretrained=True)), expected) == is_meant
    assert not torch.equal(logits(timm.create_model(name)), expected)
    config = json.loads((HUB / name / 'config.json').read_text())
    # a tag has no arguments: the folder's must compute what the entry point's own do
    torch.testing.assert_close(
        logits(timm.create_model(name, pretrained=True, **config['model_args'])), expected, rtol=0, atol=0)


def test_shares_are_the_form_that_was_trained():
    """Logits of the version that trained the weights, commit 52885e7ef652, where the form was called shares_context."""
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = torch.tensor([
        [-0.562042, -1.783804, -0.227490, 0.584244, 2.052953, -0.829410, 1.870538, 0.275116, -1.095958, -1.643660],
        [-0.749259, -1.792506, -0.196058, 1.102339, 1.012910, 0.023112, 2.466836, 0.445579, -1.749700, -1.813369]])
    with torch.no_grad():
        actual = timm.create_model('cct_2_sot_shares', pretrained=True).eval()(images)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize('source', [NAME, f'local-dir:{HUB / NAME}'], ids=['package', 'folder'])
def test_adapts_as_timm_does(source):
    plain = timm.create_model(source, pretrained=True).state_dict()
    other = timm.create_model(source, pretrained=True, num_classes=3, in_chans=1, img_size=(48, 64))
    assert logits(other).shape == (2, 3) and other.pos_embed.shape[1] == 12 * 16
    assert torch.equal(other.state_dict()['blocks.1.mlp.fc1.weight'], plain['blocks.1.mlp.fc1.weight'])
    summed = plain['tokenizer.stages.0.conv.weight'].sum(1, keepdim=True)
    torch.testing.assert_close(other.state_dict()['tokenizer.stages.0.conv.weight'], summed)
    features = timm.create_model(source, pretrained=True, features_only=True)
    assert [f.shape[1] for f in features(torch.randn(1, 3, 32, 32))] == [128, 128, 128]


@pytest.fixture
def folder(tmp_path):
    """A copy that may be spoilt."""
    for path in (HUB / NAME).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def change(folder, function):
    weights = load_file(folder / 'model.safetensors')
    function(weights)
    save_file(weights, folder / 'model.safetensors')


SPOILT = {
    'truncated': (lambda f: os.truncate(f / 'model.safetensors', 700000), 'damaged, cut off or no checkpoint'),
    'shape': (lambda f: change(f, lambda w: w.update({'norm.bias': torch.zeros(64)})), 'size mismatch for norm.bias'),
    'extra': (lambda f: change(f, lambda w: w.update({'more': torch.zeros(1)})), r'unlike the model, 1 .*\(more\)'),
    'missing': (lambda f: change(f, lambda w: w.pop('norm.bias')), r'lacks 1 parameters \(norm.bias\)'),
}


@pytest.mark.parametrize('kind', SPOILT)
def test_spoilt_folder_or_file(folder, kind):
    spoil, message = SPOILT[kind]
    spoil(folder)
    with pytest.raises(Exception, match=rf'(?s)^folder {folder}: .*{message}.*; .* export or copy it anew'):
        timm.create_model(f'local-dir:{folder}', pretrained=True)
    overlay = dict(file=str(folder / 'model.safetensors'))
    with pytest.raises(Exception, match=rf'(?s)^file {folder}/model.safetensors: .*{message}'):
        timm.create_model('cct_2_sot_qk', pretrained=True, pretrained_cfg_overlay=overlay)


@pytest.mark.parametrize('model, kwargs', [
    *(('cct_2_sot_qk', kwargs) for kwargs in (
        dict(depth=1), dict(embed_dim=64), dict(mlp_ratio=2), dict(kernel_size=5), dict(n_conv_layers=1))),
    *(('cct_2_sot_shares', kwargs) for kwargs in (
        dict(attn='sot_qk'), dict(num_heads=4), dict(sot_iters=0), dict(context=False)))])
def test_arguments_that_the_packaged_weights_do_not_fit(model, kwargs):
    name, = kwargs
    advice = 'leave depth, .*at their defaults, .*; or create the model without pretrained weights'
    with pytest.raises(RuntimeError, match=f'(?s)^file .* of timm-sot: .*; (?=.*{name}){advice}') as error:
        timm.create_model(model, pretrained=True, **kwargs)
    assert 'install' not in str(error.value)


def test_wrong_number_of_classes():
    with pytest.raises(RuntimeError, match='of timm-sot: (?s:.*); leave num_classes out of pretrained_cfg_overlay'):
        timm.create_model(
            'cct_2_sot_qk', pretrained=True, num_classes=7, pretrained_cfg_overlay=dict(num_classes=7))


def test_file_of_something_else(tmp_path):
    torch.save([1, 2], tmp_path / 'mine.pth')
    with pytest.raises(AttributeError, match='; it holds something else than weights by their names'):
        timm.create_model(
            'cct_2_sot_qk', pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'mine.pth')))


@pytest.mark.parametrize('size', [0, 1000, 700000])
def test_damaged_pickle(tmp_path, size):
    file = tmp_path / 'mine.pth'
    torch.save(timm.create_model('cct_2_sot_qk').state_dict(), file)
    os.truncate(file, size)
    message = rf'^file {file}: mine.pth is damaged, cut off or no checkpoint \(.+\); .* copy it anew.$'
    with pytest.raises(Exception, match=message):
        timm.create_model('cct_2_sot_qk', pretrained=True, pretrained_cfg_overlay=dict(file=str(file)))


def test_archive_that_is_no_checkpoint(tmp_path):
    np.savez(tmp_path / 'mine.npz', a=np.ones(3))
    with pytest.raises(RuntimeError, match=r'mine.npz is damaged, cut off or no checkpoint \(.+\); check its path'):
        timm.create_model(
            'cct_2_sot_qk', pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'mine.npz')))


def test_folder_in_the_place_of_a_file(folder):
    message = f'^file {folder}: this is a folder; name a file in it, or, .*, local-dir:{folder} in place of the model'
    with pytest.raises(FileNotFoundError, match=message):
        timm.create_model('cct_2_sot_qk', pretrained=True, pretrained_cfg_overlay=dict(file=str(folder)))


def test_what_says_itself_what_would_work_gets_no_other_advice():
    message = "^file .* of timm-sot: the checkpoint carries .*; create the model with pos_embed='learn'.$"
    with pytest.raises(ValueError, match=message):
        timm.create_model('cct_2', pretrained=True, pos_embed='sine')


def test_damaged_file_of_another_name(folder):
    file = (folder / 'model.safetensors').rename(folder / 'mine.safetensors')
    os.truncate(file, 700000)
    with pytest.raises(Exception, match='mine.safetensors is damaged, cut off or no checkpoint'):
        timm.create_model('cct_2_sot_qk', pretrained=True, pretrained_cfg_overlay=dict(file=str(file)))


def test_damaged_package(tmp_path, monkeypatch):
    path = tmp_path / NAME / 'model.safetensors'
    path.parent.mkdir()
    path.write_bytes((HUB / NAME / 'model.safetensors').read_bytes()[:700000])
    monkeypatch.setattr('timm_sot.weights.hub_folder', lambda: tmp_path)
    message = 'of timm-sot: model.safetensors is damaged, cut off or no checkpoint .*; install timm-sot again'
    with pytest.raises(Exception, match=message):
        timm.create_model('cct_2_sot_qk', pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))


def test_absent_files(folder, monkeypatch):
    absent = f'{folder}/none.safetensors: there is no such file; check its path'
    with pytest.raises(FileNotFoundError, match=absent):
        timm.create_model('cct_2', pretrained=True, pretrained_cfg_overlay=dict(file=f'{folder}/none.safetensors'))
    (folder / 'model.safetensors').unlink()
    with pytest.raises(RuntimeError, match=f'folder {folder}: No suitable checkpoints'):
        timm.create_model(f'local-dir:{folder}', pretrained=True)
    absent = dict(file=packaged_weights('cct_2.none'))
    with pytest.raises(FileNotFoundError, match='of timm-sot: there is no such file; install timm-sot again'):
        timm.create_model('cct_2', pretrained=True, pretrained_cfg_overlay=absent)


def test_errors_of_the_users_own_are_left_alone():
    with pytest.raises(TypeError) as error:
        timm.create_model('cct_2', pretrained=True, sot_rag=1)
    assert 'timm-sot' not in str(error.value) and 'sot_rag' in str(error.value)
    with pytest.raises(ValueError) as error:
        timm.create_model('cct_2', pretrained=True, attn='sot_x')
    assert 'cifar10' not in str(error.value)
    for kwargs in (dict(device='nope'), dict(features_only=True, out_indices=(9,))):
        with pytest.raises((RuntimeError, AssertionError)) as error:
            timm.create_model('cct_2', pretrained=True, **kwargs)
        assert 'cifar10' not in str(error.value) and 'pretrained' not in str(error.value)


def test_arguments_beside_those_of_a_folder(folder):
    """The weights are not in question, the arguments may be of either."""
    for kwargs in (dict(attn='typo'), dict(device='nope'), dict(features_only=True, out_indices=(9,))):
        with pytest.raises(Exception, match=f'^folder {folder}: .*; an argument that is not yours is of config.json'):
            timm.create_model(f'local-dir:{folder}', pretrained=True, **kwargs)


@pytest.mark.parametrize('overlay', [dict(hf_hub_id='someone/nosuch'), dict(url='https://127.0.0.1:1/x.pth')])
def test_other_sources_come_before_the_package(overlay, monkeypatch):
    asked = []

    def refuse(*args, **kwargs):
        asked.append(args[0])
        raise ConnectionError

    monkeypatch.setattr('timm.models._builder.load_state_dict_from_hf', refuse)
    monkeypatch.setattr('timm.models._builder.load_state_dict_from_url', refuse)
    with pytest.raises(ConnectionError):
        timm.create_model('cct_2', pretrained=True, pretrained_cfg_overlay=overlay)
    assert asked == [*overlay.values()]


def test_weights_of_an_address(folder):
    """Errors name it."""
    weights = load_file(folder / 'model.safetensors')
    torch.save(weights, folder / 'good.pth')
    torch.save({name: value for name, value in weights.items() if name != 'norm.bias'}, folder / 'bad.pth')

    def load(name):
        overlay = dict(url=f'file://{folder}/{name}')
        return timm.create_model('cct_2_sot_qk', pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=folder)

    assert torch.equal(logits(load('good.pth')), logits(timm.create_model(NAME, pretrained=True)))
    with pytest.raises(RuntimeError, match=f'^file://{folder}/bad.pth: .*norm.bias.*; create the model with'):
        load('bad.pth')
    with pytest.raises(URLError) as caught:
        load('absent.pth')
    assert f'file://{folder}/absent.pth: absent.pth could not be downloaded (' in str(caught.value)
    assert str(caught.value).count('urlopen error') == 2 and 'token' not in str(caught.value)
    with pytest.raises(HTTPError, match='HTTP Error 404: http://x/y.pth: y.pth could not be downloaded .*; check that'):
        with explained('cct_2', True, dict(pretrained_cfg_overlay=dict(url='http://x/y.pth', file=None))):
            load_pretrained('http://x/y.pth')


def load_pretrained(url):
    """As timm's function of that name, where there is no such page."""
    raise HTTPError(url, 404, 'Not Found', {}, None)


def test_original_checkpoint_is_still_a_file(folder):
    """A pickle of plain weights, through timm's weights-only loading."""
    weights = load_file(HUB / NAME / 'model.safetensors')
    torch.save({'state_dict': weights}, folder / 'w.pth')
    model = timm.create_model('cct_2_sot_qk', pretrained=True, pretrained_cfg_overlay=dict(file=str(folder / 'w.pth')))
    assert torch.equal(logits(model), logits(timm.create_model(NAME, pretrained=True)))


@pytest.mark.parametrize('version, is_read', [
    ('1.0.21', False), ('1.0.25', False), ('1.0.26', True), ('1.1.0.dev0', True)])
def test_folders_that_timm_does_not_read(folder, monkeypatch, version, is_read):
    """It gets the file instead, where there is one."""
    monkeypatch.setattr(timm, '__version__', version)
    given = dict(pretrained_cfg=dict(source='local-dir', file=str(folder), num_classes=10), depth=2)
    cfg = dict(source=None, file=str(folder / 'model.safetensors'), num_classes=10)
    assert with_readable_folder(given) == (given if is_read else dict(pretrained_cfg=cfg, depth=2))
    os.remove(folder / 'model.safetensors')
    assert with_readable_folder(given) == given


class Evil:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.skipif(not PICKLES_ARE_SAFE, reason=f'timm {timm.__version__} runs what a pickle holds, as README says')
@pytest.mark.parametrize('source', ['file', 'folder'])
def test_pickle_that_holds_more_than_weights(folder, source):
    pickled = {**load_file(folder / 'model.safetensors'), 'evil': Evil(folder / 'ran')}
    (folder / 'model.safetensors').unlink()
    torch.save(pickled, folder / 'pytorch_model.bin')
    message = f'^{source} {folder}.*globals; it holds more than weights, or none, have them saved'
    with pytest.raises(RuntimeError, match=message):
        if source == 'file':
            overlay = dict(file=str(folder / 'pytorch_model.bin'))
            timm.create_model('cct_2_sot_qk', pretrained=True, pretrained_cfg_overlay=overlay)
        else:
            timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert not (folder / 'ran').exists()


WHEEL = '''
import json, socket, sys
def connect(*args):
    raise OSError('the network is off')
socket.socket.connect = socket.socket.connect_ex = connect
import timm, torch
torch.set_num_threads(int(sys.argv[1]))
answer = {'package': sys.modules['timm_sot.cct'].__file__}
for name in timm.list_models('cct*', pretrained=True):
    model = timm.create_model(name, pretrained=True).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        answer[name] = model(torch.randn(2, 3, 32, 32)).tolist()
print(json.dumps(answer))
'''


@pytest.mark.slow
def test_wheel(tmp_path):
    """Built, installed in an environment of its own, without the repository or the network."""
    pytest.importorskip('hatchling', reason='building a wheel takes hatchling')
    subprocess.run(
        [sys.executable, '-m', 'hatchling', 'build', '-t', 'wheel', '-d', str(tmp_path)], cwd=ROOT, check=True,
        capture_output=True)
    wheel, = tmp_path.glob('*.whl')
    venv.create(tmp_path / 'venv', symlinks=True)
    python = tmp_path / 'venv' / 'bin' / 'python'
    site = Path(subprocess.check_output(
        [python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))'], text=True).strip())
    subprocess.run(
        [sys.executable, '-m', 'pip', '--python', str(python), 'install', '--quiet', '--no-deps', '--no-index',
         '--disable-pip-version-check', str(wheel)], check=True)
    # torch and timm, as a folder: the .pth files in it, of editable installs, are not followed
    (site / 'others.pth').write_text(''.join(f'{path}\n' for path in sys.path if path.endswith('site-packages')))
    result = subprocess.run(
        [python, '-I', '-c', WHEEL, str(torch.get_num_threads())], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer.pop('package') == str(site / 'timm_sot' / 'cct.py')
    assert sorted(answer) == MODELS
    for name, values in answer.items():
        assert torch.equal(torch.tensor(values), logits(timm.create_model(f'local-dir:{HUB / name}', pretrained=True)))


def card(name):
    return ModelCard.load(HUB / name / 'README.md')


@pytest.mark.parametrize('name', MODELS)
def test_card(name):
    result, = card(name).data.eval_results
    assert f'| `{name}` | {result.metric_value:.2f} % |' in (ROOT / 'README.md').read_text()
    assert f'on the 10,000 images of `{result.dataset_split}/`' in card(name).text
    epochs, = re.findall(r'\| Epochs \| (\d+) \|', card(name).text)
    assert [epochs] == (re.findall(r'\.e(\d+)_', name) or ['30']) and result.metric_value > 70


@pytest.mark.skipif('CIFAR10_DIR' not in os.environ, reason='set CIFAR10_DIR to the images of a card')
@pytest.mark.parametrize('name', MODELS)
def test_top1_is_that_of_the_card(name):
    result, = card(name).data.eval_results
    score = evaluate(timm.create_model(name, pretrained=True), os.environ['CIFAR10_DIR'])
    if score.digest not in card(name).text:  # JPEG files, or lossless ones
        pytest.skip('set CIFAR10_DIR to the images of this card')
    assert (score.top1, score.images) == (result.metric_value, 10000)


@pytest.fixture
def cached(monkeypatch, tmp_path):
    """The weights of a model of the Hub in its cache."""
    path = tmp_path / 'model.safetensors'
    monkeypatch.setattr('huggingface_hub.try_to_load_from_cache', lambda *args, **kwargs: str(path))
    return path


def test_download_without_a_hash_is_not_checked(cached):
    """As in a cache without links, whose files have the names that they have on the Hub."""
    cached.write_bytes(b'any')
    check_download('user/name', None)
    assert cached.exists()


@pytest.mark.parametrize('error, advice', [
    (None, 'it has been removed from the cache, try again'), (PermissionError(), 'remove .* and try again')])
def test_damaged_download(monkeypatch, cached, error, advice):
    blob = cached.parent / ('0' * 64)
    blob.write_bytes(b'changed')
    cached.symlink_to(blob)
    if error:
        def refuse(path):
            raise error

        monkeypatch.setattr(os, 'remove', refuse)
    with pytest.raises(DamagedDownload, match=f'^user/name on the Hub: the model.safetensors that came .*; {advice}'):
        check_download('user/name', None)
    assert blob.exists() == cached.is_symlink() == bool(error)
