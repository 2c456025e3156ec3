"""The command line: `hlbgpt fit|validate|test|predict`, from LightningCLI."""

import contextlib
import logging
import os
import pickle
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from hlbgpt.callbacks.checkpoint import LastCheckpoint
from hlbgpt.callbacks.time_to_target import TimeToTarget
from hlbgpt.data import TokenDataModule
from hlbgpt.errors import InputError
from hlbgpt.folders import last_checkpoint, run_folder
from hlbgpt.module import LanguageModule

CONFIG_IN_CHECKPOINT = "hlbgpt_config"
_RUNS = Path("runs")
_DESCRIPTIONS: dict[str, Any] = {
    "description": "Train a small GPT until its validation loss meets a target, and time it.",
    "fit": {"description": "Train until the target is met, and record the time."},
    "validate": {"description": "Measure a checkpoint on the validation split."},
    "test": {"description": "Measure a checkpoint on the test split."},
    "predict": {"description": "Continue prompts with a checkpoint, and print the text."},
}


class Parser(LightningArgumentParser):
    """Says in one line what is wrong with an argument or a config file."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # jsonargparse itself asks for the exception
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        command = parser.prog.replace(" [options]", "")
        sys.stderr.write(f"hlbgpt: error: {_one_line(message)} (see {command} --help)\n")
        raise SystemExit(2)


class SaveConfig(SaveConfigCallback):
    """Saves the run's whole config beside its logs and inside its checkpoints."""

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[CONFIG_IN_CHECKPOINT] = self.parser.dump(self.config, skip_none=False)


class CLI(LightningCLI):
    """LightningCLI with a folder for each run, a clock that is always there, and short errors."""

    def __init__(self) -> None:
        super().__init__(
            LanguageModule,
            TokenDataModule,
            save_config_callback=SaveConfig,
            parser_class=Parser,
            parser_kwargs={"prog": "hlbgpt", **_DESCRIPTIONS},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            # Settings stored in a checkpoint would silently win over those typed.
            load_from_checkpoint_support=False,
            trainer_defaults={"enable_model_summary": False},
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(TimeToTarget, "time_to_target")
        parser.add_lightning_class_args(LastCheckpoint, "checkpoint")

    def _parse_ckpt_path(self) -> None:
        """Take no settings from the checkpoint; what is typed is what runs."""

    def before_instantiate_classes(self) -> None:
        trainer = self.config[self.subcommand].trainer
        _require_accelerator(trainer.accelerator)
        _require_checkpoint(self.config[self.subcommand].get("ckpt_path"))
        if self.subcommand != "fit":
            self.save_config_callback = None
        if trainer.enable_checkpointing is False:
            self._parser(self.subcommand).callback_keys.remove("checkpoint")

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Fill in what the config leaves open, without writing it into the saved config."""
        settings = self.config_init[self.subcommand].trainer
        if settings.enable_progress_bar is None:
            kwargs["enable_progress_bar"] = sys.stdout.isatty()
        if self.subcommand != "fit":
            kwargs.setdefault("logger", settings.logger or False)
        elif settings.default_root_dir is None and not settings.fast_dev_run:
            kwargs |= self._new_folder(settings.logger)
        return super().instantiate_trainer(**kwargs)

    def _new_folder(self, logger: Any) -> dict[str, Any]:
        """Let the run log to runs/<config name>/version_N, a folder that no other run has."""
        folder = _claim_folder(_RUNS / _config_name(self.config[self.subcommand].get("config")))
        found: dict[str, Any] = {"default_root_dir": str(folder)}
        if logger in (None, True):
            found["logger"] = TensorBoardLogger(
                save_dir=folder.parents[1],
                name=folder.parent.name,
                version=folder.name,
                default_hp_metric=False,
            )
        return found

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if (path := kwargs.get("ckpt_path")) and Path(path).is_file():
            self.model.require_matching(_load_checkpoint(path), path)
        return kwargs

    def after_fit(self) -> None:
        folder = run_folder(self.trainer)
        if folder and self.trainer.is_global_zero:
            print(f"run folder: {folder}")
            if any(isinstance(logger, TensorBoardLogger) for logger in self.trainer.loggers):
                logs = _RUNS if _RUNS in folder.parents else folder
                print(f"curves: tensorboard --logdir {logs}")
            if (checkpoint := last_checkpoint(folder)).is_file():
                print(f"text: hlbgpt predict --ckpt_path {checkpoint} --data.prompts 'The '")


def _one_line(message: object) -> str:
    return " ".join(str(message).split())


def _config_name(configs: list[Any] | None) -> str:
    """The run's name: that of the last config file, or of the run that a saved one is from."""
    if not configs:
        return "default"
    path = Path(str(configs[-1]))
    return path.resolve().parents[1].name if path.name == "config.yaml" else path.stem


def _claim_folder(parent: Path) -> Path:
    """Make the first version_N in `parent` that is not there yet; made by one process only.

    Ranks that Lightning launches later find the folder that the first one made.
    """
    if (claimed := os.environ.get("HLBGPT_RUN_FOLDER")) and "LOCAL_RANK" in os.environ:
        return Path(claimed)
    number = 0
    while True:
        folder = parent / f"version_{number}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        except OSError as error:
            raise InputError(
                f"runs: cannot make {str(folder)!r}: {error.strerror}; run from a folder that can "
                "be written to, or set --trainer.default_root_dir"
            ) from error
        else:
            os.environ["HLBGPT_RUN_FOLDER"] = str(folder)
            return folder


def _drop_folder_without_steps() -> None:
    """Remove the run's folder when the run ended before it trained."""
    folder = Path(os.environ.get("HLBGPT_RUN_FOLDER", ""))
    if folder.name and "LOCAL_RANK" not in os.environ and not (folder / "checkpoints").exists():
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # other runs are in it
            folder.parent.rmdir()
            folder.parents[1].rmdir()


def _require_accelerator(name: Any) -> None:
    if name in ("gpu", "cuda") and not torch.cuda.is_available():
        raise InputError(
            f"trainer.accelerator: {name!r} asked for, but torch {torch.__version__} finds no CUDA "
            "GPU; use --trainer.accelerator cpu, or install a CUDA build of torch and its driver"
        )


def _require_checkpoint(path: str | None) -> None:
    if path and path not in ("best", "last", "hpc", "registry") and not Path(path).is_file():
        raise InputError(f"ckpt_path: no file {path!r}; name a checkpoint (.ckpt)")


def _load_checkpoint(path: str) -> dict[str, Any]:
    """Tensors and plain data only: a file that carries code is refused, and its code not run."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise InputError(f"ckpt_path: {path!r} is no checkpoint that loads as data only") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise InputError(f"ckpt_path: {path!r} is no checkpoint of hlbgpt: it has no state_dict")
    return checkpoint


def _with_saved_config(arguments: list[str]) -> list[str]:
    """Add the config saved beside the checkpoint's run where the user names none."""
    given = {argument.split("=")[0] for argument in arguments}
    if not arguments or given & {"--config", "-c", "--help", "-h", "--print_config"}:
        return arguments
    paths = [
        argument.partition("=")[2] or after
        for argument, after in zip(arguments, [*arguments[1:], ""], strict=True)
        if argument.split("=")[0] == "--ckpt_path"
    ]
    if not paths:
        return arguments
    config = Path(paths[-1]).resolve().parents[1] / "config.yaml"
    if not config.is_file():
        return arguments
    command, *rest = arguments
    print(f"settings: {config}", file=sys.stderr)
    return [command, "--config", str(config), *rest]


def _quieten() -> None:
    """Drop Lightning's advertisements, and warnings about its own code."""
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda entry: "Tip:" not in entry.getMessage()
    )


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; what a user can put right ends in one line and exit code 2.

    With HLBGPT_TRACEBACK=1 in the environment the traceback is shown.
    """
    sys.argv[1:] = _with_saved_config(sys.argv[1:] if arguments is None else arguments)
    # Classes in a file of the current folder can be named in `class_path`, as `file.Class`.
    sys.path.insert(0, os.getcwd())
    if "LOCAL_RANK" not in os.environ:  # a folder claimed by an earlier run is not this run's
        os.environ.pop("HLBGPT_RUN_FOLDER", None)
    _quieten()
    try:
        CLI()
    except (InputError, MisconfigurationException) as error:
        _drop_folder_without_steps()
        if os.environ.get("HLBGPT_TRACEBACK"):
            raise
        sys.stderr.write(f"hlbgpt: error: {_one_line(error)}\n")
        raise SystemExit(2) from None
