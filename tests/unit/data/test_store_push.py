"""The push of a store to a hub: the hub's own client, and a server on this machine in the place of the hub."""

from __future__ import annotations

from command_line import complaint, lavender
from hub_server import hub  # noqa: F401
from lavender.cli.main import DONE, FAILED


def test_a_push_uploads_the_table_and_its_card(hub, store_path, tmp_path):  # noqa: F811
    ran = lavender("store", "push", store_path, "someone/maps")
    assert ran.code == DONE, ran.err
    assert ran.out == f"uploaded to {hub.url}/datasets/someone/maps/commit/{'a' * 40}\n"
    assert (hub.made["type"], hub.made["organization"], hub.made["name"]) == ("dataset", "someone", "maps")
    assert hub.made.get("private") is True or hub.made.get("visibility") == "private"
    lavender("store", "push", store_path, "someone/maps", "--dry-run", tmp_path / "dry")
    written = {str(path.relative_to(tmp_path / "dry")): path for path in (tmp_path / "dry").rglob("*.*")}
    assert (
        hub.files.keys() == written.keys() == {"README.md", "lavender_maps.json", "data/train-00000-of-00001.parquet"}
    )
    assert {name: path.read_bytes() for name, path in written.items()} == hub.files


def test_a_second_push_replaces_the_table(hub, store_path):  # noqa: F811
    """A file of a longer table would stay, and its records would be there twice."""
    hub.files = dict.fromkeys(
        ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "mine.txt"], b""
    )
    assert lavender("store", "push", store_path, "someone/maps").code == DONE
    assert hub.deleted == ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]
    assert sorted(hub.files) == ["README.md", "data/train-00000-of-00001.parquet", "lavender_maps.json", "mine.txt"]
    assert lavender("store", "push", store_path, "someone/maps").code == DONE
    assert "data/train-00000-of-00001.parquet" in hub.files


def test_a_hub_that_refuses_is_one_error(hub, store_path):  # noqa: F811
    hub.refuses = True
    said = complaint(lavender("store", "push", store_path, "someone/maps"), FAILED)
    assert "nothing was uploaded" in said
    assert "someone/maps" in said
    assert not hub.files
