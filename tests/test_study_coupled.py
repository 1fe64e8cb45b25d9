""" SOT attention under a CUDA graph """
import pytest
import torch

from timm_sot import solver, transform
from timm_sot.attention import VARIANTS, sot_attention_weights
from timm_sot.study import coupled


def make_kernels(reg, dtype=torch.float64):
    costs = torch.rand(6, 16, 16, dtype=dtype, generator=torch.Generator().manual_seed(0))
    return (-costs / reg).masked_fill(torch.eye(16, dtype=torch.bool), -torch.inf)


def outcome(function, *inputs):
    """Output, and the gradients of its product with a fixed random tensor."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    weights = torch.rand(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    (out.masked_fill(out.isinf(), 0.) * weights).sum().backward()
    return out.detach(), *[x.grad for x in inputs]


@pytest.mark.parametrize('reg', [0.025, 0.1, 1.])
@pytest.mark.parametrize('iters, tol', [(1, None), (7, None), (10, 0.1), (10, 0.01), (10, 1e9), (2, 0.)])
@pytest.mark.parametrize('row_mass', [None, 1.])
def test_solve(reg, iters, tol, row_mass):
    kernels = make_kernels(reg)
    expected = outcome(lambda x: solver.solve(x, iters, tol and tol / reg, row_mass), kernels)
    actual = outcome(lambda x: coupled.solve(x, iters, tol and tol / reg, row_mass, 1 / reg), kernels)
    for a, e in zip(actual, expected):
        torch.testing.assert_close(a, e, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize('reg', [0.025, 0.1, 10.])
def test_solve_in_float32(reg):
    kernels = make_kernels(reg)
    expected = outcome(lambda x: solver.solve(x, 10, 0.1 / reg, None), kernels)
    actual = outcome(lambda x: coupled.solve(x, 10, 0.1 / reg, None, 1 / reg), kernels.float())
    for a, e in zip(actual, expected):
        torch.testing.assert_close(a.double(), e, atol=2e-5 * e[e.isfinite()].abs().max().item(), rtol=1e-4)


def test_stops_where_the_solver_stops():
    """The iterations after the stop must not show, however many they are."""
    kernels = make_kernels(0.1)
    few = coupled.solve(kernels, 10, 1., None, 10.)
    assert torch.equal(few, coupled.solve(kernels, 40, 1., None, 10.))
    assert not torch.allclose(few, coupled.solve(kernels, 40, None, None, 10.))


def test_small_regularization():
    """Of a token far from all others a column of exp(-1 / reg) would be 0 in float32."""
    x, y = torch.randn(2, 2, 64, 64, generator=torch.Generator().manual_seed(0))
    y[:, 3] *= 30
    expected = transform.self_optimal_transport(x, y, reg=0.005)
    stopped = transform.self_optimal_transport(x, y, reg=0.01, tol=0.1)
    with coupled.capturable():
        torch.testing.assert_close(transform.self_optimal_transport(x, y, reg=0.005), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(transform.self_optimal_transport(x, y, reg=0.01, tol=0.1), stopped)
        assert transform.self_optimal_transport(x, y, reg=0.02, tol=0.1).isfinite().all()


@pytest.mark.parametrize('variant', [name for name in VARIANTS if VARIANTS[name].operands])
def test_attention_weights(variant):
    operands, softmax, _ = VARIANTS[variant]
    q, k = torch.randn(2, 3, 2, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def weights(q, k):
        return sot_attention_weights(q, k, operands, softmax, 'euclidean', 0.1, 10, 0.1) + 0 * k

    expected = outcome(weights, q, k)
    original = transform.solve, transform.pairwise_cost
    with coupled.capturable():
        assert transform.solve is coupled.solve
        actual = outcome(weights, q, k)
    assert (transform.solve, transform.pairwise_cost) == original
    for a, e in zip(actual, expected):
        torch.testing.assert_close(a, e, atol=1e-6 * e.abs().max().item(), rtol=1e-6)


def test_distances_of_equal_points():
    x = torch.randn(2, 8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    x[:, 3] = x[:, 5]
    expected = outcome(lambda x: torch.cdist(x, x, compute_mode='donot_use_mm_for_euclid_dist'), x)
    actual = outcome(lambda x: coupled.Distances.apply(x, x), x)
    for a, e in zip(actual, expected):
        torch.testing.assert_close(a, e, atol=1e-9, rtol=1e-9)


def test_other_costs_are_the_transforms():
    x, y = torch.randn(2, 4, 8, 5)
    for distance, normalize in [('cosine', 'row'), ('euclidean', 'matrix')]:
        expected = transform.pairwise_cost(x, y, distance, normalize)
        assert torch.equal(coupled.pairwise_cost(x, y, distance, normalize), expected)
