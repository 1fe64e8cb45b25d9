""" How the compiled loops of `cpu_loops` are run: whether they can be, and on how many threads """
import ctypes
import functools
import importlib
import importlib.util
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Optional, Tuple

import torch

__all__ = ['loops_work', 'run_in_threads']

LEAST_WORK = 2 ** 20  # multiplications of a thread, a tenth of a millisecond: to start one takes about as long

_REGION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_PROCESS = os.getpid()  # OpenMP's threads do not survive a fork, and the runtime would wait for them


@functools.lru_cache(maxsize=None)
def loops_work() -> bool:
    """Whether the loops can be imported, which is tried when this is first asked; a numba that fails is warned of."""
    if importlib.util.find_spec('numba') is None:
        return False
    try:
        if importlib.import_module('numba').config.DISABLE_JIT:
            raise RuntimeError('NUMBA_DISABLE_JIT is set')
        importlib.import_module(f'{__package__}.cpu_loops')
    except Exception as e:  # an installed numba does not import where it does not fit numpy, for one
        warnings.warn(
            f'timm-sot runs without its compiled loops, several times slower on the CPU, because numba is installed '
            f'but fails: {type(e).__name__}: {e}. Install a version of numba that works here, or remove it.',
            RuntimeWarning)
        return False
    return True


@functools.lru_cache(maxsize=None)
def _openmp() -> Optional[Tuple[Callable[..., None], Callable[[], None]]]:
    """What begins and ends a parallel region in the OpenMP runtime that torch runs on, if it has them.

    `GOMP_parallel_start(function, argument, threads)`, after which this thread belongs to the team and the others run
    the function, and `GOMP_parallel_end()`, which waits for them. GNU's compilers made `#pragma omp parallel` of these,
    and so they are in their runtime and in those that stand in for it.
    """
    if not torch.backends.openmp.is_available():
        return None
    try:
        # in the order in which the linker looked for torch: another runtime may come before all (LD_PRELOAD)
        libraries = [ctypes.CDLL(None), ctypes.CDLL(torch._C.__file__)]
        runtime = next(library for library in libraries if hasattr(library, 'GOMP_parallel_start'))
        start, end = runtime.GOMP_parallel_start, runtime.GOMP_parallel_end
    except (OSError, TypeError, StopIteration, AttributeError):
        return None
    start.argtypes, end.argtypes = [_REGION, ctypes.c_void_p, ctypes.c_uint], []
    start.restype = end.restype = None
    return start, end


def run_in_threads(loops: Callable[..., None], problems: int, work: int, *args: Any) -> None:
    """Call loops(first, last, *args) for parts of the problems, in up to as many threads as torch uses.

    They are torch's own threads where these are OpenMP's, which wait for the next operation in a busy loop: others
    would have to share the cores with them. Not numba's threads: those abort the process when two threads of Python
    arrive at once, or after a fork.

    Args:
        loops: A compiled function that lets other threads run.
        problems: Number of problems.
        work: Multiplications of a problem, roughly.
        args: Further arguments of `loops`.
    """
    team = torch.get_num_threads()
    threads = min(team, problems, problems * work // LEAST_WORK)
    if threads <= 1:
        return loops(0, problems, *args)
    parts = [(problems * t // threads, problems * (t + 1) // threads) for t in range(threads)]
    errors = []

    def run_parts(_: Any = None) -> None:
        while parts:
            try:
                part = parts.pop()
            except IndexError:  # another thread was faster
                return
            try:
                loops(*part, *args)
            except BaseException as e:  # nothing can be raised through the runtime
                errors.append(e)

    openmp = _openmp()
    if openmp is not None and os.getpid() == _PROCESS:
        start, end = openmp
        region = _REGION(run_parts)
        try:
            start(region, None, team)  # another size of the team would make the runtime start threads
            run_parts()  # not as a callback, through which what a handler of signals raises would not come
        finally:
            end()
    else:
        with ThreadPoolExecutor(threads - 1) as pool:
            for _ in range(threads - 1):
                pool.submit(run_parts)
            run_parts()
    if errors:
        raise errors[0]
