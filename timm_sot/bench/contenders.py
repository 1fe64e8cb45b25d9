""" What is compared: attention cores, training steps and Sinkhorn solvers, in groups that do the same work """
import math
import os
from contextlib import nullcontext
from typing import Any, Callable, List, NamedTuple, Optional, Sequence, Tuple

import timm
import torch
import torch.nn.functional as F
from timm.loss import LabelSmoothingCrossEntropy

from ..attention import VARIANTS, shares_attention, sot_attention, sot_attention_weights
from ..kernels.fused import choose_path
from ..solver import sinkhorn
from ..study.runner import build_model

__all__ = [
    'BATCH', 'Contender', 'D', 'FORWARD', 'Group', 'TRAIN', 'core_group', 'dtype_name', 'eager_softmax', 'pass_of',
    'points_group', 'qkv_inputs', 'randn', 'shape_name', 'sinkhorn_group', 'sot_core', 'step_group',
]

FORWARD, TRAIN = 'forward', 'forward+backward'
REG, ITERS = 0.1, 10
D = 64  # head width
BATCH = 128


class Contender(NamedTuple):
    """One of those that a group compares."""
    name: str
    call: Optional[Callable[[], Any]]
    graph: bool = True  # whether it can be captured as a CUDA graph: nothing in it waits for the device
    matrices: int = 10  # float32 N x N matrices (or their equal) that a call holds at once
    skipped: str = ''  # why it cannot run here
    path: str = ''  # what computes it, where there is a choice


class Group(NamedTuple):
    """Contenders that do the same work, timed together."""
    section: str
    case: str
    phase: str
    baseline: str  # the contender that the ratios are to
    elements: int  # size of the work: entries of the matrices, to predict the time of larger groups
    weight: float  # share of the run's time
    build: Callable[[], List[Contender]]  # called when their turn comes: it makes the inputs


def eager_softmax(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(Q K^T d^-1/2) V in plain torch."""
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1) @ v


def original_weights(
        q: torch.Tensor,
        k: torch.Tensor,
        tol: Optional[float] = None,
) -> torch.Tensor:
    """softmax(SOT(Q, K) d^-1/2) as the original experiments computed it, autograd going through every iteration."""
    N, dtype = q.shape[-2], q.dtype
    q, k = q.float(), k.float()
    diagonal = torch.eye(N, dtype=torch.bool, device=q.device)
    cost = torch.cdist(q, k)
    cost = (cost / cost.amax(dim=-1, keepdim=True)).masked_fill(diagonal, 1000.)

    log_mass = math.log(1 / N + 1e-8)
    u, v = torch.zeros_like(cost[..., 0]), torch.zeros_like(cost[..., 0, :])

    def log_plan():
        return (u.unsqueeze(-1) + v.unsqueeze(-2) - cost) / REG

    for _ in range(ITERS):
        u_prev = u
        u = REG * (log_mass - torch.logsumexp(log_plan(), dim=-1)) + u
        v = REG * (log_mass - torch.logsumexp(log_plan(), dim=-2)) + v
        if tol is not None and (u - u_prev).abs().sum(dim=-1).mean().item() < tol:
            break
    out = torch.sigmoid(log_plan())
    out = (out / out.amax(dim=(-2, -1), keepdim=True)).masked_fill(diagonal, 1.)
    return (out * D ** -0.5).softmax(dim=-1).to(dtype)


def sot_core(variant: str, iters: int = ITERS) -> Callable[..., torch.Tensor]:
    """The function from q, k, v, and `learned_parameters`, to the output that `SOTAttention` of this variant calls."""
    operands, softmax, learned = VARIANTS[variant]
    if learned:
        return lambda q, k, v, *learned: shares_attention(q, k, v, *learned, iters)
    return lambda q, k, v: sot_attention(q, k, v, operands, softmax, 'euclidean', REG, iters, None)


def unfused_core(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """'sot_qk' by way of the weights, as where they pass through a dropout of their own or are looked at."""
    return sot_attention_weights(q, k, 'qk', True, 'euclidean', REG, ITERS, None) @ v


def learned_parameters(variant: str, H: int, device: torch.device) -> Tuple[torch.Tensor, ...]:
    """Leaves that hold what the variant learns, as it starts: nothing, but for 'sot_shares'."""
    if not VARIANTS[variant].learned:
        return ()
    learned = torch.full((H, 1, 1), math.log(REG), device=device), torch.zeros(H, D, 1, device=device)
    return tuple(x.requires_grad_() for x in learned)


def randn(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device) -> torch.Tensor:
    """Normal numbers, the same on every device."""
    return torch.randn(shape).to(device, dtype)


def qkv_inputs(B: int, H: int, N: int, dtype: torch.dtype, device: torch.device) -> Tuple[torch.Tensor, ...]:
    """Leaves q, k, v (B, H, N, D) with the strides that they have out of a fused qkv projection."""
    qkv = randn(B, N, 3, H, D, dtype=dtype, device=device).permute(2, 0, 3, 1, 4)
    return tuple(x.detach().requires_grad_() for x in qkv.unbind(0))


def pass_of(fn: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], grad: torch.Tensor, phase: str):
    """One call of `fn`: its forward pass without autograd, or both passes."""
    def forward():
        with torch.no_grad():
            fn(*inputs)

    def forward_backward():
        torch.autograd.grad(fn(*inputs), inputs, grad, allow_unused=True)  # SOT(Q) has no use for k

    return forward if phase == FORWARD else forward_backward


def core_group(
        B: int,
        H: int,
        N: int,
        phase: str,
        dtype: torch.dtype,
        device: torch.device,
        weight: float,
        variants: Sequence[str],
) -> Group:
    """q, k, v to the output."""
    def build():
        inputs = qkv_inputs(B, H, N, dtype, device)
        grad = randn(B, N, H, D, dtype=dtype, device=device).transpose(1, 2)  # as it comes out of the projection

        def contender(name, fn, learned=(), **kwargs):
            return Contender(name, pass_of(fn, [*inputs, *learned], grad, phase), **kwargs)

        def original(tol):
            return lambda q, k, v: original_weights(q, k, tol=tol) @ v

        def sot(name):
            learned = VARIANTS[name].learned
            path = choose_path(device, dtype, N, D, strips=not learned, reg=None if learned else REG)
            return contender(name, sot_core(name), learned_parameters(name, H, device), path=path)

        saved = 2 * ITERS if phase == TRAIN else 0

        return [
            contender('sdpa', F.scaled_dot_product_attention),
            contender('softmax', eager_softmax),
            *(sot(name) for name in variants if name != 'sot_qkt' or N == D),
            contender('sot_qk unfused', unfused_core, matrices=10 + saved),
            contender('original', original(None), graph=False, matrices=10 + saved),
            contender('original tol=0.1', original(0.1), graph=False, matrices=10 + saved),
        ]
    baseline = 'sdpa' if device.type == 'cuda' else 'softmax'
    return Group('core', f'{shape_name(B, H, N)} {dtype_name(dtype)}', phase, baseline, B * H * N * N, weight, build)


def step_group(names: Sequence[str], amp: bool, device: torch.device, weight: float) -> Group:
    """A training step: forward, loss, backward, AdamW."""
    def build():
        size = timm.get_pretrained_cfg(names[0]).input_size
        images = randn(BATCH, *size, device=device)
        labels = torch.randint(10, (BATCH,)).to(device)
        criterion = LabelSmoothingCrossEntropy(0.1)

        def step_of(model):
            optimizer = torch.optim.AdamW(
                model.parameters(), lr=5e-4, weight_decay=0.03, fused=True, capturable=device.type == 'cuda')

            def step():
                optimizer.zero_grad()
                with torch.autocast('cuda', torch.bfloat16) if amp else nullcontext():
                    loss = criterion(model(images), labels)
                loss.backward()
                optimizer.step()
            return step

        return [Contender(name, step_of(build_model((name, {}), 10, 0).to(device).train())) for name in names]
    case = f'batch {BATCH} {"bfloat16 AMP" if amp else "float32"}'
    return Group('step', case, 'training step', 'cct_2', 0, weight, build)


def sinkhorn_group(B: int, N: int, phase: str, device: torch.device, weight: float) -> Group:
    """Log-kernel to log-plan, 10 iterations."""
    def build():
        cost = torch.cdist(randn(B, N, D, device=device), randn(B, N, D, device=device))
        inputs = ((cost / cost.amax(dim=-1, keepdim=True) / -REG).requires_grad_(),)
        grad = randn(B, N, N, device=device)
        mass = torch.full((B, N), 1 / N, device=device)
        pot = import_pot()

        def pot_batch(log_kernel):
            return pot.bregman_log_projection_batch(
                log_kernel, mass, mass, max_iter=ITERS, tol=0., grad='autodiff')['log_T']

        saved = 2 * ITERS if phase == TRAIN else 0
        return [
            Contender('timm_sot.sinkhorn', pass_of(sinkhorn, inputs, grad, phase)),
            Contender('plain autograd', pass_of(plain_sinkhorn, inputs, grad, phase), matrices=10 + saved),
            Contender('POT', pass_of(pot_batch, inputs, grad, phase) if pot else None, graph=False,
                      matrices=10 + saved, skipped='' if pot else 'not installed: pip install pot'),
        ]
    return Group('sinkhorn', f'{B}x{N}x{N} float32', phase, 'timm_sot.sinkhorn', B * N * N, weight, build)


def points_group(N: int, device: torch.device, weight: float) -> Group:
    """Points to a solution, 10 iterations with squared Euclidean costs: all that flash-sinkhorn solves.

    flash-sinkhorn, in its default TF32, ends with the potentials, ours in float32 with the plan, and ours has to build
    the log-kernel first.
    """
    def build():
        x, y = randn(2, N, D, device=device) / D ** 0.5
        mass = torch.full((N,), 1 / N, device=device)
        flash, missing = None, 'needs CUDA'
        if device.type == 'cuda':
            flash = import_flash_sinkhorn()
            missing = '' if flash else 'not installed: pip install flash-sinkhorn'

        def ours():
            with torch.no_grad():
                sinkhorn(torch.cdist(x, y).square() / -REG)

        def theirs():
            with torch.no_grad():
                flash(x, y, mass, mass, eps=REG, n_iters=ITERS, autotune=False)

        return [
            Contender('timm_sot.sinkhorn', ours),
            Contender('flash-sinkhorn', None if missing else theirs, skipped=missing),
        ]
    return Group('sinkhorn', f'points 1x{N}x{D} float32', FORWARD, 'timm_sot.sinkhorn', N * N, weight, build)


def plain_sinkhorn(log_kernel: torch.Tensor) -> torch.Tensor:
    """`timm_sot.sinkhorn` in plain torch."""
    N, M = log_kernel.shape[-2:]
    v = torch.zeros_like(log_kernel[..., :1, :])
    for _ in range(ITERS):
        u = -math.log(N) - torch.logsumexp(log_kernel + v, dim=-1, keepdim=True)
        v = -math.log(M) - torch.logsumexp(log_kernel + u, dim=-2, keepdim=True)
    return log_kernel + u + v


def import_pot():
    """POT's batched solvers, None where they are missing."""
    for name in ('JAX', 'CUPY', 'TENSORFLOW'):  # they take seconds to load, and GPU memory
        os.environ.setdefault(f'POT_BACKEND_DISABLE_{name}', '1')
    try:
        import ot.batch
    except ImportError:
        return None
    return ot.batch


def import_flash_sinkhorn():
    """flash-sinkhorn's solver with alternating updates, None where it is missing."""
    try:
        from flash_sinkhorn.sinkhorn_solvers import sinkhorn_flashstyle_alternating
    except ImportError:
        return None
    return sinkhorn_flashstyle_alternating


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix('torch.')


def shape_name(B: int, H: int, N: int) -> str:
    return f'{B}x{H}x{N}x{D}'
