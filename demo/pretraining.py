"""Teaches the demo models: CLIP by contrast of pictures and captions, LLaVA by questions on CLIP's frozen tower."""

import logging
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy, smooth_l1_loss
from transformers import CLIPProcessor, LlavaForConditionalGeneration

from catlib.progress import track
from demo.architecture import SIDE
from demo.corpus import Corpus, augment

log = logging.getLogger(__name__)
BATCH = 64
HEAD_SCALE = 12.0  # image embeddings have length 1, too short for a linear layer to start from
Loss = Callable[[np.ndarray, np.random.Generator], torch.Tensor]  # of the corpus rows in one batch
IGNORED = -100  # label of a token that is not supervised


def train_clip(model: Any, processor: CLIPProcessor, corpus: Corpus, epochs: int, seed: int, lr: float = 1e-3) -> None:
    """Contrastive training (Radford et al. 2021); equal captions are positives, too (UniCL, Yang et al. 2022).

    A few ten thousand pictures are little for a transformer, so linear heads learn breed, traits and measures beside it, from the
    image embedding and from the patches that LLaVA will read. They are thrown away afterwards: the CLIP that is saved compares
    pictures and texts as any other.
    """
    labels, measures = corpus.labels(), corpus.measures()
    classes = [int(column.max()) + 1 for column in labels.T]
    widths = [*classes, measures.shape[1]]
    of_embedding = torch.nn.Linear(model.config.projection_dim, sum(widths))
    of_patches = torch.nn.Linear(model.config.vision_config.hidden_size, sum(widths))

    def look_loss(outputs: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
        *parts, measured = outputs.split(widths, dim=1)
        traits = [cross_entropy(part, labels[rows, k], ignore_index=IGNORED) for k, part in enumerate(parts)]
        return torch.stack(traits).mean() + smooth_l1_loss(measured, measures[rows])

    def loss_of(rows: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        captions = [corpus.caption(i, rng) for i in rows]
        length = 77 if rng.random() < 0.12 else 36  # long captions cost most of the time and are rare
        tokens = processor.tokenizer(captions, padding=True, truncation=True, max_length=length, return_tensors="pt")
        out = model(pixel_values=augment(corpus.pixels[rows], SIDE, rng), output_hidden_states=True, **tokens)
        same = torch.tensor([[a == b for b in captions] for a in captions]).float()
        target = same / same.sum(1, keepdim=True)
        contrast = (cross_entropy(out.logits_per_image, target) + cross_entropy(out.logits_per_text, target)) / 2
        patches = out.vision_model_output.hidden_states[-2][:, 1:].mean(1)
        looks = look_loss(of_embedding(out.image_embeds * HEAD_SCALE), rows) + 0.5 * look_loss(
            of_patches(patches), rows
        )
        return contrast + looks

    heads = [*of_embedding.parameters(), *of_patches.parameters()]
    _fit(model, heads, loss_of, len(corpus.breeds), epochs, (seed, 1), lr, "teaching CLIP")


def train_llava(
    model: LlavaForConditionalGeneration,
    processor: Any,
    corpus: Corpus,
    epochs: int,
    seed: int,
    lr: float = 2e-3,
) -> None:
    """Next-token training of projector and decoder on the answers and their end token; the tower stays as it is."""
    model.model.vision_tower.requires_grad_(False)
    tokenizer = processor.tokenizer
    images = processor.image_token * model.config.image_seq_length

    def loss_of(rows: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        prompts, texts = [], []
        for i in rows:
            question, answer = corpus.question(i, rng)
            user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
            reply = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
            prompts.append(
                processor.apply_chat_template([user], add_generation_prompt=True).replace(processor.image_token, images)
            )
            texts.append(processor.apply_chat_template([user, reply]).replace(processor.image_token, images))
        batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
        for row, prompt in zip(labels, tokenizer(prompts)["input_ids"], strict=True):
            row[: len(prompt)] = IGNORED
        pixels = augment(corpus.pixels[rows], SIDE, rng)
        logits = model(pixel_values=pixels, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)

    _fit(model, [], loss_of, len(corpus.breeds), epochs, (seed, 2), lr, "teaching LLaVA")
    model.model.vision_tower.requires_grad_(True)


def _fit(
    model: torch.nn.Module,
    heads: list[torch.nn.Parameter],
    loss_of: Loss,
    size: int,
    epochs: int,
    seed: tuple[int, int],
    lr: float,
    what: str,
) -> None:
    """`epochs` passes with a short warm-up and a cosine to zero.

    Muon (Jordan et al. 2024) for the layers' matrices, which learn twice as fast by it, AdamW for all else.
    """
    rng = np.random.default_rng(seed)
    steps = epochs * (size // BATCH)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [
        p for name, p in named if p.ndim == 2 and not any(word in name for word in ("embed", "projection", "lm_head"))
    ]
    chosen = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in chosen] + heads
    decayed, plain = [p for p in rest if p.ndim > 1], [p for p in rest if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizers = [
        torch.optim.AdamW(groups, lr, (0.9, 0.98)),
        torch.optim.Muon(matrices, 2 * lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
    ]
    warmup = max(1, steps // 20)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * min(1, step / steps)))
        )
        for optimizer in optimizers
    ]
    model.train()
    losses: list[float] = []
    order = np.concatenate([rng.permutation(size)[: size // BATCH * BATCH] for _ in range(epochs)])
    for rows in track(order.reshape(-1, BATCH), what, unit="steps"):
        loss = loss_of(rows, rng)
        model.zero_grad()
        for head in heads:
            head.grad = None
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*matrices, *rest], 1.0)
        for optimizer in optimizers:
            optimizer.step()
        for schedule in schedules:
            schedule.step()
        losses.append(loss.item())
        if len(losses) % (size // BATCH) == 0:
            epoch = len(losses) // (size // BATCH)
            log.info("%s: epoch %d of %d, loss %.3f", what, epoch, epochs, np.mean(losses[-(size // BATCH) :]))
    model.eval()
