""" How the bench weighs """
import pytest
import torch

from timm_sot.bench import memory

CPU = torch.device('cpu')


def test_saved_bytes():
    x, y = torch.randn(2, 8, 4, requires_grad=True).unbind(0)
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()  # one storage of 256 bytes

    total, beyond = memory.saved_bytes(lambda x, y: (x * y).exp().sum(), (x, y))
    assert (total, beyond) == (256 + 128, 128)  # the product is not kept, the exponential is


def test_memory_rows(monkeypatch):
    monkeypatch.setattr(memory, 'SAVED_SHAPE', (1, 1, 32))
    rows = [*memory.memory_rows(torch.float32, CPU)]
    assert [row['contender'] for row in rows] == ['sot_qk iters=1', 'sot_qk iters=100']
    assert all(row['bytes'] > 0 for row in rows)


def test_train_once(monkeypatch):
    core, shapes = memory.sot_core, []

    def watched(variant):
        return lambda q, k, v: shapes.append(q.shape) or core(variant)(q, k, v)

    monkeypatch.setattr(memory, 'sot_core', watched)
    qkv = torch.randn(1, 32, 3, 2, memory.D, requires_grad=True)
    before = qkv.detach().clone()
    memory.train_once(qkv)
    assert not torch.equal(qkv, before)
    assert shapes == [(1, 2, 32, memory.D)]
    monkeypatch.setattr(memory, 'sot_core', lambda variant: lambda q, k, v: v * float('nan'))
    with pytest.raises(FloatingPointError, match='not finite'):
        memory.train_once(qkv)
