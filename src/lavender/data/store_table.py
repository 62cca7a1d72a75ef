"""A map store as a table of the library `datasets`: export, import, a data set card, and the push to a hub.

    lavender_maps.json                   identity, grid and info of the store, and the number of records
    README.md                            the data set card
    data/train-00000-of-00002.parquet    the table, a row per record

A map is `maps[word] / 255 * words[word]["scale"]`, as in the store, so a store that is exported and imported again has
the same maps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from lavender.data.hub import make_repository, upload
from lavender.data.made_from import without_sources
from lavender.data.store import MapStore
from lavender.data.store_tools import stats, store_folder, whole_folder
from lavender.data.store_writer import quantised
from lavender.errors import StoreError
from lavender.files import expanded, read_whole, write_whole
from lavender.maps import Dropped, Word, WordMaps

if TYPE_CHECKING:
    import datasets

FACTS = "lavender_maps.json"
ROWS_PER_FILE = 5000
"""The most records of a .parquet file: about 30 MB of maps of 32 × 32."""
BYTES_PER_FILE = 2**27
"""The most bytes of the maps of a .parquet file, on average. They are in memory while it is written."""
_BYTES_READ = 2**25  # of maps, about, at once
_CARD = """\
# Word maps

{records:,} texts on {images:,} images with {words:,} word maps of {rows} × {cols} cells, exported with `lavender-vlm`.
A word map says where a word of a text lies in an image. It covers the whole image; row 0 is the top, column 0 the left.

The images are not part of this data set, and a text is that of its source: their licences are those of the source.

| column | content |
| --- | --- |
| `image_id` | hash of the decoded image: its size and RGB pixels |
| `text` | the text whose words are mapped |
| `words` | per word: `text`, `start` and `end` (characters), `lemma`, `part_of_speech`, `confidence` and `scale` |
| `maps` | uint8 (word, {rows}, {cols}); a map is `maps[word] / 255 * words[word]["scale"]` |
| `dropped` | words that should have a map and have none, with the reason |

```python
from datasets import load_dataset

maps = load_dataset("{repository}", split="train").with_format("numpy")
print(maps[0]["text"], maps[0]["maps"].shape)
```

To train with these maps, download the repository and make a map store of it:

```
hf download {repository} --repo-type dataset --local-dir maps-table
lavender store import maps-table --out maps
```

## How they were made

```json
{settings}
```
"""


def export_table(store: str | Path, out: str | Path, repository: str = "NAME/REPOSITORY") -> int:
    """Write a store as a table to a new folder, with its card. The folder appears when it is complete.

    Args:
        store: the folder of the store.
        out: a new or empty folder.
        repository: hub id that the card's examples name.

    Returns:
        The number of records.

    Raises:
        StoreError: a damaged store; `out` holds files.
    """
    import datasets

    opened = MapStore.open(store)
    features, rows = _features(opened.grid), _rows(opened)
    cells = max(1, opened.num_words * math.prod(opened.grid))
    size = max(1, min(ROWS_PER_FILE, len(opened) * BYTES_PER_FILE // cells))
    number = max(1, -(-len(opened) // size))
    with whole_folder(expanded(out), FACTS) as folder, _no_bars():
        (folder / "data").mkdir()
        for index in range(number):
            piece = list(islice(rows, size))
            columns = {name: [row[name] for row in piece] for name in features}
            path = folder / "data" / f"train-{index:05}-of-{number:05}.parquet"
            datasets.Dataset.from_dict(columns, features=features).to_parquet(str(path))
        facts = {
            "grid": opened.grid,
            "identity": opened.identity,
            "info": without_sources(opened.info),
            "records": len(opened),
        }
        write_whole(folder / FACTS, json.dumps(facts, indent=1, ensure_ascii=False))
        write_whole(folder / "README.md", _card(stats(opened), repository))
    return len(opened)


def _features(grid: tuple[int, int]) -> datasets.Features:
    from datasets import Array3D, Features, List, Value

    text, number = Value("string"), Value("float32")
    word = {"text": text, "start": Value("int32"), "end": Value("int32"), "lemma": text, "part_of_speech": text}
    return Features(
        {
            "image_id": text,
            "text": text,
            "words": List(word | {"confidence": number, "scale": number}),
            "maps": Array3D((None, *grid), "uint8"),
            "dropped": List({"what": text, "reason": text}),
        }
    )


def _rows(store: MapStore) -> Iterator[dict[str, Any]]:
    for record in store:
        maps, scales = quantised(record.maps)
        pairs = zip(record.words, record.confidence.tolist(), scales.tolist(), strict=True)
        yield {
            "image_id": record.image_id,
            "text": record.text,
            "words": [vars(word) | {"confidence": confidence, "scale": scale} for word, confidence, scale in pairs],
            "maps": maps,
            "dropped": [vars(drop) for drop in record.dropped],
        }


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without a progress bar per file."""
    import datasets

    were_shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if were_shown:
            datasets.enable_progress_bars()


def _card(found: dict[str, Any], repository: str) -> str:
    """The README.md of a store whose `stats` these are."""
    from huggingface_hub import DatasetCardData

    size = next((name for most, name in _SIZES if found["records"] < most), "n>1B")
    data = DatasetCardData(
        pretty_name="Word maps",
        size_categories=[size],
        tags=["lavender-vlm", "attention"],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}],
    )
    rows, cols = found["grid"]
    made = {"identity": found["identity"], "info": without_sources(found["info"])}
    settings = json.dumps(made, indent=1, ensure_ascii=False)
    text = _CARD.format(**found, rows=rows, cols=cols, settings=settings, repository=repository)
    return f"---\n{data.to_yaml()}\n---\n\n{text}"


_SIZES = [(10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M")]
_SIZES += [(10**8, "10M<n<100M"), (10**9, "100M<n<1B")]


def is_table(folder: str | Path) -> bool:
    """Whether a folder is one that `export_table` wrote."""
    return (expanded(folder) / FACTS).is_file()


def import_table(source: str | Path, out: str | Path) -> int:
    """Write a store from a table that `export_table` wrote. A new store appears when it is complete.

    Args:
        source: the folder, also as downloaded from a hub.
        out: a new or empty folder, or a store of the same identity, to which records are added.

    Returns:
        The number of records written.

    Raises:
        FileError: `out` cannot be written.
        StoreError: no such table, a damaged one, or one with a missing file; another store at `out`.
    """
    source = expanded(source)
    try:
        facts = json.loads(read_whole(source / FACTS))
        rows, cols = facts["grid"]
        number, identity, info = facts["records"], dict(facts["identity"]), without_sources(facts["info"])
        if not all(type(value) is int for value in (rows, cols, number)) or min(rows, cols) < 1:
            raise ValueError(f"grid {facts['grid']} and records {number!r}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _no_table(f"{source / FACTS}: {error!r}") from error
    index = added = 0
    with store_folder(expanded(out)) as folder, MapStore.writer(folder, identity, info, (rows, cols)) as writer:
        writer.note_source("import", [str(source.absolute())])
        for table in _tables(source, rows * cols):
            try:
                for row, maps in zip(table.drop(["maps"]).to_pylist(), _maps(table, (rows, cols)), strict=True):
                    added += writer.add(_record(row, maps))
                    index += 1
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise _no_table(f"row {index} of {source}: {error}") from error
        if index != number:
            raise _no_table(f"{source} with {index} of {number} records")
    return added


def _tables(source: Path, cells: int) -> Iterator[pa.Table]:
    """Some rows at a time, read from the files themselves. Raises StoreError."""
    rows = max(1, min(256, _BYTES_READ // (8 * cells)))  # of some eight words
    try:
        for file in sorted((source / "data").glob("train-*.parquet")):
            with pq.ParquetFile(file) as opened:
                for batch in opened.iter_batches(rows):
                    yield pa.Table.from_batches([batch])
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _no_table(f"{source}: {error}") from error


def _maps(table: pa.Table, grid: tuple[int, int]) -> Iterator[np.ndarray]:
    """The maps of each row, uint8 (word, rows, cols). Raises AttributeError, KeyError or ValueError."""
    nested = table["maps"].combine_chunks()
    nested = nested.storage if isinstance(nested, pa.ExtensionArray) else nested
    for index in range(len(nested)):
        cells = nested.slice(index, 1).flatten().flatten().flatten().cast(pa.uint8())  # of another type: if exact
        yield np.asarray(cells).reshape(-1, *grid)


def _no_table(got: str) -> StoreError:
    return StoreError(
        f"{got}, which is no whole table of maps", "a folder that `lavender store export` wrote", "export it again"
    )


def _record(row: dict[str, Any], maps: np.ndarray) -> WordMaps:
    """A record of a row and its maps. Raises AttributeError, KeyError, TypeError or ValueError."""
    if not (isinstance(row["image_id"], str) and isinstance(row["text"], str)):
        raise ValueError("no image_id or no text")
    scales, confidence = (
        torch.tensor([float(word.pop(name)) for word in row["words"]]) for name in ("scale", "confidence")
    )
    for values in (scales, confidence):
        if not ((values >= 0) & (values <= 1)).all():  # also true of NaN
            raise ValueError(f"a scale or confidence outside [0, 1]: {values.tolist()}")
    words, dropped = (Word(**word) for word in row["words"]), (Dropped(**drop) for drop in row["dropped"])
    heat = torch.from_numpy(maps.astype(np.float32)) / 255 * scales[:, None, None]
    return WordMaps(row["image_id"], row["text"], tuple(words), heat, tuple(dropped), confidence)


def push(store: str | Path, repository: str, private: bool = True) -> str:
    """Upload a store's table and card to a data set repository, which is made if it is not there.

    The table replaces one that an earlier push uploaded. Other files of the repository stay, but for its card.

    Args:
        store: the folder of the store.
        repository: its hub id.
        private: whether a new repository is private.

    Returns:
        The address of the commit.

    Raises:
        FileError: the hub refuses, or cannot be reached.
        StoreError: a damaged store.
    """
    from tempfile import TemporaryDirectory

    MapStore.open(store)
    make_repository(repository, "dataset", private)  # before the export, which takes time
    with TemporaryDirectory() as folder:
        table = Path(folder) / "table"
        export_table(store, table, repository)
        # an earlier table may have more files
        return upload(table, repository, "dataset", "Word maps", private, replaced="data/train-*.parquet")
