"""Next Patch Prediction: grouping, stages, LlamaGen's files, many images in a file."""

import math
import os
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from minigen import archive
from minigen.archive import write_archive
from minigen.checkpoints import load
from minigen.files import read_json
from minigen.imagegpt import ImageGPT, next_token_loss
from minigen.npp import (
    NPP,
    SIZES,
    NPPConfig,
    group_tokens,
    group_vectors,
    multiple_of,
    patch_token_loss,
    stage_ends,
    stage_sides,
)
from minigen.train import npp as script
from minigen.training import learning_rate, read_log
from minigen.transformer import drop_path

K, N, H, W = 13, 5, 4, 8  # tokens, classes, rows and columns of the grid
SMALL = NPPConfig(codebook_size=K, height=H, width=W, classes=N, depth=2, heads=2,
                  dim=16, mlp_multiple=8, dropout=0.0, class_dropout=0.0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def large(config=SMALL, seed=0):
    """A model with weights so large that almost constant outputs hide no error."""
    torch.manual_seed(seed)
    model = NPP(config)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3) if p.ndim == 2 else None
    return model.eval()


def batch(count=3):
    return SimpleNamespace(tokens=torch.randint(K, (count, H * W), generator=seeded()),
                           label=torch.arange(count) % N)


# --- grouping


@pytest.mark.parametrize("multiple", [1, 16, 64, 128, 256])
def test_the_multiple_of_swiglu_is_found_from_its_width(multiple):
    for dim in (320, 512, 1000, 1024):
        hidden = -(-(8 * dim // 3) // multiple) * multiple
        found = multiple_of(dim, hidden)
        assert -(-(8 * dim // 3) // found) * found == hidden


@pytest.mark.parametrize("side", [1, 2, 4])
def test_a_patch_is_a_square(side):
    tokens = batch().tokens
    vectors = nn.functional.one_hot(tokens, K).double()
    grouped = group_tokens(tokens, H, W, side)
    means = group_vectors(vectors, H, W, side)
    assert grouped.shape == (3, H * W // side**2, side**2)
    for n in range(H * W // side**2):
        row, column = divmod(n, W // side)
        square = tokens.view(3, H, W)[:, row * side : (row + 1) * side,
                                      column * side : (column + 1) * side].flatten(1)
        assert torch.equal(grouped[:, n], square)
        assert_close(means[:, n], nn.functional.one_hot(square, K).double().mean(1))


@pytest.mark.parametrize("side", [0, 3, 8])
def test_a_side_that_does_not_tile(side):
    with pytest.raises(ValueError, match=rf"{side} x {side} .* 4 x 8: .*\[1, 2, 4\]"):
        group_tokens(batch().tokens, H, W, side)


# --- the model and its loss


def test_side_one_is_next_token_prediction_bit_for_bit():
    model = large()
    patches, tokens = (loss(model, batch()) for loss in (
        patch_token_loss, next_token_loss))
    assert torch.equal(patches, tokens)
    gradients = [torch.autograd.grad(loss, [*model.parameters()])
                 for loss in (patches, tokens)]
    assert all(map(torch.equal, *gradients))


def test_it_has_no_weights_that_imagegpt_lacks():
    model, other = NPP(SMALL), ImageGPT(SMALL)
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in other.state_dict().items()}


@pytest.mark.parametrize("side", [1, 2, 4])
def test_the_loss_is_the_mean_over_the_tokens_of_a_patch(side):
    model, data = large(), batch()
    logits = model.head(model.read_patches(data.tokens, data.label, side))
    targets = group_tokens(data.tokens, H, W, side)                # (3, P, side^2)
    each = torch.stack([F.cross_entropy(logits.transpose(1, 2), target,
                                        reduction="none")
                        for target in targets.unbind(-1)])
    assert_close(patch_token_loss(model, data, side), each.mean())


@pytest.mark.parametrize("side", [1, 2, 4])
def test_at_the_start_all_tokens_are_equally_likely(side):
    assert_close(patch_token_loss(NPP(SMALL), batch(), side).item(), math.log(K))


@pytest.mark.parametrize("side", [2, 4])
def test_a_patch_sees_the_patches_before_it_and_nothing_else(side):
    model, data = large(), batch(1)
    hidden = model.read_patches(data.tokens, data.label, side)
    owner = group_tokens(torch.arange(H * W)[None], H, W, side)[0]
    for n in range(len(owner)):
        changed = data.tokens.clone()
        changed[0, owner[n, -1]] = (changed[0, owner[n, -1]] + 1) % K
        moved = model.read_patches(changed, data.label, side) - hidden
        moved = moved[0].abs().amax(-1) > 0
        assert not moved[: n + 1].any()
        assert moved[n + 1 :].all()


def test_the_order_within_a_patch_is_not_read():
    model, data = large(), batch(1)
    owner = group_tokens(torch.arange(H * W)[None], H, W, 2)[0]
    shuffled = data.tokens.clone()
    shuffled[0, owner[0]] = data.tokens[0, owner[0].flip(0)]
    assert_close(model.read_patches(shuffled, data.label, 2),
                 model.read_patches(data.tokens, data.label, 2))


def test_patches_have_the_positions_of_the_coarse_grid():
    """A model of the small grid reads the mean embeddings as its own tokens."""
    model, data = large(), batch()
    coarse = NPP(replace(SMALL, height=H // 2, width=W // 2)).eval()
    coarse.load_state_dict(model.state_dict())
    vectors = group_vectors(model.tokens(data.tokens), H, W, 2)
    start = model.class_embedding(data.label, 3)[:, None]
    x = torch.cat([start, vectors[:, :-1]], dim=1)
    assert_close(model.read_patches(data.tokens, data.label, 2), coarse.transformer(x))


def test_mistakes_of_the_model():
    with pytest.raises(ValueError, match="expected rope2d, found 'rowcol'"):
        NPP(replace(SMALL, positions="rowcol")).read_patches(batch().tokens, side=2)
    with pytest.raises(ValueError, match=r"32 tokens each, found shape \(3, 8\)"):
        NPP(SMALL).read_patches(batch().tokens[:, :8])
    with pytest.raises(ValueError, match="lie from 0 to 5"):
        NPP(SMALL).read_patches(batch().tokens, torch.tensor([0, 1, 6]))
    with pytest.raises(ValueError, match="lie from 0 to 12"):
        NPP(SMALL).read_patches(batch().tokens + 1)


def test_initial_weights_are_those_of_llamagen():
    torch.manual_seed(0)
    model = NPP(replace(SMALL, dim=128, depth=8, codebook_size=500))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all()
        elif parameter.numel() > 2000:
            std = 0.0 if name == "head.weight" else 0.02  # no smaller in deep models
            assert parameter.std().item() == pytest.approx(std, rel=0.1), name


@pytest.mark.parametrize(("name", "millions"), [
    ("B", 111), ("L", 343), ("XL", 775), ("XXL", 1411), ("3B", 3098)])
def test_sizes_are_the_published_ones(name, millions):
    with torch.device("meta"):
        model = NPP(NPPConfig(codebook_size=16384, height=16, width=16, classes=1000,
                              **SIZES[name]))
    count = sum(p.numel() for p in model.parameters())
    assert count / 1e6 == pytest.approx(millions, rel=0.01)


def test_dropouts():
    config = replace(SMALL, dropout=0.5, attention_dropout=0.0, drop_path=0.8, depth=3)
    blocks = NPP(config).transformer.blocks
    assert [block.drop_path for block in blocks] == [0.0, 0.4, 0.8]
    assert blocks[0].attention.attention_dropout == 0.0
    assert NPP(replace(config, attention_dropout=None)).transformer.blocks[
        0].attention.attention_dropout == 0.5
    x = torch.randn(200, 6, 16)
    unchanged = (blocks[2].train()(x) == x).all(dim=(1, 2))
    assert 0.4 < unchanged.float().mean() < 0.9  # skip both layers: 0.64 of the images
    assert not (blocks[2].eval()(x) == x).all(dim=(1, 2)).any()
    with pytest.raises(ValueError, match="from 0 to below 1, found 1"):
        replace(config, drop_path=1.0)


def test_drop_path_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.ones(4000, 2, 3)
    y = drop_path(x, 0.25)
    assert set(y.flatten(1).sum(1).tolist()) == {0.0, 8.0}  # whole images
    assert y.mean().item() == pytest.approx(1, abs=0.05)
    assert drop_path(x, 0.0) is x


# --- stages


def test_stages():
    assert stage_sides(1) == [1]
    assert stage_sides(4) == [8, 4, 2, 1]
    assert stage_ends(300, 2) == [150, 300]
    assert stage_ends(300, 3) == [75, 150, 300]
    assert stage_ends(300, 4) == [37, 75, 150, 300]  # as NPP's training code
    for steps, level, rate in ((3, 4, 0.5), (100, 2, 1.0), (100, 2, 0.0)):
        with pytest.raises(ValueError, match=f"{steps} steps .* into {level} stages"):
            stage_ends(steps, level, rate)
    with pytest.raises(ValueError, match="at least one level"):
        stage_sides(0)


def test_the_rate_starts_anew_in_each_stage():
    config = replace(script.PRESETS["test"], steps=200, level=2, warmup=10, lr=1.0,
                     final_lr=0.1, lr_decay="linear")
    rates = [learning_rate(step, config) for step in range(1, 201)]
    assert rates[:100] == rates[100:]
    assert rates[9] == 1.0
    assert rates[4] == pytest.approx(0.5)
    assert rates[79] == pytest.approx(1.0)
    assert rates[89] == pytest.approx(0.55)
    assert rates[99] == pytest.approx(0.1)
    assert [config.side(step) for step in (1, 100, 101, 200)] == [2, 2, 1, 1]


def test_the_control_has_the_schedule_without_the_patches():
    ours = replace(script.PRESETS["test"], steps=200, level=2, warmup=10, lr=1.0)
    control = replace(ours, patches=False)
    for step in range(1, 201):
        assert learning_rate(step, control) == learning_rate(step, ours)
        assert control.side(step) == 1


def codes_of(tmp_path):
    """A tokenizer of random weights, for runs that only have to run."""
    from minigen.checkpoints import save_checkpoint
    from minigen.vq import VQConfig, VQModel

    torch.manual_seed(0)
    save_checkpoint(VQModel(VQConfig(downsample=4, channels=8, z_channels=8,
                                     codebook_size=K, codebook_dim=4, kmeans=False)),
                    tmp_path / "tokenizer")
    return {"tokenizer": str(tmp_path / "tokenizer"),
            "codes_in": str(tmp_path / "codes")}


def test_a_run_that_stops_at_the_end_of_a_stage_resumes_exactly(tmp_path):
    config = replace(script.PRESETS["test"], steps=6, eval_steps=(6,), save_every=1,
                     precision="float32", **codes_of(tmp_path))
    whole = script.main(replace(config, out=tmp_path / "whole"))
    cut, out = "import minigen.train.npp as script", tmp_path / "cut"
    for last in (2, 3):  # before and at the end of the coarse stage
        code = f"""{cut}
import os, minigen.training as training
real = training.Trainer.gradient
count = 0
def deadly(self, batches):
    global count
    count += 1
    if count > {last if last == 2 else 1}:
        os._exit(9)
    return real(self, batches)
training.Trainer.gradient = deadly
from dataclasses import replace
from pathlib import Path
config = replace(script.PRESETS["test"], steps=6, eval_steps=(6,), save_every=1,
                 precision="float32", tokenizer={config.tokenizer!r},
                 codes_in={config.codes_in!r}, out=Path({str(out)!r}), resume=True)
script.main(config)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True,
                              text=True, env=os.environ | {"TQDM_DISABLE": "1"})
        assert done.returncode == 9, done.stderr
        assert read_log(out)[-1]["step"] == last
    again = script.main(replace(config, out=out, resume=True))
    losses = [[line["loss"] for line in read_log(tmp_path / name)]
              for name in ("whole", "cut")]
    assert losses[0] == losses[1]
    ours, theirs = (load(tmp_path / name).state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert again["metrics"]["val_loss"] == whole["metrics"]["val_loss"]


def test_the_cost_counts_each_stage(tmp_path):
    more = codes_of(tmp_path) | {"steps": 8, "eval_steps": (8,), "save_every": 0}
    flops = {level: script.main(replace(
        script.PRESETS["test"], level=level, out=tmp_path / str(level),
        **more))["cost"]["flops"] for level in (1, 2)}
    assert 0.55 < flops[2] / flops[1] < 0.75  # 0.625 of the tokens


# --- files of LlamaGen


def published_file(path, model, key="model", **more):
    """Weights in the form of `c2i_B_256.pt`."""
    theirs = {"tokens.": "tok_embeddings.", "head.": "output.",
              "class_embedding.": "cls_embedding.embedding_table.",
              "transformer.blocks.": "layers.", "attention.qkv.": "attention.wqkv.",
              "attention.proj.": "attention.wo.", "mlp.gate.": "feed_forward.w1.",
              "mlp.up.": "feed_forward.w3.", "mlp.down.": "feed_forward.w2.",
              "norm1.": "attention_norm.", "norm2.": "ffn_norm.",
              "transformer.norm.": "norm."}
    weights = {"freqs_cis": torch.zeros(H * H + 1, 4, 2)}
    for name, weight in model.state_dict().items():
        for ours, their in theirs.items():
            name = name.replace(ours, their)
        weights[name] = weight
    weights |= more.pop("weights", {})
    torch.save({key: weights, "args": Namespace(gpt_model="GPT-B")} | more, path)
    return path


SQUARE = replace(SMALL, width=H)


@pytest.mark.parametrize("key", ["model", "ema", "module", "state_dict"])
def test_a_published_file_gives_the_same_logits(tmp_path, key):
    model = large(SQUARE)
    read = NPP.from_llamagen(published_file(tmp_path / "c2i.pt", model, key), heads=2)
    assert read.config.classes == N
    assert read.config.height == read.config.width == H
    tokens = torch.randint(K, (2, 7), generator=seeded())
    labels = torch.tensor([1, N])
    assert_close(read(tokens, labels), model(tokens, labels), rtol=0, atol=0)


def test_heads_are_those_of_the_named_size():
    with torch.device("meta"):
        sizes = {name: shape["dim"] // shape["heads"] for name, shape in SIZES.items()}
    assert sizes["3B"] == 100
    assert all(sizes[name] == 64 for name in ("B", "L", "XL"))


@pytest.mark.parametrize(("weights", "message"), [
    ({"layers.0.extra.weight": torch.zeros(2)}, "another architecture"),
    ({"norm.weight": torch.zeros(7)}, "another architecture")])
def test_a_file_that_does_not_fit(tmp_path, weights, message):
    file = published_file(tmp_path / "c2i.pt", large(SQUARE), weights=weights)
    with pytest.raises(ValueError, match=message):
        NPP.from_llamagen(file, heads=2)


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="give the path of a model"):
        NPP.from_llamagen(tmp_path / "nowhere.pt")
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(ValueError, match="not a torch file of tensors"):
        NPP.from_llamagen(tmp_path / "text.pt")
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="no class-conditional model of LlamaGen"):
        NPP.from_llamagen(tmp_path / "other.pt")


# --- many images in a file


def by_number(numbers, generator):
    """Images that name their number, with noise of their batch's seed."""
    images = torch.rand(len(numbers), 3, 4, 4, generator=generator)
    images[:, 0, 0, 0] = numbers / 255
    return images


def test_an_archive_holds_exactly_what_was_asked_for(tmp_path):
    file = write_archive(tmp_path / "a.npz", 120, 4, 7, {"x": 1}, by_number)
    images = np.load(file)["arr_0"]
    assert images.shape == (120, 4, 4, 3)
    assert images.dtype == np.uint8
    assert images[:, 0, 0, 0].tolist() == list(range(120))
    assert not (tmp_path / "a.parts").exists()
    again = write_archive(tmp_path / "b.npz", 120, 4, 7, {"x": 1}, by_number)
    assert np.array_equal(np.load(again)["arr_0"], images)
    with pytest.raises(FileExistsError, match="choose another name"):
        write_archive(file, 120, 4, 7, {"x": 1}, by_number)


def test_an_archive_continues_after_a_kill(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "BATCH", 10)
    drawn = []

    def deadly(numbers, generator):
        drawn.append(numbers[0].item())
        if len(drawn) == 4:
            raise KeyboardInterrupt
        return by_number(numbers, generator)

    with pytest.raises(KeyboardInterrupt):
        write_archive(tmp_path / "a.npz", 95, 4, 0, {"x": 1}, deadly)
    assert read_json(tmp_path / "a.parts" / "about.json")["count"] == 95
    with pytest.raises(ValueError, match="begun with other settings: x"):
        write_archive(tmp_path / "a.npz", 95, 4, 0, {"x": 2}, deadly)
    write_archive(tmp_path / "a.npz", 95, 4, 0, {"x": 1}, deadly)
    assert drawn == [0, 10, 20, 30, 30, 40, 50, 60, 70, 80, 90]
    whole = write_archive(tmp_path / "b.npz", 95, 4, 0, {"x": 1}, by_number)
    assert np.array_equal(np.load(tmp_path / "a.npz")["arr_0"],
                          np.load(whole)["arr_0"])


def test_samples_of_a_run_in_an_archive(tmp_path):
    from minigen.__main__ import main

    config = replace(script.PRESETS["test"], out=tmp_path / "run", **codes_of(tmp_path))
    script.main(config)
    out = tmp_path / "samples.npz"
    main(["sample", str(config.out), "--count", "7", "--out", str(out)])
    images = np.load(out)["arr_0"]
    assert images.shape == (7, config.size, config.size, 3)
    with pytest.raises(ValueError, match="drawn from nothing: leave out --start half"):
        script.sample(str(config.out), script.SampleOptions(
            start="half", out=tmp_path / "half.npz"))


def test_processes_share_an_archive(tmp_path):
    code = """
import sys
from pathlib import Path
import torch
from minigen import archive
from minigen.__main__ import end_processes
archive.BATCH = 10
def draw(numbers, generator):
    return torch.rand(len(numbers), 3, 4, 4, generator=generator)
archive.write_archive(Path(sys.argv[1]), 95, 4, 3, {}, draw)
end_processes()
"""
    (tmp_path / "draw.py").write_text(code)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    for count in (1, 2):
        done = subprocess.run(
            [*launch, "--nproc-per-node", str(count), str(tmp_path / "draw.py"),
             str(tmp_path / f"{count}.npz")], capture_output=True, text=True,
            env=os.environ | {"TQDM_DISABLE": "1", "ACCELERATE_USE_CPU": "true"})
        assert done.returncode == 0, done.stderr
    one, two = (np.load(tmp_path / f"{count}.npz")["arr_0"] for count in (1, 2))
    assert len(one) == 95
    assert np.array_equal(one, two)
