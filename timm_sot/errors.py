""" Errors that a user can mend """

__all__ = ['UserError']


class UserError(Exception):
    """Something that cannot be done as asked; the message says why, in one line, and what would work."""
