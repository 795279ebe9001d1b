"""The parameters of a run: name, type, default and meaning stated once, in frozen dataclasses.

Profiles (YAML), `-p key=value`, the notebooks' parameters cells and the options of the command line are all checked
against these. A value is an int, a float, a bool or a text, as papermill's parameters are; a list is a text with commas.
"""

import contextlib
import difflib
import json
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any, Self

from catlib.cells import bound_parameters
from catlib.errors import InputError
from catlib.files import parse_yaml, read_text
from catlib.paths import notebooks_folder, public_url, resolve

log = logging.getLogger(__name__)


def option(default: Any, help: str, choices: tuple[str, ...] = (), mapping: bool = False) -> Any:
    """A dataclass field with its meaning (units included) and, for a text, the values it may take.

    `mapping`: the text is a YAML mapping, and may be given as one.
    """
    return field(default=default, metadata={"help": help, "choices": choices, "mapping": mapping})


@dataclass(frozen=True)
class Settings:
    """Parameters that every notebook has."""

    run: str = option("", "name of the run, from which its folders follow; empty: the profile's name")
    run_dir: str = option("outputs/runs/manual", "folder that this run writes to; with a run: outputs/runs/RUN")
    seed: int = option(0, "seed of everything drawn at random")
    priority_breeds: str = option("", "breeds reported apart, comma separated; empty: the plan's seven")
    hint: str = option("", "what to do where photos or models are missing; quoted by the error")

    @classmethod
    def collect(cls, namespace: Mapping[str, Any]) -> Self:
        """A notebook's settings, from its `globals()`: its profile, with what its parameters cell and papermill set on top.

        Outside IPython the names of `namespace` that are settings count. None stands for the profile's value.
        Raises InputError on an unknown name, an ill-typed value or one that is no choice.
        """
        given = bound_parameters(namespace)
        if given is None:
            given = {name: namespace[name] for name in (PROFILE, *all_options()) if name in namespace}
        given = {name: value for name, value in given.items() if value is not None}
        idle = [name for name in given if name not in (PROFILE, *cls.names(), *SOURCES) and name in all_options()]
        if idle:
            log.warning("set, but of no effect in this notebook: %s", ", ".join(idle))
        return cls.of_profile(str(given.pop(PROFILE, "")), given)

    @classmethod
    def of_profile(cls, profile: str, given: Mapping[str, Any], where: str = "parameters") -> Self:
        """The settings of a profile (name, path, or "" for the defaults) with `given` on top, and what follows from both."""
        values = {name: value for name, value in run_parameters(profile, given, where).items() if name in cls.names()}
        for name in ("base_model", "clip_model"):
            text = values.get(name, "")
            if values.get("hint") and text.count("/") > 1 and not resolve(text).is_dir():  # no hub name has two slashes
                raise InputError(f"{name}: no such folder: {text}; {values['hint']}")
        return cls.build(values, where)

    @classmethod
    def build(cls, values: Mapping[str, Any], where: str = "parameters") -> Self:
        """Settings from a mapping as it is. Raises InputError on an unknown key, an ill-typed value or one that is no choice."""
        return cls(**_checked(values, {f.name: f for f in fields(cls)}, where))

    @classmethod
    def names(cls) -> list[str]:
        """The names of these settings, in order."""
        return [f.name for f in fields(cls)]


@dataclass(frozen=True)
class DataSettings(Settings):
    """From photos to a split that can be trusted (notebook 01, `catlib data`)."""

    photos: str = option("", "folder (or archive, or JSONL folder) of labelled photos")
    source: str = option(
        "auto", "layout of the photos", choices=("auto", "oxford-pets", "petfinder", "folders", "llava-jsonl")
    )
    data_dir: str = option("data", "folder that gets vlm/train.jsonl, vlm/val.jsonl and vlm/test.jsonl")
    breeds: str = option("", "use only these breeds, comma separated; empty: all that are found")
    unknown_breeds: str = option("keep", "a breed that is not in the list of 67", choices=("keep", "refuse"))
    val_share: float = option(0.15, "share of each breed's photos for validation")
    test_share: float = option(0.2, "share of each breed's photos for the test; an official test split replaces it")
    min_val: int = option(2, "at least so many validation photos of each breed")
    min_test: int = option(5, "at least so many test photos of each breed")
    small_breeds: str = option(
        "train", "a breed with too few different photos to be split", choices=("train", "refuse", "leave-out")
    )
    draw_test: bool = option(False, "photos divided into train and val only: draw the test part from train, by group")
    keep_split: bool = option(True, "photos keep the part that an earlier split in the same folder gave them")
    near_duplicate_bits: int = option(
        6, "photos whose 64-bit perceptual hashes differ in at most so many bits are one group"
    )
    group_by: str = option(
        "auto",
        "what else makes photos one group, joined by commas: id (in the name), numbers (near ones at the end of names), exif "
        "(camera and time), folder (below the breed's), none; auto: id, numbers after a text, exif",
    )
    join_similar: float = option(0.0, "join the pairs of similar.csv from this cosine similarity on; 0: none")
    encoder: str = option(
        "", "CLIP or VLM (folder or hub name) whose frozen features show wrong labels and near test photos; empty: none"
    )
    min_side: int = option(32, "smallest side of a usable photo, pixels")
    quality: str = option(
        "brightness<30,brightness>215,contrast<20,sharpness<1.6,entropy<4,aspect>2.5,border>0.2",
        "a photo beyond one of these limits gets a remark (brightness, contrast in grey levels; entropy in bits)",
    )
    photos_per_breed: int = option(0, "at most so many training photos of each breed; 0: all")
    answer_style: str = option("label", "what the model learns to answer", choices=("label", "label+traits"))


@dataclass(frozen=True)
class TrainSettings(Settings):
    """Fine-tuning (notebook 02, `catlib train`). The defaults are the plan's."""

    base_model: str = option("llava-hf/llava-1.5-7b-hf", "hub name or folder of the base model")
    train_data: str = option("data/vlm/train.jsonl", "training samples, LLaVA conversations")
    val_data: str = option("data/vlm/val.jsonl", "validation samples")
    output_dir: str = option(
        "outputs/vlm_checkpoints/llava-cat-breeds", "checkpoint folder: adapter, processor, model card"
    )
    mode: str = option("lora", "what is trained, and how the base is loaded", choices=("projector", "lora", "qlora"))
    train_projector: str = option(
        "none", "the projector between tower and language model", choices=("none", "full", "lora")
    )
    lora_r: int = option(32, "rank of the LoRA matrices")
    lora_alpha: int = option(0, "LoRA scale; the update is multiplied by alpha / r; 0: alpha is twice the rank")
    lora_dropout: float = option(0.05, "dropout before the LoRA matrices")
    lora_targets: str = option(
        "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj", "linear layers of the language model that get LoRA"
    )
    use_rslora: bool = option(False, "scale by alpha / sqrt(r) instead")
    use_dora: bool = option(False, "decompose weights into magnitude and direction")
    epochs: int = option(3, "passes over the training photos")
    batch_size: int = option(4, "photos in one forward pass")
    gradient_accumulation: int = option(8, "forward passes for one optimizer step")
    lr: float = option(2e-4, "peak learning rate of LoRA")
    projector_lr: float = option(2e-5, "peak learning rate of a projector trained in full")
    warmup_ratio: float = option(0.03, "share of the steps in which the learning rate rises")
    lr_schedule: str = option("cosine", "how the learning rate falls", choices=("cosine", "linear", "constant"))
    weight_decay: float = option(0.0, "AdamW weight decay")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm")
    dtype: str = option("auto", "weights of the frozen base", choices=("auto", "bfloat16", "float32"))
    device: str = option("auto", "auto: the GPU where there is one", choices=("auto", "cpu", "cuda", "mps"))
    gradient_checkpointing: bool = option(False, "recompute activations: less memory, about a third slower")
    cache_features: bool = option(True, "compute the frozen tower's features once and keep them on disk")
    cache_limit_gb: float = option(20.0, "largest size of the feature cache, GB")
    augment: bool = option(False, "light random crops, flips and colour changes; switches the feature cache off")
    balance: str = option("none", "how often rare breeds are drawn", choices=("none", "sqrt", "uniform"))
    num_workers: int = option(4, "threads that decode photos while the model works")
    log_steps: int = option(10, "optimizer steps between two log lines")
    save_steps: int = option(0, "optimizer steps between two checkpoints; 0: one an epoch")
    early_stopping: int = option(0, "stop after so many epochs without a better watched value; 0: never")
    watch: str = option("val_loss", "what best means", choices=("val_loss", "priority_f1"))
    watch_photos: int = option(64, "validation photos that are classified after each epoch")
    report_to: str = option(
        "none", "where curves go besides history.jsonl", choices=("none", "mlflow", "tensorboard", "wandb")
    )
    resume: bool = option(True, "continue an interrupted run of the same settings")
    overwrite: bool = option(False, "set a checkpoint of other settings aside as NAME~1 where it would be refused")
    trainer_args: str = option(
        "", "further options of transformers.TrainingArguments, as a YAML mapping: {optim: adafactor}", mapping=True
    )
    force: bool = option(False, "train even where the memory estimate says that it cannot fit")


@dataclass(frozen=True)
class EvaluationSettings(Settings):
    """Predictions and metrics of the VLM, untuned and tuned (notebook 03, `catlib predict`, `catlib evaluate`)."""

    base_model: str = option("llava-hf/llava-1.5-7b-hf", "hub name or folder of the base model")
    checkpoint: str = option("outputs/vlm_checkpoints/llava-cat-breeds", "adapter to evaluate")
    test_data: str = option("data/vlm/test.jsonl", "test samples")
    val_data: str = option(
        "data/vlm/val.jsonl", "validation samples: temperature and prior correction are fitted on them"
    )
    prompt: str = option("", "the question that is put to the model; empty: the one that it was trained with")
    decoding: str = option("score", "how a breed is read off the model", choices=("score", "constrained", "free"))
    score_norm: str = option("sum", "label log-likelihood: summed, or the mean of its tokens", choices=("sum", "mean"))
    prior_correction: bool = option(
        False, "subtract the scores of the prompt without a photo; strength fitted on validation"
    )
    evaluate_base: bool = option(True, "measure the untuned base model as well")
    eval_batch_size: int = option(16, "photos in one forward pass")
    max_test_photos: int = option(0, "at most so many test photos, drawn evenly over breeds; 0: all")
    quantize: bool = option(False, "load the base in 4-bit NF4")
    dtype: str = option("auto", "weights of the base", choices=("auto", "bfloat16", "float32"))
    device: str = option("auto", "auto: the GPU where there is one", choices=("auto", "cpu", "cuda", "mps"))
    bootstrap: int = option(2000, "resamples behind each 95 % interval")


@dataclass(frozen=True)
class ComparisonSettings(Settings):
    """CLIP, the linear probes, the paired comparison and the verdict (notebook 04, `catlib compare`)."""

    clip_model: str = option("openai/clip-vit-large-patch14-336", "hub name or folder; empty: no CLIP")
    clip_prompts: str = option("ensemble", "prompts for zero-shot CLIP", choices=("ensemble", "plain", "traits"))
    probe: bool = option(True, "train linear probes on frozen features of CLIP and of the VLM's own tower")
    base_model: str = option("llava-hf/llava-1.5-7b-hf", "hub name or folder of the base model")
    train_data: str = option("data/vlm/train.jsonl", "samples that the probes learn from")
    val_data: str = option("data/vlm/val.jsonl", "validation samples")
    test_data: str = option("data/vlm/test.jsonl", "test samples")
    eval_batch_size: int = option(16, "photos in one forward pass")
    max_test_photos: int = option(0, "at most so many test photos, drawn evenly over breeds; 0: all")
    dtype: str = option("auto", "weights of the models", choices=("auto", "bfloat16", "float32"))
    device: str = option("auto", "auto: the GPU where there is one", choices=("auto", "cpu", "cuda", "mps"))
    bootstrap: int = option(2000, "resamples behind each 95 % interval")
    target_priority_f1: float = option(0.5, "priority macro-F1 that counts as success")
    target_gain_points: float = option(3.0, "points of accuracy over zero-shot CLIP that count as success")
    clip_good_enough: float = option(0.8, "CLIP's accuracy on the priority breeds above which a VLM is not worth it")
    latency_budget_ms: float = option(150.0, "longest median time for one photo, milliseconds")
    clip_priority_f1: float = option(0.6, "CLIP's priority macro-F1 below which the plan says to try a VLM")
    explanations_wanted: bool = option(False, "reasons are wanted with the breed, which only the VLM gives")
    accuracy_first: bool = option(False, "accuracy outranks latency: a missed latency budget does not decide")


@dataclass(frozen=True)
class ServingSettings(Settings):
    """The tuned model in use: step by step, and the engines that can run it (notebook 05)."""

    base_model: str = option("llava-hf/llava-1.5-7b-hf", "hub name or folder of the base model")
    checkpoint: str = option("outputs/vlm_checkpoints/llava-cat-breeds", "adapter to evaluate")
    test_data: str = option("data/vlm/test.jsonl", "test samples")
    prompt: str = option("", "the question that is put to the model; empty: the one that it was trained with")
    clip_model: str = option("openai/clip-vit-large-patch14-336", "hub name or folder; empty: no CLIP")
    clip_prompts: str = option("ensemble", "prompts for zero-shot CLIP", choices=("ensemble", "plain", "traits"))
    device: str = option("auto", "auto: the GPU where there is one", choices=("auto", "cpu", "cuda", "mps"))
    serving_photos: int = option(32, "test photos that each engine is asked about, drawn evenly over breeds")
    serving_precisions: str = option(
        "bfloat16,4-bit",
        "precisions measured in this process (float32, bfloat16, 4-bit); the first is the reference",
    )
    serving_concurrency: str = option("1,4,16", "numbers of requests that are under way at the same time")
    vllm_url: str = option("", "a vLLM server with the tuned model: http://HOST:PORT/v1#MODEL; empty: not measured")
    llamacpp_url: str = option("", "a llama.cpp server with the tuned model: http://HOST:PORT/v1; empty: not measured")
    latency_budget_ms: float = option(150.0, "longest median time for one photo, milliseconds")


NOTEBOOK_SETTINGS: dict[str, type[Settings]] = {
    "01_data_inspection": DataSettings,
    "02_training": TrainSettings,
    "03_evaluation": EvaluationSettings,
    "04_clip_comparison": ComparisonSettings,
    "05_serving": ServingSettings,
}


def all_options() -> dict[str, Any]:
    """Every parameter of a run by name; a name that several notebooks share has one type and meaning."""
    return {f.name: f for cls in NOTEBOOK_SETTINGS.values() for f in fields(cls)}


PROFILE = "profile"  # the one parameter that is no setting: it chooses where the others come from
SOURCES = ("data_dir", "output_dir")  # settings from which those of other notebooks follow


def split_list(text: str) -> list[str]:
    """The entries of a comma separated text, stripped, empty ones left out."""
    return [entry.strip() for entry in text.split(",") if entry.strip()]


def derive(given: Mapping[str, Any], profile: str = "") -> dict[str, Any]:
    """`given` and the parameters that follow from it: folders from the run's name, paths of the samples from `data_dir`.

    What is given itself is left alone. `profile` is the profile's name, which names the run where `run` does not.
    """
    values = dict(given)
    if run := given.get("run") or profile:
        if run.startswith(".") or any(letter in '/\\"<>|:*?\0' for letter in run):
            raise InputError(f"run {run!r}: a run's name becomes a folder; use letters, digits, '-', '_', '=' and '.'")
        values["run"] = run
        values.setdefault("run_dir", f"outputs/runs/{run}")
        values.setdefault("output_dir", f"outputs/vlm_checkpoints/{run}")
    if "output_dir" in values:
        values.setdefault("checkpoint", values["output_dir"])
    if "data_dir" in values:
        for part in ("train", "val", "test"):
            values.setdefault(f"{part}_data", str(PurePosixPath(values["data_dir"]) / "vlm" / f"{part}.jsonl"))
    return values


def run_parameters(profile: str, given: Mapping[str, Any], where: str = "parameters") -> dict[str, Any]:
    """All that is set for a run, by name: the profile's values (see `find_profile`; "": none), `given` on top, what follows."""
    given = _checked(given, all_options(), where)
    if not profile:
        return derive(given)
    path = find_profile(profile)
    return derive(read_profile(path) | given, path.stem)


def find_profile(name: str) -> Path:
    """The file of a profile given by name or by path. Raises InputError that lists the profiles."""
    folder = notebooks_folder() / "profiles"
    if name.endswith((".yaml", ".yml")) or "/" in name:
        for path in (Path(name).expanduser(), resolve(name)):
            if path.is_file():
                return path
    elif (path := folder / f"{name}.yaml").is_file():
        return path
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    known = ", ".join(names) or "none"
    raise InputError(f"no profile {name!r}{did_you_mean(name, names)}; there are {known} in {folder}, or give a path")


def read_profile(path: Path) -> dict[str, Any]:
    """The parameters in a profile, validated. Raises InputError naming the file and the key."""
    values = parse_yaml(read_text(path), str(path))
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected lines 'key: value'")
    return _checked(values, all_options(), str(path))


def parse_assignment(text: str) -> tuple[str, Any]:
    """`key=value` from the command line, the value typed as the parameter is. Raises InputError."""
    key, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"-p {text}: expected key=value")
    return key.strip(), parse_value(_known(key.strip(), all_options(), "-p"), value.strip(), "-p")


def parse_value(option_field: Any, text: str, where: str) -> Any:
    """A parameter's value from text, typed as the parameter is."""
    if option_field.type is str:
        return check_value(option_field, text, where)
    try:
        value = parse_yaml(text, where)
    except InputError:
        value = text
    return check_value(option_field, value, where)


def check_value(option_field: Any, value: Any, where: str) -> Any:
    """`value` as the parameter's type, among its choices; else an InputError.

    What YAML and papermill read differently than it was meant is converted: 2e-4 from text to a number, a whole number
    to a float, and one that stands for a text (`serving_concurrency: 4`) to that.
    """
    kind, choices = option_field.type, option_field.metadata.get("choices", ())
    if option_field.metadata.get("mapping") and isinstance(value, dict):
        value = json.dumps(value)
    with contextlib.suppress(ValueError, OverflowError):
        if (kind is float and type(value) in (int, str)) or (kind is str and type(value) is int):
            value = kind(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        name = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}[kind]
        raise InputError(
            f"{where}: {option_field.name} must be {name}, found {value!r} ({option_field.metadata['help']})"
        )
    if kind is str and value and (option_field.name.endswith("_url") or "://" in value):
        public_url(value, f"{where}: {option_field.name}", option_field.name.endswith("_url"))
    if choices and value not in choices:
        raise InputError(f"{where}: {option_field.name} must be one of {', '.join(choices)}; found {value!r}")
    return value


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """ " (did you mean NAME?)" with the nearest of `names`; empty where none is near."""
    close = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _checked(values: Mapping[str, Any], known: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {key: check_value(_known(str(key), known, where), value, where) for key, value in values.items()}


def _known(key: str, known: Mapping[str, Any], where: str) -> Any:
    if key in known:
        return known[key]
    near = did_you_mean(key, known) or f"; the valid ones are {', '.join(sorted(known))}"
    raise InputError(f"{where}: unknown parameter {key!r}{near}")
