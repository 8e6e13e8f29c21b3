"""Every preset of every script takes one step and draws: also those made for a GPU."""

import importlib
import math
import pkgutil
from dataclasses import fields, replace

import pytest
import torch
from PIL import Image

import minigen.train
from minigen import vqgan
from minigen.checkpoints import load, save_checkpoint
from minigen.files import read_json
from minigen.imagegpt import ImageGPT, ImageGPTConfig
from minigen.patchgpt import PatchGPT, PatchGPTConfig
from minigen.pixelgpt import PixelGPT, PixelGPTConfig
from minigen.train import imagegpt, vq
from minigen.vq import LLAMAGEN, VQConfig, VQModel

SCRIPTS = {module.name: importlib.import_module(f"minigen.train.{module.name}")
           for module in pkgutil.iter_modules(minigen.train.__path__)}
PRESETS = [pytest.param(name, preset, id=f"{name}-{preset}")
           for name, script in SCRIPTS.items() for preset in script.PRESETS]

# One step on one image. The shape of the model, the loss and the optimizer stay.
ONCE = {"steps": 1, "batch_size": 1, "accumulate": 1, "train_images": 1,
        "val_images": 1, "samples": 1, "eval_steps": (), "save_every": 0, "workers": 0,
        "compile": False}


class Distance:
    """Stands in for LPIPS, whose weights are 500 MB to download."""

    def __call__(self, images, others):
        return (images - others).square().mean()


@pytest.fixture(autouse=True)
def without_downloads(monkeypatch):
    monkeypatch.setattr(vqgan, "PerceptualLoss", Distance)


def random_tokenizer(preset, folder) -> str:
    """A tokenizer of the size that a preset of chapter 5 uses, which nobody trained."""
    config = vq.PRESETS[preset].select(VQConfig)
    if imagegpt.PRESETS[preset].tokenizer:  # LlamaGen's codes, from a narrower network
        config = VQConfig(**LLAMAGEN | {"channels": 16}, downsample=16)
    save_checkpoint(VQModel(config), folder)
    return str(folder)


def two_classes(folder, size) -> str:
    """A data set of four images: a model then draws two classes, not a thousand."""
    for n in range(4):
        file = folder / ("night", "day")[n % 2] / f"{n}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((size, size), 40).convert("RGB").save(file)
    return str(folder)


def picture(path, size):
    with Image.open(path) as image:
        assert min(image.size) >= size


@pytest.mark.filterwarnings("ignore:std.*degrees of freedom")  # of one image
@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_one_step_and_one_image(name, preset, tmp_path):
    script, config = SCRIPTS[name], SCRIPTS[name].PRESETS[preset]
    changes = ONCE | {"data": two_classes(tmp_path / "data", config.size)}
    if hasattr(config, "depth"):  # all blocks are equal
        changes["depth"] = min(2, config.depth)
    if name == "vq":  # from the first step on
        changes["adversarial_start"] = 0
    if name == "features":  # batch norm needs two of each
        changes |= {"batch_size": 2, "train_images": 2}
    if name in ("imagegpt", "maskgit", "npp", "anytoany") and (
            not config.tokenizer.startswith("vq-")):  # the small one that ships
        changes["tokenizer"] = random_tokenizer(preset, tmp_path / "tokenizer")
    if name == "npp":  # one step is one stage
        changes["level"] = 1
    config = replace(config, out=tmp_path / "run", **changes)

    result = script.main(config)

    assert result == read_json(config.out / "result.json")
    assert result["preset"] == preset
    metrics = result["metrics"]
    assert all(map(math.isfinite, metrics.values()))
    assert [line["step"] for line in result["history"]] == [1]
    assert result["cost"]["images_seen"] == config.batch_size
    assert result["cost"]["flops"] > result["metrics"]["parameters"]
    if hasattr(script, "sample"):
        picture(config.out / "step-00001.png", config.size)
    model = load(config.out)
    for field in fields(model.config):
        if hasattr(config, field.name):
            assert getattr(model.config, field.name) == getattr(config, field.name)
    assert all(p.isfinite().all() for p in model.parameters())

    if not hasattr(script, "sample"):
        return
    options = {"count": 1, "out": tmp_path / "drawn.png", "data": config.data}
    if name == "vq":
        options["size"] = config.size
    if "start" in {field.name for field in fields(script.SampleOptions)}:
        options["start"] = "half"
    drawn = script.sample(str(config.out), script.SampleOptions(**options))
    picture(drawn, config.size)


def test_averaged_weights_are_kept_and_evaluated(tmp_path):
    kept, losses = [], []
    for ema in (0.0, 0.9):
        config = replace(SCRIPTS["pixelgpt"].PRESETS["test"], ema=ema,
                         precision="float32", out=tmp_path / str(ema))
        losses.append(SCRIPTS["pixelgpt"].main(config)["metrics"]["val_loss"])
        kept.append(load(config.out))
    # an average follows the weights, some steps behind
    start, live, average = (torch.cat([p.flatten() for p in model.parameters()])
                            for model in (initial(config), *kept))
    assert 0 < (average - start).norm() < (live - start).norm()
    assert losses[0] != losses[1]


def initial(config):
    torch.manual_seed(config.seed)
    return PixelGPT(config.select(PixelGPTConfig))


@pytest.mark.parametrize(("kind", "config", "millions"), [
    (PixelGPT, SCRIPTS["pixelgpt"].PRESETS["full"].select(PixelGPTConfig), 1.84),
    (PatchGPT, SCRIPTS["patchgpt"].PRESETS["paper"].select(PatchGPTConfig), 19.1),
    (ImageGPT, imagegpt.PRESETS["paper"].select(  # LlamaGen-B has 111 million
        ImageGPTConfig, codebook_size=16384, height=16, width=16, classes=1000), 111),
    (VQModel, vq.PRESETS["paper"].select(VQConfig), 71.9),
], ids=lambda value: getattr(value, "__name__", ""))
def test_sizes(kind, config, millions):
    with torch.device("meta"):
        count = sum(p.numel() for p in kind(config).parameters())
    assert count / 1e6 == pytest.approx(millions, rel=0.01)
