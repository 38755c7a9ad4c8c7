"""Prune a dense model to a MAC budget: `python -m bilevel_fast.prune magnitude --budget 0.8 --out runs/pruned`."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from bilevel_fast import errors, flags
from bilevel_fast.architecture import Site, sites
from bilevel_fast.errors import UserError
from bilevel_fast.folder import load_folder, save_student
from bilevel_fast.macs import count
from bilevel_fast.mini import TEACHER
from bilevel_fast.pruning import MacBudget, method
from bilevel_fast.structure import Structure

BAR = 10
UNITS = {"groups": "groups", "attn1": "heads", "attn2": "heads", "ff": "groups"}


@dataclass(frozen=True)
class Args:
    """Prune a dense model to a MAC budget, show what is kept, and write the student's model folder."""

    method: tyro.conf.Positional[str]
    """magnitude (keep the largest weights) or uniform (keep the same share everywhere)."""
    out: Path
    """Folder for the student; must be new."""
    teacher: Path = TEACHER
    """Dense model folder in the diffusers layout; by default the built-in mini teacher."""
    budget: float = 0.8
    """MACs of the student as a share of the teacher's: never more, and as close as whole units allow."""
    latent: int | None = None
    """Height and width of the latents to count at; by default the UNet's sample size."""
    text: int | None = None
    """Text tokens to count at; by default the length of the text encoder."""


def picture(structure: Structure, latent: int, text: int) -> str:
    """One line per site: a bar of the share of its MACs that stays, and the units kept of each width vector."""
    rows = {row.name: row.true for row in count(structure, latent, text).rows}
    dense = {row.name: row.true for row in count(Structure.dense(structure.config), latent, text).rows}
    members = sites(structure.config)
    pad = max(len(site.name) for site in members)

    def kept(site: Site) -> str:
        if site.name in structure.dropped:
            return "dropped"
        shown = [(w.name, f"{structure.count(site, w)}/{w.units} {UNITS[w.name]}") for w in site.widths]
        return "  ".join(f"{name} {units}" if site.kind == "transformer" else units for name, units in shown)

    def line(site: Site) -> str:
        full = round(BAR * rows[site.name] / dense[site.name])
        return f"{site.name:{pad}}  {'█' * full + '░' * (BAR - full)}  {kept(site)}"

    return "\n".join(map(line, members))


def main() -> None:
    args = flags.parse(Args, "bilevel_fast.prune", __doc__)
    prune = method(args.method)
    folder = load_folder(args.teacher)
    if folder.structure is not None:
        raise UserError(f"{args.teacher} is pruned already; wanted a dense model")
    teacher = folder.unet()
    latent = folder.config.sample_size if args.latent is None else args.latent
    text = folder.text_encoder.length if args.text is None else args.text
    structure = prune(teacher, MacBudget(args.budget, latent, text), ())
    save_student(args.out, folder, teacher.cut(structure))

    dense, student = count(Structure.dense(folder.config), latent, text), count(structure, latent, text)
    print(picture(structure, latent, text))
    print(f"\nlatents {latent}x{latent}, {text} text tokens")
    change = f"{dense.true / 1e9:.3f} G -> {student.true / 1e9:.3f} G"
    print(f"MACs        {change}: {student.ratio:.4f}, budget {args.budget:g}")
    print(f"parameters  {dense.params:,} -> {student.params:,}")
    print(f"written     {args.out}")


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
