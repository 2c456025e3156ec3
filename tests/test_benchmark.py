"""The benchmark runs what is asked for once, goes on where it stopped, and hides no failure."""

import contextlib
import csv
import json
import os
import shutil
import signal
import time
from pathlib import Path

import benchmark
import pytest
from benchmark_jobs import variants
from conftest import CONFIGS, QUICKSTART, TINY
from crash_test import curves, start

BROKEN = "broken: --data.sequence_length=999"
WIDE = "more windows: --data.micro_batch_size=8"


def begin(words: list[str], log: Path) -> int:
    # Errors go to the log, not to where pytest has sys.stderr write.
    with open(2, "w", buffering=1, closefd=False) as stderr, contextlib.redirect_stderr(stderr):
        return start(words, log.parent)


def forked(words: list[str], log: Path) -> int:
    """Stands in for `launch`: forked from this process, which spares a run its imports."""
    return os.waitstatus_to_exitcode(os.waitpid(begin(words, log), 0)[1])


def killed(words: list[str], log: Path) -> int:
    """Is killed as soon as there is a checkpoint."""
    child = begin(words, log)
    while not list(log.parent.glob("*/checkpoints/last.ckpt")):
        assert os.waitpid(child, os.WNOHANG) == (0, 0), log.read_text()
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def never(words: list[str], log: Path) -> int:
    raise AssertionError(f"run again: {words}")


@pytest.fixture(scope="module")
def small(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments behind `--` that make a run small."""
    cache = tmp_path_factory.mktemp("cache")
    source = ["--data.source=hlbgpt.data.TextFiles", f"--data.source.folder={folder}"]
    return ["--", *source, f"--data.cache_dir={cache}", *TINY, "--trainer.callbacks=[]"]


@pytest.fixture(scope="module")
def done(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path, list[str]]:
    """A benchmark of two variants and one that fails, over two seeds: exit code, --out, command."""
    out = tmp_path_factory.mktemp("benchmark")
    options = ["--seeds", "2", "--first-seed", "3", "--variant", WIDE, "--variant", BROKEN]
    command = [*QUICKSTART, "--out", str(out), *options, *small]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "launch", forked)
        code = benchmark.main(command)
    return code, out, command


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "results.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_variant_takes_its_turn_at_each_seed(done: tuple[int, Path, list[str]]) -> None:
    code, out, _ = done
    names = ["as is", "more windows", "broken"]
    assert code == 1  # one of them is broken
    assert [(row["variant"], row["seed"]) for row in rows(out)] == [
        (name, seed) for seed in "34" for name in names
    ]
    found = json.loads((out / "results.json").read_text())
    for row, run in zip(rows(out), found["runs"], strict=True):
        path = Path(run["folder"], "record.json")
        assert path.is_file() == (row["variant"] != "broken")
        if path.is_file():
            record = json.loads(path.read_text())
            assert run["record"] == record
            assert (float(row["value"]), record["seed"]) == (record["value"], int(row["seed"]))
            assert len(dict(curves(path.parent))["loss/val_loss"]) == 2
    assert found["comparisons"][0]["tokens_ratio"]["mean"] == 2  # windows twice as many


def test_a_failed_run_is_shown(done: tuple[int, Path, list[str]]) -> None:
    _, out, _ = done
    shown = (out / "results.md").read_text()
    assert "| 0 of 2 |" in shown
    reason = "exit code 2: hlbgpt: error: data.sequence_length: 999 is longer than the network's"
    for seed, row in zip("34", (r for r in rows(out) if r["variant"] == "broken"), strict=True):
        assert f"- broken, seed {seed}: {reason}" in shown
        assert row["error"].startswith(reason)


def test_what_is_done_is_not_run_again(
    done: tuple[int, Path, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    _, out, command = done
    before = (out / "results.json").read_text()
    monkeypatch.setattr(benchmark, "launch", never)
    without = [word for word in command if word not in (BROKEN, "--variant", WIDE)]
    at = without.index("--")
    command = [*without[:at], "--variant", WIDE, *without[at:]]
    assert benchmark.main(command) == 0
    assert capsys.readouterr().out.count("kept: val_loss") == 4
    after = json.loads((out / "results.json").read_text())
    assert after["variants"] == json.loads(before)["variants"][:2]
    # Other settings under the same name are another run, and so is another text of the config.
    assert benchmark.main([*command, "--trainer.max_steps=3"]) == 2
    assert "as_is/seed_3 holds a run with other arguments" in capsys.readouterr().err


def test_another_text_of_the_config_is_another_run(tmp_path: Path, small: list[str]) -> None:
    config = tmp_path / "quickstart.yaml"
    shutil.copy(CONFIGS / "quickstart.yaml", config)
    options, common = benchmark.parse(["--config", str(config), "--out", str(tmp_path)], "")
    job = benchmark.jobs(options, common)[0]
    (job.run_folder).mkdir(parents=True)
    (job.run_folder / "record.json").touch()
    job.note(resumed=0)
    benchmark.require_same_as_before(job)
    config.write_text(config.read_text().replace("0.95", "0.96"))
    with pytest.raises(benchmark.InputError, match="another text of its config"):
        benchmark.require_same_as_before(job)


def test_a_run_cut_short_goes_on(
    done: tuple[int, Path, list[str]],
    small: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = [*QUICKSTART, "--out", str(tmp_path), "--seeds", "1", "--first-seed", "3", *small]
    monkeypatch.setattr(benchmark, "launch", killed)
    assert benchmark.main(command) == 1
    assert rows(tmp_path)[0]["error"].startswith("killed by SIGKILL")
    monkeypatch.setattr(benchmark, "launch", forked)
    assert benchmark.main(command) == 0
    (row,), (whole, *_) = rows(tmp_path), rows(done[1])
    assert (row["value"], row["tokens"]) == (whole["value"], whole["tokens"])
    assert row["resumed"] == "1"
    assert "1 runs were cut short and resumed." in (tmp_path / "results.md").read_text()
    assert curves(Path(row["folder"])) == curves(Path(whole["folder"]))


def test_runs_are_processes_of_their_own(
    tmp_path: Path,
    small: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With nothing stood in for, and paths from the current folder."""
    monkeypatch.chdir(tmp_path)
    assert benchmark.main([*QUICKSTART, "--seeds", "1", *small]) == 0
    out = capsys.readouterr().out
    shown = Path("runs/benchmark/results.md").read_text()
    assert shown in out
    assert "[1 of 1] as is, seed 0: val_loss " in out
    assert f"python scripts/benchmark.py {QUICKSTART[0]}" in shown
    assert "target NOT met" in Path("runs/benchmark/quickstart/as_is/seed_0/log.txt").read_text()


def test_two_benchmarks_keep_out_of_one_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "launch", never)
    with benchmark.locked(tmp_path, wait=False):
        assert benchmark.main([*QUICKSTART, "--out", str(tmp_path)]) == 2
    assert "--out: another benchmark is running in" in capsys.readouterr().err


# --- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "--config: none given"),
        (["--config", "nope.yaml"], "--config: no file 'nope.yaml'"),
        (["--config", __file__], "--config"),
        ([*QUICKSTART, *QUICKSTART], "--config: two files are called 'quickstart'"),
        ([*QUICKSTART, "--seeds", "0"], "--seeds: 0 is less than 1"),
        ([*QUICKSTART, "--seeds", "many"], "--seeds: invalid int value: 'many'"),
        ([*QUICKSTART, "--first-seed=-1"], "--first-seed: -1 is less than 0"),
        ([*QUICKSTART, "--variant", "--model.compile=false"], "--variant: expected one argument"),
        ([*QUICKSTART, "--variant", ": --a 1"], "--variant: no name in ': --a 1'"),
        ([*QUICKSTART, "--variant", "../x: --a 1"], "--variant: no name in '../x: --a 1'"),
        ([*QUICKSTART, "--variant", "x:"], "--variant: 'x' has no arguments"),
        ([*QUICKSTART, "--variant", "x: '"], "--variant 'x': cannot read"),
        ([*QUICKSTART, "--variant", "as is: --a 1"], "--variant: the name 'as is' is the config"),
        (
            [*QUICKSTART, "--variant", "x: --a 1", "--variant", "X: --a 2"],
            "--variant: the name 'X' is there twice",
        ),
        ([*QUICKSTART, "--variant", "x: --seed_everything=3"], "--variant 'x': --seed_everything"),
        ([*QUICKSTART, "--", "--trainer.logger=false"], "--: --trainer.logger is set by the"),
        ([*QUICKSTART, "--trainer.max_steps=4"], "arguments of hlbgpt go behind --"),
        ([*QUICKSTART, "--out", f"{__file__}/x"], "--out: "),
    ],
)
def test_bad_input(
    options: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark, "launch", never)
    assert benchmark.main(options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("benchmark: error: ")
    assert expected in line
    assert not list(tmp_path.iterdir())


def test_variants_are_split_as_a_shell_does() -> None:
    assert variants(["b=2: --data.prompts '[\"a b\"]' --x=1"]) == {
        "as is": [],
        "b=2": ["--data.prompts", '["a b"]', "--x=1"],
    }


@pytest.mark.parametrize(
    ("log", "code", "expected"),
    [
        ("fine\n", 0, None),
        ("", 3, "exit code 3"),
        ("\nlast words\n\n", 1, "exit code 1: last words"),
        (
            "torch.OutOfMemoryError: CUDA\nSet X for more\n",
            1,
            "exit code 1: torch.OutOfMemoryError: CUDA",
        ),
        ("step 3\n", -9, "killed by SIGKILL: step 3"),
    ],
)
def test_last_words(log: str, code: int, expected: str | None) -> None:
    assert benchmark.error_in(log, code) == expected
