""" Attention by a transport plan with learned marginals for short sequences: Triton kernels made of parts of `onchip`

The formulas are those of `shares`. Kept for the backward pass are of each iteration the factors of the rows and the
inverse sums of the columns, of which those of the columns are made.
"""
from typing import Optional, Tuple

import torch
import triton
import triton.language as tl

from .onchip import (
    LOG2_E,
    LOWEST_RANDOM,
    _backward_config,
    _dropout_factor,
    _forward_config,
    _inverse,
    _load,
    _reciprocal,
    _store,
    _tiles,
    _truncated,
    empty_saved,
)
from .operands import dropout_numbers, empty_heads, unit_stride

__all__ = ['empty_saved', 'shares_forward', 'shares_backward']


@triton.jit
def _positive_inverse(x):
    """`_reciprocal`, and 0 for 0."""
    return tl.where(x == 0., 0., _reciprocal(x))


@triton.jit
def _cosines(x, y, PRECISION: tl.constexpr):
    """Cosines of the rows of x and y, and the inverse lengths of both, 0 of zero rows."""
    xx = tl.sum(x.to(tl.float32) * x.to(tl.float32), 1)
    yy = tl.sum(y.to(tl.float32) * y.to(tl.float32), 1)
    inv_x = _inverse(tl.sqrt(xx))
    inv_y = _inverse(tl.sqrt(yy))
    gram = tl.dot(x, tl.trans(y), input_precision=PRECISION)
    return gram * inv_x[:, None] * inv_y[None, :], inv_x, inv_y


@triton.jit
def _kernel(cosines, scale, N, EVEN: tl.constexpr, BLOCK_N: tl.constexpr):
    """exp((cosine - 1) scale), 0 in the padding."""
    kernel = tl.exp2((cosines - 1.) * (scale * LOG2_E))
    if EVEN:
        return kernel
    else:
        i = tl.arange(0, BLOCK_N)[:, None]
        j = tl.arange(0, BLOCK_N)[None, :]
        return tl.where((i < N) & (j < N), kernel, 0.)


@triton.jit
def _column_factors(shares, inverse_sums):
    b = shares * inverse_sums
    return b * _reciprocal(tl.sum(b, 0))


@triton.jit
def _shares(log_shares_ptr, problem, N, BLOCK_N: tl.constexpr):
    """The shares of a problem's tokens, 0 in the padding."""
    n = tl.arange(0, BLOCK_N)
    log_shares = tl.load(log_shares_ptr + problem.to(tl.int64) * N + n, mask=n < N, other=float('-inf'))
    return tl.exp2(log_shares * LOG2_E)


@triton.jit
def _weights(kernel, b):
    weights = kernel * b[None, :]
    return weights * _positive_inverse(tl.sum(weights, 1))[:, None]


@triton.jit(do_not_specialize=['N', 'iters', 'drop_below'])
def _forward_kernel(
        q_ptr, k_ptr, v_ptr, out_ptr, scale_ptr, log_shares_ptr, vectors_ptr, seed_ptr,
        stride_qb, stride_qh, stride_qn,
        stride_kb, stride_kh, stride_kn,
        stride_vb, stride_vh, stride_vn,
        H, N, D, iters, drop_below, keep_factor,
        DROPOUT: tl.constexpr,
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
    y = _load(k_ptr + batch * stride_kb + head * stride_kh, stride_kn, 1, N, D, EVEN, BLOCK_N, BLOCK_D)
    cosines, _, _ = _cosines(x, y, PRECISION)
    kernel = _kernel(cosines, tl.load(scale_ptr + head), N, EVEN, BLOCK_N)
    shares = _shares(log_shares_ptr, problem, N, BLOCK_N)

    vectors_ptr += problem.to(tl.int64) * iters * 2 * BLOCK_N
    b = tl.where(n < N, 1., 0.)
    for _ in range(iters):
        a = _positive_inverse(tl.sum(kernel * b[None, :], 1))
        inverse_sums = _positive_inverse(tl.sum(kernel * a[:, None], 0))
        tl.store(vectors_ptr + n, a)
        tl.store(vectors_ptr + BLOCK_N + n, inverse_sums)
        vectors_ptr += 2 * BLOCK_N
        b = _column_factors(shares, inverse_sums)

    weights = _weights(kernel, b)
    if DROPOUT:
        weights *= _dropout_factor(seed_ptr, problem, drop_below, keep_factor, BLOCK_N)
    v = _load(v_ptr + batch * stride_vb + head * stride_vh, stride_vn, 1, N, D, EVEN, BLOCK_N, BLOCK_D)
    out = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    _store(out_ptr + (batch * N * H + head) * D, out, H * D, 1, N, D, EVEN, BLOCK_N, BLOCK_D)


@triton.jit(do_not_specialize=['N', 'iters', 'drop_below'])
def _backward_kernel(
        q_ptr, k_ptr, v_ptr, grad_out_ptr, scale_ptr, log_shares_ptr, vectors_ptr, seed_ptr,
        grad_q_ptr, grad_k_ptr, grad_v_ptr, grad_scale_ptr, grad_log_shares_ptr,
        stride_qb, stride_qh, stride_qn,
        stride_kb, stride_kh, stride_kn,
        stride_vb, stride_vh, stride_vn,
        stride_ob, stride_oh, stride_on,
        H, N, D, iters, drop_below, keep_factor,
        DROPOUT: tl.constexpr,
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

    # the matrices of the forward pass, from its last vectors
    x = _load(q_ptr, stride_qn, 1, N, D, EVEN, BLOCK_N, BLOCK_D)
    y = _load(k_ptr, stride_kn, 1, N, D, EVEN, BLOCK_N, BLOCK_D)
    cosines, _, _ = _cosines(x, y, PRECISION)
    scale = tl.load(scale_ptr + head)
    kernel = _kernel(cosines, scale, N, EVEN, BLOCK_N)
    shares = _shares(log_shares_ptr, problem, N, BLOCK_N)
    ones = tl.where(n < N, 1., 0.)
    vectors_ptr += (problem.to(tl.int64) + 1) * iters * 2 * BLOCK_N - 2 * BLOCK_N
    b = ones
    inverse_sums = ones
    if iters > 0:
        inverse_sums = tl.load(vectors_ptr + BLOCK_N + n)
        b = _column_factors(shares, inverse_sums)
    weights = _weights(kernel, b)

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

    # weights = K b, each row divided by its sum; then the iterations backwards
    grad = weights * (grad - tl.sum(weights * grad, 1)[:, None])
    grad_b = tl.sum(grad, 0)
    grad_log_shares = tl.zeros([BLOCK_N], tl.float32)
    for t in range(iters):
        first = t + 1 == iters
        a = tl.load(vectors_ptr + n)
        vectors_ptr -= 2 * BLOCK_N
        before = tl.load(vectors_ptr + BLOCK_N + n, mask=t + 1 < iters, other=1.)
        b_before = tl.where(first, ones, _column_factors(shares, before))
        grad_log_shares += grad_b
        column = grad_b * inverse_sums
        row = -(a * tl.sum(kernel * column[None, :], 1)) * a  # in this order: a * a may be too large
        grad_b = -b_before * tl.sum(kernel * row[:, None], 0)
        grad -= kernel * (a[:, None] * column[None, :] + row[:, None] * b_before[None, :])
        inverse_sums = before
    tl.store(grad_log_shares_ptr + problem.to(tl.int64) * N + n, grad_log_shares, mask=n < N)

    # log K = (cosine - 1) scale; the tiles are read again rather than kept in registers all the way
    x = _load(q_ptr, stride_qn, 1, N, D, EVEN, BLOCK_N, BLOCK_D)
    y = _load(k_ptr, stride_kn, 1, N, D, EVEN, BLOCK_N, BLOCK_D)
    cosines, inv_x, inv_y = _cosines(x, y, PRECISION)
    tl.store(grad_scale_ptr + problem, tl.sum(tl.sum(grad * (cosines - 1.), 1), 0))
    grad *= scale
    grad = grad * inv_x[:, None] * inv_y[None, :]
    if x.dtype == tl.float16:
        # 1 / length leaves the range of float16: tensor cores in tf32, which holds float16 exactly
        x = x.to(tl.float32)
        y = y.to(tl.float32)
        rounded = _truncated(grad)
    else:
        rounded = grad.to(x.dtype)
    # of the rounded entries: what is subtracted below cancels term by term
    along = rounded.to(tl.float32) * cosines
    pull_x = inv_x * tl.sum(along * _inverse(inv_y)[None, :], 1)
    pull_y = inv_y * tl.sum(along * _inverse(inv_x)[:, None], 0)
    grad_x = tl.dot(rounded, y, input_precision=PRECISION) - pull_x[:, None] * x.to(tl.float32)
    _store(grad_q_ptr + grad_offset, grad_x, H * D, 1, N, D, EVEN, BLOCK_N, BLOCK_D)
    grad_y = tl.dot(tl.trans(rounded), x, input_precision=PRECISION) - pull_y[:, None] * y.to(tl.float32)
    _store(grad_k_ptr + grad_offset, grad_y, H * D, 1, N, D, EVEN, BLOCK_N, BLOCK_D)


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
    """Output (B, H, N, D) for N <= 128, arguments as `shares.fused_shares_attention`, and what the backward pass needs:
    the factors of the rows and the inverse sums of the columns, (B * H, iters, 2, padded N) in float32.
    """
    B, H, N, D = q.shape
    options = _tiles(q, dropout_p)
    q, k, v = map(unit_stride, (q, k, v))
    out, vectors = empty_heads(q), empty_saved(q, iters)
    config = _forward_config(options['BLOCK_N'], options['BLOCK_D'], q.dtype)
    _forward_kernel[(B * H,)](
        q, k, v, out, scale.contiguous(), log_shares.contiguous(), vectors, vectors if seed is None else seed,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        H, N, D, iters, *dropout_numbers(dropout_p, LOWEST_RANDOM),
        **options, **config,
    )
    return out, vectors


def shares_backward(
        grad_out: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: torch.Tensor,
        log_shares: torch.Tensor,
        vectors: torch.Tensor,
        iters: int,
        dropout_p: float,
        seed: Optional[torch.Tensor],
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients for q, k and v, in their dtype, the scale by problem, (B, H), and the logarithms of the shares."""
    B, H, N, D = q.shape
    options = _tiles(q, dropout_p)
    q, k, v, grad_out = map(unit_stride, (q, k, v, grad_out))
    grads = [empty_heads(q) for _ in range(3)]
    grad_scale, grad_log_shares = scale.new_empty(B, H), log_shares.new_empty(B, H, N)
    config = _backward_config(options['BLOCK_N'], options['BLOCK_D'], q.dtype)
    _backward_kernel[(B * H,)](
        q, k, v, grad_out, scale.contiguous(), log_shares.contiguous(), vectors, vectors if seed is None else seed,
        *grads, grad_scale, grad_log_shares,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad_out.stride()[:3],
        H, N, D, iters, *dropout_numbers(dropout_p, LOWEST_RANDOM),
        **options, **config,
    )
    return *grads, grad_scale, grad_log_shares
