"""The GPU report, on a CPU: every stage works, what is done is kept, and failures are shown."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import CONFIGS, TINY, fitting
from helpers import forked, read_record, small_gpt

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
import gpu_gradients
import gpu_measure
import gpu_report
from test_read_record import changed, write_record

from hlbgpt.__main__ import main as hlbgpt
from hlbgpt.models import GPT, FastGPT
from hlbgpt.utils.errors import InputError
from hlbgpt.utils.files import locked

NAMES = ("speedrun", "hlb041")


def launch(words: list[str], log: Path, *, program: tuple[str, ...], environment: dict) -> int:
    """Replaces `launch`: forks this process, so that no process need import torch again."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        return forked(hlbgpt if program[0] == "-m" else gpu_measure.main, words, log)


def never(words: list[str], log: Path, **_: Any) -> int:
    raise AssertionError(f"run again: {words}")


def write_config(name: str, folder: Path) -> Path:
    """A shipped config, made small."""
    path = CONFIGS / f"{name}.yaml"
    settings = yaml.safe_load(path.read_text())
    for argument in fitting(path, TINY):
        key, _, value = argument.removeprefix("--").partition("=")
        *parents, last = key.split(".")
        place = settings
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = yaml.safe_load(value)
    (folder / path.name).write_text(yaml.safe_dump(settings))
    return folder / path.name


@pytest.fixture(scope="module")
def small(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[str]]:
    """Options, and arguments after `--`, that make a report small."""
    place = tmp_path_factory.mktemp("configs")
    configs = [word for name in NAMES for word in ("--config", str(write_config(name, place)))]
    source = ["--data.source=hlbgpt.data.TextFiles", f"--data.source.folder={folder}"]
    return [*configs, "--quick", "--device=cpu"], [*source, f"--data.cache_dir={place}"]


@pytest.fixture(scope="module")
def done(
    small: tuple[list[str], list[str]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, Path, list[str]]:
    """A whole report: exit code, --out, command."""
    out = tmp_path_factory.mktemp("report")
    command = [*small[0], "--out", str(out), "--", *small[1]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_report, "launch", launch)
        code = gpu_report.main(command)
    return code, out, command


def tables(out: Path, stage: str, name: str) -> list[list[dict[str, Any]]]:
    return list(json.loads((out / stage / name / "measured.json").read_text()).values())


@pytest.mark.slow  # CI runs it
def test_every_stage_is_in_the_report(done: tuple[int, Path, list[str]]) -> None:
    code, out, _ = done
    text = (out / "report.md").read_text()
    assert code == 0, text
    sections = [line[3:].lower() for line in text.splitlines() if line.startswith("## ")]
    assert sections == [*gpu_report.STAGES, "pictures"]
    assert "failed or was stopped" not in text
    assert "a reading, not a\nrecord" in text
    assert text.count("\n$ python ") == 1 + 10  # the report's own command, and its processes
    for picture in ("steps.png", "curves.png"):
        assert f"]({picture})" in text
        assert (out / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow  # CI runs it
def test_what_is_measured(done: tuple[int, Path, list[str]]) -> None:
    _, out, _ = done
    shapes = [[8, 16], [4, 32]]  # of the table in conftest.py, and of hlb041's doubling
    (device,), products, attention = tables(out, "hardware", "speedrun")
    assert device["copy TB/s"] > 0
    assert [row["windows x tokens"] for row in attention] == shapes
    assert [128, 64, 16] in [row["tokens x outputs x inputs"] for row in products]
    compared, (evaluation,) = tables(out, "gradients", "speedrun")
    assert [row["windows x tokens"] for row in compared] == shapes
    assert all(row["passed"] for row in [*compared, evaluation])
    times, *kernels = tables(out, "steps", "speedrun")
    assert [row["windows x tokens"] for row in times] == shapes
    assert all(row["step ms"] > row["forward ms"] > 0 for row in times)
    assert len(kernels) == 2
    assert len(tables(out, "steps", "speedrun_plain_mlp")) == 3
    times, _ = tables(out, "steps", "hlb041")
    assert [row["windows x tokens"] for row in times] == [[4, 32]]


@pytest.mark.slow  # CI runs it
def test_the_race_is_to_what_the_rival_reached(done: tuple[int, Path, list[str]]) -> None:
    _, out, _ = done
    rival, ours = (read_record(out / "race" / f"{name}_0") for name in NAMES[::-1])
    assert ours["target"] == rival["value"]
    assert ours["reached"]
    ratio = ours["train_seconds"] / rival["train_seconds"]
    assert f"n = 1 pairs: {ratio:.3f}" in (out / "report.md").read_text()
    assert read_record(out / "speedruns" / "speedrun_0")["step"] == 1  # a quarter of four


@pytest.mark.slow  # CI runs it
def test_what_is_done_is_kept(
    done: tuple[int, Path, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, out, command = done
    monkeypatch.setattr(gpu_report, "launch", never)
    (out / "report.md").unlink()
    assert gpu_report.main(command) == 0
    assert capsys.readouterr().out.count(": kept\n") == 10
    assert (out / "report.md").is_file()
    assert gpu_report.main([*command, "--trainer.max_steps=2"]) == 2
    assert "holds a run with other arguments" in capsys.readouterr().err


@pytest.mark.slow  # CI runs it
def test_only_named_stages_run_and_run_again(
    done: tuple[int, Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out, command = done
    ran: list[str] = []

    def recorded(words: list[str], log: Path, **how: Any) -> int:
        ran.append(str(log.parent.relative_to(out)))
        return launch(words, log, **how)

    monkeypatch.setattr(gpu_report, "launch", recorded)
    assert gpu_report.main(["--only", "start", "hardware", *command]) == 0
    assert ran == ["hardware/speedrun", "start/cold", "start/warm"]  # in the order of the stages
    assert "Not run" not in (out / "report.md").read_text()


def test_caches_of_cold_and_warm_start(small: tuple[list[str], list[str]], tmp_path: Path) -> None:
    report, _ = gpu_report.parse([*small[0], "--out", str(tmp_path), "--", *small[1]])
    jobs = gpu_report.start(report)
    cold = next(jobs)
    write_record(cold.folder)
    (warm,) = jobs
    assert cold.environment == warm.environment
    cache = Path(cold.environment["TORCHINDUCTOR_CACHE_DIR"])
    assert cold.folder in cache.parents  # so it is removed before the cold start
    assert warm.folder not in cache.parents
    (cold.folder / "record.json").unlink()
    assert len(list(gpu_report.start(report))) == 1  # a failed cold start leaves no cache to use


def test_a_failure_is_shown_and_the_rest_goes_on(
    small: tuple[list[str], list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def killed(words: list[str], log: Path, **how: Any) -> int:
        if words[0] != "steps":
            return launch(words, log, **how)
        with log.open("a") as file:
            file.write("last words\n")
        return -9

    monkeypatch.setattr(gpu_report, "launch", killed)
    options = [*small[0], "--out", str(tmp_path), "--only", "hardware", "steps", "race"]
    assert gpu_report.main([*options, "--", *small[1], "--data.source.folder=nowhere"]) == 1
    text, printed = (tmp_path / "report.md").read_text(), capsys.readouterr().out
    assert "steps/hlb041: FAILED, killed by SIGKILL: last words" in printed
    assert "**hlb041 failed or was stopped**" in text
    assert "last words\nkilled by SIGKILL\n" in text
    assert "hardware/speedrun: done" in printed
    assert "race/hlb041_0: FAILED, exit code 2: hlbgpt: error: " in printed
    assert "race/speedrun_0" not in printed  # there is no loss to race to
    assert "Not run; `--only gradients` runs it." in text


def test_an_interrupt_leaves_a_report(
    small: tuple[list[str], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_report, "launch", interrupted)
    assert gpu_report.main([*small[0], "--out", str(tmp_path), "--", *small[1]]) == 130
    assert "**speedrun failed or was stopped**" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device=cuda"], "--device: torch"),
        (["--config", "a.yaml", "--config", "b.yaml", "--config", "c.yaml"], "more than two"),
        (["--config", "hlb041.yaml"], "the recipe and its rival have the same name"),
        (["--device=cpu", "--", "--seed_everything=3"], "--seed_everything=3: is set by"),
        (["--device=cpu", "--", "--trainer.nonsense=3"], "trainer.nonsense"),
        (["--device=cpu", "--config", "nope.yaml"], "nope.yaml"),
        (["--device=cpu", "--config", "...yaml"], "'..' can be no folder's name"),
    ],
)
def test_bad_input(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "configs").symlink_to(CONFIGS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu_report, "launch", never)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_report.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("gpu_report.py: error: ")
    assert message in line
    assert not Path("runs").exists()


BROKEN_RESULTS: dict[str, tuple[str, Any, str]] = {
    "cut short": ("hardware/speedrun/measured.json", b'{"a": [', "is not JSON"),
    "not UTF-8": ("gradients/speedrun/measured.json", b"\xff", "is not JSON"),
    "no tables": ("hardware/speedrun/measured.json", {"a": 3}, "holds no tables"),
    "no rows": ("hardware/speedrun/measured.json", {"a": [3]}, "holds no tables"),
    "no times": ("steps/speedrun/measured.json", {"a": [{"step ms": 1}]}, "holds no times"),
    "times in words": (
        "steps/hlb041/measured.json",
        {"a": [{"forward ms": "1", "backward ms": 1, "optimizer ms": 1}]},
        "holds no times",
    ),
    "foreign record": ("race/hlb041_0/record.json", {"version": 1}, "reached is missing"),
    "record": ("speedruns/speedrun_0/record.json", changed(value="low"), "value is 'low', not"),
}


@pytest.mark.parametrize(
    ("name", "content", "message"), BROKEN_RESULTS.values(), ids=[*BROKEN_RESULTS]
)
def test_a_broken_result_is_named(name: str, content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.with_name("output.log").write_text("")  # cut short as well
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(InputError, match=f"{path}: .*{message}") as error:
        gpu_report.read_results(tmp_path, name.partition("/")[0])
    assert len(str(error.value).splitlines()) == 1


def test_a_broken_result_is_found_before_anything_runs(
    small: tuple[list[str], list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gpu_report, "launch", never)
    path = tmp_path / "race" / "hlb041_0" / "record.json"
    write_record(path.parent, value="low")
    path.with_name("output.log").touch()
    assert gpu_report.main([*small[0], "--out", str(tmp_path), "--", *small[1]]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"gpu_report.py: error: {path}: value is 'low', not")
    # The stage that is measured again does not read it.
    monkeypatch.setattr(gpu_report, "launch", lambda *_, **__: 3)
    options = [*small[0], "--out", str(tmp_path), "--only", "race"]
    assert gpu_report.main([*options, "--", *small[1]]) == 1


def test_a_config_that_is_edited_meanwhile_reaches_no_process(
    small: tuple[list[str], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = [tmp_path / Path(word).name for word in small[0] if word.endswith(".yaml")]
    for config in configs:
        shutil.copy(Path(small[0][1]).with_name(config.name), config)
    words = [word for config in configs for word in ("--config", str(config))]
    words += ["--quick", "--device=cpu", "--out", str(tmp_path / "out"), "--", *small[1]]
    texts: list[str] = []

    def edited(words: list[str], log: Path, **_: Any) -> int:
        texts.append(Path(words[words.index("--config") + 1]).read_text())
        for config in configs:
            config.write_text("edited: true\n")
        return 3

    monkeypatch.setattr(gpu_report, "launch", edited)
    assert gpu_report.main(words) == 1
    assert len(texts) > 5
    assert not any("edited" in text for text in texts)
    for config in configs:
        config.write_text("trainer: {max_steps: 3}\n")
    assert gpu_report.main(words) == 2  # not mixed with what was measured


def test_a_process_that_goes_on_is_left_alone(
    small: tuple[list[str], list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gpu_report, "launch", never)
    folder = tmp_path / "hardware" / "speedrun"
    folder.mkdir(parents=True)
    options = [*small[0], "--out", str(tmp_path), "--only", "gradients"]
    with locked(tmp_path, wait=False):
        assert gpu_report.main([*options, "--", *small[1]]) == 2
    assert f"--out: another process is writing to {tmp_path}" in capsys.readouterr().err
    report, _ = gpu_report.parse([*small[0], "--out", str(tmp_path), "--", *small[1]])
    (job,) = gpu_report.STAGES["hardware"](report)
    with locked(folder, wait=False), pytest.raises(InputError, match="still going on"):
        job.run()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--repeat", "0"], "--repeat: 0 is less than 1"),
        (["--out", "file"], "file"),
        (["--out", "file/x"], "file/x"),
        (["--", "--nonsense=3"], "nonsense"),
        (["--", "--config", "nope.yaml"], "nope.yaml"),
        (["--", "--trainer.limit_train_batches=0"], "trainer.limit_train_batches: 0"),
    ],
)
def test_bad_input_of_a_measurement(
    words: list[str],
    message: str,
    small: tuple[list[str], list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    config = ["--config", small[0][1], "--trainer.accelerator=cpu", *small[1]]
    words = [*words, *config] if "--" in words else [*words, "--", *config]
    assert gpu_measure.main(["steps", "--out", "out", *words]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("gpu_measure.py: error: ")
    assert message in line


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (gpu_report.main, ["--only", "nonsense"]),
        (gpu_measure.main, ["nonsense", "--out", "x"]),
        (gpu_measure.main, []),
    ],
)
def test_an_unknown_stage(main: Any, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]


class WrongGradient(GPT):
    """As if compilation had made the gradients half as long again, but not changed the loss."""

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        loss = self.forward(*inputs)
        return loss + 0.5 * (loss - loss.detach())


def test_a_wrong_gradient_is_found() -> None:
    batch = torch.randint(256, (4, 9))
    net = WrongGradient(vocab_size=256, max_sequence_length=8, width=16, num_heads=2, num_blocks=1)
    row = gpu_gradients.compare_gradients(net, batch, nullcontext)
    assert row["loss, compiled"] == row["eager"]
    assert not row["passed"]
    assert gpu_gradients.compare_gradients(small_gpt(), batch, nullcontext)["passed"]


def test_the_reference_does_not_depend_on_its_micro_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    sizes = {"width": 16, "num_heads": 2, "num_blocks": 2}
    net = FastGPT(vocab_size=64, cutoffs=[16], capacity=[0.1], max_sequence_length=8, **sizes)
    batch = torch.randint(64, (6, 9))
    whole, gradients = gpu_gradients.reference_gradients(net, batch)
    monkeypatch.setattr(gpu_gradients, "_REFERENCE_TOKENS", 17)
    loss, parts = gpu_gradients.reference_gradients(net, batch)
    assert loss == pytest.approx(whole)
    assert max(gpu_gradients.relative_errors(parts, gradients).values()) < 1e-4
    assert net.lm_head.capacity == [0.1]


@pytest.mark.gpu
def test_on_a_gpu(small: tuple[list[str], list[str]], tmp_path: Path) -> None:
    options = [word for word in small[0] if not word.startswith("--device")]
    options += ["--out", str(tmp_path), "--only", "hardware", "gradients", "steps"]
    assert gpu_report.main([*options, "--", *small[1], "--trainer.accelerator=cuda"]) == 0
    compared, (evaluation,) = tables(tmp_path, "gradients", "speedrun")
    assert all(row["passed"] for row in [*compared, evaluation])
    _, kernels, *_ = tables(tmp_path, "steps", "speedrun")
    assert kernels[0]["ms"] > 0
