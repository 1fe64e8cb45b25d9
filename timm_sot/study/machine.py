""" What numbers were got on: device, processor, versions, commit """
import os
import platform
import subprocess
from typing import Any, Dict, Sequence

import timm
import torch

from .. import __version__

__all__ = ['about', 'commit', 'device_name', 'joined', 'processor_name', 'versions']


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


def versions() -> Dict[str, str]:
    """Versions of what the numbers depend on."""
    return {
        'python': platform.python_version(), 'torch': str(torch.__version__), 'timm': timm.__version__,
        'timm_sot': __version__}


def commit() -> str:
    """Commit of the source tree this runs from, with a + where it has changes; empty for an installed package."""
    git = ['git', '-C', os.path.dirname(os.path.abspath(__file__))]
    try:
        subprocess.run([*git, 'ls-files', '--error-unmatch', '../__init__.py'], capture_output=True, check=True)
        described = subprocess.run(
            [*git, 'describe', '--always', '--dirty=+', '--abbrev=12', '--exclude=*'],
            capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ''
    return described.stdout.strip()
