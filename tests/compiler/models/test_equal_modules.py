"""What ``torch.export`` does not take: other modules of the same weights compute the same, and can be captured."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from cachec.compiler.graphs.capture import capture_model
from cachec.compiler.models.equal_modules import with_child
from cachec.compiler.models.hunyuan_video_15_equal import HunyuanVideo15Equal
from cachec.compiler.models.z_image_equal import ZImageEqual
from cachec.passes import canonical_passes, run_passes, split_passes
from cachec.runtime.abi import COMPUTE, VELOCITY
from tests.compiler.models.calls import off, record, run_in_ort
from tests.families import NEGATIVE, PROMPT

pytestmark = pytest.mark.slow
PROMPTS = [PROMPT + ", a line of words that goes on until the text has more than thirty-two tokens" * 2, PROMPT, "a square"]
LENGTH = 96  # of Z-Image's texts


def first_latents(call):
    """HunyuanVideo-1.5: without the empty first frame and picture."""
    given = dict(call.keywords)
    assert not given.pop("image_embeds").any()
    assert not given["hidden_states"][:, 32:].any()
    given["hidden_states"] = given["hidden_states"][:, :32]
    return {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}


def padded(call):
    """Z-Image: what the lists hold; behind the texts there is noise, which must not matter."""
    latents, time, texts = call.args
    lengths = torch.tensor([len(text) for text in texts])
    whole = pad_sequence(texts, batch_first=True)
    whole = functional.pad(whole, (0, 0, 0, LENGTH - whole.shape[1]))
    mask = torch.arange(LENGTH) < lengths[:, None]
    noise = torch.randn(whole.shape, generator=torch.Generator().manual_seed(0))
    return {"x": torch.stack(latents)[:, :, 0], "t": time, "cap_feats": whole.where(mask[..., None], noise), "cap_mask": mask}


def z_image_output(call):
    return torch.stack(call.output)[:, :, 0]


@dataclass(frozen=True, eq=False)
class Case:
    """A transformer, its equal, and what a pipeline handed the one in the other's form, with what it gave."""

    original: nn.Module
    equal: nn.Module
    calls: list
    block: str

    @property
    def inputs(self):
        return self.calls[0][0]


def z_image():
    changes = {"max_sequence_length": LENGTH, "prompt": list(PROMPTS), "negative_prompt": [NEGATIVE] * 3}
    pipeline, calls = record("z-image", **changes)
    made = [(padded(call), torch.stack(call.output)[:, :, 0]) for call in calls]
    return Case(pipeline.transformer, ZImageEqual(pipeline.transformer), made, "layers.1")


def hunyuan_video_15():
    tokens = {"tokenizer_max_length": 64, "tokenizer_2_max_length": 32}  # by default a thousand, and 256
    pipeline, calls = record("hunyuan-video-1.5", tokens, prompt=PROMPTS, negative_prompt=[NEGATIVE] * 3)
    made = [(first_latents(call), call.output) for call in calls]
    return Case(pipeline.transformer, HunyuanVideo15Equal(pipeline.transformer), made, "transformer_blocks.1")


@pytest.fixture(scope="module", params=[z_image, hunyuan_video_15])
def case(request):
    return request.param()


def test_it_equals_the_original_on_all_calls_of_its_pipeline(case):
    for inputs, wanted in case.calls:
        with torch.no_grad():
            assert off(case.equal(**inputs)[0], wanted) < 1e-5


def test_parameters_are_the_originals_under_their_names(case):
    held = dict(case.original.named_parameters())
    assert {name: id(parameter) for name, parameter in case.equal.named_parameters()} == {n: id(p) for n, p in held.items()}


@pytest.fixture(scope="module")
def compute(case):
    """The compute graph, captured with two of three samples."""
    few = {name: value[:2].clone() for name, value in case.inputs.items()}
    graphs = run_passes(capture_model(case.equal, few), [canonical_passes(), split_passes(case.block)])
    return graphs.modules[COMPUTE]


def test_it_is_captured_and_cut(case, compute):
    for inputs, wanted in case.calls:
        assert off(compute(**inputs)[VELOCITY], wanted) < 1e-5


def test_onnx_runtime_agrees(case, compute, tmp_path):
    inputs, wanted = case.calls[-1]
    assert off(run_in_ort(compute, inputs, tmp_path)[VELOCITY], wanted) < 1e-4


def test_a_child_is_replaced_in_a_twin_only():
    block = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    twin = with_child(block, "1", nn.Identity())
    assert isinstance(twin[1], nn.Identity)
    assert isinstance(block[1], nn.Linear)
    assert twin[0] is block[0]
