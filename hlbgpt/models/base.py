"""The interface of all networks."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hlbgpt.models.kv_cache import KVCache
from hlbgpt.models.lm_head import TokenScores

# Reads the training text from its beginning: (n,) int64 chunks, each of which begins with so many
# of the last tokens of the one before.
TextChunks = Callable[[int], Iterator[Tensor]]


class Network(nn.Module):
    """Base class of all networks.

    Keep repeated blocks in an attribute `blocks`, where `hlbgpt.optim.parameter_groups` finds them.

    Attributes:
        vocab_size: Number of logits, at least the number of the tokenizer's tokens.
        max_sequence_length: Longest sequence that `forward` accepts; None for no limit.
        supports_kv_cache: Whether `forward` accepts a `kv_cache`; without one, generation is slow.
        needs_token_counts: Whether `init_from_token_counts` must be called before training.
        needs_spelling: Whether `init_from_spelling` must be called before training.
        needs_text: Whether `init_from_text` must be called before training.
        activation_checkpointing: Whether `checkpoint_blocks` was called.
        vocab_loss_weight: Of a network with a pointer the weight () of a second training loss, that
            of the vocabulary's distribution by itself, which otherwise learns little of tokens that
            can be copied. It adds to the gradients, not to the loss that `forward` returns.
        counted_tokens: Tokens of training text whose n-grams are mixed into the predictions.
    """

    vocab_size: int
    max_sequence_length: int | None = None
    supports_kv_cache: bool = False
    needs_token_counts: bool = False
    needs_spelling: bool = False
    needs_text: bool = False
    activation_checkpointing: bool = False

    @property
    def vocab_loss_weight(self) -> Tensor | None:
        return None

    @property
    def counted_tokens(self) -> int:
        return 0

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        per_token: bool = False,
        kv_cache: KVCache | None = None,
    ) -> Any:
        """Compute logits or losses.

        Args:
            tokens: (B, T) int64.
            targets: (B, T) int64; positions with -1 have no loss.
            per_token: Whether to return the scores of each token in place of the mean loss.
            kv_cache: Earlier tokens, which `tokens` continue; never together with `targets`.

        Returns:
            Without `targets`: logits (B, T, vocab_size), or with a `kv_cache` those of the last
            token (B, 1, vocab_size). With `targets`: the mean loss in nats, or with `per_token` a
            `TokenScores`. `hlbgpt.models.score` computes both from logits.
        """
        raise NotImplementedError

    def init_from_token_counts(self, counts: Tensor) -> None:
        """Initialize what depends on how often the training split has each token (at most V,)."""

    def init_from_spelling(self, spelling: Sequence[bytes]) -> None:
        """Initialize what depends on the bytes of each of the tokenizer's tokens (at most V)."""

    def init_from_text(self, chunks: TextChunks) -> None:
        """Initialize what is counted in the training text; `chunks` are on the network's device."""

    def flops_per_token(self, sequence_length: int) -> float:
        """FLOPs of the forward and backward pass for each token of a sequence.

        The default is 6 for each weight of an `nn.Linear`; add 6 for each weight of another LM
        head, and attention, as if every token attended to the whole sequence. This is the
        convention of PaLM (arXiv 2204.02311, appendix B), nanoGPT and torchtitan.
        """
        linear = (module for module in self.modules() if isinstance(module, nn.Linear))
        return 6.0 * sum(module.weight.numel() for module in linear)


def token_scores(net: Network, batch: Tensor) -> TokenScores:
    """Score an evaluation batch (B, T + 1) int64, in which short sequences are padded with -1."""
    return net(batch[:, :-1].clamp(min=0), batch[:, 1:], per_token=True)


def checkpoint_blocks(net: Network) -> None:
    """Activation checkpointing: keep only the inputs of each block for the backward pass.

    There each block runs again, with the same random numbers. The names of weights stay as they
    are. Raises ValueError for a network without `blocks`.
    """
    blocks = getattr(net, "blocks", None)
    if not isinstance(blocks, nn.ModuleList):
        raise ValueError(
            f"model.activation_checkpointing: {type(net).__name__} has no ModuleList `blocks`; "
            "keep its repeated blocks there, or set this to false"
        )
    for block in blocks:
        # Set on the instance, so that no network has to know of it.
        block.forward = partial(_checkpointed, block.forward)
    net.activation_checkpointing = True


def _checkpointed(forward: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **options)
    return checkpoint(forward, *inputs, use_reentrant=False, **options)


def require(valid: bool, message: str) -> None:
    """Raise ValueError with the `message` unless a network's settings are `valid`."""
    if not valid:
        raise ValueError(f"model.net.{message}")


def require_positive(**settings: int) -> None:
    """Raise ValueError for the first of a network's settings that is less than 1."""
    for name, value in settings.items():
        require(value >= 1, f"{name}: {value} is less than 1; set it to at least 1")


def require_not_negative(**settings: float) -> None:
    """Raise ValueError for the first setting below 0."""
    for name, value in settings.items():
        require(value >= 0, f"{name}: {value} is negative; set it to 0 or more")
