"""`profiling.memory`: parts against what is really allocated, activations against hooks, and the largest batch."""

import math
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from bilevel_fast.base.devices import Ranks
from bilevel_fast.base.errors import UserError
from bilevel_fast.erasing.references import Start
from bilevel_fast.erasing.saliency import SalUn
from bilevel_fast.models.architecture import MINI, SD21
from bilevel_fast.models.diffusion import Noised
from bilevel_fast.models.structure import Structure
from bilevel_fast.models.unet import UNet
from bilevel_fast.profiling.cost import AsOnGPU
from bilevel_fast.profiling.memory import (
    COUNTED_AT,
    OUTSIDE,
    Setting,
    _Line,
    _line,
    _Weighing,
    describe,
    estimate,
    largest_batch,
)
from bilevel_fast.scale.team import Team
from bilevel_fast.training import units
from bilevel_fast.training.features import listened_to, listening
from bilevel_fast.training.fully_sharded import FullyShardedParameters
from bilevel_fast.training.losses import DEFAULT_WEIGHTS, LossWeights, fine_tuning_loss
from bilevel_fast.training.optim import AdamW
from bilevel_fast.training.parameters import FlatParameters
from bilevel_fast.training.saver import Pinned
from bilevel_fast.training.sharded import ShardedParameters
from bilevel_fast.training.units import Units

PRUNED = Structure.uniform(MINI, 0.6)
SIZES = (MINI.sample_size, 12)
mini = partial(estimate, PRUNED, *SIZES)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("align", [1, 8])
def test_what_does_not_depend_on_the_batch_is_what_the_engine_allocates(precision, align):
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    flat = FlatParameters(UNet(MINI, PRUNED, align), dtype, average=True)
    moments = [m for rule in (AdamW(flat), AdamW(flat)) for m in (rule.first, rule.second)]
    memory = mini(4, precision=precision, ema=True, align=align)

    def allocated(*tensors):
        return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    assert memory.weights == allocated(flat.master, flat.compute)
    assert memory.gradients == 2 * allocated(flat.gradient)
    assert memory.moments == allocated(*moments)
    assert flat.average is not None
    assert memory.ema == allocated(flat.average)
    assert memory.teacher_weights == allocated(*UNet(MINI).to(dtype).parameters())
    assert mini(4, precision=precision, ema=True, align=align, second=False).gradients == memory.gradients // 2
    single = mini(4, precision=precision, upper=False, align=align)
    assert (single.gradients, single.moments, single.ema) == (memory.gradients // 2, memory.moments // 2, 0)


def step(batch, recompute=False, weights=DEFAULT_WEIGHTS):
    """A student's loss on the meta device, in bf16; the teacher's answers, also from inside, are tensors of their own.

    Returns:
        What the teacher answers, what was heard inside it, the loss.
    """
    with torch.device("meta"):
        student, teacher = UNet(MINI, PRUNED, 8).bfloat16(), UNet(MINI).bfloat16()
        latents, text = torch.empty(batch, 12, *SIZES[:1] * 2), torch.empty(batch, 12, 64)
        t, weight = torch.empty(batch, dtype=torch.int64), torch.empty(batch)
    student.recompute, names = recompute, listened_to(student, weights)
    with torch.no_grad(), AsOnGPU(), listening(teacher, names) as told:
        answer = teacher(latents, t, text)
    noised = Noised(latents, t, torch.empty_like(latents), weight)

    def loss():
        with listening(student, names) as heard:
            out = student(latents, t, text)
        return fine_tuning_loss(out, answer, noised, weights, heard, told).total

    return answer, told, loss


def saved_bytes(call: Callable[[], Tensor]) -> int:
    """Bytes of the distinct storages that autograd keeps between a forward pass and its backward pass.

    Whole storages count, as that is what stays allocated, and those of `nn.Parameter`s do not. What the caller keeps
    (targets, say) counts as far as autograd keeps it as well.

    Args:
        call: Computes the forward pass and returns what backward would be called on.
    """
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(t: Tensor) -> Tensor:
        if not isinstance(t, nn.Parameter):
            storage = t.untyped_storage()
            kept[storage._cdata] = storage
        return t

    with AsOnGPU(), saved_tensors_hooks(pack, lambda t: t):
        out = call()
    parameters = {p.untyped_storage()._cdata for p in _leaves(out) if isinstance(p, nn.Parameter)}
    return sum(s.nbytes() for key, s in kept.items() if key not in parameters)


def _leaves(out: Tensor) -> Iterator[Tensor]:
    """The leaves of the graph behind a tensor."""
    waiting, seen = [out.grad_fn], {None, out.grad_fn}
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        if hasattr(node, "variable"):
            yield node.variable
        new = {following for following, _ in node.next_functions} - seen
        seen |= new
        waiting += new


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("term", [None, "self_attention", "layer"])
def test_activations_are_those_that_autograd_keeps(recompute, term):
    """By hooks of autograd, and by weighing all that is alive: two ways to the same bytes. With each lower loss."""
    weights = LossWeights(**({term: 1.0} if term else {}))
    answer, told, loss = step(5, recompute, weights)
    memory = mini(5, recompute=recompute, weights=weights)
    # the hooks see the batch's SNR weights as well, which the engine holds with the answer; it holds the loss besides
    scalars = memory.student_activations - saved_bytes(loss)
    assert abs(scalars) < 256
    held = {t.untyped_storage()._cdata: t.numel() for t in (answer.out, *answer.blocks, *told.values())}
    inputs = 2 * 12 * 16 * 16 * 4 + 8 + 4 + 12 * 64 * 4
    assert memory.teacher_activations == 2 * sum(held.values()) + 5 * inputs
    assert bool(term) == bool(told)
    if term:
        usual = mini(5, recompute=recompute)
        assert memory.teacher_activations > usual.teacher_activations
        assert memory.student_activations > usual.student_activations


@pytest.mark.parametrize(("precision", "recompute"), [("bf16", False), ("bf16", True), ("fp32", False)])
def test_the_line_goes_through_every_batch(recompute, precision):
    line = _Line(Setting(PRUNED, *SIZES, precision=precision, recompute=recompute))
    for batch in (61, 200):
        counted, on_line = line._count(batch), line.at(batch)
        assert on_line.student_activations == counted.kept
        assert on_line.teacher_activations == counted.answered
        peak = max(*counted.learning, *counted.teaching, line._flat.master.nbytes * (precision == "bf16"))
        assert on_line.workspace + on_line.student_activations - OUTSIDE == peak
    assert len(set(COUNTED_AT)) == 2


def test_more_takes_more():
    totals = [mini(batch).total for batch in (1, 2, 8, 64, 256)]
    assert totals == sorted(set(totals))
    base = mini(64)
    assert mini(64, recompute=True).total < base.total
    assert mini(64, recompute=True).student_activations < base.student_activations / 3
    assert mini(64, ema=True).total - base.total == mini(64, ema=True).ema > 0
    assert mini(64, upper=False).total < base.total < mini(64, precision="fp32").total
    assert estimate(Structure.dense(MINI), *SIZES, 64).total > base.total
    assert estimate(PRUNED, 2 * SIZES[0], 12, 64).student_activations > 4 * 0.9 * base.student_activations
    assert base.total == sum(base.parts.values())
    assert set(base.parts) == {
        "weights", "gradients", "moments", "ema", "eraser", "eager", "teacher_weights", "teacher_activations",
        "student_activations", "workspace",
    }  # fmt: skip


def test_what_an_eraser_holds():
    """A frozen copy as `references.Start` makes it, and a mask as SalUn does."""
    student = UNet(MINI, PRUNED, 8)
    copy = Start(student, torch.bfloat16)
    size = sum(p.nbytes for p in copy.unet.parameters())
    assert mini(4, start=True).total - mini(4).total == mini(4, start=True).eraser == size
    flat = FlatParameters(student, torch.bfloat16)
    mask = SalUn(copy, flat, torch.ones_like(flat.master, dtype=torch.bool)).still
    assert mini(4, start=True, mask=True).eraser == size + mask.nbytes
    assert mini(4).eraser == 0


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(
    ("world", "leaves", "split"), [(2, 2, False), (3, 3, True), (2, 8, False), (1, 4, True), (1, 3, False)]
)
def test_what_a_rank_holds_is_what_sharded_parameters_allocate(precision, world, leaves, split):
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    team = Team(Ranks(0, world))
    flat = ShardedParameters(UNet(MINI, PRUNED, 8), dtype, average=True, summed=split, team=team, leaves=leaves)
    moments = [m for rule in (AdamW(flat), AdamW(flat)) for m in (rule.first, rule.second)]
    for _ in range(leaves // world):
        total = flat._counter.add(flat.local)
    sums = [] if total is flat.local else list(flat._counter._free)
    memory = mini(4, micro=2 if split else None, precision=precision, ema=True, ranks=world, leaves=leaves)

    def allocated(*tensors):
        return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    assert memory.weights == allocated(flat.master, flat.compute, flat.rows)
    assert memory.gradients == 2 * allocated(flat.gradient) + allocated(flat.local, *sums)
    assert memory.moments == allocated(*moments)
    assert flat.average is not None
    assert memory.ema == allocated(flat.average)
    alone, each = mini(4, micro=2, precision=precision, ema=True), leaves // world
    assert memory.teacher_activations == each * alone.teacher_activations
    assert memory.student_activations == mini(2 if split else 4, precision=precision).student_activations


def test_what_a_rank_holds_where_networks_lie_in_parts(monkeypatch):
    monkeypatch.setattr(units, "SMALL", 10**5)
    dtype, world, team = torch.bfloat16, 3, Team(Ranks(0, 3))
    flat = FullyShardedParameters(UNet(MINI, PRUNED, 8), dtype, average=True, team=team, leaves=world)
    teacher = UNet(MINI)
    held = Units.frozen(teacher, dict(teacher.named_parameters()), torch.device("cpu"), dtype, team)
    memory, whole = (mini(4, in_parts=on, ema=True, ranks=world, leaves=world) for on in (True, False))

    def opened(found):
        first, *others = (unit.buffer.numel() * unit.buffer.element_size() for unit in found.units)
        assert len(others) > 8
        return first + sum(sorted(others)[-4:])

    def own(found):
        return sum(unit.own.nbytes for unit in found.units)

    assert memory.weights == flat.master.nbytes + own(flat._units) + opened(flat._units)
    assert memory.teacher_weights == own(held) + opened(held)
    assert memory.gradients == 2 * flat.gradient.nbytes
    assert memory.moments == 4 * flat.master.nbytes
    assert memory.ema == flat.average.nbytes
    assert memory.student_activations == whole.student_activations
    gradients = sum(p.numel() for p in flat.module.parameters()) * dtype.itemsize
    left = [_line(found.setting)._counts[0].learning[-1] for found in (whole, memory)]
    assert left[0] - left[1] > gradients / 2, "those of the units before are gone"


def test_checkpoints_pin_memory_of_the_host_and_take_none_of_the_card():
    flat = FlatParameters(UNet(MINI, PRUNED, 8), torch.bfloat16, average=True)
    rules = [AdamW(flat), AdamW(flat)]
    state = [flat.state_dict(), flat.state_dict(flat.average), *(rule.state_dict() for rule in rules)]
    mask = flat.state_dict(torch.ones_like(flat.master, dtype=torch.bool))
    (snapshot := Pinned(torch.device("cpu")))([t for t in tree_leaves((state, mask)) if t.dim()])
    memory = mini(4, ema=True, mask=True)
    assert memory.host == sum(2 ** math.ceil(math.log2(b.nbytes)) for b in snapshot._buffers)
    assert memory.total == sum(memory.parts.values())
    assert "host" not in memory.parts
    assert f"checkpoints pin {memory.host / 2**30:.1f} GiB of the host's" in describe(memory)


def test_upper_steps_that_are_not_recorded_have_activations_of_their_own():
    counted = _Line(Setting(PRUNED, *SIZES))._count(61)
    memory = mini(61, eager=True)
    assert memory.eager == memory.total - mini(61).total == max(*counted.learning, *counted.teaching)
    assert mini(61).eager == 0


@pytest.mark.parametrize("recompute", [False, True])
def test_largest_batch(recompute):
    for card in (mini(1, recompute=recompute).total, 2 * 2**30, 5 * 2**30 + 12345):
        found = largest_batch(PRUNED, *SIZES, card, recompute=recompute)
        assert found >= 1
        assert mini(found, recompute=recompute).total <= card < mini(found + 1, recompute=recompute).total
    assert largest_batch(PRUNED, *SIZES, mini(1).total - 1) == 0


def test_describe():
    memory = mini(4096)
    text = describe(memory, 4 * 2**30)
    largest = largest_batch(PRUNED, *SIZES, 4 * 2**30)
    most = largest_batch(PRUNED, *SIZES, 4 * 2**30, recompute=True)
    assert f"batch 4096 at latents of 16 x 16 (bf16) wants about {memory.total / 2**30:.1f} GiB" in text
    assert f"student activations {memory.student_activations / 2**30:.1f}" in text
    assert f"the card has 4.0 GiB; the largest batch that fits is {largest}; " in text
    assert text.endswith(f"with --recompute, the largest batch that fits is {most}")
    assert most > largest
    assert "recompute," not in describe(mini(9, recompute=True), 4 * 2**30)
    assert "not even one image fits" in describe(memory, 2**20)
    assert "card" not in describe(memory)
    assert mini(1).parts["ema"] == 0
    assert "ema" not in describe(mini(1))


def test_weighing():
    x = torch.zeros(8)
    with _Weighing() as scale:
        y = x + 1  # 32 bytes
        z = y.view(2, 4).t()
        assert (scale.now, max(scale.history)) == (32, 32)
        del y
        assert scale.now == 32  # its view lives on
        z = z.double()
        assert (scale.now, max(scale.history)) == (64, 96)
        x.add_(1)  # made outside
        assert (scale.now, max(scale.history)) == (64, 96)
        del z
    assert (scale.now, max(scale.history)) == (0, 96)


def test_sd21_takes_seconds():
    """And the numbers that can be worked out by hand: 865.9 M parameters in fp32 and bf16, four moments, a teacher."""
    start = time.process_time()
    memory = estimate(Structure.dense(SD21), 64, 77, 16)
    assert time.process_time() - start < 20
    n = 865_910_724
    assert memory.weights == pytest.approx(6 * n, rel=1e-3)
    assert memory.gradients == pytest.approx(4 * n, rel=1e-3)
    assert memory.moments == pytest.approx(16 * n, rel=1e-3)
    assert memory.teacher_weights == 2 * n


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((16, 12, 0), "batch is 0"), ((0, 12, 1), "latents of 0"), ((16, -1, 1), "-1 text tokens")],
)
def test_refusals(arguments, message):
    with pytest.raises(UserError, match=message):
        estimate(PRUNED, *arguments)
