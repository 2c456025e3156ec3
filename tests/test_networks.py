"""Properties of every network, and references for hlb-gpt 0.4.1's and the fast GPT."""

import copy
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hlbgpt.models import GPT, HLB041, FastGPT, Network, adaptive_softmax, checkpoint_blocks
from hlbgpt.models.adaptive_softmax import take
from hlbgpt.models.kv_cache import KVCache, earlier

SMALL: dict[str, Any] = {"vocab_size": 64, "max_sequence_length": 16, "width": 32, "num_blocks": 3}
NETWORKS: dict[str, Callable[[], Network]] = {
    "gpt": lambda: GPT(**SMALL, num_heads=2),
    "gpt in chunks": lambda: GPT(**SMALL, num_heads=2, loss_chunk_tokens=5),
    "hlb041": lambda: HLB041(**SMALL),
    "fast": lambda: FastGPT(**SMALL, num_heads=2),
    "fast, clusters": lambda: FastGPT(**SMALL, num_heads=2, cutoffs=[8, 24], loss_chunk_tokens=7),
    "fast, tables": lambda: FastGPT(
        **SMALL, num_heads=2, value_embed_blocks=2, bigram_buckets=31, token_shift=False
    ),
    "fast, pointer": lambda: FastGPT(**SMALL, num_heads=2, cutoffs=[8, 24], pointer_dim=8),
    "fast, pointer in chunks": lambda: FastGPT(
        **SMALL, num_heads=2, cutoffs=[8], pointer_dim=8, loss_chunk_tokens=7
    ),
    "fast, spelling": lambda: FastGPT(
        **SMALL,
        num_heads=2,
        cutoffs=[8, 24],
        pointer_dim=8,
        subword_buckets=40,
        head_input=True,
    ),
    "fast, n-grams": lambda: FastGPT(
        **SMALL, num_heads=2, cutoffs=[8, 24], pointer_dim=8, ngram_order=4, ngram_rows=300
    ),
    "fast, capacity": lambda: FastGPT(**SMALL, num_heads=2, cutoffs=[8, 24], capacity=[1.0, 1.0]),
}

SPELLING = [b" %d" % token if token % 2 else b"Token%d" % token for token in range(60)]
SLOW_TO_COMPILE = ("fast, clusters", "fast, pointer", "fast, pointer in chunks", "gpt in chunks")


@pytest.fixture(params=NETWORKS)
def build(request: pytest.FixtureRequest) -> Callable[[], Network]:
    return Dropout if request.param == "dropout" else NETWORKS[request.param]


@pytest.fixture
def net(build: Callable[[], Network]) -> Network:
    """Random weights, because many start as zero."""
    torch.manual_seed(0)
    net = build()
    net.init_from_spelling(SPELLING)
    net.init_from_token_counts(torch.randint(1000, (60,)))
    net.init_from_text(lambda overlap: iter([torch.arange(64).repeat(2), torch.arange(64) // 8]))
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return net


def gradients(net: Network, loss: Tensor) -> list[Tensor]:
    net.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]


def test_no_output_depends_on_a_later_token(net: Network) -> None:
    tokens = torch.randint(64, (1, 16))
    before = net(tokens)
    for place in range(16):
        changed = tokens.clone()
        changed[0, place] = (changed[0, place] + 1) % 64
        after = net(changed)
        torch.testing.assert_close(after[0, :place], before[0, :place])
        assert not torch.allclose(after[0, place], before[0, place])


@pytest.mark.parametrize("shape", [(2, 1), (2, 5), (2, 5, 3)])
def test_earlier_states_are_those_of_the_tokens_before(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    padded = torch.cat([torch.zeros(2, 3, *shape[2:]), x], dim=1)
    for back, states in enumerate(earlier(x, 3), start=1):
        assert torch.equal(states, padded[:, 3 - back :][:, : shape[1]])


def test_scores_and_loss_are_those_of_the_logits(net: Network) -> None:
    """For any LM head and chunk size: one properly normalised distribution."""
    tokens = torch.randint(64, (4, 17))
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[2, 5:] = -1
    log_probs = net(inputs).float().log_softmax(-1)
    kept = targets >= 0
    expected = -log_probs.gather(2, targets.clamp(min=0)[..., None])[..., 0]
    with torch.no_grad():
        scores = net(inputs, targets, per_token=True)
    torch.testing.assert_close(scores.loss[kept], expected[kept], rtol=1e-4, atol=1e-5)
    assert scores.loss[~kept].eq(0).all()
    assert not scores.correct[~kept].any()
    assert torch.equal(scores.correct[kept], (log_probs.argmax(-1) == targets)[kept])
    if not net.needs_text:  # of which training leaves each target out
        loss = net(inputs, targets)
        torch.testing.assert_close(loss, expected[kept].mean(), rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_the_logits(net: Network) -> None:
    tokens = torch.randint(64, (4, 17))
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[1, 3:] = -1

    dense = F.cross_entropy(net(inputs).flatten(0, 1), targets.flatten(), ignore_index=-1)
    expected = gradients(net, dense)
    if net.needs_text:  # of which training leaves each target out
        loss = net(inputs, targets, per_token=True).loss.sum() / (targets >= 0).sum()
    else:
        loss = net(inputs, targets)
    for ours, theirs in zip(gradients(net, loss), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_bf16_is_near_fp32(net: Network) -> None:
    """bf16 has 8 bits, so gradients may differ by a few percent of their norm."""
    tokens = torch.randint(64, (8, 17))
    for parameter in net.parameters():  # close to initial values
        nn.init.normal_(parameter, std=0.1)
    exact = net(tokens[:, :-1], tokens[:, 1:])
    with torch.autocast("cpu", torch.bfloat16):
        loss = net(tokens[:, :-1], tokens[:, 1:])
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), abs=0.02)
    ours, theirs = (torch.cat([g.flatten() for g in gradients(net, x)]) for x in (loss, exact))
    assert (ours - theirs).norm() < 0.05 * theirs.norm()


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(name, marks=pytest.mark.slow if name in SLOW_TO_COMPILE else ())
        for name in NETWORKS
    ],
    indirect=True,
)
@pytest.mark.parametrize("checkpointed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_gradients_equal_eager_ones(net: Network, checkpointed: bool) -> None:
    tokens = torch.randint(64, (4, 17))
    eager = gradients(net, net(tokens[:, :-1], tokens[:, 1:]))
    if checkpointed:
        checkpoint_blocks(net)
    torch.compiler.reset()
    static = all(getattr(module, "capacity", ()) is not None for module in net.modules())
    net.compile(backend="aot_eager", fullgraph=checkpointed and static)
    compiled = gradients(net, net(tokens[:, :-1], tokens[:, 1:]))
    for ours, theirs in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


class Dropout(GPT):
    """A network whose blocks draw random numbers."""

    def __init__(self) -> None:
        super().__init__(**SMALL, num_heads=2)
        for block in self.blocks:
            block.mlp.register_forward_hook(lambda mlp, inputs, out: F.dropout(out))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("build", [*NETWORKS, "dropout"], indirect=True)
def test_activation_checkpointing_changes_no_bit(net: Network, autocast: bool) -> None:
    tokens = torch.randint(64, (4, 17))
    other = copy.deepcopy(net)
    checkpoint_blocks(other)
    other = copy.deepcopy(other)  # as callbacks that average weights do
    found = []
    for each in (net, other):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = each(tokens[:, :-1], tokens[:, 1:])
        found.append([loss, *gradients(each, loss), torch.get_rng_state()])
    assert all(map(torch.equal, *found))
    assert list(net.state_dict()) == list(other.state_dict())


def test_activation_checkpointing_runs_each_block_again_only_to_train() -> None:
    net, calls = NETWORKS["fast"](), 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    for block in net.blocks:
        block.mlp.register_forward_pre_hook(count)
    checkpoint_blocks(net)
    tokens = torch.randint(64, (2, 9))
    net(tokens[:, :-1], tokens[:, 1:]).backward()
    assert calls == 2 * len(net.blocks)
    with torch.no_grad():
        net(tokens, kv_cache=KVCache(2, 16))
    assert calls == 3 * len(net.blocks)


def test_weights_and_counts_survive_a_checkpoint(
    build: Callable[[], Network], net: Network
) -> None:
    other = build()
    other.load_state_dict(net.state_dict())
    tokens = torch.randint(64, (2, 9))
    torch.testing.assert_close(net(tokens), other(tokens))


# --- hlb-gpt 0.4.1 --------------------------------------------------------------------------------


def reference(net: HLB041, tokens: Tensor) -> Tensor:
    """The network of 0.4.1 by its description, one token and block at a time."""
    x = net.embedding.weight[tokens]
    width = x.shape[-1]
    for block in net.blocks:
        y = F.layer_norm(x, (width,), block.norm.weight) @ block.up_proj.weight.T
        query, key, linear, gate = y.split([width // 8, width // 8, 2 * width, 2 * width], dim=-1)
        hidden = linear * gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
        local, values = hidden[..., :width], hidden[..., width:]
        slope = torch.log1p(block.slope.exp())
        rows = []
        for i in range(tokens.shape[1]):
            near = torch.arange(i + 1, device=x.device)
            logits = (query[:, i : i + 1] * key[:, : i + 1]).sum(-1) / math.sqrt(width // 8)
            share = (logits + slope * (near - i)).softmax(-1)
            rows.append((share[..., None] * values[:, : i + 1]).sum(1))
        x = x + torch.cat([local, torch.stack(rows, 1)], dim=-1) @ block.down_proj.weight.T
    return F.layer_norm(x, (width,), net.norm.weight) @ net.lm_head.weight.T


def test_hlb041_equals_its_description() -> None:
    torch.manual_seed(0)
    net = HLB041(**SMALL)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    tokens = torch.randint(64, (3, 11))
    torch.testing.assert_close(net(tokens), reference(net, tokens), rtol=1e-4, atol=1e-4)


def biased_attention(x: Tensor, block: nn.Module, width: int) -> Tensor:
    """A block with the bias added to the scores of one head, as hlb-gpt does it."""
    positions = torch.arange(x.shape[1], device=x.device)
    distance = (positions - positions[:, None]).to(x.dtype)
    y = F.layer_norm(x, (width,), block.norm.weight) @ block.up_proj.weight.T
    query, key, linear, gate = y.split([width // 8, width // 8, 2 * width, 2 * width], dim=-1)
    local, values = (linear * F.gelu(gate)).chunk(2, dim=-1)
    scores = query @ key.mT / math.sqrt(width // 8) + F.softplus(block.slope) * distance
    attended = scores.masked_fill(distance > 0, -torch.inf).softmax(-1) @ values
    return x + torch.cat([local, attended], dim=-1) @ block.down_proj.weight.T


@pytest.mark.parametrize(("width", "length"), [(8, 5), (64, 40), (384, 1024)])
def test_hlb041_attends_by_distance_at_full_length(width: int, length: int) -> None:
    """Losing no precision to the positions: the result and all gradients, against float64."""
    torch.manual_seed(0)
    net = HLB041(vocab_size=8, max_sequence_length=length, width=width, num_blocks=1)
    block, exact = net.blocks[0], copy.deepcopy(net.blocks[0]).double()
    for parameter, double in zip(block.parameters(), exact.parameters(), strict=True):
        nn.init.normal_(parameter, std=1.0 if parameter.numel() == 1 else width**-0.5)
        double.data.copy_(parameter)
    x, grad = torch.randn(2, length, width), torch.randn(2, length, width)
    expected = biased_attention(x.double(), exact, width)
    expected.backward(grad.double())
    ours = block(x, torch.arange(length))
    ours.backward(grad)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-4)
    for parameter, double in zip(block.parameters(), exact.parameters(), strict=True):
        assert parameter.grad is not None
        assert double.grad is not None
        assert (parameter.grad - double.grad).norm() < 2e-3 * double.grad.norm()


@pytest.mark.parametrize("longest", [256, 1024, 1280])  # the last is no power of two
def test_hlb041_positions_are_exact_in_bf16(longest: int) -> None:
    """Scores of distance alone: queries and keys of zero and a slope of one."""
    block = HLB041(vocab_size=8, max_sequence_length=longest, width=64, num_blocks=1).blocks[0]
    block.slope.data.fill_(math.log(math.e - 1))
    zeros, positions = torch.zeros(1, longest, 8, dtype=torch.bfloat16), torch.arange(longest)
    q, k = block._with_positions(zeros, zeros, positions)
    scores = (q.double() @ k.double().mT)[0] / 8**0.5
    distance = (positions - positions[:, None]).double()
    # But for what all scores of a query have in common, and the rounding of the slope.
    scores, distance = (x - x[:, :1] for x in (scores, distance))
    torch.testing.assert_close(scores, distance, rtol=2**-8, atol=1e-9)


def test_sizes() -> None:
    """The published 46.0M parameters, and a shape with 1.5 billion."""

    def parameters(net: Network) -> int:
        return sum(parameter.numel() for parameter in net.parameters())

    with torch.device("meta"):
        assert parameters(HLB041()) == 46_009_736
        assert 45e6 < parameters(FastGPT(num_blocks=4)) < 60e6
        assert 1.4e9 < parameters(HLB041(width=2048, num_blocks=50)) < 1.7e9
        assert 1.4e9 < parameters(FastGPT(width=2048, num_heads=16, num_blocks=26)) < 1.7e9


def test_hlb041_initial_values() -> None:
    torch.manual_seed(0)
    net = HLB041(vocab_size=4096, width=96, num_blocks=2)
    unit = 96**-0.5
    for parameter, std in (
        (net.embedding.weight, 0.25 * unit),
        (net.lm_head.weight, 0.5 * unit),
        (net.blocks[0].up_proj.weight, 0.25 * unit),
        (net.blocks[1].down_proj.weight, 0.25 * unit),
    ):
        assert parameter.std().item() == pytest.approx(std, rel=0.03)


def test_rare_tokens_learn_like_frequent_ones() -> None:
    """The gradient of an embedding is divided by the token's count in the batch."""
    net = HLB041(**SMALL)
    tokens = torch.zeros(1, 17, dtype=torch.int64)

    def gradient(*, scaled: bool) -> Tensor:
        net.zero_grad()
        net.embedding.scale_grad_by_freq = scaled
        net(tokens[:, :-1], tokens[:, 1:]).backward()
        assert net.embedding.weight.grad is not None
        return net.embedding.weight.grad[0].clone()

    torch.testing.assert_close(gradient(scaled=True) * 16, gradient(scaled=False))


# --- the fast GPT ---------------------------------------------------------------------------------


@pytest.mark.parametrize("cutoffs", [[], [8, 24]])
def test_fast_gpt_initially_predicts_token_frequencies(cutoffs: list[int]) -> None:
    torch.manual_seed(0)
    net = FastGPT(**SMALL, num_heads=2, cutoffs=cutoffs)
    counts = torch.randint(1000, (60,))
    net.init_from_token_counts(counts)
    share = F.pad(counts, (0, 4)).double() + 0.5
    log_probs = net(torch.randint(64, (2, 9)))
    expected = (share / share.sum()).log().float().expand_as(log_probs)
    torch.testing.assert_close(log_probs, expected, rtol=1e-4, atol=1e-4)


def test_targets_beyond_the_capacity_have_no_loss_within_their_cluster() -> None:
    """They have the loss of the first cluster, and evaluation scores them in full."""
    torch.manual_seed(0)
    net = FastGPT(**SMALL, num_heads=2, cutoffs=[8], capacity=[0.25]).lm_head
    nn.init.normal_(net.weight, std=0.3)
    x, targets = torch.randn(1, 16, 32), torch.full((1, 16), 2)
    targets[0, 4:12] = 40  # eight in the rare cluster, with a capacity of four
    log_probs = net(x, None)[0]
    losses = -log_probs.gather(1, targets[0, :, None])[:, 0]
    torch.testing.assert_close(net(x, targets, per_token=True).loss[0], losses)
    losses[8:12] = -log_probs[8:12, 8:].logsumexp(-1)
    torch.testing.assert_close(net(x, targets), losses.mean())


@pytest.mark.parametrize("capacity", [None, [1.0, 1.0], [0.3, 0.2]])
def test_rows_of_rare_clusters_get_the_gradients_of_indexing(capacity: list[float] | None) -> None:
    """To the last bit, also where targets exceed the capacity or leave some of it unused."""
    torch.manual_seed(0)
    head = FastGPT(**SMALL, num_heads=2, cutoffs=[8, 24], capacity=capacity).lm_head
    nn.init.normal_(head.weight, std=0.3)
    x, targets = torch.randn(4, 16, 32, requires_grad=True), torch.randint(-1, 64, (4, 16))
    loss = head(x, targets)
    loss.backward()
    ours = [x.grad.clone(), head.weight.grad.clone()]
    x.grad = head.weight.grad = None
    with pytest.MonkeyPatch.context() as patch:
        indexed = SimpleNamespace(apply=lambda rows, index, inverse: take(rows, index))
        patch.setattr(adaptive_softmax, "_TakeRows", indexed)
        head(x, targets).backward()
    assert torch.equal(ours[0], x.grad)
    assert torch.equal(ours[1], head.weight.grad)
    common = torch.full((1, 16), 3)  # no target in a rare cluster
    torch.testing.assert_close(head(x[:1], common), head(x[:1], common, per_token=True).loss.mean())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HLB041(width=100), "width: 100 is not divisible by 8"),
        (lambda: HLB041(num_blocks=0), "num_blocks: 0 is less than 1"),
        (lambda: FastGPT(width=100, num_heads=3), "width: 100 is not divisible by twice num_heads"),
        (lambda: FastGPT(cutoffs=[9, 5]), r"cutoffs: \[9, 5\] do not increase"),
        (lambda: FastGPT(cutoffs=[60000]), r"cutoffs: \[60000\] do not increase"),
        (
            lambda: FastGPT(cutoffs=[9], capacity=[0.5, 0.5]),
            r"capacity: \[0.5, 0.5\] is not .* for each of 1 cutoffs",
        ),
        (lambda: FastGPT(pointer_dim=-1), "pointer_dim: -1 is negative"),
        (lambda: FastGPT(pointer_dim=8, pointer_ngrams=-1), "pointer_ngrams: -1 is negative"),
        (
            lambda: FastGPT(cutoffs=[9], capacity=[0.0]),
            r"capacity: \[0.0\] is not a fraction above 0",
        ),
    ],
)
def test_impossible_sizes_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("build", ["fast, spelling"], indirect=True)
def test_the_head_input_is_what_the_head_knows_of_each_token(net: Network) -> None:
    assert isinstance(net, FastGPT)
    assert net.head_proj is not None
    read: list[Tensor] = []
    net.head_proj.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    tokens = torch.randint(64, (2, 9))
    by_token = net.lm_head._weights()[net.lm_head._token_class()]  # (V, D)
    net(tokens)
    torch.testing.assert_close(read[0], F.rms_norm(by_token[tokens], (32,)))
    assert not read[0].requires_grad
