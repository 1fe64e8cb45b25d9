""" Attention by a transport plan with learned marginals for long sequences: Triton kernels in the manner of `streamed`

The formulas are those of `shares`. Each half-iteration is one pass over the tiles of the kernel matrix. Row factors are
those of column factors b of sum 1, and inverse sums of the columns those of row factors of sum 1: a sum of either is a
mean of entries of the kernel, whatever the shares, so the factors lie between 1 and the kernel's span, exp(2 scale),
and no logarithm is taken. Nothing but the inputs is kept for the backward pass.

A tile is always [queries, keys]. AXIS = 1: a program owns a block of queries and runs over the keys; AXIS = 0: it owns
a block of keys and runs over the queries.
"""
from typing import Dict, NamedTuple, Optional, Tuple

import torch
import triton
import triton.language as tl

from .onchip import LOG2_E, LOWEST_RANDOM, _inverse, _truncated
from .operands import dropout_numbers, empty_heads, unit_stride
from .streamed import BLOCK, _dropout_factor, _load, _place, _store, _vector, empty_saved, tile_options

__all__ = ['empty_saved', 'shares_forward', 'shares_backward']


@triton.jit
def _cosines(x, y, inv_x, inv_y, PRECISION: tl.constexpr):
    """Cosines of the rows of x and y with inverse lengths inv_x and inv_y."""
    return tl.dot(x, tl.trans(y), input_precision=PRECISION) * inv_x[:, None] * inv_y[None, :]


@triton.jit
def _kernel(cosines, scale):
    """exp((cosine - 1) scale). In the padding, where it is not 0, all that it is multiplied with is."""
    return tl.exp2((cosines - 1.) * (scale * LOG2_E))


@triton.jit
def _product(
        x_ptr, y_ptr, inv_x_ptr, inv_y_ptr, scale_ptr, weights_ptr,
        stride_xb, stride_xh, stride_xn,
        stride_yb, stride_yh, stride_yn,
        H, N, D,
        AXIS: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK: tl.constexpr,
        BLOCK_D: tl.constexpr,
):
    """Sums of kernel * weights along AXIS for this program's block, and the sum of the weights; where the block is in a
    vector of all problems, and which of its entries are there.
    """
    problem, own_start = _place(N, BLOCK)
    head = problem % H
    x_ptr += (problem // H).to(tl.int64) * stride_xb + head.to(tl.int64) * stride_xh
    y_ptr += (problem // H).to(tl.int64) * stride_yb + head.to(tl.int64) * stride_yh
    vectors = problem.to(tl.int64) * N
    scale = tl.load(scale_ptr + head)
    own = own_start + tl.arange(0, BLOCK)
    i = own
    j = own
    if AXIS == 1:
        x = _load(x_ptr, i, stride_xn, 1, N, D, BLOCK_D)
        inv_x = _vector(inv_x_ptr + vectors, i, N)
    else:
        y = _load(y_ptr, j, stride_yn, 1, N, D, BLOCK_D)
        inv_y = _vector(inv_y_ptr + vectors, j, N)
    product = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        other = start + tl.arange(0, BLOCK)
        if AXIS == 1:
            j = other
            y = _load(y_ptr, j, stride_yn, 1, N, D, BLOCK_D)
            inv_y = _vector(inv_y_ptr + vectors, j, N)
        else:
            i = other
            x = _load(x_ptr, i, stride_xn, 1, N, D, BLOCK_D)
            inv_x = _vector(inv_x_ptr + vectors, i, N)
        weights = _vector(weights_ptr + vectors, other, N)
        kernel = _kernel(_cosines(x, y, inv_x, inv_y, PRECISION), scale)
        product += tl.sum(kernel * tl.expand_dims(weights, 1 - AXIS), AXIS)
        total += tl.sum(weights, 0)
    return product, total, vectors + own, own < N


@triton.jit
def _factors_kernel(
        x_ptr, y_ptr, inv_x_ptr, inv_y_ptr, scale_ptr, weights_ptr, out_ptr,
        stride_xb, stride_xh, stride_xn,
        stride_yb, stride_yh, stride_yn,
        H, N, D,
        AXIS: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK: tl.constexpr,
        BLOCK_D: tl.constexpr,
):
    """A half-iteration: 1 / mean of the kernel along AXIS by the weights."""
    product, total, at, inside = _product(
        x_ptr, y_ptr, inv_x_ptr, inv_y_ptr, scale_ptr, weights_ptr, stride_xb, stride_xh, stride_xn,
        stride_yb, stride_yh, stride_yn, H, N, D, AXIS, PRECISION, BLOCK, BLOCK_D)
    tl.store(out_ptr + at, total / product, mask=inside)


@triton.jit
def _adjoint_kernel(
        x_ptr, y_ptr, inv_x_ptr, inv_y_ptr, scale_ptr, grad_ptr, normalized_ptr, factor_ptr, out_ptr,
        stride_xb, stride_xh, stride_xn,
        stride_yb, stride_yh, stride_yn,
        H, N, D,
        AXIS: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK: tl.constexpr,
        BLOCK_D: tl.constexpr,
):
    """A half-iteration backwards: out = -normalized (sum of kernel * grad along AXIS) factor."""
    product, _, at, inside = _product(
        x_ptr, y_ptr, inv_x_ptr, inv_y_ptr, scale_ptr, grad_ptr, stride_xb, stride_xh, stride_xn,
        stride_yb, stride_yh, stride_yn, H, N, D, AXIS, PRECISION, BLOCK, BLOCK_D)
    normalized = tl.load(normalized_ptr + at, mask=inside, other=0.)
    tl.store(out_ptr + at, -product * normalized * tl.load(factor_ptr + at, mask=inside, other=0.), mask=inside)


@triton.jit(do_not_specialize=['drop_below'])
def _output_kernel(
        x_ptr, y_ptr, inv_x_ptr, inv_y_ptr, scale_ptr, value_ptr, out_ptr, a_ptr, b_ptr, seed_ptr,
        stride_xb, stride_xh, stride_xn,
        stride_yb, stride_yh, stride_yn,
        stride_vb, stride_vh, stride_vn,
        H, N, D, drop_below, keep_factor,
        DROPOUT: tl.constexpr,
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
    scale = tl.load(scale_ptr + head)
    i = own_start + tl.arange(0, BLOCK)
    x = _load(x_ptr, i, stride_xn, 1, N, D, BLOCK_D)
    inv_x = _vector(inv_x_ptr + vectors, i, N)
    a = _vector(a_ptr + vectors, i, N)
    out = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for start in range(0, N, BLOCK):
        j = start + tl.arange(0, BLOCK)
        y = _load(y_ptr, j, stride_yn, 1, N, D, BLOCK_D)
        cosines = _cosines(x, y, inv_x, _vector(inv_y_ptr + vectors, j, N), PRECISION)
        weights = _kernel(cosines, scale) * a[:, None] * _vector(b_ptr + vectors, j, N)[None, :]
        if DROPOUT:
            weights *= _dropout_factor(seed_ptr, problem, i, start, drop_below, keep_factor, BLOCK, BLOCK)
        value = _load(value_ptr, j, stride_vn, 1, N, D, BLOCK_D)
        out += tl.dot(weights.to(value.dtype), value, input_precision=PRECISION)
    _store(out_ptr + (batch * N * H + head) * D, out, i, H * D, 1, N, D, BLOCK_D)


@triton.jit(do_not_specialize=['drop_below'])
def _row_sums_kernel(
        x_ptr, y_ptr, inv_x_ptr, inv_y_ptr, scale_ptr, value_ptr, grad_out_ptr, b_ptr, seed_ptr, a_ptr, delta_ptr,
        stride_xb, stride_xh, stride_xn,
        stride_yb, stride_yh, stride_yn,
        stride_vb, stride_vh, stride_vn,
        stride_ob, stride_oh, stride_on,
        H, N, D, drop_below, keep_factor,
        DROPOUT: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK: tl.constexpr,
        BLOCK_D: tl.constexpr,
):
    """For each row its factor in the weights, and the sum of its weights times their gradients."""
    problem, own_start = _place(N, BLOCK)
    batch = (problem // H).to(tl.int64)
    head = (problem % H).to(tl.int64)
    x_ptr += batch * stride_xb + head * stride_xh
    y_ptr += batch * stride_yb + head * stride_yh
    value_ptr += batch * stride_vb + head * stride_vh
    grad_out_ptr += batch * stride_ob + head * stride_oh
    vectors = problem.to(tl.int64) * N
    scale = tl.load(scale_ptr + head)
    i = own_start + tl.arange(0, BLOCK)
    x = _load(x_ptr, i, stride_xn, 1, N, D, BLOCK_D)
    inv_x = _vector(inv_x_ptr + vectors, i, N)
    grad_out = _load(grad_out_ptr, i, stride_on, 1, N, D, BLOCK_D)
    total = tl.zeros([BLOCK], tl.float32)
    delta = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        j = start + tl.arange(0, BLOCK)
        y = _load(y_ptr, j, stride_yn, 1, N, D, BLOCK_D)
        cosines = _cosines(x, y, inv_x, _vector(inv_y_ptr + vectors, j, N), PRECISION)
        weights = _kernel(cosines, scale) * _vector(b_ptr + vectors, j, N)[None, :]
        total += tl.sum(weights, 1)
        if DROPOUT:
            weights *= _dropout_factor(seed_ptr, problem, i, start, drop_below, keep_factor, BLOCK, BLOCK)
        value = _load(value_ptr, j, stride_vn, 1, N, D, BLOCK_D)
        delta += tl.sum(weights * tl.dot(grad_out, tl.trans(value), input_precision=PRECISION), 1)
    total = tl.where(i < N, total, 1.)
    tl.store(a_ptr + vectors + i, 1. / total, mask=i < N)
    tl.store(delta_ptr + vectors + i, delta / total, mask=i < N)


@triton.jit
def _tile_gradients(
        kernel, a, b, delta, value, grad_out, i, j_start, seed_ptr, problem, drop_below, keep_factor,
        DROPOUT: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK: tl.constexpr,
):
    """Dropped-out weights, and the gradient of the logarithms of the weights."""
    weights = kernel * a[:, None] * b[None, :]
    grad = tl.dot(grad_out, tl.trans(value), input_precision=PRECISION)
    dropped = weights
    if DROPOUT:
        factor = _dropout_factor(seed_ptr, problem, i, j_start, drop_below, keep_factor, BLOCK, BLOCK)
        dropped = weights * factor
        grad *= factor
    return dropped, weights * (grad - delta[:, None])


@triton.jit(do_not_specialize=['drop_below'])
def _value_gradient_kernel(
        x_ptr, y_ptr, inv_x_ptr, inv_y_ptr, scale_ptr, value_ptr, grad_out_ptr, a_ptr, b_ptr, delta_ptr, seed_ptr,
        grad_value_ptr, grad_b_ptr,
        stride_xb, stride_xh, stride_xn,
        stride_yb, stride_yh, stride_yn,
        stride_vb, stride_vh, stride_vn,
        stride_ob, stride_oh, stride_on,
        H, N, D, drop_below, keep_factor,
        DROPOUT: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK: tl.constexpr,
        BLOCK_D: tl.constexpr,
):
    """Gradients of the values, and of the logarithms of the last column factors."""
    problem, own_start = _place(N, BLOCK)
    batch = (problem // H).to(tl.int64)
    head = (problem % H).to(tl.int64)
    x_ptr += batch * stride_xb + head * stride_xh
    y_ptr += batch * stride_yb + head * stride_yh
    value_ptr += batch * stride_vb + head * stride_vh
    grad_out_ptr += batch * stride_ob + head * stride_oh
    vectors = problem.to(tl.int64) * N
    scale = tl.load(scale_ptr + head)
    j = own_start + tl.arange(0, BLOCK)
    y = _load(y_ptr, j, stride_yn, 1, N, D, BLOCK_D)
    inv_y = _vector(inv_y_ptr + vectors, j, N)
    value = _load(value_ptr, j, stride_vn, 1, N, D, BLOCK_D)
    b = _vector(b_ptr + vectors, j, N)
    grad_b = tl.zeros([BLOCK], tl.float32)
    grad_value = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for start in range(0, N, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = _load(x_ptr, i, stride_xn, 1, N, D, BLOCK_D)
        grad_out = _load(grad_out_ptr, i, stride_on, 1, N, D, BLOCK_D)
        kernel = _kernel(_cosines(x, y, _vector(inv_x_ptr + vectors, i, N), inv_y, PRECISION), scale)
        dropped, grad = _tile_gradients(
            kernel, _vector(a_ptr + vectors, i, N), b, _vector(delta_ptr + vectors, i, N), value, grad_out,
            i, own_start, seed_ptr, problem, drop_below, keep_factor, DROPOUT, PRECISION, BLOCK)
        grad_b += tl.sum(grad, 0)
        grad_value += tl.dot(tl.trans(dropped.to(grad_out.dtype)), grad_out, input_precision=PRECISION)
    tl.store(grad_b_ptr + vectors + j, grad_b, mask=j < N)
    _store(grad_value_ptr + (batch * N * H + head) * D, grad_value, j, H * D, 1, N, D, BLOCK_D)


@triton.jit(do_not_specialize=['problems', 'iters', 'drop_below'])
def _cosine_gradient_kernel(
        x_ptr, y_ptr, inv_x_ptr, inv_y_ptr, scale_ptr, value_ptr, grad_out_ptr, a_ptr, b_ptr, delta_ptr, seed_ptr,
        all_a_ptr, all_b_ptr, row_ptr, column_ptr, out_ptr, grad_scale_ptr,
        stride_xb, stride_xh, stride_xn,
        stride_yb, stride_yh, stride_yn,
        stride_vb, stride_vh, stride_vn,
        stride_ob, stride_oh, stride_on,
        H, N, D, problems, iters, drop_below, keep_factor,
        AXIS: tl.constexpr,
        DROPOUT: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK: tl.constexpr,
        BLOCK_D: tl.constexpr,
):
    """Gradient of the queries (AXIS = 1), and with it what each has in that of the scale; or of the keys (AXIS = 0)."""
    problem, own_start = _place(N, BLOCK)
    batch = (problem // H).to(tl.int64)
    head = (problem % H).to(tl.int64)
    x_ptr += batch * stride_xb + head * stride_xh
    y_ptr += batch * stride_yb + head * stride_yh
    value_ptr += batch * stride_vb + head * stride_vh
    grad_out_ptr += batch * stride_ob + head * stride_oh
    vectors = problem.to(tl.int64) * N
    iteration = problems.to(tl.int64) * N  # from one iteration's vectors to the next
    scale = tl.load(scale_ptr + head)
    own = own_start + tl.arange(0, BLOCK)
    pull = tl.zeros([BLOCK], tl.float32)
    out = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    if AXIS == 1:
        x = _load(x_ptr, own, stride_xn, 1, N, D, BLOCK_D)
        grad_out = _load(grad_out_ptr, own, stride_on, 1, N, D, BLOCK_D)
        grad_scale = tl.zeros([BLOCK], tl.float32)
    else:
        y = _load(y_ptr, own, stride_yn, 1, N, D, BLOCK_D)
        value = _load(value_ptr, own, stride_vn, 1, N, D, BLOCK_D)
    for start in range(0, N, BLOCK):
        other = start + tl.arange(0, BLOCK)
        if AXIS == 1:
            i = own
            j = other
            j_start = start
            y = _load(y_ptr, j, stride_yn, 1, N, D, BLOCK_D)
            value = _load(value_ptr, j, stride_vn, 1, N, D, BLOCK_D)
        else:
            i = other
            j = own
            j_start = own_start
            x = _load(x_ptr, i, stride_xn, 1, N, D, BLOCK_D)
            grad_out = _load(grad_out_ptr, i, stride_on, 1, N, D, BLOCK_D)
        inv_x = _vector(inv_x_ptr + vectors, i, N)
        inv_y = _vector(inv_y_ptr + vectors, j, N)
        cosines = _cosines(x, y, inv_x, inv_y, PRECISION)
        kernel = _kernel(cosines, scale)

        # of the logarithm of the kernel
        _, grad = _tile_gradients(
            kernel, _vector(a_ptr + vectors, i, N), _vector(b_ptr + vectors, j, N), _vector(delta_ptr + vectors, i, N),
            value, grad_out, i, j_start, seed_ptr, problem, drop_below, keep_factor, DROPOUT, PRECISION, BLOCK)
        for t in range(iters):
            at = t * iteration + vectors
            grad -= kernel * (
                _vector(all_a_ptr + at, i, N)[:, None] * _vector(column_ptr + at, j, N)[None, :]
                + _vector(row_ptr + at, i, N)[:, None] * _vector(all_b_ptr + at, j, N)[None, :])

        # of the cosines
        if AXIS == 1:
            grad_scale += tl.sum(grad * (cosines - 1.), 1)
        grad *= scale
        grad *= inv_x[:, None] * inv_y[None, :]
        moving = y if AXIS == 1 else x
        if moving.dtype == tl.float16:
            # 1 / length leaves the range of float16: tensor cores in tf32, which holds float16 exactly
            rounded = _truncated(grad)
            moving = moving.to(tl.float32)
        else:
            rounded = grad.to(moving.dtype)
        # of the rounded entries: what is subtracted below cancels term by term
        lengths = _inverse(inv_y)[None, :] if AXIS == 1 else _inverse(inv_x)[:, None]
        pull += tl.sum(rounded.to(tl.float32) * cosines * lengths, AXIS)
        if AXIS == 1:
            out += tl.dot(rounded, moving, input_precision=PRECISION)
        else:
            out += tl.dot(tl.trans(rounded), moving, input_precision=PRECISION)

    if AXIS == 1:
        tl.store(grad_scale_ptr + vectors + own, grad_scale, mask=own < N)
    inv_length = _vector((inv_x_ptr if AXIS == 1 else inv_y_ptr) + vectors, own, N)
    fixed = (x if AXIS == 1 else y).to(tl.float32)
    out -= (pull * inv_length)[:, None] * fixed
    _store(out_ptr + (batch * N * H + head) * D, out, own, H * D, 1, N, D, BLOCK_D)


class _Problem(NamedTuple):
    """What every pass needs."""
    x: torch.Tensor
    y: torch.Tensor
    inv_x: torch.Tensor  # 1 / lengths of the rows, (B * H, N)
    inv_y: torch.Tensor
    scale: torch.Tensor
    grid: Tuple[int]
    options: Dict[str, object]

    @property
    def tensors(self) -> Tuple[torch.Tensor, ...]:
        return self[:5]

    @property
    def strides(self) -> Tuple[int, ...]:
        return *self.x.stride()[:3], *self.y.stride()[:3]

    @property
    def sizes(self) -> Tuple[int, int, int]:
        return tuple(self.x.shape[1:])

    def vectors(self, *leading: int) -> torch.Tensor:
        """Room for a number of each row or column."""
        return self.inv_x.new_empty(*leading, *self.inv_x.shape)


def _inverse_lengths(x: torch.Tensor) -> torch.Tensor:
    """1 / lengths of the rows, 0 of zero rows, (B, H, N, D) -> (B * H, N) in float32."""
    lengths = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).flatten(0, 1)
    return torch.where(lengths == 0., lengths, 1. / lengths)


def _prepare(q: torch.Tensor, k: torch.Tensor, scale: torch.Tensor) -> _Problem:
    B, H, N, D = q.shape
    return _Problem(
        unit_stride(q), unit_stride(k), _inverse_lengths(q), _inverse_lengths(k), scale.contiguous(),
        (triton.cdiv(N, BLOCK) * B * H,), tile_options(q))


def _normalize(weights: torch.Tensor) -> torch.Tensor:
    return weights / weights.sum(dim=-1, keepdim=True)


def _half_iteration(problem: _Problem, weights: torch.Tensor, out: torch.Tensor, axis: int) -> None:
    _factors_kernel[problem.grid](
        *problem.tensors, weights, out, *problem.strides, *problem.sizes, AXIS=axis, **problem.options)


def _iterate(problem: _Problem, shares: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Row factors and inverse sums of the columns of each iteration, into `rows` and `columns`; then the last column
    factors, of sum 1.
    """
    b = torch.ones_like(shares)
    for a, inverse_sums in zip(rows, columns):
        _half_iteration(problem, b, a, 1)
        _half_iteration(problem, a, inverse_sums, 0)
        b = shares * inverse_sums
    return _normalize(b)


def _flat_shares(log_shares: torch.Tensor) -> torch.Tensor:
    return log_shares.exp().flatten(0, 1).contiguous()


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
    """Output (B, H, N, D) for any N, arguments as `shares.fused_shares_attention`, and a tensor without elements, as
    nothing is kept for the backward pass.
    """
    problem = _prepare(q, k, scale)
    v = unit_stride(v)
    # one vector each is enough here: an iteration reads what it then replaces, in passes one after the other
    rows, columns = problem.vectors(), problem.vectors()
    b = _iterate(problem, _flat_shares(log_shares), rows.expand(iters, -1, -1), columns.expand(iters, -1, -1))
    _half_iteration(problem, b, rows, 1)
    out = empty_heads(q)
    _output_kernel[problem.grid](
        *problem.tensors, v, out, rows, b, rows if seed is None else seed,
        *problem.strides, *v.stride()[:3], *problem.sizes, *dropout_numbers(dropout_p, LOWEST_RANDOM),
        DROPOUT=dropout_p > 0., **problem.options)
    return out, empty_saved(q, iters)


def shares_backward(
        grad_out: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: torch.Tensor,
        log_shares: torch.Tensor,
        saved: torch.Tensor,
        iters: int,
        dropout_p: float,
        seed: Optional[torch.Tensor],
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients for q, k and v, in their dtype, the scale by problem, (B, H), and the logarithms of the shares."""
    B, H, N, D = q.shape
    problem = _prepare(q, k, scale)
    v, grad_out = unit_stride(v), unit_stride(grad_out)

    # the iterations again
    shares = _flat_shares(log_shares)
    rows, columns = problem.vectors(iters), problem.vectors(iters)
    b = _iterate(problem, shares, rows, columns)

    # what all later passes read
    a, delta = problem.vectors(), problem.vectors()
    seed = a if seed is None else seed
    strides = (*problem.strides, *v.stride()[:3], *grad_out.stride()[:3])
    numbers = dropout_numbers(dropout_p, LOWEST_RANDOM)
    options = dict(DROPOUT=dropout_p > 0., **problem.options)
    _row_sums_kernel[problem.grid](
        *problem.tensors, v, grad_out, b, seed, a, delta, *strides, *problem.sizes, *numbers, **options)
    last = (*problem.tensors, v, grad_out, a, b, delta, seed)
    grads = [empty_heads(q) for _ in range(3)]
    grad_b = problem.vectors()
    _value_gradient_kernel[problem.grid](
        *last, grads[2], grad_b, *strides, *problem.sizes, *numbers, **options)

    # the iterations backwards: `column` and `row` of the formulas
    row, column = problem.vectors(iters), problem.vectors(iters)
    all_a, all_b = _normalize(rows), problem.vectors(iters)
    if iters:
        all_b[0] = 1. / N
        all_b[1:] = _normalize(shares * columns[:-1])
        column[-1] = grad_b * columns[-1]
    for t in reversed(range(iters)):
        _adjoint_kernel[problem.grid](
            *problem.tensors, column[t], all_a[t], rows[t], row[t],
            *problem.strides, *problem.sizes, AXIS=1, **problem.options)
        if t > 0:
            _adjoint_kernel[problem.grid](
                *problem.tensors, row[t], all_b[t], columns[t - 1], column[t - 1],
                *problem.strides, *problem.sizes, AXIS=0, **problem.options)

    grad_scale = problem.vectors()
    for axis, grad in ((1, grads[0]), (0, grads[1])):
        _cosine_gradient_kernel[problem.grid](
            *last, all_a, all_b, row, column, grad, grad_scale,
            *strides, *problem.sizes, B * H, iters, *numbers, AXIS=axis, **options)
    return *grads, grad_scale.sum(-1).view(B, H), (column / columns).sum(0).view(B, H, N)
