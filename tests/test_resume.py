"""A run that is stopped, however it is stopped, resumes as if it had not been.

The same for a run on several processes, for files, and for a run that is finished.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from torch import nn
from torch.testing import assert_close
from torch.utils.data import TensorDataset
from toy import PRESETS, build

from minigen import training
from minigen.checkpoints import latest_state, load, save_checkpoint
from minigen.files import (
    atomic_dir,
    atomic_rmtree,
    lock_folder,
    read_json,
    reserve,
    write_json,
)
from minigen.pixelgpt import PixelGPT, PixelGPTConfig, next_pixel_loss
from minigen.runs import run
from minigen.training import (
    FitConfig,
    Trainer,
    fit,
    leave_if,
    notice_sigterm,
    read_log,
)

TOY = str(Path(__file__).with_name("toy.py"))
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--nproc_per_node", "2"]


def accelerate_launch(*options):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch",
            "--num_processes", "2", "--main_process_port", str(port), *options]


@pytest.fixture(scope="module")
def server():
    """`tests/toy.py serve`: a fork takes no time, and importing torch takes seconds."""
    process = subprocess.Popen([sys.executable, TOY, "serve"], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def toy(server):
    """Run `tests/toy.py`: what it printed, as records and as text, and its status."""

    def start(folder, *options, launcher=None, status=0):
        arguments = [str(folder), *map(str, options)]
        output = folder.with_name(folder.name + ".out")
        if launcher is None:
            server.stdin.write(json.dumps([str(output), *arguments]) + "\n")
            server.stdin.flush()
            found = int(server.stdout.readline())
        else:
            with open(output, "w") as file:
                found = subprocess.run([*launcher, TOY, *arguments], stdout=file,
                                       stderr=subprocess.STDOUT, timeout=300).returncode
        text = output.read_text()
        assert status is None or found == status, text
        lines = [line for line in text.splitlines() if re.fullmatch(r"\[\d.*\]", line)]
        return SimpleNamespace(records=[json.loads(line) for line in lines], text=text,
                               status=found)

    return start


def assert_same_end(a, b):
    """Equal bit for bit: all tensors at the end, and the logs but for the clock."""
    ours, theirs = (torch.load(folder / "end.pt") for folder in (a, b))
    assert_close(ours, theirs, rtol=0, atol=0)
    ours, theirs = ([line | {"seconds": 0} for line in read_log(folder)]
                    for folder in (a, b))
    assert ours == theirs


def newest(folder):
    """The last state in a folder, which holds it and at most the one before."""
    found = names(folder, "*state-*")
    assert len(found) <= 2
    assert not any(name.startswith(".") for name in found), "a kill left this"
    return found[-1]


def names(folder, pattern="*"):
    """What is in a folder, without the files of its lock."""
    return sorted(path.name for path in folder.glob(pattern)
                  if not path.name.startswith(".lock"))


RANDOM = ["--dropout", "0.2", "--ema"]  # the toy adds NumPy's, and draws at evaluations
LONG = ["--steps", 150, *RANDOM]


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory):
    """Runs that were never stopped, with nothing ever saved: by their options."""
    folders = {}

    def find(*options):
        if options not in folders:
            folders[options] = tmp_path_factory.mktemp("whole")
            toy(folders[options], *options, "--save-every", 0)
        return folders[options]

    return find


@pytest.mark.parametrize(("save_every", "stop"), [(1, 17), (7, 25), (5, 40), (40, 3)])
def test_a_killed_run_resumes_exactly(save_every, stop, toy, whole, tmp_path):
    options = [*RANDOM, "--save-every", save_every]
    killed = toy(tmp_path, *options, "--kill-after", stop, status=-9)
    assert killed.records[-1][0] == stop
    rest = toy(tmp_path, *options, "--resume").records
    assert rest[0][0] == (stop - 1) // save_every * save_every + 1
    assert_same_end(whole(*RANDOM), tmp_path)
    assert newest(tmp_path) == "state-000000040"


@pytest.mark.parametrize("operation", range(1, 26))
def test_a_run_killed_while_it_writes_resumes_exactly(operation, toy, whole, tmp_path):
    """Before each file operation of the first two states, with half a file written."""
    options = (*RANDOM, "--steps", 12)
    toy(tmp_path, *options, "--kill-before", operation, status=-9)
    toy(tmp_path, *options, "--resume")
    assert_same_end(whole(*options), tmp_path)
    assert newest(tmp_path) == "state-000000012"


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_run_killed_many_times_at_random_ends_exactly(seed, toy, whole, tmp_path):
    toy(tmp_path, *LONG, "--save-every", 2, "--kills", seed)
    assert_same_end(whole(*LONG), tmp_path)


def test_accumulation_and_bfloat16_resume_exactly(toy, whole, tmp_path):
    options = (*RANDOM, "--accumulate", 3, "--precision", "bfloat16")
    toy(tmp_path, *options, "--kill-after", 13, status=-9)
    toy(tmp_path, *options, "--resume")
    assert_same_end(whole(*options), tmp_path)


def test_a_full_disk_leaves_the_last_good_state(toy, whole, tmp_path):
    """The kernel itself refuses to let files grow, from step 12 on."""
    stopped = toy(tmp_path, *RANDOM, "--disk-full-after", 12, status=1)
    assert re.search(r"OSError: step 15 could not be written to .*File too large.*the "
                     "last good state is .*state-000000010", stopped.text)
    assert newest(tmp_path) == "state-000000010"
    toy(tmp_path, *RANDOM, "--resume")
    assert_same_end(whole(*RANDOM), tmp_path)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    shape = "PixelGPT(PixelGPTConfig(size=6, bits=2, depth=1, heads=2, dim=16))"
    save_checkpoint(eval(shape), tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    code = f"""
import resource
from minigen.pixelgpt import PixelGPT, PixelGPTConfig
from minigen.checkpoints import save_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, resource.RLIM_INFINITY))
save_checkpoint({shape}, {str(tmp_path)!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert re.search(r"OSError: .*model.safetensors could not be written \(.*an "
                     "existing file is unchanged", done.stderr)
    assert names(tmp_path) == ["config.json", "model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == before


# ---- `fit` in this process


def small_run(folder, items=16, resume=False, settings=None, stop=None, **options):
    torch.manual_seed(0)
    model, generator = nn.Linear(4, 1), torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(items, 4, generator=generator))
    config = FitConfig(**{"steps": 6, "batch_size": 4, "save_every": 1,
                          "precision": "float32"} | options)
    for record in fit(model, data, lambda m, b: m(b[0]).square().mean(), config,
                      folder=folder, resume=resume, settings=settings):
        if record.step == stop:
            break
    return model


def test_sigterm_saves_a_state_and_ends_with_its_status(tmp_path, capsys, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    real = Trainer.step

    def asked(self, step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, step)

    monkeypatch.setattr(Trainer, "step", asked)
    with pytest.raises(SystemExit) as left:
        small_run(tmp_path / "cut", save_every=100)
    monkeypatch.undo()
    assert left.value.code == 143
    assert "ended by SIGTERM; a run continues with --resume" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        leave_if(True, None)
    assert "nothing was saved" in capsys.readouterr().err
    assert newest(tmp_path / "cut") == "state-000000004"
    assert signal.getsignal(signal.SIGTERM) is before
    cut = small_run(tmp_path / "cut", save_every=100, resume=True)
    whole = small_run(tmp_path / "whole", save_every=100)
    for ours, theirs in zip(cut.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_sigterm_of_one_of_several_processes_is_not_ours():
    before = signal.getsignal(signal.SIGTERM)
    with notice_sigterm(processes=2):
        assert signal.getsignal(signal.SIGTERM) is before


def test_a_write_that_fails_names_the_last_good_state(tmp_path, monkeypatch):
    real = torch.save

    def full(state, file):
        if state["step"] == 4:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        real(state, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="step 4 could not be written.*No space left on "
                       "device.*the last good state is .*state-000000003"):
        small_run(tmp_path)
    assert names(tmp_path) == ["log.jsonl", "state-000000002", "state-000000003"]
    monkeypatch.undo()
    small_run(tmp_path, resume=True)
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_stopped_run_is_not_overwritten(tmp_path):
    small_run(tmp_path, stop=4)
    with pytest.raises(ValueError, match="stopped after step 3: resume it with"):
        small_run(tmp_path)
    small_run(tmp_path, resume=True)
    small_run(tmp_path, resume=True)  # nothing is left to do
    assert latest_state(tmp_path).name == "state-000000006"
    small_run(tmp_path / "new", resume=True)  # a job need not know if it is the first


@pytest.mark.parametrize(("change", "named"), [
    ({"lr": 0.5}, r"fit.lr = 0.001, here 0.5"),
    ({"lr": 0.5, "steps": 7, "items": 20}, "fit.steps = 6, here 7; fit.lr = 0.001, "
     "here 0.5; items = 16, here 20"),
    ({"betas": (0.9, 0.99)}, r"fit.betas = \[0.9, 0.95\], here \[0.9, 0.99\]"),
    ({"precision": "bfloat16"}, "fit.precision = 'float32', here 'bfloat16'"),
    ({"settings": {"data": "photos"}}, r"data, .* saved one lacks \(here 'photos'\)"),
])
def test_a_state_of_other_settings_is_refused(change, named, tmp_path):
    small_run(tmp_path, stop=4)
    with pytest.raises(ValueError, match="state-000000003 belongs to a run with other "
                       rf"settings: {named}\. Resume with"):
        small_run(tmp_path, resume=True, **change)


def test_a_state_of_a_newer_version_is_refused(tmp_path):
    small_run(tmp_path, stop=4)
    path = latest_state(tmp_path) / "settings.json"
    settings = read_json(path)
    settings["fit"]["lookahead"] = 5
    write_json(path, settings)
    with pytest.raises(ValueError, match="fit.lookahead = 5, which this version"):
        small_run(tmp_path, resume=True)


def test_what_changes_no_number_may_change(tmp_path):
    small_run(tmp_path / "a")
    small_run(tmp_path / "b", stop=3)
    small_run(tmp_path / "b", resume=True, save_every=3, workers=1, tensorboard=True)
    a, b = (torch.load(latest_state(tmp_path / name) / "state.pt") for name in "ab")
    assert_close(a["weights"], b["weights"], rtol=0, atol=0)


def test_the_settings_of_the_model_must_agree(tmp_path):
    def run_of(dim, resume=False):
        model = PixelGPT(PixelGPTConfig(size=6, bits=1, depth=1, heads=1, dim=dim))
        data = [torch.zeros(36, dtype=torch.int64)] * 4
        list(fit(model, data, next_pixel_loss, FitConfig(steps=2, save_every=1,
             batch_size=2), folder=tmp_path, resume=resume))

    run_of(4)
    with pytest.raises(ValueError, match="model.dim = 4, here 8"):
        run_of(8, resume=True)


# ---- several processes: the same numbers up to rounding, which 40 steps may multiply

PLAIN = ("--norm", "none")
CLOSE = {"rtol": 1e-2, "atol": 1e-2}


def end(folder):
    return torch.load(folder / "end.pt")


def assert_close_losses(records, expected):
    assert [r[0] for r in records] == [r[0] for r in expected]
    for ours, theirs in zip(records, expected, strict=True):
        assert ours[1:] == pytest.approx(theirs[1:], rel=1e-2)


@pytest.mark.parametrize(("launcher", "options"), [
    (TORCHRUN, ("--accumulate", 2)), (accelerate_launch("--multi_gpu"), ())],
    ids=["torchrun", "accelerate"])
def test_two_processes_reach_the_losses_of_one(launcher, options, toy, tmp_path):
    """With two batches in a step, gradients are exchanged when both are added up."""
    options = [*PLAIN, "--ema", *options]
    one = toy(tmp_path / "one", *options).records
    two = toy(tmp_path / "two", *options, launcher=launcher).records
    assert_close_losses(two, one)
    assert_close(end(tmp_path / "two"), end(tmp_path / "one"), **CLOSE)


def test_two_processes_resume_exactly(toy, tmp_path):
    options = ["--dropout", 0.2, "--norm", "none", "--ema"]
    toy(tmp_path / "whole", *options, launcher=TORCHRUN)
    toy(tmp_path / "killed", *options, "--kill-after", 23, launcher=TORCHRUN, status=1)
    toy(tmp_path / "killed", *options, "--resume", launcher=TORCHRUN)
    assert_same_end(tmp_path / "whole", tmp_path / "killed")


def test_a_sharded_model_reaches_the_losses_of_one_and_resumes(toy, whole, tmp_path):
    """State, evaluation and resume are those of `fit`; the sharding is torch's."""
    options = [*PLAIN, "--sharded"]
    first = toy(tmp_path, *options, "--kill-after", 23, launcher=TORCHRUN, status=1)
    rest = toy(tmp_path, *options, "--resume", launcher=TORCHRUN)
    expected = whole(*PLAIN)
    assert_close_losses(first.records[:20] + rest.records,
                        [(r["step"], r["loss"], r["norm"]) for r in read_log(expected)])
    assert_close(end(tmp_path)["model"], end(expected)["model"], **CLOSE)


def test_another_number_of_processes_resumes_with_a_warning(toy, whole, tmp_path):
    toy(tmp_path, *PLAIN, "--kill-after", 23, launcher=TORCHRUN, status=1)
    rest = toy(tmp_path, *PLAIN, "--resume")
    assert "saved by 2 processes and resumes with 1" in rest.text
    assert_close_losses(rest.records, [(r["step"], r["loss"], r["norm"])
                                       for r in read_log(whole(*PLAIN))[20:]])


def test_accelerate_without_a_gpu_does_not_quietly_start_one_process(toy, tmp_path):
    done = toy(tmp_path, launcher=accelerate_launch(), status=1)
    assert "add --multi_gpu" in done.text


@pytest.mark.parametrize(("processes", "kind", "message"), [
    (3, None, "a batch of 8 cannot be shared by 3 processes: choose a multiple of 3"),
    (1, DistributedType.FSDP, "averaged weights are not kept of a model that FSDP")])
def test_what_processes_cannot_do(processes, kind, message, monkeypatch):
    state = SimpleNamespace(process_index=0, num_processes=processes,
                            distributed_type=kind)
    monkeypatch.setattr(training, "start_accelerator", lambda device: state)
    with pytest.raises(ValueError, match=message):
        next(fit(nn.Linear(1, 1), [torch.zeros(1)] * 8, None, FitConfig(),
                 ema_model=nn.Linear(1, 1)))


# ---- files and locks


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_json(tmp_path / "a.json", {"x": 2})
    assert read_json(tmp_path / "a.json") == {"x": 1}
    assert names(tmp_path) == ["a.json"]


def write_folder(folder, text):
    with atomic_dir(folder) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "note.txt").write_text(text)
        if text == "bad":
            raise ValueError(text)


def test_atomic_dir_replaces_a_folder_that_is_not_empty(tmp_path):
    for text in ("one", "two"):
        write_folder(tmp_path / "a", text)
        assert (tmp_path / "a/sub/note.txt").read_text() == text
    with pytest.raises(ValueError, match="bad"):
        write_folder(tmp_path / "a", "bad")
    assert (tmp_path / "a/sub/note.txt").read_text() == "two"
    assert names(tmp_path) == ["a"]
    atomic_rmtree(tmp_path / "a")
    assert names(tmp_path) == []


@pytest.mark.parametrize("killed_at", [1, 2])
def test_atomic_dir_survives_a_kill_between_its_renames(killed_at, tmp_path):
    """The old folder is there or comes back; and a later write is not disturbed."""
    write_folder(tmp_path / "a", "one")
    code = f"""
import os, pathlib, signal, sys
from minigen.files import atomic_dir
real, calls = os.replace, []
def deadly(*paths):
    calls.append(paths)
    if len(calls) == {killed_at}:
        os.kill(os.getpid(), signal.SIGKILL)
    real(*paths)
os.replace = deadly
with atomic_dir(sys.argv[1]) as folder:
    (folder / "note.txt").write_text("two")
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")])
    assert done.returncode == -9
    assert (tmp_path / "a").exists() == (killed_at == 1)
    with pytest.raises(ValueError, match="bad"):
        write_folder(tmp_path / "a", "bad")
    assert (tmp_path / "a/sub/note.txt").read_text() == "one"
    write_folder(tmp_path / "a", "three")
    assert (tmp_path / "a/sub/note.txt").read_text() == "three"
    assert names(tmp_path) == ["a"]


def test_reserved_space_is_there(tmp_path):
    (tmp_path / "a").touch()
    reserve(tmp_path / "a", 10_000)
    assert (tmp_path / "a").stat().st_size == 10_000
    with pytest.raises(OSError, match="space|large"):
        reserve(tmp_path / "a", 2**60)


HOLD = """
import sys
from pathlib import Path
from minigen.files import lock_folder
print("started", flush=True)
with lock_folder(sys.argv[1], wait=bool(sys.argv[2:])):
    print("held", (Path(sys.argv[1]) / "released").exists(), flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def hold():
    """Start processes that hold a folder, or wait for it, until they are killed."""
    processes = []

    def start(folder, *options):
        processes.append(subprocess.Popen(
            [sys.executable, "-c", HOLD, str(folder), *options], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        assert processes[-1].stdout.readline() == "started\n"
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def test_a_folder_is_held_until_its_process_dies(hold, tmp_path):
    holder = hold(tmp_path)
    assert holder.stdout.readline() == "held False\n"
    named = f"in use by process {holder.pid} on {socket.gethostname()}: wait"
    with pytest.raises(BlockingIOError, match=named), lock_folder(tmp_path):
        pass
    with pytest.raises(BlockingIOError, match=named):  # a second run
        run("toy", replace(PRESETS["test"], out=tmp_path, resume=True), PRESETS, build)
    assert names(tmp_path) == []
    waiter = hold(tmp_path, "wait")
    (tmp_path / "released").touch()
    holder.kill()
    assert waiter.stdout.readline() == "held True\n"
    waiter.kill()
    waiter.wait()
    with lock_folder(tmp_path):  # what the dead left behind is no obstacle
        pass


# ---- a run that is finished


def toy_run(folder, **changes):
    return run("toy", replace(PRESETS["test"], out=folder, **changes), PRESETS, build)


def test_a_finished_run_stays_finished(tmp_path):
    result = toy_run(tmp_path)
    assert result == read_json(tmp_path / "result.json")
    assert result["metrics"]["twice"] == [1, 2]
    assert result["more"] == 3
    assert names(tmp_path) == ["config.json", "log.jsonl", "model.safetensors",
                               "result.json"]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("[!.]*")}
    assert toy_run(tmp_path, resume=True, save_every=9, workers=1) == result
    for changes in ({}, {"seed": 1}):
        with pytest.raises(ValueError, match="holds a finished run: .* --overwrite"):
            toy_run(tmp_path, **changes)
    with pytest.raises(ValueError, match=r"other settings: lr = 0.002, here 0.5; "
                       r"eval_steps = \[\], here \[1\]\. Choose"):
        toy_run(tmp_path, resume=True, lr=0.5, eval_steps=(1,))
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("[!.]*")}
    (tmp_path / "classes.png").write_bytes(b"of the old model")
    other = toy_run(tmp_path, overwrite=True, seed=1)
    assert not (tmp_path / "classes.png").exists()
    assert other["seed"] == 1
    assert other["metrics"]["val_loss"] != result["metrics"]["val_loss"]
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2]


def test_no_kill_leaves_an_old_result_beside_a_newer_model(toy, tmp_path):
    """An overwriting run, killed before each of its file operations.

    Nor does one lose a state that the result has not replaced yet.
    """
    toy_run(tmp_path / "0")
    toy_run(tmp_path / "1", seed=1)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "01"]
    states, operation, saved = set(), 0, False
    while True:
        operation += 1
        folder = tmp_path / f"killed-{operation}"
        shutil.copytree(tmp_path / "0", folder)
        options = [folder, "--task", "--seed", 1, "--kill-before", operation]
        status = toy(*options, "--overwrite", status=None).status
        found = None
        if (folder / "result.json").exists():
            found = read_json(folder / "result.json")["seed"]
            assert (folder / "model.safetensors").read_bytes() == weights[found]
        resumable = latest_state(folder) is not None
        assert resumable or found is not None or not saved
        saved |= resumable
        states.add((found, status))
        if status == 0:
            break
        toy(*options[:-2], "--overwrite" if found == 0 else "--resume")
        assert (folder / "model.safetensors").read_bytes() == weights[1]
        assert names(folder, "*state-*") == []
        assert load(folder).config.dim == 8
    assert states == {(0, -9), (None, -9), (1, -9), (1, 0)}
