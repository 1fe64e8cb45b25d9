""" Memory: what autograd keeps of the attention core, what it needs at its peak, and how long a sequence can get """
import time
from typing import Any, Callable, Dict, Iterator, Sequence, Tuple

import torch
import torch.nn.functional as F

from ..errors import one_line
from .contenders import D, TRAIN, dtype_name, eager_softmax, pass_of, qkv_inputs, randn, shape_name, sot_core
from .timing import release

__all__ = ['memory_rows']

MEMORY_SHAPE = (8, 8, 4096)  # (B, H, N), as are all shapes
SAVED_SHAPE = (1, 2, 1024)
LARGEST = 2 ** 16


def saved_bytes(fn: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor]) -> Tuple[int, int]:
    """Bytes of the storages that autograd keeps for the backward pass of `fn`, with and without those of its inputs."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = fn(*inputs)
    own = {x.untyped_storage().data_ptr() for x in inputs}
    sizes = {pointer: storage.nbytes() for pointer, storage in storages.items()}
    del out
    return sum(sizes.values()), sum(size for pointer, size in sizes.items() if pointer not in own)


def peak_bytes(
        fn: Callable[..., torch.Tensor],
        shape: Tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
) -> int:
    """CUDA memory that forward and backward pass need at their peak, q, k, v, output and gradients included."""
    def run(B, H, N):
        inputs = qkv_inputs(B, H, N, dtype, device)
        grad = randn(B, N, H, D, dtype=dtype, device=device).transpose(1, 2)
        torch.cuda.reset_peak_memory_stats(device)
        pass_of(fn, inputs, grad, TRAIN)()
        torch.cuda.synchronize(device)

    run(1, 2, shape[2])  # workspaces of libraries, which stay; with one head kernels of its own would be compiled
    release(device)
    before = torch.cuda.memory_allocated(device)
    run(*shape)
    return torch.cuda.max_memory_allocated(device) - before


def train_once(qkv: torch.Tensor) -> None:
    """One step of gradient descent through SOT(Q, K) attention, from q, k and v as they come out of a fused projection.
    """
    out = sot_core('sot_qk')(*qkv.permute(2, 0, 3, 1, 4).unbind(0))
    out.float().square().sum().backward()
    with torch.no_grad():
        qkv -= 0.1 * qkv.grad
    if not bool(qkv.isfinite().all()):
        raise FloatingPointError('the step gave values that are not finite')


def memory_rows(dtype: torch.dtype, device: torch.device) -> Iterator[Dict[str, Any]]:
    """What autograd keeps; on CUDA also the peak and the most tokens that can be trained."""
    def row(case, contender, measure):
        head = {'section': 'memory', 'case': case, 'phase': '', 'baseline': '', 'contender': contender}
        try:
            return {**head, **measure()}
        except Exception as e:  # out of memory too
            return {**head, 'error': one_line(e)}
        finally:
            release(device)

    def saved(iters):
        total, beyond = saved_bytes(sot_core('sot_qk', iters), qkv_inputs(*SAVED_SHAPE, dtype, device))
        return {'bytes': total, 'bytes_beyond_inputs': beyond}

    case = f'saved for backward {shape_name(*SAVED_SHAPE)} {dtype_name(dtype)}'
    for iters in (1, 100):
        yield row(case, f'sot_qk iters={iters}', lambda: saved(iters))
    if device.type != 'cuda':
        return

    case = f'peak {shape_name(*MEMORY_SHAPE)} {dtype_name(dtype)}'
    for name, fn in (
            ('sdpa', F.scaled_dot_product_attention), ('softmax', eager_softmax), ('sot_qk', sot_core('sot_qk'))):
        yield row(case, name, lambda: {'bytes': peak_bytes(fn, MEMORY_SHAPE, dtype, device)})

    def step(N):
        torch.cuda.reset_peak_memory_stats(device)
        qkv = randn(1, N, 3, 2, D, dtype=dtype, device=device).requires_grad_()
        for _ in range(2):  # the first compiles
            qkv.grad = None
            torch.cuda.synchronize(device)
            start = time.perf_counter()
            train_once(qkv)  # which waits for its own end
        return {'N': N, 'seconds': time.perf_counter() - start, 'bytes': torch.cuda.max_memory_allocated(device)}

    N = 4096
    while N <= LARGEST:
        result = row(f'one step 1x2xNx{D} {dtype_name(dtype)}', f'sot_qk N={N}', lambda: step(N))
        yield result
        if 'error' in result:
            return
        N *= 2
