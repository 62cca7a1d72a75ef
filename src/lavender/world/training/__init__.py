"""Training of the built-in world's weights: `python -m lavender.world.training.make`."""
