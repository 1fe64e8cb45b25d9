""" The tables of a report, in Markdown """
import re
from statistics import fmean
from typing import Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from .controls import control_of
from .original import ROWS
from .presets import PRESETS
from .sections import Section
from .statistics import Difference, Summary, decide, holm, paired, summarize
from .store import row_name

__all__ = [
    'control_row',
    'format_attention',
    'format_controls',
    'format_tables',
    'preset_rows',
    'published',
    'shorten',
]


class Comparison(NamedTuple):
    """A line of a table."""
    row: str
    summary: Summary
    difference: Optional[Difference]  # None for the baseline, and where there is no pair
    p: Optional[float]  # adjusted


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
        header += [f'minus `{labels[baseline]}`', '95 % interval', 'pairs', 'p (Holm)']

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


def format_controls(section: Section) -> str:
    """The table of variants against their controls, '' if there is none."""
    pairs = [(row, name) for row in section.rows if (name := control_row(section, row)) in section.rows]
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


def control_row(section: Section, row: str) -> str:
    """The name of the control of a row, '' if it has none."""
    result = section.rows[row][0]
    found = control_of(result['model'], result['kwargs'])
    return row_name(*found) if found else ''


def preset_rows(preset: str) -> List[str]:
    """The rows of a preset by name."""
    return [row_name(model, kwargs) for model, kwargs in PRESETS[preset].rows]


def published(row: str) -> Optional[float]:
    """The top-1 that the original experiment published of a row of the preset."""
    return {row_name(model, kwargs): ROWS[model] for model, kwargs in PRESETS['seed'].rows}.get(row)


def shorten(rows: Sequence[str], baseline: str) -> Tuple[Dict[str, str], str]:
    """Rows by shorter names, without the arguments that all of them share, or all but the baseline, and a sentence that
    says so.
    """
    words_of = {row: re.split(r' (?=\w+=)', row) for row in rows}
    others = [words for row, words in words_of.items() if row != baseline]
    shared = [word for word in others[0][1:] if all(word in words for words in others)] if len(others) > 1 else []
    labels = {row: ' '.join(word for word in words if word not in shared) for row, words in words_of.items()}
    but = ''
    if baseline in rows and not set(shared) <= set(words_of[baseline]):
        labels[baseline] = baseline
        but = f' but `{baseline}`'
    names = {*labels.values(), labels.get(baseline, baseline)}
    if not shared or len(names) < len({*rows, baseline}):  # two of one name
        return {row: row for row in rows}, ''
    return labels, f' All rows{but} with `{" ".join(shared)}`.'


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
    return f'Above `{labels[baseline]}`: {above}. Below: {below}. Undecided: {undecided}.\n'


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
