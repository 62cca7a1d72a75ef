"""The names of the columns that are read, and other names that a data set may have for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from lavender.errors import ConfigError
from lavender.files import shown

PICTURE_COLUMNS = ("images", "image", "file_name")
CAPTION_COLUMNS = ("text", "caption")
VIDEO_COLUMNS = ("videos", "video")
TEXT_COLUMNS = ("messages", "conversations", "completion", "output", *CAPTION_COLUMNS)
OTHER_COLUMNS = ("prompt", "instruction", "input", "history", "system", "about", "tools", "audios", "audio")
COLUMNS = frozenset((*PICTURE_COLUMNS, *VIDEO_COLUMNS, *TEXT_COLUMNS, *OTHER_COLUMNS))

ROLES = MappingProxyType(
    {
        "image": "image",
        "question": "prompt",
        "answer": "completion",
        "caption": "caption",
        "messages": "messages",
        "system": "system",
        "about": "about",
    }
)
"""What a column may be, as `columns` of a run and `--columns` name it → its usual name."""
_TEXTS = ("answer", "caption", "messages")


def checked_columns(columns: Mapping[str, str] | None) -> dict[str, str]:
    """The columns of a data set with names of its own: role → name; {} for the usual names.

    Raises:
        ConfigError: no mapping, an unknown role, a name that is no text, or not exactly one kind of text.
    """
    if columns is not None and not isinstance(columns, Mapping):
        raise ConfigError(f"columns={shown(columns)}", "a mapping of role to name", 'write {"image": NAME, …}')
    columns = dict(columns or {})
    for role, name in columns.items():
        if role not in ROLES:
            raise ConfigError(f"columns with {shown(role)}", f"one of {', '.join(ROLES)}", f"write for example {_FORM}")
        if not isinstance(name, str) or not name:
            raise ConfigError(f"columns with {role}={shown(name)}", "the name of a column", f"write {role}=NAME")
    if columns and sum(role in columns for role in _TEXTS) != 1:
        expected = f"exactly one of {', '.join(_TEXTS)}"
        raise ConfigError(f"columns with {', '.join(columns)}", expected, f"write for example {_FORM}")
    if "question" in columns and "answer" not in columns:
        raise ConfigError("columns with question, without answer", "the column of the answers", f"write {_FORM}")
    return columns


_FORM = "image=NAME,question=NAME,answer=NAME"


def renamed(values: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The values of a row under the usual names, without other columns. Answers without questions are captions.

    Examples:
        >>> from lavender.data.columns import renamed
        >>> renamed({"pic": "cat.png", "q": "What?", "a": "A cat."}, {"image": "pic", "question": "q", "answer": "a"})
        {'image': 'cat.png', 'prompt': 'What?', 'completion': 'A cat.'}
    """
    roles = ROLES if "question" in columns else {**ROLES, "answer": "caption"}
    return {roles[role]: values.get(name) for role, name in columns.items()}


def check_columns_found(columns: Mapping[str, str], found: Iterable[str], label: str) -> None:
    """Raise ConfigError if no row has one of the columns."""
    names = list(found)
    for role, name in columns.items():
        if names and name not in names:
            raise ConfigError(
                f"columns with {role}={shown(name)}, which is in no row of {label}",
                f"one of its columns {shown(names)}",
                "correct the name",
            )
