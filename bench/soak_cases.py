"""What a client of the soak sends, made from its number alone: good requests, changed ones, slow ones, some that it leaves."""

import io
import json
from enum import Enum
from functools import cache
from random import Random
from typing import Any

from cachec.compiler.calibration.prompts import default_prompts

PROMPTS, SEEDS, STEPS, STRENGTH, SIDE = 8, 4, 4, 0.6, 128
MALFORMED, LEAVING, SLOW = 1 / 11, 1 / 10, 1 / 50  # shares: of all; of the good ones; of the good ones
GENERATIONS, EDITS, VIDEOS = "/v1/images/generations", "/v1/images/edits", "/v1/videos"
ODD: list[Any] = [None, True, 0, -1, 2**70, 1e308, "", "x" * 9000, [], {}, "\u202e\0\ud83d", [[[]]], "1024x1024", "exact"]
FIELDS = ("prompt", "n", "seed", "quality", "size", "num_inference_steps", "guidance_scale", "stream", "model", "deadline",
          "lora", "strength", "image", "what")  # fmt: skip
Key = tuple[str, int, int, bool]  # level, prompt, seed, and whether it begins with the picture


class Kind(Enum):
    """What the client does."""

    GOOD = "asks and reads"
    READS_SLOWLY = "reads a few bytes at a time"
    LEAVES = "goes away"
    CHANGED = "sends what was changed anyhow"
    VIDEO = "asks for a video, which the bundle does not make"
    HALF = "sends half a request and ends"
    TRICKLES = "sends a body that takes longer than a body may"
    SILENT = "sends half a head, and nothing more"
    ENDLESS = "sends a head without an end"


class Stage(Enum):
    """When a client goes away."""

    SENDING = "while it sent"
    WAITING = "while it was encoded or waited"
    DENOISING = "while it was denoised"
    DECODING = "while it was decoded"
    ANSWER = "in mid-answer"
    ANY = "at some moment"


SHARES = {Kind.CHANGED: 0.68, Kind.VIDEO: 0.1, Kind.HALF: 0.08, Kind.TRICKLES: 0.07, Kind.SILENT: 0.04, Kind.ENDLESS: 0.03}
TAKE_LONG = (Kind.READS_SLOWLY, Kind.TRICKLES, Kind.SILENT)


class Case:
    """``data`` is what is sent, ``head`` bytes of it are its head; ``unchanged``: what it was before it was changed.

    ``edits``: whether the bundle takes pictures.
    """

    def __init__(self, number: int, levels: list[str], *, edits: bool, good: bool = False) -> None:
        self.draw = draw = Random(number)
        self.kind, self.stage, self.count = Kind.GOOD, Stage.ANY, 1
        if not good and draw.random() < MALFORMED:
            (self.kind,) = draw.choices(list(SHARES), list(SHARES.values()))
        elif not good and draw.random() < LEAVING:
            self.kind, self.stage = Kind.LEAVES, draw.choice(list(Stage))
        elif not good and draw.random() < SLOW:
            self.kind = Kind.READS_SLOWLY
        level, place, seed = draw.choice(levels), draw.randrange(PROMPTS), draw.randrange(SEEDS)
        edit = edits and draw.random() < (0.25 if self.kind is Kind.CHANGED else 0.05)
        self.key: Key = level, place, seed, edit
        fields: dict[str, Any] = {"prompt": prompts()[place], "quality": level, "seed": seed}
        self.streams = self.stage in (Stage.WAITING, Stage.DENOISING, Stage.DECODING) or draw.random() < 0.15
        if self.streams:
            fields |= {"stream": True, "partial_images": draw.randrange(3)}
        if self.stage is Stage.ANSWER and draw.random() < 0.5:
            fields["n"] = self.count = 4  # more than a socket holds
        self.leaves_after = draw.randrange(1, STEPS), draw.randrange(1, 20_000 * self.count)  # a step, or bytes of the answer
        self.body, self.content_type = as_form(fields) if edit else (as_json(fields), "application/json")
        self.path, self.must_be_refused = EDITS if edit else GENERATIONS, self.kind is Kind.VIDEO
        if self.kind is Kind.VIDEO:
            self._ask_for_a_video(fields)
        head = head_of(self.path, self.content_type, len(self.body))
        self.unchanged = head + self.body
        if self.kind is Kind.CHANGED:
            head = self._change(fields, edit)
        self.head, self.data = len(head), head + self.body

    def _ask_for_a_video(self, fields: dict[str, Any]) -> None:
        self.path = self.draw.choice((VIDEOS, f"{VIDEOS}/sync"))
        if self.draw.random() < 0.5:
            fields |= {self.draw.choice((*FIELDS, "num_frames", "fps", "seconds")): self.draw.choice(ODD)}
        self.body = as_json({name: value for name, value in fields.items() if name not in ("stream", "partial_images")})
        if self.draw.random() < 0.3:
            self.body = damaged(self.body, self.draw)

    def _change(self, fields: dict[str, Any], edit: bool) -> bytes:
        """Change a field, some bytes, the picture of a form, or the head, which is returned: never nothing."""
        draw, before, what = self.draw, self.body, self.draw.random()
        if what < 0.1:
            head = sent = head_of(self.path, self.content_type, len(self.body))
            while head == sent:
                head = damaged(sent, draw)
            return head
        while same(before, self.body, edit):
            changed = dict(fields)
            if what < 0.7:
                changed[draw.choice(FIELDS)] = draw.choice(ODD)
            picture = damaged(a_picture(), draw) if edit and draw.random() < 0.5 else a_picture()
            self.body = as_form(changed, picture)[0] if edit else as_json(changed)
            if what > 0.5:
                self.body = damaged(self.body, draw)
        self.must_be_refused = not edit and not isinstance(read(self.body), dict)
        return head_of(self.path, self.content_type, len(self.body))


@cache
def prompts() -> tuple[str, ...]:
    """The texts that good requests ask for: the first of those that models are trained on."""
    return tuple(default_prompts("avatars", "train")[:PROMPTS])


@cache
def a_picture() -> bytes:
    """A PNG that requests begin with."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((SIDE, SIDE)).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def as_json(fields: dict[str, Any]) -> bytes:
    """A body of ``application/json``."""
    return json.dumps(fields).encode("utf-8", "surrogatepass")


def as_form(fields: dict[str, Any], picture: bytes | None = None) -> tuple[bytes, str]:
    """A body of ``multipart/form-data`` with a picture, and its type."""
    body = b""
    for name, value in fields.items():
        text = value if isinstance(value, str) else json.dumps(value)
        body += f'--xx\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{text}\r\n'.encode("utf-8", "surrogatepass")
    if "strength" not in fields:
        body += f'--xx\r\nContent-Disposition: form-data; name="strength"\r\n\r\n{STRENGTH}\r\n'.encode()
    file = b'--xx\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    return body + file + (picture or a_picture()) + b"\r\n--xx--\r\n", "multipart/form-data; boundary=xx"


def head_of(path: str, content_type: str, length: int) -> bytes:
    """The head of a POST, with the empty line behind it; ``length``: of the body, in bytes."""
    lines = (f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Connection: close", f"Content-Length: {length}",
             f"Content-Type: {content_type}")  # fmt: skip
    return "\r\n".join([*lines, "", ""]).encode()


def read(body: bytes) -> Any:
    """The JSON that it is, or itself."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return body


def same(before: bytes, after: bytes, edit: bool) -> bool:
    """Do two bodies say the same? As text, as True and 1, or NaN and NaN, are told apart by it."""
    return before == after if edit else repr(read(before)) == repr(read(after))


def damaged(body: bytes, draw: Random) -> bytes:
    """Some bytes changed, lost or repeated."""
    changed = bytearray(body)
    for _ in range(draw.randrange(1, 5)):
        place = draw.randrange(len(changed))
        kind = draw.randrange(3)
        if kind == 0:
            changed[place] = draw.randrange(256)
        elif kind == 1 and len(changed) > 1:
            del changed[place]
        else:
            changed[place:place] = changed[place : place + draw.randrange(1, 40)]
    return bytes(changed)
