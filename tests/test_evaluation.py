"""Evaluation, compared with an independent computation over every token."""

import math
from pathlib import Path

import pytest
import torch
from helpers import make, trainer
from torch import Tensor


@pytest.mark.parametrize("batch_size", [1, 7, 64, 500])
def test_evaluation_is_the_mean_over_every_token(
    folder: Path, tmp_path: Path, batch_size: int
) -> None:
    module, data = make(folder, tmp_path, eval_batch_size=batch_size)
    run = trainer(tmp_path, limit_val_batches=1.0)
    (values,) = run.validate(module, data, verbose=False)
    text = torch.tensor(list((folder / "wiki.valid.raw").read_bytes()))
    total = correct = 0.0
    with torch.no_grad():
        for start in range(0, len(text) - 1, 32):
            window = text[start : start + 33]
            logits = module.net(window[None, :-1])[0].double()
            chosen = logits.log_softmax(-1)[torch.arange(len(logits)), window[1:]]
            total -= chosen.sum().item()
            correct += (logits.argmax(-1) == window[1:]).sum().item()
    predicted = len(text) - 1
    assert values["val_loss"] == pytest.approx(total / predicted, rel=1e-6)
    assert values["val_accuracy"] == pytest.approx(correct / predicted, rel=1e-6)
    assert values["val_perplexity"] == pytest.approx(math.exp(total / predicted), rel=1e-5)
    assert values["val_bits_per_byte"] == pytest.approx(total / math.log(2) / len(text))
    assert run.validate(module, data, verbose=False) == [values]


def test_padding_never_reaches_the_network(folder: Path, tmp_path: Path) -> None:
    module, data = make(folder, tmp_path, eval_batch_size=64)
    seen: list[Tensor] = []
    module.net.register_forward_pre_hook(lambda _, arguments: seen.extend(arguments))
    trainer(tmp_path, limit_val_batches=1.0).validate(module, data, verbose=False)
    inputs, targets = torch.cat(seen[::2]), torch.cat(seen[1::2])
    assert inputs.min() >= 0
    assert targets.min() == -1
    assert (targets >= 0).sum() == len((folder / "wiki.valid.raw").read_bytes()) - 1
