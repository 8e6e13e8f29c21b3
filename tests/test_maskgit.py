"""What is special to MaskGIT: its schedule, its sampler, editing, its script."""

import math
from dataclasses import replace
from fractions import Fraction
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.testing import assert_close

from minigen import maskgit
from minigen.bench import maskgit as bench
from minigen.checkpoints import load
from minigen.codes import CodeItem
from minigen.imagegpt import ImageGPT, ImageGPTConfig
from minigen.maskgit import (
    MaskGIT,
    MaskGITConfig,
    Masking,
    Order,
    first,
    halton_order,
    mask_ratio,
    masked_token_loss,
    random_masks,
    still_masked,
    surest,
)
from minigen.sampling import Guidance, last
from minigen.train import maskgit as script
from minigen.vq import VQConfig, VQModel

K, N, T = 11, 5, 12  # tokens, classes, positions
SMALL = MaskGITConfig(
    codebook_size=K, height=3, width=4, classes=N, depth=2, heads=2, dim=16)
LABELS = torch.tensor([1, 4, 0])
MASKINGS, ORDERS = get_args(Masking), get_args(Order)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tokens(batch=3):
    return torch.randint(K, (batch, T), generator=generator())


def large(config=SMALL):
    """A model with weights so large that almost constant outputs hide no error."""
    torch.manual_seed(0)
    model = MaskGIT(config)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3) if p.ndim == 2 else None
    for table in (model.class_embedding, model.tokens):
        nn.init.normal_(table.weight)
    return model.eval()


@pytest.fixture
def small():
    return large()


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    config = VQConfig(downsample=4, channels=8, z_channels=8, codebook_size=K,
                      codebook_dim=4, kmeans=False)
    return VQModel(config).eval()


# --- how many tokens are masked


@pytest.mark.parametrize("masking", MASKINGS)
def test_the_ratio_falls_from_one_to_zero(masking):
    ratio = mask_ratio(torch.linspace(0, 1, 101, dtype=torch.float64), masking, 64)
    assert ratio[0] == 1
    assert ratio[-1].item() == pytest.approx(0, abs=1e-12)
    assert (ratio.diff() <= 0).all()


def test_the_ratios_are_the_papers():
    r = torch.tensor(0.3, dtype=torch.float64)
    for masking, value in {
            "cosine": math.cos(0.15 * math.pi), "linear": 0.7, "square": 0.91,
            "cubic": 0.973, "log": -math.log(0.3) / math.log(64),
            "arccos": math.acos(0.3) / (math.pi / 2)}.items():
        assert mask_ratio(r, masking, 64).item() == pytest.approx(value)
    uniform = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    for masking in ("cosine", "arccos"):  # both hide 2 / pi of the tokens on average
        assert mask_ratio(uniform, masking).mean().item() == pytest.approx(
            2 / math.pi, abs=1e-4)


@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("total", [1, 5, 12, 64])
def test_the_number_masked_follows_the_recursion(masking, total):
    exact = {"linear": lambda r: 1 - r, "square": lambda r: 1 - r**2,
             "cubic": lambda r: 1 - r**3}
    for steps in range(1, total + 1):
        before = total
        for step in range(1, steps + 1):
            left = still_masked(total, before, step, steps, masking)
            if masking in exact:  # without rounding errors
                count = math.floor(total * exact[masking](Fraction(step, steps)))
            else:
                r = torch.tensor(step / steps, dtype=torch.float64)
                count = math.floor(total * mask_ratio(r, masking, total).item() + 1e-9)
            expected = 0 if step == steps else max(0, min(before - 1, count))
            assert left == expected
            assert left < before or before == 0
            before = left
        assert before == 0


@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("steps", [1, 3, T, 40])
def test_the_sampler_leaves_as_many_as_planned(small, masking, order, steps):
    start = tokens()
    for row, count in zip(start, (T, 5, 1), strict=True):  # different for each image
        row[torch.randperm(T, generator=generator())[:count]] = K
    left, seen = [T, 5, 1], []
    stream = small.stream(start, LABELS, steps, order=order, masking=masking,
                          generator=generator())
    for step, canvas in enumerate(stream, start=1):
        left = [still_masked(total, before, step, steps, masking)
                for total, before in zip((T, 5, 1), left, strict=True)]
        assert (canvas == K).sum(1).tolist() == left
        seen.append(canvas.clone())
    assert len(seen) <= min(steps, T)
    assert left == [0, 0, 0]
    for before, after in zip([start, *seen], seen, strict=False):
        known = before != K
        assert torch.equal(after[known], before[known]), "known tokens stay"


@pytest.mark.parametrize("masking", MASKINGS)
def test_masks_of_training_hide_what_the_schedule_says(masking):
    torch.manual_seed(0)
    masks = random_masks(20_000, T, masking)
    count = masks.sum(1)
    assert count.min() == 1
    assert count.max() == T
    torch.manual_seed(0)
    ratio = mask_ratio(torch.rand(20_000), masking, T)
    assert torch.equal(count, (T * ratio).ceil().clamp(1, T).long())
    share = masks.float().mean(0)  # every position alike
    assert_close(share, share.mean().expand(T), atol=0.02, rtol=0)


# --- the model and its loss


def test_every_token_sees_every_other(small):
    x = tokens(1)
    before = small(x)
    for position in range(T):
        other = x.clone()
        other[0, position] = K
        assert ((small(other) - before).abs().amax(-1) > 1e-6).all()


def test_the_class_reaches_every_position(small):
    x = tokens()
    given, other, none = small(x, LABELS), small(x, (LABELS + 1) % N), small(x)
    assert (given != other).any(dim=-1).all()
    assert (given != none).any(dim=-1).all()
    assert given.shape == (3, T, K)


def test_the_size_is_that_of_imagegpt():
    shape = {"codebook_size": 1024, "height": 16, "width": 16, "classes": 9}
    with torch.device("meta"):
        models = MaskGIT(MaskGITConfig(**shape)), ImageGPT(ImageGPTConfig(**shape))
    ours, other = (sum(p.numel() for p in model.parameters()) for model in models)
    assert ours - other == 2 * 512  # the mask token, and a row of positions


def test_the_loss_is_the_cross_entropy_of_masked_tokens(small, monkeypatch):
    mask = torch.rand(3, T, generator=generator()) < 0.5
    monkeypatch.setattr(maskgit, "random_masks", lambda *a: mask)
    x = tokens()
    logits = small(x.masked_fill(mask, K), LABELS)
    total = count = 0
    for b, t in mask.nonzero().tolist():
        total -= logits[b, t].log_softmax(-1)[x[b, t]]
        count += 1
    assert_close(masked_token_loss(small, CodeItem(x, LABELS)), total / count)
    # smoothing in training: a tenth of the target is spread over all codes
    model = large(replace(SMALL, class_dropout=0.0)).train()
    smooth = F.one_hot(x, K) * 0.9 + 0.1 / K
    logits = model(x.masked_fill(mask, K), LABELS)
    expected = -(smooth * logits.log_softmax(-1)).sum(-1)[mask].mean()
    assert_close(masked_token_loss(model, CodeItem(x, LABELS)), expected)


def test_known_tokens_have_no_loss(small, monkeypatch):
    """A model that is certain of something wrong at known positions loses nothing."""
    mask = torch.zeros(3, T, dtype=torch.bool)
    mask[:, 4] = True
    monkeypatch.setattr(maskgit, "random_masks", lambda *a: mask)
    x = tokens()
    seen, real = [], small.head.forward
    monkeypatch.setattr(small.head, "forward", lambda hidden: (
        seen.append(hidden.shape) or real(hidden)))
    masked_token_loss(small, CodeItem(x, LABELS))
    assert seen == [(3, 16)], "the output layer runs at masked positions only"


# --- the sampler


def test_a_step_by_hand(small, monkeypatch):
    """Three hidden tokens with known probabilities: the two surest are kept."""
    p = torch.full((1, T, K), 1e-6)
    for position, (token, sure) in {2: (7, 0.9), 5: (3, 0.6), 9: (1, 0.8)}.items():
        p[0, position, token] = sure
        p[0, position, 0] = 1 - sure
    monkeypatch.setattr(small, "hidden", lambda canvas, rows: p.log())
    monkeypatch.setattr(small.head, "forward", lambda hidden: hidden)
    start = tokens(1)
    start[0, [2, 5, 9]] = K
    stream = small.stream(start, steps=2, noise=0.0, temperature=0.0, masking="linear")
    first = next(stream).clone()  # floor(3 / 2) = 1 token stays hidden
    assert first[0, [2, 5, 9]].tolist() == [7, K, 1]
    assert next(stream)[0, [2, 5, 9]].tolist() == [7, 3, 1]


@pytest.mark.parametrize("guidance", [None, Guidance(2.5), Guidance(3.0, "linear")],
                         ids=str)
def test_without_noise_it_is_greedy(small, guidance):
    """One token for each step, always the one with the highest probability."""
    found = small.generate(3, LABELS, steps=T, guidance=guidance, noise=0.0,
                           temperature=0.0, masking="linear")
    canvas = torch.full((3, T), K)
    for step in range(T):
        logits = small(canvas, LABELS)
        if guidance is not None:
            none = small(canvas)
            logits = none + guidance.at(step, T) * (logits - none)
        best, token = logits.log_softmax(-1).max(-1)
        position = best.masked_fill(canvas != K, -math.inf).argmax(1)
        rows = torch.arange(3)
        canvas[rows, position] = token[rows, position]
    assert torch.equal(found, canvas)


def test_noise_fades_and_chooses_positions_at_random(small, monkeypatch):
    """With much noise all subsets are equally likely; the last step has none."""
    counts = torch.zeros(T)
    for seed in range(400):
        canvas = next(small.stream(1, noise=1e6, steps=6, masking="linear",
                                   generator=generator(seed)))
        counts += canvas[0] != K
    assert_close(counts / 400, torch.full((T,), 1 / 6), atol=0.08, rtol=0)
    seen, real = [], maskgit.surest
    monkeypatch.setattr(maskgit, "surest", lambda confidence, masked: (
        seen.append(confidence[masked]) or real(confidence, masked)))
    small.generate(1, noise=1e6, steps=3, generator=generator())
    assert seen[1].abs().max() > 1e4  # after the draws of the first step
    assert seen[-1].max() <= 0, "a log probability"


@pytest.mark.parametrize("order", ORDERS)
def test_a_generator_determines_what_is_drawn(small, order):
    state = torch.get_rng_state()
    first, again, other = (
        small.generate(3, LABELS, order=order, generator=generator(n))
        for n in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert 0 <= first.min() <= first.max() < K, "the mask token cannot be drawn"


def test_a_batch_of_one_and_of_many_agree(small):
    start = tokens()
    start[:, 3:9] = K
    for order in ("confidence", "halton"):
        options = {"temperature": 0.0, "noise": 0.0, "steps": 4, "order": order}
        together = small.generate(start, LABELS, **options)
        alone = [small.generate(start[n : n + 1], LABELS[n : n + 1], **options)
                 for n in range(3)]
        assert torch.equal(together, torch.cat(alone))


def test_guidance_of_one_is_none_and_of_zero_forgets_the_class(small):
    plain = small.generate(3, LABELS, generator=generator())
    same = small.generate(3, LABELS, guidance=Guidance(1.0), generator=generator())
    assert torch.equal(plain, same)
    none = small.generate(3, generator=generator())
    zero = small.generate(3, LABELS, guidance=Guidance(0.0), generator=generator())
    assert torch.equal(none, zero)


def test_modes_and_inputs_are_left_alone(small):
    start = torch.full((2, T), K)
    for mode in (True, False):
        small.train(mode)
        stream = small.stream(start)
        next(stream)
        stream.close()
        assert {module.training for module in small.modules()} == {mode}
        with pytest.raises(ValueError, match="negative"):
            small.generate(start, temperature=-1.0)
        assert {module.training for module in small.modules()} == {mode}
    assert (start == K).all()
    drawn = small.generate(start)
    masked_token_loss(small.train(), CodeItem(drawn, LABELS[:2])).backward()


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 4), (16, 16), (8, 5)])
def test_the_halton_order_is_a_permutation(height, width):
    order = halton_order(height, width)
    assert sorted(order.tolist()) == list(range(height * width))


def test_the_halton_order_spreads():
    """No two of 16 positions in a row are neighbors, unlike in reading order."""
    order = halton_order(16, 16)
    place = torch.stack([order // 16, order % 16], dim=1).double()
    for start in range(0, 128, 16):
        part = place[start : start + 16]
        distance = torch.cdist(part, part) + 99 * torch.eye(16)
        assert distance.min() > 1


def test_positions_of_the_other_orders_are_fixed_in_advance(small):
    start, order = torch.full((1, T), K), halton_order(3, 4)
    canvas = next(small.stream(start, steps=4, order="halton", masking="linear"))
    assert (canvas[0] != K).nonzero().flatten().tolist() == sorted(order[:3].tolist())
    first = [next(small.stream(start, steps=T, order="random", generator=generator(n)))
             .ne(K).nonzero()[0, 1].item() for n in range(40)]
    assert len(set(first)) > 6


def test_known_tokens_come_last():
    confidence = torch.tensor([[0.1, 5.0, 0.3, 0.2], [0.0, 3.0, 2.0, 1.0]])
    masked = torch.tensor([[True, False, True, True], [True, True, True, True]])
    order = surest(confidence, masked)
    assert order.tolist() == [[2, 3, 0, 1], [1, 2, 3, 0]]
    assert first(order, [2, 1]).tolist() == [
        [False, False, True, True], [False, True, False, False]]
    assert first(order, [1, 1]).nonzero().tolist() == [[0, 2], [1, 1]]


# --- images


def test_images_appear_step_by_step(small, tokenizer):
    options = {"steps": 4, "generator": generator()}
    for canvas in small.stream_images(tokenizer, 2, LABELS[:2], blank=0.3, **options):
        assert canvas.shape == (2, 3, 12, 16)
    found = small.generate_images(tokenizer, 2, LABELS[:2], steps=4,
                                  generator=generator())
    assert torch.equal(canvas, found)
    first = next(small.stream_images(tokenizer, 2, LABELS[:2], blank=0.3, steps=4))
    blank = (first == 0.3).all(1).unfold(1, 4, 4).unfold(2, 4, 4).all(-1).all(-1)
    left = still_masked(T, T, 1, 4)
    assert blank.sum((1, 2)).tolist() == [left, left]


def test_a_generator_repeats_the_masks_of_a_loss(small):
    batch = CodeItem(tokens(), LABELS)
    before = torch.get_rng_state()
    first, second = (masked_token_loss(small.eval(), batch, generator(4))
                     for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, masked_token_loss(small, batch, generator(5)))
    assert torch.equal(before, torch.get_rng_state()), "training draws from the global"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_prompts_of_small_types(small, dtype):
    start = small.start(tokens(2)[:, :3].to(dtype))
    assert start.dtype == torch.int64
    assert (start[:, 3:] == small.mask_token).all()


def test_editing_changes_what_the_mask_covers(small, tokenizer):
    images = torch.rand(2, 3, 12, 16, generator=generator())
    mask = torch.zeros(12, 16, dtype=torch.bool)
    mask[3:7, 5:9] = True  # touches 2 x 2 squares of 4 x 4 pixels
    seen, real = [], small.generate
    small.generate = lambda prompt, *rest, **options: (
        seen.append(prompt) or real(prompt, *rest, **options))
    edited = small.edit_images(tokenizer, images, mask, LABELS[:2],
                               generator=generator())
    assert torch.equal(edited[:, :, ~mask], images[:, :, ~mask])
    assert (edited[:, :, mask] != images[:, :, mask]).any()
    hidden = (seen[0] == K).view(2, 3, 4)
    assert hidden[:, :2, 1:3].all()
    assert hidden.sum() == 8
    # what lies under the mask cannot be seen by the tokens that remain
    other = torch.where(mask, torch.rand(2, 3, 12, 16), images)
    small.edit_images(tokenizer, other, mask, LABELS[:2])
    assert torch.equal(seen[0], seen[1])
    # one mask for each image, of which one covers nothing and one everything
    both = torch.stack([torch.zeros_like(mask), torch.ones_like(mask)])
    edited = small.edit_images(tokenizer, images, both)
    assert torch.equal(edited[0], images[0])
    assert torch.equal(small.edit_images(tokenizer, images, both[0]), images)
    assert (seen[2][1] == K).all()


# --- wrong inputs


MASK = torch.zeros(12, 16, dtype=torch.bool)
IMAGES = torch.zeros(1, 3, 12, 16)


@pytest.mark.parametrize(("use", "message"), [
    (lambda m, t: m.generate(0), "at least one image, found 0"),
    (lambda m, t: m.generate(1, steps=0), "at least one step.*steps=0"),
    (lambda m, t: m.generate(1, noise=-1.0), "noise=-1"),
    (lambda m, t: m.generate(1, order="moon"), "order must be one of .*'moon'"),
    (lambda m, t: m.generate(1, masking="moon"), "masking must be one of .*'moon'"),
    (lambda m, t: m.generate(1, temperature=-1.0), "found -1"),
    (lambda m, t: m.generate(1, top_k=0), "found 0"),
    (lambda m, t: m.generate(torch.zeros(1, T + 1, dtype=torch.int64)), "found 13"),
    (lambda m, t: m.generate(torch.zeros(1, T)), "whole numbers, found torch.float32"),
    (lambda m, t: m.generate(torch.full((1, T), K + 1)), "from 0 to 11, found 12"),
    (lambda m, t: m.generate(1, torch.tensor([N + 1])), "from 0 to 5, found 6"),
    (lambda m, t: m.generate(1, LABELS), r"expected labels \(1,\)"),
    (lambda m, t: m.generate(1, guidance=Guidance(2.0)), "guidance needs labels"),
    (lambda m, t: m(tokens()[:, :3]), "found 3; 11 stands for a masked one"),
    (lambda m, t: m.edit_images(t, IMAGES, MASK[:8]), "12 x 16 pixels and a mask"),
    (lambda m, t: m.edit_images(t, IMAGES, MASK.float()), "bools .*torch.float32"),
    (lambda m, t: m.edit_images(t, IMAGES[..., :8], MASK), "found 12 x 8"),
    (lambda m, t: m.edit_images(t, IMAGES[0], MASK), r"\(B, 3, H, W\), found the"),
    (lambda m, t: replace(SMALL, label_smoothing=1.0), "found 1.0"),
    (lambda m, t: MaskGIT(replace(SMALL, fingerprint="x")).generate_images(t, 1),
     "another|other images"),
])
def test_wrong_inputs_are_a_sentence(small, tokenizer, use, message):
    with pytest.raises(ValueError, match=message):
        use(small, tokenizer)


# --- the script


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "maskgit"
    result = script.main(replace(script.PRESETS["test"], out=out))
    return out, result


def test_a_run_of_the_script(trained):
    out, result = trained
    metrics = result["metrics"]
    start = math.log2(load(out).config.codebook_size)  # nothing is learned in 3 steps
    assert metrics["bits_per_masked_token"] == pytest.approx(start, rel=0.1)
    assert "bits_per_pixel" not in metrics, "it is no likelihood"
    assert Image.open(out / "classes.png").size[0] > 32


def test_the_presets_are_those_of_imagegpt():
    from minigen.train.imagegpt import PRESETS

    for name in ("test", "demo", "cpu", "full"):
        ours, other = script.PRESETS[name], PRESETS[name]
        for field in ("dim", "depth", "heads", "steps", "batch_size", "lr", "ema"):
            assert getattr(ours, field) == getattr(other, field)


def test_repainting_from_the_command_line(trained, tmp_path):
    out, _ = trained
    white = Image.new("L", (16, 16))
    white.paste(255, (4, 0, 12, 8))
    white.save(tmp_path / "mask.png")
    images = []
    for mask in ("0,4,8,12", str(tmp_path / "mask.png")):
        options = script.SampleOptions(count=2, mask=mask, steps=2)
        images.append(script.draw(str(out), options)[0])
    assert torch.equal(*images)
    plain, labels = script.draw(str(out), script.SampleOptions(
        count=2, mask="0,0,1,1", steps=2, label=5))
    assert labels.tolist() == [5, 5]
    assert torch.equal(plain[:, :, 8:], images[0][:, :, 8:])
    for mask, message in (("0,4,8", "found '0,4,8'"), ("0,4,0,8", "found 0,4,0,8"),
                          ("0,0,99,9", "within 16 x 16")):
        with pytest.raises(ValueError, match=message):
            script.draw(str(out), script.SampleOptions(mask=mask))


def test_forwards_of_the_benchmark_are_those_of_the_sampler():
    model = MaskGIT(replace(SMALL, height=4)).eval()
    counts = {"ours": [], "theirs": []}
    for name, run in (
            ("ours", lambda: last(model.stream(2, LABELS[:2], 5, Guidance(2.0)))),
            ("theirs", lambda: bench.forwards(model, LABELS[:2], 5))):
        handle = model.head.register_forward_hook(
            lambda m, x, y, seen=counts[name]: seen.append(y.numel()))
        run()
        handle.remove()
    assert counts["ours"] == counts["theirs"]
