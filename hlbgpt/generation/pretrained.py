"""Pretrained networks: load from a checkpoint or safetensors, generate, save as safetensors."""

import dataclasses
import importlib
import json
import reprlib
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from hlbgpt import __version__
from hlbgpt.data.tokenizer import load_tokenizer, require_tokenizer
from hlbgpt.generation.sampling import SamplingConfig, continue_prompts
from hlbgpt.models import Network
from hlbgpt.runs.checkpoint_io import load_checkpoint, other_weights
from hlbgpt.runs.config import CONFIG_KEY, load_yaml
from hlbgpt.runs.sizes import build_for_weights
from hlbgpt.utils.errors import InputError
from hlbgpt.utils.files import atomic_write

_WEIGHTS, _CONFIG = "model.safetensors", "config.json"  # as the Hugging Face hub names them
_BAD_VALUES = (TypeError, ValueError)  # of JSON
_MODEL_CARD = """---
library_name: hlbgpt
pipeline_tag: text-generation
---
# {name}

A `{class_path}` with {num_parameters:,} parameters and the tokenizer `{tokenizer}`, written by
hlbgpt {hlbgpt_version}. Hugging Face's `transformers` does not know this network. To use it:

```python
from hlbgpt import PretrainedModel

print(PretrainedModel.from_safetensors("{name}").generate("The "))
```
"""


@dataclasses.dataclass
class PretrainedModel:
    """A trained network that can be used without a config file or a trainer.

    A file holds no code, but the name of its network's class. That may be a class of
    `hlbgpt.models`, of a module that is imported already, or of a module that is named in `allow`;
    no other module is imported.

    Attributes:
        net: The network in evaluation mode, on the CPU after loading.
        tokenizer: Name of its tokenizer.
        net_config: The network's `class_path` and `init_args`, as in a config file.
        special_tokens: Those added to the tokenizer; see `TokenDataModule`.
    """

    net: Network
    tokenizer: str
    net_config: dict[str, Any]
    special_tokens: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def from_checkpoint(cls, path: str | Path, allow: Sequence[str] = ()) -> "PretrainedModel":
        """Load a checkpoint that `hlbgpt fit` or `hlbgpt.fit` wrote; InputError for any other.

        Args:
            path: The file.
            allow: Modules that may be imported for the network's class, such as `["mine"]`.
        """
        checkpoint = load_checkpoint(path)
        if not (text := checkpoint.get(CONFIG_KEY)):
            raise InputError(
                f"{path}: the checkpoint contains no config, so its network is unknown; load its "
                "state_dict into a network of your own, or train with `hlbgpt fit`"
            )
        config, state = load_yaml(text, f"{path}: its settings"), checkpoint["state_dict"]
        weights = {k.removeprefix("net."): v for k, v in state.items() if k.startswith("net.")}
        return cls._build(
            path,
            weights,
            _entry(path, config, "model", "net"),
            _entry(path, config, "data", "tokenizer"),
            config["data"].get("special_tokens", []),
            allow,
        )

    @classmethod
    def from_safetensors(cls, path: str | Path, allow: Sequence[str] = ()) -> "PretrainedModel":
        """Load a file or a folder that `save` wrote; InputError for any other.

        Args:
            path: The file or folder.
            allow: Modules that may be imported for the network's class, such as `["mine"]`.
        """
        path = Path(path)
        file = path / _WEIGHTS if path.is_dir() else path
        try:
            if path.is_dir():
                text = (path / _CONFIG).read_text(encoding="utf-8")
            else:
                with safe_open(file, framework="pt") as opened:
                    text = (opened.metadata() or {})["config"]
            config, weights = json.loads(text), load_file(file)
            net_config = {key: config[key] for key in ("class_path", "init_args")}
            tokenizer, special_tokens = config["tokenizer"], config["special_tokens"]
        except (OSError, SafetensorError, LookupError, RecursionError, *_BAD_VALUES) as error:
            raise InputError(
                f"{path}: not a safetensors file or folder with the settings of its network "
                f"({type(error).__name__}: {textwrap.shorten(str(error), 300)}); use one that "
                "`PretrainedModel.save` wrote"
            ) from error
        return cls._build(path, weights, net_config, tokenizer, special_tokens, allow)

    @classmethod
    def _build(
        cls,
        path: Any,
        weights: Mapping[str, torch.Tensor],
        net_config: Any,
        tokenizer: Any,
        special_tokens: Any,
        allow: Sequence[str],
    ) -> "PretrainedModel":
        if not isinstance(special_tokens, list) or not all(
            isinstance(text, str) for text in (tokenizer, *special_tokens)
        ):
            raise InputError(f"{path}: its tokenizer and special_tokens are not text; use another")
        require_tokenizer(tokenizer, path)
        network_class, settings = _network_class(path, net_config, allow)
        try:
            net = build_for_weights(network_class, weights, str(path), **settings)
        except Exception as error:  # of any kind, since the settings come from a file
            raise InputError(
                f"{path}: cannot build its network: {textwrap.shorten(str(error), 300)}; its class "
                "must be the same as when the file was written"
            ) from error
        if problem := other_weights(net, weights):
            raise InputError(
                f"{path}: its weights are not those of its network: {problem}; use another file"
            )
        net.load_state_dict(dict(weights))
        return cls(net.eval(), tokenizer, net_config, special_tokens)

    def save(self, path: str | Path) -> None:
        """Write weights, network settings and the tokenizer's name, but no code.

        A path that ends in `.safetensors` is a single file. Any other is a folder, as on the
        Hugging Face hub: `model.safetensors`, `config.json` and, unless there is one, `README.md`.
        Hugging Face's `transformers` does not know the network: `from_safetensors` reads both.
        """
        path = Path(path)
        settings = self._settings()
        config = json.dumps(settings, indent=2)
        try:
            if path.suffix == ".safetensors":
                self._save_weights(path, config)
                return
            path.mkdir(parents=True, exist_ok=True)
            # Gone before the weights change, and written last: without it, no folder loads.
            (path / _CONFIG).unlink(missing_ok=True)
            self._save_weights(path / _WEIGHTS, config)
            if not (card := path / "README.md").exists():
                _write_text(card, _MODEL_CARD.format(name=path.resolve().name, **settings))
            _write_text(path / _CONFIG, config)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: cannot be written ({error}); choose another path") from error

    def _save_weights(self, file: Path, config: str) -> None:
        # Cloned, because safetensors refuses tensors that share memory.
        weights = {k: v.contiguous().clone() for k, v in self.net.state_dict().items()}
        with atomic_write(file) as temporary:
            # Not `save_file`, whose files only their owner may read.
            temporary.write_bytes(save(weights, {"format": "pt", "config": config}))

    def _settings(self) -> dict[str, Any]:
        return {
            # Not one that transformers knows. Without any, it would guess from the folder's name.
            "model_type": "hlbgpt",
            "architectures": [type(self.net).__name__],
            "class_path": self.net_config["class_path"],
            "init_args": self.net_config.get("init_args") or {},
            "vocab_size": self.net.vocab_size,
            "num_parameters": sum(parameter.numel() for parameter in self.net.parameters()),
            "tokenizer": self.tokenizer,
            "special_tokens": self.special_tokens,
            "hlbgpt_version": __version__,
        }

    def generate(self, prompts: str | Sequence[str], **sampling: Any) -> Any:
        """Continue one prompt (str), or several in one batch (list of str).

        `sampling` are fields of `hlbgpt.generation.SamplingConfig`, such as `max_new_tokens`.
        Returns each prompt with its continuation: a text, or a list of texts.
        """
        tokenizer = load_tokenizer(self.tokenizer, self.special_tokens)
        device = next(self.net.parameters()).device
        if tokenizer.vocab_size > self.net.vocab_size:
            raise InputError(
                f"special_tokens: {tokenizer} has {tokenizer.vocab_size} tokens, more than the "
                f"network's vocab_size {self.net.vocab_size}; leave some out"
            )
        batch = [prompts] if isinstance(prompts, str) else list(prompts)
        if "" in batch:
            raise InputError("prompts: one is empty; give each some text to continue")
        tokens = [torch.tensor(tokenizer.encode(text), device=device) for text in batch]
        texts = continue_prompts(self.net, tokens, SamplingConfig(**sampling), tokenizer)
        return texts[0] if isinstance(prompts, str) else texts


def _entry(path: Any, config: Any, section: str, name: str) -> Any:
    """An entry of the settings in a checkpoint, which may be odd."""
    try:
        return config[section][name]
    except (LookupError, TypeError):
        raise InputError(
            f"{path}: its settings have no {section}.{name}; use a checkpoint that `fit` wrote"
        ) from None


def _network_class(
    path: Any, net_config: Any, allow: Sequence[str]
) -> tuple[type[Network], dict[str, Any]]:
    """The class that a file names, and its arguments; raises InputError for one not allowed."""
    class_path = net_config.get("class_path") if isinstance(net_config, dict) else None
    settings = net_config.get("init_args") or {} if isinstance(net_config, dict) else None
    if not isinstance(class_path, str) or "." not in class_path or not isinstance(settings, dict):
        raise InputError(
            f"{path}: its network is {reprlib.repr(net_config)}, not the class_path module.Class "
            "with init_args; use another file"
        )
    module_name, _, name = class_path.rpartition(".")
    allowed = [allow] if isinstance(allow, str) else allow
    if module_name in allowed:
        try:
            importlib.import_module(module_name)
        except ImportError as error:
            raise InputError(
                f"{path}: cannot import {module_name!r:.200}, of which its network is: {error}; "
                "make it importable"
            ) from error
    elif module_name not in sys.modules:
        raise InputError(
            f"{path}: its network is {class_path!r:.200}, of a module that is not imported; if you "
            f"trust it, allow it: allow=[{module_name!r:.200}]"
        )
    # Not `getattr`: a module may import others for it.
    found = vars(sys.modules[module_name]).get(name)
    if not isinstance(found, type) or not issubclass(found, Network):
        raise InputError(
            f"{path}: cannot build its network: {class_path!r:.200} is not a subclass of "
            "hlbgpt.models.Network; its class must be the same as when the file was written"
        )
    return found, {str(key): value for key, value in settings.items()}


def _write_text(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
