"""Chapter 4: looking up the nearest code, against `torch.cdist(...).argmin`, and extracting and reading codes."""

import json
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from torch import Tensor

from minigen.bench import Row, alone, highest_memory, medians
from minigen.codes import CodeDataset, extract_codes
from minigen.data import load_dataset
from minigen.training import save_checkpoint
from minigen.vq import VQConfig, VQModel, nearest_code

SIZES = {(16384, 8): 1.6, (1024, 256): 1.0}  # codes and numbers in each: LlamaGen's, a VQ-VAE's; how many times as fast we want to be


def plain(vectors: Tensor, codebook: Tensor) -> Tensor:
    """The document's search."""
    return torch.cdist(vectors, codebook).argmin(dim=-1)


SEARCHES = {"plain": plain, "ours": nearest_code}


def example(count: int, codes: int, dim: int) -> tuple[Tensor, Tensor]:
    """Vectors (count, dim) and a codebook (codes, dim), both normal."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, dim, generator=generator), torch.randn(codes, dim, generator=generator)


def added_peak(search: str, count: int, codes: int, dim: int) -> int:
    """Bytes that a search adds to what the process held before it, at its highest; after a small one, so that libraries are loaded."""
    vectors, codebook = example(count, codes, dim)
    SEARCHES[search](vectors[:64], codebook[:256])
    before = psutil.Process().memory_info().rss
    SEARCHES[search](vectors, codebook)
    return highest_memory() - before


def searched(vectors: Tensor, codebook: Tensor) -> Tensor:
    """The nearest codes by float64, every difference taken by itself."""
    parts = (torch.cdist(part.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist") for part in vectors.split(1024))
    return torch.cat([part.argmin(dim=1) for part in parts])


def lookup_rows(quick: bool) -> list[Row]:
    """The search at both sizes: time, added memory, and whether it is right."""
    count, repetitions, found = 1024 if quick else 16384, 2 if quick else 7, []
    target = (lambda value: None) if quick else (lambda value: value)
    for (codes, dim), least in SIZES.items():
        vectors, codebook = example(count, codes, dim)
        time = medians({name: lambda f=search: f(vectors, codebook) for name, search in SEARCHES.items()}, repetitions)
        peak = {name: alone(__name__, name, count, codes, dim) for name in SEARCHES}
        case = f"{count} vectors, {codes} codes of {dim}"
        found += [
            Row(f"{case}: against cdist", time["plain"] / time["ours"], "x", target(least),
                note=f"{time['ours'] * 1e3:.0f} ms against {time['plain'] * 1e3:.0f} ms"),
            Row(f"{case}: added peak memory", peak["ours"] / peak["plain"], "x", target(0.05) if codes == 16384 else None, at_least=False,
                note=f"{peak['ours'] / 1e6:.0f} MB against {peak['plain'] / 1e6:.0f} MB"),
            Row(f"{case}: answers that differ from float64", (nearest_code(vectors, codebook) != searched(vectors, codebook)).sum().item(),
                "", 0, at_least=False, note=f"cdist: {(plain(vectors, codebook) != searched(vectors, codebook)).sum().item()}"),
        ]
    return found


def code_rows(quick: bool) -> list[Row]:
    """Extracting the codes of pictures of 64 x 64, and reading them, against preparing and encoding the pictures each time."""
    torch.manual_seed(0)
    model = VQModel(VQConfig(channels=8 if quick else 32, downsample=8)).eval()
    images, reads = (32, 200) if quick else (4096, 20_000)
    load_dataset("landscapes", 64, "train", images)  # drawn, or read, before any clock starts
    taken, threads = {}, torch.get_num_threads()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_checkpoint(model, folder / "tokenizer")
        for processes in (1,) if quick else (1, 2):
            torch.set_num_threads(processes)  # which are shared out: one for each process
            start = time.perf_counter()
            extract_codes(folder / "tokenizer", "landscapes", folder / f"codes{processes}", size=64, length=images, batch_size=16,
                          processes=processes)
            taken[processes] = time.perf_counter() - start
        torch.set_num_threads(threads)
        codes = CodeDataset(folder / "codes1")
        order = torch.randint(len(codes), (reads,), generator=torch.Generator().manual_seed(0)).tolist()
        read = medians({"read": lambda: [codes[n] for n in order]})["read"] / reads
        pictures = load_dataset("landscapes", 64, "train", images)
        again = medians({"again": lambda: model.encode(torch.stack([pictures[n].image for n in range(16)]))})["again"] / 16
    speed = {processes: f"{2 * images / elapsed:,.0f} a second on {processes}" for processes, elapsed in taken.items()}
    return [
        Row("codes of a picture of 64 x 64, read at random against encoded again", again / read, "x",
            note=f"{1 / read:,.0f} against {1 / again:,.0f} a second"),
        Row(f"extraction of {images} pictures and their mirror images, {max(taken)} processes against one", taken[1] / taken[max(taken)], "x",
            note=f"{', '.join(speed.values())}, starting included"),
    ]


def rows(quick: bool = False) -> list[Row]:
    """Chapter 4's table; `quick` takes fewer vectors, pictures and repetitions."""
    return lookup_rows(quick) + code_rows(quick)


if __name__ == "__main__":
    print(json.dumps(added_peak(sys.argv[1], *map(int, sys.argv[2:]))))
