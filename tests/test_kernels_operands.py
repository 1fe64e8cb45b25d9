""" Tensors and numbers around the kernels """
import pytest
import torch

from timm_sot.kernels.operands import dropout_numbers, empty_gradients, empty_heads, matched_points, unit_stride


def test_heads_merge_without_a_copy():
    q = torch.zeros(2, 3, 5, 7, dtype=torch.float16)
    out = empty_heads(q)
    assert out.shape == q.shape and out.dtype == q.dtype
    assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()
    assert empty_heads(q, torch.float32).dtype == torch.float32


def test_gradients():
    q = torch.zeros(2, 3, 5, 7)
    assert [x.shape for x in empty_gradients(q, 'qk')] == [q.shape] * 3
    assert [x.numel() for x in empty_gradients(q, 'q')] == [q.numel(), 0, q.numel()]


def test_matched_points():
    q, k = torch.randn(2, 1, 2, 6, 6)
    assert matched_points(q, k, 'q') is q
    assert matched_points(q, k, 'qk') is k
    assert torch.equal(matched_points(q, k, 'qkt')[0, :, 2], k[0, :, :, 2])
    assert matched_points(q, k.mT, 'qk').stride(-1) == 1 and torch.equal(matched_points(q, k.mT, 'qk'), k.mT)
    assert unit_stride(k) is k and unit_stride(k[..., ::2]).stride(-1) == 1


def test_rows_far_apart_are_put_together():
    """The Triton kernels count offsets inside a problem in 32 bits."""
    far = torch.empty_strided((1, 1, 16, 16), (0, 0, 2 ** 27, 1), device='meta')
    near = torch.empty_strided((1, 1, 16, 16), (0, 0, 2 ** 26, 1), device='meta')
    assert unit_stride(near) is near and unit_stride(far).is_contiguous()
    assert matched_points(near, near, 'qkt').stride() == near.mT.stride()
    assert matched_points(far, far, 'qkt').mT.is_contiguous() and matched_points(far, far.mT, 'qkt').mT.is_contiguous()


@pytest.mark.parametrize('p', [0., 0.1, 0.5, 1 - 1e-12, 1.])
@pytest.mark.parametrize('lowest, number', [(0, torch.uint32), (-2 ** 31, torch.int32)])
def test_dropout_numbers(p, lowest, number):
    threshold, factor = dropout_numbers(p, lowest)
    assert torch.iinfo(number).min <= threshold <= torch.iinfo(number).max
    assert abs((threshold - lowest) / 2 ** 32 - p) < 1e-9
    assert factor == (1 / (1 - p) if p < 1 else 0.)
