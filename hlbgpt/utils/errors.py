"""Exceptions whose message is all that a user needs."""


class InputError(ValueError):
    """Bad input: a single line that names the key or file, what was found and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


class DivergedError(RuntimeError):
    """Training ran into numbers that are not finite; a single line that says when.

    The command line prints it without a traceback and exits with code 1.
    """


def require_positive(key: str, **sizes: int) -> None:
    """Raise InputError for the first size below 1; `key` and the size's name say which it is."""
    for name, size in sizes.items():
        if size < 1:
            raise InputError(f"{key}{name}: {size} is less than 1; set it to at least 1")
