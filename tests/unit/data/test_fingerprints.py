"""The digest of a folder: every file that loading may read, also behind a link."""

from __future__ import annotations

from pathlib import Path

import pytest

from lavender.data.fingerprints import digest_of_folder, digest_of_pipeline


def folder_of(place: Path, **files: str) -> Path:
    for name, text in files.items():
        path = place / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return place


def test_a_linked_part_counts_as_the_files_in_it(tmp_path):
    plain = folder_of(tmp_path / "plain", model="a", unet__weights="1")
    unets = [folder_of(tmp_path / f"unet{number}", weights=number) for number in "12"]
    linked = [folder_of(tmp_path / f"linked{number}", model="a") for number in "12"]
    for folder, unet in zip(linked, unets, strict=True):
        (folder / "unet").symlink_to(unet)
    assert digest_of_folder(linked[0]) == digest_of_folder(plain) != digest_of_folder(linked[1])


def test_a_circle_of_links_ends(tmp_path):
    folder = folder_of(tmp_path / "model", config="a", part__weights="1")
    before = digest_of_folder(folder)
    (folder / "part" / "again").symlink_to(folder)
    assert digest_of_folder(folder) == before


def test_hidden_files_and_pages_do_not_count(tmp_path):
    folder = folder_of(tmp_path / "model", config="a")
    before = digest_of_folder(folder)
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").write_text("1")
    (folder / "README.md").write_text("1")
    assert digest_of_folder(folder) == before


@pytest.mark.parametrize(
    ("file", "counts"),
    [
        ("model_index.json", True),
        ("unet/config.json", True),
        ("unet/model-00001-of-00002.safetensors", True),
        ("tokenizer/spiece.model", True),
        ("one_file.safetensors", False),
        ("one_file.ckpt", False),
        ("unet/model.bin", False),
        ("unet/model.fp16.safetensors", False),
    ],
)
def test_a_pipeline_is_what_its_parts_are_loaded_from(tmp_path, file, counts):
    folder = tmp_path / "teacher"
    for name in ("model_index.json", "unet/config.json", file):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("1")
    before = digest_of_pipeline(folder)
    (folder / file).write_text("2")
    assert (digest_of_pipeline(folder) != before) == counts
