"""Attacks, judges and the table of success rates."""

from replib.audit.audit import AuditTable, Task, audit
from replib.audit.judges import ClassifierJudge, ExactJudge, Judge, Outcome, PhraseJudge

__all__ = ["AuditTable", "ClassifierJudge", "ExactJudge", "Judge", "Outcome", "PhraseJudge", "Task", "audit"]
