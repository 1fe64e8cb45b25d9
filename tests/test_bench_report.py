""" Reports of the bench: tables and bars of made-up rows """
import re

import pytest

from timm_sot import errors
from timm_sot.bench import report as reports
from timm_sot.bench.contenders import BATCH, TRAIN

from bench_rows import fake_report, fake_row


def test_bars_without_measurements():
    rows = reports.bar_rows([fake_report()])
    assert len(rows) == len(reports.BARS) == 8
    assert {row['state'] for row in rows} == {'not measured'} and not any(row['measured'] for row in rows)
    for markdown in (False, True):
        assert reports.bar_table([fake_report()], markdown).count('not measured') == 8


def test_bars():
    step = ('step', f'batch {BATCH} float32', 'training step')
    core = ('core', reports.CPU_CORE, TRAIN)
    cpu = fake_report(
        fake_row(*core, 'softmax', 'softmax', call=[10., 10., 20.]),
        fake_row(*core, 'sot_qk', 'softmax', call=[15., 14., 20.]),
        fake_row(*core, 'original', 'softmax', call=120.),
        fake_row(*step, 'cct_2', call=100.), fake_row(*step, 'cct_2_sot_qk', call=111.),
        fake_row('memory', 'saved for backward 1 float32', '', 'sot_qk iters=1', bytes=100),
        fake_row('memory', 'saved for backward 1 float32', '', 'sot_qk iters=100', bytes=125))
    states = [(row['measured'], row['state']) for row in reports.bar_rows([cpu])]
    assert states == [
        ('1.40x (1.20-1.45, n = 3)', 'met'), ('8.00x faster (8.00-8.00, n = 1)', 'not met'),
        ('1.11x (1.11-1.11, n = 1)', 'not met'), ('1.25x', 'met'),
        *[('', 'not measured')] * 4]

    quick = {**cpu, 'about': {**cpu['about'], 'quick': True}}
    assert [row['state'] for row in reports.bar_rows([quick])][:4] == [
        'met, in few rounds', 'not met, in few rounds', 'not met, in few rounds', 'met']

    core = ('core', reports.CUDA_CORE, TRAIN)
    cuda = fake_report(
        fake_row(*core, 'sdpa', 'sdpa', call=1., graph=0.5), fake_row(*core, 'sot_qk', 'sdpa', call=1.2, graph=0.8),
        fake_row('memory', 'peak 1 bfloat16', '', 'sdpa', bytes=100),
        fake_row('memory', 'peak 1 bfloat16', '', 'sot_qk', error='OutOfMemoryError: no'),
        fake_row('memory', 'one step', '', 'sot_qk N=16384', N=16384, bytes=1),
        fake_row('memory', 'one step', '', 'sot_qk N=32768', N=32768, bytes=1),
        fake_row('memory', 'one step', '', 'sot_qk N=65536', error='OutOfMemoryError: no'), device_type='cuda')
    rows = reports.bar_rows([cpu, cuda])
    assert [(row['measured'], row['state']) for row in rows[4:]] == [
        ('1.20x call (1.20-1.20, n = 1), 1.60x graph (1.60-1.60, n = 1)', 'not met'),
        ('', 'not measured'), ('', 'not measured'), ('32,768', 'met')]
    assert rows[0]['on'] == 'a cpu' and rows[4]['on'] == 'a cuda' and rows[5]['on'] == 'CUDA'
    markdown = reports.bar_table([cpu, cuda], markdown=True).splitlines()
    assert markdown[1] == '| --- | --- | --- | --- | --- | --- |'
    assert markdown[2].endswith('| 1.40x (1.20-1.45, n = 3) | met |')
    assert sum(line.startswith('| ') for line in markdown) == 10


def test_limits_are_those_that_are_shown():
    for bar in reports.BARS:
        number, = re.findall(r'[\d.,]+', bar.bar)
        assert bar.limit == float(number.replace(',', '')) and bar.at_least == (not bar.bar.startswith('<='))


def test_a_busy_machine_is_mentioned():
    report = fake_report()
    assert 'busy' not in reports.bar_table([report])
    report['about']['load'] = 1.5
    assert 'busy' in reports.bar_table([report])


def test_table_of_a_fake_cuda_run():
    core = ('core', 'x', TRAIN)
    lines = reports.format_report(fake_report(
        fake_row(*core, 'sdpa', 'sdpa', call=2., graph=1.), fake_row(*core, 'sot_qk', 'sdpa', call=3., graph=1.25),
        fake_row(*core, 'softmax', 'sdpa', call=4., graph_error='RuntimeError: no'),
        fake_row(*core, 'original', 'sdpa', skipped='about 9 s a call'))).splitlines()[2:]
    assert lines[0].split() == 'core x forward+backward, n = 1 ratio as CUDA graph ratio'.split()
    assert lines[2].split() == ['sot_qk', '3', '(3-3)', '1.50', '1.25', '(1.25-1.25)', '1.25']
    assert lines[3].endswith('2.00   error') and lines[4].split() == ['original', 'skipped']
    assert lines[5:] == [
        '  graph error: softmax forward+backward: RuntimeError: no',
        '  skipped: original forward+backward: about 9 s a call']


@pytest.mark.parametrize('text', ['', '[]', '{}', '{"about": {}, "rows": []}', '{"about": {}, "rows": {"a": 1}}'])
def test_what_is_no_report(tmp_path, text):
    path = tmp_path / 'x.json'
    path.write_text(text)
    with pytest.raises(errors.UserError, match='x.json is not a report of timm-sot bench --json: .'):
        reports.load_reports([str(path)])
