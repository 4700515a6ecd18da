"""Make the tables of .github/EXPERIMENTS.md, one command for each. Finished parts are not repeated.

    python tests/experiments.py transfer  # or another table; --seeds, --weights FILE, --out DIR

Most tables use three demo cohorts of 600 raw files (seeds 2643, 1, 2; or --seeds). 360 files are for testing. Training
and validation use 240 files ("280 runs", as with a test split of the usual size) or 34 of them ("40 runs"). Numbers are
means over the cohorts, with the lowest and highest in brackets. `ranking` has its own cohorts and a row for each.
"""

import argparse
import contextlib
import io
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.ndimage import gaussian_filter
from scipy.stats import ttest_ind, wilcoxon

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import convert
import deeplcms
import demo
import evaluate
import explain
import train

SEEDS = (2643, 1, 2)
MAIN_SEEDS = (2643, 1, 2, 3, 4)  # five trainings on the demo cohort
AXES = ["--bins", 256, "--rt-range", 0, 10, "--mz-range", 100, 900]
SIZES = {"40 runs": "small", "280 runs": "cohort"}
LITE = ["--backbone", "tf_efficientnet_lite0", "--weights", "pretrained"]  # or --weights FILE
SMALL = ["--finetune", "all", "--image-size", 128, "--lr", 0.01]
MODELS = {
    "pixels": ["--backbone", "pixels"],
    "head on several scales": LITE,
    "last map, 1 cell": [*LITE, "--scales", "last:1"],
    "all trained": [*LITE, *SMALL],
}
RANDOM = {
    "head on several scales, random weights": [*LITE[:3], "random", "--finetune", "head"],
    "all trained, random weights": [*LITE[:3], "random", *SMALL],
}
NETWORK = ["--backbone", "regnetx_002", "--weights", "random", *SMALL[:4], "--lr", 0.03]
NONE = train.AUGMENTATION["none"]
PRESETS = train.AUGMENTATION
PRESETS |= {
    "rotation 5 degrees": NONE | {"rotate": 5},
    "jitter 0.25": NONE | {"color_jitter": 0.25},
    "erasing up to 1 %": NONE | {"erase": 1, "erase_size": 0.01},
    "erasing up to 33 %": NONE | {"erase": 1, "erase_size": 0.33},
    "warp 1 %": NONE | {"warp": 1},
    "warp 2 %": NONE | {"warp": 2},
    "warp 3 %": NONE | {"warp": 3},
    "gain 0.3": NONE | {"gain": 0.3},
}


def call(main, *arguments):
    """Run a script of the project in this process without its output."""
    sys.argv = ["", *map(str, arguments)]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return main()


def write_cohorts():
    """Write the data sets cohort<seed> and small<seed>."""
    for seed in SEEDS:
        call(demo.main, f"cohort{seed}", "--seed", seed, "--runs", 600, "--test", 0.6)
        table = deeplcms.read_table(f"cohort{seed}/samples.csv")
        n = table["split"].map({"train": 13, "val": 4, "test": 1000})
        few = table[table.groupby(["split", "phenotype"]).cumcount() < n]
        few[["sample_name", "phenotype", "split"]].to_csv(f"small{seed}.csv", index=False)
        call(convert.main, f"cohort{seed}/raw", f"small{seed}.csv", f"small{seed}", *AXES)


def train_or_find(data, name, flags):
    """Train a run with these flags, or find it; returns its folder."""
    call(train.main, "--data", data, "--name", f"{name}-{data}", "--workers", 0, *flags)
    [checkpoint] = Path("runs", f"{name}-{data}", flags[1]).glob("seed*/best.pt")
    return checkpoint.parent


def evaluate_run(run):
    """{name: value} of a run: test metrics, lowest validation loss and highest training loss."""
    if not (run / "metrics.json").exists():
        call(evaluate.main, run)
    metrics = json.loads((run / "metrics.json").read_text())["metrics"]
    names = {"accuracy": "accuracy", "ROC AUC": "roc_auc", "Brier score": "brier"}
    result = {name: metrics[column]["value"] for name, column in names.items()}
    if (run / "epochs.csv").exists():
        epochs = pd.read_csv(run / "epochs.csv")
        result["validation loss"] = epochs["val_loss"].min()
        result["highest training loss / ln 2"] = epochs["train_loss"].max() / math.log(2)
    return result


def mean_and_range(results, columns):
    """['mean (lowest-highest)'] over the cohorts, one for each column."""
    table = pd.DataFrame(results)[columns]
    return [f"{v.mean():.3f} ({v.min():.3f}-{v.max():.3f})" for _, v in table.items()]


def print_table(rows, columns=("accuracy", "ROC AUC")):
    """Print a Markdown table with a row for each of {label: (name of the runs, flags)} and both sizes."""
    print("| | " + " | ".join(f"{size}: {column}" for size in SIZES for column in columns) + " |")
    print("| --- " * (1 + len(SIZES) * len(columns)) + "|")
    for label, (name, flags) in rows.items():
        cells = []
        for data in SIZES.values():
            results = [evaluate_run(train_or_find(f"{data}{seed}", name, flags)) for seed in SEEDS]
            cells += mean_and_range(results, list(columns))
        print(f"| {label} | {' | '.join(cells)} |", flush=True)


def main():
    """README's main command with five seeds, with two threads or one in turn."""
    columns = ["accuracy", "ROC AUC", "Brier score"]
    print(f"| Seed | Threads | {' | '.join(columns)} | kept epoch | seconds |\n" + "| --- " * 7 + "|")
    results = []
    for i, seed in enumerate(SEEDS):
        threads = str(2 - i % 2)
        command = [sys.executable, Path(train.__file__), "--backbone", "mobileone_s3", "--seed", str(seed)]
        environment = os.environ | {"OMP_NUM_THREADS": threads}
        subprocess.run([*command, "--weights", "random"], check=True, env=environment, stdout=subprocess.DEVNULL)
        run = Path(f"runs/demo/mobileone_s3/seed{seed}")
        results.append(evaluate_run(run))
        epochs = pd.read_csv(run / "epochs.csv")
        kept = epochs["epoch"][epochs["kept"]].max()
        cells = " | ".join(f"{results[-1][column]:.3f}" for column in columns)
        print(f"| {seed} | {threads} | {cells} | {kept} | {epochs['seconds'].sum():.0f} |", flush=True)
    print(f"| mean | | {' | '.join(mean_and_range(results, columns))} | | |")


def transfer():
    """Compare pixels with ImageNet weights, early maps and training of the whole network."""
    print_table({label: (name_of(label), flags) for label, flags in (MODELS | RANDOM).items()})
    print("| | 40 runs: accuracy | ROC AUC | 280 runs: accuracy | ROC AUC |\n" + "| --- " * 5 + "|")
    cells = []
    for size in SIZES.values():  # ensemble of pixels and the whole network
        results = []
        for seed in SEEDS:
            data = f"{size}{seed}"
            members = [train_or_find(data, name_of(label), MODELS[label]) for label in ("pixels", "all trained")]
            out = Path("runs", f"votes-{size}{seed}")
            call(evaluate.main, *members, "--ensemble", "--out", out)
            results.append(evaluate_run(out))
        cells += mean_and_range(results, ["accuracy", "ROC AUC"])
    print(f"| ensemble: pixels and all trained | {' | '.join(cells)} |")
    print_wins()


def name_of(label):
    return label.replace(",", "").replace(" ", "-")


def print_wins():
    """Numbers of cohorts where a model is more and less accurate than pixels, and Wilcoxon's p."""
    print("| | 40 runs: higher, lower, p | 280 runs: higher, lower, p |\n| --- | --- | --- |")
    for label in [*list(MODELS)[1:], "head on several scales, random weights"]:
        cells = []
        for size in SIZES.values():
            gains = []
            for seed in SEEDS:
                pixels = train_or_find(f"{size}{seed}", "pixels", MODELS["pixels"])
                model = train_or_find(f"{size}{seed}", name_of(label), (MODELS | RANDOM)[label])
                gain = evaluate_run(model)["accuracy"] - evaluate_run(pixels)["accuracy"]
                gains.append(round(gain, 6))
            gains = np.array(gains)
            cells.append(f"{(gains > 0).sum()}, {(gains < 0).sum()}, {wilcoxon(gains).pvalue:.2g}")
        print(f"| {label} | {' | '.join(cells)} |")


def normalize():
    """Pixels on pictures divided by a quantile, by the highest bin of each time, or of the file."""
    rows = {"quantile (the default)": []}
    for other in ("rt", "global"):
        for size in SIZES.values():
            for seed in SEEDS:
                table = f"{size}{seed}/samples.csv"
                flags = [*AXES, "--normalize", other]
                call(convert.main, f"cohort{seed}/raw", table, f"{other}-{size}{seed}", *flags)
        rows[other] = []
    print("| | " + " | ".join(f"{size}: accuracy | ROC AUC" for size in SIZES) + " |\n" + "| --- " * 5 + "|")
    for label in rows:
        cells = []
        for size in SIZES.values():
            prefix = "" if label.startswith("quantile") else f"{label}-"
            runs = [train_or_find(f"{prefix}{size}{seed}", "pixels", MODELS["pixels"]) for seed in SEEDS]
            results = list(map(evaluate_run, runs))
            cells += mean_and_range(results, ["accuracy", "ROC AUC"])
        print(f"| {label} | {' | '.join(cells)} |", flush=True)


def augmentation():
    flags = MODELS["pixels"]
    print_table({name: (f"pixels-{name}".replace(" ", "_"), [*flags, "--augmentation", name]) for name in PRESETS})


def views():
    print_table({f"{k} views of each": (f"pixels-views{k}", [*MODELS["pixels"], "--views", k]) for k in (1, 4, 8, 16)})


def cells():
    """Compare grids of the head: cells in retention time x cells in m/z."""
    pixels, head = MODELS["pixels"], MODELS["head on several scales"]
    rows = {"pixels, 56 x 56 of 224 pixels": ("pixels-56-224", [*pixels, "--scales", "1:56", "--image-size", 224])}
    for grid in ("56", "28x112", "28x250", "14x250", "14x112"):
        rows[f"pixels, {grid}"] = f"pixels-{grid}", [*pixels, "--scales", f"1:{grid}"]
    for scales in ("1:56 8:14 16:14", "1:28x224 8:7x28 16:7x14", "1:14x224 8:7x28 16:7x14"):
        rows[f"head, {scales}"] = f"head-{scales.partition(' ')[0][2:]}", [*head, "--scales", *scales.split()]
    print_table(rows)


def rates():
    rows = {f"all trained, {lr}": (f"whole-lr{lr}", [*LITE, *SMALL[:4], "--lr", lr]) for lr in (0.003, 0.03, "auto")}
    rows["all trained, 0.01"] = name_of("all trained"), MODELS["all trained"]
    print_table(rows, ["accuracy", "validation loss", "highest training loss / ln 2"])


def votes():
    """Compare ensembles of folds of the 40 runs with one training."""
    rows = {"one training": [], "five folds vote": ["--folds", 5], "ten folds vote": ["--folds", 10]}
    print("| | accuracy | ROC AUC |\n| --- | --- | --- |")
    for label, more in rows.items():
        results = []
        for seed in SEEDS:
            name = f"pixels-{name_of(label)}-{seed}"
            flags = [*MODELS["pixels"], "--workers", 0, *more]
            call(train.main, "--data", f"small{seed}", "--name", name, *flags)
            folder = Path("runs", name, "pixels")
            call(evaluate.main, *folder.glob("seed*"), "--out", folder / "votes", *(["--ensemble"] if more else []))
            results.append(evaluate_run(folder / "votes"))
        print(f"| pixels, {label} | {' | '.join(mean_and_range(results, ['accuracy', 'ROC AUC']))} |", flush=True)


def shuffled():
    print_table({m: (name_of(f"{m}-shuffled"), [*flags, "--shuffle-labels"]) for m, flags in MODELS.items()})


# ---------------------------------------------------------------- ranking by evidence


def write_crowd(folder, seed, n_runs=150):
    """Write a cohort of 150 files and 600 compounds; 24 are 12-fold stronger in four of five exposed people."""
    (folder / "raw").mkdir(parents=True, exist_ok=True)
    compounds, lines, batches = demo.demo_cohort(seed, n_background=576)
    samples = []
    for i in range(n_runs):
        run, exposed = np.random.default_rng([seed, 1, i]), i % 2 == 1
        stronger = exposed & compounds["planted"] & (run.random(len(compounds)) < 0.8)
        # simulate_scans multiplies exposed levels by the root of the fold and divides control levels by it.
        simulated = compounds.assign(fold=np.where(stronger, 12.0**2, 1.0))
        scans = demo.simulate_scans(run, simulated, lines, exposed, batches[demo.batch_of(i)])
        demo.write_mzml(folder / f"raw/run{i:03d}.mzML", scans)
        samples.append((f"run{i:03d}", demo.PHENOTYPES[exposed]))
    pd.DataFrame(samples, columns=["sample_name", "phenotype"]).to_csv(folder / "raw/samples.csv", index=False)
    ontology = np.where(compounds["planted"], "planted", "background")
    fold_change = np.where(compounds["planted"], 12, 1)
    compounds[["rt", "mz"]].assign(ontology=ontology, fold_change=fold_change).to_csv(
        folder / "features.csv", index=False
    )
    axes = ["--rt-range", 0, 10, "--mz-range", 100, 900, "--bins", 256, "--test", 0.15, "--seed", seed]
    call(convert.main, folder / "raw", folder / "raw/samples.csv", folder, *axes)


def compute_ranking(run, data, drift=0.3, limit=0.1):
    """{column: text} for a run: AUCs of rankings that should separate planted from background features."""
    model, checkpoint = train.load_run(run)
    recipe = checkpoint["recipe"]
    table, pictures = explain.read_split(checkpoint, data, "all")
    with contextlib.redirect_stdout(io.StringIO()):
        features = explain.read_features(data / "features.csv", recipe)
    planted, up = np.array(features["ontology"] == "planted"), np.array(features["fold_change"] > 1)
    exposed, test = np.array(table["phenotype"] == "exposed"), np.array(table["split"] == "test")

    p = evaluate.predict_probabilities([model], recipe, pictures)[0][:, 1]
    measured = np.array([explain.local_intensity(picture, recipe, drift).ravel() for picture in pictures])

    def compute_evidence(rows):
        """(evidence at the features (F,), removed components), from the pictures of these rows."""
        components = explain.find_common_components(measured[rows], p[rows], limit=limit)
        evidence = explain.compute_evidence(measured[rows], p[rows], components)
        return explain.look_up_values(evidence, features, recipe), components

    r, components = compute_evidence(np.full(len(p), True))
    r_test, _ = compute_evidence(test)
    at_features = explain.look_up_values(measured, features, recipe)  # (N, F)
    found = explain.compute_evidence_p(r, len(p) - 2 - components.shape[1])["q"] < 0.05
    t = ttest_ind(at_features[exposed], at_features[~exposed], equal_var=False).statistic
    aucs = {"evidence": r, "evidence, test pictures": r_test, "t-test of phenotypes": t}
    layers = explain.choose_layers(model)
    if layers:
        cam = sum(explain.compute_cams(model, layers, recipe, [pictures[i] for i in np.flatnonzero(exposed)], 1))
        aucs["LayerCAM"] = explain.look_up_values(cam.ravel(), features, recipe)

    order = np.argsort(-abs(r))
    hits = found & planted
    right = hits & (up == (r > 0))
    row = {"AUC of predictions, test": f"{deeplcms.roc_auc(exposed[test], p[test]):.3f}"}
    row |= {name: f"{deeplcms.roc_auc(planted, abs(values)):.3f}" for name, values in aucs.items()}
    row["planted in 10, 24, 50"] = ", ".join(str(planted[order[:n]].sum()) for n in (10, 24, 50))
    row["q < 0.05, planted, in the right direction"] = f"{found.sum()}, {hits.sum()}, {right.sum()}"
    return row


def ranking():
    """Rank planted and background features by evidence of pixels and networks, one with shuffled labels."""
    models = {
        "pixels": MODELS["pixels"],
        "network": NETWORK,
        "network, shuffled labels": [*NETWORK, "--shuffle-labels"],
    }
    header = None
    for kind, seed in itertools.product(("demo", "crowd"), SEEDS):
        data = make_cohort(kind, seed)
        for model, flags in models.items():
            row = compute_ranking(train_or_find(data, name_of(model), [*flags, "--seed", seed]), data)
            if header is None:
                header = f"| Cohort | Model | {' | '.join(row)} |"
                print(header + "\n| --- | --- " + "| --- " * len(row) + "|")
            print(f"| {data} | {model} | {' | '.join(row.values())} |", flush=True)


def bins():
    """Compare coarse and fine pictures of the same files, with two normalisations; --seeds: new cohorts."""
    header = "Cohort | Bins | Divided by | t-test of phenotypes | evidence, nothing removed | evidence"
    print(f"| {header} |\n" + "| --- " * 6 + "|")
    for kind, seed in itertools.product(("demo", "crowd"), SEEDS):
        source = make_cohort(kind, seed)
        for n, normalize in itertools.product((256, 1024), ("quantile", "rt")):
            data = Path(f"{source}-{n}-{normalize}")
            flags = [*AXES[2:], "--bins", n, "--test", 0.15, "--seed", seed, "--normalize", normalize]
            call(convert.main, source / "raw", source / "raw/samples.csv", data, *flags)
            shutil.copy(source / "features.csv", data)
            run = train_or_find(data, "pixels", [*MODELS["pixels"], "--seed", seed])
            row, plain = compute_ranking(run, data), compute_ranking(run, data, limit=0)
            cells = [row["t-test of phenotypes"], plain["evidence"], row["evidence"]]
            print(f"| {source} | {n} | {normalize} | {' | '.join(cells)} |", flush=True)


def make_cohort(kind, seed):
    """Folder of a cohort for a ranking; writes the cohort if it is missing."""
    if kind == "demo":
        return make_demo(seed)
    folder = Path(f"crowd{seed}")
    if not (folder / "samples.csv").exists():
        write_crowd(folder, seed)
    return folder


# ---------------------------------------------------------------- faithfulness of CAMs
def compute_drops(model, recipe, pictures, maps, k):
    """Average drop of the probability of class k for pictures multiplied by their CAMs (Chattopadhay et al. 2018).

    The picture fades to zero intensity where the CAM is 0. The control is the same CAM moved by half of both axes.
    """
    zero = train.make_inputs(model, recipe, [np.zeros_like(pictures[0])])
    x = train.make_inputs(model, recipe, pictures)
    maps = torch.from_numpy(np.stack(maps)).float()
    maps = maps - maps.amin((1, 2), keepdim=True)
    maps = maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-12)  # 0 ... 1
    moved = maps.roll((maps.shape[1] // 2, maps.shape[2] // 2), (1, 2))

    def probability(x):
        [(logits, _)] = train.predict(model, [(x, None)])
        return deeplcms.to_probabilities(logits)[:, k]

    whole, drops = probability(x), {}
    for name, mask in (("map", maps), ("moved map", moved)):
        seen = zero + (x - zero) * explain.resize_maps(mask, x.shape[2:])[:, None]
        drops[name] = np.maximum(0, whole - probability(seen)) / whole
    return {name: drop.mean() for name, drop in drops.items()}


def faithful():
    print("| Cohort | Drop with the CAM | with the moved CAM |\n| --- | --- | --- |")
    for seed in SEEDS:
        run = train_or_find(f"cohort{seed}", name_of("all trained"), MODELS["all trained"])
        model, checkpoint = train.load_run(run)
        recipe = checkpoint["recipe"]
        table, pictures = explain.read_split(checkpoint, f"cohort{seed}", "val")
        pictures = [pictures[i] for i in np.flatnonzero(table["phenotype"] == "exposed")]
        maps = list(explain.compute_cams(model, explain.choose_layers(model), recipe, pictures, 1))
        drops = compute_drops(model, recipe, pictures, maps, 1)
        print(f"| {seed} | {drops['map']:.3f} | {drops['moved map']:.3f} |", flush=True)


# ---------------------------------------------------------------- confounders, retention shifts and other methods


def confounded():
    """70 files without differences between classes. Half elute 3.6 s later: the exposed, or half of each class."""
    print("| Cohort | Later files | Model | AUC of predictions, test | Flagged confounders |")
    print("| --- | --- | --- | --- | --- |")
    for seed in SEEDS:
        for later in ("the exposed", "half of each"):
            folder = Path(f"no-biology{seed}-{later.replace(' ', '-')}")
            (folder / "raw").mkdir(parents=True, exist_ok=True)
            compounds, lines, batches = demo.demo_cohort(seed, n_planted=0, n_background=240)
            samples = []
            for i in range(70):
                exposed = i % 2 == 1
                late = exposed if later == "the exposed" else i % 4 > 1
                rng = np.random.default_rng([seed, 1, i])
                moved = compounds.assign(rt=compounds["rt"] + 0.06 * late)
                scans = demo.simulate_scans(rng, moved, lines, False, batches[0])
                demo.write_mzml(folder / f"raw/run{i:02d}.mzML", scans)
                samples.append((f"run{i:02d}", demo.PHENOTYPES[exposed], i // 2 + 35 * late))
            columns = ["sample_name", "phenotype", "injection_order"]
            pd.DataFrame(samples, columns=columns).to_csv(folder / "raw/samples.csv", index=False)
            axes = ["--rt-range", 0, 10, "--mz-range", 100, 900, "--bins", 256, "--test", 0.4]
            call(convert.main, folder / "raw", folder / "raw/samples.csv", folder, *axes)
            for model in ("pixels", "all trained"):
                run = train_or_find(folder, name_of(model), MODELS[model])
                call(evaluate.main, run)
                result = json.loads((run / "metrics.json").read_text())
                flagged = ", ".join(f"{name} ({result['confounders'][name]['auc']:.2f})" for name in result["flagged"])
                auc = result["metrics"]["roc_auc"]["value"]
                print(f"| {seed} | {later} | {model} | {auc:.3f} | {flagged or '-'} |", flush=True)


def drift():
    """Predict test files as new files after a constant retention shift: warnings and accuracy."""
    print("| Cohort | Model | Minutes later | With a warning | Median of rt_shift | Accuracy |\n" + "| --- " * 6 + "|")
    for seed in SEEDS:
        data = make_demo(seed)
        for model, flags in {"pixels": MODELS["pixels"], "network": NETWORK}.items():
            run = train_or_find(data, f"drift-{model}", flags)
            for minutes in (0, -0.4, 0.4, 0.6):

                def write_moved(path, minutes=minutes, data=data):
                    _, scans = deeplcms.read_raw(data / "raw" / path.name)
                    moved = [(60 * (rt + minutes), *peaks) for rt, *peaks in scans if rt + minutes >= 0]
                    demo.write_mzml(path, moved)

                table, right = predict_changed(run, data, f"moved{minutes}", write_moved)
                warned = table["warning"].str.contains("rt_shift").sum()
                cells = f"{warned} of {len(table)} | {table['rt_shift'].median():.2f} | {right.mean():.3f}"
                print(f"| {data} | {model} | {minutes} | {cells} |", flush=True)


def predict_changed(run, data, name, write):
    """Predict the new file that `write` makes from each test file -> (table of evaluate.py, correct (N,))."""
    test = deeplcms.find_pictures(data)[0].query("split == 'test'").set_index("sample_name")["phenotype"]
    folder, out = Path(f"{data}-{name}"), run / f"{name}.csv"
    folder.mkdir(exist_ok=True)
    for path in [folder / f"{sample}.mzML" for sample in test.index]:
        if not path.exists():
            write(path)
    out.unlink(missing_ok=True)
    call(evaluate.main, run, "--predict", folder, "--out", out)
    table = pd.read_csv(out, keep_default_na=False)
    truth = test[[Path(file).stem for file in table["file"]]]
    return table, table["predicted"].to_numpy() == truth.to_numpy()


CHANGES = {
    "none": {},
    "noise peaks x 4": {"noise": 160},
    "noise peaks x 10": {"noise": 400},
    "threshold 5e3 for 1e3": {"threshold": 5e3},
    "scans twice as often": {"interval": 1.0},
    "scans half as often": {"interval": 4.0},
    "ten times the intensity": {"gain": 10, "threshold": 1e4},
    "a tenth of the intensity, the same noise": {"gain": 0.1},
}


def level():
    """Predict test files of another simulated method: ratios of scales, warnings and accuracy over cohorts."""
    models = {name: MODELS[name] for name in ("pixels", "head on several scales")}
    header = "Change | 90th percentile of lit bins | 0.85 quantile after the wide filter | with a warning"
    print(f"| {header} | {' | '.join(models)} |\n" + "| --- " * 6 + "|")
    for name, change in CHANGES.items():
        ratios, warned, n, right = [], 0, 0, {model: [] for model in models}
        for seed, model in itertools.product(SEEDS, models):
            data = make_demo(seed)
            run = train_or_find(data, f"level-{name_of(model)}", models[model])
            compounds, lines, batches = demo.demo_cohort(seed)

            def write_changed(path, seed=seed, change=change, shared=(compounds, lines), batches=batches):
                i = int(path.stem.removeprefix("run"))
                rng, batch = np.random.default_rng([seed, 1, i]), batches[demo.batch_of(i)]
                demo.write_mzml(path, demo.simulate_scans(rng, *shared, i % 2 == 1, batch, **change))

            table, correct = predict_changed(run, data, name_of(name), write_changed)
            right[model].append(correct.mean())
            warned, n = warned + (table["warning"] != "").sum(), n + len(table)
            recipe = deeplcms.find_pictures(data)[1]
            for path in sorted(Path(f"{data}-{name_of(name)}").glob("*"))[:5]:
                before, after = (compute_scales(p, recipe) for p in (data / "raw" / path.name, path))
                ratios.append(after / before)
        cells = [*(f"{ratio:.2f}" for ratio in np.median(ratios, axis=0)), f"{warned} of {n}"]
        cells += [f"{np.mean(values):.3f}" for values in right.values()]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def compute_scales(path, recipe):
    """(90th percentile of the filled bins, the old divisor; 0.85 quantile after a wide filter, the present one)."""
    counts, _ = deeplcms.make_histogram(path, recipe)
    wide = gaussian_filter(counts, np.divide(recipe.bins, 125))
    return np.array([np.quantile(counts[counts > 0], 0.9), np.quantile(wide, 0.85)])


def make_demo(seed):
    """Make a demo cohort of 280 files, 42 of them for testing; returns its folder."""
    call(demo.main, f"demo{seed}", "--seed", seed, "--runs", 280, "--test", 0.15)
    return Path(f"demo{seed}")


# ---------------------------------------------------------------- calibration


def weak():
    """Compare confidence and accuracy on 150 files whose 24 planted compounds differ by a factor of 1.3."""
    columns = ["Accuracy", "mean confidence", "loss", "baseline loss", "Brier score", "ROC AUC"]
    print(f"| Cohort | Exposed | {' | '.join(columns)} |\n" + "| --- " * 8 + "|")
    # Indices of the exposed among sixteen files in turn. Each batch has the same share of them.
    shares = {"half": range(1, 16, 2), "quarter": (1, 2, 12, 15)}
    for seed, share in itertools.product(SEEDS, shares):
        folder = Path(f"weak{seed}-{share}")
        (folder / "raw").mkdir(parents=True, exist_ok=True)
        compounds, lines, batches = demo.demo_cohort(seed)
        compounds["fold"] = np.where(compounds["planted"], 1.3, 1.0)
        samples = []
        for i in range(150):
            rng, exposed = np.random.default_rng([seed, 1, i]), i % 16 in shares[share]
            path = folder / f"raw/run{i:03d}.mzML"
            samples.append((path.stem, demo.PHENOTYPES[exposed]))
            if not path.exists():
                demo.write_mzml(path, demo.simulate_scans(rng, compounds, lines, exposed, batches[demo.batch_of(i)]))
        pd.DataFrame(samples, columns=["sample_name", "phenotype"]).to_csv(folder / "raw/samples.csv", index=False)
        flags = [*AXES, "--test", 0.4, "--seed", seed]
        call(convert.main, folder / "raw", folder / "raw/samples.csv", folder, *flags)
        run = train_or_find(folder, "pixels", MODELS["pixels"])
        result = evaluate_run(run)
        table = pd.read_csv(run / "predictions.csv")
        p, labels = table["probability_exposed"].to_numpy(), (table["phenotype"] == "exposed").to_numpy(int)
        loss = -np.log(np.where(labels, p, 1 - p)).mean()
        values = [result["accuracy"], np.maximum(p, 1 - p).mean(), loss, train.compute_baseline_loss(labels, 1)]
        values += [result["Brier score"], result["ROC AUC"]]
        cells = " | ".join(f"{value:.3f}" for value in values)
        print(f"| {seed} | {labels.sum()} of {len(labels)} | {cells} |", flush=True)


def shuffled_folds():
    """Metrics over all five folds of the 40 runs with shuffled labels, eight times for each cohort."""
    print("| | Accuracy, its standard error | ROC AUC, its standard error |\n| --- | --- | --- |")
    for model in ("pixels", "head on several scales"):
        rows = []
        for seed in SEEDS:
            name = f"{name_of(model)}-shuffled-folds-{seed}"
            more = ["--folds", 5, "--repeats", 8, "--shuffle-labels"]
            call(train.main, "--data", f"small{seed}", "--name", name, "--workers", 0, *MODELS[model], *more)
            for i in range(8):
                folds = Path("runs", name, MODELS[model][1]).glob(f"seed{2643 + i}-shuffled-fold*")
                held_out = pd.concat([evaluate.read_held_out(fold) for fold in folds])
                rows.append(deeplcms.compute_metrics(held_out["label"].to_numpy(), held_out[["logit_0"]].to_numpy()))
        table = pd.DataFrame(rows)[["accuracy", "roc_auc"]]
        cells = [f"{v.mean():.3f}, {v.sem():.3f}" for _, v in table.items()]
        print(f"| {model}, {len(table)} x 5 folds | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = (
        main,
        transfer,
        normalize,
        augmentation,
        views,
        cells,
        rates,
        votes,
        shuffled,
        ranking,
        bins,
        faithful,
        confounded,
        drift,
        level,
        weak,
        shuffled_folds,
    )
    tables = {function.__name__: function for function in tables}
    parser.add_argument("table", choices=tables)
    parser.add_argument(
        "--seeds", type=int, nargs="+", help="seeds of the cohorts (default: 2643 1 2), or of the trainings of main"
    )
    parser.add_argument("--weights", metavar="FILE", help="weights of tf_efficientnet_lite0 (default: from the Hub)")
    parser.add_argument("--out", default="experiments", help="folder for cohorts and runs")
    args = parser.parse_args()
    SEEDS = args.seeds or (MAIN_SEEDS if args.table == "main" else SEEDS)
    if args.weights:
        for flags in (LITE, *MODELS.values()):
            flags[:] = [str(Path(args.weights).resolve()) if flag == "pretrained" else flag for flag in flags]
    Path(args.out).mkdir(exist_ok=True)
    os.chdir(args.out)
    torch.set_num_threads(1)
    if args.table not in ("main", "ranking", "bins", "confounded", "drift", "level", "weak"):
        write_cohorts()
    tables[args.table]()
