"""Generated text, to see with one's own eyes what was learned."""

import dataclasses
import textwrap

import lightning as L
import torch

from hlbgpt.curves import text_loggers
from hlbgpt.errors import InputError, require_positive
from hlbgpt.generate import continue_texts
from hlbgpt.module import LanguageModule

_COLUMNS = 100


class Samples(L.Callback):
    """Shows how the network continues prompts, by `model.generation`.

    After each validation the texts go to TensorBoard's tab "Text"; the last ones are printed. The
    draws have a seed of their own, so a sample changes because the network has, and training
    does not notice. The time counts as validation.

    Args:
        prompts: Texts to continue; one, or a list.
        max_new_tokens: Tokens to add to each; by default as many as `model.generation` says.
    """

    def __init__(self, prompts: list[str] | str, max_new_tokens: int | None = None) -> None:
        require_positive("Samples ", max_new_tokens=1 if max_new_tokens is None else max_new_tokens)
        self.prompts = [prompts] if isinstance(prompts, str) else prompts
        self.max_new_tokens = max_new_tokens
        if not self.prompts or "" in self.prompts:
            raise InputError("Samples prompts: empty, nothing to continue; give some text")
        self._last: list[str] = []

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LanguageModule)
        if trainer.sanity_checking or trainer.state.fn != "fit" or not trainer.is_global_zero:
            return
        with trainer.precision_plugin.forward_context():
            self._last = self._continue(pl_module)
        step = trainer.fit_loop.epoch_loop._batches_that_stepped  # as the validation's values
        for logger in text_loggers(trainer.loggers):
            for prompt, text in zip(self.prompts, self._last, strict=True):
                logger.experiment.add_text(f"samples/{prompt.strip()}", _as_block(text), step)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._last:
            return
        assert isinstance(pl_module, LanguageModule)
        rule = "-" * 80
        texts = f"\n{rule}\n".join(self._last)
        pl_module.print(f"samples of the trained network:\n{rule}\n{texts}\n{rule}")

    def _continue(self, module: LanguageModule) -> list[str]:
        data = module.data
        prompts = [torch.tensor(data.encode(text), device=module.device) for text in self.prompts]
        how = module.generation
        if self.max_new_tokens is not None:
            how = dataclasses.replace(how, max_new_tokens=self.max_new_tokens)
        return continue_texts(module.net, prompts, how, data.encoding)


def _as_block(text: str) -> str:
    """As Markdown that shows it letter by letter, in lines that fit."""
    wrapped = [
        part
        for line in text.splitlines()
        for part in textwrap.wrap(line, _COLUMNS, drop_whitespace=False) or [""]
    ]
    return "\n".join(f"    {line}" for line in wrapped)
