""" timm-sot export: from checkpoints of studies and of train.py to folders """
import json
import os
from argparse import Namespace

import pytest
import timm
import torch
from exported import logits, run, study
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from timm_sot.cli import main
from timm_sot.export.score import evaluate


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
                     'NVIDIA TPU, float32; Brain 1', '31.00 ± 1.00 after the last epoch',
                     'pip install .  # in a clone of timm-sot', 'torch 9.9', score.digest,
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


def test_full_disk_leaves_nothing(tmp_path, monkeypatch, capsys):
    _, checkpoint = study(tmp_path / 'study')

    def full(*args, **kwargs):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('timm_sot.export.save_for_hf', full)
    assert run(checkpoint, '--out', tmp_path / 'out' / 'x') == 2
    assert 'No space left on device' in capsys.readouterr().err
    assert os.listdir(tmp_path / 'out') == []
