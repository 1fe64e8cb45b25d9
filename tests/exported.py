""" What the tests of export share: checkpoints as studies and train.py leave them, and the command """
import json
from argparse import Namespace

import timm
import torch
from safetensors.torch import save_file
from timm.utils import CheckpointSaver

from timm_sot.cli import main

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


def train_py(folder, model='cct_2', ema=False, network=None, **args):
    """A checkpoint as train.py's saver writes it; the network is made of the arguments unless it is given."""
    folder.mkdir(exist_ok=True)
    if network is None:
        network = timm.create_model(model, num_classes=10, **args.get('model_kwargs', {}))
    network.eval()
    args = Namespace(**{**dict(
        model=model, num_classes=10, seed=42, epochs=30, lr=5e-4, data_dir='/home/somebody/images/digits',
        device='cuda', opt='adamw', prefetcher=True, dataset='', output='/home/somebody/out', model_kwargs={}, gp=None,
        in_chans=None, input_size=None, img_size=None, mean=None, std=None, interpolation='', crop_pct=None,
        crop_mode=None), **args})
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
