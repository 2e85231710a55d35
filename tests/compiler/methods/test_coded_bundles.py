"""Bundles of methods that keep features in a code: engines, lanes and samplers outside give what the evaluator gives."""

import numpy as np
import pytest
import torch
from toy import TOKENS, WIDTH, example_inputs
from toy_bundle import IO, KEY, SCHEDULE, SIGMAS, STEPS, split_toy, write_bundle
from toy_linca import fitted, random_net
from toy_tables import SETTINGS

import cachec
from cachec.compiler.calibration.graph_evaluator import GraphEvaluator
from cachec.compiler.graphs.prepare import linear
from cachec.compiler.methods.freqca import FreqCa
from cachec.compiler.methods.hyca import HyCa
from cachec.compiler.methods.linca import LinCa
from cachec.compiler.methods.parameters import Parameters
from cachec.compiler.methods.reuse import Reuse
from cachec.compiler.methods.svd_cache import SvdCache
from cachec.compiler.tables.lower import lower_table
from cachec.compiler.tables.sampling import Sampling
from cachec.runtime.lanes import Lanes
from cachec.runtime.stepper import Stepper

BASIS = np.linalg.qr(np.random.default_rng(1).standard_normal((WIDTH, 3)))[0].T.astype(np.float32)
LABELS, CHOICES = np.array([2, 0, 1, 1, 0, 2, 2, 0]), np.array([4, 0, 2])
CASES = {
    "freqca": (FreqCa(transform="fft", cutoff=0.4), None),
    "svd-cache": (SvdCache(), Parameters({"directions": BASIS}, {}, "a test")),
    "hyca": (HyCa(clusters=3), Parameters({"clusters": LABELS, "solvers": CHOICES}, {}, "a test")),
    "linca": (LinCa(segments=2), fitted([random_net(0, 1), random_net(1, 1)], [4, 6])),
}


@pytest.mark.parametrize("name", CASES)
def test_engines_lanes_and_samplers_outside_give_what_the_evaluator_does(name, tmp_path):
    (method, parameters), split = CASES[name], split_toy(head_axis=True)
    coding = method.coding((TOKENS, WIDTH), SETTINGS, parameters)
    program = lower_table(method.table(SCHEDULE, SIGMAS, parameters), KEY, Sampling(SIGMAS, SIGMAS[:-1]))
    write_bundle(linear(split, coding=coding), program, method, tmp_path / name, ["eager", "ort"])
    prompt, noise = example_inputs()["prompt"].numpy(), example_inputs()["latents"].numpy()
    wanted = GraphEvaluator(split, IO, coding=coding).play(program, noise, {"prompt": prompt})
    reuse = lower_table(Reuse().table(SCHEDULE, SIGMAS, None), KEY, Sampling(SIGMAS, SIGMAS[:-1]))
    assert np.abs(wanted - GraphEvaluator(split, IO).play(reuse, noise, {"prompt": prompt})).max() > 1e-3
    for target in ("eager", "ort"):
        with cachec.load(tmp_path / name, target=target) as loaded:
            got = loaded.session(batch=2).run({"prompt": prompt}, noise)
            np.testing.assert_allclose(got, wanted, atol=2e-5)
            stepper, x = Stepper(loaded.engines, loaded.programs["default"], loaded.io, batch=2), noise
            stepper.begin({"prompt": prompt})
            for step in range(STEPS):
                x = x + (SIGMAS[step + 1] - SIGMAS[step]) * stepper.velocity(step, x)
            np.testing.assert_allclose(x, wanted, atol=2e-5)
            if target == "ort":
                check_lanes(loaded, prompt)


def check_lanes(loaded, prompt):
    lanes = Lanes(loaded, buckets=(1, 2))
    tickets = [lanes.submit({"prompt": prompt[seed : seed + 1]}, seed=seed) for seed in range(2)]
    lanes.run_until_idle()
    for seed, ticket in enumerate(tickets):
        np.testing.assert_array_equal(ticket.result(0), loaded.denoise({"prompt": prompt[seed : seed + 1]}, [seed]))


@pytest.mark.parametrize("name", ["freqca", "hyca"])
def test_codes_are_kept_in_fewer_bits_if_asked_for(name, tmp_path):
    (method, parameters), split = CASES[name], split_toy(head_axis=True)
    coding = method.coding((TOKENS, WIDTH), SETTINGS, parameters)
    program = lower_table(method.table(SCHEDULE, SIGMAS, parameters), KEY, Sampling(SIGMAS, SIGMAS[:-1]))
    write_bundle(linear(split, coding=coding), program, method, tmp_path / name, "ort", slots="float16")
    prompt, noise = example_inputs()["prompt"].numpy(), example_inputs()["latents"].numpy()
    wanted = GraphEvaluator(split, IO, coding=coding).play(program, noise, {"prompt": prompt})
    with cachec.load(tmp_path / name) as loaded:
        session = loaded.session(batch=2)
        np.testing.assert_allclose(session.run({"prompt": prompt}, noise), wanted, atol=2e-2)
        assert str(session.slots["feature"].dtype) == "float16"
        assert session.slots["feature"].shape[1:] == (2, *coding.encode(torch.zeros(2, TOKENS, WIDTH)).shape[1:])
