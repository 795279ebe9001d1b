"""What the models of a run are called in figures and in sentences."""

TUNED, UNTUNED, ZERO_SHOT = "vlm-tuned", "vlm-base", "clip-zero-shot"
PROBES = ("clip-probe", "tower-probe")
ORDER = (TUNED, UNTUNED, ZERO_SHOT, *PROBES)
_SHORT = {
    UNTUNED: "VLM, untuned",
    TUNED: "VLM, tuned",
    ZERO_SHOT: "CLIP, zero-shot",
    "clip-probe": "CLIP, linear probe",
    "tower-probe": "VLM tower, linear probe",
}
_TITLES = {
    UNTUNED: "the untuned VLM",
    TUNED: "the tuned VLM",
    ZERO_SHOT: "zero-shot CLIP",
    "clip-probe": "the linear probe on CLIP features",
    "tower-probe": "the linear probe on the VLM's own tower",
}


def short(name: str) -> str:
    """A model's name in a legend or a table."""
    return _SHORT.get(name, name)


def title(name: str, *, first: bool = False) -> str:
    """A model's name in a sentence; `first`: at its beginning."""
    text = _TITLES.get(name, name)
    return capitalise(text) if first and name in _TITLES else text


def capitalise(text: str) -> str:
    """The text with its first letter large."""
    return text[:1].upper() + text[1:]


def ordered(names: list[str]) -> list[str]:
    """The usual five in their usual order, then the others by name."""
    return sorted(names, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
