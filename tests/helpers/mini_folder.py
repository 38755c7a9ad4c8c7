"""A small random model of the mini world, in the layout of a model folder."""

from dataclasses import replace
from pathlib import Path

import torch

from bilevel_fast.base.files import write_json
from bilevel_fast.models.architecture import MINI, UNetConfig
from bilevel_fast.models.diffusion import Schedule
from bilevel_fast.models.family import MINI_INDEX
from bilevel_fast.models.folder import write_unet
from bilevel_fast.models.mini import MiniTextEncoder, PixelUnshuffleVAE, WordTokenizer
from bilevel_fast.models.unet import UNet
from bilevel_fast.worlds.mini.world import WORDS

TINY = replace(MINI, sample_size=8, block_out_channels=(16, 32, 32), num_heads=(2, 4, 4), norm_num_groups=8)
TRAINED = replace(
    MINI, block_out_channels=(16, 32), num_heads=(2, 4), norm_num_groups=8,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)  # fmt: skip
"""What the mini world's students are trained from where nobody looks at what they draw: every kind of block, once."""


def make_mini_folder(path: Path, seed: int = 0, config: UNetConfig = TINY) -> Path:
    """Write a model folder and return its path; the same seed writes the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        write_unet(path / "unet", UNet(config))
        MiniTextEncoder(WordTokenizer(WORDS), width=config.cross_attention_dim).save(path)
    PixelUnshuffleVAE().save(path / "vae")
    (path / "scheduler").mkdir()
    write_json(path / "scheduler" / "scheduler_config.json", Schedule.sd().to_dict())
    write_json(path / "model_index.json", MINI_INDEX)
    return path
