"""Texts, token files and paths that are not what they seem: one line, and at once."""

import os
import signal
import socket
from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import LAST, QUICKSTART, RUN
from helpers import At, make, names, prepare_token_file, trainer
from hypothesis import given
from hypothesis import strategies as st

import hlbgpt.data.sources
from hlbgpt.cli.words import checked, require_file
from hlbgpt.data import (
    EvalLoader,
    HubText,
    TextFiles,
    TextFolder,
    TextSource,
    TokenDataModule,
    TrainLoader,
)
from hlbgpt.data.prepare import parts_of
from hlbgpt.data.token_file import DamagedFileError, TokenFiles
from hlbgpt.data.tokenizer import Tokenizer, load_tokenizer
from hlbgpt.runs.folder import CONFIG, RECORD, folder_of, is_unfinished, newest_checkpoint
from hlbgpt.utils.errors import InputError


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """What waits for a pipe fails after 20 s."""

    def fail(*_: Any) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# --- another text with the size and the time of the one before ----------------------------------

SIZE = 50_000
SOURCES: dict[str, tuple[str, Callable[[Path], TextSource]]] = {
    "TextFiles": ("a.txt", lambda path: TextFiles(train=str(path))),
    "TextFolder": ("a.txt", lambda path: TextFolder(str(path.parent))),
    "HubText": ("train.parquet", lambda path: HubText(str(path.parent))),
}


@pytest.mark.parametrize("place", [0, 2_000, SIZE // 2, SIZE - 1], ids="byte {}".format)
@pytest.mark.parametrize("source", SOURCES)
def test_a_text_that_changes_but_keeps_size_and_time_is_noticed(
    tmp_path: Path, source: str, place: int
) -> None:
    name, make_source = SOURCES[source]
    path = tmp_path / name
    path.write_bytes(b"a " * (SIZE // 2))
    before, times = make_source(path).fingerprint("train"), path.stat()
    assert make_source(path).fingerprint("train") == before
    with path.open("rb+") as file:
        file.seek(place)
        file.write(b"b")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_mtime_ns == times.st_mtime_ns
    assert make_source(path).fingerprint("train") != before


@given(st.lists(st.integers(0, 10_000), max_size=30))
def test_the_samples_are_few_and_hold_the_first_and_the_last_byte(sizes: list[int]) -> None:
    places = hlbgpt.data.sources._sample_places(list(accumulate(sizes)))
    assert len(places) == len(set(places)) <= 16
    assert all(0 <= offset < sizes[number] for number, offset in places)
    if used := [number for number, size in enumerate(sizes) if size]:
        assert places[0] == (used[0], 0)
        number, offset = places[-1]
        assert number == used[-1]
        assert offset + 4096 >= sizes[number]


def test_the_samples_are_spread_over_all_files() -> None:
    places = hlbgpt.data.sources._sample_places(list(range(5, 1605, 5)))  # 320 files of 5 bytes
    numbers = [number for number, _ in places]
    assert (numbers[0], numbers[-1], len(numbers)) == (0, 319, 16)
    assert {after - before for before, after in pairwise(numbers)} <= {21, 22}


# --- token files that are cut while in use --------------------------------------------------------

BYTES = load_tokenizer("bytes")
USES: dict[str, Callable[[TokenFiles], Any]] = {
    "training batch": lambda files: next(iter(training(files))),
    "copy to the device": lambda files: training(files).keep_tokens_on(torch.device("cpu")),
    "token counts": lambda files: training(files).token_counts(256),
    "n-gram counts": lambda files: list(training(files).text_chunks(2)),
    "evaluation batch": lambda files: next(
        iter(EvalLoader(files.tokens, batch_size=2, sequence_length=8))
    ),
    "checksum": lambda files: files.files[0].verify(),
}


def training(files: TokenFiles) -> TrainLoader:
    loader = TrainLoader(files.tokens, seed=0)
    loader.set_step(batch_size=2, sequence_length=8)
    return loader


@pytest.mark.parametrize("left", [0, 4096, 9_000, -1], ids="{} bytes".format)
@pytest.mark.parametrize("use", USES)
def test_a_token_file_cut_while_in_use_is_named(tmp_path: Path, use: str, left: int) -> None:
    text = tmp_path / "a.txt"
    text.write_text("words " * 4_000)
    path = tmp_path / "a.tokens"
    prepare_token_file(path, TextFiles(train=str(text)), "train", lambda: BYTES)
    files = TokenFiles([path])
    USES[use](files)
    os.truncate(path, left % path.stat().st_size)
    with pytest.raises(DamagedFileError, match=r"a\.tokens: cut to \d+ bytes while in use; start"):
        USES[use](files)
    whole = prepare_token_file(path, TextFiles(train=str(text)), "train", lambda: BYTES)
    assert np.array_equal(whole.tokens, np.frombuffer(text.read_bytes(), "u1"))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_training_ends_in_one_line_when_a_token_file_is_cut(
    folder: Path, tmp_path: Path, split: str
) -> None:
    module, data = make(folder, tmp_path)

    def cut(trainer: Any, *_: Any) -> None:
        if trainer.global_step == 2:
            os.truncate(data.files[split].files[0].path, 5_000)

    run = trainer(
        tmp_path,
        max_steps=8,
        callbacks=[At("on_train_batch_start", cut)],
        limit_val_batches=1.0,
        val_check_interval=4,
    )
    with pytest.raises(InputError, match=rf"{split}-bytes-\w+\.tokens: cut to 5000 bytes while in"):
        run.fit(module, data)
    assert run.global_step == (3 if split == "train" else 4)


# --- pipes, sockets and devices -------------------------------------------------------------------

FOLDER = ["--data.source=hlbgpt.data.TextFolder", "--data.source.folder=texts"]
HUB = ["--data.source=hlbgpt.data.HubText", "--data.source.path=hub"]
PIPES = [
    ("fit", ["--data.source.train=pipe"], "data.source.train: no file 'pipe'"),
    ("fit", ["--data.source.train=/dev/zero"], "data.source.train: no file '/dev/zero'"),
    ("fit", ["--data.source.folder=wiki"], "data.source.folder: no wiki.train.raw"),
    ("fit", FOLDER, "data.source: 'texts/b.txt' is a pipe (FIFO), not a file"),
    ("fit", [*FOLDER, "--data.source.pattern=*.sock"], "data.source: 'texts/c.sock' is a socket"),
    ("fit", [*FOLDER, "--data.source.pattern=*.zero"], "data.source: 'texts/d.zero' is a device"),
    ("fit", HUB, "data.source: cannot load hub: "),
    ("fit", ["--data.cache_dir=pipe"], "data: pipe: File exists"),
    ("fit", ["--config", "pipe"], "--config: 'pipe' is a pipe (FIFO), not a file"),
    ("fit", ["-c=pipe"], "--config: 'pipe' is a pipe (FIFO), not a file"),
    ("predict", ["--config=pipe"], "--config: 'pipe' is a pipe (FIFO), not a file"),
    ("fit", ["--config=/dev/zero"], "--config: '/dev/zero' is a device, not a file"),
    ("fit", ["--ckpt_path=pipe"], "ckpt_path: no file 'pipe'"),
    ("fit", ["--ckpt_path=/dev/zero"], "ckpt_path: no file '/dev/zero'"),
    ("predict", ["--ckpt_path=pipe"], "ckpt_path: no file 'pipe'"),
]


@pytest.mark.parametrize(
    ("command", "words", "message"), PIPES, ids=[f"{row[0]} {' '.join(row[1])}" for row in PIPES]
)
def test_what_is_no_file_is_refused_at_once(
    hlbgpt: Callable[..., str],
    hub_cache: None,
    tiny: list[str],
    capfd: pytest.CaptureFixture[str],
    command: str,
    words: list[str],
    message: str,
) -> None:
    for name in ("texts", "wiki", "hub"):
        Path(name).mkdir()
    Path("texts/a.txt").write_text("words " * 9_000)
    for name in ("pipe", "texts/b.txt", "wiki/wiki.train.raw", "hub/train.parquet"):
        os.mkfifo(name)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("texts/c.sock")
    Path("texts/d.zero").symlink_to("/dev/zero")
    with pytest.raises(SystemExit) as stop:
        hlbgpt(command, *QUICKSTART, *tiny, *words)
    assert stop.value.code == 2
    error = capfd.readouterr().err
    assert "Traceback" not in error
    assert f"hlbgpt: error: {message}" in error.splitlines()[-1]


# --- paths ----------------------------------------------------------------------------------------

SETTINGS: dict[str, Callable[[str], Any]] = {
    "data.cache_dir": lambda path: TokenDataModule(TextFiles("."), cache_dir=path),
    "data.source.folder": lambda path: TextFiles(folder=path).paths("train"),
    "data.source.train": lambda path: TextFiles(train=path).paths("train"),
    "data.source.test": lambda path: TextFiles(test=path).fingerprint("test"),
    "data.source.folder of a TextFolder": lambda path: TextFolder(path),
    "data.source.path": lambda path: HubText(path),
    "--config": lambda path: checked(["fit", "--config", path]),
    "ckpt_path": lambda path: checked(["fit", "--ckpt_path", path]),
    "ckpt_path of a command with a config": require_file,
}


@pytest.mark.parametrize(
    ("path", "message"),
    [("~no such user/x", "no user of this name has a home folder"), ("a\0b", "holds a NUL")],
    ids=["unknown user", "NUL"],
)
@pytest.mark.parametrize("setting", SETTINGS)
def test_paths_that_no_file_can_have_are_named(setting: str, path: str, message: str) -> None:
    with pytest.raises(InputError) as raised:
        SETTINGS[setting](path)
    assert str(raised.value).startswith(f"{setting.split(' of ')[0]}: {path!r}")
    assert message in str(raised.value)


def test_the_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").touch()
    assert TextFiles(train="~/a.txt").paths("train") == [str(tmp_path / "a.txt")]
    assert TextFolder("~").files() == [str(tmp_path / "a.txt")]
    assert TokenDataModule(TextFiles(), cache_dir="~/cache").cache_dir == tmp_path / "cache"


def test_deep_folders_in_any_script_and_many_special_tokens(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["深い🗂 " * 12] * 12)
    deep.mkdir(parents=True)
    assert len(os.fsencode(deep)) > 1_500
    (deep / "ü.txt").write_text("words <s0> " * 9_000)
    special = [f"<s{i}>" + "é" * 100 * (i > 0) for i in range(500)]
    tokenizer = Tokenizer(BYTES.encoding, special)
    source, cache = TextFolder(str(deep)), deep / "cache"
    ((path, _),) = parts_of(cache, source, "train", "bytes", special)
    file = prepare_token_file(path, source, "train", lambda: tokenizer)
    assert file.header.vocab_size == 756
    assert names(cache) == [path.name]
    too_deep = cache.joinpath(*["x" * 200] * 30)
    with pytest.raises(InputError, match="File name too long"):
        prepare_token_file(too_deep / "a.tokens", source, "train", lambda: tokenizer)


# --- the folders of runs --------------------------------------------------------------------------


def run_of(name: str, *, finished: bool = False) -> Path:
    """The checkpoint of an empty run in `runs/NAME/version_0`."""
    path = Path("runs", name, "version_0", "checkpoints", "last.ckpt")
    path.parent.mkdir(parents=True)
    for file in (path, path.parents[1] / CONFIG, *[path.parents[1] / RECORD] * finished):
        file.touch()
    return path


@pytest.mark.parametrize("name", ["a[1]", "[!b]", "*", "?", "a b", "ü", "**"])
def test_last_takes_the_name_of_a_run_literally(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    wanted = run_of(name)
    os.utime(wanted, ns=(0, 0))
    for other in ("a1", "c", "cc"):
        run_of(other)
    assert newest_checkpoint(name) == wanted
    assert newest_checkpoint(None) != wanted
    with pytest.raises(InputError, match=r"no checkpoint is at runs/b\[1\]/version_"):
        newest_checkpoint("b[1]")


@pytest.mark.parametrize("absolute", [False, True], ids=["relative", "absolute"])
@pytest.mark.parametrize(
    "link", ["link.ckpt", "d/link.ckpt", "d/checkpoints/last.ckpt"], ids=lambda link: link
)
def test_a_link_stands_for_the_checkpoint_to_which_it_leads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, link: str, absolute: bool
) -> None:
    (tmp_path / CONFIG).touch()  # of nothing that is asked for
    (work := tmp_path / "work").mkdir()
    monkeypatch.chdir(work)
    checkpoint, finished = run_of("a"), run_of("b", finished=True)
    path = work / link if absolute else Path(link)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(checkpoint.absolute())
    assert folder_of(path).samefile(checkpoint.parents[1])
    assert is_unfinished(path)
    path.unlink()
    path.symlink_to(finished.absolute())
    assert folder_of(path).samefile(finished.parents[1])
    assert not is_unfinished(path)


def test_a_checkpoint_kept_elsewhere_belongs_to_the_run_that_links_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = run_of("a")
    checkpoint.rename("large.ckpt")
    checkpoint.symlink_to(tmp_path / "large.ckpt")
    assert folder_of(checkpoint) == checkpoint.parents[1]
    assert is_unfinished(checkpoint)
    assert folder_of("/last.ckpt") == Path("/")


def test_a_run_resumes_in_place_by_a_link(
    hlbgpt: Callable[..., str], tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "")  # as some schedulers leave it
    hlbgpt("fit", *QUICKSTART, *tiny)
    (RUN / RECORD).unlink()
    Path("link.ckpt").symlink_to(LAST)
    out = hlbgpt("fit", "--ckpt_path", "link.ckpt", "--trainer.max_steps=6")
    assert f"run folder: {RUN.absolute()}" in out
    assert names(RUN.parent) == ["version_0"]
    assert (RUN / RECORD).is_file()
