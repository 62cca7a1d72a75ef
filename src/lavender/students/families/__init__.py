"""Families of vision-language models, one per file."""
