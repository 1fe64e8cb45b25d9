""" The report of a study: tables in Markdown and figures, from the lines of its runs alone

Runs are compared within a section only, see sections.py.
"""
import json
import os
import re
import shlex
from functools import partial
from statistics import fmean
from typing import Any, Callable, Dict, List, Sequence, Tuple

from . import figures
from ..errors import UserError
from .data import HELD_OUT
from .original import ROWS, SWEEP
from .sections import Section, Sweep, count, find_sweeps, read_sources, results_path, split
from .statistics import paired
from .store import write_file
from .tables import (
    control_row,
    format_attention,
    format_controls,
    format_tables,
    preset_rows,
    published,
    shorten,
)

__all__ = ['write_report']

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


def write_report(
        sources: Sequence[str],
        out: str = '',
        baseline: str = '',
) -> str:
    """Write report.md and its figures.

    Args:
        sources: Folders of studies, or their results.jsonl. They are not changed.
        out: Folder to write to, '' for the first of the sources.
        baseline: The row that the others are compared with, as reports and logs call it (model key=value ...); '' for
            the one that gave the runs of the first source their initial values.

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
            parts.extend(describe(section, baseline or first, save))
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
    parts.append(format_controls(section))
    parts.extend(draw(section, baseline, sweeps, [*originals, *others], save))
    ends = [sweep.rows[value] for sweep in sweeps for value in (min(sweep.rows), max(sweep.rows))]
    parts.append(format_attention(section, list(dict.fromkeys([baseline, *originals, *others, *ends]))))
    parts.append(format_missing(section, baseline))
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
        figure = figures.differences(
            {labels[row]: diff for row, diff in compared.items()}, labels[baseline], original)
        parts.append(save(figure, 'differences', (
            f'Paired differences to `{labels[baseline]}` after the last epoch, with 95 % intervals.{common}')))
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


def format_missing(section: Section, baseline: str) -> str:
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
        name = control_row(section, row)
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


def plain(value: Any) -> str:
    return ' '.join(map(str, value)) if isinstance(value, list) else str(value)


def listed(rows: Sequence[str]) -> str:
    """Rows by name, or their number where they are more than the original experiment had."""
    return ', '.join(rows) if len(rows) <= len(ROWS) else f'{len(rows)} rows'


def unique(values) -> List[str]:
    return list(dict.fromkeys(values))
