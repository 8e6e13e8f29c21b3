"""The training loop, checkpoints and result files."""

import json
import math
import os

import pytest
import torch
from torch import nn

from minigen.gpt import GPT, GPTConfig
from minigen.pixelgpt import PixelGPT, PixelGPTConfig
from minigen.training import (
    FitConfig,
    command_line,
    describe_run,
    fit,
    learning_rate,
    load_checkpoint,
    pick_dtype,
    pick_preset,
    progress,
    save_checkpoint,
    write_json,
)


def regression(steps=60, poison=None, **options):
    """A toy that has nothing to do with pictures: `fit` has no opinion about models."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    g = torch.Generator().manual_seed(0)

    def batches():
        for step in range(1, 10**6):
            x = torch.randn(32, 3, generator=g)
            y = x @ torch.tensor([[1.0], [-2.0], [0.5]]) + 0.3
            if step == poison:
                y[0] = math.nan
            yield torch.cat([x, y], dim=1)

    return model, fit(model, batches(), lambda m, b: (m(b[:, :3]) - b[:, 3:]).square().mean(),
                      FitConfig(steps, lr=0.1, warmup=5, weight_decay=0.0, **options))


def test_fits_a_toy_regression():
    model, records = regression(200)
    records = list(records)
    assert [r.step for r in records] == list(range(1, 201))
    assert records[-1].loss < 1e-3
    assert records[-1].seconds > records[0].seconds > 0


def test_two_runs_are_equal():
    (a, run_a), (b, run_b) = regression(), regression()
    assert [r.loss for r in run_a] == [r.loss for r in run_b]
    assert torch.equal(a.weight, b.weight)


def test_a_loss_that_is_not_finite_stops_before_the_weights():
    model, records = regression(poison=7)
    with pytest.raises(FloatingPointError, match="nan at step 7"):
        for record in records:
            before = model.weight.clone()
    assert record.step == 6
    assert torch.equal(model.weight, before) and model.weight.isfinite().all()


def test_learning_rate():
    config = FitConfig(steps=100, lr=2.0, warmup=10, final_lr=0.1)
    rates = [learning_rate(step, config) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([0.2 * i for i in range(1, 11)])
    assert max(rates) == rates[9] == 2.0
    assert rates[-1] == pytest.approx(0.2)
    assert all(a > b for a, b in zip(rates[9:], rates[10:]))


def test_decay_is_for_matrices_only():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    before = {name: p.clone() for name, p in model.named_parameters()}
    batches = iter(lambda: torch.zeros(1, 4), None)
    list(fit(model, batches, lambda m, b: m(b).sum() * 0, FitConfig(1, lr=0.1, warmup=0, weight_decay=0.5)))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (p.ndim == 1)


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
