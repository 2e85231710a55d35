"""What requests choose is what is made: scales, negative prompts, sizes over HTTP, beside sessions that are told the same."""

import base64
from dataclasses import replace

import numpy as np
import pytest
from numpy_engines import KEY, SCHEDULE, SIGMAS, NumpyEngine, X
from toy_server import PNG, Origin, ToyPictures, running, toy_served

import cachec
from cachec.compiler.methods.adams import Adams
from cachec.compiler.models.base import settings_of
from cachec.compiler.tables.lower import lower_advance, lower_uncached
from cachec.compiler.tables.sampling import Sampling
from cachec.runtime.abi import GUIDANCE, GUIDE, negative_name
from cachec.runtime.noise import make_noise
from cachec.runtime.program import UNCACHED
from cachec.runtime.specs import Signature, TensorSpec
from cachec.runtime.variants import PictureSize
from cachec.serving.limits import Limits
from cachec.serving.served import Served


def guide(negative, positive, guidance_scale):
    return {"velocity": negative + guidance_scale[:, None, None] * (positive - negative)}


class Guided(Origin):
    """The toy with two branches, in eight steps."""

    def __init__(self):
        super().__init__(1, {})
        key, sampling = replace(KEY, guided=True), Sampling(SIGMAS, SIGMAS[:-1])
        adams = lower_advance(Adams(2).table(SCHEDULE, SIGMAS, None), key, sampling)
        self.programs = {8: {UNCACHED: lower_uncached(replace(key, level=UNCACHED), sampling), "default": adams}}
        specs = [TensorSpec(name, X, "float32") for name in ("negative", "positive", "velocity")]
        self._engines[GUIDE] = NumpyEngine(
            guide, Signature((*specs[:2], TensorSpec(GUIDANCE, ("batch",), "float32")), (specs[2],))
        )
        self.bundle.manifest = replace(self.bundle.manifest, more=())


class GuidedPictures(ToyPictures):
    """``setting``: which of the two scales the branches are combined at; ``field``: what requests call it."""

    setting, field = "guidance", "guidance_scale"

    def conditions(self, prompts, names, scales, negatives=None):
        found = self.encode(prompts)
        found |= {negative_name(name): value for name, value in self.encode(negatives).items()}
        found[GUIDANCE] = np.full(len(prompts), scales.of_branches(self.setting), np.float32)
        return {name: found[name] for name in names}


class TrueScaled(GuidedPictures):
    setting = field = "true_cfg_scale"


@pytest.mark.parametrize("pictures", [GuidedPictures, TrueScaled])
def test_scales_and_negative_prompts_are_those_of_the_request(pictures):
    loaded = Guided().open()
    ends, session = pictures(loaded), loaded.session()
    asked = [
        (1.0, "", {}),
        (3.5, "", {pictures.field: 3.5}),
        (3.5, "blur", {pictures.field: 3.5, "negative_prompt": "blur"}),
    ]
    files = []
    with running(Served("toy", loaded, ends)) as server:
        for scale, negative, fields in asked:
            status, data = server.generate("a ring", seed=5, **fields)
            assert status == 200, data
            given = {**ends.encode(["a ring"]), negative_name("prompt"): ends.encode([negative])["prompt"]}
            latents = session.run(
                {**given, GUIDANCE: np.full(1, scale, np.float32)}, make_noise(5, session.latent_shape[1:])[None]
            )
            files.append(base64.b64decode(data["data"][0]["b64_json"]))
            assert files[-1] == ends.to_png(ends.decode(latents)[0])
    assert len(set(files)) == len(asked)


class FluxPictures(ToyPictures):
    """Small FLUX's own text encoders, and pictures that are latents in a corner."""

    def __init__(self, loaded, model):
        self._loaded, self._model = loaded, model

    def conditions(self, prompts, names, scales, negatives=None):
        return self._model.encode(prompts, replace(settings_of(self._loaded.manifest), guidance=scales.guidance), names)

    def decode(self, latents, *, size=None):
        size = PictureSize.parse(size or self._loaded.manifest.sizes[0])
        pictures = np.zeros((len(latents), size.height, size.width, 3), np.uint8)
        pictures.reshape(len(latents), -1)[:, : latents[0].size] = (127.5 + 40 * latents).clip(0, 255).reshape(len(latents), -1)
        return pictures


def test_sizes_and_scales_that_are_inputs_are_those_of_the_request(several, flux_model):
    asked = [{}, {"size": "64x48"}, {"width": 64, "guidance_scale": 7.0, "num_inference_steps": 4}]
    files = []
    with cachec.load(several) as loaded:
        ends = FluxPictures(loaded, flux_model)
        with running(Served("flux", loaded, ends, lanes=2)) as server:
            for fields in asked:
                status, data = server.generate("a red circle", seed=3, **fields)
                assert status == 200, data
                size, steps = "64x48" if fields else "32x48", fields.get("num_inference_steps", 6)
                assert (data["size"], data["num_inference_steps"]) == (size, steps)
                at = loaded.at(size, steps)
                settings = settings_of(at.manifest)
                settings = replace(settings, guidance=fields.get("guidance_scale", settings.guidance))
                latents = at.denoise(flux_model.encode(["a red circle"], settings, at.conditions()), [3])
                files.append(base64.b64decode(data["data"][0]["b64_json"]))
                assert files[-1] == PNG + ends.decode(latents, size=size)[0].tobytes()
            plain = server.generate("a red circle", seed=3, **{**asked[2], "guidance_scale": None})[1]["data"][0]
    assert len({*files, base64.b64decode(plain["b64_json"])}) == len(asked) + 1


def test_pixels_of_all_samples_are_limited():
    with running(toy_served(), limits=Limits(pixels=2 * 16 * 24)) as server:
        assert server.generate(n=2)[0] == 200
        status, data = server.generate(n=3)
    assert (status, data["error"]["code"], data["error"]["param"]) == (400, "too_many", "size")
    assert (
        data["error"]["message"]
        == "the request has 1152 pixels; this server makes up to 768: ask for fewer or smaller pictures"
    )
