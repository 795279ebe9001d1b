"""The demo's models, by path."""

from demo.tiny_models import MODELS

LLAVA, CLIP = str(MODELS / "llava"), str(MODELS / "clip")
