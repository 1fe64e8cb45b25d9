""" The whole bench, and its command """
import json

import pytest
import torch

from timm_sot import cli
from timm_sot.attention import VARIANTS
from timm_sot.bench import contenders, memory, runner
from timm_sot.bench.contenders import FORWARD, TRAIN
from timm_sot.bench.report import bar_rows, format_report, load_reports, save_report
from timm_sot.bench.timing import ROUNDS
from timm_sot.errors import UserError

from bench_rows import fake_report

CPU = torch.device('cpu')


@pytest.fixture
def tiny(monkeypatch):
    """The whole bench on shapes that take no time."""
    monkeypatch.setattr(runner, 'CORE_SHAPES', {'cpu': ((2, 1, 64), (1, 1, 24))})
    monkeypatch.setattr(runner, 'SINKHORN_SHAPES', {'cpu': ((2, 8),)})
    monkeypatch.setattr(runner, 'SECONDS', 0.)
    monkeypatch.setattr(memory, 'SAVED_SHAPE', (1, 1, 32))
    monkeypatch.setattr(contenders, 'BATCH', 2)


@pytest.fixture
def report(tiny):
    return runner.run_bench(CPU)


def test_report(report, tmp_path):
    path = tmp_path / 'report.json'
    save_report(report, str(path))
    assert json.loads(path.read_text()) == report == load_reports([str(path)])[0]
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
            assert len(row['call']['samples_ms']) >= ROUNDS[0]

    timed = {(row['section'], row['case'], row['phase'], row['contender']) for row in report['rows'] if 'call' in row}
    for phase in (FORWARD, TRAIN):
        for name in ('sdpa', 'softmax', 'sot_qk', 'sot_qkt', 'sot_q_nosoftmax', 'original', 'original tol=0.1'):
            assert ('core', '2x1x64x64 float32', phase, name) in timed
        assert ('core', '1x1x24x64 float32', phase, 'sot_qkt') not in timed  # N is not the head width
        assert ('sinkhorn', '2x8x8 float32', phase, 'timm_sot.sinkhorn') in timed
    assert ('step', 'batch 2 float32', 'training step', 'cct_2_sot_qkt') in timed

    path, = {row['path'] for row in report['rows'] if row['contender'] == 'sot_qk' and row['section'] == 'core'}
    printed = format_report(report)
    assert f'sot_qk [{path}]' in printed
    for text in ('core 2x1x64x64 float32', 'original tol=0.1', 'cct_2_sot_q_nosoftmax', 'needs CUDA'):
        assert text in printed


def test_cores_are_those_that_may_be_used(monkeypatch):
    """As of a container, or under taskset."""
    monkeypatch.setattr(runner, 'available_cores', lambda: 7)
    assert runner.about(CPU)['cores'] == 7


@pytest.mark.parametrize('device', ['cpu', 'cuda'])
def test_every_variant_is_timed_at_every_size(device, monkeypatch):
    made = []
    monkeypatch.setattr(runner, 'core_group', lambda *args: made.append((args[2], args[3], args[-1])) or args)
    runner.groups_of(['core'], torch.float32, torch.device(device), False)
    assert {N for N, _, _ in made} == {64, 196, 256, 1024, 4096} and {phase for _, phase, _ in made} == {TRAIN, FORWARD}
    for _, _, variants in made:
        assert set(variants) == set(VARIANTS) - {'softmax'}


@pytest.mark.parametrize('device, dtype', [('cpu', torch.float32), ('cuda', torch.bfloat16)])
@pytest.mark.parametrize('quick', [True, False])
def test_the_bars_are_among_what_is_timed(device, dtype, quick):
    groups = runner.groups_of(runner.SECTIONS, dtype, torch.device(device), quick)
    report = {
        'about': {'device_type': device, 'device': device, 'quick': quick},
        'rows': [
            {'section': group.section, 'case': group.case, 'phase': group.phase, 'contender': contender,
             'call': {'samples_ms': [1.]}}
            for group in groups
            for contender in ('softmax', 'sdpa', 'original', 'sot_qk', 'cct_2', 'cct_2_sot_qk')]}
    measured = [row['what'] for row in bar_rows([report]) if row['state'] != 'not measured']
    expected = {'cpu': ('eager softmax', 'original form', 'batch 128'), 'cuda': ('against SDPA', 'under AMP')}[device]
    assert len(measured) == len(expected) and all(words in what for words, what in zip(expected, measured)), measured


def test_sections(tiny):
    seen = []
    report = runner.run_bench(CPU, torch.bfloat16, True, ['memory'], lambda report: seen.append(len(report['rows'])))
    assert {row['section'] for row in report['rows']} == {'memory'}
    assert seen == [1, 2]
    assert 'bfloat16' in report['rows'][0]['case'] and report['about']['quick']


@pytest.mark.slow
def test_what_the_bars_need_comes_first(tiny, monkeypatch):
    """A run may be cut short."""
    def row(**what):
        return dict(dict(section='', case='', phase='', baseline='', contender=''), **what)

    monkeypatch.setattr(runner, 'time_group', lambda group, *args: [row(section=group.section)])
    monkeypatch.setattr(runner, 'memory_rows', lambda *args: iter([row(section='memory', case=case) for case in 'ab']))
    rows = runner.run_bench(CPU)['rows']
    assert [row['section'] for row in rows[:4]] == ['core', 'step', 'memory', 'memory'] and len(rows) > 6
    only = runner.run_bench(CPU, sections=['memory'])['rows']
    assert [row['case'] for row in only] == ['a', 'b']


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


def test_options_arrive(monkeypatch):
    asked = []
    monkeypatch.setattr(runner, 'run_bench', lambda *args, **kwargs: asked.append(args) or fake_report())
    assert cli.main(['bench', '--device', 'cpu']) == 0
    assert cli.main(['bench', '--device', 'cpu', '--dtype', 'bfloat16', '--quick', '--only', 'step', 'core']) == 0
    assert asked == [(CPU, None, False, [*runner.SECTIONS]), (CPU, torch.bfloat16, True, ['step', 'core'])]


@pytest.mark.parametrize('args, message', [
    (['--device', 'nonsense'], "device 'nonsense'"),
    (['--device', 'meta'], "device 'meta' cannot be used"),
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


def test_other_devices_are_refused():
    with pytest.raises(UserError, match='cpu and cuda'):
        runner.run_bench(torch.device('mps'))
