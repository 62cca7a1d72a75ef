"""The teacher: word maps from a diffusion model's cross-attention."""
