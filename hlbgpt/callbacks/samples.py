"""Generated text, to see with one's own eyes what was learned."""

import lightning as L
import torch

from hlbgpt.errors import InputError
from hlbgpt.module import LanguageModule


class PrintSample(L.Callback):
    """Prints how the trained network continues a prompt, by `model.generation`.

    Args:
        prompt: Text to continue.
    """

    def __init__(self, prompt: str) -> None:
        self.prompt = prompt

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Raise InputError without a prompt; here, for the parser would wrap it in its own."""
        if not self.prompt:
            raise InputError("PrintSample prompt: empty, nothing to continue; give some text")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LanguageModule)
        if not trainer.is_global_zero:
            return
        prompt = torch.tensor(pl_module.data.encode(self.prompt))
        with trainer.precision_plugin.forward_context():
            text = pl_module.continue_text(prompt.to(pl_module.device))
        rule = "-" * 80
        pl_module.print(f"sample of the trained network:\n{rule}\n{text}\n{rule}")
