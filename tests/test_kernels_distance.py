""" The operator timm_sot::euclidean_distance """
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import reference
from reference import error
from timm_sot.kernels import distance
from timm_sot.kernels.distance import distance_by_product, euclidean_distance, euclidean_distance_backward

DTYPES = pytest.mark.parametrize('dtype, bar', [(torch.float32, 1e-6), (torch.float64, 1e-13)])


def make_points(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradients(function, x, y):
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    out = function(x, y)
    (out.double() * make_points(*out.shape, dtype=torch.float64, seed=9)).sum().backward()
    return out.detach(), x.grad, y.grad


def expected(x, y):
    return gradients(lambda x, y: reference.per_problem(reference.euclidean, x, y), x.double(), y.double())


@DTYPES
@pytest.mark.parametrize('x_shape, y_shape', [
    ((7, 5), (7, 5)), ((2, 3, 7, 5), (2, 3, 4, 5)), ((1, 1), (1, 1)), ((3, 1, 9), (3, 6, 9))])
@pytest.mark.parametrize('scale', [1e-4, 1., 1e4])
def test_equals_reference(x_shape, y_shape, scale, dtype, bar):
    x, y = scale * make_points(*x_shape, dtype=dtype), scale * make_points(*y_shape, dtype=dtype, seed=1)
    for actual, wanted in zip(gradients(euclidean_distance, x, y), expected(x, y)):
        assert actual.dtype == dtype
        assert error(actual, wanted) < bar


@DTYPES
@pytest.mark.parametrize('offset', [0., 1., 1e3])
@pytest.mark.parametrize('N, D', [(6, 4), (50, 33), (64, 64)])
def test_equal_points(N, D, offset, dtype, bar):
    x = offset + make_points(3, N, D, dtype=dtype)
    x[:, N // 2:] = x[:, :(N + 1) // 2]
    distance, grad_x, grad_y = gradients(euclidean_distance, x, x.clone())
    equal = (x[:, :, None] == x[:, None]).all(dim=-1)
    assert (distance[equal] == 0).all() and (distance[~equal] > 0).all()
    for actual, wanted in zip((distance, grad_x, grad_y), expected(x, x.clone())):
        assert error(actual, wanted) < bar
    # only equal points: no force at all
    grads = gradients(euclidean_distance, x[:, :1].expand(3, N, D), x[:, :1].expand(3, N, D))
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize('offset', [0., 10.])
@pytest.mark.parametrize('gap', [1e-1, 1e-3, 1e-5])
def test_close_points(gap, offset):
    x = offset + make_points(3, 30, 16)
    y = x + gap * make_points(3, 30, 16, seed=1)  # what float32 leaves of the gap is the gap
    for actual, wanted in zip(gradients(euclidean_distance, x, y), expected(x, y)):
        assert error(actual, wanted) < 1e-6
    close = euclidean_distance(x, y).diagonal(dim1=1, dim2=2)
    wanted = expected(x, y)[0].diagonal(dim1=1, dim2=2)
    assert ((close - wanted).abs() < 1e-5 * wanted + 1e-7 * x.norm(dim=-1)).all()


LAYOUTS = {
    'contiguous': lambda x: x,
    'transposed': lambda x: x.mT.contiguous().mT,
    'expanded': lambda x: x[:1].expand_as(x),
    'heads': lambda x: x[:, None].repeat(1, 2, 1, 1).transpose(1, 2).contiguous().transpose(1, 2),
}


def test_squares_beyond_float32():
    points = torch.tensor([[0., 0.], [1e20, 0.], [3e20, 1e20], [0., 1e-30]])
    for function in (euclidean_distance, distance_by_product):
        assert error(function(points, points), torch.cdist(points.double(), points.double())) < 1e-6
    huge = torch.tensor([[0., 0.], [1e200, 0.]], dtype=torch.float64)
    assert distance_by_product(huge, huge)[0, 1] > 1e199, 'an overflow is not a distance of 0'


@pytest.mark.parametrize('outlier, bar', [(1e4, 1e-6), (1e6, 1e-5), (1e7, 1e-3)])
def test_beside_an_outlier(outlier, bar):
    x = make_points(2, 20, 8)
    x[:, 7] *= outlier
    others = torch.arange(20) != 7
    actual = euclidean_distance(x, x)[:, others][:, :, others]
    wanted = torch.cdist(x[:, others].double(), x[:, others].double(), compute_mode='donot_use_mm_for_euclid_dist')
    off = ~torch.eye(19, dtype=torch.bool)
    assert (actual[:, off] / wanted[:, off] - 1).abs().max() < bar


@DTYPES
@pytest.mark.parametrize('layout', LAYOUTS)
def test_opcheck(layout, dtype, bar):
    """Also the strides of the results are those that the fakes promise: inductor's code relies on them."""
    x, y = (
        LAYOUTS[layout](make_points(2, N, 3, dtype=dtype, seed=seed)) for N, seed in ((5, 0), (4, 1)))
    torch.library.opcheck(euclidean_distance, (x.detach().requires_grad_(), y.detach().requires_grad_()))
    distance = euclidean_distance(x, y)
    for grad in (torch.ones_like(distance), LAYOUTS[layout](make_points(2, 5, 4, dtype=dtype)).reshape(distance.shape)):
        torch.library.opcheck(euclidean_distance_backward, (grad, x, y, distance))


def test_gradcheck():
    x, y = (make_points(2, 4, 3, dtype=torch.float64, seed=seed).requires_grad_() for seed in (0, 1))
    assert torch.autograd.gradcheck(euclidean_distance, (x, y))


def test_one_side_may_be_constant():
    x, y = make_points(4, 3).requires_grad_(), make_points(5, 3, seed=1)
    grad, = torch.autograd.grad(euclidean_distance(x, y).sum(), x)
    wanted, = torch.autograd.grad(reference.euclidean(x.double(), y.double()).sum(), x)
    assert error(grad, wanted) < 1e-6


def test_strides_and_repeats():
    wide = make_points(5, 3, 14)
    expanded = make_points(1, 9, 5).expand(3, 9, 5)
    for x in (wide.permute(1, 2, 0), wide[..., ::2], wide.transpose(-2, -1), expanded):
        once = gradients(euclidean_distance, x, x.flip(-2))
        again = gradients(euclidean_distance, x.contiguous(), x.flip(-2))
        assert all(error(a, b) < 1e-6 for a, b in zip(once, again))
        assert all(map(torch.equal, gradients(euclidean_distance, x, x.flip(-2)), once))


def test_autocast_changes_nothing():
    x, y = make_points(2, 9, 5), make_points(2, 9, 5, seed=1)
    plain = gradients(euclidean_distance, x, y)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert all(map(torch.equal, gradients(euclidean_distance, x, y), plain))


def test_mixed_devices():
    """On the meta device nothing looks into the tensors: what came out would be memory that nobody has written."""
    x, y, distance = make_points(4, 3), make_points(5, 3), make_points(4, 5)
    for args in ((x, y.to('meta')), (x.to('meta'), y)):
        with pytest.raises(RuntimeError, match='on one device, got .*meta'):
            euclidean_distance(*args)
    for i in range(4):
        args = [z.to('meta') if j == i else z for j, z in enumerate((distance, x, y, distance))]
        with pytest.raises(RuntimeError, match='on one device, got .*meta'):
            euclidean_distance_backward(*args)


def test_compile_fake_and_meta():
    x, y = make_points(2, 6, 4), make_points(2, 6, 4, seed=1)
    compiled = torch.compile(lambda x, y: euclidean_distance(x, y).square(), fullgraph=True, backend='aot_eager')
    actual = gradients(compiled, x, y)
    assert all(map(torch.equal, actual, gradients(lambda x, y: euclidean_distance(x, y).square(), x, y)))
    with FakeTensorMode():
        assert euclidean_distance(torch.randn(2, 6, 4), torch.randn(2, 5, 4)).shape == (2, 6, 5)
    x, y = torch.randn(2, 6, 4, device='meta'), torch.randn(2, 5, 4, device='meta')
    assert euclidean_distance(x, y).shape == (2, 6, 5)


def test_second_derivative():
    x, y = (make_points(2, 4, 3, dtype=torch.float64, seed=seed).requires_grad_() for seed in (0, 1))
    assert torch.autograd.gradgradcheck(euclidean_distance, (x, y))
    once, = torch.autograd.grad(euclidean_distance(x, y).square().sum(), x, create_graph=True)
    # sum over j of |x_i - y_j|^2
    assert error(torch.autograd.grad(once.sum(), x, create_graph=True)[0], torch.full_like(x, 8.)) < 1e-13


def test_second_derivative_at_equal_points():
    x = make_points(1, 3).expand(4, 3).requires_grad_()
    grad, = torch.autograd.grad(euclidean_distance(x, x).square().sum(), x, create_graph=True)
    again, = torch.autograd.grad(grad.square().sum(), x)
    assert (grad == 0).all() and (again == 0).all()


def test_by_product():
    for dtype, bar in ((torch.float32, 1e-6), (torch.float64, 1e-7)):
        x, y = make_points(2, 6, 4, dtype=dtype), make_points(2, 6, 4, dtype=dtype, seed=1)
        y[:, 3] = x[:, 3]
        out = distance_by_product(x, y)
        assert out.dtype == dtype and (out[:, 3, 3] == 0).all()
        assert error(out, expected(x, y)[0]) < bar


def test_gradient_on_devices_without_float64(monkeypatch):
    """Played by the CPU: Apple's GPUs, which raise where float64 is asked for."""
    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            assert getattr(out, 'dtype', None) != torch.float64, func
            return out

    monkeypatch.setattr(distance, 'WITHOUT_FLOAT64', {'cpu'})
    x, y, grad = make_points(2, 7, 5), make_points(2, 4, 5, seed=1), make_points(2, 7, 4, seed=9)
    values = torch.cdist(x, y)
    with Refuse():
        actual = distance._gradients(grad, x, y, values)
    for one, other in zip(actual, expected(x, y)[1:]):
        assert error(one, other) < 1e-5
