"""Shared by the tests: small cohorts, runs trained on them, and real raw files if the machine has some."""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"  # the tests need no network

import deeplcms  # noqa: E402
from demo import write_mzml  # noqa: E402

MODULES = {f"{name}.py": import_module(name) for name in ("convert", "demo", "evaluate", "explain", "train")}
PEAK = (4.37, 462.175)  # minutes and m/z of the article's morphine-3-glucuronide
TINY = ["--weights", "random", "--image-size", 64, "--batch-size", 8]
TINY += ["--augmentation", "none", "--workers", 1, "--lr", 0.01, "--no-amp"]


def call(script, *arguments, cwd, root=ROOT, **options):
    """Run a script of the project as a user does; returns the completed process with its output."""
    command = [sys.executable, str(root / script), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, **options)


def run(script, *arguments, cwd):
    """Run a script in this process, so that torch loads once; returns (exit status, error line or '')."""
    folder_before, argv = Path.cwd(), sys.argv
    os.chdir(cwd)
    sys.argv = [script, *map(str, arguments)]
    try:
        deeplcms.run_script(MODULES[script].main)
    except SystemExit as end:
        return (1, end.code) if isinstance(end.code, str) else (end.code or 0, "")
    finally:
        os.chdir(folder_before)
        sys.argv = argv


def random_scans(seed, n_scans=40, n_peaks=200):
    rng = np.random.default_rng(seed)
    return [(3.0 * i, np.sort(rng.uniform(100, 300, n_peaks)), rng.lognormal(8, 2, n_peaks)) for i in range(n_scans)]


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """A demo cohort of 40 raw files in 64 bins."""
    folder = tmp_path_factory.mktemp("cohort") / "demo"
    assert run("demo.py", folder, "--runs", 40, "--bins", 64, "--test", 0.15, cwd=folder.parent) == (0, "")
    return folder


@pytest.fixture(scope="session")
def trained(demo):
    """A tiny network trained on that cohort for two epochs."""
    arguments = ["--backbone", "test_resnet", "--data", demo, "--scales", "last:3", "--epochs", 2, *TINY]
    assert run("train.py", *arguments, cwd=demo.parent) == (0, "")
    return demo.parent / "runs" / "demo" / "test_resnet" / "seed2643"


def make_cohort(folder, phenotypes):
    """Raw files and pictures of a cohort. Each phenotype after the first has one more compound: PEAK, and so on.

    Each phenotype has 24 training, 8 validation and 5 test files. Every file has four compounds at random places.
    """
    rng, rows = np.random.default_rng(0), ["sample_name,phenotype,age,split"]
    (folder / "raw").mkdir(parents=True)
    for p, phenotype in enumerate(phenotypes):
        for i, split in enumerate(["train"] * 24 + ["val"] * 8 + ["test"] * 5):
            scans = [(seconds, [100.5, 899.5], [1.0, 1.0]) for seconds in np.arange(61.0, 659.0, 9.4)]
            places = list(zip(rng.integers(2, 62, 4), rng.uniform(150, 850, 4), strict=True))
            places += [(21, PEAK[1] + 100 * (p - 1))] * 4 if p else []
            for scan, mz in places:
                seconds, masses, heights = scans[scan]
                scans[scan] = seconds, [*masses, mz], [*heights, 1000.0]
            order = [np.argsort(masses) for _, masses, _ in scans]
            scans = [(s, np.array(m)[o], np.array(h)[o]) for (s, m, h), o in zip(scans, order, strict=True)]
            write_mzml(folder / "raw" / f"{phenotype}{i:02d}.mzML", scans)
            rows.append(f"{phenotype}{i:02d},{phenotype},{30 + 10 * p + i},{split}")
    (folder / "raw" / "samples.csv").write_text("\n".join(rows))
    flags = ["--rt-range", 1, 11, "--mz-range", 100, 900, "--bins", 64, "--sigma", 1, "--normalize", "global"]
    done = run("convert.py", folder / "raw", folder / "raw/samples.csv", folder / "data", *flags, cwd=folder)
    assert done == (0, "")
    return folder / "data"


def train_pixels(data, *flags):
    """Train the baseline on that cohort. It finds the compound within seconds."""
    flags = ["--scales", "1:16", "--image-size", 64, "--augmentation", "none", *flags]
    assert run("train.py", "--backbone", "pixels", "--data", data, *flags, cwd=data.parent) == (0, "")
    return data.parent / "runs" / data.name / "pixels" / "seed2643"


@pytest.fixture(scope="session")
def two(tmp_path_factory):
    """(data set, run) of two phenotypes; class 1 is user."""
    data = make_cohort(tmp_path_factory.mktemp("two"), ["non-user", "user"])
    return data, train_pixels(data)


@pytest.fixture(scope="session")
def three(tmp_path_factory):
    data = make_cohort(tmp_path_factory.mktemp("three"), ["a", "b", "c"])
    return data, train_pixels(data)


@pytest.fixture(scope="session")
def real_files():
    """The folder of eight real LC-MS files and their samples.csv."""
    folder = os.environ.get("DEEPLCMS_REAL_RUNS")
    if not folder:
        pytest.skip("DEEPLCMS_REAL_RUNS is not set to a folder of real raw files")
    return Path(folder)


def folder_beside(real_files, name):
    """A folder of other files, next to the folder of real raw files."""
    folder = real_files.parent / name
    if not folder.is_dir():
        pytest.skip(f"no folder {name} next to the real raw files")
    return folder


@pytest.fixture(scope="session")
def odd_files(real_files):
    return folder_beside(real_files, "odd_files")


@pytest.fixture(scope="session")
def as_written(real_files):
    return folder_beside(real_files, "as_written")
