"""One run of the suite on one model: its prompts, its judge, its verbs."""

from replib.study.study import BASELINES, Study
from replib.study.training import RETENTION, harden, schedule

__all__ = ["BASELINES", "RETENTION", "Study", "harden", "schedule"]
