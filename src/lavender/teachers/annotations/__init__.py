"""Masks and boxes that people (or a segmenter) drew, as word maps: other teachers behind the same store."""
