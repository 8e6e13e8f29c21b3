"""Chapter 9: one vocabulary, sequences in all orders, and a grammar that holds."""

import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.testing import assert_close

import minigen
from minigen import anytoany
from minigen.anytoany import (
    AnyToAny,
    AnyToAnyConfig,
    CaptionedCodes,
    CaptionedItem,
    caption_scores,
    complete_all,
    decode_parts,
    direction_loss,
    encode_parts,
    make_batch,
    make_sequence,
    missing_codes,
    mixed_loss,
    next_state,
    places_in,
    sequence_loss,
    split_parts,
    subject_and_light,
    train_text_tokenizer,
)
from minigen.data import load_dataset
from minigen.imagegpt import check_tokenizer
from minigen.runs import shipped, shipped_result
from minigen.sampling import Guidance, last
from minigen.train import anytoany as script
from minigen.training import evaluate
from minigen.vq import VQConfig, VQModel

CAPTIONS = ["birds over mountains at dusk", "a lake below hills at night",
            "two trees on a misty day", "a lake below mountains on a clear day"] * 5
TEXT = train_text_tokenizer(CAPTIONS, 400)
N = 6  # tokens of an image of 2 x 3
SMALL = AnyToAnyConfig(text=TEXT.to_str(), codebook_size=20, height=2, width=3,
                       length=40, depth=2, heads=2, dim=16)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def build(seed=0, sharp=True, **changes) -> AnyToAny:
    torch.manual_seed(seed)
    model = AnyToAny(replace(SMALL, **changes)).eval()
    if sharp:
        for p in model.parameters():
            if p.ndim == 2:
                torch.nn.init.normal_(p, std=1.5 / p.shape[-1] ** 0.5)
    return model


MODEL = build()


def tokenizer_of(model=MODEL, seed=0) -> VQModel:
    torch.manual_seed(seed)
    return VQModel(VQConfig(downsample=4, channels=8, z_channels=8, codebook_size=20,
                            codebook_dim=4)).eval()


def image_of(tokenizer, seed=0):
    """An image (3, 8, 12) that the tokenizer gives back as the same tokens."""
    codes = torch.randint(20, (1, 2, 3), generator=generator(seed))
    return tokenizer.decode(codes)[0]


def sequence(*parts, model=MODEL):
    """A sequence that begins with texts, and images as lists of their codes."""
    tokens = [model.end]
    for part in parts:
        if isinstance(part, str):
            tokens += model.text.encode(part).ids
        else:
            whole = [model.close] if len(part) == N else []
            tokens += [model.open, *(model.first_code + code for code in part), *whole]
    return torch.tensor(tokens)


# --- text


@given(st.text(max_size=40))
def test_any_text_comes_back(text):
    ids = TEXT.encode(text).ids
    assert TEXT.decode(ids) == text
    assert all(0 <= i < MODEL.first_code for i in ids)


def test_the_words_of_the_captions_have_tokens_of_their_own():
    assert len(TEXT.encode("a lake below mountains at dusk").ids) == 6
    assert TEXT.get_vocab_size() == MODEL.first_code <= 400
    assert train_text_tokenizer([], 256).get_vocab_size() == 256
    assert train_text_tokenizer(CAPTIONS, 400).to_str() == TEXT.to_str()
    with pytest.raises(ValueError, match="at least 256 tokens, one for each byte"):
        train_text_tokenizer(CAPTIONS, 255)
    with pytest.raises(ValueError, match="not a text tokenizer"):
        AnyToAny(replace(SMALL, text="{}"))


# --- where a token is


def test_places_know_texts_and_the_grid_of_each_image():
    codes = list(range(N))
    tokens = sequence("at", codes, "at at", codes[:2])[None]
    position, within = places_in(MODEL, tokens)
    length = len(sequence("at"))
    image = [length] * N  # the position of the mark that opens it
    assert position[0, : length + 1].tolist() == list(range(length + 1))
    assert position[0, length + 1 : length + 1 + N].tolist() == image
    assert within[0, length + 1 : length + 1 + N].tolist() == codes
    assert within[0, length + 1 + N] == -1, "the mark that closes it"
    assert within[0, -2:].tolist() == [0, 1]
    assert (within[0] >= 0).sum() == N + 2
    x = MODEL.embed(tokens)
    first, second = length + 1, tokens.shape[1] - 2  # the same token, the same place
    difference = MODEL.position.weight[position[0, first]] - MODEL.position.weight[
        position[0, second]]
    assert_close(x[0, first] - x[0, second], difference)
    for start in (1, length + 3):
        assert_close(MODEL.embed(tokens, start), x[:, start:], rtol=0, atol=0)


# --- sequences to learn from


def items(batch=4, seed=0):
    captions = [torch.tensor(TEXT.encode(text).ids) for text in CAPTIONS[:batch]]
    longest = max(map(len, captions))
    padded = [torch.nn.functional.pad(c, (0, longest - len(c)), value=-1)
              for c in captions]
    codes = torch.randint(20, (batch, N), generator=generator(seed))
    return CaptionedItem(codes, torch.stack(padded), torch.zeros(batch))


def test_a_caption_is_cut_anywhere_around_its_image():
    batch = items()
    for codes, caption, text in zip(batch.tokens, batch.caption, CAPTIONS[:4],
                                    strict=True):
        whole = len(TEXT.encode(text).ids)
        for cut in range(whole + 1):
            tokens, learned = make_sequence(MODEL, codes, caption, cut)
            assert learned.all()
            found = split_parts(MODEL, torch.cat([torch.tensor([MODEL.end]), tokens]))
            kinds = [kind for kind, _ in found]
            assert kinds == ["text"] * (cut > 0) + ["image"] + ["text"] * (cut < whole)
            assert found[kinds.index("image")][1] == codes.tolist()
            assert TEXT.decode([i for kind, ids in found for i in ids
                                if kind == "text"]) == text
        tokens, learned = make_sequence(MODEL, codes, caption, whole, silent=True)
        assert (tokens[:whole] == MODEL.end).all()
        assert learned.tolist() == [False] * whole + [True] * (N + 2)


def test_the_loss_counts_what_is_to_be_learned_and_nothing_else():
    batch = items(3)
    rows = [make_sequence(MODEL, codes, caption, 2)
            for codes, caption in zip(batch.tokens, batch.caption, strict=True)]
    tokens, learned = make_batch(MODEL, rows)
    assert (tokens[:, 0] == MODEL.end).all()
    lengths = [len(row) + 2 for row, _ in rows]
    assert tokens.shape == (3, max(lengths))
    assert learned.sum(1).tolist() == [n - 1 for n in lengths], "all but the first"
    by_hand = torch.cat([
        torch.nn.functional.cross_entropy(
            MODEL(row[None, : n - 1])[0], row[1:n], reduction="none")
        for row, n in zip(tokens, lengths, strict=True)])
    assert_close(sequence_loss(MODEL, tokens, learned), by_hand.mean())
    weighted = build(image_weight=3.0, text_weight=0.5)
    target = torch.cat([row[1:n] for row, n in zip(tokens, lengths, strict=True)])
    code = (target >= MODEL.first_code) & (target < MODEL.open)
    weight = torch.where(code, 3.0, 0.5)
    assert_close(sequence_loss(weighted, tokens, learned),
                 (by_hand * weight).sum() / weight.sum())
    log_z = torch.cat([MODEL(row[None, : n - 1])[0].logsumexp(-1)
                       for row, n in zip(tokens, lengths, strict=True)])
    assert_close(sequence_loss(MODEL, tokens, learned, 0.1),
                 by_hand.mean() + 0.1 * log_z.square().mean())


@pytest.mark.parametrize(("changes", "expected"), [
    ({"text_first": 1.0, "image_first": 0.0}, {"text image"}),
    ({"text_first": 0.0, "image_first": 1.0}, {"image text"}),
    ({"text_first": 0.5, "image_first": 0.5}, {"image text", "text image"}),
    ({"text_first": 0.0, "image_first": 0.0},
     {"image text", "text image", "text image text"}),
    ({"text_first": 0.5, "image_first": 0.5, "pairs": 1.0},
     {"image text image text", "text image text image"}),
])
def test_orders_come_as_often_as_the_configuration_says(monkeypatch, changes, expected):
    model, found = build(**{"pairs": 0.0, "text_dropout": 0.0} | changes), []

    def note(model, tokens, learned, z_loss):
        found.extend(" ".join(kind for kind, _ in split_parts(model, row))
                     for row in tokens)
        return torch.zeros(())

    monkeypatch.setattr(anytoany, "sequence_loss", note)
    for seed in range(50):
        mixed_loss(model, items(), generator(seed))
    assert set(found) == expected
    assert len(found) == 50 * (2 if changes.get("pairs") else 4)
    if changes["text_first"] == 0.5:
        half = len(found) / 2
        for kind in expected:  # of whole batches where images come in pairs
            assert abs(found.count(kind) - half) < 5 * half**0.5


def test_a_share_of_the_captions_is_left_out(monkeypatch):
    silent = []
    monkeypatch.setattr(anytoany, "make_sequence", lambda *row: (
        silent.append(row[-1]), make_sequence(*row))[1])
    model = build(text_dropout=0.25)
    for seed in range(100):
        mixed_loss(model, items(), generator(seed))
    assert abs(sum(silent) / len(silent) - 0.25) < 0.1
    silent.clear()
    mixed_loss(build(text_dropout=0.0), items(), generator())
    assert not any(silent)


def test_the_loss_of_each_direction_is_of_its_own_tokens():
    batch = items()
    with torch.no_grad():
        for to in ("image", "image alone", "text"):
            total = count = 0.0
            for codes, caption in zip(batch.tokens, batch.caption, strict=True):
                caption = caption[caption >= 0]
                text = caption if to == "image" else torch.full_like(caption, MODEL.end)
                image = codes + MODEL.first_code
                mark = [torch.tensor([m]) for m in (MODEL.end, MODEL.open, MODEL.close)]
                given, asked = [mark[0], text, mark[1]], image
                if to == "text":
                    given = [mark[0], mark[1], image, mark[2]]
                    asked = torch.cat([caption, mark[0]])
                start = sum(map(len, given))
                logits = MODEL(torch.cat([*given, asked])[None, :-1])[0, start - 1 :]
                total += torch.nn.functional.cross_entropy(
                    logits, asked, reduction="sum")
                count += len(asked)
            assert_close(direction_loss(MODEL, batch, to), total / count)


def test_it_learns_to_draw_what_it_reads_and_to_say_what_it_sees():
    model, batch = build(sharp=False, pairs=0.0, text_dropout=0.0), items(3)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    model.train()
    for seed in range(400):
        optimizer.zero_grad()
        mixed_loss(model, batch, generator(seed)).backward()
        optimizer.step()
    model.eval()
    for codes, text in zip(batch.tokens.tolist(), CAPTIONS, strict=False):
        drawn = last(model.stream([torch.cat([
            sequence(text), torch.tensor([model.open])])], temperature=0.0))[0]
        assert split_parts(model, drawn)[1] == ("image", codes)
        said = last(model.stream([sequence(codes)], temperature=0.0, images=False))[0]
        assert TEXT.decode(split_parts(model, said)[1][1]) == text


# --- the grammar


def random_prompts(random):
    """A few sequences that keep to the grammar, each cut off somewhere."""
    prompts = []
    for _ in range(int(torch.randint(1, 4, (), generator=random))):
        parts = []
        for kind in torch.randint(2, (3,), generator=random).tolist():
            if kind:
                codes = torch.randint(20, (N,), generator=random).tolist()
                parts.append(codes)
            else:
                parts.append(CAPTIONS[int(torch.randint(4, (), generator=random))])
        tokens = sequence(*parts)
        stop = int(torch.randint(1, min(len(tokens), 30) + 1, (), generator=random))
        prompts.append(tokens[:stop])
    return prompts


def test_every_sequence_of_thousands_of_random_models_can_be_read():
    random, images, read = generator(0), 0, 0
    for seed in range(120):
        model = build(seed)
        for _ in range(5):
            prompts = random_prompts(random)
            length = int(torch.randint(38, 41, (), generator=random))
            temperature = (0.3, 1.0, 5.0)[seed % 3]
            drawn = last(model.stream(prompts, length=length, generator=random,
                                      temperature=temperature))
            for row, prompt in zip(drawn, prompts, strict=True):
                assert row[: len(prompt)].tolist() == prompt.tolist()
                parts = split_parts(model, row)
                sizes = [len(ids) for kind, ids in parts if kind == "image"]
                assert all(size == N for size in sizes), "images are whole"
                images, read = images + len(sizes), read + 1
                ended = (row[1:] == model.end).nonzero()
                if len(ended):
                    assert (row[1 + int(ended[0]) :] == model.end).all()
    assert read > 1000
    assert images > 300


def test_what_may_come_next():
    model = MODEL
    text = torch.arange(model.vocab_size) < model.first_code
    code = (torch.arange(model.vocab_size) < model.open) & ~text

    def allowed(tokens, length=40, images=True):
        state = next_state(model, tokens[None], length, images)
        return model.grammar[state][0]

    start = sequence("a")
    assert allowed(start).sum() == text.sum() + 2
    assert allowed(start)[[model.open, model.end]].all()
    assert not allowed(start, images=False)[model.open]
    room = len(start) + N + 2  # for both marks of an image
    assert allowed(start, room)[model.open]
    assert not allowed(start, room - 1)[model.open]
    for n in range(N):
        assert torch.equal(allowed(sequence([0] * n)), code)
    whole = sequence([0] * N)
    assert allowed(whole[:-1]).nonzero().tolist() == [[model.close]]
    assert allowed(whole)[: model.first_code].all()
    over = torch.cat([whole, torch.tensor([model.end])])
    assert allowed(over).nonzero().tolist() == [[model.end]]
    assert allowed(sequence()).sum() == text.sum() + 2, "an end is also the beginning"


@pytest.mark.parametrize("tokens", [
    [0], [400 + 200], "code", "close", "short", "long", "text in image", "end in image",
])
def test_what_breaks_the_grammar_is_said(tokens):
    model, codes = MODEL, [MODEL.first_code] * N
    tokens = {"code": [model.end, model.first_code], "close": [model.end, model.close],
              "short": [model.end, model.open, *codes[:-1], model.close],
              "long": [model.end, model.open, *codes, codes[0]],
              "text in image": [model.end, model.open, 5],
              "end in image": [model.end, model.open, model.end],
              }.get(tokens if isinstance(tokens, str) else "", tokens)
    if tokens == [0]:  # a text without a beginning is still a text
        assert split_parts(model, torch.tensor(tokens)) == [("text", [0])]
        return
    with pytest.raises(ValueError, match="may not stand at position"):
        split_parts(model, torch.tensor(tokens))
    with pytest.raises(ValueError, match="may not stand at position"):
        next(model.stream([torch.tensor(tokens)]))


def test_missing_codes_of_the_image_at_the_end():
    assert missing_codes(MODEL, sequence("a")) is None
    assert missing_codes(MODEL, sequence()) is None
    assert missing_codes(MODEL, sequence("a", [1] * N)) is None
    assert missing_codes(MODEL, sequence("a", [1, 2])) == N - 2
    assert missing_codes(MODEL, sequence("a", [])) == N


# --- drawing


def test_the_cache_changes_nothing():
    prompts = [sequence("a lake", [1, 2, 3]), sequence("birds at dusk"), sequence()]
    for guidance in (None, Guidance(3.0), Guidance(2.0, "linear")):
        drawn = [last(MODEL.stream(prompts, generator=generator(), guidance=guidance,
                                   use_cache=use)) for use in (True, False)]
        assert torch.equal(*drawn)


def test_prompts_of_different_lengths_are_drawn_as_each_by_itself():
    prompts = [sequence("a lake", [1, 2, 3]), sequence("birds"),
               sequence([4] * N, "at")]
    for guidance in (None, Guidance(2.0)):
        together = last(MODEL.stream(prompts, temperature=0.0, guidance=guidance))
        for row, prompt in zip(together, prompts, strict=True):
            alone = last(MODEL.stream([prompt], temperature=0.0, guidance=guidance))
            assert torch.equal(row, alone[0])


def test_guidance_counts_the_text_of_the_prompt():
    prompt = sequence("birds at dusk", [])

    def logits(tokens):
        return MODEL(tokens[None])[0, -1]

    silent = prompt.clone()
    silent[silent < MODEL.first_code] = MODEL.end
    expected = logits(silent) + 3.0 * (logits(prompt) - logits(silent))
    code = slice(MODEL.first_code, MODEL.open)
    token = last(MODEL.stream([prompt], length=len(prompt) + N + 1, temperature=0.0,
                              guidance=Guidance(3.0)))[0, len(prompt)]
    assert token == MODEL.first_code + expected[code].argmax()
    plain, one = (last(MODEL.stream([prompt], generator=generator(), guidance=guidance))
                  for guidance in (None, Guidance(1.0)))
    assert torch.equal(plain, one)


def test_a_text_alone_draws_no_image_and_no_room_draws_none():
    for seed in range(20):
        drawn = last(MODEL.stream([sequence("a")], images=False,
                                  generator=generator(seed)))
        assert not (drawn == MODEL.open).any()
        drawn = last(MODEL.stream([sequence("a")], length=N + 3,
                                  generator=generator(seed)))
        assert not (drawn == MODEL.open).any()


def test_lists_of_texts_and_images_are_continued():
    tokenizer = tokenizer_of()
    image = image_of(tokenizer)
    for seed in range(8):
        options = {"generator": generator(seed)}
        parts = MODEL.complete(tokenizer, ["a lake"], "image", **options)
        assert [type(part) for part in parts] == [str, torch.Tensor]
        assert parts[0] == "a lake"
        assert parts[1].shape == (3, 8, 12)
        assert 0 <= parts[1].min() <= parts[1].max() <= 1
        parts = MODEL.complete(tokenizer, ["a ", image], "text", **options)
        assert parts[1] is image
        assert all(isinstance(part, str) for n, part in enumerate(parts) if n != 1)
        parts = MODEL.complete(tokenizer, [image, "two", image], "image", **options)
        assert [type(part) for part in parts] == [
            torch.Tensor, str, torch.Tensor, torch.Tensor]
        MODEL.complete(tokenizer, [], **options)
        MODEL.complete(tokenizer, ["", "😀 Zoë"], **options)
    many = complete_all(MODEL, tokenizer, [["a lake"], [image, "at"], []], "image",
                        temperature=0.0)
    for parts, prompt in zip(many, (["a lake"], [image, "at"], []), strict=True):
        alone = MODEL.complete(tokenizer, prompt, "image", temperature=0.0)
        assert len(parts) == len(prompt) + 1 == len(alone)
        assert_close(parts[-1], alone[-1])
    greedy = [MODEL.complete(tokenizer, ["a"], "text", generator=generator(n))
              for n in (3, 3)]
    assert greedy[0] == greedy[1]


def test_an_image_of_which_the_upper_rows_are_given_is_completed():
    tokenizer = tokenizer_of()
    image = image_of(tokenizer)
    top = image[:, :4]
    known = tokenizer.encode(top[None]).flatten().tolist()
    sequence_ = encode_parts(MODEL, tokenizer, ["a", top])
    assert missing_codes(MODEL, sequence_) == N - len(known) == 3
    parts = MODEL.complete(tokenizer, ["a", top], "image", generator=generator())
    assert [type(part) for part in parts] == [str, torch.Tensor]
    assert parts[1].shape == (3, 8, 12)
    drawn = last(MODEL.stream([sequence_], length=len(sequence_) + 4,
                              generator=generator()))[0]
    assert split_parts(MODEL, drawn)[-1][1][:3] == known
    assert_close(decode_parts(MODEL, tokenizer, drawn)[1], parts[1])


@pytest.mark.parametrize(("parts", "then", "message"), [
    ([1], "image", r"expected texts and images \(3, H, W\), found 1"),
    ([torch.zeros(8, 12)], "image", r"found \(8, 12\)"),
    ([torch.zeros(3, 8, 8)], "image", "expected images of 8 x 12 pixels.*found 8 x 8"),
    ([torch.zeros(3, 5, 12)], "image", "a multiple of 4; found 5 x 12"),
    ([torch.zeros(3, 4, 12), "a"], "image", "expected images of 8 x 12"),
    ([torch.zeros(3, 12, 12)], "image", "found 12 x 12"),
    ([torch.zeros(3, 0, 12)], "image", "found 0 x 12"),
    (["word " * 60], "image", "does not fit into 40: shorten its texts"),
    (["a"], "video", "then is one of image, text and anything, found 'video'"),
])
def test_what_cannot_be_continued_is_said(parts, then, message):
    with pytest.raises(ValueError, match=message):
        MODEL.complete(tokenizer_of(), parts, then)


def test_another_tokenizer_is_refused():
    other = VQModel(VQConfig(downsample=4, channels=8, z_channels=8, codebook_size=16,
                             codebook_dim=4))
    with pytest.raises(ValueError, match="20 tokens, found a tokenizer with 16"):
        MODEL.complete(other, ["a"])
    with pytest.raises(ValueError, match="at least one sequence"):
        complete_all(MODEL, tokenizer_of(), [])


@pytest.mark.parametrize(("changes", "message"), [
    ({"length": N + 3}, "cannot hold an image of 2 x 3 tokens: give at least 10"),
    ({"codebook_size": 0}, "at least one image token"),
    ({"z_loss": -1.0}, "weights of a loss are at least 0"),
    ({"text_first": 0.7, "image_first": 0.5}, "the first two together"),
    ({"text_dropout": 1.5}, "shares from 0 to 1"),
])
def test_impossible_configurations_are_a_sentence(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


# --- captions


def test_captions_are_compared_word_by_word():
    true = ["birds over a lake at dusk", "a lake at night"]
    perfect = caption_scores(true, true)
    assert perfect == dict.fromkeys(perfect, 1.0)
    scores = caption_scores(true, ["birds at dusk", "a river at night"])
    assert scores["word_precision"] == pytest.approx((1 + 3 / 4) / 2)
    assert scores["word_recall"] == pytest.approx((3 / 6 + 3 / 4) / 2)
    assert scores["subject_right"] == 0.5
    assert scores["light_right"] == 1.0
    assert scores["exact"] == 0.0
    assert caption_scores(["a a b"], ["a b b"])["word_recall"] == pytest.approx(2 / 3)
    assert caption_scores(true, ["", ""])["word_precision"] == 0


def test_subject_and_light_of_all_captions(landscape_captions):
    subjects = set()
    for caption in landscape_captions:
        subject, light = subject_and_light(caption)
        assert caption.startswith(subject)
        assert subject
        assert light in caption
        assert light
        subjects.add(subject)
    assert subjects == set(anytoany.STARTS)
    assert subject_and_light("nothing like it") == ("", "")


@pytest.fixture(scope="module")
def landscape_captions():
    from minigen.data import load_dataset

    return load_dataset("landscapes", 16, "val", 400).captions


# --- the data and the script


def test_codes_come_with_the_caption_of_their_image():
    codes = SimpleNamespace(codes=torch.zeros(3, 2, N))
    fake = type("Codes", (), {
        "codes": codes.codes, "__len__": lambda self: 6,
        "__getitem__": lambda self, n: SimpleNamespace(
            tokens=torch.full((N,), n), label=n)})()
    data = CaptionedCodes(fake, CAPTIONS[:3], TEXT)
    assert len(data) == 6
    for n in range(6):
        item = data[n]
        caption = item.caption[item.caption >= 0]
        assert TEXT.decode(caption.tolist()) == CAPTIONS[n // 2]
        assert item.tokens[0] == item.label == n
    with pytest.raises(ValueError, match="a caption for each of 3 images, found 2"):
        CaptionedCodes(fake, CAPTIONS[:2], TEXT)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("anytoany")
    config = replace(script.PRESETS["test"], out=folder)
    return folder, script.main(config)


def test_a_run_draws_writes_and_is_measured(run):
    folder, result = run
    metrics = result["metrics"]
    uniform = math.log2(minigen.load(folder).vocab_size)
    for name in ("bits_of_image", "bits_of_image_alone", "bits_of_text"):
        assert metrics[name] == pytest.approx(uniform, abs=0.5), "it is hardly trained"
    assert 0 <= metrics["word_precision"] <= 1
    assert result["cost"]["flops"] > 0
    assert len(list(folder.glob("step-*.png"))) == 2


def test_a_checkpoint_draws_a_text_and_describes_a_file(run, tmp_path):
    folder, _ = run
    options = script.SampleOptions(count=3, text="a lake", out=tmp_path / "a.png")
    images, labels = script.draw(str(folder), options)
    assert images.shape == (3, 3, 16, 16)
    assert labels is None
    assert script.sample(str(folder), options) == options.out
    images, labels = script.draw(str(folder), script.SampleOptions(count=5))
    assert images.shape == (5, 3, 16, 16)
    assert labels.shape == (5,)
    photo = tmp_path / "photo.png"
    Image.new("RGB", (40, 30), (90, 120, 40)).save(photo)
    said = script.sample(str(folder), script.SampleOptions(image=photo))
    assert isinstance(said, str)
    again = script.sample(str(folder), script.SampleOptions(image=photo, text="birds"))
    assert again.startswith("birds")
    empty = script.SampleOptions(image=tmp_path / "empty.png")
    with pytest.raises(ValueError, match="cannot be read as an image: .*No such file"):
        script.sample(str(folder), empty)
    empty.image.touch()
    with pytest.raises(ValueError, match="empty.png .* the file is empty$"):
        script.sample(str(folder), empty)


def test_the_shipped_model_gives_the_figures_of_its_result():
    name = shipped("anytoany", "tokens64")
    about, model = shipped_result(name), minigen.load(name)
    tokenizer = minigen.load(model.config.tokenizer)
    check_tokenizer(model, tokenizer)
    count = 200  # of its 1,000 images: the first ones, so equal only within a little
    val = load_dataset(about["config"]["data"], 64, "val", count)
    ids = [torch.tensor(model.text.encode(caption).ids) for caption in val.captions]
    padded = torch.nn.utils.rnn.pad_sequence(ids, True, -1)
    items = [CaptionedItem(tokenizer.encode(item.image[None]).flatten(), caption, 0)
             for item, caption in zip(val, padded, strict=True)]
    for to, name in (("image", "bits_of_image"), ("image alone", "bits_of_image_alone"),
                     ("text", "bits_of_text")):
        found = evaluate(model, items, partial(direction_loss, to=to), 50)
        assert found / math.log(2) == pytest.approx(about["metrics"][name], rel=0.06)
    images = [item.image for item in list(val)[:60]]
    written = script.write_captions(model, tokenizer, images,
                                    generator=torch.Generator().manual_seed(0))
    scores = caption_scores(val.captions[:60], written)
    assert scores["subject_right"] > 0.8
    assert scores["word_precision"] > 0.8
