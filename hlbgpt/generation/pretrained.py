"""A trained network outside of training: loaded in a line, generating, kept as safetensors."""

import dataclasses
import importlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hlbgpt.data.tokenizer import VOCAB_SIZES, TokenizerName, load_tokenizer
from hlbgpt.generation.sampling import Generation, continue_texts
from hlbgpt.models import Network
from hlbgpt.runs.checkpoint import load_checkpoint
from hlbgpt.runs.config import IN_CHECKPOINT
from hlbgpt.utils.errors import InputError

_NET, _TOKENIZER = "net", "tokenizer"  # keys of the metadata in a safetensors file
_PREFIX = "net."  # of the network's weights in a checkpoint


@dataclasses.dataclass
class TrainedModel:
    """A network with its weights, and what is needed to use it elsewhere.

    Loading imports the class of the network that the file names, and calls it with the settings
    named there: use files of people whose code you would run.

    Attributes:
        net: In evaluation mode, on the CPU.
        tokenizer: Name of its tokenizer.
        spec: How the network is made: `class_path` and `init_args`, as in a config.
    """

    net: Network
    tokenizer: TokenizerName
    spec: dict[str, Any]

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> "TrainedModel":
        """Load a checkpoint that `hlbgpt fit` wrote, or one of `hlbgpt.fit`.

        Raises:
            InputError: No such checkpoint, or none with a config that says which network it is.
        """
        checkpoint = load_checkpoint(path)
        if not (text := checkpoint.get(IN_CHECKPOINT)):
            raise InputError(
                f"{path}: the checkpoint has no config that says which network it is of; load its "
                "state_dict into a network of your own, or train with `hlbgpt fit`"
            )
        config = yaml.safe_load(text)
        weights = {
            name.removeprefix(_PREFIX): value
            for name, value in checkpoint["state_dict"].items()
            if name.startswith(_PREFIX)
        }
        return cls._build(config["model"]["net"], config["data"]["tokenizer"], weights, path)

    @classmethod
    def from_safetensors(cls, path: str | Path) -> "TrainedModel":
        """Load what `save` wrote. Raises InputError for files of another kind."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: no safetensors file that can be read: {error}") from error
        if not {_NET, _TOKENIZER} <= metadata.keys():
            raise InputError(
                f"{path}: its metadata does not say which network it is of; use a file that "
                "`TrainedModel.save` wrote"
            )
        return cls._build(json.loads(metadata[_NET]), metadata[_TOKENIZER], weights, path)

    @classmethod
    def _build(
        cls, spec: dict[str, Any], tokenizer: Any, weights: dict[str, Any], path: str | Path
    ) -> "TrainedModel":
        if tokenizer not in VOCAB_SIZES:
            raise InputError(f"{path}: unknown tokenizer {tokenizer!r}")
        network, settings = _network_class(spec, path), spec.get("init_args") or {}
        try:
            net = network(**settings)
            net.load_state_dict(weights)
        except (TypeError, RuntimeError) as error:
            raise InputError(
                f"{path}: its weights do not fit {spec['class_path']} as it is now: "
                f"{str(error).splitlines()[0]}"
            ) from error
        return cls(net.eval(), tokenizer, {"class_path": spec["class_path"], "init_args": settings})

    def save(self, path: str | Path) -> None:
        """Write weights, the network's class and settings, and the tokenizer's name to a file.

        The file is safetensors', which holds no code, and is written whole or not at all.
        """
        path = Path(path)
        weights = {name: value.contiguous() for name, value in self.net.state_dict().items()}
        metadata = {"format": "pt", _NET: json.dumps(self.spec), _TOKENIZER: self.tokenizer}
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            save_file(weights, temporary, metadata)
            temporary.replace(path)
        except (OSError, SafetensorError) as error:
            raise InputError(f"cannot write {path}: {error}") from error
        finally:
            temporary.unlink(missing_ok=True)

    def generate(self, prompts: str | Sequence[str], **how: Any) -> Any:
        """Continue a prompt, or several at once.

        Args:
            prompts: A text, or a list of them.
            how: Settings of `hlbgpt.generation.sampling.Generation`, such as `max_new_tokens`, `top_p`.

        Returns:
            Each prompt with its continuation: a text, or a list of them.
        """
        encoding, device = load_tokenizer(self.tokenizer), next(self.net.parameters()).device
        asked = [prompts] if isinstance(prompts, str) else list(prompts)
        tokens = [torch.tensor(encoding.encode_ordinary(text), device=device) for text in asked]
        if any(not len(prompt) for prompt in tokens):
            raise InputError("prompts: an empty prompt; give some text to continue")
        texts = continue_texts(self.net, tokens, Generation(**how), encoding)
        return texts[0] if isinstance(prompts, str) else texts


def _network_class(spec: Any, path: str | Path) -> type[Network]:
    """The class that `spec` names. Raises InputError unless it is a network."""
    class_path = str(spec.get("class_path")) if isinstance(spec, dict) else str(spec)
    module, _, name = class_path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"{path}: its network {class_path!r} cannot be imported ({error}); put its file where "
            "Python finds it"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Network)):
        raise InputError(f"{path}: {class_path!r} is no hlbgpt.models.Network")
    return found
