"""Costs against sums done by hand."""

import torch
from torch import nn
from toy import TOKENS, WIDTH, ToyDiT, example_inputs

from cachec.compiler.graphs.capture import capture_model
from cachec.compiler.graphs.costs import MAX_FEATURE, hoisting_facts, memory_facts, samples_at_once
from cachec.passes import Hoist, canonical_passes, run_passes
from cachec.runtime.abi import COMPUTE, MODEL

VALUE = 4 * TOKENS * WIDTH  # bytes of the latents of one sample


class Chain(nn.Module):
    """Three values, of which an engine needs two at once, beside its input."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, latents):
        return torch.cos(torch.sin(self.layer(latents)))


def test_memory_is_that_of_all_weights_and_of_what_is_alive_at_once():
    graphs = run_passes(capture_model(Chain().eval(), {"latents": example_inputs()["latents"]}), [canonical_passes()])
    facts = memory_facts(graphs.with_modules(**{COMPUTE: graphs.modules[MODEL]}))
    assert facts == {"weights": 4 * (WIDTH * WIDTH + WIDTH), "activations": 3 * VALUE}


def test_hoisting_takes_the_weights_of_modulations_out_of_the_step(toy_split):
    hoisted = run_passes(toy_split, [Hoist("timestep", ("prompt",))])
    facts = hoisting_facts(toy_split, hoisted)[COMPUTE]
    left = [value for name, value in ToyDiT().named_parameters() if "modulation" in name or name.startswith("time.")]
    assert facts["weight_bytes"] == 4 * sum(value.numel() for value in left)
    assert facts["flops"] > 0
    assert hoisting_facts(toy_split, toy_split) == {}


def test_as_many_samples_run_at_once_as_their_features_fit(toy_split):
    assert samples_at_once(toy_split) == MAX_FEATURE // VALUE
