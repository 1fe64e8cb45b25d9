""" The bench: that it measures what it says, not how fast anything is """
import json
import sys
import time

import pytest
import torch

from timm_sot import bench, cli
from timm_sot.attention import VARIANTS, sot_attention_weights
from timm_sot.bench import Contender, Group

CPU = torch.device('cpu')


@pytest.fixture
def tiny(monkeypatch):
    """The whole bench on shapes that take no time."""
    monkeypatch.setattr(bench, 'CORE_SHAPES', {'cpu': ((2, 1, 64), (1, 1, 24))})
    monkeypatch.setattr(bench, 'SINKHORN_SHAPES', {'cpu': ((2, 8),)})
    monkeypatch.setattr(bench, 'SAVED_SHAPE', (1, 1, 32))
    monkeypatch.setattr(bench, 'BATCH', 2)
    monkeypatch.setattr(bench, 'SECONDS', 0.)


@pytest.fixture
def report(tiny):
    return bench.run_bench(CPU)


def fake_report(*rows, device_type='cpu'):
    about = {
        'device': f'a {device_type}', 'device_type': device_type, 'threads': 1, 'cores': 2, 'load': 0.5,
        'dtype': 'float32', 'quick': False, 'versions': {'torch': '2.5'}, 'commit': 'abc',
        'date': '2026-11-23T00:00:00+00:00', 'seconds': 1.}
    return {'about': about, 'rows': list(rows), 'bars': []}


def fake_row(section, case, phase, contender, baseline='', **result):
    for kind in ('call', 'graph'):
        if kind in result:
            samples = result[kind] if isinstance(result[kind], list) else [result[kind]]
            result[kind] = {'calls': 1, **bench.summary(samples)}
    return dict(section=section, case=case, phase=phase, baseline=baseline, contender=contender, **result)


# What is compared

@pytest.mark.parametrize('tol', [None, 0.1])
def test_original_form_computes_the_same(tol):
    q, k = torch.randn(2, 3, 2, 64, bench.D)
    expected = sot_attention_weights(q, k, 'qk', True, 'euclidean', bench.REG, bench.ITERS, tol)
    assert torch.allclose(bench.original_weights(q, k, tol=tol), expected, rtol=1e-4, atol=1e-6)


def test_contenders_of_the_core_agree():
    q, k, v = bench.qkv_inputs(2, 1, 64, torch.float32, CPU)
    assert not q.is_contiguous() and q.is_leaf and q.shape == (2, 1, 64, bench.D)
    softmax = bench.eager_softmax(q, k, v)
    assert torch.allclose(softmax, torch.nn.functional.scaled_dot_product_attention(q, k, v), atol=1e-5)
    for variant in set(VARIANTS) - {'softmax'}:
        out, expected = bench.sot_core(variant)(q, k, v), bench.unfused_core(variant)(q, k, v)
        assert torch.allclose(out, expected, atol=1e-4), variant


def test_sinkhorn_contenders_agree():
    log_kernel = -torch.rand(2, 8, 8) / 0.1
    expected = bench.sinkhorn(log_kernel, iters=bench.ITERS)
    assert torch.allclose(bench.plain_sinkhorn(log_kernel), expected, atol=1e-4)
    if pot := bench.import_pot():
        mass = torch.full((2, 8), 1 / 8)
        plan = pot.bregman_log_projection_batch(log_kernel, mass, mass, max_iter=bench.ITERS, tol=0., grad='autodiff')
        assert torch.allclose(plan['log_T'], expected, atol=1e-4)


def test_what_is_not_installed_is_skipped_with_the_reason(monkeypatch):
    monkeypatch.setattr(bench, 'import_pot', lambda: None)
    row, = [c for c in bench.sinkhorn_group(1, 4, bench.FORWARD, CPU, 1.).build() if c.name == 'POT']
    assert 'pip install pot' in row.skipped
    row, = [c for c in bench.points_group(4, CPU, 1.).build() if c.name == 'flash-sinkhorn']
    assert row.skipped == 'needs CUDA'


@pytest.mark.parametrize('phase', [bench.FORWARD, bench.TRAIN])
def test_pass(phase):
    x = torch.ones(3, requires_grad=True)
    seen = []

    def fn(x):
        seen.append(torch.is_grad_enabled())
        y = x * 2
        if y.requires_grad:
            y.register_hook(lambda grad: seen.append(grad.tolist()))
        return y

    bench.pass_of(fn, (x,), torch.full((3,), 5.), phase)()
    assert seen == ([False] if phase == bench.FORWARD else [True, [5., 5., 5.]])
    assert x.grad is None


def test_training_step_moves_the_weights(monkeypatch):
    monkeypatch.setattr(bench, 'BATCH', 2)
    models = []
    build = bench.build_model
    monkeypatch.setattr(bench, 'build_model', lambda *args: models.append(build(*args)) or models[-1])
    step, = bench.step_group(['cct_2_sot_qk'], False, CPU, 1.).build()
    before = [p.clone() for p in models[0].parameters()]
    step.call()
    assert all(not torch.equal(a, b) for a, b in zip(before, models[0].parameters()))


# How it is timed

def test_interleaved(monkeypatch):
    calls = []
    monkeypatch.setattr(bench, 'calls_of', lambda call, device: 1)
    contenders = [Contender(name, lambda name=name: calls.append(name)) for name in 'abc']
    results = bench.time_interleaved(contenders, CPU, 0., (4, 9))
    assert calls == ['a', 'b', 'c'] * 5  # a warm-up, then the fewest rounds
    assert all(len(results[name]['call']['samples_ms']) == 4 for name in 'abc')


def test_rounds_end(monkeypatch):
    monkeypatch.setattr(bench, 'calls_of', lambda call, device: 1)
    results = bench.time_interleaved([Contender('a', lambda: None)], CPU, 60., (1, 7))
    assert len(results['a']['call']['samples_ms']) == 7


def test_times_are_of_one_call():
    assert 5 <= bench.clock(lambda: time.sleep(0.005), 3, CPU) < 500
    assert bench.calls_of(lambda: time.sleep(0.005), CPU) == 1
    assert bench.calls_of(lambda: None, CPU) > 1


def test_summary():
    summary = bench.summary([4., 1., 2., 3., 5.])
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
    results = bench.time_interleaved(contenders, CPU, 0.)
    assert results['early'] == {'error': 'ValueError: early'}
    assert results['late']['error'] == 'RuntimeError: late' and 'call' not in results['late']
    assert results['fine']['call']['median_ms'] >= 0
    assert results['absent'] == {'skipped': 'not installed'}


def test_a_failing_group_is_a_row():
    def build():
        raise MemoryError('too large')

    row, = bench.time_group(Group('core', 'x', bench.FORWARD, 'a', 4, 1., build), CPU, 0., (1, 1), {})
    assert row['error'] == 'MemoryError: too large' and row['contender'] == 'all'


def test_skipped_after_two_slow_calls(monkeypatch):
    """One may have been slow for its compilation."""
    monkeypatch.setattr(bench, 'SLOWEST_CALL', 5.)
    milliseconds = {'slow': [11e3, 12e3], 'compiled': [11e3, 1., 1., 1.]}
    monkeypatch.setattr(bench, 'clock', lambda call, calls, device: milliseconds[call].pop(0))
    results = bench.time_interleaved([Contender(name, name) for name in milliseconds], CPU, 0., (1, 1))
    assert results['slow'] == {'first_s': 11., 'skipped': '12.0 s a call'}
    assert results['compiled']['first_s'] == 11. and results['compiled']['call']['samples_ms'] == [1.]


def test_skipped_where_too_slow_or_too_large(monkeypatch):
    def group(elements):
        contenders = [Contender('a', lambda: time.sleep(0.001)), Contender('b', lambda: None, matrices=1000)]
        return Group('core', str(elements), bench.FORWARD, 'a', elements, 1., lambda: contenders)

    rates = {}
    monkeypatch.setattr(bench, 'free_memory', lambda device: 10 ** 7)
    assert all('call' in row for row in bench.time_group(group(10), CPU, 0., (1, 1), rates))
    a, b = bench.time_group(group(100_000), CPU, 0., (1, 1), rates)
    assert a['skipped'].endswith('s a call') and 'GiB' in b['skipped']
    late, = bench.time_group(group(10), CPU, 0., (1, 1), {}, late=True)
    assert '--only core' in late['skipped']


def test_flow_on_cuda(monkeypatch):
    """The calls and the replays take turns, and a call that no graph can hold is still timed."""
    log = []
    cuda = torch.device('cuda')
    monkeypatch.setattr(bench, 'clock', lambda call, calls, device: (call(), 1.)[1])

    def captured(call):
        if call is refuses:
            raise RuntimeError('operation not permitted when stream is capturing')
        return lambda: log.append('graph')

    def refuses():
        log.append('refuses')

    monkeypatch.setattr(bench, 'captured', captured)
    contenders = [
        Contender('a', lambda: log.append('call')), Contender('b', refuses), Contender('c', lambda: None, graph=False)]
    results = bench.time_interleaved(contenders, cuda, 0., (2, 2))
    assert log[-6:] == ['call', 'graph', 'refuses'] * 2
    assert set(results['a']) == {'first_s', 'call', 'graph'}
    assert set(results['b']) == {'first_s', 'call', 'graph_error'} and set(results['c']) == {'first_s', 'call'}


# Memory

def test_saved_bytes():
    x, y = torch.randn(2, 8, 4, requires_grad=True).unbind(0)
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()  # one storage of 256 bytes

    total, beyond = bench.saved_bytes(lambda x, y: (x * y).exp().sum(), (x, y))
    assert (total, beyond) == (256 + 128, 128)  # the product is not kept, the exponential is


def test_memory_rows(tiny):
    rows = [*bench.memory_rows(torch.float32, CPU)]
    assert [row['contender'] for row in rows] == ['sot_qk iters=1', 'sot_qk iters=100']
    assert all(row['bytes'] > 0 for row in rows)


def test_train_once(monkeypatch):
    bench.train_once(32, torch.float32, CPU)
    monkeypatch.setattr(bench, 'sot_core', lambda variant: lambda q, k, v: v * float('nan'))
    with pytest.raises(FloatingPointError, match='not finite'):
        bench.train_once(32, torch.float32, CPU)


# The run

def test_what_the_bars_need_comes_first(tiny, monkeypatch):
    """A run may be cut short."""
    def row(**what):
        return dict(dict(section='', case='', phase='', baseline='', contender=''), **what)

    monkeypatch.setattr(bench, 'time_group', lambda group, *args: [row(section=group.section)])
    monkeypatch.setattr(bench, 'memory_rows', lambda *args: iter([row(section='memory', case=case) for case in 'ab']))
    rows = bench.run_bench(CPU)['rows']
    assert [row['section'] for row in rows[:4]] == ['core', 'step', 'memory', 'memory'] and len(rows) > 6
    only = bench.run_bench(CPU, sections=['memory'])['rows']
    assert [row['case'] for row in only] == ['a', 'b']


# The report

def test_report(report, tmp_path):
    path = tmp_path / 'report.json'
    bench.write_report(report, str(path))
    assert json.loads(path.read_text()) == report == bench.load_reports([str(path)])[0]
    assert [*tmp_path.iterdir()] == [path]

    about = report['about']
    assert about['device'] and about['device_type'] == 'cpu' and about['dtype'] == 'float32' and about['quick'] is False
    assert about['threads'] == torch.get_num_threads() and about['seconds'] > 0 and about['date']
    assert {'python', 'torch', 'timm', 'timm_sot', 'triton', 'numba', 'pot', 'flash-sinkhorn'} <= set(about['versions'])
    assert isinstance(about['commit'], str)

    assert not [row for row in report['rows'] if 'error' in row]
    for row in report['rows']:
        assert {'section', 'case', 'phase', 'contender', 'baseline'} <= set(row)
        if row['section'] == 'memory':
            assert row['bytes'] > 0
        elif 'skipped' not in row:
            assert row['call']['q25_ms'] <= row['call']['median_ms'] <= row['call']['q75_ms']
            assert len(row['call']['samples_ms']) >= bench.ROUNDS[0]

    timed = {(row['section'], row['case'], row['phase'], row['contender']) for row in report['rows'] if 'call' in row}
    for phase in (bench.FORWARD, bench.TRAIN):
        for name in ('sdpa', 'softmax', 'sot_qk', 'sot_qkt', 'sot_q_nosoftmax', 'original', 'original tol=0.1'):
            assert ('core', '2x1x64x64 float32', phase, name) in timed
        assert ('core', '1x1x24x64 float32', phase, 'sot_qkt') not in timed  # N is not the head width
        assert ('sinkhorn', '2x8x8 float32', phase, 'timm_sot.sinkhorn') in timed
    assert ('step', 'batch 2 float32', 'training step', 'cct_2_sot_qkt') in timed

    path, = {row['path'] for row in report['rows'] if row['contender'] == 'sot_qk' and row['section'] == 'core'}
    printed = bench.format_tables(report)
    assert f'sot_qk [{path}]' in printed
    for text in ('core 2x1x64x64 float32', 'original tol=0.1', 'cct_2_sot_q_nosoftmax', 'needs CUDA'):
        assert text in printed


def test_sections(tiny):
    seen = []
    report = bench.run_bench(CPU, torch.bfloat16, True, ['memory'], lambda report: seen.append(len(report['rows'])))
    assert {row['section'] for row in report['rows']} == {'memory'}
    assert seen == [1, 2]
    assert 'bfloat16' in report['rows'][0]['case'] and report['about']['quick']


def test_bars_without_measurements():
    rows = bench.bar_rows([fake_report()])
    assert len(rows) == len(bench.BARS) == 8
    assert {row['state'] for row in rows} == {'not measured'} and not any(row['measured'] for row in rows)
    for markdown in (False, True):
        assert bench.bar_table([fake_report()], markdown).count('not measured') == 8


def test_bars():
    step = ('step', f'batch {bench.BATCH} float32', 'training step')
    core = ('core', bench.CPU_CORE, bench.TRAIN)
    cpu = fake_report(
        fake_row(*core, 'softmax', 'softmax', call=[10., 10., 20.]),
        fake_row(*core, 'sot_qk', 'softmax', call=[15., 14., 20.]),
        fake_row(*core, 'original', 'softmax', call=120.),
        fake_row(*step, 'cct_2', call=100.), fake_row(*step, 'cct_2_sot_qk', call=111.),
        fake_row('memory', 'saved for backward 1 float32', '', 'sot_qk iters=1', bytes=100),
        fake_row('memory', 'saved for backward 1 float32', '', 'sot_qk iters=100', bytes=125))
    states = [(row['measured'], row['state']) for row in bench.bar_rows([cpu])]
    assert states == [
        ('1.40x (1.20-1.45, n = 3)', 'met'), ('8.00x faster (8.00-8.00, n = 1)', 'not met'),
        ('1.11x (1.11-1.11, n = 1)', 'not met'), ('1.25x', 'met'),
        *[('', 'not measured')] * 4]

    core = ('core', bench.CUDA_CORE, bench.TRAIN)
    cuda = fake_report(
        fake_row(*core, 'sdpa', 'sdpa', call=1., graph=0.5), fake_row(*core, 'sot_qk', 'sdpa', call=1.2, graph=0.8),
        fake_row('memory', 'peak 1 bfloat16', '', 'sdpa', bytes=100),
        fake_row('memory', 'peak 1 bfloat16', '', 'sot_qk', error='OutOfMemoryError: no'),
        fake_row('memory', 'one step', '', 'sot_qk N=16384', N=16384, bytes=1),
        fake_row('memory', 'one step', '', 'sot_qk N=32768', N=32768, bytes=1),
        fake_row('memory', 'one step', '', 'sot_qk N=65536', error='OutOfMemoryError: no'), device_type='cuda')
    rows = bench.bar_rows([cpu, cuda])
    assert [(row['measured'], row['state']) for row in rows[4:]] == [
        ('1.20x call (1.20-1.20, n = 1), 1.60x graph (1.60-1.60, n = 1)', 'not met'),
        ('', 'not measured'), ('', 'not measured'), ('32,768', 'met')]
    assert rows[0]['on'] == 'a cpu' and rows[4]['on'] == 'a cuda' and rows[5]['on'] == 'CUDA'
    markdown = bench.bar_table([cpu, cuda], markdown=True).splitlines()
    assert markdown[1] == '| --- | --- | --- | --- | --- | --- |'
    assert markdown[2].endswith('| 1.40x (1.20-1.45, n = 3) | met |')
    assert sum(line.startswith('| ') for line in markdown) == 10


def test_a_busy_machine_is_mentioned():
    report = fake_report()
    assert 'busy' not in bench.bar_table([report])
    report['about']['load'] = 1.5
    assert 'busy' in bench.bar_table([report])


def test_table_of_a_fake_cuda_run():
    core = ('core', 'x', bench.TRAIN)
    lines = bench.format_tables(fake_report(
        fake_row(*core, 'sdpa', 'sdpa', call=2., graph=1.), fake_row(*core, 'sot_qk', 'sdpa', call=3., graph=1.25),
        fake_row(*core, 'softmax', 'sdpa', call=4., graph_error='RuntimeError: no'),
        fake_row(*core, 'original', 'sdpa', skipped='about 9 s a call'))).splitlines()[2:]
    assert lines[0].split() == 'core x forward+backward, n = 1 ratio as CUDA graph ratio'.split()
    assert lines[2].split() == ['sot_qk', '3', '(3-3)', '1.50', '1.25', '(1.25-1.25)', '1.25']
    assert lines[3].endswith('2.00   error') and lines[4].split() == ['original', 'skipped']
    assert lines[5:] == [
        '  graph error: softmax forward+backward: RuntimeError: no',
        '  skipped: original forward+backward: about 9 s a call']


# The command

def test_command(tiny, tmp_path, capsys):
    path = tmp_path / 'bench.json'
    threads = torch.get_num_threads()
    try:
        assert cli.main([
            'bench', '--device', 'cpu', '--only', 'memory', 'sinkhorn', '--threads', '1', '--json', str(path)]) == 0
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert 'timm_sot.sinkhorn' in printed and 'not measured' in printed and '1 of' in printed
    assert json.loads(path.read_text())['about']['threads'] == 1

    assert cli.main(['bench', '--markdown', str(path)]) == 0
    assert capsys.readouterr().out.startswith('| what | on |')


@pytest.mark.parametrize('text', ['', '[]', '{}', '{"about": {}, "rows": []}', '{"about": {}, "rows": {"a": 1}}'])
def test_what_is_no_report(tmp_path, text):
    path = tmp_path / 'x.json'
    path.write_text(text)
    with pytest.raises(bench.UserError, match='x.json is not a report of timm-sot bench --json: .'):
        bench.load_reports([str(path)])


@pytest.mark.parametrize('args, message', [
    (['--device', 'nonsense'], "device 'nonsense'"),
    (['--device', 'meta'], 'cpu and cuda'),
    (['--only', 'everything'], 'everything'),
    (['--dtype', 'int8'], 'int8'),
    (['--threads', '0'], '--threads: must be at least 1'),
    (['--json', 'no/such/folder/x.json'], 'no/such/folder/x.json cannot be written'),
    (['--markdown', 'no/such.json'], 'no/such.json is not a report'),
    (['--markdown', __file__], 'is not a report'),
    pytest.param(['--device', 'cuda'], "device 'cuda' cannot be used", marks=pytest.mark.skipif(
        torch.cuda.is_available(), reason='there is a GPU')),
])
def test_user_errors(tiny, capsys, args, message):
    assert cli.main(['bench', *args]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count('\n') == 1 and not printed.out


def test_without_its_extra(tiny, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'tqdm', None)
    assert cli.main(['bench']) == 2
    message = "this needs the package tqdm; install it with: pip install 'timm-sot[bench]'"
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count('\n') == 1 and not printed.out
