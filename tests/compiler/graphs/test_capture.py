"""Captured graphs compute what the models do, and take what the models take."""

import pytest
import torch
from torch import nn
from toy import TOKENS, WIDTH, ToyDiT, example_inputs
from toy_bundle import captured

from cachec.compiler.graphs.capture import capture_model
from cachec.compiler.graphs.export import plan_engine
from cachec.compiler.methods.taylor import Taylor
from cachec.passes import Stage, canonical_passes, cast_passes, run_passes
from cachec.passes.base import outputs, placeholders
from cachec.runtime.abi import FEATURE, MODEL, VELOCITY
from cachec.runtime.errors import PassError


class Labelled(nn.Module):
    """Reads a label and a mask beside the state."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = nn.Embedding(300, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, latents, labels, mask):
        kept = torch.where(mask[..., None], latents, torch.zeros_like(latents))
        return self.out(kept + self.embed(labels)[:, None])


def labelled_inputs():
    labels, mask = torch.tensor([257, 3]), torch.arange(2 * TOKENS).view(2, TOKENS) % 3 > 0  # no float16 holds 257 and 3 apart
    return {"latents": example_inputs()["latents"], "labels": labels, "mask": mask}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_labels_and_masks_keep_their_types(dtype):
    model, inputs = Labelled().eval(), labelled_inputs()
    graphs = run_passes(capture_model(model.to(dtype), inputs), [canonical_passes(), cast_passes(dtype)])
    module = graphs.modules[MODEL]
    assert [node.meta["val"].dtype for node in placeholders(module).values()] == [torch.float32, torch.int64, torch.bool]
    wanted = model(inputs["latents"].to(dtype), inputs["labels"], inputs["mask"]).float()
    torch.testing.assert_close(module(**inputs)[VELOCITY], wanted, rtol=0, atol=0 if dtype == torch.float32 else 2e-2)
    signature = plan_engine("model", module, inputs, {}).signature
    assert [spec.dtype for spec in signature.inputs] == ["float32", "int64", "bool"]


def test_a_captured_model_shares_its_weights_and_says_its_stage():
    model = ToyDiT().eval()
    graphs = capture_model(model, example_inputs())
    assert {id(p) for p in graphs.modules[MODEL].parameters()} == {id(p) for p in model.parameters()}
    assert graphs.stage == Stage.CAPTURED


class Writes(nn.Module):
    """Fills a tensor in place, as Wan's rotation does."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, latents):
        rotated = torch.empty_like(latents)
        rotated[..., 0::2], rotated[..., 1::2] = -latents[..., 1::2], latents[..., 0::2]
        return self.out(rotated)


@torch.no_grad()
def test_a_model_that_writes_in_place_is_captured_without_writes():
    model, inputs = Writes().eval(), {"latents": example_inputs()["latents"]}
    graphs = run_passes(capture_model(model, inputs), [canonical_passes()])
    assert torch.equal(graphs.modules[MODEL](**inputs)[VELOCITY], model(**inputs))


def test_example_inputs_are_distinct_and_batched():
    inputs = example_inputs()
    with pytest.raises(PassError, match="distinct tensors with a batch of at least two"):
        capture_model(ToyDiT().eval(), {**inputs, "prompt": inputs["prompt"][:1]})


def test_a_model_that_cannot_be_captured_is_refused_with_the_reason():
    class Branches(nn.Linear):
        def forward(self, latents):
            return super().forward(latents) if latents.sum() > 0 else latents

    with pytest.raises(PassError, match="torch.export cannot capture"):
        capture_model(Branches(WIDTH, WIDTH).eval(), {"latents": example_inputs()["latents"]})


class Reads(nn.Linear):
    def forward(self, latents):
        return latents if self.weight.sum() > 0 else -latents


class Counts(nn.Linear):
    def forward(self, latents):
        return latents + self.weight.nonzero().sum()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            Reads,
            r"cannot capture Sequential at 1, test_capture.py:\d+ \(return latents if self.weight.*\): Could",
        ),
        (Counts, r"Sequential cannot be captured: sizes or numbers .* first at nonzero \(aten.nonzero.default in .*1\)"),
    ],
)
def test_where_a_model_cannot_be_captured_without_values_is_said(kind, message):
    model = nn.Sequential(nn.Identity(), kind(WIDTH, WIDTH)).eval()
    with pytest.raises(PassError, match=message):
        capture_model(model, {"input": example_inputs()["latents"]})


@torch.no_grad()
def test_a_captured_predictor_is_the_predictor():
    predictor = Taylor(1).predictor(None)
    graph = captured(predictor, 2)
    past, steps = [torch.randn(3, TOKENS, WIDTH) for _ in range(2)], (torch.tensor([5, 3]), torch.tensor(6))
    sigmas = torch.linspace(1, 0, 11)
    known = {"feature_0": past[0], "feature_1": past[1], "history_steps": steps[0], "sigmas": sigmas, "step": steps[1]}
    assert set(outputs(graph)) == {FEATURE}
    assert torch.equal(graph(**known)[FEATURE], predictor(past, steps[0], sigmas, steps[1]))
