""" A room imports only from the rooms before it """
import ast
from pathlib import Path

import pytest

import timm_sot

ROOT = Path(timm_sot.__file__).parent
ROOMS = [
    'errors', 'kernels', 'solver', 'transform', 'attention', 'layers', 'weights', 'cct', 'patch', 'digits', 'viz',
    'study', 'bench', 'export', 'cli', '__main__']
FREE = {'__init__', '_autoload'}  # they name the others for users, and import them late


def room(path):
    return path.relative_to(ROOT).with_suffix('').parts[0]


def imported(path):
    """Rooms that a file imports, in its functions too."""
    here = ['timm_sot', *path.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = here[:len(here) + 1 - node.level] if node.level else []
            names = [*base, *(node.module or '').split('.')] if node.module else base
            for full in ([*names, alias.name] for alias in node.names):
                if full[0] == 'timm_sot' and full[1] in ROOMS:
                    yield full[1]


def test_every_file_is_in_a_room():
    assert {room(path) for path in ROOT.rglob('*.py')} - FREE == set(ROOMS)


@pytest.mark.parametrize('name', ROOMS)
def test_imports_point_up(name):
    allowed = ROOMS[:ROOMS.index(name) + 1]
    for path in ROOT.rglob('*.py'):
        if room(path) == name:
            assert not [other for other in imported(path) if other not in allowed], path
