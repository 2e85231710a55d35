"""``cachec add-weights``: weights with LoRAs fused, beside a bundle's own, over the same graphs.

Only the tensors that are changed are written. Levels and what was measured of them stay those of the bundle's own weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from cachec.compiler.models import find_model, load_model
from cachec.compiler.models.base import LoadedModel, settings_of
from cachec.compiler.models.lora_files import LoraFile, parse_loras
from cachec.compiler.options import GraphWish
from cachec.engines import get_engine, no_other_weights
from cachec.engines.targets import ONNX_TARGET
from cachec.runtime.abi import FORECAST
from cachec.runtime.bundle import Bundle, Manifest, Target
from cachec.runtime.engine import CONSTANTS, ONNX
from cachec.runtime.errors import BundleError, InputError, MissingExtraError, OutputError, need
from cachec.runtime.inspect import describe_weights
from cachec.runtime.plan import weighs_rows
from cachec.runtime.variants import label_of_shapes, name_shapes
from cachec.runtime.work import claim_work, remove_work
from cachec.runtime.write import BundleAdder

if TYPE_CHECKING:
    from cachec.compiler.graphs.export import EnginePlan
    from cachec.engines.changed_weights import Graph


def add_weights(
    root: Path, loras: Sequence[str], *, name: str | None = None, source: str | None = None, force: bool = False
) -> list[tuple[str, str]]:
    """Add weights to the bundle at ``root``: those of its model with ``loras`` (``FILE[:SCALE]``) fused.

    ``name`` is by default made of the files' names. ``source``: the model, by default as the bundle names it. The bundle is as
    it was if that fails. Returns the rows of a short table.

    Raises:
        InputError: a LoRA does not fit; the bundle's graphs depend on more than weights; or the model is another.
        OutputError: the bundle has weights of this name and ``force`` is not given, or it cannot be written.
        BundleError: its graphs are not those that this version makes.
    """
    files = parse_loras(loras)
    if not files:
        raise InputError("nothing is asked for: give --lora FILE.safetensors")
    name = _name(files) if name is None else name
    with BundleAdder(root) as writer:
        manifest = writer.bundle.manifest
        forms = check_bundle(root, manifest, name, force=force)
        need("torch", "diffusers", "transformers", "onnx_ir", extra="compile", purpose="adding weights")
        model = load_model(find_model(source or manifest.model["source"]), loras=files)
        with model.hashing_weights():
            _check_model(model, manifest)
            new = _written(model, writer, forms, name)
        writer.commit(new)
    return [("bundle", str(root)), *describe_weights(Bundle.open(root), only=name), *_left_out(manifest.targets, forms)]


def _name(files: Sequence[LoraFile]) -> str:
    """Of the files' names, without what a name cannot have."""
    stems = "-".join(file.path.stem for file in files)
    return "".join(letter if letter.isalnum() else "-" for letter in stems).strip("-")


def check_bundle(root: Path, manifest: Manifest, name: str, *, force: bool) -> dict[str, str | None]:
    """In what form each target of the bundle takes other weights.

    Raises:
        CachecError: nothing can be added.
    """
    if not name.replace("-", "").replace("_", "").isalnum():
        raise InputError(f"weights {name!r} is not a name: use letters, digits, - and _")
    if name in manifest.weights and not force:
        raise OutputError(f"{root} has weights {name} already: pass --force to replace them, or another --name")
    if loras := manifest.model.get("loras"):
        raise InputError(f"{root} was compiled with {loras[0]['name']} fused: compile it without, and add every mix of LoRAs "
                         "as weights of its own")  # fmt: skip
    if manifest.method["fold"] != "static":
        raise InputError("the bundle was compiled with --fold none, so its graphs have a predictor of the old weights: compile "
                         "the model with --lora")  # fmt: skip
    forms = {str(target): _form(target) for target in manifest.targets}
    if not any(forms.values()):
        target = manifest.targets[0]
        raise InputError(f"{target} takes no other weights: {no_other_weights(target.backend)}")
    return forms


def _form(target: Target) -> str | None:
    try:
        return get_engine(target.backend).weights_form(target.needs)
    except MissingExtraError as error:
        raise MissingExtraError(f"{error}, which the bundle's target {target.backend} is for") from error


def _check_model(model: LoadedModel, manifest: Manifest) -> None:
    if model.plain_hash != manifest.model["weights_sha256"]:
        raise InputError(
            f"{model.spec.source} has other weights than the bundle was compiled from: pass the right one with --model"
        )


def _written(model: LoadedModel, writer: BundleAdder, forms: Mapping[str, str | None], name: str) -> Manifest:
    """The manifest with the new weights, whose files ``writer`` collects."""
    from cachec.compiler.graphs.build_engines import unfinished_weights
    from cachec.compiler.graphs.weights import Values
    from cachec.compiler.handed import samples_of
    from cachec.compiler.parts import work_folder
    from cachec.engines.changed_weights import write_changed

    manifest, work = writer.bundle.manifest, work_folder(writer.out, f"weights-{name}")
    graphs = _all_graphs(model, writer.bundle)
    with claim_work(work, "weights file"):
        changed = write_changed(
            graphs, writer.directory(_place(manifest)), Values(), unfinished_weights(model, work),
            constants=CONSTANTS in forms.values(), tag=name,
        )  # fmt: skip
    remove_work(work)
    files = {ONNX: _sealed(writer, changed.onnx), CONSTANTS: _sealed(writer, changed.constants)}
    known: dict[str, Any] = {
        "weights_sha256": model.weights_hash,
        "loras": [dict(one) for one in model.loras],
        "file": writer.seal(changed.weights, changed.weights_sha256),
        "samples": {},
    }
    if manifest.facts.get("pipeline"):
        known["samples"] = samples_of(model, writer, name)
    targets = [_with_added(manifest, one, name, files.get(forms[str(one)] or "")) for one in manifest.targets]
    new = replace(manifest, targets=tuple(targets), weights={**manifest.weights, name: known})
    gone = _files_of(manifest, name) - _files_of(new, name)
    return replace(new, files={file: entry for file, entry in writer.files.items() if file not in gone})


def _all_graphs(model: LoadedModel, bundle: Bundle) -> "dict[str, Graph]":
    """The graphs of every size, by label, as they are made of ``model``.

    Raises:
        BundleError: the bundle's take or give something else.
    """
    from cachec.compiler.graphs.shared import share_plans

    sizes = bundle.places
    plans = [_plans(model, one) for one in sizes]
    if not bundle.manifest.shapes:
        return {
            label: one for there, some in zip(sizes, plans, strict=True) for label, one in _graphs(model, there, some).items()
        }
    return _graphs(model, bundle, share_plans(plans, compare=False).plans)


def _plans(model: LoadedModel, there: Bundle) -> "list[EnginePlan]":
    """The graphs of one size.

    Raises:
        InputError: features are kept in a trained code, which the engines hold.
    """
    from cachec.compiler.frontend import make_plans, usual_graphs
    from cachec.compiler.manifest import OWN_TYPE
    from cachec.compiler.methods import get_method
    from cachec.compiler.methods.base import CodedMethod

    settings, method, engines = settings_of(there.manifest), there.manifest.method, there.target.engines
    slots = None if method["slots"] == OWN_TYPE else method["slots"]
    wish = GraphWish(hoist=method["hoist"], slots=slots, velocities=method["velocities"])
    codes = get_method(method["name"])(**method["options"])
    if isinstance(codes, CodedMethod) and codes.needs_training:
        raise InputError(f"{codes.name} was trained for the weights of this bundle: compile another with --lora")
    by_row = FORECAST in engines and weighs_rows(engines[FORECAST].signature)
    return make_plans(model, settings, usual_graphs(model, settings, wish, method["cut"], codes, by_row=by_row))


def _graphs(model: LoadedModel, there: Bundle, plans: "Sequence[EnginePlan]") -> "dict[str, Graph]":
    from cachec.engines.changed_weights import Graph

    manifest, engines = there.manifest, there.target.engines
    if {plan.name: plan.signature for plan in plans} != {name: one.signature for name, one in engines.items()}:
        raise BundleError(
            f"the graphs that this cachec makes of {model.spec.source} take or give something else than those of {there.root}: "
            "compile the bundle again"
        )
    onnx = next((one.engines for one in manifest.targets if one.backend == ONNX_TARGET.backend), {})
    paths = {name: there.path(artifact.path) for name, artifact in onnx.items()}
    return {
        _label(manifest, there.target, plan.name): Graph(plan.program, plan.signature, paths.get(plan.name)) for plan in plans
    }


def _label(manifest: Manifest, target: Target, graph: str) -> str:
    """Of one set of graphs for all sizes there may be engines for each."""
    all_of_them = name_shapes(manifest.sizes, manifest.texts)
    return f"{graph}-{label_of_shapes(all_of_them if manifest.shapes else target.shape_bucket)}"


def _place(manifest: Manifest) -> str:
    """The folder of the ONNX files, which must lie beside their weights; or a new one."""
    onnx = next((one for one in manifest.targets if one.backend == ONNX_TARGET.backend), None)
    if onnx is None:
        return f"engines/weights-{manifest.targets[0].precision}"
    return str(PurePosixPath(next(iter(onnx.engines.values())).path).parent)


def _sealed(writer: BundleAdder, files: Mapping[str, Path]) -> dict[str, str]:
    return {label: writer.seal(path) for label, path in files.items()}


def _with_added(manifest: Manifest, target: Target, name: str, files: Mapping[str, str] | None) -> Target:
    """A target that has the new weights, if it takes them: ``files`` by label."""
    others = {key: value for key, value in target.added.items() if key != name}
    if files is None:
        return replace(target, added=others)
    labels = {graph: _label(manifest, target, graph) for graph in target.engines}
    own = {graph: files[label] for graph, label in labels.items() if label in files}
    return replace(target, added={**others, name: own})


def _files_of(manifest: Manifest, name: str) -> set[str]:
    """Files that the bundle has for these weights alone."""
    if name not in manifest.weights:
        return set()
    own = manifest.weights[name]
    of_targets = {file for target in manifest.targets for file in target.added.get(name, {}).values()}
    return {own["file"], *own["samples"].values()} | of_targets


def _left_out(targets: Sequence[Target], forms: Mapping[str, str | None]) -> list[tuple[str, str]]:
    """Rows about targets that do not take them."""
    return [("", f"not for {target}: {no_other_weights(target.backend)}") for target in targets if forms[str(target)] is None]
