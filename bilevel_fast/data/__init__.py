"""Data of a training step: from a cache of latents, or latents in memory, to batches."""
