""" SOT attention for short sequences: one Triton program per (batch, head), with every N x N matrix in registers

From q, k, v to the output and back without writing an N x N matrix to memory. A Sinkhorn half-iteration is a product of
the kernel matrix with a vector: the matrix stays in the layout in which the tensor cores left it, the vectors live in
the slices of that layout, so nothing moves but the partial sums of a reduction.

Where float32 carries it, the iterations run in the scaling form a = r / (K b), b = c / (K^T a) with K = exp(L), which
needs no exponential per iteration; for a small `reg`, where K would underflow, in the log domain. The choice depends on
`reg` alone.

The backward pass differentiates the iterations that ran. With a_t, b_t the scaling vectors of iteration t, the gradient
of the log-kernel is that of the plan minus N K * sum_t [a_t (gv_t b_t)^T + (gu_t a_t) b_{t-1}^T], where gu_t, gv_t are
the gradients of log a_t, log b_t: vectors, found in a sweep from the last iteration to the first. Only the scaling
vectors are kept from the forward pass.

The cosine distance is 1 - cos, which cancels where directions are close: to an error of 1e-7 in float32 whatever it is
itself. Row-normalized costs have errors of that divided by the largest of their row.
"""
from typing import Dict, Optional, Tuple

import torch
import triton
import triton.language as tl

from .operands import (
    SCALING_MIN_REG,
    dropout_numbers,
    empty_gradients,
    empty_heads,
    matched_points,
    unit_stride,
)

__all__ = ['empty_saved', 'sot_attention_forward', 'sot_attention_backward']

LOWEST_RANDOM = -2 ** 31  # the random numbers are signed

LOG2_E = tl.constexpr(1.4426950408889634)

# What rounding leaves of the squared distance of equal rows, as a part of their squared norms: that of the sums, and of
# float32 in tf32x3 the products of what is below tf32. Rows that differ by less count as equal; a row of such
# remainders alone would be divided by the largest of them.
NEGLIGIBLE = tl.constexpr(4e-7)
# Of the cosine also what a GPU's roots and quotients, which are approximate, leave of 1 for equal rows: some 8e-7 by
# the errors that PTX states for them.
NEGLIGIBLE_COSINE = tl.constexpr(1.2e-6)
# For each channel, what tensor cores may cut off a product, where sums round: an estimate, 4e-7 to 8e-7 for 128 of
# them, not measured. Squares that come from the same product do not differ by it.
CUT_OFF = tl.constexpr(1e-8)


@triton.jit
def _load(ptr, stride_n, stride_d, N, D, EVEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """(N, D) from memory, padded with zeros to (BLOCK_N, BLOCK_D); EVEN says that there is no padding."""
    n = tl.arange(0, BLOCK_N)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    if EVEN:
        return tl.load(ptr + n * stride_n + d * stride_d)
    else:
        return tl.load(ptr + n * stride_n + d * stride_d, mask=(n < N) & (d < D), other=0.)


@triton.jit
def _store(ptr, x, stride_n, stride_d, N, D, EVEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    n = tl.arange(0, BLOCK_N)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    if EVEN:
        tl.store(ptr + n * stride_n + d * stride_d, x.to(ptr.dtype.element_ty))
    else:
        tl.store(ptr + n * stride_n + d * stride_d, x.to(ptr.dtype.element_ty), mask=(n < N) & (d < D))


@triton.jit
def _center(x, y, N):
    """Move the origin to the mean of y: distances are differences of squared norms, which cancel far from it."""
    mean = tl.sum(y, 0)[None, :] / N
    return x - mean, y - mean


@triton.jit
def _costs(
        x,
        y,
        N,
        SELF: tl.constexpr,
        COSINE: tl.constexpr,
        PRECISION: tl.constexpr,
        EVEN: tl.constexpr,
        BLOCK_N: tl.constexpr,
):
    """Distances of the rows of x and y, 0 in the padding, and the squared norms of the rows of x and of y."""
    i = tl.arange(0, BLOCK_N)[:, None]
    j = tl.arange(0, BLOCK_N)[None, :]
    gram = tl.dot(x, tl.trans(y), input_precision=PRECISION)
    cut_off: tl.constexpr = 0. if SELF else CUT_OFF * x.shape[1]
    if SELF:
        # from the same product, so that equal rows are at distance 0 to the last bit
        squares = tl.where(i == j, gram, 0.)
        xx = tl.sum(squares, 1)
        yy = tl.sum(squares, 0)
    else:
        xx = tl.sum(x.to(tl.float32) * x.to(tl.float32), 1)
        yy = tl.sum(y.to(tl.float32) * y.to(tl.float32), 1)
    if COSINE:
        costs = 1. - gram * _inverse(tl.sqrt(xx))[:, None] * _inverse(tl.sqrt(yy))[None, :]
        costs = tl.where(costs < NEGLIGIBLE_COSINE + cut_off, 0., costs)
    else:
        norms = xx[:, None] + yy[None, :]
        squares = norms - 2. * gram
        if not SELF:
            squares = tl.where(squares < norms * (NEGLIGIBLE + cut_off), 0., squares)
        costs = tl.sqrt(_not_negative(squares))
    if not EVEN:
        costs = tl.where((i < N) & (j < N), costs, 0.)
    return costs, xx, yy


@triton.jit
def _not_negative(x):
    """What rounding made negative as 0. Here NaN would end: a maximum without the option is the other number."""
    return tl.maximum(x, 0., propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _inverse(x):
    """1 / x, and 0 for 0."""
    return tl.where(x == 0., 0., 1. / tl.where(x == 0., 1., x))


@triton.jit
def _reciprocal(x):
    """1 / x of positive numbers, to 3e-7: one approximation and a product, where a division is eight instructions."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def _log_kernel(costs, inv_max, N, reg, EVEN: tl.constexpr, BLOCK_N: tl.constexpr):
    """Log-kernel in base 2 with masked diagonal.

    The diagonal is open in the padding, so that padded rows and columns exchange mass among themselves and no sum is 0
    (the same for N = 1, where the result's diagonal is all there is).
    """
    i = tl.arange(0, BLOCK_N)[:, None]
    j = tl.arange(0, BLOCK_N)[None, :]
    log_kernel = costs * (inv_max * (-LOG2_E / reg))[:, None]
    if EVEN:
        return tl.where(i == j, float('-inf'), log_kernel)
    else:
        masked = tl.where((i == j) & ((i >= N) | (N == 1)), 0., float('-inf'))
        return tl.where((i < N) & (j < N) & (i != j), log_kernel, masked)


@triton.jit
def _log2_sum_exp2(x, axis: tl.constexpr):
    largest = tl.max(x, axis)
    return largest + tl.log2(tl.sum(tl.exp2(x - tl.expand_dims(largest, axis)), axis))


@triton.jit
def _plan(kernel, a, b, LOG: tl.constexpr, BLOCK_N: tl.constexpr):
    """Plan off the diagonal, 0 on it and in the padding."""
    i = tl.arange(0, BLOCK_N)[:, None]
    j = tl.arange(0, BLOCK_N)[None, :]
    if LOG:
        plan = tl.exp2(kernel + a[:, None] + b[None, :])
    else:
        plan = kernel * a[:, None] * b[None, :]
    return tl.where(i == j, 0., plan)


@triton.jit
def _weights(scaled, N, scale, SOFTMAX: tl.constexpr, EVEN: tl.constexpr, BLOCK_N: tl.constexpr):
    """Attention weights from the scaled matrix (without its unit diagonal), 0 in the padded columns."""
    i = tl.arange(0, BLOCK_N)[:, None]
    j = tl.arange(0, BLOCK_N)[None, :]
    scores = tl.where(i == j, 1., scaled)
    if SOFTMAX:
        # the diagonal is the largest entry of its row: subtracting 1 is the usual subtraction of the maximum
        weights = tl.exp2((scores - 1.) * (scale * LOG2_E))
        if not EVEN:
            weights = tl.where(j < N, weights, 0.)
        return weights * _reciprocal(tl.sum(weights, 1))[:, None]
    else:
        return scores * scale


@triton.jit
def _signed(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _truncated(x):
    """float32 without the bits that tf32 has not: what sums take is then what the tensor cores multiply."""
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def _dropout_factor(seed_ptr, problem, drop_below, keep_factor, BLOCK_N: tl.constexpr):
    """0 or `keep_factor` for each weight: a function of seed, problem, row and column alone."""
    seed = tl.load(seed_ptr)
    i = tl.arange(0, BLOCK_N)[:, None]
    j = tl.arange(0, BLOCK_N // 4)[None, :]
    zero = tl.zeros([BLOCK_N, BLOCK_N // 4], tl.int32)
    r0, r1, r2, r3 = tl.philox(seed, zero + i, zero + j, zero + problem, zero)
    keep = tl.join(
        tl.join(_signed(r0) >= drop_below, _signed(r1) >= drop_below),
        tl.join(_signed(r2) >= drop_below, _signed(r3) >= drop_below))
    return tl.where(tl.reshape(keep, [BLOCK_N, BLOCK_N]), keep_factor, 0.)


@triton.jit(do_not_specialize=['N', 'iters', 'drop_below'])
def _forward_kernel(
        q_ptr, k_ptr, v_ptr, out_ptr, scalings_ptr, seed_ptr,
        stride_qb, stride_qh, stride_qn,
        stride_kb, stride_kh, stride_kn, stride_kd,
        stride_vb, stride_vh, stride_vn,
        H, N, D, iters, reg, scale, drop_below, keep_factor,
        SELF: tl.constexpr,
        COSINE: tl.constexpr,
        SOFTMAX: tl.constexpr,
        DROPOUT: tl.constexpr,
        LOG: tl.constexpr,
        PRECISION: tl.constexpr,
        EVEN: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_D: tl.constexpr,
):
    problem = tl.program_id(0)
    batch = (problem // H).to(tl.int64)
    head = (problem % H).to(tl.int64)
    n = tl.arange(0, BLOCK_N)

    x = _load(q_ptr + batch * stride_qb + head * stride_qh, stride_qn, 1, N, D, EVEN, BLOCK_N, BLOCK_D)
    if SELF:
        y = x
    else:
        y = _load(k_ptr + batch * stride_kb + head * stride_kh, stride_kn, stride_kd, N, D, EVEN, BLOCK_N, BLOCK_D)
    if x.dtype == tl.float32 and not COSINE:
        x, y = _center(x, y, N)
    costs, _, _ = _costs(x, y, N, SELF, COSINE, PRECISION, EVEN, BLOCK_N)
    kernel = _log_kernel(costs, _inverse(tl.max(costs, 1)), N, reg, EVEN, BLOCK_N)

    scalings_ptr += problem.to(tl.int64) * iters * 2 * BLOCK_N
    if LOG:
        log2_mass = -tl.log2(N.to(tl.float32))
        a = tl.zeros([BLOCK_N], tl.float32)
        b = tl.zeros([BLOCK_N], tl.float32)
        for _ in range(iters):
            a = log2_mass - _log2_sum_exp2(kernel + b[None, :], 1)
            b = log2_mass - _log2_sum_exp2(kernel + a[:, None], 0)
            tl.store(scalings_ptr + n, a)
            tl.store(scalings_ptr + BLOCK_N + n, b)
            scalings_ptr += 2 * BLOCK_N
    else:
        kernel = tl.exp2(kernel)
        mass = 1. / N
        a = tl.zeros([BLOCK_N], tl.float32)
        b = tl.full([BLOCK_N], 1., tl.float32)
        for _ in range(iters):
            a = mass * _reciprocal(tl.sum(kernel * b[None, :], 1))
            b = mass * _reciprocal(tl.sum(kernel * a[:, None], 0))
            tl.store(scalings_ptr + n, a)
            tl.store(scalings_ptr + BLOCK_N + n, b)
            scalings_ptr += 2 * BLOCK_N

    plan = _plan(kernel, a, b, LOG, BLOCK_N)
    sot = plan * _reciprocal(1. + plan)
    weights = _weights(sot * _inverse(tl.max(tl.max(sot, 1), 0)), N, scale, SOFTMAX, EVEN, BLOCK_N)
    if DROPOUT:
        weights *= _dropout_factor(seed_ptr, problem, drop_below, keep_factor, BLOCK_N)
    v = _load(v_ptr + batch * stride_vb + head * stride_vh, stride_vn, 1, N, D, EVEN, BLOCK_N, BLOCK_D)
    out = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    _store(out_ptr + (batch * N * H + head) * D, out, H * D, 1, N, D, EVEN, BLOCK_N, BLOCK_D)


@triton.jit(do_not_specialize=['N', 'iters', 'drop_below'])
def _backward_kernel(
        q_ptr, k_ptr, v_ptr, grad_out_ptr, scalings_ptr, seed_ptr, grad_q_ptr, grad_k_ptr, grad_v_ptr,
        stride_qb, stride_qh, stride_qn,
        stride_kb, stride_kh, stride_kn, stride_kd,
        stride_vb, stride_vh, stride_vn,
        stride_ob, stride_oh, stride_on,
        stride_gn, stride_gd,
        H, N, D, iters, reg, scale, drop_below, keep_factor,
        SELF: tl.constexpr,
        COSINE: tl.constexpr,
        SOFTMAX: tl.constexpr,
        DROPOUT: tl.constexpr,
        LOG: tl.constexpr,
        PRECISION: tl.constexpr,
        EVEN: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_D: tl.constexpr,
):
    problem = tl.program_id(0)
    batch = (problem // H).to(tl.int64)
    head = (problem % H).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    q_ptr += batch * stride_qb + head * stride_qh
    k_ptr += batch * stride_kb + head * stride_kh
    grad_offset = (batch * N * H + head) * D

    # the matrices of the forward pass, from its last scaling vectors
    x = _load(q_ptr, stride_qn, 1, N, D, EVEN, BLOCK_N, BLOCK_D)
    if SELF:
        y = x
    else:
        y = _load(k_ptr, stride_kn, stride_kd, N, D, EVEN, BLOCK_N, BLOCK_D)
    if x.dtype == tl.float32 and not COSINE:
        x, y = _center(x, y, N)
    costs, _, _ = _costs(x, y, N, SELF, COSINE, PRECISION, EVEN, BLOCK_N)
    kernel = _log_kernel(costs, _inverse(tl.max(costs, 1)), N, reg, EVEN, BLOCK_N)
    if not LOG:
        kernel = tl.exp2(kernel)
    scalings_ptr += (problem.to(tl.int64) + 1) * iters * 2 * BLOCK_N - 2 * BLOCK_N
    a = tl.load(scalings_ptr + n)
    b = tl.load(scalings_ptr + BLOCK_N + n)
    plan = _plan(kernel, a, b, LOG, BLOCK_N)
    sot = plan * _reciprocal(1. + plan)
    largest = tl.max(tl.max(sot, 1), 0)
    inv_largest = _inverse(largest)
    weights = _weights(sot * inv_largest, N, scale, SOFTMAX, EVEN, BLOCK_N)

    # out = dropout(weights) v
    grad_out = _load(
        grad_out_ptr + batch * stride_ob + head * stride_oh, stride_on, 1, N, D, EVEN, BLOCK_N, BLOCK_D)
    dropped = weights
    if DROPOUT:
        factor = _dropout_factor(seed_ptr, problem, drop_below, keep_factor, BLOCK_N)
        dropped = weights * factor
    grad_v = tl.dot(tl.trans(dropped.to(grad_out.dtype)), grad_out, input_precision=PRECISION)
    _store(grad_v_ptr + grad_offset, grad_v, H * D, 1, N, D, EVEN, BLOCK_N, BLOCK_D)
    v = _load(v_ptr + batch * stride_vb + head * stride_vh, stride_vn, 1, N, D, EVEN, BLOCK_N, BLOCK_D)
    grad = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
    if DROPOUT:
        grad *= factor

    # weights = softmax(scale * sot / largest)
    if SOFTMAX:
        grad = weights * (grad - tl.sum(weights * grad, 1)[:, None])
    grad *= scale * inv_largest
    is_largest = sot == largest
    grad_largest = -tl.sum(tl.sum(grad * sot, 1), 0) * inv_largest
    grad += tl.where(is_largest, grad_largest / tl.sum(tl.sum(is_largest.to(tl.float32), 1), 0), 0.)

    # sot = sigmoid(log plan); 0 on the diagonal and in the padding
    if LOG:
        grad *= sot * (1. - sot)
        by_kernel = grad
    else:
        # divided by the kernel, which all that the iterations add is multiplied with
        by_kernel = a[:, None] * b[None, :]
        rest = _reciprocal(1. + kernel * by_kernel)
        by_kernel *= grad * (rest * rest)
        grad = kernel * by_kernel
    grad_u = tl.sum(grad, 1)
    grad_v_potential = tl.sum(grad, 0)

    # the iterations backwards
    total = N.to(tl.float32)
    if not LOG:
        grad_v_potential *= total
    for t in range(iters):
        scalings_ptr -= 2 * BLOCK_N
        a_before = tl.load(scalings_ptr + n, mask=t + 1 < iters, other=1.)
        b_before = tl.load(scalings_ptr + BLOCK_N + n, mask=t + 1 < iters, other=0. if LOG else 1.)
        if LOG:
            column_step = tl.exp2(kernel + a[:, None] + b[None, :]) * (total * grad_v_potential)[None, :]
            grad -= column_step
            grad_u -= tl.sum(column_step, 1)
            row_step = tl.exp2(kernel + a[:, None] + b_before[None, :]) * (total * grad_u)[:, None]
            grad -= row_step
            grad_v_potential = -tl.sum(row_step, 0)
        else:
            gb = grad_v_potential * b  # the potential's gradient, times N
            grad_u -= a * tl.sum(kernel * gb[None, :], 1)
            ga = total * grad_u * a
            grad_v_potential = -b_before * tl.sum(kernel * (total * ga)[:, None], 0)
            by_kernel -= a[:, None] * gb[None, :]
            by_kernel -= ga[:, None] * b_before[None, :]
        grad_u = tl.zeros_like(grad_u)
        a = a_before
        b = b_before

    if not LOG:
        grad = kernel * by_kernel

    # log-kernel = -cost / (row maximum * reg); the tiles are read again rather than kept in registers all the way
    x = _load(q_ptr, stride_qn, 1, N, D, EVEN, BLOCK_N, BLOCK_D)
    if SELF:
        y = x
    else:
        y = _load(k_ptr, stride_kn, stride_kd, N, D, EVEN, BLOCK_N, BLOCK_D)
    if x.dtype == tl.float32 and not COSINE:
        x, y = _center(x, y, N)
    costs, xx, yy = _costs(x, y, N, SELF, COSINE, PRECISION, EVEN, BLOCK_N)
    row_max = tl.max(costs, 1)
    inv_max = _inverse(row_max)
    grad *= (-1. / reg) * inv_max[:, None]
    is_max = costs == row_max[:, None]
    if not EVEN:
        is_max &= n[None, :] < N
    grad_max = -tl.sum(grad * costs, 1) * inv_max / tl.maximum(tl.sum(is_max.to(tl.float32), 1), 1.)
    grad += tl.where(is_max, grad_max[:, None], 0.)

    # costs = distances: grad_x_i = pull_i x_i - sum_j grad_ij y_j, and the same for y
    if COSINE:
        inv_x = _inverse(tl.sqrt(xx))
        inv_y = _inverse(tl.sqrt(yy))
        grad = grad * inv_x[:, None] * inv_y[None, :]
    else:
        grad *= tl.where(costs == 0., 0., _reciprocal(costs))
    if x.dtype == tl.float16:
        # 1 / distance leaves the range of float16: tensor cores in tf32, which holds float16 exactly
        x = x.to(tl.float32)
        y = y.to(tl.float32)
        grad = _truncated(grad)
        rounded = grad
    else:
        rounded = grad.to(x.dtype)
    # of the rounded entries: what is subtracted below cancels term by term, to differences x_i - y_j
    if COSINE:
        along = rounded.to(tl.float32) * (1. - costs)
        pull_x = inv_x * tl.sum(along * _inverse(inv_y)[None, :], 1)
        pull_y = inv_y * tl.sum(along * _inverse(inv_x)[:, None], 0)
    else:
        pull_x = tl.sum(rounded.to(tl.float32), 1)
        pull_y = tl.sum(rounded.to(tl.float32), 0)
    grad_x = pull_x[:, None] * x.to(tl.float32) - tl.dot(rounded, y, input_precision=PRECISION)
    if not SELF:
        _store(grad_q_ptr + grad_offset, grad_x, H * D, 1, N, D, EVEN, BLOCK_N, BLOCK_D)
    grad_y = pull_y[:, None] * y.to(tl.float32) - tl.dot(tl.trans(rounded), x, input_precision=PRECISION)
    if SELF:
        _store(grad_q_ptr + grad_offset, grad_x + grad_y, H * D, 1, N, D, EVEN, BLOCK_N, BLOCK_D)
    else:
        _store(grad_k_ptr + grad_offset, grad_y, stride_gn, stride_gd, N, D, EVEN, BLOCK_N, BLOCK_D)


def _forward_config(block_n: int, block_d: int, dtype: torch.dtype) -> Dict[str, int]:
    """Launch options, the fastest on an H200. The fewer warps hold a matrix, the fewer partial sums they exchange."""
    if dtype == torch.float32:
        return dict(num_warps={16: 1, 32: 1, 64: 4, 128: 8}[block_n], num_stages=1)
    return dict(num_warps={16: 1, 32: 1, 64: 1, 128: 4}[block_n], num_stages=1)


def _backward_config(block_n: int, block_d: int, dtype: torch.dtype) -> Dict[str, int]:
    """Launch options, the fastest on an H200."""
    options = dict(num_warps={16: 2, 32: 2, 64: 4, 128: 8}[block_n], num_stages=1)
    if block_n == 64 and block_d <= 64 and dtype != torch.float32:
        options['maxnreg'] = 168  # a few values go to memory, but three programs run at a time, not two
    return options


def _block_size(n: int) -> int:
    """The power of 2 from n on, but 16 at least, the tensor cores' smallest; by comparisons, as n may be symbolic."""
    block = 16
    while block < n:
        block *= 2
    return block


def _tiles(q: torch.Tensor, dropout_p: float) -> Dict[str, object]:
    """Compile-time arguments that depend on the tensors and on dropout."""
    N, D = q.shape[-2:]
    return dict(
        DROPOUT=dropout_p > 0.,
        PRECISION='tf32x3' if q.dtype == torch.float32 else 'tf32',
        EVEN=N == _block_size(N) and D == _block_size(D),
        BLOCK_N=_block_size(N),
        BLOCK_D=_block_size(D),
    )


def _specialize(
        q: torch.Tensor,
        operands: str,
        softmax: bool,
        reg: float,
        dropout_p: float,
        distance: str,
) -> Dict[str, object]:
    """Compile-time arguments of both kernels."""
    return dict(
        SELF=operands == 'q',
        COSINE=distance == 'cosine',
        SOFTMAX=softmax,
        LOG=reg < SCALING_MIN_REG,
        **_tiles(q, dropout_p),
    )


def empty_saved(q: torch.Tensor, iters: int) -> torch.Tensor:
    """Room for two vectors of each iteration, which the forward pass keeps."""
    B, H, N, _ = q.shape
    return q.new_empty(B * H, iters, 2, _block_size(N), dtype=torch.float32)


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
    """SOT attention of queries, keys and values, each (B, H, N, D) with N <= 128 and any strides.

    Args:
        q: Queries.
        k: Keys; not read for operands 'q'.
        v: Values.
        operands: What the queries are matched with: 'q' themselves, 'qk' the keys, 'qkt' the columns of the keys
            (N == D).
        softmax: Put the scaled matrix through a softmax over the keys.
        reg: Entropy regularization.
        iters: Sinkhorn iterations.
        scale: Factor on the SOT matrix, usually D^-1/2.
        dropout_p: Dropout probability of the attention weights.
        seed: One int64 on the device, needed where `dropout_p` is not 0.
        distance: 'euclidean' or 'cosine'.

    Returns:
        Output (B, H, N, D), and the scaling vectors of all iterations for the backward pass, (B * H, iters, 2, padded
        N) in float32: their logarithms to base 2 where reg < SCALING_MIN_REG.
    """
    B, H, N, D = q.shape
    options = _specialize(q, operands, softmax, reg, dropout_p, distance)
    q, v = unit_stride(q), unit_stride(v)
    k = matched_points(q, k, operands)
    out, scalings = empty_heads(q), empty_saved(q, iters)
    config = _forward_config(options['BLOCK_N'], options['BLOCK_D'], q.dtype)
    _forward_kernel[(B * H,)](
        q, k, v, out, scalings, scalings if seed is None else seed,
        *q.stride()[:3], *k.stride(), *v.stride()[:3],
        H, N, D, iters, reg, scale, *dropout_numbers(dropout_p, LOWEST_RANDOM),
        **options, **config,
    )
    return out, scalings


def sot_attention_backward(
        grad_out: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scalings: torch.Tensor,
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
    B, H, N, D = q.shape
    options = _specialize(q, operands, softmax, reg, dropout_p, distance)
    q, v, grad_out = unit_stride(q), unit_stride(v), unit_stride(grad_out)
    k = matched_points(q, k, operands)
    grad_q, grad_k, grad_v = empty_gradients(q, operands)
    # of the columns of k, its gradient is written as the kernel reads k
    grad_k_strides = (1, H * D) if operands == 'qkt' else (H * D, 1)
    config = _backward_config(options['BLOCK_N'], options['BLOCK_D'], q.dtype)
    _backward_kernel[(B * H,)](
        q, k, v, grad_out, scalings, scalings if seed is None else seed, grad_q, grad_k, grad_v,
        *q.stride()[:3], *k.stride(), *v.stride()[:3], *grad_out.stride()[:3], *grad_k_strides,
        H, N, D, iters, reg, scale, *dropout_numbers(dropout_p, LOWEST_RANDOM),
        **options, **config,
    )
    return grad_q, grad_k, grad_v
