import importlib
import inspect
from math import ceil

import pytest
import torch
import torch.nn.functional as F

from bilevel_kernels.kept import Kept
from mutants import mutated
from numerics import assert_no_worse_than_eager

op = importlib.import_module("bilevel_kernels.pruned_attention")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BATCH, HEADS = 3, 4
# queries, keys, head dimension
SHAPES = {
    "text": (37, 77, 16),
    "two tiles each way": (70, 70, 64),
    "a width that is no power of two": (9, 5, 20),
    "wide heads": (5, 40, 80),
    "one query": (1, 7, 40),
    "three parts": (520, 77, 16),  # of 192 queries in fp32, two of 320 in 16 bits; the last is shorter
    "two parts": (264, 20, 16),  # in fp32
}
LISTS = {
    "dense": None,
    "everything": Kept.same(HEADS, range(HEADS)),
    "two heads": Kept.same(HEADS, [1, 3]),
    "mixed": Kept.per_sample(HEADS, [[0], [1, 2, 3], [2]]),
}
NAMES = ("out", "dq", "dk", "dv")


def problem(device, dtype=torch.float32, shape=SHAPES["text"]):
    """q, k, v, and an upstream gradient that is 1 nowhere."""
    queries, keys, dim = shape
    return [torch.randn(BATCH, n, HEADS * dim).to(device, dtype) for n in (queries, keys, keys, queries)]


def run(fn, tensors, kept, heads=HEADS, **options):
    *inputs, dout = tensors
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = fn(*leaves, heads, kept=kept, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def assert_all_no_worse(fn, tensors, kept, **options):
    gold = run(op.pruned_attention_ref, [t.double() for t in tensors], kept, **options)
    eager = run(op.pruned_attention_ref, tensors, kept, **options)
    for values in zip(NAMES, run(fn, tensors, kept, **options), eager, gold, strict=True):
        assert_no_worse_than_eager(*values)


@pytest.mark.parametrize("kept", LISTS.values(), ids=LISTS.keys())
def test_no_worse_than_eager(kept, device):
    """In 16 bits the lists are read as in fp32: on a CPU, in the test of shapes only."""
    for dtype in DTYPES if device == "cuda" else DTYPES[:1]:
        assert_all_no_worse(op.pruned_attention, problem(device, dtype), kept)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_shapes(shape, dtype, device):
    assert_all_no_worse(op.pruned_attention, problem(device, dtype, shape), LISTS["mixed"])


def beside(tensors):
    """The same values as `problem`, q, k and v where one product puts them: thirds of one tensor, or k and v halves."""
    q, k, v, dout = tensors
    parts = [q, k, v] if q.shape == k.shape else [k, v]
    whole = torch.cat(parts, -1)
    return [*([q] if len(parts) == 2 else []), *whole.split(q.shape[-1], -1), dout]


def run_beside(fn, tensors, kept):
    """As `run`, with leaves that lie side by side."""
    *inputs, dout = beside(tensors)
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = fn(*leaves, HEADS, kept=kept)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


@pytest.mark.parametrize("kept", ["dense", "mixed"])
@pytest.mark.parametrize("shape", ["text", "two tiles each way", "two parts"])
def test_parts_of_one_product(shape, kept, device):
    """The same bits as apart, and gradients that lie side by side as the inputs do."""
    tensors = problem(device, shape=SHAPES[shape])
    apart, found = run(op.pruned_attention, tensors, LISTS[kept]), run_beside(op.pruned_attention, tensors, LISTS[kept])
    assert all(torch.equal(one, other) for one, other in zip(found, apart, strict=True))
    first, *others = found[1:] if shape == "two tiles each way" else found[2:]
    for i, other in enumerate(others, 1):
        assert other.data_ptr() == first.data_ptr() + i * first.shape[-1] * first.itemsize
        assert other.stride() == first.stride()


@pytest.mark.parametrize(
    ("shape", "old", "new"),
    [
        ("text", "kv_offs = b * S * KV_ROW + s[:, None] * KV_ROW + head * D + d[None, :]\n        kv_mask",
         "kv_offs = b * S * HEADS * D + s[:, None] * KV_ROW + head * D + d[None, :]\n        kv_mask"),
        ("two tiles each way", "constants |= {\"Q_ROW\": q.stride(1),", "constants |= {\"Q_ROW\": q.shape[2],"),
        ("two tiles each way", "*_parts(whole, dout.shape[2]), None", "*_parts(whole, dout.shape[2])[::-1], None"),
        ("two parts", "(b * S + s)[:, None] * KV_ROW + head", "(b * S + s)[:, None] * (HEADS * D) + head"),
    ],
)  # fmt: skip
def test_planted_bug_of_parts_is_found(shape, old, new, tmp_path, device):
    bug = mutated(op.__file__, old, new, tmp_path)
    tensors = problem(device, shape=SHAPES[shape])
    apart, found = run(op.pruned_attention, tensors, None), run_beside(bug.pruned_attention, tensors, None)
    assert not all(torch.equal(one, other) for one, other in zip(found, apart, strict=True))


def test_scale(device):
    assert_all_no_worse(op.pruned_attention, problem(device), None, scale=0.7)


@pytest.mark.parametrize("queries", [3, 264])
def test_one_key(device, queries):
    """A softmax over one key is 1: no gradient reaches q and k. Many queries are parted."""
    q, k, v, dout = problem(device, shape=(queries, 1, 16))
    out, dq, dk, dv = run(op.pruned_attention, [q, k, v, dout], None)
    torch.testing.assert_close(out, v.expand_as(out))
    torch.testing.assert_close(dv, dout.sum(1, keepdim=True))
    torch.testing.assert_close([dq, dk], [torch.zeros_like(q), torch.zeros_like(k)], rtol=0, atol=1e-5)


def extreme(device, sign):
    """Scores of some hundreds, all positive or all negative: their exponentials are infinite, or all zero, in fp32."""
    q, k, v, dout = problem(device)
    return [10 * q.abs(), sign * 10 * k.abs(), v, dout]


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("sign", [1, -1])
def test_large_scores_do_not_overflow(sign, device):
    """Backward takes p from the log-sum-exp, which at 500 has 4e-5 of rounding: as close as that, not as eager."""
    tensors = extreme(device, sign)
    gold = run(op.pruned_attention_ref, [t.double() for t in tensors], None)
    for mine, theirs in zip(run(op.pruned_attention, tensors, None), gold, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())


def test_gradients_are_those_of_the_sliced_model(device):
    tensors = problem(device)
    kept = LISTS["two heads"]
    mask = kept.mask(16, 1, tensors[0].device)[0]
    sliced = [t[..., mask].double().requires_grad_() for t in tensors[:3]]
    split = [t.unflatten(-1, (2, 16)).transpose(1, 2) for t in sliced]
    out = F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(-2)
    gold = [out, *torch.autograd.grad(out, sliced, tensors[3][..., mask].double())]
    for mine, theirs in zip(run(op.pruned_attention, tensors, kept), gold, strict=True):
        torch.testing.assert_close(mine[..., mask].double(), theirs, rtol=1e-4, atol=1e-5)
        assert not mine[..., ~mask].any(), "a dropped head is exactly 0"


def test_a_mixed_batch_is_each_sample_alone(device):
    tensors, kept = problem(device), LISTS["mixed"]
    mixed = run(op.pruned_attention, tensors, kept)
    for b in range(BATCH):
        alone = run(op.pruned_attention, [t[b : b + 1] for t in tensors], Kept.same(HEADS, kept.lists[kept.rows[b]]))
        for mine, of_mixed in zip(alone, mixed, strict=True):
            assert torch.equal(mine[0], of_mixed[b])


def test_dropped_heads_are_not_read(device):
    tensors, kept = problem(device), LISTS["two heads"]
    mask = kept.mask(16, 1, tensors[0].device)[0]
    clean = run(op.pruned_attention, tensors, kept)
    dirty = run(op.pruned_attention, [t.masked_fill(~mask, float("nan")) for t in tensors], kept)
    for one, two in zip(clean, dirty, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("shape", ["text", "two parts"])
def test_same_bits_twice(device, shape):
    tensors = problem(device, shape=SHAPES[shape])
    for one, two in zip(*(run(op.pruned_attention, tensors, LISTS["mixed"]) for _ in range(2)), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("queries", [1, 64, 65, 300, 1024, 4096])
@pytest.mark.parametrize("programs", [1, 7, 20, 40, 64, 65, 1000])
def test_parts_are_whole_blocks_and_fill_a_card(queries, block, programs):
    taken = op.part(queries, block, programs)
    parts = -(-queries // taken)
    assert 1 <= parts * programs <= max(programs, op.PROGRAMS)
    if parts > 1:
        assert taken % block == 0
        assert taken >= op.LEAST * block
    else:
        assert programs > op.PROGRAMS // 2 or queries < 2 * op.LEAST * block, "two parts would be better"


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(
    ("parts", "shape"), [(2, (150, 77, 40)), (3, (150, 7, 64)), (5, (300, 64, 64)), (3, (150, 65, 160))]
)
def test_any_number_of_parts(parts, shape, dtype, device, monkeypatch):
    """Queries are no whole blocks, and the last part is the shortest."""
    taken = []

    def part(queries, block, _):
        taken.append(ceil(ceil(queries / block) / parts) * block)
        return taken[-1]

    monkeypatch.setattr(op, "part", part)
    assert_all_no_worse(op.pruned_attention, problem(device, dtype, shape), LISTS["mixed"])
    assert [ceil(shape[0] / n) for n in taken] == [parts]


@pytest.mark.parametrize("dim", [16, 40, 64, 80, 128, 160, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_parts_are_no_more_bytes_than_what_they_are_made_of(dim, dtype):
    """Of one channel: dk and dv of a block of keys, written and read in fp32, and q and dout of the least part."""
    tiles = op.config(4096, dim, dtype, backward=True)
    assert 2 * 2 * 4 * tiles["BLOCK_N"] <= 2 * op.LEAST * tiles["BLOCK_M"] * dtype.itemsize


def test_parts_of_the_attention_over_text():
    """Stable Diffusion 2.1, 77 keys in two blocks, heads and queries of each level: where two images leave most of a
    card idle queries are parted, with 16 images they are not."""
    programs = {}
    for batch in (2, 16):
        for heads, queries in ((5, 4096), (10, 1024), (20, 256), (20, 64)):
            before = 2 * heads * batch
            programs[heads, queries, batch] = (before, before * -(-queries // op.part(queries, 64, before)))
    assert {key: after for key, (before, after) in programs.items() if after > before} == {
        (5, 4096, 2): 120, (10, 1024, 2): 120,
    }  # fmt: skip


def test_without_parts_nothing_is_added_up(device, monkeypatch):
    """One kernel makes dk and dv then, and parts change rounding only."""
    tensors = problem(device, shape=SHAPES["two parts"])
    parted = run(op.pruned_attention, tensors, LISTS["mixed"])
    monkeypatch.setattr(op, "PROGRAMS", 1)
    monkeypatch.setattr(op, "_pruned_attention_sum_kernel", None)
    whole = run(op.pruned_attention, tensors, LISTS["mixed"])
    for name, one, other in zip(NAMES, whole, parted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert torch.equal(one, other) == (name in ("out", "dq"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="tiles are counted in the interpreter")
@pytest.mark.parametrize("count", [1, 2, 4])
def test_masked_heads_cost_nothing(count, monkeypatch):
    """Matrix products that were executed: those of the kept heads and no more, sample by sample."""
    done = []
    real = op.dot
    monkeypatch.setattr(op, "dot", lambda *args: done.append(1) or real(*args))
    kept = Kept.per_sample(HEADS, [range(count), [3], [0]])
    run(op.pruned_attention, problem("cpu"), kept)
    tiles = {name: op.config(37, 16, torch.float32, backward=False)[name] for name in ("BLOCK_M", "BLOCK_N")}
    pairs = -(-37 // tiles["BLOCK_M"]) * -(-77 // tiles["BLOCK_N"])
    assert len(done) == (2 + 3 + 4) * pairs * (count + 2)


def test_well_formed_custom_ops(device):
    q, k, v, dout = (t.requires_grad_() for t in problem(device, shape=(4, 3, 16)))
    for kept in (None, LISTS["mixed"]):
        numbers = kept.encoded() if kept else []
        torch.library.opcheck(op.pruned_attention_fwd, (q, k, v, HEADS, 0.25, numbers))
        plain = [t.detach() for t in (dout, q, k, v)]
        out, lse = op.pruned_attention_fwd(*plain[1:], HEADS, 0.25, numbers)
        torch.library.opcheck(op.pruned_attention_bwd, (*plain, out, lse, HEADS, 0.25, numbers))


# what the planted bug replaces, by what
BUGS = {
    "keys past the last": ('score = tl.where((s < S)[None, :], score, float("-inf"))', "score = score"),
    "sums not shrunk": ("total = total * shrink + tl.sum(p, axis=1)", "total = total + tl.sum(p, axis=1)"),
    "natural logarithm": ("most + tl.log2(total)", "most + tl.log(total)"),
    "dq not scaled": ("(dq * scale)", "(dq)"),
    "dk scaled twice": ("(dk * scale)", "(dk * scale * scale)"),
    "no delta in dk": ("zeros, PRECISION) - delta[None, :])", "zeros, PRECISION))"),
    "no delta in dq": ("zeros, PRECISION) - delta[:, None])", "zeros, PRECISION))"),
    "position for head": ("head = tl.load(list_ptr + row * L + tl.program_id(1))", "head = tl.program_id(1)"),
    "list of the first sample": ("row = tl.load(row_ptr + tl.program_id(2))", "row = tl.load(row_ptr)"),
    "last queries left out of dk": ("range(0, PART, BLOCK_M)", "range(0, PART - 5, BLOCK_M)"),
    "dv of one tile": ("dout, dv, PRECISION)", "dout, dv * 0.0, PRECISION)"),
}  # fmt: skip


PART_BUGS = {
    "first part alone": ("for part in range(PARTS):", "for part in range(1):"),
    "parts on top of each other": ("(part * tl.num_programs(2) + b) * S * (HEADS", "b * S * (HEADS"),
    "parts of other samples": ("row = (part * tl.num_programs(2) + b) * S + s", "row = (part + b) * S + s"),
    "parts that overlap": ("part * PART\n", "part * (PART - BLOCK_M)\n"),
    "parts not scaled": ("(dk * scale)", "(dk)"),
    "a part too far": ("range(0, PART, BLOCK_M)", "range(0, PART + BLOCK_M, BLOCK_M)"),
    "dk for dv": ("dv += tl.load(dvs_ptr", "dv += tl.load(dks_ptr"),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="bugs are planted in the interpreter")
@pytest.mark.parametrize("bug", PART_BUGS.values(), ids=PART_BUGS.keys())
def test_notices_in_parts(bug, tmp_path):
    mutant = mutated(inspect.getfile(op), *bug, tmp_path)
    with pytest.raises(AssertionError, match=r"d[kv]: (error|\d+ non-finite)"):
        assert_all_no_worse(mutant.pruned_attention, problem("cpu", shape=SHAPES["two parts"]), None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="bugs are planted in the interpreter")
@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS.keys())
def test_notices(bug, tmp_path):
    mutant = mutated(inspect.getfile(op), *bug, tmp_path)
    with pytest.raises(AssertionError, match=r"(out|d[qkv]): (error|\d+ non-finite)"):
        assert_all_no_worse(mutant.pruned_attention, problem("cpu"), LISTS["mixed"])


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.skipif(torch.cuda.is_available(), reason="bugs are planted in the interpreter")
def test_notices_keys_past_the_last_in_dq(tmp_path):
    """They multiply zeros, but by infinity where all scores are very negative."""
    mutant = mutated(inspect.getfile(op), "p = tl.where((s < S)[None, :], p, 0.0)", "p = p", tmp_path)
    assert not run(mutant.pruned_attention, extreme("cpu", -1), None)[1].isfinite().all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda q, k, v, _: (q[0], k, v, HEADS), r"q: shape \(37, 64\), expected three dimensions"),
        (lambda q, k, v, _: (q.double(), k, v, HEADS), "q: torch.float64 is none of"),
        (lambda q, k, v, _: (q, k.half(), v, HEADS), "k: torch.float16 on cpu, q is torch.float32"),
        (lambda q, k, v, _: (q, k, v.to("meta"), HEADS), "v: torch.float32 on meta"),
        (lambda q, k, v, _: (q.mT.contiguous().mT, k, v, HEADS), r"q: strides \(2368, 1, 37\) .* are not contiguous"),
        (lambda q, k, v, _: (q[:, :1].expand(3, 2**25, 64), k, v, HEADS), r"q: a sample of .* has 2\*\*31 elements"),
        (lambda q, k, v, _: (q, k[:1], v[:1], HEADS), r"k: shape \(1, 77, 64\) does not fit q \(3, 37, 64\)"),
        (lambda q, k, v, _: (q, k, v[:, 1:].contiguous(), HEADS), r"v: shape \(3, 76, 64\), k has \(3, 77, 64\)"),
        (lambda q, k, v, _: (q, torch.cat([k, k], -1)[..., :64], v, HEADS), "strides of q .* do not fit each other"),
        (lambda q, k, v, _: (q, *torch.cat([k, k, v], -1).split(64, -1)[1:], HEADS), "strides of q .* do not fit"),
        (lambda q, k, v, _: (q, k, v, 5), "heads: 5 of 64 channels"),
        (lambda q, k, v, _: (q, k, v, 0), "heads: 0 of 64 channels"),
        (lambda q, k, v, _: (q, k, v, HEADS, Kept.same(5, [1])), "kept: lists of 5 units, there are 4 heads"),
        (lambda q, k, v, _: (q, k, v, HEADS, Kept.per_sample(4, [[0], [1]])), "kept: lists for 2 samples"),
    ],
)  # fmt: skip
def test_refuses(change, said):
    q, k, v, heads, *kept = change(*problem("cpu"))
    with pytest.raises(ValueError, match=f"^{said}"):
        op.pruned_attention(q, k, v, heads, kept=kept[0] if kept else None)
