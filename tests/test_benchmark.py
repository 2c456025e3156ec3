"""The benchmark does each run once, resumes what was interrupted, and shows every failure."""

import csv
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from conftest import CONFIGS, QUICKSTART, TINY

pytest.importorskip("scipy")
import benchmark

from hlbgpt.cli.main import main as hlbgpt

BROKEN = "broken: --data.sequence_length=999"
WIDE = "more windows: --data.micro_batch_size=8"


def forked(words: list[str], log: Path) -> int:
    """Replaces `launch`: forks this process, so that a run need not import torch again."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            file = os.open(log, os.O_WRONLY | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
            sys.argv = ["hlbgpt"]
            hlbgpt(words)
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def interrupted(words: list[str], log: Path) -> int:
    """Replaces `launch`: leaves a run that was killed just before it wrote its record."""
    assert forked(words, log) == 0, log.read_text()
    (log.with_suffix("") / "record.json").unlink()
    return -9


def never(words: list[str], log: Path) -> int:
    """Replaces `launch` where nothing may run."""
    raise AssertionError(f"run again: {words}")


@pytest.fixture(scope="module")
def small(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments after `--` that make a run small."""
    cache = tmp_path_factory.mktemp("cache")
    source = ["--data.source=hlbgpt.data.TextFiles", f"--data.source.folder={folder}"]
    return ["--", *source, f"--data.cache_dir={cache}", *TINY, "--trainer.callbacks=[]"]


@pytest.fixture(scope="module")
def done(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path, list[str]]:
    """A benchmark with two good variants and a broken one: exit code, --out, command."""
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


def test_all_variants_run_with_one_seed_before_the_next(done: tuple[int, Path, list[str]]) -> None:
    code, out, _ = done
    names = ["as is", "more windows", "broken"]
    assert code == 1  # because one variant is broken
    assert [(row["variant"], row["seed"]) for row in rows(out)] == [
        (name, seed) for seed in "34" for name in names
    ]
    found = json.loads((out / "results.json").read_text())
    for row, run in zip(rows(out), found["runs"], strict=True):
        path = out / "quickstart" / row["variant"].replace(" ", "_") / f"seed_{row['seed']}"
        assert Path(run["folder"]) == path
        assert (path / "record.json").is_file() == (row["variant"] != "broken")
        if row["variant"] != "broken":
            assert run["record"] == json.loads((path / "record.json").read_text())
            assert (float(row["value"]), run["record"]["seed"]) == (
                run["record"]["value"],
                int(row["seed"]),
            )
    assert found["comparisons"][0]["tokens_ratio"]["mean"] == 2  # twice as many windows


def test_a_failed_run_is_shown(done: tuple[int, Path, list[str]]) -> None:
    _, out, _ = done
    shown = (out / "results.md").read_text()
    assert "| 0 of 2 |" in shown
    reason = "exit code 2: hlbgpt: error: data.sequence_length: 999"
    for row in rows(out):
        if row["variant"] == "broken":
            assert f"- broken, seed {row['seed']}: {reason}" in shown
            assert row["error"].startswith(reason)


def test_finished_runs_are_kept_and_not_mixed_with_others(
    done: tuple[int, Path, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, out, command = done
    before = json.loads((out / "results.json").read_text())
    monkeypatch.setattr(benchmark, "launch", never)
    at = command.index(BROKEN)
    command = [*command[: at - 1], *command[at + 1 :]]
    assert benchmark.main(command) == 0
    assert capsys.readouterr().out.count("kept: val_loss") == 4
    after = json.loads((out / "results.json").read_text())
    assert after["variants"] == before["variants"][:2]
    assert benchmark.main([*command, "--trainer.max_steps=3"]) == 2
    assert "as_is/seed_3 holds a run with other arguments" in capsys.readouterr().err


def test_a_changed_config_is_another_run(tmp_path: Path) -> None:
    config = tmp_path / "quickstart.yaml"
    shutil.copy(CONFIGS / "quickstart.yaml", config)
    job = benchmark.make_jobs(*benchmark.parse(["--config", str(config), "--out", str(tmp_path)]))[
        0
    ]
    job.folder.mkdir(parents=True)
    job.beside(".json").write_text(json.dumps(job.inputs()))
    (job.folder / "record.json").touch()
    job.require_same_inputs()
    config.write_text(config.read_text().replace("0.95", "0.96"))
    with pytest.raises(benchmark.InputError, match="another text of its config"):
        job.require_same_inputs()


def test_an_interrupted_run_is_resumed(
    done: tuple[int, Path, list[str]],
    small: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = [*QUICKSTART, "--out", str(tmp_path), "--seeds", "1", "--first-seed", "3", *small]
    monkeypatch.setattr(benchmark, "launch", interrupted)
    assert benchmark.main(command) == 1
    assert rows(tmp_path)[0]["error"].startswith("killed by SIGKILL")
    monkeypatch.setattr(benchmark, "launch", forked)
    assert benchmark.main(command) == 0
    (row,), (whole, *_) = rows(tmp_path), rows(done[1])
    assert (row["value"], row["tokens"]) == (whole["value"], whole["tokens"])
    assert "--ckpt_path" in (tmp_path / "quickstart/as_is/seed_3.log").read_text()


def test_runs_are_separate_processes(
    tmp_path: Path,
    small: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The whole command with nothing replaced, and with relative paths."""
    monkeypatch.chdir(tmp_path)
    assert benchmark.main([*QUICKSTART, "--seeds", "1", *small]) == 0
    out = capsys.readouterr().out
    shown = Path("runs/benchmark/results.md").read_text()
    assert shown in out
    assert "[1 of 1] as is, seed 0: val_loss " in out
    assert f"python scripts/benchmark.py {QUICKSTART[0]}" in shown
    assert "target NOT met" in Path("runs/benchmark/quickstart/as_is/seed_0.log").read_text()


def test_a_folder_is_locked_while_a_benchmark_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "launch", never)
    with benchmark.locked(tmp_path, wait=False):
        assert benchmark.main([*QUICKSTART, "--out", str(tmp_path)]) == 2
    assert "--out: another benchmark is running in" in capsys.readouterr().err


# --- options ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--config", "nope.yaml"], "--config: no file 'nope.yaml'"),
        ([*QUICKSTART, *QUICKSTART], "--config: two files have the same name"),
        ([*QUICKSTART, "--seeds", "0"], "--seeds: 0 is less than 1"),
        ([*QUICKSTART, "--first-seed=-1"], "--first-seed: -1 is less than 0"),
        ([*QUICKSTART, "--variant", ": --a 1"], "--variant: no name in ': --a 1'"),
        ([*QUICKSTART, "--variant", "../x: --a 1"], "--variant: no name in '../x: --a 1'"),
        ([*QUICKSTART, "--variant", "x:"], "--variant: 'x' has no arguments"),
        ([*QUICKSTART, "--variant", "x: '"], "--variant 'x': cannot read"),
        ([*QUICKSTART, "--variant", "as is: --a 1"], "--variant: the name 'as is' is taken"),
        (
            [*QUICKSTART, "--variant", "x: --a 1", "--variant", "X: --a 2"],
            "--variant: the name 'X' is taken",
        ),
        ([*QUICKSTART, "--variant", "x: --seed_everything=3"], "--seed_everything=3: is set by"),
        ([*QUICKSTART, "--", "--ckpt_path", "last"], "--ckpt_path: is set by the benchmark"),
        ([*QUICKSTART, "--out", f"{__file__}/x"], f"{__file__}/x"),
    ],
)
def test_bad_input(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark, "launch", never)
    assert benchmark.main(options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("benchmark.py: error: ")
    assert message in line
    assert not list(tmp_path.iterdir())


def test_variants_are_split_like_shell_commands() -> None:
    assert benchmark.parse_variants(["b=2: --data.prompts '[\"a b\"]' --x=1"]) == {
        "as is": [],
        "b=2": ["--data.prompts", '["a b"]', "--x=1"],
    }


@pytest.mark.parametrize(
    ("log", "code", "expected"),
    [
        ("$ hlbgpt\nfine\n", 0, None),
        ("$ hlbgpt\n", 3, "exit code 3"),
        ("$ hlbgpt\n\nlast words\n\n", 1, "exit code 1: last words"),
        (
            "$ hlbgpt\ntorch.OutOfMemoryError: CUDA\nSet X for more\n",
            1,
            "exit code 1: torch.OutOfMemoryError: CUDA",
        ),
        ("$ hlbgpt\nstep 3\n", -9, "killed by SIGKILL: step 3"),
    ],
)
def test_the_error_of_a_process(log: str, code: int, expected: str | None) -> None:
    assert benchmark.error_in(log, code) == expected
