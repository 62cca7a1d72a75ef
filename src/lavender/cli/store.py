"""`lavender store`: verify, count, merge, convert and publish map stores."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lavender.cli.options import add_columns, columns_of
from lavender.cli.stopping import DONE
from lavender.cli.terminal import show
from lavender.errors import ConfigError, StoreError
from lavender.files import data_path, expanded, writing

HELP = "verify, count, merge, convert or publish map stores"
DESCRIPTION = "Verify, count, merge, convert or publish map stores. `lavender store ACTION --help` has the options."
SHOWN_FAULTS = 20


def add_options(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", title="actions")

    def action(name: str, act: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        added = actions.add_parser(name, help=text[0].lower() + text[1:].partition(".")[0], description=text)
        added.set_defaults(act=act)
        return added

    verify = action("verify", _verify, "Read every record of stores and compare its checksum. Exits with 1 on a fault.")
    verify.add_argument("stores", type=expanded, nargs="+", metavar="STORE", help="folder of a map store")
    stats = action("stats", _stats, "Count the records, images and words of a store. Reads no map.")
    stats.add_argument("store", type=expanded, metavar="STORE", help="folder of a map store")
    stats.add_argument("--json", action="store_true", help="print JSON")
    merge = action("merge", _merge, "Write the records of several stores of the same settings to one.")
    merge.add_argument("stores", type=expanded, nargs="+", metavar="STORE", help="folder of a map store")
    merge.add_argument(
        "--out", type=expanded, required=True, metavar="DIR", help="new folder, or a store of the same settings"
    )
    export = action("export", _export, "Write a store as a table of the library datasets, with a data set card.")
    export.add_argument("store", type=expanded, metavar="STORE", help="folder of a map store")
    export.add_argument("--out", type=expanded, required=True, metavar="DIR", help="new folder")
    _add_import(
        action("import", _import, "Write a store from an exported table, or from the JPEG maps of the authors.")
    )
    push = action("push", _push, "Upload a store's table, with a card, to a data set repository of the hub.")
    push.add_argument("store", type=expanded, metavar="STORE", help="folder of a map store")
    push.add_argument("repository", metavar="NAME/REPOSITORY", help="id of the data set repository")
    push.add_argument("--public", action="store_true", help="make a new repository public; it is private otherwise")
    push.add_argument("--dry-run", type=expanded, metavar="DIR", help="write what would be uploaded to a new folder")


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=expanded, metavar="SOURCE", help="exported table, or folder of JPEG maps")
    parser.add_argument("--out", type=expanded, required=True, metavar="DIR", help="folder of the store")
    parser.add_argument("--data", type=data_path, help="of JPEG maps: the images and texts that they are of")
    add_columns(parser)
    parser.add_argument(
        "--geometry",
        choices=("crop", "squash"),
        help="of JPEG maps: whether they cover the central square of an image, or all of it (default: crop)",
    )
    parser.add_argument("--strict", action="store_true", help="of JPEG maps: stop at the first that cannot be used")


def run(options: argparse.Namespace) -> int:
    with writing(getattr(options, "out", None) or Path.cwd()):
        options.act(options)
    return DONE


def _verify(options: argparse.Namespace) -> None:
    from lavender.data.store_tools import verify

    faults: list[str] = []
    unread: list[StoreError] = []
    for path in options.stores:
        try:
            found = verify(path)
        except StoreError as error:
            show(error.got)
            unread.append(error)
            continue
        state = _number(found.faults) if found.faults else "whole"
        show(f"{path}: {found.records} records with {found.words} word maps, {state}")
        for fault in found.faults[:SHOWN_FAULTS]:
            show(f"  {fault}")
        if len(found.faults) > SHOWN_FAULTS:
            show(f"  … and {len(found.faults) - SHOWN_FAULTS} more")
        faults += found.faults
    if faults:
        again = "repeat the command that wrote the store: it redoes only their records"
        do = f"restore the files from a copy, or delete both files of each shard that is named and {again}"
        raise StoreError(_number([*faults, *unread]), "whole stores", do)
    if unread:
        raise unread[0]


def _number(faults: Sequence[object]) -> str:
    return f"{len(faults)} fault{'s' if len(faults) > 1 else ''}"


def _stats(options: argparse.Namespace) -> None:
    from lavender.data.store_tools import stats

    found = stats(options.store)
    if options.json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
        return
    for name, value in found.items():
        show(f"{name.replace('_', ' ')}: {_listed(value)}")


def _listed(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_listed(one)}" for name, one in value.items()) or "none"
    return f"{value:,}" if type(value) is int else "none" if value is None else str(value)


def _merge(options: argparse.Namespace) -> None:
    from lavender.data.store_tools import merge

    merged = merge(options.stores, options.out)
    show(f"{merged.records} records in {options.out}: {merged.added} added, {merged.repeated} were in an earlier store")


def _export(options: argparse.Namespace) -> None:
    from lavender.data.store_table import export_table

    show(f"{export_table(options.store, options.out)} records written to {options.out}")


def _import(options: argparse.Namespace) -> None:
    from lavender.data.store_table import import_table, is_table

    if is_table(options.source):
        for name in ("data", "columns", "geometry", "strict"):
            if getattr(options, name):
                raise ConfigError(f"--{name} with an exported table", "--out alone", f"leave --{name} out")
        show(f"{import_table(options.source, options.out)} records written to {options.out}")
        return
    from lavender.data.samples import read_samples
    from lavender.teachers.jpeg_maps import import_jpeg_maps

    if options.data is None:
        raise ConfigError(
            f"{options.source}, which is no exported table, without --data",
            "--data, the images and texts of the JPEG maps",
            "name them, or import a folder that `lavender store export` wrote",
        )
    samples = read_samples(options.data, columns=columns_of(options))
    summary = import_jpeg_maps(samples, options.source, options.out, options.geometry or "crop", options.strict)
    show(
        f"{summary.records} texts with {summary.words} word maps written to {options.out}; "
        f"{summary.already_there} were already there; {len(summary.dropped)} dropped"
    )
    for drop in summary.dropped[:SHOWN_FAULTS]:
        show(f"  dropped {drop.what}: {drop.reason}")
    if len(summary.dropped) > SHOWN_FAULTS:
        show(f"  … and {len(summary.dropped) - SHOWN_FAULTS} more; {options.out / 'extraction.json'} lists all")


def _push(options: argparse.Namespace) -> None:
    from lavender.data.store_table import export_table, push

    if options.dry_run is not None:
        export_table(options.store, options.dry_run, options.repository)
        for path in sorted(options.dry_run.rglob("*")):
            if path.is_file():
                show(f"would upload {path.relative_to(options.dry_run)} ({path.stat().st_size:,} bytes)")
        return
    show(f"uploaded to {push(options.store, options.repository, private=not options.public)}")
