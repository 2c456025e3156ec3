"""The run's seed."""

import os


def run_seed() -> int:
    """What `seed_everything` was last given, in this process or the one that launched it; else 0.

    Lightning keeps it in the environment, where launched ranks find it.
    """
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))
