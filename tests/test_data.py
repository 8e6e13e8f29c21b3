"""Chapter 0: landscapes, their cache, real images in every state, and batches."""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import warnings
from contextlib import contextmanager

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


def python(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)],
                          capture_output=True, text=True)


def generator(seed):
    return torch.Generator().manual_seed(seed)


# ---- landscapes


def test_item_is_an_image_a_label_and_a_caption():
    for index in range(40):
        image, label, _ = draw_landscape(index)
        assert (image.shape, image.dtype) == ((3, 64, 64), torch.float32)
        assert 0 <= image.min() < image.max() <= 1
        assert image.std() > 0.01, "a flat image"
        assert type(label) is int
        assert 0 <= label < len(CLASSES)


def test_captions_begin_with_the_class_classes_are_balanced_and_every_word_occurs():
    vocabulary = "mountains forest trees river hills path lake birds waterfall".split()
    labels, seen = np.zeros(len(CLASSES)), set()
    for index in range(900):
        drawn = render(index, 16)
        label, words = drawn.label, drawn.words.split(", ")
        assert words[0] == CLASSES[label]
        assert len(set(words)) == len(words)
        labels[label] += 1
        seen.update(words)
        assert draw_landscape(index, 16, captions="words").caption == drawn.words
    assert seen == set(vocabulary)
    assert 70 < labels.min() <= labels.max() < 135, labels


def test_a_sentence_says_what_was_painted_and_nothing_else():
    """Each phrase has its word in the short form, and each thing painted is named."""
    names = {"hills": ("hills",), "mountains": ("mountains",), "lake": ("lake",),
             "forest": ("forest",), "river": ("river",), "path": ("path",),
             "birds": ("birds",), "waterfall": ("waterfall",),
             "trees": ("trees", "tree", "wood")}
    moods, seasons = set(), {"winter": 0, "autumn": 0}
    for index in range(900):
        drawn = render(index, 16)
        said, words = set(drawn.caption.split()), drawn.words.split(", ")
        for word, forms in names.items():
            beside = word == "trees" and words[0] == "waterfall"   # a tree is no wood
            assert (word in words) == bool(said & set(forms)) or beside, drawn
        assert not said & {"left", "right"}, "mirrored images keep their captions"
        assert (drawn.mood == "winter") == ("winter" in said)
        assert not {"autumn", "winter"} <= said
        assert "autumn" not in said or {"trees", "forest"} & set(words)
        for season in seasons:
            seasons[season] += season in said
        ending = drawn.caption.split(" in autumn")[0].split()[-2:]
        moods.add((drawn.mood, " ".join(ending)))
    assert {mood for mood, _ in moods} == {mood.name for mood in MOODS}
    endings = {end for mood, end in moods if mood != "day"}
    assert len(endings) == len(moods) - 2, "each mood has its own phrase"
    assert min(seasons.values()) > 40


def test_captions_have_two_forms_and_a_wrong_one_is_named(tmp_path):
    said = {form: load_dataset("landscapes", 16, length=3, root=tmp_path, captions=form)
            for form in ("sentence", "words")}
    assert said["sentence"][2].caption == render(2, 16).caption
    assert said["words"][2].caption == render(2, 16).words
    assert said["words"].moods[2] == render(2, 16).mood
    again = pickle.loads(pickle.dumps(said["words"]))
    assert again[2].caption == render(2, 16).words
    with pytest.raises(ValueError, match="captions must be 'sentence' or 'words'"):
        Landscapes(captions="poem")


def test_same_item_in_another_process_and_in_another_order():
    code = ("import hashlib; from minigen.landscapes import render\n"
            "for n in (11, 2, 7):\n"
            "    pixels = render(n, 64, 'val', 3)[0].tobytes()\n"
            "    print(hashlib.sha256(pixels).hexdigest())")
    here = {n: hashlib.sha256(render(n, 64, "val", 3)[0].tobytes()).hexdigest()
            for n in (2, 7, 11)}
    assert python(code).stdout.split() == [here[n] for n in (11, 2, 7)]


def test_every_class_and_mood_can_be_drawn_without_numerical_trouble():
    with np.errstate(all="raise", under="ignore"):
        for label in range(len(CLASSES)):
            for mood in range(len(MOODS)):
                drawn = render(7 * label + mood, 32, label=label, mood=mood)
                assert (drawn.label, drawn.mood) == (label, MOODS[mood].name)
                assert drawn.pixels.std() > 3


@pytest.mark.parametrize("size", [16, 17, 32, 48, 63, 64, 65, 100, 128, 256, 512])
def test_any_size_from_16_to_512(size):
    for index in (0, 1, 5):
        item = draw_landscape(index, size)
        assert item.image.shape == (3, size, size)
        assert torch.isfinite(item.image).all()
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
    assert np.mean(distances) < 0.02
    assert max(distances) < 0.06
    assert another > 0.1


def test_train_and_val_share_no_item():
    train, val, test = ({render(n, 16, split)[0].tobytes() for n in range(300)}
                        for split in ("train", "val", "test"))
    assert len(train | val | test) == 900
    first, other = (draw_landscape(0, 16, seed=seed).image for seed in (0, 1))
    assert not torch.equal(first, other)


def test_the_first_pixel_tells_of_the_ground_and_the_sky_is_brighter():
    """Chapter 1 conditions on it; the two sky colors of its document occur."""
    images = np.stack([render(n, 16)[0] for n in range(600)]).astype(float) / 255
    first, ground = images[:, :, 0, 0], images[:, :, 10:].mean((2, 3))
    assert np.corrcoef(first.mean(1), ground.mean(1))[0, 1] > 0.5
    for color in ((0x8, 0xE, 0xE), (0xF, 0xE, 0xC)):
        assert (np.abs(first * 15 - color).max(1) <= 1.5).mean() > 0.02, color
    assert images[:, :, :3].mean() > images[:, :, -3:].mean()


def test_data_set_is_bounded_and_can_be_stacked():
    items = Landscapes(size=16, length=5, split="val", seed=4)
    assert (len(items), len(list(items)), items.classes) == (5, 5, CLASSES)
    assert torch.equal(items[3].image, draw_landscape(3, 16, "val", 4).image)
    for index in (5, -1):
        with pytest.raises(IndexError, match="5"):
            items[index]
    batch = default_collate([items[0], items[1]])
    assert isinstance(batch, Item)
    assert (batch.image.shape, batch.label.dtype) == ((2, 3, 16, 16), torch.int64)
    assert len(batch.caption) == 2


@pytest.mark.parametrize("options", [{"split": "validation"}, {"length": 0},
                                     {"size": 600}, {"seed": -1}])
def test_impossible_data_sets_are_refused_at_once(options):
    with pytest.raises(ValueError):
        Landscapes(**options)
    with pytest.raises(ValueError, match="index -1"):
        draw_landscape(-1)


# ---- the cache


def visible(folder):
    return sorted(entry.name for entry in folder.iterdir() if entry.name[0] != ".")


def test_what_is_read_is_what_was_drawn(tmp_path):
    cached = cached_landscapes(32, 12, "val", 5, root=tmp_path)
    assert len(cached) == 12
    assert isinstance(cached.images, np.memmap)
    assert cached.images.dtype == np.uint8
    for index in (11, 0, 4):
        drawn, read = draw_landscape(index, 32, "val", 5), cached[index]
        assert torch.equal(drawn.image, read.image)
        assert (type(read.label), drawn[1:]) == (int, read[1:])
    read.image.zero_()  # an item is a copy, not the file
    assert torch.equal(cached[4].image, draw_landscape(4, 32, "val", 5).image)
    with pytest.raises(IndexError):
        cached[12]
    pickled = pickle.dumps(cached)
    assert len(pickled) < 1000
    assert torch.equal(pickle.loads(pickled)[2].image, cached[2].image)


def test_the_second_call_draws_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIGEN_CACHE", str(tmp_path / "here"))
    cached_landscapes(16, 3)
    monkeypatch.setattr(data, "write_landscapes", lambda *_: pytest.fail("drawn again"))
    assert len(cached_landscapes(16, 3, root=tmp_path / "here")) == 3
    assert len(visible(tmp_path / "here")) == 1


def test_every_part_of_the_key_has_its_own_file(tmp_path, monkeypatch):
    keys = [(16, 2, "train", 0), (17, 2, "train", 0), (16, 3, "train", 0),
            (16, 2, "val", 0), (16, 2, "train", 1)]
    for key in keys:
        cached_landscapes(*key, root=tmp_path)
    monkeypatch.setattr(data, "VERSION", data.VERSION + 1)
    cached_landscapes(*keys[0], root=tmp_path)
    assert len(visible(tmp_path)) == len(keys) + 1


def test_a_killed_write_leaves_nothing_that_is_taken_for_whole(tmp_path):
    code = ("import os, signal, sys; from minigen import data; draw = data.render\n"
            "def render(index, *rest):\n"
            "    if index == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
            "    return draw(index, *rest)\n"
            "data.render = render; data.cached_landscapes(16, 9, root=sys.argv[1])")
    assert python(code, tmp_path).returncode != 0
    assert visible(tmp_path) == []
    cached = cached_landscapes(16, 9, root=tmp_path)
    assert torch.equal(cached[8].image, draw_landscape(8, 16).image)
    assert list(tmp_path.glob(".tmp-*")) == []


@pytest.mark.parametrize("function", ["np.save", "reserve"])
def test_a_full_disk_is_reported_and_leaves_nothing(tmp_path, monkeypatch, function):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"minigen.data.{function}", full)
    with pytest.raises(OSError, match="No space"):
        cached_landscapes(16, 2, root=tmp_path)
    assert not any(path.name == "images.npy" for path in tmp_path.rglob("*"))


def test_one_draws_and_the_other_waits(tmp_path, monkeypatch):
    lock, write = data.lock_folder, data.write_landscapes
    both, drawn, found = threading.Barrier(2), [], []

    @contextmanager
    def lock_together(*arguments, **options):
        both.wait(20)
        with lock(*arguments, **options):
            yield

    def write_and_count(items, folder):
        drawn.append(folder)
        write(items, folder)

    monkeypatch.setattr(data, "lock_folder", lock_together)
    monkeypatch.setattr(data, "write_landscapes", write_and_count)
    threads = [threading.Thread(target=lambda: found.append(
        cached_landscapes(16, 6, root=tmp_path))) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(found), len(drawn), len(visible(tmp_path))) == (2, 1, 1)
    for cached in found:
        assert torch.equal(cached[5].image, draw_landscape(5, 16).image)


# ---- real images


def saved(image, path, **options):
    """An image, written to a file and opened again."""
    image.save(path, **options)
    return Image.open(path)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "CMYK", "YCbCr", "HSV",
                                  "1", "I", "F", "I;16"])
def test_every_mode_becomes_rgb(mode):
    values = np.full((40, 40), 50, np.uint8)
    values[:, 20:] = 200  # dark on the left, light on the right
    if mode in ("I", "I;16"):
        values = values.astype(np.uint16) * 257
        image = Image.fromarray(values.astype(np.int32) if mode == "I" else values)
    else:
        image = Image.fromarray(values).convert(mode, dither=Image.Dither.NONE)
    assert (image.mode, to_rgb(image).mode) == (mode, "RGB")
    square = prepare(image, 20)
    assert (square.shape, square.dtype) == ((3, 20, 20), torch.float32)
    for column, value in zip((2, 17), (0, 255) if mode == "1" else (50, 200)):
        expected = torch.full((3,), float(value))
        assert_close(square[:, 10, column] * 255, expected, atol=2.5, rtol=0)


def test_sixteen_bits_and_floats_are_scaled_and_not_clipped(tmp_path):
    ramp = np.linspace(0, 1, 64, dtype=np.float32)[None].repeat(64, 0)
    sixteen = Image.fromarray((ramp * 65535).astype(np.uint16))
    with saved(sixteen, tmp_path / "ramp.png") as image:
        row = prepare(image, 64)[0, 32]
    assert_close(row, torch.linspace(0, 1, 64), atol=0.01, rtol=0)
    one, many = (prepare(Image.fromarray(ramp * scale), 32) for scale in (1, 255))
    assert_close(one, many)


def test_cmyk_file_has_the_right_colors(tmp_path):
    red = Image.new("RGB", (32, 32), (230, 30, 20)).convert("CMYK")
    with saved(red, tmp_path / "red.jpg", quality=95) as image:
        assert image.mode == "CMYK"
        color = prepare(image, 8)[:, 4, 4] * 255
    assert_close(color, torch.tensor([230.0, 30.0, 20.0]), atol=12, rtol=0)


def test_transparency_is_laid_on_white(tmp_path):
    for pixel, gray in (((255, 0, 0, 0), 1.0), ((0, 0, 0, 128), 127 / 255)):
        square = prepare(Image.new("RGBA", (16, 16), pixel), 8)
        assert_close(square, torch.full((3, 8, 8), gray), atol=0.01, rtol=0)
    palette = Image.new("P", (16, 16), 0)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    palette.paste(1, (8, 0, 16, 16))
    with saved(palette, tmp_path / "palette.png", transparency=0) as image:
        assert image.mode == "P"
        square = prepare(image, 16)
    assert_close(square[:, 8, 2], torch.ones(3))
    assert_close(square[:, 8, 13] * 255, torch.tensor([10.0, 200.0, 30.0]))


@pytest.mark.parametrize(("orientation", "turn"), [(1, 0), (3, 180), (6, 90), (8, 270)])
def test_exif_turns_the_image_upright(tmp_path, orientation, turn):
    upright = Image.new("RGB", (32, 32), (0, 0, 255))
    upright.paste((255, 255, 255), (0, 0, 32, 16))  # light above
    exif = Image.Exif()
    exif[0x0112] = orientation
    with saved(upright.rotate(turn), tmp_path / "turned.png", exif=exif) as image:
        square = prepare(image, 16)
    assert_close(square[:, 2, 8], torch.ones(3))
    assert_close(square[:, 13, 8], torch.tensor([0.0, 0.0, 1.0]))


@pytest.mark.parametrize(("width", "height"), [(90, 30), (30, 90), (31, 30), (30, 30),
                                               (1, 1), (300, 7)])
def test_the_middle_square_is_kept(width, height):
    image = Image.new("RGB", (width, height), (255, 0, 0))
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    image.paste((0, 255, 0), (left, top, left + side, top + side))
    square = prepare(image, 24)
    assert (square.shape, square[1, 12, 12]) == ((3, 24, 24), 1)
    assert square[0, 4:-4, 4:-4].max() < 0.05


def test_reduction_averages():
    checks = np.indices((256, 256)).sum(0) % 2 * 255
    gray = prepare(Image.fromarray(checks.astype(np.uint8)), 16)
    assert_close(gray[:, 4:12, 4:12], torch.full((3, 8, 8), 0.5), atol=0.03, rtol=0)


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
    assert (train.classes, len(train), len(val)) == (("hills", "lake"), 11, 1)
    assert not {record[3] for record in train.records} & {val.records[0][3]}
    for item in [*train, *val]:
        assert item.image.shape == (3, 16, 16)
        assert item.caption == train.classes[item.label]
        assert (item.image[2].mean() > 0.5) == (item.caption == "hills")
    assert len(load_dataset(str(photographs), 16, length=4)) == 4
    assert len(load_dataset(photographs, 16, length=400)) == 11
    first, again, other = (load_dataset(photographs, 16, length=4, seed=seed).records
                           for seed in (1, 1, 2))
    assert first == again != other
    flat = load_dataset(photographs / "lake", 16)  # images side by side
    assert (len(flat), flat.classes, flat[0].label) == (5, ("lake",), 0)


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
    monkeypatch.chdir(moved)
    names = {os.path.relpath(load_dataset(folder, 16, "val").records[0][3], folder)
             for folder in (photographs, moved, ".")}
    assert len(names) == 1


def test_folder_with_metadata(tmp_path):
    import datasets
    datasets.disable_progress_bars()
    texts = ["forest, river, mountains", "lake,trees", "forest"] * 4
    with open(tmp_path / "metadata.jsonl", "w") as file:
        for n, text in enumerate(texts):
            Image.new("RGB", (20, 30), (10 * n, 0, 255)).save(tmp_path / f"{n:02}.png")
            print(json.dumps({"file_name": f"{n:02}.png", "text": text}), file=file)
    found = load_dataset(tmp_path, 16)
    assert (found.classes, len(found)) == (("forest", "lake"), 11)
    for item in found:
        n = round(item.image[0, 0, 0].item() * 255 / 10)
        assert item.caption == texts[n].replace(",t", ", t")
        assert found.classes[item.label] == item.caption.split(", ")[0]
    (tmp_path / "05.png").write_bytes(b"")
    with pytest.raises(ValueError, match="05.png.*empty"):
        list(load_dataset(tmp_path, 16))
    with pytest.warns(UserWarning, match="left out 1 of 11"):
        assert len(load_dataset(tmp_path, 16, on_error="skip")) == 10


@pytest.fixture
def broken(photographs):
    """The records of both splits, with three more files that cannot be read."""
    (photographs / "lake" / "empty.png").touch()
    (photographs / "lake" / "text.png").write_text("this is no image")
    whole = (photographs / "hills" / "1.jpg").read_bytes()
    (photographs / "hills" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    return [record for split in ("train", "val")
            for record in data.folder_records(photographs, split)[0]]


def test_an_unreadable_file_is_named(broken):
    items, errors = data.ImageDataset(broken, ("hills", "lake"), 16), []
    for index in range(len(items)):
        try:
            items[index]
        except ValueError as error:
            errors.append(str(error))
    assert (len(items), len(errors)) == (15, 3)
    for name in ("empty.png", "text.png", "cut.jpg"):
        assert any(name in error for error in errors)
    assert all("on_error='skip'" in error for error in errors)
    assert sum("is empty" in error for error in errors) == 1


def test_skip_leaves_out_and_reports_once(broken):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        items = data.ImageDataset(broken, ("hills", "lake"), 16, on_error="skip")
        assert len(list(items)) == len(list(items)) == 12
    assert len(caught) == 1
    assert "left out 3 of 15" in str(caught[0].message)


@pytest.mark.parametrize(("name", "options", "sentence"), [
    ("nowhere", {}, "no folder .*nowhere.*landscapes, cifar10"),
    ("empty", {}, "no images: found 0 entries.*Put images there"),
    ("text", {}, "no images: found 1 entry"),
    ("single", {}, "too few"),
    ("torn", {"on_error": "skip"}, "none of 3 images can be read"),
    ("", {"size": 0}, "1 to 4096"),
    ("", {"on_error": "ignore"}, "'raise' or 'skip'"),
    ("", {"split": "valdation"}, "train, val or test"),
    ("landscapes", {"size": 8}, "from 16 to 512"),
    ("landscapes", {"length": 0}, "at least 1"),
])
def test_sentences_for_what_cannot_be(photographs, name, options, sentence):
    for folder in ("empty", "text", "single", "torn"):
        (photographs / folder).mkdir()
    (photographs / "text" / "notes.txt").touch()
    Image.new("RGB", (8, 8)).save(photographs / "single" / "one.png")
    for n in range(4):
        (photographs / "torn" / f"{n}.jpg").touch()
    name = name if name == "landscapes" else photographs / name
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        load_dataset(name, **{"size": 16, "root": photographs / "cache"} | options)


def test_landscapes_by_name(tmp_path):
    items = load_dataset("landscapes", 16, "val", 7, seed=2, root=tmp_path)
    assert len(items) == 7
    assert torch.equal(items[6].image, draw_landscape(6, 16, "val", 2).image)


# ---- the libraries' data sets, in their own form on disk


def test_cifar10_as_it_lies_on_disk(tmp_path, monkeypatch):
    folder = tmp_path / "cifar10" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (10, 3072), dtype=np.uint8)
    for n, name in enumerate([f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"]):
        rows = pixels if name == "test_batch" else pixels[2 * n: 2 * n + 2]
        content = {"data": rows, "labels": list(range(len(rows)))}
        (folder / name).write_bytes(pickle.dumps(content))
    classes = [f"class {n}" for n in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": classes}))
    for name in ("CIFAR10._check_integrity", "cifar.check_integrity"):
        monkeypatch.setattr(f"torchvision.datasets.{name}", lambda *_: True)
    train, val = (load_dataset("cifar10", 32, split, root=tmp_path)
                  for split in ("train", "val"))
    assert (len(train), len(val), train.classes) == (10, 10, tuple(classes))
    assert_close(val[3].image, torch.tensor(pixels[3].reshape(3, 32, 32)).float() / 255)
    assert val[3][1:] == (3, "class 3")
    assert load_dataset("cifar10", 16, root=tmp_path)[0].image.shape == (3, 16, 16)


@pytest.mark.parametrize(("name", "inside"), [("imagenette", "imagenette2-160"),
                                              ("imagenet", "")])
def test_imagenet_and_imagenette_as_torchvision_unpacks_them(tmp_path, name, inside):
    names = {"n01440764": ("tench", "Tinca tinca"),
             "n03028079": ("church", "church building")}
    root = tmp_path / name / inside
    for split, count in (("train", 3), ("val", 2)):
        for wnid in names:
            (root / split / wnid).mkdir(parents=True)
            for n in range(count):
                image = Image.new("RGB", (20, 16), (0, 0, 255))
                image.save(root / split / wnid / f"{wnid}_{n}.jpeg")
    torch.save((names, ["n01440764"] * 2 + ["n03028079"] * 2), root / "meta.bin")
    train, val = (load_dataset(name, 16, split, root=tmp_path)
                  for split in ("train", "val"))
    assert (len(train), len(val), train.classes) == (6, 4, ("tench", "church"))
    assert (val[3].caption, val[3].image.shape) == ("church", (3, 16, 16))


def test_nature_landscape_asks_for_its_library_only_when_needed(tmp_path, monkeypatch):
    code = "import sys; import minigen.data; sys.exit('datasets' in sys.modules)"
    assert python(code).returncode == 0
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        load_dataset("nature-landscape", 16, root=tmp_path)


def test_nature_landscape_rows(tmp_path, monkeypatch):
    import datasets
    features = datasets.Features({"image": datasets.Image(),
                                  "text": datasets.Value("string")})
    table = datasets.Dataset.from_dict(
        {"image": [Image.new("RGB", (10, 10), (n, 0, 0)) for n in range(20)],
         "text": ["forest, river"] * 20}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    train, val = (load_dataset("nature-landscape", 16, split, root=tmp_path)
                  for split in ("train", "val"))
    assert (len(train), len(val), train.classes) == (18, 2, ("forest",))
    assert round(val[0].image[0].mean().item() * 255) == 9
    assert val[0].caption == "forest, river"


# ---- batches


def take(batches, count):
    return [next(batches).tolist() for _ in range(count)]


def test_batches_follow_from_the_generator():
    one, again, other = (take(endless_batches(range(10), 4, generator(seed)), 6)
                         for seed in (1, 1, 2))
    assert one == again != other
    assert one[0] + one[1] != one[2] + one[3], "the second pass repeats the first"


def test_a_pass_visits_an_item_once():
    items = Landscapes(16, 9)
    batches = endless_batches(items, 3, generator(0))
    seen = torch.cat([next(batches).image for _ in range(3)])
    assert_close(seen.sum(0), torch.stack([item.image for item in items]).sum(0))
    batch = next(batches)
    assert (batch.image.shape, batch.label.shape) == ((3, 3, 16, 16), (3,))
    assert len(batch.caption) == 3


def test_worker_processes_give_the_same_batches(tmp_path):
    cached = cached_landscapes(16, 8, root=tmp_path)
    here, there = (endless_batches(cached, 4, generator(3), workers)
                   for workers in (0, 1))
    for _ in range(3):
        assert torch.equal(next(here).image, next(there).image)


@pytest.mark.parametrize("start", [0, 1, 2, 5, 7])
def test_batches_start_in_the_middle_without_reading_what_was_before(start):
    read = []

    class Numbers(torch.utils.data.Dataset):
        def __len__(self):
            return 10

        def __getitem__(self, index):
            read.append(index)
            return index

    expected = take(endless_batches(Numbers(), 4, generator(1)), 9)[start:]
    read.clear()
    late = endless_batches(Numbers(), 4, generator(1), start=start)
    assert take(late, len(expected)) == expected
    assert read == sum(expected, [])


def test_processes_share_each_batch():
    first, second = (
        take(endless_batches(range(9), 4, generator(1), start=1,
                             share=slice(rank, None, 2)), 5) for rank in (0, 1))
    whole = take(endless_batches(range(9), 4, generator(1), start=1), 5)
    for batch, one, two in zip(whole, first, second):
        assert len(one) == len(two) == 2
        assert sorted(one + two) == sorted(batch)


def test_fewer_items_than_a_batch():
    with pytest.raises(ValueError, match="3 items.*batch of 4"):
        endless_batches(Landscapes(16, 3), 4)
