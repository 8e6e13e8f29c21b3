"""The transformer, its cache and its sampler: properties, and equality with libraries and with nanoGPT's format."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import chisquare
from torch import nn
from torch.testing import assert_close

from minigen.gpt import GPT, Block, CausalSelfAttention, GPTConfig, draw, filter_logits, sample

SMALL = GPTConfig(vocab_size=50, block_size=24, depth=3, heads=2, dim=16)
ROWCOL = GPTConfig(vocab_size=50, block_size=24, depth=3, heads=2, dim=16, row_length=6)


@pytest.fixture(params=[SMALL, ROWCOL], ids=["learned", "rowcol"])
def model(request):
    torch.manual_seed(0)
    model = GPT(request.param).eval()
    for p in model.parameters():  # large weights, so that errors are not hidden by almost uniform outputs
        nn.init.normal_(p, std=0.3) if p.ndim == 2 else None
    return model


def tokens(batch=3, length=24, vocab=50):
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(1))


def test_logits_have_one_shape(model):
    assert model(tokens(3, 1)).shape == (3, 1, 50)
    assert model.train()(tokens(2, 24)).shape == (2, 24, 50)


@pytest.mark.parametrize("place", [0, 7, 23])
def test_nothing_before_a_changed_token_changes(model, place):
    a = tokens()
    b = a.clone()
    b[:, place] = (b[:, place] + 1) % 50
    assert_close(model(a)[:, :place], model(b)[:, :place], rtol=0, atol=0)
    assert (model(a)[:, place:] != model(b)[:, place:]).any(dim=-1).all(), "what follows must change"


def test_pictures_of_a_batch_do_not_see_each_other(model):
    a = tokens()
    assert_close(model(a)[1:2], model(a[1:2]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pieces", [[1] * 24, [10, 1, 13], [5, 5, 14], [24]])
def test_cached_logits_equal_uncached(model, pieces):
    a, cache = tokens(), model.cache(3)
    cached = torch.cat([model(part, cache) for part in a.split(pieces, dim=1)], dim=1)
    assert_close(cached, model(a), rtol=1e-4, atol=1e-5)
    assert cache.filled == 24


@pytest.mark.parametrize("bias", [True, False])
def test_decoding_one_token_equals_the_model(model, bias):
    if bias:
        torch.manual_seed(1)
        model = GPT(replace(model.config, bias=True)).eval()
        for p in model.parameters():
            nn.init.normal_(p, std=0.3)
    a, cache = tokens(), model.cache(3)
    model.hidden(a[:, :5], cache)  # the prompt in one go, the rest one by one
    decoded = torch.stack([model.transform_one(model.tokens(token), cache) for token in a[:, 5:].unbind(1)], dim=1)
    assert_close(decoded, model.hidden(a)[:, 5:], rtol=1e-4, atol=1e-5)
    assert cache.filled == 24


def test_attention_equals_multihead_attention():
    ours = CausalSelfAttention(GPTConfig(dim=16, heads=4, bias=True))
    theirs = nn.MultiheadAttention(16, 4, batch_first=True)
    theirs.load_state_dict({"in_proj_weight": ours.qkv.weight, "in_proj_bias": ours.qkv.bias,
                            "out_proj.weight": ours.proj.weight, "out_proj.bias": ours.proj.bias})
    x = torch.randn(3, 9, 16)
    mask = nn.Transformer.generate_square_subsequent_mask(9)
    assert_close(ours(x), theirs(x, x, x, attn_mask=mask, need_weights=False)[0])


def test_block_equals_transformer_encoder_layer():
    ours = Block(GPTConfig(dim=16, heads=4, bias=True))
    theirs = nn.TransformerEncoderLayer(16, 4, 64, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
    a, m = ours.attention, ours.mlp
    theirs.load_state_dict({
        "self_attn.in_proj_weight": a.qkv.weight, "self_attn.in_proj_bias": a.qkv.bias,
        "self_attn.out_proj.weight": a.proj.weight, "self_attn.out_proj.bias": a.proj.bias,
        "linear1.weight": m[0].weight, "linear1.bias": m[0].bias, "linear2.weight": m[2].weight, "linear2.bias": m[2].bias,
        "norm1.weight": ours.norm1.weight, "norm1.bias": ours.norm1.bias,
        "norm2.weight": ours.norm2.weight, "norm2.bias": ours.norm2.bias,
    })
    x = torch.randn(3, 9, 16)
    assert_close(ours(x), theirs(x, src_mask=nn.Transformer.generate_square_subsequent_mask(9), is_causal=True))


def test_published_size():
    # nanoGPT counts all parameters but the positions: the published model has about 1.3M
    model = GPT(GPTConfig())
    count = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("positions"))
    assert 1.25e6 < count < 1.35e6


def test_starts_out_knowing_nothing():
    torch.manual_seed(0)
    a = tokens(8)
    loss = F.cross_entropy(GPT(SMALL)(a[:, :-1]).flatten(0, 1), a[:, 1:].flatten())
    assert abs(loss.item() - math.log(50)) < 0.1


@pytest.mark.parametrize("config", [SMALL, ROWCOL], ids=["learned", "rowcol"])
def test_one_batch_can_be_overfitted(config):
    torch.manual_seed(0)
    model, a = GPT(config), tokens(4)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(120):
        loss = F.cross_entropy(model(a[:, :-1]).flatten(0, 1), a[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 5}, {"top_p": 0.8}, {"temperature": 0}])
@pytest.mark.parametrize("start", [1, 12])
def test_cache_draws_the_same_tokens(model, options, start):
    def generate(use_cache):
        generator = torch.Generator().manual_seed(3)
        return model.generate(tokens(4, start), 25 - start, generator=generator, use_cache=use_cache, **options)

    drawn = generate(True)
    assert drawn.shape == (4, 25)
    assert torch.equal(drawn, generate(False))
    assert torch.equal(drawn[:, :start], tokens(4, start))


def test_same_generator_same_tokens(model):
    def generate(seed):
        return model.generate(tokens(2, 1), 20, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(generate(0), generate(0))
    assert not torch.equal(generate(0), generate(1))


def test_stream_grows_by_one_and_ends_as_generate(model):
    lengths = []
    for partial in model.stream(tokens(2, 3), 10, generator=torch.Generator().manual_seed(0)):
        lengths.append(partial.shape[1])
    assert lengths == list(range(4, 14))
    assert torch.equal(partial, model.generate(tokens(2, 3), 10, generator=torch.Generator().manual_seed(0)))


def test_generating_leaves_the_mode_and_the_weights(model):
    model.train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.generate(tokens(2, 1), 5)
    next(model.stream(tokens(2, 1), 5))
    assert model.training
    assert_close(dict(model.named_parameters()), before)
    out = model.generate(tokens(2, 1), 5)
    model(out).sum().backward()  # what generate returns can be trained on


def test_batch_rows_do_not_depend_on_each_other(model):
    greedy = model.generate(tokens(4, 2), 10, temperature=0)
    alone = torch.cat([model.generate(row[None], 10, temperature=0) for row in tokens(4, 2)])
    assert torch.equal(greedy, alone)


# --- the sampler


def test_top_k_keeps_the_largest_and_leaves_its_input():
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0], [5.0, 4.0, 4.0, 4.0]])
    before = logits.clone()
    kept = filter_logits(logits, top_k=2).isfinite()
    assert kept.tolist() == [[False, True, True, False], [True, True, True, True]]  # equals of the k-th stay
    assert torch.equal(logits, before)
    assert torch.equal(filter_logits(logits, top_k=2048), logits)


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.62, 0.9, 1.0])
def test_top_p_is_the_smallest_sufficient_set(top_p):
    logits = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    for row, kept in zip(logits.softmax(-1), filter_logits(logits, top_p=top_p).isfinite()):
        mass, best = 0.0, []
        for i in row.argsort(descending=True):
            best.append(i.item())
            mass += row[i].item()
            if mass >= top_p:
                break
        if top_p < 1:
            assert sorted(best) == kept.nonzero()[:, 0].tolist()
        else:
            assert kept.all()


@pytest.mark.parametrize("vocab, bins", [(6, 6), (4096, 64)])
def test_draws_in_proportion(vocab, bins):
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(vocab, generator=generator) ** 2
    p[::5] = 0
    drawn = torch.cat([draw(p.expand(1000, -1), generator) for _ in range(200)])
    counts = drawn.bincount(minlength=vocab)
    assert counts[p == 0].sum() == 0
    expected = (p.double() / p.double().sum() * len(drawn)).view(bins, -1).sum(1)
    counts, expected = counts.view(bins, -1).sum(1)[expected > 0], expected[expected > 0]
    assert chisquare(counts.numpy(), expected.numpy()).pvalue > 0.001


def test_never_draws_what_has_no_probability():
    p = torch.zeros(1000, 6)
    p[:, 2] = 1e-30
    p[:, 3] = 1.0
    assert draw(p).unique().tolist() == [3]
    edge = torch.zeros(5000, 3)
    edge[:, 0] = 1.0  # the cumulative sum is flat behind the first
    assert draw(edge).max() == 0


def test_temperature():
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(0)).expand(4000, -1)
    entropy = []
    for t in (0.3, 1.0, 3.0):
        drawn = sample(logits, t, generator=torch.Generator().manual_seed(1)).bincount(minlength=40) / 4000
        entropy.append(torch.special.entr(drawn).sum().item())
    assert entropy[0] < entropy[1] < entropy[2]
    assert (sample(logits, 0) == logits.argmax(-1)).all()


# --- nanoGPT's format


def nanogpt_weights(depth, dim, vocab, block, bias):
    """Random weights under nanoGPT's names, as its `torch.save(checkpoint)` writes them."""
    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=g) * 0.2

    w = {"transformer.wte.weight": randn(vocab, dim), "transformer.wpe.weight": randn(block, dim)}
    for i in range(depth):
        h = f"transformer.h.{i}."
        shapes = {"attn.c_attn": (3 * dim, dim), "attn.c_proj": (dim, dim), "mlp.c_fc": (4 * dim, dim), "mlp.c_proj": (dim, 4 * dim)}
        for name, shape in shapes.items():
            w[h + name + ".weight"] = randn(*shape)
            if bias:
                w[h + name + ".bias"] = randn(shape[0])
        for name in ("ln_1", "ln_2"):
            w[h + name + ".weight"] = 1 + randn(dim)
            if bias:
                w[h + name + ".bias"] = randn(dim)
    w["transformer.ln_f.weight"] = 1 + randn(dim)
    if bias:
        w["transformer.ln_f.bias"] = randn(dim)
    w["lm_head.weight"] = w["transformer.wte.weight"]
    return w


def nanogpt_logits(w, tokens, depth, heads):
    """nanoGPT's forward pass, written out on its own names, without a word of ours."""

    def linear(x, name):
        return x @ w[name + ".weight"].T + w.get(name + ".bias", 0)

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return x * w[name + ".weight"] + w.get(name + ".bias", 0)

    B, T = tokens.shape
    x = w["transformer.wte.weight"][tokens] + w["transformer.wpe.weight"][:T]
    for i in range(depth):
        h = f"transformer.h.{i}."
        q, k, v = linear(norm(x, h + "ln_1"), h + "attn.c_attn").split(x.shape[-1], dim=2)
        q, k, v = (t.view(B, T, heads, -1).transpose(1, 2) for t in (q, k, v))
        a = (q @ k.transpose(-2, -1) / k.shape[-1] ** 0.5).masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
        x = x + linear((a.softmax(-1) @ v).transpose(1, 2).reshape(B, T, -1), h + "attn.c_proj")
        y = linear(norm(x, h + "ln_2"), h + "mlp.c_fc")
        x = x + linear(y * 0.5 * (1 + torch.erf(y / 2**0.5)), h + "mlp.c_proj")
    return norm(x, "transformer.ln_f") @ w["lm_head.weight"].T


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_reads_nanogpt_checkpoints(tmp_path, bias, prefix):
    w = nanogpt_weights(depth=2, dim=24, vocab=60, block=30, bias=bias)
    args = {"n_layer": 2, "n_head": 3, "n_embd": 24, "block_size": 30, "bias": bias, "vocab_size": 60, "dropout": 0.1}
    torch.save({"model": {prefix + k: v for k, v in w.items()}, "model_args": args, "optimizer": {"state": {}},
                "iter_num": 6000, "best_val_loss": torch.tensor(1.5), "config": {"out_dir": "out"}}, tmp_path / "ckpt.pt")
    model = GPT.from_nanogpt(tmp_path / "ckpt.pt").eval()
    a = tokens(3, 30, 60)
    assert_close(model(a), nanogpt_logits(w, a, 2, 3), rtol=1e-4, atol=1e-4)


def test_nanogpt_checkpoint_with_a_part_missing(tmp_path):
    args = {"n_layer": 2, "n_head": 3, "n_embd": 24, "block_size": 30, "bias": True, "vocab_size": 60}
    w = nanogpt_weights(2, 24, 60, 30, True)
    torch.save({"weights": w}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="no .*model.*among.*weights"):
        GPT.from_nanogpt(tmp_path / "a.pt")
    del w["transformer.h.1.mlp.c_fc.weight"]
    torch.save({"model": w, "model_args": args}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match="blocks.1.mlp.0.weight"):
        GPT.from_nanogpt(tmp_path / "b.pt")


class Malicious:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code in a checkpoint was run')",))


def test_nothing_in_a_checkpoint_is_run(tmp_path):
    torch.save({"model": {}, "model_args": {}, "config": Malicious()}, tmp_path / "bad.pt")
    with pytest.raises(Exception, match="[Ww]eights.only"):
        GPT.from_nanogpt(tmp_path / "bad.pt")


@pytest.mark.parametrize("config", [SMALL, ROWCOL], ids=["learned", "rowcol"])
def test_save_and_load(tmp_path, config):
    model = GPT(config).eval()
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin")) + list(tmp_path.glob("*.pt"))
    loaded = GPT.from_pretrained(tmp_path).eval()
    assert loaded.config == config
    assert_close(loaded(tokens()), model(tokens()), rtol=0, atol=0)


# --- bad input


@pytest.mark.parametrize("make, message", [
    (lambda: GPTConfig(dim=30, heads=4), "30 cannot be shared by 4 heads.*3"),
    (lambda: GPT(SMALL)(tokens(1, 25)), "25 does not fit.*24"),
    (lambda: GPT(SMALL).generate(tokens(1, 1), 30), "1 given and 30 new.*24.*at most 24"),
    (lambda: GPT(SMALL).generate(tokens(1, 0), 3), "empty"),
    (lambda: GPT(SMALL).generate(tokens(1, 1), 3, temperature=-1), "negative, found -1"),
    (lambda: filter_logits(torch.zeros(1, 4), top_k=0), "at least 1, found 0"),
    (lambda: filter_logits(torch.zeros(1, 4), top_p=1.5), "found 1.5"),
])
def test_bad_input_is_a_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()
