"""Let a probe read what a pipeline draws: ``python -m reference.avatars.score tiny-flux --out build/reference``.

Draws held-out captions with the pipeline that ``assemble`` wrote, 50 steps, and writes ``score-NAME.json`` and a sheet,
``score-NAME.png``. The first row of the file, dataset pictures of the same captions, is what the probe itself gets right.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from diffusers import DiffusionPipeline
from tqdm import tqdm

from cachec.compiler.evaluation.probe import Probe
from reference.avatars import loop
from reference.avatars.assemble import PIPELINES
from reference.avatars.autoencoder import save_sheet
from reference.avatars.clips import load
from reference.avatars.dataset import read
from reference.avatars.motion import CLIP_SIDE, CLIP_WORDS, FRAMES
from reference.avatars.probe import CLIP_HEADS, PICTURE_HEADS, SEEN, as_input, clip_data, picture_data, score
from reference.avatars.render import SIDE
from reference.avatars.tiny_flux import TEXT_TOKENS

BATCH = 20
STEPS = 50


@dataclass(frozen=True)
class Drawing:
    """How a pipeline is called, and what it returns as arrays."""

    arguments: dict[str, object]
    video: bool = False

    def draw(self, pipeline: DiffusionPipeline, captions: list[str], generator: torch.Generator) -> np.ndarray:
        """uint8 [B, S, S, 3], or [B, 9, S, S, 3]."""
        drawn = pipeline(captions, num_inference_steps=STEPS, generator=generator, output_type="np", **self.arguments)
        return (np.asarray(drawn.frames if self.video else drawn.images) * 255).round().astype(np.uint8)


PICTURE = {"height": SIDE, "width": SIDE}
DRAWINGS = {
    "tiny-flux": Drawing({**PICTURE, "guidance_scale": 3.5, "max_sequence_length": TEXT_TOKENS}),
    "tiny-qwen": Drawing({**PICTURE, "true_cfg_scale": 3.5, "negative_prompt": " "}),
    "tiny-hunyuan": Drawing(
        {
            "height": CLIP_SIDE,
            "width": CLIP_SIDE,
            "num_frames": FRAMES,
            "guidance_scale": 3.5,
            "max_sequence_length": CLIP_WORDS,
        },
        video=True,
    ),
}


def load_reader(kind: str, out: Path) -> Probe:
    """The trained probe of ``pictures`` or ``clips``."""
    reader = Probe(PICTURE_HEADS, SIDE) if kind == "pictures" else Probe(CLIP_HEADS, CLIP_SIDE, 3 * len(SEEN))
    reader.load_state_dict(torch.load(out / f"probe-{kind}.pt", weights_only=True)["reader"])
    return reader.eval()


@click.command()
@click.argument("name", type=click.Choice(list(PIPELINES)))
@loop.options
@click.option("--num", default=500, show_default=True, help="Held-out captions.")
@click.option("--seed", default=77, show_default=True)
def main(name: str, out: Path, num: int, seed: int, threads: int) -> None:
    torch.set_num_threads(threads)
    drawing = DRAWINGS[name]
    if drawing.video:
        captions, (real, asked) = load("held-out-clips", out)[2][:num], clip_data("held-out-clips", out)
    else:
        captions, (real, asked) = [each["caption"] for each in read("held-out", out)[1][:num]], picture_data("held-out", out)
    reader = load_reader("clips" if drawing.video else "pictures", out)
    pipeline = DiffusionPipeline.from_pretrained(out / "pipelines" / name)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    drawn = np.concatenate([
        drawing.draw(pipeline, captions[i : i + BATCH], generator) for i in tqdm(range(0, len(captions), BATCH), mininterval=5)
    ])  # fmt: skip
    rows = {"dataset": score(reader, as_input(real[: len(drawn)]), asked[: len(drawn)]),
            "generated": score(reader, as_input(drawn), asked[: len(drawn)])}  # fmt: skip
    (out / f"score-{name}.json").write_text(json.dumps({"num": len(drawn), "steps": STEPS, **rows}, indent=1) + "\n")
    frames = drawn[:8].reshape(-1, *drawn.shape[-3:]) if drawing.video else drawn[:32]
    save_sheet(frames, out / f"score-{name}.png", columns=FRAMES if drawing.video else 8)
    print(json.dumps(rows["generated"]))


if __name__ == "__main__":
    main()
