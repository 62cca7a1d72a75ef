"""The tokenizer that the world's teacher is trained with."""

from __future__ import annotations

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
