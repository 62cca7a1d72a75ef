"""Fine-tuning with the alignment loss."""
