"""IDEFICS's processor for conversations: pictures where the template names them; what is saved is the published one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoProcessor, IdeficsProcessor

from families.geometry import picture
from families.test_idefics import MARK, SQUARE, build_processor, config_of
from lavender.errors import ConfigError, DataError
from lavender.students.families.idefics import IdeficsAdapter, IdeficsChatProcessor


class TestProcessor:
    def test_pictures_stand_where_the_template_names_them(self, captions):
        processor, image = build_processor(captions), picture((97, 83))
        messages: Any = [
            {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "what?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "a dog"}]},
        ]
        text = processor.apply_chat_template(messages, tokenize=False)
        assert text == (
            "<s>\nUser:<fake_token_around_image><image><fake_token_around_image><image><fake_token_around_image>what?"
            "<end_of_utterance>\nAssistant: a dog<end_of_utterance>"
        )
        inputs = processor(images=[[image, image]], text=[text], padding=True, return_tensors="pt")
        assert processor.tokenizer.decode(inputs["input_ids"][0]) == text
        assert inputs["pixel_values"].shape == (1, 2, 3, SQUARE, SQUARE)
        assert inputs["image_attention_mask"].sum(-1)[0].tolist()[-3:] == [1, 1, 1]

    def test_it_makes_what_the_published_one_does(self, captions):
        """Which takes texts and pictures in one list."""
        processor, image = build_processor(captions), picture((97, 83))
        theirs = super(IdeficsChatProcessor, processor).__call__(text=[["User:", image, "a dog"]], return_tensors="pt")
        ours = processor(images=[[image]], text=[f"<s>User:{MARK}a dog"])
        assert set(ours) == set(theirs)
        for name, one in theirs.items():
            assert torch.equal(ours[name], one), name

    def test_what_is_saved_is_the_published_one(self, captions, tmp_path):
        config, processor = config_of(build_processor(captions).tokenizer), build_processor(captions)
        config.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        plain = AutoProcessor.from_pretrained(tmp_path)
        assert type(plain) is IdeficsProcessor
        ours = IdeficsAdapter(config).processor(plain)
        inputs: dict[str, Any] = {"images": [[picture((9, 9))]], "text": [f"<s>{MARK}a"]}
        assert ours.chat_template == processor.chat_template
        assert all(torch.equal(one, ours(**inputs)[name]) for name, one in processor(**inputs).items())
        with pytest.raises(ConfigError) as caught:
            IdeficsAdapter(config).image_boxes(processor(**inputs), [[(9, 9)]], plain)
        assert str(caught.value) == (
            "Got IdeficsProcessor, which sets pictures behind the text. Expected IdeficsChatProcessor. Do this: use "
            "lavender.students.families.idefics.IdeficsChatProcessor(processor.image_processor, processor.tokenizer)."
        )

    @pytest.mark.parametrize(("marks", "count"), [(1, 2), (2, 1), (0, 1), (1, 0)])
    def test_another_number_of_pictures_is_refused(self, captions, marks, count):
        processor = build_processor(captions)
        with pytest.raises(DataError) as caught:
            processor(images=[[picture((50, 50))] * count], text=["<s>" + MARK * marks])
        assert str(caught.value) == (
            f"Got [{marks}] <image> in texts of [{count}] pictures. Expected one for each picture. Do this: let the "
            "chat template print <image> for each, and set max_length=None if it cuts them."
        )
