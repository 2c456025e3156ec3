"""The loaders, compared with their definitions."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hlbgpt.data import EvalLoader, TrainLoader
from hlbgpt.data.loaders import shuffled


def loader(
    tokens: int,
    length: int,
    batch: int,
    *,
    micro_batches: int = 1,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
) -> TrainLoader:
    """A loader over 0, 1, 2, ...: a window's first token says where it starts."""
    feed = TrainLoader(np.arange(tokens, dtype="<u2"), seed, rank, world)
    feed.set_step(micro_batches=micro_batches, batch_size=batch, sequence_length=length)
    return feed


def windows(steps: list[torch.Tensor]) -> torch.Tensor:
    """All windows of steps (M, B, T + 1), in order: (n, T + 1)."""
    return torch.cat([step.flatten(0, 1) for step in steps])


sizes = st.tuples(
    st.integers(120, 500),  # tokens
    st.integers(1, 7),  # sequence length
    st.integers(1, 4),  # batch size
    st.integers(1, 3),  # micro-batches
    st.integers(0, 9),  # seed
)


@given(sizes)
def test_every_window_comes_once_an_epoch(size: tuple[int, ...]) -> None:
    tokens, length, batch, micro_batches, seed = size
    feed = loader(tokens, length, batch, micro_batches=micro_batches, seed=seed)
    epochs, windows_per_epoch = 3, feed.windows_per_epoch(length)
    steps = list(islice(feed, -(-epochs * windows_per_epoch // (batch * micro_batches))))
    assert steps[0].shape == (micro_batches, batch, length + 1)
    rows = windows(steps)
    assert torch.equal(rows, rows[:, :1] + torch.arange(length + 1))
    for epoch in range(epochs):
        part = rows[epoch * windows_per_epoch : (epoch + 1) * windows_per_epoch, 0]
        starts = sorted(part.tolist())
        # Consecutive windows from a phase below one window: nothing twice, nothing left out.
        assert starts == list(range(starts[0], starts[0] + length * len(starts), length))
        assert starts[0] < length
        assert tokens - (starts[-1] + length + 1) < 2 * length


@given(sizes, st.integers(2, 3))
def test_ranks_share_each_micro_batch(size: tuple[int, ...], world: int) -> None:
    tokens, length, batch, micro_batches, seed = size
    whole = loader(tokens, length, batch * world, micro_batches=micro_batches, seed=seed)
    ranks = [
        loader(
            tokens, length, batch, micro_batches=micro_batches, seed=seed, rank=rank, world=world
        )
        for rank in range(world)
    ]
    for step, *parts in islice(zip(whole, *ranks, strict=True), 5):
        assert torch.equal(step, torch.cat(parts, dim=1))
    assert {each.step_tokens for each in ranks} == {whole.step_tokens}


@given(sizes, st.integers(1, 4))
def test_the_cut_into_micro_batches_changes_no_step(size: tuple[int, ...], parts: int) -> None:
    tokens, length, batch, _, seed = size
    whole = loader(tokens, length, batch * parts, seed=seed)
    cut = loader(tokens, length, batch, micro_batches=parts, seed=seed)
    for ours, theirs in islice(zip(cut, whole, strict=True), 5):
        assert torch.equal(ours.flatten(0, 1), theirs[0])


shapes = st.fixed_dictionaries(
    {},
    optional={
        "micro_batches": st.integers(1, 3),
        "batch_size": st.integers(1, 4),
        "sequence_length": st.integers(1, 7),
    },
)


@given(sizes, st.lists(shapes, max_size=12), st.integers(0, 12))
def test_a_restored_loader_continues_as_if_never_stopped(
    size: tuple[int, ...], plan: list[dict[str, int]], stop: int
) -> None:
    """Whatever shape each step has; the state was taken before or after the next shape was set."""
    tokens, length, batch, micro_batches, seed = size

    def fresh() -> TrainLoader:
        return loader(tokens, length, batch, micro_batches=micro_batches, seed=seed)

    feed, stopped = fresh(), fresh()
    expected, seen = [], []
    for step in plan:
        feed.set_step(**step)
        expected.append(next(iter(feed)))
    for number, step in enumerate(plan):
        if number == stop:
            state = stopped.state_dict()
            assert all(type(value) is int for value in state.values())
            shape = {
                "micro_batches": stopped.micro_batches,
                "batch_size": stopped.batch_size,
                "sequence_length": stopped.sequence_length,
            }
            stopped = fresh()
            stopped.load_state_dict(state)
            iter(stopped)  # as Lightning does once too often
            stopped.set_step(**shape)
        stopped.set_step(**step)
        seen.append(next(iter(stopped)))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(seen, expected, strict=True))


def test_order_changes_with_epoch_and_seed() -> None:
    feed = loader(1000, 5, 199)
    first, second = islice(feed, 2)
    assert not torch.equal(first, second)
    assert not torch.equal(first, next(iter(loader(1000, 5, 199, seed=1))))


@given(st.integers(1, 5000), st.integers(0, 9))
def test_the_order_of_an_epoch_is_a_permutation(size: int, seed: int) -> None:
    order = shuffled(np.arange(size), size, [seed, 0])
    assert sorted(order.tolist()) == list(range(size))
    places = np.arange(size // 3, size // 2)  # any part of it by itself
    assert np.array_equal(shuffled(places, size, [seed, 0]), order[places])


def test_all_orders_are_equally_likely() -> None:
    """Each of the 24 orders of 4 windows among 12,000 seeds, within 5 standard deviations."""
    orders = Counter(tuple(shuffled(np.arange(4), 4, [seed, 1]).tolist()) for seed in range(12_000))
    assert len(orders) == 24
    assert all(abs(count - 500) < 5 * 500**0.5 for count in orders.values())
    far = shuffled(np.arange(10_000), 10**9, [0, 0])
    assert abs(np.corrcoef(far[:-1], far[1:])[0, 1]) < 0.05
    assert abs(far.mean() / 10**9 - 0.5) < 0.02


def test_an_epoch_longer_than_a_block_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = windows(list(islice(loader(2000, 5, 7), 60)))
    monkeypatch.setattr("hlbgpt.data.loaders._BLOCK", 16)
    assert torch.equal(windows(list(islice(loader(2000, 5, 7), 60))), whole)


@given(sizes, st.integers(0, 40), st.integers(1, 6), st.integers(1, 3))
def test_a_step_of_another_size_continues_with_the_next_window(
    size: tuple[int, ...], taken: int, batch: int, micro_batches: int
) -> None:
    tokens, length, first_batch, first_micro_batches, seed = size
    feed = loader(tokens, length, first_batch, micro_batches=first_micro_batches, seed=seed)
    steps = list(islice(feed, taken))
    feed.set_step(batch_size=batch, micro_batches=micro_batches)
    rows = windows([*steps, *islice(feed, 5)])
    whole = loader(tokens, length, 1, seed=seed)
    assert torch.equal(rows, windows(list(islice(whole, len(rows)))))


@pytest.mark.parametrize("change", [{"seed": 1}, {"length": 7}, {"tokens": 900}])
def test_another_order_begins_with_a_new_epoch(change: dict[str, int]) -> None:
    feed = loader(1000, 5, 4)
    list(islice(feed, 60))  # 49 steps and 3 windows in an epoch
    assert (feed.epoch, feed.next_window) == (1, 41)
    arguments = {"tokens": 1000, "length": 5, "batch": 4, **change}
    other = loader(**arguments)
    other.load_state_dict(feed.state_dict())
    fresh = loader(**arguments)
    fresh.epoch = 2
    for ours, theirs in islice(zip(other, fresh, strict=True), 9):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("tokens", [0, 1, 10])
def test_too_few_tokens_are_refused(tokens: int) -> None:
    with pytest.raises(ValueError, match=f"{tokens} tokens hold"):
        loader(tokens, 10, 1)
    with pytest.raises(ValueError, match="100 tokens hold 9 windows of 10, fewer than a batch"):
        loader(100, 5, 3).set_step(sequence_length=10, batch_size=10)


@pytest.mark.parametrize(("dtype", "vocab_size"), [("<u2", 1 << 16), ("<u4", 200_019)])
def test_tokens_on_the_device_are_the_same_tokens(dtype: str, vocab_size: int) -> None:
    tokens = np.random.default_rng(0).integers(0, vocab_size, 300).astype(dtype)
    tokens[:2] = vocab_size - 1
    host, device = TrainLoader(tokens, seed=0), TrainLoader(tokens, seed=0)
    for feed in (host, device):
        feed.set_step(micro_batches=2, batch_size=3, sequence_length=5)
    device.keep_tokens_on(torch.device("cpu"))
    for ours, theirs in islice(zip(device, host, strict=True), 30):
        assert ours.dtype == theirs.dtype == torch.int64
        assert torch.equal(ours, theirs)
    assert device._device_tokens.nbytes == tokens.nbytes
    expected = torch.from_numpy(np.bincount(tokens, minlength=vocab_size))
    for feed in (host, device):
        assert torch.equal(feed.token_counts(vocab_size), expected)


@settings(max_examples=200)
@given(
    tokens=st.integers(2, 300),
    length=st.integers(1, 40),
    batch=st.integers(1, 9),
    world=st.integers(1, 3),
)
def test_evaluation_predicts_every_token_but_the_first_once(
    tokens: int, length: int, batch: int, world: int
) -> None:
    data = np.arange(tokens, dtype="<u2")
    pairs, batches = [], set()
    for rank in range(world):
        feed = EvalLoader(
            data, batch_size=batch, sequence_length=length, rank=rank, world_size=world
        )
        rows = list(feed)
        assert len(rows) == len(feed)
        batches.add(len(feed))
        for row in torch.cat(rows):
            assert row.shape == (length + 1,)
            kept = row[1:] >= 0
            pairs += list(zip(row[:-1][kept].tolist(), row[1:][kept].tolist(), strict=True))
            # Its own window alone: the context starts at a multiple of the window's length.
            assert row[0] == -1 or row[0] % length == 0
    assert sorted(pairs) == [(i, i + 1) for i in range(tokens - 1)]
    assert len(batches) == 1  # ranks run in step
