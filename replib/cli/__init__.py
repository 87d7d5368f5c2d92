"""The replib command."""

from replib.cli.main import main

__all__ = ["main"]
