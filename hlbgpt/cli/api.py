"""Training from Python, without the command line."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import lightning as L
import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from hlbgpt.cli.main import RefusedError, one_line, run
from hlbgpt.generation.pretrained import TrainedModel
from hlbgpt.runs.folder import CONFIG, RECORD, run_folder
from hlbgpt.utils.errors import InputError


class Run(NamedTuple):
    """What a training run has left.

    Attributes:
        record: The figures of `record.json`.
        folder: Where its files are.
        model: The trained network.
    """

    record: dict[str, Any]
    folder: Path
    model: TrainedModel


def fit(
    config: str | Path | Sequence[str | Path],
    settings: Mapping[str, Any] = MappingProxyType({}),
    callbacks: Sequence[L.Callback] = (),
) -> Run:
    """Train as `hlbgpt fit` does, from Python or a notebook.

    Args:
        config: A config file, or several, of which later ones go over earlier ones.
        settings: Single settings by their dotted names, as `{"trainer.max_steps": 100}`.
        callbacks: Added to those of the configs.

    Raises:
        InputError: What is asked for cannot be done; the message says what to change.
        DivergedError: Training ran into numbers that are not finite.
    """
    configs = [config] if isinstance(config, (str, Path)) else list(config)
    words = [word for path in configs for word in ("--config", str(path))]
    words += [f"--{key}={_as_yaml(value)}" for key, value in settings.items()]
    try:
        cli = run(["fit", *words], callbacks)
    except RefusedError as error:
        raise InputError(error.message) from None
    except MisconfigurationException as error:
        raise InputError(one_line(error)) from error
    folder = run_folder(cli.trainer)
    if folder is None:
        raise InputError("trainer.fast_dev_run: it keeps no run to hand out; leave it out")
    settings_used = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    net = cli.model.net.to("cpu").eval()
    model = TrainedModel(net, cli.datamodule.tokenizer, settings_used["model"]["net"])
    return Run(json.loads((folder / RECORD).read_text(encoding="utf-8")), folder, model)


def _as_yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
