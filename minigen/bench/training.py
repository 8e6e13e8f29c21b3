"""Chapter 2: the speed and memory of a training step, against nanoGPT's plain form."""

import json
import sys

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from minigen.bench import Row, alone, highest_memory, medians
from minigen.devices import pick_device, pick_dtype
from minigen.gpt import GPT, GPTConfig
from minigen.losses import linear_cross_entropy
from minigen.training import decay_groups

PEAK = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12,
        "L40S": 362e12, "L4": 121e12, "4090": 165e12}  # bfloat16, dense
CPU = torch.device("cpu")


def plain_loss(model: GPT, tokens: Tensor) -> Tensor:
    """nanoGPT's loss: all logits, then their cross entropy."""
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def pieces_loss(model: GPT, tokens: Tensor) -> Tensor:
    """Ours: from the hidden vectors to the loss, some positions at a time."""
    hidden = model.hidden(tokens[:, :-1])
    return linear_cross_entropy(hidden, model.tokens.weight, tokens[:, 1:])


LOSSES = {"plain": plain_loss, "pieces": pieces_loss}


class Step:
    """A training step of the pixel GPT: autocast, clipping, AdamW (fused in ours)."""

    def __init__(self, loss: str, dtype: torch.dtype, length: int, batch: int = 1,
                 device: torch.device = CPU, compiled: bool = False):
        torch.manual_seed(0)
        self.model, self.dtype, self.device = GPT(GPTConfig()).to(device), dtype, device
        self.loss = torch.compile(LOSSES[loss]) if compiled else LOSSES[loss]
        self.optimizer = torch.optim.AdamW(
            decay_groups(self.model, 0.1), lr=1e-3, betas=(0.9, 0.95),
            fused=True if loss == "pieces" else None)
        vocab_size = self.model.config.vocab_size
        self.tokens = torch.randint(vocab_size, (batch, length + 1), device=device)

    def __call__(self) -> float:
        half = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=half):
            value = self.loss(self.model, self.tokens)
        value.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return value.item()


def measure_peak(loss: str, dtype: str, length: int) -> int:
    """Bytes that a step adds, at its peak, to what the process held before.

    A short step comes first, so that gradients and moments are already allocated.
    """
    step = Step(loss, getattr(torch, dtype), length)
    whole, step.tokens = step.tokens, step.tokens[:, :65]
    step()
    step.tokens = whole
    before = psutil.Process().memory_info().rss
    step()
    return highest_memory() - before


def gpu_rows(device: torch.device, length: int, batch: int,
             repetitions: int) -> list[Row]:
    """Tokens per second and the share of a known card's peak, compiled and not."""
    rows, model = [], GPT(GPTConfig())
    # PaLM (Chowdhery et al. 2022), appendix B: per token, 6 for each weight that
    # multiplies, plus the attention
    weights = sum(p.numel() for name, p in model.named_parameters()
                  if "positions" not in name)
    flops = 6 * weights + 12 * model.config.depth * model.config.dim * length
    name = torch.cuda.get_device_name()
    peak = next((flops for card, flops in PEAK.items() if card in name), None)
    for compiled in (False, True):
        step = Step("pieces", torch.bfloat16, length, batch, device, compiled)
        # a step ends by reading its loss, so the clock waits for the GPU
        rate = batch * length / medians({"step": step}, repetitions)["step"]
        case = f"{name}, bfloat16, {'compiled' if compiled else 'not compiled'}"
        rows.append(Row(case, rate, "tokens/s"))
        if peak:
            rows.append(Row(f"{case}: share of the card's peak", rate * flops / peak,
                            "", note=f"{peak / 1e12:.0f} TFLOP/s"))
    return rows


def rows(quick: bool = False) -> list[Row]:
    """Chapter 2's table; `quick` takes 1024 positions, and fewer repetitions."""
    length, repetitions = (1024, 3) if quick else (4096, 11)
    variants = {"plain": ("plain", "float32"), "pieces": ("pieces", "float32"),
                "bfloat16": ("pieces", "bfloat16")}
    steps = {name: Step(loss, getattr(torch, dtype), length)
             for name, (loss, dtype) in variants.items()}
    difference = abs(steps["plain"]() - steps["pieces"]())
    time = medians(steps, repetitions)
    peak = {name: alone(__name__, loss, dtype, length) / 1e6
            for name, (loss, dtype) in variants.items()}
    rate = {name: length / seconds for name, seconds in time.items()}
    target = None if quick else 1.4
    slow = ""
    if pick_dtype(CPU) == torch.float32:
        target, slow = None, "no bfloat16 instructions here: emulated, without a target"
    return [
        Row(f"training on {length} pixels, float32, against the plain way",
            time["plain"] / time["pieces"], "x", None if quick else 1.2,
            note=f"{rate['pieces']:,.0f} against {rate['plain']:,.0f} tokens/s"),
        Row("added peak memory, float32, against the plain way",
            peak["pieces"] / peak["plain"], "x", None if quick else 0.55,
            at_least=False,
            note=f"{peak['pieces']:.0f} MB against {peak['plain']:.0f} MB"),
        Row("training in bfloat16, against the plain way in float32",
            time["plain"] / time["bfloat16"], "x", target,
            note=f"{rate['bfloat16']:,.0f} tokens/s, +{peak['bfloat16']:.0f} MB"
                 + (f"; {slow}" if slow else "")),
        Row("training in bfloat16, against ours in float32",
            time["pieces"] / time["bfloat16"], "x", target, note=slow),
        Row("difference of the first losses", difference, "", 1e-4, at_least=False),
        *(gpu_rows(pick_device(), length, 16, repetitions)
          if torch.cuda.is_available() else []),
    ]


if __name__ == "__main__":
    print(json.dumps(measure_peak(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
