"""Read data sets of images with text, and the store of word maps."""

from lavender.data.images import image_id, load_image
from lavender.data.samples import Sample, Samples, read_samples, readable, to_dataset
from lavender.data.store import MapStore

__all__ = ["MapStore", "Sample", "Samples", "image_id", "load_image", "read_samples", "readable", "to_dataset"]
