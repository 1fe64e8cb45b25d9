""" Errors that the user can fix """
import difflib

__all__ = ['UserError', 'first_line', 'missing_extra', 'one_line', 'unknown_model']


class UserError(Exception):
    """What was asked for cannot be done; the message says why, in one line, and what would work."""


def first_line(error: BaseException) -> str:
    """What an exception says, in one line: what follows the first is a list for whoever debugs it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(':'):
        return f'{lines[0]} {lines[1]}'
    return lines[0] if lines else type(error).__name__


def one_line(error: BaseException) -> str:
    """The type of an exception and what it says, in one line: for errors that come from anywhere."""
    name, text = type(error).__name__, first_line(error)
    return name if text == name else f'{name}: {text}'


def missing_extra(error: ImportError, extra: str = 'study') -> UserError:
    """The error to raise where a package of an extra cannot be imported."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition('.')[0]
        return UserError(f"this needs the package {package}; install it with: pip install 'timm-sot[{extra}]'")
    # it is there, and broken
    return UserError(f"a package of timm-sot[{extra}] does not import, reinstall it: {first_line(error)}")


def unknown_model(name: str) -> UserError:
    """The error to raise for a model that timm does not know."""
    import timm  # not where one of its own modules is missing

    close = difflib.get_close_matches(name, timm.list_models(), n=5)
    hint = f'did you mean {", ".join(close)}?' if close else 'timm.list_models() has the names.'
    return UserError(f'unknown model {name!r}; {hint}')
