""" Every implementation of the operators on inputs that nobody thought of """
import math

import pytest
import torch

import shares
from kernels import HAS_CUDA, PATHS, SHARES_PATHS, VARIANTS, assert_close, device_of, expected, make_inputs, run
from timm_sot.attention import MIN_REG

pytest.importorskip('hypothesis')
from hypothesis import HealthCheck, example, given, settings, strategies as st

LAYOUTS = {
    'fused projection': lambda x: x,
    'contiguous': torch.Tensor.contiguous,
    'transposed': lambda x: x.transpose(-2, -1).contiguous().transpose(-2, -1),
    'every other channel': lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    'one for all': lambda x: x[:1].expand_as(x),
}

TOKENS = st.one_of(st.integers(1, 40), st.sampled_from([49, 64, 65, 100, 128, 129, 160, 197, 256]))
MOST_TOKENS = {'onchip': 128, 'streamed': 150}  # what it is for, and what is interpreted in seconds
DTYPES = ['float32', 'float16', 'bfloat16']
# a GPU's kernels are compiled for nearly each example
SETTINGS = settings(
    max_examples=4 if HAS_CUDA else 10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.mark.slow
@example('sot_qk', 3, 64, 32, 'fused projection', 0.1, 1., 3, 'euclidean', False)
@given(
    variant=st.sampled_from(VARIANTS),
    seed=st.integers(0, 2 ** 20),
    N=TOKENS,
    D=st.sampled_from([4, 16, 24, 32, 64]),
    layout=st.sampled_from(sorted(LAYOUTS)),
    reg=st.floats(math.log(0.005), math.log(10.)).map(math.exp),
    scale=st.sampled_from([1e-4, 1e-2, 1., 1e2, 1e4]),
    iters=st.integers(1, 6),
    distance=st.sampled_from(['euclidean', 'cosine']),
    degenerate_rows=st.booleans(),
)
@SETTINGS
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('path', PATHS)
def test_never_nan(path, dtype, variant, seed, N, D, layout, reg, scale, iters, distance, degenerate_rows):
    N = D if variant == 'sot_qkt' else min(N, MOST_TOKENS.get(path, N))
    dtype, device = getattr(torch, dtype), device_of(path)
    if path == 'strips' and dtype == torch.float32:  # which a GPU has no memory for
        N = min(N, 128)
    if dtype == torch.float16:
        scale = min(max(scale, 1e-2), 1e2)  # beyond, the inputs or their gradients leave its range
    tensors = list(make_inputs(2, 1, N, D, dtype, scale, seed, device))
    if degenerate_rows:
        tensors[0], tensors[1] = tensors[0].clone(), tensors[1].clone()
        tensors[0][:, 0, ::2] = tensors[0][:, 0, :1].clone()
        tensors[1][:, 0, ::3] = tensors[0][:, 0, :1]
        tensors[0][0, :, -1] = 0
        tensors[1][0, :, 0] = 0
    tensors = [LAYOUTS[layout](x) for x in tensors]
    actual = run(path, *tensors, variant, reg=reg, iters=iters, distance=distance)
    for name, x in zip(('out', 'dq', 'dk', 'dv'), actual):
        assert x.isfinite().all(), name
    if dtype == torch.float32 and not degenerate_rows and reg >= 0.05:
        wanted = expected(*tensors, variant, reg, iters, distance=distance)
        # gradients of points grow as these shrink
        assert_close(actual, wanted, slack=10., floor=1e-5, points_floor=1e-5 / min(scale, 1.))


@pytest.mark.slow
@given(
    seed=st.integers(0, 2 ** 20),
    N=TOKENS,
    D=st.sampled_from([4, 16, 24, 64]),
    layout=st.sampled_from(sorted(LAYOUTS)),
    reg=st.floats(math.log(MIN_REG), math.log(10.)).map(math.exp),
    share=st.sampled_from([0., 0.3, 30., 3000.]),
    scale=st.sampled_from([1e-2, 1., 1e2]),
    iters=st.integers(0, 6),
    degenerate_rows=st.booleans(),
)
@SETTINGS
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('path', SHARES_PATHS)
def test_shares_never_nan(path, dtype, seed, N, D, layout, reg, share, scale, iters, degenerate_rows):
    dtype, N = getattr(torch, dtype), min(N, MOST_TOKENS.get(path, N))
    q, k, v, *learned, grad = shares.inputs(
        path, 2, 1, N, D, dtype, reg=reg, share=share / scale if share < 1. else share, scale=scale, seed=seed)
    if degenerate_rows:
        q, k = q.clone(), k.clone()
        k[:, 0, ::3] = k[:, 0, :1].clone()
        q[:, 0, ::2] = k[:, 0, :1]
        q[0, :, -1], k[0, :, 0] = 0, 0
    tensors = *map(LAYOUTS[layout], (q, k, v)), *learned, LAYOUTS[layout](grad)
    actual = shares.run(path, *tensors, iters=iters)
    for name, x in zip(shares.NAMES, actual):
        assert x is None or x.isfinite().all(), name
    if dtype == torch.float32 and not degenerate_rows and reg >= 0.05:
        wanted = shares.expected(*tensors, iters=iters)
        shares.assert_close(actual, wanted, slack=10., floor=3e-5 / min(scale, 1.))
