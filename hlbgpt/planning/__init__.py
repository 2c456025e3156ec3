"""What a run will need, computed without running it."""

from hlbgpt.planning.plan import AUTO_TOKENS, Plan, Shape, plan_memory, plan_run

__all__ = ["AUTO_TOKENS", "Plan", "Shape", "plan_memory", "plan_run"]
