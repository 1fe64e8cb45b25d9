""" How good a model is on a folder of images """
import shutil

import timm
import torch
from exported import run, study, train_py

from timm_sot.export.score import evaluate


def test_damaged_image_is_refused(tmp_path, digits_dir, capsys):
    """For one that it cannot read timm takes the next."""
    shutil.copytree(digits_dir / 'test', tmp_path / 'test')
    damaged = sorted((tmp_path / 'test').glob('*/*'))[3]
    damaged.write_bytes(damaged.read_bytes()[:60])
    _, checkpoint = study(tmp_path / 'study')
    assert run(checkpoint, '--out', tmp_path / 'x', '--data-dir', tmp_path, '--device', 'cpu') == 2
    assert f'{damaged} cannot be read as an image' in capsys.readouterr().err and not (tmp_path / 'x').exists()


def test_gray_images(tmp_path, digits_dir):
    _, checkpoint = train_py(tmp_path / 'run', model_kwargs=dict(in_chans=1), in_chans=1)
    out = tmp_path / 'cct_2.digits'
    assert run(checkpoint, '--out', out, '--data-dir', digits_dir, '--device', 'cpu') == 0
    assert '1 channels' in (out / 'README.md').read_text()
    config = timm.data.resolve_model_data_config(timm.create_model(f'local-dir:{out}', pretrained=True))
    assert len(config['mean']) == len(config['std']) == config['input_size'][0] == 1


def test_val_comes_before_test(tmp_path, digits_dir):
    network, _ = study(tmp_path / 'study')
    assert evaluate(network, str(digits_dir)).split == 'test'
    for split, there in (('val', 'train'), ('test', 'test')):
        (tmp_path / split).symlink_to(digits_dir / there)
    score = evaluate(network, str(tmp_path))
    assert (score.split, score.images) == ('val', 400)


def test_float32_is_not_tensorfloat(tmp_path, digits_dir, monkeypatch):
    """Which is torch's default for convolutions on a GPU; the card says float32."""
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', True)
    network, _ = study(tmp_path / 'study')
    seen = []
    network.register_forward_hook(lambda *args: seen.append(torch.backends.cudnn.allow_tf32))
    evaluate(network, str(digits_dir))
    assert seen and not any(seen)


def test_other_classes_are_refused(tmp_path, digits_dir, capsys):
    _, checkpoint = study(tmp_path / 'study', kwargs=dict(num_classes=3))
    assert run(checkpoint, '--out', tmp_path / 'x', '--data-dir', digits_dir) == 2
    assert '10 classes, the model 3' in capsys.readouterr().err
