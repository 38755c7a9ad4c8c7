"""What a model's images are worth, measured."""
