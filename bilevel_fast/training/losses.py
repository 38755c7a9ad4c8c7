"""The objectives of both levels, reduced in fp32 whatever the networks compute in.

    lower   L_ft = w_d mean_b[omega_b mean_chw (v_S - v)^2]  +  w_o mean (v_S - v_T)^2
                 + w_f / K sum_k mean (f_S^k - f_T^k)^2
                 + w_a / M sum_m mean (a_S^m - a_T^m)^2  +  w_l / N sum_n mean (h_S^n - h_T^n)^2
    upper   L_up = mean (v_S - y)^2,  y = a - eta (c - a)

with student S, teacher T, K block outputs f^k (9 for SD 2.1), SNR weight omega, and the frozen teacher's
outputs c for the concept's prompt and a for its anchor (the prompt without the concept, or the empty prompt).
By default w_a and w_l are 0: outputs a^m of the M self-attentions and h^n of the N ResNets and Transformers that the
student has kept (`training.features`). Two more, off by default:

    normalised features   w_f / K sum_k mean (f_S^k - f_T^k)^2 / rms(f_T^k)     LAPTOP-Diff, arXiv:2404.11098
    guided output         w_g mean (g_S - g_T)^2,  g = v(0) + s (v(c) - v(0))   SnapFusion, arXiv:2306.00980

LAPTOP-Diff divides squared norms by the norm of the teacher's feature; in means both are over the number of elements.
v(0) is the output for the empty prompt, and s of a sample is uniform in [2, 14]. SnapFusion takes the guided loss in
place of the plain one at one step in ten; here it is a term with a weight of its own.

Gradients, for N elements of v and N_k of f^k:

    dL_ft/dv_S   = 2 (w_d omega_b (v_S - v) + w_o (v_S - v_T)) / N
    dL_ft/df_S^k = 2 w_f (f_S^k - f_T^k) / (K N_k)

Scalars stay on the device; nothing here waits for it.

Sources: arXiv:2412.15341 and the trainer released with it, which averages over blocks where the paper's
equation sums; negative guidance as a target, ESD, arXiv:2303.07345; self-attentions, KOALA, arXiv:2312.04005, and
layers, arXiv:2401.02677, where the papers sum squared norms and these are means.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bilevel_fast.models.diffusion import Noised
from bilevel_fast.models.unet import Prediction
from bilevel_fast.ops.dispatch import denoise_loss, feature_kd
from bilevel_fast.training.features import Heard, is_self_attention
from bilevel_fast.training.settings import LossWeights


@dataclass(frozen=True, eq=False)
class Loss:
    """A scalar to descend, and what it is made of."""

    total: Tensor  # () fp32, differentiable
    terms: dict[str, Tensor]  # () fp32 each, detached, before weighting


@dataclass(frozen=True, eq=False)
class Unprompted:
    """What both networks say without the prompt, and how strongly it is guided away from."""

    student: Tensor  # (B, C, H, W), with gradient
    teacher: Tensor  # (B, C, H, W)
    scale: Tensor  # (B,) fp32


DEFAULT_WEIGHTS = LossWeights()
NOTHING: Heard = {}


def fine_tuning_loss(
    student: Prediction,
    teacher: Prediction,
    noised: Noised,
    weights: LossWeights = DEFAULT_WEIGHTS,
    inside: Heard = NOTHING,
    inside_teacher: Heard = NOTHING,
    unprompted: Unprompted | None = None,
) -> Loss:
    """The lower level: diffusion loss, output distillation and feature distillation.

    Args:
        student: Output (B, C, H, W) and block outputs, with gradient.
        teacher: The same shapes, without gradient.
        noised: The target (B, C, H, W) and the weight (B,) of each sample in the diffusion loss.
        weights: Of the terms, which are named as its fields.
        inside: What was heard inside the student, for the terms `self_attention` and `layer`.
        inside_teacher: What was heard inside the teacher, of the same names at least.
        unprompted: For the term `guided`.

    Raises:
        ValueError: Two tensors that should agree differ in shape, or the models in their number of blocks.
    """
    terms: dict[str, Tensor] = {}
    weighted: list[Tensor] = []
    if weights.diffusion:
        _check("student output", student.out, "diffusion target", noised.target)
    if weights.output:
        _check("student output", student.out, "teacher output", teacher.out)
    if weights.diffusion or weights.output:
        total, (terms["diffusion"], terms["output"]) = denoise_loss(
            student.out, noised.target, teacher.out, noised.weight, weights.diffusion, weights.output
        )
        weighted.append(total)
    if weights.feature:
        if not len(student.blocks) == len(teacher.blocks) > 0:
            raise ValueError(f"student has {len(student.blocks)} blocks, teacher {len(teacher.blocks)}")
        for k, (mine, theirs) in enumerate(zip(student.blocks, teacher.blocks, strict=True)):
            _check(f"student block {k}", mine, f"teacher block {k}", theirs)
        if weights.feature_by_norm:
            total, terms["feature"] = _normalised(student.blocks, teacher.blocks, weights.feature)
        else:
            total, terms["feature"] = feature_kd(student.blocks, teacher.blocks, weights.feature)
        weighted.append(total)
    for term, names in {
        "self_attention": [name for name in inside if is_self_attention(name)],
        "layer": [name for name in inside if not is_self_attention(name)],
    }.items():
        if weight := getattr(weights, term):
            for name in names:
                _check(f"student {name}", inside[name], f"teacher {name}", inside_teacher[name])
            mine, theirs = ([heard[name] for name in names] for heard in (inside, inside_teacher))
            total, terms[term] = feature_kd(mine, theirs, weight)
            weighted.append(total)
    if weights.guided:
        assert unprompted is not None, "the guided term wants answers without the prompt"
        scale = unprompted.scale.reshape(-1, 1, 1, 1)
        mine, theirs = (
            free.float() + scale * (out.float() - free.float())
            for free, out in ((unprompted.student, student.out), (unprompted.teacher, teacher.out))
        )
        total = _mse("student output", mine, "teacher output", theirs)
        terms["guided"] = total.detach()
        weighted.append(weights.guided * total)
    return Loss(torch.stack(weighted).sum(), {name: term for name, term in terms.items() if getattr(weights, name)})


def _normalised(mine: Sequence[Tensor], theirs: Sequence[Tensor], weight: float) -> tuple[Tensor, Tensor]:
    """`feature_kd` with each block divided by the root mean square of the teacher's: the loss, and it unweighted."""
    parts = []
    for own, other in zip(mine, theirs, strict=True):
        size = torch.linalg.vector_norm(other, dtype=torch.float32) / other.numel() ** 0.5
        total, _ = feature_kd([own], [other], weight)
        parts.append(total / size.clamp(min=torch.finfo(torch.float32).tiny))
    total = torch.stack(parts).mean()
    return total, (total / weight).detach()


def suppression_target(anchor_out: Tensor, concept_out: Tensor, eta: float = 1.0) -> Tensor:
    """What the student should answer to the concept's prompt: beyond the anchor, away from the concept.

    Args:
        anchor_out: (B, C, H, W) the teacher's output for the anchor prompt.
        concept_out: (B, C, H, W) the teacher's output for the concept's prompt, at the same x_t and t.
        eta: How far beyond, in distances from concept to anchor; 0 stops at the anchor.

    Returns:
        (B, C, H, W) fp32.

    Raises:
        ValueError: The outputs differ in shape.
    """
    _check("anchor output", anchor_out, "concept output", concept_out)
    anchor, concept = anchor_out.float(), concept_out.float()
    return anchor - eta * (concept - anchor)


def suppression_loss(student_out: Tensor, target: Tensor) -> Loss:
    """The upper level: mean squared error (B, C, H, W) against a suppression target, without SNR weight.

    Raises:
        ValueError: The two differ in shape.
    """
    total = _mse("student output", student_out, "suppression target", target)
    return Loss(total, {"suppression": total.detach()})


def _mse(name: str, x: Tensor, other_name: str, other: Tensor) -> Tensor:
    _check(name, x, other_name, other)
    return F.mse_loss(x.float(), other.float())


def _check(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.shape != other.shape:
        raise ValueError(f"{name} {tuple(x.shape)} and {other_name} {tuple(other.shape)} differ in shape")
