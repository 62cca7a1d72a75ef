"""Teachers: word maps from a diffusion model, or from the masks and boxes that people drew."""
