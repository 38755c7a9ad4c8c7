"""A pruned UNet of Stable Diffusion in diffusers: its UNet2DConditionModel with fewer channels, heads and layers.

    DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)

Nothing is computed here. diffusers builds the dense UNet, and narrower modules of diffusers take the places of those
that were pruned; whatever works with its UNet works with this one. `pruned` in config.json says which:

    {"narrow": {NAME: {"channels": 80, "groups": 8} or {"heads": 3} or {"channels": 320}}, "dropped": [NAME, ...]}

NAME is that of a ResNet, an attention or a feed-forward; dropped are ResNets, Transformers and transformer blocks.
"""

import inspect
from typing import Any

from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn


class PrunedUNet(UNet2DConditionModel):
    """A UNet2DConditionModel of which only a part is there; all arguments but `pruned` are those of the dense one."""

    def __init__(self, pruned: dict[str, Any], **dense: Any) -> None:
        super().__init__(**dense)
        for name, size in pruned["narrow"].items():
            self.set_submodule(name, _narrow(self.get_submodule(name), size))
        for name in pruned["dropped"]:
            self.set_submodule(name, _Dropped(self.get_submodule(name)))
        self.register_to_config(pruned=pruned)


# diffusers reads the names of arguments off the signature, and takes those from config.json
_names = list(inspect.signature(UNet2DConditionModel.__init__).parameters.values())
_names.append(inspect.Parameter("pruned", inspect.Parameter.KEYWORD_ONLY))
PrunedUNet.__init__.__signature__ = inspect.Signature(_names)  # pyright: ignore[reportFunctionMemberAccess]


def _narrow(old: nn.Module, size: dict[str, int]) -> nn.Module:
    if isinstance(old, ResnetBlock2D):
        assert old.time_emb_proj is not None
        return ResnetBlock2D(
            in_channels=old.in_channels,
            out_channels=size["channels"],
            conv_2d_out_channels=old.out_channels,
            temb_channels=old.time_emb_proj.in_features,
            groups=old.norm1.num_groups,
            groups_out=size["groups"],
            eps=old.norm1.eps,
        )
    if isinstance(old, Attention):
        assert old.to_k is not None
        return Attention(
            old.to_q.in_features,
            old.to_k.in_features if old.is_cross_attention else None,
            heads=size["heads"],
            dim_head=old.to_q.out_features // old.heads,
            upcast_attention=old.upcast_attention,
        )
    if isinstance(old, FeedForward):
        last = old.net[2]
        assert isinstance(last, nn.Linear)
        return FeedForward(last.out_features, inner_dim=size["channels"])
    raise ValueError(f"pruned: a {type(old).__name__} cannot be narrowed")


class _Dropped(nn.Module):
    """Stands where a module was dropped: hands its input on, in the shape that the module's result has."""

    def __init__(self, old: nn.Module) -> None:
        super().__init__()
        self.channels = old.out_channels if isinstance(old, ResnetBlock2D) else None  # behind them: the skip connection
        self.tuple = isinstance(old, Transformer2DModel)

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor | tuple[Tensor]:
        if self.channels is not None:
            return hidden_states[:, : self.channels]
        return (hidden_states,) if self.tuple else hidden_states
