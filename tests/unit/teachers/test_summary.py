"""extraction.json: what every extraction into a store did; nothing that an earlier one said is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lavender.errors import StoreError
from lavender.maps import Dropped
from lavender.teachers.summary import History, Summary

BROKEN, WORDLESS = Dropped("3.png", "not a picture"), Dropped("'go'", "no token")


def said(folder: Path) -> dict:
    return json.loads((folder / "extraction.json").read_text())


def test_a_second_run_adds_to_what_the_first_said(tmp_path):
    History(tmp_path).add(Summary(5, 11, 0, 2, 1.5, dropped=[BROKEN, WORDLESS]), 5, 11)
    first = said(tmp_path)
    assert (first["records"], first["words"], first["in_store"]) == (5, 11, 5)
    assert first["dropped"] == [vars(BROKEN), vars(WORDLESS)]
    assert first["dropped_before"] == []
    History(tmp_path).add(Summary(0, 0, 5, 2, 0.5, dropped=[BROKEN]), 5, 11)
    second = said(tmp_path)
    assert (second["records"], second["words"], second["already_there"], second["seconds"]) == (5, 11, 5, 2.0)
    assert (second["dropped"], second["dropped_before"]) == ([vars(BROKEN)], [vars(WORDLESS)])
    History(tmp_path).add(Summary(1, 3, 5, 2, 0.5, dropped=[]), 6, 14)
    third = said(tmp_path)
    assert (third["records"], third["words"], third["in_store"]) == (6, 14, 6)
    assert third["dropped_before"] == [vars(WORDLESS), vars(BROKEN)]
    assert [(run["records"], run["already_there"], run["dropped"]) for run in third["runs"]] == [
        (5, 0, 2),
        (0, 5, 1),
        (1, 5, 0),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["extraction.json"]


def test_what_no_finished_run_wrote_is_counted_too(tmp_path):
    """A run of 4 records with 9 maps was killed, and the next one made the other 3 with 5."""
    History(tmp_path).add(Summary(3, 5, 4, 0, 1.5, dropped=[WORDLESS]), 7, 14)
    told = said(tmp_path)
    assert (told["records"], told["words"], told["in_store"], told["words_in_store"]) == (7, 14, 7, 14)
    assert [(run["finished"] is None, run["records"], run["words"]) for run in told["runs"]] == [
        (True, 4, 9),
        (False, 3, 5),
    ]
    History(tmp_path).add(Summary(0, 0, 7, 0, 0.5), 7, 14)
    assert (said(tmp_path)["records"], len(said(tmp_path)["runs"])) == (7, 3)  # counted once
    History(tmp_path).add(Summary(2, 2, 5, 0, 0.5), 7, 14)  # a damaged shard was deleted and made again
    assert (said(tmp_path)["records"], said(tmp_path)["in_store"], len(said(tmp_path)["runs"])) == (9, 7, 4)


def test_a_store_may_have_fewer_records_than_before(tmp_path):
    """A damaged shard of 5 records was deleted, and a run over fewer samples made 2 of them again."""
    History(tmp_path).add(Summary(10, 20, dropped=[BROKEN]), 10, 20)
    History(tmp_path).add(Summary(2, 4), 7, 14)
    told = said(tmp_path)
    assert (told["in_store"], told["words_in_store"]) == (7, 14)
    assert [run["records"] for run in told["runs"]] == [10, 2]
    assert told["dropped_before"] == [vars(BROKEN)]


def test_a_file_of_an_earlier_release_does_not_count_the_maps_in_the_store(tmp_path):
    History(tmp_path).add(Summary(5, 11), 5, 11)
    told = said(tmp_path)
    del told["words_in_store"]
    (tmp_path / "extraction.json").write_text(json.dumps(told))
    History(tmp_path).add(Summary(1, 2), 8, 17)
    assert [(run["records"], run["words"]) for run in said(tmp_path)["runs"]] == [(5, 11), (2, 4), (1, 2)]


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"dropped": [3], "dropped_before": [], "runs": []}',
        '{"dropped": [], "dropped_before": [], "runs": [{"records": "x"}]}',
    ],
)
def test_what_is_no_such_file_is_told_before_the_work(tmp_path, content):
    (tmp_path / "extraction.json").write_text(content)
    with pytest.raises(StoreError, match="extraction.json, which cannot be read .* move it away"):
        History(tmp_path)
    assert (tmp_path / "extraction.json").read_text() == content


def test_half_a_character_in_a_name_can_be_written(tmp_path):
    History(tmp_path).add(Summary(dropped=[Dropped("a \ud800 dog", "größer 🐶")]), 0, 0)
    assert said(tmp_path)["dropped"] == [{"what": "a \ud800 dog", "reason": "größer 🐶"}]


def test_a_link_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "victim").write_text("{}")
    history = History(tmp_path)
    (tmp_path / "extraction.json").symlink_to(tmp_path / "victim")
    history.add(Summary(), 0, 0)
    assert (tmp_path / "victim").read_text() == "{}"
    assert not (tmp_path / "extraction.json").is_symlink()
