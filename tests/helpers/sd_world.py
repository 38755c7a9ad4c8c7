"""What training on folders wants, in the layout of Stable Diffusion 2.1, small: teacher/ pruned/ cache/ bank/."""

from pathlib import Path

import torch

from bilevel_fast.data.bank import Concept, anchor_for, make_bank
from bilevel_fast.data.cache import Index
from bilevel_fast.data.writer import CacheWriter
from bilevel_fast.models.folder import load_folder, save_student
from bilevel_fast.pruning import MacBudget, method
from sd_folder import make_sd_folder

CONCEPT = Concept("in the style of monet")


def make_sd_world(root: Path) -> Path:
    """teacher/, pruned/ by magnitude, cache/ (encoded by the teacher's VAE), bank/ (drawn by the teacher)."""
    teacher = load_folder(make_sd_folder(root / "teacher", layers=1))
    dense = teacher.unet()
    budget = MacBudget(0.8, teacher.config.sample_size, teacher.text_encoder.length)
    save_student(root / "pruned", teacher, dense.cut(method("magnitude")(dense, budget, None)))
    index = Index(kind="images", latent_shape=(4, 8, 8), vae=teacher.vae_fingerprint)
    writer = CacheWriter(root / "cache", index, shard_samples=4)
    for i in range(10):
        pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(i)) * 2 - 1
        writer.add(teacher.vae.moments(pixels), [f"a photo of a house {i}", "a blue star"])
    writer.finish()
    prompts = ["a red star in the style of monet", "a house in the style of monet"]
    anchors = [anchor_for(prompt, CONCEPT) for prompt in prompts]
    make_bank(teacher, prompts, anchors, 4, 0, 7.5, 2, 2, root / "bank")
    return root
