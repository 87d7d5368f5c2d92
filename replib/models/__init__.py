"""Chat models: loading, adapters, chat template, tokens, architecture, hook points and forward passes."""

from replib.models.adapters import merged
from replib.models.chat_model import ChatModel
from replib.models.load import load
from replib.models.self_check import self_check

__all__ = ["ChatModel", "load", "merged", "self_check"]
