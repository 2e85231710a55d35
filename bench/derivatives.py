"""Which derivative along the flow a distillation should take: ``python -m bench.derivatives [--model tiny-hunyuan]``.

A model's own eight steps, and eight by v - (t - r) / 2 dv/dt, which is the average velocity to second order, with dv/dt exact
and by differences of several widths: relative distance of the ends from the run of all steps, over eight training prompts.
"""

import click
import numpy as np
import torch

from bench.quality_setting import open_model
from cachec.compiler.calibration.prompts import default_prompts
from cachec.compiler.calibration.runs import Subject, run_uncached, training_seeds
from cachec.compiler.distillation.meanflow import derivative_along, shaped
from cachec.compiler.distillation.student import Student
from cachec.compiler.frontend import evaluator_of
from cachec.compiler.models import find_model
from cachec.runtime.noise import make_noise

PROMPTS, STEPS = 8, 8
WIDTHS = (0.02, 0.04, 0.06, 0.1)


@click.command()
@click.option("--model", "name", default="tiny-hunyuan", show_default=True)
@torch.no_grad()
def main(name: str) -> None:
    model, settings = open_model(find_model(name))
    subject, evaluator = Subject.of(model, settings), evaluator_of(model, settings)
    given = subject.encode(default_prompts(model.spec.prompts, "train")[:PROMPTS])
    noise = np.stack([make_noise(seed, subject.latent_shape) for seed in training_seeds(0, PROMPTS)])
    *_, last = run_uncached(evaluator, subject.own_sampling, noise, given)
    final, conditions = torch.from_numpy(last.latents), {key: torch.from_numpy(given[key]) for key in model.io.conditions}
    student = Student(model, settings, subject.own_sampling, "cpu")
    levels = torch.from_numpy(np.asarray(model.sampling(settings.with_steps(STEPS)).sigmas, np.float32))

    def average(x: torch.Tensor, t: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return student.average(x, t, r, conditions)

    def off(how: str | None, width: float = 0.0) -> float:
        x = torch.from_numpy(noise)
        for begin, end in zip(levels[:-1], levels[1:], strict=True):
            t, r = (level.repeat(len(x)) for level in (begin, end))
            v = average(x, t, r)
            slope = 0 if how is None else derivative_along(average, x, t, r, v, how, width)
            x = x - shaped(t - r, x) * (v - shaped(t - r, x) / 2 * slope)
        return float((x - final).norm() / final.norm())

    print(f"{name}, {STEPS} steps: plain {off(None):.4f}", flush=True)
    print(f"exact derivative {off('exact'):.4f}", flush=True)
    for width in WIDTHS:
        print(f"difference over {width:g} to either side {off('difference', width):.4f}", flush=True)


if __name__ == "__main__":
    main()
