import json

import pytest
import torch

from reference.avatars import loop
from reference.avatars.loop import Average, Training


def training(folder, steps, *, fail_at=None):
    weight = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(weight.weight)

    def update(step):
        if step == fail_at:
            raise KeyboardInterrupt
        with torch.no_grad():
            weight.weight.add_(1)
        return float(step)

    return Training("toy", folder, steps, {"weight": weight}, update, lambda step: {"seen": step})


def test_a_run_that_was_stopped_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        training(tmp_path, 10, fail_at=7).run()
    again = training(tmp_path, 10)
    assert again.resume() == 7
    assert again.run() == 3
    assert again.parts["weight"].weight.item() == 10
    lines = [json.loads(line) for line in (tmp_path / "toy.jsonl").read_text().splitlines()]
    assert lines[-2]["step"] == 10
    assert lines[-2]["loss"] == 8
    assert lines[-1] == {"step": 10, "seen": 10}


def test_a_finished_run_does_nothing(tmp_path):
    assert training(tmp_path, 3).run() == 3
    assert training(tmp_path, 3, fail_at=0).run() == 0


def test_a_new_network_takes_the_old_ones_cache_with_it(tmp_path):
    class Network:
        def save_pretrained(self, to):
            to.mkdir()
            (to / "weights").write_text("new")

    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "latents.f16").write_text("old")
    loop.replace_network(Network(), tmp_path / "vae")
    assert [file.name for file in (tmp_path / "vae").iterdir()] == ["weights"]


def test_a_checkpoint_is_whole_or_the_old_one(tmp_path, monkeypatch):
    loop.write(tmp_path / "a.pt", {"step": 1})

    def broken(state, path):
        path.write_bytes(b"half")
        raise OSError

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError):
        loop.write(tmp_path / "a.pt", {"step": 2})
    assert torch.load(tmp_path / "a.pt")["step"] == 1


def test_the_average_follows_slowly():
    live, copy = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    average = Average(live, copy, decay=0.9)
    start = live.weight.item()
    with torch.no_grad():
        live.weight.add_(1)
    average.update(10_000)
    assert copy.weight.item() == pytest.approx(start + 0.1)
    assert not copy.weight.requires_grad
