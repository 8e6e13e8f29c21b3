"""Chapter 10: straight lines from noise to images, and networks that follow them."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from minigen.diffusion import (
    Diffusion,
    DiffusionConfig,
    ImagesAndCodes,
    flow_loss,
    integrate,
    on_the_line,
    random_times,
    to_image,
)
from minigen.sampling import Guidance, last
from minigen.train import diffusion as script

SMALL = DiffusionConfig(height=16, width=8, channels=8, depth=2, heads=2, dim=16,
                        patch_size=1, classes=3)
KINDS = {"unet": {}, "dit": {"network": "dit", "patch_size": 4},
         "unet decoder": {"classes": 0, "codebook_size": 12},
         "unet of patches": {"patch_size": 2},
         "dit decoder": {"classes": 0, "codebook_size": 12, "network": "dit",
                         "patch_size": 4, "downsample": 4}}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def build(kind="unet", seed=0, **changes) -> Diffusion:
    """A model with large weights where they start at zero."""
    torch.manual_seed(seed)
    model = Diffusion(replace(SMALL, **KINDS[kind] | changes)).eval()
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.2)
    return model


def told(model, batch=3, seed=0):
    """Labels and tokens of a batch, of which one is None."""
    if model.config.codebook_size:
        shape = batch, *model.grid
        return None, torch.randint(12, shape, generator=generator(seed))
    return torch.arange(batch) % 3, None


# --- lines, and following them


def test_a_line_goes_from_noise_to_the_image_at_a_constant_velocity():
    images, noise = torch.randn(2, 4, 3, 5, 6, generator=generator())
    zero, one = torch.zeros(4), torch.ones(4)
    assert_close(on_the_line(images, noise, zero), noise)
    assert_close(on_the_line(images, noise, one), images)
    t = torch.tensor([0.1, 0.4, 0.6, 0.9], requires_grad=True)
    for at in (t, t + 0.05):
        point = on_the_line(images, noise, at)[:, 0, 0, 0]
        slope, = torch.autograd.grad(point.sum(), t, retain_graph=True)
        assert_close(slope, (images - noise)[:, 0, 0, 0])


def test_times_are_a_logit_normal():
    t = random_times(20_000, generator())
    assert 0 < t.min() < t.max() < 1
    logits = t.logit()
    assert logits.mean().abs() < 0.03
    assert abs(logits.std() - 1) < 0.03
    assert torch.equal(t, random_times(20_000, generator()))


def gaussian_velocity(mean, spread):
    """The mean velocity if images are normal: E[x - noise | x_t = y]."""
    def velocity(y, t):
        variance = (1 - t) ** 2 + (t * spread) ** 2
        return mean + (t * spread**2 - (1 - t)) / variance * (y - t * mean)
    return velocity


def test_the_velocity_of_a_gaussian_is_what_squared_error_learns():
    velocity, t = gaussian_velocity(2.0, 0.5), 0.6
    images = 2 + 0.5 * torch.randn(200_000, generator=generator())
    noise = torch.randn(200_000, generator=generator(1))
    y = on_the_line(images, noise, torch.full((200_000,), t))
    slope = torch.cov(torch.stack([y, images - noise]))[0, 1] / y.var()
    line = (images - noise).mean() + slope * (torch.tensor([1.0, 2.0]) - y.mean())
    assert_close(line, velocity(torch.tensor([1.0, 2.0]), t), atol=0.02, rtol=0)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_errors_shrink_with_the_order_of_the_method(method, order):
    """On the path of one Gaussian to another, whose end is known."""
    velocity = gaussian_velocity(2.0, 0.5)
    start = torch.linspace(-2, 2, 9, dtype=torch.float64)

    def error(steps):
        times = torch.linspace(0, 0.8, steps + 1, dtype=torch.float64)
        end = last(integrate(velocity, start, times, method))
        # a normal's path: its quantiles are kept
        spread = math.sqrt(0.2**2 + (0.8 * 0.5) ** 2)
        return (end - (0.8 * 2 + spread * start)).abs().max().item()

    # the last step of either is Euler's, which alone does not spoil the order
    ratios = [error(steps) / error(2 * steps) for steps in (32, 64)]
    assert ratios[-1] == pytest.approx(2**order, rel=0.15)


def test_two_points_are_reached_exactly_and_equally_often():
    def velocity(y, t):
        ends = torch.tensor([-1.0, 1.0], dtype=y.dtype)
        noise = (y[:, None] - t * ends) / (1 - t)
        chance = (-noise.square() / 2).softmax(dim=1)
        return (chance * (ends - noise)).sum(dim=1)

    start = torch.randn(4000, generator=generator(), dtype=torch.float64)
    end = last(integrate(velocity, start, torch.linspace(0, 1 - 1e-3, 200)))
    assert (end.abs() - 1).abs().max() < 0.01
    assert torch.equal(end > 0, start > 0), "paths do not cross"
    assert abs((end > 0).double().mean() - 0.5) < 0.03


def test_each_method_asks_as_often_as_it_says():
    for method, asked in (("euler", 5), ("heun", 9)):
        times = []
        list(integrate(lambda x, t, times=times: times.append(t) or x, torch.ones(1),
                       torch.linspace(0, 1, 6), method))
        assert len(times) == asked
        assert max(times) < 1, "at the image itself there is nothing to ask"
    with pytest.raises(ValueError, match="method"):
        list(integrate(lambda x, t: x, torch.ones(1), torch.linspace(0, 1, 3), "rk4"))


# --- the model


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_of_every_kind(kind):
    model = build(kind)
    x = torch.randn(3, 3, 16, 8, generator=generator())
    labels, tokens = told(model)
    out = model(x, torch.tensor([0.1, 0.5, 0.9]), labels, tokens)
    assert out.shape == x.shape
    assert out.isfinite().all()
    alone = torch.cat([model(x[n : n + 1], torch.tensor([[0.1], [0.5], [0.9]][n]),
                             None if labels is None else labels[n : n + 1],
                             None if tokens is None else tokens[n : n + 1])
                       for n in range(3)])
    assert_close(out, alone, atol=1e-5, rtol=1e-4)
    for t in (0.0, 1.0):
        assert model(x, torch.full((3,), t), labels, tokens).isfinite().all()
    model = build(kind, blocks=2, channels=12)
    assert model(x, torch.rand(3), labels, tokens).shape == x.shape


@pytest.mark.parametrize("network", ["unet", "dit"])
def test_a_new_model_predicts_zero(network):
    model = Diffusion(replace(SMALL, network=network))
    x = torch.randn(2, 3, 16, 8, generator=generator())
    assert not model(x, torch.rand(2)).any()
    batch = SimpleNamespace(image=torch.rand(64, 3, 16, 8, generator=generator()),
                            label=torch.zeros(64, dtype=torch.int64))
    images = 2 * batch.image - 1  # so the loss is that of predicting nothing
    expected = images.square().mean() + 1
    assert flow_loss(model, batch, generator(1)).item() == pytest.approx(
        expected.item(), rel=0.03)


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_is_told_matters(kind):
    model = build(kind)
    labels, tokens = told(model)
    options = {"steps": 3, "method": "euler"}
    noise = model.noise(3, generator())
    drawn = last(model.stream(noise, labels, tokens, **options))
    again = last(model.stream(noise, labels, tokens, **options))
    assert torch.equal(drawn, again)
    if tokens is None:
        other = last(model.stream(noise, labels.roll(1), **options))
    else:
        other = last(model.stream(noise, tokens=tokens.roll(1, 0), **options))
    nothing = last(model.stream(noise, **options))
    for one in (other, nothing):
        assert ((drawn - one).flatten(1).abs().amax(1) > 1e-3).all()
    early, late = (model(noise, torch.full((3,), t), labels, tokens)
                   for t in (0.1, 0.9))
    assert not torch.allclose(early, late)


def test_a_token_tells_the_square_of_its_pixels():
    model = build("unet decoder", codebook_size=12)
    _, tokens = told(model, 1)
    entered = []
    model.network.enter.register_forward_pre_hook(
        lambda layer, inputs: entered.append(inputs[0]))
    x = torch.zeros(1, 3, 16, 8)
    model(x, torch.zeros(1), tokens=tokens)
    other = tokens.clone()
    other[0, 1, 0] = (other[0, 1, 0] + 1) % 12
    model(x, torch.zeros(1), tokens=other)
    changed = (entered[0] != entered[1]).any(dim=1)[0]
    assert changed[8:16, 0:8].all()
    assert changed.sum() == 64


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_extrapolates_and_one_is_none(kind):
    model = build(kind)
    labels, tokens = told(model)
    noise = model.noise(3, generator())
    options = {"steps": 1, "method": "euler"}
    plain = last(model.stream(noise, labels, tokens, **options))
    one = last(model.stream(noise, labels, tokens, guidance=Guidance(1.0), **options))
    assert torch.equal(plain, one)
    nothing = last(model.stream(noise, **options))
    guided = last(model.stream(noise, labels, tokens, guidance=Guidance(3.0),
                               **options))
    assert_close(guided, nothing + 3 * (plain - nothing), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("steps", [20, 50])
def test_a_rising_guidance_counts_every_step(steps, monkeypatch):
    model, seen = build(classes=3), []
    def combine(self, outputs, position, length):
        seen.append((position, length))
        return outputs.chunk(2)[0]
    monkeypatch.setattr(Guidance, "combine", combine)
    last(model.stream(model.noise(1), torch.tensor([1]), steps=steps, method="euler",
                      guidance=Guidance(3.0, schedule="linear")))
    assert seen == [(step, steps) for step in range(steps)]


def test_images_come_back_from_their_noise():
    model = build("unet")
    for p in model.network.parameters():  # a gentle field
        p.data.mul_(0.5)
    labels = torch.tensor([0, 1])
    images = 2 * torch.rand(2, 3, 16, 8, generator=generator()) - 1
    noise = last(model.stream(images, labels, steps=100, backward=True))
    assert (noise - images).abs().mean() > 0.01
    again = last(model.stream(noise, labels, steps=100))
    assert_close(again, images, atol=5e-3, rtol=0)


def test_drawing_is_seeded_and_stays_in_range():
    model = build("unet")
    one, same, other = (model.generate_images(2, torch.tensor([0, 1]), generator(seed),
                                              steps=2) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert 0 <= one.min() <= one.max() <= 1
    assert_close(to_image(torch.tensor([-3.0, -1.0, 0.0, 1.0, 2.0])),
                 torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]))
    steps = list(model.stream(model.noise(1, generator()), steps=4))
    assert len(steps) == 4
    model.train()
    list(model.stream(model.noise(1), steps=1))
    assert model.training, "as it was before"


def test_it_learns_two_images_by_heart():
    torch.manual_seed(0)
    model = Diffusion(replace(SMALL, class_dropout=0.0))
    coarse = torch.rand(3, 3, 2, 1, generator=generator())
    batch = SimpleNamespace(
        image=torch.nn.functional.interpolate(coarse, (16, 8)), label=torch.arange(3))
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    for seed in range(300):
        optimizer.zero_grad()
        flow_loss(model, batch, generator(seed)).backward()
        optimizer.step()
    drawn = model.generate_images(3, batch.label, generator(), steps=20)
    error = (drawn - batch.image).square().mean().sqrt()
    assert error < 0.5 * batch.image.std(), "far closer than the mean image"


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_the_velocity(kind):
    model = build(kind)
    labels, tokens = told(model)
    batch = SimpleNamespace(image=torch.rand(3, 3, 16, 8, generator=generator(1)))
    batch.label = labels
    batch.tokens = None if tokens is None else tokens.flatten(1)
    loss = flow_loss(model, batch, generator())
    assert loss == flow_loss(model, batch, generator())
    random = generator()
    noise = torch.randn(3, 3, 16, 8, generator=random)
    t = random_times(3, random)
    x = 2 * batch.image - 1
    found = model(on_the_line(x, noise, t), t, labels, tokens)
    assert_close(loss, (found - (x - noise)).square().mean())


# --- what cannot be


@pytest.mark.parametrize(("use", "message"), [
    (lambda m: m(torch.zeros(1, 3, 8, 8), torch.zeros(1)), "images of 16 x 8 pixels"),
    (lambda m: m.generate_images(0), "at least one image, found 0"),
    (lambda m: m.generate_images(1, torch.tensor([3]), steps=1), "labels of this model|"
     "from 0 to 3"),
    (lambda m: m.generate_images(1, torch.tensor([7])), "found 7"),
    (lambda m: m.generate_images(1, steps=0), "at least one step, found 0"),
    (lambda m: m.generate_images(1, guidance=Guidance(2.0)), "found neither"),
    (lambda m: m.decode(torch.zeros(1, 2, 1, dtype=torch.int64)), "knows no tokens"),
    (lambda m: m.generate_images(1, method="rk4"), "method"),
])
def test_wrong_inputs_are_a_sentence(use, message):
    model = build("unet")
    if "from 0 to 3" in message:
        use(model)  # 3 stands for no class
        return
    with pytest.raises(ValueError, match=message):
        use(model)


def test_wrong_tokens_are_a_sentence():
    model = build("unet decoder")
    for tokens, message in ((torch.zeros(1, 3, 1, dtype=torch.int64), r"\(1, 2, 1\)"),
                            (torch.full((1, 2, 1), 13), "found 13"),
                            (torch.zeros(1, 2, 1), "whole numbers")):
        with pytest.raises(ValueError, match=message):
            model.decode(tokens, steps=1)


@pytest.mark.parametrize(("changes", "message"), [
    ({"height": 18}, "multiples of 4, found 18 x 8"),
    ({"patch_size": 4}, "multiples of 16, found 16 x 8"),
    ({"network": "dit", "patch_size": 3}, "multiples of 3"),
    ({"codebook_size": 4, "downsample": 16}, "multiples of 16, found 16 x 8"),
    ({"channels": 6}, "multiple of 4, found 6"),
    ({"blocks": 0}, "at least one"),
    ({"token_dropout": 2.0}, "shares from 0 to 1"),
])
def test_impossible_configurations_are_a_sentence(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


# --- the data and the script


def test_images_are_beside_their_codes_also_when_mirrored():
    pixels = torch.rand(3, 3, 4, 4, generator=generator())
    images = [SimpleNamespace(image=pixels[n], label=n) for n in range(3)]
    codes = type("Codes", (), {
        "metadata": {"variants": ["plain", "flipped"]}, "__len__": lambda self: 6,
        "__getitem__": lambda self, n: SimpleNamespace(tokens=torch.tensor([n]))})()
    data = ImagesAndCodes(images, codes)
    assert len(data) == 6
    for n in range(6):
        item = data[n]
        expected = images[n // 2].image
        assert torch.equal(item.image, expected.flip(-1) if n % 2 else expected)
        assert (item.tokens.item(), item.label) == (n, n // 2)
    with pytest.raises(ValueError, match="the codes of 2 images"):
        ImagesAndCodes(images[:2], codes)
    codes.metadata["variants"] = ["top left"]
    with pytest.raises(ValueError, match="variants top left"):
        ImagesAndCodes(images, codes)


@pytest.mark.parametrize("decoder", [False, True])
def test_a_run_draws_and_is_drawn_from(tmp_path, decoder):
    config = replace(script.PRESETS["test"], out=tmp_path / "run", decoder=decoder)
    result = script.main(config)
    assert 0.5 < result["metrics"]["val_loss"] < 3
    options = script.SampleOptions(count=3, steps=2, out=tmp_path / "a.png")
    images, labels = script.draw(str(config.out), options)
    assert images.shape == (3, 3, 16, 16)
    assert labels.shape == (3,)
    assert script.sample(str(config.out), options).exists()
    with pytest.raises(ValueError, match="diffusion has none"):
        script.draw(str(config.out), replace(options, temperature=0.5))
    if not decoder:
        return
    with pytest.raises(ValueError, match="takes no class"):
        script.draw(str(config.out), replace(options, label=1))
    from minigen.train import imagegpt

    prior = replace(imagegpt.PRESETS["test"], out=tmp_path / "prior",
                    tokenizer=str(config.out / "tokenizer"),
                    codes_in=str(config.out))
    imagegpt.main(prior)
    images, labels = script.draw(str(config.out), replace(
        options, prior=str(prior.out)))
    assert images.shape == (3, 3, 16, 16)
    assert labels.tolist() == [0, 1, 2]
    sure, _ = script.draw(str(config.out), replace(
        options, prior=str(prior.out), temperature=0.0))
    assert not torch.equal(sure, images)
    with pytest.raises(ValueError, match="leave it out"):
        replace(config, ten_crop=True)
