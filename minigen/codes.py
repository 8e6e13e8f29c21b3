import hashlib
import json
import math
import os
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.spawn import ProcessException, start_processes
from torch.utils.data import Dataset
from torchvision.transforms import functional
from tqdm import tqdm

import minigen
from minigen.data import CachedLandscapes, load_dataset
from minigen.training import differences, pick_device, write_json, written_whole
from minigen.vq import VQModel, load_tokenizer


PLACES = ("top left", "top right", "bottom left", "bottom right", "centre")
PLAIN, FLIPPED, TEN_CROPS = ["plain"], ["plain", "flipped"], [*PLACES, *(f"flipped, {place}" for place in PLACES)]


def variants(images: Tensor, size: int, names: list[str]) -> Iterator[Tensor]:
    """What is encoded of images (B, 3, H, W): they and their mirror images, or crops of `size` pixels a side."""
    if names == TEN_CROPS:
        yield from functional.ten_crop(images, size)
    else:
        yield images
        if names == FLIPPED:
            yield images.flip(-1)


class CodeItem(NamedTuple):
    """The codes of one picture. torch's `default_collate` makes a batched `CodeItem` of many."""

    tokens: Tensor  # (T,) int64, row by row
    label: int  # number of the class


class CodeDataset(Dataset):
    """The codes in a folder that `extract_codes` wrote; they stay on disk until asked for.

    Item n is variant n % V of image n // V. ValueError where the codes are not all there, or where a `tokenizer` is given
    that is not the one that made them.
    """

    def __init__(self, folder: str | Path, tokenizer: VQModel | None = None):
        self.folder, self.card = Path(folder), read_card(Path(folder))
        if not self.card["complete"]:
            raise ValueError(f"{folder} holds the codes of {images_done(self.folder)} of {self.card['images']} images: "
                             "finish by `python -m minigen extract-codes`, with the settings it was started with")
        self.codes = np.load(self.folder / "codes.npy", mmap_mode="r")        # (N, V, T) uint16
        self.labels = np.load(self.folder / "labels.npy", mmap_mode="r")      # (N,) int64
        self.grid, self.classes = tuple(self.card["grid"]), tuple(self.card["classes"])
        expected, found = code_shape(self.card), self.codes.shape
        if found != expected or self.codes.dtype != np.uint16 or self.labels.shape != expected[:1]:
            raise ValueError(f"{folder} is damaged: its card says {expected} codes in uint16, found {found} in "
                             f"{self.codes.dtype} and {self.labels.size} labels; extract them again")
        if tokenizer is not None and tokenizer.fingerprint() != self.card["fingerprint"]:
            raise ValueError(f"the codes in {folder} were made by the tokenizer {self.card['fingerprint']} "
                             f"({self.card['tokenizer']}, {self.card['codes']} codes), found {tokenizer.fingerprint()} "
                             f"({tokenizer.codes} codes): take the former, or extract the codes of the latter")

    def __reduce__(self):
        return type(self), (self.folder,)                  # a worker process maps the files again, nothing is copied

    def __len__(self):
        return self.codes.shape[0] * self.codes.shape[1]

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of a data set of {len(self)}")
        image, variant = divmod(index, self.codes.shape[1])
        return CodeItem(torch.from_numpy(self.codes[image, variant].astype(np.int64)), int(self.labels[image]))


def read_card(folder: Path) -> dict:
    """What a folder of codes says of itself; ValueError where it is none."""
    file = folder / "card.json"
    card = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if "fingerprint" not in card:
        raise ValueError(f"{folder} holds no codes: expected a folder that `python -m minigen extract-codes` wrote, with "
                         f"the tokenizer's fingerprint in its card.json, found {'another' if card else 'no'} card.json")
    return card


def code_shape(card: dict) -> tuple[int, int, int]:
    """N, V and T: images, variants and tokens of the codes that a card describes."""
    return card["images"], len(card["variants"]), math.prod(card["grid"])


def images_done(folder: Path) -> int:
    """Of how many images a folder holds the codes; 0 where there is no such folder yet."""
    if (folder / "done.npy").exists():
        return int(np.load(folder / "done.npy").sum())
    return read_card(folder)["images"] if (folder / "card.json").exists() else 0


def listing(dataset: Dataset) -> str:
    """Sixteen letters that differ where the names of the pictures, their order or their classes do."""
    if isinstance(dataset, CachedLandscapes):
        lines = [dataset.folder.name]                      # which says all that they depend on
    else:
        names = [name for *_, name in dataset.records]
        root = len(os.path.dirname(os.path.commonprefix(names)))              # the folder may move
        lines = [f"{label} {name[root:]}" for _, label, _, name in dataset.records]
    return hashlib.sha256("\n".join([*dataset.classes, *lines]).encode(errors="surrogateescape")).hexdigest()[:16]


def create_files(folder: Path, card: dict) -> None:
    """A folder for the codes that `card` describes, with none in it yet; whole or not at all.

    The disk space is taken now: on a disk that is full, writing through a memory map would kill the process.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} holds something else than codes: expected a new or empty folder")
    N, V, T = code_shape(card)
    try:
        with written_whole(folder.absolute()) as temporary:
            for name, kind, shape in (("codes", np.uint16, (N, V, T)), ("labels", np.int64, (N,)), ("done", np.uint8, (N,))):
                file = temporary / f"{name}.npy"
                np.lib.format.open_memmap(file, "w+", kind, shape)
                if hasattr(os, "posix_fallocate"):
                    with open(file, "r+b") as opened:
                        os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
            write_json(temporary / "card.json", card)
    except OSError as error:
        raise OSError(f"{folder} could not be made, for which {2e-6 * N * V * T:,.1f} MB are needed: {error}") from error


def check_card(folder: Path, card: dict) -> dict:
    """The card in `folder`; ValueError, naming the fields, where it is of other codes than `card`."""
    saved = read_card(folder)
    ignored = {"complete", "versions", "classes"}          # classes are in the listing
    if saved["fingerprint"] == card["fingerprint"]:
        ignored.add("tokenizer")                           # the same one in another place
    pair = ({name: value for name, value in one.items() if name not in ignored} for one in (saved, card))
    if found := differences(*pair):
        raise ValueError(f"{folder} was made with other settings or of other pictures: {'; '.join(found)}. "
                         "Give those that it was started with, or another folder")
    return saved


def encode_batches(folder: Path, card: dict, tokenizer: VQModel, dataset: Dataset, starts: list[int],
                   batch_size: int) -> Iterator[int]:
    """Encode the batches of images that begin at `starts`, and yield after each how many images it had.

    Each image has its own place in the files, and is marked as done once its codes are on the disk: whenever this is
    killed, what is not marked is done again, into the same place. Waiting for the disk takes a twentieth of the time.
    """
    codes, labels, done = (np.load(folder / f"{name}.npy", mmap_mode="r+") for name in ("codes", "labels", "done"))
    written, due = [], 0.0

    def mark() -> float:
        begun = time.monotonic()
        codes.flush()
        labels.flush()
        while written:
            done[written.pop()] = 1
        return time.monotonic() + 19 * (time.monotonic() - begun)

    try:
        for start in starts:
            rows = slice(start, min(start + batch_size, len(dataset)))
            items = [dataset[n] for n in range(rows.start, rows.stop)]
            images = torch.stack([item.image for item in items])                               # (B, 3, H, W)
            tokens = [tokenizer.encode(x).flatten(1).cpu() for x in variants(images, card["size"], card["variants"])]
            codes[rows] = torch.stack(tokens, dim=1).numpy()                                   # (B, V, T)
            labels[rows] = [item.label for item in items]
            written.append(rows)
            if time.monotonic() >= due:
                due = mark()
            yield len(items)
    finally:
        mark()


def work(number: int, folder: Path, card: dict, dataset: Dataset, shares: list[list[int]], batch_size: int,
         threads: int) -> None:
    """What process `number` does: its share of the batches."""
    torch.set_num_threads(threads)
    device = pick_device()
    if device.type == "cuda":
        device = torch.device("cuda", number % torch.cuda.device_count())
    tokenizer = load_tokenizer(card["tokenizer"]).to(device)
    if tokenizer.fingerprint() != card["fingerprint"]:
        raise ValueError(f"the tokenizer {card['tokenizer']} was changed meanwhile")
    for _ in encode_batches(folder, card, tokenizer, dataset, shares[number], batch_size):
        pass


def encode_on_processes(folder: Path, card: dict, dataset: Dataset, starts: list[int], batch_size: int,
                        processes: int) -> Iterator[int]:
    """The same on several processes, each with its share of the batches; yields when some of them are marked.

    Raises ChildProcessError where a process ends before its work is done; the others are ended then, too.
    """
    shares = [starts[n::processes] for n in range(min(processes, len(starts)))]
    arguments = (folder, card, dataset, shares, batch_size, max(1, torch.get_num_threads() // len(shares)))
    before, finished = images_done(folder), False
    context = start_processes(work, arguments, len(shares), join=False, daemon=True)
    try:
        while not finished:
            finished, now = context.join(timeout=0.2), images_done(folder)
            if now > before:
                yield now - before
                before = now
    except ProcessException as error:
        name = getattr(error, "signal_name", None)
        reason = f"ended by {name}" if name else str(error).strip().splitlines()[-1]
        raise ChildProcessError(f"one of {len(shares)} processes did not finish ({reason}); {images_done(folder)} of "
                                f"{card['images']} images are in {folder}; the same command goes on from there") from None
    finally:
        for process in context.processes:
            process.terminate()


def extract_codes(tokenizer: str | Path, data: str | Path, out: str | Path, *, size: int, split: str = "train",
                  length: int | None = None, seed: int = 0, flip: bool = True, ten_crop: bool = False,
                  crop_range: float = 1.1, batch_size: int = 32, processes: int = 1, on_error: str = "raise") -> CodeDataset:
    """Encode a data set once, into the folder `out`, to train on the codes many times.

    `tokenizer` is what `load_tokenizer` takes, `data`, `split`, `length`, `seed` and `on_error` what `load_dataset` does.
    A picture is encoded as it is and, with `flip`, mirrored; with `ten_crop` instead, as LlamaGen does, it is prepared at
    `crop_range` times the size, and its corners and its middle are, each as it is and mirrored. `batch_size` pictures are
    encoded at a time, on each of `processes` processes. The same call goes on where it was stopped, and returns at once
    when all is there. ValueError where `out` holds other codes, naming what differs.
    """
    if batch_size < 1 or processes < 1:
        raise ValueError(f"batch_size and processes must be at least 1, found {batch_size} and {processes}")
    if ten_crop and not 1 <= crop_range < math.inf:
        raise ValueError(f"crops are cut out of a larger picture: crop_range must be at least 1, found {crop_range}")
    out, model = Path(out), load_tokenizer(tokenizer)
    if model.codes > 2**16:
        raise ValueError(f"codes are stored in 16 bits: expected a tokenizer of at most 65,536 codes, found {model.codes:,}")
    grid, crop_range = model.grid(size, size), float(crop_range) if ten_crop else 1.0
    dataset = load_dataset(data, int(size * crop_range), split, length, seed, on_error)
    card = {
        "tokenizer": str(tokenizer), "fingerprint": model.fingerprint(), "codes": model.codes, "grid": list(grid),
        "size": size, "data": str(data), "split": split, "seed": seed, "images": len(dataset), "pictures": listing(dataset),
        "variants": TEN_CROPS if ten_crop else FLIPPED if flip else PLAIN, "crop_range": crop_range,
        "classes": list(dataset.classes), "complete": False,
        "versions": {"minigen": minigen.__version__, "torch": torch.__version__, "pillow": version("pillow")},
    }
    if not (out / "card.json").exists():
        create_files(out, card)
    saved = check_card(out, card)
    if not saved["complete"]:
        done = np.load(out / "done.npy")
        starts = [n for n in range(0, len(done), batch_size) if not done[n : n + batch_size].all()]
        if processes == 1 or len(starts) < 2:
            counts = encode_batches(out, card, model.to(pick_device()), dataset, starts, batch_size)
        else:
            counts = encode_on_processes(out, card, dataset, starts, batch_size, processes)
        with tqdm(total=len(done), initial=int(done.sum()), desc="extracting codes", unit="image") as bar:
            for count in counts:
                bar.update(count)
        write_json(out / "card.json", saved | {"complete": True})
    (out / "done.npy").unlink(missing_ok=True)
    return CodeDataset(out)
