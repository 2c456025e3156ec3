"""Exceptions whose message tells a user everything, in one line, and a check of sizes."""

MOST_BATCH_TOKENS = 1 << 31  # a batch is made in memory, and so many tokens take 17 GB


class InputError(ValueError):
    """Bad input: one line that names the key or file, what was found and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


class DivergedError(RuntimeError):
    """Training met numbers that are not finite; one line that says when.

    The command line prints it without a traceback and exits with code 1.
    """


def one_line(message: object) -> str:
    """A message without line breaks and repeated spaces."""
    return " ".join(str(message).split())


def require_positive(key: str, **sizes: int) -> None:
    """Raise InputError for the first size below 1, named by `key` and its keyword."""
    for name, size in sizes.items():
        if size < 1:
            raise InputError(f"{key}{name}: {size} is less than 1; set it to at least 1")
