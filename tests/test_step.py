"""A batch is one optimizer step: compared with a plain loop over micro-batches."""

import contextlib
import itertools
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import fit, make, sgd, small_gpt, trainer
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
)
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from hlbgpt.callbacks import HLB010BatchSize, HLB041BatchSize, StepShape
from hlbgpt.models import GPT
from hlbgpt.optim import parameter_groups
from hlbgpt.runs import RunLogger
from hlbgpt.utils.errors import InputError


class MicroBatches(StepShape):
    """Lets each step have its own number of micro-batches, and keeps all batches."""

    def __init__(self, *numbers: int) -> None:
        self.numbers, self.batches = numbers, []

    def next_step(self, trainer: L.Trainer, module: Any) -> dict[str, int]:
        return {"micro_batches": self.numbers[min(trainer.global_step, len(self.numbers) - 1)]}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Tensor, *_: Any) -> None:
        self.batches.append(batch.clone())


def adamw(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=0.01)


def halving(optimizer: torch.optim.Optimizer) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: 0.5**step)


def reference(
    batches: list[Tensor],
    make_optimizer: Any,
    *,
    bf16: bool = False,
    clip: Any = None,
    scheduler: Any = None,
) -> GPT:
    """The same training as a plain loop."""
    net = small_gpt()
    optimizer = make_optimizer(parameter_groups(net))
    schedule = scheduler(optimizer) if scheduler else None
    for batch in batches:
        optimizer.zero_grad()
        for windows in batch:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
                loss = net(windows[:, :-1], windows[:, 1:]) / len(batch)
            loss.backward()
        if clip is not None:
            clip([param for group in optimizer.param_groups for param in group["params"]])
        optimizer.step()
        if schedule is not None:
            schedule.step()
    return net


def assert_same_weights(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other), name


CLIPS: dict[str, tuple[dict[str, Any], Any]] = {
    "no clipping": ({}, None),
    "norm": (
        {"gradient_clip_val": 0.1},
        lambda params: torch.nn.utils.clip_grad_norm_(params, 0.1),
    ),
    "value": (
        {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"},
        lambda params: torch.nn.utils.clip_grad_value_(params, 1e-3),
    ),
}


@pytest.mark.parametrize("numbers", [[1] * 4, [3] * 4, [1, 2, 5, 1, 1, 4, 2]], ids=str)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("clip", CLIPS)
def test_a_step_equals_the_plain_loop(
    folder: Path, tmp_path: Path, numbers: list[int], precision: str, clip: str
) -> None:
    """To the last bit: with a changing number of micro-batches, clipping and a schedule."""
    module, data = make(folder, tmp_path, optimizer=adamw, lr_scheduler=halving)
    steps, (settings, by_hand) = MicroBatches(*numbers), CLIPS[clip]
    run = trainer(
        tmp_path, max_steps=len(numbers), precision=precision, callbacks=[steps], **settings
    )
    run.fit(module, data)
    assert [batch.shape for batch in steps.batches] == [(n, 4, 33) for n in numbers]
    assert all(batch.dtype == torch.int64 for batch in steps.batches)
    text = (folder / "wiki.train.raw").read_bytes()
    assert all(bytes(row.tolist()) in text for row in steps.batches[0].flatten(0, 1))
    assert run.global_step == len(numbers)
    assert module.tokens_seen == sum(numbers) * 4 * 32
    bf16 = precision == "bf16-mixed"
    expected = reference(steps.batches, adamw, bf16=bf16, clip=by_hand, scheduler=halving)
    assert_same_weights(module.net, expected)


def test_every_optimizer_may_call_the_closure_again(folder: Path, tmp_path: Path) -> None:
    """L-BFGS asks for loss and gradients many times a step."""

    def lbfgs(groups: Any) -> torch.optim.Optimizer:
        params = [param for group in groups for param in group["params"]]
        return torch.optim.LBFGS(params, lr=0.1, max_iter=4)

    module, data = make(folder, tmp_path, optimizer=lbfgs, micro_batches=3)
    steps = MicroBatches(3)
    trainer(tmp_path, max_steps=2, callbacks=[steps]).fit(module, data)
    net = small_gpt()
    optimizer = lbfgs(parameter_groups(net))
    for batch in steps.batches:

        def closure(batch: Tensor = batch) -> Tensor:
            optimizer.zero_grad()
            losses = [net(windows[:, :-1], windows[:, 1:]) / len(batch) for windows in batch]
            for loss in losses:
                loss.backward()
            return sum(losses).detach()

        optimizer.step(closure)
    for ours, theirs in zip(module.net.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_smaller_micro_batches_give_the_same_step(folder: Path, tmp_path: Path) -> None:
    """The overlays for small cards rely on it."""
    nets = []
    for micro_batches, size in ((1, 12), (4, 3)):
        sizes = {"micro_batches": micro_batches, "micro_batch_size": size}
        module, data = make(folder, tmp_path, optimizer=sgd(0.5), **sizes)
        trainer(tmp_path, max_steps=3).fit(module, data)
        nets.append(module.net)
    for ours, theirs in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_gradient_scaler_skips_and_unscales_once_a_step(folder: Path, tmp_path: Path) -> None:
    """16-mixed on a CPU: overflow skips a step, and clipping sees unscaled gradients."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-30)
    scales, weights, norms = [], [], []

    class Watch(L.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            norms.append(max(float(p.grad.abs().max()) for p in pl_module.net.parameters()))

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            scales.append(scaler.get_scale())
            weights.append(pl_module.net.embedding.weight.detach().clone())

    module, data = make(folder, tmp_path, optimizer=sgd(0.5), micro_batches=3)
    precision = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
    run = trainer(
        tmp_path, max_steps=3, plugins=[precision], gradient_clip_val=1e-3, callbacks=[Watch()]
    )
    before = module.net.embedding.weight.detach().clone()
    run.fit(module, data)
    assert scales == [2.0**10] * 3  # lowered once, by the first step
    assert torch.equal(before, weights[0])
    assert not torch.equal(weights[0], weights[1])
    assert not math.isfinite(norms[0])
    assert norms[1] < 1
    moved = [(now - then).norm() for then, now in itertools.pairwise(weights)]
    assert all(distance <= 0.5 * 1e-3 * 1.01 for distance in moved)


def test_norms_of_groups_are_those_of_the_whole_step(folder: Path, tmp_path: Path) -> None:
    module, data = make(folder, tmp_path, optimizer=sgd(0.5), micro_batches=2)
    steps, logged = MicroBatches(2), {}

    class Logger(RunLogger):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            logged[step] = dict(metrics)

    logger = Logger()
    logger.open_in(tmp_path)
    run = trainer(tmp_path, max_steps=1, log_every_n_steps=1, callbacks=[steps], logger=logger)
    run.fit(module, data)
    net = small_gpt()
    windows = steps.batches[0].flatten(0, 1)
    loss = net(windows[:, :-1], windows[:, 1:])
    loss.backward()
    values = logged[0]  # Lightning numbers steps from 0
    assert values["train_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert values["micro_batches_per_step"] == 2
    assert values["step_tokens"] == values["tokens_seen"] == windows[:, 1:].numel()
    total = 0.0
    for group in parameter_groups(net):
        norm = torch.cat([p.grad.flatten() for p in group["params"]]).norm().item()
        assert values[f"grad_norm/{group['name']}"] == pytest.approx(norm, rel=1e-4)
        assert values[f"update_norm/{group['name']}"] == pytest.approx(0.5 * norm, rel=1e-4)
        total += norm**2
    assert values["grad_norm"] == pytest.approx(total**0.5, rel=1e-4)


# --- what Lightning offers ------------------------------------------------------------------------


def test_lightnings_accumulation_works_where_a_batch_is_one_micro_batch(
    folder: Path, tmp_path: Path
) -> None:
    module, data = make(folder, tmp_path, optimizer=adamw)
    steps = BatchesOnly()
    run = trainer(tmp_path, max_steps=3, accumulate_grad_batches=4, callbacks=[steps])
    run.fit(module, data)
    assert (run.global_step, len(steps.batches)) == (3, 12)
    assert module.tokens_seen == 12 * 4 * 32
    joined = [torch.cat(steps.batches[i : i + 4]) for i in (0, 4, 8)]
    assert_same_weights(module.net, reference(joined, adamw))


class BatchesOnly(L.Callback):
    def __init__(self) -> None:
        self.batches: list[Tensor] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Tensor, *_: Any) -> None:
        self.batches.append(batch.clone())


def test_gradient_accumulation_scheduler_works(folder: Path, tmp_path: Path) -> None:
    module, data = make(folder, tmp_path)
    steps, scheduler = BatchesOnly(), GradientAccumulationScheduler({0: 3})
    trainer(tmp_path, max_steps=2, callbacks=[scheduler, steps]).fit(module, data)
    assert len(steps.batches) == 6


@pytest.mark.parametrize(
    ("settings", "data", "message"),
    [
        ({"accumulate_grad_batches": 2}, {"micro_batches": 2}, "data.micro_batches both split"),
        (
            {"callbacks": [GradientAccumulationScheduler({0: 2})]},
            {"micro_batches": 2},
            r"accumulate_grad_batches \(or GradientAccumulationScheduler\) and data.micro_batches",
        ),
        ({"accumulate_grad_batches": 2, "callbacks": [MicroBatches(2)]}, {}, "and MicroBatches"),
        ({"max_epochs": 3}, {}, "trainer.max_epochs: 3, .* set trainer.max_steps"),
        ({"limit_train_batches": 10}, {}, "trainer.limit_train_batches: 10, .*max_steps"),
        ({"limit_train_batches": 1}, {}, "trainer.limit_train_batches: 1, .*max_steps"),
        ({"overfit_batches": 3}, {}, "trainer.overfit_batches: 3, .*max_steps"),
        (
            {"val_check_interval": 0.5},
            {},
            "trainer.val_check_interval: 0.5 is not a number",
        ),
        ({"val_check_interval": "00:01:00:00"}, {}, "trainer.val_check_interval: 'a time' is not"),
        ({"check_val_every_n_epoch": 2}, {}, "trainer.check_val_every_n_epoch: 2, .*interval"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_has_no_meaning_here_is_refused_in_one_line(
    folder: Path, tmp_path: Path, settings: dict[str, Any], data: dict[str, Any], message: str
) -> None:
    module, datamodule = make(folder, tmp_path, **data)
    with pytest.raises(InputError, match=message) as refused:
        trainer(tmp_path, max_steps=2, **settings).fit(module, datamodule)
    assert "\n" not in str(refused.value)


def test_checkpoints_rates_and_averages_count_optimizer_steps(folder: Path, tmp_path: Path) -> None:
    """ModelCheckpoint, LearningRateMonitor and EMAWeightAveraging, with 3 micro-batches a step."""
    module, data = make(folder, tmp_path, optimizer=sgd(0.5), lr_scheduler=halving, micro_batches=3)
    weights: list[Tensor] = [module.net.embedding.weight.detach().clone()]
    rates: dict[int, float] = {}

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            weights.append(pl_module.net.embedding.weight.detach().clone())

    class Logger(RunLogger):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            if found := [metrics[name] for name in metrics if name.startswith("lr-")]:
                rates[step or 0] = found[0]

    checkpoints = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    average = EMAWeightAveraging(decay=0.5)
    logger = Logger()
    logger.open_in(tmp_path)
    run = trainer(
        tmp_path,
        max_steps=5,
        log_every_n_steps=1,
        logger=logger,
        callbacks=[Watch(), checkpoints, LearningRateMonitor("step"), average],
    )
    run.fit(module, data)
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {"step=2.ckpt", "step=4.ckpt"}
    assert list(rates) == [0, 1, 2, 3, 4]
    assert list(rates.values()) == pytest.approx([0.5 * 0.5**step for step in range(5)])
    expected = weights[1]
    for after in weights[2:]:
        expected = 0.5 * expected + 0.5 * after
    # Training ends with the averaged weights in place.
    torch.testing.assert_close(module.net.embedding.weight, expected)


def test_ranks_exchange_gradients_once_a_step(folder: Path, tmp_path: Path) -> None:
    """Under DDP, whatever the number of micro-batches."""
    exchanges: list[int] = []

    class Count(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            trainer.strategy.model.register_comm_hook(None, self.exchange)

        @staticmethod
        def exchange(
            state: Any, bucket: torch.distributed.GradBucket
        ) -> torch.futures.Future[Tensor]:
            exchanges.append(bucket.index())
            future: torch.futures.Future[Tensor] = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

    module, data = make(folder, tmp_path, optimizer=sgd(0.5))
    try:
        run = trainer(
            tmp_path, max_steps=4, strategy="ddp", callbacks=[MicroBatches(1, 3, 2, 4), Count()]
        )
        run.fit(module, data)
    finally:
        with contextlib.suppress(ValueError):
            torch.distributed.destroy_process_group()
    assert exchanges == [0] * 4  # the small network fits into one bucket


def test_training_ends_with_the_tokens(folder: Path, tmp_path: Path) -> None:
    """`data.max_tokens` ends the run with a validation, after the step that reaches it."""
    validated = []

    class Watch(L.Callback):
        def on_validation_end(self, trainer: Any, *_: Any) -> None:
            validated.append(trainer.global_step)

    module, data = make(folder, tmp_path, max_tokens=4 * 32 * 5 - 1)
    run = trainer(tmp_path, limit_val_batches=1.0, num_sanity_val_steps=0, callbacks=[Watch()])
    run.fit(module, data)
    assert run.global_step == 5
    assert validated == [5]


def test_tokens_never_end_a_run_inside_a_step(folder: Path, tmp_path: Path) -> None:
    """Where Lightning accumulates gradients over batches."""
    module, data = make(folder, tmp_path, max_tokens=5 * 4 * 32)
    run = trainer(tmp_path, accumulate_grad_batches=4)
    run.fit(module, data)
    assert (run.global_step, module.tokens_seen) == (2, 8 * 4 * 32)


def test_an_overflow_leaves_batch_sizes_as_they_are(folder: Path, tmp_path: Path) -> None:
    """A gradient scaler meets infinities as a matter of course."""

    class Overflow(L.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            if trainer.global_step == 2:
                next(pl_module.net.parameters()).grad.fill_(torch.inf)

    for batch_size in (HLB010BatchSize(), HLB041BatchSize(every_n_steps=1)):
        module, data = make(folder, tmp_path)
        trainer(tmp_path, max_steps=4, callbacks=[Overflow(), batch_size]).fit(module, data)
        assert all(math.isfinite(value) for value in batch_size.state_dict().values())


def test_validations_follow_steps(folder: Path, tmp_path: Path) -> None:
    """Every `val_check_interval` steps, whatever their micro-batches, and after the last."""
    validated = []

    class Watch(L.Callback):
        def on_validation_end(self, trainer: Any, *_: Any) -> None:
            validated.append(trainer.global_step)

    fit(
        folder,
        tmp_path,
        Watch(),
        MicroBatches(2, 1, 3),
        max_steps=8,
        val_check_interval=3,
        num_sanity_val_steps=0,
    )
    assert validated == [3, 6, 8]
