"""Every setting of extraction and alignment, with its check. Nothing else validates settings."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeVar, get_args

from lavender.errors import ConfigError
from lavender.files import shown
from lavender.type_checks import check_fields, check_path, fits, hints_of, write_paths_as_texts

MODES = ("noise", "ddim", "null-text")
GEOMETRIES = ("squash", "crop", "letterbox", "aspect")
COMPETITIONS = ("none", "share", "contrast")
CARRIERS = ("own", "own+next")
POOLINGS = (
    "layer-mean",
    "layer-max",
    "mean-mean",
    "max-mean",
    "mean-max",
    "max-max",
    "flow-sum",
    "flow-multi",
    "mean-flow-sum",
    "max-flow-sum",
    "mean-flow-multi",
    "max-flow-multi",
    "learn",
)
MATCHES = ("label", "exact", "root")
LAYER_CHOICES = ("all", "first", "middle", "last")
PARALLEL_INITS = ("pretrained", "random")
ALIGNER_FORMS = ("light", "sim", "deep")
ALIGNER_KINDS = ("convolution", "mlp")
ALIGNER_NORMS = ("instance", "batch", "group", "none")
ALIGNER_ACTIVATIONS = ("relu6", "leaky-relu")
ATTENTION_LOSSES = ("min-max", "min-max-sum", "mse", "kl", "js")
PARTS_OF_SPEECH = ("noun", "adjective", "verb", "other")

Mode = Literal["noise", "ddim", "null-text"]
Geometry = Literal["squash", "crop", "letterbox", "aspect"]
Competition = Literal["none", "share", "contrast"]
Carrier = Literal["own", "own+next"]
Pooling = Literal[
    "layer-mean",
    "layer-max",
    "mean-mean",
    "max-mean",
    "mean-max",
    "max-max",
    "flow-sum",
    "flow-multi",
    "mean-flow-sum",
    "max-flow-sum",
    "mean-flow-multi",
    "max-flow-multi",
    "learn",
]
Match = Literal["label", "exact", "root"]
LayerChoice = Literal["all", "first", "middle", "last"]
ParallelInit = Literal["pretrained", "random"]
AlignerForm = Literal["light", "sim", "deep"]
AlignerKind = Literal["convolution", "mlp"]
AlignerNorm = Literal["instance", "batch", "group", "none"]
AlignerActivation = Literal["relu6", "leaky-relu"]
AttentionLoss = Literal["min-max", "min-max-sum", "mse", "kl", "js"]
PartOfSpeech = Literal["noun", "adjective", "verb", "other"]
T = TypeVar("T")


@dataclass(frozen=True)
class ExtractionConfig:
    """How word maps are made from a diffusion model. docs/teachers.md has the evidence for the defaults.

    Attributes:
        mode: "noise" adds noise once and runs the backbone once; "ddim" reads during DDIM inversion, `num_steps`
            forwards; "null-text" is the paper's: inversion, null-text optimisation, guided re-denoising.
        timesteps: of 1000; how much noise `mode="noise"` adds. Several are averaged, as one batch.
        num_noises: how many noises `mode="noise"` averages, as one batch.
        num_steps: steps of "ddim", and of the re-denoising of "null-text".
        inversion_steps: of "null-text", a divisor of `num_steps`; None is as many. The paper's "5 inversion and 10
            diffusion steps" is either 5 here, or 5 `null_text_iterations`.
        null_text_iterations: optimisation steps of "null-text" at each step, at most.
        guidance: classifier-free guidance of "null-text".
        seed: of the noise. The noise of a picture depends on its content and this seed, never on its batch.
        geometry: what the teacher sees: about as many pixels as its square has, in the picture's own shape ("aspect");
            the picture squashed to that square ("squash"), padded to it ("letterbox"), or its central square ("crop";
            maps are 0 elsewhere). Maps are always of the whole picture.
        largest_layer: layers of more than this² cells, on the square that the model was trained on, are not read, and
            the backbone stops after the last one read. None is the family's default: 32 for UNets, no limit for SD3.
        layer_weights: weight of layers by the beginning of their names, one number or one a head; the longest
            matching beginning counts, and 1 is for layers without. None is the family's default.
        competition: "contrast" subtracts from a word's map the mean of the text's other tokens; "share" divides by
            the sum over all of the text's tokens, cell by cell; "none" does neither.
        carrier: tokens that carry a word: its own, or also the one after it (causal text encoders leak).
        refine: how often a map is spread along the image's self-attention, 0 to 2.
        flip: whether to average with the mirrored picture; costs twice as much.
        head_share: share of layers and heads that are averaged, those with the most peaked maps of each word.
        word_share: share of a text's words that get a map, the most confident.
        tiny_vae: folder or hub id of an AutoencoderTiny that encodes the pictures instead.
        grid: (rows, cols) of the stored maps; the paper's is 32 × 32.
        batch_size: pairs of picture and text at a time.
        parts_of_speech: which words get a map.
    """

    mode: Mode = "noise"
    timesteps: tuple[int, ...] = (50,)
    num_noises: int = 1
    num_steps: int = 10
    inversion_steps: int | None = None
    null_text_iterations: int = 5
    guidance: float = 7.5
    seed: int = 0
    geometry: Geometry = "aspect"
    largest_layer: int | None = None
    layer_weights: Mapping[str, float | Sequence[float]] | None = None
    competition: Competition = "none"
    carrier: Carrier = "own"
    refine: int = 0
    flip: bool = False
    head_share: float = 1.0
    word_share: float = 1.0
    tiny_vae: str | None = None
    grid: tuple[int, int] = (32, 32)
    batch_size: int = 8
    parts_of_speech: tuple[PartOfSpeech, ...] = ("noun", "adjective", "verb")

    def __post_init__(self) -> None:
        write_paths_as_texts(self, ["tiny_vae"])
        check_fields(self)
        for name in ("grid", "timesteps", "parts_of_speech"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("timesteps", "parts_of_speech"):
            if not getattr(self, name):
                raise ConfigError(f"{name}=()", "a list of one or more", f"leave {name} out for its default")
        _check_ranges(
            self,
            ("timesteps", 0, 999),
            ("num_noises", 1, 1000),
            ("num_steps", 1, 999),
            ("null_text_iterations", 0, 1000),
            ("seed", 0, 2**32 - 1),
            ("refine", 0, 2),
            ("batch_size", 1, 4096),
            ("largest_layer", 1, 1024),
            ("guidance", 0, 100),
            ("head_share", 1e-9, 1),
            ("word_share", 1e-9, 1),
        )
        _check_ranges(self, ("inversion_steps", 1, self.num_steps))
        if self.inversion_steps is not None and self.num_steps % self.inversion_steps:
            raise ConfigError(
                f"inversion_steps={self.inversion_steps} with num_steps={self.num_steps}",
                "a divisor of num_steps",
                "change one of them, such as 5 and 10",
            )
        if not 2 <= min(self.grid) <= max(self.grid) <= 256:
            raise ConfigError(f"grid={self.grid}", "(rows, cols), each from 2 to 256", "use the paper's (32, 32)")
        if self.tiny_vae is not None:
            object.__setattr__(self, "tiny_vae", check_path("tiny_vae", self.tiny_vae))
        _check_layer_weights(self.layer_weights)

    def identity(self) -> dict[str, Any]:
        """The settings that change a map. Two stores with the same identity can be joined."""
        return {key: value for key, value in asdict(self).items() if key != "batch_size"}


def _check_layer_weights(weights: Mapping[str, float | Sequence[float]] | None) -> None:
    lists = [list(one) if isinstance(one, Sequence) else [one] for one in (weights or {}).values()]
    if any(not numbers or not 0 <= min(numbers) <= max(numbers) < 1e9 for numbers in lists):
        raise ConfigError(
            f"layer_weights={shown(weights)}",
            "numbers from 0 on, one or a list of one a head, by beginnings of names",
            "write them like {up_blocks.1: 1.0, down_blocks: 0.5}",
        )


@dataclass(frozen=True)
class AlignmentConfig:
    """How the student's attention is pulled towards the maps: L = L_VLM + align_weight · L_att.

    Attributes:
        align_weight: the paper's λ, on the mean over cells and the words that count (of "exact" and "root" those
            that match); 0 is plain fine-tuning. "estimated": λ = 1/(2σ²) (App. C), σ² the mean squared residual of
            a cell over the steps before; see `lavender.training.schedule`.
        pooling: "layer-mean" ("layer-max") sends each layer's heads through the Aligner and takes the mean (maximum)
            over layers; "learn" does the same with new query and key projections beside the pretrained ones
            (Eq. 15–16); "max-mean" and its kin pool heads by the first word and layers by the second before the
            Aligner; "flow-sum" and "flow-multi" are attention flow (Eq. 40–44), with heads pooled first in
            "mean-flow-sum" and its kin.
        parts_of_speech: which of the mapped words to align; None aligns all.
        subjects_and_objects: of these only the heads of noun phrases that no preposition governs, see
            `lavender.words.subjects_and_objects`.
        weight_by_confidence: whether a word counts by how sure the teacher's map is, instead of as 1.
        attention_loss: see `lavender.alignment.losses.per_word_loss`; "min-max" is the authors'.
        match: "label" aligns every word of the answer that has a map; "exact" (the paper's) only those that the
            student predicts at that moment: where it is about to say something else, its attention is left alone;
            "root" also those of which it predicts another form ("dog" for "dogs").
        layers: indices of the decoder layers to align, or "all" that see the picture, or the "first", "middle" or
            "last" of them. None is all; with "learn" in a self-attending model the middle fifth.
        layer_share: share of the layers that "first", "middle" and "last" are.
        heads: indices of the attention heads to align, in each layer; None is all.
        parallel_init: how the projections of "learn" begin: as copies of the pretrained ones, or random.
        aligner, aligner_kind, aligner_norm, aligner_activation: form of the Aligner, see `lavender.alignment.aligner`.
        aligner_width: channels of the Aligner's hidden layers, d_h.
        align_warmup, align_decay: shares of the steps over which the weight rises from 0 at the start, and falls to 0
            at the end.
        align_switches: how often alignment is switched off and on again, in equal parts of the run, starting with on
            (§9).
        aligner_pretraining: share of the steps, at the start, in which the VLM is frozen and only the Aligner (and the
            projections of "learn") trains (§6).
        min_coverage: training stops before the first step if a smaller share of samples has maps.
    """

    align_weight: float | Literal["estimated"] = 2.0
    pooling: Pooling = "layer-mean"
    match: Match = "label"
    parts_of_speech: tuple[PartOfSpeech, ...] | None = None
    subjects_and_objects: bool = False
    weight_by_confidence: bool = False
    attention_loss: AttentionLoss = "min-max"
    layers: tuple[int, ...] | LayerChoice | None = None
    layer_share: float = 1 / 3
    heads: tuple[int, ...] | None = None
    parallel_init: ParallelInit = "pretrained"
    aligner: AlignerForm = "sim"
    aligner_kind: AlignerKind = "convolution"
    aligner_norm: AlignerNorm = "instance"
    aligner_activation: AlignerActivation = "relu6"
    aligner_width: int = 32
    align_warmup: float = 0.0
    align_decay: float = 0.0
    align_switches: int = 0
    aligner_pretraining: float = 0.0
    min_coverage: float = 0.5

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("layers", "heads", "parts_of_speech"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                object.__setattr__(self, name, _without_repeats(name, value))
        if self.align_weight != "estimated":
            _check_ranges(self, ("align_weight", 0, 1e9))
        elif self.attention_loss not in ("min-max", "min-max-sum"):
            raise ConfigError(
                f"align_weight='estimated' with attention_loss={self.attention_loss!r}",
                "squared residuals of maps",
                "set attention_loss to min-max or min-max-sum, or align_weight to a number",
            )
        _check_ranges(
            self,
            ("layer_share", 1e-9, 1),
            ("aligner_width", 1, 4096),
            ("align_switches", 0, 1_000_000),
            ("align_warmup", 0, 1),
            ("align_decay", 0, 1),
            ("aligner_pretraining", 0, 1),
            ("min_coverage", 0, 1),
        )


def _without_repeats(name: str, value: Sequence) -> tuple:
    if not value or len({*value}) < len(value):
        raise ConfigError(
            f"{name}={shown(value)}", "one or more, none twice", f"change {name}, or leave it out for all"
        )
    return tuple(value)


def from_mapping(cls: type[T], settings: Mapping[str, Any], where: str) -> T:
    """Build a config dataclass from a mapping; a misspelt key is an error that names the nearest right one."""
    check_keys(settings, [one.name for one in fields(cls)], where)  # ty: ignore[invalid-argument-type]
    return cls(**settings)


def check_keys(settings: Mapping[str, Any], allowed: list[str], where: str) -> None:
    """Raise ConfigError for a key that is not allowed, with the nearest one that is."""
    for key in settings:
        if key not in allowed:
            near = difflib.get_close_matches(key[:100], allowed, n=3) if isinstance(key, str) else []
            hint = f"write {near[0]!r} instead" if near else "remove it, or look it up in the documentation"
            known = sorted(set(near if near and len(allowed) > 20 else allowed))
            raise ConfigError(f"the key {shown(key)} in {where}", f"a known key, such as {', '.join(known)}", hint)


def _check_ranges(settings: Any, *ranges: tuple[str, float, float]) -> None:
    """Check that each named field, or each item of one that is a list, is from `low` to `high`, or None."""
    for name, low, high in ranges:
        value, hint = getattr(settings, name), hints_of(type(settings))[name]
        for one in value if isinstance(value, tuple) else (value,):
            if one is not None and not low <= one <= high:
                kind = "a number" if fits(0.5, hint) else "a whole number"
                raise ConfigError(f"{name}={shown(one)}", f"{kind} from {low} to {high}", f"change {name}")


assert get_args(Mode) == MODES
assert get_args(Geometry) == GEOMETRIES
assert get_args(Competition) == COMPETITIONS
assert get_args(Carrier) == CARRIERS
assert get_args(Pooling) == POOLINGS
assert get_args(Match) == MATCHES
assert get_args(LayerChoice) == LAYER_CHOICES
assert get_args(ParallelInit) == PARALLEL_INITS
assert get_args(AlignerForm) == ALIGNER_FORMS
assert get_args(AlignerKind) == ALIGNER_KINDS
assert get_args(AlignerNorm) == ALIGNER_NORMS
assert get_args(AlignerActivation) == ALIGNER_ACTIVATIONS
assert get_args(AttentionLoss) == ATTENTION_LOSSES
assert get_args(PartOfSpeech) == PARTS_OF_SPEECH
