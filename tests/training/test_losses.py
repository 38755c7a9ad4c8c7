"""The objectives against a transcription in fp64, their closed-form gradients, what they must not touch."""

from dataclasses import replace

import pytest
import torch

from bilevel_fast.base.errors import UserError
from bilevel_fast.models.diffusion import Noised, Schedule, noise
from bilevel_fast.models.unet import Prediction
from bilevel_fast.training.losses import LossWeights, fine_tuning_loss, suppression_loss, suppression_target

# the nine block outputs of SD 2.1, at an eighth of its channels and of its resolution
BLOCKS = [(40, 4), (80, 2), (160, 1), (160, 1), (160, 1), (160, 2), (160, 4), (80, 8), (40, 8)]
T = torch.tensor([0, 50, 999])  # SNR weight small, middling and 1


def prediction(dtype=torch.float32, grad=False):
    out = torch.randn(3, 4, 8, 8, dtype=dtype, requires_grad=grad)
    shapes = [(3, channels, size, size) for channels, size in BLOCKS]
    return Prediction(out, tuple(torch.randn(shape, dtype=dtype, requires_grad=grad) for shape in shapes))


@pytest.fixture
def noised() -> Noised:
    return noise(Schedule.sd(), torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), T)


def transcription(student, teacher, noised, w_d, w_o, w_f):
    """The formula alone, sample by sample and block by block, in fp64: total and unweighted terms."""
    abar = Schedule.sd().alphas_cumprod.double()
    diffusion = 0.0
    for b, t in enumerate(T):
        snr = abar[t] / (1 - abar[t])
        omega = min(snr + 1, 5.0) / (snr + 1)
        error = student.out[b].double() - noised.target[b].double()
        diffusion += omega * (error**2).sum() / error.numel() / len(T)
    output = ((student.out.double() - teacher.out.double()) ** 2).mean()
    feature = 0.0
    for f_S, f_T in zip(student.blocks, teacher.blocks, strict=True):
        feature += ((f_S.double() - f_T.double()) ** 2).sum() / f_S.numel() / 9
    total = w_d * diffusion + w_o * output + w_f * feature
    return total, {"diffusion": diffusion, "output": output, "feature": feature}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", [(1.0, 2.0, 0.1), (0.01, 0.5, 0.5), (1.0, 0.0, 0.0), (0.0, 2.0, 0.1)])
def test_fine_tuning_loss_to_the_digit(noised, weights, dtype):
    """bf16 predictions, as under autocast, are compared and reduced in fp32."""
    student, teacher = prediction(dtype, grad=True), prediction(dtype)
    loss = fine_tuning_loss(student, teacher, noised, LossWeights(*weights))
    total, terms = transcription(student, teacher, noised, *weights)
    assert loss.total.dtype == torch.float32
    assert loss.total.shape == ()
    torch.testing.assert_close(loss.total.double(), total, rtol=1e-6, atol=0)
    wanted = {name for name, weight in zip(terms, weights, strict=True) if weight}
    assert set(loss.terms) == wanted
    for name in wanted:
        torch.testing.assert_close(loss.terms[name].double(), terms[name].detach(), rtol=1e-6, atol=0)
        assert not loss.terms[name].requires_grad


def test_default_weights(noised):
    student, teacher = prediction(), prediction()
    total, _ = transcription(student, teacher, noised, 1.0, 2.0, 0.1)
    torch.testing.assert_close(fine_tuning_loss(student, teacher, noised).total.double(), total)


def test_gradients_in_closed_form(noised):
    student, teacher = prediction(grad=True), prediction()
    upstream = 0.3
    (upstream * fine_tuning_loss(student, teacher, noised).total).backward()
    v_S, omega = student.out, noised.weight.view(-1, 1, 1, 1)
    dv = 2 * (omega * (v_S - noised.target) + 2 * (v_S - teacher.out)) / v_S.numel()
    torch.testing.assert_close(v_S.grad, upstream * dv)
    for f_S, f_T in zip(student.blocks, teacher.blocks, strict=True):
        torch.testing.assert_close(f_S.grad, upstream * 2 * 0.1 * (f_S - f_T) / (9 * f_S.numel()))


def test_a_term_of_weight_zero_is_not_computed(noised):
    """Without distillation there need be no teacher; without the diffusion loss, no target."""
    student = prediction()
    nothing = Prediction(torch.empty(0), ())
    loss = fine_tuning_loss(student, nothing, noised, LossWeights(1, 0, 0))
    assert set(loss.terms) == {"diffusion"}
    aimless = replace(noised, target=torch.empty(0), weight=torch.empty(0))
    loss = fine_tuning_loss(student, prediction(), aimless, LossWeights(0, 2, 0.1))
    assert set(loss.terms) == {"output", "feature"}


def test_suppression_target():
    anchor, concept = torch.randn(2, 3, 4, 8, 8)
    torch.testing.assert_close(suppression_target(anchor, concept), 2 * anchor - concept)
    torch.testing.assert_close(suppression_target(anchor, concept, 0.25), 1.25 * anchor - 0.25 * concept)
    assert torch.equal(suppression_target(anchor, concept, 0.0), anchor)


def test_suppression_target_is_the_same_statement_about_eps():
    """Its weights sum to 1, so steering v steers eps alike."""
    schedule, (anchor, concept, x) = Schedule.sd(), torch.randn(3, 3, 4, 8, 8)
    alpha, sigma = schedule.alpha_sigma(T)
    eps_anchor, eps_concept = (alpha * v + sigma * x for v in (anchor, concept))
    steered = alpha * suppression_target(anchor, concept, 1.0) + sigma * x
    torch.testing.assert_close(steered, 2 * eps_anchor - eps_concept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_suppression_loss(dtype):
    student = torch.randn(3, 4, 8, 8, dtype=dtype, requires_grad=True)
    anchor, concept = torch.randn(2, 3, 4, 8, 8, dtype=dtype)
    target = suppression_target(anchor, concept, 1.0)
    assert target.dtype == torch.float32
    loss = suppression_loss(student, target)
    gold = (student.double() - (2 * anchor.double() - concept.double())).square().mean()
    torch.testing.assert_close(loss.total.double(), gold, rtol=1e-6, atol=0)
    assert torch.equal(loss.terms["suppression"], loss.total)
    assert not loss.terms["suppression"].requires_grad
    (0.3 * loss.total).backward()
    torch.testing.assert_close(student.grad, (0.3 * 2 * (student - target) / student.numel()).to(dtype))


def test_no_host_reads(noised):
    """Tensors on the meta device have no values: any read of one raises."""

    def meta(x):
        return x.to("meta")

    student = Prediction(meta(torch.ones(3, 4, 8, 8)), tuple(map(meta, prediction().blocks)))
    on_meta = Noised(*map(meta, (noised.x, noised.t, noised.target, noised.weight)))
    assert fine_tuning_loss(student, student, on_meta).total.device.type == "meta"
    assert suppression_loss(student.out, suppression_target(student.out, student.out)).total.shape == ()


def test_shapes_must_agree(noised):
    student, teacher = prediction(), prediction()
    other = replace(student, out=student.out[:1])
    with pytest.raises(ValueError, match=r"student output \(1, 4, 8, 8\) and diffusion target \(3, 4, 8, 8\)"):
        fine_tuning_loss(other, teacher, noised)
    with pytest.raises(ValueError, match=r"student output \(3, 4, 8, 8\) and teacher output \(1, 4, 8, 8\)"):
        fine_tuning_loss(student, other, noised)
    with pytest.raises(ValueError, match="student has 8 blocks, teacher 9"):
        fine_tuning_loss(replace(student, blocks=student.blocks[1:]), teacher, noised)
    with pytest.raises(ValueError, match=r"student block 0 \(3, 40, 8, 8\) and teacher block 0 \(3, 40, 4, 4\)"):
        fine_tuning_loss(replace(student, blocks=student.blocks[::-1]), teacher, noised)
    with pytest.raises(ValueError, match=r"student output \(1, 4, 8, 8\) and suppression target \(3, 4, 8, 8\)"):
        suppression_loss(other.out, student.out)
    with pytest.raises(ValueError, match=r"anchor output .* and concept output .* differ"):
        suppression_target(other.out, student.out)


@pytest.mark.parametrize("weights", [(0, 0, 0), (1, -2, 0.1), (float("nan"), 1, 1)])
def test_senseless_weights(weights):
    with pytest.raises(UserError, match="loss weights"):
        LossWeights(*weights)
