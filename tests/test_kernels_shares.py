""" The operator timm_sot::shares_attention, in all its implementations """
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import reference
from kernels import BARS, CPU, ONCHIP, SLOW, STREAMED, degenerate, device_of
from shares import NAMES, assert_close, expected, inputs, parameters, run
from timm_sot.attention import MIN_REG
from timm_sot.kernels.shares import fused_shares_attention, shares_attention, shares_attention_backward

ON_ALL = pytest.mark.parametrize('path', [CPU, ONCHIP, STREAMED])
ON_QUICK = pytest.mark.parametrize('path', [CPU, ONCHIP])  # the rest of `streamed`: test_kernels_streamed_shares.py
ON_CPU = pytest.mark.parametrize('path', [CPU])


@pytest.mark.parametrize('iters', [0, 1, 5, 40])
@pytest.mark.parametrize('reg', [MIN_REG, 0.1, 1., 10.])
@ON_QUICK
def test_equals_reference(path, reg, iters):
    tensors = inputs(path, 2, 2, 32, 32, reg=reg)
    assert_close(run(path, *tensors, iters=iters), expected(*tensors, iters=iters), slack=10. if reg < 0.1 else 1.)


@pytest.mark.parametrize('N, D', [
    (1, 16), (2, 16), (3, 5), (4, 1), (15, 16), (16, 16), (17, 48), (49, 32), (64, 64), (65, 33),
    (100, 60),  # wider ones of float32 fit on no GPU
])
@ON_ALL
def test_sizes(path, N, D):
    tensors = inputs(path, 1, 2, N, D)
    # a number has no direction, and one token no choice: gradients are 0, and what cancels in that of reg is over reg^2
    assert_close(run(path, *tensors), expected(*tensors), floor=6e-5 if 1 in (N, D) else 3e-6)


@pytest.mark.parametrize('scale', [1e-4, 1e4])
@ON_ALL
def test_scales(path, scale):
    tensors = inputs(path, 1, 2, 20, 32, scale=scale, share=0.3 / scale)
    for name, x, y in zip(NAMES, run(path, *tensors), expected(*tensors)):
        assert (x.cpu().double() - y).norm() <= 1e-4 * y.norm() + 1e-7, name


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@ON_ALL
def test_half(path, dtype):
    tensors = inputs(path, 1, 2, 20, 32, dtype)
    assert_close(run(path, *tensors), expected(*tensors), dtype)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@ON_QUICK
def test_close_directions(path, dtype):
    """What is subtracted of the gradients cancels term by term, as rounded."""
    q, k, *others = inputs(path, 1, 2, 20, 32, dtype, share=0.)
    q, k = q[:, :, :1] + 0.03 * q, q[:, :, :1] + 0.03 * k
    actual, wanted = run(path, q, k, *others), expected(q, k, *others)
    assert_close(actual[:4], wanted[:4], dtype)


@pytest.mark.parametrize('share', [0., 1., 1e3, 1e30])
@pytest.mark.parametrize('reg', [MIN_REG, 0.1, 1e3])
@pytest.mark.parametrize('dtype', BARS)
@ON_QUICK
def test_degenerate(path, dtype, reg, share):
    device = device_of(path)
    q, k, v, grad = degenerate(4, 16, 16, dtype, device)
    if dtype == torch.float16:
        share = min(share, 1e3)  # the gradient of the keys is as large
    learned = torch.full((1, 1, 1), math.log(reg), device=device), torch.full((1, 16, 1), share, device=device)
    tensors = q, k, v, *learned, grad
    actual = run(path, *tensors)
    for name, x in zip(NAMES, actual):
        assert x.isfinite().all(), name
    out = actual[0].cpu().double()
    assert (out - expected(*tensors)[0]).norm() <= 10 * BARS[dtype][0] * out.norm()


@pytest.mark.parametrize('log_reg', [math.log(MIN_REG), 80.])
@ON_ALL
def test_ends_of_the_range(path, log_reg):
    """One key like the queries and all others opposite."""
    x = torch.randn(1, 1, 1, 16, generator=torch.Generator().manual_seed(0))
    q, k = x.expand(1, 1, 48, 16), torch.cat([x, -x.expand(1, 1, 47, 16)], 2)
    v, grad = torch.randn(2, 1, 1, 48, 16, generator=torch.Generator().manual_seed(1))
    tensors = q, k, v, torch.full((1, 1, 1), log_reg), torch.zeros(1, 16, 1), grad
    tensors = [x.to(device_of(path)) for x in tensors]
    actual, wanted = run(path, *tensors), expected(*tensors)
    assert all(x.isfinite().all() for x in actual)
    assert reference.error(actual[0].cpu(), wanted[0]) < 1e-4 and reference.error(actual[3].cpu(), wanted[3]) < 1e-4


@ON_ALL
def test_nan_stays_with_its_image(path):
    tensors = [*inputs(path, 3, 2, 20, 16)]
    clean = run(path, *tensors)
    for i in range(2):
        spoilt = [*tensors]
        spoilt[i] = spoilt[i].clone()
        spoilt[i][1, 0, 3, 4] = math.nan
        actual = run(path, *spoilt)
        for x, y in zip(actual[:4], clean[:4]):
            assert x[1, 0].isnan().any() and torch.equal(x[[0, 2]], y[[0, 2]]) and torch.equal(x[1, 1], y[1, 1])
        assert actual[4][0].isnan().all() and torch.equal(actual[4][1], clean[4][1])
    tensors[3] = torch.full_like(tensors[3], math.nan)
    assert all(x.isnan().any() for x in run(path, *tensors))


@pytest.mark.parametrize('layout', [
    torch.Tensor.contiguous, lambda x: x.mT.contiguous().mT, lambda x: x.repeat_interleave(2, -1)[..., ::2],
    lambda x: x[:1].expand_as(x)])
@ON_ALL
def test_strides(path, layout):
    q, k, v, *learned, grad = inputs(path, 2, 2, 17, 16)
    tensors = [*map(layout, (q, k, v)), *learned, layout(grad)]
    assert_close(run(path, *tensors), expected(*tensors))


@pytest.mark.parametrize('N', [16, 20])
@ON_QUICK
def test_dropout(path, N):
    q, k, v, *learned, grad = inputs(path, 3, 2, N, 32)

    def shown(seed):  # the weights, after dropout
        torch.manual_seed(seed)
        eye = torch.eye(N, 32, device=q.device).expand_as(v)
        return run(path, q, k, eye, *learned, grad, p=0.3)[0][..., :N].cpu()

    factor = (shown(0) != 0).double() / 0.7
    assert 0.6 < (factor != 0).double().mean() < 0.8
    assert not torch.equal(factor != 0, shown(1) != 0)
    assert len({tuple(mask.flatten().tolist()) for mask in factor.flatten(0, 1)}) == 6, 'one mask for several problems'
    torch.manual_seed(0)
    assert_close(run(path, q, k, v, *learned, grad, p=0.3), expected(q, k, v, *learned, grad, factor=factor))


@ON_ALL
def test_repeats(path):
    tensors = inputs(path, 2, 2, 20, 16)
    assert all(map(torch.equal, run(path, *tensors), run(path, *tensors)))


@pytest.mark.parametrize('dtype', BARS)
@pytest.mark.parametrize('p', [0., 0.2])
@pytest.mark.parametrize('path', [CPU, pytest.param(*ONCHIP.values, marks=[*ONCHIP.marks, *SLOW])])
def test_opcheck(path, dtype, p):
    q, k, v, log_reg, share, grad = inputs(path, 2, 2, 17, 16, dtype)
    scale, shares = parameters(k, log_reg, share)
    seed = torch.tensor(7, device=q.device) if p else None
    leaves = [x.detach().requires_grad_() for x in (q, k, v, scale, shares)]
    torch.library.opcheck(shares_attention, (*leaves, 3, p, seed, path))
    _, saved = shares_attention(q, k, v, scale, shares, 3, p, seed, path)
    args = grad, q, k, v, scale, shares, saved, 3, p, seed, path
    torch.library.opcheck(shares_attention_backward, args)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = shares_attention_backward(*args)
    for real, fake in zip(shares_attention_backward(*args), fakes, strict=True):
        assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)


@ON_CPU
def test_mixed_devices(path):
    q, k, v, log_reg, share, _ = inputs(path, 1, 1, 4, 4)
    with pytest.raises(RuntimeError, match='on one device, got .*meta'):
        shares_attention(q, k.to('meta'), v, *parameters(k, log_reg, share), 3, 0., None, path)


@ON_CPU
def test_second_derivative_is_refused(path):
    q, k, v, log_reg, share, grad = inputs(path, 1, 1, 8, 8)
    q.requires_grad_()
    out = fused_shares_attention(q, k, v, *parameters(k, log_reg, share), 3, 0., path)
    first, = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match='no second derivative. Set fused_attn'):
        first.sum().backward()
