"""Captioned scenes: eight things in eight colours, drawn at 256 px and reduced to 64 px.

The caption is only "<colour> <thing>". Background, place, size and shape vary and are *not* in it, so there
is room for a reward to change a picture without contradicting its prompt: a white duck may stand before a
dark wall, but it may not turn black.

    picture = scene("white", "duck", np.random.default_rng(0))     # PIL image, RGB, 64 x 64

Coordinates inside a drawing run from -1 to 1, x to the right and y down; `Pen` maps them to the canvas.
"""

import colorsys
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64  # pixels of a finished scene
SUPERSAMPLING = 4  # drawn this much larger, then averaged: clean edges

COLOURS = {  # sRGB, 0..255
    "white": (246, 246, 246),
    "black": (20, 20, 24),
    "red": (216, 34, 38),
    "orange": (246, 130, 18),
    "yellow": (250, 216, 36),
    "green": (44, 156, 62),
    "blue": (38, 92, 216),
    "purple": (140, 50, 178),
}
THINGS = ("duck", "car", "fish", "tree", "house", "cat", "star", "ball")
WORDS = (*COLOURS, *THINGS, "a", "an")  # all that the model has ever read
PAIRS = tuple((colour, thing) for colour in COLOURS for thing in THINGS)  # the classes of the judges

# Things that face somewhere always face right. Shown both ways, a small model draws the average: fish with
# two faces, cats with two tails. These three look natural either way, so half of them are mirrored.
MIRRORED = ("tree", "house", "ball")

INK, CHALK, GLASS, WOOD = (18, 18, 22), (250, 250, 250), (176, 214, 236), (112, 72, 40)


def caption(colour, thing, article=False):
    """The prompt a scene answers to: "white duck", or with its article "a white duck"."""
    words = f"{colour} {thing}"
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {words}" if article else words


@dataclass(frozen=True)
class Layout:
    """Everything about a scene except the colour of its subject.

    background: uint8 (SIZE, SIZE, 3). centre: the subject's middle, in fractions of the picture.
    scale: half the subject's extent, likewise. tilt: radians. mirror: left and right exchanged.
    shape: four numbers in [-1, 1] that each drawing reads in its own way. tint: added to the colour, 1/255.
    """

    thing: str
    background: np.ndarray
    centre: tuple
    scale: float
    tilt: float
    mirror: bool
    shape: tuple
    tint: tuple


def layout(thing, rng, avoid=()):
    """Draw a layout from the random generator `rng`; its background stays clear of the colours in `avoid`."""
    background = draw_background(rng)
    while any(contrast(background, colour) < 0.42 for colour in avoid):
        background = draw_background(rng)
    scale = rng.uniform(0.31, 0.43)
    room = 0.47 - scale  # how far the subject's middle may lie from the picture's
    return Layout(
        thing=thing,
        background=background,
        centre=tuple(0.5 + rng.uniform(-room, room, 2)),
        scale=scale,
        tilt=rng.uniform(-0.09, 0.09),
        mirror=thing in MIRRORED and bool(rng.integers(2)),
        shape=tuple(rng.uniform(-1, 1, 4)),
        tint=tuple(rng.integers(-8, 9, 3)),
    )


def render(layout, colour):
    """The scene of `layout` with its subject in `colour`: PIL image, RGB, SIZE x SIZE."""
    canvas = Image.new("RGBA", (SIZE * SUPERSAMPLING,) * 2)
    paint = np.clip(np.array(COLOURS[colour]) + layout.tint, 0, 255)
    DRAWINGS[layout.thing](Pen(canvas, layout), Palette(colour, paint), *layout.shape)
    picture = Image.fromarray(layout.background).convert("RGBA")
    picture.alpha_composite(canvas.reduce(SUPERSAMPLING))
    return picture.convert("RGB")


def scene(colour, thing, rng):
    """A scene that shows `thing` in `colour`, everything else drawn from `rng`: PIL image, RGB, 64 x 64."""
    return render(layout(thing, rng, avoid=(colour,)), colour)


def scenes(start, stop, seed):
    """Scenes number start..stop-1 of the endless set `seed`.

    A scene depends on (seed, number) alone, so a set may be drawn in parts or by several processes.
    Returns images, uint8 (N, SIZE, SIZE, 3), and their indices into PAIRS, int64 (N,).
    """
    images, pairs = np.empty((stop - start, SIZE, SIZE, 3), np.uint8), np.arange(start, stop) % len(PAIRS)
    for i, pair in enumerate(pairs):
        images[i] = scene(*PAIRS[pair], np.random.default_rng((seed, start + i)))
    return images, pairs


# --- backgrounds ------------------------------------------------------------------------------------------


def background_colour(rng):
    """One colour, RGB in 0..1: very dark, very bright, near grey, or anything moderately coloured."""
    kind, hue = rng.uniform(), rng.uniform()
    if kind < 0.17:
        return hue, rng.uniform(0, 0.5), rng.uniform(0.01, 0.14)
    if kind < 0.34:
        return hue, rng.uniform(0, 0.12), rng.uniform(0.9, 1)
    if kind < 0.48:
        return hue, rng.uniform(0, 0.08), rng.uniform(0.1, 0.9)
    return hue, rng.uniform(0.2, 0.65), rng.uniform(0.2, 0.95)


def draw_background(rng):
    """A plain wall, a gradient from top to bottom, or a horizon: uint8 (SIZE, SIZE, 3)."""
    hue, saturation, value = background_colour(rng)
    # The second colour is a neighbour of the first and darker or brighter in proportion, so that a very dark
    # or very bright scene is so everywhere.
    second = (
        (hue + rng.uniform(-0.12, 0.12)) % 1,
        saturation * rng.uniform(0.6, 1.2),
        value * rng.uniform(0.55, 1.1),
    )
    top, bottom = (np.array(colorsys.hsv_to_rgb(*np.clip(c, 0, 1))) for c in ((hue, saturation, value), second))
    y = (np.arange(SIZE) + 0.5) / SIZE
    kind = rng.integers(3)
    if kind == 0:
        mix = np.zeros(SIZE)
    elif kind == 1:
        mix = y
    else:
        mix = np.clip((y - rng.uniform(0.55, 0.8)) * SIZE, 0, 1)
    rows = top + (bottom - top) * mix[:, None]  # (SIZE, 3)
    return np.repeat((rows * 255).round().astype(np.uint8)[:, None], SIZE, axis=1)


def contrast(background, colour):
    """Least distance of the background's top and bottom rows from the colour: 0 (alike) to sqrt 3."""
    ends = background[[0, -1], 0] / 255.0
    return np.linalg.norm(ends - np.array(COLOURS[colour]) / 255.0, axis=1).min()


# --- drawing ----------------------------------------------------------------------------------------------


class Palette:
    """Tones of one paint: `main`, a `shade` for parts that lie lower or behind, a `light` for highlights.

    Black has no darker tone and white no brighter one, so their details are drawn the other way round.
    """

    def __init__(self, colour, paint):
        self.colour = colour
        self.main = tuple(int(v) for v in paint)
        self.shade = mix(self.main, CHALK, 0.24) if colour == "black" else mix(self.main, INK, 0.26)
        self.light = mix(self.main, INK, 0.1) if colour == "white" else mix(self.main, CHALK, 0.42)


def mix(a, b, share):
    """The colour `share` of the way from a to b."""
    return tuple(round(x + (y - x) * share) for x, y in zip(a, b))


class Pen:
    """Draws on a canvas in the subject's own coordinates: scaled, tilted, mirrored and moved by a layout."""

    def __init__(self, canvas, layout):
        self.draw = ImageDraw.Draw(canvas)
        extent = canvas.width
        cos, sin = np.cos(layout.tilt), np.sin(layout.tilt)
        turn = np.array([[cos, sin], [-sin, cos]]) * layout.scale * extent
        self.matrix = np.diag([-1 if layout.mirror else 1, 1]) @ turn  # row vectors: point @ matrix
        self.offset = np.array(layout.centre) * extent

    def polygon(self, points, fill):
        points = np.asarray(points, float) @ self.matrix + self.offset
        self.draw.polygon([tuple(p) for p in points], fill=(*fill, 255))

    def curve(self, points, fill, smooth=6):
        """A closed curve through the points (Catmull-Rom), filled."""
        p1 = np.asarray(points, float)
        p0, p2, p3 = np.roll(p1, 1, 0), np.roll(p1, -1, 0), np.roll(p1, -2, 0)
        t = (np.arange(smooth) / smooth)[:, None, None]
        curve = p1 + 0.5 * t * (p2 - p0 + t * (2 * p0 - 5 * p1 + 4 * p2 - p3 + t * (3 * (p1 - p2) + p3 - p0)))
        self.polygon(curve.transpose(1, 0, 2).reshape(-1, 2), fill)

    def ellipse(self, x, y, rx, ry, fill, start=0.0, stop=360.0):
        """An ellipse around (x, y); from `start` to `stop` degrees, clockwise from the right, its segment."""
        angle = np.radians(np.linspace(start, stop, 40))
        self.polygon(np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], 1), fill)

    def box(self, left, top, right, bottom, fill, radius=0.0):
        """A rectangle with round corners."""
        if radius == 0:
            return self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], fill)
        quarter = np.radians(np.linspace(0, 90, 8))
        corners = [(right, bottom, 0), (left, bottom, 90), (left, top, 180), (right, top, 270)]
        outline = []
        for x, y, turn in corners:
            x, y = np.clip(x, left + radius, right - radius), np.clip(y, top + radius, bottom - radius)
            angle = quarter + np.radians(turn)
            outline += list(zip(x + radius * np.cos(angle), y + radius * np.sin(angle)))
        return self.polygon(outline, fill)

    def eye(self, x, y, size):
        self.ellipse(x, y, size, size, CHALK)
        self.ellipse(x + 0.2 * size, y, 0.62 * size, 0.62 * size, INK)


def draw_duck(pen, paint, plump, tail, head, neck):
    """A rubber duck, facing right."""
    top, r = -0.46 - 0.05 * neck, 0.4 + 0.04 * head
    beak = (250, 206, 40) if paint.colour in ("orange", "red") else (244, 136, 24)
    pen.curve([(0.72, top - 0.1), (1.0, top + 0.0), (1.1, top + 0.1), (0.98, top + 0.2), (0.7, top + 0.26)], beak)
    low = 0.82 + 0.06 * plump
    pen.curve(
        [(-1.0, -0.2 - 0.08 * tail), (-0.6, 0.06), (-0.1, 0.0), (0.3, -0.1), (0.72, 0.1), (0.8, 0.45),
         (0.5, low - 0.06), (-0.1, low), (-0.62, low - 0.12), (-0.92, 0.32)],
        paint.main,
    )  # fmt: skip
    pen.ellipse(0.4, -0.1, 0.32, 0.4, paint.main)
    pen.ellipse(0.4, top, r, r, paint.main)
    pen.curve([(-0.62, 0.2), (-0.2, 0.14), (0.22, 0.24), (0.16, 0.5), (-0.2, 0.6), (-0.5, 0.46)], paint.shade)
    pen.eye(0.52, top - 0.07, 0.14)


def draw_car(pen, paint, height, cabin, nose, wheel):
    """A car, facing right."""
    roof, left, right = -0.56 - 0.06 * height, -0.62 + 0.07 * cabin, 0.44 + 0.07 * cabin
    pen.curve([(left - 0.16, 0.0), (left + 0.06, roof + 0.06), (left + 0.3, roof), (right - 0.3, roof),
               (right - 0.06, roof + 0.06), (right + 0.2, 0.0), (0.0, 0.2)], paint.main)  # fmt: skip
    pen.box(-1.0, -0.08 + 0.03 * nose, 1.0, 0.46, paint.main, radius=0.18)
    middle = (left + right) / 2
    sill, top = -0.06, roof + 0.13
    pen.polygon([(left + 0.06, sill), (left + 0.17, top), (middle - 0.05, top), (middle - 0.05, sill)], GLASS)
    pen.polygon([(middle + 0.05, sill), (middle + 0.05, top), (right - 0.17, top), (right, sill)], GLASS)
    pen.box(-0.96, 0.26, 0.96, 0.42, paint.shade, radius=0.07)
    pen.ellipse(0.88, 0.12, 0.1, 0.1, (255, 240, 150))
    r = 0.27 + 0.025 * wheel
    for x in (-0.56, 0.56):
        pen.ellipse(x, 0.46, r, r, (44, 44, 50))
        pen.ellipse(x, 0.46, 0.5 * r, 0.5 * r, (206, 206, 212))


def draw_fish(pen, paint, plump, tail, fin, nose):
    """A fish, facing right; its fat fins are rooted in the body."""
    r, spread = 0.52 + 0.06 * plump, 0.46 + 0.06 * tail
    pen.curve([(-0.45, 0.0), (-0.75, -spread * 0.7), (-1.05, -spread), (-0.92, 0.0), (-1.05, spread),
               (-0.75, spread * 0.7)], paint.shade)  # fmt: skip
    pen.curve([(-0.3, -0.3), (-0.2, -r - 0.22 - 0.04 * fin), (0.1, -r - 0.2), (0.4, -0.3)], paint.shade)
    pen.curve([(-0.25, 0.35), (-0.22, r + 0.18), (0.0, r + 0.16), (0.2, 0.35)], paint.shade)
    pen.curve([(-0.7, 0.0), (-0.35, -r * 0.72), (0.15, -r), (0.66, -r * 0.74), (0.98 + 0.03 * nose, 0.0),
               (0.66, r * 0.74), (0.15, r), (-0.35, r * 0.72)], paint.main)  # fmt: skip
    pen.curve([(-0.3, 0.02), (-0.02, -0.08), (0.14, 0.1), (0.0, 0.28), (-0.26, 0.26)], paint.shade)
    pen.eye(0.58, -0.14, 0.16)


def draw_tree(pen, paint, kind, width, height, trunk):
    """A broad tree of round crowns or a fir of three tiers, with a brown trunk."""
    w, t = 1 + 0.08 * width, 0.15 + 0.02 * trunk
    pen.polygon([(-t, 0.2), (t, 0.2), (t * 1.35, 1.0), (-t * 1.35, 1.0)], WOOD)
    if kind < 0:
        for x, y, r in ((-0.42 * w, 0.06, 0.42), (0.42 * w, 0.06, 0.42), (0.0, -0.42 - 0.05 * height, 0.5)):
            pen.ellipse(x, y, r * w, r, paint.main)
        pen.ellipse(0.0, 0.0, 0.5, 0.42, paint.main)
        pen.ellipse(-0.16, -0.5, 0.2, 0.17, paint.light)
    else:
        for top, bottom, half in (
            (-0.15, 0.62, 0.84),
            (-0.58, 0.2, 0.66),
            (-1.0 - 0.03 * height, -0.22, 0.48),
        ):
            pen.polygon([(0, top), (half * w, bottom), (-half * w, bottom)], paint.main)
            pen.polygon([(0.05, bottom - 0.13), (half * w, bottom), (-half * w, bottom)], paint.shade)


def draw_house(pen, paint, roof, width, door, window):
    """A house with a pitched roof, a chimney, a door and a window."""
    w, eaves, ridge = 0.76 + 0.05 * width, -0.16, -0.92 - 0.06 * roof
    pen.box(0.34, -0.86, 0.56, -0.2, paint.shade)
    pen.box(-w, eaves - 0.04, w, 0.88, paint.main)
    pen.polygon([(-w - 0.2, eaves), (0.0, ridge), (w + 0.2, eaves)], paint.shade)
    x = -0.38 + 0.05 * door
    pen.box(x - 0.19, 0.28, x + 0.19, 0.88, WOOD)
    x = 0.32 + 0.05 * window
    pen.box(x - 0.24, 0.14, x + 0.24, 0.54, (255, 236, 150))
    pen.box(x - 0.035, 0.14, x + 0.035, 0.54, WOOD)


def draw_cat(pen, paint, plump, ears, tail, head):
    """A sitting cat that looks at you, its thick tail always on the right."""
    w, r, tip = 0.52 + 0.05 * plump, 0.47 + 0.03 * head, -0.95 - 0.05 * ears
    high = -0.06 + 0.1 * tail
    pen.curve([(0.3, 0.92), (0.66, 0.94), (0.98, 0.7), (1.0, high + 0.2), (0.9, high), (0.74, high + 0.1),
               (0.76, 0.52), (0.58, 0.62), (0.3, 0.6)], paint.shade)  # fmt: skip
    pen.curve([(0.0, -0.2), (0.38, 0.1), (w, 0.62), (w - 0.06, 0.94), (0.0, 0.98), (-w + 0.06, 0.94),
               (-w, 0.62), (-0.38, 0.1)], paint.main)  # fmt: skip
    for side in (-1, 1):
        pen.polygon([(side * 0.06, -0.66), (side * 0.42, tip), (side * (r + 0.02), -0.28)], paint.main)
        pen.polygon([(side * 0.2, -0.66), (side * 0.37, tip + 0.16), (side * 0.4, -0.5)], (240, 150, 160))
        pen.ellipse(side * 0.17, 0.9, 0.17, 0.1, paint.shade)
    pen.ellipse(0.0, -0.34, r + 0.04, r - 0.05, paint.main)
    for side in (-1, 1):
        pen.ellipse(side * 0.2, -0.4, 0.13, 0.14, (190, 230, 120))
        pen.ellipse(side * 0.2, -0.4, 0.065, 0.12, INK)
    pen.polygon([(-0.09, -0.22), (0.09, -0.22), (0.0, -0.12)], (240, 130, 145))


def draw_star(pen, paint, turn, waist, inner, _):
    """A five-pointed star with a lighter middle."""
    angle = np.radians(np.arange(10) * 36 - 90 + 12 * turn)
    radius = np.where(np.arange(10) % 2 == 0, 1.0, 0.47 + 0.04 * waist)[:, None]
    points = np.stack([np.cos(angle), np.sin(angle)], 1) * radius
    pen.polygon(points, paint.main)
    pen.polygon(points * (0.5 + 0.05 * inner), paint.light)


def draw_ball(pen, paint, turn, band, shine, _):
    """A ball with a dark curved band and a highlight."""
    pen.ellipse(0.0, 0.0, 0.86, 0.86, paint.main)
    slope, half = 0.3 * turn, 0.17 + 0.03 * band
    x = np.linspace(-1, 1, 17)
    reach = np.sqrt(np.clip(1 - x**2, 0, None))
    upper = np.stack([0.86 * x, slope * x + 0.86 * reach * 0.34 - half * reach], 1)
    lower = np.stack([0.86 * x, slope * x + 0.86 * reach * 0.34 + half * reach], 1)
    outline = np.concatenate([upper, lower[::-1]])
    beyond = np.maximum(1, np.linalg.norm(outline, axis=1, keepdims=True) / 0.86)
    pen.polygon(outline / beyond, paint.shade)
    pen.ellipse(-0.34 + 0.05 * shine, -0.4, 0.2, 0.15, CHALK if paint.colour != "white" else paint.light)


DRAWINGS = {
    "duck": draw_duck,
    "car": draw_car,
    "fish": draw_fish,
    "tree": draw_tree,
    "house": draw_house,
    "cat": draw_cat,
    "star": draw_star,
    "ball": draw_ball,
}
