"""Use from Python: training, pretrained networks, safetensors."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from conftest import CONFIGS, LAST, QUICKSTART, fitting
from helpers import fit as train
from helpers import read_record
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import save_file

import hlbgpt as package
from hlbgpt import PretrainedModel, fit
from hlbgpt.callbacks import LastCheckpoint, TimeToTarget
from hlbgpt.data import PythonDocs, TokenDataModule
from hlbgpt.data.tokenizer import load_tokenizer
from hlbgpt.generation import SamplingConfig, generate
from hlbgpt.models import GPT
from hlbgpt.training.module import LanguageModule
from hlbgpt.utils.errors import DivergedError, InputError

NETS = ["quickstart", "hlb041", "speedrun"]


def settings(arguments: list[str]) -> dict[str, Any]:
    """Arguments of the command line as settings."""
    return dict(argument.removeprefix("--").split("=", 1) for argument in arguments)


@pytest.mark.parametrize("config", NETS)
def test_a_checkpoint_and_its_export_give_the_same_network(
    hlbgpt: Callable[..., str], tiny: list[str], config: str
) -> None:
    arguments = fitting(CONFIGS / f"{config}.yaml", tiny)
    hlbgpt("fit", "--config", CONFIGS / f"{config}.yaml", *arguments, "--trainer.max_steps=2")
    path = f"runs/{config}/version_0/checkpoints/last.ckpt"
    model = PretrainedModel.from_checkpoint(path)
    assert not model.net.training
    assert model.tokenizer == "bytes"
    kept = torch.load(path, weights_only=True)["state_dict"]
    assert {f"net.{name}" for name in model.net.state_dict()} == {
        name for name in kept if name.startswith("net.")
    }
    for name, value in model.net.state_dict().items():
        assert torch.equal(value, kept[f"net.{name}"]), name
    model.save("net.safetensors")
    again = PretrainedModel.from_safetensors("net.safetensors")
    assert (again.tokenizer, again.net_config) == (model.tokenizer, model.net_config)
    tokens = torch.randint(256, (2, 16))
    assert torch.equal(model.net(tokens), again.net(tokens))
    assert not list(Path().glob(".net*"))  # no temporary file is left


def test_what_is_generated_is_what_predict_prints(
    hlbgpt: Callable[..., str], tiny: list[str]
) -> None:
    hlbgpt("fit", *QUICKSTART, *tiny)
    out = hlbgpt("predict", "--ckpt_path", LAST, "--data.prompts", '["If ", "The long "]')
    model = PretrainedModel.from_checkpoint(LAST)
    texts = model.generate(["If ", "The long "], max_new_tokens=8)
    assert out == "".join(f"{text}\n\n" for text in texts)
    assert model.generate("If ", max_new_tokens=8) == texts[0]
    prompt = torch.tensor(list(b"If "))
    config = SamplingConfig(max_new_tokens=8)
    (tokens,) = generate(model.net, [prompt], config, vocab_size=256, use_cache=False)
    assert load_tokenizer("bytes").decode(tokens.tolist()) == texts[0]
    with pytest.raises(InputError, match="prompts: one is empty"):
        model.generate("")


def test_fit_is_the_command_line_in_python(hlbgpt: Callable[..., str], tiny: list[str]) -> None:
    hlbgpt("fit", *QUICKSTART, *tiny)
    seen = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            seen.append(trainer.global_step)

    run = fit(CONFIGS / "quickstart.yaml", settings(tiny), callbacks=[Watch()])
    assert seen == [1, 2, 3, 4]
    assert run.folder == Path("runs/quickstart/version_1")
    assert run.record == json.loads((run.folder / "record.json").read_text())
    (weights, ours) = (PretrainedModel.from_checkpoint(LAST).net.state_dict(), run.model.net)
    for name, value in ours.state_dict().items():
        assert torch.equal(value, weights[name])  # the same run
    run.model.save("net.safetensors")
    assert PretrainedModel.from_safetensors("net.safetensors").net_config == run.model.net_config


def test_fit_leaves_the_process_as_it_was(
    hlbgpt: Callable[..., str], tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["kernel", "-f", "connection.json"])
    path = list(sys.path)
    fit(CONFIGS / "quickstart.yaml", settings(tiny))
    assert sys.argv == ["kernel", "-f", "connection.json"]
    assert sys.path == path


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"model.net.init_args.widht": 3}, "widht"),
        ({"data.sequence_length": 0}, "data.sequence_length: 0"),
        ({"trainer.max_steps": "many"}, "max_steps"),
    ],
)
def test_fit_raises_what_the_command_line_says(
    hlbgpt: Callable[..., str], tiny: list[str], asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        fit(CONFIGS / "quickstart.yaml", settings(tiny) | asked)
    assert not Path("runs").exists()


def test_fit_raises_where_training_diverges(hlbgpt: Callable[..., str], tiny: list[str]) -> None:
    with pytest.raises(DivergedError, match="diverged"):
        fit(
            CONFIGS / "quickstart.yaml",
            settings(tiny) | {"model.optimizer.init_args.lr": 1e30, "model.lr_scheduler": None},
        )


def test_plain_objects_and_lightnings_own_trainer(tmp_path: Path) -> None:
    module = LanguageModule(
        GPT(vocab_size=256, max_sequence_length=32, width=16, num_heads=2, num_blocks=1),
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-3),
        compile=False,
    )
    data = TokenDataModule(
        PythonDocs(),
        "bytes",
        sequence_length=32,
        eval_sequence_length=32,
        cache_dir=str(tmp_path / "cache"),
    )
    trainer = L.Trainer(
        accelerator="cpu", max_steps=3, limit_val_batches=2, default_root_dir=tmp_path, logger=False
    )
    trainer.fit(module, data)
    assert module.tokens_seen == 3 * 16 * 32
    assert math.isfinite(trainer.callback_metrics["val_loss"])
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(InputError, match="contains no config"):
        PretrainedModel.from_checkpoint(tmp_path / "plain.ckpt")


@pytest.mark.parametrize("logger", [False, True, "csv"])
def test_each_trainer_without_a_folder_gets_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logger: bool | str
) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(2):
        log: Any = CSVLogger("logs") if logger == "csv" else logger
        callbacks = [TimeToTarget(target=1.0), LastCheckpoint()]
        train(folder, tmp_path, *callbacks, logger=log, default_root_dir=None)
        place = Path(f"runs/default/version_{number}")
        assert read_record(place)["step"] == 8
        assert (place / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "not a safetensors file with the settings of its network"),
        ({"net": '{"class_path": "os.system"}', "tokenizer": "bytes"}, "not a subclass of"),
        ({"net": "{}", "tokenizer": "bytes"}, "class_path"),
        ({"net": '{"class_path": "no.such"}', "tokenizer": "bytes"}, "No module named 'no'"),
        (
            {"net": '{"class_path": "hlbgpt.models.GPT"}', "tokenizer": "klingon"},
            "unknown tokenizer 'klingon'",
        ),
        (
            {"net": '{"class_path": "hlbgpt.models.GPT"}', "tokenizer": "bytes"},
            "cannot build.*GPT",
        ),
        (
            {
                "net": '{"class_path": "hlbgpt.models.GPT", "init_args": {"depth": 1}}',
                "tokenizer": "bytes",
            },
            "cannot build.*GPT.*depth",
        ),
    ],
)
def test_safetensors_of_other_networks_are_refused(
    tmp_path: Path, metadata: dict[str, str] | None, message: str
) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.zeros(2)}, path, metadata)
    with pytest.raises(InputError, match=f"x.safetensors.*{message}"):
        PretrainedModel.from_safetensors(path)


def test_a_file_that_is_not_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"not a tensor")
    for path in (tmp_path / "x", tmp_path / "missing"):
        with pytest.raises(InputError, match=f"{path}: not a safetensors file"):
            PretrainedModel.from_safetensors(path)


def test_weights_that_share_memory_are_saved(tmp_path: Path) -> None:
    settings = {"vocab_size": 8, "width": 8, "num_heads": 1, "num_blocks": 2}
    settings["max_sequence_length"] = 4
    net = GPT(**settings).eval()
    net.blocks[1] = net.blocks[0]
    model = PretrainedModel(
        net, "bytes", {"class_path": "hlbgpt.models.GPT", "init_args": settings}
    )
    model.save(tmp_path / "tied.safetensors")
    again = PretrainedModel.from_safetensors(tmp_path / "tied.safetensors")
    tokens = torch.randint(8, (2, 4))
    assert torch.equal(again.net(tokens), net(tokens))
    with pytest.raises(InputError, match="cannot be written"):
        model.save(tmp_path / "missing" / "tied.safetensors")


def test_the_package_exports_its_public_names() -> None:
    assert package.fit is fit
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        package.nothing  # noqa: B018
