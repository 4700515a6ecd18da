"""What the tests share: a small demo cohort, one run trained on it, the real runs where there are some."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"  # the tests ask nothing of the network


def call(script, *arguments, cwd, **options):
    """Run a script of the project as a user does; returns the completed process with its output as text."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, **options)


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """A demo cohort of 40 runs at 64 bins."""
    folder = tmp_path_factory.mktemp("cohort") / "demo"
    done = call("convert.py", "--demo", folder, "--runs", 40, "--bins", 64, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    return folder


TINY = ["--weights", "random", "--image-size", 64, "--batch-size", 8, "--erase", 0, "--workers", 1]


@pytest.fixture(scope="session")
def run(demo):
    """A run of two epochs of a tiny network on that cohort."""
    arguments = ["--backbone", "test_resnet", "--data", demo, "--grid", 3, "--epochs", 2, "--lr", 0.01, *TINY]
    done = call("train.py", *arguments, cwd=demo.parent)
    assert done.returncode == 0, done.stderr
    return demo.parent / "runs" / "demo" / "test_resnet" / "seed2643"


@pytest.fixture(scope="session")
def real_runs():
    """The folder of eight real LC-MS runs and their samples.csv."""
    folder = os.environ.get("DEEPLCMS_REAL_RUNS")
    if not folder:
        pytest.skip("DEEPLCMS_REAL_RUNS does not name a folder of real runs")
    return Path(folder)


@pytest.fixture(scope="session")
def odd_files(real_runs):
    folder = real_runs.parent / "odd_files"
    if not folder.is_dir():
        pytest.skip("no folder odd_files beside the real runs")
    return folder
