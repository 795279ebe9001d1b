"""The parameters of a run: name, type, default, range and meaning stated once, in frozen dataclasses.
A value is an int, a float, a bool or a text, as papermill's parameters are; a list is a text with commas.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Self

from catlib.cells import bound_parameters
from catlib.errors import InputError
from catlib.files import parse_yaml, read_text
from catlib.parameters import checked, did_you_mean, known_option, option, parse_value
from catlib.paths import RUNS, notebooks_folder, resolve

PROFILE = "profile"  # the one parameter that is no setting: it chooses where the others come from
DECODINGS = ("score", "constrained", "free")  # how a breed is read off a model
PROMPTS = ("ensemble", "plain", "traits", "descriptions")  # sentences for a breed (see catlib.classifiers.clip)
SWITCH, ATTENTION = ("auto", "true", "false"), ("auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3")
DEVICES = ("auto", "cpu", "cuda", "cuda:N", "mps")
LINEAR = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
SOURCES = ("data_dir", "output_dir")  # settings from which those of other notebooks follow


@dataclass(frozen=True)
class Settings:
    """Parameters that every notebook has."""

    run: str = option("", "name of the run, from which its folders follow; empty: the profile's name")
    run_dir: str = option(f"{RUNS}/manual", "folder that this run writes to; with a run: outputs/runs/RUN")
    seed: int = option(0, "seed of everything drawn at random")
    priority_breeds: str = option("", "breeds reported apart, comma separated; empty: the plan's seven")
    hint: str = option("", "what to do where photos or models are missing; quoted by the error")

    @classmethod
    def collect(cls, namespace: Mapping[str, Any]) -> Self:
        """A notebook's settings, from its `globals()`: its profile, with what its parameters cell and papermill set on top.

        Outside IPython the names of `namespace` that are settings count. None stands for the profile's value. Raises InputError.
        """
        known, bound = all_options(), bound_parameters(namespace)
        if bound is None:
            bound = {name: namespace[name] for name in (PROFILE, *known) if name in namespace}
        given = {name: value for name, value in bound.items() if value is not None}
        if idle := [name for name in given if name in known and name not in (*cls.names(), *SOURCES)]:
            logging.getLogger(__name__).warning("set, but of no effect in this notebook: %s", ", ".join(idle))
        return cls.of_profile(str(given.pop(PROFILE, "")), given)

    @classmethod
    def of_profile(cls, profile: str, given: Mapping[str, Any], where: str = "parameters") -> Self:
        """The settings of a profile (name, path, or "" for the defaults) with `given` on top, and what follows from both."""
        values = {key: value for key, value in run_parameters(profile, given, where).items() if key in cls.names()}
        for name in ("base_model", "clip_model", "dino_model"):
            text = values.get(name, "")
            if values.get("hint") and text.count("/") > 1 and not resolve(text).is_dir():  # no hub name has two slashes
                raise InputError(f"{name}: no such folder: {text}; {values['hint']}")
        return cls.build(values, where)

    @classmethod
    def build(cls, values: Mapping[str, Any], where: str = "parameters") -> Self:
        """Settings from a mapping as it is. Raises InputError on an unknown key, an ill-typed value or one that is no choice."""
        return cls(**checked(values, cls.__dataclass_fields__, where))

    @classmethod
    def names(cls) -> list[str]:
        return [*cls.__dataclass_fields__]


@dataclass(frozen=True)
class DataSettings(Settings):
    """From photos to a split that can be trusted (notebook 01, `catlib data`)."""

    photos: str = option("", "folder (or archive, or JSONL folder) of labelled photos")
    source: str = option("auto", "layout of the photos", "auto", "oxford-pets", "petfinder", "folders", "llava-jsonl")
    data_dir: str = option("data", "folder that gets vlm/train.jsonl, vlm/val.jsonl and vlm/test.jsonl")
    breeds: str = option("", "use only these breeds, comma separated; empty: all that are found")
    unknown_breeds: str = option("keep", "a breed that is not in the list of 67", "keep", "refuse")
    val_share: float = option(0.15, "share of each breed's photos for validation", most=1)
    test_share: float = option(0.2, "share of each breed's photos for the test; an official split replaces it", most=1)
    min_val: int = option(2, "at least so many validation photos of each breed")
    min_test: int = option(5, "at least so many test photos of each breed")
    small_breeds: str = option("train", "a breed with too few photos to be split", "train", "refuse", "leave-out")
    draw_test: bool = option(False, "photos divided into train and val only: draw the test part from train, by group")
    keep_split: bool = option(True, "photos keep the part that an earlier split in the same folder gave them")
    near_duplicate_bits: int = option(6, "photos whose 64-bit hashes differ in at most so many bits are one group")
    group_by: str = option("auto", "what else joins photos: id, numbers, exif, folder, none; auto: the first three")
    join_similar: float = option(0.0, "join the pairs of similar.csv from this cosine similarity on; 0: none", most=1)
    encoder: str = option("", "CLIP or VLM whose features show wrong labels and near test photos; empty: none")
    min_side: int = option(32, "smallest side of a usable photo, pixels")
    quality: str = option(
        "brightness<30,brightness>215,contrast<20,sharpness<1.6,entropy<4,aspect>2.5,border>0.2",
        "a photo beyond one of these limits gets a remark (brightness, contrast in grey levels; entropy in bits)",
    )
    photos_per_breed: int = option(0, "at most so many training photos of each breed; 0: all")
    answer_style: str = option("label", "what the model learns to answer", "label", "label+traits")


@dataclass(frozen=True)
class _OfAModel(Settings):
    base_model: str = option("llava-hf/llava-1.5-7b-hf", "hub name or folder of the base model")
    device: str = option("auto", "auto: the GPU where there is one", *DEVICES)


@dataclass(frozen=True)
class _OfTheTuned(_OfAModel):
    checkpoint: str = option("outputs/vlm_checkpoints/llava-cat-breeds", "adapter to evaluate")
    prompt: str = option("", "the question that is put to the model; empty: the one that it was trained with")
    test_data: str = option("data/vlm/test.jsonl", "test samples")


@dataclass(frozen=True)
class _OfClip(_OfAModel):
    clip_model: str = option("openai/clip-vit-large-patch14-336", "hub name or folder; empty: no CLIP")
    clip_prompts: str = option("auto", "zero-shot CLIP's prompts; auto: the best on validation", "auto", *PROMPTS)
    test_data: str = option("data/vlm/test.jsonl", "test samples")
    latency_budget_ms: float = option(0.0, "longest median time for one photo, milliseconds; 0: no budget")


@dataclass(frozen=True)
class _OfMetrics(_OfAModel):
    val_data: str = option("data/vlm/val.jsonl", "validation samples: temperature, prior correction, probes' strength")
    dtype: str = option("auto", "weights of the models", "auto", "bfloat16", "float32")
    eval_batch_size: int = option(16, "photos in one forward pass", least=1)
    unknown_data: str = option("", "samples or a folder of photos of none of the breeds: are models unsure of them?")
    robustness: str = option("", "changes of test photos that are predicted as well: blur, jpeg20, crop, grey, small")
    max_test_photos: int = option(0, "at most so many test photos, drawn evenly over breeds; 0: all")
    bootstrap: int = option(2000, "resamples behind each 95 % interval; at least 100", least=100, most=10**6)


@dataclass(frozen=True)
class TrainSettings(_OfAModel):
    """Fine-tuning (notebook 02, `catlib train`). The defaults are the plan's."""

    train_data: str = option("data/vlm/train.jsonl", "training samples, LLaVA conversations")
    val_data: str = option("data/vlm/val.jsonl", "validation samples")
    output_dir: str = option("outputs/vlm_checkpoints/llava-cat-breeds", "folder of the adapter, processor, model card")
    init_adapter: str = option("", "adapter folder to go on from, with new photos or breeds; empty: LoRA begins anew")
    mode: str = option("lora", "what is trained, and how the base is loaded", "projector", "lora", "qlora")
    train_projector: str = option("none", "the projector between tower and language model", "none", "full", "lora")
    lora_r: int = option(32, "rank of the LoRA matrices", least=1, most=2**16)
    lora_alpha: int = option(0, "LoRA scale; the update is multiplied by alpha / r; 0: alpha is twice the rank")
    lora_dropout: float = option(0.05, "dropout before the LoRA matrices", most=0.99)
    lora_targets: str = option(LINEAR, "linear layers of the language model that get LoRA")
    use_rslora: bool = option(False, "scale by alpha / sqrt(r) instead")
    use_dora: bool = option(False, "decompose weights into magnitude and direction")
    epochs: int = option(3, "passes over the training photos", least=1)
    max_pixels: int = option(0, "most pixels of a photo that the model sees; 0: as the model comes")
    image_pool: int = option(1, "2: means of 2 x 2 of a photo's tokens, a quarter of them; 1: all", least=1, most=2)
    batch_size: int = option(4, "photos in one forward pass", least=1)
    gradient_accumulation: int = option(8, "forward passes for one optimizer step", least=1)
    lr: float = option(2e-4, "peak learning rate of LoRA")
    projector_lr: float = option(2e-5, "peak learning rate of a projector trained in full")
    warmup_ratio: float = option(0.03, "share of the steps in which the learning rate rises", most=1)
    lr_schedule: str = option("cosine", "how the learning rate falls", "cosine", "linear", "constant")
    weight_decay: float = option(0.0, "AdamW weight decay")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm")
    dtype: str = option("auto", "weights of the frozen base", "auto", "bfloat16", "float32")
    gradient_checkpointing: str = option("false", "recompute activations; auto: where the memory needs it", *SWITCH)
    attn_implementation: str = option("auto", "how attention is computed; auto: sdpa where it can be", *ATTENTION)
    cache_features: str = option("auto", "keep the tower's features on disk; auto: where that saves 5 %", *SWITCH)
    cache_limit_gb: float = option(20.0, "largest size of the feature cache, GB")
    augment: bool = option(False, "light random crops, flips and colour changes; switches the feature cache off")
    balance: str = option("none", "how often rare breeds are drawn", "none", "sqrt", "uniform")
    num_workers: int = option(4, "threads that decode photos while the model works", most=1024)
    log_steps: int = option(10, "optimizer steps between two log lines", least=1)
    save_steps: int = option(0, "optimizer steps between two checkpoints; 0: one an epoch")
    early_stopping: int = option(0, "stop after so many epochs without a better watched value; 0: never")
    watch: str = option("val_loss", "what best means", "val_loss", "priority_f1")
    watch_photos: int = option(64, "validation photos that are classified after each epoch")
    report_to: str = option("none", "where curves go besides history.jsonl", "none", "mlflow", "tensorboard", "wandb")
    resume: bool = option(True, "continue an interrupted run of the same settings")
    overwrite: bool = option(False, "set a checkpoint of other settings aside as NAME~1 where it would be refused")
    trainer_args: str = option("", "further transformers.TrainingArguments, as in {optim: adafactor}", mapping=True)
    train_seed: int = option(-1, "seed of the training alone; -1: the one of split and test photos", least=-1)
    force: bool = option(False, "train even where the memory estimate says that it cannot fit")

    @property
    def training_seed(self) -> int:
        """The seed of the training: its own where it has one."""
        return self.seed if self.train_seed < 0 else self.train_seed

    @property
    def recomputes(self) -> bool:
        """Whether activations are recomputed; `auto` that has not been decided counts as no."""
        return str(self.gradient_checkpointing).lower() == "true"


@dataclass(frozen=True)
class EvaluationSettings(_OfMetrics, _OfTheTuned):
    """Predictions and metrics of the VLM, untuned and tuned (notebook 03, `catlib predict`, `catlib evaluate`)."""

    decoding: str = option("score", "how a breed is read off the model", *DECODINGS)
    further_decodings: str = option("constrained,free", "other ways to read the tuned model, each a track of its own")
    score_norm: str = option("sum", "label log-likelihood: summed, or the mean of its tokens", "sum", "mean")
    prior_correction: bool = option(False, "subtract the scores without a photo; strength fitted on validation")
    evaluate_base: bool = option(True, "measure the untuned base model as well")
    quantize: bool = option(False, "load the base in 4-bit NF4")


@dataclass(frozen=True)
class ComparisonSettings(_OfMetrics, _OfClip):
    """CLIP, the linear probes, the paired comparison and the verdict (notebook 04, `catlib compare`)."""

    probe: bool = option(True, "train classifiers on frozen features of CLIP and of the VLM's own tower")
    opponents: str = option("linear,knn,tip-adapter,projection", "which of them; lora (hours on a CPU) has to be named")
    dino_model: str = option("", "hub name or folder of a DINOv2 whose features are probed as well; empty: none")
    balance: str = option("none", "how often rare breeds are drawn", "none", "sqrt", "uniform")
    train_data: str = option("data/vlm/train.jsonl", "samples that the probes learn from")
    target_priority_f1: float = option(0.5, "priority macro-F1 that counts as success", most=1)
    target_gain_points: float = option(3.0, "points of accuracy over zero-shot CLIP that count as success", most=100)
    clip_good_enough: float = option(0.8, "CLIP's priority accuracy above which a VLM is not worth it", most=1)
    clip_priority_f1: float = option(0.6, "CLIP's priority macro-F1 below which the plan says to try a VLM", most=1)
    explanations_wanted: bool = option(False, "reasons are wanted with the breed, and the VLM is trained to give them")
    accuracy_first: bool = option(False, "accuracy outranks latency: a missed latency budget does not decide")
    price_per_hour: float = option(0.0, "price of an hour on this machine, for the cost of 1,000 photos; 0: not told")
    budget_hours: float = option(0.0, "hours that a training may take (catlib gate); 0: any, on a CPU 24")


@dataclass(frozen=True)
class ServingSettings(_OfClip, _OfTheTuned):
    """The tuned model in use: step by step, and the engines that can run it (notebook 05)."""

    serving_photos: int = option(32, "test photos that each engine is asked about, drawn evenly over breeds")
    serving_precisions: str = option("bfloat16,4-bit", "measured here (float32, bfloat16, 4-bit); first: the reference")
    serving_concurrency: str = option("1,4,16", "numbers of requests that are under way at the same time")
    vllm_url: str = option("", "a vLLM server with the tuned model: http://HOST:PORT/v1#MODEL; empty: not measured")
    llamacpp_url: str = option("", "a llama.cpp server with the tuned model: http://HOST:PORT/v1; empty: not measured")


NOTEBOOK_SETTINGS: dict[str, type[Settings]] = {
    "01_data_inspection": DataSettings,
    "02_training": TrainSettings,
    "03_evaluation": EvaluationSettings,
    "04_clip_comparison": ComparisonSettings,
    "05_serving": ServingSettings,
}


def all_options() -> dict[str, Any]:
    """Every parameter of a run by name; a name that several notebooks share has one type and meaning."""
    return {name: f for cls in NOTEBOOK_SETTINGS.values() for name, f in cls.__dataclass_fields__.items()}


def split_list(text: str) -> list[str]:
    """The entries of a comma separated text, stripped, empty ones left out."""
    return [entry.strip() for entry in text.split(",") if entry.strip()]


def derive(given: Mapping[str, Any], profile: str = "") -> dict[str, Any]:
    """`given`, left alone, and what follows from it: folders from the run's name (else `profile`), samples from `data_dir`."""
    values = dict(given)
    if run := given.get("run") or profile:
        if run.startswith(".") or len(run.encode()) > 100 or any(c in '/\\"<>|:*?' or not c.isprintable() for c in run):
            fits = "use up to 100 letters, digits, '-', '_', '=' and '.'"
            raise InputError(f"run {run!r:.120}: a run's name becomes a folder; {fits}")
        values["run"] = run
        values.setdefault("run_dir", f"{RUNS}/{run}")
        values.setdefault("output_dir", f"outputs/vlm_checkpoints/{run}")
    if "output_dir" in values:
        values.setdefault("checkpoint", values["output_dir"])
    if "data_dir" in values:
        for part in ("train", "val", "test"):
            values.setdefault(f"{part}_data", str(PurePosixPath(values["data_dir"], "vlm", f"{part}.jsonl")))
    return values


def run_parameters(profile: str, given: Mapping[str, Any], where: str = "parameters") -> dict[str, Any]:
    """All that is set for a run, by name: the profile's values (see `find_profile`; "": none), `given` on top, what follows."""
    given = checked(given, all_options(), where)
    path = find_profile(profile) if profile else None
    return derive(read_profile(path) | given, path.stem) if path else derive(given)


def find_profile(name: str) -> Path:
    """The file of a profile given by name or by path. Raises InputError that lists the profiles."""
    folder = notebooks_folder() / "profiles"
    is_path = name.endswith((".yaml", ".yml")) or "/" in name
    for path in (Path(name).expanduser(), resolve(name)) if is_path else (folder / f"{name}.yaml",):
        if os.path.isfile(path):  # unlike Path.is_file, no error for a name that is too long
            return path
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    known = f"{did_you_mean(name, names)}; there are {', '.join(names) or 'none'} in {folder}"
    raise InputError(f"no profile {name!r:.200}{known}, or give a path")


def read_profile(path: Path) -> dict[str, Any]:
    """The parameters in a profile, validated. Raises InputError naming the file and the key."""
    if not isinstance(values := parse_yaml(read_text(path), str(path)), dict):
        raise InputError(f"{path}: expected lines 'key: value'")
    return checked(values, all_options(), str(path))


def parse_assignment(text: str) -> tuple[str, Any]:
    """`key=value` from the command line, the value typed as the parameter is. Raises InputError."""
    key, equals, value = map(str.strip, text.partition("="))
    if equals:
        return key, parse_value(known_option(key, all_options(), "-p"), value, "-p")
    raise InputError(f"-p {text}: expected key=value")
