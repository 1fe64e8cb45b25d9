""" Reports: their files, their tables, and the bars that they are held against """
import json
import os
from typing import Any, Callable, Dict, List, NamedTuple, Sequence, Tuple

from ..errors import UserError, one_line
from .contenders import BATCH, TRAIN
from .timing import quartiles

__all__ = ['bar_rows', 'bar_table', 'format_report', 'load_reports', 'save_report']


def save_report(report: Dict[str, Any], path: str) -> None:
    """Write the report as JSON, leaving an older file in place until it is complete."""
    with open(f'{path}.part', 'w') as f:
        json.dump(report, f, indent=1)
    os.replace(f'{path}.part', path)


def load_reports(paths: Sequence[str]) -> List[Dict[str, Any]]:
    """Read what `save_report` wrote."""
    reports = []
    for path in paths:
        try:
            with open(path) as f:
                report = json.load(f)
            bar_table([report])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(f'{path} is not a report of timm-sot bench --json: {one_line(e)}') from e
        reports.append(report)
    return reports


# Bars

class Bar(NamedTuple):
    """A bar to clear; `measure` finds its values in a report, of which the worst counts."""
    what: str
    on: str  # device type, '' for any
    bar: str
    aim: str
    limit: float
    at_least: bool
    unit: str
    measure: Callable[[Dict[str, Any]], List['Measured']]


class Measured(NamedTuple):
    """A value, and how it was got where there is more than one way."""
    value: float
    how: str = ''
    spread: str = ''


def find(report: Dict[str, Any], section: str, case: str, contender: str, phase: str = '') -> Dict[str, Any]:
    """The row, an empty one where there is none."""
    return next((
        row for row in report['rows']
        if (row['section'], row['case'], row['contender'], row['phase']) == (section, case, contender, phase)), {})


def ratio_of(times: Dict[str, Any], base: Dict[str, Any]) -> Tuple[float, float, float, int]:
    """Quartiles of the ratios in the rounds, and how many these are."""
    ratios = [a / b for a, b in zip(times['samples_ms'], base['samples_ms'])]
    return (*quartiles(ratios), len(ratios))


def times_ratio(section: str, case: str, phase: str, contender: str, baseline: str):
    """Time of the contender over that of the baseline, called and as a graph."""
    def measure(report):
        one, other = (find(report, section, case, name, phase) for name in (contender, baseline))
        values = []
        for kind in ('call', 'graph'):
            if kind in one and kind in other:
                q25, median, q75, n = ratio_of(one[kind], other[kind])
                values.append(Measured(median, kind, f'{q25:.2f}-{q75:.2f}, n = {n}'))
        return values
    return measure


def bytes_ratio(case: str, contender: str, baseline: str):
    """The same of bytes; `case` is how the row's begins, the dtype follows."""
    def measure(report):
        cases = {row['case'] for row in report['rows'] if row['case'].startswith(case)}
        rows = [[find(report, 'memory', full, name) for name in (contender, baseline)] for full in cases]
        return [Measured(one['bytes'] / other['bytes']) for one, other in rows if 'bytes' in one and other.get('bytes')]
    return measure


def largest_trained(report: Dict[str, Any]) -> List[Measured]:
    """Tokens of the longest sequence that was trained."""
    trained = [row['N'] for row in report['rows'] if 'N' in row]
    return [Measured(max(trained))] if trained else []


CPU_CORE, CUDA_CORE = '128x2x64x64 float32', '1024x2x64x64 bfloat16'
BARS = (
    Bar(f'attention core {TRAIN}, sot_qk, {CPU_CORE}, against eager softmax', 'cpu', '<= 2.0x', '1.3x', 2., False, 'x',
        times_ratio('core', CPU_CORE, TRAIN, 'sot_qk', 'softmax')),
    Bar('the same against the original form at 10 iterations', 'cpu', '>= 10x faster', '20x', 10., True, 'x faster',
        times_ratio('core', CPU_CORE, TRAIN, 'original', 'sot_qk')),
    Bar('training step of cct_2_sot_qk against cct_2, batch 128', 'cpu', '<= 1.10x', '1.03x', 1.10, False, 'x',
        times_ratio('step', f'batch {BATCH} float32', 'training step', 'cct_2_sot_qk', 'cct_2')),
    Bar('bytes saved for backward at N = 1024, 100 iterations against 1', '', '<= 1.25x', '1.1x', 1.25, False, 'x',
        bytes_ratio('saved for backward', 'sot_qk iters=100', 'sot_qk iters=1')),
    Bar(f'attention core {TRAIN}, sot_qk, {CUDA_CORE}, against SDPA', 'cuda', '<= 1.5x', '1.1x', 1.5, False, 'x',
        times_ratio('core', CUDA_CORE, TRAIN, 'sot_qk', 'sdpa')),
    Bar('training step of cct_2_sot_qk under AMP against cct_2', 'cuda', '<= 1.05x', '1.0x', 1.05, False, 'x',
        times_ratio('step', f'batch {BATCH} bfloat16 AMP', 'training step', 'cct_2_sot_qk', 'cct_2')),
    Bar('N = 4096, 8 heads, batch 8: peak memory against SDPA', 'cuda', '<= 2x', '1.2x', 2., False, 'x',
        bytes_ratio('peak', 'sot_qk', 'sdpa')),
    Bar('largest N trained on one GPU with sot_qk', 'cuda', '16,384', '65,536', 16384, True, '', largest_trained),
)


def bar_rows(reports: Sequence[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """Each bar with what the first report that measured it says: `values`, and `state` met, not met or not measured."""
    rows = []
    for bar in BARS:
        measured = ((report, bar.measure(report)) for report in reports
                    if bar.on in ('', report['about']['device_type']))
        report, values = next(((report, values) for report, values in measured if values), (None, []))
        row = {'what': bar.what, 'on': bar.on.upper() or 'any', 'bar': bar.bar, 'aim': bar.aim}
        row['values'] = {how: value for value, how, _ in values}
        if values:
            worst = (min if bar.at_least else max)(row['values'].values())
            met = worst >= bar.limit if bar.at_least else worst <= bar.limit
            few = ', in few rounds' if report['about']['quick'] and any(spread for _, _, spread in values) else ''
            row.update(on=report['about']['device'], state=('met' if met else 'not met') + few, measured=', '.join(
                (f'{value:.2f}{bar.unit}' if bar.unit else f'{value:,}')
                + (f' {how}' if len(values) > 1 else '') + (f' ({spread})' if spread else '')
                for value, how, spread in values))
        else:
            row.update(state='not measured', measured='')
        rows.append(row)
    return rows


def bar_table(reports: Sequence[Dict[str, Any]], markdown: bool = False) -> str:
    """The bars and whether they are met, with the machine of the numbers under them."""
    head = ('what', 'on', 'bar', 'aim', 'measured', '')
    cells = [
        (row['what'], row['on'], row['bar'], row['aim'], row['measured'], row['state']) for row in bar_rows(reports)]
    if markdown:
        lines = [f'| {" | ".join(line)} |' for line in (head, ('---',) * len(head), *cells)]
    else:
        lines = aligned([head, *cells])
    return '\n'.join([*lines, '', *(describe(report) for report in reports)])


def describe(report: Dict[str, Any]) -> str:
    """Where a report comes from, and whether it was a good place."""
    about = report['about']
    parts = [about['device'], f'{about["threads"]} of {about["cores"]} CPU threads']
    if about['load'] is not None:
        parts.append(f'load {about["load"]:.1f} at the start')
    parts += [f'{name} {version}' for name, version in about['versions'].items() if version not in (None, 'none')]
    parts += [f'commit {about["commit"]}'] if about['commit'] else []
    parts += [about['date'][:10], '--quick'] if about['quick'] else [about['date'][:10]]
    line = ', '.join(parts)
    if about['load'] is not None and about['load'] > about['cores'] / 2:
        line += '\nThe processor was busy with something else: times, and ratios too, differ on an idle one.'
    return line


# Tables

def format_report(report: Dict[str, Any]) -> str:
    """Times with their ratios, and memory."""
    lines = ['Milliseconds: median (first to third quartile) of n interleaved rounds; ratio: median over rounds.', '']
    for section, case in dict.fromkeys((row['section'], row['case']) for row in report['rows']):
        rows = [row for row in report['rows'] if (row['section'], row['case']) == (section, case)]
        if section == 'memory':
            continue
        phases = sorted({row['phase'] for row in rows})
        names = dict.fromkeys(row['contender'] for row in rows)
        kinds = [kind for kind in ('call', 'graph') if any(kind in row for row in rows)] or ['call']
        table = [[f'{section} {case}']]
        for phase in phases:
            timed = [row['call']['samples_ms'] for row in rows if row['phase'] == phase and 'call' in row]
            n = max(map(len, timed), default=0)
            for kind in kinds:
                table[0] += [f'{phase}, n = {n}' if kind == 'call' else 'as CUDA graph', 'ratio']
        for name in names:
            path = next((row['path'] for row in rows if row['contender'] == name and 'path' in row), '')
            line = [f'{name} [{path}]' if path else name]
            for phase in phases:
                row = find(report, section, case, name, phase)
                base = find(report, section, case, row.get('baseline', ''), phase)
                for kind in kinds:
                    line += time_cells(row, base, kind)
            table.append(line)
        lines += [*aligned(table), *reasons(rows), '']
    weighed = [row for row in report['rows'] if row['section'] == 'memory']
    if weighed:
        lines += aligned([['memory', '', 'MiB']] + [
            [row['case'], row['contender'], f'{row["bytes"] / 2 ** 20:,.1f}' if 'bytes' in row else 'error']
            for row in weighed])
        lines += reasons(weighed)
    return '\n'.join(lines).rstrip()


def reasons(rows: Sequence[Dict[str, Any]]) -> List[str]:
    """Why there is nothing in some cells of a table."""
    return [
        f'  {why.replace("_", " ")}: {row["contender"]} {row["phase"]}: {row[why]}'
        for row in rows for why in ('skipped', 'error', 'graph_error') if why in row]


def time_cells(row: Dict[str, Any], base: Dict[str, Any], kind: str) -> Tuple[str, str]:
    """Time and ratio as they stand in a table."""
    if kind not in row:
        missing = ('skipped', 'error') if kind == 'call' else ('graph_error',)
        return next((why.replace('graph_', '') for why in missing if why in row), ''), ''
    times = row[kind]
    ratio = f'{ratio_of(times, base[kind])[1]:.2f}' if kind in base else ''
    median, q25, q75 = (
        f'{times[key]:.3g}' if times[key] < 1000 else f'{times[key]:.0f}' for key in ('median_ms', 'q25_ms', 'q75_ms'))
    return f'{median} ({q25}-{q75})', ratio


def aligned(table: Sequence[Sequence[str]]) -> List[str]:
    """The lines of a table whose columns have one width each."""
    widths = [max(map(len, column)) for column in zip(*table)]
    return ['  '.join(f'{cell:{width}}' for cell, width in zip(line, widths)).rstrip() for line in table]
