""" SOT attention on the CPU: one matrix at a time, in cache, from q, k, v to the output and back

The same functions as `onchip`, with the loops of `cpu_loops`, which numba compiles; without numba this path does not
exist. Problems are shared out among as many threads as torch uses. Kept for the backward pass: the costs, as large as
the weights that softmax attention keeps, and the scaling vectors.

The formulas are those of `onchip`, but for the cosine distance: as half the squared distance of unit vectors it does
not cancel. Distances and their gradients are sums of differences, so they are exact for points that are close to each
other and far from the origin; the cosine distance of close directions is as exact as float32 has the directions.
"""
import math
from typing import Any, Optional, Tuple

import torch

from .operands import SCALING_MIN_REG, dropout_numbers, empty_heads
from .threads import run_in_threads

__all__ = [
    'MAX_TOKENS',
    'count_iterations',
    'empty_saved',
    'flat',
    'loop_dtype',
    'padded',
    'seed_number',
    'sot_attention_forward',
    'sot_attention_backward',
    'work',
]

# The matrices of one problem leave the cache long before, and attention takes up to 4 times as long as softmax
# attention; but plain torch takes 1.6 to 3 times as long as the loops (4096 tokens, one head, one thread of an Intel
# Xeon), and this is the largest size that was measured.
MAX_TOKENS = 8192

# The scaling vectors of more iterations than this are not kept for the backward pass but found again.
MAX_KEPT_ITERS = 16

# Numbers that counting iterations keeps at once, but those of one image.
MAX_COUNTING = 2 ** 23


def padded(n: int) -> int:
    """The next multiple of 16, to which the loops pad."""
    return (n + 15) // 16 * 16


def flat(x: torch.Tensor) -> Tuple[Any, Tuple[int, int, int]]:
    """The memory of a (B, H, N, D) tensor with contiguous rows as a numpy vector, and its strides.

    In float32, but the bits of bfloat16, which the loops convert as they go: converted beforehand, and the results
    afterwards, each would go through memory once more.
    """
    x = x.detach()
    if loop_dtype(x) != x.dtype:
        x = x.float()
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    extent = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride())) + 1 if x.numel() else 0
    vector = x.as_strided((extent,), (1,))
    if x.dtype == torch.bfloat16:
        return vector.view(torch.int16).numpy().view('uint16'), x.stride()[:3]
    return vector.numpy(), x.stride()[:3]


def loop_dtype(q: torch.Tensor) -> torch.dtype:
    """What the loops read queries, keys and values as, and write results as."""
    return torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32


def empty_saved(q: torch.Tensor, iters: int) -> torch.Tensor:
    """Room for what `sot_attention_forward` keeps."""
    B, H, N, _ = q.shape
    vectors = 2 * iters if iters <= MAX_KEPT_ITERS else 0
    return q.new_empty(B * H, N + 1 + vectors, padded(N), dtype=torch.float32)


def _numbers(
        q: torch.Tensor,
        operands: str,
        softmax: bool,
        reg: float,
        iters: int,
        scale: float,
        dropout_p: float,
        distance: str,
) -> Tuple[Any, ...]:
    """The last arguments of both loops."""
    import numpy as np

    N, D = q.shape[-2:]
    drop_below, keep_factor = dropout_numbers(dropout_p)
    return (
        N, D, iters, np.float32(reg), np.float32(scale), np.uint32(drop_below), np.float32(keep_factor),
        operands == 'q', operands == 'qkt', distance == 'cosine', softmax, reg < SCALING_MIN_REG,
        iters <= MAX_KEPT_ITERS, dropout_p > 0.)


def work(q: torch.Tensor, iters: int) -> int:
    """Multiplications of a problem in the forward pass; in the backward pass there are about twice as many."""
    N, D = q.shape[-2:]
    return 2 * N * N * (D + iters)


def seed_number(seed: Optional[torch.Tensor]) -> Any:
    """The seed of dropout as a numpy vector of one number, which is not looked at where there is no dropout."""
    return (torch.zeros(1, dtype=torch.int64, device='cpu') if seed is None else seed.detach().reshape(1)).numpy()


def sot_attention_forward(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        operands: str,
        softmax: bool,
        reg: float,
        iters: int,
        scale: float,
        dropout_p: float = 0.,
        seed: Optional[torch.Tensor] = None,
        distance: str = 'euclidean',
) -> Tuple[torch.Tensor, torch.Tensor]:
    """SOT attention of queries, keys and values, each (B, H, N, D) with any strides; arguments as `onchip`'s.

    Returns:
        Output (B, H, N, D), and for the backward pass, (B * H, N + 1 or N + 1 + 2 iters, padded N) in float32, the
        costs, their row maxima, and the scaling vectors of all iterations unless they are too many: their logarithms
        to base 2 where reg < SCALING_MIN_REG.
    """
    from .cpu_loops import attention_forward

    B, H = q.shape[:2]
    out = empty_heads(q, loop_dtype(q))
    saved = empty_saved(q, iters)
    numbers = _numbers(q, operands, softmax, reg, iters, scale, dropout_p, distance)
    run_in_threads(
        attention_forward, B * H, work(q, iters),
        H, *flat(q), *flat(q if operands == 'q' else k), *flat(v), *flat(out), saved.numpy(), seed_number(seed),
        *numbers)
    return out.to(q.dtype), saved


def count_iterations(
        q: torch.Tensor,
        k: torch.Tensor,
        operands: str,
        reg: float,
        iters: int,
        tol: float,
        distance: str = 'euclidean',
) -> int:
    """How many iterations run until `tol` stops them, for all problems together: `iters` at most.

    They are found in a forward pass that keeps the scaling vectors of MAX_KEPT_ITERS iterations, and of twice as many
    as long as these do not do, of so many problems at once that they are few: its matrices are in cache, so that with
    10 iterations (128x2x64x64, one thread of an Intel Xeon) it takes less than half of the time in which plain torch
    counts, which stops.

    Args:
        q, k, operands, reg, iters, distance: As `sot_attention_forward`.
        tol: Bound of the mean over all problems of sum_i |u_i - previous u_i|, in units of the cost.
    """
    B, H, N, _ = q.shape
    most = min(iters, MAX_KEPT_ITERS)
    while True:
        total = 0.
        size = max(1, MAX_COUNTING // max(1, H * (N + 1 + 2 * most) * padded(N)))
        for x, y in zip(q.split(size), k.split(size)):
            changes = _changes(x, y, operands, reg, most, distance)
            if changes is None:
                return iters
            total = total + changes
        count = int((total / (B * H) >= tol).long().cumprod(dim=0).sum()) + 1
        if count <= most or most == iters:
            return min(count, iters)
        most = min(2 * most, iters)


def _changes(
        q: torch.Tensor,
        k: torch.Tensor,
        operands: str,
        reg: float,
        iters: int,
        distance: str,
) -> Optional[torch.Tensor]:
    """Sum over the problems of sum_i |u_i - previous u_i|, in units of the cost, for each iteration; None where a
    problem is not finite: it has no scaling vectors, and its changes are below no bound.
    """
    from .cpu_loops import attention_forward

    B, H, N, _ = q.shape
    out = empty_heads(q, loop_dtype(q))
    saved = q.new_empty(B * H, N + 1 + 2 * iters, padded(N), dtype=torch.float32)
    *numbers, _, dropout = _numbers(q, operands, True, reg, iters, 1., 0., distance)
    run_in_threads(
        attention_forward, B * H, work(q, iters),
        H, *flat(q), *flat(q if operands == 'q' else k), *flat(q), *flat(out), saved.numpy(), seed_number(None),
        *numbers, True, dropout)
    if not out.isfinite().all():
        return None
    u = saved[:, N + 1::2, :N]  # (B * H, iters, N)
    u = u * math.log(2) if reg < SCALING_MIN_REG else u.log()
    return reg * u.diff(dim=1, prepend=torch.zeros_like(u[:, :1])).abs().sum(dim=(0, 2))


def sot_attention_backward(
        grad_out: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        saved: torch.Tensor,
        operands: str,
        softmax: bool,
        reg: float,
        iters: int,
        scale: float,
        dropout_p: float = 0.,
        seed: Optional[torch.Tensor] = None,
        distance: str = 'euclidean',
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `sot_attention_forward` for q, k and v, in their dtype; k's has no elements for operands 'q'."""
    from .cpu_loops import attention_backward

    B, H = q.shape[:2]
    own = operands == 'q'
    grad_q, grad_v = empty_heads(q, loop_dtype(q)), empty_heads(q, loop_dtype(q))
    grad_k = grad_q if own else empty_heads(q, loop_dtype(q))
    numbers = _numbers(q, operands, softmax, reg, iters, scale, dropout_p, distance)
    run_in_threads(
        attention_backward, B * H, 2 * work(q, iters),
        H, *flat(q), *flat(q if own else k), *flat(v), *flat(grad_out), saved.detach().numpy(), seed_number(seed),
        flat(grad_q)[0], flat(grad_k)[0], *flat(grad_v), *numbers)
    return grad_q.to(q.dtype), q.new_empty(0) if own else grad_k.to(q.dtype), grad_v.to(q.dtype)
