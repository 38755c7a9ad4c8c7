"""Attention over the kept heads of packed dense projections, one list of heads for the batch or one for each sample.

    p = softmax(scale q k^T)        out = p v                                        for each kept head
    dv = p^T dout        ds = p (dout v^T - rowsum(dout out))        dq = scale ds k        dk = scale ds^T q

Why fused  heads are addressed where they lie: no gather, no copy, no (T, S) matrix in memory; a batch may mix experts,
           and a masked head is a program that ends at once, where eager computes all heads and multiplies by masks

Shapes     q: (B, T, N D); k, v: (B, S, N D) -> out: (B, T, N D); lse: (B, N, T) fp32, in powers of two
Dtypes     fp32 | fp16 | bf16, the same of all; softmax and sums in fp32; p and ds rounded to it before products.
Layout     contiguous; or q, k and v are thirds of one (B, T, 3 N D), or k and v halves of one (B, S, 2 N D), as one
           product makes them, and so are their gradients then
Numerics   online softmax; one pass over k for dq, one over q for dk and dv: no atomics, the same bits every run
Programs   of dk and dv: one for each block of keys, of which text has two; where these are too few for a card, each
           takes a part of the queries, and a further kernel adds up the parts in their order. How many parts there are
           depends on the batch and on the heads kept, and with it the rounding of dk and dv
Traffic    k and v once for every BLOCK_M queries; results are filled with zeros first where heads are dropped; parts
           are written and read once, in fp32: of whole blocks no more bytes than their programs read of q and dout
Source     FlashAttention-2, arXiv:2307.08691, algorithms 1 and 2
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bilevel_kernels.dot import dot, precision
from bilevel_kernels.kept import Kept, counts, decoded

KIND = "attention"

# --- reference ------------------------------------------------------------------------------


def pruned_attention_ref(
    q: Tensor, k: Tensor, v: Tensor, heads: int, *, kept: Kept | None = None, scale: float | None = None
) -> Tensor:
    """The formula, in the dtype of its inputs, all heads computed and masked: the oracle of the tests."""
    split = [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v)]
    scale = split[0].shape[-1] ** -0.5 if scale is None else scale
    p = torch.softmax(split[0] @ split[1].mT * scale, dim=-1)
    out = (p @ split[2]).transpose(1, 2).flatten(-2)
    if kept is None:
        return out
    return out * kept.mask(q.shape[-1] // heads, q.shape[0], q.device)[:, None, :]


# --- kernels --------------------------------------------------------------------------------


@triton.jit
def _head(
    list_ptr,  # (E, L) int32 or None
    count_ptr,  # (E,) int32
    row_ptr,  # (B,) int32
    HEADS: tl.constexpr,
    L: tl.constexpr,
):
    """The head of this program, and whether its sample keeps as many."""
    head, there = tl.program_id(1), True
    if list_ptr is not None:
        row = tl.load(row_ptr + tl.program_id(2))
        there = tl.program_id(1) < tl.load(count_ptr + row)
        head = tl.load(list_ptr + row * L + tl.program_id(1))
    return head, there


@triton.jit
def _pruned_attention_fwd_kernel(
    q_ptr,  # (B, T, HEADS * D), rows of Q_ROW
    k_ptr,  # (B, S, HEADS * D), rows of KV_ROW
    v_ptr,  # (B, S, HEADS * D), rows of KV_ROW
    out_ptr,  # (B, T, HEADS * D)
    lse_ptr,  # (B, HEADS, T) fp32
    list_ptr,  # (E, L) int32 or None, as the next two
    count_ptr,  # (E,) int32
    row_ptr,  # (B,) int32
    scale_log2,
    T: tl.constexpr,
    S: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    Q_ROW: tl.constexpr,
    KV_ROW: tl.constexpr,
    L: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    head, there = _head(list_ptr, count_ptr, row_ptr, HEADS, L)
    if there:
        b = tl.program_id(2).to(tl.int64)
        t, d = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
        q_offs = b * T * Q_ROW + t[:, None] * Q_ROW + head * D + d[None, :]
        q_mask = (t < T)[:, None] & (d < D)[None, :]
        q = tl.load(q_ptr + q_offs, mask=q_mask, other=0.0)
        most = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for start in range(0, S, BLOCK_N):
            s = start + tl.arange(0, BLOCK_N)
            kv_offs = b * S * KV_ROW + s[:, None] * KV_ROW + head * D + d[None, :]
            kv_mask = (s < S)[:, None] & (d < D)[None, :]
            k = tl.load(k_ptr + kv_offs, mask=kv_mask, other=0.0)
            v = tl.load(v_ptr + kv_offs, mask=kv_mask, other=0.0)
            score = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION) * scale_log2
            score = tl.where((s < S)[None, :], score, float("-inf"))
            more = tl.maximum(most, tl.max(score, axis=1))  # finite: a block has a key
            p = tl.exp2(score - more[:, None])
            shrink = tl.exp2(most - more)
            total = total * shrink + tl.sum(p, axis=1)
            acc = dot(p.to(v.dtype), v, acc * shrink[:, None], PRECISION)
            most = more
        offs = b * T * (HEADS * D) + t[:, None] * (HEADS * D) + head * D + d[None, :]
        tl.store(out_ptr + offs, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=q_mask)
        tl.store(lse_ptr + (b * HEADS + head) * T + t, most + tl.log2(total), mask=t < T)


@triton.jit
def _pruned_attention_dq_kernel(
    dout_ptr,  # (B, T, HEADS * D)
    q_ptr,  # (B, T, HEADS * D), rows of Q_ROW
    k_ptr,  # (B, S, HEADS * D), rows of KV_ROW
    v_ptr,  # (B, S, HEADS * D), rows of KV_ROW
    out_ptr,  # (B, T, HEADS * D)
    lse_ptr,  # (B, HEADS, T) fp32
    delta_ptr,  # (B, HEADS, T) fp32: rowsum(dout out), written here for the other kernel
    dq_ptr,  # (B, T, HEADS * D), rows of Q_ROW
    list_ptr,  # (E, L) int32 or None, as the next two
    count_ptr,  # (E,) int32
    row_ptr,  # (B,) int32
    scale,
    scale_log2,
    T: tl.constexpr,
    S: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    Q_ROW: tl.constexpr,
    KV_ROW: tl.constexpr,
    L: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    head, there = _head(list_ptr, count_ptr, row_ptr, HEADS, L)
    if there:
        b = tl.program_id(2).to(tl.int64)
        t, d = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
        q_offs = b * T * Q_ROW + t[:, None] * Q_ROW + head * D + d[None, :]
        q_mask = (t < T)[:, None] & (d < D)[None, :]
        q = tl.load(q_ptr + q_offs, mask=q_mask, other=0.0)
        offs = b * T * (HEADS * D) + t[:, None] * (HEADS * D) + head * D + d[None, :]
        dout = tl.load(dout_ptr + offs, mask=q_mask, other=0.0)
        out = tl.load(out_ptr + offs, mask=q_mask, other=0.0)
        row_offs = (b * HEADS + head) * T + t
        delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), axis=1)
        tl.store(delta_ptr + row_offs, delta, mask=t < T)
        lse = tl.load(lse_ptr + row_offs, mask=t < T, other=0.0)
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for start in range(0, S, BLOCK_N):
            s = start + tl.arange(0, BLOCK_N)
            kv_offs = b * S * KV_ROW + s[:, None] * KV_ROW + head * D + d[None, :]
            kv_mask = (s < S)[:, None] & (d < D)[None, :]
            k = tl.load(k_ptr + kv_offs, mask=kv_mask, other=0.0)
            v = tl.load(v_ptr + kv_offs, mask=kv_mask, other=0.0)
            zeros = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            p = tl.exp2(dot(q, tl.trans(k), zeros, PRECISION) * scale_log2 - lse[:, None])
            p = tl.where((s < S)[None, :], p, 0.0)
            ds = p * (dot(dout, tl.trans(v), zeros, PRECISION) - delta[:, None])
            dq = dot(ds.to(k.dtype), k, dq, PRECISION)
        tl.store(dq_ptr + q_offs, (dq * scale).to(dq_ptr.dtype.element_ty), mask=q_mask)


@triton.jit
def _pruned_attention_dkv_kernel(
    dout_ptr,  # (B, T, HEADS * D)
    q_ptr,  # (B, T, HEADS * D), rows of Q_ROW
    k_ptr,  # (B, S, HEADS * D), rows of KV_ROW
    v_ptr,  # (B, S, HEADS * D), rows of KV_ROW
    lse_ptr,  # (B, HEADS, T) fp32
    delta_ptr,  # (B, HEADS, T) fp32
    dk_ptr,  # (B, S, HEADS * D), rows of KV_ROW; of parts (parts, B, S, HEADS * D) fp32
    dv_ptr,  # as dk_ptr
    list_ptr,  # (E, L) int32 or None, as the next two
    count_ptr,  # (E,) int32
    row_ptr,  # (B,) int32
    scale,
    scale_log2,
    T: tl.constexpr,
    S: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    Q_ROW: tl.constexpr,
    KV_ROW: tl.constexpr,
    L: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PART: tl.constexpr,  # queries of a part, whole blocks; T if there is one
):
    head, there = _head(list_ptr, count_ptr, row_ptr, HEADS, L)
    if there:
        b = tl.program_id(2).to(tl.int64)
        block, first = tl.program_id(0), 0
        if PART < T:
            part = tl.program_id(0) // tl.cdiv(S, BLOCK_N)
            block, first = tl.program_id(0) % tl.cdiv(S, BLOCK_N), part * PART
        s, d = block * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
        kv_offs = b * S * KV_ROW + s[:, None] * KV_ROW + head * D + d[None, :]
        kv_mask = (s < S)[:, None] & (d < D)[None, :]
        k = tl.load(k_ptr + kv_offs, mask=kv_mask, other=0.0)
        v = tl.load(v_ptr + kv_offs, mask=kv_mask, other=0.0)
        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for start in range(0, PART, BLOCK_M):
            t = first + start + tl.arange(0, BLOCK_M)
            q_offs = b * T * Q_ROW + t[:, None] * Q_ROW + head * D + d[None, :]
            q_mask = (t < T)[:, None] & (d < D)[None, :]
            q = tl.load(q_ptr + q_offs, mask=q_mask, other=0.0)
            offs = b * T * (HEADS * D) + t[:, None] * (HEADS * D) + head * D + d[None, :]
            dout = tl.load(dout_ptr + offs, mask=q_mask, other=0.0)
            row_offs = (b * HEADS + head) * T + t
            lse = tl.load(lse_ptr + row_offs, mask=t < T, other=0.0)
            delta = tl.load(delta_ptr + row_offs, mask=t < T, other=0.0)
            zeros = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            # queries past the last are zeros with dout zero: p is 1 there, and multiplies zeros
            p = tl.exp2(dot(k, tl.trans(q), zeros, PRECISION) * scale_log2 - lse[None, :])
            dv = dot(p.to(dout.dtype), dout, dv, PRECISION)
            ds = p * (dot(v, tl.trans(dout), zeros, PRECISION) - delta[None, :])
            dk = dot(ds.to(q.dtype), q, dk, PRECISION)
        if PART < T:
            kv_offs = (
                (part * tl.num_programs(2) + b) * S * (HEADS * D) + s[:, None] * (HEADS * D) + head * D + d[None, :]
            )
        tl.store(dk_ptr + kv_offs, (dk * scale).to(dk_ptr.dtype.element_ty), mask=kv_mask)
        tl.store(dv_ptr + kv_offs, dv.to(dv_ptr.dtype.element_ty), mask=kv_mask)


@triton.jit
def _pruned_attention_sum_kernel(
    dks_ptr,  # (PARTS, B, S, HEADS * D) fp32
    dvs_ptr,  # (PARTS, B, S, HEADS * D) fp32
    dk_ptr,  # (B, S, HEADS * D), rows of KV_ROW
    dv_ptr,  # (B, S, HEADS * D), rows of KV_ROW
    list_ptr,  # (E, L) int32 or None, as the next two
    count_ptr,  # (E,) int32
    row_ptr,  # (B,) int32
    S: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    KV_ROW: tl.constexpr,
    L: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    head, there = _head(list_ptr, count_ptr, row_ptr, HEADS, L)
    if there:
        b = tl.program_id(2).to(tl.int64)
        s, d = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
        mask = (s < S)[:, None] & (d < D)[None, :]
        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for part in range(PARTS):
            row = (part * tl.num_programs(2) + b) * S + s
            offs = row[:, None] * (HEADS * D) + head * D + d[None, :]
            dk += tl.load(dks_ptr + offs, mask=mask, other=0.0)
            dv += tl.load(dvs_ptr + offs, mask=mask, other=0.0)
        offs = (b * S + s)[:, None] * KV_ROW + head * D + d[None, :]
        tl.store(dk_ptr + offs, dk.to(dk_ptr.dtype.element_ty), mask=mask)
        tl.store(dv_ptr + offs, dv.to(dv_ptr.dtype.element_ty), mask=mask)


# --- launchers ------------------------------------------------------------------------------


def config(queries: int, head_dim: int, dtype: torch.dtype, backward: bool) -> dict[str, int]:
    """Tiles of queries by keys."""
    if dtype == torch.float32 and head_dim > 64:  # with one stage rows of 128 and 256 wait in registers, and spill
        return {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 8, "num_stages": 2}
    if dtype == torch.float32:  # ieee fp32 products run on the CUDA cores, in registers
        return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1}
    if head_dim > 128 and backward:  # 99 KiB of shared memory are all that a block has on sm_86 and sm_89
        return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}
    if head_dim > 64:  # a row of 128 or 256: as much shared memory in fewer rows
        return {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}
    if queries <= 64 or backward:  # 8 x 8 latents have no more; backward holds two more tiles in registers
        return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3}


PROGRAMS = 128
"""Of dk and dv, at most, where queries are parted: about the SMs of the cards that this is for (84 to 148)."""
LEAST = 4
"""Blocks of queries in a part: of fewer, dk and dv could be more bytes, written and read, than q and dout."""
_ROWS = 16  # of keys in a program that adds up parts


def part(queries: int, block: int, programs: int) -> int:
    """Queries of a part, whole blocks, where all of them would be so many programs' each; `queries` if it is all."""
    blocks = triton.cdiv(queries, block)
    parts = min(PROGRAMS // programs, blocks // LEAST)
    return triton.cdiv(blocks, parts) * block if parts > 1 else queries


def _constants(q: Tensor, k: Tensor, heads: int, kept: Kept | None, backward: bool) -> tuple[list, dict[str, int], int]:
    """The kept list as three pointers, the compile-time constants, and the heads of the grid."""
    head_dim = q.shape[-1] // heads
    partial = kept is not None and not kept.is_everything
    index = kept.index(1, q.shape[0], q.device) if partial else None
    constants = {"T": q.shape[1], "S": k.shape[1], "HEADS": heads, "D": head_dim}
    constants |= {"Q_ROW": q.stride(1), "KV_ROW": k.stride(1)}
    constants |= {"L": index.channels.shape[1] if index else 0, "PRECISION": precision()}
    constants |= {
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        **config(q.shape[1], head_dim, q.dtype, backward),
    }
    if q.dtype == torch.float32 and precision() == "ieee":  # ptxas would spill, to fit a further block on an SM
        constants["maxnreg"] = 255
    return list(index[:3]) if index else [None] * 3, constants, index.most if index else heads


@torch.library.custom_op("bilevel_kernels::pruned_attention_fwd", mutates_args=())
def pruned_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float, kept: list[int]
) -> tuple[Tensor, Tensor]:
    pointers, constants, most = _constants(q, k, heads, decoded(tuple(kept)), backward=False)
    make = torch.zeros if kept else torch.empty
    out = make(q.shape, dtype=q.dtype, device=q.device)
    lse = make((q.shape[0], heads, q.shape[1]), dtype=torch.float32, device=q.device)
    grid = (triton.cdiv(q.shape[1], constants["BLOCK_M"]), most, q.shape[0])
    _pruned_attention_fwd_kernel[grid](q, k, v, out, lse, *pointers, scale * math.log2(math.e), **constants)
    return out, lse


@torch.library.custom_op("bilevel_kernels::pruned_attention_bwd", mutates_args=())
def pruned_attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, heads: int, scale: float, kept: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv); where inputs lie side by side, so do these: the first holds its neighbours, which are empty."""
    pointers, constants, most = _constants(q, k, heads, decoded(tuple(kept)), backward=True)
    make = torch.zeros if kept else torch.empty
    whole = _gradients(q, k, v, make)
    dq, dk, dv = _parts(whole, q.shape[2])
    delta = torch.empty(lse.shape, dtype=torch.float32, device=q.device)
    scales = (scale, scale * math.log2(math.e))
    grid = (triton.cdiv(q.shape[1], constants["BLOCK_M"]), most, q.shape[0])
    _pruned_attention_dq_kernel[grid](dout, q, k, v, out, lse, delta, dq, *pointers, *scales, **constants)
    blocks = triton.cdiv(k.shape[1], constants["BLOCK_N"])
    constants["PART"] = part(q.shape[1], constants["BLOCK_M"], blocks * most * q.shape[0])
    parts = triton.cdiv(q.shape[1], constants["PART"])
    to = (dk, dv)
    if parts > 1:
        to = torch.empty((2, parts, *k.shape), dtype=torch.float32, device=q.device)
    grid = (blocks * parts, most, q.shape[0])
    _pruned_attention_dkv_kernel[grid](dout, q, k, v, lse, delta, *to, *pointers, *scales, **constants)
    if parts > 1:
        constants = {name: constants[name] for name in ("S", "HEADS", "D", "KV_ROW", "L", "BLOCK_D")}
        grid = (triton.cdiv(k.shape[1], _ROWS), most, q.shape[0])
        _pruned_attention_sum_kernel[grid](*to, dk, dv, *pointers, **constants, PARTS=parts, BLOCK_N=_ROWS)
    return whole


def _gradients(q: Tensor, k: Tensor, v: Tensor, make: Callable[..., Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for dq, dk and dv, laid out as q, k and v are; empty where an earlier one holds it as well."""
    inner = q.shape[2]
    side_by_side = [q.stride(1) // inner, k.stride(1) // inner]
    sizes = (3, 0, 0) if side_by_side == [3, 3] else (1, 2, 0) if side_by_side == [1, 2] else (1, 1, 1)
    found = (
        make((*x.shape[:2], n * inner) if n else (0,), dtype=q.dtype, device=q.device)
        for x, n in zip((q, k, v), sizes, strict=True)
    )
    return tuple(found)  # pyright: ignore[reportReturnType]


def _parts(whole: Sequence[Tensor], inner: int) -> list[Tensor]:
    """dq, dk and dv within what `_gradients` made."""
    return [part for held in whole if held.numel() for part in held.split(inner, dim=-1)]


# --- autograd -------------------------------------------------------------------------------


@pruned_attention_fwd.register_fake
def _(q, k, v, heads, scale, kept):
    return q.new_empty(q.shape), q.new_empty((q.shape[0], heads, q.shape[1]), dtype=torch.float32)


@pruned_attention_bwd.register_fake
def _(dout, q, k, v, out, lse, heads, scale, kept):
    return _gradients(q, k, v, torch.empty)


def _setup(ctx, inputs, output):
    *tensors, ctx.heads, ctx.scale, ctx.kept = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, dout, _dlse):
    whole = pruned_attention_bwd(dout.contiguous(), *ctx.saved_tensors, ctx.heads, ctx.scale, ctx.kept)
    return *_parts(whole, dout.shape[2]), None, None, None


pruned_attention_fwd.register_autograd(_backward, setup_context=_setup)


# --- public ---------------------------------------------------------------------------------


def pruned_attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, *, kept: Kept | None = None, scale: float | None = None
) -> Tensor:
    """softmax(scale q k^T) v for the kept heads; the others come out as zeros, and so do their gradients.

    Args:
        q: (B, T, heads * D), D up to 256.
        k, v: (B, S, heads * D). All contiguous, or parts of one product as the file says.
        heads: Heads of the dense projections.
        kept: Which of them are computed; all if None.
        scale: 1 / sqrt(D) if None.

    Returns:
        (B, T, heads * D), in the dtype of q.

    Raises:
        ValueError: A shape, layout, dtype or device that does not fit, or kept lists of other heads or samples.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3 or not x.numel():
            raise ValueError(f"{name}: shape {tuple(x.shape)}, expected three dimensions with elements")
        if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"{name}: {x.dtype} is none of float32, float16 and bfloat16")
        if (x.dtype, x.device) != (q.dtype, q.device):
            raise ValueError(f"{name}: {x.dtype} on {x.device}, q is {q.dtype} on {q.device}")
        if x.shape[1] * max(x.shape[2], x.stride(1)) >= 2**31:
            raise ValueError(f"{name}: a sample of {tuple(x.shape)} has 2**31 elements or more")
        if not any(_has_rows(x, n * x.shape[2]) for n in ((1, 3) if name == "q" else (1, 2, 3))):
            raise ValueError(f"{name}: strides {x.stride()} of shape {tuple(x.shape)} are not contiguous")
    if k.shape[0] != q.shape[0] or k.shape[2] != q.shape[2]:
        raise ValueError(f"k: shape {tuple(k.shape)} does not fit q {tuple(q.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"v: shape {tuple(v.shape)}, k has {tuple(k.shape)}")
    if v.stride(1) != k.stride(1) or (3 * k.shape[2] in (q.stride(1), k.stride(1)) and q.stride(1) != k.stride(1)):
        raise ValueError(f"strides of q {q.stride()}, k {k.stride()} and v {v.stride()} do not fit each other")
    if heads < 1 or q.shape[-1] % heads or q.shape[-1] // heads > 256:
        raise ValueError(f"heads: {heads} of {q.shape[-1]} channels; they must divide them, into 256 each at most")
    if kept is not None and kept.units != heads:
        raise ValueError(f"kept: lists of {kept.units} units, there are {heads} heads")
    if kept is not None and kept.rows and len(kept.rows) != q.shape[0]:
        raise ValueError(f"kept: lists for {len(kept.rows)} samples, the batch has {q.shape[0]}")
    if kept is not None and kept.is_everything:
        kept = None
    scale = (q.shape[-1] // heads) ** -0.5 if scale is None else scale
    return pruned_attention_fwd(q, k, v, heads, scale, kept.encoded() if kept else [])[0]


def _has_rows(x: Tensor, row: int) -> bool:
    return x.stride() == (x.shape[1] * row, row, 1) or (row == x.shape[2] and x.is_contiguous())


def pruned_attention_flops(queries: int, keys: int, channels: int, backward: bool) -> int:
    """2 per multiply-add, for the kept channels of all samples: two products forward; five backward, scores again."""
    return (10 if backward else 4) * queries * keys * channels


def pruned_attention_bytes(queries: int, keys: int, channels: int, itemsize: int, backward: bool) -> int:
    """Least bytes moved, for as many: q, k, v and out; backward these and the gradient of each."""
    return (4 if backward else 2) * (queries + keys) * channels * itemsize


def operator_flops(name: str, given: dict[str, Any], _: Any) -> int:
    q, keys = given["q"], given["k"].shape[1]
    channels = sum(counts(decoded(tuple(given["kept"])), q.shape[-1], len(q)))
    return pruned_attention_flops(q.shape[1], keys, channels, name.endswith("bwd"))
