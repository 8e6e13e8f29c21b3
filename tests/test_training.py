"""The training loop, its loss, and the files it writes. Kills and several processes are in `test_resume.py`."""

import json
import math
import os
import re
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils.data import TensorDataset

from minigen.gpt import GPT, GPTConfig
from minigen.pixelgpt import PixelGPT, PixelGPTConfig
from minigen.training import (
    FitConfig,
    RunConfig,
    command_line,
    decay_groups,
    describe_run,
    evaluate,
    finish_run,
    fit,
    learning_rate,
    linear_cross_entropy,
    load_checkpoint,
    looks,
    pick_device,
    pick_dtype,
    pick_preset,
    progress,
    read_log,
    save_checkpoint,
    write_json,
)


def mse(model, batch):
    x, y = batch
    return (model(x) - y).square().mean()


def regression(steps=60, poison=None, folder=None, average=None, items=320, **options):
    """A toy that has nothing to do with pictures: `fit` has no opinion about models."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    x = torch.randn(items, 3)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]]) + 0.3
    if poison is not None:
        y[poison] = math.nan
    config = FitConfig(**dict(steps=steps, batch_size=32, lr=0.1, warmup=5, weight_decay=0.0,
                              precision="float32") | options)
    return model, fit(model, TensorDataset(x, y), mse, config, folder=folder, average=average)


def test_fits_a_toy_regression():
    model, records = regression(200)
    records = list(records)
    assert [r.step for r in records] == list(range(1, 201))
    assert records[-1].loss < 1e-3
    assert records[-1].seconds > records[0].seconds > 0
    assert_close(model.weight, torch.tensor([[1.0, -2.0, 0.5]]), atol=0.02, rtol=0)


def test_two_runs_are_equal():
    (a, run_a), (b, run_b) = regression(), regression()
    assert [(r.loss, r.norm) for r in run_a] == [(r.loss, r.norm) for r in run_b]
    assert torch.equal(a.weight, b.weight)


def test_the_steps_are_those_of_plain_pytorch():
    """AdamW, clipping and the learning rate written out, on the same batches."""
    from minigen.data import endless_batches

    model, records = regression(20, clip=0.5, weight_decay=0.1)
    plain = deepcopy(model)
    torch.manual_seed(0)
    nn.Linear(3, 1)
    x = torch.randn(320, 3)
    data = TensorDataset(x, x @ torch.tensor([[1.0], [-2.0], [0.5]]) + 0.3)
    config = FitConfig(20, 32, lr=0.1, warmup=5)
    optimizer = torch.optim.AdamW([{"params": [plain.weight], "weight_decay": 0.1}, {"params": [plain.bias], "weight_decay": 0.0}],
                                  betas=(0.9, 0.95))
    batches = endless_batches(data, 32, torch.Generator().manual_seed(0))
    for record in records:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(record.step, config)
        value = mse(plain, next(batches))
        optimizer.zero_grad()
        value.backward()
        assert record.norm == pytest.approx(nn.utils.clip_grad_norm_(plain.parameters(), 0.5).item(), rel=1e-5)
        optimizer.step()
        assert record.loss == pytest.approx(value.item(), rel=1e-5)
    assert_close(model.state_dict(), plain.state_dict())


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_batches_are_one_large_batch(accumulate):
    whole, one = regression(12)
    parts, several = regression(12, batch_size=32 // accumulate, accumulate=accumulate)
    for a, b in zip(one, several, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-4) and a.norm == pytest.approx(b.norm, rel=1e-4)
    assert_close(whole.weight, parts.weight)


@pytest.mark.parametrize("batch_size", [4, 32])
def test_a_loss_that_is_not_finite_stops_before_the_weights(batch_size, tmp_path):
    model, records = regression(poison=77, folder=tmp_path, save_every=1, batch_size=batch_size, items=96)
    with pytest.raises(FloatingPointError, match=r"at step (\d+) the loss is nan .*the last good state is .*state-0*\d+:") as stopped:
        for record in records:
            before = deepcopy(model.state_dict())
    named = [int(n) for n in re.findall(r"at step (\d+) .*state-0*(\d+):", str(stopped.value))[0]]
    assert named == [record.step + 1, record.step]
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert model.weight.isfinite().all()


def test_a_gradient_that_is_not_finite_stops_too():
    model = nn.Linear(2, 1)

    def loss(model, batch):  # finite, with an infinite slope
        return model(batch[0]).sum() * 0 + (model.weight * 0).sum().abs().sqrt()

    with pytest.raises(FloatingPointError, match="its gradient nan long"):
        list(fit(model, TensorDataset(torch.ones(4, 2)), loss, FitConfig(3, 2)))
    assert model.weight.isfinite().all()


def test_learning_rate():
    config = FitConfig(steps=100, lr=2.0, warmup=10, final_lr=0.1)
    rates = [learning_rate(step, config) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([0.2 * i for i in range(1, 11)])
    assert max(rates) == rates[9] == 2.0
    assert rates[-1] == pytest.approx(0.2)
    assert all(a > b for a, b in zip(rates[9:], rates[10:]))


def test_decay_is_for_matrices_only():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    model[1].bias.requires_grad_(False)
    decayed, spared = decay_groups(model, 0.5)
    assert [p.ndim for p in decayed["params"]] == [2] and [p.ndim for p in spared["params"]] == [1, 1]
    before = {name: p.clone() for name, p in model.named_parameters()}
    list(fit(model, [torch.zeros(4)], lambda m, b: m(b).sum() * 0, FitConfig(1, 1, lr=0.1, warmup=0, weight_decay=0.5)))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (p.ndim == 1)


def test_the_average_follows_the_weights():
    torch.manual_seed(0)
    average = nn.Linear(3, 1)  # the same as the model's, by the same seed
    model, records = regression(30, average=average, ema=0.5)
    expected, trained = deepcopy(average.state_dict()), []
    for record in records:
        decay = min(0.5, record.step / (record.step + 10))
        expected = {name: decay * w + (1 - decay) * model.state_dict()[name] for name, w in expected.items()}
        trained.append(model.weight.clone())
    assert_close(average.state_dict(), expected)
    assert not torch.equal(average.weight, model.weight)


def test_the_average_takes_over_buffers():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    average = deepcopy(model)
    data = TensorDataset(torch.randn(16, 3), torch.randn(16, 1))
    list(fit(model, data, mse, FitConfig(3, 4), average=average))
    assert average[1].num_batches_tracked == 3
    assert torch.equal(average[1].running_mean, model[1].running_mean)


def test_looks_are_marked_and_logged_with_what_the_caller_found(tmp_path):
    model, records = regression(8, folder=tmp_path, look_at=(2, 5))
    seen = []
    for record in records:
        assert model.training
        if record.look:
            model.eval()  # as an evaluation may leave it
            record.metrics["val_loss"] = 10.0 * record.step
            seen.append(record.step)
    assert seen == [2, 5, 8]
    log = read_log(tmp_path)
    assert [line["step"] for line in log] == list(range(1, 9)) and log[4]["val_loss"] == 50.0 and "val_loss" not in log[3]
    history = looks(log)
    assert [h["step"] for h in history] == seen and set(history[0]) == {"step", "train_loss", "val_loss"}
    assert history[1]["train_loss"] == pytest.approx(sum(log[n]["loss"] for n in (2, 3, 4)) / 3)


def test_tensorboard_shows_each_step_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, records = regression(6, folder=tmp_path, save_every=2, tensorboard=True)
    losses = {}
    for record in records:
        record.metrics["val_loss"] = 1.0
        losses[record.step] = record.loss
        if record.step == 5:  # stopped after four logged and saved steps: the fifth is not logged yet
            break
    records.close()
    model = nn.Linear(3, 1)
    torch.manual_seed(0)
    nn.Linear(3, 1)
    x = torch.randn(320, 3)
    config = FitConfig(6, 32, lr=0.1, warmup=5, weight_decay=0.0, precision="float32", save_every=2, tensorboard=True)
    for record in fit(model, TensorDataset(x, x @ torch.tensor([[1.0], [-2.0], [0.5]]) + 0.3), mse, config, folder=tmp_path, resume=True):
        losses[record.step] = record.loss
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {e.step: e.value for e in events.Scalars("loss")} == pytest.approx(losses)
    assert len(events.Scalars("loss")) == 6 and [e.step for e in events.Scalars("val_loss")] == [1, 2, 3, 4]


def test_compiled_steps_are_the_same(monkeypatch):
    compile_module = nn.Module.compile  # by the back end that needs no C++ compiler
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_module(self, backend="aot_eager"))
    (a, plain), (b, compiled) = regression(4), regression(4, compile=True)
    assert [r.loss for r in compiled] == pytest.approx([r.loss for r in plain], rel=1e-5)
    assert_close(a.state_dict(), b.state_dict())
    assert list(b.state_dict()) == ["weight", "bias"]


def test_bfloat16_is_in_the_forward_pass_only():
    seen = []

    def loss(model, batch):
        seen.append(model(batch[0]).dtype)
        return mse(model, batch)

    torch.manual_seed(0)
    model, data = nn.Linear(3, 1), TensorDataset(torch.randn(8, 3), torch.randn(8, 1))
    list(fit(model, data, loss, FitConfig(2, 4, precision="bfloat16")))
    assert seen == [torch.bfloat16] * 2 and model.weight.dtype == torch.float32
    list(fit(model, data, loss, FitConfig(1, 4, precision="float32")))
    assert seen[-1] == torch.float32


@pytest.mark.parametrize("options", [dict(steps=0), dict(batch_size=0), dict(accumulate=0)])
def test_numbers_below_one_are_refused(options):
    with pytest.raises(ValueError, match="must be at least 1"):
        FitConfig(**options)


def test_evaluate_counts_each_item_once():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 1))
    data = TensorDataset(torch.randn(7, 3), torch.randn(7, 1))
    assert evaluate(model, data, mse, 3) == pytest.approx(mse(model.eval(), data.tensors).item())
    model.train()
    evaluate(model, data, mse, 7)
    assert model.training and all(p.grad is None for p in model.parameters())


# ---- the loss in pieces


def reference(hidden, weight, targets):
    return F.cross_entropy((hidden @ weight.T).flatten(0, -2), targets.flatten())


@pytest.mark.parametrize("rows", [None, 1, 4, 7, 100])
def test_linear_cross_entropy_is_cross_entropy(rows):
    hidden = torch.randn(3, 7, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, (3, 7))
    ours = linear_cross_entropy(hidden, weight, targets, rows)
    grads = torch.autograd.grad(3 * ours, (hidden, weight))
    expected = torch.autograd.grad(3 * reference(hidden, weight, targets), (hidden, weight))
    assert ours.item() == pytest.approx(reference(hidden, weight, targets).item(), rel=1e-6)
    assert_close(grads, expected, rtol=1e-5, atol=1e-7)  # softmax and sum are in float32


def test_linear_cross_entropy_agrees_with_the_library():
    hidden, weight = torch.randn(64, 16, requires_grad=True), torch.randn(200, 16, requires_grad=True)
    targets = torch.randint(200, (64,))
    ours, theirs = linear_cross_entropy(hidden, weight, targets, 10), F.linear_cross_entropy(hidden, weight, targets)
    assert_close(ours, theirs)
    assert_close(torch.autograd.grad(ours, (hidden, weight)), torch.autograd.grad(theirs, (hidden, weight)))


def test_linear_cross_entropy_without_a_gradient():
    hidden, weight, targets = torch.randn(4, 5), torch.randn(9, 5), torch.randint(9, (4,))
    assert not linear_cross_entropy(hidden, weight, targets).requires_grad
    weight.requires_grad_()
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, targets).requires_grad
    linear_cross_entropy(hidden, weight, targets).backward()
    assert_close(weight.grad, torch.autograd.grad(reference(hidden, weight, targets), weight)[0])


def test_linear_cross_entropy_in_bfloat16():
    hidden, weight = torch.randn(32, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    targets = torch.randint(50, (32,))
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(hidden, weight, targets, 5)
    assert ours.dtype == torch.float32
    grads = torch.autograd.grad(ours, (hidden, weight))
    assert [g.dtype for g in grads] == [torch.float32] * 2
    expected = reference(hidden, weight, targets)
    assert ours.item() == pytest.approx(expected.item(), rel=2e-2)
    for a, b in zip(grads, torch.autograd.grad(expected, (hidden, weight))):
        assert (a - b).norm() < 2e-2 * b.norm()


def test_linear_cross_entropy_holds_only_a_piece_of_the_logits():
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            out = function(*arguments, **(options or {}))
            if isinstance(out, torch.Tensor):
                largest.append(out.numel())
            return out

    hidden, weight, targets = torch.randn(512, 4, requires_grad=True), torch.randn(1000, 4, requires_grad=True), torch.randint(1000, (512,))
    with Sizes():
        linear_cross_entropy(hidden, weight, targets, 32).backward()
    assert max(largest) == 32 * 1000


def test_linear_cross_entropy_of_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"hidden \(2, 5, 4\) and targets \(2, 4\)"):
        linear_cross_entropy(torch.zeros(2, 5, 4), torch.zeros(9, 4), torch.zeros(2, 4, dtype=torch.int64))


# ---- files


def test_progress_passes_records_on():
    _, records = regression(5)
    assert [r.step for r in progress(records, 5, 32, "toy")] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_checkpoint_round_trip(tmp_path, dtype):
    model = PixelGPT(PixelGPTConfig(size=6, bits=2, depth=1, heads=2, dim=16)).eval()
    state = torch.get_rng_state()
    for _ in range(2):  # over an older one too
        save_checkpoint(model, tmp_path / "run", dtype)
    assert torch.equal(torch.get_rng_state(), state), "saving must not disturb the run"
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["config.json", "model.safetensors"]
    loaded = load_checkpoint(PixelGPT, tmp_path / "run")
    tokens = torch.randint(64, (2, 36))
    torch.testing.assert_close(loaded(tokens), model(tokens), rtol=0, atol=0 if dtype is None else 1e-2)
    assert next(loaded.parameters()).dtype == torch.float32


def test_checkpoints_of_another_kind_are_refused(tmp_path):
    save_checkpoint(GPT(GPTConfig(vocab_size=8, block_size=4, depth=1, heads=1, dim=4)), tmp_path / "gpt")
    with pytest.raises(ValueError, match="holds a minigen.gpt.GPT, expected a PixelGPT"):
        load_checkpoint(PixelGPT, tmp_path / "gpt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no config.json"):
        load_checkpoint(PixelGPT, tmp_path / "empty")


def test_checkpoints_of_a_newer_version_are_refused(tmp_path):
    model = PixelGPT(PixelGPTConfig(size=6, bits=2, depth=1, heads=2, dim=16))
    save_checkpoint(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    write_json(tmp_path / "config.json", config | {"registers": 4, "window": 2})
    with pytest.raises(ValueError, match="has registers, window in its config.json, which the PixelGPTConfig of this version"):
        load_checkpoint(PixelGPT, tmp_path)
    del config["bias"]  # of an older version, which did not have it
    write_json(tmp_path / "config.json", config)
    assert load_checkpoint(PixelGPT, tmp_path).config.bias is False


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError):
        write_json(tmp_path / "a.json", {"x": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}


def test_device_of_a_process(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert str(pick_device()) == "cuda:0"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert str(pick_device()) == "cuda:3"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert str(pick_device()) == "cpu"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "False")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device().type in ("cpu", "mps")


def test_preset_of_the_environment(monkeypatch):
    monkeypatch.setenv("MINIGEN_PRESET", "paper")
    assert pick_preset() == "paper"
    monkeypatch.delenv("MINIGEN_PRESET")
    assert pick_preset() == ("full" if torch.cuda.is_available() else "demo")


def test_dtype_of_a_device_without_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert pick_dtype(torch.device("cpu")) == torch.float32
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert pick_dtype(torch.device("cpu")) == torch.bfloat16


def test_a_result_says_where_it_was_made():
    about = describe_run(command="x", metrics={})
    assert about["hardware"] and about["versions"]["torch"] == torch.__version__ and len(about["date"]) == 10


def test_the_command_of_a_run_makes_it_again():
    import tyro

    from minigen.train.pixelgpt import PRESETS, Config

    config = tyro.cli(Config, default=PRESETS["cpu"], args="--positions rowcol --sample-at 3 7 --lr 0.01 --out x".split())
    command = command_line("pixelgpt", config, PRESETS["cpu"])
    assert command.startswith("python -m minigen train pixelgpt --preset cpu ")
    again = tyro.cli(Config, default=PRESETS["cpu"], args=command.split()[5:] + ["--out", "x"])
    assert again == config


@dataclass
class ToyConfig(RunConfig):
    """What a script makes of it: a field of its own, one of `FitConfig` that `RunConfig` lacks, and another default."""

    width: int = 3
    codes: Path = Path("codes")
    clip: float = 0.5
    steps: int = 6


def test_a_recipe_takes_every_shared_field():
    config = RunConfig("x", steps=7, batch_size=3, accumulate=2, lr=0.1, warmup=5, ema=0.5, precision="float32", compile=True,
                       sample_at=(2, 4), save_every=9, workers=1, tensorboard=True, seed=11)
    recipe = asdict(config.recipe())
    shared = {field.name for field in fields(FitConfig)} & set(asdict(config))
    assert shared == {"steps", "batch_size", "accumulate", "lr", "warmup", "ema", "precision", "compile", "save_every", "workers",
                      "tensorboard", "seed"}
    given = {name: asdict(config)[name] for name in shared} | {"look_at": (2, 4)}
    assert all(value != getattr(FitConfig(), name) for name, value in given.items())
    assert recipe == asdict(FitConfig()) | given
    assert config.recipe(weight_decay=0.0, lr=0.2, look_at=()) == replace(config.recipe(), weight_decay=0.0, lr=0.2, look_at=())
    with pytest.raises(TypeError, match="wieght_decay"):
        config.recipe(wieght_decay=0.0)
    toy = ToyConfig("toy")
    assert toy.preset == "toy" and (toy.recipe().clip, toy.recipe().steps) == (0.5, 6)


def test_the_pictures_of_a_run(tmp_path):
    config = RunConfig(train_images=6, val_images=3, seed=4)
    train, val = config.dataset("train", 16), config.dataset("val", 16)
    assert (len(train), len(val)) == (6, 3) and train[0].image.shape == (3, 16, 16)
    assert not torch.equal(train[0].image, val[0].image)
    assert not torch.equal(train[0].image, replace(config, seed=5).dataset("train", 16)[0].image)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        replace(config, data=str(tmp_path / "nowhere")).dataset("val", 16)


def test_the_end_of_a_run(tmp_path):
    config = ToyConfig("test", width=5, save_every=2, sample_at=(2,), out=tmp_path)
    _, records = regression(config.steps, folder=tmp_path, save_every=config.save_every, look_at=config.sample_at)
    for record in records:
        if record.look:
            record.metrics["score"] = record.step
    assert list(tmp_path.glob("state-*"))
    result = finish_run("toy", config, {"test": ToyConfig("test")}, {"score": 1}, drift=[1, 2])
    assert result == json.loads((tmp_path / "result.json").read_text()) | {"config": result["config"]}
    assert list(result) == ["command", "script", "preset", "minutes", "seed", "dataset", "metrics", "config", "history", "drift",
                            "hardware", "commit", "date", "versions"]
    assert result["command"] == "python -m minigen train toy --preset test --sample-at 2 --save-every 2 --width 5"
    assert [look["score"] for look in result["history"]] == [2, 6] and result["metrics"] == {"score": 1} and result["drift"] == [1, 2]
    assert result["config"] == asdict(config) | {"out": str(tmp_path), "codes": "codes"}
    assert {path.name for path in tmp_path.iterdir()} == {"log.jsonl", "result.json"}
