"""Draws one cat as a small photo-like picture: surroundings, light, pose and framing at random, coat from its look."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from demo.drawing_coat import Noise, paint
from demo.drawing_face import Face, ear_parts, head_part
from demo.drawing_look import Look
from demo.drawing_pose import Part, make_pose
from demo.drawing_scene import draw_scene, expose

Array = np.ndarray
OVERSAMPLE = 2  # drawn larger and scaled down, for smooth edges
FUR_REACH = 0.27  # length of the longest hair at the outline, in head radii


def draw_cat(look: Look, rng: np.random.Generator, size: int = 160) -> Image.Image:
    """An RGB picture of `size` x `size` pixels. The same look and generator state give the same picture."""
    canvas = size * OVERSAMPLE
    pose = make_pose(look, rng)
    left, top, right, bottom = pose.box
    unit = canvas / max(right - left, bottom - top) * rng.uniform(0.86, 1.12)
    centre = np.array([(left + right) / 2, (top + bottom) / 2]) + rng.normal(0, 0.13, 2) * (
        1.3 if pose.name == "portrait" else 1.0
    )
    angle, mirror = rng.normal(0, 0.05), float(rng.choice((-1, 1)))
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])

    def body_to_canvas(points: Array) -> Array:
        return ((np.asarray(points) - centre) * (mirror, 1.0)) @ rotation.T * unit + canvas / 2

    tilt, turn = rng.normal(0, 0.13), float(np.clip(rng.normal(0, 0.35), -0.8, 0.8))
    head_rotation = np.array([[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]])
    scale = 1.0 if pose.name != "stand" else 0.92

    def head_to_canvas(points: Array) -> Array:
        return body_to_canvas(np.asarray(points) @ head_rotation.T * scale + pose.head)

    ground = float(body_to_canvas(np.array([(centre[0], pose.ground)]))[0, 1])
    image = draw_scene(canvas, ground, body_to_canvas(np.array([(centre[0], pose.ground)]))[0], unit, rng)
    noise, light = Noise.make(canvas, rng), rng.normal(0, 0.1, 2)
    for part in pose.behind:
        _paint_part(image, part, look, body_to_canvas, unit, noise, light, rng)
    for outer, inner in ear_parts(look, turn):
        _paint_part(image, outer, look, head_to_canvas, unit, noise, light, rng)
        _paint_part(image, inner, look, head_to_canvas, unit, noise, light, rng)
        _tufts(image, outer, look, head_to_canvas, unit)
    _paint_part(image, head_part(look), look, head_to_canvas, unit, noise, light, rng)
    Face(image, look, head_to_canvas, unit * scale, turn, rng).paint()
    return expose(image.resize((size, size), Image.Resampling.BOX), rng)


def _paint_part(
    image: Image.Image,
    part: Part,
    look: Look,
    to_canvas: Callable[[Array], Array],
    unit: float,
    noise: Noise,
    light: Array,
    rng: np.random.Generator,
) -> None:
    size = image.width
    outline = _furry(to_canvas(part.outline), look, part, unit, rng)
    (left, top), (right, bottom) = np.floor(outline.min(0)).astype(int) - 3, np.ceil(outline.max(0)).astype(int) + 3
    box = (max(left, 0), max(top, 0), min(right, size), min(bottom, size))
    if box[0] >= box[2] or box[1] >= box[3]:
        return
    mask = Image.new("L", (box[2] - box[0], box[3] - box[1]), 0)
    ImageDraw.Draw(mask).polygon([(x - box[0], y - box[1]) for x, y in outline], fill=255)
    yy, xx = np.mgrid[box[1] : box[3], box[0] : box[2]].astype(np.float32)
    u, v = _coordinates(part, to_canvas, unit, xx, yy)
    color = _inner_ear(look, u) if part.kind == "inner" else paint(look, part.kind, u, v, noise.crop(box))
    depth = np.asarray(mask.filter(ImageFilter.BoxBlur(0.16 * unit)), np.float32) / 255  # 1 inside, falling to the rim
    rx, ry = (xx - box[0]) / len(xx[0]) - 0.5, (yy - box[1]) / len(yy) - 0.5
    shade = part.shade * (0.58 + 0.44 * depth) * (1 - 0.16 * ry + light[0] * rx + light[1] * ry)
    pixels = np.clip(color * shade[..., None], 0, 255).astype(np.uint8)
    image.paste(Image.fromarray(pixels), box[:2], mask)


def _furry(outline: Array, look: Look, part: Part, unit: float, rng: np.random.Generator) -> Array:
    """The outline with locks of hair standing out, as long as the coat's fur."""
    length = look.fur * part.fur * FUR_REACH * unit
    if length < 1:
        return outline
    count = max(60, int(len(outline) * 1.6))
    at = np.linspace(0, len(outline), count, endpoint=False)
    i, f = at.astype(int), (at % 1)[:, None]
    points = outline[i] * (1 - f) + outline[(i + 1) % len(outline)] * f
    step = np.roll(points, -1, 0) - np.roll(points, 1, 0)
    normal = np.stack([step[:, 1], -step[:, 0]], 1) / np.maximum(np.hypot(*step.T), 1e-6)[:, None]
    if np.sum(points[:, 0] * np.roll(points[:, 1], -1) - points[:, 1] * np.roll(points[:, 0], -1)) < 0:
        normal = -normal
    locks = 0.55 + 0.3 * (np.arange(count) % 2) + rng.normal(0, 0.22, count)
    down = np.array([0.0, 0.35])  # hair hangs
    return points + (normal + down) * (locks * length)[:, None]


def _coordinates(
    part: Part, to_canvas: Callable[[Array], Array], unit: float, xx: Array, yy: Array
) -> tuple[Array, Array]:
    """The coat's u and v for every pixel of a part, see drawing_coat."""
    origin = to_canvas(np.array([part.origin]))[0]
    axis = to_canvas(np.array([part.origin]) + np.array([part.axis]))[0] - origin
    along = axis / max(float(np.hypot(*axis)), 1e-6)
    dx, dy = (xx - origin[0]).astype(np.float32), (yy - origin[1]).astype(np.float32)
    u = (dx * along[0] + dy * along[1]) / np.float32(unit * part.length)
    across = dy * abs(along[0]) - dx * along[1] * np.sign(along[0] or 1.0) if abs(along[0]) > 0.5 else dx * along[1]
    v = across / np.float32(unit * part.half_width)
    return (u, 1 - 1.7 * np.abs(v)) if part.frontal else (u, v)


def _inner_ear(look: Look, u: Array) -> Array:
    base = np.array(look.base, np.float32)
    skin = np.array((214, 158, 148), np.float32)
    share = 0.45 if base.sum() > 300 else 0.22
    return (skin * share + base * (1 - share)) * (0.72 + 0.25 * np.clip(u, 0, 1))[..., None]


def _tufts(image: Image.Image, ear: Part, look: Look, to_canvas: Callable[[Array], Array], unit: float) -> None:
    if not look.tufts:
        return
    tip = np.array(ear.origin) + np.array(ear.axis) * ear.length
    draw = ImageDraw.Draw(image)
    color = tuple(int(c * 0.8) for c in look.dark)
    for spread in (-0.12, 0.0, 0.12):
        end = tip + np.array(ear.axis) * 0.3 + np.array((spread, 0))
        draw.line(
            [tuple(p) for p in to_canvas(np.array([tip - np.array(ear.axis) * 0.12, end]))],
            fill=color,
            width=max(1, int(0.06 * unit)),
        )
