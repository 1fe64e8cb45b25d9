""" A run of the bench: everything that is timed and weighed on a device """
import os
import time
from datetime import datetime, timezone
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import timm
import torch
from tqdm import tqdm

from ..attention import VARIANTS
from ..errors import UserError
from ..machine import available_cores, commit, processor_name, versions
from .contenders import FORWARD, TRAIN, Group, core_group, dtype_name, points_group, sinkhorn_group, step_group
from .memory import memory_rows
from .report import bar_rows
from .timing import QUICK_ROUNDS, ROUNDS, TIME_LIMIT, release, time_group

__all__ = ['SECTIONS', 'run_bench']

SECTIONS = ('core', 'step', 'memory', 'sinkhorn')

# (B, H, N) of the attention core; about as many matrix entries in each, more where N alone is large
CORE_SHAPES = {
    'cpu': ((128, 2, 64), (16, 2, 196), (8, 2, 256), (1, 1, 1024), (1, 1, 4096)),
    'cuda': ((1024, 2, 64), (64, 2, 256), (8, 2, 1024), (1, 8, 4096), (128, 2, 196)),
}
SINKHORN_SHAPES = {'cpu': ((256, 64), (1, 1024)), 'cuda': ((2048, 64), (8, 1024))}

SECONDS, QUICK_SECONDS = 110., 4.  # of timing; warm-up and compilation come on top


def groups_of(sections: Sequence[str], dtype: torch.dtype, device: torch.device, quick: bool) -> List[Group]:
    """What is timed, in an order that begins with what the bars need, for time may run out."""
    cuda = device.type == 'cuda'
    core, steps, sinkhorns = [], [], []
    if 'core' in sections:
        variants = [name for name in VARIANTS if name != 'softmax']
        for i, (B, H, N) in enumerate(CORE_SHAPES[device.type]):
            if quick and N not in (64, 196):
                continue
            few = quick and N != 64
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
    # the first two are of the bars, the third runs in kernels of its own on CUDA
    return [*core[:1], *steps[:1], *core[2:3], *sinkhorns, *core[1:2], *core[3:], *steps[1:]]


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
    return {
        'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else processor_name(),
        'device_type': device.type,
        'threads': torch.get_num_threads(),
        'cores': available_cores(),
        'load': os.getloadavg()[0] if hasattr(os, 'getloadavg') else None,
        'matmul_precision': torch.get_float32_matmul_precision(),
        'versions': versions('pot', 'flash-sinkhorn'),
        'commit': commit(),
        'date': datetime.now(timezone.utc).isoformat(timespec='seconds'),
    }
