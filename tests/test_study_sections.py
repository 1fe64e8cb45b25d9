""" What can be compared, and reading it """
import json
import re
from pathlib import Path

import pytest
from study_lines import BASELINE, BETTER, HELD_OUT_DATA, RECIPE, SOT, WORSE, make_line, write

from timm_sot.errors import UserError
from timm_sot.study.sections import find_sweeps, read_sources, split


def sections_of(folder, lines):
    return split(read_sources([write(folder, lines)])[0])


@pytest.mark.parametrize('make, message', [
    (lambda path: None, 'results.jsonl cannot be read (No such file'),
    (lambda path: write(path, []), 'holds no finished run'),
    (lambda path: (write(path, BASELINE), (path / 'study.json').write_text('{')), 'study.json is not what a study'),
    (lambda path: (write(path, BASELINE), (path / 'study.json').write_text('{}')), 'study.json is not what a study'),
])
def test_errors(tmp_path, make, message):
    make(tmp_path / 'study')
    with pytest.raises(UserError, match=re.escape(message)):
        read_sources([str(tmp_path / 'study')])


def test_sections(tmp_path):
    """In the order of their first lines, rows in that of theirs, runs by seed."""
    other = [{**line, 'device': 'CPU'} for line in BASELINE]
    found = sections_of(tmp_path, [BETTER[3], *reversed(other), *reversed(BASELINE), BETTER[0]])
    assert [(section.device, section.epochs) for section in found] == [('GPU, float32', 30), ('CPU', 30)]
    assert [result['seed'] for result in found[1].rows['cct_2']] == [0, 1, 2, 3, 4]
    rows = found[0].rows
    assert {row: len(results) for row, results in rows.items()} == {'cct_2': 5, 'better sot_reg=0.1 sot_tol=0.1': 2}
    assert len(found[0].results) == 7 and found[0].original and found[0].images == 'test images'
    validation, = sections_of(tmp_path, [{**line, 'data': HELD_OUT_DATA} for line in BASELINE])
    assert validation.images == 'validation images' and not validation.original


def test_first_row_is_the_baseline(tmp_path):
    one = write(tmp_path / 'one', BETTER, {**RECIPE, 'first': ('better', SOT)})
    other = write(tmp_path / 'other', BASELINE)
    assert read_sources([one])[1:] == ([], 'better sot_reg=0.1 sot_tol=0.1')
    assert read_sources([other, one])[2] == 'cct_2'
    (Path(one) / 'study.json').unlink()
    (Path(one) / 'results.jsonl').write_text(json.dumps(WORSE[1]))
    assert read_sources([one])[2] == 'worse sot_reg=0.1 sot_tol=0.1'


def test_first_line_of_a_run_counts(tmp_path):
    section, = sections_of(tmp_path, [*BASELINE, {**BASELINE[1], 'final': 1.}])
    assert section.results == [{**line, 'recipe': section.recipe, 'source': ''} for line in BASELINE]


def test_sweeps(tmp_path):
    lines = [make_line('a', dict(x=x, y=y), 0, 70.) for y in (1, 2, 3) for x in (4, 3, 1, 2)]
    lines += [make_line('two', dict(x=x), 0, 70.) for x in (1, 2)]
    lines += [make_line('flags', dict(x=x), 0, 70.) for x in (True, False, 2)]
    section, = sections_of(tmp_path, lines)
    sweeps = find_sweeps(section)
    assert [(sweep.argument, sweep.name, [*sweep.rows]) for sweep in sweeps] == [
        ('x', f'a y={y}', [1, 2, 3, 4]) for y in (1, 2, 3)]
    assert sweeps[1].rows[4] == 'a x=4 y=2'


def test_the_same_images_by_another_name(tmp_path):
    """Runs on one machine and on another, where the folder is called otherwise, are of one section."""
    one = write(tmp_path / 'one', BASELINE[:2])
    elsewhere = BASELINE[0]['data'].replace('cifar10', 'elsewhere')
    two = write(tmp_path / 'two', [{**line, 'data': elsewhere} for line in BASELINE[2:]])
    results, _, _ = read_sources([one, two])
    section, = split(results)
    assert len(section.rows['cct_2']) == 5 and section.data == BASELINE[0]['data']
