""" The loops of `cpu`, `cpu_shares` and `sinkhorn`, compiled by numba: one problem after another, its matrices in cache

Importing this module needs numba. The first call compiles (seconds) and numba keeps the result next to this file or in
the user's cache folder; where neither is writable, every process compiles anew. What numba keeps it takes to be of this
version as long as this file is unchanged: what is compiled into the loops has to stand in here too.

Matrices of a problem are scratch arrays padded with zeros to a multiple of 16 in both directions, which is what the
tiles below read and write, unless an operand or a result needs neither padding nor conversion: then it stays where it
is. Queries, keys, values, outputs and their gradients are float32, or bfloat16 as its bits. Of attention, `N` counts
points, `R` and `W` are N and the width padded; a log-kernel is N x M, padded to R x W.
"""
import math
import os

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.lib.stride_tricks import as_strided

__all__ = [
    'attention_forward',
    'attention_backward',
    'shares_forward',
    'shares_backward',
    'sinkhorn_forward',
    'sinkhorn_backward',
]

LANES = 16
FLOAT_SIZE = 4  # bytes
# A tile of this size is accumulated in registers, which are 32 with AVX-512 and half as many and as wide with AVX2.
TILE_ROWS = 4
if llvmlite.binding.get_host_cpu_features().get('avx512f'):
    TILE_COLUMNS = dict(dot=64, distance=64, pull=32)
else:
    TILE_COLUMNS = dict(dot=16, distance=16, pull=16)

ZERO, HALF, ONE = np.float32(0.), np.float32(0.5), np.float32(1.)
INFINITY, NAN = np.float32(math.inf), np.float32(math.nan)
MASKED = np.float32(-1e30)  # a logarithm of 0 that differences do not turn into NaN
LOWEST_LOG = np.float32(-1e38)
NEGLIGIBLE_COSINE = np.float32(16. * 2. ** -46)  # as transform.negligible_cosine
LOG2_E, LN_2 = np.float32(math.log2(math.e)), np.float32(math.log(2))

# The scaling form carries a log-kernel as long as the scaling vectors of its columns stay in this range; those of the
# rows then do too, as the largest entry of a row is 1. What the kernel loses, below 2^-126, is less than 2^-66 of a
# plan, and products with a gradient of 1e-19 to 1e19 stay in the range of float32.
LEAST_SCALING, MOST_SCALING = np.float32(2. ** -30), np.float32(2. ** 30)


def _jit(**kwargs):
    """numba.njit for a function that becomes a part of its callers, which alone are kept on disk.

    A call that is left would be linked with other code when the caller comes from the disk than when it was compiled,
    and the results would differ in the last bit.
    """
    return numba.njit(nogil=True, forceinline=True, **kwargs)


def _kept(**kwargs):
    """numba.njit with compiled code kept on disk where that is possible."""
    def decorate(function):
        try:
            compiled = numba.njit(nogil=True, cache=True, **kwargs)(function)
        except RuntimeError:  # no writable folder
            return numba.njit(nogil=True, **kwargs)(function)
        _pass_over_failures(compiled._cache)
        return compiled
    return decorate


def _pass_over_failures(cache):
    """Have numba compile anew where its files cannot be read, and go on where they cannot be written.

    It raises what it meets: a full disk, a file that is empty after a crash, or another user's. Without the index,
    which may also name a file that was not replaced any more, the next save puts right what is there.
    """
    def passed_over(method):
        def attempt(*args, **kwargs):
            try:
                return method(*args, **kwargs)
            except Exception:
                try:
                    os.remove(cache._cache_file._index_path)
                except Exception:
                    cache.disable()
                return None
        return attempt

    cache.load_overload, cache.save_overload = passed_over(cache.load_overload), passed_over(cache.save_overload)


# Sums may be taken in any order.
_reordered = _jit(fastmath={'reassoc', 'contract', 'nsz', 'arcp'}, error_model='numpy')

# Comparisons, too, do not expect NaNs: whatever may hold them goes through `_all_finite` first.
_fast = _jit(fastmath={'reassoc', 'contract', 'nsz', 'arcp', 'nnan'}, error_model='numpy')


# Products

def _product(kind: str):
    """A function for c[i, j] = sum over k < depth of a product of a[i, k] and b[k, j].

    The product is a b for 'dot', (a - b)^2 for 'distance' and a (x[i, j] - b) for 'pull'. `a` has any strides, the
    others have contiguous rows; `rows` is a multiple of TILE_ROWS and `columns` of LANES.

    LLVM's vectorizer does not find this form by itself, it keeps no tile in registers; and a library's product of two
    matrices takes twice the time at 64 x 64. The order of the sum is that of k in every element, so that equal rows
    have equal products, and a distance of exactly 0.
    """
    vector = ir.VectorType(ir.FloatType(), LANES)
    undefined = ir.Constant(vector, ir.Undefined)
    nothing = ir.Constant(vector, [0.] * LANES)
    first_lane = ir.Constant(ir.IntType(32), 0)
    every_lane = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    fused = dict(flags=('contract',))  # multiplication and addition in one instruction

    def tile(builder, a, b, c, x, i, j, depth, columns):
        """One tile: TILE_ROWS x `columns` sums in registers."""
        def number(value):
            return ir.Constant(i.type, value)

        def pointer(array, row, column, pointee):
            stride_row, stride_column = cgutils.unpack_tuple(builder, array.strides, 2)
            offset = builder.add(builder.mul(row, stride_row), builder.mul(column, stride_column))
            address = builder.add(builder.ptrtoint(array.data, offset.type), offset)
            return builder.inttoptr(address, pointee.as_pointer())

        def vectors(array, row):
            return [
                builder.load(pointer(array, row, builder.add(j, number(w)), vector), align=4)
                for w in range(0, columns, LANES)]

        rows = [builder.add(i, number(r)) for r in range(TILE_ROWS)]
        sums = [[cgutils.alloca_once(builder, vector) for _ in range(0, columns, LANES)] for _ in rows]
        for cell in (cell for row in sums for cell in row):
            builder.store(nothing, cell)
        fixed = [vectors(x, row) for row in rows] if kind == 'pull' else None
        with cgutils.for_range(builder, depth) as loop:
            others = vectors(b, loop.index)
            for r, row in enumerate(rows):
                scalar = builder.load(pointer(a, row, loop.index, ir.FloatType()), align=4)
                scalar = builder.insert_element(undefined, scalar, first_lane)
                scalar = builder.shuffle_vector(scalar, undefined, every_lane)
                for w, other in enumerate(others):
                    left = scalar
                    if kind == 'distance':
                        left = other = builder.fsub(left, other)
                    elif kind == 'pull':
                        other = builder.fsub(fixed[r][w], other)
                    product = builder.fmul(left, other, **fused)
                    builder.store(builder.fadd(builder.load(sums[r][w]), product, **fused), sums[r][w])
        for r, row in enumerate(rows):
            for w, cell in enumerate(sums[r]):
                target = pointer(c, row, builder.add(j, number(w * LANES)), vector)
                builder.store(builder.load(cell), target, align=4)

    @intrinsic
    def product(context, a, b, c, x, rows, columns, depth):
        def codegen(context, builder, signature, args):
            arrays = [context.make_array(ty)(context, builder, arg) for ty, arg in zip(signature.args[:4], args)]
            rows, columns, depth = args[4:]
            width = TILE_COLUMNS[kind]
            start, step = ir.Constant(rows.type, 0), ir.Constant(rows.type, TILE_ROWS)
            full = builder.and_(columns, ir.Constant(rows.type, -width))  # a power of two
            with cgutils.for_range_slice(builder, start, rows, step, rows.type) as (i, _):
                for first, last, columns_of_tile in ((start, full, width), (full, columns, LANES)):
                    step_j = ir.Constant(rows.type, columns_of_tile)
                    with cgutils.for_range_slice(builder, first, last, step_j, rows.type) as (j, _):
                        tile(builder, *arrays, i, j, depth, columns_of_tile)
            return context.get_dummy_value()

        return types.void(a, b, c, x, types.intp, types.intp, types.intp), codegen

    return product


_dot_tiles, _distance_tiles, _pull_tiles = _product('dot'), _product('distance'), _product('pull')


@_jit()
def _dot(a, b, c, rows, columns, depth):
    """c = a @ b."""
    _dot_tiles(a, b, c, c, rows, columns, depth)


@_jit()
def _distance(a, b, c, rows, columns, depth):
    """c_ij = sum_k (a_ik - b_kj)^2."""
    _distance_tiles(a, b, c, c, rows, columns, depth)


@_jit()
def _pull(a, x, b, c, rows, columns, depth):
    """c_ij = sum_k a_ik (x_ij - b_kj)."""
    _pull_tiles(a, b, c, x, rows, columns, depth)


# Elements

@intrinsic
def _power_of_two(context, n):
    """2^n in float32, for a whole number n of -126 to 127 in float32."""
    def codegen(context, builder, signature, args):
        exponent = builder.add(builder.fptosi(args[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 127))
        return builder.bitcast(builder.shl(exponent, ir.Constant(ir.IntType(32), 23)), ir.FloatType())

    return types.float32(types.float32), codegen


C1, C2, C3, C4, C5, C6 = (np.float32(c) for c in (  # of Cephes' exp2f
    6.931472028550421e-1, 2.402264791363012e-1, 5.550332471162809e-2, 9.618437357674640e-3, 1.339887440266574e-3,
    1.535336188319500e-4))
LOWEST = np.float32(-126.)


@_fast
def _exp2(x):
    """2^x for x <= 127, 0 below 2^-126; to 1e-7. LLVM has no vectorized exponential of its own."""
    bounded = max(x, LOWEST)
    whole = np.floor(bounded + HALF)
    f = bounded - whole
    power = ONE + f * (C1 + f * (C2 + f * (C3 + f * (C4 + f * (C5 + f * C6)))))
    return power * _power_of_two(whole) if x >= LOWEST else ZERO


@_fast
def _inverse(x):
    """1 / x, and 0 for 0."""
    return ONE / x if x > ZERO else ZERO


MIX_1, MIX_2 = np.uint32(0x7feb352d), np.uint32(0x846ca68b)
S15, S16 = np.uint32(15), np.uint32(16)


@_jit()
def _mix(h):
    """A permutation of the 32-bit numbers that leaves no pattern (lowbias32, https://nullprogram.com/blog/2018/07/31).
    """
    h ^= h >> S16
    h = np.uint32(h * MIX_1)
    h ^= h >> S15
    h = np.uint32(h * MIX_2)
    return np.uint32(h ^ (h >> S16))


@_jit()
def _dropout_row(factor, seed, row, drop_below, keep_factor):
    """0 or `keep_factor` for each weight: a function of the seed, the row (of all rows of all problems) and the column.
    """
    key = np.uint64(seed) + np.uint64(row + 1) * np.uint64(0x9e3779b97f4a7c15)  # splitmix64
    key = (key ^ (key >> np.uint64(30))) * np.uint64(0xbf58476d1ce4e5b9)
    key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94d049bb133111eb)
    key ^= key >> np.uint64(31)
    low, high = np.uint32(key), np.uint32(key >> np.uint64(32))
    for j in range(factor.size):
        factor[j] = keep_factor if _mix(np.uint32(_mix(np.uint32(np.uint32(j) ^ low)) ^ high)) >= drop_below else ZERO


# Steps of one problem

@_jit()
def _matrix(rows, columns):
    return np.zeros((rows, columns), np.float32)


@_jit()
def _vector(size):
    return np.zeros(size, np.float32)


@_jit()
def _padded(n):
    return (n + LANES - 1) // LANES * LANES


@intrinsic
def _widened(context, x):
    """A number of the memory of a tensor as float32: it is one, or the bits of a bfloat16, the upper half of one."""
    def codegen(context, builder, signature, args):
        if signature.args[0] == types.float32:
            return args[0]
        bits = builder.zext(args[0], ir.IntType(32))
        return builder.bitcast(builder.shl(bits, ir.Constant(bits.type, 16)), ir.FloatType())

    return types.float32(x), codegen


@intrinsic
def _narrowed(context, x, flat):
    """A float32 as the memory of a tensor has it: as it is, or as the bits of the nearest bfloat16, of two the even."""
    def codegen(context, builder, signature, args):
        if signature.return_type == types.float32:
            return args[0]
        bits = builder.bitcast(args[0], ir.IntType(32))

        def number(value):
            return ir.Constant(bits.type, value)

        odd = builder.and_(builder.lshr(bits, number(16)), number(1))
        rounded = builder.add(bits, builder.add(odd, number(0x7fff)))
        is_nan = builder.icmp_unsigned('>', builder.and_(bits, number(0x7fffffff)), number(0x7f800000))
        rounded = builder.select(is_nan, number(0x7fc00000), rounded)  # its last bits alone may be set, or overflow
        return builder.trunc(builder.lshr(rounded, number(16)), ir.IntType(16))

    return flat.dtype(x, flat), codegen


@_jit()
def _start(strides, batch, head):
    """Where the rows of a problem begin."""
    return batch * strides[0] + head * strides[1]


@intrinsic
def _prefetch(context, flat, index):
    """Have the line of flat[index] fetched into the cache, without waiting for it."""
    def codegen(context, builder, signature, args):
        array = context.make_array(signature.args[0])(context, builder, args[0])
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, 'llvm.prefetch.p0i8')
        address = builder.bitcast(builder.gep(array.data, [args[1]]), pointer)
        builder.call(prefetch, [address, number(0), number(2), number(1)])  # to read, into the second level, data
        return context.get_dummy_value()

    return types.void(flat, types.intp), codegen


@_jit()
def _prefetch_rows(flat, strides, problem, last, heads, rows, columns):
    """Prefetch the rows of a problem, unless it is the `last` or later.

    The processor does not foresee them: from one row to the next there are the other heads, and often another page.
    """
    if problem < last:
        start = _start(strides, problem // heads, problem % heads)
        for i in range(rows):
            for j in range(0, columns, LANES):
                _prefetch(flat, start + i * strides[2] + j)


# Loops where numpy would have assignments, which take numba many seconds more to compile.

@_jit()
def _fill(x, value):
    for j in range(x.size):
        x[j] = value


@_jit()
def _copy(source, target):
    for j in range(source.size):
        target[j] = source[j]


@_jit()
def _add(x, y):
    for j in range(x.size):
        x[j] += y[j]


@_jit()
def _fill_rows(x, value):
    for i in range(x.shape[0]):
        _fill(x[i], value)


@_reordered
def _all_finite(x):
    """Whether a matrix has no NaN and no infinity.

    To be asked before what does not expect them: there the compiler takes it that they do not exist, and they vanish.
    """
    total = ZERO
    for i in range(x.shape[0]):
        row = x[i]
        for j in range(row.size):
            total += ZERO * row[j]
    return total == ZERO


@_reordered
def _rows_finite(flat, start, stride, rows, columns):
    """`_all_finite` of contiguous rows that are `stride` apart."""
    total = ZERO
    for i in range(rows):
        row = flat[start + i * stride:start + i * stride + columns]
        for j in range(columns):
            total += ZERO * _widened(row[j])
    return total == ZERO


@_jit()
def _multiply(x, y, out):
    for j in range(x.size):
        out[j] = x[j] * y[j]


@_jit()
def _load(flat, start, stride, out, rows, columns):
    """Contiguous rows that are `stride` apart."""
    for i in range(rows):
        source, target = flat[start + i * stride:start + i * stride + columns], out[i]
        for j in range(columns):
            target[j] = _widened(source[j])


@_jit()
def _is_whole(flat, N, D):
    """Whether a product can read and write rows where they lie: in whole tiles, and in float32."""
    return N % LANES == 0 and D % LANES == 0 and flat.itemsize == FLOAT_SIZE


@_jit()
def _place(flat, start, stride, scratch, rows, columns, whole):
    """What a product reads or writes: rows that are `stride` apart where they lie if `whole`, else `scratch`."""
    if whole:  # of what is not in float32 this compiles, too, but never runs
        return as_strided(flat.view(np.float32)[start:], (rows, columns), (stride * FLOAT_SIZE, FLOAT_SIZE))
    return as_strided(scratch, scratch.shape, scratch.strides)  # itself, but of the type that the other branch has


@_jit()
def _load_transposed(flat, start, stride, out, rows, columns):
    for i in range(rows):
        source = flat[start + i * stride:start + i * stride + columns]
        for j in range(columns):
            out[j, i] = _widened(source[j])


@_jit()
def _store(x, flat, start, stride, rows, columns):
    for i in range(rows):
        source, target = x[i], flat[start + i * stride:start + i * stride + columns]
        for j in range(columns):
            target[j] = _narrowed(source[j], flat)


@_jit()
def _store_transposed(x, flat, start, stride, rows, columns):
    for i in range(rows):
        target = flat[start + i * stride:start + i * stride + columns]
        for j in range(columns):
            target[j] = _narrowed(x[j, i], flat)


@_fast
def _to_unit_rows(x, inverse_norms, N):
    """Divide the rows by their length, in place; a zero row stays zero."""
    for i in range(N):
        row = x[i]
        square = ZERO
        for d in range(row.size):
            square += row[d] * row[d]
        inverse_norms[i] = _inverse(np.sqrt(square))
        for d in range(row.size):
            row[d] *= inverse_norms[i]


@_jit()
def _transpose(x, out):
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            out[j, i] = x[i, j]


@_fast
def _row_max(row):
    largest = ZERO
    for j in range(row.size):
        largest = max(largest, row[j])
    return largest


@_fast
def _costs(x, y_transposed, x_inverse_norms, y_inverse_norms, scratch, costs, N, D, cosine):
    """Distances in the first N rows of `costs`, 0 in the padding, and the largest of each row in the row after.

    For `cosine` the rows are of length 1, and 1 - xy is half their squared distance, which does not cancel. What is
    negligible is 0, or the division by the largest would make noise of it.
    """
    R = scratch.shape[0]
    _distance(x, y_transposed, scratch, R, R, D)
    for i in range(N):
        source, target = scratch[i], costs[i]
        if cosine:
            for j in range(R):
                zero = x_inverse_norms[i] == ZERO or y_inverse_norms[j] == ZERO
                cost = HALF * source[j]
                target[j] = ONE if zero else cost if cost >= NEGLIGIBLE_COSINE else ZERO
        else:
            for j in range(R):
                target[j] = np.sqrt(source[j])
        for j in range(N, R):
            target[j] = ZERO
        costs[N, i] = _row_max(target)


@_fast
def _kernel(costs, kernel, N, reg, log):
    """Kernel matrix, or its logarithm to base 2, with masked diagonal; the row maxima of the costs divide them."""
    for i in range(N):
        source, target = costs[i], kernel[i]
        factor = -LOG2_E / reg * _inverse(costs[N, i])
        if log:
            for j in range(source.size):
                target[j] = source[j] * factor
        else:
            for j in range(source.size):
                target[j] = _exp2(source[j] * factor)
        masked = MASKED if log else ZERO
        for j in range(N, source.size):
            target[j] = masked
        if N > 1:  # a single point has only itself
            target[i] = masked


@_reordered
def _products(kernel, x, i):
    """kernel[i:i+4] @ x: of several rows at once, the sums do not wait for each other."""
    r0, r1, r2, r3 = kernel[i], kernel[i + 1], kernel[i + 2], kernel[i + 3]
    p0, p1, p2, p3 = ZERO, ZERO, ZERO, ZERO
    for j in range(x.size):
        p0 += r0[j] * x[j]
        p1 += r1[j] * x[j]
        p2 += r2[j] * x[j]
        p3 += r3[j] * x[j]
    return p0, p1, p2, p3


@_reordered
def _add_rows(kernel, x, i, sums):
    """sums += x[i:i+4] @ kernel[i:i+4]."""
    r0, r1, r2, r3 = kernel[i], kernel[i + 1], kernel[i + 2], kernel[i + 3]
    x0, x1, x2, x3 = x[i], x[i + 1], x[i + 2], x[i + 3]
    for j in range(sums.size):
        sums[j] += r0[j] * x0 + r1[j] * x1 + r2[j] * x2 + r3[j] * x3


@_fast
def _iterate(kernel, a, b, sums, N, M, row_mass, column_mass):
    """One iteration in the scaling form a = r / (K b), b = c / (K^T a), in one pass over the matrix."""
    _fill(sums, ZERO)
    for i in range(0, N, 4):
        p0, p1, p2, p3 = _products(kernel, b, i)
        # rows of the padding are 0, and have 0
        a[i], a[i + 1], a[i + 2], a[i + 3] = (
            row_mass * _inverse(p0), row_mass * _inverse(p1), row_mass * _inverse(p2), row_mass * _inverse(p3))
        _add_rows(kernel, a, i, sums)
    for j in range(M):
        b[j] = column_mass / sums[j]


@_fast
def _iterate_log(kernel, a, b, sums, terms, N, M, log2_row_mass, log2_column_mass):
    """One iteration on the logarithms, with one exponential per entry: the column sums reuse those of the row sums."""
    _fill(sums, ZERO)
    for i in range(N):
        row = kernel[i]
        largest = -INFINITY
        for j in range(row.size):
            terms[j] = row[j] + b[j]
            largest = max(largest, terms[j])
        total = ZERO
        for j in range(row.size):
            terms[j] = _exp2(terms[j] - largest)
            total += terms[j]
        a[i] = log2_row_mass - largest - np.float32(math.log2(total))
        inverse = ONE / total
        for j in range(row.size):
            sums[j] += terms[j] * inverse
    for j in range(M):
        if sums[j] > np.float32(1e-25):
            b[j] += log2_column_mass - log2_row_mass - np.float32(math.log2(sums[j]))
            continue
        # all terms were lost against those of other columns
        largest = -INFINITY
        for i in range(N):
            largest = max(largest, kernel[i, j] + a[i])
        total = ZERO
        for i in range(N):
            total += _exp2(kernel[i, j] + a[i] - largest)
        b[j] = log2_column_mass - largest - np.float32(math.log2(total))


@_fast
def _sot(kernel, a, b, sot, largests, N, log):
    """The plan through the sigmoid, 0 on the diagonal, and the largest entry."""
    _fill(largests, ZERO)
    for i in range(N):
        source, target = kernel[i], sot[i]
        a_i = a[i]
        if log:
            for j in range(source.size):
                plan = _exp2(source[j] + a_i + b[j])
                target[j] = plan / (ONE + plan)
        else:
            for j in range(source.size):
                plan = source[j] * a_i * b[j]
                target[j] = plan / (ONE + plan)
        target[i] = ZERO
        for j in range(source.size):
            largests[j] = max(largests[j], target[j])
    return _row_max(largests)


@_fast
def _weights(sot, inverse_largest, weights, N, scale, softmax):
    """Attention weights, 0 in the padded columns."""
    factor = scale * LOG2_E
    for i in range(N):
        source, target = sot[i], weights[i]
        if softmax:
            # the unit diagonal is the largest entry of its row
            for j in range(source.size):
                target[j] = _exp2((source[j] * inverse_largest - ONE) * factor)
            target[i] = ONE
            for j in range(N, source.size):
                target[j] = ZERO
            total = ZERO
            for j in range(source.size):
                total += target[j]
            inverse = ONE / total
            for j in range(source.size):
                target[j] *= inverse
        else:
            for j in range(source.size):
                target[j] = source[j] * inverse_largest * scale
            target[i] = scale


@_reordered
def _iterate_backward(
        kernel, a, b, b_before, grad_a, grad_b, row_factor_b, row_factor_a, column_factor_b, column_factor_a, sums,
        N, row_mass, column_mass):
    """Gradients of the scaling vectors' logarithms through one iteration.

    On entry `grad_a`, `grad_b` are those of log a, log b, on return 0 and that of log b before. The iteration's part of
    the gradient of the log-kernel is -K times the sum of the two products of a row and a column factor.
    """
    per_row, per_column = ONE / row_mass, ONE / column_mass
    for j in range(grad_b.size):
        column_factor_b[j] = per_column * grad_b[j] * b[j]
        column_factor_a[j] = b_before[j]
    _fill(sums, ZERO)
    for i in range(0, N, 4):
        products = _products(kernel, column_factor_b, i)
        for k in range(4):
            row_factor_b[i + k] = a[i + k]
            row_factor_a[i + k] = per_row * (grad_a[i + k] - a[i + k] * products[k]) * a[i + k]
            grad_a[i + k] = ZERO
        _add_rows(kernel, row_factor_a, i, sums)
    for j in range(grad_b.size):
        grad_b[j] = -b_before[j] * sums[j]


@_reordered
def _iterate_backward_log(kernel, a, b, b_before, grad_a, grad_b, grad, sums, N, row_mass, column_mass):
    """The same for the logarithms; the part of the gradient of the log-kernel is added to `grad`."""
    per_row, per_column = ONE / row_mass, ONE / column_mass
    _fill(sums, ZERO)
    for i in range(N):
        row, target = kernel[i], grad[i]
        a_i = a[i]
        product = ZERO
        for j in range(row.size):
            step = _exp2(row[j] + a_i + b[j]) * (per_column * grad_b[j])
            target[j] -= step
            product += step
        factor = per_row * (grad_a[i] - product)
        grad_a[i] = ZERO
        for j in range(row.size):
            step = _exp2(row[j] + a_i + b_before[j]) * factor
            target[j] -= step
            sums[j] += step
    for j in range(grad_b.size):
        grad_b[j] = -sums[j]


@_reordered
def _subtract_product(grad, kernel, factors, out, N):
    """grad - kernel * factors."""
    for i in range(N):
        g, k, f, o = grad[i], kernel[i], factors[i], out[i]
        for j in range(o.size):
            o[j] = g[j] - k[j] * f[j]


@_fast
def _sot_backward(sot, weights, grad, inverse_largest, largest, grad_a, grad_b, N, scale, softmax):
    """Gradient of the weights to that of the log-plan, in place, and its row and column sums."""
    moment = ZERO
    ties = ZERO
    for i in range(N):
        s, w, g = sot[i], weights[i], grad[i]
        delta = ZERO
        if softmax:
            for j in range(g.size):
                delta += w[j] * g[j]
            for j in range(g.size):
                g[j] = w[j] * (g[j] - delta)
        for j in range(g.size):
            g[j] *= scale * inverse_largest
            moment += g[j] * s[j]
            ties += ONE if s[j] == largest else ZERO
    grad_largest = -moment * inverse_largest / ties  # equal maxima share the gradient
    _fill(grad_b, ZERO)
    for i in range(N):
        s, g = sot[i], grad[i]
        total = ZERO
        for j in range(g.size):
            value = (g[j] + (grad_largest if s[j] == largest else ZERO)) * (s[j] * (ONE - s[j]))
            g[j] = value
            total += value
            grad_b[j] += value
        grad_a[i] = total


@_fast
def _costs_backward(costs, grad, N, reg, cosine):
    """Gradient of the log-kernel to that of the costs, divided by them where they are distances; in place."""
    for i in range(N):
        c, g = costs[i], grad[i]
        largest = costs[N, i]
        inverse = _inverse(largest)
        moment = ZERO
        ties = ZERO
        for j in range(g.size):
            g[j] *= -inverse / reg
            moment += g[j] * c[j]
            ties += ONE if c[j] == largest else ZERO
        grad_largest = -moment * inverse / ties
        for j in range(g.size):
            g[j] += grad_largest if c[j] == largest else ZERO
        if not cosine:
            for j in range(g.size):
                g[j] = g[j] / c[j] if c[j] > ZERO else ZERO


@_jit()
def _constant_costs(grad, x_inverse_norms, y_inverse_norms, N):
    """No gradient where one of the rows is zero: their cost is 1 whatever the other; in place."""
    for i in range(N):
        g = grad[i]
        for j in range(N):
            zero = x_inverse_norms[i] == ZERO or y_inverse_norms[j] == ZERO
            g[j] = ZERO if zero else g[j]


@_fast
def _unit_rows_backward(grad, unit, inverse_norms, N):
    """Gradient of the unit rows to that of the rows; in place."""
    for i in range(N):
        g, x = grad[i], unit[i]
        along = ZERO
        for d in range(g.size):
            along += g[d] * x[d]
        for d in range(g.size):
            g[d] = (g[d] - along * x[d]) * inverse_norms[i]


@_jit()
def _load_points(flat, start, stride, x, transposed, N, D, through_transpose, both):
    """Points in columns and, if both are asked for, rows; `through_transpose`: those stored are the columns."""
    if through_transpose:
        if both:
            _load_transposed(flat, start, stride, x, N, D)
        _load(flat, start, stride, transposed, N, D)
    else:
        if both:
            _load(flat, start, stride, x, N, D)
        _load_transposed(flat, start, stride, transposed, N, D)


@_kept(error_model='numpy')
def attention_forward(
        first, last, heads, q, q_strides, k, k_strides, v, v_strides, out, out_strides, saved, seed,
        N, D, iters, reg, scale, drop_below, keep_factor, own, through_transpose, cosine, softmax, log, keep, dropout):
    """Problems `first` to `last` of `cpu.sot_attention_forward`."""
    # each allocated by itself: numba does not know that parts of an array are contiguous
    R, W = _padded(N), _padded(D)
    x, y, values, result = _matrix(R, W), _matrix(R, W), _matrix(R, W), _matrix(R, W)
    y_transposed = _matrix(W, R)
    kernel, sot, weights = _matrix(R, R), _matrix(R, R), _matrix(R, R)
    a, b, sums, terms, factor = _vector(R), _vector(R), _vector(R), _vector(R), _vector(R)
    x_inverse_norms, y_inverse_norms = _vector(R), _vector(R)
    start_b = ZERO if log else ONE
    mass, log2_mass = ONE / np.float32(N), np.float32(-math.log2(N))
    whole = _is_whole(q, N, D) and not cosine  # for the cosine the rows are changed
    for problem in range(first, last):
        batch, head = problem // heads, problem % heads
        costs = saved[problem]  # N rows of costs, their maxima, then the scaling vectors

        start = _start(q_strides, batch, head)
        if not whole:
            _load(q, start, q_strides[2], x, N, D)
        points = _place(q, start, q_strides[2], x, N, D, whole)
        finite = _rows_finite(q, start, q_strides[2], N, D)
        if own:
            _load_transposed(q, start, q_strides[2], y_transposed, N, D)
        else:
            start = _start(k_strides, batch, head)
            finite &= _rows_finite(k, start, k_strides[2], N, D)
            _load_points(k, start, k_strides[2], y, y_transposed, N, D, through_transpose, cosine)
        if not finite:
            _fill_rows(result, NAN)
            _store(result, out, _start(out_strides, batch, head), out_strides[2], N, D)
            continue
        if cosine:
            _to_unit_rows(x, x_inverse_norms, N)
            if own:
                _copy(x_inverse_norms, y_inverse_norms)
                _transpose(x, y_transposed)
            else:
                _to_unit_rows(y, y_inverse_norms, N)
                _transpose(y, y_transposed)
        _prefetch_rows(q, q_strides, problem + 1, last, heads, N, D)
        _costs(points, y_transposed, x_inverse_norms, y_inverse_norms, sot, costs, N, D, cosine)
        if not _all_finite(costs[N:N + 1, :N]):  # squares of distances above 1e19 leave float32
            _fill_rows(result, NAN)
            _store(result, out, _start(out_strides, batch, head), out_strides[2], N, D)
            continue

        _prefetch_rows(k, k_strides, problem + 1, last, heads, N, D)
        _kernel(costs, kernel, N, reg, log)
        _fill(b[:N], start_b)
        for t in range(iters):
            if log:
                _iterate_log(kernel, a, b, sums, terms, N, N, log2_mass, log2_mass)
            else:
                _iterate(kernel, a, b, sums, N, N, mass, mass)
            if keep:
                _copy(a, costs[N + 1 + 2 * t])
                _copy(b, costs[N + 2 + 2 * t])
        _prefetch_rows(v, v_strides, problem + 1, last, heads, N, D)
        inverse_largest = _inverse(_sot(kernel, a, b, sot, sums, N, log))
        _weights(sot, inverse_largest, weights, N, scale, softmax)
        if dropout:
            for i in range(N):
                _dropout_row(factor, seed[0], problem * N + i, drop_below, keep_factor)
                _multiply(weights[i], factor, weights[i])

        _load(v, _start(v_strides, batch, head), v_strides[2], values, N, D)
        start = _start(out_strides, batch, head)
        _dot(weights, values, _place(out, start, out_strides[2], result, N, D, whole), R, W, N)
        if not whole:
            _store(result, out, start, out_strides[2], N, D)


@_kept(error_model='numpy')
def attention_backward(
        first, last, heads, q, q_strides, k, k_strides, v, v_strides, grad_out, grad_out_strides, saved, seed,
        grad_q, grad_k, grad_v, grad_strides,
        N, D, iters, reg, scale, drop_below, keep_factor, own, through_transpose, cosine, softmax, log, keep, dropout):
    """Problems `first` to `last` of `cpu.sot_attention_backward`."""
    R, W = _padded(N), _padded(D)
    x, y, upstream, result, other = _matrix(R, W), _matrix(R, W), _matrix(R, W), _matrix(R, W), _matrix(R, W)
    transposed = _matrix(W, R)
    kernel, sot, weights, grad, scratch = _matrix(R, R), _matrix(R, R), _matrix(R, R), _matrix(R, R), _matrix(R, R)
    row_factors, column_factors = _matrix(2 * iters, R), _matrix(2 * iters, R)
    # scaling vectors after each iteration, those of the columns also before the first
    rows, columns = _matrix(iters, R), _matrix(iters + 1, R)
    a, b, grad_a, grad_b, sums, factor = _vector(R), _vector(R), _vector(R), _vector(R), _vector(R), _vector(R)
    x_inverse_norms, y_inverse_norms = _vector(R), _vector(R)
    start_b = ZERO if log else ONE
    mass, log2_mass = ONE / np.float32(N), np.float32(-math.log2(N))
    whole = _is_whole(q, N, D) and not cosine  # for the cosine the rows are changed
    for problem in range(first, last):
        batch, head = problem // heads, problem % heads
        grad_start = _start(grad_strides, batch, head)
        costs = saved[problem]

        _load(q, _start(q_strides, batch, head), q_strides[2], x, N, D)
        if own:
            for i in range(N):
                _copy(x[i], y[i])
        else:
            start = _start(k_strides, batch, head)
            if through_transpose:
                _load_transposed(k, start, k_strides[2], y, N, D)
            else:
                _load(k, start, k_strides[2], y, N, D)
        if not (_all_finite(x) and _all_finite(y) and _all_finite(costs[N:N + 1, :N])):
            _fill_rows(result, NAN)
            _store(result, grad_v, grad_start, grad_strides[2], N, D)
            _store(result, grad_k, grad_start, grad_strides[2], N, D)
            _store(result, grad_q, grad_start, grad_strides[2], N, D)
            continue

        # the matrices of the forward pass
        _prefetch_rows(q, q_strides, problem + 1, last, heads, N, D)
        _kernel(costs, kernel, N, reg, log)
        _fill(b[:N], start_b)
        _copy(b, columns[0])
        for t in range(iters):
            if keep:
                _copy(costs[N + 1 + 2 * t], rows[t])
                _copy(costs[N + 2 + 2 * t], columns[t + 1])
            else:
                if log:
                    _iterate_log(kernel, a, b, sums, factor, N, N, log2_mass, log2_mass)
                else:
                    _iterate(kernel, a, b, sums, N, N, mass, mass)
                _copy(a, rows[t])
                _copy(b, columns[t + 1])
        largest = _sot(kernel, rows[iters - 1], columns[iters], sot, sums, N, log)
        inverse_largest = _inverse(largest)
        _weights(sot, inverse_largest, weights, N, scale, softmax)

        # out = dropout(weights) v
        _prefetch_rows(k, k_strides, problem + 1, last, heads, N, D)
        _load(grad_out, _start(grad_out_strides, batch, head), grad_out_strides[2], upstream, N, D)
        _load_transposed(v, _start(v_strides, batch, head), v_strides[2], transposed, N, D)
        _dot(upstream, transposed, grad, R, R, D)
        known = _all_finite(grad)
        target = _place(grad_v, grad_start, grad_strides[2], result, N, D, whole)
        if dropout:
            for i in range(N):
                _dropout_row(factor, seed[0], problem * N + i, drop_below, keep_factor)
                _multiply(grad[i], factor, grad[i])
                _multiply(weights[i], factor, scratch[i])
            _dot(scratch.T, upstream, target, R, W, N)
        else:
            _dot(weights.T, upstream, target, R, W, N)
        if not whole:
            _store(result, grad_v, grad_start, grad_strides[2], N, D)
        if not known:
            _fill_rows(result, NAN)
            _store(result, grad_k, grad_start, grad_strides[2], N, D)
            _store(result, grad_q, grad_start, grad_strides[2], N, D)
            continue

        _prefetch_rows(v, v_strides, problem + 1, last, heads, N, D)
        _sot_backward(sot, weights, grad, inverse_largest, largest, grad_a, grad_b, N, scale, softmax)
        for t in range(iters - 1, -1, -1):
            if log:
                _iterate_backward_log(
                    kernel, rows[t], columns[t + 1], columns[t], grad_a, grad_b, grad, sums, N, mass, mass)
            else:
                _iterate_backward(
                    kernel, rows[t], columns[t + 1], columns[t], grad_a, grad_b,
                    row_factors[2 * t], row_factors[2 * t + 1], column_factors[2 * t], column_factors[2 * t + 1],
                    sums, N, mass, mass)
        if not log:
            _dot(row_factors.T, column_factors, scratch, R, R, 2 * iters)
            _subtract_product(grad, kernel, scratch, grad, N)
        _prefetch_rows(grad_out, grad_out_strides, problem + 1, last, heads, N, D)
        _costs_backward(costs, grad, N, reg, cosine)

        if cosine:
            _to_unit_rows(x, x_inverse_norms, N)
            _to_unit_rows(y, y_inverse_norms, N)
            _constant_costs(grad, x_inverse_norms, y_inverse_norms, N)
        whole_q = whole and not own
        whole_k = whole_q and not through_transpose
        _pull(grad, x, y, _place(grad_q, grad_start, grad_strides[2], result, N, D, whole_q), R, W, N)
        _pull(grad.T, y, x, _place(grad_k, grad_start, grad_strides[2], other, N, D, whole_k), R, W, N)
        if cosine:
            _unit_rows_backward(result, x, x_inverse_norms, N)
            _unit_rows_backward(other, y, y_inverse_norms, N)
        if own:
            for i in range(N):
                _add(result[i], other[i])
        elif through_transpose:
            _store_transposed(other, grad_k, grad_start, grad_strides[2], N, D)
        elif not whole_k:
            _store(other, grad_k, grad_start, grad_strides[2], N, D)
        if not whole_q:
            _store(result, grad_q, grad_start, grad_strides[2], N, D)


# A plan with learned marginals

@_jit()
def _can_be_shared(log_shares, scale):
    """Whether no logarithm of a share is NaN or inf, and the scale a positive number."""
    wrong = 0 if ZERO < scale < INFINITY else 1
    for j in range(log_shares.size):
        wrong += 0 if log_shares[j] < INFINITY else 1
    return wrong == 0


@_fast
def _cosine_kernel(cosines, kernel, shares, log_shares, N, scale):
    """exp((cosine - 1) scale), 0 in the padded columns; and the shares."""
    factor = scale * LOG2_E
    for i in range(N):
        source, target = cosines[i], kernel[i]
        for j in range(source.size):
            target[j] = _exp2((source[j] - ONE) * factor)
        for j in range(N, source.size):
            target[j] = ZERO
    for j in range(N):
        shares[j] = _exp2(log_shares[j] * LOG2_E)


@_fast
def _column_factors(inverse_sums, shares, b, N):
    """Factors of the columns: what the shares are of the column sums, divided by their own sum, which cancels."""
    total = ZERO
    for j in range(N):
        b[j] = shares[j] * inverse_sums[j]
        total += b[j]
    inverse = ONE / total
    for j in range(N):
        b[j] *= inverse


@_fast
def _rows_of_sum_one(kernel, b, weights, N):
    """K b, each row divided by its sum."""
    for i in range(N):
        source, target = kernel[i], weights[i]
        total = ZERO
        for j in range(source.size):
            target[j] = source[j] * b[j]
            total += target[j]
        inverse = ONE / total
        for j in range(source.size):
            target[j] *= inverse


@_fast
def _rows_of_sum_one_backward(weights, grad, grad_b, N):
    """Gradient of the weights to that of the logarithms of K, in place, and of b."""
    _fill(grad_b, ZERO)
    for i in range(N):
        w, g = weights[i], grad[i]
        delta = ZERO
        for j in range(g.size):
            delta += w[j] * g[j]
        for j in range(g.size):
            g[j] = w[j] * (g[j] - delta)
            grad_b[j] += g[j]


@_reordered
def _cosine_kernel_backward(cosines, grad, N, scale):
    """Gradient of log K to that of the cosines, in place; returns that of the scale."""
    total = ZERO
    for i in range(N):
        c, g = cosines[i], grad[i]
        for j in range(g.size):
            total += g[j] * (c[j] - ONE)
            g[j] *= scale
    return total


@_kept(error_model='numpy')
def shares_forward(
        first, last, heads, q, q_strides, k, k_strides, v, v_strides, out, out_strides, cosines, scales, log_shares,
        seed, N, D, iters, drop_below, keep_factor, dropout):
    """Problems `first` to `last` of `cpu_shares.shares_forward`."""
    R, W = _padded(N), _padded(D)
    x, y, values, result = _matrix(R, W), _matrix(R, W), _matrix(R, W), _matrix(R, W)
    y_transposed = _matrix(W, R)
    kernel, weights = _matrix(R, R), _matrix(R, R)
    a, b, inverse_sums, sums, shares, factor = _vector(R), _vector(R), _vector(R), _vector(R), _vector(R), _vector(R)
    inverse_norms = _vector(R)
    whole = _is_whole(q, N, D)
    for problem in range(first, last):
        batch, head = problem // heads, problem % heads
        scale, of_tokens, kept = scales[head], log_shares[problem], cosines[problem]
        _load(q, _start(q_strides, batch, head), q_strides[2], x, N, D)
        _load(k, _start(k_strides, batch, head), k_strides[2], y, N, D)
        start = _start(out_strides, batch, head)
        if not (_all_finite(x) and _all_finite(y) and _can_be_shared(of_tokens, scale)):
            _fill_rows(result, NAN)
            _store(result, out, start, out_strides[2], N, D)
            continue
        _to_unit_rows(x, inverse_norms, N)
        _to_unit_rows(y, inverse_norms, N)
        _transpose(y, y_transposed)
        _prefetch_rows(q, q_strides, problem + 1, last, heads, N, D)
        _dot(x, y_transposed, weights, R, R, D)
        for i in range(N):
            _copy(weights[i], kept[i])

        _prefetch_rows(k, k_strides, problem + 1, last, heads, N, D)
        _cosine_kernel(kept, kernel, shares, of_tokens, N, scale)
        _fill(b[:N], ONE)
        for t in range(iters):
            _copy(b, inverse_sums)
            _iterate(kernel, a, inverse_sums, sums, N, N, ONE, ONE)
            _column_factors(inverse_sums, shares, b, N)
        _prefetch_rows(v, v_strides, problem + 1, last, heads, N, D)
        _rows_of_sum_one(kernel, b, weights, N)
        if dropout:
            for i in range(N):
                _dropout_row(factor, seed[0], problem * N + i, drop_below, keep_factor)
                _multiply(weights[i], factor, weights[i])

        _load(v, _start(v_strides, batch, head), v_strides[2], values, N, D)
        _dot(weights, values, _place(out, start, out_strides[2], result, N, D, whole), R, W, N)
        if not whole:
            _store(result, out, start, out_strides[2], N, D)


@_kept(error_model='numpy')
def shares_backward(
        first, last, heads, q, q_strides, k, k_strides, v, v_strides, grad_out, grad_out_strides, cosines, scales,
        log_shares, seed, grad_q, grad_k, grad_v, grad_strides, grad_scales, grad_log_shares,
        N, D, iters, drop_below, keep_factor, dropout):
    """Problems `first` to `last` of `cpu_shares.shares_backward`."""
    R, W = _padded(N), _padded(D)
    x, y, upstream, result = _matrix(R, W), _matrix(R, W), _matrix(R, W), _matrix(R, W)
    transposed = _matrix(W, R)
    kernel, weights, grad, scratch = _matrix(R, R), _matrix(R, R), _matrix(R, R), _matrix(R, R)
    row_factors, column_factors = _matrix(2 * iters, R), _matrix(2 * iters, R)
    # of each iteration: factors of the columns before it and of the rows, inverse sums of the columns
    columns, rows, inverses = _matrix(iters + 1, R), _matrix(iters, R), _matrix(iters, R)
    a, inverse_sums, grad_a, grad_b = _vector(R), _vector(R), _vector(R), _vector(R)
    sums, shares, factor = _vector(R), _vector(R), _vector(R)
    x_inverse_norms, y_inverse_norms = _vector(R), _vector(R)
    whole = _is_whole(q, N, D)
    for problem in range(first, last):
        batch, head = problem // heads, problem % heads
        scale, of_tokens, kept = scales[head], log_shares[problem], cosines[problem]
        grad_start = _start(grad_strides, batch, head)
        _load(q, _start(q_strides, batch, head), q_strides[2], x, N, D)
        _load(k, _start(k_strides, batch, head), k_strides[2], y, N, D)
        _load(grad_out, _start(grad_out_strides, batch, head), grad_out_strides[2], upstream, N, D)
        known = _all_finite(x) and _all_finite(y) and _can_be_shared(of_tokens, scale)
        if not known:
            _fill_rows(result, NAN)
            _store(result, grad_v, grad_start, grad_strides[2], N, D)
        else:
            # the matrices of the forward pass
            _prefetch_rows(q, q_strides, problem + 1, last, heads, N, D)
            _to_unit_rows(x, x_inverse_norms, N)
            _to_unit_rows(y, y_inverse_norms, N)
            _cosine_kernel(kept, kernel, shares, of_tokens, N, scale)
            _fill(columns[0][:N], ONE)
            for t in range(iters):
                _copy(columns[t], inverse_sums)
                _iterate(kernel, a, inverse_sums, sums, N, N, ONE, ONE)
                _copy(a, rows[t])
                _copy(inverse_sums, inverses[t])
                _column_factors(inverse_sums, shares, columns[t + 1], N)
            _rows_of_sum_one(kernel, columns[iters], weights, N)

            # out = dropout(weights) v
            _prefetch_rows(k, k_strides, problem + 1, last, heads, N, D)
            _load_transposed(v, _start(v_strides, batch, head), v_strides[2], transposed, N, D)
            _dot(upstream, transposed, grad, R, R, D)
            known = _all_finite(grad)
            target = _place(grad_v, grad_start, grad_strides[2], result, N, D, whole)
            if dropout:
                for i in range(N):
                    _dropout_row(factor, seed[0], problem * N + i, drop_below, keep_factor)
                    _multiply(grad[i], factor, grad[i])
                    _multiply(weights[i], factor, scratch[i])
                _dot(scratch.T, upstream, target, R, W, N)
            else:
                _dot(weights.T, upstream, target, R, W, N)
            if not whole:
                _store(result, grad_v, grad_start, grad_strides[2], N, D)
        of_shares = grad_log_shares[problem]
        if not known:
            _fill_rows(result, NAN)
            _store(result, grad_k, grad_start, grad_strides[2], N, D)
            _store(result, grad_q, grad_start, grad_strides[2], N, D)
            _fill(of_shares, NAN)
            grad_scales[problem] = NAN
            continue

        _prefetch_rows(v, v_strides, problem + 1, last, heads, N, D)
        _rows_of_sum_one_backward(weights, grad, grad_b, N)
        _fill(of_shares, ZERO)
        for t in range(iters - 1, -1, -1):
            for j in range(N):
                of_shares[j] += grad_b[j]
            _fill(grad_a, ZERO)
            _iterate_backward(
                kernel, rows[t], inverses[t], columns[t], grad_a, grad_b,
                row_factors[2 * t], row_factors[2 * t + 1], column_factors[2 * t], column_factors[2 * t + 1],
                sums, N, ONE, ONE)
        if iters > 0:
            _dot(row_factors.T, column_factors, scratch, R, R, 2 * iters)
            _subtract_product(grad, kernel, scratch, grad, N)
        _prefetch_rows(grad_out, grad_out_strides, problem + 1, last, heads, N, D)
        grad_scales[problem] = _cosine_kernel_backward(kept, grad, N, scale)

        target = _place(grad_q, grad_start, grad_strides[2], result, N, D, whole)
        _dot(grad, y, target, R, W, N)
        _unit_rows_backward(target, x, x_inverse_norms, N)
        if not whole:
            _store(result, grad_q, grad_start, grad_strides[2], N, D)
        target = _place(grad_k, grad_start, grad_strides[2], result, N, D, whole)
        _dot(grad.T, x, target, R, W, N)
        _unit_rows_backward(target, y, y_inverse_norms, N)
        if not whole:
            _store(result, grad_k, grad_start, grad_strides[2], N, D)


# The iterations on a log-kernel by themselves

NO_PLAN, SCALING, LOG = 0, 1, 2  # how a problem runs


@_jit()
def _all_between(x, low, high):
    """Whether all are between the two; NaN is not."""
    outside = 0
    for j in range(x.size):
        outside += 0 if low < x[j] < high else 1
    return outside == 0


@_jit()
def _has_plan(log_kernel, column_counts, N, M):
    """Whether every row and column has a finite entry, and none is NaN or inf.

    To be asked first: where comparisons do not expect NaNs, the compiler takes it that there are none at all.
    """
    wrong = 0
    _fill(column_counts, ZERO)
    for i in range(N):
        row = log_kernel[i]
        count = 0
        for j in range(M):
            wrong += 0 if row[j] < INFINITY else 1
            count += 1 if row[j] > -INFINITY else 0
            column_counts[j] += ONE if row[j] > -INFINITY else ZERO
        wrong += 0 if count > 0 else 1
    for j in range(M):
        wrong += 0 if column_counts[j] > ZERO else 1
    return wrong == 0


@_fast
def _log2_kernel(log_kernel, kernel, row_largest, N, M):
    """The log-kernel to base 2 without the largest entry of each row, -inf in the padded columns."""
    for i in range(N):
        source, target = log_kernel[i], kernel[i]
        largest = -INFINITY
        for j in range(M):
            largest = max(largest, source[j])
        row_largest[i] = largest
        for j in range(M):  # a finite entry stays finite
            target[j] = max((source[j] - largest) * LOG2_E, LOWEST_LOG) if source[j] > -INFINITY else -INFINITY
        for j in range(M, target.size):
            target[j] = -INFINITY


@_fast
def _to_kernel(kernel, N):
    """Exponentials to base 2, in place."""
    for i in range(N):
        row = kernel[i]
        for j in range(row.size):
            row[j] = _exp2(row[j])


@_reordered
def _sums(x, of_rows, of_columns, N, M):
    """Row and column sums of an N x M matrix."""
    _fill(of_columns, ZERO)
    for i in range(N):
        row = x[i]
        total = ZERO
        for j in range(M):
            total += row[j]
            of_columns[j] += row[j]
        of_rows[i] = total


@_jit()
def _run(
        log_kernel, kernel, row_largest, a, b, sums, terms, rows, columns,
        iters, N, M, column_mass, log2_column_mass):
    """All iterations with a row mass of 1; `rows` and `columns` take what each ends with, if they have room.

    Returns:
        The form in which they ran, with its kernel and scaling vectors in `kernel`, `a` and `b`: SCALING, or LOG where
        that does not carry the problem. NO_PLAN has none.
    """
    keep = rows.shape[0] > 0
    if not _has_plan(log_kernel, sums, N, M):
        return NO_PLAN
    _log2_kernel(log_kernel, kernel, row_largest, N, M)
    _to_kernel(kernel, N)
    _fill(b[:M], ONE)
    if keep:
        _copy(b, columns[0])
    carried = True
    for t in range(iters):
        _iterate(kernel, a, b, sums, N, M, ONE, column_mass)
        carried = _all_between(b[:M], LEAST_SCALING, MOST_SCALING)
        if not carried:
            break
        if keep:
            _copy(a, rows[t])
            _copy(b, columns[t + 1])
    if carried:
        return SCALING

    _log2_kernel(log_kernel, kernel, row_largest, N, M)
    _fill(b[:M], ZERO)
    if keep:
        _copy(b, columns[0])
    for t in range(iters):
        _iterate_log(kernel, a, b, sums, terms, N, M, ZERO, log2_column_mass)
        if keep:
            _copy(a, rows[t])
            _copy(b, columns[t + 1])
    return LOG


@_kept(error_model='numpy')
def sinkhorn_forward(first, last, log_kernels, out, iters, log_r, log_c):
    """Problems `first` to `last` of `sinkhorn.sinkhorn`; where there is no plan, NaN."""
    N, M = log_kernels.shape[1:]
    R, W = _padded(N), _padded(M)
    column_mass, log2_column_mass = np.float32(math.exp(log_c - log_r)), np.float32(log_c - log_r) * LOG2_E
    kernel, nothing = _matrix(R, W), _matrix(0, 0)
    row_largest, a, b, sums, terms = _vector(R), _vector(R), _vector(W), _vector(W), _vector(W)
    for problem in range(first, last):
        log_kernel, log_plan = log_kernels[problem], out[problem]
        form = _run(
            log_kernel, kernel, row_largest, a, b, sums, terms, nothing, nothing,
            iters, N, M, column_mass, log2_column_mass)
        for j in range(M):
            terms[j] = math.log(b[j]) if form == SCALING else b[j] * LN_2
        for i in range(N):
            source, target = log_kernel[i], log_plan[i]
            if form == NO_PLAN:
                _fill(target, NAN)
                continue
            u = (math.log(a[i]) if form == SCALING else a[i] * LN_2) + np.float32(log_r)
            for j in range(M):  # the largest entry goes first: in a sum with it the others would lose their digits
                target[j] = (source[j] - row_largest[i]) + (u + terms[j])


@_kept(error_model='numpy')
def sinkhorn_backward(first, last, grads, log_kernels, out, iters, log_r, log_c):
    """Problems `first` to `last` of `sinkhorn.sinkhorn_backward`; where there is no plan, NaN."""
    N, M = log_kernels.shape[1:]
    R, W = _padded(N), _padded(M)
    column_mass, log2_column_mass = np.float32(math.exp(log_c - log_r)), np.float32(log_c - log_r) * LOG2_E
    kernel, scratch = _matrix(R, W), _matrix(R, W)
    row_factors, column_factors = _matrix(2 * iters, R), _matrix(2 * iters, W)
    rows, columns = _matrix(iters, R), _matrix(iters + 1, W)
    row_largest, a, grad_a = _vector(R), _vector(R), _vector(R)
    b, grad_b, sums, terms = _vector(W), _vector(W), _vector(W), _vector(W)
    for problem in range(first, last):
        grad, grad_log_kernel = grads[problem], out[problem]
        form = _run(
            log_kernels[problem], kernel, row_largest, a, b, sums, terms, rows, columns,
            iters, N, M, column_mass, log2_column_mass)
        if form == NO_PLAN:
            for i in range(N):
                _fill(grad_log_kernel[i], NAN)
            continue
        _sums(grad, grad_a, grad_b, N, M)
        if form == SCALING:
            for t in range(iters - 1, -1, -1):
                _iterate_backward(
                    kernel, rows[t], columns[t + 1], columns[t], grad_a, grad_b,
                    row_factors[2 * t], row_factors[2 * t + 1], column_factors[2 * t], column_factors[2 * t + 1],
                    sums, N, ONE, column_mass)
            _dot(row_factors.T, column_factors, scratch, R, W, 2 * iters)
            _subtract_product(grad, kernel, scratch, grad_log_kernel, N)
        else:
            for i in range(N):
                _copy(grad[i], scratch[i])
            for t in range(iters - 1, -1, -1):
                _iterate_backward_log(
                    kernel, rows[t], columns[t + 1], columns[t], grad_a, grad_b, scratch, sums, N, ONE, column_mass)
            for i in range(N):
                _copy(scratch[i][:M], grad_log_kernel[i])
