"""Chapter 4: the search for the nearest code against `torch.cdist(...).argmin`, and
extracting and reading codes."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from torch import Tensor

from minigen.bench import Row, alone, highest_memory, medians
from minigen.checkpoints import save_checkpoint
from minigen.codes import CodeDataset
from minigen.data import load_dataset
from minigen.vq import VQConfig, VQModel, nearest_code

# (codes, dimension) of LlamaGen's codebook and a VQ-VAE's: target speed-up over cdist.
SIZES = {(16384, 8): 1.6, (1024, 256): 1.0}


def plain(vectors: Tensor, codebook: Tensor) -> Tensor:
    """The document's search."""
    return torch.cdist(vectors, codebook).argmin(dim=-1)


SEARCHES = {"plain": plain, "ours": nearest_code}


def example(count: int, size: int, dim: int) -> tuple[Tensor, Tensor]:
    """Vectors (count, dim) and a codebook (size, dim), both normal."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(count, dim, generator=generator)
    return vectors, torch.randn(size, dim, generator=generator)


def added_peak(search: str, count: int, size: int, dim: int) -> int:
    """Bytes that a search adds at its peak, after a small one has loaded libraries."""
    vectors, codebook = example(count, size, dim)
    SEARCHES[search](vectors[:64], codebook[:256])
    before = psutil.Process().memory_info().rss
    SEARCHES[search](vectors, codebook)
    return highest_memory() - before


def mistakes(search: str, vectors: Tensor, codebook: Tensor) -> int:
    """How many chosen codes are farther than the nearest one by more than rounding."""
    found, wrong = SEARCHES[search](vectors, codebook).split(1024), 0
    # bound on d + 2 rounding errors in v . c - |c|^2 / 2, for two codes
    unit = 2 * (codebook.shape[1] + 2) * torch.finfo(torch.float32).eps
    half = codebook.double().square().sum(dim=1) / 2                  # (K,)
    for part, codes in zip(vectors.double().split(1024), found, strict=True):
        scores = part @ codebook.double().T - half                    # (1024, K)
        gap = scores.amax(dim=1) - scores.gather(1, codes[:, None])[:, 0]
        size = part.norm(dim=1) * (2 * half.max()).sqrt() + half.max()
        wrong += (gap > unit * size).sum().item()
    return wrong


def against(measured: dict[str, float], unit: float, name: str) -> str:
    """Both figures as text, such as "12 ms against 19 ms"."""
    ours, other = (f"{measured[key] * unit:.0f} {name}" for key in ("ours", "plain"))
    return f"{ours} against {other}"


def lookup_rows(quick: bool) -> list[Row]:
    """Rows for the search at both sizes: time, added memory and mistakes."""
    count, repetitions, found = 1024 if quick else 16384, 2 if quick else 7, []
    for (size, dim), least in SIZES.items():
        vectors, codebook = example(count, size, dim)
        seconds = medians({name: lambda f=search, v=vectors, c=codebook: f(v, c)
                           for name, search in SEARCHES.items()}, repetitions)
        peak = {name: alone(__name__, name, count, size, dim) for name in SEARCHES}
        wrong = {name: mistakes(name, vectors, codebook) for name in SEARCHES}
        case = f"{count} vectors, {size} codes of {dim}"
        found += [
            Row(f"{case}: against cdist", seconds["plain"] / seconds["ours"], "x",
                None if quick else least, note=against(seconds, 1e3, "ms")),
            Row(f"{case}: added peak memory", peak["ours"] / peak["plain"], "x",
                0.05 if size == 16384 and not quick else None,
                at_least=False, note=against(peak, 1e-6, "MB")),
            Row(f"{case}: differ from float64 beyond rounding", wrong["ours"], "",
                0, at_least=False, note=f"cdist: {wrong['plain']}"),
        ]
    return found


def extract(processes: int, tokenizer: Path, out: Path, images: int) -> float:
    """Seconds of the whole command; each process has half as many threads as cores."""
    command = ["-m", "minigen", "extract-codes", "--tokenizer", tokenizer, "--out", out,
               "--data", "landscapes", "--size", 64, "--length", images]
    if processes > 1:
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                   processes, *command]
    threads, start = max(1, os.cpu_count() // 2), time.perf_counter()
    subprocess.run([sys.executable, *map(str, command)], check=True,
                   capture_output=True,
                   env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    return time.perf_counter() - start


def code_rows(quick: bool) -> list[Row]:
    """Rows for extracting codes of 64 x 64 images, and for reading against encoding."""
    torch.manual_seed(0)
    model = VQModel(VQConfig(channels=8 if quick else 32, downsample=8)).eval()
    images, reads = (32, 200) if quick else (4096, 20_000)
    dataset = load_dataset("landscapes", 64, "train", images)  # before any clock starts
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_checkpoint(model, folder / "tokenizer")
        taken = {n: extract(n, folder / "tokenizer", folder / f"codes{n}", images)
                 for n in ((1,) if quick else (1, 2))}
        codes = CodeDataset(folder / "codes1")
        generator = torch.Generator().manual_seed(0)
        order = torch.randint(len(codes), (reads,), generator=generator).tolist()
        read = medians({"read": lambda: [codes[n] for n in order]})["read"] / reads

    def encode():
        return model.encode(torch.stack([dataset[n].image for n in range(16)]))

    again, most = medians({"again": encode})["again"] / 16, max(taken)
    rate = [f"{2 * images / took:,.0f} a second on {n}" for n, took in taken.items()]
    enough = most > 1 and (os.cpu_count() or 1) > 1
    return [
        Row("codes of a 64 x 64 image: read at random against encoded", again / read,
            "x", note=f"{1 / read:,.0f} against {1 / again:,.0f} a second"),
        Row(f"extraction of {images} images: {most} processes against 1",
            taken[1] / taken[most], "x", 1.5 if enough else None,
            note=f"{', '.join(rate)}, mirrored ones and starting included"),
    ]


def rows(quick: bool = False) -> list[Row]:
    """Chapter 4's table; `quick` takes fewer vectors, images and repetitions."""
    return lookup_rows(quick) + code_rows(quick)


if __name__ == "__main__":
    print(json.dumps(added_peak(sys.argv[1], *map(int, sys.argv[2:]))))
