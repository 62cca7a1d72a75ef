"""Pictures with conversations, in one form whatever the columns they come in.

`lavender.layouts` finds the rows; here a row becomes samples. A row that cannot be used is dropped
with its name and a reason, never silently.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from lavender.errors import DataError
from lavender.images import image_id, load_image
from lavender.layouts import Row, find_rows, unknown_layout
from lavender.maps import Dropped

if TYPE_CHECKING:
    import datasets

Source = Path | bytes | Image.Image

PICTURE_COLUMNS = ("images", "image", "file_name")
CAPTION_COLUMNS = ("text", "caption")
VIDEO_COLUMNS = ("videos", "video")
TEXT_COLUMNS = ("messages", "conversations", "completion", *CAPTION_COLUMNS)
_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_MARKER = "<image>"  # where LLaVA's and ShareGPT's texts have the picture
_PIECE_ROWS, _PIECE_BYTES = 1000, 10**9  # the most of a table: one Arrow array of bytes holds 2 GB


@dataclass(frozen=True)
class Sample:
    """One conversation about one picture, several or none.

    Attributes:
        name: for people: the file and the row or line in it.
        sources: the pictures in the order of their places, not yet decoded: each a path, an encoded file, or a
            picture in memory. () for text alone.
        messages: [{"role": …, "content": [{"type": "image"} or {"type": "text", "text": …}, …]}, …], with a part
            of type "image" for each picture, in the user's turns.

    Raises:
        DataError: another number of places than of pictures.
    """

    name: str
    sources: tuple[Source, ...]
    messages: list[dict[str, Any]]

    def __post_init__(self) -> None:
        if (places := _num_places(self.messages)) != len(self.sources):
            raise DataError(
                f"{self.name} with {_mismatch(len(self.sources), places)}", "a place for each picture",
                'put a part {"type": "image"} where each picture belongs',
            )  # fmt: skip

    @property
    def source(self) -> Source | None:
        """The picture of a sample that has exactly one; None for others."""
        return self.sources[0] if len(self.sources) == 1 else None

    @property
    def answers(self) -> tuple[str, ...]:
        """The texts of the assistant's turns: what is learnt."""
        turns = [message["content"] for message in self.messages if message["role"] == "assistant"]
        return tuple(_text(content) for content in turns)

    @property
    def pairs(self) -> tuple[tuple[int, str], ...]:
        """What has maps: (index of a picture, answer), each answer on each picture before it, picture by picture."""
        found: list[tuple[int, str]] = []
        for turn, message in enumerate(self.messages):
            if message["role"] == "assistant":
                before = range(_num_places(self.messages[:turn]))
                found += [(index, _text(message["content"])) for index in before]
        return tuple(sorted(found, key=lambda pair: pair[0]))

    def load(self) -> tuple[Image.Image, ...]:
        """The decoded pictures; see `load_image`. Raises DataError naming the sample."""
        return tuple(self.load_picture(index) for index in range(len(self.sources)))

    def load_picture(self, index: int) -> Image.Image:
        """One of the pictures, decoded. Raises DataError naming the sample."""
        which = f"picture {index + 1}" if len(self.sources) > 1 else "the picture"
        return load_image(self.sources[index], f"{which} of {self.name}")


@dataclass(frozen=True)
class Samples:
    """The samples of a data set in its order, and what was dropped from it.

    Attributes:
        identities: of each sample the `image_id` of each of its pictures; known after `readable`, () before.
    """

    samples: tuple[Sample, ...]
    dropped: tuple[Dropped, ...] = ()
    identities: tuple[tuple[str, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)


def read_samples(path: str | Path | datasets.Dataset, prompt: str = "Describe the image.") -> Samples:
    """Read a data set of pictures with text, in any of `lavender.layouts.LAYOUTS`.

    No picture is decoded; that a file exists is checked. Paths are relative to the data file (in a
    `datasets.Dataset`, to the working directory). Encoded pictures inside parquet or a Dataset are held in memory.
    Columns are tried in the order messages, conversations, prompt + completion, text, caption. A caption that is a
    list of texts gives one sample each. A conversation may have several pictures, each with its place in a user's
    turn, or none; a single picture without a place stands in the first user turn.

    Args:
        path: a file, a folder, or a dataset.
        prompt: the user's turn where the data have only captions.

    Raises:
        DataError: no such path, no known layout, a file that cannot be read, no usable row, or none with a picture.
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
    if any(sample.sources for sample in samples):
        return Samples(tuple(samples), tuple(dropped))
    if not (columns.keys() & set(PICTURE_COLUMNS) and columns.keys() & set(TEXT_COLUMNS)):
        first = f", first fault: {dropped[0].what}: {dropped[0].reason}" if dropped and not columns else ""
        raise unknown_layout(f"{label} with the columns {list(columns)}{first}")
    first = f"; the first, {dropped[0].what}: {dropped[0].reason}" if dropped else ""
    if samples:
        got = f"{label} with {len(samples)} samples, none with a picture, and {len(dropped)} rows dropped{first}"
        raise DataError(got, "a sample with a picture", f"name pictures in a column {' or '.join(PICTURE_COLUMNS)}")
    raise DataError(f"{label} with {len(dropped)} rows, none usable{first}", "at least one usable row", "repair them")


def to_dataset(samples: Iterable[Sample]) -> datasets.Dataset:
    """A dataset with the columns `images` (a list, empty for text alone) and `messages`, ready for TRL's SFTTrainer.

    Files stay paths and encoded pictures stay encoded; a picture in memory is stored as PNG, so its pixels and
    with them its `image_id` stay the same.
    """
    import datasets

    part = {"type": datasets.Value("string"), "text": datasets.Value("string")}
    turn = {"role": datasets.Value("string"), "content": datasets.List(part)}
    features = datasets.Features({"images": datasets.List(datasets.Image()), "messages": datasets.List(turn)})
    pieces = [datasets.Dataset.from_dict(piece, features=features) for piece in _pieces(samples)]
    return datasets.concatenate_datasets(pieces)


def _pieces(samples: Iterable[Sample]) -> Iterator[dict[str, list[Any]]]:
    """Columns of some samples at a time, at least once."""
    piece: dict[str, list[Any]] = {"images": [], "messages": []}
    size = 0
    for sample in samples:
        images = [_encoded(sample, index) for index in range(len(sample.sources))]
        more = sum(len(image["bytes"] or b"") for image in images)
        if len(piece["images"]) == _PIECE_ROWS or (piece["images"] and size + more > _PIECE_BYTES):
            yield piece
            piece, size = {"images": [], "messages": []}, 0
        piece["images"].append(images)
        piece["messages"].append(sample.messages)
        size += more
    yield piece


def _encoded(sample: Sample, index: int) -> dict[str, Any]:
    source = sample.sources[index]
    if isinstance(source, Path):
        return {"bytes": None, "path": str(source.absolute())}
    if isinstance(source, bytes):
        return {"bytes": source, "path": None}
    buffer = BytesIO()
    sample.load_picture(index).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


class _UnusableError(Exception):
    """Why a row is dropped."""


_VIDEO = "a video; only still pictures have maps"


def _samples_of_row(row: Row, root: Path, prompt: str) -> list[Sample]:
    if row.fault:
        raise _UnusableError(row.fault)
    if any(row.values.get(column) for column in VIDEO_COLUMNS):
        raise _UnusableError(_VIDEO)
    pictures = _pictures(row.values)
    conversations = [_conversation(turns, len(pictures)) for turns in _turns_of_row(row.values, prompt, bool(pictures))]
    sources = tuple(_source(picture, root) for picture in pictures)
    if len(conversations) == 1:
        return [Sample(row.name, sources, conversations[0])]
    return [Sample(f"{row.name} caption {index}", sources, one) for index, one in enumerate(conversations)]


def _pictures(values: dict[str, Any]) -> list[Any]:
    """The pictures of a row as they are written there."""
    column = next((column for column in PICTURE_COLUMNS if values.get(column) is not None), "")
    given = values.get(column)
    if column == "images" and isinstance(given, str) and given.startswith("["):  # a list in a CSV file
        given = _parsed(given)
    pictures = given if isinstance(given, list) else [given]
    return [] if all(picture in (None, "") for picture in pictures) else pictures


def _source(picture: Any, root: Path) -> Source:
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


def _mismatch(num_pictures: int, num_places: int) -> str:
    pictures, places = (f"{one} {what}{'' if one == 1 else 's'}" if one else f"no {what}"
                        for one, what in ((num_pictures, "picture"), (num_places, "place")))  # fmt: skip
    return f"{pictures} and {places} for pictures"


def _num_places(messages: Iterable[dict[str, Any]]) -> int:
    return sum(part["type"] == "image" for message in messages for part in message["content"])


def _turns_of_row(values: dict[str, Any], prompt: str, has_pictures: bool) -> list[list[Any]]:
    """The conversations of a row, as they are written there: several only where it has several captions."""
    for column in ("messages", "conversations"):
        if values.get(column) is not None:
            return [_list(_parsed(values[column]), column)]
    if values.get("prompt") is not None and values.get("completion") is not None:
        return [_side(values["prompt"], "user") + _side(values["completion"], "assistant")]
    caption = next((values[column] for column in CAPTION_COLUMNS if values.get(column) is not None), None)
    if caption is None:
        raise _UnusableError(f"no text in any of the columns {', '.join(TEXT_COLUMNS)}")
    if not has_pictures:
        raise _UnusableError("no picture")  # its prompt asks for one
    captions = caption if isinstance(caption, list) else [caption]
    if not captions or not all(isinstance(one, str) and one.strip() for one in captions):
        raise _UnusableError(f"empty caption: {caption!r}")
    return [_side(prompt, "user") + _side(one.strip(), "assistant") for one in captions]


def _side(value: Any, role: str) -> list[Any]:
    """One of TRL's prompt and completion: a text, or a list of turns."""
    return [{"role": role, "content": value}] if isinstance(value, str) else _list(value, role)


def _conversation(turns: Sequence[Any], num_pictures: int) -> list[dict[str, Any]]:
    """Turns in their one form, with a place for each picture."""
    messages = [_message(_parsed(turn)) for turn in turns]
    first_user = next((message for message in messages if message["role"] == "user"), None)
    if first_user is None:
        raise _UnusableError("no user turn")
    named = [part.pop("index", None) for one in messages for part in one["content"] if part["type"] == "image"]
    num_places = len(named)
    if num_pictures == 1 and num_places == 0:
        first_user["content"].insert(0, {"type": "image"})
    elif num_pictures != num_places:
        raise _UnusableError(_mismatch(num_pictures, num_places))
    if any(index not in (None, place) for place, index in enumerate(named)):
        raise _UnusableError(f"places for the pictures {named}, not in the pictures' order")
    strange = [one["role"] for one in messages if one["role"] != "user" and _num_places([one])]
    if strange:
        raise _UnusableError(f"a picture in the {strange[0]}'s turn, not in a user's")
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


def _parts(part: Any) -> list[dict[str, Any]]:
    """A part of a turn in its one form; a text with picture markers becomes several."""
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind == "image":
        return [{"type": "image", "index": part.get("index")}]  # which of the pictures, in some data sets
    if kind == "video":
        raise _UnusableError(_VIDEO)
    if kind != "text" or not isinstance(part.get("text"), str):
        raise _UnusableError(f"a part of the type {kind!r}, not an image or a text")
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
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise _UnusableError(f"not JSON: {error}") from error


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise _UnusableError(f"{what} is a {type(value).__name__}, not a list")
    return value


def _text(content: list[dict[str, str]]) -> str:
    return "".join(part["text"] for part in content if part["type"] == "text")


def readable(samples: Samples) -> Samples:
    """The samples whose pictures can be decoded, and what identifies these; the others are dropped before training."""
    places = [
        one.sources if one.sources and all(isinstance(source, Path) for source in one.sources) else index
        for index, one in enumerate(samples)
    ]
    pictures = dict(zip(places, samples, strict=True))  # each file once, however many texts it has
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        warnings.simplefilter("ignore")  # load_image does so too, but the filters are shared by all threads
        found = dict(zip(pictures, pool.map(_identities, pictures.values()), strict=True))
    seen = [(one, found[place]) for place, one in zip(places, samples, strict=True)]
    kept = tuple(one for one, ids in seen if not isinstance(ids, str))
    identities = tuple(ids for _, ids in seen if not isinstance(ids, str))
    dropped = tuple(Dropped(one.name, reason) for one, reason in seen if isinstance(reason, str))
    if not kept:
        got = f"{len(samples)} samples, none with a usable picture; the first, {dropped[0].what}: {dropped[0].reason}"
        raise DataError(got, "at least one usable sample", "repair the pictures")
    return Samples(kept, samples.dropped + dropped, identities)


def _identities(sample: Sample) -> tuple[str, ...] | str:
    """Of each of its pictures, or why one cannot be used."""
    try:
        return tuple(image_id(picture) for picture in sample.load())
    except DataError as error:
        return str(error)
