"""The studies of `lavender study`: does alignment help, and why? They run on the built-in world."""
