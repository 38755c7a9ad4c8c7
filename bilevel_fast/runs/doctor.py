"""What is installed here, what this machine has, what runs where and why: the report of `bilevel_fast.doctor`.

A part that is broken is a line of the report, whatever it raises: nothing here is taken for granted but Python and the
package's own files.
"""

import importlib
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import bilevel_fast
from bilevel_fast.base.errors import UserError, nearest
from bilevel_fast.base.installed import Part, parts, requirements
from bilevel_fast.base.tables import fitted
from bilevel_fast.runs.config import PRESETS

if TYPE_CHECKING:
    from bilevel_fast.runs.fitting import Fitting

Line = tuple[str, ...]

NATIVE = ("bilevel_fast.ops.native._C", "bilevel_fast.ops.native._cuda")
VARIABLES = {
    "BILEVEL_FAST_OPS": "the provider that runs all ops that it can",
}
"""Variables of the environment that commands read."""

_FITS = "fits"
_GIB = 2**30


@dataclass
class Report:
    """What was found.

    Attributes:
        sections: Lines by heading; all lines of a section have equally many cells.
        missing: What is not there and the command that adds it.
        refused: Why the mini preset cannot run; empty if it can.
    """

    sections: dict[str, list[Line]] = field(default_factory=dict)
    missing: list[Line] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The page, in lines of at most 80 characters."""
        sections = {**self.sections, **({"missing": self.missing} if self.missing else {})}
        pages = [f"{name}\n" + _indented(fitted(lines, 78)) for name, lines in sections.items() if lines]
        last = [("the mini preset can run:", "python -m bilevel_fast.train")]
        if self.refused:
            last = [("the mini preset cannot run:", why) for why in self.refused]
        return "\n\n".join([*pages, fitted(last)])


def examine(runs: Path = Path("runs")) -> Report:
    """Look at everything.

    Args:
        runs: Where runs would go.
    """
    report = Report()
    here = parts(requirements())
    steps: dict[str, Callable[[Report], Iterator[Line]]] = {
        "installed": lambda report: _installed(report, here),
        "extras": lambda report: _extras(report, here),
        "machine": lambda report: _machine(report, runs),
        "native modules": _native,
        "who runs an op": _ops,
        "memory of a preset": _presets,
        "environment": _environment,
    }
    for name, look in steps.items():
        lines = report.sections.setdefault(name, [])
        try:
            lines.extend(look(report))
        except Exception as error:  # what is broken is what this is for
            said = f"cannot be said: {_one_line(error)}"
            lines.append(("", *[""] * (len(lines[0]) - 2), said) if lines and len(lines[0]) > 1 else (said,))
            if isinstance(error, UserError):
                report.refused.append(_one_line(error))
    return report


def _installed(report: Report, here: list[Part]) -> Iterator[Line]:
    yield "bilevel-fast", bilevel_fast.__version__, str(Path(__file__).parents[1])
    yield "python", platform.python_version(), sys.executable
    if not here:
        yield "", "", "neither a checkout nor installed: what it requires is not known"
    for part in here:
        if part.extra is None:
            yield part.name, part.version or "-", part.problem or ""
            if part.problem:
                report.missing.append((part.name, f"pip install '{part.name}'"))
                report.refused.append(f"{part.name} is {part.problem}")
    yield "cuda", *_cuda()


def _cuda() -> tuple[str, str]:
    import torch

    from bilevel_fast.base.devices import driver

    return torch.version.cuda or "-", f"of torch {torch.__version__}; NVIDIA driver {driver() or '-'}"


def _extras(report: Report, here: list[Part]) -> Iterator[Line]:
    wanting: set[str] = set()
    for part in here:
        if part.extra is not None:
            yield part.extra, part.name, part.version or "-", part.problem or ""
            wanting |= {part.extra} if part.problem else set()
    for extra in sorted(wanting):
        report.missing.append((f"extra {extra}", f"pip install 'bilevel-fast[{extra}]'"))


def _machine(report: Report, runs: Path) -> Iterator[Line]:
    import torch

    from bilevel_fast.base.devices import cpu_name, no_cuda, ram

    total, free = ram()
    yield "CPU", cpu_name()
    yield "memory", f"{total / _GIB:.1f} GiB, {free / _GIB:.1f} free"
    place = next(each for each in (runs.absolute(), *runs.absolute().parents) if each.is_dir())
    yield "disk", f"{shutil.disk_usage(place).free / _GIB:.1f} GiB free for {runs}/"
    if not os.access(place, os.W_OK | os.X_OK):
        report.refused.append(f"{place} cannot be written to, and runs go to {runs}/")
    if (why := no_cuda()) is not None:
        yield "GPU", f"no CUDA device: {why}"
        return
    for number in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(number)
        code = f"sm_{card.major}{card.minor}"
        known = torch.cuda.get_arch_list()
        note = "" if code in known else f"; torch has no code of its own for it, only for {', '.join(known)}"
        yield f"GPU {number}", f"{card.name}, {card.total_memory / _GIB:.1f} GiB, {code}{note}"


def _native(report: Report) -> Iterator[Line]:
    needed, for_cards = NATIVE
    why = built(needed)
    yield "_C", "no" if why else "built", why or "C++ for the CPU"
    if why:
        report.missing.append(("_C", "pip install -e ."))
        report.refused.append(f"{needed} does not load: {why}")
    why = built(for_cards)
    yield "_cuda", "no" if why else "built", why or "CUDA; what it runs has a Triton kernel as well"
    if why:
        report.missing.append(("_cuda", "pip install -e .   with nvcc on the PATH"))


def built(module: str) -> str | None:
    """Why a compiled module does not load, in one line; None if it does."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError:
        return "not built"
    except Exception as error:  # an undefined symbol, half a file, the wrong machine
        return _one_line(error)
    return None


def _ops(report: Report) -> Iterator[Line]:
    from bilevel_fast.base.devices import pick_device
    from bilevel_fast.ops import dispatch, reasons
    from bilevel_fast.ops.providers import architecture

    device = pick_device("auto")
    yield "op", *reasons.CLASSES, f"why, on {architecture(device)}"
    for choice in reasons.choices(device, dispatch.missing(device)):
        yield choice.op, *choice.runs.values(), choice.why


def _presets(report: Report) -> Iterator[Line]:
    """By the memory model: of the built-in teacher where there is no data, else of Stable Diffusion 2.1, dense."""
    import torch

    from bilevel_fast.base.devices import compute_dtype, pick_device, ram
    from bilevel_fast.models.architecture import SD21
    from bilevel_fast.models.folder import load_folder
    from bilevel_fast.models.structure import Structure
    from bilevel_fast.runs.fitting import Fitting
    from bilevel_fast.worlds.mini import TEACHER

    device = pick_device("auto")
    on_gpu = device.type == "cuda"
    has = torch.cuda.mem_get_info(device)[0] if on_gpu else ram()[1]
    teacher, dtype = load_folder(TEACHER), compute_dtype("auto", device)
    small = Structure.dense(teacher.config), teacher.config.sample_size, teacher.text_encoder.length
    yield "preset", "batch", "memory", f"of {_size(has)} that are free"
    for name, config in PRESETS.items():
        mini = config.data is None and name in ("mini", "emoji", "smoke")
        fitting = Fitting(config, *(small if mini else (Structure.dense(SD21), 64, 77)), dtype)
        wanted, said = _wanted(fitting, config.lower.batch, has, on_gpu)
        yield name, str(config.lower.batch), wanted, said if mini else f"SD 2.1: {said}"
        if name == "mini" and said != _FITS:
            report.refused.append(f"it wants {wanted} of memory, {_size(has)} are free")


def _wanted(fitting: "Fitting", batch: int, has: int, on_gpu: bool) -> tuple[str, str]:
    """Memory, and whether that fits. What would never fit is not counted: that takes seconds."""
    from bilevel_fast.profiling.memory import largest_micro_batch

    if (least := fitting.standing()) > has:
        return f"> {_size(least)}", "does not fit: weights and moments alone"
    whole = fitting.wanted(batch)
    if whole.total <= has:
        return _size(whole.total), _FITS
    if size := largest_micro_batch(whole, has):
        return _size(whole.total), f"fits as micro-batches of {size}" + (
            "" if on_gpu else f": --lower.micro-batch {size}"
        )
    return _size(whole.total), f"does not fit: one image at a time wants {_size(fitting.wanted(batch, 1).total)}"


def _environment(report: Report) -> Iterator[Line]:
    for name, value in sorted(os.environ.items()):
        if name.startswith("BILEVEL_FAST_"):
            yield name, f"{value!r}: {VARIABLES.get(name) or f'nobody reads it{nearest(name, VARIABLES)}'}"


def _size(count: int) -> str:
    return f"{count / _GIB:.1f} GiB" if count >= _GIB / 10 else f"{count / 2**20:.0f} MiB"


def _one_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
