"""The student: attention rows of a vision-language model."""
