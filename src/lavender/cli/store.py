"""`lavender store`: verify, count, merge, convert and publish map stores."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lavender.cli.options import add_columns, columns_of
from lavender.cli.output import report
from lavender.cli.stopping import DONE
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

    facts: list[dict[str, Any]] = []
    lines: list[str] = []
    unread: list[StoreError] = []
    for path in options.stores:
        try:
            found = verify(path)
        except StoreError as error:
            lines.append(error.got)
            facts.append({"store": str(path), "unreadable": error.got})
            unread.append(error)
            continue
        state = _number(found.faults) if found.faults else "whole"
        lines.append(f"{path}: {found.records} records with {found.words} word maps, {state}")
        lines += _first(list(map(str, found.faults)), "")
        facts.append({"store": str(path), "records": found.records, "words": found.words, "faults": found.faults})
    report(options, facts, lines)
    faults = [fault for one in facts for fault in one.get("faults", ())]
    if faults:
        again = "repeat the command that wrote the store: it redoes only their records"
        do = f"restore the files from a copy, or delete both files of each shard that is named and {again}"
        raise StoreError(_number([*faults, *unread]), "whole stores", do)
    if unread:
        raise unread[0]


def _number(faults: Sequence[object]) -> str:
    return f"{len(faults)} fault{'s' if len(faults) > 1 else ''}"


def _first(lines: Sequence[str], where: str) -> Iterator[str]:
    for line in lines[:SHOWN_FAULTS]:
        yield f"  {line}"
    if len(lines) > SHOWN_FAULTS:
        yield f"  … and {len(lines) - SHOWN_FAULTS} more{where}"


def _stats(options: argparse.Namespace) -> None:
    from lavender.data.store_tools import stats

    found = stats(options.store)
    report(options, found, (f"{name.replace('_', ' ')}: {_listed(value)}" for name, value in found.items()))


def _listed(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_listed(one)}" for name, one in value.items()) or "none"
    return f"{value:,}" if type(value) is int else "none" if value is None else str(value)


def _merge(options: argparse.Namespace) -> None:
    from lavender.data.store_tools import merge

    merged = merge(options.stores, options.out)
    line = (
        f"{merged.records} records in {options.out}: {merged.added} added, {merged.repeated} were in an earlier store"
    )
    facts = {"out": str(options.out), "records": merged.records, "added": merged.added, "repeated": merged.repeated}
    report(options, facts, end=[line])


def _export(options: argparse.Namespace) -> None:
    from lavender.data.store_table import export_table

    _report_records(options, export_table(options.store, options.out))


def _report_records(options: argparse.Namespace, records: int) -> None:
    facts = {"out": str(options.out), "records": records}
    report(options, facts, end=[f"{records} records written to {options.out}"])


def _import(options: argparse.Namespace) -> None:
    from lavender.data.store_table import import_table, is_table

    if is_table(options.source):
        for name in ("data", "columns", "geometry", "strict"):
            if getattr(options, name):
                raise ConfigError(f"--{name} with an exported table", "--out alone", f"leave --{name} out")
        _report_records(options, import_table(options.source, options.out))
        return
    from dataclasses import asdict

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
    dropped = [f"dropped {drop.what}: {drop.reason}" for drop in summary.dropped]
    lines = list(_first(dropped, f"; {options.out / 'extraction.json'} lists all"))
    lines.append(
        f"{summary.records} texts with {summary.words} word maps written to {options.out}; "
        f"{summary.already_there} were already there; {len(summary.dropped)} dropped"
    )
    report(options, asdict(summary) | {"out": str(options.out)}, end=lines)


def _push(options: argparse.Namespace) -> None:
    from lavender.data.store_table import export_table, push

    if options.dry_run is not None:
        export_table(options.store, options.dry_run, options.repository)
        files = sorted(path for path in options.dry_run.rglob("*") if path.is_file())
        sizes = {str(path.relative_to(options.dry_run)): path.stat().st_size for path in files}
        lines = (f"would upload {name} ({size:,} bytes)" for name, size in sizes.items())
        report(options, {"repository": options.repository, "would_upload": sizes}, lines)
        return
    address = push(options.store, options.repository, private=not options.public)
    report(options, {"repository": options.repository, "commit": address}, end=[f"uploaded to {address}"])
