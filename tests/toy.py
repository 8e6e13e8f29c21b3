"""A run that has nothing to do with pictures, for `test_training.py` to start, kill and launch on several processes.

    python tests/toy.py FOLDER [--steps N] [--resume] [--average] ...

It prints one JSON line a step, and at its end writes every tensor of the model (and of its average) to FOLDER/end.pt. With
`--kills SEED` it starts itself again and again, each time to be killed at a random moment, until a run comes to its end.

    python tests/toy.py serve

reads such command lines, as JSON lists behind the file to print to, and runs each in a fork of this process, which has the slow
imports behind it.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
import torch._dynamo  # which the optimizer would import
from torch import nn
from torch.utils.data import TensorDataset

from minigen import training
from minigen.training import FitConfig, fit, is_main_process


def model(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.BatchNorm1d(16), nn.Dropout(dropout), nn.Linear(16, 1))


def data(items=96, poison=None):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(items, 3, generator=generator)
    y = (x @ torch.tensor([[1.0], [-2.0], [0.5]])).sin() + 0.3
    if poison is not None:
        y[poison] = math.nan
    return TensorDataset(x, y)


def loss(model, batch):
    x, y = batch
    noise = np.random.rand() * 1e-3  # from NumPy's global generator, so that its state matters
    return (model(x + noise) - y).square().mean()


def main(arguments):
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    for name, default in dict(steps=40, batch_size=8, accumulate=1, save_every=5, kill_after=0, disk_full_after=0).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--kill-at", help="SIGKILL at a call: os:replace:2 is before the second renaming of a state")
    parser.add_argument("--kills", type=int, help="the seed of many kills")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--norm", choices=["batch", "none"], default="batch")
    for name in ("resume", "average", "sharded"):
        parser.add_argument(f"--{name}", action="store_true")
    options = parser.parse_args(arguments)
    if options.kills is None:
        run(options)
    else:
        print(run_and_kill(options), "kills")


def run(options):
    """Train to the end, or until killed."""
    np.random.seed(0)
    net = model(options.dropout)
    if options.norm == "none":  # statistics of a batch differ where the batch is divided
        net[2] = nn.Identity()
    average = deepcopy(net) if options.average else None
    config = FitConfig(options.steps, options.batch_size, options.accumulate, lr=0.01, warmup=5, save_every=options.save_every,
                       look_at=(10, 20), precision=options.precision)
    if options.kill_at:
        kill_before(*options.kill_at.split(":"))
    if options.sharded:
        shard()
    records = fit(net, data(), loss, config, average=average, folder=options.folder, resume=options.resume)
    for record in records:
        if record.look:
            record.metrics["drawn"] = float(torch.rand(()))  # looking draws from the same generator as dropout
        if is_main_process():
            print(json.dumps([record.step, record.loss, record.norm]), flush=True)
        if record.step == options.kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        if record.step == options.disk_full_after:  # no file may grow beyond this any more
            resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, resource.RLIM_INFINITY))
    if is_main_process():
        torch.save({"model": net.state_dict(), "average": average and average.state_dict()}, options.folder / "end.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def serve():
    """Run each command line that comes in, and answer with its exit status."""
    for line in sys.stdin:
        output, *arguments = json.loads(line)
        child = os.fork()
        if not child:
            finish(lambda: main(arguments), output)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def finish(function, output):
    """Call `function`, what it prints going to the file `output`, and end this process."""
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


def run_and_kill(options):
    """Start runs in forks of this process, which has all imports behind it, and kill each at a random moment: how many it took."""
    moments = random.Random(options.kills)
    for kills in itertools.count():
        child = os.fork()
        if not child:
            options.resume = True
            finish(lambda: run(options), "/dev/null")
        time.sleep(moments.uniform(0.0, 0.4))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if status == 0:
            return kills
        if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
            raise SystemExit(f"a run failed by itself after {kills} kills")


def kill_before(where, name, number):
    """SIGKILL this process when `where.name` is called for the `number`-th time about a state."""
    module = {"os": os, "torch": torch, "shutil": shutil, "training": training}[where]
    real, calls = getattr(module, name), []

    def deadly(*arguments, **options):
        if "state-" in " ".join(map(str, arguments[:2])) or name == "save":
            calls.append(1)
            if len(calls) == int(number):
                if name == "save":  # half of the file is there
                    arguments[1].write(b"half a state")
                    arguments[1].flush()
                os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)

    setattr(module, name, deadly)


def shard():
    """Let `accelerate` divide the model as FSDP does on GPUs, here on processors by torch's own `fully_shard`."""
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
        accelerator.clip_grad_norm_ = lambda parameters, clip: nn.utils.clip_grad_norm_(parameters, clip)
        return accelerator

    training.start_accelerator = start_sharded


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["serve"] else main(sys.argv[1:])
