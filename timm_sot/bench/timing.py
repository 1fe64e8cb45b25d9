""" Timing in turns

Everything is timed in one run and interleaved: in each round every contender of a group runs once, so that whatever
else the machine does hits all of them; a ratio is the median of the ratios in the rounds. On CUDA each contender is
timed twice, as called from Python (`call`) and as the replay of a CUDA graph, from which the launch overhead is gone
(`graph`).
"""
import gc
import math
import statistics
import time
from contextlib import suppress
from typing import Any, Callable, Dict, List, NamedTuple, Sequence, Tuple

import torch

from .. import machine
from ..errors import one_line
from .contenders import Contender, Group

__all__ = ['QUICK_ROUNDS', 'ROUNDS', 'TIME_LIMIT', 'quartiles', 'release', 'time_group']

TIME_LIMIT = 200.  # seconds after which no further group is begun
ROUNDS, QUICK_ROUNDS = (3, 50), (2, 5)  # fewest and most of a group
SLOWEST_CALL = 3.  # seconds: what is predicted to take longer is skipped


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
    """The replay of `call` as a CUDA graph.

    A capture that fails may leave its stream the current one, and the generator in a state in which it gives no more
    numbers: both are put back, or nothing else could be timed.
    """
    before = torch.cuda.current_stream()
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    state = generator.graphsafe_get_state()
    stream = torch.cuda.Stream()
    stream.wait_stream(before)
    try:
        generator.graphsafe_set_state(generator.clone_state())
        with torch.cuda.stream(stream):
            for _ in range(2):
                call()
        before.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    finally:
        torch.cuda.set_stream(before)
        generator.graphsafe_set_state(state)
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
    if needed > free / 2:
        return f'about {gib(needed)}, {gib(free)} free'
    return ''


def free_memory(device: torch.device) -> float:
    """Bytes of memory that may still be taken."""
    return torch.cuda.mem_get_info(device)[0] if device.type == 'cuda' else machine.free_memory()


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


def gib(size: float) -> str:
    return f'{size / 2 ** 30:.1f} GiB'
