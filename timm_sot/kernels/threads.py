""" How the compiled loops of `cpu_loops` are run: whether they can be, and on how many threads """
import functools
import importlib
import importlib.util
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable

import torch

__all__ = ['loops_work', 'run_in_threads']

LEAST_WORK = 2 ** 20  # multiplications of a thread, a tenth of a millisecond: to start one takes about as long


@functools.lru_cache(maxsize=None)
def loops_work() -> bool:
    """Whether the loops can be imported, which is tried when this is first asked; a numba that fails is warned of."""
    if importlib.util.find_spec('numba') is None:
        return False
    try:
        importlib.import_module(f'{__package__}.cpu_loops')
    except Exception as e:  # an installed numba does not import where it does not fit numpy, for one
        warnings.warn(
            f'timm-sot runs without its compiled loops, several times slower on the CPU, because numba is installed '
            f'but fails: {type(e).__name__}: {e}. Install a version of numba that works here, or remove it.',
            RuntimeWarning)
        return False
    return True


def run_in_threads(loops: Callable[..., None], problems: int, work: int, *args: Any) -> None:
    """Call loops(first, last, *args) for parts of the problems, in up to as many threads as torch uses.

    Not numba's own threads: those abort the process when two threads of Python arrive at once, or after a fork.

    Args:
        loops: A compiled function that lets other threads run.
        problems: Number of problems.
        work: Multiplications of a problem, roughly.
        args: Further arguments of `loops`.
    """
    threads = min(torch.get_num_threads(), problems, problems * work // LEAST_WORK)
    if threads <= 1:
        return loops(0, problems, *args)
    bounds = [problems * t // threads for t in range(threads + 1)]
    with ThreadPoolExecutor(threads - 1) as pool:
        others = [pool.submit(loops, *part, *args) for part in zip(bounds[1:], bounds[2:])]
        loops(bounds[0], bounds[1], *args)
    for other in others:
        other.result()
