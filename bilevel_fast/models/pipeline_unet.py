"""Our UNet as a pipeline of diffusers calls its own: forward, LoRAs, saving."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bilevel_fast.base.errors import UserError
from bilevel_fast.models.conditioning import pack
from bilevel_fast.models.folder import write_unet
from bilevel_fast.models.lora import for_structure
from bilevel_fast.models.unet import UNet


def for_pipeline(unet: UNet) -> Any:
    """A UNet in the place of diffusers' `UNet2DConditionModel`: a module whose parameters are the UNet's own."""
    return _kind()(unet)


@cache
def _kind() -> type:
    """The class, which is made when it is wanted: those that it is made of are optional."""
    from diffusers.configuration_utils import ConfigMixin
    from diffusers.loaders.peft import PeftAdapterMixin
    from diffusers.models.modeling_utils import ModelMixin
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
    from diffusers.utils.peft_utils import scale_lora_layers, unscale_lora_layers

    class PipelineUNet(ModelMixin, ConfigMixin, PeftAdapterMixin):
        """A UNet in the place of diffusers' `UNet2DConditionModel`, of the same keys.

        A LoRA that was made for the dense model is cut as its weights were, which is exact; one that was made for the
        student's own shapes is taken as it is.
        """

        config_name = "config.json"
        unet: UNet

        def __init__(self, unet: UNet) -> None:
            super().__init__()
            self.__dict__["unet"] = unet
            self.__dict__["_modules"] = unet._modules  # shared: a layer that peft puts in one place is in both
            self.register_to_config(**unet.config.to_dict(), time_cond_proj_dim=None)

        @property
        def dtype(self) -> torch.dtype:
            return self.unet.conv_in.weight.dtype

        @property
        def device(self) -> torch.device:
            return self.unet.conv_in.weight.device

        def forward(
            self,
            sample: Tensor,
            timestep: Tensor | float,
            encoder_hidden_states: Tensor,
            added_cond_kwargs: Mapping[str, Tensor] | None = None,
            cross_attention_kwargs: Mapping[str, Any] | None = None,
            return_dict: bool = True,
            **conditions: Any,
        ) -> Any:
            """Predict.

            Args:
                sample: (B, C, H, W) noisy latents.
                timestep: One for all, or (B,).
                encoder_hidden_states: (B, L, D) text states.
                added_cond_kwargs: Of Stable Diffusion XL: `text_embeds` (B, P) and `time_ids` (B, 6).
                cross_attention_kwargs: `scale` of the LoRAs, and nothing else.
                return_dict: A `UNet2DConditionOutput` or a tuple of one.
                conditions: Of other networks (adapters, control); all must be None.

            Raises:
                UserError: A condition came that this UNet has no input for, or one is missing.
            """
            given = {name for name, value in conditions.items() if value is not None}
            given |= {f"cross_attention_kwargs[{name!r}]" for name in cross_attention_kwargs or {} if name != "scale"}
            wanted = {"text_embeds", "time_ids"} if self.unet.config.pooled_dim else set[str]()
            added = dict(added_cond_kwargs or {})
            given |= added.keys() - wanted if wanted else {"added_cond_kwargs"} if added else set()
            if given:
                raise UserError(f"a pruned UNet takes no {', '.join(sorted(given))}")
            if missing := wanted - added.keys():
                raise UserError(f"added_cond_kwargs lacks {', '.join(sorted(missing))}, which this UNet reads")
            text = encoder_hidden_states
            if wanted:
                text = pack(text, added["text_embeds"], added["time_ids"])
            t = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
            scale = float((cross_attention_kwargs or {}).get("scale", 1.0))
            if scale != 1:
                scale_lora_layers(self, scale)
            try:
                out = self.unet(sample, t, text).out
            finally:
                if scale != 1:
                    unscale_lora_layers(self, scale)
            return UNet2DConditionOutput(sample=out) if return_dict else (out,)

        def load_lora_adapter(
            self,
            pretrained_model_name_or_path_or_dict: Any,
            prefix: str = "unet",
            hotswap: bool = False,
            **options: Any,
        ) -> None:
            """As diffusers' own; what a pipeline has read of a file, a mapping, is made to fit this UNet first.

            Raises:
                UserError: A tensor fits neither this UNet nor the dense one.
            """
            given = pretrained_model_name_or_path_or_dict
            if isinstance(given, Mapping):
                given, options["network_alphas"] = for_structure(
                    self.unet.structure, given, options.get("network_alphas"), prefix
                )
            super().load_lora_adapter(given, prefix=prefix, hotswap=hotswap, **options)

        def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]  # a pipeline names what it passes
            self, save_directory: Path | str, **_: Any
        ) -> None:
            """Write `unet/` of a model folder, in the dtype that the weights have, for `pipeline.save_pretrained`.

            Raises:
                UserError: LoRAs are loaded, which would be lost: they are fused and unloaded first.
            """
            if getattr(self, "peft_config", None):
                raise UserError("LoRAs are loaded; call fuse_lora() and unload_lora_weights() before save_pretrained()")
            write_unet(Path(save_directory), self.unet, self.dtype)

    return PipelineUNet
