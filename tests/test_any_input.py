"""Whatever comes in, the answer is right or one sentence: tensors, JSON and files that
hypothesis invents or damages."""

import copy
import io
import json
import math
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image

from minigen.checkpoints import load, read_config, save_checkpoint
from minigen.checks import read_torch_file
from minigen.codes import CodeDataset, extract_codes
from minigen.data import load_dataset, read_square
from minigen.files import read_json
from minigen.gpt import read_nanogpt
from minigen.imagegpt import ImageGPT, ImageGPTConfig
from minigen.metrics import read_images
from minigen.npp import NPP
from minigen.patchgpt import PatchGPT, PatchGPTConfig
from minigen.pixelgpt import ColorTokenizer
from minigen.sampling import filter_logits, sample
from minigen.vq import VQConfig, VQModel

# The same examples on each run, and a bounded number of them.
tries = settings(max_examples=60, deadline=None, derandomize=True, database=None,
                 suppress_health_check=list(HealthCheck))
KINDS = (np.float16, np.float32, np.float64, np.uint8, np.int64, np.bool_)
SMALL = ImageGPTConfig(codebook_size=8, height=2, width=2, depth=1, heads=1, dim=4)


def answer(function, *arguments):
    """What a function gives, or None if it refuses what it was given in a sentence."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return function(*arguments)
        except (ValueError, FileNotFoundError) as refusal:
            message = str(refusal)
    assert re.search(r"\w+ \w+ \w+", message), f"no sentence: {message!r}"
    return None


@st.composite
def tensors(draw, **shape):
    """Tensors of any kind, shape and values."""
    kind = draw(st.sampled_from(KINDS))
    return torch.from_numpy(draw(arrays(kind, array_shapes(**shape))))


@st.composite
def damaged(draw, content: bytes):
    """A file of which some bytes were flipped, cut, or put in."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, max(0, len(content) - 1)))
        how = draw(st.sampled_from(("flip", "cut", "insert")))
        if how == "flip" and content:
            content[place] ^= draw(st.integers(1, 255))
        elif how == "cut":
            del content[place:]
        else:
            content[place:place] = draw(st.binary(max_size=20))
    return bytes(content)


def files_like(content: bytes):
    """Any bytes, or a damaged file."""
    return st.one_of(st.binary(max_size=200), damaged(content))


# --- images and tokens in memory

TOKENIZER = VQModel(VQConfig(downsample=4, channels=4, z_channels=4, kmeans=False,
                             codebook_size=8, codebook_dim=2)).eval()
FSQ = VQModel(VQConfig(downsample=4, channels=4, z_channels=4, quantizer="fsq",
                       levels=(3, 3))).eval()
PATCHES = PatchGPT(PatchGPTConfig(height=8, width=8, depth=1, heads=1, dim=4))
CODECS = {"colors": (ColorTokenizer(), 4096), "tokens": (TOKENIZER, 8), "fsq": (FSQ, 9)}
IMAGES = st.one_of(
    tensors(min_dims=0, max_dims=5, max_side=9),
    arrays(np.float32, (1, 3, 8, 8), elements=st.floats(-0.125, 1.125, width=32)
           ).map(torch.from_numpy))


@pytest.mark.parametrize("name", CODECS)
@tries
@given(images=IMAGES)
def test_any_tensor_is_encoded_or_refused(name, images):
    codec, size = CODECS[name]
    if (tokens := answer(codec.encode, images)) is not None:
        assert images.isfinite().all()
        assert tokens.dtype == torch.int64
        assert 0 <= tokens.min() <= tokens.max() < size


@tries
@given(images=IMAGES)
def test_any_tensor_is_cut_into_patches_or_refused(images):
    if (patches := answer(PATCHES.encode, images)) is not None:
        assert patches.isfinite().all()


@pytest.mark.parametrize("name", CODECS)
@tries
@given(tokens=st.one_of(
    tensors(min_dims=0, max_dims=4, max_side=5),
    arrays(np.int64, (1, 2, 2), elements=st.integers(-1, 9)).map(torch.from_numpy),
    arrays(np.int64, (1, 4), elements=st.integers(-1, 5000)).map(torch.from_numpy)))
def test_any_tokens_are_decoded_or_refused(name, tokens):
    codec, size = CODECS[name]
    grid = (2, 2) if name == "colors" else ()
    if (images := answer(codec.decode, tokens, *grid)) is not None:
        assert 0 <= tokens.min().item() <= tokens.max().item() < size
        assert images.isfinite().all()
        assert images.shape[1] == 3


@tries
@given(logits=arrays(np.float32, (3, 5)).map(torch.from_numpy),
       temperature=st.floats(), top_k=st.none() | st.integers(-1, 9),
       top_p=st.none() | st.floats())
def test_any_logits_give_a_token_or_a_sentence(logits, temperature, top_k, top_p):
    tokens = answer(sample, logits, temperature, top_k, top_p,
                    torch.Generator().manual_seed(0))
    if tokens is not None:
        assert 0 <= tokens.min() <= tokens.max() < 5
        chosen = logits.gather(1, tokens[:, None])
        assert (chosen > -math.inf).all(), "a token that the logits rule out"


@tries
@given(logits=arrays(np.float32, (2, 6), elements=st.floats(-50, 50, width=32)),
       top_k=st.integers(1, 6), top_p=st.floats(0.01, 1))
def test_filters_keep_the_likeliest(logits, top_k, top_p):
    logits = torch.from_numpy(logits)
    left = filter_logits(logits.clone(), top_k, top_p) > -math.inf
    assert left.gather(1, logits.argmax(1, keepdim=True)).all()


# --- JSON

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2**70, 2**70) | st.floats()
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Small checkpoints of several kinds, whole."""
    folder = tmp_path_factory.mktemp("models")
    for model in (ImageGPT(SMALL), TOKENIZER, PATCHES):
        save_checkpoint(model, folder / type(model).__name__)
    return folder


@tries
@given(data=st.data())
def test_any_config_is_loaded_or_refused(data, models):
    name = data.draw(st.sampled_from(("ImageGPT", "VQModel", "PatchGPT")))
    file = models / name / "config.json"
    whole = file.read_bytes()
    config = json.loads(whole)
    if data.draw(st.booleans()):
        changed = data.draw(JSON)
    else:
        changed = copy.deepcopy(config)
        field = data.draw(st.sampled_from([*config, "unknown"]))
        changed[field] = data.draw(JSON)
    try:
        file.write_text(json.dumps(changed))
        model = answer(load, models / name)
        about = answer(read_config, models / name)
    finally:
        file.write_bytes(whole)
    assert model is None or type(model).__name__ == about["model"].split(".")[-1]


@tries
@given(content=files_like(b'{"a": [1, 2.5, "x"], "b": null}'))
def test_any_bytes_as_json(content, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "any.json"
    file.write_bytes(content)
    answer(read_json, file)


# --- files


@tries
@given(data=st.data())
def test_any_weights_are_loaded_or_refused(data, models):
    file = models / "ImageGPT/model.safetensors"
    whole = file.read_bytes()
    try:
        file.write_bytes(data.draw(files_like(whole)))
        model = answer(load, models / "ImageGPT")
    finally:
        file.write_bytes(whole)
    assert model is None or all(w.isfinite().all() for w in model.parameters())


@tries
@given(data=st.data())
def test_any_torch_file_is_read_or_refused(data, tmp_path_factory):
    file, whole = tmp_path_factory.getbasetemp() / "any.pt", io.BytesIO()
    torch.save({"model": {"weight": torch.zeros(3)}, "model_args": {}}, whole)
    file.write_bytes(data.draw(files_like(whole.getvalue())))
    for read in (read_torch_file, read_nanogpt, VQModel.from_llamagen,
                 NPP.from_llamagen):
        answer(read, file)


def image_file(form: str) -> bytes:
    file = io.BytesIO()
    pixels = np.arange(9 * 7 * 3, dtype=np.uint8).reshape(9, 7, 3)
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM"])
@tries
@given(data=st.data())
def test_any_bytes_are_an_image_or_refused(form, data, tmp_path_factory):
    content = data.draw(files_like(image_file(form)))
    pixels = answer(read_square, content, 6, "photo.png")
    assert pixels is None or (pixels.shape, pixels.dtype) == ((3, 6, 6), np.uint8)
    folder = tmp_path_factory.getbasetemp() / "pictures"
    folder.mkdir(exist_ok=True)
    (folder / "photo.png").write_bytes(content)
    answer(lambda: list(read_images(folder)))
    answer(lambda: load_dataset(folder, 6, "val", on_error="skip")[0])


@tries
@given(data=st.data())
def test_any_archive_is_read_or_refused(data, tmp_path_factory):
    file, whole = tmp_path_factory.getbasetemp() / "images.npz", io.BytesIO()
    save = data.draw(st.sampled_from((np.savez, np.savez_compressed)))
    save(whole, arr_0=np.arange(96, dtype=np.uint8).reshape(2, 4, 4, 3))
    file.write_bytes(data.draw(files_like(whole.getvalue())))
    images = answer(lambda: list(read_images(file)))
    assert images is None or all(batch.isfinite().all() for batch in images)


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    """The codes of four landscapes."""
    folder = tmp_path_factory.mktemp("codes")
    save_checkpoint(TOKENIZER, folder / "tokenizer")
    extract_codes(folder / "tokenizer", "landscapes", folder / "codes", size=16,
                  length=4)
    return folder / "codes"


@tries
@given(data=st.data())
def test_any_folder_of_codes_is_read_or_refused(data, codes):
    name = data.draw(st.sampled_from(("codes.npy", "labels.npy", "metadata.json")))
    whole = (codes / name).read_bytes()
    fresh = Path(codes, "fresh")  # a mapped file must not be cut
    try:
        fresh.write_bytes(data.draw(files_like(whole)))
        fresh.replace(codes / name)
        found = answer(lambda: [item.tokens for item in CodeDataset(codes)])
    finally:
        fresh.write_bytes(whole)
        fresh.replace(codes / name)
    assert found is None or all(0 <= t.min() <= t.max() < 8 for t in found)
