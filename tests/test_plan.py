"""Plans of runs that are never started: shapes, memory and time."""

import json
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import plan as script
import pytest
import torch
from conftest import CONFIGS

from hlbgpt.models import GPT, HLB041, FastGPT, Network, checkpoint_blocks
from hlbgpt.optim import MuonAdamW, parameter_groups
from hlbgpt.planning import Plan, Shape, measure, plan_run
from hlbgpt.planning.counts import PeakMemory, Work, WorkCounter
from hlbgpt.utils.hardware import GPUS, gpu_named

SIZES = {"vocab_size": 96, "max_sequence_length": 32, "width": 16, "num_blocks": 2}
TABLE = [
    {"tokens": 0, "sequence_length": 16, "step_tokens": 256, "lr": 1.0, "validate_every": 1024},
    {"tokens": 2048, "sequence_length": 32, "momentum": 0.9},
    {"tokens": 4096, "lr": 0.1, "momentum": 0.95},
]
SPEEDRUN = ["--config", str(CONFIGS / "speedrun.yaml")]
SMALL = [
    *SPEEDRUN,
    f"--schedule.table={json.dumps(TABLE)}",
    "--schedule.micro_batch_tokens=128",
    *("--model.net.init_args.width=32", "--model.net.init_args.num_heads=2"),
    "--model.net.init_args.num_blocks=2",
]


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the script in an empty folder; returns what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["plan.py", *words])
        if code := script.main():
            raise SystemExit(code)
        return capsys.readouterr().out

    return run


def test_plan_of_a_schedule(plan, tmp_path: Path) -> None:
    out = plan(*SMALL, "--gpu", "a100")
    assert "16 steps, 4,096 tokens" in out
    shapes = [line.split() for line in out.splitlines() if " x " in line][1:]
    assert shapes == [
        ["16", "x", "8", "x", "2", "8", "2,048"],
        ["32", "x", "4", "x", "2", "8", "2,048"],
    ]
    assert "\nA100 " in out
    assert "\nH100" not in out
    assert not list(tmp_path.iterdir())


def test_plan_without_a_schedule_uses_the_settings_of_the_data(plan) -> None:
    words = ["--config", str(CONFIGS / "hlb041.yaml"), "--trainer.max_steps=10"]
    out = plan(*words, "--data.micro_batches=3")
    assert f"10 steps, {10 * 3 * 56 * 1024:,} tokens" in out
    assert all(f"\n{gpu.name} " in out for gpu in GPUS)
    assert plan_run([*words, "--data.max_tokens=57345"]).tokens == 2 * 56 * 1024


def test_a_plan_takes_no_longer_because_a_number_is_large(plan) -> None:
    rows = [*TABLE[:2], {"tokens": 10**15}]
    out = plan(*SMALL, f"--schedule.table={json.dumps(rows)}", "--trainer.max_steps=1000000000")
    assert "1,000,000,000 steps, 256,000,000,000 tokens" in out
    counts = [line.split()[-2] for line in out.splitlines() if " x " in line][1:]
    assert counts == ["8", "999,999,992"]


def test_the_speedrun_takes_about_as_long_as_its_compiled_kernels() -> None:
    """The seconds are an estimate too: from the traffic of the kernels that Inductor makes."""
    plan = plan_run(SPEEDRUN)
    for name, seconds in [("A100", 30), ("H100-SXM", 14)]:
        times = plan.seconds(gpu_named(name))
        low, high = times["training seconds"]
        assert low < seconds < high < 2 * low
        for total, *parts in zip(*times.values(), strict=True):
            assert total == pytest.approx(sum(parts))
        assert f" {low:.0f} to {high:.0f} " in script.report(plan, [gpu_named(name)])


def test_times_follow_from_counts_and_data_sheet() -> None:
    gpu = gpu_named("A100")
    work = Work(flops=gpu.flops, fp32_flops=gpu.fp32_flops, fused=1e12, unfused=3e12)
    plan = Plan("", GPT(**SIZES, num_heads=2), {}, {}, work, compiled=True)
    assert plan.seconds(gpu)["products"] == pytest.approx((2 / 0.65, 2 / 0.4))
    traffic = pytest.approx((1e12 / gpu.bandwidth / 0.85, 1.2e12 / gpu.bandwidth / 0.7))
    assert plan.seconds(gpu)["traffic"] == traffic
    eager = replace(plan, compiled=False).seconds(gpu)["traffic"]
    assert eager == pytest.approx((3e12 / gpu.bandwidth / 0.85, 3e12 / gpu.bandwidth / 0.7))


def test_work_of_a_small_mlp_is_as_counted_by_hand() -> None:
    v, n, d, h = 11, 5, 7, 3
    table, up, down = (torch.randn(size, requires_grad=True) for size in [(v, d), (d, h), (h, d)])
    tokens = torch.arange(n)
    with WorkCounter() as counter:
        inner = (torch.nn.functional.embedding(tokens, table) @ up).relu().neg()
        loss = (inner @ down).sum()
        counter.backward = True
        loss.backward()
    # The lookup in both passes, the sum, and three single numbers: the loss and its gradient.
    other = 2 * (8 * n + 4 * v * d + 4 * n * d) + 4 * (n * d + 3)
    # ReLU reads 1 and writes 1, its negative as well, and backward they read 1 and 2 and write 2.
    unfused = other + 9 * 4 * n * h
    # Reads the product, writes the ReLU for the backward pass and its negative for the next
    # product; there reads the ReLU and the product of gradients, and writes for the next product.
    fused = other + 6 * 4 * n * h
    products = 2 * 3 * 2 * n * d * h  # two, each once forward and twice backward
    assert counter.work == Work(flops=0, fp32_flops=products, fused=fused, unfused=unfused)


def work_of(net: type[Network], shape: Shape, autocast: torch.dtype | None, **init) -> Work:
    with torch.device("meta"):
        built = net(**SIZES, **init)
    return measure(built, torch.optim.AdamW, {shape: 1}, autocast)[1]


PARTS = {"cutoffs": [32], "capacity": [0.5], "bigram_buckets": 64, "value_embed_blocks": 1}
NETWORKS = [
    (GPT, {"num_heads": 2}),
    (HLB041, {}),
    (FastGPT, {"num_heads": 2, "loss_chunk_tokens": 16}),
    (FastGPT, {"num_heads": 2, "pointer_dim": 8, **PARTS}),
]


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize(("net", "init"), NETWORKS)
def test_work_of_networks(net: type[Network], init: dict, autocast: torch.dtype | None) -> None:
    one, two, four, twice = (
        work_of(net, Shape(16, windows, count), autocast, **init)
        for windows, count in [(8, 1), (16, 1), (32, 1), (8, 2)]
    )
    assert 0 < one.fused < one.unfused
    for now, double, quadruple in zip(one, two, four, strict=True):
        assert quadruple - double == pytest.approx(2 * (double - now), rel=1e-3)
    # A micro-batch more repeats all but the update, and adds its gradients to those before.
    parameters = list(net(**SIZES, **init).parameters())
    count = sum(parameter.numel() for parameter in parameters)
    update = 28 * count + 2 * 4 * len(parameters)  # AdamW also counts its steps
    assert twice.fused - one.fused == one.fused - update + 12 * count
    assert twice.flops == 2 * one.flops
    assert twice.fp32_flops == 2 * one.fp32_flops
    if autocast is None:
        assert one.flops == 0 < one.fp32_flops


def test_products_are_those_of_flops_per_token() -> None:
    shape, net = Shape(16, 4, 1), GPT(**SIZES, num_heads=2)
    fp32, bf16 = (work_of(GPT, shape, autocast, num_heads=2) for autocast in (None, torch.bfloat16))
    # Kernels compute the scores of attention again for the backward pass.
    again = 2 * 16 * SIZES["width"] * SIZES["num_blocks"]
    assert fp32.fp32_flops == bf16.flops == 64 * (net.flops_per_token(16) + again)
    assert bf16.fp32_flops == 0


def test_products_of_muon() -> None:
    def update(method: str) -> float:
        with torch.device("meta"):
            net = FastGPT(**SIZES, num_heads=2)
        settings = {"block_matrices": {"method": method}}
        make = partial(MuonAdamW, groups=settings)
        return measure(net, make, {Shape(8, 1, 1): 1}, autocast=None)[1].flops

    groups = parameter_groups(FastGPT(**SIZES, num_heads=2))
    sizes = [sorted(p.shape) for g in groups if g["name"] == "block_matrices" for p in g["params"]]
    # Five iterations of three products.
    expected = sum(5 * 3 * 2 * low**2 * high for low, high in sizes)
    assert update("muon") - update("adamw") == expected > 0


@pytest.mark.parametrize(
    ("precision", "fp32"), [("bf16-mixed", False), ("bf16-true", False), ("32-true", True)]
)
def test_products_have_the_precision_of_the_trainer(precision: str, fp32: bool) -> None:
    words = ["--config", str(CONFIGS / "quickstart.yaml"), f"--trainer.precision={precision}"]
    plan = plan_run(words)
    assert bool(plan.work.fp32_flops) == fp32
    assert bool(plan.work.flops) != fp32
    parameters = sum(parameter.numel() for parameter in plan.net.parameters())
    assert plan.memory["gradients"] == (2 if precision == "bf16-true" else 4) * parameters


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_has_a_plan(config: Path, plan) -> None:
    assert plan("--config", str(config), "--gpu", "H200").startswith(f"{config.stem}: ")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([*SMALL, "--gpu", "H1"], "plan.py: error: --gpu: no GPU 'H1' is known; use one of A100,"),
        ([*SMALL, "--model.net.widht=3"], "plan.py: error: .*'widht' is not accepted"),
        ([*SMALL, "--model.net.width=33"], "33 is not divisible"),
        (
            [*SMALL, "--model.net.max_sequence_length=31"],
            "schedule.table sequence_length: 32 is longer",
        ),
        ([*SMALL, "--model.optimizer.momentum=2"], "momentum"),
        ([*SMALL, "--schedule.table=[]"], "max_steps: -1, and no schedule.table"),
        ([*SMALL, "--out", "plan.doc"], "--out: plan.doc does not end in .png"),
        ([*SMALL, "--out", "plan.svg", "--depths", "1"], "--out: draws one run"),
        (
            ["--config", str(CONFIGS / "quickstart.yaml"), "--out", "plan.svg"],
            "--out: the config has no schedule.table",
        ),
    ],
)
def test_errors_take_one_line(words: list[str], says: str, plan, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        plan(*words)
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1
    assert re.search(says, lines[0])


@pytest.mark.parametrize("method", ["muon", "adamw"])
def test_memory_that_does_not_depend_on_batches_is_exact(method: str) -> None:
    def optimizer(groups):
        return MuonAdamW(groups, groups={"block_matrices": {"method": method}})

    with torch.device("meta"):
        net = FastGPT(**SIZES, num_heads=2)
    planned, _ = measure(net, optimizer, {Shape(8, 2, 1): 1}, autocast=None)
    net = FastGPT(**SIZES, num_heads=2)
    built = optimizer(parameter_groups(net))
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    net(tokens, tokens).backward()
    built.step()
    state = [value for values in built.state.values() for value in values.values()]
    assert planned["weights"] == sum(x.nbytes for x in [*net.parameters(), *net.buffers()])
    assert planned["gradients"] == sum(p.grad.nbytes for p in net.parameters())
    assert planned["optimizer state"] == sum(value.nbytes for value in state)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_activations_are_what_autograd_saves(autocast: torch.dtype | None) -> None:
    with torch.device("meta"):
        net = GPT(**SIZES, num_heads=2)
    shapes = {Shape(16, 3, 1): 1, Shape(8, 2, 4): 5}
    planned, _ = measure(net, torch.optim.AdamW, shapes, autocast=autocast)
    net, saved = GPT(**SIZES, num_heads=2), {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    tokens = torch.zeros(3, 17, dtype=torch.int64)
    with (
        torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None),
    ):
        net(tokens[:, :-1], tokens[:, 1:])
    for parameter in net.parameters():
        saved.pop(parameter.untyped_storage().data_ptr(), None)
    assert planned["activations"] == sum(saved.values())


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_activation_checkpointing_keeps_inputs_of_blocks_and_one_block(
    autocast: torch.dtype | None,
) -> None:
    def planned(blocks: int, checkpointed: bool) -> tuple[int, float]:
        with torch.device("meta"):
            net = FastGPT(**(SIZES | {"num_blocks": blocks}), num_heads=2)
        if checkpointed:
            checkpoint_blocks(net)
        memory, work = measure(net, torch.optim.AdamW, {Shape(16, 3, 1): 1}, autocast=autocast)
        return memory["activations"], work.flops + work.fp32_flops

    (plain, flops), (plain_more, flops_more) = planned(2, False), planned(5, False)
    (few, few_flops), (more, more_flops) = planned(2, True), planned(5, True)
    # Each block more is one more input, of 3 x 16 tokens.
    assert more - few == 3 * 3 * 16 * SIZES["width"] * (4 if autocast is None else 2)
    assert few < plain
    assert more < plain_more / 2
    # The backward pass takes twice the products of the forward pass, and half again for attention.
    assert (few_flops - flops) * 5 == pytest.approx((more_flops - flops_more) * 2)
    assert 1.2 < more_flops / flops_more < 1.34


def test_activation_checkpointing_is_planned_as_it_trains() -> None:
    checkpointed = plan_run([*SMALL, "--model.activation_checkpointing=true"])
    assert checkpointed.memory["activations"] < plan_run(SMALL).memory["activations"]


def test_the_picture_follows_the_table(plan, tmp_path: Path) -> None:
    assert plan(*SMALL, "--out", "plan.svg").endswith("written: plan.svg\n")
    assert "Muon's momentum" in (tmp_path / "plan.svg").read_text()
    figure = script.draw(plan_run(SMALL).schedule)
    lines = {line.get_label(): line for axes in figure.axes for line in axes.lines}
    assert list(lines) == [
        "tokens of a step",
        "sequence length",
        "learning rate (factor)",
        "Muon's momentum",
    ]  # the table has no second loss
    x, lengths = lines["sequence length"].get_data()
    assert list(x * 1e6) == pytest.approx(range(0, 4096, 256))
    assert list(lengths) == [16] * 8 + [32] * 8
    assert set(lines["tokens of a step"].get_ydata()) == {256}
    rates = lines["learning rate (factor)"].get_ydata()
    assert rates[0] == pytest.approx(1 - 0.9 * 128 / 4096)
    assert rates[-1] == pytest.approx(0.1 + 0.9 * 128 / 4096)


@pytest.mark.slow
def test_a_row_for_each_depth(plan) -> None:
    small = [word for word in SMALL if "num_blocks" not in word and "width" not in word]
    small = [word for word in small if "num_heads" not in word]
    out = plan(*small, "--depths", "1,2", "--gpu", "A100").splitlines()
    rows = [line.split() for line in out[1:3]]
    assert [row[:3] for row in rows] == [["1", "64", "1"], ["2", "128", "1"]]
    assert out[0].split()[-3:] == ["FLOPs", "A100", "seconds"]
    parameters = [int(row[3].replace(",", "")) for row in rows]
    nets = [plan_run([*small, f"--scale.depth={depth}"]).net for depth in (1, 2)]
    assert parameters == [sum(p.numel() for p in net.parameters()) for net in nets]


def test_depths_are_numbers(plan, capsys) -> None:
    with pytest.raises(SystemExit):
        plan(*SPEEDRUN, "--depths", "1,x")
    assert "--depths: '1,x' is no list of numbers" in capsys.readouterr().err


def test_peak_memory_is_that_of_tensors_alive() -> None:
    before = torch.zeros(1000)
    with PeakMemory() as memory:
        first = before + 1
        second = first * 2
        del first
        third = second[10:].clone()  # 990
        second.add_(1)
        torch._foreach_mul_([before, third], 2)
        del second, third
        last = before.neg()
    assert memory.peak == 4 * 2000
    assert last.nbytes == 4000


def test_the_peak_is_a_step_or_an_update() -> None:
    sizes = {"weights": 5, "gradients": 4, "optimizer state": 3, "activations": 2, "update": 6}
    plan = Plan("", GPT(**SIZES, num_heads=2), {}, sizes, Work(), compiled=True)
    assert plan.peak_memory == 5 + 4 + 3 + 6
    assert replace(plan, memory=sizes | {"activations": 9}).peak_memory == 5 + 4 + 3 + 9
