"""Bad input ends before training, in one line that says what to do."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import LAST, QUICKSTART, TABLE
from helpers import prepare_token_file

from hlbgpt.__main__ import main
from hlbgpt.data import TextFiles
from hlbgpt.data.tokenizer import load_tokenizer


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


NET = "--model.net.init_args"
AT_LEAST_1 = "is less than 1; set it to at least 1"
FIT = [
    # names
    (["--model.widht=3"], "widht"),
    ([f"{NET}.widht=3"], "widht"),
    (["--model.net=hlbgpt.models.Nothing"], "hlbgpt.models.Nothing"),
    (["--model.optimizer=torch.optim.Nope"], 'key "model.optimizer": '),
    (["--model.optimizer=torch.nn.Linear"], 'key "model.optimizer": '),
    (["--data.source=hlbgpt.models.GPT"], "not correspond to a subclass of TextSource"),
    (["--trainer.callbacks+=torch.nn.Linear"], 'key "trainer.callbacks": '),
    (["--trainer.callbacks+=Nope"], 'key "trainer.callbacks": '),
    (["--trainer.logger=nope"], 'key "trainer.logger": '),
    (["--trainer.strategy=nope"], "trainer: You selected an invalid strategy name"),
    (["--trainer.accelerator=quantum"], "trainer: You selected an invalid accelerator name"),
    (["--trainer.accelerator=gpu"], "trainer.accelerator: 'gpu' asked for"),
    (["--trainer.precision=fp7"], 'key "trainer.precision": '),
    (["--data.tokenizer=gpt5"], "data.tokenizer: unknown tokenizer 'gpt5'; there are bytes, gpt2"),
    (["--data.special_tokens=[<s>, '']"], "data.special_tokens: '' is empty; give each a text of"),
    (["--data.special_tokens=[<s>, <s>]"], "data.special_tokens: '<s>' is given twice"),
    (["--data.special_tokens=[<s>]"], "less than the 257 tokens of data.tokenizer bytes with data"),
    (["--time_to_target.mode=up"], 'key "time_to_target.mode": '),
    (["--time_to_target.monitor=val_los"], "no metric 'val_los'"),
    # types
    (["--trainer.max_steps=many"], "trainer.max_steps"),
    (["--trainer.max_time=soon"], "Timer(duration='soon')"),
    (["--time_to_target.target=low"], 'key "time_to_target.target": '),
    (["--data.micro_batch_size=2.5"], 'key "data.micro_batch_size": '),
    (["--model.compile=maybe"], 'key "model.compile": '),
    # ranges
    (["--trainer.max_steps=0"], "trainer.max_steps: 0 is less than 1; set it higher, or -1"),
    (["--trainer.max_steps=-5"], "trainer.max_steps: -5 is less than 1; set it higher, or -1"),
    (
        ["--trainer.max_steps=100000"],
        "trainer.max_steps: 100000, but the learning-rate schedule ends",
    ),
    (["--trainer.min_steps=9"], "trainer.min_steps, min_epochs or min_time: they would keep"),
    (
        ["--trainer.gradient_clip_val=1.0", "--trainer.precision=bf16-mixed"],
        "clips no gradients of a fused optimizer in bf16-mixed; set",
    ),
    (["--trainer.max_epochs=0"], "trainer.max_epochs: 0 is less than 1"),
    (["--trainer.log_every_n_steps=0"], "trainer.log_every_n_steps: 0 is less than 1"),
    (["--trainer.accumulate_grad_batches=0"], "trainer.accumulate_grad_batches: 0 is less than 1"),
    (["--trainer.check_val_every_n_epoch=0"], "trainer.check_val_every_n_epoch: 0 is less than 1"),
    (["--trainer.num_sanity_val_steps=-5"], "trainer.num_sanity_val_steps: -5 is less than 0"),
    (["--trainer.val_check_interval=0"], "trainer.val_check_interval: 0 is too little"),
    (["--trainer.val_check_interval=-3"], "invalid value -3 for val_check_interval"),
    (["--trainer.limit_train_batches=0"], "trainer.limit_train_batches: 0 is too little"),
    (["--trainer.devices=0"], "`Trainer(devices='0')` value is not a valid input"),
    (["--seed_everything=-1"], "seed_everything: -1 is not in bounds"),
    (["--seed_everything=99999999999"], "seed_everything: 99999999999 is not in bounds"),
    (["--data.seed=-1"], "data.seed: -1 is negative"),
    (["--data.sequence_length=0"], f"data.sequence_length: 0 {AT_LEAST_1}"),
    (["--data.sequence_length=200000"], "data.sequence_length"),
    (["--data.sequence_length=64"], "data.sequence_length: 64 is longer than the network's"),
    (["--data.eval_sequence_length=64"], "data.eval_sequence_length: 64 is longer than the"),
    (["--data.micro_batch_size=-1"], f"data.micro_batch_size: -1 {AT_LEAST_1}"),
    (["--data.micro_batch_size=100000"], "data.micro_batch_size"),
    (["--data.eval_batch_size=0"], f"data.eval_batch_size: 0 {AT_LEAST_1}"),
    ([f"{NET}.width=15"], "width: 15 is not divisible by num_heads 2"),
    ([f"{NET}.width=0"], f"width: 0 {AT_LEAST_1}"),
    ([f"{NET}.num_heads=0"], f"num_heads: 0 {AT_LEAST_1}"),
    ([f"{NET}.num_blocks=-2"], f"num_blocks: -2 {AT_LEAST_1}"),
    ([f"{NET}.init_std=-1"], "init_std: -1.0 is not above 0"),
    ([f"{NET}.vocab_size=100"], "vocab_size: 100 is less than the 256"),
    (["--model.optimizer.lr=-1"], "model.optimizer: Invalid learning rate: -1.0"),
    (["--model.optimizer.betas=[2,3]"], "model.optimizer: Invalid beta parameter"),
    (["--model.lr_scheduler.pct_start=7"], "model.lr_scheduler: Expected float between 0 and 1"),
    (["--model.lr_scheduler.total_steps=-4"], "model.lr_scheduler: Expected positive integer"),
    (["--model.sampling.temperature=-1"], "temperature: -1.0 is not valid"),
    (["--model.sampling.temperature=.nan"], "model.sampling.temperature: nan is not valid"),
    (["--model.sampling.max_new_tokens=-1"], "max_new_tokens: -1"),
    (["--model.sampling.top_k=-1"], "top_k: -1"),
    (["--model.sampling.top_p=0"], "model.sampling.top_p: 0.0 is not valid"),
    (["--model.sampling.top_p=1.5"], "model.sampling.top_p: 1.5 is not valid"),
    (["--model.sampling.stop="], "model.sampling.stop: [''] is not valid"),
    (["--model.sampling.stop=[a, '']"], "model.sampling.stop: ['a', ''] is not valid"),
    (["--model.sampling.stream=perhaps"], "model.sampling.stream"),
    (["--model.sampling.seed=-1"], "model.sampling.seed: -1 is not valid"),
    (["--trainer.callbacks+=Samples", "--trainer.callbacks.prompts="], "Samples prompts: "),
    (["--checkpoint.every_minutes=0"], "checkpoint.every_minutes: 0.0 is not above 0"),
    (["--data.micro_batches=1000000000"], "data.micro_batches 1000000000 x micro_batch_size 4 x "),
    (["--data.eval_batch_size=1000000000"], "is a batch of 32000000000 tokens, which is made in"),
    (["--trainer.default_root_dir=~no one/x"], "trainer.default_root_dir: '~no one/x': no user"),
    (["--data.micro_batches=0"], f"data.micro_batches: 0 {AT_LEAST_1}"),
    (["--data.max_tokens=0"], f"data.max_tokens: 0 {AT_LEAST_1}"),
    # paths
    (["--config", "nowhere.yaml"], "nowhere.yaml"),
    (["--config", "a_folder"], "a_folder"),
    (["--config", "broken.yaml"], "--config broken.yaml: no YAML at line 2, column 5: "),
    (["--config", "empty.yaml"], "--config empty.yaml: holds no settings but None"),
    (["--config", "list.yaml"], "--config list.yaml: holds no settings but [1, 2]"),
    (["--config", "latin.yaml"], "--config latin.yaml: not UTF-8 text at byte 3"),
    (["--data.cache_dir=a_file"], "data: a_file: File exists; data.source must"),
    (["--data.source.folder=/nowhere"], "no wiki.train.raw or wiki.train.tokens in '/nowhere'"),
    (["--data.source.folder=a_file"], "no wiki.train.raw or wiki.train.tokens in 'a_file'"),
    (["--data.source.folder=a_folder"], "no wiki.train.raw or wiki.train.tokens in 'a_folder'"),
    (["--data.source.train=a_folder"], "data.source.train: no file 'a_folder'"),
    (
        ["--data.source=hlbgpt.data.TextFolder", "--data.source.folder=a_folder"],
        "data.source.folder: no *.txt or *.md in 'a_folder'; set data.source.pattern",
    ),
    (
        ["--data.source=hlbgpt.data.HubText", "--data.source.rows=words"],
        'key "data.source": ',
    ),
    (
        ["--trainer.default_root_dir=a_file/x"],
        "a_file/x': Not a directory; name a folder that can be written to",
    ),
    (["--schedule.table=[{tokens: 0}]"], "schedule.table: 1 rows; give at least"),
    (["--schedule.table=[{tokens: 0, width: 3}]"], "schedule.table"),
    (["--schedule.micro_batch_tokens=0"], "schedule.micro_batch_tokens: 0 is less than 1"),
    (["--schedule.micro_batch_tokens=many"], "schedule.micro_batch_tokens"),
    ([f"{TABLE}"], "model.lr_scheduler: the learning rate follows schedule.table"),
    (
        [TABLE.replace("16", "64"), "--model.lr_scheduler=null"],
        "schedule.table sequence_length: 64 is longer than the network's context",
    ),
    (
        [TABLE, "--model.lr_scheduler=null", "--trainer.max_steps=5"],
        "trainer.max_steps: 5, but schedule.table ends after 4 steps",
    ),
    (
        [
            TABLE.replace("128", "999999"),
            "--schedule.micro_batch_tokens=999999",
            "--model.lr_scheduler=null",
            "--trainer.max_steps=-1",
        ],
        "schedule.table: train split too short",
    ),
    (
        ["--model.optimizer=hlbgpt.optim.MuonAdamW", "--model.optimizer.groups={heads: {}}"],
        "model.optimizer: groups: no group 'heads'",
    ),
    (
        [
            "--model.optimizer=hlbgpt.optim.MuonAdamW",
            "--model.optimizer.groups={vectors: {a: 1}}",
        ],
        "model.optimizer: groups.vectors: no setting 'a'",
    ),
    (
        [
            "--model.optimizer=hlbgpt.optim.MuonAdamW",
            "--model.optimizer.groups={block_matrices: {lr: 0.02}}",
            "--model.optimizer.lr=null",
        ],
        "model.optimizer: groups: no lr for embeddings, vectors; set lr for all groups or for each",
    ),
    (
        ["--model.optimizer=hlbgpt.optim.MuonAdamW", "--model.optimizer.betas=[0.9]"],
        "betas",
    ),
    ([f"{NET}.loss_chunk_tokens=-1"], "model.net.loss_chunk_tokens: -1 is negative"),
    (["--ckpt_path=nowhere.ckpt"], "ckpt_path: no file 'nowhere.ckpt'"),
    (["--ckpt_path=best"], "ckpt_path: no file 'best'"),
    (["--ckpt_path=a_folder"], "ckpt_path: no file 'a_folder'"),
    (["--ckpt_path="], "ckpt_path: no file ''"),
]


@pytest.mark.parametrize(("extra", "message"), FIT, ids=[" ".join(extra) for extra, _ in FIT])
@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU to be missing")
def test_bad_input_is_one_line_before_training(
    hlbgpt, tiny: list[str], capfd, extra: list[str], message: str
) -> None:
    Path("a_file").write_text("x")
    Path("a_folder").mkdir()
    Path("broken.yaml").write_text("a: [1,\n b: }")
    Path("empty.yaml").write_text("")
    Path("list.yaml").write_text("[1, 2]")
    Path("latin.yaml").write_bytes(b"a: \xff")
    assert message in error_of(hlbgpt, capfd, "fit", *QUICKSTART, *tiny, *extra)
    assert not Path("runs").exists(), "an empty run folder was left behind"


def test_no_config_and_no_command(hlbgpt, capfd) -> None:
    assert "config: none given; start with one, as in hlbgpt fit --config" in error_of(
        hlbgpt, capfd, "fit"
    )
    assert "no command 'train'; use one of fit, validate" in error_of(hlbgpt, capfd, "train")
    assert "unrecognized" in error_of(hlbgpt, capfd, "--verbose")
    assert hlbgpt().startswith("usage: hlbgpt COMMAND")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the train split is empty"),
        (b"too short", "is longer than the validation split, which has 9 tokens"),
        (b"\xff\xfe\x00", "wiki.train.raw: not UTF-8 text at byte 0"),
        ("café ".encode() * 400_000 + b"caf\xe9", "not UTF-8 text at byte 2400003"),
        (b"the end of a character \xc3", "not UTF-8 text at byte 23"),
        ("UTF-16 without a mark ".encode("utf-16-le"), "not text: byte 1 is NUL; if the file is"),
        ("é".encode() * 9 + bytes(90), "not text: byte 18 is NUL"),
        (b"x" * 50_000_000, "16777216 characters without the end of a word; is this a text"),
    ],
    ids=["empty", "short", "binary", "latin-1 far in", "cut", "utf-16", "NUL", "50 MB word"],
)
def test_bad_text_is_one_line(hlbgpt, tiny, capfd, tmp_path: Path, content: bytes, message: str):
    for split in ("train", "valid", "test"):
        (tmp_path / f"wiki.{split}.raw").write_bytes(content)
    extra = f"--data.source.folder={tmp_path}"
    assert message in error_of(hlbgpt, capfd, "fit", *QUICKSTART, *tiny, extra)
    assert not Path("runs").exists()


def test_a_50_mb_line_of_words_is_a_text(tmp_path: Path) -> None:
    text = tmp_path / "line.txt"
    text.write_bytes(b"one line of many words " * 2_200_000)
    source, folder = TextFiles(train=str(text)), tmp_path / "cache"
    file = prepare_token_file(folder / "a.tokens", source, "train", lambda: load_tokenizer("bytes"))
    assert file.header.tokens == text.stat().st_size


def test_a_split_that_is_not_there(hlbgpt, tiny: list[str], capfd, folder: Path) -> None:
    """Named before training; the test split is asked for by `test` alone."""
    only = [f"--data.source.train={folder / 'wiki.train.raw'}", "--data.source.folder=null"]
    message = error_of(hlbgpt, capfd, "fit", *QUICKSTART, *tiny, *only)
    assert "data.source: no text for the validation split; set folder" in message
    only.append(f"--data.source.validation={folder / 'wiki.valid.raw'}")
    hlbgpt("fit", *QUICKSTART, *tiny, *only)
    message = error_of(hlbgpt, capfd, "test", "--ckpt_path", str(LAST))
    assert "data.source: no text for the test split; set folder" in message


def test_damaged_token_files_are_built_again(hlbgpt, tiny: list[str]) -> None:
    hlbgpt("fit", *QUICKSTART, *tiny)
    cache = next(argument.split("=")[1] for argument in tiny if "cache_dir" in argument)
    (path,) = Path(cache).glob("train-*.tokens")
    whole = path.read_bytes()
    for damage in (whole[:-100], whole[:-1] + b"\x7f"):
        path.write_bytes(damage)
        assert f"{path}: " in (out := hlbgpt("fit", *QUICKSTART, *tiny))
        assert "building it again" in out
        assert path.read_bytes() == whole


def test_foreign_checkpoints_are_one_line(hlbgpt, tiny: list[str], capfd) -> None:
    hlbgpt("fit", *QUICKSTART, *tiny)
    for command in ("fit", "validate", "predict"):
        wider = "--model.net.init_args.width=32"
        arguments = [command, *QUICKSTART, *tiny, wider, f"--ckpt_path={LAST}"]
        message = error_of(hlbgpt, capfd, *arguments)
        assert f"{LAST} is of another network: net.blocks.0.attention." in message


def test_checkpoints_of_every_wrong_kind_are_one_line(hlbgpt, tiny: list[str], capfd) -> None:
    hlbgpt("fit", *QUICKSTART, *tiny)
    whole = torch.load(LAST, weights_only=True)
    kinds = {
        "empty": b"",
        "text": b"not a checkpoint",
        "zip": b"PK\x05\x06" + bytes(18),
        "cut": LAST.read_bytes()[:-500],
        "list": [1, 2],
        "weights": whole["state_dict"],
        "none": {"state_dict": None},
        "no_loops": {**whole, "state_dict": {}},
    }
    commands = {"cut": ("fit", "validate", "predict")}
    for name, kind in kinds.items():
        path = Path(f"{name}.ckpt")
        if isinstance(kind, bytes):
            path.write_bytes(kind)
        else:
            torch.save(kind, path)
        for command in commands.get(name, ("fit",)):
            message = error_of(hlbgpt, capfd, command, *QUICKSTART, *tiny, f"--ckpt_path={path}")
            assert f"ckpt_path: '{path}' is " in message or f"ckpt_path: {path} is of" in message
    kept = ("state_dict", "pytorch-lightning_version", "epoch", "global_step", "hlbgpt_config")
    light = {key: whole[key] for key in kept}
    torch.save(light, "light.ckpt")
    arguments = [*QUICKSTART, *tiny, "--ckpt_path=light.ckpt"]
    assert "ckpt_path: the checkpoint holds weights only" in error_of(
        hlbgpt, capfd, "fit", *arguments
    )


def test_a_checkpoint_that_carries_code_is_refused(hlbgpt, tiny, capfd, tmp_path: Path) -> None:
    class Malice:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"state_dict": {}, "extra": Malice()}, "evil.ckpt")
    for command in ("fit", "validate", "test", "predict"):
        arguments = [command, *QUICKSTART, *tiny, "--ckpt_path=evil.ckpt"]
        assert "is incomplete, is no checkpoint, or contains code" in error_of(
            hlbgpt, capfd, *arguments
        )
    assert not (tmp_path / "owned").exists()


def test_prompts_are_asked_for(hlbgpt, tiny: list[str], capfd) -> None:
    hlbgpt("fit", *QUICKSTART, *tiny)
    predict = ["predict", f"--ckpt_path={LAST}"]
    assert "data.prompts: no prompt" in error_of(hlbgpt, capfd, *predict)
    for empty in ("", "['The ', '']"):
        message = error_of(hlbgpt, capfd, *predict, f"--data.prompts={empty}")
        assert "data.prompts: a prompt is empty; give" in message
    seed = "--model.sampling.seed=-1"
    assert "model.sampling.seed: -1" in error_of(hlbgpt, capfd, *predict, "--data.prompts=x", seed)


def test_a_refused_command_leaves_earlier_runs_alone(hlbgpt, tiny: list[str]) -> None:
    """Also one that a run of the same process left without a checkpoint."""
    hlbgpt("fit", *QUICKSTART, *tiny, "--trainer.enable_checkpointing=false")
    before = sorted(Path("runs").rglob("*"))
    with pytest.raises(SystemExit):
        main(["fit", *QUICKSTART, *tiny, "--ckpt_path=nowhere.ckpt"])
    assert sorted(Path("runs").rglob("*")) == before
    assert Path("runs/quickstart/version_0/record.json").is_file()
