"""Score tiny-flux: a small classifier, trained on dataset pictures only, reads generated pictures of held-out captions.

``python -m reference.probe --out reference/build`` writes ``probe.json`` and ``samples.png``.

The probe looks at one item at a time: it gets the picture and is asked for the item on the first or the second place of
the caption (channel 4 says which), and answers colour, shape, texture and place.
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

from reference.dataset import COLOURS, PLACES, RELATIONS, SHAPES, TEXTURES, Scene, draw, scenes
from reference.networks import PIPELINE_DIR, to_tensor
from reference.text import T5_TOKENS

# every place that an item can be at: those of single items, and first and second of each relation
SPOTS = [*PLACES, *(f"{relation} {i}" for relation in RELATIONS for i in (0, 1))]
HEADS = {"colour": list(COLOURS), "shape": list(SHAPES), "texture": list(TEXTURES), "place": SPOTS}


class Probe(nn.Module):
    """Five convolutions and one linear head per attribute."""

    def __init__(self) -> None:
        super().__init__()
        widths, layers = [4, 32, 48, 64, 96, 128], []
        for a, b in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.heads = nn.ModuleDict({name: nn.Linear(128 * 4, len(values)) for name, values in HEADS.items()})

    def forward(self, pictures: torch.Tensor, which: torch.Tensor) -> dict[str, torch.Tensor]:
        plane = which.float()[:, None, None, None].expand(-1, 1, *pictures.shape[2:])
        body = self.body(torch.cat([pictures, plane], dim=1))
        return {name: head(body) for name, head in self.heads.items()}


def labels(scene: Scene, which: int) -> dict[str, int]:
    item = scene.items[which]
    spot = scene.place if len(scene.items) == 1 else f"{scene.place} {which}"
    words = {"colour": item.colour, "shape": item.shape, "texture": item.texture, "place": spot}
    return {name: HEADS[name].index(word) for name, word in words.items()}


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
        wanted = [labels(scene, w) for scene, w in zip(batch, which, strict=True)]
        loss = sum(nn.functional.cross_entropy(answers[n], torch.tensor([x[n] for x in wanted])) for n in HEADS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return probe.eval()


@torch.no_grad()
def score(probe: Probe, pictures: list[np.ndarray], drawn: list[Scene]) -> dict[str, float]:
    """Share of items whose attribute the probe reads as the caption says."""
    hits: dict[str, list[bool]] = {name: [] for name in HEADS}
    for picture, scene in zip(pictures, drawn, strict=True):
        for which in range(len(scene.items)):
            answers = probe(to_tensor([picture]), torch.tensor([which]))
            for name, index in labels(scene, which).items():
                hits[name].append(answers[name].argmax().item() == index)
    return {name: round(float(np.mean(values)), 4) for name, values in hits.items()}


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
@click.option("--num", default=500, help="Generated pictures to score.")
@click.option("--steps", default=500, help="Training steps of the probe.")
@click.option("--guidance", default=3.5)
@click.option("--seed", default=77)
def main(out: Path, num: int, steps: int, guidance: float, seed: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    probe = train_probe(steps, seed)
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
