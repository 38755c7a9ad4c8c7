"""Write a model in a form that other programs read: a folder of diffusers, one file, a graph of ONNX or of torch.

python -m bilevel_fast.export folder --model runs/mini/student --out exported/
python -m bilevel_fast.export single-file --model model/ --out original/ --dtype fp16

Whatever is written has been read again and compared before it is there, and has a model card.
"""

import sys
from typing import Any

from bilevel_fast.base import errors, flags
from bilevel_fast.base.alone import alone


def settings() -> dict[str, Any]:
    """What its flags are read into, by the words before them."""
    from bilevel_fast.runs.export_model import TARGETS, Args

    return dict.fromkeys(TARGETS, Args)


def main() -> None:
    alone("bilevel_fast.export")
    from bilevel_fast.runs.export_model import Args, check_target, export

    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        check_target(sys.argv[1])  # mistyped: said before the flags that are missing
    print(export(flags.parse(Args, "bilevel_fast.export", __doc__)).page)


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
