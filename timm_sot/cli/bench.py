""" timm-sot bench """
import argparse

from ..errors import UserError
from .arguments import number

__all__ = ['add_bench']


def add_bench(commands) -> None:
    parser = commands.add_parser(
        'bench', help='time SOT attention beside softmax attention',
        description='Time the attention core, training steps and the Sinkhorn part of SOT attention, and weigh its '
                    'memory, beside softmax attention, the form of the original experiments and, where installed, '
                    'other solvers; print tables, and which of the bars that the project set itself are met.')
    parser.add_argument('--device', default='', help='cpu or cuda; default: cuda if there is one, else cpu')
    parser.add_argument('--dtype', choices=('float32', 'bfloat16', 'float16'),
                        help='of the attention core; default: float32 on cpu, bfloat16 on cuda')
    parser.add_argument('--threads', type=number(int, 1), metavar='N', help='CPU threads; default: as torch chooses')
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

    from ..bench.report import bar_table, format_report, load_reports, save_report
    from ..bench.runner import run_bench
    from ..machine import resolve_device

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
