"""What of a module is seen to have changed."""

import pytest
import torch
from torch import nn

from cachec.compiler.fingerprint import NUM_SAMPLES, Fingerprint


@pytest.fixture
def module():
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(20, 30), nn.LayerNorm(30), nn.BatchNorm1d(30))
    made.scales = {"style": 0.5}
    return made


def add_in_place(module):
    with torch.no_grad():
        module[0].weight[3, 4] += 1


def add_past_the_count(module):
    module[0].weight.data += 0.1


CHANGES = {
    add_in_place: "0.weight was changed in place",
    add_past_the_count: "values of the weights were changed in place",
    lambda module: setattr(module[0].weight, "data", module[0].weight.data.clone()): "0.weight was changed",
    lambda module: module.__setitem__(0, nn.Identity()): "0 was exchanged .Linear for Identity",
    lambda module: module.append(nn.Identity()): "3 was added",
    lambda module: module.__delitem__(2): "2 was taken away",
    lambda module: setattr(module[1], "eps", 0.1): "1.eps was changed",
    lambda module: module.scales.update(style=1.0): "the transformer.scales was changed",
    lambda module: module[0].register_forward_pre_hook(lambda *_: None): "0._forward_pre_hooks was changed",
    lambda module: setattr(module[0], "forward", lambda x: x): "0.forward was added",
    lambda module: module[2].running_mean.add_(1): "2.running_mean was changed in place",
    lambda module: module.double(): "0.weight was changed",
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_named(module, change):
    before = Fingerprint.of(module)
    change(module)
    assert before.change(module).startswith(CHANGES[change].partition(" .")[0])


def test_nothing_changed_is_nothing(module):
    with torch.no_grad():
        module[0].weight[0, 0] = float("nan")
    before = Fingerprint.of(module)
    module.eval()
    module(torch.ones(2, 20))
    assert before.change(module) is None
    assert before.is_untouched


@pytest.mark.parametrize("change", [add_in_place, lambda module: module.double()])
def test_counters_are_seen_without_a_look_at_values(module, change):
    before = Fingerprint.of(module)
    change(module)
    assert not before.is_untouched


def test_tensors_of_inference_mode_are_compared_by_value():
    with torch.inference_mode():
        module = nn.Linear(5, 5)
        before = Fingerprint.of(module)
        module.weight.add_(1)
        assert before.is_untouched
        assert before.change(module) == "values of the weights were changed in place"


def test_samples_are_spread_over_rows_and_columns():
    weight = nn.Linear(64, 64, bias=False)
    before = Fingerprint.of(weight)
    assert NUM_SAMPLES <= len(before.samples) + 1 < 2 * NUM_SAMPLES
    for column in (1, 30):
        weight.weight.data[:, column : column + 4] += 1  # four of 64 columns
        assert before.change(weight) is not None
        before = Fingerprint.of(weight)
