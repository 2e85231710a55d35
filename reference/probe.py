"""Score tiny-flux: a small classifier, trained on dataset pictures only, reads generated pictures of held-out captions.

``python -m reference.probe --out reference/build`` writes ``probe.json`` and ``samples.png``, and the probe itself into the
pipeline's directory. The network and the scoring are the package's (``cachec.compiler.evaluation.probe``): ``cachec eval`` uses
them, too.
"""

import json
from pathlib import Path

import click
import numpy as np
import torch
from diffusers import FluxPipeline
from PIL import Image
from torch import nn
from tqdm import tqdm

from cachec.compiler.evaluation.probe import HEADS, Probe, load_probe, parse_caption, probe_bytes, score_pictures
from reference.dataset import Scene, draw, scenes
from reference.networks import PIPELINE_DIR, to_tensor
from reference.text import T5_TOKENS


def train_probe(steps: int, seed: int) -> Probe:
    """Train on fresh dataset pictures, slightly noisy, so that the probe does not depend on pixel-sharp edges."""
    torch.manual_seed(seed)
    probe, rng, stream = Probe(), np.random.default_rng(seed), scenes(seed, held_out=False)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in tqdm(range(steps), desc="training probe", mininterval=5):
        batch = [next(stream) for _ in range(64)]
        which = [int(rng.integers(len(scene.items))) for scene in batch]
        pictures = to_tensor([draw(scene, rng) for scene in batch])
        pictures = pictures + 0.06 * torch.randn_like(pictures)
        answers = probe(pictures, torch.tensor(which))
        wanted = [parse_caption(scene.caption())[w].labels() for scene, w in zip(batch, which, strict=True)]
        loss = sum(nn.functional.cross_entropy(answers[n], torch.tensor([x[n] for x in wanted])) for n in HEADS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return probe.eval()


def score(probe: Probe, pictures: list[np.ndarray], drawn: list[Scene]) -> dict[str, float]:
    """Share of items whose attribute the probe reads as the caption says."""
    result = score_pictures(probe, np.stack(pictures), [scene.caption() for scene in drawn])
    return {name: round(value, 4) for name, value in result.accuracy.items()}


def generate(drawn: list[Scene], *, guidance: float, seed: int) -> list[np.ndarray]:
    """Pictures of the shipped pipeline, 50 steps."""
    pipeline = FluxPipeline.from_pretrained(PIPELINE_DIR)
    pipeline.set_progress_bar_config(disable=True)
    generator, pictures = torch.Generator().manual_seed(seed), []
    for start in tqdm(range(0, len(drawn), 25), desc="generating", mininterval=5):
        captions = [scene.caption() for scene in drawn[start : start + 25]]
        result = pipeline(
            captions,
            height=64,
            width=64,
            max_sequence_length=T5_TOKENS,
            num_inference_steps=50,
            guidance_scale=guidance,
            generator=generator,
            output_type="np",
        )
        pictures += list(result.images)
    return pictures


def save_grid(pictures: list[np.ndarray], path: Path, columns: int = 8) -> None:
    rows = [np.concatenate(pictures[i : i + columns], axis=1) for i in range(0, len(pictures), columns)]
    image = Image.fromarray((np.concatenate(rows) * 255).round().astype(np.uint8))
    image.resize((image.width * 2, image.height * 2), Image.Resampling.BICUBIC).save(path)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--to", type=click.Path(path_type=Path), default=PIPELINE_DIR / "probe.safetensors", help="The probe's file.")
@click.option("--num", default=500, help="Generated pictures to score.")
@click.option("--steps", default=500, help="Training steps of the probe.")
@click.option("--guidance", default=3.5)
@click.option("--seed", default=77)
def main(out: Path, to: Path, num: int, steps: int, guidance: float, seed: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    to.write_bytes(probe_bytes(train_probe(steps, seed)))
    probe = load_probe(to)  # scored as it is stored
    stream, rng = scenes(seed + 1, held_out=True), np.random.default_rng(seed)
    drawn = [next(stream) for _ in range(num)]
    real = score(probe, [draw(scene, rng) for scene in drawn], drawn)
    pictures = generate(drawn, guidance=guidance, seed=seed)
    result = {"num": num, "guidance": guidance, "dataset pictures": real, "generated": score(probe, pictures, drawn)}
    save_grid(pictures[:32], out / "samples.png")
    (out / "probe.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
