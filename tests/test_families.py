"""Every small pipeline of ``tests/families.py`` saves, loads from disk and runs, in diffusers' own classes."""

import pytest
import torch
from torch import nn

from tests.families import FAMILIES

OTHER_PROMPT = "a small green square"
SLOW = ("hunyuan-video-1.5", "qwen-image-edit")  # two thousand tokens; a picture of a million pixels
MARKED = [pytest.param(f, id=f.name, marks=pytest.mark.slow if f.name in SLOW else ()) for f in FAMILIES]


@pytest.fixture(scope="module", params=MARKED)
def loaded(request, tmp_path_factory):
    family = request.param
    directory = tmp_path_factory.mktemp(family.name)
    family.make().save_pretrained(directory)
    return family, family.load(directory)


def test_every_parameter_is_random_and_blocks_are_there_twice(loaded):
    family, pipeline = loaded
    for part in pipeline.components.values():
        for name, parameter in part.named_parameters() if isinstance(part, nn.Module) else ():
            assert parameter.std(correction=0) > 0 or (parameter.numel() == 1 and parameter.item() not in (0, 1)), name
    for name in family.transformers:
        lists = {n: len(m) for n, m in getattr(pipeline, name).named_children() if n.endswith(("blocks", "layers"))}
        assert lists
        assert min(lists.values()) >= 2, lists


def test_it_runs_repeats_itself_and_listens_to_its_prompt(loaded):
    family, pipeline = loaded
    first = family.run(pipeline)
    assert torch.isfinite(first).all()
    assert first.std() > 0.01
    torch.testing.assert_close(family.run(pipeline), first, rtol=0, atol=0)
    changed = {"class_labels": [8]} if family.name == "dit" else {"prompt": OTHER_PROMPT}
    assert (family.run(pipeline, **changed) - first).abs().max() > 1e-4


@pytest.mark.parametrize("family", [f for f in FAMILIES if len(f.transformers) == 2], ids=lambda family: family.name)
def test_both_experts_are_called(family):
    pipeline = family.make()
    pipeline.set_progress_bar_config(disable=True)
    called = []
    for name in family.transformers:
        getattr(pipeline, name).register_forward_pre_hook(lambda *_, name=name: called.append(name))
    family.run(pipeline)
    assert called == ["transformer"] * 2 + ["transformer_2"] * 4 or called == ["transformer"] * 4 + ["transformer_2"] * 2
