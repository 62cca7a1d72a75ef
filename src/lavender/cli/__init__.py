"""The command line: `main` builds the parser; each verb has a module with its options, its call and its output."""

from lavender.cli.main import main

__all__ = ["main"]
