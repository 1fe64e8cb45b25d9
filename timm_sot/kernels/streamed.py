""" SOT attention for long sequences: tiles of the N x N matrices are recomputed in every pass and never leave the chip

Memory grows with N (D + iters), in the manner of flash attention. Each Sinkhorn half-iteration is one pass over the
distance tiles with a running logsumexp, always in the log domain (base 2). Nothing but the inputs is kept for the
backward pass, which runs the iterations again, keeps their potentials u_t, v_t, finds the gradients of these in a sweep
from the last iteration to the first, and sums all tiles of the gradient of the distances in two last passes, one by
rows for q and one by columns for k. See `onchip` for the formulas, and for the limits of the cosine distance.

A tile is always [rows of x, rows of y]. AXIS = 1: a program owns a block of rows and runs over the columns; AXIS = 0:
it owns a block of columns and runs over the rows.

Of equal maxima, one is taken to be the maximum and receives its gradient.
"""
import math
from typing import Dict, NamedTuple, Optional, Tuple

import torch
import triton
import triton.language as tl

from .onchip import LOG2_E, LOWEST_RANDOM, NEGLIGIBLE, NEGLIGIBLE_COSINE, _inverse, _signed, _truncated
from .operands import dropout_numbers, empty_gradients, empty_heads, matched_points, unit_stride

__all__ = ['empty_saved', 'sot_attention_forward', 'sot_attention_backward']

BLOCK = 64  # rows and columns of a tile


@triton.jit
def _place(N, BLOCK: tl.constexpr):
    """The problem of this program, and the first row or column of its block."""
    blocks = tl.cdiv(N, BLOCK)
    return tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK


@triton.jit
def _load(ptr, n, stride_n, stride_d, N, D, BLOCK_D: tl.constexpr):
    """Rows n of an (N, D) matrix, padded with zeros."""
    d = tl.arange(0, BLOCK_D)
    offset = n.to(tl.int64)[:, None] * stride_n + d[None, :] * stride_d
    return tl.load(ptr + offset, mask=(n < N)[:, None] & (d < D)[None, :], other=0.)


@triton.jit
def _store(ptr, x, n, stride_n, stride_d, N, D, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    offset = n.to(tl.int64)[:, None] * stride_n + d[None, :] * stride_d
    tl.store(ptr + offset, x.to(ptr.dtype.element_ty), mask=(n < N)[:, None] & (d < D)[None, :])


@triton.jit
def _vector(ptr, n, N):
    return tl.load(ptr + n, mask=n < N, other=0.)


@triton.jit
def _costs(x, y, xx, yy, COSINE: tl.constexpr, PRECISION: tl.constexpr):
    """Distances of the rows of x and y with squared norms xx and yy."""
    gram = tl.dot(x, tl.trans(y), input_precision=PRECISION)
    if COSINE:
        costs = 1. - gram * _inverse(tl.sqrt(xx))[:, None] * _inverse(tl.sqrt(yy))[None, :]
        return tl.where(costs < NEGLIGIBLE_COSINE, 0., costs)
    else:
        squares = xx[:, None] + yy[None, :] - 2. * gram
        bound = 2. * NEGLIGIBLE * xx  # rows as close as that are equally long
        return tl.sqrt(tl.where(squares < bound[:, None], 0., squares))


@triton.jit
def _log_kernel(costs, row_max, i, j, N, reg):
    """Log-kernel in base 2, -inf on the diagonal and in the padding."""
    open = (i < N)[:, None] & (j < N)[None, :] & ((i[:, None] != j[None, :]) | (N == 1))
    return tl.where(open, costs * (_inverse(row_max) * (-LOG2_E / reg))[:, None], float('-inf'))


@triton.jit
def _dropout_factor(
        seed_ptr, problem, i, j_start, drop_below, keep_factor, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    """0 or `keep_factor` for each weight of a tile: a function of seed, problem, row and column alone."""
    seed = tl.load(seed_ptr)
    zero = tl.zeros([ROWS, COLUMNS // 4], tl.int32)
    columns = zero + (j_start // 4 + tl.arange(0, COLUMNS // 4))[None, :]
    r0, r1, r2, r3 = tl.philox(seed, zero + i[:, None], columns, zero + problem, zero)
    keep = tl.join(
        tl.join(_signed(r0) >= drop_below, _signed(r1) >= drop_below),
        tl.join(_signed(r2) >= drop_below, _signed(r3) >= drop_below))
    return tl.where(tl.reshape(keep, [ROWS, COLUMNS]), keep_factor, 0.)


@triton.jit
def _scaled(log_kernel, u, v, inv_largest, i, j):
    """The plan through the sigmoid, 0 on the diagonal, and that divided by its largest entry, 1 on the diagonal."""
    plan = tl.exp2(log_kernel + u[:, None] + v[None, :])
    plan = tl.where(i[:, None] == j[None, :], 0., plan)
    sot = plan / (1. + plan)
    return sot, tl.where(i[:, None] == j[None, :], 1., sot * inv_largest)


@triton.jit
def _weights(scaled, j, N, scale, SOFTMAX: tl.constexpr):
    """Attention weights, for the softmax without its denominator."""
    if SOFTMAX:
        # the diagonal, 1, is the largest entry of its row
        return tl.where((j < N)[None, :], tl.exp2((scaled - 1.) * (scale * LOG2_E)), 0.)
    else:
        return scaled * scale


@triton.jit
def _tile_gradients(
        log_kernel, u, v, inv_largest, denominator, delta, value, grad_out, i, j, j_start, seed_ptr, problem,
        N, scale, drop_below, keep_factor,
        SOFTMAX: tl.constexpr,
        DROPOUT: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK: tl.constexpr,
):
    """Dropped-out weights; gradient of the scaled matrix; the SOT matrix before and after scaling."""
    sot, scaled = _scaled(log_kernel, u, v, inv_largest, i, j)
    weights = _weights(scaled, j, N, scale, SOFTMAX)
    grad = tl.dot(grad_out, tl.trans(value), input_precision=PRECISION)
    dropped = weights
    if SOFTMAX:
        weights *= denominator[:, None]
        dropped = weights
    if DROPOUT:
        factor = _dropout_factor(seed_ptr, problem, i, j_start, drop_below, keep_factor, BLOCK, BLOCK)
        dropped = weights * factor
        grad *= factor
    if SOFTMAX:
        grad = weights * (grad - delta[:, None])
    grad = tl.where(i[:, None] == j[None, :], 0., grad * scale)
    return dropped, grad, sot, scaled


@triton.jit
def _norms_kernel(
        x_ptr, out_ptr,
        stride_b, stride_h, stride_n, stride_d,
        H, N, D,
        PRECISION: tl.constexpr,
        BLOCK: tl.constexpr,
        BLOCK_D: tl.constexpr,
):
    """Squared norms of rows, by the product that gives the distances: equal rows then are at distance 0."""
    problem, own_start = _place(N, BLOCK)
    n = own_start + tl.arange(0, BLOCK)
    x_ptr += (problem // H).to(tl.int64) * stride_b + (problem % H).to(tl.int64) * stride_h
    x = _load(x_ptr, n, stride_n, stride_d, N, D, BLOCK_D)
    gram = tl.dot(x, tl.trans(x), input_precision=PRECISION)
    norms = tl.sum(tl.where(n[:, None] == n[None, :], gram, 0.), 1)
    tl.store(out_ptr + problem.to(tl.int64) * N + n, norms, mask=n < N)


@triton.jit
def _row_max_kernel(
        x_ptr, y_ptr, xx_ptr, yy_ptr, row_max_ptr, v_ptr, out_ptr, index_ptr,
        stride_xb, stride_xh, stride_xn,
        stride_yb, stride_yh, stride_yn, stride_yd,
        H, N, D, reg,
        PLAN: tl.constexpr,
        COSINE: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK: tl.constexpr,
        BLOCK_D: tl.constexpr,
):
    """Largest entry of each row and its column: of the costs, or of log-kernel + v."""
    problem, own_start = _place(N, BLOCK)
    x_ptr += (problem // H).to(tl.int64) * stride_xb + (problem % H).to(tl.int64) * stride_xh
    y_ptr += (problem // H).to(tl.int64) * stride_yb + (problem % H).to(tl.int64) * stride_yh
    vectors = problem.to(tl.int64) * N
    i = own_start + tl.arange(0, BLOCK)
    x = _load(x_ptr, i, stride_xn, 1, N, D, BLOCK_D)
    xx = _vector(xx_ptr + vectors, i, N)
    if PLAN:
        row_max = _vector(row_max_ptr + vectors, i, N)
    largest = tl.full([BLOCK], float('-inf'), tl.float32)
    index = tl.zeros([BLOCK], tl.int32)
    for start in range(0, N, BLOCK):
        j = start + tl.arange(0, BLOCK)
        y = _load(y_ptr, j, stride_yn, stride_yd, N, D, BLOCK_D)
        entries = _costs(x, y, xx, _vector(yy_ptr + vectors, j, N), COSINE, PRECISION)
        if PLAN:
            entries = _log_kernel(entries, row_max, i, j, N, reg) + _vector(v_ptr + vectors, j, N)[None, :]
        else:
            entries = tl.where((j < N)[None, :], entries, float('-inf'))
        tile_largest, tile_index = tl.max(entries, 1, return_indices=True)
        index = tl.where(tile_largest > largest, start + tile_index, index)
        largest = tl.maximum(largest, tile_largest)
    tl.store(out_ptr + vectors + i, largest, mask=i < N)
    tl.store(index_ptr + vectors + i, index, mask=i < N)


@triton.jit
def _logsumexp_kernel(
        x_ptr, y_ptr, xx_ptr, yy_ptr, row_max_ptr, potential_ptr, out_ptr,
        stride_xb, stride_xh, stride_xn,
        stride_yb, stride_yh, stride_yn, stride_yd,
        H, N, D, reg, log2_mass,
        AXIS: tl.constexpr,
        COSINE: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK: tl.constexpr,
        BLOCK_D: tl.constexpr,
):
    """A half-iteration: the potential of the rows from that of the columns (AXIS = 1), or the reverse."""
    problem, own_start = _place(N, BLOCK)
    x_ptr += (problem // H).to(tl.int64) * stride_xb + (problem % H).to(tl.int64) * stride_xh
    y_ptr += (problem // H).to(tl.int64) * stride_yb + (problem % H).to(tl.int64) * stride_yh
    vectors = problem.to(tl.int64) * N
    own = own_start + tl.arange(0, BLOCK)
    i = own
    j = own
    if AXIS == 1:
        x = _load(x_ptr, i, stride_xn, 1, N, D, BLOCK_D)
        xx = _vector(xx_ptr + vectors, i, N)
        row_max = _vector(row_max_ptr + vectors, i, N)
    else:
        y = _load(y_ptr, j, stride_yn, stride_yd, N, D, BLOCK_D)
        yy = _vector(yy_ptr + vectors, j, N)
    largest = tl.full([BLOCK], float('-inf'), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        other = start + tl.arange(0, BLOCK)
        potential = _vector(potential_ptr + vectors, other, N)
        if AXIS == 1:
            j = other
            y = _load(y_ptr, j, stride_yn, stride_yd, N, D, BLOCK_D)
            yy = _vector(yy_ptr + vectors, j, N)
        else:
            i = other
            x = _load(x_ptr, i, stride_xn, 1, N, D, BLOCK_D)
            xx = _vector(xx_ptr + vectors, i, N)
            row_max = _vector(row_max_ptr + vectors, i, N)
        log_kernel = _log_kernel(_costs(x, y, xx, yy, COSINE, PRECISION), row_max, i, j, N, reg)
        log_kernel += tl.expand_dims(potential, 1 - AXIS)
        largest_now = tl.maximum(largest, tl.max(log_kernel, AXIS))
        tile = tl.sum(tl.exp2(log_kernel - tl.expand_dims(largest_now, AXIS)), AXIS)
        total = total * tl.exp2(largest - largest_now) + tile
        largest = largest_now
    tl.store(out_ptr + vectors + own, log2_mass - largest - tl.log2(total), mask=own < N)


@triton.jit(do_not_specialize=['drop_below'])
def _output_kernel(
        x_ptr, y_ptr, value_ptr, out_ptr, xx_ptr, yy_ptr, row_max_ptr, u_ptr, v_ptr, largest_ptr, seed_ptr,
        stride_xb, stride_xh, stride_xn,
        stride_yb, stride_yh, stride_yn, stride_yd,
        stride_vb, stride_vh, stride_vn,
        H, N, D, reg, scale, drop_below, keep_factor,
        SOFTMAX: tl.constexpr,
        DROPOUT: tl.constexpr,
        COSINE: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK: tl.constexpr,
        BLOCK_D: tl.constexpr,
):
    problem, own_start = _place(N, BLOCK)
    batch = (problem // H).to(tl.int64)
    head = (problem % H).to(tl.int64)
    x_ptr += batch * stride_xb + head * stride_xh
    y_ptr += batch * stride_yb + head * stride_yh
    value_ptr += batch * stride_vb + head * stride_vh
    vectors = problem.to(tl.int64) * N
    i = own_start + tl.arange(0, BLOCK)
    x = _load(x_ptr, i, stride_xn, 1, N, D, BLOCK_D)
    xx = _vector(xx_ptr + vectors, i, N)
    row_max = _vector(row_max_ptr + vectors, i, N)
    u = _vector(u_ptr + vectors, i, N)
    inv_largest = _inverse(tl.load(largest_ptr + problem))
    out = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    denominator = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        j = start + tl.arange(0, BLOCK)
        y = _load(y_ptr, j, stride_yn, stride_yd, N, D, BLOCK_D)
        costs = _costs(x, y, xx, _vector(yy_ptr + vectors, j, N), COSINE, PRECISION)
        log_kernel = _log_kernel(costs, row_max, i, j, N, reg)
        _, scaled = _scaled(log_kernel, u, _vector(v_ptr + vectors, j, N), inv_largest, i, j)
        weights = _weights(scaled, j, N, scale, SOFTMAX)
        denominator += tl.sum(weights, 1)
        if DROPOUT:
            weights *= _dropout_factor(seed_ptr, problem, i, start, drop_below, keep_factor, BLOCK, BLOCK)
        value = _load(value_ptr, j, stride_vn, 1, N, D, BLOCK_D)
        out += tl.dot(weights.to(value.dtype), value, input_precision=PRECISION)
    if SOFTMAX:
        out *= _inverse(denominator)[:, None]
    _store(out_ptr + (batch * N * H + head) * D, out, i, H * D, 1, N, D, BLOCK_D)


@triton.jit(do_not_specialize=['drop_below'])
def _softmax_sums_kernel(
        x_ptr, y_ptr, value_ptr, grad_out_ptr, xx_ptr, yy_ptr, row_max_ptr, u_ptr, v_ptr, largest_ptr, seed_ptr,
        denominator_ptr, delta_ptr,
        stride_xb, stride_xh, stride_xn,
        stride_yb, stride_yh, stride_yn, stride_yd,
        stride_vb, stride_vh, stride_vn,
        stride_ob, stride_oh, stride_on,
        H, N, D, reg, scale, drop_below, keep_factor,
        DROPOUT: tl.constexpr,
        COSINE: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK: tl.constexpr,
        BLOCK_D: tl.constexpr,
):
    """For each row 1 / the softmax's denominator, and the sum of weights times their gradients."""
    problem, own_start = _place(N, BLOCK)
    batch = (problem // H).to(tl.int64)
    head = (problem % H).to(tl.int64)
    x_ptr += batch * stride_xb + head * stride_xh
    y_ptr += batch * stride_yb + head * stride_yh
    value_ptr += batch * stride_vb + head * stride_vh
    grad_out_ptr += batch * stride_ob + head * stride_oh
    vectors = problem.to(tl.int64) * N
    i = own_start + tl.arange(0, BLOCK)
    x = _load(x_ptr, i, stride_xn, 1, N, D, BLOCK_D)
    grad_out = _load(grad_out_ptr, i, stride_on, 1, N, D, BLOCK_D)
    xx = _vector(xx_ptr + vectors, i, N)
    row_max = _vector(row_max_ptr + vectors, i, N)
    u = _vector(u_ptr + vectors, i, N)
    inv_largest = _inverse(tl.load(largest_ptr + problem))
    denominator = tl.zeros([BLOCK], tl.float32)
    delta = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        j = start + tl.arange(0, BLOCK)
        y = _load(y_ptr, j, stride_yn, stride_yd, N, D, BLOCK_D)
        costs = _costs(x, y, xx, _vector(yy_ptr + vectors, j, N), COSINE, PRECISION)
        log_kernel = _log_kernel(costs, row_max, i, j, N, reg)
        _, scaled = _scaled(log_kernel, u, _vector(v_ptr + vectors, j, N), inv_largest, i, j)
        weights = _weights(scaled, j, N, scale, True)
        denominator += tl.sum(weights, 1)
        if DROPOUT:
            weights *= _dropout_factor(seed_ptr, problem, i, start, drop_below, keep_factor, BLOCK, BLOCK)
        value = _load(value_ptr, j, stride_vn, 1, N, D, BLOCK_D)
        delta += tl.sum(weights * tl.dot(grad_out, tl.trans(value), input_precision=PRECISION), 1)
    tl.store(denominator_ptr + vectors + i, 1. / denominator, mask=i < N)
    tl.store(delta_ptr + vectors + i, delta / denominator, mask=i < N)


@triton.jit(do_not_specialize=['drop_below'])
def _plan_gradient_kernel(
        x_ptr, y_ptr, value_ptr, grad_out_ptr, xx_ptr, yy_ptr, row_max_ptr, u_ptr, v_ptr, largest_ptr, seed_ptr,
        denominator_ptr, delta_ptr, sums_ptr, moment_ptr, grad_value_ptr,
        stride_xb, stride_xh, stride_xn,
        stride_yb, stride_yh, stride_yn, stride_yd,
        stride_vb, stride_vh, stride_vn,
        stride_ob, stride_oh, stride_on,
        H, N, D, reg, scale, drop_below, keep_factor,
        AXIS: tl.constexpr,
        SOFTMAX: tl.constexpr,
        DROPOUT: tl.constexpr,
        COSINE: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK: tl.constexpr,
        BLOCK_D: tl.constexpr,
):
    """Row or column sums of the gradient of the log-plan, but for what flows through the largest entry.

    AXIS = 1 also sums the gradient of the scaled matrix times that matrix, for the gradient of its largest entry;
    AXIS = 0 yields the gradient of the values.
    """
    problem, own_start = _place(N, BLOCK)
    batch = (problem // H).to(tl.int64)
    head = (problem % H).to(tl.int64)
    x_ptr += batch * stride_xb + head * stride_xh
    y_ptr += batch * stride_yb + head * stride_yh
    value_ptr += batch * stride_vb + head * stride_vh
    grad_out_ptr += batch * stride_ob + head * stride_oh
    vectors = problem.to(tl.int64) * N
    own = own_start + tl.arange(0, BLOCK)
    inv_largest = _inverse(tl.load(largest_ptr + problem))
    sums = tl.zeros([BLOCK], tl.float32)
    if AXIS == 1:
        x = _load(x_ptr, own, stride_xn, 1, N, D, BLOCK_D)
        grad_out = _load(grad_out_ptr, own, stride_on, 1, N, D, BLOCK_D)
        moment = tl.zeros([BLOCK], tl.float32)
    else:
        y = _load(y_ptr, own, stride_yn, stride_yd, N, D, BLOCK_D)
        value = _load(value_ptr, own, stride_vn, 1, N, D, BLOCK_D)
        grad_value = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for start in range(0, N, BLOCK):
        other = start + tl.arange(0, BLOCK)
        if AXIS == 1:
            i = own
            j = other
            j_start = start
            y = _load(y_ptr, j, stride_yn, stride_yd, N, D, BLOCK_D)
            value = _load(value_ptr, j, stride_vn, 1, N, D, BLOCK_D)
        else:
            i = other
            j = own
            j_start = own_start
            x = _load(x_ptr, i, stride_xn, 1, N, D, BLOCK_D)
            grad_out = _load(grad_out_ptr, i, stride_on, 1, N, D, BLOCK_D)
        costs = _costs(x, y, _vector(xx_ptr + vectors, i, N), _vector(yy_ptr + vectors, j, N), COSINE, PRECISION)
        log_kernel = _log_kernel(costs, _vector(row_max_ptr + vectors, i, N), i, j, N, reg)
        dropped, grad, sot, scaled = _tile_gradients(
            log_kernel, _vector(u_ptr + vectors, i, N), _vector(v_ptr + vectors, j, N), inv_largest,
            _vector(denominator_ptr + vectors, i, N), _vector(delta_ptr + vectors, i, N), value, grad_out,
            i, j, j_start, seed_ptr, problem, N, scale, drop_below, keep_factor,
            SOFTMAX, DROPOUT, PRECISION, BLOCK)
        sums += tl.sum(grad * (sot * (1. - sot)), AXIS)
        if AXIS == 1:
            moment += tl.sum(grad * scaled, 1)
        else:
            grad_value += tl.dot(tl.trans(dropped.to(grad_out.dtype)), grad_out, input_precision=PRECISION)
    tl.store(sums_ptr + vectors + own, sums * inv_largest, mask=own < N)
    if AXIS == 1:
        tl.store(moment_ptr + vectors + own, moment, mask=own < N)
    else:
        _store(grad_value_ptr + (batch * N * H + head) * D, grad_value, own, H * D, 1, N, D, BLOCK_D)


@triton.jit
def _adjoint_kernel(
        x_ptr, y_ptr, xx_ptr, yy_ptr, row_max_ptr, u_ptr, v_ptr, grad_ptr, init_ptr, out_ptr,
        stride_xb, stride_xh, stride_xn,
        stride_yb, stride_yh, stride_yn, stride_yd,
        H, N, D, reg,
        AXIS: tl.constexpr,
        INIT: tl.constexpr,
        COSINE: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK: tl.constexpr,
        BLOCK_D: tl.constexpr,
):
    """A half-iteration backwards: out = init - N * sum_AXIS exp(log-kernel + u + v) * grad."""
    problem, own_start = _place(N, BLOCK)
    x_ptr += (problem // H).to(tl.int64) * stride_xb + (problem % H).to(tl.int64) * stride_xh
    y_ptr += (problem // H).to(tl.int64) * stride_yb + (problem % H).to(tl.int64) * stride_yh
    vectors = problem.to(tl.int64) * N
    own = own_start + tl.arange(0, BLOCK)
    i = own
    j = own
    if AXIS == 1:
        x = _load(x_ptr, i, stride_xn, 1, N, D, BLOCK_D)
    else:
        y = _load(y_ptr, j, stride_yn, stride_yd, N, D, BLOCK_D)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        other = start + tl.arange(0, BLOCK)
        if AXIS == 1:
            j = other
            y = _load(y_ptr, j, stride_yn, stride_yd, N, D, BLOCK_D)
        else:
            i = other
            x = _load(x_ptr, i, stride_xn, 1, N, D, BLOCK_D)
        costs = _costs(x, y, _vector(xx_ptr + vectors, i, N), _vector(yy_ptr + vectors, j, N), COSINE, PRECISION)
        log_kernel = _log_kernel(costs, _vector(row_max_ptr + vectors, i, N), i, j, N, reg)
        plan = tl.exp2(
            log_kernel + _vector(u_ptr + vectors, i, N)[:, None] + _vector(v_ptr + vectors, j, N)[None, :])
        total += tl.sum(plan * tl.expand_dims(_vector(grad_ptr + vectors, other, N), 1 - AXIS), AXIS)
    total *= -N
    if INIT:
        total += _vector(init_ptr + vectors, own, N)
    tl.store(out_ptr + vectors + own, total, mask=own < N)


@triton.jit(do_not_specialize=['problems', 'iters', 'drop_below'])
def _cost_gradient_kernel(
        x_ptr, y_ptr, value_ptr, grad_out_ptr, xx_ptr, yy_ptr, row_max_ptr, row_max_index_ptr,
        u_ptr, v_ptr, grad_u_ptr, grad_v_ptr, largest_ptr, largest_i_ptr, largest_j_ptr, grad_largest_ptr, seed_ptr,
        denominator_ptr, delta_ptr, grad_max_ptr, add_ptr, out_ptr,
        stride_xb, stride_xh, stride_xn,
        stride_yb, stride_yh, stride_yn, stride_yd,
        stride_vb, stride_vh, stride_vn,
        stride_ob, stride_oh, stride_on,
        stride_outn, stride_outd,
        H, N, D, problems, iters, reg, scale, drop_below, keep_factor,
        AXIS: tl.constexpr,
        ADD: tl.constexpr,
        SOFTMAX: tl.constexpr,
        DROPOUT: tl.constexpr,
        COSINE: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK: tl.constexpr,
        BLOCK_D: tl.constexpr,
):
    """Gradient of x (AXIS = 1), and with it that of the row maxima; or gradient of y (AXIS = 0)."""
    problem, own_start = _place(N, BLOCK)
    batch = (problem // H).to(tl.int64)
    head = (problem % H).to(tl.int64)
    x_ptr += batch * stride_xb + head * stride_xh
    y_ptr += batch * stride_yb + head * stride_yh
    value_ptr += batch * stride_vb + head * stride_vh
    grad_out_ptr += batch * stride_ob + head * stride_oh
    vectors = problem.to(tl.int64) * N
    iteration = problems.to(tl.int64) * N  # from one iteration's vectors to the next
    own = own_start + tl.arange(0, BLOCK)
    inv_largest = _inverse(tl.load(largest_ptr + problem))
    largest_i = tl.load(largest_i_ptr + problem)
    largest_j = tl.load(largest_j_ptr + problem)
    grad_largest = tl.load(grad_largest_ptr + problem)
    pull = tl.zeros([BLOCK], tl.float32)
    out = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    if AXIS == 1:
        x = _load(x_ptr, own, stride_xn, 1, N, D, BLOCK_D)
        grad_out = _load(grad_out_ptr, own, stride_on, 1, N, D, BLOCK_D)
        grad_max = tl.zeros([BLOCK], tl.float32)
    else:
        y = _load(y_ptr, own, stride_yn, stride_yd, N, D, BLOCK_D)
        value = _load(value_ptr, own, stride_vn, 1, N, D, BLOCK_D)
    for start in range(0, N, BLOCK):
        other = start + tl.arange(0, BLOCK)
        if AXIS == 1:
            i = own
            j = other
            j_start = start
            y = _load(y_ptr, j, stride_yn, stride_yd, N, D, BLOCK_D)
            value = _load(value_ptr, j, stride_vn, 1, N, D, BLOCK_D)
        else:
            i = other
            j = own
            j_start = own_start
            x = _load(x_ptr, i, stride_xn, 1, N, D, BLOCK_D)
            grad_out = _load(grad_out_ptr, i, stride_on, 1, N, D, BLOCK_D)
        xx = _vector(xx_ptr + vectors, i, N)
        yy = _vector(yy_ptr + vectors, j, N)
        row_max = _vector(row_max_ptr + vectors, i, N)
        inv_max = _inverse(row_max)
        costs = _costs(x, y, xx, yy, COSINE, PRECISION)
        log_kernel = _log_kernel(costs, row_max, i, j, N, reg)

        # gradient of the log-plan
        last = (iters - 1) * iteration + vectors
        _, grad, sot, _ = _tile_gradients(
            log_kernel, _vector(u_ptr + last, i, N), _vector(v_ptr + last + iteration, j, N), inv_largest,
            _vector(denominator_ptr + vectors, i, N), _vector(delta_ptr + vectors, i, N), value, grad_out,
            i, j, j_start, seed_ptr, problem, N, scale, drop_below, keep_factor,
            SOFTMAX, DROPOUT, PRECISION, BLOCK)
        grad *= inv_largest * (sot * (1. - sot))
        is_largest = (i[:, None] == largest_i) & (j[None, :] == largest_j)
        grad += tl.where(is_largest, grad_largest, 0.)

        # of the log-kernel
        through = tl.zeros([BLOCK, BLOCK], tl.float32)
        for t in range(iters):
            at = t * iteration + vectors
            rows = log_kernel + _vector(u_ptr + at, i, N)[:, None]
            through += (
                tl.exp2(rows + _vector(v_ptr + at + iteration, j, N)[None, :])
                * _vector(grad_v_ptr + at, j, N)[None, :])
            through += tl.exp2(rows + _vector(v_ptr + at, j, N)[None, :]) * _vector(grad_u_ptr + at, i, N)[:, None]
        grad = (grad - N * through) * (inv_max * (-1. / reg))[:, None]

        # of the costs: AXIS = 1 adds the row maximum's part at the end, when it is known
        if AXIS == 1:
            grad_max -= tl.sum(grad * costs, 1) * inv_max
        else:
            is_max = j[None, :] == tl.load(row_max_index_ptr + vectors + i, mask=i < N, other=-1)[:, None]
            grad += tl.where(is_max, _vector(grad_max_ptr + vectors, i, N)[:, None], 0.)
        if COSINE:
            grad *= _inverse(tl.sqrt(xx))[:, None] * _inverse(tl.sqrt(yy))[None, :]
        else:
            grad = tl.where(costs == 0., 0., grad / tl.where(costs == 0., 1., costs))
        moving = y if AXIS == 1 else x
        if moving.dtype == tl.float16:
            # 1 / distance leaves the range of float16: tensor cores in tf32, which holds float16 exactly
            rounded = _truncated(grad)
            moving = moving.to(tl.float32)
        else:
            rounded = grad.to(moving.dtype)
        # of the rounded entries: what is subtracted cancels term by term, to differences x_i - y_j
        if COSINE:
            lengths = tl.sqrt(yy)[None, :] if AXIS == 1 else tl.sqrt(xx)[:, None]
            pull += tl.sum(rounded.to(tl.float32) * (1. - costs) * lengths, AXIS)
        else:
            pull += tl.sum(rounded.to(tl.float32), AXIS)
        if AXIS == 1:
            out -= tl.dot(rounded, moving, input_precision=PRECISION)
        else:
            out -= tl.dot(tl.trans(rounded), moving, input_precision=PRECISION)

    fixed = (x if AXIS == 1 else y).to(tl.float32)
    if COSINE:
        inv_norm = _inverse(tl.sqrt(_vector((xx_ptr if AXIS == 1 else yy_ptr) + vectors, own, N)))
        pull *= inv_norm
    if AXIS == 1:
        tl.store(grad_max_ptr + vectors + own, grad_max, mask=own < N)
        row_max = _vector(row_max_ptr + vectors, own, N)
        index = tl.load(row_max_index_ptr + vectors + own, mask=own < N, other=0)
        farthest = _load(y_ptr, index, stride_yn, stride_yd, N, D, BLOCK_D).to(tl.float32)
        if COSINE:
            pull += grad_max * (1. - row_max) * inv_norm * inv_norm
            farthest_norm = _inverse(tl.sqrt(tl.load(yy_ptr + vectors + index, mask=own < N, other=0.)))
            out -= (grad_max * inv_norm * farthest_norm)[:, None] * farthest
        else:
            out += (grad_max * _inverse(row_max))[:, None] * (fixed - farthest)
    out += pull[:, None] * fixed
    offset = (batch * N * H + head) * D
    if ADD:
        out += _load(add_ptr + offset, own, H * D, 1, N, D, BLOCK_D)
    _store(out_ptr + offset, out, own, stride_outn, stride_outd, N, D, BLOCK_D)


class _Problem(NamedTuple):
    """What every pass needs."""
    x: torch.Tensor
    y: torch.Tensor
    xx: torch.Tensor  # squared norms of the rows, (B * H, N)
    yy: torch.Tensor
    row_max: torch.Tensor
    row_max_index: torch.Tensor
    reg: float
    grid: Tuple[int]
    options: Dict[str, object]

    @property
    def matrices(self) -> Tuple[torch.Tensor, ...]:
        return self.x, self.y

    @property
    def vectors(self) -> Tuple[torch.Tensor, ...]:
        return self.xx, self.yy, self.row_max

    @property
    def strides(self) -> Tuple[int, ...]:
        return *self.x.stride()[:3], *self.y.stride()

    @property
    def sizes(self) -> Tuple[int, int, int]:
        return tuple(self.x.shape[1:])


def _vectors(q: torch.Tensor, *leading: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return q.new_empty(*leading, q.shape[0] * q.shape[1], q.shape[2], dtype=dtype)


def tile_options(q: torch.Tensor) -> Dict[str, object]:
    """Compile-time arguments and launch options that depend on the tensors."""
    D = q.shape[-1]
    return dict(
        PRECISION='tf32x3' if q.dtype == torch.float32 else 'tf32',
        BLOCK=BLOCK,
        BLOCK_D=max(16, triton.next_power_of_2(D)),
        num_warps=4,
        num_stages=1 if q.dtype == torch.float32 or D > 64 else 3,
    )


def _prepare(q: torch.Tensor, k: torch.Tensor, operands: str, reg: float, distance: str) -> _Problem:
    """Norms and row maxima."""
    B, H, N, D = q.shape
    x = unit_stride(q)
    y = matched_points(x, k, operands)
    if q.dtype == torch.float32 and distance == 'euclidean':
        # distances are differences of squared norms, which cancel far from the origin
        mean = y.mean(dim=-2, keepdim=True)
        # where operands overlap in memory, torch may order the result otherwise
        x, y = unit_stride(x - mean), y - mean
        if operands == 'q':
            y = x
        elif operands == 'qk':
            y = unit_stride(y)
    options = dict(COSINE=distance == 'cosine', **tile_options(q))
    grid = (triton.cdiv(N, BLOCK) * B * H,)
    norms = []
    for z in (x,) if operands == 'q' else (x, y):
        norms.append(_vectors(q))
        _norms_kernel[grid](
            z, norms[-1], *z.stride(), H, N, D,
            PRECISION=options['PRECISION'], BLOCK=BLOCK, BLOCK_D=options['BLOCK_D'])
    problem = _Problem(
        x, y, norms[0], norms[-1], _vectors(q), _vectors(q, dtype=torch.int32), reg, grid, options)
    _row_max_kernel[grid](
        *problem.matrices, *problem.vectors, problem.xx, problem.row_max, problem.row_max_index,
        *problem.strides, *problem.sizes, reg, PLAN=False, **options)
    return problem


def _half_iteration(problem: _Problem, potential: torch.Tensor, out: torch.Tensor, axis: int) -> None:
    log2_mass = -math.log2(problem.sizes[1])
    _logsumexp_kernel[problem.grid](
        *problem.matrices, *problem.vectors, potential, out,
        *problem.strides, *problem.sizes, problem.reg, log2_mass, AXIS=axis, **problem.options)


def _largest(problem: _Problem, u: torch.Tensor, v: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Largest entry of each SOT matrix, and its row and column."""
    row_largest, columns = _vectors(problem.x), _vectors(problem.x, dtype=torch.int32)
    _row_max_kernel[problem.grid](
        *problem.matrices, *problem.vectors, v, row_largest, columns,
        *problem.strides, *problem.sizes, problem.reg, PLAN=True, **problem.options)
    log2_plan, row = (row_largest + u).max(dim=1)
    return 1. / (1. + torch.exp2(-log2_plan)), row.int(), columns.gather(1, row[:, None])[:, 0]


def empty_saved(q: torch.Tensor, iters: int) -> torch.Tensor:
    """Nothing is kept."""
    return q.new_empty(0, dtype=torch.float32)


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
    """SOT attention as `onchip.sot_attention_forward`, for any N; it keeps nothing for the backward pass.

    Returns:
        Output (B, H, N, D), and a tensor without elements in the place of onchip's scaling vectors.
    """
    problem = _prepare(q, k, operands, reg, distance)
    v = unit_stride(v)
    row_potential, column_potential = _vectors(q), _vectors(q).zero_()
    for _ in range(iters):
        _half_iteration(problem, column_potential, row_potential, 1)
        _half_iteration(problem, row_potential, column_potential, 0)
    largest, _, _ = _largest(problem, row_potential, column_potential)
    out = empty_heads(q)
    _output_kernel[problem.grid](
        *problem.matrices, v, out, *problem.vectors, row_potential, column_potential, largest,
        largest if seed is None else seed,
        *problem.strides, *v.stride()[:3], *problem.sizes, reg, scale, *dropout_numbers(dropout_p, LOWEST_RANDOM),
        SOFTMAX=softmax, DROPOUT=dropout_p > 0., **problem.options)
    return out, empty_saved(q, iters)


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
    problem = _prepare(q, k, operands, reg, distance)
    v, grad_out = unit_stride(v), unit_stride(grad_out)

    # the iterations again; column potential t is the one that iteration t starts from
    row_potentials, column_potentials = _vectors(q, iters), _vectors(q, iters + 1)
    column_potentials[0].zero_()
    for t in range(iters):
        _half_iteration(problem, column_potentials[t], row_potentials[t], 1)
        _half_iteration(problem, row_potentials[t], column_potentials[t + 1], 0)
    largest, largest_i, largest_j = _largest(problem, row_potentials[-1], column_potentials[-1])

    seed = largest if seed is None else seed
    last = (row_potentials[-1], column_potentials[-1], largest, seed)
    strides = (*problem.strides, *v.stride()[:3], *grad_out.stride()[:3])
    numbers = (reg, scale, *dropout_numbers(dropout_p, LOWEST_RANDOM))
    options = dict(DROPOUT=dropout_p > 0., **problem.options)
    denominator, delta = _vectors(q), _vectors(q)
    if softmax:
        _softmax_sums_kernel[problem.grid](
            *problem.matrices, v, grad_out, *problem.vectors, *last, denominator, delta,
            *strides, *problem.sizes, *numbers, **options)

    grad_q, grad_k, grad_v = empty_gradients(q, operands)
    grad_rows, grad_columns, moment = _vectors(q), _vectors(q), _vectors(q)
    for axis, sums in ((1, grad_rows), (0, grad_columns)):
        _plan_gradient_kernel[problem.grid](
            *problem.matrices, v, grad_out, *problem.vectors, *last, denominator, delta, sums, moment, grad_v,
            *strides, *problem.sizes, *numbers, AXIS=axis, SOFTMAX=softmax, **options)
    # of the log-plan's largest entry: d(scaled) / d(largest) = -scaled / largest
    grad_largest = -moment.sum(dim=1) * (1. - largest)
    grad_rows.scatter_add_(1, largest_i.long()[:, None], grad_largest[:, None])
    grad_columns.scatter_add_(1, largest_j.long()[:, None], grad_largest[:, None])

    grad_row_potentials, grad_column_potentials = _vectors(q, iters), _vectors(q, iters)
    grad_column_potentials[-1] = grad_columns
    for t in reversed(range(iters)):
        _adjoint_kernel[problem.grid](
            *problem.matrices, *problem.vectors, row_potentials[t], column_potentials[t + 1],
            grad_column_potentials[t], grad_rows, grad_row_potentials[t],
            *problem.strides, *problem.sizes, reg, AXIS=1, INIT=t == iters - 1, **problem.options)
        if t > 0:
            _adjoint_kernel[problem.grid](
                *problem.matrices, *problem.vectors, row_potentials[t], column_potentials[t],
                grad_row_potentials[t], grad_rows, grad_column_potentials[t - 1],
                *problem.strides, *problem.sizes, reg, AXIS=0, INIT=False, **problem.options)

    # operands 'q' sums the gradients of both sides, in float32
    by_rows = empty_heads(q, torch.float32) if operands == 'q' else grad_q
    by_columns = grad_q if operands == 'q' else grad_k
    grad_max = _vectors(q)
    for axis, out in ((1, by_rows), (0, by_columns)):
        _cost_gradient_kernel[problem.grid](
            *problem.matrices, v, grad_out, *problem.vectors, problem.row_max_index,
            row_potentials, column_potentials, grad_row_potentials, grad_column_potentials,
            largest, largest_i, largest_j, grad_largest, seed, denominator, delta, grad_max, by_rows, out,
            *strides, *((1, H * D) if axis == 0 and operands == 'qkt' else (H * D, 1)),
            *problem.sizes, B * H, iters, *numbers,
            AXIS=axis, ADD=axis == 0 and operands == 'q', SOFTMAX=softmax, **options)
    return grad_q, grad_k, grad_v
