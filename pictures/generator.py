"""Prompts in, with pictures to begin with or without, pictures out, from a loaded bundle alone: read, encode, denoise, decode.

``B`` samples, ``F`` frames, ``H`` and ``W`` pixels.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from cachec.pictures.beginning import Beginning, check_pictures, start_of
from cachec.pictures.classes import Classes
from cachec.pictures.components import Part
from cachec.pictures.scales import Scales
from cachec.pictures.tokens import TokenFacts, TokenReader, tell_of_loss
from cachec.runtime.abi import BATCH, GUIDANCE, negative_name
from cachec.runtime.components import PictureFacts, TextFacts
from cachec.runtime.errors import BundleError, InputError, NotFiniteError, in_one_line
from cachec.runtime.noise import check_seed, make_noise
from cachec.runtime.session import LoadedBundle, Session
from cachec.runtime.specs import Array

TRANSFORMER = "transformer"


class Generator:
    """Makes pictures with a bundle's own text encoders and decoder; a context manager. For all sizes of the bundle.

    Text encoders and decoder take samples one by one, so that a picture does not depend on what else is asked for, nor the
    memory that they take. ``keep``: the components that stay loaded between requests, by default all; the others are loaded
    for their phase. ``tells``: what long prompts lose is said in the log, with the prompts.

    Raises:
        InputError: the bundle has no text encoders and decoder, or no component of a name in ``keep``.
    """

    def __init__(self, loaded: LoadedBundle, *, keep: Sequence[str] | None = None, tells: bool = True) -> None:
        bundle = loaded.bundle
        manifest = loaded.manifest if bundle is None else bundle.manifest
        self._facts = PictureFacts.of(manifest)
        if bundle is None or loaded.origin is None:
            raise InputError(
                "the bundle's files are not known, so its text encoders cannot be loaded: open it with cachec.load"
            )
        self._loaded, self._bundle, self._origin = loaded, bundle, loaded.origin
        device, threads = loaded.origin.device, loaded.origin.threads
        self._parts = {name: Part(name, bundle, device, threads) for name in manifest.components}
        self._keep = check_keep(keep, self._parts)
        self._readers: dict[str, list[TokenReader]] = {}  # by text length
        self._tells, self._told = tells, set[str]()  # of prompts that are cut, that it was said
        self._session: tuple[tuple[Any, ...], Session] | None = None  # the last one, and what for

    # --- phases

    def encode(self, prompts: Sequence[str], *, guidance: float | None = None) -> dict[str, Array]:
        """Conditions of one branch, batch first; of empty and negative prompts, too.

        ``guidance``: a scale that is a condition itself, by default the bundle's.
        """
        settings = self._loaded.manifest.settings
        text, readers = self._reading(str(self._loaded.texts[-1]))
        if self._tells:
            tell_of_loss(prompts, readers, self._told)
        rows = [self._encode_one(prompt, text, readers) for prompt in prompts]
        found = {name: np.concatenate([row[name] for row in rows]) for name in (rows[0] if rows else ())}
        if self._facts.classes is not None:
            classes = Classes.from_json(self._facts.classes)
            found[classes.condition] = classes.numbers(list(prompts))
        scale = settings["guidance"] if guidance is None else guidance
        for name, factor in self._facts.embedded.items():
            found[name] = np.full(len(prompts), factor * scale, np.float32)
        self._let_go(text.graphs)
        return found

    def _encode_one(self, prompt: str, text: TextFacts, readers: Sequence[TokenReader]) -> dict[str, Array]:
        tokens = {name: array for reader in readers for name, array in reader.read([prompt]).items()}
        found: dict[str, Array] = {}
        for name, engine in text.graphs.items():
            found |= self._parts[name].run(engine, tokens)
        return found

    def _reading(self, length: str) -> tuple[TextFacts, list[TokenReader]]:
        if length not in self._facts.texts:
            raise BundleError(f"the bundle does not say how prompts of {length} text tokens are read: compile it again")
        text = self._facts.texts[length]
        if length not in self._readers:
            self._readers[length] = [
                TokenReader(TokenFacts.from_json(one), self._bundle.path(one["file"])) for one in text.tokens
            ]
        return text, self._readers[length]

    def decode(self, latents: Array, *, size: str | None = None) -> Array:
        """Pictures [B, H, W, 3] or videos [B, F, H, W, 3] of latents [B, …], uint8. ``size``: by default the loaded bundle's.

        Raises:
            NotFiniteError: the decoder gives NaN or infinity.
        """
        made: Array = (self.decoded(latents, size=size) * 255).round().astype(np.uint8)
        return made

    def decoded(self, latents: Array, *, size: str | None = None) -> Array:
        """The same in [0, 1], float32. Raises as :meth:`decode`."""
        return self._each(self._facts.decoder, "latents", latents, size)

    @property
    def takes_pictures(self) -> bool:
        """Can requests begin with pictures?"""
        return self._facts.encoder is not None

    def encode_pictures(self, pictures: Array, *, size: str | None = None) -> Array:
        """Latents [B, …], float32, of pictures [B, H, W, 3], uint8. ``size``: by default the loaded bundle's.

        Raises:
            InputError: the bundle takes no pictures.
            NotFiniteError: the encoder gives NaN or infinity.
        """
        if self._facts.encoder is None:
            raise InputError(
                "the bundle takes no pictures, as it has no encoder of them: where diffusers has a pipeline of its model that "
                "begins with a picture, and the sampler is a flow's, cachec compile --components all makes one"
            )
        return self._each(self._facts.encoder, "pictures", pictures.astype(np.float32) / 255, size)

    def _each(self, name: str, what: str, rows: Array, size: str | None) -> Array:
        """What a component makes of each of some samples."""
        size, part = size or self._loaded.manifest.variants[0].size, self._parts[name]
        if size not in part.engines:
            raise BundleError(
                f"the bundle has no {name} for {size}, but for {in_one_line(', '.join(part.engines))}: compile it again"
            )
        made = np.concatenate([array for row in rows for array in part.run(size, {what: row[None]}).values()])
        self._let_go([name])
        if not np.isfinite(made).all():
            raise NotFiniteError(f"results of {name} at {size} hold NaN or infinity: its precision may be too low")
        return made

    @staticmethod
    def to_png(picture: Array) -> bytes:
        """A picture [H, W, 3] as a PNG file, a video [F, H, W, 3] as an animated one; uint8."""
        from cachec.pictures.files import to_png  # which needs pillow; arrays do not

        return to_png(picture)

    @staticmethod
    def to_mp4(video: Array, fps: float) -> bytes:
        """A video [F, H, W, 3], uint8, as an MP4 file of ``fps`` frames a second."""
        from cachec.pictures.files import to_mp4

        return to_mp4(video, fps)

    def _let_go(self, names: Any) -> None:
        for name in names:
            if name not in self._keep:
                self._parts[name].release()

    # --- whole requests

    def generate(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int] | None = None,
        level: str | None = None,
        guidance: float | None = None,
        true_cfg_scale: float | None = None,
        negative_prompts: Sequence[str] | None = None,
        pictures: Array | None = None,
        strength: float | None = None,
        size: str | None = None,
        steps: int | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> Array:
        """Pictures [B, H, W, 3] or videos [B, F, H, W, 3] of prompts, uint8. Arguments as of ``LoadedBundle.generate``.

        Raises:
            InputError: the bundle cannot do what is asked for.
        """
        seeds = list(range(len(prompts))) if seeds is None else seeds
        _check_counts(prompts, seeds, negative_prompts)
        if sigmas is not None and steps not in (None, len(sigmas)):
            raise InputError(f"steps is {steps}, and sigmas are {len(sigmas)}: leave steps out")
        loaded = self._loaded.at(size, steps) if sigmas is None else self._loaded.at(size).with_sigmas(sigmas)
        begin = self.begin(loaded, pictures, strength, len(prompts))
        scales = Scales.of(loaded, guidance=guidance, true=true_cfg_scale, negative=negative_prompts is not None)
        encoded = self.conditions(prompts, loaded.conditions(level), scales, negative_prompts)
        there, conditions = loaded.fitted(encoded)
        latents = self._denoise(there, there.check_level(level), conditions, seeds, begin)
        return self.decode(latents, size=loaded.manifest.variants[0].size)

    def begin(self, loaded: LoadedBundle, pictures: Array | None, strength: float | None, count: int) -> Beginning:
        """Where ``count`` samples begin, at the size and steps of ``loaded``; ``None`` as ``pictures`` is with noise alone.

        Raises:
            InputError: the bundle takes no such pictures, or there is no such strength.
        """
        if pictures is None:
            if strength is not None:
                raise InputError(f"strength is {strength:g}, which is how far a picture is changed: give pictures, too")
            return Beginning()
        (own,) = loaded.manifest.variants
        start = start_of(strength, own.steps)
        check_pictures(pictures, own.size, count)
        return Beginning(start, self.encode_pictures(pictures, size=own.size))

    def _denoise(
        self, loaded: LoadedBundle, level: str, conditions: Mapping[str, Array], seeds: Sequence[int], begin: Beginning
    ) -> Array:
        session = self._session_for(loaded, level, len(seeds), begin.start)
        noise = np.stack([make_noise(seed, session.latent_shape[1:]) for seed in seeds])
        latents = run_in_batches(session, conditions, begin.mixed(noise, session.program.sigmas))
        if TRANSFORMER not in self._keep:
            self._session = None
            self._origin.release()
        return latents

    def _session_for(self, loaded: LoadedBundle, level: str, wanted: int, start: int) -> Session:
        """A session for up to ``wanted`` samples at once: the last one, if it is like that."""
        key = loaded.programs[level].key
        rows = 2 if key.guided else 1
        most = loaded.target.sizes.get(BATCH, (rows * wanted,))[-1] // rows
        batch = key.batch or max(1, min(wanted, most))
        what = (loaded.target.shape_bucket, key.sigmas_hash, level, batch, start)
        if self._session is None or self._session[0] != what:
            self._session = None  # its memory goes first
            self._session = what, loaded.session(batch=batch, level=level, start=start)
        return self._session[1]

    def conditions(
        self, prompts: Sequence[str], names: Sequence[str], scales: Scales, negatives: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """Conditions of whole requests, batch first: those of ``names``. ``negatives``: by default no text."""
        guided = any(negative_name(name) in names for name in self._loaded.io.conditions)
        others = list(negatives or [""] * len(prompts)) if guided else []
        both = self.encode([*prompts, *others], guidance=scales.guidance)  # at once: encoders may be loaded for it
        found = {name: value[: len(prompts)] for name, value in both.items()}
        found |= {negative_name(name): value[len(prompts) :] for name, value in both.items()}
        found[GUIDANCE] = np.full(len(prompts), scales.of_branches(self._facts.scale), np.float32)
        if missing := [name for name in names if name not in found]:
            raise BundleError(f"nothing in the bundle makes {in_one_line(', '.join(missing))} of prompts: compile it again")
        return {name: found[name] for name in names}

    def close(self) -> None:
        """Let go of text encoders and decoder; the bundle's other engines are the bundle's."""
        self._session = None
        for part in self._parts.values():
            part.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def run_in_batches(session: Session, conditions: Mapping[str, Array], noise: Array) -> Array:
    """Latents of any number of samples, by a session of some batch; the last ones are repeated where there are too few."""
    batch, made = session.latent_shape[0], list[Array]()
    for begin in range(0, len(noise), batch):
        rows = np.minimum(np.arange(begin, begin + batch), len(noise) - 1)
        latents: Array = session.run(
            {name: np.ascontiguousarray(value[rows]) for name, value in conditions.items()}, noise[rows]
        )
        made.append(latents[: len(noise) - begin])
    return np.concatenate(made)


def check_keep(keep: Sequence[str] | None, parts: Mapping[str, Part]) -> frozenset[str]:
    """The components that stay loaded.

    Raises:
        InputError: there is no such component.
    """
    known = {TRANSFORMER, *parts}
    if strange := sorted(set(keep or ()) - known):
        raise InputError(f"keep names {strange[0]}, which is none of the bundle's components: {', '.join(sorted(known))}")
    return frozenset(known if keep is None else keep)


def _check_counts(prompts: Sequence[str], seeds: Sequence[int], negatives: Sequence[str] | None) -> None:
    if isinstance(prompts, str) or not prompts:
        raise InputError("prompts must be a list with at least one text")
    for what, several in (("seeds", seeds), ("negative_prompts", negatives)):
        if several is not None and len(several) != len(prompts):
            raise InputError(f"there are {len(several)} {what} for {len(prompts)} prompts: give one for each")
    for seed in seeds:
        check_seed(seed)
