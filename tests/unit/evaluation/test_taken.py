"""Samples that a model does not take are named and left out; the others are scored with all that was asked."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from lavender.data.samples import Samples, read_samples, readable
from lavender.errors import DataError, NotFiniteError
from lavender.evaluation import compare
from lavender.evaluation.compare import observe, readings_of
from lavender.evaluation.placement import ON_CPU, Placement
from lavender.evaluation.taken import taken
from lavender.students.logits import last_row, logits_at
from lavender.students.registry import adapter_for
from lavender.students.word_maps import AnsweredPicture, processor_inputs, student_maps
from lavender.words import words_of


@pytest.fixture
def student(make_student, processor):
    model = make_student()
    return model, processor, adapter_for(model.config)


def data_of(folder, *conversations) -> Samples:
    for index, _ in enumerate(conversations):
        Image.new("RGB", (60, 40), (index, 9, 9)).save(folder / f"{index}.png")
    rows = [{"image": f"{index}.png", "messages": messages} for index, messages in enumerate(conversations)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return readable(read_samples(folder / "data.jsonl"))


def turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


PLAIN = [turn("user", "what is it?"), turn("assistant", "a dog")]
WITH_SYSTEM = [turn("system", "be short."), turn("user", "look <image> here"), turn("assistant", "a dog")]
WITH_TOKEN = [turn("user", "what is <|image|> it?"), turn("assistant", "a dog")]


def test_a_text_with_the_models_picture_token_is_left_out(student, tmp_path):
    _, processor, adapter = student
    found = taken(data_of(tmp_path, PLAIN, WITH_TOKEN), [(adapter, processor)])
    assert [len(found), len(found.identities)] == [1, 1]
    (drop,) = found.dropped
    assert drop.reason.startswith("the model does not take it: ")
    with pytest.raises(DataError, match="Got 1 samples, of which no model takes one"):
        taken(data_of(tmp_path, WITH_TOKEN), [(adapter, processor)])


def test_what_was_asked_is_rendered_whole(student, tmp_path, monkeypatch):
    """The system prompt, and the picture in its place: for scores, and for the answer itself."""
    model, processor, _ = student
    samples = data_of(tmp_path, WITH_SYSTEM)
    ((reading, _),) = readings_of(samples.samples, None)
    assert (reading.prompt.split(), reading.turn) == (["look", "here"], 2)
    rendered = processor.apply_chat_template(reading.messages(), tokenize=False)
    assert rendered == processor.apply_chat_template(samples.samples[0].messages, tokenize=False)
    assert rendered.index("be short.") < rendered.index("look") < rendered.index("<|image|>") < rendered.index("here")
    seen, real = [], compare.answer_batch

    def answer(model, processor, conversations, *rest):
        seen.extend(processor.apply_chat_template(conversations, tokenize=False, add_generation_prompt=True))
        return real(model, processor, conversations, *rest)

    monkeypatch.setattr(compare, "answer_batch", answer)
    (judged,) = observe(model, processor, samples.samples, None, max_new_tokens=2)
    assert judged.tallies["answer_nll"][1] > 0
    assert rendered.startswith(seen[0])
    assert "be short." in seen[0]


def test_logits_of_chosen_rows(student):
    model, processor, _ = student
    reading = AnsweredPicture(Image.new("RGB", (60, 40)), "what is it?", "a dog", ())
    inputs = processor_inputs(processor, [reading, reading])
    whole = model(**inputs).logits
    for rows in ([3, 5], [5, 3], []):
        found = logits_at(model, inputs, rows)
        assert found.shape == (2, len(rows), whole.shape[-1])
        torch.testing.assert_close(found, whole[:, rows].float(), rtol=0, atol=1e-5)  # products of other shapes
    assert logits_at(model.to(torch.bfloat16), inputs.to(torch.bfloat16), [3]).dtype == torch.float32
    assert last_row(model) == {"logits_to_keep": 1}

    class Other(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, values):
            return type("Output", (), {"logits": values})

    assert logits_at(Other(), {"values": whole}, [5, 3]).equal(whole[:, [5, 3]].float())
    assert last_row(Other()) == {}


@pytest.mark.parametrize(("dtype", "advice"), [(torch.float32, "check the model's weights"), (torch.float16, "use bf")])
def test_attention_that_is_not_finite_is_an_error(dtype, advice, student):
    model, processor, _ = student
    model = model.to(dtype)
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    reading = AnsweredPicture(Image.new("RGB", (60, 40)), "what is it?", "a dog", words_of("a dog"))
    with pytest.raises(NotFiniteError, match=f"NaN or infinity in the attention.*{advice}"):
        student_maps(model, processor, [reading])


def test_the_options_of_a_command():
    assert ON_CPU.words() == ""
    assert Placement("cuda:1", "bfloat16", 4).words() == " --device cuda:1 --dtype bfloat16 --batch-size 4"
    assert Placement(batch_size=2).words() == " --batch-size 2"
