""" The command line, `timm-sot`

A file for each command; none imports torch before it is run, so that --help does not wait for it.
"""
import sys
from typing import List, Optional

from .. import __version__
from ..errors import UserError
from .arguments import Parser
from .attention import add_attention
from .bench import add_bench
from .export import add_export
from .study import add_study

__all__ = ['main']


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for an error of the user's, 130 when interrupted."""
    parser = Parser(prog='timm-sot', description='Self-Optimal-Transport attention for timm')
    parser.add_argument('--version', action='version', version=f'%(prog)s {__version__}')
    commands = parser.add_subparsers(title='commands', dest='command', required=True, metavar='COMMAND')
    add_study(commands)
    add_attention(commands)
    add_export(commands)
    add_bench(commands)
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
