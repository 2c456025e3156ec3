"""The run's random seed."""

import os


def run_seed() -> int:
    """The seed that `seed_everything` was given in this process or its launcher; 0 without one.

    Lightning keeps it in an environment variable, which the ranks that it launches inherit.
    """
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))
