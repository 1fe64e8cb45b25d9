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

    from .bench import bar_table, format_tables, load_reports, run_bench, write_report
    from .study.runner import resolve_device

    if args.markdown:
        print(bar_table(load_reports(args.markdown), markdown=True))
        return 0
    device = resolve_device(args.device)
    if args.json and (os.path.isdir(args.json) or not os.access(os.path.dirname(args.json) or '.', os.W_OK)):
        raise StudyError(f'--json {args.json} cannot be written.')
    if args.threads:
        torch.set_num_threads(args.threads)
    report = run_bench(
        device, getattr(torch, args.dtype) if args.dtype else None, args.quick, args.only,
        on_progress=lambda report: write_report(report, args.json) if args.json else None)
    print(format_tables(report), bar_table([report]), sep='\n\n')
    return 0


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for an error of the user's, 130 when interrupted."""
    parser = _Parser(prog='timm-sot', description='Self-Optimal-Transport attention for timm')
    commands = parser.add_subparsers(title='commands', dest='command', required=True, metavar='COMMAND')
    _add_study(commands)
    _add_bench(commands)
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
