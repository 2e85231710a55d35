"""Engines of tiny-flux are compiled once; a drop-in made of them costs nothing."""

import copy

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from drop_in_flux import STEPS, with_parts

from cachec.compiler.accelerate import compile_in_memory, make_form
from cachec.compiler.drop_in.forms import Compiled
from cachec.compiler.drop_in.transformer import AcceleratedTransformer
from cachec.compiler.frontend import make_programs
from cachec.compiler.models import MODELS, TINY_FLUX_DIR
from cachec.compiler.models.flux import FluxModel
from cachec.compiler.request import make_request
from cachec.engines.eager import EagerEngine
from cachec.runtime.program import UNCACHED

METHODS = {"hidden": "taylor", "output": "adams"}


@pytest.fixture(scope="session")
def whole():
    pipeline = FluxPipeline.from_pretrained(TINY_FLUX_DIR, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    del pipeline.transformer.transformer_blocks[1:], pipeline.transformer.single_transformer_blocks[1:]
    return pipeline


@pytest.fixture
def plain(whole):
    return with_parts(whole, copy.deepcopy(whole.transformer))


@pytest.fixture(scope="session")
def compiled(whole):
    """``compiled(cut, every)``: engines, and the program that computes every step or only some."""
    made = {}
    model = FluxModel(MODELS["tiny-flux"], with_parts(whole, copy.deepcopy(whole.transformer)))  # captured once for both cuts

    def get(cut, *, every):
        if cut not in made:
            some, all_steps = (
                make_request(model.spec, method=METHODS[cut], steps=STEPS, schedule=schedule, options={"order": "1"})
                for schedule in ("0,1,3", "0,1,2,3")
            )
            by_text, programs = compile_in_memory(model, some, EagerEngine)
            if cut == "output":  # there the uncached program is not of its cut
                computed = make_programs(model, all_steps, {}, None, None).by_level["default"]
            else:
                computed = programs[UNCACHED]
            made[cut] = {"engines": by_text[some.settings.text_tokens]} | {
                kind: Compiled([make_form(model, some.settings, by_text, program)], model.apart(), "cpu")
                for kind, program in ((True, computed), (False, programs["default"]))
            }
        return made[cut][every]

    return get


@pytest.fixture
def accelerated(plain, compiled):
    """``accelerated(cut, every)``: a pipeline of its own; its weights may be changed, its scheduler exchanged."""

    def make(cut="hidden", *, every=False):
        pipeline = with_parts(plain, None, scheduler=FlowMatchEulerDiscreteScheduler.from_config(plain.scheduler.config))
        pipeline.transformer = AcceleratedTransformer(copy.deepcopy(plain.transformer), pipeline, compiled(cut, every=every))
        return pipeline

    return make


@pytest.fixture(scope="session")
def other_prompt(whole):
    return whole.encode_prompt("a laughing face with short blue hair", None, max_sequence_length=24)[0]


@pytest.fixture
def switch(other_prompt):
    def switcher(at):
        def callback(pipeline, step, timestep, given):
            return {"prompt_embeds": other_prompt} if step == at else given

        return {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}

    return switcher
