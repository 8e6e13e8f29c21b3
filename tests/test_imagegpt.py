"""What is special to ImageGPT: classes, guidance, images, its tokenizer, its script."""

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
from minigen.bench import imagegpt as bench
from minigen.checkpoints import load, save_checkpoint
from minigen.codes import CodeItem
from minigen.data import load_dataset
from minigen.imagegpt import ImageGPT, ImageGPTConfig, check_tokenizer, next_token_loss
from minigen.runs import shipped_result
from minigen.sampling import Guidance
from minigen.train import imagegpt as script
from minigen.training import evaluate
from minigen.vq import VQConfig, VQModel

ROOT = Path(__file__).resolve().parents[1]
K, N, T = 11, 5, 12  # tokens, classes, positions
SMALL = ImageGPTConfig(
    codebook_size=K, height=3, width=4, classes=N, depth=2, heads=2, dim=16)
LABELS = torch.tensor([1, 4, 0])
GUIDED = {
    "none": Guidance(), "less": Guidance(0.5), "constant": Guidance(2.5),
    "linear": Guidance(3.0, "linear"), "cosine": Guidance(3.0, "cosine", 2.0)}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tokens(batch=3, length=T):
    return torch.randint(K, (batch, length), generator=generator())


def large(config=SMALL):
    """A model with weights so large that almost constant outputs hide no error."""
    model = ImageGPT(config)
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


# --- classes


def test_the_class_reaches_every_position(small):
    x = tokens()[:, :-1]
    given, other, none = small(x, LABELS), small(x, (LABELS + 1) % N), small(x)
    assert (given != other).any(dim=-1).all()
    assert (given != none).any(dim=-1).all()
    assert_close(small(x, torch.full((3,), N)), none, rtol=0, atol=0)


@pytest.mark.parametrize(("labels", "rows"), [(LABELS, [0, 1, 4]), (None, [N])])
def test_the_class_embedding_is_learned(small, labels, rows):
    x = tokens()
    F.cross_entropy(small(x[:, :0], labels)[:, 0], x[:, 0]).backward()
    gradient = small.class_embedding.weight.grad.abs().sum(dim=1)
    assert gradient.nonzero().flatten().tolist() == rows


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_labels_are_dropped_in_training_and_only_there(share):
    model = ImageGPT(replace(SMALL, class_dropout=share))
    x, labels = torch.zeros(4000, 0, dtype=torch.int64), torch.full((4000,), 2)
    none, given = model.eval()(x[:1]), model(x[:1], labels[:1])
    assert_close(model(x, labels), given.expand(4000, -1, -1))
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(model.train()(x, labels))
    assert torch.equal(*states)
    dropped = (states[0] - none).abs().amax(dim=(1, 2)) < 1e-6
    spread = 4 * (share * (1 - share) / 4000) ** 0.5
    assert dropped.float().mean().item() == pytest.approx(share, abs=spread)
    assert_close(states[0][~dropped], given.expand(4000, -1, -1)[~dropped])


# --- guidance


@pytest.mark.parametrize("name", GUIDED)
@pytest.mark.parametrize("use_cache", [True, False])
def test_guidance_is_the_formula(small, monkeypatch, name, use_cache):
    """The logits that are sampled from, against two plain passes and the formula."""
    from minigen import imagegpt

    seen = []
    monkeypatch.setattr(imagegpt, "sample", lambda logits, *rest: (
        seen.append(logits.clone()) or logits.argmax(-1)))
    given = tokens()[:, :4]
    found = small.generate(given, LABELS, guidance=GUIDED[name], use_cache=use_cache)
    conditional, unconditional = small(found[:, :-1], LABELS), small(found[:, :-1])
    assert len(seen) == T - 4
    assert torch.equal(found[:, :4], given)
    for position, logits in enumerate(seen, start=4):
        scale = GUIDED[name].at(position, T)
        difference = conditional[:, position] - unconditional[:, position]
        wanted = unconditional[:, position] + scale * difference
        assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("guidance", "rows"), [
    (Guidance(), 3), (Guidance(1.0, "linear"), 3), (Guidance(1.5), 6)])
def test_only_guidance_runs_the_other_half(small, monkeypatch, guidance, rows):
    seen, real = [], small.transformer.cache
    monkeypatch.setattr(small.transformer, "cache", lambda batch, length: (
        seen.append(batch) or real(batch, length)))
    small.generate(3, LABELS, guidance=guidance)
    assert seen == [rows]


def test_a_scale_of_0_is_the_model_without_a_class(small):
    guided = small.generate(3, LABELS, guidance=Guidance(0.0), generator=generator())
    assert torch.equal(guided, small.generate(3, generator=generator()))


def test_guidance_makes_the_class_more_likely(small):
    """Bayes: what is multiplied is the probability of the class given the token."""
    given, found = tokens(1)[:, :0], []
    both = torch.cat([small(given, LABELS[:1])[:, 0], small(given)[:, 0]])
    evidence = -both.log_softmax(-1).diff(dim=0)[0]  # log p(class | token) / p(class)
    for scale in (0.0, 1.0, 2.0, 4.0):
        guided = Guidance(scale).combine(both, 0, T)[0].softmax(-1)
        found.append((guided * evidence).sum().item())
    assert found == sorted(found)


# --- generating


@pytest.mark.parametrize("top_k", [1, 3, K, 2048])
def test_top_k_may_be_larger_than_the_codebook(small, top_k):
    found = small.generate(3, LABELS, top_k=top_k, generator=generator())
    logits = small(found[:, :-1], LABELS)
    ranks = (logits > logits.gather(2, found[..., None])).sum(-1)
    assert ranks.max() < top_k
    if top_k >= K:
        assert torch.equal(found, small.generate(3, LABELS, generator=generator()))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
def test_prompts_of_any_whole_numbers(small, dtype):
    prompt = tokens()[:, :5]
    wanted = small.generate(prompt, LABELS, generator=generator())
    found = small.generate(prompt.to(dtype), LABELS, generator=generator())
    assert torch.equal(found, wanted)


def test_completes_an_image(small, tokenizer):
    images = torch.rand(3, 3, 12, 16, generator=generator())
    top = tokenizer.encode(images[:, :, :8]).flatten(1)
    found = small.generate_images(tokenizer, top, LABELS, generator=generator())
    again = small.generate(top, LABELS, generator=generator())
    assert found.shape == images.shape
    assert found.min() >= 0
    assert found.max() <= 1
    assert torch.equal(again[:, :8], top)
    assert torch.equal(found, tokenizer.decode(again.view(3, 3, 4)))


def test_an_image_grows_token_by_token(small, tokenizer):
    prompt, options = tokens()[:, :2], {"labels": LABELS, "generator": generator()}
    stream = small.stream_images(tokenizer, prompt, blank=0.123, **options)
    canvases = [canvas.clone() for canvas in stream]
    assert len(canvases) == T - 2
    for n, canvas in enumerate(canvases, start=3):
        cells = canvas.unfold(2, 4, 4).unfold(3, 4, 4).flatten(2, 3)  # (3, 3, T, 4, 4)
        blank = (cells == 0.123).flatten(3).all(-1).all(1)
        assert (blank == (torch.arange(T) >= n)).all()
    options["generator"].manual_seed(0)
    last = small.generate_images(tokenizer, prompt, **options)
    assert torch.equal(canvases[-1], last)


# --- the loss


@pytest.mark.parametrize("classes", [N, 0])
def test_loss_is_cross_entropy(classes):
    model, x = large(replace(SMALL, classes=classes)), tokens()
    labels = LABELS if classes else None
    logits = [model(x[:, :t], labels)[:, -1] for t in range(T)]  # one by one
    wanted = F.cross_entropy(torch.stack(logits, dim=2), x)
    assert_close(next_token_loss(model, CodeItem(x, LABELS)), wanted)


def test_learns_images_by_heart():
    """Each class has two images: which of the two is one bit, the class given."""
    model = ImageGPT(replace(SMALL, dim=32, class_dropout=0.5))
    x, labels = tokens(4), torch.tensor([0, 0, 3, 3])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(400):
        next_token_loss(model, CodeItem(x, labels)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    given, none = (next_token_loss(model, CodeItem(x, y)).item() * T / math.log(2)
                   for y in (labels, torch.full((4,), N)))
    assert given == pytest.approx(1, abs=0.3)
    assert none == pytest.approx(2, abs=0.4)
    assert torch.equal(model.generate(x[:, :6], labels, temperature=0.0), x)


# --- its tokenizer


def test_the_tokenizer_is_known_by_its_fingerprint(tokenizer):
    fingerprint = tokenizer.fingerprint()
    model = ImageGPT(replace(SMALL, tokenizer="runs/vq", fingerprint=fingerprint))
    check_tokenizer(model, tokenizer)
    other = VQModel(tokenizer.config).eval()
    for use in (lambda: check_tokenizer(model, other),
                lambda: model.generate_images(other, 1),
                lambda: next(iter(model.stream_images(other, 1)))):
        with pytest.raises(ValueError, match=f"{fingerprint}.*{other.fingerprint()}"):
            use()
    check_tokenizer(ImageGPT(SMALL), other)  # a model that names no tokenizer


# --- the script


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imagegpt") / "run"
    script.main(replace(script.PRESETS["test"], out=folder))
    return folder


def test_the_script_trains_its_tokenizer_and_extracts_codes(trained):
    result = json.loads((trained / "result.json").read_text())
    metrics, model = result["metrics"], load(trained, ImageGPT)
    assert {path.name for path in trained.iterdir() if path.is_dir()} == {
        "tokenizer", "codes-train", "codes-val"}
    assert {path.name for path in trained.glob("*.png")} == {
        "step-00001.png", "step-00003.png", "classes.png"}
    assert metrics["bits_per_token"] == pytest.approx(metrics["val_loss"] / math.log(2))
    assert metrics["bits_per_pixel"] == pytest.approx(
        metrics["bits_per_token"] * metrics["tokens_per_image"] / 16**2)
    assert {"bits_per_token_without_class", "seconds_per_image_guided"} <= set(metrics)
    fingerprint = load(trained / "tokenizer", VQModel).fingerprint()
    assert model.config.fingerprint == result["tokenizer"] == fingerprint
    assert model.config.tokenizer == "tokenizer"
    assert model.config.classes == 9


@pytest.mark.parametrize("options", [
    "", "--label 3 --guidance 2 --schedule linear", "--start half --top-k 9999",
    "--guidance 0 --top-p 0.9"])
def test_sample(trained, tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png"):
        assert main(["sample", str(trained), *options.split(), "--count", "4",
                     "--columns", "4", "--scale", "1", "--out", name]) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert Image.open("a.png").size == (4 * 17 - 1, 16)


def test_sample_finds_the_tokenizer_or_asks_for_it(trained, tmp_path, capsys):
    """In the checkpoint's folder, beside it, or where it is told; never another one."""
    run, out = tmp_path / "models/run", str(tmp_path / "samples.png")
    run.mkdir(parents=True)
    for name in ("model.safetensors", "config.json"):
        shutil.copy(trained / name, run / name)

    def sample(*options):
        status = main(["sample", str(run), "--count", "1", "--out", out, *options])
        return status, capsys.readouterr().err

    status, error = sample()
    assert status == 2
    assert re.search("no tokenizer .*--tokenizer", error)
    assert sample("--tokenizer", str(trained / "tokenizer"))[0] == 0
    shutil.copytree(trained / "tokenizer", tmp_path / "models/tokenizer")
    assert sample()[0] == 0
    wrong = VQModel(load(trained / "tokenizer", VQModel).config)
    save_checkpoint(wrong, tmp_path / "wrong")
    status, error = sample("--tokenizer", str(tmp_path / "wrong"))
    assert status == 2
    assert wrong.fingerprint() in error


def test_trains_with_a_given_tokenizer_and_without_labels(trained, tmp_path):
    config = replace(
        script.PRESETS["test"], tokenizer=str(trained / "tokenizer"), labels=False,
        codes_in=str(trained), out=tmp_path / "run")
    metrics = script.main(config)["metrics"]
    model = load(config.out, ImageGPT)
    assert model.config.tokenizer == config.tokenizer
    assert model.config.classes == 0
    assert "bits_per_token_without_class" not in metrics
    # there is nothing to guide, whatever the default scale is
    options = script.SampleOptions(count=2, tokenizer=config.tokenizer)
    images, labels = script.draw(str(config.out), options)
    assert (len(images), labels) == (2, None)
    assert not [path for path in config.out.iterdir() if path.is_dir()]


def test_goes_on_where_it_was_killed(trained, tmp_path):
    code = """
import os, signal, sys
from minigen.train import imagegpt
real = imagegpt.save_grid
def deadly(images, path, **options):  # in the middle of the second evaluation
    if "00003" in path.name:
        os.kill(os.getpid(), signal.SIGKILL)
    real(images, path, **options)
imagegpt.save_grid = deadly
from minigen.__main__ import main
main(sys.argv[1:])
"""
    out = tmp_path / "killed"
    arguments = ["train", "imagegpt", "--preset", "test", "--out", str(out)]
    assert subprocess.run([sys.executable, "-c", code, *arguments]).returncode == -9
    assert main(arguments) == 2
    assert main([*arguments, "--resume"]) == 0
    for name in ("model.safetensors", "config.json", "step-00003.png", "classes.png",
                 "tokenizer/model.safetensors", "codes-train/codes.npy"):
        one, other = (folder / name for folder in (trained, out))
        assert one.read_bytes() == other.read_bytes(), name


def test_codes_need_a_number_of_images(tmp_path):
    config = replace(script.PRESETS["test"], train_images=0, out=tmp_path / "run")
    with pytest.raises(ValueError, match="train_images above 0, found 0"):
        script.main(config)
    assert not (tmp_path / "run" / "tokenizer").exists(), "after training one"


def test_trains_on_a_folder_of_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for n in range(24):
        folder = tmp_path / "photos" / ("cats", "dogs")[n % 2]
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.effect_noise((20 + n, 24), 80).convert("RGB")
        image.save(folder / f"{n}.jpg")
    data = ["--data", "photos", "--out"]
    assert main(["train", "imagegpt", "--preset", "test", *data, "run"]) == 0
    assert load("run", ImageGPT).config.classes == 2
    options = ["--start", "half", "--count", "3"]
    assert main(["sample", "run", *options, *data, "samples.png"]) == 0


def test_two_processes_train_as_one(tmp_path):
    """With the same codes. Its own tokenizer would differ: k-means starts from random
    rows of the first batch, which two processes hold in another order."""
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    shared = ["--tokenizer", "two/tokenizer", "--codes-in", "two"]
    logs = []
    for name, before, after in (("two", launch, []), ("one", [], shared)):
        done = subprocess.run([
            sys.executable, "-m", *before, "minigen", "train", "imagegpt", "--preset",
            "test", "--precision", "float32", "--class-dropout", "0", "--out", name,
            *after], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        logs.append([json.loads(line) for line in lines])
    for two, one in zip(*logs, strict=True):
        for name in {"loss", "norm", "val_loss"} & set(one):
            assert two[name] == pytest.approx(one[name], rel=1e-3), name


@pytest.mark.parametrize("name", [
    path.name for path in sorted((ROOT / "data/checkpoints").glob("imagegpt-*"))])
def test_shipped_checkpoints_give_the_figures_of_their_result(name):
    about = shipped_result(name)
    config, metrics, model = about["config"], about["metrics"], load(name, ImageGPT)
    tokenizer = script.find_tokenizer(name, model)
    check_tokenizer(model, tokenizer)
    val = load_dataset(config["data"], config["size"], "val", config["val_images"],
                       seed=config["seed"])
    codes = [CodeItem(tokenizer.encode(item.image[None]).flatten(), item.label)
             for item in val]

    def without_class(model, batch):
        return next_token_loss(model, batch._replace(label=None))

    for loss, bits in ((next_token_loss, "bits_per_token"),
                       (without_class, "bits_per_token_without_class")):
        found = evaluate(model, codes, loss, config["batch_size"]) / math.log(2)
        assert found == pytest.approx(metrics[bits], rel=2e-3)


def test_bench():
    rows = {row.case: row.value for row in bench.rows(quick=True)}
    assert len(rows) == 5
    assert next(rows[case] for case in rows if "difference" in case) < 1e-4


# --- wrong inputs


@pytest.mark.parametrize(("make", "message"), [
    (lambda m: m(tokens(1, 3) + K), f"to {K - 1}, found "),
    (lambda m: m.generate(tokens(1, 3) - K), f"to {K - 1}, found -"),
    (lambda m: m(torch.rand(1, 3)), r"found torch.float32 of shape \(1, 3\)"),
    (lambda m: m.generate(torch.rand(1, 3)), "found torch.float32"),
    (lambda m: m(tokens()[:, :6].view(3, 2, 3)), r"\(3, 2, 3\).*\.flatten\(1\)"),
    (lambda m: m(tokens()[:0]), r"at least one .*\(0, 12\)"),
    (lambda m: m(tokens()), "3 x 4 = 12 tokens.* at most 11 .*found 12"),
    (lambda m: m.generate([tokens()[0], tokens()[1, :3]]), "at most 11 .*found 12"),
    (lambda m: m(tokens()[:, :3], LABELS + 2), "0 to 5, found 6"),
    (lambda m: m.generate(2, torch.tensor([0, -1])), "found -1"),
    (lambda m: m.generate(2, LABELS), r"labels \(2,\).*of shape \(3,\)"),
    (lambda m: m.generate(3, LABELS.float()), "labels.*found torch.float32"),
    (lambda m: m.generate(3, guidance=Guidance(2.0)), "no labels and 5 classes"),
    (lambda m: large(replace(SMALL, classes=0)).generate(3, LABELS), "found 4"),
    (lambda m: large(replace(SMALL, classes=0)).generate(
        1, torch.tensor([0]), guidance=Guidance(2.0)), "some labels and 0 classes"),
    (lambda m: ImageGPTConfig(codebook_size=0), "codebook_size=0"),
    (lambda m: ImageGPTConfig(height=0), "height=0"),
    (lambda m: ImageGPTConfig(classes=-1), "classes=-1"),
    (lambda m: ImageGPTConfig(class_dropout=1.5), "from 0 to 1, found 1.5"),
    (lambda m: next_token_loss(m, CodeItem(tokens(length=16), LABELS)), "found 16"),
    (lambda m: m.generate_images(VQModel(VQConfig(
        channels=8, codebook_size=16, codebook_dim=4)), 1), f"{K} tokens.* 16"),
])
def test_wrong_inputs(small, make, message):
    with pytest.raises(ValueError, match=message):
        make(small)


@pytest.mark.parametrize(("options", "message"), [
    ("train imagegpt --preset test --tokenizer nowhere", "nowhere"),
    ("train imagegpt --preset test --guidance -2", "scale=-2.0"),
    ("train imagegpt --preset test --size 18", "18"),
    ("sample RUN --label 12", "0 to 9, found 12"),
])
def test_mistakes_of_the_script_are_one_sentence(
    trained, tmp_path, options, message, capsys
):
    arguments = options.replace("RUN", str(trained)).split()
    assert main([*arguments, "--out", str(tmp_path / "out.png")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
