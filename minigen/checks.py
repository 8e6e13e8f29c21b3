"""Checks of what comes from outside: numbers, images, files. Each says in one sentence
what was expected and what was found."""

import argparse
import math
import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from tokenize import TokenError
from types import NoneType, UnionType
from typing import Literal, Union, get_args, get_origin

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

LARGEST = 10**9  # above any real count: messages leave this limit out
POSITIVE, NOT_NEGATIVE, SHARE = (1, LARGEST), (0, math.inf), (0, 1)  # (least, most)
# What NumPy raises for a file that is not an array, and zipfile for one not a zip.
DAMAGED_ARRAY = (ValueError, EOFError, TypeError, KeyError, SyntaxError, TokenError,
                 MemoryError, RecursionError, OverflowError)
DAMAGED_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError,
               struct.error)
ROUNDING = 1e-3  # how far half precision may round a pixel beyond 0 and 1


def check_numbers(given, **ranges: tuple[float, float]) -> None:
    """Raise ValueError unless the named attributes are finite and within their ranges.

    A range is the smallest and the largest allowed value. None always passes.
    """
    for name, (least, most) in ranges.items():
        value = getattr(given, name)
        if value is None or (least <= value <= most and math.isfinite(value)):
            continue
        no_limit = most >= LARGEST and not value > most
        limits = (f"a finite number of at least {least:g}" if no_limit
                  else f"from {least:g} to {most:g}")
        raise ValueError(f"{name} must be {limits}, found {value}")


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless a sampling temperature is finite and at least 0."""
    if not 0 <= temperature < math.inf:  # catches NaN, too
        raise ValueError("temperature must be finite and not negative, "
                         f"found {temperature}; 0 always takes the likeliest")


def check_pixels(images: Tensor) -> None:
    """Raise ValueError unless images (B, 3, H, W) are floats in [0, 1].

    Under torch.compile and for fake tensors, which have no values, only the shape and
    the type are checked.
    """
    if images.ndim != 4 or images.shape[1] != 3 or len(images) == 0:
        raise ValueError("expected at least one image, (B, 3, H, W) in [0, 1], found "
                         f"shape {tuple(images.shape)}")
    if not images.is_floating_point():
        raise ValueError(f"expected images of floats in [0, 1], found {images.dtype}; "
                         "divide 8-bit values by 255")
    if torch.compiler.is_compiling() or isinstance(images, FakeTensor):
        return
    low, high = (value.item() for value in images.detach().aminmax())
    if not (low >= -ROUNDING and high <= 1 + ROUNDING):  # catches NaN, too
        raise ValueError("expected images with values from 0 to 1, found "
                         f"{low:.3g} to {high:.3g}")


def has_type(value, hint) -> bool:
    """Whether a value from JSON has the type of a dataclass's field."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return any(type(value) is type(known) and value == known for known in inner)
    if origin in (Union, UnionType):
        return any(has_type(value, one) for one in inner)
    if origin is tuple:
        return isinstance(value, (list, tuple)) and all(
            has_type(part, inner[0]) for part in value)
    if hint in (None, NoneType):
        return value is None
    if hint in (int, float):
        known = (int,) if hint is int else (int, float)
        return isinstance(value, known) and not isinstance(value, bool)
    return not isinstance(hint, type) or isinstance(value, hint)


def read_torch_file(path: str | Path):
    """Load a torch file of tensors and plain Python, on the CPU, executing no code.

    FileNotFoundError if there is no such file; ValueError if it holds anything else.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError,
            KeyError, IndexError, AttributeError, TypeError, AssertionError,
            struct.error, zlib.error, MemoryError, OverflowError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path} is not a torch file of tensors: {reason}") from error
