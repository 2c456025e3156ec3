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
    tokens = torch.randint(256, (2, 16))
    for export in ("net.safetensors", "exports/net", "exports/net"):
        model.save(export)
        again = PretrainedModel.from_safetensors(export)
        assert (again.tokenizer, again.net_config) == (model.tokenizer, model.net_config)
        assert torch.equal(model.net(tokens), again.net(tokens))
    assert not list(Path().glob(".net*"))  # no temporary file is left
    exported = {path.name for path in Path("exports/net").iterdir()}
    assert exported == {"README.md", "config.json", "model.safetensors"}


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
    assert (
        load_tokenizer("bytes").decode_bytes(tokens.tolist()).decode(errors="replace") == texts[0]
    )
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


GPT_CONFIG = {
    "class_path": "hlbgpt.models.GPT",
    "init_args": {},
    "tokenizer": "bytes",
    "special_tokens": [],
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (None, "not a safetensors file or folder with the settings of its network"),
        ({"class_path": "os.system"}, "not a subclass of"),
        ({"class_path": 3}, "not the class_path module.Class"),
        ({"class_path": "no.such"}, r"not imported; if you trust it, allow it: allow=\['no'\]"),
        ({"tokenizer": "klingon"}, "unknown tokenizer 'klingon'; there are bytes, gpt2, .*o200k"),
        ({}, "its weights are not those of its network"),
        ({"init_args": {"depth": 1}}, "cannot build.*GPT.*depth"),
    ],
)
@pytest.mark.parametrize("folder", [False, True])
def test_safetensors_of_other_networks_are_refused(
    tmp_path: Path, changes: dict[str, Any] | None, message: str, folder: bool
) -> None:
    config = None if changes is None else json.dumps(GPT_CONFIG | changes)
    path = tmp_path / ("x" if folder else "x.safetensors")
    if folder:
        path.mkdir()
        save_file({"w": torch.zeros(2)}, path / "model.safetensors", {"format": "pt"})
        (path / "config.json").write_text(config or "[]")
    else:
        save_file({"w": torch.zeros(2)}, path, None if config is None else {"config": config})
    with pytest.raises(InputError, match=f"{path}: .*{message}"):
        PretrainedModel.from_safetensors(path)


def test_a_file_that_is_not_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"not a tensor")
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "x", tmp_path / "missing", tmp_path / "empty"):
        with pytest.raises(InputError, match=f"{path}: not a safetensors file"):
            PretrainedModel.from_safetensors(path)


def small_model(tokenizer: str = "bytes", **settings: Any) -> PretrainedModel:
    settings = {
        "vocab_size": 300,
        "width": 8,
        "num_heads": 1,
        "num_blocks": 2,
        "max_sequence_length": 32,
    } | settings
    net_config = {"class_path": "hlbgpt.models.GPT", "init_args": settings}
    return PretrainedModel(GPT(**settings).eval(), tokenizer, net_config)


def test_weights_that_share_memory_are_saved(tmp_path: Path) -> None:
    model = small_model()
    model.net.blocks[1] = model.net.blocks[0]
    tokens = torch.randint(300, (2, 4))
    for path in (tmp_path / "tied.safetensors", tmp_path / "tied"):
        model.save(path)
        again = PretrainedModel.from_safetensors(path)
        assert torch.equal(again.net(tokens), model.net(tokens))
    (tmp_path / "file").touch()
    for path in (tmp_path / "missing" / "tied.safetensors", tmp_path / "file"):
        with pytest.raises(InputError, match=f"{path}: cannot be written"):
            model.save(path)


def test_an_exported_folder_says_what_it_holds(tmp_path: Path) -> None:
    model = small_model()
    model.special_tokens = ["<|user|>"]
    model.save(tmp_path / "net")
    config = json.loads((tmp_path / "net" / "config.json").read_text())
    assert config == {
        "model_type": "hlbgpt",
        "architectures": ["GPT"],
        **model.net_config,
        "vocab_size": 300,
        "num_parameters": sum(parameter.numel() for parameter in model.net.parameters()),
        "tokenizer": "bytes",
        "special_tokens": ["<|user|>"],
        "hlbgpt_version": package.__version__,
    }
    card = (tmp_path / "net" / "README.md").read_text()
    assert f"{config['num_parameters']:,} parameters" in card
    assert "`transformers` does not know this network" in card
    (tmp_path / "net" / "README.md").write_text("mine")
    model.save(tmp_path / "net")
    assert (tmp_path / "net" / "README.md").read_text() == "mine"
    assert len({path.stat().st_mode for path in (tmp_path / "net").iterdir()}) == 1
    weights = tmp_path / "net" / "model.safetensors"  # taken alone, it is whole as well
    assert PretrainedModel.from_safetensors(weights).special_tokens == ["<|user|>"]


@pytest.mark.parametrize("written", [0, 1, 2, 3])
@pytest.mark.parametrize("over_another", [False, True])
def test_a_save_that_stops_leaves_no_folder_that_loads(
    tmp_path: Path, written: int, over_another: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of its files (weights, model card, config) was the last to be complete."""
    model, path = small_model(), tmp_path / "net"
    if over_another:
        small_model(width=16).save(path)
        (path / "README.md").unlink()
    replace, left = Path.replace, iter(range(written))

    def stopping(self: Path, target: Path) -> Path:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", stopping)
    if written == 3:
        model.save(path)
        assert PretrainedModel.from_safetensors(path).net_config == model.net_config
        return
    with pytest.raises(KeyboardInterrupt):
        model.save(path)
    with pytest.raises(InputError, match=r"not a safetensors file or folder.*config\.json"):
        PretrainedModel.from_safetensors(path)


def test_special_tokens_of_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt's are one token each; more than the network knows are refused."""
    model = small_model(vocab_size=258)
    model.special_tokens = ["<|user|>", "<|end|>"]
    model.save(tmp_path / "net")
    again = PretrainedModel.from_safetensors(tmp_path / "net")
    assert again.special_tokens == model.special_tokens
    forward, seen = again.net.forward, []

    def always_end(tokens: torch.Tensor, **cached: Any) -> torch.Tensor:
        seen.extend(tokens.flatten().tolist())
        logits = torch.where(torch.arange(258) == 257, 9.0, -99.0)
        return logits.expand_as(forward(tokens, **cached))

    monkeypatch.setattr(again.net, "forward", always_end)
    assert again.generate("a<|user|>", max_new_tokens=2) == "a<|user|><|end|><|end|>"
    assert seen == [ord("a"), 256, 257]
    assert again.generate("a", stop="<|end|>") == "a"
    again.special_tokens = ["a", "b", "c"]
    with pytest.raises(InputError, match=r"bytes \+ 3 special tokens has 259 tokens, more than"):
        again.generate("a")


def test_the_package_exports_its_public_names() -> None:
    assert package.fit is fit
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        package.nothing  # noqa: B018
