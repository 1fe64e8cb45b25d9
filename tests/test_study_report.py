""" The report of a study """
import re
import shlex
import shutil
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image
from study_lines import (
    BASELINE,
    BETTER,
    HELD_OUT_DATA,
    HIGHER,
    RECIPE,
    SOT,
    SWEEP,
    WORSE,
    make_line,
    make_row,
    write,
)

from timm_sot.cli import main
from timm_sot.errors import UserError
from timm_sot.study import figures, report, tables as tables_module
from timm_sot.study.presets import PRESETS
from timm_sot.study.statistics import paired


@pytest.fixture
def drawn():
    """Figures are drawn, not just made."""


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    if 'drawn' not in request.fixturenames:
        monkeypatch.setattr(Figure, 'savefig', lambda figure, path, **kwargs: Path(path).touch())


def written(folder, **kwargs):
    return Path(report.write_report([str(folder)], **kwargs)).read_text()


def tables(text):
    """Tables by the heading before them, as lists of dictionaries, and lists of their cells."""
    found, heading = {}, ''
    for block in re.split(r'\n\n|\n(?=\|)(?<!\|\n)', text):
        if block.startswith('#'):
            heading = block.lstrip('# ')
        elif block.startswith('| '):
            lines = [[cell.strip() for cell in line[2:-2].split(' | ')] for line in block.splitlines()]
            found.setdefault(heading, []).append(lines)
    return found


def table(text, heading, number=0):
    """Lines of a table by their first cell."""
    header, _, *lines = tables(text)[heading][number]
    assert [line[0] for line in lines] == [*dict.fromkeys(line[0] for line in lines)]
    return {line[0].strip('`'): line for line in lines}


def test_numbers(tmp_path):
    write(tmp_path, BASELINE + BETTER + HIGHER + WORSE)
    rows = table(written(tmp_path), 'Other rows')
    assert [*rows] == ['cct_2', 'better', 'higher', 'worse']
    # mean and standard deviation by hand: deviations 0.24, -0.46, 0.04, 0.44, -0.26
    assert rows['cct_2'] == ['`cct_2`', '5', '76.06 ± 0.36', '75.61 to 76.51', '', '', '', '', '1.0000']
    # differences 0.8, 1.1, 0.9, 1.1, 1.1: mean 1, sd 0.1414, 2.776 sd / sqrt(5) = 0.176; t = 15.81
    assert rows['better'][4:8] == ['**+1.00**', '+0.82 to +1.18', '5', '< 0.001']
    assert 'on average 22 s of training' in written(tmp_path)
    assert rows['worse'][4].startswith('−2.1') and float(rows['worse'][7].removeprefix('< ')) < 0.05
    text = written(tmp_path)
    assert 'Above `cct_2`: `better`. Below: `worse`. Undecided: `higher`.' in text
    assert 'All rows but `cct_2` with `sot_reg=0.1 sot_tol=0.1`.' in text


def test_baseline_with_the_arguments_of_all(tmp_path, monkeypatch):
    """It goes by as short a name as the rows."""
    called = []
    monkeypatch.setattr(
        figures, 'differences', lambda compared, baseline, original: called.append((*compared, baseline)) or Figure())
    write(tmp_path, [{**result, 'kwargs': SOT} for result in BASELINE] + BETTER + HIGHER)
    text = written(tmp_path, baseline='cct_2 sot_reg=0.1 sot_tol=0.1')
    header, _, first, *_ = tables(text)['All rows'][0]
    assert (header[4], first[0]) == ('minus `cct_2`', '`cct_2`')
    assert 'Above `cct_2`: `better`. Below: none. Undecided: `higher`.' in text
    assert 'Paired differences to `cct_2` after' in text and called == [('better', 'higher', 'cct_2')]
    assert text.count('All rows with `sot_reg=0.1 sot_tol=0.1`.') == 3


def bold_cells(text):
    found = [lines for lists in tables(text).values() for lines in lists]
    return [cell for lines in found for line in lines for cell in line if '**' in cell]


def test_bold(tmp_path):
    """One of the four differences, in the table of the last epoch and not in that of the best."""
    write(tmp_path, BASELINE + BETTER + HIGHER + WORSE)
    text = written(tmp_path)
    assert bold_cells(text) == ['**+1.00**']
    assert table(text, 'Other rows')['higher'][4] == '+1.24'
    assert table(text, 'Other rows', 1)['better'][4] == '+1.00'


def test_never_bold_where_holm_does_not_reject(tmp_path):
    """The same row, above zero with its interval, is bold alone and not among nine others."""
    finals = [result['final'] + d for result, d in zip(BASELINE, (0.3, 0.9, 0.5, 1.3, 0.2))]
    row = make_row('row', SOT, finals)
    others = [line for k in range(9) for line in make_row(f'other{k}', SOT, [result['final'] for result in HIGHER])]
    write(tmp_path / 'alone', BASELINE + row)
    write(tmp_path / 'among', BASELINE + row + others)
    alone, among = (written(tmp_path / name) for name in ('alone', 'among'))
    assert len(bold_cells(alone)) == 1 and bold_cells(among) == []
    interval = table(among, 'Other rows')['row'][5]
    assert interval.startswith('+0.0') and not interval.startswith('+0.00')


def test_one_run(tmp_path):
    write(tmp_path, BASELINE + BETTER[2:3])
    row = table(written(tmp_path), 'Other rows')['better sot_reg=0.1 sot_tol=0.1']
    assert row[1:8] == ['1', '77.00', 'n = 1: no interval', '+0.90', 'n = 1: no interval', '1', '–']


def test_missing_seeds(tmp_path):
    write(tmp_path, BASELINE[:3] + BETTER[1:])
    text = written(tmp_path)
    row = table(text, 'Other rows')['better sot_reg=0.1 sot_tol=0.1']
    assert row[1] == '4' and row[6] == '2'
    assert row[4] == '+1.00'  # seeds 1 and 2: 1.1 and 0.9
    assert '- `cct_2` with seed 3, 4, to compare with `better sot_reg=0.1 sot_tol=0.1`\n' in text
    assert '- n = 3 (seed 0, 1, 2), below 5: `cct_2`\n' in text and 'n = 4 (seed 1, 2, 3, 4), below 5: `better' in text
    assert 'are to be made on GPU, float32:' in text


def test_tables_have_equal_columns(tmp_path):
    rows = BASELINE + BETTER + SWEEP + make_row(
        'pipe', {'a': 'x|y'}, [70.] * 5, entropy={'blocks.0': [0.5, 0.7]}, common={'blocks.0': [0.5, 0.7]})
    write(tmp_path, rows)
    found = [lines for lists in tables(written(tmp_path)).values() for lines in lists]
    assert len(found) == 2 + 2 + 2 + 1  # the original's, a sweep, the others, entropy
    for header, rule, *lines in found:
        assert set(rule) == {'---'} and len(rule) == len(header)
        assert lines and all(len(line) == len(header) for line in lines)
    assert r'`pipe a=x\|y`' in written(tmp_path)


def test_processors_are_named(tmp_path):
    """Where runs were on several, or it is not known of some."""
    def device(lines):
        return re.search('^- Device: (.*)$', written(write(tmp_path, lines)), re.M)[1]

    a, b, *rest = BASELINE
    assert device(BASELINE) == 'GPU, float32'
    assert device([{**line, 'processor': 'P'} for line in BASELINE]) == 'GPU, float32; P'
    assert device([{**a, 'processor': 'P'}, {**b, 'processor': 'Q'}, *rest]) == (
        'GPU, float32; P and Q and processor not recorded')


@pytest.mark.parametrize('changes', [
    dict(data=HELD_OUT_DATA),
    dict(device='CPU, float32'),
    dict(epochs=2, top1=[1., 2.], best=2., final=2., loss=[1., 1.]),
])
def test_sections_are_not_mixed(tmp_path, changes):
    """A row of other images, epochs or device is in a section of its own, without a baseline to compare with."""
    other = [{**line, **changes} for line in BETTER]
    text = written(write(tmp_path, BASELINE + WORSE + other))
    first, second = re.split(r'^## \d\. ', text.split('## How to read')[0], flags=re.M)[1:]
    assert 'better' not in first and 'worse' in first and 'worse' not in second
    assert 'No run of `cct_2` is among them' in second and 'minus' not in second and '**' not in second
    assert [line[0] for line in tables(second)['All rows'][0][2:]] == ['`better sot_reg=0.1 sot_tol=0.1`']
    heading = second.splitlines()[0]
    for value in (changes.get('device', 'GPU, float32'), f'{changes.get("epochs", 30)} epochs'):
        assert value in heading
    assert 'Versions: torch 2.11; commit abc' in second
    validation = 'data' in changes
    assert ('5,000 validation images (held out' in second) == validation
    assert ('10,000 test images' in second) != validation and '10,000 test images' in first
    assert (tmp_path / 'learning-curves-2.png').exists()


def test_recipes_are_not_mixed(tmp_path):
    one, other = write(tmp_path / 'one', BASELINE), write(tmp_path / 'other', BETTER, {**RECIPE, 'lr': 0.1})
    text = Path(report.write_report([one, other], str(tmp_path / 'out'))).read_text()
    assert '## 2. ' in text and 'minus' not in text and 'lr 0.1' in text and 'lr 0.0005' in text


def test_sources_are_joined(tmp_path):
    """Studies of one recipe make one section, whatever gave them their initial values; a file does as its folder."""
    one = write(tmp_path / 'one', BASELINE + BETTER[:1])
    other = write(tmp_path / 'other', BETTER, {**RECIPE, 'first': ('better', SOT)})
    out = tmp_path / 'out'
    text = Path(report.write_report([one, f'{other}/results.jsonl'], str(out))).read_text()
    assert '## 2. ' not in text and '**+1.00**' in text and '10 finished runs' in text
    assert f'1 line of {other}/results.jsonl repeats a run' in text
    assert 'initial values differ: `cct_2`, `better sot_reg=0.1 sot_tol=0.1`' in text
    assert f'timm-sot study report {one} {other}/results.jsonl --out {out}\n' in text


def test_unknown_recipes_are_not_mixed(tmp_path):
    one, other = (write(tmp_path / name, rows, None) for name, rows in (('one', BASELINE), ('other', BETTER)))
    text = Path(report.write_report([one, other], str(tmp_path / 'out'))).read_text()
    assert '## 2. ' in text and 'recipe not recorded' in text and f'{one}/study.json is not there' in text


def test_corrupt_lines(tmp_path):
    """Reported and skipped; the folder stays as it was."""
    write(tmp_path, BASELINE + BETTER)
    path = tmp_path / 'results.jsonl'
    path.write_bytes(path.read_bytes() + b'{"model": "cct\n\xff\n')
    before = path.read_bytes()
    text = written(tmp_path, out=str(tmp_path / 'out'))
    assert f'2 lines of {path} cannot be read and are left out.' in text and '10 finished runs' in text
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ['out', 'results.jsonl', 'study.json']


def test_baseline(tmp_path):
    write(tmp_path, BASELINE + BETTER + WORSE)
    text = written(tmp_path, baseline='better sot_reg=0.1 sot_tol=0.1')
    rows = table(text, 'Other rows')
    assert next(iter(rows)) == 'better sot_reg=0.1 sot_tol=0.1'
    header = tables(text)['Other rows'][0][0]
    assert header[4] == 'minus `better sot_reg=0.1 sot_tol=0.1`'
    assert rows['worse sot_reg=0.1 sot_tol=0.1'][4][0] == '−'
    assert table(text, 'The rows of the original experiment')['cct_2'][4] == '−1.00'
    assert "--baseline 'better sot_reg=0.1 sot_tol=0.1'" in text


def test_original_rows(tmp_path):
    rows = [line for model, kwargs in PRESETS['seed'][0] for line in make_row(model, kwargs, [70., 71.5])]
    text = written(write(tmp_path, rows))
    found = table(text, 'The rows of the original experiment', 1)  # the best epoch, as they were
    assert [line[-1] for line in found.values()] == [
        '78.14', '76.65 (−1.49)', '74.96 (−3.18)', '75.14 (−3.00)', '76.88 (−1.26)', '76.76 (−1.38)']
    assert tables(text)['The rows of the original experiment'][1][0][-1] == 'original, n = 1'
    assert 'of the 41 rows of `timm-sot study --preset sweep`: 39 rows' in text
    assert 'Other rows' not in text and 'All rows\n' not in text


@pytest.mark.parametrize('settings, changes', [
    ({**RECIPE, 'lr': 0.1}, {}),
    (RECIPE, dict(data=HELD_OUT_DATA)),
    (RECIPE, dict(data='cifar100 50000+10000 sha256:0')),
    (RECIPE, dict(data='svhn 50000+10000 sha256:0')),
    (RECIPE, dict(epochs=2, top1=[1., 2.], best=2., final=2., loss=[1., 1.])),
])
def test_published_numbers_stand_beside_nothing_else(tmp_path, monkeypatch, settings, changes):
    rows = BASELINE + SWEEP + make_row('cct_2_sot_q', SOT, [70., 71.])
    in_text, in_figures = [], []
    for make in ('differences', 'sweep'):
        def spy(*args, make=getattr(figures, make)):
            in_figures.append(bool(args[-1]))  # the published numbers
            return make(*args)
        monkeypatch.setattr(figures, make, spy)
    for lines, recipe in ((rows, RECIPE), ([{**line, **changes} for line in rows], settings)):
        text = written(write(tmp_path, lines, recipe))
        in_text.append('original experiment' in text or 'original, n' in text)
    assert in_text == [True, False] and in_figures == [True, True, False, False]


def test_sweep(tmp_path):
    text = written(write(tmp_path, BASELINE + SWEEP + BETTER))
    rows = table(text, 'Sweep of `sot_reg`: `cct_2_sot_qk sot_tol=0.1`')
    assert [*rows] == ['cct_2', *(f'cct_2_sot_qk sot_reg={reg}' for reg in (0.1, 0.2, 0.5, 1))]
    assert [line[1] for line in rows.values()] == ['5', '1', '2', '3', '4']
    assert '(sweep-sot_reg-cct_2_sot_qk-sot_tol-0.1.png)' in text
    assert [*table(text, 'Other rows')] == ['cct_2', 'better sot_reg=0.1 sot_tol=0.1']


def test_sweeps_of_a_grid(tmp_path):
    lines = [make_line('a', dict(x=x, y=y), 0, 70.) for x in (1, 2, 3, 4) for y in (1, 2, 3)]
    text = written(write(tmp_path / 'grid', BASELINE + lines))
    sweeps = [name for name in tables(text) if name.startswith('Sweep')]
    assert sweeps == [f'Sweep of `x`: `a y={y}`' for y in (1, 2, 3)]
    text = written(write(tmp_path / 'two', BASELINE + [make_line('a', dict(x=x, flag=x > 1), 0, 70.) for x in (1, 2)]))
    assert 'Sweep of' not in text and 'a flag=False x=1' in text


def test_controls(tmp_path, monkeypatch):
    controls = {'better': ('worse', SOT), 'higher': ('cct_2', {}), 'between': ('cct_2', {}), 'lonely': ('absent', {})}
    between = make_row('between', SOT, [76.6, 76.5, 76.6, 77.8, 76.0])
    with monkeypatch.context() as patch:
        patch.setattr(tables_module, 'control_of', lambda model, kwargs: controls.get(model))
        text = written(write(tmp_path, BASELINE + BETTER + WORSE + HIGHER + between + make_row('lonely', {}, [70.])))
    lines = tables(text)['Variants against their controls'][0][2:]
    assert [(line[0], line[2]) for line in lines] == [
        (f'`{model} sot_reg=0.1 sot_tol=0.1`', control) for model, control in (
            ('better', '`worse sot_reg=0.1 sot_tol=0.1`'), ('higher', '`cct_2`'), ('between', '`cct_2`'))]
    differences = [paired(variant, control, 'final') for variant, control in (
        (BETTER, WORSE), (HIGHER, BASELINE), (between, BASELINE))]
    bold = [f'+{difference.summary.mean:.2f}' for difference in differences]
    assert [line[4] for line in lines] == [f'**{bold[0]}**', bold[1], bold[2]]
    summary = differences[0].summary
    assert lines[0][5] == f'+{summary.low:.2f} to +{summary.high:.2f}'
    p = [difference.p for difference in differences]
    assert p[0] < p[2] < 0.05 < 2 * p[2] < p[1], 'the last would be bold without the other two'
    assert [line[7] for line in lines] == ['< 0.001', f'{p[1]:.3g}', f'{2 * p[2]:.3g}']
    assert '- `absent`, the control of `lonely`\n' in text
    assert 'their controls' not in written(tmp_path)


def test_attention(tmp_path):
    """Mean over the runs that measured it."""
    near, far = (
        dict(entropy={'blocks.0': [a, b]}, common={'blocks.0': [c, d]}, looked_at='on a CPU, commit abc')
        for a, b, c, d in ((1 - 4e-5, 0.5, 0.6, 0.), (1 - 2e-5, 1., 0.8, 0.1)))
    rows = [*BASELINE, {**BETTER[0], **near}, {**BETTER[1], **far}, BETTER[2], *SWEEP,
            *make_row('convolutions', {}, [70.], entropy={}, common={})]
    text = written(write(tmp_path, rows))
    assert 'from its weights: on a CPU, commit abc.\n' in text
    lines = tables(text)['The attention at the end of training'][0][2:]
    assert ['`better sot_reg=0.1 sot_tol=0.1`', '2 of 3', '`blocks.0`', '3e-05, 0.25', '0.70, 0.05'] in lines
    assert ['`cct_2`', '0 of 5', '', 'not measured', ''] in lines
    assert ['`convolutions`', '1 of 1', '', 'no attention layer', ''] in lines
    swept = [line[0] for line in lines if 'cct_2_sot_qk' in line[0]]
    assert swept == ['`cct_2_sot_qk sot_reg=0.1 sot_tol=0.1`', '`cct_2_sot_qk sot_reg=1 sot_tol=0.1`']  # its ends
    assert '- the attention of 16 runs\n' in text
    assert 'The attention' not in written(write(tmp_path, BASELINE))


def test_figures_are_those_that_the_report_shows(tmp_path, drawn):
    text = written(write(tmp_path / 'study', BASELINE + BETTER + SWEEP), out=str(tmp_path / 'out'))
    shown = re.findall(r'!\[.*\]\((.*)\)', text)
    assert len(shown) == 3 and {*shown, 'report.md'} == {path.name for path in (tmp_path / 'out').iterdir()}
    for name in shown:
        with Image.open(tmp_path / 'out' / name) as image:
            assert image.width > 800 and len(image.convert('RGB').getcolors(1 << 20)) > 50
        assert (tmp_path / 'out' / name).stat().st_size < 200_000


def test_no_figure_without_data(tmp_path):
    text = written(write(tmp_path, [make_line('cct_2', {}, 0, 70., epochs=1, top1=[70.], loss=[1.])]))
    assert '![' not in text and [path.suffix for path in tmp_path.iterdir() if path.suffix == '.png'] == []


def test_unknown_baseline(tmp_path):
    write(tmp_path, BASELINE + BETTER)
    with pytest.raises(UserError, match=r"'cct_3'; there are: cct_2, better sot_reg=0.1 sot_tol=0.1\."):
        report.write_report([str(tmp_path)], baseline='cct_3')


def test_unwritable(tmp_path):
    write(tmp_path, BASELINE)
    (tmp_path / 'file').touch()
    with pytest.raises(UserError, match='cannot write the report'):
        report.write_report([str(tmp_path)], str(tmp_path / 'file'))


ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize('folder', sorted(
    str(path.parent.relative_to(ROOT)) for path in (ROOT / 'hub' / 'study').rglob('results.jsonl')))
def test_report_of_the_project_is_that_of_its_lines(folder, tmp_path, monkeypatch):
    shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns('*.png', '*.md'))
    monkeypatch.chdir(tmp_path)
    text = (ROOT / folder / 'report.md').read_text()
    command, = re.findall(r'^timm-sot (.*)$', text, re.M)
    assert main(shlex.split(command)) == 0
    assert Path(folder, 'report.md').read_text() == text
    for name in re.findall(r'!\[.*\]\((.*)\)', text):
        assert (ROOT / folder / name).exists() and Path(folder, name).exists()
