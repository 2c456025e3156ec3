"""The LightningModule: exact accumulation, compilation in place, honest evaluation."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from hlbgpt.data import TextFiles, TokenDataModule
from hlbgpt.data.datamodule import IGNORE
from hlbgpt.models import GPT
from hlbgpt.optim import parameter_groups
from hlbgpt.training.module import LanguageModule


class Recorder(L.Callback):
    """Keeps the gradient and the number of micro-batches of every step; sets the numbers to come.

    Restores weights before each step, so that gradients can be computed again.
    """

    def __init__(self, micro_batches: list[int] | None = None) -> None:
        self.planned = iter(micro_batches or [])
        self.batches: list[Tensor] = []
        self.steps: list[tuple[list[Tensor], Tensor]] = []

    def plan(self, module: LanguageModule) -> None:
        module.micro_batches = next(self.planned, module.micro_batches)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LanguageModule)
        self.plan(pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Tensor, batch_idx: int):
        self.batches.append(batch)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        assert isinstance(pl_module, LanguageModule)
        grad = pl_module.net.embedding.weight.grad
        assert grad is not None
        self.steps.append((self.batches, grad.clone()))
        self.batches = []
        self.plan(pl_module)


def make(folder: Path, cache: Path, *, lr: float = 0.0, **data: Any) -> tuple[Any, TokenDataModule]:
    torch.manual_seed(0)
    net = GPT(vocab_size=256, max_sequence_length=32, width=16, num_heads=2, num_blocks=2)
    module = LanguageModule(net, lambda p: torch.optim.SGD(p, lr=lr), compile=False)
    sizes = {"sequence_length": 32, "micro_batch_size": 4, "eval_sequence_length": 32}
    source = TextFiles(folder=str(folder))
    return module, TokenDataModule(source, "bytes", cache_dir=str(cache), **(sizes | data))


def trainer(tmp_path: Path, **arguments: Any) -> L.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 0,
        "max_epochs": -1,
        "default_root_dir": tmp_path,
    }
    if any(isinstance(callback, Checkpoint) for callback in arguments.get("callbacks", [])):
        del defaults["enable_checkpointing"]
    return L.Trainer(**(defaults | arguments))


@pytest.mark.parametrize("numbers", [[1] * 6, [3] * 4, [1, 2, 5, 1, 1, 4, 2], [2, 1, 3, 3, 1]])
def test_a_step_is_the_mean_over_its_micro_batches(
    folder: Path, tmp_path: Path, numbers: list[int]
) -> None:
    """Whatever their number, and although Lightning's own counting knows only multiples."""
    module, data = make(folder, tmp_path)
    recorder = Recorder(numbers)
    trainer(tmp_path, max_steps=len(numbers), callbacks=[recorder]).fit(module, data)
    assert [len(batches) for batches, _ in recorder.steps] == numbers
    for batches, grad in recorder.steps:
        module.zero_grad()
        whole = torch.cat(batches)
        module.net(whole[:, :-1], whole[:, 1:]).backward()
        torch.testing.assert_close(grad, module.net.embedding.weight.grad, rtol=1e-4, atol=1e-7)


def test_accumulate_grad_batches_holds_over_the_end_of_a_pass(folder: Path, tmp_path: Path) -> None:
    module, data = make(folder, tmp_path, micro_batch_size=300)  # 15 batches in a pass
    recorder = Recorder()
    run = trainer(tmp_path, max_epochs=2, accumulate_grad_batches=4, callbacks=[recorder])
    run.fit(module, data)
    assert [len(batches) for batches, _ in recorder.steps] == [4, 4, 4, 3] * 2
    assert run.accumulate_grad_batches == 4
    batches, grad = recorder.steps[3]
    module.zero_grad()
    whole = torch.cat(batches)
    module.net(whole[:, :-1], whole[:, 1:]).backward()
    torch.testing.assert_close(grad, module.net.embedding.weight.grad, rtol=1e-4, atol=1e-7)


def test_lightnings_own_accumulation_scheduler_works(folder: Path, tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import GradientAccumulationScheduler

    module, data = make(folder, tmp_path, micro_batch_size=300)
    recorder = Recorder()
    scheduler = GradientAccumulationScheduler({0: 1, 1: 8})
    trainer(tmp_path, max_epochs=2, callbacks=[scheduler, recorder]).fit(module, data)
    assert [len(batches) for batches, _ in recorder.steps] == [1] * 15 + [8, 7]


def test_batches_are_int64_windows_of_consecutive_tokens(folder: Path, tmp_path: Path) -> None:
    module, data = make(folder, tmp_path)
    recorder = Recorder()
    trainer(tmp_path, max_steps=3, callbacks=[recorder]).fit(module, data)
    text = (folder / "wiki.train.raw").read_bytes()
    for batches, _ in recorder.steps:
        assert batches[0].shape == (4, 33)
        assert batches[0].dtype == torch.int64
        for row in batches[0]:
            assert bytes(row.tolist()) in text
    assert module.tokens_seen == 3 * 4 * 32


@pytest.mark.parametrize("batch_size", [1, 7, 64, 500])
def test_evaluation_is_the_mean_over_every_token(
    folder: Path, tmp_path: Path, batch_size: int
) -> None:
    module, data = make(folder, tmp_path, eval_batch_size=batch_size)
    run = trainer(tmp_path, limit_val_batches=1.0)
    (values,) = run.validate(module, data, verbose=False)
    text = torch.tensor(list((folder / "wiki.valid.raw").read_bytes()))
    total = correct = 0.0
    for start in range(0, len(text) - 1, 32):
        window = text[start : start + 33][None]
        scores = module.net(window[:, :-1], window[:, 1:], per_token=True)
        total += scores.loss.double().sum().item()
        correct += scores.correct.sum().item()
    loss = total / (len(text) - 1)
    # Batched kernels may round differently; the sum itself does not depend on the batches.
    assert values["val_loss"] == pytest.approx(loss, rel=1e-6)
    assert values["val_accuracy"] == pytest.approx(correct / (len(text) - 1), rel=1e-6)
    assert values["val_perplexity"] == pytest.approx(2.718281828459045**loss, rel=1e-5)
    assert values["val_bits_per_byte"] == pytest.approx(total / 0.6931471805599453 / len(text))
    assert run.validate(module, data, verbose=False) == [values]


def test_padding_never_reaches_the_network(folder: Path, tmp_path: Path) -> None:
    module, data = make(folder, tmp_path, eval_batch_size=64, eval_sequence_length=32)
    seen: list[Tensor] = []
    module.net.register_forward_pre_hook(lambda _, arguments: seen.extend(arguments))
    trainer(tmp_path, limit_val_batches=1.0).validate(module, data, verbose=False)
    inputs, targets = torch.cat(seen[::2]), torch.cat(seen[1::2])
    assert inputs.min() >= 0
    assert targets.min() == IGNORE
    assert (targets >= 0).sum() == len((folder / "wiki.valid.raw").read_bytes()) - 1


def test_parameter_groups_partition_the_parameters() -> None:
    net = GPT(vocab_size=64, max_sequence_length=8, width=16, num_heads=2, num_blocks=3)
    groups = {group["name"]: group for group in parameter_groups(net)}
    assert set(groups) == {"block_matrices", "embeddings", "vectors"}
    grouped = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in net.parameters())
    assert len(groups["block_matrices"]["params"]) == 3 * 4
    assert len(groups["embeddings"]["params"]) == 2
    assert all(p.ndim == 1 for p in groups["vectors"]["params"])
    optimizer = torch.optim.AdamW(parameter_groups(net), lr=1.0, weight_decay=0.5)
    decays = {group["name"]: group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {"block_matrices": 0.5, "embeddings": 0.0, "vectors": 0.0}
