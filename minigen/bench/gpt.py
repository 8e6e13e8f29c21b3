"""How fast chapter 1 draws: the cache against the published way, batches, precision, and the floor that memory sets."""

import torch

from minigen.bench import Row, medians
from minigen.gpt import GPT, GPTConfig, draw

GB = 1e9


def step_time(models: dict, length: int, windows: int, use_cache: bool, repetitions: int) -> dict[str, float]:
    """Mean seconds a token over a sequence of `length`, for each named (model, batch), alternately.

    One token is timed at `windows` evenly spaced places, and the times are integrated by the trapezoidal rule.
    """
    places = torch.linspace(1, length - 1, windows).long().tolist()
    caches = {name: model.cache(batch, length) if use_cache else None for name, (model, batch) in models.items()}
    for cache in filter(None, caches.values()):
        for tensor in cache.keys + cache.values:
            tensor.normal_()  # memory that was never written is not really read
    curve = {name: [] for name in models}
    for place in places:

        def draw_one(model, batch, cache):
            if use_cache:
                cache.filled = place - 1
                hidden = model.transform_one(model.tokens(torch.zeros(batch, dtype=torch.int64)), cache)
            else:
                hidden = model.hidden(torch.zeros(batch, place, dtype=torch.int64))[:, -1]
            draw(model.logits(hidden).float().softmax(-1))

        functions = {name: lambda m=m, b=b, c=caches[name]: draw_one(m, b, c) for name, (m, b) in models.items()}
        for name, value in medians(functions, repetitions, repeat=8 if use_cache else 1).items():
            curve[name].append(value)
    x = torch.tensor(places, dtype=torch.float64)
    return {name: (torch.trapezoid(torch.tensor(y, dtype=torch.float64), x) / (x[-1] - x[0])).item() for name, y in curve.items()}


def copy_bandwidth(repetitions: int) -> float:
    """Bytes a second, read and written, of copying an array that fits no processor cache."""
    source = torch.zeros(64 * 2**20)
    target = torch.empty_like(source)
    return 2 * source.nbytes / medians({"copy": lambda: target.copy_(source)}, repetitions)["copy"]


@torch.inference_mode()
def rows(quick: bool = False) -> list[Row]:
    """Chapter 1's table; `quick` draws 1024 pixels instead of 4096, with fewer repetitions."""
    length, repetitions, windows = (1024, 3, 4) if quick else (4096, 5, 7)
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=length)).eval()
    prompt = torch.zeros(1, 1, dtype=torch.int64)

    cached = medians({"cached": lambda: model.generate(prompt, length - 1)}, 1 if quick else 3)["cached"]
    published = step_time({"published": (model, 1)}, length, windows, use_cache=False, repetitions=2)["published"] * (length - 1)
    tokens = torch.randint(model.config.vocab_size, (1, length))
    cache = model.cache(1, length)
    one_by_one = torch.stack([model.logits(model.transform_one(model.tokens(token), cache)) for token in tokens.unbind(1)], dim=1)
    difference = (one_by_one - model(tokens)).abs().max().item()

    half = GPT(model.config).eval().bfloat16()
    half.load_state_dict(model.state_dict())
    step = step_time({"1": (model, 1), "16": (model, 16)}, length, windows, use_cache=True, repetitions=repetitions)
    step |= step_time({"1 float32": (model, 1), "16 bfloat16": (half, 16)}, length, windows, True, 1 if quick else 3)
    # each step reads all weights but the positions', and the cache as far as it is written: half of it on average
    weights = sum(p.nbytes for name, p in model.named_parameters() if not name.startswith("positions"))
    full = model.cache(16)
    read = weights + sum(t.nbytes for t in full.keys + full.values) / 2
    floor = read / copy_bandwidth(repetitions)

    p = torch.randn(1, 4096).softmax(-1)
    sampler = medians({"ours": lambda: draw(p), "torch": lambda: torch.multinomial(p, 1)}, 15, repeat=200)
    fast_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return [
        Row(f"{length} pixels, cached against the published way", published / cached, "x", None if quick else 70,
            note=f"{cached:.1f} s against {published:.0f} s, the latter integrated from {windows} windows"),
        Row(f"largest difference of the logits at {length} places", difference, "", 1e-4, at_least=False),
        Row("time a picture, 16 at once against one, float32", step["16"] / 16 / step["1"], "x", 0.6, at_least=False,
            note=f"{step['1'] * length:.1f} s and {step['16'] / 16 * length:.1f} s a picture"),
        Row("time a picture, 16 in bfloat16 against one in float32", step["16 bfloat16"] / 16 / step["1 float32"], "x", 0.4,
            at_least=False, note="" if fast_bf16 else "this processor has no bfloat16 instructions: it is emulated"),
        Row("16 at once against the floor that memory sets", step["16"] / floor, "x", 1.6, at_least=False,
            note=f"{read / 1e6:.0f} MB a step at {read / floor / GB:.1f} GB/s, copied in this run"),
        Row("drawing one of 4096, against torch.multinomial", sampler["torch"] / sampler["ours"], "x", 8,
            note=f"{sampler['ours'] * 1e6:.1f} us against {sampler['torch'] * 1e6:.0f} us"),
    ]
