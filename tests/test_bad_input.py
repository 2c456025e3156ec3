"""Bad input ends before training, in one line that says what to do."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import LAST, QUICKSTART

from hlbgpt.cli import main
from hlbgpt.data.tokenfile import TokenFile


def error_of(run: Callable[..., str], capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line with which a command line is refused."""
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2
    captured = capfd.readouterr()
    assert "Traceback" not in captured.err
    lines = [line for line in captured.err.splitlines() if "error" in line.lower()]
    assert len(lines) == 1, captured.err
    assert captured.err.splitlines()[-1] == lines[0]
    assert lines[0].startswith("hlbgpt: error: ")
    assert "val_loss" not in captured.out  # no training before it
    return lines[0]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--model.widht=3"], "widht"),
        (["--model.net.init_args.widht=3"], "widht"),
        (["--data.tokenizer=gpt5"], "data.tokenizer"),
        (["--trainer.max_steps=many"], "trainer.max_steps"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--data.source.folder=/nowhere"], "data.source.folder: no folder '/nowhere'"),
        (["--data.sequence_length=200000"], "data.sequence_length"),
        (["--data.sequence_length=64"], "data.sequence_length: 64 is longer than the network's"),
        (["--data.sequence_length=0"], "data.sequence_length: 0 is less than 1"),
        (["--data.micro_batch_size=100000"], "data.micro_batch_size"),
        (["--data.eval_sequence_length=64"], "data.eval_sequence_length: 64 is longer than the"),
        (["--model.net.init_args.width=15"], "width: 15 is not divisible by num_heads 2"),
        (["--model.net.init_args.vocab_size=100"], "vocab_size: 100 is less than the 256"),
        (["--model.net=hlbgpt.models.Nothing"], "hlbgpt.models.Nothing"),
        (["--trainer.max_steps=100000"], "trainer.max_steps: 100000 steps asked for"),
        (["--trainer.accelerator=gpu"], "trainer.accelerator: 'gpu' asked for"),
        (["--ckpt_path=nowhere.ckpt"], "ckpt_path: no file 'nowhere.ckpt'"),
        (["--time_to_target.monitor=val_los"], "no metric 'val_los'"),
        (["--model.generation.temperature=-1"], "temperature: -1"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU to be missing")
def test_bad_input_is_one_line_before_training(
    hlbgpt, tiny: list[str], capfd, extra: list[str], message: str
) -> None:
    assert message in error_of(hlbgpt, capfd, "fit", *QUICKSTART, *tiny, *extra)
    assert not Path("runs").exists(), "an empty run folder was left behind"


def test_no_config_and_no_command(hlbgpt, capfd) -> None:
    assert "model.net" in error_of(hlbgpt, capfd, "fit")
    assert "train" in error_of(hlbgpt, capfd, "train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the train split is empty"),
        (b"too short", "train split too short: 9 tokens"),
        (b"\xff\xfe\x00", "wiki.train.raw: not UTF-8 text at byte 0"),
    ],
)
def test_bad_text_is_one_line(hlbgpt, tiny, capfd, tmp_path: Path, content: bytes, message: str):
    for split in ("train", "valid", "test"):
        (tmp_path / f"wiki.{split}.raw").write_bytes(content)
    extra = f"--data.source.folder={tmp_path}"
    assert message in error_of(hlbgpt, capfd, "fit", *QUICKSTART, *tiny, extra)


def test_token_files_are_mended_or_refused(hlbgpt, tiny: list[str], capfd) -> None:
    hlbgpt("fit", *QUICKSTART, *tiny)
    cache = next(argument.split("=")[1] for argument in tiny if "cache_dir" in argument)
    (path,) = Path(cache).glob("train-*.tokens")
    whole = path.read_bytes()
    for damage in (whole[:-100], whole[:-1] + b"\x7f"):
        path.write_bytes(damage)
        assert f"{path}: " in (out := hlbgpt("fit", *QUICKSTART, *tiny))
        assert "building it again" in out
        assert path.read_bytes() == whole
    path.write_bytes(whole.replace(b'"tokenizer": "bytes"', b'"tokenizer": "gpt2 "', 1))
    message = error_of(hlbgpt, capfd, "fit", *QUICKSTART, *tiny)
    assert f"{path}: made with tokenizer 'gpt2 ', but this run asks for 'bytes'" in message
    path.write_bytes(whole)
    assert TokenFile(path).header.tokenizer == "bytes"
    hlbgpt("fit", *QUICKSTART, *tiny)


def test_foreign_checkpoints_are_one_line(hlbgpt, tiny: list[str], capfd) -> None:
    hlbgpt("fit", *QUICKSTART, *tiny)
    for command in ("fit", "validate", "predict"):
        wider = "--model.net.init_args.width=32"
        arguments = [command, *QUICKSTART, *tiny, wider, f"--ckpt_path={LAST}"]
        message = error_of(hlbgpt, capfd, *arguments)
        assert "is of another network: net.blocks.0.attention.expand.weight is (48, 16)" in message
    Path("text.ckpt").write_text("not a checkpoint")
    arguments = ["validate", *QUICKSTART, *tiny, "--ckpt_path=text.ckpt"]
    assert "'text.ckpt' is no checkpoint" in error_of(hlbgpt, capfd, *arguments)
    torch.save([1, 2], "list.ckpt")
    arguments[-1] = "--ckpt_path=list.ckpt"
    assert "has no state_dict" in error_of(hlbgpt, capfd, *arguments)


def test_a_checkpoint_that_carries_code_is_refused(hlbgpt, tiny, capfd, tmp_path: Path) -> None:
    class Malice:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"state_dict": {}, "extra": Malice()}, "evil.ckpt")
    for command in ("fit", "predict"):
        arguments = [command, *QUICKSTART, *tiny, "--ckpt_path=evil.ckpt"]
        assert "no checkpoint that loads as data only" in error_of(hlbgpt, capfd, *arguments)
    assert not (tmp_path / "owned").exists()


def test_prompts_are_asked_for(hlbgpt, tiny: list[str], capfd) -> None:
    hlbgpt("fit", *QUICKSTART, *tiny)
    assert "data.prompts: no prompt" in error_of(hlbgpt, capfd, "predict", f"--ckpt_path={LAST}")


def test_a_refused_command_leaves_earlier_runs_alone(hlbgpt, tiny: list[str]) -> None:
    """Also one that a run of the same process left without a checkpoint."""
    hlbgpt("fit", *QUICKSTART, *tiny, "--trainer.enable_checkpointing=false")
    before = sorted(Path("runs").rglob("*"))
    with pytest.raises(SystemExit):
        main(["fit", *QUICKSTART, *tiny, "--ckpt_path=nowhere.ckpt"])
    assert sorted(Path("runs").rglob("*")) == before
    assert Path("runs/quickstart/version_0/record.json").is_file()
