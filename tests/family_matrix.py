"""Every family through every step, against plain transformers code that is written here: the table of docs/families.md.

Each cell is "pass" or why it was refused; what is refused is refused before any weights are loaded. Scores and losses are compared
with one plain forward pass for each label, on the processor's own inputs. `python tests/family_matrix.py docs/families.md [NAME…]`
runs the families (about 15 s each on a quiet machine) and writes the table; tests/test_family_matrix.py asserts on the same cells.
"""

import logging
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from huggingface_hub import constants
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from tiny_encoders import photo
from tiny_families import FAMILIES, save
from tiny_models import settings
from transformers import AutoModelForImageTextToText

from catlib.classifiers.encoder import TowerEncoder
from catlib.data.conversations import QUESTION
from catlib.data.records import make_sample, read_samples, write_samples
from catlib.errors import InputError
from catlib.files import write_json
from catlib.serving.export import find_mergeable, merge
from catlib.training import run
from catlib.training.loss import AnswerLoss
from catlib.training.memory import Footprint, model_config
from catlib.training.memory_check import longest
from catlib.training.trainer import Trainer, train
from catlib.vlm import models
from catlib.vlm.batches import Collator
from catlib.vlm.checkpoint import VLM, open_vlm
from catlib.vlm.decoding import generate_constrained, generate_free
from catlib.vlm.families import image_token_of
from catlib.vlm.scoring import LabelScorer

BREEDS = ("Manx", "Siamese", "Extra-Toes Cat - Hemingway Polydactyl")
QUESTIONS = (QUESTION, "Look at the ears, the coat and the tail. What breed is the cat in this photo?")
SHAPES = ((44, 40), (120, 40), (40, 130), (60, 60))  # of the photos in turn
COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODES = {
    "lora": {"mode": "lora"},
    "lora + projector": {"mode": "lora", "train_projector": "full"},
    "projector": {"mode": "projector", "projector_lr": 2e-2},
    "qlora": {"mode": "qlora"},
}


@dataclass
class Case:
    """A family's model in a hub cache, a data set, and what was made of them so far."""

    name: str
    folder: Path
    tuned: Path | None = None
    loads: int = 0  # models whose weights were loaded
    cells: dict[str, str] = field(default_factory=dict)

    @cached_property
    def base(self) -> str:
        """The model's hub name; its files lie in the cache as a download leaves them."""
        owner = self.folder / "hub" / f"models--tiny--{self.name}"
        save(self.name, owner / "snapshots" / COMMIT)
        (owner / "refs").mkdir()
        (owner / "refs" / "main").write_text(COMMIT, encoding="utf-8")
        return f"tiny/{self.name}"

    @cached_property
    def images(self) -> list[Image.Image]:
        return [photo(number).resize(SHAPES[number % len(SHAPES)]) for number in range(10)]

    @cached_property
    def data(self) -> Path:
        """Eight photos to train on and two for validation, of all shapes, with two questions in turn."""
        root = self.folder / "data"
        (root / "photos").mkdir(parents=True)
        for split, numbers in (("train", range(8)), ("val", range(8, 10))):
            samples = []
            for number in numbers:
                name, breed = f"photos/{number}.png", BREEDS[number % len(BREEDS)]
                self.images[number].save(root / name)
                facts = {"breed": breed, "source": "test", "sha256": f"{self.name}-{number}", "split": split}
                samples.append(make_sample(f"{split}-{number}", name, QUESTIONS[number % 2], breed, **facts))
            write_samples(root / "vlm" / f"{split}.jsonl", samples)
        write_json(root / "vlm" / "dataset.json", {"image_root": ".."})
        return root / "vlm"

    def options(self, out: str, **more: Any) -> Any:
        tiny = FAMILIES[self.name]
        values = {
            "epochs": 1,
            "batch_size": 2,
            "gradient_accumulation": 1,
            "lr": 2e-2,
            "watch_photos": 2,
            "resume": False,
        }
        if tiny.targets:
            values["lora_targets"] = tiny.targets
        return settings(Path(self.base), self.data, self.folder / out, **{**values, **more, "base_model": self.base})

    @property
    def trained(self) -> Path:
        """The checkpoint of step `lora`. Raises InputError where that was refused."""
        if self.tuned is None:
            raise InputError(self.cells.get("lora", "not trained").removeprefix("refused: "))
        return self.tuned

    def open(self, name: str | Path = "") -> VLM:
        return open_vlm(name or self.base, device="cpu", precision="float32")


# --- the plain pass ---


def own_inputs(processor: Any, image: Image.Image, question: str, answer: str | None = None) -> dict[str, torch.Tensor]:
    """What the processor itself makes of photo, question and answer."""
    if type(processor).__name__ == "PaliGemmaProcessor":  # it has no template; answers are its suffix
        more = {"suffix": [answer]} if answer else {}
        inputs = processor(images=[image], text=["<image>" + question], return_tensors="pt", **more)
        return {key: value for key, value in inputs.items() if key != "labels"}
    turns = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
    if answer is not None:
        turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": answer is None}
    return dict(processor.apply_chat_template(turns, **options))


def plain_score(
    model: Any, processor: Any, ends: Sequence[str], image: Image.Image, question: str, breed: str
) -> float:
    """log p(breed, end token | photo, question) by one pass over the processor's own tokens, no cache, no padding."""
    prompt = own_inputs(processor, image, question)["input_ids"].shape[1]
    inputs = own_inputs(processor, image, question, breed)
    words, length = processor.tokenizer, inputs["input_ids"].shape[1]
    answer = inputs["input_ids"][0, prompt:].tolist()
    ids = words.convert_tokens_to_ids(list(ends))
    if (stop := next((i for i, token in enumerate(answer) if token in ids), None)) is not None:
        answer = answer[: stop + 1]
    else:  # the template ends with white space and no end token
        answer = [*answer[: len(words(f" {breed}", add_special_tokens=False)["input_ids"])], words.eos_token_id]
    assert words.decode(answer, skip_special_tokens=True).strip() == breed
    inputs = {k: v[:, : prompt + len(answer)] if v.dim() > 1 and v.shape[1] == length else v for k, v in inputs.items()}
    inputs["input_ids"][0, prompt:] = torch.tensor(answer)
    with torch.no_grad():
        steps = model(**inputs).logits[0].double().log_softmax(-1)
    return sum(float(steps[prompt - 1 + i, token]) for i, token in enumerate(answer))


def compare(case: Case, vlm: VLM, model: Any | None = None) -> np.ndarray:
    """catlib's scores of photos of all shapes with unequal questions, which must be the plain ones."""
    ends, images = FAMILIES[case.name].ends, case.images[:3]
    questions = [QUESTIONS[i % 2] for i in range(3)]
    scores = LabelScorer(vlm, BREEDS, QUESTION).score(images, questions)
    plain = [
        [plain_score(model or vlm.base, vlm.processor, ends, image, question, breed) for breed in BREEDS]
        for image, question in zip(images, questions, strict=True)
    ]
    difference = np.abs(scores - np.array(plain)).max()
    assert difference < 1e-3, f"scores differ by {difference:.4f} nats from a plain pass"
    return scores


# --- the steps ---


def memory(case: Case) -> None:
    config, pairs = model_config(case.base), pairs_of(case)
    processor, token = case.open().processor, image_token_of(config)
    counts = [int((own_inputs(processor, image, "?")["input_ids"] == token).sum()) for image in case.images]
    shape = longest(processor, config, pairs)
    assert shape.image_tokens == max(counts), f"{shape.image_tokens} image tokens in place of {max(counts)}"
    settings = case.options("memory")
    need = Footprint(settings, config, shape).at(settings.batch_size)
    assert need.peak > need.weights > 0 and Footprint(settings, config).at(1).image_tokens >= max(counts)


def untuned(case: Case) -> None:
    scores = compare(case, case.open())
    assert np.ptp(scores, axis=0).max() > 1e-2, "the photo makes no difference"


def loss(case: Case) -> None:
    vlm = case.open()
    samples = read_samples(case.data / "train.jsonl", case.data.parent)[:4]
    with torch.no_grad():
        found, count = AnswerLoss(vlm)(Collator(vlm, case.data.parent)(samples))
    ends = FAMILIES[case.name].ends
    plain = -sum(
        plain_score(vlm.base, vlm.processor, ends, image, sample.question, sample.answer)
        for image, sample in zip(case.images, samples, strict=False)
    )
    assert abs(float(found) - plain) / count < 1e-3, f"loss {float(found):.4f} in place of {plain:.4f}"


def training(mode: str) -> Callable[[Case], None]:
    def step(case: Case) -> None:
        # The estimate has a step of its own; here it is asked once a family, since it takes longer than the training.
        with nullcontext() if mode == "lora" else patch.object(run, "check_fits", lambda *_: None):
            result = train(case.options(mode.replace(" ", ""), **MODES[mode]))
        steps = [row for row in result.history if row["kind"] == "step"]
        assert len(steps) >= 4 and all(math.isfinite(row["loss"]) for row in steps)
        weights = load_file(result.checkpoint / "adapter_model.safetensors")
        assert weights and all(tensor.abs().max() > 0 for tensor in weights.values()), "a tensor was not trained"
        projector = [name for name in weights if ".lora_" not in name]
        assert bool(projector) == (mode in ("projector", "lora + projector"))
        if mode == "lora":
            case.tuned = result.checkpoint

    return step


def tuned(case: Case) -> None:
    scores = compare(case, case.open(case.trained))
    before = LabelScorer(case.open(), BREEDS, QUESTION).score(case.images[:3], [QUESTIONS[i % 2] for i in range(3)])
    assert np.abs(scores - before).max() > 0.1, "the adapter changes nothing"


def plain_peft(case: Case) -> None:
    """catlib's scores are those of transformers' model with the adapter as peft itself loads it."""
    base = AutoModelForImageTextToText.from_pretrained(case.base, dtype=torch.float32)
    compare(case, case.open(case.trained), PeftModel.from_pretrained(base, str(case.trained)).eval())


def constrained(case: Case) -> None:
    vlm = case.open(case.tuned or "")
    assert set(generate_constrained(vlm, case.images[:3], QUESTION, BREEDS)) <= set(BREEDS)
    breed = BREEDS[1]  # the first token of a constrained answer is the likeliest of those that a name begins with
    scorer = LabelScorer(vlm, (breed,), QUESTION)
    assert generate_constrained(vlm, case.images[:1], QUESTION, (breed,)) == [breed] and len(scorer.labels[0]) > 1


def free(case: Case) -> None:
    """Greedy answers are those of a loop over plain passes, and end at any end token."""
    vlm = case.open(case.tuned or "")
    image, ids = case.images[1], vlm.processor.tokenizer.convert_tokens_to_ids(list(FAMILIES[case.name].ends))
    inputs, new = own_inputs(vlm.processor, image, QUESTION), []
    length = inputs["input_ids"].shape[1]
    for _ in range(6):
        with torch.no_grad():
            new.append(int(vlm.base(**inputs).logits[0, -1].argmax()))
        if new[-1] in ids:
            break
        for name, value in inputs.items():
            if value.dim() > 1 and value.shape[1] == length + len(new) - 1:
                last = torch.full_like(value[:, -1:], 1 if PALIGEMMA(vlm) and name == "token_type_ids" else 0)
                last = last if name == "token_type_ids" else value[:, -1:]
                inputs[name] = torch.cat([value, torch.tensor([[new[-1]]]) if name == "input_ids" else last], dim=1)
    expected = vlm.processor.tokenizer.decode(new, skip_special_tokens=True).strip()
    assert generate_free(vlm, [image], QUESTION, 6) == [expected]


def PALIGEMMA(vlm: VLM) -> bool:
    return type(vlm.processor).__name__ == "PaliGemmaProcessor"


def resume(case: Case) -> None:
    """Interrupted after the second of four steps and begun again, a training ends with the same weights."""
    own, count = Trainer.training_step, iter(range(100))

    def interrupted(self: Trainer, *given: Any) -> Any:
        if next(count) == 2:
            raise KeyboardInterrupt
        return own(self, *given)

    options = case.options("resumed", **MODES["lora"], save_steps=1)
    with patch.object(Trainer, "training_step", interrupted), patch.object(run, "check_fits", lambda *_: None):
        try:
            train(options)
        except KeyboardInterrupt:
            pass
        else:
            raise AssertionError("not interrupted")
    result = train(case.options("resumed", **MODES["lora"], save_steps=1, resume=True))
    weights, again = (load_file(path / "adapter_model.safetensors") for path in (case.trained, result.checkpoint))
    assert all(torch.allclose(weights[name], again[name], atol=1e-6) for name in weights)


def export(case: Case) -> None:
    photos = sorted((case.data.parent / "photos").iterdir())[:3]
    out = merge(find_mergeable(case.trained), case.folder / "merged", dtype="float32", device="cpu", photos=photos)
    questions = [QUESTIONS[i % 2] for i in range(3)]
    merged, adapter = (
        LabelScorer(case.open(name), BREEDS, QUESTION).score(case.images[:3], questions)
        for name in (out.folder, case.trained)
    )
    assert np.abs(merged - adapter).max() < 1e-3
    model = AutoModelForImageTextToText.from_pretrained(out.folder, dtype=torch.float32).eval()
    compare(case, case.open(out.folder), model)


def tower(case: Case) -> None:
    """The mean of what the projector is given in a plain pass."""
    vlm = case.open()
    found = TowerEncoder(vlm).compute(case.images[:3])["mean"]
    for vector, image in zip(found, case.images, strict=False):
        caught: list[torch.Tensor] = []
        handle = vlm.projector.register_forward_hook(
            lambda _, args, options, __, caught=caught: caught.append((args or tuple(options.values()))[0]),
            with_kwargs=True,
        )
        try:
            with torch.no_grad():
                vlm.base(**own_inputs(vlm.processor, image, "?"))
        finally:
            handle.remove()
        assert np.allclose(vector, caught[0].flatten(0, -2).float().mean(0).numpy(), atol=1e-4)
    assert np.abs(found[0] - found[1]).max() > 1e-3


STEPS: dict[str, Callable[[Case], None]] = {
    "memory estimate": memory,
    "untuned scores": untuned,
    "training loss": loss,
    **{mode: training(mode) for mode in MODES},
    "tuned scores": tuned,
    "constrained": constrained,
    "free": free,
    "plain peft": plain_peft,
    "resume": resume,
    "export merge": export,
    "tower features": tower,
}


def pairs_of(case: Case) -> list[Any]:
    return [(s, case.data.parent / s.image) for s in read_samples(case.data / "train.jsonl", case.data.parent)]


@contextmanager
def offline(folder: Path) -> Iterator[None]:
    """The hub's cache in `folder`, HF_HUB_OFFLINE=1, and catlib's outputs there."""
    with (
        patch.object(constants, "HF_HUB_CACHE", str(folder / "hub")),
        patch.object(constants, "HF_HUB_OFFLINE", True),
        patch.dict(os.environ, {"CATLIB_ROOT": str(folder)}),
    ):
        yield


def run_family(name: str, folder: Path, steps: Sequence[str] = tuple(STEPS)) -> dict[str, str]:
    """The cells of a family's row: "pass", "refused: …" or "FAIL: …"."""
    case, own = Case(name, folder), models.from_files
    torch.set_num_threads(1)  # threads that wait for each other cost more than such small products

    def counted(kind: Any, ref: Any, **options: Any) -> Any:
        case.loads += kind is AutoModelForImageTextToText
        return own(kind, ref, **options)

    with offline(folder), patch.object(models, "from_files", counted):
        for step in steps:
            loads, began = case.loads, time.process_time()
            try:
                STEPS[step](case)
                case.cells[step] = "pass"
            except InputError as error:
                refused = case.loads == loads
                case.cells[step] = f"{'refused' if refused else 'FAIL, after loading'}: {error}"
            except Exception as error:  # a cell of the table, whatever it is
                logging.getLogger(__name__).debug("%s, %s", name, step, exc_info=True)
                case.cells[step] = (
                    f"FAIL: {type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
                )
                if os.environ.get("MATRIX_RAISE"):
                    raise
            logging.getLogger(__name__).info("%s, %s: %.1f s of CPU time", name, step, time.process_time() - began)
    return case.cells


def table(rows: dict[str, dict[str, str]]) -> str:
    """The rows as Markdown, reasons below."""
    reasons: list[str] = []
    lines = [f"| family | {' | '.join(STEPS)} |", "| --- " * (len(STEPS) + 1) + "|"]
    for name, cells in rows.items():
        shown = []
        for step in STEPS:
            cell = cells.get(step, "")
            if cell not in ("pass", "") and cell not in reasons:
                reasons.append(cell)
            shown.append("✓" if cell == "pass" else f"{cell.split(':')[0]} ({reasons.index(cell) + 1})" if cell else "")
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join([*lines, "", *(f"{number}. {reason}" for number, reason in enumerate(reasons, start=1))])


BEGIN, END = "<!-- matrix -->", "<!-- end of matrix -->"


def main(arguments: list[str]) -> int:
    """Run the families and put the table between the page's marks."""
    logging.basicConfig(level=logging.INFO)
    page, names = Path(arguments[0]), arguments[1:] or list(FAMILIES)
    rows = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = run_family(name, Path(folder))
        print(name, {step: cell for step, cell in rows[name].items() if cell != "pass"} or "all pass", flush=True)
    write(page, rows)
    return int(any(cell.startswith("FAIL") for cells in rows.values() for cell in cells.values()))


def write(page: Path, rows: dict[str, dict[str, str]]) -> None:
    """Put the table between the page's marks."""
    text = page.read_text(encoding="utf-8") if page.is_file() else f"{BEGIN}\n{END}\n"
    before, rest = text.split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
