import json

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from reference.avatars import flow
from reference.avatars.flow import (
    HeldOut,
    Noised,
    Plan,
    Trainer,
    adaptive_norms,
    learning_rate,
    make_optimizers,
    sample,
    schedule,
    train,
)
from reference.avatars.networks import build_transformer


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.transformer_blocks = nn.ModuleList([nn.Linear(5, 8), nn.Linear(8, 4)])

    def forward(self, x, sigma, shift):
        rest = torch.cat([x, sigma[:, None, None].expand(*x.shape[:2], 1)], -1)
        return self.transformer_blocks[1](torch.tanh(self.transformer_blocks[0](rest))) + shift[:, None, None]


class Learner:
    """Captions are numbers; the empty one is zero."""

    def build(self):
        torch.manual_seed(0)
        return Small()

    def encode(self, captions):
        return {"shift": torch.tensor([float(caption or 0) for caption in captions])}

    def velocity(self, network, x, sigma, condition, guidance):
        return network(x, sigma, condition["shift"] * guidance)


class Source:
    def batch(self, num):
        return torch.ones(num, 2, 4), ["1"] * num


def plan(tmp_path, *, steps=4, distill=0):
    return Plan("small", tmp_path, steps, 8, distill)


def test_a_noised_sample_lies_between_the_clean_one_and_noise():
    clean = torch.randn(6, 3, 2)
    noised = Noised.of(clean)
    sigma = noised.sigma[:, None, None]
    torch.testing.assert_close(noised.x - sigma * noised.target, clean)


def test_the_schedule_is_the_one_of_the_pipelines_scheduler():
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 7, 7), mu=1.15)
    torch.testing.assert_close(schedule(7, 1.15), scheduler.sigmas, rtol=1e-6, atol=1e-6)


def test_the_rate_warms_up_stays_and_ends_at_zero():
    assert learning_rate(0, 1000) == 0.01
    assert learning_rate(300, 1000) == 1
    assert learning_rate(800, 1000) == pytest.approx(0.5)
    assert learning_rate(1000, 1000) == 0


def test_updates_lower_the_held_out_loss_of_the_average(tmp_path, monkeypatch):
    monkeypatch.setattr(flow, "LEARNING_RATE", 0.03)
    trainer = Trainer(Learner(), Source(), plan(tmp_path, steps=300))
    held_out = torch.ones(64, 2, 4), ["1"] * 64
    before = trainer.held_out_loss(*held_out)
    for step in range(100):
        trainer.update(step)
    assert trainer.held_out_loss(*held_out) < 0.8 * before


def test_distillation_teaches_the_guided_velocity_of_the_first_stage(tmp_path, monkeypatch):
    trainer = Trainer(Learner(), Source(), plan(tmp_path, steps=1, distill=1))
    seen = []
    monkeypatch.setattr(
        trainer.learner, "velocity", lambda net, x, s, c, g: seen.append((c["shift"], g)) or net(x, s, c["shift"] * g)
    )
    trainer.update(0)
    (told, one), (untold, _), (student, scale) = seen
    assert told.eq(1).all()
    assert one.eq(1).all()
    assert untold.eq(0).all()
    assert student.eq(1).all()
    assert scale.min() >= 1
    assert scale.max() <= flow.MAX_GUIDANCE
    assert scale.std() > 0
    assert (tmp_path / "small-stage-one.pt").exists()


def test_a_resumed_distillation_keeps_its_teacher(tmp_path):
    first = Trainer(Learner(), Source(), plan(tmp_path, steps=2, distill=2))
    first.update(0)
    teacher = [p.clone() for p in first.teacher.parameters()]
    again = Trainer(Learner(), Source(), plan(tmp_path, steps=2, distill=2))
    with torch.no_grad():
        next(again.average.network.parameters()).add_(1)
    again.update(1)
    for kept, found in zip(teacher, again.teacher.parameters(), strict=True):
        torch.testing.assert_close(kept, found)


def test_sampling_guides_from_the_empty_caption():
    class Constant(Learner):
        def velocity(self, network, x, sigma, condition, guidance):
            return condition["shift"][:, None, None].expand_as(x)

    found = sample(Constant(), nn.Identity(), torch.zeros(1, 2, 4), ["2"], scale=3, steps=5, shift=1.0)
    torch.testing.assert_close(found, torch.full((1, 2, 4), -6.0))  # from one to zero: minus scale times two


def test_held_out_loss_is_the_same_each_time_and_leaves_the_noise_alone(tmp_path):
    trainer = Trainer(Learner(), Source(), plan(tmp_path))
    torch.manual_seed(9)
    first = trainer.held_out_loss(torch.ones(4, 2, 4), ["1"] * 4)
    drawn = torch.rand(1)
    assert trainer.held_out_loss(torch.ones(4, 2, 4), ["1"] * 4) == first
    torch.manual_seed(9)
    assert torch.rand(1) == drawn


def test_a_training_shows_held_out_captions_and_goes_on_where_it_stopped(tmp_path):
    shown = []
    held = HeldOut(torch.ones(4, 2, 4), ["1"] * 6, 3, 1.15, lambda samples, path: shown.append((samples.shape, path.name)))
    for steps in (2, 3):
        train(plan(tmp_path, steps=steps), Learner(), Source(), held, seed=1)
    assert shown == [((3, 2, 4), "small-00002.png"), ((3, 2, 4), "small-00003.png")]
    state = torch.load(tmp_path / "small.pt", weights_only=True)
    assert set(state) == {"network", "average", "optimizer0", "optimizer1", "step"}
    assert state["step"] == 3
    lines = [json.loads(line) for line in (tmp_path / "small.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "held_out_loss" in line] == [2, 3]


def test_blocks_of_flux_begin_as_the_identity():
    network = build_transformer()
    adaptive_norms(network)
    assert network.transformer_blocks[0].norm1.linear.weight.abs().max() == 0
    assert network.transformer_blocks[0].norm1_context.linear.weight.abs().max() == 0
    assert network.single_transformer_blocks[0].norm.linear.weight.abs().max() == 0
    assert network.norm_out.linear.weight.abs().max() > 0
    muon, adamw = make_optimizers(network)
    learnt = sum(p.numel() for optimizer in (muon, adamw) for group in optimizer.param_groups for p in group["params"])
    assert learnt == sum(p.numel() for p in network.parameters())
    assert all(p.ndim == 2 for p in muon.param_groups[0]["params"])
    assert network.proj_out.weight.eq(0).all()
