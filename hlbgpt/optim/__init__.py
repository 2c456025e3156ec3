"""Parameter groups, the optimizer and schedules."""

from hlbgpt.optim.muon import MuonAdamW
from hlbgpt.optim.parameter_groups import parameter_groups
from hlbgpt.optim.schedules import PowerLaw, ScheduleRow

__all__ = ["MuonAdamW", "PowerLaw", "ScheduleRow", "parameter_groups"]
