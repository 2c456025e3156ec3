"""Parameter groups as a table, the optimizer, and schedules as pure functions."""

from hlbgpt.optim.muon import MuonAdamW
from hlbgpt.optim.parameter_groups import parameter_groups
from hlbgpt.optim.schedules import PowerLaw

__all__ = ["MuonAdamW", "PowerLaw", "parameter_groups"]
