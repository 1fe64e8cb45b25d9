""" The Self-Optimal-Transport transform """
import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import reference
from reference import error
from timm_sot import self_optimal_transport
from timm_sot.transform import pairwise_cost

GOLDEN = Path(__file__).parent / 'golden'
SOT = load_file(GOLDEN / 'sot_transform.safetensors')
BPA = load_file(GOLDEN / 'bpa_transform.safetensors')
with safe_open(GOLDEN / 'bpa_transform.safetensors', 'pt') as f:
    BPA_CASES = json.loads(f.metadata()['meta'])

DISTANCES = ['euclidean', 'cosine']
NORMALIZE = ['row', 'matrix', None]
SWITCHES = list(itertools.product([True, False], repeat=3))  # mask_diagonal, sigmoid, max_scale


def make_points(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradients(function, *inputs, **kwargs):
    """Output, and the gradients of its product with a fixed random matrix."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs, **kwargs)
    (out.double() * make_points(*out.shape, dtype=torch.float64, seed=99)).sum().backward()
    return out.detach(), [x.grad for x in inputs]


# Golden files: what the code of the experiments and of the paper computed

@pytest.mark.parametrize('reg', [0.025, 0.1, 0.8])
@pytest.mark.parametrize('operands', ['q', 'qk', 'qkt'])
def test_golden_sot(operands, reg):
    q, k = SOT['q'].clone().requires_grad_(), SOT['k'].clone().requires_grad_()
    y = {'q': None, 'qk': k, 'qkt': k.transpose(-2, -1)}[operands]
    out = self_optimal_transport(q, y, reg=reg, tol=0.1)
    assert error(out, SOT[f'{operands}.reg{reg}.out']) < 1e-5
    out.backward(SOT['grad_out'])
    assert error(q.grad, SOT[f'{operands}.reg{reg}.grad_q']) < 1e-4
    if y is not None:
        assert error(k.grad, SOT[f'{operands}.reg{reg}.grad_k']) < 1e-4


def bpa_arguments(case):
    """BPA's names and defaults in ours."""
    case = BPA_CASES[case]
    return dict(
        distance=case['distance_metric'],
        normalize='matrix' if case['distance_metric'] == 'euclidean' else None,
        reg=case['ot_reg'],
        iters=case.get('sinkhorn_iterations', 10),
        mask_diagonal=case.get('mask_diag', True),
        sigmoid=case.get('sigmoid', False),
        max_scale=case.get('max_scale', True),
    )


@pytest.mark.parametrize('case', BPA_CASES)
def test_golden_bpa_one_set(case):
    out = self_optimal_transport(BPA['x'], row_mass=1., **bpa_arguments(case))
    assert error(out, BPA[f'{case}.out']) < 1e-5


# BPA divides the batch of Euclidean costs by one maximum, which couples its problems: nothing here reproduces that
@pytest.mark.parametrize('case', [case for case in BPA_CASES if BPA_CASES[case]['distance_metric'] == 'cosine'])
def test_golden_bpa_batch(case):
    out = self_optimal_transport(BPA['x_batched'], tol=0.1, **bpa_arguments(case))
    assert error(out, BPA[f'{case}.out_batched']) < 1e-5


@pytest.mark.parametrize('case', [case for case in BPA_CASES if f'{case}.grad_x' in BPA])
def test_golden_bpa_gradient(case):
    kwargs = bpa_arguments(case)
    assert kwargs.pop('max_scale'), 'BPA cases with a gradient are scaled'
    x = BPA['x'].clone().requires_grad_()
    out = self_optimal_transport(x, row_mass=1., max_scale=False, **kwargs)
    # BPA detaches the maximum that it divides by
    if kwargs['mask_diagonal']:
        diagonal = torch.eye(len(x), dtype=torch.bool)
        out = out.masked_fill(diagonal, 0.)
        out = (out / out.detach().max()).masked_fill(diagonal, 1.)
    else:
        out = out / out.detach().max()
    assert error(out, BPA[f'{case}.out']) < 1e-5
    out.backward(BPA['grad_out'])
    assert error(x.grad, BPA[f'{case}.grad_x']) < 1e-4


# Agreement with the float64 reference

@pytest.mark.parametrize('two_sets', [False, True])
@pytest.mark.parametrize('mask_diagonal, sigmoid, max_scale', SWITCHES)
@pytest.mark.parametrize('normalize', NORMALIZE)
@pytest.mark.parametrize('distance', DISTANCES)
def test_equals_reference(distance, normalize, mask_diagonal, sigmoid, max_scale, two_sets):
    inputs = [make_points(2, 9, 5, dtype=torch.float64, seed=seed) for seed in range(1 + two_sets)]
    kwargs = dict(
        distance=distance, normalize=normalize, mask_diagonal=mask_diagonal, sigmoid=sigmoid, max_scale=max_scale,
        reg=0.2, iters=7, row_mass=0.4)
    out, grads = gradients(self_optimal_transport, *inputs, **kwargs)
    expected, expected_grads = gradients(reference.self_optimal_transport, *inputs, **kwargs)
    assert out.dtype == torch.float64
    assert error(out, expected) < 1e-12
    for grad, expected_grad in zip(grads, expected_grads):
        assert error(grad, expected_grad) < 1e-10

    out, grads = gradients(self_optimal_transport, *(x.float() for x in inputs), **kwargs)
    assert out.dtype == torch.float32
    assert error(out, expected) < 1e-5
    for grad, expected_grad in zip(grads, expected_grads):
        assert error(grad, expected_grad) < 1e-4


def test_defaults():
    x = make_points(6, 4)
    spelled_out = self_optimal_transport(
        x, None, distance='euclidean', normalize='row', reg=0.1, iters=10, tol=None, row_mass=1 / 6,
        mask_diagonal=True, sigmoid=True, max_scale=True)
    assert torch.equal(self_optimal_transport(x), spelled_out)
    assert torch.equal(self_optimal_transport(x, x), spelled_out)


@pytest.mark.parametrize('reg', [0.005, 0.02, 0.1, 1., 10.])
@pytest.mark.parametrize('normalize', ['row', 'matrix'])
@pytest.mark.parametrize('distance', DISTANCES)
def test_range_of_reg(distance, normalize, reg):
    x, y = make_points(2, 12, 6), make_points(2, 12, 6, seed=1)
    for inputs in ((x,), (x, y)):
        for max_scale in (True, False):
            kwargs = dict(distance=distance, normalize=normalize, reg=reg, max_scale=max_scale)
            out, grads = gradients(self_optimal_transport, *inputs, **kwargs)
            expected, expected_grads = gradients(reference.self_optimal_transport, *inputs, **kwargs)
            # rounding of the exponents, which are as large as 1 / reg
            assert error(out, expected) < 1e-5 + 1e-7 / reg
            for grad, expected_grad in zip(grads, expected_grads):
                assert grad.isfinite().all()
                # in a sharp plan several entries reach the largest possible value, of which float32 and float64 may
                # take different ones as the maximum, each with a gradient of its own
                if not max_scale or reg >= 0.1:
                    assert error(grad, expected_grad) < 1e-5 + 1e-6 / reg


@pytest.mark.parametrize('tol', [0.01, 0.1, 1.])
def test_tol_is_in_units_of_the_cost(tol):
    x = torch.stack([make_points(8, 5, seed=seed) for seed in range(3)])
    for reg in (0.05, 0.5):
        kwargs = dict(reg=reg, tol=tol, iters=50, normalize='matrix')
        expected = reference.self_optimal_transport(x, **kwargs)
        assert error(self_optimal_transport(x, **kwargs), expected) < 1e-5
        kwargs['tol'] = None
        assert error(expected, reference.self_optimal_transport(x, **kwargs)) > 1e-4, 'did not stop early'


# Properties

@pytest.mark.parametrize('row_mass', [None, 1.])
@pytest.mark.parametrize('normalize', NORMALIZE)
@pytest.mark.parametrize('distance', DISTANCES)
def test_column_and_row_sums(distance, normalize, row_mass):
    x = make_points(2, 8, 5, dtype=torch.float64)
    mass = 1 / 8 if row_mass is None else row_mass
    kwargs = dict(distance=distance, normalize=normalize, reg=1., row_mass=row_mass, sigmoid=False, max_scale=False)
    for mask_diagonal in (True, False):
        row_errors = []
        for iters in (1, 10, 500):
            plan = self_optimal_transport(x, iters=iters, mask_diagonal=mask_diagonal, **kwargs)
            if mask_diagonal:
                assert (plan.diagonal(dim1=-2, dim2=-1) == 1).all()
                plan = plan - torch.eye(8)
            assert ((plan.sum(dim=-2) / mass - 1).abs() < 1e-12).all(), 'columns'
            row_errors.append((plan.sum(dim=-1) / mass - 1).abs().max().item())
        assert row_errors[0] > row_errors[1] and row_errors[0] > row_errors[2] and row_errors[2] < 1e-10, row_errors


@pytest.mark.parametrize('sigmoid, max_scale', list(itertools.product([True, False], repeat=2)))
@pytest.mark.parametrize('distance', DISTANCES)
def test_symmetry(distance, sigmoid, max_scale):
    def asymmetry(normalize, *inputs, iters=1000):
        out = self_optimal_transport(
            *inputs, distance=distance, normalize=normalize, reg=0.3, iters=iters, sigmoid=sigmoid, max_scale=max_scale)
        out = out - torch.eye(8)
        return error(out, out.transpose(-2, -1))

    x, y = make_points(3, 8, 5, dtype=torch.float64), make_points(3, 8, 5, dtype=torch.float64, seed=1)
    assert asymmetry(None, x) < 1e-10
    assert asymmetry('matrix', x) < 1e-10
    assert asymmetry('row', x) > 1e-2, 'a row normalization that keeps the symmetry is another one'
    assert asymmetry(None, x, y) > 1e-2
    assert asymmetry(None, x, iters=1) > 1e-3, 'converged at once: nothing was tested'


@pytest.mark.parametrize('normalize', NORMALIZE)
@pytest.mark.parametrize('distance', DISTANCES)
def test_permutation_equivariance(distance, normalize):
    x, y = make_points(2, 9, 5), make_points(2, 9, 5, seed=1)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    kwargs = dict(distance=distance, normalize=normalize)
    for inputs, permuted in (((x,), (x[:, order],)), ((x, y), (x[:, order], y[:, order]))):
        out = self_optimal_transport(*inputs, **kwargs)
        assert error(self_optimal_transport(*permuted, **kwargs), out[:, order][:, :, order]) < 1e-5
    # without the mask the two sets may be permuted each on its own
    out = self_optimal_transport(x, y, mask_diagonal=False, **kwargs)
    assert error(self_optimal_transport(x[:, order], y, mask_diagonal=False, **kwargs), out[:, order]) < 1e-5


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('normalize', NORMALIZE)
def test_parallel_points_are_at_cosine_distance_0(normalize, dtype):
    """No normalization makes costs of what their unit vectors differ by."""
    x = 10. ** make_points(3, 13, 1, dtype=dtype) * make_points(3, 1, 8, dtype=dtype, seed=1)
    out, (grad,) = gradients(self_optimal_transport, x, distance='cosine', normalize=normalize)
    assert error(out, torch.ones_like(out)) < 1e-6 and (grad == 0).all()
    x[:, :4] *= make_points(3, 1, 8, dtype=dtype, seed=2)  # of another direction
    out = self_optimal_transport(x, distance='cosine', normalize=normalize)
    assert out[:, :4, :4].min() > 2 * out[:, :4, 4:].max()


def test_leading_dimensions_that_broadcast():
    x, y = make_points(1, 2, 7, 4).requires_grad_(), make_points(3, 1, 7, 4, seed=1).requires_grad_()
    cost = pairwise_cost(x, y, 'euclidean', 'row')
    assert error(cost, pairwise_cost(x.expand(3, 2, 7, 4), y.expand(3, 2, 7, 4), 'euclidean', 'row')) == 0
    cost.square().sum().backward()
    assert x.grad.shape == x.shape and y.grad.shape == y.shape
    with FakeTensorMode():
        fake = pairwise_cost(torch.empty(x.shape), torch.empty(y.shape), 'euclidean', 'row')
    assert fake.shape == cost.shape and fake.stride() == cost.stride()


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize('normalize', NORMALIZE)
@pytest.mark.parametrize('distance', DISTANCES)
def test_images_of_a_batch_are_independent(distance, normalize, dtype, tolerance):
    x = make_points(3, 2, 9, 5, dtype=dtype)
    x[1] *= 30  # another scale and another shape, so that any coupling would show
    x[2, ..., 0] *= 3
    together = self_optimal_transport(x, distance=distance, normalize=normalize)
    for b in range(3):
        alone = self_optimal_transport(x[b:b + 1], distance=distance, normalize=normalize)[0]
        assert error(together[b], alone) < tolerance
        for h in range(2):
            alone = self_optimal_transport(x[b, h], distance=distance, normalize=normalize)
            assert error(together[b, h], alone) < tolerance


def test_tol_couples_the_batch_as_documented():
    slow, easy = make_points(1, 9, 5), torch.zeros(9, 9, 5)
    kwargs = dict(reg=0.02, iters=50, tol=0.02)
    together = self_optimal_transport(torch.cat([slow, easy]), **kwargs)[:1]
    assert error(together, self_optimal_transport(slow, **kwargs)) > 1e-3


@pytest.mark.parametrize('distance', DISTANCES)
def test_invariances_of_the_cost(distance):
    x = make_points(9, 5)
    for normalize in ('row', 'matrix'):
        out = self_optimal_transport(x, distance=distance, normalize=normalize)
        assert error(self_optimal_transport(7 * x, distance=distance, normalize=normalize), out) < 1e-5
        moved = self_optimal_transport(x + 1, distance=distance, normalize=normalize)
        assert (error(moved, out) < 1e-5) == (distance == 'euclidean'), 'only distances do not see a translation'
    lengthened = self_optimal_transport(x * (1 + torch.arange(9.)[:, None]), distance=distance)
    assert (error(lengthened, self_optimal_transport(x, distance=distance)) < 1e-5) == (distance == 'cosine')


@pytest.mark.parametrize('distance', DISTANCES)
def test_close_points(distance):
    # their distances, and 1 - cos of their directions, cancel where they are made from products
    x = make_points(1, 5) + 1e-3 * make_points(9, 5)
    expected = reference.self_optimal_transport(x, distance=distance)
    assert error(self_optimal_transport(x, distance=distance), expected) < 2e-3  # float32 has x itself to 1e-4 of 1e-3


@pytest.mark.parametrize('sigmoid, max_scale', list(itertools.product([True, False], repeat=2)))
def test_diagonal_is_one_and_has_no_gradient(sigmoid, max_scale):
    x = make_points(2, 6, 4).requires_grad_()
    out = self_optimal_transport(x, sigmoid=sigmoid, max_scale=max_scale)
    diagonal = out.diagonal(dim1=-2, dim2=-1)
    assert (diagonal == 1).all()
    diagonal.sum().backward(retain_graph=True)
    assert (x.grad == 0).all()
    out.square().sum().backward()
    assert (x.grad != 0).all()


def test_entries_are_in_the_unit_interval():
    off_diagonal = ~torch.eye(7, dtype=torch.bool)
    for sigmoid in (True, False):
        out = self_optimal_transport(make_points(4, 7, 3), sigmoid=sigmoid)
        assert (out >= 0).all() and (out <= 1).all()
        assert (out[:, off_diagonal].amax(dim=-1) == 1).all(), 'the largest entry beside the diagonal is 1'


@pytest.mark.parametrize('row_mass', [None, 1.])
@pytest.mark.parametrize('mask_diagonal, sigmoid, max_scale', SWITCHES)
@pytest.mark.parametrize('normalize', NORMALIZE)
@pytest.mark.parametrize('distance', DISTANCES)
def test_gradcheck(distance, normalize, mask_diagonal, sigmoid, max_scale, row_mass):
    def transform(*inputs):
        return self_optimal_transport(
            *inputs, distance=distance, normalize=normalize, mask_diagonal=mask_diagonal, sigmoid=sigmoid,
            max_scale=max_scale, row_mass=row_mass, reg=0.3, iters=3)

    x, y = (make_points(4, 2, dtype=torch.float64, seed=seed).requires_grad_() for seed in (3, 4))
    assert torch.autograd.gradcheck(transform, (x,))
    assert torch.autograd.gradcheck(transform, (x, y))


# Corners

@pytest.mark.parametrize('normalize', NORMALIZE)
@pytest.mark.parametrize('distance', DISTANCES)
@pytest.mark.parametrize('N', [1, 2, 3])
def test_few_points(N, distance, normalize):
    for mask_diagonal, sigmoid, max_scale in SWITCHES:
        for inputs in ((make_points(2, N, 4),), (make_points(2, N, 4), make_points(2, N, 4, seed=1))):
            kwargs = dict(
                distance=distance, normalize=normalize, mask_diagonal=mask_diagonal, sigmoid=sigmoid,
                max_scale=max_scale)
            out, grads = gradients(self_optimal_transport, *inputs, **kwargs)
            assert error(out, reference.self_optimal_transport(*inputs, **kwargs)) < 1e-5
            assert all(grad.isfinite().all() for grad in grads)
            if N == 1 and mask_diagonal:
                assert (out == 1).all()


def zero_and_duplicated_rows(case):
    x = make_points(2, 8, 5)
    if case == 'a zero row':
        x[:, 2] = 0
    elif case == 'zero rows':
        x[:, 2:5] = 0
    elif case == 'all rows zero':
        x[:] = 0
    elif case == 'a duplicated row':
        x[:, 6] = x[:, 1]
    elif case == 'every row twice':
        x[:, 4:] = x[:, :4]
    elif case == 'all rows equal':
        x[:] = x[:, :1]
    return x


@pytest.mark.parametrize('case', [
    'a zero row', 'zero rows', 'all rows zero', 'a duplicated row', 'every row twice', 'all rows equal'])
@pytest.mark.parametrize('normalize', NORMALIZE)
@pytest.mark.parametrize('distance', DISTANCES)
def test_zero_and_duplicated_rows(distance, normalize, case):
    x, y = zero_and_duplicated_rows(case), make_points(2, 8, 5, seed=1)
    for inputs in ((x,), (x, y), (x, x.clone())):
        for mask_diagonal in (True, False):
            for reg in (0.02, 0.1):
                kwargs = dict(distance=distance, normalize=normalize, reg=reg, mask_diagonal=mask_diagonal)
                out, grads = gradients(self_optimal_transport, *inputs, **kwargs)
                assert error(out, reference.self_optimal_transport(*inputs, **kwargs)) < 1e-5 + 4e-7 / reg
                assert all(grad.isfinite().all() and grad.abs().max() < 1e4 for grad in grads)


@pytest.mark.parametrize('distance', DISTANCES)
def test_zero_row_has_no_gradient_by_itself(distance):
    # the direction of a zero vector has none; divided by a small constant in its place, it would be of 1e12
    x = zero_and_duplicated_rows('a zero row')
    _, (grad,) = gradients(self_optimal_transport, x, distance=distance)
    _, (expected,) = gradients(reference.self_optimal_transport, x, distance=distance)
    assert error(grad, expected) < 1e-4
    assert (grad[:, 2] == 0).all() == (distance == 'cosine')


@pytest.mark.parametrize('scale', [1e-4, 1e4])
@pytest.mark.parametrize('reg', [0.005, 0.1, 10.])
@pytest.mark.parametrize('normalize', NORMALIZE)
@pytest.mark.parametrize('distance', DISTANCES)
def test_scales(distance, normalize, reg, scale):
    x, y = scale * make_points(2, 9, 5), scale * make_points(2, 9, 5, seed=1)
    kwargs = dict(distance=distance, normalize=normalize, reg=reg)
    for inputs in ((x,), (x, y)):
        out, grads = gradients(self_optimal_transport, *inputs, **kwargs)
        assert out.isfinite().all() and (out >= 0).all() and (out <= 1).all()
        assert all(grad.isfinite().all() for grad in grads)
        # without normalization the exponents are as large as scale / reg, beyond what float32 resolves
        if normalize is not None or distance == 'cosine' or scale < 1:
            assert error(out, reference.self_optimal_transport(*inputs, **kwargs)) < 1e-5 + 1e-7 / reg


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('scale', [1e-4, 1., 1e4])
@pytest.mark.parametrize('reg', [0.005, 0.1, 10.])
@pytest.mark.parametrize('distance', DISTANCES)
def test_half_precision(distance, reg, scale, dtype):
    x, y = ((scale * make_points(2, 9, 5, seed=seed)).to(dtype) for seed in (0, 1))
    for inputs in ((x,), (x, y)):
        for sigmoid, max_scale in ((True, True), (False, False)):
            kwargs = dict(distance=distance, reg=reg, sigmoid=sigmoid, max_scale=max_scale)
            out, grads = gradients(self_optimal_transport, *inputs, **kwargs)
            expected, expected_grads = gradients(reference.self_optimal_transport, *inputs, **kwargs)
            assert out.dtype == dtype
            assert error(out, expected) <= torch.finfo(dtype).eps / 2 + 1e-5 + 1e-7 / reg
            for grad, expected_grad in zip(grads, expected_grads):
                assert grad.dtype == dtype
                largest = expected_grad.abs().max()
                # at scale 1e-4 the gradients are 1e4 times larger, some of float16 cannot be represented
                if largest < torch.finfo(dtype).max:
                    assert grad.isfinite().all()
                # below, in a sharp plan, the maximum is not unique, see test_range_of_reg
                if 1e-3 < largest < torch.finfo(dtype).max and (reg >= 0.1 or not max_scale):
                    assert error(grad, expected_grad) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('distance', DISTANCES)
def test_autocast_changes_nothing(distance, dtype):
    x, y = make_points(2, 9, 5).requires_grad_(), make_points(2, 9, 5, seed=1).requires_grad_()
    expected = self_optimal_transport(x, y, distance=distance)
    with torch.autocast('cpu', dtype=dtype):
        out = self_optimal_transport(x, y, distance=distance)
        half = x @ x.transpose(-2, -1)
        assert half.dtype == dtype, 'autocast was not on'
        assert self_optimal_transport(half, distance=distance).dtype == dtype
    assert out.dtype == torch.float32 and torch.equal(out, expected)
    grads = torch.autograd.grad(out.square().sum(), (x, y))
    assert all(map(torch.equal, grads, torch.autograd.grad(expected.square().sum(), (x, y))))


@pytest.mark.parametrize('distance', DISTANCES)
def test_non_contiguous_input(distance):
    wide = make_points(5, 3, 18)
    expanded = make_points(1, 9, 5).expand(3, 9, 5)
    for strided in (wide.permute(1, 2, 0), wide[..., ::2], wide.transpose(-2, -1), expanded):
        assert not strided.is_contiguous()
        for inputs in ((strided,), (strided, strided), (strided.flip(-2), strided)):
            out, grads = gradients(self_optimal_transport, *inputs, distance=distance)
            expected, expected_grads = gradients(
                self_optimal_transport, *(x.contiguous() for x in inputs), distance=distance)
            assert error(out, expected) < 1e-6
            for grad, expected_grad in zip(grads, expected_grads):
                assert error(grad, expected_grad) < 1e-5


def test_leading_dimensions():
    x = make_points(2, 3, 6, 4)
    out = self_optimal_transport(x)
    assert out.shape == (2, 3, 6, 6)
    assert error(self_optimal_transport(x.flatten(0, 1)), out.flatten(0, 1)) < 1e-6
    assert self_optimal_transport(x[:0]).shape == (0, 3, 6, 6)


# Errors: the argument, its value, what would work

@pytest.mark.parametrize('name, value, works', [
    *(('reg', value, 'must be a positive finite number; 0.1 is the default') for value in (
        0, 0., -0.1, math.inf, math.nan, '0.1', None, [0.1])),
    *(('iters', value, 'must be an integer of at least 1') for value in (0, -3, 2.5, True)),
    *(('tol', value, 'must be None (run exactly iters iterations) or a number of at least 0') for value in (
        -0.1, math.nan, 'none')),
    *(('row_mass', value, 'must be a positive finite number, or None for 1 / N') for value in (
        0, -1., math.inf, math.nan)),
    ('distance', 'manhattan', "is unknown; choose one of ('euclidean', 'cosine')"),
    ('normalize', 'column', "is unknown; choose one of ('row', 'matrix', None)"),
])
def test_bad_arguments(name, value, works):
    with pytest.raises(ValueError, match=re.escape(f'{name}={value!r} {works}')):
        self_optimal_transport(make_points(4, 3), **{name: value})


@pytest.mark.parametrize('number', [np.float32, np.float64, torch.tensor])
def test_numbers_of_other_libraries(number):
    x = make_points(4, 3)
    out = self_optimal_transport(x, reg=number(0.25), tol=number(0.5), row_mass=number(2.))
    assert error(out, self_optimal_transport(x, reg=0.25, tol=0.5, row_mass=2.)) < 1e-6


def test_iterations_counted_by_numpy():
    x = make_points(4, 3)
    for iters in np.arange(1, 3):
        for tol in (None, 1e-9):
            assert torch.equal(
                self_optimal_transport(x, iters=iters, tol=tol), self_optimal_transport(x, iters=int(iters), tol=tol))


@pytest.mark.parametrize('x, y, message', [
    ((2, 4, 3), (2, 5, 3), r'x \(2, 4, 3\) and y \(2, 5, 3\); a set is matched with one of equal size'),  # N mismatch
    ((2, 4, 3), (2, 4, 2), r'x \(2, 4, 3\) and y \(2, 4, 2\)'),
    ((2, 4, 3), (4, 3), r'x \(2, 4, 3\) and y \(4, 3\)'),
    ((3,), None, r'x must have shape \(..., N, D\) with at least one point, got \(3,\)'),
    ((2, 0, 3), None, r'x must have shape \(..., N, D\) with at least one point, got \(2, 0, 3\)'),
])
def test_bad_shapes(x, y, message):
    with pytest.raises(ValueError, match=message):
        self_optimal_transport(torch.zeros(x), None if y is None else torch.zeros(y))


def test_bad_dtype():
    with pytest.raises(ValueError, match=r'x must be floating point, got torch.int64; convert it, e.g. with .float()'):
        self_optimal_transport(torch.zeros(4, 3, dtype=torch.int64))


def test_two_devices():
    x = make_points(4, 3)
    with pytest.raises(ValueError, match='x and y must be on the same device, got cpu and meta; move one'):
        self_optimal_transport(x, x.to('meta'))


# The promise that transform gives to the solver, and what runs without eager mode

@pytest.mark.parametrize('reg', [0.05, 0.1, 1.])
@pytest.mark.parametrize('distance', DISTANCES)
def test_extreme_costs_within_the_promise(distance, reg):
    """Outliers and clusters: row-normalized costs of nothing but 0 and 1, on which float32 scales kernels directly."""
    for outliers in (1, 2, 7, 11):
        x, y = make_points(2, 12, 6), make_points(2, 12, 6, seed=1)
        x[:, outliers:] = 1e-4 * x[:, outliers:] + x[:, -1:]
        y[:, outliers:] = 1e-4 * y[:, outliers:] + x[:, -1:]
        for inputs in ((x,), (x, y)):
            kwargs = dict(distance=distance, reg=reg, iters=30)
            out, grads = gradients(self_optimal_transport, *inputs, **kwargs)
            assert all(grad.isfinite().all() for grad in grads)
            expected = reference.self_optimal_transport(*inputs, **kwargs)
            # cosines of close directions cancel
            assert error(out, expected) < (1e-5 if distance == 'euclidean' else 2e-2)


@pytest.mark.slow
@pytest.mark.parametrize('distance', DISTANCES)
def test_compiled_and_exported(distance):
    def transform(x):
        return self_optimal_transport(x, distance=distance)

    x = make_points(2, 9, 5)
    out, (grad,) = gradients(transform, x)
    compiled_out, (compiled_grad,) = gradients(torch.compile(transform, fullgraph=True, backend='aot_eager'), x)
    assert error(compiled_out, out) < 1e-6 and error(compiled_grad, grad) < 1e-5

    class Transform(torch.nn.Module):
        def forward(self, x):
            return transform(x)

    exported = torch.export.export(Transform(), (x,), dynamic_shapes=({0: torch.export.Dim('batch')},))
    assert error(exported.module()(make_points(5, 9, 5)), transform(make_points(5, 9, 5))) < 1e-6
    assert transform(x.to('meta')).shape == (2, 9, 9)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('dynamo', [True, False])
@pytest.mark.parametrize('distance', DISTANCES)
def test_onnx(distance, dynamo, tmp_path):
    pytest.importorskip('onnxscript')
    onnxruntime = pytest.importorskip('onnxruntime')

    class Transform(torch.nn.Module):
        def forward(self, x, y):
            return self_optimal_transport(x, y, distance=distance)

    x, y = make_points(2, 9, 5), make_points(2, 9, 5, seed=1)
    file = tmp_path / 'transform.onnx'
    torch.onnx.export(Transform(), (x, y), file, dynamo=dynamo, verbose=False)
    session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
    out, = session.run(None, {given.name: z.numpy() for given, z in zip(session.get_inputs(), (x, y))})
    assert error(torch.from_numpy(out), Transform()(x, y)) < 1e-5


@pytest.mark.parametrize('distance', DISTANCES)
def test_forward_mode(distance):
    x, tangent = make_points(2, 6, 4), make_points(2, 6, 4, seed=1)
    with forward_ad.dual_level():
        out = self_optimal_transport(forward_ad.make_dual(x, tangent), distance=distance)
        derivative = forward_ad.unpack_dual(out.square().sum()).tangent
    x.requires_grad_()
    grad, = torch.autograd.grad(self_optimal_transport(x, distance=distance).square().sum(), x)
    assert error(derivative, (grad * tangent).sum()) < 1e-4


def test_torch_func():
    x = make_points(3, 6, 4, dtype=torch.float64)
    assert error(torch.func.vmap(self_optimal_transport)(x), self_optimal_transport(x)) < 1e-6
    jacobian = torch.func.jacrev(self_optimal_transport)(x[0])
    assert error(jacobian, torch.autograd.functional.jacobian(self_optimal_transport, x[0])) < 1e-6
