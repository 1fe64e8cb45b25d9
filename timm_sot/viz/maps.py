""" The matrices of a model's attention layers, taken from its own forward pass """
import math
from contextlib import ExitStack, contextmanager
from typing import Any, Callable, Dict, Iterator, Sequence

import torch
from timm.layers import Attention
from torch import nn

from ..attention import SOTAttention, sot_and_weights
from ..patch import attention_layers
from ..transform import autocast_disabled

__all__ = ['attention_entropy', 'attention_maps', 'attention_statistics', 'common_part', 'row_entropy']


@torch.no_grad()
def attention_maps(model: nn.Module, images: torch.Tensor) -> Dict[str, Dict[str, torch.Tensor]]:
    """Run a model and return the matrices of all its attention layers.

    They are those of one forward pass in the mode that the model is in (call `model.eval()` first, or dropout and the
    like are at work), without gradients, and all in memory at once. The model is afterwards what it was before, also if
    its forward raises.

    Args:
        model: Any model that :func:`timm_sot.apply_sot` accepts, with SOT or softmax attention.
        images: What the model takes, (B, C, H, W).

    Returns:
        For each attention layer that ran, by the name of its block ('blocks.0'), a dictionary of matrices (B, H, N, N):
         - 'scores': Q K^T d^-1/2. Softmax attention is the softmax of it; SOT attention has no use for it, so there it
            is computed beside the forward.
         - 'sot': the SOT matrix, with entries in [0, 1] and unit diagonal, in float32 or wider. Absent for softmax, and
            for 'sot_shares', the weights of which are themselves a transport plan.
         - 'weights': what was multiplied with V, after softmax (where the variant has one) and dropout.

    Raises:
        ValueError: If the model has no attention layer of a known class.
    """
    model = getattr(model, '_orig_mod', model)  # of torch.compile: what is recorded must not become part of a graph
    maps = {}
    with ExitStack() as stack:
        for name, layer in attention_layers(model).items():
            record = maps[name.removesuffix('.attn')] = {}
            stack.enter_context(recording(layer, record))
        stack.enter_context(buffers_kept(model))
        model(images)
    return {name: record for name, record in maps.items() if record}


def attention_entropy(model: nn.Module, images: torch.Tensor) -> Dict[str, torch.Tensor]:
    """The :func:`row_entropy` of the attention weights of a model's layers, (B, H, N), see `attention_statistics`."""
    return {name: values for name, (values,) in attention_statistics(model, images, [row_entropy]).items()}


@torch.no_grad()
def attention_statistics(
        model: nn.Module,
        images: torch.Tensor,
        statistics: Sequence[Callable[[torch.Tensor], torch.Tensor]],
) -> Dict[str, Sequence[torch.Tensor]]:
    """Run a model and return functions of the attention weights of all its attention layers.

    As these functions of the 'weights' of :func:`attention_maps`, but no layer's matrices are kept.

    Args:
        model: Any model that :func:`timm_sot.apply_sot` accepts, in the mode in which it is to be looked at.
        images: What the model takes, (B, C, H, W).
        statistics: Functions of weights (B, H, N, N), such as `row_entropy` and `common_part`.

    Returns:
        For each attention layer that ran, by the name of its block, the values of the functions.

    Raises:
        ValueError: If the model has no attention layer of a known class.
    """
    model = getattr(model, '_orig_mod', model)
    values = {}

    def keep(name):
        def hook(module, args, weights):
            values[name] = [statistic(weights) for statistic in statistics]
        return hook

    with ExitStack() as stack:
        for name, layer in attention_layers(model).items():
            stack.enter_context(attributes_set(layer, {'fused_attn': False}))
            handle = layer.attn_drop.register_forward_hook(keep(name.removesuffix('.attn')))
            stack.callback(handle.remove)
        stack.enter_context(buffers_kept(model))
        model(images)
    return values


@contextmanager
def recording(layer: Attention, record: Dict[str, torch.Tensor]) -> Iterator[None]:
    """A context in which the layer puts its matrices into `record`."""
    inputs = {}

    def keep(name):
        def hook(module, args, output):
            inputs[name] = output  # (B, H, N, D)
        return hook

    def on_weights(module, args, weights):
        record['scores'] = (inputs.pop('q') * layer.scale) @ inputs.pop('k').transpose(-2, -1)
        if 'sot' in inputs:
            record['sot'] = inputs.pop('sot')
        record['weights'] = weights

    def sot_attention_weights(q, k, attn_mask=None, is_causal=False):
        """The layer's `attention_weights`, with the SOT matrix kept that it is made of."""
        if attn_mask is not None or is_causal:
            return SOTAttention.attention_weights(layer, q, k, attn_mask, is_causal)  # refuses
        with autocast_disabled(q.device):
            inputs['sot'], weights = sot_and_weights(
                q, k, layer.operands, layer.softmax, layer.distance, layer.reg, layer.iters, layer.tol)
        return weights

    # fused attention never has its weights in memory; what is not fused passes them through attn_drop
    attributes = {'fused_attn': False}
    if getattr(layer, 'operands', ''):
        attributes['attention_weights'] = sot_attention_weights
    handles = []
    with attributes_set(layer, attributes):
        try:
            handles.append(layer.q_norm.register_forward_hook(keep('q')))
            handles.append(layer.k_norm.register_forward_hook(keep('k')))
            handles.append(layer.attn_drop.register_forward_hook(on_weights))
            yield
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def attributes_set(module: nn.Module, attributes: Dict[str, Any]) -> Iterator[None]:
    """A context in which the instance has these attributes."""
    before = {name: vars(module)[name] for name in attributes if name in vars(module)}
    try:
        for name, value in attributes.items():
            setattr(module, name, value)
        yield
    finally:
        for name in attributes:
            if name in before:
                setattr(module, name, before[name])
            elif name in vars(module):
                delattr(module, name)


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """A context after which buffers are as before: a forward in training mode updates those of batch normalization."""
    buffers = [buffer for module in model.modules() if module.training for buffer in module.buffers(recurse=False)]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, before):
            buffer.copy_(value)


def row_entropy(weights: torch.Tensor) -> torch.Tensor:
    """Entropy of each row relative to that of uniform weights, (..., N) -> (...): 0 for one key, 1 for all N alike.

    Rows that do not sum to 1, those of the variants without softmax, are divided by their sum first. Of a single token
    it is NaN. In float64, since for weights that differ from uniform ones by a small part it differs from 1 by about
    the square of that.
    """
    weights = rows_of_sum_one(weights)
    return torch.special.entr(weights).sum(dim=-1) / math.log(weights.shape[-1])


def common_part(weights: torch.Tensor) -> torch.Tensor:
    """How much of what distinguishes weights from uniform ones is the same for all queries, (..., N, N) -> (...).

    1 if all queries look at the same tokens, whose columns have large sums then; 0 if every column has the same sum, as
    in a doubly stochastic matrix, or the weights are uniform. It is the sum of squares of the mean row's differences
    from 1/N, as a share of that of all rows'. Rows are divided by their sum first.
    """
    differences = rows_of_sum_one(weights) - 1 / weights.shape[-1]
    common = differences.mean(dim=-2).square().sum(dim=-1)
    total = differences.square().sum(dim=-1).mean(dim=-1)
    return torch.where(total == 0, 0., common / total)  # NaN of weights that are NaN


def rows_of_sum_one(weights: torch.Tensor) -> torch.Tensor:
    """The rows divided by their sums, in float64 where the device has it."""
    weights = weights.double() if weights.device.type != 'mps' else weights.float()
    return weights / weights.sum(dim=-1, keepdim=True)
