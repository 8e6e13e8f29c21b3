"""The models inside of book/play.md: they are those of PyTorch, and one can play."""

import json
import re

import pytest
import torch
from pages import HTML, Visit
from torch.testing import assert_close

import minigen
from minigen import maskgit
from minigen.runs import shipped
from minigen.sampling import Guidance, sample

PAGE = "book/play"
MODEL = """async (name) => {
    const {load} = await import(`${location.origin}/book/play/weights.js`);
    const models = await import(`${location.origin}/book/play/models.js`);
    const {VQModel} = await import(`${location.origin}/book/play/vq.js`);
    const {KVCache} = await import(`${location.origin}/book/play/transformer.js`);
    const kinds = {imagegpt: models.ImageGPT, maskgit: models.MaskGIT,
                   pixelgpt: models.PixelGPT, vq: VQModel};
    const [config, weights] = await load(`${location.origin}/book/play/models/${name}`);
    window.model = new kinds[name.split('-')[0]](config, weights);
    window.cache = () => new KVCache(config, model.length + 1);
}"""
LOGITS = {  # of a class and tokens
    "imagegpt": """([label, tokens]) => { const caches = [cache()]; let last;
        for (const n of [label, ...tokens]) last = model.logits([n], caches);
        return [...last] }""",
    "pixelgpt": """([label, tokens]) => { const caches = [cache()]; let last;
        for (const n of tokens) last = model.logits(n, caches);
        return [...last] }""",
    "maskgit": "([label, tokens]) => [...model.logitsAt([7], tokens, [label])[0]]",
}
STREAM = """([options, uniforms, exponentials]) => {
    const random = {uniform: () => uniforms.shift(),
                    exponential: () => exponentials.shift()};
    let tokens;
    for (const state of model.stream({...options, random})) tokens = state.tokens;
    return tokens }"""


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def page(browser, site):
    with Visit(browser, site, PAGE) as visit:
        yield visit.page
        assert visit.complaints == []


def python_model(name):
    chapter, _, count = name.partition("-")
    return minigen.load(shipped(chapter, f"tokens{count}") if count else chapter)


# --- the same numbers


@pytest.mark.parametrize("name", [
    "imagegpt-64", "imagegpt-256", "maskgit-64", "maskgit-256", "pixelgpt"])
def test_logits_are_those_of_pytorch(page, name):
    model, kind = python_model(name), name.split("-")[0]
    if kind == "pixelgpt":
        tokens = torch.randint(4096, (1, 60), generator=generator())
        expected = model(tokens)[0, -1]
    elif kind == "imagegpt":
        tokens = torch.randint(1024, (1, 50), generator=generator())
        expected = model(tokens, torch.tensor([3]))[0, -1]
    else:  # with masked tokens
        tokens = torch.randint(1025, (1, model.length), generator=generator())
        tokens[0, :9] = 1024
        expected = model(tokens, torch.tensor([3]))[0, 7]
    page.evaluate(MODEL, name)
    found = page.evaluate(LOGITS[kind], [3, tokens[0].tolist()])
    assert_close(torch.tensor(found), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("count", [64, 256])
def test_decoded_images_are_those_of_pytorch(page, count):
    side = int(count**0.5)
    tokens = torch.randint(1024, (1, side, side), generator=generator())
    expected = (python_model(f"vq-{count}").decode(tokens)[0] * 255).round()
    page.evaluate(MODEL, f"vq-{count}")
    rgba = page.evaluate("([tokens, side]) => [...model.decode(tokens, side).rgba]",
                         [tokens.flatten().tolist(), side])
    found = torch.tensor(rgba).view(64, 64, 4).permute(2, 0, 1)
    assert (found[:3] - expected).abs().max() <= 1
    assert (found[3] == 255).all()
    colors = json.loads(
        (HTML / PAGE / "models" / f"vq-{count}" / "colors.json").read_text())
    plain = python_model(f"vq-{count}").decode(torch.full((1, 2, 2), 500))
    expected = 255 * plain.mean(dim=(0, 2, 3))
    assert_close(torch.tensor(colors[500]).float(), expected, atol=0.51, rtol=0)


@pytest.mark.parametrize(("temperature", "top_p"), [(1, 1), (0.7, 0.9), (1.4, 0.5),
                                                   (0, 1)])
def test_the_sampler_chooses_the_same_tokens(page, temperature, top_p):
    logits = 3 * torch.randn(100, 1024, generator=generator())
    uniforms = torch.rand(100, 1, generator=generator(1))
    expected = sample(logits, temperature, None, top_p, generator(1))
    found = page.evaluate("""async ([rows, uniforms, options]) => {
        const {sample} = await import(`${location.origin}/book/play/sampling.js`);
        return rows.map((row, n) =>
            sample(Float32Array.from(row), options, uniforms[n])) }""",
        [logits.tolist(), uniforms.flatten().tolist(),
         {"temperature": temperature, "topP": top_p}])
    assert found == expected.tolist()


def test_whole_images_are_the_same_for_the_same_random_numbers(page, monkeypatch):
    label, options = torch.tensor([4]), {"temperature": 0.9, "top_p": 0.95}
    model, random = python_model("imagegpt-64"), generator(5)
    uniforms = [torch.rand(1, 1, generator=random).item() for _ in range(64)]
    expected = model.generate(1, label, guidance=Guidance(2.0), generator=generator(5),
                              **options)
    page.evaluate(MODEL, "imagegpt-64")
    asked = {"label": 4, "guidance": 2, "temperature": 0.9, "topP": 0.95}
    assert page.evaluate(STREAM, [asked, uniforms, []]) == expected[0].tolist()

    model, uniforms, exponentials = python_model("maskgit-64"), [], []
    rand, exponential = torch.rand, torch.Tensor.exponential_

    def noted(into, function):
        def record(*args, **kwargs):
            found = function(*args, **kwargs)
            into.extend(found.flatten().tolist())
            return found
        return record

    known = torch.full((1, 64), maskgit.MaskGITConfig.codebook_size)
    known[0, 30:40] = expected[0, 30:40]  # and some tokens are given
    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", noted(uniforms, rand))
        patch.setattr(torch.Tensor, "exponential_", noted(exponentials, exponential))
        expected = model.generate(known, label, guidance=Guidance(2.0), steps=6,
                                  generator=generator(5), **options)
    assert len(uniforms) == len(exponentials) > 54
    page.evaluate(MODEL, "maskgit-64")
    asked["steps"] = 6
    asked["tokens"] = [None if token == 1024 else token for token in known[0].tolist()]
    found = page.evaluate(STREAM, [asked, uniforms, exponentials])
    assert found == expected[0].tolist()


def test_random_numbers_are_even_and_repeat(page):
    first, again, other, raised = page.evaluate("""async () => {
        const {Random} = await import(`${location.origin}/book/play/sampling.js`);
        const many = (seed, kind) => { const random = new Random(seed);
            return Array.from({length: 5000}, () => random[kind]()) };
        return [many(3, 'uniform'), many(3, 'uniform'), many(4, 'uniform'),
                many(3, 'exponential')] }""")
    assert first == again != other
    assert 0 <= min(first) < 0.01
    assert 0.99 < max(first) < 1
    for values, mean in ((first, 0.5), (other, 0.5), (raised, 1.0)):
        assert torch.tensor(values).mean().item() == pytest.approx(mean, abs=0.06)
    assert min(raised) > 0


# --- a reader


SLOW = 120_000  # milliseconds, on the slowest machine


def choose(page, **values):
    for name, value in values.items():
        page.locator(f"#play-{name}").evaluate(
            "(e, value) => { e.value = value; e.dispatchEvent(new Event('input')) }",
            value)


def press(page, name="draw"):
    page.click(f"#play-{name}")
    page.wait_for_function("document.getElementById('play-cancel').disabled",
                           timeout=SLOW)


def pixels(page, name):
    return torch.tensor(page.locator(f"#play-{name}").evaluate(
        "c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"))


DEFAULTS = {"label": 0, "tokens": 64, "guidance": 2, "temperature": 1, "top-p": 1,
            "steps": 8, "seed": 1}


def test_every_control_changes_what_is_drawn(page):
    def draw(**changes):
        choose(page, **DEFAULTS | changes)
        press(page)
        assert page.locator("#play-status").text_content() == ""
        for name, title in (("imagegpt", "ImageGPT"), ("maskgit", "MaskGIT")):
            note = page.locator(f"#play-{name}-note").text_content()
            assert re.fullmatch(
                rf"{title}: tokens in \d+\.\d\d s, image in \d+\.\d\d s", note)
        return [pixels(page, name) for name in ("imagegpt", "maskgit")]

    usual = draw()
    for image in usual:
        assert image.float().std() > 10, "it is blank"
    again = draw()
    assert all(torch.equal(*pair) for pair in zip(usual, again, strict=True))
    for changes in ({"label": 8}, {"guidance": 4}, {"temperature": 0.5},
                    {"top-p": 0.6}, {"seed": 2}):
        other = draw(**changes)
        for one, two in zip(usual, other, strict=True):
            assert not torch.equal(one, two), changes
    other = draw(steps=4)
    assert torch.equal(usual[0], other[0]), "steps are MaskGIT's"
    assert not torch.equal(usual[1], other[1])


def test_a_token_tells_how_likely_it_was(page):
    choose(page, **DEFAULTS)
    press(page)
    page.hover("#play-imagegpt", position={"x": 100, "y": 100})
    before = page.locator("#play-token").text_content()
    share = r"(?:< 0\.1|\d+\.\d) %"
    assert re.fullmatch(rf"Token \d+, row \d, column \d: drawn with {share}\.", before)
    shares = [float(text.strip("< %")) for text in page.locator(
        "#play-best td:nth-child(2)").all_text_contents()]
    assert len(shares) == 10
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) < 101
    page.focus("#play-imagegpt")
    page.keyboard.press("ArrowRight")
    assert page.locator("#play-token").text_content() != before
    assert page.locator("#play-imagegpt-mark").is_visible()


@pytest.mark.parametrize("name", ["imagegpt", "maskgit"])
def test_what_is_erased_is_painted_again(page, name):
    choose(page, **DEFAULTS)
    press(page)
    before = pixels(page, name).view(64, 64, 4)
    box = page.locator(f"#play-{name}").bounding_box()
    page.mouse.move(box["x"] + 10, box["y"] + 0.8 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 0.8 * box["height"],
                    steps=20)
    page.mouse.up()
    erased = (pixels(page, name).view(64, 64, 4)[..., :3] == 128).all(dim=-1)
    assert erased[48:56, :32].all()
    assert not erased[:40].any()
    choose(page, label=5, seed=7)
    press(page, "repaint")
    after = pixels(page, name).view(64, 64, 4)
    assert page.locator(f"#play-{name}-note").text_content().startswith("MaskGIT")
    change = (after.float() - before.float()).abs().mean(dim=-1)
    assert change[48:56, :32].mean() > 3 * change[:24].mean()
    assert page.locator("#play-repaint").is_disabled()
    page.focus(f"#play-{name}")  # and the same with the keyboard
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Space")
    assert page.locator("#play-repaint").is_enabled()
    page.keyboard.press("Space")
    assert page.locator("#play-repaint").is_disabled()


def test_a_drawing_can_be_cancelled(page):
    choose(page, **DEFAULTS | {"tokens": 256})
    page.click("#play-draw")
    page.wait_for_function("""document.getElementById('play-status').textContent
        .includes('is drawing')""")
    page.wait_for_timeout(500)
    press(page, "cancel")
    assert page.locator("#play-status").text_content() == "Cancelled."
    choose(page, **DEFAULTS)
    press(page)
    assert page.locator("#play-status").text_content() == ""


def test_pixels_go_on_from_the_first(page):
    choose(page, **DEFAULTS | {"first": "#ff8800"})
    press(page, "pixels-draw")
    image = pixels(page, "pixels").view(24, 24, 4)
    assert image[0, 0, :3].tolist() == [255, 136, 0]
    assert image.float().std(dim=(0, 1))[:3].max() > 3
    assert not (image[..., :3] == 128).all(dim=-1).any(), "some are not drawn"
    choose(page, seed=2)
    press(page, "pixels-draw")
    assert not torch.equal(image, pixels(page, "pixels").view(24, 24, 4))


@pytest.mark.parametrize(("answer", "sentence"), [
    ({"status": 404}, "is missing (404): build the book again."),
    ({"body": b"\x10"}, "is damaged: build the book again."),
    ({"body": b"\xff" * 64}, "is damaged: build the book again."),
    ({"body": (10).to_bytes(8, "little") + b"no json at all"}, "is damaged"),
])
def test_missing_and_damaged_weights_are_a_sentence(browser, site, answer, sentence):
    with Visit(browser, site, PAGE) as visit:
        visit.page.route("**/model.safetensors", lambda route: route.fulfill(**answer))
        press(visit.page)
        said = visit.page.locator("#play-status").text_content()
        assert said.startswith("Nothing was drawn: the file ")
        assert sentence in said
        assert visit.page.locator("#play-draw").is_enabled(), "one can try again"
        assert all("model.safetensors" in found or "404" in found
                   for found in visit.complaints)


def test_opened_as_a_file_it_says_what_to_do(browser):
    page = browser.new_page()
    page.goto((HTML / f"{PAGE}.html").as_uri())
    assert "make serve" in page.locator("#play-status").text_content()
    assert page.locator("#play-draw").is_disabled()
    page.close()


def test_every_control_has_a_label(page):
    unnamed = page.locator(".play").locator(
        "input, select, button, canvas").evaluate_all(
        """all => all.filter(e => !(e.labels?.length || e.ariaLabel
            || e.textContent.trim())).map(e => e.id)""")
    assert unnamed == []
