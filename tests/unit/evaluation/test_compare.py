"""What a model does on samples: the likelihood of references with any tokenizer, and pictures batch by batch."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import LlavaProcessor

from closeness import close
from command_line import write_scenes
from lavender.data.samples import read_samples
from lavender.data.store import MapStore
from lavender.errors import DataError
from lavender.evaluation import compare
from lavender.evaluation.compare import answer_nll, answer_tallies, observe, scores_of
from lavender.evaluation.sampling import spread
from lavender.maps import entropy, map_agreement
from lavender.students.word_maps import AnsweredPicture, processor_inputs, student_maps
from lavender.world.student_models import build_llava, build_llava_processor
from tokenizer_kinds import TOKENIZERS, tokenizer_of

ANSWERS = ["a watering can near a crocodile.", "no, a dog!\n\n", "an old café by the river; “naïve” and well-known"]


def readings_with(answers: list[str]) -> list[AnsweredPicture]:
    colours = ("red", "green", "blue", "white")
    return [
        AnsweredPicture(Image.new("RGB", (40, 30), colour), "what is in the picture?", answer, ())
        for colour, answer in zip(colours, answers, strict=False)
    ]


@pytest.fixture(scope="module", params=list(TOKENIZERS))
def llava(request) -> tuple[Any, Any]:
    """A LLaVA of random weights whose tokenizer is of another kind."""
    usual: Any = build_llava_processor(["a dog"], vocabulary=300)
    processor: Any = LlavaProcessor(
        usual.image_processor,
        tokenizer_of(request.param),
        patch_size=usual.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=usual.chat_template.replace("</s>", "<eos>").replace("<s>", "<bos>"),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_llava(processor).eval(), processor


def test_the_likelihood_is_of_the_tokens_of_the_answer(llava):
    """By hand: the tokens that end after the answer begins, in the whole text that the template prints.

    Tokenizers of two of these kinds put a blank before a text, so a piece of the text alone has other tokens.
    """
    model, processor = llava
    readings = readings_with(ANSWERS)
    inputs = processor_inputs(processor, readings)
    with torch.inference_mode():
        logits = model(**inputs).logits.log_softmax(dim=-1)
    totals, counts = [], []
    for index, reading in enumerate(readings):
        rendered = processor.apply_chat_template(reading.messages(), tokenize=False)
        begin = rendered.rindex(reading.answer.strip())
        found = processor.tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
        counts.append(sum(end > begin and end > start for start, end in found["offset_mapping"]))
        length = int(inputs["attention_mask"][index].sum())
        places = range(length - counts[-1], length)
        totals.append(-sum(float(logits[index, at - 1, inputs["input_ids"][index, at]]) for at in places))
    tallies = answer_tallies(model, processor, readings)
    assert [count for _, count in tallies] == counts
    assert [total for total, _ in tallies] == [close(total) for total in totals]
    assert answer_nll(model, processor, readings, batch_size=2) == close(sum(totals) / sum(counts))


def test_an_answer_without_a_token_is_not_counted(llava):
    model, processor = llava
    tallies = answer_tallies(model, processor, readings_with(["", "a dog"]))
    assert tallies[0] == (0, 0)
    assert tallies[1][1] > 0
    with pytest.raises(DataError, match="Got 1 samples whose answers have no token"):
        answer_nll(model, processor, readings_with([""]))


@pytest.fixture(scope="module")
def folder(some_scenes, captions, tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes"), some_scenes, captions)


def test_the_scores_are_those_of_all_samples_at_once(folder, make_student, processor, store_path):
    """Batches of two, of four, and single samples; maps and entropies as `student_maps` gives them for all."""
    samples, store, model = spread(read_samples(folder).samples, 6), MapStore.open(store_path), make_student()
    together = observe(model, processor, samples, store, max_new_tokens=3)
    for size in (1, 4):
        apart = observe(model, processor, samples, store, max_new_tokens=3, batch_size=size)
        assert [one.answer for one in apart] == [one.answer for one in together]
        found, wanted = scores_of(apart), scores_of(together)
        assert list(found) == list(wanted) == ["answer_nll", "content_f1", "entropy", "map_agreement"]
        assert all(found[name] == close(wanted[name]) for name in ("answer_nll", "entropy"))
        assert found["map_agreement"] == pytest.approx(wanted["map_agreement"], abs=1e-3)
    pairs = list(compare.readings_of(samples, store))
    maps = student_maps(model, processor, [reading for reading, _ in pairs], store.grid)
    mapped = [(own.maps, teacher.maps) for own, (_, teacher) in zip(maps, pairs, strict=True) if teacher is not None]
    assert len(mapped) == 5
    assert scores_of(together)["entropy"] == close(entropy(torch.cat([own.maps for own in maps])).mean().item())
    agreement = map_agreement(*(torch.cat(side) for side in zip(*mapped, strict=True)))
    assert scores_of(together)["map_agreement"] == pytest.approx(agreement, abs=1e-3)
    assert scores_of(observe(model, processor, samples[:1], None, max_new_tokens=1))["map_agreement"] is None


@pytest.mark.parametrize(("limit", "places"), [(1, [0]), (2, [0, 3]), (4, [0, 1, 3, 4]), (6, [0, 1, 2, 3, 4, 5])])
def test_a_limit_spreads_samples_over_all_of_the_data(limit, places, folder):
    samples = read_samples(folder).samples
    assert [sample.name for sample in spread(samples, limit)] == [samples[place].name for place in places]
    assert spread(samples, 99) == tuple(samples)


@pytest.mark.parametrize("number", [6, 12])
def test_the_pictures_of_one_batch_are_in_memory(number, tmp_path, make_student, processor, monkeypatch):
    """However many samples there are. Counted where the most are alive: while the model answers."""
    alive: list[int] = []
    size = (83, 61)
    pictures = [Image.new("RGB", size, (index, 0, 0)) for index in range(number)]
    rows = [f'{{"file_name": "{index}.png", "text": "a dog"}}\n' for index in range(number)]
    for index, picture in enumerate(pictures):
        picture.save(tmp_path / f"{index}.png")
    (tmp_path / "metadata.jsonl").write_text("".join(rows))
    del pictures, picture
    real = compare.answer_batch

    def counting(*arguments, **settings):
        gc.collect()
        alive.append(sum(isinstance(one, Image.Image) and one.size == size for one in gc.get_objects()))
        return real(*arguments, **settings)

    monkeypatch.setattr(compare, "answer_batch", counting)
    samples = spread(read_samples(tmp_path).samples, number)
    assert len(observe(make_student(), processor, samples, None, max_new_tokens=1, batch_size=2)) == number
    assert len(alive) == number // 2
    assert max(alive) <= 4  # those of a batch, once as loaded and once in RGB
    assert min(alive) >= 2
