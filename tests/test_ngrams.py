"""Counted n-grams against a slow reference, and the network that mixes them in."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS, fitting
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hlbgpt.models import FastGPT, ngrams
from hlbgpt.models.ngrams import DISCOUNT, NgramMixture

V = 5
TOKENS = st.integers(0, V - 1)
TEXTS = st.lists(TOKENS, min_size=10, max_size=120)


class Reference:
    """Absolute discounting from dictionaries; n-grams that occur once are left out."""

    def __init__(self, text: Sequence[int], order: int) -> None:
        self.order = order
        known = Counter(text)
        self.prior = [(known[w] + 0.5) / (len(text) + 0.5 * V) for w in range(V)]
        self.counts: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for length in range(1, order):
            for i in range(length, len(text)):
                self.counts[tuple(text[i - length : i])][text[i]] += 1

    def probs(self, past: Sequence[int], leave_out: int | None = None) -> list[float]:
        """Probabilities of the next token, with one occurrence of `leave_out` not counted."""
        result = self.prior
        for length in range(1, min(self.order - 1, len(past)) + 1):
            counts = Counter(self.counts[tuple(past[len(past) - length :])])
            if leave_out is not None:
                counts[leave_out] -= 1
            kept = {w: a - DISCOUNT for w, a in counts.items() if a >= 2}
            if kept:
                total = sum(counts.values())
                rest = 1 - sum(kept.values()) / total
                result = [kept.get(w, 0) / total + rest * result[w] for w in range(V)]
        return result


def counted(text: Sequence[int], order: int, rows: int = 200, chunk: int = 1000) -> NgramMixture:
    """The counts of `text`, read in chunks, with a gate that trusts them alone."""
    mixture = NgramMixture(V, 4, order, rows)

    def chunks(overlap: int) -> Iterator[Tensor]:
        for start in range(0, len(text), chunk):
            yield torch.tensor(text[max(0, start - overlap) : start + chunk])

    mixture.count(chunks)
    torch.nn.init.constant_(mixture.gate_bias, 100.0)
    return mixture


@given(text=TEXTS, past=st.lists(TOKENS, min_size=1, max_size=12), order=st.integers(2, 5))
@settings(max_examples=100, deadline=None)
def test_probabilities_are_those_of_the_reference(text, past, order) -> None:
    mixture, reference = counted(text, order, chunk=7 + order), Reference(text, order)
    scores = mixture(torch.zeros(1, len(past), 4), torch.tensor([past]))
    # The network's distribution and the order of the tokens do not matter.
    place = torch.randperm(V)
    probs = scores.mix_probs(torch.rand(1, len(past), V), place)[0][:, place]
    expected = torch.tensor([reference.probs(past[: i + 1]) for i in range(len(past))])
    torch.testing.assert_close(probs, expected, atol=1e-6, rtol=1e-5)
    for target in range(V):
        losses = scores.mix_losses(torch.rand(1, len(past)), torch.full((1, len(past)), target))
        torch.testing.assert_close((-losses[0]).exp(), expected[:, target], atol=1e-6, rtol=1e-5)


@given(text=TEXTS, order=st.integers(2, 5))
@settings(max_examples=100, deadline=None)
def test_training_leaves_each_target_out_of_its_own_counts(text, order) -> None:
    mixture, reference = counted(text, order), Reference(text, order)
    inputs, targets = torch.tensor([text[:-1]]), torch.tensor([text[1:]])
    scores = mixture(torch.zeros(*inputs.shape, 4), inputs)
    losses = scores.mix_losses(torch.rand(inputs.shape), targets, leave_out=True)
    expected = [reference.probs(text[:i], text[i])[text[i]] for i in range(1, len(text))]
    torch.testing.assert_close((-losses[0]).exp(), torch.tensor(expected), atol=1e-6, rtol=1e-5)


@given(text=TEXTS, limit=st.integers(1, 50))
@settings(max_examples=30, deadline=None)
def test_several_passes_count_the_same(text, limit) -> None:
    once = counted(text, 4).state_dict()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngrams, "_MOST_SORTED", limit)
        parts = counted(text, 4).state_dict()
    for name in ("keys", "counts", "totals", "kept", "prior", "counted_tokens"):
        assert torch.equal(once[name], parts[name])


def test_the_rarest_are_left_out_first() -> None:
    text = [0, 1] * 5 + [2, 3] * 3 + [4, 4, 4]
    mixture = counted(text, 2, rows=3)
    kept = mixture.keys[0] & ((1 << 17) - 1)
    assert sorted(kept.tolist()) == [0, 1, 3]  # 0 1, 1 0 and 2 3 occur most often
    probs = mixture(torch.zeros(1, 5, 4), torch.arange(5)[None]).mix_probs(torch.rand(1, 5, V))
    torch.testing.assert_close(probs.sum(-1), torch.ones(1, 5))


def test_the_gate_mixes_for_each_prediction() -> None:
    mixture = counted([0, 1, 2, 0, 1, 2, 0, 1, 3], 3)
    for parameter in mixture.parameters():
        torch.nn.init.normal_(parameter)
    x, tokens = torch.randn(1, 3, 4), torch.tensor([[0, 1, 4]])
    network = torch.rand(1, 3, V).softmax(-1)
    scores = mixture(x, tokens)
    probs = scores.mix_probs(network)
    torch.testing.assert_close(probs.sum(-1), torch.ones(1, 3))
    torch.nn.init.constant_(mixture.gate_bias, 100.0)
    alone = scores.mix_probs(network)
    share = (probs - network) / (alone - network)  # equal for all tokens of a prediction
    torch.testing.assert_close(share, share[..., :1].expand_as(share), atol=1e-3, rtol=1e-3)
    assert share.unique().numel() > 2


@pytest.fixture
def net() -> FastGPT:
    torch.manual_seed(0)
    net = FastGPT(
        vocab_size=48, max_sequence_length=32, width=32, num_heads=1, num_blocks=1,
        cutoffs=[8, 24], pointer_dim=8, ngram_order=4, ngram_rows=512,
    )  # fmt: skip
    text = torch.randint(48, (4000,)) // torch.randint(1, 9, (4000,))
    net.init_from_token_counts(torch.bincount(text, minlength=48))
    net.init_from_text(lambda overlap: iter([text]))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return net.eval()


def test_losses_without_a_pointer_are_those_of_the_logits(net: FastGPT) -> None:
    net.pointer = None
    batch = torch.randint(12, (2, 33))
    log_probs = net(batch[:, :-1])
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(2, 32))
    scores = net(batch[:, :-1], batch[:, 1:], per_token=True)
    expected = -log_probs.gather(-1, batch[:, 1:, None])[..., 0]
    torch.testing.assert_close(scores.loss, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(scores.correct, log_probs.argmax(-1) == batch[:, 1:])


def test_the_gate_learns(net: FastGPT) -> None:
    batch = torch.randint(12, (2, 33))
    net.train()(batch[:, :-1], batch[:, 1:]).backward()
    assert net.ngrams is not None
    assert all(parameter.grad.any() for parameter in net.ngrams.parameters())


def test_a_run_resumes_validates_and_generates(hlbgpt: Callable[..., str], tiny: list[str]) -> None:
    words = ["--config", CONFIGS / "open.yaml", *fitting(CONFIGS / "open.yaml", tiny)]
    checkpoint = "runs/{}/checkpoints/last.ckpt".format
    hlbgpt("fit", *words)
    hlbgpt("fit", *words, "--trainer.max_steps=2", "--run_name=part")
    hlbgpt("fit", *words, "--ckpt_path", checkpoint("part/version_0"))
    whole, resumed = (
        torch.load(checkpoint(f"open/version_{number}"), weights_only=True)["state_dict"]
        for number in (0, 1)
    )
    assert whole["net.ngrams.counts"].any()
    assert whole["net.ngrams.counted_tokens"] > 1000
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name
    record = json.loads(Path("runs/open/version_0/record.json").read_text())
    measured = hlbgpt("validate", *words, "--ckpt_path", checkpoint("open/version_0"))
    assert f"{record['value']:.4f}"[:5] in measured
    assert record["counted_tokens"] == whole["net.ngrams.counted_tokens"]
    assert hlbgpt("predict", "--ckpt_path", checkpoint("open/version_0"), "--data.prompts", "The ")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"ngram_order": 1}, "ngram_order: 1 is neither 0 nor 2"),
        ({"ngram_order": 3, "ngram_rows": 0}, "ngram_rows: 0 is less than 1"),
        ({"ngram_order": 3, "vocab_size": 200_000}, "ngram_order: n-grams of 200000 tokens"),
    ],
)
def test_bad_settings_are_refused(settings, says) -> None:
    with pytest.raises(ValueError, match=f"model.net.{says}"):
        FastGPT(**{"width": 32, "num_heads": 1, "num_blocks": 1, "vocab_size": 48, **settings})
