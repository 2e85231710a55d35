"""Which families' transformers can be captured as they are: ``python -m bench.capture_families [NAME …]``.

Each small pipeline of ``tests/families.py`` runs twice, with two and with three samples; a hook writes down what it hands its
transformer. Axes that differ between the two runs are the batch. The transformer is exported on the first call with two samples
and compared with the module on the last call with three. Calls of another make (other inputs, another text length) are captured
apart. Prints a row for each; ``docs/models.md`` sums them up.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch
from torch import nn
from torch.export import Dim, export
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from tests.families import FAMILIES, NEGATIVE, PROMPT, Family

SAMPLES = (2, 3)
TOLERANCE = 1e-5  # relative, of the largest difference
LINE = 100  # characters of an error's first line


@dataclass(frozen=True, eq=False)
class Call:
    """What a pipeline handed to a transformer; ``part`` is the transformer's name in the pipeline."""

    part: str
    leaves: tuple[Any, ...]
    structure: TreeSpec

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(leaf for leaf in self.leaves if isinstance(leaf, torch.Tensor))

    @property
    def make(self) -> tuple[Any, ...]:
        """Which inputs there are, and their sizes."""
        shapes = (tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else leaf for leaf in self.leaves)
        return (self.part, *map(str, shapes))


class Bound(nn.Module):
    """A transformer as a function of its tensors; everything else is as in one call."""

    def __init__(self, transformer: nn.Module, call: Call) -> None:
        super().__init__()
        self.transformer, self.call = transformer, call

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, torch.Tensor) else leaf for leaf in self.call.leaves]
        args, keywords = tree_unflatten(leaves, self.call.structure)
        output = self.transformer(*args, **{**keywords, "return_dict": False})[0]
        return output if isinstance(output, torch.Tensor) else torch.stack(output)  # Z-Image gives a list of samples


def capture(family: Family) -> list[str]:
    """A table row for each make of call."""
    with TemporaryDirectory() as name:
        family.make().save_pretrained(name)
        pipeline = family.load(Path(name))
    few, many = (_makes(_record(family, pipeline, samples)) for samples in SAMPLES)
    rows = []
    for (first, late), (_, last) in zip(few, many, strict=True):
        started = time.perf_counter()
        bound = Bound(getattr(pipeline, first.part), first)
        if len(first.tensors) == len(last.tensors):
            verdict = _verdict(bound, first, last)
        else:  # the samples are a list: there is no batch axis
            verdict = f"no: a list of samples; at this batch only: {_verdict(bound, first, late)}"
        inputs = ", ".join("×".join(map(str, tensor.shape)) for tensor in first.tensors)
        rows.append(f"| {family.name} | {first.part}: {inputs} | {verdict} | {time.perf_counter() - started:.0f} s |")
    return rows


def _record(family: Family, pipeline: Any, samples: int) -> list[Call]:
    calls: list[Call] = []

    def hook(part: str) -> Any:
        def write(_: nn.Module, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
            leaves, structure = tree_flatten((args, dict(keywords)))
            calls.append(Call(part, tuple(x.clone() if isinstance(x, torch.Tensor) else x for x in leaves), structure))

        return write

    parts = [(part, getattr(pipeline, part)) for part in family.transformers]
    hooks = [module.register_forward_pre_hook(hook(part), with_kwargs=True) for part, module in parts]
    family.run(pipeline, **_several(family, samples))
    for handle in hooks:
        handle.remove()
    return calls


def _several(family: Family, samples: int) -> dict[str, Any]:
    """Prompts of unlike lengths, so that masks are handed over where there are any."""
    if "class_labels" in family.call:
        return {"class_labels": list(range(samples))}
    negative = {"negative_prompt": [NEGATIVE] * samples} if "negative_prompt" in family.call else {}
    if family.name == "qwen-image-edit":  # takes one picture and one prompt
        return {"num_images_per_prompt": samples}
    if family.name == "flux-kontext":
        return {"image": [family.call["image"]] * samples, "prompt": [PROMPT] * samples}
    return {"prompt": [PROMPT, *["a green square"] * (samples - 1)], **negative}


def _makes(calls: list[Call]) -> list[tuple[Call, Call]]:
    """The first and the last call of each make, in the order in which they came."""
    found: dict[tuple[Any, ...], tuple[Call, Call]] = {}
    for call in calls:
        found[call.make] = (found.get(call.make, (call,))[0], call)
    return list(found.values())


def _verdict(bound: Bound, first: Call, last: Call) -> str:
    axes = tuple(
        {axis: Dim.DYNAMIC for axis, (a, b) in enumerate(zip(one.shape, other.shape, strict=True)) if a != b}
        for one, other in zip(first.tensors, last.tensors, strict=True)
    )
    try:
        with torch.no_grad():
            program = export(bound, first.tensors, dynamic_shapes=(axes,), strict=False)
            found, wanted = program.module()(*last.tensors), bound(*last.tensors)
    except Exception as error:  # whatever stops a capture is what is asked
        return f"no: {type(error).__name__}: {str(error).strip().splitlines()[0][:LINE]}"
    off = float((found - wanted).abs().max() / wanted.abs().max())
    return f"{'yes' if off < TOLERANCE else 'wrong'}, {off:.0e}"


@click.command()
@click.argument("names", nargs=-1)
def main(names: tuple[str, ...]) -> None:
    """Print a row for each make of call of each family."""
    for family in FAMILIES:
        if not names or family.name in names:
            click.echo("\n".join(capture(family)))


if __name__ == "__main__":
    main()
