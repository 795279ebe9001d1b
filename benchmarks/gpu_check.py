"""catlib's LLaVA-1.5-7B work on one CUDA GPU: is it right, how fast is it, what does it need, and what would be faster.

    python benchmarks/gpu_check.py [--out DIR] [--seconds 470] [--only SECTION,…] [--brief] [--tiny]

No hub, no network: the model is LLaVA-1.5-7B's true shape with random bf16 weights made on the GPU, the photos are drawn. Sections, most important first; each is skipped when the time left is short, fails alone, and
its figures are in DIR/gpu_check.json as soon as it ends:

  versions     what is installed; that the loss really depends on the photo's cached features
  ceilings     bf16 matrix product (8192³ and the model's own shapes) and device copy: the roofs for everything below
  correct      2 true-width layers: fused layers against plain autograd and a float32 reference; dropout by finite differences;
               gradient checkpointing gives the same gradient; QLoRA fused against peft's own 4-bit layer
  train        `train(settings)` as it is used, then its parts by hand, LoRA r 32, 32 photos an optimizer step: photos/s, ms a pass,
               MFU, peak memory beside `catlib memory`; micro-batches of 1 to 16; with and without checkpointing, cached features,
               fused layers and dropout
  profile      two passes: GPU busy share, kernels launched, device time by kind of kernel, host synchronisations
  scoring      67 labels: photos/s by batch, split into preprocessing, prefill and label tree; with adapter, merged; against generate
  qlora        the same training in NF4 (bitsandbytes)
  clip         CLIP ViT-L/14-336 encoder, float32 (catlib's default) against bf16, with and without preprocessing
  whole        `train` and `predict` from files on disk, end to end, on a 2-layer slice; resumed run gives the same weights
  peers        transformers.Trainer and TRL's SFTTrainer (and with Liger) on the same model, photos, rank and batch

--tiny runs all of it on the CPU with a toy model, only to see that it runs; it exits with 1 when a section fails.
"""

import argparse
import contextlib
import gc
import importlib.metadata
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

BEGAN = time.perf_counter()
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
warnings.filterwarnings("ignore")

import torch  # noqa: E402

NEED = {
    "versions": 5,
    "ceilings": 8,
    "correct": 30,
    "train": 60,
    "profile": 10,
    "scoring": 40,
    "qlora": 30,
    "clip": 15,
    "whole": 40,
    "peers": 45,
}
DATASHEET = {
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "4090": 165e12,
    "3090": 71e12,
    "L40S": 362e12,
}  # dense bf16, fp32 sums
QUESTION = "What breed is the cat in this photo?"
RANK, MICRO, STEP = 32, 4, 32  # LoRA rank, photos in a pass, photos in an optimizer step


class Check:
    """What the sections share."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.tiny, self.out, self.deadline = args.tiny, args.out, BEGAN + args.seconds
        self.device = torch.device("cpu" if args.tiny or not torch.cuda.is_available() else "cuda")
        self.cuda = self.device.type == "cuda"
        self.figures: dict[str, Any] = {}
        self.work = Path(tempfile.mkdtemp(prefix="gpu_check"))
        os.environ["CATLIB_ROOT"] = str(self.work)
        self.peak = 0.0
        self.step_photos, self.brief = 8 if self.tiny else STEP, args.brief

    # --- time and memory ---

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], Any], repeat: int = 3, warm: int = 1) -> float:
        """Median seconds of `work()`, synchronized."""
        for _ in range(warm):
            work()
        times = []
        for _ in range(repeat):
            self.sync()
            start = time.perf_counter()
            work()
            self.sync()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def free(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def reset_peak(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()

    def peaks(self) -> dict[str, float]:
        if not self.cuda:
            return {}
        return {
            "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
            "reserved_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2),
        }

    # --- model and photos ---

    def config(self, layers: int | None = None) -> Any:
        from tiny_encoders import tokenizer

        from catlib.training.memory import model_config

        config, words = model_config("llava-hf/llava-1.5-7b-hf"), tokenizer()
        text, vision = config.text_config, config.vision_config
        if self.tiny:
            text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.num_attention_heads = 64, 128, 2, 4
            text.num_key_value_heads, text.head_dim, text.vocab_size = 4, 16, 512
            vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers, vision.num_attention_heads = (
                32,
                64,
                2,
                2,
            )
            vision.image_size, config.image_seq_length = 56, 16
        if layers:
            text.num_hidden_layers = layers
        config.image_token_index = config.image_token_id = words.convert_tokens_to_ids("<image>")
        text.pad_token_id, text.bos_token_id, text.eos_token_id = 0, 1, 2
        return config

    def processor(self) -> Any:
        from tiny_encoders import TEMPLATE, tokenizer
        from transformers import CLIPImageProcessor, LlavaProcessor

        side = 56 if self.tiny else 336
        images = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
        words = tokenizer()
        words.model_max_length = 4096
        return LlavaProcessor(
            images,
            words,
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=TEMPLATE,
        )

    def build(self, layers: int | None = None, quantize: bool = False, dtype: torch.dtype = torch.bfloat16) -> Any:
        """A VLM with random weights on the device, eval mode, frozen."""
        from transformers import LlavaForConditionalGeneration

        from catlib.vlm.families import family_of
        from catlib.vlm.models import VLM, Checkpoint

        torch.manual_seed(0)
        with self.device:
            model = LlavaForConditionalGeneration._from_config(
                self.config(layers), dtype=dtype, attn_implementation="sdpa"
            )
        model = model.to(self.device).requires_grad_(False).eval()
        if quantize:
            to_nf4(model.model.language_model, self.device)
            model.is_loaded_in_4bit = True
        name = str(self.folder())
        return VLM(model, self.processor(), Checkpoint(name, name), family_of(model))

    def folder(self) -> Path:
        """Configuration and processor on disk, without weights."""
        folder = self.work / "model"
        if not folder.exists():
            self.config().save_pretrained(folder)
            self.processor().save_pretrained(folder)
        return folder

    def data(self) -> Path:
        """train.jsonl and val.jsonl with drawn photos of 500 x 375 pixels, twelve breeds."""
        from catlib.breeds import BREEDS
        from catlib.data.records import make_sample, write_samples
        from demo.photos import draw_breed

        root = self.work / "data"
        if (root / "vlm/train.jsonl").is_file():
            return root / "vlm"
        (root / "photos").mkdir(parents=True)
        drawn = [draw_breed(breed.name, "train", 0, 0).resize((500, 375)) for breed in BREEDS[:8]]
        names = [breed.name for breed in BREEDS[:8]]
        draw = random.Random(0)
        counts = {"train": 2 * self.step_photos, "val": 8}
        for split, count in counts.items():
            samples = []
            for i in range(count):
                k, name = i % 8, f"photos/{split}{i:03}.jpg"
                left, top = draw.randint(0, 40), draw.randint(0, 40)
                drawn[k].crop((left, top, left + 440, top + 330)).resize((500, 375)).save(root / name, quality=90)
                samples.append(make_sample(
                    f"{split}-{i}", name, QUESTION, names[k], breed=names[k], source="drawn", sha256=f"{split}{i:060}", split=split
                ))  # fmt: skip
            write_samples(root / "vlm" / f"{split}.jsonl", samples)
        (root / "vlm/dataset.json").write_text(json.dumps({"image_root": ".."}), encoding="utf-8")
        return root / "vlm"

    def settings(self, **more: Any) -> Any:
        from catlib.settings import TrainSettings

        values = {
            "base_model": str(self.folder()), "train_data": str(self.data() / "train.jsonl"), "val_data": str(self.data() / "val.jsonl"),
            "output_dir": str(self.work / "out"), "lora_r": RANK, "batch_size": MICRO,
            "gradient_accumulation": self.step_photos // MICRO, "epochs": 1, "device": self.device.type, "num_workers": 8, "log_steps": 1,
            "watch_photos": 8, "resume": False, "dtype": "bfloat16", "gradient_checkpointing": False,
        }  # fmt: skip
        return TrainSettings.build({**values, **more})

    def train(self, **more: Any) -> Any:
        """`train(settings)` on the built model in place of one read from disk."""
        from catlib.training import run
        from catlib.training.trainer import train

        forget_accelerator()
        before = run.open_vlm
        run.open_vlm = lambda checkpoint, precision="auto", **_: self.build(quantize=precision == "4-bit")
        try:
            return train(self.settings(**more))
        finally:
            run.open_vlm = before

    def estimate(self, settings: Any) -> dict[str, int]:
        """What `catlib memory` says of a run on these data, bytes by phase."""
        from catlib.training.memory_check import check_fits
        from catlib.training.run import TrainingData

        data = TrainingData(settings)
        pairs = [(s, root / s.image) for root, samples in data.parts for s in samples]
        need = check_fits(replace(settings, force=True), str(self.folder()), pairs)
        return {} if need is None else need.phases


# --- sections ---


def versions(c: Check) -> dict[str, Any]:
    found: dict[str, Any] = {
        "python": sys.version.split()[0],
        "device": torch.cuda.get_device_name() if c.cuda else "cpu",
    }
    for name in (
        "torch",
        "transformers",
        "peft",
        "trl",
        "bitsandbytes",
        "liger-kernel",
        "accelerate",
        "datasets",
        "torchvision",
    ):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    vlm, batch = slice_batch(c, layers=2)
    other = replace(batch, features=torch.randn_like(batch.features))
    with torch.no_grad():
        a, b = (float(loss_of(vlm, x)[0]) for x in (batch, other))
    found["loss_depends_on_features"] = a != b
    if a == b:
        found["WARNING"] = (
            "the cached features do not reach the loss: catlib would train blind; all cached figures below are of text alone"
        )
    return found


def ceilings(c: Check) -> dict[str, Any]:
    n, kind = (256 if not c.cuda else 8192), torch.bfloat16
    shapes = [(n, n, n)]
    tokens = 608 * MICRO if c.cuda else 64
    shapes += [(tokens, 4096, 4096), (tokens, 4096, 11008), (tokens, 11008, 4096)] if c.cuda else []
    out: dict[str, Any] = {}
    for m, k, w in shapes:
        a, b = torch.randn(m, k, device=c.device, dtype=kind), torch.randn(w, k, device=c.device, dtype=kind)
        seconds = c.seconds(lambda a=a, b=b: [a @ b.T for _ in range(10)], repeat=5) / 10
        out[f"matmul {m}x{k}x{w} TFLOP/s"] = round(2 * m * k * w / seconds / 1e12, 1)
    big = torch.empty(2**31 if c.cuda else 2**24, dtype=torch.uint8, device=c.device)
    to = torch.empty_like(big)
    out["copy TB/s, read and write"] = round(2 * big.numel() / c.seconds(lambda: to.copy_(big), repeat=5) / 1e12, 2)
    c.peak = out[f"matmul {n}x{n}x{n} TFLOP/s"] * 1e12
    x = torch.randn(tokens, 4096 if c.cuda else 64, device=c.device, dtype=kind, requires_grad=True)
    weight = torch.ones(x.shape[-1], device=c.device, dtype=kind)
    from torch.nn.functional import rms_norm

    from catlib.training.dropout import draw, drop
    from catlib.training.kernels import GateFunction, NormFunction

    grad = torch.randn_like(x)
    gate, up = (
        torch.randn(tokens, 11008 if c.cuda else 64, device=c.device, dtype=kind, requires_grad=True) for _ in range(2)
    )
    wide = torch.randn_like(gate)
    flat = x.detach()
    drawn = draw(flat)
    out["us"] = {
        "norm, catlib, forward + backward": us(c, lambda: NormFunction.apply(x, weight, 1e-5).backward(grad)),
        "norm, torch rms_norm": us(c, lambda: rms_norm(x, (x.shape[-1],), weight, 1e-5).backward(grad)),
        "gate, catlib": us(c, lambda: GateFunction.apply(gate, up).backward(wide)),
        "dropout of 4096": us(c, lambda: drop(flat, 0.05, draw(flat))),
        "dropout of 4096, drawn again": us(c, lambda: drop(flat, 0.05, drawn)),
        "dropout of 11008": us(c, lambda: drop(wide, 0.05, draw(wide))),
    }
    with contextlib.suppress(Exception):
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        if c.cuda:
            out["us"]["norm, Liger"] = us(
                c, lambda: LigerRMSNormFunction.apply(x, weight, 1e-5, 0.0, "llama", False).backward(grad)
            )
            out["us"]["gate, Liger"] = us(c, lambda: LigerSiLUMulFunction.apply(gate, up).backward(wide))
    return out


def correct(c: Check) -> dict[str, Any]:
    """Relative errors of the trained parameters' gradients, ‖g - reference‖ / ‖reference‖."""
    from catlib.training.kernels import fuse
    from catlib.training.lora import add_lora

    out: dict[str, Any] = {}
    vlm, batch = slice_batch(c, layers=2, dtype=torch.float32)
    for p in vlm.model.parameters():  # the reference has the rounded weights that the bf16 runs have
        p.data = p.data.bfloat16().float()
    batch = replace(batch, features=batch.features.bfloat16().float())
    add_lora(vlm, c.settings(lora_dropout=0.0))
    spread_b(vlm.model)
    plain = gradient(vlm, batch, low=False)
    fuse(vlm.model)
    fused = gradient(vlm, batch, low=False)
    out["float32 fused against plain"] = error(fused, plain)
    for p in vlm.model.parameters():
        if not p.requires_grad:
            p.data = p.data.bfloat16()
    low_fused = gradient(vlm, batch, low=True)
    unfuse(vlm.model)
    low_plain = gradient(vlm, batch, low=True)
    out["bf16 plain (peft, autocast) against float32"] = error(low_plain, plain)
    out["bf16 fused against float32"] = error(low_fused, plain)
    out["loss: float32, bf16 plain, bf16 fused"] = [round(x[0], 5) for x in (plain, low_plain, low_fused)]
    for p in vlm.model.parameters():
        p.data = p.data.float()
    fuse(vlm.model)
    set_dropout(vlm.model, 0.05)
    at = gradient(vlm, batch, low=False, seed=7)
    trained = [p for p in vlm.model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(1)
    direction = [torch.randn(p.shape, generator=generator).to(p) * (p.norm() / math.sqrt(p.numel())) for p in trained]
    step, losses = 2e-3, []
    for sign in (1, -1):
        for p, d in zip(trained, direction, strict=True):
            p.data += sign * step * d
        losses.append(gradient(vlm, batch, low=False, seed=7)[0])
        for p, d in zip(trained, direction, strict=True):
            p.data -= sign * step * d
    expected = float(sum((g.double() * d.double()).sum() for g, d in zip(at[1], direction, strict=True)))
    out["dropout: slope by differences / by backward"] = round((losses[0] - losses[1]) / (2 * step) / expected, 4)
    vlm.base.activation_checkpointing_enable({"use_reentrant": False})
    out["dropout with checkpointing against without"] = error(gradient(vlm, batch, low=False, seed=7), at)
    del vlm, trained, direction
    c.free()
    with contextlib.suppress(ImportError):
        import bitsandbytes  # noqa: F401

        vlm, batch = slice_batch(c, layers=2, quantize=True)
        add_lora(vlm, c.settings(lora_dropout=0.0, mode="qlora"))
        spread_b(vlm.model)
        plain = gradient(vlm, batch, low=True)
        out["qlora layers fused"] = fuse(vlm.model)
        out["qlora fused against peft's 4-bit layer"] = error(gradient(vlm, batch, low=True), plain)
    limit = 1.3 * out["bf16 plain (peft, autocast) against float32"] + 1e-4
    out["ok"] = bool(
        out["float32 fused against plain"] < 1e-4 and out["bf16 fused against float32"] < limit
        and abs(out["dropout: slope by differences / by backward"] - 1) < 0.03 and out["dropout with checkpointing against without"] < 1e-4
    )  # fmt: skip
    return out


def train(c: Check) -> dict[str, Any]:
    from catlib.training import kernels
    from catlib.vlm.batches import Collator

    out: dict[str, Any] = {"rows": []}
    rows = out["rows"]

    def as_used() -> dict[str, Any]:
        start = time.perf_counter()
        steps = [row for row in c.train(epochs=2).history if row["kind"] == "step"]
        return {
            "photos_per_s": round(steps[-1]["photos_per_second"], 2), "losses": [round(row["loss"], 4) for row in steps],
            "seconds": round(time.perf_counter() - start, 1), **c.peaks(),
        }  # fmt: skip

    rows.append({"case": "train(settings)", **guarded(as_used)})
    show(rows[-1])
    c.free()
    work = Work(c)
    out["layers fused"] = sum(kernels.is_fused(m) for m in work.vlm.model.modules())
    estimates = {on: c.estimate(c.settings(gradient_checkpointing=on)) for on in (False, True)}
    out["tokens a photo"] = work.collate(work.samples[:MICRO]).input_ids.shape[1]

    def row(name: str, micro: int = MICRO, checkpointing: bool = False, repeat: int = 2) -> None:
        need = estimates[checkpointing].get("training step", 0) if micro == MICRO else 0
        measured = guarded(lambda: measure_steps(c, work, micro, repeat, checkpointing))
        rows.append({"case": name, **measured, "estimate_gb": round(need / 1e9, 2)})
        show(rows[-1])

    row("cached, fused, r 32", repeat=3)
    for micro in (8,) if c.brief else (1, 2, 8, 16):
        row(f"micro-batch {micro}", micro)
    if c.brief:
        return out
    work.vlm.base.activation_checkpointing_enable({"use_reentrant": False})
    row("gradient checkpointing", checkpointing=True)
    row("gradient checkpointing, micro-batch 16", 16, True)
    work.vlm.base.activation_checkpointing_disable()
    cached = work.collate
    work.collate = Collator(work.vlm, work.root, None, None, 8)
    row("features not cached, 8 threads decode")
    work.collate = cached
    set_dropout(work.vlm.model, 0.0)
    row("dropout 0")
    set_dropout(work.vlm.model, 0.05)
    unfuse(work.vlm.model)
    row("not fused: peft's layers, answer-only logits")
    kernels.fuse(work.vlm.model)
    out["host"] = host_costs(c, work)
    if c.deadline - time.perf_counter() > NEED["profile"] + 20:
        c.figures["profile"] = guarded(lambda: profile(c, work))
        show(c.figures["profile"])
    return out


def host_costs(c: Check, work: "Work") -> dict[str, float]:
    """Milliseconds of host work in a pass: the batch from cached features, its copy, and issuing forward and backward."""
    samples = work.samples[:MICRO]
    collate = c.seconds(lambda: work.collate(samples))
    batch = work.collate(samples)
    move = c.seconds(lambda: batch.to(c.device))
    issue = []
    for _ in range(3):
        c.sync()
        start = time.process_time()
        work.gradients(samples, MICRO)
        issue.append(time.process_time() - start)
        c.sync()
    work.optimizer.zero_grad()
    return {"collate 4 cached": round(1e3 * collate, 2), "copy to device": round(1e3 * move, 2),
            "processor time to issue a pass, waiting included": round(1e3 * min(issue), 1)}  # fmt: skip


def profile(c: Check, work: "Work") -> dict[str, Any]:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler_of

    samples = work.samples[: 2 * MICRO]
    work.gradients(samples, MICRO)
    c.sync()
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if c.cuda else [])
    start = time.perf_counter()
    with profiler_of(activities=kinds) as profiler:
        work.gradients(samples, MICRO)
        c.sync()
    wall = 1e6 * (time.perf_counter() - start)
    work.optimizer.zero_grad()
    by_kind: dict[str, float] = defaultdict(float)
    rows, launches, syncs, spans = [], 0, defaultdict(int), []
    for event in profiler.events():
        if event.name.startswith(("cudaLaunchKernel", "cuLaunchKernel")):
            launches += 1
        if "Synchronize" in event.name:
            syncs[event.name] += 1
        if str(event.device_type).endswith("CUDA"):
            spans.append((event.time_range.start, event.time_range.end))
    for row in profiler.key_averages():
        own = getattr(row, "self_device_time_total", 0) or 0
        if not c.cuda:
            own = row.self_cpu_time_total
        elif not str(row.device_type).endswith("CUDA"):
            continue
        if own:
            by_kind[kernel_kind(row.key)] += own
            rows.append((own, row.count, row.key[:90]))
    busy, last = 0.0, -1.0
    for begin, end in sorted(spans):
        busy += max(0.0, end - max(begin, last))
        last = max(last, end)
    rows.sort(reverse=True)
    return {
        "wall_ms": round(wall / 1e3, 1), "gpu_busy_share": round(busy / wall, 3) if spans else None, "kernels_launched": launches,
        "synchronizations": dict(syncs), "device_ms_by_kind": {k: round(v / 1e3, 1) for k, v in sorted(by_kind.items(), key=lambda x: -x[1])},
        "top": [f"{own / 1e3:8.2f} ms {count:6d} x {key}" for own, count, key in rows[:25]],
    }  # fmt: skip


def scoring(c: Check) -> dict[str, Any]:
    from catlib.breeds import BREEDS
    from catlib.data.images import open_image
    from catlib.training.lora import lora_config, peft_model
    from catlib.vlm.decoding import generate_free
    from catlib.vlm.prompting import inference_inputs
    from catlib.vlm.scoring import LabelScorer

    vlm = c.build()
    labels = [breed.name for breed in BREEDS]
    photos = [open_image(path) for path in sorted((c.data().parent / "photos").glob("train*.jpg"))]
    photos = (photos * 2)[: 16 if c.tiny else 64]
    out: dict[str, Any] = {"rows": []}

    def row(name: str, batches: tuple[int, ...]) -> None:
        scorer = LabelScorer(vlm, labels, QUESTION)
        for size in batches:
            some = photos[:size]
            c.reset_peak()
            whole = c.seconds(lambda some=some, scorer=scorer: scorer.score(some), repeat=3)
            prepare = c.seconds(lambda some=some: inference_inputs(vlm, some, [QUESTION] * len(some)), repeat=2)
            inputs = inference_inputs(vlm, some, [QUESTION] * len(some))
            with torch.inference_mode():
                prefill = c.seconds(lambda inputs=inputs, scorer=scorer: scorer._prefill(inputs), repeat=2)
                first, cache, mask = scorer._prefill(inputs)
                rows, vocabulary = first.shape
                from catlib.vlm.scoring import LOGITS_LIMIT, build_trie, split_labels

                groups = split_labels(scorer.labels, max(1, LOGITS_LIMIT // (rows * vocabulary)))
                parts = [[scorer.labels[k] for k in group] for group in groups]

                def over_the_tree(
                    scorer: Any = scorer, parts: Any = parts, first: Any = first, cache: Any = cache, mask: Any = mask
                ) -> None:
                    for part in parts:
                        scorer._tree(part, first, cache, mask, {})  # a LLaVA has nothing that runs along the text

                tree = c.seconds(over_the_tree, repeat=2)
                nodes = len(build_trie(scorer.labels).tokens)
            out["rows"].append({
                "case": name, "batch": size, "photos_per_s": round(size / whole, 2), "ms_a_batch": round(1e3 * whole, 1),
                "preprocess_ms": round(1e3 * prepare, 1), "prefill_ms": round(1e3 * prefill, 1), "tree_ms": round(1e3 * tree, 1),
                "trie_nodes": nodes, "passes_over_the_tree": len(groups), **c.peaks(),
            })  # fmt: skip
            show(out["rows"][-1])

    row("base, 67 labels", (1, 4) if c.tiny else (1, 8, 16, 32))
    for size, tokens in ((1, 50), (1, 5), (16, 5), (16, 50)):
        if c.deadline - time.perf_counter() < 60:
            break
        some = photos[:size]
        seconds = c.seconds(lambda some=some, tokens=tokens: generate_free(vlm, some, QUESTION, tokens), repeat=1)
        out["rows"].append({"case": f"generate, at most {tokens} tokens", "batch": size, "photos_per_s": round(size / seconds, 2),
                            "ms_a_batch": round(1e3 * seconds, 1)})  # fmt: skip
        show(out["rows"][-1])
    vlm.model = peft_model(vlm.model, lora_config(vlm.model, c.settings(), vlm.family))
    for name, parameter in vlm.model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.bfloat16)  # as load_adapter does
    vlm.model.requires_grad_(False).eval()
    row("adapter r 32, as predict loads it", (1, 16) if not c.tiny else (4,))
    vlm.model = vlm.model.merge_and_unload()
    row("adapter merged", (1, 16) if not c.tiny else (4,))
    return out


def qlora(c: Check) -> dict[str, Any]:
    import bitsandbytes

    out: dict[str, Any] = {"bitsandbytes": bitsandbytes.__version__, "rows": []}
    work = Work(c, mode="qlora")
    for checkpointing in (True, False):
        if checkpointing:
            work.vlm.base.activation_checkpointing_enable({"use_reentrant": False})
        else:
            work.vlm.base.activation_checkpointing_disable()
        need = c.estimate(c.settings(mode="qlora", gradient_checkpointing=checkpointing)).get("training step", 0)
        name = f"qlora, checkpointing {checkpointing}"
        out["rows"].append(
            {"case": name, **measure_steps(c, work, MICRO, 2, checkpointing), "estimate_gb": round(need / 1e9, 2)}
        )
        show(out["rows"][-1])
    return out


def peers(c: Check) -> dict[str, Any]:
    out: dict[str, Any] = {"rows": []}
    eight = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": c.step_photos // 8}
    cases = [("TRL SFTTrainer", trl_trainer, {}), ("TRL SFTTrainer, micro-batch 8", trl_trainer, eight)]
    cases += (
        []
        if c.brief
        else [
            ("transformers.Trainer", transformers_trainer, {}),
            ("TRL SFTTrainer, checkpointing", trl_trainer, {"gradient_checkpointing": True}),
            ("TRL SFTTrainer, Liger", trl_trainer, {"use_liger_kernel": True}),
        ]
    )
    for name, work, more in cases:
        if c.deadline - time.perf_counter() < 40:
            out["rows"].append({"case": name, "skipped": "no time"})
            continue
        if more.get("use_liger_kernel") and not (c.cuda and has("liger_kernel")):
            continue
        c.free()
        forget_accelerator()
        result = guarded(lambda work=work, more=more: work(c, **more))
        out["rows"].append({"case": name, **result})
        show(out["rows"][-1])
    return out


def clip(c: Check) -> dict[str, Any]:
    from tiny_encoders import tokenizer
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    from catlib.classifiers.encoder import ClipEncoder
    from catlib.data.images import open_image

    vision = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
    }
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    if c.tiny:
        vision |= {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 56,
        }
        text |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    side = vision["image_size"]
    processor = CLIPProcessor(
        CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}), tokenizer(end=True)
    )
    with c.device:
        model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=768 if not c.tiny else 16))
    files = sorted((c.data().parent / "photos").glob("train*.jpg"))
    photos = [open_image(path) for path in files]
    photos = (photos * 4)[: 16 if c.tiny else 64]
    out: dict[str, Any] = {
        "decode_ms_a_photo": round(1e3 * c.seconds(lambda: [open_image(p) for p in files[:8]]) / 8, 2),
        "image_processor": type(processor.image_processor).__name__, "rows": [],
    }  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        encoder = ClipEncoder(model.to(c.device, dtype), processor, "random")
        for size in (16, 64):
            some = photos[:size]
            whole = c.seconds(lambda some=some, encoder=encoder: encoder.compute(some), repeat=2)
            pixels = processor.image_processor(images=some, return_tensors="pt")["pixel_values"].to(c.device, dtype)
            with torch.inference_mode():
                tower = c.seconds(lambda pixels=pixels: model.get_image_features(pixel_values=pixels), repeat=3)
            out["rows"].append({"dtype": str(dtype), "batch": size, "photos_per_s": round(len(some) / whole, 1),
                                "photos_per_s of the encoder alone": round(len(some) / tower, 1)})  # fmt: skip
            show(out["rows"][-1])
    return out


def whole(c: Check) -> dict[str, Any]:
    """From files to files on a slice of two layers, as users call it; a resumed run ends with the same weights."""
    from safetensors.torch import load_file
    from transformers import LlavaForConditionalGeneration

    from catlib.classifiers.vlm import VLMClassifier
    from catlib.data.images import open_image
    from catlib.training.trainer import train as train_run
    from catlib.vlm.batches import Collator
    from catlib.vlm.checkpoint import find_checkpoint, open_vlm

    folder = c.work / "slice"
    torch.manual_seed(0)
    with c.device:
        LlavaForConditionalGeneration._from_config(c.config(2), dtype=torch.bfloat16).save_pretrained(folder)
    c.processor().save_pretrained(folder)
    out: dict[str, Any] = {}
    results = {}
    for name, more in {"lora": {}, "resumed": {}, "qlora": {"mode": "qlora"}}.items():
        if name == "qlora" and not has("bitsandbytes"):
            continue
        target = c.work / f"whole-{name}"
        settings = c.settings(base_model=str(folder), output_dir=str(target), epochs=2, resume=True, **more)
        c.free()
        forget_accelerator()
        start = time.perf_counter()
        if name == "resumed":  # killed in the middle of a step of the second epoch
            batches = 2 * c.step_photos // MICRO + 8 // MICRO + 2
            with killed_after(Collator, batches), contextlib.suppress(Killed):
                train_run(settings)
        result = train_run(settings)
        results[name] = load_file(target / "last/adapter_model.safetensors")
        steps = [r for r in result.history if r["kind"] == "step"]
        out[name] = {"seconds": round(time.perf_counter() - start, 1), "losses": [round(r["loss"], 4) for r in steps],
                     "photos_per_s": [round(r["photos_per_second"], 1) for r in steps], **c.peaks()}  # fmt: skip
        show({"case": name, **out[name]})
    a, b = results["lora"], results["resumed"]
    out["largest difference of a resumed run's weights"] = max(float((a[k] - b[k]).abs().max()) for k in a)
    found = find_checkpoint(c.work / "whole-lora", question=QUESTION, breeds=["Manx", "Siamese", "Bengal"])
    classifier = VLMClassifier(open_vlm(found, device=c.device.type))
    photos = [open_image(p) for p in sorted((c.data().parent / "photos").glob("val*.jpg"))[:4]]
    together = classifier.classify(photos).log_probs
    import numpy as np

    apart = np.concatenate([classifier.classify([p]).log_probs for p in photos])
    out["scores of a batch against one by one, largest difference"] = float(abs(together - apart).max())
    return out


# --- parts that several sections use ---


class Work:
    """What a training step is made of, put together by hand, so that each part can be exchanged: model, batches, loss, optimizer."""

    def __init__(self, c: Check, **more: Any) -> None:
        from catlib.data.records import image_root_of, read_samples
        from catlib.training.kernels import fuse
        from catlib.training.lora import add_lora
        from catlib.training.loss import AnswerLoss
        from catlib.vlm.batches import Collator
        from catlib.vlm.features import FrozenFeatures

        settings = c.settings(**more)
        self.device = c.device
        self.vlm = c.build(quantize=settings.mode == "qlora")
        add_lora(self.vlm, settings)
        fuse(self.vlm.model)
        path = c.data() / "train.jsonl"
        self.root = image_root_of(path)
        self.samples = read_samples(path, self.root)
        features = FrozenFeatures(self.vlm, c.work / "features", 20.0)
        features.fill([(self.root / s.image, s.metadata["sha256"]) for s in self.samples], 8)
        self.collate: Any = Collator(self.vlm, self.root, features, None, 8)
        self.loss = AnswerLoss(self.vlm)
        self.trained = [p for p in self.vlm.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=settings.lr, fused=True)

    def gradients(self, samples: Any, micro: int) -> None:
        """Add the gradient of the mean loss over all supervised tokens."""
        from catlib.training.kernels import constant_factors

        tokens = sum(len(self.collate.answer_ids(sample)) for sample in samples)
        with constant_factors(self.vlm.model):
            for first in range(0, len(samples), micro):
                batch = self.collate(samples[first : first + micro]).to(self.device)
                with torch.autocast(self.device.type, dtype=torch.bfloat16):
                    loss, _ = self.loss(batch)
                (loss / tokens).backward()

    def step(self, samples: Any, micro: int) -> None:
        """An optimizer step."""
        self.collate.prefetch(samples)
        self.gradients(samples, micro)
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Killed(Exception):
    """Stands for the end of the process."""


@contextlib.contextmanager
def killed_after(collator: type, batches: int) -> Iterator[None]:
    """While open, training breaks off when it asks for one batch more than so many."""
    plain, calls = collator.__call__, 0

    def call(self: Any, samples: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > batches:
            raise Killed
        return plain(self, samples)

    collator.__call__ = call
    try:
        yield
    finally:
        collator.__call__ = plain


def measure_steps(c: Check, work: Work, micro: int, repeat: int, checkpointing: bool) -> dict[str, Any]:
    """A full optimizer step of photos: the median of `repeat` after one to warm up."""
    samples, times = work.samples[: c.step_photos], []
    try:
        for i in range(repeat + 1):
            if i == 1:
                c.reset_peak()
            c.sync()
            start = time.perf_counter()
            work.step(samples, micro)
            c.sync()
            times.append(time.perf_counter() - start)
    except torch.OutOfMemoryError as error:
        work.optimizer.zero_grad()
        c.free()
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    seconds, photos = statistics.median(times[1:]), len(samples)
    model, hardware = step_flops(c, work.collate(samples[:1]).input_ids.shape[1], photos, checkpointing)
    out = {
        "photos_per_s": round(photos / seconds, 2), "ms_a_pass": round(1e3 * seconds * micro / photos, 1),
        "step_s": [round(t, 3) for t in times], "micro": micro, **c.peaks(),
    }  # fmt: skip
    if c.peak:
        out |= {"tflops": round(model / seconds / 1e12, 1), "mfu_of_measured_matmul": round(model / seconds / c.peak, 3),
                "hfu": round(hardware / seconds / c.peak, 3)}  # fmt: skip
        name = torch.cuda.get_device_name() if c.cuda else ""
        if rate := next((v for k, v in DATASHEET.items() if k in name), None):
            out["mfu_of_datasheet"] = round(model / seconds / rate, 3)
    return out


def step_flops(c: Check, length: int, photos: int, checkpointing: bool) -> tuple[float, float]:
    """(what the mathematics needs, what is computed): 4 operations a frozen weight and token, 6 a LoRA weight, causal attention."""
    text = c.config().text_config
    heads = text.num_key_value_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    d, i = text.hidden_size, text.intermediate_size
    linear = text.num_hidden_layers * (2 * d * d + 2 * d * heads + 3 * d * i)
    lora = text.num_hidden_layers * RANK * (2 * (d + d) + 2 * (d + heads) + 3 * (d + i))
    tokens = length * photos
    attention = 2.0 * length * tokens * d * text.num_hidden_layers  # forward, causal half of 4 n² d
    forward = 2.0 * linear * tokens + 2.0 * lora * tokens + attention
    model = forward + 2.0 * linear * tokens + 4.0 * lora * tokens + 2.5 * attention
    return model, model + (forward if checkpointing else 0.0)


def slice_batch(c: Check, layers: int, dtype: torch.dtype = torch.bfloat16, quantize: bool = False) -> tuple[Any, Any]:
    """A slice of the model and a batch of two photos with features drawn at random."""
    from catlib.data.records import image_root_of, read_samples
    from catlib.vlm.batches import Collator, check_batch

    vlm = c.build(layers, quantize=quantize, dtype=dtype)
    path = c.data() / "train.jsonl"
    root = image_root_of(path)
    batch = Collator(vlm, root)(read_samples(path, root)[:2])
    n = int((batch.input_ids == vlm.base.config.image_token_id).sum())
    width = vlm.base.config.vision_config.hidden_size
    features = torch.randn(n, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    batch = replace(batch, features=features, pixels=None)
    check_batch(vlm, batch)
    return vlm, batch.to(c.device)


def loss_of(vlm: Any, batch: Any, low: bool = True) -> tuple[torch.Tensor, int]:
    from catlib.training.loss import AnswerLoss

    with torch.autocast(batch.input_ids.device.type, dtype=torch.bfloat16, enabled=low):
        return AnswerLoss(vlm)(batch)


def gradient(vlm: Any, batch: Any, low: bool, seed: int = 0) -> tuple[float, list[torch.Tensor]]:
    trained = [p for p in vlm.model.parameters() if p.requires_grad]
    vlm.model.train()
    torch.manual_seed(seed)
    loss, n = loss_of(vlm, batch, low)
    grads = torch.autograd.grad(loss / n, trained) if not _checkpoints(vlm) else _by_backward(loss / n, trained)
    return float(loss.detach()) / n, [g.detach().float() for g in grads]


def _checkpoints(vlm: Any) -> bool:
    return any(getattr(m, "gradient_checkpointing", False) for m in vlm.model.modules())


def _by_backward(loss: torch.Tensor, trained: list[torch.Tensor]) -> list[torch.Tensor]:
    for p in trained:
        p.grad = None
    loss.backward()
    grads = [p.grad for p in trained]
    for p in trained:
        p.grad = None
    return grads


def error(found: tuple[float, list[torch.Tensor]], reference: tuple[float, list[torch.Tensor]]) -> float:
    above = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(found[1], reference[1], strict=True))
    below = sum(float(b.double().square().sum()) for b in reference[1])
    return float(f"{math.sqrt(above / below):.3g}")


def spread_b(model: torch.nn.Module) -> None:
    """LoRA's B is 0 at first, and A's gradient with it: draw it."""
    generator = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data = (0.02 * torch.randn(p.shape, generator=generator)).to(p)


def unfuse(model: torch.nn.Module) -> None:
    for module in model.modules():
        if "forward" in vars(module):
            del module.forward


def set_dropout(model: torch.nn.Module, p: float) -> None:
    from torch.nn import Dropout, Identity

    for module in model.modules():
        for key, dropout in (
            list(getattr(module, "lora_dropout", {}).items()) if hasattr(module, "lora_dropout") else []
        ):
            if isinstance(dropout, Dropout | Identity):
                module.lora_dropout[key] = Dropout(p) if p else Identity()


def to_nf4(language_model: torch.nn.Module, device: torch.device) -> None:
    """Every linear layer of the language model in NF4 with double quantization, bf16 compute."""
    import bitsandbytes as bnb

    for module in list(language_model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is torch.nn.Linear:
                new = bnb.nn.Linear4bit(
                    child.in_features, child.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=True,
                    device="meta",
                )  # fmt: skip
                drawn = child.weight.data.to("cpu") if device.type == "cpu" else child.weight.data
                weight = bnb.nn.Params4bit(
                    drawn, requires_grad=False, quant_type="nf4", compress_statistics=True, module=new
                )
                new.weight = weight.to(device)
                setattr(module, name, new)


def transformers_trainer(c: Check, **more: Any) -> dict[str, Any]:
    """transformers.Trainer on catlib's uncached batches, with peft's own LoRA and the model's own loss over all positions."""
    from transformers import Trainer, TrainingArguments

    from catlib.data.records import image_root_of, read_samples
    from catlib.training.lora import lora_config, peft_model
    from catlib.vlm.batches import Collator

    vlm = c.build()
    path = c.data() / "train.jsonl"
    root = image_root_of(path)
    samples = read_samples(path, root)
    collate = Collator(replace(vlm, model=SimpleNamespace(config=vlm.base.config)), root)  # for the loader's processes
    vlm.model = peft_model(vlm.model, lora_config(vlm.model, c.settings(), vlm.family))

    def batch_of(rows: list[Any]) -> dict[str, torch.Tensor]:
        batch = collate(rows)
        pixels = batch.pixels["pixel_values"].to(torch.bfloat16)
        return {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "labels": batch.labels,
            "pixel_values": pixels,
        }

    arguments = TrainingArguments(remove_unused_columns=False, **peer_arguments(c, **more))
    clock = Clock(c)
    trainer = Trainer(
        vlm.model, arguments, train_dataset=samples * 8, data_collator=batch_of, callbacks=[clock.callback()]
    )
    trainer.train()
    return clock.result()


def trl_trainer(c: Check, **more: Any) -> dict[str, Any]:
    """TRL with completion-only loss on prompt-completion data, photos decoded by workers."""
    from datasets import Dataset, Image
    from trl import SFTConfig, SFTTrainer

    from catlib.data.records import image_root_of, read_samples
    from catlib.training.lora import lora_config

    vlm = c.build()
    path = c.data() / "train.jsonl"
    root = image_root_of(path)
    rows = [
        {"images": [str(root / s.image)], "prompt": [{"role": "user", "content": s.question}],
         "completion": [{"role": "assistant", "content": s.answer}]}
        for s in read_samples(path, root)
    ] * 8  # fmt: skip
    data = Dataset.from_list(rows).cast_column("images", [Image()])
    arguments = SFTConfig(max_length=None, **peer_arguments(c, **more))
    config = lora_config(vlm.model, c.settings(), vlm.family)
    clock = Clock(c)
    vlm.model.train()
    trainer = SFTTrainer(
        vlm.model,
        arguments,
        train_dataset=data,
        processing_class=vlm.processor,
        peft_config=config,
        callbacks=[clock.callback()],
    )
    trainer.train()
    return clock.result()


def peer_arguments(c: Check, **more: Any) -> dict[str, Any]:
    values = {
        "output_dir": str(c.work / "peer"), "max_steps": 4, "per_device_train_batch_size": MICRO, "gradient_accumulation_steps": c.step_photos // MICRO,
        "learning_rate": 2e-4, "bf16": True, "gradient_checkpointing": False, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "dataloader_num_workers": 0 if c.tiny else 8, "max_grad_norm": 1.0, "use_cpu": not c.cuda,
    }  # fmt: skip
    return {**values, **more}


class Clock:
    """Seconds of a peer's optimizer steps, synchronized at their ends."""

    def __init__(self, c: Check) -> None:
        self.c, self.ends = c, []

    def callback(self) -> Any:
        from transformers import TrainerCallback

        clock = self

        class Times(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                clock.c.sync()
                clock.ends.append(time.perf_counter())
                if len(clock.ends) == 1:
                    clock.c.reset_peak()

        return Times()

    def result(self) -> dict[str, Any]:
        steps = [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)]
        seconds = statistics.median(steps)
        return {"photos_per_s": round(self.c.step_photos / seconds, 2), "step_s": [round(s, 3) for s in steps], **self.c.peaks()}  # fmt: skip


def kernel_kind(name: str) -> str:
    low = name.lower()
    for kind, signs in {
        "attention": ("flash", "fmha", "attention", "sdpa"),
        "matrix product": (
            "gemm",
            "cutlass",
            "nvjet",
            "xmma",
            "aten::mm",
            "aten::addmm",
            "cublas",
            "sgemm",
            "wgmma",
            "aten::bmm",
            "aten::linear",
        ),
        "4-bit": ("dequant", "quantize", "kdequant"),
        "random numbers": ("bernoulli", "distribution", "philox", "random"),
        "copies": ("memcpy", "memset", "copy_kernel", "direct_copy", "aten::copy_", "catarray", "aten::cat"),
        "reductions": ("reduce", "softmax", "norm", "aten::mean", "aten::sum"),
        "element by element": (
            "elementwise",
            "vectorized",
            "unrolled",
            "aten::mul",
            "aten::add",
            "aten::silu",
            "fill",
            "triton",
            "index",
        ),
    }.items():
        if any(sign in low for sign in signs):
            return kind
    return "other"


def us(c: Check, work: Callable[[], Any]) -> float:
    return round(1e6 * c.seconds(lambda: [work() for _ in range(5)], repeat=5) / 5, 1)


def forget_accelerator() -> None:
    """accelerate keeps one state a process: what a peer set (bf16) would stop catlib's own, and the other way round."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def has(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is not None


def guarded(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return work()
    except Exception as error:  # a peer that does not run must not end the rest
        return {"error": f"{type(error).__name__}: {str(error)[:300]}", "at": traceback.format_exc().splitlines()[-7:]}


def show(row: Any) -> None:
    print(f"  [{time.perf_counter() - BEGAN:5.0f} s] {json.dumps(row, default=str)}", flush=True)


SECTIONS: dict[str, Callable[[Check], dict[str, Any]]] = {
    "versions": versions, "ceilings": ceilings, "correct": correct, "train": train, "scoring": scoring, "qlora": qlora, "clip": clip,
    "whole": whole, "peers": peers,  # the peers last: Liger patches transformers' classes for the rest of the process
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu_check_out")))
    parser.add_argument("--seconds", type=float, default=470, help="after so many, no section is begun")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, comma separated")
    parser.add_argument("--brief", action="store_true", help="in train and peers only the rows that are compared first")
    parser.add_argument("--tiny", action="store_true", help="a toy model on the CPU: does it run?")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    c = Check(args)
    import logging

    logging.basicConfig(level=logging.WARNING)
    import transformers

    transformers.logging.set_verbosity_error()
    for name in args.only.split(","):
        left = c.deadline - time.perf_counter()
        if left < (NEED[name] if not args.tiny else 0):
            c.figures[name] = {"skipped": f"{left:.0f} s left, {NEED[name]} needed"}
        else:
            print(f"== {name} [{time.perf_counter() - BEGAN:.0f} s]", flush=True)
            start = time.perf_counter()
            result = guarded(lambda name=name: SECTIONS[name](c))
            c.figures[name] = {**result, "section_seconds": round(time.perf_counter() - start, 1)}
            print(
                json.dumps(result, indent=1, default=str)
                if name in ("versions", "ceilings", "correct") or "error" in result
                else "",
                flush=True,
            )
            with contextlib.suppress(RuntimeError):  # after a fault of the device nothing more can be freed
                c.free()
        (args.out / "gpu_check.json").write_text(json.dumps(c.figures, indent=1, default=str), encoding="utf-8")
    print("\n| case | photos/s | ms a pass | MFU | peak GB | estimate GB |\n| --- | --- | --- | --- | --- | --- |")
    for section in ("train", "qlora", "peers"):
        for row in c.figures.get(section, {}).get("rows", []):
            cells = [
                row.get(k, "") for k in ("photos_per_s", "ms_a_pass", "mfu_of_datasheet", "peak_gb", "estimate_gb")
            ]
            print("| " + " | ".join(map(str, [row["case"], *cells])) + " |")
    failed = [name for name, result in c.figures.items() if "error" in result]
    print(f"{time.perf_counter() - BEGAN:.0f} s; failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
