"""`--scale.depth`: the size as one number."""

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import CONFIGS
from hypothesis import given, settings
from hypothesis import strategies as st

import hlbgpt as package
from hlbgpt.cli.main import build
from hlbgpt.cli.scale import scaled
from hlbgpt.models import FastGPT
from hlbgpt.optim.schedules import ScheduleRow, check_table, plan_steps
from hlbgpt.planning import plan_run

SPEEDRUN = ["--config", str(CONFIGS / "speedrun.yaml")]
SMALL = """
schedule:
  micro_batch_tokens: 256
  table:
  - {tokens: 0, sequence_length: 16, step_tokens: 128, lr: 1.0}
  - {tokens: 512, sequence_length: 32, step_tokens: 256}
  - {tokens: 1000, lr: 0.1}
time_to_target: {target: 0.5}
trainer: {accelerator: cpu, devices: 1, max_steps: -1}
model:
  compile: false
  net:
    class_path: hlbgpt.models.FastGPT
    init_args: {vocab_size: 256, max_sequence_length: 32, width: 64, num_heads: 2, num_blocks: 1}
  optimizer:
    class_path: hlbgpt.optim.MuonAdamW
    init_args: {lr: 0.01, groups: {block_matrices: {lr: 0.02}}}
"""


@cache
def parsed(*words: str) -> dict[str, Any]:
    """All settings of a run, as they would be saved."""
    found = build(words, device="meta").config.as_dict()
    return {key: value for key, value in found.items() if key != "config"}


def at(depth: int) -> dict[str, Any]:
    return scaled(parsed(*SPEEDRUN), depth)


def rates(depth: int) -> dict[str, float]:
    groups = at(depth)["model.optimizer.init_args.groups"]
    return {name: group["lr"] for name, group in groups.items()}


def size(depth: int) -> tuple[int, int]:
    """All parameters, and those of block matrices and LM head."""
    net = build([*SPEEDRUN, f"--scale.depth={depth}"], device="meta").net
    products = [p for name, p in net.named_parameters() if p.ndim == 2 and "embed" not in name]
    return sum(p.numel() for p in net.parameters()), sum(p.numel() for p in products)


def test_the_config_itself_is_its_own_depth() -> None:
    assert parsed(*SPEEDRUN, "--scale.depth=8") == parsed(*SPEEDRUN)


@pytest.mark.parametrize(
    ("depth", "parameters", "products"), [(17, 350e6, 183e6), (34, 1.55e9, 1.21e9)]
)
def test_known_sizes(depth: int, parameters: float, products: float) -> None:
    """GPT-2 medium's and GPT-2 XL's, of all parameters, of which lookup tables are a part."""
    assert size(depth) == pytest.approx((parameters, products), rel=0.01)


def test_rates_and_batches_follow_the_powers() -> None:
    reference = rates(8)
    assert reference == {
        "block_matrices": 0.02,
        "embeddings": 0.6,
        "bigram_embedding": 0.02,
        "lm_head": 0.003,
        "subword_head": 0.0006,
        "vectors": 0.05,
    }
    wider = math.sqrt(384 / 1664)
    for name, rate in rates(34).items():
        factor = 1 if name in ("block_matrices", "vectors") else wider
        assert rate == pytest.approx(reference[name] * factor, rel=0.005)
    # 34 blocks have 36 times the parameters, and 36^0.383 is nearly 4.
    assert [row.get("step_tokens") for row in at(34)["schedule.init_args.table"]][:2] == [
        4 * 16384,
        4 * 32768,
    ]


@given(st.integers(1, 60))
@settings(max_examples=30)
def test_every_depth_gives_a_network_and_a_schedule(depth: int) -> None:
    found = at(depth)
    net = {key.rpartition(".")[2]: value for key, value in found.items() if "net." in key}
    assert net["num_blocks"] == depth
    assert net["width"] % 64 == 0
    head = net["width"] / net["num_heads"]
    assert 64 <= head <= 128
    assert head % 8 == 0
    assert abs(net["width"] - 48 * depth) <= 32
    with torch.device("meta"):
        made = FastGPT(vocab_size=64, max_sequence_length=8, **net)
    assert len(made.blocks) == depth
    table = [ScheduleRow(**row) for row in found["schedule.init_args.table"]]
    check_table(table)
    # As many tokens a parameter as the reference has, and steps that split into micro-batches.
    products = 12 * net["width"] ** 2 * depth + 50302 * net["width"]
    reference = 12 * 384**2 * 8 + 50302 * 384
    assert table[-1].tokens / products == pytest.approx(20e6 / reference, rel=0.006)
    last = plan_steps(table, micro_batch_tokens=8192).stages[-1]
    assert last.sequence_length * last.batch_size == 8192


def test_depth_in_a_config_file_and_typed_values(tmp_path: Path) -> None:
    (tmp_path / "twelve.yaml").write_text("scale: {depth: 12}\n")
    typed = parsed(*SPEEDRUN, "--scale.depth=12")
    assert parsed(*SPEEDRUN, "--config", str(tmp_path / "twelve.yaml")) == typed
    assert typed["model"]["net"]["init_args"]["width"] == 576
    own = parsed(
        *("--scale.depth", "12", "--model.net.width=640", *SPEEDRUN),
        *("--model.net.num_heads=5", "--model.optimizer.groups.lm_head={lr: 0.5}"),
    )
    expected = yaml.safe_load(yaml.safe_dump(typed["model"]["net"]["init_args"]))
    assert own["model"]["net"]["init_args"] == expected | {"width": 640, "num_heads": 5}
    groups = own["model"]["optimizer"]["init_args"]["groups"]
    assert groups["lm_head"] == {"lr": 0.5}
    assert groups["embeddings"]["lr"] == pytest.approx(0.6 * math.sqrt(384 / 576), rel=0.005)


def test_a_run_saves_explicit_values_and_goes_on_with_them(hlbgpt, tiny: list[str]) -> None:
    Path("small.yaml").write_text(SMALL)
    data = [word for word in tiny if word.startswith("--data") and "micro" not in word]
    words = ["--config", "small.yaml", *data, "--scale.depth", "2"]
    printed = yaml.safe_load(hlbgpt("fit", *words, "--print_config"))
    hlbgpt("fit", *words, "--trainer.max_steps=3")
    folder = Path("runs/small/version_0")
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert "scale" not in saved
    assert "scale" not in printed
    assert saved["model"]["net"]["init_args"]["num_blocks"] == 2
    assert saved["model"]["net"]["init_args"]["width"] == 128
    for key in ("model", "schedule"):
        assert saved[key] == printed[key]
    # The checkpoint's settings, without the number.
    out = hlbgpt("fit", f"--ckpt_path={folder}/checkpoints/last.ckpt", "--trainer.max_steps=5")
    assert "trainer.max_steps: 3 in the checkpoint, 5 now" in out
    assert not [line for line in out.splitlines() if "scale" in line or "model.net" in line]
    path = folder / "config.yaml"
    assert parsed("--config", str(path), "--scale.depth=2") == parsed("--config", str(path))
    assert hlbgpt("validate", f"--ckpt_path={folder}/checkpoints/last.ckpt")


def test_fit_from_python(hlbgpt, tiny: list[str], tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(SMALL)
    data = dict(w[2:].split("=", 1) for w in tiny if w.startswith("--data") and "micro" not in w)
    more = {"scale.depth": 3, "trainer.max_steps": 1}
    result = package.fit(tmp_path / "small.yaml", data | more)
    assert len(result.model.net.blocks) == 3


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([*SPEEDRUN, "--scale.depth=0"], "scale.depth: 0 is not between 1 and 200"),
        ([*SPEEDRUN, "--scale.depth=201"], "scale.depth: 201 is not between 1 and 200"),
        ([*SPEEDRUN, "--scale.depth=eight"], "scale.depth"),
        ([*SPEEDRUN, "--scale.width=8"], "scale.width"),
        (
            ["--config", str(CONFIGS / "quickstart.yaml"), "--scale.depth=8"],
            "scale.depth: model.net is hlbgpt.models.GPT, and the formulas are those of FastGPT",
        ),
        (
            [*SPEEDRUN, "--scale.depth=9", "--model.optimizer=torch.optim.AdamW"],
            "scale.depth: model.optimizer is torch.optim.AdamW, and the formulas are those of Muon",
        ),
        (
            [*SPEEDRUN, "--scale.depth=9", "--schedule=null"],
            "scale.depth: the config has no schedule.table",
        ),
    ],
)
def test_what_cannot_be_scaled_is_refused_in_a_line(words, says: str, hlbgpt, capfd) -> None:
    with pytest.raises(SystemExit) as stop:
        hlbgpt("fit", *words)
    assert stop.value.code == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1
    assert says in lines[0]


@pytest.mark.parametrize("name", ["width", "num_heads", "num_blocks", "vocab_size"])
def test_a_reference_of_nothing_is_refused(name: str, hlbgpt, capfd) -> None:
    Path("none.yaml").write_text(f"model: {{net: {{init_args: {{{name}: 0}}}}}}")
    with pytest.raises(SystemExit) as stop:
        hlbgpt("fit", *SPEEDRUN, "--config=none.yaml", "--scale.depth=9")
    assert stop.value.code == 2
    assert f"model.net.{name}: 0 is less than 1" in capfd.readouterr().err


ROWS = "{tokens: 0, sequence_length: 1024, step_tokens: 131072}, {tokens: 725000000}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--model.activation_checkpointing=true",),
        ("--model.activation_checkpointing=true", f"--schedule.table=[{ROWS}]"),
    ],
)
def test_the_largest_fits_a_card(more: tuple[str, ...]) -> None:
    plan = plan_run([*SPEEDRUN, "--scale.depth=34", *more])
    assert plan.tokens == pytest.approx(725e6, rel=1e-3)
    assert 30e9 < plan.peak_memory < (40e9 if more else 80e9)
