"""What a benchmark finds in its folder and in its arguments ends in one line, or does no harm."""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import CONFIGS, QUICKSTART
from test_read_record import BROKEN, changed, write_record

pytest.importorskip("scipy")
import benchmark
import jobs

from hlbgpt.cli.main import build
from hlbgpt.utils.files import locked

SEED_0 = Path("out/quickstart/as_is/seed_0")
OUT = [*QUICKSTART, "--out", "out", "--seeds", "1"]


def writes_record(words: list[str], log: Path, **fields: Any) -> int:
    """Replaces `launch`: a run whose record has these fields."""
    (seed,) = [int(word.partition("=")[2]) for word in words if "--seed_everything" in word]
    write_record(log.parent, seed=seed, **{"value": 3.5 + 0.1 * seed, **fields})
    return 0


def never(words: list[str], log: Path) -> int:
    """Replaces `launch` where nothing may run."""
    raise AssertionError(f"run: {words}")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark, "launch", never)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("benchmark.py: error: ")
    return line


# --- configs that are edited meanwhile ------------------------------------------------------------


def named_configs() -> list[str]:
    """Options that name config files in every way, of which one names another."""
    Path("more").mkdir()
    shutil.copy(CONFIGS / "quickstart.yaml", "mine.yaml")
    Path("first.yaml").write_text("trainer: more/inner.yaml\n")
    Path("more/inner.yaml").write_text("max_steps: 11\n")
    Path("second.yaml").write_text("seed_everything: 1\n")
    Path("trainer.yaml").write_text("max_steps: 12\n")
    variants = ["a: --config=first.yaml", "b: --config second.yaml --trainer trainer.yaml"]
    return ["--config", "mine.yaml", *(word for v in variants for word in ("--variant", v))]


def read_copies(words: list[str]) -> list[str]:
    paths = [word.rpartition("=")[2] for word in words if word.endswith(".yaml")]
    return [Path(path).read_text() for path in paths]


def test_a_config_that_is_edited_meanwhile_reaches_no_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = named_configs()
    ran: list[list[str]] = []

    def edited(words: list[str], log: Path) -> int:
        texts = read_copies(words)
        if "a/" in str(log):  # the file that first.yaml names, beside it
            (first,) = [word.partition("=")[2] for word in words if word.startswith("--config=")]
            texts.append(Path(first).with_name("more").joinpath("inner.yaml").read_text())
        ran.append(texts)
        for path in [*Path().glob("*.yaml"), Path("more/inner.yaml")]:
            path.write_text("edited: true\n")
        return writes_record(words, log)

    monkeypatch.setattr(benchmark, "launch", edited)
    assert benchmark.main([*options, "--out", "out", "--seeds", "2"]) == 0
    assert [len(texts) for texts in ran] == [1, 3, 3] * 2
    assert ran[:3] == ran[3:]
    assert not any("edited" in text for texts in ran for text in texts)
    assert benchmark.main([*options, "--out", "out", "--seeds", "2"]) == 2  # another benchmark


def test_a_copy_is_parsed_as_its_file_is(tmp_path: Path) -> None:
    options, common = benchmark.parse([*named_configs(), "--out", "out", "--seeds", "1"])
    for job in benchmark.make_jobs(options, common):
        words = jobs.copy_configs(job.words, job.texts, job.folder)
        assert words != job.words
        built = [build(each, device="meta").config.trainer for each in (words, job.words)]
        steps = {"as_is": 2000, "a": 11, "b": 12}[job.folder.parent.name]
        assert [trainer.max_steps for trainer in built] == [steps, steps]


# --- folders ----------------------------------------------------------------------------------


def holding(path: Path) -> Callable[[], Any]:
    """Holds the lock of a run's folder, as a run that trains does."""
    path.mkdir(parents=True)
    lock = locked(path, wait=False)
    assert lock.__enter__()
    return lambda: lock.__exit__(None, None, None)


def logging(path: Path) -> Callable[[], Any]:
    """Has the log of a run open, as a run that imports modules does."""
    path.mkdir(parents=True)
    file = (path / "output.log").open("ab")
    fcntl.flock(file, fcntl.LOCK_EX)
    return file.close


@pytest.mark.parametrize("hold", [holding, logging])
def test_a_run_that_another_process_holds_is_left_alone(
    hold: Callable[[Path], Callable[[], Any]], capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = hold(SEED_0)
    (job,) = benchmark.make_jobs(*benchmark.parse(OUT))
    (SEED_0 / "inputs.json").write_text(job.inputs())
    (SEED_0 / "precious").write_text("kept")
    try:
        assert benchmark.main(OUT) == 2
        assert f"the run in {SEED_0} is still going on in another process" in one_line(capsys)
        with pytest.raises(benchmark.InputError, match="still going on"):
            benchmark.start(job)  # also if it began after the benchmark has
    finally:
        release()
    assert (SEED_0 / "precious").read_text() == "kept"
    monkeypatch.setattr(benchmark, "launch", writes_record)
    assert benchmark.main(OUT) == 0


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks into /proc")
def test_a_process_holds_its_log_until_it_ends() -> None:
    child = os.fork()
    if child == 0:  # a benchmark that dies while its run sleeps
        program = ["-c", "import time; print('here', flush=True); time.sleep(60)"]
        jobs._LIBC = None
        Path("run").mkdir()
        os.chdir("run")
        try:
            jobs.launch([], Path("output.log"), program=program)
        finally:
            os._exit(1)
    log = Path("run/output.log")
    while not (log.exists() and log.read_text()):
        time.sleep(0.01)
    (run,) = map(int, Path(f"/proc/{child}/task/{child}/children").read_text().split())
    os.kill(child, 9)
    os.waitpid(child, 0)
    with pytest.raises(jobs.InputError, match="still going on"):
        jobs.require_idle(Path("run"))
    os.kill(run, 9)
    end = time.monotonic() + 30
    while time.monotonic() < end:
        try:
            return jobs.require_idle(Path("run"))
        except jobs.InputError:
            time.sleep(0.01)
    raise AssertionError("still held")


@pytest.mark.skipif(jobs._LIBC is None, reason="Linux only")
def test_a_child_ends_with_its_parent() -> None:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        program = f"import os, time; os.write({write}, b'%d' % os.getpid()); time.sleep(60)"
        try:
            os.set_inheritable(write, True)
            jobs.subprocess.Popen(
                [jobs.sys.executable, "-c", program],
                close_fds=False,
                preexec_fn=jobs.ending_with_me(),
            )
            time.sleep(60)
        finally:
            os._exit(1)
    os.close(write)
    assert int(os.read(read, 20)) > 0  # it runs
    os.kill(child, 9)
    os.waitpid(child, 0)
    assert os.read(read, 20) == b""  # the last one to write there has ended
    os.close(read)


def test_a_child_whose_parent_has_died_already_does_not_start() -> None:
    child = os.fork()
    if child == 0:
        jobs.os.getppid = lambda: 1  # as after the death of the parent
        end_with_parent = jobs.ending_with_me()
        jobs.os.getpid = lambda: 2
        try:
            if end_with_parent:
                end_with_parent()
        finally:
            os._exit(0 if end_with_parent else 143)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143


def foreign(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("years of work")


def run_without_inputs(folder: Path) -> None:
    write_record(folder)


def broken_inputs(folder: Path) -> None:
    write_record(folder)
    (folder / "inputs.json").write_bytes(b"\xff\xfe{")


def a_file(folder: Path) -> None:
    folder.parent.mkdir(parents=True)
    folder.write_text("")


FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "files of a user": (foreign, "holds files that no benchmark has made"),
    "a run without inputs.json": (run_without_inputs, "holds files that no benchmark has made"),
    "broken inputs.json": (broken_inputs, "holds a run with other arguments"),
    "a file": (a_file, "File exists"),
}


@pytest.mark.parametrize(("make", "message"), FOLDERS.values(), ids=FOLDERS)
def test_folders_that_are_not_of_this_benchmark(make, message: str, capsys) -> None:
    make(SEED_0)
    before = {p: p.read_bytes() for p in Path("out").rglob("*") if p.is_file()}
    assert benchmark.main(OUT) == 2
    line = one_line(capsys)
    assert message in line
    assert str(SEED_0) in line
    after = {p: p.read_bytes() for p in Path("out").rglob("*") if p.is_file()}
    after.pop(Path("out/.lock"))
    assert after == before


def test_an_empty_folder_is_of_a_start_that_was_cut_short(monkeypatch) -> None:
    SEED_0.mkdir(parents=True)
    (SEED_0 / ".inputs.json.77.tmp").write_text("{")
    monkeypatch.setattr(benchmark, "launch", writes_record)
    assert benchmark.main(OUT) == 0


# --- records ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_record_is_named_before_anything_runs(
    text: str | bytes, message: str, capsys
) -> None:
    *_, last = benchmark.make_jobs(*benchmark.parse([*OUT, "--seeds", "3"]))
    last.folder.mkdir(parents=True)
    (last.folder / "inputs.json").write_text(last.inputs())
    content = text.encode() if isinstance(text, str) else text
    (last.folder / "record.json").write_bytes(content)
    assert benchmark.main([*OUT, "--seeds", "3"]) == 2
    assert one_line(capsys).startswith(f"benchmark.py: error: {last.folder}/record.json: ")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"value": float("nan")}, "the final val_loss is nan"),
        ({"value": float("inf")}, "the final val_loss is inf"),
        ({"value": None, "validation": None}, "it ended without a validation"),
    ],
)
def test_a_run_without_a_final_value_has_failed(fields, message, monkeypatch, capsys) -> None:
    monkeypatch.setattr(benchmark, "launch", lambda *words: writes_record(*words, **fields))
    assert benchmark.main(OUT) == 1
    assert f"FAILED, {message}\n" in capsys.readouterr().out
    assert json.loads(Path("out/results.json").read_text())["runs"][0]["error"] == message


def test_runs_measured_otherwise_are_left_out_in_all_tables(monkeypatch, capsys) -> None:
    def measured(words: list[str], log: Path) -> int:
        other = {"monitor": "val_accuracy", "mode": "max", "value": 0.4} if "--x" in words else {}
        return writes_record(words, log, **other)

    monkeypatch.setattr(benchmark, "launch", measured)
    assert benchmark.main([*OUT, "--variant", "accuracy: --x"]) == 0
    reason = "monitor: val_loss, val_accuracy; mode: min, max"
    (comparison,) = json.loads(Path("out/results.json").read_text())["comparisons"]
    assert comparison["left_out"] == reason
    for shown in (capsys.readouterr().out, Path("out/results.md").read_text()):
        assert "quickstart, accuracy: not compared, because they were not measured" in shown
        assert reason in shown


# --- arguments and disks ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([*QUICKSTART, "--", "--config", "gone.yaml"], "--config: no file 'gone.yaml'"),
        ([*QUICKSTART, "--variant", "x: --config=gone.yaml"], "--config: no file 'gone.yaml'"),
        (["--config", "...yaml"], "--config: '..' can be no folder's name"),
        (["--config", "a\nb.yaml"], "can be no folder's name"),
        (["--config", "a.yaml", "--config", "A.yaml"], "two files have the same name"),
        ([*QUICKSTART, "--variant", "x\ny: --a"], "is not 'NAME: ARGUMENTS'"),
        ([*QUICKSTART, "--variant", f"{'x' * 300}: --a"], "xx' can be no folder's name"),
        ([*QUICKSTART, "--seeds", "-1"], "--seeds: -1 is not between"),
        ([*QUICKSTART, "--out", "a.yaml"], "--out: cannot make the folder a.yaml: File exists"),
        ([*QUICKSTART, "--out", "a.yaml/x"], "cannot make the folder a.yaml/x: Not a directory"),
        ([*QUICKSTART, "--out", "/proc/x"], "--out: cannot make the folder /proc/x: "),
    ],
)
def test_odd_arguments(options: list[str], message: str, capsys) -> None:
    for name in ("...yaml", "a\nb.yaml", "a.yaml", "A.yaml"):
        Path(name).write_text("{}")
    began = time.monotonic()
    assert benchmark.main(options) == 2
    assert message in one_line(capsys)
    assert time.monotonic() - began < 5


def test_names_with_odd_characters(monkeypatch) -> None:
    monkeypatch.setattr(benchmark, "launch", writes_record)
    Path("a[1] | *ü😀$.yaml").write_text("{}")
    options = ["--config", "a[1] | *ü😀$.yaml", "--variant", "Größe +=.- 2: --x", "--out", "o[1]"]
    assert benchmark.main([*options, "--seeds", "2"]) == 0
    rows = [x for x in Path("o[1]/results.md").read_text().splitlines() if x.startswith("| a")]
    assert len(rows) == 3
    monkeypatch.setattr(benchmark, "launch", never)
    assert benchmark.main([*options, "--seeds", "2"]) == 0  # found again


def test_a_config_that_is_not_utf_8_is_copied_as_it_is(monkeypatch) -> None:
    monkeypatch.setattr(benchmark, "launch", writes_record)
    Path("latin.yaml").write_bytes(b"name: \xe9\r\n")
    assert benchmark.main(["--config", "latin.yaml", "--out", "out", "--seeds", "1"]) == 0
    (copy,) = Path("out").rglob("configs/**/latin.yaml")
    assert copy.read_bytes() == b"name: \xe9\r\n"


def test_a_full_disk(monkeypatch, capsys) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(benchmark, "launch", writes_record)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "write_json", full)
        assert benchmark.main(OUT) == 2
    assert "No space left on device" in one_line(capsys)
    Path("out/results.json").write_text('{"runs": [')  # as if cut short
    assert benchmark.main(OUT) == 0
    assert json.loads(Path("out/results.json").read_text())["runs"][0]["record"] == changed(
        value=3.5
    )
