"""DisCa: published lists, what its predictor is made of, and what is none."""

import numpy as np
import pytest
import torch
from toy_model import SETTINGS, ToyModel

from cachec.compiler.methods.disca import Disca, load_blocks
from cachec.compiler.methods.parameters import Parameters
from cachec.compiler.models.base import LoadedModel
from cachec.compiler.models.blocks import CACHED, PredictingTransformer
from cachec.runtime.errors import InputError, PredictorError


@pytest.mark.parametrize(
    ("steps", "interval", "computed"),
    [
        (20, 2, (0, 1, 2, 5, 9, 11, 13, 15, 17, 19)),
        (20, 3, (0, 1, 2, 5, 9, 13, 17, 19)),
        (8, 2, (0, 2, 4, 7)),
        (9, 3, (0, 1, 2, 5, 8)),
    ],
)
def test_published_lists_and_the_counter_rule(steps, interval, computed):
    assert Disca().interval(steps, interval).compute == computed
    if (steps, interval) != (9, 3):
        assert Disca().published(steps, len(computed)).compute == computed


def test_a_list_that_was_not_published_is_refused():
    with pytest.raises(InputError, match="DisCa has no list of 9 steps of 20; its lists are 10 of 20, 8 of 20, 4 of 8"):
        Disca().published(20, 9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fusion": "both"}, "fusion is 'both'; disca takes model, joint, apart"),
        ({"depth": "-1"}, "depth is -1; it must be at least 0"),
        ({"rate": "0"}, "rate is 0.0; it must be above 0"),
        ({"updates": "0", "adversarial": "0"}, "there is nothing to train"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Disca.with_options(options)


def arrays_of(model, **options):
    return {name: value.numpy() for name, value in Disca(**options).made(model).state_dict().items()}


def parameters(arrays, **facts):
    return Parameters(arrays, {"depth": "2", "fusion": "joint", **facts}, "file")


@torch.no_grad()
def test_without_blocks_it_is_the_fusion_and_the_tail():
    model = ToyModel()
    predictor = Disca(depth=0).made(model)
    assert len(predictor.fusions) == 1
    inputs = model.example_inputs(SETTINGS)
    cached = torch.randn(inputs["latents"].shape)
    made = PredictingTransformer(model.transformer, model.body, predictor, model.capturable)(**inputs, **{CACHED: cached})
    transformer, (first, _, second) = model.transformer, predictor.fusions[0]
    condition = torch.tanh(transformer.time(inputs["timestep"][:, None])) + inputs["prompt"]
    embedded = transformer.embed(inputs["latents"]) + torch.sin(transformer.positions / 3.0)
    fused = second(torch.nn.functional.silu(first(torch.cat([embedded, cached], -1))))
    scale = transformer.blocks[0].modulation(condition)[:, None, : embedded.shape[-1]]
    torch.testing.assert_close(made, transformer.out(transformer.norm_out(fused) * (1 + scale)))


def test_weights_come_back_and_are_shared_by_all_sizes():
    model = ToyModel()
    arrays = arrays_of(model)
    method = Disca()
    found = method.blocks(model, parameters(arrays))
    assert method.blocks(model, parameters({name: value.copy() for name, value in arrays.items()})) is found
    assert all(np.array_equal(value, arrays[name]) for name, value in found.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("blocks.1.qkv.bias"), r"blocks.1.qkv.bias is missing, the model's blocks want \[24\]; 1 differ"),
        (lambda a: a.update(x=np.zeros(2)), r"x is \[2\], the model's blocks want none"),
        (lambda a: a.update({"fusions.0.0.bias": np.zeros(3)}), r"fusions.0.0.bias is \[3\], the model's blocks want \[8\]"),
    ],
    ids=["missing", "surplus", "shape"],
)
def test_a_file_of_another_model_is_refused(change, message):
    model = ToyModel()
    arrays = arrays_of(model)
    change(arrays)
    with pytest.raises(PredictorError, match=message):
        load_blocks(model, parameters(arrays))


def test_what_is_missing_is_said():
    model = ToyModel()
    with pytest.raises(PredictorError, match="disca needs a trained predictor"):
        Disca().blocks(model, None)
    with pytest.raises(PredictorError, match="file does not say what its predictor is made of: 'depth'"):
        load_blocks(model, Parameters({}, {}, "file"))
    with pytest.raises(InputError, match="the family of toy does not say how its blocks hang together"):
        LoadedModel.body.fget(model)
