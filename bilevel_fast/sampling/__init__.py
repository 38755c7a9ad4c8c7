"""From prompts to images: solvers (`samplers`, `generate`), prompt files, folders and grids of images."""
