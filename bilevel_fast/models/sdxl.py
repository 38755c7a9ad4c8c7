"""The UNets of Stable Diffusion XL (arXiv:2307.01952) and of the published models that were cut from it.

                 transformer blocks of each Transformer                    parameters of the UNet
                 down, outermost first   mid      up, innermost first
    SDXL         2 2 | 10 10             10       10 10 10 | 2 2 2         2,567,463,684
    SSD-1B       2 2 | 4 4               none     4 4 10 | 2 1 1           1,331,334,404    arXiv:2401.02677
    Segmind-Vega 1 1 | 2 2               none     2 2 2 | 1 1 1              745,225,604    arXiv:2401.02677
    KOALA-1B     2 | 6                   6        6 6 | 2 2                1,161,184,324    arXiv:2312.04005
    KOALA-700M   2 | 5                   absent   5 5 | 2 2                  782,822,724    arXiv:2312.04005

The outermost level has no Transformers. `none`: of the mid block a single ResNet is left. KOALA has one ResNet less in
every block. Each is what `config.json` of the published model says.
"""

from dataclasses import replace

from bilevel_fast.models.unet_config import UNetConfig

SDXL = UNetConfig(
    sample_size=128,
    in_channels=4,
    out_channels=4,
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    num_heads=(5, 10, 20),
    cross_attention_dim=2048,
    transformer_layers_per_block=(1, 2, 10),
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
SSD_1B = replace(
    SDXL,
    mid_block_type="UNetMidBlock2D",
    transformer_layers_per_block=(0, (2, 2), (4, 4)),
    reverse_transformer_layers_per_block=((4, 4, 10), (2, 1, 1), 1),
)
VEGA = replace(
    SDXL,
    mid_block_type="UNetMidBlock2D",
    transformer_layers_per_block=(0, (1, 1), (2, 2)),
    reverse_transformer_layers_per_block=((2, 2, 2), (1, 1, 1), 1),
)
KOALA_1B = replace(SDXL, layers_per_block=1, transformer_layers_per_block=(1, 2, 6))
KOALA_700M = replace(SDXL, layers_per_block=1, transformer_layers_per_block=(1, 2, 5), mid_block_type=None)

SDXL_FAMILY = {"sdxl": SDXL, "ssd-1b": SSD_1B, "vega": VEGA, "koala-1b": KOALA_1B, "koala-700m": KOALA_700M}
"""By the name that benchmarks and `prune` take."""
