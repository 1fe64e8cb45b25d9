""" The Self-Optimal-Transport (SOT) transform

The matrix of a Sinkhorn plan between a set of points and itself, in which no point may be matched with itself: entry
(i, j) says how much i and j belong together, given all the others.

Papers:
    'The Self-Optimal-Transport Feature Transform' - https://arxiv.org/abs/2204.03065
    'The Balanced-Pairwise-Affinities Feature Transform' (BPA, ICML 2024) - https://arxiv.org/abs/2407.01467
"""
from contextlib import nullcontext
from typing import ContextManager, Optional

import torch

from .kernels.distance import distance_by_product, euclidean_distance
from .solver import check_sinkhorn_args, compute_dtype, is_number, operators_work, solve

__all__ = ['self_optimal_transport']

DISTANCES = ('euclidean', 'cosine')
NORMALIZE = ('row', 'matrix', None)


def self_optimal_transport(
        x: torch.Tensor,
        y: Optional[torch.Tensor] = None,
        *,
        distance: str = 'euclidean',
        normalize: Optional[str] = 'row',
        reg: float = 0.1,
        iters: int = 10,
        tol: Optional[float] = None,
        row_mass: Optional[float] = None,
        mask_diagonal: bool = True,
        sigmoid: bool = True,
        max_scale: bool = True,
) -> torch.Tensor:
    """Self-Optimal-Transport transform of a set of points, or of two sets of equal size.

    Entry (i, j) says how much points i and j belong together, given all the others. It is the transform of Shalam and
    Korman (https://arxiv.org/abs/2204.03065), called Balanced-Pairwise-Affinities, BPA, since 2024
    (https://arxiv.org/abs/2407.01467).

    cost = distance(x_i, y_j), normalized; log-kernel L = -cost / reg; P = Sinkhorn plan of L with uniform marginals;
    then P / (1 + P), the division by the largest entry and the unit diagonal, each unless switched off. With N = 1 the
    masked result is [[1]].

    The defaults are those of the SOT-in-CCT experiments. BPA's published ones are `distance='cosine', normalize=None,
    sigmoid=False`, with `row_mass=1.0` for a single set and `row_mass=None, tol=0.1` for a batch of sets; its
    Euclidean form has `normalize='matrix'`.

    Without a `y` the plan is symmetric once Sinkhorn has converged, for `normalize` None and 'matrix'; 'row' divides
    each row by a number of its own and gives that up.

    Args:
        x: Points, shape (..., N, D); leading dimensions are independent problems.
        y: Points to match them with, same shape as `x`; None is `x` itself.
        distance: 'euclidean' for ||x_i - y_j||_2 or 'cosine' for 1 - cos(x_i, y_j) (a zero vector has cosine 0).
        normalize: What the costs are divided by: 'row' for the maximum of each row, 'matrix' for the maximum of the
            whole matrix, None for nothing. 0 / 0 is 0.
        reg: Entropy regularization, in units of the (normalized) cost. Small values give sharp plans.
        iters: Number of Sinkhorn iterations; with `tol` the most that run.
        tol: None runs exactly `iters` iterations. A number stops once the mean over all problems of
            sum_i reg * |u_i - previous u_i| is below it, as the original runs did with 0.1; it couples the problems of
            a batch and synchronizes a GPU, see :func:`sinkhorn`.
        row_mass: Mass of each row of the plan, None for 1 / N.
        mask_diagonal: Forbid matching a point with itself, and x_i with y_i: the diagonal cost is +inf, and the
            result's diagonal is 1.
        sigmoid: Return sigmoid(log P) = P / (1 + P) in place of P.
        max_scale: Divide each matrix by its maximum; the gradient flows through the maximum.

    Returns:
        Matrix of shape (..., N, N), in the dtype of `x`; computed in float32, or float64 for float64, also under
        autocast.

    Raises:
        ValueError: If an argument is out of its range, or `x` and `y` differ in shape or device.
    """
    check_transform_args(distance, reg, iters, tol, row_mass)
    if normalize not in NORMALIZE:
        raise ValueError(f'normalize={normalize!r} is unknown; choose one of {NORMALIZE}.')
    if not x.is_floating_point():
        raise ValueError(f'x must be floating point, got {x.dtype}; convert it, e.g. with .float().')
    if x.ndim < 2 or x.shape[-2] < 1:
        raise ValueError(f'x must have shape (..., N, D) with at least one point, got {tuple(x.shape)}.')
    if y is not None and x.shape != y.shape:
        raise ValueError(
            f'x and y must have the same shape (..., N, D), got x {tuple(x.shape)} and y {tuple(y.shape)}; '
            f'a set is matched with one of equal size, for other sizes build the log-kernel and call sinkhorn.')
    if y is not None and x.device != y.device:
        raise ValueError(f'x and y must be on the same device, got {x.device} and {y.device}; move one, with .to().')
    with autocast_disabled(x.device):
        points = x.to(compute_dtype(x))  # cast once: with two, float16 gradients can overflow before their sum
        others = points if y is None else y.to(points.dtype)
        out = sot_matrix(
            points, others, distance, normalize, reg, int(iters), tol, row_mass, mask_diagonal, sigmoid, max_scale)
    return out.to(x.dtype)


def check_transform_args(
        distance: str,
        reg: float,
        iters: int,
        tol: Optional[float],
        row_mass: Optional[float] = None,
        least_iters: int = 1,
) -> None:
    """Raise ValueError for settings of the transform that are out of their range."""
    if distance not in DISTANCES:
        raise ValueError(f'distance={distance!r} is unknown; choose one of {DISTANCES}.')
    if not (is_number(reg) and 0 < reg < float('inf')):
        raise ValueError(f'reg={reg!r} must be a positive finite number; 0.1 is the default.')
    check_sinkhorn_args(iters, tol, row_mass, least_iters)


def autocast_disabled(device: torch.device) -> ContextManager:
    """A context in which autocast leaves the solver's float32 alone, on devices that have autocast at all."""
    if torch.compiler.is_compiling():  # torch 2.5 cannot trace the question
        available = device.type != 'meta'
    else:
        available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def sot_matrix(
        x: torch.Tensor,
        y: torch.Tensor,
        distance: str,
        normalize: Optional[str],
        reg: float,
        iters: int,
        tol: Optional[float],
        row_mass: Optional[float],
        mask_diagonal: bool,
        sigmoid: bool,
        max_scale: bool,
) -> torch.Tensor:
    """`self_optimal_transport` without its checks and casts: positional and scriptable, for the attention above."""
    N = x.shape[-2]
    if N == 0:  # nothing has a maximum
        return x @ y.transpose(-2, -1)
    index = torch.arange(N, device=x.device)
    diagonal = index.unsqueeze(-1) == index  # torch.eye is an EyeLike of booleans, which ONNX Runtime lacks

    log_kernel = pairwise_cost(x, y, distance, normalize) / -reg  # (..., N, N)
    if mask_diagonal and N > 1:  # a single point has only itself
        log_kernel = log_kernel.masked_fill(diagonal, -float('inf'))

    # the transform's tol is in units of the cost, the solver's potentials are in units of reg
    spread = largest_cost(distance, normalize) / reg
    log_plan = solve(log_kernel, iters, None if tol is None else tol / reg, row_mass, spread)

    out = log_plan.sigmoid() if sigmoid else log_plan.exp()
    if max_scale:
        out = out / out.amax(dim=(-2, -1), keepdim=True)
    if mask_diagonal:
        out = out.masked_fill(diagonal, 1.)
    return out


def pairwise_cost(x: torch.Tensor, y: torch.Tensor, distance: str, normalize: Optional[str]) -> torch.Tensor:
    """Normalized costs between the rows of x and y, (..., N, D), (..., M, D) -> (..., N, M)."""
    if distance == 'cosine':
        x, y = unit_rows(x), unit_rows(y)
        cost = pairwise_distance(x, y).square() / 2  # 1 - xy for |x| = |y| = 1, which cancels
        cost = cost.masked_fill(cost < negligible_cosine(x), 0.)  # or a normalization would make noise of them
        x_is_zero, y_is_zero = (x == 0).all(-1).unsqueeze(-1), (y == 0).all(-1).unsqueeze(-2)
        cost = cost.masked_fill(x_is_zero | y_is_zero, 1.)
    else:
        cost = pairwise_distance(x, y)
    if normalize is None:
        return cost
    if normalize == 'row':
        largest = cost.amax(dim=-1, keepdim=True)
    else:
        largest = cost.amax(dim=(-2, -1), keepdim=True)
    return cost / largest.masked_fill(largest == 0, 1.)


def negligible_cosine(x: torch.Tensor) -> float:
    """Cosine costs below this are rounding errors of unit vectors in the dtype of x: a few units in the last place."""
    eps = 2. ** -52 if x.dtype == torch.float64 else 2. ** -23
    return 16. * eps * eps


def largest_cost(distance: str, normalize: Optional[str]) -> float:
    """What no cost exceeds, whatever the points; none is below 0."""
    if normalize is not None:
        return 1.
    return 2. if distance == 'cosine' else float('inf')


def pairwise_distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """||x_i - y_j||_2 with exact zeros, (..., N, D), (..., M, D) -> (..., N, M)."""
    # cdist not through a matrix product: |x|^2 + |y|^2 - 2xy cancels, and equal points would not have distance 0
    if torch.jit.is_scripting():
        return torch.cdist(x, y, compute_mode='donot_use_mm_for_euclid_dist')
    elif operators_work():
        if x.shape[:-2] != y.shape[:-2]:  # the operator takes equal ones
            leading = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
            x, y = x.expand(leading + x.shape[-2:]), y.expand(leading + y.shape[-2:])
        return euclidean_distance(x, y)
    elif torch.jit.is_tracing():
        return torch.cdist(x, y, compute_mode='donot_use_mm_for_euclid_dist')
    else:  # ONNX has no cdist, torch.func.jacrev of it is 0, and on a CPU it is slow
        return distance_by_product(x, y)


def unit_rows(x: torch.Tensor) -> torch.Tensor:
    """Rows of x divided by their length. A zero row stays zero and gets no gradient, where F.normalize has 1e12."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / length.masked_fill(length == 0, float('inf'))
