"""What a user can mend. Everything else that is raised is a bug of ours and shows its traceback."""


class InputError(ValueError):
    """Bad input. The message is one sentence: the field, what was given, and what would be right."""


class MissingExtraError(ImportError):
    """An optional library is missing: `what` says what needs it, `extra` is the extra of this package that has it."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(what, extra)

    def __str__(self) -> str:
        return (
            f"{self.args[0]}; run in a clone of the repository: pip install -c constraints.txt -e '.[{self.args[1]}]'"
        )


def shown(text: str, limit: int = 100) -> str:
    """Foreign text as a sentence can hold it: on one line, unprintable characters escaped, cut at `limit`."""
    line = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text[: limit + 1])
    return line if len(line) <= limit else f"{line[:limit]}..."


def first_line(error: BaseException) -> str:
    """What an error says first, or its name where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
