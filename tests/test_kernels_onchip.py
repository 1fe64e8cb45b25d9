""" The Triton kernels for short sequences """
import pytest
import torch

from kernels import BARS, VARIANTS, assert_close, degenerate, dropout_factor, expected, make_inputs, run

pytest.importorskip('triton')


@pytest.mark.parametrize('variant', VARIANTS)
def test_variants(variant):
    tensors = make_inputs(2, 2, 32, 32)
    assert_close(run('onchip', *tensors, variant), expected(*tensors, variant))


@pytest.mark.parametrize('variant', ['sot_q', 'sot_qk'])
@pytest.mark.parametrize('N, D', [(1, 16), (2, 16), (3, 16), (16, 16), (17, 48), (49, 32), (64, 64), (100, 16)])
def test_sizes(variant, N, D):
    tensors = make_inputs(1, 2, N, D)
    assert_close(run('onchip', *tensors, variant, iters=5), expected(*tensors, variant, iters=5))


@pytest.mark.parametrize('variant', ['sot_q', 'sot_qk', 'sot_qk_nosoftmax'])
@pytest.mark.parametrize('reg', [0.005, 0.05, 0.1, 0.8, 10.])
def test_regs(variant, reg):
    tensors = make_inputs(1, 2, 16, 32)
    # float32 costs in [0, 1] are exact to 1e-7, log-kernels to 1e-7 / reg
    slack = 10. if reg < 0.05 else 1.
    assert_close(run('onchip', *tensors, variant, reg=reg, iters=20), expected(*tensors, variant, reg, 20), slack=slack)


@pytest.mark.parametrize('variant', ['sot_q', 'sot_qk'])
@pytest.mark.parametrize('scale', [1e-4, 1e4])
def test_scales(variant, scale):
    tensors = make_inputs(1, 2, 20, 32, scale=scale)
    assert_close(run('onchip', *tensors, variant, iters=5), expected(*tensors, variant, iters=5), floor=0.)


@pytest.mark.parametrize('variant', ['sot_q', 'sot_qk'])
def test_cosine(variant):
    q, k, v, grad = make_inputs(1, 2, 20, 32)
    q, k = q.clone(), k.clone()
    q[0, 0, 3], k[0, 0, 4] = 0, 0  # a zero vector has no direction, and no gradient
    assert_close(
        run('onchip', q, k, v, grad, variant, iters=5, distance='cosine'),
        expected(q, k, v, grad, variant, iters=5, distance='cosine'))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('variant', ['sot_q', 'sot_qk'])
def test_half(variant, dtype):
    tensors = make_inputs(1, 2, 20, 32, dtype)
    assert_close(run('onchip', *tensors, variant, iters=5), expected(*tensors, variant, iters=5), dtype)


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('reg', [0.005, 0.1, 10.])
@pytest.mark.parametrize('dtype', BARS)
def test_degenerate(variant, reg, dtype):
    for x in run('onchip', *degenerate(4, 16, 16, dtype), variant, reg=reg, iters=5):
        assert x.isfinite().all()


@pytest.mark.parametrize('variant', ['sot_q', 'sot_qk'])
@pytest.mark.parametrize('N', [3, 8, 16])
def test_range_of_the_scaling_form(N, variant):
    """Outliers and clusters drive the scaling vectors apart as far as they go, at the smallest reg that has them."""
    q, k, v, grad = make_inputs(6, 1, N, 16)
    q, k = q.clone(), k.clone()
    for b in range(6):  # b + 1 outliers far apart, the others close together
        q[b, :, b + 1:] *= 1e-3
        k[b, :, b + 1:] *= 1e-3
    q[3:] *= torch.logspace(0, 8, N).view(N, 1).to(q)
    actual = run('onchip', q, k, v, grad, variant, reg=0.05, iters=30)
    for x in actual:
        assert x.isfinite().all()
    out = expected(q, k, v, grad, variant, 0.05, 30)[0]
    torch.testing.assert_close(actual[0].cpu().double(), out, rtol=0, atol=1e-4)


@pytest.mark.parametrize('variant', ['sot_q', 'sot_qk', 'sot_qk_nosoftmax'])
def test_dropout(variant):
    p = 0.3
    q, k, v, grad = make_inputs(2, 2, 30, 32)
    factor = dropout_factor('onchip', q, k, variant, p)
    assert abs((factor > 0).double().mean().item() - (1 - p)) < 0.03
    assert len({tuple(f.flatten().tolist()) for f in factor.flatten(0, 1)}) == 4  # problems differ
    assert_close(
        run('onchip', q, k, v, grad, variant, iters=2, p=p), expected(q, k, v, grad, variant, iters=2, factor=factor))


def test_strides():
    """Keys stored transposed, values broadcast, and a gradient with a stride of its own."""
    q, k, v, grad = make_inputs(2, 2, 20, 32)
    k = k.transpose(-2, -1).contiguous().transpose(-2, -1)
    v = v[:1].expand(2, -1, -1, -1)
    grad = grad.repeat_interleave(2, dim=-1)[..., ::2]
    assert_close(run('onchip', q, k, v, grad, iters=2), expected(q, k, v, grad, iters=2))
