"""Pictures with conversations, in one form whatever the columns they come in.

`lavender.layouts` finds the rows; here a row becomes samples. A row that cannot be used is dropped
with its name and a reason, never silently.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from lavender.errors import DataError
from lavender.images import load_image
from lavender.layouts import Row, find_rows, unknown_layout
from lavender.maps import Dropped

if TYPE_CHECKING:
    import datasets

Source = Path | bytes | Image.Image

PICTURE_COLUMNS = ("images", "image", "file_name")
CAPTION_COLUMNS = ("text", "caption")
TEXT_COLUMNS = ("messages", "conversations", "completion", *CAPTION_COLUMNS)
_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_MARKER = "<image>"  # where LLaVA's and ShareGPT's texts have the picture
_PIECE = 1000  # rows a table


@dataclass(frozen=True)
class Sample:
    """One picture with one conversation.

    Attributes:
        name: for people: the file and the row or line in it.
        source: the picture, not yet decoded: a path, an encoded file, or a picture in memory.
        messages: [{"role": …, "content": [{"type": "image"} or {"type": "text", "text": …}, …]}, …], with
            the one picture in the first user turn.
    """

    name: str
    source: Source
    messages: list[dict[str, Any]]

    @property
    def answers(self) -> tuple[str, ...]:
        """The texts of the assistant's turns: what is learnt, and what has maps."""
        turns = [message["content"] for message in self.messages if message["role"] == "assistant"]
        return tuple(_text(content) for content in turns)

    def load(self) -> Image.Image:
        """The decoded picture; see `load_image`. Raises DataError naming the sample."""
        return load_image(self.source, f"the picture of {self.name}")


@dataclass(frozen=True)
class Samples:
    """The samples of a data set in its order, and what was dropped from it."""

    samples: tuple[Sample, ...]
    dropped: tuple[Dropped, ...] = ()

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)


def read_samples(path: str | Path | datasets.Dataset, prompt: str = "Describe the image.") -> Samples:
    """Read a data set of pictures with text, in any of `lavender.layouts.LAYOUTS`.

    No picture is decoded; that a file exists is checked. Paths are relative to the data file (in a
    `datasets.Dataset`, to the working directory). Encoded pictures inside parquet or a Dataset are held in memory.
    Columns are tried in the order messages, conversations, prompt + completion, text, caption. A caption that is a
    list of texts gives one sample each.

    Args:
        path: a file, a folder, or a dataset.
        prompt: the user's turn where the data have only captions.

    Raises:
        DataError: no such path, no known layout, a file that cannot be read, or no usable row.
    """
    rows, root = find_rows(path)
    label = f"{path}" if isinstance(path, (str, Path)) else "a dataset"
    samples: list[Sample] = []
    dropped: list[Dropped] = []
    columns: dict[str, None] = {}  # an ordered set
    for row in rows:
        columns |= dict.fromkeys(row.values)
        try:
            samples += _samples_of_row(row, root, prompt)
        except _UnusableError as error:
            dropped.append(Dropped(row.name, str(error)))
    if samples:
        return Samples(tuple(samples), tuple(dropped))
    if not (columns.keys() & set(PICTURE_COLUMNS) and columns.keys() & set(TEXT_COLUMNS)):
        first = f", first fault: {dropped[0].what}: {dropped[0].reason}" if dropped and not columns else ""
        raise unknown_layout(f"{label} with the columns {list(columns)}{first}")
    got = f"{label} with {len(dropped)} rows, none usable; the first, {dropped[0].what}: {dropped[0].reason}"
    raise DataError(got, "at least one usable row", "repair the rows")


def to_dataset(samples: Iterable[Sample]) -> datasets.Dataset:
    """A dataset with the columns `images` (a list of one) and `messages`, ready for TRL's SFTTrainer.

    Files stay paths and encoded pictures stay encoded; a picture in memory is stored as PNG, so its pixels and
    with them its `image_id` stay the same.
    """
    import datasets

    part = {"type": datasets.Value("string"), "text": datasets.Value("string")}
    turn = {"role": datasets.Value("string"), "content": datasets.List(part)}
    features = datasets.Features({"images": datasets.List(datasets.Image()), "messages": datasets.List(turn)})
    samples = tuple(samples)
    images = [[_encoded(sample)] for sample in samples]
    messages = [sample.messages for sample in samples]
    # In pieces: one Arrow array of bytes holds 2 GB at most.
    pieces = [slice(start, start + _PIECE) for start in range(0, max(len(samples), 1), _PIECE)]
    return datasets.concatenate_datasets(
        [
            datasets.Dataset.from_dict({"images": images[piece], "messages": messages[piece]}, features=features)
            for piece in pieces
        ]
    )


def _encoded(sample: Sample) -> dict[str, Any]:
    if isinstance(sample.source, Path):
        return {"bytes": None, "path": str(sample.source.absolute())}
    if isinstance(sample.source, bytes):
        return {"bytes": sample.source, "path": None}
    buffer = BytesIO()
    sample.load().save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


class _UnusableError(Exception):
    """Why a row is dropped."""


def _samples_of_row(row: Row, root: Path, prompt: str) -> list[Sample]:
    if row.fault:
        raise _UnusableError(row.fault)
    conversations = [_conversation(turns) for turns in _turns_of_row(row.values, prompt)]
    source = _source(row.values, root)
    if len(conversations) == 1:
        return [Sample(row.name, source, conversations[0])]
    return [Sample(f"{row.name} caption {index}", source, one) for index, one in enumerate(conversations)]


def _source(values: dict[str, Any], root: Path) -> Source:
    """The one picture of a row."""
    given = next((values[column] for column in PICTURE_COLUMNS if values.get(column) is not None), None)
    pictures = given if isinstance(given, list) else [] if given in (None, "") else [given]
    if len(pictures) != 1:
        raise _UnusableError("no picture" if not pictures else _several(len(pictures)))
    picture = pictures[0]
    if isinstance(picture, dict):
        picture = picture.get("path") if picture.get("bytes") is None else picture["bytes"]
    if isinstance(picture, bytes):
        return picture
    if not isinstance(picture, str):
        raise _UnusableError(f"the picture is a {type(picture).__name__}, not a path or an encoded picture")
    if "://" in picture:
        raise _UnusableError(f"the picture is the address {picture}; download it and give its path")
    if not (root / picture).is_file():
        raise _UnusableError(f"no such file: {root / picture}")
    return root / picture


def _several(number: int) -> str:
    return f"{number} pictures; one a sample is supported, several are a later feature"


def _turns_of_row(values: dict[str, Any], prompt: str) -> list[list[Any]]:
    """The conversations of a row, as they are written there: several only where it has several captions."""
    for column in ("messages", "conversations"):
        if values.get(column) is not None:
            return [_list(_parsed(values[column]), column)]
    if values.get("prompt") is not None and values.get("completion") is not None:
        return [_side(values["prompt"], "user") + _side(values["completion"], "assistant")]
    caption = next((values[column] for column in CAPTION_COLUMNS if values.get(column) is not None), None)
    if caption is None:
        raise _UnusableError(f"no text in any of the columns {', '.join(TEXT_COLUMNS)}")
    captions = caption if isinstance(caption, list) else [caption]
    if not captions or not all(isinstance(one, str) and one.strip() for one in captions):
        raise _UnusableError(f"empty caption: {caption!r}")
    return [_side(prompt, "user") + _side(one.strip(), "assistant") for one in captions]


def _side(value: Any, role: str) -> list[Any]:
    """One of TRL's prompt and completion: a text, or a list of turns."""
    return [{"role": role, "content": value}] if isinstance(value, str) else _list(value, role)


def _conversation(turns: Sequence[Any]) -> list[dict[str, Any]]:
    """Turns in their one form, with the picture in the first user turn."""
    messages = [_message(_parsed(turn)) for turn in turns]
    first_user = next((message for message in messages if message["role"] == "user"), None)
    if first_user is None:
        raise _UnusableError("no user turn")
    places = [message for message in messages for part in message["content"] if part["type"] == "image"]
    if len(places) > 1:
        raise _UnusableError(_several(len(places)))
    if not places:
        first_user["content"].insert(0, {"type": "image"})
    elif places[0] is not first_user:
        raise _UnusableError(f"the picture is in a later turn or the {places[0]['role']}'s, not in the first user turn")
    answers = [_text(message["content"]) for message in messages if message["role"] == "assistant"]
    if not answers or not all(answer.strip() for answer in answers):
        raise _UnusableError("an empty answer" if answers else "no assistant turn")
    return messages


def _message(turn: Any) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise _UnusableError(f"a turn is a {type(turn).__name__}, not an object")
    role = turn.get("role", turn.get("from"))
    if role not in _ROLES:
        raise _UnusableError(f"the role {role!r}, not one of {list(_ROLES)}")
    content = turn.get("content", turn.get("value"))
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else _list(content, "content")
    return {"role": _ROLES[role], "content": [one for part in parts for one in _parts(_parsed(part))]}


def _parts(part: Any) -> list[dict[str, str]]:
    """A part of a turn in its one form; a text with picture markers becomes several."""
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind == "image":
        return [{"type": "image"}]
    if kind != "text" or not isinstance(part.get("text"), str):
        raise _UnusableError(f"a part of the type {kind!r}, not an image or a text")
    texts = part["text"].split(_MARKER)
    if len(texts) == 1:
        return [{"type": "text", "text": texts[0]}]
    parts: list[dict[str, str]] = []
    for text in texts:  # a marker stands between two texts
        parts += [{"type": "text", "text": text.strip()}] if text.strip() else []
        parts += [{"type": "image"}]
    return parts[:-1]


def _parsed(value: Any) -> Any:
    """Structure from its JSON text, as CSV files and the Json feature of `datasets` have it."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise _UnusableError(f"not JSON: {error}") from error


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise _UnusableError(f"{what} is a {type(value).__name__}, not a list")
    return value


def _text(content: list[dict[str, str]]) -> str:
    return "".join(part["text"] for part in content if part["type"] == "text")
