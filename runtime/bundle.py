"""Bundles: the directory that ``cachec compile`` writes and a session is opened from.

``manifest.json`` names every other file with its size and SHA-256. Files are named by their hash and the manifest is
replaced last, so a directory is a bundle from that moment on and never half of one.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load_file

from cachec.runtime.checked_files import check_file
from cachec.runtime.errors import BundleError, InputError, in_one_line, shortened, unknown_name
from cachec.runtime.files import reason_of
from cachec.runtime.forms import ANY, Form, check_form
from cachec.runtime.program import Program
from cachec.runtime.specs import Array, Signature
from cachec.runtime.variants import Variant, find_text, find_variant, name_shapes, read_shapes

log = logging.getLogger(__name__)

FORMAT = "cachec-bundle"
FORMAT_VERSION = 9  # 9: text encoders, tokenizers and decoders beside the transformer; several lengths of texts
MANIFEST = "manifest.json"
ANY_DEVICE = "any"  # of a target whose artifacts are bound to no device


_TENSORS = [{"name": str, "shape": [(int, str)], "dtype": str}]
_LORA = {"name": str, "sha256": str, "scale": float, "part?": str}
_PROGRAMS: Form = {ANY: {"json": str, "arrays": str}}
_TARGET: Form = {
    **dict.fromkeys(("backend", "version", "os", "device", "precision", "shape_bucket"), str),
    "engines": {ANY: {"path": str, "signature": {"inputs": _TENSORS, "outputs": _TENSORS}}},
    "needs?": {"sm?": [int]},
    "sizes?": {ANY: [int]},
    "weights?": {ANY: str},
    "added?": {ANY: {ANY: str}},
}
_TOKENS = {"tokenizer": str, "file": str, "ids": str, "mask": str, "length": int, "pad": int, "before": str, "after": str,
           "special": bool, "cleaning": [str], "tells": (str, type(None)), "told_length": int, "blank": bool}  # fmt: skip
_PICTURES: Form = {
    "texts?": {ANY: {"tokens": [_TOKENS], "graphs": {ANY: str}}},
    "embedded?": {ANY: float},
    "scale?": str,
    "decoder?": str,
    "encoder?": str,
    "classes?": {"condition": str, "names": {ANY: int}, "nothing": int},
}
_SCALES: Form = {"guidance": (float, int), "true_cfg_scale": (float, int)}  # settings of what makes pictures of prompts
_FORM: Form = {  # of a manifest
    "model": {"name": str, "source": str, "weights_sha256": str, "credit?": str, "plain_sha256?": str, "loras?": [_LORA]},
    "io": {"latents": str, "timestep": str, "conditions": [str], "guidance?": str, "text?": [str]},
    "method": {"name": str},
    "settings": {"width": int, "height": int, "steps": int, "frames?": int, "text_tokens?": int, "shorter_texts?": [int]},
    "noise": str,
    "targets": [_TARGET],
    "programs": _PROGRAMS,
    "weights?": {ANY: {"weights_sha256": str, "file": str, "loras": [_LORA], "samples": {ANY: str}}},
    "shapes?": {ANY: {"axes": {ANY: int}, "tables?": str}},
    "more?": [{"settings": {"width": int, "height": int, "steps": int, "frames?": int}, "programs": _PROGRAMS, "facts": {}}],
    "components?": {ANY: {"targets": [_TARGET], "memory": {ANY: {"weights": int, "activations": int}}}},
    "pictures?": _PICTURES,
    "files": {ANY: {"bytes": int, "sha256": str}},
    "facts?": {},
    "timing?": {ANY: str},
}


@dataclass(frozen=True)
class Artifact:
    """An engine file and its signature."""

    path: str
    signature: Signature

    def to_json(self) -> dict[str, Any]:
        return {"path": self.path, "signature": self.signature.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Artifact":
        return cls(data["path"], Signature.from_json(data["signature"]))


@dataclass(frozen=True)
class Target:
    """Where a set of engines runs: back end with its version, operating system, device, precision and shape bucket.

    ``device`` is the kind, ``cpu`` or ``cuda``, that the artifacts were built for, or ``any``. ``needs`` is what else the
    machine must have, in words of the back end. ``sizes`` are the least, usual and most of symbolic sizes; what is not
    listed may be any. ``weights`` names, by engine, the file whose weights go into an engine without, or in place of its own;
    ``added`` has the same for each of the bundle's further weights, by their name, of engines that they change.
    """

    backend: str
    version: str
    os: str
    device: str
    precision: str
    shape_bucket: str
    engines: Mapping[str, Artifact]
    needs: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)
    added: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def __str__(self) -> str:
        """In short, as ``tensorrt 11.0.0.114, linux, cuda sm_90, bfloat16``."""
        device = "any device" if self.device == ANY_DEVICE else self.device
        gpus = "".join(f" sm_{sm}" for sm in self.needs.get("sm", ()))
        return f"{self.backend} {self.version}, {self.os}, {device}{gpus}, {self.precision}"

    @property
    def picture_sizes(self) -> tuple[str, ...]:
        """Width and height, and of a video the number of frames, ``832x480x81``; of all sizes that the engines are for."""
        return read_shapes(self.shape_bucket)[0]

    @property
    def texts(self) -> tuple[int, ...]:
        """Lengths of texts that the engines are for; none if that is not said."""
        return read_shapes(self.shape_bucket)[1]

    def takes(self, size: str, text: int | None) -> bool:
        """Are the engines for this size of pictures and length of texts?"""
        return size in self.picture_sizes and (text is None or not self.texts or text in self.texts)

    def at(self, size: str, text: int | None, axes: Mapping[str, int]) -> "Target":
        """As it is for one of its sizes and lengths of texts, at which axes of a name are so long."""
        engines = {name: Artifact(one.path, one.signature.at(axes)) for name, one in self.engines.items()}
        name = size if text is None or not self.texts else name_shapes([size], [text])
        return replace(self, shape_bucket=name, engines=engines)

    def is_like(self, other: "Target") -> bool:
        """Do both run in the same places, so that one replaces the other?"""
        return all(
            getattr(self, k) == getattr(other, k)
            for k in ("backend", "version", "os", "device", "precision", "shape_bucket", "needs")
        )

    def with_weights(self, name: str) -> "Target":
        """With further weights in place of its own."""
        return replace(self, weights={**self.weights, **self.added[name]}, added={})

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "engines": {name: a.to_json() for name, a in self.engines.items()}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Target":
        engines = {name: Artifact.from_json(a) for name, a in data["engines"].items()}
        return cls(**{**data, "engines": engines})


@dataclass(frozen=True)
class Manifest:
    """The facts of a bundle.

    ``model`` says which weights (name, source, hash), ``io`` which engine input plays which part (latents, timestep,
    conditions), ``method`` how forecasts are made, ``settings`` what was asked for, ``programs`` maps a level to its two
    files, ``files`` maps each file to its size in bytes and SHA-256. ``weights`` are further ones for the same graphs, by name:
    what is fused in them, and what pipelines are compared with. ``timing`` names files with kernel timings, which make
    the next build quicker. All of it is of the bundle's first size and number of steps; ``more`` says what differs for each of
    the others. There are targets for each size and length of texts (``settings["shorter_texts"]`` are those besides
    ``text_tokens``); or one set of engines serves all, and ``shapes`` says of each (``name_shapes``) how long its ``axes`` are,
    and which file has the ``tables`` that engines read. ``components`` make conditions of prompts and pictures of
    latents, and ``pictures`` says how (``runtime/components.py``); without them that is the pipeline's work.
    """

    model: Mapping[str, Any]
    io: Mapping[str, Any]
    method: Mapping[str, Any]
    settings: Mapping[str, Any]
    noise: str
    targets: tuple[Target, ...]
    programs: Mapping[str, Mapping[str, str]]
    files: Mapping[str, Mapping[str, Any]]
    facts: Mapping[str, Any] = field(default_factory=dict)
    timing: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    shapes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    components: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    pictures: Mapping[str, Any] = field(default_factory=dict)
    more: tuple[Variant, ...] = ()

    @property
    def variants(self) -> tuple[Variant, ...]:
        """Every size with every number of steps, the first first."""
        return Variant(self.settings, self.programs, self.facts), *self.more

    @property
    def sizes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(one.size for one in self.variants))

    @property
    def step_counts(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(one.steps for one in self.variants))

    @property
    def texts(self) -> tuple[int, ...]:
        """The lengths of texts, the longest last; all programs are for all of them."""
        longest = self.settings.get("text_tokens")
        return () if longest is None else (*self.settings.get("shorter_texts", ()), longest)

    def at(self, size: str | None = None, steps: int | None = None, text: int | None = None) -> "Manifest":
        """The manifest of a bundle for this size, number of steps and length of texts alone.

        ``None`` is what comes first, and the longest text.

        Raises:
            InputError: the bundle lacks it; with what there is.
        """
        if (size, steps, text) == (None, None, None) and not self.more and len(self.texts) < 2:
            return self
        one, length = self.variants[find_variant(self.variants, size, steps)], None
        settings, facts = {**self.settings, **one.settings}, {**self.facts, **one.facts}
        if self.texts:
            settings |= {"text_tokens": (length := find_text(self.texts, text)), "shorter_texts": []}
        place = one.size if length is None else name_shapes([one.size], [length])
        shapes = {place: self.shapes[place]} if place in self.shapes else {}
        axes = shapes[place]["axes"] if shapes else {}
        targets = tuple(target.at(one.size, length, axes) for target in self.targets if target.takes(one.size, length))
        return replace(self, settings=settings, programs=one.programs, facts=facts, targets=targets, shapes=shapes, more=())

    def with_weights(self, name: str) -> "Manifest":
        """As if the bundle had been compiled with its further weights ``name``; targets that have not got them are left out.

        Raises:
            InputError: the bundle lacks them; with what there is.
        """
        if not self.weights:
            raise InputError(
                f"the bundle has no further weights, so none called {shortened(name)}: cachec add-weights adds some"
            )
        if name not in self.weights:
            raise unknown_name("weights", name, self.weights)
        facts, other = dict(self.facts), self.weights[name]
        if pipeline := facts.get("pipeline"):
            facts["pipeline"] = {**pipeline, "weights": other["samples"]}
        model = {**self.model, "weights_sha256": other["weights_sha256"], "loras": other["loras"]}
        targets = tuple(one.with_weights(name) for one in self.targets if name in one.added)
        return replace(self, model=model, facts=facts, targets=targets, weights={})

    def with_programs(
        self, programs: Mapping[str, Mapping[str, str]], levels: Mapping[str, Any], size: str | None, steps: int | None
    ) -> "Manifest":
        """With these files by level, and these facts of ``levels``, for one size and number of steps."""
        place = find_variant(self.variants, size, steps) if self.more else 0
        one = self.variants[place]
        new = Variant(one.settings, programs, {**one.facts, "levels": levels})
        if not place:
            return replace(self, programs=new.programs, facts=new.facts)
        return replace(self, more=(*self.more[: place - 1], new, *self.more[place:]))

    def to_json(self) -> dict[str, Any]:
        body = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            **{k: v for k, v in vars(self).items() if k not in ("targets", "more")},
            "targets": [t.to_json() for t in self.targets],
            "more": [dict(vars(one)) for one in self.more],
        }
        return {**body, "digest": _digest(body)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Manifest":
        body = {k: v for k, v in data.items() if k != "digest"}
        if body.get("format") != FORMAT:
            raise BundleError(f"{MANIFEST} is not the manifest of a cachec bundle")
        if body.get("format_version") != FORMAT_VERSION:
            version = shortened(body.get("format_version"))
            raise BundleError(
                f"bundle format {version} is not the one that this cachec reads ({FORMAT_VERSION}): "
                "install the cachec that wrote it, or compile the bundle again"
            )
        if data.get("digest") != _digest(body):
            raise BundleError(f"{MANIFEST} was altered or damaged: compile the bundle again, or fetch a fresh copy")
        check_form(body, _FORM, "the manifest", "compile the bundle again")
        if body.get("pictures"):
            others = ((f".more[{at}]", one["settings"]) for at, one in enumerate(body.get("more", ())))
            for place, settings in (("", body["settings"]), *others):
                for form in (_SCALES, {"text_tokens": int} if "texts" in body["pictures"] else {}):
                    check_form(settings, form, f"the manifest{place}.settings", "compile the bundle again")
        for what in ("targets", "files", "programs"):
            if not body[what]:
                raise BundleError(f"the manifest lists no {what}: nothing in the bundle can be run. Compile it again")
        _ = [Target.from_json(one) for part in body.get("components", {}).values() for one in part["targets"]]  # do they read?
        fields = {k: v for k, v in body.items() if k not in ("format", "format_version")}
        more = tuple(Variant(one["settings"], one["programs"], one["facts"]) for one in fields.get("more", ()))
        return cls(**{**fields, "targets": tuple(Target.from_json(t) for t in fields["targets"]), "more": more})


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Bundle:
    """An opened, checked bundle."""

    root: Path
    manifest: Manifest

    @classmethod
    def open(cls, root: Path, *, verify: bool = False) -> "Bundle":
        """Open and check the bundle at ``root``; ``verify`` hashes large files even if they were hashed before.

        Raises:
            BundleError: it is not a bundle, damaged, incomplete, unsafe, or of another format version.
        """
        bundle = cls(root, cls.read_manifest(root))
        for name, entry in bundle.manifest.files.items():
            check_file(bundle.path(name), entry, verify=verify)
        return bundle

    def at(self, size: str | None = None, steps: int | None = None, text: int | None = None) -> "Bundle":
        """As if it had been compiled for this size, number of steps and length of texts alone; as :meth:`Manifest.at`.

        Raises:
            InputError: the bundle lacks it; with what there is.
        """
        return Bundle(self.root, self.manifest.at(size, steps, text))

    @property
    def places(self) -> "tuple[Bundle, ...]":
        """It at each size with each length of texts, the first size with the longest text first."""
        return tuple(
            self.at(size, text=text) for size in self.manifest.sizes for text in (self.manifest.texts[::-1] or (None,))
        )

    def path(self, name: str) -> Path:
        """The file ``name`` of the manifest.

        The name lies inside the bundle; the file may be a link to elsewhere, as in the Hugging Face Hub's cache, for its
        content is checked by its hash.
        """
        if not is_inside(name):
            raise BundleError(f"manifest names {shortened(name)}, which leaves the bundle: do not trust this bundle")
        if name not in self.manifest.files:
            raise BundleError(f"{shortened(name)} is used by the bundle but not listed with a hash: compile it again")
        return self.root.joinpath(*PurePosixPath(name).parts)

    def program(self, level: str = "default") -> Program:
        """The program of a quality level."""
        if level not in self.manifest.programs:
            raise unknown_name("level", level, self.manifest.programs)
        files = {what: self.path(name) for what, name in self.manifest.programs[level].items()}
        try:
            data, arrays = json.loads(files["json"].read_text(encoding="utf-8")), load_file(files["arrays"])
        except (OSError, ValueError, RecursionError, SafetensorError) as error:
            raise BundleError(f"the program of level {shortened(level)} cannot be read: {reason_of(error)}") from error
        return Program.from_json(data, arrays)

    def tables(self) -> dict[str, Array]:
        """What engines for several sizes read at the bundle's own; bfloat16 as its bits, in uint16."""
        files = [shape["tables"] for shape in self.manifest.shapes.values() if "tables" in shape]
        return {name: table for file in files for name, table in _read_arrays(self.path(file)).items()}

    @property
    def target(self) -> Target:
        """The first target. All of a size have the same graphs, so that names and shapes can be read off any."""
        return self.manifest.targets[0]

    @staticmethod
    def read_manifest(root: Path) -> Manifest:
        """The manifest alone; its files are not looked at."""
        return _read_manifest(root)


def _read_arrays(path: Path) -> dict[str, Array]:
    try:
        return load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise BundleError(f"{in_one_line(path, 300)} cannot be read: {reason_of(error)}") from error


def is_inside(name: str) -> bool:
    """Is ``name`` the name of a file in a bundle, on every system: relative, without ``..``, drives and backslashes?"""
    pure = PurePosixPath(name)
    return bool(pure.parts) and not (pure.is_absolute() or ".." in pure.parts or any(c in name for c in "\\:\0"))


def _read_manifest(root: Path) -> Manifest:
    path = root / MANIFEST
    if not root.is_dir():
        raise BundleError(f"there is no bundle at {root}" + (": it is a file" if root.exists() else ""))
    if not path.is_file():
        raise BundleError(f"{root} is not a bundle: it has no {MANIFEST} (an interrupted build leaves none)")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise BundleError(f"{path} is not a JSON object")
        return Manifest.from_json(data)
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {reason_of(error)}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(f"{path} does not read as a manifest ({in_one_line(error)}): compile the bundle again") from error
