""" The runs of a study as tasks of Ray """
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import ray
import torch
from PIL import Image
from ray import exceptions
from safetensors.torch import load_file

import timm_sot
from timm_sot.errors import UserError
from timm_sot.study import cluster
from timm_sot.study.cluster import Cluster, ClusterSession
from timm_sot.study.engine import Recipe
from timm_sot.study.presets import Study
from timm_sot.study.runner import TIME_LIMIT, RunsFailed, run_study
from timm_sot.study.store import KEYS, Run, Store

ROWS = [('cct_2', {}), ('cct_2_sot_q', dict(sot_iters=2))]
OF_TWO = Cluster(device='cpu')


def recipe(epochs):
    return Recipe(epochs=epochs, batch_size=10, augment=('crop', 'flip'))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """An image folder of 24 dark and bright training images and 8 test images."""
    root = tmp_path_factory.mktemp('data') / 'tiny'
    for split, count in (('train', 12), ('test', 4)):
        for label in range(2):
            (root / split / str(label)).mkdir(parents=True)
            for i in range(count):
                Image.new('RGB', (32, 32), (200 * label + i,) * 3).save(root / split / str(label) / f'{i}.png')
    return str(root)


@pytest.fixture(scope='module')
def two_workers():
    """A Ray with room for two runs, in an object store that fits into little shared memory."""
    os.environ['RAY_USAGE_STATS_ENABLED'] = '0'
    ray.init(
        'local', num_cpus=2, include_dashboard=False, object_store_memory=80 << 20, logging_level=logging.ERROR,
        log_to_driver=False)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


def run(folder, out='', rows=ROWS, seeds=(5,), epochs=2, cluster=OF_TWO, **kwargs):
    return run_study(
        Study(rows, seeds, folder), recipe(epochs), torch.device('cpu'), str(out), cluster=cluster,
        **{'workers': 0, **kwargs})


def numbers(results):
    return [(result['model'], result['kwargs'], result['seed'], result['top1'], result['loss']) for result in results]


# with a Ray of two workers

def test_same_results(two_workers, folder, tmp_path, capsys, monkeypatch):
    alone = run(folder, tmp_path / 'alone', seeds=(1, 0), cluster=None)
    results = run(folder, tmp_path / 'ray', seeds=(1, 0), workers=1)
    assert numbers(results) == numbers(alone) and len(results) == 4
    for mine, theirs in zip(results, alone):
        assert tuple(mine) == KEYS and mine['seconds'] > 0
        assert {**mine, 'seconds': 0} == {**theirs, 'seconds': 0}
    assert capsys.readouterr().err.count('cct_2_sot_q sot_iters=2 seed 1: top-1') == 2

    names = [sorted(path.relative_to(root).as_posix() for path in root.rglob('*'))
             for root in (tmp_path / 'alone', tmp_path / 'ray')]
    assert names[0] == names[1] and 'checkpoints/cct_2-seed-0-epochs-2.safetensors' in names[0]
    for name in names[0]:
        if name.endswith('.safetensors'):
            states = [load_file(tmp_path / root / name) for root in ('alone', 'ray')]
            assert states[0].keys() == states[1].keys()
            assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
        elif name == 'study.json':
            assert (tmp_path / 'alone' / name).read_text() == (tmp_path / 'ray' / name).read_text()

    monkeypatch.setattr(Cluster, 'connect', None)  # finished runs need no Ray
    assert run(folder, tmp_path / 'ray', seeds=(1, 0)) == results


def flat(value):
    if isinstance(value, (dict, list)):
        return [item for part in (value.values() if isinstance(value, dict) else value) for item in flat(part)]
    return [value]


def test_lost_workers(two_workers, folder, tmp_path, capsys, monkeypatch):
    """Each worker is killed once, after its first epoch; the runs end with the numbers of undisturbed ones."""
    on_save = ClusterSession._on_save
    killed, checkpoints = [], {}

    def kill_once(self, task, checkpoint):
        on_save(self, task, checkpoint)
        if task.run.name not in killed:
            killed.append(task.run.name)
            os.kill(int(task.worker.split()[1]), signal.SIGKILL)
            checkpoints[task.run.name] = torch.load(tmp_path / 'checkpoints' / f'{task.run.name}.pt')

    monkeypatch.setattr(ClusterSession, '_on_save', kill_once)
    results = run(folder, tmp_path, epochs=8)
    assert numbers(results) == numbers(run(folder, epochs=8, cluster=None)) and len(killed) == 2
    printed = capsys.readouterr().err
    assert printed.count('(WorkerCrashedError), goes on after epoch 1') == 2

    # what the killed ones left is what a study in one process leaves
    run(folder, tmp_path / 'alone', epochs=8, cluster=None, time_limit=0.)
    for name, checkpoint in checkpoints.items():
        alone = torch.load(tmp_path / 'alone' / 'checkpoints' / f'{name}.pt')
        for mine, theirs in zip(flat({**checkpoint, 'seconds': 0}), flat({**alone, 'seconds': 0}), strict=True):
            assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs


def test_an_error_in_a_run(two_workers, folder, tmp_path, capsys):
    """144 tokens cannot be matched with 64 channels, which the model finds out when it runs."""
    rows = [(model, dict(img_size=48)) for model in ('cct_2', 'cct_2_sot_qkt', 'cct_2_sot_q')]
    with pytest.raises(RunsFailed, match='1 of 3 runs failed.*: cct_2_sot_qkt img_size=48 seed 5: ValueError: .*N = D') as e:
        run(folder, tmp_path, rows=rows)
    assert [result['model'] for result in e.value.results] == ['cct_2', 'cct_2_sot_q']
    assert 'sot_qkt' in capsys.readouterr().err
    assert e.value.results == Store(str(tmp_path)).finished(e.value.results[0]['data'])


def test_another_version(two_workers, folder, monkeypatch):
    monkeypatch.setattr(cluster, '__version__', '0.0.1')
    with pytest.raises(UserError, match=rf'Ray worker on .*: timm-sot is {timm_sot.__version__} there and 0.0.1 here'):
        run(folder)


def test_too_much_asked(two_workers, folder):
    with pytest.raises(UserError, match='no machine of the Ray cluster has 1 CPU and 0.5 GPU for a run'):
        run(folder, cluster=Cluster(device='cuda'), parallel=2)
    with pytest.raises(UserError, match='has 3 CPU for a run'):
        run(folder, cluster=Cluster(cpus=3))


def test_killed(two_workers, folder, tmp_path):
    """SIGKILL of the command, which works on the cluster of another process; a study then goes on from its epochs."""
    command = [
        sys.executable, '-m', 'timm_sot.cli', 'study', '--models', 'cct_2', '--epochs', '100', '--batch-size', '10',
        '--data-dir', folder, '--device', 'cpu', '--workers', '0', '--out', str(tmp_path), '--ray', two_workers]
    root = os.path.dirname(os.path.dirname(timm_sot.__file__))
    process = subprocess.Popen(command, env={**os.environ, 'PYTHONPATH': root}, stderr=subprocess.DEVNULL)
    checkpoint = tmp_path / 'checkpoints' / 'cct_2-seed-0-epochs-100.pt'
    for _ in range(3000):
        if checkpoint.exists() or process.poll() is not None:
            break
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert checkpoint.exists() and not (tmp_path / 'results.jsonl').exists()
    begun = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClusterSession, '_on_begin', lambda self, task, epoch, *args: (
            begun.append(epoch), on_begin(self, task, epoch, *args)))
        resumed = run(folder, tmp_path, rows=ROWS[:1], seeds=(0,), epochs=100)
    assert begun[0] >= 1
    assert numbers(resumed) == numbers(run(folder, rows=ROWS[:1], seeds=(0,), epochs=100, cluster=None))


on_begin = ClusterSession._on_begin
