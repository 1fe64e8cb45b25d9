""" The parser, and the types of options """
import argparse

import pytest

from timm_sot.cli.arguments import ModelKwargs, Parser, number, part, seed, share


@pytest.mark.parametrize('kind, good, bad', [
    (number(int, 1), {'1': 1, '7': 7}, {'0': 'at least 1, got 0', '1.5': 'invalid int value', 'x': 'invalid int'}),
    (number(float, 0), {'0': 0., '1e-3': 1e-3}, {'-1': 'at least 0', 'inf': 'must be finite', 'nan': 'at least 0'}),
    (number(float, 0, exclusive=True), {'0.5': 0.5}, {'0': 'above 0, got 0', 'nan': 'above 0'}),
    (part, {'0': 0., '0.9': 0.9}, {'1': 'below 1, got 1', '-0.1': 'at least 0', 'nan': 'at least 0', 'x': 'invalid'}),
    (share, {'1': 1., '0.1': 0.1}, {'0': 'above 0', '1.1': 'at most 1, got 1.1', 'nan': 'above 0', '': 'invalid'}),
    (seed, {'0': 0, '4294967295': 2 ** 32 - 1}, {'-1': 'at least 0', '4294967296': 'below 2^32', '1.': 'invalid int'}),
])
def test_types(kind, good, bad, capsys):
    parser = Parser(prog='p')
    parser.add_argument('--x', type=kind)
    for text, value in good.items():
        assert parser.parse_args([f'--x={text}']).x == value
    for text, message in bad.items():
        with pytest.raises(SystemExit) as e:
            parser.parse_args([f'--x={text}'])
        printed = capsys.readouterr().err
        assert e.value.code == 2 and printed.startswith('p: error: argument --x: ') and message in printed
        assert printed.count('\n') == 1


def test_model_kwargs(capsys):
    parser = argparse.ArgumentParser(prog='p')
    parser.add_argument('--kw', nargs='*', default={}, action=ModelKwargs)
    assert parser.parse_args([]).kw == {}
    assert parser.parse_args(['--kw', 'a=1', 'b=None', 'c=[1,2]', 'd=sine']).kw == {
        'a': 1, 'b': None, 'c': [1, 2], 'd': 'sine'}
    for text, message in (('a', "key=value pairs, got 'a'"), ('a={[]}', "key=value pairs, got 'a={[]}': unhashable")):
        with pytest.raises(SystemExit):
            parser.parse_args(['--kw', text])
        assert message in capsys.readouterr().err
