""" Attention by a transport plan with learned marginals as one operator

The kernel of the plan is exp((cos(q_i, k_j) - 1) scale), with a scale for each head; its rows have equal masses and its
columns given ones, the shares. `cpu_shares`, `onchip_shares` and `streamed_shares` compute it, by the rule of
`fused.choose_path`.

With P the weights, rows of which sum to 1, and G the gradient of log P, that of log K is

    G - P (row sums of G)  and, from the last iteration to the first, with a and b before it and d = 1 / (a^T K),
    column = d (gradient of log b),    gradient of log a = -a (K column),    row = a (gradient of log a)
    gradient of log b before = -b (row^T K),    gradient of log K -= K (a column^T + row b^T)

and the gradient of the logarithm of a share that of log b, summed over iterations. The factors b are divided by their
sum in each, which cancels.
"""
import functools
import importlib
from types import ModuleType
from typing import Optional, Tuple

import torch

from .operands import empty_heads
from .operators import check_one_device, differentiate, operator, refuse_second_derivative, register_fake

__all__ = ['fused_shares_attention']


@functools.lru_cache(maxsize=None)
def _implementation(path: str) -> ModuleType:
    return importlib.import_module(f'{__package__}.{path}_shares')


def fused_shares_attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: torch.Tensor,
        log_shares: torch.Tensor,
        iters: int,
        dropout_p: float,
        path: str,
) -> torch.Tensor:
    """Output of the attention, (B, H, N, D) as q, k and v, in the dtype of the values.

    Args:
        q: Queries.
        k: Keys.
        v: Values; the queries and keys are taken in their dtype.
        scale: Factor on the cosines for each head, (H,), in float32, at most `1 / attention.MIN_REG`.
        log_shares: Logarithms of the shares of the tokens, (B, H, N), in float32.
        iters: Number of Sinkhorn iterations; 0 for softmax.
        dropout_p: Dropout probability of the weights, see `fused.fused_sot_attention`.
        path: As `fused.choose_path` returns it, but not 'eager'.
    """
    q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast a norm of the queries and keys widens them, but not the values
    seed = torch.randint(2 ** 62, (), device=q.device) if dropout_p > 0. else None
    out, _ = shares_attention(q, k, v, scale, log_shares, iters, dropout_p, seed, path)
    return out


@operator
def shares_attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: torch.Tensor,
        log_shares: torch.Tensor,
        iters: int,
        dropout_p: float,
        seed: Optional[torch.Tensor],
        path: str,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """The output, and what the backward pass needs."""
    with torch.cuda.device_of(q):  # Triton launches on the current GPU
        return _implementation(path).shares_forward(q, k, v, scale, log_shares, iters, dropout_p, seed)


@register_fake(shares_attention)
def _(q, k, v, scale, log_shares, iters, dropout_p, seed, path):
    check_one_device(q, k, v, scale, log_shares)
    return empty_heads(q), _implementation(path).empty_saved(q, iters)


@operator
def shares_attention_backward(
        grad_out: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: torch.Tensor,
        log_shares: torch.Tensor,
        saved: torch.Tensor,
        iters: int,
        dropout_p: float,
        seed: Optional[torch.Tensor],
        path: str,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients for q, k and v, in their dtype, and for the scale and the logarithms of the shares."""
    with torch.cuda.device_of(q):
        *grads, grad_scale, grad_log_shares = _implementation(path).shares_backward(
            grad_out, q, k, v, scale, log_shares, saved, iters, dropout_p, seed)
    return *grads, grad_scale.sum(0), grad_log_shares


@register_fake(shares_attention_backward)
def _(grad_out, q, k, v, scale, log_shares, saved, iters, dropout_p, seed, path):
    check_one_device(grad_out, q, k, v, scale, log_shares, saved)
    return *(empty_heads(q) for _ in range(3)), scale.new_empty(scale.shape), log_shares.new_empty(log_shares.shape)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.iters, ctx.dropout_p, seed, ctx.path = inputs
    _, saved = output
    ctx.save_for_backward(*tensors, saved, seed)
    ctx.mark_non_differentiable(saved)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_out, _):
    if grad_out is None:  # what came after has none
        return (None,) * 9
    *tensors, seed = ctx.saved_tensors
    grads = shares_attention_backward(grad_out, *tensors, ctx.iters, ctx.dropout_p, seed, ctx.path)
    return *grads, None, None, None, None


differentiate(shares_attention, _differentiate, _setup_context)
differentiate(shares_attention_backward, refuse_second_derivative)
