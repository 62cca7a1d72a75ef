"""Settings files: YAML that is small, plain and says everything once.

Nothing in such a file runs (PyYAML's safe loader), and nothing in it can take long: size, depth and what aliases
stand for are limited before anything is built.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError
from yaml.reader import ReaderError

from lavender.errors import ConfigError, DataError
from lavender.files import READ

LARGEST_FILE = 256 * 1024
"""Bytes; the longest run file of the examples has less than 2,000."""
DEEPEST = 32
MOST_VALUES = 5_000
"""With every alias counted as all that it stands for."""
_TEXT, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"


def read_settings(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping.

    Raises:
        DataError: there is no such file, or it cannot be read.
        ConfigError: it is too large, not text in UTF-8, not YAML, no mapping, or has a key twice.
    """
    settings = parse_yaml(_text_of(Path(path)), str(path))
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ConfigError(f"{_kind(settings)} in {path}", "settings, a KEY: VALUE on each line", "write them so")
    return settings


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML document, of dicts with text keys, lists, texts, numbers, true, false and null.

    Raises:
        ConfigError: it is not YAML of this kind; names the line.
    """
    try:
        return yaml.load(text, _Loader)
    except ReaderError as error:
        raise ConfigError(
            f"{where}, with the character {chr(error.character)!r} at place {error.position}",
            "text without control characters",
            "remove it, or write it in double quotes as \\x.., with its number",
        ) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1} of {where}" if mark else where
        said = " ".join(part for part in (getattr(error, "context", ""), getattr(error, "problem", "")) if part)
        raise ConfigError(f"{place}: {said or error}", "YAML, a KEY: VALUE on each line", "mend it there") from error


def yaml_text(settings: Mapping[str, Any]) -> str:
    """The settings as YAML that `read_settings`, and any other reader of YAML, reads back as they were."""
    return yaml.dump(dict(settings), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _text_of(path: Path) -> str:
    """The file's text; never waits, as reading a pipe would."""
    try:
        with os.fdopen(os.open(path, READ), "rb") as file:
            is_file = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            content = file.read(LARGEST_FILE + 1) if is_file else b""
    except FileNotFoundError as error:
        raise DataError(f"no file at {path}", "a YAML file", "check the path") from error
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(
            f"{path}, which cannot be read: {reason}", "a YAML file", "name one that can be read"
        ) from error
    if not is_file:
        raise ConfigError(f"{path}, which is no ordinary file", "a YAML file", "name such a file")
    if len(content) > LARGEST_FILE:
        raise ConfigError(
            f"{path}, a file of more than {LARGEST_FILE // 1024} KiB",
            "settings, which are shorter",
            "name the file of settings",
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}, whose byte {content[error.start]:#04x} at offset {error.start} is not UTF-8",
            "text in UTF-8",
            "save the file as UTF-8; it may be in Latin-1 (ISO 8859-1, Windows-1252) or UTF-16",
        ) from error


def _kind(value: object) -> str:
    return {list: "a list", str: "a text alone"}.get(type(value), f"a {type(value).__name__} alone")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with the numbers of YAML 1.2: 5e-4 is a number, and 1:30, 017, 1_000 and dates are texts."""

    def __init__(self, stream: str):
        super().__init__(stream)
        self._depth = self._values = 0
        self._sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if self._depth >= DEEPEST:
            raise ComposerError(None, None, f"more than {DEEPEST} levels deep", event.start_mark)
        before = self._values
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        assert node is not None
        if not isinstance(event, yaml.AliasEvent):
            self._values += 1
            self._sizes[node] = self._values - before
        elif node in self._sizes:
            self._values += self._sizes[node]
        else:
            raise ComposerError(None, None, f"*{event.anchor} stands inside of what it stands for", event.start_mark)
        if self._values > MOST_VALUES:
            raise ComposerError(None, None, f"more than {MOST_VALUES:,} values", event.start_mark)
        return node

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first: dict[str, yaml.Mark] = {}
        for key, _ in node.value:
            if key.tag == _MERGE:
                continue
            if key.tag != _TEXT or not isinstance(key, yaml.ScalarNode):
                said = f"{key.value[:80]!r}" if isinstance(key, yaml.ScalarNode) else "that is a list or mapping"
                problem = f"a key {said}, which is no text; put it in quotes"
                raise ComposerError(None, None, problem, key.start_mark)
            if key.value in first:
                problem = f"the key {key.value[:80]!r} twice, first in line {first[key.value].line + 1}"
                raise ComposerError(None, None, problem, key.start_mark)
            first[key.value] = key.start_mark
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            # int("x"), for !!int x
            kind = node.tag.rpartition(":")[2]
            problem = f"{str(node.value)[:80]!r}, which is no {kind} that can be read"
            raise ConstructorError(None, None, problem, node.start_mark) from error

    def construct_other(self, node: yaml.Node) -> Any:
        raise ConstructorError(None, None, f"the tag {node.tag!r}", node.start_mark)


def _set_types() -> None:
    """Leave texts, numbers, true, false, null, lists and mappings, and merging."""
    kept = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map")}
    made = {tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items() if tag in kept}
    _Loader.yaml_constructors = made | {None: _Loader.construct_other}
    words = {f"tag:yaml.org,2002:{name}" for name in ("bool", "null", "merge")}
    _Loader.yaml_implicit_resolvers = {
        first: kinds
        for first, all_kinds in yaml.SafeLoader.yaml_implicit_resolvers.items()
        if (kinds := [kind for kind in all_kinds if kind[0] in words])
    }
    _Loader.add_implicit_resolver(
        "tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9]*)$|0x[0-9a-fA-F]+$"), list("-+0123456789")
    )
    _Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(
            r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?$|[-+]?[0-9]+[eE][-+]?[0-9]+$"
            r"|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
        ),
        list("-+.0123456789"),
    )


class _Dumper(yaml.SafeDumper):
    """Puts quotes around a text that YAML 1.1 or `_Loader` would take for a number, a date or the like."""


_set_types()
for _first, _kinds in _Loader.yaml_implicit_resolvers.items():
    for _tag, _pattern in _kinds:
        _Dumper.add_implicit_resolver(_tag, _pattern, [_first])
