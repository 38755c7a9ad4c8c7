"""Counted on the meta device, and projected from the counts: MACs, launches, largest batch, time by card."""
