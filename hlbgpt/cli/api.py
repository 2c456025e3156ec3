"""Training from Python, without the command line."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import lightning as L

from hlbgpt.cli.main import one_line_errors, run
from hlbgpt.cli.run_callbacks import as_list
from hlbgpt.generation import PretrainedModel
from hlbgpt.runs.config import load_yaml
from hlbgpt.runs.folder import CONFIG, RECORD, run_folder
from hlbgpt.runs.record import read_record
from hlbgpt.utils.clock import begin_run
from hlbgpt.utils.errors import InputError


class FitResult(NamedTuple):
    """What a training run has left.

    Attributes:
        record: The figures of `record.json`; empty without `time_to_target`, which writes it.
        folder: Where its files are.
        model: The trained network.
    """

    record: dict[str, Any]
    folder: Path
    model: PretrainedModel


def fit(
    config: str | Path | Sequence[str | Path],
    settings: Mapping[str, Any] = MappingProxyType({}),
    callbacks: L.Callback | Sequence[L.Callback] = (),
) -> FitResult:
    """Train as `hlbgpt fit` does, from Python or a notebook.

    Args:
        config: A config file, or several, of which later ones override earlier ones.
        settings: Single settings by their dotted names, as `{"trainer.max_steps": 100}`.
        callbacks: A callback, or several, added to those of the configs.

    Raises:
        InputError: the run cannot be made as asked; the message says what to change.
        DivergedError: training ran into numbers that are not finite.
    """
    begin_run()  # in a notebook the process is older
    configs = [config] if isinstance(config, (str, Path)) else list(config)
    words = [word for path in configs for word in ("--config", str(path))]
    words += [f"--{key}={_as_yaml(value)}" for key, value in settings.items()]
    with one_line_errors():
        cli = run(["fit", *words], as_list(callbacks))
    folder = run_folder(cli.trainer)
    if folder is None:
        raise InputError("trainer.fast_dev_run: it keeps no run to return; leave it out")
    path = folder / CONFIG
    used = load_yaml(path.read_text(encoding="utf-8"), str(path))
    net = cli.model.net.to("cpu").eval()
    data = cli.datamodule
    model = PretrainedModel(net, data.tokenizer, used["model"]["net"], data.special_tokens)
    record = read_record(folder) if (folder / RECORD).is_file() else {}
    return FitResult(record, folder, model)


def _as_yaml(value: Any) -> str:
    return str(value) if isinstance(value, (str, Path)) else json.dumps(value, default=str)
