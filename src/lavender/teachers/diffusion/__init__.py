"""Diffusion teachers: word maps from the cross-attention of a diffusion model."""

import transformers  # noqa: F401  (before diffusers, or huggingface_hub prints a circular import)
