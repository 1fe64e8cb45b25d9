""" What was trained, read from a checkpoint and from what is recorded in it or beside it """
import argparse
import json
import os
import shlex
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Dict, List, NamedTuple, Tuple

import timm
import torch
from safetensors.torch import load_file
from timm.models import clean_state_dict

from .. import __version__
from ..errors import UserError
from ..study.data import HELD_OUT, VAL_FOLDER, same_images
from ..study.original import JPEG
from ..study.presets import Row
from ..study.runner import initial_state
from ..study.store import NOT_RECIPE, find_classes, find_result, row_name

__all__ = ['Checkpoint', 'plain', 'read_checkpoint']

# how a card calls what its own name would not explain
_LABELS = {
    'augment': 'Augmentation',
    'lr': 'Learning rate',
    'schedule': 'Learning rate schedule, see `timm-sot study --help`',
    'smoothing': 'Label smoothing',
    'weight_decay': 'Weight decay, of all parameters',
}

# of train.py's arguments: where it ran and what it wrote, not how it trained
_PLACES = {
    'checkpoint_hist', 'config', 'data', 'data_dir', 'dist_backend', 'distributed', 'eval_checkpoint', 'experiment',
    'local_rank', 'log_interval', 'log_wandb', 'output', 'pin_mem', 'prefetcher', 'rank', 'recovery_interval',
    'resume', 'save_images', 'wandb_project', 'wandb_resume_id', 'wandb_tags', 'workers', 'world_size',
}

# those that say what the images are like
_DATA_ARGS = ('input_size', 'img_size', 'in_chans', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')


class Checkpoint(NamedTuple):
    """A trained network with what is known of its training."""
    model: str
    kwargs: Dict[str, Any]  # arguments of the model other than its defaults
    weights: Dict[str, torch.Tensor]
    data: str  # what it was trained on
    facts: List[Tuple[str, str]]  # of the training, for the card
    command: str
    limits: List[str]
    data_args: Dict[str, Any] = {}  # what train.py was told of the images, other than the model's default
    by_study: bool = True  # else by timm's train.py


def read_checkpoint(path: str) -> Checkpoint:
    """Read a checkpoint of train.py or of a study, running no code that it may hold."""
    if not os.path.isfile(path):
        raise UserError(f'{path} is not a file; give a checkpoint of train.py (model_best.pth.tar) or of a study '
                         f'(checkpoints/NAME.safetensors).')
    try:
        if path.endswith('.safetensors'):
            content = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # the arguments of train.py
                content = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as e:
        # the first sentence: that of torch is followed by how to run what a pickle holds
        reason = str(e).strip().splitlines()[0].partition('. ')[0] if str(e).strip() else type(e).__name__
        raise UserError(f'{path} is damaged or no checkpoint of weights and plain values: {reason}') from e
    if path.endswith('.safetensors'):
        return read_study(path, content)
    keys = set(content) if isinstance(content, dict) else set()
    if {'state_dict', 'epoch', 'args'} <= keys and hasattr(content['args'], 'model'):
        return read_train(content)
    if 'state' in keys:
        raise UserError(f'{path} is a run of a study in progress; its weights appear as .safetensors at its end.')
    raise UserError(f'{path} records no training arguments; export takes checkpoints of train.py and of studies.')


def read_study(path: str, weights: Dict[str, torch.Tensor]) -> Checkpoint:
    """The run of a study whose weights these are; its result is in results.jsonl, beside or above them."""
    found = find_result(path)
    if found is None:
        raise UserError(f'there is no result of {Path(path).stem} in a results.jsonl beside {path} or above its '
                        f'folder; export takes the weights of a study from the folder that the study wrote.')
    result, seeds, settings = found
    model, kwargs = result['model'], result['kwargs']
    first, first_kwargs = settings.get('first', (model, kwargs))
    options = {key: value for key, value in settings.items() if key not in NOT_RECIPE}
    options.update(
        (key, settings[key]) for key, default in (('fraction', 1.), ('holdout', 0.))
        if settings.get(key, default) != default)
    words = ['timm-sot', 'study', '--models', *dict.fromkeys((first, model))]
    classes = find_classes(path, model)
    if kwargs:
        words += ['--model-kwargs', *(f'{key}={value}' for key, value in kwargs.items())]
    words += ['--seed', str(result['seed']), '--epochs', str(result['epochs'])]
    for key, value in options.items():
        words += ['--' + key.replace('_', '-'), *map(str, value if isinstance(value, (list, tuple)) else [value])]
    if 'dataset' in settings:
        words += ['--dataset', settings['dataset']]
    name = result['data'].rsplit(' ', 2)[0].removesuffix(HELD_OUT).removesuffix(VAL_FOLDER)
    spread = []
    if len(seeds) > 1:
        finals = [each['final'] for each in seeds]
        mean = f'{fmean(finals):.2f} ± {stdev(finals):.2f} after the last epoch'
        spread = [(f'Mean of {len(seeds)} seeds', mean)]
    facts = [
        ('Epochs', result['epochs']),
        ('Seed', result['seed']),
        ('Data', result['data']),
        ('Top-1 during training', f'{result["final"]:.2f} after the last epoch, {result["best"]:.2f} after the best'),
        *spread,
        ('Device', '; '.join(result[key] for key in ('device', 'processor') if key in result)),
        ('Training time, an equal share where runs trained at once', f'{result["seconds"]:.0f} s'),
        ('Versions', ', '.join(f'{key} {value}' for key, value in result['versions'].items())),
        ('Commit of timm-sot', result['commit'] or 'not recorded'),
        *((_LABELS.get(key, key.replace('_', ' ').capitalize()), value) for key, value in options.items()),
    ]
    command = ' '.join(map(shlex.quote, words)) + ('' if name == 'digits' else ' --data-dir DIR') + ' --out run'
    limits = [f'One run of {result["epochs"]} epochs with one seed, its last epoch; another seed gives another number.']
    if same_images(result['data'], JPEG):
        limits.append('The images of CIFAR-10 were JPEG files of quality 75 (4:2:0), which costs accuracy: compare it '
                      'only with what was trained and measured on the same files.')
    if not options:
        limits.append('How it was trained is not recorded (there was no study.json when it was exported): options that '
                      'the command above does not give may have been others.')
    if not same_start((model, kwargs), (first, first_kwargs), (first, kwargs), classes, result['seed']):
        limits.append(f'It began with the initial values of {row_name(first, first_kwargs)}, in what the two share; '
                      f'those of the command above are others, and so will its numbers be.')
    return Checkpoint(
        model, {**kwargs, **classes}, weights, name, [(key, plain(value)) for key, value in facts], command, limits)


def same_start(row: Row, first: Row, other: Row, classes: Dict[str, int], seed: int) -> bool:
    """Whether a row begins with the same values where `first` and where `other` gives the shared ones.

    Args:
        row: The row.
        first: One that may have given it its initial values.
        other: Another.
        classes: As `find_classes`.
        seed: Of the run.
    """
    if row_name(*first) in (row_name(*row), row_name(*other)):
        return row_name(*first) == row_name(*other)
    try:
        default = timm.get_pretrained_cfg(row[0], allow_unregistered=False).num_classes
        num_classes = classes.get('num_classes', default)
        mine, others = (initial_state(row, giver, num_classes, seed) for giver in (first, other))
    except (RuntimeError, UserError):  # of a version that had other models, which is said when they are made
        return False
    return all(torch.equal(value, others[name]) for name, value in mine.items())


def read_train(content: Dict[str, Any]) -> Checkpoint:
    """A checkpoint of timm's train.py; of averaged weights and trained ones the averaged, as timm's validate.py."""
    args = vars(content['args'])
    averaged = content.get('state_dict_ema') is not None
    weights = clean_state_dict(content['state_dict_ema' if averaged else 'state_dict'])
    kwargs = dict(args.get('model_kwargs') or {})
    if args.get('input_size'):
        kwargs['in_chans'] = args['input_size'][0]
    for option, argument in (('in_chans', 'in_chans'), ('num_classes', 'num_classes'), ('gp', 'global_pool')):
        if args.get(option) is not None:
            kwargs[argument] = args[option]
    data_args = {key: args[key] for key in _DATA_ARGS if args.get(key)}
    if data_args.get('interpolation') == 'random':
        del data_args['interpolation']

    data = args.get('dataset') or os.path.basename(os.path.abspath(args.get('data_dir') or args.get('data') or 'data'))
    epochs = content['epoch'] + 1
    options = {key: value for key, value in sorted(args.items())
               if key not in _PLACES and value is not None and value is not False and value not in ('', [], {})}
    origin = [key for key in ('initial_checkpoint', 'pretrained_path') if key in options]
    options.update((key, os.path.basename(options[key])) for key in origin)
    facts = [
        ('Epochs', f'{epochs} of {args.get("epochs", "?")}'),
        ('Seed', args.get('seed', 'not recorded')),
        ('Data', data),
        ('Validation during training', content.get('metric', 'not recorded')),
        ('Device', args.get('device', 'not recorded')),
        *(('Began with the weights in', options[key]) for key in origin),
        ('Weights', 'averaged (EMA)' if averaged else 'as trained'),
        ('Commit of timm-sot', f'not recorded by train.py; exported with timm-sot {__version__}'),
    ]
    config = ''.join(f'{key}: {json.dumps(value, default=str)}\n' for key, value in options.items())
    command = f"cat > args.yaml << 'END'\n{config}END\npython train.py --config args.yaml --data-dir DIR"
    return Checkpoint(
        args['model'], kwargs, weights, data, [(key, plain(value)) for key, value in facts], command,
        [f'One run with one seed, taken after {epochs} epochs.'], data_args, by_study=False)


def plain(value: Any) -> str:
    """A value as a cell of a table."""
    return ' '.join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
