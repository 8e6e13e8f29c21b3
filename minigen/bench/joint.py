"""What joint training on text and images costs each task; qk-norm and z-loss.

Small runs of chapter 9; bits are those of unseen images and of their captions."""

import math
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import default_collate

from minigen.anytoany import AnyToAny, make_batch, make_sequence, sequence_loss
from minigen.bench import Row
from minigen.devices import pick_device
from minigen.runs import shipped
from minigen.train import anytoany
from minigen.training import fit
from minigen.transformer import Attention

TASKS = {
    "both tasks": {},
    "text to image alone": {"text_first": 1.0, "image_first": 0.0, "text_weight": 0.0},
    "image to text alone": {"text_first": 0.0, "image_first": 1.0, "image_weight": 0.0},
}
NORMS = {"neither": {"qk_norm": False, "z_loss": 0.0},
         "qk-norm": {"qk_norm": True, "z_loss": 0.0},
         "z-loss": {"qk_norm": False, "z_loss": 1e-3},
         "both": {"qk_norm": True, "z_loss": 1e-3}}
RATE = 1e-2  # five times that of the presets


def configuration(name: str, seed: int, quick: bool, folder: Path,
                  **changes) -> anytoany.Config:
    """The options of a small run: 64 tokens per image, and images of its own seed."""
    preset = anytoany.PRESETS["test" if quick else "cpu"]
    sizes = {"steps": 4} if quick else {
        "steps": 1000, "dim": 128, "depth": 4, "train_images": 8000, "warmup": 50,
        "ema": 0.99}
    changes = sizes | {"save_every": 0, "eval_steps": ()} | changes
    return replace(preset, size=64, tokenizer=shipped("vq", "tokens64"), seed=seed,
                   codes_in=str(folder / f"codes-{seed}"),
                   out=folder / f"{name}-{seed}".replace(" ", "-"), **changes)


@torch.no_grad()
def watch(model: AnyToAny, tokens: Tensor, learned: Tensor) -> dict[str, float]:
    """The loss of sequences, their mean log Z, and the largest attention score."""
    largest, was_training = [], model.training

    def note(attention: Attention, inputs: tuple, output: Tensor) -> None:
        x = inputs[0]
        qkv = attention.qkv(x).view(*x.shape[:2], 3, attention.heads, -1)
        q, k, _ = qkv.transpose(1, 3).unbind(2)
        if attention.norm_q is not None:
            q, k = attention.norm_q(q), attention.norm_k(k)
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
        largest.append(scores.abs().max().item())

    hooks = [module.register_forward_hook(note) for module in model.modules()
             if isinstance(module, Attention)]
    model.eval()
    loss = sequence_loss(model, tokens, learned).item()
    log_z = model(tokens).logsumexp(-1).mean().item()
    model.train(was_training)
    for hook in hooks:
        hook.remove()
    return {"loss": loss, "log Z": log_z, "largest score": max(largest)}


def norm_rows(quick: bool, folder: Path) -> list[Row]:
    """Rows on loss, log Z and scores at a high learning rate, for each of `NORMS`."""
    found, device = [], pick_device()
    for name, changes in NORMS.items():
        steps = 4 if quick else 400
        config = configuration(name, 0, quick, folder, lr=RATE, steps=steps,
                               lr_decay="none", **changes)
        torch.manual_seed(0)
        task = anytoany.build(config, device)
        batch = default_collate([task.val[n] for n in range(min(16, len(task.val)))])
        rows = [make_sequence(task.model, codes, caption, 3)
                for codes, caption in zip(batch.tokens, batch.caption, strict=True)]
        tokens, learned = (x.to(device) for x in make_batch(task.model, rows))
        for record in fit(task.model, task.data, task.loss, config):
            if record.step % max(1, steps // 16) == 0:
                for unit, value in watch(task.model, tokens, learned).items():
                    found.append(Row(f"{name}, step {record.step}", value, unit))
    return found


def rows(quick: bool) -> list[Row]:
    """Rows for each task and seed, then for each of `NORMS` and step."""
    found = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for seed in range(1 if quick else 3):
            for name, changes in TASKS.items():
                config = configuration(name, seed, quick, folder, **changes)
                metrics = anytoany.main(config)["metrics"]
                note = f"{config.steps} steps"
                for to in ("image", "text"):
                    if f"to {to}" in name or name == "both tasks":
                        found.append(Row(f"{name}, seed {seed}",
                                         metrics[f"bits_of_{to}"], f"bits of {to}",
                                         note=note))
        return found + norm_rows(quick, folder)
