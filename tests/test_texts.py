"""Several lengths of texts in one bundle: where a family masks its padding, a shorter one is the same picture."""

from dataclasses import replace

import numpy as np
import pytest
from toy_product import run_cli, succeed

import cachec
from cachec.compiler.models import find_model, load_model
from cachec.compiler.models.base import settings_of
from cachec.runtime.bundle import Bundle
from cachec.runtime.errors import InputError
from cachec.runtime.lanes import Lanes
from cachec.runtime.noise import make_noise
from cachec.runtime.program import UNCACHED
from tests.compiler.models.test_families import WITHOUT_NEGATIVES, prompts_for, settings_for
from tests.families import FAMILIES, NEGATIVE, PROMPT

pytestmark = pytest.mark.slow
FAMILY, TEXTS, SIZE = next(one for one in FAMILIES if one.name == "z-image"), (32, 64), "48x32"
LENGTHS = {"flux-2": (96, 160), "flux-2-klein": (48, 96), "hunyuan-video-1.5": (64, 128), "qwen-image-edit": (96, 128),
           "z-image": (32, 96)}  # fmt: skip
LONG = f"{PROMPT}, {PROMPT}"
WITHOUT_CHOICE = ("dit", "wan-i2v")  # no text, and one length


@pytest.mark.parametrize("family", [one for one in FAMILIES if one.name not in WITHOUT_CHOICE], ids=lambda one: one.name)
def test_families_say_whether_padding_changes_the_picture(family, saved_family):
    directory = saved_family(family.name)
    model = load_model(find_model(str(directory)))
    for name, stand_in in family.stand_ins(directory).items():
        setattr(model.pipeline, name, stand_in)
    made = []
    for length in LENGTHS.get(family.name, (24, 48)):
        settings = replace(settings_for(family), steps=2, text_tokens=length)
        takes = model.is_guided(settings) and family.name not in WITHOUT_NEGATIVES
        prompts = prompts_for(family, directory)
        given = model.encode(prompts, settings, model.conditions(settings), [NEGATIVE, ""] if takes else None)
        shape = model.example_inputs(settings)[model.io.latents].shape[1:]
        noise = np.stack([make_noise(seed, shape) for seed in range(2)])
        made.append(model.generate(given, noise, settings))
    apart = np.abs(made[0] - made[1]).max() / np.abs(made[1]).max()
    assert apart < 1e-5 if model.io.text else apart > 1e-3


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, saved_family):
    out = tmp_path_factory.mktemp("texts") / "texts.cachec"
    lengths = ",".join(map(str, TEXTS))
    method = ["--method", "taylor", "--budget", "3", "--steps", "4", "--target", "ort"]
    succeed("compile", saved_family(FAMILY.name), *method, "--size", SIZE, "--text-tokens", lengths, "-o", out)
    return out


@pytest.fixture(scope="module")
def model(saved_family):
    return load_model(find_model(str(saved_family(FAMILY.name))))


@pytest.fixture(scope="module")
def loaded(bundle):
    with cachec.load(bundle) as loaded:
        yield loaded


def encoded(model, loaded, prompt, negative=""):
    settings = settings_of(loaded.manifest)
    return model.encode([prompt], settings, model.conditions(settings), [negative])


def test_one_set_of_engines_and_of_programs_is_for_all_lengths(bundle, loaded):
    manifest = Bundle.open(bundle, verify=True).manifest
    assert manifest.texts == loaded.texts == TEXTS
    assert [target.shape_bucket for target in manifest.targets] == [f"{SIZE}, 32+64 text tokens"]
    assert manifest.more == ()
    assert len(list((bundle / "programs").iterdir())) == 2 * len(manifest.programs)
    assert "32, 64" in succeed("inspect", bundle)


@pytest.mark.parametrize("level", ["default", UNCACHED])
def test_a_request_gets_the_shortest_that_holds_its_texts_and_the_same_picture(model, loaded, level):
    for prompt, negative, length in (("a cat", "", 32), (LONG, "", 64), ("a cat", LONG, 64)):
        given = encoded(model, loaded, prompt, negative)
        there, fitted = loaded.fitted(given)
        assert there.manifest.settings["text_tokens"] == length == fitted["cap_feats"].shape[1]
        session = loaded.session(level=level)
        noise = make_noise(3, session.latent_shape[1:])[None]
        np.testing.assert_allclose(loaded.denoise(given, [3], level=level), session.run(given, noise), atol=1e-5)


def test_lanes_do_so_too(model, loaded):
    lanes = Lanes(loaded, policy="fifo")
    requests = [encoded(model, loaded, prompt) for prompt in ("a cat", LONG, "a dog")]
    tickets = [lanes.submit(given, seed=3) for given in requests]
    lanes.run_until_idle()
    for ticket, given in zip(tickets, requests, strict=True):
        np.testing.assert_allclose(ticket.result(0), loaded.denoise(given, [3]), atol=1e-6)
    with pytest.raises(InputError, match="a text has [0-9]+ tokens, and the engines take up to 32"):
        Lanes(loaded, texts=[32]).submit(encoded(model, loaded, LONG), seed=3)


def test_the_unmodified_pipeline_does_so_too(model, loaded, saved_family):
    pipeline = FAMILY.load(saved_family(FAMILY.name))
    changes = {"num_inference_steps": 4}
    wanted = {prompt: FAMILY.run(pipeline, prompt=prompt, **changes) for prompt in ("a cat", LONG)}
    pipeline.transformer = loaded.as_transformer(pipeline.transformer, pipeline=pipeline, level=UNCACHED)
    for prompt in ("a cat", LONG, "a cat"):
        np.testing.assert_allclose(FAMILY.run(pipeline, prompt=prompt, **changes), wanted[prompt], atol=1e-4)
    assert {text for _, _, _, text, _ in pipeline.transformer._runs.steppers} == set(TEXTS)


def test_run_takes_prompts_of_all_lengths(bundle, tmp_path):
    succeed("run", bundle, "-p", "a cat", "-p", LONG, "-o", tmp_path / "one.png")
    assert len(list(tmp_path.glob("one-*.png"))) == 2


def test_a_family_that_looks_at_its_padding_is_refused(saved_family, tmp_path):
    code, output = run_cli("compile", saved_family("flux"), "--method", "taylor", "--budget", "3", "--text-tokens", "8,16",
                           "-o", tmp_path / "x.cachec")  # fmt: skip
    assert code == InputError.exit_code
    assert "text-tokens are 8, 16, but" in output
    assert "looks at what a text is padded with" in output
