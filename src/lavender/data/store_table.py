"""A map store as a table of the library `datasets`: export, import, a data set card, and the push to a hub.

    lavender_maps.json              identity, grid and info of the store, and the number of records
    README.md                       the data set card
    data/train-00000-of-00002.parquet    the table, a row per record; with "arrow" what `Dataset.save_to_disk` writes

A map is `maps[word] / 255 * words[word]["scale"]`, as in the store, so a store that is exported and imported again has
the same maps.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from lavender.data.store import MapStore
from lavender.data.store_tools import stats
from lavender.data.store_writer import quantised
from lavender.errors import FileError, StoreError
from lavender.files import TEMPORARY, expanded, read_whole, write_whole
from lavender.maps import Dropped, Word, WordMaps

if TYPE_CHECKING:
    import datasets

Format = Literal["parquet", "arrow"]
FACTS = "lavender_maps.json"
ROWS_PER_FILE = 5000
"""Records of a .parquet file: about 30 MB of maps of 32 × 32."""
_ROWS_READ = 256
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
{identity}
```
"""


def export_table(
    store: str | Path, out: str | Path, format_name: Format = "parquet", repository: str = "NAME/REPOSITORY"
) -> int:
    """Write a store as a table to a new folder, with its card. The folder appears when it is complete.

    Args:
        store: the folder of the store.
        out: a new or empty folder.
        format_name: "parquet" for `load_dataset`, or "arrow" for `datasets.load_from_disk`.
        repository: hub id that the card's examples name.

    Returns:
        The number of records.

    Raises:
        StoreError: a damaged store; `out` holds files.
    """
    import datasets

    opened, out = MapStore.open(store), expanded(out).absolute()
    features = _features(opened.grid)
    with _new_folder(out) as folder, _no_bars():
        if format_name == "arrow":
            cache = folder / f"{TEMPORARY}cache"
            table = datasets.Dataset.from_generator(_rows, features, str(cache), gen_kwargs={"store": opened})
            table.save_to_disk(folder)
            del table
            shutil.rmtree(cache)
        else:
            (folder / "data").mkdir()
            number = max(1, -(-len(opened) // ROWS_PER_FILE))
            rows = _rows(opened)
            for index in range(number):
                piece = list(islice(rows, ROWS_PER_FILE))
                columns = {name: [row[name] for row in piece] for name in features}
                path = folder / "data" / f"train-{index:05}-of-{number:05}.parquet"
                datasets.Dataset.from_dict(columns, features=features).to_parquet(str(path))
        facts = {"grid": opened.grid, "identity": opened.identity, "info": opened.info, "records": len(opened)}
        write_whole(folder / FACTS, json.dumps(facts, indent=1, ensure_ascii=False))
        write_whole(folder / "README.md", _card(stats(store), repository))
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


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place at the end, and is removed after an error."""
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise StoreError(f"{out}, which is there already", "a new or empty folder", "choose another folder")
    folder = out.with_name(f"{TEMPORARY}{out.name}-{secrets.token_hex(8)}")
    folder.mkdir(parents=True)
    try:
        yield folder
        os.replace(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


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
    identity = json.dumps(found["identity"] | found["info"], indent=1, ensure_ascii=False)
    text = _CARD.format(**(found | {"rows": rows, "cols": cols, "identity": identity, "repository": repository}))
    return f"---\n{data.to_yaml()}\n---\n\n{text}"


_SIZES = [(10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M")]
_SIZES += [(10**8, "10M<n<100M"), (10**9, "100M<n<1B")]


def is_table(folder: str | Path) -> bool:
    """Whether a folder is one that `export_table` wrote."""
    return (expanded(folder) / FACTS).is_file()


def import_table(source: str | Path, out: str | Path) -> int:
    """Write a store from a table that `export_table` wrote. After an interruption the same call continues.

    Args:
        source: the folder, also as downloaded from a hub.
        out: a new or empty folder, or a store of the same identity, to which records are added.

    Returns:
        The number of records written.

    Raises:
        StoreError: no such table, a damaged one, or one with a missing file; another store at `out`.
    """
    source = expanded(source)
    try:
        facts = json.loads(read_whole(source / FACTS))
        grid, number = tuple(facts["grid"]), facts["records"]
        identity, info = dict(facts["identity"]), dict(facts["info"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _no_table(f"{source / FACTS}: {error!r}") from error
    index = added = 0
    with MapStore.writer(out, identity, info, grid) as writer:
        for table in _tables(source):
            try:
                for row, maps in zip(table.drop(["maps"]).to_pylist(), _maps(table, grid), strict=True):
                    added += writer.add(_record(row, maps))
                    index += 1
            except (KeyError, TypeError, ValueError) as error:
                raise _no_table(f"row {index} of {source}: {error}") from error
    if index != number:
        raise _no_table(f"{source} with {index} of {number} records")
    return added


def _tables(source: Path) -> Iterator[pa.Table]:
    """Some rows at a time, read from the files themselves. Raises StoreError."""
    import datasets

    try:
        if (source / "state.json").is_file():
            yield from datasets.Dataset.load_from_disk(source).with_format("arrow").iter(_ROWS_READ)
        for file in sorted((source / "data").glob("train-*.parquet")):
            for batch in pq.ParquetFile(file).iter_batches(_ROWS_READ):
                yield pa.Table.from_batches([batch])
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _no_table(f"{source}: {error}") from error


def _maps(table: pa.Table, grid: tuple[int, int]) -> Iterator[np.ndarray]:
    """The maps of each row, uint8 (word, rows, cols). Raises KeyError or ValueError."""
    nested = table["maps"].combine_chunks()
    nested = nested.storage if isinstance(nested, pa.ExtensionArray) else nested
    for index in range(len(nested)):
        cells = nested.slice(index, 1).flatten().flatten().flatten()
        yield np.asarray(cells, np.uint8).reshape(-1, *grid)


def _no_table(got: str) -> StoreError:
    return StoreError(
        f"{got}, which is no whole table of maps", "a folder that `lavender store export` wrote", "export it again"
    )


def _record(row: dict[str, Any], maps: np.ndarray) -> WordMaps:
    """A record of a row and its maps. Raises KeyError, TypeError or ValueError."""
    scales = torch.tensor([word.pop("scale") for word in row["words"]])
    confidence = torch.tensor([word.pop("confidence") for word in row["words"]])
    words, dropped = (Word(**word) for word in row["words"]), (Dropped(**drop) for drop in row["dropped"])
    heat = torch.from_numpy(maps.astype(np.float32)) / 255 * scales[:, None, None]
    return WordMaps(row["image_id"], row["text"], tuple(words), heat, tuple(dropped), confidence)


def push(store: str | Path, repository: str, private: bool = True) -> str:
    """Upload a store's table and card to a data set repository, which is made if it is not there.

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

    from huggingface_hub import HfApi

    with TemporaryDirectory() as folder:
        table = Path(folder) / "table"
        export_table(store, table, repository=repository)
        api = HfApi(library_name="lavender-vlm")
        try:
            api.create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repository, folder_path=table, repo_type="dataset", commit_message="Word maps"
            )
        except Exception as error:  # errors of the hub, of the connection, and of a name that it does not take
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise FileError(
                f"{repository}, to which nothing was uploaded: {reason}",
                "a repository of yours, a token that may write, and a connection",
                "check the name, run `hf auth login`, or write the folder alone with --dry-run",
            ) from error
    return str(commit)
