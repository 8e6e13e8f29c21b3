"""Chapter 4: quantizers, the tokenizer, LlamaGen's files, and the losses of a VQGAN.

What holds for every model is in test_models.py.
"""

import argparse
import copy
import json
import math
import os
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.multiprocessing.spawn import start_processes
from torch.testing import assert_close

from minigen import vq, vqgan
from minigen.__main__ import main
from minigen.checkpoints import load, save_checkpoint
from minigen.codes import load_tokenizer
from minigen.data import load_dataset
from minigen.features import LOSS_NETWORK, FeatureConfig, FeatureNetwork
from minigen.runs import shipped_result
from minigen.train import vq as script
from minigen.vq import FSQ, LLAMAGEN, VectorQuantizer, VQConfig, VQModel, nearest_code
from minigen.vqgan import (
    VQGAN,
    FeatureLoss,
    PerceptualLoss,
    adaptive_weight,
    hinge_loss,
)

CHECKPOINTS = Path(__file__).resolve().parents[1] / "data/checkpoints"
SMALL = VQConfig(downsample=4, channels=8, z_channels=8, codebook_size=32,
                 codebook_dim=4, kmeans=False, dead_code_threshold=0.0)


def small(seed=0, **changes):
    torch.manual_seed(seed)
    return VQModel(replace(SMALL, **changes))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def scores(vectors, codebook):
    """v . c - |c|^2 / 2 in float64: larger where c is nearer to v."""
    vectors, codebook = vectors.double(), codebook.double()
    return vectors @ codebook.T - codebook.square().sum(dim=1) / 2


def assert_nearest(found, vectors, codebook):
    """No code is nearer than those found by more than the rounding of float32.

    A score of d products and a square has d + 2 roundings; two of them are compared.
    """
    exact, half = scores(vectors, codebook), codebook.double().square().sum(1).max() / 2
    size = vectors.double().norm(dim=1) * (2 * half).sqrt() + half
    tolerance = 2 * (codebook.shape[1] + 2) * torch.finfo(torch.float32).eps * size
    gap = exact.amax(dim=1) - exact.gather(1, found[:, None])[:, 0]
    assert (gap <= tolerance).all()


# --- the search for the nearest code


def test_a_decay_of_zero_takes_the_mean_of_the_last_batch():
    quantizer = VectorQuantizer(3, 2, decay=0.0, dead_code_threshold=0.0)
    vectors = normal(40, 2)
    tokens = torch.arange(40) % 2
    kept = quantizer.codebook[2].clone()
    quantizer.update(vectors, tokens)
    means = torch.stack([vectors[::2].mean(0), vectors[1::2].mean(0), kept])
    assert_close(quantizer.codebook, means)


@pytest.mark.parametrize(("K", "d"), [
    (1, 3), (2, 1), (5, 4), (127, 8), (128, 8), (1024, 8), (192, 64)])
def test_nearest_code(K, d):
    """Whole numbers are computed without rounding, so all ties must be won as well."""
    vectors, codebook = (3 * normal(300, d)).round(), (3 * normal(K, d, seed=1)).round()
    expected = scores(vectors, codebook).argmax(dim=1)
    real = normal(300, d, seed=2), normal(K, d, seed=3)
    for rows in (None, 1, 7, 300, 1000):
        assert torch.equal(nearest_code(vectors, codebook, rows), expected)
        assert_nearest(nearest_code(*real, rows), *real)


@pytest.mark.parametrize(("vectors", "codebook"), [
    (normal(50, 4), normal(200, 4, seed=1).repeat(3, 1)),  # equal codes
    (normal(256, 8) * 1e-5 + 100, normal(256, 8, seed=2) * 1e-5 + 100),
    (normal(500, 8).bfloat16(), normal(256, 8, seed=1).bfloat16())])
@pytest.mark.parametrize("autocast", [False, True])
def test_nearest_code_of_hard_vectors(vectors, codebook, autocast):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = nearest_code(vectors, codebook)
    assert found.dtype == torch.int64
    assert_nearest(found, vectors, codebook)


# --- quantizers


def quantizers():
    torch.manual_seed(0)
    options = {"gradient": {}, "ema": {"decay": 0.9}, "sphere": {"normalize": True},
               "sphere ema": {"normalize": True, "decay": 0.9, "kmeans": True,
                              "dead_code_threshold": 0.1}}
    made = {name: VectorQuantizer(32, 4, **more) for name, more in options.items()}
    return made | {"fsq": FSQ((8, 5, 5, 5))}


@pytest.fixture(params=quantizers())
def quantizer(request):
    made = quantizers()[request.param]
    made.name = request.param
    return made


def test_a_quantizer_gives_codes_and_passes_gradients_through(quantizer):
    z = normal(2, 3, 5, quantizer.codebook_dim).requires_grad_()
    vectors, tokens, loss = quantizer.eval()(z)
    assert tokens.shape == (2, 3, 5)
    assert tokens.dtype == torch.int64
    assert 0 <= tokens.min() <= tokens.max() < quantizer.codebook_size
    assert_close(vectors, quantizer.embed(tokens))
    assert loss.shape == ()
    if quantizer.name == "fsq":  # as if there were no rounding
        smooth = quantizer.bound(z) / (quantizer.levels // 2)
    else:
        smooth = F.normalize(z, dim=-1) if quantizer.normalize else z
    weights = normal(*vectors.shape, seed=1)
    found, expected = (torch.autograd.grad((v * weights).sum(), z)[0]
                       for v in (vectors, smooth))
    assert_close(found, expected)


def test_codes_are_quantized_to_themselves(quantizer):
    tokens = torch.arange(quantizer.codebook_size)
    codes = quantizer.eval().embed(tokens)
    if quantizer.name == "fsq":  # before the bound
        levels = quantizer.levels
        half, offset = (levels - 1) * 1.001 / 2, 0.5 * (levels % 2 == 0)
        codes = torch.atanh((codes * (levels // 2) + offset) / half)
        codes = codes - torch.atanh(offset / half)
    assert torch.equal(quantizer(codes[None, None]).tokens.flatten(), tokens)


def test_a_quantizer_computes_in_float32_under_autocast(quantizer):
    z = normal(2, 3, 3, quantizer.codebook_dim)
    expected = quantizer.eval()(z)
    with torch.autocast("cpu", torch.bfloat16):
        found = quantizer(z)
    assert found.vectors.dtype == torch.float32
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.vectors, expected.vectors)


def test_the_losses_of_van_den_oord():
    """Only they reach the codebook: the straight-through vectors have no path to it."""
    torch.manual_seed(0)
    quantizer = VectorQuantizer(16, 4, commitment=0.25)
    z = normal(1, 2, 6, 4).requires_grad_()
    vectors, tokens, loss = quantizer(z)
    vectors.sum().backward(retain_graph=True)
    assert quantizer.codebook.grad is None
    codes = quantizer.codebook[tokens]
    assert_close(loss, (codes - z).square().mean() * 1.25)
    to_z, to_codebook = torch.autograd.grad(loss, [z, quantizer.codebook])
    slope = (2 * (codes - z) / z.numel()).detach()
    assert_close(to_z, -0.25 * slope)
    expected = torch.zeros(16, 4).index_add(0, tokens.flatten(), slope.flatten(0, 2))
    assert_close(to_codebook, expected)


def test_the_moving_average_is_its_formula():
    """Three batches, in NumPy and float64."""
    torch.manual_seed(0)
    quantizer = VectorQuantizer(8, 3, decay=0.8)
    assert not list(quantizer.parameters())
    codebook = quantizer.codebook.double().numpy().copy()
    count, total = np.ones(8), codebook.copy()
    for seed in range(3):
        z = normal(2, 4, 4, 3, seed=seed)
        tokens = quantizer(z).tokens.numpy().ravel()
        flat = z.double().numpy().reshape(-1, 3)
        distance = ((flat[:, None] - codebook) ** 2).sum(axis=-1)
        assert (tokens == distance.argmin(axis=1)).all()
        for k in range(8):
            count[k] = 0.8 * count[k] + 0.2 * (tokens == k).sum()
            total[k] = 0.8 * total[k] + 0.2 * flat[tokens == k].sum(axis=0)
        codebook = total / count[:, None]
    assert_close(quantizer.codebook.double(), torch.from_numpy(codebook),
                 atol=1e-5, rtol=1e-5)
    before = quantizer.eval().codebook.clone()
    quantizer(normal(2, 4, 4, 3))
    assert torch.equal(quantizer.codebook, before), "nothing is learned in eval mode"


@pytest.mark.parametrize("updates", [500, 2000])  # until the averages are zero
def test_an_idle_code_stays_and_can_be_chosen_again(updates):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(8, 3, decay=0.9)
    quantizer.codebook[4:] += 100
    quantizer.embed_avg.copy_(quantizer.codebook)
    before = quantizer.codebook.clone()
    for seed in range(updates):
        tokens = quantizer(normal(1, 4, 4, 3, seed=seed)).tokens
        assert tokens.max() < 4
    assert torch.equal(quantizer.codebook[4:], before[4:])
    assert not torch.equal(quantizer.codebook[:4], before[:4])
    z = before[5] + 0.01 * normal(1, 2, 2, 3)
    assert (quantizer(z).tokens == 5).all()
    assert_close(quantizer.codebook[5], z.flatten(0, 2).mean(dim=0))
    idle = [4, 6, 7]
    assert torch.equal(quantizer.codebook[idle], before[idle])
    assert quantizer.codebook.isfinite().all()


def test_kmeans_finds_separate_groups():
    centers = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    vectors = (centers[:, None] + 0.1 * normal(3, 40, 2)).flatten(0, 1)
    lonely = torch.full((1, 2), 1e3)  # a center that no vector is near to stays
    found = vq.kmeans(vectors, torch.cat([vectors[[0, 41, 81]], lonely]), rounds=5)
    assert_close(found, torch.cat([vectors.view(3, 40, 2).mean(dim=1), lonely]))
    quantizer = VectorQuantizer(64, 4, decay=0.99, kmeans=True)
    quantizer(normal(1, 2, 2, 4))  # fewer vectors than codes
    assert quantizer.codebook.isfinite().all()


@pytest.mark.parametrize("decay", [None, 0.99])
def test_no_code_is_dead_right_after_kmeans(decay):
    """Also if a batch has many vectors for each code."""
    torch.manual_seed(0)
    quantizer = VectorQuantizer(16, 4, decay, kmeans=True, dead_code_threshold=0.1)
    z = normal(1, 16, 32, 4)
    quantizer.train()(z)
    error = (z - quantizer.embed(quantizer.eval()(z).tokens)).square().mean()
    assert error < 0.35 * z.var()


@pytest.mark.parametrize("decay", [None, 0.99])
def test_the_codebook_is_initialized_once_and_in_training(decay):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(16, 4, decay=decay, kmeans=True)
    first = quantizer.codebook.detach().clone()
    z = normal(1, 8, 8, 4) + 50
    quantizer.eval()(z)
    assert torch.equal(quantizer.codebook, first)
    quantizer.train()(z)
    assert not quantizer.needs_init
    assert (quantizer.codebook - 50).abs().max() < 5, "the codes lie among the vectors"
    codes = quantizer.embed(quantizer.eval()(z).tokens)
    assert (z - codes).square().mean() < 0.6 * z.var(), "and explain them"
    again = quantizer.codebook.detach().clone()
    quantizer.train()(normal(1, 8, 8, 4) - 50)
    moved = (quantizer.codebook - again).abs().amax(dim=1) > 1
    assert moved.sum() <= 1, "a second batch does not initialize them again"


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("decay", [None, 0.9])
def test_dead_codes_move_to_vectors_of_the_batch(decay, normalize):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(64, 4, decay=decay, dead_code_threshold=0.5,
                                normalize=normalize)
    quantizer.codebook.data[10:] = 1e3  # where no vector is
    z = normal(2, 8, 8, 4) - 3
    for _ in range(40):
        loss = quantizer(z).loss
        if loss.requires_grad:
            loss.backward()  # which codes that moved meanwhile must not disturb
    vectors, codes = quantizer.project(z).flatten(0, 2), quantizer.codebook
    assert torch.cdist(quantizer.project(codes), vectors)[10:].amin(dim=1).max() < 2
    assert vq.codebook_usage(quantizer.eval()(z).tokens, 64)[0] > 0.5
    if decay is not None:
        assert_close(quantizer.embed_avg / quantizer.cluster_size[:, None], codes)


def learn(rank, folder, options):
    """Train a quantizer on one half of the vectors, as one of two processes."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    torch.manual_seed(5)
    quantizer = VectorQuantizer(32, 4, decay=0.9, **options)
    torch.manual_seed(rank)  # each process draws its own random numbers
    for _ in range(6):
        quantizer(normal(8, 4, 4, 4)[rank::2])
    torch.save(quantizer.codebook, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("options", [{}, {"kmeans": True, "dead_code_threshold": 0.3}])
def test_two_processes_learn_one_codebook(options, tmp_path):
    start_processes(learn, (tmp_path, options), nprocs=2, start_method="fork")
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(one, other)
    if not options:  # nothing is random: as one process with the whole batch
        torch.manual_seed(5)
        alone = VectorQuantizer(32, 4, decay=0.9)
        for _ in range(6):
            alone(normal(8, 4, 4, 4))
        assert_close(one, alone.codebook)


def test_fsq_against_the_formulas_of_the_paper():
    """Appendix A.1 of Mentzer et al. 2023, in NumPy."""
    levels, basis = np.array([8, 5, 5, 5]), np.array([1, 8, 40, 200])
    z = normal(200, 4).double().numpy() * 3
    half, offset = (levels - 1) * (1 + 1e-3) / 2, np.where(levels % 2 == 1, 0.0, 0.5)
    bounded = np.tanh(z + np.arctanh(offset / half)) * half - offset
    expected = np.round(bounded) / (levels // 2)
    digits = expected * (levels // 2) + levels // 2
    quantizer = FSQ((8, 5, 5, 5))
    found = quantizer(torch.from_numpy(z).float()[None, None])
    assert_close(found.vectors[0, 0].double(), torch.from_numpy(expected),
                 atol=1e-5, rtol=0)
    tokens = (digits * basis).sum(axis=-1).round().astype(int)
    assert np.array_equal(found.tokens.numpy().ravel(), tokens)
    two = FSQ((2, 2))(torch.tensor([[[[-0.1, 0.1], [0.1, -0.1]]]]))
    assert two.tokens.tolist() == [[[2, 1]]], "two levels are split at 0"
    codes = quantizer.embed(torch.arange(1000))
    assert len(codes.unique(dim=0)) == 1000
    assert codes.abs().max() == 1


# --- the tokenizer


@pytest.mark.parametrize("downsample", [4, 8, 16])
@pytest.mark.parametrize("quantizer", ["ema", "gradient", "fsq"])
def test_tokens_and_back(downsample, quantizer):
    model, x = small(downsample=downsample, quantizer=quantizer), images(2, 3, 32, 48)
    tokens = model.encode(x)
    assert tokens.shape == (2, 32 // downsample, 48 // downsample)
    assert model.codebook_size == model.quantizer.codebook_size
    again = model.decode(tokens)
    assert again.shape == x.shape
    assert 0 <= again.min() <= again.max() <= 1
    made = model.eval()(x)
    assert torch.equal(made.tokens, tokens)
    assert_close(made.images.clamp(0, 1), again)
    assert torch.equal(model.decode(tokens.int()), again)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(x)
    assert rough.images.dtype == rough.loss.dtype == torch.float32
    assert (rough.images - made.images).abs().mean() < 0.1


def test_the_attention_block_is_attention_over_positions():
    torch.manual_seed(0)
    block, x = vq.AttentionBlock(8), normal(2, 8, 3, 5)
    pairs = zip(block.qkv.weight.split(8), block.qkv.bias.split(8), strict=True)
    q, k, v = (F.conv2d(block.norm(x), *pair).flatten(2).mT for pair in pairs)
    y = (q @ k.mT / math.sqrt(8)).softmax(dim=-1) @ v                 # (B, H W, C)
    assert_close(block(x), x + block.proj(y.mT.unflatten(2, (3, 5))))


@pytest.mark.parametrize("downsample", [4, 8, 16])
def test_attention_is_built_where_it_is_used_alone(downsample, monkeypatch):
    """At the lowest resolution: after each residual block, and once in the middle."""
    built, init = [], vq.AttentionBlock.__init__
    monkeypatch.setattr(vq.AttentionBlock, "__init__", lambda block, channels: (
        init(block, channels), built.append(channels))[0])
    model = small(downsample=downsample, blocks=2)
    used = [[layer.proj.in_channels for layer in part
             if isinstance(layer, vq.AttentionBlock)]
            for part in (model.encoder, model.decoder)]
    assert used == [[32] * (2 + 1), [32] * (1 + 3)]
    assert len(built) == 7


def test_usage_and_quality():
    constant, even = torch.zeros(3, 4, 4).long(), torch.arange(4).repeat(5)
    assert vq.codebook_usage(constant, 8) == (1 / 8, pytest.approx(1))
    assert vq.codebook_usage(even, 16) == (0.25, pytest.approx(4))
    model, x = small(), images(5, 3, 16, 16)
    again = (model.decode(model.encode(x)) * 255).round() / 255
    psnr = -10 * (again - x).square().mean(dim=(1, 2, 3)).log10().mean().item()
    for batch_size in (2, 5):  # means over the images
        found = vq.reconstruction_quality(model, x, batch_size)
        assert found["psnr"] == pytest.approx(psnr, abs=1e-3)
        assert -1 < found["ssim"] < 1
    assert found["usage"] == vq.codebook_usage(model.encode(x), 32)[0]


@pytest.mark.parametrize(("action", "message"), [
    (lambda m: m.encode(images(1, 3, 30, 32)), r"of 4, found 30 x 32; .* to 28 x 32"),
    (lambda m: m.encode(images(1, 3, 2, 32)), r"found 2 x 32; .* to 4 x 32"),
    (lambda m: m.encode(images(3, 32, 32)), r"found shape \(3, 32, 32\)"),
    (lambda m: m.decode(torch.zeros(4).long()), r"tokens \(B, h, w\) .* shape \(4,\)"),
    (lambda m: VQConfig(downsample=5), "one of 4, 8, 16, found 5"),
    (lambda m: VQConfig(channels=10), "multiple of 4, found 10"),
    (lambda m: VQConfig(quantizer="fsq", levels=(8, 1)), r"2 each, found \(8, 1\)"),
    (lambda m: VQConfig(quantizer="fsq", levels=()), r"2 each, found \(\)"),
    (lambda m: VQConfig(codebook_size=0), "at least 1, found 0 and 8"),
    (lambda m: VQConfig(codebook_dim=0), "at least 1, found 1024 and 0"),
])
def test_bad_input(action, message):
    with pytest.raises(ValueError, match=message):
        action(small())


# --- the fingerprint: weights and shapes, and nothing else


def nudge(tensor):
    tensor.view(-1)[-1] += 1e-3


def rename(model):
    named = ((f"layer{n}", layer) for n, layer in enumerate(model.encoder))
    model.encoder = nn.Sequential(OrderedDict(named))


@torch.no_grad()
@pytest.mark.parametrize(("differs", "change"), [
    (False, lambda m: setattr(m, "config", SimpleNamespace(new_name=8))),
    (False, rename),
    (False, lambda m: nudge(m.quantizer.cluster_size)),
    (False, lambda m: nudge(m.quantizer.embed_avg)),
    (False, lambda m: m.quantizer.needs_init.fill_(True)),
    (True, lambda m: nudge(m.encoder[0].weight)),
    (True, lambda m: nudge(m.encoder[-1].bias)),
    (True, lambda m: nudge(m.quantizer.codebook)),
    (False, lambda m: nudge(m.decoder[0].weight)),  # tokens mean the same
    (False, lambda m: nudge(m.decoder[-1].bias)),
    (True, lambda m: m.quantizer.codebook.resize_(16, 8)),  # the same numbers
    (True, lambda m: setattr(m.quantizer, "normalize", True)),
])
def test_the_fingerprint_is_that_of_the_tokens(differs, change):
    model, before = small(), small().fingerprint()
    assert model.fingerprint() == before
    assert len(before) == 16
    change(model)
    assert (model.fingerprint() != before) == differs


@pytest.mark.parametrize("quantizer", ["ema", "gradient", "fsq"])
def test_the_fingerprint_lasts(quantizer, tmp_path):
    def fingerprint(seed=0, **changes):
        return small(seed, quantizer=quantizer, **changes).fingerprint()

    save_checkpoint(small(quantizer=quantizer), tmp_path)
    assert load(tmp_path).fingerprint() == fingerprint() != fingerprint(seed=1)
    assert fingerprint(dropout=0.5, commitment=1.0, decay=0.5) == fingerprint()
    if quantizer == "fsq":  # the weights of both have the same shapes and values
        assert fingerprint(levels=(4, 3)) != fingerprint(levels=(3, 4))


# --- LlamaGen's files


class TheirVQ(nn.Module):
    """A small `VQModel` of LlamaGen, with its names and its order of layers."""

    def __init__(self, config):
        super().__init__()
        self.names, ours = vq.llamagen_names(config), VQModel(config)
        self.codebook, self.layers = ours.quantizer.codebook, nn.ModuleDict()
        for part, names in self.names.items():
            layers = [x for x in getattr(ours, part) if list(x.parameters())]
            names = [name.replace(".", "/") for name in names]
            self.layers.update(zip(names, layers, strict=True))

    def file(self):
        """What `torch.save` would have been given."""
        weights = {"quantize.embedding.weight": self.codebook.detach(),
                   "quantize.codebook_used": torch.zeros(65536)}
        for key, value in self.layers.state_dict().items():
            key = key.replace("/", ".").replace(".skip.", ".nin_shortcut.")
            key = key.replace(".proj.", ".proj_out.")
            thirds = zip("qkv", value.chunk(3), strict=True) if ".qkv." in key else ()
            several = {key.replace(".qkv.", f".{q}."): third for q, third in thirds}
            weights |= several or {key: value}
        args = argparse.Namespace(vq_model="VQ-16")
        return {"model": weights, "args": args, "steps": 3}

    def run(self, part, x):
        """Layer after layer, as LlamaGen's forward passes go."""
        for name in self.names[part]:
            x = F.silu(x) if name.endswith("conv_out") else x
            x = self.layers[name.replace(".", "/")](x)
        return x


LITTLE = LLAMAGEN | {"channels": 8, "z_channels": 8, "codebook_size": 64,
                     "codebook_dim": 4}


@pytest.mark.parametrize(("downsample", "blocks"), [(16, 2), (8, 2), (8, 1)])
def test_llamagen_gives_the_same_codes_and_images(downsample, blocks, tmp_path):
    torch.manual_seed(0)
    config = VQConfig(**LITTLE | {"downsample": downsample, "blocks": blocks})
    theirs = TheirVQ(config)
    torch.save(theirs.file(), tmp_path / "vq.pt")
    model = load_tokenizer(tmp_path / "vq.pt")
    assert model.config == config
    assert not model.training
    x = images(2, 3, 64, 64)
    tokens = model.encode(x)
    assert len(tokens.unique()) > 1
    with torch.no_grad():
        z = theirs.run("encoder", 2 * x - 1).permute(0, 2, 3, 1)      # (B, h, w, d)
        codebook = F.normalize(theirs.codebook, dim=-1)
        assert_nearest(tokens.flatten(), F.normalize(z, dim=-1).flatten(0, 2), codebook)
        again = theirs.run("decoder", codebook[tokens].permute(0, 3, 1, 2))
    assert_close(model.decode(tokens), (again / 2 + 0.5).clamp(0, 1))


def test_the_names_are_those_of_the_published_file():
    """Those of vq_ds16_c2i.pt: the first and the last of each kind."""
    config = VQConfig(**LLAMAGEN | {"downsample": 16})
    names = vq.llamagen_names(config)
    assert len(names["encoder"]) == 1 + 5 * 2 + 2 + 4 + 3 + 2 + 1
    encoder, decoder = (" ".join(part).replace("coder.conv_blocks.", ".")
                        for part in names.values())
    assert encoder.startswith("encoder.conv_in en.0.res.0 en.0.res.1 en.0.downsample")
    assert " en.4.res.0 en.4.attn.0 en.4.res.1 en.4.attn.1 encoder.mid.0 " in encoder
    assert (" decoder.mid.2 de.0.res.0 de.0.attn.0 de.0.res.1 de.0.attn.1 de.0.res.2 "
            "de.0.attn.2 de.0.upsample.conv de.1.res.0 ") in decoder
    assert sum(p.numel() for p in VQModel(config).parameters()) == 71_883_403


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harmed",)


def without(text):
    """A change that removes the weights with `text` in their names."""
    return lambda file: [file["model"].pop(name) for name in list(file["model"])
                         if text in name]


@pytest.mark.parametrize(("change", "message"), [
    (lambda f: f.pop("model"), "is not a tokenizer of LlamaGen: expected a `model`"),
    (without("quantize.embedding"), "is not a tokenizer of LlamaGen"),
    (without("encoder.mid.1.q.weight"), "architecture: it has no 'enc.*q.weight"),
    (without("encoder.conv_blocks.3"), "encoder of 3 resolutions, expected 4"),
    (lambda f: f["model"].update({"encoder.extra.weight": torch.zeros(1)}),
     "it also has encoder.extra.weight"),
    (lambda f: f["model"].update({"decoder.conv_in.weight": torch.zeros(3, 3)}),
     "size mismatch for decoder.1.weight"),
    (lambda f: f.update(model=Harmful()), "vq.pt is not a torch file of tensors"),
    (None, "vq.pt is not a torch file of tensors"),  # the file ends too early
])
def test_other_files_are_refused(change, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    file = TheirVQ(VQConfig(**LITTLE | {"downsample": 8})).file()
    if change:
        change(file)
    torch.save(file, "vq.pt")
    if not change:
        os.truncate("vq.pt", 5000)
    with pytest.raises(ValueError, match=message):
        VQModel.from_llamagen("vq.pt")
    assert not Path("harmed").exists()


# --- the losses of a VQGAN


def gan(**options):
    torch.manual_seed(0)
    return VQGAN(small(quantizer="gradient"), adversarial=1.0, channels=8, **options)


def gradients(module):
    """The gradient of each parameter that has one, which is then cleared."""
    found = {name: parameter.grad.clone() for name, parameter
             in module.named_parameters() if parameter.grad is not None}
    module.zero_grad(set_to_none=True)
    return found


def test_the_sum_has_the_gradients_of_both_sides():
    """One step does what both of the published loops do, at the same weights."""
    trained, x = gan(), images(2, 3, 32, 32)
    trained(x).backward()
    found = gradients(trained)
    made = trained.model(x)
    real, fake = 2 * x - 1, 2 * made.images - 1
    logits = trained.discriminator(real), trained.discriminator(fake.detach())
    (vqgan.DISCRIMINATOR_WEIGHT * hinge_loss(*logits)).backward()
    expected = gradients(trained)
    squares, generator = F.mse_loss(fake, real), -trained.discriminator(fake).mean()
    balance = adaptive_weight(squares, generator, trained.model.decoder[-1].weight)
    (squares + made.loss + balance * generator).backward()
    expected |= {name: gradient for name, gradient in gradients(trained).items()
                 if name.startswith("model")}
    assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert all(g.any() for name, g in found.items() if "bias" not in name)


def test_hinge_loss_and_adaptive_weight():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert hinge_loss(real, fake) == pytest.approx((0.25 + 0.5) / 2)
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    other = (w * torch.tensor([0.0, 0.5])).sum()
    expected = 3 * math.sqrt(2) / 0.5001
    assert adaptive_weight((3 * w).sum(), other, w) == pytest.approx(expected, rel=1e-4)
    assert adaptive_weight(w.sum(), (0 * w).sum(), w) == 1e4, "bounded"


def test_the_discriminator_starts_late():
    trained, x = gan(start=2), images(2, 3, 32, 32)
    for batch in range(4):
        trained(x).backward()
        found = gradients(trained)
        assert set(found) == {name for name, _ in trained.named_parameters()}, "for DDP"
        trains = any(g.any() for name, g in found.items() if "discriminator" in name)
        assert trains == (batch >= 2)
    plain, made = trained.eval()(x), trained.model(x)
    assert_close(plain, F.mse_loss(2 * made.images, 2 * x) + made.loss)
    assert trained.batches == 4, "evaluation does not count"


@pytest.mark.parametrize("size", [16, 32, 64])
def test_the_discriminator_rates_patches(size):
    torch.manual_seed(0)
    discriminator = vqgan.PatchDiscriminator(8, layers=2 if size < 32 else 3)
    x = 2 * images(2, 3, size, size) - 1
    logits = discriminator(x)
    assert logits.shape[:2] == (2, 1)
    assert logits.shape[2] > 1
    assert_close(discriminator(x[:1]), logits[:1], msg="each image is rated by itself")


@pytest.mark.parametrize("body", ["plain", "residual"])
def test_the_feature_loss_is_the_distance_of_unit_vectors_at_each_depth(body):
    torch.manual_seed(0)
    network = FeatureNetwork(FeatureConfig(body=body, widths=(8, 16), dim=8, size=32))
    loss = FeatureLoss(network.eval())
    x = (2 * images(2, 3, 32, 32) - 1).requires_grad_()
    y = 2 * images(2, 3, 32, 32, seed=1) - 1
    value, total = loss(x, y), 0.0
    value.backward()
    assert x.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in network.parameters())
    with torch.no_grad():
        pairs = zip(network.layers((x + 1) / 2), network.layers((y + 1) / 2))
    for a, b in pairs:
        squares = (a / a.norm(dim=1, keepdim=True) - b / b.norm(dim=1, keepdim=True))
        total += squares.square().sum(1).mean() / 2
    assert_close(value.detach(), total, rtol=1e-3, atol=1e-5)
    assert loss(y, y) == 0
    assert copy.deepcopy(loss) is loss, "shared with the averaged model"


def test_losses_of_a_tokenizer_are_chosen_and_not_saved():
    x, model = images(2, 3, 32, 32), small()
    made = model.eval()(x)
    plain = F.l1_loss(2 * made.images, 2 * x) + made.loss
    assert_close(VQGAN(model, "l1").eval()(x), plain)
    with_features = VQGAN(model, "l1", features=0.1).eval()
    assert with_features(x) > plain
    assert set(with_features.state_dict()) == set(VQGAN(model).state_dict())
    shipped = load(LOSS_NETWORK, FeatureNetwork)
    network = with_features.distances[0][1].network
    assert network.fingerprint() == shipped.fingerprint()


VGG = torchvision.models.VGG16_Weights.IMAGENET1K_V1.__class__


@pytest.fixture
def perceptual():
    """The loss of a VGG-16 with random weights in place of the download."""
    torch.manual_seed(0)
    with torch.device("meta"):
        state = torchvision.models.vgg16().state_dict()
    weights = {name: torch.randn(x.shape) * 0.03 if name.startswith("features")
               else torch.zeros(x.shape) for name, x in state.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VGG, "get_state_dict", lambda self, **options: weights)
        for kind in (nn.Linear, nn.Conv2d):  # not to initialize 138 million weights
            patch.setattr(kind, "reset_parameters", lambda self: None)
        for name in ("kaiming_normal_", "normal_"):
            patch.setattr(nn.init, name, lambda tensor, *args, **options: tensor)
        return PerceptualLoss()


def test_the_perceptual_loss(perceptual, monkeypatch):
    x = (2 * images(2, 3, 32, 32) - 1).requires_grad_()
    y = 2 * images(2, 3, 32, 32, seed=1) - 1
    value = perceptual(x, y)
    value.backward()
    assert value > 0
    assert x.grad.abs().sum() > 0
    assert perceptual(y, y).abs() < 1e-6
    network = perceptual.network
    assert not any(p.requires_grad for p in network.parameters())
    total, a, b = 0.0, network.scaling_layer(x.detach()), network.scaling_layer(y)
    for n in range(5):  # equation 1 of Zhang et al. 2018
        a, b = (getattr(network.net, f"slice{n + 1}")(x) for x in (a, b))
        squares = (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square()
        squares = F.conv2d(squares, getattr(network, f"lin{n}").model[-1].weight)
        total = total + squares.mean(dim=(1, 2, 3))
    assert_close(value.detach(), total.mean(), rtol=1e-4, atol=1e-6)
    monkeypatch.setattr(vqgan, "PerceptualLoss", lambda: perceptual)
    trained = VQGAN(small(), perceptual=1.0).eval()
    pixels = images(2, 3, 32, 32)
    assert trained(pixels) > VQGAN(trained.model).eval()(pixels)
    assert not any("perceptual" in name for name in trained.state_dict()), "not saved"
    assert trained.discriminator is None


def test_without_the_weights_of_vgg_a_sentence(monkeypatch):
    def unreachable(self, **options):
        raise URLError("no route to host")

    monkeypatch.setattr(VGG, "get_state_dict", unreachable)
    message = r"vgg16-397923af.pth \(528 MB\).*no route to host.*perceptual 0"
    with pytest.raises(OSError, match=message):
        VQGAN(small(), perceptual=1.0)


# --- the script, the benchmark, and what ships


def test_a_run_begins_with_a_given_tokenizer(tmp_path):
    first = replace(script.PRESETS["test"], quantizer="gradient", kmeans=False,
                    dead_code_threshold=0.0, out=tmp_path / "first")
    script.main(first)
    second = replace(first, init=str(tmp_path / "first"), lr=0.0, adversarial=0.5,
                     adversarial_channels=8, seed=1, out=tmp_path / "second")
    result = script.main(second)
    assert "--init" in result["command"]
    assert math.isfinite(result["metrics"]["psnr"])
    before, after = (load(tmp_path / name, VQModel) for name in ("first", "second"))
    for old, new in zip(before.parameters(), after.parameters(), strict=True):
        assert torch.equal(old, new), "moved at a rate of zero"
    message = "another shape than this run: codebook_size = 32, here 64"
    with pytest.raises(ValueError, match=message):
        script.main(replace(second, codebook_size=64, out=tmp_path / "third"))


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("quantizer", ["ema", "gradient", "fsq"])
def test_a_decoder_trained_alone_draws_the_same_tokens(quantizer, ema, tmp_path):
    first = replace(script.PRESETS["test"], quantizer=quantizer, out=tmp_path / "first")
    script.main(first)
    second = replace(first, init=str(tmp_path / "first"), decoder_only=True, ema=ema,
                     lr=0.01, adversarial=0.5, adversarial_channels=8, seed=1,
                     out=tmp_path / "second")
    assert "--decoder-only" in script.main(second)["command"]
    before, after = (load(tmp_path / name, VQModel) for name in ("first", "second"))
    assert after.fingerprint() == before.fingerprint()
    for name, old in before.state_dict().items():
        same = torch.equal(old, after.state_dict()[name])
        assert same != name.startswith("decoder"), name
    x = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(before.encode(x), after.encode(x))


@pytest.mark.parametrize("name", sorted(p.name for p in CHECKPOINTS.glob("vq-*")))
def test_shipped_tokenizers_are_as_good_as_their_result_says(name):
    about = shipped_result(name)
    config, metrics = about["config"], about["metrics"]
    val = load_dataset(config["data"], config["size"], "val", config["val_images"],
                       seed=config["seed"])
    x = torch.stack([item.image for item in val])
    found = vq.reconstruction_quality(load_tokenizer(name), x)
    close = {"psnr": 0.05, "ssim": 0.005, "usage": 0.01, "perplexity": 10}
    for key, tolerance in close.items():
        assert found[key] == pytest.approx(metrics[key], abs=tolerance), key


def test_bench(capsys):
    """Speed is not tested: the search is right, and its memory is that of a chunk."""
    assert main(["bench", "vq", "--quick", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]

    def values(text):
        return [row["value"] for row in rows if text in row["case"]]

    assert values("differ from float64") == [0, 0]
    (memory,) = values("16384 codes of 8: added peak memory")
    assert memory < 0.5
