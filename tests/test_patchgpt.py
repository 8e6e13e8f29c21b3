"""Patches, the three heads, and what `PatchGPT` reads; `test_models` has the rest."""

import itertools
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import stats
from torch import nn
from torch.testing import assert_close

from minigen.__main__ import main
from minigen.checkpoints import SHIPPED, load
from minigen.data import load_dataset
from minigen.patchgpt import (
    BIN,
    HEADS,
    LogisticMixtureHead,
    PatchGPT,
    PatchGPTConfig,
    exposure_bias,
    log_mass,
    log_normal_cdf,
    next_patch_error,
    next_patch_loss,
    patchify,
    quantize,
    unpatchify,
)
from minigen.runs import shipped_result
from minigen.sampling import Guidance
from minigen.train import patchgpt as script
from minigen.training import evaluate

SMALL = PatchGPTConfig(
    height=8, width=12, patch_size=2, mixtures=3, depth=2, heads=2, dim=16)
VARIANTS = {
    "mse": replace(SMALL, head="mse"),
    "gaussian": replace(SMALL, head="gaussian"),
    "logistic": replace(SMALL, head="logistic"),
    "neighbors": replace(SMALL, head="logistic", shared=False),
    "independent": replace(SMALL, head="logistic", neighbors=False, shared=False,
                           above=False, positions="learned", bias=True),
    "classes": replace(SMALL, head="logistic", classes=3),
}
GRAY = (torch.full((12,), 0.5),) * 2  # around a patch that stands alone


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(batch=3, height=8, width=12):
    return torch.randint(256, (batch, 3, height, width), generator=generator()) / 255


def item(x):
    return SimpleNamespace(image=x, label=torch.arange(len(x)) % 3)


def labels_of(model, batch):
    return torch.arange(batch) % 3 if model.config.classes else None


def context(batch):
    """Patches (B, 12) to the left of patches and above them."""
    return tuple(torch.randint(256, (2, batch, 12), generator=generator(5)) / 255)


def make_head(name, **changes):
    torch.manual_seed(0)
    config = replace(VARIANTS[name], **changes)
    return HEADS[config.head](config)


def named_parts(head, outputs):
    """Views of a mixture's logits (a list), means and log scales."""
    logits = 2 if isinstance(head, LogisticMixtureHead) else 1
    parts = head.parts(outputs)
    return parts[:logits], parts[logits], parts[logits + 1]


@pytest.fixture(params=VARIANTS)
def model(request):
    """Large weights, so that errors are not hidden by almost constant outputs."""
    torch.manual_seed(1)
    model = PatchGPT(VARIANTS[request.param])
    for name, p in model.named_parameters():
        if not name.startswith("head") and (p.ndim == 2 or name == "start"):
            nn.init.normal_(p, std=0.3)
    return model.eval()


# --- patches


@pytest.mark.parametrize(("shape", "P"), [
    ((2, 3, 8, 8), 4), ((1, 3, 8, 12), 4), ((3, 1, 6, 4), 2), ((2, 4, 5, 15), 5),
    ((1, 3, 4, 4), 1), ((2, 2, 6, 6), 6),
])
def test_patches_are_the_squares_of_an_image_and_come_back(shape, P):
    x, (height, width) = torch.rand(shape), shape[2:]
    squares = [x[:, :, i : i + P, j : j + P].flatten(1)
               for i in range(0, height, P) for j in range(0, width, P)]
    patches = patchify(x, P)
    assert torch.equal(patches, torch.stack(squares, dim=1))
    assert torch.equal(unpatchify(patches, P, height, width), x)


# --- the mass of a bin


@pytest.mark.parametrize("log_scale", [-7, -5, -3, -1, 0, 2])
@pytest.mark.parametrize(("log_cdf", "theirs"), [
    pytest.param(F.logsigmoid, stats.logistic, id="logistic"),
    pytest.param(log_normal_cdf, stats.norm, id="gaussian"),
])
def test_mass_of_a_bin_against_scipy(log_cdf, theirs, log_scale):
    values = torch.linspace(-1, 1, 256)
    mean = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.1, 0.999, 1.5])[:, None]
    ours = log_mass(values, mean, torch.tensor(float(log_scale)), log_cdf)
    assert ours.isfinite().all()
    assert_close(ours.exp().sum(1), torch.ones(7), rtol=0, atol=2e-4)
    # in float64, on the side of the mean where nothing is lost
    v, m, scale = values.double().numpy(), mean.double().numpy(), math.exp(log_scale)
    up, down = (v - m + BIN / 2) / scale, (v - m - BIN / 2) / scale
    mass = np.where(v < m, theirs.cdf(up) - theirs.cdf(down),
                    theirs.sf(down) - theirs.sf(up))
    mass[:, 0], mass[:, -1] = theirs.cdf(up)[:, 0], theirs.sf(down)[:, -1]
    seen = mass > 1e-200
    assert seen.sum() > 10
    assert (np.abs(ours.exp().double().numpy() - mass) <= 1e-3 * mass + 1e-30).all()
    expected = torch.from_numpy(np.log(mass[seen]))
    assert_close(ours.double()[seen], expected, rtol=1e-4, atol=1e-3)


def test_normal_cdf_and_its_gradient_far_out():
    z = torch.tensor([5.0, 0.0, -3.0, -9.99, -10.01, -30.0, -1e3, -1e4, -1e6],
                     requires_grad=True)
    value = log_normal_cdf(z)
    value.sum().backward()
    x = z.detach().double().numpy()
    expected = torch.from_numpy(stats.norm.logcdf(x))
    assert_close(value.detach().double(), expected, rtol=1e-5, atol=1e-7)
    hazard = np.exp(stats.norm.logpdf(x) - stats.norm.logcdf(x))
    hazard[-3:] = -x[-3:]  # to within 1 / x
    assert_close(z.grad.double(), torch.from_numpy(hazard), rtol=1e-4, atol=0)


def test_quantize():
    grid = torch.arange(256) / 255
    assert_close(quantize(2 * grid - 1) / 2 + 0.5, grid)
    assert quantize(torch.tensor([-3.0, 3.0])).tolist() == [-1, 1]


# --- the heads


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_outputs_are_too_wild(name, dtype):
    """Loss and gradients stay finite for outputs that no sane model gives."""
    head = make_head(name)
    ends = [torch.full((12,), value) for value in (0.0, 1.0, 127 / 255)]
    patches = torch.stack([*ends, *patchify(images(), 2).flatten(0, 1)[:20]])
    around, shape = context(len(patches)), (len(patches), head.out.out_features)
    for scale in (0.0, 1.0, 10.0, 100.0, 1000.0):
        outputs = scale * torch.randn(shape, generator=generator())
        outputs = outputs.to(dtype).requires_grad_()
        loss = head.loss(outputs, patches, around)
        loss.backward()
        assert loss.isfinite(), scale
        assert outputs.grad.isfinite().all(), scale
        drawn = head.sample(outputs.detach(), around, generator=generator())
        assert drawn.isfinite().all()
        assert 0 <= drawn.min() <= drawn.max() <= 1


def mass(distribution, x):
    """The probability of 8-bit values x in [-1, 1], in float64."""
    lower = np.where(x < -0.999, -np.inf, x - BIN / 2)
    upper = np.where(x > 0.999, np.inf, x + BIN / 2)
    return distribution.cdf(upper) - distribution.cdf(lower)


def weighted(logits, probabilities):
    return (np.exp(logits) / np.exp(logits).sum() * probabilities).sum()


def test_gaussian_mixture_against_scipy():
    head, patches = make_head("gaussian"), patchify(images(1), 2)[0, :5]
    outputs = torch.randn(5, head.out.out_features)
    logits, mean, log_scale = (x.double().numpy() for x in head.parts(outputs))
    log_prob = head.log_prob(outputs, patches, GRAY)
    for b, x in enumerate(2 * patches.double().numpy() - 1):
        gaussians = stats.norm(mean[b], np.exp(log_scale[b].clip(-7, 2)))
        p = weighted(logits[b], mass(gaussians, x).prod(axis=-1))
        assert log_prob[b].item() == pytest.approx(np.log(p), abs=1e-3)
    assert_close(head.loss(outputs, patches, GRAY), -log_prob.mean() / 12)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("neighbors", [True, False])
def test_logistic_mixture_against_scipy(neighbors, shared):
    """Pixel by pixel and channel by channel, as PixelCNN++ says, in plain loops."""
    head = make_head("logistic", neighbors=neighbors, shared=shared)
    patches, around = patchify(images(1), 2)[0, 4:8], context(4)
    outputs = torch.randn(4, head.out.out_features)
    choice, weights, mean, log_scale, channel, *coefficients = (
        x.double().numpy() for x in head.parts(outputs))
    log_prob = head.log_prob(outputs, patches, around)
    grids = (2 * x.double().numpy().reshape(4, 3, 2, 2) - 1 for x in (patches, *around))
    for b, (x, left, above) in enumerate(zip(*grids, strict=True)):
        pixels = []
        for n, (i, j) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
            m = mean[b, n].copy()                                 # (K, 3)
            if neighbors:
                beside = x[:, i, j - 1] if j else left[:, i, -1]
                higher = x[:, i - 1, j] if i else above[:, -1, j]
                m += coefficients[0][b, n] * beside + coefficients[1][b, n] * higher
            r, g, _ = x[:, i, j]
            m[:, 1] += channel[b, n, :, 0] * r
            m[:, 2] += channel[b, n, :, 1] * r + channel[b, n, :, 2] * g
            logistics = stats.logistic(m, np.exp(log_scale[b, n].clip(-7, 2)))
            p = mass(logistics, x[:, i, j]).prod(axis=-1)         # (K,)
            pixels.append([weighted(logits, p) for logits in weights[b, n].T])
        choices = np.prod(pixels, axis=0)                         # (J,)
        assert len(choices) == (3 if shared else 1)
        p = weighted(choice[b], choices) if shared else choices[0]
        assert log_prob[b].item() == pytest.approx(np.log(p), abs=1e-3)


@pytest.mark.parametrize("name", ["gaussian", "logistic", "neighbors", "independent"])
def test_all_patches_together_have_probability_one(name):
    """Of two gray levels on each side of all means there are 4096 patches."""
    head = make_head(name)
    outputs = 0.0005 * torch.randn(1, head.out.out_features, generator=generator())
    logits, _, log_scale = named_parts(head, outputs)
    for part in logits:
        part.copy_(torch.randn(part.shape, generator=generator()))
    log_scale.fill_(-7)
    every = torch.tensor(list(itertools.product((127, 128), repeat=12))) / 255
    around = tuple(patch.expand(4096, -1) for patch in context(1))
    total = head.log_prob(outputs.expand(4096, -1), every, around).exp().sum()
    assert 0.98 < total <= 1


def learn_a_coin(steps=800, **options):
    """Bits that a head pays for a patch that is one of two, 4 x 4 pixels each."""
    torch.manual_seed(0)
    config = PatchGPTConfig(height=4, width=4, dim=8, **options)
    head, constant = HEADS[config.head](config), torch.ones(2, 8)
    ramp = torch.tensor([0.15, 0.35, 0.8, 0.95]).expand(3, 4, 4)
    coin = torch.stack([ramp, ramp.flip(2)]).mul(255).round().div(255).flatten(1)
    gray = (torch.full((2, 48), 0.5),) * 2
    optimizer = torch.optim.Adam(head.parameters(), lr=0.004)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.01, steps)
    for _ in range(steps):
        loss = head.loss(head(constant), coin, gray)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return loss.item() * 48 / math.log(2)


def test_one_choice_for_a_patch_pays_one_bit_for_a_coin():
    """The narrowest logistic leaves 3 percent of each value's mass to its neighbors."""
    least = 1 - 48 * math.log2(math.tanh(BIN / 4 / math.exp(-7)))
    assert 2.8 < least < 3
    assert least <= learn_a_coin(head="logistic") < least + 0.2
    assert learn_a_coin(head="logistic", shared=False) > least + 5


@pytest.mark.parametrize("name", ["gaussian", "logistic", "neighbors", "independent"])
def test_samples_have_the_probability_that_the_loss_says(name):
    """For any other distribution q, the mean of q(x)/p(x) over samples x of p is 1."""
    head, count = make_head(name, mixtures=2), 20_000
    around = tuple(patch.expand(count, -1) for patch in context(1))
    noise = torch.randn(3, head.out.out_features)
    outputs = (head.out.bias + 0.3 * noise[0]).detach().expand(count, -1)
    nearby = outputs + 0.05 * noise[1]
    x = head.sample(outputs, around, generator=generator())
    q, p = (head.log_prob(y, x, around) for y in (nearby, outputs))
    ratio = (q - p).exp()
    error = ratio.std() / count**0.5
    assert error < 0.05
    assert abs(ratio.mean() - 1) < 4 * error
    # where the ends of the scale cut off nothing, their mean is the expected patch
    narrow = head.out.bias.detach() + 0.1 * noise[2]
    _, mean, log_scale = named_parts(head, narrow)
    mean.mul_(0.4)
    log_scale.fill_(-4)
    x = head.sample(narrow.expand(count, -1), around, generator=generator())
    expected = head.mean(narrow[None], context(1))[0]
    assert_close(x.mean(0), expected, rtol=0, atol=0.01)


@pytest.mark.parametrize("name", ["gaussian", "logistic", "neighbors", "independent"])
def test_temperature(name):
    head = make_head(name)
    outputs = head.out.bias.detach() + 0.3 * torch.randn(head.out.out_features)
    around = tuple(patch.expand(500, -1) for patch in context(1))

    def draw(temperature):
        return head.sample(outputs.expand(500, -1), around, temperature, generator())

    spread = [draw(t).std(0).mean().item() for t in (0.0, 0.3, 1.0)]
    assert spread[0] == 0 < spread[1] < spread[2]
    values = 255 * draw(1.0)
    assert_close(values.round(), values, rtol=0, atol=1e-4)  # they have 8 bits


@pytest.mark.parametrize("log_scale", [-4.0, -1.0, 2.0])
def test_no_distribution_codes_uniform_values_in_less_than_8_bits(log_scale):
    """Gibbs: over all 256 values alike, the mean of -log2 p is at least 8."""
    head = make_head("gaussian", mixtures=1)
    outputs = torch.rand(1, head.out.out_features) - 0.5
    head.parts(outputs)[2].fill_(log_scale)
    every = torch.arange(256).repeat_interleave(12).view(256, 12) / 255
    nats = -head.log_prob(outputs.expand(256, -1), every, GRAY).mean() / 12
    assert nats / math.log(2) >= 8


# --- the transformer


def test_context_and_inputs_of_any_range(model):
    """On the left and above within the image, gray outside; the same in any range."""
    patches = model.encode(images())
    left, above = (x.unflatten(1, (4, 6)) for x in model.context(patches, 0, 24))
    grid = patches.unflatten(1, (4, 6))
    assert torch.equal(left[:, :, 1:], grid[:, :, :-1])
    assert (left[:, :, 0] == 0.5).all()
    assert torch.equal(above[:, 1:], grid[:, :-1])
    assert (above[:, 0] == 0.5).all()
    for start, stop in ((0, 1), (3, 4), (5, 6), (6, 7), (4, 15), (23, 24)):
        for whole, part in zip(model.context(patches, 0, 24),
                               model.context(patches, start, stop), strict=True):
            assert torch.equal(whole[:, start:stop], part)
        whole = model.inputs(patches, 0, 24)[:, start:stop]
        assert_close(model.inputs(patches[:, : stop - 1], start, stop), whole)


def test_an_input_holds_the_patch_before_and_the_one_above(model):
    patches = model.encode(images()).requires_grad_()
    for position in (1, 6, 8, 23):
        x = model.inputs(patches, position, position + 1)
        seen = torch.autograd.grad(x.sum(), patches)[0].abs().sum((0, 2)).nonzero()
        above = [position - 6] if model.config.above and position >= 6 else []
        assert seen.flatten().tolist() == [*above, position - 1]
    none = model.class_embedding.weight[-1]
    assert torch.equal(model.inputs(patches, 0, 1)[1, 0], none)


def test_noise_is_for_training_only():
    torch.manual_seed(0)
    model = PatchGPT(replace(SMALL, noise=0.2))
    patches = model.encode(images())[:, :-1]
    first, second = model(patches), model(patches)
    assert torch.equal(first[:, 0], second[:, 0]), "the start has none"
    assert (first[:, 1:] != second[:, 1:]).any(dim=-1).all()
    model.eval()
    assert torch.equal(model(patches), model(patches))


def test_loss_error_and_exposure_bias(model):
    x = images()
    patches, loss = model.encode(x), next_patch_loss(model, item(x))
    labels = labels_of(model, 3)
    outputs = torch.cat([model(patches[:, :t], labels)[:, -1:] for t in range(24)], 1)
    around = model.context(patches, 0, 24)
    expected = model.head.mean(outputs, around)
    squared = (expected - patches).square()
    assert_close(loss, model.head.loss(outputs, patches, around), rtol=1e-4, atol=1e-5)
    error = next_patch_error(model, item(x))
    assert_close(error, squared.mean(), rtol=1e-4, atol=1e-5)
    # a patch may follow real ones, or those drawn after the first 4
    model.train()
    forced, free = exposure_bias(model, x, 4, generator(), labels)
    assert model.training
    assert forced.shape == free.shape == (20,)
    levels = 255 * squared[:, 4:].mean(dim=(0, 2)).sqrt()
    assert_close(forced, levels, rtol=1e-3, atol=1e-2)
    drawn = model.generate_images(patches[:, :4], labels, generator=generator())
    drawn = model.encode(drawn)
    levels = 255 * (drawn - patches)[:, 4:].square().mean(dim=(0, 2)).sqrt()
    assert_close(free, levels)


def test_images_grow_patch_by_patch(model):
    prompt = model.encode(images())[:, :2]
    stream = model.stream_images(prompt, blank=0.123, generator=generator())
    for n, canvas in enumerate(stream, start=3):
        blank = (model.encode(canvas) == 0.123).all(-1)
        assert (blank == (torch.arange(24) >= n)).all()
    assert n == 24
    assert torch.equal(canvas, model.generate_images(prompt, generator=generator()))
    assert 0 <= canvas.min() <= canvas.max() <= 1


@pytest.mark.parametrize("name", VARIANTS)
def test_learns_two_images_by_heart(name):
    torch.manual_seed(0)
    config = replace(VARIANTS[name], height=4, width=6, dim=64, heads=4, noise=0.02)
    model, x = PatchGPT(config), images(2, 4, 6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(500):
        next_patch_loss(model, item(x)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    # which of the two it is can be seen from the first patch on
    drawn = model.generate_images(model.encode(x)[:, :1], temperature=0.0)
    assert F.mse_loss(drawn, x) < 0.1 * F.mse_loss(x[0], x[1])
    if model.config.classes:  # or is said by the class
        for guidance in (None, Guidance(2.0)):
            drawn = model.generate_images(
                2, torch.tensor([0, 1]), guidance=guidance, temperature=0.0)
            assert F.mse_loss(drawn, x) < 0.1 * F.mse_loss(x[0], x[1])


# --- classes


def with_classes(**options):
    torch.manual_seed(1)
    model = PatchGPT(replace(VARIANTS["classes"], **options))
    nn.init.normal_(model.class_embedding.weight)
    return model


def test_some_labels_are_left_out_in_training():
    patches = images(500, 4, 6).reshape(500, 6, 12)
    model = with_classes(height=4, width=6, class_dropout=0.3)
    labels = torch.zeros(500, dtype=torch.int64)
    with torch.no_grad():
        seen = model(patches[:, :0], labels)[:, 0]
        kept = (seen - model.eval()(patches[:, :0], labels)[:, 0]).abs().amax(1) < 1e-5
        none = (seen - model(patches[:, :0])[:, 0]).abs().amax(1) < 1e-5
    assert (kept ^ none).all()
    assert 0.2 < none.float().mean() < 0.4


@pytest.mark.parametrize("head", ["mse", "gaussian", "logistic"])
def test_guidance_extrapolates_what_the_head_is_given(head):
    """Scale 1 is the model with its classes, and scale 0 the one without."""
    model = with_classes(head=head).eval()
    prompt = model.encode(images())[:, :5]

    def outputs(labels, guidance=None):
        """What the head is given for the patch after the prompt."""
        found, real = [], model.head.sample
        model.head.sample = lambda outputs, *rest: (
            found.append(outputs), torch.zeros(3, 12))[1]
        next(model.stream(prompt, labels, guidance))
        model.head.sample = real
        return found[0]

    labels = torch.tensor([0, 1, 2])
    with_class, without = outputs(labels), outputs(None)
    assert (with_class - without).abs().max() > 1e-3
    assert torch.equal(outputs(labels, Guidance(1.0)), with_class)
    for scale in (0.0, 3.0):
        expected = without + scale * (with_class - without)
        guided = outputs(labels, Guidance(scale))
        assert_close(guided, expected, rtol=1e-3, atol=1e-4)


def test_cache_and_guidance_agree():
    model, labels = with_classes().eval(), torch.tensor([0, 2])
    drawn = [model.generate_images(
        2, labels, guidance=Guidance(2.0, "linear"), generator=generator(),
        use_cache=use)
        for use in (True, False)]
    assert_close(*drawn, rtol=0, atol=2e-2)


# --- files and scripts


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("patchgpt")
    for name, options in {
            "mse": {"head": "mse", "labels": False}, "gaussian": {"head": "gaussian"},
            "independent": {"neighbors": False, "shared": False, "labels": False},
            "classes": {}}.items():
        preset = script.PRESETS["test"]
        script.main(replace(preset, noise=0.1, out=folder / name, **options))
    return folder


@pytest.mark.parametrize("name", ["mse", "gaussian", "independent", "classes"])
def test_script_writes_its_metrics(trained, name):
    result = json.loads((trained / name / "result.json").read_text())
    metrics = result["metrics"]
    if name == "mse":
        levels = 255 * metrics["val_loss"] ** 0.5
        assert metrics["error_in_levels"] == pytest.approx(levels, rel=1e-2)
        assert "bits_per_dimension" not in metrics
    else:
        assert 2 < metrics["bits_per_dimension"] < 16
    assert {"seconds_per_image", "correlation_along_rows"} <= set(metrics)
    assert {"val_error", "row_statistics_distance"} <= set(result["history"][-1])
    errors = result["exposure_bias"]
    assert [*errors] == ["after_real_patches", "after_drawn_patches"]
    assert [len(x) for x in errors.values()] == [8, 8]
    model = load(trained / name, PatchGPT)
    c, expected = model.config, VARIANTS[name]
    assert [c.head, c.neighbors, c.shared, c.noise] == [
        expected.head, expected.neighbors, expected.shared, 0.1]
    labels = name in ("gaussian", "classes")
    assert c.classes == (9 if labels else 0)
    assert (trained / name / "classes.png").exists() == labels
    assert ("bits_per_dimension_without_class" in metrics) == labels
    assert ("seconds_per_image_guided" in metrics) == labels


@pytest.mark.parametrize("start", ["nothing", "patch", "half"])
def test_sample_from_any_start(trained, tmp_path, start):
    file, command = tmp_path / "a.png", ["sample", str(trained / "classes")]
    options = f"--start {start} --count 5 --columns 5 --scale 1 --out {file}"
    assert main([*command, *options.split()]) == 0
    assert Image.open(file).size == (5 * 17 - 1, 16)
    val = load_dataset("landscapes", 16, "val", 1)
    rows, columns = {"nothing": (0, 0), "patch": (4, 4), "half": (8, 16)}[start]
    drawn, real = np.asarray(Image.open(file).convert("RGB")), 255 * val[0].image
    drawn, real = drawn[:rows, :columns], real.permute(1, 2, 0)[:rows, :columns]
    assert np.allclose(drawn, real, atol=1e-3)


def test_draw_takes_any_number_of_images_and_any_class(trained):
    def draw(**options):
        options = script.SampleOptions(**options)
        return script.draw(str(trained / "classes"), options)

    many, labels = draw(count=101, guidance=2.0, seed=3)
    assert many.shape == (101, 3, 16, 16)
    assert torch.equal(labels, torch.arange(101) % 9)
    first, _ = draw(count=100, guidance=2.0, seed=3)
    assert torch.equal(first, many[:100])
    _, labels = draw(count=3, label=4)
    assert labels.tolist() == [4, 4, 4]
    val = load_dataset("landscapes", 16, "val", 3)
    _, labels = draw(count=3, start="half")
    assert labels.tolist() == [item.label for item in val]
    images, labels = script.draw(
        str(trained / "independent"), script.SampleOptions(count=2))
    assert labels is None
    assert images.shape == (2, 3, 16, 16)


def test_the_command_of_a_result_repeats_it(trained, tmp_path):
    old, new = trained / "independent", tmp_path / "again"
    command = json.loads((old / "result.json").read_text())["command"]
    assert command == ("python -m minigen train patchgpt --preset test --no-neighbors "
                       "--no-shared --noise 0.1 --no-labels")
    assert main([*command.split()[3:], "--out", str(new)]) == 0
    for name in ("model.safetensors", "step-00003.png"):
        assert (new / name).read_bytes() == (old / name).read_bytes()


@pytest.mark.parametrize("name", sorted(
    folder.name for folder in SHIPPED.glob("patchgpt-*")
    if folder.name != "patchgpt-cpu-independent"))  # of an earlier form of its head
def test_shipped_checkpoints_give_the_figures_of_their_result(name):
    about, model = shipped_result(name), load(name)
    config, metrics = about["config"], about["metrics"]
    val = load_dataset(config["data"], config["size"], "val", config["val_images"],
                       seed=config["seed"])
    loss, error = (evaluate(model, val, measure, config["batch_size"])
                   for measure in (next_patch_loss, next_patch_error))
    assert loss == pytest.approx(metrics["val_loss"], rel=2e-3)
    assert 255 * error**0.5 == pytest.approx(metrics["error_in_levels"], rel=2e-3)


def test_bench(capsys):
    assert main(["bench", "patchgpt", "--quick", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    values = {row["case"]: row["value"] for row in rows}
    differences = [value for case, value in values.items() if "difference" in case]
    assert len(differences) == 2
    assert max(differences) < 1e-4
    faster = [value for case, value in values.items()
              if "document's loop" in case or "chapter 1" in case]
    assert len(faster) == 5
    assert min(faster) > 2  # sixteen times fewer steps


# --- bad input


def encode(*shape):
    return PatchGPT(SMALL).encode(torch.rand(shape))


@pytest.mark.parametrize(("make", "message"), [
    (lambda: patchify(torch.rand(1, 3, 30, 32), 4),
     r"side 4 do not tile an image of 30 x 32: .* are \[1, 2\]; or crop it to 28 x 32"),
    (lambda: patchify(torch.rand(1, 3, 8, 8), 16), r"16 do not .* are \[1, 2, 4, 8\]$"),
    (lambda: patchify(torch.rand(1, 3, 8, 8), 0), "side 0 do not tile"),
    (lambda: patchify(torch.rand(3, 8, 8), 4), r"\(B, C, H, W\), found .* \(3, 8, 8\)"),
    (lambda: unpatchify(torch.rand(1, 63, 48), 4, 32, 32), "64 patches .*, found 63"),
    (lambda: unpatchify(torch.rand(1, 64, 50), 4, 32, 32), "16 values .*, found 50"),
    (lambda: unpatchify(torch.rand(63, 48), 4, 32, 32), r"found shape \(63, 48\)"),
    (lambda: PatchGPTConfig(height=30), r"not tile an image of 30 x 64: .* \[1, 2\]"),
    (lambda: PatchGPTConfig(mixtures=0), "at least 1 component, found mixtures=0"),
    (lambda: PatchGPTConfig(classes=-1), "not negative, found classes=-1"),
    (lambda: PatchGPTConfig(class_dropout=2), "from 0 to 1, found 2"),
    (lambda: PatchGPT(SMALL).generate_images(2, torch.tensor([0])), r"\(2,\) of whole"),
    (lambda: PatchGPT(SMALL).generate_images(1, torch.tensor([1])), "to 0, found 1"),
    (lambda: with_classes().generate_images(1, torch.tensor([4])), "to 3, found 4"),
    (lambda: with_classes().generate_images(1, torch.ones(1)), "found torch.float32"),
    (lambda: with_classes().stream(1, None, Guidance(2.0)), "no labels and 3"),
    (lambda: PatchGPT(SMALL).stream(1, torch.tensor([0]), Guidance(2.0)),
     "some labels and 0 classes"),
    (lambda: encode(1, 1, 8, 12), r"3 channels.*found shape \(1, 1, 8, 12\); .* gray"),
    (lambda: encode(1, 3, 8, 8), "images of 8 x 12 pixels, .* found 8 x 8"),
    (lambda: encode(1, 3, 10, 12), "found 10 x 12"),
    (lambda: PatchGPT(SMALL)(torch.rand(1, 3, 48)), r"of 12 values.*\(1, 3, 48\)"),
    (lambda: PatchGPT(SMALL)(torch.rand(1, 24, 12)), "at most 23 patches.*found 24"),
    (lambda: PatchGPT(SMALL)(torch.ones(1, 3, 12).long()), "floats .* torch.int64"),
    (lambda: PatchGPT(SMALL).generate_images([torch.rand(3)]), "of 12 values"),
])
def test_bad_input_is_a_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()
