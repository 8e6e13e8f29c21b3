"""`python -m minigen reproduce`, and the tables of systems that are read from files."""

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minigen import reproduce, runs, systems
from minigen.__main__ import main, script
from minigen.files import read_json, write_json
from minigen.reproduce import ReproduceOptions

ROOT = Path(__file__).resolve().parents[1]
FREE = {"tokenizer", "codes_in", "init", "out", "resume", "overwrite", "save_every",
        "workers", "data"}


def config_of(job):
    """The configuration that the job's command stands for."""
    import tyro

    chapter, *words = job.train()[1:]
    module = script(chapter)
    return tyro.cli(module.Config, default=module.PRESETS[job.preset],
                    args=words[2:])


def jobs(preset, out):
    return reproduce.plan(ReproduceOptions(preset=preset, out=out))


@pytest.mark.parametrize("preset", ["test", "demo", "cpu", "full"])
def test_dependencies_come_first(preset, tmp_path):
    done = set()
    for job in jobs(preset, tmp_path):
        assert set(job.system.needs(preset)) <= done, job.system.name
        done.add(job.system.name)
        assert config_of(job).preset == preset
    assert {system.name for system in systems.compared()} <= done


def test_the_recipes_are_those_of_what_ships(tmp_path):
    known = 0
    for job in jobs("cpu", tmp_path):
        file = runs.DATA / "results" / f"{job.folder.name}.json"
        if not file.exists():
            continue
        known += 1
        ours, theirs = runs.as_json(config_of(job)), read_json(file)["config"]
        for name in set(ours) & set(theirs) - FREE:
            assert ours[name] == theirs[name], (job.folder.name, name)
        for name in {"tokenizer", "init"} & set(ours):  # another folder, the same run
            assert Path(theirs[name]).name == Path(ours[name]).name, job.folder.name
    assert known > 10


def test_what_ships_keeps_to_the_budget():
    for each in systems.measured():
        if each.flops is not None:
            assert each.flops < 1.05 * 5e14, each.run


MINIATURE = ["--preset", "test", "--count", "72"]


def start(out, *more):
    return subprocess.Popen(
        [sys.executable, "-m", "minigen", "reproduce", *MINIATURE, "--out", str(out),
         *more], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(file, process, seconds=240):
    end = time.time() + seconds
    while not file.exists():
        assert process.poll() is None, process.stdout.read()
        assert time.time() < end, f"no {file} after {seconds} s"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory):
    """All systems at the smallest preset, killed twice on the way."""
    out = tmp_path_factory.mktemp("reproduce")
    first = start(out)  # killed in the middle of a training
    wait_for(out / "pixelgpt-test-64" / "log.jsonl", first)
    first.kill()
    first.wait()
    tokenizer = (out / "vq-test-tokens64" / "result.json").stat().st_mtime_ns
    second = start(out)  # asked to end, as --minutes does
    wait_for(out / "maskgit-test-tokens64" / "config.json", second)
    second.send_signal(signal.SIGTERM)
    words = second.communicate(timeout=120)[0]
    assert second.returncode == 128 + signal.SIGTERM, words
    assert "Stopped; the same command goes on." in words
    assert not (out / "anytoany-test-tokens64").exists()
    last = start(out)
    words = last.communicate(timeout=400)[0]
    assert last.returncode == 0, words
    assert (out / "vq-test-tokens64" / "result.json").stat().st_mtime_ns == tokenizer
    return out, words


def test_reproduce_goes_on_after_a_kill(reproduced):
    out, words = reproduced
    for job in jobs("test", out):
        assert job.state() == "done", job.folder.name
        assert (out / "data" / "checkpoints" / job.folder.name).is_dir()
        result = read_json(job.kept)
        assert result["evaluation"]["N"] == 72
        assert re.search(rf"^{job.folder.name} +\S", words, re.M), "not in the plan"
    assert systems.MISSING not in words.partition("| system |")[2]
    pictures = {file.name for file in (out / "data" / "results").glob("*.png")}
    assert {"imagegpt-test-tokens64-classes.png", "diffusion-test-classes-steps.png",
            "vq-test-tokens256-steps.png"} <= pictures


def test_models_are_trained_on_the_reproduced_tokenizers(reproduced):
    out, _ = reproduced
    for name in ("imagegpt-test-tokens64", "maskgit-test-tokens64",
                 "diffusion-test-tokens64"):
        used = read_json(out / name / "result.json")["config"]["tokenizer"]
        assert used == str(out / "data" / "checkpoints" / "vq-test-tokens64")


def test_check_finds_a_planted_number(reproduced, capsys):
    out, _ = reproduced
    words = ["reproduce", "--check", "--preset", "test", "--data", str(out / "data"),
             "--only", "imagegpt-tokens64"]
    assert main(words) == 0, capsys.readouterr().out
    assert re.search(r"All \d\d? figures agree\.", capsys.readouterr().out)
    file = out / "data" / "results" / "imagegpt-test-tokens64.json"
    right = read_json(file)
    wrong = json.loads(json.dumps(right))
    wrong["evaluation"]["figures"]["FD-landscape"]["value"] *= 0.9
    write_json(file, wrong)
    try:
        assert main(words) == 1
    finally:
        write_json(file, right)
    said = capsys.readouterr().out
    assert re.search(r"Of \d+ figures, 1 differ", said)
    assert re.search("FD-landscape.*DIFFERS", said)


def test_check_fails_if_there_is_nothing_to_check(tmp_path, capsys):
    assert main(["reproduce", "--check", "--data", str(tmp_path)]) == 2
    assert "nothing was compared" in capsys.readouterr().err


def test_what_a_system_needs_is_trained_too_unless_it_ships(tmp_path):
    def names(preset):
        return [job.system.name for job in reproduce.plan(ReproduceOptions(
            preset=preset, out=tmp_path, only=("imagegpt-tokens64",)))]

    assert names("test") == ["vq-tokens64", "imagegpt-tokens64"]
    assert names("cpu") == ["imagegpt-tokens64"]


def test_a_log_may_be_cut_and_a_folder_may_have_a_space(tmp_path):
    job = jobs("test", tmp_path / "my runs")[-1]
    assert f"{tmp_path}/my runs/codes256-test" in job.train()
    job.folder.mkdir(parents=True)
    (job.folder / "log.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    assert job.state() == "step 1"


@pytest.mark.parametrize("preset", ["cpu", "full"])
def test_tokenizers_have_the_tokens_of_their_names(preset, tmp_path):
    for job in jobs(preset, tmp_path):
        if job.system.name in ("vq-tokens64", "vq-tokens256"):
            config = config_of(job)
            tokens = (config.size // config.downsample) ** 2
            assert job.system.name == f"vq-tokens{tokens}"


def test_a_slow_system_is_measured_with_fewer_images(tmp_path):
    counts = {job.system.name: job.evaluate()[job.evaluate().index("--count") + 1]
              for job in jobs("cpu", tmp_path)}
    assert (counts["pixelgpt-64"], counts["imagegpt-tokens64"]) == ("300", "1000")
    for each in systems.measured():
        if each.figure("FD-landscape") is not None:
            assert str(each.result["evaluation"]["N"]) == counts[each.system.name]


def test_a_sheet_has_a_row_for_each_system(reproduced, tmp_path, capsys):
    out, _ = reproduced
    file = tmp_path / "sheet.png"
    words = ["reproduce", "--preset", "test", "--data", str(out / "data"), "--only",
             "vq", "imagegpt-tokens64", "anytoany", "--sheet", str(file)]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "real images, ImageGPT, 64 tokens, any to any" in said  # no tokenizers
    with Image.open(file) as picture:
        pixels = torch.from_numpy(np.array(picture)).float()
    rows = [pixels[16 + 66 * n : 80 + 66 * n, 272:] for n in range(3)]
    assert all(row.std() > 5 for row in rows)
    assert (pixels[:16] < 128).any()  # the names of the classes
    assert (pixels[16:, :240] < 128).any()  # and of the systems


def test_a_sheet_takes_weights_that_do_not_ship_from_runs(reproduced, tmp_path, capsys):
    out, _ = reproduced
    shutil.copytree(out / "data" / "results", tmp_path / "results")
    words = ["reproduce", "--preset", "test", "--data", str(tmp_path), "--only",
             "pixelgpt-64", "--sheet", str(tmp_path / "sheet.png"), "--out"]
    for runs_there, rows in ((tmp_path, "real images"), (out, "real images, PixelGPT")):
        assert main([*words, str(runs_there)]) == 0
        assert capsys.readouterr().out.strip().endswith(f"sheet.png: {rows}")


def test_minutes_stop_a_training_with_its_state(tmp_path, monkeypatch):
    options = ReproduceOptions(only=("pixelgpt-64",), preset="test", out=tmp_path,
                               minutes=7)
    job, = reproduce.plan(options)

    class Timer(threading.Thread):
        """Waits for the training to begin instead, however slow the machine is."""

        def __init__(self, seconds, function, arguments):
            super().__init__()
            assert seconds == 7 * 60
            self.function, self.arguments = function, arguments

        def run(self):
            while not (job.folder / "log.jsonl").exists():
                time.sleep(0.05)
            self.function(*self.arguments)

        def cancel(self):
            pass

    def command(words):  # longer than any time that is left
        assert words == job.train()
        script("pixelgpt").main(replace(config_of(job), steps=10**6, save_every=0,
                                        eval_steps=()))

    monkeypatch.setattr(reproduce.threading, "Timer", Timer)
    with pytest.raises(SystemExit):
        reproduce.reproduce(options, command)
    assert list(job.folder.glob("state-*"))
    assert re.fullmatch(r"step \d+", job.state())


def test_a_failed_run_is_not_measured(tmp_path, capsys):
    called = []

    def command(words):
        called.append(words[0])
        return 2

    options = ReproduceOptions(only=("pixelgpt-64",), preset="test", out=tmp_path)
    assert reproduce.reproduce(options, command) == 2
    assert called == ["train"]
    assert "pixelgpt-test-64 failed" in capsys.readouterr().err


def test_dry_run_trains_nothing(tmp_path, capsys):
    assert main(["reproduce", "--dry-run", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    minutes = runs.shipped_result("imagegpt-cpu-tokens64")["minutes"]
    assert re.search(rf"imagegpt-cpu-tokens64 +to do +{minutes:.0f} min", said)
    assert re.search(r"left: \d+ min", said)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("words", "reason"), [
    (["--only", "imagegtp"], "there is no system imagegtp"),
    (["--minutes", "-1"], "minutes"), (["--count", "-1"], "count")])
def test_wrong_words(words, reason, capsys):
    try:
        status = main(["reproduce", *words])
    except SystemExit as error:  # of options alone
        status = error.code
    assert status == 2
    assert reason in capsys.readouterr().err


# ---- the tables


def test_a_number_without_its_file_is_not_shown(tmp_path):
    table = systems.table(data=tmp_path)
    rows = [row.split("|")[2:-1] for row in table.splitlines()[2:]]
    assert len(rows) == len(systems.compared())
    for row in rows:
        first, *others = (cell.strip() for cell in row)
        assert first == systems.MISSING
        assert set(others) == {""}


def test_every_number_of_the_table_is_in_a_file(tmp_path):
    """Each cell follows its file: with all values changed, all cells are others."""
    (tmp_path / "results").mkdir()
    (tmp_path / "benchmarks").mkdir()
    for file in (runs.DATA / "results").glob("*.json"):
        write_json(tmp_path / "results" / file.name, scaled(read_json(file)))
    timing = runs.DATA / "benchmarks" / "comparison-cpu.json"
    if timing.exists():
        write_json(tmp_path / "benchmarks" / timing.name, scaled(read_json(timing)))
    ours, other = (rows_of(systems.table(data=data))
                   for data in (runs.DATA, tmp_path))
    changed = 0
    for name, row in ours.items():
        for column, cell in row.items():
            if column not in ("passes", "trained on") and re.match(
                    r"\d", cell) and re.search("[1-9]", cell):  # a zero stays one
                assert other[name][column] != cell, (name, column)
                changed += 1
    assert changed > 50


def scaled(value):
    """The same with every number larger by a half."""
    if isinstance(value, dict):
        return {name: scaled(part) for name, part in value.items()}
    if isinstance(value, list):
        return [scaled(part) for part in value]
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value * 1.5 if number else value


def rows_of(table):
    """The cells of a Markdown table by row and column."""
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")]
                      for line in table.strip().splitlines())
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}


def test_readme_shows_the_table_of_the_result_files():
    table = systems.table(systems.BRIEF)
    assert table in (ROOT / "README.md").read_text(), f"README.md should have\n{table}"


# ---- how long the book takes


def test_time_left_follows_the_machine():
    program = ("import json, sys; sys.path.insert(0, 'book'); import build\n"
               "names = [f'{name}.ipynb' for name in build.SECONDS]\n"
               "toc = [file.stem for file in build.chapters()]\n"
               "print(json.dumps([toc, list(build.SECONDS),\n"
               "    build.time_left(names, [], 0), build.time_left(names, names[:3],\n"
               "    10 * sum(list(build.SECONDS.values())[:3])),\n"
               "    build.time_left(names, names, 9)]))")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True,
                          capture_output=True, text=True)
    toc, known, first, slow, last = json.loads(done.stdout.splitlines()[-1])
    assert set(toc) == set(known), "give SECONDS of book/build.py a new chapter's time"
    minutes = [int(re.search(r"about (\d+) minutes", text)[1])
               for text in (first, slow)]
    assert 5 < minutes[0] < 30
    assert minutes[1] > 10 * minutes[0]
    assert last.endswith("about 0 seconds left")
