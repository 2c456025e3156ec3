"""What a run will need, computed without running it."""

from hlbgpt.planning.plan import AUTO_TOKENS, BANDWIDTH, PRODUCTS, Plan, Shape, measure, plan_run

__all__ = ["AUTO_TOKENS", "BANDWIDTH", "PRODUCTS", "Plan", "Shape", "measure", "plan_run"]
