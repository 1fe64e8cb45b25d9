""" What the tests of the kernels share: one implementation of SOT attention by itself, and what it must compute

On a machine without a GPU, Triton interprets the kernels: see conftest.py.
"""
import contextlib
import importlib.util
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import reference
from timm_sot import attention
from timm_sot.kernels import fused
from timm_sot.kernels.threads import loops_work

HAS_TRITON = importlib.util.find_spec('triton') is not None
HAS_CUDA = torch.cuda.is_available()
DEVICE = 'cuda' if HAS_CUDA else 'cpu'
VARIANTS = [name for name, variant in attention.VARIANTS.items() if variant.operands]  # which have kernels

# relative errors of the output and of the gradients that each dtype may have
BARS = {torch.float32: (1e-5, 1e-4), torch.float16: (2e-3, 6e-3), torch.bfloat16: (1e-2, 3e-2)}

# interpreted, the kernels that go through a matrix in parts take seconds a test
SLOW = [] if HAS_CUDA else [pytest.mark.slow]
NEEDS_TRITON = pytest.mark.skipif(not HAS_TRITON, reason='needs triton')
ONCHIP = pytest.param('onchip', marks=NEEDS_TRITON)
STRIPS, STREAMED = (pytest.param(path, marks=[NEEDS_TRITON, *SLOW]) for path in ('strips', 'streamed'))
CPU = pytest.param('cpu', marks=pytest.mark.skipif(not loops_work(), reason='needs numba'))
PATHS = [ONCHIP, STRIPS, STREAMED, CPU]
SHARES_PATHS = [ONCHIP, STREAMED, CPU]  # those of 'sot_shares'


@contextlib.contextmanager
def values_read():
    """A list of the ways in which values of tensors are read on the host, inside of operators too.

    A mode of dispatch does not see what an operator of ours calls.
    """
    seen = []

    def watched(name):
        original = getattr(torch.Tensor, name)

        def read(self, *args, **kwargs):
            seen.append(name)
            return original(self, *args, **kwargs)
        return mock.patch.object(torch.Tensor, name, read)

    with contextlib.ExitStack() as stack:
        for name in ('item', 'tolist', '__bool__', '__int__', '__float__', '__index__'):
            stack.enter_context(watched(name))
        yield seen


class ProductDtypes(TorchDispatchMode):
    """A mode that lists the dtypes of products of matrices."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            self.seen.append(args[1].dtype)
        return function(*args, **(kwargs or {}))


def device_of(path):
    return 'cpu' if path == 'cpu' else DEVICE


def make_inputs(B, H, N, D, dtype=torch.float32, scale=1., seed=0, device=DEVICE):
    """q, k, v as they come out of a fused projection, and a gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(B, N, 3, H, D, generator=generator)
    qkv[:, :, :2] *= scale
    grad = torch.randn(B, N, H, D, generator=generator).to(device, dtype).transpose(1, 2)
    return *qkv.to(device, dtype).permute(2, 0, 3, 1, 4).unbind(0), grad


def settings(q, variant, reg=0.1, iters=10, p=0., distance='euclidean', scale=None):
    """The arguments of the implementations behind q, k and v."""
    seed = torch.tensor(123, device=q.device) if p else None
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return (*attention.VARIANTS[variant][:2], reg, iters, scale, p, seed, distance)


def run(path, q, k, v, grad, variant='sot_qk', **kwargs):
    """Output and gradients of one implementation, whose fakes must tell the truth."""
    kernels = fused._implementation(path)
    args = settings(q, variant, **kwargs)
    out, saved = kernels.sot_attention_forward(q, k, v, *args)
    grads = kernels.sot_attention_backward(grad, q, k, v, saved, *args)
    for real, fake in zip((out, saved, *grads), (
            *fused._fake_forward(q, k, v, *args, path), *fused._fake_backward(grad, q, k, v, saved, *args, path))):
        assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)
    return out, *grads


def expected(q, k, v, grad, variant='sot_qk', reg=0.1, iters=10, factor=1., distance='euclidean'):
    """The same by the reference in float64; `factor` is what dropout multiplies the weights with."""
    leaves = [x.detach().cpu().double().requires_grad_() for x in (q, k, v)]
    weights = reference.attention_weights(*leaves[:2], variant, reg, iters, None, distance)
    out = weights * factor @ leaves[2]
    return out.detach(), *torch.autograd.grad(out, leaves, grad.cpu().double(), allow_unused=True)


def assert_close(actual, wanted, dtype=torch.float32, slack=1., floor=1e-6, points_floor=None):
    """Errors in the norm; `floor` is for gradients that are 0 in exact arithmetic, of q and k `points_floor`."""
    points_floor = floor if points_floor is None else points_floor
    floors = floor, points_floor, points_floor, floor
    bars = BARS[dtype][0], *[BARS[dtype][1]] * 3
    for name, x, y, bar, floor in zip(('out', 'dq', 'dk', 'dv'), actual, wanted, bars, floors):
        if y is None:  # not used
            assert not x.any()
            continue
        error = (x.cpu().double() - y).norm().item()
        assert error <= slack * bar * y.norm().item() + floor, f'{name}: {error:.1e} of {y.norm().item():.1e}'


def dropout_factor(path, q, k, variant, p):
    """What the implementation multiplies the weights with: times the identity they show it, where N <= D."""
    N, D = q.shape[-2:]
    eye = torch.eye(N, D, device=q.device, dtype=q.dtype).expand_as(q)
    shown, _ = fused._implementation(path).sot_attention_forward(
        q, k, eye, *settings(q, variant, iters=2, p=p))
    return (shown[..., :N] != 0).double().cpu() / (1. - p)


def degenerate(B, N, D, dtype=torch.float32, device=DEVICE):
    """Inputs with zero rows, equal rows, q = k, and nothing but equal rows; a problem of each kind."""
    q, k, v, grad = make_inputs(4, 1, N, D, dtype, device=device)
    q, k = q.clone(), k.clone()
    q[0], k[0] = 0, 0
    q[1, :, 1::2] = q[1, :, :1]
    k[1, :, ::3] = k[1, :, :1]
    q[2], k[2] = q[2, :, :1], k[2, :, :1]
    q[3] = k[3]
    q[3, :, 1], k[3, :, N // 2] = 0, 0
    return q[:B], k[:B], v[:B], grad[:B]
