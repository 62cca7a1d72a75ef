"""What a model refuses is found before the first step, left out, counted and named; and nothing else is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from tokenizers import normalizers
from transformers import Trainer, TrainingArguments
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from families.geometry import picture
from families.test_qwen_vl import family_of
from invariants.picture_kinds import encoded
from lavender.alignment.coverage import NO_MAPS, NO_PICTURE, NO_WORDS, REASONS, UNPLACED, WITHOUT, Coverage
from lavender.alignment.examples import CUT, HOLDS_TOKEN, REFUSALS, REFUSED, SIZE, TEMPLATE, UNREADABLE, SampleError
from lavender.data.images import image_id
from lavender.data.store import MapStore
from lavender.errors import ConfigError, DataError, StoreError
from lavender.maps import WordMaps, to_heat
from lavender.students.locate import CHANGED
from lavender.training.arguments import AlignmentArguments
from lavender.training.mixin import AlignmentMixin
from lavender.training.refused_samples import Refused, counts_of, refused_of, summary, without
from lavender.training.trainer import LavenderConfig, LavenderTrainer
from lavender.words import words_of
from lavender.world.student_models import STUDENTS

KINDS = ("mllama", "llava", "qwen2_5_vl")
TOKEN = {"mllama": "<|image|>", "llava": "<image>", "qwen2_5_vl": "<|image_pad|>"}
ANSWER = "a dog and a cat"
WORDS = words_of(ANSWER)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn here') }}{% endif %}"
PART = {"type": Value("string"), "text": Value("string")}
FEATURES = Features(
    {"images": List(ImageFeature()), "messages": List({"role": Value("string"), "content": List(PART)})}
)


def turn(role: str, *texts: str | None) -> dict[str, Any]:
    """None stands for a picture."""
    parts = [{"type": "image", "text": None} if one is None else {"type": "text", "text": one} for one in texts]
    return {"role": role, "content": parts}


def sample(index: int, *turns: dict[str, Any], image: Any = None) -> dict[str, Any]:
    image = encoded(picture((60, 90), index)) if image is None else image
    asked = turns or (turn("user", None, "what is it?"), turn("assistant", ANSWER))
    return {"images": [{"bytes": image, "path": None}], "messages": list(asked)}


def good(index: int) -> dict[str, Any]:
    return sample(index)


def student_of(kind: str, captions: list[str]) -> tuple[Any, Any]:
    """(model, processor)."""
    texts = [*captions, ANSWER, "what is it?"]
    if kind == "qwen2_5_vl":
        family = family_of(kind, texts)
        return family.make(), family.processor
    processor = STUDENTS[kind].build_processor(texts, vocabulary=300)
    return STUDENTS[kind].build_model(processor), processor


class Listed(torch.utils.data.Dataset):
    """A data set of torch, with pictures in memory."""

    def __init__(self, rows: list[Any]):
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        if isinstance(self._rows[index], Exception):
            raise self._rows[index]
        return self._rows[index]


@dataclass
class PlainArguments(AlignmentArguments, TrainingArguments):
    """Of the other trainer."""


class PlainTrainer(AlignmentMixin, Trainer):
    """Takes data sets of torch."""


@pytest.fixture
def build(captions, tmp_path):
    """Makes a trainer on samples, of which the good ones have maps."""

    def build(kind: str, data: Any, template: str | None = None, **settings: Any) -> Any:
        model, processor = student_of(kind, captions)
        if template is not None:
            processor.chat_template = template + processor.chat_template if template else None
        with MapStore.writer(tmp_path / "maps", {"made by": "tests"}, {}, (11, 13)) as writer:
            for index in range(6):
                identity = image_id(picture((60, 90), index))
                writer.add(WordMaps(identity, ANSWER, WORDS, to_heat(torch.rand(len(WORDS), 11, 13))))
        given: dict[str, Any] = {
            "output_dir": str(tmp_path / "out"),
            "maps": str(tmp_path / "maps"),
            "max_steps": 2,
            "seed": 3,
            "per_device_train_batch_size": 2,
            "report_to": "none",
            "bf16": False,
            "use_cpu": True,
            "max_length": None,
            "save_strategy": "no",
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "probe_size": 2,
            "train_sampling_strategy": "sequential",
            "logging_steps": 1,
        }
        if isinstance(data, Listed):  # which TRL refuses
            given.pop("max_length")
            collator = DataCollatorForVisionLanguageModeling(processor)
            arguments: Any = PlainArguments(**given | settings)
            return PlainTrainer(
                model, arguments, processing_class=processor, train_dataset=data, data_collator=collator
            )
        args = LavenderConfig(**given | settings)
        return LavenderTrainer(model, args, processing_class=processor, train_dataset=data)

    return build


def bad_samples(kind: str) -> list[tuple[dict[str, Any], str, str]]:
    """(sample, reason, a part of what is said)."""
    token = TOKEN[kind]
    return [
        (
            sample(0, turn("user", None, f"what is {token} here?"), turn("assistant", ANSWER)),
            HOLDS_TOKEN,
            f"whose text holds {token!r}",
        ),
        (sample(1, turn("user", None, "what is it?"), turn("assistant", f"it is {token}")), HOLDS_TOKEN, "it is"),
        (
            sample(2, turn("system", "be short"), turn("user", None, "and?"), turn("assistant", ANSWER)),
            TEMPLATE,
            "which the chat template refuses: no system turn here",
        ),
        (sample(3, turn("human", None, "what is it?"), turn("gpt", ANSWER)), TEMPLATE, "Invalid role"),
        (sample(4, image=b"no picture at all"), UNREADABLE, "no picture of a known format"),
        (sample(5, image=encoded(picture((3, 90)))), UNREADABLE, "with 90 × 3 pixels"),
        (
            sample(5, turn("user", None, None, "what is it?"), turn("assistant", ANSWER)),
            REFUSED,
            "messages with 2 places for a picture, and 1 pictures",
        ),
        *(
            [(sample(5, image=encoded(picture((8, 1640)))), SIZE, "with a picture of 1640 × 8 pixels: absolute aspect")]
            if kind == "qwen2_5_vl"
            else []
        ),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_left_out_before_the_first_step(build, capsys, kind):
    bad = bad_samples(kind)
    rows = [good(0), *(one for one, _, _ in bad), good(1), good(2), good(3)]
    data = Dataset.from_list(rows, features=FEATURES)
    trainer = build(kind, data, NO_SYSTEM)
    assert [(one.index, one.reason) for one in trainer.refused] == [
        (place, reason) for place, (_, reason, _) in enumerate(bad, start=1)
    ]
    for one, (_, _, said) in zip(trainer.refused, bad, strict=True):
        assert said in one.found
    assert len(trainer.train_dataset) == 4
    printed = capsys.readouterr().out
    assert f"left out {len(bad)} of {len(rows)} samples that the model refuses:\n" in printed
    assert f"  2 × {HOLDS_TOKEN}\n" in printed
    assert "  sample 3: the sample 'a dog and a cat' with a picture, which the chat template refuses" in printed
    trainer.train()
    coverage = trainer.coverage
    assert (coverage.samples, coverage.mapped_samples) == (4 + len(bad), 4)
    assert coverage.dropped == dict.fromkeys([HOLDS_TOKEN, TEMPLATE], 2) | {UNREADABLE: 2, REFUSED: 1} | (
        {SIZE: 1} if kind == "qwen2_5_vl" else {}
    )
    assert coverage.share == 1


def in_memory(index: int, text: str = "what is it?") -> dict[str, Any]:
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": ANSWER}]
    return {"images": [picture((60, 90), index)], "messages": turns}


def test_of_a_data_set_of_torch_too(build):
    rows = [in_memory(0), in_memory(1, "an <image>"), OSError("gone"), {"images": [], "messages": [{"role": "user"}]}]
    trainer = build("llava", Listed([*rows, in_memory(2)]))
    assert [(one.index, one.reason) for one in trainer.refused] == [(1, HOLDS_TOKEN), (2, UNREADABLE), (3, TEMPLATE)]
    assert "a sample that the data set cannot give: gone" in trainer.refused[1].found
    trainer.train()
    assert (trainer.coverage.samples, trainer.coverage.mapped_samples) == (2 * 2 + 3, 2 * 2)


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
def test_max_length_that_cuts_a_picture(build, kind):
    """A long text before the picture; a long one after it is cut, and only that."""
    long = "a dog and a cat " * 30
    rows = [
        good(0),
        sample(1, turn("user", long, None), turn("assistant", ANSWER)),
        sample(2, turn("user", None, long), turn("assistant", ANSWER)),
        good(3),
    ]
    trainer = build(kind, Dataset.from_list(rows, features=FEATURES), max_length=230)
    assert [(one.index, one.reason) for one in trainer.refused] == [(1, CUT)]
    trainer.train()
    assert trainer.coverage.samples == 3 + 1  # steps of two and of one, and what was refused


def test_no_sample_left_is_an_error(build):
    rows = [sample(index, turn("user", None, "an <image>"), turn("assistant", ANSWER)) for index in range(3)]
    with pytest.raises(DataError, match="Got 3 samples, of which the model takes none; the first, 0: the sample"):
        build("llava", Dataset.from_list(rows, features=FEATURES))


def test_no_chat_template_is_said_first(build):
    with pytest.raises(ConfigError, match="Got a processor without a chat template, as base models have"):
        build("llava", Dataset.from_list([good(0)], features=FEATURES), template="")


def test_replayed_samples_need_no_maps_and_are_checked_once(build, monkeypatch):
    """Of three new samples one is refused; of three replayed ones without maps, one is. Then two make 10 %."""
    bad = bad_samples("llava")[0][0]
    data = Dataset.from_list([good(0), bad, good(1)], features=FEATURES)
    replayed = Dataset.from_list([bad, sample(7), sample(8)], features=FEATURES)
    trainer = build("llava", data, min_coverage=1.0, max_steps=10)
    checked, check = [], trainer.data_collator.screen.check
    monkeypatch.setattr(trainer.data_collator.screen, "check", lambda one: checked.append(one) or check(one))
    trainer.add_replay(replayed, 0.9)
    assert len(checked) == 3
    assert [(one.index, one.reason) for one in trainer.refused] == [(1, HOLDS_TOKEN), (3, HOLDS_TOKEN)]
    assert len(trainer.train_dataset) == 2 + 18
    trainer.train()
    assert (trainer.coverage.samples, trainer.coverage.mapped_samples) == (2 + 18 + 2, 2)
    assert trainer.coverage.dropped == {HOLDS_TOKEN: 2, NO_MAPS: 18}
    with pytest.raises(DataError, match="Got 1 samples, of which the model takes none"):
        trainer.add_replay(replayed.select([0]), 0.5)


def test_ordinary_data_is_the_same_data_set(build):
    data = Dataset.from_list([good(0), good(1)], features=FEATURES)
    trainer = build("llava", data)
    assert trainer.train_dataset is data
    assert trainer.refused == trainer.eval_refused == []


def test_a_stream_leaves_them_out_as_they_come(build, capsys):
    """The whole first batch is refused at the second round: the last good sample stands in."""
    rows = [good(0), bad_samples("llava")[0][0], bad_samples("llava")[4][0], bad_samples("llava")[1][0], good(1)]
    stream = Dataset.from_list(rows, features=Features(FEATURES | {"images": List(ImageFeature(decode=False))}))
    trainer = build("llava", stream.to_iterable_dataset(), max_steps=2)
    trainer.train()
    coverage = trainer.coverage
    assert coverage.dropped == {HOLDS_TOKEN: 2, UNREADABLE: 1}
    assert (coverage.samples, coverage.mapped_samples) == (2 + 3, 2)
    printed = capsys.readouterr().out
    assert printed.count("left out of a batch, or of its alignment: the sample ") == 3


@pytest.mark.parametrize(("place", "said"), [(0, "whose text holds '<image>'"), (4, "no picture of a known format")])
def test_what_is_met_later_names_its_sample(build, place, said):
    """Data that nobody has looked at before, such as a set that is evaluated on later."""
    trainer = build("llava", Dataset.from_list([good(0), good(1)], features=FEATURES))
    bad = bad_samples("llava")[place][0]
    for images in bad["images"]:
        images["path"] = "some/where.png"
    with pytest.raises(SampleError, match=rf"^Got the sample .* with the picture some/where\.png.*{said}"):
        trainer.data_collator([good(2), bad, good(3)])


def test_a_processor_that_fails_on_one_sample_names_it(build):
    trainer = build("llava", Dataset.from_list([good(0), good(1)], features=FEATURES))
    base = trainer.data_collator._base

    def failing(examples: list[dict[str, Any]]) -> Any:
        if any(example["messages"][0]["content"] == "a hard one" for example in examples):
            raise IndexError("list index out of range")
        return base(examples)

    trainer.data_collator._base = failing
    with pytest.raises(SampleError) as caught:
        trainer.data_collator([in_memory(0), in_memory(1, "a hard one")])
    assert caught.value.reason == REFUSED
    assert str(caught.value).startswith(
        "Got the sample 'a dog and a cat' with a picture of 90 × 60 pixels: list index out of range. Expected what "
    )
    trainer.data_collator._base = lambda examples: base(examples) if len(examples) == 1 else 1 / 0
    with pytest.raises(ZeroDivisionError):  # no sample's fault
        trainer.data_collator([in_memory(0), in_memory(1)])


@pytest.mark.parametrize("spoilt", ["confidence", "map"])
def test_numbers_that_would_spoil_the_loss_stop(build, spoilt):
    trainer = build("llava", Dataset.from_list([good(0), good(1)], features=FEATURES))
    read = trainer.data_collator._targets.store.get

    def planted(identity: str, text: str) -> WordMaps | None:
        found = read(identity, text)
        if found is not None:
            (found.confidence if spoilt == "confidence" else found.maps)[0] = float("nan")
        return found

    trainer.data_collator._targets.store = type("Planted", (), {"get": staticmethod(planted), "grid": (11, 13)})()
    wrong = {"confidence": "a confidence of nan", "map": "a map that is not finite"}[spoilt]
    with pytest.raises(StoreError, match=f"Got {wrong} for 'a' in the map store"):
        trainer.data_collator([in_memory(0)])


def test_an_answer_that_cannot_be_placed_is_counted(build):
    """The sample trains as without maps."""
    trainer = build("llava", Dataset.from_list([good(0), good(1)], features=FEATURES))

    def lost(*args: Any) -> Any:
        raise DataError("tokens that are not this conversation's", "its own", "look")

    trainer.data_collator._locator.rows_by_text = lost
    alignment = trainer.data_collator([in_memory(0)])["alignment"]
    assert Coverage.of(alignment["counts"]).dropped == {UNPLACED: 1}
    assert alignment["faults"][0].endswith("90 × 60 pixels: tokens that are not this conversation's")
    assert not alignment["present"].any()


def test_words_that_a_tokenizer_changes_are_counted(build):
    """As one does that writes an accent and its letter as one, where the caption has them apart."""
    trainer = build("llava", Dataset.from_list([good(0), good(1)], features=FEATURES))
    tokenizer = trainer.processing_class.tokenizer
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("dog", "god")
    found = Coverage.of(trainer.data_collator([in_memory(0)])["alignment"]["counts"])
    assert found.dropped == {CHANGED: 1}
    assert found.words == len(WORDS) - 1


def test_every_sample_is_mapped_or_has_one_reason(build):
    data = Dataset.from_list([good(0), good(1)], features=FEATURES)
    trainer = build("llava", data, parts_of_speech=["noun"])
    other = in_memory(4) | {"messages": [*in_memory(4)["messages"][:1], {"role": "assistant", "content": "no maps"}]}
    batch = [in_memory(0), other, {"images": [], "messages": other["messages"]}]
    coverage = Coverage.of(trainer.data_collator(batch)["alignment"]["counts"])
    assert coverage.dropped == {NO_MAPS: 1, NO_PICTURE: 1}
    trainer.data_collator._targets._own = lambda *arguments: []
    coverage = Coverage.of(coverage.counts() + trainer.data_collator(batch)["alignment"]["counts"])
    assert coverage.dropped == {NO_MAPS: 2, NO_PICTURE: 2, NO_WORDS: 1}
    assert coverage.samples == coverage.mapped_samples + sum(coverage.dropped[one] for one in (*WITHOUT, *REFUSALS))
    assert len(set(REASONS)) == len(REASONS)


class Processes:
    """Stands for accelerate in one of several processes."""

    is_main_process = False

    def __init__(self, index: int, number: int):
        self.process_index, self.num_processes = index, number


def test_processes_share_the_look_and_agree(build, monkeypatch):
    rows = [in_memory(0), in_memory(1, "an <image>"), in_memory(2), in_memory(3, "<image>"), in_memory(4, "<image>")]
    collator = build("llava", Listed(rows[:1])).data_collator
    shares: list[Any] = []
    monkeypatch.setattr(
        "lavender.training.refused_samples.gather_object", lambda share: [shares.extend(share), *shares][1:]
    )
    for index in range(2):
        found = refused_of(Listed(rows), collator, Processes(index, 2))  # ty: ignore[invalid-argument-type]
    assert [[one.index for one in own] for own, _ in shares] == [[4], [1, 3]]
    assert [one.index for one in found] == [1, 3, 4]
    assert len(without(Listed(rows), found)) == 2
    broken = Listed([*rows, {"images": [], "text": "no messages"}])
    shares.clear()
    with pytest.raises(DataError, match="Got an example with the columns"):
        refused_of(broken, collator, Processes(1, 2))  # ty: ignore[invalid-argument-type]
    with pytest.raises(DataError, match="Got an example with the columns"):  # told by the other one
        refused_of(broken, collator, Processes(0, 2))  # ty: ignore[invalid-argument-type]


def test_what_is_told():
    refused = [Refused(index, TEMPLATE if index % 3 else SIZE, f"number {index}") for index in range(12)]
    lines = summary(refused, 40)
    assert lines[:3] == [
        "left out 12 of 40 samples that the model refuses:",
        f"  8 × {TEMPLATE}",
        f"  4 × {SIZE}",
    ]
    assert lines[3] == "  sample 0: number 0"
    assert lines[-1] == "  and 2 more"
    assert summary([], 40) == []
    assert Coverage.of(counts_of(refused)) == Coverage(12, 0, 0, Coverage.of(counts_of(refused)).dropped)
