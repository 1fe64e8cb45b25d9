""" Whether the compiled loops can be run, and how they are shared out """
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from timm_sot.kernels import threads
from timm_sot.kernels.threads import LEAST_WORK, run_in_threads

HAS_OPENMP = sys.platform == 'linux' and torch.backends.openmp.is_available()


@pytest.fixture(params=[
    pytest.param('openmp', marks=pytest.mark.skipif(not HAS_OPENMP, reason='needs OpenMP on Linux')), 'python'])
def four_threads(request, monkeypatch):
    if request.param == 'python':
        monkeypatch.setattr(threads, '_openmp', lambda: None)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield request.param
    torch.set_num_threads(before)


def parts(problems, work):
    """What is called, in order."""
    calls = []
    run_in_threads(lambda *args: calls.append((*args, threading.get_ident())), problems, work, 'argument')
    assert all(call[2] == 'argument' for call in calls)
    return sorted(call[:2] for call in calls)


def test_every_problem_is_in_one_part(four_threads):
    for problems in (1, 3, 4, 5, 7, 100, 1001):
        bounds = parts(problems, LEAST_WORK)
        assert len(bounds) == min(problems, 4)
        assert [i for first, last in bounds for i in range(first, last)] == list(range(problems))
        sizes = [last - first for first, last in bounds]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize('problems, work, expected', [
    (0, LEAST_WORK, 1), (100, 1, 1), (2, LEAST_WORK // 2, 1), (4, LEAST_WORK // 2, 2), (100, LEAST_WORK // 30, 3)])
def test_no_thread_for_little_work(four_threads, problems, work, expected):
    assert len(parts(problems, work)) == expected


def test_parts_run_at_once(four_threads):
    barrier, places = threading.Barrier(4), []
    run_in_threads(lambda first, last: places.append(barrier.wait(timeout=30)), 4, LEAST_WORK)
    assert sorted(places) == [0, 1, 2, 3]


def test_errors_of_a_thread_are_raised(four_threads):
    def fail(first, last):
        if last == 4:
            raise FloatingPointError('the last part')

    with pytest.raises(FloatingPointError, match='the last part'):
        run_in_threads(fail, 4, LEAST_WORK)


def test_they_are_those_of_torch(four_threads):
    """Which are the same every time; and torch can use them afterwards."""
    def native_ids():
        barrier, ids = threading.Barrier(4), set()

        def loops(first, last):
            barrier.wait(timeout=30)
            ids.add(threading.get_native_id())
        run_in_threads(loops, 4, LEAST_WORK)
        return ids

    def tasks():
        return {int(name) for name in os.listdir('/proc/self/task')}

    x = torch.ones(10 ** 6)
    x.sum()
    before = tasks()
    once = native_ids()
    assert len(once) == 4
    assert (once <= before) == (native_ids() == once) == (four_threads == 'openmp')
    assert torch.ones(10 ** 6).sum() == 10 ** 6
    if four_threads == 'openmp':
        run_in_threads(lambda first, last: None, 2, LEAST_WORK)  # fewer parts than threads
        assert native_ids() == once


def test_many_threads_of_python_at_once(four_threads):
    def count(_):
        parts = []
        run_in_threads(lambda first, last: parts.append(last - first), 100, LEAST_WORK)
        return sum(parts)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(count, range(50))) == [100] * 50


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs os.fork')
def test_after_a_fork():
    """In which there are no threads but the one that forked."""
    code = '''
import os, signal, torch
from timm_sot.kernels.threads import LEAST_WORK, run_in_threads
torch.set_num_threads(2)
run_in_threads(lambda first, last: None, 2, LEAST_WORK)
if os.fork() == 0:
    signal.alarm(30)
    parts = []
    run_in_threads(lambda first, last: parts.append(last - first), 2, LEAST_WORK)
    os._exit(sum(parts))
print(os.waitstatus_to_exitcode(os.wait()[1]))
'''
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert result.stdout.strip() == '2', result.stderr


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs signals')
def test_signals_come_through():
    """What their handlers raise, at whatever moment; a call that returns has computed everything."""
    code = '''
import signal, time, torch
from timm_sot.kernels.threads import LEAST_WORK, run_in_threads
torch.set_num_threads(2)
raised = caught = 0
armed = False

class Interrupt(Exception):
    pass

def handler(*args):
    global armed, raised
    if armed:
        armed = False
        raised += 1
        raise Interrupt

def count(first, last):
    parts.append(last - first)

signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)
end = time.monotonic() + 2
while time.monotonic() < end:
    try:
        armed = True
        for _ in range(100):
            parts = []
            run_in_threads(count, 4, LEAST_WORK)
            assert sum(parts) == 4
        armed = False
    except Interrupt:
        caught += 1
signal.setitimer(signal.ITIMER_REAL, 0)
print(raised > 100, raised - caught)
'''
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert result.stdout.split() == ['True', '0'] and not result.stderr, result.stdout + result.stderr


@pytest.mark.slow
def test_loops_that_are_not_compiled(tmp_path):
    """NUMBA_DISABLE_JIT is for debugging other packages; ours need what numba makes of them."""
    code = '''
import warnings, torch
from timm_sot import SOTAttention
layer, x = SOTAttention(32, 2), torch.randn(2, 9, 32)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter('always')
    layer(x).sum().backward()
print(*(w.message for w in seen if 'numba' in str(w.message)), sep='\\n')
'''
    environment = {**os.environ, 'NUMBA_DISABLE_JIT': '1'}
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0 and 'NUMBA_DISABLE_JIT is set' in result.stdout, result.stderr


@pytest.mark.slow
def test_numba_that_does_not_import(tmp_path):
    """All runs in plain torch, compiled too, after one warning that says why."""
    (tmp_path / 'numba.py').write_text("raise ImportError('Numba needs NumPy 1.0 or less')\n")
    code = '''
import sys, warnings
sys.path.insert(0, sys.argv[1])
import torch
from timm_sot import SOTAttention, self_optimal_transport
layer, x = SOTAttention(32, 2), torch.randn(2, 9, 32)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter('always')
    if sys.argv[2] == 'compiled':
        layer = torch.compile(layer, fullgraph=True, backend='eager')
    layer(x).sum().backward()
    layer(x).sum().backward()
    self_optimal_transport(x)
print(*(w.message for w in seen if 'numba' in str(w.message)), sep='\\n')
print(sys.modules.get('timm_sot.kernels.cpu_loops'))
'''
    for how in ('eager', 'compiled'):
        result = subprocess.run([sys.executable, '-c', code, tmp_path, how], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        said, loops = result.stdout.splitlines()  # one warning
        assert 'ImportError: Numba needs NumPy 1.0 or less. Install a version' in said and loops == 'None'
