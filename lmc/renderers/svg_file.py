"""SVG files: filled shapes read as closed paths of cubic Béziers, and written as such."""

import cmath
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from xml.parsers import expat

import numpy as np
from numpy.typing import NDArray
from PIL import ImageColor

from lmc.files import write_text

NAMESPACE = "http://www.w3.org/2000/svg"
SKIPPED = ("title", "desc", "metadata", "defs")
# What cannot be drawn unless it has this value.
PLAIN = {
    "stroke": "none",
    "filter": "none",
    "mask": "none",
    "clip-path": "none",
    "fill-rule": "nonzero",
    "mix-blend-mode": "normal",
    "visibility": "visible",
    "preserveAspectRatio": "xMidYMid",
    "transform-origin": "0 0",
}
ARITY = {"M": 2, "L": 2, "H": 1, "V": 1, "C": 6, "S": 4, "Q": 4, "T": 2, "A": 7, "Z": 0}
COMMAND = re.compile(r"[\s,]*([MLHVCSQTAZ])", re.IGNORECASE)
NUMBER = re.compile(r"[\s,]*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)")
# One of a list, or what is none; a sign or a point may begin it with nothing before.
LISTED = re.compile(rf"{NUMBER.pattern}(?:px)?|[^\s,]+")
FLAG = re.compile(r"[\s,]*([01])")  # of an arc; nothing need follow it
RGB = re.compile(r"rgba?\(([^)]*)\)", re.IGNORECASE)

SMOOTH = {"S": ("C", "S"), "T": ("Q", "T")}

Segment = tuple[complex, complex, complex]  # its first point and its two control points
Array = NDArray[np.float64]
Viewbox = tuple[float, float, float, float]
RGBValues = tuple[float, float, float]


@dataclass
class Drawing:
    """Filled paths, in the order in which they are drawn.

    Attributes:
        viewbox: left, top, width and height of what is seen, in the file's own units.
        background: red, green and blue in [0, 1].
        paths: of each its contours, float64 (segments, 3, 2) each: a segment's first point and its
            two control points; it ends where the next, after the last the first, begins.
        colours: of each path, red, green and blue in [0, 1].
        opacity: of each path, in [0, 1].
    """

    viewbox: Viewbox
    background: RGBValues = (1.0, 1.0, 1.0)
    paths: list[list[Array]] = field(default_factory=list)
    colours: list[RGBValues] = field(default_factory=list)
    opacity: list[float] = field(default_factory=list)


def read(file: Path) -> Drawing:
    """What an SVG file draws.

    Read are `svg`, `g`, `path`, `rect`, `circle`, `ellipse`, `polygon` and `polyline` with a plain
    fill, opacity and transforms, as attributes or in `style`. A first `rect` that is the viewBox,
    opaque, is the background; without one it is white. Of the size of the picture the viewBox alone
    counts. Titles, descriptions, metadata, what is in `defs` and elements that are not SVG's are
    passed over; a `<style>`, wherever it is, is refused.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no SVG, declares entities, draws nothing or what is not among these, or
            has numbers that are none; names the file, and the line and element where it is one's.
    """
    return _Reader(file).drawing


def write(file: Path, drawing: Drawing, height: int, width: int) -> None:
    """Write it as SVG, atomically; float32 values are read back as they were.

    Args:
        height: of the picture in pixels, as a viewer shows it.
        width: likewise.
    """
    left, top, *sides = (f"{value:.9g}" for value in drawing.viewbox)
    box = f'x="{left}" y="{top}" width="{sides[0]}" height="{sides[1]}"'
    lines = [
        f'<svg xmlns="{NAMESPACE}" viewBox="{" ".join((left, top, *sides))}" width="{width}" '
        f'height="{height}">',
        f'<rect {box} fill="{_rgb(drawing.background)}"/>',
    ]
    for path, colour, opacity in zip(drawing.paths, drawing.colours, drawing.opacity, strict=True):
        d = "".join(_contour(contour) for contour in path)
        lines.append(f'<path fill="{_rgb(colour)}" fill-opacity="{opacity:.9g}" d="{d}"/>')
    write_text(file, "\n".join([*lines, "</svg>\n"]))


def _rgb(colour: Sequence[float]) -> str:
    return f"rgb({','.join(f'{100 * value:.9g}%' for value in colour)})"


def _contour(contour: Array) -> str:
    rows = [[f"{x:.9g} {y:.9g}" for x, y in segment] for segment in contour.tolist()]
    ends = [row[0] for row in (*rows[1:], rows[0])]
    curves = (f"C{row[1]} {row[2]} {end}" for row, end in zip(rows, ends, strict=True))
    return f"M{rows[0][0]}{''.join(curves)}Z"


@dataclass(frozen=True)
class _State:
    """What an element hands to those within it."""

    matrix: Array
    fill: str = "black"
    fill_opacity: float = 1.0
    opacity: float = 1.0
    group_line: int = 0  # the line of an element whose opacity is of all within it together; or 0
    shapes: int = 0  # that were drawn before it


class _Reader:
    """Reads a file from its start to its end; no tree is kept, so that lines are known."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.stack: list[_State] = []
        self.skipped = 0  # how many elements deep in what is passed over
        self.drawing = Drawing((0.0, 0.0, 0.0, 0.0))
        self.parser = expat.ParserCreate(namespace_separator=" ")
        self.parser.StartElementHandler = self.start
        self.parser.EndElementHandler = self.end
        self.parser.EntityDeclHandler = self.entity
        try:
            self.parser.Parse(file.read_bytes(), True)
        except (expat.ExpatError, LookupError) as error:  # LookupError: of an unknown encoding
            raise ValueError(f"{file} is no XML: {error}") from error
        if not self.drawing.paths:
            raise ValueError(f"{file} draws no filled path")

    def entity(self, name: str, *_: Any) -> None:
        """Entities can grow without bound or read other files."""
        raise ValueError(
            f"{self.file}, line {self.parser.CurrentLineNumber}: the entity {name!r} is declared; "
            "write out what it stands for"
        )

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        namespace, _, name = tag.rpartition(" ")
        line = self.parser.CurrentLineNumber
        if name == "style" and namespace in ("", NAMESPACE):  # it counts wherever it is
            said = "<style> cannot be drawn; write it as attributes"
            raise ValueError(f"{self.file}, line {line}: {said}")
        if self.skipped or namespace not in ("", NAMESPACE) or name in SKIPPED:
            self.skipped += 1
            return
        try:
            self.element(name, {**attributes, **_style(attributes.get("style", ""))})
        except ValueError as error:
            raise ValueError(f"{self.file}, line {line}: <{name}> {error}") from error

    def end(self, _: str) -> None:
        if self.skipped:
            self.skipped -= 1
            return
        state = self.stack.pop()
        if state.group_line and len(self.drawing.paths) > state.shapes + 1:
            raise ValueError(
                f"{self.file}, line {state.group_line}: the opacity of a group of several shapes "
                "cannot be drawn; give it to the shapes"
            )

    def element(self, name: str, attributes: dict[str, str]) -> None:
        if attributes.get("display") == "none":
            self.skipped += 1
            return
        if not self.stack:
            if name != "svg":
                raise ValueError("is the root, which must be <svg>")
            self.drawing.viewbox = _viewbox(attributes)
        elif name not in SHAPES and name not in ("g", "path"):
            known = ", ".join(("svg", "g", "path", *SHAPES))
            raise ValueError(f"cannot be drawn; what can is {known}")
        for key, plain in PLAIN.items():
            if attributes.get(key, plain).removesuffix(" meet") not in (plain, "inherit"):
                raise ValueError(f"has {key} {attributes[key]!r}, which cannot be drawn")
        state = self.inherit(attributes)
        if name == "path":
            self.draw(_path(attributes.get("d", "")), state)
        elif name == "rect" and self.is_background(attributes, state):
            self.drawing.background, _ = _colour(state.fill)
        elif name in SHAPES:
            self.draw(_path(SHAPES[name](attributes, self.drawing.viewbox)), state)
        self.stack.append(state)

    def inherit(self, attributes: dict[str, str]) -> _State:
        before = self.stack[-1] if self.stack else _State(np.eye(3))
        own = _share(attributes.get("opacity", "1"), "opacity")
        fill = attributes.get("fill", "inherit").strip()
        fill_opacity = attributes.get("fill-opacity", "inherit")
        return replace(
            before,
            matrix=before.matrix @ _transform(attributes.get("transform", "")),
            fill=before.fill if fill == "inherit" else fill,
            fill_opacity=before.fill_opacity
            if fill_opacity == "inherit"
            else _share(fill_opacity, "fill-opacity"),
            opacity=before.opacity * own,
            group_line=self.parser.CurrentLineNumber if own < 1 else 0,
            shapes=len(self.drawing.paths),
        )

    def is_background(self, attributes: dict[str, str], state: _State) -> bool:
        """Whether a rect is all that is seen, opaque, and below everything."""
        box = tuple(_rect(attributes, self.drawing.viewbox))
        return (
            not self.drawing.paths
            and (*box[:4], max(box[4:])) == (*self.drawing.viewbox, 0)
            and np.array_equal(state.matrix, np.eye(3))
            and state.opacity * state.fill_opacity == 1
            and state.fill not in ("none", "transparent")
            and _colour(state.fill)[1] == 1
        )

    def draw(self, contours: list[list[Segment]], state: _State) -> None:
        if state.fill in ("none", "transparent") or not contours:
            return
        colour, alpha = _colour(state.fill)
        path = []
        for contour in contours:
            points = np.array(contour, dtype=np.complex128)[..., None].view(np.float64)
            path.append(points @ state.matrix[:2, :2].T + state.matrix[:2, 2])
        self.drawing.paths.append(path)
        self.drawing.colours.append(colour)
        self.drawing.opacity.append(alpha * state.fill_opacity * state.opacity)


def _path(d: str) -> list[list[Segment]]:
    """The contours of a path, all closed, as a fill closes them."""
    contours: list[list[Segment]] = [[]]
    here = start = control = 0j
    last = ""
    for letter, values in _commands(d):
        kind, base = letter.upper(), here if letter.islower() else 0j
        points = [base + complex(*pair) for pair in zip(values[::2], values[1::2], strict=False)]
        if kind in "MZ":
            _close(contours, here, start)
            here = start = points[0] if kind == "M" else start
        elif kind == "A":
            end = base + complex(*values[5:])
            contours[-1] += _arc(here, end, *values[:5])
            here = end
        else:
            if kind in "HV":
                there = base.real + values[0] if kind == "H" else base.imag + values[0]
                points = [complex(there, here.imag) if kind == "H" else complex(here.real, there)]
            if kind in "ST":  # its first control point is the last one, mirrored
                points.insert(0, 2 * here - control if last in SMOOTH[kind] else here)
            control, end = points[-2] if len(points) > 1 else here, points[-1]
            if kind in "QT":
                points = [here + (control - here) * 2 / 3, end + (control - end) * 2 / 3, end]
            contours[-1] += [(here, points[0], points[1])] if len(points) == 3 else _line(here, end)
            here = end
        last = kind
    _close(contours, here, start)
    return [contour for contour in contours if contour]


def _commands(d: str) -> Iterator[tuple[str, list[float]]]:
    """Letter and numbers of each command of a path's `d`."""
    d, position, letter = d.strip(), 0, ""
    while position < len(d):
        begin = position
        if found := COMMAND.match(d, position):
            position, before, letter = found.end(), letter, found[1]
            if not before and letter not in "Mm":
                raise ValueError(f"has a d that begins with {letter!r}; it must begin with M")
        values: list[float] = []
        for i in range(ARITY.get(letter.upper(), 0)):
            pattern = FLAG if letter in "Aa" and i in (3, 4) else NUMBER
            found = pattern.match(d, position)
            if not found or not math.isfinite(float(found[1])):
                raise ValueError(f"has a d that cannot be read from {d[position:][:20]!r} on")
            position = found.end()
            values.append(float(found[1]))
        if position == begin:  # no letter, and none before that takes numbers
            raise ValueError(f"has a d that cannot be read from {d[position:][:20]!r} on")
        yield letter, values
        letter = {"M": "L", "m": "l"}.get(letter, letter)


def _line(start: complex, end: complex) -> list[Segment]:
    return [(start, start + (end - start) / 3, end - (end - start) / 3)]


def _close(contours: list[list[Segment]], here: complex, start: complex) -> None:
    """End the last contour where it began, and begin the next."""
    if contours[-1] and abs(here - start) > 1e-6 * max(1.0, abs(start)):  # less is rounding
        contours[-1] += _line(here, start)
    contours.append([])


def _arc(
    start: complex, end: complex, rx: float, ry: float, degrees: float, large: float, sweep: float
) -> list[Segment]:
    """An elliptical arc, a cubic for each quarter (SVG 1.1, F.6)."""
    rx, ry, turn = abs(rx), abs(ry), cmath.rect(1, math.radians(degrees))
    if start == end:
        return []
    if not rx or not ry:
        return _line(start, end)
    # where the ellipse is a circle of radius 1
    a, b = (complex(z.real / rx, z.imag / ry) for z in (start / turn, end / turn))
    grow = max(1.0, abs(b - a) / 2)  # of an ellipse that is too small to reach
    a, b, rx, ry = a / grow, b / grow, rx * grow, ry * grow
    aside = (b - a) / abs(b - a) * math.sqrt(max(0.0, 1 - abs(b - a) ** 2 / 4))
    centre = (a + b) / 2 + aside * (-1j if large == sweep else 1j)
    angle = cmath.phase((b - centre) / (a - centre)) % (2 * math.pi)
    angle -= 0 if sweep else 2 * math.pi
    count = max(1, math.ceil(abs(angle) / (math.pi / 2) - 1e-9))
    step, reach = cmath.rect(1, angle / count), 4j / 3 * math.tan(angle / count / 4)

    def back(z: complex) -> complex:
        return complex((centre + z).real * rx, (centre + z).imag * ry) * turn

    found, at = [], a - centre
    for i in range(count):
        after = at * step
        first = back(at) if i else start
        found.append((first, back(at * (1 + reach)), back(after * (1 - reach))))
        at = after
    return found


def _style(text: str) -> dict[str, str]:
    """The declarations of a `style` attribute."""
    pairs = (part.partition(":") for part in text.split(";"))
    return {key.strip(): value.strip() for key, _, value in pairs if key.strip()}


def _number(text: str, name: str, whole: float | None = None) -> float:
    """A length, in px or of no unit, or in % of `whole` where there is one."""
    text = text.strip()
    percent = whole is not None and text.endswith("%")
    found = NUMBER.fullmatch(text.removesuffix("%" if percent else "px"))
    value = float(found[1]) if found else math.nan
    if not math.isfinite(value):
        raise ValueError(f"has {name} {text!r}, which is no number")
    return value * whole / 100 if percent and whole is not None else value


def _numbers(text: str, name: str) -> list[float]:
    return [_number(found[0].lstrip(" ,"), name) for found in LISTED.finditer(text)]


def _share(text: str, name: str) -> float:
    return min(1.0, max(0.0, _number(text, name, 1.0)))


def _length(attributes: dict[str, str], key: str) -> float:
    value = _number(attributes.get(key, "0"), key)
    if value < 0 and key in ("r", "rx", "ry"):
        raise ValueError(f"has {key} {value:g}, which must not be negative")
    return value


def _viewbox(attributes: dict[str, str]) -> Viewbox:
    if "viewBox" in attributes:
        values = _numbers(attributes["viewBox"], "viewBox")
    else:
        values = [0, 0, *(_number(attributes.get(key, ""), key) for key in ("width", "height"))]
    if len(values) != 4 or values[2] <= 0 or values[3] <= 0:
        raise ValueError("must have a viewBox of four numbers, the last two above 0")
    return values[0], values[1], values[2], values[3]


def _colour(text: str) -> tuple[RGBValues, float]:
    """Red, green, blue, and opacity."""
    if found := RGB.fullmatch(text):
        parts = re.split(r"[\s,]+", found[1].strip())
        values = [_number(part, "fill", 255.0) / 255 for part in parts[:3]]
        values += [_share(part, "fill") for part in parts[3:]]
    else:
        try:
            values = [value / 255 for value in ImageColor.getrgb(text)]
        except ValueError as error:
            said = f"has fill {text!r}; what can be drawn is a plain colour: #rrggbb, rgb(), a name"
            raise ValueError(said) from error
    if len(values) not in (3, 4):
        raise ValueError(f"has fill {text!r}, which must be three numbers")
    red, green, blue, alpha = (min(1.0, max(0.0, value)) for value in (*values, 1.0)[:4])
    return (red, green, blue), alpha


def _transform(text: str) -> Array:
    """The 3 x 3 matrix of a `transform` attribute."""
    matrix = np.eye(3)
    for name, arguments in re.findall(r"(\w+)\s*\(([^)]*)\)", text):
        values = _numbers(arguments, "transform")
        if name not in TRANSFORMS or len(values) not in TRANSFORMS[name][0]:
            raise ValueError(f"has transform {text!r}; no {name} of {len(values)} numbers is known")
        matrix = matrix @ np.array([*TRANSFORMS[name][1](*values), 0, 0, 1]).reshape(3, 3)
    if re.sub(r"\w+\s*\([^)]*\)[\s,]*", "", text).strip():
        raise ValueError(f"has transform {text!r}, which cannot be read")
    return matrix


def _rotate(degrees: float, x: float = 0, y: float = 0) -> list[float]:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return [c, -s, x - c * x + s * y, s, c, y - s * x - c * y]


def _tan(degrees: float) -> float:
    return math.tan(math.radians(degrees))


# Of each transform how many numbers it may have, and its matrix's first two rows.
TRANSFORMS: dict[str, tuple[tuple[int, ...], Any]] = {
    "translate": ((1, 2), lambda x, y=0: [1, 0, x, 0, 1, y]),
    "scale": ((1, 2), lambda x, y=None: [x, 0, 0, 0, x if y is None else y, 0]),
    "rotate": ((1, 3), _rotate),
    "skewX": ((1,), lambda degrees: [1, _tan(degrees), 0, 0, 1, 0]),
    "skewY": ((1,), lambda degrees: [1, 0, 0, _tan(degrees), 1, 0]),
    "matrix": ((6,), lambda a, b, c, d, e, f: [a, c, e, b, d, f]),
}


def _rect(attributes: dict[str, str], viewbox: Viewbox) -> list[float]:
    """Left, top, width, height and the two radii of a rect."""
    keys, wholes = ("x", "y", "width", "height"), viewbox[2:] * 2
    pairs = zip(keys, wholes, strict=True)
    x, y, width, height = (_number(attributes.get(key, "0"), key, whole) for key, whole in pairs)
    if width < 0 or height < 0:
        raise ValueError(f"is {width:g} x {height:g}, which must not be negative")
    rx, ry = _radii(attributes)
    return [x, y, width, height, min(rx, width / 2), min(ry, height / 2)]


def _radii(attributes: dict[str, str]) -> tuple[float, float]:
    """Of a rect or an ellipse; one that is not given is the other."""
    rx, ry = (key if key in attributes else "rx" if key == "ry" else "ry" for key in ("rx", "ry"))
    return _length(attributes, rx), _length(attributes, ry)


def _d_of_rect(attributes: dict[str, str], viewbox: Viewbox) -> str:
    x, y, width, height, rx, ry = _rect(attributes, viewbox)
    if not width or not height:
        return ""
    if not rx or not ry:
        return f"M{x} {y}h{width}v{height}h{-width}z"
    arc = f"a{rx} {ry} 0 0 1 "
    return (
        f"M{x + rx} {y}h{width - 2 * rx}{arc}{rx} {ry}v{height - 2 * ry}{arc}{-rx} {ry}"
        f"h{2 * rx - width}{arc}{-rx} {-ry}v{2 * ry - height}{arc}{rx} {-ry}z"
    )


def _d_of_circle(attributes: dict[str, str], _: Viewbox) -> str:
    radius = _length(attributes, "r")
    return _ellipse(attributes, radius, radius)


def _d_of_ellipse(attributes: dict[str, str], _: Viewbox) -> str:
    return _ellipse(attributes, *_radii(attributes))


def _ellipse(attributes: dict[str, str], rx: float, ry: float) -> str:
    x, y = _length(attributes, "cx"), _length(attributes, "cy")
    if not rx or not ry:
        return ""
    return f"M{x + rx} {y}A{rx} {ry} 0 0 1 {x - rx} {y}A{rx} {ry} 0 0 1 {x + rx} {y}Z"


def _d_of_points(attributes: dict[str, str], _: Viewbox) -> str:
    points = _numbers(attributes.get("points", ""), "points")
    if len(points) % 2:
        raise ValueError(f"has {len(points)} numbers as points, which must be pairs")
    return f"M{' '.join(map(str, points))}Z" if points else ""


# Each basic shape as the `d` of a path.
SHAPES = {
    "rect": _d_of_rect,
    "circle": _d_of_circle,
    "ellipse": _d_of_ellipse,
    "polygon": _d_of_points,
    "polyline": _d_of_points,
}
