""" SOT attention as one operator, and the choice of what computes it

`torch.ops.timm_sot.sot_attention` is opaque to torch.compile, torch.export and their fake tensors; so is its backward,
an operator of its own. The modules that implement them are imported when they are first used, for Triton and numba are
not everywhere.
"""
import functools
import importlib
import importlib.util
from types import ModuleType
from typing import Optional, Tuple

import torch

from . import cpu
from .operands import LEAST_REG, empty_gradients, empty_heads
from .operators import check_one_device, differentiate, operator, refuse_second_derivative, register_fake
from .threads import loops_work

__all__ = ['choose_path', 'fused_sot_attention']

HAS_TRITON = torch.version.cuda is not None and importlib.util.find_spec('triton') is not None

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ONCHIP_MAX_TOKENS = 128  # above, an N x N matrix in float32 no longer fits into the registers of one program
STRIPS_MAX_TOKENS = 256  # above, nor do all keys and values into its memory, nor a strip's rows into its registers
STRIPS_MAX_WIDTH = 64
TRITON_MAX_WIDTH = 128  # above, nor do the queries, keys and values of a tile

# Shared memory that a Triton program takes in the backward pass, the larger of the two, at most: bytes for each of its
# rows x width, where these are 64 or 128, as compiled for Ampere. For Hopper float32 takes up to 28, which its 227 KiB
# hold (tests/test_kernels_compile.py). What is smaller fits into the least that a supported GPU has.
FLOAT32_BYTES, HALF_BYTES = 24, 10
# All that `strips` takes, for its most tokens and width. It is more than Ampere has, for which the kernels of the
# gradients do not fit into the registers.
STRIPS_BYTES = 168 * 1024
LEAST_SHARED_MEMORY = 99 * 1024


@torch.compiler.assume_constant_result  # compilers do not look inside
def cpu_works() -> bool:
    """Whether this process can run the fused loops for the CPU."""
    return loops_work()


@torch.compiler.assume_constant_result
def triton_memory(device: torch.device) -> int:
    """Bytes of shared memory that a Triton program may take on a GPU, 0 where our programs do not run."""
    if not HAS_TRITON or not torch.cuda.is_available():
        return 0
    properties = torch.cuda.get_device_properties(device)
    if properties.major < 8:  # Triton's tensor cores begin with Ampere
        return 0
    return getattr(properties, 'shared_memory_per_block_optin', LEAST_SHARED_MEMORY)  # unknown to older torch


def choose_path(
        device: torch.device,
        dtype: torch.dtype,
        tokens: int,
        head_width: int,
        tol: Optional[float] = None,
        strips: bool = True,
        reg: Optional[float] = None,
) -> str:
    """What computes SOT attention: the one rule.

    Args:
        device: Device of the queries, keys and values.
        dtype: Their dtype.
        tokens: Number of tokens.
        head_width: Width of a head.
        tol: Early stop of the iterations, which couples the images of a batch; on a GPU the host would wait for it.
        strips: Whether there are kernels of this attention that go through its matrices in strips of rows.
        reg: Entropy regularization, where it is fixed.

    Returns:
        'onchip', 'strips' or 'streamed' for the Triton kernels, 'cpu' for the fused loops, 'eager' for plain torch.
    """
    if dtype not in DTYPES or (tol is not None and device.type != 'cpu') or (reg is not None and reg < LEAST_REG):
        return 'eager'
    if device.type == 'cuda':
        memory = triton_memory(device)
        row = (FLOAT32_BYTES if dtype == torch.float32 else HALF_BYTES) * (64 if head_width <= 64 else 128)
        if head_width <= TRITON_MAX_WIDTH and 64 * row <= memory:
            if tokens <= ONCHIP_MAX_TOKENS and (64 if tokens <= 64 else 128) * row <= memory:
                return 'onchip'
            # the comparisons of tokens, which may be symbolic, by themselves in an if: Dynamo of torch 2.11 needs it
            if strips and dtype != torch.float32 and head_width <= STRIPS_MAX_WIDTH and STRIPS_BYTES <= memory:
                if ONCHIP_MAX_TOKENS < tokens <= STRIPS_MAX_TOKENS:
                    return 'strips'
            return 'streamed'
    elif device.type == 'cpu':
        if cpu_works() and tokens <= cpu.MAX_TOKENS:
            return 'cpu'
    return 'eager'


@functools.lru_cache(maxsize=None)
def _implementation(path: str) -> ModuleType:
    return importlib.import_module(f'{__package__}.{path}')


def fused_sot_attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        operands: str,
        softmax: bool,
        reg: float,
        iters: int,
        scale: float,
        dropout_p: float,
        distance: str,
        path: str,
        tol: Optional[float] = None,
) -> torch.Tensor:
    """Output of SOT attention, (B, H, N, D) each, by the implementation `path`.

    Args:
        q: Queries.
        k: Keys.
        v: Values; the queries and keys are taken in their dtype.
        operands: What is matched, see :class:`timm_sot.attention.Variant`.
        softmax: Whether a softmax over the keys follows.
        reg: Entropy regularization.
        iters: Number of Sinkhorn iterations; with `tol` the most that run.
        scale: Factor on the SOT matrix.
        dropout_p: Dropout probability of the attention weights. The mask is a function of one number that torch's
            generator of the device draws, so that it follows torch.manual_seed and checkpointing without a host in
            between.
        distance: 'euclidean' or 'cosine'.
        path: As `choose_path` returns it, but not 'eager'.
        tol: Early stop, for the path 'cpu': see `self_optimal_transport`.
    """
    q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast a norm of the queries and keys widens them, but not the values
    if tol is not None:
        iters = cpu.count_iterations(q, k, operands, reg, iters, tol, distance)
    seed = torch.randint(2 ** 62, (), device=q.device) if dropout_p > 0. else None
    out, _ = sot_attention(q, k, v, operands, softmax, reg, iters, scale, dropout_p, seed, distance, path)
    return out


@operator
def sot_attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        operands: str,
        softmax: bool,
        reg: float,
        iters: int,
        scale: float,
        dropout_p: float,
        seed: Optional[torch.Tensor],
        distance: str,
        path: str,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """The output, and what the backward pass needs."""
    with torch.cuda.device_of(q):  # Triton launches on the current GPU
        return _implementation(path).sot_attention_forward(
            q, k, v, operands, softmax, reg, iters, scale, dropout_p, seed, distance)


@register_fake(sot_attention)
def _fake_forward(q, k, v, operands, softmax, reg, iters, scale, dropout_p, seed, distance, path):
    check_one_device(q, k, v)
    return empty_heads(q), _implementation(path).empty_saved(q, iters)


@operator
def sot_attention_backward(
        grad_out: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        saved: torch.Tensor,
        operands: str,
        softmax: bool,
        reg: float,
        iters: int,
        scale: float,
        dropout_p: float,
        seed: Optional[torch.Tensor],
        distance: str,
        path: str,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients for q, k and v, in their dtype."""
    with torch.cuda.device_of(q):
        return _implementation(path).sot_attention_backward(
            grad_out, q, k, v, saved, operands, softmax, reg, iters, scale, dropout_p, seed, distance)


@register_fake(sot_attention_backward)
def _fake_backward(grad_out, q, k, v, saved, operands, softmax, reg, iters, scale, dropout_p, seed, distance, path):
    check_one_device(grad_out, q, k, v, saved)
    return empty_gradients(q, operands)


def _setup_context(ctx, inputs, output):
    q, k, v, *settings = inputs
    *ctx.before, seed, ctx.distance, ctx.path = settings
    _, saved = output
    ctx.save_for_backward(q, k, v, saved, seed)
    ctx.mark_non_differentiable(saved)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_out, _):
    if grad_out is None:  # what came after has none
        return (None,) * 12
    q, k, v, saved, seed = ctx.saved_tensors
    grad_q, grad_k, grad_v = sot_attention_backward(
        grad_out, q, k, v, saved, *ctx.before, seed, ctx.distance, ctx.path)
    no_keys = ctx.before[0] == 'q'
    return grad_q, None if no_keys else grad_k, grad_v, *[None] * 9


differentiate(sot_attention, _differentiate, _setup_context)
differentiate(sot_attention_backward, refuse_second_derivative)
