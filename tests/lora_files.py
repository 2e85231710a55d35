"""LoRA files for small pipelines, with random matrices."""

import torch
from safetensors.torch import save_file

RANK = 4


def linears(transformer, every=3):
    """Paths of every third linear layer, and of all others only those."""
    return [path for path, one in transformer.named_modules() if isinstance(one, torch.nn.Linear)][::every]


def pairs(transformer, paths, *, seed=0, size=0.1):
    """By path: up [N, R] and down [R, M]."""
    generator = torch.Generator().manual_seed(seed)
    weights = {path: transformer.get_submodule(path).weight for path in paths}
    return {
        path: tuple(size * torch.randn(*shape, generator=generator) for shape in ((len(weight), RANK), (RANK, weight.shape[1])))
        for path, weight in weights.items()
    }


def write_lora(path, made, *, alpha=None, prefix="transformer.", metadata=None, more=None):
    """A file as diffusers saves it; ``alpha`` for each layer, ``more`` tensors besides."""
    tensors = {f"{prefix}{name}.lora_B.weight": up for name, (up, _) in made.items()}
    tensors |= {f"{prefix}{name}.lora_A.weight": down for name, (_, down) in made.items()}
    tensors |= {} if alpha is None else {f"{prefix}{name}.alpha": torch.tensor(float(alpha)) for name in made}
    save_file({name: value.contiguous() for name, value in {**tensors, **(more or {})}.items()}, path, metadata)
    return path


def fuse(transformer, made, scale):
    """Add it to the weights by hand."""
    with torch.no_grad():
        for name, (up, down) in made.items():
            transformer.get_submodule(name).weight += scale * up @ down
