"""Chat models: loading, adapters, chat template, tokens, architecture, hook points and forward passes."""

from replib.models.adapters import merged
from replib.models.chat_model import ChatModel
from replib.models.load import load
from replib.models.self_check import check_table, self_check, token_table

__all__ = ["ChatModel", "check_table", "load", "merged", "self_check", "token_table"]
