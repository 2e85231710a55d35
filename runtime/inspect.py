"""What is in a bundle, in words."""

from cachec.runtime.bundle import Bundle
from cachec.runtime.program import Program


def describe_bundle(bundle: Bundle) -> list[tuple[str, str]]:
    """Rows of a table about an opened bundle."""
    manifest = bundle.manifest
    settings, method = manifest.settings, manifest.method
    options = ", ".join(f"{k}={v}" for k, v in method["options"].items())
    rows = [
        ("model", f"{manifest.model['name']} ({manifest.model['source']}), weights {manifest.model['weights_sha256'][:16]}"),
        ("method", method["name"] + (f" ({options})" if options else "") + f", fold {method['fold']}"),
        ("cut", f"after {settings['cut']}"),
        ("setting", f"{settings['width']}x{settings['height']}, {settings['text_tokens']} text tokens, "
                    f"guidance {settings['guidance']}, {settings['steps']} steps"),
    ]  # fmt: skip
    predictor = method["predictor"]
    if predictor is not None:
        rows.append(("predictor", f"trained on {predictor['num_prompts']} prompts, seed {predictor['seed']}"))
    for level in manifest.programs:
        program = bundle.program(level)
        rows.append((f"level {level}", f"computes {len(program.compute_steps)} of {program.num_steps} steps"))
        rows.append(("", schedule_strip(program)))
        rows.append(("", f"{program.capacity} slots, {_slot_bytes(bundle, program) / 1e6:.2f} MB a sample"))
    for target in manifest.targets:
        rows.append(("target", f"{target.backend} {target.version}, {target.os}, {target.precision}, {target.shape_bucket}"))
        for name, artifact in target.engines.items():
            rows.append((f"  {name}", f"{artifact.path}, {manifest.files[artifact.path]['bytes'] / 1e6:.2f} MB"))
    total = sum(entry["bytes"] for entry in manifest.files.values())
    rows.append(("size", f"{total / 1e6:.1f} MB in {len(manifest.files)} files, all hashes match"))
    return rows


def schedule_strip(program: Program) -> str:
    """One character a step: # computed, · forecast."""
    computed = set(program.compute_steps)
    return "".join("#" if step in computed else "·" for step in range(program.num_steps))


def _slot_bytes(bundle: Bundle, program: Program) -> int:
    feature = bundle.target.engines["compute"].signature.output("feature")
    size = 4 if feature.dtype == "float32" else 2
    for dim in feature.resolve({"batch": 1}):
        size *= dim
    return size * program.capacity
