"""Sample prompts with any model folder or a mixture of experts: a few to a PNG grid, or a file of them to a folder.

python -m bilevel_fast.sample --prompts "a red star" "a red star in the style of waves" --seeds 0 1 --out grid.png
python -m bilevel_fast.sample --prompts-file captions_val2017.json --folder images/ --model sd21/

A grid has a row for each seed and a column for each prompt. A folder has ID.png and index.jsonl; killed, the same
command goes on, and `torchrun --nproc-per-node 8 -m bilevel_fast.sample ...` shares the prompts among 8 GPUs.
"""

import logging
import sys
from dataclasses import fields
from functools import partial
from typing import Any

from bilevel_fast.base import errors, flags
from bilevel_fast.base.errors import UserError
from bilevel_fast.base.progress import Bar
from bilevel_fast.pruning.aptp.mixture_folder import INDEX as MIXTURE
from bilevel_fast.pruning.aptp.sampling import load_mixture
from bilevel_fast.sampling.painter import Load, load_painter
from bilevel_fast.sampling.settings import FOLDER_ONLY, SampleConfig
from bilevel_fast.sampling.to_folder import Recipe, sample_folder
from bilevel_fast.sampling.to_grid import draw_grid
from bilevel_fast.worlds.mini import TEACHER


def settings() -> dict[str, Any]:
    """What its flags are read into, by the words before them."""
    return {"": SampleConfig}


def main() -> None:
    config = flags.parse(SampleConfig, "bilevel_fast.sample", __doc__)
    if config.prompt_encoder is not None and config.mixture is None:
        raise UserError("--prompt-encoder is for the router of a --mixture, and none was named")
    if config.prompts_file is not None:
        return _fill_folder(config)
    for field in fields(config):
        if field.name in FOLDER_ONLY and getattr(config, field.name) != field.default:
            raise UserError(f"--{field.name.replace('_', '-')} is for --prompts-file, and none was named")
    load = load_painter if config.mixture is None else _experts(config, dense=config.model, say=_say)
    print(draw_grid(config.mixture or config.model or TEACHER, config, load))
    return None


def _fill_folder(config: SampleConfig) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if config.folder is None or len(config.seeds) != 1 or config.prompts or config.out:
        raise UserError("--prompts-file wants --folder and one of --seeds, and neither --prompts nor --out")
    if config.model is not None and config.mixture is not None:
        raise UserError("--prompts-file takes --model or --mixture: experts draw their prompts with their own weights")
    if config.mixture is not None and not (config.mixture / MIXTURE).is_file():
        raise UserError(f"{config.mixture} is not a mixture: {MIXTURE} is missing")
    assert config.prompts_file is not None
    rows = config.read(config.prompts_file)
    same = ("steps", "guidance", "method", "size", "precision", "format", "safe", "safe_strength")
    with Bar("img") as bar:
        folder = sample_folder(
            config.mixture or config.model or TEACHER, rows, config.folder,
            Recipe(seed=config.seeds[0], **{name: getattr(config, name) for name in same}),
            batch=config.batch, device=config.device, load=load_painter if config.mixture is None else _experts(config),
            progress=bar,
        )  # fmt: skip
    print(f"{config.folder}: {len(folder.entries)} of {len(rows)} images")


def _experts(config: SampleConfig, **options: Any) -> Load:
    return partial(load_mixture, prompt_encoder=config.prompt_encoder, **options)


def _say(expert: int, prompt: str) -> None:
    print(f"expert {expert}  {prompt}")


if __name__ == "__main__":
    sys.exit(errors.run(main))
