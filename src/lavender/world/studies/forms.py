"""Forms of alignment that several studies compare, as settings of `LavenderConfig`."""

from __future__ import annotations

from typing import Any

from lavender.config import DEFAULTS as DEFAULTS_OF_LOSS

Settings = tuple[tuple[str, Any], ...]

PUBLISHED: Settings = (("attention_loss", "published"), ("align_weight", 5.0), ("match", "label"))
"""The authors' loss, of all words that have a map."""
MASS: Settings = (("attention_loss", "mass"), ("align_weight", 0.2), ("match", "label"), ("sharpen", 2.0))
"""Attention mass on the squared map."""
DEFAULTS: Settings = (
    *MASS,
    *zip(("align_weight", "sharpen"), DEFAULTS_OF_LOSS["mass"], strict=True),
)
"""What a user gets who sets nothing: attention mass with its default weight, without attention forcing."""
RECIPE: Settings = (*MASS, ("attention_forcing", 1.0))
"""Attention mass with attention forcing: the best form on development scenes (docs/log.md)."""
PLAIN: Settings = (*RECIPE, ("align_weight", 0.0))
"""Plain fine-tuning: the recipe with λ = 0."""
