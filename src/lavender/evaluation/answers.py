"""What a model says about pictures: greedy answers, and how well they name what is there."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from PIL import Image

from lavender.data.images import load_image
from lavender.errors import DataError
from lavender.students.word_maps import evaluating

_GAP = re.compile(r"[\s\-]+")


def names_said(text: str, names: Iterable[str]) -> set[str]:
    """The names that a text says, spelt as in `names`.

    Whole words in any case, the longest name first: "hot dog" is not also "dog". A plural in -s counts
    where it cannot be another name: "dogs" says "dog", but "grapes" never "grape" if both are names.
    """
    pattern, name_of = _spellings(tuple(names))
    return {name_of[_GAP.sub(" ", found.lower())] for found in pattern.findall(_composed(text))}


@lru_cache(maxsize=64)
def _spellings(names: tuple[str, ...]) -> tuple[re.Pattern[str], dict[str, str]]:
    """A pattern of every way to write the names, and the name each way means."""
    name_of = {_GAP.sub(" ", _composed(name).lower()): name for name in names}
    plurals = {f"{spelling}s": name for spelling, name in name_of.items() if not spelling.endswith("s")}
    name_of = plurals | name_of  # a name itself wins over the plural of another
    longest_first = sorted(name_of, key=len, reverse=True)
    written = "|".join(re.escape(spelling).replace(r"\ ", _GAP.pattern) for spelling in longest_first)
    return re.compile(rf"(?<!\w)(?:{written})(?!\w)", re.IGNORECASE), name_of


def object_f1(said: Sequence[set[str]], present: Sequence[set[str]]) -> float:
    """Micro F1 of the names said against the names present, over all pictures. 1 if there are none of either."""
    _require_pairs(said, present)
    right = sum(len(one & truth) for one, truth in zip(said, present, strict=True))
    total = sum(map(len, said)) + sum(map(len, present))
    return 2 * right / total if total else 1.0


def exact_set(said: Sequence[set[str]], present: Sequence[set[str]]) -> float:
    """Share of pictures of which exactly the names present are said."""
    _require_pairs(said, present)
    return sum(one == truth for one, truth in zip(said, present, strict=True)) / len(said)


def exact_match(answers: Sequence[str], truths: Sequence[str]) -> float:
    """Share of answers equal to the truth; case, surrounding space and one final full stop do not count."""
    _require_pairs(answers, truths)
    pairs = zip(answers, truths, strict=True)
    return sum(_plain(answer) == _plain(truth) for answer, truth in pairs) / len(answers)


def generate_answers(
    model: Any,
    processor: Any,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    max_new_tokens: int = 64,
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Answer one prompt about each picture by greedy decoding.

    Args:
        model: any transformers image-text-to-text model; it runs in evaluation mode where it is, and every
            module's training flag is put back.
        processor: its processor, with a chat template; its padding side is put back.
        images: one picture a prompt.
        prompts: what the user says beside the picture.
        max_new_tokens: where an answer is cut off.
        batch_size: pictures a pass. Batches are padded on the left, so it does not change the answers.
        progress: called with the number of answers so far, after each batch.

    Returns:
        the answers, without prompt, special tokens and surrounding space.

    Raises:
        DataError: the numbers of pictures and prompts differ, or are zero.
    """
    _require_pairs(images, prompts)
    answers: list[str] = []
    with torch.inference_mode(), evaluating(model), _padding_left(processor.tokenizer):
        for start in range(0, len(images), batch_size):
            pictures = [load_image(one, "a picture to ask about") for one in images[start : start + batch_size]]
            conversations = [
                [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": prompt}]}]
                for image, prompt in zip(pictures, prompts[start : start + batch_size], strict=True)
            ]
            answers += _answer(model, processor, conversations, max_new_tokens)
            if progress:
                progress(len(answers))
    return answers


def _answer(model: Any, processor: Any, conversations: list[list[dict]], max_new_tokens: int) -> list[str]:
    inputs = processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    ).to(model.device, model.dtype)
    # Sampling settings that a checkpoint brings along would only be warned about: greedy decoding has none.
    tokens = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=processor.tokenizer.pad_token_id,
    )
    if not model.config.is_encoder_decoder:  # a decoder repeats its prompt
        tokens = tokens[:, inputs["input_ids"].shape[1] :]
    return [answer.strip() for answer in processor.batch_decode(tokens, skip_special_tokens=True)]


@contextmanager
def _padding_left(tokenizer: Any) -> Iterator[None]:
    """Pad on the left: the answer must follow its prompt directly."""
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        yield
    finally:
        tokenizer.padding_side = side


def _plain(text: str) -> str:
    return _composed(text).strip().removesuffix(".").rstrip().casefold()


def _composed(text: str) -> str:
    """A text with its accents in its letters: the same word may be written either way."""
    return unicodedata.normalize("NFC", text)


def _require_pairs(ours: Sized, theirs: Sized) -> None:
    if len(ours) != len(theirs) or not len(ours):
        raise DataError(
            f"{len(ours)} and {len(theirs)} items", "as many of one as of the other, at least one", "pair them"
        )
