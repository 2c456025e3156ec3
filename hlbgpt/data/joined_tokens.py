"""Several arrays of tokens, read as one."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np


class JoinedTokens:
    """Tokens that lie in several arrays, one after another, such as memory-mapped files.

    Args:
        parts: (n,) uint16, or uint32 below 2^31; one or more, of one type.
        before_read: Called with the number of a part before its tokens are read, to raise an error
            if the file in which they are mapped has been cut, which would kill the process.

    Attributes:
        dtype: Type of the tokens.
    """

    def __init__(
        self, parts: Sequence[np.ndarray], before_read: Callable[[int], None] = lambda part: None
    ) -> None:
        self._parts, self._before_read = list(parts), before_read
        self._ends = list(accumulate(map(len, parts)))
        self._starts = np.array([0, *self._ends[:-1]])
        self.dtype = self._parts[0].dtype

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of all tokens."""
        return len(self) * self.dtype.itemsize

    def __getitem__(self, places: slice) -> np.ndarray:
        """The tokens at consecutive places; a copy only where they lie in several parts."""
        start, stop, _ = places.indices(len(self))
        pieces = []
        number = bisect_right(self._ends, start)
        while start < stop:
            part = self._parts[number]
            begin = self._ends[number] - len(part)
            self._before_read(number)
            pieces.append(part[start - begin : stop - begin])
            start, number = self._ends[number], number + 1
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate([np.empty(0, self.dtype), *pieces])

    def windows(self, offsets: np.ndarray, length: int) -> np.ndarray:
        """Windows of `length` tokens that start at `offsets` (*S,): (*S, length), a copy."""
        if len(self._parts) == 1:
            self._before_read(0)
            return np.lib.stride_tricks.sliding_window_view(self._parts[0], length)[offsets]
        shape, offsets = offsets.shape, offsets.ravel()
        numbers = np.searchsorted(self._starts, offsets, side="right") - 1
        begins = offsets - self._starts[numbers]
        for part in set(numbers.tolist()):
            self._before_read(part)
        rows = []
        for offset, number, begin in zip(
            offsets.tolist(), numbers.tolist(), begins.tolist(), strict=True
        ):
            row = self._parts[number][begin : begin + length]
            rows.append(row if len(row) == length else self[offset : offset + length])
        return np.concatenate(rows).reshape(*shape, length)
