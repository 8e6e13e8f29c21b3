"""The contract that every model keeps. A new model is one line of `MODELS`."""

import importlib
import math
import pkgutil
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from types import SimpleNamespace
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.testing import assert_close

import minigen
from minigen.anytoany import (
    AnyToAny,
    AnyToAnyConfig,
    sequence_loss,
    train_text_tokenizer,
)
from minigen.checkpoints import load, save_checkpoint
from minigen.diffusion import Diffusion, DiffusionConfig, flow_loss
from minigen.features import FeatureNetwork
from minigen.gpt import GPT, GPTConfig
from minigen.imagegpt import ImageGPT, ImageGPTConfig, next_token_loss
from minigen.maskgit import MaskGIT, MaskGITConfig, masked_token_loss
from minigen.npp import NPP, NPPConfig
from minigen.patchgpt import PatchGPT, PatchGPTConfig, next_patch_loss
from minigen.pixelgpt import PixelGPT, PixelGPTConfig, next_pixel_loss
from minigen.sampling import Guidance, last
from minigen.transformer import Transformer, TransformerConfig, initialize, unwrap
from minigen.vq import Downsample, VQConfig, VQModel
from minigen.vqgan import VQGAN, tokenizer_loss

# --- how to talk to each class of models


@dataclass
class Sequences:
    """A model that makes images part by part. `parts` are those of whole images."""

    config: object
    model: type = GPT
    lead: int = 0  # inputs before the first part
    random: bool = True  # whether the seed matters
    factor: float = 0.2  # to which share of it a loss falls on one batch
    generates = True

    def make(self, seed=0, **changes) -> nn.Module:
        torch.manual_seed(seed)
        return self.model(replace(self.config, **changes))

    def parts(self, batch=3, seed=1) -> Tensor:  # tokens
        random = torch.Generator().manual_seed(seed)
        return torch.randint(self.vocab, (batch, self.length), generator=random)

    vocab = property(lambda self: self.config.vocab_size)
    length = property(lambda self: self.config.block_size)

    def trunk(self, model):  # what has the transformer
        return model

    def outputs(self, model, parts) -> Tensor:  # (B, T, ...), one for each position
        return model(parts)

    def loss(self, model, parts) -> Tensor:
        logits = model(parts[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), parts[:, 1:].flatten())

    def stream(self, model, prompt, **options):
        steps = self.length - max(len(row) for row in prompt)
        return model.stream(prompt, steps, **options)

    def generate(self, model, prompt, seed=None, **options) -> Tensor:  # all parts
        if seed is not None:
            options["generator"] = torch.Generator().manual_seed(seed)
        return last(self.stream(model, prompt, **options))


class Pixels(Sequences):
    vocab = property(lambda self: 8**self.config.bits)
    length = property(lambda self: self.config.size**2)

    def trunk(self, model):
        return model.gpt

    def loss(self, model, parts):
        return next_pixel_loss(model, parts)

    def stream(self, model, prompt, **options):
        return model.stream(prompt, **options)


class Patches(Pixels):

    @property
    def length(self):
        return self.config.height * self.config.width // self.config.patch_size**2

    def trunk(self, model):
        return model

    def parts(self, batch=3, seed=1):  # of 8-bit values, which are not exactly 0.5
        shape = batch, self.length, 3 * self.config.patch_size**2
        random = torch.Generator().manual_seed(seed)
        return torch.randint(256, shape, generator=random) / 255

    def labels(self, batch, device=None):
        return torch.full((batch,), 1, device=device) if self.config.classes else None

    def outputs(self, model, parts):
        return model(parts[:, :-1], self.labels(len(parts), parts.device))

    def loss(self, model, parts):
        label = self.labels(len(parts), parts.device)
        batch = SimpleNamespace(image=model.decode(parts), label=label)
        return next_patch_loss(model, batch)

    def stream(self, model, prompt, **options):
        guidance = Guidance(1.2) if self.config.classes else None
        if isinstance(prompt, int):  # the model moves what is on the CPU
            return model.stream(prompt, self.labels(prompt), guidance, **options)
        labels = self.labels(len(prompt), prompt[0].device) if len(prompt) else None
        return model.stream(prompt, labels, guidance, **options)


class Codes(Pixels):
    vocab = property(lambda self: self.config.codebook_size)
    length = property(lambda self: self.config.height * self.config.width)

    def trunk(self, model):
        return model

    def labels(self, batch, device=None):
        return torch.full((batch,), 1, device=device) if self.config.classes else None

    def outputs(self, model, parts):
        return model(parts[:, :-1], self.labels(len(parts), parts.device))

    def loss(self, model, parts):
        label = self.labels(len(parts), parts.device)
        return next_token_loss(model, SimpleNamespace(tokens=parts, label=label))

    def stream(self, model, prompt, **options):
        guidance = Guidance(2.0) if self.config.classes else None
        if isinstance(prompt, int):  # the model moves what is on the CPU
            return model.stream(prompt, self.labels(prompt), guidance, **options)
        labels = self.labels(len(prompt), prompt[0].device) if len(prompt) else None
        return model.stream(prompt, labels, guidance, **options)


class Coarse(Codes):
    """LlamaGen's model; its zero output layer, which hides the rest, made random."""

    def make(self, seed=0, **changes):
        model = super().make(seed, **changes)
        initialize(model.head)
        return model


class Mixed(Sequences):
    """A model of texts and images; its sequences are a text, an image and a text."""

    vocab = property(lambda self: 256 + self.config.codebook_size + 3)  # all bytes
    length = property(lambda self: self.config.length)

    def parts(self, batch=3, seed=1):
        random = torch.Generator().manual_seed(seed)
        codes, count = self.config.codebook_size, self.config.height * self.config.width
        open_, close, end = (256 + codes + n for n in range(3))
        tokens = torch.randint(256, (batch, self.length), generator=random)
        tokens[:, 0], tokens[:, 2], tokens[:, 3 + count] = end, open_, close
        image = torch.randint(codes, (batch, count), generator=random)
        tokens[:, 3 : 3 + count] = 256 + image
        return tokens

    def loss(self, model, parts):
        learned = torch.ones_like(parts, dtype=torch.bool)
        return sequence_loss(model, parts, learned)

    def stream(self, model, prompt, **options):
        return model.stream(list(prompt), **options)


class Masked(Codes):
    """A model that sees all tokens at once, some of them masked."""

    generates = False  # not from left to right: tests of its own draw with it

    def outputs(self, model, parts) -> Tensor:
        return model(parts, self.labels(len(parts), parts.device))

    def loss(self, model, parts):
        label = self.labels(len(parts), parts.device)
        return masked_token_loss(model, SimpleNamespace(tokens=parts, label=label))


@dataclass
class Images:
    """A tokenizer: its parts are images, and its outputs the vectors of their grid."""

    config: VQConfig
    adversarial: bool = False  # in training, as a VQGAN with its discriminator
    factor: float = 0.5
    generates = False
    model = property(lambda self: VQGAN if self.adversarial else VQModel)

    def make(self, seed=0, **changes):
        torch.manual_seed(seed)
        model = VQModel(replace(self.config, **changes))
        if self.adversarial:
            return VQGAN(model, adversarial=0.5, channels=8, layers=1)
        return model

    def parts(self, batch=3, seed=1):
        random = torch.Generator().manual_seed(seed)
        coarse = torch.rand(batch, 3, 4, 4, generator=random)
        return F.interpolate(coarse, size=(8, 8), mode="bilinear")

    def outputs(self, model, images):
        model = model.model if self.adversarial else model
        return model.vectors(images).flatten(1, 2)

    def loss(self, model, images):
        if self.adversarial:
            return tokenizer_loss(model, SimpleNamespace(image=images))
        made = model(images)
        return F.mse_loss(made.images, images) + made.loss


@dataclass
class Velocities(Images):
    """A model that turns noise into images; its outputs are velocities of pixels."""

    model = Diffusion

    def make(self, seed=0, **changes):
        torch.manual_seed(seed)
        model = Diffusion(replace(self.config, **changes))
        for p in model.parameters():
            # layers that start at zero, which hide the rest; fake ones have no values
            if isinstance(p, FakeTensor) or not p.any():
                nn.init.normal_(p, std=0.1)
        return model

    def parts(self, batch=3, seed=1):
        size = self.config.height, self.config.width
        return F.interpolate(super().parts(batch, seed), size=size, mode="bilinear")

    def outputs(self, model, images):
        t = torch.full((len(images),), 0.5, device=images.device)
        return model(2 * images - 1, t).flatten(2).transpose(1, 2)

    def loss(self, model, images):
        # a fake device has no generator
        generator = None if isinstance(images, FakeTensor) else (
            torch.Generator(images.device).manual_seed(0))
        return flow_loss(model, SimpleNamespace(image=images), generator)


# --- the models


TINY = {"depth": 2, "heads": 2, "dim": 16}
GRID = {"vocab_size": 12, "block_size": 12, "columns": 4} | TINY
LLAMA = {"norm": "rms", "mlp": "swiglu", "mlp_multiple": 8, "positions": "rope2d"}


def patches(factor=0.2, **options):
    small = {"height": 6, "width": 8, "patch_size": 2, "class_dropout": 0.0}
    config = PatchGPTConfig(**TINY | small | options)
    return Patches(config, PatchGPT, 1, config.head != "mse", factor)


def codes(**options):
    small = {"codebook_size": 20, "height": 3, "width": 4, "class_dropout": 0.0}
    return Codes(ImageGPTConfig(**TINY | small | options), ImageGPT, 1)


def npp(**options):
    small = {"codebook_size": 20, "height": 3, "width": 4, "class_dropout": 0.0,
             "dropout": 0.0, "mlp_multiple": 8}
    return Coarse(NPPConfig(**TINY | small | options), NPP, 1)


def masked(**options):
    small = {"codebook_size": 20, "height": 3, "width": 4, "class_dropout": 0.0}
    return Masked(MaskGITConfig(**TINY | small | options), MaskGIT, factor=0.9)


def tokenizer(adversarial=False, factor=0.5, **options):
    small = {"downsample": 4, "channels": 8, "z_channels": 8, "codebook_size": 16,
             "codebook_dim": 4, "levels": (5, 4)}
    return Images(VQConfig(**small | options), adversarial, factor)


MODELS = {
    "gpt": Sequences(GPTConfig(**GRID)),
    "gpt-bias": Sequences(GPTConfig(**GRID, bias=True, positions="rowcol")),
    "gpt-none": Sequences(GPTConfig(**GRID, positions="none", norm="rms")),
    "gpt-llama": Sequences(GPTConfig(**GRID | {"dim": 24}, **LLAMA)),
    "pixelgpt": Pixels(PixelGPTConfig(size=4, bits=1, **TINY), PixelGPT),
    "pixelgpt-rowcol": Pixels(
        PixelGPTConfig(size=3, bits=2, positions="rowcol", **TINY), PixelGPT),
    "patchgpt-mse": patches(),
    "patchgpt-last": patches(above=False, positions="learned"),
    "patchgpt-gaussian": patches(head="gaussian", mixtures=2, factor=0.7),
    "patchgpt-logistic": patches(head="logistic", mixtures=2, factor=0.7),
    "patchgpt-classes": patches(head="logistic", mixtures=2, classes=3, factor=0.7),
    "patchgpt-independent": patches(
        head="logistic", mixtures=3, neighbors=False, shared=False, factor=0.7),
    "imagegpt": codes(),
    "imagegpt-classes": codes(classes=3),
    "imagegpt-llama": codes(classes=3, **LLAMA | {"dim": 24}),
    "npp": npp(classes=3),
    "maskgit": masked(),
    "maskgit-classes": masked(classes=3),
    "maskgit-llama": masked(classes=3, **LLAMA | {"dim": 24}),
    "anytoany": Mixed(AnyToAnyConfig(
        codebook_size=20, height=2, width=2, length=12, **TINY), AnyToAny),
    "diffusion": Velocities(DiffusionConfig(
        height=8, width=8, channels=8, **TINY), factor=0.9),
    "diffusion-dit": Velocities(DiffusionConfig(
        network="dit", height=8, width=8, patch_size=2, **TINY), factor=0.9),
    "vq-ema": tokenizer(),
    "vq-gradient": tokenizer(quantizer="gradient", kmeans=False),
    "vq-sphere": tokenizer(quantizer="gradient", normalize=True, blocks=2),
    "vq-fsq": tokenizer(quantizer="fsq"),
    "vqgan": tokenizer(adversarial=True),
}
GENERATING = [name for name, case in MODELS.items() if case.generates]
SAVED = [name for name, case in MODELS.items() if case.model is not VQGAN]


@pytest.fixture
def case(request):
    return MODELS[request.param]


def every(names=MODELS):
    return pytest.mark.parametrize("case", names, indirect=True)


def sharpen(model: nn.Module) -> nn.Module:
    """Large weights in place of initial ones, which make all outputs nearly equal."""
    torch.manual_seed(2)
    for p in model.parameters():
        if p.ndim == 2:
            nn.init.normal_(p, std=1.5 / p.shape[-1] ** 0.5)
    return model.eval()


def test_every_model_is_in_the_table():
    found = set()
    for module in pkgutil.iter_modules(minigen.__path__, "minigen."):
        if not module.name.endswith(("_nbdev", "_modidx", "__main__")):
            names = vars(importlib.import_module(module.name))
            found |= {value for value in names.values() if isinstance(value, type)
                      and issubclass(value, PyTorchModelHubMixin)}
    # the network that names landscapes has batch norm, and tests of its own
    found -= {PyTorchModelHubMixin, FeatureNetwork}
    assert found == {MODELS[name].model for name in SAVED}


# --- shapes, and what depends on what


@every()
def test_shapes(case):
    model = case.make()
    for batch in (1, 3):
        parts = case.parts(batch)
        outputs = case.outputs(model, parts)
        assert len(outputs) == batch
        assert outputs.isfinite().all()
        assert case.loss(model, parts).shape == ()
        if case.generates:
            assert outputs.shape[1] == case.length
            drawn = case.generate(model, parts[:, :2])
            assert drawn.shape == parts.shape
            assert drawn.dtype == parts.dtype


@every()
def test_causality_or_its_absence(case):
    model = sharpen(case.make())
    parts = case.parts()
    before = case.outputs(model, parts)
    if isinstance(case, Masked):  # every output may know every token
        for position in range(case.length):
            other = parts.clone()
            other[:, position] = model.mask_token
            assert (case.outputs(model, other) != before).any(dim=-1).all()
        return
    if not case.generates:  # a change at the last pixel reaches the first vector
        for pixel in (0, -1):
            other = parts.clone()
            other[:, :, pixel, pixel] = 1 - other[:, :, pixel, pixel]
            changed = case.outputs(model, other) != before
            assert changed.any(dim=-1).all()
        return
    for position in range(case.length - case.lead):
        other = parts.clone()
        other[:, position] = case.parts(seed=9)[:, position]
        if not parts.is_floating_point():
            other[:, position] = (parts[:, position] + 1) % case.vocab
        after = case.outputs(model, other)
        first = position + case.lead  # the first output that may know
        assert_close(after[:, :first], before[:, :first])
        changed = (after - before)[:, first:].abs().flatten(2).amax(dim=-1)
        assert (changed > 1e-6).all()


@every()
def test_items_of_a_batch_do_not_see_each_other(case):
    model = sharpen(case.make())
    parts = case.parts()
    outputs = case.outputs(model, parts)
    alone = torch.cat([case.outputs(model, row[None]) for row in parts])
    assert_close(outputs, alone, rtol=1e-4, atol=1e-4)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3
    if case.generates:
        drawn = case.generate(model, parts[:, :3], temperature=0.0)
        alone = [case.generate(model, row[None, :3], temperature=0.0) for row in parts]
        assert_close(drawn, torch.cat(alone), rtol=0, atol=1e-2)


@every()
def test_gradients_reach_every_parameter(case):
    model = case.make().train()
    for _ in range(2):  # the first batch may initialize a codebook
        model.zero_grad()
        case.loss(model, case.parts()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # real and fake images pull equally at the last bias of a new discriminator
        assert parameter.grad.any() or name == "discriminator.4.bias", name


@every()
def test_one_batch_can_be_overfitted(case):
    model, parts = case.make().train(), case.parts(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    first = None
    for _ in range(80):
        loss = case.loss(model, parts)
        first = loss.item() if first is None else first
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        assert case.loss(model.eval(), parts) < case.factor * first


@every()
def test_inputs_are_left_alone(case):
    model, parts = case.make(), case.parts()
    given = parts.clone()
    for mode in (True, False):
        model.train(mode)
        case.loss(model, parts)
        case.outputs(model, parts)
    assert torch.equal(parts, given)
    if case.generates:
        rows = [row[: n + 1] for n, row in enumerate(parts)]
        for prompt in (parts[:, :3], rows):
            case.generate(model, prompt)
        assert torch.equal(parts, given)
    if isinstance(model, VQModel):
        tokens = model.encode(parts)
        given = tokens.clone()
        model.decode(tokens)
        assert torch.equal(tokens, given)


@every(SAVED)
def test_half_precision(case):
    model = case.make().to(torch.bfloat16).eval()
    parts = case.parts()
    assert case.outputs(model, parts).isfinite().all()
    assert case.loss(model, parts).isfinite()
    if case.generates:
        for use_cache in (True, False):
            drawn = case.generate(model, parts[:, :2], use_cache=use_cache)
            assert drawn.shape == parts.shape
            assert drawn.isfinite().all()
    elif isinstance(model, VQModel):
        assert model.decode(model.encode(parts)).isfinite().all()


# --- one forward pass, cached or not


@pytest.mark.parametrize("pieces", [[1] * 9, [4, 1, 3, 1], [2, 7], [9]], ids=str)
@pytest.mark.parametrize("plain", [False, True], ids=["module", "unwrapped"])
@every(GENERATING)
def test_cached_equals_uncached(case, pieces, plain):
    transformer = case.trunk(sharpen(case.make())).transformer
    x = torch.randn(3, 9, transformer.config.dim)
    cache, step = transformer.cache(3), unwrap(transformer) if plain else transformer
    cached = torch.cat([step(part, cache) for part in x.split(pieces, dim=1)], dim=1)
    assert_close(cached, transformer(x), rtol=1e-4, atol=1e-4)
    assert cache.filled == 9


@pytest.mark.parametrize("positions", ["learned", "rowcol", "rope2d", "none"])
def test_a_transformer_sees_all_or_what_a_mask_allows(positions):
    config = TransformerConfig(depth=1, heads=2, dim=16, positions=positions)
    transformer = sharpen(Transformer(config, 9, columns=3, causal=False))
    x, other = torch.randn(2, 9, 16), torch.randn(2, 9, 16)
    mask = torch.rand(9, 9) < 0.5
    mask.fill_diagonal_(True)
    for allowed in (None, mask):
        before = transformer(x, mask=allowed)
        for position in range(9):
            changed = x.clone()
            changed[:, position] = other[:, position]
            change = (transformer(changed, mask=allowed) - before).abs().amax((0, 2))
            expected = mask[:, position] if allowed is not None else change > -1
            assert torch.equal(change > 1e-5, expected)


@every(GENERATING)
def test_the_cache_does_not_change_what_is_drawn(case):
    """In float64: in float32 a rounding error tips a random choice now and then."""
    model = sharpen(case.make()).double()
    prompts = [case.parts()[:, :1], case.parts()[:, :5]] + [3] * case.lead
    for prompt in prompts:
        for options in ({}, {"temperature": 0.5}, {"temperature": 0.0}):
            drawn, again = (case.generate(model, prompt, seed=3, use_cache=use_cache,
                                          **options) for use_cache in (True, False))
            assert_close(drawn, again, rtol=0, atol=1e-2)
            if isinstance(prompt, Tensor):
                assert torch.equal(drawn[:, : prompt.shape[1]], prompt)


@every(GENERATING)
def test_ragged_prompts_equal_each_by_itself(case):
    model, parts = sharpen(case.make()).double(), case.parts()
    rows = [parts[0, :4], parts[1, :1], parts[2, : case.length - 1]]
    for use_cache in (True, False):
        drawn = case.generate(model, rows, temperature=0.0, use_cache=use_cache)
        for row, found in zip(rows, drawn, strict=True):
            alone = case.generate(model, row[None], temperature=0.0)[0]
            assert_close(found, alone, rtol=0, atol=1e-2)  # errors grow along patches
            assert torch.equal(found[: len(row)], row)


@every(GENERATING)
def test_a_stream_grows_by_one_part(case):
    model, prompt = case.make(), case.parts()[:, :3]
    random = torch.Generator().manual_seed(0)
    seen = [x.clone() for x in case.stream(model, prompt, generator=random)]
    assert [x.shape[1] for x in seen] == list(range(4, case.length + 1))
    for before, after in zip(seen, seen[1:], strict=False):
        assert torch.equal(after[:, :-1], before)
    assert torch.equal(seen[-1], case.generate(model, prompt, seed=0))


# --- randomness and modes


@every(GENERATING)
def test_a_generator_determines_what_is_drawn(case):
    model, prompt = sharpen(case.make()), case.parts()[:, :1]
    state = torch.get_rng_state()
    first, again, other = (case.generate(model, prompt, seed=n) for n in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert torch.equal(first, other) != case.random
    free = case.generate(model, prompt)
    assert torch.equal(torch.get_rng_state(), state) != case.random
    assert torch.equal(free, first) != case.random


@every(GENERATING)
def test_generating_is_in_eval_mode_and_returns_to_the_old_one(case):
    model = case.make(dropout=0.5)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    prompt = case.parts()[:, :2]
    expected = case.generate(model.eval(), prompt, seed=0)
    for mode in (True, False):
        model.train(mode)
        assert torch.equal(case.generate(model, prompt, seed=0), expected)
        assert {module.training for module in model.modules()} == {mode}
    model.train()
    stream = case.stream(model, prompt)
    next(stream)
    stream.close()
    assert {module.training for module in model.modules()} == {True}
    if case.random:  # also if drawing fails
        with pytest.raises(ValueError, match="negative"):
            case.generate(model, prompt, temperature=-1.0)
        assert {module.training for module in model.modules()} == {True}
    # what is generated can be trained on
    case.loss(model, case.generate(model, prompt)).backward()


@pytest.mark.parametrize("where", ["inputs", "attention.proj", "mlp.down"])
@every(["gpt", "gpt-llama"])
def test_dropout_is_where_gpt2_has_it(case, where):
    transformer = case.make(dropout=0.5).transformer
    for name, parameter in transformer.named_parameters():  # leave one of them alone
        if name.endswith(("proj.weight", "down.weight")) and where not in name:
            nn.init.zeros_(parameter)
    transformer.dropout = 0.5 if where == "inputs" else 0.0
    x = torch.randn(2, 9, transformer.config.dim)
    assert not torch.allclose(transformer.train()(x), transformer.eval()(x))
    assert torch.equal(transformer(x), transformer(x))


@every([name for name in MODELS if name.startswith("vq-")])
def test_tokens_depend_on_the_image_alone(case):
    model, images = case.make(dropout=0.5).train(), case.parts()
    model(images)  # initializes the codebook
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    tokens, again = model.encode(images), model.encode(images)
    assert torch.equal(tokens, again)
    assert torch.equal(model.decode(tokens), model.decode(tokens))
    assert torch.equal(torch.get_rng_state(), state)
    assert {module.training for module in model.modules()} == {True}
    assert_close(dict(model.state_dict()), weights, rtol=0, atol=0)
    assert tokens.dtype == torch.int64
    assert 0 <= tokens.min() <= tokens.max() < model.codebook_size


# --- configurations and files


@pytest.mark.parametrize("kind", dict.fromkeys(MODELS[name].model for name in SAVED),
                         ids=lambda kind: kind.__name__)
def test_a_model_is_made_from_one_flat_dataclass(kind):
    assert "__init__" in vars(kind), "the hub's mixin reads the fields from it"
    hints = get_type_hints(kind.__init__)
    assert set(hints) == {"config"}
    config = hints["config"]
    assert is_dataclass(config)
    assert config.__name__ == kind.__name__.removesuffix("Model") + "Config"
    for value in asdict(config()).values():
        assert isinstance(value, int | float | str | tuple | None)
    others = {MODELS[name].model for name in SAVED} - {kind}
    if kind is NPP:  # an ImageGPT that is trained in another way
        others.remove(ImageGPT)
    assert not any(issubclass(kind, other) for other in others)


CHANGED = {  # a value other than the default for every field of every configuration
    "depth": 3, "heads": 3, "dim": 24, "dropout": 0.25, "attention_dropout": 0.5,
    "drop_path": 0.5, "mlp_multiple": 8, "vocab_size": 12, "block_size": 12,
    "columns": 4, "size": 4, "bits": 1, "patch_size": 1, "mixtures": 2, "noise": 0.5,
    "height": 12, "width": 4, "codebook_size": 20, "classes": 3, "class_dropout": 0.5,
    "tokenizer": "somewhere", "fingerprint": "0123456789abcdef", "downsample": 4,
    "channels": 12, "blocks": 2, "z_channels": 9, "codebook_dim": 2,
    "dead_code_threshold": 0.5, "decay": 0.5, "commitment": 0.5, "levels": (5, 4),
    "label_smoothing": 0.2, "token_dropout": 0.5, "length": 64,
    "text": train_text_tokenizer([], 256).to_str(), "text_weight": 0.5,
    "image_weight": 0.5, "z_loss": 0.5, "text_first": 0.1, "image_first": 0.2,
    "pairs": 0.5, "text_dropout": 0.5,
}


def changed(config):
    """A configuration of the same type without a default in it."""
    def other(field):
        choices = get_args(field.type) if get_origin(field.type) is Literal else ()
        if field.type is bool:
            return not field.default
        values = choices or (CHANGED[field.name],)
        return next(value for value in values if value != field.default)

    new = type(config)(**{f.name: other(f) for f in fields(config)})
    same = [f.name for f in fields(config) if getattr(new, f.name) == f.default]
    assert not same, f"CHANGED has the default of {same}"
    return new


def round_trips(case, tmp_path):
    torch.manual_seed(0)
    model = sharpen(case.make())
    parts = case.parts()
    save_checkpoint(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "hub")
    loaded = [load(tmp_path / "ours"), load(tmp_path / "ours", case.model),
              case.model.from_pretrained(tmp_path / "hub"),
              case.model.from_pretrained(tmp_path / "ours")]
    assert not any(again.training for again in loaded[:2])
    for again in loaded:
        again.eval()  # as not every version of the hub's library does
        assert type(again) is case.model
        assert again.config == model.config
        assert type(again.config) is type(model.config)
        for field in fields(model.config):  # a list is not a tuple
            found, kept = (getattr(m.config, field.name) for m in (again, model))
            assert type(found) is type(kept), field.name
        assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
        expected = case.outputs(model, parts)
        assert_close(case.outputs(again, parts), expected, rtol=0, atol=0)
        if case.generates:
            drawn = case.generate(model, parts[:, :2], seed=0)
            assert torch.equal(case.generate(again, parts[:, :2], seed=0), drawn)


@every(SAVED)
def test_save_and_load(case, tmp_path):
    round_trips(case, tmp_path)


ONE_OF_EACH = {MODELS[name].model: name for name in SAVED}


@every(ONE_OF_EACH.values())
def test_every_field_of_a_configuration_is_saved(case, tmp_path):
    round_trips(replace(case, config=changed(case.config)), tmp_path)


@every(ONE_OF_EACH.values())
def test_every_choice_of_a_configuration_is_saved(case, tmp_path):
    config = changed(case.config)
    for field in fields(config):
        if get_origin(field.type) is not Literal:
            continue
        for choice in get_args(field.type):
            torch.manual_seed(0)
            model = case.model(replace(config, **{field.name: choice}))
            save_checkpoint(model, tmp_path)
            assert load(tmp_path).config == model.config
        with pytest.raises(ValueError, match=f"{field.name} must be one of .*'moon'"):
            replace(config, **{field.name: "moon"})


@every(SAVED)
def test_weights_in_half_precision_are_read_as_float32(case, tmp_path):
    model = case.make().eval()
    save_checkpoint(model, tmp_path, torch.float16)
    again = load(tmp_path)
    kinds = {name: value.dtype for name, value in model.state_dict().items()}
    assert {name: value.dtype for name, value in again.state_dict().items()} == kinds
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert_close(case.outputs(again, case.parts()), case.outputs(model, case.parts()),
                 rtol=0.05, atol=0.05)


@every(SAVED)
def test_wrong_weights_are_not_loaded(case, tmp_path):
    from safetensors.torch import load_file, save_file

    save_checkpoint(case.make(), tmp_path)
    file = tmp_path / "model.safetensors"
    weights = {key: value.clone() for key, value in load_file(file).items()}
    name = next(name for name, value in weights.items() if value.is_floating_point())
    rest = {key: value for key, value in weights.items() if key != name}
    for wrong, message in (
            (rest, f"{name} is missing"),
            ({"more": torch.ones(1)} | weights, "more is not part"),
            (rest | {name: weights[name][:1, None]}, f"{name} has shape"),
            (rest | {name: weights[name] * math.nan}, f"{name} has values that"),
            (rest | {name: weights[name] / 0}, f"{name} has values that")):
        save_file(wrong, file)
        with pytest.raises(ValueError, match=message):
            load(tmp_path)


# --- initial values


@every([name for name in GENERATING if "llama" not in name and name != "npp"])
def test_initial_weights_are_those_of_gpt2(case):
    model = case.make(dim=128, depth=8)
    small = 0.02 / 16**0.5  # 2 * 8 layers add to the residual stream
    for name, parameter in case.trunk(model).transformer.named_parameters():
        std = small if name.endswith(("proj.weight", "down.weight")) else 0.02
        if parameter.ndim == 2 and parameter.numel() > 2000:
            assert parameter.std().item() == pytest.approx(std, rel=0.1), name
        elif "norm" in name and name.endswith("weight"):
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name


@every(["gpt", "gpt-llama", "pixelgpt", "imagegpt", "imagegpt-classes"])
def test_starts_out_knowing_nothing(case):
    loss = case.loss(case.make().eval(), case.parts(16))
    assert loss.item() == pytest.approx(math.log(case.vocab), abs=0.05)


def test_downsampling_pads_below_and_on_the_right():  # as LlamaGen's weights expect
    encoder = MODELS["vq-ema"].make().encoder
    layer = next(part for part in encoder if isinstance(part, Downsample))
    x = torch.randn(2, layer.in_channels, 6, 6, requires_grad=True)
    y = layer(x)
    assert y.shape[2:] == (3, 3)
    y[:, :, 0, 0].sum().backward()
    assert x.grad[:, :, :3, :3].all()
    assert x.grad.count_nonzero() == x[:, :, :3, :3].numel()


# --- wrong inputs


NOT_PATCHES = [name for name in GENERATING if not name.startswith("patchgpt")]
RANDOM = [name for name in GENERATING if MODELS[name].random]
FROM_NOTHING = [name for name in GENERATING if MODELS[name].lead]
TOKENIZERS = [name for name in SAVED if MODELS[name].model is VQModel]
TOKEN = torch.zeros(1, 2, 2, dtype=torch.int64)
WRONG = [
    (GENERATING, lambda c, m: c.generate(m, []), "empty|at least one"),
    (GENERATING, lambda c, m: c.generate(m, c.parts()[:0]), "empty|at least one|B > 0"),
    (RANDOM, lambda c, m: c.generate(m, c.parts()[:, :1], temperature=-1), "found -1"),
    (NOT_PATCHES, lambda c, m: c.generate(m, c.parts()[:, :1], top_k=0), "1, found 0"),
    (NOT_PATCHES, lambda c, m: c.generate(m, c.parts()[:, :1], top_p=1.5), "found 1.5"),
    (GENERATING, lambda c, m: c.make(heads=5), "cannot be split among 5 heads"),
    (GENERATING, lambda c, m: c.outputs(m, torch.cat([c.parts()] * 2, 1)),
     "does not fit|at most"),
    (FROM_NOTHING, lambda c, m: c.generate(m, 0), "at least one .*found 0"),
    (GENERATING, lambda c, m: c.generate(m, torch.cat([c.parts()] * 2, 1)),
     "do(es)? not fit|leaves nothing|at most|must be"),
    (TOKENIZERS, lambda c, m: m(c.parts()[:, :2]), r"found shape \(3, 2, 8, 8\)"),
    (TOKENIZERS, lambda c, m: m.encode(c.parts()[:0]), "at least one image"),
    (TOKENIZERS, lambda c, m: m.encode(c.parts()[..., :7]), "of 4, found 8 x 7"),
    (TOKENIZERS, lambda c, m: m.decode(TOKEN + 20), "from 0 to .*found 20"),
    (TOKENIZERS, lambda c, m: m.decode(TOKEN - 1), "found -1"),
    (TOKENIZERS, lambda c, m: m.decode(TOKEN.float()), "integer type, found"),
]


@pytest.mark.parametrize(("case", "use", "message"), [
    pytest.param(name, use, message, id=f"{name}-{n}")
    for n, (names, use, message) in enumerate(WRONG) for name in names],
    indirect=["case"])
def test_wrong_inputs_are_a_sentence(case, use, message):
    with pytest.raises(ValueError, match=message):
        use(case, case.make().eval())
