"""What is kept of a UNet: the kept units of every width vector, and the sites that are dropped.

A `Structure` is the result of every pruning method and the only thing the student UNet, the MAC counter and the
weight slicing need to know about it. Units are GroupNorm groups of a ResNet's inner channels, attention heads and
FFN groups (APTP, arXiv:2406.12042, section 3); widths outside the sites never change, so teacher and student
features keep the same shapes.

A transformer block that is a site (Stable Diffusion XL) stands within its Transformer: where that is dropped, all of
its blocks are.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bilevel_fast.base.errors import UserError, nearest
from bilevel_fast.base.files import clip, read_json, write_atomic
from bilevel_fast.models.architecture import Cut, Site, UNetConfig, Width, sites, with_blocks

FORMAT = "bilevel_fast.structure"  # of files, whatever this module is called
VERSIONS = (1, 2)
"""1 is of UNets that say nothing which Stable Diffusion 1.x / 2.x leave unsaid; 2 has the sites of all others."""


@dataclass(frozen=True)
class Structure:
    """Frozen record of what is kept.

    Attributes:
        config: The dense UNet.
        kept: For each site that is not dropped, kept unit indices per width vector, ascending, at least one:
            `kept["down_blocks.0.resnets.0"]["groups"] == (0, 1, 5)`.
        dropped: Names of the dropped sites.

    Raises:
        UserError: A site or width vector is unknown, missing, empty, unordered or out of range, or a site that
            changes the number of channels is dropped. The message names the site.
    """

    config: UNetConfig
    kept: Mapping[str, Mapping[str, tuple[int, ...]]]
    dropped: frozenset[str] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        known = {site.name: site for site in sites(self.config)}
        for name in (*self.kept, *self.dropped):
            if name not in known:
                raise UserError(f"structure: no site {name!r} in this UNet{nearest(name, known)}")
        for name, site in known.items():
            if name in self.dropped:
                if name in self.kept:
                    raise UserError(f"structure: site {name} is both kept and dropped")
                if not site.droppable:
                    raise UserError(f"structure: site {name} cannot be dropped, it changes the number of channels")
            elif site.within in self.dropped:
                raise UserError(f"structure: site {name} is kept, and {site.within}, which it is a part of, is dropped")
            elif name not in self.kept:
                raise UserError(f"structure: site {name} is missing")
            else:
                _check_widths(site, self.kept[name])

    @classmethod
    def dense(cls, config: UNetConfig) -> "Structure":
        """Everything is kept."""
        return cls.uniform(config, 1.0)

    @classmethod
    def uniform(cls, config: UNetConfig, keep: float, drop: Iterable[str] = ()) -> "Structure":
        """The first max(1, floor(keep * w)) units of every width vector of w units; the sites in `drop` removed, with
        all that is within them.

        Raises:
            UserError: `keep` is outside (0, 1], or a name in `drop` is not a droppable site.
        """
        if not 0.0 < keep <= 1.0:
            raise UserError(f"keep is {keep}, wanted 0 < keep <= 1")
        dropped = with_blocks(config, frozenset(drop))
        kept = {
            site.name: {w.name: tuple(range(max(1, int(keep * w.units + 1e-9)))) for w in site.widths}
            for site in sites(config)
            if site.name not in dropped
        }
        return cls(config, kept, dropped)

    @property
    def is_dense(self) -> bool:
        return not self.dropped and all(
            len(self.kept[site.name][w.name]) == w.units for site in sites(self.config) for w in site.widths
        )

    def count(self, site: Site, width: Width) -> int:
        """Number of kept units of one width vector; 0 where the site is dropped."""
        return 0 if site.name in self.dropped else len(self.kept[site.name][width.name])

    # --- weights ---

    def slice(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Cut the weights of the dense UNet down to this structure, as APTP slices an expert.

        Exact for heads, FFN groups and dropped sites: the result equals the dense model with those units set to
        zero. For ResNet groups it equals masking *after* GroupNorm and SiLU; masking before them, as APTP's gates
        do, would let SiLU(beta) of the masked groups flow on.

        Args:
            state: State dict of the dense UNet, with diffusers' keys.

        Returns:
            A new state dict; untouched tensors are the same objects.

        Raises:
            UserError: A tensor is missing or has another size than the dense UNet's.
        """
        return dict(self.sliced(state))

    def cuts(self) -> dict[str, list[tuple[Cut, Width, tuple[int, ...]]]]:
        """For each tensor of the dense UNet that is narrowed, by its key: along which axis, and the units that stay."""
        found = dict[str, list[tuple[Cut, Width, tuple[int, ...]]]]()
        for site in sites(self.config):
            for width in site.widths if site.name not in self.dropped else ():
                units = self.kept[site.name][width.name]
                for cut in width.cuts if len(units) < width.units else ():
                    found.setdefault(f"{site.name}.{cut.tensor}", []).append((cut, width, units))
        return found

    def drops(self, name: str) -> bool:
        """Whether a tensor or a module, by its name in the dense UNet, is within a site that is dropped."""
        parts = name.split(".")
        return any(".".join(parts[:count]) in self.dropped for count in range(1, len(parts)))

    def sliced(self, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """As `slice`, tensor by tensor: who needs one at a time holds no more."""
        cuts = self.cuts()
        for name in cuts:
            if name not in state:
                raise UserError(f"weights: {name} is missing, wanted the dense UNet")
        for name, tensor in state.items():
            if self.drops(name):
                continue
            for cut, width, units in cuts.get(name, ()):
                size, wanted = tensor.shape[cut.axis], width.units * width.unit_size * cut.copies
                if size != wanted:
                    raise UserError(f"weights: {name} has size {size} on axis {cut.axis}, the dense UNet {wanted}")
                index = channel_index(units, width, cut.copies)
                tensor = tensor.index_select(cut.axis, index.to(tensor.device))
            yield name, tensor

    # --- file ---

    def to_dict(self) -> dict[str, Any]:
        kept = {name: {w: list(units) for w, units in widths.items()} for name, widths in self.kept.items()}
        return {
            "format": FORMAT,
            "version": VERSIONS[0] if self.config.is_plain else VERSIONS[1],
            "config": self.config.to_dict(),
            "kept": kept,
            "dropped": sorted(self.dropped),
        }

    def save(self, path: Path) -> None:
        """Write `structure.json`, atomically."""
        write_atomic(path, json.dumps(self.to_dict()).encode())

    @classmethod
    def load(cls, path: Path) -> "Structure":
        """Read `structure.json`.

        Raises:
            UserError: The file is missing, not ours, of a newer version, or invalid; file, site and reason are named.
        """
        fields = read_json(path)
        if fields.get("format") != FORMAT:
            raise UserError(f"{path} is not a structure file; wanted format {FORMAT!r}")
        if fields.get("version") not in VERSIONS:
            known = " and ".join(map(str, VERSIONS))
            raise UserError(f"{path} has version {clip(fields.get('version'))}, this release reads {known}")
        try:
            config = UNetConfig.from_dict(fields["config"], "config")
            kept = {name: {w: tuple(u) for w, u in widths.items()} for name, widths in fields["kept"].items()}
            dropped = fields["dropped"]
            if type(dropped) is not list:
                raise TypeError(f"dropped is {clip(dropped)}, wanted a list")
            return cls(config, kept, frozenset(dropped))
        except KeyError as error:
            raise UserError(f"{path}: field {error} is missing") from error
        except (AttributeError, TypeError) as error:
            raise UserError(f"{path}: kept, dropped or config is not what a structure holds ({error})") from error
        except UserError as error:
            raise UserError(f"{path}: {error}") from error


def channel_index(units: Sequence[int], width: Width, copies: int = 1) -> Tensor:
    """Channel numbers of the kept units, (copies * len(units) * unit_size,) int64, ascending."""
    channels = torch.tensor(units)[:, None] * width.unit_size + torch.arange(width.unit_size)
    return (torch.arange(copies)[:, None] * (width.units * width.unit_size) + channels.flatten()).flatten()


def _check_widths(site: Site, widths: Mapping[str, tuple[int, ...]]) -> None:
    wanted = {w.name: w for w in site.widths}
    for name in widths:
        if name not in wanted:
            raise UserError(f"structure: site {site.name} has no width vector {name!r}{nearest(name, wanted)}")
    for name, width in wanted.items():
        if name not in widths:
            raise UserError(f"structure: site {site.name} lacks width vector {name!r}")
        units = widths[name]
        if not units:
            raise UserError(f"structure: site {site.name} keeps nothing of {name!r}, wanted at least one unit")
        if any(type(u) is not int or not 0 <= u < width.units for u in units):
            raise UserError(f"structure: site {site.name}, {name!r}: units must be integers in 0..{width.units - 1}")
        if any(b <= a for a, b in itertools.pairwise(units)):
            raise UserError(f"structure: site {site.name}, {name!r}: units must be ascending, without repeats")
