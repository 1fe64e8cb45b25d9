""" What a study has done, in a folder

    study.json           what all runs of the folder share
    results.jsonl        a line for each finished run
    results.corrupt      lines of it that could not be read
    checkpoints/NAME.pt            a run in progress, after its last finished epoch
    checkpoints/NAME.safetensors   the weights of a finished run

Several processes may work on one folder, and share its runs: each is locked by the process that has it (with lockf:
unlike flock its locks are not inherited by workers, which outlive a killed process for seconds). A line is appended
under a lock, too, and a file appears under its name when it is complete.
"""
import contextlib
import hashlib
import json
import os
import re
import shutil
import warnings
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import UserError, first_line
from .data import same_images

try:
    import fcntl
except ImportError:  # not there on Windows: one process to a folder
    fcntl = None

__all__ = [
    'KINDS', 'NOT_RECIPE', 'Run', 'Store', 'find_classes', 'find_result', 'read_lines', 'read_settings', 'row_name']

# the line of a run, and what is of which type
KINDS = {
    'model': str, 'kwargs': dict, 'seed': int, 'epochs': int, 'best': (int, float), 'final': (int, float), 'top1': list,
    'loss': list, 'seconds': (int, float), 'device': str, 'versions': dict, 'commit': str, 'data': str}

NOT_RECIPE = ('data', 'dataset', 'fraction', 'holdout', 'first')  # what study.json holds beside the recipe


class Run(NamedTuple):
    """One training of one model."""
    model: str
    kwargs: Dict[str, Any]
    seed: int
    epochs: int

    @classmethod
    def of(cls, result: Dict[str, Any]) -> 'Run':
        """The run that a result is of."""
        return cls(*(result[key] for key in cls._fields))

    @property
    def row(self) -> str:
        """As `row_name`."""
        return row_name(self.model, self.kwargs)

    @property
    def name(self) -> str:
        """Fit for a file, and another for every run."""
        text = re.sub(r'(?<!\w)-(?=[\w.])', 'minus', f'{self.row} seed {self.seed} epochs {self.epochs}')
        text = re.sub(r'[^\w.]+', '-', text)
        if re.sub(r' \w+=|[\w.-]|, |[][()]', '', self.row):  # hyphens stand for more than the joints of a row
            row = self.row.translate(str.maketrans('()', '[]'))  # tuples come back from JSON as lists
            text += '-' + hashlib.sha256(row.encode()).hexdigest()[:8]
        return text


def row_name(model: str, kwargs: Dict[str, Any]) -> str:
    """What tables call a model with its arguments."""
    return ' '.join([model, *(f'{key}={value}' for key, value in sorted(kwargs.items()))])


class Store:
    """The folder of a study; with an empty name, one that keeps results in memory and nothing else."""

    def __init__(self, folder: str):
        self.folder = folder
        self.lines: List[Dict[str, Any]] = []
        if folder:
            with self._writing():
                os.makedirs(self._path('checkpoints'), exist_ok=True)

    def _path(self, *names: str) -> str:
        return os.path.join(self.folder, *names)

    def settle(self, settings: Dict[str, Any]) -> Dict[str, Any]:
        """Fix what the runs of this folder share; returns it, `first` from the folder if that is older.

        Raises:
            UserError: If the folder holds runs of other settings.
        """
        settings = json.loads(json.dumps(settings))
        if not self.folder:
            return settings
        path = self._path('study.json')
        with self._lock('results.lock'):
            try:
                old = read_settings(path)
            except FileNotFoundError:
                if self._holds_runs():
                    raise UserError(
                        f'{self.folder} holds runs, but study.json, which says how they were trained, is gone; put it '
                        f'back, or choose another folder.') from None
                write_file(path, json.dumps(settings, indent=2) + '\n')
                return settings
        differ = [
            key for key in dict.fromkeys([*settings, *old])
            if key not in ('first', 'dataset') and settings.get(key) != old.get(key)  # `data` says what images
            and not (key == 'data' and same_images(settings[key], old.get(key, '')))]
        if differ:  # also in what one of two versions of timm-sot does not have
            listed = ', '.join(f'{key} {old.get(key)} there, {settings.get(key)} here' for key in differ)
            raise UserError(f'{self.folder} holds a study with other settings ({listed}); choose another folder.')
        return old

    def _holds_runs(self) -> bool:
        with contextlib.suppress(FileNotFoundError):
            if os.path.getsize(self._path('results.jsonl')):
                return True
        return any(name.endswith('.pt') for name in os.listdir(self._path('checkpoints')))

    def finished(self, fingerprint: str) -> Dict[str, Dict[str, Any]]:
        """Results of the runs on the images of that fingerprint, by the names of the runs, of each the first.

        Lines that cannot be read are put aside.
        """
        if not self.folder:
            return by_name(self.lines)
        path = self._path('results.jsonl')
        with self._lock('results.lock'):
            try:
                good, bad = read_lines(path)
            except FileNotFoundError:
                good, bad = [], []
            if bad and self._is_writable():
                warnings.warn(f'{len(bad)} unreadable lines of {path} moved to results.corrupt; their runs are redone.')
                with open(self._path('results.corrupt'), 'ab') as f:
                    f.writelines(line + b'\n' for line in bad)
                write_file(path, b''.join(line + b'\n' for line in good))
        return by_name([result for result in map(json.loads, good) if same_images(result['data'], fingerprint)])

    def append(self, result: Dict[str, Any]) -> None:
        """Add the line of a finished run."""
        if not self.folder:
            self.lines.append(result)
            return
        line = json.dumps(result).encode() + b'\n'
        with self._lock('results.lock'), open(self._path('results.jsonl'), 'a+b') as f:
            if f.tell() and not self._ends_line(f):
                line = b'\n' + line  # after one that was cut off
            f.write(line)
            f.flush()
            os.fsync(f.fileno())

    @staticmethod
    def _ends_line(f) -> bool:
        f.seek(-1, os.SEEK_END)
        return f.read() == b'\n'

    def save(self, run: Run, checkpoint: Dict[str, Any]) -> None:
        """Keep the state of a run after an epoch."""
        if self.folder:
            path = self._path('checkpoints', run.name + '.pt')
            with self._writing():
                torch.save(checkpoint, path + '.tmp')
                replace_durably(path + '.tmp', path)

    def load(self, run: Run, fingerprint: str) -> Optional[Dict[str, Any]]:
        """The state of a run on the images of that fingerprint after its last finished epoch, None without one."""
        path = self._path('checkpoints', run.name + '.pt')
        if not self.folder or not os.path.exists(path):
            return None
        try:
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
            mine = same_images(checkpoint['data'], fingerprint)
        except Exception as e:
            warnings.warn(f'{path} cannot be read, its run begins anew: {type(e).__name__}: {e}')
            return None
        return checkpoint if mine else None

    def finish(self, run: Run, result: Dict[str, Any], weights: Dict[str, torch.Tensor]) -> None:
        """Keep weights and result of a finished run."""
        if self.folder:
            path = self._path('checkpoints', run.name)
            # copies, as safetensors takes no tensors that share memory, which those of some models do
            weights = {name: tensor.to('cpu', copy=True).contiguous() for name, tensor in weights.items()}
            with self._writing():
                save_file(weights, path + '.tmp')
                with contextlib.suppress(FileNotFoundError):  # safetensors lets nobody else read it
                    shutil.copymode(self._path('study.json'), path + '.tmp')
                replace_durably(path + '.tmp', path + '.safetensors')
        self.append(result)
        if self.folder:
            for name in (path + '.pt', path + '.lock'):  # who waits for the lock looks for the result once it has it
                with contextlib.suppress(FileNotFoundError):
                    os.remove(name)

    @contextlib.contextmanager
    def claim(self, runs: Sequence[Run], fingerprint: str, at_most: Optional[int] = None) -> Iterator[List[Run]]:
        """Take runs that are neither finished on the images of that fingerprint nor taken by another process.

        No other process gets them before the context ends, or this process.

        Args:
            runs: What to choose from, in this order.
            fingerprint: Of the images, see `fingerprint_of`.
            at_most: How many, all of one seed; None for all that there are.
        """
        taken: List[Run] = []
        with contextlib.ExitStack() as stack:
            done = self.finished(fingerprint)
            for run in runs:
                if at_most is not None and taken and (len(taken) == at_most or run.seed != taken[0].seed):
                    break
                if run.name not in done and stack.enter_context(self._claim(run)):
                    done = self.finished(fingerprint)  # by another process before we had the lock
                    taken += [run] * (run.name not in done)
            yield taken

    @contextlib.contextmanager
    def _claim(self, run: Run) -> Iterator[bool]:
        if not self.folder or fcntl is None:
            yield True
            return
        with self._open('checkpoints', run.name + '.lock') as f:
            try:
                fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
                return
            yield True

    def _is_writable(self) -> bool:
        return os.access(self.folder, os.W_OK)

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """Keep others from writing; where nobody can, a finished study can still be looked at."""
        with self._writing(), self._open(name) if self._is_writable() else contextlib.nullcontext() as f:
            if f is not None and fcntl is not None:
                fcntl.lockf(f, fcntl.LOCK_EX)
            yield

    def _open(self, *names: str):
        with self._writing():
            return open(self._path(*names), 'w')

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as e:  # the last two are what torch and safetensors raise
            raise UserError(
                f'cannot write to {self.folder} ({first_line(e)}); choose another folder, or make room in it: '
                f'the same command then continues.') from e


def by_name(results: Sequence[Dict[str, Any]]) -> Dict[str, Dict[str, Any]]:
    """Results by the names of their runs, of each run the first."""
    return {Run.of(result).name: result for result in reversed(results)}


def read_lines(path: str) -> Tuple[List[bytes], List[bytes]]:
    """The lines of a results.jsonl: those of finished runs, and those that cannot be read."""
    good, bad = [], []
    with open(path, 'rb') as f:
        for line in filter(bytes.strip, f.read().splitlines()):
            try:
                complete = is_complete(json.loads(line))
            except (ValueError, TypeError):
                complete = False
            (good if complete else bad).append(line)
    return good, bad


def find_result(path: str) -> Optional[Tuple[Dict[str, Any], List[Dict[str, Any]], Dict[str, Any]]]:
    """What a study says of the weights at `path`, in the folder that holds them or in the one above.

    Returns:
        The result of their run, those of the same run for all seeds (on the same images and device, as the report
        compares them), and the study's settings, empty without a study.json; None if no study knows the run.
    """
    name, extension = os.path.splitext(os.path.basename(path))
    inner = os.path.dirname(os.path.abspath(path))
    for folder in (inner, os.path.dirname(inner)):
        try:
            lines, _ = read_lines(os.path.join(folder, 'results.jsonl'))
        except (FileNotFoundError, NotADirectoryError):
            continue
        results = by_name([json.loads(line) for line in lines])
        if extension != '.safetensors' or name not in results:
            continue
        result = results[name]
        run = Run.of(result)
        seeds = [
            other for other in results.values() if Run.of(other)._replace(seed=run.seed) == run
            and other['device'] == result['device'] and same_images(other['data'], result['data'])]
        try:
            return result, seeds, read_settings(os.path.join(folder, 'study.json'))
        except FileNotFoundError:
            return result, seeds, {}
    return None


def find_classes(path: str, model: str) -> Dict[str, int]:
    """The argument `num_classes` with which a study made the model of the weights at `path`, if not its default.

    The classes are those of the images, and no argument of the row. The size of the head says how many there were.
    """
    cfg = timm.get_pretrained_cfg(model)
    names = getattr(cfg, 'classifier', None) or ()
    with contextlib.suppress(SafetensorError), safe_open(path, 'pt') as f:
        for name in [names] if isinstance(names, str) else names:
            if f'{name}.weight' in f.keys():
                found = f.get_slice(f'{name}.weight').get_shape()[0]
                return {} if found == cfg.num_classes else {'num_classes': found}
    return {}


def is_complete(result: Any) -> bool:
    """Whether it is what the line of a finished run holds; raises TypeError where it is nothing of the kind."""
    return (
        all(key in result and isinstance(result[key], kind) for key, kind in KINDS.items())
        and len(result['top1']) == len(result['loss']) == result['epochs'] >= 1
        and all(isinstance(value, (int, float)) for value in (*result['top1'], *result['loss']))
        and (result['final'], result['best']) == (result['top1'][-1], max(result['top1']))
        and all(isinstance(value, str) for value in result['versions'].values())
        and is_of_layers(result.get('entropy', {})) and is_of_layers(result.get('common', {}))
        and ('common' not in result or result.get('entropy', {}).keys() == result['common'].keys()))


def is_of_layers(statistics: Any) -> bool:
    """Whether it is what `Trainer.attention_statistics` says of the heads of each layer."""
    return isinstance(statistics, dict) and all(
        isinstance(heads, list) and all(isinstance(value, (int, float)) for value in heads)
        for heads in statistics.values())


def read_settings(path: str) -> Dict[str, Any]:
    """What is in a study.json.

    Raises:
        FileNotFoundError: If there is none.
        UserError: If it holds something else.
    """
    with open(path, encoding='utf-8') as f:
        try:
            settings = json.load(f)
            model, kwargs = settings['first']
            if not (isinstance(model, str) and isinstance(kwargs, dict) and isinstance(settings.get('data', ''), str)):
                raise ValueError(f'first {settings["first"]}, data {settings.get("data")}')
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(
                f'{path} is not what a study wrote ({type(e).__name__}: {e}); put back what it was, or choose another '
                f'folder.') from e
    return settings


def write_file(path: str, content: Union[str, bytes]) -> None:
    """Write a file, text as UTF-8, that is there whole or not at all."""
    with open(path + '.tmp', 'wb') as f:
        f.write(content.encode() if isinstance(content, str) else content)
    replace_durably(path + '.tmp', path)


def replace_durably(source: str, target: str) -> None:
    """As os.replace, once what is in the file would outlast a loss of power."""
    with open(source, 'rb+') as f:
        os.fsync(f.fileno())
    os.replace(source, target)
