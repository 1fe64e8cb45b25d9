""" The runs of a study as tasks of Ray """
import logging
import os
import platform
import signal
import socket
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import ray
import torch
from ray import exceptions
from safetensors.torch import load_file
from study_process import kill_after_an_epoch

import timm_sot
from timm_sot.errors import UserError
from timm_sot.study import cluster, runner
from timm_sot.study.cluster import NOT_BEGUN, Cluster, ClusterSession, Link
from timm_sot.study.data import Images, StudyData
from timm_sot.study.engine import Recipe
from timm_sot.study.presets import Study
from timm_sot.study.progress import Progress
from timm_sot.study.runner import TIME_LIMIT, RunsFailed, Setting, run_study
from timm_sot.study.store import KINDS, Run, Store

pytestmark = pytest.mark.slow

ROWS = [('cct_2', {}), ('cct_2_sot_q', dict(sot_iters=2))]
OF_TWO = Cluster(device='cpu')


def recipe(epochs):
    return Recipe(epochs=epochs, batch_size=10, augment=('crop', 'flip'))


@pytest.fixture(scope='module')
def two_workers(tmp_path_factory):
    """A Ray with room for two runs, in an object store that fits into little shared memory."""
    os.environ['RAY_USAGE_STATS_ENABLED'] = '0'
    folder = os.getcwd()
    # Ray lets its workers import from the current folder: not from this source tree where another copy is installed
    os.chdir(tmp_path_factory.mktemp('elsewhere'))
    ray.init(
        'local', num_cpus=2, include_dashboard=False, object_store_memory=80 << 20, logging_level=logging.ERROR,
        log_to_driver=False)
    os.chdir(folder)
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
        assert set(mine) == {*KINDS, 'processor', 'entropy', 'common'} and mine['seconds'] > 0
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


def test_lost_worker(two_workers, folder, tmp_path, capsys, monkeypatch):
    """A worker is killed after its first epoch; the runs end with the numbers of undisturbed ones."""
    on_save = ClusterSession._on_save
    left = []  # checkpoint of the killed worker

    def kill(self, task, checkpoint):
        if not left:
            os.kill(int(task.worker.split()[1]), signal.SIGKILL)
        on_save(self, task, checkpoint)
        if not left:
            left.append((task.run.name, torch.load(tmp_path / 'checkpoints' / f'{task.run.name}.pt')))

    monkeypatch.setattr(ClusterSession, '_on_save', kill)
    results = run(folder, tmp_path, epochs=12)
    assert numbers(results) == numbers(run(folder, epochs=12, cluster=None))
    printed = capsys.readouterr().err
    assert printed.count('(WorkerCrashedError), goes on after epoch ') == 1 and 'after epoch 0' not in printed

    # what it left is what a study in one process leaves
    run(folder, tmp_path / 'alone', epochs=12, cluster=None, time_limit=0.)
    (name, mine), = left
    theirs = torch.load(tmp_path / 'alone' / 'checkpoints' / f'{name}.pt')
    for a, b in zip(flat({**mine, 'seconds': 0}), flat({**theirs, 'seconds': 0}), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_an_error_in_a_run(two_workers, folder, tmp_path, monkeypatch, capsys):
    """A layer cannot be kept with probability -1, which the model finds out when it trains."""
    monkeypatch.setattr(runner, 'check_row', lambda row, data: None)  # finds it out before
    rows = [('cct_2', {}), ('cct_2_sot_q', dict(drop_path_rate=2.)), ('cct_2_sot_q', {})]
    message = '1 of 3 runs failed.*: cct_2_sot_q drop_path_rate=2.0 seed 5: RuntimeError: .*bernoulli_'
    with pytest.raises(RunsFailed, match=message) as e:
        run(folder, tmp_path, rows=rows)
    assert [result['model'] for result in e.value.results] == ['cct_2', 'cct_2_sot_q']
    assert 'bernoulli_' in capsys.readouterr().err  # with where it happened
    kept = Store(str(tmp_path)).finished(e.value.results[0]['data']).values()  # in the order in which they ended
    assert sorted(kept, key=lambda result: result['model']) == e.value.results


def test_another_version(two_workers, folder, monkeypatch):
    monkeypatch.setattr(cluster, '__version__', '0.0.1')
    with pytest.raises(UserError, match=rf'Ray worker on .*: timm-sot is {timm_sot.__version__} there and 0.0.1 here'):
        run(folder)


def test_too_much_asked(two_workers, folder):
    with pytest.raises(UserError, match='no machine of the Ray cluster has 1 CPU and 0.5 GPU for a run'):
        run(folder, cluster=Cluster(device='cuda'), parallel=2)
    with pytest.raises(UserError, match='has 3 CPU for a run'):
        run(folder, cluster=Cluster(cpus=3))


def test_killed(two_workers, folder, tmp_path, monkeypatch):
    """SIGKILL of the command, which works on the cluster of another process; a study then goes on from its epochs."""
    checkpoint = tmp_path / 'checkpoints' / 'cct_2-seed-0-epochs-20.pt'
    kill_after_an_epoch([
        '--models', 'cct_2', '--epochs', '20', '--batch-size', '10', '--data-dir', folder, '--device', 'cpu',
        '--workers', '0', '--out', str(tmp_path), '--ray', two_workers], checkpoint)
    epochs = torch.load(checkpoint)['epoch']
    on_begin, begun = ClusterSession._on_begin, []
    monkeypatch.setattr(ClusterSession, '_on_begin', lambda self, task, epoch, *values: (
        begun.append(epoch), on_begin(self, task, epoch, *values)))
    resumed = run(folder, tmp_path, rows=ROWS[:1], seeds=(0,), epochs=20)
    assert begun == [epochs] and 1 <= epochs < 20
    assert numbers(resumed) == numbers(run(folder, rows=ROWS[:1], seeds=(0,), epochs=20, cluster=None))


# with a stand-in for Ray, whose tasks are lists of messages

class Stream(list):
    """The messages that a task will send; 'nothing' lets a timeout pass."""

    def __next__(self):
        if not self:
            raise StopIteration
        return self.pop(0)


class StandIn:
    """Tasks, in the order in which they are submitted, send what `scripts` holds: errors are raised."""
    exceptions = exceptions

    def __init__(self, scripts, machines=(dict(CPU=2., GPU=1.),)):
        self.scripts = [Stream(script) for script in scripts]
        self.machines = [{'Alive': True, 'Resources': resources} for resources in machines]
        self.submitted, self.cancelled = [], []

    def cluster_resources(self):
        return {'GPU': sum(machine['Resources'].get('GPU', 0.) for machine in self.machines)}

    def nodes(self):
        return self.machines

    def put(self, value):
        return value

    def remote(self, **options):
        self.options = options
        return lambda function: SimpleNamespace(remote=self._submit)

    def _submit(self, version, setting, run, checkpoint, place):
        self.submitted.append((run.model, checkpoint and checkpoint['epoch']))
        self.place = place
        return self.scripts.pop(0)

    def wait(self, streams, timeout):
        for stream in streams:
            if stream[:1] != ['nothing']:
                return [stream], []
            next(stream)
        return [], streams

    def get(self, message):
        if isinstance(message, Exception):
            raise message
        return message

    def cancel(self, stream, force):
        self.cancelled.append(stream)


BEGIN = ('begin', 0, 3, 'process 7 on here')
LOST = exceptions.WorkerCrashedError()


def save(epoch):
    return 'save', {'epoch': epoch, 'top1': [50.] * epoch}


def finish(model, epochs=2, device='cpu'):
    return 'finish', dict(
        model=model, kwargs={}, seed=0, epochs=epochs, top1=[50.] * epochs, final=50., best=50., seconds=1.,
        device=device, versions={'torch': '1'}), {}


def play(stand_in, models=('a',), of=Cluster(), deadline=float('inf'), parallel=6, workers=None):
    """Run one run of each model; returns the lines of failures and the models that are finished."""
    images = Images(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
    runs = [Run(model, {}, 0, 2) for model in models]
    store, progress = Store(''), Progress(runs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cluster, 'connect', lambda self: nullcontext(stand_in))
        setting = Setting(('a', {}), StudyData('', images, images, 2), '', recipe(2))
        with of.session(setting, store, progress, deadline) as session:
            failed = session.run(runs, parallel, workers)
    progress.close()
    stand_in.epochs = progress.study.n
    return failed, [result['model'] for result in store.lines]


def test_runs_of_another_process(monkeypatch, capsys):
    monkeypatch.setattr(Store, '_claim', lambda self, run: nullcontext(run.model != 'a'))
    stand_in = StandIn([[BEGIN, finish('b')]])
    assert play(stand_in, 'ab') == ([], ['b']) and stand_in.submitted == [('b', None)]
    assert 'runs left to other processes, which work on them: 1;' in capsys.readouterr().err


def test_runs_go_on_from_the_last_checkpoint(capsys):
    again = ('begin', 1, *BEGIN[2:])
    stand_in = StandIn([[BEGIN, ('step', 2), LOST], [BEGIN, save(1)], [again, LOST], [again, finish('a')]])
    assert play(stand_in) == ([], ['a']) and stand_in.epochs == 2
    assert stand_in.submitted == [('a', None), ('a', None), ('a', 1), ('a', 1)]
    printed = capsys.readouterr().err
    assert printed.count('a seed 0: lost process 7 on here (WorkerCrashedError), goes on after epoch') == 2
    assert 'goes on after epoch 0' in printed and '(StopIteration), goes on after epoch 1' in printed


def test_losses_are_bounded():
    """Three retries without an epoch between them; the other run finishes."""
    lost = [BEGIN, LOST]
    stand_in = StandIn([lost, [BEGIN, finish('b')], lost, lost, [BEGIN, save(1), LOST], lost, lost, lost])
    failed, finished = play(stand_in, ['a', 'b'])
    assert failed == ['a seed 0: 4 workers lost in one epoch, the last with WorkerCrashedError: '
                      + str(LOST).splitlines()[0]]
    assert finished == ['b'] and len(stand_in.submitted) == 8


def test_time_limit(monkeypatch, capsys):
    """The run that has finished an epoch stops, the one that waits does not begin, the third finishes its epoch."""
    clock = [0.]
    monkeypatch.setattr(cluster, 'time', SimpleNamespace(monotonic=lambda: clock[0]))
    on_step = ClusterSession._on_step
    monkeypatch.setattr(ClusterSession, '_on_step', lambda self, task, steps: (
        clock.__setitem__(0, clock[0] + 10 * steps), on_step(self, task, steps)))

    def scripts():
        clock[0] = 0.
        return StandIn([
            [BEGIN, ('step', 1), save(1), ('step', 1), finish('a')],
            [BEGIN, 'nothing', 'nothing', 'nothing', save(1), finish('b')],
            ['nothing'] * 9 + [BEGIN, finish('c')]])

    assert play(scripts(), 'abc', deadline=100.) == ([], ['a', 'b', 'c'])
    assert TIME_LIMIT not in capsys.readouterr().err
    stand_in = scripts()
    assert play(stand_in, 'abc', deadline=21.) == ([], [])
    waiting, stopped, last = stand_in.cancelled
    assert BEGIN in waiting and stopped == [('step', 1), finish('a')] and last == [finish('b')]
    assert capsys.readouterr().err.count(TIME_LIMIT) == 1


def test_nothing_begins_after_the_time_limit(capsys):
    stand_in = StandIn([['nothing', BEGIN]])
    assert play(stand_in, deadline=time.monotonic()) == ([], []) and len(stand_in.cancelled) == 1
    said = capsys.readouterr().err
    assert NOT_BEGUN in said and TIME_LIMIT not in said


def test_no_machine_left(capsys):
    stand_in = StandIn([[BEGIN, LOST], ['nothing', 'nothing', BEGIN, finish('a')]])
    get, stand_in.get = stand_in.get, lambda message: (stand_in.machines[0].update(Alive=False), get(message))[1]
    assert play(stand_in) == ([], ['a'])
    assert capsys.readouterr().err.count('waits for a machine that has 1 CPU') == 1


def test_shares():
    def asked(*args, **kwargs):
        stand_in = StandIn([[BEGIN, finish('a')]], kwargs.pop('machines', (dict(CPU=8., GPU=2.), dict(CPU=64.))))
        play(stand_in, of=Cluster('', *args), **kwargs)
        assert stand_in.options['max_retries'] == 0 and stand_in.options['num_returns'] == 'streaming'
        return [stand_in.options[key] for key in ('num_cpus', 'num_gpus')] + [
            stand_in.place[key] for key in ('device', 'threads', 'workers')]

    assert asked() == [1., 0.1666, 'cuda', 1, 0]  # six of a sixth that is rounded up have no room on one GPU
    assert asked('', 3., parallel=2) == [3., 0.5, 'cuda', 3, 2]
    assert asked('', 0.5, 0.25, workers=1) == [0.5, 0.25, 'cuda', 1, 1]
    assert asked('cpu', 2.) == [2., 0., 'cpu', 2, 1]
    assert asked(machines=[dict(CPU=2.)]) == [1., 0., 'cpu', 1, 0]
    with pytest.raises(UserError, match='has 16 CPU and 0.1666 GPU for a run; add one'):
        asked('', 16.)  # there are such, but on two machines
    with pytest.raises(UserError, match='has 1 CPU and 0.25 GPU for a run; add one'):
        asked('', 1., 0.25, machines=[dict(CPU=2.)])  # and not on a CPU unasked


def test_worker():
    """What a task does and sends, in this process."""
    images = Images(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]))
    data = StudyData('', images, images, 2)
    run = Run('cct_2', {}, 0, 2)
    setting = Setting(('cct_2', {}), cluster.to_arrays(data), 'these', recipe(2))
    place = dict(device='cpu', threads=2, workers=0)
    threads = torch.get_num_threads()
    try:
        begin, *messages, finish = cluster.train_run(timm_sot.__version__, setting, run, None, place)
        (_, checkpoint), = [message for message in messages if message[0] == 'save']
        again = [*cluster.train_run(timm_sot.__version__, setting, run, checkpoint, place)]
    finally:
        torch.set_num_threads(threads)
    assert begin == ('begin', 0, 1, f'process {os.getpid()} on {platform.node()}')
    assert sum(message[1] for message in messages if message[0] == 'step') == 2
    assert checkpoint['epoch'] == 1 and checkpoint['data'] == 'these'
    assert finish[0] == 'finish' and finish[1]['device'] == 'cpu (2 threads), float32'
    assert finish[2].keys() == checkpoint['state']['model'].keys()

    assert again[0][:2] == ('begin', 1) and {**again[-1][1], 'seconds': 0} == {**finish[1], 'seconds': 0}


def test_a_worker_sends_copies():
    """Training goes on while a message is on its way."""
    link, weight = Link(), torch.zeros(2)
    link.save(None, {'epoch': 1, 'state': {'optimizer': [{'step': weight}]}})
    link.finish(None, {}, {'weight': weight})
    weight.add_(1)
    (_, saved), (_, _, weights) = link.messages.get(), link.messages.get()
    assert saved['epoch'] == 1 and not saved['state']['optimizer'][0]['step'].any() and not weights['weight'].any()


def test_another_device_is_said():
    stand_in = StandIn([[BEGIN, finish('a')], [BEGIN, finish('b', device='B')]])
    with pytest.warns(UserWarning, match='there are runs of cpu, those to come are of B'):
        play(stand_in, ('a', 'b'))


def test_warnings_are_said_once(capsys):
    warning = ('warning', 'here: UserWarning: beware')
    assert play(StandIn([[warning, BEGIN, finish('a')], [BEGIN, warning, finish('b')]]), 'ab') == ([], ['a', 'b'])
    assert capsys.readouterr().err.count('beware') == 1


def test_ray_does_not_print_to_stdout(capsys):
    stand_in = StandIn([[BEGIN, finish('a')]])
    get, stand_in.get = stand_in.get, lambda message: (print('of a raylet'), get(message))[1]
    play(stand_in)
    printed = capsys.readouterr()
    assert not printed.out and printed.err.count('of a raylet') == 2


def test_a_machine_without_timm_sot():
    error = exceptions.RayTaskError('train_run', "\nModuleNotFoundError: No module named 'timm_sot'", RuntimeError(
        'The remote function failed to import on the worker.'))
    stand_in = StandIn([[error], [BEGIN]])
    with pytest.raises(UserError, match="cannot import timm-sot .*: ModuleNotFoundError: No module named 'timm_sot';"):
        play(stand_in, 'ab')
    assert len(stand_in.cancelled) == 2


# connecting

def closed_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@pytest.mark.parametrize('address, message', [
    ('127.0.0.1:{port}', r'no Ray at 127.0.0.1:\d+ \(.*refused\); --ray takes HOST:PORT'),
    ('[::1]:{port}', r'no Ray at \[::1\]'),
    ('nonsense', 'no Ray at nonsense'),
    ('127.0.0.1:99999', 'no Ray at 127.0.0.1:99999'),
    ('ray://127.0.0.1:10001', 'ray://127.0.0.1:10001 is an address of Ray Client'),
])
@pytest.mark.parametrize('variable', [False, True])
def test_unreachable(address, message, variable, monkeypatch):
    monkeypatch.setattr(ray, 'is_initialized', lambda: False)
    monkeypatch.setattr(ray, 'init', None)
    address = address.format(port=closed_port())
    if variable:
        monkeypatch.setenv('RAY_ADDRESS', address)
    with pytest.raises(UserError, match=message), Cluster('' if variable else address).connect():
        pass


def test_starts_a_quiet_ray(monkeypatch):
    calls = []
    monkeypatch.delenv('RAY_ADDRESS', raising=False)
    monkeypatch.setenv('RAY_USAGE_STATS_ENABLED', '1')
    monkeypatch.setattr(ray, 'is_initialized', lambda: False)
    monkeypatch.setattr(ray, 'init', lambda address, **options: calls.append((address, options)))
    monkeypatch.setattr(ray, 'shutdown', lambda: calls.append('shutdown'))
    with Cluster().connect():
        (address, options), = calls
    assert address == 'local' and options['include_dashboard'] is False and options['log_to_driver'] is False
    assert os.environ['RAY_USAGE_STATS_ENABLED'] == '0' and calls[1:] == ['shutdown']


def test_ray_cannot_start(monkeypatch):
    def init(*args, **kwargs):
        raise OSError('AF_UNIX path length')

    monkeypatch.setattr(ray, 'is_initialized', lambda: False)
    monkeypatch.setattr(ray, 'init', init)
    with pytest.raises(UserError, match='Ray at local: OSError: AF_UNIX path length'), Cluster('local').connect():
        pass


def test_without_ray(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, 'ray', None)
    with pytest.raises(UserError, match=r"needs the package ray; install it with: pip install 'timm-sot\[ray\]'"):
        run(folder)


def test_device():
    with pytest.raises(UserError, match="device 'cuda:1' cannot be used with Ray"):
        Cluster(device='cuda:1')
    with pytest.raises(UserError, match='--gpus-per-run is of runs on a GPU, and the device is to be cpu'):
        Cluster(device='cpu', gpus=0.5)
