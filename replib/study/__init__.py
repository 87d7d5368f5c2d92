"""One run of the suite on one model: its prompts, its judge, its verbs."""

from replib.study.study import Study

__all__ = ["Study"]
