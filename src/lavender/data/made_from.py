"""The entry `made_from` in the info of a map store: what its records come from, if `lavender extract` did not make all.

A list in the order of the commands: {"merge": [store, …]}, {"import": [table or folder of JPEG maps]} and, where such a
store was extracted in part, before or after, {"extract": []}. With it, an error about a damaged shard can say how its
records are made again. It holds paths of this machine, so it is not exported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MADE_FROM = "made_from"


def with_source(info: Mapping[str, Any], how: str, sources: Sequence[str], has_records: bool) -> dict[str, Any]:
    """The info of a store to which a command adds records.

    Args:
        info: of the store before.
        how: "merge", "import" or "extract".
        sources: paths of what is merged or imported; none of "extract".
        has_records: whether the store had records before.
    """
    made = list(info.get(MADE_FROM, [{"extract": []}] if has_records else []))
    entry = {how: list(sources)}
    return {**info, MADE_FROM: made if entry in made else [*made, entry]}


def without_sources(info: Mapping[str, Any]) -> dict[str, Any]:
    """The info of a store for another place, where the paths mean nothing."""
    return {name: value for name, value in info.items() if name != MADE_FROM}


def again(info: Mapping[str, Any]) -> str:
    """How missing records of a store are made again, for an error.

    Examples:
        >>> from lavender.data.made_from import again, with_source
        >>> again({})
        'extract again'
        >>> again(with_source({}, "merge", ["a", "b"], has_records=False))
        'merge a and b into it again'
    """
    made = info.get(MADE_FROM)
    ways = [way for entry in made for way in entry.items()] if isinstance(made, list) else [("extract", ())]
    return " and ".join(f"{how} {' and '.join(of)} into it again" if of else f"{how} again" for how, of in ways)
