"""The callback that saves a run's settings."""

import re
import warnings
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback

from hlbgpt.runs.config import CONFIG_KEY, hparams, text_settings
from hlbgpt.runs.folder import CONFIG, release_claim, run_folder
from hlbgpt.runs.logger import tensorboard_loggers
from hlbgpt.training import resume
from hlbgpt.training.module import LanguageModule
from hlbgpt.utils.errors import InputError
from hlbgpt.utils.files import atomic_write
from hlbgpt.utils.hardware import device_name
from hlbgpt.utils.seed import run_seed


class SaveConfig(SaveConfigCallback):
    """Saves the run's whole config in its folder and checkpoints, and logs it."""

    _text = ""
    _folder = Path()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        folder = run_folder(trainer)  # asked by all ranks; what follows runs on one
        assert folder is not None
        self._folder = folder
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        config = self.config.clone()
        path = self._folder / CONFIG
        if path.exists():  # the run continues in its folder; it did not start from a checkpoint
            config.ckpt_path = None
        self._text = as_yaml(self.parser, config)
        if not path.exists():
            self._write(path)

    def _write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            temporary.write_text(self._text, encoding="utf-8")

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Raise InputError for a text that has changed since, unless another one is named."""
        assert isinstance(pl_module, LanguageModule)
        changed = resume.changed_texts(checkpoint, pl_module.data)
        stored = checkpoint.get(CONFIG_KEY)
        if changed and stored and text_settings(stored) == text_settings(self._text):
            raise InputError(
                f"data.source: the text of the {' and '.join(changed)} split has changed since the "
                "checkpoint was written; restore it, start a new run, or name the new text by "
                "another path, which the record will say"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Replace the settings of a run that continues with others, now that they are accepted."""
        self._log(trainer, pl_module)
        path = self._folder / CONFIG
        if trainer.is_global_zero and path.read_text(encoding="utf-8") != self._text:
            path.replace(path.with_name(f"config.until_step_{trainer.global_step}.yaml"))
            self._write(path)

    def on_train_batch_start(self, *_: Any) -> None:
        """From here on the run's folder is kept, however the run ends."""
        release_claim()

    def _log(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Give the settings to every logger; one that cannot take them does not stop the run."""
        for board in tensorboard_loggers(trainer.loggers):
            board.experiment.add_text("settings", f"```yaml\n{self._text}\n```", 0)
        settings = hparams(self._text) | {
            "precision": str(trainer.precision),
            "device": device_name(module.device),
            "seed": run_seed(),
        }
        for logger in trainer.loggers:
            try:
                logger.log_hyperparams(settings)
            except Exception as error:  # of any kind: loggers talk to other programs
                module.print(f"{type(logger).__name__} did not log the settings: {error}")

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[CONFIG_KEY] = self._text


def as_yaml(parser: LightningArgumentParser, config: Any) -> str:
    """The settings in YAML; raises InputError for one that a config file cannot hold."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="(?s).*Unable to serialize")
        try:
            return str(parser.dump(config, skip_none=False))
        except (UserWarning, ValueError) as error:
            found = re.search(r"Unable to serialize instance (\S+)", str(error))
            if found is None:
                raise
            raise InputError(
                f"{CONFIG}: a setting of the run, {found[1]!r}, cannot be written to it; make the "
                "callback that has it in Python, and run fit(config, callbacks=...)"
            ) from error
