"""Compare scores on new files, days and wines: 39 GC-MS files of twelve wines (.github/WINES.md).

    git clone https://github.com/kkpsiren/vesi
    python tests/wines.py vesi/chroms2 [--weights FILE] [--out wines]

The file names give the sample table. The script converts the CDF files once for each way of holding raw files out,
trains folds, and predicts each raw file with a fold that has not seen it. It then explains the head on several scales;
the features are the spots of the mean picture. A second call skips finished parts.
"""

import argparse
import os
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.ndimage import center_of_mass, label, maximum_filter
from scipy.special import expit

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import convert  # noqa: E402
import evaluate  # noqa: E402
import explain  # noqa: E402
import train  # noqa: E402
from deeplcms import InputError, compute_metrics, find_pictures, read_picture, run_script, write_table  # noqa: E402

NAME = re.compile(r"(?P<day>\d+)_(?P<order>\d+)_(?P<yeast>\w+)_(?P<bacterium>\w+)_(?P<added>seq|coin)_(?P<wine>no\d+)")
HELD_OUT = {"day": 3, "wine": 6, "pair": 6}  # column of --group-by: number of folds
MODELS = {
    "pixels": ["--backbone", "pixels"],
    "head on several scales": ["--backbone", "tf_efficientnet_lite0"],
}


def call(main, *arguments):
    """Run a script of the project in this process."""
    sys.argv = ["", *map(str, arguments)]
    return main()


def make_samples(folder, path):
    """The sample table of the CDF files in a folder, from their names."""
    rows = []
    for file in sorted(folder.glob("*.CDF")):
        found = NAME.fullmatch(file.stem)
        if found:
            phenotype = {"seq": "sequential", "coin": "coinoculation"}[found["added"]]
            pair = f"{found['yeast']}-{found['bacterium']}"
            rows.append({"sample_name": file.stem, "phenotype": phenotype, **found.groupdict(), "pair": pair})
    if not rows:
        raise InputError(f"{folder}: no CDF files named like 20140226_03_vrb_alpha_seq_no6.CDF")
    table = pd.DataFrame(rows).drop(columns="added")
    write_table(path, table)
    return table


def predict_held_out(data, model, n_folds):
    """Table of the raw files: label, and probability from the fold that has not seen the file."""
    call(train.main, "--data", data, "--folds", n_folds, "--workers", 0, *MODELS[model])
    runs = sorted(Path("runs", data, MODELS[model][1]).glob("seed*-fold*"))
    table = pd.concat(map(evaluate.read_held_out, runs)).set_index("sample_name").sort_index()
    return table.assign(probability=expit(table["logit_0"]))


def compute_scores(labels, probability):
    """(accuracy, ROC AUC, Brier score)"""
    logits = np.log(probability / (1 - probability)).to_numpy()[:, None]
    metrics = compute_metrics(labels.to_numpy(), logits)
    return [metrics[name] for name in ("accuracy", "roc_auc", "brier")]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="folder of the CDF files")
    parser.add_argument("--weights", metavar="FILE", help="weights for tf_efficientnet_lite0 (default: from the Hub)")
    parser.add_argument("--out", default="wines", help="folder for pictures, runs, table and figure")
    args = parser.parse_args()
    folder = Path(args.folder).resolve()
    weights = Path(args.weights).resolve() if args.weights else "pretrained"
    MODELS["head on several scales"] += ["--weights", weights]
    Path(args.out).mkdir(exist_ok=True)
    os.chdir(args.out)

    samples = make_samples(folder, "samples.csv")
    rows = []
    for column, n_folds in {"file": 6, **HELD_OUT}.items():
        group_by = [] if column == "file" else ["--group-by", column]
        call(convert.main, folder, "samples.csv", column, "--test", 0, *group_by)
        tables = {model: predict_held_out(column, model, n_folds) for model in MODELS}
        labels = next(iter(tables.values()))["label"]
        probabilities = {model: table["probability"] for model, table in tables.items()}
        probabilities["ensemble of both"] = sum(probabilities.values()) / 2
        for model, probability in probabilities.items():
            scores = dict(zip(["accuracy", "ROC AUC", "Brier"], compute_scores(labels, probability), strict=True))
            rows.append({"held out together": column, "model": model, **scores})
    table = pd.DataFrame(rows)
    write_table("wines.csv", table)
    print(table.to_string(index=False, float_format="{:.3f}".format))

    pictures, _ = find_pictures("file")
    known = pictures[["phenotype", "sample_name", "group", *samples.columns.drop(["sample_name", "phenotype"])]]
    print("\nPossible confounders:")
    print(evaluate.find_confounders(known)[0].to_string(float_format="{:.3f}".format))
    draw_leak(table, Path("leak.png"))

    call(train.main, "--data", "pair", "--workers", 0, *MODELS["head on several scales"])
    write_table("spots.csv", list_spots("pair"))
    call(explain.main, "runs/pair/tf_efficientnet_lite0/seed2643", "--features", "spots.csv")


def list_spots(data):
    """Retention time and m/z of the local maxima of the mean picture, where many files have a compound."""
    pictures, recipe = find_pictures(data)
    mean = np.mean([read_picture(path) for path in pictures["path"]], axis=0)  # (height, width)
    is_spot = (mean == maximum_filter(mean, (9, 15))) & (mean > 64)  # a quarter of the levels
    labels, n = label(is_spot, np.ones((3, 3)))  # a saturated plateau is one spot
    row, column = np.array(center_of_mass(is_spot, labels, range(1, n + 1))).T
    height, width = mean.shape
    rt, mz = recipe.from_fraction((column + 0.5) / width, (row + 0.5) / height)
    return pd.DataFrame({"rt": rt.round(3), "mz": mz.round(2), "name": "spot"})


def draw_leak(table, path):
    """Draw the accuracy for each unit held out together, with a bar for each model."""
    accuracy = table.pivot(index="held out together", columns="model", values="accuracy")
    accuracy = accuracy.loc[["file", "day", "wine", "pair"], ["pixels", "head on several scales", "ensemble of both"]]
    accuracy.index = ["a file:\nreplicates leak", "a day:\nreplicates leak", "a wine", "a pair of wines"]
    title = "39 GC-MS files of twelve wines: replicates in training raise the score"
    with train.figure(path, title, (8, 4.5)) as axes:
        accuracy.plot.bar(ax=axes, rot=0, color=["#4c78a8", "#f58518", "#54a24b"], width=0.75)
        for bars in axes.containers:
            axes.bar_label(bars, fmt="%.2f", fontsize=8)
        axes.axhline(21 / 39, color="0.4", linestyle=":", label="always the larger class")
        axes.set(xlabel="held out together", ylabel="accuracy on held-out files", ylim=(0.4, 1.1))
        axes.legend(loc="upper right", ncols=2, fontsize=8, frameon=False)


if __name__ == "__main__":
    run_script(main)
