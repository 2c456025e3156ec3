"""Generated text, to see with one's own eyes what was learned."""

import dataclasses
import textwrap

import lightning as L
import torch

from hlbgpt.generation.sampling import Generation, continue_texts
from hlbgpt.runs.logger import text_loggers
from hlbgpt.training.module import LanguageModule
from hlbgpt.utils.errors import InputError, require_positive

_WRAPPER = textwrap.TextWrapper(
    100, expand_tabs=False, replace_whitespace=False, drop_whitespace=False
)


class Samples(L.Callback):
    """Shows how the network continues prompts, by `model.generation`.

    After each validation short texts go to TensorBoard's tab "Text"; after training longer ones are
    printed. The draws have a seed of their own, so a sample changes because the network has, and
    training does not notice.

    Args:
        prompts: Texts to continue; one, or a list.
        max_new_tokens: Tokens to add to each after a validation, whose time they count as; at the
            end of training it is as many as `model.generation` says.
    """

    def __init__(self, prompts: list[str] | str, max_new_tokens: int = 32) -> None:
        require_positive("Samples ", max_new_tokens=max_new_tokens)
        self.prompts = [prompts] if isinstance(prompts, str) else prompts
        self.max_new_tokens = max_new_tokens
        if not self.prompts or "" in self.prompts:
            raise InputError("Samples prompts: empty, nothing to continue; give some text")

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LanguageModule)
        if trainer.sanity_checking or trainer.state.fn != "fit" or not trainer.is_global_zero:
            return
        if not (loggers := text_loggers(trainer.loggers)):
            return
        how = dataclasses.replace(pl_module.generation, max_new_tokens=self.max_new_tokens)
        texts = self._continue(trainer, pl_module, how)
        step = trainer.fit_loop.epoch_loop._batches_that_stepped  # as the validation's values
        for logger in loggers:
            for prompt, text in zip(self.prompts, texts, strict=True):
                logger.experiment.add_text(f"samples/{prompt.strip()}", _as_block(text), step)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print what the network writes now; in `on_train_end` the clock may still be running."""
        assert isinstance(pl_module, LanguageModule)
        if not trainer.is_global_zero:
            return
        pl_module.net.eval()
        rule = "-" * 80
        texts = f"\n{rule}\n".join(self._continue(trainer, pl_module, pl_module.generation))
        pl_module.print(f"samples of the trained network:\n{rule}\n{texts}\n{rule}")

    def _continue(self, trainer: L.Trainer, module: LanguageModule, how: Generation) -> list[str]:
        data = module.data
        prompts = [torch.tensor(data.encode(text), device=module.device) for text in self.prompts]
        with trainer.precision_plugin.forward_context():
            return continue_texts(module.net, prompts, how, data.encoding)


def _as_block(text: str) -> str:
    """As Markdown that shows it letter by letter, in lines that fit."""
    wrapped = [part for line in text.splitlines() for part in _WRAPPER.wrap(line) or [""]]
    return "\n".join(f"    {line}" for line in wrapped)
