"""Parameter groups and the optimizer, held against slow references."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hlbgpt.models import GPT, HLB041, FastGPT, Network
from hlbgpt.optim import MuonAdamW, parameter_groups
from hlbgpt.optim.muon import newton_schulz

SMALL: dict[str, Any] = {"vocab_size": 64, "max_sequence_length": 16, "width": 32, "num_blocks": 2}
MUON = {"block_matrices": {"lr": 0.02}}


@pytest.mark.parametrize(
    ("net", "names"),
    [
        (GPT(**SMALL, num_heads=2), ["block_matrices", "embeddings", "vectors"]),
        (HLB041(**SMALL), ["slopes", "block_matrices", "lm_head", "embeddings", "vectors"]),
        (
            FastGPT(
                **SMALL,
                num_heads=2,
                value_embed_blocks=1,
                bigram_buckets=9,
                subword_buckets=9,
                head_input=True,
                pointer_dim=4,
            ),
            [
                "block_matrices",
                "bigram_embedding",
                "subword_head",
                "lm_head",
                "embeddings",
                "vectors",
            ],
        ),
    ],
)
def test_groups_partition_the_parameters(net: Network, names: list[str]) -> None:
    groups = parameter_groups(net)
    assert [group["name"] for group in groups] == names
    members = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(members) == sorted(id(parameter) for parameter in net.parameters())
    assert len(set(members)) == len(members)
    tables = {id(m.weight) for m in net.modules() if isinstance(m, nn.Embedding)}
    named = {group["name"]: {id(p) for p in group["params"]} for group in groups}
    assert tables <= named["embeddings"] | named.get("bigram_embedding", set())
    assert all(p.ndim == 2 for p in groups[names.index("block_matrices")]["params"])


def reference(matrix: Tensor) -> Tensor:
    """One matrix in float64, by the formula as it was published."""
    x = matrix.double() / matrix.double().norm()
    if x.shape[0] > x.shape[1]:
        return reference(matrix.T).T
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x - 4.7750 * a @ x + 2.0315 * a @ a @ x
    return x


@pytest.mark.parametrize("shape", [(24, 24), (48, 12), (12, 48)])
def test_newton_schulz_equals_the_reference(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(5, *shape)
    exact = newton_schulz(matrices, dtype=torch.float64)
    for ours, matrix in zip(exact, matrices, strict=True):
        torch.testing.assert_close(ours, reference(matrix), rtol=1e-5, atol=1e-6)
    short = F.pad(matrices, (0, 0, 0, 7))  # rows of zeros
    filled = newton_schulz(short, dtype=torch.float64)
    torch.testing.assert_close(filled, F.pad(exact, (0, 0, 0, 7)), rtol=1e-5, atol=1e-6)
    values = torch.linalg.svdvals(exact)
    assert values.max() < 1.25
    assert values.median() > 0.65
    quick = newton_schulz(matrices).double()  # in bf16, as training does
    assert (quick - exact).norm() < 0.05 * exact.norm()


def test_muon_equals_the_reference() -> None:
    torch.manual_seed(0)
    net = nn.Module()
    shapes = {"a": (8, 8), "b": (16, 4), "c": (8, 8), "d": (4, 16), "e": (3, 8), "f": (16, 2)}
    net.blocks = nn.ParameterDict({name: torch.randn(shape) for name, shape in shapes.items()})
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.5}
    ours = MuonAdamW(parameter_groups(net), {"block_matrices": settings})
    expected = {name: p.detach().double() for name, p in net.blocks.items()}
    momenta = {name: torch.zeros_like(p) for name, p in expected.items()}
    for _ in range(3):
        for name, parameter in net.blocks.items():
            parameter.grad = torch.randn(shapes[name])
            gradient = parameter.grad.double()
            momenta[name] = 0.9 * momenta[name] + 0.1 * gradient
            update = reference(0.1 * gradient + 0.9 * momenta[name])
            scale = max(1, shapes[name][0] / shapes[name][1]) ** 0.5
            expected[name] = expected[name] * (1 - 0.1 * 0.5) - 0.1 * scale * update
        ours.step()
    for name, parameter in net.blocks.items():
        torch.testing.assert_close(parameter.double(), expected[name], rtol=0, atol=0.02)


SETTINGS: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-8, "weight_decay": 0.1}


def train(net: Network, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        tokens = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(step))
        net(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_adamw_equals_torchs_fused_adamw() -> None:
    nets = [FastGPT(**SMALL, num_heads=2) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    adamw = {"block_matrices": {"method": "adamw"}}
    train(nets[0], MuonAdamW(parameter_groups(nets[0]), adamw, **SETTINGS), range(4))
    fused = torch.optim.AdamW(parameter_groups(nets[1]), **SETTINGS, fused=True)
    train(nets[1], fused, range(4))
    for ours, theirs in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_adamw_is_close_to_torchs_plain_adamw() -> None:
    """Given the same gradients: by training, differences of rounding would grow.

    A gradient that is nothing but rounding, 1e-9, moves a weight by nearly the learning rate.
    """
    ours, theirs = (nn.ParameterList([torch.ones(7, 5), torch.ones(3)]) for _ in range(2))
    optimizers = [
        MuonAdamW([{"params": list(ours)}], **SETTINGS),
        torch.optim.AdamW(theirs, **SETTINGS, foreach=False, fused=False),
    ]
    torch.manual_seed(0)
    for _ in range(4):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)


def test_state_is_saved_and_restored_to_the_last_bit() -> None:
    def made() -> tuple[FastGPT, MuonAdamW]:
        torch.manual_seed(0)
        net = FastGPT(**SMALL, num_heads=2)
        settings = {**MUON, "lm_head": {"betas": [0.6, 0.9]}}
        return net, MuonAdamW(parameter_groups(net), settings, lr=0.001)

    whole, first, second = made(), made(), made()
    train(*whole, range(6))
    train(*first, range(3))
    second[0].load_state_dict(first[0].state_dict())
    second[1].load_state_dict(first[1].state_dict())
    train(*second, range(3, 6))
    for ours, theirs in zip(whole[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_parameter_without_gradient_is_left_alone() -> None:
    net = FastGPT(**SMALL, num_heads=2)
    before = [p.detach().clone() for p in net.parameters()]
    MuonAdamW(parameter_groups(net), MUON, lr=0.001).step()
    assert all(torch.equal(b, p) for b, p in zip(before, net.parameters(), strict=True))


def test_methods_and_rates_by_default() -> None:
    groups = parameter_groups(FastGPT(**SMALL, num_heads=2))
    for settings, rates in (({}, {1e-3}), (MUON, {0.02, 0.5})):
        made = MuonAdamW(groups, settings, lr=0.5 if settings else None).param_groups
        muon = [group["name"] for group in made if group["method"] == "muon"]
        assert muon == ["block_matrices"]
        assert {group["lr"] for group in made} == rates


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"heads": {}}, "no group 'heads'; use bigram_embedding, block_matrices"),
        ({"lm_head": {"rate": 1}}, "groups.lm_head: no setting 'rate'"),
        ({"lm_head": {"method": "sgd"}}, "method 'sgd' is neither"),
        ({"vectors": {"method": "muon"}}, "groups.vectors: muon is for matrices"),
        ({"lm_head": {"lr": -1}}, "groups.lm_head: lr -1 is not 0 or more"),
        ({"lm_head": {"betas": [0.9, 1.0]}}, "groups.lm_head: betas"),
        ({"block_matrices": {"momentum": 1}}, "momentum 1 is not within"),
    ],
)
def test_impossible_settings_are_named(groups: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MuonAdamW(parameter_groups(FastGPT(**SMALL, num_heads=2)), groups, lr=0.01)


def test_rates_of_only_some_groups_are_refused() -> None:
    groups = parameter_groups(FastGPT(**SMALL, num_heads=2))
    with pytest.raises(ValueError, match="groups: no lr for block_matrices, embeddings, vectors"):
        MuonAdamW(groups, {"lm_head": {"lr": 1}})
