"""What evaluate.py says about a run is true, and it refuses to say what it cannot know."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binom

import evaluate
from convert import Problem, run_script, write_mzml
from deeplcms import Classifier, Pictures, evaluation_transform, find_pictures, loss_of, save_checkpoint, write_json

ROOT = Path(__file__).resolve().parent.parent
COMPOUND_MZ = {"case": 200.0, "control": 300.0, "other": 400.0}  # what the runs of a phenotype hold more of


def call(*arguments, cwd=ROOT):
    command = [sys.executable, str(ROOT / "evaluate.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def make_data(folder, phenotypes, bins=16):
    """A tiny cohort: raw mzML, and its pictures by convert.py; 4 training, 4 validation, 5 test runs a phenotype."""
    rng = np.random.default_rng(0)
    (folder / "raw").mkdir(parents=True)
    samples = ["sample_name,phenotype,split"]
    for phenotype in phenotypes:
        for k, split in enumerate(["train"] * 4 + ["val"] * 4 + ["test"] * 5):
            name = f"{phenotype}{k:02d}"
            samples.append(f"{name},{phenotype},{split}")
            mz = np.array([101.0, *COMPOUND_MZ.values(), 499.0])
            level = np.array([1e4, *(1e4 * (1 + 3 * (p == phenotype)) for p in COMPOUND_MZ), 1e4])
            scans = [(t, mz, level * rng.lognormal(0, 0.8, 5)) for t in np.linspace(0, 300, 30)]
            write_mzml(folder / "raw" / f"{name}.mzML", scans)
    (folder / "raw" / "samples.csv").write_text("\n".join(samples))
    command = [sys.executable, ROOT / "convert.py", folder / "raw", folder / "raw/samples.csv", folder / "data"]
    command += ["--bins", bins, "--sigma", 1, "--rt-range", 0, 5, "--mz-range", 100, 500, "--workers", 1]
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True, capture_output=True)
    return folder / "data"


def make_run(run, data, backbone="pixels", **config):
    """A run folder in the form of train.py's, trained for a moment, so that it is right now and then."""
    torch.manual_seed(0)
    pictures = find_pictures(data, ("train",))["train"]
    classes = sorted({picture.phenotype for picture in pictures})
    model = Classifier(backbone, len(classes), 8, 16)
    x, y = zip(*Pictures(pictures, classes, evaluation_transform(16, model.mean, model.std)), strict=True)
    optimizer = torch.optim.Adam(model.head.parameters(), 0.05)
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(model.train()(torch.stack(x)), torch.tensor(y)).backward()
        optimizer.step()
    config = {
        **{"backbone": backbone, "data": str(data), "data_set": data.name, "seed": 1, "fold": None, "grid": 8},
        **{
            "weights_origin": "random initialisation",
            "shuffle_labels": False,
            "classes": classes,
            "status": "finished",
        },
        **config,
    }
    run.mkdir(parents=True)
    write_json(run / "config.json", config)
    names = ("total_intensity", "outside", "rt_first", "rt_last", "mz_low", "mz_high")
    contents = {"model": model.state_dict(), "epoch": 5, "backbone": backbone, "classes": classes, "grid": 8}
    contents |= {"image_size": 16, "mean": list(model.mean), "std": list(model.std), "config": config}
    contents |= {"recipe": pictures[0].recipe.to_text(), "versions": {}}
    contents |= {"cohort": {name: [float(p.text[name]) for p in pictures] for name in names}}
    save_checkpoint(run / "best.pt", contents)
    return run


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """(data set, run) of two phenotypes; class 1 is control."""
    folder = tmp_path_factory.mktemp("two")
    data = make_data(folder, ["case", "control"])
    return data, make_run(folder / "runs/data/pixels/seed1", data)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    data = make_data(folder, ["case", "control", "other"])
    return data, make_run(folder / "runs/data/pixels/seed1", data)


@pytest.fixture()
def pixels(two, tmp_path, monkeypatch):
    """A copy of the run of two phenotypes, to write in; intervals are not what its tests are about."""
    monkeypatch.setattr(evaluate, "RESAMPLES", 50)
    return Path(shutil.copytree(two[1], tmp_path / "run"))


@pytest.fixture()
def without_figures(monkeypatch):
    for name in ("confusion", "roc", "calibration", "prediction_matrix"):
        monkeypatch.setattr(evaluate, f"draw_{name}", lambda *_: None)


# ---------------------------------------------------------------- metrics


def article():
    """Labels and probabilities with the article's counts: TP 20, TN 7, FN 2, FP 1."""
    labels = np.array([1] * 22 + [0] * 8)
    p = np.array([0.9] * 20 + [0.2] * 2 + [0.1] * 7 + [0.7])
    return labels, np.stack([1 - p, p], 1)


def values_in(table):
    """{name: first number or word after it} of the printed table."""
    names = evaluate.METRICS.values()
    return {
        name: line[len(name) :].split()[0] for line in table.splitlines() for name in names if line.startswith(name)
    }


def test_the_counts_of_the_article_give_the_figures_of_the_article():
    result = evaluate.judge(*article(), ["non-user", "user"])
    assert result["bootstrap"] == {"resamples": 2000, "seed": 2643, "stratified": True, "level": 0.95}
    table = evaluate.table_of(result)
    assert "TP 20  TN 7  FP 1  FN 2  (positive: user)" in table
    values = values_in(table)
    assert (values["accuracy"], values["precision"], values["recall"], values["F1"]) == (
        "0.900",
        "0.952",
        "0.909",
        "0.930",
    )


def test_the_interval_of_recall_is_that_of_the_binomial_distribution():
    # Drawing 22 positives out of 22 with replacement, the number found is binomial with probability 20/22.
    interval = evaluate.bootstrap(*article())["recall"]
    assert interval == pytest.approx(binom.ppf([0.025, 0.975], 22, 20 / 22) / 22, abs=1e-9)


def test_the_bootstrap_is_seeded_and_keeps_the_size_of_each_class():
    labels, probabilities = np.array([0] * 2 + [1] * 28), np.linspace(0.1, 0.9, 30)
    probabilities = np.stack([1 - probabilities, probabilities], 1)
    first = evaluate.bootstrap(labels, probabilities, n=300)
    assert first == evaluate.bootstrap(labels, probabilities, n=300)
    assert first["brier"] != evaluate.bootstrap(labels, probabilities, n=300, seed=1)["brier"]
    # 7 % of resamples that ignored the classes would hold no negative and leave these undefined.
    assert np.isfinite(first["balanced_accuracy"]).all() and np.isfinite(first["roc_auc"]).all()


def test_what_is_undefined_is_called_undefined_and_not_zero(tmp_path):
    labels, probabilities = np.array([0, 0, 1]), np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])
    result = evaluate.judge(labels, probabilities, ["a", "b"])
    values = values_in(evaluate.table_of(result))
    assert values["precision"] == "undefined" and values["recall"] == "0.000"
    write_json(tmp_path / "metrics.json", result)
    assert json.loads((tmp_path / "metrics.json").read_text())["metrics"]["precision"] == dict.fromkeys(
        ("value", "low", "high")
    )
    only = values_in(evaluate.table_of(evaluate.judge(labels[:2], probabilities[:2], ["a", "b"])))
    assert only["recall"] == only["ROC AUC"] == only["balanced accuracy"] == "undefined" and only["accuracy"] == "1.000"


def test_three_classes_are_averaged_and_their_confusion_matrix_printed():
    labels = np.array([0, 0, 0, 0, 1, 1, 2, 2])
    called = np.array([0, 0, 0, 1, 1, 2, 2, 2])
    result = evaluate.judge(labels, np.eye(3)[called] * 0.7 + 0.1, ["a", "b", "c"])
    values = values_in(evaluate.table_of(result))
    assert (
        values["recall"] == f"{(3 / 4 + 1 / 2 + 1) / 3:.3f}" and values["precision"] == f"{(1 + 1 / 2 + 2 / 3) / 3:.3f}"
    )
    lines = evaluate.table_of(result).splitlines()
    assert [line.split() for line in lines[1:5]] == [
        ["a", "b", "c"],
        ["a", "3", "1", "0"],
        ["b", "0", "1", "1"],
        ["c", "0", "0", "2"],
    ]


def test_the_area_under_the_drawn_roc_curve_is_the_auc_ties_included():
    rng = np.random.default_rng(0)
    labels, score = rng.integers(0, 2, 60), rng.integers(0, 8, 60) / 8
    x, y = evaluate.roc_curve(labels == 1, score)
    wins = (score[labels == 1][:, None] > score[labels == 0]) + 0.5 * (
        score[labels == 1][:, None] == score[labels == 0]
    )
    assert np.trapezoid(y, x) == pytest.approx(wins.mean())


def test_reliability_counts_every_picture_once():
    points = evaluate.reliability(np.array([False, False, True, True]), np.array([0.05, 0.15, 0.95, 1.0]), 5)
    assert [(round(float(m), 3), float(s), n) for m, s, n in points] == [(0.1, 0.0, 2), (0.975, 1.0, 2)]


# ---------------------------------------------------------------- one run


def test_a_run_on_its_test_split(two, pixels, capsys):
    evaluate.evaluate(pixels)
    printed = capsys.readouterr().out
    assert "no network" in printed and "control is called where its probability is 0.5 or more" in printed
    rows = rows_of(pixels / "predictions.csv")
    assert {row["sample_name"] for row in rows} == {
        f"{name}{k:02d}" for name in ("case", "control") for k in range(8, 13)
    }
    result = json.loads((pixels / "metrics.json").read_text())
    right = sum((float(row["probability_control"]) >= 0.5) == (row["phenotype"] == "control") for row in rows)
    assert right == sum(row["right"] == "yes" for row in rows) == result["tp"] + result["tn"]
    assert result["metrics"]["accuracy"]["value"] == right / 10 and result["positive"] == "control"
    for name in ("confusion", "roc", "calibration", "prediction_matrix"):
        with Image.open(pixels / f"{name}.png") as image:
            assert image.format == "PNG" and min(image.size) > 400
    before = (pixels / "metrics.json").read_bytes()
    evaluate.evaluate(pixels, split="val")
    assert json.loads((pixels / "val/metrics.json").read_text())["split"] == "val"
    assert (pixels / "metrics.json").read_bytes() == before


def test_a_run_of_train_py_is_judged_and_tabled(run, demo, tmp_path, capsys):
    evaluate.evaluate(run, out=tmp_path)
    assert "test_resnet on demo, test split" in capsys.readouterr().out
    assert len(rows_of(tmp_path / "predictions.csv")) == len(list(demo.glob("test/*/*.png")))
    assert evaluate.compare([run], tmp_path) == 0
    (row,) = rows_of(tmp_path / "comparison.csv")
    best = json.loads((run / "config.json").read_text())["best"]
    assert all(float(row[name]) == pytest.approx(best[name]) for name in ("val_loss", "val_accuracy", "train_loss"))
    assert row["notes"] == "random initialisation" and float(row["parameters_millions"]) == pytest.approx(
        0.37, abs=0.01
    )


def test_random_initialisation_and_shuffled_labels_are_in_every_title(two, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "RESAMPLES", 50)
    run, titles = make_run(tmp_path / "run", two[0], "test_resnet", shuffle_labels=True), []
    figure = evaluate.figure
    monkeypatch.setattr(
        evaluate, "figure", lambda path, title, *a, **kw: titles.append(title) or figure(path, title, *a, **kw)
    )
    evaluate.evaluate(run)
    printed = capsys.readouterr().out
    assert len(titles) == 4
    for text in [printed, *titles]:
        assert "random initialisation" in text and "trained on shuffled labels" in text


def test_three_phenotypes_from_pictures_to_figures(three, capsys):
    evaluate.evaluate(three[1])
    assert "rows: true, columns: called" in capsys.readouterr().out
    assert len(rows_of(three[1] / "predictions.csv")) == 15 and (three[1] / "roc.png").exists()
    with pytest.raises(Problem, match="two classes"):
        evaluate.evaluate(three[1], threshold="val")


def test_the_best_threshold_lies_between_the_scores_it_separates():
    p = np.array([0.1, 0.2, 0.3, 0.35, 0.6])
    threshold = evaluate.best_threshold(np.array([0, 0, 0, 1, 1]), np.stack([1 - p, p], 1))
    assert threshold == pytest.approx(0.325)


@pytest.mark.usefixtures("without_figures")
def test_the_threshold_comes_from_the_validation_split_whatever_the_test_pictures_say(two, pixels, tmp_path, capsys):
    evaluate.evaluate(pixels, threshold="val")
    printed = capsys.readouterr().out
    chosen = json.loads((pixels / "metrics.json").read_text())
    assert "validation split" in chosen["threshold_from"] and "validation split" in printed
    evaluate.evaluate(pixels, split="val")
    rows = rows_of(pixels / "val/predictions.csv")
    p = np.array([float(row["probability_control"]) for row in rows])
    labels = np.array([row["phenotype"] == "control" for row in rows]).astype(int)
    assert chosen["threshold"] == pytest.approx(evaluate.best_threshold(labels, np.stack([1 - p, p], 1)), abs=1e-6)
    # The same pictures with every test phenotype exchanged: the threshold stays.
    other = Path(shutil.copytree(two[0], tmp_path / two[0].name))
    (other / "test/case").rename(other / "test/x")
    (other / "test/control").rename(other / "test/case")
    (other / "test/x").rename(other / "test/control")
    evaluate.evaluate(pixels, data=other, threshold="val", out=tmp_path / "out")
    exchanged = json.loads((tmp_path / "out/metrics.json").read_text())
    assert exchanged["threshold"] == chosen["threshold"] and exchanged["tp"] != chosen["tp"]
    with pytest.raises(Problem, match="choose and judge on the same pictures"):
        evaluate.evaluate(pixels, split="val", threshold="val")


def test_a_fold_is_not_judged_on_what_it_has_seen(two, tmp_path):
    run = make_run(tmp_path / "run", two[0], fold=2)
    for arguments in ({"split": "val"}, {"threshold": "val"}):
        with pytest.raises(Problem, match="fold 2 .* has seen most of val"):
            evaluate.evaluate(run, **arguments)


# ---------------------------------------------------------------- another data set


@pytest.mark.usefixtures("without_figures")
def test_another_data_set_gets_its_own_folder(two, pixels, tmp_path):
    other = Path(shutil.copytree(two[0], tmp_path / "hospital"))
    evaluate.evaluate(pixels, data=other)
    assert (pixels / "hospital-test/metrics.json").exists() and not (pixels / "metrics.json").exists()


def test_other_axes_and_other_classes_are_refused_with_the_reason(two, three, pixels, tmp_path):
    with pytest.raises(Problem, match="phenotype other is none of the run's classes"):
        evaluate.evaluate(pixels, data=three[0])
    coarse = make_data(tmp_path / "coarse", ["case", "control"], bins=12)
    with pytest.raises(Problem, match=r"bins is \(12, 12\), not \(16, 16\)"):
        evaluate.evaluate(pixels, data=coarse)


@pytest.mark.usefixtures("without_figures")
def test_a_data_set_that_has_moved_is_asked_for_and_then_taken_for_the_same(two, tmp_path):
    away = Path(shutil.copytree(two[0], tmp_path / "before/cohort"))
    run = make_run(tmp_path / "run", away)
    shutil.move(away, tmp_path / "cohort")
    with pytest.raises(Problem, match="--data"):
        evaluate.evaluate(run)
    evaluate.evaluate(run, data=tmp_path / "cohort")
    assert (run / "metrics.json").exists()


# ---------------------------------------------------------------- new raw runs


@pytest.mark.usefixtures("without_figures")
def test_a_raw_run_gives_what_its_picture_gives_and_a_bad_one_costs_no_other(two, pixels, tmp_path, capsys):
    data = two[0]
    evaluate.evaluate(pixels)
    expected = {row["sample_name"]: row for row in rows_of(pixels / "predictions.csv")}
    good = [data.parent / f"raw/{name}.mzML" for name in sorted(expected)]
    (tmp_path / "empty.mzML").touch()
    short = tmp_path / "short.mzML"
    write_mzml(short, [(t, np.array([101.0, 499.0]), np.array([3.0, 2.0])) for t in np.linspace(0, 100, 10)])
    out = tmp_path / "new.csv"
    assert evaluate.predict_files(pixels, [good[0], tmp_path / "empty.mzML", *good[1:], short], out=out) == 1
    printed = capsys.readouterr()
    (line,) = [line for line in printed.err.splitlines() if "left out" in line]
    assert line.startswith("left out: empty.mzML: ") and "zero bytes" in line
    rows = {Path(row["file"]).stem: row for row in rows_of(out)}
    assert rows.keys() == {*expected, "short"}
    for name, row in expected.items():
        for column in ("probability_case", "probability_control"):
            assert float(rows[name][column]) == pytest.approx(float(row[column]), abs=1e-6)
        assert rows[name]["called"] == row["called"] and rows[name]["warning"] == ""
        assert name in printed.out
    assert "total intensity" in rows["short"]["warning"] and "last peak at 1.67 min" in rows["short"]["warning"]

    content = out.read_bytes()
    with pytest.raises(Problem, match="exists already"):
        evaluate.predict_files(pixels, good[:1], out=out)
    assert out.read_bytes() == content


def test_only_what_lies_far_from_the_training_cohort_is_warned_of():
    rng = np.random.default_rng(0)
    cohort = {"total_intensity": list(1e8 * rng.lognormal(0, 0.1, 50)), "outside": [0.0] * 50, "rt_first": [0.1] * 50}
    cohort |= {"rt_last": [10.0] * 50, "mz_low": [100.0] * 50, "mz_high": [900.0] * 50}
    usual = {
        "total_intensity": 1e8,
        "outside": 0.01,
        "rt_first": 0.2,
        "rt_last": 9.9,
        "mz_low": 101.0,
        "mz_high": 880.0,
    }
    assert evaluate.warnings_of(usual, cohort) == ""
    assert evaluate.warnings_of(usual | {"total_intensity": 2e8}, cohort) == ""
    for name, value, word in (
        ("total_intensity", 1e7, "total intensity 1e+07"),
        ("total_intensity", 1e9, "total intensity"),
        ("total_intensity", 0.0, "total intensity"),
        ("outside", 0.2, "20.0% of the intensity"),
        ("rt_first", 2.0, "first peak at 2.00 min"),
        ("rt_last", 6.0, "last peak at 6.00 min (training median 10.00 min)"),
        ("mz_low", 300.0, "lowest peak at m/z 300.00"),
        ("mz_high", 1500.0, "highest peak at m/z 1500.00"),
    ):
        assert evaluate.warnings_of(usual | {name: value}, cohort).startswith(word)
    assert evaluate.warnings_of(usual | {"rt_last": 6.0}, {name: [] for name in cohort}) == ""


# ---------------------------------------------------------------- many runs


def table_run(root, backbone, seed, val_loss, data_set="golestan", f1=0.9, **config):
    """A run folder with what a comparison reads: config.json and epochs.csv of three epochs, the second one best."""
    run = root / data_set / backbone / f"seed{seed}{config.pop('suffix', '')}"
    run.mkdir(parents=True)
    (run / "best.pt").touch()
    settings = {"seed": seed, "data": data_set, "lr": "auto", "optimizer": config.get("optimizer", "adamax")}
    basics = {"backbone": backbone, "data": data_set, "data_set": data_set, "seed": seed, "fold": None, "grid": 1}
    basics |= {
        "weights_origin": "ImageNet (timm)",
        "shuffle_labels": False,
        "parameters": 8_100_000,
        "status": "finished",
    }
    write_json(run / "config.json", basics | {"seconds": 30.0, "settings": settings} | config)
    lines = ["epoch,train_loss,val_loss,val_accuracy,val_precision,val_recall,val_f1,val_roc_auc,lr,seconds"]
    for epoch, worse in ((1, 0.5), (2, 0.0), (3, 0.2)):
        lines.append(f"{epoch},{0.4 - epoch / 10},{val_loss + worse},{f1 - worse},0.8,0.7,{f1 - worse},0.9,0.01,10")
    (run / "epochs.csv").write_text("\n".join(lines))
    return run


def test_a_comparison_has_the_columns_of_the_article_sorted_by_validation_loss(tmp_path, capsys):
    table_run(tmp_path, "resnet18", 1, 0.4)
    table_run(tmp_path, "mobileone_s3", 1, 0.26, f1=0.95)
    table_run(tmp_path, "pixels", 1, 0.3, weights_origin="random initialisation")
    table_run(tmp_path, "convnext_nano", 1, 0.35, weights_origin="random initialisation", status=None)
    table_run(tmp_path, "vgg11", 1, 0.69, shuffle_labels=True)
    broken = table_run(tmp_path, "broken", 1, 0.1)
    (broken / "epochs.csv").write_text("epoch,train_loss,val_loss\n1,0.2,nan\n")
    assert evaluate.compare(evaluate.runs_below([tmp_path])) == 1
    captured = capsys.readouterr()
    assert captured.err.count("left out") == 1 and "broken" in captured.err
    rows = rows_of(tmp_path / "golestan/comparison.csv")
    assert [row["backbone"] for row in rows] == ["mobileone_s3", "pixels", "convnext_nano", "resnet18", "vgg11"]
    best = rows[0]
    assert [float(best[c]) for c in ("parameters_millions", "best_epoch", "val_loss", "val_f1", "seconds")] == [
        8.1,
        2,
        0.26,
        0.95,
        30,
    ]
    assert float(best["train_loss"]) == pytest.approx(0.2)  # of the best epoch, not of the last
    notes = {row["backbone"]: row["notes"] for row in rows}
    assert notes["mobileone_s3"] == "" and notes["pixels"] == "no network, pixels only"
    assert notes["convnext_nano"] == "random initialisation, unfinished" and "shuffled" in notes["vgg11"]
    text = (tmp_path / "golestan/comparison.md").read_text()
    assert text.splitlines()[0] == "# 5 runs on golestan; random initialisation where marked"
    header = next(line for line in text.splitlines() if line.startswith("| backbone"))
    assert [cell.strip() for cell in header.strip("|").split("|")][:10] == [
        *("backbone", "parameters (M)", "best epoch", "train loss", "validation loss"),
        *("accuracy", "F1", "precision", "recall", "time (s)"),
    ]
    assert "Kruskal" not in text  # no replicates, no tests


LOSSES = {
    "mobileone_s3": [0.26, 0.31, 0.29, 0.33, 0.27],
    "resnet18": [0.35, 0.33, 0.41, 0.38, 0.33],
    "vgg11": [0.44, 0.39, 0.33, 0.52, 0.47],
    "pixels": [0.26, 0.30, 0.52],
}
# scikit-posthocs 0.17.1 (SciPy 1.17.1) on LOSSES, which have ties: posthoc_dunn(groups), and with p_adjust="fdr_bh".
DUNN = [0.06463730251, 0.005087507807, 0.380197657539, 0.340244760374, 0.469880472169, 0.121481232924]
DUNN_ADJUSTED = [0.193911907529, 0.030525046843, 0.456237189046, 0.456237189046, 0.469880472169, 0.242962465848]


def test_dunns_p_values_are_those_of_scikit_posthocs():
    found = evaluate.dunn([np.array(values) for values in LOSSES.values()])
    assert [p for *_, p in found] == pytest.approx(DUNN, abs=1e-10)
    same = {name: 0.9 for name in evaluate.COMPARED}
    overall, pairs = evaluate.tests_of({k: [same | {"val_loss": v} for v in values] for k, values in LOSSES.items()})
    assert [pair["p_adjusted"] for pair in pairs] == pytest.approx(DUNN_ADJUSTED, abs=1e-10)
    assert {pair["metric"] for pair in pairs} == {"val_loss"}  # nothing can be said of metrics that never differ
    assert overall["val_loss"] == pytest.approx((8.402298850574708, 0.03838948028589229))  # scipy.stats.kruskal


def test_replicates_are_runs_that_differ_in_the_seed_alone(tmp_path, capsys):
    for backbone, losses in LOSSES.items():
        for seed, loss in enumerate(losses):
            table_run(tmp_path, backbone, seed, loss)
    for seed in (0, 1):
        table_run(tmp_path, "resnet18", seed, 0.5, suffix="-2", optimizer="rmsprop")
        table_run(tmp_path, "resnet18", seed, 0.69, suffix="-3", shuffle_labels=True)
    table_run(tmp_path, "once", 0, 0.2)
    again = table_run(tmp_path, "vgg11", 0, 0.45, suffix="-2")  # the same training once more is no sixth replicate
    os.utime(again / "epochs.csv", (2e9, 2e9))
    assert evaluate.compare(evaluate.runs_below([tmp_path])) == 0
    rows = {row["replicates_of"]: row for row in rows_of(tmp_path / "golestan/replicates.csv")}
    assert {label: int(row["runs"]) for label, row in rows.items()} == {
        "mobileone_s3": 5,
        "pixels (no network, pixels only)": 3,
        "resnet18, optimizer adamax": 5,
        "resnet18, optimizer rmsprop": 2,
        "resnet18, optimizer adamax (trained on shuffled labels)": 2,
        "vgg11": 5,
    }
    assert float(rows["mobileone_s3"]["val_loss_median"]) == pytest.approx(0.29)
    assert float(rows["mobileone_s3"]["val_loss_deviation"]) == pytest.approx(np.std(LOSSES["mobileone_s3"], ddof=1))
    assert float(rows["vgg11"]["val_loss_median"]) == pytest.approx(0.45)  # 0.33 0.39 0.45 0.47 0.52: the newest counts
    pairs = rows_of(tmp_path / "golestan/dunn.csv")
    assert not any("shuffled" in pair["first"] + pair["second"] for pair in pairs)  # a control is not a contender
    assert (tmp_path / "golestan/replicates.png").exists() and "Kruskal-Wallis" in capsys.readouterr().out


def test_one_backbone_on_several_data_sets_is_compared_by_data_set(tmp_path):
    for data_set, shift in (("bins500", 0.0), ("bins1000", 0.1), ("bins500_copies", -0.1)):
        for seed in range(3):
            table_run(tmp_path, "mobileone_s3", seed, 0.3 + shift + seed / 100, data_set)
    evaluate.compare(evaluate.runs_below([tmp_path]))
    labels = [row["replicates_of"] for row in rows_of(tmp_path / "replicates.csv")]
    assert labels == ["bins500_copies", "bins500", "bins1000"]
    assert "data set" in (tmp_path / "comparison.md").read_text()


# ---------------------------------------------------------------- command line


def test_without_a_name_the_newest_run_is_judged(two, tmp_path):
    (tmp_path / "runs").mkdir()
    for name, age in (("old", 1e9), ("new", 2e9)):
        shutil.copytree(two[1], tmp_path / "runs" / name)
        os.utime(tmp_path / "runs" / name / "best.pt", (age, age))
    done = call(cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/new/metrics.json").exists() and not (tmp_path / "runs/old/metrics.json").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["old", "new", "--predict", "x.mzML"], "--predict takes one run"),
        (["old", "new", "--data", "x"], "--data takes one run"),
        (["old", "new", "--split", "val"], "--split and --threshold take one run"),
        (["old", "--threshold", "high"], "--threshold: high must be a number from 0 to 1, or val"),
        (["old", "--threshold", "1.5"], "--threshold: 1.5"),
        (["nowhere"], "no best.pt"),
        (["old", "--data", "nowhere"], "nowhere: no such data set"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(two, tmp_path, monkeypatch, capsys, arguments, reason):
    for name in ("old", "new"):
        shutil.copytree(two[1], tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        run_script(evaluate.main)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and reason in error
