"""The forward process: noise schedule, noised latents, what the network is asked for, and SNR weights.

    x_t = alpha_t x_0 + sigma_t eps           alpha = sqrt(abar), sigma = sqrt(1 - abar)
    v   = alpha_t eps - sigma_t x_0           so  x_0 = alpha x_t - sigma v,  eps = alpha v + sigma x_t

Shape legend: B batch, C H W latent, T timesteps of the schedule. Arithmetic is fp32 whatever comes in.
Nothing here reads a tensor back to the host, so a training step never waits for the device.

Sources: DDPM, arXiv:2006.11239, eq. 4; v-prediction, arXiv:2202.00512, appendix D; Min-SNR, arXiv:2303.09556.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from bilevel_fast.base.errors import UserError, nearest
from bilevel_fast.base.files import clip, read_json, whole
from bilevel_fast.base.limits import TIMESTEPS

PredictionType = Literal["v_prediction", "epsilon"]
Quantity = Literal["v_prediction", "epsilon", "sample"]

# Fields of a diffusers scheduler config that change the noise process or the sampling grid: the one value
# that is implemented, and what diffusers assumes when the field is missing.
_REQUIRED = {
    "beta_schedule": ("scaled_linear", "linear"),
    "trained_betas": (None, None),
    "rescale_betas_zero_snr": (False, False),
    "timestep_spacing": ("leading", "leading"),
    "clip_sample": (False, False),
    "thresholding": (False, False),
}


@dataclass(frozen=True, eq=False)
class Schedule:
    """A discrete, variance-preserving noise process; betas linear in their square roots ("scaled_linear")."""

    alphas_cumprod: Tensor  # (T,) fp32
    beta_start: float
    beta_end: float
    prediction_type: PredictionType
    steps_offset: int
    """Added to every timestep of a sampling grid."""
    set_alpha_to_one: bool
    """Whether the last sampling step ends at abar = 1 instead of abar_0."""

    @property
    def num_train_timesteps(self) -> int:
        return self.alphas_cumprod.shape[0]

    @classmethod
    def scaled_linear(
        cls,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        num_train_timesteps: int = 1000,
        prediction_type: PredictionType = "v_prediction",
        steps_offset: int = 1,
        set_alpha_to_one: bool = False,
    ) -> "Schedule":
        """Build the schedule on the CPU in fp32, operation for operation as diffusers does: same bits."""
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float32) ** 2
        alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)
        return cls(alphas_cumprod, beta_start, beta_end, prediction_type, steps_offset, set_alpha_to_one)

    @classmethod
    def sd(cls, prediction_type: PredictionType = "v_prediction") -> "Schedule":
        """The schedule of Stable Diffusion 2.1; with `epsilon`, that of 1.5."""
        return cls.scaled_linear(prediction_type=prediction_type)

    @classmethod
    def load(cls, folder: Path | str) -> "Schedule":
        """Read `scheduler/scheduler_config.json` of a model folder in the diffusers layout.

        Missing fields mean what they mean to diffusers; fields that concern other samplers are ignored.

        Raises:
            UserError: The file is missing or malformed, or asks for a process that is not implemented.
        """
        path = Path(folder) / "scheduler" / "scheduler_config.json"
        return cls._from_config(read_json(path), path)

    @classmethod
    def _from_config(cls, config: dict[str, Any], path: Path) -> "Schedule":
        # Two defaults differ within diffusers: DDIM clips x_0 and ends at abar = 1, PNDM does neither.
        ddim = config.get("_class_name") == "DDIMScheduler"
        for field, (wanted, default) in _REQUIRED.items():
            came = config.get(field, ddim if field == "clip_sample" else default)
            if came != wanted:
                how = "" if field in config else " by default"
                raise UserError(f"{path}: {field} is {clip(came)}{how}; only {wanted!r} is supported")

        def read(field: str, kind: type, default: Any) -> Any:
            came = config.get(field, default)
            if type(came) is not kind:
                raise UserError(f"{path}: {field} is {clip(came)}, not of type {kind.__name__}")
            return came

        prediction_type = read("prediction_type", str, "epsilon")
        if prediction_type not in (known := get_args(PredictionType)):
            hint = nearest(prediction_type, known)
            raise UserError(f"{path}: prediction_type {prediction_type!r} is not supported{hint}")
        start, end = read("beta_start", float, 0.0001), read("beta_end", float, 0.02)
        if not 0 < start <= end < 1:
            raise UserError(f"{path}: 0 < beta_start {start} <= beta_end {end} < 1 does not hold")
        timesteps = whole(read("num_train_timesteps", int, 1000), f"{path}: num_train_timesteps", 1, TIMESTEPS)
        offset = read("steps_offset", int, 0)
        if not 0 <= offset < timesteps:
            raise UserError(f"{path}: steps_offset {offset} is not in [0, {timesteps}), the timesteps")
        to_one = read("set_alpha_to_one", bool, ddim)
        return cls.scaled_linear(start, end, timesteps, prediction_type, offset, to_one)

    def to_dict(self) -> dict[str, Any]:
        """The scheduler_config.json that `load`, and diffusers, read back as this schedule."""
        return {
            "_class_name": "PNDMScheduler",
            "beta_start": self.beta_start,
            "beta_end": self.beta_end,
            "num_train_timesteps": self.num_train_timesteps,
            "prediction_type": self.prediction_type,
            "steps_offset": self.steps_offset,
            "set_alpha_to_one": self.set_alpha_to_one,
            "skip_prk_steps": True,
            **{field: wanted for field, (wanted, _) in _REQUIRED.items()},
        }

    def to(self, device: torch.device | str) -> "Schedule":
        """The same schedule with its table on `device`."""
        return replace(self, alphas_cumprod=self.alphas_cumprod.to(device))

    def alpha_sigma(self, t: Tensor, ndim: int = 4) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t of t (B,) int64, fp32, shaped (B, 1, ...) with `ndim` dimensions."""
        abar = self.alphas_cumprod[t].reshape(-1, *(1,) * (ndim - 1))
        return abar.sqrt(), (1.0 - abar).sqrt()


@dataclass(frozen=True, eq=False)
class Noised:
    """Noised latents, and what the network should say about them. All fp32 but t."""

    x: Tensor  # (B, C, H, W) noised latents
    t: Tensor  # (B,) int64
    target: Tensor  # (B, C, H, W) v, or eps for an epsilon model
    weight: Tensor  # (B,) SNR weight of the sample's squared error


def noise(
    schedule: Schedule,
    latents: Tensor,
    eps: Tensor,
    t: Tensor,
    snr_gamma: float | None = 5.0,
) -> Noised:
    """Noise clean latents to timestep t, with the training target and weight of each sample.

    Args:
        schedule: With its table on the device of the latents.
        latents: (B, C, H, W) x_0, scaled, any float dtype.
        eps: (B, C, H, W) standard normal noise.
        t: (B,) int64 in [0, T). Not range-checked, which would cost a device synchronisation.
        snr_gamma: See `snr_weight`.

    Raises:
        ValueError: latents and eps, or their batch and t, differ in shape.
    """
    if latents.shape != eps.shape:
        raise ValueError(f"latents {tuple(latents.shape)} and eps {tuple(eps.shape)} differ in shape")
    if t.shape != latents.shape[:1]:
        raise ValueError(f"t {tuple(t.shape)} does not match the batch of latents {tuple(latents.shape)}")
    x0, eps = latents.float(), eps.float()
    alpha, sigma = schedule.alpha_sigma(t, x0.ndim)
    target = alpha * eps - sigma * x0 if schedule.prediction_type == "v_prediction" else eps
    return Noised(alpha * x0 + sigma * eps, t, target, snr_weight(schedule, t, snr_gamma))


def snr_weight(schedule: Schedule, t: Tensor, gamma: float | None = 5.0) -> Tensor:
    """The weight (B,) fp32 of each sample's squared error.

    With SNR = abar / (1 - abar), so that SNR + 1 = 1 / (1 - abar):

    v-prediction  min(SNR + 1, gamma) / (SNR + 1) = min(1, gamma (1 - abar))
    epsilon       min(SNR, gamma) / SNR           = min(1, gamma (1 - abar) / abar)

    For v-prediction this is what the trainer of arXiv:2412.15341 computes: at gamma 5 it tames t < 170 only, and
    averages 0.908 over t, where Min-SNR's own form, min(SNR, gamma) / (SNR + 1), averages 0.294. For epsilon it is
    Min-SNR's.

    Args:
        schedule: Gives abar and the prediction type.
        t: (B,) int64 in [0, T).
        gamma: Where the SNR is clipped; None weighs all samples 1.

    Raises:
        UserError: gamma is not positive.
    """
    if gamma is None:
        return torch.ones_like(t, dtype=torch.float32)
    if not gamma > 0:
        raise UserError(f"snr_gamma is {gamma}; it must be positive, or None for no weighting")
    abar = schedule.alphas_cumprod[t]
    clipped = gamma * (1.0 - abar)
    if schedule.prediction_type == "epsilon":
        return (clipped / abar).clamp(max=1.0)
    return clipped.clamp(max=1.0)


def convert(
    schedule: Schedule, value: Tensor, x: Tensor, t: Tensor, into: Quantity, given: Quantity | None = None
) -> Tensor:
    """Express a statement about x_t as another one of v, eps and x_0. Returns fp32.

    Args:
        schedule: With its table on the device of t.
        value: (B, C, H, W) the quantity `given`.
        x: (B, C, H, W) x_t.
        t: (B,) int64, or () for one timestep throughout.
        into: Which quantity to return.
        given: Which quantity `value` is; by default what the schedule's network predicts.
    """
    given = given or schedule.prediction_type
    value, x = value.float(), x.float()
    if given == into:
        return value
    alpha, sigma = schedule.alpha_sigma(t, x.ndim)
    if given == "v_prediction":
        return alpha * x - sigma * value if into == "sample" else alpha * value + sigma * x
    if given == "epsilon":
        x0, eps = (x - sigma * value) / alpha, value
    else:
        x0, eps = value, (x - alpha * value) / sigma
    if into == "v_prediction":
        return alpha * eps - sigma * x0
    return x0 if into == "sample" else eps
