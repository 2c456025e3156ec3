"""FLOPs per token, compared with torch's own counter."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hlbgpt.models import GPT, HLB041, FastGPT, Network

B, T, V = 3, 16, 96
SIZES = {"vocab_size": V, "max_sequence_length": T, "width": 16, "num_blocks": 2}
HEADS = {"num_heads": 2}
CLUSTERS = {"cutoffs": [16, 24]}
# Token counts in B x T: 32 targets in the first cluster, 8 in each of the others.
COUNTS = torch.tensor([2] * 16 + [1] * 16 + [0] * 64)
TARGETS = torch.arange(V).repeat_interleave(COUNTS).view(B, T)


def counted(net: Network) -> float:
    """FLOPs per token of the forward and backward pass.

    With the math backend of attention: torch does not count the products of fused kernels on a CPU,
    and on a GPU it also counts the scores that the backward pass recomputes.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        net(TARGETS, TARGETS).backward()
    return counter.get_total_flops() / TARGETS.numel()


@pytest.mark.parametrize("chunk", [0, 16])
@pytest.mark.parametrize(
    "net",
    [
        lambda chunk: GPT(**SIZES, **HEADS, loss_chunk_tokens=chunk),
        lambda chunk: HLB041(**SIZES, loss_chunk_tokens=chunk),
        lambda chunk: FastGPT(**SIZES, **HEADS, loss_chunk_tokens=chunk),
        # 12 and 4 of 48 targets, so that nothing is rounded.
        lambda chunk: FastGPT(
            **SIZES, **HEADS, **CLUSTERS, capacity=[12 / 48, 4 / 48], loss_chunk_tokens=chunk
        ),
        lambda chunk: FastGPT(**SIZES, **HEADS, pointer_dim=8, loss_chunk_tokens=chunk),
    ],
    ids=["GPT", "HLB041", "FastGPT", "adaptive", "pointer"],
)
def test_flops_are_those_that_torch_counts(net, chunk: int) -> None:
    network = net(chunk)
    padding = 0  # of queries and keys from 2 to 16, no work of the network
    if isinstance(network, HLB041):
        padding = 3 * len(network.blocks) * 2 * T * (16 - 2)
    assert network.flops_per_token(T) + padding == pytest.approx(counted(network), rel=1e-6)


def test_rare_clusters_count_with_their_probability() -> None:
    """Within 1%, because counts are smoothed."""
    net = FastGPT(**SIZES, **HEADS, **CLUSTERS)
    net.init_from_token_counts(COUNTS * 1000)
    assert net.lm_head.expected_capacity() == pytest.approx([8 / 48, 8 / 48], rel=0.01)
    assert net.flops_per_token(T) == pytest.approx(counted(net), rel=0.01)


def test_before_counting_the_capacity_follows_zipfs_law() -> None:
    net = FastGPT(**SIZES, **HEADS, **CLUSTERS)
    by_rank = 1 / torch.arange(1, V + 1)
    shares = [float(by_rank[a:b].sum() / by_rank.sum()) for a, b in [(16, 24), (24, V)]]
    assert net.lm_head.expected_capacity() == pytest.approx(shares, rel=0.05)


def test_a_custom_network_counts_its_linear_layers() -> None:
    class Plain(Network):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Linear(8, V))
            self.table = torch.nn.Embedding(V, 16)

        def forward(self, tokens, targets=None, *, per_token=False):
            logits = self.layers(self.table(tokens))
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    net = Plain()
    assert net.flops_per_token(T) == net.flops_per_token(1) == 6 * (16 * 8 + 8 * V)
    assert counted(net) == net.flops_per_token(T)
