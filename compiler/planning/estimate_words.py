"""An estimate as a table in words."""

from collections.abc import Iterator, Sequence

from cachec.compiler.calibration.uses import NUM_RUN
from cachec.compiler.planning.estimate import COMPILE_MEMORY, Estimate, in_count, in_flops
from cachec.compiler.planning.gpus import GpuFigures
from cachec.runtime.inspect import in_seconds
from cachec.runtime.room import in_bytes


def describe_estimate(found: Estimate, gpus: Sequence[GpuFigures]) -> list[tuple[str, str]]:
    """Rows: what there is, what a request takes, how fast it can be on ``gpus``, and what making the engines takes."""
    return [*_model_rows(found), *_request_rows(found), *(_gpu_row(found, gpu) for gpu in gpus), *_making_rows(found)]


def _model_rows(found: Estimate) -> Iterator[tuple[str, str]]:
    settings, parts = found.settings, {name: in_count(count) for name, count in found.parameters.items()}
    sizes = f"{settings.width}x{settings.height}, {settings.text_tokens} text tokens"
    held = f"the prologue, once a request, reads {parts['hoisted']} of them"
    guided = ", with two branches of guidance" if found.branches > 1 else ""
    yield "model", f"{found.spec.portable_source}, {sizes}, {settings.dtype}, batch {found.batch}{guided}"
    work = "" if found.work == found.budget else f", some of one branch of guidance alone: {found.work:g} in work"
    yield "steps", f"{settings.steps}, {found.budget} of them computed{work}"
    yield "graphs", ", ".join(f"{name} {count} nodes" for name, count in found.nodes.items())
    yield "parameters", f"{in_count(found.total)}: body {parts['body']}, tail {parts['tail']}; {held}"
    if own := found.parameters["predictor"]:
        yield "predictor", f"{parts['predictor']} parameters of its own, {own / found.total:.1%} of the model's"
    yield "weights", in_bytes(found.weights)


def _request_rows(found: Estimate) -> Iterator[tuple[str, str]]:
    each = {"hidden": in_bytes(found.rows * found.feature), "output": in_bytes(found.batch * found.velocity)}
    slots = [f"{cut} cut {in_bytes(found.slots(cut))}, of {each[cut]} each" for cut in found.cuts]
    ratios = [f"{found.ratio(cut):.2f} times fewer on the {cut} cut" for cut in found.cuts]
    yield "slots at most", "; ".join(slots)
    yield "activations at most", in_bytes(found.rows * found.activations)
    yield "step values", in_bytes(found.step_values)
    yield "memory at work", f"{in_bytes(found.needed)}: all of these; text encoders and VAE come on top"
    if found.others:
        parts = ", ".join(f"{name} {in_bytes(size)}" for name, size in found.others.items())
        kept, phases = map(in_bytes, found.whole_request)
        yield "whole request", f"{kept} where all parts are kept, {phases} where each is there for its phase: {parts}"
    yield "FLOPs of a step", f"computed {in_flops(found.computed)}, forecast {in_flops(found.forecast)} on the hidden cut"
    yield "FLOPs of a request", f"{in_flops(found.model_flops)} with all steps computed; {', '.join(ratios)}"
    yield "", "a ratio of FLOPs bounds the speed-up from above; it is none"


def _gpu_row(found: Estimate, gpu: GpuFigures) -> tuple[str, str]:
    facts = found.on(gpu)
    step, some, every = (in_seconds(facts[name]) for name in ("step", "request", "all_computed"))
    text = f"a computed step {step}, a request {some} ({every} with all steps computed)"
    if not facts["fits"]:
        text += f"; needs more than its {in_bytes(gpu.memory)}"
    if (measured := facts["measured"]) is not None and found.rows == 1:
        share = facts["step"] / measured["seconds"]
        text += f"; a step was measured at {in_seconds(measured['seconds'])}, {share:.0%} of peak ({measured['where']})"
    return f"floor on {gpu.name}", f"{text}; estimate, by {gpu.peak / 1e12:.0f} TFLOP/s of dense bfloat16"


def _making_rows(found: Estimate) -> Iterator[tuple[str, str]]:
    flops = in_flops(found.calibration.evaluations * found.computed)
    yield "compile", f"{in_bytes(COMPILE_MEMORY)} of memory, weights are streamed; {in_bytes(found.weights)} of disk"
    yield "calibration", f"{NUM_RUN} prompts, {flops}: {found.calibration}"
    yield "TensorRT build", f"up to {in_bytes(found.build_memory)} of memory and {in_bytes(found.build_disk)} of disk"
