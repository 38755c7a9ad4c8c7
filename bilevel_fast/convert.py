"""Write the model folder of a Stable Diffusion checkpoint in one file, once: every command reads the folder.

python -m bilevel_fast.convert --file model.safetensors --config-from sd15/ --out model/

The file holds weights alone. Tokenizer, configs and scheduler are those of a folder of the model that it descends from,
whose weights need not be there: online, a megabyte of it is enough.

hf download OWNER/NAME --include "*.json" "*.txt" --local-dir sd15
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bilevel_fast.base import errors, flags


@dataclass(frozen=True)
class Args:
    file: Path
    """Checkpoint of Stable Diffusion 1.x or 2.x in the original layout (.safetensors)."""
    config_from: Path
    """Folder in the diffusers layout of the model that it descends from, or its id on the hub."""
    out: Path
    """Folder to write."""


def settings() -> dict[str, Any]:
    """What its flags are read into, by the words before them."""
    return {"": Args}


def main() -> None:
    args = flags.parse(Args, "bilevel_fast.convert", __doc__)
    from bilevel_fast.models.single_file import convert_file

    averaged = convert_file(args.file, args.config_from, args.out)
    which = ": the moving average of its weights" if averaged else ""
    print(f"{args.out} holds the model of {args.file}{which}")


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
