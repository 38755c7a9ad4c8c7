"""What every package needs and nothing of diffusion: errors, files, command lines, devices, tables."""
