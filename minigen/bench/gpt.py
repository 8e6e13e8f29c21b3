"""How fast chapter 1 draws: the cache, batches, precision, and the floor of memory."""

from pathlib import Path

import torch

from minigen.bench import Row, medians
from minigen.devices import pick_dtype
from minigen.gpt import GPT, GPTConfig
from minigen.sampling import sample_categorical
from minigen.transformer import unwrap

MB = 1e6


def step_time(models: dict, length: int, windows: int, use_cache: bool,
              repetitions: int) -> dict[str, float]:
    """Mean seconds per position of a sequence, for each named (model, batch).

    Steps are timed at `windows` evenly spaced positions, alternating between models,
    and integrated by the trapezoidal rule.
    """
    positions = torch.linspace(1, length - 1, windows).long().tolist()
    step, cache = {}, dict.fromkeys(models)
    for name, (model, batch) in models.items():
        step[name] = unwrap(model.transformer) if use_cache else model.transformer
        if use_cache:
            cache[name] = model.transformer.cache(batch, length)
            for tensor in cache[name].keys + cache[name].values:
                tensor.normal_()  # memory that was never written is not really read

    def draw_one(name, position):
        model, batch = models[name]
        tokens = torch.zeros(batch, 1 if use_cache else position, dtype=torch.int64)
        if use_cache:
            cache[name].filled = position - 1
        hidden = step[name](model.tokens(tokens), cache[name])[:, -1]
        sample_categorical(model.head(hidden).float().softmax(-1))

    curve = {name: [] for name in models}
    for position in positions:
        functions = {name: lambda n=name, p=position: draw_one(n, p) for name in models}
        times = medians(functions, repetitions, repeat=8 if use_cache else 1)
        for name, value in times.items():
            curve[name].append(value)
    x = torch.tensor(positions, dtype=torch.float64)
    return {name: (torch.trapezoid(torch.tensor(y, dtype=torch.float64), x)
                   / (x[-1] - x[0])).item() for name, y in curve.items()}


def last_level_cache() -> int | None:
    """Bytes of the largest cache of the processor, or None if the system hides it."""
    caches = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    sizes = [int(path.read_text().strip().removesuffix("K")) * 1024 for path in caches]
    return max(sizes, default=None)


def copy_bandwidth(cache: int, repetitions: int) -> float:
    """Bytes per second, read and written, of a copy much larger than the cache."""
    source = torch.ones(max(256 * 2**20, 8 * cache) // 4)  # written, so really read
    target = torch.empty_like(source)
    seconds = medians({"copy": lambda: target.copy_(source)}, repetitions)["copy"]
    return 2 * source.nbytes / seconds


def memory_row(model: GPT, batch: int, seconds: float, repetitions: int) -> Row:
    """The seconds of a step against those of reading its weights and its cache once.

    The cache is read as far as it is written, half of it on average.
    """
    table = model.transformer.positions.table
    weights = sum(p.nbytes for p in model.parameters()) - table.nbytes
    cache = model.transformer.cache(batch)
    read = weights + sum(t.nbytes for t in cache.keys + cache.values) / 2
    largest = last_level_cache()
    bandwidth = copy_bandwidth(largest or 0, repetitions)
    note = f"{read / MB:.0f} MB a step, copied at {bandwidth / 1e9:.1f} GB/s"
    why = ""
    if largest is None:
        why = "the size of the processor's cache is unknown"
    elif read < 2 * largest:
        why = f"much of it fits into a cache of {largest / MB:.0f} MB"
    note += f"; no target: {why}" if why else ""
    return Row(f"{batch} at once against the floor that memory sets",
               seconds * bandwidth / read, "x", None if why else 1.6, at_least=False,
               note=note)


@torch.inference_mode()
def rows(quick: bool = False) -> list[Row]:
    """Chapter 1's table; `quick` draws 1024 pixels, not 4096, and repeats less."""
    length, repetitions, windows = (1024, 3, 4) if quick else (4096, 5, 7)
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=length)).eval()
    prompt = torch.zeros(1, 1, dtype=torch.int64)

    cached = medians({"": lambda: model.generate(prompt, length - 1)},
                     1 if quick else 3)[""]
    published = (length - 1) * step_time({"": (model, 1)}, length, windows,
                                         use_cache=False, repetitions=2)[""]
    x = model.tokens(torch.randint(model.config.vocab_size, (1, length)))
    plain, cache = unwrap(model.transformer), model.transformer.cache(1)
    one_by_one = torch.cat([plain(part, cache) for part in x.split(1, dim=1)], dim=1)
    difference = model.head(one_by_one) - model.head(model.transformer(x))

    half = GPT(model.config).eval().bfloat16()
    half.load_state_dict(model.state_dict())
    step = step_time({"1": (model, 1), "16": (model, 16)}, length, windows, True,
                     repetitions)
    step |= step_time({"float32": (model, 1), "bfloat16": (half, 16)}, length, windows,
                      True, 1 if quick else 3)
    fast = pick_dtype(torch.device("cpu")) == torch.bfloat16

    p = torch.randn(1, 4096).softmax(-1)
    sampler = medians({"ours": lambda: sample_categorical(p),
                       "torch": lambda: torch.multinomial(p, 1)}, 15, repeat=200)
    return [
        Row(f"{length} pixels, cached against the published way", published / cached,
            "x", None if quick else 70,
            note=f"{cached:.1f} s against {published:.0f} s, the latter integrated "
                 f"from {windows} positions"),
        Row(f"largest difference of the logits at {length} positions",
            difference.abs().max().item(), "", 1e-4, at_least=False),
        Row("time per image, 16 at once against one, float32",
            step["16"] / 16 / step["1"], "x", 0.6, at_least=False,
            note=f"{step['1'] * length:.1f} s and {step['16'] / 16 * length:.1f} s"),
        Row("time per image, 16 in bfloat16 against one in float32",
            step["bfloat16"] / 16 / step["float32"], "x", 0.4 if fast else None,
            at_least=False, note="" if fast else
            "no target: this processor has no bf16 instructions and emulates them"),
        memory_row(model, 16, step["16"], repetitions),
        Row("drawing one of 4096, against torch.multinomial",
            sampler["torch"] / sampler["ours"], "x", 8,
            note=f"{sampler['ours'] * 1e6:.1f} us against "
                 f"{sampler['torch'] * 1e6:.0f} us"),
    ]
