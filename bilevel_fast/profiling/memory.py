"""How much memory a training takes on one GPU, and the largest batch that fits, without a GPU.

    memory = estimate(structure, latent=64, text=77, batch=16)
    print(describe(memory, bytes_of_card=24 * 2**30))

Parameters, gradients and moments are what `FlatParameters` and the two AdamWs allocate. Activations are counted and not
guessed: a step runs on the meta device, where tensors have sizes and no memory, and every storage is weighed from birth
to death. What is alive after each allocation grows with the images by the same bytes per image, so steps are counted at
two sizes, and each moment of a step of any size lies on the line through its two counts.

Not counted: fragmentation, and what libraries allocate for themselves (`OUTSIDE`, an assumption). Ops are torch's own;
our Triton ops keep less.
"""

import weakref
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bilevel_fast.base.errors import UserError
from bilevel_fast.data.batch import Batch
from bilevel_fast.models.structure import Structure
from bilevel_fast.models.unet import Prediction
from bilevel_fast.profiling.cost import AsOnGPU
from bilevel_fast.profiling.meta_steps import Steps, random_batch
from bilevel_fast.scale.rows import buckets
from bilevel_fast.training.features import Heard, listening
from bilevel_fast.training.lower import Answered
from bilevel_fast.training.settings import LossWeights
from bilevel_fast.training.sharded import IN_FLIGHT
from bilevel_fast.training.units import lay_out, most_open

OUTSIDE = 2**30
"""Bytes of the CUDA context, of loaded kernels and of cuDNN's and cuBLAS's workspaces. An assumption, not a count."""

COUNTED_AT = (8, 24)
"""Batch sizes at which activations are counted."""

_GIB = 2**30
_USUAL = LossWeights()


@dataclass(frozen=True)
class Setting:
    """What is trained, and how.

    Attributes:
        structure: Of the student; the teacher is dense.
        latent: Height and width of the latents.
        text: Text tokens.
        precision: What the networks compute in; masters and moments are fp32.
        recompute: See `UNet.recompute`.
        ema: Whether a moving average of the student is kept.
        upper: Whether there is an upper level: moments of its own, and the teacher asked for two batches at once. Its
            batch is the lower level's. An edit of weights has none of this, and no other need: it is as if there were
            no upper level.
        second: Whether the upper level holds its gradient while that of the penalty is computed, which is then weighed
            against it; a penalty that is added as it is (`raw`) needs no second gradient.
        start: Whether the eraser keeps a frozen copy of the student as the run starts, which computes.
        mask: Whether it keeps a byte for each parameter, as SalUn does.
        remembered: Whether it keeps the weights as they were and their Fisher information, both fp32.
        envelope: Whether there is a second copy of the masters, as MEHA's.
        eager: Whether its steps run as they are beside recorded lower steps: the memory of a CUDA graph serves nobody
            else, so they have activations of their own.
        align: As `UNet`; the engine pads to 8 on a GPU.
        weights: Of the lower loss: a term that compares what is inside the networks keeps it.
        in_parts: Whether weights, too, lie on all ranks in parts (`training.units`).
    """

    structure: Structure
    latent: int
    text: int
    precision: Literal["bf16", "fp32"] = "bf16"
    recompute: bool = False
    ema: bool = False
    upper: bool = True
    second: bool = True
    align: int = 8
    start: bool = False
    mask: bool = False
    eager: bool = False
    weights: LossWeights = field(default_factory=LossWeights)
    remembered: bool = False
    envelope: bool = False
    in_parts: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


@dataclass(frozen=True)
class Memory:
    """Bytes on the device, by what holds them, when a step holds the most."""

    setting: Setting
    batch: int
    micro: int
    """Images that are computed at once."""
    ranks: int
    """Processes with a card each, of which this is one."""
    leaves: int
    """Parts of the batch of all ranks together; `batch` is one of them."""
    weights: int
    """The student's fp32 masters, and the bf16 copy that computes."""
    gradients: int
    """And what several leaves are added up in."""
    moments: int
    ema: int
    eraser: int
    """Its frozen copy of the student, and its mask."""
    eager: int
    """The activations of upper steps that are not recorded, beside those of the lower ones."""
    teacher_weights: int
    teacher_activations: int
    """The teacher's answer to the lower batch, what was heard inside it, and the batch: kept for the upper level."""
    student_activations: int
    """What autograd keeps between forward and backward."""
    workspace: int
    """What else is alive at the peak: activations that come and go, a block that is recomputed, and `OUTSIDE`."""
    host: int
    """Not of the card and in none of its parts: pinned memory of the host that checkpoints are written from. A
    checkpoint takes nothing on the device."""

    @property
    def parts(self) -> dict[str, int]:
        """The fields in bytes by name; they sum up to `total`."""
        own = ("setting", "batch", "micro", "ranks", "leaves", "host")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in own}

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def estimate(
    structure: Structure,
    latent: int,
    text: int,
    batch: int,
    precision: Literal["bf16", "fp32"] = "bf16",
    recompute: bool = False,
    ema: bool = False,
    upper: bool = True,
    align: int = 8,
    start: bool = False,
    mask: bool = False,
    micro: int | None = None,
    eager: bool = False,
    second: bool = True,
    weights: LossWeights = _USUAL,
    ranks: int = 1,
    leaves: int = 1,
    remembered: bool = False,
    envelope: bool = False,
    in_parts: bool = False,
) -> Memory:
    """What a training of `structure` takes on one GPU; see `Setting` for the arguments.

    Args:
        batch: Images per step; of a leaf, where there are several.
        micro: Images that are computed at once; None: all of them.
        ranks: Processes that share the leaves, each with a GPU of its own.
        leaves: Equal parts of a batch, a multiple of `ranks`.

    Raises:
        UserError: `latent`, `text` or `batch` is not positive, or a term of `weights` finds nothing in the student.
    """
    if batch < 1:
        raise UserError(f"batch is {batch}, wanted at least 1")
    setting = Setting(
        *(structure, latent, text, precision, recompute, ema, upper, second, align, start, mask, eager, weights),
        remembered,
        envelope,
        in_parts,
    )
    return _line(setting).at(batch, micro, ranks, leaves)


def standing(structure: Structure, latent: int, text: int, **how: Any) -> int:
    """Bytes of `estimate` that are there whatever the batch: weights, moments, a gradient. Counts no step: it is fast.

    Args:
        how: Further fields of `Setting`.
    """
    return _line(Setting(structure, latent, text, **how)).standing()


def largest_micro_batch(memory: Memory, bytes_of_card: int) -> int:
    """The largest divisor of a batch with which it takes at most `bytes_of_card` as micro-batches of so many images.

    Args:
        memory: Of the whole batch.

    Returns:
        0 if not even micro-batches of one image fit.
    """
    line, batch = _line(memory.setting), memory.batch
    sizes = (size for size in range(batch, 0, -1) if batch % size == 0)
    shared = memory.ranks, memory.leaves
    return next((size for size in sizes if line.at(batch, size, *shared).total <= bytes_of_card), 0)


def largest_batch(
    structure: Structure,
    latent: int,
    text: int,
    bytes_of_card: int,
    precision: Literal["bf16", "fp32"] = "bf16",
    recompute: bool = False,
    ema: bool = False,
    upper: bool = True,
    align: int = 8,
    weights: LossWeights = _USUAL,
    ranks: int = 1,
) -> int:
    """The largest batch whose `estimate` is at most `bytes_of_card`; 0 if not even one image fits.

    With several ranks that is a leaf, one for each.
    """
    setting = Setting(structure, latent, text, precision, recompute, ema, upper, align=align, weights=weights)
    return _line(setting).largest(bytes_of_card, ranks)


def describe(memory: Memory, bytes_of_card: int | None = None) -> str:
    """A few lines for who runs out of memory: what wants how much, what the card has, and which batch would fit."""
    setting = memory.setting
    parts = sorted(((size, name) for name, size in memory.parts.items() if size), reverse=True)
    listed = ", ".join(f"{name.replace('_', ' ')} {size / _GIB:.1f}" for size, name in parts)
    how = setting.precision + ", recomputing" * setting.recompute
    parts_of = f" as micro-batches of {memory.micro}" if memory.micro < memory.batch else ""
    text = (
        f"batch {memory.batch}{parts_of} at latents of {setting.latent} x {setting.latent} ({how}) wants about "
        f"{memory.total / _GIB:.1f} GiB\n({listed}); checkpoints pin {memory.host / _GIB:.1f} GiB of the host's"
    )
    if bytes_of_card is None:
        return text
    found = _line(setting).largest(bytes_of_card, memory.ranks)
    text += f"\nthe card has {bytes_of_card / _GIB:.1f} GiB; " + _fits(found)
    if setting.recompute:
        return text
    found = _line(replace(setting, recompute=True)).largest(bytes_of_card, memory.ranks)
    return text + f"; with --recompute, {_fits(found)}"


def _fits(batch: int) -> str:
    return f"the largest batch that fits is {batch}" if batch else "not even one image fits"


@dataclass(frozen=True)
class _Activations:
    """Bytes that depend on the batch."""

    answered: int
    """The teacher's answer, and what was asked."""
    kept: int
    """Between forward and backward."""
    teaching: list[int]
    """After each allocation of the teacher's forward pass."""
    learning: list[int]
    """After each allocation of the student's forward and backward pass, with the gradients that backward leaves."""


_LINES: dict[str, "_Line"] = {}


def _line(setting: Setting) -> "_Line":
    """Counted once per process; a `Structure` has no hash."""
    key = repr(setting)
    if key not in _LINES:
        _LINES[key] = _Line(setting)
    return _LINES[key]


class _Line:
    """The memory of a setting as a function of the batch.

    Raises:
        UserError: Latents or text tokens are not positive.
    """

    def __init__(self, setting: Setting):
        if setting.latent < 1 or setting.text < 1:
            raise UserError(f"latents of {setting.latent} and {setting.text} text tokens, wanted at least 1 of each")
        self.setting = setting
        steps = Steps(
            *(setting.structure, setting.latent, setting.text, 1, torch.device("meta"), setting.dtype),
            *(setting.align, setting.ema, setting.weights),
        )
        steps.student.recompute = setting.recompute
        self._flat, self._fine_tuning = steps.flat, steps.fine_tuning

    @cached_property
    def _counts(self) -> tuple[_Activations, ...]:
        return tuple(self._count(batch) for batch in COUNTED_AT)

    def standing(self) -> int:
        flat, copies = self._flat, 1 + self.setting.upper
        separate = flat.compute is not flat.master
        average = 0 if flat.average is None else flat.average.nbytes
        own = flat.master.nbytes * (1 + 2 * copies) + flat.compute.nbytes * separate + flat.gradient.nbytes
        return own + average + self._held(flat.master.numel()) + self._teacher()

    def _teacher(self) -> int:
        return sum(p.nbytes for p in self._fine_tuning.answers.teacher.unet.parameters())

    def at(self, batch: int, micro: int | None = None, ranks: int = 1, leaves: int = 1) -> Memory:
        """For a leaf of so many images; `leaves` is at least `ranks`."""
        micro, leaves = micro or batch, max(leaves, ranks)
        memory = self._flat_at(batch, micro, ranks, leaves)
        return self._in_parts(memory, ranks) if self.setting.in_parts else memory

    def _in_parts(self, memory: Memory, ranks: int) -> Memory:
        """Where networks lie on all ranks in parts: of `memory`, what is otherwise then."""
        setting, width = self.setting, self.setting.dtype.itemsize
        networks = [self._flat.module, self._fine_tuning.answers.teacher.unet]
        held, whole, largest = list[int](), list[int](), 0
        for network, again in zip(networks, (setting.recompute, False), strict=True):
            _, cut = lay_out(network, dict(network.named_parameters()), ranks)
            held.append(sum(bucket.size for bucket in cut))
            whole.append(most_open(network, cut, again))
            largest = max(largest, *(ranks * bucket.size for bucket in cut))
        (rows, teacher), (student_open, teacher_open) = held, whole
        separate = setting.dtype != torch.float32
        copy = width * (rows + student_open) * setting.start
        # what a unit's gradients are sent from, and what comes
        on_way = 2 * (IN_FLIGHT + 1) * width * largest
        return replace(
            memory,
            weights=4 * rows + width * rows * separate + width * student_open,
            gradients=4 * rows * (1 + (setting.upper and setting.second)),
            moments=8 * rows * (1 + setting.upper),
            ema=4 * rows * setting.ema,
            eraser=copy,
            teacher_weights=width * (teacher + teacher_open),
            workspace=self._workspace(memory.micro, on_way, 0),
        )

    def _workspace(self, micro: int, on_way: int, updating: int) -> int:
        low, high = self._counts
        moments = [*zip(low.teaching, high.teaching, strict=True), *zip(low.learning, high.learning, strict=True)]
        peak = max(self._between(few, many, micro) for few, many in moments)
        return max(peak + on_way, updating) - self._between(low.kept, high.kept, micro) + OUTSIDE

    def _flat_at(self, batch: int, micro: int, ranks: int, leaves: int) -> Memory:
        flat, copies, width = self._flat, 1 + self.setting.upper, self.setting.dtype.itemsize
        rows = whole = flat.master.numel()
        own = flat.compute is not flat.master  # rows of what computes, written before they are sent
        gradient = flat.gradient.nbytes if micro == batch else flat.master.nbytes
        found = gradient  # by backward
        if shared := leaves > 1:
            each, rows = leaves // ranks, sum(bucket.size for bucket in buckets(whole, ranks))
            whole, gradient = ranks * rows, 4 * rows
            # of n leaves, log2(n) fp32 sums (`scale.rows.Counter`); what is on its way to other ranks takes the
            # place of gradients that it was made of
            found = whole * (width if micro == batch else 4) + 4 * whole * (each.bit_length() - 1)
        # torch's AdamW wants an fp32 copy of a bf16 gradient
        updating = flat.master.nbytes if gradient < 4 * rows else 0
        low, high = self._counts
        kept = self._between(low.kept, high.kept, micro)
        moments = [*zip(low.teaching, high.teaching, strict=True), *zip(low.learning, high.learning, strict=True)]
        peak = max(self._between(few, many, micro) for few, many in moments)
        return Memory(
            setting=self.setting,
            batch=batch,
            micro=micro,
            ranks=ranks,
            leaves=leaves,
            weights=4 * rows + width * whole * (own or shared) + width * rows * (own and shared),
            gradients=gradient * (self.setting.upper and self.setting.second) + gradient * shared + found,
            moments=8 * rows * copies,
            ema=4 * rows * self.setting.ema,
            eraser=self._held(rows),
            eager=peak * self.setting.eager,
            teacher_weights=self._teacher(),
            teacher_activations=self._between(low.answered, high.answered, batch * leaves // ranks),
            student_activations=kept,
            workspace=self._workspace(micro, 0, updating),
            host=self._pinned(),
        )

    def _pinned(self) -> int:
        """By `training.saver.Pinned`: masters, moments, average, mask and envelope, each rounded up to a power of 2."""
        flat, copies = self._flat, 1 + self.setting.upper
        sizes = [flat.master.nbytes] * (1 + 2 * copies + self.setting.ema + self.setting.envelope)
        sizes += [flat.master.numel()] * self.setting.mask
        return sum(1 << (size - 1).bit_length() for size in sizes)

    @staticmethod
    def _between(few: int, many: int, images: int) -> int:
        """Bytes at a number of images, from those at both of `COUNTED_AT`."""
        first, last = COUNTED_AT
        return few + (many - few) * (images - first) // (last - first)

    def _held(self, rows: int) -> int:
        copy = sum(p.numel() for p in self._flat.module.parameters()) * self.setting.dtype.itemsize
        fp32 = 2 * self.setting.remembered + self.setting.envelope
        return copy * self.setting.start + rows * self.setting.mask + 4 * rows * fp32

    def largest(self, bytes_of_card: int, ranks: int) -> int:
        def fit(batch: int) -> bool:
            return self.at(batch, ranks=ranks).total <= bytes_of_card

        if not fit(1):
            return 0
        fits, too_large = 1, 2
        while fit(too_large):
            fits, too_large = too_large, 2 * too_large
        while too_large - fits > 1:
            middle = (fits + too_large) // 2
            fits, too_large = (middle, too_large) if fit(middle) else (fits, middle)
        return fits

    def _count(self, batch: int) -> _Activations:
        """A lower step and the teacher's part of an upper one, on the meta device."""
        answers, given = self._fine_tuning.answers, self._batch(batch)
        asked = self._batch(batch * (1 + self.setting.upper))
        both, noised = answers.noise(asked), answers.noise(given)
        with _Weighing() as teaching:
            answer = answers.teacher.predict(both, asked.text)
        answer = Prediction(_first(answer.out, batch), tuple(_first(block, batch) for block in answer.blocks))
        heard: Heard = {}
        if answers.listens:
            with _Weighing(), listening(answers.teacher.unet, answers.listens) as heard:
                answer = answers.teacher.predict(noised, given.text)
        free = answers.unprompted(noised, given)
        answered = Answered(noised, given.text, answer, heard, *free)
        held = (answer.out, *answer.blocks, *heard.values(), *(t for t in free if t is not None))
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in held}  # some are one
        inputs = (noised.x, noised.t, noised.target, noised.weight, given.text)
        sent = self._flat.module.parameters() if self.setting.in_parts else ()
        leave = [p.register_post_accumulate_grad_hook(_forget) for p in sent]
        with _Weighing() as learning:
            loss = self._fine_tuning.loss(answered).total
            kept = learning.now
            loss.backward()
        for handle in leave:
            handle.remove()
        self._flat.collect()
        weighed = sum(storages.values()) + sum(t.nbytes for t in inputs)
        return _Activations(weighed, kept, teaching.history, learning.history)

    def _batch(self, images: int) -> Batch:
        setting = self.setting
        return random_batch(setting.structure.config, setting.latent, setting.text, images, torch.device("meta"))


def _forget(p: Tensor) -> None:
    """Its gradient is sent and gone."""
    p.grad = None


def _first(x: Tensor, batch: int) -> Tensor:
    return torch.empty_like(x[:batch], memory_format=torch.channels_last)


class _Weighing(AsOnGPU):
    """Follows the bytes of all storages that are made within, until they die.

    Attributes:
        now: Bytes alive.
        history: The same, after each allocation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now, self.history = 0, list[int]()
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func.is_view:
            return out
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in given:
                self._meet(t.untyped_storage())
        return out

    def _meet(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive:
            self._alive.add(key)
            self.now += size
            self.history.append(self.now)
            weakref.finalize(storage, self._part, key, size)

    def _part(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size
