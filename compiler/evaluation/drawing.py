"""Plots as SVG inside a page: matplotlib draws, and what it writes becomes an element that fits its surroundings."""

import importlib.util
import io
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cachec.runtime.errors import missing_extra

if importlib.util.find_spec("matplotlib") is None:
    raise missing_extra("matplotlib", "compile", "drawing plots")
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath

INK, FAINT, GRID = "#1c1c1e", "#6e6e76", "#e4e4e8"
FONT, FONT_SIZE = "DejaVu Sans", 12  # comes with matplotlib, and is wider than what readers see; pixels
FONTS = "system-ui, -apple-system, 'Segoe UI', 'Noto Sans', 'DejaVu Sans', sans-serif"
DPI = 72  # an SVG unit of matplotlib, so that figures are laid out in pixels
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "cachec",  # the same plot has the same bytes
    "font.family": FONT,
    "font.size": FONT_SIZE,
    "text.parse_math": False,  # a dollar in a name is a dollar
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.labelpad": 8,
    "axes.edgecolor": GRID,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": FAINT,
    "ytick.labelcolor": FAINT,
    "lines.solid_joinstyle": "round",
}
SVG, XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"


@dataclass(frozen=True)
class Caption:
    """What a plot says to those who do not see it.

    Ids begin with ``name``, which no other plot of a page has; it has no spaces.
    """

    name: str
    title: str
    description: str


# draws into a figure; returns by gid of an artist the text that a pointer over it shows
Paint = Callable[[Figure], Mapping[str, str]]


def draw(caption: Caption, width: float, height: float, paint: Paint) -> str:
    """An ``svg`` element of ``width`` × ``height`` pixels that scales with the page; equal plots have equal bytes."""
    buffer = io.StringIO()
    with style.context(["default", STYLE]):  # whatever the user's matplotlibrc says
        figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
        hints = paint(figure)
        figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _embed(buffer.getvalue(), caption, hints)


def add_axes(figure: Figure, *, left: float, top: float, right: float, bottom: float) -> Axes:
    """Axes with margins in pixels."""
    width, height = figure.get_size_inches() * DPI
    return figure.add_axes((left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height))


def text_width(text: str, weight: str = "bold") -> float:
    """Pixels that a text takes."""
    return float(TextPath((0, 0), text, FONT_SIZE, FontProperties(family=FONT, weight=weight)).get_extents().width)


def _embed(text: str, caption: Caption, hints: Mapping[str, str]) -> str:
    """Make a document an element: no namespaces, no style sheet, no size, ids that no other plot has; with its words."""
    root = ElementTree.fromstring(text)
    for node in list(root):
        if node.find(f"{SVG}style") is not None:  # it would be the page's
            root.remove(node)
    for node in root.iter():
        _adapt(node, caption.name, hints)
    said = {"title": caption.title, "desc": caption.description}
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-labelledby": " ".join(f"{caption.name}-{tag}" for tag in said),
        "font-family": FONTS,
        "stroke-linejoin": "round",
    }
    for place, (tag, value) in enumerate(said.items()):
        root.insert(place, _element(tag, value, id=f"{caption.name}-{tag}"))
    return ElementTree.tostring(root, encoding="unicode")


def _adapt(node: ElementTree.Element, name: str, hints: Mapping[str, str]) -> None:
    node.tag = node.tag.removeprefix(SVG)
    attributes = {key.removeprefix(XLINK): value for key, value in node.attrib.items()}
    if (hint := hints.get(attributes.get("id", ""))) is not None:
        node.insert(0, _element("title", hint))
        del attributes["id"]  # may have spaces, and nothing refers to it
    for key, value in attributes.items():
        if key == "id":
            attributes[key] = f"{name}-{value}"
        elif key == "href":
            attributes[key] = f"#{name}-{value.removeprefix('#')}"
        else:
            attributes[key] = value.replace("url(#", f"url(#{name}-").replace(f"font-family: '{FONT}'; ", "")
    node.attrib = attributes


def _element(tag: str, text: str, **attributes: str) -> ElementTree.Element:
    element = ElementTree.Element(tag, attributes)
    element.text = text
    return element
