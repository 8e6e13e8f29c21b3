"""How design choices change a small pixel GPT of chapter 1: quality, not speed.

Each case has three seeds; FD-landscape is of images in the model's few colors."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minigen.bench import Row
from minigen.bench.sweep import Judge, as_rows, landscapes
from minigen.devices import pick_device
from minigen.gpt import GPT, GPTConfig
from minigen.pixelgpt import ColorTokenizer, WindowDataset, next_pixel_loss
from minigen.training import FitConfig, fit

SIZE, BITS, SEPARATOR = 16, 3, 512
UNITS = ("nats", "FD", "bias", "in place")
STEPS = (50, 100, 200, 400, 800)
FIT = FitConfig(steps=STEPS[-1], batch_size=16, lr=4e-3, warmup=50, precision="float32",
                eval_steps=STEPS)


@dataclass(frozen=True)
class Case:
    """One way to turn an image into a sequence, and the size of its model."""

    name: str
    positions: str = "learned"
    dim: int = 64
    columns_first: bool = False  # read down the columns
    windows: bool = False  # train on pieces of one long stream, as published
    separators: bool = False  # end each row with a token of its own

    @property
    def width(self) -> int:
        """Tokens in a row of the image."""
        return SIZE + self.separators

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to sequences (B, H * width)."""
        images = images.mT if self.columns_first else images
        rows = ColorTokenizer(BITS).encode(images).unflatten(1, (SIZE, SIZE))
        return F.pad(rows, (0, self.separators), value=SEPARATOR).flatten(1)

    def decode(self, tokens: Tensor) -> Tensor:
        """Sequences (B, T) to images (B, 3, H, W); a misplaced separator is black."""
        rows = tokens.unflatten(1, (SIZE, self.width))[..., :SIZE]
        colors = rows.where(rows < SEPARATOR, 0).flatten(1)
        images = ColorTokenizer(BITS).decode(colors, SIZE, SIZE)
        return images.mT if self.columns_first else images

    def in_place(self, tokens: Tensor) -> float:
        """The share of rows in which the last token, and no other, is a separator."""
        found = rearrange(tokens == SEPARATOR, "b (h w) -> (b h) w", h=SIZE)
        return (found[:, -1] & ~found[:, :-1].any(dim=1)).float().mean().item()


CASES = [
    Case("learned positions"), Case("row and column positions", positions="rowcol"),
    Case("column by column", columns_first=True),
    Case("windows", windows=True), Case("row separators", separators=True),
    *(Case(f"width {dim}", dim=dim) for dim in (16, 32, 128)),
]


class Drawer(nn.Module):
    """A small GPT for the sequences of a case."""

    def __init__(self, case: Case):
        super().__init__()
        self.gpt = GPT(GPTConfig(
            vocab_size=SEPARATOR + case.separators, columns=case.width,
            block_size=SIZE * case.width, positions=case.positions, depth=2, heads=2,
            dim=case.dim))


@torch.no_grad()
def nats_per_color(model: Drawer, tokens: Tensor) -> float:
    """Mean cross entropy of all colors but the first, separators left out."""
    total = count = 0.0
    for part in tokens.split(64):
        logits, wanted = model.gpt(part[:, :-1]), part[:, 1:]
        loss = F.cross_entropy(logits.mT, wanted, reduction="none")
        colors = wanted < SEPARATOR
        total, count = total + loss[colors].sum().item(), count + colors.sum().item()
    return total / count


def train_and_measure(case: Case, config: FitConfig, train: Tensor, val: Tensor,
                      judge: Judge) -> Iterator[tuple[int, dict]]:
    """Train, and yield the step and the figures by unit at each evaluation."""
    torch.manual_seed(config.seed)
    device = pick_device()
    model, data = Drawer(case).to(device), case.encode(train)
    if case.windows:
        data = WindowDataset(data, data.shape[1] - 1)
    tokens = case.encode(val).to(device)
    for record in fit(model, data, next_pixel_loss, config):
        if not record.evaluate:
            continue
        model.eval()
        generator = torch.Generator(device).manual_seed(config.seed)
        drawn = model.gpt.generate(
            tokens[:, :1], tokens.shape[1] - 1, generator=generator).cpu()
        found = {"nats": nats_per_color(model, tokens)} | judge(case.decode(drawn))
        if case.separators:
            found["in place"] = case.in_place(drawn)
        yield record.step, found
        model.train()


def rows(quick: bool) -> list[Row]:
    """Rows for each case, seed and unit; of the first case also during training."""
    cases, seeds, count, drawn, config = CASES, 3, 20_000, 256, FIT
    if quick:
        cases, seeds, count, drawn = [CASES[0], CASES[3], CASES[4]], 1, 64, 72
        config = replace(FIT, steps=2, warmup=1, eval_steps=(1, 2))

    def in_colors(images: Tensor) -> Tensor:
        return CASES[0].decode(CASES[0].encode(images))

    train, val = (landscapes(*which, SIZE)[0]
                  for which in (("train", count), ("val", drawn)))
    judge = Judge(in_colors(landscapes("test", 72 if quick else 1000, SIZE)[0]))
    note, found = f"{drawn} images, extractor {judge.extractor.hash}", []
    for case in cases:
        due = config.eval_steps if case is CASES[0] else ()  # and the last
        for seed in range(seeds):
            chosen = replace(config, eval_steps=due, seed=seed)
            for step, figures in train_and_measure(case, chosen, train, val, judge):
                name = f"{case.name}, seed {seed}, step {step}"
                found += as_rows(name, figures, UNITS, note)
    return found + as_rows("real images", judge(in_colors(val)), UNITS, note)
