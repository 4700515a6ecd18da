"""Where does the network look, and which compounds are there? Article, "Explaining the model" (Figures 6-8, Table 3).

    python explain.py                                              # newest run, all its pictures, positive class
    python explain.py runs/golestan/mobileone_s3/seed2643 --features alignment.csv --query "3.5 < average_rt_min_ < 5"
    python explain.py --class control --layers layer2 --n 4 --out control
    python explain.py --input pooled.mzML new_run.mzML.gz

t (Welch's test): do the phenotypes differ at a feature's place, in these runs? evidence, the correlation of intensity
there with the network's probability from run to run: do its calls go with it? Its size ranks the features, its sign is
the direction. Heat (LayerCAM) shows roughly where a picture's probability comes from, and whatever is bright.

Neither proves a cause: a network needs only some of the compounds that differ, and neighbours in a box (in_box) look
the same to it. The ranking uses all pictures. The network has memorised those it was trained on, so evidence is close
to t; --split test ranks by unseen pictures alone. q tests the predictions, right or wrong. The network computes them
from these intensities, so some correlate even where the phenotypes do not differ: inclusion.csv also needs t_q < 0.05.

Written to RUN/explain/: cam_grid.png, overlay.png, features.csv, and inclusion.csv, as Orbitraps import a mass list.
"""

import argparse
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import timm
import torch
from matplotlib.colors import PowerNorm
from scipy import ndimage
from scipy.sparse.linalg import eigsh
from scipy.stats import beta, false_discovery_control, ttest_ind
from torch import nn
from torchcam.methods import LayerCAM
from tqdm import tqdm

from deeplcms import SPLITS, Help, InputError, clean_title, count, list_files, first_line, read_table
from deeplcms import run_script, write_table
from evaluate import FEWEST, pick_in_turn, label_axes, read_files, read_split, show, make_title, predict_probabilities
from train import DEVICE, figure, find_run, make_inputs, load_run


# ---------------------------------------------------------------- heat: where a picture's probability comes from
class Scores(nn.Module):
    """Score of each class (N, K) of inputs: one logit z stands for the pair (-z, z), so that both can be explained."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        for module in model.modules():
            if hasattr(module, "inplace"):
                module.inplace = False  # it would overwrite the activation that a hook keeps

    def forward(self, x):
        z = self.model(x)
        return torch.cat([-z, z], 1) if z.shape[1] == 1 else z


def choose_layers(model, names=None):
    """[names of modules of the model to explain]; none where the head sees the picture alone.

    Default: the finest map that the head sees, at its tap. Where that is the network's last, which is coarse and looks
    up to 7 % of the axis away from where upsampling paints it, the deepest map of a quarter of the picture's side.
    """
    modules = dict(model.backbone.named_modules())
    stages = list(getattr(model.backbone, "feature_info", []))
    for name in names or []:
        if name not in modules:
            listed = [stage["module"] for stage in stages if stage["module"] in modules]
            known = ", ".join(listed) or "none"
            raise InputError(f"--layers {name!r} is no layer of this backbone; those that timm lists: {known}")
    if not names and model.maps and stages[model.maps[0]]["reduction"] == stages[-1]["reduction"]:
        fine = max(4, stages[0]["reduction"])
        names = [stage["module"] for stage in stages if stage["reduction"] <= fine and stage["module"] in modules][-1:]
    return [f"backbone.{name}" for name in names or []] or ["taps.0"] * bool(model.maps)


def compute_cams(model, layers, recipe, pictures, k):
    """Yield LayerCAM of class k, unnormalised, layers fused, of each picture uint8 (height, width), in its shape."""
    scores = Scores(model).eval()
    targets = [f"model.{name}" for name in layers]
    of_backbone = layers[0].startswith("backbone")  # a tap has channels first
    reshape = (lambda y: to_channels_first(y, model.backbone)) if of_backbone else None
    with LayerCAM(scores, targets, reshape_transform=reshape) as cam:
        for picture in tqdm(pictures, desc="heat", unit="picture", disable=None, leave=False):
            x = make_inputs(model, recipe, [picture]).to(DEVICE).requires_grad_(True)
            try:
                heat = cam.fuse_cams(cam(k, scores(x), normalized=False))
            except (AssertionError, AttributeError, RuntimeError) as error:  # the logits do not come from there
                reason = f"{', '.join(layers)} ({first_line(error)})"
                raise InputError(f"no heat at {reason}; name others with --layers") from None
            yield resize_maps(heat.float(), picture.shape)[0].cpu().numpy()


def to_channels_first(y, backbone):
    """Tokens (N, L, C) of a ViT or channels-last maps (N, H, W, C) of a Swin -> (N, C, H, W)."""
    if y.ndim == 3:
        square = (math.isqrt(y.shape[1]),) * 2
        grid_size = getattr(getattr(backbone, "patch_embed", None), "grid_size", None) or square
        y = y[:, -math.prod(grid_size) :]  # class and register tokens come first and have no place
        return y.transpose(1, 2).unflatten(2, grid_size)
    if getattr(backbone, "output_fmt", "NCHW") == "NHWC":
        return y.permute(0, 3, 1, 2)
    return y


def resize_maps(maps, shape):
    """Maps (N, h, w) -> (N, *shape)."""
    return nn.functional.interpolate(maps[:, None], shape, mode="bilinear", align_corners=False)[:, 0]


# ---------------------------------------------------------------- evidence: what goes with the calls
def local_intensity(picture, recipe, drift):
    """Mean log intensity (height, width) within `drift` minutes of each pixel: retention differs from run to run.

    With --normalize rt a strong compound makes all that elutes with it look weaker: there the mean of a window twenty
    times taller in m/z is subtracted.
    """
    levels = picture / np.float32(255)
    wide = 2 * round(drift / recipe.bin_size()[0]) + 1
    high = 2 * round(max(recipe.sigma, 1) / 2) + 1
    local = ndimage.uniform_filter(levels, (high, wide))
    if recipe.normalize == "rt":
        local -= ndimage.uniform_filter(levels, (20 * high + 1, wide))
    return local


def column_chunks(intensities):
    """Yield (columns, float32 block) of intensities (N, P), a few million numbers at a time."""
    width = 2**23 // len(intensities)
    for first in range(0, intensities.shape[1], width):
        columns = slice(first, first + width)
        yield columns, intensities[:, columns].astype(np.float32)


def find_common_components(intensities, p, most=0.1):
    """Unit vectors (N, 2 or fewer): what whole pictures, intensities (N, P), have in common, but for the class itself.

    Batches and drift change whole pictures, and by chance go with the probabilities p (N,) a little. They are the first
    two principal components of the pictures (Price et al. 2006 find populations in genotypes by them). A component that
    explains `most` of the variance of p or more is taken for the class itself, and is left out.
    """
    gram = np.zeros((len(p), len(p)))
    for _, x in column_chunks(intensities):
        x -= x.mean(axis=0)
        gram += x @ x.T
    _, components = eigsh(gram, k=2)
    p = p - p.mean()
    explained = (components.T @ p) ** 2 / (p @ p)
    return components[:, explained < most]


def project_out(x, components):
    """x (N,) or (N, P), a row a picture, less its mean and the components (N, 2)."""
    x = x - x.mean(axis=0)
    return x - components @ (components.T @ x)


def compute_evidence(intensities, p, components):
    """Correlation (P,) of intensities (N, P) with the probabilities p (N,), both cleared; 0 where all is constant.

    The true phenotypes take no part. A slope in place of the correlation would favour compounds that vary much.
    """
    p = project_out(p, components)
    evidence = np.zeros(intensities.shape[1])
    for columns, x in column_chunks(intensities):
        x = project_out(x, components)
        lengths = np.linalg.norm(x, axis=0) * np.linalg.norm(p)
        evidence[columns] = p @ x / np.where(lengths > 1e-6, lengths, np.inf)
    return evidence


# ---------------------------------------------------------------- features
COLUMNS = {
    "rt": ("average_rt_min_", "rt_min_", "rt", "retention_time", "retention_time_min_", "row_retention_time", "rtmed"),
    "mz": ("average_mz", "precursor_m_z", "mz", "m_z", "precursor_mz", "row_m_z", "mzmed"),
    "name": ("metabolite_name", "title", "name", "compound", "compound_name"),
}


def find_column(kind, titles):
    """The first of the usual titles of rt, mz or name that is among these; None where there is none."""
    return next((title for title in COLUMNS[kind] if title in titles), None)


def read_features(path, recipe, query=None):
    """Table of features inside the axes, columns cleaned, with rt (minutes), mz and name found by the usual titles.

    An export of MS-DIAL, Progenesis, mzmine or XCMS (up to nine lines before the header) or any table with these three.
    The query is pandas', on the cleaned names; whoever types it owns the shell, so it may do what pandas lets it.
    """
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        lines = [list(map(clean_title, re.split("[,;\t]", line))) for line in file.readlines()[:10]]
    header = next((i for i, line in enumerate(lines) if find_column("rt", line) and find_column("mz", line)), 0)
    table = read_table(path, header, dtype=None, keep_default_na=True)
    rt, mz, name = (find_column(kind, table) for kind in COLUMNS)
    if not (rt and mz):
        usual = "retention time ('Average Rt(min)', 'rt') and m/z ('Average Mz', 'mz')"
        raise InputError(f"{path}: no columns of {usual}; found: {', '.join(table.columns[:20])}")
    for tag in table.filter(like="annotation_tag"):
        table[tag] = table[tag].astype(str).str.removesuffix(".0")  # == '430' works whatever the column holds
    for kind, title in (("rt", rt), ("mz", mz)):
        values = pd.to_numeric(table[title], errors="coerce")
        if values.isna().any():
            row = values.isna().argmax()
            raise InputError(f"{path}, row {row + header + 2}: {title} {table[title][row]} is not a number")
        table[kind] = values
    table["name"] = table[name].astype(object).fillna("").astype(str) if name else ""
    if query:
        # Names with runs of underscores, as pyjanitor leaves them and the article has them, mean the same; text stays.
        spelt = re.sub(r"""('[^']*'|"[^"]*")|_+""", lambda found: found[1] or "_", query)
        try:
            table = table.query(spelt, engine="python")
        except Exception as error:  # of pandas and of Python, by what is wrong
            raise InputError(f"--query {query!r}: {first_line(error)} (columns: {', '.join(table.columns)})") from None
    inside = table["rt"].between(recipe.rt_min, recipe.rt_max) & table["mz"].between(recipe.mz_min, recipe.mz_max)
    print(f"features: {path}, {inside.sum()} inside the axes, {(~inside).sum()} outside")
    if not inside.any():
        raise InputError(f"{path}: no feature is left (--query? retention times in seconds?)")
    if inside.mean() < 0.5:
        print("warning: most features are outside; are their retention times in seconds, or the axes narrow?")
    return table[inside].reset_index(drop=True)


def look_up(maps, table, recipe):
    """Value (..., F) of maps (..., height * width) at the place of each feature."""
    width, height = recipe.bins
    x, y = recipe.to_fraction(table["rt"], table["mz"])
    column = np.minimum((x * width).astype(int), width - 1)
    row = np.minimum((y * height).astype(int), height - 1)
    return maps[..., row * width + column]


def compute_evidence_p(r, n_free):
    """Table of direction, Pearson's p and Benjamini and Hochberg's q of evidence r (F,), n_free degrees of freedom."""
    p = 2 * beta.sf(abs(r), n_free / 2, n_free / 2, loc=-1, scale=2)  # Pearson's r of chance is a beta from -1 to 1
    return pd.DataFrame({"direction": np.where(r > 0, "up", "down"), "p": p, "q": false_discovery_control(p)})


def compare_phenotypes(intensities, of_class):
    """Table of Welch's t of features' intensities (N, F) and its q; of_class (N,): 1, 0, or nan where unknown."""
    groups = intensities[of_class == 1], intensities[of_class == 0]
    if min(map(len, groups)) < 2:
        return pd.DataFrame({"t": np.nan, "t_q": np.nan}, range(intensities.shape[1]))
    test = ttest_ind(*groups, equal_var=False)
    p = np.nan_to_num(test.pvalue, nan=1)
    return pd.DataFrame({"t": test.statistic, "t_q": false_discovery_control(p)})


def rank_features(table, evidence, tests, half_box):
    """The features by size of evidence (F,), with their tests, and how many others lie within half_box, in_box."""
    own = table[["rt", "mz", "name"]].assign(evidence=abs(evidence)).join(tests)
    places = table[["rt", "mz"]].to_numpy()
    own["in_box"] = [(abs(places - place) <= half_box).all(axis=1).sum() - 1 for place in places]
    ranking = own.join(table.drop(columns=["rank", *own], errors="ignore"))  # but for columns of an earlier answer
    ranking = ranking.sort_values("evidence", ascending=False, kind="stable")
    ranking.insert(0, "rank", range(1, len(ranking) + 1))
    return ranking


def make_inclusion_list(table, drift):
    """The features whose q and t_q are below 0.05, or unknown, as an Orbitrap's mass list; charge 1 is assumed."""
    table = table[~(table[["q", "t_q"]] >= 0.05).any(axis=1)]
    columns = {"Compound": table["name"], "Formula": "", "Adduct": "(no adduct)", "m/z": table["mz"], "z": 1}
    columns |= {"t start (min)": (table["rt"] - drift).clip(0), "t stop (min)": table["rt"] + drift}
    return pd.DataFrame(columns).round(5)


# ---------------------------------------------------------------- figures
def draw_cam_grid(path, shown, pictures, maps, recipe, title):
    """Article Figure 6: pictures with their phenotype and probability, map over picture, all maps on one scale."""
    n = math.ceil(len(shown) ** 0.5)
    size = (3.4 * n + 2, 3 * n + 1)
    scale = PowerNorm(0.5, 0, np.max(maps) or 1)  # the root shows weaker spots, too
    with figure(path, title, size, nrows=n, ncols=n, sharex=True, sharey=True, squeeze=False) as axes:
        for axis, row, picture, map_ in zip(axes.flat, shown.itertuples(), pictures, maps, strict=False):
            show(axis, picture, recipe, cmap="gray", vmin=0, vmax=255)
            heat = show(axis, map_, recipe, cmap="inferno", norm=scale, alpha=np.clip(0.15 + scale(map_), 0, 0.9))
            axis.set_title(f"{row.sample_name}: {row.phenotype}\n{row.caption}", fontsize=9)
        axis.figure.colorbar(heat, ax=axes, label="heat")
        label_axes(axes)


def draw_overlay(path, evidence, meaning, table, recipe, title):
    """Article Figures 7 and 8: features over the evidence, up or down in the class, the first of the ranking named."""
    with figure(path, title, (11, 6.5)) as axis:
        highest = abs(evidence).max() or 1
        shown = show(axis, evidence, recipe, cmap="RdBu_r", vmin=-highest, vmax=highest)
        axis.figure.colorbar(shown, ax=axis, location="bottom", shrink=0.9, aspect=40, label=meaning)
        first = table.head(10).sort_values("mz").reset_index(drop=True)
        axis.plot("rt", "mz", "o", data=table, markersize=2.5, color="0.45", label="feature")
        axis.plot("rt", "mz", "ko", data=first, markersize=11, fillstyle="none", label=f"first {len(first)}")
        certain = table[table["q"] < 0.05]
        for direction, marker, color in (("up", "^", "darkred"), ("down", "v", "navy")):
            found = certain[certain["direction"] == direction]
            axis.plot("rt", "mz", marker, data=found, color=color, mec="white", label=f"{direction}, q < 0.05")
        # Names stand in a column beside the map, in the order of m/z, each joined to its point: they cannot overlap.
        line = {"arrowstyle": "-", "color": "0.4", "lw": 0.6, "relpos": (0, 0.5)}
        beside = {"textcoords": "axes fraction", "va": "center", "fontsize": 8, "arrowprops": line}
        for row in first.itertuples():
            text = f"{row.rank}. {row.name[:34] or 'unknown'}\n    {row.rt:.2f} min, m/z {row.mz:.3f}"
            axis.annotate(text, (row.rt, row.mz), (1.03, (row.Index + 0.5) / len(first)), **beside)
        axis.set(xlabel="retention time (min)", ylabel="m/z")
        axis.legend(loc="upper left", fontsize=8)


# ---------------------------------------------------------------- one command
def explain(args):
    run = find_run(args.run)
    model, checkpoint = load_run(run)
    model = timm.utils.reparameterize_model(model)  # branches fused (MobileOne, RepVGG): the same in less time
    recipe, config = checkpoint["recipe"], checkpoint["config"]
    classes = config["classes"]
    class_name = args.class_name or classes[-1]
    if class_name not in classes:
        raise InputError(f"--class {class_name!r} is not one of {', '.join(classes)}")
    k = classes.index(class_name)
    layers = choose_layers(model, args.layers)
    title = make_title([checkpoint], f"{config['data_set']}, class '{class_name}'")
    print(title)
    data = args.data or config["data"]
    if args.input:
        table, pictures = read_files(list_files(args.input), recipe)
    else:
        table, pictures = read_split(checkpoint, data, args.split)
    path, features = Path(args.features or Path(data) / "features.csv"), None
    if args.features or args.query or path.exists():
        features = read_features(path, recipe, args.query)  # before the work: a bad table should not cost two minutes

    [probabilities] = predict_probabilities([model], recipe, pictures)  # (N, K)
    out = Path(args.out or run / "explain")
    out.mkdir(parents=True, exist_ok=True)
    if layers:
        table["caption"] = [f"P({class_name}) = {value:.2f}" for value in probabilities[:, k]]
        shown = pick_in_turn(table, args.n)
        of_shown = [pictures[i] for i in shown.index]
        try:
            maps = list(compute_cams(model, layers, recipe, of_shown, k))
            where = ", ".join(layers).replace("taps.0", f"the map of stride {model.scales[-len(model.maps)][0]}")
            draw_cam_grid(out / "cam_grid.png", shown, of_shown, maps, recipe, f"LayerCAM at {where}; {title}")
        except InputError as error:  # the ranking of features needs no heat
            if args.layers or features is None:
                raise
            print(f"no cam_grid.png: {error}")
    else:
        print("no cam_grid.png: the head sees the picture alone")

    if features is not None:
        # The mean over the injections of a person (of each phenotype: before and after) is one run of n.
        runs = table.groupby(["group", "phenotype"]).indices  # {(group, phenotype): pictures}
        probabilities = np.array([probabilities[own].mean(axis=0) for own in runs.values()])  # (n, K)
        p = probabilities[:, k]
        measured = np.empty((len(runs), pictures[0].size), np.float16)  # (n, height * width)
        for i, own in enumerate(tqdm(runs.values(), desc="evidence", disable=None, leave=False)):
            measured[i] = np.mean(
                [local_intensity(pictures[j], recipe, args.rt_tolerance).ravel() for j in own], axis=0
            )
        if len(runs) >= FEWEST and np.ptp(p) > 0:
            components = find_common_components(measured, p)
            evidence = compute_evidence(measured, p, components)
            meaning = f"evidence: red up, blue down in {class_name}"
            calls = compute_evidence_p(look_up(evidence, features, recipe), len(p) - 2 - components.shape[1])
        elif layers:
            print(
                f"probabilities all alike, or of fewer than {FEWEST} runs: in place of evidence stands their mean heat"
            )
            evidence = sum(compute_cams(model, layers, recipe, pictures, k)).ravel() / len(pictures)
            meaning = "mean heat, in place of evidence"
            calls = pd.DataFrame({"direction": "", "p": np.nan, "q": np.nan}, features.index)
        else:
            raise InputError(
                f"probabilities all alike, or of fewer than {FEWEST} runs: there is no evidence to rank by"
            )
        phenotype = pd.Series([phenotype for _, phenotype in runs])
        of_class = (phenotype == class_name).where(phenotype.isin(classes)).to_numpy(float)  # nan where unknown
        intensities = look_up(measured, features, recipe).astype(float)
        half_box = [args.rt_tolerance, 2 * max(recipe.sigma, 1) * recipe.bin_size()[1]]
        tests = calls.join(compare_phenotypes(intensities, of_class))
        ranking = rank_features(features, look_up(evidence, features, recipe), tests, half_box)
        write_table(out / "features.csv", ranking)
        write_table(out / "inclusion.csv", make_inclusion_list(ranking, args.rt_tolerance))
        columns = ["rank", "rt", "mz", "evidence", "direction", "q", "t", "t_q", "in_box", "name"]
        print(ranking[columns].head(10).to_string(index=False, float_format="{:.3g}".format))
        heading = f"Features over the evidence; {title}"
        draw_overlay(out / "overlay.png", evidence.reshape(pictures[0].shape), meaning, ranking, recipe, heading)
    print(f"{len(table)} pictures explained in {out}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("run", nargs="?", help="run folder of train.py (default: the newest under runs/)")
    parser.add_argument("--out", metavar="DIR", help="folder for results (default: RUN/explain)")
    add = parser.add_argument_group("pictures").add_argument
    add("--split", choices=[*SPLITS, "all"], default="all", help="those that the run was fitted to are called by heart")
    add("--data", metavar="DIR", help="the data set, if it is no longer where the run was trained")
    add("--input", nargs="+", metavar="FILE", help="pictures, raw runs, or folders of raw runs, in place of a split")
    add("--n", type=count, default=9, help="pictures in cam_grid.png")
    add = parser.add_argument_group("map").add_argument
    add("--class", dest="class_name", metavar="NAME", help="phenotype to explain (default: the positive one)")
    add("--layers", nargs="+", metavar="NAME", help="layers of the backbone (default: the finest that the head sees)")
    add = parser.add_argument_group("features").add_argument
    add("--features", metavar="CSV", help="MS-DIAL export or rt (minutes), mz, name (default: the data's features.csv)")
    add("--query", help="pandas query on the cleaned column names, such as '460 < average_mz < 500'")
    add("--rt-tolerance", type=float, default=0.3, metavar="MINUTES", help="of retention: half a box's width")
    args = parser.parse_args()
    if not 0 <= args.rt_tolerance < math.inf:
        parser.error("--rt-tolerance is a number of minutes from 0 on")
    explain(args)


if __name__ == "__main__":
    run_script(main)
