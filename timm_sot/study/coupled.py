""" SOT attention under a CUDA graph, early stop included

`tol` couples the problems of a batch: all stop in the iteration in which their mean change falls below it. The solver
decides that on the host, which a CUDA graph cannot wait for. Here all iterations are worked out, and the device picks
the one to stop after: same iterates, same gradients. The distances go through matrix products, since torch's backward
of cdist writes N x N x D numbers.

This serves the study alone, for reproducing runs with `tol`; they are few, and small.
"""
import math
from contextlib import contextmanager
from typing import Optional

import torch

from .. import transform

__all__ = ['capturable', 'pairwise_cost', 'solve']


CAPTURED_MIN_REG = 0.02  # exp(-1 / reg) is a normal number in float32 down to 0.012


class Solve(torch.autograd.Function):
    """Sinkhorn iterations in their scaling form, a = r / (K b), b = c / (K^T a) with K = exp(L), and few kernels.

    Rows of K are scaled to a maximum of 1, which a makes good: in float32 this carries all that the log domain carries
    for costs in [0, 1] and reg >= CAPTURED_MIN_REG. What the iterations add to the gradient of L is K times a sum of
    outer products of vectors, which a sweep back collects and one product multiplies out.
    """

    @staticmethod
    def forward(ctx, log_kernel: torch.Tensor, iters: int, tol: Optional[float], log_r: float, log_c: float):
        shift = log_kernel.amax(-1, keepdim=True)  # (P, N, 1)
        kernel = (log_kernel - shift).exp()  # (P, N, M)
        kernel_t = kernel.transpose(-2, -1)
        r, c = kernel.new_full((), math.exp(log_r)), kernel.new_full((), math.exp(log_c))
        b = kernel.new_ones(kernel.shape[0], kernel.shape[2], 1)
        scalings_a, scalings_b = [], [b]
        for _ in range(iters):
            a = r / (kernel @ b)  # (P, N, 1)
            b = c / (kernel_t @ a)  # (P, M, 1)
            scalings_a.append(a)
            scalings_b.append(b)
        scalings_a, scalings_b = torch.stack(scalings_a), torch.stack(scalings_b)  # (T, P, N, 1), (T + 1, P, M, 1)
        u = scalings_a.log() - shift
        last = torch.full((1,), iters - 1, device=kernel.device)  # the iteration whose plan is the result
        if tol is not None:
            change = torch.cat([u[:1], u.diff(dim=0)]).abs().sum(-2).mean((-2, -1))  # (T,)
            last = torch.minimum((change >= tol).long().cumprod(0).sum(0, keepdim=True), last)
        ctx.r, ctx.c = math.exp(log_r), math.exp(log_c)
        ctx.save_for_backward(kernel, scalings_a, scalings_b, last)
        v = scalings_b.index_select(0, last + 1).squeeze(0).log().transpose(-2, -1)
        return log_kernel + u.index_select(0, last).squeeze(0) + v

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        kernel, scalings_a, scalings_b, last = ctx.saved_tensors
        kernel_t = kernel.transpose(-2, -1)
        iters = len(scalings_a)
        # the gradients of u and v come in at the iteration that was the last one
        is_last = (torch.arange(iters, device=last.device) == last).to(grad.dtype).view(-1, 1, 1, 1)
        grad_u = is_last * grad.sum(-1, keepdim=True)  # (T, P, N, 1)
        grad_v = is_last * grad.sum(-2).unsqueeze(-1)  # (T, P, M, 1)
        a_over_r, b_over_c, minus_b = scalings_a / ctx.r, scalings_b[1:] / ctx.c, -scalings_b[:-1]
        rows, columns = [], []
        carried = torch.zeros_like(grad_v[0])
        for t in reversed(range(iters)):
            column = b_over_c[t] * (grad_v[t] + carried)  # through v = log c - logsumexp_i(L + u)
            row = a_over_r[t] * torch.addcmul(grad_u[t], scalings_a[t], kernel @ column, value=-1)
            carried = minus_b[t] * (kernel_t @ row)  # through u = log r - logsumexp_j(L + v_before)
            rows.append(row)
            columns.append(column)
        a, b = scalings_a.flip(0), scalings_b[:-1].flip(0)
        left = torch.cat([*a, *rows], -1)  # (P, N, 2T)
        right = torch.cat([*columns, *b], -1)  # (P, M, 2T)
        return grad - kernel * (left @ right.transpose(-2, -1)), None, None, None, None


def solve(
        log_kernel: torch.Tensor,
        iters: int,
        tol: Optional[float],
        row_mass: Optional[float],
        spread: float = float('inf'),
) -> torch.Tensor:
    """`timm_sot.solver.solve` without a decision of the host's, for costs in [0, 1] and reg >= CAPTURED_MIN_REG.

    For other problems it is the solver itself, with which a step that has `tol` is captured by no graph, and runs
    without one.
    """
    if spread > 1. / CAPTURED_MIN_REG:
        return _solve(log_kernel, iters, tol, row_mass, spread)
    N, M = log_kernel.shape[-2:]
    log_r = -math.log(N) if row_mass is None else math.log(row_mass)
    log_c = log_r + math.log(N) - math.log(M)
    flat = log_kernel.reshape(-1, N, M)
    return Solve.apply(flat, iters, tol, log_r, log_c).reshape(log_kernel.shape)


class Distances(torch.autograd.Function):
    """Euclidean distances through matrix products, and their gradient, 0 where the distance is 0."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, y: torch.Tensor):
        center = y.mean(-2, keepdim=True)  # squared norms cancel less near the origin
        x, y = x - center, y - center
        norms = x.square().sum(-1).unsqueeze(-1) + y.square().sum(-1).unsqueeze(-2)
        squared = norms - 2 * x @ y.transpose(-2, -1)
        equal = squared <= 8 * torch.finfo(x.dtype).eps * norms  # all that rounding leaves
        out = squared.masked_fill(equal, 0.).sqrt()
        ctx.save_for_backward(x, y, out)
        return out

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        x, y, out = ctx.saved_tensors
        pull = torch.where(out > 0, grad / out, 0.)
        grad_x = pull.sum(-1).unsqueeze(-1) * x - pull @ y
        pull_t = pull.transpose(-2, -1)
        grad_y = pull_t.sum(-1).unsqueeze(-1) * y - pull_t @ x
        return grad_x, grad_y


def pairwise_cost(x: torch.Tensor, y: torch.Tensor, distance: str, normalize: Optional[str]) -> torch.Tensor:
    """`timm_sot.transform.pairwise_cost`, Euclidean distances through matrix products."""
    if (distance, normalize) != ('euclidean', 'row'):
        return _pairwise_cost(x, y, distance, normalize)
    cost = Distances.apply(x, y)
    largest = cost.amax(dim=-1, keepdim=True)
    return cost / largest.masked_fill(largest == 0, 1.)


_pairwise_cost, _solve = transform.pairwise_cost, transform.solve


@contextmanager
def capturable():
    """SOT attention that a CUDA graph can hold: inside, the transform's solver and costs are those above."""
    originals = transform.solve, transform.pairwise_cost
    transform.solve, transform.pairwise_cost = solve, pairwise_cost
    try:
        yield
    finally:
        transform.solve, transform.pairwise_cost = originals
