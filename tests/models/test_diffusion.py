"""The forward process against diffusers, published goldens and the formulas in fp64."""

import itertools
import json

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler

from bilevel_fast.base.errors import UserError
from bilevel_fast.models.diffusion import SCHEDULERS, Schedule, convert, noise, snr_weight

SD21 = {  # scheduler_config.json of stabilityai/stable-diffusion-2-1
    "_class_name": "DDIMScheduler",
    "_diffusers_version": "0.8.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
PREDICTION_TYPES = ["v_prediction", "epsilon"]


@pytest.fixture
def batch():
    """x_0, eps and t with both ends of the schedule; a batch of odd, unequal sizes."""
    t = torch.tensor([0, 999, 20, 169, 170])
    return torch.randn(5, 4, 6, 10), torch.randn(5, 4, 6, 10), t


def write(folder, config):
    (folder / "scheduler").mkdir()
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "scheduler" / "scheduler_config.json").write_text(text)
    return folder


def test_alphas_cumprod_goldens():
    abar = Schedule.sd().alphas_cumprod
    golden = torch.tensor([0.99914998, 0.98131430, 0.89422315, 0.67379230, 0.27633247, 0.00466010])
    torch.testing.assert_close(abar[[0, 20, 100, 250, 500, 999]], golden, rtol=0, atol=5e-8)
    assert abar.dtype == torch.float32


def test_same_bits_as_diffusers(batch):
    theirs = DDIMScheduler.from_config(SD21)
    schedule = Schedule.sd()
    x0, eps, t = batch
    noised = noise(schedule, x0, eps, t)
    assert torch.equal(schedule.alphas_cumprod, theirs.alphas_cumprod)
    assert torch.equal(noised.x, theirs.add_noise(x0, eps, t))
    assert torch.equal(noised.target, theirs.get_velocity(x0, eps, t))
    assert torch.equal(noised.t, t)


def test_epsilon_models_are_asked_for_the_noise(batch):
    x0, eps, t = batch
    noised = noise(Schedule.sd("epsilon"), x0, eps, t)
    assert torch.equal(noised.target, eps)
    assert torch.equal(noised.x, noise(Schedule.sd(), x0, eps, t).x)
    assert noise(Schedule.sd("epsilon"), x0, eps.bfloat16(), t).target.dtype == torch.float32


def test_half_precision_inputs_are_noised_in_fp32(batch):
    x0, eps, t = batch
    x0, eps = x0.bfloat16(), eps.bfloat16()
    noised = noise(Schedule.sd(), x0, eps, t)
    abar = Schedule.sd().alphas_cumprod.double()[t].view(-1, 1, 1, 1)
    alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
    for ours, gold in (
        (noised.x, alpha * x0.double() + sigma * eps.double()),
        (noised.target, alpha * eps.double() - sigma * x0.double()),
    ):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), gold, rtol=0, atol=1e-6)


def test_official_weight_goldens():
    weight = snr_weight(Schedule.sd(), torch.arange(1000))
    golden = torch.tensor([0.004250, 0.093428, 0.528884])
    torch.testing.assert_close(weight[[0, 20, 100]], golden, rtol=0, atol=1e-6)
    assert (weight[170:] == 1).all()
    assert weight[169] < 1
    assert weight.mean().item() == pytest.approx(0.9077, abs=5e-5)


@pytest.mark.parametrize("gamma", [0.5, 5.0, 20.0])
@pytest.mark.parametrize(
    ("prediction_type", "formula"),
    [
        ("v_prediction", lambda snr, gamma: (snr + 1).clamp(max=gamma) / (snr + 1)),
        ("epsilon", lambda snr, gamma: snr.clamp(max=gamma) / snr),
    ],
)
def test_weights_as_published(prediction_type, formula, gamma):
    schedule = Schedule.sd(prediction_type)
    abar = schedule.alphas_cumprod.double()
    weight = snr_weight(schedule, torch.arange(1000), gamma)
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight.double(), formula(abar / (1 - abar), gamma), rtol=1e-6, atol=0)


def test_noise_carries_the_weight_it_was_asked_for(batch):
    schedule = Schedule.sd()
    assert torch.equal(noise(schedule, *batch).weight, snr_weight(schedule, batch[2]))
    weight = noise(schedule, *batch, snr_gamma=3.0).weight
    assert torch.equal(weight, snr_weight(schedule, batch[2], 3.0))
    assert torch.equal(noise(schedule, *batch, snr_gamma=None).weight, torch.ones(5))


@pytest.mark.parametrize(("given", "into"), list(itertools.product(("v_prediction", "epsilon", "sample"), repeat=2)))
def test_convert_between_v_eps_and_x0(batch, given, into):
    schedule = Schedule.sd()
    x0, eps, t = batch
    noised = noise(schedule, x0, eps, t)
    truth = {"v_prediction": noised.target, "epsilon": eps, "sample": x0}
    converted = convert(schedule, truth[given], noised.x, t, into, given)
    # x_0 is known from eps only up to sigma / alpha <= 15, eps from x_0 only up to alpha / sigma <= 34
    torch.testing.assert_close(converted, truth[into], rtol=0, atol=50 * 1e-6)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_convert_reads_the_network_output_by_default(batch, prediction_type):
    schedule = Schedule.sd(prediction_type)
    x0, eps, t = batch
    noised = noise(schedule, x0, eps, t)
    torch.testing.assert_close(convert(schedule, noised.target, noised.x, t, "epsilon"), eps)


def test_one_timestep_for_the_whole_batch(batch):
    schedule = Schedule.sd()
    x, v, _ = batch
    same = convert(schedule, v, x, torch.full((5,), 300), "sample")
    assert torch.equal(convert(schedule, v, x, torch.tensor(300), "sample"), same)


def test_no_host_reads():
    """Tensors on the meta device have shapes but no values: any read of a value raises."""
    schedule = Schedule.sd().to("meta")
    latents, t = torch.empty(2, 4, 8, 8, device="meta"), torch.zeros(2, dtype=torch.int64, device="meta")
    assert noise(schedule, latents, latents, t).weight.device.type == "meta"
    assert convert(schedule, latents, latents, t, "sample").shape == latents.shape


@pytest.mark.gpu
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_no_synchronisation_and_the_same_values_on_the_gpu(batch, prediction_type):
    schedule = Schedule.sd(prediction_type)
    on_gpu, moved = schedule.to("cuda"), [x.cuda() for x in batch]
    torch.cuda.set_sync_debug_mode("error")
    try:
        noised = noise(on_gpu, *moved)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    gold = noise(schedule, *batch)
    for ours, theirs in ((noised.x, gold.x), (noised.target, gold.target), (noised.weight, gold.weight)):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_load_inverts_to_dict_and_diffusers_agrees(tmp_path, prediction_type):
    schedule = Schedule.scaled_linear(0.001, 0.01, 500, prediction_type, steps_offset=3, set_alpha_to_one=True)
    loaded = Schedule.load(write(tmp_path, schedule.to_dict()))
    theirs = PNDMScheduler.from_config(schedule.to_dict())
    assert loaded.to_dict() == schedule.to_dict()
    assert torch.equal(loaded.alphas_cumprod, schedule.alphas_cumprod)
    assert torch.equal(loaded.alphas_cumprod, theirs.alphas_cumprod)
    assert theirs.final_alpha_cumprod == 1
    assert theirs.config.prediction_type == prediction_type
    assert theirs.config.steps_offset == 3


def test_load_sd21_ignores_what_concerns_others(tmp_path):
    config = {**SD21, "sample_max_value": 1.0, "solver_order": 2}
    assert Schedule.load(write(tmp_path, config)).to_dict() == Schedule.sd().to_dict()


def test_missing_fields_mean_what_they_mean_to_diffusers(tmp_path):
    bare = {"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear"}
    loaded, theirs = Schedule.load(write(tmp_path, bare)), PNDMScheduler.from_config(bare)
    assert torch.equal(loaded.alphas_cumprod, theirs.alphas_cumprod)
    for name in ("prediction_type", "steps_offset", "set_alpha_to_one"):
        assert getattr(loaded, name) == theirs.config[name]


@pytest.mark.situation
@pytest.mark.parametrize("name", SCHEDULERS)
def test_any_scheduler_of_the_same_process(tmp_path, name):
    """A folder whose scheduler is Euler, DPM-Solver, DDPM or another of diffusers': its noise process is read."""
    asked = {"prediction_type": "v_prediction", "steps_offset": 1, "timestep_spacing": "leading", "clip_sample": False}
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    theirs = getattr(diffusers, name).from_config({**asked, **betas, "use_karras_sigmas": False})
    theirs.save_pretrained(tmp_path / "scheduler")
    loaded = Schedule.load(tmp_path)
    assert torch.equal(loaded.alphas_cumprod, theirs.alphas_cumprod)
    assert loaded.to_dict() == Schedule.sd().to_dict() | {"set_alpha_to_one": name != "PNDMScheduler"}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_missing_fields_mean_what_they_mean_to_each_class(tmp_path, name):
    bare = {"_class_name": name, "beta_schedule": "scaled_linear", "clip_sample": False}
    loaded, theirs = Schedule.load(write(tmp_path, bare)), getattr(diffusers, name).from_config(bare)
    assert torch.equal(loaded.alphas_cumprod, theirs.alphas_cumprod)
    assert loaded.prediction_type == theirs.config.prediction_type
    if name != "DPMSolverSinglestepScheduler":  # which knows one spacing, without a name
        assert loaded.timestep_spacing == theirs.config.timestep_spacing


@pytest.mark.situation
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timestep_type": "continuous"}, "timestep_type is 'continuous'; only 'discrete' is supported"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas is True; only False is supported"),
        ({"_class_name": "DDPMScheduler", "clip_sample": True}, "clip_sample is True; only False is supported"),
        ({"timestep_spacing": "karras"}, "timestep_spacing 'karras' is not supported; choose from"),
    ],
)
def test_a_scheduler_of_another_process(tmp_path, change, message):
    """A scheduler that asks the network in another way (flow matching, continuous time): refused by the field."""
    with pytest.raises(UserError, match=r"scheduler_config\.json") as refusal:
        Schedule.load(write(tmp_path, {**SD21, "_class_name": "EulerDiscreteScheduler"} | change))
    assert message in str(refusal.value)


def zero_snr(**change):
    return {**SD21, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} | change


@pytest.mark.situation
@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"]
)
def test_a_schedule_that_ends_in_noise_alone(tmp_path, name):
    """A folder with `rescale_betas_zero_snr`: the last timestep is noise alone, and no weight divides by zero."""
    config = zero_snr(_class_name=name)
    schedule, theirs = Schedule.load(write(tmp_path, config)), getattr(diffusers, name).from_config(config)
    torch.testing.assert_close(schedule.alphas_cumprod, theirs.alphas_cumprod, rtol=0, atol=1e-6)
    assert schedule.alphas_cumprod[-1] == 0
    t = torch.tensor([999, 998, 0])
    x0, eps = torch.randn(2, 3, 4, 6, 10)
    noised = noise(schedule, x0, eps, t)
    assert torch.equal(noised.x[0], eps[0])
    assert torch.equal(noised.target[0], -x0[0])
    assert torch.equal(snr_weight(schedule, t)[:2], torch.ones(2))
    for into, truth in (("sample", x0), ("epsilon", eps)):
        torch.testing.assert_close(convert(schedule, noised.target, noised.x, t, into), truth, rtol=0, atol=1e-5)
        torch.testing.assert_close(convert(schedule, x0, noised.x, t, into, "sample"), truth, rtol=0, atol=1e-4)
    again = Schedule._from_config(schedule.to_dict(), tmp_path)
    assert torch.equal(again.alphas_cumprod, schedule.alphas_cumprod)
    assert torch.equal(again.alphas_cumprod, Schedule.load(tmp_path).alphas_cumprod)


@pytest.mark.situation
def test_an_epsilon_model_cannot_end_in_noise_alone(tmp_path):
    """The same field with an epsilon model: refused, as the last timestep tells it nothing of the picture."""
    with pytest.raises(
        UserError, match=r"scheduler_config\.json: prediction_type is 'epsilon' with rescale_betas_zero"
    ):
        Schedule.load(write(tmp_path, zero_snr(prediction_type="epsilon")))
    one = {"num_train_timesteps": 1, "steps_offset": 0}
    with pytest.raises(UserError, match="num_train_timesteps is 1 with rescale_betas_zero_snr, wanted 2 or more"):
        Schedule._from_config(zero_snr(**one), tmp_path)


def test_missing_set_alpha_to_one_is_true_for_ddim(tmp_path):
    config = {name: value for name, value in SD21.items() if name != "set_alpha_to_one"}
    assert Schedule.load(write(tmp_path, config)).set_alpha_to_one is True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta_schedule": "linear"}, "beta_schedule is 'linear'; only 'scaled_linear' is supported"),
        ({"trained_betas": [0.1]}, "trained_betas is"),
        ({"rescale_betas_zero_snr": 1}, "rescale_betas_zero_snr is 1, not of type bool"),
        ({"clip_sample": True}, "clip_sample is True; only False"),
        ({"thresholding": True}, "thresholding is True"),
        ({"prediction_type": "v_predictions"}, "did you mean 'v_prediction'"),
        ({"prediction_type": "sample"}, "prediction_type 'sample' is not supported"),
        ({"beta_start": 0.02}, "beta_start 0.02 <= beta_end 0.012"),
        ({"beta_end": "0.012"}, "beta_end is '0.012', not of type float"),
        ({"steps_offset": 1000}, "steps_offset 1000 is not in"),
        ({"num_train_timesteps": 1e3}, "num_train_timesteps is 1000.0, not of type int"),
        ({"set_alpha_to_one": 0}, "set_alpha_to_one is 0, not of type bool"),
    ],
)
def test_load_refuses_and_names_file_and_field(tmp_path, change, message):
    with pytest.raises(UserError, match=r"scheduler_config\.json") as refusal:
        Schedule.load(write(tmp_path, {**SD21, **change}))
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_load_says_when_a_default_is_to_blame(tmp_path):
    config = {name: value for name, value in SD21.items() if name != "clip_sample"}
    with pytest.raises(UserError, match="clip_sample is True by default; only False"):
        Schedule.load(write(tmp_path, config))


@pytest.mark.parametrize("text", ["{", "[]"])
def test_load_refuses_a_malformed_file(tmp_path, text):
    with pytest.raises(UserError, match=r"scheduler_config\.json"):
        Schedule.load(write(tmp_path, text))


def test_load_names_a_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"scheduler_config\.json is missing"):
        Schedule.load(tmp_path)


def test_shapes_must_agree(batch):
    x0, eps, t = batch
    with pytest.raises(ValueError, match=r"latents \(5, 4, 6, 10\) and eps \(4, 4, 6, 10\)"):
        noise(Schedule.sd(), x0, eps[:4], t)
    with pytest.raises(ValueError, match=r"t \(1,\) does not match .* \(5, 4, 6, 10\)"):
        noise(Schedule.sd(), x0, eps, t[:1])


def test_weight_settings_are_checked():
    with pytest.raises(UserError, match="snr_gamma is 0"):
        snr_weight(Schedule.sd(), torch.tensor([0]), gamma=0)
