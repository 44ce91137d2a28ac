"""What a person can mend, and the orderly end of a program."""

from __future__ import annotations


class UserError(Exception):
    """A mistake that a person can mend; ends the program with its message as one line and exit code 2."""


class Interrupted(BaseException):
    """Ends the program where nothing is wrong, with an exit code and lines to say.

    No handler of errors catches it.
    """


def one_line(error: object, limit: int = 300) -> str:
    """The beginning of an error's message, or of another text, as one line of at most `limit` characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else f"{text[: limit - 2]} …"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory does not suffice, the GPU's or the CPU's."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return "out of memory" in str(error) or "can't allocate memory" in str(error)
