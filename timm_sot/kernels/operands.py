""" Tensors and numbers around the kernels of SOT attention, the same for all that implement it """
from typing import Optional, Tuple

import torch

__all__ = [
    'LEAST_REG',
    'SCALING_MIN_REG',
    'WITHOUT_FLOAT64',
    'dropout_numbers',
    'empty_gradients',
    'empty_heads',
    'matched_points',
    'unit_stride',
]

# Least regularization at which float32 carries the scaling form. Costs are in [0, 1], so log-kernel entries are in
# [-1 / reg, 0]; with a masked diagonal the scaling vectors span up to a few times exp(1 / reg). Float32 ends at
# exp(88): exp(4 / reg) is inside.
SCALING_MIN_REG = 0.05

# Below, the rounding errors of a log-kernel in float32 are larger than 1, and the exponential of a difference that
# should be 0 may be infinite.
LEAST_REG = 1e-7

WITHOUT_FLOAT64 = {'mps'}  # device types: Apple's GPUs refuse it


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """x with contiguous rows, which lie together: inside a problem the Triton kernels count in 32 bits."""
    return x if x.stride(-1) == 1 and x.stride(-2) * x.shape[-2] < 2 ** 31 else x.contiguous()


def matched_points(q: torch.Tensor, k: torch.Tensor, operands: str) -> torch.Tensor:
    """What the queries are matched with: themselves for 'q', the keys for 'qk', the columns of the keys for 'qkt'."""
    if operands == 'q':
        return q
    if operands == 'qk':
        return unit_stride(k)
    # their rows are read across: only that they lie together matters
    return (k if max(k.stride()[-2:]) * k.shape[-1] < 2 ** 31 else k.contiguous()).transpose(-2, -1)


def empty_heads(q: torch.Tensor, dtype: Optional[torch.dtype] = None) -> torch.Tensor:
    """(B, H, N, D) stored as (B, N, H, D), so that merging the heads afterwards moves nothing."""
    B, H, N, D = q.shape
    return q.new_empty(B, N, H, D, dtype=dtype).transpose(1, 2)


def empty_gradients(q: torch.Tensor, operands: str) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Room for the gradients of q, k and v; that of k has no elements for operands 'q'."""
    return empty_heads(q), q.new_empty(0) if operands == 'q' else empty_heads(q), empty_heads(q)


def dropout_numbers(p: float, lowest: int = 0) -> Tuple[int, float]:
    """What a weight's 32-bit random number, from `lowest` on, is to reach for it to be kept, and the factor on it then.
    """
    return lowest + min(int(p * 2 ** 32), 2 ** 32 - 1), 1. / (1. - p) if p < 1. else 0.
