"""Erasers: what makes a model forget a concept, as an upper step of a training or by itself."""
