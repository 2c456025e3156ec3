"""FLOPs of a run, MFU, and what is known of cards and drivers."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import LAST, QUICKSTART, RUN

from hlbgpt import machine, module, peaks
from hlbgpt.models import GPT
from hlbgpt.runs.checkpoint import load_checkpoint
from hlbgpt.training.throughput import Throughput
from hlbgpt.utils.errors import InputError

NET = GPT(vocab_size=64, max_sequence_length=32, width=16, num_heads=2, num_blocks=1)


def test_flops_add_up_over_shapes_and_devices() -> None:
    throughput = Throughput()
    throughput.begin()
    throughput.add(NET, 64, 8)
    throughput.add(NET, 64, 32)
    assert throughput.tokens == 128
    mean = (NET.flops_per_token(8) + NET.flops_per_token(32)) / 2
    assert throughput.figures(2.0) == {"flops_per_token": mean, "mfu": None}
    throughput.peak = 1e9
    assert throughput.figures(2.0)["mfu"] == pytest.approx(128 * mean / 2 / 1e9)
    assert throughput.figures(0.0)["mfu"] is None


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


def test_a_checkpoint_without_flops_counts_its_tokens_like_the_next() -> None:
    throughput = Throughput()
    throughput.load_state_dict({"tokens_seen": 1000})
    for _ in range(2):
        throughput.add(NET, 32, 8)
    assert throughput.flops == 1064 * NET.flops_per_token(8)
    again = Throughput()
    again.load_state_dict(throughput.state_dict())
    again.add(NET, 32, 8)
    assert again.flops == 1096 * NET.flops_per_token(8)


@pytest.mark.parametrize(
    ("device", "card"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("A100-PCIE-40GB", "A100"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB-PCIe"),
        ("NVIDIA H100 80GB HBM3", "H100-SXM"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("NVIDIA GeForce RTX 3090", "RTX3090"),
        ("Tesla T4", "T4"),
        # Unknown, although much of the name is known.
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA L40S", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
    ],
)
def test_cards_by_their_drivers_names(
    device: str, card: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: device)
    found = peaks.card_of(torch.device("cuda"))
    assert (found.name if found else None) == card
    assert peaks.card_of(torch.device("cpu")) is None


def test_cards_by_name() -> None:
    assert all(peaks.card_named(card.name.lower()) is card for card in peaks.CARDS)
    assert peaks.card_named("rtx 4090").name == "RTX4090"
    with pytest.raises(InputError, match=r"'H100' is known; take one of A100, .*H100-PCIe.* T4$"):
        peaks.card_named("H100")


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19", "535.104.05"),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build",
            "550.54.15",
        ),
    ],
)
def test_driver(text: str, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda _: text)
    assert machine.driver_version() == version


def test_driver_by_its_own_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(_: Path) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", absent)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.driver_version() is None
    program = tmp_path / "nvidia-smi"
    program.write_bytes(b"#!/bin/sh\necho 580.1\necho 580.1\n")
    program.chmod(0o755)
    assert machine.driver_version() == "580.1"
    program.write_bytes(b"#!/bin/sh\necho NVIDIA-SMI has failed\nexit 9\n")
    assert machine.driver_version() is None


def test_a_run_records_and_saves_what_it_spent(
    hlbgpt, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    card = peaks.CARDS[0]._replace(flops=1e12)
    monkeypatch.setattr(module, "card_of", lambda _: card)
    hlbgpt("fit", *QUICKSTART, *tiny, "--trainer.num_sanity_val_steps=0")
    record = json.loads((RUN / "record.json").read_text())
    net = GPT(vocab_size=256, max_sequence_length=32, width=16, num_heads=2, num_blocks=2)
    assert record["flops_per_token"] == net.flops_per_token(32)
    spent = record["tokens"] * record["flops_per_token"]
    assert record["mfu"] == pytest.approx(spent / record["train_seconds"] / 1e12)
    assert record["driver"] is None  # on a CPU
    assert load_checkpoint(LAST)["hlbgpt"]["flops"] == spent
    monkeypatch.setattr(module, "card_of", lambda _: None)
    hlbgpt("fit", "--ckpt_path", LAST, "--trainer.max_steps=6")
    record = json.loads((RUN.with_name("version_1") / "record.json").read_text())
    assert record["flops_per_token"] == net.flops_per_token(32)
    assert record["mfu"] is None
    assert load_checkpoint(RUN.with_name("version_1") / "checkpoints" / "last.ckpt")["hlbgpt"][
        "flops"
    ] == pytest.approx(spent * 1.5)
