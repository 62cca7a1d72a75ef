"""The parser's messages: what is misspelt is named with the nearest right word."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any, NoReturn

from lavender.cli.options import put_before
from lavender.cli.stopping import WRONG_USAGE
from lavender.cli.terminal import show
from lavender.errors import nearest


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that suggests the nearest verb, option or value, and names the command that helps."""

    _advice = ""

    def parsers(self) -> dict[str, Parser]:
        """Name → parser of the verbs or actions; empty if there are none."""
        found = [action.choices for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        return dict(found[0]) if found else {}

    def leaves(self) -> Iterator[Parser]:
        """The parsers of all verbs and actions that run."""
        inner = self.parsers().values()
        yield from (leaf for parser in inner for leaf in parser.leaves())
        if not inner:
            yield self

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None):  # ty: ignore[incompatible-method-override]
        """Refuse a misspelt option first: argparse would complain of what is missing instead."""
        if not self.parsers():
            self._refuse_unknown(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def _refuse_unknown(self, words: Sequence[str]) -> None:
        options = list(self._option_string_actions)
        for word in words:
            name = word.partition("=")[0]
            if word == "--":
                return
            if not name.startswith("--") or " " in name or any(option.startswith(name) for option in options):
                continue
            if near := nearest(name, options):
                self._advice = f"write {near}, or "
            self.error(f"unknown option {name}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and (near := nearest(str(value), map(str, action.choices))):
            self._advice = f"write {near}, or "
        super()._check_value(action, value)
        self._advice = ""

    def error(self, message: str) -> NoReturn:
        """Print usage and message, wrapped to the terminal, and exit."""
        self.print_usage(sys.stderr)
        do = put_before(self, message) or f"{self._advice}see `{self.prog} --help`"
        show(f"{self.prog}: error: {message}. Do this: {do}.", sys.stderr, self.prog)
        self.exit(WRONG_USAGE)


class Version(argparse.Action):
    """Prints the version, which is read only then."""

    def __call__(self, parser: argparse.ArgumentParser, *args: Any, **settings: Any) -> NoReturn:
        import lavender

        print(f"lavender-vlm {lavender.__version__}")
        parser.exit()


def complete(parser: Parser) -> NoReturn:
    """Answer the shell, which asks for the words that may come next, and exit. Needs the extra `completion`."""
    try:
        argcomplete = import_module("argcomplete")
    except ImportError:
        sys.exit("no completion of lavender: pip install 'lavender-vlm[completion]'")
    argcomplete.autocomplete(parser)
    sys.exit(1)  # the shell did not ask about this program
