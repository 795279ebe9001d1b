"""The compared models, one entry each: a classifier is added by its module and an entry here.

Predictions, metrics, figures and the verdict iterate over them and know nothing else that is particular to a model.
"""

import gc
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from catlib.colors import BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY
from catlib.data.records import Sample
from catlib.errors import InputError
from catlib.settings import DECODINGS, ComparisonSettings, EvaluationSettings, split_list

if TYPE_CHECKING:
    from catlib.classifiers.base import Classifier
    from catlib.classifiers.further import PhotoSet
    from catlib.vlm.checkpoint import VLM, Checkpoint

Role = Literal["candidate", "baseline", "opponent"]
TUNED, UNTUNED, ZERO_SHOT = "vlm-tuned", "vlm-base", "clip-zero-shot"
UNKNOWN = "unknown"  # the set of photos of none of the breeds


@dataclass(frozen=True)
class Bench:
    """The photos of an evaluation and where its predictions go. `train` is empty where nothing is fitted.

    `checkpoint`: the tuned VLM, where the settings name one; nothing of it is loaded.
    """

    run_dir: Path
    image_root: Path
    breeds: tuple[str, ...]
    priority: tuple[str, ...]
    train: tuple[Sample, ...]
    val: tuple[Sample, ...]
    test: tuple[Sample, ...]
    checkpoint: "Checkpoint | None" = None
    further: "tuple[PhotoSet, ...]" = ()
    _loaded: dict[Hashable, Any] = field(default_factory=dict, compare=False)

    def summary(self) -> str:
        """What is tested, in a sentence or two: photos, breeds, and what differs from the training."""
        rare = ", ".join(self.priority) or "none"
        said = f"{len(self.test)} test photos of {len({s.breed for s in self.test})} breeds; priority breeds: {rare}."
        return " ".join([said, *(f"{remark}." for remark in (self.checkpoint.remarks if self.checkpoint else ()))])

    def model(self, key: Hashable, load: Callable[[], Any]) -> Any:
        """The one large model in memory: what goes by `key`, loaded after the memory of another one is given back."""
        if key not in self._loaded:
            self.free()
            self._loaded[key] = load()
        return self._loaded[key]

    def free(self) -> None:
        """Give back the memory of the model. Whoever still refers to it keeps it alive."""
        import torch

        self._loaded.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class Track:
    """A model that is compared. `short`: in legends and tables; `title`: in a sentence.

    `role`: candidate (the VLM, tuned or not), baseline (it learns nothing from the photos) or opponent (it learns from the
    same training photos). `make` gives the classifier, or None where the settings leave it out. `of`: the track whose model this
    one reads in another way: no rival of it, but a choice of how to run it.
    """

    name: str
    short: str
    title: str
    color: str = GREY
    marker: str = "X"
    role: Role = "opponent"
    make: Callable[[Bench, Any], "Classifier | None"] | None = None
    of: str = ""

    @property
    def first(self) -> str:
        """The title at the beginning of a sentence; a name that stands for itself stays as it is."""
        return self.title if self.title == self.name else self.title[:1].upper() + self.title[1:]


def find_vlm(settings: EvaluationSettings, breeds: Sequence[str], tuned: bool = True) -> "Checkpoint":
    """The checkpoint that the settings name, or (`tuned` False) its base, asked the same question."""
    from catlib.vlm.checkpoint import find_checkpoint

    base, question = settings.base_model, settings.prompt
    return find_checkpoint(settings.checkpoint, base_model=base, question=question, breeds=breeds, tuned=tuned)


def load_vlm(bench: Bench, settings: EvaluationSettings, tuned: bool = True) -> "VLM":
    """The VLM of `find_vlm`, in memory until another model is asked for."""
    from catlib.vlm.checkpoint import open_vlm

    found, precision = find_vlm(settings, bench.breeds, tuned), "4-bit" if settings.quantize else settings.dtype
    key, device = ("vlm", found.base, found.adapter), settings.device
    return bench.model(key, lambda: open_vlm(found, device=device, precision=precision))


def make_reading(decoding: str, bench: Bench, settings: EvaluationSettings) -> "Classifier | None":
    """The tuned VLM, read in another way than the settings' own `decoding`."""
    from catlib.classifiers.vlm import VLMClassifier

    wanted = split_list(settings.further_decodings)
    if unknown := set(wanted) - set(DECODINGS):
        raise InputError(f"further_decodings: {', '.join(sorted(unknown))}: expected some of {', '.join(DECODINGS)}")
    if decoding == settings.decoding or decoding not in wanted:
        return None
    vlm = load_vlm(bench, settings)
    return VLMClassifier(vlm, bench.breeds, decoding, name=f"{TUNED}-{decoding}")


def make_vlm(tuned: bool, bench: Bench, settings: EvaluationSettings) -> "Classifier | None":
    """The VLM with or without its adapter."""
    from catlib.classifiers.vlm import VLMClassifier, fit_prior

    if not tuned and not settings.evaluate_base:
        return None
    vlm, name = load_vlm(bench, settings, tuned), TUNED if tuned else UNTUNED
    classifier = VLMClassifier(vlm, bench.breeds, settings.decoding, settings.score_norm, name=name)
    if settings.prior_correction and settings.decoding == "score":
        fit_prior(classifier, bench.val, bench.image_root, settings.eval_batch_size)
    return classifier


def make_zero_shot(bench: Bench, settings: ComparisonSettings) -> "Classifier | None":
    """CLIP without any training."""
    from catlib.classifiers.clip import ClipZeroShot

    if not settings.clip_model:
        return None
    encoder = _encoder("clip", bench, settings)
    if settings.clip_prompts == "auto":
        return ClipZeroShot.choose(encoder, bench.breeds, bench.val, bench.image_root, ZERO_SHOT)
    return ClipZeroShot(encoder, bench.breeds, settings.clip_prompts, name=ZERO_SHOT)


def make_probe(name: str, kind: str, bench: Bench, settings: ComparisonSettings) -> "Classifier | None":
    """A classifier that learns on frozen features, CLIP's or the tower's, of the training photos. `kind`: of opponents.KINDS."""
    from catlib.classifiers.opponents import KINDS
    from catlib.classifiers.probe import Probe

    wanted = split_list(settings.opponents) if settings.probe else []
    if unknown := set(wanted) - {*KINDS, "lora"}:
        raise InputError(f"opponents: {', '.join(sorted(unknown))}: expected some of {', '.join(KINDS)}, lora")
    source = name.partition("-")[0]
    named = {"clip": settings.clip_model, "dino": settings.dino_model}.get(source, settings.base_model)
    if kind not in wanted or not named:
        return None
    if kind == "lora":
        return _tuned_clip(bench, settings)
    extractor = _encoder(source, bench, settings)
    if kind == "projection" and getattr(extractor, "projection", None) is None:
        return None  # SigLIP has none
    about: dict[str, Any] = {"seed": settings.seed, "kind": kind, "balance": settings.balance}
    about["batch_size"] = settings.eval_batch_size
    return Probe.fit(extractor, bench.breeds, bench.train, bench.image_root, name, **about)


def _tuned_clip(bench: Bench, settings: ComparisonSettings) -> "Classifier":
    from catlib.classifiers.clip import ClipZeroShot
    from catlib.classifiers.clip_lora import tuned_clip

    clip = ClipZeroShot(_encoder("clip", bench, settings, "lora"), bench.breeds, settings.clip_prompts, "clip-lora")
    folder = bench.run_dir / "probes/clip-lora"
    return tuned_clip(clip, bench.train, bench.image_root, folder, settings.seed, settings.balance)


def _encoder(source: str, bench: Bench, settings: ComparisonSettings, use: str = "") -> Any:
    """CLIP, DINOv2 or the VLM's tower, in memory until another model, or the same for another `use`, is asked for."""
    from catlib.classifiers.encoder import ClipEncoder, DinoEncoder, TowerEncoder
    from catlib.vlm.checkpoint import open_vlm

    name, device, dtype = settings.clip_model, settings.device, settings.dtype
    if source == "clip":
        return bench.model((source, name, use), lambda: ClipEncoder.load(name, device, dtype))
    if source == "dino":
        return bench.model((source, settings.dino_model), lambda: DinoEncoder.load(settings.dino_model, device, dtype))
    base = settings.base_model
    return bench.model((source, base), lambda: TowerEncoder(open_vlm(base, device=device, precision=dtype)))


def _reading(decoding: str, said: str, short: str, marker: str) -> Track:
    name, made = f"{TUNED}-{decoding}", partial(make_reading, decoding)
    return Track(name, f"VLM, tuned, {short}", f"the tuned VLM {said}", BLUE, marker, "candidate", made, TUNED)


def _probe(name: str, kind: str, short: str, title: str, marker: str) -> Track:
    color = {"clip": RED, "dino": PINK}.get(name.partition("-")[0], GREEN)
    return Track(name, short, title, color, marker, "opponent", partial(make_probe, name, kind))


TRACKS = (
    Track(TUNED, "VLM, tuned", "the tuned VLM", BLUE, "o", "candidate", partial(make_vlm, True)),
    _reading("constrained", "held to the list of breeds", "held to the list", "P"),
    _reading("free", "in its own words", "in its own words", "X"),
    Track(UNTUNED, "VLM, untuned", "the untuned VLM", SKY, "v", "candidate", partial(make_vlm, False)),
    Track(ZERO_SHOT, "CLIP, zero-shot", "zero-shot CLIP", ORANGE, "s", "baseline", make_zero_shot),
    _probe("clip-probe", "linear", "CLIP, linear probe", "the linear probe on CLIP features", "D"),
    _probe("clip-knn", "knn", "CLIP, neighbours", "nearest neighbours on CLIP features", "p"),
    _probe("clip-tip", "tip-adapter", "CLIP, Tip-Adapter", "Tip-Adapter on CLIP", "h"),
    _probe("clip-projection", "projection", "CLIP, tuned projection", "CLIP with its projection tuned", "*"),
    _probe("clip-lora", "lora", "CLIP, LoRA", "CLIP tuned by LoRA", "d"),
    _probe("tower-probe", "linear", "VLM tower, linear probe", "the linear probe on the VLM's own tower", "^"),
    _probe("tower-knn", "knn", "VLM tower, neighbours", "nearest neighbours on the VLM's own tower", "<"),
    _probe("dino-probe", "linear", "DINOv2, linear probe", "the linear probe on DINOv2 features", ">"),
    _probe("dino-knn", "knn", "DINOv2, neighbours", "nearest neighbours on DINOv2 features", "H"),
)
_BY_NAME = {entry.name: entry for entry in TRACKS}


def track(name: str) -> Track:
    """The entry of a model; one that is not listed goes by its name, in grey."""
    return _BY_NAME.get(name) or Track(name, name, name)


def ordered(names: Iterable[str]) -> list[str]:
    """The listed models in the order of the list, then the others by name."""
    place = {name: i for i, name in enumerate(_BY_NAME)}
    return sorted(names, key=lambda name: (place.get(name, len(place)), name))


def tracks_of(*roles: Role) -> list[Track]:
    """The listed models that have one of these roles, further readings left out."""
    return [entry for entry in TRACKS if entry.role in roles and not entry.of]


def names_of(*roles: Role) -> tuple[str, ...]:
    """Their names."""
    return tuple(entry.name for entry in tracks_of(*roles))
