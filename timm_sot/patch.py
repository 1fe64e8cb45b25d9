""" Self-Optimal-Transport attention in the layers of timm models """
import operator
import re
from typing import Dict, Iterable, Optional

from timm.layers import Attention
from torch import nn

from .attention import SOTAttention, check_variant
from .layers import NAMING_MODELS, record_name

__all__ = ['apply_sot']


def apply_sot(
        model: nn.Module,
        variant: str = 'sot_qk',
        *,
        reg: float = 0.1,
        iters: int = 10,
        tol: Optional[float] = None,
        distance: str = 'euclidean',
        blocks: Optional[Iterable[int]] = None,
) -> nn.Module:
    """Give the attention layers of a timm model Self-Optimal-Transport weights, in place.

    Every `timm.layers.Attention` of the model becomes a :class:`SOTAttention` with the same parameters (the very same
    tensors), dropout rates, hooks, device, dtype and training mode. A layer that is one already changes its settings,
    those that are not given to their defaults. The outputs of the model change; train it afterwards. 'sot_shares' adds
    learned parameters to its layers. Another variant removes them, 'sot_shares' again resets them: create the optimizer
    after this call. With `variant='softmax'` the layers become `timm.layers.Attention` again. A layer of a subclass of
    :class:`SOTAttention` stays of its class. Other modules, among them attention layers of other classes and subclasses
    of `timm.layers.Attention` with a forward of their own, are left alone.

    Weights do not say what attention they are for. Where timm saves a model's arguments with it (`save_for_hf`,
    `push_to_hf_hub`; from 1.0.31 on), a CCT whose layers all have the same attention is saved with its `attn`,
    `sot_reg`, `sot_iters`, `sot_tol` and `sot_distance`, and a timm ViT, also a NaFlexViT, whose layers all have the
    same variant, the other settings at their defaults, with its `attn_layer`. Any other model is loaded with timm's own
    attention: call `apply_sot` again, for 'sot_shares', which has parameters of its own, on a model without weights,
    and load them afterwards with `load_state_dict`.

    Args:
        model: Model with `timm.layers.Attention` layers: ViT, DeiT, CCT and others.
        variant: A key of `timm_sot.attention.VARIANTS`.
        reg: Entropy regularization, for 'sot_shares' what the learned one starts from, see :class:`SOTAttention`.
        iters: Number of Sinkhorn iterations, at least 1; 'sot_shares' takes 0, too.
        tol: None runs exactly `iters` iterations, a number stops early, see :class:`SOTAttention`.
        distance: Cost between tokens, 'euclidean' or 'cosine', see :class:`SOTAttention`.
        blocks: Which attention layers to change, counted in the order of `model.named_modules()` (in a ViT the block
            numbers); negative numbers count from the end. None is all of them.

    Returns:
        The model that was passed in.

    Example:
        >>> vit = apply_sot(timm.create_model('vit_tiny_patch16_224'), 'sot_qk', blocks=[-2, -1])

    Raises:
        ValueError: If the model has no such layer, `blocks` names one that it does not have, a layer to change is of a
            subclass with an `attention_weights` of its own, or another argument is out of its range; the model is then
            unchanged. That 'sot_qkt' has as many tokens as a head is wide is checked when the model runs.
    """
    layers = attention_layers(model)
    try:
        given = range(len(layers)) if blocks is None else blocks
        given = list(given.tolist() if hasattr(given, 'tolist') else given)  # a tensor's own items are tensors
        indices = [operator.index(index) for index in given]
    except TypeError:
        given = indices = None
    if indices is None or any(isinstance(index, bool) for index in given):  # a mask would be taken for blocks 0 and 1
        raise ValueError(f'blocks={blocks!r} must be None, for all, or integers in a list, such as blocks=[-1].')
    for index in indices:
        if not -len(layers) <= index < len(layers):
            raise ValueError(
                f'blocks={indices} names attention layer {index}, but the model has {len(layers)} of them: '
                f'choose from {-len(layers)} to {len(layers) - 1}, or None for all.')
    layers = list(layers.values())
    selected = [layers[index] for index in indices]
    for index, layer in zip(indices, selected):
        if isinstance(layer, SOTAttention) and type(layer).attention_weights is not SOTAttention.attention_weights:
            raise ValueError(
                f'attention layer {index} is a {type(layer).__qualname__}, which makes attention weights of its own '
                f'and has no variants; leave it out by naming others in blocks.')
    check_variant(variant, reg, iters, tol, distance)  # before the first layer is touched

    for layer in selected:
        if variant == 'softmax' and type(layer) is SOTAttention:
            layer.clear_variant()
            layer.__class__ = Attention
        elif variant != 'softmax' or isinstance(layer, SOTAttention):
            if type(layer) is Attention:
                layer.__class__ = SOTAttention
            layer.set_variant(variant, reg=reg, iters=iters, tol=tol, distance=distance)
    layers = set(attention_layers(model).values())
    for module in model.modules():  # what was passed in may hold the model, as that of torch.compile does
        if hasattr(module, 'record_attention'):  # a CCT
            module.record_attention()
        elif isinstance(module, NAMING_MODELS):
            record_name(module, layers.intersection(module.modules()))
    return model


def attention_layers(model: nn.Module) -> Dict[str, Attention]:
    """The layers of a model with the forward of timm's Attention or of SOTAttention, by module name.

    Raises:
        ValueError: If it has none, or is no model.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f'model={model!r} must be a torch.nn.Module, such as timm.create_model returns.')
    layers = {name: module for name, module in model.named_modules() if (
        type(module) is Attention or isinstance(module, SOTAttention) and type(module).forward is SOTAttention.forward)}
    if not layers:
        others = sorted({
            f'{type(module).__module__}.{type(module).__qualname__}' for module in model.modules()
            if re.search('attention|attn', type(module).__name__, re.IGNORECASE)})
        raise ValueError(
            f'model ({type(model).__name__}) has no timm.layers.Attention or timm_sot.SOTAttention module; '
            f'found {", ".join(others) if others else "none with attention in the name of its class"}. '
            f'apply_sot and attention_maps take models whose attention is such a module, like '
            f'vit_base_patch16_224, deit3_small_patch16_224, pit_s_224 and cct_2.')
    return layers
