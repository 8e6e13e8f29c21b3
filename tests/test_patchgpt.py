"""Patches, the three heads, and the transformer over them: properties, and equality with the document and with SciPy."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import stats
from torch import nn
from torch.testing import assert_close

from minigen.__main__ import main
from minigen.data import Item, load_dataset
from minigen.patchgpt import (
    BIN,
    GaussianMixtureHead,
    LogisticMixtureHead,
    PatchGPT,
    PatchGPTConfig,
    drift,
    log_mass,
    log_normal_cdf,
    next_patch_error,
    next_patch_loss,
    patchify,
    to_8_bits,
    unpatchify,
)
from minigen.train import patchgpt as script
from minigen.training import evaluate, load_checkpoint, shipped_result

ROOT = Path(__file__).resolve().parents[1]
SMALL = PatchGPTConfig(height=8, width=12, patch_size=2, mixtures=3, depth=2, heads=2, dim=16)
VARIANTS = {
    "mse": replace(SMALL, head="mse"),
    "gaussian": replace(SMALL, head="gaussian"),
    "logistic": replace(SMALL, head="logistic"),
    "independent": replace(SMALL, head="logistic", neighbours=False, above=False, positions="learned", bias=True),
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(batch=3, height=8, width=12):
    return torch.randint(256, (batch, 3, height, width), generator=generator()) / 255


def item(pictures):
    return Item(pictures, torch.zeros(len(pictures)), [""] * len(pictures))


GREY = (torch.full((12,), 0.5), torch.full((12,), 0.5))  # the patches around one of 2 x 2 pixels that stands alone


def around(batch, seed=5):
    """Patches (B, 12) to stand on the left of patches and above them."""
    return tuple(torch.randint(256, (2, batch, 12), generator=generator(seed)) / 255)


def large(model):
    """Give a model large weights, so that errors are not hidden by almost constant outputs."""
    torch.manual_seed(1)
    for p in model.transformer.parameters():
        nn.init.normal_(p, std=0.3) if p.ndim == 2 else None
    nn.init.normal_(model.start)
    nn.init.normal_(model.embed.weight, std=0.3)
    return model.eval()


@pytest.fixture(params=VARIANTS)
def model(request):
    torch.manual_seed(0)
    return large(PatchGPT(VARIANTS[request.param]))


# --- patches


def document_patchify(img, patch_size):
    B, C, H, W = img.shape
    patches = img.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)
    patches = patches.contiguous().view(B, C, -1, patch_size, patch_size)
    patches = patches.permute(0, 2, 1, 3, 4)
    return patches.reshape(B, -1, C * patch_size * patch_size)


@pytest.mark.parametrize("batch, channels, height, width, patch", [
    (2, 3, 8, 8, 4), (1, 3, 8, 12, 4), (3, 1, 6, 4, 2), (2, 4, 5, 15, 5), (1, 3, 4, 4, 1), (2, 2, 6, 6, 6),
])
def test_patches_are_the_documents_and_come_back(batch, channels, height, width, patch):
    x = torch.rand(batch, channels, height, width)
    patches = patchify(x, patch)
    assert patches.shape == (batch, height * width // patch**2, channels * patch**2)
    assert torch.equal(patches, document_patchify(x, patch))
    assert torch.equal(unpatchify(patches, patch, height, width), x)


def test_gradients_pass_through_patches():
    x = torch.rand(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(2, 6, 12, dtype=torch.float64)
    (patchify(x, 2) * weights).sum().backward()
    assert_close(x.grad, unpatchify(weights, 2, 4, 6))


# --- the mass of a bin


@pytest.mark.parametrize("log_cdf, theirs", [(F.logsigmoid, stats.logistic), (log_normal_cdf, stats.norm)],
                         ids=["logistic", "gaussian"])
@pytest.mark.parametrize("log_scale", [-7, -5, -3, -1, 0, 2])
def test_mass_of_a_bin_against_scipy(log_cdf, theirs, log_scale):
    values, mean = torch.linspace(-1, 1, 256), torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.1, 0.999, 1.5])[:, None]
    ours = log_mass(values, mean, torch.tensor(float(log_scale)), log_cdf)
    assert ours.isfinite().all()
    assert_close(ours.exp().sum(1), torch.ones(7), rtol=0, atol=2e-4)
    # in float64, on the side of the mean where nothing is lost
    v, m, scale = values.double().numpy(), mean.double().numpy(), math.exp(log_scale)
    up, down = (v - m + BIN / 2) / scale, (v - m - BIN / 2) / scale
    mass = np.where(v < m, theirs.cdf(up) - theirs.cdf(down), theirs.sf(down) - theirs.sf(up))
    mass[:, 0], mass[:, -1] = theirs.cdf(up)[:, 0], theirs.sf(down)[:, -1]
    seen = mass > 1e-200
    assert seen.sum() > 10
    relative = np.abs(ours.exp().double().numpy() - mass)
    assert (relative <= 1e-3 * mass + 1e-30).all()
    assert_close(ours.double()[seen], torch.from_numpy(np.log(mass[seen])), rtol=1e-4, atol=1e-3)


def test_normal_cdf_and_its_gradient_far_out():
    z = torch.tensor([5.0, 0.0, -3.0, -9.99, -10.01, -30.0, -1e3, -1e4, -1e6], requires_grad=True)
    value = log_normal_cdf(z)
    value.sum().backward()
    x = z.detach().double().numpy()
    assert_close(value.detach().double(), torch.from_numpy(stats.norm.logcdf(x)), rtol=1e-5, atol=1e-7)
    hazard = np.exp(stats.norm.logpdf(x) - stats.norm.logcdf(x))
    hazard[-3:] = -x[-3:]  # to within 1 / x
    assert_close(z.grad.double(), torch.from_numpy(hazard), rtol=1e-4, atol=0)


@pytest.mark.parametrize("head", ["gaussian", "logistic", "independent", "mse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_outputs_are_too_wild(head, dtype):
    """Loss and gradients stay finite for outputs that no sane model gives, at the ends of the scale and between."""
    head = PatchGPT(VARIANTS[head]).head
    patches = torch.stack([torch.zeros(12), torch.ones(12), torch.full((12,), 127 / 255), *patchify(images(), 2).flatten(0, 1)[:20]])
    for scale in (0.0, 1.0, 10.0, 100.0, 1000.0):
        outputs = (scale * torch.randn(len(patches), head.out.out_features, generator=generator())).to(dtype).requires_grad_()
        loss = head.loss(outputs, patches, around(len(patches)))
        loss.backward()
        assert loss.isfinite() and outputs.grad.isfinite().all(), scale
        drawn = head.draw(outputs.detach(), around(len(patches)), generator=generator())
        assert drawn.isfinite().all() and drawn.min() >= 0 and drawn.max() <= 1


def test_gaussian_mixture_against_scipy():
    torch.manual_seed(0)
    head = GaussianMixtureHead(SMALL)
    outputs, patches = torch.randn(5, head.out.out_features), patchify(images(1), 2)[0, :5]
    logits, mean, log_scale = (part.double().numpy() for part in head.parts(outputs))
    x = 2 * patches.double().numpy() - 1
    for b in range(5):
        p = 0.0
        for k in range(3):
            each = stats.norm(mean[b, k], np.exp(log_scale[b, k].clip(-7, 2)))
            mass = each.cdf(x[b] + BIN / 2) - each.cdf(x[b] - BIN / 2)
            mass = np.where(x[b] < -0.999, each.cdf(x[b] + BIN / 2), np.where(x[b] > 0.999, each.sf(x[b] - BIN / 2), mass))
            p += np.exp(logits[b, k]) / np.exp(logits[b]).sum() * mass.prod()
        assert head.log_prob(outputs, patches, GREY)[b].item() == pytest.approx(np.log(p), abs=1e-3)
    assert_close(head.loss(outputs, patches, GREY), -head.log_prob(outputs, patches, GREY).mean() / 12)


@pytest.mark.parametrize("neighbours", [True, False])
def test_logistic_mixture_against_scipy(neighbours):
    """Pixel by pixel and channel by channel, as the sections of PixelCNN++ say, in plain loops."""
    torch.manual_seed(0)
    head = LogisticMixtureHead(replace(SMALL, neighbours=neighbours))
    outputs, patches, beside = torch.randn(4, head.out.out_features), patchify(images(1), 2)[0, 4:8], around(4)
    logits, mean, log_scale, channel, *coefficients = (part.double().numpy() for part in head.parts(outputs))
    for b in range(4):
        x, log_p = 2 * patches[b].double().numpy().reshape(3, 2, 2) - 1, 0.0
        left, above = (2 * patch[b].double().numpy().reshape(3, 2, 2) - 1 for patch in beside)
        for n, (i, j) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
            p = 0.0
            for k in range(3):
                m = mean[b, n, k].copy()
                if neighbours:
                    m += coefficients[0][b, n, k] * (x[:, i, j - 1] if j else left[:, i, -1])
                    m += coefficients[1][b, n, k] * (x[:, i - 1, j] if i else above[:, -1, j])
                r, g, _ = x[:, i, j]
                m[1] += channel[b, n, k, 0] * r
                m[2] += channel[b, n, k, 1] * r + channel[b, n, k, 2] * g
                product = 1.0
                for c in range(3):
                    each = stats.logistic(m[c], np.exp(log_scale[b, n, k, c].clip(-7, 2)))
                    lower = -np.inf if x[c, i, j] < -0.999 else x[c, i, j] - BIN / 2
                    upper = np.inf if x[c, i, j] > 0.999 else x[c, i, j] + BIN / 2
                    product *= each.cdf(upper) - each.cdf(lower)
                p += np.exp(logits[b, n, k, 0]) / np.exp(logits[b, n, :, 0]).sum() * product
            log_p += np.log(p)
        assert head.log_prob(outputs, patches, beside)[b].item() == pytest.approx(log_p, abs=1e-3)


@pytest.mark.parametrize("kind", [GaussianMixtureHead, LogisticMixtureHead])
def test_draws_have_the_probability_that_the_loss_says(kind):
    """For any other distribution q, the mean of q(x)/p(x) over draws x of p is 1."""
    torch.manual_seed(0)
    head = kind(replace(SMALL, patch_size=2, mixtures=2))
    count = 20_000
    outputs = head.out.bias.detach() + 0.3 * torch.randn(head.out.out_features)
    nearby = outputs + 0.05 * torch.randn(head.out.out_features)
    beside = tuple(patch.expand(count, -1) for patch in around(1))
    x = head.draw(outputs.expand(count, -1), beside, generator=generator())
    ratio = (head.log_prob(nearby.expand(count, -1), x, beside) - head.log_prob(outputs.expand(count, -1), x, beside)).exp()
    error = ratio.std() / count**0.5
    assert error < 0.05 and abs(ratio.mean() - 1) < 4 * error
    # and the draws' mean is the expected patch, where the ends of the scale cut off nothing
    narrow = head.out.bias.detach() + 0.1 * torch.randn(head.out.out_features)
    head.parts(narrow)[1].mul_(0.4)
    head.parts(narrow)[2].fill_(-4)
    x = head.draw(narrow.expand(count, -1), beside, generator=generator())
    assert_close(x.mean(0), head.mean(narrow[None], around(1))[0], rtol=0, atol=0.01)


@pytest.mark.parametrize("name", ["gaussian", "logistic", "independent"])
def test_temperature(name):
    torch.manual_seed(0)
    head = PatchGPT(VARIANTS[name]).head
    outputs = (head.out.bias.detach() + 0.3 * torch.randn(head.out.out_features)).expand(500, -1)
    beside = tuple(patch.expand(500, -1) for patch in around(1))
    spread = [head.draw(outputs, beside, t, generator()).std(0).mean().item() for t in (0.0, 0.3, 1.0)]
    assert spread[0] == 0 and 0 < spread[1] < spread[2]
    x = head.draw(outputs, beside, 1.0, generator())
    assert_close((x * 255).round() / 255, x, rtol=0, atol=1e-6)  # 8-bit values
    assert torch.equal(x, head.draw(outputs, beside, 1.0, generator())) and not torch.equal(x, head.draw(outputs, beside, 1.0, generator(1)))


def test_to_8_bits():
    grid = torch.arange(256) / 255
    assert_close(to_8_bits(2 * grid - 1) / 2 + 0.5, grid)
    assert to_8_bits(torch.tensor([-3.0, 3.0])).tolist() == [-1, 1]


# --- the transformer


@pytest.mark.parametrize("place", [0, 11, 22])
def test_nothing_up_to_a_changed_patch_changes(model, place):
    a = model.encode(images())[:, :-1]
    b = a.clone()
    b[:, place] = 1 - b[:, place]
    assert_close(model(a)[:, : place + 1], model(b)[:, : place + 1], rtol=0, atol=0)  # place 0 has the start
    assert (model(a)[:, place + 1 :] != model(b)[:, place + 1 :]).flatten(2).any(dim=-1).all(), "what follows must change"


def test_pictures_of_a_batch_do_not_see_each_other(model):
    a = model.encode(images())[:, :-1]
    assert_close(model(a)[1:2], model(a[1:2]), rtol=1e-4, atol=1e-5)


def test_the_patches_around_a_patch(model):
    """On the left and above, in the picture; grey outside of it."""
    patches = model.encode(images())
    left, above = (side.unflatten(1, (4, 6)) for side in model.around(patches[:, :-1]))
    grid = patches.unflatten(1, (4, 6))
    assert torch.equal(left[:, :, 1:], grid[:, :, :-1]) and (left[:, :, 0] == 0.5).all()
    assert torch.equal(above[:, 1:], grid[:, :-1]) and (above[:, 0] == 0.5).all()
    assert [side.shape[1] for side in model.around(patches[:, :3])] == [4, 4]


def test_the_start_is_learned(model):
    patches = model.encode(images())
    assert model(patches[:, :0]).shape[1] == 1 and model(patches[:, :-1]).shape[1] == 24
    model.head.loss(model(patches[:, :0]), patches[:, :1], model.around(patches[:, :0])).backward()
    assert model.start.grad.abs().min() > 0


@pytest.mark.parametrize("given", [0, 1, 12, 23])
def test_cached_drawing_equals_uncached(model, given):
    prompt = model.encode(images())[:, :given] if given else 3
    cached, plain = (model.draw(prompt, generator=generator(), use_cache=use) for use in (True, False))
    different = (cached - plain).abs() > 1e-4
    if model.config.head == "mse":
        assert not different.any()
    else:  # values are rounded to 8 bits, so that a difference of 1e-7 may decide
        assert different.float().mean() < 0.02 and (cached - plain).abs().max() < 1.5 / 255


def test_draws_pictures_from_any_beginning(model):
    x = images()
    for prompt, rows in ((2, 0), (model.encode(x)[:, :1], 0), (model.encode(x[:, :, :4]), 4)):
        drawn = model.draw(prompt, generator=generator())
        assert drawn.shape == (prompt if isinstance(prompt, int) else 3, 3, 8, 12)
        assert 0 <= drawn.min() and drawn.max() <= 1 and torch.equal(drawn[:, :, :rows], x[: len(drawn), :, :rows])
        again, other = (model.draw(prompt, generator=generator(seed)) for seed in (0, 1))
        assert torch.equal(again, drawn) and torch.equal(other, drawn) == (model.config.head == "mse")


def test_stream_grows_patch_by_patch(model):
    prompt = model.encode(images())[:, :2]
    canvases = [c.clone() for c in model.draw_stream(prompt, blank=0.123, generator=generator())]
    assert len(canvases) == 22
    for n, canvas in enumerate(canvases, start=3):
        blank = (model.encode(canvas) == 0.123).all(-1)
        assert (blank == (torch.arange(24) >= n)).all()
    assert torch.equal(canvases[-1], model.draw(prompt, generator=generator()))


def test_drawing_leaves_the_mode_alone(model):
    model.train()
    model.draw(1)
    drift(model, images(), 4)
    assert model.training


def test_half_precision(model):
    x = item(images())
    whole = next_patch_loss(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        half = next_patch_loss(model, x)
    assert half.dtype == torch.float32 and half.item() == pytest.approx(whole.item(), rel=0.05)
    drawn = model.bfloat16().draw(2, generator=generator())
    assert drawn.dtype == torch.float32 and drawn.isfinite().all()


def test_noise_is_for_training_only():
    torch.manual_seed(0)
    model = PatchGPT(replace(SMALL, noise=0.2))
    patches = model.encode(images())[:, :-1]
    assert not torch.equal(model(patches), model(patches))
    assert torch.equal(model(patches)[:, 0], model(patches)[:, 0]), "the start has none"
    model.eval()
    assert torch.equal(model(patches), model(patches))


def test_loss_and_error(model):
    x = images()
    patches, loss = model.encode(x), next_patch_loss(model, item(x))
    outputs = torch.cat([model(patches[:, :t])[:, -1:] for t in range(24)], dim=1)  # one by one
    beside = [torch.stack([side[:, t] for t in range(24)], dim=1) for side in model.around(patches[:, :-1])]
    assert_close(loss, model.head.loss(outputs, patches, beside), rtol=1e-4, atol=1e-5)
    error = next_patch_error(model, item(x))
    assert_close(error, (model.head.mean(outputs, beside) - patches).square().mean(), rtol=1e-4, atol=1e-5)
    forced, free = drift(model, x, 4, generator())
    assert forced.shape == free.shape == (20,)
    assert_close(forced, 255 * (model.head.mean(outputs, beside) - patches)[:, 4:].square().mean(dim=(0, 2)).sqrt(), rtol=1e-3, atol=1e-2)
    if model.config.head == "mse":
        assert free[0] == pytest.approx(forced[0].item(), rel=1e-4), "the first patch follows real ones either way"


@pytest.mark.parametrize("name", VARIANTS)
def test_learns_two_pictures_by_heart(name):
    torch.manual_seed(0)
    model = PatchGPT(replace(VARIANTS[name], height=4, width=6, dim=64, heads=4, noise=0.02))
    x = images(2, 4, 6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    start = next_patch_loss(model, item(x)).item()
    for _ in range(300):
        next_patch_loss(model, item(x)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    end = next_patch_loss(model, item(x)).item()
    assert end < 0.2 * start if name == "mse" else end < start - 1.5, "nats a value"
    # which of the two it is can be seen from the first patch on
    drawn = model.draw(model.encode(x)[:, :1], temperature=0.0)
    apart = (x[0] - x[1]).square().mean().item()
    assert (drawn - x).square().mean().item() < 0.1 * apart


@pytest.mark.parametrize("log_scale", [-4.0, -1.0, 2.0])
def test_no_distribution_codes_uniform_values_in_less_than_8_bits(log_scale):
    """Gibbs' inequality: over all 256 values alike, the mean of -log2 p is at least 8."""
    torch.manual_seed(0)
    head = GaussianMixtureHead(replace(SMALL, mixtures=1))
    outputs = torch.rand(1, head.out.out_features) - 0.5
    head.parts(outputs)[2].fill_(log_scale)
    every = torch.arange(256).repeat_interleave(12).view(256, 12) / 255
    bits = -head.log_prob(outputs.expand(256, -1), every, GREY).mean() / 12 / math.log(2)
    assert bits >= 8


# --- files, scripts


def test_save_and_load(tmp_path, model):
    model.save_pretrained(tmp_path)
    loaded = PatchGPT.from_pretrained(tmp_path).eval()
    assert loaded.config == model.config
    patches = model.encode(images())[:, :-1]
    assert_close(loaded(patches), model(patches), rtol=0, atol=0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("patchgpt")
    for head, neighbours, noise in (("mse", True, 0.1), ("gaussian", True, 0.0), ("logistic", True, 0.0), ("logistic", False, 0.1)):
        out = folder / f"{head}-{neighbours}"
        script.main(replace(script.PRESETS["test"], head=head, neighbours=neighbours, noise=noise, out=out))
    return folder


def test_script_writes_checkpoint_pictures_and_result(trained):
    for out in trained.iterdir():
        names = {p.name for p in out.iterdir()}
        assert names == {"model.safetensors", "config.json", "result.json", "log.jsonl", "step-00001.png", "step-00003.png"}
        result = json.loads((out / "result.json").read_text())
        assert [h["step"] for h in result["history"]] == [1, 3] and result["minutes"] >= 0
        metrics = result["metrics"]
        assert ("bits_per_dimension" in metrics) == (not out.name.startswith("mse"))
        if "bits_per_dimension" in metrics:
            assert 2 < metrics["bits_per_dimension"] < 16
        else:
            assert metrics["error_in_levels"] == pytest.approx(255 * metrics["val_loss"] ** 0.5, rel=1e-2)
        assert len(result["drift"]["after_real_patches"]) == len(result["drift"]["after_drawn_patches"]) == 8
        model = load_checkpoint(PatchGPT, out)
        assert model.config.head == result["config"]["head"] and model.config.noise == result["config"]["noise"]


@pytest.mark.parametrize("start", ["nothing", "patch", "half"])
def test_sample_from_any_start(trained, tmp_path, monkeypatch, start):
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png"):
        assert main(["sample", str(trained / "logistic-True"), "--start", start, "--count", "5", "--columns", "5", "--scale", "1",
                     "--out", name]) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert Image.open("a.png").size == (5 * 17 - 1, 16)


def test_a_run_is_the_same_twice(trained, tmp_path):
    out = tmp_path / "again"
    command = json.loads((trained / "logistic-False/result.json").read_text())["command"]
    assert command == "python -m minigen train patchgpt --preset test --no-neighbours --noise 0.1"
    assert main([*command.split()[3:], "--out", str(out)]) == 0
    assert (out / "model.safetensors").read_bytes() == (trained / "logistic-False/model.safetensors").read_bytes()
    assert (out / "step-00003.png").read_bytes() == (trained / "logistic-False/step-00003.png").read_bytes()


def test_two_processes_share_batches_of_pictures(tmp_path):
    histories = []
    for launch in (["minigen"], ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "minigen"]):
        done = subprocess.run([sys.executable, "-m", *launch, "train", "patchgpt", "--preset", "test", "--precision", "float32", "--out", "run"],
                              cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        histories.append(json.loads((tmp_path / "run/result.json").read_text())["history"])
        (tmp_path / "run").rename(tmp_path / f"run-{len(histories)}")
    for a, b in zip(*histories, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4) and a["val_loss"] == pytest.approx(b["val_loss"], rel=1e-4)


@pytest.mark.parametrize("checkpoint", sorted((ROOT / "data/checkpoints").glob("patchgpt-*")), ids=lambda path: path.name)
def test_shipped_checkpoints_give_the_figures_of_their_result(checkpoint):
    about = shipped_result(checkpoint)
    config = about["config"]
    val = load_dataset(config["data"], config["size"], "val", config["val_images"], seed=config["seed"])
    model = load_checkpoint(PatchGPT, checkpoint)
    loss = evaluate(model, val, next_patch_loss, config["batch_size"])
    error = 255 * evaluate(model, val, next_patch_error, config["batch_size"]) ** 0.5
    assert loss == pytest.approx(about["metrics"]["val_loss"], rel=2e-3)
    assert error == pytest.approx(about["metrics"]["error_in_levels"], rel=2e-3)


def test_bench(capsys):
    assert main(["bench", "patchgpt", "--quick", "--json"]) == 0
    rows = {row["case"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    for case, row in rows.items():
        if "difference" in case:
            assert row["value"] < 1e-4, case
        elif "document's loop" in case or "chapter 1" in case:
            assert row["value"] > 2, case
    assert sum("against the same in plain PyTorch" in case for case in rows) == 1


# --- bad input


@pytest.mark.parametrize("make, message", [
    (lambda: patchify(torch.rand(1, 3, 30, 32), 4), r"side 4 do not tile a picture of 30 x 32: sides that do are \[1, 2\]; or cut .* 28 x 32"),
    (lambda: patchify(torch.rand(1, 3, 8, 8), 16), r"side 16 do not tile a picture of 8 x 8: sides that do are \[1, 2, 4, 8\]$"),
    (lambda: patchify(torch.rand(1, 3, 8, 8), 0), "side 0 do not tile"),
    (lambda: patchify(torch.rand(3, 8, 8), 4), r"\(B, C, H, W\), found shape \(3, 8, 8\)"),
    (lambda: patchify(torch.rand(0, 3, 8, 8), 4), r"at least one image.*\(0, 3, 8, 8\)"),
    (lambda: unpatchify(torch.rand(1, 63, 48), 4, 32, 32), "32 x 32 has 64 patches of side 4, found 63"),
    (lambda: unpatchify(torch.rand(1, 64, 50), 4, 32, 32), "16 values for each channel, found 50"),
    (lambda: unpatchify(torch.rand(1, 64, 48), 4, 30, 32), "do not tile a picture of 30 x 32"),
    (lambda: PatchGPTConfig(height=30), r"side 4 do not tile a picture of 30 x 64: sides that do are \[1, 2\]"),
    (lambda: PatchGPTConfig(head="softmax"), "no head 'softmax'; there are mse, gaussian, logistic"),
    (lambda: PatchGPTConfig(mixtures=0), "at least 1 component, found mixtures=0"),
    (lambda: PatchGPT(SMALL).encode(torch.rand(1, 1, 8, 12)), r"3 channels.*found shape \(1, 1, 8, 12\); a grey"),
    (lambda: PatchGPT(SMALL).encode(torch.rand(1, 3, 8, 8)), "pictures of 8 x 12 pixels, found images of 8 x 8"),
    (lambda: PatchGPT(SMALL).encode(torch.rand(1, 3, 10, 12)), "found images of 10 x 12"),
    (lambda: PatchGPT(SMALL)(torch.rand(0, 3, 12)), r"at least one sequence.*found shape \(0, 3, 12\)"),
    (lambda: PatchGPT(SMALL)(torch.rand(1, 3, 48)), r"patches of 12 values.*found shape \(1, 3, 48\)"),
    (lambda: PatchGPT(SMALL)(torch.rand(1, 24, 12)), "has 24 patches, so at most 23 .* found 24"),
    (lambda: PatchGPT(SMALL).draw(torch.rand(1, 24, 12)), "has 24 patches, so at most 23 .* found 24"),
    (lambda: PatchGPT(SMALL).draw(torch.rand(1, 3, 48)), r"patches of 12 values.*found shape \(1, 3, 48\)"),
    (lambda: PatchGPT(SMALL).draw(0), "at least one picture, found 0"),
    (lambda: PatchGPT(VARIANTS["logistic"]).draw(1, temperature=-1.0), "negative, found -1"),
])
def test_bad_input_is_a_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_mistakes_on_the_command_line_are_one_sentence(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "patchgpt", "--preset", "test", "--patch-size", "5"]) == 2
    error = capsys.readouterr().err
    assert re.search(r"side 5 do not tile a picture of 16 x 16: sides that do are \[1, 2, 4, 8, 16\]", error) and "Traceback" not in error
