"""How fast chapter 2 trains and how much memory it takes, against nanoGPT's plain formulation of the same step."""

import json
import sys

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from minigen.bench import Row, alone, highest_memory, medians
from minigen.gpt import GPT, GPTConfig
from minigen.training import decay_groups, linear_cross_entropy, pick_device

PEAK = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "4090": 165e12}  # bf16, dense


def plain_loss(model: GPT, tokens: Tensor) -> Tensor:
    """nanoGPT's loss: all logits, then their cross entropy."""
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def pieces_loss(model: GPT, tokens: Tensor) -> Tensor:
    """Ours: from the hidden vectors to the loss, some places at a time."""
    return linear_cross_entropy(model.hidden(tokens[:, :-1]), model.tokens.weight, tokens[:, 1:])


LOSSES = {"plain": plain_loss, "pieces": pieces_loss}


class Step:
    """One optimizer step of the pixel GPT on `batch` sequences of `length`: AdamW, fused in ours; clipping; autocast."""

    def __init__(self, loss: str, dtype: torch.dtype, length: int, batch: int = 1, device=torch.device("cpu"), compiled=False):
        torch.manual_seed(0)
        self.model, self.loss, self.dtype, self.device = GPT(GPTConfig()).to(device), LOSSES[loss], dtype, device
        self.optimizer = torch.optim.AdamW(decay_groups(self.model, 0.1), lr=1e-3, betas=(0.9, 0.95),
                                           fused=True if loss == "pieces" else None)
        self.tokens = torch.randint(self.model.config.vocab_size, (batch, length + 1), device=device)
        if compiled:
            self.loss = torch.compile(self.loss)

    def __call__(self) -> float:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            value = self.loss(self.model, self.tokens)
        value.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return value.item()


def measure_peak(loss: str, dtype: str, length: int) -> int:
    """Bytes that a step adds to what the process held before it, at its highest.

    First a short step, so that gradients and moments are there, and then the one that counts.
    """
    step = Step(loss, getattr(torch, dtype), length)
    whole, step.tokens = step.tokens, step.tokens[:, :65]
    step()
    step.tokens = whole
    before = psutil.Process().memory_info().rss
    step()
    return highest_memory() - before


def gpu_rows(device: torch.device, length: int, batch: int, repetitions: int) -> list[Row]:
    """Tokens a second and, of a card whose peak is known, the share of it; with and without compilation."""
    rows, model = [], GPT(GPTConfig())
    # PaLM (Chowdhery et al. 2022), appendix B: 6 for each weight that multiplies, and the attention
    weights = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("positions"))
    flops = 6 * weights + 12 * model.config.depth * model.config.dim * length
    name = torch.cuda.get_device_name()
    peak = next((flops for card, flops in PEAK.items() if card in name), None)
    for compiled in (False, True):
        step = Step("pieces", torch.bfloat16, length, batch, device, compiled)
        rate = batch * length / medians({"step": step}, repetitions)["step"]  # a step ends by reading its loss
        case = f"{name}, bfloat16, {'compiled' if compiled else 'not compiled'}"
        rows.append(Row(case, rate, "tokens/s"))
        if peak:
            rows.append(Row(f"{case}: share of the card's peak", rate * flops / peak, "", note=f"{peak / 1e12:.0f} TFLOP/s"))
    return rows


def rows(quick: bool = False) -> list[Row]:
    """Chapter 2's table; `quick` takes 1024 places instead of 4096, with fewer repetitions."""
    length, repetitions = (1024, 3) if quick else (4096, 11)
    steps = {"plain": Step("plain", torch.float32, length), "pieces": Step("pieces", torch.float32, length),
             "bfloat16": Step("pieces", torch.bfloat16, length)}
    difference = abs(steps["plain"]() - steps["pieces"]())
    time = medians(steps, repetitions)
    peak = {(loss, dtype): alone(__name__, loss, dtype, length) for loss, dtype in
            [("plain", "float32"), ("pieces", "float32"), ("pieces", "bfloat16")]}
    fast_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    slow = "" if fast_bf16 else "; this processor has no bfloat16 instructions: it is emulated"
    target = (lambda value: None) if quick else (lambda value: value)
    return [
        Row(f"training on {length} pixels, float32, against the plain way", time["plain"] / time["pieces"], "x", target(1.2),
            note=f"{length / time['pieces']:,.0f} against {length / time['plain']:,.0f} tokens/s"),
        Row("added peak memory, float32, against the plain way", peak["pieces", "float32"] / peak["plain", "float32"], "x", target(0.55),
            at_least=False, note=f"{peak['pieces', 'float32'] / 1e6:.0f} MB against {peak['plain', 'float32'] / 1e6:.0f} MB"),
        Row("training in bfloat16, against the plain way in float32", time["plain"] / time["bfloat16"], "x", target(1.4),
            note=f"{length / time['bfloat16']:,.0f} tokens/s, +{peak['pieces', 'bfloat16'] / 1e6:.0f} MB{slow}"),
        Row("training in bfloat16, against ours in float32", time["pieces"] / time["bfloat16"], "x", target(1.4)),
        Row("difference of the first losses", difference, "", 1e-4, at_least=False),
        *(gpu_rows(pick_device(), length, 16, repetitions) if torch.cuda.is_available() else []),
    ]


if __name__ == "__main__":
    print(json.dumps(measure_peak(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
