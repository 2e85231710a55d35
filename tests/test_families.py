"""The small pipelines of ``tests/families.py`` are what checks of all families take them for."""

import pytest
import torch
from torch import nn

from tests.families import FAMILIES

OTHER_PROMPT = "a small green square"
RUN = ("flux", "qwen-image", "dit")  # the checks of make models run all of them


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_parameter_is_random_and_blocks_are_there_twice(family):
    pipeline = family.make()
    for part in pipeline.components.values():
        for name, parameter in part.named_parameters() if isinstance(part, nn.Module) else ():
            assert parameter.std(correction=0) > 0 or (parameter.numel() == 1 and parameter.item() not in (0, 1)), name
    for name in family.transformers:
        lists = {n: len(m) for n, m in getattr(pipeline, name).named_children() if n.endswith(("blocks", "layers"))}
        assert lists
        assert min(lists.values()) >= 2, lists


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name in RUN], ids=lambda family: family.name)
def test_it_saves_loads_repeats_itself_and_listens_to_its_prompt(family, saved_family):
    pipeline = family.load(saved_family(family.name))
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
