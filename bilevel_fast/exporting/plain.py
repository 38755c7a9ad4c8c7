"""The UNet that a student is, said by a config of diffusers alone: for those of which whole layers were taken.

diffusers has fields for how many layers a block has, how many transformer blocks each of its Transformers, and which
mid block there is. A structure is such a UNet if every level lost as many ResNets on the way down as on the way up,
with their Transformers, so that each ResNet on the way up still reads the skip connection that it read. BK-SDM, SSD-1B,
Segmind-Vega and KOALA are; a structure that narrows anything is none.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bilevel_fast.base.errors import UserError
from bilevel_fast.models.architecture import Site, UNetConfig, sites
from bilevel_fast.models.structure import Structure
from bilevel_fast.models.unet import UNet


@dataclass(frozen=True)
class Plain:
    """A smaller dense UNet.

    Attributes:
        config: What it is made by.
        places: The modules that have another name in it: (name in the student, name in it), the longer ones first.
    """

    config: UNetConfig
    places: tuple[tuple[str, str], ...]

    def renamed(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state dict of the student, under the names of this UNet."""
        return {self._name(name): tensor for name, tensor in state.items()}

    def fields(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The student's `config.json` with the fields replaced in which this UNet is another."""
        before, after = UNetConfig.from_dict(config).to_dict(), self.config.to_dict()
        changed = {name: after.get(name) for name in before | after if before.get(name) != after.get(name)}
        return {**config, **changed}

    def _name(self, name: str) -> str:
        for old, new in self.places:
            if name.startswith(f"{old}."):
                return new + name[len(old) :]
        return name


def plain(structure: Structure) -> Plain:
    """The smaller dense UNet that this structure is.

    Raises:
        UserError: It is none; the first site that tells is named.
    """
    _refuse_widths(structure)
    return _Reader(structure).read()


def cut_widths(structure: Structure) -> dict[str, dict[str, int]]:
    """The kept units of the sites that keep fewer than all of a width vector, of these vectors."""
    found: dict[str, dict[str, int]] = {}
    for site in sites(structure.config):
        for width in site.widths if site.name not in structure.dropped else ():
            if (count := structure.count(site, width)) < width.units:
                found.setdefault(site.name, {})[width.name] = count
    return found


def _refuse_widths(structure: Structure) -> None:
    known = {site.name: site for site in sites(structure.config)}
    for name, widths in cut_widths(structure).items():
        width = next(width for width in known[name].widths if width.name in widths)
        raise UserError(f"site {name} keeps {widths[width.name]} of {width.units} units of {width.name!r}")


class _Reader:
    def __init__(self, structure: Structure) -> None:
        self.structure, self.config = structure, structure.config
        self.sites = {site.name: site for site in sites(self.config)}
        self.places: dict[str, str] = {}

    def read(self) -> Plain:
        levels = len(self.config.block_out_channels)
        down = [self._block(f"down_blocks.{i}", self.config.layers(i)) for i in range(levels)]
        up = [self._block(f"up_blocks.{i}", self.config.layers(levels - 1 - i) + 1) for i in range(levels)]
        for level in range(levels):
            self._check_skips(level, down[level][0], up[levels - 1 - level][0])
        mid, middle = self._mid()
        layers = tuple(len(resnets) for resnets, _ in down)
        config = replace(
            self.config,
            layers_per_block=layers[0] if len(set(layers)) == 1 else layers,
            down_block_types=tuple("CrossAttnDownBlock2D" if depths else "DownBlock2D" for _, depths in down),
            up_block_types=tuple("CrossAttnUpBlock2D" if depths else "UpBlock2D" for _, depths in up),
            mid_block_type=mid,
            **self._depths([depths for _, depths in down], middle, [depths for _, depths in up]),
        )
        places = sorted(self.places.items(), key=lambda pair: -len(pair[0]))
        found = Plain(config, tuple((old, new) for old, new in places if old != new))
        self._check_shapes(found)
        return found

    def _block(self, name: str, layers: int) -> tuple[list[int], list[int]]:
        """The numbers of the ResNets that a block keeps, and the transformer blocks of each of their Transformers."""
        resnets = [j for j in range(layers) if f"{name}.resnets.{j}" not in self.structure.dropped]
        if not resnets:
            raise UserError(f"site {name}.resnets.0 is dropped, and with it the last ResNet of its block")
        for new, old in enumerate(resnets):
            self.places[f"{name}.resnets.{old}"] = f"{name}.resnets.{new}"
        have = [j for j in range(layers) if f"{name}.attentions.{j}" in self.sites]
        kept = [j for j in have if f"{name}.attentions.{j}" not in self.structure.dropped]
        if kept and kept != resnets:
            odd = min(set(kept) ^ set(resnets))
            what = "dropped, and its ResNet is not" if odd in resnets else "kept, and its ResNet is dropped"
            raise UserError(f"site {name}.attentions.{odd} is {what}")
        return resnets, [self._attention(name, old, new) for new, old in enumerate(kept)]

    def _attention(self, block: str, old: int, new: int) -> int:
        """Transformer blocks of a Transformer that stays."""
        name, there = f"{block}.attentions.{old}", f"{block}.attentions.{new}"
        self.places[name] = there
        if self.sites[name].widths:
            return 1
        members = [site.name for site in self.sites.values() if site.within == name]
        left = [member for member in members if member not in self.structure.dropped]
        for number, member in enumerate(left):
            self.places[member] = f"{there}.transformer_blocks.{number}"
        return len(left)

    def _check_skips(self, level: int, down: list[int], up: list[int]) -> None:
        """Each ResNet on the way up must read what the one that diffusers gives its number reads.

        The way down hands on the output of every layer, that of a dropped one being that of the layer before it; -1 is
        the input of the block. The way up reads them in reverse.
        """
        layers = self.config.layers(level)
        handed = [max((j for j in down if j <= place), default=-1) for place in range(layers)]
        read = [[*handed[::-1], -1][j] for j in up]
        wanted = [*down[::-1], -1]
        block = f"up_blocks.{len(self.config.block_out_channels) - 1 - level}"
        if len(read) != len(wanted):
            raise UserError(
                f"site {block}.resnets.{up[-1]} is one of {len(up)} ResNets that are left, and down_blocks.{level} has "
                f"{len(down)}: diffusers has one more on the way up"
            )
        for number, (one, other) in zip(up, zip(read, wanted, strict=True), strict=True):
            if one != other:
                name = f"{block}.resnets.{number}"
                raise UserError(f"site {name} would read the skip connection of another layer of down_blocks.{level}")

    def _mid(self) -> tuple[str | None, int | None]:
        """The kind of the mid block that is left, and the transformer blocks of its Transformer."""
        if self.config.mid_block_type is None:
            return None, None
        members = [name for name in self.sites if self.sites[name].block == "mid_block"]
        kept = [name for name in members if name not in self.structure.dropped]
        resnets = [name for name in kept if self.sites[name].kind == "resnet"]
        attends = "mid_block.attentions.0" in kept
        if not kept:
            return None, None
        if len(resnets) == 1 and not attends:
            self.places[resnets[0]] = "mid_block.resnets.0"
            return "UNetMidBlock2D", None
        if len(resnets) == 2 and attends:
            return "UNetMidBlock2DCrossAttn", self._attention("mid_block", 0, 0)
        gone = next(name for name in members if name in self.structure.dropped)
        raise UserError(f"site {gone} is dropped, and of the mid block neither all nor one ResNet nor nothing is left")

    def _depths(self, down: list[list[int]], mid: int | None, up: list[list[int]]) -> dict[str, Any]:
        """The two fields that say how many transformer blocks there are."""
        levels, given = len(down), self.config.transformer_layers_per_block
        each = [given if isinstance(given, int) else given[level] for level in range(levels)]
        seen = [{*down[level], *up[levels - 1 - level]} for level in range(levels)]
        if mid is not None:
            seen[-1].add(mid)
        if all(len(found) <= 1 for found in seen):
            old = [number if isinstance(number, int) else 1 for number in each]
            simple = [max(found, default=number) for found, number in zip(seen, old, strict=True)]
            depths: Any = simple[0] if len(set(simple)) == 1 else tuple(simple)
            return {"transformer_layers_per_block": depths, "reverse_transformer_layers_per_block": None}
        if mid is not None and down[-1] and down[-1][0] != mid:
            raise UserError(
                f"site mid_block.attentions.0 keeps {mid} transformer blocks, down_blocks.{levels - 1}.attentions.0 "
                f"{down[-1][0]}, and diffusers has one number for both"
            )
        nested = [tuple(depths) or 1 for depths in down]
        if mid is not None and not down[-1]:
            nested[-1] = mid
        return {
            "transformer_layers_per_block": tuple(nested),
            "reverse_transformer_layers_per_block": tuple(tuple(depths) or 1 for depths in up),
        }

    def _check_shapes(self, found: Plain) -> None:
        with torch.device("meta"):
            student, other = UNet(self.config, self.structure).state_dict(), UNet(found.config).state_dict()
        names = {found._name(name): name for name in student}
        for name, tensor in other.items():
            if name not in names or student[names[name]].shape != tensor.shape:
                raise UserError(f"site {_site(names.get(name, name), self.sites)} has other channels than its place")
        assert len(names) == len(other)


def _site(name: str, known: Mapping[str, Site]) -> str:
    return next((site for site in known if name.startswith(f"{site}.")), name)
