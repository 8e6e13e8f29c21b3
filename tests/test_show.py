"""Chapter 0: grids, figures and sliders."""

import base64
import io
import re
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from minigen.show import frame_slider, image_grid, read_grid, save_grid, show_images


def colours(count=5, height=4, width=6):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def test_grid_puts_each_image_in_its_place_and_keeps_pixels_square():
    images = colours()
    grid = image_grid(images, columns=3, scale=2, padding=1)
    assert grid.size == ((3 * 6 + 2) * 2, (2 * 4 + 1) * 2)
    pixels = np.asarray(grid)[::2, ::2]
    assert np.array_equal(pixels, np.asarray(grid)[1::2, 1::2])
    fourth = (images[3] * 255).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(pixels[5:9, :6], fourth)
    assert (pixels[:, 6] == 255).all() and (pixels[5:, 14:] == 255).all()


def test_grid_has_options_and_takes_what_is_nearly_a_batch():
    images = colours(4)
    assert image_grid(images, padding=0).size == (12, 8)
    assert np.asarray(image_grid(images, background=0.0))[0, 6].tolist() == [0, 0, 0]
    assert image_grid(images[0]).size == (6, 4)
    assert image_grid(list(images)).tobytes() == image_grid(images.numpy()).tobytes() == image_grid(images).tobytes()
    assert np.asarray(image_grid(torch.full((1, 3, 2, 2), 7.0))).max() == 255                # values beyond 1 are cut


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (4, 4), (0, 3, 4, 4), (2, 4, 4, 3)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected images \(B, 3, H, W\)"):
        image_grid(torch.zeros(shape))


def test_saved_grid_is_the_grid_and_nothing_else_remains(tmp_path):
    path = tmp_path / "new" / "grid.png"
    save_grid(colours(), path, scale=3)
    with Image.open(path) as read:
        assert read.convert("RGB").tobytes() == image_grid(colours(), scale=3).tobytes()
    assert [entry.name for entry in path.parent.iterdir()] == ["grid.png"]
    with pytest.raises(ValueError):
        save_grid(torch.zeros(1), path)
    assert [entry.name for entry in path.parent.iterdir()] == ["grid.png"]


@pytest.mark.parametrize("scale, padding", [(1, 1), (3, 1), (2, 0)])
def test_a_saved_grid_is_read_again(tmp_path, scale, padding):
    images = colours(5, 6, 6)
    save_grid(images, tmp_path / "grid.png", columns=3, scale=scale, padding=padding)
    again = read_grid(tmp_path / "grid.png", 6, scale, padding)
    assert torch.allclose(again[:5], images, atol=0.5 / 255 + 1e-6) and again.shape == (6, 3, 6, 6) and (again[5] == 1).all()
    with pytest.raises(ValueError, match="expected a grid of pictures of 5 x 5"):
        read_grid(tmp_path / "grid.png", 5, scale, padding)


def test_figure_has_crisp_images_and_titles_that_do_not_overlap():
    titles = ["a rather long title here", "mountains, lake, trees", "short", "two\nlines"] * 2
    figure = show_images(list(colours(8, 8, 8)), titles, columns=4, size=1.2, suptitle="all")
    figure.canvas.draw()
    shown = [axis for axis in figure.axes if axis.images]
    assert len(shown) == 8 and all(axis.images[0].get_interpolation() == "nearest" for axis in shown)
    assert not any(axis.axison for axis in figure.axes)
    boxes = [axis.title.get_window_extent() for axis in shown]
    for n, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[n + 1:])
        assert not any(box.overlaps(axis.images[0].get_window_extent()) for axis in shown)
    plt.close("all")


def test_figure_of_images_of_different_sizes():
    figure = show_images([torch.zeros(3, 4, 4), torch.ones(3, 16, 16)])
    assert len([axis for axis in figure.axes if axis.images]) == 2
    with pytest.raises(ValueError):
        show_images([])
    plt.close("all")


class Tags(HTMLParser):
    """All tags of a fragment, and whether they are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("img", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


def test_slider_holds_every_frame_and_shows_the_last():
    frames = colours(4, 3, 3)
    tags = Tags(frame_slider(frames, ["a", "b", 'c"<', "d"], scale=5, caption="A & B").data)
    pictures, (slider,) = tags.all("img"), tags.all("input")
    assert len(pictures) == 4 and ["hidden" in picture for picture in pictures] == [True, True, True, False]
    assert [picture["alt"] for picture in pictures] == ["a", "b", 'c"<', "d"]
    assert (slider["min"], slider["max"], slider["value"], slider["type"]) == ("0", "3", "3", "range")
    assert slider["aria-label"] == "A & B" and tags.all("button")[0]["aria-label"]
    assert all("width:15px" in picture["style"] and "pixelated" in picture["style"] for picture in pictures)
    for picture, frame in zip(pictures, frames):
        with Image.open(io.BytesIO(base64.b64decode(picture["src"].partition(",")[2]))) as image:
            assert np.array_equal(np.asarray(image), (frame * 255).round().byte().permute(1, 2, 0).numpy())


def test_slider_needs_nothing_from_outside_and_is_the_same_each_time():
    text = frame_slider(colours(3)).data
    assert text == frame_slider(colours(3)).data
    assert "<script" not in text and "http" not in text and " id=" not in text
    assert not re.search(r"(?:color|background):\s*(?:#|white|black|rgb)", text), "a colour of its own on any page"
    assert "onload" not in text and "onload" in frame_slider(colours(3), autoplay=True).data


def test_slider_of_one_frame_and_wrong_labels():
    assert len(Tags(frame_slider(colours(1)).data).all("img")) == 1
    with pytest.raises(ValueError, match="3 frames.*got 2"):
        frame_slider(colours(3), ["a", "b"])
