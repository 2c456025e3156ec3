"""The streams, held against their definitions."""

from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hlbgpt.data.loaders import PADDING, TokenStream, WindowStream


def stream(
    tokens: int, length: int, batch: int, *, seed: int = 0, rank: int = 0, world: int = 1
) -> TokenStream:
    """A stream over 0, 1, 2, ...: a window's first token says where it starts."""
    return TokenStream(
        np.arange(tokens, dtype="<u2"),
        batch_size=batch,
        sequence_length=length,
        seed=seed,
        rank=rank,
        world_size=world,
    )


sizes = st.tuples(st.integers(120, 500), st.integers(1, 7), st.integers(1, 4), st.integers(0, 9))


@given(sizes)
def test_every_window_comes_once_a_pass(size: tuple[int, int, int, int]) -> None:
    tokens, length, batch, seed = size
    feed = stream(tokens, length, batch, seed=seed)
    passes = 3
    rows = torch.cat(list(islice(feed, -(-passes * feed.windows_per_pass // batch))))
    assert rows.shape[1] == length + 1
    assert torch.equal(rows.long(), rows[:, :1].long() + torch.arange(length + 1))
    for number in range(passes):
        part = rows[number * feed.windows_per_pass : (number + 1) * feed.windows_per_pass, 0]
        starts = sorted(part.tolist())
        # Consecutive windows from a phase below one window: nothing twice, nothing left out.
        assert starts == list(range(starts[0], starts[0] + length * len(starts), length))
        assert starts[0] < length
        assert tokens - (starts[-1] + length + 1) < 2 * length


@given(sizes, st.integers(2, 3))
def test_ranks_are_rows_of_the_global_batch(size: tuple[int, int, int, int], world: int) -> None:
    tokens, length, batch, seed = size
    whole = stream(tokens, length, batch * world, seed=seed)
    shares = [
        stream(tokens, length, batch, seed=seed, rank=rank, world=world) for rank in range(world)
    ]
    for index in range(5):
        assert torch.equal(whole.batch(index), torch.cat([share.batch(index) for share in shares]))
    assert {len(share) for share in shares} == {len(whole)}


@given(sizes, st.integers(0, 40))
def test_a_restored_stream_goes_on_as_if_never_stopped(
    size: tuple[int, int, int, int], taken: int
) -> None:
    tokens, length, batch, seed = size
    feed = stream(tokens, length, batch, seed=seed)
    list(islice(feed, taken))
    state = feed.state_dict()
    assert all(type(value) is int for value in state.values())
    restored = stream(tokens, length, batch, seed=seed)
    restored.load_state_dict(state)
    iter(restored)  # as Lightning does once too often
    for ours, theirs in zip(islice(feed, 9), islice(restored, 9), strict=True):
        assert torch.equal(ours, theirs)


def test_order_changes_with_pass_and_seed() -> None:
    feed = stream(1000, 5, 4)
    passes = [torch.cat([feed.batch(i + n * len(feed)) for i in range(9)]) for n in range(2)]
    assert not torch.equal(*passes)
    assert not torch.equal(feed.batch(0), stream(1000, 5, 4, seed=1).batch(0))


@given(sizes, st.integers(0, 40), st.integers(1, 6), st.integers(1, 3))
def test_a_batch_of_another_size_goes_on_with_the_next_window(
    size: tuple[int, int, int, int], taken: int, batch: int, world: int
) -> None:
    """Twice: the order of the windows is that of a stream that never stopped."""
    tokens, length, first_batch, seed = size
    feed = stream(tokens, length, first_batch, seed=seed)
    rows = list(torch.cat(list(islice(feed, taken + 1))))[: taken * first_batch]
    feed = stream(tokens, length, first_batch, seed=seed)
    list(islice(feed, taken))
    for sizes in ((batch, world), (first_batch, 1)):
        state = feed.state_dict()
        ranks = [
            stream(tokens, length, sizes[0], seed=seed, rank=rank, world=sizes[1])
            for rank in range(sizes[1])
        ]
        for feed in ranks:
            feed.load_state_dict(state)
        for parts in zip(*(islice(feed, 3) for feed in ranks), strict=True):
            rows += list(torch.cat(parts))
        feed = ranks[0]
    whole = stream(tokens, length, 1, seed=seed)
    for row, expected in zip(rows, whole, strict=False):
        assert torch.equal(row, expected[0])


@pytest.mark.parametrize("change", [{"seed": 1}, {"length": 7}, {"tokens": 900}])
def test_another_order_starts_with_a_new_pass(change: dict[str, int]) -> None:
    feed = stream(1000, 5, 4)
    list(islice(feed, 60))  # 49 batches and 3 windows in a pass
    other = stream(**{"tokens": 1000, "length": 5, "batch": 4, **change})
    other.load_state_dict(feed.state_dict())
    starts = torch.cat([other.batch(i) for i in range(len(other))])[:, 0].tolist()
    assert len(set(starts)) == len(starts)
    windows = other.windows_per_pass
    assert other._starts(2 * windows, 2 * windows + 1)[0] == starts[0]  # of the third pass


@pytest.mark.parametrize("tokens", [0, 1, 10])
def test_too_few_tokens_are_refused(tokens: int) -> None:
    with pytest.raises(ValueError, match=f"{tokens} tokens hold"):
        stream(tokens, 10, 1)


@settings(max_examples=200)
@given(
    tokens=st.integers(2, 300),
    length=st.integers(1, 40),
    batch=st.integers(1, 9),
    world=st.integers(1, 3),
)
def test_windows_predict_every_token_but_the_first_once(
    tokens: int, length: int, batch: int, world: int
) -> None:
    data = np.arange(tokens, dtype="<u2")
    pairs, batches = [], set()
    for rank in range(world):
        windows = WindowStream(
            data, batch_size=batch, sequence_length=length, rank=rank, world_size=world
        )
        rows = list(windows)
        assert len(rows) == len(windows)
        batches.add(len(windows))
        for row in torch.cat(rows).long():
            assert row.shape == (length + 1,)
            kept = row[1:] != PADDING
            pairs += list(zip(row[:-1][kept].tolist(), row[1:][kept].tolist(), strict=True))
            # Its own window alone: the context starts at a multiple of the window's length.
            assert row[0] == PADDING or row[0] % length == 0
    assert sorted(pairs) == [(i, i + 1) for i in range(tokens - 1)]
    assert len(batches) == 1  # ranks run in step
