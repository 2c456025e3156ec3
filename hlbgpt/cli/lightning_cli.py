"""The command line as a LightningCLI: its settings, and what a run is given beyond them."""

import contextlib
import os
import secrets
import sys
from argparse import SUPPRESS
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger

from hlbgpt.__main__ import COMMANDS, DESCRIPTION
from hlbgpt.cli import scale
from hlbgpt.cli.config_checks import check_trainer_settings, require_run_name
from hlbgpt.cli.parser import Parser, constructor_error
from hlbgpt.cli.run_callbacks import (
    add_run_callbacks,
    as_list,
    require_no_second,
    without_unused,
)
from hlbgpt.cli.save_config import SaveConfig, as_yaml
from hlbgpt.cli.words import TRUST, find_last, no_checkpoint, require_file
from hlbgpt.data import TokenDataModule
from hlbgpt.models import Network
from hlbgpt.runs import RunLogger, load_checkpoint, require_matching_weights
from hlbgpt.runs.checkpoint_schema import RESTORED, require_entries
from hlbgpt.runs.config import CONFIG_KEY, changed_settings, checkpoint_name, config_name
from hlbgpt.runs.folder import (
    RUNS,
    claim_folder,
    exclusive,
    folder_of,
    is_unfinished,
    last_checkpoint,
    reclaim_folder,
    require_unused,
    run_folder,
)
from hlbgpt.runs.ranks import decide, is_first_process, require_all_processes, restarts
from hlbgpt.runs.sizes import build_for_weights
from hlbgpt.runs.trust import trust_flag
from hlbgpt.training import checks, resume
from hlbgpt.training.module import LanguageModule
from hlbgpt.utils.errors import InputError
from hlbgpt.utils.files import expand_path
from hlbgpt.utils.seed import forget_seed


class CLI(LightningCLI):
    """LightningCLI with a folder for each run, callbacks that are always there, and short errors.

    Building it parses the words and instantiates what they name; `run` carries the command out.

    Args:
        words: Words of the command line, the command first.
        callbacks: Callbacks added to those of the config.
        device: Device on which to build the network and nothing else, such as `meta`; None to
            build the whole run.
    """

    def __init__(
        self,
        words: Sequence[str],
        callbacks: Sequence[L.Callback] = (),
        device: str | None = None,
    ) -> None:
        self.build_device = device
        self.resources = contextlib.ExitStack()  # held until the command has ended
        self.checkpoint: dict[str, Any] = {}
        self.checkpoint_path: Path | None = None
        self._callbacks = callbacks
        self._refused: InputError | None = None
        self._command = words[0] if words and words[0] in COMMANDS else None
        super().__init__(
            LanguageModule,
            TokenDataModule,
            save_config_callback=SaveConfig if self._command == "fit" else None,
            save_config_kwargs={"save_to_log_dir": False},
            parser_class=Parser,
            # An abbreviation would pass on the command line, but not in a config.
            parser_kwargs={"prog": "hlbgpt", "description": DESCRIPTION, "allow_abbrev": False}
            | {name: {"description": COMMANDS[name]} for name in self.subcommands()},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            # Settings stored in a checkpoint would silently win over those typed.
            load_from_checkpoint_support=False,
            trainer_defaults={
                "enable_model_summary": False,
                "max_epochs": -1,  # training batches are drawn without end
                "logger": [{"class_path": "hlbgpt.runs.RunLogger"}],
            },
            args=list(words),
        )

    # --- parsing ------------------------------------------------------------------------------

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The command that is asked for, or all of them: each takes a while to set up."""
        known = LightningCLI.subcommands()
        return {self._command: known[self._command]} if self._command else known

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """As Lightning's own, without its warning that arguments hide those of `sys.argv`.

        With `scale.depth` the values of the formulas go between the config files and what is typed.
        """
        assert isinstance(args, list)  # those given to __init__
        words = plain = [word for word in args if not word.startswith("--print_config")]
        self.config = parser.parse_args(plain)
        if "scale" in self.config[self.config.subcommand]:
            words = scale.with_formulas(args, parser.parse_args)
        elif plain != args:
            words = args
        if words is not plain:
            self.config = parser.parse_args(words)
            self.config[self.config.subcommand].pop("scale", None)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--run_name",
            type=str | None,
            default=None,
            help="Name of the run's folder, runs/NAME/version_N; that of the config by default.",
        )
        parser.add_argument(
            "--scale.depth",
            type=int,
            default=SUPPRESS,
            help="Number of blocks, from which formulas set width, heads, rates, batch and tokens, "
            "beginning with what the config files say; what is typed beats them. See "
            "hlbgpt/cli/scale.py.",
        )
        # For the help only: `checked` takes it out of the words.
        parser.add_argument(
            TRUST,
            action="store_true",
            default=SUPPRESS,
            help="Run the classes that the settings in the checkpoint of --ckpt_path name. Without "
            "it, only those of hlbgpt, torch and lightning are taken from a checkpoint.",
        )
        add_run_callbacks(parser)

    def _parse_ckpt_path(self) -> None:
        """Take no settings from the checkpoint; what is typed is what runs."""

    def _set_seed(self) -> None:
        if self.build_device is not None:
            return
        if self.settings.seed_everything is True:  # Lightning would take 0
            self.settings.seed_everything = decide("seed_everything", _draw_seed)
        elif self.settings.seed_everything is False:
            forget_seed()
        try:
            super()._set_seed()
        except ValueError as error:
            raise InputError(f"seed_everything: {error}") from error

    @property
    def settings(self) -> Any:
        """The parsed settings of the command."""
        return self.config[self.subcommand]

    # --- building -----------------------------------------------------------------------------

    def before_instantiate_classes(self) -> None:
        trainer = self.settings.trainer
        if trainer.default_root_dir is not None:  # also for a run that is resumed from elsewhere
            root = expand_path(trainer.default_root_dir, "trainer.default_root_dir")
            trainer.default_root_dir = os.path.abspath(root)
        require_run_name(self.settings.run_name)
        check_trainer_settings(trainer, this_machine=self.build_device is None)
        if self.build_device is None:
            self._find_checkpoint()

    @property
    def run_name(self) -> str:
        """Names the run's folder: `run_name`, or the name of the config."""
        settings = self.settings
        if settings.run_name:
            return str(settings.run_name)
        configs = settings.get("config")
        if configs == [None]:  # the settings come from the checkpoint
            return checkpoint_name(settings.ckpt_path)
        return config_name(configs)

    def _find_checkpoint(self) -> None:
        """Turn `ckpt_path` into the path of a file, and read the file."""
        settings = self.settings
        if settings.ckpt_path == "last":
            settings.ckpt_path = str(find_last(self.run_name, settings.trainer.default_root_dir))
        elif self.subcommand == "fit" and (settings.ckpt_path is None or restarts()):
            settings.ckpt_path = self._unfinished_run() or settings.ckpt_path
        elif settings.ckpt_path is None:
            raise no_checkpoint(str(self.subcommand))
        if settings.ckpt_path is None:
            return
        self.checkpoint_path = require_file(settings.ckpt_path)
        settings.ckpt_path = str(self.checkpoint_path)
        self.checkpoint = load_checkpoint(settings.ckpt_path)
        require_entries(self.checkpoint, RESTORED, f"ckpt_path: {settings.ckpt_path!r}")
        if self.subcommand == "fit":
            resume.require_training_state(self.checkpoint)

    def _unfinished_run(self) -> str | None:
        """The checkpoint in a typed folder: the same command again resumes the run there."""
        if (root := self.settings.trainer.default_root_dir) is None:
            if restarts() and is_first_process():
                print(
                    "restarted: the folder of the run is not known, so a new run begins; with "
                    "--trainer.default_root_dir FOLDER it would be resumed",
                    file=sys.stderr,
                )
            return None
        path = last_checkpoint(Path(root))
        found = decide("ckpt_path", lambda: is_unfinished(path), required=False)
        return str(path) if found else None

    def instantiate_classes(self) -> None:
        """Build what the config names; what a class refuses becomes a one-line error."""
        self.parser.add_instantiator(self._construct, object)
        try:
            if self.build_device is None:
                super().instantiate_classes()
            else:
                with torch.device(self.build_device):
                    self.config_init = self.parser.instantiate_classes(self.config)
        except Exception as error:  # any that a class may raise
            raise self._refused or constructor_error(error) from error

    def _construct(self, made: type, *arguments: Any, **settings: Any) -> Any:
        """Build a class; its error is kept, since jsonargparse may hide it behind its own."""
        try:
            if self.checkpoint and isinstance(made, type) and issubclass(made, Network):
                weights, name = self.checkpoint["state_dict"], f"ckpt_path: {self.checkpoint_path}"
                return build_for_weights(made, weights, name, **settings)
            return made(*arguments, **settings)
        except Exception as error:
            self._refused = self._refused or constructor_error(error, made)
            raise

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Fill in what the config leaves open, without writing it into the saved config."""
        made = self.config_init[self.subcommand]
        settings = made.trainer
        settings.callbacks = [*as_list(settings.callbacks), *self._callbacks]
        keys = self._parser(self.subcommand).callback_keys
        given = {key: made[key] for key in keys if made[key] is not None}
        require_no_second(settings.callbacks, given)
        kwargs |= without_unused(given, settings, str(self.subcommand))
        keys[:] = list(given)
        if self.subcommand != "fit":
            kwargs["logger"] = [x for x in as_list(settings.logger) if _is_of_user(x)] or False
        elif not settings.fast_dev_run:
            kwargs |= self._folder(settings)
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except ValueError as error:
            raise InputError(f"trainer: {error}") from error
        require_all_processes(trainer)
        checks.require_supported_strategy(trainer)
        return trainer

    def _folder(self, settings: Any) -> dict[str, Any]:
        """Give the run a folder that no other run has: runs/<run name>/version_N.

        A run that was cut short continues in its own. Its curves are cut back to the checkpoint,
        because the steps after it are made again.
        """
        typed, path, progress = settings.default_root_dir, self.checkpoint_path, (0, 0)
        resumes = path is not None and is_unfinished(path)
        if path and resumes and (typed is None or _same(Path(typed), folder_of(path))):
            folder = reclaim_folder(folder_of(path))
            progress = resume.progress(self.checkpoint)
        elif typed is not None:
            require_unused(folder := Path(typed))
        else:
            folder = claim_folder(RUNS / self.run_name)
        decide("lock", lambda: self.resources.enter_context(exclusive(folder)), required=False)
        loggers = [RunLogger()] if settings.logger in (None, True) else as_list(settings.logger)
        for logger in loggers:
            if isinstance(logger, RunLogger):
                logger.open_in(folder, *progress)
        return {"default_root_dir": str(folder), "logger": loggers}

    # --- running ------------------------------------------------------------------------------

    def _run_subcommand(self, subcommand: str) -> None:
        """Wait for `run`: a run is built first, and looked at, and then carried out."""

    def run(self) -> None:
        """Carry the command out."""
        with self.resources:
            super()._run_subcommand(str(self.subcommand))

    def before_fit(self) -> None:
        """Print which settings differ from those of the checkpoint."""
        checks.require_useful_callbacks(self.trainer)  # before they are set up
        self._require_matching_weights()
        if not self.checkpoint:
            return
        # A run killed after its last step has still to write its record.
        if not (self.checkpoint_path and is_unfinished(self.checkpoint_path)):
            schedule = self.config_init[self.subcommand].schedule
            table = schedule.table if schedule else []
            max_tokens = table[-1].tokens if table else self.datamodule.max_tokens
            resume.require_steps_left(self.checkpoint, self.trainer.max_steps, max_tokens)
        stored = self.checkpoint.get(CONFIG_KEY)
        if stored and is_first_process():
            now = as_yaml(self._parser(self.subcommand), self.settings)
            for line in changed_settings(stored, now):
                print(f"resume: {line}")
        self.checkpoint = {}  # frees memory; the trainer reads the file again

    def _require_matching_weights(self) -> None:
        if self.checkpoint:
            require_matching_weights(self.model, self.checkpoint, str(self.checkpoint_path))
            resume.require_same_tokenizer(self.checkpoint, self.datamodule)  # before it is used

    before_validate = before_test = before_predict = _require_matching_weights

    def after_fit(self) -> None:
        folder = run_folder(self.trainer)
        if folder and self.trainer.is_global_zero:
            print(f"run folder: {folder}")
            if any(isinstance(logger, RunLogger) for logger in self.trainer.loggers):
                logs = RUNS if RUNS in folder.parents else folder
                print(f"curves: tensorboard --logdir {logs}")
            if (checkpoint := last_checkpoint(folder)).is_file():
                words = f"--ckpt_path {checkpoint}{trust_flag(folder)} --data.prompts 'The '"
                print(f"text: hlbgpt predict {words}")


def _draw_seed() -> int:
    return secrets.randbelow(2**32)


def _same(folder: Path, other: Path) -> bool:
    return folder.resolve() == other.resolve()


def _is_of_user(logger: Any) -> bool:
    return isinstance(logger, Logger) and not isinstance(logger, RunLogger)
