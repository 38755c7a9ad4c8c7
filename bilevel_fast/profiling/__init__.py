"""What a training step costs: counted FLOPs, bytes and launches, memory, and seconds by phase."""
