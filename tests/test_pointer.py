"""The pointer: scores by their definition, a normalised mixture, a bonus for repeats."""

import math

import torch
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
def test_mixture_is_that_of_the_definition() -> None:
    made, x = pointer(), torch.randn(2, 9, WIDTH)
    tokens, targets = torch.randint(3, (2, 9)), torch.randint(V, (2, 9))  # 3, so that much repeats
    log_probs, scores = torch.randn(2, 9, V).log_softmax(-1), made(x, tokens)
    shared = log_probs + scores.vocab[..., None]
    mixed = scores.mix_probs(shared, tokens)
    torch.testing.assert_close(mixed.sum(-1), torch.ones(2, 9))
    losses = scores.mix_losses(-shared.gather(-1, targets[..., None])[..., 0], targets)
    torch.testing.assert_close(losses, -mixed.gather(-1, targets[..., None])[..., 0].log())
    for b in range(2):
        vocabulary = x[b] @ made.q_proj.weight[SIZE] + made.vocab_score
        for i, row in enumerate(scores_of(made, x[b], tokens[b].tolist())):
            weights = log_probs[b, i].exp() * vocabulary[i].exp()
            for j, score in enumerate(row):
                weights[tokens[b, j]] += math.exp(score)
            torch.testing.assert_close(mixed[b, i], weights / weights.sum())
    last = scores.select(slice(-4, None))
    torch.testing.assert_close(last.mix_probs(shared[:, -4:], tokens), mixed[:, -4:])


def test_gradients_are_finite_where_nothing_is_hit() -> None:
    copy, losses = torch.zeros(1, 3, 3, requires_grad=True), torch.ones(1, 3, requires_grad=True)
    scores = PointerScores(copy, torch.zeros(1, 3), torch.tensor([[1, 2, 3]]))
    mixed = scores.mix_losses(losses, torch.full((1, 3), 9))
    mixed.sum().backward()
    torch.testing.assert_close(mixed, losses)
    assert copy.grad is not None
    assert losses.grad is not None
    assert copy.grad.eq(0).all()
    assert losses.grad.eq(1).all()


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


def test_the_second_loss_adds_its_gradient_and_leaves_the_loss_as_it_is() -> None:
    """The vocabulary's distribution by itself is the mixture with a pointer that copies nothing."""
    torch.manual_seed(0)
    net = FastGPT(64, width=WIDTH, num_heads=2, num_blocks=1, cutoffs=[8], pointer_dim=8)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    tokens = torch.randint(64, (4, 17))
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[1, 3:] = -1
    head = net.lm_head.weight

    def loss_and_gradient(weight: float) -> tuple[Tensor, Tensor]:
        net.lm_head.vocab_loss_weight.fill_(weight)
        loss = net(inputs, targets)
        return loss, torch.autograd.grad(loss, head)[0]

    loss, gradient = loss_and_gradient(0.0)
    same, more = loss_and_gradient(0.25)
    pointer, net.pointer = net.pointer, None
    _, vocab_gradient = loss_and_gradient(0.0)
    assert pointer is not None
    assert torch.equal(same, loss)
    torch.testing.assert_close(more, gradient + 0.25 * vocab_gradient)
    assert not torch.allclose(more, gradient)
