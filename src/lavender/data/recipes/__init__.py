"""The four data sets of the paper, from their published files to one that `lavender extract` and a run read."""

from lavender.data.recipes.prepare import PAPER, Settings, prepare
from lavender.data.recipes.sources import RECIPES, Recipe

__all__ = ["PAPER", "RECIPES", "Recipe", "Settings", "prepare"]
