"""The pipeline on the command line: raw files, pictures, a classifier, its metrics and its explanation."""

import json

import pandas as pd
from conftest import TINY, run
from PIL import Image

import deeplcms


def run_pipeline(folder, raw, samples, conversion, training, explanation=()):
    """Convert, train, evaluate, explain; returns (data set, run folder)."""
    for script, *arguments in (
        ("convert.py", raw, samples, "pictures", *conversion),
        ("train.py", "--backbone", "test_resnet", "--data", "pictures", "--epochs", 2, *training),
        ("evaluate.py",),
        ("explain.py", *explanation),
    ):
        assert run(script, *arguments, cwd=folder) == (0, ""), script
    run_folder = folder / "runs" / "pictures" / "test_resnet" / "seed2643"
    assert json.loads((run_folder / "metrics.json").read_text()) and (run_folder / "explain/cam_grid.png").exists()
    return folder / "pictures", run_folder


def test_the_pipeline_explains_real_raw_files(real_files, tmp_path):
    conversion = ["--test", 0.25, "--val", 0.25, "--bins", 200]
    pictures, _ = run_pipeline(tmp_path, real_files, real_files / "samples.csv", conversion, TINY)
    pngs = sorted(pictures.glob("*/*/*.png"))
    assert len(pngs) == 8
    with Image.open(pngs[0]) as image:
        assert image.size == (200, 200) and image.mode == "P"
        # the spinal cords were measured from 2501 to 4500 s at m/z 200-600
        assert 41.6 < float(image.text["rt_min"]) < 41.8 and 74.9 < float(image.text["rt_max"]) < 75.1
        assert float(image.text["mz_min"]) >= 200 and float(image.text["mz_max"]) <= 600


def test_the_pipeline_runs_with_three_phenotypes_other_columns_and_other_axes(demo, tmp_path):
    names = deeplcms.read_table(demo / "raw" / "samples.csv")["sample_name"]
    table = ["organ;sample_name;mouse;phenotype"]
    table += [f"liver;{name};{i // 6}{i % 3};{'abc'[i % 3]}" for i, name in enumerate(names)]
    (tmp_path / "samples.csv").write_text("\r\n".join(table), encoding="utf-8-sig")
    (tmp_path / "peaks.txt").write_text("compound\tretention time\tm/z\nfirst\t2.5\t300\nsecond\t20\t300\n")
    conversion = ["--bins", 64, "--rt-range", 1, 9, "--mz-range", 150, 800, "--group-by", "mouse"]
    options = [*TINY, "--positive", "b"]
    explanation = ["--class", "c", "--features", tmp_path / "peaks.txt"]
    flags = conversion, options, explanation
    pictures, run_folder = run_pipeline(tmp_path, demo / "raw", tmp_path / "samples.csv", *flags)
    assert json.loads((run_folder / "config.json").read_text())["classes"] == ["a", "c", "b"]
    samples = deeplcms.read_table(pictures / "samples.csv")
    assert (samples.groupby("group")["split"].nunique() == 1).all()  # both files of a mouse are in one split
    assert samples["group"].nunique() == 21 and (samples["organ"] == "liver").all()
    assert pd.read_csv(run_folder / "explain/features.csv")["name"].tolist() == ["first"]
