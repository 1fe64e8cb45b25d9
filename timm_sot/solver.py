""" The Sinkhorn solver

Alternating projections onto the row and column marginals of an entropy-regularized transport plan, in the log domain
(Cuturi, 'Sinkhorn Distances', 2013 - https://arxiv.org/abs/1306.0895; log domain as in Peyre & Cuturi, 'Computational
Optimal Transport', 2019, section 4.4 - https://arxiv.org/abs/1803.00567).
"""
import math
import numbers
from typing import Any, Optional, Tuple

import torch
from torch.autograd import forward_ad

from .kernels import sinkhorn as kernels
from .kernels.sinkhorn import sum_columns, sum_rows

__all__ = ['sinkhorn']


def is_exporting() -> bool:
    """Whether torch.export traces, as far as this version of torch can tell.

    torch.compiler.is_exporting, where there is one, answers torch.compile with True in some versions (2.11 is one).
    """
    return getattr(torch.compiler, '_is_exporting_flag', False)


def sinkhorn(
        log_kernel: torch.Tensor,
        *,
        iters: int = 10,
        tol: Optional[float] = None,
        row_mass: Optional[float] = None,
) -> torch.Tensor:
    """Scale a kernel to a transport plan with uniform marginals by Sinkhorn iterations in the log domain.

    With L the log-kernel, r = `row_mass` the mass of every row and c = N r / M the mass of every column, one iteration
    from v = 0 is

        u = log r - logsumexp_j(L + v),    v = log c - logsumexp_i(L + u)

    and the plan is log P = L + u + v. The column sums of P are exact, the row sums converge to r. It is Cuturi's
    'Sinkhorn Distances' (https://arxiv.org/abs/1306.0895) in the log domain. The gradient is that of the iterations
    that ran, not of their limit. The backward pass keeps the log-kernel alone, however many they were; a second
    derivative keeps every step. With `tol`, a call that needs gradients runs the iterations twice: once to find how
    many there are, then that many again.

    Args:
        log_kernel: Log-kernel of shape (..., N, M), -cost / reg in transport. Entries may be -inf (no mass there, zero
            gradient) as long as every row and every column has a finite one. Leading dimensions are independent
            problems.
        iters: Number of iterations, at least 1; with `tol` the most that run.
        tol: None runs exactly `iters` iterations. A number stops after the first iteration in which the mean over all
            problems of sum_i |u_i - previous u_i| (previous u of the first is 0) is below it: this makes the result
            of one problem depend on the others, and on a GPU it synchronizes with the host in every iteration.
        row_mass: Mass of each row of the plan, None for 1 / N (total mass 1).

    Returns:
        Log-plan of shape (..., N, M), in the dtype of `log_kernel`; computed in float32, or float64 for float64.

    Raises:
        ValueError: If an argument is out of its range or `log_kernel` is not a stack of non-empty matrices.
    """
    check_sinkhorn_args(iters, tol, row_mass)
    if log_kernel.ndim < 2 or 0 in log_kernel.shape[-2:]:
        raise ValueError(
            f'log_kernel must have shape (..., N, M) with at least one row and one column, got '
            f'{tuple(log_kernel.shape)}; add a dimension for a single row.')
    if not log_kernel.is_floating_point():
        raise ValueError(f'log_kernel must be floating point, got {log_kernel.dtype}; convert it, e.g. with .float().')
    return solve(log_kernel.to(compute_dtype(log_kernel)), int(iters), tol, row_mass).to(log_kernel.dtype)


def check_sinkhorn_args(
        iters: int,
        tol: Optional[float],
        row_mass: Optional[float] = None,
        least_iters: int = 1,
) -> None:
    """Raise ValueError for settings that no Sinkhorn run can follow."""
    if isinstance(iters, bool) or not isinstance(iters, numbers.Integral) or iters < least_iters:
        raise ValueError(f'iters={iters!r} must be an integer of at least {least_iters}.')
    if tol is not None and not (is_number(tol) and tol >= 0):
        raise ValueError(f'tol={tol!r} must be None (run exactly iters iterations) or a number of at least 0.')
    if row_mass is not None and not (is_number(row_mass) and 0 < row_mass < float('inf')):
        raise ValueError(f'row_mass={row_mass!r} must be a positive finite number, or None for 1 / N.')


def is_number(value: Any) -> bool:
    """Whether `value` can be compared with numbers, which the strings of a command line cannot."""
    return isinstance(value, (numbers.Real, torch.Tensor)) and not isinstance(value, bool)


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype that Sinkhorn arithmetic on `x` runs in: half precisions carry neither the sums nor the logarithms."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def operators_work() -> bool:
    """Whether what is running now can deal with operators of ours: traces, exported programs and ONNX files are to run
    without this package, torch.func cannot differentiate them, and they silently drop the tangents of forward-mode
    derivatives.
    """
    return not (
        torch.jit.is_tracing() or is_exporting() or torch.onnx.is_in_onnx_export()
        or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0)


def solve(
        log_kernel: torch.Tensor,
        iters: int,
        tol: Optional[float],
        row_mass: Optional[float],
        spread: float = float('inf'),
) -> torch.Tensor:
    """`sinkhorn` without its checks and casts: positional and scriptable, for the layers above.

    `spread` is a promise: no two finite entries of a problem's log-kernel are farther apart. A small one lets the
    iterations run on the kernel itself, without exponentials and logarithms.
    """
    if torch.jit.is_scripting():
        return solve_step_by_step(log_kernel, iters, tol, row_mass)
    elif not operators_work() or (tol is not None and torch.compiler.is_compiling()):
        return solve_step_by_step(log_kernel, iters, tol, row_mass)
    else:
        if tol is not None:
            with torch.no_grad():
                u, v, iters = iterate_step_by_step(log_kernel, iters, tol, row_mass)
            if not (torch.is_grad_enabled() and log_kernel.requires_grad):
                return log_kernel + u + v
        return kernels.sinkhorn(log_kernel, iters, row_mass, kernels.scaling_is_safe(spread, log_kernel.dtype))


def solve_step_by_step(
        log_kernel: torch.Tensor,
        iters: int,
        tol: Optional[float],
        row_mass: Optional[float],
) -> torch.Tensor:
    """The iterations as plain operations, for formats that know no operators of ours."""
    u, v, _ = iterate_step_by_step(log_kernel, iters, tol, row_mass)
    return log_kernel + u + v


def iterate_step_by_step(
        log_kernel: torch.Tensor,
        iters: int,
        tol: Optional[float],
        row_mass: Optional[float],
) -> Tuple[torch.Tensor, torch.Tensor, int]:
    """Potentials of the rows (..., N, 1) and of the columns (..., 1, M), and how many iterations they come from."""
    # tensors, not numbers: a logarithm of a number would be a constant of what is traced, and so the shape
    N = torch.full((1,), log_kernel.shape[-2], dtype=log_kernel.dtype, device=log_kernel.device)
    M = torch.full((1,), log_kernel.shape[-1], dtype=log_kernel.dtype, device=log_kernel.device)
    log_r = -N.log() if row_mass is None else torch.full_like(N, math.log(row_mass))
    log_c = log_r + (N.log() - M.log())
    u = torch.zeros_like(log_kernel[..., :1])  # (..., N, 1)
    v = torch.zeros_like(log_kernel[..., :1, :])  # (..., 1, M)
    ran = 0
    for _ in range(iters):
        ran += 1
        u_prev = u
        u = log_r - torch.logsumexp(log_kernel + v, dim=-1, keepdim=True)
        v = log_c - torch.logsumexp(log_kernel + u, dim=-2, keepdim=True)
        if tol is not None:
            if bool((u - u_prev).detach().abs().sum(dim=[-2, -1]).mean() < tol):
                break
    return u, v, ran


def scale_to_shares(kernel: torch.Tensor, log_shares: torch.Tensor, iters: int) -> torch.Tensor:
    """Scale rows and columns of a kernel so that the rows sum to 1, and the columns come near to N times their shares.

    Sinkhorn iterations of the columns first, so that the rows are exact. Plain operations, which keep the kernel and
    vectors for the backward pass; positional and scriptable.

    Args:
        kernel: Positive, (..., N, M), rows of sum 1.
        log_shares: Logarithms of the shares, which sum to 1, (..., 1, M).
        iters: Number of iterations, at least 1.
    """
    # What a scaling vector is multiplied with cancels, so each is a softmax of its logarithm: all sums stay between the
    # least and the largest entry of the kernel, however small a share is.
    a = torch.ones_like(kernel[..., :1]) / kernel.shape[-2]  # (..., N, 1)
    b, sums = log_shares, a  # for TorchScript, which has no loop that surely runs
    for _ in range(iters):
        b = (log_shares - sum_columns(a, kernel).log()).softmax(dim=-1)  # (..., 1, M)
        sums = sum_rows(kernel, b)  # (..., N, 1)
        a = (-sums.log()).softmax(dim=-2)
    return kernel * b / sums
