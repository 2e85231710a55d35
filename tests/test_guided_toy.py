"""Sessions of guided requests and of samplers that are no flow's, beside the evaluator that knows no plans: on real engines."""

from dataclasses import replace

import numpy as np
import pytest
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from toy import TOKENS, WIDTH, example_inputs
from toy_bundle import IO, STEPS, split_toy

from cachec.compiler.calibration.engine_evaluator import EngineEvaluator
from cachec.compiler.calibration.graph_evaluator import GraphEvaluator
from cachec.compiler.calibration.runs import run_uncached
from cachec.compiler.evaluation.error_by_step import trace
from cachec.compiler.graphs.export import plan_engines
from cachec.compiler.graphs.prepare import engine, linear
from cachec.compiler.methods.adams import Adams
from cachec.compiler.methods.taylor import Taylor
from cachec.compiler.tables.coefficients import ForecastTable
from cachec.compiler.tables.lower import lower, lower_uncached
from cachec.compiler.tables.sampler_probe import probe_sampler
from cachec.compiler.tables.sampling import Sampling
from cachec.compiler.tables.schedule import Schedule
from cachec.engines.eager import EagerEngine
from cachec.engines.torch_device import TorchDevice
from cachec.runtime.device import DeviceName
from cachec.runtime.errors import BundleError, InputError
from cachec.runtime.program import ProgramKey, hash_sigmas
from cachec.runtime.session import Session
from cachec.runtime.stepper import Stepper

SCHEDULE = Schedule(STEPS, (0, 2, 3, 6))
SAMPLERS = {
    "flow": lambda: FlowMatchEulerDiscreteScheduler(shift=2.0),
    "ddim": lambda: DDIMScheduler(clip_sample=False, timestep_spacing="trailing"),
    "dpm": DPMSolverMultistepScheduler,
}
RULES = ("plain", "renormalised", "extra")
BATCH = 3


def sampling_of(name):
    scheduler = SAMPLERS[name]()
    scheduler.set_timesteps(STEPS)
    return Sampling.of(probe_sampler(scheduler), np.linspace(1, 0.1, STEPS))


@pytest.fixture(scope="module")
def engines():
    return maker(by_row=False)


@pytest.fixture(scope="module")
def by_row():
    """Engines that take numbers for each row of a batch."""
    return maker(by_row=True)


def maker(*, by_row):
    """Engines by rule of guidance, and whether latents are carried in part."""
    made = {}

    def make(rule, carries):
        if (rule, carries) not in made:
            graphs = engine(linear(split_toy(), by_row=by_row), replace(IO, guidance=rule), carries=carries)
            device = TorchDevice(DeviceName.parse("cpu"))
            plans = plan_engines(graphs, example_inputs(), IO.latents, STEPS)
            made[rule, carries] = {plan.name: EagerEngine(graphs.modules[plan.name], plan.signature, device) for plan in plans}
        return made[rule, carries]

    return make


@pytest.fixture(scope="module")
def given():
    rng = np.random.default_rng(0)

    def random(*shape):
        return rng.standard_normal((BATCH, *shape)).astype(np.float32)

    conditions = {"prompt": random(WIDTH), "negative_prompt": random(WIDTH), "guidance_scale": np.array([3, 1, 5], np.float32)}
    return random(TOKENS, WIDTH), conditions


def programs(sampling, *, guided):
    key = ProgramKey(STEPS, hash_sigmas(sampling.sigmas), {}, guided=guided)
    hidden, output = (
        lower(method.table(SCHEDULE, sampling.levels(method.cut), None), key, sampling) for method in (Taylor(1), Adams(2))
    )
    return {"uncached": lower_uncached(key, sampling), "hidden": hidden, "output": output}


@pytest.mark.parametrize("rule", [None, *RULES])
@pytest.mark.parametrize("name", SAMPLERS)
def test_sessions_play_what_the_evaluator_plays(name, rule, engines, given):
    sampling, (noise, conditions) = sampling_of(name), given
    conditions = conditions if rule else {"prompt": conditions["prompt"]}
    io = replace(IO, guidance=rule)
    evaluator = GraphEvaluator(split_toy(), io)
    finals = {}
    for cut, program in programs(sampling, guided=rule is not None).items():
        session = Session(engines(rule, sampling.rows is not None), program, io, batch=BATCH)
        for _ in range(2):  # nothing is left behind
            got = session.run(conditions, noise)
            wanted = evaluator.play(program, noise, conditions)
            np.testing.assert_allclose(got, wanted, atol=2e-5 * np.abs(wanted).max(), err_msg=cut)
        finals[cut] = got
    assert all(np.abs(finals[cut] - finals["uncached"]).max() > 1e-3 for cut in ("hidden", "output"))


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_guided_run_can_be_followed_step_by_step(name, engines, given):
    sampling, (noise, conditions), io = sampling_of(name), given, replace(IO, guidance="plain")
    session = Session(engines("plain", sampling.rows is not None), programs(sampling, guided=True)["uncached"], io, batch=BATCH)
    followed = list(trace(session, conditions, noise))
    assert session.finished
    wanted = list(run_uncached(GraphEvaluator(split_toy(), io), sampling, noise, conditions))
    for step, ((sigma, latents), one) in enumerate(zip(followed, wanted, strict=True)):
        assert sigma == sampling.sigmas[step + 1]
        np.testing.assert_allclose(latents, one.latents, atol=2e-5 * np.abs(one.latents).max())


@pytest.mark.parametrize("rule", [None, *RULES])
@pytest.mark.parametrize("name", SAMPLERS)
def test_each_branch_is_forecast_by_numbers_of_its_own(name, rule, by_row, given):
    sampling, (noise, conditions) = sampling_of(name), given
    conditions = conditions if rule else {"prompt": conditions["prompt"]}
    io, key = replace(IO, guidance=rule), ProgramKey(STEPS, hash_sigmas(sampling.sigmas), {}, guided=rule is not None)
    tables = [Taylor(order).table(SCHEDULE, sampling.sigmas, None) for order in (0, 1)]
    tables[0].bias[[1, 4, 5]], tables[1].bias[[1, 4, 5]] = 0.2, -0.1
    both = ForecastTable.of_branches(*tables)
    evaluator, played = GraphEvaluator(split_toy(), io), {}
    for label, table in {"negative": tables[0], "positive": tables[1], **({"both": both} if rule else {})}.items():
        program = lower(table, key, sampling)
        got = Session(by_row(rule, sampling.rows is not None), program, io, batch=BATCH).run(conditions, noise)
        wanted = evaluator.play(program, noise, conditions)
        np.testing.assert_allclose(got, wanted, atol=2e-5 * np.abs(wanted).max(), err_msg=label)
        played[label] = got
    assert all(np.abs(played[one] - played["both"]).max() > 1e-3 for one in ("negative", "positive") if rule)


def test_a_sampler_outside_says_which_branch_it_asks_for(by_row, given):
    noise, conditions = given
    sampling = sampling_of("flow")
    tables = [Taylor(order).table(SCHEDULE, sampling.sigmas, None) for order in (0, 1)]
    key = ProgramKey(STEPS, hash_sigmas(sampling.sigmas), {}, guided=True)
    program = lower(ForecastTable.of_branches(*tables), key, sampling)
    with pytest.raises(InputError, match="which branch this is was not said: name it, negative or positive"):
        Stepper(by_row(None, False), program, IO, batch=2)
    with pytest.raises(InputError, match="unknown branch 'both'.*negative, positive"):
        program.of_branch("both")
    for table, branch in zip(tables, ("negative", "positive"), strict=True):
        answers = []
        for one in (program.of_branch(branch), lower(table, replace(key, guided=False), sampling)):
            stepper = Stepper(by_row(None, False), one, IO, batch=BATCH)
            stepper.begin({"prompt": conditions["prompt"]})
            answers.append([stepper.velocity(step, noise) for step in range(STEPS)])
        np.testing.assert_array_equal(*answers)


def test_rows_of_branches_need_engines_that_take_them(engines, given):
    sampling = sampling_of("flow")
    table = Taylor(1).table(SCHEDULE, sampling.sigmas, None)
    key = ProgramKey(STEPS, hash_sigmas(sampling.sigmas), {}, guided=True)
    program = lower(ForecastTable.of_branches(table, table), key, sampling)
    with pytest.raises(BundleError, match="the program has rows of 2 groups, and its engine weighs 1"):
        Session(engines("plain", False), program, IO, batch=1)


def test_at_the_scale_of_the_positive_branch_guidance_is_none(engines, given):
    sampling, (noise, conditions) = sampling_of("flow"), given
    guided, plain = (programs(sampling, guided=guided)["output"] for guided in (True, False))
    io, built = replace(IO, guidance="plain"), engines("plain", False)
    conditions = {**conditions, "guidance_scale": np.ones(BATCH, np.float32)}
    alone = Session(built, plain, io, batch=BATCH).run({"prompt": conditions["prompt"]}, noise)
    np.testing.assert_allclose(Session(built, guided, io, batch=BATCH).run(conditions, noise), alone, atol=1e-5)


def test_a_guided_request_brings_both_branches_and_the_scale(engines, given):
    noise, conditions = given
    session = Session(engines("plain", False), programs(sampling_of("flow"), guided=True)["hidden"], IO, batch=BATCH)
    for missing in conditions:
        with pytest.raises(InputError, match=f"conditions are .*'{missing}'.*, got"):
            session.run({name: value for name, value in conditions.items() if name != missing}, noise)


def test_engines_of_flows_do_not_play_other_samplers(engines):
    with pytest.raises(BundleError, match="takes the steps of flows only"):
        Session(engines(None, False), programs(sampling_of("ddim"), guided=False)["hidden"], IO, batch=1)


@pytest.mark.parametrize("guided", [False, True])
def test_engines_are_evaluated_as_graphs_are(guided, engines, given):
    noise, conditions = given
    conditions = conditions if guided else {"prompt": conditions["prompt"]}
    io = replace(IO, guidance="renormalised" if guided else None)
    ours = EngineEvaluator(engines(io.guidance, False), io)
    graphs = GraphEvaluator(split_toy(), io)
    told = np.array([0.9, 0.5, 0.9])
    velocity, feature = graphs.evaluate(noise, told, conditions)
    for got, wanted in zip(ours.evaluate(noise, told, conditions), (velocity, feature), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)
    np.testing.assert_allclose(ours.tail(feature, told, conditions), velocity, atol=1e-5)
