"""The command line as a user meets it."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS, LAST, QUICKSTART, RUN
from test_text import write_hub_layout

# --- runs and their folders -------------------------------------------------------------------


def test_a_second_fit_neither_dies_nor_overwrites(hlbgpt, tiny: list[str]) -> None:
    hlbgpt("fit", *QUICKSTART, *tiny)
    before = {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    out = hlbgpt("fit", *QUICKSTART, *tiny, "--trainer.max_steps=2")
    assert "run folder: runs/quickstart/version_1" in out
    assert "tensorboard --logdir runs" in out
    assert {path: path.read_bytes() for path in before} == before
    first, second = (
        json.loads(Path(f"runs/quickstart/version_{i}/record.json").read_text()) for i in (0, 1)
    )
    assert (first["step"], second["step"]) == (4, 2)
    assert first["config"] == "runs/quickstart/version_0/config.yaml"
    assert first["seed"] == 0


@pytest.mark.parametrize("logger", ["false", "CSVLogger"])
def test_other_loggers_keep_their_hands_off_earlier_runs(hlbgpt, tiny, logger: str) -> None:
    extra = [f"--trainer.logger={logger}"]
    if logger == "CSVLogger":
        extra.append("--trainer.logger.save_dir=csv")
    for _ in range(2):
        hlbgpt("fit", *QUICKSTART, *tiny, *extra)
    assert len(list(Path().rglob("record.json"))) == 2
    assert len(list(Path().rglob("config.yaml"))) == 2


def test_the_same_seed_gives_the_same_run(hlbgpt, tiny: list[str]) -> None:
    def value(*extra: str) -> float:
        hlbgpt("fit", *QUICKSTART, *tiny, *extra)
        newest = max(Path("runs/quickstart").iterdir(), key=lambda path: int(path.name[8:]))
        return json.loads((newest / "record.json").read_text())["value"]

    first = value()
    assert value() == first
    assert value("--seed_everything=1") != first


def test_nothing_is_kept_of_a_fast_dev_run(hlbgpt, tiny: list[str]) -> None:
    hlbgpt("fit", *QUICKSTART, *tiny, "--trainer.fast_dev_run=true")
    assert list(Path().rglob("*.ckpt")) == list(Path().rglob("record.json")) == []


def test_checkpoints_can_be_switched_off(hlbgpt, tiny: list[str]) -> None:
    hlbgpt("fit", *QUICKSTART, *tiny, "--trainer.enable_checkpointing=false")
    assert list(Path().rglob("*.ckpt")) == []


@pytest.mark.slow
def test_training_from_a_token_file_does_not_import_datasets(hlbgpt, tiny: list[str]) -> None:
    hlbgpt("fit", *QUICKSTART, *tiny)  # tokenizes
    code = (
        "import sys; from hlbgpt.__main__ import main; main(); "
        "assert not {'datasets', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, "fit", *QUICKSTART, *tiny], check=True)


# --- after training ---------------------------------------------------------------------------


def test_validate_test_and_predict_from_a_checkpoint(hlbgpt, tiny: list[str], capfd) -> None:
    hlbgpt("fit", *QUICKSTART, *tiny)
    record = json.loads(Path("runs/quickstart/version_0/record.json").read_text())

    # The settings of the checkpoint's run are found beside it.
    from_checkpoint = ["--ckpt_path", str(LAST)]
    out = hlbgpt("validate", *from_checkpoint)
    assert f"{record['value']:.6f}"[:7] in out
    assert hlbgpt("validate", *QUICKSTART, *tiny, *from_checkpoint) == out
    hlbgpt("test", *from_checkpoint)  # builds the token file of the test split
    assert "test_loss" in (first := hlbgpt("test", *from_checkpoint))
    assert hlbgpt("test", *from_checkpoint) == first

    prompts = ["--data.prompts", '["The history of", "x ="]']
    text = hlbgpt("predict", *from_checkpoint, *prompts)
    assert text.startswith("The history of")
    assert "\nx =" in text
    assert hlbgpt("predict", *from_checkpoint, *prompts) == text
    for alike in ("--model.sampling.stream=true", "--data.eval_batch_size=1"):
        assert hlbgpt("predict", *from_checkpoint, *prompts, alike) == text
    assert hlbgpt("predict", *from_checkpoint, *prompts, "--model.sampling.seed=7") != text
    stopped = text[len("The history of") :][2:4]
    stop = ["--model.sampling.stop", stopped]
    cut = hlbgpt("predict", *from_checkpoint, "--data.prompts", "The history of", *stop)
    assert cut == f"The history of{text[len('The history of') :].partition(stopped)[0]}\n\n"
    one = hlbgpt("predict", *from_checkpoint, "--data.prompts", "The history of")
    assert one.strip() == text[: text.index("\n\nx =")].strip()
    assert [path.name for path in Path("runs/quickstart").iterdir()] == ["version_0"]


def test_resume_goes_on_in_a_folder_of_its_own(hlbgpt, tiny: list[str]) -> None:
    hlbgpt("fit", *QUICKSTART, *tiny)
    hlbgpt("fit", *QUICKSTART, *tiny, "--trainer.max_steps=6", "--ckpt_path", str(LAST))
    record = json.loads(Path("runs/quickstart/version_1/record.json").read_text())
    assert (record["step"], record["tokens"]) == (6, 6 * 4 * 32)
    hlbgpt("fit", "--trainer.max_steps=5", "--ckpt_path", str(LAST))
    assert Path("runs/quickstart/version_2/record.json").is_file()


def test_checkpoints_hold_data_only_and_clean_names(hlbgpt, tiny: list[str]) -> None:
    hlbgpt("fit", *QUICKSTART, *tiny)
    checkpoint = torch.load(LAST, weights_only=True)
    assert not any("_orig_mod" in key for key in checkpoint["state_dict"])
    assert "net.embedding.weight" in checkpoint["state_dict"]
    assert "sequence_length: 32" in checkpoint["hlbgpt_config"]


# --- callbacks swapped in ---------------------------------------------------------------------

MINE = """
import lightning as L

class CountSteps(L.Callback):
    '''Counts.

    Args:
        word: What to say.
    '''

    def __init__(self, word: str = "steps") -> None:
        self.word, self.count = word, 0

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.count += 1

    def on_train_end(self, trainer, pl_module):
        print(f"{self.word}: {trainer.global_step}")
"""


def test_callbacks_from_the_command_line(hlbgpt, tiny: list[str]) -> None:
    Path("mine.py").write_text(MINE)
    out = hlbgpt(
        "fit",
        *QUICKSTART,
        *tiny,
        "--trainer.callbacks+=LearningRateMonitor",
        "--trainer.callbacks.logging_interval=step",
        "--trainer.callbacks+=mine.CountSteps",
        "--trainer.callbacks.word=counted",
    )
    assert "counted: 4" in out
    assert "samples of the trained network" in out  # those of the config are still there
    assert "target NOT met" in out
    config = Path("runs/quickstart/version_0/config.yaml").read_text()
    assert "LearningRateMonitor" in config
    assert "mine.CountSteps" in config


def test_callbacks_from_yaml(hlbgpt, tiny: list[str]) -> None:
    Path("mine.py").write_text(MINE)
    Path("more.yaml").write_text(
        "trainer:\n  callbacks+:\n  - class_path: mine.CountSteps\n"
        "  - class_path: EarlyStopping\n    init_args:\n      monitor: val_loss\n"
        "      patience: 0\n      min_delta: 10.0\n"
    )
    out = hlbgpt("fit", *QUICKSTART, "--config", "more.yaml", *tiny, "--trainer.max_steps=40")
    assert "steps: 4" in out  # stopped early
    assert "runs/more/version_0" in out
    assert "samples of the trained network" in out


def test_parts_are_swapped_by_class_path(hlbgpt, tiny: list[str]) -> None:
    Path("mine.py").write_text(
        "from hlbgpt.models import GPT\n\nclass Wider(GPT):\n"
        "    def __init__(self, factor: int = 2, width: int = 16, **kwargs) -> None:\n"
        "        super().__init__(width=width * factor, **kwargs)\n"
    )
    hlbgpt(
        "fit",
        *QUICKSTART,
        *[argument for argument in tiny if "model.net" not in argument],
        "--model.net=mine.Wider",
        "--model.net.init_args.vocab_size=256",
        "--model.net.init_args.max_sequence_length=32",
        "--model.net.init_args.width=16",
        "--model.net.init_args.num_heads=2",
        "--model.net.init_args.num_blocks=1",
        "--model.optimizer=torch.optim.SGD",
        "--model.optimizer.init_args.lr=0.1",
        "--model.lr_scheduler=torch.optim.lr_scheduler.ConstantLR",
    )
    checkpoint = torch.load(LAST, weights_only=True)
    assert checkpoint["state_dict"]["net.embedding.weight"].shape == (256, 32)
    assert checkpoint["optimizer_states"][0]["param_groups"][0]["name"] == "block_matrices"


# --- help -------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_every_option_is_explained(hlbgpt, command: str) -> None:
    out = " ".join(hlbgpt(command, "--help").split())
    for text in (
        ".target: Value at which the run stops.",
        "--data.cache_dir CACHE_DIR Folder for the token files.",
        "--data.prompts",
        "--model.compile {true,false} Whether to run the network through",
        "--checkpoint... .every_minutes: Minutes between two checkpoints.",
    ):
        assert text in out


# --- real input -------------------------------------------------------------------------------


@pytest.mark.usefixtures("hub_cache")
def test_fit_from_the_hubs_layout(hlbgpt, tiny: list[str], folder: Path, tmp_path: Path) -> None:
    texts = {
        split: (folder / f"wiki.{name}.raw").read_text()
        for split, name in {"train": "train", "validation": "valid", "test": "test"}.items()
    }
    hub = write_hub_layout(tmp_path / "hub", texts)
    hlbgpt("fit", *QUICKSTART, *tiny)
    hlbgpt(
        "fit", *QUICKSTART, *tiny, "--data.source=hlbgpt.data.HubText", f"--data.source.path={hub}"
    )
    files, rows = (
        json.loads(Path(f"runs/quickstart/version_{i}/record.json").read_text()) for i in (0, 1)
    )
    assert rows["value"] == files["value"]  # the same text, so the same run


def test_fit_on_wikitext_with_the_gpt2_tokenizer(hlbgpt, tiny, gpt2, test_data: Path) -> None:
    """The baseline, small, on real text; its first validation is close to a uniform guess."""
    text = test_data / "wikitext" / "wiki.test.raw"
    hlbgpt(
        "fit",
        "--config",
        CONFIGS / "baseline.yaml",
        *tiny,
        *[f"--data.source.{split}={text}" for split in ("train", "validation", "test")],
        "--data.tokenizer=gpt2",
        "--model.net.init_args.vocab_size=50304",
        "--data.eval_batch_size=64",
        "--trainer.limit_val_batches=3",
    )
    record = json.loads(Path("runs/baseline/version_0/record.json").read_text())
    assert record["value"] == pytest.approx(math.log(50304), abs=0.1)


def test_activation_checkpointing_trains_the_same_run(hlbgpt, tiny: list[str]) -> None:
    for value in ("true", "false"):
        hlbgpt("fit", *QUICKSTART, *tiny, f"--model.activation_checkpointing={value}")
    runs = [RUN.parent / f"version_{number}" for number in (0, 1)]
    first, second = (
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for run in runs
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    texts = [
        hlbgpt("predict", f"--ckpt_path={run}/checkpoints/last.ckpt", "--data.prompts=The ")
        for run in runs
    ]
    assert texts[0] == texts[1] != ""


def test_activation_checkpointing_needs_blocks(hlbgpt, tiny: list[str], capfd) -> None:
    Path("flat.py").write_text(
        "from hlbgpt.models import GPT\n"
        "class Flat(GPT):\n"
        "    def __init__(self) -> None:\n"
        "        super().__init__(256, 32, 16, 2, 2)\n"
        "        del self.blocks\n"
    )
    words = [word for word in tiny if "model.net" not in word]
    with pytest.raises(SystemExit) as stop:
        hlbgpt(
            *("fit", *QUICKSTART, *words, "--model.net=flat.Flat"),
            "--model.activation_checkpointing=true",
        )
    assert stop.value.code == 2
    assert (
        "model.activation_checkpointing: Flat has no ModuleList `blocks`" in capfd.readouterr().err
    )
