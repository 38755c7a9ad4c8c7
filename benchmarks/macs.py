"""MACs and parameters per site and in total, dense against pruned, in closed form.

    python -m benchmarks.macs --model sd21 --latent 64 --text 77
    python -m benchmarks.macs --model sd21 --keep 0.5 --drop mid_block.attentions.0 --json
    python -m benchmarks.macs --model runs/mini/student

`bilevel_fast.macs` says what `true` and `official` count.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NoReturn

from bilevel_fast import errors
from bilevel_fast.architecture import MINI, SD21, UNetConfig, sites
from bilevel_fast.errors import UserError, nearest
from bilevel_fast.macs import Macs, count
from bilevel_fast.structure import Structure

MODELS = {"sd21": SD21, "mini": MINI}


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
        "benchmarks.macs", description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", default="sd21", help="sd21, mini, or a model folder, pruned or not (default: sd21)")
    p.add_argument("--latent", type=int, help="height and width of the latents (default: the model's sample size)")
    p.add_argument("--text", type=int, help="text tokens (default: 12 for the mini UNet, otherwise 77)")
    p.add_argument("--structure", type=Path, help="structure.json to count, instead of the model's own")
    p.add_argument("--keep", type=float, help="keep this share of every width vector of the dense model")
    p.add_argument("--drop", help="remove these sites, separated by commas")
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
    lines = [head, *body, line("total", "", dense, macs)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in lines
    ]
    rule = "-" * len(text[0])
    return "\n".join([text[0], rule, *text[1:-1], rule, text[-1]])


def main() -> None:
    args = parser().parse()
    structure = choose_structure(args)
    latent = structure.config.sample_size if args.latent is None else args.latent
    text = (12 if structure.config == MINI else 77) if args.text is None else args.text
    macs = count(structure, latent, text)
    if args.json:
        print(json.dumps(to_json(structure, macs, model=args.model, latent=latent, text=text)))
        return
    print(f"{args.model}, latents {latent}x{latent}, {text} text tokens, one sample\n")
    print(to_table(structure, macs, count(Structure.dense(structure.config), latent, text)))
    print(f"\n{macs.ratio:.4f} of the dense MACs (true), {macs.params:,} parameters")


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
