"""How fast chapter 9 generates: texts and images mixed, and what its grammar costs."""

import torch

from minigen import anytoany
from minigen.anytoany import AnyToAny, AnyToAnyConfig
from minigen.bench import Row, medians


def rows(quick: bool = False) -> list[Row]:
    """Chapter 9's table; `quick` takes a width of 32 instead of 256."""
    torch.manual_seed(0)
    shape = {"dim": 32, "depth": 2} if quick else {"dim": 256, "depth": 6}
    model = AnyToAny(AnyToAnyConfig(**shape, heads=4)).eval()
    repetitions, batch = 2 if quick else 5, 16
    text = torch.randint(256, (batch, 24))
    starts = [torch.cat([torch.tensor([model.end]), row]) for row in text]
    opened = [torch.cat([row, torch.tensor([model.open])]) for row in starts]
    new = model.per_image + 1  # an image and the mark behind it
    length = len(opened[0]) + new

    def draw(prompts: list) -> None:
        for _ in anytoany.continue_sequences(model, prompts, length):
            pass

    mixed = opened[: batch // 2] + [row[:10] for row in starts[batch // 2 :]]
    time = medians({
        "mixed": lambda: draw(mixed),
        "images": lambda: draw(opened[: batch // 2]),
        "texts": lambda: draw([row[:10] for row in starts[batch // 2 :]])}, repetitions)
    case = f"{batch} sequences up to {length} tokens, width {shape['dim']}"
    found = [Row(f"{case}: images and texts in one batch against one after the other",
                 (time["images"] + time["texts"]) / time["mixed"], "x",
                 note=f"{time['mixed']:.3f} s against {time['images']:.3f} s and "
                      f"{time['texts']:.3f} s")]

    tokens = torch.stack(opened)
    with torch.inference_mode():
        cache = model.transformer.cache(batch, length)
        model.transformer(model.embed(tokens), cache)
        canvas = torch.cat([tokens, tokens[:, -1:]], dim=1)

        def step() -> None:
            cache.filled = tokens.shape[1]
            x = model.embed(canvas, tokens.shape[1])
            anytoany.sample(model.head(model.transformer(x, cache)[:, -1]))

        logits = model.head(torch.zeros(batch, shape["dim"]))

        def grammar() -> None:
            state = anytoany.next_state(model, canvas, length)
            logits.masked_fill(~model.grammar[state], -torch.inf)

        time = medians({"step": step, "grammar": grammar}, repetitions, 20)
    found.append(Row(f"{case}: the grammar against a step with the cache",
                     time["grammar"] / time["step"], "x",
                     None if quick else 0.03, False,
                     f"{1e3 * time['grammar']:.3f} ms against "
                     f"{1e3 * time['step']:.2f} ms"))
    return found
