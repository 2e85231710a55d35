"""The fields of a request, with the names that sglang and OpenAI have for them.

Types are checked here; what they choose among, by ``served.py``, as it is the bundle's.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cachec.runtime.errors import shortened
from cachec.serving.refusals import Refused

Number = Annotated[float, Field(ge=-1e4, le=1e4, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
SLOWEST, FASTEST = 0.01, 240.0  # frames a second

LACKING: Mapping[str, str] = {  # fields that would change the picture, and cannot here
    "lora": "weights are fused ahead: add them to the bundle with cachec add-weights, and serve it with --weights",
    "flow_shift": "noise levels are the bundle's: compile it with other ones",
    "output_compression": "pictures are PNG, which loses nothing: leave it out",
    "max_sequence_length": "the text length is the bundle's: leave it out",
    "image": "a picture to begin with is posted to /v1/images/edits, as a form",
    "mask": "the whole picture is changed: leave it out",
    "input_reference": "no bundle makes videos of a picture: leave it out",
    "strength": "it says how far a picture is changed: post one to /v1/images/edits, as a form",
}


class Common(BaseModel):
    """What pictures and videos have in common."""

    model_config = ConfigDict(extra="forbid")
    lacking: ClassVar[Mapping[str, str]] = LACKING

    prompt: str
    negative_prompt: str | None = None
    model: str | None = None
    quality: str | None = None
    size: str | None = None
    width: Count | None = None
    height: Count | None = None
    num_inference_steps: Count | None = None
    guidance_scale: Number | None = None
    true_cfg_scale: Number | None = None
    seed: Seed | list[Seed] | None = None
    deadline: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    # taken as clients send them; nothing here depends on them
    user: str | None = None
    generator_device: str | None = None
    # refused with a reason, see LACKING
    lora: Any = None
    flow_shift: Any = None
    output_compression: Any = None
    max_sequence_length: Any = None
    strength: Any = None
    image: Any = None
    mask: Any = None
    input_reference: Any = None

    def check(self) -> None:
        """Raise ``Refused`` for what no bundle has."""
        for name, why in self.lacking.items():
            if getattr(self, name) is not None:
                raise Refused(400, f"{name}: {why}", code="unsupported", param=name)


class ImageWish(Common):
    """``POST /v1/images/generations``."""

    n: Count = 1
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: Literal["png"] = "png"
    background: Literal["auto", "opaque"] = "auto"
    stream: bool = False
    partial_images: Annotated[int, Field(ge=0, le=3)] = 0
    style: str | None = None
    moderation: str | None = None


class EditWish(ImageWish):
    """``POST /v1/images/edits``: ``image`` is a file, and the last ``strength`` of the steps are made."""

    lacking: ClassVar[Mapping[str, str]] = {name: why for name, why in LACKING.items() if name not in ("image", "strength")}

    image: bytes
    strength: Annotated[float, Field(gt=0, le=1)] | None = None
    input_fidelity: str | None = None  # not looked at: strength says it


class VideoWish(Common):
    """``POST /v1/videos``. ``num_frames`` chooses among the bundle's; ``fps``, or ``seconds``, says how fast they play."""

    num_frames: Count | None = None
    fps: Annotated[float, Field(ge=SLOWEST, le=FASTEST)] | None = None
    seconds: Annotated[float, Field(gt=0, le=3600)] | None = None


W = TypeVar("W", bound=Common)


def read_wish(kind: type[W], data: object, *, text: bool = False) -> W:
    """A request from JSON; or, with ``text``, from a form, whose numbers are written out.

    Raises:
        Refused: a field is unknown, missing, or of a wrong type or size; says which and what it may be.
    """
    try:
        wish = kind.model_validate(data, strict=not text)
    except ValidationError as error:
        raise _refused(error, kind) from error
    wish.check()
    return wish


def _refused(error: ValidationError, kind: type[Common]) -> Refused:
    first = error.errors(include_url=False)[0]
    where = first["loc"]
    if not where:
        return Refused(400, "the body is not a JSON object with the fields of a request", code="invalid_body")
    name = str(where[0])
    if first["type"] == "extra_forbidden":
        known = ", ".join(sorted(set(kind.model_fields) - set(kind.lacking)))
        return Refused(400, f"there is no field {shortened(name)}. Known: {known}", code="unknown_field", param=name[:80])
    if first["type"] == "missing":
        return Refused(400, f"{name} is missing", code="missing_field", param=name)
    message = first["msg"].removeprefix("Input ")
    return Refused(400, f"{name} is {shortened(first['input'])}: {message}", code="invalid_value", param=name)
