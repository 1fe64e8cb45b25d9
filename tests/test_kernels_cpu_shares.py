""" The fused loops for the CPU, of learned marginals """
import pytest
import torch

from kernels import values_read
from shares import assert_close, expected, inputs, parameters, run
from timm_sot.kernels import cpu_shares, threads
from timm_sot.kernels.cpu_shares import empty_saved
from timm_sot.kernels.threads import loops_work

pytestmark = pytest.mark.skipif(not loops_work(), reason='needs numba')


def test_more_tokens():
    tensors = inputs('cpu', 1, 1, 197, 64)
    assert_close(run('cpu', *tensors), expected(*tensors))


@pytest.mark.parametrize('N', [32, 20])
def test_bfloat16_is_float32_rounded_once(N):
    """In whole tiles, which float32 reads and writes where they lie, and in others."""
    q, k, v, *learned, grad = inputs('cpu', 2, 2, N, 32, torch.bfloat16)
    settings = (*parameters(k, *learned), 5, 0.1, torch.tensor(123))

    def both_ways(grad, *qkv):
        out, saved = cpu_shares.shares_forward(*qkv, *settings)
        return out, *cpu_shares.shares_backward(grad, *qkv, *settings[:2], saved, *settings[2:])

    wanted = both_ways(*(x.float() for x in (grad, q, k, v)))
    for i, (x, y) in enumerate(zip(both_ways(grad, q, k, v), wanted)):
        assert torch.equal(x, y.bfloat16() if i < 4 else y)


def test_dropout_keeps_the_mean():
    q, k, v, *learned, grad = inputs('cpu', 1, 1, 16, 16)
    whole = run('cpu', q, k, v, *learned, grad)[0]
    mean = torch.stack([run('cpu', q, k, v, *learned, grad, p=0.5)[0] for _ in range(2000)]).mean(0)
    assert (mean - whole).abs().max() < 0.1 * v.abs().max()
    assert run('cpu', q, k, v, *learned, grad, p=1.)[0].count_nonzero() == 0


def test_threads(monkeypatch):
    tensors = inputs('cpu', 5, 3, 33, 16)
    once = run('cpu', *tensors)
    monkeypatch.setattr(threads, 'LEAST_WORK', 1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        assert all(map(torch.equal, run('cpu', *tensors), once))
    finally:
        torch.set_num_threads(before)


def test_no_value_is_read():
    tensors = inputs('cpu', 2, 2, 16, 16)
    with values_read() as seen:
        run('cpu', *tensors, p=0.1)
    assert not seen


def test_what_is_kept_does_not_grow_with_the_iterations():
    q = torch.empty(2, 3, 20, 8)
    assert empty_saved(q, 1).shape == empty_saved(q, 100).shape == (6, 20, 32)
