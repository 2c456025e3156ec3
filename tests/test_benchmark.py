"""The benchmark does each run once, resumes what was interrupted, and shows every failure."""

import json
import shutil
from pathlib import Path
from typing import Any

import helpers
import pytest
from conftest import CONFIGS, QUICKSTART, TINY

pytest.importorskip("scipy")
import benchmark

from hlbgpt.__main__ import main as hlbgpt
from hlbgpt.utils.errors import InputError

BROKEN = "broken: --data.sequence_length=999"
WIDE = "more windows: --data.micro_batch_size=8"


def forked(words: list[str], log: Path) -> int:
    """Replaces `launch`: forks this process, so that a run need not import torch again."""
    return helpers.forked(hlbgpt, words, log)


def interrupted(words: list[str], log: Path) -> int:
    """Replaces `launch`: leaves a run that was killed just before it wrote its record."""
    assert forked(words, log) == 0, log.read_text()
    log.with_name("record.json").unlink()
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
    options = ["--seeds", "2", "--variant", WIDE, "--variant", BROKEN]
    command = [*QUICKSTART, "--out", str(out), *options, *small]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "launch", forked)
        code = benchmark.main(command)
    return code, out, command


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


def test_all_variants_run_with_one_seed_before_the_next(done: tuple[int, Path, list[str]]) -> None:
    code, out, _ = done
    assert code == 1  # because one variant is broken
    variants = ["as is", "more windows", "broken"]
    runs = results(out)["runs"]
    assert [(run["variant"], run["seed"]) for run in runs] == [
        (f"quickstart, {variant}", seed) for seed in range(2) for variant in variants
    ]
    for run in runs:
        folder = out / "quickstart" / run["variant"][12:].replace(" ", "_") / f"seed_{run['seed']}"
        assert run["folder"] == str(folder)
        if "broken" not in run["variant"]:
            assert run["record"] == json.loads((folder / "record.json").read_text())
            assert run["record"]["seed"] == run["seed"]
    plain, wide, _ = results(out)["variants"]
    assert wide["tokens"]["mean"] == 2 * plain["tokens"]["mean"]  # twice as many windows


def test_a_failed_run_is_shown(done: tuple[int, Path, list[str]]) -> None:
    _, out, _ = done
    shown = (out / "results.md").read_text()
    assert "| 0 of 2 |" in shown
    for seed in range(2):
        reason = "exit code 2: hlbgpt: error: data.sequence_length: 999"
        assert f"- quickstart, broken, seed {seed}: {reason}" in shown


def test_finished_runs_are_kept_and_not_mixed_with_others(
    done: tuple[int, Path, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, out, command = done
    before = results(out)
    monkeypatch.setattr(benchmark, "launch", never)
    at = command.index(BROKEN)
    command = [*command[: at - 1], *command[at + 1 :]]
    assert benchmark.main(command) == 0
    assert results(out)["variants"] == before["variants"][:2]
    assert benchmark.main([*command, "--trainer.max_steps=3"]) == 2
    assert "as_is/seed_0 holds a run with other arguments" in capsys.readouterr().err


def test_a_changed_config_is_another_run(tmp_path: Path) -> None:
    config = tmp_path / "quickstart.yaml"
    shutil.copy(CONFIGS / "quickstart.yaml", config)
    options = benchmark.parse(["--config", str(config), "--out", str(tmp_path)])
    job = benchmark.make_jobs(*options)[0]
    job.folder.mkdir(parents=True)
    (job.folder / benchmark.INPUTS).write_text(job.inputs())
    job.require_usable()
    config.write_text(config.read_text().replace("0.95", "0.96"))
    job.require_usable()  # with what it was at the start
    with pytest.raises(InputError, match="another text of its config"):
        benchmark.make_jobs(*options)[0].require_usable()


def test_an_interrupted_run_is_resumed(
    done: tuple[int, Path, list[str]],
    small: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = [*QUICKSTART, "--out", str(tmp_path), "--seeds", "1", *small]
    monkeypatch.setattr(benchmark, "launch", interrupted)
    assert benchmark.main(command) == 1
    assert results(tmp_path)["runs"][0]["error"].startswith("killed by SIGKILL")
    monkeypatch.setattr(benchmark, "launch", forked)
    assert benchmark.main(command) == 0
    (run,), (whole, *_) = results(tmp_path)["runs"], results(done[1])["runs"]
    assert all(run["record"][key] == whole["record"][key] for key in ("value", "tokens"))
    assert "--ckpt_path" in (tmp_path / "quickstart/as_is/seed_0/output.log").read_text()


@pytest.mark.slow
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
    assert "[1 of 1] quickstart, as is, seed 0: val_loss " in out
    assert f"python scripts/benchmark.py {QUICKSTART[0]}" in shown
    assert "target NOT met" in Path("runs/benchmark/quickstart/as_is/seed_0/output.log").read_text()


def test_a_folder_is_locked_while_a_benchmark_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "launch", never)
    with benchmark.output_folder(tmp_path):
        assert benchmark.main([*QUICKSTART, "--out", str(tmp_path)]) == 2
    assert f"--out: another process is writing to {tmp_path}; wait" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--config", "nope.yaml"], "--config: no file 'nope.yaml'"),
        ([*QUICKSTART, *QUICKSTART], "--config: two files have the same name"),
        ([*QUICKSTART, "--seeds", "0"], "--seeds: 0 is not between 1 and 10,000"),
        ([*QUICKSTART, "--seeds", "100000000"], "--seeds: 100000000 is not between"),
        ([*QUICKSTART, "--variant", ": --a 1"], "--variant: ': --a 1' is not 'NAME: ARGUMENTS'"),
        ([*QUICKSTART, "--variant", "../x: --a 1"], "--variant: '../x: --a 1' is not"),
        ([*QUICKSTART, "--variant", "x:"], "--variant: 'x:' is not"),
        ([*QUICKSTART, "--variant", "x: '"], "No closing quotation; correct it"),
        (
            [*QUICKSTART, "--variant", "As is: --a 1"],
            "--variant: the name 'As is' is taken",
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
    ("lines", "code", "expected"),
    [
        ([], 3, "exit code 3"),
        (["", "last words", ""], 1, "exit code 1: last words"),
        (
            ["torch.OutOfMemoryError: CUDA", "Set X for more"],
            1,
            "exit code 1: torch.OutOfMemoryError: CUDA",
        ),
        (["step 3"], -9, "killed by SIGKILL: step 3"),
    ],
)
def test_the_reason_of_a_failure(lines: list[str], code: int, expected: str) -> None:
    assert benchmark.reason_of_failure(lines, code) == expected
