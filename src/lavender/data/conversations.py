"""Turn the texts of a row, in any known columns, into conversations of one form with a place for each image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from lavender.data.columns import CAPTION_COLUMNS, PICTURE_COLUMNS, TEXT_COLUMNS, VIDEO_COLUMNS
from lavender.files import JsonError, half_character, parse_json, shown

Message = dict[str, Any]

_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_MARKER = "<image>"  # the place of an image in LLaVA's and ShareGPT's texts
_NAMES = ("image", "path", "url", "base64")  # keys by which a part names its image, in Qwen's and transformers' form
_VIDEO = "a video; only still pictures have maps"
_UNSUPPORTED = {
    **dict.fromkeys(VIDEO_COLUMNS, _VIDEO),
    **dict.fromkeys(("audios", "audio"), "a sound; only still pictures have maps"),
    "tools": "tools; conversations with tools are not supported",
}


class UnusableError(Exception):
    """Why a row is dropped."""


def read_row(values: dict[str, Any], prompt: str) -> tuple[list[Any], list[list[Message]]]:
    """The images of a row, as they are named there, and its conversations: several only if it has several captions.

    Args:
        values: the row's values by column.
        prompt: the user's turn for captions.

    Raises:
        UnusableError: the row must be dropped.
    """
    for column, reason in _UNSUPPORTED.items():
        if _is_filled(values.get(column)):
            raise UnusableError(reason)
    pictures, system = _pictures_of(values), _system(values.get("system"))
    conversations = []
    for turns in _turns_of_row(values, prompt, bool(pictures)):
        pictures, messages = _conversation(turns, pictures, system)
        conversations.append(messages)
    return pictures, conversations


def _pictures_of(values: dict[str, Any]) -> list[Any]:
    """The images of a row as written there: names, structs or encoded files."""
    column = next((column for column in PICTURE_COLUMNS if _is_filled(values.get(column))), "")
    value = values.get(column)
    if isinstance(value, str) and value.startswith("["):  # a list in a CSV file
        value = _maybe_json(value) if column != "images" else _parsed(value)
    pictures = value if isinstance(value, list) else [value]
    return [] if all(picture in (None, "") for picture in pictures) else pictures


def _is_filled(value: Any) -> bool:
    """Whether a cell holds anything. A CSV file has no other null than an empty text."""
    if isinstance(value, str):
        return value.strip() not in ("", "[]")
    return any(map(_is_filled, value)) if isinstance(value, list) else value is not None


def _maybe_json(text: str) -> Any:
    """The value of a JSON text, or the text itself, because file names and questions may begin with a bracket too."""
    try:
        return parse_json(text)
    except JsonError:
        return text


def num_places(messages: Iterable[Message]) -> int:
    """The number of images that a conversation has a place for."""
    return sum(part["type"] == "image" for message in messages for part in message["content"])


def mismatch(num_pictures: int, num_places: int) -> str:
    """A message for different numbers of images and places."""
    pictures, places = (
        f"{number} {noun}{'' if number == 1 else 's'}" if number else f"no {noun}"
        for number, noun in ((num_pictures, "picture"), (num_places, "place"))
    )
    return f"{pictures} and {places} for pictures"


class TextPart(NamedTuple):
    """A part of a message with a text: its index in the content, its first character in `text_of`, and the text."""

    index: int
    start: int
    text: str


def text_parts(content: str | Iterable[Mapping[str, Any]] | None) -> list[TextPart]:
    """The parts of a message's `content` that have a text. A content that is a text is one part."""
    if content is None or isinstance(content, str):
        return [TextPart(0, 0, content)] if content else []
    parts: list[TextPart] = []
    end, pictures = 0, False
    for index, part in enumerate(content):
        if part.get("type") == "text" and part.get("text"):
            start = end + (pictures and bool(parts))
            parts.append(TextPart(index, start, str(part["text"])))
            end, pictures = start + len(parts[-1].text), False
        pictures |= part.get("type") == "image"
    return parts


def text_of(content: str | Iterable[Mapping[str, Any]] | None) -> str:
    """The text of a message, from its `content`: its texts, with a space where pictures stand between two of them."""
    text = ""
    for part in text_parts(content):
        text += " " * (part.start - len(text)) + part.text
    return text


def _turns_of_row(values: dict[str, Any], prompt: str, has_pictures: bool) -> list[list[Any]]:
    """The conversations of a row, each as the list of turns written there."""
    there = {column for column, value in values.items() if value is not None}
    filled = {column for column in there if _is_filled(values[column])}
    # a row of empty cells alone is read as well, for the reason why it is dropped
    for present in (filled, there):
        for column in ("messages", "conversations"):
            if column in present and values[column] != "":
                return [_list(_parsed(values[column]), column)]
        if "prompt" in there and "completion" in present:
            return [_side(values, "prompt", "user") + _side(values, "completion", "assistant")]
        if "instruction" in there and "output" in present:
            return [_alpaca(values)]
        if caption := next((column for column in CAPTION_COLUMNS if column in present), None):
            return _captioned(values[caption], prompt, has_pictures)
    raise UnusableError(f"no text in any of the columns {', '.join(TEXT_COLUMNS)}")


def _captioned(caption: Any, prompt: str, has_pictures: bool) -> list[list[Any]]:
    """A conversation per caption of a cell."""
    if not has_pictures:
        raise UnusableError("no picture")  # its prompt asks for one
    captions = caption if isinstance(caption, list) else _captions(caption) if isinstance(caption, str) else [caption]
    if no_texts := [item for item in captions if not isinstance(item, str)]:
        raise UnusableError(f"a caption is a {type(no_texts[0]).__name__}, not a text")
    if not captions or not all(item.strip() for item in captions):
        raise UnusableError(f"empty caption: {shown(caption)}")
    return [[_turn("user", prompt), _turn("assistant", item.strip())] for item in captions]


def _captions(text: str) -> list[str]:
    """The captions in one field: a single one, or a JSON list of them, as in CSV files.

    A caption may begin with a bracket. A list that is not JSON, such as Python's with single quotes, is refused:
    the model would learn its brackets and quotes.
    """
    bare = text.strip()
    if not bare.startswith("["):
        return [text]
    try:
        value = parse_json(bare)
    except JsonError as error:
        if bare[1:].lstrip()[:1] in ('"', "'"):
            raise UnusableError(f"a list of captions that is {error}; write it as JSON") from error
        return [text]
    return value if isinstance(value, list) and all(isinstance(item, str) for item in value) else [text]


def _side(values: dict[str, Any], column: str, role: str) -> list[Any]:
    """The turns of TRL's prompt or completion: a text, or a list of turns, which CSV files hold as JSON."""
    value = values[column]
    if not isinstance(value, (str, list)):
        raise UnusableError(f"{column} is a {type(value).__name__}, not a text or a list of turns")
    if isinstance(value, str) and value.lstrip().startswith("["):
        turns = _maybe_json(value)
        if isinstance(turns, list) and turns and all(isinstance(turn, dict) and _role_of(turn) for turn in turns):
            return turns
    return [_turn(role, value)] if isinstance(value, str) else value


def _alpaca(values: dict[str, Any]) -> list[Any]:
    """The turns of Alpaca's columns, with LLaMA-Factory's `history`: a list of pairs of question and answer."""
    turns = []
    for pair in _list(_parsed(values.get("history") or []), "history"):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise UnusableError(f"history holds {shown(pair)}, not a pair of question and answer")
        turns += [_turn("user", pair[0]), _turn("assistant", pair[1])]
    question = [values["instruction"], *([values["input"]] if values.get("input") else [])]
    if wrong := [text for text in (*question, values["output"]) if not isinstance(text, str)]:
        raise UnusableError(f"an instruction, input or output is a {type(wrong[0]).__name__}, not a text")
    return [*turns, _turn("user", "\n".join(question)), _turn("assistant", values["output"])]


def _turn(role: str, text: str) -> Message:
    return {"role": role, "content": text}


def _role_of(turn: dict[str, Any]) -> Any:
    return turn.get("role", turn.get("from"))


def _system(value: Any) -> str:
    """The text of LLaMA-Factory's column `system`, or ""."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UnusableError(f"system is a {type(value).__name__}, not a text")
    if fault := half_character(value):
        raise UnusableError(f"system with {fault}")
    return value if value.strip() else ""


def _conversation(turns: Sequence[Any], pictures: list[Any], system: str) -> tuple[list[Any], list[Message]]:
    """The images of a conversation, and its turns in their final form, with a place for each image."""
    messages = [_message(_parsed(turn)) for turn in turns]
    if system:
        system_turns = [text_of(message["content"]) for message in messages if message["role"] == "system"]
        if any(text != system for text in system_turns):
            raise UnusableError("a column system and another system turn")
        if not system_turns:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    first_user = next((message for message in messages if message["role"] == "user"), None)
    if first_user is None:
        raise UnusableError("no user turn")
    places = [part for message in messages for part in message["content"] if part["type"] == "image"]
    pictures = _named_in([part.pop("name", None) for part in places], pictures)
    indices = [part.pop("index", None) for part in places]
    if len(pictures) == 1 and not indices:
        first_user["content"].insert(0, {"type": "image"})
    elif len(pictures) != len(indices):
        raise UnusableError(mismatch(len(pictures), len(indices)))
    if any(index not in (None, place) for place, index in enumerate(indices)):
        raise UnusableError(f"places for the pictures {shown(indices)}, not in the pictures' order")
    for message in messages:
        if message["role"] != "user" and num_places([message]):
            raise UnusableError(f"a picture in the {message['role']}'s turn, not in a user's")
    answers = [text_of(message["content"]) for message in messages if message["role"] == "assistant"]
    if not answers or not all(answer.strip() for answer in answers):
        raise UnusableError("an empty answer" if answers else "no assistant turn")
    return pictures, messages


def _named_in(names: list[Any], pictures: list[Any]) -> list[Any]:
    """The images that the turns name, else those of the row's column."""
    named = [name for name in names if name is not None]
    if not named:
        return pictures
    if len(named) < len(names):
        raise UnusableError(f"turns that name {len(named)} of their {len(names)} pictures; name all, or none")
    if pictures and pictures != named:
        raise UnusableError("turns that name other pictures than the row's column; name them in one of the two")
    return named


def _message(turn: Any) -> Message:
    """A turn in its final form. Raises UnusableError."""
    if not isinstance(turn, dict):
        raise UnusableError(f"a turn is a {type(turn).__name__}, not an object")
    role = _role_of(turn)
    if not isinstance(role, str) or role not in _ROLES:
        raise UnusableError(f"the role {shown(role)}, not one of {list(_ROLES)}")
    content = turn.get("content", turn.get("value"))
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else _list(content, "content")
    return {"role": _ROLES[role], "content": [piece for part in parts for piece in _parts(_parsed(part))]}


def _parts(part: Any) -> list[dict[str, Any]]:
    """A part of a turn in its final form; a text with image markers becomes several parts."""
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind in ("image", "image_url"):
        place = {"type": "image", "index": part.get("index")}  # some data sets number the images
        return [place if (name := _name_in(part)) is None else place | {"name": name}]
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


def _name_in(part: dict[str, Any]) -> Any:
    """The image that a part names, in the form of Qwen, transformers or OpenAI (`image_url`); None if it names none.

    Raises:
        UnusableError: it names several, or none where it must.
    """
    address = part.get("image_url")
    address = address.get("url") if isinstance(address, dict) else address
    names = [name for name in (*(part.get(key) for key in _NAMES), address) if name is not None]
    if len(names) > 1:
        raise UnusableError(f"a part that names {len(names)} pictures")
    if not names and part["type"] == "image_url":
        raise UnusableError("a part image_url without an address")
    return names[0] if names else None


def _parsed(value: Any) -> Any:
    """The value of a JSON text, as CSV files and the Json feature of `datasets` hold it, or the value itself."""
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
