""" SOT attention by name, for the models of timm that take an `attn_layer`

    timm.create_model('vit_tiny_patch16_224', attn_layer='sot_qk')

So it can be said where a model is described by strings alone: in `train.py --model-kwargs attn_layer=sot_qk`, and in
the config.json that timm writes. timm has the table of names since 1.0.23; with older versions there is `apply_sot`.
"""
from timm.models import vision_transformer

from .attention import SOTAttention, VARIANTS

__all__ = ['NAMED_LAYERS']


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
    vision_transformer.ATTN_LAYERS.update(NAMED_LAYERS)
