"""Colors, images as sequences, and the measures of chapter 1."""

import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from minigen.pixelgpt import (
    ColorTokenizer,
    PixelGPT,
    PixelGPTConfig,
    TokenDataset,
    WindowDataset,
    baseline_losses,
    explained_by_group,
    image_statistics,
    neighbor_correlation,
    next_pixel_loss,
    occurrences,
    row_statistics_distance,
)
from minigen.train import pixelgpt

TINY = PixelGPTConfig(size=6, bits=2, depth=2, heads=2, dim=16)


def seeded():
    return torch.Generator().manual_seed(0)


def images(batch=3, height=6, width=5):
    return torch.randint(256, (batch, 3, height, width), generator=seeded()) / 255


@pytest.mark.parametrize("bits", range(1, 9))
def test_round_trip(bits):
    tokenizer, x = ColorTokenizer(bits), images()
    tokens = tokenizer.encode(x)
    assert tokens.shape == (3, 30)
    assert tokens.dtype == torch.int64
    assert 0 <= tokens.min() <= tokens.max() < tokenizer.vocab_size == 8**bits
    back = tokenizer.decode(tokens, 6, 5)
    assert torch.equal(tokenizer.encode(back), tokens)
    cut_off = (2 ** (8 - bits) - 1) / 255
    assert (back - x).abs().max() <= cut_off + 1e-6
    if bits == 8:
        assert_close(back, x)


def test_tokens_are_the_published_ones():
    # the four highest bits of 8-bit R, G, B, red first: the published names of colors
    rgb = torch.tensor([[0xF7, 0xEA, 0xC1], [0x80, 0xE0, 0xEF], [0x1F, 0x60, 0x0F]])
    tokens = ColorTokenizer(4).encode(rgb.T.view(1, 3, 1, 3) / 255)
    assert tokens.tolist() == [[0xFEC, 0x8EE, 0x160]]
    decoded = ColorTokenizer(4).decode(torch.tensor([[0xF00, 0x0F0]]), 1, 2)
    assert decoded[0, :, 0].T.tolist() == [[1, 0, 0], [0, 1, 0]]


def test_raster_order():
    x = torch.zeros(1, 3, 4, 5)
    x[0, :, 2, 3] = 1
    assert ColorTokenizer(4).encode(x)[0].nonzero().item() == 2 * 5 + 3


@pytest.mark.parametrize(("make", "message"), [
    (lambda: ColorTokenizer(9), r"1 to 8.*bits=9"),
    (lambda: ColorTokenizer(0), r"1 to 8.*bits=0"),
    (lambda: ColorTokenizer().encode(torch.zeros(2, 1, 4, 4)),
     r"found shape \(2, 1, 4, 4\)"),
    (lambda: ColorTokenizer().encode(torch.zeros(3, 4, 4)), r"found shape \(3, 4, 4\)"),
    (lambda: ColorTokenizer().decode(torch.zeros(1, 15), 4, 4),
     r"16 pixels, found tokens of shape \(1, 15\)"),
])
def test_bad_input_is_a_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("positions", ["learned", "rowcol", "rope2d"])
def test_draws_images_from_any_beginning(positions):
    model, x = PixelGPT(replace(TINY, positions=positions)), images(4, 6, 6)
    for prompt in (torch.tensor([[0b110100]]), model.tokenizer.encode(x)[:, :1],
                   model.tokenizer.encode(x[:, :, :3])):
        drawn = model.generate_images(prompt, generator=seeded())
        assert drawn.shape == (len(prompt), 3, 6, 6)
        assert 0 <= drawn.min() <= drawn.max() <= 1
        assert torch.equal(model.tokenizer.encode(drawn)[:, : prompt.shape[1]], prompt)


def test_stream_grows_pixel_by_pixel():
    model, prompt = PixelGPT(TINY), torch.tensor([[3], [9]])
    stream = model.stream_images(prompt, blank=0.5, generator=seeded())
    growing = [images.clone() for images in stream]
    assert len(growing) == 35
    for n, canvas in enumerate(growing, start=2):  # levels of 2 bits are never 0.5
        blank = (canvas == 0.5).all(dim=1).flatten(1)
        assert (blank == (torch.arange(36) >= n)).all()
    assert torch.equal(growing[-1], model.generate_images(prompt, generator=seeded()))


def test_positions_know_the_rows_of_the_image():
    model = PixelGPT(replace(TINY, size=5, positions="rowcol"))
    p = model.gpt.transformer.positions(0, 25).view(5, 5, 16)
    assert_close(p[2, 3] - p[2, 1], p[4, 3] - p[4, 1])


@pytest.mark.parametrize("length", [2, 36])
def test_loss_is_that_of_the_next_pixel(length):
    model, tokens = PixelGPT(TINY).eval(), torch.randint(64, (3, length))
    p = model(tokens).log_softmax(-1)
    by_hand = [p[b, t, tokens[b, t + 1]] for b in range(3) for t in range(length - 1)]
    assert_close(next_pixel_loss(model, tokens), -torch.stack(by_hand).mean())


@pytest.mark.parametrize("length", [15, 20])  # also longer than an image
def test_windows_drift_through_the_images(length):
    sequences = torch.arange(6 * 16).view(6, 16)  # six images of 16 pixels
    windows = WindowDataset(sequences, length)
    assert len(windows) == 95 // length
    for i in range(len(windows)):
        assert windows[i].tolist() == list(range(length * i, length * i + length + 1))
    with pytest.raises(IndexError, match=f"window {len(windows)} of {len(windows)}"):
        windows[len(windows)]


def test_images_as_sequences():
    tokenizer, x = ColorTokenizer(4), images(3, 4, 6)
    tokens = TokenDataset([SimpleNamespace(image=image) for image in x], tokenizer)
    assert len(tokens) == 3
    assert torch.equal(torch.stack([tokens[n] for n in range(3)]), tokenizer.encode(x))


def test_occurrences_are_counted():
    values, wanted = torch.tensor([7, 2, 7, 7, 0]), torch.tensor([7, 1, 0, 9, 2, -1])
    assert occurrences(values, wanted).tolist() == [3, 0, 1, 0, 1, 0]


def test_baselines_are_those_of_a_loop():
    vocab, columns, strength = 3, 4, 2.0
    train, val = (torch.randint(vocab, (5, 12), generator=torch.Generator().manual_seed(
        seed)) for seed in (0, 1))

    def examples(tokens):  # (here, previous, above)
        return [(row[t], row[t - 1], row[t - columns] if t >= columns else None)
                for row in tokens.tolist() for t in range(1, 12)]

    seen, nats = examples(train), Counter()
    same = sum(here == previous for here, previous, _ in seen) / len(seen)
    for here, previous, above in examples(val):
        p = 1 / vocab
        nats["uniform"] -= math.log(p)
        nats["copy"] -= math.log(same if here == previous else (1 - same) / (vocab - 1))
        for name, known in (("unigram", ()), ("previous", (previous,)),
                            ("previous and above", (previous, above))):
            alike = [s[0] for s in seen if s[1 : 1 + len(known)] == known]
            p = (alike.count(here) + strength * p) / (len(alike) + strength)
            nats[name] -= math.log(p)
    found = baseline_losses(train, val, vocab, columns, strength)
    assert found == pytest.approx({k: v / (5 * 11) for k, v in nats.items()})


def test_baselines_of_images_that_never_change():
    tokens = torch.full((2, 9), 4)
    found = baseline_losses(tokens, tokens, vocab_size=8, columns=3)
    assert found["uniform"] == pytest.approx(math.log(8))
    assert found["copy"] < 1e-5
    assert 0 < found["previous and above"] < found["previous"] < found["unigram"]


def test_the_paper_preset_is_the_published_recipe():
    # nanoGPT-BMP's train.py: 40 images of batch size 1 a step; sample.py: 0.8
    paper = pixelgpt.PRESETS["paper"]
    assert (paper.batch_size, paper.accumulate, paper.lr, paper.warmup) == (
        40, 1, 6e-4, 200)
    assert (paper.steps, paper.final_lr, paper.weight_decay, paper.clip) == (
        10_000, 0.1, 0.1, 1.0)
    assert (paper.betas, paper.ema, paper.temperature) == ((0.9, 0.95), 0.0, 0.8)
    assert (paper.depth, paper.heads, paper.dim, paper.bits, paper.size) == (
        4, 4, 128, 4, 64)
    assert (paper.sequences, paper.positions) == ("windows", "learned")


def test_neighbor_correlation_against_numpy():
    x = torch.rand(3, 3, 8, 8, generator=seeded())
    x = F.avg_pool2d(x, (1, 3), 1, (0, 1))  # smooth along rows only
    rows, columns = neighbor_correlation(x)
    assert rows > 0.5 > columns + 0.3
    assert neighbor_correlation(x.transpose(2, 3)) == pytest.approx((columns, rows))
    c = (x - x.mean(dim=(2, 3), keepdim=True)).numpy()
    a, b = c[..., :-2].ravel(), c[..., 2:].ravel()
    expected = a @ b / np.sqrt((a @ a) * (b @ b))
    assert neighbor_correlation(x, lag=2)[0] == pytest.approx(expected, abs=1e-5)


def test_explained_by_group():
    groups = torch.arange(4).repeat_interleave(6)
    noise = torch.rand(24, 3, 5, 7, generator=seeded())
    fixed = noise.clone()
    fixed[:, :, 0] = groups.view(-1, 1, 1) / 4  # the first row is the group's color
    share = explained_by_group(fixed, groups)
    assert share.shape == (5,)
    assert share[0] == pytest.approx(1)
    assert share[1:].max() < 0.5


def test_row_statistics_distance():
    x = images(16, 8, 8)
    assert row_statistics_distance(x, x) == 0
    small = row_statistics_distance(x + 0.01, x)
    assert 0 < small < row_statistics_distance(x.flip(2) * 0.5, x)
    assert image_statistics(x + 0.01, x) == {
        "row_statistics_distance": small,
        "correlation_along_rows": neighbor_correlation(x + 0.01)[0],
        "correlation_along_columns": neighbor_correlation(x + 0.01)[1]}
