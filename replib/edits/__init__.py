"""Edits of activations: methods that fit them, contexts that apply them, null controls."""

from replib.edits.apply import applied
from replib.edits.methods import METHODS, Method, fit_edit

__all__ = ["METHODS", "Method", "applied", "fit_edit"]
