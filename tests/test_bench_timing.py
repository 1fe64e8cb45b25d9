""" How the bench times: that it measures what it says, not how fast anything is """
import time

import torch

from timm_sot.bench import timing
from timm_sot.bench.contenders import FORWARD, Contender, Group

CPU = torch.device('cpu')


def test_interleaved(monkeypatch):
    calls = []
    monkeypatch.setattr(timing, 'calls_of', lambda call, device: 1)
    contenders = [Contender(name, lambda name=name: calls.append(name)) for name in 'abc']
    results = timing.time_interleaved(contenders, CPU, 0., (4, 9))
    assert calls == ['a', 'b', 'c'] * 5  # a warm-up, then the fewest rounds
    assert all(len(results[name]['call']['samples_ms']) == 4 for name in 'abc')


def test_rounds_end(monkeypatch):
    monkeypatch.setattr(timing, 'calls_of', lambda call, device: 1)
    results = timing.time_interleaved([Contender('a', lambda: None)], CPU, 60., (1, 7))
    assert len(results['a']['call']['samples_ms']) == 7


def test_times_are_of_one_call():
    assert 5 <= timing.clock(lambda: time.sleep(0.005), 3, CPU) < 500
    assert timing.calls_of(lambda: time.sleep(0.005), CPU) == 1
    assert timing.calls_of(lambda: None, CPU) > 1


def test_summary():
    summary = timing.summary([4., 1., 2., 3., 5.])
    assert (summary['q25_ms'], summary['median_ms'], summary['q75_ms']) == (2., 3., 4.)
    assert summary['samples_ms'] == [4., 1., 2., 3., 5.]


def test_a_failing_contender_leaves_the_others():
    count = []

    def late():
        count.append(1)
        if len(count) > 3:
            raise RuntimeError('late\nsecond line')

    def early():
        raise ValueError('early')

    contenders = [Contender('early', early), Contender('late', late), Contender('fine', lambda: None),
                  Contender('absent', None, skipped='not installed')]
    results = timing.time_interleaved(contenders, CPU, 0.)
    assert results['early'] == {'error': 'ValueError: early'}
    assert results['late']['error'] == 'RuntimeError: late' and 'call' not in results['late']
    assert results['fine']['call']['median_ms'] >= 0
    assert results['absent'] == {'skipped': 'not installed'}


def test_a_failing_group_is_a_row():
    def build():
        raise MemoryError('too large')

    row, = timing.time_group(Group('core', 'x', FORWARD, 'a', 4, 1., build), CPU, 0., (1, 1), {})
    assert row['error'] == 'MemoryError: too large' and row['contender'] == 'all'


def test_skipped_after_two_slow_calls(monkeypatch):
    """One may have been slow for its compilation."""
    monkeypatch.setattr(timing, 'SLOWEST_CALL', 5.)
    milliseconds = {'slow': [11e3, 12e3], 'compiled': [11e3, 1., 1., 1.]}
    monkeypatch.setattr(timing, 'clock', lambda call, calls, device: milliseconds[call].pop(0))
    results = timing.time_interleaved([Contender(name, name) for name in milliseconds], CPU, 0., (1, 1))
    assert results['slow'] == {'first_s': 11., 'skipped': '12.0 s a call'}
    assert results['compiled']['first_s'] == 11. and results['compiled']['call']['samples_ms'] == [1.]


def test_skipped_where_too_slow_or_too_large(monkeypatch):
    def group(elements):
        contenders = [Contender('a', lambda: time.sleep(0.001)), Contender('b', lambda: None, matrices=1000)]
        return Group('core', str(elements), FORWARD, 'a', elements, 1., lambda: contenders)

    rates = {}
    monkeypatch.setattr(timing, 'free_memory', lambda device: 10 ** 7)
    assert all('call' in row for row in timing.time_group(group(10), CPU, 0., (1, 1), rates))
    a, b = timing.time_group(group(100_000), CPU, 0., (1, 1), rates)
    assert a['skipped'].endswith('s a call') and 'GiB' in b['skipped']
    late, = timing.time_group(group(10), CPU, 0., (1, 1), {}, late=True)
    assert '--only core' in late['skipped']


def test_flow_on_cuda(monkeypatch):
    """The calls and the replays take turns, and a call that no graph can hold is still timed."""
    log = []
    cuda = torch.device('cuda')
    monkeypatch.setattr(timing, 'clock', lambda call, calls, device: (call(), 1.)[1])

    def captured(call):
        if call is refuses:
            raise RuntimeError('operation not permitted when stream is capturing')
        return lambda: log.append('graph')

    def refuses():
        log.append('refuses')

    monkeypatch.setattr(timing, 'captured', captured)
    contenders = [
        Contender('a', lambda: log.append('call')), Contender('b', refuses), Contender('c', lambda: None, graph=False)]
    results = timing.time_interleaved(contenders, cuda, 0., (2, 2))
    assert log[-6:] == ['call', 'graph', 'refuses'] * 2
    assert set(results['a']) == {'first_s', 'call', 'graph'}
    assert set(results['b']) == {'first_s', 'call', 'graph_error'} and set(results['c']) == {'first_s', 'call'}
