""" Which runs of a study can be compared, read from their lines

Runs of one section have recipe, images, epochs and device in common.
"""
import json
import os
from typing import Dict, List, NamedTuple, Sequence, Tuple

from ..errors import UserError
from .data import HELD_OUT, VAL_FOLDER, same_images
from .original import is_original
from .statistics import Result
from .store import NOT_RECIPE, Run, read_lines, read_settings, row_name

__all__ = ['Section', 'Sweep', 'count', 'find_sweeps', 'read_sources', 'results_path', 'split']


class Section(NamedTuple):
    """Runs that can be compared."""
    recipe: str  # JSON, '' where it was not recorded
    data: str
    epochs: int
    device: str
    rows: Dict[str, List[Result]]  # by Run.row, in the order of their first runs; by seed

    @property
    def results(self) -> List[Result]:
        return [result for results in self.rows.values() for result in results]

    @property
    def images(self) -> str:
        """What the top-1 is measured on."""
        return 'validation images' if HELD_OUT in self.data or VAL_FOLDER in self.data else 'test images'

    @property
    def original(self) -> bool:
        """Whether it repeats the original experiment."""
        return is_original(json.loads(self.recipe) if self.recipe else None, self.epochs, self.data)


class Sweep(NamedTuple):
    """Rows that differ in the value of one argument."""
    argument: str
    name: str  # of the row less the argument
    rows: Dict[float, str]


def results_path(source: str) -> str:
    return source if source.endswith('.jsonl') else os.path.join(source, 'results.jsonl')


def read_sources(sources: Sequence[str]) -> Tuple[List[Result], List[str], str]:
    """Results of all sources, with their `recipe`; what is to be said about reading them; the default baseline."""
    results: Dict[Tuple, Result] = {}
    notes, firsts = [], []
    names: List[str] = []  # of the data; of the same images, the first
    for source in sources:
        path = results_path(source)
        try:
            good, bad = read_lines(path)
        except OSError as e:
            raise UserError(f'{path} cannot be read ({e.strerror}); give a folder that --out of a study named.') from e
        if bad:
            notes.append(f'{count(len(bad), "line")} of {path} cannot be read and {"is" if len(bad) == 1 else "are"} '
                         f'left out.')
        if not good:
            raise UserError(f'{path} holds no finished run.')
        settings_path = os.path.join(os.path.dirname(path), 'study.json')
        try:
            settings = read_settings(settings_path)
            recipe = {key: value for key, value in settings.items() if key not in NOT_RECIPE}
            recipe = json.dumps(recipe, sort_keys=True)
            firsts.append(row_name(*settings['first']))
        except FileNotFoundError:
            recipe = ''
            notes.append(f'{settings_path} is not there: the recipe of these runs is not known.')
        repeated = 0
        for result in map(json.loads, good):
            result['data'] = next((name for name in names if same_images(name, result['data'])), result['data'])
            if result['data'] not in names:
                names.append(result['data'])
            # runs of an unknown recipe are comparable with those of their own file only
            result['recipe'], result['source'] = recipe, '' if recipe else path
            key = (*place(result), row_of(result), result['seed'])
            repeated += key in results
            results.setdefault(key, result)
        if repeated:
            notes.append(f'{count(repeated, "line")} of {path} {"repeats a run" if repeated == 1 else "repeat runs"}; '
                         f'the first line of a run counts.')
    if len(set(firsts)) > 1:
        notes.append('The rows that gave runs of one seed their initial values differ: '
                     f'{", ".join(f"`{row}`" for row in dict.fromkeys(firsts))}; in pairs of two studies these values '
                     f'may differ, too.')
    return list(results.values()), notes, firsts[0] if firsts else row_of(next(iter(results.values())))


def row_of(result: Result) -> str:
    return Run.of(result).row


def place(result: Result) -> Tuple:
    """What runs must share to be compared."""
    return tuple(result[key] for key in ('recipe', 'source', 'data', 'epochs', 'device'))


def split(results: Sequence[Result]) -> List[Section]:
    """Sections in the order of their first runs."""
    sections: Dict[Tuple, Section] = {}
    for result in sorted(results, key=lambda result: result['seed']):  # stable
        key = place(result)
        section = sections.setdefault(
            key, Section(result['recipe'], result['data'], result['epochs'], result['device'], {}))
        section.rows.setdefault(row_of(result), []).append(result)
    order = list(dict.fromkeys(map(place, results)))
    return [sections[key] for key in order]


def find_sweeps(section: Section) -> List[Sweep]:
    """Groups of at least three rows that differ in one numeric argument, the largest first; a row is in one of them."""
    groups: Dict[Tuple[str, str], Dict[float, str]] = {}
    for row, results in section.rows.items():
        kwargs = results[0]['kwargs']
        for argument, value in kwargs.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                rest = {key: other for key, other in kwargs.items() if key != argument}
                name = row_name(results[0]['model'], rest)
                groups.setdefault((argument, name), {}).setdefault(value, row)
    sweeps, taken = [], set()
    for (argument, name), rows in sorted(groups.items(), key=lambda item: -len(item[1])):
        rows = {value: row for value, row in sorted(rows.items()) if row not in taken}
        if len(rows) >= 3:
            sweeps.append(Sweep(argument, name, rows))
            taken.update(rows.values())
    return sweeps


def count(n: int, noun: str) -> str:
    return f'{n} {noun}' if n == 1 else f'{n} {noun}s'
