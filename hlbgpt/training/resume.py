"""Exact resume: what a checkpoint holds beyond Lightning's own state, and how a run goes on.

A run that goes on from a checkpoint ends bit-identical to one that never stopped, wherever the
checkpoint was taken: between steps, in the middle of gradient accumulation, before a validation
or after it. Where the user types other settings, the typed ones run.
"""

import random
import warnings
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loops.evaluation_loop import RestartStage
from lightning.pytorch.utilities.types import LRSchedulerTypeUnion
from torch import Tensor
from torch.optim import Optimizer

from hlbgpt.training.steps import StepPlan
from hlbgpt.utils.errors import InputError

KEY = "hlbgpt"  # of this project's part of a checkpoint

# --- random state ---------------------------------------------------------------------------------


def random_states(device: torch.device) -> list[dict[str, Any]]:
    """The state of every random generator, for each rank; tensors and plain data only."""
    name, keys, *rest = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (name, [int(key) for key in keys], *rest),
        "device": None if device.type == "cpu" else _generator(device).get_rng_state(),
    }
    if not torch.distributed.is_initialized():
        return [state]
    states: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(states, state)
    return states


def restore_random_state(states: list[dict[str, Any]], rank: int, device: torch.device) -> None:
    """Set the generators as `random_states` found them; a rank that was not there keeps its own."""
    if rank >= len(states):
        return
    state = states[rank]
    torch.set_rng_state(state["torch"])
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(tuple(state["numpy"]))
    if state["device"] is not None and device.type != "cpu":
        _generator(device).set_rng_state(state["device"])


def _generator(device: torch.device) -> Any:
    return torch.cuda if device.type == "cuda" else torch.get_device_module(device)


# --- partial gradients ----------------------------------------------------------------------------


def partial_gradients(net: torch.nn.Module, strategy: Any) -> dict[str, Tensor]:
    """Gradients of a step under way, by the parameter's name; the mean over the ranks."""
    return {
        name: strategy.reduce(parameter.grad.clone(), reduce_op="mean")
        for name, parameter in net.named_parameters()
        if parameter.grad is not None
    }


def restore_gradients(net: torch.nn.Module, gradients: dict[str, Tensor]) -> None:
    for name, parameter in net.named_parameters():
        if name in gradients:
            parameter.grad = gradients[name].to(parameter.device)


# --- Lightning's loops ----------------------------------------------------------------------------


def repeats_log(fit_loop: dict[str, Any], steps: StepPlan) -> bool:
    """Whether values of the last step have yet to be logged, or will be again with a validation.

    `fit_loop` is the loops' state before it is settled.
    """
    count = fit_loop["epoch_loop.batch_progress"]["current"]
    step_is_over = count["processed"] >= steps.end
    return step_is_over and (count["processed"] > count["completed"] or steps.validation_due)


def settle_loops(fit_loop: dict[str, Any]) -> None:
    """Make a saved state of the loops say "batch N is done", whichever hook it was taken in.

    Lightning counts a batch in four stages, and tells from those where it was. What it then
    repeats or skips depends on the hook: a checkpoint of `on_train_batch_end`, for one, skips the
    validation that is due, and one of `on_train_batch_start` loses a batch.
    """
    batches = fit_loop["epoch_loop.batch_progress"]
    ahead = batches["total"]["ready"] - batches["total"]["processed"]
    for count in (batches["total"], batches["current"]):
        count.update(dict.fromkeys(("ready", "started", "completed"), count["processed"]))
    if ahead:
        batches["is_last_batch"] = False  # that was said of the batch taken
    for loader in fit_loop["state_dict"].get("combined_loader", []):
        if isinstance(loader, dict) and "next_batch" in loader:
            loader["next_batch"] -= ahead  # taken, but not trained on
    passes = fit_loop["epoch_progress"]
    if passes["current"]["started"] == passes["current"]["processed"]:  # between two passes
        for count in (passes["total"], passes["current"]):
            count["completed"] = count["processed"]
        batches["current"] = dict.fromkeys(batches["current"], 0)
        batches["is_last_batch"] = False


def continue_loops(trainer: L.Trainer, steps: StepPlan) -> None:
    """Let the loops, restored from a settled state, take the next batch, or a validation first.

    Called when training starts. Lightning is left to think that it restarts, for that keeps its
    place in the pass, but its guesses about the place are replaced.
    """
    loop = trainer.fit_loop.epoch_loop
    done = loop.batch_progress.current.ready
    mid_step = 0 < done < steps.end
    # Where the step ends, or a divisor of `done`, which says that none is under way.
    trainer.accumulate_grad_batches = steps.end if mid_step else done or steps.micro_batches
    loop.reset_restart_stage()
    loop.val_loop.reset_restart_stage()
    # Number of the step that logs to come belong to; Lightning adds the step's end it did not see.
    loop._batches_that_stepped = trainer.global_step - (0 if mid_step else 1)
    if steps.validation_due:
        loop._batches_that_stepped -= 0 if mid_step else 1
        loop.val_loop.batch_progress.reset()
        loop.val_loop._restart_stage = RestartStage.RESTARTED_MID_EVALUATION
        trainer.val_check_batch = 1
    elif done >= trainer.num_training_batches:
        assert trainer.fit_loop._data_fetcher is not None
        trainer.fit_loop._data_fetcher.done = True  # nothing but the pass's end is left to do


def require_resumable(checkpoint: dict[str, Any]) -> None:
    """Raise InputError where training cannot go on from `checkpoint`."""
    if KEY not in checkpoint or "optimizer_states" not in checkpoint:
        raise InputError(
            "ckpt_path: the checkpoint holds weights only, without the state to go on training "
            "from; use one saved during `fit` (last.ckpt)"
        )


def require_steps_left(checkpoint: dict[str, Any], max_steps: int) -> None:
    """Raise InputError where the run of `checkpoint` has made `max_steps` already."""
    if 0 <= max_steps <= (step := checkpoint["global_step"]):
        raise InputError(
            f"trainer.max_steps: {max_steps}, but the checkpoint is at step {step} already; set it "
            "above, or measure the checkpoint with `hlbgpt validate`"
        )


# --- hyper-parameters -----------------------------------------------------------------------------


def hyperparameters(optimizer: Optimizer, scheduler: LRSchedulerTypeUnion | None) -> dict[str, str]:
    """What a new optimizer and its schedule were built with: name and value as text."""
    found = {"optimizer": _name(optimizer), "lr_scheduler": _name(scheduler)}
    for number, group in enumerate(optimizer.param_groups):
        name = f"optimizer.{group.get('name', number)}"
        found |= {f"{name}.{key}": repr(group[key]) for key in group if key != "params"}
    if scheduler is not None:
        state = scheduler.state_dict()
        found |= {f"lr_scheduler.{key}": repr(value) for key, value in state.items()}
    return found


def _name(thing: object) -> str:
    return "none" if thing is None else f"{type(thing).__module__}.{type(thing).__qualname__}"


def keep_typed(
    checkpoint: dict[str, Any], optimizer: Optimizer, scheduler: LRSchedulerTypeUnion | None
) -> list[str]:
    """Put the settings of `optimizer` and `scheduler`, both new, over those of `checkpoint`.

    What the optimizer has gathered (moments, step counts) stays, unless it is of another class.
    A schedule other than the checkpoint's is taken to where it would be, had it always run.
    Returns a line for each difference, groups with the same one together; without any, the
    checkpoint is left as it is.

    Raises:
        InputError: the optimizer does not fit the checkpoint's, or its schedule has ended.
    """
    stored, typed = checkpoint[KEY]["hyperparameters"], hyperparameters(optimizer, scheduler)
    keys = [key for key in {**stored, **typed} if stored.get(key) != typed.get(key)]
    if not keys:
        return []
    state = checkpoint["optimizer_states"][0]
    fresh = optimizer.state_dict()
    if stored["optimizer"] != typed["optimizer"]:
        state = {**fresh, "state": {}}
    sizes, ours = ([len(group["params"]) for group in s["param_groups"]] for s in (state, fresh))
    if sizes != ours:
        raise InputError(
            f"ckpt_path: its optimizer has parameter groups of {sizes} tensors, this run's has "
            f"{ours}; use the network and code of its run"
        )
    _fast_forward(optimizer, scheduler, checkpoint["global_step"])
    for group, theirs in zip(optimizer.param_groups, state["param_groups"], strict=True):
        theirs.update({key: value for key, value in group.items() if key != "params"})
    checkpoint["optimizer_states"] = [state]
    checkpoint["lr_schedulers"] = [] if scheduler is None else [scheduler.state_dict()]
    lines = {
        f"{key.split('.')[0]}.{key.split('.')[-1]}" if "." in key else key: (
            f"{stored.get(key, 'none')} in the checkpoint, {typed.get(key, 'none')} now"
        )
        for key in keys
        if "._" not in key
    }
    return [f"{key}: {change}" for key, change in lines.items()]


def _fast_forward(optimizer: Optimizer, scheduler: LRSchedulerTypeUnion | None, steps: int) -> None:
    """Let `scheduler` set the optimizer's settings to those after `steps` steps."""
    if scheduler is None:
        return
    with warnings.catch_warnings():  # that the optimizer made no step
        warnings.simplefilter("ignore", UserWarning)
        try:
            for _ in range(steps):
                scheduler.step()
        except ValueError as error:
            raise InputError(
                f"model.lr_scheduler: cannot go on from step {steps} of the checkpoint: {error}"
            ) from error
