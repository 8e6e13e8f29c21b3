"""A run that is stopped, however it is stopped, goes on as if it had not been; and so does one on several processes."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from minigen import training
from minigen.pixelgpt import PixelGPT, PixelGPTConfig
from minigen.training import FitConfig, fit, last_state, read_log, save_checkpoint

TOY = str(Path(__file__).with_name("toy.py"))
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def accelerate_launch(*options):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "2", "--main_process_port", str(port),
            *options]


class Server:
    """`tests/toy.py serve`: starting a run there takes milliseconds, starting a process that imports torch takes seconds."""

    process = None

    def run(self, arguments, output):
        if self.process is None:
            type(self).process = subprocess.Popen([sys.executable, TOY, "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                                  env=os.environ | {"OMP_NUM_THREADS": "1"})
        self.process.stdin.write(json.dumps([str(output), *arguments]) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module", autouse=True)
def stop_the_server():
    yield
    if Server.process:
        Server.process.stdin.close()
        Server.process.wait(timeout=10)
        Server.process = None


def toy(folder, *options, launcher=None, fails=False):
    """Run `tests/toy.py` and return what it printed: (step, loss, norm) of each step, and everything as text."""
    arguments, output = [str(folder), *map(str, options)], folder.with_name(folder.name + ".out")
    if launcher is None:
        status = Server().run(arguments, output)
    else:
        with open(output, "w") as file:
            status = subprocess.run([*launcher, TOY, *arguments], stdout=file, stderr=subprocess.STDOUT, timeout=200,
                                    env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
    text = output.read_text()
    assert (status != 0) == fails, text
    records = [json.loads(line) for line in text.splitlines() if re.fullmatch(r"\[\d+, .*\]", line)]
    return SimpleNamespace(records=records, text=text, status=status)


def assert_same_end(a, b):
    """Equal bit for bit: all weights, buffers and averages at the end, and every line of the log but the clock."""
    one, other = (torch.load(folder / "end.pt", weights_only=True) for folder in (a, b))
    assert {k: v is None for k, v in one.items()} == {k: v is None for k, v in other.items()}
    for part in filter(one.get, one):
        for name, tensor in one[part].items():
            assert torch.equal(tensor, other[part][name]), f"{part} {name}"
    assert [line | {"seconds": 0} for line in read_log(a)] == [line | {"seconds": 0} for line in read_log(b)]


OPTIONS = ["--dropout", "0.2", "--average"]  # randomness in the model; the toy adds NumPy's, in the loss and at looks


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The run that was never stopped, with nothing ever saved."""
    folder = tmp_path_factory.mktemp("whole")
    toy(folder, *OPTIONS, "--save-every", 0)
    return folder


@pytest.mark.parametrize("save_every, stop", [(1, 17), (7, 25), (5, 40), (40, 3)])
def test_a_killed_run_goes_on_exactly(save_every, stop, uninterrupted, tmp_path):
    killed = toy(tmp_path, *OPTIONS, "--save-every", save_every, "--kill-after", stop, fails=True)
    assert killed.status == -9 and killed.records[-1][0] == stop
    rest = toy(tmp_path, *OPTIONS, "--save-every", save_every, "--resume").records
    assert rest[0][0] == (stop - 1) // save_every * save_every + 1, "it goes on after the last saved step"
    assert_same_end(uninterrupted, tmp_path)
    assert [path.name for path in tmp_path.glob("*state-*")] == ["state-000000040"]


@pytest.mark.parametrize("moment", ["torch:save:1", "torch:save:3", "os:replace:1", "os:replace:3", "os:replace:5", "training:press:4", "training:write_json:2",
                                    "training:remove_whole:1", "shutil:rmtree:6"])
def test_a_run_killed_while_it_writes_goes_on_exactly(moment, uninterrupted, tmp_path):
    """With half a file on the disk; between the temporary name and the final one; before the older state is removed."""
    assert toy(tmp_path, *OPTIONS, "--kill-at", moment, fails=True).status == -9
    left = {path.name for path in tmp_path.glob("*state-*")}
    assert left, "it was killed in the midst of writing"
    toy(tmp_path, *OPTIONS, "--resume")
    assert_same_end(uninterrupted, tmp_path)
    assert [path.name for path in tmp_path.glob("*state-*")] == ["state-000000040"]


MANY = ["--steps", 300, *OPTIONS]


@pytest.fixture(scope="module")
def uninterrupted_long(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    toy(folder, *MANY, "--save-every", 0)
    return folder


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_run_killed_many_times_at_random_ends_exactly(seed, uninterrupted_long, tmp_path):
    killed = toy(tmp_path, *MANY, "--save-every", 2, "--kills", seed)
    assert int(re.findall(r"(\d+) kills", killed.text)[0]) >= 5
    assert_same_end(uninterrupted_long, tmp_path)


def test_accumulation_and_bfloat16_go_on_exactly(tmp_path):
    options = [*OPTIONS, "--accumulate", 3, "--precision", "bfloat16"]
    toy(tmp_path / "whole", *options)
    toy(tmp_path / "killed", *options, "--kill-after", 13, fails=True)
    toy(tmp_path / "killed", *options, "--resume")
    assert_same_end(tmp_path / "whole", tmp_path / "killed")


def test_a_full_disk_leaves_the_last_good_state(uninterrupted, tmp_path):
    """The kernel itself refuses to let files grow, from step 12 on."""
    stopped = toy(tmp_path, *OPTIONS, "--disk-full-after", 12, fails=True)
    assert re.search(r"OSError: step 15 could not be written to .*File too large.*the last good state is .*state-000000010", stopped.text)
    assert [path.name for path in tmp_path.glob("*state-*")] == ["state-000000010"]
    toy(tmp_path, *OPTIONS, "--resume")
    assert_same_end(uninterrupted, tmp_path)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    save_checkpoint(PixelGPT(PixelGPTConfig(size=6, bits=2, depth=1, heads=2, dim=16)), tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    code = f"""
import resource
from pathlib import Path
from minigen.pixelgpt import PixelGPT, PixelGPTConfig
from minigen.training import save_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, resource.RLIM_INFINITY))
save_checkpoint(PixelGPT(PixelGPTConfig(size=6, bits=2, depth=1, heads=2, dim=16)), Path({str(tmp_path)!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert re.search(r"OSError: .*model.safetensors could not be written \(.*one that was there before stays", done.stderr)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == before


# ---- in this process


def small_run(folder, steps=6, items=16, dim=4, resume=False, settings=None, stop=None, **options):
    torch.manual_seed(0)
    model, generator = nn.Linear(dim, 1), torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(items, dim, generator=generator))
    config = FitConfig(**dict(steps=steps, batch_size=4, save_every=1, precision="float32") | options)
    for record in fit(model, data, lambda m, b: m(b[0]).square().mean(), config, folder=folder, resume=resume, settings=settings):
        if record.step == stop:
            break
    return model


def test_a_write_that_fails_names_the_last_good_state(tmp_path, monkeypatch):
    real = torch.save

    def full(state, file):
        if state["step"] == 4:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        real(state, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="step 4 could not be written.*No space left on device.*the last good state is .*state-000000003"):
        small_run(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "state-000000003"]
    monkeypatch.undo()
    small_run(tmp_path, resume=True)
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_stopped_run_is_not_written_over(tmp_path):
    small_run(tmp_path, stop=4)
    with pytest.raises(ValueError, match=r"stopped after step 3: go on with it by resume=True \(--resume\)"):
        small_run(tmp_path)
    small_run(tmp_path, resume=True)
    small_run(tmp_path, resume=True)  # nothing is left to do
    assert last_state(tmp_path).name == "state-000000006"
    small_run(tmp_path / "nothing yet", resume=True)  # a job that starts itself again need not know whether it is the first


@pytest.mark.parametrize("change, named", [
    (dict(lr=0.5), r"fit.lr = 0.001, here 0.5"),
    (dict(lr=0.5, steps=7, items=20), r"fit.steps = 6, here 7; fit.lr = 0.001, here 0.5; items = 16, here 20"),
    (dict(betas=(0.9, 0.99)), r"fit.betas = \[0.9, 0.95\], here \[0.9, 0.99\]"),
    (dict(precision="bfloat16"), r"fit.precision = 'float32', here 'bfloat16'"),
    (dict(settings={"data": "photos"}), r"data, which the saved one does not have \(here 'photos'\)"),
])
def test_a_state_of_other_settings_is_refused(change, named, tmp_path):
    small_run(tmp_path, stop=4)
    with pytest.raises(ValueError, match=rf"state-000000003 belongs to a run with other settings: {named}\. Go on"):
        small_run(tmp_path, resume=True, **change)


def test_what_changes_no_number_may_change(tmp_path):
    small_run(tmp_path / "a")
    small_run(tmp_path / "b", stop=3)
    small_run(tmp_path / "b", resume=True, save_every=3, workers=1, tensorboard=True)
    a, b = (torch.load(last_state(tmp_path / name) / "state.pt")["weights"] for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_state_of_a_newer_version_is_refused(tmp_path):
    small_run(tmp_path, stop=4)
    path = last_state(tmp_path) / "settings.json"
    settings = json.loads(path.read_text())
    settings["fit"]["lookahead"] = 5
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="fit.lookahead = 5, which this version does not know"):
        small_run(tmp_path, resume=True)


def test_the_model_s_own_settings_must_agree(tmp_path):
    data = [torch.zeros(37, dtype=torch.int64)] * 4

    def run(dim, resume):
        from minigen.pixelgpt import next_pixel_loss

        model = PixelGPT(PixelGPTConfig(size=6, bits=1, depth=1, heads=1, dim=dim))
        list(fit(model, [tokens[:36] for tokens in data], next_pixel_loss, FitConfig(2, 2, save_every=1), folder=tmp_path, resume=resume))

    run(4, False)
    with pytest.raises(ValueError, match="model.dim = 4, here 8"):
        run(8, True)


# ---- several processes


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    return toy(folder, "--norm", "none", "--average").records, torch.load(folder / "end.pt", weights_only=True)


@pytest.mark.parametrize("launcher", [TORCHRUN, accelerate_launch("--multi_gpu")], ids=["torchrun", "accelerate"])
def test_two_processes_reach_the_losses_of_one(launcher, single, tmp_path):
    records, end = single
    shared = toy(tmp_path, "--norm", "none", "--average", launcher=launcher)
    assert [r[0] for r in shared.records] == [r[0] for r in records]
    for (step, loss, norm), (_, loss_of_one, norm_of_one) in zip(shared.records, records):
        assert loss == pytest.approx(loss_of_one, rel=1e-3) and norm == pytest.approx(norm_of_one, rel=1e-3), step
    ours = torch.load(tmp_path / "end.pt", weights_only=True)
    for part in end:
        torch.testing.assert_close(ours[part], end[part], rtol=1e-3, atol=1e-3)


def test_two_processes_go_on_exactly(tmp_path):
    options = ["--dropout", 0.2, "--norm", "none", "--average"]
    toy(tmp_path / "whole", *options, launcher=TORCHRUN)
    toy(tmp_path / "killed", *options, "--kill-after", 23, launcher=TORCHRUN, fails=True)
    toy(tmp_path / "killed", *options, "--resume", launcher=TORCHRUN)
    assert_same_end(tmp_path / "whole", tmp_path / "killed")


def test_a_divided_model_reaches_the_losses_of_one_and_goes_on(single, tmp_path):
    """Torch's `fully_shard` on two processors stands in for FSDP on GPUs: state, looks and resume are those of `fit`."""
    records, end = single
    options = ["--norm", "none", "--sharded"]
    killed = toy(tmp_path, *options, "--kill-after", 23, launcher=TORCHRUN, fails=True).records
    killed = [record for record in killed if record[0] <= 20]
    killed += toy(tmp_path, *options, "--resume", launcher=TORCHRUN).records
    assert [r[0] for r in killed] == list(range(1, 41))
    assert [r[1] for r in killed] == pytest.approx([r[1] for r in records], rel=1e-3)
    torch.testing.assert_close(torch.load(tmp_path / "end.pt", weights_only=True)["model"], end["model"], rtol=1e-3, atol=1e-3)


def test_another_number_of_processes_goes_on_with_a_warning(single, tmp_path):
    records, _ = single
    toy(tmp_path, "--norm", "none", "--kill-after", 23, launcher=TORCHRUN, fails=True)
    rest = toy(tmp_path, "--norm", "none", "--resume")
    assert "saved by 2 processes and there are 1 now" in rest.text
    assert [r[1] for r in rest.records] == pytest.approx([r[1] for r in records[20:]], rel=1e-3)


def test_accelerate_without_a_gpu_does_not_quietly_start_one_process(tmp_path):
    assert "add --multi_gpu" in toy(tmp_path, launcher=accelerate_launch(), fails=True).text


def test_a_batch_that_processes_cannot_share(tmp_path, monkeypatch):
    three = SimpleNamespace(process_index=0, num_processes=3, distributed_type=None)
    monkeypatch.setattr(training, "start_accelerator", lambda device: three)
    with pytest.raises(ValueError, match="a batch of 4 cannot be shared by 3 processes: take a multiple of 3"):
        small_run(tmp_path)


def test_averages_are_not_kept_of_a_divided_model(monkeypatch):
    from accelerate.utils import DistributedType

    divided = SimpleNamespace(process_index=0, num_processes=1, distributed_type=DistributedType.FSDP)
    monkeypatch.setattr(training, "start_accelerator", lambda device: divided)
    model = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="averaged weights are not kept of a model that FSDP divides"):
        next(fit(model, [torch.zeros(1)] * 8, None, FitConfig(), average=nn.Linear(1, 1)))
