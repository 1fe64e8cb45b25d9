""" timm-sot export """
import argparse

from .arguments import ModelKwargs

__all__ = ['add_export']


def add_export(commands) -> None:
    parser = commands.add_parser(
        'export', help='make a folder that timm and the Hub read',
        description='Write config.json, model.safetensors and README.md (a model card) from a checkpoint and what it '
                    'recorded.')
    parser.add_argument('checkpoint', metavar='CHECKPOINT',
                        help="of timm's train.py (model_best.pth.tar) or of a study (checkpoints/NAME.safetensors)")
    parser.add_argument('--out', required=True, metavar='DIR',
                        help='the folder, whose name is that of the model in its card: MODEL.TAG, a TAG for the data, '
                             'such as cifar10 or, of 200 epochs, e200_cifar10; a card that is there is replaced, with '
                             'what was added to it')
    parser.add_argument('--data-dir', default='', metavar='DIR',
                        help='evaluate on these images, in val/<class>/, or else test/<class>/, or else <class>/')
    parser.add_argument('--model-kwargs', nargs='*', default={}, action=ModelKwargs, metavar='KEY=VALUE',
                        help="arguments in place of those of the training, None for the model's default")
    parser.add_argument('--device', default='', help='where to evaluate (default: cuda if there is one, else cpu)')
    parser.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> int:
    from ..export import export
    from ..machine import resolve_device

    device = resolve_device(args.device) if args.data_dir else None
    score = export(args.checkpoint, args.out, args.data_dir, device, args.model_kwargs)
    print(f'{args.out}: ' + (f'top-1 {score.top1:.2f} on {score.images} images' if score else 'not evaluated'))
    return 0
