""" The Sinkhorn solver """
import math
import re

import pytest
import torch
from torch.autograd import forward_ad

import reference
from reference import error
from timm_sot import sinkhorn


def make_log_kernel(*shape, masked=False, scale=3., dtype=torch.float64, seed=0):
    """A random log-kernel. `masked` puts -inf on the diagonal; from 3x3 on, plans with the marginals remain."""
    log_kernel = -scale * torch.rand(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    if masked:
        log_kernel = log_kernel.masked_fill(torch.eye(*shape[-2:], dtype=torch.bool), -math.inf)
    return log_kernel


SHAPES = [(5, 5), (4, 9), (9, 4), (3, 2, 6, 5)]


@pytest.mark.parametrize('row_mass', [None, 1., 0.3])
@pytest.mark.parametrize('iters', [1, 2, 10])
@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('shape', SHAPES)
def test_equals_reference(shape, masked, iters, row_mass):
    log_kernel = make_log_kernel(*shape, masked=masked)
    log_plan = sinkhorn(log_kernel, iters=iters, row_mass=row_mass)
    expected = reference.sinkhorn(log_kernel, iters=iters, row_mass=row_mass)
    assert log_plan.dtype == torch.float64 and log_plan.shape == log_kernel.shape
    assert torch.equal(log_plan.isneginf(), log_kernel.isneginf())
    assert error(log_plan.exp(), expected.exp()) < 1e-13

    log_plan = sinkhorn(log_kernel.float(), iters=iters, row_mass=row_mass)
    assert log_plan.dtype == torch.float32
    assert error(log_plan.exp(), expected.exp()) < 3e-6


def test_defaults():
    log_kernel = make_log_kernel(5, 7)
    assert torch.equal(sinkhorn(log_kernel), sinkhorn(log_kernel, iters=10, tol=None, row_mass=1 / 5))


@pytest.mark.parametrize('row_mass', [None, 1., 0.3])
@pytest.mark.parametrize('iters', [1, 10])
@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('shape', SHAPES)
def test_column_sums_are_exact(shape, masked, iters, row_mass):
    N, M = shape[-2:]
    c = N / M * (1 / N if row_mass is None else row_mass)
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 3e-6)):
        log_plan = sinkhorn(make_log_kernel(*shape, masked=masked).to(dtype), iters=iters, row_mass=row_mass)
        sums = log_plan.double().exp().sum(dim=-2)
        assert ((sums / c - 1).abs() < tolerance).all(), f'columns sum to {sums}, expected {c}'


@pytest.mark.parametrize('row_mass', [None, 1., 0.3])
@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('shape', SHAPES)
def test_row_sums_approach_row_mass(shape, masked, row_mass):
    r = 1 / shape[-2] if row_mass is None else row_mass
    log_kernel = make_log_kernel(*shape, masked=masked, scale=10.)
    distances = []
    for iters in (1, 2, 4, 8, 1000):
        sums = sinkhorn(log_kernel, iters=iters, row_mass=row_mass).exp().sum(dim=-1)
        distances.append((sums / r - 1).abs().max().item())
    assert all(later < earlier for earlier, later in zip(distances, distances[1:])), distances
    assert distances[0] > 1e-3, 'too easy a kernel to show convergence'
    assert distances[-1] < 1e-11


def test_closed_forms():
    def full(N, M, value):
        return torch.full((N, M), value, dtype=torch.float64)

    # a kernel that is a product of a row and a column factor: the plan with these marginals is uniform
    rank_one = make_log_kernel(4, 1) + make_log_kernel(1, 6, seed=1)
    assert error(sinkhorn(rank_one).exp(), full(4, 6, 1 / 24)) < 1e-13
    # one row holds the column marginal, one column, once its row step has made it uniform, all mass
    assert error(sinkhorn(make_log_kernel(1, 6)).exp(), full(1, 6, 1 / 6)) < 1e-13
    assert error(sinkhorn(make_log_kernel(6, 1), row_mass=2.).exp(), full(6, 1, 2.)) < 1e-13
    # two points that may not be matched with themselves
    assert error(sinkhorn(make_log_kernel(2, 2, masked=True)).exp(), full(2, 2, 0.5).fill_diagonal_(0.)) < 1e-13


def test_row_and_column_offsets_of_the_kernel_do_not_matter():
    log_kernel = make_log_kernel(5, 7)
    rows, columns = make_log_kernel(5, 1, seed=1), make_log_kernel(1, 7, seed=2)
    # the first step takes up a row offset at once, a column offset only the converged plan has forgotten
    assert error(sinkhorn(log_kernel + rows, iters=1).exp(), sinkhorn(log_kernel, iters=1).exp()) < 1e-13
    assert error(sinkhorn(log_kernel + columns, iters=1).exp(), sinkhorn(log_kernel, iters=1).exp()) > 1e-3
    assert error(sinkhorn(log_kernel + columns, iters=400).exp(), sinkhorn(log_kernel, iters=400).exp()) < 1e-11


@pytest.mark.parametrize('masked', [False, True])
def test_permutation_equivariance(masked):
    log_kernel = make_log_kernel(2, 6, 8, masked=masked)
    generator = torch.Generator().manual_seed(1)
    rows, columns = torch.randperm(6, generator=generator), torch.randperm(8, generator=generator)
    permuted = sinkhorn(log_kernel[:, rows][:, :, columns])
    assert error(permuted.exp(), sinkhorn(log_kernel)[:, rows][:, :, columns].exp()) < 1e-13


def test_problems_of_a_batch_are_independent():
    # costs of very different scale, so that any coupling would show
    log_kernel = torch.cat([make_log_kernel(1, 2, 7, 5, scale=scale, dtype=torch.float32) for scale in (0.1, 3., 100.)])
    together = sinkhorn(log_kernel).exp()
    for b in range(3):
        for h in range(2):
            assert error(together[b, h], sinkhorn(log_kernel[b, h]).exp()) < 1e-6


def test_tol_stops_as_the_reference():
    log_kernel = torch.cat([make_log_kernel(1, 7, 5, scale=scale) for scale in (0.1, 3., 30.)])
    exact = [sinkhorn(log_kernel, iters=iters) for iters in range(1, 31)]
    stops = []
    for tol in (10., 0.3, 0.1, 1e-3, 1e-6):
        log_plan = sinkhorn(log_kernel, iters=30, tol=tol)
        assert error(log_plan.exp(), reference.sinkhorn(log_kernel, iters=30, tol=tol).exp()) < 1e-13
        stops.append(next(i for i, plan in enumerate(exact, start=1) if torch.equal(plan, log_plan)))
    assert stops == sorted(stops) and len(set(stops)) > 3, f'iterations run: {stops}'


def test_tol_at_its_ends():
    log_kernel = make_log_kernel(7, 5)
    assert torch.equal(sinkhorn(log_kernel, tol=math.inf), sinkhorn(log_kernel, iters=1))
    assert torch.equal(sinkhorn(log_kernel, tol=0), sinkhorn(log_kernel))
    assert torch.equal(sinkhorn(log_kernel, iters=2, tol=1e-9), sinkhorn(log_kernel, iters=2)), 'iters is the most'


def test_tol_couples_the_batch_as_documented():
    slow, easy = make_log_kernel(1, 7, 7, scale=30.), make_log_kernel(1, 7, 7, scale=0.01)
    batch = torch.cat([slow, easy.expand(9, -1, -1)])
    alone, together = sinkhorn(slow, iters=50, tol=0.1)[0], sinkhorn(batch, iters=50, tol=0.1)[0]
    assert error(together.exp(), alone.exp()) > 1e-3


@pytest.mark.parametrize('row_mass', [None, 1.])
@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('shape', [(3, 3), (4, 3), (2, 3, 5)])
def test_gradient(shape, masked, row_mass):
    # finite entries are the free ones: no finite difference can be taken at -inf
    log_kernel = make_log_kernel(*shape)
    blocked = torch.eye(*shape[-2:], dtype=torch.bool) if masked else torch.zeros(*shape[-2:], dtype=torch.bool)

    def plan(log_kernel):
        return sinkhorn(log_kernel.masked_fill(blocked, -math.inf), iters=4, row_mass=row_mass).exp()

    assert torch.autograd.gradcheck(plan, (log_kernel.requires_grad_(),))


def test_gradient_is_that_of_the_iterations_that_ran():
    grads = {}
    for name, function in (('package', sinkhorn), ('reference', reference.sinkhorn)):
        for iters in (1, 3, 10):
            log_kernel = make_log_kernel(5, 6, masked=True).requires_grad_()
            weights = make_log_kernel(5, 6, seed=1)
            (function(log_kernel, iters=iters).exp() * weights).sum().backward()
            grads[name, iters] = log_kernel.grad
    for iters in (1, 3, 10):
        assert error(grads['package', iters], grads['reference', iters]) < 1e-11
    assert error(grads['package', 3], grads['package', 10]) > 1e-3


def test_infinite_entries_have_no_mass_and_no_gradient():
    log_kernel = make_log_kernel(2, 5, 5, masked=True, dtype=torch.float32).requires_grad_()
    plan = sinkhorn(log_kernel).exp()
    (plan * torch.rand(2, 5, 5)).sum().backward()
    diagonal = torch.eye(5, dtype=torch.bool).expand(2, 5, 5)
    assert (plan[diagonal] == 0).all() and (log_kernel.grad[diagonal] == 0).all()
    assert log_kernel.grad.isfinite().all() and (log_kernel.grad[~diagonal] != 0).all()


@pytest.mark.parametrize('scale', [200., 1e4, 1e7])  # 200: costs of up to 1 at reg 0.005
def test_sharp_kernels_stay_finite(scale):
    log_kernel = make_log_kernel(2, 9, 9, masked=True, scale=scale, dtype=torch.float32).requires_grad_()
    log_plan = sinkhorn(log_kernel)
    plan = log_plan.exp()
    plan.square().sum().backward()
    diagonal = torch.eye(9, dtype=torch.bool)
    assert log_plan[:, ~diagonal].isfinite().all() and log_kernel.grad.isfinite().all()
    if scale <= 1e4:  # above, float32 resolves the exponents to whole units only
        assert error(plan, reference.sinkhorn(log_kernel.detach()).exp()) < 1e-6 * scale ** 0.75


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('scale', [1., 100.])
def test_half_precision(dtype, scale):
    log_kernel = make_log_kernel(2, 8, 8, masked=True, scale=scale).to(dtype).requires_grad_()
    log_plan = sinkhorn(log_kernel)
    assert log_plan.dtype == dtype
    expected = reference.sinkhorn(log_kernel.detach())
    finite = expected.isfinite()
    # the log-plan is computed in float32 and rounded once, at the end
    assert error(log_plan[finite], expected[finite]) <= torch.finfo(dtype).eps / 2
    log_plan[finite].float().square().sum().backward()
    assert log_kernel.grad.dtype == dtype and log_kernel.grad.isfinite().all()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype):
    log_kernel = make_log_kernel(2, 8, 8, dtype=torch.float32)
    expected = sinkhorn(log_kernel)
    with torch.autocast('cpu', dtype=dtype):
        assert torch.equal(sinkhorn(log_kernel), expected)


def test_non_contiguous_input():
    wide = make_log_kernel(5, 3, 14)
    for strided in (wide.permute(1, 2, 0), wide[..., ::2], wide[:, :1].expand(-1, 4, -1)):
        assert not strided.is_contiguous()
        assert error(sinkhorn(strided).exp(), sinkhorn(strided.contiguous()).exp()) < 1e-13


def test_input_is_left_alone():
    log_kernel = make_log_kernel(5, 5, masked=True)
    before = log_kernel.clone()
    sinkhorn(log_kernel)
    assert torch.equal(log_kernel, before)


@pytest.mark.parametrize('name, value, works', [
    *(('iters', value, 'must be an integer of at least 1') for value in (0, -1, 2.5, True, None)),
    *(('tol', value, 'must be None (run exactly iters iterations) or a number of at least 0') for value in (
        -0.1, math.nan, 'none', [0.1])),
    *(('row_mass', value, 'must be a positive finite number, or None for 1 / N') for value in (
        0, -1., math.inf, math.nan, '1')),
])
def test_bad_arguments(name, value, works):
    with pytest.raises(ValueError, match=re.escape(f'{name}={value!r} {works}')):
        sinkhorn(make_log_kernel(4, 4), **{name: value})


@pytest.mark.parametrize('shape', [(4,), (3, 0, 4), (4, 0)])
def test_bad_shapes(shape):
    message = f'log_kernel must have shape (..., N, M) with at least one row and one column, got {shape}; add'
    with pytest.raises(ValueError, match=re.escape(message)):
        sinkhorn(torch.zeros(shape))


def test_bad_dtype():
    message = 'log_kernel must be floating point, got torch.int64; convert it, e.g. with .float()'
    with pytest.raises(ValueError, match=re.escape(message)):
        sinkhorn(torch.zeros(4, 4, dtype=torch.int64))


def test_forward_mode():
    log_kernel = make_log_kernel(2, 5, 6)
    tangent = make_log_kernel(2, 5, 6, seed=1)
    with forward_ad.dual_level():
        plan = sinkhorn(forward_ad.make_dual(log_kernel, tangent)).exp()
        derivative = forward_ad.unpack_dual(plan.square().sum()).tangent
    log_kernel.requires_grad_()
    grad, = torch.autograd.grad(sinkhorn(log_kernel).exp().square().sum(), log_kernel)
    assert error(derivative, (grad * tangent).sum()) < 1e-11


def test_no_problems_at_all():
    assert sinkhorn(torch.zeros(0, 4, 5)).shape == (0, 4, 5)
