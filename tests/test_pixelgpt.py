"""Colours, pictures as sequences, and the measures of chapter 1."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from minigen.data import Item
from minigen.pixelgpt import (
    ColorTokenizer,
    PixelGPT,
    PixelGPTConfig,
    TokenDataset,
    WindowDataset,
    explained_by_group,
    neighbour_correlation,
    next_pixel_loss,
    row_statistics_distance,
)

TINY = PixelGPTConfig(size=6, bits=2, depth=2, heads=2, dim=16)


def images(batch=3, height=6, width=5, levels=256):
    g = torch.Generator().manual_seed(0)
    return torch.randint(levels, (batch, 3, height, width), generator=g) / (levels - 1)


@pytest.mark.parametrize("bits", range(1, 9))
def test_round_trip(bits):
    tokenizer, x = ColorTokenizer(bits), images()
    tokens = tokenizer.encode(x)
    assert tokens.shape == (3, 30) and tokens.dtype == torch.int64
    assert tokenizer.vocab_size == 8**bits and 0 <= tokens.min() and tokens.max() < tokenizer.vocab_size
    back = tokenizer.decode(tokens, 6, 5)
    assert torch.equal(tokenizer.encode(back), tokens)
    assert (back - x).abs().max() <= (2 ** (8 - bits) - 1) / 255 + 1e-6  # at most what was cut off
    if bits == 8:
        assert_close(back, x)


def test_tokens_are_the_published_ones():
    # 8-bit R, G, B -> the four highest bits of each, red first; and the published names of colours
    x = torch.tensor([[0xF7, 0xEA, 0xC1], [0x80, 0xE0, 0xEF], [0x1F, 0x60, 0x0F]]).T.view(1, 3, 1, 3) / 255
    assert [hex(t) for t in ColorTokenizer(4).encode(x)[0].tolist()] == ["0xfec", "0x8ee", "0x160"]
    assert_close(ColorTokenizer(4).decode(torch.tensor([[0xF00, 0x0F0]]), 1, 2)[0, :, 0].T, torch.tensor([[1.0, 0, 0], [0, 1, 0]]))


def test_raster_order():
    x = torch.zeros(1, 3, 4, 5)
    x[0, :, 2, 3] = 1
    assert ColorTokenizer(4).encode(x)[0].nonzero().item() == 2 * 5 + 3


@pytest.mark.parametrize("make, message", [
    (lambda: ColorTokenizer(9), "1 to 8.*bits=9"),
    (lambda: ColorTokenizer(0), "1 to 8.*bits=0"),
    (lambda: ColorTokenizer(4).encode(torch.zeros(2, 1, 4, 4)), r"\(B, 3, H, W\), found \(2, 1, 4, 4\)"),
    (lambda: ColorTokenizer(4).encode(torch.zeros(3, 4, 4)), r"found \(3, 4, 4\)"),
    (lambda: ColorTokenizer(4).decode(torch.zeros(1, 15, dtype=torch.int64), 4, 4), "16 pixels, found 15"),
])
def test_bad_input_is_a_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("positions", ["learned", "rowcol"])
def test_draws_pictures_from_any_beginning(positions):
    torch.manual_seed(0)
    model = PixelGPT(PixelGPTConfig(size=6, bits=2, positions=positions, depth=2, heads=2, dim=16))
    x = images(4, 6, 6)
    for prompt in (torch.tensor([[0b110100]]), model.tokenizer.encode(x)[:, :1], model.tokenizer.encode(x[:, :, :3])):
        drawn = model.draw(prompt, generator=torch.Generator().manual_seed(0))
        assert drawn.shape == (len(prompt), 3, 6, 6) and 0 <= drawn.min() and drawn.max() <= 1
        assert torch.equal(model.tokenizer.encode(drawn)[:, : prompt.shape[1]], prompt)


def test_stream_grows_pixel_by_pixel():
    model = PixelGPT(TINY)
    prompt = torch.tensor([[3], [9]])
    canvases = [c.clone() for c in model.draw_stream(prompt, blank=0.5, generator=torch.Generator().manual_seed(0))]
    assert len(canvases) == 35
    for n, canvas in enumerate(canvases, start=2):  # levels of 2 bits are never 0.5
        assert ((canvas == 0.5).all(dim=1).flatten(1) == (torch.arange(36) >= n)).all()
    assert torch.equal(canvases[-1], model.draw(prompt, generator=torch.Generator().manual_seed(0)))


def test_rowcol_positions_are_shared_along_rows_and_columns():
    positions = PixelGPT(PixelGPTConfig(size=6, bits=2, positions="rowcol", depth=1, heads=2, dim=16)).gpt.positions
    p = positions(torch.arange(36)).view(6, 6, 16)
    assert_close(p[2, 3] - p[2, 1], p[5, 3] - p[5, 1])  # a step of two columns is the same in every row
    assert_close(p[4, 2] - p[1, 2], p[4, 5] - p[1, 5])


def test_loss_is_that_of_the_next_pixel():
    torch.manual_seed(0)
    model, tokens = PixelGPT(TINY).eval(), torch.randint(64, (3, 36))
    p = model(tokens).log_softmax(-1)
    by_hand = -torch.stack([p[b, t, tokens[b, t + 1]] for b in range(3) for t in range(35)]).mean()
    assert_close(next_pixel_loss(model, tokens), by_hand)


def test_windows_drift_by_one_pixel_a_picture():
    pictures = torch.arange(6 * 16).view(6, 16)  # six pictures of 16 pixels, all numbered
    pieces = WindowDataset(pictures, 15)
    assert len(pieces) == 6
    for i in range(6):
        assert pieces[i].tolist() == list(range(15 * i, 15 * i + 16))
    with pytest.raises(IndexError, match="6 pieces"):
        pieces[6]
    longer = WindowDataset(pictures, 20)  # a piece may be longer than a picture
    assert [piece.tolist() for piece in (longer[0], longer[3])] == [list(range(21)), list(range(60, 81))]


def test_pictures_as_sequences():
    pictures = [Item(image, 0, "") for image in images(3, 4, 6)]
    tokenizer = ColorTokenizer(4)
    tokens = TokenDataset(pictures, tokenizer)
    assert len(tokens) == 3
    assert torch.equal(torch.stack([tokens[n] for n in range(3)]), tokenizer.encode(images(3, 4, 6)))


def test_whole_pictures_train_and_windows_train():
    model = PixelGPT(TINY)
    tokens = model.tokenizer.encode(images(4, 6, 6))
    for batch in (tokens, WindowDataset(tokens, 35)[2][None]):
        loss = next_pixel_loss(model, batch)
        loss.backward()
        assert torch.isfinite(loss)


def test_neighbour_correlation_against_numpy():
    x = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    x = torch.nn.functional.avg_pool2d(x, (1, 3), 1, (0, 1))  # smooth along rows only
    rows, columns = neighbour_correlation(x)
    assert rows > 0.5 > columns + 0.3
    assert neighbour_correlation(x.transpose(2, 3)) == pytest.approx((columns, rows))
    c = (x - x.mean(dim=(2, 3), keepdim=True)).numpy()
    a, b = c[..., :-2].ravel(), c[..., 2:].ravel()
    assert neighbour_correlation(x, lag=2)[0] == pytest.approx(a @ b / np.sqrt((a @ a) * (b @ b)), abs=1e-5)


def test_explained_by_group():
    groups = torch.arange(4).repeat_interleave(6)
    noise = torch.rand(24, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    fixed = noise.clone()
    fixed[:, :, 0] = groups.view(-1, 1, 1) / 4  # the first row is the group's colour
    share = explained_by_group(fixed, groups)
    assert share.shape == (5,)
    assert share[0] == pytest.approx(1) and share[1:].max() < 0.5


def test_row_statistics_distance():
    x = images(16, 8, 8)
    assert row_statistics_distance(x, x) == 0
    small, large = row_statistics_distance(x + 0.01, x), row_statistics_distance(x.flip(2) * 0.5, x)
    assert 0 < small < large


@pytest.mark.parametrize("positions", ["learned", "rowcol"])
def test_save_and_load(tmp_path, positions):
    model = PixelGPT(PixelGPTConfig(size=6, bits=2, positions=positions, depth=1, heads=2, dim=16)).eval()
    model.save_pretrained(tmp_path)
    loaded = PixelGPT.from_pretrained(tmp_path).eval()
    assert loaded.config == model.config
    tokens = torch.randint(64, (2, 36))
    assert_close(loaded(tokens), model(tokens), rtol=0, atol=0)
