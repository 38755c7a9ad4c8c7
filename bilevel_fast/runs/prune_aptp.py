"""Command lines of APTP: `python -m bilevel_fast.prune aptp | route | import-aptp`.

aptp            --experts 4 --budget 0.8 --out runs/aptp         train a router, cut its experts
route           runs/aptp --prompts "a red star"                 which expert each prompt goes to
import-aptp     --vector arch_vector.pt --teacher T --out S      an expert that APTP's authors publish
"""

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from bilevel_fast.base import flags
from bilevel_fast.base.devices import pick_device
from bilevel_fast.base.errors import UserError
from bilevel_fast.base.tables import aligned, listed
from bilevel_fast.models.folder import ModelFolder, load_folder, read_unet, save_student
from bilevel_fast.models.macs import count
from bilevel_fast.models.structure import Structure
from bilevel_fast.pruning.aptp.experts import find_vector, read_codebook, read_vector
from bilevel_fast.pruning.aptp.mixture_folder import Mixture
from bilevel_fast.runs.router import MINI, PAPER, AptpConfig, run
from bilevel_fast.sampling.prompts import read_prompts
from bilevel_fast.training.loop import Interrupted


def aptp(argv: Sequence[str]) -> None:
    """Train a router that sends each prompt to one of several experts, and cut the experts (arXiv:2406.12042)."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    base = PAPER if any(arg.partition("=")[0] == "--data" for arg in argv) else MINI
    config = flags.parse(AptpConfig, "bilevel_fast.prune aptp", aptp.__doc__, args=argv, default=base)
    try:
        summary = run(config)
    except Interrupted as interrupted:
        print(f"{interrupted}; go on with --resume --out {config.out}", file=sys.stderr)
        raise SystemExit(130) from None
    rows = [
        (str(row["expert"]), f"{row['macs']:.4f}", str(row["prompts"]), listed(row["dropped"]))
        for row in summary["experts"]
    ]
    print(aligned([("expert", "MACs", "prompts", "dropped sites"), *rows]))
    print(f"\n{summary['prompts']} training prompts, budget {summary['budget']:g}")
    print(f"written     {config.out}")


@dataclass(frozen=True)
class RouteArgs:
    """Settings of `route`."""

    mixture: tyro.conf.Positional[Path]
    """Mixture folder."""
    prompts: tuple[str, ...] = ()
    """What to send."""
    file: Path | None = None
    """A prompt file, after those of --prompts: .txt with a prompt per line, .csv with a column prompt, COCO's .json."""
    prompt_encoder: Path | None = None
    """Where the sentence encoder is, if the mixture has one and it is not where it was."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU if there is one."""


def route(argv: Sequence[str]) -> None:
    """Say which expert of a mixture each prompt goes to."""
    args = flags.parse(RouteArgs, "bilevel_fast.prune route", route.__doc__, args=argv)
    prompts = [*args.prompts, *(read_prompts(args.file) if args.file else [])]
    if not prompts:
        raise UserError("no prompts came; --prompts and --file name some")
    mixture = Mixture.load(args.mixture, prompt_encoder=args.prompt_encoder, device=pick_device(args.device))
    experts = mixture.route(prompts)
    print(aligned([("expert", "prompt"), *zip(map(str, experts.tolist()), prompts, strict=True)]))
    counts = experts.bincount(minlength=len(mixture.structures)).tolist()
    print("\n" + aligned([("expert", "prompts"), *((str(k), str(n)) for k, n in enumerate(counts))]))


@dataclass(frozen=True)
class ImportArgs:
    """Settings of `import-aptp`."""

    teacher: Path
    """Dense model folder that the experts were cut from."""
    vector: Path | None = None
    """An expert's architecture vector, arch_vector.pt."""
    codebook: Path | None = None
    """The gates of all experts, quantizer_embeddings.pt: lists them; with --expert, takes one."""
    expert: int | None = None
    """Number of the expert in the codebook."""
    weights: Path | None = None
    """Folder whose unet/ has the expert's own weights, in its shape; if it has an arch_vector.pt, too, that is all it
    takes. By default the expert keeps the teacher's weights."""
    out: Path | None = None
    """Folder for the student; must be new."""
    latent: int | None = None
    """Height and width of the latents to count at; by default the UNet's sample size."""
    text: int | None = None
    """Text tokens to count at; by default the length of the text encoder."""


def import_aptp(argv: Sequence[str]) -> None:
    """Make students of the experts that APTP's authors publish: their vectors, codebooks and weights."""
    args = flags.parse(ImportArgs, "bilevel_fast.prune import-aptp", import_aptp.__doc__, args=argv)
    _check(args)
    folder = load_folder(args.teacher)
    if folder.structure is not None:
        raise UserError(f"{args.teacher} is pruned already; wanted the dense model that the experts were cut from")
    latent = folder.config.sample_size if args.latent is None else args.latent
    text = folder.text_encoder.length if args.text is None else args.text
    if args.codebook is not None:
        structures = read_codebook(args.codebook, folder.config)
        counts = [count(s, latent, text) for s in structures]
        rows = [
            (str(k), f"{macs.ratio:.4f}", f"{macs.params:,}", listed(sorted(s.dropped)))
            for k, (s, macs) in enumerate(zip(structures, counts, strict=True))
        ]
        print(aligned([("expert", "MACs", "parameters", "dropped sites"), *rows]))
        if args.expert is None:
            return
        if not 0 <= args.expert < len(structures):
            raise UserError(f"--expert is {args.expert}, {args.codebook} has experts 0 to {len(structures) - 1}")
        structure, source = structures[args.expert], f"expert {args.expert} of {args.codebook.name}"
        print()
    else:
        path = args.vector
        if path is None:
            assert args.weights is not None
            path = find_vector(args.weights)
        structure, source = read_vector(path, folder.config), path.name
    assert args.out is not None
    _make_student(args.out, folder, structure, source, args.weights, latent, text)


def _check(args: ImportArgs) -> None:
    """Refuse what contradicts itself, before anything is read."""
    if args.vector is not None and args.codebook is not None:
        raise UserError("--vector and --codebook both say what the expert keeps; give one")
    if args.vector is None and args.codebook is None and args.weights is None:
        raise UserError("nothing to import; --vector, --codebook or --weights name it")
    if args.expert is not None and args.codebook is None:
        raise UserError("--expert is a number in a codebook, and --codebook is missing")
    listing = args.codebook is not None and args.expert is None
    if listing and (args.weights is not None or args.out is not None):
        raise UserError("a codebook has several experts; --expert says which one to make a student of")
    if not listing and args.out is None:
        raise UserError("--out is missing: the folder for the student")
    if args.out is not None and args.out.exists():
        raise UserError(f"{args.out} exists already; delete it or choose another folder")


def _make_student(
    out: Path, folder: ModelFolder, structure: Structure, source: str, weights: Path | None, latent: int, text: int
) -> None:
    if weights is None:
        unet, whose = folder.unet(mapped=True).cut(structure), f"the teacher's, {folder.path}"
    else:
        unet, whose = read_unet(weights / "unet", folder.config, structure, source), str(weights / "unet")
    save_student(out, folder, unet)
    dense, left = count(Structure.dense(folder.config), latent, text), count(structure, latent, text)
    print(f"latents {latent}x{latent}, {text} text tokens")
    print(f"MACs        {dense.true / 1e9:.3f} G -> {left.true / 1e9:.3f} G: {left.ratio:.4f}, {source}")
    print(f"parameters  {dense.params:,} -> {left.params:,}")
    print(f"dropped     {listed(sorted(structure.dropped))}")
    print(f"weights     {whose}")
    print(f"written     {out}")


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"aptp": aptp, "route": route, "import-aptp": import_aptp}
"""First words of `bilevel_fast.prune` that are no method; each takes the words after it."""

SETTINGS: dict[str, Any] = {"aptp": AptpConfig, "route": RouteArgs, "import-aptp": ImportArgs}
"""What their flags are read into."""
