"""The pointer: scores by their definition, a normalised mixture, a bonus for repeats."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hlbgpt.models import FastGPT
from hlbgpt.models.pointer import Pointer, PointerScores

V, WIDTH, SIZE = 11, 16, 4


def pointer() -> Pointer:
    torch.manual_seed(0)
    made = Pointer(WIDTH, SIZE, ngrams=2)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made


def scores_of(made: Pointer, x: Tensor, tokens: list[int]) -> list[list[float]]:
    """Scores of one sequence, one pair of tokens at a time."""
    asked, keys = x @ made.q_proj.weight.T, x @ made.k_proj.weight.T
    rows = []
    for i in range(len(tokens)):
        row = []
        for j in range(i + 1):
            score = float((asked[i, :SIZE] + made.q_bias) @ keys[j]) / math.sqrt(SIZE)
            score -= math.exp(made.log_decay) * (i - j)
            agree = 0
            while agree < 2 and j > agree and tokens[j - 1 - agree] == tokens[i - agree]:
                score += float(made.bonus[agree] + asked[i, SIZE + 1 + agree])
                agree += 1
            row.append(score)
        rows.append(row)
    return rows


@torch.no_grad()
def test_probabilities_are_those_of_the_definition() -> None:
    made, x = pointer(), torch.randn(2, 9, WIDTH)
    tokens = torch.randint(3, (2, 9))  # few kinds, so that much repeats
    log_probs = torch.randn(2, 9, V).log_softmax(-1)
    mixed = made(x, tokens).mix_log_probs(log_probs).exp()
    torch.testing.assert_close(mixed.sum(-1), torch.ones(2, 9))
    for b in range(2):
        vocabulary = x[b] @ made.q_proj.weight[SIZE] + made.vocab_score
        for i, row in enumerate(scores_of(made, x[b], tokens[b].tolist())):
            weights = log_probs[b, i].exp() * vocabulary[i].exp()
            for j, score in enumerate(row):
                weights[tokens[b, j]] += math.exp(score)
            torch.testing.assert_close(mixed[b, i], weights / weights.sum())


def test_losses_are_those_of_the_probabilities() -> None:
    made, x, tokens = pointer(), torch.randn(2, 9, WIDTH), torch.randint(V, (2, 9))
    log_probs, targets = torch.randn(2, 9, V).log_softmax(-1), torch.randint(V, (2, 9))
    targets[1, 7:] = -1
    kept, pointer_scores = targets >= 0, made(x, tokens)
    wanted = targets.clamp(min=0)[..., None]
    mixed = pointer_scores.mix_log_probs(log_probs)
    expected = -mixed.gather(-1, wanted)[..., 0]
    losses = pointer_scores.mix_losses(-log_probs.gather(-1, wanted)[..., 0], targets)
    torch.testing.assert_close(losses[kept], expected[kept])


def test_gradients_are_finite_where_nothing_is_hit() -> None:
    scores = torch.randn(1, 3, 3, requires_grad=True)
    pointer_scores = PointerScores(scores, torch.zeros(1, 3), torch.tensor([[1, 2, 3]]))
    pointer_scores.mix_losses(torch.ones(1, 3), torch.full((1, 3), 9)).sum().backward()
    assert scores.grad is not None
    torch.testing.assert_close(
        scores.grad, F.softmax(torch.cat([scores, torch.zeros(1, 3, 1)], -1), -1)[..., :3].detach()
    )


def test_an_untrained_network_continues_a_repeated_text() -> None:
    """After `a b c ... a b`, of all earlier tokens `c` is the most likely by far."""
    torch.manual_seed(0)
    net = FastGPT(
        vocab_size=64, max_sequence_length=32, width=32, num_heads=2, num_blocks=2, pointer_dim=8
    )
    text = [5, 6, 7, 8, 9, 10, 11, 12, 5, 6]
    log_probs = net(torch.tensor([text]))[0, -1].exp()
    assert log_probs.argmax() == 7
    assert log_probs[7] - log_probs[20] > 20 * (log_probs[8] - log_probs[20])  # 20 does not occur


@pytest.mark.parametrize("count", [1, 4])
def test_the_last_tokens_have_the_scores_they_have_among_all(count: int) -> None:
    made, x, tokens = pointer(), torch.randn(2, 9, WIDTH), torch.randint(V, (2, 9))
    log_probs = torch.randn(2, 9, V).log_softmax(-1)
    pointer_scores = made(x, tokens)
    whole, last = (
        pointer_scores.mix_log_probs(log_probs),
        pointer_scores.select(slice(-count, None)),
    )
    torch.testing.assert_close(last.mix_log_probs(log_probs[:, -count:]), whole[:, -count:])
