"""Errors that a user can fix. Any other exception is a bug of ours, and shows its traceback."""

import importlib
from typing import Any


class InputError(ValueError):
    """Bad input. The message is one sentence: the field, what was given, and what would be right."""


class MissingExtraError(ImportError):
    """An optional library is missing. `what` says what needs it; `extra` is this package's extra that installs it."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(what, extra)

    def __str__(self) -> str:
        return (
            f"{self.args[0]}; run in a clone of the repository: pip install -c constraints.txt -e '.[{self.args[1]}]'"
        )


def load_extra(module: str, what: str, extra: str) -> Any:
    """Import an optional library. Raises MissingExtraError, made of `what` and `extra`, where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise MissingExtraError(what, extra) from None


def shown(text: str, limit: int = 100) -> str:
    """A user's text for an error message: on one line, unprintable characters escaped, cut at `limit` characters."""
    line = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text[: limit + 1])
    return line if len(line) <= limit else f"{line[:limit]}..."


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class where the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
