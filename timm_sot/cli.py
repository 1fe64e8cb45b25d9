""" The command line, `timm-sot` """
import argparse
import sys
from typing import List, Optional

from .study.errors import StudyError

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
        ParseKwargs.__call__(self, parser, namespace, values, option_string)


def _number(kind, minimum, exclusive=False):
    """An argparse type: `kind` of at least, or above, `minimum`."""
    def parse(text):
        value = kind(text)
        if not (minimum < value if exclusive else minimum <= value) or value == float('inf'):
            raise argparse.ArgumentTypeError(f'must be {"above" if exclusive else "at least"} {minimum}, got {text}')
        return value
    parse.__name__ = kind.__name__  # argparse names the type in its messages
    return parse


def _add_study(commands) -> None:
    parser = commands.add_parser(
        'study', help='train models side by side and compare them',
        description='Train models with the same seed, data order, augmentation and shared initial weights, and print a '
                    'table. Without --data-dir on the 1,797 handwritten digits of scikit-learn, offline.')
    parser.add_argument('--models', nargs='+', metavar='NAME', default=['cct_2', 'cct_2_sot_q', 'cct_2_sot_qk'],
                        help='timm models (default: %(default)s)')
    parser.add_argument('--model-kwargs', nargs='*', default={}, action=_ModelKwargs, metavar='KEY=VALUE',
                        help='arguments of every model, e.g. sot_reg=0.5')
    parser.add_argument('--data-dir', default='', metavar='DIR',
                        help='image folder with train/<class>/ and val/<class>/ or test/<class>/')
    parser.add_argument('--epochs', type=_number(int, 1), default=4, help='default: %(default)s')
    parser.add_argument('--batch-size', type=_number(int, 1), default=16, help='default: %(default)s')
    parser.add_argument('--lr', type=_number(float, 0, exclusive=True), default=2e-3,
                        help='peak learning rate (default: %(default)s)')
    parser.add_argument('--weight-decay', type=_number(float, 0), default=0.03, help='default: %(default)s')
    parser.add_argument('--seed', type=_number(int, 0), default=0, help='default: %(default)s')
    parser.add_argument('--device', default='', help='default: cuda if there is one, else cpu')
    parser.add_argument('--out', default='', metavar='DIR',
                        help='append the results to DIR/results.jsonl, one JSON line a model')
    parser.set_defaults(run=_study)


def _study(args: argparse.Namespace) -> int:
    from .study.data import load_data
    from .study.engine import Recipe
    from .study.runner import append_results, format_table, input_size, resolve_device, run_study

    device = resolve_device(args.device)
    img_size = input_size(args.models, args.model_kwargs)
    recipe = Recipe(epochs=args.epochs, batch_size=args.batch_size, lr=args.lr, weight_decay=args.weight_decay)
    data = load_data(args.data_dir, img_size)
    results = run_study(args.models, data, recipe, args.seed, device, args.model_kwargs)
    print(format_table(results, data))
    if args.out:
        append_results(args.out, results)
    return 0


def _add_export(commands) -> None:
    parser = commands.add_parser(
        'export', help='make a folder that timm and the Hub read',
        description='Write config.json, model.safetensors and README.md (a model card) from a checkpoint and what it '
                    'recorded.')
    parser.add_argument('checkpoint', metavar='CHECKPOINT',
                        help="of timm's train.py (model_best.pth.tar) or of a study (checkpoints/NAME.safetensors)")
    parser.add_argument('--out', required=True, metavar='DIR', help='the folder, named MODEL.TAG; TAG names the data')
    parser.add_argument('--data-dir', default='', metavar='DIR',
                        help='evaluate on these images, in test/<class>/ or val/<class>/ or <class>/')
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


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for an error of the user's, 130 when interrupted."""
    parser = _Parser(prog='timm-sot', description='Self-Optimal-Transport attention for timm')
    commands = parser.add_subparsers(title='commands', dest='command', required=True, metavar='COMMAND')
    _add_study(commands)
    _add_export(commands)
    try:
        args = parser.parse_args(argv)
        return args.run(args)
    except SystemExit as e:  # argparse has printed what is to be said
        return e.code
    except StudyError as e:
        print(f'timm-sot: error: {e}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('timm-sot: interrupted', file=sys.stderr)
        return 130
