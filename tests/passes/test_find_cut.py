"""The cut is behind a block, and one value passes it."""

import pytest
import torch
from torch import nn
from toy import WIDTH, ToyDiT, example_inputs
from toy_runs import split_at

from cachec.compiler.graphs.capture import capture_model
from cachec.passes import FindCut, run_passes
from cachec.runtime.abi import FORECAST
from cachec.runtime.errors import PassError


def test_a_block_that_the_tail_calls_into_again_is_refused(model):
    with pytest.raises(PassError, match=r"'blocks\.0' must hand one value to the tail, it hands over: \w+ .*, \w+ "):
        run_passes(model, split_at("blocks.0"))


@pytest.mark.parametrize("block", ["block.2", "blocks.3", "blocks.22"])
def test_an_unknown_block_is_refused_with_a_suggestion(model, block):
    with pytest.raises(PassError, match=rf"no node of the graph is under block '{block}'\. Did you mean 'blocks"):
        run_passes(model, [FindCut(block)])


def test_a_block_is_not_mistaken_for_one_whose_name_begins_like_it():
    toy = ToyDiT(num_blocks=11).eval()
    split = run_passes(capture_model(toy, example_inputs()), split_at("blocks.1"))
    kept = {id(parameter) for parameter in split.modules[FORECAST].parameters()}
    assert kept.isdisjoint(id(parameter) for parameter in toy.blocks[1].parameters())
    assert kept.issuperset(id(parameter) for block in toy.blocks[2:] for parameter in block.parameters())


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return torch.sin(self.image(x)), torch.cos(self.text(x))


class TwoStreams(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = Body()

    def forward(self, latents):
        image, text = self.body(latents)
        return image * text


def test_a_body_that_hands_over_two_values_is_refused_with_their_names():
    model = capture_model(TwoStreams().eval(), {"latents": example_inputs()["latents"]})
    with pytest.raises(PassError, match=r"'body' must hand one value to the tail, it hands over: sin .*, cos "):
        run_passes(model, [FindCut("body")])


def test_a_block_that_does_not_lead_to_the_output_is_refused():
    class Detour(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, latents):
            self.idle(latents)
            return self.used(latents)

    model = capture_model(Detour().eval(), {"latents": example_inputs()["latents"]})
    with pytest.raises(PassError, match="block 'idle'"):
        run_passes(model, split_at("idle"))
