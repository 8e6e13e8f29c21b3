"""The transformer over learned tokens: what it sees, guidance, the cache, completion, and which tokenizer it belongs to."""

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.testing import assert_close

from minigen.__main__ import main
from minigen.codes import CodeItem
from minigen.data import load_dataset
from minigen.imagegpt import Guidance, ImageGPT, ImageGPTConfig, check_tokenizer, next_token_loss
from minigen.train import imagegpt as script
from minigen.training import evaluate, load_checkpoint, save_checkpoint, shipped_result
from minigen.vq import VQConfig, VQModel

ROOT = Path(__file__).resolve().parents[1]
K, N, T = 11, 5, 12  # tokens, classes, places
SMALL = ImageGPTConfig(codes=K, height=3, width=4, classes=N, depth=2, heads=2, dim=16)
VARIANTS = {"classes": SMALL, "unconditional": replace(SMALL, classes=0), "learned": replace(SMALL, positions="learned", bias=True)}
LABELS = torch.tensor([1, 4, 0])
GUIDED = {"none": Guidance(), "constant": Guidance(2.5), "linear": Guidance(3.0, "linear"), "cosine": Guidance(3.0, "cosine", 2.0),
          "less": Guidance(0.5)}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tokens(batch=3, length=T):
    return torch.randint(K, (batch, length), generator=generator())


def labels_for(model):
    return LABELS if model.config.classes else None


def large(model):
    """Give a model large weights, so that errors are not hidden by almost constant outputs."""
    torch.manual_seed(1)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3) if p.ndim == 2 else None
    for table in (model.starts, model.tokens):
        nn.init.normal_(table.weight)
    return model.eval()


@pytest.fixture(params=VARIANTS)
def model(request):
    return large(ImageGPT(VARIANTS[request.param]))


@pytest.fixture
def small():
    return large(ImageGPT(SMALL))


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    return VQModel(VQConfig(downsample=4, channels=8, hidden=8, codes=K, dim=4, kmeans=False)).eval()


def images(batch=3):
    return torch.rand(batch, 3, 12, 16, generator=generator())


# --- what it sees


@pytest.mark.parametrize("place", [0, 5, 10])
def test_nothing_up_to_a_changed_token_changes(model, place):
    a = tokens()[:, :-1]
    b = a.clone()
    b[:, place] = (b[:, place] + 1) % K
    one, other = (model(x, labels_for(model)) for x in (a, b))
    assert one.shape == (3, T, K)
    assert_close(one[:, : place + 1], other[:, : place + 1], rtol=0, atol=0)  # place 0 has the class
    assert (one[:, place + 1 :] != other[:, place + 1 :]).any(dim=-1).all(), "what follows must change"


def test_the_class_reaches_every_place(small):
    x = tokens()[:, :-1]
    told, other, none = small(x, LABELS), small(x, (LABELS + 1) % N), small(x)
    assert (told != other).any(dim=-1).all() and (told != none).any(dim=-1).all()
    assert_close(small(x, torch.full((3,), N)), none, rtol=0, atol=0)


def test_pictures_of_a_batch_do_not_see_each_other(model):
    x, labels = tokens()[:, :-1], labels_for(model)
    assert_close(model(x, labels)[1:2], model(x[1:2], labels[1:2] if labels is not None else None), rtol=1e-4, atol=1e-5)


def test_the_start_is_learned(small):
    x = tokens()
    assert small(x[:, :0], LABELS).shape == (3, 1, K)
    F.cross_entropy(small(x[:, :0], LABELS)[:, 0], x[:, 0]).backward()
    moved = small.starts.weight.grad.abs().sum(dim=1) > 0
    assert moved.tolist() == [n in LABELS for n in range(N + 1)]
    small.zero_grad()
    F.cross_entropy(small(x[:, :0])[:, 0], x[:, 0]).backward()
    assert (small.starts.weight.grad.abs().sum(dim=1) > 0).tolist() == [False] * N + [True]


# --- labels that are left out


def test_labels_are_dropped_in_training_and_only_there():
    model = ImageGPT(replace(SMALL, drop_label=0.3))
    x, labels = torch.zeros(4000, 0, dtype=torch.int64), torch.full((4000,), 2)
    none = model.eval().hidden(x[:1])
    told = model.hidden(x, labels)
    assert_close(told, told[:1].expand_as(told)) and not torch.equal(told[:1], none)
    drawn = model.train().hidden(x, labels)
    dropped = (drawn - none).abs().amax(dim=(1, 2)) < 1e-6
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / 4000) ** 0.5)
    assert_close(drawn[~dropped], told[: (~dropped).sum()])
    torch.manual_seed(3)
    once = model.hidden(x, labels)
    torch.manual_seed(3)
    assert_close(model.hidden(x, labels), once, rtol=0, atol=0)


@pytest.mark.parametrize("share, row", [(0.0, 2), (1.0, N)])
def test_all_or_no_labels_are_dropped(share, row):
    model = ImageGPT(replace(SMALL, drop_label=share)).train()
    next_token_loss(model, CodeItem(tokens(8), torch.full((8,), 2))).backward()
    assert model.starts.weight.grad.abs().sum(dim=1).nonzero().flatten().tolist() == [row]


# --- guidance


def test_schedules():
    at = {name: [g.at(n, 5) for n in range(5)] for name, g in GUIDED.items()}
    assert at["none"] == [1.0] * 5 and at["constant"] == [2.5] * 5 and at["linear"] == pytest.approx([1, 1.5, 2, 2.5, 3])
    assert at["cosine"] == pytest.approx([1 + (1 - math.cos(math.pi * (n / 4) ** 2)) for n in range(5)])
    assert at["cosine"][0] == 1 and at["cosine"][-1] == 3 and at["cosine"][1] < at["linear"][1]
    assert Guidance(3.0, "linear").at(0, 1) == 1.0 and Guidance(3.0).at(0, 1) == 3.0


@pytest.mark.parametrize("name", GUIDED)
@pytest.mark.parametrize("use_cache", [True, False])
def test_guidance_is_the_formula(small, monkeypatch, name, use_cache):
    """The logits that are drawn from, against two plain passes and the formula."""
    from minigen import imagegpt

    seen = []
    monkeypatch.setattr(imagegpt, "sample", lambda logits, *rest: seen.append(logits.clone()) or logits.argmax(-1))
    given = tokens()[:, :4]
    drawn = small.generate(given, LABELS, guidance=GUIDED[name], use_cache=use_cache)
    conditional, unconditional = small(drawn[:, :-1], LABELS), small(drawn[:, :-1])
    assert len(seen) == T - 4 and torch.equal(drawn[:, :4], given)
    for place, logits in enumerate(seen, start=4):
        difference = conditional[:, place] - unconditional[:, place]
        assert_close(logits, unconditional[:, place] + GUIDED[name].at(place, T) * difference, rtol=1e-4, atol=1e-4)


def test_a_scale_of_1_is_the_conditional_model_and_runs_no_other_half(small, monkeypatch):
    rows = []
    real = small.transformer.transform_one
    monkeypatch.setattr(small.transformer, "transform_one", lambda x, cache: rows.append(len(x)) or real(x, cache))
    plain = small.generate(3, LABELS, generator=generator())
    assert set(rows) == {3} and len(rows) == T - 1
    assert torch.equal(small.generate(3, LABELS, guidance=Guidance(1.0, "linear"), generator=generator()), plain)
    assert set(rows) == {3}
    rows.clear()
    small.generate(3, LABELS, guidance=Guidance(1.5), generator=generator())
    assert set(rows) == {6} and len(rows) == T - 1


def test_a_scale_of_0_is_the_unconditional_model(small):
    assert torch.equal(small.generate(3, LABELS, guidance=Guidance(0.0), generator=generator()), small.generate(3, generator=generator()))


def test_guidance_makes_the_class_more_likely(small):
    """Bayes: what is multiplied is the probability of the class given the token."""
    given, log_p = tokens(1)[:, :0], []
    conditional, unconditional = small(given, LABELS[:1])[0, 0], small(given)[0, 0]
    evidence = conditional.log_softmax(-1) - unconditional.log_softmax(-1)  # log of p(class | token) / p(class)
    for scale in (0.0, 1.0, 2.0, 4.0):
        guided = Guidance(scale).combine(torch.stack([conditional, unconditional]), 0, T)[0].softmax(-1)
        log_p.append((guided * evidence).sum().item())
    assert log_p == sorted(log_p)


# --- drawing


@pytest.mark.parametrize("given", [0, 1, 6, 11])
@pytest.mark.parametrize("name", GUIDED)
def test_cached_drawing_equals_uncached(small, given, name):
    prompt = tokens()[:, :given] if given else 3
    options = dict(guidance=GUIDED[name], temperature=0.7, top_k=5, top_p=0.95)
    cached, plain = (small.generate(prompt, LABELS, generator=generator(), use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, plain) and cached.shape == (3, T)
    if given:
        assert torch.equal(cached[:, :given], prompt)


def test_cached_drawing_equals_uncached_without_classes(model):
    for given in (0, 6):
        prompt = tokens()[:, :given]
        cached, plain = (model.generate(prompt, labels_for(model), generator=generator(), use_cache=use) for use in (True, False))
        assert torch.equal(cached, plain)


def test_draws_from_the_distribution(small):
    """First tokens of many pictures come as often as the model says."""
    count = 20_000
    first = next(small.stream(count, LABELS[:1].expand(count), generator=generator()))[:, 0]
    p = small(tokens(1)[:, :0], LABELS[:1])[0, 0].softmax(-1)
    assert_close(torch.bincount(first, minlength=K) / count, p, rtol=0, atol=4 * 0.5 / count**0.5)


@pytest.mark.parametrize("top_k", [1, 3, K, 2048])
def test_top_k_may_be_larger_than_the_codebook(small, top_k):
    drawn = small.generate(3, LABELS, top_k=top_k, generator=generator())
    ranks = (small(drawn[:, :-1], LABELS) > small(drawn[:, :-1], LABELS).gather(2, drawn[..., None])).sum(-1)
    assert ranks.max() < top_k
    if top_k >= K:
        assert torch.equal(drawn, small.generate(3, LABELS, generator=generator()))


def test_the_seed_decides(small):
    one, again, other = (small.generate(3, LABELS, generator=generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)
    cold = [small.generate(3, LABELS, temperature=0.0, generator=generator(seed)) for seed in (0, 1)]
    assert torch.equal(*cold)


def test_what_is_given_is_not_written_into(small):
    prompt, labels = tokens()[:, :5], LABELS.clone()
    before = prompt.clone()
    canvases = list(small.stream(prompt, labels, guidance=Guidance(2.0), generator=generator()))
    assert torch.equal(prompt, before) and torch.equal(labels, LABELS)
    assert [c.shape[1] for c in canvases] == list(range(6, T + 1))
    logits = torch.randn(4, K)
    copy = logits.clone()
    Guidance(2.0).combine(logits, 0, T)
    assert torch.equal(logits, copy)


def test_prompts_of_any_whole_numbers(small):
    prompt = tokens()[:, :5]
    wanted = small.generate(prompt, LABELS, generator=generator())
    for dtype in (torch.int32, torch.uint8, torch.int16):
        assert torch.equal(small.generate(prompt.to(dtype), LABELS, generator=generator()), wanted)


def test_drawing_leaves_the_mode_alone(small):
    small.train()
    small.generate(1)
    next(small.stream(1))
    assert small.training


def test_half_precision(small):
    batch = CodeItem(tokens(), LABELS)
    whole = next_token_loss(small, batch)
    with torch.autocast("cpu", torch.bfloat16):
        half = next_token_loss(small, batch)
    assert half.dtype == torch.float32 and half.item() == pytest.approx(whole.item(), rel=0.05)
    drawn = small.bfloat16().generate(2, LABELS[:2], guidance=Guidance(2.0), generator=generator())
    assert drawn.dtype == torch.int64 and drawn.shape == (2, T)


# --- pictures


def test_completes_a_half_picture(small, tokenizer):
    x = images()
    top = tokenizer.encode(x[:, :, :8]).flatten(1)
    drawn = small.draw(tokenizer, top, LABELS, generator=generator())
    again = small.generate(top, LABELS, generator=generator())
    assert drawn.shape == x.shape and 0 <= drawn.min() and drawn.max() <= 1
    assert torch.equal(again[:, :8], top) and torch.equal(drawn, tokenizer.decode(again.view(3, 3, 4)))


def test_stream_grows_token_by_token(small, tokenizer):
    prompt = tokens()[:, :2]
    canvases = [c.clone() for c in small.draw_stream(tokenizer, prompt, LABELS, blank=0.123, generator=generator())]
    assert len(canvases) == T - 2
    for n, canvas in enumerate(canvases, start=3):
        cells = canvas.unfold(2, 4, 4).unfold(3, 4, 4).flatten(2, 3)  # (3, 3, T, 4, 4)
        blank = (cells == 0.123).flatten(3).all(-1).all(1)
        assert (blank == (torch.arange(T) >= n)).all()
    assert torch.equal(canvases[-1], small.draw(tokenizer, prompt, LABELS, generator=generator()))


# --- the loss


def test_loss_is_cross_entropy(model):
    x, labels = tokens(), LABELS
    told = labels if model.config.classes else None
    logits = torch.cat([model(x[:, :t], told)[:, -1:] for t in range(T)], dim=1)  # one by one
    assert_close(next_token_loss(model, CodeItem(x, labels)), F.cross_entropy(logits.flatten(0, 1), x.flatten()), rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_plain_cross_entropy(small):
    x = tokens()
    grads = []
    for loss in (lambda: next_token_loss(small, CodeItem(x, LABELS)), lambda: F.cross_entropy(small(x[:, :-1], LABELS).flatten(0, 1), x.flatten())):
        small.zero_grad()
        loss().backward()
        grads.append({name: p.grad.clone() for name, p in small.named_parameters()})
    for name, grad in grads[0].items():
        assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-5)


def test_learns_pictures_by_heart():
    """Each class has two pictures. Which of the two is one bit, and the class tells the rest."""
    torch.manual_seed(0)
    model = ImageGPT(replace(SMALL, dim=32, drop_label=0.5))
    x, labels = tokens(4), torch.tensor([0, 0, 3, 3])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(400):
        next_token_loss(model, CodeItem(x, labels)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    bits = T * next_token_loss(model, CodeItem(x, labels)).item() / math.log(2)
    none = T * next_token_loss(model, CodeItem(x, torch.full((4,), N))).item() / math.log(2)
    assert bits == pytest.approx(1, abs=0.2) and none == pytest.approx(2, abs=0.3)
    drawn = model.generate(64, torch.tensor([0, 3]).repeat(32), top_p=0.9, generator=generator())
    for picture, label in zip(drawn, torch.tensor([0, 3]).repeat(32)):
        assert any(torch.equal(picture, known) for known in x[labels == label])
    assert torch.equal(model.generate(x[:, :6], labels, temperature=0.0), x)


# --- files and tokenizers


def test_save_and_load(tmp_path, model):
    model.save_pretrained(tmp_path)
    loaded = ImageGPT.from_pretrained(tmp_path).eval()
    assert loaded.config == model.config
    x = tokens()[:, :-1]
    assert_close(loaded(x, labels_for(model)), model(x, labels_for(model)), rtol=0, atol=0)
    assert torch.equal(loaded.generate(3, generator=generator()), model.generate(3, generator=generator()))


def test_the_tokenizer_is_known_by_its_fingerprint(tokenizer):
    model = ImageGPT(replace(SMALL, tokenizer="runs/vq", fingerprint=tokenizer.fingerprint()))
    check_tokenizer(model, tokenizer)
    torch.manual_seed(1)
    other = VQModel(tokenizer.config).eval()
    for use in (lambda: check_tokenizer(model, other), lambda: model.draw(other, 1), lambda: next(model.draw_stream(other, 1))):
        with pytest.raises(ValueError, match=f"the tokenizer {tokenizer.fingerprint()} \\(runs/vq\\), found {other.fingerprint()}"):
            use()
    check_tokenizer(ImageGPT(SMALL), other)  # nobody knows which one it was


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imagegpt")
    script.main(replace(script.PRESETS["test"], out=folder / "run"))
    return folder


def test_script_writes_checkpoint_pictures_and_result(trained):
    names = {p.name for p in (trained / "run").iterdir()}
    assert names == {"model.safetensors", "config.json", "result.json", "log.jsonl", "step-00001.png", "step-00003.png", "classes.png",
                     "tokenizer", "codes-train", "codes-val"}
    result = json.loads((trained / "run/result.json").read_text())
    metrics = result["metrics"]
    assert [h["step"] for h in result["history"]] == [1, 3] and result["script"] == "imagegpt"
    assert metrics["bits_per_token"] == pytest.approx(metrics["val_loss"] / math.log(2))
    assert metrics["bits_per_pixel"] == pytest.approx(metrics["bits_per_token"] * metrics["tokens_per_image"] / 16**2)
    assert {"bits_per_token_without_class", "seconds_per_picture", "parameters", "tokens_per_second"} <= set(metrics)
    model, tokenizer = load_checkpoint(ImageGPT, trained / "run"), load_checkpoint(VQModel, trained / "run/tokenizer")
    assert model.config.fingerprint == tokenizer.fingerprint() and model.config.classes == 9
    assert result["config"]["tokenizer"] == "" and model.config.tokenizer == "tokenizer"


@pytest.mark.parametrize("options", [[], ["--label", "3", "--guidance", "2", "--schedule", "linear"], ["--start", "half", "--top-k", "9999"],
                                     ["--guidance", "0", "--top-p", "0.9"]])
def test_sample(trained, tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png"):
        assert main(["sample", str(trained / "run"), *options, "--count", "4", "--columns", "4", "--scale", "1", "--out", name]) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert Image.open("a.png").size == (4 * 17 - 1, 16)


def test_sample_finds_the_tokenizer_or_says_which_it_wants(trained, tmp_path, capsys, tokenizer):
    """In the checkpoint's folder, beside it, or where it is told; never another one."""
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "models/run").mkdir(parents=True, exist_ok=True)
        shutil.copy(trained / "run" / name, tmp_path / "models/run" / name)
    out = str(tmp_path / "drawn.png")
    assert main(["sample", str(tmp_path / "models/run"), "--count", "1", "--out", out]) == 2
    assert re.search("no tokenizer .*--tokenizer", capsys.readouterr().err)
    assert main(["sample", str(tmp_path / "models/run"), "--count", "1", "--tokenizer", str(trained / "run/tokenizer"), "--out", out]) == 0
    shutil.copytree(trained / "run/tokenizer", tmp_path / "models/tokenizer")
    assert main(["sample", str(tmp_path / "models/run"), "--count", "1", "--out", out]) == 0
    torch.manual_seed(1)
    save_checkpoint(VQModel(load_checkpoint(VQModel, trained / "run/tokenizer").config), tmp_path / "wrong")
    capsys.readouterr()
    assert main(["sample", str(tmp_path / "models/run"), "--count", "1", "--tokenizer", str(tmp_path / "wrong"), "--out", out]) == 2
    assert re.search("was trained on codes of the tokenizer .* found ", capsys.readouterr().err)


def test_a_given_tokenizer_is_used(trained, tmp_path):
    config = replace(script.PRESETS["test"], tokenizer=str(trained / "run/tokenizer"), labels=False, guidance=1.0, out=tmp_path / "run")
    metrics = script.main(config)["metrics"]
    model = load_checkpoint(ImageGPT, tmp_path / "run")
    assert model.config.tokenizer == config.tokenizer and model.config.classes == 0
    assert "bits_per_token_without_class" not in metrics
    assert not (tmp_path / "run/tokenizer").exists()


def test_a_run_is_the_same_twice(trained, tmp_path):
    command = json.loads((trained / "run/result.json").read_text())["command"]
    assert command == "python -m minigen train imagegpt --preset test"
    assert main([*command.split()[3:], "--out", str(tmp_path / "again")]) == 0
    for name in ("model.safetensors", "config.json", "step-00003.png", "classes.png", "tokenizer/model.safetensors", "codes-train/codes.npy"):
        assert (tmp_path / "again" / name).read_bytes() == (trained / "run" / name).read_bytes(), name


def test_goes_on_where_it_was_killed(trained, tmp_path):
    code = """
import os, signal, sys
from minigen.train import imagegpt
real = imagegpt.save_grid
def deadly(images, path, **options):  # in the middle of the second look
    if "00003" in path.name:
        os.kill(os.getpid(), signal.SIGKILL)
    real(images, path, **options)
imagegpt.save_grid = deadly
from minigen.__main__ import main
main(sys.argv[1:])
"""
    arguments = ["train", "imagegpt", "--preset", "test", "--out", str(tmp_path / "killed")]
    assert subprocess.run([sys.executable, "-c", code, *arguments]).returncode == -9
    assert main(arguments) == 2
    assert main([*arguments, "--resume"]) == 0
    for name in ("model.safetensors", "step-00003.png"):
        assert (tmp_path / "killed" / name).read_bytes() == (trained / "run" / name).read_bytes(), name


def test_trains_on_a_folder_of_pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for n in range(24):
        folder = tmp_path / "photos" / ("cats", "dogs")[n % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((20 + n, 24), 80).convert("RGB").save(folder / f"{n}.jpg")
    assert main(["train", "imagegpt", "--preset", "test", "--data", "photos", "--out", "run"]) == 0
    assert load_checkpoint(ImageGPT, tmp_path / "run").config.classes == 2
    assert main(["sample", "run", "--data", "photos", "--start", "half", "--count", "3", "--out", "drawn.png"]) == 0


def test_two_processes_share_batches(tmp_path):
    histories = []
    for launch in (["minigen"], ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "minigen"]):
        done = subprocess.run([sys.executable, "-m", *launch, "train", "imagegpt", "--preset", "test", "--precision", "float32",
                               "--drop-label", "0", "--out", f"run-{len(histories)}"],
                              cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        histories.append(json.loads((tmp_path / f"run-{len(histories)}/result.json").read_text())["history"])
    for a, b in zip(*histories, strict=True):  # the tokenizer's codes may differ by rounding
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-2) and a["val_loss"] == pytest.approx(b["val_loss"], rel=1e-2)


@pytest.mark.parametrize("checkpoint", sorted((ROOT / "data/checkpoints").glob("imagegpt-*")), ids=lambda path: path.name)
def test_shipped_checkpoints_give_the_figures_of_their_result(checkpoint):
    about = shipped_result(checkpoint)
    config, metrics = about["config"], about["metrics"]
    model = load_checkpoint(ImageGPT, checkpoint)
    tokenizer = script.find_tokenizer(checkpoint, model)  # the one beside it
    check_tokenizer(model, tokenizer)
    val = load_dataset(config["data"], config["size"], "val", config["val_images"], seed=config["seed"])
    codes = [CodeItem(tokenizer.encode(item.image[None]).flatten(), item.label) for item in val]
    loss = evaluate(model, codes, next_token_loss, config["batch_size"])
    assert loss == pytest.approx(metrics["val_loss"], rel=2e-3)
    none = evaluate(model, codes, script.without_class, config["batch_size"]) / math.log(2)
    assert none == pytest.approx(metrics["bits_per_token_without_class"], rel=2e-3)


def test_bench(capsys):
    assert main(["bench", "imagegpt", "--quick", "--json"]) == 0
    rows = {row["case"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert sum("document's loop" in case for case in rows) == 2
    for case, row in rows.items():
        if "difference" in case:
            assert row["value"] < 1e-4, case
        elif "document's loop" in case:
            assert row["value"] > 2, case
        elif "guided" in case:
            assert 0.8 < row["value"] < 4, case


# --- bad input


@pytest.mark.parametrize("make, message", [
    (lambda m: m(torch.full((1, 3), K)), f"tokens from 0 to {K - 1}, found {K}: they come from another tokenizer"),
    (lambda m: m(torch.tensor([[3, -1, 400]])), "found -1"),
    (lambda m: m.generate(torch.tensor([[400, 1]])), "found 400"),
    (lambda m: m(torch.rand(1, 3)), r"whole numbers, found torch.float32 of shape \(1, 3\)"),
    (lambda m: m(tokens()[0]), r"found torch.int64 of shape \(12,\)"),
    (lambda m: m(tokens()[:, :6].view(3, 2, 3)), r"shape \(3, 2, 3\); a grid \(B, h, w\) becomes one by .flatten\(1\)"),
    (lambda m: m(tokens()[:0]), r"at least one sequence .*\(0, 12\)"),
    (lambda m: m(tokens()), "3 x 4 = 12 tokens, so at most 11 can come before another, found 12"),
    (lambda m: m.generate(tokens(length=20), LABELS), "at most 11 can come before another, found 20"),
    (lambda m: m.generate(0), "at least one picture, found 0"),
    (lambda m: m(tokens()[:, :3], torch.tensor([0, 1, 6])), "classes from 0 to 4, and 5 for none; found label 6"),
    (lambda m: m.generate(2, torch.tensor([0, -1])), "found label -1"),
    (lambda m: m.generate(2, LABELS), r"a label for each of 2 pictures, \(2,\) of whole numbers, found torch.int64 of shape \(3,\)"),
    (lambda m: m.generate(3, LABELS.float()), "found torch.float32"),
    (lambda m: m.generate(3, guidance=Guidance(2.0)), "guidance of scale 2.0 is towards a class: .* found no labels and 5 classes"),
    (lambda m: ImageGPT(VARIANTS["unconditional"]).generate(1, torch.tensor([1])), "no classes, so leave labels out; found label 1"),
    (lambda m: ImageGPT(VARIANTS["unconditional"]).generate(1, torch.tensor([0]), guidance=Guidance(2.0)), "found some labels and 0 classes"),
    (lambda m: Guidance(-1.0), "scale of at least 0 .* found scale=-1.0"),
    (lambda m: Guidance(math.nan), "found scale=nan"),
    (lambda m: Guidance(2.0, "cosine", 0.0), "power=0.0"),
    (lambda m: Guidance(2.0, "rising"), "no schedule 'rising' of guidance; there are constant, linear, cosine"),
    (lambda m: ImageGPTConfig(codes=0), "at least 1 code .* codes=0"),
    (lambda m: ImageGPTConfig(height=0), "grid of 0 x 8"),
    (lambda m: ImageGPTConfig(classes=-1), "classes=-1"),
    (lambda m: ImageGPTConfig(drop_label=1.5), "from 0 to 1, found 1.5"),
    (lambda m: ImageGPT(ImageGPTConfig(dim=30)), "dim 30 cannot be shared by 8 heads"),
    (lambda m: m.generate(1, temperature=-1.0), "temperature must not be negative"),
    (lambda m: m.generate(1, top_k=0), "top_k must be at least 1"),
    (lambda m: next_token_loss(m, CodeItem(tokens(length=16), LABELS)), "3 x 4 = 12 tokens, found 16"),
    (lambda m: m.draw(VQModel(VQConfig(channels=8, codes=16, dim=4)), 1), f"this model has {K} tokens, found a tokenizer with 16"),
])
def test_errors_say_what_was_expected(small, make, message):
    with pytest.raises(ValueError, match=message):
        make(small)


def test_labels_that_the_model_does_not_know_are_one_sentence(trained, capsys, tmp_path):
    assert main(["sample", str(trained / "run"), "--label", "12", "--out", str(tmp_path / "x.png")]) == 2
    error = capsys.readouterr().err
    assert "classes from 0 to 8" in error and "found label 12" in error and "Traceback" not in error


@pytest.mark.parametrize("options, message", [
    (["--tokenizer", "nowhere"], "nowhere"),
    (["--guidance", "-2"], "scale=-2.0"),
    (["--size", "18"], "18"),
])
def test_mistakes_of_the_script_are_one_sentence(options, message, capsys, tmp_path):
    assert main(["train", "imagegpt", "--preset", "test", "--out", str(tmp_path / "run"), *options]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and "Traceback" not in error
