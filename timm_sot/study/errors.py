""" Errors that a user can mend """
from ..errors import UserError

__all__ = ['StudyError', 'missing_extra']


class StudyError(UserError):
    """A study that cannot run as asked; the message says why, in one line, and what would work."""


def missing_extra(error: ImportError) -> StudyError:
    """The error to raise where a package of the `study` extra cannot be imported."""
    return StudyError(f"timm-sot study needs the package {error.name}; install it with: pip install 'timm-sot[study]'")
