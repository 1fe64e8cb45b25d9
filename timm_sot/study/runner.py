""" The runs of a study, those of one seed side by side """
import contextlib
import math
import time
import traceback
import warnings
from dataclasses import asdict, dataclass
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any, Dict, Iterable, List, Optional, Sequence, Tuple

import timm
import torch
from timm.layers import to_2tuple
from torch import nn
from tqdm import tqdm

from ..errors import UserError, first_line, one_line, unknown_model
from ..machine import about, available_cores, joined, keep_memory
from .augment import make_epochs, room_for_epochs
from .coupled import capturable
from .data import Images, StudyData, fingerprint_of, load_data, subset
from .engine import Recipe, Trainer, set_precision, train_epoch
from .presets import Row, Study
from .progress import Progress
from .store import Run, Store, row_name

if TYPE_CHECKING:
    from .cluster import Cluster

__all__ = [
    'RunsFailed', 'Session', 'Setting', 'build_model', 'common_size', 'format_results', 'run_study']

TIME_LIMIT = 'time limit: stopped after a finished epoch, the same command continues'


class RunsFailed(UserError):
    """Some runs of a study failed; `results` has those of the others, as `run_study` returns them."""

    def __init__(self, message: str, results: Sequence[Dict[str, Any]]):
        super().__init__(message)
        self.results = results


def common_size(rows: Sequence[Row]) -> Tuple[int, int]:
    """Height and width of the images that the models take, of which there must be one for all.

    Raises:
        UserError: If a model is unknown or the models disagree.
    """
    sizes: Dict[Tuple[int, int], str] = {}
    for name, kwargs in rows:
        if not timm.is_model(name):
            raise unknown_model(name)
        size = to_2tuple(kwargs['img_size']) if 'img_size' in kwargs \
            else timm.get_pretrained_cfg(name).input_size[-2:]
        if len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
            raise UserError(
                f'img_size={kwargs["img_size"]} of {name} must be one number, or height and width, in pixels.')
        sizes.setdefault(tuple(size), name)
    if len(sizes) > 1:
        listed = ', '.join(f'{name} {height}x{width}' for (height, width), name in sizes.items())
        raise UserError(
            f'the models of a study see the same images, these differ in size: {listed}; '
            f'choose models of one size, or one for all with --model-kwargs img_size=32.')
    return next(iter(sizes))


def build_model(row: Row, num_classes: int, seed: int) -> nn.Module:
    """Create a model with the initial values of a seed."""
    name, kwargs = row
    torch.manual_seed(seed)
    try:
        return timm.create_model(name, num_classes=num_classes, **kwargs)
    except Exception as e:  # timm asserts, too
        raise UserError(f'cannot create {name} with {row[1] or "its defaults"}: {one_line(e)}') from e


def check_row(row: Row, data: StudyData) -> None:
    """Raise a UserError for a model that cannot be created, or that does not train on the images."""
    model = build_model(row, data.num_classes, 0)
    images, labels = data.train.select(torch.arange(2) % len(data.train.labels))
    try:
        logits = model(images.float())
        if logits.shape != (2, data.num_classes):
            raise ValueError(
                f'its output for 2 images is of shape {tuple(logits.shape)}, that of a classifier would be of shape '
                f'{(2, data.num_classes)}')
        nn.functional.cross_entropy(logits, labels).backward()
    except Exception as e:
        raise UserError(
            f'{row[0]} with {row[1] or "its defaults"} does not train on images of shape '
            f'{tuple(images.shape[1:])}: {first_line(e)}') from e


def initial_state(row: Row, first: Row, num_classes: int, seed: int) -> Dict[str, torch.Tensor]:
    """Initial values of a model, those of `first` in all parameters that both draw at random, by name and shape.

    What is not drawn is what its arguments say, like the regularization that `sot_shares` begins with.
    """
    def drawn(row):
        """State of a model, and the names of what is another with another seed."""
        state, other = (build_model(row, num_classes, s).state_dict() for s in (seed, seed + 1))
        return state, {name for name, value in state.items() if not torch.equal(value, other[name])}

    state, names = drawn(row)
    if row != first:
        given, given_names = drawn(first)
        state.update(
            (name, given[name]) for name in names & given_names if given[name].shape == state[name].shape)
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
    that it shares with the first row. Of several processes on one folder each takes what the others have not taken.

    Args:
        study: What to train on what.
        recipe: How to train.
        device: Where to train; ignored with `cluster`, which says it itself.
        out: Folder to keep results and checkpoints in and to continue from, '' for none.
        parallel: Runs of one seed that are taken and advance together, on a GPU at once; with `cluster` runs that share
            a GPU.
        workers: Processes that augment, with `cluster` for each run; None for the choice of `augmenters`.
        graphs: Use CUDA graphs on a GPU.
        time_limit: Seconds after which to stop, at the end of an epoch that is expected to be the last in time.
        cluster: Where to run each run by itself, None for this process.

    Returns:
        The results of all finished runs of the study, in the order of its rows and seeds, ready for JSON: `top1`
        (percent) and `loss` are those on the test images after each epoch, `best` and `final` the highest and the last
        top-1, `seconds` the time of training and testing, shared equally by runs that trained at once, `entropy`
        and `common` what the attention is like at the end, see `Trainer.attention_statistics`.

    Raises:
        RunsFailed: If runs failed, once all others are finished.
    """
    deadline = time.monotonic() + time_limit
    # a row or a seed that is named twice is one
    rows, seeds = list({row_name(*row): row for row in study.rows}.values()), dict.fromkeys(study.seeds)
    decoders = available_cores() if workers is None else workers
    whole = load_data(study.data_dir, common_size(rows), decoders, study.dataset, study.download)
    data = subset(whole, study.fraction, study.holdout)
    for row in tqdm(rows, desc='checking', unit='row', leave=False, disable=None):  # before the first run
        check_row(row, data)
    store = Store(out)
    fingerprint = fingerprint_of(data)
    settings = {
        **asdict(recipe), 'data': fingerprint, 'fraction': study.fraction, 'holdout': study.holdout, 'first': rows[0]}
    if study.dataset:
        settings['dataset'] = study.dataset
    del settings['epochs']
    model, kwargs = store.settle(settings)['first']
    first = model, kwargs
    if row_name(*first) not in [row_name(*row) for row in rows]:  # of a study that this one continues
        try:
            build_model(first, data.num_classes, 0)
        except Exception as e:
            raise UserError(f'study.json of {out} names {row_name(*first)} as the row whose initial values the others '
                            f'share, which this version of timm-sot does not make ({one_line(e)}); choose another '
                            f'folder.') from e

    setting = Setting(first, data, fingerprint, recipe, graphs)

    runs = [Run(model, kwargs, seed, recipe.epochs) for seed in seeds for model, kwargs in rows]
    done = store.finished(fingerprint)
    pending = [run for run in runs if run.name not in done]
    failed: List[str] = []
    if pending:
        make = partial(Session, device=device) if cluster is None else cluster.session
        with contextlib.closing(Progress(pending)) as progress, make(setting, store, progress, deadline) as session:
            failed = session.run(pending, parallel, workers)
        done = store.finished(fingerprint)
    results = [done[run.name] for run in runs if run.name in done]
    if failed:
        raise RunsFailed(f'{len(failed)} of {len(runs)} runs failed, the same command tries them again: '
                         f'{"; ".join(failed)}', results)
    return results


def augmenters(workers: Optional[int], device: torch.device) -> Tuple[int, bool]:
    """How many processes make the epochs, and whether ahead, beside training.

    Where training takes all cores it waits for the processes, by default one on each core; where it leaves some, there
    is by default one process less than cores.
    """
    cores = available_cores()
    ahead = device.type != 'cpu' or torch.get_num_threads() < cores
    if workers is None:
        workers = max(1, cores - 1) if ahead else cores
    return workers, ahead


def left_to_others(count: int) -> str:
    """What to say of runs that other processes have."""
    return f'runs left to other processes, which work on them: {count}; the same command then shows them all'


@dataclass(frozen=True)
class Setting:
    """What the runs of a study have in common, wherever they train."""
    first: Row  # gives the others their initial values
    data: StudyData  # to train and test on
    fingerprint: str  # of the data
    recipe: Recipe
    graphs: bool = True  # use CUDA graphs on a GPU


class Session:
    """The runs of a study in this process; a context."""

    def __init__(self, setting: Setting, store: Store, progress: Progress, deadline: float, device: torch.device):
        """Initialize the session.

        Args:
            setting: What the runs have in common.
            store: Says which runs are to be done, and takes checkpoints and results.
            progress: Is told what happens.
            deadline: When to stop, on the clock of `time.monotonic`.
            device: Where to train.
        """
        self.setting, self.store, self.progress = setting, store, progress
        self.deadline, self.device = deadline, device
        self.about = about(device, setting.recipe.precision)
        self.epoch = Images(*(torch.zeros_like(tensor, device=device) for tensor in setting.data.train))
        self.test = setting.data.test.to(device)
        self.captures = setting.graphs and device.type == 'cuda'
        self.trainers: Dict[str, Trainer] = {}  # for a model's next seed, where its captured steps are worth keeping
        self.kept: Tuple[int, Dict[int, Images]] = (0, {})  # a seed and the epochs of it that are in memory
        self.duration = float('-inf')  # of an epoch of one run
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> 'Session':
        if self.device.type == 'cuda':
            self.stack.enter_context(torch.cuda.device(self.device))
            if self.setting.graphs:
                self.stack.enter_context(capturable())
        elif self.device.type == 'cpu':
            keep_memory()
        set_precision(self.setting.recipe.precision)
        return self

    def __exit__(self, *exception) -> None:
        self.stack.close()

    def run(self, runs: Sequence[Run], parallel: int, workers: Optional[int]) -> List[str]:
        """Run those of `runs` that no other process has, until the deadline.

        They are taken seed by seed, at most `parallel` at once, which advance side by side. What another process has
        taken and not finished when it ends is taken, too. Where a run fails and models of others are held beside its
        own, they go on one after another, each held alone.

        Returns:
            A line for each run that failed.
        """
        failed: List[str] = []
        careful = False  # whether a group has failed, perhaps for want of memory
        runs = sorted(runs, key=lambda run: run.seed)  # stable: rows stay in order
        warn_of_other_places(self.store.finished(self.setting.fingerprint).values(), self.about)
        while True:
            with self.store.claim(runs, self.setting.fingerprint, parallel) as group:
                done = self.store.finished(self.setting.fingerprint)
                for run in runs:
                    if run.name in done:
                        self.progress.elsewhere(run)
                runs = [run for run in runs if run.name not in done]
                if not group:
                    if runs:
                        self.progress.write(left_to_others(len(runs)))
                    return failed
                if self._is_late(len(group)):
                    return failed
                rows = {run.row for run in (runs if self.captures and not careful else group)}
                self.trainers = {row: trainer for row, trainer in self.trainers.items() if row in rows}
                checkpoints = [self.store.load(run, self.setting.fingerprint) for run in group]
                more = any(run.seed == group[0].seed and run not in group for run in runs)
                try:
                    if not self.run_group(group, checkpoints, workers, more):
                        return failed
                except UserError:
                    raise
                except Exception as e:
                    if 'DataLoader worker (pid' in str(e):  # of an error in one it says 'process'
                        raise UserError(
                            f'a process that makes the images of the epochs has died, perhaps for want of memory: '
                            f'{first_line(e)} The same command continues after the last finished epoch; with fewer '
                            f'--workers it needs less memory, with 0 no process.') from e
                    alone = len(group) == 1 and {*self.trainers} <= {group[0].row}
                    self.trainers.clear()  # which may have been too many for the memory
                    for run in group:
                        self.progress.leave(run)
                    if not alone:
                        parallel, careful = 1, True
                        self.progress.write(f'{one_line(e)}; goes on with one run at a time')
                        continue
                    self.progress.write(traceback.format_exc())
                    failed.append(f'{group[0].row} seed {group[0].seed}: {one_line(e)}')
                    runs = [run for run in runs if run is not group[0]]

    def _is_late(self, runs: int) -> bool:
        """Whether an epoch more of so many runs would end after the deadline; if so, it is said."""
        late = time.monotonic() + 1.2 * self.duration * runs > self.deadline
        if late:
            self.progress.write(TIME_LIMIT)
        return late

    def run_group(
            self,
            group: Sequence[Run],
            checkpoints: Sequence[Optional[Dict[str, Any]]],
            workers: Optional[int],
            more: bool = False,
    ) -> bool:
        """Run the runs of a group from where they are to the end.

        Args:
            group: Runs of one seed.
            checkpoints: After the last finished epoch of each.
            workers: Processes that augment, None for the choice of `augmenters`.
            more: Whether other runs of the seed may come, for which its epochs are kept.

        Returns:
            False if the deadline came before the end.
        """
        seed, setting = group[0].seed, self.setting
        records, trainers = [], []
        for run, checkpoint in zip(group, checkpoints):
            trainer = self._trainer(run)
            initial = initial_state((run.model, run.kwargs), setting.first, setting.data.num_classes, seed)
            trainer.reset(initial)
            if checkpoint is not None and not self._load(run, trainer, checkpoint):
                trainer.reset(initial)
                checkpoint = None
            trainers.append(trainer)
            records.append({'epoch': 0, 'top1': [], 'loss': [], 'seconds': 0., 'about': []})
            records[-1].update((key, checkpoint[key]) for key in records[-1] if checkpoint and key in checkpoint)
            before = records[-1]['about']
            if before and before[-1]['device'] != self.about['device']:
                warnings.warn(f'{run.row} seed {run.seed} was begun on {before[-1]["device"]} and goes on, after epoch '
                              f'{records[-1]["epoch"]}, on {self.about["device"]}: the report compares it with no run '
                              f'of one device.')
            if self.about not in before:
                before.append(self.about)
            self.progress.begin(run, records[-1]['epoch'], len(trainer.train_sizes))

        if self.kept[0] != seed:
            self.kept = seed, {}
        epochs = range(min(record['epoch'] for record in records), setting.recipe.epochs)
        train = setting.data.train
        processes, ahead = augmenters(workers, self.device)
        with contextlib.closing(make_epochs(
                train, setting.recipe.augment, seed, epochs, processes, self.kept[1],
                room_for_epochs(train) if more else 0, ahead)) as made:
            for epoch in epochs:
                begin = time.monotonic()
                active = [i for i, record in enumerate(records) if record['epoch'] == epoch]
                for mine, images in zip(self.epoch, next(made)):
                    mine.copy_(images)
                results = train_epoch(
                    [trainers[i] for i in active], seed, epoch,
                    on_step=lambda k: self.progress.step(group[active[k]]))
                for i, (top1, loss, seconds) in zip(active, results):
                    record = records[i]
                    record['epoch'] += 1
                    record['top1'].append(round(top1, 4))
                    record['loss'].append(round(loss, 6))
                    record['seconds'] = round(record['seconds'] + seconds, 3)
                    self.progress.epoch(group[i], top1)
                    self._keep(group[i], record, trainers[i])
                self.duration = (time.monotonic() - begin) / len(active)
                coming = sum(record['epoch'] == epoch + 1 for record in records)
                if epoch + 1 < setting.recipe.epochs and self._is_late(coming):
                    return False
        return True

    @staticmethod
    def _load(run: Run, trainer: Trainer, checkpoint: Dict[str, Any]) -> bool:
        """Take a run up where its checkpoint was made, if that is of such a model."""
        try:
            trainer.load_state(checkpoint['state'])
        except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as e:  # for its contents are anyone's
            warnings.warn(f'the checkpoint of {run.row} seed {run.seed} does not fit the model, its run begins anew: '
                          f'{one_line(e)}')
            return False
        return True

    def _trainer(self, run: Run) -> Trainer:
        """The trainer of the run's model, built when it is first needed."""
        if run.row not in self.trainers:
            setting = self.setting
            model = build_model((run.model, run.kwargs), setting.data.num_classes, run.seed)
            self.trainers[run.row] = Trainer(
                model, setting.recipe, self.epoch, self.test, self.device, setting.graphs)
        return self.trainers[run.row]

    def _keep(self, run: Run, record: Dict[str, Any], trainer: Trainer) -> None:
        """Store a run after an epoch."""
        if record['epoch'] < run.epochs:
            self.store.save(run, {'data': self.setting.fingerprint, **record, 'state': trainer.state()})
            return
        top1s = record['top1']
        result = {
            'model': run.model, 'kwargs': run.kwargs, 'seed': run.seed, 'epochs': run.epochs,
            'best': max(top1s), 'final': top1s[-1], 'top1': top1s, 'loss': record['loss'],
            'seconds': record['seconds'], **joined(record['about']), 'data': self.setting.fingerprint}
        try:
            result.update(trainer.attention_statistics())
        except RuntimeError as e:  # out of memory: the weights of all tokens are in it at once
            warnings.warn(f'{run.row} seed {run.seed}: its attention is not looked at: {e}')
        if not math.isfinite(result['loss'][-1]):
            warnings.warn(f'{run.row} seed {run.seed} diverged, its loss is {result["loss"][-1]}: it counts as it is. '
                          f'In another folder, a lower --lr may help.')
        self.store.finish(run, result, trainer.model.state_dict())
        self.progress.done(run, result)


def warn_of_other_places(results: Iterable[Dict[str, Any]], about: Dict[str, Any]) -> None:
    """Say that runs to come will not be like those of `results`: of another device, or of other versions."""
    results = list(results)
    devices = sorted({result['device'] for result in results})
    if devices and about['device'] not in devices:
        warnings.warn(f'there are runs of {" and ".join(devices)}, those to come are of {about["device"]}: the report '
                      f'does not compare them, and a run that is finished is not run again; choose another folder to '
                      f'have all rows on one device.')
    for package, version in about['versions'].items():
        # older lines do not have them all
        others = sorted({result['versions'].get(package, version) for result in results} - {version})
        if others and package != 'python':
            warnings.warn(f'there are runs of {package} {" and ".join(others)}, those to come are of {version}: the '
                          f'report compares them and lists the versions.')


def format_results(results: Sequence[Dict[str, Any]]) -> str:
    """The results as a table, a line for each row and device, with the images and devices under it."""
    devices = sorted({result['device'] for result in results})
    rows: Dict[str, List[Dict[str, Any]]] = {}
    for result in results:
        where = f' on {result["device"]}' if len(devices) > 1 else ''
        rows.setdefault(Run.of(result).row + where, []).append(result)

    def cell(values: List[float], digits: int) -> str:
        text = f'{fmean(values):.{digits}f}'
        # torch's: that of the standard library fails where a value is NaN
        return f'{text} ±{torch.tensor(values, dtype=torch.float64).std():.{digits}f}' if len(values) > 1 else text

    table = [('model', 'n', 'top-1', 'best', 'loss', 'seconds')]
    for row, runs in rows.items():
        table.append((
            row, str(len(runs)), cell([run['final'] for run in runs], 2), cell([run['best'] for run in runs], 2),
            cell([run['loss'][-1] for run in runs], 4), f'{fmean(run["seconds"] for run in runs):.1f}'))
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = ['  '.join([line[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(line[1:], widths[1:]))])
             for line in table]
    one = results[0]
    seeds = sorted({result['seed'] for result in results})
    lines.append(
        f'n runs a row, top-1 of the last and of the best epoch ± standard deviation, {one["epochs"]} epochs, '
        f'seed {", ".join(map(str, seeds))}')
    lines.append(f'data {one["data"]}; device {", ".join(devices)}')
    return '\n'.join(lines)
