"""The LightningModule: the training step, compilation, metrics, resume."""
