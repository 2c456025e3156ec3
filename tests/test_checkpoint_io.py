"""Checkpoints on disk: written atomically, and refused when damaged."""

import contextlib
import errno
import io
import os
import re
import signal
import socket
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from conftest import LAST, QUICKSTART, RUN
from helpers import forked
from test_bad_input import error_of
from test_interrupt import LONGER, signalled, stop_code
from test_resume import assert_same

from hlbgpt.__main__ import main
from hlbgpt.runs import checkpoint_io
from hlbgpt.runs.checkpoint_io import AtomicCheckpointIO, load_checkpoint, require_matching_weights
from hlbgpt.utils.errors import InputError


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(
    hlbgpt, tiny: list[str], capfd
) -> None:
    """A limit on the size of files, which the system enforces as it would a full disk."""
    extra = signalled("SIGTERM", "on_train_batch_start", 5)
    assert stop_code(hlbgpt, "fit", *QUICKSTART, *tiny, *LONGER, *extra) == 143
    before = LAST.read_bytes()

    def main_on_small_disk(words: list[str]) -> None:
        import resource  # Windows has none

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        main(words)

    log = Path("log.txt")
    log.touch()
    assert forked(main_on_small_disk, ["fit", "--trust", "--ckpt_path", str(LAST)], log) == 2
    line = log.read_text().splitlines()[-1]
    assert line.startswith(f"hlbgpt: error: cannot write the checkpoint {LAST}: File too large; ")
    assert "; the previous checkpoint is kept; " in line
    assert "Traceback" not in log.read_text()
    assert LAST.read_bytes() == before
    assert [path.name for path in LAST.parent.iterdir()] == ["last.ckpt"]
    hlbgpt("fit", "--trust", "--ckpt_path", LAST)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO])
def test_a_failed_write_keeps_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    path, plugin = tmp_path / "checkpoints" / "last.ckpt", AtomicCheckpointIO()
    save = checkpoint_io._save

    def failing(contents: dict[str, Any], file: IO[bytes]) -> None:
        save(contents, file)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(checkpoint_io, "_save", failing)
    with pytest.raises(InputError, match=f"{re.escape(os.strerror(code))}; free some space"):
        plugin.save_checkpoint({"state_dict": {}}, path)
    monkeypatch.setattr(checkpoint_io, "_save", save)
    plugin.save_checkpoint({"state_dict": {}, "global_step": 2}, path)
    monkeypatch.setattr(checkpoint_io, "_save", failing)
    with pytest.raises(InputError, match="; the previous checkpoint is kept; "):
        plugin.save_checkpoint({"state_dict": {}, "global_step": 4}, path)
    assert load_checkpoint(path)["global_step"] == 2
    assert list(path.parent.iterdir()) == [path]


def test_torchs_own_error_for_a_full_disk_is_understood(tmp_path: Path) -> None:
    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "full")

    with pytest.raises(OSError, match="full"):
        checkpoint_io._save({"a": torch.zeros(9)}, Full())


def test_runs_that_cannot_be_written_to(hlbgpt, tiny: list[str], capfd) -> None:
    Path("runs").write_text("in the way")
    message = error_of(hlbgpt, capfd, "fit", *QUICKSTART, *tiny)
    assert "runs: cannot make 'runs/quickstart/version_0': Not a directory; run from" in message


def test_leftovers_of_a_killed_write_go_with_the_next(hlbgpt, tiny: list[str]) -> None:
    LAST.parent.mkdir(parents=True)
    hlbgpt("fit", *QUICKSTART, *tiny)
    last = RUN.parent / "version_1" / "checkpoints" / "last.ckpt"
    leftover = last.with_name(f".last.ckpt.{socket.gethostname()}.{2**22 + 1}.tmp")  # no such PID
    leftover.write_text("half a checkpoint")
    (last.parents[1] / "record.json").unlink()
    hlbgpt("fit", "--ckpt_path", last, "--trainer.max_steps=6")
    assert not leftover.exists()


def test_a_checkpoint_with_a_flipped_bit_is_refused(hlbgpt, tiny: list[str], capfd) -> None:
    hlbgpt("fit", *QUICKSTART, *tiny)
    data = bytearray(LAST.read_bytes())
    for offset in range(2000, len(data), 4001):
        flipped = bytearray(data)
        flipped[offset] ^= 16
        LAST.write_bytes(flipped)
        with contextlib.suppress(InputError):
            found = load_checkpoint(LAST)
            LAST.write_bytes(data)  # accepted: the bit is between the records, which hold all data
            assert_same(found, load_checkpoint(LAST))
    data[len(data) // 2] ^= 1
    LAST.write_bytes(data)
    assert "ckpt_path: " in error_of(hlbgpt, capfd, "validate", "--ckpt_path", str(LAST))


def test_torch_writes_what_we_read(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.arange(5)}}, tmp_path / "a.ckpt")
    assert load_checkpoint(tmp_path / "a.ckpt")["state_dict"]["a"].tolist() == [0, 1, 2, 3, 4]


class Code:
    """What a pickle may contain: a call of any function."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("made_by_code",)


@pytest.mark.parametrize("contents", [{"state_dict": {}, "a": Code()}, [1], {"a": 1}, b"", b"PK"])
def test_other_files_are_refused_and_their_code_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, contents: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.ckpt"
    if isinstance(contents, bytes):
        path.write_bytes(contents)
    else:
        torch.save(contents, path)
    with pytest.raises(InputError, match=r"^ckpt_path: .* is (incomplete|no checkpoint of hlbgpt)"):
        load_checkpoint(path)
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(InputError, match=r"ckpt_path: cannot read 'b.ckpt': No such file"):
        load_checkpoint("b.ckpt")


def test_weights_of_another_network_are_named() -> None:
    stored = {"state_dict": torch.nn.Linear(3, 2).state_dict()}
    require_matching_weights(torch.nn.Linear(3, 2), stored, "a.ckpt")
    with pytest.raises(InputError, match=r"weight is \(2, 3\) in the checkpoint and \(2, 4\) in"):
        require_matching_weights(torch.nn.Linear(4, 2), stored, "a.ckpt")
    with pytest.raises(InputError, match=r"a.ckpt .* bias is .* and missing in the network"):
        require_matching_weights(torch.nn.Linear(3, 2, bias=False), stored, "a.ckpt")
