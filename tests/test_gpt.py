"""The transformer, the sampler and the loop: equality with libraries and formulas.

What every model has to do, `test_models.py` tests.
"""

import cmath
import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import chisquare
from torch import Tensor, nn
from torch.testing import assert_close

from minigen.gpt import GPT, GPTConfig, read_nanogpt
from minigen.sampling import (
    Guidance,
    autoregress,
    filter_logits,
    last,
    sample,
    sample_categorical,
    start_canvas,
)
from minigen.transformer import (
    Attention,
    Block,
    Positions,
    SwiGLU,
    Transformer,
    TransformerConfig,
    attend,
    check_choices,
    check_indices,
    make_norm,
    rope_table,
    rotate,
    unwrap,
)

SMALL = GPTConfig(vocab_size=50, block_size=24, depth=3, heads=2, dim=16)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def tokens(batch=3, length=24, vocab=50):
    return torch.randint(vocab, (batch, length), generator=seeded(1))


def sharpen(module):
    """Large weights, so that errors are not hidden by nearly uniform outputs."""
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    return module.eval()


# --- the transformer


def test_attention_equals_multihead_attention():
    ours = Attention(TransformerConfig(dim=16, heads=4, bias=True))
    theirs = nn.MultiheadAttention(16, 4, batch_first=True)
    theirs.load_state_dict({
        "in_proj_weight": ours.qkv.weight, "in_proj_bias": ours.qkv.bias,
        "out_proj.weight": ours.proj.weight, "out_proj.bias": ours.proj.bias})
    x = torch.randn(3, 9, 16)
    causal = nn.Transformer.generate_square_subsequent_mask(9)
    assert_close(ours(x), theirs(x, x, x, attn_mask=causal, need_weights=False)[0])
    ours.causal = False
    assert_close(ours(x), theirs(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("causal", [True, False])
def test_a_mask_says_what_is_attended_to(causal):
    ours = Attention(TransformerConfig(dim=16, heads=2), causal)
    x, mask = torch.randn(3, 9, 16), torch.rand(3, 1, 9, 9, generator=seeded()) < 0.5
    mask |= torch.eye(9, dtype=torch.bool)
    q, k, v = ours.qkv(x).view(3, 9, 3, 2, 8).permute(2, 0, 3, 1, 4)
    scores = (q @ k.mT / 8**0.5).masked_fill(~mask, -torch.inf)
    y = ours.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    assert_close(ours(x, mask=mask), y)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_trains_in_float32_on_a_cpu(causal):
    half = [torch.randn(2, 3, 8, 4).bfloat16().requires_grad_() for _ in range(3)]
    single = [x.detach().float().requires_grad_() for x in half]
    expected = F.scaled_dot_product_attention(*single, is_causal=causal)
    with torch.autocast("cpu", torch.bfloat16):
        y = attend(*half, is_causal=causal)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected.bfloat16()), "rounded at the end, and not before"
    y.sum().backward()
    expected.bfloat16().sum().backward()
    for ours, theirs in zip(half, single, strict=True):
        assert torch.equal(ours.grad, theirs.grad.bfloat16())


def test_block_equals_transformer_encoder_layer():
    ours = Block(TransformerConfig(dim=16, heads=4, bias=True))
    theirs = nn.TransformerEncoderLayer(16, 4, 64, dropout=0.0, activation="gelu",
                                        batch_first=True, norm_first=True)
    names = {"self_attn.in_proj_": "attention.qkv.", "linear1.": "mlp.up.",
             "self_attn.out_proj.": "attention.proj.", "linear2.": "mlp.down."}
    weights = {}
    for name in theirs.state_dict():
        own = name
        for a, b in names.items():
            own = own.replace(a, b)
        weights[name] = nn.init.normal_(ours.get_parameter(own))
    theirs.load_state_dict(weights)
    x, mask = torch.randn(3, 9, 16), nn.Transformer.generate_square_subsequent_mask(9)
    assert_close(ours(x), theirs(x, src_mask=mask, is_causal=True))


def test_published_size():
    # nanoGPT counts all parameters but the positions: about 1.3M, says the page
    model = GPT(GPTConfig())
    positions = model.transformer.positions.table.numel()
    assert 1.25e6 < sum(p.numel() for p in model.parameters()) - positions < 1.35e6


def test_rowcol_positions_are_shared_along_rows_and_columns():
    config = TransformerConfig(dim=16, positions="rowcol")
    positions = Positions(config, 22, 6)
    p = positions(0, 22)  # the last row is not full
    assert_close(positions(7, 9), p[7:9])
    assert_close(p[15] - p[13], p[9] - p[7])  # a step of two columns, in two rows
    assert_close(p[20] - p[8], p[18] - p[6])  # a step of two rows, in two columns
    assert len(p.unique(dim=0)) == 22


@pytest.mark.parametrize(("dim", "hidden"), [(768, 2048), (1024, 2816), (1280, 3584)])
def test_swiglu_is_as_wide_as_that_of_llamagen(dim, hidden):
    with torch.device("meta"):
        mlp = SwiGLU(TransformerConfig(dim=dim, heads=4))
    assert mlp.gate.weight.shape == mlp.up.weight.shape == (hidden, dim)


def test_norms_are_the_formulas():
    x = torch.randn(3, 16) / 100  # so small that the 1e-5 in the root counts
    config = TransformerConfig(dim=16, norm="rms")
    assert_close(make_norm(config)(x), x / (x.square().mean(-1, True) + 1e-5).sqrt())
    x, config = x + 1, TransformerConfig(dim=16)
    assert_close(make_norm(config)(x), F.layer_norm(x, (16,)))


def test_swiglu_is_the_formula():
    mlp = SwiGLU(TransformerConfig(dim=8, heads=2, mlp_multiple=4))
    x = torch.randn(3, 8)
    gate, up = x @ mlp.gate.weight.T, x @ mlp.up.weight.T
    assert_close(mlp(x), (gate * gate.sigmoid() * up) @ mlp.down.weight.T)


def test_rotary_positions_are_those_of_llamagen():
    """Pair j of a head turns by the angle 10000^(-2j/half) a row, or a column."""
    rows, columns, prefix, dim = 3, 4, 2, 8
    half, pairs = dim // 2, dim // 4
    x = torch.randn(2, 3, prefix + rows * columns, dim, dtype=torch.float64)
    expected = torch.zeros_like(x)  # of the prefix nothing is left
    for row, column, j in product(range(rows), range(columns), range(2 * pairs)):
        angle = (row if j < pairs else column) * 10_000 ** (-2 * (j % pairs) / half)
        t = prefix + row * columns + column
        pair = torch.view_as_complex(x[..., t, 2 * j : 2 * j + 2].contiguous())
        turned = torch.view_as_real(pair * cmath.exp(1j * angle))
        expected[..., t, 2 * j : 2 * j + 2] = turned
    table = rope_table(rows, columns, dim, prefix)
    assert table.shape == (prefix + rows * columns, half, 2)
    assert_close(rotate(x, table), expected, rtol=1e-5, atol=1e-5)
    assert rotate(x.bfloat16(), table).dtype == torch.bfloat16


OPTIONS = [("layer", False), ("layer", True), ("rms", False)]


@pytest.mark.parametrize(("norm", "bias"), OPTIONS, ids=str)
@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
@pytest.mark.parametrize("positions", ["learned", "rowcol", "rope2d", "none"])
def test_unwrapped_equals_the_module(norm, bias, mlp, positions):
    config = TransformerConfig(depth=2, heads=2, dim=16, norm=norm, bias=bias, mlp=mlp,
                               mlp_multiple=8, positions=positions)
    model = sharpen(Transformer(config, 13, columns=4, prefix=1))
    plain, x = unwrap(model), torch.randn(3, 13, 16)
    whole = model(x)
    assert_close(plain(x), whole)
    cache = model.cache(3)
    pieces = [plain(piece, cache) for piece in x.split([5, 1, 1, 4, 2], dim=1)]
    assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        model.blocks[0].mlp.down.weight.mul_(2)
    assert_close(plain(x), model(x))  # the weights are shared
    assert not torch.allclose(plain(x), whole)


# --- the sampler


def test_top_k_keeps_the_largest_and_leaves_its_input():
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0], [5.0, 4.0, 4.0, 4.0]])
    before = logits.clone()
    kept = filter_logits(logits, top_k=2).isfinite()
    assert kept.tolist() == [[False, True, True, False], [True] * 4]  # ties stay
    assert torch.equal(logits, before)
    assert torch.equal(filter_logits(logits, top_k=2048), logits)


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.62, 0.9, 1.0])
def test_top_p_is_the_smallest_sufficient_set(top_p):
    logits = torch.randn(20, 30, generator=seeded())
    found = filter_logits(logits, top_p=top_p).isfinite()
    for row, kept in zip(logits.softmax(-1), found, strict=True):
        order = row.argsort(descending=True)
        count = 1 + (row[order].cumsum(0) < top_p).sum().item() if top_p < 1 else 30
        assert sorted(order[:count].tolist()) == kept.nonzero()[:, 0].tolist()


@pytest.mark.parametrize(("cpu", "vocab", "bins"), [
    (True, 6, 6), (True, 4096, 64), (False, 6, 6)])
def test_draws_in_proportion(monkeypatch, cpu, vocab, bins):
    if not cpu:  # take the way of other devices, on this one
        monkeypatch.setattr(Tensor, "is_cpu", False)
    p = torch.rand(vocab, generator=seeded()) ** 2
    p[::5] = 0
    random = seeded()
    drawn = [sample_categorical(p.expand(500, -1), random) for _ in range(100)]
    counts = torch.cat(drawn).bincount(minlength=vocab)
    assert counts[p == 0].sum() == 0
    expected = (p.double() / p.double().sum() * counts.sum()).view(bins, -1).sum(1)
    counts = counts.view(bins, -1).sum(1)[expected > 0]
    assert chisquare(counts.numpy(), expected[expected > 0].numpy()).pvalue > 0.001


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-24])
def test_never_draws_what_has_no_probability(monkeypatch, uniform):
    """Not even if the random number is the smallest there is, or the largest."""
    monkeypatch.setattr(torch, "rand", lambda *n, generator: torch.full(n, uniform))
    p = torch.zeros(3, 4096)
    p[0, 7] = 1.0  # the cumulative sum is flat before and behind
    p[1, [3, 9]] = 0.5
    p[2, 5:4000] = 1e-3
    drawn = sample_categorical(p)
    assert (p.gather(1, drawn[:, None]) > 0).all()
    if uniform == 0:
        assert drawn.tolist() == [7, 3, 5]


def test_temperature():
    logits = torch.randn(1, 40, generator=seeded()).expand(4000, -1)
    entropy = []
    for t in (0.3, 1.0, 3.0):
        share = sample(logits, t, generator=seeded(1)).bincount(minlength=40) / 4000
        entropy.append(torch.special.entr(share).sum().item())
    assert entropy[0] < entropy[1] < entropy[2]
    assert (sample(logits, 0) == logits.argmax(-1)).all()


# --- guidance


def test_schedules_of_guidance():
    def at(*options):
        return [Guidance(*options).at(n, 5) for n in range(5)]

    cosine = [1 + (1 - math.cos(math.pi * (n / 4) ** 2)) for n in range(5)]
    assert at() == [1.0] * 5
    assert at(2.5) == [2.5] * 5
    assert at(3.0, "linear") == pytest.approx([1, 1.5, 2, 2.5, 3])
    assert at(3.0, "cosine", 2.0) == pytest.approx(cosine)
    assert at(0.0, "linear") == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert Guidance(3.0, "linear").at(0, 1) == 1.0
    assert Guidance(3.0).at(0, 1) == 3.0


def test_guidance_is_the_formula():
    outputs = torch.randn(6, 4, 7)
    before, (conditional, unconditional) = outputs.clone(), outputs.split(3)
    for scale in (0.0, 0.5, 1.0, 3.0):
        guided = Guidance(scale, "linear").combine(outputs, 1, 3)
        now = 1 + (scale - 1) / 2
        assert_close(guided, now * conditional + (1 - now) * unconditional)
    assert torch.equal(outputs, before)


def test_guidance_makes_the_class_more_likely():
    """Bayes: what is multiplied is the probability of the class given the token."""
    outputs, log_p = torch.randn(2, 20), []
    conditional, unconditional = outputs.log_softmax(-1)
    for scale in (0.0, 1.0, 2.0, 4.0):
        guided = Guidance(scale).combine(outputs, 0, 9)[0].softmax(-1)
        log_p.append((guided * (conditional - unconditional)).sum().item())
    assert log_p == sorted(log_p)
    assert log_p[0] < 0 < log_p[1]


# --- the loop


def test_start_canvas():
    canvas, given = start_canvas(2, 5, (3,), torch.float32)
    assert given == 0
    assert torch.equal(canvas, torch.zeros(2, 5, 3))
    prompt = torch.arange(1, 7).view(2, 3)
    for equal in (prompt, prompt.int(), list(prompt)):
        canvas, given = start_canvas(equal, 5)
        assert given == 3
        assert torch.equal(canvas, F.pad(prompt, (0, 2)))
    canvas, given = start_canvas([prompt[0], prompt[1, :1], prompt[0, :0]], 5)
    assert given == [3, 1, 0]
    assert canvas.tolist() == [[1, 2, 3, 0, 0], [4, 0, 0, 0, 0], [0] * 5]


class Walk(nn.Module):
    """Points (2,) that follow a start vector: the least that the loop can run."""

    def __init__(self, dropout=0.0):
        super().__init__()
        config = TransformerConfig(depth=2, heads=2, dim=16, dropout=dropout)
        self.transformer, self.read = Transformer(config, 8), []
        self.start, self.up = nn.Parameter(torch.ones(1, 16)), nn.Linear(2, 16)
        self.head = nn.Linear(16, 2)
        sharpen(self)

    def inputs(self, canvas, guided, start=0, stop=None):
        x = self.start.expand(len(canvas), 1, -1)
        x = torch.cat([x, self.up(canvas)], dim=1)[:, start:stop]
        return torch.cat([x, -x]) if guided else x

    def stream(self, prompt, guidance=None, use_cache=True):
        canvas, given = start_canvas(prompt, 8, (2,), torch.float32)

        def embed(start, stop):
            self.read.append((start, stop))
            return self.inputs(canvas, guidance is not None, start, stop)

        return autoregress(self, canvas, given, embed=embed, head=self.head,
                           choose=lambda outputs, position: outputs + position,
                           guidance=guidance, use_cache=use_cache)


@pytest.mark.parametrize("guidance", [None, Guidance(2.0, "linear")])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("prompt", [3, torch.randn(2, 4, 2)], ids=["none", "some"])
def test_each_part_follows_from_those_before(guidance, use_cache, prompt):
    model, given = Walk(), 0 if isinstance(prompt, int) else 4
    made = last(model.stream(prompt, guidance, use_cache))
    outputs = model.head(model.transformer(model.inputs(made[:, :-1], guidance)))
    for n in range(given, 8):
        now = outputs[:, n]
        if guidance is not None:
            with_it, without = now.chunk(2)
            now = without + (1 + n / 7) * (with_it - without)
        assert_close(made[:, n], now + n, rtol=1e-3, atol=1e-3)
    ends = range(given + 1, 9)
    steps = [(n - 1 if use_cache and n > given + 1 else 0, n) for n in ends]
    assert model.read == steps  # with the cache, each input is read once


@pytest.mark.parametrize("guidance", [None, Guidance(2.0, "linear")])
@pytest.mark.parametrize("use_cache", [True, False])
def test_ragged_prompts_equal_each_by_itself(guidance, use_cache):
    model, points = Walk(), torch.randn(4, 7, 2)
    rows = [row[:n] for row, n in zip(points, (3, 0, 7, 1), strict=True)]
    made = last(model.stream(rows, guidance, use_cache))
    alone = [last(model.stream(row[None], guidance)) for row in rows]
    assert_close(made, torch.cat(alone), rtol=1e-3, atol=1e-3)
    for row, found in zip(rows, made, strict=True):
        assert torch.equal(found[: len(row)], row)


@pytest.mark.parametrize("use_cache", [True, False])
def test_dropout_is_off_in_the_loop_and_on_again_after_it(use_cache):
    model = Walk(dropout=0.5)
    expected = last(model.stream(2, use_cache=use_cache))
    assert not model.training
    model.train()
    assert torch.equal(last(model.stream(2, use_cache=use_cache)), expected)
    assert model.training
    for _ in model.stream(2, use_cache=use_cache):
        assert not model.training
        break  # who stops early
    assert model.training
    with pytest.raises(RuntimeError, match="consumer"):  # noqa: PT012
        for _ in model.stream(2, use_cache=use_cache):
            raise RuntimeError("of the consumer")
    assert model.training
    assert model.transformer.blocks[1].mlp.training


# --- nanoGPT's format


def nanogpt_weights(depth, dim, vocab, block, bias):
    """Random weights under the names that nanoGPT saves them by."""
    shapes = {"wte": (vocab, dim), "wpe": (block, dim), "ln_f": (dim,)}
    for i in range(depth):
        shapes |= {f"h.{i}.{name}": shape for name, shape in {
            "ln_1": (dim,), "attn.c_attn": (3 * dim, dim), "attn.c_proj": (dim, dim),
            "ln_2": (dim,), "mlp.c_fc": (4 * dim, dim), "mlp.c_proj": (dim, 4 * dim),
        }.items()}
    w, random = {}, seeded()
    for name, shape in shapes.items():
        weight = torch.randn(*shape, generator=random) / 5
        w[f"transformer.{name}.weight"] = weight + ("ln_" in name)
        if bias and name not in ("wte", "wpe"):
            w[f"transformer.{name}.bias"] = torch.randn(shape[0], generator=random) / 5
    return w | {"lm_head.weight": w["transformer.wte.weight"]}


def nanogpt_logits(w, tokens, depth, heads):
    """nanoGPT's forward pass, written out on its own names, without a word of ours."""

    def linear(x, name):
        return x @ w[name + ".weight"].T + w.get(name + ".bias", 0)

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * w[name + ".weight"] + w.get(name + ".bias", 0)

    B, T = tokens.shape
    future = torch.ones(T, T).triu(1).bool()
    x = w["transformer.wte.weight"][tokens] + w["transformer.wpe.weight"][:T]
    for i in range(depth):
        h = f"transformer.h.{i}."
        qkv = linear(norm(x, h + "ln_1"), h + "attn.c_attn").split(x.shape[-1], dim=2)
        q, k, v = (t.view(B, T, heads, -1).transpose(1, 2) for t in qkv)
        a = (q @ k.mT / k.shape[-1] ** 0.5).masked_fill(future, -torch.inf).softmax(-1)
        x = x + linear((a @ v).transpose(1, 2).reshape(B, T, -1), h + "attn.c_proj")
        y = linear(norm(x, h + "ln_2"), h + "mlp.c_fc")
        x = x + linear(y * 0.5 * (1 + torch.erf(y / 2**0.5)), h + "mlp.c_proj")
    return norm(x, "transformer.ln_f") @ w["lm_head.weight"].T


ARGS = {"n_layer": 2, "n_head": 3, "n_embd": 24, "block_size": 30, "vocab_size": 60}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_reads_nanogpt_checkpoints(tmp_path, bias, prefix):
    w = nanogpt_weights(depth=2, dim=24, vocab=60, block=30, bias=bias)
    old = {"transformer.h.0.attn.bias": torch.ones(1, 1, 30, 30)}  # PyTorch 1's mask
    torch.save({"model": {prefix + k: v for k, v in (w | old).items()},
                "model_args": ARGS | {"bias": bias, "dropout": 0.1}, "iter_num": 6000,
                "optimizer": {"state": {}}, "best_val_loss": torch.tensor(1.5),
                "config": {"out_dir": "out"}}, tmp_path / "ckpt.pt")
    model, a = read_nanogpt(tmp_path / "ckpt.pt").eval(), tokens(3, 30, 60)
    assert model.config.dropout == 0.1
    assert_close(model(a), nanogpt_logits(w, a, 2, 3), rtol=1e-4, atol=1e-4)


def test_nanogpt_checkpoint_with_a_part_missing(tmp_path):
    w = nanogpt_weights(2, 24, 60, 30, True)
    torch.save({"weights": w}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"no \['model', 'model_args'\], .*'weights'"):
        read_nanogpt(tmp_path / "a.pt")
    del w["transformer.h.1.mlp.c_fc.weight"]
    torch.save({"model": w, "model_args": ARGS}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"blocks.1.mlp.up.weight"):
        read_nanogpt(tmp_path / "b.pt")


class Malicious:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code in a checkpoint was run')",))


def test_nothing_in_a_checkpoint_is_run(tmp_path):
    bad = {"model": {}, "model_args": {}, "config": Malicious()}
    torch.save(bad, tmp_path / "bad.pt")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        read_nanogpt(tmp_path / "bad.pt")


# --- bad input


@pytest.mark.parametrize(("make", "message"), [
    (lambda: GPTConfig(dim=30, heads=4), r"30 cannot be split among 4.*\[1, 2, 3\]"),
    (lambda: GPTConfig(norm="batch"), "norm must be one of layer, rms, found 'batch'"),
    (lambda: check_choices(Guidance(schedule="late")), "linear, cosine, found 'late'"),
    (lambda: Guidance(-1.0), "scale of at least 0 .* found scale=-1.0"),
    (lambda: Guidance(math.nan), "found scale=nan"),
    (lambda: Guidance(2.0, "cosine", 0.0), "power=0.0"),
    (lambda: Transformer(TransformerConfig(positions="rope2d"), 9), "how many columns"),
    (lambda: rope_table(2, 2, 6), "multiple of 4 numbers, found 6"),
    (lambda: GPT(SMALL)(tokens(1, 25)), "25 does not fit.*24"),
    (lambda: (model := GPT(SMALL))(tokens(1, 6), model.transformer.cache(1, 4)),
     "6 does not fit into a cache of 4"),
    (lambda: GPT(SMALL).generate(tokens(1, 1), 25), "1 given and 25 new.*at most 24"),
    (lambda: GPT(SMALL).generate(tokens(1, 0), 3), "the prompt is empty"),
    (lambda: GPT(SMALL).generate([], 3), "the prompt is empty"),
    (lambda: filter_logits(torch.zeros(1, 4), top_p=0.0), "found 0.0"),
    (lambda: start_canvas(0, 4), "at least one sequence, found 0"),
    (lambda: start_canvas([], 4), "at least one sequence"),
    (lambda: start_canvas(torch.rand(2, 1), 4), "type torch.int64, found .*float32"),
    (lambda: start_canvas(torch.rand(2, 1, 1), 4, (3,), torch.float32), "shape .3,."),
    (lambda: start_canvas(tokens(2, 4), 4), "4 leaves nothing .* at most 3"),
    (lambda: check_indices(torch.arange(10), 9, "tokens"), "tokens lie .* 8, found 9"),
    (lambda: check_indices(torch.tensor([3, -2]), 9, "labels"), "0 to 8, found -2"),
])
def test_bad_input_is_a_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_just_fits_passes():
    assert GPT(SMALL).generate(tokens(2, 1), 24).shape == (2, 25)
    check_indices(torch.arange(9), 9, "tokens")
    check_indices(torch.zeros(0, dtype=torch.int64), 9, "tokens")
