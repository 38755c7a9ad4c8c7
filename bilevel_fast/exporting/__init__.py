"""Students for other programs: folders of diffusers, checkpoints in one file, graphs of ONNX and torch, a card."""
