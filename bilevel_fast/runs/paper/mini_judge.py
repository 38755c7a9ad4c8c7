"""Measures models of the mini world by its probe, in place of Inception, CLIP, CSD and NudeNet."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import open_safetensors, write_atomic
from bilevel_fast.data.bank import Concept, anchor_for
from bilevel_fast.data.sources import LatentSource
from bilevel_fast.models.folder import ModelFolder, load_unet
from bilevel_fast.models.mini import PixelUnshuffleVAE
from bilevel_fast.models.text_encoder import TextEncoder
from bilevel_fast.models.unet import UNet
from bilevel_fast.runs.config import TrainConfig
from bilevel_fast.runs.paper.attacks import Shifted, concept_vector, inverting
from bilevel_fast.runs.paper.judges import Column, Numbers
from bilevel_fast.runs.paper.settings import Attack
from bilevel_fast.sampling.safe import Safe
from bilevel_fast.worlds.mini import materials as mini
from bilevel_fast.worlds.mini.judge import Samples, erased_scenes, is_held_out, judge, paint
from bilevel_fast.worlds.mini.likeness import likeness
from bilevel_fast.worlds.mini.probe import Probe
from bilevel_fast.worlds.mini.world import SCENES, STYLES

_KEPT = (
    Column("fid", "FID", "down"),
    Column("object", "object", "up"),
    Column("color", "colour", "up"),
    Column("other_style_hit", "other styles", "up"),
)
_COLUMNS = {
    "style": (
        Column("concept_hit", "concept hit", "down"),
        Column("content_kept", "content kept", "up"),
        Column("cp", "CP score", "up", 1),
        Column("style", "style similarity", "down", 1),
        Column("plain", "drawn plain", "up", 1),
        *_KEPT,
    ),
    "attacked": (
        Column("named", "removed: named", "up", 1),
        Column("vector", "removed: concept vector", "up", 1),
        Column("inversion", "removed: inversion", "up", 1),
    ),
    "kept": _KEPT,
    "removed": tuple(Column(style, style) for style in STYLES),
    "labels": tuple(Column(style, style, "", 0) for style in STYLES),
}


class MiniJudge:
    """Judges of one seed and one set of erased styles.

    Args:
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
        self.folder, self.config, self.erased, self.bank = folder, config, erased, bank
        self.attack, self.out, self.device, self.probe, self._reference = attack, out, device, Probe.load(), reference

    def columns(self, measure: str) -> tuple[Column, ...]:
        return _COLUMNS[measure]

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
        rows = mini.shown(len(samples.scenes), self.erased, self.config.mini)
        return samples.images[rows], [samples.captions[row] for row in rows]

    def _unet(self, path: Path) -> UNet:
        return load_unet(path).to(self.device).eval()

    def _samples(self, name: str, path: Path) -> Samples:
        """What the probe looks at; drawn once, as experiments share models."""
        file = self.out / f"{name}.safetensors"
        scenes = tuple(mini.asked(self.erased, self.config.mini))
        if not file.exists():
            images = mini.kept_away(
                self._unet(path), self.folder, self.erased, self.config.mini, self.config.seed, self.safe.get(name)
            ).images
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, save({"images": images}))
        with open_safetensors(file) as tensors:
            return Samples(tensors.get_tensor("images"), scenes)

    def _style(self, name: str, path: Path) -> Numbers:
        samples = self._samples(name, path)
        reference = self._samples("distilled", self._reference())
        like = likeness(samples, reference, self.erased, self.probe)
        return {**asdict(judge(samples, self.erased, self.probe)), **asdict(like)}

    def _kept(self, name: str, path: Path) -> Numbers:
        found = asdict(judge(self._samples(name, path), self.erased, self.probe))
        return {column.key: found[column.key] for column in _KEPT}

    @torch.no_grad()
    def _styles(self, name: str, path: Path) -> Numbers:
        """Of the samples asked for in each style, the share that shows it."""
        samples = self._samples(name, path)
        seen = self.probe(samples.images).style_logits.argmax(1)
        asked = torch.tensor([scene.style for scene in samples.scenes])
        return {style: (seen[asked == i] == i).double().mean().item() for i, style in enumerate(STYLES)}

    @torch.no_grad()
    def _labels(self, name: str, path: Path) -> Numbers:
        """Of all samples, in how many the probe sees each style, whatever was asked for."""
        seen = self.probe(self._samples(name, path).images).style_logits.argmax(1)
        counts = torch.bincount(seen, minlength=len(STYLES)).tolist()
        return dict(zip(STYLES, counts, strict=True))

    def _attacked(self, name: str, path: Path) -> Numbers:
        if len(self.erased) != 1:
            raise UserError(f"{len(self.erased)} styles are erased; the attacks are for one, so that one shift says it")
        unet, encoder, attack = self._unet(path), self.folder.text_encoder, self.attack
        concept = Concept(f"in the style of {STYLES[self.erased[0]]}")
        known = [s.caption for s in SCENES if s.style in self.erased and not is_held_out(s)]
        vector = concept_vector(encoder, known, [anchor_for(c, concept) for c in known], attack.strength)
        *_, learnt = inverting(
            unet, self.folder.schedule, encoder, self.bank, vector,
            steps=attack.steps, batch=attack.batch, lr=attack.lr, seed=self.config.seed,
        )  # fmt: skip
        safe = self.safe.get(name)
        spared = [safe.concept] if safe else []
        return {
            "named": self._removed(unet, encoder, safe, named=True),
            "vector": self._removed(unet, Shifted(encoder, vector, spared), safe, named=False),
            "inversion": self._removed(unet, Shifted(encoder, learnt, spared), safe, named=False),
        }

    @torch.no_grad()
    def _removed(self, unet: UNet, encoder: TextEncoder, safe: Safe | None, named: bool) -> float:
        """Percent of the held-out prompts, with or without the concept's name, that do not show the concept."""
        folder, settings = self.folder, self.config.mini
        assert isinstance(folder.vae, PixelUnshuffleVAE)
        scenes = erased_scenes(self.erased, settings.judge_erased)
        asked = scenes if named else [replace(scene, style=0) for scene in scenes]
        samples = paint(
            unet, folder.schedule, encoder, folder.vae, asked,
            seed=self.config.seed, guidance=settings.guidance, steps=settings.judge_steps, safe=safe,
        )  # fmt: skip
        seen = self.probe(samples.images).style_logits.argmax(1)
        return 100 * (seen != self.erased[0]).double().mean().item()
