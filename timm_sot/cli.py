""" The command line, `timm-sot` """
import argparse
import json
import sys
from functools import partial
from typing import Any, Dict, List, Optional

from . import __version__
from .errors import UserError, first_line, missing_extra

__all__ = ['main']


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage."""

    def error(self, message):
        self.exit(2, f'{self.prog}: error: {message}\n')


class _ModelKwargs(argparse.Action):
    """timm's `ParseKwargs`, key=value pairs with Python values, as an error of the parser where it fails."""

    def __call__(self, parser, namespace, values, option_string=None):
        from timm.utils import ParseKwargs  # not at the top: --help should not wait for torch

        missing = [value for value in values if '=' not in value]
        if missing:
            parser.error(f'{option_string} takes key=value pairs, got {missing[0]!r}')
        try:
            ParseKwargs.__call__(self, parser, namespace, values, option_string)
        except TypeError as e:  # of a set of lists, say
            parser.error(f'{option_string} takes key=value pairs, got {" ".join(values)!r}: {e}')


def _number(kind, minimum, exclusive=False):
    """An argparse type: `kind` of at least, or above, `minimum`."""
    def parse(text):
        value = kind(text)
        if value == float('inf'):
            raise argparse.ArgumentTypeError(f'must be finite, got {text}')
        if not (minimum < value if exclusive else minimum <= value):
            raise argparse.ArgumentTypeError(
                f'must be {"above" if exclusive else "at least"} {minimum}, got {text}')
        return value
    parse.__name__ = kind.__name__  # argparse names the type in its messages
    return parse


def _part(text: str) -> float:
    """An argparse type: at least 0 and below 1."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f'must be at least 0 and below 1, got {text}')
    return value


def _share(text: str) -> float:
    """An argparse type: above 0, and 1 at most."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f'must be above 0 and at most 1, got {text}')
    return value


def _seed(text: str) -> int:
    """An argparse type: at least 0 and below 2^32, of which a study can make the seeds of its epochs."""
    value = int(text)
    if not 0 <= value < 2 ** 32:
        raise argparse.ArgumentTypeError(f'must be at least 0 and below 2^32, got {text}')
    return value


_seed.__name__ = 'int'
_part.__name__ = _share.__name__ = 'float'  # argparse names the type in its messages


def _add_study(commands) -> None:
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
    group.add_argument('--model-kwargs', nargs='*', default={}, action=_ModelKwargs, metavar='KEY=VALUE',
                       help='arguments of every model, e.g. sot_reg=0.5')
    group.add_argument('--grid', nargs='*', default={}, action=_ModelKwargs, metavar='KEY=VALUE,VALUE',
                       help='arguments of models, every combination of which is a row, e.g. sot_reg=0.1,0.5')
    group.add_argument('--rows', nargs='+', metavar='ROW',
                       help="train only these rows, named as in the tables, e.g. cct_2 'cct_2_sot_shares sot_iters=0'")
    group.add_argument('--seed', nargs='+', type=_seed, metavar='N',
                       help='seeds; every row is trained with each')
    group.add_argument('--data-dir', default='', metavar='DIR',
                       help='folder, or tar archive, with train/<class>/ and val/<class>/, or else test/<class>/')
    group.add_argument('--dataset', default='', metavar='NAME',
                       help="dataset in --data-dir as timm's train.py names it, e.g. torch/cifar10 (default: a folder "
                            'of images)')
    group.add_argument('--dataset-download', action='store_true', help='download the dataset if it is missing')
    group.add_argument('--fraction', type=_share, default=1., help='share of the training images to use')
    group.add_argument('--holdout', type=_part, default=0.,
                       help='test on this share of the training images instead of the test images, for choosing among '
                            'rows (default: none)')

    group = parser.add_argument_group('how', 'default: as the preset trains')
    group.add_argument('--epochs', type=_number(int, 1), help='passes over the training images')
    group.add_argument('--batch-size', type=_number(int, 1), help='images in a training step')
    group.add_argument('--lr', type=_number(float, 0, exclusive=True), help='peak learning rate')
    group.add_argument('--weight-decay', type=_number(float, 0), help='of AdamW, for all parameters')
    group.add_argument('--smoothing', type=_part, help='label smoothing')
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
    group.add_argument('--parallel', type=_number(int, 1), default=6,
                       help='runs of a seed that advance together, and that a process takes at once where several '
                            'share a study (default: %(default)s)')
    group.add_argument('--workers', type=_number(int, 0), help='processes that augment (default: one less than cores)')
    group.add_argument('--no-graphs', action='store_true', help='train without CUDA graphs')
    group.add_argument('--time-limit', type=_number(float, 0), default=float('inf'), metavar='SECONDS',
                       help='stop before it, after a finished epoch, of which there is at least one')

    group = parser.add_argument_group('past one machine')
    group.add_argument('--ray', nargs='?', const='', metavar='ADDRESS',
                       help="make each run a task of Ray: of the cluster at HOST:PORT; for 'auto' of the one on this "
                            'machine; without ADDRESS of the one that RAY_ADDRESS names, or else of one that is '
                            'started here for the study')
    group.add_argument('--cpus-per-run', type=_number(float, 0, exclusive=True), metavar='N',
                       help='CPUs of a run: as many threads, and one process less that augments, without which it does '
                            'so between its epochs (default: 1)')
    group.add_argument('--gpus-per-run', type=_number(float, 0, exclusive=True), metavar='N',
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
        from .study.report import write_report
    except ImportError as e:  # scipy or matplotlib
        raise missing_extra(e) from e

    print(write_report(args.sources, args.report_out, args.baseline))
    return 0


def _study(args: argparse.Namespace) -> int:
    from itertools import product

    from .study.engine import Recipe
    from .study.presets import PRESETS, Study
    from .study.runner import RunsFailed, format_results, resolve_device, run_study
    from .study.store import row_name

    rows, seeds, settings = PRESETS[args.preset]
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
    if args.models:
        rows = [row for name in args.models
                for row in [row for row in rows if row[0] == name] or [(name, {})]]
    values = [
        value if isinstance(value, (tuple, list)) else
        [_python(word) for word in value.split(',')] if isinstance(value, str) else [value]
        for value in args.grid.values()]
    if not all(values):
        raise UserError(f'--grid needs at least one value of each argument, got {args.grid}.')
    rows = [(model, {**kwargs, **args.model_kwargs, **dict(zip(args.grid, combination))})
            for model, kwargs in rows for combination in product(*values)]
    try:
        rows = list(map(tuple, json.loads(json.dumps(rows))))  # named as in the lines of their runs
    except TypeError as e:
        raise UserError(f'arguments of models must be numbers, text, or lists of them, to be written down with the '
                        f'runs: {e}.') from e
    rows = _chosen({row_name(*row): row for row in rows}, args.rows)
    settings = {'augment': ('crop', 'flip') if args.data_dir or args.dataset else ('crop',), **settings}
    for key in ('epochs', 'batch_size', 'lr', 'weight_decay', 'smoothing', 'schedule', 'precision'):
        if getattr(args, key) is not None:
            settings[key] = getattr(args, key)
    if args.augment is not None:
        settings['augment'] = tuple(args.augment)
    study = Study(
        rows, args.seed or seeds, args.data_dir, args.dataset, args.dataset_download, args.fraction, args.holdout)
    device = cluster = None
    if args.ray is None:
        device = resolve_device(args.device)
    else:
        from .study.cluster import Cluster

        cluster = Cluster(args.ray, args.device, args.cpus_per_run or 1., args.gpus_per_run)
    failure = None
    try:
        results = run_study(
            study, Recipe(**settings), device, args.out, args.parallel, args.workers, not args.no_graphs,
            args.time_limit, cluster)
    except RunsFailed as e:
        results, failure = e.results, e
    if results:
        print(format_results(results))
    if failure:
        raise failure
    return 0


def _python(text):
    """A Python value where it is one, else the text."""
    from ast import literal_eval

    try:
        return literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        return text


def _chosen(rows, names):
    """The rows of a study, given by name, that --rows names, in its order; all without it."""
    from difflib import get_close_matches

    for name in names or ():
        if name not in rows:
            closest = get_close_matches(name, rows, n=5, cutoff=0.)
            close = [row for row in rows if row in closest]
            raise UserError(f'--rows {name!r} is none of the {len(rows)} rows; there are {", ".join(close)}'
                            + ' and others' * (len(close) < len(rows)) + '.')
    return [rows[name] for name in names or rows]


def _number_or_name(text):
    """An argparse type: a whole number where it is one, else the text."""
    return int(text) if text.lstrip('-').isdecimal() else text


def _patch(text):
    """An argparse type: a patch as ROW,COLUMN."""
    row, column = text.split(',')
    return int(row), int(column)


_patch.__name__ = 'ROW,COLUMN'


def _add_attention(commands) -> None:
    parser = commands.add_parser(
        'attention', help='draw the attention of models',
        description='Draw the attention of models for an image, or for many. Without --image the images are '
                    'handwritten digits of scikit-learn.')
    figures = parser.add_subparsers(title='figures', dest='figure', required=True, metavar='FIGURE')
    about = {
        'compare': 'histograms and heatmaps of scores, SOT matrix and weights of one head',
        'heads': 'heatmaps of all layers and heads',
        'patches': 'where in the image the attention of chosen patches goes',
        'entropy': 'the distribution of the entropy of the attention over many images',
        'reg': 'the SOT matrix over a range of regularizations',
    }
    for figure, text in about.items():
        sub = figures.add_parser(figure, help=text, description=f'Draw {text}.')
        sub.add_argument('--models', nargs='+', metavar='NAME',
                         default=['cct_2_sot_qk'] if figure == 'reg' else ['cct_2', 'cct_2_sot_qk'],
                         help='timm models, folders (local-dir:DIR) or Hub repositories (hf-hub:OWNER/NAME) '
                              '(default: %(default)s)')
        sub.add_argument('--checkpoint', nargs='+', default=[], metavar='FILE',
                         help='weights of the models, a file for each (default: their pretrained weights, if any)')
        sub.add_argument('--untrained', action='store_true', help='random weights')
        sub.add_argument('--model-kwargs', nargs='*', default={}, action=_ModelKwargs, metavar='KEY=VALUE',
                         help='arguments of every model, e.g. sot_reg=0.5')
        sub.add_argument('--image', default='', metavar='PATH', help='image, or folder of images (default: digits)')
        if figure == 'entropy':
            sub.add_argument('--num-images', type=_number(int, 1), default=64, metavar='N',
                             help='how many images of a folder, spread evenly over it (default: %(default)s)')
        else:
            sub.add_argument('--index', type=_number(int, 0), default=0, metavar='N',
                             help='which image of a folder, in the order of names (default: %(default)s)')
        if figure in ('compare', 'patches', 'reg'):
            sub.add_argument('--layer', type=_number_or_name, metavar='LAYER',
                             help='number of the attention layer or name of its block (default: the last that has '
                                  'what is drawn)')
            sub.add_argument('--head', type=_number_or_name, metavar='HEAD',
                             default='mean' if figure == 'patches' else 0,
                             help="number of the head, or 'mean' (default: %(default)s)")
        if figure in ('heads', 'patches'):
            sub.add_argument('--matrix', choices=('scores', 'sot', 'weights'), default='weights',
                             help='what is drawn (default: %(default)s)')
        if figure == 'patches':
            sub.add_argument('--queries', nargs='+', type=_patch, default=[], metavar='ROW,COLUMN',
                             help='patches whose attention is drawn, in tokens (default: three on the diagonal)')
        if figure == 'reg':
            sub.add_argument('--regs', nargs='+', type=_number(float, 0, exclusive=True), metavar='REG',
                             default=[0.01, 0.03, 0.1, 0.3, 1.], help='regularizations (default: %(default)s)')
        else:
            sub.add_argument('--dropout', action='store_true', help='apply the dropout of the attention weights')
        sub.add_argument('--seed', type=_seed, default=0,
                         help='of random weights and dropout (default: %(default)s)')
        sub.add_argument('--dpi', type=_number(int, 10), default=150,
                         help='dots per inch of a PNG (default: %(default)s)')
        sub.add_argument('--out', default=f'{figure}.png', metavar='FILE',
                         help='.png, .svg or .pdf to write (default: %(default)s)')
        sub.set_defaults(run=_attention)


def _attention(args: argparse.Namespace) -> int:
    if not args.out.endswith(('.png', '.svg', '.pdf')):
        raise UserError(f'--out {args.out} must end in .png, .svg or .pdf.')
    try:
        from .viz import figures
    except ImportError as e:
        raise UserError(e) from e
    import torch

    from .viz.inputs import load_models

    if args.checkpoint and args.untrained:
        raise UserError('--checkpoint names the weights, and --untrained asks for none; leave one of them out.')
    recorded = [_recorded_kwargs(name, checkpoint) for name, checkpoint in zip(args.models, args.checkpoint)]
    models = load_models(args.models, args.checkpoint, args.untrained, args.model_kwargs, args.seed, recorded)
    names, images = zip(*_images(args))
    options = {
        name: value for name, value in vars(args).items()
        if name in ('layer', 'head', 'matrix', 'queries', 'regs', 'dropout')}
    torch.manual_seed(args.seed)
    try:
        if args.figure == 'entropy':
            of = args.image or 'the handwritten digits of scikit-learn'
            figure = figures.entropy(models, images, images_name=f'{len(images)} images of {of}', **options)
        else:
            figure = getattr(figures, args.figure)(models, images[0], image_name=names[0], **options)
        figure.savefig(args.out, dpi=args.dpi)
    except (ValueError, RuntimeError, OSError) as e:  # an option that does not fit the model, or a file not writable
        raise UserError(first_line(e)) from e
    print(args.out)
    return 0


def _recorded_kwargs(name: str, checkpoint: str) -> Dict[str, Any]:
    """The arguments with which a study trained the model of a checkpoint, none where no study wrote it."""
    from .study.store import find_result

    found = find_result(checkpoint)
    if found is None:
        return {}
    result, _, _ = found
    if result['model'] != name:
        raise UserError(f'{checkpoint} is of {result["model"]}, as the study says that wrote it, not of {name}.')
    return result['kwargs']


def _images(args):
    """The images of a figure with their names: the one of --index, for `entropy` as many as --num-images."""
    from .viz.inputs import digits, find_images, load_image

    found = find_images(args.image) if args.image else digits()
    if args.figure == 'entropy':
        count = min(args.num_images, len(found))
        found = [found[i * len(found) // count] for i in range(count)]
    elif args.index < len(found):
        found = [found[args.index]]
    else:
        raise UserError(f'--index {args.index}: there are {len(found)} images, counted from 0.')
    return [(name, load_image(image) if args.image else image) for name, image in found]


def _add_export(commands) -> None:
    parser = commands.add_parser(
        'export', help='make a folder that timm and the Hub read',
        description='Write config.json, model.safetensors and README.md (a model card) from a checkpoint and what it '
                    'recorded.')
    parser.add_argument('checkpoint', metavar='CHECKPOINT',
                        help="of timm's train.py (model_best.pth.tar) or of a study (checkpoints/NAME.safetensors)")
    parser.add_argument('--out', required=True, metavar='DIR',
                        help='the folder, whose name is that of the model in its card: MODEL.TAG, a TAG for the data')
    parser.add_argument('--data-dir', default='', metavar='DIR',
                        help='evaluate on these images, in val/<class>/, or else test/<class>/, or else <class>/')
    parser.add_argument('--model-kwargs', nargs='*', default={}, action=_ModelKwargs, metavar='KEY=VALUE',
                        help="arguments in place of those of the training, None for the model's default")
    parser.add_argument('--device', default='', help='where to evaluate (default: cuda if there is one, else cpu)')
    parser.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> int:
    from .export import export
    from .study.runner import resolve_device

    device = resolve_device(args.device) if args.data_dir else None
    score = export(args.checkpoint, args.out, args.data_dir, device, args.model_kwargs)
    print(f'{args.out}: ' + (f'top-1 {score.top1:.2f} on {score.images} images' if score else 'not evaluated'))
    return 0


def _add_bench(commands) -> None:
    parser = commands.add_parser(
        'bench', help='time SOT attention beside softmax attention',
        description='Time the attention core, training steps and the Sinkhorn part of SOT attention, and weigh its '
                    'memory, beside softmax attention, the form of the original experiments and, where installed, '
                    'other solvers; print tables, and which of the bars that the project set itself are met.')
    parser.add_argument('--device', default='', help='cpu or cuda; default: cuda if there is one, else cpu')
    parser.add_argument('--dtype', choices=('float32', 'bfloat16', 'float16'),
                        help='of the attention core; default: float32 on cpu, bfloat16 on cuda')
    parser.add_argument('--threads', type=_number(int, 1), metavar='N', help='CPU threads; default: as torch chooses')
    parser.add_argument('--only', nargs='+', choices=('core', 'step', 'memory', 'sinkhorn'), metavar='SECTION',
                        default=['core', 'step', 'memory', 'sinkhorn'], help='some of core, step, memory, sinkhorn')
    parser.add_argument('--quick', action='store_true', help='fewer shapes and rounds, to see that it works')
    parser.add_argument('--json', default='', metavar='FILE', help='write everything that was measured to FILE')
    parser.add_argument('--markdown', nargs='+', metavar='FILE',
                        help='measure nothing: print the bars as Markdown from files that --json wrote')
    parser.set_defaults(run=_bench)


def _bench(args: argparse.Namespace) -> int:
    import os

    import torch

    from .bench.report import bar_table, format_report, load_reports, save_report
    from .bench.runner import run_bench
    from .study.runner import resolve_device

    if args.markdown:
        print(bar_table(load_reports(args.markdown), markdown=True))
        return 0
    device = resolve_device(args.device)
    if args.json and (os.path.isdir(args.json) or not os.access(os.path.dirname(args.json) or '.', os.W_OK)):
        raise UserError(f'--json {args.json} cannot be written.')
    if args.threads:
        torch.set_num_threads(args.threads)
    report = run_bench(
        device, getattr(torch, args.dtype) if args.dtype else None, args.quick, args.only,
        on_progress=lambda report: save_report(report, args.json) if args.json else None)
    print(format_report(report), bar_table([report]), sep='\n\n')
    return 0


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for an error of the user's, 130 when interrupted."""
    parser = _Parser(prog='timm-sot', description='Self-Optimal-Transport attention for timm')
    parser.add_argument('--version', action='version', version=f'%(prog)s {__version__}')
    commands = parser.add_subparsers(title='commands', dest='command', required=True, metavar='COMMAND')
    _add_study(commands)
    _add_attention(commands)
    _add_export(commands)
    _add_bench(commands)
    try:
        args = parser.parse_args(argv)
        return args.run(args)
    except SystemExit as e:  # argparse has printed what is to be said
        return e.code
    except UserError as e:
        print(f'timm-sot: error: {e}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('timm-sot: interrupted', file=sys.stderr)
        return 130
