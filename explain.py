"""Where does the network look, and which compounds lie there?

Article, "Explaining the model" (Figures 6-8, Table 3).

    python explain.py                     # newest run, all its pictures, positive class
    python explain.py --features alignment.csv --query "3.5 < average_rt_min_ < 5"
    python explain.py runs/golestan/mobileone_s3/seed2643 --class control --layers layer2
    python explain.py --input pooled.mzML new_run.mzML.gz

cam_grid.png shows class activation maps (CAM, by LayerCAM) of a few pictures: roughly where the
predicted probability comes from; some bright spots mean nothing. If there is a list of features,
evidence ranks them in features.csv; overlay.png draws them; inclusion.csv is a mass list for an
Orbitrap.

Evidence is the partial correlation, across samples, of local intensity and predicted probability.
The first two principal components of the pictures (batches, retention shifts) are projected out.
The size of the evidence ranks a feature, its sign is the direction, and q is its adjusted p-value.
t (Welch's test) compares the true phenotypes at a feature, and t_q is its adjusted p-value.

Neither proves a cause: a network needs only some of the compounds that differ, and it cannot tell
neighbours apart (in_box counts them). It has memorised the training pictures, so their evidence
resembles t; --split test uses unseen pictures only. Predictions are computed from the intensities,
so a few features have a low q anyway. So inclusion.csv has no q or t_q of 0.05 or more.
"""

import argparse
import math
import re
from functools import partial
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

from deeplcms import SPLITS, Help, InputError, clean_title, count, first_few, first_line
from deeplcms import list_files, read_table, run_script, write_table
from evaluate import MIN_GROUPS, label_axes, make_title, pick_in_turn, predict_probabilities
from evaluate import read_files, read_split, show
from train import DEVICE, figure, find_run, load_run, make_inputs, progress


def explain(args):
    """Load a run and pictures, draw CAMs of a few pictures, rank the features by evidence."""
    run = find_run(args.run)
    model, checkpoint = load_run(run)
    model = timm.utils.reparameterize_model(model)  # fuses branches: same output, faster
    recipe = checkpoint["recipe"]
    config = checkpoint["config"]
    classes = config["classes"]
    class_name = args.class_name or classes[-1]
    if class_name not in classes:
        raise InputError(f"--class {class_name}: the classes are {', '.join(classes)}")
    k = classes.index(class_name)
    layers = choose_layers(model, args.layers)
    title = make_title([checkpoint], f"{config['data_set']}, class '{class_name}'")
    print(title)
    data = args.data or config["data"]
    path = Path(args.features or f"{data}/features.csv")
    features = None
    if args.features or args.query or path.exists():
        features = read_features(path, recipe, args.query)
    if args.input:
        table, pictures = read_files(list_files(args.input), recipe)
    else:
        table, pictures = read_split(checkpoint, data, args.split)
    table["probability"] = predict_probabilities([model], recipe, pictures)[0, :, k]
    known = dict.fromkeys(classes, 0.0) | {class_name: 1.0}
    table["in_class"] = table["phenotype"].map(known)
    out = Path(args.out or run / "explain")
    out.mkdir(parents=True, exist_ok=True)

    make_cams = partial(compute_cams, model, layers, recipe, k=k)
    shown = pick_in_turn(table, args.n)
    try:
        cams = list(make_cams([pictures[i] for i in shown.index]))
        place = ", ".join(layers).replace("taps.0", "the finest map of the head")
        draw_cam_grid(out / "cam_grid.png", shown, pictures, cams, recipe, f"LayerCAM at {place}; {title}")
    except InputError as error:  # a CAM is needed if it was asked for, or if nothing else is made
        if args.layers or (layers and features is None):
            raise
        print(f"no cam_grid.png: {error}")

    if features is not None:
        tolerance = args.rt_tolerance
        ranking, evidence = rank_by_evidence(features, table, pictures, recipe, tolerance, make_cams)
        write_table(out / "features.csv", ranking)
        write_table(out / "inclusion.csv", make_inclusion_list(ranking, tolerance))
        columns = "rank rt mz evidence direction q t t_q in_box name".split()
        first = ranking[columns].head(10)
        print(first.to_string(index=False, float_format="{:.3g}".format))
        draw_overlay(out / "overlay.png", evidence, ranking, recipe, title)
    print(f"{len(table)} pictures explained in {out}")


def rank_by_evidence(features, table, pictures, recipe, tolerance, make_cams):
    """(features ranked by evidence, or else by the mean CAM; that map (height, width))"""
    samples = table.groupby(["group", "phenotype"])  # repeated injections are one sample: their mean
    p, in_class = samples[["probability", "in_class"]].mean().to_numpy().T
    intensities = np.empty((len(p), pictures[0].size), np.float16)
    for i, (_, injections) in enumerate(progress(samples, "evidence")):
        local = [local_intensity(pictures[j], recipe, tolerance) for j in injections.index]
        intensities[i] = np.mean(local, axis=0).ravel()
    measured = look_up_values(intensities, features, recipe).astype(float)
    tests = compare_phenotypes(measured, in_class)
    if len(p) >= MIN_GROUPS and np.ptp(p) > 0:
        components = find_common_components(intensities, p)
        evidence = compute_evidence(intensities, p, components)
        at_features = look_up_values(evidence, features, recipe)
        n_free = len(p) - 2 - components.shape[1]
        tests = tests.join(compute_evidence_p(at_features, n_free))
    else:
        print(f"equal probabilities or fewer than {MIN_GROUPS} samples: mean CAM replaces evidence")
        evidence = sum(make_cams(pictures)).ravel() / len(pictures)
        at_features = look_up_values(evidence, features, recipe)
    half_box = [tolerance, 2 * max(recipe.sigma, 1) * recipe.bin_size()[1]]
    ranking = rank_features(features, at_features, tests, half_box)
    return ranking, evidence.reshape(pictures[0].shape)


# ---------------------------------------------------------------- CAMs
def choose_layers(model, names=None):
    """Layers of the backbone with these names, or else the finest map that the head sees."""
    modules = dict(model.backbone.named_modules())
    stages = getattr(model.backbone, "feature_info", [])
    listed = [stage["module"] for stage in stages if stage["module"] in modules]
    if unknown := set(names or []) - set(modules):
        known = f"those that timm lists: {', '.join(listed) or 'none'}"
        raise InputError(f"--layers {first_few(unknown)}: no layer of this backbone; {known}")
    if names:
        return [f"backbone.{name}" for name in names]
    if not model.map_indices:
        return []  # the head sees the picture alone
    # The last map's CAM is misplaced by up to 7 % of the axis: use the last layer of stride 4.
    if model.map_indices[0] == len(stages) - 1:
        stride = max(4, stages[0]["reduction"])
        name = [stage["module"] for stage in stages if stage["reduction"] <= stride][-1]
        if name in listed and not isinstance(modules[name], nn.ModuleList):  # a list has no output
            return [f"backbone.{name}"]
    return ["taps.0"]


def compute_cams(model, layers, recipe, pictures, k):
    """Yield the CAM of class k of each picture, float (height, width); InputError without one."""
    if not layers:
        raise InputError("the head sees the picture alone, so there is no CAM")
    # A tap is channels-first already.
    reshape = None if layers == ["taps.0"] else partial(to_channels_first, backbone=model.backbone)
    try:
        with LayerCAM(model, layers, reshape_transform=reshape) as cam:
            for picture in progress(pictures, "CAMs"):
                x = make_inputs(model, recipe, [picture]).to(DEVICE)
                logits = model(x.requires_grad_())
                if logits.shape[1] == 1:
                    logits = torch.cat([-logits, logits], dim=1)  # so either class has a CAM
                maps = cam(k, logits, normalized=False)
                fused = resize_maps(cam.fuse_cams(maps).float(), picture.shape)
                yield fused[0].cpu().numpy()
    except (AssertionError, AttributeError, RuntimeError, ValueError) as error:
        reason = f"{', '.join(layers)} ({first_line(error)})"
        raise InputError(f"no CAM at {reason}; try other --layers") from None


def to_channels_first(y, backbone):
    """Tokens (N, L, C) of a ViT or maps (N, H, W, C) of a Swin -> (N, C, H, W)."""
    if y.ndim == 3:
        square = (math.isqrt(y.shape[1]),) * 2
        grid = getattr(getattr(backbone, "patch_embed", None), "grid_size", None) or square
        tokens = y[:, -math.prod(grid) :]  # class and register tokens come first
        return tokens.mT.unflatten(2, grid)
    if getattr(backbone, "output_fmt", "") == "NHWC":
        return y.permute(0, 3, 1, 2)
    return y


def resize_maps(maps, shape):
    """Maps (N, h, w) -> (N, *shape)."""
    return nn.functional.interpolate(maps[:, None], shape, mode="bilinear")[:, 0]


# ---------------------------------------------------------------- evidence
def local_intensity(picture, recipe, tolerance):
    """Mean log intensity (height, width) within the retention tolerance (minutes) of each pixel."""
    levels = picture / np.float32(255)
    width = 2 * round(tolerance / recipe.bin_size()[0]) + 1
    height = 2 * round(max(recipe.sigma, 1) / 2) + 1
    local = ndimage.uniform_filter(levels, (height, width))
    if recipe.normalize == "rt":  # a strong compound weakens all others of its retention time
        local -= ndimage.uniform_filter(levels, (20 * height + 1, width))
    return local


def compute_evidence(intensities, p, components):
    """Partial correlation (P,) of local intensities (N, P) and predicted probabilities p (N,).

    The components (N, 2 or fewer) are projected out of both. Evidence of a constant intensity is 0.
    """
    p = project_out(p, components)
    evidence = []
    for x in column_chunks(intensities):
        x = project_out(x, components)
        lengths = np.linalg.norm(x, axis=0) * np.linalg.norm(p)
        lengths[lengths < 1e-6] = np.inf
        evidence.append(p @ x / lengths)
    return np.concatenate(evidence)


def find_common_components(intensities, p, limit=0.1):
    """First two principal components of intensities (N, P), as unit vectors (N, 2 or fewer).

    They are batches or retention shifts (Price et al. 2006). One that explains `limit` or more of the
    variance of the predicted probabilities p (N,) is the class itself and is left out.
    """
    gram = np.zeros((len(p), len(p)))
    for x in column_chunks(intensities):
        x -= x.mean(axis=0)
        gram += x @ x.T
    p = p - p.mean()
    start = np.random.default_rng(0).normal(size=len(p))  # fixed: the same digits every time
    _, components = eigsh(gram, k=2, v0=start)
    explained = (components.T @ p) ** 2 / (p @ p)
    return components[:, explained < limit]


def project_out(x, components):
    """x (N,) or (N, P) minus its mean and its projection on the components (N, 2 or fewer)."""
    x = x - x.mean(axis=0)
    return x - components @ (components.T @ x)


def column_chunks(intensities):
    """Yield the columns of intensities (N, P) in float32 chunks, to save memory."""
    n_chunks = math.ceil(intensities.size / 2**23)
    for chunk in np.array_split(intensities, n_chunks, axis=1):
        yield chunk.astype(np.float32)


def compute_evidence_p(r, n_free):
    """Table of direction, p, Benjamini-Hochberg q of evidence r (F,); n_free: degrees of freedom."""
    null = beta(n_free / 2, n_free / 2, loc=-1, scale=2)  # distribution of chance correlations
    p = 2 * null.sf(abs(r))
    direction = np.where(r > 0, "up", "down")
    return pd.DataFrame({"direction": direction, "p": p, "q": false_discovery_control(p)})


def compare_phenotypes(intensities, in_class):
    """Table of Welch's t of intensities (N, F) and its q; in_class (N,): 1, 0, nan if unknown."""
    groups = [intensities[in_class == 1], intensities[in_class == 0]]
    if min(map(len, groups)) < 2:
        return pd.DataFrame(index=range(intensities.shape[1]))  # no columns: t is unknown
    test = ttest_ind(*groups, equal_var=False)
    p = np.nan_to_num(test.pvalue, nan=1)
    return pd.DataFrame({"t": test.statistic, "t_q": false_discovery_control(p)})


# ---------------------------------------------------------------- features
COLUMNS = {  # usual titles, cleaned; the first that a list has is used
    "rt": "average_rt_min_ rt_min_ rt retention_time retention_time_min_ row_retention_time rtmed",
    "mz": "average_mz precursor_m_z mz m_z precursor_mz row_m_z mzmed",
    "name": "metabolite_name title name compound compound_name",
}


def read_features(path, recipe, query=None):
    """Table of features inside the axes: rt (minutes), mz, name, all columns with cleaned titles.

    It reads exports of MS-DIAL, Progenesis, mzmine and XCMS, and any CSV with titles of COLUMNS.
    InputError if columns, numbers or all features are missing.
    """
    text = Path(path).read_text(encoding="utf-8-sig", errors="replace")
    header = 0  # number of lines before the titles
    for i, line in enumerate(text.split("\n")[:10]):
        titles = [clean_title(title) for title in re.split("[,;\t]", line)]
        if find_column("rt", titles) and find_column("mz", titles):
            header = i
            break
    table = read_table(path, header, dtype=None, keep_default_na=True)
    rt, mz, name = (find_column(kind, table) for kind in COLUMNS)
    if not (rt and mz):
        usual = "retention time ('Average Rt(min)', 'rt') and m/z ('Average Mz', 'mz')"
        raise InputError(f"{path}: no columns of {usual}; found: {', '.join(table.columns[:20])}")
    for kind, title in (("rt", rt), ("mz", mz)):
        values = pd.to_numeric(table[title], errors="coerce")
        if values.isna().any():
            row = values.isna().argmax()
            raise InputError(f"{path}, row {row + header + 2}: {title} {table[title][row]} is not a number")
        table[kind] = values
    table["name"] = table[name].astype("string").fillna("") if name else ""
    for tag in table.filter(like="annotation_tag"):
        table[tag] = table[tag].astype(str).str.removesuffix(".0")  # so that == '430' works
    if query:
        # The article's titles (pyjanitor) have repeated underscores. Collapse them outside quotes.
        collapsed = re.sub(r"""('[^']*'|"[^"]*")|_+""", lambda found: found[1] or "_", query)
        try:
            table = table.query(collapsed, engine="python")
        except Exception as error:  # any error of pandas or Python
            reason = f"{first_line(error)} (columns: {', '.join(table.columns)})"
            raise InputError(f"--query {query!r}: {reason}") from None
    axes = "@recipe.rt_min <= rt <= @recipe.rt_max and @recipe.mz_min <= mz <= @recipe.mz_max"
    inside = table.query(axes).reset_index(drop=True)
    print(f"features: {path}, {len(inside)} of {len(table)} inside the axes")
    if inside.empty:
        raise InputError(f"{path}: no feature is left (--query? retention times in seconds?)")
    if len(inside) < len(table) / 2:
        print("warning: most features are outside the axes; are retention times in seconds?")
    return inside


def find_column(kind, titles):
    """The first title of COLUMNS[kind] that is among these titles, or None."""
    for title in COLUMNS[kind].split():
        if title in titles:
            return title


def look_up_values(maps, table, recipe):
    """Values (..., F) of maps (..., height * width) at each feature."""
    width, height = recipe.bins
    x, y = recipe.to_fraction(table["rt"], table["mz"])
    places = (y * height).astype(int), (x * width).astype(int)
    return maps[..., np.ravel_multi_index(places, (height, width), mode="clip")]


def rank_features(table, evidence, tests, half_box):
    """Features by size of evidence (F,), with tests. in_box: number of others within half_box."""
    columns = "rank rt mz name evidence direction p q t t_q in_box".split()
    others = table.columns.difference(columns, sort=False)
    ranking = table[["rt", "mz", "name"]].assign(evidence=abs(evidence)).join(tests)
    places = table[["rt", "mz"]].to_numpy()
    ranking["in_box"] = [(abs(places - place) <= half_box).all(axis=1).sum() - 1 for place in places]
    ranking = ranking.reindex(columns=columns).join(table[others])  # nan: not tested
    ranking = ranking.sort_values("evidence", ascending=False, kind="stable", ignore_index=True)
    ranking["rank"] = ranking.index + 1
    return ranking


def make_inclusion_list(table, tolerance):
    """Mass list of an Orbitrap: q and t_q are below 0.05 or unknown; charge 1 is assumed."""
    table = table.query("not (q >= 0.05 or t_q >= 0.05)")
    columns = {"Compound": table["name"], "Formula": "", "Adduct": "(no adduct)", "m/z": table["mz"]}
    targets = pd.DataFrame(columns).assign(z=1)
    targets["t start (min)"] = (table["rt"] - tolerance).clip(0)
    targets["t stop (min)"] = table["rt"] + tolerance
    return targets.round(5)


# ---------------------------------------------------------------- figures
def draw_cam_grid(path, table, pictures, cams, recipe, title):
    """Article Figure 6: CAMs over the pictures, on one scale, with predicted probabilities."""
    n = math.ceil(len(table) ** 0.5)
    scale = PowerNorm(0.5, 0, np.max(cams) or 1)  # the square root lifts weak spots
    grid = {"nrows": n, "ncols": n, "sharex": True, "sharey": True, "squeeze": False}
    with figure(path, title, (3.4 * n + 2, 3 * n + 1), **grid) as axes:
        for axis, row, cam in zip(axes.flat, table.itertuples(), cams, strict=False):
            show(axis, pictures[row.Index], recipe, cmap="gray", vmin=0, vmax=255)
            image = show(axis, cam, recipe, cmap="inferno", norm=scale, alpha=0.9 * scale(cam))
            caption = f"{row.sample_name}: {row.phenotype}\nprobability {row.probability:.2f}"
            axis.set_title(caption, fontsize=9)
        axis.figure.colorbar(image, ax=axes, label="CAM")
        label_axes(axes)


def draw_overlay(path, evidence, table, recipe, title):
    """Article Figures 7 and 8: features over the evidence; the first ten are labelled."""
    limit = abs(evidence).max() or 1
    first = table.head(10).sort_values("mz", ignore_index=True)
    is_cam = table["q"].isna().all()
    meaning = "mean CAM" if is_cam else "evidence (red: up in the class, blue: down)"
    with figure(path, f"Ranked features; {title}", (11, 6.5)) as axis:
        image = show(axis, evidence, recipe, cmap="RdBu_r", vmin=-limit, vmax=limit)
        axis.figure.colorbar(image, ax=axis, location="bottom", shrink=0.9, aspect=40, label=meaning)
        axis.plot("rt", "mz", "o", data=table, markersize=2.5, color="0.45", label="feature")
        axis.plot("rt", "mz", "kD", data=table.query("q < 0.05"), mec="white", label="q < 0.05")
        axis.plot("rt", "mz", "ko", data=first, markersize=11, mfc="none", label="first ten")
        # Labels stand beside the map, sorted by m/z, so that they cannot overlap.
        line = {"arrowstyle": "-", "color": "0.4", "lw": 0.6, "relpos": (0, 0.5)}
        beside = {"textcoords": "axes fraction", "va": "center", "fontsize": 8, "arrowprops": line}
        for row in first.itertuples():
            label = f"{row.rank}. {row.rt:.2f} min, m/z {row.mz:.3f}\n    {row.name[:34]}"
            height = (row.Index + 0.5) / len(first)
            axis.annotate(label, (row.rt, row.mz), (1.03, height), **beside)
        axis.set(xlabel="retention time (min)", ylabel="m/z")
        axis.legend(loc="upper left", fontsize=8)


# ---------------------------------------------------------------- command line
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("run", nargs="?", help="run folder (default: the newest under runs/)")
    parser.add_argument("--out", metavar="DIR", help="folder for results (default: RUN/explain)")
    add = parser.add_argument_group("pictures").add_argument
    add("--split", choices=[*SPLITS, "all"], default="all", help="pictures to explain")
    add("--data", metavar="DIR", help="the data set, if it has moved since the training")
    add("--input", nargs="+", metavar="FILE", help="pictures, raw files or their folders instead")
    add("--n", type=count, default=9, help="number of pictures in cam_grid.png")
    add = parser.add_argument_group("CAMs").add_argument
    add("--class", dest="class_name", metavar="NAME", help="phenotype (default: positive class)")
    add("--layers", nargs="+", metavar="NAME", help="layers of the backbone (default: a fine map)")
    add = parser.add_argument_group("features").add_argument
    add("--features", metavar="CSV", help="MS-DIAL export or rt (minutes), mz, name (default: the data's features.csv)")
    add("--query", help="pandas query on the cleaned titles, such as '460 < average_mz < 500'")
    tolerance = "retention tolerance, half the width of a box"
    add("--rt-tolerance", type=float, default=0.3, metavar="MINUTES", help=tolerance)
    args = parser.parse_args()
    if not 0 <= args.rt_tolerance < math.inf:
        parser.error("--rt-tolerance must be a number of minutes, 0 or more")
    explain(args)


if __name__ == "__main__":
    run_script(main)
