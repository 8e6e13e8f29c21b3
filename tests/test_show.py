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

from minigen.show import (
    frame_slider,
    image_grid,
    read_grid,
    save_grid,
    show_images,
    show_rows,
)


def colors(count=5, height=4, width=6):
    return torch.rand(count, 3, height, width, generator=torch.manual_seed(0))


def pixels(image):
    return (image * 255).round().byte().permute(1, 2, 0).numpy()


def test_grid_keeps_images_in_order_and_pixels_square():
    images = colors()
    grid = image_grid(images, columns=3, scale=2, padding=1)
    assert grid.size == ((3 * 6 + 2) * 2, (2 * 4 + 1) * 2)
    found = np.asarray(grid)[::2, ::2]
    assert np.array_equal(found, np.asarray(grid)[1::2, 1::2])
    assert np.array_equal(found[5:9, :6], pixels(images[3]))
    assert found[:, 6].min() == found[5:, 14:].min() == 255


def test_grid_has_options_and_takes_what_is_nearly_a_batch():
    images = colors(4)
    assert image_grid(images, padding=0).size == (12, 8)
    assert np.asarray(image_grid(images, background=0.0))[0, 6].tolist() == [0, 0, 0]
    for count, size in ((1, (6, 4)), (2, (6, 9))):
        assert image_grid(images[:count], columns=1).size == size
    same = (images, list(images), images.numpy(), images.double())
    assert len({image_grid(batch).tobytes() for batch in same}) == 1
    assert np.asarray(image_grid(torch.full((3, 2, 2), 7.0))).max() == 255  # is cut


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (4, 4), (0, 3, 4, 4), (2, 4, 4, 3)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected images \(B, 3, H, W\)"):
        image_grid(torch.zeros(shape))


def test_saved_grid_is_the_grid_and_nothing_else_remains(tmp_path):
    path = tmp_path / "new" / "grid.png"
    save_grid(colors(), path, scale=3)
    with pytest.raises(ValueError, match="expected images"):
        save_grid(torch.zeros(1), path)
    with Image.open(path) as read:
        assert read.convert("RGB").tobytes() == image_grid(colors(), scale=3).tobytes()
    assert [entry.name for entry in path.parent.iterdir()] == ["grid.png"]


@pytest.mark.parametrize(("scale", "padding"), [(1, 1), (3, 1), (2, 0)])
def test_a_saved_grid_is_read_again(tmp_path, scale, padding):
    path, images = tmp_path / "grid.png", colors(5, 6, 6)
    save_grid(images, path, columns=3, scale=scale, padding=padding)
    again = read_grid(path, 6, scale, padding)
    assert again.shape == (6, 3, 6, 6)
    assert torch.allclose(again[:5], images, atol=0.5 / 255 + 1e-6)
    assert (again[5] == 1).all()
    with pytest.raises(ValueError, match="expected a grid of images of 5 x 5"):
        read_grid(path, 5, scale, padding)


def test_figure_has_crisp_images_of_any_size_and_titles_that_do_not_overlap():
    titles = ["a rather long title", "mountains, lake, trees", "short", "two\nlines"]
    figure = show_images(list(colors(8, 8, 8)), titles * 2, columns=4, suptitle="all")
    figure.canvas.draw()
    shown = [axis for axis in figure.axes if axis.images]
    assert len(shown) == 8
    assert {axis.images[0].get_interpolation() for axis in shown} == {"nearest"}
    assert not any(axis.axison for axis in figure.axes)
    boxes = [axis.title.get_window_extent().padded(-0.5) for axis in shown]
    for n, box in enumerate(boxes):
        others = [axis.images[0].get_window_extent() for axis in shown] + boxes[n + 1:]
        assert not any(box.overlaps(other) for other in others)
    figure = show_images([torch.zeros(3, 4, 4), torch.ones(3, 16, 16)])
    assert len([axis for axis in figure.axes if axis.images]) == 2
    plt.close("all")
    with pytest.raises(ValueError, match="no images"):
        show_images([])


def test_rows_have_their_names_beside_them_and_titles_above_the_first():
    images = colors(6, 8, 8)
    figure = show_rows({"one": images[:3], "a name too long for its row": images[3:]},
                       ["first", "second"])
    figure.canvas.draw()
    shown = [axis for axis in figure.axes if axis.images]
    assert [axis.get_title() for axis in shown] == ["first", "second", "", "", "", ""]
    names = [axis.texts[0] for axis in shown if axis.texts]
    assert [name.get_text() for name in names] == ["one", "a name too long for its row"]
    for axis, name in zip(shown[::3], names, strict=True):
        row, text = axis.images[0].get_window_extent(), name.get_window_extent()
        assert text.x1 < row.x0
        assert row.y0 < text.y0 < text.y1 < row.y1
        assert text.x0 >= 0, "within the figure"
    plt.close("all")
    with pytest.raises(ValueError, match="equally many images, found 2, 3"):
        show_rows({"one": images[:2], "two": images[:3]})
    with pytest.raises(ValueError, match="no images"):
        show_rows({})


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
    frames, labels = colors(4, 3, 3), ["a", "b", 'c"<', "d"]
    tags = Tags(frame_slider(frames, labels, scale=5, caption="A & B").data)
    images, (slider,) = tags.all("img"), tags.all("input")
    assert ["hidden" in image for image in images] == [True, True, True, False]
    assert [image["alt"] for image in images] == labels
    found = [slider[name] for name in ("min", "max", "value", "type", "aria-label")]
    assert found == ["0", "3", "3", "range", "A & B"]
    assert tags.all("button")[0]["aria-label"]
    for image, frame in zip(images, frames):
        assert re.match("width:15px.*pixelated", image["style"])
        png = io.BytesIO(base64.b64decode(image["src"].partition(",")[2]))
        assert np.array_equal(np.asarray(Image.open(png)), pixels(frame))


def test_slider_needs_nothing_from_outside_and_as_many_labels_as_frames():
    text = frame_slider(colors(3)).data
    assert text == frame_slider(colors(3)).data
    assert not re.search("<script|http| id=|onload", text)
    assert not re.search(r"(?:color|background):\s*(?:#|white|black|rgb)", text)
    assert "onload" in frame_slider(colors(3), autoplay=True).data
    assert len(Tags(frame_slider(colors(1)).data).all("img")) == 1
    with pytest.raises(ValueError, match="3 frames.*got 2"):
        frame_slider(colors(3), ["a", "b"])
