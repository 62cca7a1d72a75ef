"""Options that several verbs share."""

from __future__ import annotations

import argparse


def add_trust_remote_code(parser: argparse.ArgumentParser) -> None:
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
