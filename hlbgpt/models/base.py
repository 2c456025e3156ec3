"""The interface of all networks."""

from typing import Any

from torch import Tensor, nn

from hlbgpt.models.kv_cache import KVCache
from hlbgpt.models.lm_head import TokenScores


class Network(nn.Module):
    """Base class of all networks.

    Keep repeated blocks in an attribute `blocks`: the optimizer's parameter groups find the block
    matrices by this name (`hlbgpt.optim.parameter_groups`).

    Attributes:
        vocab_size: Number of logits, at least the number of the tokenizer's tokens.
        max_sequence_length: Longest sequence that `forward` accepts; None for no limit.
        supports_kv_cache: Whether `forward` accepts a `kv_cache`; without one, generation is slow.
            A subclass whose `forward` does not accept it must set this back to False.
        needs_token_counts: Whether `init_from_token_counts` must be called before training.
            Counting takes time.
    """

    vocab_size: int
    max_sequence_length: int | None = None
    supports_kv_cache: bool = False
    needs_token_counts: bool = False

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
            kv_cache: Earlier tokens, which `tokens` continue. Passed only to a network that
                `supports_kv_cache`, and never together with `targets`.

        Returns:
            Without `targets`: logits (B, T, vocab_size), or with a `kv_cache` those of the last
            token (B, 1, vocab_size). With `targets`: the mean loss in nats, or with `per_token` a
            `TokenScores`. `hlbgpt.models.score` computes both from logits.
        """
        raise NotImplementedError

    def init_from_token_counts(self, counts: Tensor) -> None:
        """Initialize what depends on the token frequencies of the training split.

        Args:
            counts: (number of the tokenizer's tokens,) int64, on the network's device.
        """

    def flops_per_token(self, sequence_length: int) -> float:
        """FLOPs of the forward and backward pass for each token of a sequence.

        Counts matrix products and attention: 2 for a multiplication with an addition, and the
        backward pass as twice the forward pass. Causal attention counts as if every token attended
        to the whole sequence, and recomputation does not count. This is the convention of PaLM
        (arXiv 2204.02311, appendix B), nanoGPT and torchtitan, so the numbers are comparable.

        The default is 6 for each weight of an `nn.Linear`. Override it in a network with attention
        or with an LM head that is not an `nn.Linear`.
        """
        linear = (module for module in self.modules() if isinstance(module, nn.Linear))
        return 6.0 * sum(module.weight.numel() for module in linear)


def token_scores(net: Network, batch: Tensor) -> TokenScores:
    """Score an evaluation batch (B, T + 1) int64, in which short sequences are padded with -1."""
    return net(batch[:, :-1].clamp(min=0), batch[:, 1:], per_token=True)


def require_positive(**settings: int) -> None:
    """Raise ValueError for the first of a network's settings that is less than 1."""
    for name, value in settings.items():
        if value < 1:
            raise ValueError(f"model.net.{name}: {value} is less than 1; set it to at least 1")
