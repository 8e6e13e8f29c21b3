"""Write many generated images to one .npz file, as published evaluators read them."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from minigen.checkpoints import differences
from minigen.devices import join_processes, pick_device
from minigen.files import (
    atomic_rmtree,
    atomic_write,
    lock_folder,
    read_json,
    reserve,
    write_json,
)

BATCH = 50  # images drawn together from one seed, whatever the number of processes


def write_archive(
    path: Path, count: int, size: int, seed: int, settings: dict,
    draw: Callable[[Tensor, torch.Generator], Tensor],
) -> Path:
    """Draw `count` images into an .npz file: `arr_0`, (count, size, size, 3) uint8.

    `draw(numbers (B,), generator)` returns the images (B, 3, size, size) in [0, 1] with
    these numbers. Processes of torchrun share the work. Each batch of 50 has its own
    seed and a fixed position in a file beside `path`, so the images do not depend on
    the number of processes, and the same call continues after a kill. Returns `path`.
    ValueError if it would continue with other `settings`; FileExistsError if `path`
    exists.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists: choose another name, or remove it")
    device, parts = pick_device(), path.with_suffix(".parts")
    processes = join_processes(device)
    about = settings | {"count": count, "size": size, "seed": seed}
    is_main = processes.is_main_process
    with lock_folder(parts) if is_main else contextlib.nullcontext():
        if is_main:
            prepare(parts, about)
        processes.wait_for_everyone()  # until the files exist
        images, done = (np.load(parts / f"{name}.npy", mmap_mode="r+")
                        for name in ("images", "done"))
        missing = np.flatnonzero(done == 0)
        processes.wait_for_everyone()  # until all have read `done`, before it changes
        share = missing[processes.process_index :: processes.num_processes]
        quiet = {} if is_main else {"disable": True}  # {}: TQDM_DISABLE decides
        for n in tqdm(share, "drawing", unit="batch", **quiet):
            numbers = torch.arange(n * BATCH, min((n + 1) * BATCH, count))
            generator = torch.Generator(device).manual_seed((seed << 32) + int(n))
            drawn = (draw(numbers, generator) * 255).round().byte()
            images[numbers[0] : numbers[-1] + 1] = drawn.permute(0, 2, 3, 1).cpu()
            images.flush()
            done[n] = 1
            done.flush()
        processes.wait_for_everyone()
        if is_main:
            if left := int((done == 0).sum()):
                raise OSError(f"{parts} lacks {left} batches: run the command again")
            with atomic_write(path) as file:
                np.savez(file, images)
    if is_main:
        atomic_rmtree(parts)
    processes.wait_for_everyone()
    return path


def prepare(parts: Path, about: dict) -> None:
    """Reserve files for all images in `parts`; ValueError if it has other settings."""
    if (parts / "done.npy").exists():
        if found := differences(read_json(parts / "about.json"), about):
            raise ValueError(f"{parts} was begun with other settings: "
                             f"{'; '.join(found)}. Use the same ones, or remove it")
        return
    count, size = about["count"], about["size"]
    write_json(parts / "about.json", about)
    file = parts / "images.npy"
    np.lib.format.open_memmap(file, "w+", np.uint8, (count, size, size, 3))
    reserve(file, file.stat().st_size)
    with atomic_write(parts / "done.npy") as file:  # last: it marks the folder as ready
        np.save(file, np.zeros(-(-count // BATCH), np.uint8))
