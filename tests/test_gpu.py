"""On a CUDA GPU: models compute what they do on a CPU, generate, and train."""

from copy import deepcopy
from dataclasses import replace

import pytest
from test_models import GENERATING, MODELS
from torch.testing import assert_close

from minigen.__main__ import chapters, script

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_cpu(name):
    case = MODELS[name]
    here, parts = case.make().eval(), case.parts()
    there = deepcopy(here).to(DEVICE)
    losses = case.loss(here, parts), case.loss(there, parts.to(DEVICE))
    assert_close(losses[1].cpu(), losses[0], rtol=1e-4, atol=1e-5)
    for loss in losses:
        loss.backward()
    pairs = zip(here.parameters(), there.parameters(), strict=True)
    for ours, theirs in pairs:
        if ours.grad is not None:
            assert_close(theirs.grad.cpu(), ours.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", GENERATING)
def test_generates_the_same_with_and_without_the_cache(name):
    case = MODELS[name]
    model, prompt = case.make().to(DEVICE), case.parts(2)[:, :3].to(DEVICE)
    cached, uncached = (case.generate(model, prompt, temperature=0.0, use_cache=use)
                        for use in (True, False))
    assert cached.device.type == DEVICE
    assert_close(cached, uncached, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("chapter", chapters())
def test_scripts_train_resume_and_sample(chapter, precision, tmp_path):
    module = script(chapter)
    config = replace(module.PRESETS["test"], precision=precision, out=tmp_path / "run")
    result = module.main(config)
    assert result == module.main(replace(config, resume=True))
    options = module.SampleOptions(count=2, out=tmp_path / "images.png")
    assert module.sample(str(tmp_path / "run"), options).exists()
