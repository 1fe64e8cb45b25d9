""" SOT attention by name, for the models of timm that take an `attn_layer`

    timm.create_model('vit_tiny_patch16_224', attn_layer='sot_qk')

So it can be said where a model is described by strings alone: in `train.py --model-kwargs attn_layer=sot_qk`, and in
the config.json that timm writes. timm has the table of names since 1.0.23; with older versions there is `apply_sot`.
"""
from typing import Iterable

from timm.layers import Attention
from timm.models import naflexvit, vision_transformer
from torch import nn

try:
    from timm.models._input import get_model_args, update_model_args
except ImportError:  # timm before 1.0.31 keeps no record of what a model was changed to
    get_model_args = update_model_args = None

from .attention import SOTAttention, VARIANTS, settings_of

__all__ = ['NAMED_LAYERS', 'NAMING_MODELS', 'record_name']


def named_layer(variant: str) -> type:
    """A class that makes the SOTAttention of a variant, as timm asks for a class."""
    def __new__(cls, *args, **kwargs):
        return SOTAttention(*args, variant=variant, **kwargs)  # of that class itself, which is what a model then holds

    return type(variant, (SOTAttention,), {
        '__new__': __new__,
        '__doc__': f':class:`timm_sot.SOTAttention` of variant {variant!r}, its other arguments at their defaults.',
    })


NAMED_LAYERS = {variant: named_layer(variant) for variant in VARIANTS if variant != 'softmax'}

if hasattr(vision_transformer, 'ATTN_LAYERS'):
    vision_transformer.ATTN_LAYERS.update(NAMED_LAYERS, softmax=Attention)


# The models whose attention has a name. Others may have an argument that is called so, too, but not these names.
NAMING_MODELS = (vision_transformer.VisionTransformer, naflexvit.NaFlexVit)


def record_name(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Have timm save a ViT with the name of its attention, where that says all of it, or else with none.

    Args:
        model: The model.
        layers: All of its attention layers.
    """
    if update_model_args is None:
        return
    names = {name_of(layer) for layer in layers}
    name = names.pop() if len(names) == 1 else ''
    if name or get_model_args(model).get('attn_layer'):
        update_model_args(model, attn_layer=name or 'attn')


def name_of(layer: nn.Module) -> str:
    """The name that makes an attention layer like this one, '' if none does or timm's own attention needs none."""
    if type(layer) is not SOTAttention or layer.variant == 'softmax':
        return ''
    return layer.variant if settings_of(layer) == settings_of() else ''
