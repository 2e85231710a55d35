"""Put trained parts together as pipeline directories: ``python -m reference.avatars.assemble tiny-flux --out build/reference``.

Writes ``OUT/pipelines/NAME`` from the checkpoint as it is, finished or not: transformer (running average) and autoencoder in
float16, the frozen readers in float32. ``from_pretrained`` of the pipeline's class loads it.
"""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import click
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    HunyuanVideoPipeline,
    QwenImagePipeline,
)
from torch import nn

from reference.avatars import tiny_flux, tiny_hunyuan, tiny_qwen
from reference.avatars.networks import build_scheduler


def trained(name: str, network: nn.Module, out: Path) -> nn.Module:
    """``network`` with the running average of ``name``'s checkpoint, in float16."""
    network.load_state_dict(torch.load(out / f"{name}.pt", weights_only=True)["average"])
    return network.half()


def flux(out: Path) -> DiffusionPipeline:
    learner = tiny_flux.FluxLearner()
    return FluxPipeline(
        scheduler=build_scheduler(),
        vae=AutoencoderKL.from_pretrained(out / "vae").half(),
        text_encoder=learner.clip[1],
        tokenizer=learner.clip[0],
        text_encoder_2=learner.t5[1],
        tokenizer_2=learner.t5[0],
        transformer=trained("tiny-flux", tiny_flux.build_transformer(), out),
    )


def qwen(out: Path) -> DiffusionPipeline:
    reader = tiny_qwen.QwenLearner().pipeline
    return QwenImagePipeline(
        scheduler=build_scheduler(),
        vae=AutoencoderKLQwenImage.from_pretrained(out / "vae-qwen").half(),
        text_encoder=reader.text_encoder,
        tokenizer=reader.tokenizer,
        transformer=trained("tiny-qwen", tiny_qwen.build_transformer(), out),
    )


def hunyuan(out: Path) -> DiffusionPipeline:
    readers = tiny_hunyuan.HunyuanLearner().pipeline
    return HunyuanVideoPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=math.exp(tiny_hunyuan.SHIFT)),
        vae=AutoencoderKLHunyuanVideo.from_pretrained(out / "vae-video").half(),
        text_encoder=readers.text_encoder,
        tokenizer=readers.tokenizer,
        text_encoder_2=readers.text_encoder_2,
        tokenizer_2=readers.tokenizer_2,
        transformer=trained("tiny-hunyuan", tiny_hunyuan.build_transformer(), out),
    )


PIPELINES: dict[str, Callable[[Path], DiffusionPipeline]] = {"tiny-flux": flux, "tiny-qwen": qwen, "tiny-hunyuan": hunyuan}


def assemble(name: str, out: Path) -> Path:
    """Write ``name``'s pipeline directory anew. Returns it."""
    to = out / "pipelines" / name
    shutil.rmtree(to, ignore_errors=True)
    PIPELINES[name](out).save_pretrained(to)
    for path in to.rglob("config.json"):  # which says where its part was loaded from: on this machine
        config = {key: value for key, value in json.loads(path.read_text()).items() if key != "_name_or_path"}
        path.write_text(json.dumps(config, indent=2) + "\n")
    return to


@click.command()
@click.argument("name", type=click.Choice(list(PIPELINES)))
@click.option("--out", type=click.Path(path_type=Path), default=Path("build/reference"), show_default=True)
def main(name: str, out: Path) -> None:
    to = assemble(name, out)
    size = sum(file.stat().st_size for file in to.rglob("*") if file.is_file())
    print(f"{to}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
