""" What SOT attention costs, beside softmax attention and the form of the original experiments

Everything is timed in one run and interleaved: in each round every contender of a group runs once, so that whatever
else the machine does hits all of them; a ratio is the median of the ratios in the rounds. On CUDA each contender is
timed twice, as called from Python (`call`) and as the replay of a CUDA graph, from which the launch overhead is gone
(`graph`).
"""
import gc
import importlib.metadata
import json
import math
import os
import platform
import statistics
import time
from contextlib import nullcontext, suppress
from datetime import datetime, timezone
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import timm
import torch
import torch.nn.functional as F
from timm.loss import LabelSmoothingCrossEntropy

from .attention import VARIANTS, sot_attention, sot_attention_weights
from .kernels.fused import choose_path
from .solver import sinkhorn
from .errors import UserError, missing_extra
from .study.runner import build_model, commit, versions

__all__ = ['SECTIONS', 'bar_table', 'format_tables', 'load_reports', 'run_bench', 'write_report']

SECTIONS = ('core', 'step', 'memory', 'sinkhorn')
FORWARD, TRAIN = 'forward', 'forward+backward'
REG, ITERS = 0.1, 10
D = 64  # head width

# (B, H, N) of the attention core; about as many matrix entries in each, more where N alone is large
CORE_SHAPES = {
    'cpu': ((128, 2, 64), (16, 2, 196), (8, 2, 256), (1, 1, 1024), (1, 1, 4096)),
    'cuda': ((1024, 2, 64), (64, 2, 256), (8, 2, 1024), (1, 8, 4096), (128, 2, 196)),
}
SINKHORN_SHAPES = {'cpu': ((256, 64), (1, 1024)), 'cuda': ((2048, 64), (8, 1024))}
MEMORY_SHAPE = (8, 8, 4096)
SAVED_SHAPE = (1, 2, 1024)
LARGEST = 2 ** 16
BATCH = 128

SECONDS, QUICK_SECONDS = 110., 4.  # of timing; warm-up and compilation come on top
TIME_LIMIT = 200.  # seconds after which no further group is begun
ROUNDS, QUICK_ROUNDS = (3, 50), (2, 5)  # fewest and most of a group
SLOWEST_CALL = 3.  # seconds: what is predicted to take longer is skipped


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


# What is compared

def eager_softmax(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(Q K^T d^-1/2) V in plain torch."""
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1) @ v


def original_weights(
        q: torch.Tensor,
        k: torch.Tensor,
        reg: float = REG,
        iters: int = ITERS,
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
        return (u.unsqueeze(-1) + v.unsqueeze(-2) - cost) / reg

    for _ in range(iters):
        u_prev = u
        u = reg * (log_mass - torch.logsumexp(log_plan(), dim=-1)) + u
        v = reg * (log_mass - torch.logsumexp(log_plan(), dim=-2)) + v
        if tol is not None and (u - u_prev).abs().sum(dim=-1).mean().item() < tol:
            break
    out = torch.sigmoid(log_plan())
    out = (out / out.amax(dim=(-2, -1), keepdim=True)).masked_fill(diagonal, 1.)
    return (out * D ** -0.5).softmax(dim=-1).to(dtype)


def sot_core(variant: str, iters: int = ITERS) -> Callable[..., torch.Tensor]:
    """The function from q, k, v to the output that `SOTAttention` of this variant calls."""
    operands, softmax = VARIANTS[variant]
    return lambda q, k, v: sot_attention(q, k, v, operands, softmax, 'euclidean', REG, iters, None)


def unfused_core(variant: str, iters: int = ITERS) -> Callable[..., torch.Tensor]:
    """The same by way of the weights, as where they pass through a dropout of their own or are looked at."""
    operands, softmax = VARIANTS[variant]
    return lambda q, k, v: sot_attention_weights(q, k, operands, softmax, 'euclidean', REG, iters, None) @ v


def randn(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device) -> torch.Tensor:
    """Normal numbers. From the CPU's generator: CUDA's is of no use after a graph that could not be captured."""
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

        def contender(name, fn, **kwargs):
            return Contender(name, pass_of(fn, inputs, grad, phase), **kwargs)

        def original(tol):
            return lambda q, k, v: original_weights(q, k, tol=tol) @ v

        saved = 2 * ITERS if phase == TRAIN else 0
        path = choose_path(device, dtype, N, D)
        return [
            contender('sdpa', F.scaled_dot_product_attention),
            contender('softmax', eager_softmax),
            *(contender(name, sot_core(name), path=path) for name in variants if name != 'sot_qkt' or N == D),
            contender('sot_qk unfused', unfused_core('sot_qk'), matrices=10 + saved),
            contender('original', original(None), graph=False, matrices=10 + saved),
            contender('original tol=0.1', original(0.1), graph=False, matrices=10 + saved),
        ]
    baseline = 'sdpa' if device.type == 'cuda' else 'softmax'
    return Group('core', f'{B}x{H}x{N}x{D} {dtype_name(dtype)}', phase, baseline, B * H * N * N, weight, build)


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
        flash, missing = import_flash_sinkhorn(), ''
        if device.type != 'cuda':
            missing = 'needs CUDA'
        elif flash is None:
            missing = 'not installed: pip install flash-sinkhorn'

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


# How it is timed

class Lane(NamedTuple):
    """One thing that every round times."""
    name: str
    kind: str  # 'call' or 'graph'
    call: Callable[[], Any]
    calls: int  # in a row, to a sample
    samples: List[float]


def clock(call: Callable[[], Any], calls: int, device: torch.device) -> float:
    """Milliseconds of one of `calls` calls in a row."""
    if device.type == 'cuda':
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / calls
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) * 1e3 / calls


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """The replay of `call` as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def time_interleaved(
        contenders: Sequence[Contender],
        device: torch.device,
        seconds: float,
        rounds: Tuple[int, int] = ROUNDS,
) -> Dict[str, Dict[str, Any]]:
    """Time the contenders in turns until `seconds` are over, in no fewer and no more rounds than `rounds`.

    Returns:
        By contender `call` and, on CUDA, `graph`, see `summary`; `first_s`, what the first call took in seconds, with
        what was compiled for it; or in place of these `skipped` or `error`, the reason.
    """
    results: Dict[str, Dict[str, Any]] = {}
    lanes: List[Lane] = []
    for contender in contenders:
        name, call = contender.name, contender.call
        result = results[name] = {'path': contender.path} if contender.path else {}
        if contender.skipped:
            result['skipped'] = contender.skipped
            continue
        try:
            result['first_s'] = clock(call, 1, device) / 1e3
            long = result['first_s'] if device.type == 'cpu' else 0.  # on CUDA it was long for its compilation
            if long > 2 * SLOWEST_CALL:
                long = clock(call, 1, device) / 1e3  # so it may have been here: numba compiles once per machine
            if long > 2 * SLOWEST_CALL:
                result['skipped'] = f'{long:.1f} s a call'
                continue
            # a long call needs no second one to be warm
            lanes.append(Lane(name, 'call', call, 1 if long > 0.1 else calls_of(call, device), []))
        except Exception as e:  # whatever it is, the others are still to be timed
            result['error'] = one_line(e)
            continue
        if device.type == 'cuda' and contender.graph:
            try:
                replay = captured(call)
                lanes.append(Lane(name, 'graph', replay, calls_of(replay, device), []))
            except Exception as e:
                result['graph_error'] = one_line(e)

    end = time.perf_counter() + seconds
    for turn in range(rounds[1]):
        for lane in lanes:
            if 'error' not in results[lane.name]:
                try:
                    lane.samples.append(clock(lane.call, lane.calls, device))
                except Exception as e:
                    results[lane.name]['error'] = one_line(e)
        if turn + 1 >= rounds[0] and time.perf_counter() > end:
            break
    for lane in lanes:
        if 'error' not in results[lane.name]:
            results[lane.name][lane.kind] = {'calls': lane.calls, **summary(lane.samples)}
    return results


def calls_of(call: Callable[[], Any], device: torch.device, sample_ms: float = 2.) -> int:
    """How many calls make a sample long enough for the clock; measured on a call, which warms up as well."""
    return min(100, max(1, math.ceil(sample_ms / max(clock(call, 1, device), 1e-3))))


def summary(samples: Sequence[float]) -> Dict[str, Any]:
    """Median, first and third quartile, in milliseconds, of the samples, which come with them."""
    q25, median, q75 = quartiles(samples)
    return {'median_ms': median, 'q25_ms': q25, 'q75_ms': q75, 'samples_ms': [*samples]}


def quartiles(samples: Sequence[float]) -> List[float]:
    return statistics.quantiles(samples, n=4, method='inclusive') if len(samples) > 1 else [*samples] * 3


def one_line(error: BaseException) -> str:
    return f'{type(error).__name__}: {(str(error).splitlines() or [""])[0]}'[:200]


def reason_to_skip(
        contender: Contender,
        group: Group,
        rates: Dict[Tuple[str, ...], float],
        device: torch.device,
) -> str:
    """Why a call would take too long or too much memory, judged by its time per element in smaller groups."""
    seconds = rates.get((group.section, group.phase, contender.name), 0.) * group.elements
    if seconds > SLOWEST_CALL:
        return f'about {seconds:.1f} s a call'
    needed, free = contender.matrices * group.elements * 4, free_memory(device)
    if free is not None and needed > free / 2:
        return f'about {gib(needed)}, {gib(free)} free'
    return ''


def free_memory(device: torch.device) -> Optional[int]:
    """Free bytes, None where they cannot be told."""
    if device.type == 'cuda':
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open('/proc/meminfo') as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith('MemAvailable'))
    except (OSError, StopIteration):
        return None


def release(device: torch.device) -> None:
    """Give back what the last group held."""
    gc.collect()
    if device.type == 'cuda':
        with suppress(RuntimeError):  # of a kernel that failed, and whose row says so
            torch.cuda.empty_cache()


def time_group(
        group: Group,
        device: torch.device,
        seconds: float,
        rounds: Tuple[int, int],
        rates: Dict[Tuple[str, ...], float],
        late: bool = False,
) -> List[Dict[str, Any]]:
    """The rows of a group; what they tell of the time per element is added to `rates`. Nothing is timed if `late`."""
    head = {'section': group.section, 'case': group.case, 'phase': group.phase, 'baseline': group.baseline}
    if late:
        return [{**head, 'contender': 'all', 'skipped': f'{TIME_LIMIT:.0f} s are over: try --only {group.section}'}]
    try:
        contenders = [
            c if c.skipped else c._replace(skipped=reason_to_skip(c, group, rates, device)) for c in group.build()]
        results = time_interleaved(contenders, device, seconds, rounds)
    except Exception as e:
        return [{**head, 'contender': 'all', 'error': one_line(e)}]
    for name, result in results.items():
        if 'call' in result and group.elements:
            rates[group.section, group.phase, name] = result['call']['median_ms'] / 1e3 / group.elements
    return [{**head, 'contender': name, **result} for name, result in results.items()]


# Memory

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

    run(1, 1, shape[2])  # workspaces of libraries, which stay
    release(device)
    before = torch.cuda.memory_allocated(device)
    run(*shape)
    return torch.cuda.max_memory_allocated(device) - before


def train_once(N: int, dtype: torch.dtype, device: torch.device) -> None:
    """One step of gradient descent through SOT(Q, K) attention of N tokens."""
    qkv = randn(1, N, 3, 1, D, dtype=dtype, device=device).requires_grad_()
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
        start = time.perf_counter()
        train_once(N, dtype, device)
        return {'N': N, 'seconds': time.perf_counter() - start, 'bytes': torch.cuda.max_memory_allocated(device)}

    N = 4096
    while N <= LARGEST:
        result = row(f'one step 1x1xNx{D} {dtype_name(dtype)}', f'sot_qk N={N}', lambda: step(N))
        yield result
        if 'error' in result:
            return
        N *= 2


# The run

def groups_of(sections: Sequence[str], dtype: torch.dtype, device: torch.device, quick: bool) -> List[Group]:
    """What is timed, in an order that begins with what the bars need, for time may run out."""
    cuda = device.type == 'cuda'
    core, steps, sinkhorns = [], [], []
    if 'core' in sections:
        variants = [name for name in VARIANTS if name != 'softmax']
        for i, (B, H, N) in enumerate(CORE_SHAPES[device.type]):
            if quick and N not in (64, 196):
                continue
            few = quick and N != 64 or not cuda and N == 4096
            for phase in (TRAIN, FORWARD):
                weight = (2. if phase == TRAIN else 1.) * (1. if i else 3.)
                core.append(core_group(B, H, N, phase, dtype, device, weight, ['sot_qk'] if few else variants))
    if 'step' in sections:
        few = ['cct_2', 'cct_2_sot_qk']
        steps.append(step_group(few if quick else timm.list_models('cct_2*', module='cct'), cuda, device, 6.))
        if cuda and not quick:
            steps.append(step_group(few, False, device, 2.))
    if 'sinkhorn' in sections:
        for B, N in SINKHORN_SHAPES[device.type][:1 if quick else None]:
            sinkhorns += [sinkhorn_group(B, N, phase, device, 1.) for phase in (TRAIN, FORWARD)]
        if not quick:
            sinkhorns.append(points_group(4096 if cuda else 1024, device, 1.))
    return [*core[:1], *steps[:1], *sinkhorns, *core[1:], *steps[1:]]


def run_bench(
        device: torch.device,
        dtype: Optional[torch.dtype] = None,
        quick: bool = False,
        sections: Sequence[str] = SECTIONS,
        on_progress: Callable[[Dict[str, Any]], None] = lambda report: None,
) -> Dict[str, Any]:
    """Time and weigh everything in `sections`.

    Args:
        device: A CPU or a CUDA device.
        dtype: Of the attention core; None for float32 on a CPU, bfloat16 on CUDA.
        quick: Fewer shapes and rounds, to see that it works.
        sections: Some of `SECTIONS`.
        on_progress: Called with the report so far whenever there is more of it.

    Returns:
        A report, ready for JSON: `about` (device, versions, ...), `rows` (everything measured), `bars`.
    """
    if device.type not in CORE_SHAPES:
        raise UserError(f'timm-sot bench times cpu and cuda, not {device.type!r}.')
    if device.type == 'cuda':
        device = torch.device('cuda', torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    dtype = dtype or (torch.bfloat16 if device.type == 'cuda' else torch.float32)
    try:
        from tqdm import tqdm
    except ImportError as e:
        raise missing_extra(e, 'bench') from e

    start = time.perf_counter()
    torch.manual_seed(0)
    report = {'about': {**about(device), 'dtype': dtype_name(dtype), 'quick': quick}, 'rows': [], 'bars': []}
    groups = groups_of(sections, dtype, device, quick)
    seconds = QUICK_SECONDS if quick else SECONDS
    total = sum(group.weight for group in groups)
    turns: List[Optional[Group]] = [*groups]
    if 'memory' in sections:
        turns.insert(2, None)  # after the two groups that the bars need, which need it as well
    rates: Dict[Tuple[str, ...], float] = {}

    def add(rows):
        report['rows'] += rows
        report['bars'] = bar_rows([report])
        report['about']['seconds'] = round(time.perf_counter() - start, 1)
        on_progress(report)

    with tqdm(total=len(turns), unit='group') as bar:
        for group in turns:
            if group is None:
                bar.set_description('memory')
                for row in memory_rows(dtype, device):
                    add([row])
            else:
                bar.set_description(f'{group.section} {group.case} {group.phase}')
                late = time.perf_counter() - start > TIME_LIMIT
                add(time_group(
                    group, device, seconds * group.weight / total, QUICK_ROUNDS if quick else ROUNDS, rates, late))
                release(device)
            bar.update()
    return report


def about(device: torch.device) -> Dict[str, Any]:
    """What the numbers depend on."""
    packages = {}
    for name in ('triton', 'numba', 'pot', 'flash-sinkhorn'):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = None
    return {
        'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else cpu_name(),
        'device_type': device.type,
        'threads': torch.get_num_threads(),
        'cores': os.cpu_count(),
        'load': os.getloadavg()[0] if hasattr(os, 'getloadavg') else None,
        'matmul_precision': torch.get_float32_matmul_precision(),
        'versions': {**versions(), **packages},
        'commit': commit(),
        'date': datetime.now(timezone.utc).isoformat(timespec='seconds'),
    }


def cpu_name() -> str:
    """The processor as its maker calls it, where the system tells."""
    try:
        with open('/proc/cpuinfo') as f:
            return next(line.split(':', 1)[1].strip() for line in f if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix('torch.')


def shape_name(B: int, H: int, N: int) -> str:
    return f'{B}x{H}x{N}x{D}'


def gib(size: float) -> str:
    return f'{size / 2 ** 30:.1f} GiB'


def write_report(report: Dict[str, Any], path: str) -> None:
    """Write the report as JSON, leaving an older file in place until it is complete."""
    with open(f'{path}.part', 'w') as f:
        json.dump(report, f, indent=1)
    os.replace(f'{path}.part', path)


def load_reports(paths: Sequence[str]) -> List[Dict[str, Any]]:
    """Read what `write_report` wrote."""
    reports = []
    for path in paths:
        try:
            with open(path) as f:
                report = json.load(f)
            bar_table([report])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(f'{path} is not a report of timm-sot bench --json: {one_line(e)}') from e
        reports.append(report)
    return reports


# Tables

class Bar(NamedTuple):
    """A bar to clear; `measure` finds its values in a report, of which the worst counts."""
    what: str
    on: str  # device type, '' for any
    bar: str
    aim: str
    limit: float
    at_least: bool
    unit: str
    measure: Callable[[Dict[str, Any]], List['Measured']]


class Measured(NamedTuple):
    """A value, and how it was got where there is more than one way."""
    value: float
    how: str = ''
    spread: str = ''


def find(report: Dict[str, Any], section: str, case: str, contender: str, phase: str = '') -> Dict[str, Any]:
    """The row, an empty one where there is none."""
    return next((
        row for row in report['rows']
        if (row['section'], row['case'], row['contender'], row['phase']) == (section, case, contender, phase)), {})


def ratio_of(times: Dict[str, Any], base: Dict[str, Any]) -> Tuple[float, float, float, int]:
    """Quartiles of the ratios in the rounds, and how many these are."""
    ratios = [a / b for a, b in zip(times['samples_ms'], base['samples_ms'])]
    return (*quartiles(ratios), len(ratios))


def times_ratio(section: str, case: str, phase: str, contender: str, baseline: str):
    """Time of the contender over that of the baseline, called and as a graph."""
    def measure(report):
        one, other = (find(report, section, case, name, phase) for name in (contender, baseline))
        values = []
        for kind in ('call', 'graph'):
            if kind in one and kind in other:
                q25, median, q75, n = ratio_of(one[kind], other[kind])
                values.append(Measured(median, kind, f'{q25:.2f}-{q75:.2f}, n = {n}'))
        return values
    return measure


def bytes_ratio(case: str, contender: str, baseline: str):
    """The same of bytes; `case` is how the row's begins, the dtype follows."""
    def measure(report):
        cases = {row['case'] for row in report['rows'] if row['case'].startswith(case)}
        rows = [[find(report, 'memory', full, name) for name in (contender, baseline)] for full in cases]
        return [Measured(one['bytes'] / other['bytes']) for one, other in rows if 'bytes' in one and other.get('bytes')]
    return measure


def largest_trained(report: Dict[str, Any]) -> List[Measured]:
    """Tokens of the longest sequence that was trained."""
    trained = [row['N'] for row in report['rows'] if 'N' in row]
    return [Measured(max(trained))] if trained else []


CPU_CORE, CUDA_CORE = '128x2x64x64 float32', '1024x2x64x64 bfloat16'
BARS = (
    Bar(f'attention core {TRAIN}, sot_qk, {CPU_CORE}, against eager softmax', 'cpu', '<= 2.0x', '1.3x', 2., False, 'x',
        times_ratio('core', CPU_CORE, TRAIN, 'sot_qk', 'softmax')),
    Bar('the same against the original form at 10 iterations', 'cpu', '>= 10x faster', '20x', 10., True, 'x faster',
        times_ratio('core', CPU_CORE, TRAIN, 'original', 'sot_qk')),
    Bar('training step of cct_2_sot_qk against cct_2, batch 128', 'cpu', '<= 1.10x', '1.03x', 1.10, False, 'x',
        times_ratio('step', f'batch {BATCH} float32', 'training step', 'cct_2_sot_qk', 'cct_2')),
    Bar('bytes saved for backward at N = 1024, 100 iterations against 1', '', '<= 1.25x', '1.1x', 1.25, False, 'x',
        bytes_ratio('saved for backward', 'sot_qk iters=100', 'sot_qk iters=1')),
    Bar(f'attention core {TRAIN}, sot_qk, {CUDA_CORE}, against SDPA', 'cuda', '<= 1.5x', '1.1x', 1.5, False, 'x',
        times_ratio('core', CUDA_CORE, TRAIN, 'sot_qk', 'sdpa')),
    Bar('training step of cct_2_sot_qk under AMP against cct_2', 'cuda', '<= 1.05x', '1.0x', 1.05, False, 'x',
        times_ratio('step', f'batch {BATCH} bfloat16 AMP', 'training step', 'cct_2_sot_qk', 'cct_2')),
    Bar('N = 4096, 8 heads, batch 8: peak memory against SDPA', 'cuda', '<= 2x', '1.2x', 2., False, 'x',
        bytes_ratio('peak', 'sot_qk', 'sdpa')),
    Bar('largest N trained on one GPU with sot_qk', 'cuda', '16,384', '65,536', 16384, True, '', largest_trained),
)


def bar_rows(reports: Sequence[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """Each bar with what the first report that measured it says: `values`, and `state` met, not met or not measured."""
    rows = []
    for bar in BARS:
        measured = ((report, bar.measure(report)) for report in reports
                    if bar.on in ('', report['about']['device_type']))
        report, values = next(((report, values) for report, values in measured if values), (None, []))
        row = {'what': bar.what, 'on': bar.on.upper() or 'any', 'bar': bar.bar, 'aim': bar.aim}
        row['values'] = {how: value for value, how, _ in values}
        if values:
            worst = (min if bar.at_least else max)(row['values'].values())
            met = worst >= bar.limit if bar.at_least else worst <= bar.limit
            row.update(on=report['about']['device'], state='met' if met else 'not met', measured=', '.join(
                (f'{value:.2f}{bar.unit}' if bar.unit else f'{value:,}')
                + (f' {how}' if len(values) > 1 else '') + (f' ({spread})' if spread else '')
                for value, how, spread in values))
        else:
            row.update(state='not measured', measured='')
        rows.append(row)
    return rows


def bar_table(reports: Sequence[Dict[str, Any]], markdown: bool = False) -> str:
    """The bars and whether they are met, with what the numbers were got on under them."""
    head = ('what', 'on', 'bar', 'aim', 'measured', '')
    cells = [
        (row['what'], row['on'], row['bar'], row['aim'], row['measured'], row['state']) for row in bar_rows(reports)]
    if markdown:
        lines = [f'| {" | ".join(line)} |' for line in (head, ('---',) * len(head), *cells)]
    else:
        lines = aligned([head, *cells])
    return '\n'.join([*lines, '', *(describe(report) for report in reports)])


def describe(report: Dict[str, Any]) -> str:
    """Where a report comes from, and whether it was a good place."""
    about = report['about']
    parts = [about['device'], f'{about["threads"]} of {about["cores"]} CPU threads']
    if about['load'] is not None:
        parts.append(f'load {about["load"]:.1f} at the start')
    parts += [f'{name} {version}' for name, version in about['versions'].items() if version]
    parts += [f'commit {about["commit"]}'] if about['commit'] else []
    parts += [about['date'][:10], '--quick'] if about['quick'] else [about['date'][:10]]
    line = ', '.join(parts)
    if about['load'] is not None and about['load'] > about['cores'] / 2:
        line += '\nThe processor was busy with something else: times, and ratios too, differ on an idle one.'
    return line


def format_tables(report: Dict[str, Any]) -> str:
    """Times with their ratios, and memory."""
    lines = ['Milliseconds: median (first to third quartile) of n interleaved rounds; ratio: median over rounds.', '']
    for section, case in dict.fromkeys((row['section'], row['case']) for row in report['rows']):
        rows = [row for row in report['rows'] if (row['section'], row['case']) == (section, case)]
        if section == 'memory':
            continue
        phases = sorted({row['phase'] for row in rows})
        names = dict.fromkeys(row['contender'] for row in rows)
        kinds = [kind for kind in ('call', 'graph') if any(kind in row for row in rows)] or ['call']
        table = [[f'{section} {case}']]
        for phase in phases:
            timed = [row['call']['samples_ms'] for row in rows if row['phase'] == phase and 'call' in row]
            n = max(map(len, timed), default=0)
            for kind in kinds:
                table[0] += [f'{phase}, n = {n}' if kind == 'call' else 'as CUDA graph', 'ratio']
        for name in names:
            path = next((row['path'] for row in rows if row['contender'] == name and 'path' in row), '')
            line = [f'{name} [{path}]' if path else name]
            for phase in phases:
                row = find(report, section, case, name, phase)
                base = find(report, section, case, row.get('baseline', ''), phase)
                for kind in kinds:
                    line += time_cells(row, base, kind)
            table.append(line)
        lines += [*aligned(table), *reasons(rows), '']
    weighed = [row for row in report['rows'] if row['section'] == 'memory']
    if weighed:
        lines += aligned([['memory', '', 'MiB']] + [
            [row['case'], row['contender'], f'{row["bytes"] / 2 ** 20:,.1f}' if 'bytes' in row else 'error']
            for row in weighed])
        lines += reasons(weighed)
    return '\n'.join(lines).rstrip()


def reasons(rows: Sequence[Dict[str, Any]]) -> List[str]:
    """Why there is nothing in some cells of a table."""
    return [
        f'  {why.replace("_", " ")}: {row["contender"]} {row["phase"]}: {row[why]}'
        for row in rows for why in ('skipped', 'error', 'graph_error') if why in row]


def time_cells(row: Dict[str, Any], base: Dict[str, Any], kind: str) -> Tuple[str, str]:
    """Time and ratio as they stand in a table."""
    if kind not in row:
        missing = ('skipped', 'error') if kind == 'call' else ('graph_error',)
        return next((why.replace('graph_', '') for why in missing if why in row), ''), ''
    times = row[kind]
    ratio = f'{ratio_of(times, base[kind])[1]:.2f}' if kind in base else ''
    median, q25, q75 = (
        f'{times[key]:.3g}' if times[key] < 1000 else f'{times[key]:.0f}' for key in ('median_ms', 'q25_ms', 'q75_ms'))
    return f'{median} ({q25}-{q75})', ratio


def aligned(table: Sequence[Sequence[str]]) -> List[str]:
    """The lines of a table whose columns have one width each."""
    widths = [max(map(len, column)) for column in zip(*table)]
    return ['  '.join(f'{cell:{width}}' for cell, width in zip(line, widths)).rstrip() for line in table]
