""" The operator timm_sot::sinkhorn """
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings as hypothesis_settings, strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import reference
from kernels import ProductDtypes, values_read
from reference import error
from timm_sot import sinkhorn as public
from timm_sot.kernels import sinkhorn as module, threads
from timm_sot.kernels.sinkhorn import loops_pay, scaling_is_safe, sinkhorn, sinkhorn_backward
from timm_sot.solver import solve, solve_step_by_step

needs_loops = pytest.mark.skipif(not module.loops_work(), reason='needs numba')
LOOPS = pytest.param('loops', marks=needs_loops)
PLAIN_FORMS = pytest.mark.parametrize('scaling', ['scaling', 'log'], indirect=True)
FORMS = pytest.mark.parametrize('scaling', ['scaling', 'log', LOOPS], indirect=True)
SHAPES = pytest.mark.parametrize('shape', [(5, 5), (4, 9), (9, 4), (3, 2, 6, 5), (1, 1), (2, 1, 7), (7, 1), (0, 3, 4)])


@pytest.fixture
def scaling(request, monkeypatch):
    """The operator's argument: one of the forms of plain torch, or the compiled loops, which take float32 alone."""
    if request.param != 'loops':
        monkeypatch.setattr(module, 'loops_work', lambda: False)
    return request.param == 'scaling'


def make_log_kernel(*shape, spread=3., masked=False, dtype=torch.float64, seed=0):
    log_kernel = -spread * torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    if masked:
        log_kernel = log_kernel.masked_fill(torch.eye(*shape[-2:], dtype=torch.bool), -math.inf)
    return log_kernel.to(dtype)


def gradient(function, log_kernel, seed=1):
    """Plan, and the gradient of its product with a random matrix."""
    log_kernel = log_kernel.detach().requires_grad_()
    plan = function(log_kernel).exp()
    weights = torch.randn(plan.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    (plan.double() * weights).sum().backward()
    return plan.detach(), log_kernel.grad


@SHAPES
@pytest.mark.parametrize('iters', [1, 2, 7, 50])
@pytest.mark.parametrize('scaling, dtype, bar', [
    ('scaling', torch.float64, 1e-12), ('scaling', torch.float32, 2e-5),
    ('log', torch.float64, 1e-12), ('log', torch.float32, 2e-5),
    pytest.param('loops', torch.float32, 2e-5, marks=needs_loops),
], indirect=['scaling'])
def test_equals_plain_operations(shape, iters, dtype, bar, scaling):
    for masked in (False, True):
        if masked and min(shape[-2:]) < 3:
            continue  # no plan has these marginals
        log_kernel = make_log_kernel(*shape, masked=masked)
        plan, grad = gradient(lambda x: sinkhorn(x.to(dtype), iters, None, scaling), log_kernel)
        wanted, wanted_grad = gradient(lambda x: solve_step_by_step(x, iters, None, None), log_kernel)
        assert plan.dtype == dtype
        torch.testing.assert_close(plan.double(), wanted, rtol=bar, atol=bar / 10)
        torch.testing.assert_close(grad, wanted_grad, rtol=bar, atol=bar)


@PLAIN_FORMS
@pytest.mark.parametrize('shape', [(3, 3), (4, 3), (2, 3, 5)])
@pytest.mark.parametrize('iters', [1, 4])
def test_gradcheck(shape, iters, scaling):
    log_kernel = make_log_kernel(*shape).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sinkhorn(x, iters, 0.3, scaling), (log_kernel,))


@FORMS
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@SHAPES
def test_opcheck(shape, dtype, scaling):
    log_kernel = make_log_kernel(*shape, dtype=dtype)
    torch.library.opcheck(sinkhorn, (log_kernel.clone().requires_grad_(), 3, None, scaling))
    torch.library.opcheck(sinkhorn_backward, (log_kernel, log_kernel, 3, None, scaling))


def test_mixed_devices():
    log_kernel = make_log_kernel(4, 4)
    for args in ((log_kernel, log_kernel.to('meta')), (log_kernel.to('meta'), log_kernel)):
        with pytest.raises(RuntimeError, match='on one device, got .*meta'):
            sinkhorn_backward(*args, 3, None, False)


@FORMS
@pytest.mark.parametrize('layout', [lambda x: x.mT.contiguous().mT, lambda x: x[:1].expand_as(x)])
def test_opcheck_with_strides(layout, scaling):
    log_kernel = make_log_kernel(3, 5, 4, dtype=torch.float32)
    strided = layout(log_kernel)
    assert not strided.is_contiguous()
    settings = (3, None, scaling)
    torch.library.opcheck(sinkhorn, (strided.detach().requires_grad_(), *settings))
    for tensors in ((strided, log_kernel), (log_kernel, strided), (strided, strided)):
        torch.library.opcheck(sinkhorn_backward, (*tensors, *settings))


@pytest.mark.parametrize('scaling, dtype, spread', [
    ('scaling', torch.float32, 20.), ('scaling', torch.float64, 160.),
    *(pytest.param('loops', torch.float32, spread, marks=needs_loops) for spread in (20., 41., 100.)),
], indirect=['scaling'])
@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('N', [3, 8, 30])
def test_range_of_the_scaling_form(N, masked, scaling, dtype, spread):
    """Kernels of two values, the extremes that are allowed, in many patterns."""
    if scaling:
        assert scaling_is_safe(spread, dtype) and not scaling_is_safe(spread + 1, dtype)
    generator = torch.Generator().manual_seed(N)
    for share in (0.03, 0.1, 0.5, 0.9, 0.97):
        log_kernel = -spread * (torch.rand(20, N, N, generator=generator) < share).to(dtype)
        log_kernel[5:] *= torch.rand(15, N, 1, generator=generator).to(dtype)
        log_kernel[10:] *= torch.rand(10, N, N, generator=generator).to(dtype)
        log_kernel[:, 0] = 0
        if masked:
            log_kernel = log_kernel.masked_fill(torch.eye(N, dtype=torch.bool), -math.inf)
        plan, grad = gradient(lambda x: sinkhorn(x, 30, None, scaling), log_kernel)
        assert plan.isfinite().all() and grad.isfinite().all()
        # in float32 the log form has the larger error, of its exponents
        wanted, wanted_grad = gradient(lambda x: solve_step_by_step(x, 30, None, None), log_kernel.double())
        bar = 1e-5 if dtype == torch.float32 else 1e-11
        assert error(plan, wanted) < bar
        assert error(grad, wanted_grad) < 10 * bar


def test_the_form_is_chosen_by_the_promise(monkeypatch):
    from timm_sot import solver
    forms = []
    monkeypatch.setattr(
        solver.kernels, 'sinkhorn', lambda x, iters, row_mass, scaling: forms.append(scaling) or x)
    log_kernel = make_log_kernel(4, 4, dtype=torch.float32)
    solve(log_kernel, 3, None, None, 10.)
    solve(log_kernel, 3, None, None, 30.)
    solve(log_kernel.double(), 3, None, None, 30.)
    solve(log_kernel, 3, None, None)
    assert forms == [True, False, True, False]


@FORMS
def test_infinite_entries(scaling):
    log_kernel = make_log_kernel(2, 5, 5, masked=True, dtype=torch.float32).requires_grad_()
    log_plan = sinkhorn(log_kernel, 10, None, scaling)
    assert torch.equal(log_plan.isneginf(), log_kernel.isneginf())
    log_plan.sigmoid().square().sum().backward()
    diagonal = torch.eye(5, dtype=torch.bool).expand(2, 5, 5)
    assert (log_kernel.grad[diagonal] == 0).all()
    assert log_kernel.grad.isfinite().all() and (log_kernel.grad[~diagonal] != 0).all()


@FORMS
def test_strides(scaling):
    wide = make_log_kernel(5, 3, 14, dtype=torch.float32)
    for strided in (wide.permute(1, 2, 0), wide[..., ::2], wide[:, :1].expand(-1, 4, -1)):
        plan, grad = gradient(lambda x: sinkhorn(x, 3, None, scaling), strided)
        wanted, wanted_grad = gradient(lambda x: sinkhorn(x, 3, None, scaling), strided.contiguous())
        assert error(plan, wanted) < 1e-6 and error(grad, wanted_grad) < 1e-6


@FORMS
def test_repeats_are_equal(scaling):
    log_kernel = make_log_kernel(3, 2, 40, 40, dtype=torch.float32)
    once = gradient(lambda x: sinkhorn(x, 10, None, scaling), log_kernel)
    for _ in range(3):
        assert all(map(torch.equal, gradient(lambda x: sinkhorn(x, 10, None, scaling), log_kernel), once))


# The compiled loops

@needs_loops
@pytest.mark.parametrize('spread', [1., 30., 60., 300.])  # from the scaling form to logarithms
@pytest.mark.parametrize('shape', [(64, 64), (2, 33, 130), (130, 15), (3, 49, 48)])
def test_loops_are_as_exact_as_plain_torch(monkeypatch, shape, spread):
    log_kernel = make_log_kernel(*shape, spread=spread, masked=True, dtype=torch.float32)
    wanted = gradient(lambda x: solve_step_by_step(x, 10, None, None), log_kernel.double())

    def errors():
        actual = gradient(lambda x: sinkhorn(x, 10, None, False), log_kernel)
        return [error(x, y) for x, y in zip(actual, wanted)]

    loops = errors()
    monkeypatch.setattr(module, 'loops_work', lambda: False)
    for ours, plain in zip(loops, errors()):
        assert ours < 4 * plain + 1e-6


def drifting():
    """Log-kernels to which no plan has the marginals: the scaling vectors drift apart, threefold an iteration."""
    blocked = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    return make_log_kernel(3, 4, 4, dtype=torch.float32).masked_fill(blocked, -math.inf)


@needs_loops
@pytest.mark.parametrize('iters', [10, 20, 30, 60, 600])
def test_loops_leave_the_scaling_form_in_time(iters):
    log_kernel = drifting()
    settings = (iters, None, True)
    plan, grad = gradient(lambda x: sinkhorn(x, *settings), log_kernel)
    wanted, wanted_grad = gradient(lambda x: solve_step_by_step(x, iters, None, None), log_kernel.double())
    assert error(plan, wanted) < 1e-4
    torch.testing.assert_close(grad.double(), wanted_grad, rtol=1e-4, atol=1e-5)
    upstream = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(1))
    one = sinkhorn_backward(upstream, log_kernel, *settings)
    for factor in (2. ** -60, 2. ** 60):
        assert error(sinkhorn_backward(factor * upstream, log_kernel, *settings) / factor, one) < 1e-5


@needs_loops
@pytest.mark.parametrize('spread', [1e3, 1e4, 1e5])
def test_columns_of_sharp_kernels(spread):
    """Their sums are as exact as float32 resolves the exponents."""
    log_kernel = make_log_kernel(40, 9, 9, spread=spread, dtype=torch.float32)
    log_plan = sinkhorn(log_kernel, 10, None, False)
    assert (9 * log_plan.double().exp().sum(dim=1) - 1).abs().max() < 4 * spread * torch.finfo(torch.float32).eps


@needs_loops
@pytest.mark.parametrize('lowest', [-1e9, -2e38, torch.finfo(torch.float32).min])
def test_masks_of_finite_numbers(lowest):
    log_kernel = make_log_kernel(2, 6, 6, dtype=torch.float32)
    blocked = torch.eye(6, dtype=torch.bool)
    blocked[3:, 0] = True
    finite, infinite = (
        gradient(lambda x: sinkhorn(x, 10, None, False), log_kernel.masked_fill(blocked, value))
        for value in (lowest, -math.inf))
    assert all(error(x, y) < 1e-6 for x, y in zip(finite, infinite))
    blocked[:, 0] = True  # no plan is possible, but it stays a number
    assert all(x.isfinite().all() for x in gradient(
        lambda x: sinkhorn(x, 10, None, False), log_kernel.masked_fill(blocked, lowest)))


@needs_loops
def test_loops_do_not_mind_offsets():
    """Of rows no offset matters, of columns it does not leave the range that the rows have."""
    log_kernel = make_log_kernel(6, 20, 30, dtype=torch.float32)
    for rows, columns in ((300., 0.), (0., 12.), (300., 12.), (3000., 1000.)):
        offset = (
            log_kernel + rows * make_log_kernel(6, 20, 1, seed=1).float() + columns * make_log_kernel(1, 30).float())
        plan, grad = gradient(lambda x: sinkhorn(x, 10, None, False), offset)
        wanted, wanted_grad = gradient(lambda x: solve_step_by_step(x, 10, None, None), offset.double())
        bar = 2e-7 * (10 + rows + columns)
        assert error(plan, wanted) < bar and error(grad, wanted_grad) < 10 * bar


@pytest.mark.parametrize('scaling', ['log', LOOPS], indirect=True)
@pytest.mark.parametrize('offset', [0., 1e3, 1e4, -1e5])
def test_columns_are_exact_whatever_the_offset(offset, scaling):
    plan = sinkhorn(make_log_kernel(4, 20, 30, dtype=torch.float32) + offset, 10, None, False).exp()
    assert (30 * plan.double().sum(dim=-2) - 1).abs().max() < 2e-6


@needs_loops
@pytest.mark.parametrize('log_r', [0.3, -60., 60.])
def test_loops_take_any_mass(log_r):
    row_mass, log_c = math.exp(log_r), log_r + math.log(9 / 20)
    for spread in (3., 100.):
        log_kernel = make_log_kernel(2, 9, 20, spread=spread, dtype=torch.float32).requires_grad_()
        exact = log_kernel.detach().double().requires_grad_()
        log_plan = sinkhorn(log_kernel, 10, row_mass, False)
        wanted = solve_step_by_step(exact, 10, None, row_mass)
        assert error((log_plan - log_c).exp(), (wanted - log_c).exp()) < 2e-5
        for plan in (log_plan, wanted):
            (plan - log_c).exp().square().sum().backward()
        assert error(log_kernel.grad, exact.grad) < 1e-4


@needs_loops
@pytest.mark.parametrize('spread', [3., 20., 30., 100.])
def test_loops_are_linear_in_the_gradient(spread):
    log_kernel = make_log_kernel(2, 20, 20, spread=spread, masked=True, dtype=torch.float32)
    grad = torch.randn(2, 20, 20, generator=torch.Generator().manual_seed(1))
    settings = (10, None, False)
    one = sinkhorn_backward(grad, log_kernel, *settings)
    for factor in (2. ** -60, 2. ** 60):
        assert error(sinkhorn_backward(factor * grad, log_kernel, *settings) / factor, one) < 1e-5


@needs_loops
def test_loops_answer_nonsense_with_nan():
    """And nothing but the problem that has it."""
    log_kernel = make_log_kernel(8, 5, 20, dtype=torch.float32)
    wanted, grad = gradient(lambda x: sinkhorn(x, 10, None, False), log_kernel)
    spoilt = log_kernel.clone()
    spoilt[1, 2, 3] = math.nan
    spoilt[2, 4, 19] = math.inf
    spoilt[3, 3] = -math.inf
    spoilt[4, :, 7] = -math.inf
    spoilt[5, 0, 0] = -math.nan
    bad, good = [1, 2, 3, 4, 5], [0, 6, 7]
    plan, spoilt_grad = gradient(lambda x: sinkhorn(x, 10, None, False), spoilt)
    assert plan[bad].isnan().all() and spoilt_grad[bad].isnan().all()
    assert torch.equal(plan[good], wanted[good]) and torch.equal(spoilt_grad[good], grad[good])

    upstream = torch.ones(8, 5, 20)
    upstream[1, 2, 3] = math.nan
    for factor in (1., 100.):
        grad = sinkhorn_backward(upstream, factor * log_kernel, 10, None, False)
        assert grad[1].isnan().any() and grad[[0, 2]].isfinite().all()


@needs_loops
def test_threads_change_nothing_in_the_loops(monkeypatch):
    monkeypatch.setattr(threads, 'LEAST_WORK', 1)
    log_kernel = make_log_kernel(7, 33, 20, spread=50., dtype=torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5, 20):
            torch.set_num_threads(count)
            results.append(gradient(lambda x: sinkhorn(x, 10, None, False), log_kernel))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for result in results[1:] for x, y in zip(result, results[0]))


@pytest.mark.slow
@needs_loops
def test_loops_from_the_disk_have_the_same_bits(tmp_path):
    """As those that were just compiled."""
    code = '''
import torch
from timm_sot.kernels import cpu_loops
from timm_sot.kernels.sinkhorn import sinkhorn_backward
torch.manual_seed(0)
x = torch.cat([-5 * torch.rand(4, 33, 40), -200 * torch.rand(4, 33, 40)])
grad = sinkhorn_backward(torch.randn(8, 33, 40), x, 10, 0.05, False)
print(len(cpu_loops.sinkhorn_backward.stats.cache_hits), grad.numpy().tobytes().hex())
'''
    env = dict(os.environ, NUMBA_CACHE_DIR=str(tmp_path), PYTHONPATH=str(Path(__file__).parent.parent))
    compiled, loaded = (
        subprocess.run([sys.executable, '-c', code], env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
        for _ in range(2))
    assert (compiled[0], loaded[0]) == ('0', '1'), 'compiled, then loaded'
    same_bits = compiled[1:] == loaded[1:]  # not in the assertion, which would print them
    assert same_bits


@pytest.mark.parametrize('device, dtype, shape, cores, promised, expected', [
    ('cpu', torch.float32, (256, 64, 64), 1, True, True),
    ('cpu', torch.float32, (256, 64, 64), 64, True, True),
    ('cpu', torch.float32, (2, 1024, 1024), 4, True, True),
    ('cpu', torch.float32, (2, 1024, 1024), 5, True, False),  # plain torch on all cores is faster than two of them
    ('cpu', torch.float32, (2, 1024, 1024), 16, False, True),
    ('cpu', torch.float32, (2, 1024, 1024), 17, False, False),
    ('cpu', torch.float32, (1, 64, 64), 64, True, True),  # too small for torch to share it out
    ('cpu', torch.float32, (0, 64, 64), 8, True, True),
    ('cpu', torch.float64, (256, 64, 64), 1, False, False),
    ('meta', torch.float32, (256, 64, 64), 1, False, False),
])
def test_rule(monkeypatch, device, dtype, shape, cores, promised, expected):
    monkeypatch.setattr(torch, 'get_num_threads', lambda: cores)
    monkeypatch.setattr(module, 'loops_work', lambda: True)
    problems = torch.empty(shape, dtype=dtype, device=device)
    assert loops_pay(problems, promised) == expected
    monkeypatch.setattr(module, 'loops_work', lambda: False)
    assert not loops_pay(problems, promised)


@FORMS
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype, scaling):
    log_kernel = make_log_kernel(2, 20, 20, dtype=torch.float32)
    plain = gradient(lambda x: sinkhorn(x, 10, None, scaling), log_kernel)
    with torch.autocast('cpu', dtype=dtype):
        assert all(map(torch.equal, gradient(lambda x: sinkhorn(x, 10, None, scaling), log_kernel), plain))


# Memory

def saved_bytes(iters, scaling, N=1024):
    log_kernel = make_log_kernel(N, N, dtype=torch.float32).requires_grad_()
    sizes = {}

    def pack(x):
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        sinkhorn(log_kernel, iters, None, scaling)
    return sum(sizes.values())


@FORMS
def test_what_is_kept_does_not_grow_with_the_iterations(scaling):
    assert saved_bytes(100, scaling) == saved_bytes(1, scaling) == 4 * 1024 ** 2


@FORMS
def test_nothing_waits_for_a_device(scaling):
    log_kernel = make_log_kernel(2, 6, 6, dtype=torch.float32)
    with values_read() as seen:
        gradient(lambda x: sinkhorn(x, 10, None, scaling), log_kernel)
    assert not seen


# What runs without data or without this package

def test_compile_and_export():
    def plan(log_kernel):
        return public(log_kernel, iters=5).exp()

    log_kernel = make_log_kernel(2, 6, 7, dtype=torch.float32)
    compiled = torch.compile(plan, fullgraph=True, backend='aot_eager')
    for shape in ((2, 6, 7), (3, 6, 7), (5, 4)):
        x = make_log_kernel(*shape, dtype=torch.float32)
        actual, wanted = (gradient(lambda x: f(x).log(), x) for f in (compiled, plan))
        assert error(actual[0], wanted[0]) < 1e-6 and error(actual[1], wanted[1]) < 1e-5

    class Plan(torch.nn.Module):
        def forward(self, log_kernel):
            return plan(log_kernel)

    exported = torch.export.export(Plan(), (log_kernel,), dynamic_shapes=({0: torch.export.Dim('batch')},))
    assert ('timm_sot' in str(exported.graph)) == (not hasattr(torch.compiler, 'is_exporting'))
    many = make_log_kernel(4, 6, 7, dtype=torch.float32)
    assert error(exported.module()(many), plan(many)) < 1e-6


def test_fake_and_meta_tensors():
    with FakeTensorMode():
        log_kernel = torch.randn(2, 6, 7, requires_grad=True)
        out = public(log_kernel)
        out.sum().backward()
        assert out.shape == log_kernel.grad.shape == (2, 6, 7)
    assert public(torch.randn(2, 6, 7, device='meta')).shape == (2, 6, 7)


def test_torch_func():
    log_kernel = make_log_kernel(3, 4, 5)
    assert error(torch.func.vmap(public)(log_kernel), public(log_kernel)) < 1e-12
    _, grad = gradient(public, log_kernel[0], seed=2)
    weights = torch.randn(4, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert error(torch.func.grad(lambda x: (public(x).exp() * weights).sum())(log_kernel[0]), grad) < 1e-12


def test_torchscript_knows_no_operator_of_ours():
    log_kernel = make_log_kernel(2, 4, 5)
    scripted = torch.jit.script(solve)
    traced = torch.jit.trace(lambda x: solve(x, 10, None, None), (log_kernel,))
    for function, graph in (
            (lambda x: scripted(x, 10, None, None), scripted.inlined_graph), (traced, traced.inlined_graph)):
        assert 'timm_sot::' not in str(graph)
        assert error(function(log_kernel), public(log_kernel)) < 1e-12


@FORMS
@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('shape', [(4, 4), (2, 3, 5)])
def test_second_derivative(shape, masked, scaling):
    """And a third."""
    def derivatives(function, dtype):
        log_kernel = make_log_kernel(*shape, masked=masked, dtype=dtype).requires_grad_()
        result, results = function(log_kernel).exp().square().sum(), []
        for i in range(3):
            result, = torch.autograd.grad(result.pow(i + 1).sum(), log_kernel, create_graph=i < 2)
            results.append(result.detach())
        return results

    dtype = torch.float32 if module.loops_work() else torch.float64  # the loops take nothing else
    actual = derivatives(lambda x: sinkhorn(x, 3, None, scaling), dtype)
    wanted = derivatives(lambda x: solve_step_by_step(x, 3, None, None), torch.float64)
    for x, y in zip(actual, wanted):
        assert error(x, y) < 1e-4
    if dtype == torch.float64:
        assert torch.autograd.gradgradcheck(
            lambda x: sinkhorn(x, 3, None, scaling).exp(), (make_log_kernel(*shape).requires_grad_(),))


@hypothesis_settings(max_examples=150, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 12), min_size=2, max_size=4),
    iters=st.integers(1, 30),
    spread=st.floats(0., 300.),
    masked=st.booleans(),
    row_mass=st.sampled_from([None, 1e-3, 1., 100.]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_anything(shape, iters, spread, masked, row_mass, dtype, seed):
    masked = masked and min(shape[-2:]) >= 3 and shape[-2] == shape[-1]
    log_kernel = make_log_kernel(*shape, spread=spread, masked=masked, dtype=dtype, seed=seed)
    wanted = reference.sinkhorn(log_kernel, iters, row_mass=row_mass).exp()
    plan, grad = gradient(lambda x: public(x, iters=iters, row_mass=row_mass).float(), log_kernel)
    assert grad.isfinite().all() and plan.isfinite().all()
    if dtype in (torch.float32, torch.float64):
        assert error(plan, wanted) < 1e-5 * (1 + spread)
        # a promise that holds
        promised = solve(log_kernel, iters, None, row_mass, spread).exp()
        assert error(promised, wanted) < 1e-5 * (1 + spread)


def test_no_product_is_rounded_to_tensorfloat():
    """Which timm's train.py allows a GPU: the gradient is a difference with a product of matrices."""
    x = torch.rand(2, 5, 4, device='meta')
    with ProductDtypes() as products:
        module._backward(x, x, 3, 0., 0.)
    assert products.seen == [torch.float64]
