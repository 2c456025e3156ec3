"""Embedding of a token's spelling, so that tokens that are spelled alike share what is learned.

Most of 50,000 tokens occur only a few times in the first millions, but their spelling says much:
" Walk", " walk" and " walked" mean the same, " 1987" is a year like " 1986". Each token has a few
features, such as its last three letters, and the embedding is the sum of theirs. It is a lookup
and takes no matrix product. Source: fastText (arXiv 1607.04606).

Shapes: V vocabulary, F features of a token, D width.
"""

import zlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_FEATURES = 6  # F


def subwords(spelling: bytes) -> list[str]:
    """The F features of a token: its kind, its beginning, its end, and its letters.

    A leading space and the case of letters are part of the kind alone.
    """
    text = spelling.decode(errors="backslashreplace")
    letters = text.removeprefix(" ")
    lower = letters.lower()
    spaced, others = text != letters, sorted({_kind(character) for character in letters[1:]})
    kind = f"{spaced}/{_kind(letters[:1])}/{''.join(others)}"
    return [
        f"kind {kind} {min(len(letters), 8)}",
        f"end2 {kind} {lower[-2:]}",
        f"end3 {lower[-3:]}",
        f"start2 {spaced} {lower[:2]}",
        f"start3 {lower[:3]}",
        f"all {lower}",
    ]


def _kind(character: str) -> str:
    if character.isdigit():
        return "d"
    return "U" if character.isupper() else "l" if character.islower() else "x"


def subword_features(spelling: Sequence[bytes], buckets: int) -> Tensor:
    """The row of each feature of each token (V, F), from 1 to `buckets` - 1, by a hash."""
    rows = [[1 + zlib.crc32(f.encode()) % (buckets - 1) for f in subwords(t)] for t in spelling]
    return torch.tensor(rows, dtype=torch.int64)


class SubwordEmbedding(nn.Module):
    """The sum of the embeddings of features (..., F), in which 0 is no feature: (..., D).

    On Macs it takes torch 2.10.

    Args:
        buckets: Rows of the table, of which the first stays zero.
        width: D.
        std: Standard deviation of its initial values.
    """

    def __init__(self, buckets: int, width: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(buckets, width))
        nn.init.normal_(self.weight[1:], std=std)

    def forward(self, features: Tensor) -> Tensor:
        rows = features.flatten(0, -2)
        total = F.embedding_bag(rows, self.weight, mode="sum", padding_idx=0)
        return total.unflatten(0, features.shape[:-1])
