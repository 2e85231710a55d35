"""A bundle that is served: what requests may choose in it, and what they get when they choose something else."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cachec.pictures.beginning import Beginning, start_of
from cachec.pictures.cleaning import check_characters
from cachec.pictures.files import read_picture
from cachec.pictures.scales import Scales
from cachec.runtime.components import FRAMES_A_SECOND
from cachec.runtime.errors import InputError
from cachec.runtime.host_memory import peak_memory
from cachec.runtime.lanes import Lanes
from cachec.runtime.noise import NUM_SEEDS, make_noise
from cachec.runtime.program import UNCACHED, Program
from cachec.runtime.session import LoadedBundle
from cachec.runtime.specs import Array
from cachec.runtime.variants import PictureSize, find_variant
from cachec.serving.limits import STRENGTHS, Limits
from cachec.serving.refusals import Refused
from cachec.serving.wishes import FASTEST, SLOWEST, Common, EditWish, ImageWish, VideoWish

EXACT = ("exact", "lossless", "extra-high")  # sglang's names for results without approximation; the last two are one to it
AUTO = "auto"
EMBEDDED = "guidance"  # the condition of models that take their guidance scale as an input


class Pictures(Protocol):
    """Text to conditions and latents to pictures, as ``cachec.pictures.generator.Generator`` makes them."""

    def conditions(
        self, prompts: Sequence[str], names: Sequence[str], scales: Scales, negatives: Sequence[str] | None = None
    ) -> Mapping[str, Array]:
        """Conditions of whole requests, batch first: those of ``names``."""

    @property
    def takes_pictures(self) -> bool:
        """Can requests begin with pictures?"""

    def encode_pictures(self, pictures: Array, *, size: str | None = None) -> Array:
        """Latents of pictures [B, H, W, 3], uint8."""

    def decode(self, latents: Array, *, size: str | None = None) -> Array:
        """uint8 [B, H, W, 3], of videos [B, frames, H, W, 3]."""

    def to_png(self, picture: Array) -> bytes:
        """A file of one picture [H, W, 3]."""

    def to_mp4(self, frames: Array, fps: float) -> bytes:
        """A file of one video [frames, H, W, 3]."""

    def close(self) -> None:
        """Let go of its engines."""


@dataclass(frozen=True)
class Choice:
    """What a request comes to: a program of the bundle, and what is handed to it."""

    size: str
    steps: int
    level: str
    seeds: tuple[int, ...]
    prompt: str
    negative: str
    guidance: float | None
    true_cfg_scale: float | None
    deadline: float | None
    fps: float
    start: int = 0
    picture: Array | None = field(default=None, repr=False)


class Served:
    """``name`` is what requests call it, ``pictures`` its text encoders and decoder, ``lanes`` how many samples run at once.

    ``strengths``: how far requests may have a picture changed, beside 1, which is all of it. ``in_turns``: all its engines want
    the same cores, so that they had better not run at once.
    """

    def __init__(
        self,
        name: str,
        loaded: LoadedBundle,
        pictures: Pictures,
        *,
        lanes: int = 8,
        strengths: Sequence[float] = STRENGTHS,
        in_turns: bool = False,
        **options: Any,
    ) -> None:
        self.name, self.loaded, self.num_lanes, self.in_turns = name, loaded, lanes, in_turns
        self.created = int(time.time())
        self.pictures = pictures
        there = loaded.manifest if loaded.bundle is None else loaded.bundle.manifest
        self.variants = there.variants
        self._at = {(one.size, one.steps): loaded.at(one.size, one.steps) for one in self.variants}
        steps = {one.steps for one in self.variants} if pictures.takes_pictures else set[int]()
        self._strengths = (*strengths, 1.0)
        starts = {start_of(strength, count) for count in steps for strength in self._strengths}
        self.lanes = Lanes(loaded, lanes=lanes, sizes=there.sizes, starts=sorted(starts), **options)
        self.seconds = dict[str, float]()  # that encoding and decoding take, as measured when it was warmed up

    @property
    def is_video(self) -> bool:
        return any(PictureSize.parse(one.size).frames > 1 for one in self.variants)

    def check_kind(self, *, video: bool) -> None:
        """Raise ``Refused`` unless it makes videos, or pictures."""
        if self.is_video != video:
            makes, where = ("videos", "/v1/videos") if self.is_video else ("pictures", "/v1/images/generations")
            raise Refused(400, f"{self.name} makes {makes}: post to {where}", code="unsupported", param="model")

    @property
    def peak_memory_mb(self) -> float | None:
        """MiB: the most that this process has had; ``None`` on a GPU, where nobody counts what is this process's."""
        on_gpu = next(iter(self.loaded.engines.values())).device.beside_host
        peak = None if on_gpu else peak_memory()
        return None if peak is None else peak / 2**20

    @property
    def levels(self) -> list[str]:
        return list(dict.fromkeys(level for one in self.variants for level in one.programs))

    def program(self, choice: Choice) -> Program:
        return self._at[choice.size, choice.steps].programs[choice.level]

    def close(self) -> None:
        """Let go of its engines."""
        self.pictures.close()
        self.loaded.close()

    def warm_up(self) -> None:
        """Encode and decode once, so that no request pays for what happens the first time; and time it."""
        first, shape = self.variants[0], self.loaded.session().latent_shape
        for _ in range(2):
            begun = time.perf_counter()
            self.conditions(
                Choice(first.size, first.steps, self.loaded.default_level, (0,), "", "", None, None, None, FRAMES_A_SECOND)
            )
            encoded = time.perf_counter()
            made = self.pictures.decode(np.zeros((1, *shape[1:]), np.float32))
            self._to_file(made[0], FRAMES_A_SECOND)
            self.seconds = {"encode": encoded - begun, "decode": time.perf_counter() - encoded}
            if self.pictures.takes_pictures:
                self.pictures.encode_pictures(made)

    def read_picture(self, wish: EditWish) -> Array:
        """The picture of a request [H, W, 3], of one of the bundle's sizes. Raises ``Refused`` if it is none."""
        if not self.pictures.takes_pictures:
            raise Refused(400, f"{self.name} takes no pictures, as it has no encoder of them", code="not_in_bundle",
                          param="image")  # fmt: skip
        try:
            return read_picture(wish.image, list(dict.fromkeys(one.size for one in self.variants)))
        except InputError as error:
            raise Refused(400, str(error), code="invalid_value", param="image") from error

    def choose(self, wish: Common, limits: Limits, draw: Callable[[], int], picture: Array | None = None) -> Choice:
        """What a request comes to; ``draw`` gives a seed where it has none. ``picture``: as :meth:`read_picture`.

        Raises:
            Refused: the bundle has nothing of the kind, with what it has; or a limit is exceeded.
        """
        self._check_text(wish, limits)
        size, steps = self._variant(wish, picture)
        level = self._level(wish.quality, self._at[size, steps])
        count = wish.n if isinstance(wish, ImageWish) else 1
        if count > (most := min(limits.samples, limits.queue + self.num_lanes)):
            raise Refused(400, f"n is {count}; this server makes up to {most} a request", code="too_many", param="n")
        shape = PictureSize.parse(size)
        if (pixels := count * shape.width * shape.height * shape.frames) > limits.pixels:
            raise Refused(400, f"the request has {pixels} pixels; this server makes up to {limits.pixels}: ask for fewer or "
                          "smaller pictures", code="too_many", param="size")  # fmt: skip
        choice = Choice(
            size,
            steps,
            level,
            _seeds(wish.seed, count, draw),
            wish.prompt,
            wish.negative_prompt or "",
            wish.guidance_scale,
            wish.true_cfg_scale,
            wish.deadline,
            _fps(wish, shape.frames),
            start_of(wish.strength, steps) if isinstance(wish, EditWish) else 0,
            picture,
        )
        self._check_start(choice)
        self._check_guidance(choice)
        self._check_deadline(choice)
        return choice

    def _check_text(self, wish: Common, limits: Limits) -> None:
        if not wish.prompt.strip():
            raise Refused(400, "the prompt is empty: say what is to be seen", code="invalid_value", param="prompt")
        for name in ("prompt", "negative_prompt"):
            text = getattr(wish, name)
            try:
                check_characters(text or "")
            except InputError as error:
                raise Refused(400, f"{name}: {error}", code="invalid_value", param=name) from error
            if text is not None and len(text) > limits.prompt:
                raise Refused(400, f"{name} has {len(text)} characters; this server takes up to {limits.prompt}",
                              code="too_long", param=name)  # fmt: skip

    def _variant(self, wish: Common, picture: Array | None) -> tuple[str, int]:
        """Which size and number of steps; what is not said is the picture's, or the bundle's first."""
        own = None if picture is None else f"{picture.shape[1]}x{picture.shape[0]}"
        first = PictureSize.parse(own or self.variants[0].size)
        size, text = first, wish.size
        try:
            if text is not None and text != "auto":
                size = PictureSize.parse(text)
                if first.frames > 1 and size.frames == 1:
                    size = PictureSize(size.width, size.height, first.frames)
            frames = wish.num_frames if isinstance(wish, VideoWish) and wish.num_frames else size.frames
            size = PictureSize(wish.width or size.width, wish.height or size.height, frames)
            wanted = str(size) if own or (text, wish.width, wish.height, frames) != (None, None, None, first.frames) else None
            one = self.variants[find_variant(self.variants, wanted, wish.num_inference_steps)]
        except InputError as error:
            there = ", ".join(f"{one.size} in {one.steps} steps" for one in self.variants)
            param = "num_inference_steps" if str(error).startswith("steps") else "size"
            raise Refused(400, f"{error}. It has {there}", code="not_in_bundle", param=param) from error
        if own not in (None, one.size):
            raise Refused(400, f"the picture is {own}, and size is {one.size}: leave size out, or scale the picture",
                          code="invalid_value", param="size")  # fmt: skip
        return one.size, one.steps

    def _level(self, quality: str | None, bundle: LoadedBundle) -> str:
        there = bundle.programs
        if quality in there:
            return str(quality)
        if quality is None or quality == AUTO:
            return bundle.default_level
        if quality in EXACT:
            return UNCACHED
        raise Refused(400, f"there is no quality {quality[:80]!r} here. Known: {', '.join(there)}; auto is "
                      f"{bundle.default_level}, exact and lossless are {UNCACHED}", code="not_in_bundle",
                      param="quality")  # fmt: skip

    def _check_start(self, choice: Choice) -> None:
        """Raise ``Refused`` for a strength that no program was made ready for, or that the level cannot have."""
        if choice.start not in {start_of(one, choice.steps) for one in self._strengths}:
            known = ", ".join(f"{one:g}" for one in self._strengths)
            raise Refused(400, f"strength would begin at step {choice.start} of {choice.steps}, and ready are those of {known}",
                          code="not_in_bundle", param="strength")  # fmt: skip
        try:
            self.lanes.kind(choice.level, steps=choice.steps, size=choice.size, start=choice.start)
        except InputError as error:
            raise Refused(400, str(error), code="not_in_bundle", param="quality") from error

    def begin(self, choice: Choice) -> Beginning:
        """Where a request with a picture begins."""
        assert choice.picture is not None, "nothing else is asked"
        return Beginning(choice.start, self.pictures.encode_pictures(choice.picture[None], size=choice.size))

    def mixed(self, choice: Choice, begin: Beginning, seed: int) -> Array:
        """What a sample of a request with a picture begins with [1, …]."""
        assert begin.latents is not None, "it has a picture"
        return begin.mixed(make_noise(seed, begin.latents.shape[1:])[None], self.program(choice).sigmas)

    def _check_guidance(self, choice: Choice) -> None:
        """Raise ``Refused`` for scales and negative prompts that the program has no place for."""
        guided, embedded = self.program(choice).key.guided, EMBEDDED in self.loaded.io.conditions
        if choice.negative.strip() and not guided:
            raise Refused(400, "negative_prompt: requests of this bundle have no negative branch; leave it out, or compile it "
                          "at a guidance scale that has one", code="not_in_bundle", param="negative_prompt")  # fmt: skip
        if choice.true_cfg_scale is not None and not guided:
            raise Refused(400, "true_cfg_scale: requests of this bundle have no negative branch; leave it out",
                          code="not_in_bundle", param="true_cfg_scale")  # fmt: skip
        if choice.guidance is not None and not (guided or embedded):
            raise Refused(400, "guidance_scale: requests of this bundle have no guidance scale; leave it out",
                          code="not_in_bundle", param="guidance_scale")  # fmt: skip

    def _check_deadline(self, choice: Choice) -> None:
        """Raise ``Refused`` for a deadline that no server of this bundle keeps."""
        kind = self.lanes.kind(choice.level, steps=choice.steps, size=choice.size, start=choice.start)
        least = self.seconds.get("encode", 0.0) + kind.alone[0] + self.seconds_after(choice)
        if choice.deadline is not None and choice.deadline < least:
            raise Refused(400, f"deadline is {choice.deadline:g} s, but level {choice.level} takes {least:.3g} s where nobody "
                          "else is: give it more time, or take another level or fewer steps", code="invalid_value",
                          param="deadline")  # fmt: skip

    def seconds_after(self, choice: Choice) -> float:
        """What decoding a request's samples takes where nobody else is."""
        return len(choice.seeds) * self.seconds.get("decode", 0.0)

    def finish(self, choice: Choice, latents: Array) -> bytes:
        """A file of latents [1, …]: PNG, or mp4."""
        return self._to_file(self.pictures.decode(latents, size=choice.size)[0], choice.fps)

    def _to_file(self, made: Array, fps: float) -> bytes:
        return self.pictures.to_mp4(made, fps) if self.is_video else self.pictures.to_png(made)

    def conditions(self, choice: Choice) -> dict[str, Array]:
        """What the lanes take for one sample: both branches where there are two, and the scales."""
        loaded = self._at[choice.size, choice.steps]
        scales = Scales.of(loaded, guidance=choice.guidance, true=choice.true_cfg_scale, negative=False)
        return dict(self.pictures.conditions([choice.prompt], loaded.conditions(choice.level), scales, [choice.negative]))

    def preview(self, choice: Choice, before: tuple[int, Array], now: tuple[int, Array]) -> bytes:
        """A picture of where a request is heading: the straight line through its latents at two steps, at no noise."""
        sigmas = self.program(choice).sigmas
        first, second = float(sigmas[before[0]]), float(sigmas[now[0]])
        latents = now[1] + (now[1] - before[1]) * (second / (first - second))
        return self.pictures.to_png(self.pictures.decode(latents.astype(np.float32), size=choice.size)[0])

    def to_json(self) -> dict[str, Any]:
        """Its line in the list of models: sizes, steps, and of every level what was measured."""
        choices = [self._variant_json(one.size, one.steps) for one in self.variants]
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "cachec",
            "model": self.loaded.manifest.model["name"],
            "kind": "video" if self.is_video else "image",
            "takes_pictures": self.pictures.takes_pictures,
            "strengths": sorted(set(self._strengths)) if self.pictures.takes_pictures else [],
            "default_level": self.loaded.default_level,
            "levels": choices[0]["levels"],
            "choices": choices,
            "encode_seconds": self.seconds.get("encode"),
            "decode_seconds": self.seconds.get("decode"),
        }

    def _variant_json(self, size: str, steps: int) -> dict[str, Any]:
        one = self.variants[find_variant(self.variants, size, steps)]
        measured = one.facts.get("levels", {})
        programs = self._at[size, steps].programs
        levels = {
            level: {
                "seconds": self.lanes.kind(level, steps=steps, size=size).alone[0],
                "computed_steps": len(programs[level].compute_steps),
                "steps": programs[level].num_steps,
                "exact": level == UNCACHED,
                **{name: measured.get(level, {}).get(name) for name in ("psnr_db", "psnr_db_stderr", "speedup", "num_prompts")},
            }
            for level in one.programs
        }
        return {"size": size, "num_inference_steps": steps, "levels": levels}


def name_and_place(bundle: str | Path) -> tuple[str, Path]:
    """What requests call a bundle, and its directory: of ``NAME=DIRECTORY``, or its directory's name without ``.cachec``.

    Raises:
        InputError: the name, or the directory, is empty.
    """
    name, sign, place = str(bundle).partition("=")
    if not sign or Path(bundle).exists():
        return Path(bundle).resolve().name.removesuffix(".cachec"), Path(bundle)
    if not name or not place:
        raise InputError(f"{bundle}: write NAME=BUNDLE, or the bundle alone")
    return name, Path(place)


def from_anywhere(bundle: str | Path) -> str:
    """The same bundle with its whole path, for processes that work elsewhere. Raises as :func:`name_and_place`."""
    name, place = name_and_place(bundle)
    return str(place.resolve()) if "=" in name else f"{name}={place.resolve()}"  # such a name is its directory's own


def check_names(bundles: Sequence[str | Path]) -> None:
    """Raise ``InputError`` if two have one name."""
    names = [name_and_place(bundle)[0] for bundle in bundles]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"two bundles are called {twice[0]}, and requests could not tell them apart: rename one, or "
                         "write NAME=BUNDLE")  # fmt: skip


def _fps(wish: Common, frames: int) -> float:
    """How fast a video plays: as said, or so that it takes the seconds that were said."""
    if not isinstance(wish, VideoWish):
        return FRAMES_A_SECOND
    if wish.fps or wish.seconds is None:
        return wish.fps or FRAMES_A_SECOND
    if not SLOWEST <= (fps := frames / wish.seconds) <= FASTEST:
        raise Refused(400, f"seconds is {wish.seconds:g}, in which {frames} frames would play at {fps:g} a second; it may be "
                      f"{SLOWEST:g} to {FASTEST:g}", code="invalid_value", param="seconds")  # fmt: skip
    return fps


def _seeds(given: int | list[int] | None, count: int, draw: Callable[[], int]) -> tuple[int, ...]:
    """One for each sample: the one given and those behind it, or the list."""
    if isinstance(given, list):
        if len(given) != count:
            raise Refused(400, f"seed has {len(given)} numbers, and n is {count}: give one number, or {count}",
                          code="invalid_value", param="seed")  # fmt: skip
        return tuple(given)
    first = draw() if given is None else given
    return tuple((first + place) % NUM_SEEDS for place in range(count))
