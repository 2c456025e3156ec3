"""Texts of several parts: which files are a part, and token files used as one."""

import json
import os
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LAST, QUICKSTART, RUN
from helpers import names, read_record, synthetic_encoding
from hypothesis import given
from hypothesis import strategies as st

import hlbgpt.data.sources
import hlbgpt.data.text_folder
from hlbgpt.data import EvalLoader, TextFiles, TextFolder, TextSource, TokenDataModule, TrainLoader
from hlbgpt.data.joined_tokens import JoinedTokens
from hlbgpt.data.prepare import parts_of, prepare_token_files
from hlbgpt.data.sources import SPLITS, grouped
from hlbgpt.data.token_file import TokenFiles
from hlbgpt.data.tokenizer import Tokenizer, load_tokenizer
from hlbgpt.utils.errors import InputError

BYTES = load_tokenizer("bytes")


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hlbgpt.data.sources, "PART_BYTES", 20_000)
    monkeypatch.setattr(hlbgpt.data.text_folder, "_BLOCK_CHARS", 1_000)  # as in all large folders


def files_of(
    cache: Path, source: TextSource, split: str = "train", tokenizer: Tokenizer = BYTES
) -> TokenFiles:
    parts = parts_of(cache, source, split, tokenizer.name)
    prepare_token_files(parts, split, lambda: tokenizer)
    return TokenFiles([part.path for part in parts])


def write(folder: Path, name: str, size: int) -> None:
    text = "".join(f"{name}, é, line {i}\n" for i in range(size // 20))
    (folder / name).write_text(text, encoding="utf-8")


# --- arrays read as one ---------------------------------------------------------------------------

lengths = st.lists(st.integers(0, 60), min_size=1, max_size=6).filter(lambda n: sum(n) > 1)


def joined(sizes: list[int], dtype: str = "<u2") -> tuple[np.ndarray, JoinedTokens]:
    whole = np.random.default_rng(0).integers(0, 1000, sum(sizes)).astype(dtype)
    return whole, JoinedTokens(np.split(whole, np.cumsum(sizes)[:-1]))


@given(lengths, st.integers(0, 400), st.integers(0, 400))
def test_slices_and_windows_are_those_of_the_whole(sizes: list[int], start: int, stop: int) -> None:
    whole, parts = joined(sizes)
    assert len(parts) == len(whole)
    assert parts.nbytes == whole.nbytes
    assert np.array_equal(parts[start:stop], whole[start:stop])
    length = min(1 + stop % 50, len(whole))
    offsets = np.arange(len(whole) - length + 1)[::-1].reshape(-1, 1)
    windows = parts.windows(offsets, length)
    assert windows.shape == (*offsets.shape, length)
    assert windows.dtype == whole.dtype
    assert np.array_equal(windows, whole[offsets[..., None] + np.arange(length)])


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
@given(sizes=lengths.filter(lambda n: sum(n) > 20), world=st.integers(1, 3))
def test_loaders_of_several_parts_are_those_of_one(
    sizes: list[int], world: int, dtype: str
) -> None:
    whole, parts = joined(sizes, dtype)
    counts = torch.zeros(1000, dtype=torch.int64)
    for rank in range(world):
        ours, device, theirs = (
            TrainLoader(tokens, 3, rank, world) for tokens in (parts, parts, whole)
        )
        device.keep_tokens_on(torch.device("cpu"))
        for feed in (ours, device, theirs):
            feed.set_step(micro_batches=2, sequence_length=4)
        for steps in islice(zip(ours, device, theirs, strict=True), 12):
            assert torch.equal(steps[0], steps[2])
            assert torch.equal(steps[1], steps[2])
        assert torch.equal(ours.token_counts(1000), device.token_counts(1000))
        counts += ours.token_counts(1000)
        for feed in (ours, device, theirs):
            (chunk,) = feed.text_chunks(3)
            assert np.array_equal(chunk.numpy(), whole)
        batches = [
            torch.stack(list(EvalLoader(tokens, batch_size=3, sequence_length=5)))
            for tokens in (parts, whole)
        ]
        assert torch.equal(*batches)
    assert torch.equal(counts, torch.from_numpy(np.bincount(whole, minlength=1000)))


def test_only_parts_that_are_read_are_asked_for() -> None:
    asked: set[int] = set()
    tokens = JoinedTokens([np.zeros(n, "<u2") for n in (5, 5, 5, 5)], asked.add)
    tokens[6:9]
    assert asked == {1}
    tokens.windows(np.array([11, 8]), 3)
    assert asked == {1, 2}


# --- which files are a part -----------------------------------------------------------------------


def test_small_folders_are_one_part(tmp_path: Path) -> None:
    for i in range(50):
        write(tmp_path, f"{i}.txt", 2_000)
    assert [len(TextFolder(str(tmp_path)).parts(split)) for split in SPLITS] == [1, 1, 1]


@pytest.mark.usefixtures("small_parts")
@given(st.lists(st.integers(0, 3_000), max_size=40), st.integers(0, 40), st.integers(0, 3_000))
def test_another_file_changes_few_parts(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], place: int, size: int
) -> None:
    """On average less than two; the others stay as they are, wherever the file comes."""
    folder = tmp_path_factory.mktemp("sizes")
    paths = [str(folder / f"{i:02}") for i in range(len(sizes))]
    for path, each in zip(paths, sizes, strict=True):
        Path(path).write_bytes(bytes(each))
    groups = grouped(paths, [os.path.basename(path) for path in paths])
    assert list(chain(*groups)) == paths
    totals = [sum(map(os.path.getsize, group)) for group in groups]
    assert all(total >= 20_000 for total in totals[:-1])
    added = f"{paths[place % len(paths)]} new" if paths else str(folder / "new")
    Path(added).write_bytes(bytes(size))
    later = sorted([*paths, added])
    now = grouped(later, [os.path.basename(path) for path in later])
    before = [group for group in groups if group < [added] and added not in group]
    assert now[: max(0, len(before) - 1)] == before[: max(0, len(before) - 1)]


@pytest.mark.usefixtures("small_parts")
def test_a_folder_that_grows_is_tokenized_where_it_grew(tmp_path: Path) -> None:
    folder, cache = tmp_path / "texts", tmp_path / "cache"
    folder.mkdir()
    for i in range(100):
        write(folder, f"{i:03}.txt", 2_000)
    source = TextFolder(str(folder))

    def built() -> int:
        before = set(names(cache)) if cache.exists() else set()
        for split in SPLITS:
            files_of(cache, source, split)
        return len(set(names(cache)) - before)

    parts = len(source.parts("train"))
    assert 3 <= parts <= 10
    assert built() == 3 * parts
    assert built() == 0
    texts = {
        split: bytes(files_of(cache, source, split).tokens[:].astype("u1")) for split in SPLITS
    }
    for split in SPLITS:
        assert texts[split].decode() == "".join(source.chunks(split))
    write(folder, "100.txt", 2_000)  # at the end
    assert built() == 3
    write(folder, "003 and a half.txt", 2_000)  # near the start
    assert built() <= 3 * 3
    (folder / "050.txt").unlink()
    assert built() <= 3 * 3


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_base", "bytes"])
def test_no_token_spans_two_parts_and_all_others_are_those_of_the_whole(
    tmp_path: Path, name: str
) -> None:
    """A part is tokenized as a text of its own; only white space at its end can differ."""
    encoding = BYTES.encoding if name == "bytes" else synthetic_encoding(name)
    tokenizer = Tokenizer(encoding)
    for i in range(60):
        write(tmp_path, f"{i:02}.txt", 2_000)
    source = TextFolder(str(tmp_path))
    files = files_of(tmp_path / "cache", source, tokenizer=tokenizer)
    assert len(files.files) > 2
    texts = ["".join(part.chunks("train")) for part in source.parts("train")]
    expected = [tokenizer.encode(text) for text in texts]
    assert files.tokens[:].tolist() == list(chain(*expected))
    assert [file.header.tokens for file in files.files] == list(map(len, expected))
    whole = tokenizer.encode("".join(texts))
    assert tokenizer.decode_bytes(files.tokens[:].tolist()) == tokenizer.decode_bytes(whole)
    assert abs(len(whole) - len(files.tokens)) <= 2 * len(texts)


# --- files used as one ----------------------------------------------------------------------------


@pytest.mark.usefixtures("small_parts")
def test_several_files_are_a_split(tmp_path: Path) -> None:
    for i in range(4):
        write(tmp_path, f"train-{i}.txt", 30_000)
    paths = [str(tmp_path / f"train-{i}.txt") for i in range(4)]
    by_name, by_pattern = TextFiles(train=paths), TextFiles(train=str(tmp_path / "train-*.txt"))
    assert by_name.fingerprint("train") == by_pattern.fingerprint("train")
    cache = tmp_path / "cache"
    files = files_of(cache, by_name)
    assert len(files.files) == 4
    text = b"".join(Path(path).read_bytes() for path in paths)
    assert bytes(files.tokens[:].astype("u1")) == text
    assert (files.header.tokens, files.header.text_bytes) == (len(text), len(text))
    four = names(cache)
    files_of(cache, by_pattern)
    files_of(cache, TextFiles(train=paths[2]))
    assert names(cache) == four
    other = files_of(cache, TextFiles(train=paths[::-1]))
    assert names(cache) == four
    assert other.header.fingerprint != files.header.fingerprint
    with pytest.raises(InputError, match=r"data\.source\.train: no file '.*/valid-\*"):
        files_of(cache, TextFiles(train=str(tmp_path / "valid-*")))


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("kind", [TextFiles, TextFolder])
def test_a_subclass_may_change_the_text(tmp_path: Path, kind: type[TextSource]) -> None:
    class Loud(kind):  # type: ignore[misc, valid-type]
        def chunks(self, split: str) -> Iterator[str]:
            return (chunk.upper() for chunk in super().chunks(split))

    paths = [tmp_path / f"{number}.txt" for number in range(3)]
    for path in paths:
        path.write_text("many a word in here\n\n" * 1000)
    source = Loud(str(tmp_path)) if kind is TextFolder else Loud(train=[str(p) for p in paths])
    texts = [part.chunks("train") for part in source.parts("train")]
    assert "".join(chain.from_iterable(texts)) == "".join(source.chunks("train"))
    assert next(source.chunks("train")).startswith("MANY A WORD")


@pytest.mark.usefixtures("small_parts")
def test_a_damaged_part_alone_is_built_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(3):
        write(tmp_path, f"{i}.txt", 30_000)
    source, cache = TextFiles(train=str(tmp_path / "*.txt")), tmp_path / "cache"
    files = files_of(cache, source)
    times = [file.path.stat().st_mtime_ns for file in files.files]
    path, whole = files.files[1].path, files.files[1].path.read_bytes()
    os.truncate(path, 5_000)
    with pytest.raises(InputError, match=f"{path}: cut to 5000 bytes while in use"):
        files.tokens.windows(np.array([0, 40_000]), 10)
    files_of(cache, source)
    assert path.read_bytes() == whole
    now = [file.path.stat().st_mtime_ns for file in files.files]
    assert [a == b for a, b in zip(times, now, strict=True)] == [True, False, True]
    assert capsys.readouterr().out.count("building it again") == 1


class Parts(TextSource):
    """Texts, each a part."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def parts(self, split: str) -> list["Parts"]:
        return [Parts([text]) for text in self.texts]

    def fingerprint(self, split: str) -> str:
        return json.dumps(self.texts)

    def chunks(self, split: str) -> Iterator[str]:
        yield from self.texts


def test_a_part_may_be_empty_but_not_a_text(tmp_path: Path) -> None:
    files = files_of(tmp_path, Parts(["some ", "", "text"]))
    assert files.tokens[:].tolist() == list(b"some text")
    with pytest.raises(InputError, match="the train split is empty"):
        files_of(tmp_path / "other", Parts([""]))


def test_more_parts_than_a_process_may_open(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(os.listdir("/dev/fd"))
    source = Parts([f"{i} " for i in range(200)])
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 30, limits[1]))
        files = files_of(tmp_path, source)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert bytes(files.tokens[:].astype("u1")).decode() == "".join(source.texts)


def test_a_text_that_changes_after_it_was_tokenized_is_named(tmp_path: Path) -> None:
    source = Parts(["some words", "more words"])
    data = TokenDataModule(source, "bytes", cache_dir=str(tmp_path))
    data.prepare_data()
    source.texts.append("and more")
    with pytest.raises(InputError, match=r"No such file .* start again if the text or the cache"):
        data.setup("fit")


@pytest.mark.usefixtures("small_parts")
def test_a_run_knows_its_parts_again(
    tmp_path: Path, hlbgpt, tiny: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    """Train on a folder of several parts, resume, and be told when one of them has changed."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(40):
        write(texts, f"{i:02}.txt", 4_000)
    source = ["--data.source=hlbgpt.data.TextFolder", f"--data.source.folder={texts}", *tiny[2:]]
    hlbgpt("fit", *QUICKSTART, *source)
    record = read_record(RUN)
    files = files_of(Path(tiny[2].split("=")[1]), TextFolder(str(texts)))
    assert len(files.files) > 2
    assert record["texts"]["train"] == [files.header.fingerprint]
    hlbgpt("fit", "--ckpt_path", LAST, "--trainer.max_steps=6")
    (texts / "20.txt").write_text("changed, so that it is another text\n" * 100)
    with pytest.raises(SystemExit):
        hlbgpt("fit", "--ckpt_path", LAST, "--trainer.max_steps=8")
    assert "the text of the train" in capfd.readouterr().err
