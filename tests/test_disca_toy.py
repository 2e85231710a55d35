"""DisCa on the toy, from training to requests: what bundles give is what its modules give, one forecast after the other."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from toy import TOKENS, WIDTH
from toy_model import ToyModel
from toy_product import run_cli, succeed

import cachec
from cachec.compiler.methods.disca import load_blocks
from cachec.compiler.methods.parameters import load_predictor
from cachec.compiler.models.blocks import CACHED, KeepingTransformer, PredictingTransformer
from cachec.runtime.bundle import Bundle
from cachec.runtime.lanes import Lanes
from cachec.runtime.noise import make_noise

STEPS, COMPUTED = 8, (0, 2, 4, 7)  # the published list of eight steps
DISCA = ["--method", "disca", "--steps", STEPS]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def predictor(toy_directory, tmp_path_factory):
    out = tmp_path_factory.mktemp("disca") / "toy.safetensors"
    few = ["--set", "updates=4", "--set", "adversarial=2", "--set", "batch=2"]
    output = succeed("train", toy_directory, *DISCA, *few, "-o", out)
    assert "depth" in output
    return out


@pytest.fixture(scope="module")
def bundle(toy_directory, predictor):
    out = predictor.with_name("toy.cachec")
    options = ["--target", "ort", "--target", "eager", "--verify-passes"]
    succeed("compile", toy_directory, *DISCA, "--predictor", predictor, *options, "-o", out)
    return out


@pytest.fixture(scope="module")
def loaded(bundle):
    with cachec.load(bundle, target="ort") as found:
        yield found


@pytest.fixture(scope="module")
def reference(predictor):
    """A run as DisCa's code makes it, on the modules."""
    model, sigmas = ToyModel(), np.linspace(1, 0, STEPS + 1, dtype=np.float32)
    blocks = load_blocks(model, load_predictor(predictor))
    keeping = KeepingTransformer(model.transformer, model.body)
    predicting = PredictingTransformer(model.transformer, model.body, blocks, model.capturable)

    @torch.no_grad()
    def run(condition, noise, start=0, computed=COMPUTED):
        x, prompt, tokens = torch.from_numpy(noise), torch.from_numpy(condition), None
        for step in range(start, STEPS):
            given = {"latents": x, "timestep": torch.full((len(x),), float(sigmas[step])), "prompt": prompt}
            if step in computed:
                velocity, tokens = keeping(**given)
            else:
                velocity = predicting(**given, **{CACHED: tokens})
            x = x + (sigmas[step + 1] - sigmas[step]).item() * velocity
        return x.numpy()

    return run


def request(seed, batch=1):
    condition = np.random.default_rng(seed).standard_normal((batch, WIDTH)).astype(np.float32)
    return condition, np.stack([make_noise(seed + number, (TOKENS, WIDTH)) for number in range(batch)])


@pytest.mark.parametrize("target", ["ort", "eager"])
def test_sessions_give_what_the_modules_give(bundle, reference, target):
    condition, noise = request(1, batch=2)
    with cachec.load(bundle, target=target) as loaded:
        got = loaded.session(batch=2).run({"prompt": condition}, noise)
    wanted = reference(condition, noise)
    assert np.abs(got - wanted).max() < TOLERANCE * np.abs(wanted).max()
    assert np.abs(got - reference(condition, noise, computed=range(STEPS))).max() > 1e-3  # the forecasts are no computed steps


def test_the_program_has_one_slot_that_computed_steps_write(loaded):
    program = loaded.programs["default"]
    assert program.slots == {"feature": 1}
    assert program.compute_steps == COMPUTED
    assert [one.op for one in program.instructions] == ["compute" if s in COMPUTED else "predict" for s in range(STEPS)]
    written = [one.writes for one in program.instructions if one.op == "predict"]
    assert not any(written)
    signature = loaded.engines["forecast"].signature
    assert {"feature_0", "latents"} <= {spec.name for spec in signature.inputs}
    assert "feature" not in {spec.name for spec in signature.outputs}


def test_lanes_give_what_sessions_give(loaded):
    session, lanes = loaded.session(), Lanes(loaded, buckets=(1, 2, 4))
    requests = [request(seed) for seed in range(5)]
    tickets = []
    for seed, (condition, _) in enumerate(requests):
        tickets.append(lanes.submit({"prompt": condition}, seed=seed))
        lanes.tick()
    lanes.run_until_idle()
    for ticket, (condition, noise) in zip(tickets, requests, strict=True):
        np.testing.assert_allclose(ticket.result(0), session.run({"prompt": condition}, noise), rtol=1e-5, atol=1e-6)


def test_inspect_says_what_it_holds(bundle):
    output = succeed("inspect", bundle)
    assert "disca (depth=2, fusion=model" in output
    assert "fold none" in output
    assert "1 feature slots of float32" in output


def test_requests_may_begin_later(loaded, reference):
    """What was not computed by then is computed; a sampler outside gets the same velocities one by one."""
    condition, noise = request(3)
    got = loaded.session(start=3).run({"prompt": condition}, noise)
    np.testing.assert_allclose(got, reference(condition, noise, start=3, computed=(3, 4, 7)), rtol=1e-4, atol=1e-5)


def test_what_it_cannot_do_is_said(toy_directory, predictor, bundle):
    for options, message in (
        (["--target-psnr", "40"], "disca"),
        (["--schedule", "search", "--budget", "4"], "disca"),
        (["--cut", "blocks.1", "--predictor", predictor], "keeps the tokens behind the last block"),
    ):
        code, output = run_cli("compile", toy_directory, *DISCA, *options, "-o", predictor.with_name("no.cachec"))
        assert code != 0, options
        assert message in output
    code, output = run_cli("add-level", bundle, predictor, "--budget", "3")
    assert code != 0
    assert "its predictor is inside an engine" in output or "is not a calibration" in output


@pytest.mark.slow
def test_tensorrt_for_rtx_builds_its_graphs(bundle, tmp_path):
    """They are built, not run: that takes a GPU."""
    pytest.importorskip("tensorrt_rtx_bindings", reason="the extra rtx is not installed")
    out = tmp_path / "toy.cachec"
    shutil.copytree(bundle, out)
    succeed("add-target", out, "--target", "tensorrt-rtx")
    (engines,) = (one.engines for one in Bundle.open(out, verify=True).manifest.targets if one.backend == "tensorrt-rtx")
    assert {"feature_0", "latents"} <= {spec.name for spec in engines["forecast"].signature.inputs}
    assert all(Path(out, artifact.path).stat().st_size > 1e4 for artifact in engines.values())
