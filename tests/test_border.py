"""What comes from outside is checked at the border: files, images, numbers, options.

A mistake is one sentence, nothing is lost, and no answer is silently wrong."""

import json
import math
import os
import sys
import warnings

import pytest
import torch
from PIL import EpsImagePlugin, Image
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from minigen import __main__ as command_line
from minigen import data, runs
from minigen.checkpoints import (
    SHIPPED,
    find_state,
    load,
    model_class,
    save_checkpoint,
    save_state,
)
from minigen.checks import check_pixels, has_type, read_torch_file
from minigen.data import cached_landscapes, load_dataset, read_square
from minigen.files import lock_folder, read_json
from minigen.gpt import read_nanogpt
from minigen.imagegpt import ImageGPT, ImageGPTConfig
from minigen.losses import linear_cross_entropy
from minigen.npp import NPP
from minigen.patchgpt import PatchGPT, PatchGPTConfig
from minigen.pixelgpt import ColorTokenizer
from minigen.sampling import sample
from minigen.show import image_grid
from minigen.train import imagegpt, maskgit, vq
from minigen.train.imagegpt import find_tokenizer
from minigen.training import FitConfig
from minigen.transformer import TransformerConfig
from minigen.vq import VQConfig, VQModel

SMALL = ImageGPTConfig(codebook_size=8, height=2, width=2, depth=1, heads=1, dim=4)


# --- images from files


def test_landscapes_that_nobody_draws_any_more_are_removed(tmp_path):
    for name in ("landscapes-v0-16px", "landscapes-v0-32px"):
        (tmp_path / f".tmp-{name}").mkdir()
    with lock_folder(tmp_path / ".lock-landscapes-v0-32px"):  # a living process
        cached_landscapes(16, 2, root=tmp_path)
        left = [path.name for path in tmp_path.glob(".tmp-*")]
    assert left == [".tmp-landscapes-v0-32px"]


def noise(path, size=(20, 20)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise(size, 40).convert("RGB").save(path)


def test_images_beside_class_folders_are_counted(tmp_path):
    for n in range(4):
        noise(tmp_path / "cats" / f"{n}.png")
        noise(tmp_path / f"{n}.png")
    with pytest.warns(UserWarning, match="left out 4 images beside the class folders"):
        assert len(load_dataset(tmp_path, 16)) == 3  # and one for val


def test_an_image_starts_no_program(tmp_path, monkeypatch):
    def ghostscript(*arguments, **options):
        raise AssertionError("Ghostscript was called")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", ghostscript)
    file = tmp_path / "drawing.png"
    file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")
    with Image.open(file) as image:
        assert image.format == "EPS", "or this test would show nothing"
    with pytest.raises(ValueError, match="drawing.png cannot be read.*none of JPEG"):
        read_square(file, 16, "drawing.png")
    for n in range(20):
        noise(tmp_path / "train" / f"{n}.png")
    file.rename(tmp_path / "train" / file.name)
    with pytest.warns(UserWarning, match="left out 1 of 21 images"):
        assert len(load_dataset(tmp_path, 16, on_error="skip")) == 20


def test_too_many_pixels(tmp_path, monkeypatch):
    for n in range(2):
        noise(tmp_path / f"{n}.png")
    monkeypatch.setattr(data, "MAX_PIXELS", 399)
    with pytest.raises(ValueError, match="20 x 20 pixels, more .*MAX_PIXELS = 399"):
        load_dataset(tmp_path, 16)[0]
    monkeypatch.setattr(data, "MAX_PIXELS", 400)
    assert load_dataset(tmp_path, 16)[0].image.shape == (3, 16, 16)


@pytest.mark.skipif(sys.platform == "darwin", reason="its file names are UTF-8")
def test_a_file_name_of_other_bytes(tmp_path):
    noise(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/\xff.png")
    noise(tmp_path / "b.png")
    counts = [len(load_dataset(tmp_path, 16, split)) for split in ("train", "val")]
    assert counts == [1, 1]


def test_a_picture_may_not_fill_the_memory():
    with pytest.raises(ValueError, match="too large: enlarge its images less"):
        image_grid(torch.zeros(1, 3, 64, 64), scale=100_000)


# --- images and tokens in memory

ENCODERS = {
    "colors": ColorTokenizer().encode,
    "patches": PatchGPT(PatchGPTConfig(
        height=8, width=8, depth=1, heads=1, dim=4)).encode,
    "tokens": VQModel(VQConfig(downsample=4, channels=4, z_channels=4, kmeans=False,
                               codebook_size=8, codebook_dim=2)).encode,
    "fsq": VQModel(VQConfig(downsample=4, channels=4, z_channels=4, quantizer="fsq",
                            levels=(3, 3))).encode,
}
BAD_IMAGES = {
    "NaN": torch.full((1, 3, 8, 8), math.nan),
    "one NaN": torch.zeros(1, 3, 8, 8).index_fill(3, torch.tensor([5]), math.nan),
    "infinity": torch.full((1, 3, 8, 8), math.inf),
    "[0, 255]": torch.full((1, 3, 8, 8), 200.0),
    "[-1, 1]": torch.full((1, 3, 8, 8), -1.0),
    "8 bits": torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
    "no images": torch.zeros(0, 3, 8, 8),
}


@pytest.mark.parametrize("encode", ENCODERS.values(), ids=ENCODERS)
def test_images_that_are_none(encode):
    for images in BAD_IMAGES.values():
        with pytest.raises(ValueError, match="expected .*found"):
            encode(images)
    for edge in (0.0, 1.0, -1e-4, 1 + 1e-4):  # as half precision may round
        encode(torch.full((1, 3, 8, 8), edge))


def test_values_of_fake_and_compiled_images_are_not_read():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        check_pixels(torch.zeros(1, 3, 4, 4))


def test_tokens_out_of_range():
    for token in (-1, 4096):
        with pytest.raises(ValueError, match=f"0 to 4095, found {token}"):
            ColorTokenizer().decode(torch.full((1, 4), token), 2, 2)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_allow_no_token(temperature):
    good = torch.tensor([[0.0, -math.inf], [1.0, 2.0]])
    sample(good, temperature)
    for row in ([math.nan, 0.0], [-math.inf, -math.inf], [math.inf, 0.0]):
        with pytest.raises(ValueError, match="logits are not finite"):
            sample(torch.tensor([[0.0, 1.0], row]), temperature)


@pytest.mark.parametrize("temperature", [-1.0, math.nan, math.inf])
def test_temperatures(temperature):
    with pytest.raises(ValueError, match="temperature must be finite"):
        sample(torch.zeros(1, 2), temperature)
    model = PatchGPT(PatchGPTConfig(height=8, width=8, depth=1, heads=1, dim=4))
    with pytest.raises(ValueError, match="temperature must be finite"):
        model.generate_images(1, temperature=temperature)


def test_rows_of_the_loss():
    hidden, weight = torch.randn(4, 3), torch.randn(5, 3)
    with pytest.raises(ValueError, match="rows must be at least 1, found -1"):
        linear_cross_entropy(hidden, weight, torch.zeros(4, dtype=torch.int64), rows=-1)


# --- settings


@pytest.mark.parametrize(("kind", "wrong"), [
    (FitConfig, {"ema": 2.0}), (FitConfig, {"ema": math.nan}),
    (FitConfig, {"clip": -1}), (FitConfig, {"warmup": -1}),
    (FitConfig, {"lr": math.inf}), (FitConfig, {"lr": -1}),
    (FitConfig, {"betas": (0.9, 1.0)}), (FitConfig, {"betas": (0.9,)}),
    (FitConfig, {"steps": 1.5}), (FitConfig, {"weight_decay": math.nan}),
    (FitConfig, {"precision": "float16"}), (FitConfig, {"workers": -1}),
    (FitConfig, {"workers": 10**20}), (FitConfig, {"accumulate": 10**20}),
    (FitConfig, {"eval_steps": (-1, 4)}),
    (TransformerConfig, {"depth": 10**20}), (runs.RunConfig, {"val_images": 10**20}),
    (imagegpt.Config, {"class_dropout": 1.5}),
    (maskgit.Config, {"label_smoothing": -1.0}),
    (TransformerConfig, {"depth": -1}), (TransformerConfig, {"heads": 0}),
    (TransformerConfig, {"dim": -2}), (TransformerConfig, {"dropout": 1.5}),
    (TransformerConfig, {"positions": "rowcoll"}),
    (ImageGPTConfig, {"height": 2**11, "width": 2**11}),
    (PatchGPTConfig, {"noise": -0.1}), (PatchGPTConfig, {"patch_size": 0}),
    (VQConfig, {"channels": 0}), (VQConfig, {"blocks": 0}), (VQConfig, {"decay": 1.5}),
    (runs.RunConfig, {"samples": 0}), (runs.RunConfig, {"size": -1}),
    (runs.RunConfig, {"val_images": 0}), (runs.SampleOptions, {"scale": 0}),
    (runs.SampleOptions, {"columns": -1}), (runs.SampleOptions, {"count": 0}),
    (runs.SampleOptions, {"temperature": math.nan}),
    (vq.SampleOptions, {"columns": 0}), (vq.SampleOptions, {"count": -1}),
    (vq.Config, {"features": -1.0}), (vq.Config, {"adversarial": math.nan}),
], ids=str)
def test_settings_that_cannot_be(kind, wrong):
    with pytest.raises(ValueError, match="found") as error:
        kind(**wrong)
    assert next(iter(wrong)) in str(error.value) or "grid" in str(error.value)


@pytest.mark.parametrize("error", [
    MemoryError("no room"), RuntimeError("CUDA out of memory. Tried to"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 64 TB")])
def test_settings_that_do_not_fit_into_memory(monkeypatch, capsys, error):
    def fail(*_):
        raise error

    monkeypatch.delenv("MINIGEN_DEBUG", raising=False)
    monkeypatch.setattr("minigen.train.pixelgpt.run", fail)
    arguments = ["train", "pixelgpt", "--preset", "test"]
    assert command_line.main(arguments) == 2
    assert "need more memory than there is" in capsys.readouterr().err
    error = RuntimeError("something else")
    with pytest.raises(RuntimeError, match="something else"):
        command_line.main(arguments)


def test_data_without_a_name():
    with pytest.raises(ValueError, match="the name of the data is empty: give a fold"):
        load_dataset("", 16)


# --- states and checkpoints


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_flipped_bit_in_a_state_is_noticed(tmp_path):
    settings = {"lr": 0.1}
    for step in (1, 2, 3):
        weights = torch.full((99,), float(step))
        save_state(tmp_path, settings, {"step": step, "w": weights})
    assert sorted(path.name[-1] for path in tmp_path.glob("state-*")) == ["2", "3"]
    assert find_state(tmp_path, True, settings)["step"] == 3
    flip_a_bit(tmp_path / "state-000000003/state.pt")
    with pytest.warns(UserWarning, match="state-000000003 is damaged and is left out"):
        found = find_state(tmp_path, True, settings)
    assert found["step"] == 2
    assert_close(found["w"], torch.full((99,), 2.0))
    (tmp_path / "state-000000002/state.pt").write_bytes(b"")
    with (pytest.warns(UserWarning, match="damaged"),
          pytest.raises(ValueError, match="all states in")):
        find_state(tmp_path, True, settings)


def test_a_state_of_an_older_version_has_no_checksum(tmp_path):
    save_state(tmp_path, {}, {"step": 1})
    (tmp_path / "state-000000001/state.sha256").unlink()
    assert find_state(tmp_path, True, {})["step"] == 1


@pytest.fixture
def checkpoint(tmp_path):
    save_checkpoint(ImageGPT(SMALL), tmp_path / "model")
    return tmp_path / "model"


def test_a_checkpoint_that_is_whole(checkpoint):
    assert load(checkpoint).config == SMALL


@pytest.mark.parametrize(("changes", "message"), [
    ({"model": 5}, "config.json was not written by minigen"),
    ({"model": "os.path"}, "expected the name of a model of minigen"),
    ({"dim": "4"}, "dim = '4', expected int"),
    ({"dim": True}, "dim = True, expected int"),
    ({"class_dropout": None}, "class_dropout = None, expected float"),
    ({"norm": "batch"}, "norm = 'batch', expected"),
    ({"dim": 10**9}, "dim = 1000000000, too large"),
    ({"depth": 10**9}, "depth = 1000000000, too large"),
    ({"codebook_size": 10**12}, "codebook_size = 1000000000000, too large"),
    ({"dim": 2048, "height": 64, "width": 64}, "does not hold this model"),
    ({"depth": 2}, "does not hold this model: .* is missing"),
])
def test_a_config_that_does_not_fit(changes, message, checkpoint):
    file = checkpoint / "config.json"
    file.write_text(json.dumps(read_json(file) | changes))
    with pytest.raises(ValueError, match=message):
        load(checkpoint)


@pytest.mark.parametrize("text", [b"{", b"", b"\xff\xfe", b"[1]", b"5", b"null"])
def test_a_config_that_is_none(text, checkpoint):
    (checkpoint / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match="config.json"):
        load(checkpoint)


@pytest.mark.parametrize("damage", [
    lambda content: b"", lambda content: content[:-10], lambda content: content[:5],
    lambda content: b"\xff" * 8 + content[8:], lambda content: content + b"more",
    lambda content: b"just some text",
])
def test_weights_that_are_damaged(damage, checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match="model.safetensors cannot be read"):
        load(checkpoint)


def test_weights_of_another_kind(checkpoint):
    file = checkpoint / "model.safetensors"
    weights = load_file(file)
    save_file({name: w.long() for name, w in weights.items()}, file)
    with pytest.raises(ValueError, match="is torch.int64, expected torch.float32"):
        load(checkpoint)


@pytest.mark.parametrize(
    "name", sorted(p.parent.name for p in SHIPPED.glob("*/config.json")))
def test_what_ships_is_built_without_memory_first(name):
    """`load` builds every class on the meta device, which must not read its values."""
    assert load(name)


@pytest.mark.parametrize("content", [b"", b"just text", b"PK\x03\x04 no zip", b"\x80"])
def test_torch_files_that_are_none(content, tmp_path):
    file = tmp_path / "weights.pt"
    file.write_bytes(content)
    for read in (read_torch_file, read_nanogpt, VQModel.from_llamagen,
                 NPP.from_llamagen):
        with pytest.raises(ValueError, match="weights.pt is not a torch file"):
            read(file)
    torch.save([1, 2], file)
    for read in (read_nanogpt, VQModel.from_llamagen, NPP.from_llamagen):
        with pytest.raises(ValueError, match="weights.pt is n"):
            read(file)
    with pytest.raises(FileNotFoundError):
        read_torch_file(tmp_path / "missing.pt")


@pytest.mark.parametrize(("args", "message"), [
    ({"n_layer": 10**9}, "do not fit its model_args"),
    ({"vocab_size": 10**9}, "do not fit its model_args"),
    ({"n_embd": "8"}, "expected positive whole numbers"),
    ({"n_head": None}, "expected positive whole numbers"),
])
def test_sizes_that_a_nanogpt_file_cannot_have(args, message, tmp_path):
    """They are refused before anything is allocated."""
    sizes = {"vocab_size": 4, "block_size": 6, "n_layer": 1, "n_head": 2, "n_embd": 8}
    weights = {"transformer.wte.weight": torch.zeros(4, 8),
               "transformer.wpe.weight": torch.zeros(6, 8)}
    torch.save({"model": weights, "model_args": sizes | args}, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match=message):
        read_nanogpt(tmp_path / "ckpt.pt")


@pytest.mark.parametrize(("value", "hint", "fits"), [
    (1, int, True), (1, float, True), (1.5, int, False), (True, int, False),
    ("a", str, True), (None, float | None, True), ("x", float | None, False),
    ([1, 2], tuple[int, ...], True), ([1, "2"], tuple[int, ...], False),
    ({}, tuple[int, ...], False), ([], str, False),
])
def test_types_of_a_config(value, hint, fits):
    assert has_type(value, hint) == fits


def test_a_checkpoint_chooses_no_files_elsewhere(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("minigen.train.imagegpt.load_tokenizer", lambda place: (
        asked.append(str(place)), open(tmp_path / "nothing"))[1])
    for name in ("/etc/secret", "../../secret", "models/../../secret", "a/b/secret"):
        model = ImageGPT(SMALL)
        model.config.tokenizer = name
        save_checkpoint(model, tmp_path / "runs/model")
        with pytest.raises(FileNotFoundError, match="--tokenizer"):
            find_tokenizer(tmp_path / "runs/model", model)
    allowed = str(tmp_path.resolve() / "runs")
    assert asked
    assert all(place == "secret" or (place.startswith(allowed) and ".." not in place)
               for place in asked)


def test_ship_keeps_to_the_folder(tmp_path, monkeypatch):
    run = tmp_path / "runs/x"
    save_checkpoint(ImageGPT(SMALL), run)
    (run / "result.json").write_text(json.dumps({"config": {}}))
    (run / "inside").mkdir()
    runs.ship(run / "inside/..", tmp_path / "data")
    assert (tmp_path / "data/results/x.json").exists()
    assert (tmp_path / "data/checkpoints/x/config.json").exists()


def test_only_models_of_this_package():
    for name in ("torch.nn.Linear", "minigen.files.write_json", "os.system", "x"):
        with pytest.raises(ValueError, match="minigen"):
            model_class(name)


# --- the command line

WRONG = [
    "--samples 0", "--samples -1", "--lr inf", "--ema nan", "--heads 0", "--dim -2",
    "--steps 0", "--size 0", "--val-images 0", "--clip -1", "--on-error maybe",
]


@pytest.mark.parametrize("options", WRONG)
def test_options_that_cannot_be(options, tmp_path, capsys):
    arguments = ["train", "pixelgpt", "--preset", "test", *options.split(), "--out"]
    try:
        status = command_line.main([*arguments, str(tmp_path / "run")])
    except SystemExit as error:  # from the parser
        status = error.code
    assert status == 2
    error = capsys.readouterr().err
    assert error
    assert "Traceback" not in error
    assert not (tmp_path / "run/model.safetensors").exists()


def test_an_empty_preset(tmp_path, capsys):
    assert command_line.main(["train", "pixelgpt", "--preset", ""]) == 2
    assert "has no preset ''" in capsys.readouterr().err


def test_an_interrupt_is_a_sentence(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line, "info", interrupted)
    assert command_line.main(["info"]) == 130
    assert capsys.readouterr().err == "minigen: interrupted\n"


def test_unreadable_images_can_be_left_out_of_training(tmp_path, capsys):
    for n in range(30):
        noise(tmp_path / "photos" / f"{n}.png")
    (tmp_path / "photos/broken.png").write_bytes(b"no image")
    arguments = ["train", "pixelgpt", "--preset", "test", "--data",
                 str(tmp_path / "photos"), "--train-images", "31", "--val-images", "31"]
    assert command_line.main([*arguments, "--out", str(tmp_path / "a")]) == 2
    assert "broken.png cannot be read" in capsys.readouterr().err
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        assert command_line.main([*arguments, "--on-error", "skip", "--out",
                                  str(tmp_path / "b")]) == 0

