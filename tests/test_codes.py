"""Codes are extracted once and read many times: equal to the tokenizer's, however many
processes extract them and whenever these are killed, and refused where they do not fit.
"""

import mmap
import os
import pickle
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import zlib
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from PIL import Image
from torch.multiprocessing.spawn import ProcessException, start_processes
from torch.utils.data import default_collate

from minigen import codes, files
from minigen.__main__ import main
from minigen.checkpoints import load, save_checkpoint
from minigen.codes import CodeDataset, CodeItem, extract_codes, images_done
from minigen.data import endless_batches, prepare
from minigen.files import read_json, write_json
from minigen.vq import VQConfig, VQModel

SIZE, BATCH = 16, 3  # of the images, and how many are encoded at a time
SHAPES = [(48, 48), (40, 64), (64, 20), (9, 7), (16, 16), (100, 33)]  # of photographs
FORK = get_context("fork")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--nproc_per_node", "2"]
COMMAND = ["extract-codes", "--data", "photos", "--tokenizer", "tokenizer",
           "--size", "16", "--batch-size", "3", "--out"]


@pytest.fixture(scope="module")
def workshop():
    """A folder with photographs of several kinds, and two tokenizers."""
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # disks may be slow
    path = Path(tempfile.mkdtemp(prefix="minigen-codes-", dir=shared))
    rng = np.random.default_rng(0)
    for n in range(23):
        name = f"{'train' if n < 20 else 'val'}/{('cats', 'dogs')[n % 3 == 0]}"
        (path / "photos" / name).mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        image = image.resize(SHAPES[n % 6][::-1], Image.Resampling.BICUBIC)
        file = path / "photos" / name / f"{n:02d}.{'jpg' if n % 4 < 2 else 'png'}"
        image.convert(("RGB", "L", "RGB", "P")[n % 4]).save(file)
    x = prepared(path, SIZE)
    for seed, name in enumerate(("tokenizer", "other")):
        torch.manual_seed(seed)
        model = VQModel(VQConfig(downsample=4, channels=8, z_channels=8,
                                 codebook_size=32, codebook_dim=4, kmeans=False))
        with torch.no_grad():  # codes among the vectors, so that all of them are used
            z = model.vectors(x).flatten(0, 2)
            model.quantizer.codebook.copy_(z[:: len(z) // 32][:32])
        save_checkpoint(model, path / name)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def folder(workshop, monkeypatch):
    """That folder as the current one, without the codes of other tests."""
    monkeypatch.chdir(workshop)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # this process is forked
    torch.set_num_threads(1)
    yield workshop
    for path in [*workshop.glob("*codes*"), workshop / "copy"]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def photographs(path, split="train"):
    """The photographs in their order: class after class, by name."""
    return sorted((path / "photos" / split).glob("*/*"))


def prepared(folder, side):
    """The photographs (20, 3, side, side)."""
    return torch.stack([prepare(Image.open(p), side) for p in photographs(folder)])


def extract(out="codes", **options):
    defaults = {"tokenizer": "tokenizer", "data": "photos", "size": SIZE,
                "batch_size": BATCH}
    return extract_codes(out=out, **defaults | options)


def visible(path):
    """The files of a folder, apart from its lock: what they hold, by their names."""
    return {file.name: file.read_bytes() for file in Path(path).iterdir()
            if file.name[0] != "."}


def assert_same_codes():
    """Those in `codes` are finished, and bit for bit those in `codes-1`."""
    found, expected = visible("codes"), visible("codes-1")
    assert set(found) == set(expected) == {"codes.npy", "labels.npy", "hashes.npy",
                                           "metadata.json"}
    assert [name for name in found if found[name] != expected[name]] == []


def in_fork(function):
    """The exit status of a fork of this process that calls `function`."""
    child = FORK.Process(target=function)
    child.start()
    child.join()
    return child.exitcode


def on_two(function):
    """Call `function` in two forks, which are a group of processes as of torchrun.

    ProcessException if one of them fails or is killed; the other one is ended then.
    """
    with tempfile.TemporaryDirectory() as store:
        start_processes(join_and_call, (f"file://{store}/group", function), nprocs=2,
                        start_method="fork")


def join_and_call(rank, store, function):
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "2",
                   "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    PartialState._reset_state()
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    function()
    dist.destroy_process_group()


# --- what is encoded


def encoded(crops):
    """The codes (N, T) of images (N, 3, H, W), in the batches of an extraction."""
    model = load("tokenizer")
    parts = [model.encode(part).flatten(1) for part in crops.split(BATCH)]
    return torch.cat(parts).numpy()


def test_codes_of_photographs_of_any_shape(folder):
    """Row n is the nth photograph, as it is and mirrored; a last batch may be short."""
    found, x = extract(), prepared(folder, SIZE)
    assert (found.codes.dtype, found.codes.shape) == (np.uint16, (20, 2, 16))
    assert (found.grid, found.classes, len(found)) == ((4, 4), ("cats", "dogs"), 40)
    assert len(np.unique(found.codes)) > 20, "or a wrong order would not show"
    expected = np.stack([encoded(x), encoded(x.flip(-1))], axis=1)
    assert np.array_equal(found.codes, expected)
    labels = [path.parent.name == "dogs" for path in photographs(folder)]
    assert found.labels.tolist() == labels
    for n, item in enumerate(found[n] for n in range(40)):
        assert isinstance(item, CodeItem)
        assert item.tokens.dtype == torch.int64
        assert item.tokens.tolist() == expected[n // 2, n % 2].tolist()
        assert type(item.label) is int
        assert item.label == labels[n // 2]


def test_ten_crops_are_llamagens(folder):
    """The corners and the center at int(1.1 * size), each also mirrored."""
    found, x = extract(size=32, ten_crop=True, crop_range=1.1), prepared(folder, 35)
    assert found.codes.shape == (20, 10, 64)
    crops = [y[..., top : top + 32, left : left + 32] for y in (x, x.flip(-1))
             for top, left in ((0, 0), (0, 3), (3, 0), (3, 3), (2, 2))]
    for n, crop in enumerate(crops):
        same = (found.codes[:, n] == encoded(crop)).mean(axis=1)
        assert (same > 0.95).all(), codes.TEN_CROPS[n]  # but for rounding


def test_metadata_and_choices(folder):
    plain = extract("codes-a", flip=False, split="val")
    about = plain.metadata
    assert about == read_json("codes-a/metadata.json") == {
        "tokenizer": "tokenizer", "fingerprint": load("tokenizer").fingerprint(),
        "codebook_size": 32, "grid": [4, 4], "size": 16, "data": "photos",
        "split": "val", "seed": 0, "images": 3, "dataset_hash": about["dataset_hash"],
        "variants": ["plain"], "crop_range": 1.0, "classes": ["cats", "dogs"],
        "complete": True, "versions": about["versions"]}
    landscapes = extract("codes-b", data="landscapes", length=5)
    assert landscapes.codes.shape == (5, 2, 16)
    assert "waterfall" in landscapes.classes
    few, others = (extract(f"codes-{seed}", length=4, seed=seed) for seed in (1, 2))
    assert len(few) == 8
    assert not np.array_equal(few.codes, others.codes)


def test_an_unreadable_image(folder):
    plain, broken = extract("codes-a", split="val"), Path("photos/val/cats/broken.png")
    broken.write_bytes(b"no image")
    try:
        with pytest.raises(ValueError, match="broken.png cannot be read as an image"):
            extract("codes-b", split="val")
        with pytest.warns(UserWarning, match="left out 1 of 4"):
            rest = extract("codes-c", split="val", on_error="skip")
    finally:
        broken.unlink()
    assert np.array_equal(rest.codes, plain.codes)


def test_the_batch_size_changes_nothing_but_rounding(folder):
    one, large = extract("codes-1"), extract("codes-64", batch_size=64)
    assert one.metadata == large.metadata
    assert np.array_equal(one.labels, large.labels)
    assert (one.codes == large.codes).mean() > 0.99


# --- how codes are read


def test_reading_maps_the_file(folder):
    """400 MB are opened, read here and there, and handed on without being in memory."""
    extract()
    images, memory = 400_000, psutil.Process().memory_info
    about = read_json("codes/metadata.json") | {"images": images, "grid": [16, 16]}
    write_json("codes/metadata.json", about)

    def sparse(name, kind, shape):  # a file with holes, which takes no space
        return np.lib.format.open_memmap(f"codes/{name}.npy", "w+", kind, shape)

    sparse("codes", np.uint16, (images, 2, 256))[123_456, 1, 7] = 31
    sparse("labels", np.int64, (images,))
    before = memory().rss
    found = CodeDataset("codes")
    assert isinstance(found.codes, np.memmap)
    assert not found.codes.flags.writeable
    assert found[246_913].tokens.tolist() == [0] * 7 + [31] + [0] * 248
    for n in random.Random(0).sample(range(len(found)), 300):
        found[n]
    assert memory().rss - before < 50e6
    again = pickle.loads(pickle.dumps(found))
    assert len(pickle.dumps(found)) < 200
    assert again[246_913].tokens[7] == 31
    assert isinstance(again.codes.base, mmap.mmap)
    for index in (len(found), -1):
        with pytest.raises(IndexError, match=f"item {index} of a data set of 800000"):
            found[index]


def test_batches_in_any_number_of_workers(folder):
    found, streams = extract(), []
    for workers in (0, 2):
        generator = torch.Generator().manual_seed(0)
        batches = endless_batches(found, 8, generator, workers)
        streams.append([next(batches) for _ in range(5)])  # one pass
    assert all(isinstance(batch, CodeItem) for batch in streams[1])
    first, second = (torch.cat([x.tokens for x in stream]) for stream in streams)
    assert torch.equal(first, second)
    items = default_collate([found[n] for n in range(40)])
    assert torch.equal(first.sort(0).values, items.tokens.sort(0).values)


# --- several processes, and kills: placed by batches and lines of code, not by a clock


@pytest.fixture
def logged(monkeypatch, folder):
    """What reads and clears the notes that `encode` takes: (rank, hash of the images).

    The clock stands still, so that every batch is marked as done at once.
    """
    encode, notes = VQModel.encode, folder / "codes-notes"

    def noting(self, images):
        found = zlib.crc32(images.contiguous().numpy().tobytes())
        with open(notes, "a") as file:
            file.write(f"{os.environ.get('RANK', 0)} {found}\n")
        return encode(self, images)

    def take():
        lines = notes.read_text().splitlines() if notes.exists() else []
        notes.unlink(missing_ok=True)
        return [tuple(map(int, line.split())) for line in lines]

    monkeypatch.setattr(VQModel, "encode", noting)
    monkeypatch.setattr(codes, "time", SimpleNamespace(monotonic=lambda: 0.0))
    return take


@pytest.fixture
def undisturbed(logged):
    """The codes of one process, in `codes-1`; the hashes of what it encodes."""
    extract("codes-1")
    return [found for _, found in logged()]


def at_call(monkeypatch, calls, action, rank=0):
    """`encode` first calls `action` from its nth call on in a process of that rank."""
    encode, made = VQModel.encode, []

    def acting(self, images):
        made.append(1)
        if len(made) >= calls and int(os.environ.get("RANK", 0)) == rank:
            action()
        return encode(self, images)

    monkeypatch.setattr(VQModel, "encode", acting)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def fail():
    raise MemoryError


def marked():
    """The batches of which all images are marked as done."""
    file = Path("codes/hashes.npy")
    done = np.load(file) if file.exists() else np.zeros(20)
    return {n for n in range(7) if done[BATCH * n : BATCH * (n + 1)].all()}


def lines_of(function, last=0):
    """How many lines of the code that writes files a fork executes in `function`.

    With `last`, the fork's exit status: it is killed before that line.
    """
    count = FORK.Value("q", lock=False)

    def tracer(frame, event, _):
        if frame.f_code.co_filename in (codes.__file__, files.__file__):
            count.value += event == "line"
            if event == "line" and count.value == last:
                kill()
            return tracer

    def traced():
        sys.settrace(tracer)
        function()

    status = in_fork(traced)
    return status if last else count.value


def test_two_processes_share_the_work(logged, undisturbed):
    assert len(set(undisturbed)) == len(undisturbed) == 2 * 7
    on_two(extract)
    ranks, found = zip(*sorted(logged()), strict=True)
    assert ranks == (0,) * 2 * 4 + (1,) * 2 * 3
    assert sorted(found) == sorted(undisturbed)
    assert_same_codes()


@pytest.mark.parametrize("first", [5, 15, 25, 35, 45, 80, 160])  # the first line
def test_killed_again_and_again(logged, undisturbed, first):
    """Nothing that is marked is encoded again, and at most one batch is lost."""
    lines, random_lines = lines_of(lambda: extract("codes-2")), random.Random(first)
    assert logged()
    assert lines > 300
    last, status = first, None
    while status != 0:
        before = marked()
        status = lines_of(extract, last)
        assert status in (0, -signal.SIGKILL)
        encoded = {undisturbed.index(found) // 2 for _, found in logged()}
        assert not before & encoded
        if images_done(Path("codes")) < 20:
            assert before <= marked()
            assert len(encoded - marked()) <= 1
        last = random_lines.randint(1, lines)
    assert last != first, "killed at least once"
    assert_same_codes()


@pytest.mark.parametrize(("end", "rank", "calls"), [
    (kill, 0, 1), (kill, 0, 4), (kill, 1, 1), (kill, 1, 4), (fail, 0, 4), (fail, 1, 3)])
def test_a_process_that_ends(logged, undisturbed, monkeypatch, end, rank, calls):
    """The other one ends, too, and the same command resumes."""
    with monkeypatch.context() as patch:
        at_call(patch, calls, end, rank)
        with pytest.raises(ProcessException):
            on_two(extract)
    before = marked()
    own = range(rank, 7, 2)  # the batches of the process that ended
    assert before & {*own} == {*own[: (calls - 1) // 2]}
    logged()
    on_two(extract)
    again = {undisturbed.index(found) // 2 for _, found in logged()}
    assert again == set(range(7)) - before
    assert_same_codes()


def test_one_extraction_at_a_time(folder, monkeypatch):
    """A second one is refused while the first one runs, and disturbs nothing."""
    extract("codes-1")
    begun, go_on = FORK.Event(), FORK.Event()
    with monkeypatch.context() as patch:
        at_call(patch, 4, lambda: begun.set() or go_on.wait())
        child = FORK.Process(target=extract)
        child.start()
    assert begun.wait(300)
    message = rf"codes is in use by process {child.pid} on {socket.gethostname()}"
    with pytest.raises(BlockingIOError, match=message):
        extract()
    go_on.set()
    child.join()
    assert_same_codes()


KILLER = """
import os, signal, sys
from minigen.__main__ import main
from minigen.vq import VQModel

encode, calls = VQModel.encode, []

def encode_or_kill(self, images):
    calls.append(1)
    if len(calls) == 3 and os.environ["RANK"] == "1":
        os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(self, images)

VQModel.encode = encode_or_kill
main(sys.argv[1:])
"""


def test_the_command(folder, capsys):
    """Under torchrun, which is killed with one of its processes, and repeated."""
    assert main([*COMMAND, "codes-1"]) == 0
    about = "20 images, 2 variants of each, 16 tokens each, 640 in all; "
    printed, errors = capsys.readouterr()
    assert not errors, "TQDM_DISABLE is set"
    assert printed.startswith(f"codes-1: {about}")
    assert printed.endswith(" images/s\n")
    Path("codes-killer.py").write_text(KILLER)
    killed, done = (  # each returns when the last process that may print has ended
        subprocess.run([*TORCHRUN, *what, *COMMAND, "codes"], capture_output=True,
                       text=True) for what in (["codes-killer.py"], ["-m", "minigen"]))
    assert killed.returncode == -signal.SIGKILL
    assert not killed.stdout
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"codes: {about}")
    assert done.stdout.count("images/s") == 1, "only the first process prints"
    assert_same_codes()
    assert main([*COMMAND, "codes"]) == 0
    assert capsys.readouterr().out == f"codes: {about}all there already\n"
    assert main([*COMMAND, "codes", "--size", "32"]) == 2
    assert "minigen: codes was made with other settings" in capsys.readouterr().err


# --- what is refused


def stop(monkeypatch):
    """Codes of two batches, that is of 6 images."""
    with monkeypatch.context() as patch:
        at_call(patch, 5, fail)
        with pytest.raises(MemoryError):
            extract()
    assert images_done(Path("codes")) == 6, "marked on the way out"


def test_finished_codes_cost_nothing(folder, monkeypatch):
    found = extract()
    shutil.copytree("tokenizer", "copy")
    monkeypatch.setattr(VQModel, "encode", None)
    for options in ({}, {"batch_size": 7}, {"tokenizer": folder / "copy"},
                    {"crop_range": 2.0}):  # nothing is cropped
        again = extract(**options)
        assert again.metadata == found.metadata
        assert np.array_equal(again.codes, found.codes)


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(("options", "message"), [
    ({"tokenizer": "other"}, "tokenizer = .*, here 'other'; fingerprint = .*, here '"),
    ({"data": "landscapes", "length": 20},
     "data = 'photos', here 'landscapes'; dataset_hash = "),
    ({"size": 32}, r"grid = \[4, 4\], here \[8, 8\]; size = 16, here 32\."),
    ({"flip": False}, r"variants = \['plain', 'flipped'\], here \['plain'\]\."),
    ({"ten_crop": True}, "crop_range = 1.0, here 1.1; variants = "),
    ({"split": "val"}, "split = 'train', here 'val'; images = 20, here 3"),
    ({"length": 19}, "images = 20, here 19"),
    ({"seed": 1}, "seed = 0, here 1"),
])
def test_other_settings_are_refused(folder, monkeypatch, options, message, finished):
    extract() if finished else stop(monkeypatch)
    before = visible("codes")
    message = f"^codes was made with other settings or images: .*{message}"
    with pytest.raises(ValueError, match=message):
        extract(**options)
    assert visible("codes") == before


def test_other_images_are_refused(folder, monkeypatch):
    """A photograph that came, went, or changed its name or class would move rows."""
    stop(monkeypatch)
    photos = folder / "photos/train"
    shutil.copy(photos / "cats/01.jpg", photos / "cats/99.jpg")
    with pytest.raises(ValueError, match="images = 20, here 21; dataset_hash = "):
        extract()
    os.remove(photos / "cats/99.jpg")
    for new in ("cats/98.jpg", "dogs/01.jpg"):
        (photos / "cats/01.jpg").rename(photos / new)
        with pytest.raises(ValueError, match="settings or images: dataset_hash = "):
            extract()
        (photos / new).rename(photos / "cats/01.jpg")
    assert extract(batch_size=4).metadata["complete"]


@pytest.mark.parametrize("complete", [False, True])
def test_images_that_change_under_their_names_are_refused(complete, folder,
                                                          monkeypatch):
    """Half of the codes would be those of other images."""
    if complete:
        extract()
    else:
        stop(monkeypatch)
    before, file = visible("codes"), folder / "photos/train/cats/01.jpg"
    old, other = file.read_bytes(), folder / "photos/train/cats/04.jpg"
    try:
        file.write_bytes(other.read_bytes())
        with pytest.raises(ValueError, match="image 0 has changed since its codes"):
            extract()
    finally:
        file.write_bytes(old)
    assert visible("codes") == before
    assert extract().metadata["complete"]


def test_codes_without_hashes_can_be_read(folder):
    """They are those of an older version."""
    extract()
    os.remove("codes/hashes.npy")
    assert len(extract()) == 40


def test_incomplete_codes_are_refused(folder, monkeypatch):
    stop(monkeypatch)
    message = "codes holds the codes of 6 of 20 images: finish it by `python -m minigen"
    with pytest.raises(ValueError, match=message):
        CodeDataset("codes")


@pytest.mark.parametrize("name", ["codes", "labels", "hashes"])
def test_a_file_that_is_cut_short_is_noticed(name, folder, monkeypatch):
    """NumPy would fill it with zeros, and the codes would be those of nothing."""
    stop(monkeypatch)
    file = folder / f"codes/{name}.npy"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{name}.npy is damaged"):
        extract()


def test_codes_beyond_the_codebook_are_refused(folder):
    extract()
    codes = np.load(folder / "codes/codes.npy", mmap_mode="r+")
    codes[1, 0, 2] = 32
    codes.flush()
    found = CodeDataset("codes")
    assert found[0].tokens.max() < 32
    with pytest.raises(ValueError, match="image 1 has the code 32, expected 0 to 31"):
        found[2]


def test_codes_of_another_tokenizer_are_refused(folder):
    found, one, other = extract(), load("tokenizer"), load("other")
    assert len(CodeDataset("codes", one)) == len(found)
    message = (rf"expected {one.fingerprint()} \(tokenizer, 32 codes\), found "
               rf"{other.fingerprint()} \(32\)")
    with pytest.raises(ValueError, match=message):
        CodeDataset("codes", other)


def damaged(change):
    def make():
        extract()
        change()
        CodeDataset("codes")
    return make


def replaced(name, shape, kind):
    return damaged(lambda: np.save(f"codes/{name}.npy", np.zeros(shape, kind)))


def of_something_else():
    write_json("codes/metadata.json", {"name": "x"})
    extract()


@pytest.mark.parametrize(("make", "message"), [
    (lambda: extract(size=18), "multiples of 4, found 18 x 18"),
    (lambda: extract(batch_size=0), "batch_size must be at least 1, found 0"),
    (lambda: extract(ten_crop=True, crop_range=0.9), "at least 1, found 0.9"),
    (lambda: extract(ten_crop=True, crop_range=float("nan")), "at least 1, found nan"),
    (lambda: extract(tokenizer="photos"), "photos is no checkpoint"),
    (lambda: extract(tokenizer="vq_ds16_c2i.pt"), "there is no file vq_ds16_c2i.pt"),
    (lambda: extract(data="nowhere"), "there is no folder nowhere"),
    (lambda: extract(out="photos"), "photos holds something other than codes"),
    (lambda: extract(out="photos/train/cats/01.jpg"), "01.jpg"),
    (lambda: CodeDataset("photos"), "photos holds no codes: .*json, found none"),
    (of_something_else, "codes holds no codes: .* metadata.json, found another"),
    (damaged(lambda: os.truncate("codes/codes.npy", 900)), "greater than file size"),
    (replaced("codes", (20, 2, 9), np.uint16), r"\(20, 2, 16\) .*\(20, 2, 9\) codes"),
    (replaced("codes", (20, 2, 16), np.int64), "is damaged: .* codes in int64"),
    (replaced("labels", 19, np.int64), "is damaged: .* and 19 labels"),
])
def test_what_is_refused(folder, make, message):
    with pytest.raises((ValueError, OSError), match=message):
        make()


def test_sixteen_bits(folder, monkeypatch):
    monkeypatch.setattr(VQModel, "codebook_size", 65_537)
    with pytest.raises(ValueError, match="at most 65,536 codes, found 65,537"):
        extract()
    assert not Path("codes").exists()
    monkeypatch.setattr(VQModel, "codebook_size", 65_536)
    monkeypatch.setattr(VQModel, "encode",
                        lambda self, images: torch.full((len(images), 4, 4), 65_535))
    assert extract()[0].tokens.unique().tolist() == [65_535]


def test_a_full_disk_is_an_error_at_the_start(folder):
    """Here no file may grow so far. Nothing is left behind."""
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        message = "codes in codes need 0.0 MB, which could not be reserved: "
        with pytest.raises(OSError, match=message):
            extract()

    assert in_fork(limited) == 0
    assert not visible("codes")
    about = {"images": 100_000, "variants": ["plain"], "grid": [4, 4]}
    codes.create_files(Path("codes"), about)
    for name in ("codes.npy", "labels.npy"):
        file = os.stat(f"codes/{name}")
        assert 512 * file.st_blocks >= file.st_size >= 800_000, "its space is reserved"
