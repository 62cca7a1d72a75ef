"""Extraction: interrupted or not, the same records; what cannot be used is counted and named.

The teacher is the real class on the tiny pipeline.
"""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lavender.config import ExtractionConfig
from lavender.data.images import image_id
from lavender.data.samples import Sample, Samples
from lavender.data.store import MapStore
from lavender.errors import DataError, StoreError
from lavender.maps import Dropped
from lavender.teachers.diffusion.teacher import Job, Teacher
from lavender.teachers.extract import extract
from lavender.words import content_words
from lavender.world.student_models import conversation

CONFIG = ExtractionConfig(grid=(11, 13), batch_size=2)


def sample(name: str, source, answer: str) -> Sample:
    return Sample(name, (source,), conversation("what is it?", answer))


def shade(value: int) -> Image.Image:
    return Image.new("RGB", (40, 30), (value, 90, 255 - value))


@pytest.fixture
def teacher(pipeline) -> Teacher:
    return Teacher(pipeline, CONFIG, name="tiny")


@pytest.fixture
def samples() -> Samples:
    """Nine pictures; the fourth answer has no word."""
    answers = ["a dog", "two cats run", "the red hat", "12, 3!", "a sun", "an old house", "a tree", "a cup", "a boat"]
    return Samples(tuple(sample(f"row {row}", shade(17 * row), one) for row, one in enumerate(answers)))


def records(path) -> dict:
    """(picture, text) → its words, drops and maps."""
    store = MapStore.open(path, verify=True)
    found = {(one.image_id, one.text): (one.words, one.dropped, one.maps) for one in store}
    assert len(found) == len(store)
    return found


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for key, (words, dropped, maps) in expected.items():
        assert found[key][:2] == (words, dropped)
        # a batch of another size changes the last bits, and with them at most one of 255 steps
        torch.testing.assert_close(found[key][2], maps, rtol=0, atol=1 / 255 + 1e-5)


def test_records_words_and_summary(teacher, samples, tmp_path):
    summary = extract(samples, teacher, tmp_path / "maps")
    found = records(tmp_path / "maps")
    assert summary.records == len(found) == 9
    assert (
        summary.words == sum(len(words) for words, _, _ in found.values()) == 8 + 1 + 1 + 1
    )  # cats run, red hat, old house
    assert summary.already_there == 0
    words, dropped, maps = found[image_id(shade(34)), "the red hat"]
    assert [(word.text, word.start, word.part_of_speech) for word in words] == [
        ("red", 4, "adjective"),
        ("hat", 8, "noun"),
    ]
    assert maps.shape == (2, 11, 13)
    assert maps.amax(dim=(1, 2)).tolist() == [1, 1]
    assert dropped == ()
    store = MapStore.open(tmp_path / "maps")
    assert store.identity == {**json.loads(json.dumps(CONFIG.identity())), "teacher": "tiny"}
    assert {"lavender-vlm", "diffusers", "torch"} <= store.info.keys()
    written = json.loads((tmp_path / "maps" / "extraction.json").read_text())
    assert (written["records"], written["words"]) == (9, summary.words)
    assert written["dropped"] == [vars(one) for one in summary.dropped]


def test_null_text_says_how_far_from_the_picture_it_led_back(pipeline, samples, tmp_path):
    def error(mode: Any, iterations: int) -> float | None:
        own: dict[str, Any] = (
            {"num_steps": 2, "null_text_iterations": iterations, "guidance": 30.0} if mode == "null-text" else {}
        )
        config = ExtractionConfig(grid=(11, 13), mode=mode, batch_size=2, **own)
        teacher, out = Teacher(pipeline, config), tmp_path / f"{mode}-{iterations}"
        extract(Samples(tuple(samples)[:1]), teacher, out)  # its error is no part of the second's
        summary = extract(Samples(tuple(samples)[:3]), teacher, out)
        assert json.loads((out / "extraction.json").read_text()).get("reconstruction") == summary.reconstruction
        assert len(teacher.reconstruction) == (3 if mode == "null-text" else 0)
        return summary.reconstruction

    untuned, tuned = error("null-text", 0), error("null-text", 20)
    assert untuned is not None
    assert tuned is not None
    assert 0 < tuned < 0.9 * untuned
    assert error("noise", 0) is None


def test_the_maps_are_the_teachers(teacher, samples, tmp_path, pipeline):
    extract(samples, teacher, tmp_path / "maps")
    words = content_words("two cats run", CONFIG.parts_of_speech)
    expected = teacher([Job(shade(17), image_id(shade(17)), "two cats run", words)])[0]
    stored = MapStore.open(tmp_path / "maps").get(image_id(shade(17)), "two cats run")
    assert stored is not None
    torch.testing.assert_close(stored.maps, expected.maps, rtol=0, atol=0.5 / 255 + 1e-5)


@pytest.mark.parametrize("stop", [1, 2, 5, 8])
def test_stopped_and_started_again_it_ends_with_the_same_records(teacher, samples, tmp_path, stop):
    """And with the same summary: records, words and what was dropped, also of what the first run had written."""
    long = sample("row 9", shade(200), f"a {'x' * 300} sun")  # a word that is too long to map
    samples = Samples((samples.samples[3], long, *samples.samples))
    expected = extract(samples, teacher, tmp_path / "undisturbed")
    assert len(expected.dropped) == 2
    done = 0

    def interrupt(texts: int) -> None:
        nonlocal done
        done += texts
        if done >= stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(samples, teacher, tmp_path / "maps", on_progress=interrupt)
    kept = len(MapStore.open(tmp_path / "maps"))
    assert kept >= stop - 1
    summary = extract(samples, teacher, tmp_path / "maps")
    assert summary.already_there == kept + 1  # one sample is there twice
    assert summary.records == 10 - kept
    assert sorted(map(str, summary.dropped)) == sorted(map(str, expected.dropped))
    whole, broken = (json.loads((tmp_path / name / "extraction.json").read_text()) for name in ("undisturbed", "maps"))
    for name in ("records", "words", "in_store", "words_in_store", "without_picture", "dropped_before"):
        assert broken[name] == whole[name], name
    assert sorted(map(str, broken["dropped"])) == sorted(map(str, whole["dropped"]))
    assert_same(records(tmp_path / "maps"), records(tmp_path / "undisturbed"))


def test_the_thread_that_reads_ends_with_an_error(teacher, tmp_path):
    given = Samples(tuple(sample(f"row {row}", shade(row), "a dog") for row in range(40)))  # more than it reads ahead
    threads = threading.active_count()

    def fail(texts: int) -> None:
        assert threading.active_count() == threads + 1
        raise OSError("no space")

    with pytest.raises(OSError, match="no space") as caught:
        extract(given, teacher, tmp_path / "maps", on_progress=fail)
    assert caught.tb is not None  # whose frames hold the generators
    assert threading.active_count() == threads


def test_a_failing_teacher_leaves_what_was_extracted(teacher, samples, tmp_path, monkeypatch):
    run, calls = teacher._map_rows, []

    def fails_later(*args):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return run(*args)

    monkeypatch.setattr(teacher, "_map_rows", fails_later)
    with pytest.raises(RuntimeError, match="out of memory"):
        extract(samples, teacher, tmp_path / "maps")
    assert len(MapStore.open(tmp_path / "maps")) >= 4
    assert extract(samples, teacher, tmp_path / "maps").already_there >= 4
    assert len(MapStore.open(tmp_path / "maps")) == 9


def test_run_twice_nothing_is_done_again(teacher, samples, tmp_path, monkeypatch):
    first = extract(samples, teacher, tmp_path / "maps")
    monkeypatch.setattr(teacher, "_map_rows", lambda *args: pytest.fail("the teacher ran again"))
    summary = extract(samples, teacher, tmp_path / "maps")
    assert (summary.records, summary.words, summary.already_there) == (0, 0, 9)
    assert summary.dropped == first.dropped  # what the data lack is the same
    with pytest.raises(DataError, match="row 3: '12, 3!': no word that is a noun"):
        extract(samples, teacher, tmp_path / "maps", strict=True)  # as of a new store


def test_bad_pictures_are_counted_and_named(teacher, tmp_path):
    (tmp_path / "empty.png").touch()
    shade(1).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    frames = [shade(value) for value in (1, 200)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    names = ["gone.png", "empty.png", "half.png", "moving.gif", "dot.png"]
    bad = [sample(f"row {row}", tmp_path / name, "a dog") for row, name in enumerate(names)]
    given = Samples((*bad[:2], sample("good", tmp_path / "whole.png", "a dog"), *bad[2:]))
    progress = []
    summary = extract(given, teacher, tmp_path / "maps", on_progress=progress.append)
    assert summary.records == 1
    assert sum(progress) == 6
    assert [one.what for one in summary.dropped] == [f"row {row}" for row in range(5)]
    for drop, reason in zip(
        summary.dropped,
        ["does not exist", "0 bytes", "cannot be decoded", "several frames", "1 × 1 pixels"],
        strict=True,
    ):
        assert reason in drop.reason
        assert f"the picture of {drop.what}" in drop.reason
    assert records(tmp_path / "maps").keys() == {(image_id(shade(1)), "a dog")}


def test_strict_raises_at_a_bad_picture_and_keeps_the_rest(teacher, tmp_path):
    given = Samples(
        (
            *(sample(f"good {row}", shade(row), "a dog") for row in range(4)),
            sample("bad", tmp_path / "no.png", "a cat"),
        )
    )
    with pytest.raises(DataError, match=r"the picture of bad, whose file .*no\.png does not exist"):
        extract(given, teacher, tmp_path / "maps", strict=True)
    assert len(MapStore.open(tmp_path / "maps")) == 4


def test_strict_raises_at_a_text_without_words_and_at_dropped_rows(teacher, tmp_path):
    with pytest.raises(DataError) as caught:
        extract(Samples((sample("row 7", shade(1), "12!"),)), teacher, tmp_path / "a", strict=True)
    assert "Got row 7: '12!': no word that is a noun or adjective or verb." in str(caught.value)
    given = Samples((sample("row 1", shade(1), "a dog"),), (Dropped("row 0", "an empty answer"),))
    with pytest.raises(DataError, match="Got row 0: an empty answer. Expected every sample to be usable"):
        extract(given, teacher, tmp_path / "b", strict=True)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("text", ["12, 3!", "犬が走る。", "and of the"])
def test_a_text_without_content_words_is_recorded_without_maps(teacher, tmp_path, text):
    summary = extract(Samples((sample("row 7", shade(1), text),)), teacher, tmp_path / "maps")
    assert (summary.records, summary.words) == (1, 0)
    assert summary.dropped == [Dropped(f"row 7: {text!r}", "no word that is a noun or adjective or verb")]
    words, _, maps = records(tmp_path / "maps")[image_id(shade(1)), text]
    assert words == ()
    assert maps.shape == (0, 11, 13)


@pytest.mark.parametrize(("rest", "mapped"), [(" near a dog", 1), ("", 0)])
def test_a_word_longer_than_any_is_named_in_the_summary(teacher, tmp_path, rest, mapped):
    text = "x" * 6000 + rest
    summary = extract(Samples((sample("row 7", shade(1), text),)), teacher, tmp_path / "maps")
    assert (summary.records, summary.words) == (1, mapped)
    drop = Dropped(f"'{'x' * 20}…' in '{'x' * 60}'", "a word of more than 64 characters")
    assert [one for one in summary.dropped if not one.what.startswith("row 7")] == [drop]


def test_what_the_reader_dropped_is_in_the_summary(teacher, tmp_path):
    drop = Dropped("row 0", "an empty answer")
    summary = extract(Samples((sample("row 1", shade(1), "a dog"),), (drop,)), teacher, tmp_path / "maps")
    assert summary.dropped == [drop]


def test_duplicates_are_extracted_once(teacher, tmp_path, monkeypatch):
    """The same pixels and text, whatever the name, next to each other and far apart."""
    given = [sample(f"row {row}", shade(value), "a dog") for row, value in enumerate((1, 1, 2, 3, 1, 2))]
    texts, call = [], Teacher.__call__
    monkeypatch.setattr(Teacher, "__call__", lambda self, jobs: texts.extend(jobs) or call(self, jobs))
    progress = []
    summary = extract(Samples(tuple(given)), teacher, tmp_path / "maps", on_progress=progress.append)
    assert len(texts) == summary.records == 3
    assert summary.already_there == 3
    assert sum(progress) == 6


def test_every_answer_of_a_conversation_has_its_own_record(teacher, tmp_path):
    messages = [
        *conversation("what?", "a dog"),
        {"role": "user", "content": [{"type": "text", "text": "and?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a red cat"}]},
    ]
    summary = extract(Samples((Sample("row", (shade(1),), messages),)), teacher, tmp_path / "maps")
    assert summary.records == 2
    assert records(tmp_path / "maps").keys() == {(image_id(shade(1)), "a dog"), (image_id(shade(1)), "a red cat")}


def several(*turns: tuple[list, str]) -> tuple[tuple, list[dict]]:
    """Sources and messages: each turn's pictures, then its answer."""
    messages = []
    for sources, answer in turns:
        parts = [{"type": "image"} for _ in sources]
        messages.append({"role": "user", "content": [*parts, {"type": "text", "text": "what?"}]})
        if answer:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return tuple(source for sources, _ in turns for source in sources), messages


def test_every_answer_is_mapped_on_every_picture_before_it(teacher, tmp_path):
    given = Sample("row", *several(([shade(1), shade(2)], "a dog"), ([], "a sun"), ([shade(3)], "a cat")))
    pairs = [(1, "a dog"), (1, "a sun"), (1, "a cat"), (2, "a dog"), (2, "a sun"), (2, "a cat"), (3, "a cat")]
    progress, estimates = [], []
    summary = extract(
        Samples((given,)), teacher, tmp_path / "maps", on_progress=progress.append, on_estimate=estimates.append
    )
    found = records(tmp_path / "maps")
    assert found.keys() == {(image_id(shade(value)), text) for value, text in pairs}
    assert (summary.records, sum(progress), estimates[0].texts, summary.dropped) == (7, 7, 7, [])
    alone = teacher([Job(shade(2), image_id(shade(2)), "a dog", content_words("a dog", ("noun",)))])[0]
    torch.testing.assert_close(found[image_id(shade(2)), "a dog"][2], alone.maps, rtol=0, atol=1 / 255 + 1e-5)
    assert not torch.allclose(alone.maps, found[image_id(shade(1)), "a dog"][2], atol=2 / 255)
    again = extract(Samples((given,)), teacher, tmp_path / "maps")
    assert (again.records, again.already_there) == (0, 7)


def test_text_alone_is_counted_and_no_drop(teacher, tmp_path):
    text = Sample("row 0", *several(([], "a dog")))
    progress = []
    given = Samples((text, sample("row 1", shade(1), "a dog"), text))
    summary = extract(given, teacher, tmp_path / "maps", strict=True, on_progress=progress.append)
    assert (summary.records, summary.without_picture, summary.dropped, sum(progress)) == (1, 2, [], 1)
    assert json.loads((tmp_path / "maps" / "extraction.json").read_text())["without_picture"] == 2


def test_a_sample_with_one_bad_picture_of_two_is_dropped_whole(teacher, tmp_path):
    """Training cannot use it either."""
    bad = Sample("row 7", *several(([shade(1), tmp_path / "no.png"], "a dog"), ([], "a cat")))
    progress = []
    summary = extract(
        Samples((bad, sample("good", shade(3), "a dog"))), teacher, tmp_path / "maps", on_progress=progress.append
    )
    assert (summary.records, sum(progress)) == (1, 5)
    assert [one.what for one in summary.dropped] == ["row 7"]
    assert summary.dropped[0].reason.startswith("Got picture 2 of row 7, whose file")


def test_a_picture_that_no_answer_follows_is_named(teacher, tmp_path):
    late = Sample("row 7", *several(([], "a dog"), ([shade(1)], "")))
    summary = extract(Samples((late, sample("good", shade(3), "a dog"))), teacher, tmp_path / "maps")
    assert (summary.records, summary.dropped) == (1, [Dropped("row 7", "no answer after a picture")])
    with pytest.raises(DataError, match="row 7: no answer after a picture"):
        extract(Samples((late,)), teacher, tmp_path / "strict", strict=True)


def test_a_store_of_other_settings_is_refused(teacher, pipeline, samples, tmp_path):
    extract(samples, teacher, tmp_path / "maps")
    other = Teacher(pipeline, ExtractionConfig(grid=(11, 13), timesteps=(200,)), name="tiny")
    with pytest.raises(StoreError, match=r"timesteps is \[50\] there and \[200\] here"):
        extract(samples, other, tmp_path / "maps")
    assert len(MapStore.open(tmp_path / "maps")) == 9
    more = Teacher(pipeline, ExtractionConfig(grid=(11, 13), batch_size=5), name="tiny")
    assert extract(samples, more, tmp_path / "maps").already_there == 9  # batch size changes no map


def test_time_and_disk_are_estimated_once_after_the_first_batch(teacher, samples, tmp_path):
    estimates = []
    extract(samples, teacher, tmp_path / "maps", on_estimate=estimates.append)
    assert len(estimates) == 1
    assert estimates[0].texts == 9
    assert estimates[0].seconds > 0
    # the first batch: "a dog" with one word, "two cats run" with two; 143 bytes a map and what goes with it
    assert estimates[0].megabytes == pytest.approx(9 * 1.5 * (143 + 64) / 1e6)


def test_an_estimate_is_of_what_is_still_to_do(teacher, samples, tmp_path):
    extract(Samples(samples.samples[:6]), teacher, tmp_path / "maps")
    estimates = []
    extract(samples, teacher, tmp_path / "maps", on_estimate=estimates.append)
    assert estimates[0].texts == 3


def asked(name: str, source, *turns: tuple[str, str], system: str = "") -> Sample:
    """A conversation about one picture: (question, answer) by turn."""
    messages = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    for index, (question, answer) in enumerate(turns):
        picture = [] if index else [{"type": "image"}]
        messages.append({"role": "user", "content": [*picture, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return Sample(name, (source,), messages)


def with_texts(pipeline, texts: Any) -> Teacher:
    return Teacher(pipeline, ExtractionConfig(grid=(11, 13), batch_size=2, texts=texts), name="tiny")


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ("answers", {"red", "a cat"}),
        ("questions", {"is the dog small?", "what is it?"}),
        ("all", {"is the dog small?", "what is it?", "red", "a cat"}),
    ],
)
def test_the_turns_that_are_mapped(pipeline, tmp_path, texts, expected):
    """A system turn never is. A question that names nothing is recorded, and no fault."""
    given = asked("row", shade(1), ("is the dog small?", "red"), ("what is it?", "a cat"), system="name a house")
    summary = extract(Samples((given,)), with_texts(pipeline, texts), tmp_path / "maps", strict=True)
    found = records(tmp_path / "maps")
    assert {text for _, text in found} == expected
    assert summary.dropped == []
    assert {text: [word.text for word in words] for (_, text), (words, _, _) in found.items()} == {
        text: {"is the dog small?": ["dog", "small"], "what is it?": [], "red": ["red"], "a cat": ["cat"]}[text]
        for text in expected
    }
    assert MapStore.open(tmp_path / "maps").identity["texts"] == texts


def test_a_question_is_mapped_on_the_pictures_in_it(teacher, pipeline, tmp_path):
    """An answer only on those before it."""
    turns = several(([shade(1)], "a dog"), ([shade(2)], "a cat"))
    turns[1][2]["content"] = [{"type": "text", "text": "the hat"}, {"type": "image"}, {"type": "text", "text": "here?"}]
    given = Sample("row", *turns)
    assert given.pairs_of("questions") == ((0, "what?"), (0, "the hat here?"), (1, "the hat here?"))
    first, second = ("what?", "a dog", "the hat here?", "a cat"), ("the hat here?", "a cat")
    assert given.pairs_of("all") == (*((0, text) for text in first), *((1, text) for text in second))
    extract(Samples((given,)), with_texts(pipeline, "questions"), tmp_path / "maps")
    found = records(tmp_path / "maps")
    assert [word.text for word in found[image_id(shade(2)), "the hat here?"][0]] == ["hat"]


def test_a_prompt_that_repeats_is_one_record_per_picture(pipeline, tmp_path):
    """In the estimate too, where a picture has several samples."""
    for value in (1, 2):
        shade(value).save(tmp_path / f"{value}.png")
    rows = [(1, "a dog"), (1, "a cat"), (1, "a red hat"), (2, "a sun"), (2, "a dog")]
    prompt = "name the thing"
    given = Samples(tuple(asked(text, tmp_path / f"{value}.png", (prompt, text)) for value, text in rows))
    estimates, progress = [], []
    out = tmp_path / "maps"
    summary = extract(
        given, with_texts(pipeline, "all"), out, on_estimate=estimates.append, on_progress=progress.append
    )
    assert (summary.records, summary.already_there, sum(progress)) == (7, 3, 10)
    assert estimates[0].texts == 7
    extract(Samples(given.samples[:3]), with_texts(pipeline, "all"), tmp_path / "part")
    extract(given, with_texts(pipeline, "all"), tmp_path / "part", on_estimate=estimates.append)
    assert estimates[1].texts == 3


def test_a_store_of_before_texts_is_one_of_answers(teacher, pipeline, samples, tmp_path):
    """It goes on as such, and refuses other texts by name."""
    identity = {"teacher": "tiny", **{name: value for name, value in CONFIG.identity().items() if name != "texts"}}
    with MapStore.writer(tmp_path / "maps", identity, {}, CONFIG.grid):
        pass
    assert extract(samples, teacher, tmp_path / "maps").records == 9
    with pytest.raises(StoreError, match=r"texts is 'answers' there and 'all' here"):
        extract(samples, with_texts(pipeline, "all"), tmp_path / "maps")


def test_a_teacher_is_identified_where_a_store_is_written(pipeline, samples, tmp_path, monkeypatch):
    """Its folder is read in full for that, which loading it for other uses need not do."""
    digested = []
    digest = "lavender.teachers.diffusion.teacher.digest_of_pipeline"
    monkeypatch.setattr(digest, lambda path: digested.append(path) or "the digest")
    pipeline.save_pretrained(tmp_path / "teacher")
    monkeypatch.chdir(tmp_path)
    teacher = Teacher.from_pretrained("teacher", CONFIG)
    assert digested == []
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for folder in ("maps", "other"):
        extract(Samples(tuple(samples)[:1]), teacher, tmp_path / folder)
        assert MapStore.open(tmp_path / folder).identity["teacher_version"] == "the digest"
    assert digested == [str(tmp_path / "teacher")]


def test_another_teacher_of_the_same_name_is_refused(pipeline, samples, tmp_path):
    """Its folder was trained on between two runs. A store of an earlier release does not say which one it was."""
    folder = tmp_path / "teacher"
    pipeline.save_pretrained(folder)
    first = Teacher.from_pretrained(folder, CONFIG)
    extract(Samples(tuple(samples)[:1]), first, tmp_path / "maps")
    assert MapStore.open(tmp_path / "maps").identity["teacher_version"] == first.version
    extract(Samples(tuple(samples)[:2]), Teacher.from_pretrained(folder, CONFIG), tmp_path / "maps")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    changed = {name: 2 * one for name, one in load_file(weights).items()}
    save_file(changed, weights, metadata={"format": "pt"})
    other = Teacher.from_pretrained(folder, CONFIG)
    with pytest.raises(StoreError, match="teacher_version is .* there and .* here"):
        extract(samples, other, tmp_path / "maps")
    with MapStore.writer(tmp_path / "old", {"teacher": other.name, **CONFIG.identity()}, {}, CONFIG.grid):
        pass
    assert extract(Samples(tuple(samples)[:1]), other, tmp_path / "old").records == 1
