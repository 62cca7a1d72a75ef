"""Samples in a temporary file instead of in memory: an Arrow table, which `datasets` maps page by page."""

from __future__ import annotations

import operator
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from lavender.data.about import About
from lavender.data.sample import Sample
from lavender.files import writing

if TYPE_CHECKING:
    import datasets

_PIECE_ROWS, _PIECE_BYTES = 1000, 2**25  # what is written at once
_AT_ONCE = 16  # rows read at once, with their encoded images
_kept: list[_Folder] = []  # folders of data sets that a caller has, which stay until the process ends


class _Folder:
    """A temporary folder that goes when nothing uses it, or when the process that made it ends."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="lavender-"))
        weakref.finalize(self, _remove, self.path, os.getpid())


def _remove(path: Path, process: int) -> None:
    if os.getpid() == process:  # not a forked process, such as a loader's worker
        shutil.rmtree(path, ignore_errors=True)


class SampleTable(Sequence[Sample]):
    """Samples in a temporary file, each made when it is asked for. A slice is a `SampleTable` of the same file."""

    def __init__(self, rows: datasets.Dataset, folder: _Folder, has_about: bool):
        self._rows, self._folder, self._has_about = rows.with_format("arrow"), folder, has_about

    @classmethod
    def of(cls, samples: Iterable[Sample]) -> SampleTable:
        """Write samples to a new temporary file. Paths become absolute; images in memory become PNG files.

        Raises:
            DataError: an image in memory cannot be used.
            FileError: the disk of temporary files is full.
        """
        import datasets
        import pyarrow as pa

        text = datasets.Value("string")
        turn = {"role": text, "content": datasets.List({"type": text, "text": text})}
        features = datasets.Features(
            name=text,
            images=datasets.List(datasets.Image()),
            messages=datasets.List(turn),
            about=datasets.List(dict.fromkeys(About._fields, text)),
        )
        folder, schema, has_about = _Folder(), features.arrow_schema, False
        path = folder.path / "samples.arrow"
        with writing(folder.path), pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            for piece in _pieces(samples):
                has_about |= any(row["about"] for row in piece)
                writer.write_batch(pa.RecordBatch.from_pylist(piece, schema=schema))
        return cls(datasets.Dataset.from_file(str(path)), folder, has_about)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Sample]:
        for table in self._rows.iter(_AT_ONCE):
            yield from map(_sample, table.to_pylist())

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> SampleTable: ...
    def __getitem__(self, index: int | slice) -> Sample | SampleTable:
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        [row] = self._rows[operator.index(index)].to_pylist()
        return _sample(row)

    def select(self, indices: Sequence[int]) -> SampleTable:
        """The samples of these indices, in this order."""
        rows = self._rows.select(indices if len(indices) else [])  # `datasets` refuses an empty range
        return SampleTable(rows, self._folder, self._has_about)

    def dataset(self) -> datasets.Dataset:
        """See `lavender.data.samples.to_dataset`."""
        _kept.append(self._folder)
        columns = ["images", "messages", *(["about"] if self._has_about else [])]
        return self._rows.with_format(None).select_columns(columns)


def _pieces(samples: Iterable[Sample]) -> Iterator[list[dict[str, Any]]]:
    """The rows of some samples at a time."""
    piece: list[dict[str, Any]] = []
    size = 0
    for sample in samples:
        images = [_encoded(sample, index) for index in range(len(sample.sources))]
        num_bytes = sum(len(image["bytes"] or b"") for image in images)
        if len(piece) == _PIECE_ROWS or (piece and size + num_bytes > _PIECE_BYTES):
            yield piece
            piece, size = [], 0
        about = [entry._asdict() for entry in sample.about]
        piece.append({"name": sample.name, "images": images, "messages": sample.messages, "about": about})
        size += num_bytes
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


def _sample(row: dict[str, Any]) -> Sample:
    sources = [Path(image["path"]) if image["bytes"] is None else image["bytes"] for image in row["images"]]
    for message in row["messages"]:
        message["content"] = [
            {key: value for key, value in part.items() if value is not None} for part in message["content"]
        ]
    return Sample(row["name"], tuple(sources), row["messages"], tuple(About(**entry) for entry in row["about"]))
