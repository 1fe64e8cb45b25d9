""" Errors that a user can mend """
import pytest

from timm_sot.errors import first_line, one_line, unknown_model


@pytest.mark.parametrize('error, first, one', [
    (ValueError('a\nb'), 'a', 'ValueError: a'),
    (RuntimeError('\n  Errors:\n  a\n  b'), 'Errors: a', 'RuntimeError: Errors: a'),
    (MemoryError(), 'MemoryError', 'MemoryError'),
])
def test_lines(error, first, one):
    assert (first_line(error), one_line(error)) == (first, one)


@pytest.mark.parametrize('name, hint', [
    ('cct_2_sot_kq', 'did you mean cct_2_sot_q'), ('?', 'timm.list_models() has the names.')])
def test_unknown_model(name, hint):
    assert str(unknown_model(name)).startswith(f'unknown model {name!r}; {hint}')
