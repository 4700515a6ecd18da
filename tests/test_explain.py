"""Tests of explain.py: positions in maps, a planted peak, and lists of features."""

import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from conftest import PEAK, TINY, run
from PIL import Image, PngImagePlugin
from scipy.stats import pearsonr, ttest_ind
from torch import nn

import explain
from deeplcms import InputError, Recipe
from train import Classifier

RECIPE = Recipe(1.0, 11.0, 100.0, 900.0, bins=(64, 64), normalize="global", sigma=1.0)
MSDIAL = [
    "Alignment ID,Average Rt(min),Average Mz,Metabolite name,Ontology,Annotation tag (VS1.0),MS/MS matched",
    '0,4.370,462.17500,"Morphine-3-glucuronide, M3G",Morphinans,430,True',
    "1,8.500,300.00000,Unknown,,530,False",
    "2,2.500,700.00000,Somewhere__else,Lipids,530,False",
    "3,20.000,300.00000,After the run,Lipids,430,False",
]


@pytest.fixture(scope="session")
def network(two):
    """A small network trained on the cohort with the planted peak."""
    data = two[0]
    (data / "features.csv").write_text("\n".join([",,,,,,Class"] * 4 + MSDIAL) + "\n")
    flags = ["--scales", "4:8", "--epochs", 25, "--patience", 25, "--lr", 0.02]
    assert run("train.py", "--backbone", "test_resnet", "--data", data, *TINY, *flags, cwd=data.parent) == (0, "")
    return data.parent / "runs" / data.name / "test_resnet" / "seed2643"


def test_the_ranking_is_written_if_the_default_layer_has_no_cam(two, network, tmp_path, monkeypatch, capsys):
    def fails(*_, **__):
        raise InputError("no CAM at stage2 (a list has no place); try other --layers")

    monkeypatch.setattr(explain, "compute_cams", fails)
    assert run("explain.py", network, "--out", tmp_path, cwd=two[0].parent) == (0, "")
    assert "no cam_grid.png: no CAM at stage2" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"features.csv", "inclusion.csv", "overlay.png"}
    status, line = run("explain.py", network, "--out", tmp_path, "--layers", "layer1", cwd=two[0].parent)
    assert status == 1 and "no CAM at stage2" in line


@pytest.mark.parametrize("scales", [None, ["last:1"]])
@pytest.mark.parametrize("name", ["hrnet_w18_small", "coat_mini", "mvitv2_tiny"])
def test_the_default_layer_is_the_input_of_the_head_if_no_module_returns_that_map(name, scales):
    model = Classifier(name, 1, scales, finetune="all").eval()
    nn.init.normal_(model.head.weight)
    layers = explain.choose_layers(model)
    picture = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    cam = next(explain.compute_cams(model, layers, RECIPE, [picture], 1))
    assert layers == ["taps.0"] and cam.shape == (64, 64) and cam.max() > 0


def test_resizing_keeps_positions_within_half_a_pixel():
    ramp = ((torch.arange(16) + 0.5) / 16).expand(1, 16, 16)  # each value is its fraction of the axis
    fine = explain.resize_maps(ramp, (64, 100))[0, 0]
    assert np.allclose(fine[4:-4], ((np.arange(100) + 0.5) / 100)[4:-4], atol=1e-6)


@pytest.mark.parametrize("name", ["pixels", "test_resnet"])
def test_the_planted_peak_has_the_highest_evidence_and_rank_1(two, network, name, monkeypatch, capsys):
    maps, draw_overlay = [], explain.draw_overlay
    monkeypatch.setattr(
        explain, "draw_overlay", lambda *arguments: maps.append(arguments[1]) or draw_overlay(*arguments)
    )
    folder = two[1] if name == "pixels" else network
    assert run("explain.py", folder, cwd=two[0].parent) == (0, "")
    printed = capsys.readouterr().out
    assert "3 of 4 inside the axes" in printed and printed.startswith(name)
    assert ("no network" if name == "pixels" else "random initialisation") in printed.splitlines()[0]
    assert ("no cam_grid.png: the head sees the picture alone" in printed) == (name == "pixels")
    row, column = np.unravel_index(abs(maps[0]).argmax(), maps[0].shape)
    rt, mz = RECIPE.from_fraction((column + 0.5) / 64, (row + 0.5) / 64)
    assert abs(rt - PEAK[0]) < 0.5 and abs(mz - PEAK[1]) < 40  # three bins
    out = folder / "explain"
    features = pd.read_csv(out / "features.csv")
    columns = ["rank", "rt", "mz", "name", "evidence", "direction", "p", "q", "t", "t_q", "in_box", "alignment_id"]
    assert list(features)[:12] == columns and "ontology" in features
    assert list(features["rank"]) == [1, 2, 3] and features["name"][0] == "Morphine-3-glucuronide, M3G"
    assert features["t"][0] > 3 and features["t_q"][0] < 0.05 < features["t_q"][2] and not features["in_box"].any()
    assert features["direction"][0] == "up" and features["q"][0] < 0.05 < features["q"][2]
    targets = pd.read_csv(out / "inclusion.csv")
    assert targets["Compound"][0] == "Morphine-3-glucuronide, M3G" and targets["m/z"][0] == 462.175
    assert targets["t start (min)"][0] == 4.07 and targets["t stop (min)"][0] == 4.67
    figures = ["overlay.png"] if name == "pixels" else ["cam_grid.png", "overlay.png"]
    assert sorted(path.name for path in out.glob("*.png")) == figures
    for figure in figures:
        with Image.open(out / figure) as image:
            assert min(image.size) > 500


def test_a_feature_that_is_up_in_one_class_is_down_in_the_other(two, network, tmp_path):
    flags = ["--class", "non-user", "--n", 2, "--out", tmp_path / "other"]
    assert run("explain.py", two[1], *flags, "--features", two[0] / "features.csv", cwd=two[0].parent) == (0, "")
    table = pd.read_csv(tmp_path / "other/features.csv")
    assert table["name"][0].startswith("Morphine") and table["direction"][0] == "down"


def test_half_and_double_precision_give_the_same_evidence(two, network, tmp_path):
    rng = np.random.default_rng(0)
    places = pd.DataFrame({"rt": rng.uniform(1, 11, 300), "mz": rng.uniform(100, 900, 300)})
    places.to_csv(tmp_path / "places.csv", index=False)
    assert run("explain.py", network, "--features", "places.csv", "--out", "out", cwd=tmp_path) == (0, "")
    answer = pd.read_csv(tmp_path / "out/features.csv")
    model, checkpoint = explain.load_run(network)
    _, pictures = explain.read_split(checkpoint, checkpoint["config"]["data"], "all")
    p = explain.predict_probabilities([model], RECIPE, pictures)[0][:, 1]
    measured = np.array([explain.local_intensity(picture, RECIPE, 0.3).ravel() for picture in pictures], float)
    evidence = explain.compute_evidence(measured, p, explain.find_common_components(measured, p))
    expected = abs(explain.look_up_values(evidence, answer, RECIPE))
    assert answer["evidence"].to_numpy() == pytest.approx(expected, abs=0.001)


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet", "swin"])
def test_every_kind_of_backbone_has_a_cam_for_both_classes(backbone):
    model = Classifier("test_resnet" if backbone == "swin" else backbone, 1, ["last:1"], 64)
    if backbone == "swin":  # channels last; a small Swin, as Swin-T is slow
        small = {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4, "img_size": 64}
        model.backbone = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, **small)
        model.standardize, model.head, model.sizes = nn.BatchNorm1d(32, affine=False), nn.Linear(32, 1), [32]
        model.scales, model.map_indices = [(8, 1, 1)], [1]
    model.eval().requires_grad_(False)  # like a frozen backbone
    nn.init.normal_(model.head.weight)
    layers = explain.choose_layers(model)
    pictures = np.random.default_rng(0).integers(0, 256, (2, 50, 40), np.uint8)
    maps = [np.array(list(explain.compute_cams(model, layers, RECIPE, pictures, k))) for k in (0, 1)]
    for cams in maps:
        assert cams.shape == (2, 50, 40) and np.isfinite(cams).all() and (cams >= 0).all() and cams.max() > 0
    assert not np.allclose(*maps)


def test_a_model_with_one_logit_has_a_cam_for_both_classes():
    model = Classifier("test_resnet", 1, ["last:1"], 64).eval()
    nn.init.normal_(model.head.weight)
    picture = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    cam = next(explain.compute_cams(model, ["taps.0"], RECIPE, [picture], 0))
    model.head.weight.data.neg_()  # swaps the classes
    assert np.array_equal(cam, next(explain.compute_cams(model, ["taps.0"], RECIPE, [picture], 1))) and cam.max() > 0


def test_evidence_depends_on_the_predictions_and_not_on_the_intensity():
    rng = np.random.default_rng(0)
    p = rng.uniform(size=80)
    intensities = rng.uniform(0, 0.1, (80, 20))
    intensities[:, 0] += 0.5 * p
    intensities[:, 16] -= 0.5 * p
    intensities[:, 12] += 5  # high in all pictures
    intensities[:, 6] = 0.3
    evidence = explain.compute_evidence(intensities, p, explain.find_common_components(intensities, p))
    assert evidence.shape == (20,) and evidence[0] > 0.9 and evidence[16] < -0.9
    assert evidence[6] == pytest.approx(0, abs=1e-6)
    evidence[[0, 16]] = 0
    assert abs(evidence).max() < 0.4


def test_evidence_excludes_a_batch_effect_and_includes_the_class():
    rng = np.random.default_rng(0)
    batch, predicted = np.repeat([0.0, 1.0], 40), np.tile([0.0, 1.0], 40)
    p = 0.7 * predicted + 0.2 * batch + rng.uniform(0, 0.1, 80)  # the network has partly learned the batch
    intensities = rng.normal(0, 0.1, (80, 100))
    intensities[:, 50:] += batch[:, None]
    intensities[:, 23] += 0.3 * predicted
    evidence = explain.compute_evidence(intensities, p, explain.find_common_components(intensities, p))
    before = explain.compute_evidence(intensities, p, np.empty((80, 0)))
    assert abs(evidence).argmax() == 23
    assert abs(evidence[50:]).mean() < 0.12 < 0.24 < abs(before[50:]).mean()
    # Half of the picture differs between the classes, so the first component is the class.
    intensities[:, 50:] += predicted[:, None] - batch[:, None]
    evidence = explain.compute_evidence(intensities, p, explain.find_common_components(intensities, p))
    assert evidence[50:].min() > 0.9


def test_evidence_is_the_correlation_after_regressing_the_components_out():
    """The intensities are processed in three chunks of pixels."""
    rng = np.random.default_rng(0)
    p, drift, batch = rng.uniform(size=(3, 300))
    intensities = rng.normal(0, 0.1, (300, 60_000))
    intensities += np.outer(batch, rng.uniform(size=60_000)) + np.outer(drift, rng.uniform(0, 0.5, 60_000))
    intensities[:, ::7] += 0.1 * p[:, None]
    assert [chunk.shape for chunk in explain.column_chunks(intensities)] == [(300, 20_000)] * 3
    components = explain.find_common_components(intensities, p)
    assert abs(components.T @ components - np.eye(2)).max() < 1e-9
    known = np.column_stack([np.ones(300), components])
    both = np.column_stack([p, intensities])
    residuals = both - known @ np.linalg.lstsq(known, both, rcond=None)[0]
    expected = pearsonr(residuals[:, 1:], residuals[:, :1]).statistic
    assert explain.compute_evidence(intensities, p, components) == pytest.approx(expected, abs=1e-5)


def test_five_percent_of_random_features_have_a_p_below_five_percent():
    rng = np.random.default_rng(0)
    p = rng.uniform(size=100)
    intensities = rng.normal(size=(100, 1000))
    intensities[:, 0] -= 3 * p
    intensities[:, 1] = 0.3
    r = explain.compute_evidence(intensities, p, np.zeros((100, 0)))
    table = explain.compute_evidence_p(r, 98)
    assert table["p"][2:].to_numpy() == pytest.approx(pearsonr(intensities[:, 2:], p[:, None]).pvalue, rel=1e-4)
    assert table["p"].idxmin() == 0 and table["q"][0] < 0.05 and table["direction"][0] == "down"
    assert table["p"][1] > 0.99 and 0.03 < (table["p"][2:] < 0.05).mean() < 0.07


def test_three_injections_of_a_person_count_as_one_sample(two, network, tmp_path):
    data = shutil.copytree(two[0], tmp_path / "data")
    samples = pd.read_csv(data / "samples.csv", dtype=str)
    for i in (1, 2):
        for picture in data.glob("*/*/*er??.png"):
            name = f"{picture.stem}-{i}"
            with Image.open(picture) as image:
                info = PngImagePlugin.PngInfo()
                for key, value in (image.text | {"sample_name": name}).items():
                    info.add_text(key, value)
                image.save(picture.with_stem(name), pnginfo=info)
    more = [samples.assign(sample_name=samples["sample_name"] + f"-{i}") for i in (1, 2)]
    pd.concat([samples, *more]).to_csv(data / "samples.csv", index=False)
    flags = ["--features", two[0] / "features.csv", "--data"]
    for name, folder in (("once", two[0]), ("thrice", data)):
        assert run("explain.py", two[1], *flags, folder, "--out", tmp_path / name, cwd=tmp_path) == (0, "")
    once, thrice = (pd.read_csv(tmp_path / name / "features.csv") for name in ("once", "thrice"))
    pd.testing.assert_frame_equal(once, thrice, rtol=1e-3, atol=1e-6)


def test_t_compares_the_known_phenotypes_and_in_box_counts_neighbouring_features():
    rng = np.random.default_rng(0)
    intensities = rng.normal(size=(12, 64, 64))
    intensities[:6, 10, 20] += 3
    intensities[:, 50, 50] = 0  # no intensity there
    measured = intensities.reshape(12, -1)
    rt, mz = RECIPE.from_fraction((np.array([20, 21, 50]) + 0.5) / 64, (np.array([10, 10, 50]) + 0.5) / 64)
    table = pd.DataFrame({"rt": rt, "mz": mz, "name": list("abc"), "t": 9.0})
    in_class = np.array([1.0] * 5 + [np.nan] + [0.0] * 6)

    def ranked(in_class, tolerance=0.3):
        tests = explain.compare_phenotypes(explain.look_up_values(measured, table, RECIPE), in_class)
        return explain.rank_features(table, np.zeros(3), tests, [tolerance, 25.0]).set_index("name")

    found = ranked(in_class)
    expected = ttest_ind(intensities[:5, 10, 20], intensities[6:, 10, 20], equal_var=False)
    assert found["t"]["a"] == pytest.approx(expected.statistic) and found["t_q"]["a"] < 0.05 < found["t_q"]["b"]
    assert np.isnan(found["t"]["c"]) and found["t_q"]["c"] == 1
    assert list(found["in_box"]) == [1, 1, 0] and list(ranked(in_class, tolerance=0.1)["in_box"]) == [0, 0, 0]
    for few in (np.full(12, np.nan), np.array([1.0] + [0.0] * 11)):
        assert ranked(few)[["t", "t_q"]].isna().all(axis=None)


def test_all_cams_of_a_figure_share_one_scale(tmp_path, monkeypatch):
    norms, show = [], explain.show
    monkeypatch.setattr(explain, "show", lambda *a, norm=None, **b: [norms.append(norm), show(*a, norm=norm, **b)][1])
    table = pd.DataFrame({"sample_name": ["a", "b"], "phenotype": "user", "probability": 0.5})
    pictures = np.zeros((2, 64, 64), np.uint8)
    maps = np.stack([np.full((64, 64), 2.0), np.full((64, 64), 0.02)])
    explain.draw_cam_grid(tmp_path / "grid.png", table, pictures, maps, RECIPE, "")
    assert norms[1] is norms[3] and norms[1](2.0) == 1 and norms[1](0.02) == pytest.approx(0.1)


def test_local_intensity_tolerates_retention_shifts_and_with_rt_subtracts_the_background():
    def intensity(column, normalize="quantile", around=0.0):
        values = np.zeros((64, 64))
        values[20, column] = 0.4
        values[:, 25:35] += around
        picture = (255 * values).astype(np.uint8)
        return explain.local_intensity(picture, replace(RECIPE, normalize=normalize), tolerance=1.0)[20, 30]

    assert intensity(30) == pytest.approx(intensity(32), rel=0.01) and intensity(45) == 0 < intensity(30)
    assert intensity(30, around=0.2) > intensity(30) + 0.1
    assert intensity(30, "rt", around=0.2) == pytest.approx(intensity(30, "rt"), abs=0.01)


def test_features_in_the_inclusion_list_have_low_q_and_t_q():
    table = pd.DataFrame({"name": ["a", "b", "c"], "mz": [462.175, 300.0, 400.0], "rt": [0.2, 5.0, 6.0]})
    table = table.assign(q=[0.01, 0.3, 0.01], t_q=[0.01, 0.01, 0.3])
    targets = explain.make_inclusion_list(table, tolerance=0.3)
    assert list(targets) == ["Compound", "Formula", "Adduct", "m/z", "z", "t start (min)", "t stop (min)"]
    assert targets.to_numpy().tolist() == [["a", "", "(no adduct)", 462.175, 1, 0.0, 0.5]]
    for unknown, names in (("q", "ab"), ("t_q", "ac")):  # equal predictions; unknown phenotypes
        targets = explain.make_inclusion_list(table.assign(**{unknown: np.nan}), tolerance=0.3)
        assert targets["Compound"].tolist() == list(names)


def test_a_raw_file_and_its_picture_have_the_same_ranking_and_other_axes_are_refused(two, network, tmp_path, capsys):
    data = two[0]
    picture = next(data.glob("test/user/*.png"))
    (tmp_path / "raw").mkdir()
    shutil.copy(data.parent / "raw" / f"{picture.stem}.mzML", tmp_path / "raw")
    tables = {}
    (tmp_path / "raw/empty.mzML").touch()  # this file is skipped
    for name, source in (("png", picture), ("raw", tmp_path / "raw")):
        flags = ["--features", data / "features.csv", "--layers", "act1", "layer1", "--query", "average_rt_min_ < 5"]
        assert run("explain.py", network, "--input", source, *flags, "--out", name, cwd=tmp_path) == (0, "")
        assert "mean CAM replaces evidence" in capsys.readouterr().out
        tables[name] = pd.read_csv(tmp_path / name / "features.csv")
        assert tables[name]["t"].isna().all() and tables[name]["t_q"].isna().all()  # one phenotype or none
    pd.testing.assert_frame_equal(tables["png"], tables["raw"], rtol=1e-4, atol=1e-6)
    assert set(tables["png"]["alignment_id"]) == {0, 2}
    # The written ranking can be used as the list of features.
    again = ["--input", picture, "--features", tmp_path / "png/features.csv", "--out", "again"]
    assert run("explain.py", network, *again, cwd=tmp_path) == (0, "")
    # Few pictures have no evidence, and pixels has no CAM. Pictures of one predicted class have evidence.
    few = [picture, next(data.glob("test/non-user/*.png"))]
    status, line = run("explain.py", two[1], "--input", *few, *again[2:], cwd=tmp_path)
    assert status == 1 and "the head sees the picture alone, so there is no CAM" in line
    alike = ["--input", *data.glob("train/user/*.png"), *again[2:-1], "alike"]
    assert run("explain.py", two[1], *alike, cwd=tmp_path) == (0, "")
    assert pd.read_csv(tmp_path / "alike/features.csv")["q"].notna().all()

    with Image.open(picture) as image:
        info = PngImagePlugin.PngInfo()
        for key, value in (image.text | {"rt_max": "12.0"}).items():
            info.add_text(key, value)
        image.save(tmp_path / "moved.png", pnginfo=info)
    status, line = run("explain.py", network, "--input", tmp_path / "moved.png", cwd=tmp_path)
    assert status == 1 and "rt_max is 12.0, not 11.0" in line


@pytest.mark.parametrize(
    ("flags", "answer"),
    [
        ("--layers layer_1", "no layer of this backbone; those that timm lists: act1, layer1, layer2"),
        ("--class nobody", "--class nobody: the classes are non-user, user"),
        ("--input nowhere.mzML", "nowhere.mzML"),
        ("--query average_rt<5", "--query 'average_rt<5': name 'average_rt' is not defined (columns: alignment_id"),
        ("--query rt>1000", "no feature is left (--query?"),
        ("--features nowhere.csv", "nowhere.csv"),
        ("--features samples.csv", "no columns of retention time"),
    ],
)
def test_bad_input_gives_an_error_of_one_line(two, network, flags, answer):
    status, line = run("explain.py", network, *flags.split(), cwd=two[0])
    assert status == 1 and answer in line and line.startswith("explain.py: ") and "\n" not in line


@pytest.mark.parametrize("preamble", [0, 4])
@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
def test_an_msdial_export_is_read_with_or_without_its_four_header_lines(tmp_path, preamble, delimiter):
    lines = [line.replace('"Morphine-3-glucuronide, M3G"', "M3G").replace(",", delimiter) for line in MSDIAL]
    text = "\n".join([delimiter * 5 + "Class"] * preamble + lines)  # narrower than the header
    (tmp_path / "features.txt").write_text(text, encoding="utf-8-sig")
    table = explain.read_features(tmp_path / "features.txt", RECIPE)
    assert (table.rt[0], table.mz[0], table.name[0]) == (4.37, 462.175, "M3G")
    assert {"average_rt_min_", "average_mz", "annotation_tag_vs1_0_", "ms_ms_matched"} <= set(table)


def test_peak_lists_and_short_tables_are_read(tmp_path):
    path = tmp_path / "peaks.txt"
    path.write_text("Peak ID\tTitle\tRT (min)\tPrecursor m/z\n1\tcaffeine\t2.1\t195.0877\n")
    table = explain.read_features(path, RECIPE)
    assert (table.rt[0], table.mz[0], table.name[0]) == (2.1, 195.0877, "caffeine")
    path.write_text("rt,mz,name\n1,2,a\nx,2,b\n")
    with pytest.raises(InputError, match="row 3: rt x is not a number"):
        explain.read_features(path, RECIPE)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("row ID,row m/z,row retention time,a.mzML Peak area,\n1,300.5,5.25,9,\n", ""),  # mzmine
        (',mz,rt,name\n0,300.5,5.25,"B, x"\n', "B, x"),  # pandas, with its index
        ('"","","",""\n"","","","Raw"\n"Compound","m/z","Retention time (min)","a"\n"c","300.5","5.25",""\n', "c"),
        ("rt,mz,name\n5.25,300.5,0\n6,400,\n", "0.0"),  # names that are numbers, one missing
        ("rt,mz,name\n5.25,300.5,7\n", "7"),
    ],
)
def test_feature_lists_of_other_programs_are_read(tmp_path, text, name):
    (tmp_path / "features.csv").write_text(text)
    table = explain.read_features(tmp_path / "features.csv", RECIPE)
    assert (table.rt[0], table.mz[0], table.name[0]) == (5.25, 300.5, name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rt,mz,name\n5,300,x,\n6,400,x,\n", "its rows have more fields than its header"),
        ("rt,mz,Fold change,fold-change\n5,300,1,2\n", "titles become the same: Fold change, fold-change"),
        ("Time,Mass\n5,300\n", r"no columns of retention time .*; found: time, mass"),
        (',"mzmed","rtmed"\nFT1,300,315\n', "retention times in seconds"),  # XCMS
    ],
)
def test_an_unreadable_feature_list_gives_an_error_of_one_line(tmp_path, text, message):
    (tmp_path / "features.csv").write_text(text)
    with pytest.raises(InputError, match=message) as refusal:
        explain.read_features(tmp_path / "features.csv", RECIPE)
    assert "\n" not in str(refusal.value)


def test_a_feature_list_in_seconds_gives_a_warning(tmp_path, capsys):
    for seconds, warned in (([5, 120, 300], True), ([5, 6, 300], False)):
        (tmp_path / "features.csv").write_text("rt,mz\n" + "".join(f"{s},300\n" for s in seconds))
        explain.read_features(tmp_path / "features.csv", RECIPE)
        assert ("retention times in seconds" in capsys.readouterr().out) == warned


def test_a_sample_name_keeps_its_dots_and_other_files_are_refused(two, tmp_path):
    name = "2023.05.12_KO_1"
    shutil.copy(next((two[0].parent / "raw").glob("user*.mzML")), tmp_path / f"{name}.mzML")
    (tmp_path / "list.mgf").write_text("BEGIN IONS\nEND IONS\n")
    table, pictures = explain.read_files([tmp_path / f"{name}.mzML", tmp_path / "list.mgf"], RECIPE)
    assert table["sample_name"].tolist() == [name] and len(pictures) == 1
    with pytest.raises(InputError, match="list.mgf: no mzML, mzXML or CDF; msconvert"):
        explain.read_files([tmp_path / "list.mgf"], RECIPE)


def test_names_of_features_may_be_numbers(two, tmp_path):
    (tmp_path / "features.csv").write_text("rt,mz,name\n4.37,462.175,0\n8,300,1\n")
    flags = ["--features", tmp_path / "features.csv", "--out", tmp_path / "out"]
    assert run("explain.py", two[1], *flags, cwd=two[0].parent) == (0, "")
    assert pd.read_csv(tmp_path / "out/features.csv")["name"].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("query", "rows"),
    [
        ("3.5<average_rt_min_<5 and 460<average_mz<500", [0]),  # the article's
        ("annotation_tag_vs1_0_ == '430'", [0]),
        (
            "annotation_tag__vs1_0_=='430' and 3.5<average_rt_min_<5",
            [0],
        ),  # the article's; pyjanitor keeps both underscores
        ("ms__ms_matched == True and metabolite_name != 'Somewhere_else'", [0]),
        ("metabolite_name == 'Somewhere__else'", [2]),  # text is not cleaned
        ("annotation_tag_vs1_0_ in ['430', '530'] and rt < 3", [2]),
        ("annotation_tag_vs1_0_.str.startswith('5')", [1, 2]),
        ("ms_ms_matched == True", [0]),
        ("(rt > 8) & ~(ontology == 'Lipids')", [1]),
    ],
)
def test_queries_of_the_article_select_features(tmp_path, query, rows):
    (tmp_path / "features.csv").write_text("\n".join(MSDIAL))
    assert list(explain.read_features(tmp_path / "features.csv", RECIPE, query)["alignment_id"]) == rows


def test_tokens_and_channels_last_maps_are_converted_to_channels_first():
    class Tokens:
        num_prefix_tokens = 1
        patch_embed = type("PatchEmbed", (), {"grid_size": (4, 5)})

    map_ = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5).float()
    tokens = torch.cat([torch.zeros(2, 1, 3), map_.flatten(2).transpose(1, 2)], 1)
    assert torch.equal(explain.to_channels_first(tokens, Tokens), map_)
    square = torch.arange(2 * 3 * 4 * 4).reshape(2, 3, 4, 4).float()
    tokens = torch.cat([torch.zeros(2, 1, 3), square.flatten(2).transpose(1, 2)], 1)
    assert torch.equal(explain.to_channels_first(tokens, nn.Identity()), square)
    swin = nn.Identity()
    swin.output_fmt = "NHWC"
    assert torch.equal(explain.to_channels_first(map_.permute(0, 2, 3, 1), swin), map_)
