""" What stands in the cells of a report's tables; the tables themselves are tested with the report """
import pytest

from timm_sot.study import tables


@pytest.mark.parametrize('value, text', [(1., '< 1e-8'), (0.999959258, '4.1e-05'), (0.7, '0.3'), (float('nan'), 'nan')])
def test_entropy_format(value, text):
    assert tables.format_gap(value) == text


def test_numbers_format():
    assert [tables.signed(value) for value in (1.234, -1.234, 0.004, -0.004)] == ['+1.23', '−1.23', '0.00', '0.00']
    assert [tables.format_p(p) for p in (None, 0.0004, 0.0496, 1.)] == ['–', '< 0.001', '0.0496', '1']


def test_shortened_rows():
    rows = ['base', 'a size=[4, 8] x=1', 'b size=[2, 8] x=1']
    assert tables.shorten(rows, 'base') == (
        {'base': 'base', rows[1]: 'a size=[4, 8]', rows[2]: 'b size=[2, 8]'}, ' All rows but `base` with `x=1`.')
    assert tables.shorten(['base x=1', 'a x=1', 'base y=2 x=1'], 'base x=1') == (  # the baseline has them, too
        {'base x=1': 'base', 'a x=1': 'a', 'base y=2 x=1': 'base y=2'}, ' All rows with `x=1`.')
    assert tables.shorten(['base x=1', 'a x=1 y=2', 'b x=1 y=2'], 'base x=1') == (  # one of two
        {'base x=1': 'base x=1', 'a x=1 y=2': 'a', 'b x=1 y=2': 'b'}, ' All rows but `base x=1` with `x=1 y=2`.')
    for kept in (['base', 'a x=1'], ['base', 'base x=1', 'a x=1'], ['base', 'a x=1', 'a x=2']):
        assert tables.shorten(kept, 'base') == ({row: row for row in kept}, '')
