"""The diffusion model: its UNet and structures, MACs, noise process, text encoder, autoencoder, and its folder."""
