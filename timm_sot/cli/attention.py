""" timm-sot attention """
import argparse
from typing import TYPE_CHECKING, Any, Dict, Sequence, Tuple

from ..errors import UserError, first_line
from .arguments import ModelKwargs, number, seed

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ['add_attention']


def _number_or_name(text):
    """An argparse type: a whole number where it is one, else the text."""
    return int(text) if text.lstrip('-').isdecimal() else text


def _patch(text):
    """An argparse type: a patch as ROW,COLUMN."""
    row, column = text.split(',')
    return int(row), int(column)


_patch.__name__ = 'ROW,COLUMN'


def add_attention(commands) -> None:
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
                         help='timm models, folders (local-dir:DIR) or Hub repositories (hf-hub:OWNER/NAME) '
                              '(default: cct_2_sot_qk, and cct_2 where its attention has what is drawn)')
        sub.add_argument('--checkpoint', nargs='+', default=[], metavar='FILE',
                         help='weights of the models, a file for each (default: their pretrained weights, if any)')
        sub.add_argument('--untrained', action='store_true', help='random weights')
        sub.add_argument('--model-kwargs', nargs='*', default={}, action=ModelKwargs, metavar='KEY=VALUE',
                         help='arguments of every model, e.g. sot_reg=0.5')
        sub.add_argument('--image', default='', metavar='PATH', help='image, or folder of images (default: digits)')
        if figure == 'entropy':
            sub.add_argument('--num-images', type=number(int, 1), default=64, metavar='N',
                             help='how many images of a folder, spread evenly over it (default: %(default)s)')
        else:
            sub.add_argument('--index', type=number(int, 0), default=0, metavar='N',
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
            sub.add_argument('--regs', nargs='+', type=number(float, 0, exclusive=True), metavar='REG',
                             default=[0.01, 0.03, 0.1, 0.3, 1.], help='regularizations (default: %(default)s)')
        else:
            sub.add_argument('--dropout', action='store_true', help='apply the dropout of the attention weights')
        sub.add_argument('--seed', type=seed, default=0,
                         help='of random weights and dropout (default: %(default)s)')
        sub.add_argument('--dpi', type=number(int, 10), default=150,
                         help='dots per inch of a PNG (default: %(default)s)')
        sub.add_argument('--out', default=f'{figure}.png', metavar='FILE',
                         help='.png, .svg or .pdf to write (default: %(default)s)')
        sub.set_defaults(run=_attention)


def _attention(args: argparse.Namespace) -> int:
    if not args.out.endswith(('.png', '.svg', '.pdf')):
        raise UserError(f'--out {args.out} must end in .png, .svg or .pdf.')
    try:
        from ..viz import figures
    except ImportError as e:
        raise UserError(e) from e
    import torch

    from ..viz.inputs import load_models

    if args.checkpoint and args.untrained:
        raise UserError('--checkpoint names the weights, and --untrained asks for none; leave one of them out.')
    has_sot = args.figure == 'reg' or getattr(args, 'matrix', '') == 'sot'
    names = args.models or (['cct_2_sot_qk'] if has_sot else ['cct_2', 'cct_2_sot_qk'])
    recorded = [_recorded_kwargs(name, checkpoint) for name, checkpoint in zip(names, args.checkpoint)]
    models = load_models(names, args.checkpoint, args.untrained, args.model_kwargs, args.seed, recorded)
    image_name, images = _images(args)
    options = {
        name: value for name, value in vars(args).items()
        if name in ('layer', 'head', 'matrix', 'queries', 'regs', 'dropout')}
    torch.manual_seed(args.seed)
    try:
        if args.figure == 'entropy':
            of = args.image or 'the handwritten digits of scikit-learn'
            figure = figures.entropy(models, images, images_name=f'{len(images)} images of {of}', **options)
        else:
            figure = getattr(figures, args.figure)(models, images[0], image_name=image_name, **options)
        figure.savefig(args.out, dpi=args.dpi)
    except (ValueError, RuntimeError, OSError, MemoryError) as e:  # what does not fit the model, or nowhere
        raise UserError(first_line(e)) from e
    print(args.out)
    return 0


def _recorded_kwargs(name: str, checkpoint: str) -> Dict[str, Any]:
    """The arguments with which a study trained the model of a checkpoint, none where no study wrote it."""
    from ..study.store import find_classes, find_result

    found = find_result(checkpoint)
    if found is None:
        return {}
    result, _, _ = found
    # a name may go on with the tag of weights; what a folder or the Hub holds has any name
    if ':' not in name and name.partition('.')[0] != result['model'].partition('.')[0]:
        raise UserError(f'{checkpoint} is of {result["model"]}, as the study says that wrote it, not of {name}.')
    return {**result['kwargs'], **find_classes(checkpoint, result['model'])}


def _images(args: argparse.Namespace) -> Tuple[str, Sequence['Image']]:
    """The images of a figure: the one of --index, with its name, for `entropy` as many as --num-images."""
    from ..viz.inputs import ImageFiles, digits, find_images

    found = find_images(args.image) if args.image else digits()
    if args.figure == 'entropy':
        count = min(args.num_images, len(found))
        found = [found[i * len(found) // count] for i in range(count)]
    elif args.index < len(found):
        found = [found[args.index]]
    else:
        raise UserError(f'--index {args.index}: there are {len(found)} images, counted from 0.')
    names, images = zip(*found)
    return names[0], ImageFiles(images) if args.image else images
