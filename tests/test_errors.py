""" Errors that a user can mend """
import pytest

from timm_sot.errors import first_line, one_line


@pytest.mark.parametrize('error, first, one', [
    (ValueError('a\nb'), 'a', 'ValueError: a'),
    (RuntimeError('\n  Errors:\n  a\n  b'), 'Errors: a', 'RuntimeError: Errors: a'),
    (MemoryError(), 'MemoryError', 'MemoryError'),
])
def test_lines(error, first, one):
    assert (first_line(error), one_line(error)) == (first, one)
