"""timm-sot export: from checkpoints of studies and of train.py to folders."""
import json
import os
import shutil
from argparse import Namespace

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from timm.utils import CheckpointSaver

from timm_sot.cli import main
from timm_sot.export.score import evaluate

SETTINGS = dict(
    batch_size=16, lr=2e-3, weight_decay=0.03, augment=['crop', 'flip'], precision='float32', first=['cct_2', {}])


def study(folder, model='cct_2_sot_qk', kwargs=None, seeds=(0,)):
    """What a study leaves behind; returns the network and the checkpoint of its first seed."""
    kwargs = dict(sot_reg=0.5, sot_tol=0.1) if kwargs is None else kwargs
    (folder / 'checkpoints').mkdir(parents=True, exist_ok=True)
    (folder / 'study.json').write_text(json.dumps(SETTINGS))
    torch.manual_seed(0)
    network = timm.create_model(model, **kwargs).eval()
    name = '-'.join([model, *(f'{key}-{value}' for key, value in sorted(kwargs.items())), f'seed-{seeds[0]}-epochs-3'])
    path = folder / 'checkpoints' / f'{name}.safetensors'
    save_file(network.state_dict(), path)
    with open(folder / 'results.jsonl', 'a') as f:
        f.write('{"model": "cct_2", "kwa\n')  # of a run that was killed
        for seed in seeds:
            f.write(json.dumps(dict(
                model=model, kwargs=kwargs, seed=seed, epochs=3, best=31. + seed, final=30. + seed,
                top1=[10., 31. + seed, 30. + seed],
                loss=[2.3] * 3, seconds=12., device='NVIDIA TPU, float32', versions={'torch': '9.9'}, commit='abc123',
                data='digits9 400+200 sha256:0123', processor='Brain 1')) + '\n')
    return network, str(path)


def train_py(folder, model='cct_2', ema=False, **args):
    """A checkpoint as train.py's saver writes it."""
    folder.mkdir(exist_ok=True)
    network = timm.create_model(model, num_classes=10, **args.get('model_kwargs', {})).eval()
    args = Namespace(**{**dict(
        model=model, num_classes=10, seed=42, epochs=30, lr=5e-4, data_dir='/home/somebody/images/digits',
        device='cuda', opt='adamw', dataset='', output='/home/somebody/out', model_kwargs={}, mean=None), **args})
    saver = CheckpointSaver(
        network, torch.optim.AdamW(network.parameters()), args=args, checkpoint_dir=str(folder),
        recovery_dir=str(folder), model_ema=timm.utils.ModelEmaV3(network) if ema else None)
    saver.save_checkpoint(6, metric=12.5)
    return network, str(folder / 'model_best.pth.tar')


def logits(model):
    torch.manual_seed(0)
    with torch.no_grad():
        return model.eval()(torch.randn(2, model.in_chans, *model.img_size))


def run(*args):
    return main(['export', *map(str, args)])


def test_study(tmp_path, digits_dir, capsys):
    network, checkpoint = study(tmp_path / 'study', seeds=(0, 1, 2))
    out = tmp_path / 'hub' / 'cct_2_sot_qk.digits'
    assert run(checkpoint, '--out', out, '--data-dir', digits_dir, '--device', 'cpu') == 0, capsys.readouterr().err
    score = evaluate(network, str(digits_dir))
    assert f'top-1 {score.top1:.2f} on 200 images' in capsys.readouterr().out
    assert sorted(os.listdir(out)) == ['README.md', 'config.json', 'model.safetensors']
    assert os.listdir(out.parent) == [out.name]
    assert os.stat(out / 'model.safetensors').st_mode == os.stat(out / 'README.md').st_mode

    # the same network, with the arguments that it was trained with
    loaded = timm.create_model(f'local-dir:{out}', pretrained=True)
    assert torch.equal(logits(loaded), logits(network))
    assert (loaded.blocks[0].attn.reg, loaded.blocks[0].attn.tol) == (0.5, 0.1)
    config = json.loads((out / 'config.json').read_text())
    assert config['architecture'] == 'cct_2_sot_qk' and config['label_names'] == [str(i) for i in range(10)]
    assert config['pretrained_cfg']['tag'] == 'digits' and 'file' not in config['pretrained_cfg']

    card = ModelCard.load(out / 'README.md')
    result, = card.data.eval_results
    assert (result.metric_value, result.dataset_split, result.dataset_type) == (score.top1, 'test', 'digits')
    assert (card.data.library_name, card.data.pipeline_tag, card.data.license) == (
        'timm', 'image-classification', 'apache-2.0')
    for recorded in ('| Epochs | 3 |', '| Seed | 0 |', 'digits9 400+200 sha256:0123', 'abc123',
                     'NVIDIA TPU, float32; Brain 1', '31.00 ± 1.00 after the last epoch', 'pip install timm-sot',
                     'torch 9.9', score.digest,
                     'timm-sot study --models cct_2 cct_2_sot_qk --model-kwargs sot_reg=0.5 sot_tol=0.1 --seed 0 '
                     '--epochs 3 --batch-size 16 --lr 0.002 --weight-decay 0.03 --augment crop flip --precision'):
        assert recorded in card.text, recorded


def test_what_a_study_writes(tmp_path, digits_dir):
    """From the command line to a loaded model."""
    folder = tmp_path / 'study'
    assert main(['study', '--models', 'cct_2_sot_q', '--model-kwargs', 'sot_iters=2', '--epochs', '1',
                 '--device', 'cpu', '--batch-size', '64', '--data-dir', str(digits_dir), '--workers', '0',
                 '--out', str(folder)]) == 0
    result = json.loads((folder / 'results.jsonl').read_text())
    checkpoint, = folder.glob('checkpoints/*.safetensors')
    out = tmp_path / 'cct_2_sot_q.digits'
    assert run(checkpoint, '--out', out, '--data-dir', digits_dir, '--device', 'cpu') == 0
    assert timm.create_model(f'local-dir:{out}', pretrained=True).blocks[0].attn.iters == 2
    card = ModelCard.load(out / 'README.md')
    assert card.data.eval_results[0].metric_value == result['final']
    assert result['data'] in card.text and '--models cct_2_sot_q --model-kwargs sot_iters=2 --seed 0' in card.text
    assert ' --data-dir DIR --out run\ntimm-sot export run/checkpoints/cct_2_sot_q-sot_iters-2-seed-0-epochs-1' \
        '.safetensors --out hub/cct_2_sot_q.digits --data-dir DIR\n' in card.text


@pytest.mark.parametrize('model, kwargs, classes', [
    ('cct_2', [], 2), ('cct_2_sot_qk', ['sot_iters=2'], 2),
    ('vit_tiny_patch16_224', ['img_size=32', 'depth=1', 'embed_dim=24'], 2)])
def test_classes_are_those_of_the_images(tmp_path, folder, model, kwargs, classes, monkeypatch):
    """Of which a study makes the head; they are no argument of its rows."""
    assert main(['study', '--models', model, '--epochs', '1', '--device', 'cpu', '--data-dir', folder, '--workers', '0',
                 '--out', str(tmp_path / 'study'), *(['--model-kwargs', *kwargs] if kwargs else [])]) == 0
    result = json.loads((tmp_path / 'study' / 'results.jsonl').read_text())
    checkpoint, = (tmp_path / 'study').glob('checkpoints/*.safetensors')
    out = tmp_path / f'{model}.tiny'
    assert run(checkpoint, '--out', out, '--data-dir', folder, '--device', 'cpu') == 0
    loaded = timm.create_model(f'local-dir:{out}', pretrained=True)
    assert loaded.num_classes == classes
    card = ModelCard.load(out / 'README.md')
    assert f'- Classes: {classes}' in card.text and 'Changed since training' not in card.text
    assert f'num_classes={classes} --seed' not in card.text, 'study takes them from the images'
    assert f'{result["final"]:.2f} after the last epoch' in card.text
    assert ('A Compact Convolutional Transformer with `' in card.text) == model.startswith('cct')

    monkeypatch.chdir(tmp_path)
    assert main(['attention', 'compare', '--models', model, '--checkpoint', str(checkpoint)]) == 0


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


def test_damaged_image_is_refused(tmp_path, digits_dir, capsys):
    """For one that it cannot read timm takes the next."""
    shutil.copytree(digits_dir / 'test', tmp_path / 'test')
    damaged = sorted((tmp_path / 'test').glob('*/*'))[3]
    damaged.write_bytes(damaged.read_bytes()[:60])
    _, checkpoint = study(tmp_path / 'study')
    assert run(checkpoint, '--out', tmp_path / 'x', '--data-dir', tmp_path, '--device', 'cpu') == 2
    assert f'{damaged} cannot be read as an image' in capsys.readouterr().err and not (tmp_path / 'x').exists()


def test_arguments_may_change_after_training(tmp_path):
    network, checkpoint = study(tmp_path / 'study')
    out = tmp_path / 'cct_2_sot_qk.digits'
    assert run(checkpoint, '--out', out, '--model-kwargs', 'sot_tol=None', 'sot_iters=20') == 0
    attn = timm.create_model(f'local-dir:{out}', pretrained=True).blocks[0].attn
    assert (attn.reg, attn.tol, attn.iters) == (0.5, None, 20)
    card = ModelCard.load(out / 'README.md')
    assert 'sot_tol=0.1 sot_iters=None in training, sot_tol=None sot_iters=20 in this model' in card.text
    assert '--out hub/cct_2_sot_qk.digits --model-kwargs sot_tol=None sot_iters=20\n' in card.text
    assert 'Not evaluated' in card.text and card.data.eval_results is None


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


def test_zeros_of_train_py_are_in_its_command(tmp_path):
    zeros = dict(seed=0, smoothing=0., weight_decay=0., hflip=0., color_jitter=0., warmup_epochs=0)
    _, checkpoint = train_py(tmp_path / 'run', **zeros, mixup=None, crop_pct='', torchcompile=False)
    assert run(checkpoint, '--out', tmp_path / 'cct_2.digits') == 0
    text = (tmp_path / 'cct_2.digits' / 'README.md').read_text()
    for key, value in zeros.items():
        assert f'\n{key}: {value}\n' in text
    assert '| Seed | 0 |' in text and 'mixup' not in text and 'crop_pct' not in text and 'torchcompile' not in text


def test_card_of_a_model_of_timm_alone(tmp_path):
    _, checkpoint = train_py(tmp_path / 'run', 'test_resnet')
    assert run(checkpoint, '--out', tmp_path / 'test_resnet.digits') == 0
    text = (tmp_path / 'test_resnet.digits' / 'README.md').read_text()
    assert "`ResNet`, trained on digits by timm's train.py." in text and 'pip install' not in text
    assert 'timm-sot' not in ModelCard.load(tmp_path / 'test_resnet.digits' / 'README.md').data.tags
    assert run(train_py(tmp_path / 'run', 'cct_2')[1], '--out', tmp_path / 'cct_2.digits') == 0
    text = (tmp_path / 'cct_2.digits' / 'README.md').read_text()
    assert "by timm's train.py. timm-sot adds Self" in text and 'pip install timm-sot' in text


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


def test_gray_images(tmp_path, digits_dir):
    _, checkpoint = train_py(tmp_path / 'run', model_kwargs=dict(in_chans=1), in_chans=1)
    out = tmp_path / 'cct_2.digits'
    assert run(checkpoint, '--out', out, '--data-dir', digits_dir, '--device', 'cpu') == 0
    assert '1 channels' in (out / 'README.md').read_text()


def test_exported_again(tmp_path):
    _, checkpoint = study(tmp_path / 'study')
    out = tmp_path / 'cct_2_sot_qk.digits'
    assert run(checkpoint, '--out', out) == 0
    before = (out / 'README.md').read_text()
    assert run(checkpoint, '--out', out) == 0 and (out / 'README.md').read_text() == before


class Evil:
    def __reduce__(self):
        return os.mkdir, ('ran',)


def failing(tmp_path):
    """Arguments that cannot work, and what is said."""
    _, good = study(tmp_path / 'study')
    folder = tmp_path / 'other'
    folder.mkdir()
    (folder / 'notes.txt').touch()
    _, alone = study(tmp_path / 'alone')
    (tmp_path / 'alone' / 'results.jsonl').unlink()
    _, cut = study(tmp_path / 'cut')
    os.truncate(cut, 1000)
    _, shape = study(tmp_path / 'shape', kwargs={})
    save_file(timm.create_model('cct_2', depth=1).state_dict(), shape)
    network, diverged = study(tmp_path / 'diverged')
    save_file({**network.state_dict(), 'head.bias': torch.full((10,), torch.nan)}, diverged)
    torch.save({'a': Evil()}, tmp_path / 'evil.pth.tar')
    torch.save(network.state_dict(), tmp_path / 'bare.pth')
    # scripts other than timm's train.py keep some of what it keeps
    torch.save(dict(state_dict=network.state_dict(), args=Namespace(model='cct_2')), tmp_path / 'no_epoch.pth')
    torch.save(dict(state_dict=network.state_dict(), args=dict(model='cct_2'), epoch=1), tmp_path / 'no_model.pth')
    torch.save({'state': {}, 'epoch': 2}, tmp_path / 'progress.pt')
    out = tmp_path / 'out' / 'cct_2_sot_qk.x'
    (tmp_path / 'file').touch()
    return [
        ((tmp_path / 'none', '--out', out), 'none is not a file; give a checkpoint of train.py'),
        ((good, '--out', folder), 'holds other files (notes.txt)'),
        ((good, '--out', tmp_path / 'file' / 'x'), 'cannot write'),
        ((good, '--out', tmp_path / 'out' / 'my model'), "does not take 'my model'; choose one like cct_2_sot_qk.c"),
        ((good, '--out', tmp_path / 'out' / 'a..b'), "does not take 'a..b'"),
        ((good, '--out', '/'), "does not take ''"),
        ((alone, '--out', out), 'there is no result of'),
        ((cut, '--out', out), 'is damaged'),
        ((shape, '--out', out), 'which does not fit'),
        ((diverged, '--out', out), 'not finite, in head.bias'),
        # torch's own message goes on to say how the code in it could be run
        ((tmp_path / 'evil.pth.tar', '--out', out),
         'no checkpoint of weights and plain values: Weights only load failed\n'),
        *(((tmp_path / name, '--out', out), 'records no training arguments')
          for name in ('bare.pth', 'no_epoch.pth', 'no_model.pth')),
        ((tmp_path / 'progress.pt', '--out', out), 'in progress'),
        ((good, '--out', out, '--data-dir', tmp_path / 'nowhere'), 'nowhere'),
        ((good, '--out', out, '--data-dir', folder), 'is no folder with images in folders of their classes'),
        ((good, '--out', out, '--model-kwargs', 'sot_rag=1'), 'sot_rag'),
        ((good, '--out', out, '--model-kwargs', 'global_pool=foo'), 'which does not fit: '),
        ((good, '--out', out, '--model-kwargs', 'sot_reg'), "key=value pairs, got 'sot_reg'"),
        ((good,), '--out'),
    ]


def test_user_errors(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for args, message in failing(tmp_path):
        assert run(*args) == 2, args
        printed = capsys.readouterr()
        assert message in printed.err and printed.err.count('\n') == 1 and not printed.out, printed.err
    assert not (tmp_path / 'ran').exists()  # what the pickle wanted
    assert not (tmp_path / 'out').exists()


def test_val_comes_before_test(tmp_path, digits_dir):
    network, _ = study(tmp_path / 'study')
    assert evaluate(network, str(digits_dir)).split == 'test'
    for split, there in (('val', 'train'), ('test', 'test')):
        (tmp_path / split).symlink_to(digits_dir / there)
    score = evaluate(network, str(tmp_path))
    assert (score.split, score.images) == ('val', 400)


def test_other_classes_are_refused(tmp_path, digits_dir, capsys):
    _, checkpoint = study(tmp_path / 'study', kwargs=dict(num_classes=3))
    assert run(checkpoint, '--out', tmp_path / 'x', '--data-dir', digits_dir) == 2
    assert '10 classes, the model 3' in capsys.readouterr().err


def test_full_disk_leaves_nothing(tmp_path, monkeypatch, capsys):
    _, checkpoint = study(tmp_path / 'study')

    def full(*args, **kwargs):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('timm_sot.export.save_for_hf', full)
    assert run(checkpoint, '--out', tmp_path / 'out' / 'x') == 2
    assert 'No space left on device' in capsys.readouterr().err
    assert os.listdir(tmp_path / 'out') == []
