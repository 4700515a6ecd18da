"""Judge a run on pictures it has never seen, predict new raw runs, compare many runs.

Article: "Evaluating the final model" (test metrics, Figure 5), and the tables and figures that rank architectures
(Tables 1 and 2), replicates (Figure 1) and kinds of picture (Figure 3). Beside every verdict stands what else could
explain it: chance, the order of measurement, drift.

    python evaluate.py                                                    # the newest run on its test split
    python evaluate.py runs/golestan/convnext_large/seed2643 --predict new/*.mzML --out new_predictions.csv
    python evaluate.py runs/golestan                    # every run below, by its validation split: no look at the test
    python evaluate.py runs/golestan/convnext_large --ensemble            # its folds or repeats vote on the test split
"""

import argparse
import json
import os
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import binomtest, chi2_contingency, false_discovery_control, kruskal, norm, rankdata
from tqdm import tqdm

from deeplcms import (
    RAW_FILE,
    SPLITS,
    Help,
    InputError,
    predict_classes,
    check_recipe,
    summarize_cohort,
    colours,
    count_confusions,
)
from deeplcms import (
    digest_pictures,
    measure_rt_shift,
    list_files,
    find_pictures,
    first_few,
    first_line,
    make_labels,
    compute_metrics,
)
from deeplcms import make_picture, to_probabilities, compute_chromatogram, read_header, read_json, read_picture, roc_auc
from deeplcms import run_script, share, find_anomalies, write_json, write_table, write_text
from train import (
    score_epoch,
    find_kept_epoch,
    figure,
    find_run,
    make_inputs,
    split_metrics,
    load_run,
    predict,
    progress,
    find_runs,
)


RESAMPLES, SEED, FEWEST = 2000, 2643, 10
COMPARED = ["val_loss", "val_accuracy", "val_f1", "val_precision", "val_recall"]  # article, Tables 1 and 2
DUNN = """Kruskal-Wallis over all groups, then Dunn's test for each pair, adjusted after Benjamini and Hochberg within
each metric. Replicates are trainings on the same people: a small p speaks of training, not of new people."""
JUDGED = """judged out of fold: each picture by weights it took no part in; judged by validation: by pictures that may
have chosen the epoch, so that these figures are too good beside the others. Sorted by judged, then by val_loss."""
FOLDS = "The fold that held it out judges each picture. Folds are calibrated differently, so distrust a pooled AUC."
# Columns of find_pictures that name a run or its class; any other may tell how it was measured.
NO_CONFOUNDERS = "path split phenotype sample_name copy chromatogram digest label group status".split()


# ---------------------------------------------------------------- what a title says, and who votes
def list_cautions(config):
    """What every table and title that quotes a run must say about it; an ordinary run gives an empty list."""
    origin, notes = config["settings"]["weights"], []
    if origin in ("no network", "random initialisation"):
        notes.append(origin)
    if config["settings"]["shuffle_labels"]:
        notes.append("trained on shuffled labels")
    return notes


def make_title(checkpoints, what):
    """'pixels on golestan; no network', of several 'ensemble of 5; pixels on ...'; "; " breaks a figure's title."""
    backbones = sorted({checkpoint["config"]["settings"]["backbone"] for checkpoint in checkpoints})
    parts = [f"{', '.join(backbones)} on {what}"]
    if len(checkpoints) > 1:
        parts.insert(0, f"ensemble of {len(checkpoints)}")
    for checkpoint in checkpoints:
        parts += list_cautions(checkpoint["config"])
        if checkpoint["by_chance"]:
            parts.append("on validation pictures no better than chance")
    return "; ".join(dict.fromkeys(parts))  # each once


def load_members(runs):
    """(models, checkpoints) of runs; several must have learned to tell the same classes apart on the same pictures."""
    models, checkpoints = zip(*map(load_run, runs), strict=True)
    first = checkpoints[0]["config"]
    for run, checkpoint in zip(runs, checkpoints, strict=True):
        config = checkpoint["config"]
        check_recipe(checkpoint["recipe"], checkpoints[0]["recipe"], run)
        if config["classes"] != first["classes"]:
            raise InputError(f"{run}: its classes, or which of them is positive, are not those of {runs[0]}")
        if config["settings"]["pictures"] != first["settings"]["pictures"]:
            raise InputError(f"{run}: its data set, or how it was split, is not that of {runs[0]}")
    return models, checkpoints


def is_own(checkpoint, pictures, recipe):
    """Are the training and validation pictures of this table those of the run, wherever they lie?"""
    pictures = pictures[pictures["split"].isin(("train", "val"))]
    return len(pictures) > 0 and digest_pictures(pictures, recipe) == checkpoint["config"]["settings"]["pictures"]


def read_split(checkpoint, data, split):
    """Table of one split, or of all, without copies, and its pictures; InputError unless they are of the run's kind."""
    data = data or checkpoint["config"]["data"]
    table, recipe = find_pictures(data, None if split == "all" else (split,))
    check_recipe(recipe, checkpoint["recipe"], data)
    table = table[~table["copy"]].reset_index(drop=True)
    return table, [read_picture(path) for path in tqdm(table["path"], desc="reading", disable=None, leave=False)]


def read_unseen(checkpoints, data, split):
    """The same with labels; no member was fitted to one of these pictures, and each is of one of its classes."""
    config = checkpoints[0]["config"]
    table, pictures = read_split(checkpoints[0], data, split)
    where = f"{data or config['data']}, {split}"
    seen = table["digest"].isin([digest for checkpoint in checkpoints for digest in checkpoint["fitted"]])
    if seen.any():
        names = first_few(table["sample_name"][seen])
        raise InputError(f"{where}: the run was fitted to {seen.sum()} of these {len(seen)} pictures: {names}")
    if unknown := set(table["phenotype"]) - set(config["classes"]):
        raise InputError(f"{where}: {first_few(unknown)} is none of the run's classes, {', '.join(config['classes'])}")
    return table.assign(label=make_labels(table, config["classes"])), pictures


def read_files(files, recipe):
    """Table of raw runs and PNGs, and their pictures [uint8 (height, width)]; one that is unreadable costs no other.

    Columns: file, group (the file), sample_name, phenotype (of a PNG its folder, else ''), statistics (of a raw run).
    """
    rows, pictures = [], []
    for path in tqdm(files, desc="reading", unit="file", disable=None):
        name, phenotype, statistics = path.stem, path.resolve().parent.name, None
        try:
            if path.suffix.lower() == ".png":
                check_recipe(read_header(path)[1], recipe, path)
                picture = read_picture(path)
            else:
                picture, statistics = make_picture(path, recipe)
                name, phenotype = RAW_FILE.fullmatch(path.name)[1], ""
        except (InputError, OSError) as error:
            if len(files) == 1:
                raise
            tqdm.write(f"left out: {error}", file=sys.stderr)
            continue
        rows.append([str(path), str(path), name, phenotype, statistics])
        pictures.append(picture)
    if not rows:
        raise InputError(f"none of the {len(files)} files can be read")
    return pd.DataFrame(rows, columns=["file", "group", "sample_name", "phenotype", "statistics"]), pictures


def predict_probabilities(models, recipe, pictures):
    """Probability (member, picture, class) that each model gives to each class of pictures [uint8 (H, W)]."""
    votes = []
    for model in models:
        starts = progress(range(0, len(pictures), 32), "classifying")
        batches = ((make_inputs(model, recipe, pictures[i : i + 32]), None) for i in starts)
        logits = torch.cat([logits for logits, _ in predict(model, batches)])
        if not logits.isfinite().all():
            raise InputError("the run's weights give no finite numbers: train it again with a lower --lr")
        votes.append(to_probabilities(logits))
    return np.stack(votes).clip(1e-300)  # never 0: its logarithm serves as a logit


def tabulate_predictions(votes, classes, threshold):
    """Table of the class called, its mean probability and that of the others, and of several votes its deviation."""
    called = predict_classes(votes.mean(0), threshold)
    table = pd.DataFrame({"predicted": [classes[k] for k in called]})
    table[[f"probability_{name}" for name in classes]] = votes.mean(0)
    if len(votes) > 1:
        table["probability_std"] = votes.std(0)[np.arange(len(called)), called]
    return table


def describe_rule(classes, threshold):
    """When a class is called, in words."""
    if len(classes) > 2:
        return "the most probable class is called"
    return f"{classes[1]} is called where its probability is {threshold:.4g} or more"


# ---------------------------------------------------------------- how well, and how certainly
def compute_intervals(labels, logits, groups, threshold=0.5):
    """Table of each metric's value and its 95 % interval, which is undefined with fewer than ten groups of a class.

    Proportions have Wilson's interval (1927), the other metrics percentiles over resamples within each class, which
    keep their sizes; where all resamples are alike there is no interval. Pictures of a group (a person) are not
    independent: then whole groups are drawn for all metrics, in place of one that holds the same classes.
    """
    table = pd.DataFrame({"value": compute_metrics(labels, logits, threshold), "low": np.nan, "high": np.nan})
    probabilities, limits = to_probabilities(logits), ["low", "high"]
    n_classes = probabilities.shape[1]
    holds = pd.crosstab(groups, labels) > 0  # (group, class)
    rows = pd.Series(labels).groupby(groups).indices  # pictures of each group
    if holds.shape[1] < n_classes or holds.sum().min() < FEWEST:
        return table
    rng, resamples = np.random.default_rng(SEED), []
    for _ in tqdm(range(RESAMPLES), desc="bootstrap", disable=None, leave=False):
        drawn = holds.groupby([*holds]).sample(frac=1, replace=True, random_state=rng).index
        i = np.concatenate([rows[group] for group in drawn])
        resamples.append(compute_metrics(labels[i], logits[i], threshold))
    resamples = pd.DataFrame(resamples).dropna(axis=1, thresh=0.95 * RESAMPLES)  # without what is often undefined
    quantiles = resamples.quantile([0.025, 0.975]).T
    table[limits] = quantiles[quantiles[0.025] < quantiles[0.975]]
    if len(rows) < len(labels):
        return table
    called = predict_classes(probabilities, threshold)
    right = called == labels
    table.loc["accuracy", limits] = wilson(right)
    if n_classes == 2:
        table.loc["recall", limits] = wilson(right[labels == 1])
        table.loc["specificity", limits] = wilson(right[labels == 0])
        if called.any():
            table.loc["precision", limits] = wilson(right[called == 1])
    return table


def wilson(hits):
    """[low, high] of the 95 % interval of the share of hits (N,) that are true."""
    return list(binomtest(hits.sum(), len(hits)).proportion_ci(method="wilson"))


# ---------------------------------------------------------------- what else could explain it
def read_numbers(column):
    """Ranks of a column of text that holds numbers (45.7 or 45,7) or dates; any other column as it is.

    Up to twelve values of which some are no numbers (plates 1, 2, 3a) are names.
    """
    readings = [pd.to_numeric(column.str.replace(",", "."), errors="coerce")]
    readings.append(pd.to_datetime(column, errors="coerce", format="ISO8601", utc=True))
    for day in ("%d.%m.%Y", "%d/%m/%Y", "%m/%d/%Y"):  # what follows it is ignored
        readings.append(pd.to_datetime(column, errors="coerce", format=day, exact=False, utc=True))
    read = max(readings, key=lambda reading: reading.notna().mean())  # the first of equals
    most = read.notna().all() or (column.nunique() > 12 and read.notna().mean() > 0.5)
    return read.dropna().rank() if most else column


def find_confounders(pictures):
    """Table of what else is known of each run: can it alone tell the phenotypes apart? And {column: why not looked at}.

    Each name is a part. So is each of up to twelve numbers or dates; more are cut into five parts. auc: of the share of
    a phenotype in each run's part, for the phenotype told apart best; chance alone gives more than 0.5. q: of the
    chi-squared test, for numbers also of Kruskal and Wallis's, after Benjamini and Hochberg. A column with more names
    than the rarest phenotype has runs (people, samples) is left out: less than one run is expected in each part.
    """
    rows, left_out = {}, {}
    pictures = pictures.drop_duplicates(["group", "phenotype"])  # runs of one person are not independent
    for name, column in pictures.drop(columns=NO_CONFOUNDERS, errors="ignore").items():
        column = column[column.notna() & (column != "")]
        parts = numbers = read_numbers(column) if column.dtype != float else column.rank()
        is_number = numbers.dtype == float
        if is_number and numbers.nunique() > 12:
            parts = np.ceil(5 * numbers / len(numbers))
        phenotype = pictures["phenotype"][parts.index]
        counts = pd.crosstab(parts, phenotype)
        if min(counts.shape) < 2:
            continue  # one value, or known of one phenotype alone
        if not is_number and len(counts) > counts.sum().min():
            left_out[name] = f"{len(counts)} names in {len(parts)} runs"
        else:
            shares = counts.div(counts.sum(axis=1), axis=0)  # (part, phenotype)
            auc = max(roc_auc(phenotype == k, parts.map(shares[k])) for k in shares)
            p = chi2_contingency(counts).pvalue
            if is_number:
                p = min(1, 2 * p, 2 * kruskal(*numbers.groupby(phenotype).agg(list)).pvalue)  # the better of two tests
            rows[name] = auc, p
        if is_number and len(numbers) < len(column) and name not in left_out:
            left_out[name] = f"{len(column) - len(numbers)} values that are no numbers"
    table = pd.DataFrame.from_dict(rows, "index", dtype=float, columns=["auc", "q"])  # empty it is float, too
    return table.assign(q=false_discovery_control(table["q"])), left_out


def flag_confounders(confounders):
    """Names of what tells the phenotypes apart by itself, beyond chance and not by a little."""
    return list(confounders.query("q < 0.05 and auc > 0.7").index)


# ---------------------------------------------------------------- one run, or several that vote
def evaluate(runs, home, args):
    """Judge a run, or several that vote, on one split; results go to --out or `home`, of other data to its folders."""
    models, checkpoints = load_members(runs)
    checkpoint = checkpoints[0]
    recipe, classes = checkpoint["recipe"], checkpoint["config"]["classes"]
    table, pictures = read_unseen(checkpoints, args.data, args.split)
    votes = predict_probabilities(models, recipe, pictures)
    labels, probabilities = table["label"].to_numpy(), votes.mean(0)
    metrics = compute_intervals(labels, np.log(probabilities), table["group"], args.threshold)
    confusion = count_confusions(labels, predict_classes(probabilities, args.threshold), len(classes))
    # What else could explain it is sought in all splits that there are, as more runs show more; headers are enough.
    data = args.data or checkpoint["config"]["data"]
    everything, _ = find_pictures(data)
    originals = everything.query("not copy")
    _, cohort = summarize_cohort(originals, recipe)
    confounders, not_looked_at = find_confounders(originals.assign(rt_shift=cohort["rt_shift"]))
    suspects = flag_confounders(confounders)

    data_set, folder = checkpoint["config"]["data_set"], home
    if not is_own(checkpoint, everything, recipe):
        data_set = data
        folder = home / f"{Path(data).resolve().name}-{digest_pictures(table, recipe):08x}-{args.split}"
    elif args.split != "test":
        folder = home / args.split
    folder = Path(args.out or folder)
    folder.mkdir(parents=True, exist_ok=True)
    title = make_title(checkpoints, f"{data_set}, {args.split} split, {len(labels)} pictures")
    result = {
        "title": title,
        "run": ", ".join(map(str, runs)),
        "split": args.split,
        "threshold": args.threshold if len(classes) == 2 else None,
        "rule": describe_rule(classes, args.threshold),
        "classes": classes,
        "confusion": confusion.tolist(),
        "metrics": metrics.replace({np.nan: None}).to_dict("index"),
        "confounders": confounders.replace({np.nan: None}).to_dict("index"),
        "flagged": suspects,
        "not_looked_at": not_looked_at,
    }
    predictions = table[["sample_name", "group", "phenotype"]].join(
        tabulate_predictions(votes, classes, args.threshold)
    )
    predictions.insert(4, "correct", np.where(predictions["predicted"] == table["phenotype"], "yes", "no"))
    predictions["file"] = table["path"]
    write_table(folder / "predictions.csv", predictions)
    # The figures show the probability of class 1, or with more classes of the class called.
    predictions = predictions.assign(of=predictions["predicted"], p=probabilities.max(1))
    if len(classes) == 2:
        result |= dict(zip(("tn", "fp", "fn", "tp"), confusion.ravel().tolist(), strict=True))
        predictions = predictions.assign(of=classes[1], p=probabilities[:, 1])
    write_json(folder / "metrics.json", result)
    with figure(folder / "test.png", title, (17, 6.4), ncols=3) as (left, middle, right):
        draw_confusion(left, confusion, classes)
        draw_roc(middle, labels, probabilities, confusion, metrics.loc["roc_auc"], classes)
        draw_calibration(right, predictions)
    draw_prediction_matrix(folder / "prediction_matrix.png", predictions, pictures, recipe, title)

    epochs = [f"run {run}, epoch {member['epoch']}" for run, member in zip(runs, checkpoints, strict=True)]
    print(title, *epochs, result["rule"], sep="\n")
    print(f"\n{pd.DataFrame(confusion, classes, classes).rename_axis('true / called')}\n")
    numbers = {"float_format": "{:.3f}".format, "na_rep": "undefined"}
    print(metrics.to_string(**numbers))
    if metrics["low"].isna().all():
        print(f"no intervals: they need {FEWEST} pictures (or groups) of each class")
    print(f"\nWhat else is known of all {len(originals)} runs, and how well it alone tells their phenotypes apart:")
    print(confounders.to_string(**numbers))
    if not_looked_at:
        print(f"not looked at: {'; '.join(f'{name} ({why})' for name, why in not_looked_at.items())}")
    for name in suspects:
        print(f"warning: {name} alone tells the phenotypes apart; {name} may be what the classifier has learned")
    print(f"\nresults: {folder}/")


def draw_confusion(ax, confusion, classes):
    """Counts, shaded by the share of each true class."""
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    ax.imshow(share, cmap="Blues", vmin=0, vmax=2)  # the lighter half: black on it is legible
    for (i, j), n in np.ndenumerate(confusion):
        ax.text(j, i, f"{n}\n{share[i, j]:.0%}", ha="center", va="center")
    ax.set_xticks(range(len(classes)), classes)
    ax.set_yticks(range(len(classes)), classes)
    ax.set(xlabel="predicted", ylabel="true phenotype")
    ax.set_title("Number of pictures, share of the true phenotype", fontsize=10)


def draw_roc(ax, labels, probabilities, confusion, auc, classes):
    """A curve for each class, of two for class 1, with the point of the threshold."""
    ax.plot([0, 1], [0, 1], ":", color="grey", label="chance")
    for k in [1] if len(classes) == 2 else range(len(classes)):
        # Share of all others and of the class at each score or above it: equal scores make one step.
        curve = pd.crosstab(probabilities[:, k], labels == k, normalize="columns")[::-1].cumsum()
        if curve.shape[1] == 2:  # else there are none of the class, or no others
            ax.plot([0, *curve[False]], [0, *curve[True]], label=f" {classes[k]}")  # "_a" alone has no entry
    if len(classes) == 2:
        false_and_true_positives = confusion[:, 1] / np.maximum(confusion.sum(1), 1)
        ax.plot(*false_and_true_positives, "ko", label="threshold")
    interval = "95 % interval {low:.3f} - {high:.3f}".format(**auc)
    if np.isnan(auc["low"]):
        interval = "no interval: too few, or all resamples alike"
    ax.set_title(f"ROC AUC {auc['value']:.3f} ({interval})", fontsize=10)
    ax.set(xlabel="false positive rate", ylabel="true positive rate", box_aspect=1)
    ax.legend(loc="lower right", frameon=False)


def draw_calibration(ax, predictions):
    """Does a probability of 0.8 come true in eight of ten? Means of five bins of equal width."""
    place = (predictions["p"] * 5).astype(int).clip(upper=4)
    ax.plot([0, 1], [0, 1], ":", color="grey")
    for _, rows in predictions.groupby(place):
        came_true = rows["phenotype"] == rows["of"]
        p, share = rows["p"].mean(), came_true.mean()
        ax.plot([p, p], wilson(came_true), "C0")
        ax.plot(p, share, "C0o")
        ax.annotate(f" {len(rows)}", (p, share))
    names = predictions["of"].unique()
    ax.set_xlabel(f"predicted probability of {names[0] if len(names) == 1 else 'the class called'}")
    ax.set(ylabel="share for which it came true", box_aspect=1)
    ax.set_title("Calibration: 95 % Wilson intervals, number of pictures", fontsize=10)


def draw_prediction_matrix(path, predictions, pictures, recipe, title):
    """Article, Figure 5: nine pictures, phenotypes in turn; green is right."""
    looks = {"yes": ("#1a8a3a", "right"), "no": ("#d62728", "wrong")}
    with figure(path, title, (10, 10.5), nrows=3, ncols=3, sharex=True, sharey=True) as axes:
        for axis, row in zip(axes.flat, pick_in_turn(predictions, 9).itertuples(), strict=False):
            colour, word = looks[row.correct]
            show(axis, colours(pictures[row.Index], recipe.colormap), recipe)
            text = f"{row.sample_name[:30]}: P({row.of}) = {row.p:.3f}\ntrue phenotype: {row.phenotype} ({word})"
            axis.set_title(text, color=colour, fontsize=10)
            axis.spines[:].set(color=colour, linewidth=4)
        label_axes(axes)


def pick_in_turn(pictures, n):
    """n rows for a figure, drawn at random, phenotypes in turn."""
    drawn = pictures.sample(frac=1, random_state=SEED)
    turn = drawn.groupby("phenotype").cumcount()
    return drawn.loc[turn.sort_values(kind="stable").index].head(n)


def show(axis, map_, recipe, **options):
    """A map or picture on its axes in minutes and m/z."""
    extent = recipe.rt_min, recipe.rt_max, recipe.mz_min, recipe.mz_max
    return axis.imshow(map_, extent=extent, aspect="auto", **options)


def label_axes(axes):
    """Retention time and m/z, for a figure of pictures; places without one stay empty."""
    for above, axis in zip([*[None] * axes.shape[1], *axes.flat], axes.flat, strict=False):
        if not axis.images:
            axis.set_axis_off()
            if above is not None:
                above.tick_params(labelbottom=True)  # it is the lowest of its column
    axis.figure.supxlabel("retention time (min)")
    axis.figure.supylabel("m/z")


# ---------------------------------------------------------------- new raw runs
def predict_files(runs, files, threshold=0.5):
    """Table of the class called, its probability and warnings for raw runs or pictures; what is unreadable is left out.

    From Python: predict_files(["runs/mine/pixels/seed2643"], ["new.mzML"]).
    """
    models, checkpoints = load_members(runs)
    checkpoint, config = checkpoints[0], checkpoints[0]["config"]
    recipe = checkpoint["recipe"]
    print(make_title(checkpoints, config["data_set"]), describe_rule(config["classes"], threshold), "", sep="\n")
    read, pictures = read_files(list_files(files), recipe)
    table = read[["file"]].join(
        tabulate_predictions(predict_probabilities(models, recipe, pictures), config["classes"], threshold)
    )
    table["rt_shift"] = [
        measure_rt_shift(compute_chromatogram(picture), checkpoint["chromatogram"], recipe) for picture in pictures
    ]
    table["warning"] = "a picture: how its run was measured is unknown"
    for i, statistics in read["statistics"].dropna().items():
        statistics["rt_shift"] = table["rt_shift"][i]
        table.loc[i, "warning"] = find_anomalies(statistics, checkpoint["cohort"], recipe)
    return table


def predict_command(runs, args):
    """Print the table of new files and write it to --out; the exit status is 1 if one could not be read."""
    if args.out and Path(args.out).exists():
        raise InputError(f"--out {args.out} exists already; give another name")
    if args.out and not Path(args.out).resolve().parent.is_dir():
        raise InputError(f"--out {args.out}: no such folder")
    files = list_files(args.predict)
    table = predict_files(runs, files, args.threshold)
    print(table.to_string(index=False, float_format="{:.4f}".format))
    if args.out:
        write_table(args.out, table)
    return int(len(table) < len(files))


# ---------------------------------------------------------------- many runs
def runs_below(paths):
    """The run folders named, and all below a folder that is not a run itself, each once."""
    runs = []
    for path in map(Path, paths):
        runs += find_runs(path) or [find_run(path)]
    return list(dict.fromkeys(runs))


def summarize_run(run):
    """A run in a comparison, by the epoch that was kept, but a fold is judged on what it held out."""
    config = read_json(run / "config.json")
    settings = config["settings"]
    judged_by = "out of fold" if settings["optimizer"] == "lbfgs" or settings["fold"] is not None else "validation"
    seed, fold = settings.pop("seed"), settings.pop("fold")
    epochs = pd.read_csv(run / "epochs.csv")
    best = pd.Series(find_kept_epoch(epochs.to_dict("records")))
    row = {
        "data_set": config["data_set"],
        "backbone": settings["backbone"],
        "parameters_millions": config["parameters"] / 1e6,
        "judged": judged_by,
        "best_epoch": int(best["epoch"]),
        **best.filter(regex="^(train|val)_"),
        "seconds": epochs["seconds"].sum(),
        "seed": seed,
        "fold": "" if fold is None else fold,
        "baseline_loss": config["baseline_loss"],
        "notes": ", ".join(list_cautions(config)),
        "run": str(run),
        "settings": json.dumps(settings),  # what replicates share
    }
    if fold is not None:
        pictures = read_held_out(run)
        logits = torch.tensor(pictures.filter(like="logit_").to_numpy())
        row |= split_metrics("val", [(logits, torch.tensor(pictures["label"]))])
    return row


def read_held_out(run):
    """Table of the pictures that a fold has held out, with their logits."""
    types = {"sample_name": str, "group": str}
    return pd.read_csv(Path(run) / "held_out.csv", dtype=types, keep_default_na=False)  # a person may be called NA


def pooled_metrics(pictures):
    """'value (low-high)' of each metric over the held-out pictures of all folds of a training."""
    logits = pictures.filter(like="logit_").dropna(axis=1).to_numpy()
    table = compute_intervals(pictures["label"].to_numpy(), logits, pictures["group"].to_numpy())
    text = table.apply(lambda row: "{value:.3f} ({low:.3f}-{high:.3f})".format(**row), axis=1)
    return text.str.removesuffix(" (nan-nan)")


def group_replicates(table):
    """{label: rows}: two runs or more that differ in nothing but seed and fold, in the order of their best loss."""
    replicates = {}
    for (data_set, backbone, notes), rows in table.groupby(["data_set", "backbone", "notes"], sort=False):
        label = f"{data_set}/{backbone}" + (f" ({notes})" if notes else "")
        if rows["settings"].nunique() > 1:
            print(f"{label}: its runs have different settings, no replicates; train each under its own --name")
        elif len(rows) > 1:
            replicates[label] = rows
    return replicates


def dunn(groups):
    """p values of Dunn's test for each pair of groups of values, with the correction for ties (Dunn 1964)."""
    ranks = rankdata(np.concatenate(groups))
    variance = ranks.var(ddof=1)  # n (n + 1) / 12 without ties, and less by Dunn's correction with them
    ends, p = np.cumsum(list(map(len, groups))), []
    for a, b in combinations(np.split(ranks, ends[:-1]), 2):
        error = np.sqrt(variance * (1 / len(a) + 1 / len(b)))
        p.append(2 * norm.sf(abs(a.mean() - b.mean()) / error))
    return p


def compute_p_values(replicates, metrics):
    """Table of p values by metric, those of the pairs adjusted after Benjamini and Hochberg."""
    pairs = [f"{a} / {b}" for a, b in combinations(replicates, 2)]
    tests = pd.DataFrame(np.nan, ["Kruskal-Wallis", *pairs], metrics)
    for name in metrics:
        groups = [rows[name].to_numpy() for rows in replicates.values()]
        if np.ptp(np.concatenate(groups)) > 0:  # else all are alike, or one is undefined: nothing can be said
            tests.loc["Kruskal-Wallis", name] = kruskal(*groups).pvalue
            tests.loc[pairs, name] = false_discovery_control(dunn(groups))
    return tests


def draw_replicates(path, replicates, metrics):
    """Article, Figures 1 and 3: median of each metric, standard deviation as error bar, a dot for each replicate."""
    size = (3 + 2.1 * len(metrics), 1.8 + 0.5 * len(replicates))
    title = "Replicates on validation pictures: median, standard deviation, each run"
    with figure(path, title, size, ncols=len(metrics), sharey=True, squeeze=False) as axes:
        for ax, name in zip(axes[0], metrics, strict=True):
            for label, rows in replicates.items():
                tick = label.replace(" (", "\n(")
                ax.barh(tick, rows[name].median(), xerr=rows[name].std(), color="lightsteelblue", capsize=3)
                ax.plot(rows[name], [tick] * len(rows), "k.", alpha=0.7)
            ax.set_xlabel(name)
        ax.invert_yaxis()


def compare(runs, out):
    """Tables 1 and 2 for many runs; Figure 1 or 3 and its tests for replicates among them."""
    rows = []
    for run in runs:
        try:
            rows.append(summarize_run(run))
        except (InputError, OSError, KeyError, ValueError) as error:  # one bad run costs the others nothing
            print(f"left out: {run}: {first_line(error)}", file=sys.stderr)
    if not rows:
        raise InputError("none of these runs can be read")
    table = pd.DataFrame(sorted(rows, key=lambda row: (row["judged"], score_epoch(row))))
    metrics = [name for name in COMPARED if name in table]
    out.mkdir(parents=True, exist_ok=True)
    write_table(out / "comparison.csv", table.drop(columns="settings"))
    trained = [name.replace("val_", "train_") for name in metrics]
    columns = ["data_set", "backbone", "parameters_millions", "judged", "best_epoch", *trained, *metrics]
    columns += ["baseline_loss", "seconds", "seed", "fold", "notes"]
    parts = {f"{len(table)} runs. {JUDGED}": table[columns]}
    folds = table["run"][table["fold"] != ""]
    if len(folds):
        # A training is known by where its folds lie, as two of them may have been started by the same command.
        parts_of = [read_held_out(run).assign(training=run.rpartition("-fold")[0]) for run in folds]
        held_out = pd.concat(parts_of)
        write_table(out / "out_of_fold.csv", held_out)
        pooled = held_out.groupby("training", sort=False).apply(pooled_metrics)
        parts[f"All folds of a training together. {FOLDS}"] = pooled
    replicates = group_replicates(table)
    if replicates:
        groups = pd.concat(replicates, names=["replicates of"]).groupby(level=0, sort=False)
        together = groups[metrics].agg(["median", "std"])
        together["runs", ""] = groups.size()
        parts["Replicates: median and standard deviation; see replicates.png"] = together
        draw_replicates(out / "replicates.png", replicates, metrics)
    # Seeds judged alike are contenders; folds of one cohort are no independent trials, and a control is none.
    seeds = {name: rows for name, rows in replicates.items() if (rows["fold"] == "").all() and "shuffled" not in name}
    for judged_by in table["judged"].unique():
        alike = {name: rows for name, rows in seeds.items() if (rows["judged"] == judged_by).all()}
        if len(alike) > 1:
            parts[f"p values, {judged_by}. {DUNN}"] = compute_p_values(alike, metrics)
    numbers = "{:.3g}".format
    text = [f"{title}\n\n```\n{part.to_string(float_format=numbers)}\n```" for title, part in parts.items()]
    write_text(out / "comparison.md", "\n\n".join(text))
    print(*text, f"results: {out}/", sep="\n\n")


# ---------------------------------------------------------------- command line
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="a run (default: the newest); several, or a folder, are compared")
    add("--ensemble", action="store_true", help="runs or folds of one data set vote and are judged as one run")
    add("--out", help="folder (default: the run; of several the common one, or its ensemble/); with --predict a CSV")
    add = parser.add_argument_group("one run, or an ensemble").add_argument
    add("--data", metavar="DIR", help="another data set, or where the run's own has moved")
    add("--split", choices=SPLITS, default="test", help="pictures to judge on")
    add("--threshold", type=share, default=0.5, metavar="P", help="call class 1 from this probability on")
    new = "new raw runs, or folders; several RUNs vote; --out is never replaced"
    add("--predict", nargs="+", metavar="FILE", help=new)
    args = parser.parse_args()

    runs = runs_below(args.runs) or [find_run()]
    if args.predict:
        return predict_command(runs, args)
    if len(runs) == 1:
        return evaluate(runs, runs[0], args)
    common = args.runs[0]
    if len(args.runs) > 1:
        common = os.path.commonpath([run.resolve() for run in runs])
    if args.ensemble:
        return evaluate(runs, Path(common) / "ensemble", args)
    if args.data or args.split != "test" or args.threshold != 0.5:
        parser.error(f"--data, --split and --threshold take one run, or --ensemble, not {len(runs)} runs to compare")
    return compare(runs, Path(args.out or common))


if __name__ == "__main__":
    run_script(main)
