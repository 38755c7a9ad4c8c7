"""The largest things that are read: what a file may ask of this machine before it is refused.

All lie far above what people have, and far below what takes a machine down.
"""

JSON_BYTES = 2**29
"""Of a JSON file; COCO's captions have 2**27."""
LINE_BYTES = 2**24
"""Of one line of JSON lines."""
NESTING = 64
"""Brackets within brackets in JSON; model configs have 4."""
PICKLE_BYTES = 2**26
"""Of the part of a weight file that is not tensors; the largest model that is published has 2**22."""
PIXELS = 2**27
"""Of a picture that is decoded, or of one that is to be drawn: 11,585 x 11,585."""
SIDE = 11_585
"""Height and width of a view of a picture."""
TOKENS = 2**16
"""Of a prompt, after which it is cut or refused."""
CHANNELS = 2**16
"""Of any layer: width, groups, heads."""
BLOCK_LAYERS = 32
"""Of one block of a UNet, and of one level of a VAE."""
LAYERS = 1024
"""Of a text encoder."""
LEVELS = 16
"""Of a UNet or a VAE; each halves the picture."""
TIMESTEPS = 2**17
"""Of a noise schedule."""
LATENTS = 1448
"""Height and width of latents: pictures of `PIXELS` at 8 pixels to a latent."""
MEMBERS = 2**22
"""Files, tensors, shards or rows that one file may list."""
