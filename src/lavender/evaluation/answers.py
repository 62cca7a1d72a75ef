"""A model's answers about pictures, the loss of given answers, and scores of the names in answers."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from PIL import Image

from lavender.data.images import load_image, named
from lavender.errors import DataError
from lavender.students.logits import logits_at
from lavender.students.word_maps import evaluating

_GAP = re.compile(r"[\s\-]+")


def names_said(text: str, names: Iterable[str]) -> set[str]:
    """The names that occur in a text, spelt as in `names`.

    Whole words in any case, the longest name first: "hot dog" does not count as "dog". A plural in -s counts unless it
    is another name: "dogs" says "dog", but "grapes" does not say "grape" if both are names.
    """
    pattern, name_of = _spellings(tuple(names))
    return {name_of[_GAP.sub(" ", spelling.lower())] for spelling in pattern.findall(_composed(text))}


@lru_cache(maxsize=64)
def _spellings(names: tuple[str, ...]) -> tuple[re.Pattern[str], dict[str, str]]:
    """A pattern of all spellings of the names, and the name that each spelling means."""
    name_of = {_GAP.sub(" ", _composed(name).lower()): name for name in names}
    plurals = {f"{spelling}s": name for spelling, name in name_of.items() if not spelling.endswith("s")}
    name_of = plurals | name_of  # a name takes precedence over another name's plural
    longest_first = sorted(name_of, key=len, reverse=True)
    written = "|".join(re.escape(spelling).replace(r"\ ", _GAP.pattern) for spelling in longest_first)
    return re.compile(rf"(?<!\w)(?:{written})(?!\w)", re.IGNORECASE), name_of


def micro_f1(predicted: Sequence[set[str]], true: Sequence[set[str]]) -> float:
    """Micro F1 of predicted sets against the true ones: 2·Σ|P ∩ T| / Σ(|P| + |T|), sums over all samples.

    1 if every set is empty: then each prediction is exactly the truth, as `exact_set` counts it too.

    Raises:
        DataError: not as many predictions as truths, or none.
    """
    _require_pairs(predicted, true)
    common = sum(len(names & truth) for names, truth in zip(predicted, true, strict=True))
    total = sum(map(len, predicted)) + sum(map(len, true))
    return 2 * common / total if total else 1.0


def exact_set(predicted: Sequence[set[str]], true: Sequence[set[str]]) -> float:
    """Share of samples whose predicted set is the true one.

    Raises:
        DataError: not as many predictions as truths, or none.
    """
    _require_pairs(predicted, true)
    return sum(names == truth for names, truth in zip(predicted, true, strict=True)) / len(predicted)


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
        model: a Transformers image-text-to-text model. It runs on its device in evaluation mode; afterwards each
            module has its own training flag again.
        processor: its processor, with a chat template. Its padding side is restored.
        images: one picture per prompt.
        prompts: what the user says about each picture.
        max_new_tokens: where an answer is cut off.
        batch_size: pictures per pass. Batches are padded on the left, so it does not change the answers.
        progress: called after each batch with the number of answers so far.

    Returns:
        One answer per picture, without the prompt, special tokens and surrounding space.

    Raises:
        DataError: not as many pictures as prompts, or none.
    """
    _require_pairs(images, prompts)
    answers: list[str] = []
    with answering(model, processor):
        for start in range(0, len(images), batch_size):
            pictures = [load_image(image, named(image, "the picture")) for image in images[start : start + batch_size]]
            conversations = [
                [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": prompt}]}]
                for image, prompt in zip(pictures, prompts[start : start + batch_size], strict=True)
            ]
            answers += answer_batch(model, processor, conversations, max_new_tokens)
            if progress:
                progress(len(answers))
    return answers


@contextmanager
def answering(model: Any, processor: Any) -> Iterator[None]:
    """Inside, the model is in evaluation mode and the processor pads on the left, as `answer_batch` needs them."""
    with torch.inference_mode(), evaluating(model), _padding_left(processor.tokenizer):
        yield


def answer_batch(
    model: Any, processor: Any, conversations: Sequence[list[dict]], max_new_tokens: int, **sampling: Any
) -> list[str]:
    """Continue conversations, by greedy decoding unless `sampling` says otherwise. Call it inside `answering`.

    Args:
        model: a Transformers image-text-to-text model.
        processor: its processor, with a chat template.
        conversations: messages as chat templates take them, the pictures in their parts. All have pictures or none.
        max_new_tokens: where an answer is cut off.
        sampling: `do_sample`, `num_beams`, `temperature`, `top_p` and `top_k`, as `model.generate` takes them.

    Returns:
        One answer per conversation, without the prompt, special tokens and surrounding space.
    """
    inputs = processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    ).to(model.device, model.dtype)
    # Greedy decoding uses no sampling settings; those of a checkpoint would only cause warnings.
    settings = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None} | sampling
    settings |= {"pad_token_id": processor.tokenizer.pad_token_id, "eos_token_id": end_ids(model, processor) or None}
    tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, **settings)
    if not model.config.is_encoder_decoder:  # a decoder repeats its prompt
        tokens = tokens[:, inputs["input_ids"].shape[1] :]
    return [answer.strip() for answer in processor.batch_decode(tokens, skip_special_tokens=True)]


def end_ids(model: Any, processor: Any) -> list[int]:
    """The tokens that end an answer: those of the model's generation config, of the tokenizer and of the processor.

    The config of a model that was converted or trained on captions may name none.
    """
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)  # remote code may have none
    tokenizer = processor.tokenizer
    found = {*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id}
    found |= {tokenizer.convert_tokens_to_ids(token) for token in getattr(processor, "end_tokens", ())}
    return sorted(token for token in found if token is not None)


@torch.inference_mode()
def continuation_loss(model: Any, processor: Any, question: list[dict], continuation: str) -> tuple[float, bool]:
    """The negative log-likelihood of a text as the beginning of the answer, and whether greedy decoding would write it.

    Args:
        model: a Transformers image-text-to-text model.
        processor: its processor, with a chat template.
        question: the conversation up to the answer.
        continuation: the text to score; all tokens after those of the question count.

    Returns:
        (nats per token, the mean over the tokens, as lmms-eval's own models return it; all tokens are the likeliest).
    """
    answered = [*question, {"role": "assistant", "content": [{"type": "text", "text": continuation}]}]
    settings = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    asked = processor.apply_chat_template([question], add_generation_prompt=True, **settings)["input_ids"][0]
    inputs = processor.apply_chat_template([answered], continue_final_message=True, **settings)
    inputs = inputs.to(model.device, model.dtype)
    tokens = inputs["input_ids"][0]
    # a tokenizer may join the last token of the question with the first of the continuation
    shared = min(len(asked), len(tokens))
    same = asked[:shared].to(tokens.device) == tokens[:shared]
    start = shared if bool(same.all()) else int(same.int().argmin())
    rows = logits_at(model, inputs, range(start - 1, len(tokens) - 1))[0].log_softmax(dim=-1)
    target = tokens[start:]
    loss = -rows.gather(1, target[:, None]).mean().item()
    return loss, bool((rows.argmax(dim=-1) == target).all())


@contextmanager
def _padding_left(tokenizer: Any) -> Iterator[None]:
    """Pad on the left, so that the answer directly follows its prompt."""
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        yield
    finally:
        tokenizer.padding_side = side


def _composed(text: str) -> str:
    """The text in Unicode NFC: a letter and its accent are one character, however they were typed."""
    return unicodedata.normalize("NFC", text)


def _require_pairs(first: Sized, second: Sized) -> None:
    if len(first) != len(second) or not len(first):
        raise DataError(
            f"{len(first)} and {len(second)} items",
            "two lists of the same length, at least 1",
            "pass one item per item of the other list",
        )
