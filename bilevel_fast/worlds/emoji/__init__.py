"""The emoji world: drawings of five studios, a small text-to-image model of them, and the probe that judges both."""
