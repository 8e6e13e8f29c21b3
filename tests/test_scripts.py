"""The command line and the training scripts, as a user runs them."""

import inspect
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from minigen import runs
from minigen.__main__ import chapters, main, script
from minigen.checkpoints import SHIPPED, load
from minigen.data import draw_landscape
from minigen.files import read_json, write_json
from minigen.pixelgpt import PixelGPT, TokenDataset, next_pixel_loss
from minigen.runs import shipped_result
from minigen.show import read_grid, save_grid
from minigen.training import evaluate

TEST = ("train", "pixelgpt", "--preset", "test")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--nproc_per_node", "2")


def new_process(*arguments, cwd, launcher=(sys.executable,), status=0):
    """What `python -m minigen ...` prints, in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "TQDM_DISABLE"}
    done = subprocess.run([*launcher, "-m", "minigen", *arguments], cwd=cwd, text=True,
                          env=environment, capture_output=True, timeout=600)
    assert done.returncode == status, done.stdout + done.stderr
    return done


@pytest.fixture
def minigen(capsys):
    """The same in this process, with what it prints as text."""

    def run(*arguments, status=0):
        assert main([str(argument) for argument in arguments]) == status
        printed = capsys.readouterr()
        return printed.err if status else printed.out

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a finished run in it, `run`."""
    folder = tmp_path_factory.mktemp("train")
    shown = new_process(*TEST, "--out", "run", cwd=folder).stderr
    for part in ("loss=", "tokens/s=", "3/3"):  # the progress bar
        assert part in shown
    return folder


@pytest.fixture
def here(trained, monkeypatch):
    monkeypatch.chdir(trained)
    return trained


def test_train_writes_checkpoint_images_and_result(here):
    names = {path.name for path in Path("run").iterdir()} - {".lock"}
    assert names == {"model.safetensors", "config.json", "result.json", "log.jsonl",
                     "step-00001.png", "step-00003.png"}
    result = read_json("run/result.json")
    assert result["preset"] == "test"
    assert [h["step"] for h in result["history"]] == [1, 3]
    metrics = result["metrics"]
    assert metrics["bits_per_pixel"] == pytest.approx(3 * metrics["bits_per_dimension"])
    assert metrics["val_loss"] == pytest.approx(metrics["bits_per_pixel"] * math.log(2))
    assert Image.open("run/step-00003.png").size[0] > 100


def test_sample_reads_the_checkpoint(here, minigen):
    for name in ("a.png", "b.png"):
        minigen("sample", "run", "--first-pixel", "0x8EE", "--count", 4, "--seed", 1,
                "--top-k", 50, "--out", name)
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    sky = Image.open("a.png").convert("RGB").getpixel((1, 1))
    assert sky == (0x88, 0xEE, 0xEE)
    assert "color" in minigen("sample", "run", "--first-pixel", "0x1000", status=2)
    assert "number" in minigen("sample", "run", "--first-pixel", "red", status=2)


def test_sample_takes_a_chapter_for_its_best_model(minigen, tmp_path):
    """One color of one image: the model's other pixels take a second or two."""
    minigen("sample", "pixelgpt", "--count", 1, "--out", tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size[0] > 32


def test_sample_refuses_weights_that_are_not_the_model_s(here, minigen, tmp_path):
    (tmp_path / "config.json").write_bytes(Path("run/config.json").read_bytes())
    weights = load_file("run/model.safetensors")
    del weights["gpt.transformer.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    error = minigen("sample", tmp_path, status=2)
    assert "gpt.transformer.norm.weight is missing" in error


def test_info(here, minigen):
    assert "pixelgpt: presets test, demo" in minigen("info")
    about = minigen("info", "run")
    assert '"size": 16' in about
    assert '"val_loss"' in about
    assert re.search(r"[\d,]+ numbers, [\d.]+ MB", about)


def test_ship_puts_a_run_into_data(here, minigen, monkeypatch):
    minigen("ship", "run", "--data", "data")
    about = read_json("data/results/run.json")
    assert about == read_json("run/result.json")
    drawn = [read_grid(file, 16, 8) for file in sorted(Path("run").glob("step-*.png"))]
    sheet = read_grid("data/results/run-steps.png", 16)
    assert_close(sheet, torch.cat(drawn), rtol=0, atol=0)
    monkeypatch.setattr(runs, "DATA", Path("data"))
    assert_close(runs.shipped_steps("run"), dict(zip((1, 3), drawn)), rtol=0, atol=0)
    half, whole = (Path(folder, "model.safetensors").stat().st_size
                   for folder in ("data/checkpoints/run", "run"))
    assert half < 0.6 * whole
    minigen("sample", "data/checkpoints/run", "--count", 2, "--out", "shipped.png")
    minigen("ship", "run", "--data", "light", "--without-weights")
    assert Path("light/results/run.json").exists()
    monkeypatch.setattr(runs, "DATA", Path("light"))
    assert_close(runs.shipped_steps("run"), {3: drawn[1]}, rtol=0, atol=0)
    assert not Path("light/checkpoints").exists()


@pytest.mark.parametrize("samples", [2, 6])
def test_the_first_images_of_each_class_ship(samples, tmp_path, monkeypatch):
    run = tmp_path / "run"
    config = {"size": 16, "samples": samples}
    write_json(run / "result.json", {"config": config})
    images = torch.arange(3 * samples).view(-1, 1, 1, 1).expand(-1, 3, 16, 16) / 255
    save_grid(images, run / "classes.png", columns=samples, scale=8)
    runs.ship(run, tmp_path, weights=False)
    monkeypatch.setattr(runs, "DATA", tmp_path)
    kept = images.unflatten(0, (3, samples))[:, :4]
    assert_close(runs.shipped_classes("run"), kept)


@pytest.mark.parametrize("name", sorted(p.name for p in SHIPPED.glob("pixelgpt-*")))
def test_shipped_checkpoints_give_the_loss_of_their_result(name):
    """What the book prints is what the weights, as they ship, do today."""
    about, model = shipped_result(name), load(name, PixelGPT)
    config = script(about["script"]).Config(**{
        field: about["config"][field]
        for field in ("preset", "size", "val_images", "batch_size", "seed", "data")})
    val = TokenDataset(config.dataset("val"), model.tokenizer)
    loss = evaluate(model, val, next_pixel_loss, config.batch_size)
    assert loss == pytest.approx(about["metrics"]["val_loss"], abs=2e-3)


def test_endless_data_shows_each_landscape_once():
    config = replace(script("pixelgpt").PRESETS["test"], train_images=0, accumulate=2)
    data = config.dataset("train")
    assert len(data) == config.steps * config.batch_size * 2
    assert_close(data[5].image, draw_landscape(5, config.size).image)
    assert len(config.dataset("val")) == config.val_images
    with pytest.raises(ValueError, match="cifar10 is not endless: give --train-images"):
        replace(config, data="cifar10").dataset("train")


def test_the_cost_of_a_run_is_counted(here):
    """Four operations of matrices in a linear layer there and back, and no others."""
    result = read_json("run/result.json")
    cost, config = result["cost"], result["config"]
    assert cost["images_seen"] == config["steps"] * config["batch_size"]
    T, D, V = config["size"] ** 2 - 1, config["dim"], 2 ** (3 * config["bits"])
    linear = config["depth"] * 12 * D**2 + V * D
    attention = config["depth"] * 2 * D * T  # in full, though half of it is masked
    expected = 6 * T * (linear + attention) * cost["images_seen"]
    assert cost["flops"] == pytest.approx(expected, rel=0.02)


# ---- words


def test_help(minigen, capsys):
    assert "usage" in minigen("--help")
    for command in ("train", "sample"):
        assert "usage" in minigen(command, "--help")
    for command in ("bench", "info", "ship", "extract-codes"):
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
        assert "usage" in capsys.readouterr().out.lower()


@pytest.mark.parametrize("chapter", chapters())
def test_every_option_of_a_script_has_its_help(chapter, capsys):
    """The comment beside a field or above it, where a class or a parent has one."""
    with pytest.raises(SystemExit):
        main(["train", chapter, "--help"])
    shown = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
    config = script(chapter).Config
    source = "".join(map(inspect.getsource, config.__mro__[:-1]))
    for field in fields(config):
        pattern = rf"^    (?:# (.+)\n    {field.name}:|{field.name}: .*?  # (.*)$)"
        comment = re.search(pattern, source, re.MULTILINE)
        assert comment, field.name
        assert (comment[1] or comment[2]) in shown, field.name


@pytest.mark.parametrize(("arguments", "message"), [
    (["draw"], "no command 'draw'"),
    (["train", "dalle"], "no chapter 'dalle' to train; there are .*pixelgpt"),
    (["train", "pixelgpt", "--preset", "huge"], "no preset 'huge'; it has test, demo"),
    (["sample", "nowhere"], "nowhere is no checkpoint: .*one of pixelgpt, "),
    (["info", "nowhere"], "nowhere is no checkpoint"),
    (["bench", "nothing"], "no benchmark nothing"),
    ([*TEST, "--data", "missing-folder"], "missing-folder"),
    ([*TEST, "--bits", "9"], "bits=9"),
])
def test_mistakes_are_one_sentence(arguments, message, minigen, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = minigen(*arguments, status=2)
    assert re.search(message, error)
    assert "Traceback" not in error


@pytest.mark.parametrize("chapter", chapters())
def test_every_script_has_the_same_parts(chapter):
    module = script(chapter)
    published = {"paper"}
    # ours; Chameleon has 7 billion weights; and no decoder has been published like ours
    if chapter in ("features", "anytoany", "diffusion"):
        published = set()
    assert {"test", "demo", "cpu", "full"} | published == set(module.PRESETS)
    assert all(config.preset == name for name, config in module.PRESETS.items())
    parts = ["build", "main"]
    if chapter != "features":  # it looks at images and draws none
        parts += ["draw", "sample", "SampleOptions"]
    for part in parts:
        assert callable(getattr(module, part))


# ---- runs


def test_trains_on_a_folder_of_images(tmp_path, monkeypatch, minigen):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for n in range(12):
        noise = Image.effect_noise((20 + n, 24), 80).convert("RGB")
        noise.save(f"photos/{n}.jpg")
    minigen(*TEST, "--data", "photos", "--out", "run")
    assert read_json("run/result.json")["dataset"] == "photos"
    minigen("sample", "run", "--data", "photos", "--count", 3, "--out", "drawn.png")
    assert Image.open("drawn.png").size[0] > 32


def test_the_published_form_runs(tmp_path, minigen):
    minigen(*TEST, "--sequences", "windows", "--positions", "rowcol", "--out", tmp_path)
    assert read_json(tmp_path / "result.json")["config"]["sequences"] == "windows"


def assert_same_but_for_the_clock(a, b):
    """Two runs wrote the same weights, images and figures."""
    for path in [*a.glob("*.png"), a / "model.safetensors", a / "config.json"]:
        assert path.read_bytes() == (b / path.name).read_bytes(), path.name
    one, other = (read_json(folder / "result.json") for folder in (a, b))
    for result in (one, other):
        del result["minutes"], result["metrics"]["tokens_per_second"]
        del result["config"]["out"], result["config"]["resume"]
        del result["date"], result["commit"]  # midnight, or a commit, may lie between
    assert one == other


KILL = """
import os, signal, sys
from minigen.train import pixelgpt
real = pixelgpt.save_grid
def deadly(images, path, **options):  # in the middle of the second evaluation
    if "00003" in path.name:
        os.kill(os.getpid(), signal.SIGKILL)
    real(images, path, **options)
pixelgpt.save_grid = deadly
from minigen.__main__ import main
main(sys.argv[1:])
"""


def test_a_run_is_the_same_when_it_was_killed_and_stays_finished(here, minigen):
    arguments = [*TEST, "--out", "killed"]
    assert subprocess.run([sys.executable, "-c", KILL, *arguments]).returncode == -9
    error = minigen(*arguments, status=2)
    assert "stopped after step 2: resume it with resume=True (--resume)" in error
    new_process(*arguments, "--resume", cwd=here)
    assert_same_but_for_the_clock(here / "run", here / "killed")
    before = Path("killed/log.jsonl").stat().st_mtime_ns
    assert '"val_loss"' in minigen(*arguments, "--resume")
    assert "replace it with --overwrite" in minigen(*arguments, status=2)
    error = minigen(*arguments, "--resume", "--lr", 0.5, status=2)
    assert "other settings: lr = 0.002, here 0.5" in error
    assert Path("killed/log.jsonl").stat().st_mtime_ns == before
    minigen(*arguments, "--overwrite", "--seed", 1)
    assert read_json("killed/result.json")["seed"] == 1


def test_the_script_trains_on_two_processes(here, minigen):
    """And returns the result of a finished run on two."""
    arguments = [*TEST, "--precision", "float32"]
    for option in ("--no-resume", "--resume"):
        done = new_process(*arguments, option, "--out", "two", cwd=here,
                           launcher=TORCHRUN)
        assert done.stdout.count("bits_per_pixel") == 1, "only the first process prints"
    minigen(*arguments, "--out", "one")
    one, two = (read_json(here / name / "result.json")["history"]
                for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        for name in ("train_loss", "val_loss"):
            assert a[name] == pytest.approx(b[name], rel=1e-3)


def test_the_options_of_the_loop(tmp_path, minigen):
    minigen(*TEST, "--ema", 0.9, "--accumulate", 2, "--tensorboard",
            "--out", tmp_path / "run")
    assert list((tmp_path / "run/tensorboard").iterdir())
    command = read_json(tmp_path / "run/result.json")["command"]
    assert command == ("python -m minigen train pixelgpt --preset test --accumulate 2 "
                       "--ema 0.9 --tensorboard")
    minigen(*command.split()[3:], "--out", tmp_path / "again")
    assert_same_but_for_the_clock(tmp_path / "run", tmp_path / "again")


# ---- benchmarks: that they measure what they say; how fast depends on the machine


def bench(minigen, *names):
    rows = json.loads(minigen("bench", *names, "--quick", "--json"))["rows"]
    for row in rows:
        assert math.isfinite(row["value"]), row
        if "difference" in row["case"]:
            assert row["value"] < 1e-4
        elif row["unit"] != "bias":
            assert row["value"] >= 0, row
    return rows


def test_bench_of_training(minigen, monkeypatch):
    from minigen.bench import training

    monkeypatch.setattr(training, "pick_dtype", lambda device: torch.float32)
    rows = bench(minigen, "training")
    slow = [row for row in rows if "bfloat16" in row["case"]]
    assert [(row["target"], row["reached"]) for row in slow] == [(None, None)] * 2
    assert all("no bfloat16 instructions" in row["note"] for row in slow)
    # the rows of a GPU, on the processor and with a compiler back end that needs none
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile",
                        lambda function: compiled(function, backend="aot_eager"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    rows = training.gpu_rows(torch.device("cpu"), 64, 2, 1)
    assert [row.case.split(", ")[-1] for row in rows] == [
        "not compiled", "not compiled: share of the card's peak",
        "compiled", "compiled: share of the card's peak"]
    weights = 4096 * 128 + 4 * 12 * 128**2 + 9 * 128  # embedding, blocks, norms
    flops = rows[0].value * (6 * weights + 12 * 4 * 128 * 64)
    assert rows[1].value == pytest.approx(flops / 989e12)


def test_bench_of_gpt(minigen):
    cases = [row["case"] for row in bench(minigen, "gpt")]
    for part in ("cached against", "largest difference", "multinomial"):
        assert any(part in case for case in cases)


def test_bench_of_npp(minigen):
    cases = [row["case"] for row in bench(minigen, "npp")]
    for part in ("patch side 4", "optimizer included", "patch loss",
                 "largest difference", "its products alone"):
        assert any(part in case for case in cases)


def noise_images(name, options):
    noise = torch.Generator().manual_seed(0)
    return (torch.rand(options.count, 3, 64, 64, generator=noise),
            torch.arange(options.count) % 9)


def test_sweep_of_sampling_settings(minigen, monkeypatch):
    from minigen.bench import sweep

    assert len({str(setting) for setting in sweep.SETTINGS}) == len(sweep.SETTINGS) > 9
    monkeypatch.setattr(sweep, "draw", noise_images)
    rows = {row["unit"] + row["case"]: row for row in bench(minigen, "sweep")}
    assert set(rows) == {"FDguidance 1.0", "accuracyguidance 1.0", "FDreal images",
                         "accuracyreal images"}
    noise, real = rows["FDguidance 1.0"]["value"], rows["FDreal images"]["value"]
    assert noise > 5 * real, "noise is no landscape"
    assert rows["accuracyguidance 1.0"]["value"] < 0.5
    assert rows["accuracyreal images"]["value"] > 0.9


def test_sweep_of_the_steps_of_maskgit(minigen, monkeypatch):
    from minigen.bench import steps

    assert len({str(setting) for setting in steps.SETTINGS}) == len(steps.SETTINGS) > 40
    for setting in steps.SETTINGS:
        steps.maskgit.SampleOptions(**setting)
    asked = []
    for chapter in (steps.maskgit, steps.imagegpt):
        monkeypatch.setattr(chapter, "draw", lambda name, options: (
            asked.append((name, options.count)), noise_images(name, options))[1])
    rows = {row["unit"] + row["case"]: row["value"] for row in bench(minigen, "steps")}
    assert asked == [("maskgit-cpu-tokens64", 72), ("imagegpt-cpu-tokens64", 72)]
    assert rows["FDsteps 1"] > 5 * rows["FDreal images"]
    assert rows["recallreal images"] > 0.5 > rows["recallImageGPT"]
    assert all(rows[f"ssteps {count}"] > 0 for count in steps.STEPS)
    assert rows["sImageGPT"] > 0


def test_sweep_of_the_steps_with_256_tokens(minigen, monkeypatch):
    from minigen.bench import steps, steps256

    asked = []
    for chapter in (steps.maskgit, steps.imagegpt):
        monkeypatch.setattr(chapter, "draw", lambda name, options: (
            asked.append((name, options.steps if "maskgit" in name else None)),
            noise_images(name, options))[1])
    found = steps256.rows(quick=True)
    assert asked == [("maskgit-cpu-tokens256", 2), ("imagegpt-cpu-tokens256", None)]
    assert {row.case for row in found} == {"steps 2", "ImageGPT", "real images"}


def test_schedules_of_next_patch_prediction(minigen):
    from minigen.bench import schedules

    rows = {row["case"] + " " + row["unit"]: row["value"]
            for row in bench(minigen, "schedules")}
    assert len(schedules.RUNS) == 5

    def cost(name, unit="Mtokens"):
        return rows[f"{name}, seed 0 {unit}"]

    usual = cost("next token, constant rate")
    assert cost("next token, NPP's schedule") == usual
    assert cost("NPP, level 2") / usual == pytest.approx(0.625)
    assert cost("NPP, level 3") / usual == pytest.approx(0.578, abs=1e-3)
    for name, run in schedules.RUNS.items():
        config = schedules.configuration(name, run, 0, False, Path("runs"))
        assert config.steps == (600 if "compressed" in name else 1000)
        assert cost(name, "bits") == pytest.approx(10, abs=1)  # untrained: ln 1024


def test_short_runs_of_maskgit_are_those_of_imagegpt(minigen):
    from minigen.bench import masking, schedules

    rows = {row["case"] + " " + row["unit"]: row["value"]
            for row in bench(minigen, "masking")}
    assert rows["MaskGIT, seed 0 bits"] == pytest.approx(10, abs=1)  # untrained
    assert rows["MaskGIT, seed 0 FD"] > rows["MaskGIT, long run FD"]
    ours = masking.configuration(1, False, Path("runs"))
    theirs = schedules.configuration("", schedules.RUNS["next token, constant rate"], 1,
                                     False, Path("runs"))
    for name in (*schedules.SHORT, "size", "steps", "seed", "tokenizer", "lr_decay"):
        assert getattr(ours, name) == getattr(theirs, name), name


def test_parts_of_a_block(minigen):
    from minigen.bench import blocks

    rows = {row["case"] + " " + row["unit"]: row["value"]
            for row in bench(minigen, "blocks")}
    assert len(rows) == 3 * len(blocks.BLOCKS)
    sizes = [rows[f"{name}, seed 0 parameters"] for name in blocks.BLOCKS]
    assert max(sizes) < 1.1 * min(sizes), "they are to be compared"
    for name in blocks.BLOCKS:
        assert rows[f"{name}, seed 0 bits"] == pytest.approx(10, abs=1)  # untrained


def test_what_one_model_of_both_costs(minigen):
    from minigen.anytoany import AnyToAny, AnyToAnyConfig
    from minigen.bench import joint

    rows = {row["case"] + " " + row["unit"]: row["value"]
            for row in bench(minigen, "joint")}
    learned = {"both tasks": ("image", "text"), "text to image alone": ("image",),
               "image to text alone": ("text",)}
    for task, kinds in learned.items():
        for kind in ("image", "text"):
            name = f"{task}, seed 0 bits of {kind}"
            assert (name in rows) == (kind in kinds), "only of what it was taught"
            if name in rows:  # untrained: the logarithm of the vocabulary
                assert rows[name] == pytest.approx(10.3, abs=1)
        config = joint.configuration(task, 1, False, Path("runs"), **joint.TASKS[task])
        assert config.steps == 1000
        assert config.seed == 1
    for name in joint.NORMS:
        assert rows[f"{name}, step 4 largest score"] > 0
        assert rows[f"{name}, step 4 log Z"] > 0

    model = AnyToAny(AnyToAnyConfig(dim=16, heads=2, depth=2, qk_norm=False))
    tokens = torch.full((2, 70), 5)
    model.head.weight.data.zero_()
    for layer in model.transformer.blocks:
        layer.attention.qkv.weight.data.zero_()
    seen = joint.watch(model, tokens, torch.ones_like(tokens, dtype=torch.bool))
    assert seen["largest score"] == 0
    assert seen["log Z"] == pytest.approx(math.log(model.vocab_size))


def test_bench_of_anytoany(minigen):
    rows = bench(minigen, "anytoany")
    assert [row["case"].split(": ")[1] for row in rows] == [
        "images and texts in one batch against one after the other",
        "the grammar against a step with the cache"]


def test_trial_of_networks(minigen):
    from minigen.bench import networks

    rows = {row["case"] + " " + row["unit"]: row["value"]
            for row in bench(minigen, "networks")}
    assert len(rows) == 6 * len(networks.NETWORKS) + 2  # and those of real images
    for name in networks.NETWORKS:
        assert rows[f"{name}, seed 0 loss"] == pytest.approx(1.25, abs=0.1)  # of zeros
        assert rows[f"{name}, seed 0 FD"] > 4 * rows["real images FD"]
        config = networks.configuration(name, 0, False, Path("runs"))
        spent = config.steps * networks.operations(config)
        assert spent == pytest.approx(networks.OPERATIONS, rel=0.02)


def test_bench_of_decoders(minigen):
    rows = {(row["case"], row["unit"]): row["value"]
            for row in bench(minigen, "decoders")}
    for case in ("VQ decoder", "steps 1, method euler", "mean of 8"):
        assert rows[f"tokens64, {case}", "PSNR"] > 15
    for prior in ("ImageGPT", "MaskGIT"):  # they draw the class that they are asked for
        for decoder in ("VQ decoder", "diffusion"):
            assert rows[f"tokens64, {prior} and {decoder}", "accuracy"] > 0.7
    assert rows["real images", "FD"] < rows["tokens64, VQ decoder", "FD"]


def test_bench_of_diffusion(minigen):
    rows = {row["case"]: row["value"] for row in bench(minigen, "diffusion")}
    assert all(value > 0 for value in rows.values())
    assert {"1 at once: ImageGPT, 64 tokens", "1 at once: diffusion, 4 Euler steps",
            "1 at once: VQ decoder alone"} <= set(rows)


def test_bench_of_the_comparison(minigen):
    from minigen.systems import measured, timed

    rows = bench(minigen, "comparison")
    assert [row["case"].split(": ")[1] for row in rows] == [
        "one at a time", "sixteen at once", "nearest"]
    for each in measured():  # what ships was timed
        if (SHIPPED / str(each.run)).exists():
            assert (each.run, "nearest") in timed(), each.run


def test_every_system_has_a_drawer():
    """`bench comparison` draws with each of them, whatever ships."""
    from minigen.bench import comparison
    from minigen.systems import measured

    for each in measured():
        if (SHIPPED / str(each.run)).exists() and each.sequential < 1000:
            images = comparison.drawer(each)(2)
            assert images.shape == (2, 3, 64, 64)
            assert 0 <= images.min() < images.max() <= 1


def test_ways_to_read_an_image_of_pixels(minigen):
    from minigen.bench import pixels

    assert len({case.name for case in pixels.CASES}) == len(pixels.CASES) > 6
    image = torch.zeros(1, 3, pixels.SIZE, pixels.SIZE)
    image[..., 0, 1] = 1.0  # white, to the right of the first pixel
    for case in pixels.CASES:
        tokens = case.encode(image)
        assert_close(case.decode(tokens), image)
        white = (tokens[0] == 511).nonzero().flatten().tolist()
        assert white == ([pixels.SIZE] if case.columns_first else [1])
        if case.separators:
            ends = (tokens[0] == pixels.SEPARATOR).nonzero().flatten()
            assert ends.tolist() == [16 + 17 * n for n in range(16)]
            assert case.in_place(tokens) == 1
            moved = torch.cat([tokens[:, 1:], tokens[:, :1]], dim=1)
            assert case.in_place(moved) == 0
        model = pixels.Drawer(case)
        model.gpt.tokens.weight.data.zero_()  # all tokens are equally likely
        assert_close(pixels.nats_per_color(model, tokens),
                     math.log(512 + case.separators))
    rows = bench(minigen, "pixels")
    assert {row["unit"] for row in rows} == {"nats", "FD", "bias", "in place"}
    real, drawn = [row["value"] for row in rows if row["unit"] == "FD"][-1::-1][:2]
    assert drawn > 3 * real, "two steps teach nothing"


@pytest.mark.parametrize(
    "name", sorted(p.parent.name for p in SHIPPED.glob("*/config.json")))
def test_shipped_checkpoints_keep_to_their_sizes(name):
    """In MB: 5, models of 64 tokens or fewer 2.2, with texts 4, feature networks 1."""
    size = sum(file.stat().st_size for file in (SHIPPED / name).iterdir()) / 1e6
    config = read_json(SHIPPED / name / "config.json")
    short = "codebook_size" in config and config.get("height", 99) <= 8
    limit = 1 if name.startswith("features") else 2.2 if short else 5
    limit = 4 if name.startswith("anytoany") else limit
    assert size <= limit
