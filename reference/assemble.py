"""Put the trained parts together as a ``FluxPipeline`` directory: ``python -m reference.assemble --out reference/build``."""

import shutil
from pathlib import Path

import click
import torch
from diffusers import AutoencoderKL, FluxPipeline

from reference.dataset import vocabulary
from reference.networks import PIPELINE_DIR, build_scheduler, build_transformer
from reference.text import build_clip, build_t5


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Where training left its results.")
@click.option("--to", type=click.Path(path_type=Path), default=PIPELINE_DIR, help="The pipeline directory.")
def main(out: Path, to: Path) -> None:
    """Transformer (running average) and VAE in float16, text encoders in float32."""
    transformer = build_transformer()
    transformer.load_state_dict(torch.load(out / "transformer.pt")["average"])
    words = vocabulary()
    (clip_tokenizer, clip), (t5_tokenizer, t5) = build_clip(words), build_t5(words)
    pipeline = FluxPipeline(
        scheduler=build_scheduler(),
        vae=AutoencoderKL.from_pretrained(out / "vae").half(),
        text_encoder=clip,
        tokenizer=clip_tokenizer,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
        transformer=transformer.half(),
    )
    if to.exists():
        shutil.rmtree(to)
    pipeline.save_pretrained(to)
    size = sum(file.stat().st_size for file in to.rglob("*") if file.is_file())
    print(f"{to.name}: {size / 1e6:.1f} MB, {sum(p.numel() for p in transformer.parameters()) / 1e6:.2f} M in the transformer")


if __name__ == "__main__":
    main()
