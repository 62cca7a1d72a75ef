"""The texts of a row, whatever its columns, as conversations of one form with a place for each picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lavender.data.tables import CAPTION_COLUMNS, PICTURE_COLUMNS, TEXT_COLUMNS, VIDEO_COLUMNS
from lavender.files import JsonError, half_character, parse_json, shown

Message = dict[str, Any]

_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_MARKER = "<image>"  # where LLaVA's and ShareGPT's texts have the picture
_VIDEO = "a video; only still pictures have maps"
_UNSUPPORTED = {
    **dict.fromkeys(VIDEO_COLUMNS, _VIDEO),
    **dict.fromkeys(("audios", "audio"), "a sound; only still pictures have maps"),
    "tools": "tools; conversations with tools are not supported",
}


class UnusableError(Exception):
    """Why a row is dropped."""


def check_columns(values: dict[str, Any]) -> None:
    """Refuse what would otherwise be ignored although it belongs to the conversation. Raises UnusableError."""
    for column, reason in _UNSUPPORTED.items():
        if values.get(column) and values[column] != "[]":
            raise UnusableError(reason)


def pictures_of(values: dict[str, Any]) -> list[Any]:
    """The pictures of a row as they are written there."""
    column = next((column for column in PICTURE_COLUMNS if values.get(column) is not None), "")
    given = values.get(column)
    if isinstance(given, str) and given.startswith("["):  # a list in a CSV file
        given = _maybe_json(given) if column != "images" else _parsed(given)
    pictures = given if isinstance(given, list) else [given]
    return [] if all(picture in (None, "") for picture in pictures) else pictures


def _maybe_json(text: str) -> Any:
    """Structure from its JSON text, or the text itself: names of files and questions may begin with a bracket."""
    try:
        return parse_json(text)
    except JsonError:
        return text


def conversations_of(values: dict[str, Any], prompt: str, num_pictures: int) -> list[list[Message]]:
    """The conversations of a row: several only where it has several captions. Raises UnusableError."""
    system = _system(values.get("system"))
    written = _turns_of_row(values, prompt, num_pictures > 0)
    return [_conversation(turns, num_pictures, system) for turns in written]


def num_places(messages: Iterable[Message]) -> int:
    """How many pictures a conversation has a place for."""
    return sum(part["type"] == "image" for message in messages for part in message["content"])


def mismatch(num_pictures: int, num_places: int) -> str:
    """Says that they are not as many."""
    pictures, places = (
        f"{one} {what}{'' if one == 1 else 's'}" if one else f"no {what}"
        for one, what in ((num_pictures, "picture"), (num_places, "place"))
    )
    return f"{pictures} and {places} for pictures"


def text_of(content: str | Iterable[Mapping[str, Any]] | None) -> str:
    """The text of a message, from its `content`: a string, or parts of which those of type "text" count."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(str(part["text"]) for part in content if part.get("type") == "text" and part.get("text"))


def _turns_of_row(values: dict[str, Any], prompt: str, has_pictures: bool) -> list[list[Any]]:
    """The conversations of a row, as they are written there."""
    for column in ("messages", "conversations"):
        if values.get(column) is not None:
            return [_list(_parsed(values[column]), column)]
    if values.get("prompt") is not None and values.get("completion") is not None:
        return [_side(values["prompt"], "user") + _side(values["completion"], "assistant")]
    caption = next((values[column] for column in CAPTION_COLUMNS if values.get(column) is not None), None)
    if caption is None:
        raise UnusableError(f"no text in any of the columns {', '.join(TEXT_COLUMNS)}")
    if not has_pictures:
        raise UnusableError("no picture")  # its prompt asks for one
    captions = caption if isinstance(caption, list) else _captions(caption) if isinstance(caption, str) else [caption]
    if strange := [one for one in captions if not isinstance(one, str)]:
        raise UnusableError(f"a caption is a {type(strange[0]).__name__}, not a text")
    if not captions or not all(one.strip() for one in captions):
        raise UnusableError(f"empty caption: {shown(caption)}")
    return [[_turn("user", prompt), _turn("assistant", one.strip())] for one in captions]


def _captions(text: str) -> list[str]:
    """The captions in one field: one, or a JSON list of them, as in CSV files.

    A text may begin with a bracket. A list that is not JSON (Python's, with single quotes) would be taught with its
    brackets and quotes.
    """
    bare = text.strip()
    if not bare.startswith("["):
        return [text]
    try:
        found = parse_json(bare)
    except JsonError as error:
        if bare[1:].lstrip()[:1] in ('"', "'"):
            raise UnusableError(f"a list of captions that is {error}; write it as JSON") from error
        return [text]
    return found if isinstance(found, list) and all(isinstance(one, str) for one in found) else [text]


def _side(value: Any, role: str) -> list[Any]:
    """One of TRL's prompt and completion: a text, or a list of turns, which CSV files have as JSON."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        turns = _maybe_json(value)
        if isinstance(turns, list) and turns and all(isinstance(one, dict) and _role_of(one) for one in turns):
            return turns
    return [_turn(role, value)] if isinstance(value, str) else _list(value, role)


def _turn(role: str, text: str) -> Message:
    return {"role": role, "content": text}


def _role_of(turn: dict[str, Any]) -> Any:
    return turn.get("role", turn.get("from"))


def _system(value: Any) -> str:
    """LLaMA-Factory's column of that name."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UnusableError(f"system is a {type(value).__name__}, not a text")
    return value if value.strip() else ""


def _conversation(turns: Sequence[Any], num_pictures: int, system: str) -> list[Message]:
    """Turns in their one form, with a place for each picture."""
    messages = [_message(_parsed(turn)) for turn in turns]
    if system:
        own = [text_of(one["content"]) for one in messages if one["role"] == "system"]
        if any(one != system for one in own):
            raise UnusableError("a column system and another system turn")
        if not own:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    first_user = next((message for message in messages if message["role"] == "user"), None)
    if first_user is None:
        raise UnusableError("no user turn")
    named = [part.pop("index", None) for one in messages for part in one["content"] if part["type"] == "image"]
    if num_pictures == 1 and not named:
        first_user["content"].insert(0, {"type": "image"})
    elif num_pictures != len(named):
        raise UnusableError(mismatch(num_pictures, len(named)))
    if any(index not in (None, place) for place, index in enumerate(named)):
        raise UnusableError(f"places for the pictures {shown(named)}, not in the pictures' order")
    strange = [one["role"] for one in messages if one["role"] != "user" and num_places([one])]
    if strange:
        raise UnusableError(f"a picture in the {strange[0]}'s turn, not in a user's")
    answers = [text_of(message["content"]) for message in messages if message["role"] == "assistant"]
    if not answers or not all(answer.strip() for answer in answers):
        raise UnusableError("an empty answer" if answers else "no assistant turn")
    return messages


def _message(turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise UnusableError(f"a turn is a {type(turn).__name__}, not an object")
    role = _role_of(turn)
    if not isinstance(role, str) or role not in _ROLES:
        raise UnusableError(f"the role {shown(role)}, not one of {list(_ROLES)}")
    content = turn.get("content", turn.get("value"))
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else _list(content, "content")
    return {"role": _ROLES[role], "content": [one for part in parts for one in _parts(_parsed(part))]}


def _parts(part: Any) -> list[dict[str, Any]]:
    """A part of a turn in its one form; a text with picture markers becomes several."""
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind == "image":
        if own := [key for key in ("image", "path", "url") if part.get(key) is not None]:
            raise UnusableError(f"a turn that names its picture itself, as {own[0]!r}; name it in the column images")
        return [{"type": "image", "index": part.get("index")}]  # which of the pictures, in some data sets
    if kind == "video":
        raise UnusableError(_VIDEO)
    if kind != "text" or not isinstance(part.get("text"), str):
        raise UnusableError(f"a part of the type {shown(kind)}, not an image or a text")
    if fault := half_character(part["text"]):
        raise UnusableError(f"a text with {fault}")
    texts = part["text"].split(_MARKER)
    if len(texts) == 1:
        return [{"type": "text", "text": texts[0]}]
    parts: list[dict[str, Any]] = []
    for text in texts:  # a marker stands between two texts
        parts += [{"type": "text", "text": text.strip()}] if text.strip() else []
        parts += [{"type": "image"}]
    return parts[:-1]


def _parsed(value: Any) -> Any:
    """Structure from its JSON text, as CSV files and the Json feature of `datasets` have it."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except JsonError as error:
        raise UnusableError(str(error)) from error


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise UnusableError(f"{what} is a {type(value).__name__}, not a list")
    return value
