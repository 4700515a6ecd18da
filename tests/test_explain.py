"""explain.py: positions survive, a planted peak is found, tables are read and queried."""

import json
import shutil

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
from deeplcms import InputError, Recipe, colours, show
from train import Classifier, to_channels_first

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
    flags = ["--grid", 8, "--epochs", 25, "--patience", 25, "--lr", 0.02]
    assert run("train.py", "--backbone", "test_resnet", "--data", data, *TINY, *flags, cwd=data.parent) == (0, "")
    return data.parent / "runs" / data.name / "test_resnet" / "seed2643"


def test_resizing_keeps_every_position_to_half_a_pixel():
    ramp = ((torch.arange(16) + 0.5) / 16).expand(1, 16, 16)  # the value is the fraction of the axis
    fine = explain.resized(ramp, (64, 100))[0, 0]
    assert np.allclose(fine[4:-4], ((np.arange(100) + 0.5) / 100)[4:-4], atol=1e-6)


@pytest.mark.parametrize("name", ["pixels", "test_resnet"])
def test_the_planted_peak_leads_regions_and_ranking(two, network, name, capsys):
    folder = two[1] if name == "pixels" else network
    assert run("explain.py", folder, cwd=two[0].parent) == (0, "")
    said = capsys.readouterr().out
    assert "3 inside the axes, 1 outside" in said and "faithful than chance" in said
    assert said.startswith(name) and ("no network" if name == "pixels" else "random initialisation") in said
    out = folder / "explain"
    boxes = pd.read_csv(out / "regions.csv")
    assert boxes["evidence"].is_monotonic_decreasing
    first = boxes.iloc[0]
    assert first.rt_min <= PEAK[0] <= first.rt_max and first.mz_min <= PEAK[1] <= first.mz_max
    assert first.rt_max - first.rt_min < 3 and first.mz_max - first.mz_min < 240  # under a third of each axis
    features = pd.read_csv(out / "features.csv")
    assert list(features["rank"]) == [1, 2, 3] and features["name"][0] == "Morphine-3-glucuronide, M3G"
    assert features["drop"][0] > 0 and features["drop_p"][0] < 0.05  # blanking its box takes the evidence away
    assert features["t"][0] > 3 and features["t_q"][0] < 0.05 < features["t_q"][2] and not features["in_box"].any()
    assert features["direction"][0] == "up" and features["q"][0] < 0.05 < features["q"][2]
    assert {"heat_user", "heat_non-user", "ontology"} <= set(features)
    targets = pd.read_csv(out / "inclusion.csv")
    assert targets["Compound"][0] == "Morphine-3-glucuronide, M3G" and targets["m/z"][0] == 462.175
    assert targets["t start (min)"][0] == 4.07 and targets["t stop (min)"][0] == 4.67
    for figure in ("cam_grid.png", "class_maps.png", "overlay.png"):
        with Image.open(out / figure) as image:
            assert min(image.size) > 500
    faithfulness = json.loads((out / "faithfulness.json").read_text())
    assert 0 <= faithfulness["map"]["avg_drop"] <= 1 and "moved_map" in faithfulness


def test_the_other_class_has_an_answer_of_its_own(two, tmp_path):
    flags = ["--class", "non-user", "--n", 2, "--top", 1, "--out", tmp_path / "other"]
    assert run("explain.py", two[1], *flags, "--features", two[0] / "features.csv", cwd=two[0].parent) == (0, "")
    table = pd.read_csv(tmp_path / "other/features.csv")
    assert table["name"][0].startswith("Morphine") and table["drop"].notna().sum() == 1
    assert table["direction"][0] == "down" and table["drop"][0] < 0.05  # its absence tells a non-user


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet", "swin"])
def test_any_kind_of_backbone_has_heat_for_either_class(backbone):
    model = Classifier("test_resnet" if backbone == "swin" else backbone, 1, 1, 64)
    if backbone == "swin":  # its maps are channels last; a small one, as Swin-T takes its time
        small = {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4, "img_size": 64}
        model.backbone = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, **small)
        model.standardize, model.head, model.n_features = nn.BatchNorm1d(32, affine=False), nn.Linear(32, 1), 32
    model.eval().requires_grad_(False)  # as a frozen backbone is
    nn.init.normal_(model.head.weight)
    scores = explain.Scores(model, RECIPE).eval()
    layers = explain.choose_layers(model)
    u = torch.rand(2, 3, model.image_size, model.image_size)
    maps = [explain.heat_maps(scores, layers, u, k, (50, 40)) for k in (0, 1)]
    for heat in maps:
        assert heat.shape == (2, 50, 40) and np.isfinite(heat).all() and (heat >= 0).all() and heat.max() > 0
    assert not np.allclose(*maps)


def test_one_logit_stands_for_a_pair_of_opposite_scores():
    scores = explain.Scores(Classifier("pixels", 1, 8, 32).eval(), RECIPE)
    nn.init.normal_(scores.model.head.weight)
    z = scores(torch.rand(3, 3, 32, 32))
    assert z.shape == (3, 2) and torch.allclose(z[:, 0], -z[:, 1]) and z.abs().min() > 0
    # In its coordinates 0 is the colour of zero intensity: "nothing measured".
    blank = (torch.tensor(RECIPE.zero_colour() / 255).float()[:, None, None].expand(3, 32, 32) - 0.5) / 0.5
    assert torch.allclose(scores(torch.zeros(1, 3, 32, 32))[0, 1], scores.model(blank[None])[0, 0], atol=1e-5)


def test_evidence_is_what_goes_with_the_calls_however_bright():
    rng = np.random.default_rng(0)
    p = rng.uniform(size=80)
    intensities = rng.uniform(0, 0.1, (80, 4, 5))
    intensities[:, 0, 0] += 0.5 * p
    intensities[:, 3, 1] -= 0.5 * p
    intensities[:, 2, 2] += 5  # bright in all
    intensities[:, 1, 1] = 0.3
    evidence = explain.evidence_map(*explain.without_drift(intensities, p))
    assert evidence.shape == (4, 5) and evidence[0, 0] > 0.9 and evidence[3, 1] < -0.9
    assert evidence[1, 1] == 0
    evidence[0, 0] = evidence[3, 1] = 0
    assert abs(evidence).max() < 0.4


def test_what_whole_pictures_have_in_common_is_taken_out_unless_it_is_the_class():
    rng = np.random.default_rng(0)
    batch, called = np.repeat([0.0, 1.0], 40), np.tile([0.0, 1.0], 40)
    p = 0.7 * called + 0.2 * batch + rng.uniform(0, 0.1, 80)  # the network has learned a little of the batch
    intensities = rng.normal(0, 0.1, (80, 10, 10))
    intensities[:, 5:] += batch[:, None, None]
    intensities[:, 2, 3] += 0.3 * called
    evidence = explain.evidence_map(*explain.without_drift(intensities, p))
    before = explain.evidence_map(intensities, p)
    assert np.unravel_index(abs(evidence).argmax(), evidence.shape) == (2, 3)
    assert abs(evidence[5:]).mean() < 0.12 < 0.24 < abs(before[5:]).mean()
    # Most of what is measured differs between the classes: that is no drift.
    intensities[:, 5:] += called[:, None, None] - batch[:, None, None]
    evidence = explain.evidence_map(*explain.without_drift(intensities, p))
    assert evidence[5:].min() > 0.9


def test_chance_agrees_with_the_textbook_where_that_applies():
    rng = np.random.default_rng(0)
    p = rng.uniform(size=100)
    intensities = rng.normal(size=(100, 300))
    intensities[:, 0] += 2 * p
    table = explain.tests_of_calls(intensities, p, seed=0)
    assert table["p"][0] == table["p"].min() == 1 / 10000 and table["direction"][0] == "up"
    assert np.allclose(table["p"], pearsonr(intensities, p[:, None]).pvalue, atol=0.02)


def test_blanking_passes_what_is_used_and_of_the_rest_no_more_than_chance():
    """A linear network looks at one place more than elsewhere; brighter places move its score more."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(64, 64))
    weights[20:24, 28:36] += 4
    bright = np.kron(rng.uniform(0.1, 1, (8, 8)), np.ones((8, 8)))  # in steps
    intensities = bright * rng.uniform(0.9, 1.1, (12, 64, 64))
    features = pd.DataFrame({"rt": rng.uniform(1.5, 10.5, 200), "mz": rng.uniform(150, 850, 200)})
    features.loc[0] = RECIPE.from_fraction(32 / 64, 22 / 64)

    def scores(u):
        z = (u[:, 0] * torch.from_numpy(weights)).sum((1, 2))
        return torch.stack([-z, z], 1)

    u = torch.from_numpy(np.repeat(intensities[:, None], 3, 1))
    half_box = explain.half_box_of(RECIPE, 0.6)
    elsewhere = (abs(features - features.loc[0]) > 2 * half_box).any(axis=1)
    passing = []
    for seed in range(4):  # of the control boxes
        answer = [u, 1, features, intensities.mean(0), RECIPE, half_box, seed]
        table = explain.blanking(scores, *answer)
        assert table["drop_p"].idxmin() == 0 and table["drop_p"][0] < 0.01 and table["drop"][0] > 0
        passing.append((table["drop_p"][elsewhere] < 0.05).mean())
    assert 0.01 < np.mean(passing) < 0.1
    drops = explain.drops_of(scores, u, 1, features.to_numpy(), RECIPE, half_box)
    assert (abs(drops.mean(1)) > 2 * drops.std(1) / 12**0.5).mean() > 0.5  # two standard errors are no test
    dark = explain.blanking(lambda u: torch.zeros(len(u), 2), *answer)  # an untrained head
    assert (dark["drop"] == 0).all() and (dark["drop_p"] == 1).all()


def test_t_asks_the_known_phenotypes_and_in_box_counts_the_neighbours():
    rng = np.random.default_rng(0)
    intensities = rng.normal(size=(12, 64, 64))
    intensities[:6, 10, 20] += 3
    intensities[:, 50, 50] = 0  # nothing is measured there
    rt, mz = RECIPE.from_fraction((np.array([20, 21, 50]) + 0.5) / 64, (np.array([10, 10, 50]) + 0.5) / 64)
    table = pd.DataFrame({"rt": rt, "mz": mz, "name": list("abc"), "t": 9.0})
    of_class = np.array([1.0] * 5 + [np.nan] + [0.0] * 6)

    def ranked(of_class, drift=0.3):
        tests = explain.tests_of_phenotypes(explain.at_places(intensities, table, RECIPE), of_class)
        half_box = explain.half_box_of(RECIPE, drift)
        return explain.rank_features(table, tests, np.zeros((64, 64)), {}, RECIPE, half_box).set_index("name")

    found = ranked(of_class)
    expected = ttest_ind(intensities[:5, 10, 20], intensities[6:, 10, 20], equal_var=False)
    assert found["t"]["a"] == pytest.approx(expected.statistic) and found["t_q"]["a"] < 0.05 < found["t_q"]["b"]
    assert np.isnan(found["t"]["c"]) and found["t_q"]["c"] == 1
    assert list(found["in_box"]) == [1, 1, 0] and list(ranked(of_class, drift=0.1)["in_box"]) == [0, 0, 0]
    for few in (np.full(12, np.nan), np.array([1.0] + [0.0] * 11)):
        assert ranked(few)[["t", "t_q"]].isna().all(axis=None)


def test_faithfulness_says_in_words_whether_a_map_beats_itself_elsewhere():
    scores = explain.Scores(Classifier("pixels", 1, 16, 64).eval(), RECIPE)
    weights = torch.zeros(3, 16, 16)
    weights[:, 4, 4] = 5.0
    scores.model.head.weight.data = weights.flatten()[None]
    u, maps = torch.rand(6, 3, 64, 64) + 1, np.zeros((6, 64, 64))
    verdicts = []
    for there, elsewhere in ((1, 0), (0, 1), (1, 1)):
        maps[:] = elsewhere
        maps[:, 12:24, 12:24] = there
        verdicts.append(explain.faithfulness(scores, u, maps, 1)["verdict"])
    for verdict, word in zip(verdicts, ("more", "less", "no more"), strict=True):
        assert verdict.endswith(f": the map is {word} faithful than chance")
    assert explain.faithfulness(scores, u[:1], maps[:1], 1)["verdict"].endswith("no more faithful than chance")


def test_all_maps_of_a_figure_share_one_scale(tmp_path, monkeypatch):
    norms = []
    monkeypatch.setattr(explain, "show", lambda *a, norm=None, **b: [norms.append(norm), show(*a, norm=norm, **b)][1])
    table = pd.DataFrame({"sample_name": ["a", "b"], "phenotype": "user", "caption": ""})
    pictures = [colours(np.zeros((64, 64)), RECIPE.colormap)] * 2
    maps = np.stack([np.full((64, 64), 2.0), np.full((64, 64), 0.02)])
    explain.cam_grid(tmp_path / "grid.png", table, pictures, maps, RECIPE, "")
    assert norms[1] is norms[3] and norms[1](2.0) == 1 and norms[1](0.02) == pytest.approx(0.1)


def test_intensity_forgives_drift_and_what_all_masses_of_a_time_have_in_common():
    def intensity(column, factor=1.0):
        values = np.zeros((64, 64))
        values[20, column] = 0.4
        values[:, column] += 0.2
        picture = colours(values * factor, RECIPE.colormap)
        return explain.local_intensity(picture, RECIPE, drift=1.0)[20, 30]

    assert intensity(30) == pytest.approx(intensity(32), rel=0.01) and intensity(30) > 5 * abs(intensity(45))
    assert intensity(30, 0.5) < intensity(30)


def test_the_list_for_the_instrument_ends_where_chance_begins():
    table = pd.DataFrame({"name": ["a", "b"], "mz": [462.175, 300.0], "rt": [0.2, 5.0], "q": [0.01, 0.3]})
    targets = explain.inclusion_list(table, drift=0.3)
    assert list(targets) == ["Compound", "Formula", "Adduct", "m/z", "z", "t start (min)", "t stop (min)"]
    assert targets.to_numpy().tolist() == [["a", "", "(no adduct)", 462.175, 1, 0.0, 0.5]]
    assert len(explain.inclusion_list(table.assign(q=np.nan), drift=0.3)) == 2  # all called alike: nothing is known


def test_a_raw_run_is_explained_as_its_picture_is_and_other_axes_are_refused(two, network, tmp_path, capsys):
    data = two[0]
    picture = next(data.glob("test/user/*.png"))
    (tmp_path / "raw").mkdir()
    shutil.copy(data.parent / "raw" / f"{picture.stem}.mzML", tmp_path / "raw")
    tables = {}
    (tmp_path / "raw/empty.mzML").touch()  # costs no other
    for name, source in (("png", picture), ("raw", tmp_path / "raw")):
        flags = ["--features", data / "features.csv", "--layers", "layer1", "layer2", "--query", "average_rt_min_ < 5"]
        assert run("explain.py", network, "--input", source, *flags, "--out", name, cwd=tmp_path) == (0, "")
        assert "without calls to compare, evidence is their heat" in capsys.readouterr().out
        tables[name] = pd.read_csv(tmp_path / name / "features.csv")
        assert tables[name]["t"].isna().all() and tables[name]["t_q"].isna().all()  # one phenotype or none
    columns = ["rank", "name", "evidence", "drop"]  # heat is named after the phenotype, which a raw run has not
    pd.testing.assert_frame_equal(tables["png"][columns], tables["raw"][columns], rtol=1e-4, atol=1e-6)
    assert set(tables["png"]["alignment_id"]) == {0, 2}
    # The answer is a table of features itself.
    again = ["--input", picture, "--features", tmp_path / "png/features.csv", "--out", "again"]
    assert run("explain.py", network, *again, cwd=tmp_path) == (0, "")

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
        ("--layers layer_1", "no layer of this backbone; the nearest: layer1"),
        ("--class nobody", "'nobody' is not one of non-user, user"),
        ("--input nowhere.mzML", "nowhere.mzML"),
        ("--query average_rt<5", "--query 'average_rt<5': name 'average_rt' is not defined (columns: alignment_id"),
        ("--query rt>1000", "no feature is left (--query?"),
        ("--features nowhere.csv", "nowhere.csv"),
        ("--features samples.csv", "no columns of retention time"),
    ],
)
def test_bad_input_ends_in_one_clear_line(two, network, flags, answer):
    status, line = run("explain.py", network, *flags.split(), cwd=two[0])
    assert status == 1 and answer in line and line.startswith("explain.py: ") and "\n" not in line


@pytest.mark.parametrize("preamble", [0, 4])
@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
def test_an_msdial_export_is_read_with_or_without_its_four_header_lines(tmp_path, preamble, delimiter):
    lines = [line.replace('"Morphine-3-glucuronide, M3G"', "M3G").replace(",", delimiter) for line in MSDIAL]
    text = "\n".join([delimiter * 5 + "Class"] * preamble + lines)  # as wide as the header or not
    (tmp_path / "features.txt").write_text(text, encoding="utf-8-sig")
    table = explain.read_features(tmp_path / "features.txt", RECIPE)
    assert (table.rt[0], table.mz[0], table.name[0]) == (4.37, 462.175, "M3G")
    assert {"average_rt_min_", "average_mz", "annotation_tag_vs1_0_", "ms_ms_matched"} <= set(table)


def test_peak_lists_and_plain_tables_are_read(tmp_path):
    path = tmp_path / "peaks.txt"
    path.write_text("Peak ID\tTitle\tRT (min)\tPrecursor m/z\n1\tcaffeine\t2.1\t195.0877\n")
    table = explain.read_features(path, RECIPE)
    assert (table.rt[0], table.mz[0], table.name[0]) == (2.1, 195.0877, "caffeine")
    path.write_text("rt,mz,name\n1,2,a\nx,2,b\n")
    with pytest.raises(InputError, match="row 3: rt x is not a number"):
        explain.read_features(path, RECIPE)


@pytest.mark.parametrize(
    ("query", "rows"),
    [
        ("3.5<average_rt_min_<5 and 460<average_mz<500", [0]),  # the article's
        ("annotation_tag_vs1_0_ == '430'", [0]),
        ("annotation_tag__vs1_0_=='430' and 3.5<average_rt_min_<5", [0]),  # the article's: pyjanitor keeps both
        ("ms__ms_matched == True and metabolite_name != 'Somewhere_else'", [0]),
        ("metabolite_name == 'Somewhere__else'", [2]),  # a text stays as it is
        ("annotation_tag_vs1_0_ in ['430', '530'] and rt < 3", [2]),
        ("annotation_tag_vs1_0_.str.startswith('5')", [1, 2]),
        ("ms_ms_matched == True", [0]),
        ("(rt > 8) & ~(ontology == 'Lipids')", [1]),
    ],
)
def test_queries_of_the_article_select_features(tmp_path, query, rows):
    (tmp_path / "features.csv").write_text("\n".join(MSDIAL))
    assert list(explain.read_features(tmp_path / "features.csv", RECIPE, query)["alignment_id"]) == rows


def test_tokens_and_channels_last_maps_become_channels_first():
    class Tokens:
        num_prefix_tokens = 1
        patch_embed = type("PatchEmbed", (), {"grid_size": (4, 5)})

    map_ = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5).float()
    tokens = torch.cat([torch.zeros(2, 1, 3), map_.flatten(2).transpose(1, 2)], 1)
    assert torch.equal(to_channels_first(tokens, Tokens), map_)
