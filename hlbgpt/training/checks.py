"""Checks that trainer, network and data fit together, made before anything that takes long."""

import lightning as L
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ProgressBar,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    SingleDeviceStrategy,
    Strategy,
    XLAStrategy,
)
from torch.optim import Optimizer

from hlbgpt.data import TokenDataModule
from hlbgpt.models import AdaptiveSoftmax, Network
from hlbgpt.training.fsdp import FSDP2Strategy, require_fitting_fsdp2
from hlbgpt.utils.errors import InputError

# Callbacks that would train on without a word, but not do what they promise.
_USELESS: dict[type[L.Callback], str] = {
    StochasticWeightAveraging: "it averages at the ends of epochs, and training is one epoch "
    "without end; use WeightAveraging or EMAWeightAveraging",
    LearningRateFinder: "it looks for model.lr, but each parameter group has its own learning "
    "rate; set model.optimizer.init_args.lr, and try several with scripts/sweep.py",
    BatchSizeFinder: "it would change how many tokens a step trains on; set data.micro_batch_size "
    "for the memory and data.micro_batches for the step",
}
# Whether a strategy trains right; of a subclass, the nearest class in this table says it.
_STRATEGIES: dict[type[Strategy], bool] = {
    SingleDeviceStrategy: True,
    DDPStrategy: True,
    FSDP2Strategy: True,
    DeepSpeedStrategy: False,  # derived from DDPStrategy, but with optimizers of its own
    XLAStrategy: False,
}
_DEFAULT_MAX_EPOCHS = 1000  # what Lightning sets where neither steps nor epochs are given


def require_fitting_together(
    stage: str, trainer: L.Trainer, net: Network, data: TokenDataModule
) -> None:
    """Raise InputError where trainer, network and data do not fit together in `stage`."""
    require_supported_strategy(trainer)
    require_vocabulary(net, data)
    if stage == "predict":
        require_one_device(trainer)
        return
    require_context(net, data.eval_sequence_length, "data.eval_sequence_length")
    if stage == "fit":
        require_useful_callbacks(trainer)
        require_supported(trainer)
        require_context(net, data.sequence_length, "data.sequence_length")
        micro_batches, windows = data.device_batch
        data.require_batch(windows, data.sequence_length)
        if micro_batches > 1:
            require_no_accumulation(trainer, "data.micro_batches")


def require_static_shapes(net: Network) -> None:
    """Raise InputError if training shapes depend on the text: each would be compiled anew."""
    for module in net.modules():
        if isinstance(module, AdaptiveSoftmax) and len(module.sizes) > 1 and not module.capacity:
            raise InputError(
                "model.net.capacity: null, so that shapes depend on the text, which model.compile "
                f"cannot use; set {len(module.sizes) - 1} fractions, one for each of the cutoffs, "
                "or --model.compile false"
            )


def require_useful_callbacks(trainer: L.Trainer) -> None:
    """Raise InputError for callbacks of Lightning's that cannot work here."""
    require_fitting_fsdp2(trainer)
    for callback in callbacks_of(trainer):
        for kind, why in _USELESS.items():
            if isinstance(callback, kind):
                raise _useless(callback, why)
        if isinstance(callback, GradientAccumulationScheduler) and max(callback.scheduling):
            raise _useless(
                callback,
                "it changes after an epoch, and training is one epoch without end; use "
                "schedule.table, or trainer.accumulate_grad_batches for one number",
            )
        if isinstance(callback, ProgressBar) and not hasattr(callback, "is_enabled"):
            raise _useless(callback, "it has no is_enabled, which Lightning's print reads; add it")


def _useless(callback: L.Callback, why: str) -> InputError:
    return InputError(f"trainer.callbacks: {type(callback).__name__}: {why}")


def require_supported_strategy(trainer: L.Trainer) -> None:
    """Raise InputError for a strategy whose ranks would not train as one."""
    kind = type(trainer.strategy)
    if not next((_STRATEGIES[base] for base in kind.__mro__ if base in _STRATEGIES), False):
        raise InputError(
            f"trainer.strategy: {kind.__name__} is not supported, because its ranks would not "
            "train as one; use ddp or fsdp2, or leave it out for one device"
        )


def require_supported(trainer: L.Trainer) -> None:
    """Raise InputError for settings that assume epochs: the training loader has no end."""
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    if trainer.max_epochs not in (None, -1, _DEFAULT_MAX_EPOCHS):
        raise InputError(
            f"trainer.max_epochs: {trainer.max_epochs}, but training batches are drawn without "
            "end; set trainer.max_steps and leave max_epochs at -1"
        )
    if trainer.min_steps or trainer.min_epochs:
        raise InputError(
            "trainer.min_steps, min_epochs or min_time: they would keep a run from stopping at its "
            "target; leave them out"
        )
    for key, default in (("overfit_batches", 0.0), ("limit_train_batches", 1.0)):
        if (value := getattr(trainer, key)) != default or (isinstance(value, int) and value):
            raise InputError(
                f"trainer.{key}: {value}, but training batches are drawn without end; leave it "
                "out and set trainer.max_steps"
            )
    interval = getattr(trainer, "val_check_interval", "a time")
    if not isinstance(interval, int) and interval != 1.0:
        raise InputError(
            f"trainer.val_check_interval: {interval!r} is not a number of steps; give an integer, "
            "such as 100"
        )
    if trainer.check_val_every_n_epoch not in (None, 1):
        raise InputError(
            f"trainer.check_val_every_n_epoch: {trainer.check_val_every_n_epoch}, but there are no "
            "epochs; set trainer.val_check_interval to a number of steps"
        )


def require_no_accumulation(trainer: L.Trainer, key: str) -> None:
    """Raise InputError if gradients are accumulated twice: by Lightning, and as `key` says."""
    if trainer.accumulate_grad_batches != 1 or any(
        isinstance(callback, GradientAccumulationScheduler) for callback in callbacks_of(trainer)
    ):
        raise InputError(
            f"trainer.accumulate_grad_batches (or GradientAccumulationScheduler) and {key} both "
            "split a step into micro-batches; leave out the former and set data.micro_batches"
        )


def require_clipping_works(trainer: L.Trainer, optimizer: Optimizer) -> None:
    """Raise InputError for fused optimizers with clipping in mixed precision, as Lightning does.

    Lightning itself says so in the first step only.
    """
    fused = getattr(optimizer, "_step_supports_amp_scaling", False)
    if fused and trainer.gradient_clip_val and isinstance(trainer.precision_plugin, MixedPrecision):
        raise InputError(
            f"trainer.gradient_clip_val: {trainer.gradient_clip_val}, but Lightning clips no "
            f"gradients of a fused optimizer in {trainer.precision}; set "
            "model.optimizer.init_args.fused to false"
        )


def require_monitored_metrics(trainer: L.Trainer) -> None:
    """Raise InputError for a callback whose `monitor` is not logged; after a validation.

    Lightning's own callbacks would say so with a traceback. After the sanity check, metrics of
    training are not there yet.
    """
    logged = trainer.callback_metrics
    for callback in callbacks_of(trainer):
        name = getattr(callback, "monitor", None)
        if not isinstance(name, str) or name in logged or not getattr(callback, "strict", True):
            continue
        if isinstance(callback, ModelCheckpoint) and name in ("epoch", "step"):  # it knows itself
            continue
        if not trainer.sanity_checking or name.startswith("val"):
            raise InputError(
                f"{type(callback).__name__}: no metric {name!r} is logged, which it monitors; "
                f"choose one of {', '.join(sorted(logged))}"
            )


def require_one_device(trainer: L.Trainer) -> None:
    """Raise InputError for several devices, where each would print some of the texts."""
    if trainer.world_size > 1:
        raise InputError(
            f"trainer.devices: predict runs on one device, not on {trainer.world_size}; add "
            "--trainer.devices 1"
        )


def require_schedule_length(total_steps: int | None, trainer: L.Trainer) -> None:
    """Raise InputError if a learning-rate schedule of `total_steps` ends before the run does."""
    if total_steps is not None and not 0 < trainer.max_steps <= total_steps:
        raise InputError(
            f"trainer.max_steps: {trainer.max_steps}, but the learning-rate schedule ends at "
            f"total_steps {total_steps}; set both to the same number (a resumed run keeps its "
            "schedule)"
        )


def callbacks_of(trainer: L.Trainer) -> list[L.Callback]:
    """The callbacks of a run, in the order of their hooks."""
    return trainer.callbacks  # type: ignore[attr-defined]


def datamodule_of(trainer: L.Trainer) -> TokenDataModule:
    """The datamodule of a run; raises InputError if it is of another class."""
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, TokenDataModule):
        raise InputError(
            f"datamodule: {type(data).__name__} given; LanguageModule needs a TokenDataModule"
        )
    return data


def require_vocabulary(net: Network, data: TokenDataModule) -> None:
    """Raise InputError if the network has fewer logits than the tokenizer has tokens."""
    if net.vocab_size < data.vocab_size:
        special = " with data.special_tokens" if data.special_tokens else ""
        raise InputError(
            f"model.net vocab_size: {net.vocab_size} is less than the {data.vocab_size} tokens of "
            f"data.tokenizer {data.tokenizer}{special}; raise it"
        )


def require_context(net: Network, sequence_length: int, key: str) -> None:
    """Raise InputError, which names `key`, for sequences longer than the network can read."""
    context = net.max_sequence_length
    if context is not None and sequence_length > context:
        raise InputError(
            f"{key}: {sequence_length} is longer than the network's context (max_sequence_length "
            f"{context}); lower it or give the network more"
        )


def summary(trainer: L.Trainer, net: Network, data: TokenDataModule) -> str:
    """One line that says what is about to be trained, and on what."""
    micro_batches, windows = data.device_batch
    tokens, devices = windows * data.sequence_length, trainer.world_size
    batch = f"micro-batch: {tokens:,} tokens"
    if devices > 1:
        batch = f"step: {micro_batches * tokens * devices:,} tokens on {devices} devices, {batch}"
    parameters = sum(parameter.numel() for parameter in net.parameters())
    name = type(net).__name__.removeprefix("FSDP")  # FSDP2 derives a class of its own
    return (
        f"{name}: {parameters:,} parameters; train split: "
        f"{data.train_description}; {batch}; {trainer.precision}"
    )
