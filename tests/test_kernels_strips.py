""" The Triton kernels for sequences of middling length """
import pytest
import torch

from kernels import BARS, SLOW, VARIANTS, assert_close, degenerate, dropout_factor, expected, make_inputs, run, settings

pytest.importorskip('triton')
from timm_sot.kernels import strips

pytestmark = SLOW


@pytest.mark.parametrize('variant', VARIANTS)
def test_variants(variant):
    tensors = make_inputs(1, 2, 32, 32) if variant == 'sot_qkt' else make_inputs(1, 2, 40, 16)
    assert_close(run('strips', *tensors, variant, iters=3), expected(*tensors, variant, iters=3))


@pytest.mark.parametrize('variant', ['sot_q', 'sot_qk'])
@pytest.mark.parametrize('N, D', [(1, 16), (2, 16), (3, 16), (16, 24), (17, 48), (100, 16)])
def test_sizes(variant, N, D):
    tensors = make_inputs(1, 2, N, D)
    assert_close(run('strips', *tensors, variant, iters=3), expected(*tensors, variant, iters=3))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('N', [129, 197, 256])
def test_sizes_that_it_is_for(N, dtype):
    tensors = make_inputs(1, 1, N, 64, dtype)
    assert_close(run('strips', *tensors, iters=2), expected(*tensors, iters=2), dtype)


@pytest.mark.parametrize('variant', ['sot_q', 'sot_qk', 'sot_qk_nosoftmax'])
@pytest.mark.parametrize('reg', [0.005, 0.05, 0.1, 10.])
def test_regs(variant, reg):
    tensors = make_inputs(1, 2, 20, 32)
    assert_close(
        run('strips', *tensors, variant, reg=reg, iters=10), expected(*tensors, variant, reg, 10),
        slack=10. if reg < 0.05 else 1.)


@pytest.mark.parametrize('variant', ['sot_q', 'sot_qk'])
@pytest.mark.parametrize('scale', [1e-4, 1e4])
def test_scales(variant, scale):
    tensors = make_inputs(1, 2, 20, 32, scale=scale)
    assert_close(run('strips', *tensors, variant, iters=3), expected(*tensors, variant, iters=3), floor=0.)


@pytest.mark.parametrize('variant', ['sot_q', 'sot_qk'])
def test_cosine(variant):
    q, k, v, grad = make_inputs(1, 2, 20, 32)
    q, k = q.clone(), k.clone()
    q[0, 0, 3], k[0, 0, 4] = 0, 0  # a zero vector has no direction, and no gradient
    assert_close(
        run('strips', q, k, v, grad, variant, iters=3, distance='cosine'),
        expected(q, k, v, grad, variant, iters=3, distance='cosine'))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('variant', ['sot_q', 'sot_qk'])
def test_half(variant, dtype):
    tensors = make_inputs(1, 2, 20, 32, dtype)
    assert_close(run('strips', *tensors, variant, iters=5), expected(*tensors, variant, iters=5), dtype)


@pytest.mark.parametrize('variant', ['sot_q', 'sot_qk'])
@pytest.mark.parametrize('reg', [0.005, 0.1, 10.])
@pytest.mark.parametrize('dtype', BARS)
def test_degenerate(variant, reg, dtype):
    for x in run('strips', *degenerate(4, 40, 16, dtype), variant, reg=reg, iters=3):
        assert x.isfinite().all()


@pytest.mark.parametrize('variant', ['sot_q', 'sot_qk'])
def test_range_of_the_scaling_form(variant):
    """Outliers and clusters drive the scaling vectors apart as far as they go, at the smallest reg that has them."""
    q, k, v, grad = make_inputs(6, 1, 20, 16)
    q, k = q.clone(), k.clone()
    for b in range(6):  # b + 1 outliers far apart, the others close together
        q[b, :, b + 1:] *= 1e-3
        k[b, :, b + 1:] *= 1e-3
    q[3:] *= torch.logspace(0, 8, 20).view(20, 1).to(q)
    actual = run('strips', q, k, v, grad, variant, reg=0.05, iters=10)
    for x in actual:
        assert x.isfinite().all()
    out = expected(q, k, v, grad, variant, 0.05, 10)[0]
    torch.testing.assert_close(actual[0].cpu().double(), out, rtol=0, atol=1e-4)


@pytest.mark.parametrize('variant', ['sot_q', 'sot_qk', 'sot_qk_nosoftmax'])
def test_dropout(variant):
    q, k, v, grad = make_inputs(2, 2, 30, 32)
    factor = dropout_factor('strips', q, k, variant, 0.3)
    assert abs((factor > 0).double().mean().item() - 0.7) < 0.03
    assert len({tuple(f.flatten().tolist()) for f in factor.flatten(0, 1)}) == 4  # problems differ
    assert_close(
        run('strips', q, k, v, grad, variant, iters=2, p=0.3),
        expected(q, k, v, grad, variant, iters=2, factor=factor))


def test_drops_what_the_others_drop():
    """The mask is a function of the seed alone, whatever applies it."""
    q, k, _, _ = make_inputs(1, 2, 40, 48)
    factors = [dropout_factor(path, q, k, 'sot_qk', 0.3) for path in ('strips', 'onchip', 'streamed')]
    assert torch.equal(factors[0], factors[1]) and torch.equal(factors[0], factors[2])


def test_strides():
    """Keys stored transposed, values broadcast, and others with strides of their own."""
    q, k, v, grad = make_inputs(2, 2, 20, 32)
    k = k.transpose(-2, -1).contiguous().transpose(-2, -1)
    q, v, grad = (x.repeat_interleave(2, dim=-1)[..., ::2] for x in (q, v[:1], grad))
    v = v.expand(2, -1, -1, -1)
    assert_close(run('strips', q, k, v, grad, iters=2), expected(q, k, v, grad, iters=2))


@pytest.mark.parametrize('variant', ['sot_q', 'sot_qk'])
def test_far_from_the_origin(variant):
    q, k, v, grad = make_inputs(1, 1, 40, 32)
    assert_close(
        run('strips', q + 100., k + 100., v, grad, variant, iters=2),
        expected(q + 100., k + 100., v, grad, variant, iters=2))


def test_equal_rows_are_at_distance_0():
    q, k, v, grad = make_inputs(1, 1, 40, 32)
    k = q.roll(1, dims=-2)
    assert_close(
        run('strips', q, k, v, grad, 'sot_qk_nosoftmax', iters=2),
        expected(q, k, v, grad, 'sot_qk_nosoftmax', iters=2))


def test_what_is_kept_does_not_hang_on_what_memory_held(monkeypatch):
    """Padding included: it is an output of the operator."""
    q, k, v, _ = make_inputs(1, 2, 20, 16)
    empty = strips.empty_saved
    monkeypatch.setattr(strips, 'empty_saved', lambda *args: empty(*args).fill_(float('nan')))
    _, saved = strips.sot_attention_forward(q, k, v, *settings(q, 'sot_qk', iters=2))
    assert saved.isfinite().all()
