"""Chapter 4: quantisers, the tokenizer, LlamaGen's checkpoints, and what judges pictures."""

import argparse
import json
import math
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from minigen.__main__ import main
from minigen.data import load_dataset
from minigen.train import vq as script
from minigen.training import load_checkpoint, save_checkpoint, shipped_result
from minigen.vq import (
    FSQ,
    LLAMAGEN,
    AttentionBlock,
    VectorQuantizer,
    VQConfig,
    VQModel,
    codebook_use,
    kmeans,
    llamagen_names,
    load_tokenizer,
    nearest_code,
    reconstruction_quality,
    two_best,
)
from minigen.vqgan import QUIET, VQGAN, PatchDiscriminator, PerceptualLoss, adaptive_weight, hinge_loss

ROOT = Path(__file__).resolve().parents[1]
SMALL = VQConfig(downsample=4, channels=8, hidden=8, codes=32, dim=4, kmeans=False, restart=0.0)


def small(seed=0, **changes):
    torch.manual_seed(seed)
    return VQModel(replace(SMALL, **changes))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pictures(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def searched(vectors, codebook):
    """The nearest codes by float64, every difference spelled out."""
    distances = (vectors.double()[:, None] - codebook.double()).square().sum(dim=2)
    return distances.argmin(dim=1)


# --- looking up the nearest code


@pytest.mark.parametrize("K, d", [(1, 3), (2, 1), (5, 4), (127, 8), (128, 8), (1024, 8), (192, 64)])
def test_nearest_code_is_that_of_a_search_in_float64(K, d):
    vectors, codebook = normal(300, d), normal(K, d, seed=1)
    assert torch.equal(nearest_code(vectors, codebook), searched(vectors, codebook))
    assert torch.equal(nearest_code(vectors, codebook, rows=7), searched(vectors, codebook))


def test_nearest_code_where_float32_cannot_tell():
    """Codes that differ by a last bit, far from the origin, where plain float32 is wrong."""
    base = normal(1, 8) * 100
    codebook = torch.cat([base + n * 1e-5 for n in range(256)])
    vectors = codebook[torch.randperm(256, generator=torch.Generator().manual_seed(0))] + normal(256, 8) * 1e-5
    expected = searched(vectors, codebook)
    assert torch.equal(nearest_code(vectors, codebook), expected)
    plain = (vectors @ codebook.T - codebook.square().sum(dim=1) / 2).argmax(dim=1)
    assert not torch.equal(plain, expected), "the case is too easy"


def test_of_equal_codes_the_first_is_taken():
    codebook = normal(200, 4).repeat(3, 1)
    nearest = nearest_code(normal(50, 4, seed=1), codebook)
    assert nearest.max() < 200
    assert torch.equal(nearest_code(torch.zeros(9, 4), torch.zeros(128, 4)), torch.zeros(9, dtype=torch.int64))


def test_nearest_code_in_half_precision_around_it():
    vectors, codebook = normal(500, 8), normal(256, 8, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest_code(vectors, codebook), searched(vectors, codebook))


@pytest.mark.parametrize("K", [1, 2, 63, 128, 130, 1024])
def test_two_best(K):
    scores = normal(40, K)
    best, place = two_best(scores)
    assert torch.equal(place, scores.argmax(dim=1)) and torch.equal(best[:, 0], scores.amax(dim=1))
    if K > 1:
        assert torch.equal(best[:, 1], scores.topk(2).values[:, 1])
    else:
        assert (best[:, 1] == -torch.inf).all()


# --- quantisers


def quantizers():
    torch.manual_seed(0)
    return {"gradient": VectorQuantizer(32, 4), "ema": VectorQuantizer(32, 4, decay=0.9), "sphere": VectorQuantizer(32, 4, normalize=True),
            "sphere ema": VectorQuantizer(32, 4, decay=0.9, normalize=True, kmeans=True, restart=0.1), "fsq": FSQ((8, 5, 5, 5))}


@pytest.mark.parametrize("name", quantizers())
def test_a_quantizer_gives_codes_and_passes_gradients_through(name):
    quantizer = quantizers()[name]
    z = normal(2, 3, 5, quantizer.dim).requires_grad_()
    quantizer.eval()
    vectors, tokens, loss = quantizer(z)
    assert tokens.shape == (2, 3, 5) and tokens.dtype == torch.int64 and 0 <= tokens.min() and tokens.max() < quantizer.codes
    assert_close(vectors, quantizer.embed(tokens))
    weights = normal(*vectors.shape, seed=1)
    (gradient,) = torch.autograd.grad((vectors * weights).sum(), z)
    if name == "fsq":  # through the bound, as if there were no rounding
        (expected,) = torch.autograd.grad((quantizer.bound(z) / (quantizer.levels // 2) * weights).sum(), z)
    elif "sphere" in name:
        (expected,) = torch.autograd.grad((F.normalize(z, dim=-1) * weights).sum(), z)
    else:
        expected = weights
    assert_close(gradient, expected)
    assert loss.ndim == 0


@pytest.mark.parametrize("name", quantizers())
def test_what_was_quantised_stays_as_it_is(name):
    """The codes, quantised again, are the codes."""
    quantizer = quantizers()[name].eval()
    tokens = torch.arange(quantizer.codes)
    codes = quantizer.embed(tokens)
    if name == "fsq":  # before the bound
        half, offset = (quantizer.levels - 1) * 1.001 / 2, 0.5 * (quantizer.levels % 2 == 0)
        codes = torch.atanh((codes * (quantizer.levels // 2) + offset) / half) - torch.atanh(offset / half)
    assert torch.equal(quantizer(codes.view(1, 1, *codes.shape)).tokens.flatten(), tokens)


def test_the_losses_of_van_den_oord():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(16, 4, commitment=0.25)
    z = normal(1, 2, 6, 4).requires_grad_()
    vectors, tokens, loss = quantizer(z)
    codes = quantizer.codebook[tokens]
    assert_close(loss, (codes - z).square().mean() * 1.25)
    to_z, to_codebook = torch.autograd.grad(loss, [z, quantizer.codebook])
    assert_close(to_z, 0.25 * 2 * (z - codes) / z.numel())
    expected = torch.zeros_like(quantizer.codebook).index_add(0, tokens.flatten(), (2 * (codes - z) / z.numel()).flatten(0, 2))
    assert_close(to_codebook, expected)


def test_the_document_has_no_gradient_and_ours_has():
    """`z + (codes - z).detach()`, all that the document has, leaves the codebook alone."""
    quantizer = quantizers()["gradient"]
    vectors, _, loss = quantizer(normal(1, 2, 2, 4, seed=1).requires_grad_())
    vectors.sum().backward(retain_graph=True)
    assert quantizer.codebook.grad is None
    loss.backward()
    assert quantizer.codebook.grad.abs().sum() > 0


def test_the_moving_average_is_its_formula():
    """Three batches, in plain NumPy and float64."""
    torch.manual_seed(0)
    quantizer = VectorQuantizer(8, 3, decay=0.8)
    assert not list(quantizer.parameters())
    codebook, counts = quantizer.codebook.double().numpy().copy(), np.ones(8)
    sums = codebook.copy()
    for seed in range(3):
        z = normal(2, 4, 4, 3, seed=seed)
        tokens = quantizer(z).tokens.numpy().ravel()
        flat = z.double().numpy().reshape(-1, 3)
        assert (tokens == ((flat[:, None] - codebook) ** 2).sum(-1).argmin(1)).all()
        for k in range(8):
            counts[k] = 0.8 * counts[k] + 0.2 * (tokens == k).sum()
            sums[k] = 0.8 * sums[k] + 0.2 * flat[tokens == k].sum(0)
        codebook = sums / counts[:, None]
    assert_close(quantizer.codebook.double(), torch.from_numpy(codebook), atol=1e-5, rtol=1e-5)
    quantizer.eval()
    before = quantizer.codebook.clone()
    quantizer(normal(2, 4, 4, 3))
    assert torch.equal(quantizer.codebook, before), "in eval mode nothing is learnt"


def test_kmeans_finds_separate_groups():
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    vectors = (centres[:, None] + 0.1 * normal(3, 40, 2)).flatten(0, 1)
    found = kmeans(vectors, vectors[[0, 41, 81]], rounds=5)
    assert_close(found, vectors.view(3, 40, 2).mean(1))
    lonely = kmeans(vectors, torch.cat([vectors[[0, 41, 81]], torch.full((1, 2), 1e3)]))
    assert_close(lonely[3], torch.full((2,), 1e3)), "a centre that nobody is near to stays"


@pytest.mark.parametrize("decay", [None, 0.99])
def test_kmeans_start_happens_once_and_in_training(decay):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(16, 4, decay=decay, kmeans=True)
    first = quantizer.codebook.detach().clone()
    quantizer.eval()(normal(1, 8, 8, 4) + 50)
    assert torch.equal(quantizer.codebook, first)
    z = normal(1, 8, 8, 4) + 50
    quantizer.train()(z)
    assert not quantizer.to_start and (quantizer.codebook - 50).abs().max() < 5, "the codes lie among the vectors"
    spread = (z.flatten(0, 2) - quantizer.embed(quantizer.eval()(z).tokens).flatten(0, 2)).square().mean()
    assert spread < 0.6 * z.var(), "and explain them"
    again = quantizer.codebook.detach().clone()
    quantizer.train()(normal(1, 8, 8, 4) - 50)
    moved = (quantizer.codebook - again).abs().amax(dim=1) > 1
    assert moved.sum() <= 1, "a second batch does not start over"


def test_kmeans_start_with_fewer_vectors_than_codes():
    quantizer = VectorQuantizer(64, 4, decay=0.99, kmeans=True)
    quantizer(normal(1, 2, 2, 4))
    assert torch.isfinite(quantizer.codebook).all()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("decay", [None, 0.9])
def test_dead_codes_are_put_onto_vectors_of_the_batch(decay, normalize):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(64, 4, decay=decay, restart=0.5, normalize=normalize)
    quantizer.codebook.data[10:] = 1e3 * torch.tensor([1.0, 1, 1, 1])  # where no vector comes
    z = normal(2, 8, 8, 4) - 3
    for _ in range(40):
        vectors, _, loss = quantizer(z)
        if loss.requires_grad:
            loss.backward()  # the codes that moved meanwhile must not disturb it
    placed = quantizer.place(z).flatten(0, 2)
    distance = torch.cdist(quantizer.place(quantizer.codebook), placed).amin(dim=1)
    assert distance[10:].max() < 2, "those that nobody chose are near a vector now"
    assert codebook_use(quantizer.eval()(z).tokens, 64)[0] > 0.5
    if decay is not None:
        assert_close(quantizer.sums / quantizer.counts[:, None], quantizer.codebook), "their sums moved with them"


def test_the_quantizer_stays_in_float32():
    for quantizer in quantizers().values():
        z = normal(2, 3, 3, quantizer.dim)
        expected = quantizer.eval()(z)
        with torch.autocast("cpu", torch.bfloat16):
            found = quantizer(z)
        assert found.vectors.dtype == torch.float32 and torch.equal(found.tokens, expected.tokens)
        assert torch.equal(found.vectors, expected.vectors)


def test_fsq_against_the_formulas_of_the_paper():
    """Appendix A.1 of Mentzer et al. 2023, spelled out in NumPy."""
    levels = np.array([8, 5, 5, 5])
    z = normal(200, 4).double().numpy() * 3
    eps, basis = 1e-3, np.array([1, 8, 40, 200])
    half = (levels - 1) * (1 + eps) / 2
    offset = np.where(levels % 2 == 1, 0.0, 0.5)
    bounded = np.tanh(z + np.arctanh(offset / half)) * half - offset
    expected = np.round(bounded) / (levels // 2)
    tokens = ((expected * (levels // 2) + levels // 2) * basis).sum(-1).round().astype(int)
    found = FSQ((8, 5, 5, 5))(torch.from_numpy(z).float()[None, None])
    assert_close(found.vectors[0, 0].double(), torch.from_numpy(expected), atol=1e-5, rtol=0)
    assert np.array_equal(found.tokens.numpy().ravel(), tokens)
    codes = FSQ((8, 5, 5, 5)).embed(torch.arange(1000))
    assert len(codes.unique(dim=0)) == 1000 and codes.abs().max() == 1


TWO = """
import sys, torch, torch.distributed as dist
from minigen.vq import VectorQuantizer
dist.init_process_group("gloo")
torch.manual_seed(5)                       # the same codebook in each, then each its own noise
quantizer = VectorQuantizer(32, 4, decay=0.9, kmeans="start" in sys.argv, restart=0.3 if "restart" in sys.argv else 0.0)
z = torch.randn(8, 4, 4, 4, generator=torch.Generator().manual_seed(0))
torch.manual_seed(dist.get_rank())
for _ in range(6):
    quantizer(z[dist.get_rank()::2])
parts = [torch.empty_like(quantizer.codebook) for _ in range(2)]
dist.all_gather(parts, quantizer.codebook)
assert torch.equal(*parts), "the processes have different codebooks"
if dist.get_rank() == 0:
    torch.save(quantizer.state_dict(), sys.argv[1])
dist.destroy_process_group()
"""


@pytest.mark.parametrize("options", [[], ["start", "restart"]])
def test_two_processes_learn_one_codebook(options, tmp_path):
    (tmp_path / "two.py").write_text(TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "two.py", "out.pt", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=200)
    assert done.returncode == 0, done.stderr
    if not options:  # nothing is drawn at random: equal to one process with the whole batch
        torch.manual_seed(5)
        one = VectorQuantizer(32, 4, decay=0.9)
        for _ in range(6):
            one(normal(8, 4, 4, 4))
        assert_close(torch.load(tmp_path / "out.pt")["codebook"], one.codebook)


# --- the tokenizer


@pytest.mark.parametrize("downsample", [4, 8, 16])
@pytest.mark.parametrize("quantizer", ["ema", "gradient", "fsq"])
def test_tokens_and_back(downsample, quantizer):
    model = small(downsample=downsample, quantizer=quantizer)
    images = pictures(2, 3, 32, 48)
    tokens = model.encode(images)
    assert tokens.shape == (2, 32 // downsample, 48 // downsample) and tokens.dtype == torch.int64
    assert 0 <= tokens.min() and tokens.max() < model.codes == model.quantizer.codes
    again = model.decode(tokens)
    assert again.shape == images.shape and 0 <= again.min() and again.max() <= 1
    model.eval()
    made = model(images)
    assert torch.equal(made.tokens, tokens)
    assert_close(made.images.clamp(0, 1), again)
    assert model.training is False and small().training is True


def test_encode_and_decode_leave_the_mode_and_the_codebook_alone():
    model = small(kmeans=True, restart=0.5).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.decode(model.encode(pictures(2, 3, 16, 16)))
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_gradients_reach_encoder_and_decoder():
    for name in ("ema", "gradient", "fsq"):
        model = small(quantizer=name)
        made = model(pictures(2, 3, 16, 16))
        (made.images.square().mean() + made.loss).backward()
        for part, parameter in model.named_parameters():
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), part
            assert parameter.grad.abs().sum() > 0 or "bias" in part, part


def test_one_batch_can_be_overfitted():
    model = small(channels=16, codes=64, kmeans=True, restart=0.1)
    images = torch.stack([item.image for item in load_dataset("landscapes", 16, "val", 4)])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(150):
        made = model(images)
        loss = F.mse_loss(made.images, images)
        optimizer.zero_grad()
        (loss + made.loss).backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-10:]) < 0.1 * losses[0] and np.mean(losses[-10:]) < 0.006


def test_bfloat16_around_the_quantizer():
    model = small().eval()
    images = pictures(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        made = model(images)
    assert made.images.dtype == made.loss.dtype == torch.float32
    assert (made.tokens == model(images).tokens).float().mean() > 0.8


def test_the_attention_block_is_attention_over_places():
    torch.manual_seed(0)
    block, x = AttentionBlock(8), normal(2, 8, 3, 5)
    h = block.norm(x)
    q, k, v = (F.conv2d(h, *pair).flatten(2).transpose(1, 2) for pair in zip(block.qkv.weight.split(8), block.qkv.bias.split(8)))
    weights = (q @ k.transpose(1, 2) / math.sqrt(8)).softmax(-1)
    expected = x + block.proj((weights @ v).transpose(1, 2).view(2, 8, 3, 5))
    assert_close(block(x), expected)


def test_checkpoints_come_back_and_have_a_fingerprint(tmp_path):
    for quantizer in ("ema", "fsq"):
        model = small(quantizer=quantizer, levels=(4, 3))
        save_checkpoint(model, tmp_path / quantizer)
        again = load_checkpoint(VQModel, tmp_path / quantizer)
        images = pictures(3, 3, 16, 16)
        assert torch.equal(again.encode(images), model.encode(images)) and again.config == model.config
        assert again.fingerprint() == model.fingerprint() != small(seed=1, quantizer=quantizer, levels=(4, 3)).fingerprint()
        with torch.no_grad():
            next(again.parameters()).view(-1)[0] += 1e-3
        assert again.fingerprint() != model.fingerprint()


def test_codebook_use():
    assert codebook_use(torch.zeros(3, 4, 4, dtype=torch.int64), 8) == (1 / 8, pytest.approx(1))
    usage, perplexity = codebook_use(torch.arange(4).repeat(5), 16)
    assert usage == 0.25 and perplexity == pytest.approx(4)


def test_reconstruction_quality_is_the_mean_over_images():
    model, images = small(), pictures(5, 3, 16, 16)
    again = (model.decode(model.encode(images)) * 255).round() / 255
    psnr = (-10 * (again - images).square().mean(dim=(1, 2, 3)).log10()).mean().item()
    for batch_size in (2, 5):
        found = reconstruction_quality(model, images, batch_size)
        assert found["psnr"] == pytest.approx(psnr, abs=1e-3) and -1 < found["ssim"] < 1
    assert found["usage"] == codebook_use(model.encode(images), 32)[0]


@pytest.mark.parametrize("action, message", [
    (lambda m: m.encode(pictures(1, 3, 30, 32)), r"picture of 30 x 32 .* squares of 4 .* cut it to 28 x 32"),
    (lambda m: m.encode(pictures(1, 3, 2, 32)), r"2 x 32 .* multiples of 4; cut it to 4 x 32"),
    (lambda m: m.encode(pictures(3, 32, 32)), r"\(B, 3, H, W\).*found shape \(3, 32, 32\)"),
    (lambda m: m.encode(pictures(1, 1, 32, 32)), r"found shape \(1, 1, 32, 32\)"),
    (lambda m: m.encode(pictures(0, 3, 32, 32)), r"at least one image"),
    (lambda m: m.decode(torch.full((1, 2, 2), 32)), r"tokens from 0 to 31, found 32"),
    (lambda m: m.decode(torch.full((1, 2, 2), -1)), r"tokens from 0 to 31, found -1"),
    (lambda m: m.decode(torch.zeros(4, dtype=torch.int64)), r"expected tokens \(B, h, w\)"),
    (lambda m: m.decode(torch.zeros(1, 2, 2)), r"whole numbers, found torch.float32"),
    (lambda m: VQConfig(downsample=5), r"4, 8, 16, found 5"),
    (lambda m: VQConfig(channels=10), r"multiple of 4 .* found 10"),
    (lambda m: VQConfig(quantizer="rotation"), r"ema, gradient, fsq, found 'rotation'"),
    (lambda m: VQConfig(quantizer="fsq", levels=(8, 1)), r"at least 2 values .* found \(8, 1\)"),
    (lambda m: VQConfig(codes=0), r"at least one code .* found 0"),
])
def test_bad_input(action, message):
    with pytest.raises(ValueError, match=message):
        action(small())


# --- LlamaGen's checkpoints


class TheirVQ(nn.Module):
    """LlamaGen's `VQModel` as its state dict and its order of layers have it, small; for tests."""

    def __init__(self, config, channels):
        super().__init__()
        names = llamagen_names(config)
        self.names, self.layers = names, nn.ModuleDict()
        ours = VQModel(config)
        for part, theirs in names.items():
            with_weights = [layer for layer in getattr(ours, part) if next(layer.parameters(), None) is not None]
            for layer, name in zip(with_weights, theirs, strict=True):
                self.layers[name.replace(".", "/")] = layer
        self.codebook = ours.quantizer.codebook

    def file(self):
        """What `torch.save` would have been given."""
        weights = {"quantize.embedding.weight": self.codebook.detach(), "quantize.codebook_used": torch.zeros(65536)}
        for name, layer in self.layers.items():
            name = name.replace("/", ".")
            for key, value in layer.state_dict().items():
                key = f"{name}.{key}"
                if ".qkv." in key:
                    for which, third in zip("qkv", value.chunk(3)):
                        weights[key.replace(".qkv.", f".{which}.")] = third
                else:
                    weights[key.replace(".skip.", ".nin_shortcut.").replace(".proj.", ".proj_out.")] = value
        return {"model": weights, "args": argparse.Namespace(vq_model="VQ-16"), "steps": 3}

    def run(self, part, x):
        """Layer after layer, as LlamaGen's forward passes go."""
        for name in self.names[part]:
            layer = self.layers[name.replace(".", "/")]
            if name.endswith("conv_out"):
                x = F.silu(x)
            x = layer(x)
        return x


LITTLE = LLAMAGEN | dict(channels=8, hidden=8, codes=64, dim=4)


@pytest.mark.parametrize("downsample, blocks", [(16, 2), (8, 2), (8, 1)])
def test_from_llamagen_gives_the_same_codes_and_pictures(downsample, blocks, tmp_path):
    torch.manual_seed(0)
    config = VQConfig(**LITTLE | dict(downsample=downsample, blocks=blocks))
    theirs = TheirVQ(config, 8)
    torch.save(theirs.file(), tmp_path / "vq.pt")
    model = VQModel.from_llamagen(tmp_path / "vq.pt")
    assert model.config == config and not model.training
    images = pictures(2, 3, 64, 64)
    with torch.no_grad():
        z = theirs.run("encoder", 2 * images - 1).permute(0, 2, 3, 1)
        codebook = F.normalize(theirs.codebook, dim=-1)
        tokens = searched(F.normalize(z, dim=-1).flatten(0, 2), codebook).view(z.shape[:3])
        again = (theirs.run("decoder", codebook[tokens].permute(0, 3, 1, 2)) + 1) / 2
    assert torch.equal(model.encode(images), tokens) and len(tokens.unique()) > 1
    assert_close(model.decode(tokens), again.clamp(0, 1))


def test_the_names_are_those_of_the_published_file():
    """The last of each kind in vq_ds16_c2i.pt."""
    names = llamagen_names(VQConfig(**LLAMAGEN | dict(downsample=16)))
    assert len(names["encoder"]) == 1 + 5 * 2 + 2 + 4 + 3 + 2 + 1 and names["encoder"][:4] == [
        "encoder.conv_in", "encoder.conv_blocks.0.res.0", "encoder.conv_blocks.0.res.1", "encoder.conv_blocks.0.downsample.conv"]
    assert names["encoder"][13:17] == [f"encoder.conv_blocks.4.{x}" for x in ("res.0", "attn.0", "res.1", "attn.1")]
    assert names["decoder"][5:11] == [f"decoder.conv_blocks.0.{x}" for x in ("res.0", "attn.0", "res.1", "attn.1", "res.2", "attn.2")]
    assert sum(p.numel() for p in VQModel(VQConfig(**LLAMAGEN | dict(downsample=16))).parameters()) == 71_883_403


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harmed",)


def broken(change):
    """A file of LlamaGen's form with something wrong."""
    torch.manual_seed(0)
    file = TheirVQ(VQConfig(**LITTLE | dict(downsample=8)), 8).file()
    change(file)
    return file


@pytest.mark.parametrize("change, message", [
    (lambda f: f.pop("model"), "no tokenizer of LlamaGen: expected a key `model`"),
    (lambda f: f["model"].pop("quantize.embedding.weight"), "no tokenizer of LlamaGen"),
    (lambda f: f["model"].pop("encoder.mid.1.q.weight"), r"another architecture: it has no 'encoder.mid.1.q.weight'"),
    (lambda f: f["model"].update({"encoder.extra.weight": torch.zeros(1)}), "it also has encoder.extra.weight"),
    (lambda f: f["model"].update({"decoder.conv_in.weight": torch.zeros(3, 3)}), r"size mismatch for decoder.1.weight"),
    (lambda f: [f["model"].pop(n) for n in list(f["model"]) if "encoder.conv_blocks.3" in n], r"encoder of 3 sizes; expected 4"),
    (lambda f: f.update(model=Harmful()), "cannot be read as a torch file of plain tensors"),
])
def test_other_checkpoints_are_refused(change, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(broken(change), "vq.pt")
    with pytest.raises(ValueError, match=message):
        VQModel.from_llamagen("vq.pt")
    assert not (tmp_path / "harmed").exists()


def test_a_torn_file_is_refused(tmp_path):
    torch.save(broken(lambda f: None), tmp_path / "vq.pt")
    (tmp_path / "torn.pt").write_bytes((tmp_path / "vq.pt").read_bytes()[:5000])
    with pytest.raises(ValueError, match="torn.pt cannot be read"):
        VQModel.from_llamagen(tmp_path / "torn.pt")


# --- what judges pictures


def gan(**options):
    return VQGAN(small(quantizer="gradient"), adversarial=1.0, channels=8, **options)


def gradients(module):
    return {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


def test_each_loss_leaves_the_others_gradients_alone():
    torch.manual_seed(0)
    trained, images = gan(), pictures(2, 3, 32, 32)
    again = 2 * trained.model(images).images - 1
    trained.judging_loss(2 * images - 1, again).backward(retain_graph=True)
    assert all(g is None for g in gradients(trained.model).values())
    assert all(g.abs().sum() > 0 for n, g in gradients(trained.discriminator).items() if "bias" not in n)
    trained.zero_grad(set_to_none=True)
    trained.fooling_loss(again).backward()
    assert all(g is None for g in gradients(trained.discriminator).values())
    assert gradients(trained.model)["decoder.0.weight"].abs().sum() > 0


def test_the_sum_has_the_gradients_of_both_sides():
    """What one step sees equals the two steps of the published loops, taken at the same weights."""
    torch.manual_seed(0)
    trained, images = gan(), pictures(2, 3, 32, 32)
    trained(images).backward()
    found = gradients(trained)
    trained.zero_grad(set_to_none=True)
    made = trained.model(images)
    x, y = 2 * images - 1, 2 * made.images - 1
    (QUIET * hinge_loss(trained.discriminator(x), trained.discriminator(y.detach()))).backward()
    judge = gradients(trained.discriminator)
    picture, fooling = F.mse_loss(y, x), -trained.discriminator(y).mean()
    balance = adaptive_weight(picture, fooling, trained.model.decoder[-1].weight)
    (picture + made.loss + balance * fooling).backward()
    for name, gradient in gradients(trained.model).items():
        assert_close(found[f"model.{name}"], gradient)
    for name, gradient in judge.items():
        assert_close(found[f"discriminator.{name}"], gradient)


def test_the_adaptive_weight_is_a_ratio_of_gradients():
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    assert adaptive_weight((3 * w).sum(), (w * torch.tensor([0.0, 0.5])).sum(), w) == pytest.approx(3 * math.sqrt(2) / 0.5001, rel=1e-4)
    assert adaptive_weight(w.sum(), (0 * w).sum(), w) == 1e4, "bounded, where there is no gradient to compare with"


def test_hinge_loss():
    assert hinge_loss(torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])) == pytest.approx((0.25 + 0.5) / 2)


def test_the_discriminator_starts_late():
    torch.manual_seed(0)
    trained, images = gan(start=2), pictures(2, 3, 32, 32)
    for batch in range(4):
        trained.zero_grad(set_to_none=True)
        loss = trained(images)
        loss.backward()
        begun = sum(p.grad.abs().sum() for p in trained.discriminator.parameters()) > 0
        assert begun == (batch >= 2)
        assert all(p.grad is not None for p in trained.parameters()), "DDP waits for a gradient of every weight"
    assert trained.batches == 4
    plain = trained.eval()(images)
    made = trained.model(images)
    assert_close(plain, F.mse_loss(2 * made.images, 2 * images) + made.loss)
    assert trained.batches == 4, "evaluation does not count"


@pytest.mark.parametrize("size", [16, 32, 64])
def test_the_discriminator_judges_patches(size):
    torch.manual_seed(0)
    judge = PatchDiscriminator(8, layers=2 if size < 32 else 3)
    x = 2 * pictures(2, 3, size, size) - 1
    logits = judge(x)
    assert logits.shape[:2] == (2, 1) and logits.shape[2] > 1
    assert_close(judge(x[:1]), logits[:1], msg="a picture is judged by itself")


@contextmanager
def vgg_on_disk():
    """torchvision's VGG-16 with weights of the same shapes in place of the download."""
    import torchvision

    monkeypatch = pytest.MonkeyPatch()
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in torchvision.models.vgg16().state_dict().items()}
    weights = {name: torch.randn(shape) * 0.03 if name.startswith("features") else torch.zeros(shape) for name, shape in shapes.items()}
    monkeypatch.setattr(torchvision.models.VGG16_Weights.IMAGENET1K_V1.__class__, "get_state_dict", lambda self, **options: weights)
    for kind in (nn.Linear, nn.Conv2d):  # to initialise 138 million weights that are replaced takes seconds
        monkeypatch.setattr(kind, "reset_parameters", lambda self: None)
    monkeypatch.setattr(nn.init, "kaiming_normal_", lambda tensor, **options: tensor)
    monkeypatch.setattr(nn.init, "normal_", lambda tensor, *a, **options: tensor)
    yield
    monkeypatch.undo()


def test_the_perceptual_loss():
    with vgg_on_disk():
        loss = PerceptualLoss()
    x = (2 * pictures(2, 3, 32, 32) - 1).requires_grad_()
    y = 2 * pictures(2, 3, 32, 32, seed=1) - 1
    value = loss(x, y)
    value.backward()
    assert value > 0 and x.grad.abs().sum() > 0 and loss(y, y).abs() < 1e-6
    assert not any(p.requires_grad for p in loss.network.parameters())
    network = loss.network  # its own layers, spelled out from Zhang et al. 2018, equation 1
    total, a, b = 0.0, *(network.scaling_layer(v) for v in (x.detach(), y))
    for part, lin in zip(("slice1", "slice2", "slice3", "slice4", "slice5"), (network.lin0, network.lin1, network.lin2, network.lin3, network.lin4)):
        a, b = getattr(network.net, part)(a), getattr(network.net, part)(b)
        difference = (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square()
        total = total + F.conv2d(difference, lin.model[-1].weight).mean(dim=(1, 2, 3))
    assert_close(value.detach(), total.mean(), rtol=1e-4, atol=1e-6)


def test_the_perceptual_loss_in_training():
    model, images = small(), pictures(2, 3, 32, 32)
    with vgg_on_disk():
        trained = VQGAN(model, perceptual=1.0)
    without = VQGAN(trained.model)
    assert trained.eval()(images) > without.eval()(images)
    assert not any("perceptual" in name for name in trained.state_dict()), "VGG is not saved with every state"
    assert trained.discriminator is None


def test_without_the_weights_of_vgg_a_sentence(monkeypatch):
    from urllib.error import URLError

    import torchvision

    def unreachable(self, **options):
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.models.VGG16_Weights.IMAGENET1K_V1.__class__, "get_state_dict", unreachable)
    with pytest.raises(OSError, match="vgg16-397923af.pth, 528 MB.*no route to host.*perceptual 0"):
        VQGAN(small(), perceptual=1.0)


# --- the script


def test_a_run_begins_with_a_tokenizer_that_is_there(tmp_path):
    test = replace(script.PRESETS["test"], quantizer="gradient", kmeans=False, restart=0.0)
    script.main(replace(test, out=tmp_path / "first"))
    judged = replace(test, init=str(tmp_path / "first"), lr=0.0, adversarial=0.5, adversarial_channels=8, seed=1, out=tmp_path / "second")
    result = script.main(judged)
    assert "--init" in result["command"] and math.isfinite(result["metrics"]["psnr"])
    first, second = (load_tokenizer(tmp_path / name).state_dict() for name in ("first", "second"))
    for name in first:
        if name != "quantizer.counts":
            assert torch.equal(first[name], second[name]), f"{name} moved at a rate of zero"
    with pytest.raises(ValueError, match="another shape than this run: codes = 32, here 64"):
        script.main(replace(judged, codes=64, out=tmp_path / "third"))


# --- what ships


@pytest.mark.parametrize("checkpoint", sorted((ROOT / "data/checkpoints").glob("vq-*")), ids=lambda path: path.name)
def test_shipped_tokenizers_are_as_good_as_their_result_says(checkpoint):
    about = shipped_result(checkpoint)
    config, metrics = about["config"], about["metrics"]
    val = load_dataset(config["data"], config["size"], "val", config["val_images"], seed=config["seed"])
    found = reconstruction_quality(load_tokenizer(checkpoint), torch.stack([item.image for item in val]))
    for name, close in {"psnr": 0.05, "ssim": 0.005, "usage": 0.01, "perplexity": 10.0}.items():
        assert found[name] == pytest.approx(metrics[name], abs=close), name


def test_bench(capsys):
    assert main(["bench", "vq", "--quick", "--json"]) == 0
    rows = {row["case"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert [row["value"] for case, row in rows.items() if "differ from float64" in case] == [0, 0]
    assert [row["value"] < 0.5 for case, row in rows.items() if "16384 codes of 8: added peak memory" in case] == [True]
    assert [row["value"] > 5 for case, row in rows.items() if "read at random" in case] == [True]
