""" Attention by a transport plan with learned marginals on the CPU: as `cpu`, with the loops of `cpu_loops`

The formulas are those of `shares`. Kept for the backward pass are the cosines, as large as the weights that softmax
attention keeps.
"""
from typing import Any, Optional, Tuple

import torch

from .cpu import flat, loop_dtype, padded, seed_number, work
from .operands import dropout_numbers, empty_heads
from .threads import run_in_threads

__all__ = ['empty_saved', 'shares_forward', 'shares_backward']


def empty_saved(q: torch.Tensor, iters: int) -> torch.Tensor:
    """Room for what `shares_forward` keeps, however many iterations."""
    B, H, N, _ = q.shape
    return q.new_empty(B * H, N, padded(N), dtype=torch.float32)


def _parameters(scale: torch.Tensor, log_shares: torch.Tensor) -> Tuple[Any, Any]:
    return scale.detach().contiguous().numpy(), log_shares.detach().contiguous().flatten(0, 1).numpy()


def _dropout(p: float) -> Tuple[Any, Any, bool]:
    import numpy as np

    drop_below, keep_factor = dropout_numbers(p)
    return np.uint32(drop_below), np.float32(keep_factor), p > 0.


def shares_forward(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: torch.Tensor,
        log_shares: torch.Tensor,
        iters: int,
        dropout_p: float,
        seed: Optional[torch.Tensor],
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Output (B, H, N, D), arguments as `shares.fused_shares_attention`, and what the backward pass needs: the cosines,
    (B * H, N, padded N) in float32.
    """
    from .cpu_loops import shares_forward as loops

    B, H, N, D = q.shape
    out, cosines = empty_heads(q, loop_dtype(q)), empty_saved(q, iters)
    run_in_threads(
        loops, B * H, work(q, iters),
        H, *flat(q), *flat(k), *flat(v), *flat(out), cosines.numpy(), *_parameters(scale, log_shares),
        seed_number(seed), N, D, iters, *_dropout(dropout_p))
    return out.to(q.dtype), cosines


def shares_backward(
        grad_out: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: torch.Tensor,
        log_shares: torch.Tensor,
        cosines: torch.Tensor,
        iters: int,
        dropout_p: float,
        seed: Optional[torch.Tensor],
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients for q, k and v, in their dtype, the scale by problem, (B, H), and the logarithms of the shares."""
    from .cpu_loops import shares_backward as loops

    B, H, N, D = q.shape
    grads = [empty_heads(q, loop_dtype(q)) for _ in range(3)]
    grad_scale, grad_log_shares = scale.new_empty(B * H), log_shares.new_empty(B * H, N)
    run_in_threads(
        loops, B * H, 2 * work(q, iters),
        H, *flat(q), *flat(k), *flat(v), *flat(grad_out), cosines.detach().numpy(), *_parameters(scale, log_shares),
        seed_number(seed), *(flat(grad)[0] for grad in grads), flat(grads[0])[1], grad_scale.numpy(),
        grad_log_shares.numpy(), N, D, iters, *_dropout(dropout_p))
    return *(grad.to(q.dtype) for grad in grads), grad_scale.view(B, H), grad_log_shares.view(B, H, N)
