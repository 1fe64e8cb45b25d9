""" SOT attention for sequences of middling length: one Triton program per (batch, head), which goes through the N x N
matrices in strips of rows

A strip has all columns, so one pass over the strips is one Sinkhorn iteration: the scaling of its rows from that of the
columns, and at once what these rows add to the sums of the columns. A strip is made anew of queries and keys in every
pass and never leaves the chip; what goes from pass to pass are vectors. An entry takes 20 instructions in an iteration
where those of `streamed` take 55 (Triton 3.8 for Hopper: `python tests/compile_kernels.py iterations`). See `onchip`
for the formulas, the forms of the iterations and the limits of the cosine distance.

The backward pass is three kernels: one pass for the sums of the gradient of the plan, as many as there were iterations
for their vectors, from the last to the first, and one for all of the gradient of the distances.

Of equal largest entries of a SOT matrix, one is taken to be the maximum and receives its gradient.
"""
from typing import Dict, Optional, Tuple

import torch
import triton
import triton.language as tl

from .onchip import (
    CUT_OFF,
    LOG2_E,
    LOWEST_RANDOM,
    NEGLIGIBLE,
    NEGLIGIBLE_COSINE,
    _block_size,
    _inverse,
    _load,
    _reciprocal,
    _specialize,
    _store,
    _truncated,
)
from .operands import dropout_numbers, empty_gradients, empty_heads, matched_points, unit_stride
from .streamed import _dropout_factor, _vector, _weights

__all__ = ['empty_saved', 'sot_attention_forward', 'sot_attention_backward']

BLOCK_M = 16  # rows of a strip, the tensor cores' least

# Two forward programs run at a time, where they would take the registers of one and a half.
FORWARD = dict(num_warps=8, num_stages=1, maxnreg=128)
BACKWARD = dict(num_warps=8, num_stages=1)


@triton.jit
def _load_points(
        ptr, stride_n, stride_d, N, D, COSINE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """All rows of y, and what is to be subtracted from those of x: distances cancel far from the origin."""
    y = _load(ptr, stride_n, stride_d, N, D, False, BLOCK_N, BLOCK_D)
    mean = tl.zeros([BLOCK_D], tl.float32)
    if y.dtype == tl.float32 and not COSINE:
        mean = tl.sum(y, 0) / N
        y -= mean[None, :]
    return y, mean


@triton.jit
def _load_strip(
        ptr, start, stride_n, mean, N, D, COSINE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """The rows of x from `start` on."""
    x = _load(ptr + start * stride_n, stride_n, 1, N - start, D, False, BLOCK_M, BLOCK_D)
    if x.dtype == tl.float32 and not COSINE:
        x -= mean[None, :]
    return x


@triton.jit
def _norms(x, COSINE: tl.constexpr):
    """Squared norms of rows, for the cosine their inverse norms."""
    x = x.to(tl.float32)
    squares = tl.sum(x * x, 1)
    if COSINE:
        return _inverse(tl.sqrt(squares))
    else:
        return squares


@triton.jit
def _costs(x, y, norms_y, COSINE: tl.constexpr, PRECISION: tl.constexpr):
    """Distances of the rows of x from all rows of y, something finite in the padding."""
    gram = tl.dot(x, tl.trans(y), input_precision=PRECISION)
    norms_x = _norms(x, COSINE)
    cut_off: tl.constexpr = CUT_OFF * x.shape[1]
    if COSINE:
        costs = 1. - gram * norms_x[:, None] * norms_y[None, :]
        return tl.where(costs < NEGLIGIBLE_COSINE + cut_off, 0., costs)
    else:
        squares = norms_x[:, None] + norms_y[None, :] - 2. * gram
        bound = 2. * (NEGLIGIBLE + cut_off) * norms_x  # rows as close as that are equally long
        return tl.sqrt(tl.where(squares < bound[:, None], 0., squares))


@triton.jit
def _kernel(costs, factor, i, masked, LOG: tl.constexpr):
    """The kernel, or its logarithm to base 2; of the padding the scalings say that it is none."""
    kernel = costs * factor[:, None]
    kernel = tl.where(i[:, None] == masked[None, :], float('-inf'), kernel)
    if not LOG:
        kernel = tl.exp2(kernel)
    return kernel


@triton.jit
def _kernel_strip(
        x_ptr, start, stride_n, mean, y, norms_y, factors_ptr, masked, N, D,
        COSINE: tl.constexpr,
        LOG: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_D: tl.constexpr,
):
    """The kernel between the rows of x from `start` on and all rows of y, or its logarithm."""
    i = start + tl.arange(0, BLOCK_M)
    x = _load_strip(x_ptr, start, stride_n, mean, N, D, COSINE, BLOCK_M, BLOCK_D)
    costs = _costs(x, y, norms_y, COSINE, PRECISION)
    return _kernel(costs, _vector(factors_ptr, i, N), i, masked, LOG)


@triton.jit
def _masked_rows(j, N):
    """The row that is masked in each column: that of the diagonal, which is all there is for N = 1."""
    return tl.where(N == 1, -1, j)


@triton.jit
def _load_scaling(ptr, n, N, LOG: tl.constexpr):
    return tl.load(ptr + n, mask=n < N, other=float('-inf') if LOG else 0.)


@triton.jit
def _load_scaling_before(ptr, n, N, is_first, LOG: tl.constexpr):
    """What an iteration starts from, the first of them from equal scalings."""
    return tl.where(
        is_first & (n < N), 0. if LOG else 1., tl.load(
            ptr + n, mask=(n < N) & (is_first == 0), other=float('-inf') if LOG else 0.))


@triton.jit
def _scaling(sums, n, N, LOG: tl.constexpr):
    """The scaling of rows or columns from their sums, or the logarithm of one from that of the other."""
    if LOG:
        return tl.where(n < N, -tl.log2(N.to(tl.float32)) - sums, float('-inf'))
    else:
        return tl.where(n < N, _reciprocal(N * sums), 0.)


@triton.jit
def _scale_rows(kernel, b, i, N, LOG: tl.constexpr):
    """The scaling of the rows from that of the columns."""
    if LOG:
        shifted = kernel + b[None, :]
        largest = tl.max(shifted, 1)
        sums = largest + tl.log2(tl.sum(tl.exp2(shifted - largest[:, None]), 1))
    else:
        sums = tl.sum(kernel * b[None, :], 1)
    return _scaling(sums, i, N, LOG)


@triton.jit
def _sot(kernel, a, b, i, j, LOG: tl.constexpr):
    """The SOT matrix before it is divided by its largest entry; 0 on the diagonal and in the padding."""
    if LOG:
        plan = tl.exp2(kernel + a[:, None] + b[None, :])
    else:
        plan = kernel * a[:, None] * b[None, :]
    plan = tl.where(i[:, None] == j[None, :], 0., plan)
    return plan * _reciprocal(1. + plan)


@triton.jit
def _normalized_weights(sot, inv_largest, i, j, N, scale, SOFTMAX: tl.constexpr):
    """Attention weights, 0 in the padded columns."""
    weights = _weights(tl.where(i[:, None] == j[None, :], 1., sot * inv_largest), j, N, scale, SOFTMAX)
    if SOFTMAX:
        weights *= _reciprocal(tl.sum(weights, 1))[:, None]
    return weights


@triton.jit(do_not_specialize=['N', 'iters', 'drop_below'])
def _forward_kernel(
        x_ptr, y_ptr, value_ptr, out_ptr, saved_ptr, seed_ptr,
        stride_xb, stride_xh, stride_xn,
        stride_yb, stride_yh, stride_yn, stride_yd,
        stride_vb, stride_vh, stride_vn,
        H, N, D, iters, reg, scale, drop_below, keep_factor,
        COSINE: tl.constexpr,
        SOFTMAX: tl.constexpr,
        DROPOUT: tl.constexpr,
        LOG: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_D: tl.constexpr,
):
    problem = tl.program_id(0)
    batch = (problem // H).to(tl.int64)
    head = (problem % H).to(tl.int64)
    x_ptr += batch * stride_xb + head * stride_xh
    out_ptr += (batch * N * H + head) * D
    factors_ptr = saved_ptr + problem.to(tl.int64) * (2 * iters + 2) * BLOCK_N
    largest_ptr = factors_ptr + BLOCK_N
    saved_ptr = factors_ptr + 2 * BLOCK_N
    m = tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    masked = _masked_rows(j, N)
    y, mean = _load_points(
        y_ptr + batch * stride_yb + head * stride_yh, stride_yn, stride_yd, N, D, COSINE, BLOCK_N, BLOCK_D)
    norms = _norms(y, COSINE)

    # what makes the distances of a row its part of the log-kernel
    for start in range(0, N, BLOCK_M):
        i = start + m
        x = _load_strip(x_ptr, start, stride_xn, mean, N, D, COSINE, BLOCK_M, BLOCK_D)
        costs = _costs(x, y, norms, COSINE, PRECISION)
        row_max = tl.max(tl.where((j < N)[None, :], costs, 0.), 1)
        tl.store(factors_ptr + i, _inverse(row_max) * (-LOG2_E / reg), mask=i < N)
    tl.debug_barrier()

    b = _load_scaling_before(saved_ptr, j, N, iters > 0, LOG)
    b_before = b
    for iteration in range(iters):
        if LOG:
            largest = tl.full([BLOCK_N], float('-inf'), tl.float32)
            total = tl.zeros([BLOCK_N], tl.float32)
        else:
            total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, N, BLOCK_M):
            i = start + m
            kernel = _kernel_strip(
                x_ptr, start, stride_xn, mean, y, norms, factors_ptr, masked, N, D,
                COSINE, LOG, PRECISION, BLOCK_M, BLOCK_D)
            a = _scale_rows(kernel, b, i, N, LOG)
            tl.store(saved_ptr + i, a, mask=i < N)
            if LOG:
                shifted = kernel + a[:, None]
                now = tl.maximum(largest, tl.max(shifted, 0))
                shift = tl.where(now == float('-inf'), 0., now)  # a column that is open in none of these rows
                total = total * tl.exp2(largest - shift) + tl.sum(tl.exp2(shifted - shift[None, :]), 0)
                largest = now
            else:
                total += kernel * a[:, None]
        b_before = b
        if LOG:
            b = _scaling(largest + tl.log2(total), j, N, LOG)
        else:
            b = _scaling(tl.sum(total, 0), j, N, LOG)
        tl.store(saved_ptr + BLOCK_N + j, b)
        saved_ptr += 2 * BLOCK_N

    # the largest entry, which the weights are divided by, and its place
    row_largest = tl.zeros([BLOCK_M], tl.float32)
    place = tl.zeros([BLOCK_M], tl.int32)
    for start in range(0, N, BLOCK_M):
        i = start + m
        kernel = _kernel_strip(
            x_ptr, start, stride_xn, mean, y, norms, factors_ptr, masked, N, D,
            COSINE, LOG, PRECISION, BLOCK_M, BLOCK_D)
        sot = _sot(kernel, _scale_rows(kernel, b_before, i, N, LOG), b, i, j, LOG)
        now, column = tl.max(sot, 1, return_indices=True)
        place = tl.where(now > row_largest, i * BLOCK_N + column, place)
        row_largest = tl.maximum(row_largest, now)
    largest_sot = tl.max(row_largest, 0)
    tl.store(largest_ptr, largest_sot)
    tl.store(largest_ptr + 1, tl.sum(tl.where(m == tl.argmax(row_largest, 0), place, 0), 0).to(tl.float32))

    v = _load(
        value_ptr + batch * stride_vb + head * stride_vh, stride_vn, 1, N, D, False, BLOCK_N, BLOCK_D)
    for start in range(0, N, BLOCK_M):
        i = start + m
        kernel = _kernel_strip(
            x_ptr, start, stride_xn, mean, y, norms, factors_ptr, masked, N, D,
            COSINE, LOG, PRECISION, BLOCK_M, BLOCK_D)
        sot = _sot(kernel, _scale_rows(kernel, b_before, i, N, LOG), b, i, j, LOG)
        weights = _normalized_weights(sot, _inverse(largest_sot), i, j, N, scale, SOFTMAX)
        if DROPOUT:
            weights *= _dropout_factor(seed_ptr, problem, i, 0, drop_below, keep_factor, BLOCK_M, BLOCK_N)
        out = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        _store(out_ptr + start * H * D, out, H * D, 1, N - start, D, False, BLOCK_M, BLOCK_D)


@triton.jit
def _through_weights(
        sot, inv_largest, grad_out, v, i, j, seed_ptr, problem, N, scale, drop_below, keep_factor,
        SOFTMAX: tl.constexpr,
        DROPOUT: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
):
    """Dropped-out weights, and the gradient of the SOT matrix but for what flows through its largest entry."""
    weights = _normalized_weights(sot, inv_largest, i, j, N, scale, SOFTMAX)
    grad = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
    dropped = weights
    if DROPOUT:
        factor = _dropout_factor(seed_ptr, problem, i, 0, drop_below, keep_factor, BLOCK_M, BLOCK_N)
        dropped = weights * factor
        grad *= factor
    if SOFTMAX:
        grad = weights * (grad - tl.sum(weights * grad, 1)[:, None])
    return dropped, tl.where(i[:, None] == j[None, :], 0., grad * (scale * inv_largest))


@triton.jit(do_not_specialize=['N', 'iters', 'drop_below'])
def _plan_gradient_kernel(
        x_ptr, y_ptr, value_ptr, grad_out_ptr, saved_ptr, seed_ptr,
        grad_rows_ptr, grad_columns_ptr, grad_largest_ptr, grad_value_ptr,
        stride_xb, stride_xh, stride_xn,
        stride_yb, stride_yh, stride_yn, stride_yd,
        stride_vb, stride_vh, stride_vn,
        stride_ob, stride_oh, stride_on,
        H, N, D, iters, scale, drop_below, keep_factor,
        COSINE: tl.constexpr,
        SOFTMAX: tl.constexpr,
        DROPOUT: tl.constexpr,
        LOG: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_D: tl.constexpr,
):
    """Row and column sums of the gradient of the log-plan, but for what flows through its largest entry; that of the
    largest entry; gradient of the values.
    """
    problem = tl.program_id(0)
    batch = (problem // H).to(tl.int64)
    head = (problem % H).to(tl.int64)
    x_ptr += batch * stride_xb + head * stride_xh
    y_ptr += batch * stride_yb + head * stride_yh
    value_ptr += batch * stride_vb + head * stride_vh
    grad_out_ptr += batch * stride_ob + head * stride_oh
    factors_ptr = saved_ptr + problem.to(tl.int64) * (2 * iters + 2) * BLOCK_N
    last_ptr = factors_ptr + 2 * iters * BLOCK_N
    vectors = problem.to(tl.int64) * BLOCK_N
    m = tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    y, mean = _load_points(y_ptr, stride_yn, stride_yd, N, D, COSINE, BLOCK_N, BLOCK_D)
    norms = _norms(y, COSINE)
    masked = _masked_rows(j, N)
    v = _load(value_ptr, stride_vn, 1, N, D, False, BLOCK_N, BLOCK_D)
    b = tl.load(last_ptr + BLOCK_N + j)
    largest = tl.load(factors_ptr + BLOCK_N)
    inv_largest = _inverse(largest)
    grad_columns = tl.zeros([BLOCK_N], tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    moment = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, N, BLOCK_M):
        i = start + m
        kernel = _kernel_strip(
            x_ptr, start, stride_xn, mean, y, norms, factors_ptr, masked, N, D,
            COSINE, LOG, PRECISION, BLOCK_M, BLOCK_D)
        sot = _sot(kernel, _load_scaling(last_ptr, i, N, LOG), b, i, j, LOG)
        grad_out = _load(
            grad_out_ptr + start * stride_on, stride_on, 1, N - start, D, False, BLOCK_M, BLOCK_D)
        dropped, grad = _through_weights(
            sot, inv_largest, grad_out, v, i, j, seed_ptr, problem, N, scale, drop_below, keep_factor,
            SOFTMAX, DROPOUT, PRECISION, BLOCK_M, BLOCK_N)
        grad_v += tl.dot(tl.trans(dropped.to(grad_out.dtype)), grad_out, input_precision=PRECISION)
        grad *= sot
        moment += tl.sum(grad, 1)
        grad *= 1. - sot
        tl.store(grad_rows_ptr + vectors + i, tl.sum(grad, 1), mask=i < N)
        grad_columns += tl.sum(grad, 0)
    _store(grad_value_ptr + (batch * N * H + head) * D, grad_v, H * D, 1, N, D, False, BLOCK_N, BLOCK_D)
    tl.store(grad_columns_ptr + vectors + j, grad_columns)
    # of the logarithm of the largest plan: d(scaled) / d(largest) = -scaled / largest
    tl.store(grad_largest_ptr + problem, -tl.sum(moment, 0) * (1. - largest))


@triton.jit(do_not_specialize=['N', 'iters'])
def _adjoint_kernel(
        x_ptr, y_ptr, saved_ptr, grad_rows_ptr, grad_columns_ptr, grad_largest_ptr, vectors_ptr,
        stride_xb, stride_xh, stride_xn,
        stride_yb, stride_yh, stride_yn, stride_yd,
        H, N, D, iters,
        COSINE: tl.constexpr,
        LOG: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_D: tl.constexpr,
):
    """The iterations backwards: for each two vectors, whose products with the scaling vectors it adds to the gradient.
    """
    problem = tl.program_id(0)
    batch = (problem // H).to(tl.int64)
    head = (problem % H).to(tl.int64)
    x_ptr += batch * stride_xb + head * stride_xh
    y_ptr += batch * stride_yb + head * stride_yh
    factors_ptr = saved_ptr + problem.to(tl.int64) * (2 * iters + 2) * BLOCK_N
    saved_ptr = factors_ptr + 2 * BLOCK_N
    vectors_ptr += problem.to(tl.int64) * 2 * iters * BLOCK_N
    grad_rows_ptr += problem.to(tl.int64) * BLOCK_N
    m = tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    y, mean = _load_points(y_ptr, stride_yn, stride_yd, N, D, COSINE, BLOCK_N, BLOCK_D)
    norms = _norms(y, COSINE)
    masked = _masked_rows(j, N)
    total = N.to(tl.float32)
    grad_largest = tl.load(grad_largest_ptr + problem)
    place = tl.load(factors_ptr + BLOCK_N + 1).to(tl.int32)
    grad_columns = tl.load(grad_columns_ptr + problem.to(tl.int64) * BLOCK_N + j)
    grad_columns += tl.where(j == place % BLOCK_N, grad_largest, 0.)
    b = tl.load(saved_ptr + (2 * iters - 1) * BLOCK_N + j)
    for step in range(iters):
        t = 2 * (iters - 1 - step) * BLOCK_N
        gb = total * grad_columns
        if not LOG:
            gb *= b
        tl.store(vectors_ptr + t + BLOCK_N + j, gb)
        b_before = _load_scaling_before(saved_ptr + t - BLOCK_N, j, N, step + 1 == iters, LOG)
        if LOG:
            sums = tl.zeros([BLOCK_N], tl.float32)
        else:
            sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, N, BLOCK_M):
            i = start + m
            kernel = _kernel_strip(
                x_ptr, start, stride_xn, mean, y, norms, factors_ptr, masked, N, D,
                COSINE, LOG, PRECISION, BLOCK_M, BLOCK_D)
            a = _load_scaling(saved_ptr + t, i, N, LOG)
            direct = tl.load(grad_rows_ptr + i, mask=(i < N) & (step == 0), other=0.)
            direct += tl.where((i == place // BLOCK_N) & (step == 0), grad_largest, 0.)
            if LOG:
                kernel += a[:, None]
                ga = total * (direct - tl.sum(tl.exp2(kernel + b[None, :]) * gb[None, :], 1))
                sums += tl.sum(tl.exp2(kernel + b_before[None, :]) * ga[:, None], 0)
            else:
                ga = total * a * (direct - a * tl.sum(kernel * gb[None, :], 1))
                sums += kernel * ga[:, None]
            tl.store(vectors_ptr + t + i, ga, mask=i < N)
        if LOG:
            grad_columns = -sums
        else:
            grad_columns = -b_before * tl.sum(sums, 0)
        b = b_before


@triton.jit(do_not_specialize=['N', 'iters', 'drop_below'])
def _cost_gradient_kernel(
        x_ptr, y_ptr, value_ptr, grad_out_ptr, saved_ptr, seed_ptr,
        grad_largest_ptr, vectors_ptr, grad_x_ptr, grad_y_ptr,
        stride_xb, stride_xh, stride_xn,
        stride_yb, stride_yh, stride_yn, stride_yd,
        stride_vb, stride_vh, stride_vn,
        stride_ob, stride_oh, stride_on,
        stride_gn, stride_gd,
        H, N, D, iters, reg, scale, drop_below, keep_factor,
        COSINE: tl.constexpr,
        SOFTMAX: tl.constexpr,
        DROPOUT: tl.constexpr,
        LOG: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_D: tl.constexpr,
):
    """Gradients of x and y."""
    problem = tl.program_id(0)
    batch = (problem // H).to(tl.int64)
    head = (problem % H).to(tl.int64)
    x_ptr += batch * stride_xb + head * stride_xh
    y_ptr += batch * stride_yb + head * stride_yh
    value_ptr += batch * stride_vb + head * stride_vh
    grad_out_ptr += batch * stride_ob + head * stride_oh
    grad_offset = (batch * N * H + head) * D
    factors_ptr = saved_ptr + problem.to(tl.int64) * (2 * iters + 2) * BLOCK_N
    saved_ptr = factors_ptr + 2 * BLOCK_N
    vectors_ptr += problem.to(tl.int64) * 2 * iters * BLOCK_N
    m = tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    y, mean = _load_points(y_ptr, stride_yn, stride_yd, N, D, COSINE, BLOCK_N, BLOCK_D)
    norms = _norms(y, COSINE)
    masked = _masked_rows(j, N)
    v = _load(value_ptr, stride_vn, 1, N, D, False, BLOCK_N, BLOCK_D)
    last = 2 * (iters - 1) * BLOCK_N
    b = tl.load(saved_ptr + last + BLOCK_N + j)
    inv_largest = _inverse(tl.load(factors_ptr + BLOCK_N))
    place = tl.load(factors_ptr + BLOCK_N + 1).to(tl.int32)
    grad_largest = tl.load(grad_largest_ptr + problem)
    pull_y = tl.zeros([BLOCK_N], tl.float32)
    grad_y = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, N, BLOCK_M):
        i = start + m
        x = _load_strip(x_ptr, start, stride_xn, mean, N, D, COSINE, BLOCK_M, BLOCK_D)
        costs = _costs(x, y, norms, COSINE, PRECISION)
        kernel = _kernel(costs, _vector(factors_ptr, i, N), i, masked, LOG)

        # of the log-plan
        sot = _sot(kernel, _load_scaling(saved_ptr + last, i, N, LOG), b, i, j, LOG)
        grad_out = _load(
            grad_out_ptr + start * stride_on, stride_on, 1, N - start, D, False, BLOCK_M, BLOCK_D)
        dropped, grad = _through_weights(
            sot, inv_largest, grad_out, v, i, j, seed_ptr, problem, N, scale, drop_below, keep_factor,
            SOFTMAX, DROPOUT, PRECISION, BLOCK_M, BLOCK_N)
        grad *= sot * (1. - sot)
        grad += tl.where(i[:, None] * BLOCK_N + j[None, :] == place, grad_largest, 0.)

        # of the log-kernel
        through = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for iteration in range(iters):
            t = 2 * iteration * BLOCK_N
            a = _load_scaling(saved_ptr + t, i, N, LOG)
            ga = _vector(vectors_ptr + t, i, N)
            gb = tl.load(vectors_ptr + t + BLOCK_N + j)
            b_before = _load_scaling_before(saved_ptr + t - BLOCK_N, j, N, iteration == 0, LOG)
            if LOG:
                b_now = tl.load(saved_ptr + t + BLOCK_N + j)
                rows = kernel + a[:, None]
                through += tl.exp2(rows + b_now[None, :]) * gb[None, :]
                through += tl.exp2(rows + b_before[None, :]) * ga[:, None]
            else:
                through += a[:, None] * gb[None, :]
                through += ga[:, None] * b_before[None, :]
        if not LOG:
            through *= kernel
        grad -= through

        # of the distances
        row_max = tl.max(tl.where((j < N)[None, :], costs, 0.), 1)
        inv_max = _inverse(row_max)
        grad *= (-1. / reg) * inv_max[:, None]
        is_max = (costs == row_max[:, None]) & (j < N)[None, :]
        grad_max = -tl.sum(grad * costs, 1) * inv_max / tl.maximum(tl.sum(is_max.to(tl.float32), 1), 1.)
        grad += tl.where(is_max, grad_max[:, None], 0.)

        # grad_x_i = pull_i x_i - sum_j grad_ij y_j, and the same for y
        if COSINE:
            inv_x = _norms(x, COSINE)
            grad = grad * inv_x[:, None] * norms[None, :]
        else:
            grad *= tl.where(costs == 0., 0., _reciprocal(costs))
        if x.dtype == tl.float16:
            # 1 / distance leaves the range of float16: tensor cores in tf32, which holds float16 exactly
            rounded = _truncated(grad)
            near = x.to(tl.float32)
            far = y.to(tl.float32)
        else:
            rounded = grad.to(x.dtype)
            near = x
            far = y
        # of the rounded entries: what is subtracted cancels term by term, to differences x_i - y_j
        if COSINE:
            along = rounded.to(tl.float32) * (1. - costs)
            pull_x = inv_x * tl.sum(along * _inverse(norms)[None, :], 1)
            pull_y += norms * tl.sum(along * _inverse(inv_x)[:, None], 0)
        else:
            pull_x = tl.sum(rounded.to(tl.float32), 1)
            pull_y += tl.sum(rounded.to(tl.float32), 0)
        grad_x = pull_x[:, None] * x.to(tl.float32) - tl.dot(rounded, far, input_precision=PRECISION)
        grad_y -= tl.dot(tl.trans(rounded), near, input_precision=PRECISION)
        _store(grad_x_ptr + grad_offset + start * H * D, grad_x, H * D, 1, N - start, D, False, BLOCK_M, BLOCK_D)
    y, mean = _load_points(y_ptr, stride_yn, stride_yd, N, D, COSINE, BLOCK_N, BLOCK_D)
    grad_y += pull_y[:, None] * y.to(tl.float32)
    _store(grad_y_ptr + grad_offset, grad_y, stride_gn, stride_gd, N, D, False, BLOCK_N, BLOCK_D)


def _specialized(
        q: torch.Tensor,
        operands: str,
        softmax: bool,
        reg: float,
        dropout_p: float,
        distance: str,
) -> Dict[str, object]:
    """Compile-time arguments of the kernels."""
    constants = _specialize(q, operands, softmax, reg, dropout_p, distance)
    del constants['EVEN'], constants['SELF']
    return dict(BLOCK_M=BLOCK_M, **constants)


def empty_saved(q: torch.Tensor, iters: int) -> torch.Tensor:
    """Room for two vectors of each iteration, and two more."""
    B, H, N, _ = q.shape
    return q.new_empty(B * H, 2 * iters + 2, _block_size(N), dtype=torch.float32)


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
    """SOT attention as `onchip.sot_attention_forward`, for N <= 256.

    Returns:
        Output (B, H, N, D), and for the backward pass (B * H, 2 + 2 * iters, padded N) in float32: what makes of the
        distances of a row its log-kernel to base 2; the largest entry of the SOT matrix and its place; and the scaling
        vectors of all iterations, or their logarithms to base 2 where reg < SCALING_MIN_REG.
    """
    B, H, N, D = q.shape
    constants = _specialized(q, operands, softmax, reg, dropout_p, distance)
    q, v = unit_stride(q), unit_stride(v)
    k = matched_points(q, k, operands)
    # zeros where the kernel writes nothing: what an operator returns is not to hang on what memory held
    out, saved = empty_heads(q), empty_saved(q, iters).zero_()
    _forward_kernel[(B * H,)](
        q, k, v, out, saved, saved if seed is None else seed,
        *q.stride()[:3], *k.stride(), *v.stride()[:3],
        H, N, D, iters, reg, scale, *dropout_numbers(dropout_p, LOWEST_RANDOM),
        **constants, **FORWARD,
    )
    return out, saved


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
    B, H, N, D = q.shape
    constants = _specialized(q, operands, softmax, reg, dropout_p, distance)
    of_matrix = {name: constants[name] for name in ('SOFTMAX', 'DROPOUT')}
    shared = {name: value for name, value in constants.items() if name not in of_matrix}
    q, v, grad_out = unit_stride(q), unit_stride(v), unit_stride(grad_out)
    k = matched_points(q, k, operands)
    strides = *q.stride()[:3], *k.stride()
    more_strides = *v.stride()[:3], *grad_out.stride()[:3]
    numbers = scale, *dropout_numbers(dropout_p, LOWEST_RANDOM)
    seed = saved if seed is None else seed
    grad_q, grad_k, grad_v = empty_gradients(q, operands)

    grad_rows, grad_columns = saved.new_empty(2, *saved.shape[::2])
    grad_largest = saved.new_empty(B * H)
    _plan_gradient_kernel[(B * H,)](
        q, k, v, grad_out, saved, seed, grad_rows, grad_columns, grad_largest, grad_v,
        *strides, *more_strides, H, N, D, iters, *numbers, **constants, **BACKWARD)
    vectors = torch.empty_like(saved[:, 2:], memory_format=torch.contiguous_format)
    _adjoint_kernel[(B * H,)](
        q, k, saved, grad_rows, grad_columns, grad_largest, vectors,
        *strides, H, N, D, iters, **shared, **BACKWARD)
    # of the queries among themselves both sides are summed, in float32
    grad_x, grad_y = (empty_heads(q, torch.float32), empty_heads(q, torch.float32)) if operands == 'q' \
        else (grad_q, grad_k)
    # of the columns of k, its gradient is written as the kernel reads k
    _cost_gradient_kernel[(B * H,)](
        q, k, v, grad_out, saved, seed, grad_largest, vectors, grad_x, grad_y,
        *strides, *more_strides, *((1, H * D) if operands == 'qkt' else (H * D, 1)),
        H, N, D, iters, reg, *numbers, **constants, **BACKWARD)
    if operands == 'q':
        torch.add(grad_x, grad_y, out=grad_q)
    return grad_q, grad_k, grad_v
