""" The Sinkhorn iterations as one operator with a backward pass of its own

In plain torch for any device, and where they pay in the loops of `cpu_loops`, which numba compiles: these take one
problem after another, in cache, and find out for each whether the scaling form carries it.

Kept for the backward pass is the log-kernel alone, however many iterations: the vectors are found again. A second
derivative goes through the iterations as plain operations and keeps every step. With C_t the
plan after iteration t with its columns scaled to sum 1, R_t the one after its row step with its rows scaled to sum 1,
and gu_t, gv_t the gradients of the potentials u_t, v_t, from the last iteration to the first

    gu_t -= C_t gv_t,    gv_{t-1} = -R_t^T gu_t,    gradient of the log-kernel -= C_t gv_t^T + gu_t R_t (row by row)

In the scaling form C_t = a_t K b_t / c and R_t = a_t K b_{t-1} / r, so that the last part is K times a sum of outer
products of vectors, which is one product of matrices.
"""
import math
from typing import List, Optional, Tuple

import torch

from .operands import SCALING_MIN_REG, WITHOUT_FLOAT64
from .operators import check_one_device, differentiate, operator, register_fake
from .threads import loops_work, run_in_threads

__all__ = ['loops_pay', 'product', 'scaling_is_safe', 'sinkhorn', 'sum_columns', 'sum_rows']

TORCH_GRAIN = 2 ** 15  # elements from which on torch shares out an operation among threads


def scaling_is_safe(spread: float, dtype: torch.dtype) -> bool:
    """Whether exp(log-kernel) and its scaling vectors stay in the range of a dtype.

    Args:
        spread: Largest difference between two finite entries of the log-kernel. The logarithms of the scaling vectors
            span a few times as much, with masked entries.
        dtype: float32, which ends at exp(88), or float64, which ends at exp(709).
    """
    return spread <= (160. if dtype == torch.float64 else 1 / SCALING_MIN_REG)


def loops_pay(problems: torch.Tensor, scaling: bool) -> bool:
    """Whether the compiled loops take (P, N, M) log-kernels, and not plain torch: the one rule.

    On one thread, from N = 16 to 4096, they need 3 % to 25 % of the time of plain torch on logarithms and 20 % to 85 %
    of that of its scaling form. But a problem stays on one thread, where plain torch may use all.
    """
    if problems.device.type != 'cpu' or problems.dtype != torch.float32 or not loops_work():
        return False
    threads_of_a_problem = 1 if problems.numel() <= TORCH_GRAIN else torch.get_num_threads() / max(len(problems), 1)
    return threads_of_a_problem <= (2 if scaling else 8)


@operator
def sinkhorn(log_kernel: torch.Tensor, iters: int, row_mass: Optional[float], scaling: bool) -> torch.Tensor:
    """Log-kernel (..., N, M) to log-plan.

    Args:
        log_kernel: In float32 or float64.
        iters: Number of iterations.
        row_mass: Mass of each row, None for 1 / N. Its logarithm is taken in here, where N is a number: compilers of
            dynamic shapes would make it a constant.
        scaling: Iterate a = r / (K b), b = c / (K^T a) with K = exp(log_kernel), see `scaling_is_safe`; else on
            logarithms. The compiled loops do not rely on it.
    """
    problems = _problems(log_kernel)
    log_r, log_c = _log_masses(log_kernel, row_mass)
    if loops_pay(problems, scaling):
        return _run_loops('sinkhorn_forward', 2, (problems,), iters, log_r, log_c).view(log_kernel.shape)
    with torch.autocast(log_kernel.device.type, enabled=False):
        rows, columns = _iterate(problems.exp() if scaling else problems, iters, log_r, log_c, scaling)
        u, v = rows[-1], columns[-1]
        if scaling:
            u, v = u.log(), v.log()
        return (problems + u).add_(v).view(log_kernel.shape)


@register_fake(sinkhorn)
def _(log_kernel, iters, row_mass, scaling):
    return log_kernel.new_empty(log_kernel.shape)


@operator
def sinkhorn_backward(
        grad: torch.Tensor,
        log_kernel: torch.Tensor,
        iters: int,
        row_mass: Optional[float],
        scaling: bool,
) -> torch.Tensor:
    """Gradient of the log-plan to that of the log-kernel."""
    problems, grad = _problems(log_kernel), _problems(grad)
    log_r, log_c = _log_masses(log_kernel, row_mass)
    if loops_pay(problems, scaling):
        return _run_loops('sinkhorn_backward', 6, (grad, problems), iters, log_r, log_c).view(log_kernel.shape)
    with torch.autocast(log_kernel.device.type, enabled=False):
        if scaling:
            out = _backward(grad, problems.exp(), iters, log_r, log_c)
        else:
            out = _backward_log(grad, problems, iters, log_r, log_c)
        return out.view(log_kernel.shape)


@register_fake(sinkhorn_backward)
def _(grad, log_kernel, iters, row_mass, scaling):
    check_one_device(grad, log_kernel)
    return log_kernel.new_empty(log_kernel.shape)


def _setup_context(ctx, inputs, output):
    log_kernel, *ctx.settings = inputs
    ctx.save_for_backward(log_kernel)


def _differentiate(ctx, grad):
    log_kernel, = ctx.saved_tensors
    return sinkhorn_backward(grad, log_kernel, *ctx.settings), None, None, None


def _setup_context_again(ctx, inputs, output):
    grad, log_kernel, *ctx.settings = inputs
    ctx.save_for_backward(grad, log_kernel)


def _differentiate_again(ctx, grad_grad):
    """Derivatives of the gradient, by differentiating the iterations twice as plain operations."""
    iters, row_mass, _ = ctx.settings
    log_r, log_c = _log_masses(grad_grad, row_mass)

    def plan(log_kernel):
        problems = _problems(log_kernel)
        rows, columns = _iterate(problems, iters, log_r, log_c, False)
        return (problems + rows[-1] + columns[-1]).view(log_kernel.shape)

    def gradient(grad, log_kernel):
        _, vjp = torch.func.vjp(plan, log_kernel)
        return vjp(grad)[0]

    _, vjp = torch.func.vjp(gradient, *ctx.saved_tensors)
    return *vjp(grad_grad), None, None, None


differentiate(sinkhorn, _differentiate, _setup_context)
differentiate(sinkhorn_backward, _differentiate_again, _setup_context_again)


def _log_masses(log_kernel: torch.Tensor, row_mass: Optional[float]) -> Tuple[float, float]:
    """Logarithms of the mass of a row and of a column."""
    N, M = log_kernel.shape[-2:]
    log_r = math.log(row_mass) if row_mass is not None else -math.log(N)
    return log_r, log_r + math.log(N) - math.log(M)


def _problems(x: torch.Tensor) -> torch.Tensor:
    N, M = x.shape[-2:]
    return x.reshape(x.numel() // (N * M), N, M).contiguous()


def _run_loops(
        name: str,
        products: int,
        tensors: Tuple[torch.Tensor, ...],
        iters: int,
        log_r: float,
        log_c: float,
) -> torch.Tensor:
    """(P, N, M) from tensors of that shape, by a function of `cpu_loops` with so many products K x per iteration."""
    from . import cpu_loops

    out = torch.empty_like(tensors[0])
    P, N, M = out.shape
    run_in_threads(
        getattr(cpu_loops, name), P, products * N * M * iters,
        *(x.detach().numpy() for x in tensors), out.numpy(), iters, log_r, log_c)
    return out


# Products of float32. Elsewhere than on a CPU they might be rounded to TensorFloat-32, as timm's train.py lets them be:
# there those with one column or row are sums, and the others in float64 where there is one.

def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b, (..., N, K), (..., K, M) -> (..., N, M)."""
    if a.device.type == 'cpu' or a.device.type in WITHOUT_FLOAT64:
        return a @ b
    return (a.double() @ b.double()).to(a.dtype)


def sum_rows(kernel: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """K b, (..., N, M), (..., 1, M) -> (..., N, 1)."""
    if torch.jit.is_scripting():  # autocast, which TorchScript cannot turn off, leaves sums in float32
        return (kernel * b).sum(dim=-1, keepdim=True)
    elif kernel.device.type == 'cpu' and not torch.jit.is_tracing():
        return kernel @ b.transpose(-2, -1)
    else:
        return (kernel * b).sum(dim=-1, keepdim=True)


def sum_columns(a: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """a^T K, (..., N, 1), (..., N, M) -> (..., 1, M)."""
    if torch.jit.is_scripting():
        return (a * kernel).sum(dim=-2, keepdim=True)
    elif kernel.device.type == 'cpu' and not torch.jit.is_tracing():
        return a.transpose(-2, -1) @ kernel
    else:
        return (a * kernel).sum(dim=-2, keepdim=True)


def _iterate(
        kernel: torch.Tensor,
        iters: int,
        log_r: float,
        log_c: float,
        scaling: bool,
) -> Tuple[List[torch.Tensor], List[torch.Tensor]]:
    """Scaling vectors of the kernel, or potentials of the log-kernel: rows' (P, N, 1) after each iteration, columns'
    (P, 1, M) before the first and after each.
    """
    P, N, M = kernel.shape
    rows, columns = [], [kernel.new_full((P, 1, M), 1. if scaling else 0.)]
    for _ in range(iters):
        if scaling:
            rows.append(math.exp(log_r) / sum_rows(kernel, columns[-1]))
            columns.append(math.exp(log_c) / sum_columns(rows[-1], kernel))
        else:
            rows.append(log_r - torch.logsumexp(kernel + columns[-1], dim=2, keepdim=True))
            columns.append(log_c - torch.logsumexp(kernel + rows[-1], dim=1, keepdim=True))
    return rows, columns


def _backward(
        grad: torch.Tensor,
        kernel: torch.Tensor,
        iters: int,
        log_r: float,
        log_c: float,
) -> torch.Tensor:
    r, c = math.exp(log_r), math.exp(log_c)
    rows, columns = _iterate(kernel, iters, log_r, log_c, True)
    grad_u, grad_v = grad.sum(dim=2, keepdim=True), grad.sum(dim=1, keepdim=True)
    row_factors, column_factors = [], []
    for t in reversed(range(iters)):
        a, b, b_before = rows[t], columns[t + 1], columns[t]
        column_factors.append(grad_v * b / c)
        row_factors.append(a)
        grad_u = grad_u - a * sum_rows(kernel, column_factors[-1])
        row_factors.append(grad_u * a / r)
        column_factors.append(b_before)
        grad_v = -b_before * sum_columns(row_factors[-1], kernel)
        grad_u = 0.
    sums = product(torch.cat(row_factors, dim=2), torch.cat(column_factors, dim=1))
    return torch.addcmul(grad, sums, kernel, value=-1.)


def _backward_log(
        grad: torch.Tensor,
        log_kernel: torch.Tensor,
        iters: int,
        log_r: float,
        log_c: float,
) -> torch.Tensor:
    us, vs = _iterate(log_kernel, iters, log_r, log_c, False)
    grad_u, grad_v = grad.sum(dim=2, keepdim=True), grad.sum(dim=1, keepdim=True)
    out = grad.clone()
    for t in reversed(range(iters)):
        rows = log_kernel + us[t]
        step = (rows + (vs[t + 1] - log_c)).exp_().mul_(grad_v)
        out -= step
        grad_u = grad_u - step.sum(dim=2, keepdim=True)
        step = rows.add_(vs[t] - log_r).exp_().mul_(grad_u)
        out -= step
        grad_v = -step.sum(dim=1, keepdim=True)
        grad_u = 0.
    return out
