"""The calls that timm's train.py makes, from the installed timm; train.py itself if TIMM_SCRIPTS names its folder."""
import csv
import itertools
import os
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch
import torch.multiprocessing as mp
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, random_seed

import timm_sot  # noqa: F401, as --device-modules timm_sot does, so that the autoload may be off

pytestmark = pytest.mark.slow

SOT_MODELS = [name for name in timm.list_models('cct_2*')]
CONFIGS = Path(__file__).parents[1] / 'train_configs'
DEVICE = torch.device('cpu')


def timm_task():
    return pytest.importorskip(
        'timm.task', reason=f'timm {timm.__version__} has no timm.task yet; its train.py made other calls')


def create_model(name, **kwargs):
    # the keywords of train.py, most of them None unless given on the command line
    return timm.create_model(
        name, pretrained=False, in_chans=3, num_classes=10, drop_rate=0., drop_path_rate=None, drop_block_rate=None,
        global_pool=None, bn_momentum=None, bn_eps=None, scriptable=False, checkpoint_path='', **kwargs)


def loader(root, split, model, batch_size):
    config = resolve_data_config({}, model=model)
    training = split == 'train'
    dataset = create_dataset('', root=root, split=split, is_training=training, batch_size=batch_size)
    # no augmentation: two runs that are compared then see the same images
    return create_loader(
        dataset, input_size=config['input_size'], batch_size=batch_size, is_training=training, no_aug=True,
        interpolation=config['interpolation'], mean=config['mean'], std=config['std'], crop_pct=config['crop_pct'],
        num_workers=0, device=DEVICE, use_prefetcher=True)


def top1(model, batches):
    model.eval()
    with torch.no_grad():
        hits = [(model(x).argmax(1) == y).float() for x, y in batches]
    return torch.cat(hits).mean().item()


class Run:
    """What train.py builds around a model, and its epoch."""

    def __init__(self, name, root, out, epochs=2, **model_kwargs):
        self.task_lib = timm_task()
        random_seed(42, 0)
        model = create_model(name, **model_kwargs)
        # the same images over and over: with new ones CCT takes minutes to leave the plateau that it starts on
        self.train = [(x.clone(), y.clone()) for x, y in itertools.islice(loader(root, 'train', model, 20), 2)] * 10
        self.test = [(x.clone(), y.clone()) for x, y in loader(root, 'test', model, 100)]
        self.task = self.task_lib.ClassificationTask(
            model, criterion=LabelSmoothingCrossEntropy(0.1), device=DEVICE, verbose=False)
        self.model = self.task.get_trainable_module()
        self.optimizer = create_optimizer_v2(self.model, opt='adamw', lr=2e-3, weight_decay=3e-2)
        self.scheduler, self.epochs = create_scheduler_v2(
            self.optimizer, sched='cosine', num_epochs=epochs, warmup_epochs=0, min_lr=1e-3, cooldown_epochs=0,
            updates_per_epoch=len(self.train))
        out.mkdir(exist_ok=True)
        self.saver = CheckpointSaver(
            model=self.model, optimizer=self.optimizer, args=Namespace(model=name), checkpoint_dir=str(out),
            recovery_dir=str(out), max_history=2, task=self.task)
        self.losses = []

    def resume(self, checkpoint):
        epoch = self.task_lib.resume_task_checkpoint(self.task, str(checkpoint), optimizer=self.optimizer)
        self.scheduler.step(epoch)
        return epoch

    def fit(self, start=0, stop=None):
        for epoch in range(start, stop or self.epochs):
            torch.manual_seed(epoch)  # the order of the images and the dropout masks, also after a resume
            self.model.train()
            for x, y in self.train:
                loss = self.task(x, y)['loss']
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                self.losses.append(loss.item())
            self.saver.save_checkpoint(epoch, metric=-self.losses[-1])
            self.scheduler.step(epoch + 1)
        return self


@pytest.mark.parametrize('name', SOT_MODELS)
def test_trains(name, digits_dir, tmp_path):
    run = Run(name, digits_dir, tmp_path).fit()
    assert sum(run.losses[-5:]) < 0.9 * sum(run.losses[:5]), run.losses
    # what validate.py does with the checkpoint
    model = timm.create_model(name, num_classes=10, checkpoint_path=str(tmp_path / 'last.pth.tar'))
    assert top1(model, run.test) == top1(run.model, run.test)


def test_resume_continues_the_run(digits_dir, tmp_path):
    whole = Run('cct_2_sot_qk', digits_dir, tmp_path / 'whole').fit()
    Run('cct_2_sot_qk', digits_dir, tmp_path / 'cut').fit(stop=1)
    resumed = Run('cct_2_sot_qk', digits_dir, tmp_path / 'resumed')
    start = resumed.resume(tmp_path / 'cut' / 'last.pth.tar')
    assert start == 1
    resumed.fit(start)
    assert resumed.losses == whole.losses[len(whole.train):]
    for (key, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values()):
        assert torch.equal(a, b), key


def test_model_kwargs_reach_the_attention(digits_dir, tmp_path):
    run = Run('cct_2', digits_dir, tmp_path, epochs=1, attn='sot_q', sot_reg=0.8, sot_iters=3, sot_tol=0.1)
    for block in run.model.blocks:
        attn = block.attn
        assert (attn.variant, attn.reg, attn.iters, attn.tol) == ('sot_q', 0.8, 3, 0.1)
    run.fit()


@pytest.mark.parametrize('options', [dict(compile='aot_eager'), dict(amp=torch.bfloat16)], ids=['torchcompile', 'amp'])
def test_torchcompile_and_amp(options, digits_dir, tmp_path):
    run = Run('cct_2_sot_qk', digits_dir, tmp_path)
    if 'compile' in options:
        run.task.compile(backend=options['compile'])
    losses = []
    for x, y in run.train * 2:
        with torch.autocast('cpu', dtype=options.get('amp'), enabled='amp' in options):
            loss = run.task(x, y)['loss']
        run.optimizer.zero_grad()
        loss.backward()
        run.optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5]), losses


def _train_rank(rank, world_size, root, store, out):
    """Every image of each batch on one of `world_size` processes; no dropout, so only rounding may differ."""
    torch.set_num_threads(1)
    random_seed(42, 0)
    model = create_model('cct_2_sot_qk', attn_drop_rate=0.).eval()  # eval: no stochastic depth either
    batches = [(x.clone(), y.clone()) for x, y in itertools.islice(loader(root, 'train', model, 20), 4)]
    task = timm_task().ClassificationTask(model, criterion=LabelSmoothingCrossEntropy(0.1), verbose=False)
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt='sgd', lr=0.01)
    if world_size > 1:
        torch.distributed.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=world_size)
        task.prepare_distributed()  # without the device_ids that train.py passes: torch refuses them on CPU
    losses = []
    for x, y in batches * 4:
        loss = task(x[rank::world_size], y[rank::world_size])['loss']
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss = loss.detach()
        if world_size > 1:
            torch.distributed.all_reduce(loss)
        losses.append(loss.item() / world_size)
    if rank == 0:
        torch.save((losses, model.state_dict()), out)
    if world_size > 1:
        torch.distributed.destroy_process_group()


def test_two_processes_train_as_one_with_the_doubled_batch(digits_dir, tmp_path):
    timm_task()
    _train_rank(0, 1, digits_dir, None, tmp_path / 'one.pt')
    mp.spawn(_train_rank, (2, digits_dir, tmp_path / 'store', tmp_path / 'two.pt'), nprocs=2)
    (losses, weights), (losses2, weights2) = (torch.load(tmp_path / name) for name in ('one.pt', 'two.pt'))
    assert losses[0] != losses[4]  # the weights have changed
    assert losses == pytest.approx(losses2, rel=1e-4)
    for key in weights:
        torch.testing.assert_close(weights[key], weights2[key], rtol=1e-3, atol=1e-5, msg=key)


scripts = pytest.mark.skipif(
    'TIMM_SCRIPTS' not in os.environ,
    reason='timm does not ship train.py and validate.py: set TIMM_SCRIPTS to a folder that holds them')


def run_script(name, *args, wait=True, env=None):
    command = [sys.executable, str(Path(os.environ['TIMM_SCRIPTS']) / name), *map(str, args)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **(env or {})})
    if not wait:
        return process
    out = process.communicate()[0]
    assert process.returncode == 0, out[-3000:]
    return out


def summary(folder):
    with open(folder / 'summary.csv') as f:
        return list(csv.DictReader(f))


@scripts
@pytest.mark.parametrize('name', SOT_MODELS)
def test_train_script_and_validate_script(name, digits_dir, tmp_path):
    config = CONFIGS / 'cifar10-smoke-cpu.yaml'
    run_script(
        'train.py', '--config', config, '--model', name, '--data-dir', digits_dir, '--epochs', 2, '--batch-size', 40,
        '--output', tmp_path, '--experiment', 'run', '--model-kwargs', 'sot_reg=0.8')
    assert [row['epoch'] for row in summary(tmp_path / 'run')] == ['0', '1']
    out = run_script(
        'validate.py', '--model', name, '--num-classes', 10, '--data-dir', digits_dir, '--split', 'test', '--device',
        'cpu', '--checkpoint', tmp_path / 'run' / 'last.pth.tar', '--model-kwargs', 'sot_reg=0.8')
    assert f'"top1": {float(summary(tmp_path / "run")[-1]["eval_top1"]):.4g}'[:13] in out, out[-1000:]


@scripts
def test_train_script_resumes_after_sigkill(digits_dir, tmp_path):
    args = ('--config', CONFIGS / 'cifar10-smoke-cpu.yaml', '--model', 'cct_2_sot_qk', '--data-dir', digits_dir,
            '--epochs', 4, '--batch-size', 40, '--output', tmp_path)
    process = run_script('train.py', *args, '--experiment', 'killed', wait=False)
    last = tmp_path / 'killed' / 'last.pth.tar'
    deadline = time.monotonic() + 120
    while not last.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.kill()
    process.communicate()
    run_script('train.py', *args, '--experiment', 'resumed', '--resume', last)
    assert summary(tmp_path / 'resumed')[-1]['epoch'] == '3'
    assert int(summary(tmp_path / 'resumed')[0]['epoch']) >= 1


@scripts
@pytest.mark.parametrize('flags', [('--torchcompile', 'aot_eager'), ('--amp', '--amp-dtype', 'bfloat16')])
def test_train_script_flags(flags, digits_dir, tmp_path):
    run_script(
        'train.py', '--config', CONFIGS / 'cifar10-smoke-cpu.yaml', '--model', 'cct_2_sot_qk', '--data-dir', digits_dir,
        '--batch-size', 40, '--output', tmp_path, '--experiment', 'run', *flags)
    assert len(summary(tmp_path / 'run')) == 1


@scripts
def test_train_script_finds_the_models_without_device_modules(digits_dir, tmp_path):
    run_script(
        'train.py', '--model', 'cct_2_sot_q', '--data-dir', digits_dir, '--num-classes', 10, '--val-split', 'test',
        '--epochs', 1, '--warmup-epochs', 0, '--batch-size', 40, '--workers', 0, '--device', 'cpu', '--output',
        tmp_path, '--experiment', 'run')
    assert len(summary(tmp_path / 'run')) == 1
