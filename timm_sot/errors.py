""" Errors that a user can mend """

__all__ = ['UserError', 'missing_extra']


class UserError(Exception):
    """What was asked for cannot be done; the message says why, in one line, and what would work."""


def missing_extra(error: ImportError, extra: str = 'study') -> UserError:
    """The error to raise where a package of an extra cannot be imported."""
    return UserError(f"this needs the package {error.name}; install it with: pip install 'timm-sot[{extra}]'")
