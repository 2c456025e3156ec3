"""Locks between processes and atomic writes."""

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from helpers import names
from hypothesis import given, settings
from hypothesis import strategies as st

from hlbgpt.utils.files import atomic_write, locked, write_json


def test_the_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_write(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == path.parent
    assert path.read_text() == "new"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("ne")
            raise error

    with pytest.raises(error):
        write()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_disk_that_is_full_when_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), atomic_write(tmp_path / "a") as temporary:
        temporary.write_text("new")
    assert names(tmp_path) == []


def test_leftovers_of_killed_processes_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "a[1].txt"
    code = (
        "import os, sys; from pathlib import Path; from hlbgpt.utils.files import atomic_write\n"
        "with atomic_write(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half'); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == -9
    assert len(names(tmp_path)) == 1
    other = tmp_path / ".b.txt.1.tmp"
    other.touch()
    with atomic_write(path) as temporary:
        temporary.write_text("whole")
    assert names(tmp_path) == [other.name, path.name]


def test_what_others_write_is_left_alone(tmp_path: Path) -> None:
    """Another machine, which locks may not reach; and a process of this one that is alive."""
    path, host = tmp_path / "a", socket.gethostname()
    other_machine = tmp_path / ".a.node7.1.tmp"
    alive = tmp_path / f".a.{host}.{os.getppid()}.tmp"
    old = tmp_path / ".a.node7.2.tmp"
    for file in (other_machine, alive, old):
        file.touch()
    os.utime(old, (0, 0))
    with atomic_write(path) as temporary:
        temporary.write_text("whole")
    assert names(tmp_path) == sorted([other_machine.name, alive.name, "a"])


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "b" / "a") as temporary:
        temporary.write_text("new")


def test_a_lock_is_held_against_others(tmp_path: Path) -> None:
    with locked(tmp_path, wait=False) as first:
        assert first
        with locked(tmp_path, wait=False) as second:
            assert not second
    with locked(tmp_path, wait=True) as again:
        assert again


@pytest.mark.parametrize("number", ["ENOTSUP", "EOPNOTSUPP", "ENOLCK", "ENOSYS"])
def test_where_there_are_no_locks_a_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: str
) -> None:
    def refuse(handle: int, operation: int) -> None:
        raise OSError(getattr(errno, number), "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with warnings.catch_warnings(record=True) as warned, locked(tmp_path, wait=True) as held:
        warnings.simplefilter("always")
        assert held
    # For ENOSYS, newer versions of filelock warn and lock by the existence of a file.
    said = capsys.readouterr().err + "".join(str(warning.message) for warning in warned)
    assert "no file locks here; start only one" in said or "flock not supported on this" in said


def test_other_errors_of_locks_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(handle: int, operation: int) -> None:
        raise OSError(errno.EIO, "the disk is broken")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match="the disk is broken"), locked(tmp_path, wait=True):
        pass


plain = st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False)
finite = plain.filter(lambda value: not isinstance(value, float) or abs(value) < float("inf"))
values = st.dictionaries(
    st.text(), st.recursive(finite, lambda x: st.lists(x) | st.dictionaries(st.text(), x))
)


@settings(max_examples=20)  # each waits for the disk
@given(values)
def test_json_reads_back_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, value) -> None:
    path = tmp_path_factory.getbasetemp() / "a.json"
    write_json(path, value)
    assert json.loads(path.read_text(encoding="utf-8")) == value


def test_json_has_null_and_a_word_for_what_is_not_finite(tmp_path: Path) -> None:
    nan, inf = float("nan"), float("inf")
    write_json(path := tmp_path / "a.json", {"a": nan, "b": {"c": [1.0, -inf]}, "d": inf, "e": 1})

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    assert json.loads(path.read_text(), parse_constant=refuse) == {
        "a": None,
        "b": {"c": [1.0, None]},
        "d": None,
        "e": 1,
        "not_finite": {"a": "nan", "b.c.1": "-inf", "d": "inf"},
    }
