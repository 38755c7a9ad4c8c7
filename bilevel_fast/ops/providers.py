"""Which implementation runs an op: what won where it was measured, else what should win by the bytes that it moves.

`providers.json` says so per architecture, op and size class; `python -m benchmarks.kernels.sweep --tune` writes it:

    {"cpu": {"group_norm_silu": {"small": "native", "medium": ["triton", "native", "torch"]}}}

An architecture is `cpu` or `sm_90` and the like. `projected` stands for GPUs from sm_80 on, op by op until one was
measured there: the fused kernels that move fewer bytes than torch's own, which copy channels_last around GroupNorm.
Attention is on torch there, whose backends are the fastest. `projected before sm_90` adds what trades cuBLAS for fewer
bytes: an H100 multiplies too fast for that. What the table does not name runs on torch; but a mixture
batch runs on Triton on any GPU: torch has no op that does several experts at once.
`BILEVEL_FAST_OPS=torch` (or another provider) in the environment overrules the table, wherever that provider can take
the inputs.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from bilevel_fast.base.errors import UserError, nearest

VARIABLE = "BILEVEL_FAST_OPS"
PROVIDERS = ("torch", "native", "triton", "cuda", "xformers")
SIZES = {"small": 2**18, "medium": 2**22}  # elements below which a tensor is of the class; "large" from there on

PROJECTED, BEFORE_SM_90 = "projected", "projected before sm_90"

# architecture, or one of these two -> op -> size class -> provider, or several from the fastest on: the first that can
# take the inputs runs
TABLE: dict[str, dict[str, dict[str, str | list[str]]]] = json.loads(
    (Path(__file__).parent / "providers.json").read_text()
)


def choose(op: str, device: torch.device, numel: int, *able: str, default: str = "torch") -> str:
    """The provider to run `op` on.

    Args:
        op: Name of the op.
        device: Where its inputs are.
        numel: Elements of its main input; of all of them together where they are a list.
        able: Providers besides torch that can take these inputs.
        default: What runs where the table does not say.

    Raises:
        UserError: The environment names a provider that there is not.
    """
    wanted = asked_for()
    if wanted is None:
        wanted = table(architecture(device)).get(op, {}).get(size_class(numel), default)
    elif wanted not in PROVIDERS:
        raise UserError(f"{VARIABLE}={wanted} in the environment: no such provider{nearest(wanted, PROVIDERS)}")
    ranking = [wanted] if isinstance(wanted, str) else wanted
    return next((name for name in ranking if name in able or name == "torch"), "torch")


def table(here: str) -> Mapping[str, Mapping[str, str | list[str]]]:
    """op -> size class -> provider on an architecture: what was measured there, and what is projected for the rest."""
    guessed = TABLE.get(PROJECTED, {}) if is_projected(here) else {}
    if guessed and int(here[3:]) < 90:
        guessed = guessed | TABLE.get(BEFORE_SM_90, {})
    return guessed | TABLE.get(here, {})


def is_projected(here: str) -> bool:
    """Whether the projected defaults are those of an architecture, where nothing was measured: sm_80 and newer."""
    return here.startswith("sm_") and int(here[3:]) >= 80


def asked_for() -> str | None:
    """The provider that the environment names."""
    return os.environ.get(VARIABLE)


@contextmanager
def ops(name: str | None) -> Iterator[None]:
    """Let the provider `name` run all ops that it can; what the table says if None. The environment is not asked."""
    before = os.environ.pop(VARIABLE, None)
    if name is not None:
        os.environ[VARIABLE] = name
    try:
        yield
    finally:
        os.environ.pop(VARIABLE, None)
        if before is not None:
            os.environ[VARIABLE] = before


def notes(device: torch.device, missing: Mapping[str, str]) -> list[str]:
    """What a run should say about its ops before it starts: what was asked for and is not there, or was never measured.

    Args:
        device: Where the run is.
        missing: Why a provider cannot run here, by name; those that can are not in it.
    """
    wanted = asked_for()
    if wanted is not None:
        return [f"{VARIABLE}={wanted}: {missing[wanted]}; torch runs all ops instead"] if wanted in missing else []
    here = architecture(device)
    measured = TABLE.get(here, {})
    guessed = ", ".join(sorted(set(table(here)) - set(measured)))
    if guessed:
        said = f"projected, not measured on {here}: triton runs {guessed}"
    elif measured:
        return []
    else:
        known = ", ".join(sorted(set(TABLE) - {PROJECTED, BEFORE_SM_90})) or "none"
        said = f"no op was measured on {here} (only on {known}), torch runs them all"
    return [f"{said}; to measure: OUT=results bash benchmarks/gpu.sh"]


def size_class(numel: int) -> str:
    """`small`, `medium` or `large`: a kernel that wins on many elements may lose on few."""
    for name, limit in SIZES.items():
        if numel < limit:
            return name
    return "large"


def architecture(device: torch.device) -> str:
    """`cpu`, `sm_90` and the like, or the type of another device."""
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


# what `torch.compiler.assume_constant_result` does, without its import of torch._dynamo: a second for every command
architecture._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
