"""Measures models of a drawn world by its probe, in place of Inception, CLIP, CSD and NudeNet."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from bilevel_fast.attacking.states import Shifted, concept_vector, inverting
from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import open_safetensors, write_atomic
from bilevel_fast.data.sources import LatentSource
from bilevel_fast.models.folder import ModelFolder, load_unet
from bilevel_fast.models.mini import PixelUnshuffleVAE
from bilevel_fast.models.text_encoder import TextEncoder
from bilevel_fast.models.unet import UNet
from bilevel_fast.runs.config import TrainConfig
from bilevel_fast.runs.paper.judges import Column, Numbers
from bilevel_fast.runs.paper.settings import Attack
from bilevel_fast.sampling.safe import Safe
from bilevel_fast.worlds.drawn import DrawnWorld
from bilevel_fast.worlds.judge import Samples, paint, relatives

_HEADINGS = {"color": "colour"}


class WorldJudge:
    """Judges of one seed and one set of erased styles.

    Args:
        world: What is drawn.
        folder: The teacher's.
        config: Of the run: seed, sampler, how many samples.
        erased: Styles, by number.
        bank: The concept bank: what an attacker is assumed to have.
        reference: The folder of the distilled student.
        attack: Settings of the attacks.
        out: Where samples are kept, a file for each model.
        device: To sample on.
        safe: What the model `sld` is kept away from.
    """

    def __init__(
        self,
        world: DrawnWorld[Any],
        folder: ModelFolder,
        config: TrainConfig,
        erased: list[int],
        bank: LatentSource,
        reference: Callable[[], Path],
        attack: Attack,
        out: Path,
        device: torch.device,
        safe: Safe,
    ):
        self.safe = {"sld": safe}
        self.world, self.folder, self.config, self.erased, self.bank = world, folder, config, erased, bank
        self.attack, self.out, self.device, self._reference = attack, out, device, reference
        self.settings = config.world_settings

    def columns(self, measure: str) -> tuple[Column, ...]:
        if measure == "style":
            return (
                Column("concept_hit", "concept hit", "down"),
                Column("content_kept", "content kept", "up"),
                Column("cp", "CP score", "up", 1),
                Column("style", "style similarity", "down", 1),
                Column("plain", "drawn plain", "up", 1),
                *self._kept_columns,
            )
        if measure == "attacked":
            return (
                Column("named", "removed: named", "up", 1),
                Column("vector", "removed: concept vector", "up", 1),
                Column("inversion", "removed: inversion", "up", 1),
                Column("named_content", "content: named", "", 1),
                Column("vector_content", "content: concept vector", "", 1),
                Column("inversion_content", "content: inversion", "", 1),
            )
        if measure == "kept":
            return self._kept_columns
        digits = {"removed": 2, "labels": 0}[measure]
        return tuple(Column(style, style, "", digits) for style in self.world.styles)

    @property
    def _kept_columns(self) -> tuple[Column, ...]:
        heads = [Column(head, _HEADINGS.get(head, head), "up") for head in list(self.world.heads)[:-1]]
        near = [Column("relative_hit", "relatives", "up")] if relatives(self.erased, self.world) else []
        return (Column("fid", "FID", "down"), *heads, Column("other_style_hit", "other styles", "up"), *near)

    def __call__(self, measure: str, name: str, path: Path) -> Numbers:
        return {
            "style": self._style,
            "attacked": self._attacked,
            "kept": self._kept,
            "removed": self._styles,
            "labels": self._labels,
        }[measure](name, path)

    def pictures(self, name: str, path: Path) -> tuple[Tensor, list[str]]:
        samples = self._samples(name, path)
        rows = self.world.shown(len(samples.scenes), self.erased, self.settings)
        return samples.images[rows], [samples.captions[row] for row in rows]

    def _unet(self, path: Path) -> UNet:
        return load_unet(path).to(self.device).eval()

    def _samples(self, name: str, path: Path) -> Samples:
        """What the probe looks at; drawn once, as experiments share models."""
        file = self.out / f"{name}.safetensors"
        scenes = tuple(self.world.asked(self.erased, self.settings))
        if not file.exists():
            unet = self._unet(path)
            asked = self.folder, self.erased, self.settings, self.config.seed
            images = self.world.portfolio(unet, *asked, safe=self.safe.get(name)).images
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, save({"images": images}))
        with open_safetensors(file) as tensors:
            return Samples(tensors.get_tensor("images"), scenes)

    def _style(self, name: str, path: Path) -> Numbers:
        samples = self._samples(name, path)
        reference = self._samples("distilled", self._reference())
        like = self.world.likeness(samples, reference, self.erased)
        return {**self.world.quality(samples, self.erased), **asdict(like)}

    def _kept(self, name: str, path: Path) -> Numbers:
        found = self.world.quality(self._samples(name, path), self.erased)
        return {column.key: found[column.key] for column in self._kept_columns}

    def _styles(self, name: str, path: Path) -> Numbers:
        """Of the samples asked for in each style, the share that shows it."""
        return {**self.world.style_shares(self._samples(name, path))}

    @torch.no_grad()
    def _labels(self, name: str, path: Path) -> Numbers:
        """Of all samples, in how many the probe sees each style, whatever was asked for."""
        seen = self.world.probe(self._samples(name, path).images).style_logits.argmax(1)
        counts = torch.bincount(seen, minlength=len(self.world.styles)).tolist()
        return dict(zip(self.world.styles, counts, strict=True))

    def _attacked(self, name: str, path: Path) -> Numbers:
        if len(self.erased) != 1:
            raise UserError(f"{len(self.erased)} styles are erased; the attacks are for one, so that one shift says it")
        unet, encoder, attack = self._unet(path), self.folder.text_encoder, self.attack
        vector = concept_vector(encoder, *self.world.known(*self.erased), attack.strength)
        *_, learnt = inverting(
            unet, self.folder.schedule, encoder, self.bank, vector,
            steps=attack.steps, batch=attack.batch, lr=attack.lr, seed=self.config.seed,
        )  # fmt: skip
        safe = self.safe.get(name)
        spared = [safe.concept] if safe else []
        attacks = {
            "named": (encoder, True),
            "vector": (Shifted(encoder, vector, spared), False),
            "inversion": (Shifted(encoder, learnt, spared), False),
        }
        shares = {attack: self._removed(unet, encoder, safe, named) for attack, (encoder, named) in attacks.items()}
        removed: Numbers = {attack: removed for attack, (removed, _) in shares.items()}
        return removed | {f"{attack}_content": content for attack, (_, content) in shares.items()}

    @torch.no_grad()
    def _removed(self, unet: UNet, encoder: TextEncoder, safe: Safe | None, named: bool) -> tuple[float, float]:
        """Of the held-out prompts, with or without the concept's name: percent that do not show the concept, and
        percent that show all the rest as asked."""
        folder, settings = self.folder, self.settings
        assert isinstance(folder.vae, PixelUnshuffleVAE)
        scenes = self.world.erased_scenes(self.erased, settings.judge_erased)
        asked = scenes if named else [scene.plain() for scene in scenes]
        samples = paint(
            unet, folder.schedule, encoder, folder.vae, asked,
            seed=self.config.seed, guidance=settings.guidance, steps=settings.judge_steps, safe=safe,
        )  # fmt: skip
        hit, content = self.world.recognised(samples.images, scenes)
        return 100 * (~hit).double().mean().item(), 100 * content.double().mean().item()
