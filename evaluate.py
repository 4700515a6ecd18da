"""Judge a run on pictures it has never seen, predict new raw runs, compare many runs.

Article: "Evaluating the final model" (test metrics, Figure 5), and the tables and figures that rank architectures
(Tables 1 and 2), replicates (Figure 1) and kinds of picture (Figure 3).

    python evaluate.py                                                    # the newest run on its test split
    python evaluate.py runs/golestan/convnext_large/seed2643 --threshold val
    python evaluate.py runs/golestan/convnext_large/seed2643 --predict new/*.mzML --out new_predictions.csv
    python evaluate.py runs/golestan                    # every run below, by its validation split: no look at the test
"""

import json
import math
import os
import re
import sys
from collections import defaultdict
from dataclasses import asdict
from itertools import combinations, zip_longest
from pathlib import Path

import numpy as np
import torch
from scipy.stats import binomtest, false_discovery_control, kruskal, norm, rankdata, tiecorrect
from torch.utils.data import DataLoader
from tqdm import tqdm

import convert
import deeplcms
from convert import Parser, Problem, bounded, first_few, run_script, whole_file, write_rows
from deeplcms import called_class, figure, load_run, metrics_of, write_json

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
    return notes + ["trained on shuffled labels"] * bool(config["shuffle_labels"])


def number(value, form=".3f"):
    return "undefined" if math.isnan(value) else format(value, form)


def padded(rows):
    """Rows of cells as text, each cell as wide as the widest of its column."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
    return [[str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]


def plain(rows):
    return "\n".join("  ".join(row).rstrip() for row in padded(rows))


def markdown(rows):
    header, *lines = [f"| {' | '.join(row)} |" for row in padded(rows)]
    return "\n".join([header, re.sub("[^|]", "-", header), *lines])


# ---------------------------------------------------------------- one run: pictures -> probabilities -> metrics


def held_out_pictures(checkpoint, data, split):
    """Pictures of one split of `data`, copies left out. Raises Problem unless they are what the run was trained for.

    On other axes the same pixel is another compound, and another conversion paints the same compound differently.
    """
    config, classes = checkpoint["config"], checkpoint["classes"]
    if data is None and not Path(config["data"]).is_dir():
        raise Problem(f"{config['data']}: this run's data set is not there any more; say where it is with --data", 2)
    own = data is None or Path(data).resolve().name == config["data_set"]
    if own and split != "test" and config["fold"] is not None:
        raise Problem(f"this run is fold {config['fold']} of train and val together and has seen most of {split}", 2)
    data = data or config["data"]
    pictures = [picture for picture in deeplcms.find_pictures(data, (split,))[split] if not picture.is_copy]
    here, there = asdict(pictures[0].recipe), asdict(checkpoint["recipe"])
    if differing := [f"{name} is {here[name]}, not {there[name]}" for name in here if here[name] != there[name]]:
        raise Problem(f"{data}: not the axes and settings that the run was trained with: {'; '.join(differing)}", 2)
    if unknown := {picture.phenotype for picture in pictures} - set(classes):
        raise Problem(f"{data}: phenotype {first_few(unknown)} is none of the run's classes ({', '.join(classes)})", 2)
    return pictures


def classify(model, batches):
    """(labels (N,), probabilities (N, K)) of batches (pictures, labels), in their order."""
    device = deeplcms.choose_device()
    logits, labels = deeplcms.predict(model.to(device), batches, device)
    probabilities = deeplcms.probabilities_of(logits).numpy()
    if not np.isfinite(probabilities).all():
        raise Problem("the network's output is not a number: its training diverged; train again with a lower --lr")
    return labels.numpy(), probabilities


def classify_pictures(model, classes, pictures, title):
    transform = deeplcms.evaluation_transform(model.image_size, model.mean, model.std)
    workers = min(4, os.cpu_count() or 1) if len(pictures) >= 256 else 0  # starting them takes longer than 256 pictures
    loader = DataLoader(deeplcms.Pictures(pictures, classes, transform), batch_size=32, num_workers=workers)
    return classify(model, tqdm(loader, desc=title, unit="batch", disable=None, leave=False))


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
    drawn = np.empty((len(METRICS), n))
    for b in tqdm(range(n), desc="bootstrap", disable=None, leave=False):
        i = np.concatenate([rng.choice(pictures, len(pictures)) for pictures in members])
        values = metrics_of(labels[i], probabilities[i], threshold)
        drawn[:, b] = [values[name] for name in METRICS]
    intervals = {}
    for name, values in zip(METRICS, drawn, strict=True):
        defined = values[~np.isnan(values)]
        enough = len(defined) >= 0.95 * n
        intervals[name] = tuple(map(float, np.percentile(defined, [2.5, 97.5]))) if enough else (math.nan, math.nan)
    return intervals


def judge(labels, probabilities, classes, threshold=0.5):
    """The figures of metrics.json: confusion counts (rows true, columns called) and each metric with its interval."""
    values = metrics_of(labels, probabilities, threshold)
    intervals = bootstrap(labels, probabilities, threshold, RESAMPLES)
    result = {"n": len(labels), "classes": classes, "confusion": values["confusion"]}
    if len(classes) == 2:
        (tn, fp), (fn, tp) = values["confusion"]
        result |= {"positive": classes[1], "threshold": threshold, "tp": tp, "tn": tn, "fp": fp, "fn": fn}
    result["metrics"] = {k: {"value": values[k], "low": low, "high": high} for k, (low, high) in intervals.items()}
    return result | {"bootstrap": {"resamples": RESAMPLES, "seed": SEED, "stratified": True, "level": 0.95}}


def table_of(result):
    """The result of `judge` as text."""
    classes = result["classes"]
    if len(classes) == 2:
        text = "TP {tp}  TN {tn}  FP {fp}  FN {fn}  (positive: {positive})".format(**result)
    else:
        rows = [["", *classes], *([name, *row] for name, row in zip(classes, result["confusion"], strict=True))]
        text = f"confusion (rows: true, columns: called)\n{plain(rows)}"
    table = [["", "value", "95 % interval" + ("" if len(classes) == 2 else "   (mean over classes)")]]
    for name, title in METRICS.items():
        value, low, high = result["metrics"][name].values()
        table.append([title, number(value), "undefined" if math.isnan(low) else f"{low:.3f} - {high:.3f}"])
    return f"{text}\n\n{plain(table)}"


def results_folder(run, config, data, split):
    """The run's own folder for its test split; a folder inside it for anything else, so that nothing is overwritten."""
    own, other = Path(config["data"]).resolve(), Path(data or config["data"]).resolve()
    moved = other.name == config["data_set"] and not own.is_dir()
    if other != own and not moved:
        return run / f"{other.name}-{split}"
    return run if split == "test" else run / split


def choose_threshold(model, checkpoint, threshold, data=None):
    """(threshold, where it comes from) of --threshold: a number, or 'val' for the best one on the validation split."""
    n_classes, config = len(checkpoint["classes"]), checkpoint["config"]
    if threshold == 0.5:
        return 0.5, "default"
    if n_classes > 2:
        raise Problem(f"--threshold is for two classes; this run has {n_classes} and calls the most probable one", 2)
    if threshold != "val":
        return threshold, "given"
    own = None if Path(config["data"]).is_dir() else data  # chosen where the run was trained, not on other people
    pictures = held_out_pictures(checkpoint, own, "val")
    labels, probabilities = classify_pictures(model, checkpoint["classes"], pictures, "validation split")
    best = best_threshold(labels, probabilities)
    reached = metrics_of(labels, probabilities, best)["balanced_accuracy"]
    place = f"{own or config['data']}/val, {len(labels)} pictures"
    return best, f"best balanced accuracy, {reached:.3f}, on the validation split: {place}"


def evaluate(run, data=None, split="test", threshold=0.5, out=None):
    """Metrics, predictions and figures of one run on one split; writes them and prints the table."""
    if threshold == "val" and split == "val":
        raise Problem("--threshold val with --split val would choose and judge on the same pictures", 2)
    model, checkpoint = load_run(run)
    config, classes = checkpoint["config"], checkpoint["classes"]
    pictures = held_out_pictures(checkpoint, data, split)
    threshold, source = choose_threshold(model, checkpoint, threshold, data)
    labels, probabilities = classify_pictures(model, classes, pictures, f"{split} split")
    result = judge(labels, probabilities, classes, threshold)

    folder = Path(out) if out else results_folder(run, config, data, split)
    folder.mkdir(parents=True, exist_ok=True)
    about = {"run": str(run), "backbone": config["backbone"], "weights_origin": config["weights_origin"]}
    about |= {"shuffle_labels": config["shuffle_labels"], "epoch": checkpoint["epoch"]}
    about |= {"data": str(data or config["data"]), "split": split, "threshold_from": source}
    write_json(folder / "metrics.json", about | result)
    write_predictions(folder / "predictions.csv", pictures, labels, probabilities, classes, threshold)

    data_set = Path(data).resolve().name if data else config["data_set"]
    title = "; ".join([f"{config['backbone']} on {data_set}, {split} split, {len(labels)} pictures", *cautions(config)])
    draw_confusion(folder / "confusion.png", result, title)
    draw_roc(folder / "roc.png", labels, probabilities, result, title)
    draw_calibration(folder / "calibration.png", labels, probabilities, classes, title)
    draw_prediction_matrix(folder / "prediction_matrix.png", pictures, probabilities, classes, threshold, title)
    print(f"{title}\nrun {run}, epoch {checkpoint['epoch']}, {config['weights_origin']}")
    if len(classes) == 2:
        print(f"{classes[1]} is called where its probability is {threshold:.4g} or more ({source})")
    if absent := [name for k, name in enumerate(classes) if k not in labels]:
        print(f"no picture of {first_few(absent)} in this split: metrics that need one are undefined")
    if (fewest := min(np.bincount(labels, minlength=len(classes)))) < 10:
        print(f"only {fewest} pictures of some class: a bootstrap interval of so few is too narrow to be believed")
    print(f"\n{table_of(result)}\n\nresults: {folder}/")


def probability_columns(classes, probabilities):
    return {f"probability_{name}": f"{p:.8f}" for name, p in zip(classes, probabilities, strict=True)}


def write_predictions(path, pictures, labels, probabilities, classes, threshold):
    """Every picture: sample, true phenotype, the one called, and the probability of each class."""
    rows = []
    called = called_class(probabilities, threshold)
    for picture, label, call, p in zip(pictures, labels, called, probabilities, strict=True):
        row = {"sample_name": picture.sample_name, "group": picture.group, "phenotype": classes[label]}
        row |= {"called": classes[call], "right": "yes" if call == label else "no"}
        rows.append(row | probability_columns(classes, p) | {"file": picture.path})
    write_rows(path, rows)


# ---------------------------------------------------------------- one run: figures


def draw_confusion(path, result, title):
    """Counts, shaded by the share of each true class."""
    counts, classes = np.array(result["confusion"]), result["classes"]
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    with figure(path, title, size=(3.2 + 0.9 * len(classes), 2.8 + 0.8 * len(classes))) as ax:
        ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for (i, j), count in np.ndenumerate(counts):
            colour = "white" if share[i, j] > 0.5 else "black"
            ax.text(j, i, f"{count}\n{share[i, j]:.0%}", ha="center", va="center", color=colour)
        ax.set_xticks(range(len(classes)), classes)
        ax.set_yticks(range(len(classes)), classes)
        ax.set(xlabel="called", ylabel="true phenotype")


def roc_curve(positive, score):
    """(false positive rates, true positive rates), from (0, 0) to (1, 1); equal scores make one step."""
    thresholds = np.append(np.inf, np.unique(score)[::-1])
    return tuple([(score[members] >= t).mean() for t in thresholds] for members in (~positive, positive))


def draw_roc(path, labels, probabilities, result, title):
    classes, auc = result["classes"], result["metrics"]["roc_auc"]
    with figure(path, title, size=(5.6, 6.4)) as ax:
        for k in [1] if len(classes) == 2 else range(len(classes)):
            if 0 < (labels == k).sum() < len(labels):
                ax.plot(*roc_curve(labels == k, probabilities[:, k]), linewidth=2, label=classes[k])
        ax.plot([0, 1], [0, 1], color="grey", linestyle=":", label="chance")
        if len(classes) == 2 and not math.isnan(auc["value"]):
            rates = result["fp"] / (result["fp"] + result["tn"]), result["tp"] / (result["tp"] + result["fn"])
            ax.plot(*rates, "o", color="black", label=f"threshold {result['threshold']:.3g}")
        interval = "" if math.isnan(auc["low"]) else f" (95 % interval {auc['low']:.3f} - {auc['high']:.3f})"
        ax.set_title(f"ROC AUC {number(auc['value'])}{interval}", fontsize=10)
        ax.set(xlabel="false positive rate", ylabel="true positive rate", box_aspect=1)
        ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        ax.legend(loc="lower right", frameon=False)


def reliability(hit, probability, n_bins):
    """[(mean probability, share of hits, number)] of each filled bin of equal width."""
    place = np.minimum((probability * n_bins).astype(int), n_bins - 1)
    return [(probability[place == b].mean(), hit[place == b].mean(), int((place == b).sum())) for b in np.unique(place)]


def draw_calibration(path, labels, probabilities, classes, title):
    """Does a probability of 0.8 come true in eight of ten? Of class 1, or with more classes of the class called."""
    two = len(classes) == 2
    k = np.ones(len(labels), int) if two else probabilities.argmax(1)
    n_bins = 10 if len(labels) >= 100 else 5
    probability = probabilities[np.arange(len(labels)), k]
    mean, share, sizes = map(np.array, zip(*reliability(labels == k, probability, n_bins), strict=True))
    limits = [binomtest(round(s * n), n).proportion_ci(0.95, "wilson") for s, n in zip(share, sizes, strict=True)]
    with figure(path, title, size=(6.4, 6.2), nrows=2, sharex=True, height_ratios=[3, 1]) as (ax, below):
        ax.plot([0, 1], [0, 1], color="grey", linestyle=":", label="perfectly calibrated")
        bars = np.abs(np.transpose(limits) - share)  # (2, bins): below and above
        ax.errorbar(mean, share, bars, fmt="o-", capsize=3, label="observed, 95 % Wilson interval")
        ax.set(ylabel=f"share that is {classes[1]}" if two else "share called rightly", ylim=(-0.03, 1.03))
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
        filled, _, bars = below.hist(probability, n_bins, range=(0, 1), color="lightsteelblue", edgecolor="white")
        below.bar_label(bars, [f"{n:.0f}" if n else "" for n in filled], padding=1)
        below.set(ylabel="pictures", xlim=(-0.02, 1.02), ylim=(0, 1.3 * filled.max()))
        below.set_xlabel(f"predicted probability of {classes[1] if two else 'the class called'}")


def draw_prediction_matrix(path, pictures, probabilities, classes, threshold, title):
    """Article, Figure 5: nine pictures, classes in turn, drawn at random with a fixed seed; green is right."""
    order = np.random.default_rng(SEED).permutation(len(pictures))
    turns = zip_longest(*([i for i in order if pictures[i].phenotype == name] for name in classes))
    chosen = [i for turn in turns for i in turn if i is not None][:9]
    called = called_class(probabilities, threshold)
    n_rows = math.ceil(len(chosen) / 3)
    size = (10, 1.2 + 3.1 * n_rows)
    with figure(path, title, size, nrows=n_rows, ncols=3, sharex=True, sharey=True, squeeze=False) as axes:
        for ax in axes.flat[len(chosen) :]:
            ax.set_axis_off()
        for ax in axes.flat[max(0, len(chosen) - 3) : len(chosen)]:
            ax.tick_params(labelbottom=True)
        for ax, i in zip(axes.flat, chosen, strict=False):
            recipe, k = pictures[i].recipe, 1 if len(classes) == 2 else called[i]
            extent = recipe.rt_min, recipe.rt_max, recipe.mz_min, recipe.mz_max
            ax.imshow(pictures[i].load().permute(1, 2, 0).numpy(), extent=extent, aspect="auto")
            right = classes[called[i]] == pictures[i].phenotype
            mark, colour = ("right", RIGHT) if right else ("wrong", WRONG)
            text = f"{pictures[i].sample_name[:30]}: P({classes[k]}) = {probabilities[i, k]:.3f}"
            ax.set_title(f"{text}\ntrue phenotype: {pictures[i].phenotype} ({mark})", color=colour, fontsize=10)
            for spine in ax.spines.values():
                spine.set(color=colour, linewidth=4)
        axes[0, 0].figure.supxlabel("retention time (min)")
        axes[0, 0].figure.supylabel("m/z")


# ---------------------------------------------------------------- new raw runs


# Statistics of a run that a new one is compared in: what a warning says, and how it writes the value.
WATCHED = {
    "total_intensity": ("total intensity {}", "{:.3g}"),
    "outside": ("{} of the intensity lies outside the axes", "{:.1%}"),
    "rt_first": ("first peak at {}", "{:.2f} min"),
    "rt_last": ("last peak at {}", "{:.2f} min"),
    "mz_low": ("lowest peak at {}", "m/z {:.2f}"),
    "mz_high": ("highest peak at {}", "m/z {:.2f}"),
}


def warnings_of(statistics, cohort):
    """What lies far from the training cohort in the statistics of a new run, as one line of text; '' if nothing does.

    Far from the median means beyond four robust standard deviations (1.4826 x median absolute deviation) and beyond a
    floor, as a small cohort of one batch varies less than instruments do: half a decade of total intensity, a tenth
    of the axis for its ends, 0.05 for the share of intensity outside the axes.
    """
    if not all(cohort.get(name) for name in WATCHED):
        return ""  # pictures without statistics, made by another program: nothing to compare with
    medians = {name: np.median(cohort[name]) for name in WATCHED}
    rt, mz = medians["rt_last"] - medians["rt_first"], medians["mz_high"] - medians["mz_low"]
    floors, warnings = (0.5, 0.05, 0.1 * rt, 0.1 * rt, 0.1 * mz, 0.1 * mz), []
    for (name, (text, form)), floor in zip(WATCHED.items(), floors, strict=True):
        values = np.array([statistics[name], *cohort[name]])
        if name == "total_intensity":
            values = np.log10(np.maximum(values, 1e-9))
        deviations = np.abs(values - np.median(values[1:]))
        if deviations[0] > max(4 * 1.4826 * np.median(deviations[1:]), floor):
            found, usual = form.format(statistics[name]), form.format(medians[name])
            warnings.append(f"{text.format(found)} (training median {usual})")
    return "; ".join(warnings)


def predict_files(run, files, threshold=0.5, data=None, out=None):
    """Raw runs -> table of probabilities, converted with the checkpoint's recipe; returns the exit status.

    Each picture takes the path of a PNG (uint8 RGB, then the evaluation transform), so that a file gives what its
    converted picture gives. An unreadable file costs one line on stderr and exit status 1.
    """
    if out and Path(out).exists():
        raise Problem(f"--out {out} exists already; give another name", 2)
    if out and not Path(out).absolute().parent.is_dir():
        raise Problem(f"--out {out}: no such folder", 2)
    model, checkpoint = load_run(run)
    config, classes = checkpoint["config"], checkpoint["classes"]
    transform = deeplcms.evaluation_transform(model.image_size, model.mean, model.std)
    threshold, source = choose_threshold(model, checkpoint, threshold, data)
    paths = [path for f in map(Path, files) for path in (convert.find_runs(f).values() if f.is_dir() else [f])]
    rows, failures = [], []
    for path in tqdm(paths, desc="predicting", unit="file", disable=None):
        try:
            picture, statistics = convert.picture_of_run(path, checkpoint["recipe"])
        except Problem as problem:
            failures.append(problem)
            continue
        x = transform(torch.from_numpy(picture).permute(2, 0, 1).contiguous()).contiguous()[None]
        _, p = classify(model, [(x, torch.zeros(1))])
        row = {"file": str(path), "called": classes[called_class(p, threshold)[0]]} | probability_columns(classes, p[0])
        rows.append(row | {"warning": warnings_of(statistics, checkpoint["cohort"])})

    print("; ".join([f"{config['backbone']} trained on {config['data_set']} (run {run})", *cautions(config)]))
    if len(classes) == 2:
        print(f"{classes[1]} is called where its probability is {threshold:.4g} or more ({source})")
    shown = [f"probability_{name}" for name in (classes[1:] if len(classes) == 2 else classes)]
    table = [["file", *shown, "called", "warning"]]
    for row in rows:
        table.append([row["file"], *(f"{float(row[name]):.4f}" for name in shown), row["called"], row["warning"]])
    if rows:
        print(f"\n{plain(table)}")
    if out and rows:
        write_rows(out, rows)
        print(f"\n{len(rows)} predictions in {out}")
    for failure in failures:
        print(f"left out: {failure}", file=sys.stderr)
    return 1 if failures else 0


# ---------------------------------------------------------------- many runs

# What runs are compared by, in the words of the article's Tables 1 and 2: values of the best epoch by validation loss.
COMPARED = {
    "val_loss": "validation loss",
    "val_accuracy": "accuracy",
    "val_f1": "F1",
    "val_precision": "precision",
    "val_recall": "recall",
}


def runs_below(paths):
    """The run folders named, and all below a folder that is not a run itself, each once."""
    runs = {}
    for path in map(Path, paths):
        below = [] if (path / "best.pt").exists() else sorted(path.glob("**/best.pt"))
        for run in [checkpoint.parent for checkpoint in below] or [deeplcms.find_run(path)]:
            runs[run.resolve()] = run
    return list(runs.values())


def row_of(run):
    """One row of comparison.csv, and under `settings` what its replicates share: all settings but seed and fold."""
    try:
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
        table = convert.read_table(run / "epochs.csv")
        epochs = [{name: float(value or "nan") for name, value in row.items()} for row in table]
        best = min((row for row in epochs if math.isfinite(row["val_loss"])), key=lambda row: row["val_loss"])
        notes = cautions(config)
        if config["fold"] is not None:
            notes.append(f"fold {config['fold']}")
        if config.get("status") != "finished":
            notes.append("unfinished")
        row = {"data_set": config["data_set"], "backbone": config["backbone"]}
        row |= {"parameters_millions": config["parameters"] / 1e6, "best_epoch": int(best["epoch"])}
        row |= {name: best[name] for name in ("train_loss", *COMPARED)}
        row |= {"seconds": round(sum(row["seconds"] for row in epochs), 1), "seed": config["seed"]}
        row |= {"fold": config["fold"], "weights": config["weights_origin"], "notes": ", ".join(notes), "run": str(run)}
        settings = {name: value for name, value in config["settings"].items() if name not in ("seed", "fold", "data")}
        known_later = ("data_set", "backbone", "weights_origin", "shuffle_labels", "grid")
        return row | {"settings": settings | {name: config[name] for name in known_later}}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Problem(f"{run}: config.json or epochs.csv cannot be read ({type(error).__name__}: {error})") from None


def replicates_of(rows):
    """{label: rows}: runs that differ in nothing but seed and fold, the newest of each; more than one of them.

    A label names what tells a group from the others: backbone or data set, and a setting only where it must.
    """
    members = defaultdict(dict)  # the same seed twice is the same measurement, not a replicate
    for row in sorted(rows, key=lambda row: os.path.getmtime(Path(row["run"]) / "epochs.csv")):
        members[json.dumps(row["settings"], sort_keys=True)][row["seed"], row["fold"]] = row
    groups = [(json.loads(settings), list(runs.values())) for settings, runs in members.items() if len(runs) > 1]

    def varying(groups, names):
        return [name for name in names if len({str(settings.get(name)) for settings, _ in groups}) > 1]

    head = varying(groups, ("data_set", "backbone")) or ["backbone"]
    alike, labelled = defaultdict(list), {}
    for settings, runs in groups:
        alike[", ".join(settings[name] for name in head)].append((settings, runs))
    for label, groups in alike.items():
        names = varying(groups, sorted({name for settings, _ in groups for name in settings} - {"shuffle_labels"}))
        for settings, runs in groups:
            text = ", ".join([label, *(f"{name} {settings.get(name)}" for name in names)])
            notes = ", ".join(cautions(settings))
            labelled[f"{text} ({notes})" if notes else text] = runs
    return dict(sorted(labelled.items(), key=lambda item: np.median([row["val_loss"] for row in item[1]])))


def dunn(groups):
    """[(i, j, z, p)] of Dunn's test for each pair of groups of values, with the correction for ties (Dunn 1964)."""
    ranks, n = rankdata(np.concatenate(groups)), sum(map(len, groups))
    means = [part.mean() for part in np.split(ranks, np.cumsum([len(group) for group in groups])[:-1])]
    variance = n * (n + 1) / 12 * tiecorrect(ranks)
    result = []
    for i, j in combinations(range(len(groups)), 2):
        error = math.sqrt(variance * (1 / len(groups[i]) + 1 / len(groups[j])))
        z = (means[i] - means[j]) / error
        result.append((i, j, z, float(2 * norm.sf(abs(z)))))
    return result


def tests_of(replicates):
    """Kruskal-Wallis ({metric: (H, p)}) and Dunn rows, p adjusted after Benjamini and Hochberg within each metric."""
    overall, pairs, labels = {}, [], list(replicates)
    for name in COMPARED:
        groups = [[row[name] for row in members] for members in replicates.values()]
        values = np.concatenate(groups)
        if not np.isfinite(values).all() or len(np.unique(values)) == 1:
            overall[name] = (math.nan, math.nan)  # a metric that is undefined in a run, or the same in all
            continue
        overall[name] = tuple(map(float, kruskal(*groups)))
        found = dunn(groups)
        for (i, j, z, p), adjusted in zip(found, false_discovery_control([p for *_, p in found]), strict=True):
            pair = {"metric": name, "first": labels[i], "second": labels[j]}
            pairs.append(pair | {"z": z, "p": p, "p_adjusted": float(adjusted)})
    return overall, pairs


def draw_replicates(path, replicates, title):
    """Article, Figures 1 and 3: median of each metric, standard deviation as error bar, a dot for each replicate."""
    ticks = [label.replace(" (", "\n(") for label in replicates]
    size = (3 + 2.1 * len(COMPARED), 1.8 + 0.5 * len(ticks))
    with figure(path, title, size, ncols=len(COMPARED), sharey=True) as axes:
        for ax, name in zip(axes, COMPARED, strict=True):
            values = [np.array([row[name] for row in members]) for members in replicates.values()]
            medians, deviations = [np.median(v) for v in values], [v.std(ddof=1) for v in values]
            ax.barh(ticks, medians, xerr=deviations, color="lightsteelblue", capsize=3, height=0.65)
            for y, group in enumerate(values):
                if np.isnan(group).any():
                    ax.text(0.03, y, "undefined", va="center")
                ax.plot(group, [y] * len(group), "o", color="black", markersize=3.5, alpha=0.7)
            ax.set(xlabel=COMPARED[name], xlim=(0, None if name == "val_loss" else 1.02))
            ax.spines[["top", "right"]].set_visible(False)
        axes[0].invert_yaxis()


def article_table(rows):
    """Tables 1 and 2 of the article, in Markdown; the data set is a column where there are several."""
    header = ["data set", "backbone", "parameters (M)", "best epoch", "train loss", *COMPARED.values()]
    table = [[*header, "time (s)", "seed", "notes"]]
    for row in rows:
        cells = [row["data_set"], row["backbone"], f"{row['parameters_millions']:.2f}", row["best_epoch"]]
        cells += [number(row[name]) for name in ("train_loss", *COMPARED)]
        table.append([*cells, f"{row['seconds']:.0f}", row["seed"], row["notes"]])
    several = len({row["data_set"] for row in rows}) > 1
    return markdown(table if several else [cells[1:] for cells in table])


def replicates_table(replicates):
    """(rows of replicates.csv, the same in Markdown): median and standard deviation of each metric."""
    rows, table = [], [["", "runs", *COMPARED.values()]]
    for label, members in replicates.items():
        rows.append({"replicates_of": label, "runs": len(members)})
        table.append([label, len(members)])
        for name in COMPARED:
            values = [row[name] for row in members]
            median, deviation = float(np.median(values)), float(np.std(values, ddof=1))
            rows[-1] |= {f"{name}_median": median, f"{name}_deviation": deviation}
            table[-1].append("undefined" if math.isnan(median) else f"{median:.3f} ± {deviation:.3f}")
    return rows, markdown(table)


def tests_table(overall, pairs, labels):
    adjusted = {(pair["first"], pair["second"], pair["metric"]): pair["p_adjusted"] for pair in pairs}
    table = [["", *COMPARED.values()], ["Kruskal-Wallis", *(number(overall[name][1], ".2g") for name in COMPARED)]]
    for a, b in combinations(labels, 2):
        table.append([f"{a} / {b}", *(number(adjusted.get((a, b, name), math.nan), ".2g") for name in COMPARED)])
    return markdown(table)


def compare(runs, out=None):
    """Tables 1 and 2 for many runs, Figure 1 or 3 and its tests for replicates among them; returns the exit status."""
    rows, failures = [], []
    for run in runs:
        try:
            rows.append(row_of(run))
        except Problem as problem:
            failures.append(problem)
    if not rows:
        raise failures[0]
    rows.sort(key=lambda row: row["val_loss"])
    out = Path(out or os.path.commonpath([run.resolve() for run in runs]))
    out.mkdir(parents=True, exist_ok=True)
    write_rows(out / "comparison.csv", [{k: v for k, v in row.items() if k != "settings"} for row in rows])
    data_sets = ", ".join(sorted({row["data_set"] for row in rows}))
    random = "; random initialisation where marked" * any("random initialisation" in row["notes"] for row in rows)
    text = [f"# {len(rows)} runs on {data_sets}{random}"]
    text += ["Validation metrics of the best epoch by validation loss, sorted by it.", article_table(rows)]

    if replicates := replicates_of(rows):
        summary, table = replicates_table(replicates)
        write_rows(out / "replicates.csv", summary)
        text += ["## Replicates", "Median ± standard deviation; see replicates.png.", table]
        title = f"Replicates on {data_sets}, validation pictures: median, standard deviation, each run{random}"
        draw_replicates(out / "replicates.png", replicates, title)
    contenders = {label: runs for label, runs in replicates.items() if not runs[0]["settings"]["shuffle_labels"]}
    if len(contenders) > 1:
        overall, pairs = tests_of(contenders)
        if pairs:
            write_rows(out / "dunn.csv", pairs)
        explanation = """p values: Kruskal-Wallis over all groups, then Dunn's test for each pair, adjusted after \
Benjamini and Hochberg within each metric. Replicates are trainings on the same people (folds: on overlapping parts of \
them, so that they are not independent): a small p speaks of training, not of new people."""
        text += ["## Tests", explanation, tests_table(overall, pairs, contenders)]

    text = "\n\n".join(text)
    with whole_file(out / "comparison.md") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    print(f"{text}\n\nresults: {out}/")
    for failure in failures:
        print(f"left out: {failure}", file=sys.stderr)
    return 1 if failures else 0


# ---------------------------------------------------------------- command line


def make_parser():
    parser = Parser(__doc__)
    add = parser.add_argument
    text = "run folder (default: the newest); several, or a folder of runs, are compared by their validation split"
    add("runs", nargs="*", metavar="RUN", help=text)
    text = "folder for results (default: the run or the runs' common folder); with --predict a CSV (default: none)"
    add("--out", help=text)
    add = parser.add_argument_group("one run").add_argument
    add("--data", metavar="DIR", help="another data set, or where the run's own has moved")
    add("--split", choices=convert.SPLITS, default="test", help="pictures to judge on")
    text = "call class 1 from this probability on; val chooses it on the validation split"
    add("--threshold", type=bounded(float, 0, 1, word="val"), default=0.5, metavar="P|val", help=text)
    add = parser.add_argument_group("new raw runs").add_argument
    text = "mzML or mzXML files, or folders of them; an existing --out is never replaced"
    add("--predict", nargs="+", metavar="FILE", help=text)
    return parser


def main():
    args = make_parser().parse_args()
    runs = runs_below(args.runs) if args.runs else [deeplcms.find_run()]
    if len(runs) > 1:
        if args.predict or args.data:
            raise Problem(f"{'--predict' if args.predict else '--data'} takes one run, not {len(runs)}", 2)
        if args.split != "test" or args.threshold != 0.5:
            raise Problem("--split and --threshold take one run; many are compared by their validation split", 2)
        return compare(runs, args.out)
    if args.predict:
        if args.split != "test":
            raise Problem("--split does not go with --predict", 2)
        return predict_files(runs[0], args.predict, args.threshold, args.data, args.out)
    return evaluate(runs[0], args.data, args.split, args.threshold, args.out)


if __name__ == "__main__":
    run_script(main)
