""" The runs of a study as tasks of Ray, on this machine or on many

Each run is a task with a share of a GPU. The folder of the study belongs to this process alone: a task is given the
last checkpoint of its run, and streams back its steps, a checkpoint after each epoch, and the result. So the machines
need no file system in common, and a run whose worker is lost goes on from the last epoch, wherever there is room. An
epoch of images is a function of seed and epoch alone, so it does not matter where it is made.
"""
import logging
import math
import os
import platform
import queue
import socket
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, replace
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Set, Tuple

import torch

from .. import __version__
from ..errors import UserError, missing_extra, one_line
from ..machine import resolve_device
from .data import Images, StudyData
from .progress import Progress
from .runner import TIME_LIMIT, Session, Setting, left_to_others, warn_of_other_places
from .store import Run, Store

__all__ = ['Cluster']

RETRIES = 3  # of a run, without an epoch finished between them
CONNECT_SECONDS = 5.
STEP_SECONDS = 0.5  # between two messages of a worker about its steps
NOT_BEGUN = 'time limit: stopped before a run could begin on the cluster, the same command tries again'


@dataclass(frozen=True)
class Cluster:
    """Which Ray to use, and what each run takes of it."""
    address: str = ''  # '' is what the environment variable RAY_ADDRESS names, or else a Ray of our own
    device: str = ''  # 'cpu' or 'cuda'; '' is cuda with `gpus`, or if there is a GPU in the cluster
    cpus: float = 1.  # a run has as many threads, rounded down, but one at least
    gpus: Optional[float] = None  # at most 1; None: as many runs share a GPU as are to advance together

    def session(self, *args) -> 'ClusterSession':
        """A session on this cluster; the arguments are those of `ClusterSession`."""
        return ClusterSession(self, *args)

    def __post_init__(self):
        if self.device not in ('', 'cpu', 'cuda'):
            raise UserError(
                f'device {self.device!r} cannot be used with Ray, which itself chooses among GPUs; take cpu or cuda.')
        if self.gpus is not None and not 0 < self.gpus <= 1:
            raise UserError(f'--gpus-per-run must be above 0 and at most 1, got {self.gpus:g}.')
        if self.gpus is not None and self.device == 'cpu':
            raise UserError('--gpus-per-run is of runs on a GPU, and the device is to be cpu; leave one of them out.')

    @contextmanager
    def connect(self) -> Iterator[Any]:
        """Ray, started or joined; it is left as it was where this process already has one."""
        try:
            import ray
        except ImportError as e:
            raise missing_extra(e, 'ray') from e

        address = self.address or os.environ.get('RAY_ADDRESS') or 'local'
        if ray.is_initialized():
            yield ray
            return
        options = {}
        if address == 'local':
            os.environ['RAY_USAGE_STATS_ENABLED'] = '0'
            options = dict(include_dashboard=False)
        elif address != 'auto':
            check_address(address)
        try:
            ray.init(address, logging_level=logging.ERROR, log_to_driver=False, **options)
        except (ConnectionError, OSError, RuntimeError, ValueError) as e:
            hint = '' if address == 'local' else '; where a cluster asks for a token, set RAY_AUTH_MODE=token'
            raise UserError(f'Ray at {address}: {one_line(e)}{hint}.') from e
        try:
            yield ray
        finally:
            ray.shutdown()


@dataclass(eq=False)
class Task:
    """A run that is not finished yet."""
    run: Run
    checkpoint: Optional[Dict[str, Any]]  # the last that came
    stream: Any = None  # of what its worker sends
    worker: str = ''  # '' as long as it waits for one
    since: float = 0.  # when its epoch began
    losses: int = 0  # workers lost since the last finished epoch


class ClusterSession:
    """What `runner.Session` is for this process, for a cluster; a context, inside which Ray is there."""

    def __init__(self, cluster: Cluster, setting: Setting, store: Store, progress: Progress, deadline: float):
        """Initialize the session; the arguments are those of `runner.Session`, of which only workers have a device."""
        self.cluster, self.setting = cluster, setting
        self.store, self.progress, self.deadline = store, progress, deadline
        self.tasks: List[Task] = []
        self.failed: List[str] = []
        self.said: Set[str] = set()
        self.stack = ExitStack()
        self.ray: Any = None  # the module, inside of the context
        # of `run`
        self.needs: Dict[str, float] = {}  # what Ray is to give each run
        self.place: Dict[str, Any] = {}  # where a worker is to train, see `train_run`
        self.remote: Any = None  # `train_run` as a task
        self.sent: Any = None  # the setting, in the cluster's memory
        self.handlers: Dict[str, Callable[..., None]] = {  # of the messages of a worker, see `Link`
            'begin': self._on_begin,
            'step': self._on_step,
            'warning': self._on_warning,
            'save': self._on_save,
            'finish': self._on_finish,
        }

    def __enter__(self) -> 'ClusterSession':
        self.ray = self.stack.enter_context(self.cluster.connect())
        self.stack.enter_context(redirect_stdout(sys.stderr))  # Ray prints what it has to say of lost machines
        return self

    def __exit__(self, *exception) -> None:
        self._stop(self.tasks)
        self.stack.close()

    def run(self, runs: Sequence[Run], parallel: int, workers: Optional[int]) -> List[str]:
        """Run those of `runs` that no other process has, until the deadline.

        Args:
            runs: What to run; Ray starts them seed by seed.
            parallel: Runs that share a GPU, unless the cluster's `gpus` says it.
            workers: Processes of each run that augment, None for one less than it has CPUs.

        Returns:
            A line for each run that failed.

        Raises:
            UserError: If no machine has room for a run, or one is not fit to run it.
        """
        ray, cpus = self.ray, self.cluster.cpus
        device = self.cluster.device or (
            'cuda' if self.cluster.gpus or ray.cluster_resources().get('GPU') else 'cpu')
        share = self.cluster.gpus or math.floor(1e4 / parallel) / 1e4  # Ray keeps four digits
        self.needs = {'CPU': cpus, 'GPU': share if device == 'cuda' else 0.}
        if not self._room():
            raise UserError(
                f'no machine of the Ray cluster has {self._needs_in_words()} for a run; add one that has, or ask '
                f'for less with --cpus-per-run, --gpus-per-run or --device cpu.')
        self.place = dict(
            device=device, threads=max(1, int(cpus)), workers=max(0, int(cpus) - 1) if workers is None else workers)
        # Ray itself would begin a lost task anew, we go on from its last checkpoint
        self.remote = ray.remote(
            num_returns='streaming', max_retries=0, num_cpus=cpus, num_gpus=self.needs['GPU'])(train_run)
        self.sent = ray.put(replace(self.setting, data=to_arrays(self.setting.data)))
        taken = self.stack.enter_context(self.store.claim(runs, self.setting.fingerprint))
        if len(taken) < len(runs):
            self.progress.write(left_to_others(len(runs) - len(taken)))
        for run in sorted(taken, key=lambda run: run.seed):
            self.tasks.append(Task(run, self.store.load(run, self.setting.fingerprint)))
            self._submit(self.tasks[-1])
        while self.tasks:
            ready, _ = ray.wait([task.stream for task in self.tasks], timeout=1.)
            if ready:
                self._receive(next(task for task in self.tasks if task.stream is ready[0]))
            elif not any(task.worker for task in self.tasks):
                self._wait()
        return self.failed

    def _submit(self, task: Task) -> None:
        task.worker = ''
        task.stream = self.remote.remote(__version__, self.sent, task.run, task.checkpoint, self.place)

    def _receive(self, task: Task) -> None:
        """Take the next message of a task, which is there."""
        self.tasks.remove(task)
        self.tasks.append(task)  # the others have their turn first
        errors = self.ray.exceptions
        try:
            name, *values = self.ray.get(next(task.stream))
        except UserError as e:  # Ray's, of the class of the worker's: it concerns all runs
            raise UserError(str(e.cause)) from None
        except errors.RayTaskError as e:
            if 'failed to import' in str(e.cause) and not task.worker:
                raise UserError(
                    f'a machine of the Ray cluster cannot import timm-sot (with its dependencies): '
                    f'{str(e).strip().splitlines()[-1]}; install timm-sot {__version__} on all machines.') from None
            self.progress.write(str(e))
            self._fail(task, one_line(e.cause))
        except (errors.RayError, StopIteration) as e:
            self._lose(task, e)
        else:
            self.handlers[name](task, *values)

    def _on_begin(self, task: Task, epoch: int, steps: int, worker: str) -> None:
        task.worker, task.since = worker, time.monotonic()
        self.progress.begin(task.run, epoch, steps)

    def _on_step(self, task: Task, steps: int) -> None:
        self.progress.step(task.run, steps)

    def _on_warning(self, task: Task, text: str) -> None:
        if text not in self.said:  # by another worker
            self.said.add(text)
            self.progress.write(text)

    def _on_save(self, task: Task, checkpoint: Dict[str, Any]) -> None:
        self.store.save(task.run, checkpoint)
        task.checkpoint, task.losses = checkpoint, 0
        self._after_epoch(task, checkpoint['top1'])

    def _on_finish(self, task: Task, result: Dict[str, Any], weights: Dict[str, torch.Tensor]) -> None:
        if result['device'] not in self.said and ' then ' not in result['device']:
            self.said.add(result['device'])
            warn_of_other_places(self.store.finished(self.setting.fingerprint).values(), result)
        self.store.finish(task.run, result, weights)
        self.tasks.remove(task)
        self._after_epoch(task, result['top1'])
        self.progress.done(task.run, result)

    def _after_epoch(self, task: Task, top1s: Sequence[float]) -> None:
        self.progress.epoch(task.run, top1s[-1])
        begin, task.since = task.since, time.monotonic()
        if task.since + 1.2 * (task.since - begin) > self.deadline:
            self._stop_for_time(task)

    def _stop_for_time(self, finished: Optional[Task] = None) -> None:
        """Stop a task that has finished an epoch, and what has not begun; others may finish their epoch."""
        stopped = [task for task in self.tasks if task is finished or not task.worker]
        if stopped and TIME_LIMIT not in self.said:
            self.said.add(TIME_LIMIT)
            self.progress.write(TIME_LIMIT if self.progress.begun else NOT_BEGUN)
        self._stop(stopped)

    def _stop(self, tasks: Sequence[Task]) -> None:
        for task in list(tasks):
            self.tasks.remove(task)
            self.progress.leave(task.run)
            with suppress(Exception):  # of a Ray that is not there any more
                self.ray.cancel(task.stream, force=True)

    def _fail(self, task: Task, why: str) -> None:
        self.tasks.remove(task)
        self.progress.leave(task.run)
        self.failed.append(f'{task.run.row} seed {task.run.seed}: {why}')

    def _lose(self, task: Task, error: BaseException) -> None:
        """Have a task whose worker is lost go on elsewhere."""
        task.losses += 1
        worker = task.worker or 'a worker'
        if task.losses > RETRIES:
            self._fail(task, f'{task.losses} workers lost in one epoch, the last with {one_line(error)}')
            return
        epoch = task.checkpoint['epoch'] if task.checkpoint else 0
        self.progress.leave(task.run)
        self.progress.write(
            f'{task.run.row} seed {task.run.seed}: lost {worker} ({type(error).__name__}), goes on after epoch {epoch}')
        self._submit(task)

    def _wait(self) -> None:
        """No task is in progress."""
        if time.monotonic() > self.deadline:
            self._stop_for_time()
        elif 'room' not in self.said and not self._room():
            self.said.add('room')
            self.progress.write(f'waits for a machine that has {self._needs_in_words()}; the same command continues')

    def _room(self) -> bool:
        """Whether a machine that is up has what a run needs, be it free or not."""
        return any(
            node['Alive'] and all(node['Resources'].get(key, 0.) >= value for key, value in self.needs.items())
            for node in self.ray.nodes())

    def _needs_in_words(self) -> str:
        return ' and '.join(f'{value:g} {key}' for key, value in self.needs.items() if value)


class Link:
    """A store and progress bars to `Session.run_group`: sends what these are told."""

    def __init__(self):
        self.messages: queue.SimpleQueue = queue.SimpleQueue()
        self.steps, self.sent = 0, time.monotonic()

    def send(self, name: str, *values) -> None:
        self.messages.put((name, *values))

    def begin(self, run: Run, epoch: int, steps: int) -> None:
        self.send('begin', epoch, steps, f'process {os.getpid()} on {platform.node()}')

    def step(self, run: Run) -> None:
        self.steps += 1
        if time.monotonic() > self.sent + STEP_SECONDS:
            self._send_steps()

    def _send_steps(self) -> None:
        self.send('step', self.steps)
        self.steps, self.sent = 0, time.monotonic()

    def epoch(self, run: Run, top1: float) -> None:
        self._send_steps()

    def save(self, run: Run, checkpoint: Dict[str, Any]) -> None:
        self.send('save', to_cpu(checkpoint))

    def finish(self, run: Run, result: Dict[str, Any], weights: Dict[str, torch.Tensor]) -> None:
        self.send('finish', result, to_cpu(weights))

    def done(self, run: Run, result: Dict[str, Any]) -> None:
        """The result says it."""


def train_run(
        version: str,
        setting: Setting,
        run: Run,
        checkpoint: Optional[Dict[str, Any]],
        place: Dict[str, Any],
) -> Iterator[Tuple[Any, ...]]:
    """The task of a worker: train, in a thread, and hand on the messages of a `Link`.

    Args:
        version: That of timm_sot where the command is.
        setting: With arrays for tensors.
        run: What to run.
        checkpoint: After its last finished epoch.
        place: Its `device`, and numbers of `threads` and augmenting `workers`.
    """
    link = Link()

    def train():
        try:
            if version != __version__:
                raise UserError(f'timm-sot is {__version__} there and {version} here; install one version on all '
                                f'machines.')
            torch.set_num_threads(place['threads'])
            own = replace(setting, data=to_tensors(setting.data))
            session = Session(own, link, link, math.inf, resolve_device(place['device']))
            with session, warnings.catch_warnings():
                warnings.showwarning = lambda message, category, *args: link.send(
                    'warning', f'{platform.node()}: {category.__name__}: {message}')
                session.run_group([run], [checkpoint], place['workers'])
        except UserError as e:
            raise UserError(f'Ray worker on {platform.node()}: {e}') from e
        finally:
            link.messages.put(None)

    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(train)
        for message in iter(link.messages.get, None):  # Ray cannot take `yield from`
            yield message
        training.result()


def to_cpu(value):
    """A copy of tensors in dicts and lists that training does not change any more."""
    if isinstance(value, torch.Tensor):
        return value.detach().to('cpu', copy=True)
    if isinstance(value, dict):
        return {key: to_cpu(item) for key, item in value.items()}
    return [to_cpu(item) for item in value] if isinstance(value, list) else value


def to_arrays(data: StudyData) -> StudyData:
    """With NumPy arrays for tensors: these the workers of a machine share in its object store."""
    return data._replace(**{
        part: Images(*(tensor.numpy() for tensor in getattr(data, part))) for part in ('train', 'test')})


def to_tensors(data: StudyData) -> StudyData:
    """The inverse of `to_arrays`."""
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'The given NumPy array is not writable')  # nor does anything write to it
        return data._replace(**{
            part: Images(*map(torch.from_numpy, getattr(data, part))) for part in ('train', 'test')})


def check_address(address: str) -> None:
    """Raise an error unless something answers there; Ray itself tries for minutes."""
    if '://' in address:
        raise UserError(
            f'{address} is an address of Ray Client, which cannot run a study; run the command on a machine of the '
            f'cluster, with --ray auto.')
    host, _, port = address.rpartition(':')
    try:
        socket.create_connection((host.strip('[]'), int(port)), CONNECT_SECONDS).close()
    except (OSError, ValueError, OverflowError) as e:
        raise UserError(
            f'no Ray at {address} ({e}); --ray takes HOST:PORT as `ray start --head` prints it, `auto` for the one '
            f'that runs on this machine, or nothing to start one.') from e
