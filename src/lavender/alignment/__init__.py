"""The method: pooling, the Aligner, the losses and the objective."""
