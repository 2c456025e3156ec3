"""The run's random seed."""

import os

_VARIABLE = "PL_GLOBAL_SEED"  # where Lightning keeps it, for the ranks that it launches


def run_seed() -> int | None:
    """The seed that `seed_everything` was given in this process or its launcher; None without."""
    seed = os.environ.get(_VARIABLE)
    return None if seed is None else int(seed)


def forget_seed() -> None:
    """Leave nothing of an earlier run in this process, for a run without a seed."""
    os.environ.pop(_VARIABLE, None)
