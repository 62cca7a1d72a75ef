"""Teachers: word maps from a diffusion model, or from people's masks and boxes."""
