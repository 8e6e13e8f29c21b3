"""What every test shares: one folder of drawn images, one thread, one seed."""

import os
import random
import shutil
import sys
import tempfile

import pytest
from pages import book, browser, site  # noqa: F401, fixtures of the browser tests


def pytest_configure(config):
    # Set before the workers of pytest-xdist start, so that they share one folder.
    if "MINIGEN_CACHE" not in os.environ:
        config.minigen_cache = tempfile.mkdtemp(prefix="minigen-tests-")
        os.environ["MINIGEN_CACHE"] = config.minigen_cache
    for name, value in {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg",
                        "TQDM_DISABLE": "1"}.items():
        os.environ.setdefault(name, value)


def pytest_unconfigure(config):
    if folder := getattr(config, "minigen_cache", None):
        shutil.rmtree(folder, ignore_errors=True)
        os.environ.pop("MINIGEN_CACHE", None)


@pytest.fixture(autouse=True)
def seeded(request):
    """The same random numbers for a test however it is run."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
        sys.modules["torch"].set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
