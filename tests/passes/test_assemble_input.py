"""A model that takes references joined to the state, and moves only part of what it gives."""

from dataclasses import replace

import pytest
import torch
from toy import TOKENS, ToyDiT, example_inputs

from cachec.compiler.graphs.capture import capture_model, joined
from cachec.compiler.graphs.verify import Verifier
from cachec.passes import AssembleInput, Stage, canonical_passes, check_stage, run_passes
from cachec.passes.base import placeholders
from cachec.runtime.abi import MODEL, VELOCITY
from cachec.runtime.errors import PassError
from cachec.runtime.model_io import ModelIO

STATE, FIRST = 3, 2
IO = ModelIO("latents", "timestep", ("prompt", "first", "second"), ("first", "second"), axis=1, output=(0, STATE))
SIZES = (STATE, FIRST, TOKENS - STATE - FIRST)


def given():
    whole = example_inputs()
    pieces = whole.pop("latents").split(SIZES, 1)
    return dict(zip(("latents", "first", "second"), pieces, strict=True)) | whole


@pytest.fixture(scope="module")
def captured():
    return capture_model(ToyDiT().eval(), joined(given(), IO))


@torch.no_grad()
def test_the_graph_takes_the_state_and_its_parts_and_gives_what_moves_the_state(captured):
    wanted = ToyDiT().eval()(**example_inputs())[:, :STATE]
    watch = Verifier(given(), IO, {VELOCITY: wanted})
    graphs = run_passes(captured, [canonical_passes(IO, SIZES)], observers=[watch])
    assert list(placeholders(graphs.modules[MODEL])) == ["latents", "first", "second", "timestep", "prompt"]
    assert torch.equal(graphs.modules[MODEL](**given())[VELOCITY], wanted)
    check_stage(graphs, Stage.CANONICAL)
    assert list(placeholders(captured.modules[MODEL])) == ["latents", "timestep", "prompt"]


def test_nothing_is_changed_where_the_state_is_all(captured):
    plain = ModelIO("latents", "timestep", ("prompt",))
    assert run_passes(captured, [AssembleInput(plain)]) is captured


def test_parts_are_joined_though_all_of_the_output_is_kept(captured):
    io = replace(IO, output=None)
    assert list(placeholders(run_passes(captured, [AssembleInput(io, SIZES)]).modules[MODEL]))[:3] == [
        "latents",
        "first",
        "second",
    ]


@pytest.mark.parametrize(
    ("io", "sizes", "message"),
    [
        (IO, (3, 2), r"latents is 6 long, its 3 parts are \(3, 2\)"),
        (IO, (3, 2, 2), r"latents is 6 long, its 3 parts are \(3, 2, 2\)"),
        (ModelIO("x", "timestep", (), ("first",)), (3, 3), "the model has no input 'x'; it has latents, timestep, prompt"),
        (ModelIO("latents", "timestep", (), ("prompt",)), (3, 3), "the model takes prompt by itself"),
        (ModelIO("latents", "timestep", (), ("first",), output=(0, 4)), (3, 3), "the output that is kept is 4 long, latents 3"),
    ],
)
def test_parts_that_do_not_fit_are_refused(captured, io, sizes, message):
    with pytest.raises(PassError, match=message):
        run_passes(captured, [AssembleInput(io, sizes)])
