"""The command line: `hlbgpt fit|validate|test|predict`, from LightningCLI."""

import contextlib
import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from hlbgpt.callbacks.checkpoint import LastCheckpoint
from hlbgpt.callbacks.console import Console
from hlbgpt.callbacks.divergence import StopOnDivergence
from hlbgpt.callbacks.time_to_target import TimeToTarget
from hlbgpt.callbacks.token_schedule import TokenSchedule
from hlbgpt.cli.checks import require_readable_configs, require_sane
from hlbgpt.data import TokenDataModule
from hlbgpt.runs.checkpoint import load_checkpoint, require_matching
from hlbgpt.runs.config import (
    IN_CHECKPOINT,
    SaveConfig,
    changed_settings,
    config_name,
    with_saved_config,
)
from hlbgpt.runs.folder import (
    RUNS,
    claim_folder,
    drop_folder_without_steps,
    folder_of,
    forget_claim,
    is_unfinished,
    last_checkpoint,
    newest_checkpoint,
    reclaim_folder,
    requeued_checkpoint,
    run_folder,
    sole_owner,
)
from hlbgpt.runs.logger import CurveLogger, text_loggers
from hlbgpt.training.module import LanguageModule
from hlbgpt.training.resume import KEY, require_resumable, require_steps_left
from hlbgpt.utils.errors import DivergedError, InputError

_DESCRIPTION = "Train a small GPT until its validation loss meets a target, and time it."
_COMMANDS = {
    "fit": "Train until the target is met, and record the time.",
    "validate": "Measure a checkpoint on the validation split.",
    "test": "Measure a checkpoint on the test split.",
    "predict": "Continue prompts with a checkpoint, and print the text.",
}


class RefusedError(SystemExit):
    """The command line makes no sense; jsonargparse lets this pass where it catches others.

    Attributes:
        message: What is wrong with it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(2)
        self.message = message


class Parser(LightningArgumentParser):
    """Says in one line what is wrong with an argument or a config file."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # jsonargparse itself asks for the exception
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        command = parser.prog.replace(" [options]", "")
        raise RefusedError(f"{one_line(message)} (see {command} --help)")


class CLI(LightningCLI):
    """LightningCLI with a folder for each run, a clock that is always there, and short errors."""

    def __init__(
        self, resources: contextlib.ExitStack, callbacks: Sequence[L.Callback] = ()
    ) -> None:
        """`resources` are closed when the command has ended; `callbacks` are added."""
        self.resources = resources
        self.checkpoint: dict[str, Any] = {}
        self.checkpoint_path: Path | None = None
        super().__init__(
            LanguageModule,
            TokenDataModule,
            save_config_callback=SaveConfig,
            save_config_kwargs={"save_to_log_dir": False},
            parser_class=Parser,
            parser_kwargs={"prog": "hlbgpt", "description": _DESCRIPTION}
            | {name: {"description": _COMMANDS[name]} for name in self.subcommands()},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            # Settings stored in a checkpoint would silently win over those typed.
            load_from_checkpoint_support=False,
            trainer_defaults={"enable_model_summary": False, "callbacks": list(callbacks)},
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The one that is asked for, or all: each takes a while to set up."""
        known = LightningCLI.subcommands()
        return {name: known[name] for name in sys.argv[1:2] if name in known} or known

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            raise InputError(f"seed_everything: {error}") from error

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(StopOnDivergence, "divergence")
        parser.add_lightning_class_args(TokenSchedule, "schedule")
        parser.add_lightning_class_args(TimeToTarget, "time_to_target")
        parser.add_lightning_class_args(LastCheckpoint, "checkpoint")
        parser.add_lightning_class_args(Console, "console")

    def _parse_ckpt_path(self) -> None:
        """Take no settings from the checkpoint; what is typed is what runs."""

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        require_sane(config.trainer)
        self._find_checkpoint(config)
        if self.subcommand != "fit":
            self.save_config_callback = None
        if config.trainer.enable_checkpointing is False:
            self._parser(self.subcommand).callback_keys.remove("checkpoint")

    def _find_checkpoint(self, config: Any) -> None:
        """Turn `ckpt_path` into the path of a file, and read the file."""
        name = config_name(config.get("config"))
        if config.ckpt_path == "last":
            config.ckpt_path = str(newest_checkpoint(name))
        elif config.ckpt_path is None and self.subcommand == "fit":
            config.ckpt_path = requeued_checkpoint(name)
        if config.ckpt_path is None:
            return
        if not Path(config.ckpt_path).is_file():
            raise InputError(
                f"ckpt_path: no file {config.ckpt_path!r}; name a checkpoint (.ckpt), or 'last'"
            )
        self.checkpoint = load_checkpoint(config.ckpt_path)
        self.checkpoint_path = Path(config.ckpt_path)
        if self.subcommand == "fit":
            require_resumable(self.checkpoint)

    def instantiate_classes(self) -> None:
        """Build what the config names; jsonargparse wraps what a class has to say against it."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            inner: BaseException | None = error
            while inner is not None and not isinstance(inner, InputError):
                inner = inner.__cause__ or inner.__context__
            raise inner or error from None

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Fill in what the config leaves open, without writing it into the saved config."""
        settings = self.config_init[self.subcommand].trainer
        own_bar = any(isinstance(c, ProgressBar) for c in settings.callbacks or [])
        if own_bar or settings.enable_progress_bar is False or self.subcommand != "fit":
            self._parser(self.subcommand).callback_keys.remove("console")
            if settings.enable_progress_bar is None:
                # Not between the texts that `predict` prints.
                shown = self.subcommand != "predict" and sys.stdout.isatty()
                kwargs["enable_progress_bar"] = own_bar or shown
        if self.subcommand != "fit":
            kwargs.setdefault("logger", settings.logger or False)
        elif settings.default_root_dir is None and not settings.fast_dev_run:
            kwargs |= self._folder(settings.logger)
        try:
            return super().instantiate_trainer(**kwargs)
        except ValueError as error:
            raise InputError(f"trainer: {error}") from error

    def _folder(self, logger: Any) -> dict[str, Any]:
        """Let the run log to a folder that no other run has, runs/<config name>/version_N.

        A run that was cut short goes on in its own. Its curves are cut back to the checkpoint,
        for the steps behind it are made again.
        """
        cut_back = {}
        if self.checkpoint_path and is_unfinished(self.checkpoint_path):
            folder = reclaim_folder(folder_of(self.checkpoint_path))
            cut_back["purge_step"] = self.checkpoint[KEY]["log_step"]
        else:
            name = config_name(self.config[self.subcommand].get("config"))
            folder = claim_folder(RUNS / name)
        if "LOCAL_RANK" not in os.environ:
            self.resources.enter_context(sole_owner(folder))
        found: dict[str, Any] = {"default_root_dir": str(folder)}
        if logger in (None, True):
            found["logger"] = CurveLogger(
                save_dir=folder.parents[1],
                name=folder.parent.name,
                version=folder.name,
                default_hp_metric=False,
                **cut_back,
            )
        return found

    def before_fit(self) -> None:
        """Say which settings differ from the checkpoint's; those of this run hold."""
        if not self.checkpoint:
            return
        self._require_matching()
        # A run killed after its last step has still to write its record.
        if not (self.checkpoint_path and is_unfinished(self.checkpoint_path)):
            require_steps_left(self.checkpoint, self.trainer.max_steps)
        stored = self.checkpoint.get(IN_CHECKPOINT)
        if stored and "LOCAL_RANK" not in os.environ:
            now = self._parser(self.subcommand).dump(self.config[self.subcommand], skip_none=False)
            for line in changed_settings(stored, now):
                print(f"resume: {line}")
        self.checkpoint = {}  # the trainer reads it again

    def _require_matching(self) -> None:
        if self.checkpoint:
            require_matching(self.model, self.checkpoint, str(self.checkpoint_path))

    before_validate = before_test = before_predict = _require_matching

    def after_fit(self) -> None:
        folder = run_folder(self.trainer)
        if folder and self.trainer.is_global_zero:
            print(f"run folder: {folder}")
            if text_loggers(self.trainer.loggers):
                logs = RUNS if RUNS in folder.parents else folder
                print(f"curves: tensorboard --logdir {logs}")
            if (checkpoint := last_checkpoint(folder)).is_file():
                print(f"text: hlbgpt predict --ckpt_path {checkpoint} --data.prompts 'The '")


def one_line(message: object) -> str:
    return " ".join(str(message).split())


def _quieten() -> None:
    """Drop Lightning's advertisements, and warnings about its own code."""
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda entry: "Tip:" not in entry.getMessage()
    )


def run(words: list[str], callbacks: Sequence[L.Callback] = ()) -> CLI:
    """Run a command, and leave this process as it was."""
    forget_claim()
    _quieten()
    arguments, path = sys.argv, list(sys.path)
    # Classes in a file of the current folder can be named in `class_path`, as `file.Class`.
    sys.path.insert(0, os.getcwd())
    try:
        require_readable_configs(words)
        sys.argv = [arguments[0], *with_saved_config(words)]
        with contextlib.ExitStack() as resources:
            return CLI(resources, callbacks)
    except BaseException:
        drop_folder_without_steps()
        raise
    finally:
        sys.argv, sys.path[:] = arguments, path


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; what a user can put right ends in one line and exit code 2.

    With HLBGPT_TRACEBACK=1 in the environment the traceback is shown.
    """
    try:
        run(sys.argv[1:] if arguments is None else arguments)
    except (InputError, MisconfigurationException, OSError, DivergedError) as error:
        if os.environ.get("HLBGPT_TRACEBACK"):
            raise
        sys.stderr.write(f"hlbgpt: error: {one_line(error)}\n")
        raise SystemExit(1 if isinstance(error, DivergedError) else 2) from None
    except RefusedError as error:
        sys.stderr.write(f"hlbgpt: error: {error.message}\n")
        raise SystemExit(2) from None
    except (SystemExit, KeyboardInterrupt) as stop:
        if isinstance(stop, KeyboardInterrupt) or isinstance(stop.__context__, KeyboardInterrupt):
            raise SystemExit(128 + signal.SIGINT) from None
        raise
