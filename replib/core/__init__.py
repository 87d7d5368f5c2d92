"""Errors, settings, storage, statistics, progress and processes; no model is known here."""

from replib.core.errors import ReplibError
from replib.core.settings import Settings, setting

__all__ = ["ReplibError", "Settings", "setting"]
