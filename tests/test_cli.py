"""The command line as a user meets it: help, exit codes, messages, and what bad input does.

Verbs run in this process, through `main`. No score is looked at: any weights will do.
"""

from __future__ import annotations

import contextlib
import io
import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import yaml
from PIL import Image

from lavender.cli import DONE, FAILED, VERBS, WRONG_USAGE, main
from lavender.store import MapStore
from lavender.world import STUDENT_PATH

GRID = "16"  # the built-in teacher's own


@dataclass(frozen=True)
class Ran:
    """What a call of the command line gave."""

    code: int
    out: str
    err: str


def lavender(*arguments: object) -> Ran:
    """Run a verb in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code: object = main([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse's way out
            code = end.code
    return Ran(cast(int, code), out.getvalue(), err.getvalue())


def complaint(ran: Ran, code: int) -> str:
    """The one line on stderr, in its three parts, with the given exit code."""
    assert ran.code == code, ran
    assert "Traceback" not in ran.err
    line = next(line for line in ran.err.splitlines() if line.startswith("lavender "))
    got, expected, do = line.find("Got "), line.find(" Expected "), line.find(" Do this: ")
    assert 0 <= got < expected < do, line
    return line


# help and wrong usage


def test_help_names_every_verb_and_loads_no_framework():
    script = (
        "import sys; from lavender.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'diffusers', 'numpy', 'PIL'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    *page, loaded = ran.stdout.splitlines()
    assert loaded == "[]"
    assert all(any(line.split()[:1] == [verb] for line in page) for verb in VERBS)


@pytest.mark.parametrize("verb", list(VERBS))
def test_every_verb_has_help(verb):
    ran = lavender(verb, "--help")
    assert ran.code == DONE
    assert ran.out.startswith(f"usage: lavender {verb} ")
    assert not ran.err


def test_the_version_is_that_of_the_distribution():
    from importlib.metadata import version

    assert lavender("--version").out == f"lavender-vlm {version('lavender-vlm')}\n"


@pytest.mark.parametrize(
    "arguments", [(), ("extrakt",), ("extract", "--data", "photos"), ("eval", "run", "--limit", "x")]
)
def test_usage_that_argparse_refuses(arguments):
    ran = lavender(*arguments)
    assert ran.code == WRONG_USAGE
    assert ran.err.startswith("usage: lavender")


# runs


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes a run's YAML file; `data` and `maps` are not there."""

    def write(**settings: object) -> Path:
        path = tmp_path / "run.yaml"
        ours = {"model": str(STUDENT_PATH), "data": str(tmp_path / "data"), "maps": str(tmp_path / "maps"),
                "out": str(tmp_path / "out"), "use_cpu": True, "bf16": False}  # fmt: skip
        path.write_text(yaml.safe_dump(ours | settings))
        return path

    return write


def test_a_missing_run_file(tmp_path):
    assert str(tmp_path / "run.yaml") in complaint(lavender("train", tmp_path / "run.yaml"), WRONG_USAGE)


@pytest.mark.parametrize("text", ["model: [a", "- model\n- data\n", "a: b: c"])
def test_a_run_file_that_is_not_keys_and_values(text, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert str(path) in complaint(lavender("train", path), WRONG_USAGE)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("algin_weight", "align_weight"), ("learning_rat", "learning_rate"), ("modell", "model"), ("Pooling", "pooling")],
)
def test_a_misspelt_key_names_the_nearest_right_one(wrong, right, write_run):
    line = complaint(lavender("train", write_run(**{wrong: 1})), WRONG_USAGE)
    assert repr(wrong) in line
    assert line.endswith(f"Do this: write {right!r} instead.")


def test_a_misspelt_key_of_lora(write_run):
    line = complaint(lavender("train", write_run(lora={"r": 8, "alhpa": 32})), WRONG_USAGE)
    assert "run.yaml: lora" in line
    assert line.endswith("Do this: write 'alpha' instead.")


def test_a_misspelt_set_names_the_nearest_right_one(write_run):
    line = complaint(lavender("train", write_run(), "--set", "algin_weight=5"), WRONG_USAGE)
    assert line.endswith("Do this: write 'align_weight' instead.")


@pytest.mark.parametrize("override", ["align_weight", "align_weight=[1", "=5"])
def test_a_set_that_is_no_key_and_value(override, write_run):
    assert override in complaint(lavender("train", write_run(), "--set", override), WRONG_USAGE)


@pytest.mark.parametrize("key", ["model", "data", "maps", "out"])
def test_a_missing_key_is_named(key, write_run):
    path = write_run()
    path.write_text(yaml.safe_dump({k: v for k, v in yaml.safe_load(path.read_text()).items() if k != key}))
    assert f"no key {key!r}" in complaint(lavender("train", path), WRONG_USAGE)


@pytest.mark.parametrize("lora", [8, "often", [1]])
def test_lora_that_is_no_mapping(lora, write_run):
    assert repr(lora) in complaint(lavender("train", write_run(lora=lora)), WRONG_USAGE)


def test_numbers_with_an_exponent_are_numbers(write_run):
    """YAML 1.1 reads 5e-4 as a text."""
    from lavender.run import read_run

    path = write_run()
    path.write_text(path.read_text() + "learning_rate: 5e-4\nweight_decay: 1E3\n")
    run = read_run(path, ["adam_epsilon=1e-5", "run_name=e5"])
    assert run.training["learning_rate"] == 5e-4
    assert run.training["weight_decay"] == 1000
    assert run.training["adam_epsilon"] == 1e-5
    assert run.training["run_name"] == "e5"


def test_missing_training_data(write_run):
    assert "which does not exist" in complaint(lavender("train", write_run()), FAILED)


def test_a_setting_out_of_range(write_run, scenes_folder):
    path = write_run(data=str(scenes_folder), align_weight=-1)
    assert "align_weight=-1" in complaint(lavender("train", path), WRONG_USAGE)


def test_a_setting_of_the_wrong_kind(write_run, scenes_folder):
    path = write_run(data=str(scenes_folder), eval_strategy="sometimes")
    assert "sometimes" in complaint(lavender("train", path), WRONG_USAGE)


def test_a_model_that_is_not_there(write_run, scenes_folder, tmp_path):
    path = write_run(data=str(scenes_folder), model=str(tmp_path / "nowhere"))
    assert str(tmp_path / "nowhere") in complaint(lavender("train", path), WRONG_USAGE)


def test_training_without_a_map_store(write_run, scenes_folder, tmp_path):
    path = write_run(data=str(scenes_folder))
    assert str(tmp_path / "maps") in complaint(lavender("train", path), FAILED)


@pytest.mark.parametrize("verb", ["eval", "report"])
def test_a_folder_that_is_no_run(verb, tmp_path):
    line = complaint(lavender(verb, tmp_path), WRONG_USAGE)
    assert f"no config.yaml in {tmp_path}" in line


@pytest.mark.parametrize("limit", ["0", "-3"])
def test_no_sample_to_look_at(limit, tmp_path):
    (tmp_path / "config.yaml").write_text("{}")
    assert "limit" in complaint(lavender("eval", tmp_path, "--limit", limit), WRONG_USAGE)


# inspect


@pytest.fixture(scope="module")
def mllama_config(make_student, tmp_path_factory) -> Path:
    """A folder with a Mllama's config and nothing else."""
    path = tmp_path_factory.mktemp("mllama")
    make_student().config.save_pretrained(path)
    return path


def test_inspect_needs_a_models_config_alone(mllama_config, make_student):
    assert [file.name for file in mllama_config.iterdir()] == ["config.json"]
    ran = lavender("inspect", mllama_config)
    facts, student = json.loads(ran.out), make_student()
    assert ran.code == DONE
    assert facts["kind"] == "model"
    assert facts["family"] == "mllama"
    assert facts["class"] == "MllamaForConditionalGeneration"
    assert facts["usable_layers"] == student.config.text_config.cross_attention_layers
    assert facts["parameters"] == sum(parameter.numel() for parameter in student.parameters())


@pytest.mark.parametrize("model_type", ["qwen2_vl", "bert"])
def test_inspect_names_a_family_that_is_not_supported(model_type, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    line = complaint(lavender("inspect", tmp_path), FAILED)
    assert repr(model_type) in line
    assert "mllama" in line


@pytest.mark.parametrize("config", [None, "{}", '{"model_type": "no such thing"}', "{"])
def test_inspect_of_what_is_no_model(config, tmp_path):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    assert str(tmp_path) in complaint(lavender("inspect", tmp_path), WRONG_USAGE)


def test_inspect_of_a_path_that_is_not_there(tmp_path):
    assert str(tmp_path / "nowhere") in complaint(lavender("inspect", tmp_path / "nowhere"), WRONG_USAGE)


def test_inspect_a_map_store(store_path):
    ran, store = lavender("inspect", store_path), MapStore.open(store_path)
    facts = json.loads(ran.out)
    assert ran.code == DONE
    assert facts["kind"] == "map store"
    assert facts["records"] == len(store)
    assert facts["words"] == store.num_words
    assert facts["grid"] == [11, 13]
    first = next(iter(store))
    assert facts["examples"][0]["text"] == first.text
    assert facts["examples"][0]["words"] == [word.text for word in first.words]


def test_inspect_a_damaged_map_store(store_path, tmp_path):
    import shutil

    copy = shutil.copytree(store_path, tmp_path / "maps")
    maps = next(copy.glob("*.safetensors"))
    content = bytearray(maps.read_bytes())
    content[-1] ^= 1
    maps.write_bytes(content)
    assert "shard-00000" in complaint(lavender("inspect", copy), FAILED)


def test_inspect_draws_a_picture_only_of_a_model(store_path, tmp_path):
    assert "--picture" in complaint(lavender("inspect", store_path, "--picture", tmp_path / "x.png"), WRONG_USAGE)
    assert not (tmp_path / "x.png").exists()


# extract: a folder of good pictures and texts


def write_metadata(folder: Path, rows: list[dict[str, str]]) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def extract(data: Path, out: Path, *more: object) -> Ran:
    return lavender("extract", "--data", data, "--teacher", "world", "--out", out, "--grid", GRID, *more)


@pytest.fixture(scope="session")
def scenes_folder(some_scenes, captions, tmp_path_factory) -> Path:
    """Six scenes as PNG files with their captions."""
    folder = tmp_path_factory.mktemp("scenes")
    rows = []
    for index, (scene, caption) in enumerate(zip(some_scenes, captions, strict=True)):
        scene.image.save(folder / f"{index}.png")
        rows.append({"file_name": f"{index}.png", "text": caption})
    write_metadata(folder, rows)
    return folder


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--words", "nuon"), "'nuon'"),
        (("--timestep", "1000"), "timestep=1000"),
        (("--grid", "1"), "(1, 1)"),
        (("--batch-size", "0"), "batch_size=0"),
        (("--device", "warp"), "'warp'"),
        (("--teacher", "/nowhere"), "/nowhere"),
        (("--data", "/nowhere/at/all"), None),
    ],
)
def test_extract_refuses_settings_before_it_writes(arguments, named, scenes_folder, tmp_path):
    line = complaint(extract(scenes_folder, tmp_path / "maps", *arguments), WRONG_USAGE if named else FAILED)
    assert (named or "/nowhere/at/all") in line
    assert not (tmp_path / "maps").exists()


def test_a_folder_of_no_known_layout_is_told_which_there_are(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    line = complaint(extract(tmp_path, tmp_path / "maps"), FAILED)
    assert "notes.txt" in line
    assert "metadata.jsonl" in line
    assert "results.csv" in line


# extract: bad pictures and texts


def header_of_png(width: int, height: int) -> bytes:
    """A PNG that says its size and has no pixels to speak of."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"\0")),
        (b"IEND", b""),
    ]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


BAD_PICTURES = {  # file: what its reason must say
    "missing.png": "no such file",
    "empty.png": "0 bytes",
    "truncated.png": "cannot be decoded",
    "animated.gif": "3 frames",
    "dot.png": "1 × 1 pixels",
    "vast.png": "at most 100,000,000 pixels",
    "text.png": "no picture",
}
UNUSUAL_PICTURES = ("cmyk.jpg", "deep.png")
BAD_TEXTS = {  # text: what its reason must say
    "": "empty caption",
    "of the and": "no word that is a noun or adjective or verb",
    "一只狗坐在草地上。": "no word that is a noun or adjective or verb",
}
LONG = "a dog and a big cat with " * 285 + "an apple on top ."


@pytest.fixture(scope="session")
def bad_folder(some_scenes, captions, scenes_folder, tmp_path_factory) -> Path:
    """Six good pictures, then pictures and texts of every kind that goes wrong, or looks as if it would."""
    folder = tmp_path_factory.mktemp("bad")
    rows = [json.loads(line) for line in (scenes_folder / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        (folder / row["file_name"]).write_bytes((scenes_folder / row["file_name"]).read_bytes())
    image = some_scenes[0].image
    whole = (folder / "0.png").read_bytes()
    (folder / "empty.png").touch()
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("not a picture at all")
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "green", "blue")]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    (folder / "vast.png").write_bytes(header_of_png(20_000, 10_000))
    image.convert("CMYK").save(folder / "cmyk.jpg")
    grey = np.asarray(image.convert("L")).astype(np.uint16) * 257
    Image.fromarray(grey).save(folder / "deep.png")
    rows += [{"file_name": name, "text": captions[0]} for name in (*BAD_PICTURES, *UNUSUAL_PICTURES)]
    rows += [{"file_name": "0.png", "text": text} for text in (*BAD_TEXTS, LONG)]
    write_metadata(folder, rows)
    return folder


@pytest.fixture(scope="session")
def extracted(bad_folder, tmp_path_factory) -> tuple[Ran, Path]:
    """That folder, extracted."""
    out = tmp_path_factory.mktemp("extracted") / "maps"
    return extract(bad_folder, out), out


def test_bad_input_is_skipped_counted_and_named(extracted):
    ran, out = extracted
    assert ran.code == DONE, ran.err
    dropped = json.loads((out / "extraction.json").read_text())["dropped"]
    wrong = len(BAD_PICTURES) + len(BAD_TEXTS)
    assert f"; {wrong} dropped" in ran.out
    assert len(dropped) == wrong
    for reason in (*BAD_PICTURES.values(), *BAD_TEXTS.values()):
        assert any(reason in one["reason"] for one in dropped), reason
    lines = (6, *range(6 + 1, 6 + len(BAD_PICTURES)), *range(15, 18))  # of metadata.jsonl, from 0
    assert sorted(one["what"].split(":")[0] for one in dropped) == sorted(f"metadata.jsonl line {n + 1}" for n in lines)


def test_the_summary_shows_ten_drops_and_where_the_rest_is(extracted):
    ran, out = extracted
    shown = [line for line in ran.out.splitlines() if line.startswith("  dropped ")]
    dropped = json.loads((out / "extraction.json").read_text())["dropped"]
    assert shown == [f"  dropped {one['what']}: {one['reason']}" for one in dropped[: len(shown)]]
    assert len(shown) == 10


def test_time_and_disk_are_told_before_the_work(extracted):
    ran, _ = extracted
    assert " texts: about " in ran.err + ran.out
    assert " MB" in ran.err + ran.out


def test_good_and_unusual_input_is_all_there(extracted, bad_folder, captions):
    from lavender.images import image_id, load_image

    store = MapStore.open(extracted[1], verify=True)

    def words(name: str, text: str) -> list[str]:
        maps = store.get(image_id(load_image(bad_folder / name, name)), text)
        assert maps is not None
        assert maps.grid == (16, 16)
        return [word.text for word in maps.words]

    for index, caption in enumerate(captions):
        assert words(f"{index}.png", caption)
    for name in UNUSUAL_PICTURES:
        assert words(name, captions[0]) == words("0.png", captions[0])
    assert len(LONG.split()) == 2000
    long = words("0.png", LONG)
    assert long.count("dog") == long.count("cat") == 285
    assert long[-2:] == ["apple", "top"]


def test_a_second_run_finds_everything_there(extracted, bad_folder):
    _, out = extracted
    before = [(maps.image_id, maps.text) for maps in MapStore.open(out)]
    again = extract(bad_folder, out)
    assert again.code == DONE
    assert f"; {len(before)} were already there; " in again.out
    assert [(maps.image_id, maps.text) for maps in MapStore.open(out)] == before


def test_a_store_of_another_geometry_is_refused_and_stays(extracted, scenes_folder):
    _, out = extracted
    before = len(MapStore.open(out))
    line = complaint(extract(scenes_folder, out, "--grid", "8"), FAILED)
    assert "[16, 16]" in line
    assert "[8, 8]" in line
    assert len(MapStore.open(out, verify=True)) == before


@pytest.mark.parametrize("other", [("--mode", "ddim"), ("--seed", "1"), ("--timestep", "50"), ("--words", "noun")])
def test_a_store_of_other_settings_names_the_setting(other, extracted, scenes_folder):
    key = {"--words": "parts_of_speech"}.get(other[0], other[0].removeprefix("--"))
    assert f"{key} is " in complaint(extract(scenes_folder, extracted[1], *other), FAILED)


def test_strict_stops_at_a_bad_picture_and_keeps_what_was_extracted(scenes_folder, captions, tmp_path):
    for file in scenes_folder.glob("*.png"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:400])
    write_metadata(tmp_path, [{"file_name": f"{n}.png", "text": text} for n, text in enumerate(captions)])
    out = tmp_path / "maps"
    line = complaint(extract(tmp_path, out, "--strict", "--batch-size", "1"), FAILED)
    assert "metadata.jsonl line 4" in line
    assert [maps.text for maps in MapStore.open(out, verify=True)] == captions[:3]
    rest = extract(tmp_path, out)
    assert rest.code == DONE
    assert "2 texts with " in rest.out
    assert "; 3 were already there; 1 dropped" in rest.out
    assert {maps.text for maps in MapStore.open(out)} == {*captions[:3], *captions[4:]}


def test_strict_refuses_unreadable_rows_before_the_first_pass(bad_folder, tmp_path):
    line = complaint(extract(bad_folder, tmp_path / "maps", "--strict"), FAILED)
    assert "no such file" in line
    assert "strict" in line


def test_strict_is_content_with_good_input(scenes_folder, tmp_path):
    ran = extract(scenes_folder, tmp_path / "maps", "--strict")
    assert ran.code == DONE
    assert "\n6 texts with " in ran.out
    assert "; 0 dropped" in ran.out


def test_a_picture_that_breaks_while_training_is_named_before_training(write_run, extracted, bad_folder):
    """Training drops what extraction dropped: a skip that is counted, not a crash at some step."""
    run = write_run(data=str(bad_folder), maps=str(extracted[1]), max_steps=1, per_device_train_batch_size=2,
                    save_strategy="no", disable_tqdm=True, activation_checkpointing=False)  # fmt: skip
    ran = lavender("train", run, "--set", "dtype=float32")
    assert ran.code == DONE, ran.err
    coverage = json.loads((run.parent / "out" / "coverage.json").read_text())
    reasons = [one["reason"] for one in coverage["unreadable"]]
    for reason in BAD_PICTURES.values():
        assert any(reason in one for one in reasons), reason
    assert ran.out.count("dropped ") >= len(BAD_PICTURES)


# eval, with models that are not run


@pytest.fixture
def evaluate(tmp_path, monkeypatch) -> Callable[..., dict]:
    """Evaluates `a/run` against others of tmp_path on some data; returns eval.json and notes what was looked at."""
    from lavender import judgement
    from lavender.comparison import Observed

    def observe(arms, samples, store):
        return {name: Observed([], [], {"num_samples": float(len(samples))}) for name in arms}, []

    monkeypatch.setattr(judgement, "_observe_arms", observe)

    def run(data: Path, *against: str) -> dict:
        (tmp_path / "a" / "run").mkdir(parents=True)
        config = {"model": "a model", "data": str(data), "maps": "maps", "prompt": "What?"}
        (tmp_path / "a" / "run" / "config.yaml").write_text(yaml.safe_dump(config))
        others = [part for name in against for part in ("--against", tmp_path / name)]
        ran = lavender("eval", tmp_path / "a" / "run", "--data", data, *others)
        assert ran.code == DONE, ran.err
        return json.loads((tmp_path / "a" / "run" / "eval.json").read_text())

    return run


def test_arms_of_the_same_name_are_told_apart(evaluate, scenes_folder):
    assert list(evaluate(scenes_folder, "b/run", "base")["arms"]) == ["base", "run", "base (2)", "run (3)"]


def test_eval_leaves_out_what_cannot_be_decoded_and_says_so(evaluate, bad_folder):
    result = evaluate(bad_folder)
    notes = "\n".join(result["notes"])
    for name, reason in BAD_PICTURES.items():
        assert (reason in notes) == (name != "missing.png")  # that one was dropped when the rows were read
    good = 6 + len(UNUSUAL_PICTURES) + len(BAD_TEXTS)  # one of these texts is empty, and LONG is there
    assert result["arms"]["base"]["num_samples"] == good
