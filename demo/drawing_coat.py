"""The coat of a drawn cat: base, markings, points and white spotting as a colour for every pixel of a body part.

A part has coordinates of its own, in units of the head's radius: `u` runs along it (spine, leg from top to paw, tail
from root to tip), `v` across (body: -1 the back, 1 the belly; head: -1 the crown, 1 the chin,
with u from -1 to 1 across
the face).
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from demo.drawing_look import Look

Array = np.ndarray
WHITE = np.array((243, 241, 237), np.float32)
POINTED = ("colorpoint", "mitted", "mink", "sepia")
STRIPED = ("tabby", "classic tabby", "mackerel tabby", "torbie")
PALE = {"ear": 0.15, "tail": 0.3, "leg": 0.1}


@dataclass(frozen=True)
class Noise:
    """Smooth random fields over the canvas (size, size), about -1 to 1: patches, blotches, tufts, single hairs."""

    broad: Array
    blotch: Array
    tuft: Array
    hair: Array

    @classmethod
    def make(cls, size: int, rng: np.random.Generator) -> "Noise":
        def smooth(cells: int) -> Array:
            grid = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
            return np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC))

        return cls(smooth(5), smooth(13), smooth(40), smooth(110))

    def crop(self, box: tuple[int, int, int, int]) -> "Noise":
        """The fields in a box (left, top, right, bottom)."""
        left, top, right, bottom = box
        return Noise(*(f[top:bottom, left:right] for f in (self.broad, self.blotch, self.tuft, self.hair)))


def paint(look: Look, kind: str, u: Array, v: Array, noise: Noise) -> Array:
    """Colours (h, w, 3) of a part of the given kind: body, head, leg, tail or ear."""
    base, dark = np.array(look.base, np.float32), np.array(look.dark, np.float32)
    second = np.array(look.second, np.float32)
    if look.pattern in POINTED:
        color = _points(look, kind, u, v, noise)
    elif look.pattern == "tortoiseshell":
        color = _mix(base, second, _step(noise.blotch + 0.6 * noise.tuft, 0.15, 0.25))
    elif look.pattern == "calico":
        warm = look.second[0] - look.second[2] > 100  # orange goes with black, cream with blue-grey
        color = _mix(
            np.array((46, 44, 46), np.float32) if warm else _blue_grey(base),
            second,
            _step(noise.broad + 0.2 * noise.blotch, 0.0, 0.12),
        )
    elif look.pattern == "torbie":
        color = _mix(base, second, _step(noise.blotch + 0.3 * noise.tuft, 0.1, 0.3))
        color = _mix(color, dark, 0.85 * _stripes(look, kind, u, v, noise))
    elif look.pattern == "tuxedo":
        color = _mix(np.array((40, 38, 40), np.float32), np.array((58, 54, 56), np.float32), 0.3 * (noise.broad + 1))
    elif look.pattern == "van":
        color = _mix(_patch(look, base), _patch(look, dark), 0.3 * (noise.blotch + 1))
    else:
        pale = _mix(base, WHITE, 0.4 * _belly(kind, v) * (look.pattern not in ("solid", "bicolor")))
        color = _mix(pale, dark, _marks(look, kind, u, v, noise))
    color = _mix(color, WHITE, _white(look, kind, u, v, noise))
    return color * _texture(look, u, v, noise)[..., None]


def _patch(look: Look, color: Array) -> Array:
    return np.array(look.second, np.float32) if look.color == "white" else color


def _blue_grey(base: Array) -> Array:
    return np.array((120, 128, 140), np.float32) * float(base.mean() / 238)


def _mix(a: Array, b: Array, share: Array | float) -> Array:
    share = np.clip(np.asarray(share, np.float32), 0, 1)[..., None]
    return a * (1 - share) + b * share


def _step(x: Array, edge: float, soft: float) -> Array:
    return np.clip((x - edge) / soft + 0.5, 0, 1)


def _belly(kind: str, v: Array) -> Array:
    return _step(v, 0.55, 0.7) if kind in ("body", "head") else np.zeros_like(v)


def _points(look: Look, kind: str, u: Array, v: Array, noise: Noise) -> Array:
    """Pale body, coloured ears, face, legs and tail; less contrast in mink and sepia coats."""
    dark = np.array(look.base, np.float32)
    contrast = {"mink": 0.6, "sepia": 0.32}.get(look.pattern, 1.0)
    body = _mix(dark, np.array((236, 222, 200), np.float32), 0.92 * contrast)
    if kind in ("ear", "tail"):
        return _mix(body, dark, np.full_like(u, 0.95))
    if kind == "leg":
        return _mix(body, dark, _step(u + 0.1 * noise.blotch, 0.55, 0.6))
    if kind == "head":
        mask = np.exp(-((u / 0.6) ** 2 + ((v - 0.3) / 0.62) ** 2) * 1.2)
        return _mix(body, dark, 1.05 * mask + 0.08 * noise.blotch)
    return _mix(body, dark, 0.12 * _step(-v, 0.4, 0.8) + 0.03 * noise.broad)


def _marks(look: Look, kind: str, u: Array, v: Array, noise: Noise) -> Array:
    """How much of the marking colour shows, 0 to 1."""
    pattern = look.pattern
    if pattern in STRIPED:
        return 0.92 * _stripes(look, kind, u, v, noise)
    if pattern == "spotted":
        if kind != "body":
            return 0.85 * _stripes(look, kind, u, v, noise)
        row = 2 * np.pi * 1.35
        spots = np.sin(row * u + 1.3 * noise.blotch) * np.sin(
            row * 0.9 * v + 0.8 * np.sin(row * 0.5 * u) + noise.blotch
        )
        return 0.9 * _step(spots, 0.35, 0.25) * (1 - 0.7 * _belly(kind, v))
    if pattern == "marbled":
        swirl = np.sin(2 * np.pi * (0.5 * u + 1.1 * v + 0.55 * noise.blotch))
        return 0.9 * _step(np.abs(swirl), 0.72, 0.3) if kind == "body" else 0.85 * _stripes(look, kind, u, v, noise)
    if pattern == "ticked":
        spine = 0.3 * _step(-v, 0.45, 0.8) if kind in ("body", "head") else 0.1
        tip = _step(u, 0.85, 0.2) if kind == "tail" else 0
        return np.clip(0.24 + spine + 0.3 * noise.hair, 0, 0.8) + 0.6 * tip
    if pattern in ("tipped", "shaded"):
        veil = 0.16 if pattern == "tipped" else 0.36
        top = _step(-v, 0.1, 1.4) if kind in ("body", "head") else np.full_like(u, 0.5)
        return veil * (0.3 + 1.3 * top) * (1 + 0.6 * noise.hair + 0.25 * noise.tuft)
    if pattern == "smoke":
        return 0.75 - 0.6 * _belly(kind, v) + 0.12 * noise.tuft
    return np.clip(0.16 + 0.14 * noise.broad + PALE.get(kind, 0.0), 0, 0.5)


def _stripes(look: Look, kind: str, u: Array, v: Array, noise: Noise) -> Array:
    """Tabby markings: stripes or a bull's-eye on the body, rings on legs and tail, M and cheek lines on the head."""
    warp = 0.16 * noise.blotch + 0.05 * noise.tuft
    if kind == "head":
        crown = _step(np.sin(2 * np.pi * (1.55 * u + 0.25 + warp)), 0.25, 0.5) * _step(-v, 0.22, 0.25)
        cheek = _step(np.sin(2 * np.pi * (1.6 * v + 0.5 * np.abs(u) + warp)), 0.4, 0.5) * _step(np.abs(u), 0.6, 0.2)
        return np.maximum(crown, cheek * _step(v, -0.1, 0.2))
    if kind == "ear":
        return np.full_like(u, 0.3)
    if kind in ("leg", "tail"):
        ring = _step(np.sin(2 * np.pi * (2.6 * u + 0.5 * warp)), 0.2, 0.5)
        tip = _step(u, 0.86, 0.15) if kind == "tail" else 0
        return np.maximum(ring if kind == "leg" or look.ringed else 0.4 * ring, tip)
    flank = 1 - 0.75 * _belly(kind, v)
    spine = _step(-v, 0.78, 0.2)
    if look.pattern == "classic tabby":
        eye = np.sqrt((u + 0.4) ** 2 + (1.2 * v) ** 2)
        return np.maximum(_step(np.sin(2 * np.pi * (1.15 * eye + 1.5 * warp)), 0.1, 0.4), spine) * flank
    pitch = 1.9 if look.pattern == "mackerel tabby" else 1.35
    return np.maximum(_step(np.sin(2 * np.pi * (pitch * u + 0.22 * v**2 + warp)), 0.25, 0.5), spine) * flank


def _white(look: Look, kind: str, u: Array, v: Array, noise: Noise) -> Array:
    """White spotting, which starts at paws, chest and muzzle and climbs as `look.white` grows."""
    if look.white <= 0:
        return np.zeros_like(u)
    w, ragged = look.white, 0.14 * noise.blotch
    if kind == "leg":
        return _step(u + ragged, 1 - 1.5 * w, 0.1)
    if kind == "ear":
        return np.zeros_like(u)
    if look.pattern == "mitted":
        return np.zeros_like(u) if kind in ("head", "tail") else _step(v + ragged, 0.8, 0.15)
    if look.pattern == "van":
        return (
            _step(v + ragged, -0.3, 0.15) + (np.abs(u) < 0.16)
            if kind == "head"
            else np.full_like(u, float(kind == "body"))
        )
    if kind == "tail":
        return _step(u + ragged, 1.02 - 0.3 * w, 0.1) if look.pattern != "tuxedo" else np.zeros_like(u)
    if kind == "head":
        blaze = 0.1 + 0.75 * w * np.clip(0.5 + v, 0.1, 1.2)
        return _step(blaze - np.abs(u + 0.25 * noise.broad * w) + 0.5 * ragged, 0.06, 0.1)
    calico = 0.5 * noise.broad if look.pattern == "calico" else 0.3 * noise.broad
    return _step(v + ragged + calico, 0.95 - 1.7 * w, 0.12)


def _texture(look: Look, u: Array, v: Array, noise: Noise) -> Array:
    """Brightness of the hair: fine in a short coat, in locks when long, waves when crimped, folds on bare skin."""
    if look.coat_length == "hairless":
        folds = np.sin(2 * np.pi * (1.7 * v + 0.35 * u + 0.4 * noise.blotch))
        return 1 - 0.13 * look.wrinkles * _step(folds, 0.75, 0.4) + 0.015 * noise.hair
    texture = 1 + 0.045 * noise.hair + 0.085 * look.fur * noise.tuft
    if look.crimp:
        waves = np.sin(2 * np.pi * (3.4 * u + 1.1 * noise.tuft)) * np.sin(2 * np.pi * (2.6 * v + 0.9 * noise.blotch))
        texture = texture + 0.22 * look.crimp * waves
    return texture
