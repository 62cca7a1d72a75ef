"""The settings of extraction and alignment, and their checks."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from lavender.errors import ConfigError
from lavender.files import shown
from lavender.type_checks import (
    check_extraction,
    check_fields,
    check_path,
    check_ranges,
    check_used,
    without_repeats,
    write_paths_as_texts,
)

Mode = Literal["noise", "ddim", "null-text"]
Geometry = Literal["squash", "crop", "letterbox", "aspect"]
Competition = Literal["none", "share", "contrast"]
Carrier = Literal["own", "own+next"]
Space = Literal["attention", "output"]
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
Attributes = Literal["own", "noun"]
Texts = Literal["answers", "questions", "all"]
Rows = Literal["predict", "read", "both"]
WordTokens = Literal["all", "first"]
LayerChoice = Literal["all", "first", "middle", "last"]
ParallelInit = Literal["pretrained", "random"]
AlignerForm = Literal["light", "sim", "deep"]
AlignerKind = Literal["convolution", "mlp"]
AlignerNorm = Literal["instance", "batch", "group", "none"]
AlignerActivation = Literal["relu6", "leaky-relu"]
AttentionLoss = Literal["mass", "kl", "published", "published-sum", "published-mse", "published-kl", "published-js"]
PartOfSpeech = Literal["noun", "adjective", "verb", "other"]

ROLES: dict[Texts, tuple[str, ...]] = {"answers": ("assistant",), "questions": ("user",), "all": ("user", "assistant")}
"""The roles of the turns that each value of `texts` names."""

CONTENT_WORDS: tuple[PartOfSpeech, ...] = ("noun", "adjective", "verb")
"""The parts of speech that get a map by default: words that name something visible."""
DIRECT_LOSSES: tuple[AttentionLoss, ...] = ("mass", "kl")
"""The losses of the student's own attention, without an Aligner. They add no parameters."""
DIRECT_POOLINGS: tuple[Pooling, ...] = ("layer-mean", "mean-mean")
"""The poolings of `DIRECT_LOSSES`: a loss per layer, or one loss of the mean over layers. Heads are averaged."""
DEFAULTS: dict[str, tuple[float, float]] = {"mass": (0.5, 2.0), "kl": (1.0, 2.0)}
"""Direct loss → its default (`align_weight`, `sharpen`), chosen on development scenes (docs/log.md)."""
RENAMED_LOSSES: dict[str, AttentionLoss] = {
    "min-max": "published",
    "min-max-sum": "published-sum",
    "mse": "published-mse",
    "js": "published-js",
}
"""Earlier name of a loss → its name. "kl" has another meaning now: its earlier form is "published-kl"."""
BY_LOSS: Any = None
"""The default of a setting that depends on `attention_loss`; a config replaces it by the number."""


@dataclass(frozen=True)
class ExtractionConfig:
    """How a diffusion model makes word maps. docs/teachers.md reports the evidence for each default.

    Examples:
        >>> from lavender import ExtractionConfig
        >>> ExtractionConfig(timesteps=(50, 100), flip=True).grid
        (32, 32)

    Attributes:
        mode: "noise" adds noise once and runs the backbone once. "ddim" reads attention during DDIM inversion, in
            `num_steps` forwards. "null-text" is the paper's: inversion, null-text optimisation, guided re-denoising.
        timesteps: noise levels of `mode="noise"`, each from 0 to 999. Several run as one batch and are averaged.
        num_noises: number of noise samples that `mode="noise"` averages, as one batch.
        num_steps: denoising steps of "ddim" and "null-text".
        inversion_steps: inversion steps of "null-text", a divisor of `num_steps`; None means `num_steps`. The paper's
            "5 inversion and 10 diffusion steps" means either 5 here or 5 `null_text_iterations`.
        null_text_iterations: maximal number of optimisation steps per denoising step of "null-text".
        guidance: scale of classifier-free guidance in "null-text".
        seed: seed of the noise. The noise depends on the picture's content and this seed, not on the batch.
        geometry: how the picture is fitted to the teacher. "aspect" keeps its shape, with about as many pixels as
            the teacher's square; "squash" stretches it to the square. Maps always cover the whole picture.
        largest_layer: layers of more than N × N cells are not read, where N is this number, counted on the square
            that the model was trained on. The backbone stops after the last layer read. None is the family's
            default: 32 for UNets, no limit for transformers.
        layer_weights: weights of layers, by a prefix of their name: one number, or one number per head. The longest
            matching prefix counts; layers without one weigh 1. None is the family's default.
        expert_layer: read this layer alone, counted from 0 as layers run, in place of `layer_weights`.
        space: "attention" reads attention weights. "output" compares attention outputs of image and words in models
            with joint attention (`lavender.teachers.diffusion.concepts`); there "share" is a softmax over the words.
        competition: "contrast" subtracts the mean map of the text's other tokens from a word's map; "none" does not.
        carrier: the tokens that a word's map is read from: "own", or "own+next", which adds the token after the word
            (causal text encoders pass information on to it).
        flip: also extract from the mirrored picture and average. Doubles the cost.
        head_share: share of layers and heads to average, from 0 to 1: those with the most peaked maps of each word.
        word_share: share of a text's words that get a map, from 0 to 1: the most confident.
        t5: load T5 with Stable Diffusion 3, whose words then have T5's tokens too. Other families need no choice.
        tiny_vae: folder or Hub id of an `AutoencoderTiny` that encodes the pictures instead of the teacher's VAE.
        grid: (rows, cols) of the stored maps; the paper uses 32 × 32.
        batch_size: number of (picture, text) pairs per batch. It changes no map.
        parts_of_speech: which words get a map.
        texts: the turns whose words get a map: the assistant's "answers" on every picture before them, the user's
            "questions" on every picture before or in them, or "all". A question without such a word is no fault.

    To reproduce the paper only; our measurements reject these settings, see docs/teachers.md:
        refine: how many times a map is propagated along the image's self-attention, 0 to 2.
        competition: "share" divides a word's map by the sum over all tokens of the text, cell by cell.
        geometry: "letterbox" pads the picture to the teacher's square. "crop" takes the central square; maps are 0
            elsewhere.

    Raises:
        ConfigError: a setting is of another type, out of its range, or contradicts another.
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
    expert_layer: int | None = None
    space: Space = "attention"
    competition: Competition = "none"
    carrier: Carrier = "own"
    refine: int = 0
    flip: bool = False
    head_share: float = 1.0
    word_share: float = 1.0
    t5: bool = False
    tiny_vae: str | None = None
    grid: tuple[int, int] = (32, 32)
    batch_size: int = 8
    parts_of_speech: tuple[PartOfSpeech, ...] = CONTENT_WORDS
    texts: Texts = "answers"

    def __post_init__(self) -> None:
        write_paths_as_texts(self, ["tiny_vae"])
        check_fields(self)
        for name in ("grid", "timesteps", "parts_of_speech"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("timesteps", "parts_of_speech"):
            if not getattr(self, name):
                raise ConfigError(f"{name}=()", "a list of one or more", f"leave {name} out for its default")
        check_ranges(
            self,
            ("timesteps", 0, 999),
            ("num_noises", 1, 1000),
            ("num_steps", 1, 999),
            ("null_text_iterations", 0, 1000),
            ("seed", 0, 2**32 - 1),
            ("refine", 0, 2),
            ("batch_size", 1, 4096),
            ("largest_layer", 1, 1024),
            ("expert_layer", 0, 1023),
            ("guidance", 0, 100),
            ("head_share", 1e-9, 1),
            ("word_share", 1e-9, 1),
        )
        check_ranges(self, ("inversion_steps", 1, self.num_steps))
        if self.tiny_vae is not None:
            object.__setattr__(self, "tiny_vae", check_path("tiny_vae", self.tiny_vae))
        check_extraction(self)

    def identity(self) -> dict[str, Any]:
        """The settings that change a map. Stores whose settings have the same identity can be merged."""
        return {key: value for key, value in asdict(self).items() if key != "batch_size"}


@dataclass(frozen=True)
class AlignmentConfig:
    """How the student's attention is trained to match the maps: L = L_VLM + align_weight · L_att.

    Examples:
        >>> from lavender.config import AlignmentConfig
        >>> AlignmentConfig(attention_loss="kl").align_weight
        1.0

    Attributes:
        align_weight: λ, the weight of the alignment loss L_att, which is a mean over the words that count (`match`).
            0 is plain fine-tuning. Default: 0.5 for "mass" and 1 for "kl", in nats; 2 for the others, means over cells.
        pooling: how attention of many layers and heads becomes one map (§4.2, App. D; `lavender.alignment.pooling`).
            "layer-mean" and "layer-max": the Aligner of each layer, then the mean or maximum over layers. "learn": the
            same, with new query and key projections beside the pretrained ones (Eq. 15–16). "mean-max" and its like:
            pool heads (first word), then layers (second), then the Aligner. "flow-sum" and "flow-multi": attention flow
            (Eq. 40–44); "mean-flow-sum" and its like pool heads first.
        texts: the turns whose words are aligned: "answers" of the assistant, "questions" of the user, or "all". A
            question's words are aligned in the rows that read them. The map store must have maps of these texts.
        match: which words count. "label": every word that has a map. "exact" (the paper's): only words that the student
            predicts at that step. "root": also words of which it predicts another form ("dog" for "dogs").
        rows: which rows of an answer's word are aligned. "predict": those that predict its tokens. "read": those that
            read them, one position later. "both": each with half of the word's weight.
        tokens: whether "all" tokens of a word have rows, or only the "first", which needs `match="label"`.
        parts_of_speech: which of the mapped words to align; None aligns all.
        attributes: the map of an adjective: its "own", or that of the "noun" that it describes by grammar, see
            `lavender.alignment.attributes.described_nouns`. An adjective whose noun is not found is then not aligned.
        subjects_and_objects: align only the words that `lavender.words.subjects_and_objects` finds.
        weight_by_confidence: weigh each word by the confidence of the teacher's map, instead of 1.
        attention_loss: what L_att compares, see `lavender.alignment.losses`. "mass" and "kl" are of the student's own
            attention on the image keys, without an Aligner: "mass" is −ln of the share of attention on the map, "kl"
            the divergence of the attention from the map. "published" is the authors': the squared difference of min–max
            maps behind an Aligner; "published-mse", "published-kl" and "published-js" compare these in other ways.
        sharpen: power to which the maps, scaled to [0, 1], are raised. Default: 2 for "mass" and "kl", else 1.
        subtract_background: subtract each map's median first, so that at least half of the map is 0.
        word_share: share of a text's mapped words to align: the most confident, and any as confident as the last of
            these. So it leaves out none where all confidences are equal.
        attention_forcing: probability, at the first step, that a word's predicting rows attend to the picture as the
            map says, in place of their own attention (teacher forcing); in aligned layers and heads. Off if λ is 0.
        forcing_share: share of the steps over which that probability falls to 0.
        layers: indices of decoder layers; or "all" that see the picture, or the "first", "middle" or "last" of them.
            None is all; with "learn" in a self-attending model, the middle fifth.
        layer_share: share of the layers that "first", "middle" and "last" select, from 0 to 1.
        heads: indices of the attention heads to align in each layer; None is all.
        parallel_init: how the projections of "learn" start: as copies of the pretrained ones, or random.
        aligner, aligner_kind: depth of the Aligner, `lavender.alignment.aligner.Aligner`, and the kind of its layers.
        aligner_norm, aligner_activation, aligner_width: normalisation, activation and number of hidden channels (d_h).
        align_warmup, align_decay: share of the steps in which λ rises from 0, at the start, and falls to 0, at the end.
        aligner_pretraining: share of the steps, at the start, in which only the Aligner (and the projections of
            "learn") train (§6).
        min_coverage: training stops before the first step if a smaller share of samples, without replay, has maps.

    To reproduce the paper only; our measurements reject these settings, see docs/method.md:
        align_weight: "estimated" sets λ = 1/(2σ²) (App. C) from the residuals of "published" or "published-sum", see
            `lavender.training.schedule.EstimatedWeight`.
        attention_loss: "published-sum" sums over cells instead of taking the mean, as Eq. 9 is written.
        align_switches: how many times alignment is switched off or on, in equal parts, starting with on (§9).

    Raises:
        ConfigError: a setting is of another type, out of its range, or contradicts another.
    """

    align_weight: float | Literal["estimated"] = BY_LOSS
    pooling: Pooling = "layer-mean"
    texts: Texts = "answers"
    match: Match = "label"
    rows: Rows = "predict"
    tokens: WordTokens = "all"
    parts_of_speech: tuple[PartOfSpeech, ...] | None = None
    attributes: Attributes = "own"
    subjects_and_objects: bool = False
    weight_by_confidence: bool = False
    attention_loss: AttentionLoss = "mass"
    sharpen: float = BY_LOSS
    subtract_background: bool = False
    word_share: float = 1.0
    attention_forcing: float = 0.0
    forcing_share: float = 0.8
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
        object.__setattr__(self, "attention_loss", name_of_loss(self.attention_loss))
        defaults = DEFAULTS.get(str(self.attention_loss), (2.0, 1.0))
        for name, default in zip(("align_weight", "sharpen"), defaults, strict=True):
            if getattr(self, name) is BY_LOSS:
                object.__setattr__(self, name, default)
        check_fields(self)
        for name in ("layers", "heads", "parts_of_speech"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                object.__setattr__(self, name, without_repeats(name, value))
        if self.align_weight != "estimated":
            check_ranges(self, ("align_weight", 0, 1e9))
        elif self.attention_loss not in ("published", "published-sum"):
            raise ConfigError(
                f"align_weight='estimated' with {self._loss()}",
                "squared residuals of maps",
                "set attention_loss to published or published-sum, or align_weight to a number",
            )
        check_ranges(
            self,
            ("layer_share", 1e-9, 1),
            ("aligner_width", 1, 4096),
            ("align_switches", 0, 1_000_000),
            ("align_warmup", 0, 1),
            ("align_decay", 0, 1),
            ("aligner_pretraining", 0, 1),
            ("min_coverage", 0, 1),
            ("sharpen", 0.1, 16),
            ("word_share", 1e-9, 1),
            ("attention_forcing", 0, 1),
            ("forcing_share", 1e-9, 1),
        )
        self._check_direct()
        self._check_forcing()
        self._check_match()
        self._check_attributes()
        check_used(self)

    @property
    def is_direct(self) -> bool:
        """Whether the loss is of the student's own attention, so that there is no Aligner."""
        return self.attention_loss in DIRECT_LOSSES

    def _loss(self) -> str:
        default = ", the default" if self.attention_loss == type(self).attention_loss else ""
        return f"attention_loss={self.attention_loss!r}{default}"

    def _check_direct(self) -> None:
        """Refuse settings of the Aligner, which a direct loss would ignore."""
        if not self.is_direct:
            return
        if self.pooling not in DIRECT_POOLINGS:
            raise ConfigError(
                f"pooling={self.pooling!r} with {self._loss()}",
                f"{' or '.join(DIRECT_POOLINGS)}: this loss has no Aligner and no projections of its own",
                "leave pooling out, or set attention_loss: published",
            )
        names = [field.name for field in fields(self) if field.name.startswith(("aligner", "parallel_init"))]
        if changed := [name for name in names if getattr(self, name) != getattr(type(self), name)]:
            raise ConfigError(
                f"{changed[0]}={shown(getattr(self, changed[0]))} with {self._loss()}",
                "no setting of the Aligner or of learned projections: this loss has neither",
                f"leave {changed[0]} out, or set attention_loss: published",
            )

    def _check_match(self) -> None:
        """Refuse rows that do not predict all of a word where predictions decide which words count."""
        if self.match == "label":
            return
        for name, value in (("rows", "predict"), ("texts", "answers"), ("tokens", "all")):
            if getattr(self, name) != value:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} with match={self.match!r}",
                    f"{name}: {value}, since predictions decide which words match",
                    f"set match: label, or leave {name} out",
                )

    def _check_attributes(self) -> None:
        """Refuse settings that leave no attribute to align."""
        parts = self.parts_of_speech
        if self.attributes == "noun" and (self.subjects_and_objects or (parts and "adjective" not in parts)):
            name = "subjects_and_objects" if self.subjects_and_objects else "parts_of_speech"
            raise ConfigError(
                f"attributes='noun' with {name}={shown(getattr(self, name))}, which leaves out adjectives",
                "adjectives among the aligned words",
                f"leave attributes or {name} out",
            )

    def _check_forcing(self) -> None:
        """Refuse settings with which attention forcing would decide what is aligned."""
        if not self.attention_forcing:
            return
        for name, is_wrong, expected in (
            ("match", self.match != "label", "match: label, since forced attention changes what the model predicts"),
            ("rows", self.rows == "read", "rows: predict or both, since only rows that predict a word are forced"),
            ("texts", self.texts == "questions", "texts: answers or all, since only words of answers are forced"),
            ("pooling", self.pooling == "learn", "a loss of the attention that makes the model's output"),
        ):
            if is_wrong:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} with attention_forcing={self.attention_forcing}",
                    expected,
                    f"change {name}, or leave attention_forcing out",
                )


def name_of_loss(name: Any) -> Any:
    """The name of an attention loss that is given by an earlier name, with a DeprecationWarning."""
    if not isinstance(name, str) or name not in RENAMED_LOSSES:
        return name
    new = RENAMED_LOSSES[name]
    warnings.warn(f"attention_loss={name!r} is called {new!r} now", DeprecationWarning, stacklevel=3)
    return new
