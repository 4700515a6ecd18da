"""Tests of evaluate.py: correct results, and errors for input that would make them wrong."""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TINY, call, run
from demo import write_mzml
from matplotlib.figure import Figure
from PIL import Image

import deeplcms
import evaluate
from deeplcms import write_json


def make_article_predictions():
    """Labels and logits with the article's counts: TP 20, TN 7, FN 2, FP 1."""
    return np.array([1] * 22 + [0] * 8), np.array([2.0] * 20 + [-1.0] * 2 + [-2.0] * 7 + [1.0])[:, None]


# ---------------------------------------------------------------- metrics


def test_intervals_are_wilsons_or_of_resampled_groups_and_small_classes_have_none():
    labels, logits = make_article_predictions()
    table = evaluate.compute_intervals(labels, logits, np.arange(30))
    assert table["value"].round(3)[["accuracy", "precision", "recall", "f1"]].tolist() == [0.9, 0.952, 0.909, 0.93]
    assert table["value"]["specificity"] == 7 / 8
    assert table[["low", "high"]].isna().all(axis=None)  # eight negatives are too few
    labels, logits, alone = np.repeat(labels, 2), np.repeat(logits, 2, axis=0), np.arange(60)
    table = evaluate.compute_intervals(labels, logits, alone)
    # Wilson's intervals: 54 of 60, 40 of 44, 14 of 16 (Wilson 1927)
    expected = {"accuracy": (0.79853, 0.95336), "recall": (0.78837, 0.96411), "specificity": (0.63981, 0.96502)}
    for name, interval in expected.items():
        assert table.loc[name, ["low", "high"]].tolist() == pytest.approx(list(interval), abs=1e-4)
    assert table.equals(evaluate.compute_intervals(labels, logits, alone))
    # Five pictures of each person are resampled together and have as much information as one.
    of_pictures = table.loc["balanced_accuracy", "high"] - table.loc["balanced_accuracy", "low"]
    many = np.repeat(labels, 5), np.repeat(logits, 5, axis=0)
    person_interval = evaluate.compute_intervals(*many, np.repeat(alone, 5)).loc["balanced_accuracy"]
    assert person_interval["high"] - person_interval["low"] == pytest.approx(of_pictures, rel=0.1)
    perfect = evaluate.compute_intervals(labels, np.where(labels, 9.0, -9.0)[:, None], alone)
    assert perfect.loc["recall", "low"] == pytest.approx(44 / (44 + 1.95996**2)) and perfect["high"]["recall"] == 1
    # All resamples of a perfect classifier are perfect, so they give no interval.
    assert perfect["value"]["roc_auc"] == 1 and perfect.loc[["roc_auc", "f1"], ["low", "high"]].isna().all(axis=None)


def test_all_pictures_of_a_person_are_resampled_together():
    """The level of a person affects both pictures, so the AUC varies less than between strangers."""
    rng = np.random.default_rng(0)
    own, error = rng.normal(size=(30, 1)), 0.1 * rng.normal(size=(30, 2))
    logits = (own + [-0.5, 0.5] + error).reshape(-1, 1)  # before, after, before, ...
    labels, person = np.tile([0, 1], 30), np.repeat(np.arange(30), 2)
    whole = evaluate.compute_intervals(labels, logits, person).loc["roc_auc"]
    strangers = evaluate.compute_intervals(labels, logits, np.arange(60)).loc["roc_auc"]
    assert whole["low"] < whole["value"] < whole["high"]
    assert whole["high"] - whole["low"] < 0.7 * (strangers["high"] - strangers["low"])
    nine = evaluate.compute_intervals(labels[:18], logits[:18], person[:18])
    assert nine[["low", "high"]].isna().all(axis=None)


def make_pictures_table(phenotype, **columns):
    """Table of pictures as find_pictures returns it: all columns are text."""
    names = [f"s{i}" for i in range(len(phenotype))]
    pictures = pd.DataFrame({"sample_name": names, "group": names, "phenotype": phenotype, "status": "ok"})
    return pictures.assign(**{name: np.asarray(column).astype(str) for name, column in columns.items()})


def test_columns_that_separate_the_classes_are_flagged_as_confounders():
    rng = np.random.default_rng(0)
    label = np.repeat([0, 1], 20)
    pictures = make_pictures_table(
        np.where(label, "user", "control"),
        total_intensity=rng.lognormal(10, 1, 40),
        start_time=[f"2026-11-{3 + 10 * k:02d} 10:{i:02d}:00" for i, k in enumerate(label)],
        batch=np.where(label, "second", "first"),
        column=["new", "old"] * 20,
        note=[f"remark {i}" for i in range(40)],
        constant="1",
    )
    table, not_tested = evaluate.find_confounders(pictures)
    assert set(table.index) == {"total_intensity", "start_time", "batch", "column"}
    assert not_tested == {"note": "40 names, 40 groups"}
    assert evaluate.flag_confounders(table) == ["start_time", "batch"]
    assert table["auc"].round(2)[["start_time", "batch", "column"]].tolist() == [0.98, 1, 0.5]


def test_confounders_are_flagged_for_any_order_of_their_values():
    """Cases were measured in the middle: neither alphabetical order nor rank separates them from the controls."""
    rng = np.random.default_rng(0)
    case = np.repeat([False, True, False], 20)
    plate = 2 * rng.integers(0, 6, 60) + case
    pictures = make_pictures_table(
        np.where(case, "case", "control"),
        batch=np.repeat(["A", "B", "C"], 20),
        number=np.repeat([1, 2, 3], 20),
        day=np.repeat(["2026-11-03", "2026-11-04", "2026-11-05"], 20),
        injection_order=range(60),
        plate=[f"plate {k}" for k in plate],
        operator=np.where(case, "x", rng.choice(["y", ""], 60)),  # "": unknown
    )
    table, _ = evaluate.find_confounders(pictures)
    assert set(evaluate.flag_confounders(table)) == {"batch", "number", "day", "injection_order", "plate", "operator"}
    assert (table["auc"].drop("injection_order") == 1).all() and table["auc"]["injection_order"] > 0.9
    # With three phenotypes the AUC is that of the best separated one.
    three, _ = evaluate.find_confounders(pictures.assign(phenotype=np.where(case, "case", np.tile(["a", "b"], 30))))
    assert three["auc"]["batch"] == 1 and "batch" in evaluate.flag_confounders(three)


def test_confounders_with_numbers_and_dates_of_spreadsheets_are_read():
    case = np.repeat([False, True], 20)
    pictures = make_pictures_table(
        np.where(case, "case", "control"),
        day=[f"{d:02d}.10.2023" for d in range(1, 21)] + [f"{d:02d}.11.2023" for d in range(1, 21)],
        us_day=[f"10/{d:02d}/2023" for d in range(1, 21)] + [f"11/{d:02d}/2023" for d in range(1, 21)],
        weight=[f"{45 + i},7" for i in range(40)],
        plate=["1", "2"] * 10 + ["3a", "3b"] * 10,
        dose=[str(i) for i in range(39)] + ["none"],
    )
    table, not_tested = evaluate.find_confounders(pictures)
    assert set(evaluate.flag_confounders(table)) == {"day", "us_day", "weight", "plate", "dose"}
    assert not_tested == {"dose": "1 values that are not numbers"}


def test_names_of_people_are_no_confounder_and_repeated_injections_count_once():
    rng = np.random.default_rng(0)
    person = np.repeat(np.arange(24), 5)
    person_of, site = [f"p{k}" for k in person], rng.permutation(np.repeat(["a", "b", "c"], 8))
    pictures = make_pictures_table(np.where(person % 2, "case", "control"), person=person_of, site=site[person])
    together, not_tested = evaluate.find_confounders(pictures.assign(group=person_of))
    assert list(together.index) == ["site"]  # each person has a unique name
    assert not_tested == {"person": "24 names, 24 groups"}
    alone, _ = evaluate.find_confounders(pictures.drop_duplicates("person"))
    pd.testing.assert_frame_equal(together, alone)  # five injections of a person count as one


@pytest.mark.parametrize("n", [40, 298])
def test_fewer_than_6_percent_of_random_cohorts_have_a_flagged_column(n):
    rng = np.random.default_rng(0)
    flagged = []
    for _ in range(60):
        phenotype = rng.permutation(["case"] * (n // 2) + ["control"] * (n - n // 2))
        numbers = {f"number{i}": rng.normal(size=n) for i in range(4)}
        names = {f"names{k}": rng.integers(0, k, n).astype(str) + "x" for k in (2, 4, 12)}
        flagged.append(
            bool(
                evaluate.flag_confounders(
                    evaluate.find_confounders(make_pictures_table(phenotype, **numbers, **names))[0]
                )
            )
        )
    assert np.mean(flagged) < 0.06


@pytest.fixture()
def figures(monkeypatch):
    """{file name: (title, axes)} of the figures that are drawn."""
    drawn, figure = {}, evaluate.figure

    @contextmanager
    def recording(path, title, *arguments, **options):
        with figure(path, title, *arguments, **options) as axes:
            yield axes
        drawn[path.name] = title, np.ravel(axes)

    monkeypatch.setattr(evaluate, "figure", recording)
    return drawn


def test_the_area_under_the_drawn_roc_curve_with_ties_equals_the_auc():
    rng = np.random.default_rng(0)
    labels, score = rng.integers(0, 2, 60), rng.integers(1, 9, 60) / 9
    probabilities = np.stack([1 - score, score], axis=1)
    metrics = evaluate.compute_intervals(labels, np.log(probabilities), np.arange(60))
    predictions = pd.DataFrame(probabilities, columns=["probability_no", "probability_yes"])
    predictions["phenotype"] = np.where(labels, "yes", "no")
    both, cases = Figure().subplots(ncols=2)
    evaluate.draw_roc(both, predictions, ["yes"], metrics)
    lines = {line.get_label(): line.get_xydata() for line in both.lines}
    assert np.trapezoid(lines[" yes"][:, 1], lines[" yes"][:, 0]) == pytest.approx(metrics["value"]["roc_auc"])
    assert lines[" yes"][[0, -1]].tolist() == [[0, 0], [1, 1]]
    assert np.isclose(lines["threshold"], lines[" yes"]).all(axis=1).any()  # the threshold is on the curve
    evaluate.draw_roc(cases, predictions[labels == 1], ["yes"], metrics)
    assert [line.get_label() for line in cases.lines] == ["chance", "threshold"]  # one class alone has no curve


def test_every_picture_is_in_one_bin_of_the_calibration_plot():
    table = pd.DataFrame({"probability_b": [0.05, 0.15, 0.95, 1.0, 0.9], "phenotype": list("aabba")})
    ax = Figure().subplots()
    evaluate.draw_calibration(ax, table, ["b"])
    dots = [line.get_xydata()[0].round(3).tolist() for line in ax.lines if line.get_marker() == "o"]
    assert dots == [[0.1, 0.0], [0.95, 0.667]]
    assert [text.get_text().strip() for text in ax.texts] == ["2", "3"]
    limits = ax.lines[3].get_ydata()  # Wilson's for 2 of 3 (Newcombe 1998)
    assert limits.tolist() == pytest.approx([0.2077, 0.9385], abs=1e-4)


# ---------------------------------------------------------------- one run


def read_results(folder):
    return json.loads((folder / "metrics.json").read_text()), pd.read_csv(folder / "predictions.csv")


def test_evaluation_writes_metrics_predictions_and_figures_of_the_test_split(two, capsys):
    data, folder = two
    assert run("evaluate.py", folder, cwd=data.parent) == (0, "")
    printed = capsys.readouterr().out
    assert "no network" in printed and "user is predicted where its probability is 0.5 or more" in printed
    result, table = read_results(folder)
    assert set(table["sample_name"]) == {f"{name}{k}" for name in ("user", "non-user") for k in range(32, 37)}
    right = ((table["probability_user"] >= 0.5) == (table["phenotype"] == "user")).sum()
    assert right == (table["correct"] == "yes").sum() == result["tp"] + result["tn"] >= 9
    assert result["metrics"]["accuracy"]["value"] == right / 10
    for name in ("test", "prediction_matrix"):
        with Image.open(folder / f"{name}.png") as image:
            assert image.format == "PNG" and min(image.size) > 400


def test_validation_pictures_that_only_chose_the_epoch_may_be_evaluated(trained):
    assert run("evaluate.py", trained, cwd=trained) == (0, "")
    before = (trained / "metrics.json").read_bytes()
    assert run("evaluate.py", trained, "--split", "val", cwd=trained) == (0, "")
    assert read_results(trained / "val")[0]["split"] == "val" and (trained / "metrics.json").read_bytes() == before


def test_training_pictures_are_refused_and_another_data_set_has_its_own_output_folder(two, three, tmp_path):
    data, folder = two
    copied = Path(shutil.copytree(folder, tmp_path / "run"))
    assert run("evaluate.py", copied, cwd=tmp_path) == (0, "")
    own = (copied / "metrics.json").read_bytes()
    renamed = Path(shutil.copytree(data, tmp_path / "renamed"))
    status, line = run("evaluate.py", copied, "--data", renamed, "--split", "train", cwd=tmp_path)
    assert status == 1 and "the run was fitted to 48 of these 48 pictures" in line
    assert run("evaluate.py", copied, "--data", renamed, cwd=tmp_path) == (0, "")  # the same pictures in another folder
    assert (copied / "metrics.json").exists() and not list(copied.glob("renamed*"))
    other = Path(shutil.copytree(three[0], tmp_path / "elsewhere/data"))  # another cohort, the same folder name
    for split in ("train", "val", "test"):
        shutil.rmtree(other / split / "c")
    table = pd.read_csv(other / "samples.csv")
    table[table["phenotype"] != "c"].to_csv(other / "samples.csv", index=False)
    for old, new in (("a", "non-user"), ("b", "user")):
        for path in list(other.glob(f"*/{old}")):
            path.rename(path.with_name(new))
    (copied / "metrics.json").write_bytes(own)
    assert run("evaluate.py", copied, "--data", other, cwd=tmp_path) == (0, "")
    assert (copied / "metrics.json").read_bytes() == own and len(list(copied.glob("data-*-test/metrics.json"))) == 1


def test_confounders_are_tested_in_all_splits_of_the_data_set(two, tmp_path, capsys):
    """Users were measured late in training and validation; the test split has as many late as early ones."""
    data, folder = two
    other = Path(shutil.copytree(data, tmp_path / "data"))
    table = pd.read_csv(other / "samples.csv")
    user = table["phenotype"] == "user"
    late = np.where(table["split"] == "test", table.index % 2 == 0, user)
    table["batch"] = np.where(late, "late", "early")
    table.to_csv(other / "samples.csv", index=False)
    batch = {}
    for splits in ("all", "test alone"):
        assert run("evaluate.py", folder, "--data", other, "--out", "out", cwd=tmp_path) == (0, "")
        result = read_results(tmp_path / "out")[0]
        batch[splits] = "batch" in result["flagged"]
        assert "rt_shift" in result["confounders"] and "age" in result["confounders"]
        for split in ("train", "val"):
            shutil.rmtree(other / split, ignore_errors=True)
    assert batch == {"all": True, "test alone": False}
    assert "of all 74 pictures" in capsys.readouterr().out


def test_a_run_of_three_phenotypes_is_evaluated(three, capsys):
    assert run("evaluate.py", three[1], cwd=three[0].parent) == (0, "")
    result, table = read_results(three[1])
    assert "the most probable class is predicted" in capsys.readouterr().out and len(table) == 15
    assert np.sum(result["confusion"]) == 15 and np.trace(result["confusion"]) >= 10


def test_cautions_are_in_every_title_and_test_png_has_three_panels(two, tmp_path, figures, capsys):
    data = two[0]
    flags = ["--backbone", "test_resnet", "--data", data, *TINY, "--epochs", 1, "--shuffle-labels"]
    assert run("train.py", *flags, cwd=tmp_path) == (0, "")
    capsys.readouterr()
    assert run("evaluate.py", cwd=tmp_path) == (0, "")  # without RUN: the newest
    assert list(figures) == ["test.png", "prediction_matrix.png"]
    for text in [capsys.readouterr().out, *(title for title, _ in figures.values())]:
        assert "random initialisation" in text and "trained on shuffled labels" in text
    panels = [ax.get_xlabel() for ax in figures["test.png"][1]]
    assert panels == ["predicted", "false positive rate", "predicted probability of user"]


def test_the_folder_of_a_picture_is_its_true_phenotype(two, tmp_path):
    data, folder = two
    other = Path(shutil.copytree(data, tmp_path / "data"))  # exchanges the phenotypes of all test pictures
    for old, new in (("user", "x"), ("non-user", "user"), ("x", "non-user")):
        (other / "test" / old).rename(other / "test" / new)
    counts = []
    for flags in ([], ["--data", other]):
        assert run("evaluate.py", folder, "--out", "out", *flags, cwd=tmp_path) == (0, "")
        result = read_results(tmp_path / "out")[0]
        counts.append([result[name] for name in ("tp", "fn", "fp", "tn")])
    tp, fn, fp, tn = counts[0]
    assert counts[1] == [fp, tn, tp, fn]


def test_a_fold_is_not_evaluated_on_pictures_that_it_was_fitted_to(two, tmp_path):
    flags = ["--backbone", "pixels", "--data", two[0], "--folds", 3, "--epochs", 1]
    assert run("train.py", *flags, cwd=tmp_path) == (0, "")
    fold = tmp_path / "runs/data/pixels/seed2643-fold1"
    status, line = run("evaluate.py", fold, "--split", "val", cwd=tmp_path)
    assert status == 1 and "the run was fitted to" in line
    assert run("evaluate.py", fold, cwd=tmp_path) == (0, "")


def test_other_axes_other_classes_and_missing_data_are_refused_with_the_reason(two, three, tmp_path):
    data, folder = two
    raw = data.parent / "raw"
    coarse = ["convert.py", raw, raw / "samples.csv", "coarse", "--rt-range", 1, 11, "--mz-range", 100, 900]
    assert run(*coarse, "--bins", 12, "--sigma", 1, "--normalize", "global", cwd=tmp_path) == (0, "")
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    for run_, flags, message in (
        (folder, ["--data", three[0]], "a, b, c: not among the run's classes, non-user, user"),
        (folder, ["--data", "coarse"], "bins is (12, 12), not (64, 64)"),
        (moved, ["--data", "nowhere"], "nowhere: no such data set"),
        ("nowhere", [], "nowhere: no best.pt"),
    ):
        status, line = run("evaluate.py", run_, *flags, cwd=tmp_path)
        assert status == 1 and message in line and "\n" not in line


# ---------------------------------------------------------------- an ensemble of several runs


@pytest.fixture(scope="session")
def folds(two, tmp_path_factory):
    """Folder of three folds, trained so briefly that they differ."""
    flags = ["--backbone", "pixels", "--data", two[0], "--folds", 3, "--epochs", 2, "--lr", 0.1, "--image-size", 64]
    folder = tmp_path_factory.mktemp("folds")
    assert run("train.py", *flags, cwd=folder) == (0, "")
    return folder / "runs/data/pixels"


def test_the_prediction_of_an_ensemble_is_the_mean_probability_of_its_folds(two, folds, tmp_path, capsys):
    members = []
    for k in range(3):
        assert run("evaluate.py", folds / f"seed2643-fold{k}", "--out", f"{k}", cwd=tmp_path) == (0, "")
        members.append(read_results(tmp_path / f"{k}")[1])
        assert "probability_std" not in members[k]
    each = np.array([member["probability_user"] for member in members])  # (member, picture)
    assert each.std(0).max() > 0.01
    capsys.readouterr()
    assert run("evaluate.py", folds, "--ensemble", "--threshold", 0.45, cwd=tmp_path) == (0, "")
    printed = capsys.readouterr().out
    assert "ensemble of 3; pixels on data, test split, 10 pictures; no network\n" in printed
    assert all(f"{folds}/seed2643-fold{k}, epoch" in printed for k in range(3))
    result, table = read_results(folds / "ensemble")
    assert table["sample_name"].equals(members[0]["sample_name"])
    assert table["probability_user"].to_numpy() == pytest.approx(each.mean(0), abs=1e-12)
    assert table["probability_std"].to_numpy() == pytest.approx(each.std(0), abs=1e-12)
    user = table["phenotype"] == "user"
    assert ((table["predicted"] == "user") == (each.mean(0) >= 0.45)).all()
    assert result["metrics"]["brier"]["value"] == pytest.approx(((each.mean(0) - user) ** 2).mean())
    assert result["tp"] == (each.mean(0)[user] >= 0.45).sum() and result["threshold"] == 0.45
    for name in ("test", "prediction_matrix"):
        assert (folds / f"ensemble/{name}.png").stat().st_size > 10_000


def test_probability_std_is_that_of_the_predicted_class():
    members = np.array([[[0.1, 0.2, 0.7], [0.5, 0.3, 0.2]], [[0.1, 0.4, 0.5], [0.4, 0.3, 0.3]]])
    table = evaluate.tabulate(members, ["a", "b", "c"], None)
    assert table["predicted"].tolist() == ["c", "a"]
    assert table[["probability_a", "probability_b", "probability_c"]].to_numpy() == pytest.approx(members.mean(0))
    assert table["probability_std"].tolist() == pytest.approx([0.1, 0.05])
    assert "probability_std" not in evaluate.tabulate(members[:1], ["a", "b", "c"], None)


def test_an_ensemble_with_a_fold_is_not_evaluated_on_train_or_val(two, folds, tmp_path):
    members = [two[1], folds / "seed2643-fold0", "--ensemble", "--out", "out"]
    for flags in (["--split", "val"], ["--split", "train", "--data", two[0]]):
        status, line = run("evaluate.py", *members, *flags, cwd=tmp_path)
        assert status == 1 and "the run was fitted to" in line and not (tmp_path / "out").exists()
    assert run("evaluate.py", *members, cwd=tmp_path) == (0, "")
    assert read_results(tmp_path / "out")[0]["title"].startswith(
        "ensemble of 2; pixels on data, test split, 10 pictures"
    )


def copy_and_change(source, folder, change):
    """Copy a run and apply change(checkpoint) to the copy."""
    shutil.copytree(source, folder)
    checkpoint = torch.load(folder / "best.pt", weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, folder / "best.pt")
    return folder


def test_an_ensemble_needs_the_same_data_set_axes_and_classes(two, tmp_path):
    data, folder = two
    for name, change, message in (
        ("classes", lambda c: c["config"]["classes"].reverse(), "its classes, or their order, differ"),
        ("axes", lambda c: c["recipe"].update(rt_max="12.0"), "its recipe is not that of the others"),
        ("data", lambda c: c["config"]["settings"].update(pictures=1), "its data set, or its split, differs"),
    ):
        other = copy_and_change(folder, tmp_path / name, change)
        for flags in (["--ensemble"], ["--predict", data.parent / "raw/user00.mzML"]):
            status, line = run("evaluate.py", folder, other, *flags, "--out", "out", cwd=tmp_path)
            assert status == 1 and f"{other}: {message}" in line and "\n" not in line
            assert not (tmp_path / "out").exists()


def test_a_missing_output_folder_is_refused_before_the_files_are_read(two, tmp_path):
    missing = tmp_path / "nowhere/new.csv"
    raw_file = two[0].parent / "raw/user00.mzML"
    status, line = run("evaluate.py", two[1], "--predict", raw_file, "--out", missing, cwd=tmp_path)
    assert status == 1 and f"--out {missing}: no such folder" in line and not missing.parent.exists()


def test_a_caution_about_one_run_is_in_the_title_of_the_ensemble(two, tmp_path, capsys):
    shuffled = copy_and_change(two[1], tmp_path / "x", lambda c: c["config"]["settings"].update(shuffle_labels=True))
    assert run("evaluate.py", two[1], shuffled, "--ensemble", "--out", "out", cwd=tmp_path) == (0, "")
    title = read_results(tmp_path / "out")[0]["title"]
    assert title.startswith("ensemble of 2; pixels on data")
    assert title.endswith("no network; trained on shuffled labels")


def test_an_ensemble_predicts_new_files_and_reads_each_once(two, folds, tmp_path, monkeypatch):
    files = [two[0].parent / f"raw/{name}.mzML" for name in ("user33", "non-user34")]
    read, make_picture = [], evaluate.make_picture
    for k in (0, 1):
        fold = folds / f"seed2643-fold{k}"
        assert run("evaluate.py", fold, "--predict", *files, "--out", f"{k}.csv", cwd=tmp_path) == (0, "")
    monkeypatch.setattr(evaluate, "make_picture", lambda *a: read.append(a[0]) or make_picture(*a))
    members = [folds / "seed2643-fold0", folds / "seed2643-fold1"]
    assert run("evaluate.py", *members, "--predict", *files, "--out", "both.csv", cwd=tmp_path) == (0, "")
    assert read == files
    first, second, both = (pd.read_csv(tmp_path / f"{name}.csv") for name in (0, 1, "both"))
    assert list(first) == ["file", "predicted", "probability_non-user", "probability_user", "rt_shift", "warning"]
    assert list(both) == [*list(first)[:4], "probability_std", "rt_shift", "warning"]
    each = np.array([first["probability_user"], second["probability_user"]])
    assert both["probability_user"].to_numpy() == pytest.approx(each.mean(0), abs=1e-12)
    assert both["probability_std"].to_numpy() == pytest.approx(abs(each[0] - each[1]) / 2, abs=1e-12)
    assert both["file"].tolist() == list(map(str, files))


# ---------------------------------------------------------------- new raw files


def test_a_raw_file_and_its_picture_have_the_same_prediction_and_a_bad_file_is_skipped(two, tmp_path):
    data, folder = two
    assert run("evaluate.py", folder, "--out", "out", cwd=tmp_path) == (0, "")
    expected = read_results(tmp_path / "out")[1].set_index("sample_name")
    (tmp_path / "empty.mzML").touch()
    short = [(t, np.array([101.0, 499.0]), np.array([0.3, 0.2])) for t in np.linspace(100, 300, 10)]
    write_mzml(tmp_path / "short.mzML", short)
    good = [data.parent / f"raw/{name}.mzML" for name in expected.index]
    files = [good[0], tmp_path / "empty.mzML", *good[1:], tmp_path / "short.mzML"]
    done = call("evaluate.py", folder, "--predict", *files, "--out", "new.csv", cwd=tmp_path)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if "left out" in line]
    assert line == "left out: empty.mzML: is empty (zero bytes)"
    table = pd.read_csv(tmp_path / "new.csv", keep_default_na=False)
    table.index = table["file"].map(lambda file: Path(file).stem)
    assert set(table.index) == {*expected.index, "short"}
    for name in expected.index:
        assert table["probability_user"][name] == pytest.approx(expected["probability_user"][name], abs=1e-6)
        assert table["predicted"][name] == expected["predicted"][name] and table["warning"][name] == ""
    assert "total_intensity" in table["warning"]["short"] and "rt_last is 5 (training" in table["warning"]["short"]
    pictures = sorted(data.glob("test/*/*.png"))
    assert run("evaluate.py", folder, "--predict", *pictures, "--out", "png.csv", cwd=tmp_path) == (0, "")
    of_pictures = pd.read_csv(tmp_path / "png.csv")
    probabilities = [expected["probability_user"][picture.stem] for picture in pictures]
    assert of_pictures["probability_user"].to_numpy() == pytest.approx(probabilities, abs=1e-6)
    assert of_pictures["warning"].str.contains("how its raw file was measured is unknown").all()
    content = (tmp_path / "new.csv").read_bytes()
    status, line = run("evaluate.py", folder, "--predict", good[0], "--out", "new.csv", cwd=tmp_path)
    assert status == 1 and "exists already" in line and (tmp_path / "new.csv").read_bytes() == content


def test_a_raw_file_with_a_retention_shift_has_a_warning(demo, trained, tmp_path):
    """The shift is 0.8 minutes, five of the 64 bins; the unshifted files have no warning."""
    files = []
    for picture in sorted(demo.glob("test/*/*.png")):
        path = demo / "raw" / f"{picture.stem}.mzML"
        _, scans = deeplcms.read_raw(path)
        files += [path, tmp_path / path.name]
        write_mzml(files[-1], [(60 * (rt + 0.8), *rest) for rt, *rest in scans])
    assert run("evaluate.py", trained, "--predict", *files, "--out", "new.csv", cwd=tmp_path) == (0, "")
    table = pd.read_csv(tmp_path / "new.csv", keep_default_na=False)
    now, later = table.iloc[::2], table.iloc[1::2]
    assert (later["rt_shift"].to_numpy() - now["rt_shift"].to_numpy()) == pytest.approx(0.8, abs=0.2)
    assert later["warning"].str.contains("rt_shift").all() and not now["warning"].str.contains("rt_shift").any()


# ---------------------------------------------------------------- many runs


def write_run(
    root,
    backbone,
    seed,
    val_loss,
    data_set="golestan",
    f1=0.9,
    suffix="",
    origin="pretrained",
    logistic_regression=False,
    **more,
):
    """Write a run folder for a comparison: config.json, and epochs.csv with three epochs; the second is best."""
    folder = root / data_set / backbone / f"seed{seed}{suffix}"
    folder.mkdir(parents=True)
    (folder / "best.pt").touch()
    settings = {"backbone": backbone, "seed": seed, "fold": None, "shuffle_labels": False, "weights": origin}
    settings |= {"optimizer": "lbfgs" if logistic_regression else "adamax"} | more
    config = {"data_set": data_set, "parameters": 8_100_000, "settings": settings, "baseline_loss": 0.5832}
    write_json(folder / "config.json", config)
    names = ["loss", "accuracy", "precision", "recall", "f1", "roc_auc"]
    measured = [f"{split}_{name}" for split in ("train", "val") for name in names]
    lines = [",".join(["epoch", *measured, "kept", "seconds"])]
    for epoch, worse, kept in ((1, 0.5, True), (2, 0.0, True), (3, 0.2, False)):
        scores = f"{f1 - worse},0.8,0.7,{f1 - worse},0.9"
        lines.append(f"{epoch},{0.4 - epoch / 10},{scores},{val_loss + worse},{scores},{kept},10")
    (folder / "epochs.csv").write_text("\n".join(lines))
    return folder


def test_a_comparison_has_the_columns_of_the_article_sorted_by_validation_loss(tmp_path):
    write_run(tmp_path, "resnet18", 1, 0.4)
    write_run(tmp_path, "mobileone_s3", 1, 0.26, f1=0.95)
    write_run(tmp_path, "pixels", 1, 0.3, origin="no network")
    write_run(tmp_path, "convnext_nano", 1, 0.35, origin="random initialisation")
    write_run(tmp_path, "vgg11", 1, 0.69, shuffle_labels=True)
    assert run("evaluate.py", tmp_path, cwd=tmp_path) == (0, "")
    table = pd.read_csv(tmp_path / "comparison.csv", keep_default_na=False).set_index("backbone")
    assert list(table.index) == ["mobileone_s3", "pixels", "convnext_nano", "resnet18", "vgg11"]
    columns = ["parameters_millions", "best_epoch", "val_loss", "val_f1", "seconds", "train_loss"]
    best = table.loc["mobileone_s3", columns].tolist()  # the best epoch, not the last
    assert best == pytest.approx([8.1, 2, 0.26, 0.95, 30, 0.2])
    assert table["notes"].tolist()[:4] == ["", "no network", "random initialisation", ""]
    assert "shuffled" in table["notes"]["vgg11"]
    text = (tmp_path / "comparison.md").read_text()
    header = next(line for line in text.splitlines() if "data_set" in line)
    columns = ["data_set", "backbone", "parameters_millions", "judged", "best_epoch"]
    for split in ("train", "val"):
        columns += [f"{split}_{name}" for name in ("loss", "accuracy", "f1", "precision", "recall")]
    assert header.split()[:17] == [*columns, "baseline_loss", "seconds"]
    assert "Kruskal" not in text  # there are no replicates


def test_runs_with_out_of_fold_and_with_validation_metrics_are_compared_separately(tmp_path):
    write_run(tmp_path, "resnet18", 1, 0.2)
    write_run(tmp_path, "vgg11", 1, 0.1)
    for backbone, loss in (("pixels", 0.4), ("mobileone_s3", 0.3)):
        for seed in (1, 2, 3):
            write_run(tmp_path, backbone, seed, loss + seed / 100, logistic_regression=True)
    for seed in (4, 5):
        write_run(tmp_path, "resnet18", seed, 0.2)
    assert run("evaluate.py", tmp_path, cwd=tmp_path) == (0, "")
    table = pd.read_csv(tmp_path / "comparison.csv")
    assert table["judged"].tolist() == ["out of fold"] * 6 + ["validation"] * 4
    assert table["backbone"].tolist() == ["mobileone_s3"] * 3 + ["pixels"] * 3 + ["vgg11"] + ["resnet18"] * 3
    text = (tmp_path / "comparison.md").read_text()
    assert "val_ is too good" in text.split("```")[0]
    pairs = [line.split("  ")[0] for line in text.splitlines() if " / " in line]
    assert pairs == ["golestan/mobileone_s3 / golestan/pixels"]  # only runs with the same `judged`


def read_replicates(path):
    """{label: [numbers]} from the table of replicates in a comparison.md."""
    lines = path.read_text().split("\nreplicates ")[1].split("```")[0].strip().splitlines()
    return {label: list(map(float, numbers.split())) for label, numbers in (line.split("  ", 1) for line in lines)}


LOSSES = {
    "mobileone_s3": [0.26, 0.31, 0.29, 0.33, 0.27],
    "resnet18": [0.35, 0.33, 0.41, 0.38, 0.33],
    "vgg11": [0.44, 0.39, 0.33, 0.52, 0.47],
    "pixels": [0.26, 0.30, 0.52],
}
# posthoc_dunn(groups, p_adjust="fdr_bh") of scikit-posthocs 0.17.1 (SciPy 1.17.1) on LOSSES, which have ties
DUNN_ADJUSTED = [0.193911907529, 0.030525046843, 0.456237189046, 0.456237189046, 0.469880472169, 0.242962465848]


def test_dunns_p_values_equal_those_of_scikit_posthocs():
    replicates = {name: pd.DataFrame({"val_loss": values, "val_f1": 0.9}) for name, values in LOSSES.items()}
    p = evaluate.compute_p_values(pd.concat(replicates).droplevel(1), ["val_loss", "val_f1"])
    kruskal = 0.03838948028589229  # scipy.stats.kruskal
    assert p["val_loss"].tolist() == pytest.approx([kruskal, *DUNN_ADJUSTED], abs=1e-10)
    assert p["val_f1"].isna().all()  # a constant metric has no p value


def test_folds_are_pooled_and_have_no_p_values(two, tmp_path):
    flags = ["--data", two[0], "--folds", 3, "--image-size", 64]
    for grid in (4, 16):
        more = ["--backbone", "pixels", "--scales", f"1:{grid}", "--name", f"grid{grid}"]
        assert run("train.py", *flags, *more, cwd=tmp_path) == (0, "")
    assert run("evaluate.py", "runs", cwd=tmp_path) == (0, "")
    text = (tmp_path / "runs/comparison.md").read_text()
    assert "Held-out pictures of all folds" in text and "p values" not in text
    held_out = pd.read_csv(tmp_path / "runs/out_of_fold.csv")
    assert held_out.groupby("training")["sample_name"].nunique().tolist() == [64, 64] and len(held_out) == 128
    best = held_out[held_out["training"].str.contains("grid16")]
    accuracy = ((best["logit_0"] > 0) == (best["phenotype"] == "user")).mean()
    grid16 = text.split("Held-out pictures")[1].split("grid16")[1]
    assert grid16.split()[1:3] == ["accuracy", f"{accuracy:.3g}"]


def test_replicates_are_runs_that_differ_only_in_the_seed(tmp_path, capsys):
    for backbone, losses in LOSSES.items():
        for seed, loss in enumerate(losses):
            write_run(tmp_path, backbone, seed, loss, origin="no network" if backbone == "pixels" else "pretrained")
    for seed in (0, 1):
        write_run(tmp_path, "resnet18", seed, 0.69, suffix="-shuffled", shuffle_labels=True)
        write_run(tmp_path, "mixed", seed, 0.5, optimizer=("adam", "rmsprop")[seed])
    write_run(tmp_path, "once", 0, 0.2)
    assert run("evaluate.py", tmp_path, cwd=tmp_path) == (0, "")
    table = read_replicates(tmp_path / "comparison.md")
    runs = {"golestan/mobileone_s3": 5, "golestan/pixels (no network)": 3, "golestan/resnet18": 5}
    runs |= {"golestan/vgg11": 5, "golestan/resnet18 (trained on shuffled labels)": 2}
    assert {label: numbers[-1] for label, numbers in table.items()} == runs
    assert "golestan/mixed: not replicates, as settings differ" in capsys.readouterr().out
    median, deviation = table["golestan/mobileone_s3"][:2]
    assert median == pytest.approx(0.29)
    assert deviation == pytest.approx(np.std(LOSSES["mobileone_s3"], ddof=1), rel=0.01)
    pairs = [line for line in (tmp_path / "comparison.md").read_text().splitlines() if " / " in line]
    assert len(pairs) == 6 and not any("shuffled" in pair for pair in pairs)  # shuffled labels are a control
    assert (tmp_path / "replicates.png").exists()


def test_one_backbone_on_several_data_sets_is_compared_by_data_set(tmp_path):
    for data_set, shift in (("bins500", 0.0), ("bins1000", 0.1), ("bins500_copies", -0.1)):
        for seed in range(3):
            write_run(tmp_path, "mobileone_s3", seed, 0.3 + shift + seed / 100, data_set)
    assert run("evaluate.py", tmp_path, cwd=tmp_path) == (0, "")
    names = [f"{name}/mobileone_s3" for name in ("bins500_copies", "bins500", "bins1000")]
    assert list(read_replicates(tmp_path / "comparison.md")) == names


WRONG = ["old new --threshold 0.4", "old new --data x", "old new --split val", "old --threshold val"]


@pytest.mark.parametrize("flags", WRONG)
def test_a_wrong_combination_of_flags_gives_exit_status_2(two, tmp_path, monkeypatch, capsys, flags):
    for name in ("old", "new"):
        (tmp_path / name).symlink_to(two[1])
    assert run("evaluate.py", *flags.split(), cwd=tmp_path)[0] == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("evaluate.py: error: ")
