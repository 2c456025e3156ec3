"""Text samples during and after training, to see what the network has learned."""

import dataclasses
import textwrap

import lightning as L
import torch

from hlbgpt.generation import SamplingConfig, continue_prompts
from hlbgpt.runs.logger import tensorboard_loggers
from hlbgpt.training.module import LanguageModule
from hlbgpt.utils.errors import InputError, require_positive

_WRAPPER = textwrap.TextWrapper(
    100, expand_tabs=False, replace_whitespace=False, drop_whitespace=False
)


class Samples(L.Callback):
    """Continues prompts with the settings of `model.sampling`.

    Logs short texts to TensorBoard's tab "Text" after each validation, and prints longer ones at
    the end of training. Sampling has its own random seed, so it does not affect training, and a
    sample changes only because the network has changed.

    Args:
        prompts: Text to continue, or a list of texts.
        max_new_tokens: Tokens to add to each prompt after a validation; this takes validation time.
            At the end of training `model.sampling.max_new_tokens` applies.
    """

    def __init__(self, prompts: list[str] | str, max_new_tokens: int = 64) -> None:
        require_positive("Samples ", max_new_tokens=max_new_tokens)
        self.prompts = [prompts] if isinstance(prompts, str) else prompts
        self.max_new_tokens = max_new_tokens
        if not self.prompts or "" in self.prompts:
            raise InputError(f"Samples prompts: {prompts!r} holds no text to continue; add some")

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log samples with the step of this validation's other values."""
        assert isinstance(pl_module, LanguageModule)
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if not (loggers := tensorboard_loggers(trainer.loggers)):
            return
        config = dataclasses.replace(pl_module.sampling, max_new_tokens=self.max_new_tokens)
        texts = self._continue(trainer, pl_module, config)
        for logger in loggers if texts else []:  # of rank 0
            for prompt, text in zip(self.prompts, texts, strict=True):
                name = f"samples/{prompt.strip()}"
                logger.experiment.add_text(name, _as_code(text), trainer.global_step)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print samples here because the clock may still be running in `on_train_end`."""
        assert isinstance(pl_module, LanguageModule)
        pl_module.net.eval()
        rule = "-" * 80
        texts = f"\n{rule}\n".join(self._continue(trainer, pl_module, pl_module.sampling))
        pl_module.print(f"samples of the trained network:\n{rule}\n{texts}\n{rule}")

    def _continue(
        self, trainer: L.Trainer, module: LanguageModule, config: SamplingConfig
    ) -> list[str]:
        """The texts, on rank 0; all ranks must call it."""
        data = module.data
        prompts = [torch.tensor(data.encode(text), device=module.device) for text in self.prompts]
        with module.whole_net() as net, trainer.precision_plugin.forward_context():
            if not trainer.is_global_zero:
                return []
            return continue_prompts(net, prompts, config, data.encoding)


def _as_code(text: str) -> str:
    """Markdown of a code block, which shows every character, in lines of limited width."""
    wrapped = [part for line in text.splitlines() for part in _WRAPPER.wrap(line) or [""]]
    return "\n".join(f"    {line}" for line in wrapped)
