"""Evaluate a run on pictures it has never seen, predict new raw files, compare many runs.

Article: "Evaluating the final model" (test metrics, Figure 5), and the tables and figures that rank
architectures (Tables 1 and 2), replicates (Figure 1) and kinds of picture (Figure 3). The report
also tests possible confounders, such as batch, order of measurement and retention shift.

    python evaluate.py                                          # the newest run, test split
    python evaluate.py runs/golestan/convnext_large/seed2643 --predict new/*.mzML --out new.csv
    python evaluate.py runs/golestan                            # compare runs, without a test split
    python evaluate.py runs/golestan/convnext_large --ensemble  # mean of folds or repeats
"""

import argparse
import os
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import binomtest, chi2_contingency, false_discovery_control, kruskal, norm
from tqdm import tqdm

from deeplcms import RAW_FILE, SPLITS, Help, InputError, check_recipe, colours, compute_chromatogram
from deeplcms import compute_metrics, digest_pictures, find_anomalies, find_pictures, first_few
from deeplcms import first_line, list_files, make_labels, make_picture, measure_rt_shift
from deeplcms import predict_classes, probability, read_header, read_json, read_picture, roc_auc
from deeplcms import run_script, summarize_cohort, to_probabilities, write_json, write_table, write_text
from train import figure, find_kept_epoch, find_run, find_runs, load_run, make_inputs, predict
from train import progress, score_epoch, split_metrics

MIN_GROUPS = 10  # an interval needs so many groups of each class
RESAMPLES = 2000  # the bootstrap draws so many
SEED = 2643
COMPARED = ["val_loss", "val_accuracy", "val_f1", "val_precision", "val_recall"]  # Tables 1 and 2
NUMBERS = {"float_format": "{:.3f}".format, "na_rep": "undefined"}  # in printed tables
# Columns of find_pictures that identify a picture or give its class: they are no confounders.
NO_CONFOUNDERS = "path split phenotype sample_name copy chromatogram digest group status".split()
# Headings of comparison.md
ALL_RUNS = """Runs, sorted by `judged`, then by val_loss. "out of fold": a picture is predicted by
weights fitted without it. "validation": the epoch may suit these pictures, so val_ is too good."""
ALL_FOLDS = "Held-out pictures of all folds. Folds differ in calibration, so distrust their AUC."
P_VALUES = """Kruskal-Wallis test of all groups, then Dunn's test of each pair, adjusted within each
metric (Benjamini and Hochberg). All runs have the same people: p holds for these only."""


# ---------------------------------------------------------------- one run, or an ensemble
def evaluate(runs, base, args):
    """Evaluate a run, or an ensemble, on one split; write to --out, or `base` or a folder in it."""
    models, checkpoints = load_ensemble(runs)
    recipe = checkpoints[0]["recipe"]
    config = checkpoints[0]["config"]
    classes = config["classes"]
    data = args.data or config["data"]
    table, pictures = read_split(checkpoints[0], data, args.split)
    check_unseen(table, checkpoints, f"{data}, {args.split}")
    members = predict_probabilities(models, recipe, pictures)
    known = table[["sample_name", "group", "phenotype"]]
    predictions = known.join(tabulate(members, classes, args.threshold)).assign(file=table["path"])
    correct = np.where(predictions["predicted"] == predictions["phenotype"], "yes", "no")
    predictions.insert(4, "correct", correct)
    confusion = pd.crosstab(predictions["phenotype"], predictions["predicted"])
    confusion = confusion.reindex(index=classes, columns=classes, fill_value=0)
    logits = np.log(members.mean(axis=0))
    metrics = compute_intervals(make_labels(table, classes), logits, table["group"], args.threshold)

    subject = f"{args.data or config['data_set']}, {args.split} split, {len(table)} pictures"
    title = make_title(checkpoints, subject)
    rule = describe_rule(classes, args.threshold)
    print(title, rule, "", confusion, "", metrics.to_string(**NUMBERS), sep="\n")
    if metrics["low"].isna().all():
        print(f"no intervals: they need {MIN_GROUPS} pictures (or groups) of each class")
    everything, _ = find_pictures(data)
    result = {
        "title": title,
        "run": ", ".join(map(str, runs)),
        "split": args.split,
        "threshold": None,
        "rule": rule,
        "classes": classes,
        "confusion": confusion.values.tolist(),
        "metrics": metrics.replace({np.nan: None}).to_dict("index"),
        **report_confounders(everything, recipe),
    }
    if len(classes) == 2:
        (tn, fp), (fn, tp) = result["confusion"]
        result |= {"threshold": args.threshold, "tn": tn, "fp": fp, "fn": fn, "tp": tp}

    name = "" if args.split == "test" else args.split
    fitted = everything.query("split != 'test'")
    if digest_pictures(fitted, recipe) != config["settings"]["pictures"]:  # another data set
        name = f"{Path(data).resolve().name}-{digest_pictures(table, recipe):08x}-{args.split}"
    folder = Path(args.out or base / name)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "metrics.json", result)
    write_table(folder / "predictions.csv", predictions)
    draw_test(folder / "test.png", title, predictions, confusion, metrics)
    draw_prediction_matrix(folder / "prediction_matrix.png", title, predictions, pictures, recipe)
    print(f"\nresults: {folder}/")


def report_confounders(everything, recipe):
    """Print confounders in all splits of a data set, and return their part of metrics.json."""
    originals = everything.query("not copy")
    _, cohort = summarize_cohort(originals, recipe)
    table, not_tested = find_confounders(originals.assign(rt_shift=cohort["rt_shift"]))
    flagged = flag_confounders(table)
    print(f"\nConfounders: how well each alone separates the phenotypes of all {len(originals)} pictures")
    print(table.to_string(**NUMBERS))
    for name, reason in not_tested.items():
        print(f"not tested: {name} ({reason})")
    for name in flagged:
        print(f"warning: {name} separates the phenotypes; the classifier may have learned {name}")
    return {"confounders": table.to_dict("index"), "flagged": flagged, "not_tested": not_tested}


def load_ensemble(runs):
    """(models, checkpoints) of runs; InputError unless all have the same data set and classes."""
    models, checkpoints = zip(*map(load_run, runs), strict=True)
    first = checkpoints[0]["config"]
    for run, checkpoint in zip(runs, checkpoints, strict=True):
        config = checkpoint["config"]
        print(f"run {run}, epoch {checkpoint['epoch']}")
        check_recipe(checkpoint["recipe"], checkpoints[0]["recipe"], run)
        if config["classes"] != first["classes"]:
            raise InputError(f"{run}: its classes, or their order, differ from those of {runs[0]}")
        if config["settings"]["pictures"] != first["settings"]["pictures"]:
            raise InputError(f"{run}: its data set, or its split, differs from that of {runs[0]}")
    return models, checkpoints


def check_unseen(table, checkpoints, where):
    """Refuse pictures that a run was fitted to, and phenotypes that are not among its classes."""
    fitted = np.concatenate([checkpoint["fitted"] for checkpoint in checkpoints])
    seen = table["sample_name"][table["digest"].isin(fitted)]
    if len(seen):
        refused = f"{len(seen)} of these {len(table)} pictures: {first_few(seen)}"
        raise InputError(f"{where}: the run was fitted to {refused}")
    classes = checkpoints[0]["config"]["classes"]
    if unknown := set(table["phenotype"]) - set(classes):
        known = ", ".join(classes)
        raise InputError(f"{where}: {first_few(unknown)}: not among the run's classes, {known}")


def read_split(checkpoint, data, split):
    """Table and pictures [uint8 (H, W)] of a split, or of "all", without shifted copies."""
    table, recipe = find_pictures(data, None if split == "all" else (split,))
    check_recipe(recipe, checkpoint["recipe"], data)
    table = table.query("not copy").reset_index(drop=True)
    return table, [read_picture(path) for path in progress(table["path"], "reading", unit="picture")]


def predict_probabilities(models, recipe, pictures):
    """Probability (model, picture, class) of each class for pictures [uint8 (H, W)]."""
    members = []
    for model in models:
        starts = progress(range(0, len(pictures), 32), "classifying")
        batches = ((make_inputs(model, recipe, pictures[i : i + 32]), None) for i in starts)
        logits = torch.cat([logits for logits, _ in predict(model, batches)])
        if not logits.isfinite().all():
            raise InputError("the run's logits are not finite: train it again with a lower --lr")
        members.append(to_probabilities(logits))
    return np.stack(members).clip(1e-300)  # above 0, as its logarithm serves as a logit


def tabulate(members, classes, threshold):
    """Table of predicted class, and mean and deviation of probabilities (model, picture, class)."""
    mean = members.mean(axis=0)
    predicted = predict_classes(mean, threshold)
    table = pd.DataFrame({"predicted": np.take(classes, predicted)})
    table[[f"probability_{name}" for name in classes]] = mean
    if len(members) > 1:
        table["probability_std"] = members.std(axis=0)[table.index, predicted]
    return table


def describe_rule(classes, threshold):
    if len(classes) > 2:
        return "the most probable class is predicted"
    return f"{classes[1]} is predicted where its probability is {threshold:.4g} or more"


def make_title(checkpoints, subject):
    """'ensemble of 5; pixels on golestan; no network'. A figure breaks its title at "; "."""
    backbones = sorted({checkpoint["config"]["settings"]["backbone"] for checkpoint in checkpoints})
    parts = [f"{', '.join(backbones)} on {subject}"]
    if len(checkpoints) > 1:
        parts.insert(0, f"ensemble of {len(checkpoints)}")
    for checkpoint in checkpoints:
        parts += list_cautions(checkpoint["config"]["settings"])
        if checkpoint["by_chance"]:
            parts.append("on validation pictures no better than chance")
    return "; ".join(dict.fromkeys(parts))  # without duplicates


def list_cautions(settings):
    """Cautions for every table and title that shows a run; an ordinary run has none."""
    cautions = []
    if settings["weights"] in ("no network", "random initialisation"):
        cautions.append(settings["weights"])
    if settings["shuffle_labels"]:
        cautions.append("trained on shuffled labels")
    return cautions


# ---------------------------------------------------------------- new raw files
def predict_files(runs, files, threshold=0.5):
    """Table of predicted class, probabilities and warnings for raw files or PNGs that can be read.

    From Python: predict_files(["runs/mine/pixels/seed2643"], ["new.mzML"]).
    """
    models, checkpoints = load_ensemble(runs)
    checkpoint = checkpoints[0]
    recipe = checkpoint["recipe"]
    classes = checkpoint["config"]["classes"]
    print(make_title(checkpoints, checkpoint["config"]["data_set"]))
    print(describe_rule(classes, threshold), end="\n\n")
    table, pictures = read_files(list_files(files), recipe)
    members = predict_probabilities(models, recipe, pictures)
    shifts, warnings = [], []
    for picture, statistics in zip(pictures, table["statistics"], strict=True):
        chromatogram = compute_chromatogram(picture)
        shifts.append(measure_rt_shift(chromatogram, checkpoint["chromatogram"], recipe))
        warning = "a PNG: how its raw file was measured is unknown"
        if statistics:
            statistics["rt_shift"] = shifts[-1]
            warning = find_anomalies(statistics, checkpoint["cohort"], recipe)
        warnings.append(warning)
    predictions = tabulate(members, classes, threshold)
    return table[["file"]].join(predictions).assign(rt_shift=shifts, warning=warnings)


def read_files(files, recipe):
    """Table and pictures [uint8 (H, W)] of raw files and PNGs. An unreadable one of several is skipped.

    Columns: file, group (the file), sample_name, phenotype (folder of a PNG), statistics (raw file).
    """
    rows, pictures = [], []
    for path in tqdm(files, desc="reading", unit="file", disable=None):
        row = {"file": str(path), "group": str(path), "sample_name": path.stem, "phenotype": ""}
        try:
            if path.suffix.lower() == ".png":
                check_recipe(read_header(path)[1], recipe, path)
                picture, statistics = read_picture(path), None
                row["phenotype"] = path.resolve().parent.name
            else:
                picture, statistics = make_picture(path, recipe)
                row["sample_name"] = RAW_FILE.fullmatch(path.name)[1]
        except (InputError, OSError) as error:
            if len(files) == 1:
                raise
            tqdm.write(f"left out: {error}", file=sys.stderr)
            continue
        rows.append(row | {"statistics": statistics})
        pictures.append(picture)
    if not rows:
        raise InputError(f"none of the {len(files)} files can be read")
    return pd.DataFrame(rows), pictures


# ---------------------------------------------------------------- many runs
def compare(runs, out):
    """Tables 1 and 2 for many runs; Figure 1 or 3 and its p values for replicates among them."""
    rows = []
    for run in runs:
        try:
            rows.append(summarize_run(run))
        except (InputError, OSError, KeyError, ValueError) as error:
            print(f"left out: {run}: {first_line(error)}", file=sys.stderr)
    if not rows:
        raise InputError("none of these runs can be read")
    table = pd.DataFrame(sorted(rows, key=lambda row: (row["judged"], score_epoch(row))))
    out.mkdir(parents=True, exist_ok=True)
    write_table(out / "comparison.csv", table.drop(columns=["settings", "replicates"]))
    metrics = [name for name in COMPARED if name in table]
    columns = ["data_set", "backbone", "parameters_millions", "judged", "best_epoch"]
    columns += [name.replace("val_", "train_") for name in metrics] + metrics
    columns += ["baseline_loss", "seconds", "seed", "fold", "notes"]
    sections = {ALL_RUNS: table[columns]}
    folds = table.query("fold != ''")["run"]
    if len(folds):
        held_out = pd.concat(map(read_held_out, folds))
        write_table(out / "out_of_fold.csv", held_out)
        sections[ALL_FOLDS] = held_out.groupby("training", sort=False).apply(pool_metrics)
    replicates = find_replicates(table)
    if len(replicates):
        groups = replicates.groupby(level=0, sort=False)
        summary = groups[metrics].agg(["median", "std"])
        draw_replicates(out / "replicates.png", replicates, summary, metrics)
        summary["runs", ""] = groups.size()
        sections["Replicates: median and standard deviation; see replicates.png"] = summary
    # Folds of one cohort are not independent, and shuffled labels are a control.
    seeds = replicates[(replicates["fold"] == "") & ~replicates["notes"].str.contains("shuffled")]
    for judged, rows in seeds.groupby("judged"):
        if rows.index.nunique() > 1:
            sections[f"p values, {judged}. {P_VALUES}"] = compute_p_values(rows, metrics)
    text = ""
    for heading, section in sections.items():
        numbers = section.to_string(float_format="{:.3g}".format)
        text += f"{heading}\n\n```\n{numbers}\n```\n\n"
    write_text(out / "comparison.md", text.strip())
    print(f"{text}results: {out}/")


def summarize_run(run):
    """Row of a comparison: metrics of the kept epoch; for a fold, val_ of its held-out pictures."""
    config = read_json(run / "config.json")
    settings = config["settings"]
    seed = settings.pop("seed")
    fold = settings.pop("fold")
    epochs = pd.read_csv(run / "epochs.csv")
    kept = pd.Series(find_kept_epoch(epochs.to_dict("records")))
    row = {
        "data_set": config["data_set"],
        "backbone": settings["backbone"],
        "parameters_millions": config["parameters"] / 1e6,
        "judged": "out of fold" if settings["optimizer"] == "lbfgs" else "validation",
        "best_epoch": int(kept["epoch"]),
        **kept.filter(regex="^(train|val)_"),
        "seconds": epochs["seconds"].sum(),
        "seed": seed,
        "fold": "",
        "baseline_loss": config["baseline_loss"],
        "notes": ", ".join(list_cautions(settings)),
        "run": str(run),
        "settings": str(settings),  # the same in all replicates
    }
    row["replicates"] = "{data_set}/{backbone} ({notes})".format(**row).removesuffix(" ()")
    if fold is not None:
        row |= {"judged": "out of fold", "fold": fold}
        held_out = read_held_out(run)
        logits = torch.tensor(held_out.filter(like="logit_").to_numpy())
        row |= split_metrics("val", logits, torch.tensor(held_out["label"]))
    return row


def read_held_out(run):
    """Table of the held-out pictures of a fold, with their logits."""
    types = {"sample_name": str, "group": str}
    table = pd.read_csv(Path(run) / "held_out.csv", dtype=types, keep_default_na=False)  # NA may be a name
    return table.assign(training=str(run).rpartition("-fold")[0])  # runs may have moved


def pool_metrics(held_out):
    """Metrics and intervals of the held-out pictures of all folds of a training."""
    logits = held_out.filter(like="logit_").dropna(axis=1).to_numpy()
    return compute_intervals(held_out["label"].to_numpy(), logits, held_out["group"].to_numpy())


def find_replicates(table):
    """Rows of runs that differ only in seed and fold, indexed by what they share."""
    settings = table.groupby("replicates", sort=False)["settings"]
    differ = settings.transform("nunique") > 1
    for label in table["replicates"][differ].unique():
        print(f"{label}: not replicates, as settings differ; train each under its own --name")
    return table[~differ & (settings.transform("size") > 1)].set_index("replicates")


def compute_p_values(replicates, metrics):
    """Table of p values by metric: Kruskal-Wallis test, and Dunn's (1964) for each pair, adjusted."""
    pairs = list(combinations(replicates.index.unique(), 2))
    table = pd.DataFrame(np.nan, ["Kruskal-Wallis", *map(" / ".join, pairs)], metrics)
    for name in metrics:
        values = replicates[name]
        if not np.ptp(values) > 0:
            continue  # no difference, or nan: p is undefined
        ranks = values.rank()
        groups = ranks.groupby(level=0)
        mean, n = groups.mean(), groups.size()
        p = []
        for a, b in pairs:
            error = ranks.std() * np.sqrt(1 / n[a] + 1 / n[b])  # with Dunn's correction for ties
            p.append(2 * norm.sf(abs(mean[a] - mean[b]) / error))
        table[name] = [kruskal(*groups.agg(list)).pvalue, *false_discovery_control(p)]
    return table


def draw_replicates(path, replicates, summary, metrics):
    """Article, Figures 1 and 3: bar at the median, standard deviation, a dot for each run."""
    size = (3 + 2.1 * len(metrics), 1.8 + 0.5 * len(summary))
    title = "Replicates on validation pictures: median, standard deviation, each run"
    with figure(path, title, size, ncols=len(metrics), sharey=True, squeeze=False) as axes:
        for ax, name in zip(axes[0], metrics, strict=True):
            bars = summary[name]
            ax.barh(bars.index, bars["median"], xerr=bars["std"], color="lightsteelblue", capsize=3)
            ax.plot(replicates[name], replicates.index, "k.", alpha=0.7)
            ax.set_xlabel(name)
        ax.invert_yaxis()


# ---------------------------------------------------------------- metrics and their intervals
def compute_intervals(labels, logits, groups, threshold=0.5):
    """Table of metrics (rows): value, and low and high of its 95 % interval.

    Proportions have Wilson's interval (1927), other metrics percentiles of a bootstrap stratified by
    class. Pictures of one group (a person) are not independent: then groups are resampled, for all
    metrics. No interval: fewer than MIN_GROUPS groups of a class, or resamples that are all equal.
    """
    values = compute_metrics(labels, logits, threshold)
    table = pd.DataFrame({"value": values, "low": np.nan, "high": np.nan})
    probabilities = to_probabilities(logits)
    has_class = pd.crosstab(groups, labels) > 0  # (group, class)
    if has_class.shape[1] < probabilities.shape[1] or has_class.sum().min() < MIN_GROUPS:
        return table
    pictures_of = pd.Series(labels).groupby(groups).indices  # {group: its pictures}
    strata = has_class.groupby([*has_class])  # groups with the same classes
    rng = np.random.default_rng(SEED)
    resamples = []
    for _ in progress(range(RESAMPLES), "bootstrap", unit="resample"):
        drawn = strata.sample(frac=1, replace=True, random_state=rng)
        i = np.concatenate([pictures_of[group] for group in drawn.index])
        resamples.append(compute_metrics(labels[i], logits[i], threshold))
    # A metric that is often undefined has no interval either.
    resamples = pd.DataFrame(resamples).dropna(axis=1, thresh=0.95 * RESAMPLES)
    limits = resamples.quantile([0.025, 0.975]).T
    table[["low", "high"]] = limits[limits[0.025] < limits[0.975]]
    if len(pictures_of) == len(labels):
        predicted = predict_classes(probabilities, threshold)
        correct = predicted == labels
        hits = {"accuracy": correct}
        if probabilities.shape[1] == 2:
            hits |= {"recall": correct[labels == 1], "specificity": correct[labels == 0]}
            hits["precision"] = correct[predicted == 1]
        for name, trials in hits.items():
            if len(trials):
                table.loc[name, ["low", "high"]] = wilson(trials)
    return table


def wilson(hits):
    """[low, high] of Wilson's 95 % interval of the share of hits (N,) that are true."""
    return list(binomtest(hits.sum(), len(hits)).proportion_ci(method="wilson"))


# ---------------------------------------------------------------- confounders
def find_confounders(table):
    """How well does each other column alone separate the phenotypes? (table, {column: why not tested}).

    Pictures with one value form a part; more than twelve numbers or dates form five parts. auc: the score
    of a picture is the share of a phenotype in its part. The best phenotype counts, so chance exceeds 0.5.
    q: p of the chi-squared test, for numbers twice the lower of it and that of Kruskal-Wallis, after
    Benjamini and Hochberg.
    Not tested: a column with more names than the rarest phenotype has groups (people).
    """
    rows, not_tested = {}, {}
    table = table.drop_duplicates(["group", "phenotype"])  # a person counts once
    for name, column in table.drop(columns=NO_CONFOUNDERS, errors="ignore").items():
        column = column[column.notna() & (column != "")].astype(str)
        parts = values = read_numbers(column)
        is_number = values.dtype == float
        if is_number and values.nunique() > 12:
            parts = np.ceil(5 * values / len(values))
        phenotype = table["phenotype"][values.index]
        counts = pd.crosstab(parts, phenotype)
        if min(counts.shape) < 2:
            continue  # one value, or known for one phenotype only
        if not is_number and len(counts) > counts.sum().min():
            not_tested[name] = f"{len(counts)} names, {len(values)} groups"
            continue
        shares = counts.div(counts.sum(axis=1), axis=0)  # (part, phenotype)
        auc = max(roc_auc(phenotype == k, parts.map(shares[k])) for k in shares)
        p = chi2_contingency(counts).pvalue
        if is_number:
            by_rank = kruskal(*values.groupby(phenotype).agg(list)).pvalue
            p = min(1, 2 * p, 2 * by_rank)
        rows[name] = auc, p
        if len(values) < len(column):
            not_tested[name] = f"{len(column) - len(values)} values that are not numbers"
    table = pd.DataFrame(rows, ["auc", "q"], dtype=float).T
    return table.assign(q=false_discovery_control(table["q"])), not_tested


def read_numbers(column):
    """Ranks of a column of text with numbers (45.7 or 45,7) or dates; any other column unchanged.

    Up to twelve values of which some are not numbers (plates 1, 2, 3a) are names.
    """
    readings = [pd.to_numeric(column.str.replace(",", "."), errors="coerce")]
    readings.append(pd.to_datetime(column, errors="coerce", format="ISO8601", utc=True))
    for day in ("%d.%m.%Y", "%d/%m/%Y", "%m/%d/%Y"):  # without the time of day
        readings.append(pd.to_datetime(column, errors="coerce", format=day, exact=False, utc=True))
    best = max(readings, key=pd.Series.count)  # the first of equals
    readable = best.notna()
    if readable.all() or (column.nunique() > 12 and readable.mean() > 0.5):
        return best.dropna().rank()
    return column


def flag_confounders(confounders):
    """Names of the columns that clearly separate the phenotypes."""
    return list(confounders.query("q < 0.05 and auc > 0.7").index)


# ---------------------------------------------------------------- figures
def draw_test(path, title, predictions, confusion, metrics):
    """Confusion matrix; ROC curve and calibration of class 1, or of each of more than two classes."""
    classes = list(confusion)
    shown = classes[1:] if len(classes) == 2 else classes
    shares = confusion.div(confusion.sum(axis=1).clip(1), axis=0).to_numpy()  # rows sum to 1
    with figure(path, title, (17, 6.4), ncols=3) as (left, middle, right):
        left.imshow(shares, cmap="Blues", vmin=0, vmax=2)  # no dark blue, as the text is black
        for (i, j), n in np.ndenumerate(confusion):
            left.text(j, i, f"{n}\n{shares[i, j]:.0%}", ha="center", va="center")
        left.set_xticks(range(len(classes)), classes)
        left.set_yticks(range(len(classes)), classes)
        left.set(xlabel="predicted", ylabel="true phenotype")
        left.set_title("Number of pictures, share of the true phenotype", fontsize=10)
        draw_roc(middle, predictions, shown, metrics)
        draw_calibration(right, predictions, shown)


def draw_roc(ax, predictions, shown, metrics):
    """A curve for each class shown, and the point of the threshold on that of a single one."""
    ax.plot([0, 1], [0, 1], ":", color="grey", label="chance")
    for name in shown:
        is_class = predictions["phenotype"] == name
        # Share of others and of the class at each probability or above: equal ones make one step.
        shares = pd.crosstab(predictions[f"probability_{name}"], is_class, normalize="columns")
        curve = shares[::-1].cumsum()
        if curve.shape[1] == 2:  # else there are none of the class, or no others
            ax.plot([0, *curve[False]], [0, *curve[True]], label=f" {name}")  # "_a" would be hidden
    if len(shown) == 1:
        value = metrics["value"]
        ax.plot(1 - value["specificity"], value["recall"], "ko", label="threshold")
    title = "ROC AUC {value:.3f} (95 % interval {low:.3f} - {high:.3f})".format(**metrics.loc["roc_auc"])
    ax.set_title(title.replace("nan - nan", "undefined"), fontsize=10)
    ax.set(xlabel="false positive rate", ylabel="true positive rate", box_aspect=1)
    ax.legend(loc="lower right", frameon=False)


def draw_calibration(ax, predictions, shown):
    """Do eight of ten predictions of probability 0.8 come true? Means of five equal bins."""
    ax.plot([0, 1], [0, 1], ":", color="grey")
    for k, name in enumerate(shown):
        p = predictions[f"probability_{name}"]
        came_true = predictions["phenotype"] == name
        for _, hits in came_true.groupby((5 * p).astype(int).clip(upper=4)):
            x = p[hits.index].mean()
            ax.plot([x, x], wilson(hits), f"C{k}")
            ax.plot(x, hits.mean(), f"C{k}o")
            ax.annotate(f" {len(hits)}", (x, hits.mean()))
    ax.set_xlabel(f"predicted probability of {first_few(shown)}")
    ax.set(ylabel="share for which it came true", box_aspect=1)
    ax.set_title("Calibration: 95 % Wilson intervals, number of pictures", fontsize=10)


def draw_prediction_matrix(path, title, predictions, pictures, recipe):
    """Article, Figure 5: nine pictures, phenotypes in turn; green is correct."""
    looks = {"yes": ("#1a8a3a", "correct"), "no": ("#d62728", "wrong")}
    with figure(path, title, (10, 10.5), nrows=3, ncols=3, sharex=True, sharey=True) as axes:
        for axis, (i, row) in zip(axes.flat, pick_in_turn(predictions, 9).iterrows(), strict=False):
            colour, word = looks[row["correct"]]
            show(axis, colours(pictures[i], recipe.colormap), recipe)
            p = row[f"probability_{row['predicted']}"]
            title = f"{row['sample_name'][:30]}: {row['predicted']}, p = {p:.3f}"
            title += f"\ntrue phenotype: {row['phenotype']} ({word})"
            axis.set_title(title, color=colour, fontsize=10)
            axis.spines[:].set(color=colour, linewidth=4)
        label_axes(axes)


def pick_in_turn(table, n):
    """n rows for a figure, drawn at random, phenotypes in turn."""
    drawn = table.sample(frac=1, random_state=SEED)
    position = drawn.groupby("phenotype").cumcount()
    return drawn.loc[position.sort_values(kind="stable").index].head(n)


def show(axis, map_, recipe, **options):
    """Show a map or a picture on axes in minutes and m/z."""
    extent = recipe.rt_min, recipe.rt_max, recipe.mz_min, recipe.mz_max
    return axis.imshow(map_, extent=extent, aspect="auto", **options)


def label_axes(axes):
    """Label retention time and m/z in a figure of pictures, and hide its unused axes."""
    for (row, column), axis in np.ndenumerate(axes):
        if not axis.images:
            axis.set_axis_off()
            axes[row - 1, column].tick_params(labelbottom=True)  # now the lowest of its column
    axis.figure.supxlabel("retention time (min)")
    axis.figure.supylabel("m/z")


# ---------------------------------------------------------------- command line
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="run (default: newest); several, or a folder, are compared")
    add("--ensemble", action="store_true", help="evaluate the mean prediction of several runs")
    add("--out", help="folder (default: that of the run or runs); with --predict a new CSV file")
    add = parser.add_argument_group("one run, or an ensemble").add_argument
    add("--data", metavar="DIR", help="another data set, or the new place of the run's own")
    add("--split", choices=SPLITS, default="test", help="pictures to evaluate on")
    add("--threshold", type=probability, default=0.5, metavar="P", help="predict class 1 from P up")
    add("--predict", nargs="+", metavar="FILE", help="new raw files, or folders; RUNs are an ensemble")
    args = parser.parse_args()

    runs = []
    for path in map(Path, args.runs):
        runs += find_runs(path) or [find_run(path)]
    runs = list(dict.fromkeys(runs)) or [find_run()]  # without duplicates
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
        parser.error(f"--data, --split and --threshold need one run or --ensemble, not {len(runs)} runs")
    return compare(runs, Path(args.out or common))


def predict_command(runs, args):
    """Predict files, print the table and write it to --out; exit status 1 if a file is unreadable."""
    if args.out and Path(args.out).exists():
        raise InputError(f"--out {args.out} exists already; choose another name")
    if args.out and not Path(args.out).resolve().parent.is_dir():
        raise InputError(f"--out {args.out}: no such folder")
    files = list_files(args.predict)
    table = predict_files(runs, files, args.threshold)
    print(table.to_string(index=False, float_format="{:.4f}".format))
    if args.out:
        write_table(args.out, table)
    return int(len(table) < len(files))


if __name__ == "__main__":
    run_script(main)
