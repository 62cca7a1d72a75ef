"""The tokenizers that the world's teacher and students are trained with."""

from __future__ import annotations

import os
import subprocess
import sys

from lavender.world.training.teacher import MAX_TOKENS, train_tokenizer


def test_a_tokenizer_of_captions_reads_them_and_any_other_text(captions):
    tokenizer = train_tokenizer(captions)
    assert tokenizer.is_fast
    for text in [*captions, "Zürich – 犬 #7"]:  # every byte has a token
        encoded = tokenizer(text, return_offsets_mapping=True, padding="max_length", truncation=True)
        assert len(encoded["input_ids"]) == MAX_TOKENS
        read = str(tokenizer.decode(encoded["input_ids"], skip_special_tokens=True))
        assert "".join(read.split()) == "".join(text.lower().split())
        assert max(last for _, last in encoded["offset_mapping"]) == len(text)


IN_A_PROCESS = """
import sys
from lavender.world.language import caption_scene
from lavender.world.scenes import scenes
from lavender.world.student_models import build_mllama_processor
from lavender.world.training.teacher import train_tokenizer

captions = [caption_scene(scene).text for scene in scenes("teacher", 60)]
for tokenizer in (train_tokenizer(captions), build_mllama_processor(captions).tokenizer):
    print("tokenizer", tokenizer.backend_tokenizer.to_str())
"""


def test_another_process_trains_the_same_tokenizers():
    def trained(hash_seed: str) -> list[str]:
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        done = subprocess.run(
            [sys.executable, "-c", IN_A_PROCESS], env=environment, capture_output=True, text=True, check=True
        )
        return [line for line in done.stdout.splitlines() if line.startswith("tokenizer")]

    first = trained("1")
    assert len(first) == 2
    assert trained("2") == first
