"""Runs for the tests to start, to kill, and to launch on several processes.

    python tests/toy.py FOLDER [--steps N] [--resume] ...

is a run of `fit`, which prints [step, loss, norm] after each step and at its end writes
every tensor to FOLDER/end.pt. With `--task` it is one of `minigen.runs.run` instead.
With `--kills SEED` it is killed ten times, at random steps and file operations.

    python tests/toy.py serve

reads such command lines, as JSON lists behind the file to print to, and runs each in a
fork of this process, which has the slow imports behind it.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import signal
import sys
import traceback
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch._dynamo  # which the optimizer would import
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from minigen import training
from minigen.devices import is_main_process
from minigen.gpt import GPT, GPTConfig
from minigen.runs import TINY, RunConfig, Task, presets
from minigen.runs import run as run_task
from minigen.training import FitConfig, fit

KILLS, STEPS = 10, 150  # a killed attempt makes at most 12 steps
NUMBERS = {"steps": 40, "batch_size": 8, "accumulate": 1, "save_every": 5, "seed": 0,
           "kill_after": 0, "kill_before": 0, "disk_full_after": 0}
FLAGS = ("resume", "overwrite", "ema", "sharded", "task")


def main(arguments):
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    for name, default in NUMBERS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--kills", type=int, help="the seed of many kills")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--norm", choices=["batch", "none"], default="batch")
    for name in FLAGS:
        parser.add_argument(f"--{name}", action="store_true")
    options = parser.parse_args(arguments)
    if options.kills is not None:
        run_and_kill(options)
    elif options.task:
        kill_before(options.kill_before)
        run_task("toy", replace(
            PRESETS["test"], out=options.folder, seed=options.seed,
            resume=options.resume, overwrite=options.overwrite), PRESETS, build)
    else:
        run(options)


# ---- a run of `fit`


def data(items=96):
    x = torch.randn(items, 3, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, (x @ torch.tensor([[1.0], [-2.0], [0.5]])).sin() + 0.3)


def loss(model, batch):
    x, y = batch
    noise = np.random.rand() * 1e-3  # so that the state of NumPy's generator matters
    return (model(x + noise) - y).square().mean()


def run(options):
    """Train to the end, or until killed."""
    np.random.seed(0)
    torch.manual_seed(0)
    # statistics of a batch would differ where processes share the batch
    norm = nn.BatchNorm1d(16) if options.norm == "batch" else nn.Identity()
    net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), norm, nn.Dropout(options.dropout),
                        nn.Linear(16, 1))
    ema_model = deepcopy(net) if options.ema else None
    config = FitConfig(
        steps=options.steps, batch_size=options.batch_size, lr=0.01, warmup=5,
        accumulate=options.accumulate, save_every=options.save_every,
        eval_steps=(10, 20), precision=options.precision)
    kill_before(options.kill_before)
    if options.sharded:
        shard()
    done = 0
    for record in fit(net, data(), loss, config, ema_model=ema_model,
                      folder=options.folder, resume=options.resume):
        done += 1
        if record.evaluate:  # draws from the generator that dropout draws from
            record.metrics["drawn"] = float(torch.rand(()))
        if is_main_process():
            print(json.dumps([record.step, record.loss, record.norm]), flush=True)
        if done == options.kill_after:
            with open(options.folder / "log.jsonl", "a") as log:
                log.write('{"step": ')  # half a line
            os.kill(os.getpid(), signal.SIGKILL)
        if record.step == options.disk_full_after:  # no file may grow beyond this
            resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, resource.RLIM_INFINITY))
    if is_main_process():
        end = {"model": net.state_dict(), "ema": ema_model and ema_model.state_dict()}
        torch.save(end, options.folder / "end.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def shard():
    """Let torch's `fully_shard` on processors stand in for accelerate's FSDP."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedType
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    start = training.start_accelerator

    def prepare(objective, optimizer):
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        fully_shard(objective, mesh=mesh)
        groups = training.decay_groups(objective, 0.1)
        wrapped = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95))
        wrapped.optimizer = wrapped
        return objective, wrapped

    def start_sharded(device):
        accelerator = start(device)
        accelerator.prepare = prepare
        accelerator.state.distributed_type = DistributedType.FSDP
        Accelerator.no_sync = lambda self, model: contextlib.nullcontext()
        accelerator.clip_grad_norm_ = nn.utils.clip_grad_norm_
        return accelerator

    training.start_accelerator = start_sharded


# ---- a run of `minigen.runs.run`


@dataclass(kw_only=True)
class Config(RunConfig):
    """A script's: fields of its own, and another default of one of `FitConfig`."""

    width: int = 8
    codes: Path = Path("codes")
    clip: float = 0.5


PRESETS = presets(Config, test=TINY | {
    "steps": 2, "save_every": 2, "eval_steps": (), "ema": 0.9})


def build(config, device):
    shape = GPTConfig(vocab_size=8, block_size=4, depth=1, heads=1, dim=config.width)
    tokens = torch.randint(8, (16, 5), generator=torch.Generator().manual_seed(0))

    def loss(model, batch):
        return F.cross_entropy(model(batch[:, :-1]).mT, batch[:, 1:])

    return Task(model=GPT(shape).to(device), data=list(tokens), val=list(tokens[:8]),
                loss=loss, evaluate=lambda model, step: {"drawn": torch.rand(1).item()},
                summarize=lambda model, last: {"twice": (1, 2), "extra": {"more": 3}},
                parts_per_image=4, settings={"codes": config.codes})


# ---- kills


def kill_before(number):
    """SIGKILL this process before its file operation of this number, if not 0."""
    if not number:
        return
    calls = []

    def deadly(module, name):
        real = getattr(module, name)

        def operation(*arguments, **options):
            calls.append(name)
            if len(calls) == number:
                if name == "save":
                    arguments[1].write(b"half a state")
                    arguments[1].flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        setattr(module, name, operation)

    for name in ("replace", "rename", "unlink", "rmdir", "fsync"):
        deadly(os, name)
    deadly(torch, "save")


def run_and_kill(options):
    """Kill a run as often as `KILLS` says, in forks, and then let it end."""
    chance = random.Random(options.kills)
    options.resume = True
    for _ in range(KILLS):
        child = os.fork()
        options.kill_after, options.kill_before = chance.choice(
            [(chance.randint(1, 10), 0), (0, chance.randint(1, 60))])
        if not child:
            finish(lambda: run(options), "/dev/null")
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status != -signal.SIGKILL:
            raise SystemExit(f"a run was to be killed and ended with status {status}")
    options.kill_after = options.kill_before = 0
    run(options)


def serve():
    """Run each command line that comes in, and answer with its exit status."""
    for line in sys.stdin:
        output, *arguments = json.loads(line)
        child = os.fork()
        if not child:
            finish(lambda arguments=arguments: main(arguments), output)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def finish(function, output):
    """Call `function`, printing to the file `output`, and end this process."""
    status, file = 1, os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    try:
        function()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["serve"] else main(sys.argv[1:])
