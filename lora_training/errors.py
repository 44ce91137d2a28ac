"""What a person can mend, and the orderly end of a program."""

from __future__ import annotations


class UserError(Exception):
    """A mistake that a person can mend; ends the program with its message as one line and exit code 2."""


class Interrupted(BaseException):
    """Ends the program where nothing is wrong, with an exit code and lines to say. No handler of errors catches it."""


def one_line(error: object) -> str:
    """The beginning of an error's message, as one line."""
    return " ".join(str(error).split())[:300]
