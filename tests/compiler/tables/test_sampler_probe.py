"""The schedulers of diffusers, each probed as it stands and compared with itself, or refused by name."""

import copy

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, schedulers
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from samplers import DIT, DYNAMIC, EULER, FEW, FLOW, MULTISTEP, SIGMAS, STEPS, UNCLIPPED

from cachec.compiler.models import MODELS
from cachec.compiler.models.base import Settings
from cachec.compiler.models.flux import FluxModel
from cachec.compiler.tables.sampler_probe import check_options, check_sampler, probe_sampler
from cachec.runtime.errors import InputError

NOISY = "draws noise at its steps"
TWICE = "evaluates the model 2 times a step, and cachec takes one"
CLIPS = "has clip_sample on, .* switch it off, clip_sample=False"
STEP = "cannot step from latents and a model's output alone"
REFUSED = [
    (
        "FlowMatchEulerDiscreteScheduler",
        {"stochastic_sampling": True},
        r"\(stochastic_sampling=True\).*: set stochastic_sampling=",
    ),
    ("FlowMatchLCMScheduler", {}, f"{NOISY}, so its runs cannot be forecast: take a deterministic one"),
    ("LTXEulerAncestralRFScheduler", {}, rf"{NOISY} \(eta=1.0\), .*: set eta=0"),
    ("EulerAncestralDiscreteScheduler", {}, NOISY),
    ("LCMScheduler", {}, NOISY),
    ("TCDScheduler", {}, NOISY),
    ("SASolverScheduler", {}, f"{NOISY}, so"),
    ("CMStochasticIterativeScheduler", {}, NOISY),
    ("DDPMScheduler", UNCLIPPED, NOISY),
    ("DDPMParallelScheduler", UNCLIPPED, NOISY),
    ("UnCLIPScheduler", UNCLIPPED, NOISY),
    (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++"},
        r"\(algorithm_type='sde-dpmsolver\+\+'\).*: set algor",
    ),
    ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++"}, NOISY),
    ("EDMDPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, NOISY),
    ("FlowMatchHeunDiscreteScheduler", {}, TWICE),
    ("HeunDiscreteScheduler", {}, TWICE),
    ("KDPM2DiscreteScheduler", FEW, TWICE),
    ("KDPM2AncestralDiscreteScheduler", FEW, TWICE),
    ("PNDMScheduler", {}, "evaluates the model 17 times in 8 steps, and cachec takes one"),
    ("PNDMScheduler", {"skip_prk_steps": True}, "evaluates the model 9 times in 8 steps"),
    ("DDIMScheduler", {}, CLIPS),
    ("DDIMParallelScheduler", {}, CLIPS),
    ("DDIMInverseScheduler", {}, CLIPS),
    ("CogVideoXDDIMScheduler", {}, CLIPS),
    ("DDPMScheduler", {}, CLIPS),
    ("DPMSolverMultistepScheduler", {"thresholding": True}, "has thresholding on, .* switch it off, thresholding=False"),
    ("UniPCMultistepScheduler", {"thresholding": True}, "has thresholding on"),
    ("DDIMScheduler", {**DIT, "rescale_betas_zero_snr": True}, "is not finite at step 0 of 8: .*rescale_betas_zero_snr"),
    ("UniPCMultistepScheduler", {"solver_type": "bh1"}, "is not finite at step 7 of 8: .*final_sigmas_type"),
    ("CogVideoXDPMScheduler", {}, "wants old_pred_original_sample, timestep_back at every step"),
    ("RePaintScheduler", {}, "wants original_image, mask at every step"),
    ("KarrasVeScheduler", {}, "wants sigma_hat, sigma_prev, sample_hat at every step"),
    ("ScoreSdeVeScheduler", {}, r"has no step\(\)"),
    ("ScoreSdeVpScheduler", {}, r"has no step\(\)"),
    ("PiflowScheduler", {}, STEP),
    ("DDPMWuerstchenScheduler", {}, STEP),
    ("BlockRefinementScheduler", {}, STEP),
    ("DiscreteDDIMScheduler", {}, STEP),
    ("EntropyBoundScheduler", {}, STEP),
]
NOT_MADE = {  # by their defaults alone, or not for so many steps, or not without torchsde
    "AmusedScheduler", "ConsistencyDecoderScheduler", "CosineDPMSolverMultistepScheduler", "DPMSolverSDEScheduler",
    "HeliosDMDScheduler", "HeliosScheduler", "RFD4ProteinaScheduler", "SCMScheduler", "VQDiffusionScheduler",
}  # fmt: skip


def name_of(case):
    return case if isinstance(case, str) else None


def ready(name, options, told):
    scheduler = getattr(schedulers, name)(**options)
    scheduler.set_timesteps(**(told or {"num_inference_steps": STEPS}))
    return scheduler


def check_and_probe(scheduler):
    check_options(scheduler)  # much is known before the timesteps are set
    scheduler.set_timesteps(STEPS)
    probe_sampler(scheduler)


def run(scheduler, start, outputs):
    """Latents after each step and what the model is given before it, as a pipeline steps."""
    x, after, inputs = start, [], []
    for output, t in zip(outputs, scheduler.timesteps, strict=True):
        inputs.append(scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x)
        x = scheduler.step(output, t, x, return_dict=False)[0]
        after.append(x)
    return torch.stack(after).flatten(1).numpy(), torch.stack(inputs).flatten(1).numpy()


@pytest.mark.parametrize(("name", "options", "told"), EULER + MULTISTEP, ids=name_of)
def test_rows_give_every_latent_of_a_run(name, options, told):
    scheduler = ready(name, options, told)
    sampler = probe_sampler(scheduler)
    start, *outputs = torch.randn(STEPS + 1, 1, 4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    start = sampler.noise_scale * start
    after, inputs = run(scheduler, start, outputs)
    given = torch.stack([start, *outputs]).flatten(1).numpy()
    np.testing.assert_allclose(sampler.rows @ given, after, rtol=0, atol=1e-6 * np.abs(after).max())
    before = np.vstack([given[:1], after[:-1]])
    np.testing.assert_allclose(sampler.input_scale[:, None] * before, inputs, rtol=0, atol=1e-6 * np.abs(inputs).max())
    assert sampler.rows.shape == (STEPS, 1 + STEPS)
    assert sampler.rows.dtype == np.float64
    assert sampler.name == name
    assert sampler.timesteps.tolist() == scheduler.timesteps.tolist()
    assert sampler.is_euler == ((name, options, told) in EULER)
    if sampler.is_euler:
        one_by_one = sampler.carry[:, None] * before + sampler.gain[:, None] * given[1:]
        np.testing.assert_allclose(one_by_one, after, rtol=0, atol=2e-6 * np.abs(after).max())


@pytest.mark.parametrize(("name", "options", "reason"), REFUSED, ids=name_of)
def test_a_scheduler_that_cannot_be_forecast_is_refused_by_name(name, options, reason):
    scheduler = getattr(schedulers, name)(**options)
    with pytest.raises(InputError, match=f"{name} .*{reason}"):
        check_and_probe(scheduler)


def test_the_probe_looks_at_the_options_itself():
    with pytest.raises(InputError, match=CLIPS):
        probe_sampler(ready("DDIMScheduler", {}, {}))


@pytest.mark.skipif(not diffusers.__version__.startswith("0.42."), reason="another diffusers has other schedulers")
def test_every_scheduler_of_diffusers_is_looked_at():
    known = {name for name in dir(schedulers) if name.endswith("Scheduler") and isinstance(getattr(schedulers, name), type)}
    assert {name for name, *_ in EULER + MULTISTEP + REFUSED} | NOT_MADE == known


@pytest.mark.parametrize("options", [{}, DYNAMIC], ids=["fixed", "dynamic"])
def test_flow_euler_is_what_flux_samples_with(options):
    scheduler = schedulers.FlowMatchEulerDiscreteScheduler(shift=3.0, **options)
    parts = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    transformer = FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, num_attention_heads=1, joint_attention_dim=8, pooled_projection_dim=8
    )
    model = FluxModel(MODELS["flux"], FluxPipeline(scheduler, **parts, transformer=transformer))
    settings = Settings(height=512, width=768, text_tokens=32, guidance=3.5, steps=STEPS, dtype="float32")
    own = model.sampling(settings)
    sigmas, timesteps = own.sigmas, own.timesteps
    scheduler.set_timesteps(sigmas=SIGMAS["sigmas"], mu=calculate_shift(32 * 48))
    sampler = probe_sampler(scheduler)
    assert np.array_equal(sampler.sigmas, sigmas)
    assert np.array_equal(sampler.timesteps.astype(np.float32) / 1000, timesteps)
    assert (sampler.carry == 1).all()
    assert (sampler.input_scale == 1).all()
    assert sampler.noise_scale == 1
    np.testing.assert_allclose(sampler.gain, np.diff(sigmas.astype(np.float64)), atol=1e-7)
    np.testing.assert_allclose(sampler.rows[:, 1:], np.tri(STEPS) * sampler.gain, atol=1e-6)


def test_the_scheduler_and_the_random_numbers_stay_as_they_were():
    scheduler = ready("UniPCMultistepScheduler", FLOW, {})
    before, state = copy.deepcopy(vars(scheduler)), torch.get_rng_state()
    first = probe_sampler(scheduler)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(str(value) == str(before[name]) for name, value in vars(scheduler).items())
    assert np.array_equal(first.rows, probe_sampler(scheduler).rows)


def test_a_run_may_begin_later():
    scheduler = ready("FlowMatchEulerDiscreteScheduler", {}, {})
    scheduler.set_begin_index(3)
    sampler = probe_sampler(scheduler)
    assert sampler.rows.shape == (STEPS - 3, STEPS - 2)
    assert sampler.sigmas.tolist() == scheduler.sigmas[3:].tolist()
    assert len(sampler.timesteps) == STEPS - 3
    scheduler.set_begin_index(STEPS)
    with pytest.raises(InputError, match="begins at step 8 of 8"):
        probe_sampler(scheduler)


def test_rounding_to_float32_adds_up_over_a_long_run_and_is_no_reason_to_refuse():
    scheduler = schedulers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(1000)
    assert probe_sampler(scheduler).is_euler


def test_timesteps_must_be_set_and_the_run_not_begun():
    with pytest.raises(InputError, match=r"timesteps of DDIMScheduler are not set: call its set_timesteps\(\)"):
        probe_sampler(schedulers.DDIMScheduler(**UNCLIPPED))
    scheduler = ready("EulerDiscreteScheduler", {}, {})
    scheduler.step(torch.ones(1), scheduler.timesteps[0], torch.ones(1))
    with pytest.raises(InputError, match="EulerDiscreteScheduler is in the middle of a run, at step 1"):
        probe_sampler(scheduler)


@pytest.mark.parametrize("change", [torch.tanh, lambda x: x + 1, lambda x: x / x.norm()], ids=["tanh", "offset", "norm"])
def test_what_is_not_linear_is_refused(change):
    class Odd(schedulers.FlowMatchEulerDiscreteScheduler):
        def step(self, model_output, timestep, sample, return_dict=True):
            return (change(super().step(model_output, timestep, sample, return_dict=False)[0]),)

    scheduler = Odd()
    scheduler.set_timesteps(STEPS)
    check_options(scheduler)
    with pytest.raises(InputError, match=r"Odd is not linear: at step 0 its latents are .* off"):
        probe_sampler(scheduler)


def test_a_few_steps_tell_whether_a_sampler_will_do_and_leave_it_alone():
    scheduler = schedulers.FlowMatchEulerDiscreteScheduler(**DYNAMIC)
    check_sampler(scheduler)
    assert not hasattr(scheduler, "num_inference_steps")
    with pytest.raises(InputError, match="draws noise at its steps .stochastic_sampling=True"):
        check_sampler(schedulers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True))
