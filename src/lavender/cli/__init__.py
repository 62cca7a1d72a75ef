"""The command line: one verb per file."""

from lavender.cli.main import main

__all__ = ["main"]
