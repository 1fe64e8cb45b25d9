""" The Triton kernels of learned marginals for short sequences """
import pytest
import torch

pytest.importorskip('triton')

from shares import assert_close, expected, inputs, run
from timm_sot.kernels.fused import ONCHIP_MAX_TOKENS
from timm_sot.kernels.onchip_shares import empty_saved


@pytest.mark.parametrize('N', [ONCHIP_MAX_TOKENS - 1, ONCHIP_MAX_TOKENS])
def test_most_tokens(N):
    tensors = inputs('onchip', 1, 1, N, 16)
    assert_close(run('onchip', *tensors, iters=2), expected(*tensors, iters=2))


def test_no_matrix_is_kept():
    assert empty_saved(torch.empty(2, 3, 20, 8), 5).shape == (6, 5, 2, 32)
