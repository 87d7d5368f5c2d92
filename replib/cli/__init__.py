"""The ``replib`` command."""

from replib.cli.app import main

__all__ = ["main"]
