"""FLOPs of a run and MFU."""

import json
from types import SimpleNamespace

import pytest
from conftest import LAST, QUICKSTART, RUN

from hlbgpt.models import GPT
from hlbgpt.runs import load_checkpoint
from hlbgpt.training import throughput as room
from hlbgpt.training.throughput import Throughput
from hlbgpt.utils.hardware import GPUS

NET = GPT(vocab_size=64, max_sequence_length=32, width=16, num_heads=2, num_blocks=1)


def test_flops_add_up_over_shapes_and_devices() -> None:
    throughput = Throughput()
    throughput.begin()
    throughput.add(NET, 64, 8)
    throughput.add(NET, 64, 32)
    assert throughput.tokens == 128
    mean = (NET.flops_per_token(8) + NET.flops_per_token(32)) / 2
    assert throughput.means(2.0) == {"flops_per_token": mean, "mfu": None}
    throughput.peak = 1e9
    assert throughput.means(2.0)["mfu"] == pytest.approx(128 * mean / 2 / 1e9)
    assert throughput.means(0.0)["mfu"] is None


def test_rates_are_those_since_they_were_last_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 10.0
    monkeypatch.setattr("hlbgpt.training.throughput.time", SimpleNamespace(monotonic=lambda: now))
    throughput = Throughput()
    throughput.begin()
    assert throughput.rates() == {}
    throughput.add(NET, 32, 8)
    now = 14.0
    assert throughput.rates() == {"tokens_per_second": 8.0}
    throughput.peak = 1e6
    throughput.add(NET, 32, 8)
    now = 15.0
    mfu = 32 * NET.flops_per_token(8) / 1e6
    assert throughput.rates() == {"tokens_per_second": 32.0, "mfu": pytest.approx(mfu)}


def test_a_run_records_and_saves_what_it_spent(
    hlbgpt, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = GPUS[0]._replace(flops=1e12)
    monkeypatch.setattr(room, "gpu_of", lambda _: gpu)
    hlbgpt("fit", *QUICKSTART, *tiny, "--trainer.num_sanity_val_steps=0")
    record = json.loads((RUN / "record.json").read_text())
    net = GPT(vocab_size=256, max_sequence_length=32, width=16, num_heads=2, num_blocks=2)
    assert record["flops_per_token"] == net.flops_per_token(32)
    spent = record["tokens"] * record["flops_per_token"]
    assert record["mfu"] == pytest.approx(spent / record["train_seconds"] / 1e12)
    assert record["driver"] is None  # on a CPU
    assert load_checkpoint(LAST)["hlbgpt"]["flops"] == spent
    monkeypatch.setattr(room, "gpu_of", lambda _: None)
    hlbgpt("fit", "--ckpt_path", LAST, "--trainer.max_steps=6")
    record = json.loads((RUN.with_name("version_1") / "record.json").read_text())
    assert record["flops_per_token"] == net.flops_per_token(32)
    assert record["mfu"] is None
    assert load_checkpoint(RUN.with_name("version_1") / "checkpoints" / "last.ckpt")["hlbgpt"][
        "flops"
    ] == pytest.approx(spent * 1.5)
