""" Devices, processors and memory, and what the lines of runs say of where they ran """
import builtins
import io
import os
import platform
import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace

import numba
import PIL
import pytest
import timm
import torch
import triton

import timm_sot
from timm_sot import machine
from timm_sot.errors import UserError
from timm_sot.machine import about, commit, device_name, joined, processor_name, versions


def test_about_on_a_cpu():
    found = about(torch.device('cpu'), 'bfloat16')
    assert found['device'] == f'cpu ({torch.get_num_threads()} threads), bfloat16'
    assert found['processor'] == processor_name() != ''
    assert found['versions'] == versions() and found['commit'] == commit()
    assert versions('no-such-package') == {
        'python': platform.python_version(), 'torch': torch.__version__, 'timm': timm.__version__,
        'timm_sot': timm_sot.__version__, 'torchvision': metadata.version('torchvision'), 'pillow': PIL.__version__,
        'numba': numba.__version__, 'triton': triton.__version__, 'no-such-package': 'none'}


@pytest.mark.parametrize('name', ['nonsense', 'cuda:99', 'meta'])
def test_device_errors(name):
    with pytest.raises(UserError, match=f'device {name!r} cannot be used'):
        machine.resolve_device(name)


def test_about_elsewhere(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'NVIDIA H200')
    found = about(torch.device('cuda'), 'float32')
    assert found['device'] == 'NVIDIA H200, float32' and 'processor' not in found
    assert device_name(torch.device('mps'), 'float32') == 'mps, float32'


@pytest.mark.parametrize('cpuinfo, name', [
    ('processor\t: 0\nmodel name\t: AMD EPYC 9: 5\nmodel name\t: B\n', 'AMD EPYC 9: 5'),
    ('Hardware\t: none of the kind\n', 'arm'),
    (None, 'arm'),
])
def test_processor_name(monkeypatch, cpuinfo, name):
    def no_open(path):
        assert path == '/proc/cpuinfo'
        if cpuinfo is None:
            raise FileNotFoundError(path)
        return io.StringIO(cpuinfo)

    monkeypatch.setattr(builtins, 'open', no_open)
    monkeypatch.setattr(platform, 'processor', lambda: '')
    monkeypatch.setattr(platform, 'machine', lambda: 'arm')
    assert processor_name() == name


def test_parts_are_joined():
    a = {'device': 'A', 'processor': 'P', 'versions': {'torch': '1', 'timm': '1'}, 'commit': 'c'}
    assert joined([a]) == a
    b = {'device': 'B', 'versions': {'torch': '2', 'timm': '1'}, 'commit': ''}  # by a version that knew no processors
    assert joined([a, b, a]) == {
        'device': 'A then B', 'processor': 'P', 'versions': {'torch': '1 then 2', 'timm': '1'}, 'commit': 'c'}
    assert joined([b, {**a, 'processor': 'Q'}, a])['processor'] == 'Q then P'
    assert 'processor' not in joined([b, b])


def test_commit(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(['git', '-c', 'user.name=N', '-c', 'user.email=E', '-C', tmp_path, *words], check=True)

    (tmp_path / '__init__.py').write_text('')
    monkeypatch.setattr(machine, '__file__', str(tmp_path / 'machine.py'))
    assert commit() == '', 'no repository'
    git('init', '-q')
    assert commit() == '', 'a repository that this is no part of'
    git('add', '.')
    git('commit', '-q', '-m', 'first')
    first = commit()
    assert len(first) == 12 and not first.endswith('+')
    (tmp_path / '__init__.py').write_text('changed')
    assert commit() == first + '+'


def test_available_cores(monkeypatch):
    """Those of a container or of taskset, not of the machine."""
    quota = 'max 100000\n'
    monkeypatch.setattr(machine.Path, 'read_text', lambda path: {'/sys/fs/cgroup/cpu.max': quota}[str(path)])
    monkeypatch.setattr(os, 'cpu_count', lambda: 7)
    monkeypatch.setattr(os, 'sched_getaffinity', lambda process: {3, 5}, raising=False)
    assert machine.available_cores() == 2
    monkeypatch.delattr(os, 'sched_getaffinity')
    assert machine.available_cores() == 7
    for quota, cores in (('250000 100000\n', 3), ('10000 100000\n', 1), ('900000 100000\n', 7)):
        assert machine.available_cores() == cores


@pytest.mark.parametrize('files, gigabytes', [
    ({}, 16.),
    ({'/proc/meminfo': 'MemTotal: 1 kB\nMemFree: 5 kB\nMemAvailable:    3145728 kB\n'}, 3.),
    ({'/proc/meminfo': 'MemTotal: 1 kB\nMemFree: 5 kB\n'}, 16.),
    ({'/sys/fs/cgroup/memory.max': 'max\n', '/sys/fs/cgroup/memory.current': '1\n'}, 16.),
    ({'/sys/fs/cgroup/memory.max': f'{5 << 30}\n', '/sys/fs/cgroup/memory.current': f'{3 << 30}\n'}, 2.),
    ({'/sys/fs/cgroup/memory.max': f'{5 << 30}\n', '/sys/fs/cgroup/memory.current': f'{3 << 30}\n',
      '/sys/fs/cgroup/memory.stat': f'anon 5\ninactive_file {1 << 30}\nactive_file 7\n'}, 3.),
    ({'/sys/fs/cgroup/memory.max': '1\n', '/sys/fs/cgroup/memory.current': '3\n'}, 0.),
])
def test_free_memory(monkeypatch, files, gigabytes):
    def read_text(path):
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(machine.Path, 'read_text', read_text)
    monkeypatch.setattr(os, 'sysconf', {'SC_PAGE_SIZE': 4096, 'SC_PHYS_PAGES': 16 << 18}.get)
    assert machine.free_memory() == gigabytes * 2 ** 30
    if not files:
        monkeypatch.delattr(os, 'sysconf')
        assert machine.free_memory() == float('inf')


LEFT_AFTER_A_STEP = """
from pathlib import Path
import torch
from timm_sot.machine import keep_memory

def pages():
    return int(Path('/proc/self/statm').read_text().split()[1])

{call}
before = pages()
tensors = [torch.empty(20 << 20, dtype=torch.uint8).fill_(1) for _ in range(8)]
most = pages()
del tensors
print((pages() - before) / (most - before))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='memory of glibc')
def test_memory_is_kept():
    left = [
        float(subprocess.run([sys.executable, '-c', LEFT_AFTER_A_STEP.format(call=call)], check=True,
                             capture_output=True, text=True).stdout)
        for call in ('', 'keep_memory()')]
    assert left[0] < 0.1 and left[1] > 0.9


@pytest.mark.parametrize('libc, calls', [('glibc', 2), ('musl', 0), ('', 0)])
def test_memory_is_as_it_was_elsewhere(monkeypatch, libc, calls):
    """The numbers mean something in glibc alone."""
    asked = []
    monkeypatch.setattr(platform, 'libc_ver', lambda: (libc, '2.36'))
    monkeypatch.setattr(machine.ctypes, 'CDLL', lambda name: SimpleNamespace(mallopt=lambda *args: asked.append(args)))
    machine.keep_memory()
    assert len(asked) == calls
