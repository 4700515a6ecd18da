"""Judge a run on pictures it has never seen, predict new raw runs, compare many runs.

Article: "Evaluating the final model" (test metrics, Figure 5), and the tables and figures that rank architectures
(Tables 1 and 2), replicates (Figure 1) and kinds of picture (Figure 3).

    python evaluate.py                                                    # the newest run on its test split
    python evaluate.py runs/golestan/convnext_large/seed2643 --threshold val
    python evaluate.py runs/golestan/convnext_large/seed2643 --predict new/*.mzML --out new_predictions.csv
    python evaluate.py runs/golestan                    # every run below, by its validation split: no look at the test
    python evaluate.py runs/golestan/convnext_large --ensemble            # its folds or repeats vote on the test split
"""

import itertools
import json
import math
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from scipy.stats import binomtest, false_discovery_control, kruskal, norm, rankdata, tiecorrect
from torch.utils.data import DataLoader
from tqdm import tqdm

from deeplcms import SPLITS, InputError, Parser, figure, number, run_script, write_json, write_table, write_text
from deeplcms import called_class, check_recipe, confusion_of, files_of, find_pictures, first_few, in_turn
from deeplcms import label_axes, label_of, metrics_of, picture_of_run, probabilities_of, read_picture, show
from train import Pictures, collect, evaluation_transform, find_run, load_run, predict

RESAMPLES, SEED = 2000, 2643
# What runs are compared by, in the article's Tables 1 and 2.
COMPARED = ["val_loss", "val_accuracy", "val_f1", "val_precision", "val_recall"]
TESTS = """p values: Kruskal-Wallis over all groups, then Dunn's test for each pair, adjusted after Benjamini and
Hochberg within each metric. Replicates are trainings on the same people (folds: on overlapping parts of them, so that
they are not independent): a small p speaks of training, not of new people."""


def words(name):
    """'val_roc_auc' -> 'val ROC AUC'"""
    return name.replace("_", " ").replace("roc auc", "ROC AUC").replace("f1", "F1")


def cautions(config):
    """What every table and title that quotes a run must say about it; an ordinary run gives an empty list."""
    notes = []
    if config["weights_origin"] in ("no network", "random initialisation"):
        notes.append(config["weights_origin"])
    if config["settings"]["shuffle_labels"]:
        notes.append("trained on shuffled labels")
    return notes


def title_of(checkpoint, what, *others):
    """'mobileone_s3 on golestan, test split; random initialisation'; "; " breaks the title of a figure.

    others: checkpoints that vote with it, 'ensemble of 5 (mobileone_s3) on golestan, test split'.
    """
    configs = [member["config"] for member in (checkpoint, *others)]
    name = ", ".join(sorted({config["settings"]["backbone"] for config in configs}))
    if others:
        name = f"ensemble of {len(configs)} ({name})"
    notes = dict.fromkeys(itertools.chain(*map(cautions, configs)))  # each once
    return "; ".join([f"{name} on {what}", *notes])


# ---------------------------------------------------------------- one run, or several that vote: pictures -> metrics


def load_members(runs):
    """(models, checkpoints) of runs that can vote: trained on the same pictures, with the same classes in order."""
    models, checkpoints = zip(*map(load_run, runs), strict=True)
    first, *others = checkpoints
    for run, other in zip(runs[1:], others, strict=True):
        check_recipe(other["recipe"], first["recipe"], run)
        if other["config"]["classes"] != first["config"]["classes"]:
            names = [", ".join(member["config"]["classes"]) for member in (other, first)]
            raise InputError(f"{run}: its classes are {names[0]}, but {names[1]} in {runs[0]}; they cannot vote")
        if other["config"]["settings"]["pictures"] != first["config"]["settings"]["pictures"]:
            raise InputError(f"{run}: trained on another data set or split than {runs[0]}; they cannot vote")
    return models, checkpoints


def is_own(checkpoint, data):
    """Is this the data set of the run, where it was or where it has moved?"""
    return data is None or Path(data).resolve().name == Path(checkpoint["config"]["settings"]["data"]).resolve().name


def held_out(checkpoint, data, split):
    """Pictures of one split without copies, with their labels; InputError unless they are of the run's kind."""
    settings, classes = checkpoint["config"]["settings"], checkpoint["config"]["classes"]
    if settings["fold"] is not None and split != "test" and is_own(checkpoint, data):
        raise InputError(f"this run is a fold of train and val together and has seen most of {split}")
    data = data or settings["data"]
    pictures, recipe = find_pictures(data, (split,))
    check_recipe(recipe, checkpoint["recipe"], data)
    if unknown := set(pictures["phenotype"]) - set(classes):
        raise InputError(f"{data}: {first_few(unknown)} is none of the run's classes, {', '.join(classes)}")
    pictures = pictures[~pictures["copy"]].reset_index(drop=True)
    return pictures.assign(label=label_of(pictures, classes))


def held_out_of_all(checkpoints, data, split):
    """The same of runs that vote: what one of them has seen, none is judged on."""
    return [held_out(checkpoint, data, split) for checkpoint in checkpoints][0]


def votes_of(models, pictures):
    """Probability (member, picture, class) that each model gives to each class for each row of a table of pictures."""
    workers = min(4, os.cpu_count()) if len(pictures) >= 256 else 0  # starting them takes longer than 256 pictures
    votes = []
    for model in models:
        loader = DataLoader(Pictures(pictures, evaluation_transform(model)), 32, num_workers=workers)
        logits, _ = collect(predict(model, tqdm(loader, desc="classifying", disable=None, leave=False)))
        if not logits.isfinite().all():
            raise InputError("the network's output is not a number: training diverged; train again with a lower --lr")
        votes.append(probabilities_of(logits))
    return np.stack(votes).clip(1e-300)  # never 0: its logarithm serves as a logit


def calls_of(votes, classes, threshold):
    """Classes called (N,), and a table of them: name, mean probability of each class, and `spread` where several vote.

    The spread is the standard deviation between the members of the probability of the class that is called.
    """
    called = called_class(votes.mean(0), threshold)
    table = pd.DataFrame(votes.mean(0), columns=[f"probability_{name}" for name in classes])
    table.insert(0, "called", [classes[k] for k in called])
    if len(votes) > 1:
        table["spread"] = votes.std(0)[np.arange(len(called)), called]
    return called, table


def best_threshold(labels, logits):
    """The threshold of highest balanced accuracy: halfway between two neighbours, of several the nearest to 0.5."""
    scores = np.unique(probabilities_of(logits)[:, 1])
    candidates = np.append((scores[1:] + scores[:-1]) / 2, 0.5)
    candidates = candidates[np.argsort(abs(candidates - 0.5))]
    return float(max(candidates, key=lambda t: round(metrics_of(labels, logits, t)["balanced_accuracy"], 12)))


def choose_threshold(models, checkpoints, threshold, data=None):
    """(threshold, the rule in words) of --threshold: a number, or 'val' for the best one on the validation split."""
    classes, source = checkpoints[0]["config"]["classes"], ""
    if len(classes) > 2:
        return None, "the most probable class is called"
    if threshold == "val":
        pictures = held_out_of_all(checkpoints, data if is_own(checkpoints[0], data) else None, "val")
        logits = np.log(votes_of(models, pictures).mean(0))
        threshold = best_threshold(pictures["label"].to_numpy(), logits)
        source = f", the best balanced accuracy on {len(pictures)} pictures of the validation split"
    return threshold, f"{classes[1]} is called where its probability is {threshold:.4g} or more{source}"


def judge(labels, logits, threshold=0.5):
    """Table of each metric's value and its 95 % percentile interval over resamples of the pictures within each class.

    Resampling within the classes keeps their sizes, as the split did.
    """
    rng = np.random.default_rng(SEED)
    members = [np.flatnonzero(labels == k) for k in np.unique(labels)]
    values = []
    for _ in tqdm(range(RESAMPLES), desc="bootstrap", disable=None, leave=False):
        i = np.concatenate([rng.choice(pictures, len(pictures)) for pictures in members])
        values.append(metrics_of(labels[i], logits[i], threshold))
    values = pd.DataFrame(values)
    table = pd.DataFrame({"value": metrics_of(labels, logits, threshold)})
    table[["low", "high"]] = values.quantile([0.025, 0.975]).T.to_numpy()
    table.loc[values.isna().mean() > 0.05, ["low", "high"]] = np.nan  # too often undefined
    return table


def evaluate(runs, home, data=None, split="test", threshold=0.5, out=None):
    """Metrics, predictions and figures of a run, or of several that vote, on one split; prints the table.

    home: where the results go by default, those of other splits and data sets into a folder of it.
    """
    if threshold == "val" and split == "val":
        raise InputError("--threshold val with --split val would choose and judge on the same pictures")
    models, checkpoints = load_members(runs)
    checkpoint, classes = checkpoints[0], checkpoints[0]["config"]["classes"]
    pictures = held_out_of_all(checkpoints, data, split)
    threshold, rule = choose_threshold(models, checkpoints, threshold, data)
    labels, votes = pictures["label"].to_numpy(), votes_of(models, pictures)
    probabilities = votes.mean(0)
    called, calls = calls_of(votes, classes, threshold)
    confusion = confusion_of(labels, called, len(classes))
    table = judge(labels, np.log(probabilities), threshold)

    data_set = Path(data).resolve().name if data else checkpoint["config"]["data_set"]
    default = home if split == "test" and is_own(checkpoint, data) else home / f"{data_set}-{split}"
    folder = Path(out or default)
    folder.mkdir(parents=True, exist_ok=True)
    title = title_of(checkpoint, f"{data_set}, {split} split, {len(labels)} pictures", *checkpoints[1:])
    metrics = table.astype(object).where(table.notna(), None).to_dict("index")
    contents = {"title": title, "run": ", ".join(map(str, runs)), "split": split, "threshold": threshold, "rule": rule}
    contents |= {"classes": classes, "confusion": confusion.tolist(), "metrics": metrics}
    if len(classes) == 2:
        contents |= dict(zip(("tn", "fp", "fn", "tp"), confusion.ravel().tolist(), strict=True))
    write_json(folder / "metrics.json", contents)
    predictions = pictures[["sample_name", "group", "phenotype"]].join(calls)
    predictions.insert(4, "right", np.where(called == labels, "yes", "no"))
    write_table(folder / "predictions.csv", predictions.assign(file=pictures["path"]))

    draw_confusion(folder / "confusion.png", confusion, classes, title)
    draw_roc(folder / "roc.png", labels, probabilities, confusion, table.loc["roc_auc"], classes, title)
    draw_calibration(folder / "calibration.png", labels, probabilities, classes, title)
    draw_prediction_matrix(folder / "prediction_matrix.png", pictures, probabilities, called, checkpoint, title)
    print(title)
    for run, member in zip(runs, checkpoints, strict=True):
        print(f"run {run}, epoch {member['epoch']}")
    print(rule)
    if (fewest := confusion.sum(1).min()) < 10:
        print(f"only {fewest} pictures of some class: an interval of so few is too narrow to be believed")
    print(f"\n{pd.DataFrame(confusion, classes, classes).rename_axis('true / called')}\n")
    print(table.rename(words).to_string(float_format="{:.3f}".format, na_rep="undefined"))
    print(f"\nresults: {folder}/")


# ---------------------------------------------------------------- one run: figures


def draw_confusion(path, confusion, classes, title):
    """Counts, shaded by the share of each true class."""
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    with figure(path, title, size=(3.2 + 0.9 * len(classes), 2.8 + 0.8 * len(classes))) as ax:
        ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for (i, j), count in np.ndenumerate(confusion):
            colour = "white" if share[i, j] > 0.5 else "black"
            ax.text(j, i, f"{count}\n{share[i, j]:.0%}", ha="center", va="center", color=colour)
        ax.set_xticks(range(len(classes)), classes)
        ax.set_yticks(range(len(classes)), classes)
        ax.set(xlabel="called", ylabel="true phenotype")


def roc_curve(positive, score):
    """(false positive rates, true positive rates), from (0, 0) to (1, 1); equal scores make one step."""
    thresholds = np.append(np.inf, np.unique(score)[::-1])
    called = score >= thresholds[:, None]  # (threshold, picture)
    return called[:, ~positive].mean(1), called[:, positive].mean(1)


def draw_roc(path, labels, probabilities, confusion, auc, classes, title):
    with figure(path, title, size=(5.6, 6.4)) as ax:
        for k in [1] if len(classes) == 2 else range(len(classes)):
            if 0 < (labels == k).sum() < len(labels):
                ax.plot(*roc_curve(labels == k, probabilities[:, k]), linewidth=2, label=classes[k])
        ax.plot([0, 1], [0, 1], color="grey", linestyle=":", label="chance")
        if len(classes) == 2:
            rates = confusion[:, 1] / np.maximum(confusion.sum(1), 1)  # of false and of true positives
            ax.plot(*rates, "ko", label="threshold")
        ax.set_title("ROC AUC {value:.3f} (95 % interval {low:.3f} - {high:.3f})".format(**auc), fontsize=10)
        ax.set(xlabel="false positive rate", ylabel="true positive rate", box_aspect=1)
        ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        ax.legend(loc="lower right", frameon=False)


def reliability(hit, probability, n_bins):
    """Table of the filled bins of equal width: mean probability, share of hits, number of pictures."""
    place = np.minimum((probability * n_bins).astype(int), n_bins - 1)
    bins = pd.DataFrame({"probability": probability, "hit": hit}).groupby(place)
    return bins.agg(probability=("probability", "mean"), share=("hit", "mean"), n=("hit", "size"))


def draw_calibration(path, labels, probabilities, classes, title):
    """Does a probability of 0.8 come true in eight of ten? Of class 1, or with more classes of the class called."""
    two, n_bins = len(classes) == 2, 10 if len(labels) >= 100 else 5
    k = np.ones(len(labels), int) if two else probabilities.argmax(1)
    probability = probabilities[np.arange(len(labels)), k]
    bins = reliability(labels == k, probability, n_bins)
    limits = [binomtest(round(b.share * b.n), b.n).proportion_ci(0.95, "wilson") for b in bins.itertuples()]
    with figure(path, title, size=(6.4, 6.2), nrows=2, sharex=True, height_ratios=[3, 1]) as (ax, below):
        ax.plot([0, 1], [0, 1], color="grey", linestyle=":", label="perfectly calibrated")
        bars = np.abs(np.transpose(limits) - bins["share"].to_numpy())  # (2, bins): below and above
        ax.errorbar(bins["probability"], bins["share"], bars, fmt="o", capsize=3, label="observed, Wilson interval")
        ax.set(ylabel=f"share that is {classes[1]}" if two else "share called rightly", ylim=(-0.03, 1.03))
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
        filled, _, bars = below.hist(probability, n_bins, range=(0, 1), color="lightsteelblue", edgecolor="white")
        below.bar_label(bars, [f"{n:.0f}" if n else "" for n in filled], padding=1)
        below.set(ylabel="pictures", xlim=(-0.02, 1.02), ylim=(0, 1.3 * filled.max()))
        below.set_xlabel(f"predicted probability of {classes[1] if two else 'the class called'}")


def draw_prediction_matrix(path, pictures, probabilities, called, checkpoint, title):
    """Article, Figure 5: nine pictures, phenotypes in turn; green is right."""
    classes, recipe = checkpoint["config"]["classes"], checkpoint["recipe"]
    with figure(path, title, (10, 10.5), nrows=3, ncols=3, sharex=True, sharey=True) as axes:
        for axis, row in zip(axes.flat, in_turn(pictures, 9, SEED).itertuples(), strict=False):
            k = 1 if len(classes) == 2 else called[row.Index]
            right = called[row.Index] == row.label
            colour = "#1a8a3a" if right else "#d62728"
            show(axis, read_picture(row.path), recipe)
            text = f"{row.sample_name[:30]}: P({classes[k]}) = {probabilities[row.Index, k]:.3f}"
            text += f"\ntrue phenotype: {row.phenotype} ({'right' if right else 'wrong'})"
            axis.set_title(text, color=colour, fontsize=10)
            for spine in axis.spines.values():
                spine.set(color=colour, linewidth=4)
        label_axes(axes)


# ---------------------------------------------------------------- new raw runs


def warnings_of(statistics, cohort):
    """What lies far from the training cohort in the statistics of a new run, as one line; '' if nothing does.

    Far from the median means beyond four robust standard deviations (1.4826 x median absolute deviation) and beyond a
    floor, as a small cohort of one batch varies less than instruments do: half a decade of total intensity, a tenth
    of the axis for its ends, 0.05 for the share of intensity outside the axes.
    """
    usual = {name: np.median(values) for name, values in cohort.items()}
    rt, mz = usual["rt_last"] - usual["rt_first"], usual["mz_high"] - usual["mz_low"]
    floors = {"total_intensity": 0.5, "outside": 0.05, "rt_first": 0.1 * rt, "rt_last": 0.1 * rt}
    floors |= {"mz_low": 0.1 * mz, "mz_high": 0.1 * mz}
    warnings = []
    for name, floor in floors.items():
        values = np.array([statistics[name], *cohort[name]])
        if name == "total_intensity":
            values = np.log10(np.maximum(values, 1e-9))
        deviations = np.abs(values - np.median(values[1:]))
        if deviations[0] > max(4 * 1.4826 * np.median(deviations[1:]), floor):
            warnings.append(f"{name} is {statistics[name]:.4g} (training median {usual[name]:.4g})")
    return "; ".join(warnings)


def predict_files(runs, files, threshold=0.5, out=None):
    """Raw runs -> table of probabilities, converted with the checkpoint's recipe; returns the exit status.

    Each picture becomes a PNG, once for all that vote, so that a file gives what its converted picture gives. An
    unreadable file costs one line on stderr and exit status 1.
    """
    if out and Path(out).exists():
        raise InputError(f"--out {out} exists already; give another name")
    models, checkpoints = load_members(runs)
    checkpoint, config = checkpoints[0], checkpoints[0]["config"]
    threshold, rule = choose_threshold(models, checkpoints, threshold)
    rows, failures = [], []
    with tempfile.TemporaryDirectory() as folder:
        for path in tqdm(files_of(files), desc="reading", unit="file", disable=None):
            try:
                picture, statistics = picture_of_run(path, checkpoint["recipe"])
            except (InputError, OSError) as error:
                failures.append(error)
                continue
            png = Path(folder, f"{len(rows)}.png")
            Image.fromarray(picture).save(png)
            warning = warnings_of(statistics, checkpoint["cohort"])
            rows.append({"file": str(path), "path": png, "label": 0, "warning": warning})
        pictures = pd.DataFrame(rows)
        votes = votes_of(models, pictures) if rows else None
    print(f"{title_of(checkpoint, config['data_set'], *checkpoints[1:])}\n{rule}\n")
    if rows:
        _, calls = calls_of(votes, config["classes"], threshold)
        table = pictures[["file"]].join(calls).join(pictures["warning"])
        print(table.to_string(index=False, float_format="{:.4f}".format))
        if out:
            write_table(out, table)
    for failure in failures:
        print(f"left out: {failure}", file=sys.stderr)
    return 1 if failures else 0


# ---------------------------------------------------------------- many runs


def runs_below(paths):
    """The run folders named, and all below a folder that is not a run itself, each once."""
    runs = []
    for path in map(Path, paths):
        below = [] if (path / "best.pt").exists() else sorted(path.glob("**/best.pt"))
        runs += [checkpoint.parent for checkpoint in below] or [find_run(path)]
    return list(dict.fromkeys(runs))


def table_of(runs):
    """A row for each run: its best epoch by validation loss, and what its replicates share, as text in `settings`."""
    rows = []
    for run in runs:
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
        epochs = pd.read_csv(run / "epochs.csv")
        settings = config["settings"]
        best = epochs.loc[epochs["val_loss"].idxmin()]
        row = {"data_set": config["data_set"], "backbone": settings["backbone"]}
        row |= {"parameters_millions": config["parameters"] / 1e6, "best_epoch": int(best["epoch"])}
        row |= {name: best[name] for name in epochs if name.startswith(("train_", "val_"))}
        row |= {"seconds": epochs["seconds"].sum(), "notes": ", ".join(cautions(config)), "run": str(run)}
        fold = settings.pop("fold")
        row |= {"seed": settings.pop("seed"), "fold": "" if fold is None else fold}
        rows.append(row | {"folder": "/".join(run.resolve().parts[-3:-1]), "settings": json.dumps(settings)})
    return pd.DataFrame(rows).sort_values("val_loss", ignore_index=True)


def replicates_of(table):
    """{label: rows}: runs of one folder that differ in nothing but seed and fold, two or more, by median loss."""
    labelled = {}
    for (folder, notes), rows in table.groupby(["folder", "notes"]):
        if rows["settings"].nunique() > 1:
            print(f"{folder}: its runs have different settings, no replicates; train each under its own --name")
        elif len(rows) > 1:
            labelled[f"{folder} ({notes})" if notes else folder] = rows
    return dict(sorted(labelled.items(), key=lambda item: item[1]["val_loss"].median()))


def dunn(groups):
    """p values of Dunn's test for each pair of groups of values, with the correction for ties (Dunn 1964)."""
    ranks = rankdata(np.concatenate(groups))
    n, ends = len(ranks), np.cumsum([len(group) for group in groups])
    variance = n * (n + 1) / 12 * tiecorrect(ranks)  # of a rank
    p = []
    for a, b in itertools.combinations(np.split(ranks, ends[:-1]), 2):
        error = math.sqrt(variance * (1 / len(a) + 1 / len(b)))
        p.append(2 * norm.sf(abs(a.mean() - b.mean()) / error))
    return p


def tests_of(replicates, metrics):
    """Table of p values: Kruskal-Wallis, then Dunn for each pair, adjusted after Benjamini and Hochberg; by metric."""
    pairs = [f"{a} / {b}" for a, b in itertools.combinations(replicates, 2)]
    tests = pd.DataFrame(index=["Kruskal-Wallis", *pairs], columns=metrics, dtype=float)
    for name in metrics:
        groups = [rows[name].to_numpy() for rows in replicates.values()]
        values = np.concatenate(groups)
        if np.isfinite(values).all() and len(np.unique(values)) > 1:  # else nothing can be said
            tests[name] = [kruskal(*groups).pvalue, *false_discovery_control(dunn(groups))]
    return tests


def draw_replicates(path, replicates, metrics):
    """Article, Figures 1 and 3: median of each metric, standard deviation as error bar, a dot for each replicate."""
    ticks = [label.replace(" (", "\n(") for label in replicates]
    size = (3 + 2.1 * len(metrics), 1.8 + 0.5 * len(ticks))
    title = "Replicates on validation pictures: median, standard deviation, each run"
    with figure(path, title, size, ncols=len(metrics), sharey=True, squeeze=False) as axes:
        for ax, name in zip(axes[0], metrics, strict=True):
            values = [rows[name] for rows in replicates.values()]
            medians, deviations = [v.median() for v in values], [v.std() for v in values]
            ax.barh(ticks, medians, xerr=deviations, color="lightsteelblue", capsize=3, height=0.65)
            for y, group in enumerate(values):
                ax.plot(group, [y] * len(group), "o", color="black", markersize=3.5, alpha=0.7)
            ax.set_xlabel(words(name))
            ax.spines[["top", "right"]].set_visible(False)
        axes[0, 0].invert_yaxis()


def markdown(table):
    """A DataFrame as a Markdown table, its columns aligned."""
    rows = [[words(name) for name in table.columns]]
    rows += [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in table.to_numpy()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows)


def compare(runs, out):
    """Tables 1 and 2 for many runs; Figure 1 or 3 and its tests for replicates among them."""
    table = table_of(runs)
    metrics = [name for name in COMPARED if name in table]
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    write_table(out / "comparison.csv", table.drop(columns=["folder", "settings"]))
    columns = ["data_set", "backbone", "parameters_millions", "best_epoch", "train_loss", *metrics]
    shown = table[[*columns, "seconds", "seed", "fold", "notes"]].rename(columns=words)
    text = [f"# {len(table)} runs", "The best epoch by validation loss, sorted by it.", markdown(shown)]
    if replicates := replicates_of(table):
        together = pd.concat(replicates, names=["replicates_of"]).groupby(level=0, sort=False)[metrics]
        medians, deviations = together.median(), together.std()
        cells = medians.map("{:.3f}".format) + " ± " + deviations.map("{:.3f}".format)
        cells["runs"] = together.size()
        numbers = medians.add_suffix("_median").join(deviations.add_suffix("_deviation")).join(cells["runs"])
        write_table(out / "replicates.csv", numbers.reset_index())
        text += ["## Replicates", "Median ± standard deviation; see replicates.png.", markdown(cells.reset_index())]
        draw_replicates(out / "replicates.png", replicates, metrics)
    contenders = {label: rows for label, rows in replicates.items() if "shuffled" not in label}
    if len(contenders) > 1:
        tests = tests_of(contenders, metrics)
        tests = tests.rename_axis("pair").reset_index()
        write_table(out / "dunn.csv", tests)
        text += ["## Tests", TESTS, markdown(tests)]
    write_text(out / "comparison.md", "\n\n".join(text))
    print("\n\n".join(text) + f"\n\nresults: {out}/")


# ---------------------------------------------------------------- command line


def make_parser():
    parser = Parser(__doc__)
    runs = "run folder (default: the newest); several, or a folder of runs, are compared by their validation split"
    parser.add_argument("runs", nargs="*", metavar="RUN", help=runs)
    ensemble = "several runs or folds of one data set vote: the mean of their probabilities is judged as one run"
    parser.add_argument("--ensemble", action="store_true", help=ensemble)
    out = "folder for results (default: the run, or the common folder of several, or its ensemble/); --predict: a CSV"
    parser.add_argument("--out", help=out)
    add = parser.add_argument_group("one run, or an ensemble").add_argument
    add("--data", metavar="DIR", help="another data set, or where the run's own has moved")
    add("--split", choices=SPLITS, default="test", help="pictures to judge on")
    threshold = "call class 1 from this probability on; val chooses it on the validation split"
    add("--threshold", type=number(float, 0, "val"), default=0.5, metavar="P|val", help=threshold)
    add = parser.add_argument_group("new raw runs").add_argument
    files = "mzML or mzXML files, or folders of them; several runs vote; an existing --out is never replaced"
    add("--predict", nargs="+", metavar="FILE", help=files)
    return parser


def main():
    parser = make_parser()
    args = parser.parse_args()
    runs = runs_below(args.runs) if args.runs else [find_run()]
    common = Path(args.runs[0] if len(args.runs) == 1 else os.path.commonpath([run.resolve() for run in runs]))
    if args.predict:
        return predict_files(runs, args.predict, args.threshold, args.out)
    if len(runs) == 1 or args.ensemble:
        home = runs[0] if len(runs) == 1 else common / "ensemble"
        return evaluate(runs, home, args.data, args.split, args.threshold, args.out)
    if args.data or args.split != "test" or args.threshold != 0.5:
        parser.error(f"--data, --split and --threshold take one run, or --ensemble, not {len(runs)} runs to compare")
    return compare(runs, args.out or common)


if __name__ == "__main__":
    run_script(main)
