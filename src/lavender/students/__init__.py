"""The student: capture the attention of a vision-language model on its pictures, for any supported family."""
