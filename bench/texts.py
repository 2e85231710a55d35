"""What engines for shorter texts gain, where a model masks its padding: a Qwen-Image of two blocks, 4 heads of 128.

    python -m bench.texts [--sizes 512x512,1024x1024] [--texts 64,128,512] [--rounds 5]

One bundle, float32, ONNX Runtime, one thread. A request has a text of 40 tokens. Lengths are played by turns; what is given is
processor time of a computed step, and its ratio to that with the longest text, the median of pairs. Latents are compared with
those of the longest.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import diffusers
import numpy as np

import cachec
from tests.families import FAMILIES, randomise

STEPS, TOKENS = 2, 40
WIDE = {"num_layers": 2, "attention_head_dim": 128, "num_attention_heads": 4, "axes_dims_rope": (16, 56, 56)}


def save_wide(directory: Path) -> None:
    """The small Qwen-Image with a wider transformer."""
    pipeline = next(one for one in FAMILIES if one.name == "qwen-image").make()
    config = {**pipeline.transformer.config, **WIDE}
    pipeline.register_modules(transformer=randomise(diffusers.QwenImageTransformer2DModel.from_config(config)))
    pipeline.save_pretrained(directory)


def measure(bundle: Path, size: str, rounds: int) -> dict[int, tuple[float, float, float]]:
    """By length of texts: seconds of a step, their ratio to those of the longest text, and how far latents are from its."""
    with cachec.load(bundle, threads=1) as loaded:
        *shorter, longest = loaded.texts
        sessions = {text: loaded.session(level="uncached", size=size, text=text) for text in (longest, *shorter)}
        specs = {spec.name: spec for one in loaded.target.engines.values() for spec in one.signature.inputs}
        states, mask = loaded.io.text or ("", "")
        random, there = np.random.default_rng(0), np.arange(longest)[None] < TOKENS
        width = specs[states].shape[-1]
        given = {states: random.standard_normal((1, longest, width)).astype(np.float32), mask: there}
        noise = random.standard_normal(sessions[longest].latent_shape).astype(np.float32)
        made, seconds = {}, dict[int, list[float]]()
        for turn in range(rounds + 1):
            for text, session in sessions.items():
                short = {name: np.ascontiguousarray(value[:, :text]) for name, value in given.items()}
                start = time.process_time()
                made[text] = session.run(short, noise)
                if turn:  # the first of each is slow
                    seconds.setdefault(text, []).append((time.process_time() - start) / STEPS)
    apart = {text: float(np.abs(one - made[longest]).max() / np.abs(made[longest]).max()) for text, one in made.items()}
    ratios = {text: [a / b for a, b in zip(some, seconds[longest], strict=True)] for text, some in seconds.items()}
    return {text: (statistics.median(some), statistics.median(ratios[text]), apart[text]) for text, some in seconds.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.texts", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", default="512x512,1024x1024")
    parser.add_argument("--texts", default="64,128,512")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        save_wide(model := Path(work) / "model")
        path = cachec.compile_model(
            str(model), Path(work) / "texts.cachec", method="reuse", budget=1, steps=STEPS, guidance=1.0, size=asked.sizes,
            text_tokens=asked.texts, targets=("ort",),
        )  # fmt: skip
        for size in asked.sizes.split(","):
            for text, (seconds, ratio, apart) in measure(path, size, asked.rounds).items():
                print(
                    f"{size}, {text} text tokens: {seconds:.3f} s a step, {ratio:.3f} of the longest, latents {apart:.0e} apart"
                )
