""" The runs of a study, those of one seed side by side """
import contextlib
import difflib
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Sequence, Tuple

import timm
import torch
from timm.layers import to_2tuple
from torch import nn

from .. import __version__
from .augment import Epochs
from .candidates import apply_candidate
from .coupled import capturable
from .data import Images, StudyData, fingerprint, load_data, subset
from .engine import Recipe, Trainer, set_precision, train_epoch
from ..errors import UserError, missing_extra
from .presets import Row, Study
from .progress import Progress
from .store import Run, Store

if TYPE_CHECKING:
    from .cluster import Cluster

__all__ = ['RunsFailed', 'Session', 'build_model', 'format_table', 'input_size', 'resolve_device', 'run_study']

TIME_LIMIT = 'time limit: stopped after a finished epoch, the same command continues'


class RunsFailed(UserError):
    """Some runs of a study failed; `results` has those of the others, as `run_study` returns them."""

    def __init__(self, message: str, results: Sequence[Dict[str, Any]]):
        super().__init__(message)
        self.results = results


def resolve_device(name: str = '') -> torch.device:
    """The device called `name`, by default a GPU if there is one."""
    try:
        device = torch.device(name or ('cuda' if torch.cuda.is_available() else 'cpu'))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:  # unknown to torch, or absent
        raise UserError(f'device {name!r} cannot be used: {str(e).splitlines()[0]}') from e
    return device


def input_size(rows: Sequence[Row]) -> Tuple[int, int]:
    """Height and width of the images that the models take, of which there must be one for all.

    Raises:
        UserError: If a model is unknown or the models disagree.
    """
    sizes: Dict[Tuple[int, int], str] = {}
    for name, kwargs in rows:
        if not timm.is_model(name):
            close = difflib.get_close_matches(name, timm.list_models(), n=5)
            hint = f'did you mean {", ".join(close)}?' if close else 'timm.list_models() has the names.'
            raise UserError(f'unknown model {name!r}; {hint}')
        size = to_2tuple(kwargs['img_size']) if 'img_size' in kwargs \
            else timm.get_pretrained_cfg(name).input_size[-2:]
        sizes.setdefault(tuple(size), name)
    if len(sizes) > 1:
        listed = ', '.join(f'{name} {height}x{width}' for (height, width), name in sizes.items())
        raise UserError(
            f'the models of a study see the same images, these differ in size: {listed}; '
            f'choose models of one size, or one for all with --model-kwargs img_size=32.')
    return next(iter(sizes))


def build_model(row: Row, num_classes: int, seed: int) -> nn.Module:
    """Create a model with the initial values of a seed; `candidate` among its arguments is one of candidates.py."""
    name, kwargs = row
    kwargs = dict(kwargs)
    candidate = kwargs.pop('candidate', None)
    torch.manual_seed(seed)
    try:
        model = timm.create_model(name, num_classes=num_classes, **kwargs)
        return model if candidate is None else apply_candidate(model, candidate)
    except (TypeError, ValueError) as e:
        raise UserError(f'cannot create {name} with {row[1] or "its defaults"}: {e}') from e


def check_row(row: Row, data: StudyData) -> None:
    """Raise a UserError for a model that cannot be created, or that does not take the images."""
    model = build_model(row, data.num_classes, 0).eval()
    try:
        with torch.no_grad():
            model(data.test.images[:2].float())
    except Exception as e:
        raise UserError(
            f'{row[0]} with {row[1] or "its defaults"} does not take images of shape '
            f'{tuple(data.test.images.shape[1:])}: {(str(e).strip().splitlines() or [type(e).__name__])[0]}') from e


def initial_state(row: Row, first: Row, num_classes: int, seed: int) -> Dict[str, torch.Tensor]:
    """Initial values of a model, those of `first` in all parameters that they share by name and shape."""
    state = build_model(row, num_classes, seed).state_dict()
    if row != first:
        for name, value in build_model(first, num_classes, seed).state_dict().items():
            if name in state and state[name].shape == value.shape:
                state[name] = value
    return state


def run_study(
        study: Study,
        recipe: Recipe,
        device: Optional[torch.device],
        out: str = '',
        parallel: int = 6,
        workers: Optional[int] = None,
        graphs: bool = True,
        time_limit: float = float('inf'),
        cluster: Optional['Cluster'] = None,
) -> List[Dict[str, Any]]:
    """Train every row of a study with every seed.

    For one seed every model sees the same batches and augmentations and starts from the same values in the parameters
    that it shares with the first row.

    Args:
        study: What to train on what.
        recipe: How to train.
        device: Where to train; of no account with `cluster`, which says it itself.
        out: Folder to keep results and checkpoints in and to continue from, '' for none.
        parallel: Runs of one seed that advance together, on a GPU at once; with `cluster` runs that share a GPU.
        workers: Processes that augment, None for one less than there are cores; with `cluster` for each run.
        graphs: Use CUDA graphs on a GPU.
        time_limit: Seconds after which to stop, at the end of an epoch that is expected to be the last in time.
        cluster: Where to run each run by itself, None for this process.

    Returns:
        The results of all finished runs of the study, in the order of its rows and seeds, ready for JSON: `top1`
        (percent) and `loss` are those on the test images after each epoch, `best` and `final` the highest and the last
        top-1, `seconds` the time of training and testing, shared equally by runs that trained at once, `entropy`
        and `common` what the attention is like at the end, see `Trainer.attention_statistics`.

    Raises:
        RunsFailed: If runs failed on the cluster, once all others are finished.
    """
    try:
        import tqdm  # noqa: F401
    except ImportError as e:
        raise missing_extra(e) from e

    deadline = time.monotonic() + time_limit
    # a row or a seed that is named twice is one
    rows, seeds = list({Run(*row, 0, 0).row: row for row in study.rows}.values()), dict.fromkeys(study.seeds)
    whole = load_data(study.data_dir, input_size(rows), augmenters(workers), study.dataset, study.download)
    data = subset(whole, study.fraction, study.holdout)
    for row in rows:  # all of its errors before the first run
        check_row(row, data)
    store = Store(out)
    name = fingerprint(data)
    settings = {
        **asdict(recipe), 'data': name, 'fraction': study.fraction, 'holdout': study.holdout, 'first': rows[0]}
    del settings['epochs']
    model, kwargs = store.settle(settings)['first']
    first = model, kwargs

    runs = [Run(model, kwargs, seed, recipe.epochs) for seed in seeds for model, kwargs in rows]
    failed: List[str] = []
    with contextlib.ExitStack() as stack:
        claimed = [run for run in runs if stack.enter_context(store.claim(run))]  # others are another process's
        done = by_name(store.finished(name))
        pending = [run for run in claimed if run.name not in done]
        elsewhere = sum(run not in claimed and run.name not in done for run in runs)
        if elsewhere:
            print(f'{elsewhere} runs are left to another process, which works on them', file=sys.stderr)
        if pending:
            checkpoints = {run.name: store.load(run, name) for run in pending}
            progress = Progress(pending, sum(checkpoint['epoch'] for checkpoint in checkpoints.values() if checkpoint))
            stack.enter_context(contextlib.closing(progress))
            make = partial(Session, device=device) if cluster is None else cluster.session
            session = stack.enter_context(make(first, data, name, recipe, store, progress, graphs, deadline))
            failed = session.run(pending, checkpoints, parallel, workers)
    done = by_name(store.finished(name))
    results = [done[run.name] for run in runs if run.name in done]
    if failed:
        raise RunsFailed(f'{len(failed)} of {len(runs)} runs failed, the same command tries them again: '
                         f'{"; ".join(failed)}', results)
    return results


def augmenters(workers: Optional[int]) -> int:
    """Number of processes that prepare images, by default one less than there are cores."""
    return max(1, (os.cpu_count() or 1) - 1) if workers is None else workers


def by_name(results: Sequence[Dict[str, Any]]) -> Dict[str, Dict[str, Any]]:
    """Results by the names of their runs."""
    return {Run(*(result[key] for key in Run._fields)).name: result for result in results}


class Session:
    """What the pending runs of a study have in common where they train; a context."""

    def __init__(
            self,
            first: Row,
            data: StudyData,
            name: str,
            recipe: Recipe,
            store: Store,
            progress: Progress,
            graphs: bool,
            deadline: float,
            device: torch.device,
    ):
        """Initialize the session.

        Args:
            first: The row that gives the others their initial values.
            data: What to train and test on.
            name: Fingerprint of the data.
            recipe: How to train.
            store: Takes checkpoints and results; only `save` and `finish` are called.
            progress: Is told what happens.
            graphs: Use CUDA graphs on a GPU.
            deadline: When to stop, on the clock of `time.monotonic`.
            device: Where to train.
        """
        self.first, self.data, self.recipe, self.device = first, data, recipe, device
        self.store, self.progress, self.graphs, self.deadline = store, progress, graphs, deadline
        self.name = name
        self.about = {'device': device_name(device, recipe), 'versions': versions(), 'commit': commit()}
        self.epoch = Images(*(torch.zeros_like(tensor, device=device) for tensor in data.train))
        self.test = data.test.to(device)
        self.trainers: Dict[str, Trainer] = {}
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> 'Session':
        if self.device.type == 'cuda':
            self.stack.enter_context(capturable())
        set_precision(self.recipe.precision)
        return self

    def __exit__(self, *exception) -> None:
        self.stack.close()

    def run(
            self,
            runs: Sequence[Run],
            checkpoints: Dict[str, Optional[Dict[str, Any]]],
            parallel: int,
            workers: Optional[int],
    ) -> List[str]:
        """Run all `runs` from their checkpoints, at most `parallel` of a seed side by side, or until the deadline.

        Returns:
            A line for each run that failed, of which there are none here: an error ends the study.
        """
        runs = sorted(runs, key=lambda run: run.seed)  # stable: rows stay in order
        groups = []
        for run in runs:
            if not groups or groups[-1][0].seed != run.seed or len(groups[-1]) == parallel:
                groups.append([])
            groups[-1].append(run)
        starts = {name: checkpoint['epoch'] if checkpoint else 0 for name, checkpoint in checkpoints.items()}
        plan = [
            (group[0].seed, epoch) for group in groups
            for epoch in range(min(starts[run.name] for run in group), self.recipe.epochs)]
        self.epochs = self.stack.enter_context(
            contextlib.closing(Epochs(self.data.train, self.recipe.augment, plan, augmenters(workers))))

        last = {run.row: i for i, group in enumerate(groups) for run in group}  # group of its last run
        for i, group in enumerate(groups):
            if not self._run_group(group, [checkpoints.pop(run.name) for run in group]):
                break
            self.trainers = {row: trainer for row, trainer in self.trainers.items() if last[row] > i}
        return []

    def _run_group(
            self,
            group: Sequence[Run],
            checkpoints: Sequence[Optional[Dict[str, Any]]],
    ) -> bool:
        """Run the runs of a group from where they are to the end; False if the deadline came before it."""
        records, trainers = [], []
        for run, checkpoint in zip(group, checkpoints):
            trainer = self._trainer(run)
            trainer.reset(initial_state((run.model, run.kwargs), self.first, self.data.num_classes, run.seed))
            if checkpoint is not None:
                trainer.load_state(checkpoint['state'])
            trainers.append(trainer)
            records.append({'epoch': 0, 'top1': [], 'loss': [], 'seconds': 0., 'about': []})
            records[-1].update((key, checkpoint[key]) for key in records[-1] if checkpoint and key in checkpoint)
            if self.about not in records[-1]['about']:
                records[-1]['about'].append(self.about)
            self.progress.begin(run, records[-1]['epoch'], len(trainer.train_sizes))

        begin = time.monotonic()
        for epoch in range(min(record['epoch'] for record in records), self.recipe.epochs):
            active = [i for i, record in enumerate(records) if record['epoch'] == epoch]
            for mine, made in zip(self.epoch, self.epochs.get(group[0].seed, epoch)):
                mine.copy_(made)
            results = train_epoch(
                [trainers[i] for i in active], group[0].seed, epoch,
                on_step=lambda k: self.progress.step(group[active[k]]))
            for i, (top1, loss, seconds) in zip(active, results):
                record = records[i]
                record['epoch'] += 1
                record['top1'].append(round(top1, 4))
                record['loss'].append(round(loss, 6))
                record['seconds'] = round(record['seconds'] + seconds, 3)
                self.progress.epoch(group[i], top1)
                self._keep(group[i], record, trainers[i])
            begin, duration = time.monotonic(), time.monotonic() - begin
            if begin + 1.2 * duration > self.deadline:
                self.progress.write(TIME_LIMIT)
                return False
        return True

    def _trainer(self, run: Run) -> Trainer:
        """The trainer of the run's model, built when it is first needed."""
        if run.row not in self.trainers:
            model = build_model((run.model, run.kwargs), self.data.num_classes, run.seed)
            self.trainers[run.row] = Trainer(model, self.recipe, self.epoch, self.test, self.device, self.graphs)
        return self.trainers[run.row]

    def _keep(self, run: Run, record: Dict[str, Any], trainer: Trainer) -> None:
        """Store a run after an epoch."""
        if record['epoch'] < run.epochs:
            self.store.save(run, {'data': self.name, **record, 'state': trainer.state()})
            return
        top1s = record['top1']
        result = {
            'model': run.model, 'kwargs': run.kwargs, 'seed': run.seed, 'epochs': run.epochs,
            'best': max(top1s), 'final': top1s[-1], 'top1': top1s, 'loss': record['loss'],
            'seconds': record['seconds'], **joined(record['about']), 'data': self.name}
        try:
            result.update(trainer.attention_statistics())
        except RuntimeError as e:  # out of memory: the weights of all tokens are in it at once
            warnings.warn(f'{run.row} seed {run.seed}: its attention is not looked at: {e}')
        self.store.finish(run, result, trainer.model.state_dict())
        self.progress.done(run, result)


def joined(about: Sequence[Dict[str, Any]]) -> Dict[str, Any]:
    """What is known of a run that was continued elsewhere: 'A then B' where the parts differ."""
    def join(values):
        return ' then '.join(dict.fromkeys(value for value in values if value)) or values[-1]

    versions = {key: join([part['versions'].get(key) for part in about]) for key in about[-1]['versions']}
    return {
        'device': join([part['device'] for part in about]), 'versions': versions,
        'commit': join([part['commit'] for part in about])}


def format_table(results: Sequence[Dict[str, Any]]) -> str:
    """The results as a table, a line for each row, with what they were got on under it."""
    rows: Dict[str, List[Dict[str, Any]]] = {}
    for result in results:
        rows.setdefault(Run(*(result[key] for key in Run._fields)).row, []).append(result)

    def cell(values: List[float], digits: int) -> str:
        text = f'{statistics.fmean(values):.{digits}f}'
        return f'{text} ±{statistics.stdev(values):.{digits}f}' if len(values) > 1 else text

    table = [('model', 'n', 'top-1', 'best', 'loss', 'seconds')]
    for row, runs in rows.items():
        table.append((
            row, str(len(runs)), cell([run['final'] for run in runs], 2), cell([run['best'] for run in runs], 2),
            cell([run['loss'][-1] for run in runs], 4), f'{statistics.fmean(run["seconds"] for run in runs):.1f}'))
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = ['  '.join([line[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(line[1:], widths[1:]))])
             for line in table]
    one = results[0]
    seeds = sorted({result['seed'] for result in results})
    lines.append(
        f'n runs a row, top-1 of the last and of the best epoch ± standard deviation, {one["epochs"]} epochs, '
        f'seed {", ".join(map(str, seeds))}')
    lines.append(f'data {one["data"]}; device {", ".join(sorted({result["device"] for result in results}))}')
    return '\n'.join(lines)


def device_name(device: torch.device, recipe: Recipe) -> str:
    """The device as a reader would call it, and what it computed in."""
    if device.type == 'cuda':
        name = torch.cuda.get_device_name(device)
    else:
        name = f'cpu ({torch.get_num_threads()} threads)' if device.type == 'cpu' else str(device)
    return f'{name}, {recipe.precision}'


def versions() -> Dict[str, str]:
    """Versions of what the numbers depend on."""
    return {
        'python': platform.python_version(), 'torch': str(torch.__version__), 'timm': timm.__version__,
        'timm_sot': __version__}


def commit() -> str:
    """Commit of the source tree this runs from, with a + where it has changes; empty for an installed package."""
    git = ['git', '-C', os.path.dirname(os.path.abspath(__file__))]
    try:
        subprocess.run([*git, 'ls-files', '--error-unmatch', '../__init__.py'], capture_output=True, check=True)
        described = subprocess.run(
            [*git, 'describe', '--always', '--dirty=+', '--abbrev=12', '--exclude=*'],
            capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ''
    return described.stdout.strip()
