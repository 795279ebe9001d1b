"""The body parts of a drawn cat in four poses, as outlines in units of the head's radius (x right, y down)."""

from dataclasses import dataclass

import numpy as np

from demo.drawing_look import Look

Array = np.ndarray
POSES = ("sit", "stand", "loaf", "portrait")


@dataclass(frozen=True)
class Part:
    """An outline (n, 2) and how the coat lies on it.

    The coat's u axis starts at `origin` and follows `axis`,
    one unit a length of `length`; v is measured across in units
    of `half_width`. `frontal` bodies are seen from the front: v falls from the chest to both sides.
    """

    kind: str
    outline: Array
    origin: tuple[float, float]
    axis: tuple[float, float]
    length: float
    half_width: float
    frontal: bool = False
    shade: float = 1.0
    fur: float = 1.0


@dataclass(frozen=True)
class Pose:
    """Parts in painting order, the head's place, and the box of all (left, top, right, bottom)."""

    name: str
    behind: tuple[Part, ...]
    before: tuple[Part, ...]
    head: tuple[float, float]
    ground: float
    box: tuple[float, float, float, float]


def spline(points: Array, n: int = 96, closed: bool = True) -> Array:
    """A Catmull-Rom curve (n, 2) through control points."""
    p = np.asarray(points, float)
    p = np.concatenate([p[-1:], p, p[:2]]) if closed else np.concatenate([p[:1], p, p[-1:]])
    segments = len(p) - 3
    t = np.linspace(0, segments, n, endpoint=not closed)
    i = np.minimum(t.astype(int), segments - 1)
    f = (t - i)[:, None]
    a, b, c, d = p[i], p[i + 1], p[i + 2], p[i + 3]
    return 0.5 * (2 * b + (c - a) * f + (2 * a - 5 * b + 4 * c - d) * f**2 + (3 * b - a - 3 * c + d) * f**3)


def make_pose(look: Look, rng: np.random.Generator) -> Pose:
    """A random pose of a cat with this look."""
    name = str(rng.choice(POSES, p=(0.34, 0.3, 0.18, 0.18)))
    return {"sit": _sit, "portrait": _sit, "stand": _stand, "loaf": _loaf}[name](look, rng, name)


def _sit(look: Look, rng: np.random.Generator, name: str) -> Pose:
    w, tall = look.width, 0.75 + 0.25 * look.legs
    lean = rng.normal(0, 0.12)
    ground = 2.05 * tall
    half = [
        (0.0, -1.75),
        (0.72 * w, -1.45),
        (0.92 * w, -0.5),
        (1.12 * w, 0.5),
        (1.38 * w, 1.4),
        (1.15 * w, ground),
        (0.0, ground + 0.05),
    ]
    outline = spline(np.array(half + [(-x, y) for x, y in half[-2:0:-1]]))
    outline[:, 0] += lean * (ground - outline[:, 1]) / 3
    body = Part("body", outline, (0, -1.6), (0, 1), 1.0, 1.25 * w, frontal=True)
    legs, paws = [], []
    for side in (-1, 1):
        x = side * 0.4 * w
        legs.append(
            _limb((x * 1.1 + lean * 0.6, -0.1), (x + rng.normal(0, 0.04), ground + 0.02), 0.34, 0.25, shade=1.04)
        )
        paws.append(
            _limb((side * 1.0 * w, ground - 0.12), (side * 1.02 * w + 0.02, ground + 0.06), 0.36, 0.33, paw=True)
        )
    tail = _tail(look, [(1.1 * w, 1.6), (1.9, 1.75), (2.2, 2.0), (1.5, 2.35), (0.3, 2.3)], rng)
    up = _tail(look, [(1.1 * w, 1.5), (2.0, 1.6), (2.3, 0.8), (2.1, 0.0), (2.4, -0.7)], rng)
    tail = up if rng.random() < 0.5 else tail
    side = rng.choice((-1, 1))
    head = (lean + rng.normal(0, 0.08), -2.05 - 0.05 * look.legs)
    box = (-2.0, -3.5, 2.0, ground + 0.3) if name == "sit" else (-1.75, -3.7, 1.75, -0.1)
    return Pose(name, tuple(_mirror(tail, side)) + (body, *paws, *legs), (), head, ground, box)


def _stand(look: Look, rng: np.random.Generator, name: str) -> Pose:
    w = 0.5 + 0.5 * look.width
    arch = rng.normal(0, 0.08)
    body_outline = spline(
        np.array(
            [
                (-2.3, -0.35),
                (-1.6, -0.82 * w),
                (-0.4, (-0.8 - arch) * w),
                (0.9, -0.8 * w),
                (1.6, -0.55),
                (1.72, 0.1),
                (1.2, 0.68 * w),
                (0.1, 0.8 * look.width),
                (-1.2, 0.66 * w),
                (-2.15, 0.45),
            ]
        )
    )
    body = Part("body", body_outline, (-0.4, 0), (1, 0), 1.0, 0.85 * w)
    ground = 0.5 + 1.35 * look.legs
    swing = rng.normal(0, 0.25, 4)
    thick = 0.28 * (0.6 + 0.4 * look.width)
    far = [
        _limb((x, 0.3), (x + s + 0.12, ground - 0.1), thick * 1.25, thick * 0.8, shade=0.78)
        for x, s in ((1.05, swing[0]), (-1.5, swing[1]))
    ]
    near = [
        _limb((x, 0.2), (x + s, ground), thick * (1.2 + 0.45 * (x < 0)), thick * 0.85)
        for x, s in ((1.25, swing[2]), (-1.72, swing[3]))
    ]
    if rng.random() < 0.55:
        curve = [(-2.15, -0.35), (-2.7, -0.9), (-2.95, -1.7), (-2.8, -2.5), (-2.4, -2.9)]
    else:
        curve = [(-2.15, -0.3), (-2.8, 0.0), (-3.2, 0.6), (-3.6, 1.1), (-4.1, 1.0)]
    head = (1.85 + rng.normal(0, 0.08), -1.0 + rng.normal(0, 0.18))
    neck = Part(
        "body",
        spline(np.array([(0.9, -0.75), (1.6, -1.5), (2.3, -0.9), (1.9, 0.3), (1.1, 0.4)])),
        (-0.4, 0),
        (1, 0),
        1.0,
        0.95 * w,
    )
    return Pose(
        name, (*_tail(look, curve, rng), *far, body, neck, *near), (), head, ground, (-3.2, -2.6, 3.0, ground + 0.2)
    )


def _loaf(look: Look, rng: np.random.Generator, name: str) -> Pose:
    w, ground = look.width, 1.35
    outline = spline(
        np.array(
            [
                (-2.35, 0.9),
                (-2.1, 0.0),
                (-1.2, -0.62 * w),
                (0.1, -0.66 * w),
                (1.2, -0.5),
                (1.75, 0.2),
                (1.9, 1.0),
                (1.2, ground),
                (-0.5, ground + 0.02),
                (-1.9, ground),
            ]
        )
    )
    body = Part("body", outline, (-0.3, 0.35), (1, 0), 1.0, 1.0 * w)
    hip = spline(np.array([(-2.3, 0.9), (-1.9, 0.1), (-1.2, 0.1), (-0.7, 0.7), (-0.8, ground), (-1.9, ground)]))
    haunch = Part("body", hip, (-0.3, 0.35), (1, 0), 1.0, 1.0 * w, shade=1.04, fur=0.3)
    reach = 1.5 + 0.5 * rng.random()
    paws = [
        _limb((1.0, 1.05), (reach, ground - 0.1), 0.3, 0.24, shade=0.88),
        _limb((0.9, 1.15), (reach + 0.2, ground + 0.04), 0.3, 0.25),
    ]
    curve = [(-2.1, 0.95), (-2.35, 1.3), (-1.6, 1.5), (-0.6, 1.52), (0.3, 1.5)]
    if rng.random() < 0.4:
        curve = [(-2.1, 0.9), (-2.7, 1.1), (-3.2, 1.0), (-3.7, 0.7), (-4.0, 0.2)]
    head = (1.25 + rng.normal(0, 0.1), -0.75 + rng.normal(0, 0.1))
    return Pose(
        name, (body, haunch, *paws, *_tail(look, curve, rng)), (), head, ground, (-2.8, -2.3, 2.6, ground + 0.3)
    )


def _limb(
    top: tuple[float, float],
    foot: tuple[float, float],
    r_top: float,
    r_foot: float,
    shade: float = 1.0,
    paw: bool = False,
) -> Part:
    """A leg that ends in a paw a little wider than the leg, toes forward; `paw` draws the foot alone."""
    (x0, y0), (x1, y1) = top, foot
    if paw:
        outline = spline(
            np.array([(x1 - r_foot, y1), (x1, y1 - r_foot * 0.95), (x1 + r_foot, y1), (x1, y1 + r_foot * 0.45)]), 40
        )
        return Part("leg", outline, (x1, y1 - 1.2), (0, 1), 1.2, r_foot, fur=0.15)
    knee = ((x0 + x1) / 2, (y0 + y1) / 2)
    mid = (r_top + r_foot) / 2 * 0.92
    outline = spline(
        np.array(
            [
                (x0 - r_top, y0),
                (x0, y0 - r_top),
                (x0 + r_top, y0),
                (knee[0] + mid, knee[1]),
                (x1 + r_foot, y1 - 0.25),
                (x1 + r_foot * 1.35, y1 - 0.02),
                (x1, y1 + 0.1),
                (x1 - r_foot * 1.2, y1 - 0.02),
                (x1 - r_foot, y1 - 0.25),
                (knee[0] - mid, knee[1]),
            ]
        ),
        64,
    )
    return Part(
        "leg", outline, (x0, y0), (x1 - x0, y1 - y0), float(np.hypot(x1 - x0, y1 - y0)), r_top, shade=shade, fur=0.25
    )


def _tail(look: Look, curve: list[tuple[float, float]], rng: np.random.Generator) -> list[Part]:
    """The tail along a curve, cut to the look's length; a stump of a hair's length when there is none."""
    if look.tail < 0.05:
        return []
    line = spline(
        np.array(curve) + rng.normal(0, 0.07, (len(curve), 2)) * np.linspace(0, 1, len(curve))[:, None],
        40,
        closed=False,
    )
    line = line[: max(6, int(40 * min(1.0, look.tail / 1.08)))]
    t = np.linspace(0, 1, len(line))
    fluff = max(look.fluff, -0.5)
    radius = (0.2 + 0.1 * fluff) * (1 - 0.35 * t) + max(fluff, 0) * 0.26 * np.sin(np.pi * np.clip(t, 0, 1) ** 0.8)
    radius = np.maximum(radius, 0.07) * np.sqrt(np.clip((1.02 - t) / 0.06, 0, 1))
    step = np.gradient(line, axis=0)
    normal = np.stack([-step[:, 1], step[:, 0]], 1) / np.maximum(np.hypot(*step.T), 1e-6)[:, None]
    outline = np.concatenate([line + normal * radius[:, None], (line - normal * radius[:, None])[::-1]])
    chord = line[-1] - line[0]
    return [
        Part(
            "tail",
            outline,
            tuple(line[0]),
            tuple(chord),
            float(np.hypot(*chord)) + 1e-6,
            0.3,
            fur=0.25 + 0.5 * max(fluff, 0),
        )
    ]


def _mirror(parts: list[Part], side: int) -> list[Part]:
    if side > 0:
        return parts
    flip = np.array([-1.0, 1.0])
    return [
        Part(
            p.kind,
            p.outline * flip,
            (-p.origin[0], p.origin[1]),
            (-p.axis[0], p.axis[1]),
            p.length,
            p.half_width,
            p.frontal,
            p.shade,
            p.fur,
        )
        for p in parts
    ]
