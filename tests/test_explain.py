"""explain.py: positions survive, a planted peak is found, tables are read, queries cannot run code."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image, PngImagePlugin
from torch import nn

import explain
from convert import Problem, Recipe, picture_of_counts
from deeplcms import Classifier, Picture, loss_of, save_checkpoint, to_channels_first

RECIPE = Recipe(1.0, 11.0, 100.0, 900.0, bins=(64, 64), normalize="global", sigma=1.0)
PEAK = (4.37, 462.175)  # minutes and m/z of the article's morphine-3-glucuronide
MSDIAL = [
    "Alignment ID,Average Rt(min),Average Mz,Metabolite name,Ontology,Annotation tag (VS1.0),MS/MS matched",
    '0,4.370,462.17500,"Morphine-3-glucuronide, M3G",Morphinans,430,True',
    "1,8.500,300.00000,Unknown,,530,False",
    "2,2.500,700.00000,Somewhere else,Lipids,530,False",
    "3,20.000,300.00000,After the run,Lipids,430,False",
]


def write_picture(path, rng, has_peak):
    """A run of twelve compounds at random places, and PEAK (bins 21 and 28) if wanted."""
    counts = rng.random((64, 64)) * 0.001
    for column, row in rng.integers(4, 60, (12, 2)):
        counts[column, row] += 1
    (x,), (y,) = (np.atleast_1d(v) for v in RECIPE.to_fraction(*PEAK))
    column, row = int(x * 64), int((1 - y) * 64)
    counts[column - 3 : column + 4, row - 3 : row + 4] = 0.001
    counts[column, row] += has_peak
    path.parent.mkdir(parents=True, exist_ok=True)
    info = PngImagePlugin.PngInfo()
    for key, value in (RECIPE.to_text() | {"sample_name": path.stem}).items():
        info.add_text(key, value)
    Image.fromarray(picture_of_counts(counts, RECIPE)).save(path, pnginfo=info)


def write_run(folder, data, backbone, grid, epochs):
    """Train a classifier on all pictures of `data`, and save it in the form of train.py."""
    torch.manual_seed(0)
    model = Classifier(backbone, 2, grid, 64)
    pictures = [Picture(path, path.parent.name) for path in sorted(data.glob("test/*/*.png"))]
    transform = explain.evaluation_transform(64, model.mean, model.std)
    x = torch.stack([transform(picture.load()) for picture in pictures]).contiguous()
    y = torch.tensor([picture.phenotype == "user" for picture in pictures]).long()
    optimizer = torch.optim.Adamax(model.parameters(), lr=0.02)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(8):
            optimizer.zero_grad()
            loss_of(model(x[batch]), y[batch]).backward()
            optimizer.step()
    config = {"backbone": backbone, "data": str(data), "data_set": data.name, "weights_origin": "random initialisation"}
    contents = {"model": model.state_dict(), "backbone": backbone, "classes": ["non-user", "user"], "grid": model.grid}
    contents |= {"image_size": 64, "mean": list(model.mean), "std": list(model.std), "recipe": RECIPE.to_text()}
    folder.mkdir(parents=True)
    save_checkpoint(folder / "best.pt", contents | {"config": config})
    return folder


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Forty pictures that differ in one peak only, and features.csv beside them."""
    data, rng = tmp_path_factory.mktemp("peak"), np.random.default_rng(0)
    for i in range(40):
        write_picture(data / "test" / ("user" if i % 2 else "non-user") / f"run{i:02d}.png", rng, i % 2)
    (data / "features.csv").write_text("\n".join([",,,,,,Class"] * 4 + MSDIAL) + "\n")
    return data


@pytest.fixture(scope="module")
def runs(cohort, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return {
        "pixels": write_run(root / "pixels", cohort, "pixels", 16, 20),
        "test_resnet": write_run(root / "test_resnet", cohort, "test_resnet", 3, 12),
    }


def run_explain(*arguments):
    """explain.py in this process, as loading torch once is enough."""
    return explain.explain(explain.parse_arguments([*map(str, arguments)]))


# ---------------------------------------------------------------- positions


def test_resampling_keeps_every_position_to_half_a_pixel():
    ramp = ((torch.arange(16) + 0.5) / 16).expand(1, 16, 16)  # the value is the fraction of the axis
    fine = explain.resample(ramp, (64, 100))[0, 0]
    assert np.allclose(fine[4:-4], ((np.arange(100) + 0.5) / 100)[4:-4], atol=1e-6)


def test_units_of_strided_layers_are_placed_where_they_look():
    # Unit i of three convolutions of stride 2 and padding 1 is centred on pixel 8 i; plain upsampling says 8 i + 3.5.
    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            convolutions = (nn.Conv2d(n, 32, 3, stride=2, padding=1) for n in (3, 32, 32))
            self.layers = nn.Sequential(*convolutions)  # of 32 channels, so that no lopsided kernel counts for much

        forward = forward_features = lambda self, x: self.layers(x)

    model = Classifier("pixels", 2, 3, 128)
    torch.manual_seed(0)
    model.backbone = Backbone()
    model.head, model.standardize = nn.Linear(288, 1), nn.BatchNorm1d(288, affine=False)
    scores = explain.Scores(model, RECIPE).eval()
    for offset, scale in explain.receptive_centres(scores, model.backbone.layers, 128):
        middle = offset + scale * 0.5 - 0.5
        assert middle == pytest.approx(-3.5 / 128, abs=1 / 128)
    # A spot at unit (5, 9) is painted at pixel (40, 72) and not at (43.5, 75.5).
    spot = torch.zeros(1, 16, 16)
    spot[0, 5, 9] = 1
    map_ = explain.resample(spot, (128, 128), ((-3.5 / 128, 1.0), (-3.5 / 128, 1.0)))[0]
    assert divmod(int(map_.argmax()), 128) == (40, 72)


@pytest.mark.parametrize("name", ["pixels", "test_resnet"])
def test_the_box_of_the_hottest_region_holds_the_planted_peak(runs, name, capsys):
    assert run_explain(runs[name]) == 0
    out = runs[name] / "explain"
    boxes = pd.read_csv(out / "regions.csv")
    first = boxes.iloc[0]
    assert first.rt_min <= PEAK[0] <= first.rt_max and first.mz_min <= PEAK[1] <= first.mz_max
    assert (
        first.rt_max - first.rt_min < 3 and first.mz_max - first.mz_min < 240
    )  # and is smaller than a third of each axis
    assert boxes.heat.is_monotonic_decreasing
    assert "3 features inside the axes, 1 outside" in capsys.readouterr().out
    features = pd.read_csv(out / "features.csv")
    assert list(features["rank"]) == [1, 2, 3]
    assert features.name[0] == "Morphine-3-glucuronide, M3G"
    assert features["drop"][0] > 2 * features.drop_se[0] > 0  # blanking its box takes the evidence away
    assert {"heat_user", "heat_non-user", "heat_difference", "evidence"} <= set(features)
    for figure in ("cam_grid.png", "class_maps.png", "overlay.png"):
        with Image.open(out / figure) as image:
            assert min(image.size) > 500
    assert '"random_map"' in (out / "faithfulness.json").read_text()


# ---------------------------------------------------------------- layers and classes


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet", "swin"])
def test_any_kind_of_backbone_has_heat_for_either_class(backbone):
    model = Classifier("test_resnet" if backbone == "swin" else backbone, 2, 1, 64)
    if backbone == "swin":  # its maps are channels last; a small one, as Swin-T takes its time
        small = {
            "embed_dim": 16,
            "depths": (1, 1),
            "num_heads": (1, 2),
            "window_size": 4,
            "img_size": 64,
            "num_classes": 0,
        }
        model.backbone = timm.create_model("swin_tiny_patch4_window7_224", **small)
        model.standardize, model.head = nn.BatchNorm1d(32, affine=False), nn.Linear(32, 1)
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
    scores = explain.Scores(Classifier("pixels", 2, 8, 32).eval(), RECIPE)
    nn.init.normal_(scores.model.head.weight)
    z = scores(torch.rand(3, 3, 32, 32))
    assert z.shape == (3, 2) and torch.allclose(z[:, 0], -z[:, 1]) and z.abs().min() > 0
    # In its coordinates 0 is the colour of zero intensity: "nothing measured".
    blank = (torch.tensor(RECIPE.zero_colour() / 255).float()[:, None, None].expand(3, 32, 32) - 0.5) / 0.5
    assert torch.allclose(scores(torch.zeros(1, 3, 32, 32))[0, 1], scores.model(blank[None])[0, 0], atol=1e-5)


def test_evidence_is_where_the_network_looks_and_what_goes_with_its_calls():
    scores = explain.Scores(Classifier("pixels", 2, 8, 8).eval(), RECIPE)
    with torch.no_grad():
        scores.model.head.weight.zero_()
        scores.model.head.weight[0, [0, 1]] = torch.tensor([80.0, 1.0])  # of the first channel's first row
        scores.model.head.bias.fill_(-15)
    u = torch.zeros(6, 3, 8, 8)
    u[:, 0, 0, 0] = torch.arange(6.0)  # looked at, and varies: it makes the calls
    u[:, 0, 0, 1] = 3  # looked at, but the same in all pictures
    u[:, 0, 0, 2] = torch.arange(6.0)  # goes with the calls, but the network does not look
    for k in (0, 1):
        evidence = explain.evidence_map(scores, u, k)
        assert evidence.shape == (8, 8) and evidence[0, 0] > 0
        evidence[0, 0] = 0
        assert np.allclose(evidence, 0)
    # Where all are called alike, what differs from the blank picture counts.
    for alike in (u[-1:], u[-2:]):
        assert (explain.evidence_map(scores, alike, 1)[0, :3] > 0).tolist() == [True, True, False]


def test_no_flag_overwrites_the_answer_of_another(runs):
    names = [runs["pixels"] / "explain", runs["pixels"] / "explain" / "class-non-user"]
    assert run_explain(runs["pixels"]) == run_explain(runs["pixels"], "--class", "non-user", "--n", 2, "--top", 1) == 0
    assert all((folder / "features.csv").is_file() for folder in names)
    table = pd.read_csv(names[1] / "features.csv")
    # Its absence tells a non-user: as much evidence, but there is nothing to blank in a non-user's picture.
    assert table.name[0].startswith("Morphine") and table["drop"].notna().sum() == 1
    assert table["drop"][0] < 0.2 * pd.read_csv(names[0] / "features.csv")["drop"][0]


def test_new_pictures_are_explained_and_those_of_other_axes_refused(runs, tmp_path):
    write_picture(tmp_path / "new.png", np.random.default_rng(5), 1)
    assert run_explain(runs["pixels"], "--input", tmp_path / "new.png") == 0
    with Image.open(tmp_path / "new.png") as image:
        info = PngImagePlugin.PngInfo()
        for key, value in (image.text | {"rt_max": "12.0"}).items():
            info.add_text(key, value)
        image.save(tmp_path / "moved.png", pnginfo=info)
    with pytest.raises(Problem, match="rt_max is 12.0, the run was trained with 11.0"):
        run_explain(runs["pixels"], "--input", tmp_path / "moved.png")


def test_a_raw_run_is_explained_as_its_picture_is(demo, run):
    picture = next(demo.glob("test/exposed/*.png"))
    tables = []
    for source in (picture, demo / "raw" / f"{picture.stem}.mzML"):
        flags = ["--layers", "layer1", "layer2", "--query", "average_rt_min_ < 5 and ontology == 'planted'"]
        assert run_explain(run, "--input", source, "--features", demo / "features.csv", *flags) == 0
        answers = sorted(run.glob("explain/input-*layer1+layer2*/features.csv"), key=lambda path: path.stat().st_mtime)
        tables.append(pd.read_csv(answers[-1]))
    first, second = tables
    first.to_csv(run / "again.csv", index=False)  # the answer is a table of features itself
    assert run_explain(run, "--input", picture, "--features", run / "again.csv") == 0
    assert len(first) and (first.rt < 5).all() and set(first.ontology) == {"planted"}
    columns = ["rank", "name", "evidence", "drop"]  # heat is named after the phenotype, which a raw run has not
    pd.testing.assert_frame_equal(first[columns], second[columns], rtol=1e-4, atol=1e-6)


def test_a_folder_of_runs_is_explained_and_what_evidence_means_is_said(demo, run, tmp_path, capsys):
    pooled = tmp_path / "pooled"
    pooled.mkdir()
    picture = next(demo.glob("test/exposed/*.png"))
    for name in ("one", "two"):
        shutil.copy(demo / "raw" / f"{picture.stem}.mzML", pooled / f"{name}.mzML")
    assert run_explain(run, "--input", pooled) == 0
    said = capsys.readouterr().out
    assert "evidence is what differs from a blank picture, not covariance" in said
    assert "2 pictures explained" in said


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["--layers", "layer_1"], "no layer of this backbone; the nearest: layer1"),
        (["--class", "nobody"], "'nobody' is not one of non-user, user"),
        (["--input", "nowhere.mzML"], "nowhere.mzML: no such file"),
        (["--query", "average_rt < 5"], "'average_rt' is no column; the nearest: average_rt_min_"),
        (["--n", "0"], "--n: 0 must be a whole number of at least 1"),
    ],
)
def test_wrong_flags_are_answered_with_what_is_right(runs, arguments, answer):
    with pytest.raises(Problem, match=answer) as problem:
        run_explain(runs["test_resnet"], *arguments)
    assert problem.value.status == 2


def test_a_wrong_command_prints_one_line_and_no_traceback(runs):
    command = [sys.executable, "explain.py", str(runs["pixels"]), "--layers", "layer1"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(explain.__file__).parent)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "explain.py: --layers 'layer1': the backbone 'pixels' has no layers\n"


# ---------------------------------------------------------------- tables and queries


def table_of(tmp_path, text):
    (tmp_path / "features.txt").write_text(text, encoding="utf-8-sig")
    return explain.read_features(tmp_path / "features.txt")


@pytest.mark.parametrize("preamble", [0, 4])
@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
def test_an_msdial_export_is_read_with_or_without_its_four_header_lines(tmp_path, preamble, delimiter):
    lines = [line.replace('"Morphine-3-glucuronide, M3G"', "M3G").replace(",", delimiter) for line in MSDIAL]
    table = table_of(tmp_path, "\n".join([delimiter * 6 + "Class"] * preamble + lines))
    assert (table.rt[0], table.mz[0], table.name[0]) == (4.37, 462.175, "M3G")
    assert {"average_rt_min_", "average_mz", "annotation_tag_vs1_0_", "ms_ms_matched"} <= set(table)


def test_peak_lists_and_plain_tables_are_read(tmp_path):
    table = table_of(tmp_path, "Peak ID\tTitle\tRT (min)\tPrecursor m/z\n1\tcaffeine\t2.1\t195.0877\n")
    assert (table.rt[0], table.mz[0], table.name[0]) == (2.1, 195.0877, "caffeine")
    assert table_of(tmp_path, "rt,mz\n1,2\n").rt[0] == 1
    with pytest.raises(Problem, match="line 3: rt 'x' is not a number"):
        table_of(tmp_path, "rt,mz,name\n1,2,a\nx,2,b\n")
    with pytest.raises(Problem, match="no header"):
        table_of(tmp_path, "a,b\n1,2\n")


@pytest.mark.parametrize(
    ("query", "rows"),
    [
        ("3.5<average_rt_min_<5 and 460<average_mz<500", [0]),  # the article's
        ("annotation_tag_vs1_0_ == '430'", [0, 3]),
        ("annotation_tag_vs1_0_ == 430", [0, 3]),
        ("annotation_tag_vs1_0_ in [430, 530] and rt < 3", [2]),
        ("annotation_tag_vs1_0_.str.startswith('4')", [0, 3]),
        ("ms_ms_matched == True", [0]),
        ("(rt > 8) & ~(ontology == 'Lipids')", [1]),
    ],
)
def test_queries_of_the_article_select_features(tmp_path, query, rows):
    assert list(explain.select(table_of(tmp_path, "\n".join(MSDIAL)), query).index) == rows


@pytest.mark.parametrize(
    ("query", "part"),
    [
        ("@pd.read_csv('x')", "@pd"),
        ("__import__('os').system('touch hacked')", "__import__"),
        ("rt.__class__ == 1", "rt.__class__"),
        ("rt.map(print)", "rt.map"),
        ("name.str.__init__('x')", "__init__"),
        ("[x for x in rt]", "x for x"),
        ("rt <", "rt <"),
        ("retention < 5", "retention"),
        ("rt = 5", "rt = 5"),
        ("rt > 1000", "rt > 1000"),
    ],
)
def test_a_query_runs_no_code_and_is_refused_with_its_offending_part(tmp_path, query, part):
    with pytest.raises(Problem) as problem:
        explain.select(table_of(tmp_path, "\n".join(MSDIAL)), query)
    assert part in str(problem.value) and "\n" not in str(problem.value)
    assert not Path("hacked").exists()


def test_tokens_and_channels_last_maps_become_channels_first():
    class Tokens:
        num_prefix_tokens = 1

    map_ = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5).float()
    Tokens.patch_embed = type("PatchEmbed", (), {"grid_size": (4, 5)})
    tokens = torch.cat([torch.zeros(2, 1, 3), map_.flatten(2).transpose(1, 2)], 1)
    assert torch.equal(to_channels_first(tokens, Tokens), map_)
