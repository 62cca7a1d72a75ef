"""Options that several verbs share."""

from __future__ import annotations

import argparse

from lavender.errors import ConfigError
from lavender.files import expanded, shown


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
        nargs="+",
        action="extend",
        default=None,
        required=required,
        metavar="STORE",
        help=f"{text}; of several, the first that has a picture and a text answers, as in a run; "
        "put it after the arguments without dashes",
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
