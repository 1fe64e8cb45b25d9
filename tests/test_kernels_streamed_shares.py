""" The Triton kernels of learned marginals for long sequences """
import math

import pytest
import torch

pytest.importorskip('triton')

from kernels import BARS, SLOW, degenerate, values_read
from shares import NAMES, assert_close, expected, inputs, parameters, run
from timm_sot.attention import MIN_REG
from timm_sot.kernels.shares import shares_attention, shares_attention_backward
from timm_sot.kernels.streamed_shares import empty_saved

pytestmark = SLOW


@pytest.mark.parametrize('iters', [0, 1, 7])
@pytest.mark.parametrize('reg', [MIN_REG, 10.])
def test_equals_reference(reg, iters):
    tensors = inputs('streamed', 1, 2, 70, 16, reg=reg)
    slack = 10. if reg < 0.1 else 1.
    assert_close(run('streamed', *tensors, iters=iters), expected(*tensors, iters=iters), slack=slack)


@pytest.mark.parametrize('N', [1, 64, 65, 129])
def test_tiles(N):
    tensors = inputs('streamed', 1, 1, N, 16)
    assert_close(run('streamed', *tensors, iters=2), expected(*tensors, iters=2))


@pytest.mark.parametrize('dtype, scale', [(torch.float16, 1.), (torch.bfloat16, 1.), (torch.float16, 3e-4)])
def test_half(dtype, scale):
    """Products of the inverses of small lengths are out of the range of float16."""
    tensors = inputs('streamed', 1, 1, 70, 16, dtype, scale=scale, share=0.3 / scale)
    assert_close(run('streamed', *tensors, iters=2), expected(*tensors, iters=2), dtype)


@pytest.mark.parametrize('share', [0., 1e3, 1e30])
@pytest.mark.parametrize('reg', [MIN_REG, 1e3])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_degenerate(dtype, reg, share):
    """A share of 1e30 leaves whole tiles without mass."""
    q, k, v, grad = degenerate(4, 70, 16, dtype)
    tensors = q, k, v, q.new_full((1, 1, 1), math.log(reg)).float(), q.new_full((1, 16, 1), share).float(), grad
    actual = run('streamed', *tensors, iters=2)
    for name, x in zip(NAMES, actual):
        assert x.isfinite().all(), name
    out = actual[0].cpu().double()
    assert (out - expected(*tensors, iters=2)[0]).norm() <= 10 * BARS[dtype][0] * out.norm()


def test_dropout():
    q, k, v, *learned, grad = inputs('streamed', 1, 2, 70, 72)

    def shown(seed):  # the weights, after dropout
        torch.manual_seed(seed)
        eye = torch.eye(70, 72, device=q.device).expand_as(v)
        return run('streamed', q, k, eye, *learned, grad, iters=2, p=0.3)[0][..., :70].cpu()

    factor = (shown(0) != 0).double() / 0.7
    assert abs((factor > 0).double().mean().item() - 0.7) < 0.03
    assert not torch.equal(factor > 0, shown(1) > 0)
    assert not torch.equal(factor[:, 0], factor[:, 1])
    torch.manual_seed(0)
    assert_close(
        run('streamed', q, k, v, *learned, grad, iters=2, p=0.3),
        expected(q, k, v, *learned, grad, iters=2, factor=factor))


@pytest.mark.parametrize('iters', [0, 4])
def test_agrees_with_onchip(iters):
    tensors = inputs('streamed', 1, 2, 64, 16)
    for x, y in zip(run('streamed', *tensors, iters=iters), run('onchip', *tensors, iters=iters)):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('p', [0., 0.2])
def test_opcheck(p):
    q, k, v, log_reg, share, grad = inputs('streamed', 1, 2, 17, 16)
    seed = torch.tensor(7, device=q.device) if p else None
    leaves = [x.detach().requires_grad_() for x in (q, k, v, *parameters(k, log_reg, share))]
    torch.library.opcheck(shares_attention, (*leaves, 2, p, seed, 'streamed'))
    tensors = [x.detach() for x in leaves]
    _, saved = shares_attention(*tensors, 2, p, seed, 'streamed')
    torch.library.opcheck(shares_attention_backward, (grad, *tensors, saved, 2, p, seed, 'streamed'))


def test_nothing_is_kept():
    assert empty_saved(torch.empty(2, 3, 200, 8), 5).numel() == 0


def test_no_value_is_read(monkeypatch):
    """The interpreter reads the numbers that it works on; what surrounds the kernels must not."""
    from timm_sot.kernels import streamed_shares
    tensors = inputs('streamed', 1, 1, 70, 16)
    launches = []

    class Launched:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: launches.append(grid)

    for name in dir(streamed_shares):
        if name.endswith('_kernel') and hasattr(getattr(streamed_shares, name), 'run'):
            monkeypatch.setattr(streamed_shares, name, Launched())
    with values_read() as seen:
        run('streamed', *tensors, iters=2, p=0.1)
    # 5 half-iterations forward, 4 backward and 3 of their derivative; outputs, sums of rows, and three gradients
    assert (seen, launches) == ([], [(2,)] * 17)
