"""Around a drawn cat: a room or garden behind it, and the camera's light, haze, blur and grain over all."""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Array = np.ndarray
WALLS = (
    (222, 214, 200),
    (186, 196, 204),
    (206, 190, 168),
    (150, 160, 150),
    (120, 124, 134),
    (226, 226, 224),
    (170, 140, 120),
    (88, 92, 104),
)
FLOORS = (
    (150, 110, 76),
    (186, 160, 130),
    (112, 88, 70),
    (196, 192, 186),
    (120, 124, 128),
    (150, 88, 80),
    (96, 104, 122),
    (210, 196, 170),
)
GRASS = ((104, 136, 66), (132, 150, 84), (84, 116, 62), (150, 140, 96))
SKIES = ((184, 206, 224), (206, 214, 216), (112, 138, 104), (150, 170, 140))


def draw_scene(size: int, ground: float, foot: Array, unit: float, rng: np.random.Generator) -> Image.Image:
    """A background (size, size) with its floor's edge near the cat's ground and the cat's shadow at `foot`."""
    indoors = rng.random() < 0.65
    far, near = (WALLS, FLOORS) if indoors else (SKIES, GRASS)
    wall, floor = (_vary(choices[rng.integers(len(choices))], rng, 10) for choices in (far, near))
    horizon = int(np.clip(ground - rng.uniform(0.1, 2.2) * unit, 0.1 * size, 0.97 * size))
    image = Image.new("RGB", (size, size), wall)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, horizon, size, size), fill=floor)
    for _ in range(rng.integers(1, 5)):
        (_furniture if indoors else _bush)(draw, size, horizon, rng)
    if indoors and rng.random() < 0.45:
        _cushion(draw, size, ground, unit, rng)
    image = image.filter(ImageFilter.BoxBlur(size * rng.uniform(0.004, 0.022)))
    mottle = Image.fromarray((rng.normal(0, 1, (9, 9)) * 6 + 128).clip(0, 255).astype(np.uint8)).resize(
        (size, size), Image.Resampling.BICUBIC
    )
    pixels = np.asarray(image, np.float32) + (np.asarray(mottle, np.float32) - 128)[..., None]
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    shadow = Image.new("L", (size, size), 0)
    width, height = 2.1 * unit, 0.35 * unit
    ImageDraw.Draw(shadow).ellipse(
        (foot[0] - width, foot[1] - height, foot[0] + width, foot[1] + height), fill=int(rng.uniform(60, 150))
    )
    shadow = shadow.filter(ImageFilter.BoxBlur(0.3 * unit))
    image.paste(tuple(int(c * 0.25) for c in floor), (0, 0), shadow)
    return image


def expose(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The camera: exposure, contrast, colour of the light, uneven light, softness, grain."""
    size = image.width
    if rng.random() < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.8)))
    pixels = np.asarray(image, np.float32) / 255
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    direction = rng.normal(0, 0.09, 2)
    uneven = 1 + direction[0] * ramp[None, :, None] + direction[1] * ramp[:, None, None]
    warmth = rng.normal(0, 0.03)
    light = np.array((1 + warmth, 1 + rng.normal(0, 0.015), 1 - warmth), np.float32) * float(np.exp(rng.normal(0, 0.1)))
    pixels = pixels * uneven * light
    pixels = (pixels - 0.5) * float(rng.uniform(0.82, 1.12)) + 0.5
    pixels = pixels + rng.normal(0, rng.uniform(0.004, 0.022), pixels.shape)
    return Image.fromarray((pixels.clip(0, 1) * 255).astype(np.uint8))


def _vary(color: tuple[int, int, int], rng: np.random.Generator, spread: float) -> tuple[int, int, int]:
    r, g, b = (int(np.clip(c + rng.normal(0, spread), 0, 255)) for c in color)
    return r, g, b


def _furniture(draw: ImageDraw.ImageDraw, size: int, horizon: int, rng: np.random.Generator) -> None:
    """A window, picture, shelf or sofa: a plain box against the wall."""
    width, height = (rng.uniform(0.12, 0.5, 2) * size).astype(int)
    x = int(rng.uniform(-0.1, 0.95) * size)
    bottom = horizon if rng.random() < 0.6 else int(rng.uniform(0.15, 0.7) * horizon)
    palette = (*WALLS, *FLOORS)
    draw.rectangle((x, bottom - height, x + width, bottom), fill=_vary(palette[rng.integers(len(palette))], rng, 12))


def _bush(draw: ImageDraw.ImageDraw, size: int, horizon: int, rng: np.random.Generator) -> None:
    x, radius = rng.uniform(0, 1) * size, rng.uniform(0.08, 0.3) * size
    color = _vary(GRASS[rng.integers(len(GRASS))], rng, 18)
    draw.ellipse((x - radius, horizon - radius, x + radius, horizon + 0.5 * radius), fill=color)


def _cushion(draw: ImageDraw.ImageDraw, size: int, ground: float, unit: float, rng: np.random.Generator) -> None:
    width, top = rng.uniform(2.2, 3.4) * unit, ground - rng.uniform(0.1, 0.7) * unit
    color = _vary(FLOORS[rng.integers(len(FLOORS))], rng, 16)
    draw.rounded_rectangle(
        (size / 2 - width, top, size / 2 + width, ground + 1.0 * unit), radius=int(0.3 * unit), fill=color
    )
