"""A stranger's checkpoint: whatever its settings name or lies around it, nothing of it runs."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import CONFIGS, LAST, QUICKSTART
from test_bad_input import error_of
from test_code_in_configs import importing_settings

from hlbgpt.cli.main import _parse
from hlbgpt.cli.save_config import as_yaml
from hlbgpt.runs.trust import foreign_name, trust_flag

COMMANDS = ("fit", "validate", "test", "predict")
CLASS = "stranger.Thing"
ITEM = {"class_path": CLASS}
# A module that leaves a mark when it is imported.
MODULE = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\nclass Thing: ...\n"
LAMBDA = "lightning.pytorch.callbacks.LambdaCallback"
# What may stand for a class in a setting, or around one.
FORMS: dict[str, Any] = {
    "name": CLASS,
    "class": ITEM,
    "class and arguments": {**ITEM, "init_args": {"a": 1}},
    "list of names": [CLASS],
    "list of classes": [{"class_path": "hlbgpt.callbacks.Samples"}, ITEM],
    "file": "class.yaml",
    "absolute file": "FOLDER/class.yaml",
    "class as text": json.dumps(ITEM),
    "name in quotes": f"'{CLASS}'",
    "list as text": f"[{CLASS}]",
    "function": {"class_path": LAMBDA, "init_args": {"on_fit_start": CLASS}},
    "function of a library": {"class_path": LAMBDA, "init_args": {"on_fit_start": "os.getcwd"}},
    "other arguments": {"class_path": LAMBDA, "dict_kwargs": {"deep": [{"er": ITEM}]}},
    "class of an argument": {
        "class_path": "lightning.pytorch.strategies.DDPStrategy",
        "init_args": {"ddp_comm_state": ITEM},
    },
    "class that runs a command line": {
        "class_path": "lightning.pytorch.cli.LightningCLI",
        "init_args": {"args": ["--config=class.yaml"]},
    },
    "own command line": {"class_path": "hlbgpt.cli.lightning_cli.CLI", "init_args": {"words": []}},
    "library of a library": {
        "class_path": "torch.os.system",
        "init_args": {"command": "touch ran"},
    },
    "no name": {"class_path": ["stranger", "Thing"]},
    "arguments of a file": {"init_args": "class.yaml"},
}


def place(folder: Path, trained: Path, settings: Any) -> Path:
    """A folder as a stranger may send it: module, configs and a checkpoint with these settings."""
    for where in (folder, folder / "x", folder / "x" / "y"):
        where.mkdir(exist_ok=True)
        (where / "stranger.py").write_text(MODULE)
        (where / "class.yaml").write_text(yaml.safe_dump(ITEM))
        (where / "config.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [ITEM]}}))
    checkpoint = torch.load(trained, weights_only=True)
    checkpoint["hlbgpt_config"] = (
        settings if isinstance(settings, str) else yaml.safe_dump(settings)
    )
    torch.save(checkpoint, path := folder / "x" / "y" / "last.ckpt")
    return path


def settings_of(trained: Path) -> dict[str, Any]:
    return yaml.safe_load(torch.load(trained, weights_only=True)["hlbgpt_config"])


def with_value(settings: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    changed = json.loads(json.dumps(settings))
    *sections, name = key.split(".")
    where = changed
    for section in sections:
        where = where[section]
    where[name] = value
    return changed


def ran(folder: Path) -> bool:
    return "stranger" in sys.modules or bool(list(folder.rglob("ran")))


def hostile(trained: Path, folder: Path, form: str) -> list[dict[str, Any]]:
    """Settings with a form in each place that imports what it names, also with a dotted key."""
    settings = settings_of(trained)
    value = json.loads(json.dumps(FORMS[form]).replace("FOLDER", str(folder)))
    nested = [with_value(settings, key, value) for key in importing_settings()]
    return [*nested, *({**settings, key: value} for key in importing_settings())]


def require_refusal(run: Callable[..., str], capfd: Any, command: str, path: Path) -> None:
    words = ["--data.prompts=a"] if command == "predict" else []
    message = error_of(run, capfd, command, "--ckpt_path", str(path), *words)
    assert "; add --trust if you trust whoever made the checkpoint, or --config with" in message


@pytest.mark.parametrize("form", FORMS)
def test_nothing_of_a_hostile_folder_runs(
    hlbgpt: Callable[..., str], trained: Path, tmp_path: Path, capfd: Any, form: str
) -> None:
    """All settings are looked at, and some, others for each form, given to the commands."""
    path = place(tmp_path, trained, "")
    sys.path.append(str(tmp_path))  # as the command line does
    found = hostile(trained, tmp_path, form)
    assert len(found) == 2 * 17
    for settings in found:
        assert foreign_name(settings) is not None
    first = list(FORMS).index(form)
    for number, command in enumerate(COMMANDS):
        path = place(tmp_path, trained, found[(first + 7 * number) % len(found)])
        require_refusal(hlbgpt, capfd, command, path)
    assert not ran(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_nothing_runs_in_any_command(
    hlbgpt: Callable[..., str], trained: Path, tmp_path: Path, capfd: Any, form: str
) -> None:
    for settings in hostile(trained, tmp_path, form):
        path = place(tmp_path, trained, settings)
        for command in COMMANDS:
            require_refusal(hlbgpt, capfd, command, path)
    assert not ran(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        "trainer: {callbacks: [{class_path: stranger.Thing}]}",
        "{config: class.yaml}",
        "{config: [config.yaml]}",
        "{model.net.class_path: stranger.Thing}",
        "trainer: {callbacks+: stranger.Thing}",
        "trainer: {callbacks+: [{class_path: stranger.Thing}]}",
        "trainer: class.yaml",
        "model: {net: {class_path: torch.optim.SGD, init_args: {a: {class_path: stranger.Thing}}}}",
        "data: {tokenizer: {class_path: stranger.Thing}}",
        "x: &x {class_path: stranger.Thing}\ntrainer: {callbacks: [*x]}",
        "trainer: {<<: {callbacks: stranger.Thing}}",
        "trust: true\ntrainer: {callbacks: stranger.Thing}",
        "print_config: stranger.Thing",
        "!!python/name:stranger.Thing",
        "!!python/object/apply:os.system [touch ran]",
        "stranger.Thing",
        "class.yaml",
        "[stranger.Thing]",
        "a: 1\na: 2",
    ],
)
def test_odd_settings_are_refused(
    hlbgpt: Callable[..., str], trained: Path, tmp_path: Path, capfd: Any, settings: str
) -> None:
    path = place(tmp_path, trained, settings)
    for name in ("class.yaml", settings):  # a file with the name of the settings is no config
        (tmp_path / name.replace("/", " ")).write_text("trainer: {callbacks: stranger.Thing}")
    assert "ckpt_path: " in error_of(hlbgpt, capfd, "validate", "--ckpt_path", str(path))
    assert not ran(tmp_path)


def test_a_file_that_is_called_like_the_settings_is_no_config(
    hlbgpt: Callable[..., str], trained: Path, tmp_path: Path
) -> None:
    path = place(tmp_path, trained, settings_of(trained))
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["hlbgpt_config"] = text = "{trainer: {accelerator: cpu}}"
    torch.save(checkpoint, path)
    Path(text).write_text(yaml.safe_dump({"trainer": {"callbacks": [ITEM]}}))
    with pytest.raises(SystemExit):  # there is no network in these settings
        hlbgpt("validate", "--ckpt_path", path)
    assert not ran(tmp_path)


def test_the_settings_in_a_checkpoint_count_and_not_what_lies_around_it(
    hlbgpt: Callable[..., str], trained: Path, tmp_path: Path, capfd: Any
) -> None:
    path = place(tmp_path, trained, settings_of(trained))
    sampling = ["--data.prompts=a", "--model.sampling.max_new_tokens=1"]
    assert hlbgpt("predict", "--ckpt_path", path, *sampling).startswith("a")
    assert not ran(tmp_path)
    # With the folder's own config, or with --trust, it does run: this is what the rest is about.
    bad = place(tmp_path, trained, with_value(settings_of(trained), "trainer.callbacks", [ITEM]))
    for words in (["--trust"], ["--config", "config.yaml"]):
        message = error_of(hlbgpt, capfd, "predict", "--ckpt_path", str(bad), *sampling, *words)
        assert "--trust" not in message.replace("--ckpt", "")
        assert ran(tmp_path)
        (tmp_path / "ran").unlink()
        sys.modules.pop("stranger")


@pytest.mark.parametrize("key", importing_settings())
@pytest.mark.slow
def test_each_setting_would_run_with_trust(
    hlbgpt: Callable[..., str], trained: Path, tmp_path: Path, key: str
) -> None:
    path = place(tmp_path, trained, with_value(settings_of(trained), key, ITEM))
    with pytest.raises(SystemExit):
        hlbgpt("validate", "--ckpt_path", path, "--trust")
    assert ran(tmp_path)


def test_a_checkpoint_without_settings_asks_for_them(
    hlbgpt: Callable[..., str], trained: Path, tmp_path: Path, capfd: Any
) -> None:
    path = place(tmp_path, trained, "")
    message = error_of(hlbgpt, capfd, "test", "--ckpt_path", str(path))
    assert message.endswith("last.ckpt' holds no settings of its run; add --config with them")


# --- the user's own runs --------------------------------------------------------------------------


@pytest.mark.parametrize("config", [path.name for path in sorted(CONFIGS.glob("*.yaml"))])
@pytest.mark.parametrize("overlay", [None, "ddp"])
def test_shipped_configs_need_no_trust(config: str, overlay: str | None) -> None:
    words = ["--config", str(CONFIGS / config)]
    if overlay:
        words += ["--config", str(CONFIGS / "machines" / f"{overlay}.yaml")]
    cli = _parse(["fit", *words], device="meta")
    assert foreign_name(yaml.safe_load(as_yaml(cli._parser("fit"), cli.settings))) is None


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"data": {"tokenizer": "os.path", "prompts": ["os.path", "a.yaml"]}}, None),
        ({"data": {"source": {"class_path": "hlbgpt.data.TextFiles", "init_args": {}}}}, None),
        ({"trainer": {"strategy": "ddp", "profiler": "simple", "max_time": "00:01:00:00"}}, None),
        ({"trainer": {"callbacks": [{"class_path": "hlbgpt.callbacks.Samples"}]}}, None),
        ({"trainer": {"callbacks": ["EarlyStopping"], "logger": False}}, None),
        ({"ckpt_path": "a.yaml", "run_name": "os.path"}, None),
        ({"model": {"sampling": {"stop": ["os.path", "a.yaml", "\n\n"]}}}, None),
        ({"trainer": {"strategy": "wiki.train.raw"}}, None),  # no module of this name
        ({"trainer": {"strategy": "os.path"}}, "os.path"),
        ({"trainer": {"strategy": "a.yaml"}}, "a.yaml"),
        ({"model": {"net": {"class_path": "mine.Net"}}}, "mine.Net"),
        ({"model": {"net": {"class_path": "torch.nn.Linear"}}}, "torch.nn.Linear"),
        ({"model": {"net": {"class_path": "torch.no.such.Thing"}}}, "torch.no.such.Thing"),
    ],
)
def test_what_settings_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: Any, name: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("{}")
    assert foreign_name(settings) == name


HELLO = """
import lightning as L


class SayHello(L.Callback):
    def on_train_start(self, trainer, pl_module):
        print("hello")
"""


def test_a_run_with_a_class_of_ones_own_says_what_it_needs(
    hlbgpt: Callable[..., str], tiny: list[str], capfd: Any
) -> None:
    Path("mine.py").write_text(HELLO)
    out = hlbgpt("fit", *QUICKSTART, *tiny, "--trainer.callbacks+=mine.SayHello")
    assert f"text: hlbgpt predict --ckpt_path {LAST} --trust --data.prompts 'The '\n" in out
    more = [f"--ckpt_path={LAST}", "--trainer.max_steps=5"]
    message = error_of(hlbgpt, capfd, "fit", "--ckpt_path=last", more[1])
    assert f"the settings in '{LAST}' name 'mine.SayHello', which is no class of hlbgpt" in message
    assert "hello" in hlbgpt("fit", *more, "--trust")
    own = Path("runs/quickstart/version_0/config.yaml")
    assert trust_flag(own.parent) == " --trust"
    assert "hello" in hlbgpt("fit", *more, "--config", own)
    assert sorted(path.name for path in Path("runs/quickstart").iterdir()) == [
        "version_0",
        "version_1",
        "version_2",
    ]


@pytest.mark.slow
def test_files_of_the_current_folder_stand_in_for_no_library(trained: Path, tmp_path: Path) -> None:
    path = place(tmp_path, trained, settings_of(trained))
    for name in ("tensorboard", "safetensors", "tiktoken_ext", "datasets", "rich", "psutil"):
        (tmp_path / f"{name}.py").write_text(MODULE)
    words = ["predict", "--ckpt_path", path, "--data.prompts=a"]
    script = tmp_path.with_name("script.py")
    script.write_text("from hlbgpt.__main__ import main\nmain()\n")
    subprocess.run([sys.executable, script, *words], cwd=tmp_path, check=True)
    assert not list(tmp_path.rglob("ran"))
