"""Options that several verbs share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from lavender.errors import ConfigError
from lavender.files import expanded, shown


class Several(argparse.Action):
    """An option with one or more values each time it is given: `--maps A B`, `--maps A --maps B`.

    It takes every word up to the next option, so an argument without dashes must stand before it.

    Attributes:
        took_several: whether it was given several values at once.
    """

    def __init__(self, option_strings: Sequence[str], dest: str, **settings: Any):
        super().__init__(option_strings, dest, nargs="+", **settings)
        self.took_several = False

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None):
        self.took_several |= len(values) > 1
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or ()), *values])


def put_before(parser: argparse.ArgumentParser, message: str) -> str:
    """What helps where `Several` values may have taken an argument without dashes; or ""."""
    plain = [action.metavar or action.dest for action in parser._actions if not action.option_strings]
    for action in parser._actions:
        if plain and isinstance(action, Several):
            option = action.option_strings[-1]
            if (action.took_several and "required" in message) or f"argument {option}:" in message:
                return f"{option} takes every word up to the next option: put {' '.join(map(str, plain))} before it"
    return ""


def add_trust_remote_code(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the Python code that comes with the model"
    )


def add_limit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--limit",
        type=int,
        default=64,
        metavar="N",
        help="look at N samples, spread evenly over the data (default: %(default)s)",
    )


def add_maps(parser: argparse.ArgumentParser, text: str, required: bool = False) -> None:
    parser.add_argument(
        "--maps",
        type=expanded,
        action=Several,
        default=None,
        required=required,
        metavar="STORE",
        help=f"{text}; of several, the first that has a picture and a text answers, as in a run. It takes every word "
        "up to the next option; may be repeated",
    )


_COLUMNS = (
    "columns of the data, if they have other names than usual: image=…,question=…,answer=…, or caption=…, "
    "messages=…, system=…, about=…"
)


def add_columns(parser: argparse._ActionsContainer, name: str = "--columns", text: str = _COLUMNS) -> None:
    parser.add_argument(name, default=None, metavar="ROLE=NAME,…", help=text)


def columns_of(options: argparse.Namespace, option: str = "--columns") -> dict[str, str] | None:
    """The columns of `--columns`, as `read_samples` takes them: role → name; None without the option.

    Raises:
        ConfigError: it is no list of ROLE=NAME. `read_samples` checks the roles.
    """
    given = getattr(options, option.removeprefix("--").replace("-", "_"))
    if given is None:
        return None
    columns: dict[str, str] = {}
    for pair in given.split(","):
        role, sign, name = pair.partition("=")
        if not sign or role in columns:
            raise ConfigError(
                f"{option} {shown(given)}",
                "each role once, as ROLE=NAME, with commas between",
                f"write for example {option} image=picture,question=q,answer=a",
            )
        columns[role] = name
    return columns
