"""Data in: what a --data word means, as batches of numpy arrays."""
