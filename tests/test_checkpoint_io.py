"""Checkpoints on disk: whole or not there at all, and refused when damaged."""

import contextlib
import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LAST, QUICKSTART, RUN
from test_bad_input import error_of
from test_interrupt import LONGER, signalled, stop_code
from test_resume import assert_same

import hlbgpt.runs.checkpoint as checkpoint_io
from hlbgpt.runs.checkpoint import load_checkpoint
from hlbgpt.utils.errors import InputError


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(
    hlbgpt, tiny: list[str], capfd
) -> None:
    """A limit on the size of files, which the system enforces as it would a full disk."""
    extra = signalled("SIGTERM", "on_train_batch_start", 5)
    assert stop_code(hlbgpt, "fit", *QUICKSTART, *tiny, *LONGER, *extra) == 143
    before = LAST.read_bytes()
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); "
        "from hlbgpt.cli.main import main; main()"
    )
    command = [sys.executable, "-c", code, "fit", "--ckpt_path", str(LAST)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"hlbgpt: error: cannot write the checkpoint {LAST}: File too large; ")
    assert "still holds the one before" in line
    assert "Traceback" not in done.stderr
    assert LAST.read_bytes() == before
    assert [path.name for path in LAST.parent.iterdir()] == ["last.ckpt"]
    hlbgpt("fit", "--ckpt_path", LAST)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO])
def test_a_disk_that_fails_while_writing(
    hlbgpt, tiny, capfd, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    write, calls = checkpoint_io._write, []

    def failing(checkpoint: dict[str, Any], path: Path) -> None:
        write(checkpoint, path)
        calls.append(path)
        if len(calls) == 2:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(checkpoint_io, "_write", failing)
    with pytest.raises(SystemExit) as stop:
        hlbgpt("fit", *QUICKSTART, *tiny)
    assert stop.value.code == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert f"cannot write the checkpoint {LAST}: {os.strerror(code)}; " in line
    assert load_checkpoint(LAST)["global_step"] == 2
    assert [path.name for path in LAST.parent.iterdir()] == ["last.ckpt"]


def test_runs_that_cannot_be_written_to(hlbgpt, tiny: list[str], capfd) -> None:
    Path("runs").write_text("in the way")
    message = error_of(hlbgpt, capfd, "fit", *QUICKSTART, *tiny)
    assert "runs: cannot make 'runs/quickstart/version_0': Not a directory; run from" in message


def test_leftovers_of_a_killed_write_go_with_the_next(hlbgpt, tiny: list[str]) -> None:
    LAST.parent.mkdir(parents=True)
    hlbgpt("fit", *QUICKSTART, *tiny)
    last = RUN.parent / "version_1" / "checkpoints" / "last.ckpt"
    leftover = last.with_name(".last.ckpt.123.tmp")
    leftover.write_text("half a checkpoint")
    (last.parents[1] / "record.json").unlink()
    hlbgpt("fit", "--ckpt_path", last, "--trainer.max_steps=6")
    assert not leftover.exists()


def test_a_checkpoint_with_a_flipped_bit_is_refused(hlbgpt, tiny: list[str], capfd) -> None:
    hlbgpt("fit", *QUICKSTART, *tiny)
    data = bytearray(LAST.read_bytes())
    for place in range(2000, len(data), 4001):
        flipped = bytearray(data)
        flipped[place] ^= 16
        LAST.write_bytes(flipped)
        with contextlib.suppress(InputError):
            checkpoint = load_checkpoint(LAST)
            LAST.write_bytes(data)  # not refused: a bit between the records, where nothing is kept
            assert_same(checkpoint, load_checkpoint(LAST))
    data[len(data) // 2] ^= 1
    LAST.write_bytes(data)
    assert "ckpt_path: " in error_of(hlbgpt, capfd, "validate", "--ckpt_path", str(LAST))


def test_torch_writes_what_we_read(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.arange(5)}}, tmp_path / "a.ckpt")
    assert load_checkpoint(tmp_path / "a.ckpt")["state_dict"]["a"].tolist() == [0, 1, 2, 3, 4]
