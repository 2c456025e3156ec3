"""Search two settings with Optuna (`pip install optuna`): an example to copy and change."""

import argparse
import sys
from typing import TYPE_CHECKING

from hlbgpt import fit
from hlbgpt.utils.command import command
from hlbgpt.utils.errors import DivergedError, InputError

if TYPE_CHECKING:
    import optuna

LENGTH = ("trainer.max_steps", "trainer.val_check_interval", "model.lr_scheduler.total_steps")
# One length and one seed for all trials; the seeds of a benchmark begin at 0.
SAME = dict.fromkeys(LENGTH, 400) | {"seed_everything": 1000, "time_to_target.target": 0}


def objective(trial: "optuna.Trial") -> float:
    trial.suggest_float("model.lr_scheduler.max_lr", 5e-4, 5e-2, log=True)
    trial.suggest_float("model.lr_scheduler.pct_start", 0.01, 0.4)
    return fit("configs/quickstart.yaml", SAME | trial.params).record["value"]


@command("sweep.py")
def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    try:
        import optuna
    except ImportError as error:
        raise InputError("the package optuna is missing; run pip install optuna") from error
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    study.optimize(objective, n_trials=20, catch=DivergedError)
    print(f"best of 20: val_loss {study.best_value:.4f} with {study.best_params}")
    print("It is partly luck: compare it with the config over new seeds, by scripts/benchmark.py.")


if __name__ == "__main__":
    sys.exit(main())
