"""Pretrained networks: load from a checkpoint or safetensors, generate, save as safetensors."""

import dataclasses
import json
import pkgutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from hlbgpt.data.tokenizer import VOCAB_SIZES, TokenizerName, load_tokenizer
from hlbgpt.generation.sampling import SamplingConfig, continue_prompts
from hlbgpt.models import Network
from hlbgpt.runs.checkpoint_io import load_checkpoint
from hlbgpt.runs.config import CONFIG_KEY
from hlbgpt.utils.errors import InputError
from hlbgpt.utils.files import atomic_write


@dataclasses.dataclass
class PretrainedModel:
    """A trained network that can be used without a config file or a trainer.

    Loading imports and calls the class that the file names: load only files of people whose code
    you would run.

    Attributes:
        net: The network in evaluation mode, on the CPU after loading.
        tokenizer: Name of its tokenizer.
        net_config: The network's `class_path` and `init_args`, as in a config file.
    """

    net: Network
    tokenizer: TokenizerName
    net_config: dict[str, Any]

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> "PretrainedModel":
        """Load a checkpoint that `hlbgpt fit` or `hlbgpt.fit` wrote; InputError for any other."""
        checkpoint = load_checkpoint(path)
        if not (text := checkpoint.get(CONFIG_KEY)):
            raise InputError(
                f"{path}: the checkpoint contains no config, so its network is unknown; load its "
                "state_dict into a network of your own, or train with `hlbgpt fit`"
            )
        config, state = yaml.safe_load(text), checkpoint["state_dict"]
        weights = {k.removeprefix("net."): v for k, v in state.items() if k.startswith("net.")}
        return cls._build(config["model"]["net"], config["data"]["tokenizer"], weights, path)

    @classmethod
    def from_safetensors(cls, path: str | Path) -> "PretrainedModel":
        """Load a file that `save` wrote; InputError for any other."""
        try:
            weights = load_file(path)
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
            net_config, tokenizer = json.loads(metadata["net"]), metadata["tokenizer"]
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise InputError(
                f"{path}: not a safetensors file with the settings of its network ({error!r}); "
                "use a file that `PretrainedModel.save` wrote"
            ) from error
        return cls._build(net_config, tokenizer, weights, path)

    @classmethod
    def _build(cls, net_config: Any, tokenizer: Any, weights: Any, path: Any) -> "PretrainedModel":
        try:
            if tokenizer not in VOCAB_SIZES:
                raise ValueError(f"unknown tokenizer {tokenizer!r}")
            network_class = pkgutil.resolve_name(net_config["class_path"])
            if not (isinstance(network_class, type) and issubclass(network_class, Network)):
                raise TypeError(f"{network_class} is not a subclass of hlbgpt.models.Network")
            net = network_class(**(net_config.get("init_args") or {}))
            net.load_state_dict(weights)
        except (ImportError, LookupError, AttributeError, TypeError, ValueError, RuntimeError) as e:
            raise InputError(
                f"{path}: cannot build its network: {textwrap.shorten(str(e), 300)}; its class "
                "must be importable and the same as when the file was written"
            ) from e
        return cls(net.eval(), tokenizer, net_config)

    def save(self, path: str | Path) -> None:
        """Write weights, network settings and the tokenizer's name, but no code, to safetensors."""
        # Cloned, because safetensors refuses tensors that share memory.
        weights = {k: v.contiguous().clone() for k, v in self.net.state_dict().items()}
        net_config = json.dumps(self.net_config)
        metadata = {"format": "pt", "net": net_config, "tokenizer": self.tokenizer}
        try:
            with atomic_write(Path(path)) as temporary:
                save_file(weights, temporary, metadata)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: cannot be written ({error}); choose another path") from error

    def generate(self, prompts: str | Sequence[str], **sampling: Any) -> Any:
        """Continue one prompt (str), or several in one batch (list of str).

        `sampling` are fields of `hlbgpt.generation.SamplingConfig`, such as `max_new_tokens`.
        Returns each prompt with its continuation: a text, or a list of texts.
        """
        encoding, device = load_tokenizer(self.tokenizer), next(self.net.parameters()).device
        batch = [prompts] if isinstance(prompts, str) else list(prompts)
        if "" in batch:
            raise InputError("prompts: one is empty; give each some text to continue")
        tokens = [torch.tensor(encoding.encode_ordinary(text), device=device) for text in batch]
        texts = continue_prompts(self.net, tokens, SamplingConfig(**sampling), encoding)
        return texts[0] if isinstance(prompts, str) else texts
