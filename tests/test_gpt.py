"""The network of hlb-gpt 0.1.0: size, initial values, and a reference."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hlbgpt.models import GPT, score


def small() -> GPT:
    torch.manual_seed(0)
    return GPT(vocab_size=64, max_sequence_length=16, width=24, num_heads=3, num_blocks=2)


def reference(net: GPT, tokens: Tensor) -> Tensor:
    """The network with torch's own masked attention, as hlb-gpt 0.1.0 has it."""
    width, length = net.embedding.embedding_dim, tokens.shape[1]
    x = net.embedding.weight[tokens] + net.position_embedding.weight[:length]
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)
    for block in net.blocks:
        attention = nn.MultiheadAttention(
            width, block.attention.num_heads, bias=False, batch_first=True
        )
        attention.in_proj_weight = block.attention.qkv_proj.weight
        attention.out_proj.weight = block.attention.o_proj.weight
        y = F.layer_norm(x, (width,), block.attention.norm.weight)
        x = x + attention(y, y, y, attn_mask=mask, need_weights=False)[0]
        y = F.layer_norm(x, (width,), block.mlp.norm.weight)
        hidden = y @ block.mlp.up_proj.weight.T
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + hidden @ block.mlp.down_proj.weight.T
    return F.layer_norm(x, (width,), net.norm.weight) @ net.embedding.weight.T


def test_equals_the_reference() -> None:
    net = small()
    for parameter in net.parameters():  # random weights, because many start near zero
        nn.init.normal_(parameter, std=0.3)
    tokens = torch.randint(64, (3, 11))
    torch.testing.assert_close(net(tokens), reference(net, tokens), rtol=1e-4, atol=1e-5)


def test_size_of_hlb_gpt_010() -> None:
    with torch.device("meta"):
        net = GPT()
    total = sum(parameter.numel() for parameter in net.parameters())
    assert total - net.position_embedding.weight.numel() == 29_938_560  # 29.94M, by its README
    assert net.embedding.weight.numel() == 50304 * 384


def test_initial_values() -> None:
    torch.manual_seed(0)
    net = GPT(vocab_size=512, width=96, num_heads=2, num_blocks=3)
    for name, parameter in net.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.ones(96))
        else:
            expected = (
                0.02 / math.sqrt(6)
                if name.endswith(("o_proj.weight", "down_proj.weight"))
                else 0.02
            )
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
    assert not any("bias" in name for name, _ in net.named_parameters())


def test_first_loss_is_that_of_a_uniform_guess() -> None:
    net, tokens = small(), torch.randint(64, (4, 17))
    loss = net(tokens[:, :-1], tokens[:, 1:])
    assert loss.item() == pytest.approx(math.log(64), abs=0.1)


def test_score_of_low_precision_logits_is_float32() -> None:
    logits, targets = torch.randn(2, 3, 5).bfloat16(), torch.randint(5, (2, 3))
    assert score(logits, targets).dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 100, "num_heads": 6}, "width: 100 is not divisible by num_heads 6"),
        ({"num_blocks": 0}, "num_blocks: 0 is less than 1"),
        ({"vocab_size": -5}, "vocab_size: -5 is less than 1"),
    ],
)
def test_impossible_sizes_are_named(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPT(**arguments)
