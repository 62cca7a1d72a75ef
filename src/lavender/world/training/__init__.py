"""How the weights of the built-in world were trained."""
