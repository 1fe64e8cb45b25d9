""" The fused loops for the CPU """
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings as hypothesis_settings, strategies as st

from kernels import (
    BARS,
    VARIANTS,
    assert_close,
    degenerate,
    dropout_factor,
    expected,
    make_inputs,
    run,
    settings,
    values_read,
)
from timm_sot.kernels import cpu, threads
from timm_sot.kernels.fused import fused_sot_attention
from timm_sot.kernels.threads import loops_work
from timm_sot.solver import iterate_step_by_step
from timm_sot.transform import pairwise_cost

pytestmark = pytest.mark.skipif(not loops_work(), reason='needs numba')


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Inputs for this path are made on the CPU where there is a GPU too."""
    monkeypatch.setattr(make_inputs, '__defaults__', (*make_inputs.__defaults__[:-1], 'cpu'))
    monkeypatch.setattr(degenerate, '__defaults__', (*degenerate.__defaults__[:-1], 'cpu'))


@pytest.mark.parametrize('distance', ['euclidean', 'cosine'])
@pytest.mark.parametrize('reg', [0.005, 0.025, 0.05, 0.1, 0.8, 10.])
@pytest.mark.parametrize('variant', VARIANTS)
def test_variants(variant, reg, distance):
    tensors = make_inputs(2, 2, 32, 32)
    # float32 costs in [0, 1] are exact to 1e-7, log-kernels to 1e-7 / reg
    slack = 10. if reg < 0.05 else 1.
    assert_close(
        run('cpu', *tensors, variant, reg=reg, distance=distance),
        expected(*tensors, variant, reg, distance=distance), slack=slack)


@pytest.mark.parametrize('variant', ['sot_q', 'sot_qk'])
@pytest.mark.parametrize('N, D', [
    (1, 16), (2, 16), (3, 5), (4, 1), (15, 16), (16, 16), (17, 48), (49, 32), (64, 64), (65, 33), (100, 80), (197, 64)])
def test_sizes(variant, N, D):
    tensors = make_inputs(1, 2, N, D)
    assert_close(run('cpu', *tensors, variant, iters=5), expected(*tensors, variant, iters=5))


@pytest.mark.slow
@pytest.mark.parametrize('variant', ['sot_q', 'sot_qk', 'sot_qk_nosoftmax'])
def test_parallel_points_are_at_cosine_distance_0(variant):
    """Also where the lengths of the rows, or their inverses, are rounded."""
    q, k, v, grad = make_inputs(3, 2, 20, 16)
    direction = q[:, :, :1].clone()
    direction[0] = torch.eye(16)[3]
    q, k = direction * q[..., :1].exp(), direction * k[..., :1].exp()
    out, grad_q, grad_k, _ = run('cpu', q, k, v, grad, variant, distance='cosine')
    weight = 1 / 20 if 'nosoftmax' not in variant else 1 / 4
    assert (out - weight * v.sum(dim=-2, keepdim=True)).abs().max() < 1e-5
    assert not grad_q.any() and not grad_k.any()


@pytest.mark.parametrize('reg', [0.02, 0.1])
def test_many_tokens(reg):
    tensors = make_inputs(1, 1, 2049, 16)
    assert_close(
        run('cpu', *tensors, 'sot_qk', iters=2, reg=reg), expected(*tensors, 'sot_qk', reg, iters=2),
        slack=10. if reg < 0.05 else 1.)


@pytest.mark.parametrize('reg', [0.02, 0.1])
@pytest.mark.parametrize('iters', [1, 2, cpu.MAX_KEPT_ITERS, cpu.MAX_KEPT_ITERS + 1, 100])
def test_iterations(iters, reg):
    """With the scaling vectors of all iterations kept, and with none."""
    tensors = make_inputs(1, 2, 20, 16)
    assert_close(run('cpu', *tensors, reg=reg, iters=iters), expected(*tensors, reg=reg, iters=iters), slack=10.)


@pytest.mark.parametrize('distance', ['euclidean', 'cosine'])
@pytest.mark.parametrize('reg', [0.02, 0.1, 1.])
@pytest.mark.parametrize('operands', ['q', 'qk', 'qkt'])
def test_count_of_iterations(operands, reg, distance):
    """As in plain torch in float64, which stops in them."""
    q, k, _, _ = make_inputs(2, 2, 20, 20)
    x = q.double()
    y = {'q': x, 'qk': k.double(), 'qkt': k.double().transpose(-2, -1)}[operands]
    log_kernel = (pairwise_cost(x, y, distance, 'row') / -reg).masked_fill(torch.eye(20, dtype=torch.bool), -math.inf)
    counts = []
    for iters in (7, 2 * cpu.MAX_KEPT_ITERS + 5):
        for tol in (1e9, 0.3, 0.1, 1e-2, 1e-4, 0.):
            counts.append(cpu.count_iterations(q, k, operands, reg, iters, tol, distance))
            assert counts[-1] == iterate_step_by_step(log_kernel, iters, tol / reg, None)[2]
    assert len(set(counts)) >= 4


def test_count_of_iterations_in_parts(monkeypatch):
    """Where the vectors of all images would be too many."""
    q, k, _, _ = make_inputs(5, 2, 20, 20)
    tolerances = (0.1, 1e-2, 1e-4)
    expected = [cpu.count_iterations(q, k, 'qk', 0.02, 99, tol) for tol in tolerances]
    kept, empty = [], torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, 'new_empty', lambda x, *shape, **kwargs: (kept.append(shape), empty(x, *shape, **kwargs))[1])
    for most, images in ((2 * 2 * (21 + 2 * cpu.MAX_KEPT_ITERS) * 32, [2, 2, 1]), (1, [1] * 5)):
        monkeypatch.setattr(cpu, 'MAX_COUNTING', most)
        del kept[:]
        assert [cpu.count_iterations(q, k, 'qk', 0.02, 99, tol) for tol in tolerances] == expected
        problems = [shape[0] for shape in kept if len(shape) == 3]  # of the vectors
        assert problems[:len(images)] == [2 * n for n in images]


def test_count_does_not_run_all_that_it_may(monkeypatch):
    q, k, _, _ = make_inputs(1, 2, 20, 16)
    ran = []
    work = cpu.work
    monkeypatch.setattr(cpu, 'work', lambda q, iters: (ran.append(iters), work(q, iters))[1])
    assert cpu.count_iterations(q, k, 'qk', 0.1, 10 ** 9, 0.1) < 10
    assert ran == [cpu.MAX_KEPT_ITERS]


def test_count_of_iterations_with_another_default_device():
    q, k, _, _ = make_inputs(1, 2, 20, 16)
    with torch.device('meta'):
        assert cpu.count_iterations(q, k, 'qk', 0.1, 9, 0.1) < 9


@pytest.mark.parametrize('bad', [math.nan, math.inf, 1e30])
def test_count_of_iterations_of_what_is_not_finite(monkeypatch, bad):
    monkeypatch.setattr(torch.Tensor, 'new_empty', torch.Tensor.new_zeros)  # what was there before may do by chance
    q, k, _, _ = make_inputs(2, 2, 20, 16)
    k[1, 0, 3, 5] = bad
    assert cpu.count_iterations(q, k, 'qk', 0.1, 9, 1e-2) == 9
    assert cpu.count_iterations(q[:, 1:], k[:, 1:], 'qk', 0.1, 9, 1e-2) < 9


@pytest.mark.parametrize('variant', ['sot_q', 'sot_qk', 'sot_qk_nosoftmax'])
@pytest.mark.parametrize('scale', [1e-4, 1e4])
def test_scales(variant, scale):
    tensors = make_inputs(1, 2, 20, 32, scale=scale)
    assert_close(run('cpu', *tensors, variant), expected(*tensors, variant), floor=0.)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('variant', ['sot_q', 'sot_qk'])
def test_half(variant, dtype):
    tensors = make_inputs(1, 2, 20, 32, dtype)
    assert_close(run('cpu', *tensors, variant), expected(*tensors, variant), dtype)


@pytest.mark.parametrize('N, distance', [(32, 'euclidean'), (32, 'cosine'), (20, 'euclidean')])
@pytest.mark.parametrize('variant', VARIANTS)
def test_bfloat16_is_float32_rounded_once(variant, N, distance):
    """In whole tiles, which float32 reads and writes where they lie, and in others; with what float32 rounds to inf."""
    D = N if variant == 'sot_qkt' else 32
    tensors = [x.clone() for x in make_inputs(4, 2, N, D, torch.bfloat16)]
    tensors[2][1] *= torch.finfo(torch.bfloat16).max / tensors[2][1].abs().max()
    tensors[0][2, 1, 3, 5] = math.nan
    tensors[3][3, 0, 2, 1] = -math.inf
    rounded = [x.bfloat16() for x in run('cpu', *map(torch.Tensor.float, tensors), variant, p=0.1, distance=distance)]
    actual = run('cpu', *tensors, variant, p=0.1, distance=distance)
    assert all(torch.equal(x.nan_to_num(-1.5), y.nan_to_num(-1.5)) for x, y in zip(actual, rounded))
    assert all(torch.equal(x.isnan(), y.isnan()) for x, y in zip(actual, rounded))


@pytest.mark.parametrize('distance', ['euclidean', 'cosine'])
@pytest.mark.parametrize('variant', ['sot_q', 'sot_qk'])
def test_close_points_far_from_the_origin(variant, distance):
    """Differences are taken before anything is squared, between unit vectors for the cosine distance."""
    q, k, v, grad = make_inputs(1, 2, 24, 16)
    q, k = 1e-3 * q + 10., 1e-3 * k + 10.
    q[..., 12:, :] = q[..., :12, :] + 1e-5 * torch.randn(12, 16, generator=torch.Generator().manual_seed(1))
    # float32 has these directions themselves to 1e-4 of their differences
    slack = 1. if distance == 'euclidean' else 30.
    assert_close(
        run('cpu', q, k, v, grad, variant, distance=distance), expected(q, k, v, grad, variant, distance=distance),
        slack=slack, floor=0.)


@pytest.mark.parametrize('variant', ['sot_q_nosoftmax', 'sot_qk_nosoftmax'])
@pytest.mark.parametrize('spread, bar', [(1e-1, 2e-5), (1e-2, 2e-4), (1e-3, 2e-3)])
def test_close_directions(spread, bar, variant):
    """Errors of the costs are those that float32 makes in the unit vectors, in units of their distances."""
    q, k, v, grad = make_inputs(2, 2, 32, 32)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(1))
    tensors = direction + spread * q, direction + spread * k, v, grad
    for x, y in zip(run('cpu', *tensors, variant, distance='cosine'), expected(*tensors, variant, distance='cosine')):
        if y is not None:
            assert (x.double() - y).norm() < bar * y.norm()


@pytest.mark.parametrize('distance', ['euclidean', 'cosine'])
@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('reg', [0.005, 0.1, 10.])
@pytest.mark.parametrize('dtype', BARS)
def test_degenerate(variant, reg, dtype, distance):
    tensors = degenerate(4, 16, 16, dtype)
    actual = run('cpu', *tensors, variant, reg=reg, iters=5, distance=distance)
    for x in actual:
        assert x.isfinite().all()
    assert_close(actual[:1], expected(*tensors, variant, reg, 5, distance=distance)[:1], dtype, slack=10.)


def test_equal_points_do_not_move():
    """Between equal points there is no force, however steep the kernel."""
    q, k, v, grad = make_inputs(1, 1, 12, 8)
    q = q[..., :1, :].repeat(1, 1, 12, 1)
    out, grad_q, grad_k, _ = run('cpu', q, q.clone(), v, grad)
    assert (grad_q == 0).all() and (grad_k == 0).all()
    assert out.isfinite().all()


@pytest.mark.parametrize('variant', ['sot_q', 'sot_qk'])
@pytest.mark.parametrize('N', [3, 8, 16])
def test_range_of_the_scaling_form(N, variant):
    """Outliers and clusters drive the scaling vectors apart as far as they go, at the smallest reg that has them."""
    q, k, v, grad = make_inputs(6, 1, N, 16)
    q, k = q.clone(), k.clone()
    for b in range(6):  # b + 1 outliers far apart, the others close together
        q[b, :, b + 1:] *= 1e-3
        k[b, :, b + 1:] *= 1e-3
    q[3:] *= torch.logspace(0, 8, N).view(N, 1)
    actual = run('cpu', q, k, v, grad, variant, reg=cpu.SCALING_MIN_REG, iters=30)
    for x in actual:
        assert x.isfinite().all()
    out = expected(q, k, v, grad, variant, cpu.SCALING_MIN_REG, 30)[0]
    torch.testing.assert_close(actual[0].double(), out, rtol=0, atol=1e-4)


def test_columns_that_no_row_can_see():
    """In the log form one column may lose all its terms against the others': then they are taken again."""
    q, k, v, grad = make_inputs(1, 1, 16, 8)
    k[..., 0, :] *= 100.  # a key that is far from all queries
    tensors = q, k, v, grad
    assert_close(run('cpu', *tensors, reg=0.005, iters=3), expected(*tensors, reg=0.005, iters=3), slack=10.)


# Dropout

@pytest.mark.parametrize('reg', [0.02, 0.1])
@pytest.mark.parametrize('variant', ['sot_q', 'sot_qk', 'sot_qk_nosoftmax'])
def test_dropout(variant, reg):
    p = 0.3
    q, k, v, grad = make_inputs(2, 2, 30, 32)
    factor = dropout_factor('cpu', q, k, variant, p)
    assert abs((factor > 0).double().mean().item() - (1 - p)) < 0.03
    assert len({tuple(f.flatten().tolist()) for f in factor.flatten(0, 1)}) == 4  # problems differ
    assert_close(
        run('cpu', q, k, v, grad, variant, reg=reg, iters=2, p=p),
        expected(q, k, v, grad, variant, reg, iters=2, factor=factor), slack=10. if reg < 0.05 else 1.)


def kept(p, seed, B=4, H=2, N=64):
    """Which weights dropout keeps."""
    q, k, _, _ = make_inputs(B, H, N, N)
    eye = torch.eye(N).expand_as(q)
    out, _ = cpu.sot_attention_forward(q, k, eye, 'qk', False, 0.1, 1, 1., p, torch.tensor([seed]))
    return out != 0


def test_dropout_is_random():
    p = 0.25
    masks = torch.stack([kept(p, seed) for seed in (0, 1, 2, 2 ** 40, -1)]).double()
    count = masks[0].numel()
    error = (p * (1 - p) / count) ** 0.5
    for mask in masks:
        assert abs(mask.mean() - (1 - p)) < 4 * error
        # rows, columns and problems each have about their share, neighbours are independent
        for dim in range(4):
            along = mask.mean(dim=[d for d in range(4) if d != dim])
            assert ((along - (1 - p)).abs() < 5 * (p * (1 - p) * along.numel() / count) ** 0.5).all()
        for dim in range(4):
            n = mask.shape[dim] - 1
            together = (mask.narrow(dim, 0, n) * mask.narrow(dim, 1, n)).mean()
            assert abs(together - (1 - p) ** 2) < 5 * (count * n / (n + 1)) ** -0.5
    for i in range(len(masks)):
        for j in range(i):
            assert abs((masks[i] * masks[j]).mean() - (1 - p) ** 2) < 5 * count ** -0.5


def test_expectation_of_dropout():
    q, k, v, grad = make_inputs(1, 1, 16, 16)
    args = ('qk', True, 0.1, 3, 0.25)
    mean = sum(
        cpu.sot_attention_forward(q, k, v, *args, 0.5, torch.tensor([seed]))[0].double() for seed in range(2000)) / 2000
    out, _ = cpu.sot_attention_forward(q, k, v, *args)
    assert (mean - out).abs().max() < 5 * (v.square().mean().item() / 16 / 2000) ** 0.5


@pytest.mark.parametrize('p', [0., 1.])
def test_ends_of_dropout(p):
    q, k, v, grad = make_inputs(1, 2, 8, 8)
    actual = run('cpu', q, k, v, grad, p=p)
    if p:
        assert all((x == 0).all() for x in actual)
    else:
        assert_close(actual, expected(q, k, v, grad))


# Memory and machinery

def test_strides():
    """Keys stored transposed, values broadcast, and a gradient with a stride of its own."""
    q, k, v, grad = make_inputs(2, 2, 20, 32)
    k = k.transpose(-2, -1).contiguous().transpose(-2, -1)
    v = v[:1].expand(2, -1, -1, -1)
    grad = grad.repeat_interleave(2, dim=-1)[..., ::2]
    assert_close(run('cpu', q, k, v, grad, iters=2), expected(q, k, v, grad, iters=2))
    ones = torch.ones(()).expand_as(grad)  # as the gradient of a sum
    assert_close(run('cpu', q, k, v, ones, iters=2), expected(q, k, v, ones, iters=2))


def test_inputs_are_left_alone():
    tensors = make_inputs(1, 2, 20, 16)
    before = [x.clone() for x in tensors]
    run('cpu', *tensors)
    assert all(map(torch.equal, tensors, before))


@pytest.mark.parametrize('variant', ['sot_q', 'sot_qk'])
def test_repeats_and_threads_change_nothing(monkeypatch, variant):
    monkeypatch.setattr(threads, 'LEAST_WORK', 1)
    tensors = make_inputs(5, 3, 33, 16)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        once = run('cpu', *tensors, variant, p=0.2)
        for count in (1, 2, 4, 64):
            torch.set_num_threads(count)
            assert all(map(torch.equal, run('cpu', *tensors, variant, p=0.2), once))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize('least_work', [1, threads.LEAST_WORK])  # with threads of their own, and without
def test_many_threads_of_python_at_once(monkeypatch, least_work):
    monkeypatch.setattr(threads, 'LEAST_WORK', least_work)
    tensors = make_inputs(4, 2, 33, 16)
    once = run('cpu', *tensors)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        with ThreadPoolExecutor(8) as pool:
            for actual in pool.map(lambda _: run('cpu', *tensors), range(32)):
                assert all(map(torch.equal, actual, once))
    finally:
        torch.set_num_threads(before)


def test_problems_are_independent():
    q, k, v, grad = make_inputs(3, 2, 20, 16)
    q[1] *= 1000
    together = run('cpu', q, k, v, grad)
    for b in range(3):
        alone = run('cpu', *(x[b:b + 1] for x in (q, k, v, grad)))
        assert all(torch.equal(x[b:b + 1], y) for x, y in zip(together, alone))


@pytest.mark.parametrize('N', [16, 18])  # without and with padding
def test_distances_beyond_float32(N):
    """Their squares are infinite, which the loops do not expect in what they compare."""
    q, k, v, grad = make_inputs(2, 1, N, 16)
    together = run('cpu', q * 1e10, k * 1e10, v, grad)
    assert_close(together, expected(q * 1e10, k * 1e10, v, grad))
    q[1] *= 1e20
    out, *grads = run('cpu', q, k, v, grad)
    assert all(x[0].isfinite().all() for x in (out, *grads)) and all(x[1].isnan().all() for x in (out, *grads))


def test_no_problems_at_all():
    for x in run('cpu', *make_inputs(0, 2, 20, 16)):
        assert x.shape == (0, 2, 20, 16)


def test_nothing_waits_for_a_device():
    q, k, v, grad = make_inputs(1, 2, 20, 16)
    args = settings(q, 'sot_qk', p=0.1)
    with values_read() as seen:
        _, saved = cpu.sot_attention_forward(q, k, v, *args)
        cpu.sot_attention_backward(grad, q, k, v, saved, *args)
    assert not seen


def saved_bytes(iters, N=1024, D=32):
    q, k, v = (torch.randn(1, 1, N, D, requires_grad=True) for _ in range(3))
    sizes = {}

    def pack(x):
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        fused_sot_attention(q, k, v, 'qk', True, 0.1, iters, D ** -0.5, 0., 'euclidean', 'cpu')
    return sum(sizes.values())


def test_what_is_kept_does_not_grow_with_the_iterations():
    one = saved_bytes(1)
    assert one < 4 * 1024 * (1024 + 8 * 32), 'more than one matrix'
    assert saved_bytes(100) <= 1.01 * one
    assert saved_bytes(cpu.MAX_KEPT_ITERS) <= 1.1 * one


@pytest.mark.slow
@pytest.mark.parametrize('problem', ['no folder', 'no numba'])
def test_without_cache_or_numba(problem):
    code = {
        'no folder': '''
            import numba.core.caching
            numba.core.caching.CacheImpl._locator_classes = []
            import torch
            from timm_sot.kernels import cpu_loops
            from timm_sot import sinkhorn
            sinkhorn(torch.zeros(4, 4))
            assert cpu_loops.sinkhorn_forward.signatures and not cpu_loops.sinkhorn_forward.stats.cache_path
        ''',
        'no numba': '''
            import sys
            sys.modules['numba'] = None
            import torch
            from timm_sot import SOTAttention
            from timm_sot.kernels.threads import loops_work
            assert not loops_work()
            SOTAttention(32, 2)(torch.randn(1, 9, 32)).sum().backward()
        ''',
    }[problem]
    code = '\n'.join(line.strip() for line in code.splitlines())
    subprocess.run([sys.executable, '-c', code], check=True)


# Anything

@hypothesis_settings(max_examples=150, deadline=None, derandomize=True)
@given(
    variant=st.sampled_from(VARIANTS),
    B=st.integers(1, 3),
    H=st.integers(1, 3),
    N=st.integers(1, 40),
    D=st.integers(1, 40),
    dtype=st.sampled_from(list(BARS)),
    reg=st.floats(0.005, 10.),
    iters=st.integers(1, 25),
    scale=st.sampled_from([1e-4, 1e-2, 1., 1e2, 1e4]),
    distance=st.sampled_from(['euclidean', 'cosine']),
    p=st.sampled_from([0., 0.1]),
    equal=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_anything(variant, B, H, N, D, dtype, reg, iters, scale, distance, p, equal, seed):
    if variant == 'sot_qkt':
        D = N
    q, k, v, grad = make_inputs(B, H, N, D, dtype, scale, seed, 'cpu')
    if equal:
        q, k = q.clone(), k.clone()
        q[..., ::2, :] = q[..., :1, :].clone()
        k[..., 1::2, :] = q[..., :1, :].clone()
    actual = run('cpu', q, k, v, grad, variant, reg=reg, iters=iters, p=p, distance=distance)
    wanted = expected(q, k, v, grad, variant, reg, iters, distance=distance)
    for x, y in zip(actual, wanted):
        if y is not None and y.isfinite().all() and y.abs().max() < torch.finfo(dtype).max:
            assert x.isfinite().all()
    if p == 0.:
        # a small regularization magnifies what float32 rounds, not what comes of rounding the output
        difference = (actual[0].double() - wanted[0]).norm()
        assert difference <= (10. * BARS[dtype][0] + 1e-5 / min(1., reg / 0.05)) * wanted[0].norm() + 1e-6


@pytest.mark.parametrize('method', ['load', 'save'])
def test_a_cache_that_fails_is_done_without(tmp_path, monkeypatch, method):
    """A full disk, a file of another user, or one that is empty after a crash."""
    import numba

    from timm_sot.kernels import cpu_loops
    monkeypatch.setattr(numba.core.config, 'CACHE_DIR', str(tmp_path))
    asked = []

    def fail(*args):
        asked.append(args)
        raise OSError(28, 'No space left on device')

    @cpu_loops._kept()
    def twice(x):
        return 2 * x

    monkeypatch.setattr(twice._cache._cache_file, method, fail)
    assert twice(3) == 6 and twice(1.5) == 3. and len(asked) == 1, 'nor is it asked again'


@pytest.mark.parametrize('damaged', ['*.nbi', '*.nbc'])
def test_a_damaged_cache_is_put_right(tmp_path, monkeypatch, damaged):
    import numba

    from timm_sot.kernels import cpu_loops
    monkeypatch.setattr(numba.core.config, 'CACHE_DIR', str(tmp_path))

    def twice():
        @cpu_loops._kept()
        def twice(x):
            return 2 * x
        assert twice(3) == 6
        return sum(twice.stats.cache_hits.values())

    assert (twice(), twice()) == (0, 1)
    file, = tmp_path.rglob(damaged)
    file.write_bytes(file.read_bytes()[:20])
    assert (twice(), twice()) == (0, 1)
