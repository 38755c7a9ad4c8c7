"""MACs and parameters per site and in total, dense against pruned, in closed form.

    python -m benchmarks.counts.macs --model sd21 --latent 64 --text 77
    python -m benchmarks.counts.macs --model sd21 --keep 0.5 --drop mid_block.attentions.0 --json
    python -m benchmarks.counts.macs --model runs/mini/student
    python -m benchmarks.counts.macs --model koala-700m
    python -m benchmarks.counts.macs --latent 64 --compare 0.55 planned-0.55 runs/pruned/unet/structure.json

`bilevel_fast.models.macs` says what `true` and `official` count.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.structures import NAMES, PLANNED
from benchmarks.structures import structure as named
from bilevel_fast.base import errors
from bilevel_fast.base.errors import UserError, nearest
from bilevel_fast.models.architecture import MINI, SD21, UNetConfig, sites
from bilevel_fast.models.macs import Macs, count
from bilevel_fast.models.sdxl import SDXL_FAMILY
from bilevel_fast.models.structure import Structure

MODELS = {"sd21": SD21, "mini": MINI, **SDXL_FAMILY}
PARTS = ("true", "official", "params")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as all our commands do."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def parse(self) -> argparse.Namespace:
        known, unknown = self.parse_known_args()
        if unknown:
            raise UserError(f"unknown argument {unknown[0]!r}{nearest(unknown[0], self._option_string_actions)}")
        return known


def parser() -> Parser:
    p = Parser(
        "benchmarks.counts.macs",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "--model", default="sd21", help=f"{', '.join(MODELS)}, or a model folder, pruned or not (default: sd21)"
    )
    p.add_argument("--latent", type=int, help="height and width of the latents (default: the model's sample size)")
    p.add_argument("--text", type=int, help="text tokens (default: 12 for the mini UNet, otherwise 77)")
    p.add_argument("--structure", type=Path, help="structure.json to count, instead of the model's own")
    p.add_argument("--keep", type=float, help="keep this share of every width vector of the dense model")
    p.add_argument("--drop", help="remove these sites, separated by commas")
    p.add_argument("--compare", nargs="+", metavar="STRUCTURE", help="dense against these, block by block: files, or "
                   f"{', '.join((*NAMES, *PLANNED))}")  # fmt: skip
    p.add_argument("--json", action="store_true", help="print one JSON object")
    return p


def load_model(name: str) -> tuple[UNetConfig, Structure]:
    """The dense config of a model by name or folder, and its own structure."""
    if name in MODELS:
        return MODELS[name], Structure.dense(MODELS[name])
    if not Path(name).is_dir():
        raise UserError(f"--model {name!r} is neither a known model nor a folder{nearest(name, MODELS)}")
    unet = Path(name) / "unet"
    config, own = UNetConfig.load(unet), unet / "structure.json"
    return config, Structure.load(own) if own.exists() else Structure.dense(config)


def choose_structure(args: argparse.Namespace) -> Structure:
    config, structure = load_model(args.model)
    if args.structure is not None:
        if args.keep is not None or args.drop is not None:
            raise UserError("--structure says what is kept; it cannot go with --keep or --drop")
        structure = Structure.load(args.structure)
    elif args.keep is not None or args.drop is not None:
        drop = args.drop.split(",") if args.drop else []
        structure = Structure.uniform(config, 1.0 if args.keep is None else args.keep, drop)
    if structure.config != config:
        raise UserError(
            f"{args.structure or args.model}: the structure belongs to another UNet than --model {args.model}"
        )
    return structure


def to_json(structure: Structure, macs: Macs, **sizes: Any) -> dict[str, Any]:
    """The numbers of a structure in GMAC; `other` holds what pruning never touches."""
    rows = {r.name: {"true_g": r.true / 1e9, "official_g": r.official / 1e9, "params": r.params} for r in macs.rows}
    prunable = {site.name: rows.pop(site.name) for site in sites(structure.config)}
    totals = {"true_g": macs.true / 1e9, "official_g": macs.official / 1e9, "params": macs.params}
    return {**sizes, **totals, "ratio": macs.ratio, "sites": prunable, "other": rows}


def to_table(structure: Structure, macs: Macs, dense: Macs) -> str:
    """Plain text, one row per site or module, a total at the end."""
    prunable = {site.name: site for site in sites(structure.config)}

    def kept(name: str) -> str:
        if name in structure.dropped:
            return "dropped"
        widths = prunable[name].widths if name in prunable else ()
        return "  ".join(f"{structure.count(prunable[name], w)}/{w.units}" for w in widths)

    def line(name: str, kept: str, was: Any, now: Any) -> tuple[str, ...]:
        gmacs = (f"{n / 1e9:.3f}" for n in (was.true, now.true, was.official, now.official))
        return (name, kept, *gmacs, f"{was.params:,}", f"{now.params:,}")

    head = ("GMAC", "kept", "dense true", "true", "dense official", "official", "dense parameters", "parameters")
    body = [line(now.name, kept(now.name), was, now) for was, now in zip(dense.rows, macs.rows, strict=True)]
    return layout([head, *body, line("total", "", dense, macs)], left=2)


def layout(lines: Sequence[Sequence[str]], left: int) -> str:
    """Aligned columns, the first `left` of them to the left; rules below the head and above the last line."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in lines
    ]
    rule = "-" * len(text[0])
    return "\n".join([text[0], rule, *text[1:-1], rule, text[-1]])


def choose_compared(args: argparse.Namespace, config: UNetConfig) -> dict[str, Structure]:
    """The structures of --compare, by what the user calls them."""
    if any(given is not None for given in (args.structure, args.keep, args.drop)):
        raise UserError("--compare says what is counted; it cannot go with --structure, --keep or --drop")
    found = {}
    for name in args.compare:
        if name in found:
            raise UserError(f"--compare names {name!r} twice")
        known = {MINI: True, SD21: False}
        if name in (*NAMES, *PLANNED) and config in known:
            found[name] = named(name, tiny=known[config])
        elif Path(name).suffix == ".json" or Path(name).is_file():
            found[name] = Structure.load(Path(name))
        else:
            raise UserError(f"--compare {name!r} is neither a file nor a name{nearest(name, (*NAMES, *PLANNED))}")
        levels, wanted = len(found[name].config.block_out_channels), len(config.block_out_channels)
        if levels != wanted:  # their blocks of one name would not be at one place
            raise UserError(f"--compare {name}: a UNet of {levels} levels, that of --model {args.model} has {wanted}")
    return found


def by_block(macs: Macs, blocks: Sequence[str]) -> dict[str, dict[str, int]]:
    """`true`, `official` and `params` of each of `blocks`, of everything else as `other`, and in total."""
    sums = {block: dict.fromkeys(PARTS, 0) for block in (*blocks, "other", "total")}
    for row in macs.rows:
        block = next((b for b in blocks if row.name.startswith(f"{b}.")), "other")
        for part in PARTS:
            sums[block][part] += getattr(row, part)
            sums["total"][part] += getattr(row, part)
    return sums


def compare(compared: Mapping[str, Structure], config: UNetConfig, latent: int, text: int) -> dict[str, Any]:
    """By name, the dense UNet first: MACs and parameters of each block; see `by_block`."""
    everything = {"dense": Structure.dense(config), **compared}
    return {name: by_block(count(s, latent, text), config.blocks) for name, s in everything.items()}


def compared_table(found: Mapping[str, Mapping[str, Mapping[str, int]]]) -> str:
    """GMAC of each block, and what share of the dense block that is."""
    dense = found["dense"]
    head = ["GMAC", *(f"{name} {part}" for name in found for part in PARTS[:2])]
    lines = [head]
    for block, was in dense.items():
        line = [block]
        for name, blocks in found.items():
            for part in PARTS[:2]:
                share = f" {blocks[block][part] / was[part]:7.2%}" if was[part] and name != "dense" else ""
                line.append(f"{blocks[block][part] / 1e9:.3f}{share}")
        lines.append(line)
    return layout(lines, left=1)


def main() -> None:
    args = parser().parse()
    structure = choose_structure(args) if args.compare is None else load_model(args.model)[1]
    latent = structure.config.sample_size if args.latent is None else args.latent
    text = (12 if structure.config == MINI else 77) if args.text is None else args.text
    if args.compare is not None:
        found = compare(choose_compared(args, structure.config), structure.config, latent, text)
        if args.json:
            print(json.dumps({"model": args.model, "latent": latent, "text": text, "structures": found}))
        else:
            print(f"{args.model}, latents {latent}x{latent}, {text} text tokens, one sample\n\n{compared_table(found)}")
        return
    macs = count(structure, latent, text)
    if args.json:
        print(json.dumps(to_json(structure, macs, model=args.model, latent=latent, text=text)))
        return
    print(f"{args.model}, latents {latent}x{latent}, {text} text tokens, one sample\n")
    print(to_table(structure, macs, count(Structure.dense(structure.config), latent, text)))
    print(f"\n{macs.ratio:.4f} of the dense MACs (true), {macs.params:,} parameters")


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
