"""The head of a drawn cat: outline, ears, eyes, nose, mouth and whiskers, in units of the head's radius."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from demo.drawing_look import RGB, Look
from demo.drawing_pose import Part, spline

Array = np.ndarray


def head_part(look: Look) -> Part:
    """The head without ears: round or wedge-shaped, with cheeks."""
    t = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    x, y = np.sin(t) * (1.0 + 0.05 * look.flat), -np.cos(t) * (0.94 - 0.05 * look.flat)
    low = np.clip(y, 0, None)
    x = x * (1 - look.wedge * low**1.2) * (1 + look.cheek * np.exp(-(((y - 0.28) / 0.32) ** 2)))
    y = y * (1 + 0.32 * np.clip(look.wedge - 0.22, 0, None) * (y > 0))
    return Part("head", np.stack([x, y], 1), (0, 0), (1, 0), 1.0, 1.0, fur=0.55)


def ear_parts(look: Look, turn: float) -> list[tuple[Part, Part]]:
    """For each ear its outer and inner shape."""
    parts = []
    for side in (-1, 1):
        angle = np.deg2rad(37 * look.ear_spread)
        base = np.array([side * np.sin(angle), -np.cos(angle)]) * 0.86
        out = np.array([side * np.sin(angle * 0.82), -np.cos(angle * 0.82)])
        along = np.array([-out[1], out[0]]) * side
        height, half = 0.76 * look.ear_size**1.25, 0.42 * look.ear_size**0.75 * (1 - 0.12 * side * turn)
        if look.ear_bend < 0:  # the flap covers the ear and points at the eye
            height = 0.3
        tip = base + out * height + along * 0.08 * half * side
        if look.ear_bend > 0:
            tip = tip - along * 0.34 * side * side + out * 0.02
        blunt = 0.1 + 0.34 * look.ear_round
        outline = spline(
            np.array(
                [
                    base - along * half,
                    base - along * half * (0.62 + 0.3 * look.ear_round) + out * height * 0.55,
                    tip - along * half * blunt,
                    tip + along * half * blunt,
                    base + along * half * (0.66 + 0.3 * look.ear_round) + out * height * 0.5,
                    base + along * half - out * 0.1,
                    base - out * 0.35,
                ]
            ),
            48,
        )
        centre = base + out * height * 0.28
        inner = centre + (outline - centre) * 0.62
        axis = (float(out[0]), float(out[1]))
        outer = Part("ear", outline, tuple(base), axis, height, half, fur=0.1)
        parts.append((outer, Part("inner", inner, tuple(base), axis, height, half, fur=0.0)))
    return parts


class Face:
    """Draws the features of the face through a function that maps head coordinates (n, 2) to canvas pixels."""

    def __init__(
        self,
        image: Image.Image,
        look: Look,
        to_canvas: Callable[[Array], Array],
        unit: float,
        turn: float,
        rng: np.random.Generator,
    ) -> None:
        self.draw, self.look, self.to_canvas, self.unit, self.rng = (
            ImageDraw.Draw(image, "RGBA"),
            look,
            to_canvas,
            unit,
            rng,
        )
        self.turn, self.open = turn, float(np.clip(rng.normal(1.0, 0.14), 0.55, 1.2))
        self.pupil = float(rng.uniform(0.22, 0.75))

    def paint(self) -> None:
        """All features, back to front."""
        dark_face = sum(self.look.base) < 210 and self.look.pattern not in ("bicolor", "calico", "van")
        self._muzzle()
        for side in (-1, 1):
            self._eye(side)
        self._nose(dark_face)
        if self.look.coat_length != "hairless":
            self._whiskers()

    def _shape(self, points: Array, fill: tuple[int, ...]) -> None:
        self.draw.polygon([tuple(p) for p in self.to_canvas(points)], fill=fill)

    def _ellipse(
        self, centre: tuple[float, float], rx: float, ry: float, fill: tuple[int, ...], slant: float = 0.0
    ) -> None:
        t = np.linspace(0, 2 * np.pi, 28, endpoint=False)
        x, y = rx * np.cos(t), ry * np.sin(t)
        c, s = np.cos(slant), np.sin(slant)
        self._shape(np.stack([centre[0] + c * x - s * y, centre[1] + s * x + c * y], 1), fill)

    def _line(self, points: Array, fill: tuple[int, ...], width: float) -> None:
        self.draw.line(
            [tuple(p) for p in self.to_canvas(points)], fill=fill, width=max(1, round(width * self.unit)), joint="curve"
        )

    def _eye(self, side: int) -> None:
        look = self.look
        long_face = max(look.wedge - 0.2, 0)
        x, y = side * (0.44 - 0.1 * long_face) + 0.2 * self.turn, -0.06 + 0.06 * look.flat
        rx = 0.235 * (1 - 0.2 * abs(self.turn) * (np.sign(self.turn) == side)) * (1 - 0.3 * long_face)
        ry = (0.2 + 0.035 * look.flat - 0.13 * long_face) * self.open
        slant = side * -(0.16 + 0.75 * long_face - 0.12 * look.flat)
        corner = 0.04 if not look.rims else 0.065
        t = np.linspace(0, 2 * np.pi, 32, endpoint=False)
        for grow, fill in ((corner, _rgba((28, 22, 22))), (0.0, _rgba(look.eyes[0 if side < 0 else 1]))):
            ex, ey = (rx + grow) * np.cos(t), (ry + grow) * np.sin(t) * (1 - 0.25 * np.abs(np.cos(t)) ** 3)
            c, s = np.cos(slant), np.sin(slant)
            self._shape(np.stack([x + c * ex - s * ey, y + s * ex + c * ey], 1), fill)
        self._ellipse((x, y + 0.3 * ry), rx * 0.7, ry * 0.5, (*_rgba(look.eyes[0 if side < 0 else 1], 1.22)[:3], 130))
        self._ellipse((x, y), rx * self.pupil * 0.75, ry * 0.92, (14, 12, 14, 255))
        self._ellipse((x - 0.05, y - 0.35 * ry), 0.045, 0.045, (255, 255, 255, 225))

    def _muzzle(self) -> None:
        look, x = self.look, 0.28 * self.turn
        y = 0.4 - 0.12 * look.flat + 0.14 * max(look.wedge - 0.22, 0)
        pale = _rgba(look.base, 1.16 if sum(look.base) > 240 else 1.35)
        if look.pattern in ("colorpoint", "mitted", "mink", "sepia"):
            return
        for side in (-1, 1):
            self._ellipse((x + side * 0.17, y + 0.1), 0.24, 0.18, (*pale[:3], 70))
        self._ellipse((x, y + 0.3), 0.15, 0.12, (*pale[:3], 60))

    def _nose(self, dark_face: bool) -> None:
        look, x = self.look, 0.3 * self.turn
        y = 0.32 - 0.22 * look.flat + 0.2 * max(look.wedge - 0.22, 0)
        pink = (
            look.white > 0.2
            or look.rims
            or sum(look.base) > 480
            or look.color in ("red", "orange", "ruddy", "cinnamon")
        )
        color = (214, 136, 128, 255) if pink else (74, 50, 46, 255) if not dark_face else (20, 16, 16, 255)
        nose = np.array([(-0.13, -0.05), (0.0, -0.075), (0.13, -0.05), (0.05, 0.06), (0.0, 0.085), (-0.05, 0.06)])
        if look.rims:
            self._shape(nose * 1.4 + (x, y), (30, 24, 24, 255))
        self._shape(nose + (x, y), color)
        mouth = (96, 62, 58, 210) if dark_face else (70, 44, 42, 210)
        self._line(np.array([(x, y + 0.08), (x, y + 0.2)]), mouth, 0.025)
        for side in (-1, 1):
            self._line(
                spline(np.array([(x, y + 0.2), (x + side * 0.13, y + 0.27), (x + side * 0.26, y + 0.2)]), 12, False),
                mouth,
                0.025,
            )
        if look.wrinkles:
            for k in range(3):
                fold = spline(
                    np.array([(-0.45, -0.5 - 0.12 * k), (0.0, -0.42 - 0.12 * k), (0.45, -0.5 - 0.12 * k)]), 16, False
                )
                self._line(fold, (*_rgba(look.base, 0.72)[:3], 150), 0.025)

    def _whiskers(self) -> None:
        look, rng, x = self.look, self.rng, 0.28 * self.turn
        y = 0.44 - 0.15 * look.flat
        color = (250, 250, 248, 190) if sum(look.base) < 560 else (120, 112, 108, 150)
        for side in (-1, 1):
            for k in range(4):
                s = np.linspace(0, 1, 16)
                reach = rng.uniform(0.75, 1.15) * (0.7 if look.crimp else 1)
                droop = (k - 1.4) * 0.2 + rng.normal(0, 0.04)
                wave = 0.055 * look.crimp * np.sin(s * rng.uniform(14, 20)) * s
                line = np.stack(
                    [x + side * (0.26 + reach * s), y + 0.06 * (k - 1.5) + droop * s + 0.12 * s**2 + wave], 1
                )
                self._line(line, color, 0.012)


def _rgba(color: RGB, gain: float = 1.0) -> tuple[int, int, int, int]:
    r, g, b = (int(min(255, max(0, c * gain))) for c in color)
    return r, g, b, 255
