""" What export reads from checkpoints of studies and of train.py """
import json
import shutil

import pytest
import timm
import torch
from exported import SETTINGS, logits, run, study, train_py
from timm.models import save_for_hf

from timm_sot.study.original import JPEG


def test_a_command_that_begins_elsewhere_says_so(tmp_path):
    """Rows that differ in an argument cannot both be named; what the first has drawn can depend on it."""
    said = 'It began with the initial values of cct_2 pos_embed=sine, in what the two share'

    def card_of(name, first, kwargs):
        _, checkpoint = study(tmp_path / name, 'cct_2', kwargs)
        (tmp_path / name / 'study.json').write_text(json.dumps({**SETTINGS, 'first': first, 'dataset': 'torch/x'}))
        assert run(checkpoint, '--out', tmp_path / 'hub' / name) == 0
        return (tmp_path / 'hub' / name / 'README.md').read_text()

    text = card_of('a', ['cct_2', dict(pos_embed='sine')], dict(pos_embed='learn'))
    assert said in text and '--dataset torch/x --data-dir DIR' in text
    assert said not in card_of('b', ['cct_2', dict(pos_embed='sine')], dict(pos_embed='sine'))
    assert 'initial values' not in card_of('c', ['cct_2', {}], dict(context=True)), 'they are the same'
    assert 'initial values of cct_2 no_such=1' in card_of('d', ['cct_2', dict(no_such=1)], {})


def test_what_limits_the_numbers_of_a_study(tmp_path):
    _, checkpoint = study(tmp_path / 'study', 'cct_2_sot_qkt', {})
    settings, results = tmp_path / 'study' / 'study.json', tmp_path / 'study' / 'results.jsonl'

    def card_of(data, **changed):
        settings.write_text(json.dumps({**SETTINGS, **changed}))
        lines = [json.loads(line) for line in results.read_text().splitlines() if line.endswith('}')]
        results.write_text(''.join(json.dumps({**line, 'data': data}) + '\n' for line in lines))
        assert run(checkpoint, '--out', tmp_path / 'hub' / 'qkt') == 0
        return (tmp_path / 'hub' / 'qkt' / 'README.md').read_text()

    recipe = 'How it was trained is not recorded'
    text = card_of(JPEG)
    assert recipe not in text
    assert 'were JPEG files' in text and 'the image size cannot be changed' in text and '--fraction' not in text
    text = card_of('my own images (validation) 8+2 sha256:1', fraction=0.5, holdout=0.2)
    assert 'JPEG' not in text and 'trained on my own images with' in text
    assert ' --fraction 0.5 --holdout 0.2 ' in text and ' --data-dir DIR ' in text

    settings.unlink()
    assert run(checkpoint, '--out', tmp_path / 'hub' / 'qkt') == 0
    assert recipe in (tmp_path / 'hub' / 'qkt' / 'README.md').read_text()


def test_model_that_this_version_lacks(tmp_path, capsys):
    _, checkpoint = study(tmp_path / 'study', 'cct_2', {})
    results = tmp_path / 'study' / 'results.jsonl'
    results.write_text(results.read_text().replace('"model": "cct_2"', '"model": "cct_2_old"'))
    renamed = str(tmp_path / 'study' / 'checkpoints' / 'cct_2_old-seed-0-epochs-3.safetensors')
    shutil.move(checkpoint, renamed)
    assert run(renamed, '--out', tmp_path / 'x') == 2
    assert 'was recorded as cct_2_old, which does not fit: Unknown model (cct_2_old)' in capsys.readouterr().err


@pytest.mark.parametrize('ema', [False, True])
def test_train_py(tmp_path, digits_dir, ema):
    network, checkpoint = train_py(
        tmp_path / 'run', ema=ema, model_kwargs=dict(attn='sot_q', sot_reg=0.7, img_size=48), mean=[0.5, 0.5, 0.5])
    out = tmp_path / 'cct_2.digits'
    assert run(checkpoint, '--out', out, '--data-dir', digits_dir / 'test', '--device', 'cpu') == 0
    loaded = timm.create_model(f'local-dir:{out}', pretrained=True)
    assert loaded.img_size == (48, 48) and loaded.blocks[0].attn.reg == 0.7
    assert torch.equal(logits(loaded), logits(network))
    data_config = timm.data.resolve_model_data_config(loaded)
    assert tuple(data_config['input_size']) == (3, 48, 48) and tuple(data_config['mean']) == (0.5, 0.5, 0.5)
    text = (out / 'README.md').read_text()
    for recorded in ('| Epochs | 7 of 30 |', '| Seed | 42 |', '| Validation during training | 12.5 |', 'lr: 0.0005',
                     'averaged (EMA)' if ema else 'as trained', 'model_kwargs: {"attn": "sot_q"', '200 images of'):
        assert recorded in text, recorded
    assert 'somebody' not in text  # nobody's folders


@pytest.mark.parametrize('args', [
    dict(), dict(mean=[0.5], std=[0.1, 0.2, 0.3], crop_pct=1., interpolation='bicubic', crop_mode='squash'),
    dict(interpolation='random')])
def test_images_are_prepared_as_train_py_prepared_them(tmp_path, args):
    """What was not given is the model's, of which some are resized otherwise than by timm's last resort."""
    network, checkpoint = train_py(tmp_path / 'run', 'lcnet_035', **args)
    expected = timm.data.resolve_data_config({} if 'random' in args.values() else args, model=network)
    assert expected['interpolation'] == ('bicubic' if 'mean' in args else 'bilinear')
    out = tmp_path / 'lcnet'
    assert run(checkpoint, '--out', out) == 0
    assert '""' not in (out / 'config.json').read_text()
    loaded = timm.create_model(f'local-dir:{out}', pretrained=True)
    actual = timm.data.resolve_model_data_config(loaded)
    for key in ('interpolation', 'mean', 'std', 'crop_pct', 'crop_mode'):
        assert actual[key] == expected[key] or tuple(actual[key]) == tuple(expected[key]), key


def test_zeros_of_train_py_are_in_its_command(tmp_path):
    zeros = dict(seed=0, smoothing=0., weight_decay=0., hflip=0., color_jitter=0., warmup_epochs=0)
    _, checkpoint = train_py(tmp_path / 'run', **zeros, mixup=None, crop_pct='', torchcompile=False)
    assert run(checkpoint, '--out', tmp_path / 'cct_2.digits') == 0
    text = (tmp_path / 'cct_2.digits' / 'README.md').read_text()
    for key, value in zeros.items():
        assert f'\n{key}: {value}\n' in text
    assert '| Seed | 0 |' in text and 'mixup' not in text and 'crop_pct' not in text and 'torchcompile' not in text


def test_where_the_weights_began(tmp_path):
    _, checkpoint = train_py(tmp_path / 'run', pretrained=True, pretrained_path='/home/somebody/first.pth')
    assert run(checkpoint, '--out', tmp_path / 'cct_2.digits') == 0
    text = (tmp_path / 'cct_2.digits' / 'README.md').read_text()
    assert '| Began with the weights in | first.pth |' in text and '\npretrained_path: "first.pth"\n' in text
    assert 'somebody' not in text


@pytest.mark.parametrize('args', [dict(img_size=48), dict(input_size=[3, 48, 48], img_size=None)])
def test_the_image_size_of_train_py_is_that_of_the_images(tmp_path, digits_dir, args):
    network, checkpoint = train_py(tmp_path / 'run', model_kwargs=dict(dynamic_img_size=True), **args)
    out = tmp_path / 'cct_2.digits'
    assert run(checkpoint, '--out', out, '--data-dir', digits_dir, '--device', 'cpu') == 0
    loaded = timm.create_model(f'local-dir:{out}', pretrained=True)
    assert timm.data.resolve_model_data_config(loaded)['input_size'] == (3, 48, 48)
    assert 'Input: 48x48 pixels' in (out / 'README.md').read_text()
    assert torch.equal(logits(loaded), logits(network))


@pytest.mark.parametrize('args', [dict(img_size=48), dict(input_size=[3, 48, 40])])
@pytest.mark.parametrize('model_kwargs', [dict(), dict(pos_embed='sine'), dict(dynamic_img_size=True)])
def test_the_image_size_of_train_py_is_that_of_the_model(tmp_path, args, model_kwargs):
    """As from timm 1.0.31 on."""
    resolve = getattr(timm.models, 'resolve_model_input_args', None) or pytest.skip('needs timm 1.0.31')
    network = timm.create_model(**resolve('cct_2', args, num_classes=10, **model_kwargs))
    _, checkpoint = train_py(tmp_path / 'run', network=network, model_kwargs=model_kwargs, **args)
    out = tmp_path / 'cct_2.digits'
    assert run(checkpoint, '--out', out) == 0
    loaded = timm.create_model(f'local-dir:{out}', pretrained=True)
    assert loaded.img_size == network.img_size == ((48, 48) if 'img_size' in args else (48, 40))
    assert timm.data.resolve_model_data_config(loaded)['input_size'] == (3, *network.img_size)
    assert torch.equal(logits(loaded), logits(network))


@pytest.mark.parametrize('model, kwargs', [('cct_2', dict(img_size=48)), ('lcnet_035', {})])
def test_a_model_that_came_from_a_folder(tmp_path, model, kwargs):
    """Of which the registry does not know whether it is made for one image size."""
    first = timm.create_model(model, num_classes=10)
    save_for_hf(first, tmp_path / 'first', safe_serialization=True)
    name = f'local-dir:{tmp_path / "first"}'
    network, checkpoint = train_py(
        tmp_path / 'run', name, network=timm.create_model(name, **kwargs), img_size=48)
    out = tmp_path / 'again'
    assert run(checkpoint, '--out', out) == 0
    loaded = timm.create_model(f'local-dir:{out}', pretrained=True).eval()
    assert getattr(loaded, 'img_size', (48, 48)) == (48, 48)
    with torch.no_grad():
        assert torch.equal(loaded(torch.ones(1, 3, 48, 48)), network(torch.ones(1, 3, 48, 48)))


def test_what_train_py_adds_to_its_arguments_is_no_option(tmp_path):
    _, checkpoint = train_py(tmp_path / 'run')
    assert run(checkpoint, '--out', tmp_path / 'cct_2.digits') == 0
    assert 'prefetcher' not in (tmp_path / 'cct_2.digits' / 'README.md').read_text()
