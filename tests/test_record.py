"""The record cannot lie: what was validated, with which metric, on which text, with which seed."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import torch
from conftest import LAST, QUICKSTART, RUN, TINY
from helpers import fit, read_record
from test_bad_input import error_of

from hlbgpt.__main__ import main
from hlbgpt.callbacks import LastCheckpoint, TimeToTarget
from hlbgpt.runs.folder import exclusive
from hlbgpt.training.resume import KEY
from hlbgpt.utils.errors import InputError

Run = Callable[..., str]
SECOND = RUN.with_name("version_1")
NEVER = "--time_to_target.target=0.01"
MORE = "--trainer.max_steps=8"
BITS = "--time_to_target.monitor=val_bits_per_byte"
ACCURACY = ["--time_to_target.monitor=val_accuracy", "--time_to_target.mode=max"]


@pytest.fixture(scope="module")
def arguments(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Those of `tiny`, for one cache and a copy of the text that tests may change."""
    text = shutil.copytree(folder, tmp_path_factory.mktemp("texts") / "text")
    cache = f"--data.cache_dir={tmp_path_factory.mktemp('cache')}"
    files = [
        f"--data.source.{split}={text / f'wiki.{name}.raw'}"
        for split, name in (("train", "train"), ("validation", "valid"), ("test", "test"))
    ]
    return [
        *QUICKSTART,
        "--data.source=hlbgpt.data.TextFiles",
        *files,
        cache,
        *TINY,
        "--data.eval_batch_size=16",
    ]


@pytest.fixture(scope="module")
def finished(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which a run and a run with a part of its validation split have ended."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place := tmp_path_factory.mktemp("finished"))
        patch.delenv("HLBGPT_DECISIONS", raising=False)
        main(["fit", *arguments, NEVER])
        main(["fit", *arguments, NEVER, "--trainer.limit_val_batches=1", "--run_name=partial"])
    return place


@pytest.fixture
def unfinished(finished: Path, hlbgpt: Run) -> Run:
    """The same, in the current folder, where the first run was killed before it wrote its record.

    `hlbgpt` is asked for because it changes the folder.
    """
    shutil.copytree(finished / "runs", "runs")
    (RUN / "record.json").unlink()
    return hlbgpt


def path_of(arguments: list[str], split: str) -> Path:
    return next(
        Path(a.partition("=")[2]) for a in arguments if a.startswith(f"--data.source.{split}")
    )


# --- what was validated ---------------------------------------------------------------------------


def test_the_record_says_what_was_validated(finished: Path, arguments: list[str]) -> None:
    record, tokens = (
        read_record(finished / RUN),
        path_of(arguments, "validation").stat().st_size - 1,
    )
    measured = record["validation"]
    assert measured.pop("fingerprint")
    windows = -(-tokens // 32)
    counts = {"tokens": tokens, "split_tokens": tokens, "windows": windows}
    assert measured == {**counts, "sequence_length": 32, "complete": True}
    assert record["caveats"] == []


@pytest.mark.parametrize(
    ("extra", "caveat"),
    [
        (["--trainer.limit_val_batches=1"], "validated on 10.2% of the split"),
        (["--trainer.limit_val_batches=0.31"], "validated on 30.7% of the split"),
        (["--data.eval_sequence_length=16"], "validated in windows of 16 tokens instead of 32"),
        (["--trainer.fast_dev_run=true"], "validated on 10.2% of the split"),
        (
            ["--trainer.limit_val_batches=1", "--time_to_target.target=9"],
            "validated on 10.2% of the split",
        ),
    ],
    ids=["batches", "share", "window", "fast_dev_run", "stops the run"],
)
def test_a_result_that_is_no_record_says_why(
    hlbgpt: Run, arguments: list[str], extra: list[str], caveat: str
) -> None:
    printed = hlbgpt("fit", *arguments, *extra)
    assert f"not a record: {caveat}\n" in printed
    if "fast_dev_run" not in extra[0]:
        record = read_record(RUN)
        assert record["caveats"] == [caveat]
        assert record["validation"]["complete"] is ("windows" in caveat)
        assert record["reached"] is ("--time_to_target.target=9" in extra)


@pytest.mark.parametrize("command", ["validate", "test"])
def test_a_partial_evaluation_is_called_one(finished: Path, hlbgpt: Run, command: str) -> None:
    words = command, "--ckpt_path", finished / LAST
    assert "of the split only" not in hlbgpt(*words)
    limit = f"--trainer.limit_{command.replace('validate', 'val')}_batches=1"
    assert "measured on 10.2% of the split only" in hlbgpt(*words, limit)


# Keeps the value of a validation in a file.
KEEP = """
from pathlib import Path

import lightning as L


class Keep(L.Callback):
    def on_validation_end(self, trainer, module):
        value = float(trainer.callback_metrics["val_loss"])
        Path(f"{module.data.eval_batch_size}.txt").write_text(str(value))
"""


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_the_record_has_what_the_checkpoint_measures(
    hlbgpt: Run, arguments: list[str], precision: str
) -> None:
    """Whatever the batches of the evaluation."""
    hlbgpt("fit", *arguments, f"--trainer.precision={precision}", NEVER)
    Path("keep.py").write_text(KEEP)
    keep = f"--config={RUN / 'config.yaml'}", "--trainer.callbacks+=keep.Keep"
    for size in (1, 200):
        hlbgpt("validate", *keep, f"--ckpt_path={LAST}", f"--data.eval_batch_size={size}")
        value = float(Path(f"{size}.txt").read_text())
        # Products of another shape round differently in bfloat16.
        tolerance = 1e-6 if precision.startswith("32") else 2e-3
        assert value == pytest.approx(read_record(RUN)["value"], rel=tolerance)


# --- a target is met by a measurement of this run -------------------------------------------------


def test_a_stored_measurement_counts_if_it_would_be_made_again(
    finished: Path, hlbgpt: Run, arguments: list[str]
) -> None:
    hlbgpt("fit", *arguments, "--ckpt_path", finished / LAST, MORE, "--time_to_target.target=9")
    record = read_record(RUN)
    assert (record["reached"], record["step"], record["value_step"]) == (True, 4, 4)


@pytest.mark.parametrize(
    ("run", "extra"),
    [
        ("quickstart", [*ACCURACY, "--time_to_target.target=0"]),
        (
            "quickstart",
            ["--time_to_target.monitor=val_bits_per_byte", "--time_to_target.target=99"],
        ),
        ("quickstart", ["--data.source.validation=other.txt", "--time_to_target.target=9"]),
        ("quickstart", ["--data.eval_sequence_length=16", "--time_to_target.target=9"]),
        ("partial", ["--time_to_target.target=9"]),
        ("partial", ["--trainer.limit_val_batches=2", "--time_to_target.target=9"]),
    ],
    ids=["accuracy", "bits per byte", "other text", "other windows", "whole split", "larger part"],
)
def test_another_measurement_is_made_anew(
    finished: Path, hlbgpt: Run, arguments: list[str], run: str, extra: list[str]
) -> None:
    Path("other.txt").write_text("Another text. " * 300)
    checkpoint = finished / "runs" / run / "version_0" / "checkpoints" / "last.ckpt"
    printed = hlbgpt("fit", *arguments, "--ckpt_path", checkpoint, MORE, *extra)
    record = read_record(RUN)
    assert record["reached"], "every value of the metric meets the target"
    assert record["value_step"] == record["step"] > 4
    assert f"{record['value']:.4f}" in printed
    if "val_accuracy" in extra[0]:
        assert 0 <= record["value"] <= 1


@pytest.mark.parametrize(
    "extra",
    [ACCURACY, ["--data.source.validation=other.txt"], ["--data.eval_sequence_length=16"]],
    ids=["metric", "text", "windows"],
)
def test_a_run_at_its_end_gets_no_record_of_what_it_did_not_measure(
    unfinished: Run, arguments: list[str], capfd, extra: list[str]
) -> None:
    Path("other.txt").write_text("Another text. " * 300)
    resume = ["fit", *arguments, NEVER, "--ckpt_path", str(LAST)]
    with pytest.raises(SystemExit, match="2"):
        unfinished(*resume, *extra)
    error = capfd.readouterr().err.splitlines()[-1]
    assert "the run has made all its steps, but its last validation was not of" in error
    assert not (RUN / "record.json").exists()
    unfinished(*resume)
    assert read_record(RUN)["value_step"] == 4


def test_a_partial_measurement_counts_if_it_would_be_made_again(
    unfinished: Run, arguments: list[str]
) -> None:
    folder = Path("runs/partial/version_0")
    (folder / "record.json").unlink()
    checkpoint = folder / "checkpoints" / "last.ckpt"
    limit = "--trainer.limit_val_batches=1"
    unfinished("fit", *arguments, NEVER, limit, "--ckpt_path", checkpoint)
    assert read_record(folder)["caveats"] == ["validated on 10.2% of the split"]


def test_milestones_are_those_of_the_validation_text(
    hlbgpt: Run, arguments: list[str], tmp_path: Path
) -> None:
    milestone = ["--trainer.callbacks+=Milestone", "--trainer.callbacks.target=9"]
    hlbgpt("fit", *arguments, *milestone, NEVER)
    Path("other.txt").write_text("Another text. " * 300)
    resume = ["fit", *arguments, *milestone, NEVER, MORE, "--ckpt_path", LAST]
    hlbgpt(*resume)
    hlbgpt(*resume, "--data.source.validation=other.txt")
    steps = [read_record(RUN.with_name(f"version_{n}"))["milestones"][0]["step"] for n in range(3)]
    assert steps == [2, 2, 6]


# --- texts, tokenizers and seeds ------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_text_that_changed_is_refused_unless_it_is_named(
    unfinished: Run, arguments: list[str], capfd, split: str
) -> None:
    path = path_of(arguments, split)
    text = path.read_text()
    resume = ["fit", *arguments, NEVER, MORE, "--ckpt_path", str(LAST)]
    try:
        path.write_text(text[::-1])
        error = error_of(unfinished, capfd, *resume)
    finally:
        path.write_text(text)
    assert f"data.source: the text of the {split} split has changed since the checkpoint" in error
    Path("reversed.txt").write_text(text[::-1])
    printed = unfinished(*resume, f"--data.source.{split}=reversed.txt")
    assert f"resume: the {split} split is another text than the checkpoint's" in printed
    record = read_record(RUN)
    both = ["trained on 2 texts, one after the other"] if split == "train" else []
    assert record["caveats"] == both
    assert len(record["texts"]["train"]) == 1 + len(both)


@pytest.fixture(scope="module")
def with_special_token(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place := tmp_path_factory.mktemp("special"))
        patch.delenv("HLBGPT_DECISIONS", raising=False)
        wide = "--model.net.init_args.vocab_size=260"
        main(["fit", *arguments, NEVER, wide, "--data.special_tokens=[<a>]"])
    return place / LAST


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize("tokens", ["[]", "[<b>]", "[<b>, <a>]"])
def test_other_special_tokens_than_the_network_knows(
    with_special_token: Path, hlbgpt: Run, capfd, command: str, tokens: str
) -> None:
    words = [command, "--ckpt_path", str(with_special_token), f"--data.special_tokens={tokens}"]
    error = error_of(hlbgpt, capfd, *words, "--data.prompts=The", MORE)
    assert "but the checkpoint's network was trained with ['<a>']; begin with those" in error


def test_special_tokens_may_be_added(with_special_token: Path, hlbgpt: Run) -> None:
    words = ["predict", "--ckpt_path", with_special_token, "--data.prompts=The"]
    assert hlbgpt(*words, "--data.special_tokens=[<a>, <b>]").startswith("The")


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_another_tokenizer_than_the_network_knows(
    with_special_token: Path, hlbgpt: Run, capfd, command: str
) -> None:
    checkpoint = torch.load(with_special_token, weights_only=True)
    checkpoint[KEY] |= {"tokenizer": "gpt2", "special_tokens": []}
    torch.save(checkpoint, "gpt2.ckpt")
    config = f"--config={with_special_token.parents[1] / 'config.yaml'}"
    words = [command, config, "--ckpt_path=gpt2.ckpt", "--data.prompts=The", MORE]
    error = error_of(hlbgpt, capfd, *words, "--data.special_tokens=[]")
    assert "data.tokenizer: bytes, but the checkpoint's network was trained with gpt2" in error


def test_runs_without_a_seed_record_none(hlbgpt: Run, arguments: list[str]) -> None:
    for _ in range(2):
        hlbgpt("fit", *arguments, "--seed_everything=false")
    first, second = read_record(RUN), read_record(SECOND)
    assert first["seed"] is second["seed"] is None
    assert first["value"] != second["value"]


def test_a_drawn_seed_is_recorded_and_gives_the_run_again(
    hlbgpt: Run, arguments: list[str]
) -> None:
    hlbgpt("fit", *arguments, "--seed_everything=true")
    hlbgpt("fit", "--config", RUN / "config.yaml")
    hlbgpt("fit", *arguments, "--seed_everything=true", "--run_name=other")
    first, again = read_record(RUN), read_record(SECOND)
    assert first["seed"] == again["seed"] != read_record(Path("runs/other/version_0"))["seed"]
    assert first["value"] == again["value"]


def test_a_value_that_is_no_number_is_null_and_a_word(hlbgpt: Run, arguments: list[str]) -> None:
    unwatched = "--divergence=null", "--checkpoint=null", "--trainer.callbacks=[]"
    hlbgpt("fit", *arguments, *unwatched, "--model.lr_scheduler.max_lr=1e30")

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    record = json.loads((RUN / "record.json").read_text(), parse_constant=refuse)
    assert record["value"] is None
    assert record["not_finite"]["value"] == "nan"
    assert not record["reached"]


# --- no run replaces another ----------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "callback", [lambda: TimeToTarget(target=0.1), LastCheckpoint], ids=["record", "checkpoint"]
)
def test_a_trainers_folder_keeps_its_first_run(
    folder: Path, tmp_path: Path, callback: Callable[[], L.Callback]
) -> None:
    place = tmp_path / "run"
    fit(folder, tmp_path, callback(), default_root_dir=place)
    before = contents(place)
    with pytest.raises(InputError, match="holds another run; name another folder"):
        fit(folder, tmp_path, callback(), default_root_dir=place)
    assert contents(place) == before


def test_a_trainer_resumes_in_its_folder(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "run"
    fit(folder, tmp_path, LastCheckpoint(), default_root_dir=place)
    resumed = {"ckpt_path": place / "checkpoints" / "last.ckpt", "max_steps": 12}
    fit(
        folder,
        tmp_path,
        LastCheckpoint(),
        TimeToTarget(target=0.1),
        **resumed,
        default_root_dir=place,
    )
    assert read_record(place)["step"] == 12


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no second process to be had at once")
def test_a_trainers_folder_is_held_against_other_processes(folder: Path, tmp_path: Path) -> None:
    (place := tmp_path / "run").mkdir()
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        with exclusive(place):
            os.write(writing, b"held")
            signal.pause()  # until it is killed
    try:
        assert os.read(reading, 4) == b"held"
        with pytest.raises(InputError, match="still going on in another process"):
            fit(folder, tmp_path, TimeToTarget(target=0.1), default_root_dir=place)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
    fit(folder, tmp_path, TimeToTarget(target=0.1), default_root_dir=place)


@pytest.mark.parametrize(
    "logger",
    [
        ["--trainer.logger=false"],
        ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=.", "--trainer.logger.name="],
    ],
    ids=["no logger", "a logger without names"],
)
@pytest.mark.parametrize("root", [[], ["--trainer.default_root_dir=job"]], ids=["runs", "typed"])
def test_a_second_run_leaves_the_first_alone(
    hlbgpt: Run, arguments: list[str], capfd, logger: list[str], root: list[str]
) -> None:
    command = ["fit", *arguments, *logger, *root, NEVER]
    hlbgpt(*command)
    first = Path("job") if root else RUN
    before = {name: file for name, file in contents(first).items() if name != "metrics.csv"}
    if root:
        assert "'job' holds another run" in error_of(hlbgpt, capfd, *command).replace(
            str(Path.cwd()) + "/", ""
        )
    else:
        hlbgpt(*command)
        assert (SECOND / "record.json").is_file()
    assert contents(first).items() >= before.items()
