"""Samplers against those of diffusers, published timestep lists and cases with a known answer."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler

from bilevel_fast.base.errors import UserError
from bilevel_fast.models.diffusion import Schedule, noise
from bilevel_fast.sampling.samplers import guided, sample, timesteps

EPS = torch.finfo(torch.float32).eps


def network(x, t):
    """Nonlinear in x, coupled across pixels, and different at every t."""
    t = (t.float() / 1000).reshape(-1, 1, 1, 1)
    return torch.tanh(x * (1 + t) + torch.sin(3 * t) * x.roll(1, -1)) + 0.1 * x


def reference(scheduler, x, steps):
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x).prev_sample
    return x


@pytest.mark.parametrize("steps", [2, 3, 10, 25, 50])
@pytest.mark.parametrize("to_one", [False, True])
@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon"])
@pytest.mark.parametrize(("method", "scheduler"), [("pndm", PNDMScheduler), ("ddim", DDIMScheduler)])
def test_parity_with_diffusers(method, scheduler, prediction_type, to_one, steps):
    schedule = Schedule.scaled_linear(prediction_type=prediction_type, set_alpha_to_one=to_one)
    x_T = torch.randn(3, 4, 6, 10)
    theirs = reference(scheduler.from_config(schedule.to_dict()), x_T, steps)
    ours = sample(network, x_T, schedule, steps, method)
    # two roundings of the state in each step; PNDM takes its second step twice
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2 * (steps + 1) * EPS * theirs.abs().max().item())


@pytest.mark.parametrize(
    ("steps", "head", "tail"),
    [
        (50, (981, 961, 941), (41, 21, 1)),
        (25, (961, 921, 881), (81, 41, 1)),
        (3, (667, 334, 1), (667, 334, 1)),
    ],
)
def test_leading_grid(steps, head, tail):
    grid = timesteps(Schedule.sd(), steps)
    assert len(grid) == steps
    assert (grid[:3], grid[-3:]) == (head, tail)


@pytest.mark.parametrize("steps", [1, 7, 30, 500, 999])
def test_grid_is_that_of_diffusers(steps):
    theirs = DDIMScheduler.from_config(Schedule.sd().to_dict())
    theirs.set_timesteps(steps)
    assert list(timesteps(Schedule.sd(), steps)) == theirs.timesteps.tolist()


@pytest.mark.parametrize("steps", [2, 10, 25, 30, 50, 999])
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("scheduler", [DDIMScheduler, PNDMScheduler])
def test_every_spacing_is_that_of_diffusers(scheduler, spacing, steps):
    schedule = Schedule.scaled_linear(timestep_spacing=spacing)
    theirs = scheduler.from_config(schedule.to_dict())
    theirs.set_timesteps(steps)
    grid = theirs.timesteps.unique().tolist()  # PNDM visits the second one twice
    assert sorted(timesteps(schedule, steps)) == grid


@pytest.mark.situation
@pytest.mark.parametrize(
    ("method", "scheduler", "zero"),
    [("pndm", PNDMScheduler, False), ("ddim", DDIMScheduler, False), ("ddim", DDIMScheduler, True)],
)
def test_a_grid_from_the_last_timestep_down(method, scheduler, zero):
    """A folder with `timestep_spacing` trailing, zero terminal SNR or not: drawn as diffusers draws it."""
    schedule = Schedule.scaled_linear(timestep_spacing="trailing", zero_terminal_snr=zero)
    x_T = torch.randn(3, 4, 6, 10)
    theirs = reference(scheduler.from_config(schedule.to_dict()), x_T, 25)
    ours = sample(network, x_T, schedule, 25, method)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


def test_each_step_ends_where_the_next_begins():
    """The oracle of one image stays on its path, whatever the grid: strides of 41 and 42 would leave it otherwise."""
    schedule = Schedule.scaled_linear(timestep_spacing="linspace")
    x0, eps = torch.randn(2, 1, 4, 8, 8)
    told = {}

    def oracle(x, t):
        told[int(t)] = (x - noise(schedule, x0, eps, t).x).abs().max().item()
        alpha, sigma = schedule.alpha_sigma(t)
        return (alpha * x - x0) / sigma

    sample(oracle, noise(schedule, x0, eps, torch.tensor([999])).x, schedule, 25, "ddim")
    assert len(told) == 25
    assert max(told.values()) < 1e-4


@pytest.mark.situation
def test_one_step_of_a_grid_that_ends_at_zero():
    """One sampling step of a folder with `timestep_spacing` linspace: refused; it would be the step at the end."""
    with pytest.raises(UserError, match="steps is 1; the model's timestep_spacing 'linspace' takes 2 or more"):
        timesteps(Schedule.scaled_linear(timestep_spacing="linspace"), 1)


def test_every_timestep_without_offset():
    assert timesteps(Schedule.scaled_linear(steps_offset=0), 1000) == tuple(range(999, -1, -1))


@pytest.mark.parametrize("steps", [-1, 0, 1000, 1001])
def test_grid_outside_the_schedule(steps):
    """1000 steps of SD would start at t = 1000, which diffusers lists and then fails to look up."""
    with pytest.raises(UserError, match=f"steps is {steps};"):
        timesteps(Schedule.sd(), steps)


@pytest.mark.parametrize(
    ("method", "steps", "calls"),
    [
        ("pndm", 25, [961, 921, 921, *range(881, 0, -40)]),
        ("pndm", 50, [981, 961, 961, *range(941, 0, -20)]),
        ("ddim", 25, [*range(961, 0, -40)]),
    ],
)
def test_network_calls(method, steps, calls):
    seen, reports = [], []

    def predict(x, t):
        assert t.dtype == torch.int64
        assert t.shape == (2,)
        seen.append(t[0].item())
        return network(x, t)

    sample(predict, torch.randn(2, 4, 4, 4), Schedule.sd(), steps, method, lambda *done: reports.append(done))
    assert seen == calls
    assert len(calls) == steps + (method == "pndm")
    assert reports == [(k + 1, len(calls)) for k in range(len(calls))]


def test_ddim_is_exact_where_x0_is_certain():
    """One image in the world: at any number of steps DDIM ends at it, with the least noise left."""
    schedule = Schedule.sd()
    x0, eps = torch.randn(2, 1, 4, 8, 8)

    def oracle(x, t):
        alpha, sigma = schedule.alpha_sigma(t)
        return (alpha * x - x0) / sigma

    x_T = noise(schedule, x0, eps, torch.tensor([961])).x
    gold = noise(schedule, x0, eps, torch.tensor([0])).x
    torch.testing.assert_close(sample(oracle, x_T, schedule, 25, "ddim"), gold, rtol=0, atol=1e-5)


def test_no_host_reads_and_no_gradient():
    """Tensors on the meta device have no values: any read of one raises."""
    weight = torch.ones((), device="meta", requires_grad=True)
    x_T = torch.empty(1, 4, 8, 8, device="meta")
    x = sample(lambda x, t: weight * network(x, t), x_T, Schedule.sd(), 4)
    assert x.device.type == "meta"
    assert not x.requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["pndm", "ddim"])
def test_no_synchronisation_and_the_same_values_on_the_gpu(method):
    x_T = torch.randn(2, 4, 8, 8)
    schedule, moved = Schedule.sd().to("cuda"), x_T.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        x = sample(network, moved, schedule, 10, method)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(x.cpu(), sample(network, x_T, Schedule.sd(), 10, method), rtol=0, atol=1e-4)


def test_half_precision_network_is_integrated_in_fp32():
    x_T = torch.randn(2, 4, 8, 8)
    rounded = sample(lambda x, t: network(x, t).bfloat16(), x_T, Schedule.sd(), 10)
    same = sample(lambda x, t: network(x, t).bfloat16().float(), x_T, Schedule.sd(), 10)
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, same)


class Recorder:
    """A model whose output depends on x, t and text of each row; it keeps what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, x, t, text):
        self.asked.append((x, t, text))
        return SimpleNamespace(out=network(x, t) * text.mean((1, 2)).reshape(-1, 1, 1, 1))


@pytest.mark.parametrize("shared", [True, False])
def test_guidance(shared):
    model, x, t = Recorder(), torch.randn(2, 4, 4, 4), torch.tensor([3, 700])
    text, uncond = torch.randn(2, 5, 6), torch.randn(1 if shared else 2, 5, 6)
    v = guided(model, text, uncond, 7.5)(x, t)
    v_u, v_c = (network(x, t) * c.mean((1, 2)).reshape(-1, 1, 1, 1) for c in (uncond, text))
    torch.testing.assert_close(v, v_u + 7.5 * (v_c - v_u))
    (asked,) = model.asked
    expected = (x.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([uncond.expand(2, 5, 6), text]))
    assert all(torch.equal(came, wanted) for came, wanted in zip(asked, expected, strict=True))


def test_guidance_of_one_asks_for_the_prompt_only():
    model, x, t = Recorder(), torch.randn(2, 4, 4, 4), torch.tensor([3, 700])
    text = torch.randn(2, 5, 6)
    v = guided(model, text, torch.randn(1, 5, 6), 1.0)(x, t)
    assert torch.equal(v, model(x, t, text).out)
    assert [row[0].shape[0] for row in model.asked] == [2, 2]


def test_guided_texts_must_fit():
    with pytest.raises(ValueError, match=r"uncond \(1, 5, 6\) does not fit text \(2, 7, 6\)"):
        guided(Recorder(), torch.zeros(2, 7, 6), torch.zeros(1, 5, 6), 3.0)


def test_unknown_method_and_too_few_steps():
    x_T = torch.zeros(1, 4, 4, 4)
    with pytest.raises(UserError, match="sampling method 'plms' does not exist"):
        sample(network, x_T, Schedule.sd(), method="plms")
    with pytest.raises(UserError, match="pndm is a multistep method and takes 2 or more"):
        sample(network, x_T, Schedule.sd(), steps=1)
