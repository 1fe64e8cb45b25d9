""" What the tests of the kernels of learned marginals share: an implementation by itself, and what it must compute """
import math

import torch

import reference
from kernels import BARS, device_of, make_inputs
from timm_sot.attention import log_shares
from timm_sot.kernels.shares import fused_shares_attention

NAMES = ('out', 'dq', 'dk', 'dv', 'dreg', 'dshare')


def inputs(path, B, H, N, D, dtype=torch.float32, share=0.3, reg=0.1, **kwargs):
    """q, k, v, what is learned, and a gradient of the output."""
    device = device_of(path)
    q, k, v, grad = make_inputs(B, H, N, D, dtype, device=device, **kwargs)
    generator = torch.Generator().manual_seed(5)
    log_reg = math.log(reg) + 0.1 * torch.rand(H, 1, 1, generator=generator)
    return q, k, v, log_reg.to(device), (share * torch.randn(H, D, 1, generator=generator)).to(device), grad


def parameters(k, log_reg, share):
    """What the operator is given of what is learned."""
    return (-log_reg).exp().flatten(), log_shares(k.float(), share).squeeze(-2)


def run(path, q, k, v, log_reg, share, grad, iters=5, p=0.):
    """Output and gradients."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v, log_reg, share)]
    out = fused_shares_attention(*leaves[:3], *parameters(leaves[1], *leaves[3:]), iters, p, path)
    assert out.dtype == v.dtype
    return out.detach(), *torch.autograd.grad(out, leaves, grad, allow_unused=iters == 0)


def expected(q, k, v, log_reg, share, grad, iters=5, factor=1.):
    leaves = [x.detach().cpu().double().requires_grad_() for x in (q, k, v, log_reg, share)]
    weights = reference.shares_attention_weights(*leaves[:2], *leaves[3:], iters)
    out = weights * factor @ leaves[2]
    return out.detach(), *torch.autograd.grad(out, leaves, grad.cpu().double(), allow_unused=iters == 0)


def assert_close(actual, wanted, dtype=torch.float32, slack=1., floor=3e-6):
    """Errors in the norm; `floor` is for gradients that are 0 in exact arithmetic."""
    for name, x, y in zip(NAMES[:len(actual)], actual, wanted, strict=True):
        if y is None:
            assert x is None or not x.any(), name
            continue
        error = (x.cpu().double() - y).norm()
        assert error <= slack * BARS[dtype][name != 'out'] * y.norm() + floor, f'{name}: {error:.1e} of {y.norm():.1e}'
