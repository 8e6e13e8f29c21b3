"""Codes are extracted once and read many times: equal to the tokenizer's, killed at any moment, refused where they do not fit."""

import functools
import json
import mmap
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zlib
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from torch.multiprocessing.spawn import start_processes
from torch.utils.data import default_collate

from minigen import codes, training
from minigen.__main__ import main
from minigen.codes import CodeDataset, CodeItem, create_files, extract_codes, images_done, load_tokenizer
from minigen.data import endless_batches, prepare
from minigen.training import save_checkpoint
from minigen.vq import VQConfig, VQModel

SIZE, BATCH = 16, 3  # of the pictures, and how many are encoded at a time
SHAPES = [(48, 48), (40, 64), (64, 20), (9, 7), (16, 16), (100, 33)]  # of the photographs


@pytest.fixture(scope="module")
def folder():
    """A folder with photographs of several kinds, and tokenizers; in memory where there is such a place, as disks may be slow."""
    path = Path(tempfile.mkdtemp(prefix="minigen-codes-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    rng = np.random.default_rng(0)
    for n in range(23):
        label, split = ("cats", "dogs")[n % 3 == 0], "train" if n < 20 else "val"
        (path / "photos" / split / label).mkdir(parents=True, exist_ok=True)
        height, width = SHAPES[n % len(SHAPES)]
        image = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
        image = image.convert(("RGB", "L", "RGB", "P")[n % 4])
        image.save(path / "photos" / split / label / f"{n:02d}.{'jpg' if n % 4 < 2 else 'png'}")
    images = torch.stack([prepare(Image.open(file), 32) for file in files(path / "photos")])
    for seed, name in enumerate(("tokenizer", "other")):
        torch.manual_seed(seed)
        model = VQModel(VQConfig(downsample=4, channels=8, hidden=8, codes=32, dim=4))
        model.train()(images)  # lays the codes where the vectors are, so that all of them are used
        save_checkpoint(model, path / name)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def place(folder, monkeypatch):
    """That folder as the current one, without the codes of other tests."""
    monkeypatch.chdir(folder)
    yield folder
    for path in [*folder.glob("*codes*"), *folder.glob(".writing-*"), folder / "copy"]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@pytest.fixture
def forks(monkeypatch):
    """Workers that are forks of this process, with its patches, and start at once."""
    monkeypatch.setattr(codes, "start_processes", functools.partial(start_processes, start_method="fork"))


def files(photos, split="train"):
    """The photographs in their order: class after class, by name."""
    return sorted((photos / split).glob("*/*"))


def extract(out="codes", **options):
    return extract_codes(**dict(tokenizer="tokenizer", data="photos", out=out, size=SIZE, batch_size=BATCH) | options)


def in_fork(function):
    """The exit status of a fork of this process that calls `function`."""
    child = os.fork()
    if not child:
        try:
            function()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def same(a, b):
    """Whether two folders hold the same, bit for bit."""
    assert {path.name for path in a.iterdir()} == {path.name for path in b.iterdir()} == {"codes.npy", "labels.npy", "card.json"}
    for path in a.iterdir():
        assert path.read_bytes() == (b / path.name).read_bytes(), path.name


# --- what is encoded


def test_codes_of_photographs_of_any_shape(place):
    """Row n is the nth photograph by class and name, as it is and mirrored; a last batch may be short."""
    found, model = extract(), load_tokenizer("tokenizer")
    paths = files(place / "photos")
    assert found.codes.shape == (20, 2, 16) and found.codes.dtype == np.uint16 and found.grid == (4, 4) and len(found) == 40
    assert found.classes == ("cats", "dogs") and found.labels.tolist() == [path.parent.name == "dogs" for path in paths]
    assert len(np.unique(found.codes)) > 20, "or a wrong order would not show"
    for start in range(0, 20, BATCH):
        images = torch.stack([prepare(Image.open(path), SIZE) for path in paths[start : start + BATCH]])
        for variant, x in enumerate((images, images.flip(-1))):
            expected = model.encode(x).flatten(1)
            for n, tokens in enumerate(expected, start):
                item = found[2 * n + variant]
                assert isinstance(item, CodeItem) and item.tokens.dtype == torch.int64 and torch.equal(item.tokens, tokens)
                assert item.label == found.labels[n] and type(item.label) is int
                assert np.array_equal(found.codes[n, variant], tokens.numpy())


def test_ten_crops_are_llamagens(place):
    """The picture at int(1.1 * size), its four corners and its middle, then those of the mirrored picture."""
    found, model = extract(size=32, ten_crop=True, crop_range=1.1), load_tokenizer("tokenizer")
    pictures = torch.stack([prepare(Image.open(path), 35) for path in files(place / "photos")])
    assert found.codes.shape == (20, 10, 64)
    for half, x in enumerate((pictures, pictures.flip(-1))):
        crops = [x[..., :32, :32], x[..., :32, 3:], x[..., 3:, :32], x[..., 3:, 3:], x[..., 2:34, 2:34]]
        for n, crop in enumerate(crops):
            tokens = torch.cat([model.encode(part) for part in crop.split(BATCH)]).flatten(1)
            assert np.array_equal(found.codes[:, 5 * half + n], tokens.numpy()), found.card["variants"][5 * half + n]


def test_card_and_choices(place):
    plain = extract("codes-a", flip=False, split="val")
    assert plain.card == {
        "tokenizer": "tokenizer", "fingerprint": load_tokenizer("tokenizer").fingerprint(), "codes": 32, "grid": [4, 4], "size": 16,
        "data": "photos", "split": "val", "seed": 0, "images": 3, "pictures": plain.card["pictures"], "variants": ["plain"],
        "crop_range": 1.0, "classes": ["cats", "dogs"], "complete": True, "versions": plain.card["versions"],
    }
    assert {path.name for path in (place / "codes-a").iterdir()} == {"codes.npy", "labels.npy", "card.json"}
    drawn = extract("codes-b", data="landscapes", length=5)
    assert drawn.codes.shape == (5, 2, 16) and "waterfall" in drawn.classes
    few, others = (extract(f"codes-{seed}", length=4, seed=seed) for seed in (1, 2))
    assert len(few) == 8 and not np.array_equal(few.codes, others.codes)
    (place / "photos/val/cats/broken.png").write_bytes(b"no picture")
    try:
        with pytest.raises(ValueError, match="broken.png cannot be read as an image"):
            extract("codes-c", split="val")
        with pytest.warns(UserWarning, match="left out 1 of 4"):
            assert np.array_equal(extract("codes-d", split="val", flip=False, on_error="skip").codes, plain.codes)
    finally:
        (place / "photos/val/cats/broken.png").unlink()


def test_batch_size_and_processes_change_nothing_but_rounding(place, forks):
    one, two, large = extract("codes-1"), extract("codes-2", processes=2), extract("codes-3", batch_size=64, processes=3)
    same(place / "codes-1", place / "codes-2")
    assert np.array_equal(one.labels, large.labels) and (one.codes == large.codes).mean() > 0.99
    assert extract("codes-4", processes=50, batch_size=19).card == two.card


# --- how they are read


def test_reading_maps_the_file(place):
    """An array of 400 MB is opened, read here and there, and handed to other processes without being in memory."""
    extract()
    images, memory = 400_000, psutil.Process().memory_info
    card = json.loads((place / "codes/card.json").read_text())
    (place / "codes/card.json").write_text(json.dumps(card | {"images": images, "grid": [16, 16]}))
    for name, kind, shape in (("codes", np.uint16, (images, 2, 256)), ("labels", np.int64, (images,))):
        array = np.lib.format.open_memmap(place / f"codes/{name}.npy", "w+", kind, shape)  # a file with holes, which takes no space
        if name == "codes":
            array[123_456, 1, 7] = 31
    del array
    before = memory().rss
    found = CodeDataset("codes")
    assert isinstance(found.codes, np.memmap) and isinstance(found.codes.base, mmap.mmap) and not found.codes.flags.writeable
    assert found[246_913].tokens.tolist() == [0] * 7 + [31] + [0] * 248
    for n in random.Random(0).sample(range(len(found)), 300):
        found[n]
    assert memory().rss - before < 50e6
    again = pickle.loads(pickle.dumps(found))
    assert len(pickle.dumps(found)) < 200 and again[246_913].tokens[7] == 31 and isinstance(again.codes.base, mmap.mmap)
    for index in (len(found), -1):
        with pytest.raises(IndexError, match=f"item {index} of a data set of 800000"):
            found[index]


def test_batches_in_any_number_of_workers(place):
    found = extract()
    first, second = ([next(batches) for _ in range(20)] for batches in
                     (endless_batches(found, 8, torch.Generator().manual_seed(0), workers) for workers in (0, 2)))
    for a, b in zip(first, second):
        assert isinstance(a, CodeItem) and a.tokens.shape == (8, 16) and a.label.shape == (8,)
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.label, b.label)
    items = default_collate([found[n] for n in range(40)])
    seen = torch.cat([batch.tokens for batch in first[:5]])  # one pass
    assert torch.equal(seen.sort(0).values, items.tokens.sort(0).values)


# --- killed at any moment


@pytest.fixture
def logged(monkeypatch, place):
    """Lets `encode` note what it is given, and the disk answer at once, so that each batch is marked. Returns what reads the notes."""
    encode, notes = VQModel.encode, place / "codes-notes"

    def noting(self, images):
        with open(notes, "a") as file:
            file.write(f"{zlib.crc32(images.contiguous().numpy().tobytes())}\n")
        return encode(self, images)

    def take():
        lines = notes.read_text().splitlines() if notes.exists() else []
        notes.unlink(missing_ok=True)
        return lines

    monkeypatch.setattr(VQModel, "encode", noting)
    monkeypatch.setattr(np.memmap, "flush", lambda array: None)
    return take


def lines_of(function, kill=0):
    """How many lines of those functions that write files a fork executes in `function`; killed before line `kill`: its exit status."""
    others = [training.write_json.__code__, training.press.__code__, training.written_whole.__wrapped__.__code__]
    reader, writer = os.pipe()
    count = 0

    def tracer(frame, event, _):
        nonlocal count
        if frame.f_code.co_filename != codes.__file__ and frame.f_code not in others:
            return None
        count += event == "line"
        if event == "line" and count == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        return tracer

    def traced():
        sys.settrace(tracer)
        function()
        sys.settrace(None)
        os.write(writer, str(count).encode())

    status = in_fork(traced)
    os.close(writer)
    with open(reader) as file:
        return status if kill else int(file.read())


def batches_of(done):
    """The batches of which all images are marked."""
    return {n for n in range(7) if done[BATCH * n : BATCH * (n + 1)].all()}


def test_killed_while_the_files_are_made(place):
    """There is no folder, or a whole one, and the next call goes on with it."""
    card = extract("codes-a").card | {"complete": False}
    lines = lines_of(lambda: create_files(place / "codes", card))
    shutil.rmtree("codes")
    made = 0
    for moment in [*sorted(random.Random(0).sample(range(1, lines - 5), 25)), *range(lines - 5, lines + 1)]:
        assert lines_of(lambda: create_files(place / "codes", card), moment) == -signal.SIGKILL
        if Path("codes").exists():
            made += 1
            assert {path.name for path in Path("codes").iterdir()} == {"codes.npy", "labels.npy", "done.npy", "card.json"}
            if made == 1:
                extract()
                same(place / "codes-a", place / "codes")
            shutil.rmtree("codes")
    assert 0 < made < 6 and lines > 50, "the last lines come after the renaming"
    extract()
    same(place / "codes-a", place / "codes")


@pytest.mark.parametrize("seed", range(3))
def test_killed_again_and_again(place, logged, seed):
    """The same as undisturbed, and what is marked is never encoded again."""
    extract("codes-a")
    order = logged()
    assert len(order) == len(set(order)) == 2 * 7
    lines, moments, kills, status = lines_of(lambda: extract("codes-b")), random.Random(seed), 0, None
    logged()
    while status != 0:
        before = np.load("codes/done.npy") if Path("codes/done.npy").exists() else np.zeros(20)
        status = lines_of(extract, moments.randint(1, lines))
        notes = logged()
        assert len(notes) == len(set(notes)) and not {order.index(note) // 2 for note in notes} & batches_of(before)
        if status:
            assert status == -signal.SIGKILL
            kills += 1
            marked = len(batches_of(np.load("codes/done.npy"))) if Path("codes/done.npy").exists() else 7 if notes else 0
            assert len(notes) <= 2 * (marked - len(batches_of(before)) + 1), "at most one batch is lost"
    assert kills > 0
    same(place / "codes-a", place / "codes")


def deadly(monkeypatch, calls, end):
    """From its nth call on in a process, `encode` ends that process, unless the file `codes-peace` is there."""
    encode, made = VQModel.encode, []

    def encode_or_die(self, images):
        made.append(1)
        if len(made) > calls and not Path("codes-peace").exists():
            end()
        return encode(self, images)

    monkeypatch.setattr(VQModel, "encode", encode_or_die)


def test_a_worker_that_is_killed(place, forks, logged, monkeypatch):
    extract("codes-a")
    order = logged()
    with monkeypatch.context() as patch:
        deadly(patch, 4, lambda: os.kill(os.getpid(), signal.SIGKILL))
        with pytest.raises(ChildProcessError, match=r"one of 2 processes .*SIGKILL.* of 20 images are in codes; the same command goes on"):
            extract(processes=2)
    done, array = np.load("codes/done.npy"), np.load("codes/codes.npy", mmap_mode="r+")
    assert 0 < done.sum() < 20
    row = int(done.argmax())
    kept, array[row] = array[row].copy(), 77  # stays, as what is marked is left alone
    logged()
    assert (extract(processes=2).codes[row] == 77).all()
    assert {order.index(note) // 2 for note in logged()} == set(range(7)) - batches_of(done)
    array[row] = kept
    same(place / "codes-a", place / "codes")


def test_a_worker_that_fails(place, forks, monkeypatch):
    def fail():
        raise MemoryError("no more memory")

    deadly(monkeypatch, 2, fail)
    with pytest.raises(ChildProcessError, match="did not finish .MemoryError: no more memory.; .* the same command goes on"):
        extract(processes=2)
    Path("codes-peace").touch()
    assert extract(processes=2).card["complete"]


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])  # the latter for what a shell starts in the background
def test_killed_with_its_workers(place, forks, monkeypatch, batches, handler):
    """Workers do not outlive the process that started them."""
    extract("codes-a")

    def kill_the_parent():
        Path("codes-worker").write_text(str(os.getpid()))
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)  # the death of the parent ends this

    def begin():
        signal.signal(signal.SIGINT, handler)
        extract(processes=2)

    with monkeypatch.context() as patch:
        deadly(patch, 2 * batches, kill_the_parent)
        assert in_fork(begin) == -signal.SIGKILL
    for _ in range(100):
        worker = int(Path("codes-worker").read_text())
        if not psutil.pid_exists(worker) or psutil.Process(worker).status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.1)
    else:
        raise AssertionError("the worker lives on")
    assert images_done(Path("codes")) < 20
    extract(processes=2)
    same(place / "codes-a", place / "codes")


def test_the_command(place, capsys):
    """Its workers are processes that start from nothing."""
    options = ["extract-codes", "--data", "photos", "--tokenizer", "tokenizer", "--size", "16", "--ten-crop", "--crop-range", "1.1",
               "--batch-size", "3"]
    assert main([*options, "--out", "codes/", "--processes", "2"]) == 0
    printed = capsys.readouterr().out.splitlines()[-1]
    assert printed.startswith("codes: 20 images, 10 variants of each, 16 tokens each, 3200 in all; ") and printed.endswith("images/s")
    assert main([*options, "--out", "codes-one"]) == 0
    same(place / "codes", place / "codes-one")
    capsys.readouterr()
    assert main([*options, "--out", "codes"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("; all there already")
    assert main([*options, "--out", "codes", "--size", "32"]) == 2
    assert "minigen: codes was made with other settings" in capsys.readouterr().err


# --- what is refused


def test_finished_codes_cost_nothing(place, monkeypatch):
    found = extract()
    shutil.copytree("tokenizer", "copy")
    monkeypatch.setattr(VQModel, "encode", None)
    for options in ({}, {"processes": 3}, {"batch_size": 7}, {"tokenizer": place / "copy"}, {"crop_range": 2.0}):
        again = extract(**options)  # a crop range does not matter where nothing is cropped
        assert again.card == found.card and np.array_equal(again.codes, found.codes)


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("options, message", [
    ({"tokenizer": "other"}, "tokenizer = 'tokenizer', here 'other'; fingerprint = '.*', here '"),
    ({"data": "landscapes", "length": 20}, "data = 'photos', here 'landscapes'; pictures = .*"),
    ({"size": 32}, r"grid = \[4, 4\], here \[8, 8\]; size = 16, here 32\."),
    ({"flip": False}, r"variants = \['plain', 'flipped'\], here \['plain'\]\."),
    ({"ten_crop": True}, "variants = .*; crop_range = 1.0, here 1.1"),
    ({"split": "val"}, "split = 'train', here 'val'; images = 20, here 3"),
    ({"length": 19}, "images = 20, here 19"),
    ({"seed": 1}, "seed = 0, here 1"),
])
def test_other_settings_are_refused(place, monkeypatch, options, message, finished):
    if finished:
        extract()
    else:
        stopped(monkeypatch)
    before = {path.name: path.read_bytes() for path in Path("codes").iterdir()}
    with pytest.raises(ValueError, match=f"^codes was made with other settings or of other pictures: .*{message}"):
        extract(**options)
    assert before == {path.name: path.read_bytes() for path in Path("codes").iterdir()}


def stopped(monkeypatch, calls=4):
    """Codes of which only some are there."""
    with monkeypatch.context() as patch:
        def fail():
            raise KeyboardInterrupt
        deadly(patch, calls, fail)
        with pytest.raises(KeyboardInterrupt):
            extract()


def test_other_pictures_are_refused(place, monkeypatch):
    """A photograph that came, went, or changed its name or class would move rows."""
    stopped(monkeypatch)
    assert images_done(Path("codes")) == 6, "what was encoded is marked, also on the way out"
    photos = place / "photos/train"
    shutil.copy(photos / "cats/01.jpg", photos / "cats/99.jpg")
    with pytest.raises(ValueError, match="images = 20, here 21; pictures = "):
        extract()
    os.remove(photos / "cats/99.jpg")
    for old, new in (("cats/01.jpg", "cats/98.jpg"), ("cats/01.jpg", "dogs/01.jpg")):
        (photos / old).rename(photos / new)
        with pytest.raises(ValueError, match="of other pictures: pictures = "):
            extract()
        (photos / new).rename(photos / old)
    assert extract(batch_size=4).card["complete"]


def test_incomplete_codes_are_refused(place, monkeypatch):
    stopped(monkeypatch)
    with pytest.raises(ValueError, match="codes holds the codes of 6 of 20 images: finish by `python -m minigen extract-codes`"):
        CodeDataset("codes")


def test_codes_of_another_tokenizer_are_refused(place):
    found, one, other = extract(), load_tokenizer("tokenizer"), load_tokenizer("other")
    assert len(CodeDataset("codes", one)) == len(found)
    with pytest.raises(ValueError, match=rf"made by the tokenizer {one.fingerprint()} \(tokenizer, 32 codes\), found {other.fingerprint()}"):
        CodeDataset("codes", other)


def damaged(change):
    def make():
        extract()
        change(Path("codes"))
        CodeDataset("codes")
    return make


def write(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize("make, message", [
    (lambda: extract(size=18), "a picture of 18 x 18 cannot be divided into squares of 4 pixels"),
    (lambda: extract(processes=0), "processes must be at least 1, found 3 and 0"),
    (lambda: extract(batch_size=0), "batch_size and processes must be at least 1"),
    (lambda: extract(ten_crop=True, crop_range=0.9), "crop_range must be at least 1, found 0.9"),
    (lambda: extract(ten_crop=True, crop_range=float("nan")), "crop_range must be at least 1, found nan"),
    (lambda: extract(tokenizer="photos"), "photos holds no config.json"),
    (lambda: extract(tokenizer="vq_ds16_c2i.pt"), "there is no file vq_ds16_c2i.pt"),
    (lambda: extract(data="nowhere"), "there is no folder nowhere"),
    (lambda: extract(out="photos"), "photos holds something else than codes: expected a new or empty folder"),
    (lambda: extract(out="photos/train/cats/01.jpg"), "01.jpg holds something else than codes"),
    (lambda: CodeDataset("photos"), "photos holds no codes: .* found no card.json"),
    (lambda: (write(Path("codes/card.json"), "{\"name\": \"x\"}"), extract()), "codes holds no codes: .* found another card.json"),
    (damaged(lambda path: os.truncate(path / "codes.npy", 900)), "mmap length is greater than file size"),
    (damaged(lambda path: np.save(path / "codes.npy", np.zeros((20, 2, 9), np.uint16))), r"is damaged: .*\(20, 2, 16\).*\(20, 2, 9\)"),
    (damaged(lambda path: np.save(path / "codes.npy", np.zeros((20, 2, 16), np.int64))), "is damaged: .* in int64"),
    (damaged(lambda path: np.save(path / "labels.npy", np.zeros(19, np.int64))), "is damaged: .* and 19 labels"),
])
def test_what_is_refused(place, make, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make()


def test_too_many_codes_for_sixteen_bits(place, monkeypatch):
    monkeypatch.setattr(VQModel, "codes", 65_537)
    with pytest.raises(ValueError, match="expected a tokenizer of at most 65,536 codes, found 65,537"):
        extract()
    assert not Path("codes").exists()
    monkeypatch.setattr(VQModel, "codes", 65_536)
    assert extract().card["codes"] == 65_536


def test_the_largest_code_is_kept(place, monkeypatch):
    monkeypatch.setattr(VQModel, "codes", 65_536)
    monkeypatch.setattr(VQModel, "encode", lambda self, images: torch.full((len(images), 4, 4), 65_535))
    assert extract()[0].tokens.unique().tolist() == [65_535]


def test_a_full_disk_is_an_error_at_the_start(place):
    """As no file may grow so far, here; nothing is left behind."""
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        with pytest.raises(OSError, match="codes could not be made, for which 0.0 MB are needed: "):
            extract()

    assert in_fork(limited) == 0
    assert not Path("codes").exists() and not list(place.glob(".writing*"))
