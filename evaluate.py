"""Judge a run on pictures it has never seen, predict new raw runs, compare many runs.

Article: "Evaluating the final model" (test metrics, Figure 5), and the tables and figures that rank architectures
(Tables 1 and 2), replicates (Figure 1) and kinds of picture (Figure 3).

    python evaluate.py                                                    # the newest run on its test split
    python evaluate.py runs/golestan/convnext_large/seed2643 --threshold val
    python evaluate.py runs/golestan/convnext_large/seed2643 --predict new/*.mzML --out new_predictions.csv
    python evaluate.py runs/golestan                                      # every run below, side by side
"""

import argparse
import json
import math
import os
import sys
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import asdict
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import binomtest, false_discovery_control, kruskal, norm, rankdata
from tqdm import tqdm

from convert import (
    SPLITS,
    HelpFormatter,
    Problem,
    find_runs,
    first_few,
    picture_of_run,
    read_table,
    run_script,
    whole_file,
    write_csv,
)
from deeplcms import (
    Pictures,
    choose_device,
    evaluation_transform,
    find_pictures,
    find_run,
    load_run,
    metrics_of,
    predict,
    probabilities_of,
    write_json,
)

METRICS = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "roc_auc": "ROC AUC",
    "brier": "Brier score",
}
RESAMPLES, SEED = 2000, 2643
RIGHT, WRONG = "#1a8a3a", "#d62728"  # green and red, as in the article's Figure 5


def cautions(config):
    """What every table and title that quotes a run must say about it; an ordinary run gives an empty list."""
    notes = []
    if config["backbone"] == "pixels":
        notes.append("no network, pixels only")
    elif config["weights_origin"].startswith("random"):
        notes.append("random initialisation")
    if config.get("shuffle_labels"):
        notes.append("trained on shuffled labels")
    return notes


def number(value, form=".3f"):
    return "undefined" if math.isnan(value) else format(value, form)


# ---------------------------------------------------------------- one run: pictures -> probabilities -> metrics


def held_out_pictures(checkpoint, data, split):
    """Pictures of one split of `data`, copies left out. Raises Problem unless they are what the run was trained for.

    On other axes the same pixel is another compound, and another conversion paints the same compound differently.
    """
    config = checkpoint["config"]
    if data is None and not Path(config["data"]).is_dir():
        raise Problem(f"{config['data']}: this run's data set is not there any more; say where it is with --data", 2)
    own = data is None or Path(data).resolve().name == config["data_set"]
    if own and split != "test" and config.get("fold") is not None:
        raise Problem(f"this run is fold {config['fold']} of train and val together and has seen most of {split}", 2)
    data = Path(data or config["data"])
    pictures = [picture for picture in find_pictures(data, (split,))[split] if not picture.is_copy]
    here, there = asdict(pictures[0].recipe), asdict(checkpoint["recipe"])
    if differing := [f"{name} is {here[name]}, not {there[name]}" for name in here if here[name] != there[name]]:
        raise Problem(f"{data}: not the axes and settings that the run was trained with: {'; '.join(differing)}", 2)
    classes = checkpoint["classes"]
    if unknown := {picture.phenotype for picture in pictures} - set(classes):
        raise Problem(f"{data}: phenotype {first_few(unknown)} is none of the run's classes ({', '.join(classes)})", 2)
    return pictures


def transform_of(checkpoint):
    return evaluation_transform(checkpoint["image_size"], checkpoint["mean"], checkpoint["std"])


def finite(probabilities):
    if not np.isfinite(probabilities).all():
        raise Problem("the network's output is not a number: its training diverged; train again with a lower --lr")
    return probabilities


def predict_pictures(model, checkpoint, pictures, title):
    """(labels (N,), probabilities (N, K)) of pictures, in their order."""
    data = Pictures(pictures, checkpoint["classes"], transform_of(checkpoint))
    workers = min(4, os.cpu_count() or 1) if len(data) >= 256 else 0  # starting them takes longer than 256 pictures
    loader = torch.utils.data.DataLoader(data, batch_size=32, num_workers=workers)
    bar = tqdm(loader, desc=title, unit="batch", disable=None, leave=False)
    device = choose_device()
    logits, labels = predict(model.to(device), bar, device)
    return labels.numpy(), finite(probabilities_of(logits).numpy())


def best_threshold(labels, probabilities):
    """The threshold of highest balanced accuracy: halfway between two neighbours, of several the nearest to 0.5."""
    scores = np.unique(probabilities[:, 1])
    candidates = np.append((scores[1:] + scores[:-1]) / 2, 0.5)
    found = [metrics_of(labels, probabilities, t)["balanced_accuracy"] for t in candidates]
    if np.isnan(found).any():
        raise Problem("--threshold val needs both classes in the validation split", 2)
    return float(max(zip(np.round(found, 12), -abs(candidates - 0.5), candidates, strict=True))[2])


def bootstrap(labels, probabilities, threshold=0.5, n=RESAMPLES, seed=SEED):
    """{metric: (low, high)}: 95 % percentile intervals over n resamples of the pictures within each class.

    Resampling within the classes keeps their sizes, as the split did. (nan, nan) where more than one resample in
    twenty leaves the metric undefined.
    """
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(labels == k) for k in np.unique(labels)]
    drawn = {name: np.empty(n) for name in METRICS}
    for b in tqdm(range(n), desc="bootstrap", disable=None, leave=False):
        i = np.concatenate([rng.choice(pictures, len(pictures)) for pictures in members])
        values = metrics_of(labels[i], probabilities[i], threshold)
        for name in METRICS:
            drawn[name][b] = values[name]
    intervals = {}
    for name, values in drawn.items():
        defined = values[~np.isnan(values)]
        enough = len(defined) >= 0.95 * n
        intervals[name] = tuple(map(float, np.percentile(defined, [2.5, 97.5]))) if enough else (math.nan, math.nan)
    return intervals


def judge(labels, probabilities, classes, threshold=0.5):
    """The figures of metrics.json: confusion counts (rows true, columns called) and each metric with its interval."""
    values, intervals = (
        metrics_of(labels, probabilities, threshold),
        bootstrap(labels, probabilities, threshold, RESAMPLES),
    )
    result = {"n": len(labels), "classes": classes, "confusion": values["confusion"]}
    if len(classes) == 2:
        (tn, fp), (fn, tp) = values["confusion"]
        result |= {"positive": classes[1], "threshold": threshold, "tp": tp, "tn": tn, "fp": fp, "fn": fn}
    result["metrics"] = {
        name: dict(zip(("value", "low", "high"), (values[name], *intervals[name]), strict=True)) for name in METRICS
    }
    return result | {"bootstrap": {"resamples": RESAMPLES, "seed": SEED, "stratified": True, "level": 0.95}}


def table_of(result):
    """The result of `judge` as lines of text."""
    classes = result["classes"]
    if len(classes) == 2:
        lines = ["TP {tp}  TN {tn}  FP {fp}  FN {fn}  (positive: {positive})".format(**result)]
    else:
        width = max(map(len, classes), default=0) + 2
        lines = ["confusion (rows: true, columns: called)"]
        lines.append(" " * width + "".join(name.rjust(width) for name in classes))
        for name, row in zip(classes, result["confusion"], strict=True):
            lines.append(name.ljust(width) + "".join(str(count).rjust(width) for count in row))
    lines += ["", f"{'':20}{'value':>9}   95 % interval" + ("" if len(classes) == 2 else "   (mean over classes)")]
    for name, title in METRICS.items():
        value, low, high = result["metrics"][name].values()
        interval = "undefined" if math.isnan(low) else f"{low:.3f} - {high:.3f}"
        lines.append(f"{title:20}{number(value):>9}   {interval}")
    return "\n".join(lines)


def results_folder(run, config, data, split):
    """The run's own folder for its test split; a folder inside it for anything else, so that nothing is overwritten."""
    moved = data and not Path(config["data"]).is_dir() and Path(data).resolve().name == config["data_set"]
    if data and not moved and Path(data).resolve() != Path(config["data"]).resolve():
        return run / f"{Path(data).resolve().name}-{split}"
    return run if split == "test" else run / split


def evaluate(run, data=None, split="test", threshold="0.5", out=None):
    """Metrics, predictions and figures of one run on one split; writes them and prints the table."""
    model, checkpoint = load_run(run)
    config, classes = checkpoint["config"], checkpoint["classes"]
    if threshold != "0.5" and len(classes) > 2:
        raise Problem(f"--threshold is for two classes; this run has {len(classes)} and calls the most probable one", 2)
    if threshold == "val" and split == "val":
        raise Problem("--threshold val with --split val would choose and judge on the same pictures", 2)
    pictures = held_out_pictures(checkpoint, data, split)
    threshold, source = choose_threshold(model, checkpoint, threshold, data)
    labels, probabilities = predict_pictures(model, checkpoint, pictures, f"{split} split")
    result = judge(labels, probabilities, classes, threshold)

    folder = Path(out) if out else results_folder(run, config, data, split)
    folder.mkdir(parents=True, exist_ok=True)
    data_set = Path(data).resolve().name if data else config["data_set"]
    about = {"run": str(run), "backbone": config["backbone"], "weights_origin": config["weights_origin"]}
    about |= {"shuffle_labels": bool(config.get("shuffle_labels")), "epoch": checkpoint["epoch"]}
    about |= {"data": str(data or config["data"]), "split": split, "threshold_from": source}
    write_json(folder / "metrics.json", about | result)
    write_predictions(folder / "predictions.csv", pictures, labels, probabilities, classes, threshold)

    title = "; ".join([f"{config['backbone']} on {data_set}, {split} split, {len(labels)} pictures", *cautions(config)])
    draw_confusion(folder / "confusion.png", result, title)
    draw_roc(folder / "roc.png", labels, probabilities, result, title)
    draw_calibration(folder / "calibration.png", labels, probabilities, classes, title)
    draw_prediction_matrix(folder / "prediction_matrix.png", pictures, probabilities, classes, threshold, title)
    print(f"{title}\nrun {run}, epoch {checkpoint['epoch']}, {config['weights_origin']}")
    if len(classes) == 2:
        print(f"{classes[1]} is called where its probability is {threshold:.4g} or more ({source})")
    absent = [name for k, name in enumerate(classes) if k not in labels]
    if absent:
        print(f"no picture of {first_few(absent)} in this split: metrics that need one are undefined")
    print(f"\n{table_of(result)}\n\nresults: {folder}/")


def choose_threshold(model, checkpoint, threshold, data=None):
    """(threshold, where it comes from) of --threshold: a number, or 'val' for the best one on the validation split."""
    if threshold == "0.5":
        return 0.5, "default"
    if threshold != "val":
        return float(threshold), "given"
    config = checkpoint["config"]
    own = None if Path(config["data"]).is_dir() else data  # chosen where the run was trained, not on other people
    pictures = held_out_pictures(checkpoint, own, "val")
    labels, probabilities = predict_pictures(model, checkpoint, pictures, "validation split")
    best = best_threshold(labels, probabilities)
    reached = metrics_of(labels, probabilities, best)["balanced_accuracy"]
    place = f"{own or config['data']}/val, {len(labels)} pictures"
    return best, f"best balanced accuracy, {reached:.3f}, on the validation split: {place}"


def called_class(probabilities, threshold):
    """Class index (N,) that probabilities (N, K) stand for; `metrics_of` counts the same."""
    return (probabilities[:, 1] >= threshold).astype(int) if probabilities.shape[1] == 2 else probabilities.argmax(1)


def write_predictions(path, pictures, labels, probabilities, classes, threshold):
    """Every picture: sample, true phenotype, the one called, and the probability of each class."""
    rows = [["sample_name", "group", "phenotype", "called", "right", *(f"probability_{c}" for c in classes), "file"]]
    every = zip(pictures, labels, called_class(probabilities, threshold), probabilities, strict=True)
    for picture, label, called, p in every:
        right = "yes" if called == label else "no"
        row = [picture.sample_name, picture.group, classes[label], classes[called], right]
        rows.append([*row, *(f"{value:.8f}" for value in p), picture.path])
    write_csv(path, rows)


# ---------------------------------------------------------------- one run: figures


@contextmanager
def figure(path, title, size=(6.4, 5.2), **subplots):
    """Yield (figure, axes); the PNG is written when the block ends well."""
    drawing = Figure(figsize=size, layout="constrained")
    axes = drawing.subplots(**subplots)
    drawing.suptitle("\n".join(title.split("; ")), fontsize=11)
    yield drawing, axes
    with whole_file(path) as temporary:
        drawing.savefig(temporary, dpi=150)


def draw_confusion(path, result, title):
    """Counts, shaded by the share of each true class."""
    counts, classes = np.array(result["confusion"]), result["classes"]
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    with figure(path, title, size=(3.2 + 0.9 * len(classes), 2.8 + 0.8 * len(classes))) as (_, ax):
        ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for (i, j), count in np.ndenumerate(counts):
            ax.text(
                j,
                i,
                f"{count}\n{share[i, j]:.0%}",
                ha="center",
                va="center",
                color="white" if share[i, j] > 0.5 else "black",
            )
        ax.set_xticks(range(len(classes)), classes)
        ax.set_yticks(range(len(classes)), classes)
        ax.set(xlabel="called", ylabel="true phenotype")


def roc_curve(positive, score):
    """(false positive rates, true positive rates), from (0, 0) to (1, 1); equal scores make one step."""
    order = np.argsort(-score, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(score[order])), len(score) - 1)
    hits, n = np.cumsum(positive[order])[ends], np.arange(1, len(score) + 1)[ends]
    return np.append(0, (n - hits) / max((~positive).sum(), 1)), np.append(0, hits / max(positive.sum(), 1))


def draw_roc(path, labels, probabilities, result, title):
    classes, auc = result["classes"], result["metrics"]["roc_auc"]
    with figure(path, title, size=(5.6, 6.4)) as (_, ax):
        for k in [1] if len(classes) == 2 else range(len(classes)):
            if 0 < (labels == k).sum() < len(labels):
                ax.plot(*roc_curve(labels == k, probabilities[:, k]), linewidth=2, label=classes[k])
        ax.plot([0, 1], [0, 1], color="grey", linestyle=":", label="chance")
        if len(classes) == 2 and not math.isnan(auc["value"]):
            rates = result["fp"] / (result["fp"] + result["tn"]), result["tp"] / (result["tp"] + result["fn"])
            ax.plot(*rates, "o", color="black", label=f"threshold {result['threshold']:.3g}")
        text = number(auc["value"])
        if not math.isnan(auc["low"]):
            text += f" (95 % interval {auc['low']:.3f} - {auc['high']:.3f})"
        ax.set_title(f"ROC AUC {text}", fontsize=10)
        ax.set(
            xlabel="false positive rate",
            ylabel="true positive rate",
            box_aspect=1,
            xlim=(-0.02, 1.02),
            ylim=(-0.02, 1.02),
        )
        ax.legend(loc="lower right", frameon=False)


def reliability(hit, probability, n_bins):
    """[(mean probability, share of hits, number)] of each filled bin of equal width."""
    place = np.minimum((probability * n_bins).astype(int), n_bins - 1)
    return [(probability[place == b].mean(), hit[place == b].mean(), int((place == b).sum())) for b in np.unique(place)]


def draw_calibration(path, labels, probabilities, classes, title):
    """Does a probability of 0.8 come true in eight of ten? Of class 1, or with more classes of the class called."""
    two = len(classes) == 2
    k = np.ones(len(labels), int) if two else probabilities.argmax(1)
    probability, hit = probabilities[np.arange(len(labels)), k], labels == k
    n_bins = 10 if len(labels) >= 100 else 5
    points = reliability(hit, probability, n_bins)
    mean, share, number = (np.array(column) for column in zip(*points, strict=True))
    limits = [binomtest(round(s * n), n).proportion_ci(0.95, "wilson") for _, s, n in points]
    with figure(path, title, size=(6.4, 6.2), nrows=2, sharex=True, height_ratios=[3, 1]) as (_, (ax, below)):
        ax.plot([0, 1], [0, 1], color="grey", linestyle=":", label="perfectly calibrated")
        bars = np.abs(np.array([(ci.low, ci.high) for ci in limits]).T - share)
        ax.errorbar(mean, share, bars, fmt="o-", capsize=3, label="observed, 95 % Wilson interval")
        ax.set(ylabel=f"share that is {classes[1]}" if two else "share called rightly", ylim=(-0.03, 1.03))
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
        edges = np.minimum((mean * n_bins).astype(int), n_bins - 1) / n_bins
        rectangles = below.bar(edges, number, 1 / n_bins, align="edge", color="lightsteelblue", edgecolor="white")
        below.bar_label(rectangles, padding=1)
        below.set(ylabel="pictures", xlim=(-0.02, 1.02), ylim=(0, 1.3 * number.max()))
        below.set_xlabel(
            f"predicted probability of {classes[1]}" if two else "predicted probability of the class called"
        )


def draw_prediction_matrix(path, pictures, probabilities, classes, threshold, title, n=9):
    """Article, Figure 5: nine pictures, classes in turn, drawn at random with a fixed seed; green is right."""
    rng, turns = np.random.default_rng(SEED), defaultdict(list)
    for i in rng.permutation(len(pictures)):
        turns[pictures[i].phenotype].append(i)
    in_turn = [(turn, k, i) for k, name in enumerate(classes) for turn, i in enumerate(turns[name])]
    chosen = [i for *_, i in sorted(in_turn)[:n]]
    called = called_class(probabilities, threshold)
    n_rows = math.ceil(len(chosen) / 3)
    size = (10, 1.2 + 3.1 * n_rows)
    with figure(path, title, size, nrows=n_rows, ncols=3, sharex=True, sharey=True, squeeze=False) as (drawing, axes):
        for ax in axes.flat[len(chosen) :]:
            ax.set_axis_off()
        for ax in axes.flat[max(0, len(chosen) - 3) : len(chosen)]:
            ax.tick_params(labelbottom=True)
        for ax, i in zip(axes.flat, chosen, strict=False):
            recipe, k = pictures[i].recipe, 1 if len(classes) == 2 else called[i]
            extent = recipe.rt_min, recipe.rt_max, recipe.mz_min, recipe.mz_max
            ax.imshow(pictures[i].load().permute(1, 2, 0).numpy(), extent=extent, aspect="auto")
            colour = RIGHT if classes[called[i]] == pictures[i].phenotype else WRONG
            mark = "right" if colour == RIGHT else "wrong"
            text = f"P({classes[k]}) = {probabilities[i, k]:.3f}\ntrue phenotype: {pictures[i].phenotype} ({mark})"
            ax.set_title(text, color=colour, fontsize=11)
            for spine in ax.spines.values():
                spine.set(color=colour, linewidth=4)
        drawing.supxlabel("retention time (min)")
        drawing.supylabel("m/z")


# ---------------------------------------------------------------- new raw runs


# Statistic of a run: its name in a warning, its unit, and the least deviation that counts as far, as a share of the
# cohort's median span of that axis (None: absolute, see `warnings_of`).
EXTENTS = {
    "rt_first": ("first peak", "min", ("rt_first", "rt_last")),
    "rt_last": ("last peak", "min", ("rt_first", "rt_last")),
    "mz_low": ("lowest peak", "m/z", ("mz_low", "mz_high")),
    "mz_high": ("highest peak", "m/z", ("mz_low", "mz_high")),
}


def warnings_of(statistics, cohort):
    """What lies far from the training cohort in the statistics of a new run, as one line of text; '' if nothing does.

    Far from the median means beyond four robust standard deviations (1.4826 x median absolute deviation) and beyond a
    floor, as a small cohort of one batch varies less than instruments do: half a decade of total intensity, a tenth
    of the axis for its ends, 0.05 for the share of intensity outside the axes.
    """

    def is_far(value, values, floor):
        median = np.median(values)
        return abs(value - median) > max(4 * 1.4826 * np.median(np.abs(values - median)), floor)

    # A checkpoint may lack a statistic (pictures made by another version); what cannot be compared is not warned of.
    known = {name: np.array(values) for name, values in cohort.items() if len(values) and name in statistics}
    warnings = []
    if "total_intensity" in known:
        value, values = max(statistics["total_intensity"], 1e-9), np.maximum(known["total_intensity"], 1e-9)
        if is_far(math.log10(value), np.log10(values), 0.5):
            warnings.append(f"total intensity {value:.3g} (training median {np.median(values):.3g})")
    if "outside" in known and is_far(statistics["outside"], known["outside"], 0.05):
        share = f"{statistics['outside']:.1%} of the intensity lies outside the axes"
        warnings.append(f"{share} (training median {np.median(known['outside']):.1%})")
    for name, (title, unit, (low, high)) in EXTENTS.items():
        if low in known and high in known:
            span = np.median(known[high]) - np.median(known[low])
            if is_far(statistics[name], known[name], 0.1 * span):
                place = "{} {:.2f}" if unit == "m/z" else "{1:.2f} {0}"
                median = place.format(unit, np.median(known[name]))
                warnings.append(f"{title} at {place.format(unit, statistics[name])} (training median {median})")
    return "; ".join(warnings)


def predict_files(run, files, threshold="0.5", data=None, out=None):
    """Raw runs -> table of probabilities, converted with the checkpoint's recipe; returns the exit status.

    Each picture takes the path of a PNG (uint8 RGB, then the evaluation transform), so that a file gives what its
    converted picture gives. An unreadable file costs one line on stderr and exit status 1.
    """
    if out and Path(out).exists():
        raise Problem(f"--out {out} exists already; give another name", 2)
    if out and not Path(out).absolute().parent.is_dir():
        raise Problem(f"--out {out}: no such folder", 2)
    model, checkpoint = load_run(run)
    classes, device, transform = checkpoint["classes"], choose_device(), transform_of(checkpoint)
    if threshold != "0.5" and len(classes) > 2:
        raise Problem("--threshold is for two classes", 2)
    threshold, source = choose_threshold(model, checkpoint, threshold, data)
    model.to(device)
    paths = [path for f in map(Path, files) for path in (find_runs(f).values() if f.is_dir() else [f])]
    rows, failures = [], {}
    for path in tqdm(paths, desc="predicting", unit="file", disable=None):
        try:
            picture, statistics = picture_of_run(path, checkpoint["recipe"])
        except Problem as problem:
            failures[path] = str(problem)
            continue
        x = transform(torch.from_numpy(picture).permute(2, 0, 1).contiguous()).contiguous()[None]
        logits, _ = predict(model, [(x, torch.zeros(1))], device)
        p = finite(probabilities_of(logits).numpy())
        row = {"file": str(path), "called": classes[called_class(p, threshold)[0]]}
        row |= {f"probability_{name}": f"{value:.8f}" for name, value in zip(classes, p[0], strict=True)}
        rows.append(row | {"warning": warnings_of(statistics, checkpoint["cohort"])})

    config = checkpoint["config"]
    print("; ".join([f"{config['backbone']} trained on {config['data_set']} (run {run})", *cautions(config)]))
    if len(classes) == 2:
        print(f"{classes[1]} is called where its probability is {threshold:.4g} or more ({source})")
    shown = [f"probability_{name}" for name in (classes[1:] if len(classes) == 2 else classes)]
    width = max([len(row["file"]) for row in rows], default=4)
    if rows:
        print("\n" + "  ".join(["file".ljust(width), *shown, "called", "warning"]))
    for row in rows:
        numbers = [f"{float(row[name]):.4f}".rjust(len(name)) for name in shown]
        print("  ".join([row["file"].ljust(width), *numbers, row["called"], row["warning"]]).rstrip())
    if out and rows:
        write_rows(out, rows)
        print(f"\n{len(rows)} predictions in {out}")
    for path, reason in failures.items():
        print(f"left out: {reason if path.name in reason else f'{path}: {reason}'}", file=sys.stderr)
    return 1 if failures else 0


# ---------------------------------------------------------------- many runs

# Columns of the article's Tables 1 and 2: the values of the best epoch by validation loss.
ARTICLE_COLUMNS = {
    "backbone": "backbone",
    "parameters_millions": "parameters (M)",
    "best_epoch": "best epoch",
    "train_loss": "train loss",
    "val_loss": "validation loss",
    "val_accuracy": "accuracy",
    "val_f1": "F1",
    "val_precision": "precision",
    "val_recall": "recall",
    "seconds": "time (s)",
}
COMPARED = ("val_loss", "val_accuracy", "val_f1", "val_precision", "val_recall")


def runs_below(paths):
    """The run folders named, and all below a folder that is not a run itself, each once."""
    runs = {}
    for path in map(Path, paths):
        below = [] if path.suffix == ".pt" or (path / "best.pt").exists() else sorted(path.glob("**/best.pt"))
        for run in [checkpoint.parent for checkpoint in below] or [find_run(path)]:
            runs[run.resolve()] = run
    return list(runs.values())


def row_of(run):
    """One row of comparison.csv, and under `key` what replicates of this run share: all settings but seed and fold."""
    try:
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
        epochs = [
            {name: float(value or "nan") for name, value in row.items()} for row in read_table(run / "epochs.csv")
        ]
        best = min((row for row in epochs if math.isfinite(row["val_loss"])), key=lambda row: row["val_loss"])
        notes = cautions(config)
        if config.get("fold") is not None:
            notes.append(f"fold {config['fold']}")
        if config.get("status") != "finished":
            notes.append("unfinished")
        settings = {
            name: value for name, value in config.get("settings", {}).items() if name not in ("seed", "fold", "data")
        }
        settings |= {
            name: config.get(name) for name in ("data_set", "backbone", "weights_origin", "shuffle_labels", "grid")
        }
        return {
            "data_set": config["data_set"],
            **{name: best.get(name) for name in ARTICLE_COLUMNS},
            "backbone": config["backbone"],
            "parameters_millions": config["parameters"] / 1e6,
            "best_epoch": int(best["epoch"]),
            "seconds": config.get("seconds", sum(row.get("seconds", 0) for row in epochs)),
            "seed": config["seed"],
            "fold": config.get("fold"),
            "weights": config["weights_origin"],
            "notes": ", ".join(notes),
            "run": str(run),
            "shuffled": bool(config.get("shuffle_labels")),
            "settings": settings,
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Problem(f"{run}: config.json or epochs.csv cannot be read ({type(error).__name__}: {error})") from None


def replicates_of(rows):
    """{label: rows}: runs that differ in nothing but seed and fold, the newest of each; more than one of them.

    A label names what tells a group from the others: backbone or data set, and a setting only where it must.
    """
    groups = defaultdict(dict)
    for row in sorted(rows, key=lambda row: os.path.getmtime(Path(row["run"]) / "epochs.csv")):
        # The same seed twice is the same measurement, not a replicate.
        groups[json.dumps(row["settings"], sort_keys=True)][row["seed"], row["fold"]] = row
    groups = [list(members.values()) for members in groups.values() if len(members) > 1]

    def settings_that_vary(groups, names):
        return [name for name in names if len({str(group[0]["settings"].get(name)) for group in groups}) > 1]

    head = settings_that_vary(groups, ("data_set", "backbone")) or ["backbone"]
    alike = defaultdict(list)
    for group in groups:
        alike[", ".join(str(group[0]["settings"][name]) for name in head)].append(group)
    labelled = {}
    for label, groups in alike.items():
        vary = settings_that_vary(groups, sorted({name for group in groups for name in group[0]["settings"]}))
        for group in groups:
            text = [f"{name} {group[0]['settings'].get(name)}" for name in vary if name != "shuffle_labels"]
            notes = cautions(group[0]["settings"])
            labelled[", ".join([label, *text]) + (f" ({', '.join(notes)})" if notes else "")] = group
    return dict(sorted(labelled.items(), key=lambda item: np.median([row["val_loss"] for row in item[1]])))


def dunn(groups):
    """[(i, j, z, p)] of Dunn's test for each pair of groups of values, with the correction for ties (Dunn 1964)."""
    ranks, n = rankdata(np.concatenate(groups)), sum(map(len, groups))
    means = [part.mean() for part in np.split(ranks, np.cumsum([len(group) for group in groups])[:-1])]
    ties = np.unique(ranks, return_counts=True)[1]
    variance = n * (n + 1) / 12 - (ties**3 - ties).sum() / (12 * (n - 1))
    result = []
    for i, j in combinations(range(len(groups)), 2):
        error = math.sqrt(variance * (1 / len(groups[i]) + 1 / len(groups[j])))
        z = (means[i] - means[j]) / error if error else math.nan
        result.append((i, j, z, float(2 * norm.sf(abs(z)))))
    return result


def tests_of(replicates):
    """Kruskal-Wallis ({metric: (H, p)}) and Dunn rows, p adjusted after Benjamini and Hochberg within each metric."""
    overall, pairs, labels = {}, [], list(replicates)
    for name in COMPARED:
        groups = [np.array([row[name] for row in replicates[label]]) for label in labels]
        if not all(np.isfinite(group).all() for group in groups) or len(np.unique(np.concatenate(groups))) == 1:
            overall[name] = (math.nan, math.nan)  # a metric that is undefined in a run, or the same in all
            continue
        overall[name] = tuple(map(float, kruskal(*groups)))
        found = dunn(groups)
        adjusted = false_discovery_control([p for *_, p in found], method="bh")
        pairs += [
            {"metric": name, "first": labels[i], "second": labels[j], "z": z, "p": p, "p_adjusted": float(q)}
            for (i, j, z, p), q in zip(found, adjusted, strict=True)
        ]
    return overall, pairs


def draw_replicates(path, replicates, title):
    """Article, Figures 1 and 3: median of each metric, standard deviation as error bar, a dot for each replicate."""
    labels = list(replicates)
    ticks = [label.replace(" (", "\n(") for label in labels]
    size = (3 + 2.1 * len(COMPARED), 1.8 + 0.5 * len(labels))
    with figure(path, title, size=size, ncols=len(COMPARED), sharey=True) as (_, axes):
        for ax, name in zip(axes, COMPARED, strict=True):
            values = [np.array([row[name] for row in replicates[label]]) for label in labels]
            deviations = [group.std(ddof=1) for group in values]
            ax.barh(
                ticks, [np.median(v) for v in values], xerr=deviations, color="lightsteelblue", capsize=3, height=0.65
            )
            for y, group in enumerate(values):
                if np.isnan(group).any():
                    ax.text(0.03, y, "undefined", va="center")
                ax.plot(group, [y] * len(group), "o", color="black", markersize=3.5, alpha=0.7)
            ax.set(xlabel=ARTICLE_COLUMNS[name], xlim=(0, None if name == "val_loss" else 1.02))
            ax.spines[["top", "right"]].set_visible(False)
        axes[0].invert_yaxis()


def markdown(rows):
    """Rows of text, the first of them the header, as an aligned Markdown table."""
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(str(c).ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def write_rows(path, rows):
    """Dicts with the keys of the first one as a CSV."""
    write_csv(path, [rows[0].keys(), *([row[key] for key in rows[0]] for row in rows)])


def compare(runs, out=None):
    """Tables 1 and 2 for many runs, Figure 1 or 3 and its tests for replicates among them; returns the exit status."""
    rows, failures = [], []
    for run in runs:
        try:
            rows.append(row_of(run))
        except Problem as problem:
            failures.append(str(problem))
    if not rows:
        raise Problem(failures[0])
    rows.sort(key=lambda row: row["val_loss"])
    out = Path(out or os.path.commonpath([run.resolve() for run in runs]))
    out.mkdir(parents=True, exist_ok=True)
    hidden = ("shuffled", "settings")
    write_rows(out / "comparison.csv", [{k: v for k, v in row.items() if k not in hidden} for row in rows])

    several = len({row["data_set"] for row in rows}) > 1
    table = [(["data set"] if several else []) + [*ARTICLE_COLUMNS.values(), "seed", "notes"]]
    for row in rows:
        losses = [number(row[name]) for name in ("train_loss", *COMPARED)]
        cells = [row["backbone"], number(row["parameters_millions"], ".2f"), row["best_epoch"], *losses]
        cells += [number(row["seconds"], ".0f"), row["seed"], row["notes"]]
        table.append(([row["data_set"]] if several else []) + cells)
    names = ", ".join(sorted({row["data_set"] for row in rows}))
    random = "; random initialisation where marked" if any("random initialisation" in r["notes"] for r in rows) else ""
    text = [
        f"# {len(rows)} runs on {names}{random}",
        "Values of the best epoch by validation loss, sorted by it.",
        markdown(table),
    ]

    replicates = replicates_of(rows)
    if replicates:
        summary, table = [], [["", "runs", *(ARTICLE_COLUMNS[name] for name in COMPARED)]]
        for label, members in replicates.items():
            medians = {name: float(np.median([row[name] for row in members])) for name in COMPARED}
            deviations = {name: float(np.std([row[name] for row in members], ddof=1)) for name in COMPARED}
            cells = [f"{number(medians[name])} ± {number(deviations[name])}" for name in COMPARED]
            cells = ["undefined" if "undefined" in cell else cell for cell in cells]
            table.append([label, len(members), *cells])
            summary.append({"replicates_of": label, "runs": len(members)})
            for name in COMPARED:
                summary[-1] |= {f"{name}_median": medians[name], f"{name}_deviation": deviations[name]}
        write_rows(out / "replicates.csv", summary)
        text += ["## Replicates", "Median ± standard deviation; see replicates.png.", markdown(table)]
        title = f"Replicates on {names}: median, standard deviation, each run{random}"
        draw_replicates(out / "replicates.png", replicates, title)

    tested = {label: members for label, members in replicates.items() if not members[0]["shuffled"]}
    if len(tested) > 1:
        overall, pairs = tests_of(tested)
        if pairs:
            write_rows(out / "dunn.csv", pairs)
        table = [["", *(ARTICLE_COLUMNS[name] for name in COMPARED)]]
        table.append(["Kruskal-Wallis", *(number(overall[name][1], ".2g") for name in COMPARED)])
        adjusted = {(pair["first"], pair["second"], pair["metric"]): pair["p_adjusted"] for pair in pairs}
        for a, b in combinations(tested, 2):
            p_values = (adjusted.get((a, b, name), math.nan) for name in COMPARED)
            table.append([f"{a} / {b}", *(number(p, ".2g") for p in p_values)])
        text += [
            "## Tests",
            "p values: Kruskal-Wallis over all groups, then Dunn's test for each pair, adjusted after Benjamini and "
            "Hochberg within each metric. Replicates are trainings on the same people: a small p speaks of training, "
            "not of new people.",
            markdown(table),
        ]
    with whole_file(out / "comparison.md") as temporary:
        temporary.write_text("\n\n".join(text) + "\n", encoding="utf-8")
    print("\n\n".join(text) + f"\n\nresults: {out}/")
    for failure in failures:
        print(f"left out: {failure}", file=sys.stderr)
    return 1 if failures else 0


# ---------------------------------------------------------------- command line


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "runs", nargs="*", metavar="RUN", help="run folder, or a folder of runs (default: the newest run)"
    )
    parser.add_argument(
        "--out",
        help="folder for results (default: the run or the runs' common folder); with --predict a CSV (default: none)",
    )
    group = parser.add_argument_group("one run")
    group.add_argument("--data", metavar="DIR", help="another data set, or where the run's own has moved")
    group.add_argument("--split", choices=SPLITS, default="test", help="pictures to judge on")
    group.add_argument(
        "--threshold",
        default="0.5",
        metavar="P|val",
        help="call class 1 from this probability on; val chooses it on the validation split",
    )
    group = parser.add_argument_group("new raw runs")
    group.add_argument(
        "--predict",
        nargs="+",
        metavar="FILE",
        help="mzML or mzXML files, or folders of them; an existing --out is never replaced",
    )
    args = parser.parse_args(argv)
    if args.threshold != "val":
        try:
            inside = 0 <= float(args.threshold) <= 1
        except ValueError:
            inside = False
        if not inside:
            raise Problem(f"--threshold {args.threshold}: give a number between 0 and 1, or val", 2)
        args.threshold = str(float(args.threshold))
    return args


def main():
    args = parse_arguments()
    runs = runs_below(args.runs) if args.runs else [find_run()]
    if len(runs) > 1:
        for flag, given in (("--predict", args.predict), ("--data", args.data)):
            if given:
                raise Problem(f"{flag} takes one run, not {len(runs)}", 2)
        if args.split != "test" or args.threshold != "0.5":
            raise Problem("--split and --threshold take one run; many are compared by their validation split", 2)
        return compare(runs, args.out)
    if args.predict:
        if args.split != "test":
            raise Problem("--split does not go with --predict", 2)
        return predict_files(runs[0], args.predict, args.threshold, args.data, args.out)
    return evaluate(runs[0], args.data, args.split, args.threshold, args.out)


if __name__ == "__main__":
    run_script(main)
