"""What a pruning method may try the teacher on: a few batches, the noise process they go through, and a seed.

Shape legend: B batch, C latent channels, H W latent size, L text tokens, D text width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bilevel_fast.base.errors import UserError
from bilevel_fast.data.batches import Batches
from bilevel_fast.data.sources import LatentSource
from bilevel_fast.models.diffusion import Noised, Schedule, noise
from bilevel_fast.models.folder import ModelFolder
from bilevel_fast.ops.randomness import Stream, normal, uniform
from bilevel_fast.pruning.budget import Calibration

FIRST = 1 << 44
"""Sample index of the first random number drawn for pruning: training and its levels stay below 1 << 43."""

IMAGES = 64
"""How many images a method tries the teacher on, unless it is told."""

_LEVEL = 2  # of `Batches`: training has 0 and 1


@dataclass(frozen=True, eq=False)
class CalibrationSet(Sequence[tuple[Tensor, Tensor]]):
    """A `Calibration` that also says how its latents are noised and with which random numbers.

    Methods take any sequence of batches; one that is no `CalibrationSet` stands for Stable Diffusion 2.1's noise
    process and seed 0.
    """

    batches: Calibration = ()
    """Scaled latents (B, C, H, W) and text states (B, L, D) of each batch."""
    schedule: Schedule = field(default_factory=Schedule.sd)
    seed: int = 0
    device: torch.device | str = "cpu"
    """Where batches are brought to as they are asked for: that of the teacher."""

    @classmethod
    def of(cls, calibration: Calibration) -> "CalibrationSet":
        return calibration if isinstance(calibration, cls) else cls(calibration)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index):
        latents, text = self.batches[index]
        return latents.to(self.device), text.to(self.device)

    def loaded(self, method: str) -> list[tuple[Tensor, Tensor]]:
        """All batches, read once.

        Raises:
            UserError: There are none. `method` is named.
        """
        if not len(self):
            raise UserError(
                f"{method} tries the teacher on data, and the calibration set is empty; "
                "bilevel_fast.prune reads one from --data CACHE"
            )
        return list(self)

    def noised(self, latents: Tensor, t: Tensor, first: int) -> Noised:
        """Noise latents (B, C, H, W) to timesteps t (B,); their noise is that of samples `first`, `first` + 1, ..."""
        device = latents.device
        eps = normal(self.seed, Stream.NOISE, range(FIRST + first, FIRST + first + len(t)), tuple(latents.shape[1:]))
        return noise(self.schedule.to(device), latents, eps.to(device), t.to(device))

    def timesteps(self, count: int) -> Tensor:
        """One timestep from each of `count` equal parts of the noise process, ascending: (count,) int64."""
        u = uniform(self.seed, Stream.TIMESTEP, range(FIRST, FIRST + count)).double()  # fp64: must not round up to 1
        return ((torch.arange(count) + u) * (self.schedule.num_train_timesteps / count)).long()


class _Drawn(Sequence[tuple[Tensor, Tensor]]):
    """The first `count` of `Batches`, made when asked for."""

    def __init__(self, batches: Batches, count: int) -> None:
        self._batches, self._count = batches, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index):  # pyright: ignore[reportIncompatibleMethodOverride]  # there are no slices
        if not 0 <= index < self._count:
            raise IndexError(index)
        batch = self._batches(index)
        return batch.latents, batch.text


def calibration_set(
    folder: ModelFolder,
    source: LatentSource | None,
    *,
    images: int = IMAGES,
    batch: int = 16,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> CalibrationSet:
    """Batches of the teacher's own kind of data, made when a method asks for them.

    Args:
        folder: The teacher's.
        source: Of images with captions; None makes an empty set.
        images: How many, at most; whole batches only, and no image twice.
        batch: Images per batch.
        seed: Of the choice of images, timesteps and noise.
        device: Where batches are wanted.

    Raises:
        UserError: `images` or `batch` is not positive.
    """
    for name, value in (("images", images), ("batch", batch)):
        if value < 1:
            raise UserError(f"{name} of the calibration set: {value}, wanted 1 or more")
    if source is None:
        return CalibrationSet((), folder.schedule, seed, device)
    images = min(images, len(source))
    batch = min(batch, images)
    drawn = _Drawn(Batches(source, folder.text_encoder, batch, seed, level=_LEVEL), images // batch)
    return CalibrationSet(drawn, folder.schedule, seed, device)


def numbered(batches: Sequence[tuple[Tensor, Tensor]], first: int = 0) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Number of its first sample, latents and text of each batch, counting samples from `first`."""
    for latents, text in batches:
        yield first, latents, text
        first += len(latents)
