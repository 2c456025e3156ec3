"""The one exception for what a user can put right."""


class InputError(ValueError):
    """Bad input: a single line that names the key or file, what was found and what to do.

    The command line prints it without a traceback and exits with code 2.
    """
