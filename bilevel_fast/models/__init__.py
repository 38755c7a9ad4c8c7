"""Networks and model folders: the UNet and what is kept of it (`architecture`, `structure`, `vector`, `macs`, `unet`),
the noise process (`diffusion`), text encoders, VAEs, families, and reading and writing (`weights`, `folder`)."""
