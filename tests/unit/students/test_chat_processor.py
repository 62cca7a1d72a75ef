"""Processors that families bring: the answer's tokens are found behind a picture's, and what is missing is named."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from families.geometry import picture
from families.test_flamingo import build_processor as flamingo
from families.test_idefics import build_processor as idefics
from families.test_minicpm_v import build_processor as minicpm_v
from lavender.errors import DataError, ModelError
from lavender.students.chat_processor import (
    check_offsets,
    check_placeholders,
    replace_placeholders,
    texts_and_pictures,
)
from lavender.students.families.minicpm_v import MiniCpmVChatProcessor
from lavender.students.loading import load_processor
from lavender.students.registry import adapter_for
from lavender.world import STUDENT_PATHS

ANSWER = "a dog near a tree"
PLACEHOLDERS = {
    flamingo: "<image>",
    idefics: "<fake_token_around_image><image><fake_token_around_image>",
    minicpm_v: "(<image>./</image>)",
}


def marked_template(placeholder: str) -> str:
    """A chat template that marks what the assistant says."""
    return (
        "{%- for message in messages %}{%- for part in message['content'] %}"
        "{%- if part['type'] == 'image' %}{{- '" + placeholder + "' }}"
        "{%- elif message['role'] == 'assistant' %}{%- generation %}{{- part['text'] }}{%- endgeneration %}"
        "{%- else %}{{- part['text'] }}{%- endif %}"
        "{%- endfor %}{%- endfor %}"
    )


@pytest.fixture(params=[flamingo, idefics, minicpm_v], ids=["flamingo", "idefics", "minicpm_v"])
def processor(request, captions) -> Any:
    made = request.param(captions)
    made.chat_template = marked_template(PLACEHOLDERS[request.param])
    return made


def messages() -> list[dict[str, Any]]:
    question = [{"type": "image", "image": picture((97, 83))}, {"type": "text", "text": " what is it? "}]
    answer = [{"type": "text", "text": ANSWER}]
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_the_marked_tokens_are_the_answers(processor):
    """So TRL's `assistant_only_loss` works, also where a placeholder became many tokens."""
    inputs = processor.apply_chat_template(
        [messages()],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
    )
    is_answer = torch.as_tensor(inputs["assistant_masks"])[0].bool()
    assert processor.tokenizer.decode(inputs["input_ids"][0][is_answer]).strip() == ANSWER
    check_offsets(processor, processor.apply_chat_template(messages(), tokenize=False))


@pytest.mark.parametrize("missing", [("offset_mapping",), ("text_replacement_offsets",)])
def test_a_processor_without_offsets_is_refused(captions, missing):
    made = minicpm_v(captions)
    made.chat_template = marked_template(PLACEHOLDERS[minicpm_v])
    rendered = made.apply_chat_template(messages(), tokenize=False)

    class Forgetful(MiniCpmVChatProcessor):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            outputs = super().__call__(*args, **kwargs)
            return {name: value for name, value in outputs.items() if name not in missing}

    forgetful = Forgetful(made.image_processor, made.tokenizer, made.chat_template)
    with pytest.raises(ModelError, match=f"Got a Forgetful that does not return {missing[0]}"):
        check_offsets(forgetful, rendered)
    forgetful.chat_template = minicpm_v(captions).chat_template  # which marks nothing, so nobody asks for offsets
    check_offsets(forgetful, rendered)


def test_a_published_processor_is_not_run_when_it_is_loaded(tmp_path):
    """Here it would expand a picture to a billion tokens."""
    folder = tmp_path / "model"
    shutil.copytree(STUDENT_PATHS["llava"], folder)
    settings = json.loads((folder / "processor_config.json").read_text())
    settings["num_additional_image_tokens"] = 10**9
    (folder / "processor_config.json").write_text(json.dumps(settings))
    adapter = adapter_for(AutoConfig.from_pretrained(folder))
    assert load_processor(adapter, folder).num_additional_image_tokens == 10**9


def test_replaced_placeholders():
    text, spans = replace_placeholders("a <i> b <i>c", "<i>", ["<<1>>", ""])
    assert text == "a <<1>> b c"
    assert spans == [{"span": (2, 5), "new_span": (2, 7)}, {"span": (8, 11), "new_span": (10, 10)}]
    assert replace_placeholders("a", "<i>", []) == ("a", [])


def test_arguments_become_lists():
    assert texts_and_pictures(None, "a") == (["a"], [[]])
    assert texts_and_pictures([("x",), ()], ("a", "b")) == (["a", "b"], [["x"], []])
    assert texts_and_pictures(None, None) == ([], [])


def test_another_number_of_placeholders_is_refused():
    check_placeholders([1, 0], [["x"], []], "<i>")
    with pytest.raises(DataError, match=r"Got \[1\] <i> in texts of \[2\] pictures\. .* set max_length=None"):
        check_placeholders([1], [["x", "y"]], "<i>")
    with pytest.raises(DataError, match=r"print <i> for each\.$"):
        check_placeholders([1], [["x", "y"]], "<i>", cut=False)
