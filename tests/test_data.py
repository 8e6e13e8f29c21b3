"""Chapter 0: landscapes, their cache, real images in every state, and batches."""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from torch.utils.data import default_collate

from minigen import data
from minigen.data import (
    CLASSES,
    Item,
    Landscapes,
    cached_landscapes,
    draw_landscape,
    endless_batches,
    load_dataset,
    prepare,
    to_rgb,
)
from minigen.landscapes import MOODS, render

VOCABULARY = {"mountains", "forest", "trees", "river", "hills", "path", "lake", "birds", "waterfall"}


# ---- landscapes


def test_item_is_an_image_a_label_and_a_caption():
    for index in range(40):
        item = draw_landscape(index)
        assert isinstance(item, Item)
        assert item.image.shape == (3, 64, 64) and item.image.dtype == torch.float32
        assert 0 <= item.image.min() and item.image.max() <= 1
        assert item.image.std() > 0.01, "a flat picture"
        assert isinstance(item.label, int) and 0 <= item.label < len(CLASSES)


def test_captions_use_the_vocabulary_and_begin_with_the_class():
    assert 8 <= len(CLASSES) <= 12
    for index in range(300):
        _, label, caption = render(index, 16)
        words = caption.split(", ")
        assert set(words) <= VOCABULARY and len(set(words)) == len(words)
        assert words[0] == CLASSES[label]


def test_classes_are_balanced_and_every_word_occurs():
    labels, words = np.zeros(len(CLASSES)), set()
    for index in range(900):
        _, label, caption = render(index, 16)
        labels[label] += 1
        words.update(caption.split(", "))
    assert labels.min() > 70 and labels.max() < 135, labels
    assert words == VOCABULARY


def test_same_item_in_another_process_and_in_another_order():
    code = (
        "import hashlib; from minigen.landscapes import render\n"
        "print(*[hashlib.sha256(render(n, 64, 'val', 3)[0].tobytes()).hexdigest() for n in (11, 2, 7)])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    for index, digest in zip((11, 2, 7), printed):
        pixels = render(index, 64, "val", 3)[0]
        assert hashlib.sha256(pixels.tobytes()).hexdigest() == digest
    assert torch.equal(draw_landscape(2).image, draw_landscape(2).image)


def test_every_class_and_mood_can_be_drawn_without_numerical_trouble():
    with np.errstate(all="raise", under="ignore"):
        for label in range(len(CLASSES)):
            for mood in range(len(MOODS)):
                pixels, drawn, _ = render(7 * label + mood, 32, label=label, mood=mood)
                assert drawn == label and pixels.std() > 3


@pytest.mark.parametrize("size", [16, 17, 32, 48, 63, 64, 65, 100, 128, 256, 512])
def test_any_size_from_16_to_512(size):
    for index in (0, 1, 5):
        item = draw_landscape(index, size)
        assert item.image.shape == (3, size, size) and torch.isfinite(item.image).all()
        assert item.caption == draw_landscape(index).caption


@pytest.mark.parametrize("size", [15, 513, 0, -1, 64.0, "64", None, True])
def test_other_sizes_say_what_is_allowed(size):
    with pytest.raises(ValueError, match="from 16 to 512"):
        draw_landscape(0, size)


def test_a_scene_is_the_same_at_every_resolution():
    distances = []
    for index in range(60):
        small = draw_landscape(index, 64).image
        large = torch.nn.functional.avg_pool2d(draw_landscape(index, 128).image, 2)
        distances.append((small - large).abs().mean().item())
    another = (draw_landscape(1, 64).image - draw_landscape(2, 64).image).abs().mean()
    assert np.mean(distances) < 0.02 and max(distances) < 0.06, (np.mean(distances), max(distances))
    assert another > 0.1


def test_train_and_val_share_no_item():
    digests = {}
    for split in ("train", "val", "test"):
        digests[split] = {hashlib.sha256(render(n, 16, split)[0].tobytes()).hexdigest() for n in range(300)}
        assert len(digests[split]) == 300
    assert not digests["train"] & digests["val"] and not digests["train"] & digests["test"]
    assert not torch.equal(draw_landscape(0, seed=0).image, draw_landscape(0, seed=1).image)


def test_the_first_pixel_tells_of_the_ground():
    """Chapter 1 conditions on it: night skies over dark ground, and the document's two sky colours occur."""
    images = np.stack([render(n, 16)[0] for n in range(600)]).astype(float) / 255
    first, ground = images[:, :, 0, 0], images[:, :, 10:].mean((2, 3))
    assert np.corrcoef(first.mean(1), ground.mean(1))[0, 1] > 0.5
    for colour in ((0x8, 0xE, 0xE), (0xF, 0xE, 0xC)):
        near = (np.abs(first * 15 - colour).max(1) <= 1.5).mean()
        assert near > 0.02, (colour, near)


def test_above_the_horizon_is_brighter_or_bluer_than_below():
    images = np.stack([render(n, 16)[0] for n in range(200)]).astype(float)
    assert images[:, :, :3].mean() > images[:, :, -3:].mean()


def test_data_set_is_bounded_and_can_be_stacked():
    items = Landscapes(size=16, length=5, split="val", seed=4)
    assert len(items) == 5 and len(list(items)) == 5 and items.classes == CLASSES
    assert torch.equal(items[3].image, draw_landscape(3, 16, "val", 4).image)
    for index in (5, -1):
        with pytest.raises(IndexError, match="5"):
            items[index]
    batch = default_collate([items[0], items[1]])
    assert isinstance(batch, Item) and batch.image.shape == (2, 3, 16, 16)
    assert batch.label.dtype == torch.int64 and len(batch.caption) == 2


@pytest.mark.parametrize("options", [{"split": "validation"}, {"length": 0}, {"size": 600}, {"seed": -1}])
def test_impossible_data_sets_are_refused_at_once(options):
    with pytest.raises(ValueError):
        Landscapes(**options)
    with pytest.raises(ValueError):
        draw_landscape(-1)


def test_drawing_is_fast():
    """The benchmark measures it; this only catches a fall by several times, however busy the machine is."""
    render(0)
    start = time.process_time()
    for index in range(150):
        render(index)
    assert 150 / (time.process_time() - start) > 130


# ---- the cache


def test_what_is_read_is_what_was_drawn(tmp_path):
    cached = cached_landscapes(32, 12, "val", 5, root=tmp_path)
    assert len(cached) == 12 and isinstance(cached.images, np.memmap) and cached.images.dtype == np.uint8
    for index in (11, 0, 4):
        drawn, read = draw_landscape(index, 32, "val", 5), cached[index]
        assert torch.equal(drawn.image, read.image) and drawn[1:] == read[1:]
        assert isinstance(read.label, int)
    read.image.zero_()                                              # an item is a copy, not the file
    assert torch.equal(cached[4].image, draw_landscape(4, 32, "val", 5).image)
    with pytest.raises(IndexError):
        cached[12]
    again = pickle.loads(pickle.dumps(cached))
    assert len(pickle.dumps(cached)) < 1000 and torch.equal(again[2].image, cached[2].image)


def test_the_second_call_draws_nothing(tmp_path, monkeypatch):
    cached_landscapes(16, 3, root=tmp_path)
    monkeypatch.setattr(data, "write_landscapes", lambda *_: pytest.fail("drawn again"))
    assert len(cached_landscapes(16, 3, root=tmp_path)) == 3


def test_every_part_of_the_key_has_its_own_file(tmp_path, monkeypatch):
    keys = [(16, 2, "train", 0), (17, 2, "train", 0), (16, 3, "train", 0), (16, 2, "val", 0), (16, 2, "train", 1)]
    for key in keys:
        cached_landscapes(*key, root=tmp_path)
    monkeypatch.setattr(data, "VERSION", data.VERSION + 1)
    cached_landscapes(*keys[0], root=tmp_path)
    assert len(list(tmp_path.iterdir())) == len(keys) + 1


def test_root_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIGEN_CACHE", str(tmp_path / "here"))
    cached_landscapes(16, 2)
    assert len(list((tmp_path / "here").iterdir())) == 1


def test_a_killed_write_leaves_nothing_that_is_taken_for_whole(tmp_path):
    code = (
        "import os, signal, sys; from minigen import data; draw = data.render\n"
        "def render(index, *rest):\n"
        "    if index == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return draw(index, *rest)\n"
        "data.render = render; data.cached_landscapes(16, 9, root=sys.argv[1])"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode != 0
    assert all(".partial-" in entry.name for entry in tmp_path.iterdir())
    assert torch.equal(cached_landscapes(16, 9, root=tmp_path)[8].image, draw_landscape(8, 16).image)


def test_a_failed_write_cleans_up(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data.np, "save", full)
    with pytest.raises(OSError, match="No space"):
        cached_landscapes(16, 2, root=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_two_that_draw_at_once_agree(tmp_path, monkeypatch):
    write, both = data.write_landscapes, threading.Barrier(2)

    def together(items, folder):
        both.wait(20)
        write(items, folder)
        both.wait(20)

    monkeypatch.setattr(data, "write_landscapes", together)
    found = []
    threads = [threading.Thread(target=lambda: found.append(cached_landscapes(16, 6, root=tmp_path))) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and len(list(tmp_path.iterdir())) == 1
    assert all(torch.equal(cached[5].image, draw_landscape(5, 16).image) for cached in found)


# ---- real images


def two_colours(mode="RGB", width=40, height=40):
    """Left half dark, right half light, as an image of the mode."""
    values = np.full((height, width), 50, np.uint8)
    values[:, width // 2:] = 200
    return Image.fromarray(values).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "CMYK", "YCbCr", "HSV", "1", "I", "F", "I;16"])
def test_every_mode_becomes_rgb(mode):
    image = two_colours("L")
    if mode in ("I", "I;16"):
        values = np.asarray(image).astype(np.uint16) * 257
        image = Image.fromarray(values.astype(np.int32) if mode == "I" else values)
    else:
        image = image.convert(mode, dither=Image.Dither.NONE)
    assert image.mode == mode and to_rgb(image).mode == "RGB"
    square = prepare(image, 20)
    assert square.shape == (3, 20, 20) and square.dtype == torch.float32
    dark, light = (0, 255) if mode == "1" else (50, 200)
    assert_close(square[:, 10, 2] * 255, torch.full((3,), float(dark)), atol=2.5, rtol=0)
    assert_close(square[:, 10, 17] * 255, torch.full((3,), float(light)), atol=2.5, rtol=0)


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    values = np.linspace(0, 65535, 64).astype(np.uint16)[None].repeat(64, 0)
    Image.fromarray(values).save(tmp_path / "ramp.png")
    with Image.open(tmp_path / "ramp.png") as image:
        row = prepare(image, 64)[0, 32]
    assert_close(row, torch.linspace(0, 1, 64), atol=0.01, rtol=0)


def test_floats_from_0_to_1_and_from_0_to_255():
    ramp = np.linspace(0, 1, 32, dtype=np.float32)[None].repeat(32, 0)
    assert_close(prepare(Image.fromarray(ramp), 32), prepare(Image.fromarray(ramp * 255), 32))


def test_cmyk_file_has_the_right_colours(tmp_path):
    red = Image.new("RGB", (32, 32), (230, 30, 20)).convert("CMYK")
    red.save(tmp_path / "red.jpg", quality=95)
    with Image.open(tmp_path / "red.jpg") as image:
        assert image.mode == "CMYK"
        colour = prepare(image, 8)[:, 4, 4] * 255
    assert_close(colour, torch.tensor([230.0, 30.0, 20.0]), atol=12, rtol=0)


def test_transparency_is_laid_on_white(tmp_path):
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    half = Image.new("RGBA", (16, 16), (0, 0, 0, 128))
    assert_close(prepare(clear, 8), torch.ones(3, 8, 8))
    assert_close(prepare(half, 8), torch.full((3, 8, 8), 127 / 255), atol=0.01, rtol=0)
    palette = Image.new("P", (16, 16), 0)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    palette.paste(1, (8, 0, 16, 16))
    palette.save(tmp_path / "palette.png", transparency=0)
    with Image.open(tmp_path / "palette.png") as image:
        assert image.mode == "P"
        square = prepare(image, 16)
    assert_close(square[:, 8, 2], torch.ones(3))
    assert_close(square[:, 8, 13] * 255, torch.tensor([10.0, 200.0, 30.0]), atol=1, rtol=0)


@pytest.mark.parametrize("orientation,turn", [(1, 0), (3, 180), (6, 90), (8, 270)])
def test_exif_turns_the_picture_upright(tmp_path, orientation, turn):
    upright = Image.new("RGB", (32, 32), (0, 0, 255))
    upright.paste((255, 255, 255), (0, 0, 32, 16))                      # light above
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright.rotate(turn).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as image:
        square = prepare(image, 16)
    assert_close(square[:, 2, 8], torch.ones(3))
    assert_close(square[:, 13, 8], torch.tensor([0.0, 0.0, 1.0]))


@pytest.mark.parametrize("width,height", [(90, 30), (30, 90), (31, 30), (30, 30), (1, 1), (300, 7)])
def test_the_middle_square_is_kept(width, height):
    image = Image.new("RGB", (width, height), (255, 0, 0))
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    image.paste((0, 255, 0), (left, top, left + side, top + side))
    square = prepare(image, 24)
    assert square.shape == (3, 24, 24) and square[1, 12, 12] == 1 and square[0, 4:-4, 4:-4].max() < 0.05


def test_reduction_averages():
    checks = np.indices((256, 256)).sum(0) % 2 * 255
    grey = prepare(Image.fromarray(checks.astype(np.uint8)), 16)
    assert_close(grey[:, 4:12, 4:12], torch.full((3, 8, 8), 0.5), atol=0.03, rtol=0)


@pytest.fixture
def photographs(tmp_path):
    """Two folders of real files: six PNG under `lake`, six JPEG under `hills`."""
    for label, name in enumerate(("lake", "hills")):
        (tmp_path / name).mkdir()
        for n in range(6):
            image = Image.new("RGB", (40 + n, 50), (20 * n, 120, 200 * label))
            image.save(tmp_path / name / f"{n}.{'jpg' if label else 'png'}")
    return tmp_path


def test_folder_with_a_folder_for_each_class(photographs):
    train, val = (load_dataset(photographs, 16, split) for split in ("train", "val"))
    assert train.classes == ("hills", "lake") and len(train) + len(val) == 12 and len(val) == 1
    assert not {record[3] for record in train.records} & {record[3] for record in val.records}
    for item in [*train, *val]:
        assert item.image.shape == (3, 16, 16) and item.caption == train.classes[item.label]
        assert (item.image[2].mean() > 0.5) == (item.caption == "hills")
    assert len(load_dataset(str(photographs), 16, length=4)) == 4
    assert len(load_dataset(photographs, 16, length=400)) == 11
    first, again, other = (load_dataset(photographs, 16, length=4, seed=s).records for s in (1, 1, 2))
    assert first == again and first != other


def test_folder_with_train_and_val(photographs, tmp_path_factory):
    root = tmp_path_factory.mktemp("splits")
    for split in ("train", "val"):
        (root / split).mkdir()
        for name in ("lake", "hills"):
            os.symlink(photographs / name, root / split / name)
    assert len(load_dataset(root, 16)) == len(load_dataset(root, 16, "val")) == 12
    os.rename(root / "val", root / "elsewhere")
    with pytest.raises(FileNotFoundError, match="none for 'val'"):
        load_dataset(root, 16, "val")


def test_the_choice_of_val_survives_a_move(photographs, tmp_path_factory, monkeypatch):
    moved = tmp_path_factory.mktemp("moved") / "here"
    shutil.copytree(photographs, moved)
    names = [[os.path.relpath(record[3], root) for record in load_dataset(root, 16, "val").records]
             for root in (photographs, moved)]
    monkeypatch.chdir(moved)
    names.append([os.path.relpath(record[3]) for record in load_dataset(".", 16, "val").records])
    assert names[0] == names[1] == names[2]


def test_folder_of_images_side_by_side(photographs):
    flat = load_dataset(photographs / "lake", 16)
    assert len(flat) == 5 and flat.classes == ("lake",) and flat[0].label == 0


def test_folder_with_metadata(tmp_path):
    import datasets
    datasets.disable_progress_bars()
    texts = ["forest, river, mountains", "lake,trees", "forest"] * 4
    with open(tmp_path / "metadata.jsonl", "w") as file:
        for n, text in enumerate(texts):
            Image.new("RGB", (20, 30), (10 * n, 0, 255)).save(tmp_path / f"{n:02}.png")
            print(json.dumps({"file_name": f"{n:02}.png", "text": text}), file=file)
    found = load_dataset(tmp_path, 16)
    assert found.classes == ("forest", "lake") and len(found) == 11
    for item in found:
        n = round(item.image[0, 0, 0].item() * 255 / 10)
        assert item.caption == texts[n].replace(",t", ", t") and found.classes[item.label] == item.caption.split(", ")[0]
    (tmp_path / "05.png").write_bytes(b"")
    with pytest.raises(ValueError, match="05.png.*empty"):
        list(load_dataset(tmp_path, 16))
    with pytest.warns(UserWarning, match="left out 1 of 11"):
        assert len(load_dataset(tmp_path, 16, on_error="skip")) == 10


def break_files(folder):
    (folder / "lake" / "empty.png").touch()
    (folder / "lake" / "text.png").write_text("this is no image")
    whole = (folder / "hills" / "1.jpg").read_bytes()
    (folder / "hills" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    return {"empty.png", "text.png", "cut.jpg"}


def test_an_unreadable_file_is_named(photographs):
    bad = break_files(photographs)
    whole, errors = 0, []
    found = load_dataset(photographs, 16), load_dataset(photographs, 16, "val")
    for items in found:
        for index in range(len(items)):
            try:
                items[index]
                whole += 1
            except ValueError as error:
                errors.append(str(error))
    assert whole == 12 and len(errors) == 3
    assert all(any(name in error for error in errors) for name in bad)
    assert all("on_error='skip'" in error for error in errors)
    assert sum("is empty" in error for error in errors) == 1


def test_skip_leaves_out_and_reports_once(photographs):
    break_files(photographs)
    everything = data.folder_records(photographs, "train")[0] + data.folder_records(photographs, "val")[0]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        items = data.Pictures(everything, ("hills", "lake"), 16, on_error="skip")
        assert len(list(items)) == len(list(items)) == 12
    assert len(caught) == 1 and "left out 3 of 15" in str(caught[0].message)


def test_nothing_left_after_skipping(tmp_path):
    for n in range(4):
        (tmp_path / f"{n}.jpg").touch()
    with pytest.raises(ValueError, match="none of the 3 images can be read"):
        load_dataset(tmp_path, 16, on_error="skip")


def test_sentences_for_what_cannot_be(tmp_path, photographs):
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere.*landscapes, cifar10"):
        load_dataset(tmp_path / "nowhere", 16)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="no images: found 0 entries.*Put images there"):
        load_dataset(empty, 16)
    (empty / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match="no images: found 1 entry"):
        load_dataset(empty, 16)
    with pytest.raises(ValueError, match="1 to 4096"):
        load_dataset(photographs, 0)
    with pytest.raises(ValueError, match="from 16 to 512"):
        load_dataset("landscapes", 8, root=tmp_path)
    with pytest.raises(ValueError, match="'raise' or 'skip'"):
        load_dataset(photographs, 16, on_error="ignore")
    with pytest.raises(ValueError, match="train, val, test"):
        load_dataset(photographs, 16, "valdation")
    with pytest.raises(ValueError, match="at least one"):
        load_dataset("landscapes", 16, length=0)
    (tmp_path / "single").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "single" / "one.png")
    with pytest.raises(ValueError, match="too few"):
        load_dataset(tmp_path / "single", 16)


def test_landscapes_by_name(tmp_path):
    items = load_dataset("landscapes", 16, "val", 7, seed=2, root=tmp_path)
    assert len(items) == 7 and torch.equal(items[6].image, draw_landscape(6, 16, "val", 2).image)


# ---- the libraries' data sets, in their own form on disk


def test_cifar10_as_it_lies_on_disk(tmp_path, monkeypatch):
    folder = tmp_path / "cifar10" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (10, 3072), dtype=np.uint8)
    names = [f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"]
    for number, name in enumerate(names):
        rows = pixels if name == "test_batch" else pixels[2 * number: 2 * number + 2]
        (folder / name).write_bytes(pickle.dumps({"data": rows, "labels": list(range(len(rows)))}))
    classes = [f"class {n}" for n in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": classes}))
    monkeypatch.setattr("torchvision.datasets.CIFAR10._check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    train = load_dataset("cifar10", 32, root=tmp_path)
    val = load_dataset("cifar10", 32, "val", root=tmp_path)
    assert len(train) == len(val) == 10 and train.classes == tuple(classes)
    assert_close(val[3].image, torch.tensor(pixels[3].reshape(3, 32, 32)).float() / 255)
    assert val[3].label == 3 and val[3].caption == "class 3"
    assert load_dataset("cifar10", 16, root=tmp_path)[0].image.shape == (3, 16, 16)


def test_imagenette_as_it_lies_on_disk(tmp_path):
    for split, count in (("train", 3), ("val", 2)):
        for name in ("n01440764", "n03028079"):
            folder = tmp_path / "imagenette" / "imagenette2-160" / split / name
            folder.mkdir(parents=True)
            for n in range(count):
                Image.new("RGB", (20, 16), (255, 0, 0)).save(folder / f"{name}_{n}.JPEG".replace("JPEG", "jpeg"))
    train, val = (load_dataset("imagenette", 16, split, root=tmp_path) for split in ("train", "val"))
    assert len(train) == 6 and len(val) == 4 and train.classes == ("tench", "church")
    assert train[5].caption == "church" and train[5].image.shape == (3, 16, 16)


def test_imagenet_as_torchvision_unpacks_it(tmp_path):
    """The folders and the `meta.bin` that torchvision makes of ImageNet's archives."""
    names = {"n01440764": ("tench", "Tinca tinca"), "n03028079": ("church", "church building")}
    root = tmp_path / "imagenet"
    for split, count in (("train", 3), ("val", 2)):
        for wnid in names:
            (root / split / wnid).mkdir(parents=True)
            for n in range(count):
                Image.new("RGB", (20, 16), (0, 0, 255)).save(root / split / wnid / f"{n}.jpeg")
    torch.save((names, ["n01440764"] * 2 + ["n03028079"] * 2), root / "meta.bin")
    train, val = (load_dataset("imagenet", 16, split, root=tmp_path) for split in ("train", "val"))
    assert len(train) == 6 and len(val) == 4 and train.classes == ("tench", "church")
    assert val[3].caption == "church" and val[3].image.shape == (3, 16, 16)


def test_nature_landscape_asks_for_its_library_only_when_needed(tmp_path, monkeypatch):
    code = "import sys; import minigen.data; sys.exit('datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        load_dataset("nature-landscape", 16, root=tmp_path)


def test_nature_landscape_rows(tmp_path, monkeypatch):
    import datasets
    rows = {"image": [Image.new("RGB", (10, 10), (n, 0, 0)) for n in range(20)], "text": ["forest, river"] * 20}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    table = datasets.Dataset.from_dict(rows, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    train = load_dataset("nature-landscape", 16, root=tmp_path)
    val = load_dataset("nature-landscape", 16, "val", root=tmp_path)
    assert len(train) == 18 and len(val) == 2 and train.classes == ("forest",)
    assert round(val[0].image[0].mean().item() * 255) == 9 and val[0].caption == "forest, river"


# ---- batches


def first_labels(generator, passes=3):
    items = Landscapes(16, 10)
    batches = endless_batches(items, 4, generator)
    return [next(batches).image[:, 0, 0, 0].tolist() for _ in range(2 * passes)]


def test_batches_follow_from_the_generator():
    one, again, other = (first_labels(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert one == again and one != other
    assert one[0] + one[1] != one[2] + one[3], "the second pass comes in the order of the first"


def test_a_pass_visits_an_item_once():
    items = Landscapes(16, 9)
    batches = endless_batches(items, 3, torch.Generator().manual_seed(0))
    seen = torch.cat([next(batches).image for _ in range(3)]).flatten(1)
    everything = torch.stack([item.image for item in items]).flatten(1)
    assert_close(seen.sum(0), everything.sum(0))
    batch = next(batches)
    assert batch.image.shape == (3, 3, 16, 16) and batch.label.shape == (3,) and len(batch.caption) == 3


def test_worker_processes_give_the_same_batches(tmp_path):
    cached = cached_landscapes(16, 8, root=tmp_path)
    here, there = (endless_batches(cached, 4, torch.Generator().manual_seed(3), workers) for workers in (0, 1))
    for _ in range(3):
        assert torch.equal(next(here).image, next(there).image)


@pytest.mark.parametrize("start", [0, 1, 2, 5, 7])
def test_batches_start_in_the_middle_without_reading_what_was_before(start):
    class Numbers(torch.utils.data.Dataset):
        read = []

        def __len__(self):
            return 10

        def __getitem__(self, index):
            self.read.append(index)
            return index

    whole = endless_batches(Numbers(), 4, torch.Generator().manual_seed(1))
    expected = [next(whole).tolist() for _ in range(9)][start:]
    Numbers.read.clear()
    late = endless_batches(Numbers(), 4, torch.Generator().manual_seed(1), start=start)
    assert [next(late).tolist() for _ in expected] == expected
    assert Numbers.read == sum(expected, [])


def test_processes_share_each_batch():
    shares = [endless_batches(list(range(9)), 4, torch.Generator().manual_seed(1), start=1, share=slice(rank, None, 2)) for rank in (0, 1)]
    whole = endless_batches(list(range(9)), 4, torch.Generator().manual_seed(1), start=1)
    for _ in range(5):
        parts = [next(share).tolist() for share in shares]
        assert [len(part) for part in parts] == [2, 2]
        assert sorted(parts[0] + parts[1]) == sorted(next(whole).tolist())


def test_fewer_items_than_a_batch():
    with pytest.raises(ValueError, match="3 items.*batch of 4"):
        endless_batches(Landscapes(16, 3), 4)
