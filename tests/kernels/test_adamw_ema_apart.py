"""AdamW by gradients that lie apart: the same bits as by one buffer that holds them."""

from importlib import import_module
from pathlib import Path

import pytest
import torch

from adamw_contract import BF16, F32, WRITTEN, Rule, bits, state
from bilevel_kernels.adamw_ema import AT_ONCE, Places, adamw_ema_, adamw_ema_apart
from mutants import mutated

module = import_module("bilevel_kernels.adamw_ema")  # the package's attribute of that name may be the function
SHAPES = [(8, 16), (3, 8), (40,), (2, 8, 5), (1032,)]  # the last is more than a block
SMALL = (2, 3)  # of five elements each: they stay in the buffer
GAP = 64


def laid_out(dtype, device, shapes=SHAPES):
    """Buffers, gradients that lie apart, their places, and where in the buffer they belong."""
    end, starts, apart = 0, [], []
    for number, shape in enumerate(shapes):
        size = torch.Size(shape).numel()
        if number not in SMALL:
            starts.append(end)
            apart.append(torch.randn(shape, device=device).to(dtype))
        end += -(-size // GAP) * GAP
    s = state(Rule(adamw_ema_, [(dtype, BF16)], device), end + 5)
    padding = torch.ones(end + 5, dtype=torch.bool)
    for start, t in zip(starts, apart, strict=True):
        padding[start : start + -(-t.numel() // GAP) * GAP] = False
    whole = torch.where(padding.to(device), s["g"], 0)
    for start, t in zip(starts, apart, strict=True):
        whole[start : start + t.numel()] = t.flatten()
    for start, t in zip(starts, apart, strict=True):  # garbage, which nobody may read
        s["g"][start : start + -(-t.numel() // GAP) * GAP] = float("nan")
    places = Places.of(end + 5, starts, [t.numel() for t in apart], torch.device(device))
    return s, whole, apart, places


def both(step, dtype, device, shapes=SHAPES):
    s, whole, apart, places = laid_out(dtype, device, shapes)
    settings = {name: s[name] for name in ("lr", "step", "clip", "skip")} | {"weight_decay": 0.2, "ema_decay": 0.9}
    found, wanted = ({name: s[name].clone() for name in WRITTEN} for _ in range(2))
    for to, gradient, more in ((wanted, whole, {}), (found, s["g"], {"apart": apart, "places": places})):
        run = step if more else adamw_ema_
        run(to["p"], gradient, to["m"], to["v"], ema=to["ema"], copy=to["copy"], **settings, **more)
    return found, wanted


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_same_bits_as_from_one_buffer(dtype, device):
    found, wanted = both(adamw_ema_, dtype, device)
    for name in WRITTEN:
        assert torch.equal(bits(found[name]), bits(wanted[name])), name


def test_more_than_a_launch_has_addresses_for(device):
    found, wanted = both(adamw_ema_, BF16, device, [(16,)] * (AT_ONCE + 9))
    assert torch.equal(bits(found["p"]), bits(wanted["p"]))


def test_is_a_well_formed_custom_op(device):
    s, _, apart, places = laid_out(BF16, device)
    s["g"].nan_to_num_()
    tables = (places.owner, places.starts, places.ends)
    given = [s[name] for name in ("m", "v", "ema", "copy", "lr", "step", "clip", "skip")]
    torch.library.opcheck(adamw_ema_apart, (s["p"], s["g"], apart, *given, *tables, 0.9, 0.999, 1e-8, 0.1, 0.9))


@pytest.mark.parametrize(
    ("starts", "sizes", "message"),
    [
        ([32], [8], "8 elements at 32 of 128: expected a multiple of 8 at one of 64"),
        ([64], [12], "12 elements at 64 of 128"),
        ([64], [72], "72 elements at 64 of 128"),
        ([0, 64], [72, 8], "overlap: one ends at 72, the next starts at 64"),
    ],
)
def test_refuses_places(starts, sizes, message):
    with pytest.raises(ValueError, match=message):
        Places.of(128, starts, sizes, torch.device("cpu"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda apart: apart[1:], "apart: 2 gradients do not fit the 3 places"),
        (lambda apart: [apart[0].float(), *apart[1:]], "apart: torch.float32 on cpu at 0, g is torch.bfloat16 on cpu"),
        (lambda apart: [torch.zeros(129, dtype=BF16)[1:], *apart[1:]], "apart: torch.bfloat16 on cpu at 1"),
    ],
)
def test_refuses_gradients(change, message):
    s, _, apart, places = laid_out(BF16, "cpu")
    with pytest.raises(ValueError, match=message):
        adamw_ema_(*(s[n] for n in "pgmv"), lr=s["lr"], step=s["step"], apart=change(apart), places=places)


# none of these leads a load out of the memory of its tensor, where anything may happen
BUGS = {
    "the end comes too soon": ("there = offs < end if WHOLE", "there = offs < end - 8 if WHOLE"),
    "and in the last block": ("else (offs < end) & (offs < n)", "else (offs < end - 8) & (offs < n)"),
    "the first addresses again": ("group = sources[first : first + AT_ONCE]", "group = sources[:AT_ONCE]"),
    "no place of its own": ("tl.load(shift_ptr + owner)", "tl.load(shift_ptr + owner * 0)"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug, device, tmp_path):
    mutant = mutated(Path(module.__file__), *BUGS[bug], tmp_path)
    found, wanted = both(mutant.adamw_ema_, BF16, device, [*SHAPES, *[(16,)] * AT_ONCE])
    assert not torch.equal(bits(found["p"]), bits(wanted["p"]))
