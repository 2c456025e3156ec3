"""Networks in files of others: no foreign module is imported, and no size or tensor surprises."""

import json
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import QUICKSTART
from safetensors.torch import save_file
from test_bad_input import error_of
from test_python import small_model
from test_trust import MODULE, ran, settings_of, with_value

from hlbgpt import PretrainedModel
from hlbgpt.models import GPT
from hlbgpt.utils.errors import InputError

SUBCLASS = "from hlbgpt.models import GPT\nimport mine_too\nclass Net(GPT): ...\nthing = GPT\n"


def exported(path: Path, **changed: Any) -> Path:
    """A safetensors file of the small model, with some of its settings changed."""
    model = small_model()
    weights = {key: value.clone() for key, value in model.net.state_dict().items()}
    config = json.dumps(model._settings() | changed)
    save_file(weights, path, {"format": "pt", "config": config})
    return path


def both(folder: Path, trained: Path, class_path: Any) -> list[Callable[..., PretrainedModel]]:
    """Loads of a safetensors file and a checkpoint that name this class."""
    file = exported(folder / "a.safetensors", class_path=class_path)
    checkpoint = torch.load(trained, weights_only=True)
    settings = with_value(settings_of(trained), "model.net.class_path", class_path)
    checkpoint["hlbgpt_config"] = yaml.safe_dump(settings)
    torch.save(checkpoint, folder / "a.ckpt")
    return [
        lambda **allow: PretrainedModel.from_safetensors(file, **allow),
        lambda **allow: PretrainedModel.from_checkpoint(folder / "a.ckpt", **allow),
    ]


# --- classes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("class_path", "message"),
    [
        ("stranger.Thing", r"not imported; if you trust it, allow it: allow=\['stranger'\]"),
        ("stranger.too.Thing", r"allow=\['stranger.too'\]"),
        ("Thing", "not the class_path module"),
        ("os.system", "'os.system' is not a subclass of hlbgpt.models.Network"),
        ("hlbgpt.models.nothing", "'hlbgpt.models.nothing' is not a subclass of"),
        ("hlbgpt.cli.main.run", "'hlbgpt.cli.main.run' is not a subclass of"),
        ("torch.nn.Linear", "'torch.nn.Linear' is not a subclass of"),
        ("torch.os.system", r"allow=\['torch.os'\]"),
        ("hlbgpt.models:GPT", "'hlbgpt.models:GPT' is not a subclass of"),
        ("", "not the class_path module"),
        (["a"], "not the class_path module"),
        (None, "not the class_path module"),
    ],
)
def test_only_known_classes_are_taken(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, class_path: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("stranger.py").write_text(MODULE)
    for load in both(tmp_path, trained, class_path):
        with pytest.raises(InputError, match=message):
            load()
    assert not ran(tmp_path)


def test_a_module_that_is_allowed_is_imported(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.py").write_text(SUBCLASS)
    (tmp_path / "mine_too.py").write_text("")
    loads = both(tmp_path, trained, "mine.Net")
    try:
        for load in loads:
            with pytest.raises(InputError, match=r"allow=\['mine'\]"):
                load(allow=["mine_too", "other"])
        assert "mine" not in sys.modules
        for load in loads:
            assert type(load(allow=["mine"]).net).__name__ == "Net"
            assert type(load(allow="mine").net).__name__ == "Net"
            assert type(load().net).__name__ == "Net"  # it is imported now
        for load in both(tmp_path, trained, "mine.thing"):
            assert type(load().net) is GPT
    finally:
        for name in ("mine", "mine_too"):
            sys.modules.pop(name, None)
    for load in both(tmp_path, trained, "no_such.Net"):
        with pytest.raises(InputError, match="cannot import 'no_such', of which its network is"):
            load(allow=["no_such"])


# --- sizes ----------------------------------------------------------------------------------------

SIZES = {"vocab_size": 10**9, "max_sequence_length": 10**9, "width": 2**30}
HUGE = {
    "GPT": {**SIZES, "num_blocks": 10_000_000, "num_heads": 10**9, "loss_chunk_tokens": 10**9},
    "HLB041": {**SIZES, "num_blocks": 10_000_000},
    "FastGPT": {**SIZES, "num_blocks": 10_000_000, "num_heads": 10**9, "head_dim": 10**9},
}


@pytest.mark.parametrize(
    ("network", "name"), [(network, name) for network in HUGE for name in HUGE[network]]
)
def test_a_network_larger_than_its_weights_is_not_built(
    trained: Path, tmp_path: Path, network: str, name: str
) -> None:
    init_args = {"vocab_size": 300, "max_sequence_length": 32, "width": 8, "num_blocks": 2}
    init_args |= {"num_heads": 1} if network != "HLB041" else {}
    init_args |= {name: HUGE[network][name]}
    path = exported(
        tmp_path / "a.safetensors", class_path=f"hlbgpt.models.{network}", init_args=init_args
    )
    start = time.monotonic()
    if name == "loss_chunk_tokens":  # has nothing to do with the size
        PretrainedModel.from_safetensors(path)
    else:
        with pytest.raises(InputError, match=rf"{path}: "):
            PretrainedModel.from_safetensors(path)
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(("name", "size"), [("num_blocks", 10_000_000), ("width", 10**9)])
def test_the_command_line_builds_none_either(
    hlbgpt: Callable[..., str], trained: Path, tmp_path: Path, capfd: Any, name: str, size: int
) -> None:
    checkpoint = torch.load(trained, weights_only=True)
    key = f"model.net.init_args.{name}"
    settings = with_value(settings_of(trained), key, size)
    checkpoint["hlbgpt_config"] = yaml.safe_dump(settings)
    torch.save(checkpoint, tmp_path / "a.ckpt")
    start = time.monotonic()
    for command in ("validate", "fit"):
        message = error_of(hlbgpt, capfd, command, "--ckpt_path=a.ckpt")
        assert "is of another network: the settings describe one that is much larger" in message
    message = error_of(
        hlbgpt, capfd, "test", *QUICKSTART, f"--ckpt_path={trained}", f"--{key}={size}"
    )
    assert "is of another network: the settings describe one that is much larger" in message
    assert time.monotonic() - start < 5


# --- safetensors ----------------------------------------------------------------------------------


def with_weights(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    model = small_model()
    weights = {key: value.clone() for key, value in model.net.state_dict().items()}
    change(weights)
    save_file(weights, path, {"format": "pt", "config": json.dumps(model._settings())})
    return path


EMBEDDING = "embedding.weight"
WEIGHTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "int8": (lambda w: w.update({EMBEDDING: w[EMBEDDING].to(torch.int8)}), "is int8 in the"),
    "bool": (lambda w: w.update({EMBEDDING: w[EMBEDDING] > 0}), "embedding.weight is bool in the"),
    "complex": (lambda w: w.update({EMBEDDING: w[EMBEDDING] + 0j}), "is complex64 in the"),
    "missing": (lambda w: w.pop(EMBEDDING), "embedding.weight is missing in the checkpoint and"),
    "superfluous": (lambda w: w.update(more=torch.zeros(2)), "more is (2,) in the checkpoint and"),
    "transposed": (
        lambda w: w.update({EMBEDDING: w[EMBEDDING].T.contiguous()}),
        "is (8, 300) in the",
    ),
    "no dimensions": (lambda w: w.update({EMBEDDING: torch.zeros(())}), "is () in the checkpoint"),
    "empty": (lambda w: w.update({EMBEDDING: torch.zeros(0, 8)}), "is (0, 8) in the checkpoint"),
    "none": (lambda w: w.clear(), "is missing in the checkpoint and"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_do_not_fit_are_named(tmp_path: Path, case: str) -> None:
    change, message = WEIGHTS[case]
    with pytest.raises(InputError) as error:
        PretrainedModel.from_safetensors(with_weights(tmp_path / "a.safetensors", change))
    assert "a.safetensors: its weights are not those of its network: " in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_another_precision_fit(tmp_path: Path, dtype: torch.dtype) -> None:
    path = with_weights(
        tmp_path / "a.safetensors",
        lambda weights: weights.update({key: value.to(dtype) for key, value in weights.items()}),
    )
    assert PretrainedModel.from_safetensors(path).net.embedding.weight.dtype == torch.float32


def deep(depth: int) -> str:
    return "[" * depth + "]" * depth


SETTINGS: dict[str, Any] = {
    "deep JSON": deep(100_000),
    "deep arguments": f'{{"class_path": "hlbgpt.models.GPT", "init_args": {deep(100_000)}}}',
    "no JSON": "{",
    "a list": "[]",
    "a number": "7",
    "a huge number": "9" * 5000,
    "nothing": "",
    "half a character": '{"class_path": "\\ud800"}',
    "no class": {"class_path": None},
    "a class in a list": {"class_path": ["hlbgpt.models.GPT"]},
    "arguments in a list": {"init_args": [1]},
    "a text as arguments": {"init_args": "width"},
    "an unknown argument": {"init_args": {"widht": 8}},
    "a text as width": {"init_args": {"width": "8"}},
    "NaN": {"init_args": {"width": float("nan")}},
    "a huge width": {"init_args": {"width": 10**400}},
    "a class as width": {"init_args": {"width": {"class_path": "os.system"}}},
    "no tokenizer": {"tokenizer": None},
    "a tokenizer in a list": {"tokenizer": ["bytes"]},
    "an unknown tokenizer": {"tokenizer": "x"},
    "special tokens as text": {"special_tokens": "ab"},
    "special numbers": {"special_tokens": [1]},
    "special tokens in a dict": {"special_tokens": {"a": 1}},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_odd_settings_are_refused(tmp_path: Path, case: str) -> None:
    changed = SETTINGS[case]
    model = small_model()
    text = changed if isinstance(changed, str) else json.dumps(model._settings() | changed)
    file, folder = tmp_path / "a.safetensors", tmp_path / "a"
    save_file(dict(model.net.state_dict()), file, {"format": "pt", "config": text})
    folder.mkdir()
    save_file(dict(model.net.state_dict()), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(text)
    for path in (file, folder):
        with pytest.raises(InputError) as error:
            PretrainedModel.from_safetensors(path)
        assert str(error.value).startswith(f"{path}: ")
        assert len(str(error.value)) < 800


HEADERS = {
    "no file": b"",
    "short": b"\x00\x00",
    "a huge header": struct.pack("<Q", 1 << 60),
    "a deep header": struct.pack("<Q", 200_000) + deep(100_000).encode(),
    "no JSON": struct.pack("<Q", 2) + b"{]",
    "an offset outside": struct.pack("<Q", 60)
    + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'.ljust(60),
    "metadata of numbers": struct.pack("<Q", 28) + b'{"__metadata__":{"config":1}}'[:28],
}


@pytest.mark.parametrize("case", HEADERS)
def test_broken_files_are_refused(tmp_path: Path, case: str) -> None:
    (tmp_path / "a.safetensors").write_bytes(HEADERS[case])
    with pytest.raises(InputError, match=r"a\.safetensors: not a safetensors file"):
        PretrainedModel.from_safetensors(tmp_path / "a.safetensors")


GPT_NET = "model: {net: {class_path: hlbgpt.models.GPT}}"


@pytest.mark.parametrize(
    "settings",
    [
        *("[]", "a: 1", "model: {net: 1}", "model: []", "model: {net: {}}", "7", ""),
        *("a: *b", "&a [*a]", "a: 1\na: 2"),
        f"{GPT_NET}\ndata: {{tokenizer: [bytes]}}",
        f"{GPT_NET}\ndata: {{tokenizer: bytes, special_tokens: a}}",
        f"{GPT_NET}\ndata: bytes",
    ],
)
def test_odd_settings_in_a_checkpoint_are_refused(
    trained: Path, tmp_path: Path, settings: str
) -> None:
    checkpoint = torch.load(trained, weights_only=True)
    checkpoint["hlbgpt_config"] = settings
    torch.save(checkpoint, path := tmp_path / "a.ckpt")
    with pytest.raises(InputError, match=f"{path}: "):
        PretrainedModel.from_checkpoint(path)


def test_tied_weights_come_back(tmp_path: Path) -> None:
    model = small_model(max_sequence_length=300)
    net: Any = model.net
    net.position_embedding.weight = net.embedding.weight
    tokens = torch.randint(300, (2, 4))
    for path in (tmp_path / "tied.safetensors", tmp_path / "tied"):
        model.save(path)
        again = PretrainedModel.from_safetensors(path)
        assert torch.equal(again.net(tokens), model.net(tokens))
