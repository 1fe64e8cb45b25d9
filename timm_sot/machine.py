""" The machine: devices, processors, memory, and what stands beside a number (versions, commit) """
import ctypes
import importlib.metadata
import math
import os
import platform
import re
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any, Dict, Sequence

import timm
import torch

from . import __version__
from .errors import UserError, first_line

__all__ = [
    'about', 'available_cores', 'commit', 'device_name', 'free_memory', 'joined', 'keep_memory', 'processor_name',
    'resolve_device', 'shared_memory', 'versions']


def resolve_device(name: str = '') -> torch.device:
    """The device called `name`, by default a GPU if there is one."""
    try:
        device = torch.device(name or ('cuda' if torch.cuda.is_available() else 'cpu'))
        torch.zeros(1, device=device).item()  # of meta there is none
    except (RuntimeError, AssertionError) as e:  # unknown to torch, or absent
        # the first sentence: torch goes on with a list of all that it might have been built for
        raise UserError(f'device {name!r} cannot be used: {first_line(e).partition(". ")[0]}') from e
    return device


def about(device: torch.device, precision: str) -> Dict[str, Any]:
    """What stands in the line of a run of where it ran; of the processor only if it did the computing."""
    found = {'device': device_name(device, precision), 'versions': versions(), 'commit': commit()}
    if device.type == 'cpu':
        found['processor'] = processor_name()
    return found


def joined(parts: Sequence[Dict[str, Any]]) -> Dict[str, Any]:
    """What is known of a run that was continued elsewhere: 'A then B' where the parts differ."""
    def join(values):
        return ' then '.join(dict.fromkeys(value for value in values if value)) or values[-1]

    versions = {key: join([part['versions'].get(key) for part in parts]) for key in parts[-1]['versions']}
    found = {
        'device': join([part['device'] for part in parts]), 'versions': versions,
        'commit': join([part['commit'] for part in parts])}
    if any(part.get('processor') for part in parts):
        found['processor'] = join([part.get('processor') for part in parts])
    return found


def device_name(device: torch.device, precision: str) -> str:
    """The device as a reader would call it, and what it computed in. Runs of one name are compared in the report."""
    if device.type == 'cuda':
        name = torch.cuda.get_device_name(device)
    else:
        name = f'cpu ({torch.get_num_threads()} threads)' if device.type == 'cpu' else str(device)
    return f'{name}, {precision}'


def processor_name() -> str:
    """The processor as its maker calls it, where the system tells."""
    try:
        with open('/proc/cpuinfo') as f:
            return next(line.split(':', 1)[1].strip() for line in f if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions(*others: str) -> Dict[str, str]:
    """Versions of what the numbers depend on, 'none' for what is not installed.

    On torchvision and Pillow depend the augmentations, on numba the masks of dropout.
    """
    found = {
        'python': platform.python_version(), 'torch': str(torch.__version__), 'timm': timm.__version__,
        'timm_sot': __version__}
    for package in ('torchvision', 'pillow', 'numba', 'triton', *others):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = 'none'
    return found


def commit() -> str:
    """Commit of the source tree this runs from, with a + where it has changes; empty for an installed package."""
    git = ['git', '-C', os.path.dirname(os.path.abspath(__file__))]
    try:
        subprocess.run([*git, 'ls-files', '--error-unmatch', '__init__.py'], capture_output=True, check=True)
        described = subprocess.run(
            [*git, 'describe', '--always', '--dirty=+', '--abbrev=12', '--exclude=*'],
            capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ''
    return described.stdout.strip()


def available_cores() -> int:
    """Number of cores that this process may run on."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # of Linux alone
        cores = os.cpu_count() or 1
    with suppress(OSError, ValueError):  # a container may have the time of fewer
        quota, period = map(int, Path('/sys/fs/cgroup/cpu.max').read_text().split())
        cores = min(cores, max(1, math.ceil(quota / period)))
    return cores


def free_memory() -> float:
    """Bytes of memory that this process may still take, as far as the system tells."""
    free = math.inf
    with suppress(AttributeError, ValueError, OSError):
        free = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    with suppress(OSError, TypeError):  # no such file, or no such line in it
        text = Path('/proc/meminfo').read_text()
        free = 1024 * int(re.search(r'^MemAvailable: +(\d+) kB', text, re.M)[1])
    with suppress(OSError, ValueError):  # of a container, where it has a limit
        limit, used = (int(Path('/sys/fs/cgroup', f'memory.{name}').read_text()) for name in ('max', 'current'))
        with suppress(OSError, TypeError):  # files that were read count as used, and are given up when need be
            text = Path('/sys/fs/cgroup/memory.stat').read_text()
            used -= int(re.search(r'^inactive_file (\d+)', text, re.M)[1])
        free = min(free, limit - used)
    return max(0., free)


def shared_memory() -> float:
    """Bytes free for what processes hand to each other; containers may have little."""
    try:
        return shutil.disk_usage('/dev/shm').free
    except OSError:
        return math.inf


def keep_memory() -> None:
    """Have this process keep the memory that it frees, for its next training step, where the C library is glibc.

    By default glibc gives large tensors back to the system, and gets them again, page by page and filled with zeros, in
    every step.
    """
    if platform.libc_ver()[0] != 'glibc':
        return
    trim_threshold, mmap_threshold = -1, -3  # names of the parameters in malloc.h
    libc = ctypes.CDLL(None)
    libc.mallopt(trim_threshold, -1)  # never
    libc.mallopt(mmap_threshold, 32 << 20)  # the most that it takes; what is larger comes and goes as before
