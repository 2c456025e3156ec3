"""Whatever is printed, drawn, logged or stopped: a run that ended has its record."""

import contextlib
import io
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from conftest import CONFIGS, LAST, QUICKSTART, RUN, TINY
from helpers import fit, forked, read_record
from lightning.pytorch.loggers import CSVLogger
from test_command import closed_pipe, full_disk, gone_terminal
from test_interrupt import signalled, stop_code

from hlbgpt import fit as fit_from_python
from hlbgpt.__main__ import main
from hlbgpt.callbacks import LastCheckpoint, TimeToTarget
from hlbgpt.cli import save_config
from hlbgpt.runs import load_checkpoint
from hlbgpt.runs.folder import claim_folder, remove_unused_folder
from hlbgpt.utils.errors import DivergedError, InputError

STEPS = ["--trainer.max_steps=2", "--trainer.num_sanity_val_steps=0"]


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of a small run; its tokens are cached."""
    cache = tmp_path_factory.mktemp("cache")
    source = ["--data.source=hlbgpt.data.TextFiles", f"--data.source.folder={folder}"]
    return [*source, f"--data.cache_dir={cache}", *TINY, *STEPS]


@pytest.fixture(scope="module")
def trained(run: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a small run."""
    where = tmp_path_factory.mktemp("trained")
    main(["fit", *QUICKSTART, *run, f"--trainer.default_root_dir={where}"])
    return where / "checkpoints" / "last.ckpt"


# --- output -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stdout", "code", "line"),
    [
        (closed_pipe, 141, ""),
        (full_disk, 2, "hlbgpt: error: cannot write to stdout: No space left on device\n"),
        (gone_terminal, 2, "hlbgpt: error: cannot write to stdout: Input/output error\n"),
        (lambda: None, 2, "hlbgpt: error: cannot write to stdout: Bad file descriptor\n"),
    ],
    ids=["pipe", "disk", "terminal", "closed"],
)
@pytest.mark.parametrize("command", ["fit", "predict"])
def test_lost_output_costs_no_record_and_ends_other_commands(
    hlbgpt,
    run: list[str],
    trained: Path,
    capfd,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    stdout: Callable[[], Any],
    code: int,
    line: str,
) -> None:
    prompt = ["predict", "--ckpt_path", str(trained), "--data.prompts=the"]
    monkeypatch.setattr(sys, "stdout", stdout())
    words = prompt if command == "predict" else ["fit", *QUICKSTART, *run]
    assert stop_code(hlbgpt, *words) == code
    err = capfd.readouterr().err
    assert err.endswith(line)
    assert "error" not in err.removesuffix(line)
    if command == "fit":
        assert read_record(RUN)["step"] == load_checkpoint(LAST)["global_step"] == 2


def test_the_bar_of_a_terminal_that_is_gone(
    hlbgpt, run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stdout = gone_terminal()
    monkeypatch.setattr(stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdout", stdout)
    assert stop_code(hlbgpt, "fit", *QUICKSTART, *run) == 2
    assert read_record(RUN)["step"] == 2


def test_a_run_from_python_leaves_stdout_alone(
    run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdout", stdout := closed_pipe())
    settings = dict(word.removeprefix("--").split("=", 1) for word in run)
    result = fit_from_python(CONFIGS / "quickstart.yaml", settings)
    assert result.record["step"] == 2
    assert sys.stdout is stdout
    with pytest.raises(BrokenPipeError):
        stdout.close()


@pytest.mark.parametrize("command", ["fit", "validate", "predict"])
def test_text_that_stdout_cannot_encode(
    hlbgpt, run: list[str], trained: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    samples = ["--trainer.callbacks+=hlbgpt.callbacks.Samples", "--trainer.callbacks.prompts=thé"]
    words = [*QUICKSTART, *run, *samples]
    if command != "fit":
        words = ["--ckpt_path", str(trained), "--data.prompts=thé"]
    printed = io.BytesIO()
    stdout = io.TextIOWrapper(printed, encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", stdout)
    hlbgpt(command, *words)
    text = printed.getvalue().decode("ascii")
    assert ("val_loss" if command == "validate" else "th?") in text
    assert (command == "fit") == (RUN / "record.json").is_file()


# --- the record -------------------------------------------------------------------------------


class Raises(L.Callback):
    """Raises an error in a hook, in the last step."""

    def __init__(self, hook: str, error: BaseException) -> None:
        def raise_error(trainer: L.Trainer, *_: Any, **__: Any) -> None:
            if trainer.global_step == 2:
                raise error

        setattr(self, hook, raise_error)


class BrokenLogger(CSVLogger):
    """Cannot take the result, as if its server were away."""

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if any(name.startswith("time_to_target") for name in metrics):
            raise ConnectionError("no server")


@pytest.mark.parametrize("target", [9.0, 0.1], ids=["met", "not met"])
@pytest.mark.parametrize(
    ("hook", "error", "has_record"),
    [
        ("on_train_end", ValueError("drawing"), True),
        ("on_fit_end", OSError("printing"), True),
        ("on_fit_end", SystemExit(143), True),
        ("teardown", KeyError("cleaning"), True),
        ("on_validation_end", ValueError("before the last checkpoint"), False),
        ("on_train_epoch_end", ValueError("before the last checkpoint"), False),
        ("on_save_checkpoint", OSError("in the last checkpoint"), False),
        ("on_train_end", DivergedError("diverged"), False),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_the_error_of_another_callback_costs_no_record(
    folder: Path, tmp_path: Path, hook: str, error: Exception, has_record: bool, target: float
) -> None:
    """Once the last checkpoint is saved; before that the run can be resumed."""
    callbacks = Raises(hook, error), TimeToTarget(target=target), LastCheckpoint()
    with pytest.raises(type(error)):
        fit(folder, tmp_path, *callbacks, max_steps=2, num_sanity_val_steps=0)
    assert (tmp_path / "record.json").exists() == has_record
    if has_record:
        record = read_record(tmp_path)
        assert (record["step"], record["reached"]) == (2, target == 9)
        assert record["value"] is not None
        assert load_checkpoint(tmp_path / "checkpoints/last.ckpt")["global_step"] == 2


def test_a_later_error_does_not_write_an_earlier_record(folder: Path, tmp_path: Path) -> None:
    """A callback that fits once more may meet the folder of another run."""
    clock = TimeToTarget(target=9)
    other = tmp_path / "other"
    for place in (tmp_path / "first", other):
        fit(folder, tmp_path, clock, max_steps=2, default_root_dir=place)
    before = (other / "record.json").read_bytes()
    with pytest.raises(InputError, match="holds another run"):
        fit(folder, tmp_path, clock, max_steps=3, default_root_dir=other)
    assert (other / "record.json").read_bytes() == before


def test_a_logger_that_cannot_take_the_result_costs_no_record(folder: Path, tmp_path: Path) -> None:
    logger = BrokenLogger(tmp_path / "csv")
    with pytest.raises(ConnectionError):
        fit(folder, tmp_path, TimeToTarget(target=9), LastCheckpoint(), max_steps=2, logger=logger)
    assert read_record(tmp_path)["reached"]


def test_a_disk_that_fills_between_checkpoints(
    hlbgpt, run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, and no traceback of the thread in which TensorBoard writes."""
    Path("mine.py").write_text(
        "import resource, time\nfrom pathlib import Path\nimport lightning as L\n\n"
        "class Fill(L.Callback):\n    def on_train_batch_start(self, trainer, *_):\n"
        "        if trainer.global_step == 3:\n"
        "            size = next(Path('runs').rglob('events*')).stat().st_size\n"
        "            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))\n"
        "        time.sleep(0.01)\n"
    )
    words = [*run, "--trainer.max_steps=50", "--trainer.callbacks+=mine.Fill"]
    words += ["--trainer.logger=hlbgpt.runs.RunLogger", "--trainer.logger.flush_secs=0"]
    (log := tmp_path / "log.txt").touch()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # Python's own way, but pytest may change it
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(words: list[str]) -> None:
        threading.excepthook = threading.__excepthook__  # instead of pytest's
        main(words)

    assert forked(limited, ["fit", *QUICKSTART, *words], log) == 2
    assert resource.getrlimit(resource.RLIMIT_FSIZE) == before
    text = log.read_text()
    assert "Traceback" not in text
    assert [line for line in text.splitlines() if "rror" in line] == [text.splitlines()[-1]]
    assert text.splitlines()[-1].startswith("hlbgpt: error: [Errno 27] File too large")
    assert not (RUN / "record.json").exists()


# --- signals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "hook", "name"),
    [
        ("validate", "on_validation_batch_end", "SIGTERM"),
        ("test", "on_test_batch_start", "SIGHUP"),
        ("predict", "on_predict_batch_start", "SIGTERM"),
        ("predict", "on_predict_start", "SIGINT"),
    ],
)
def test_a_signal_stops_other_commands_at_once(
    hlbgpt, trained: Path, capfd, command: str, hook: str, name: str
) -> None:
    words = ["--ckpt_path", str(trained), "--data.prompts=the", *signalled(name, hook, 1)]
    code = stop_code(hlbgpt, command, *words)
    assert code == 128 + getattr(signal, name)
    captured = capfd.readouterr()
    assert captured.err.splitlines()[-1] == f"hlbgpt: stopped by {name}"
    assert captured.err.count("stopped") == captured.err.count("SIG") == 1
    assert "Traceback" not in captured.err
    assert "loss" not in captured.out


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("where", ["parsing", "on_fit_start", "on_train_start"])
def test_a_signal_during_set_up_leaves_no_folder(
    hlbgpt, run: list[str], capfd, monkeypatch: pytest.MonkeyPatch, where: str, name: str
) -> None:
    extra = signalled(name, where, 1)
    if where == "parsing":
        with Path("mine.py").open("a") as file:
            file.write(f"\n\nos.kill(os.getpid(), signal.{name})\n")
    if where == "on_train_start":  # as late as can be, when the settings are logged
        extra = []
        monkeypatch.setattr(
            save_config, "hparams", lambda _: os.kill(os.getpid(), getattr(signal, name))
        )
    assert stop_code(hlbgpt, "fit", *QUICKSTART, *run, *extra) == 128 + getattr(signal, name)
    captured = capfd.readouterr()
    told = [line for line in (captured.out + captured.err).splitlines() if name in line]
    assert told == [f"hlbgpt: stopped by {name}"]
    assert not Path("runs").exists()


def test_an_unused_folder_goes_even_while_a_thread_writes_into_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As TensorBoard's does, which opens its file anew for each write."""
    monkeypatch.delenv("HLBGPT_DECISIONS", raising=False)
    done = threading.Event()

    def write() -> None:
        while not done.is_set():
            with contextlib.suppress(FileNotFoundError):
                (tmp_path / "runs/mine/version_0/events").open("ab").close()

    writers = [threading.Thread(target=write) for _ in range(4)]
    for writer in writers:
        writer.start()
    try:
        for _ in range(50):
            claim_folder(tmp_path / "runs/mine")
            remove_unused_folder()
            assert not (tmp_path / "runs").exists()
    finally:
        done.set()
        for writer in writers:
            writer.join()


def test_sighup_is_ignored_under_nohup(hlbgpt, run: list[str]) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        hlbgpt("fit", *QUICKSTART, *run, *signalled("SIGHUP", "on_train_batch_start", 1))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert read_record(RUN)["step"] == 2


# --- memory -----------------------------------------------------------------------------------


def test_out_of_memory_is_one_line(hlbgpt, run: list[str], capfd) -> None:
    code = "import lightning as L, torch\n\nclass Big(L.Callback):\n"
    Path("mine.py").write_text(
        f"{code}    def on_train_start(self, *_):\n        torch.empty(10**14)\n"
    )
    words = [*run, "--trainer.callbacks+=mine.Big"]
    assert stop_code(hlbgpt, "fit", *QUICKSTART, *words) == 2
    assert "hlbgpt: error: out of memory (tried to allocate 4" in capfd.readouterr().err


def test_out_of_memory_in_an_optimizer_is_one_line(
    hlbgpt, run: list[str], capfd, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if it were torch's own code.
    code = {"__name__": "torch.optim.adamw", "empty": torch.empty}
    monkeypatch.setattr(torch.optim.AdamW, "_init_group", eval("lambda *_: empty(10**14)", code))
    assert stop_code(hlbgpt, "fit", *QUICKSTART, *run) == 2
    assert "hlbgpt: error: out of memory (tried to allocate 4" in capfd.readouterr().err
