""" Errors that the user can fix """
import pytest

from timm_sot.errors import first_line, missing_extra, one_line, unknown_model


@pytest.mark.parametrize('error, first, one', [
    (ValueError('a\nb'), 'a', 'ValueError: a'),
    (RuntimeError('\n  Errors:\n  a\n  b'), 'Errors: a', 'RuntimeError: Errors: a'),
    (MemoryError(), 'MemoryError', 'MemoryError'),
])
def test_lines(error, first, one):
    assert (first_line(error), one_line(error)) == (first, one)


@pytest.mark.parametrize('error, message', [
    (ModuleNotFoundError("No module named 'scipy._lib'", name='scipy._lib'),
     "this needs the package scipy; install it with: pip install 'timm-sot[viz]'"),
    (ImportError('numpy.core.multiarray failed to import'),
     'a package of timm-sot[viz] does not import, reinstall it: numpy.core.multiarray failed to import'),
])
def test_missing_extra(error, message):
    assert str(missing_extra(error, 'viz')) == message


@pytest.mark.parametrize('name, hint', [
    ('cct_2_sot_kq', 'did you mean cct_2_sot_q'), ('?', 'timm.list_models() has the names.')])
def test_unknown_model(name, hint):
    assert str(unknown_model(name)).startswith(f'unknown model {name!r}; {hint}')
