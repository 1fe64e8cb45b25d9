""" The operator timm_sot::sinkhorn """
import math

import pytest
import torch
from hypothesis import given, settings as hypothesis_settings, strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import reference
from reference import error
from timm_sot import sinkhorn as public
from timm_sot.kernels.sinkhorn import scaling_is_safe, sinkhorn, sinkhorn_backward
from timm_sot.solver import solve, solve_step_by_step

FORMS = pytest.mark.parametrize('scaling', [True, False], ids=['scaling', 'log'])
SHAPES = pytest.mark.parametrize('shape', [(5, 5), (4, 9), (9, 4), (3, 2, 6, 5), (1, 1), (2, 1, 7), (7, 1), (0, 3, 4)])


def make_log_kernel(*shape, spread=3., masked=False, dtype=torch.float64, seed=0):
    log_kernel = -spread * torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    if masked:
        log_kernel = log_kernel.masked_fill(torch.eye(*shape[-2:], dtype=torch.bool), -math.inf)
    return log_kernel.to(dtype)


def masses(log_kernel):
    return -math.log(log_kernel.shape[-2]), -math.log(log_kernel.shape[-1])


def gradient(function, log_kernel, seed=1):
    """Plan, and the gradient of its product with a random matrix."""
    log_kernel = log_kernel.detach().requires_grad_()
    plan = function(log_kernel).exp()
    weights = torch.randn(plan.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    (plan.double() * weights).sum().backward()
    return plan.detach(), log_kernel.grad


@FORMS
@SHAPES
@pytest.mark.parametrize('iters', [1, 2, 7, 50])
@pytest.mark.parametrize('dtype, bar', [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_equals_plain_operations(shape, iters, dtype, bar, scaling):
    for masked in (False, True):
        if masked and min(shape[-2:]) < 3:
            continue  # no plan has these marginals
        log_kernel = make_log_kernel(*shape, masked=masked)
        plan, grad = gradient(lambda x: sinkhorn(x.to(dtype), iters, *masses(x), scaling), log_kernel)
        wanted, wanted_grad = gradient(lambda x: solve_step_by_step(x, iters, None, *masses(x)), log_kernel)
        assert plan.dtype == dtype
        torch.testing.assert_close(plan.double(), wanted, rtol=bar, atol=bar / 10)
        torch.testing.assert_close(grad, wanted_grad, rtol=bar, atol=bar)


@FORMS
@pytest.mark.parametrize('shape', [(3, 3), (4, 3), (2, 3, 5)])
@pytest.mark.parametrize('iters', [1, 4])
def test_gradcheck(shape, iters, scaling):
    log_kernel = make_log_kernel(*shape).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sinkhorn(x, iters, 0.3, -0.2, scaling), (log_kernel,))


@FORMS
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@SHAPES
def test_opcheck(shape, dtype, scaling):
    log_kernel = make_log_kernel(*shape, dtype=dtype)
    torch.library.opcheck(sinkhorn, (log_kernel.clone().requires_grad_(), 3, *masses(log_kernel), scaling))
    torch.library.opcheck(sinkhorn_backward, (log_kernel, log_kernel, 3, *masses(log_kernel), scaling))


@pytest.mark.parametrize('dtype, spread', [(torch.float32, 20.), (torch.float64, 160.)])
@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('N', [3, 8, 30])
def test_range_of_the_scaling_form(N, masked, dtype, spread):
    """Kernels of two values, the extremes that are allowed, in many patterns."""
    assert scaling_is_safe(spread, dtype) and not scaling_is_safe(spread + 1, dtype)
    generator = torch.Generator().manual_seed(N)
    for share in (0.03, 0.1, 0.5, 0.9, 0.97):
        log_kernel = -spread * (torch.rand(20, N, N, generator=generator) < share).to(dtype)
        log_kernel[5:] *= torch.rand(15, N, 1, generator=generator).to(dtype)
        log_kernel[10:] *= torch.rand(10, N, N, generator=generator).to(dtype)
        log_kernel[:, 0] = 0
        if masked:
            log_kernel = log_kernel.masked_fill(torch.eye(N, dtype=torch.bool), -math.inf)
        plan, grad = gradient(lambda x: sinkhorn(x, 30, *masses(x), True), log_kernel)
        assert plan.isfinite().all() and grad.isfinite().all()
        # in float32 the log form has the larger error, of its exponents
        wanted, wanted_grad = gradient(lambda x: solve_step_by_step(x, 30, None, *masses(x)), log_kernel.double())
        bar = 1e-5 if dtype == torch.float32 else 1e-11
        assert error(plan, wanted) < bar
        assert error(grad, wanted_grad) < 10 * bar


def test_the_form_is_chosen_by_the_promise(monkeypatch):
    from timm_sot import solver
    forms = []
    monkeypatch.setattr(
        solver.kernel, 'sinkhorn', lambda x, iters, log_r, log_c, scaling: forms.append(scaling) or x)
    log_kernel = make_log_kernel(4, 4, dtype=torch.float32)
    solve(log_kernel, 3, None, None, 10.)
    solve(log_kernel, 3, None, None, 30.)
    solve(log_kernel.double(), 3, None, None, 30.)
    solve(log_kernel, 3, None, None)
    assert forms == [True, False, True, False]


@FORMS
def test_infinite_entries(scaling):
    log_kernel = make_log_kernel(2, 5, 5, masked=True, dtype=torch.float32).requires_grad_()
    log_plan = sinkhorn(log_kernel, 10, *masses(log_kernel), scaling)
    assert torch.equal(log_plan.isneginf(), log_kernel.isneginf())
    log_plan.sigmoid().square().sum().backward()
    diagonal = torch.eye(5, dtype=torch.bool).expand(2, 5, 5)
    assert (log_kernel.grad[diagonal] == 0).all()
    assert log_kernel.grad.isfinite().all() and (log_kernel.grad[~diagonal] != 0).all()


@FORMS
def test_strides(scaling):
    wide = make_log_kernel(5, 3, 14)
    for strided in (wide.permute(1, 2, 0), wide[..., ::2], wide[:, :1].expand(-1, 4, -1)):
        plan, grad = gradient(lambda x: sinkhorn(x, 3, *masses(x), scaling), strided)
        wanted, wanted_grad = gradient(lambda x: sinkhorn(x, 3, *masses(x), scaling), strided.contiguous())
        assert error(plan, wanted) < 1e-13 and error(grad, wanted_grad) < 1e-13


@FORMS
def test_repeats_are_equal(scaling):
    log_kernel = make_log_kernel(3, 2, 40, 40, dtype=torch.float32)
    once = gradient(lambda x: sinkhorn(x, 10, *masses(x), scaling), log_kernel)
    for _ in range(3):
        assert all(map(torch.equal, gradient(lambda x: sinkhorn(x, 10, *masses(x), scaling), log_kernel), once))


@FORMS
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype, scaling):
    log_kernel = make_log_kernel(2, 20, 20, dtype=torch.float32)
    plain = gradient(lambda x: sinkhorn(x, 10, *masses(x), scaling), log_kernel)
    with torch.autocast('cpu', dtype=dtype):
        assert all(map(torch.equal, gradient(lambda x: sinkhorn(x, 10, *masses(x), scaling), log_kernel), plain))


# Memory

def saved_bytes(iters, scaling, N=1024):
    log_kernel = make_log_kernel(N, N, dtype=torch.float32).requires_grad_()
    sizes = {}

    def pack(x):
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        sinkhorn(log_kernel, iters, *masses(log_kernel), scaling)
    return sum(sizes.values())


@FORMS
def test_what_is_kept_does_not_grow_with_the_iterations(scaling):
    assert saved_bytes(100, scaling) == saved_bytes(1, scaling) == 4 * 1024 ** 2


@FORMS
def test_nothing_waits_for_a_device(scaling):
    class NoItem(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert 'local_scalar' not in str(function), 'a tensor was read on the host'
            return function(*args, **(kwargs or {}))

    with NoItem():
        gradient(lambda x: sinkhorn(x, 10, *masses(x), scaling), make_log_kernel(2, 6, 6))


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
    assert 'timm_sot.sinkhorn' in str(exported.graph)
    many = make_log_kernel(4, 6, 7, dtype=torch.float32)
    assert torch.equal(exported.module()(many), plan(many))


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
def test_second_derivative_says_no(scaling):
    log_kernel = make_log_kernel(4, 4).requires_grad_()
    out = sinkhorn(log_kernel, 3, *masses(log_kernel), scaling)
    grad, = torch.autograd.grad(out.exp().square().sum(), log_kernel, create_graph=True)
    with pytest.raises(RuntimeError, match='sinkhorn has no second derivative. With tol=0 it runs'):
        grad.sum().backward()
    # as promised
    assert torch.autograd.gradgradcheck(lambda x: public(x, iters=3, tol=0).exp(), (log_kernel,))


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
