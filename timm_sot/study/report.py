""" The report of a study: tables in Markdown and figures, from the lines of its runs alone

Runs are compared within a section only, see sections.py.
"""
import json
import os
import re
import shlex
from functools import partial
from statistics import fmean
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from . import figures
from ..errors import UserError
from .controls import control_of
from .data import HELD_OUT
from .original import ROWS, SWEEP
from .presets import PRESETS, Row
from .sections import Section, Sweep, count, find_sweeps, read_sources, results_path, split
from .statistics import Difference, Summary, decide, holm, paired, summarize
from .store import row_name, write_file

__all__ = ['write_report']

Control = Callable[[str, Dict[str, Any]], Optional[Row]]

ENOUGH = 5  # seeds of a row, for an interval that says something

HOW_TO_READ = '''
## How to read it

- **n** is the number of runs, one for each seed. `±` is the standard deviation over them. 95 % intervals are those of
  Student's t for the mean, each for itself; of one run there is none ("n = 1: no interval"), and none of runs that all
  gave the same number.
- Differences are paired: runs of one seed saw the same batches and augmentations and began, in one study, with the
  values of its first row in the parameters that they share with it. "pairs" counts the seeds that both rows have. Where
  one of them has more, the difference is not that of the two means beside it, which are of all seeds.
- Intervals and p are about other seeds, with these very test images; what other images would do is not in them.
- **p** is that of the paired t-test, two-sided, adjusted by Holm's method for the comparisons of its table alone. Like
  the intervals it takes the differences to be normally distributed, which a few pairs cannot show.
- **Bold** is a difference above zero whose interval does not contain zero *and* whose adjusted p is below 0.05; nothing
  else is. "Below" and "undecided" under a table follow the same two conditions.
- The last epoch is what rows are compared in. The best epoch of a run is chosen on the images that it is then measured
  on, which makes it too high; it is reported beside it and nothing is bold there.
- Loss is the mean cross-entropy of the last epoch on the same images.
'''


class Comparison(NamedTuple):
    """A line of a table."""
    row: str
    summary: Summary
    difference: Optional[Difference]  # None for the baseline, and where there is no pair
    p: Optional[float]  # adjusted


def write_report(
        sources: Sequence[str],
        out: str = '',
        baseline: str = '',
        control: Control = control_of,
) -> str:
    """Write report.md and its figures.

    Args:
        sources: Folders of studies, or their results.jsonl. They are not changed.
        out: Folder to write to, '' for the first of the sources.
        baseline: The row that the others are compared with, as reports and logs call it (model key=value ...); '' for
            the one that gave the runs of the first source their initial values.
        control: From a row, model and arguments, to that of its control, None if it has none.

    Returns:
        The path of the report.

    Raises:
        UserError: If a source holds no finished run, the baseline is none of their rows, or the report cannot be
            written.
    """
    results, notes, first = read_sources(sources)
    sections = split(results)
    rows = list(dict.fromkeys(row for section in sections for row in section.rows))
    if baseline and baseline not in rows:
        raise UserError(f'no finished run of --baseline {baseline!r}; there are: {", ".join(rows)}.')
    words = ['timm-sot', 'study', 'report', *sources]
    words += ['--baseline', baseline] if baseline else []
    words += ['--out', out] if out else []
    out = out or os.path.dirname(results_path(sources[0])) or '.'
    parts = [
        '# Report of a study\n\n'
        f'{count(len(results), "finished run")}. Everything below is computed from their lines in results.jsonl, by\n\n'
        f'```bash\n{shlex.join(words)}\n```\n']
    if notes:
        parts.append('\n'.join(f'- {note}' for note in notes) + '\n')
    try:
        os.makedirs(out, exist_ok=True)
        for number, section in enumerate(sections, 1):
            heading = f'{section.data.rsplit(" ", 2)[0]}, {count(section.epochs, "epoch")}, {section.device}'
            parts.append(f'## {number}. {heading}\n')
            save = partial(save_figure, out, f'-{number}' if number > 1 else '')
            parts.extend(describe(section, baseline or first, control, save))
        parts.append(HOW_TO_READ.strip() + '\n')
        path = os.path.join(out, 'report.md')
        write_file(path, '\n'.join(parts))
    except OSError as e:
        raise UserError(f'cannot write the report to {out}: {e.strerror or e}') from e
    return path


def save_figure(out: str, suffix: str, figure: figures.Figure, name: str, caption: str) -> str:
    """Write a figure; returns what shows it in the report."""
    figure.savefig(os.path.join(out, f'{name}{suffix}.png'), dpi=110)
    return f'![{name}]({name}{suffix}.png)\n\n{caption}\n'


def describe(
        section: Section,
        baseline: str,
        control: Control,
        save: Callable[[figures.Figure, str, str], str],
) -> List[str]:
    """The parts of the report on a section; `save` keeps a figure and returns how the report shows it."""
    parts = [format_header(section, baseline)]
    sweeps = find_sweeps(section)
    originals = [row for row in preset_rows('seed') if row in section.rows] if section.original else []
    swept = {row for sweep in sweeps for row in sweep.rows.values()}
    others = [row for row in section.rows if row not in originals and row not in swept and row != baseline]
    if originals:
        parts.append(format_tables(section, 'The rows of the original experiment', originals, baseline, True))
    for sweep in sweeps:
        title = f'Sweep of `{sweep.argument}`: `{sweep.name}`'
        parts.append(format_tables(section, title, [*sweep.rows.values()], baseline))
    if others or not parts[1:]:
        parts.append(format_tables(section, 'Other rows' if parts[1:] else 'All rows', others, baseline))
    parts.append(format_controls(section, control))
    parts.extend(draw(section, baseline, sweeps, [*originals, *others], save))
    ends = [sweep.rows[value] for sweep in sweeps for value in (min(sweep.rows), max(sweep.rows))]
    parts.append(format_attention(section, list(dict.fromkeys([baseline, *originals, *others, *ends]))))
    parts.append(format_missing(section, baseline, control))
    return [part for part in parts if part]


def draw(
        section: Section,
        baseline: str,
        sweeps: Sequence[Sweep],
        rows: Sequence[str],
        save: Callable[[figures.Figure, str, str], str],
) -> List[str]:
    """The figures of a section."""
    parts = []
    against = section.rows.get(baseline, [])
    shown = [baseline] * bool(against) + [row for row in rows if row != baseline]
    labels, common = shorten(shown, baseline)
    if section.epochs > 1 and (rows or not sweeps):
        figure = figures.learning_curves({labels[row]: section.rows[row] for row in shown}, section.images)
        parts.append(save(figure, 'learning-curves', (
            f'Top-1 after each epoch: mean over seeds, bands ± one standard deviation.{common}')))
    compared = {row: paired(section.rows[row], against, 'final') for row in shown if row != baseline}
    compared = {row: difference for row, difference in compared.items() if difference}
    if compared:
        original = {
            labels[row]: published(row) - published(baseline) for row in compared
            if section.original and published(row) and published(baseline)}
        figure = figures.differences({labels[row]: diff for row, diff in compared.items()}, baseline, original)
        parts.append(save(figure, 'differences', (
            f'Paired differences to `{baseline}` after the last epoch, with 95 % intervals.{common}')))
    for sweep in sweeps:
        differences = {
            value: paired(section.rows[row], against, 'final') for value, row in sweep.rows.items() if row != baseline}
        is_theirs = section.original and sweep.argument == 'sot_reg' and sweep.name in (
            'cct_2_sot_qk sot_tol=0.1', 'cct_2_sot_qkt sot_tol=0.1')
        figure = figures.sweep(
            {value: section.rows[row] for value, row in sweep.rows.items()}, sweep.argument, sweep.name, section.images,
            baseline, against, {value: difference for value, difference in differences.items() if difference},
            {reg: last for reg, (_, last) in SWEEP.items()} if is_theirs else None)
        parts.append(save(figure, re.sub(r'[^\w.]+', '-', f'sweep {sweep.argument} {sweep.name}'), (
            f'`{sweep.name}` over `{sweep.argument}`, top-1 after the last epoch: bands are the mean ± one standard '
            f'deviation over seeds; below, paired differences to `{baseline}` with 95 % intervals.')))
    return parts


def format_header(section: Section, baseline: str) -> str:
    """What the runs of a section have in common, as a list."""
    results = section.results
    recipe = 'recipe not recorded'
    if section.recipe:
        recipe = ', '.join(f'{key} {plain(value)}' for key, value in json.loads(section.recipe).items())
    sizes = re.search(r' (\d+)\+(\d+) ', section.data)
    images = f'{int(sizes[2]):,} {section.images}' if sizes else section.images
    if HELD_OUT in section.data:
        images += ' (held out of the training images; the test images play no part)'
    versions: Dict[str, List[str]] = {}
    for result in results:
        for package, version in result['versions'].items():
            versions.setdefault(package, []).append(version)
    processors = ''
    if any('processor' in result for result in results):
        processors = '; ' + ' and '.join(
            unique(result.get('processor', 'processor not recorded') for result in results))
    commits = ' and '.join(unique(result['commit'] or 'not recorded' for result in results))
    seeds = ', '.join(map(str, sorted({result['seed'] for result in results})))
    lines = [
        f'Measured: top-1 in percent on the {images} of `{section.data}`',
        f'Training: {count(section.epochs, "epoch")}, {recipe}',
        f'Device: {section.device}{processors}',
        f'Runs: {len(results)}, of {count(len(section.rows), "row")}, seeds {seeds}; on average '
        f'{fmean(result["seconds"] for result in results):.0f} s of training and testing, of which runs that trained '
        f'at once have equal shares',
        'Versions: ' + ', '.join(f'{package} {" and ".join(unique(found))}' for package, found in versions.items())
        + f'; commit {commits}',
    ]
    if baseline not in section.rows:
        lines.append(f'No run of `{baseline}` is among them, so there are no differences to it')
    return '\n'.join(f'- {line}' for line in lines) + '\n'


def format_tables(
        section: Section,
        title: str,
        rows: Sequence[str],
        baseline: str,
        with_published: bool = False,
) -> str:
    """The tables of some rows, of the last epoch and of the best."""
    rows = [baseline] * (baseline in section.rows) + [row for row in rows if row != baseline]
    labels, common = shorten(rows, baseline)
    last, best = (compare(section, rows, baseline, key) for key in ('final', 'best'))
    header = ['row', 'n', 'top-1', '95 % interval']
    compared = baseline in rows and len(rows) > 1
    if compared:
        header += [f'minus `{baseline}`', '95 % interval', 'pairs', 'p (Holm)']

    def cells(comparison: Comparison, may_be_bold: bool) -> List[str]:
        line = [f'`{labels[comparison.row]}`', str(comparison.summary.n), format_mean(comparison.summary),
                format_interval(comparison.summary)]
        return line + format_difference(comparison, may_be_bold)[:len(header) - len(line)]

    table = [[*header, 'loss']]
    for comparison in last:
        loss = fmean(result['loss'][-1] for result in section.rows[comparison.row])
        table.append([*cells(comparison, True), f'{loss:.4f}'])
    text = [f'### {title}\n', f'Last epoch.{common}\n', format_table(table)]
    if compared:
        text.append(format_verdict(last, labels, baseline))
    table = [header + ['original, n = 1'] * with_published]
    for comparison in best:
        table.append(cells(comparison, False) + [format_published(comparison.row, baseline)] * with_published)
    text += ['Best epoch, chosen on the images that it is measured on.\n', format_table(table)]
    if with_published:
        brackets = '; in brackets the difference to its own run of the baseline' if compared else ''
        text.append('The last column is what the original experiment published, the best epoch of one run of each row, '
                    f'so without a spread{brackets}.\n')
    return '\n'.join(text)


def compare(section: Section, rows: Sequence[str], baseline: str, key: str) -> List[Comparison]:
    """Rows with their differences to the baseline, the p-values adjusted for them."""
    against = section.rows.get(baseline, [])
    differences = [None if row == baseline else paired(section.rows[row], against, key) for row in rows]
    adjusted = holm([difference.p if difference else None for difference in differences])
    return [Comparison(row, summarize([result[key] for result in section.rows[row]]), difference, p)
            for row, difference, p in zip(rows, differences, adjusted)]


def format_controls(section: Section, control: Control) -> str:
    """The table of variants against their controls, '' if there is none."""
    pairs = [(row, name) for row in section.rows if (name := control_row(section, row, control)) in section.rows]
    if not pairs:
        return ''
    differences = [paired(section.rows[row], section.rows[name], 'final') for row, name in pairs]
    adjusted = holm([difference.p if difference else None for difference in differences])
    table = [['variant', 'top-1', 'control', 'top-1', 'difference', '95 % interval', 'pairs', 'p (Holm)']]
    for (row, name), difference, p in zip(pairs, differences, adjusted):
        mine, theirs = (summarize([result['final'] for result in section.rows[each]]) for each in (row, name))
        table.append([f'`{row}`', format_mean(mine), f'`{name}`', format_mean(theirs),
                      *format_difference(Comparison(row, mine, difference, p), True)])
    return ('### Variants against their controls\n\nA control puts the same scores through softmax. It '
            'lacks the parameters, if any, that only the weights of its variant have. Last epoch.\n\n'
            + format_table(table))


def format_attention(section: Section, rows: Sequence[str]) -> str:
    """The table of what the attention is like, by row and layer, '' where nothing was measured."""
    rows = [row for row in rows if row in section.rows]
    if not any(result.get('common') for row in rows for result in section.rows[row]):
        return ''
    labels, arguments = shorten(rows, rows[0])
    table = [['row', 'runs measured', 'layer', '1 − H / log N, by head', 'common to all queries']]
    for row in rows:
        measured = [result for result in section.rows[row] if 'common' in result]
        runs = f'{len(measured)} of {len(section.rows[row])}'
        layers = measured[0]['entropy'] if measured else ()
        if not layers:
            table.append([f'`{labels[row]}`', runs, '', 'no attention layer' if measured else 'not measured', ''])
        for layer in layers:
            entropies, common = (
                [fmean(values) for values in zip(*(result[key][layer] for result in measured))]
                for key in ('entropy', 'common'))
            table.append([
                f'`{labels[row]}`', runs, f'`{layer}`', ', '.join(map(format_gap, entropies)),
                ', '.join(f'{value:.2f}' for value in common)])
    later = dict.fromkeys(
        result['looked_at'] for row in rows for result in section.rows[row] if 'looked_at' in result)
    note = f' Looked at after the run, from its weights: {"; ".join(later)}.' if later else ''
    return ('### The attention at the end of training\n\n'
            'How far the entropy H of the attention weights over N tokens is from that of uniform weights, log N: 0 is '
            'mean pooling, 1 looks at a single token. And how much of the difference from '
            'uniform weights (sum of squares) all queries have in common: 1 if all look at the same tokens, 0 if every '
            'token is looked at alike, as in a doubly stochastic matrix. Means over queries, up to 512 of the images '
            f'and the runs measured.{arguments}{note}\n\n' + format_table(table))


def format_gap(entropy: float) -> str:
    """1 minus a relative entropy; entropies are stored with nine decimals."""
    return '< 1e-8' if 1 - entropy < 1e-8 else f'{1 - entropy:.2g}'


def control_row(section: Section, row: str, control: Control) -> str:
    """The name of the control of a row, '' if it has none."""
    result = section.rows[row][0]
    found = control(result['model'], result['kwargs'])
    return row_name(*found) if found else ''


def format_missing(section: Section, baseline: str, control: Control) -> str:
    """What was not measured, '' if there is nothing."""
    missing = []
    by_seeds: Dict[Tuple[int, ...], List[str]] = {}
    for row, results in section.rows.items():
        if len(results) < ENOUGH:
            by_seeds.setdefault(tuple(result['seed'] for result in results), []).append(f'`{row}`')
    for seeds, rows in by_seeds.items():
        missing.append(f'n = {len(seeds)} (seed {", ".join(map(str, seeds))}), below {ENOUGH}: {listed(rows)}')
    for preset in ('seed', 'sweep') if section.original else ():
        wanted = preset_rows(preset)
        absent = [f'`{row}`' for row in wanted if row not in section.rows]
        if absent:
            missing.append(f'of the {len(wanted)} rows of `timm-sot study --preset {preset}`: {listed(absent)}')
    if baseline in section.rows:
        seeds = {result['seed'] for result in section.rows[baseline]}
        for row, results in section.rows.items():
            alone = [str(result['seed']) for result in results if result['seed'] not in seeds]
            if alone:
                missing.append(f'`{baseline}` with seed {", ".join(alone)}, to compare with `{row}`')
    for row in section.rows:
        name = control_row(section, row, control)
        if name and name not in section.rows:
            missing.append(f'`{name}`, the control of `{row}`')
    unmeasured = sum('common' not in result for result in section.results)
    if unmeasured:
        missing.append(f'the attention of {count(unmeasured, "run")}')
    if not missing:
        return ''
    return ('### What is missing\n\n' + ''.join(f'- {item}\n' for item in missing)
            + f'\nRuns that are missing are to be made on {section.device}: those of another device are not compared '
            f'with these.\n')


def preset_rows(preset: str) -> List[str]:
    """The rows of a preset by name."""
    return [row_name(model, kwargs) for model, kwargs in PRESETS[preset].rows]


def published(row: str) -> Optional[float]:
    """The top-1 that the original experiment published of a row of the preset."""
    return {row_name(model, kwargs): ROWS[model] for model, kwargs in PRESETS['seed'].rows}.get(row)


def shorten(rows: Sequence[str], baseline: str) -> Tuple[Dict[str, str], str]:
    """Rows by shorter names, without the arguments that all but the baseline share, and a sentence that says so."""
    words_of = {row: re.split(r' (?=\w+=)', row) for row in rows if row != baseline}
    others = [*words_of.values()]
    shared = [word for word in others[0][1:] if all(word in words for words in others)] if len(others) > 1 else []
    labels = {row: ' '.join(word for word in words if word not in shared) for row, words in words_of.items()}
    if not shared or len({*labels.values(), baseline}) <= len(labels):  # two of one name
        return {row: row for row in rows}, ''
    but = f' but `{baseline}`' if baseline in rows else ''
    return {row: labels.get(row, row) for row in rows}, f' All rows{but} with `{" ".join(shared)}`.'


def format_mean(summary: Summary) -> str:
    return f'{summary.mean:.2f}' + (f' ± {summary.sd:.2f}' if summary.sd is not None else '')


def format_interval(summary: Summary, number: Callable[[float], str] = '{:.2f}'.format) -> str:
    if summary.low is None:
        return 'n = 1: no interval' if summary.n == 1 else 'all the same: no interval'
    return f'{number(summary.low)} to {number(summary.high)}'


def format_difference(comparison: Comparison, may_be_bold: bool) -> List[str]:
    """Cells of a difference: mean, interval, pairs, p."""
    difference = comparison.difference
    if difference is None:
        return ['', '', '', '']
    mean = signed(difference.summary.mean)
    if may_be_bold and decide(difference, comparison.p) > 0:
        mean = f'**{mean}**'
    return [mean, format_interval(difference.summary, signed), str(difference.summary.n), format_p(comparison.p)]


def format_verdict(comparisons: Sequence[Comparison], labels: Mapping[str, str], baseline: str) -> str:
    """Which rows are above the baseline, which below it, and which neither."""
    groups: Dict[int, List[str]] = {1: [], -1: [], 0: []}
    for comparison in comparisons:
        if comparison.row != baseline:
            groups[decide(comparison.difference, comparison.p)].append(f'`{labels[comparison.row]}`')
    above, below, undecided = (', '.join(groups[sign]) or 'none' for sign in (1, -1, 0))
    return f'Above `{baseline}`: {above}. Below: {below}. Undecided: {undecided}.\n'


def format_published(row: str, baseline: str) -> str:
    value, reference = published(row), published(baseline)
    if value is None:
        return ''
    return f'{value:.2f}' + (f' ({signed(value - reference)})' if reference is not None and row != baseline else '')


def signed(value: float) -> str:
    """A number with its sign, of which zero has none."""
    text = f'{value:+.2f}'
    return text[1:] if float(text) == 0 else text.replace('-', '−')


def format_p(p: Optional[float]) -> str:
    return '–' if p is None else '< 0.001' if p < 0.001 else f'{p:.3g}'


def format_table(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table of a header and lines."""
    rule = ['---'] * len(lines[0])
    return ''.join(
        '| ' + ' | '.join(cell.replace('|', r'\|') for cell in line) + ' |\n' for line in (lines[0], rule, *lines[1:]))


def plain(value: Any) -> str:
    return ' '.join(map(str, value)) if isinstance(value, list) else str(value)


def listed(rows: Sequence[str]) -> str:
    """Rows by name, or their number where they are more than the original experiment had."""
    return ', '.join(rows) if len(rows) <= len(ROWS) else f'{len(rows)} rows'


def unique(values) -> List[str]:
    return list(dict.fromkeys(values))
