"""What a network takes, returns and says of itself."""

from typing import Any

from torch import Tensor, nn

from hlbgpt.models.kv_cache import Cache
from hlbgpt.models.lm_head import TokenScores


class Network(nn.Module):
    """Base of all networks.

    Keep repeated blocks in an attribute `blocks`: the optimizer's parameter groups find the
    matrices there (`hlbgpt.optim.muon`).

    Attributes:
        vocab_size: Number of logits, at least the number of the tokenizer's tokens.
        max_sequence_length: Longest sequence it can read; None if there is no limit.
        reads_cache: Whether `forward` takes a cache; without, generating text is slow. A
            subclass whose `forward` takes none sets it back to False.
        wants_token_counts: Whether `use_token_counts` is to be called; counting takes time.
    """

    vocab_size: int
    max_sequence_length: int | None = None
    reads_cache: bool = False
    wants_token_counts: bool = False

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        per_token: bool = False,
        cache: Cache | None = None,
    ) -> Any:
        """Read `tokens` (B, T) int64.

        Returns:
            Logits (B, T, vocab_size) without `targets`. With `targets` (B, T), of which -1 stands
            for no target, the mean loss in nats, or with `per_token` a `TokenScores`: see
            `hlbgpt.models.score`, which makes both from logits.

        A network that `reads_cache` is also given a `cache`, never with targets: `tokens` then
        follow those the cache holds, and of the last one it returns the logits (B, 1, vocab_size).
        Any other is not passed `cache`, and reads all of a text again for each new token.
        """
        raise NotImplementedError

    def use_token_counts(self, counts: Tensor) -> None:
        """Take how often each token comes in the training split; before the first step.

        Args:
            counts: (tokens of the tokenizer,) int64, on the network's device.
        """

    def flops_per_token(self, sequence_length: int) -> float:
        """FLOPs of forward and backward pass for each predicted token of a window.

        Only matrix products and attention count, a multiplication and an addition as two, the
        backward pass as twice the forward. Causal attention counts in full, as if every token saw
        the whole window, and nothing counts that is computed again: the habit of PaLM (arXiv
        2204.02311, appendix B), nanoGPT and torchtitan, so that figures can be compared.

        This default is 6 for each weight of an `nn.Linear`. Override it in a network that has
        attention, which it leaves out, or a head that is no `nn.Linear`.
        """
        linear = (module for module in self.modules() if isinstance(module, nn.Linear))
        return 6.0 * sum(module.weight.numel() for module in linear)


def token_scores(net: Network, batch: Tensor) -> TokenScores:
    """Score an evaluation batch (B, T + 1) int64, in which -1 fills up short windows."""
    return net(batch[:, :-1].clamp(min=0), batch[:, 1:], per_token=True)
