""" What the commands take: the parser, and types of its options """
import argparse

__all__ = ['ModelKwargs', 'Parser', 'number', 'part', 'seed', 'share']


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage."""

    def error(self, message):
        self.exit(2, f'{self.prog}: error: {message}\n')


class ModelKwargs(argparse.Action):
    """timm's `ParseKwargs`, key=value pairs with Python values, as an error of the parser where it fails."""

    def __call__(self, parser, namespace, values, option_string=None):
        from timm.utils import ParseKwargs  # not at the top: --help should not wait for torch

        missing = [value for value in values if '=' not in value]
        if missing:
            parser.error(f'{option_string} takes key=value pairs, got {missing[0]!r}')
        try:
            ParseKwargs.__call__(self, parser, namespace, values, option_string)
        except TypeError as e:  # of a set of lists, say
            parser.error(f'{option_string} takes key=value pairs, got {" ".join(values)!r}: {e}')


def number(kind, minimum, exclusive=False):
    """An argparse type: `kind` of at least, or above, `minimum`."""
    def parse(text):
        value = kind(text)
        if value == float('inf'):
            raise argparse.ArgumentTypeError(f'must be finite, got {text}')
        if not (minimum < value if exclusive else minimum <= value):
            raise argparse.ArgumentTypeError(
                f'must be {"above" if exclusive else "at least"} {minimum}, got {text}')
        return value
    parse.__name__ = kind.__name__  # argparse names the type in its messages
    return parse


def part(text: str) -> float:
    """An argparse type: at least 0 and below 1."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f'must be at least 0 and below 1, got {text}')
    return value


def share(text: str) -> float:
    """An argparse type: above 0, and 1 at most."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f'must be above 0 and at most 1, got {text}')
    return value


def seed(text: str) -> int:
    """An argparse type: at least 0 and below 2^32, of which a study can make the seeds of its epochs."""
    value = int(text)
    if not 0 <= value < 2 ** 32:
        raise argparse.ArgumentTypeError(f'must be at least 0 and below 2^32, got {text}')
    return value


seed.__name__ = 'int'
part.__name__ = share.__name__ = 'float'  # argparse names the type in its messages
