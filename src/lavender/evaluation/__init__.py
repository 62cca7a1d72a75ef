"""How good word maps and answers are."""
