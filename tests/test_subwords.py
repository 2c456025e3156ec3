"""What tokens that are spelled alike share, against slow references."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hlbgpt.models import FastGPT
from hlbgpt.models.subwords import (
    NUM_FEATURES,
    SubwordEmbedding,
    subword_features,
    subwords,
)

SMALL: dict[str, Any] = {"vocab_size": 64, "width": 32, "num_heads": 2, "num_blocks": 1}


@given(st.binary(max_size=20))
def test_all_tokens_have_as_many_features(spelling: bytes) -> None:
    assert len(set(subwords(spelling))) == NUM_FEATURES


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        (b" walk", b"walk", {"all", "start3", "end3"}),
        (b" Walk", b" walk", {"all", "start3", "start2", "end3"}),
        (b" walked", b" talked", {"kind", "end2", "end3"}),
        (b" 1987", b" 1986", {"kind", "start2", "start3"}),
        ("é".encode(), "É".encode(), {"all", "start2", "start3", "end3"}),
        (b" walk", b",", set()),
        (b"\xff", b"\xfe", {"kind", "start2", "start3"}),  # bytes that are no text by themselves
    ],
)
def test_tokens_that_are_spelled_alike_share_features(
    one: bytes, other: bytes, shared: set[str]
) -> None:
    both = set(subwords(one)) & set(subwords(other))
    assert {feature.split()[0] for feature in both} == shared


@given(st.lists(st.binary(max_size=9), min_size=1), st.integers(2, 50))
def test_rows_are_those_of_equal_features(spelling: list[bytes], buckets: int) -> None:
    rows = subword_features(spelling, buckets)
    assert rows.shape == (len(spelling), NUM_FEATURES)
    assert rows.min() >= 1  # 0 is no feature
    assert rows.max() < buckets
    assert torch.equal(rows, subword_features(spelling, buckets))


@pytest.mark.parametrize("shape", [(3,), (2, 5)])
def test_the_embedding_is_the_sum_of_those_of_the_features(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    embedding = SubwordEmbedding(9, 4, std=1.0)
    features = torch.randint(9, (*shape, NUM_FEATURES))
    rows = F.one_hot(features, 9).sum(-2).float()
    rows[..., 0] = 0
    torch.testing.assert_close(embedding(features), rows @ embedding.weight)


def test_weights_of_the_head_follow_tokens_into_their_clusters() -> None:
    """Counts change the class of a token, and what its spelling adds moves with it."""
    torch.manual_seed(0)
    net = FastGPT(**SMALL, cutoffs=[8, 24], subword_buckets=50)
    net.init_from_spelling([b"%d" % token for token in range(60)])
    head = net.lm_head
    assert head.subword_embedding is not None
    nn.init.normal_(head.subword_embedding.weight)
    for _ in range(2):
        net.init_from_token_counts(torch.randint(1000, (60,)))
        added = head._weights() - head.weight
        by_token = head.subword_embedding(net.features)
        order = head.rank.argsort()  # the first 8 tokens, two classes for the clusters, 56 tokens
        torch.testing.assert_close(added[:8], by_token[order[:8]])
        torch.testing.assert_close(added[8:10], torch.zeros(2, 32))
        torch.testing.assert_close(added[10:], by_token[order[8:]])
    assert by_token[:60].abs().amin(1).all()
    assert not by_token[60:].any()  # tokens that the tokenizer does not have


def test_a_token_that_was_never_seen_is_taken_for_one_spelled_alike() -> None:
    """Learning that " Walk" follows makes " walk" more likely than a token spelled otherwise."""
    torch.manual_seed(0)
    net = FastGPT(**SMALL, cutoffs=[8], subword_buckets=512)
    net.init_from_spelling([b" %d" % i for i in range(50)] + [b" Walk", b" walk", b"xyz"])
    net.init_from_token_counts(torch.ones(64))
    tokens, targets = torch.randint(50, (1, 9)), torch.full((1, 9), 50)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        net(tokens, targets).backward()
        optimizer.step()
    log_probs = net(tokens)[0, -1]
    assert log_probs[50] > log_probs[51] > log_probs[52] + 0.1


@pytest.mark.parametrize("buckets", [-1, 1])
def test_impossible_numbers_of_buckets_are_refused(buckets: int) -> None:
    with pytest.raises(ValueError, match=f"subword_buckets: {buckets} is neither 0 nor"):
        FastGPT(**SMALL, subword_buckets=buckets)
