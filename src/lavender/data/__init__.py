"""What lies on disk: users' data sets and images, and the store of word maps."""

from lavender.data.samples import Sample, Samples, read_samples, readable, to_dataset

__all__ = ["Sample", "Samples", "read_samples", "readable", "to_dataset"]
