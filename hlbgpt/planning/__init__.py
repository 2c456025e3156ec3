"""What a run will need, computed without running it."""

from hlbgpt.planning.plan import Plan, Shape, plan_memory, plan_run

__all__ = ["Plan", "Shape", "plan_memory", "plan_run"]
