"""The whole way on the command line: raw runs, pictures, a classifier, its verdict and its map."""

import csv
import json

from conftest import TINY, call
from PIL import Image


def whole_way(folder, raw, samples, conversion, training, explanation=()):
    """convert, train, evaluate, explain; returns (data set, run folder)."""
    for script, *arguments in (
        ("convert.py", raw, samples, "pictures", *conversion),
        ("train.py", "--backbone", "test_resnet", "--data", "pictures", "--epochs", 2, "--lr", 0.01, *training),
        ("evaluate.py",),
        ("explain.py", *explanation),
    ):
        done = call(script, *arguments, cwd=folder)
        assert done.returncode == 0, f"{script}: {done.stderr}"
    run = folder / "runs" / "pictures" / "test_resnet" / "seed2643"
    assert json.loads((run / "metrics.json").read_text())
    assert next(run.glob("explain/**/cam_grid.png")) and next(run.glob("explain/**/regions.csv"))
    return folder / "pictures", run


def test_real_runs_go_the_whole_way(real_runs, tmp_path):
    conversion = ["--test", 0.25, "--val", 0.25, "--bins", 200]
    pictures, run = whole_way(tmp_path, real_runs, real_runs / "samples.csv", conversion, TINY)
    pngs = sorted(pictures.glob("*/*/*.png"))
    assert len(pngs) == 8
    with Image.open(pngs[0]) as image:
        assert image.size == (200, 200)
        # the spinal cords were measured from 2501 to 4500 s at m/z 200-600
        assert 41.6 < float(image.text["rt_min"]) < 41.8 and 74.9 < float(image.text["rt_max"]) < 75.1
        assert float(image.text["mz_min"]) >= 200 and float(image.text["mz_max"]) <= 600
    with open(run / "explain" / "regions.csv", newline="") as file:
        for region in csv.DictReader(file):
            assert 41.6 < float(region["rt_min"]) < float(region["rt_max"]) < 75.1


def test_a_fork_with_three_phenotypes_other_columns_and_other_ranges_goes_the_whole_way(demo, tmp_path):
    with open(demo / "raw" / "samples.csv", newline="") as file:
        names = [row["sample_name"] for row in csv.DictReader(file)]
    table = [
        "organ;sample_name;mouse;phenotype",
        *(f"liver;{n};{i // 6}{i % 3};{'abc'[i % 3]}" for i, n in enumerate(names)),
    ]
    (tmp_path / "samples.csv").write_text("\r\n".join(table), encoding="utf-8-sig")
    (tmp_path / "peaks.txt").write_text("compound\tretention time\tm/z\nfirst\t2.5\t300\nsecond\t20\t300\n")
    conversion = ["--bins", 64, "--rt-range", 1, 9, "--mz-range", 150, 800, "--group-by", "mouse"]
    options = [*TINY, "--positive", "b"]
    explanation = ["--class", "c", "--features", tmp_path / "peaks.txt"]
    pictures, run = whole_way(tmp_path, demo / "raw", tmp_path / "samples.csv", conversion, options, explanation)
    assert json.loads((run / "config.json").read_text())["classes"] == ["a", "c", "b"]
    with open(pictures / "samples.csv", newline="") as file:
        homes = {(row["group"], row["split"]) for row in csv.DictReader(file)}
    assert len(homes) == len({group for group, _ in homes}) == 21  # both runs of a mouse are in one split
    with open(next(run.glob("explain/**/features.csv")), newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == ["first"]
