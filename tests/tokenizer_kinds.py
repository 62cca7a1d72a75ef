"""The kinds of tokenizers that VLMs have, made in the process: byte-level merges, Gemma's, sentencepiece's Unigram."""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram
from tokenizers.trainers import BpeTrainer, UnigramTrainer
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "a watering can near a crocodile.\n\nwhat is in the picture?\nno, a dog!\n\n\n",
    "an old café by the river; “naïve” and well-known",
    "user assistant what do you see here now",
    "看见一只狗",
] * 4
MARKERS = [
    "<bos>",
    "<eos>",
    "<pad>",
    "<image>",
    "<start>",
    "</start>",
    "<patch>",
    "<row_1_col_1>",
    "<row_1_col_2>",
    "<global>",
]
# Llama-3's and Qwen's way to cut a text before merging: a full stop takes the newlines after it along.
CUT = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_level() -> Tokenizer:
    """As Qwen, Llama 3 and Idefics3: merges of bytes, a space belongs to the word after it."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CUT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(TEXTS, BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False))
    return backend


def bytes_of_pieces() -> list[str]:
    return [f"<0x{byte:02X}>" for byte in range(256)]


def gemma_like() -> Tokenizer:
    """As Gemma: merges over the whole text, spaces as ▁, bytes for unknown letters, runs of newlines are tokens."""
    learned = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True))
    learned.normalizer = normalizers.Replace(" ", "▁")
    learned.train_from_iterator(
        [text for text in TEXTS if text.isascii()],
        BpeTrainer(vocab_size=400, special_tokens=["<unk>", *bytes_of_pieces()], show_progress=False),
    )
    backend = Tokenizer(learned.model)
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
        ]
    )
    backend.add_tokens([AddedToken("\n" * count, normalized=False) for count in (1, 2, 3)])
    return backend


def unigram(scheme: str) -> Tokenizer:
    """As sentencepiece's Unigram with byte fallback; a space before the first word, or before every piece."""
    learned = Tokenizer(Unigram())
    learned.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    learned.train_from_iterator(
        [text for text in TEXTS if text.isascii()],
        UnigramTrainer(vocab_size=200, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False),
    )
    scores = [learned.id_to_token(rank) or "" for rank in range(learned.get_vocab_size())]
    pieces = [("<unk>", 0.0), *((piece, -12.0) for piece in bytes_of_pieces())]
    pieces += [(piece, -2.0 - rank / 50) for rank, piece in enumerate(scores) if piece != "<unk>"]
    backend = Tokenizer(Unigram(pieces, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return backend


TOKENIZERS = {
    "byte-level": byte_level,
    "gemma": gemma_like,
    "unigram, first": lambda: unigram("first"),
    "unigram, always": lambda: unigram("always"),
}


def normalising(make: Callable[[], Tokenizer], *steps: normalizers.Normalizer) -> Tokenizer:
    """The same tokenizer, which changes a text before it cuts it."""
    backend = make()
    backend.normalizer = normalizers.Sequence(list(steps))
    return backend


NORMALISING: dict[str, Callable[[], Tokenizer]] = {
    "NFC": lambda: normalising(byte_level, normalizers.NFC()),  # as Qwen2's
    "NFD": lambda: normalising(byte_level, normalizers.NFD()),
    "NFKC": lambda: normalising(lambda: unigram("first"), normalizers.NFKC()),  # as sentencepiece's by default
    "no accents": lambda: normalising(  # as BERT's
        byte_level, normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()
    ),
    "ASCII alone": lambda: normalising(byte_level, normalizers.Replace(Regex(r"[^\x00-\x7f]"), "")),
}


def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    backend = (TOKENIZERS | NORMALISING)[kind]()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": MARKERS[3:]})
    return tokenizer
