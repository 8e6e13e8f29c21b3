"""The training engine, its loss, checkpoints and results.

Kills, locks and several processes are in `test_resume.py`.
"""

import re
from copy import deepcopy
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
import tyro
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from torch.utils.data import TensorDataset
from toy import PRESETS, Config, build

from minigen import checkpoints
from minigen.checkpoints import find_checkpoint, load, save_checkpoint
from minigen.data import endless_batches
from minigen.devices import hardware, pick_device, pick_dtype, pick_preset
from minigen.files import read_json, write_json
from minigen.gpt import GPT, GPTConfig
from minigen.losses import linear_cross_entropy
from minigen.pixelgpt import PixelGPT
from minigen.runs import RunConfig, command_line, describe_run, run
from minigen.training import (
    FitConfig,
    decay_groups,
    eval_history,
    evaluate,
    fit,
    learning_rate,
    progress,
    read_log,
    update_ema,
)

LINE = torch.tensor([[1.0], [-2.0], [0.5]])


def mse(model, batch):
    x, y = batch
    return (model(x) - y).square().mean()


def points(items=320, poison=None):
    """A line that has nothing to do with images: `fit` has no opinion about models."""
    x = torch.randn(items, 3, generator=torch.Generator().manual_seed(0))
    y = x @ LINE + 0.3
    if poison is not None:
        y[poison] = torch.nan
    return TensorDataset(x, y)


def regression(steps=60, data=None, folder=None, resume=False, ema_model=None,
               **options):
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    config = FitConfig(**{"steps": steps, "batch_size": 32, "lr": 0.1, "warmup": 5,
                          "weight_decay": 0.0, "precision": "float32"} | options)
    return model, fit(model, data or points(), mse, config, folder=folder,
                      ema_model=ema_model, resume=resume)


def test_fits_a_line():
    model, records = regression(200)
    records = list(records)
    assert [r.step for r in records] == list(range(1, 201))
    assert records[-1].loss < 1e-3
    assert records[-1].seconds > records[0].seconds > 0
    assert_close(model.weight, LINE.T, atol=0.02, rtol=0)


def test_two_runs_are_equal():
    (a, run_a), (b, run_b) = regression(), regression()
    assert [(r.loss, r.norm) for r in run_a] == [(r.loss, r.norm) for r in run_b]
    assert torch.equal(a.weight, b.weight)


def test_a_clip_of_zero_never_clips():
    (a, never), (b, high) = regression(20, clip=0.0), regression(20, clip=1e9)
    assert [r.loss for r in never] == [r.loss for r in high]
    assert torch.equal(a.weight, b.weight)


def test_the_steps_are_those_of_plain_pytorch():
    """AdamW, clipping and the learning rate written out, on the same batches."""
    model, records = regression(20, clip=0.5, weight_decay=0.1)
    plain, config = deepcopy(model), FitConfig(steps=20, lr=0.1, warmup=5)
    optimizer = torch.optim.AdamW(
        [{"params": [plain.weight], "weight_decay": 0.1},
         {"params": [plain.bias], "weight_decay": 0.0}], betas=(0.9, 0.95))
    batches = endless_batches(points(), 32, torch.Generator().manual_seed(0))
    for record in records:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(record.step, config)
        value = mse(plain, next(batches))
        optimizer.zero_grad()
        value.backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.5).item()
        optimizer.step()
        assert record.loss == pytest.approx(value.item(), rel=1e-3)
        assert record.norm == pytest.approx(norm, rel=1e-3)
    assert_close(model.state_dict(), plain.state_dict(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_batches_are_one_large_batch(accumulate):
    whole, one = regression(12)
    parts, several = regression(12, batch_size=32 // accumulate, accumulate=accumulate)
    for a, b in zip(one, several, strict=True):
        assert (a.loss, a.norm) == pytest.approx((b.loss, b.norm), rel=1e-3)
    assert_close(whole.weight, parts.weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("batch_size", [4, 32])
def test_a_loss_that_is_not_finite_stops_before_the_weights(batch_size, tmp_path):
    model, records = regression(data=points(96, poison=77), folder=tmp_path,
                                save_every=1, batch_size=batch_size)
    done = 0
    with pytest.raises(FloatingPointError) as stopped:  # noqa: PT012
        for record in records:
            done, before = record.step, deepcopy(model.state_dict())
    assert re.search(rf"at step {done + 1} the loss is nan .*the last good state is "
                     rf".*state-0*{done}:", str(stopped.value))
    assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_a_gradient_that_is_not_finite_stops_too():
    model = nn.Linear(2, 1)

    def loss(model, batch):  # finite, with an infinite slope
        return model(batch[0]).sum() * 0 + (model.weight * 0).sum().abs().sqrt()

    with pytest.raises(FloatingPointError, match="norm of its gradient nan"):
        list(fit(model, TensorDataset(torch.ones(4, 2)), loss,
                 FitConfig(steps=3, batch_size=2)))
    assert model.weight.isfinite().all()


def test_learning_rate():
    config = FitConfig(steps=100, lr=2.0, warmup=10, final_lr=0.1)
    rates = [learning_rate(step, config) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([0.2 * i for i in range(1, 11)])
    assert max(rates) == rates[9] == 2.0
    assert rates[-1] == pytest.approx(0.2)
    assert rates[9:] == sorted(set(rates[9:]), reverse=True)


def test_other_ways_for_the_rate_to_fall():
    config = FitConfig(steps=100, lr=2.0, warmup=10, final_lr=0.1, lr_decay="none")
    rates = [learning_rate(step, config) for step in range(1, 101)]
    assert set(rates[9:]) == {2.0}
    line = replace(config, lr_decay="linear")
    rates = [learning_rate(step, line) for step in range(1, 101)]
    assert rates[9:80] == pytest.approx([2.0] * 71)
    assert rates[80:] == pytest.approx([2 - 0.09 * n for n in range(1, 21)])
    with pytest.raises(ValueError, match="lr_decay must be one of .*, found 'moon'"):
        replace(config, lr_decay="moon")


def test_the_caller_hears_of_each_step_before_it_is_taken():
    heard, model, data = [], nn.Linear(2, 1), TensorDataset(torch.ones(4, 2))
    config = FitConfig(steps=3, batch_size=2)
    for record in fit(model, data, lambda m, b: m(b[0]).sum(), config,
                      before_step=heard.append):
        assert heard == [*range(1, record.step + 1)]


def test_decay_is_for_matrices_only():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    model[1].bias.requires_grad_(False)
    groups = decay_groups(model, 0.5)
    assert [[p.ndim for p in group["params"]] for group in groups] == [[2], [1, 1]]
    before = {name: p.clone() for name, p in model.named_parameters()}
    list(fit(model, [torch.zeros(4)], lambda m, b: m(b).sum() * 0, FitConfig(
        steps=1, batch_size=1, lr=0.1, warmup=0, weight_decay=0.5)))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (p.ndim == 1)


# ---- averaged weights


def test_the_average_warms_up():
    """Its decay is min(ema, n / (n + 10)) at step n, from its first step on."""
    torch.manual_seed(0)
    ema_model = nn.Linear(3, 1)  # the same as the model's, by the same seed
    model, records = regression(30, ema_model=ema_model, ema=0.6)
    expected = deepcopy(ema_model.state_dict())
    for record in records:
        decay = min(0.6, record.step / (record.step + 10))
        for name, weight in model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * weight
        assert_close(ema_model.state_dict(), expected, rtol=1e-4, atol=1e-5)


def test_an_average_has_averaged_buffers_and_copied_counters():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    model.append(model[0])  # a tied layer is averaged once
    ema_model = deepcopy(model)
    before = deepcopy(model.state_dict())
    with torch.no_grad():
        for number in [*model.parameters(), *model.buffers()]:
            number += 8
    update_ema(ema_model, model, 0.75)
    for name, value in ema_model.state_dict().items():
        step = 8 if name.endswith("num_batches_tracked") else 2
        assert_close(value, before[name] + step)


# ---- evaluation and the log


def test_evaluations_are_marked_and_logged_with_what_the_caller_found(tmp_path):
    model, records = regression(8, folder=tmp_path, eval_steps=(2, 5))
    seen = []
    for record in records:
        assert model.training
        if record.evaluate:
            model.eval()  # as an evaluation may leave it
            record.metrics["val_loss"] = 10.0 * record.step
            seen.append(record.step)
    assert seen == [2, 5, 8]
    log = read_log(tmp_path)
    assert [line["step"] for line in log] == list(range(1, 9))
    assert [line.get("val_loss") for line in log[3:5]] == [None, 50.0]
    history = eval_history(log)
    assert [h["step"] for h in history] == seen
    assert set(history[0]) == {"step", "train_loss", "val_loss"}
    mean = sum(log[n]["loss"] for n in (2, 3, 4)) / 3
    assert history[1]["train_loss"] == pytest.approx(mean)


def test_evaluate_counts_each_item_once():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 1))
    data = points(7)
    value = mse(model.eval(), data.tensors).item()
    model.train()
    assert evaluate(model, data, mse, 3) == pytest.approx(value)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_evaluate_seeds_a_loss_that_draws():
    """Without touching the generators that training draws from."""
    model, data, before = nn.Linear(3, 1), points(7), torch.get_rng_state()

    def loss(model, batch, generator=None):
        noise = torch.randn(len(batch[0]), 1, generator=generator)
        return (model(batch[0]) - batch[1] + noise).square().mean()

    first, second, other = (evaluate(model, data, loss, 3, seed) for seed in (0, 0, 1))
    assert first == second != other
    assert torch.equal(torch.get_rng_state(), before)
    list(fit(model, data, loss, FitConfig(steps=1, batch_size=2)))  # its own numbers
    assert not torch.equal(torch.get_rng_state(), before)


def test_tensorboard_shows_each_step_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {"folder": tmp_path, "save_every": 2, "tensorboard": True}
    losses = {}
    for record in (records := regression(6, **options)[1]):
        record.metrics["val_loss"] = 1.0
        losses[record.step] = record.loss
        if record.step == 5:  # stopped before the fifth step is logged
            break
    records.close()
    losses |= {r.step: r.loss for r in regression(6, resume=True, **options)[1]}
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {e.step: e.value for e in events.Scalars("loss")} == pytest.approx(losses)
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert [e.step for e in events.Scalars("val_loss")] == [1, 2, 3, 4]


def test_progress_passes_records_on():
    records = progress(regression(5)[1], 5, 32, "toy")
    assert [r.step for r in records] == [1, 2, 3, 4, 5]


# ---- precision and compilation


def test_compiled_steps_are_the_same(monkeypatch):
    real = nn.Module.compile  # by the back end that needs no C++ compiler
    monkeypatch.setattr(nn.Module, "compile", lambda m: real(m, backend="aot_eager"))
    (a, plain), (b, compiled) = regression(4), regression(4, compile=True)
    losses = [r.loss for r in compiled]
    assert losses == pytest.approx([r.loss for r in plain], rel=1e-3)
    assert_close(a.state_dict(), b.state_dict(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_the_precision_is_that_of_the_forward_pass(precision):
    seen = []

    def loss(model, batch):
        seen.append(model(batch[0]).dtype)
        return mse(model, batch)

    model = nn.Linear(3, 1)
    list(fit(model, points(), loss, FitConfig(steps=1, precision=precision)))
    assert seen == [getattr(torch, precision)]
    assert model.weight.dtype == torch.float32


@pytest.mark.parametrize("name", ["steps", "batch_size", "accumulate"])
def test_numbers_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be .* at least 1, found 0"):
        FitConfig(**{name: 0})


# ---- cross entropy in pieces


def plain_loss(hidden, weight, targets, weights=None, label_smoothing=0.0):
    """PyTorch's cross entropy of all logits, for each of the targets."""
    logits = (hidden @ weight.T).flatten(0, -2)
    several = targets if targets.ndim == hidden.ndim else targets[..., None]
    losses = sum(F.cross_entropy(logits, t.flatten(), reduction="none",
                                 label_smoothing=label_smoothing)
                 for t in several.unbind(-1)) / several.shape[-1]
    if weights is None:
        return losses.mean()
    return (losses * weights.flatten()).sum() / weights.sum()


WEIGHTS = torch.arange(21.0).reshape(3, 7)


@pytest.mark.parametrize("rows", [None, 1, 4, 100])
@pytest.mark.parametrize(("k", "options"), [
    ((), {}), ((), {"label_smoothing": 0.1}), ((), {"weights": WEIGHTS}),
    ((), {"weights": WEIGHTS > 12}), ((3,), {}), ((1,), {"label_smoothing": 1.0}),
    ((4,), {"label_smoothing": 0.3, "weights": WEIGHTS}),
], ids=["plain", "smoothed", "weighted", "masked", "several", "one", "all"])
def test_linear_cross_entropy_is_cross_entropy(k, options, rows):
    hidden = torch.randn(3, 7, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, (3, 7, *k))
    ours = linear_cross_entropy(hidden, weight, targets, rows=rows, **options)
    theirs = plain_loss(hidden, weight, targets, **options)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    grads = (torch.autograd.grad(3 * loss, (hidden, weight)) for loss in (ours, theirs))
    assert_close(*grads, rtol=1e-4, atol=1e-6)  # softmax and sum are in float32


def test_a_mask_of_nothing_gives_no_loss_and_no_gradient():
    hidden = torch.randn(4, 5, requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.randn(9, 5), torch.randint(9, (4,)),
                                weights=torch.zeros(4, dtype=torch.bool))
    loss.backward()
    assert loss.item() == hidden.grad.abs().max() == 0


def test_linear_cross_entropy_without_a_gradient():
    hidden, weight, targets = torch.randn(4, 5), torch.randn(9, 5), torch.arange(4)
    assert not linear_cross_entropy(hidden, weight, targets).requires_grad
    weight.requires_grad_()
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, targets).requires_grad
    linear_cross_entropy(hidden, weight, targets).backward()
    expected = torch.autograd.grad(plain_loss(hidden, weight, targets), weight)
    assert_close(weight.grad, expected[0], rtol=1e-4, atol=1e-6)


def test_linear_cross_entropy_in_bfloat16():
    hidden = torch.randn(32, 16, requires_grad=True)
    weight, targets = torch.randn(50, 16, requires_grad=True), torch.randint(50, (32,))
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(hidden, weight, targets, rows=5)
    expected = plain_loss(hidden, weight, targets)
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(expected.item(), rel=5e-2)
    grads = (torch.autograd.grad(loss, (hidden, weight)) for loss in (ours, expected))
    for a, b in zip(*grads, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 5e-2 * b.norm()


def test_linear_cross_entropy_holds_only_a_piece_of_the_logits():
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            out = function(*arguments, **(options or {}))
            if isinstance(out, torch.Tensor):
                largest.append(out.numel())
            return out

    hidden = torch.randn(512, 4, requires_grad=True)
    weight, targets = torch.randn(1000, 4, requires_grad=True), torch.arange(512)
    with Sizes():
        linear_cross_entropy(hidden, weight, targets, rows=32).backward()
    assert max(largest) == 32 * 1000


@pytest.mark.parametrize(("targets", "weights"), [((2, 4), None), ((2, 5), (2, 4)),
                                                  ((2, 4, 3), None), ((10,), None)])
def test_linear_cross_entropy_of_shapes_that_do_not_fit(targets, weights):
    targets = torch.zeros(targets, dtype=torch.int64)
    weights = None if weights is None else torch.zeros(weights)
    with pytest.raises(ValueError, match=r"hidden \(2, 5, 4\), targets .* must agree"):
        linear_cross_entropy(torch.zeros(2, 5, 4), torch.zeros(9, 4), targets,
                             weights=weights)


# ---- checkpoints


@pytest.fixture
def saved(tmp_path):
    """A small GPT in a folder of its own."""
    model = GPT(GPTConfig(vocab_size=8, block_size=4, depth=1, heads=1, dim=4))
    state = torch.get_rng_state()
    save_checkpoint(model, tmp_path / "gpt")
    assert torch.equal(torch.get_rng_state(), state), "saving must not disturb a run"
    return tmp_path / "gpt"


def test_checkpoints_in_half_precision_load_as_float32(saved):
    model = load(saved, GPT)
    save_checkpoint(model, saved, torch.float16)  # over the older one
    assert sorted(path.name for path in saved.iterdir()) == [
        "config.json", "model.safetensors"]
    stored = load_file(saved / "model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.float16}
    assert_close(load(saved).state_dict(), model.state_dict(), atol=1e-2, rtol=1e-2)


NAME = "transformer.norm.weight"


@pytest.mark.parametrize(("change", "message"), [
    (lambda w: w.pop(NAME), f"{NAME} is missing"),
    (lambda w: w.update({"old": w.pop(NAME)}),
     f"old is not part of the model; {NAME} is missing"),
    (lambda w: w.update(more=torch.zeros(1)), "more is not part of the model"),
    (lambda w: w.update({NAME: torch.ones(5)}), rf"{NAME} has shape \(5,\), expected"),
    (lambda w: w[NAME].fill_(torch.nan), f"{NAME} has values that are not finite"),
    (lambda w: w[NAME].fill_(torch.inf), f"{NAME} has values that are not finite"),
    (lambda w: w.clear(), r"is missing.* and \d+ more"),
], ids=["missing", "renamed", "extra", "shape", "nan", "inf", "empty"])
def test_weights_that_are_not_the_model_s_are_refused_by_name(change, message, saved):
    weights = load_file(saved / "model.safetensors")
    weights = {key: value.clone() for key, value in weights.items()}  # not a map
    change(weights)
    save_file(weights, saved / "model.safetensors")
    with pytest.raises(ValueError, match=f"does not hold this model: .*{message}"):
        load(saved)


def test_a_file_that_was_cut_is_refused(saved):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="model.safetensors cannot be read"):
        load(saved)


@pytest.mark.parametrize(("changes", "message"), [
    ({"registers": 4, "window": 2}, "has registers, window in its config.json, which "
     "the GPTConfig of this version does not know"),
    ({"model": "os.path.join"}, "expected the name of a model of minigen, found 'os."),
    ({"model": "torch.nn.Linear"}, "expected the name of a model of minigen"),
    ({"model": "minigen.gpt.Path"}, "has no model minigen.gpt.Path"),
    ({"model": "minigen.gpt.sample"}, "has no model minigen.gpt.sample"),
])
def test_configurations_that_are_not_a_model_s_are_refused(changes, message, saved):
    config = read_json(saved / "config.json")
    write_json(saved / "config.json", config | changes)
    with pytest.raises(ValueError, match=message):
        load(saved)


def test_what_a_checkpoint_lacks_and_what_it_is(saved):
    config = read_json(saved / "config.json")
    write_json(saved / "config.json", {k: v for k, v in config.items() if k != "bias"})
    assert load(saved).config.bias is False  # of an older version, which had no bias
    with pytest.raises(ValueError, match="holds a GPT, expected a PixelGPT"):
        load(saved, PixelGPT)
    write_json(saved / "config.json", {"dim": 4})
    with pytest.raises(ValueError, match="was not written by minigen"):
        load(saved)


def test_models_load_by_the_name_of_a_run_of_a_chapter_and_of_a_folder(saved):
    """And a name that is none of these lists what there is."""
    flagship = read_json(checkpoints.SHIPPED / "flagships.json")["pixelgpt"]
    assert find_checkpoint("pixelgpt") == find_checkpoint(flagship)
    one, same = load("pixelgpt", PixelGPT), load(find_checkpoint(flagship))
    assert_close(one.state_dict(), same.state_dict(), rtol=0, atol=0)
    assert not one.training
    assert find_checkpoint(saved) == find_checkpoint(str(saved)) == saved
    for name in ("nowhere", saved.parent, "a/b/c"):
        with pytest.raises(FileNotFoundError, match=f"{name} is no checkpoint: .*one "
                           f"of pixelgpt, .*, {flagship}"):
            load(name)


# ---- the machine, and what a run says of itself


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


def test_hardware_names_what_is_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert re.match(r"1 x NVIDIA H200; .+, \d+ threads, ", hardware())
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert hardware().startswith("8 x NVIDIA H200; ")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert "NVIDIA" not in hardware()


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


def test_the_result_of_a_run(tmp_path):
    config = replace(PRESETS["test"], width=4, eval_steps=(1,), out=tmp_path)
    result = run("toy", config, PRESETS, build)
    assert list(result) == [
        "command", "script", "preset", "minutes", "seed", "cost", "dataset",
        "metrics", "history", "config", "hardware", "commit", "date", "versions",
        "more"]
    assert result["command"] == ("python -m minigen train toy --preset test "
                                 "--eval-steps 1 --width 4")
    assert [h["step"] for h in result["history"]] == [1, 2]
    assert result["metrics"]["val_loss"] == result["history"][1]["val_loss"]
    assert result["metrics"]["parameters"] == sum(
        p.numel() for p in load(tmp_path).parameters())
    assert result["config"] == asdict(config) | {
        "out": str(tmp_path), "codes": "codes", "eval_steps": [1], "betas": [0.9, 0.95]}
    assert describe_run(x=1)["versions"]["torch"] == torch.__version__


def test_the_command_of_a_run_repeats_it():
    options = "--eval-steps 3 7 --lr 0.01 --compile --width 5 --out x".split()
    config = tyro.cli(Config, default=PRESETS["test"], args=options)
    command = command_line("toy", config, PRESETS["test"])
    assert command.startswith("python -m minigen train toy --preset test ")
    again = command.split()[5:] + ["--out", "x"]
    assert tyro.cli(Config, default=PRESETS["test"], args=again) == config


def test_a_script_s_config_has_the_fields_of_all_it_extends():
    config = Config(width=5, seed=3)
    assert (config.clip, FitConfig().clip) == (0.5, 1.0)
    shape = config.select(GPTConfig, vocab_size=9)
    assert shape == GPTConfig(vocab_size=9)
    assert config.select(FitConfig, steps=7).seed == 3
    with pytest.raises(TypeError, match="wieght_decay"):
        config.select(FitConfig, wieght_decay=0.0)


def test_the_images_of_a_run(tmp_path):
    config = RunConfig(size=16, train_images=6, val_images=3, seed=4)
    train, val = config.dataset("train"), config.dataset("val")
    assert (len(train), len(val)) == (6, 3)
    assert train[0].image.shape == (3, 16, 16)
    assert not torch.equal(train[0].image, val[0].image)
    other = replace(config, seed=5).dataset("train")
    assert not torch.equal(train[0].image, other[0].image)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        replace(config, data=str(tmp_path / "nowhere")).dataset("val")
