"""The teacher: word maps from a diffusion model's cross-attention."""

import transformers  # noqa: F401  (before diffusers: else huggingface_hub prints of a circular import)
