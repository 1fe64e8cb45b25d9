""" A room imports only from the rooms before it """
import ast
import re
import sys
from pathlib import Path

import pytest

import timm_sot

ROOT = Path(timm_sot.__file__).parent
TREE = Path(__file__).parents[1]  # where the package need not be that is tested
ROOMS = [
    'errors', 'machine', 'kernels', 'solver', 'transform', 'attention', 'layers', 'weights', 'cct', 'patch', 'digits',
    'viz', 'study', 'bench', 'export', 'cli', '__main__']
FREE = {'__init__', '_autoload'}  # they name the others for users, and import them late


def room(path):
    return path.relative_to(ROOT).with_suffix('').parts[0]


def imported(path):
    """Names of the modules, and of what is in them, that a file imports, in its functions too, as lists of their parts.
    """
    here = ['timm_sot', *path.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split('.') for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[:len(here) + 1 - node.level] if node.level else []
            names = [*base, *(node.module or '').split('.')] if node.module else base
            yield from ([*names, alias.name] for alias in node.names)


def test_every_file_is_in_a_room():
    assert {room(path) for path in ROOT.rglob('*.py')} - FREE == set(ROOMS)


@pytest.mark.parametrize('name', ROOMS)
def test_imports_point_up(name):
    allowed = ROOMS[:ROOMS.index(name) + 1]
    for path in ROOT.rglob('*.py'):
        if room(path) == name:
            rooms = [names[1] for names in imported(path) if names[0] == 'timm_sot' and names[1] in ROOMS]
            assert not [other for other in rooms if other not in allowed], path


# What is installed

MODULES = {'scikit-learn': 'sklearn', 'pot': 'ot'}  # of packages that are called otherwise
BROUGHT = {'numpy', 'PIL', 'triton', 'llvmlite'}  # by torch, torchvision and numba
OPTIONAL = {'flash_sinkhorn'}  # in no extra, and skipped where it is missing


def provided(extra):
    """Modules of the packages that are installed with an extra."""
    project = pytest.importorskip('tomllib').loads((TREE / 'pyproject.toml').read_text())['project']
    found, wanted = set(), [*project['dependencies'], *([f'timm-sot[{extra}]'] if extra else [])]
    for requirement in wanted:
        if requirement.startswith('timm-sot['):
            for name in requirement[len('timm-sot['):-1].split(','):
                wanted += project['optional-dependencies'][name]
        else:
            package = re.match('[A-Za-z0-9_-]+', requirement)[0]
            found.add(MODULES.get(package, package))
    return found


EXTRAS = {'kernels': ['cpu'], 'digits': ['viz', 'study'], 'viz': ['viz'], 'study': ['ray'], 'bench': ['bench']}


@pytest.mark.parametrize('name, extra', [(name, extra) for name in ROOMS for extra in EXTRAS.get(name, [''])])
def test_imports_are_installed(name, extra):
    used = {names[0] for path in ROOT.rglob('*.py') if room(path) == name for names in imported(path)}
    assert used - sys.stdlib_module_names - {'timm_sot'} <= provided(extra) | BROUGHT | OPTIONAL


def test_ray_is_needed_in_one_file():
    """And so not by those who install the extra of the study alone."""
    users = [path.name for path in ROOT.rglob('*.py') if 'ray' in {names[0] for names in imported(path)}]
    assert users == ['cluster.py']
