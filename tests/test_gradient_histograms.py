"""Histograms of gradients in TensorBoard."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from conftest import QUICKSTART, RUN
from helpers import fit, open_logger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from hlbgpt.callbacks import GradientHistograms


def histograms(folder: Path) -> dict[str, Any]:
    """Every histogram in `folder`, by name."""
    events = EventAccumulator(str(folder), size_guidance={"histograms": 0}).Reload()
    return {name: events.Histograms(name) for name in events.Tags()["histograms"]}


@pytest.mark.parametrize("per", ["group", "parameter"])
def test_gradient_histograms(folder: Path, tmp_path: Path, per: str) -> None:
    norms: dict[int, dict[str, float]] = {}

    class Watch(L.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            named = {n.removeprefix("net."): [p] for n, p in pl_module.named_parameters()}
            groups = {g["name"]: g["params"] for g in trainer.optimizers[0].param_groups}
            norms[trainer.global_step + 1] = {
                name: sum(p.grad.square().sum().item() for p in params)
                for name, params in (groups if per == "group" else named).items()
            }

    callbacks = Watch(), GradientHistograms(every_n_steps=3, per=per)
    logger = open_logger(tmp_path / "run")
    _, module = fit(folder, tmp_path, *callbacks, logger=logger, micro_batches=2)
    found = histograms(tmp_path / "run")
    assert set(found) == {f"weight_gradient/{name}" for name in norms[1]}
    total = 0
    for name in norms[1]:
        points = found[f"weight_gradient/{name}"]
        assert [point.step for point in points] == [3, 6]
        squares = [point.histogram_value.sum_squares for point in points]
        assert squares == pytest.approx([norms[3][name], norms[6][name]], rel=1e-4)
        total += points[0].histogram_value.num
    assert total == sum(p.numel() for p in module.parameters())


def test_gradient_histograms_leave_out_what_is_not_finite(tmp_path: Path) -> None:
    net = nn.Linear(3, 2, bias=False)
    net.weight.grad = torch.tensor([[1.0, math.nan, 2.0], [math.inf, -1.0, -math.inf]])
    logger = open_logger(tmp_path)
    run = SimpleNamespace(global_step=0, is_global_zero=True, loggers=[logger])
    module = nn.ModuleDict({"net": net})
    optimizer = torch.optim.SGD(net.parameters())
    GradientHistograms(1).on_before_optimizer_step(run, module, optimizer)  # type: ignore[arg-type]
    net.weight.grad.fill_(math.nan)
    GradientHistograms(1).on_before_optimizer_step(run, module, optimizer)  # type: ignore[arg-type]
    logger.finalize("success")
    (point,) = histograms(tmp_path)["weight_gradient/all"]
    assert (point.histogram_value.num, point.histogram_value.sum) == (3, 2.0)


def test_gradient_histograms_from_the_command_line(
    hlbgpt: Callable[..., str], tiny: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    words = [*QUICKSTART, *tiny, "--trainer.callbacks+=GradientHistograms"]
    hlbgpt("fit", *words, "--trainer.callbacks.every_n_steps=2")
    points = histograms(RUN)["weight_gradient/block_matrices"]
    assert [point.step for point in points] == [2, 4]
    with pytest.raises(SystemExit):
        hlbgpt("fit", *words, "--trainer.logger=false")
    last = capfd.readouterr().err.splitlines()[-1]
    assert "GradientHistograms: no TensorBoard logger in trainer.logger; add hlbgpt.runs." in last
