"""What a user can mend. Everything else that is raised is a bug of ours and shows its traceback."""


class InputError(ValueError):
    """Bad input. The message is one sentence: the field, what was given, and what would be right."""


class MissingExtraError(ImportError):
    """An optional library is missing. The message names the extra to install."""
