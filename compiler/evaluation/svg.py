"""A small writer of SVG: rectangles, lines, circles and text in pixels, and axes that are linear or logarithmic."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

INK, FAINT, GRID = "#1c1c1e", "#6e6e76", "#e4e4e8"
FONT = 12  # pixels
CHAR = 0.58  # mean width of a character over the font size, generous


@dataclass(frozen=True)
class Axis:
    """Maps values from ``low`` … ``high`` to pixels ``start`` … ``end``."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values inside the axis: powers of ten on a logarithmic one."""
        if self.log:
            powers = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
            return [10.0**power for power in powers]
        rough = (self.high - self.low) / 6
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough)
        return [step * i for i in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)]


class Svg:
    """A picture of ``width`` × ``height`` pixels that grows by what is drawn; ``title`` is read out by screen readers."""

    def __init__(self, width: float, height: float, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self._parts: list[str] = []

    def rect(self, x: float, y: float, width: float, height: float, *, fill: str, hint: str = "") -> None:
        """A filled rectangle; ``hint`` is what a pointer over it shows."""
        inside = f"<title>{escape(hint)}</title>" if hint else ""
        self._add("rect", inside, x=x, y=y, width=width, height=height, fill=fill)

    def line(self, points: Sequence[tuple[float, float]], *, colour: str, width: float = 1, dash: str = "") -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        style = {"stroke_dasharray": dash} if dash else {}
        self._add("polyline", points=path, fill="none", stroke=colour, stroke_width=width, stroke_linejoin="round", **style)

    def circle(self, x: float, y: float, radius: float, *, fill: str) -> None:
        self._add("circle", cx=x, cy=y, r=radius, fill=fill, stroke="#fff", stroke_width=1)

    def text(
        self, x: float, y: float, text: str, *, anchor: str = "start", colour: str = INK, bold: bool = False, turn: bool = False
    ) -> None:
        """Text whose line is centred on ``y``; ``turn`` by a quarter, to read upwards."""
        style = {"font_weight": "600"} if bold else {}
        turned = {"transform": f"rotate(-90 {x:.1f} {y:.1f})"} if turn else {}
        place: dict[str, str | float] = {"x": x, "y": y, "dy": "0.35em", "text_anchor": anchor}
        halo: dict[str, str | float] = {"stroke": "#fff", "stroke_width": 3, "paint_order": "stroke"}
        self._add("text", escape(text), fill=colour, **place, **halo, **style, **turned)

    def frame(self, x: Axis, y: Axis, *, x_label: str, y_label: str) -> None:
        """Grid lines, ticks and labels of two axes; ``y`` runs upwards."""
        for value in x.ticks():
            self.line([(x(value), y.start), (x(value), y.end)], colour=GRID)
            self.text(x(value), y.start + 13, tick_text(value), anchor="middle", colour=FAINT)
        for value in y.ticks():
            self.line([(x.start, y(value)), (x.end, y(value))], colour=GRID)
            self.text(x.start - 7, y(value), tick_text(value), anchor="end", colour=FAINT)
        self.text((x.start + x.end) / 2, y.start + 32, x_label, anchor="middle")
        self.text(10, (y.start + y.end) / 2, y_label, anchor="middle", turn=True)

    def render(self) -> str:
        """The element, for use inside a page."""
        head = (
            f'<svg viewBox="0 0 {self.width:g} {self.height:g}" role="img" '
            f'font-size="{FONT}" font-family="system-ui, sans-serif">'
        )
        return "\n".join([head, f"<title>{escape(self.title)}</title>", *self._parts, "</svg>"])

    def _add(self, tag: str, inside: str = "", **attributes: str | float) -> None:
        words = (f'{name.replace("_", "-")}="{_attribute(value)}"' for name, value in attributes.items())
        self._parts.append(f"<{tag} {' '.join(words)}>{inside}</{tag}>")


def _attribute(value: str | float) -> str:
    return escape(value, quote=True) if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")


def tick_text(value: float) -> str:
    """A round value, short."""
    return f"{value:.0e}".replace("e-0", "e-") if 0 < abs(value) < 1e-3 else f"{value:g}"


def text_width(text: str) -> float:
    """About how many pixels a text takes."""
    return len(text) * FONT * CHAR


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move sorted places apart until they are ``gap`` from each other, between ``low`` and ``high`` where they fit."""
    result: list[float] = []
    for place in places:
        result.append(max(place, result[-1] + gap if result else low))
    limit = high
    for index in reversed(range(len(result))):
        result[index] = min(result[index], limit)
        limit = result[index] - gap
    return result


def diverging(value: float) -> str:
    """Colour of a value from -1 (blue) over 0 (white) to 1 (red)."""
    end = (178, 24, 43) if value > 0 else (33, 102, 172)
    share = min(abs(value), 1.0) ** 0.7  # small weights stay visible
    return "#" + "".join(f"{round(247 + (channel - 247) * share):02x}" for channel in end)
