"""The loop that all trainings share: resumable by the same command, a log of lines beside a checkpoint written in one move."""

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import nn

REPORT_EVERY = 50  # updates
SAVE_SECONDS = 300.0
WATCH_SECONDS = 1200.0


@dataclass
class Average:
    """A running average of a network's weights: what is sampled from and shipped."""

    live: nn.Module
    network: nn.Module
    decay: float = 0.999

    def __post_init__(self) -> None:
        self.network.load_state_dict(self.live.state_dict())
        self.network.requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (step + 1) / (step + 10))
        for mean, parameter in zip(self.network.parameters(), self.live.parameters(), strict=True):
            mean.lerp_(parameter.detach(), 1 - decay)


def replace_network(network: Any, to: Path) -> None:
    """Save ``network`` (of diffusers) in the folder ``to``; what was cached there belonged to the one before and goes."""
    shutil.rmtree(to, ignore_errors=True)
    network.save_pretrained(to)


def write(path: Path, state: Any) -> None:
    """Save ``state`` so that ``path`` is the old file or the new one, never a part."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


@dataclass
class Training:
    """One network being trained: what a checkpoint holds, and what one update does.

    ``update(step)`` returns the loss; ``watch(step)`` is called every twenty minutes and at the end, and what it returns goes
    to the log.
    """

    name: str
    folder: Path
    steps: int
    parts: dict[str, Any]  # of everything with state_dict and load_state_dict that a checkpoint holds
    update: Callable[[int], float]
    watch: Callable[[int], dict[str, float]] = field(default=lambda step: {})
    seed: int = 0
    watch_seconds: float = WATCH_SECONDS

    @property
    def checkpoint(self) -> Path:
        return self.folder / f"{self.name}.pt"

    def resume(self) -> int:
        """Load the checkpoint, if there is one. Returns the updates that it has behind it."""
        if not self.checkpoint.exists():
            return 0
        saved = torch.load(self.checkpoint, weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])
        return int(saved["step"])

    def save(self, step: int) -> None:
        write(self.checkpoint, {**{name: part.state_dict() for name, part in self.parts.items()}, "step": step})

    def log(self, line: dict[str, float]) -> None:
        print(json.dumps(line), flush=True)
        with (self.folder / f"{self.name}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def run(self) -> int:
        """Go on to the last update; saves every five minutes and at the end. Returns the updates done by this run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        done = self.resume()
        torch.manual_seed(self.seed + done)
        losses: list[float] = []
        saved = watched = time.monotonic()
        reported = time.process_time()  # not of the clock: other work on the machine does not count
        for step in range(done, self.steps):
            losses.append(self.update(step))
            last = step == self.steps - 1
            if step % REPORT_EVERY == REPORT_EVERY - 1 or last:
                now = time.process_time()
                self.log({"step": step + 1, "loss": round(float(np.mean(losses)), 5),
                          "processor_seconds_per_update": round((now - reported) / len(losses), 3)})  # fmt: skip
                losses, reported = [], now
            if last or time.monotonic() - saved > SAVE_SECONDS:
                self.save(step + 1)
                saved = time.monotonic()
            if last or time.monotonic() - watched > self.watch_seconds:
                self.log({"step": step + 1, **self.watch(step + 1)})
                watched, reported, losses = time.monotonic(), time.process_time(), []
        return max(self.steps - done, 0)


def options(command: Callable[..., None]) -> Callable[..., None]:
    """What every training takes: ``--out`` and ``--threads``."""
    command = click.option("--threads", default=1, show_default=True, help="Of the processor.")(command)
    return click.option("--out", type=click.Path(path_type=Path), default=Path("build/reference"), show_default=True)(command)
