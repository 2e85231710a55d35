"""What is in a bundle, in words."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cachec.runtime.abi import BATCH, FEATURE, PAIR, PROLOGUE, VELOCITY, steps_of
from cachec.runtime.bundle import Bundle, Target
from cachec.runtime.components import PictureFacts, components_of, request_peaks
from cachec.runtime.program import UNCACHED, Program
from cachec.runtime.specs import TensorSpec, itemsize
from cachec.runtime.starting import rule_of
from cachec.runtime.variants import PictureSize


def describe_bundle(bundle: Bundle, fits: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Rows of a table about an opened bundle. ``fits`` says how each target fits this machine."""
    manifest, first = bundle.manifest, bundle.at()
    settings, method = manifest.settings, manifest.method
    options = ", ".join(f"{k}={v}" for k, v in method["options"].items())
    rows = [
        ("model", f"{manifest.model['name']} ({manifest.model['source']}), weights {manifest.model['weights_sha256'][:16]}"),
        *[("credit", credit) for credit in [manifest.model.get("credit")] if credit],
        *[("lora", in_words) for in_words in describe_loras(manifest.model.get("loras", ()))],
        ("method", method["name"] + (f" ({options})" if options else "") + f", fold {method['fold']}"),
        ("cut", f"{method['cut']}, after {settings['block']}"),
        ("setting", f"{PictureSize.of(settings)}, {settings['text_tokens']} text tokens, guidance {settings['guidance']}, "
                    f"{settings['steps']} steps"),
        *_choices(bundle),
        *_engine_sets(bundle),
    ]  # fmt: skip
    predictor = method["predictor"]
    if predictor is not None:
        own = "num_prompts" in predictor
        made = f"trained on {predictor['num_prompts']} prompts, seed {predictor['seed']}" if own else predictor["made_by"]
        apart = ", one for each branch of guidance" if predictor.get("branches") == "apart" else ""
        rows.append(("predictor", made + apart))
    rows += describe_all_levels(bundle)
    for index, target in enumerate(manifest.targets):
        rows.append(("target", f"{target}, {target.shape_bucket}"))
        rows += [("", text) for text in (*fits[index : index + 1], *_target_facts(target))]
        for name, artifact in target.engines.items():
            rows.append((f"  {name}", f"{artifact.path}, {manifest.files[artifact.path]['bytes'] / 1e6:.2f} MB"))
    rows += [*describe_weights(bundle), *describe_choice(bundle), *describe_parts(bundle), *describe_memory(first)]
    for size in manifest.sizes[1:]:
        rows += [("at", size), *describe_memory(bundle.at(size))]
    total = sum(entry["bytes"] for entry in manifest.files.values())
    rows.append(("size", f"{total / 1e6:.1f} MB in {len(manifest.files)} files, all hashes match"))
    return rows


def describe_loras(loras: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is fused with the weights."""
    rows = []
    for one in loras:
        of = f" for {one['part']}" if "part" in one else ""
        rows.append(f"{one['name']} at scale {one['scale']:g}{of}, {one['sha256'][:16]}")
    return rows


def describe_weights(bundle: Bundle, *, only: str | None = None) -> list[tuple[str, str]]:
    """Rows about further weights: what they are, and which targets have them; about ``only`` one, if given."""
    manifest, rows = bundle.manifest, []
    for name, own in manifest.weights.items():
        if only in (None, name):
            size = manifest.files[own["file"]]["bytes"] / 1e6
            having = dict.fromkeys(target.backend for target in manifest.targets if name in target.added)
            rows += [(f"weights {name}", text) for text in describe_loras(own["loras"])]
            rows.append(("", f"{size:.2f} MB of changed tensors, for {', '.join(having)}; levels were fitted and measured on "
                             "the bundle's own weights"))  # fmt: skip
    return rows


def _choices(bundle: Bundle) -> list[tuple[str, str]]:
    """What else a request may ask for, where there is a choice."""
    manifest = bundle.manifest
    choices = {
        "sizes": manifest.sizes,
        "step counts": map(str, manifest.step_counts),
        "text tokens": map(str, manifest.texts),
    }
    return [(name, ", ".join(texts)) for name, all_ in choices.items() if len(texts := tuple(all_)) > 1]


def _engine_sets(bundle: Bundle) -> list[tuple[str, str]]:
    """Of a bundle for several sizes: whether its engines are for all of them."""
    shapes = bundle.manifest.shapes
    if shapes:
        axes = {axis: [str(shape["axes"][axis]) for shape in shapes.values()] for axis in next(iter(shapes.values()))["axes"]}
        lengths = ", ".join(f"{axis} {', '.join(several)}" for axis, several in axes.items())
        return [("engines", f"one set for all sizes{': ' if axes else ''}{lengths}")]
    why = bundle.manifest.facts.get("engines_for_each_size")
    return [] if why is None else [("engines", f"a set for each size: {why}")]


def describe_all_levels(bundle: Bundle) -> list[tuple[str, str]]:
    """Rows about the levels of every size and number of steps."""
    if not bundle.manifest.more:
        return describe_levels(bundle.at())
    rows = []
    for one in bundle.manifest.variants:
        rows.append(("at", f"{one.size}, {one.steps} steps"))
        rows += describe_levels(bundle.at(one.size, one.steps))
    return rows


def _target_facts(target: Target) -> list[str]:
    """What else there is to know about a target."""
    facts = []
    if target.sizes:
        facts.append("sizes " + ", ".join(f"{name} {least} to {most}" for name, (least, _, most) in target.sizes.items()))
    needs = {name: value for name, value in target.needs.items() if name != "sm"}
    if needs:
        facts.append("needs " + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in needs.items()))
    if target.weights:
        facts.append("without weights, which are loaded from the bundle's ONNX files")
    return facts


def describe_choice(bundle: Bundle) -> list[tuple[str, str]]:
    """Rows about what ``--target auto`` measured, the fastest first, and what it left out."""
    if (facts := bundle.manifest.facts.get("auto")) is None:
        return []
    rows = [("measured", f"on {facts['device']}: {facts['kept']} is kept")]
    for name, row in facts["targets"].items():
        graphs = ", ".join(f"{graph} {in_seconds(seconds)}" for graph, seconds in row["seconds"].items())
        took, built, loaded = (in_seconds(row[f"{what}_seconds"]) for what in ("request", "build", "load"))
        if (beside := row["beside"]) is not None:  # what else the machine did differs from one comparison to the next
            took += f" beside {in_seconds(beside['request_seconds'])} on {beside['name']}"
        times = f"{row['ratio']:.2f} times as long as the kept one"
        rows.append((f"  {name}", f"{times}; a request {took} ({graphs}); built in {built}, loaded in {loaded}"))
    return rows + [(f"  {name}", f"left out: {reason}") for name, reason in facts["failed"].items()]


def in_seconds(seconds: float) -> str:
    """As people write it."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def describe_parts(bundle: Bundle) -> list[tuple[str, str]]:
    """Rows about text encoders and decoder."""
    rows = []
    for name, component in components_of(bundle.manifest).items():
        targets = "; ".join(map(str, component.targets))
        rows.append((f"  {name}", f"{component.weights / 1e6:.2f} MB of weights, for {', '.join(component.memory)}: {targets}"))
    return [("pictures", "made of prompts by the bundle itself"), *rows] if rows else []


def describe_memory(bundle: Bundle) -> list[tuple[str, str]]:
    """Rows about what a session of one sample takes: known before anything runs."""
    facts = bundle.manifest.facts
    memory, rows = facts["memory"], []
    for name, left in facts["hoisted"].items():
        nodes = f"{left['nodes']} nodes, " if left["nodes"] > 0 else ""  # a method's own nodes may be more than those that left
        rows.append((f"hoisted, {name}", f"{nodes}{left['flops'] / 1e6:.2f} MFLOP, "
                     f"{left['weight_bytes'] / 1e6:.2f} MB of weights left the step"))  # fmt: skip
    level = next((level for level in bundle.manifest.programs if level != UNCACHED), UNCACHED)
    program = bundle.program(level)
    parts = {
        "weights": memory["weights"],
        "slots": _slot_bytes(bundle, program),
        "step values": _hoisted_bytes(bundle, program),
        "activations at most": memory["activations"],
    }
    text = " + ".join(f"{name} {size / 1e6:.2f}" for name, size in parts.items())
    rows.append(("memory", f"{sum(parts.values()) / 1e6:.1f} MB for one sample at level {level}: {text}"))
    if bundle.manifest.pictures:
        working = sum(parts.values()) - memory["weights"]
        kept, phases = request_peaks(bundle.manifest, memory["weights"], working)
        text = f"{kept / 1e6:.1f} MB where all components are kept, {phases / 1e6:.1f} MB where each is there for its phase"
        if PictureFacts.of(bundle.manifest).encoder is not None:
            kept, phases = request_peaks(bundle.manifest, memory["weights"], working, picture=True)
            text += f"; from a picture, too, {kept / 1e6:.1f} and {phases / 1e6:.1f} MB"
        rows.append(("request", f"from a prompt to its picture at most {text}"))
    return rows


def _hoisted_bytes(bundle: Bundle, program: Program) -> int:
    """What the prologue leaves for all steps."""
    prologue = bundle.target.engines.get(PROLOGUE)
    if prologue is None:
        return 0
    sizes = {BATCH: _rows(program)}
    for graph in bundle.target.engines:
        count = sum(len(instruction.steps) for instruction in program.instructions if instruction.graph == graph)
        sizes[steps_of(graph)] = max(1, count)
    return sum(_tensor_bytes(spec, sizes) for spec in prologue.signature.outputs)


def _tensor_bytes(spec: TensorSpec, sizes: Mapping[str, int]) -> int:
    return math.prod(spec.resolve(sizes)) * itemsize(spec.dtype)


def describe_levels(bundle: Bundle, *, only: str | None = None) -> list[tuple[str, str]]:
    """Rows about each level but the uncached one, or ``only`` one: steps, slots, where it may begin, and what was measured.

    They are those of the bundle's first size and number of steps.
    """
    rows, measured = [], bundle.manifest.facts.get("levels", {})
    for level in bundle.manifest.programs:
        if level == UNCACHED or only not in (None, level):
            continue
        program, facts = bundle.program(level), measured.get(level, {})
        own = f", by {facts['method']}" if "method" in facts else ""
        one = (
            f", {len(alone)} of them one branch alone: {program.work:g} in work" if (alone := program.one_branch_steps) else ""
        )
        rows.append((f"level {level}", f"computes {len(program.compute_steps)} of {program.num_steps} steps{one}{own}"))
        rows.append(("", schedule_strip(program)))
        rows.append(("", ", ".join(f"{step}{'c' * (step in alone)}" for step in program.compute_steps)))
        size = _slot_bytes(bundle, program) / 1e6
        kinds = ", ".join(
            f"{count} {kind} slots of {_slot_spec(bundle, program, kind).dtype}" for kind, count in program.slots.items()
        )
        rows.append(("", f"{kinds or 'no slots'}, {size:.2f} MB a sample"))
        rows.append(("", rule_of(program)))
        if "measured_by" in facts:
            rows.append(("", _measured(facts)))
    return rows


def _measured(facts: Mapping[str, Any]) -> str:
    def decibels(name: str) -> str:
        value, error = facts[name], facts.get(f"{name}_stderr")
        return "equal" if value is None else f"{value:.2f} dB" + ("" if error is None else f" ± {error:.2f}")

    near = f"PSNR {decibels('psnr_db')}" if "psnr_db" in facts else f"latents off by {100 * facts['latent_error']:.2f} %"
    text = f"{near}, loop {facts['speedup']:.2f} times as fast"
    if "psnr_db_fine" in facts:
        text += f", {decibels('psnr_db_fine')} against the fine reference"
    return f"{text}; {facts['num_prompts']} held-out prompts, by {facts['measured_by']}"


def schedule_strip(program: Program) -> str:
    """One character a step: # computed, c of one branch of guidance, · forecast."""
    signs = dict.fromkeys(program.compute_steps, "#") | dict.fromkeys(program.one_branch_steps, "c")
    return "".join(signs.get(step, "·") for step in range(program.num_steps))


def _slot_bytes(bundle: Bundle, program: Program) -> int:
    rows = {FEATURE: _rows(program), PAIR: _rows(program), VELOCITY: 1}  # a velocity is that of both branches combined
    specs = {kind: _slot_spec(bundle, program, kind) for kind in program.slots}
    return sum(_tensor_bytes(specs[kind], {BATCH: rows[kind]}) * count for kind, count in program.slots.items())


def _rows(program: Program) -> int:
    """That the model runs on for one sample: guidance has two branches."""
    return 2 if program.key.guided else 1


def _slot_spec(bundle: Bundle, program: Program, kind: str) -> TensorSpec:
    writer = next(instruction.graph for instruction in program.instructions if kind in instruction.writes)
    return bundle.target.engines[writer].signature.output(VELOCITY if kind == PAIR else kind)
