"""Both steps on a GPU that is not there: tensors have a device and no data.

torch checks then that all operands of an op are on one device, and raises where a step would read one back or bring one
over. Backward is left out: autograd's own thread wants a real device.
"""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bilevel_fast.erasing.references import Itself
from bilevel_fast.erasing.registry import holder
from bilevel_fast.erasing.saliency import EraseDiff, SalUn
from bilevel_fast.erasing.targets import ConceptAblation, Guidance
from bilevel_fast.models.diffusion import Schedule
from bilevel_fast.ops import dispatch, providers
from bilevel_fast.training.levels import Level, move
from bilevel_fast.training.lower import Answers, FineTuning
from bilevel_fast.training.optim import AdamW, LevelOptimizer
from bilevel_fast.training.parameters import FlatParameters
from bilevel_fast.training.saver import Pinned
from bilevel_fast.training.student import StudentTraining
from bilevel_fast.training.teacher import Teacher
from bilevel_fast.training.upper import Suppression
from world import ETA, SEED, make_batch, make_models


class OnOneDevice(TorchDispatchMode):
    """Every op takes from the GPU and gives to it; numbers from Python may come from the CPU, as 0-dim tensors."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # torch has no stand-in for its fused AdamW, which returns nothing
        fused = func.overloadpacket is torch.ops.aten._fused_adamw_
        out = None if fused else func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.dim()]
        devices = {x.device.type for x in (*tensors, *tree_leaves(out)) if isinstance(x, torch.Tensor)}
        assert devices <= {"cuda"}, f"{func}: {devices}"
        self.seen += 1
        return out


def on_gpu(unet, dtype):
    for module in unet.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                there = torch.empty_strided(p.shape, p.stride(), device="cuda", dtype=dtype)
                module._parameters[name] = nn.Parameter(there)
    return unet


ERASERS = {
    "guidance": lambda teacher, student, flat: Guidance(ETA),
    "concept-ablation": lambda teacher, student, flat: ConceptAblation(teacher, 1.0),
    "erasediff": lambda teacher, student, flat: EraseDiff(student, 0.5),
}


@pytest.fixture
def levels(monkeypatch, request):
    """Both levels in bf16, with moving average, clipping and penalty, and a batch of each."""
    monkeypatch.setattr(providers, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(dispatch, "_backends", lambda device: nullcontext())  # torch would ask the card about cuDNN
    provider, _, name = request.param.partition(" ")
    monkeypatch.setenv("BILEVEL_FAST_OPS", provider)
    teacher, student = make_models()

    def backward(loss):
        """Autograd has no thread for a card that is not there."""
        for p in student.parameters():
            p.grad = torch.empty_like(p)

    monkeypatch.setattr("bilevel_fast.training.lower.backward", backward)
    batches = [make_batch(level, 0).drawn(SEED, 1000) for level in (0, 1)]
    with FakeTensorMode():
        flat = FlatParameters(on_gpu(student, torch.float32), torch.bfloat16, average=True)
        schedule = replace(Schedule.sd(), alphas_cumprod=torch.empty(1000, device="cuda"))
        answers = Answers(Teacher(on_gpu(teacher, torch.bfloat16)), schedule, SEED)
        fine_tuning = FineTuning(flat, answers)
        eraser = ERASERS[name or "guidance"](answers.teacher, Itself(student), flat)
        hold, surgery = holder(flat, "esd-x"), name == "concept-ablation"
        gradients = (fine_tuning, Suppression(fine_tuning, eraser, 1.0, "grad", hold=hold, surgery=surgery))
        both = []
        for name, gradient, batch in zip(("lower", "upper"), gradients, batches, strict=True):
            optimizer = LevelOptimizer(flat, 1e-3, 4, clip_norm=1.0, make=lambda flat: AdamW(flat, 0.99))
            there = batch.map(lambda x: torch.empty(x.shape, dtype=x.dtype, device="cuda"))
            both.append((Level(name, lambda step, there=there: there, gradient, optimizer), there))
        yield both


@pytest.mark.parametrize("levels", ["torch", "triton", "torch concept-ablation", "torch erasediff"], indirect=True)
def test_a_step_stays_on_its_device_and_reads_nothing_back(levels):
    for _ in range(2):
        for level, batch in levels:
            with OnOneDevice() as watch:
                terms = move(level, batch)
            assert watch.seen > 100
            assert {term.device.type for term in terms.values()} == {"cuda"}


class NothingOnTheGPU(TorchDispatchMode):
    """No op makes a tensor there: views, and copies to the host, are all there is."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(out):
            made = isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in given and t.numel()
            assert not made or t.device.type == "cpu", func
        return out


@pytest.mark.parametrize("levels", ["torch"], indirect=True)
def test_a_checkpoint_takes_nothing_on_the_device(levels):
    (lower, _), (upper, _) = levels
    flat = lower.optimizer.flat
    mask = SalUn(Itself(flat.module), flat, torch.empty_like(flat.master, dtype=torch.bool))
    training = StudentTraining(lower, replace(upper, eraser=mask), 2, torch.device("cpu"), graphs=False)
    with NothingOnTheGPU():
        optimizers = {name: optimizer.state_dict() for name, optimizer in training.optimizers.items()}
        tensors = [t for t in tree_leaves((flat.state_dict(), optimizers, training.extras())) if torch.is_tensor(t)]
        copies, _ = (snapshot := Pinned(torch.device("cpu")))(tensors)
    assert {t.device.type for t in tensors} == {"cuda"}
    assert {t.device.type for t in copies} == {"cpu"}
    size = flat.master.nbytes
    assert sorted(b.nbytes for b in snapshot._buffers if b.nbytes > 8) == [size // 4, *[size] * 6]
    with pytest.raises(AssertionError, match="clone"), NothingOnTheGPU():
        flat.master.clone()


@pytest.mark.parametrize("levels", ["torch"], indirect=True)
@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (lambda batch: batch.text.sum().item(), DataDependentOutputException),
        (lambda batch: batch.text.cpu(), AssertionError),
        (lambda batch: torch.zeros(3) + batch.t, (RuntimeError, AssertionError)),
    ],
    ids=["item", "to the host", "two devices"],
)
def test_what_would_wait_is_seen(levels, bad, error):
    """The same, with each of the mistakes that this is here to find."""
    level, batch = levels[0]
    real = level.gradient
    broken = replace(level, gradient=lambda batch: (bad(batch), real(batch))[1])
    with pytest.raises(error), OnOneDevice():
        move(broken, batch)
