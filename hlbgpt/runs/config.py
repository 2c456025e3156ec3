"""A run's settings: saved beside its logs and in its checkpoints, found again, compared."""

import sys
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.cli import SaveConfigCallback

from hlbgpt.runs.logger import text_loggers
from hlbgpt.runs.folder import CONFIG, folder_of, forget_claim, newest_checkpoint, run_folder

IN_CHECKPOINT = "hlbgpt_config"
# Where the settings come from and start at, rather than settings.
_NOT_COMPARED = ("config", "ckpt_path", "weights_only")
_COMPARED = ("seed_everything", "model", "data", "schedule", "time_to_target")
# Of those, what changes nothing of what is learned.
_NOT_LEARNED = ("data.cache_dir", "data.eval_batch_size", "data.prompts", "model.generation")
_TRAINER_COMPARED = (
    "trainer.precision",
    "trainer.max_steps",
    "trainer.devices",
    "trainer.accumulate_grad_batches",
    "trainer.gradient_clip_val",
)


class SaveConfig(SaveConfigCallback):
    """Saves the run's whole config beside its logs and inside its checkpoints."""

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
        if path.exists():  # the run goes on in its folder: it did not start from a checkpoint
            config.ckpt_path = None
        self._text = self.parser.dump(config, skip_none=False)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self._text)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Replace the settings of a run that goes on with others, now that nothing refused them.

        From here on the run's folder is kept, however the run ends.
        """
        forget_claim()
        for logger in text_loggers(trainer.loggers):
            logger.experiment.add_text("config", f"```yaml\n{self._text}\n```", 0)
        path = self._folder / CONFIG
        if trainer.is_global_zero and path.is_file():
            if path.read_text() == self._text:
                return
            path.replace(path.with_name(f"config.until_step_{trainer.global_step}.yaml"))
            path.write_text(self._text)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[IN_CHECKPOINT] = self._text


def config_name(configs: list[Any] | None) -> str:
    """The run's name: that of the last config file, or of the run that a saved one is from.

    Those in a folder `machines` say where a recipe runs, not which.
    """
    if not configs:
        return "default"
    paths = [Path(str(config)) for config in configs]
    recipes = [path for path in paths if path.resolve().parent.name != "machines"]
    path = (recipes or paths)[-1]
    return path.resolve().parents[1].name if path.name == CONFIG else path.stem


def with_saved_config(arguments: list[str]) -> list[str]:
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
    path = newest_checkpoint(None) if paths[-1] == "last" else Path(paths[-1])
    config = folder_of(path) / CONFIG
    if not config.is_file():
        return arguments
    command, *rest = arguments
    print(f"settings: {config}", file=sys.stderr)
    # The checkpoint again, in full: one found as "last" is that of no config in particular.
    return [command, "--config", str(config), *rest, "--ckpt_path", str(path)]


def changed_settings(stored: str, now: str) -> list[str]:
    """A line for each setting that differs between two configs as text."""
    before, after = (flat_settings(yaml.safe_load(text) or {}) for text in (stored, now))
    return [
        f"{key}: {before.get(key, 'not set')} in the checkpoint, {after.get(key, 'not set')} now"
        for key in {**before, **after}
        if before.get(key) != after.get(key) and key.split(".")[0] not in _NOT_COMPARED
    ]


def flat_settings(value: Any, key: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names; in lists, by their numbers."""
    if isinstance(value, dict) and value:
        items = value.items()
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = enumerate(value)  # type: ignore[assignment]
    else:
        return {key: value}
    found: dict[str, Any] = {}
    for name, item in items:
        found |= flat_settings(item, f"{key}.{name}" if key else str(name))
    return found


def compared_settings(config: str) -> dict[str, bool | int | float | str]:
    """Of a config as text, what tells runs apart, by short names, for TensorBoard's HParams.

    Everything that is set of model, data, schedule and target, and of the trainer what changes
    what is learned.
    """
    found = {}
    for key, value in flat_settings(yaml.safe_load(config) or {}).items():
        name = key.replace("init_args.", "").replace(".class_path", "")
        wanted = name in _TRAINER_COMPARED or name.split(".")[0] in _COMPARED
        if wanted and value not in (None, [], {}) and not name.startswith(_NOT_LEARNED):
            found[name] = value if isinstance(value, (bool, int, float)) else str(value)
    return found
