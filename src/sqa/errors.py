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
