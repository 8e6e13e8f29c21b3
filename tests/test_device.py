"""Every model on a GPU that is not there: fake CUDA tensors have a device, no values.

A model is made under `torch.device("cuda")` and runs outside of that context, where a
tensor made without `device=` lies on the CPU. `OnlyCuda` fails on every such tensor,
also where CUDA would copy it in silence, as it does with indices. Gradients need a real
GPU.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from test_models import GENERATING, MODELS
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minigen import devices, vqgan
from minigen.imagegpt import ImageGPT
from minigen.losses import linear_cross_entropy
from minigen.patchgpt import PatchGPT, expected_patches, exposure_bias, next_patch_error
from minigen.sampling import Guidance


class OnlyCuda(TorchDispatchMode):
    """No operation may have a result on the CPU, unless that is a scalar or empty."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and made.ndim and made.device.type != "cuda":
                assert not made.numel(), f"{function} on the wrong device"
        return result


@contextmanager
def fake_cuda(name):
    """A case of the table with its model on fake CUDA and the parts of images."""
    case = MODELS[name]
    # small, but with everything that is drawn in training
    wanted = {"depth": 1, "dropout": 0.5, "noise": 0.5, "class_dropout": 0.5}
    changes = {key: wanted[key] for key in wanted if hasattr(case.config, key)}
    with FakeTensorMode(shape_env=ShapeEnv()):
        with torch.device("cuda"):
            model = case.make(**changes)
            parts = case.parts().to("cuda")
        yield case, model, parts


# A grammar reads the tokens of its prompt, and these have no values here.
DRAWING = [name for name in GENERATING if name != "anytoany"]


def is_on_cuda(*tensors: Tensor) -> bool:
    return all(tensor.device.type == "cuda" for tensor in tensors)


def check_training(name):
    with fake_cuda(name) as (case, model, parts), OnlyCuda():
        for mode in (True, False):
            model.train(mode)
            assert is_on_cuda(case.outputs(model, parts), case.loss(model, parts))
        assert is_on_cuda(*model.state_dict().values())


def check_generating(name):
    with fake_cuda(name) as (case, model, parts), OnlyCuda():
        given = parts[:, : case.length - 3]
        for options in ({}, {"use_cache": False}, {"temperature": 0.0}):
            drawn = case.generate(model, given, **options)
            assert is_on_cuda(drawn)
            assert drawn.shape == parts.shape
        if not isinstance(model, PatchGPT):
            assert is_on_cuda(case.generate(model, given, top_k=3, top_p=0.9))


@pytest.fixture(autouse=True)
def no_gradients(monkeypatch):
    """The adaptive weight of a discriminator takes gradients."""
    monkeypatch.setattr(vqgan, "adaptive_weight", lambda one, other, last: one / other)


@pytest.mark.parametrize("name", MODELS)
def test_forward_and_loss(name):
    check_training(name)


@pytest.mark.parametrize("name", DRAWING)
def test_generate(name):
    check_generating(name)


@pytest.mark.parametrize("order", ["confidence", "halton", "random"])
def test_generate_in_any_order(order):
    with fake_cuda("maskgit-classes") as (case, model, parts), OnlyCuda():
        labels = case.labels(3, parts.device)
        drawn = model.generate(3, labels, guidance=Guidance(2.0), order=order)
        assert is_on_cuda(drawn)
        assert drawn.shape == parts.shape


@pytest.mark.parametrize("name", DRAWING)
def test_prompts_of_all_forms(name):
    with fake_cuda(name) as (case, model, parts):
        T = case.length
        rows = [parts[0, : T - 1], parts[1, : T - 3], parts[2, : T - 2].cpu()]
        for prompt in (rows, parts[:, : T - 2].cpu()):  # moved by the model
            assert is_on_cuda(case.generate(model, prompt))


@pytest.mark.parametrize("name", ["patchgpt-mse", "imagegpt", "imagegpt-classes"])
def test_images_from_nothing(name):
    with fake_cuda(name) as (case, model, _):
        assert is_on_cuda(case.generate(model, 2))


@pytest.mark.parametrize("name", GENERATING)
def test_several_positions_after_others(name):
    with fake_cuda(name) as (case, model, _):
        transformer = case.trunk(model).transformer
        x = torch.randn(2, 9, transformer.config.dim).to("cuda")
        with OnlyCuda():
            cache = transformer.cache(2)
            for part in x.split([2, 4, 3], dim=1):  # with a mask of its own
                assert is_on_cuda(transformer(part, cache))


@pytest.mark.parametrize("name", [n for n in DRAWING if not n.startswith("gpt")])
def test_images(name):
    with fake_cuda(name) as (case, model, parts):
        given = [parts[:, : case.length - 2]]
        if isinstance(model, ImageGPT):
            with torch.device("cuda"):
                tokenizer = MODELS["vq-ema"].make(codebook_size=case.vocab)
            given = [tokenizer, *given, case.labels(3)]
        images = model.generate_images(*given)
        assert is_on_cuda(images, *model.stream_images(*given))
        if isinstance(model, PatchGPT):
            assert is_on_cuda(next_patch_error(model, SimpleNamespace(image=images)))
            assert is_on_cuda(expected_patches(model, model.encode(images)))
            exposure_bias(model, images, case.length - 2)


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("vq-")])
def test_encode_and_decode(name):
    with fake_cuda(name) as (_, model, images):
        for given in (images, images.cpu()):
            tokens = model.encode(given)
            assert is_on_cuda(tokens, model.decode(tokens), model.decode(tokens.cpu()))


def test_before_the_discriminator_starts():
    with fake_cuda("vqgan") as (_, gan, images):
        gan.start = 2
        assert is_on_cuda(gan.train()(images))


def test_cross_entropy():
    with FakeTensorMode(shape_env=ShapeEnv()):
        hidden, weight = (torch.randn(n, 8).to("cuda") for n in (6, 20))
        targets = torch.randint(20, (6, 3)).to("cuda")
        with OnlyCuda():
            for right in (targets, targets[:, 0]):
                for mask in (None, targets[:, 0] > 3):
                    assert is_on_cuda(linear_cross_entropy(
                        hidden.requires_grad_(), weight.requires_grad_(), right,
                        weights=mask, label_smoothing=0.1, rows=4))


# --- the tests themselves: leave out `device=` wherever a function is called


@pytest.mark.parametrize(("check", "function", "name"), [
    (check_generating, "zeros", "gpt"),  # the cache and the canvas
    (check_generating, "arange", "gpt-bias"),  # rows and columns
    (check_generating, "full", "imagegpt"),  # no class
    (check_generating, "rand", "patchgpt-logistic"),
    (check_generating, "randn", "patchgpt-gaussian"),
    (check_training, "rand", "imagegpt-classes"),  # images whose class is left out
    (check_training, "rand", "patchgpt-mse"),  # noise
    (check_training, "ones", "pixelgpt"),  # weights of the loss
    (check_training, "randperm", "vq-ema"),  # k-means begins
    (check_training, "randint", "vq-ema"),  # dead codes
], ids=lambda value: getattr(value, "__name__", value))
def test_an_omitted_device_is_noticed(check, function, name, monkeypatch):
    real = getattr(torch, function)
    forgetful = lambda *a, device=None, **options: real(*a, **options)  # noqa: E731
    check(name)
    monkeypatch.setattr(torch, function, forgetful)
    with pytest.raises((AssertionError, RuntimeError), match="device"):
        check(name)


def test_an_omitted_device_is_hidden_inside_of_the_context(monkeypatch):
    """Why the models run outside of it."""
    real = torch.full
    monkeypatch.setattr(torch, "full", lambda *a, device=None, **o: real(*a, **o))
    with fake_cuda("imagegpt") as (case, model, parts), OnlyCuda():
        with torch.device("cuda"):
            assert is_on_cuda(case.loss(model, parts))


@pytest.mark.parametrize(("processes", "threads"), [(1, 1), (2, 3), (8, 1)])
def test_the_processes_of_a_machine_share_its_threads(processes, threads, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    monkeypatch.setattr(devices, "PartialState", lambda **options: None)
    torch.set_num_threads(1)
    devices.join_processes(torch.device("cpu"))
    assert torch.get_num_threads() == threads
