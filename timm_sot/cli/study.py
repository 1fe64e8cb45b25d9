""" timm-sot study, timm-sot study report """
import argparse
import json
from ast import literal_eval
from difflib import get_close_matches
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Sequence

from ..errors import UserError, missing_extra
from .arguments import ModelKwargs, number, part, seed, share

if TYPE_CHECKING:
    from ..study.engine import Recipe
    from ..study.presets import Row

__all__ = ['add_study']


def add_study(commands) -> None:
    parser = commands.add_parser(
        'study', help='train models side by side and compare them',
        description='Train models on the same batches, augmentations and shared initial values, and print a table. '
                    'With --out a study that was stopped continues with the same command, and processes started '
                    'with it at the same time share its runs.')
    group = parser.add_argument_group('what')
    group.add_argument('--preset', choices=['quick', 'seed', 'sweep', 'shares'], default='quick',
                       help='quick: three models on the digits of scikit-learn; seed: softmax and the five SOT '
                            'variants, five seeds, 30 epochs of the original recipe; sweep: sot_qk over the '
                            'regularization, and softmax; shares: softmax, without and with context, '
                            'cct_2_sot_shares and its control, five seeds. The other options change it (default: '
                            '%(default)s)')
    group.add_argument('--models', nargs='+', metavar='NAME',
                       help='train these timm models instead of those of the preset (one that is in it keeps all its '
                            'rows); the first gives the others their initial values')
    group.add_argument('--model-kwargs', nargs='*', default={}, action=ModelKwargs, metavar='KEY=VALUE',
                       help='arguments of every model, e.g. sot_reg=0.5')
    group.add_argument('--grid', nargs='*', default={}, action=ModelKwargs, metavar='KEY=VALUE,VALUE',
                       help='arguments of models, every combination of which is a row, e.g. sot_reg=0.1,0.5 (sot_* not '
                            'for a CCT with softmax attention)')
    group.add_argument('--rows', nargs='+', metavar='ROW',
                       help="train only these rows, named as in the tables, e.g. cct_2 'cct_2_sot_shares sot_iters=0'")
    group.add_argument('--seed', nargs='+', type=seed, metavar='N',
                       help='seeds; every row is trained with each')
    group.add_argument('--data-dir', default='', metavar='DIR',
                       help='folder, or tar archive, with train/<class>/ and val/<class>/, or else test/<class>/')
    group.add_argument('--dataset', default='', metavar='NAME',
                       help="dataset in --data-dir as timm's train.py names it, e.g. torch/cifar10 (default: a folder "
                            'of images)')
    group.add_argument('--dataset-download', action='store_true', help='download the dataset if it is missing')
    group.add_argument('--fraction', type=share, default=1., help='share of the training images to use')
    group.add_argument('--holdout', type=part, default=0.,
                       help='test on this share of the training images instead of the test images, for choosing among '
                            'rows (default: none)')

    group = parser.add_argument_group('how', 'default: as the preset trains')
    group.add_argument('--epochs', type=number(int, 1), help='passes over the training images')
    group.add_argument('--batch-size', type=number(int, 1), help='images in a training step')
    group.add_argument('--lr', type=number(float, 0, exclusive=True), help='peak learning rate')
    group.add_argument('--weight-decay', type=number(float, 0), help='of AdamW, for all parameters')
    group.add_argument('--smoothing', type=part, help='label smoothing')
    group.add_argument('--schedule', choices=['cosine', 'original'],
                       help='of the learning rate: cosine, by step after a warm-up of a quarter of an epoch, or that '
                            'of the original runs, by epoch after a warm-up of five')
    group.add_argument('--augment', nargs='*', choices=['autoaugment', 'autoaugment-gray', 'crop', 'flip'],
                       help='in this order; default of quick: crop, and flip for folders')
    group.add_argument('--precision', choices=['float32', 'conv-tf32', 'bfloat16'],
                       help='float32 throughout, TensorFloat-32 in the convolutions of a GPU, or autocast to bfloat16 '
                            '(default: float32)')

    group = parser.add_argument_group('where')
    group.add_argument('--device', default='', help='default: cuda if there is one, else cpu')
    group.add_argument('--out', default='', metavar='DIR', help='folder for results and checkpoints')
    group.add_argument('--parallel', type=number(int, 1), default=6,
                       help='runs of a seed that advance together, and that a process takes at once where several '
                            'share a study (default: %(default)s)')
    group.add_argument(
        '--workers', type=number(int, 0),
        help='processes that augment (default: one less than cores; where training takes all cores it waits for them, '
             'and there are as many)')
    group.add_argument('--no-graphs', action='store_true', help='train without CUDA graphs')
    group.add_argument('--time-limit', type=number(float, 0), default=float('inf'), metavar='SECONDS',
                       help='stop before it, after a finished epoch, of which there is at least one; with --ray also '
                            'where none has begun')

    group = parser.add_argument_group('past one machine')
    group.add_argument('--ray', nargs='?', const='', metavar='ADDRESS',
                       help="make each run a task of Ray: of the cluster at HOST:PORT; for 'auto' of the one on this "
                            'machine; without ADDRESS of the one that RAY_ADDRESS names, or else of one that is '
                            'started here for the study')
    group.add_argument('--cpus-per-run', type=number(float, 0, exclusive=True), metavar='N',
                       help='CPUs of a run: as many threads, and one process less that augments, without which it does '
                            'so between its epochs (default: 1)')
    group.add_argument('--gpus-per-run', type=number(float, 0, exclusive=True), metavar='N',
                       help='share of a GPU of a run (default: 1 / PARALLEL, on a GPU)')
    parser.set_defaults(run=_study)
    _add_report(parser.add_subparsers(title='commands', metavar='[report]'), parser)


def _add_report(commands, study: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        'report', help='write tables and figures of finished runs',
        description='Write report.md, with tables and figures, from the results of studies. Runs of different images, '
                    'recipes, epochs or devices are not compared.')
    parser.add_argument('sources', nargs='+', metavar='DIR', help='folder that --out of a study named')
    parser.add_argument('--baseline', default='', metavar='ROW',
                        help="row that the others are compared with, e.g. 'cct_2' or 'cct_2_sot_qk sot_reg=0.1' "
                             '(default: the first of the first study)')
    parser.add_argument('--out', dest='report_out', default='', metavar='DIR',
                        help='where to write (default: the first DIR)')
    parser.set_defaults(run=partial(_report, study))


def _report(study: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    own = {'run', 'command', 'sources', 'baseline', 'report_out'}
    others = [
        f'--{name.replace("_", "-")}' for name, value in vars(args).items()
        if name not in own and value != study.get_default(name)]
    if others:
        raise UserError(f'{", ".join(others)} before report is an option of a study, and report runs none; leave it '
                        f"out, or put it after report if it is one of report's.")
    try:
        from ..study.report import write_report
    except ImportError as e:  # scipy or matplotlib
        raise missing_extra(e) from e

    print(write_report(args.sources, args.report_out, args.baseline))
    return 0


def _study(args: argparse.Namespace) -> int:
    from ..machine import resolve_device
    from ..study.presets import PRESETS, Study
    from ..study.runner import RunsFailed, format_results, run_study

    _check(args)
    preset = PRESETS[args.preset]
    study = Study(
        _rows(args, preset.rows), args.seed or preset.seeds, args.data_dir, args.dataset, args.dataset_download,
        args.fraction, args.holdout)
    recipe = _recipe(args, preset.recipe)
    device = cluster = None
    if args.ray is None:
        device = resolve_device(args.device)
    else:
        from ..study.cluster import Cluster

        cluster = Cluster(args.ray, args.device, args.cpus_per_run or 1., args.gpus_per_run)
    failure = None
    try:
        results = run_study(
            study, recipe, device, args.out, args.parallel, args.workers, not args.no_graphs, args.time_limit, cluster)
    except RunsFailed as e:
        results, failure = e.results, e
    if results:
        print(format_results(results))
    if failure:
        raise failure
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse options that ask for what others do not give."""
    if args.preset != 'quick' and not (args.data_dir or args.dataset):
        raise UserError(
            f'--preset {args.preset} is a study of CIFAR-10; name the folder of its images with --data-dir, or have it '
            f'downloaded with --dataset torch/cifar10 --dataset-download --data-dir DIR.')
    if args.dataset_download and not args.dataset:
        raise UserError('--dataset-download needs --dataset, the name of what to download.')
    if args.ray is None and (args.cpus_per_run or args.gpus_per_run):
        raise UserError('--cpus-per-run and --gpus-per-run are of runs on a Ray cluster; they need --ray.')
    if args.time_limit < float('inf') and not args.out:
        raise UserError('--time-limit stops a study that the same command continues; it needs --out, a folder to keep '
                        'it in.')


def _rows(args: argparse.Namespace, rows: Sequence['Row']) -> List['Row']:
    """The rows of a preset as the options change them, named as in the lines of their runs."""
    from ..study.store import row_name

    if args.models:
        rows = [row for name in args.models
                for row in [row for row in rows if row[0] == name] or [(name, {})]]
    values = [
        value if isinstance(value, (tuple, list)) else
        [_python(word) for word in value.split(',')] if isinstance(value, str) else [value]
        for value in args.grid.values()]
    if not all(values):
        raise UserError(f'--grid needs at least one value of each argument, got {args.grid}.')
    rows = [_with_values(model, {**kwargs, **args.model_kwargs}, dict(zip(args.grid, combination)))
            for model, kwargs in rows for combination in product(*values)]
    try:
        rows = [(model, kwargs) for model, kwargs in json.loads(json.dumps(rows))]
    except TypeError as e:
        raise UserError(f'arguments of models must be numbers, text, or lists of them, to be written down with the '
                        f'runs: {e}.') from e
    return _chosen({row_name(*row): row for row in rows}, args.rows)


def _with_values(model: str, kwargs: Dict[str, Any], values: Dict[str, Any]) -> 'Row':
    """A row with the values of a grid, less those of SOT attention where the row is a CCT that has none.

    So such a row is one and not several with the same numbers.
    """
    row = {**kwargs, **values}
    if model.startswith('cct_') and '_sot_' not in model and row.get('attn', 'softmax') == 'softmax':
        row = {key: value for key, value in row.items() if key in kwargs or not key.startswith('sot_')}
    return model, row


def _recipe(args: argparse.Namespace, settings: Dict[str, Any]) -> 'Recipe':
    """The recipe of a preset as the options change it."""
    from ..study.engine import Recipe

    settings = {'augment': ('crop', 'flip') if args.data_dir or args.dataset else ('crop',), **settings}
    for key in ('epochs', 'batch_size', 'lr', 'weight_decay', 'smoothing', 'schedule', 'precision'):
        if getattr(args, key) is not None:
            settings[key] = getattr(args, key)
    if args.augment is not None:
        settings['augment'] = tuple(args.augment)
    return Recipe(**settings)


def _python(text: str) -> Any:
    """A Python value where it is one, else the text."""
    try:
        return literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        return text


def _chosen(rows: Dict[str, 'Row'], names: Optional[Sequence[str]]) -> List['Row']:
    """The rows of a study, given by name, that --rows names, in its order; all without it."""
    for name in names or ():
        if name not in rows:
            closest = get_close_matches(name, rows, n=5, cutoff=0.)
            close = [row for row in rows if row in closest]
            raise UserError(f'--rows {name!r} is none of the {len(rows)} rows; there are {", ".join(close)}'
                            + ' and others' * (len(close) < len(rows)) + '.')
    return [rows[name] for name in names or rows]
