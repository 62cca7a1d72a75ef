"""What a verb prints: its result, notes, and progress, as `--json` and `--quiet` say."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from lavender.cli.terminal import show

if TYPE_CHECKING:
    from tqdm import tqdm


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add what every verb has: --json, --quiet and --verbose."""
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print the result as JSON, and all else on stderr")
    loudness = group.add_mutually_exclusive_group()
    loudness.add_argument(
        "-q", "--quiet", action="store_true", help="print errors and the result alone: no progress, no notes"
    )
    loudness.add_argument(
        "-v", "--verbose", action="store_true", help="show the warnings of other libraries too, which else go to a log"
    )


def as_json(options: argparse.Namespace, piped: bool = False) -> bool:
    """Whether the result is printed as JSON. With `piped` a pipe or a file gets JSON without the option too."""
    return options.json or (piped and not sys.stdout.isatty())


def report(
    options: argparse.Namespace,
    facts: Any,
    lines: Iterable[str] = (),
    end: Iterable[str] = (),
    piped: bool = False,
) -> None:
    """Print a verb's result.

    Args:
        facts: the result as JSON values.
        lines: the result for people.
        end: what was written where, and notes: left out with --quiet, on stderr beside JSON.
        piped: whether a pipe or a file gets JSON, also without --json.
    """
    is_json = as_json(options, piped)
    if is_json:
        print(json.dumps(_finite(facts), indent=1, ensure_ascii=False, allow_nan=False), flush=True)
    else:
        for line in lines:
            show(line)
    for line in () if options.quiet else end:
        show(line, sys.stderr if is_json else sys.stdout)


def _finite(value: Any) -> Any:
    """The value with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def fact_lines(facts: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """Nested facts as lines `name: value`; of a list of mappings only the number."""
    for name, value in facts.items():
        label = f"{indent}{str(name).replace('_', ' ')}:"
        if isinstance(value, Mapping) and value.keys() == {"mean", "margin"}:
            margin = "(one picture)" if value["margin"] is None else f"± {value['margin']:.3f}"
            yield f"{label} {value['mean']:.3f} {margin}"
        elif isinstance(value, Mapping) and value:
            yield label
            yield from fact_lines(value, f"{indent}  ")
        else:
            yield f"{label} {_text(value)}"


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        are_facts = any(isinstance(one, Mapping | list) for one in value)
        return f"{len(value):,}" if are_facts else ", ".join(map(_text, value)) or "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if type(value) is int else "none" if value in (None, {}) else str(value)


def note(options: argparse.Namespace, line: str) -> None:
    """Print a line about the result on stderr, unless --quiet."""
    if not options.quiet:
        show(line, sys.stderr)


def progress(options: argparse.Namespace, **settings: Any) -> tqdm:
    """A progress bar with the remaining time on stderr; none with --quiet."""
    from tqdm import tqdm

    return tqdm(**{"dynamic_ncols": True, **settings, "disable": options.quiet or settings.get("disable", False)})


@contextlib.contextmanager
def own_lines(options: argparse.Namespace) -> Iterator[None]:
    """What the work itself prints on stdout: on stderr with --json, nowhere with --quiet."""
    with contextlib.ExitStack() as stack:
        if options.quiet:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        elif options.json:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield
