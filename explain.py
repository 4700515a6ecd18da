"""Where does the network look, and which compounds are there? Article, "Explaining the model" (Figures 6-8, Table 3).

    python explain.py                                              # newest run, all its pictures, positive class
    python explain.py runs/golestan/mobileone_s3/seed2643 --features alignment.csv --query "3.5 < average_rt_min_ < 5"
    python explain.py --class control --layers layer2 --n 4 --out control
    python explain.py --input pooled.mzML new_run.mzML.gz

Three questions about a feature. t (Welch's test): do the phenotypes differ here, in these runs? evidence, the
correlation of its intensity with the network's probability from run to run, drift taken out: do the calls go with it?
Its size ranks the features, its sign is the direction, up or down in the class, and shuffled probabilities tell where
chance begins (p, q). drop, of the logit when the feature's box is painted in the colour of zero: does the network use
it, more than other boxes as bright (drop_p, drop_q)? Heat (LayerCAM) shows roughly where a picture's probability comes
from, and whatever is bright.

None proves a cause: a network needs only some of the compounds that differ, neighbours in a box (in_box) look the same
to it, and calls go with something even where they are wrong: q speaks of the calls and not of the phenotypes. Where
convert.py divided by the highest of a time, one compound moves all that elute with it.

The ranking is of a cohort and no test: it takes all pictures. Those trained on are called by heart, so that evidence
comes near to t; --split test asks only for the calls of unseen ones, which are fewer.

Written to RUN/explain/: cam_grid.png, class_maps.png, overlay.png, regions.csv (boxes around the evidence),
faithfulness.json (the drop of the probability when a picture is seen through its map), features.csv (its rt, mz and
name are what mzmine calls them), and inclusion.csv, the first of them as Orbitraps import a mass list.
"""

import difflib
import math
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import timm
import torch
from matplotlib.colors import PowerNorm
from scipy import ndimage
from scipy.stats import false_discovery_control, ttest_ind
from torch import nn
from torch.nn import functional as F
from torchcam.methods import LayerCAM
from tqdm import tqdm

from deeplcms import SPLITS, InputError, Parser, figure, label_axes, run_script, write_json, write_table
from deeplcms import called_class, check_recipe, files_of, first_line, in_turn, intensity_of, is_run
from deeplcms import number, picture_of_run, read_picture, read_table, read_text, show
from evaluate import originals_of, title_of
from train import DEVICE, find_run, inputs_of, load_run, to_channels_first

BATCH, PERMUTATIONS = 16, 9999
BLANKED, CONTROLS = 32, 200  # pictures in which boxes are blanked, and boxes to compare with


def batches_of(u, title):
    """Pictures (N, 3, size, size) in batches on the device, each a new tensor that gradients can reach."""
    for batch in tqdm(u.split(BATCH), desc=title, unit="batch", disable=None, leave=False):
        yield batch.to(DEVICE).clone().requires_grad_(True)


# ---------------------------------------------------------------- scores and layers
class Scores(nn.Module):
    """Score of each class (N, K) of pictures (N, 3, size, size) from which the colour of zero intensity is subtracted.

    So 0 means "nothing measured": a picture times a map fades to that and not to grey. One logit z stands for the pair
    (-z, z), which makes the negative class explainable like any other.
    """

    def __init__(self, model, recipe):
        super().__init__()
        self.model = model
        zero = torch.tensor(recipe.zero_colour() / 255, dtype=torch.float32)
        zero = (zero - torch.tensor(model.mean)) / torch.tensor(model.std)
        self.register_buffer("zero", zero[:, None, None])
        for module in model.modules():
            if getattr(module, "inplace", False):
                module.inplace = False  # it would overwrite the activation that a hook keeps

    def forward(self, u):
        z = self.model(u + self.zero)
        return torch.cat([-z, z], 1) if z.shape[1] == 1 else z

    def probabilities(self, z):
        """Scores (N, K) -> probabilities (N, K); the pair (-z, z) is twice as far apart as its one logit."""
        return torch.softmax(z.double() / (2 if self.model.n_outputs == 1 else 1), 1)


def choose_layers(model, names=None):
    """Modules of the backbone to explain, {name: module}; none for `pixels`, whose picture is its own feature map.

    Default: the deepest layer (of those that timm lists) whose map is at least a quarter of the picture's side, or the
    last of the finest where none is (a vision transformer's last block). Deeper layers mix retention times and masses,
    and look up to 7 % of the axis away from where upsampling paints them.
    """
    modules = dict(model.backbone.named_modules())
    stages = [stage for stage in getattr(model.backbone, "feature_info", []) if stage["module"] in modules]
    if not names and not isinstance(model.backbone, nn.Identity):
        if not stages:
            raise InputError("timm lists no layers of this backbone; name one with --layers")
        fine = max(4, min(stage["reduction"] for stage in stages))
        names = [[stage["module"] for stage in stages if stage["reduction"] <= fine][-1]]
    for name in names or []:
        if name not in modules:
            near = difflib.get_close_matches(name, modules, 5, cutoff=0.4) or list(modules)[:5]
            raise InputError(f"--layers {name!r} is no layer of this backbone; the nearest: {', '.join(near)}")
    return {name: modules[name] for name in names or []}


# ---------------------------------------------------------------- heat and evidence
@torch.inference_mode()
def scores_of(scores, u, title=None):
    """Scores (N, K), on the CPU, of all pictures u (N, 3, size, size); with a progress bar where there is a title."""
    batches = tqdm(u.split(2 * BATCH), desc=title, unit="batch", disable=None if title else True, leave=False)
    return torch.cat([scores(batch.to(DEVICE)).cpu() for batch in batches])


def resized(maps, shape):
    """Maps (N, h, w) -> (N, *shape)."""
    return F.interpolate(maps[:, None], shape, mode="bilinear", align_corners=False)[:, 0]


def heat_maps(scores, layers, u, k, shape):
    """LayerCAM of class k, unnormalised, for pictures u (N, 3, size, size) -> (N, *shape) in numpy.

    Several layers are fused as torchcam does. Without layers: gradient x picture at the picture itself, its channels
    summed before the ReLU (in jet a peak is more red and less blue at once).
    """
    maps = []
    if not layers:
        for batch in batches_of(u, "heat"):
            (gradient,) = torch.autograd.grad(scores(batch)[:, k].sum(), batch)
            maps.append(resized(torch.relu((gradient * batch).sum(1)).detach(), shape).cpu())
        return torch.cat(maps).numpy()

    def to_map(y):
        return to_channels_first(y, scores.model.backbone)

    with LayerCAM(scores, list(layers.values()), reshape_transform=to_map) as cam:
        for batch in batches_of(u, "heat"):
            z = scores(batch)
            try:
                found = [resized(m.float(), shape) for m in cam(k, z, normalized=False)]
            except (AssertionError, RuntimeError) as error:  # the logits do not come from there
                raise InputError(f"no heat at {', '.join(layers)} ({error}); name others with --layers") from None
            maps.append((found[0] if len(found) == 1 else cam.fuse_cams(found)).cpu())
    return torch.cat(maps).numpy()


def local_intensity(picture, recipe, drift):
    """Mean log intensity (height, width) within `drift` minutes of each pixel, less that of 20 times as many masses.

    Retention times differ from run to run; and a strong compound makes all that elutes with it look weaker, as the
    highest bin of a time is 1.
    """
    map_ = intensity_of(picture, recipe.colormap)
    wide = 2 * round(drift / recipe.bin_size()[0]) + 1
    high = 2 * round(max(recipe.sigma, 1) / 2) + 1
    around = ndimage.uniform_filter(map_, (20 * high + 1, wide))
    return ndimage.uniform_filter(map_, (high, wide)) - around


def without_drift(intensities, p, n=2, most=0.1):
    """Intensities (N, height, width) and probabilities p (N,), both less what whole pictures have in common.

    Batches and drift change whole pictures, and by chance go with p a little. They are the first n principal components
    of the pictures, as of genotypes they are the populations (Price et al. 2006). A component that explains `most` of
    the variance of p or more is taken for the class itself, and stays.
    """
    x, p = intensities.reshape(len(p), -1), p - p.mean()
    x = x - x.mean(0)
    _, components = np.linalg.eigh(x @ x.T)  # columns of length 1, the largest last
    drift = components[:, -n:]
    drift = drift[:, (drift.T @ p) ** 2 < most * (p @ p)].astype(x.dtype)
    x -= drift @ (drift.T @ x)
    return x.reshape(intensities.shape), p - drift @ (drift.T @ p)


def correlation(a, b):
    """Pearson's r (F, P) of the columns of a (N, F) and b (N, P); 0 for a constant one."""
    a, b = a - a.mean(0), b - b.mean(0)
    lengths = np.outer(np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=0))
    return a.T @ b / np.where(lengths > 1e-6, lengths, np.inf)


def evidence_map(intensities, p):
    """Correlation (height, width) of intensities (N, height, width) with p (N,), as without_drift leaves them.

    Phenotypes are unseen. The slope instead would rank by how much a compound varies, too, whatever it goes with.
    """
    r = correlation(intensities.reshape(len(p), -1), p[:, None])
    return r.reshape(intensities.shape[1:])


@torch.inference_mode()
def faithfulness(scores, u, maps, k):
    """Average drop and increase in confidence (Chattopadhay et al. 2018) when a picture is seen through its map.

    The control is the same map moved by half of both axes. Better means by 1 % and by two standard errors.
    """
    maps = torch.from_numpy(maps).float()
    maps = maps - maps.amin((1, 2), keepdim=True)
    maps = maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-12)  # 0 ... 1
    moved = maps.roll((maps.shape[1] // 2, maps.shape[2] // 2), (1, 2))

    def probability(u):
        return scores.probabilities(scores_of(scores, u, "faithfulness"))[:, k]

    whole, drops, result = probability(u), {}, {}
    for name, mask in (("map", maps), ("moved_map", moved)):
        seen = probability(u * resized(mask, u.shape[2:])[:, None])
        drops[name] = torch.relu(whole - seen) / whole
        rises = (seen > whole).double()
        result[name] = {"avg_drop": drops[name].mean().item(), "conf_increase": rises.mean().item()}
    gain = drops["moved_map"] - drops["map"]
    least = max(0.01, 2 * gain.std() / len(gain) ** 0.5) if len(gain) > 1 else math.inf
    word = "more" if gain.mean() > least else "less" if gain.mean() < -least else "no more"
    seen = "seen through its map a picture's probability drops by {:.0%}, through the same map moved by {:.0%}"
    seen = seen.format(drops["map"].mean(), drops["moved_map"].mean())
    return result | {"verdict": f"{seen}: the map is {word} faithful than chance"}


# ---------------------------------------------------------------- features
COLUMNS = {
    "rt": ("average_rt_min_", "rt_min_", "rt", "retention_time", "retention_time_min_"),
    "mz": ("average_mz", "precursor_m_z", "mz", "m_z", "precursor_mz"),
    "name": ("metabolite_name", "title", "name", "compound", "compound_name"),
}


def read_features(path, recipe, query=None):
    """Table of features inside the axes, columns cleaned, with rt (minutes), mz and name found by the usual titles.

    An alignment or peak export of MS-DIAL (four lines before the header or none) or any table with rt, mz and name. The
    query is pandas', on the cleaned names; whoever types it owns the shell, so it may do what pandas lets it.
    """
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        skip = 4 if file.read(1) in (",", ";", "\t") else 0
    table = read_table(path, skip, dtype=None, keep_default_na=True)
    table.columns = [re.sub(r"[^0-9a-z]+", "_", title.strip().lower()) for title in table]  # as pyjanitor does
    found = {kind: next((name for name in names if name in table), None) for kind, names in COLUMNS.items()}
    if not (found["rt"] and found["mz"]):
        raise InputError(f"{path}: no columns of retention time ('Average Rt(min)', 'rt') and m/z ('Average Mz', 'mz')")
    for column in table.filter(like="annotation_tag"):
        table[column] = table[column].astype(str).str.removesuffix(".0")  # == '430' works whatever the column holds
    for kind in ("rt", "mz"):
        values = pd.to_numeric(table[found[kind]], errors="coerce")
        if values.isna().any():
            row = int(values.isna().argmax())
            raise InputError(f"{path}, row {row + skip + 2}: {found[kind]} {table[found[kind]][row]} is not a number")
        table[kind] = values
    table["name"] = table[found["name"]].fillna("") if found["name"] else ""
    try:
        # Names with runs of underscores, as pyjanitor leaves them and the article has them, mean the same; text stays.
        spelt = re.sub(r"'[^']*'|\"[^\"]*\"|__+", lambda found: found[0] if found[0][0] != "_" else "_", query or "")
        table = table.query(spelt, engine="python") if query else table
    except Exception as error:  # of pandas and of Python, by what is wrong
        raise InputError(f"--query {query!r}: {first_line(error)} (columns: {', '.join(table.columns)})") from None
    x, y = recipe.to_fraction(table["rt"], table["mz"])
    inside = (x >= 0) & (x <= 1) & (y >= 0) & (y <= 1)
    print(f"features: {path}, {inside.sum()} inside the axes, {(~inside).sum()} outside")
    if not inside.any():
        raise InputError(f"{path}: no feature is left (--query? retention times in seconds?)")
    return table[inside].reset_index(drop=True)


def at_places(maps, table, recipe):
    """Value (..., F) of maps (..., height, width) at the place of each feature."""
    height, width = maps.shape[-2:]
    x, y = recipe.to_fraction(table["rt"], table["mz"])
    columns, rows = (x * width).astype(int), (y * height).astype(int)
    return maps[..., rows.clip(0, height - 1), columns.clip(0, width - 1)]


def tests_of_calls(intensities, p, seed):
    """Table of the direction in which features' intensities (N, F) go with p (N,), and how often chance does as well.

    p: the share of shuffled probabilities that correlate as much; q: the share of chance among the features up to this
    one (Benjamini and Hochberg).
    """
    r = correlation(intensities, p[:, None])[:, 0]
    rng, as_good = np.random.default_rng(seed), np.ones(len(r))
    for _ in range(PERMUTATIONS // 99):
        shuffled = rng.permuted(np.tile(p, (99, 1)), axis=1)
        by_chance = correlation(intensities, shuffled.T)
        as_good += (abs(by_chance) >= abs(r)[:, None] - 1e-6).sum(1)
    table = pd.DataFrame({"direction": np.where(r > 0, "up", "down"), "p": as_good / (1 + PERMUTATIONS)})
    table["q"] = false_discovery_control(table["p"])
    return table


def tests_of_phenotypes(intensities, of_class):
    """Table of Welch's t of features' intensities (N, F) and its q; of_class (N,): 1, 0, or nan where unknown."""
    groups = intensities[of_class == 1], intensities[of_class == 0]
    if min(map(len, groups)) < 2:
        return pd.DataFrame({"t": np.nan, "t_q": np.nan}, range(intensities.shape[1]))
    test = ttest_ind(*groups, equal_var=False)
    p = np.nan_to_num(test.pvalue, nan=1)  # nan: nothing is measured there
    return pd.DataFrame({"t": test.statistic, "t_q": false_discovery_control(p)})


def half_box_of(recipe, drift):
    """Minutes and m/z (2,) to each side of a feature: the drift, and twice the width of the picture's own filter."""
    return np.array([drift, 2 * max(recipe.sigma, 1) * recipe.bin_size()[1]])


def rank_features(table, tests, evidence, heats, recipe, half_box):
    """The features by size of evidence, with their tests, neighbours in the box, and the heat of each phenotype."""
    own = table[["rt", "mz", "name"]].copy()
    own["evidence"] = abs(at_places(evidence, table, recipe))
    own = own.join(tests)
    places = table[["rt", "mz"]].to_numpy()
    own["in_box"] = [(abs(places - place) <= half_box).all(1).sum() - 1 for place in places]  # the others
    for name, heat in heats.items():
        own[f"heat_{name}"] = at_places(heat, table, recipe)
    earlier = ["rank", "drop", "drop_p", "drop_q", *own]  # columns of an earlier answer
    ranking = own.join(table.drop(columns=earlier, errors="ignore"))
    ranking = ranking.sort_values("evidence", ascending=False, kind="stable")
    ranking.insert(0, "rank", np.arange(1, len(ranking) + 1))
    return ranking


@torch.inference_mode()
def drops_of(scores, u, k, places, recipe, half_box):
    """Drop (F, N) of score k of pictures u (N, 3, size, size) when the box around a place (F, 2) is blank."""
    at = (np.arange(u.shape[-1]) + 0.5) / u.shape[-1]
    rt, mz = recipe.from_fraction(at, at)  # of the pixels
    half_pixel = abs(rt[1] - rt[0]) / 2, abs(mz[1] - mz[0]) / 2
    wide, high = np.maximum(half_box, half_pixel)
    whole, drops = scores_of(scores, u)[:, k], []
    for place_rt, place_mz in tqdm(places, desc="blanking", unit="box", disable=None, leave=False):
        box = np.outer(abs(mz - place_mz) <= high, abs(rt - place_rt) <= wide)
        blank = u.masked_fill(torch.from_numpy(box), 0)
        drops.append(whole - scores_of(scores, blank)[:, k])
    return torch.stack(drops).numpy()


def control_places(features, brightness_at, recipe, half_box, seed):
    """Places (CONTROLS, 2) of boxes as bright as those of features (F, 2), but elsewhere.

    Each is for one feature, drawn at random: of twenty places off its box the one most alike. They have the times of
    features, as what elutes with no compound, dead volume and wash, is bright and tells a network nothing.
    """
    rng, controls = np.random.default_rng(seed), []
    for feature in rng.choice(features, CONTROLS):
        _, mz = recipe.from_fraction(0, rng.uniform(size=20))
        places = np.stack([rng.choice(features[:, 0], 20), mz], axis=1)
        places = places[(abs(places - feature) > 2 * half_box).any(axis=1)]
        unlike = abs(brightness_at(places) - brightness_at(feature[None]))
        controls.append(places[unlike.argmin()])
    return np.array(controls)


def blanking(scores, u, k, table, map_, recipe, half_box, seed):
    """Table of the drop of score k, mean over the pictures u, when a feature's box is blank, its p and q value.

    Any box moves the scores, the more the brighter it is in map_, the mean log intensity of the pictures. So control
    boxes say what is usual. A drop counts in units of the median size of the 50 controls nearest in brightness, and of
    all; p is the share of controls that drop, or rise, as much.
    """
    wide, high = 2 * np.round(half_box / recipe.bin_size()).astype(int) + 1
    box_means = ndimage.uniform_filter(map_, (high, wide))

    def brightness_at(places):
        return at_places(box_means, pd.DataFrame(places, columns=["rt", "mz"]), recipe)

    features = table[["rt", "mz"]].to_numpy()
    controls = control_places(features, brightness_at, recipe, half_box, seed)
    usual = drops_of(scores, u, k, controls, recipe, half_box).mean(axis=1)
    drop = drops_of(scores, u, k, features, recipe, half_box).mean(axis=1)

    def size(drop, places):
        unlike = abs(brightness_at(places)[:, None] - brightness_at(controls))
        nearest = unlike.argsort(axis=1)[:, :50]
        return abs(drop) / (np.median(abs(usual)[nearest], axis=1) + np.median(abs(usual)) + 1e-12)

    as_large = size(usual, controls) >= size(drop, features)[:, None]
    p = (1 + as_large.sum(axis=1)) / (1 + CONTROLS)
    return pd.DataFrame({"drop": drop, "drop_p": p, "drop_q": false_discovery_control(p)}, table.index)


def inclusion_list(table, drift):
    """The features of q < 0.05 (or without q) in the columns of an Orbitrap's mass list; charge 1 is assumed."""
    table = table[~(table["q"] >= 0.05)]
    columns = {"Compound": table["name"], "Formula": "", "Adduct": "(no adduct)", "m/z": table["mz"], "z": 1}
    columns |= {"t start (min)": (table["rt"] - drift).clip(0), "t stop (min)": table["rt"] + drift}
    return pd.DataFrame(columns).round(5)


# ---------------------------------------------------------------- regions and figures
def regions(map_, recipe, share=0.5, most=20):
    """Table of boxes around what exceeds a share of the map's maximum, the highest first. The map: |evidence|."""
    (height, width), boxes = map_.shape, []
    spots, _ = ndimage.label(map_ >= max(share * map_.max(), 1e-300))
    for rows, columns in ndimage.find_objects(spots):
        rt_min, mz_max = recipe.from_fraction(columns.start / width, rows.start / height)
        rt_max, mz_min = recipe.from_fraction(columns.stop / width, rows.stop / height)
        boxes.append((rt_min, rt_max, mz_min, mz_max, map_[rows, columns].max()))
    table = pd.DataFrame(boxes, columns=["rt_min", "rt_max", "mz_min", "mz_max", "evidence"])
    return table.sort_values("evidence", ascending=False).head(most)


def signed(evidence):
    """Colours of a map of evidence, red up and blue down in the class, for imshow."""
    highest = abs(evidence).max() or 1
    return {"cmap": "RdBu_r", "vmin": -highest, "vmax": highest}


def cam_grid(path, shown, pictures, maps, recipe, title):
    """Article Figure 6: pictures with their phenotype and probability, map over picture, all maps on one scale."""
    n = math.ceil(math.sqrt(len(shown)))
    size = (3.4 * n + 2, 3 * n + 1)
    scale = PowerNorm(0.5, 0, maps[shown.index].max() or 1)  # the root shows weaker spots, too
    with figure(path, title, size, nrows=n, ncols=n, sharex=True, sharey=True, squeeze=False) as axes:
        for axis, row, map_ in zip(axes.flat, shown.itertuples(), maps[shown.index], strict=False):
            show(axis, intensity_of(pictures[row.Index], recipe.colormap), recipe, cmap="gray")
            heat = show(axis, map_, recipe, cmap="inferno", norm=scale, alpha=np.clip(0.15 + scale(map_), 0, 0.9))
            axis.set_title(f"{row.sample_name}: {row.phenotype}\n{row.caption}", fontsize=9)
        axis.figure.colorbar(heat, ax=axes, label="heat")
        label_axes(axes)


def class_maps(path, heats, evidence, meaning, recipe, title):
    """Mean heat of the pictures of each phenotype, on one scale, and the evidence."""
    highest = max(heat.max() for heat in heats.values()) or 1
    of_heat = {"cmap": "inferno", "vmin": 0, "vmax": highest}
    panels = [(f"mean heat, {name}", heat, of_heat) for name, heat in heats.items()]
    panels.append((meaning, evidence, signed(evidence)))
    with figure(path, title, (5 * len(panels), 4.6), ncols=len(panels), sharey=True, squeeze=False) as axes:
        for axis, (name, map_, options) in zip(axes.flat, panels, strict=True):
            axis.figure.colorbar(show(axis, map_, recipe, **options), ax=axis)
            axis.set_title(name, fontsize=10)
        label_axes(axes)


def overlay(path, evidence, meaning, table, recipe, title, n_names=10):
    """Article Figures 7 and 8: features over the evidence, up or down in the class, the first of the ranking by name.

    Names stand in a column beside the map, in the order of m/z, each joined to its point: they cannot overlap.
    """
    with figure(path, title, (11, 6.5)) as axis:
        shown = show(axis, evidence, recipe, **signed(evidence))
        axis.figure.colorbar(shown, ax=axis, location="bottom", shrink=0.9, aspect=40, label=meaning)
        first = table.head(n_names).sort_values("mz").reset_index(drop=True)
        axis.plot(table["rt"], table["mz"], "o", markersize=2.5, color="0.45", label="feature")
        axis.plot(first["rt"], first["mz"], "ko", markersize=11, fillstyle="none", label=f"first {len(first)}")
        for direction, marker, color in (("up", "^", "darkred"), ("down", "v", "navy")):
            found = table[(table["direction"] == direction) & (table["q"] < 0.05)]
            axis.plot(found["rt"], found["mz"], marker, color=color, mec="white", label=f"{direction}, q < 0.05")
        for row in first.itertuples():
            text = f"{row.rank}. {row.name[:34] or 'unknown'}\n    {row.rt:.2f} min, m/z {row.mz:.3f}"
            beside = {"xytext": (1.03, (row.Index + 0.5) / len(first)), "textcoords": "axes fraction", "va": "center"}
            line = {"arrowstyle": "-", "color": "0.4", "lw": 0.6, "relpos": (0, 0.5)}
            axis.annotate(text, (row.rt, row.mz), fontsize=8, arrowprops=line, **beside)
        axis.set(xlabel="retention time (min)", ylabel="m/z")
        axis.legend(loc="upper left", fontsize=8)


# ---------------------------------------------------------------- one command
def read_input(files, recipe):
    """Table (sample_name, phenotype) and pictures [uint8 (height, width, 3)] of raw runs, PNGs, or folders of runs."""
    rows, pictures, failures = [], [], []
    for path in tqdm(files_of(files), desc="reading", unit="file", disable=None):
        try:
            if not is_run(path):
                check_recipe(read_text(path)[1], recipe, path)
            pictures.append(picture_of_run(path, recipe)[0] if is_run(path) else read_picture(path))
        except (InputError, OSError) as error:
            failures.append(error)
            continue
        name, phenotype = path.name.partition(".")[0], "" if is_run(path) else path.resolve().parent.name
        rows.append({"sample_name": name, "phenotype": phenotype})
    if not rows:
        raise failures[0]
    for failure in failures:
        print(f"left out: {failure}", file=sys.stderr)
    return pd.DataFrame(rows), pictures


def read_split(checkpoint, data, split):
    """Table and pictures of a split or all of a data set, originals only, those trained on and folds too: no test."""
    table = originals_of(checkpoint, data, SPLITS if split == "all" else (split,))
    return table, [read_picture(path) for path in table["path"]]


def explain(args):
    run = find_run(args.run)
    model, checkpoint = load_run(run)
    model = timm.utils.reparameterize_model(model)  # branches fused (MobileOne, RepVGG): the same in less time
    settings, recipe, classes = checkpoint["config"]["settings"], checkpoint["recipe"], checkpoint["config"]["classes"]
    class_name = args.class_name or classes[-1]
    if class_name not in classes:
        raise InputError(f"--class {class_name!r} is not one of {', '.join(classes)}")
    k, layers = classes.index(class_name), choose_layers(model, args.layers)
    title = title_of([checkpoint], f"{checkpoint['config']['data_set']}, class '{class_name}'")
    print(title)
    if args.input:
        table, pictures = read_input(args.input, recipe)
    else:
        table, pictures = read_split(checkpoint, args.data, args.split)
    path = Path(args.features or Path(args.data or settings["data"]) / "features.csv")
    # Before the work: a bad table should not cost two minutes.
    features = read_features(path, recipe, args.query) if args.features or args.query or path.exists() else None

    scores = Scores(model, recipe).to(DEVICE).eval()
    u = inputs_of(model, pictures) - scores.zero.cpu()  # (N, 3, size, size)
    p = scores.probabilities(scores_of(scores, u, "classifying")).numpy()  # (N, K)
    called = called_class(p)
    table["caption"] = [f"P({class_name}) = {value:.2f}" for value in p[:, k]]
    unknown = ~table["phenotype"].isin(classes)  # a run that nobody labelled counts as what it is called
    of_class = (table["phenotype"] == class_name).where(~unknown).to_numpy(float)
    table.loc[unknown, "phenotype"] = [classes[c] for c in called[unknown]]

    maps = heat_maps(scores, layers, u, k, recipe.bins[::-1])  # (N, n_mz, n_rt)
    heats = {name: maps[rows].mean(0) for name, rows in table.groupby("phenotype").indices.items()}
    measured = np.array([local_intensity(picture, recipe, args.drift) for picture in pictures])
    alike = len(set(called)) == 1
    if alike:
        print(f"all are called {classes[called[0]]}: without calls to compare, evidence is their heat")
        evidence, meaning = maps.mean(0), "mean heat, in place of evidence"
    else:
        cleared, calls = without_drift(measured, p[:, k])
        evidence, meaning = evidence_map(cleared, calls), f"evidence: red up, blue down in {class_name}"

    out = Path(args.out or run / "explain")
    out.mkdir(parents=True, exist_ok=True)
    method = f"LayerCAM at {', '.join(layers)}" if layers else "Gradient x picture"
    cam_grid(out / "cam_grid.png", in_turn(table, args.n, args.seed), pictures, maps, recipe, f"{method}; {title}")
    class_maps(out / "class_maps.png", heats, evidence, meaning, recipe, f"{method}, and evidence; {title}")
    write_table(out / "regions.csv", regions(abs(evidence), recipe))
    called_so = called == k
    result = {"class": class_name, "layers": list(layers), "pictures": int(called_so.sum())}
    if called_so.any():
        result |= faithfulness(scores, u[called_so], maps[called_so], k)
        print(result["verdict"])
    write_json(out / "faithfulness.json", result)

    if features is not None:
        tests = tests_of_phenotypes(at_places(measured, features, recipe), of_class)
        if alike:
            tests[["direction", "p", "q"]] = "", np.nan, np.nan
        else:
            tests = tests_of_calls(at_places(cleared, features, recipe), calls, args.seed).join(tests)
        half_box = half_box_of(recipe, args.drift)
        ranking = rank_features(features, tests, evidence, heats, recipe, half_box)
        first = ranking.head(args.top)
        if args.top:
            of_both = in_turn(table, BLANKED, args.seed).index
            mean = np.mean([intensity_of(pictures[i], recipe.colormap) for i in of_both], axis=0)
            ranking = ranking.join(blanking(scores, u[of_both], k, first, mean, recipe, half_box, args.seed))
        write_table(out / "features.csv", ranking)
        write_table(out / "inclusion.csv", inclusion_list(first, args.drift))
        columns = ["rank", "rt", "mz", "evidence", "direction", "q", "t", "t_q", "drop", "drop_p", "in_box", "name"]
        shown = ranking.head(10).filter(columns).dropna(axis=1, how="all")  # without what nobody knows
        print(shown.to_string(index=False, float_format="{:.3g}".format))
        overlay(out / "overlay.png", evidence, meaning, ranking, recipe, f"Features over the evidence; {title}")
    print(f"{len(table)} pictures explained in {out}")


def parse_arguments(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("run", nargs="?", help="run folder of train.py (default: the newest under runs/)")
    parser.add_argument("--out", metavar="DIR", help="folder for results (default: RUN/explain)")
    add = parser.add_argument_group("pictures").add_argument
    add("--split", choices=[*SPLITS, "all"], default="all", help="those of train (a fold: and val) are called by heart")
    add("--data", metavar="DIR", help="the data set, if it is no longer where the run was trained")
    add("--input", nargs="+", metavar="FILE", help="pictures, raw runs, or folders of raw runs, in place of a split")
    add("--n", type=number(int, 1), default=9, help="pictures in cam_grid.png")
    add = parser.add_argument_group("map").add_argument
    add("--class", dest="class_name", metavar="NAME", help="phenotype to explain (default: the positive one)")
    add("--layers", nargs="+", metavar="NAME", help="layers of the backbone (default: the deepest that is not coarse)")
    add = parser.add_argument_group("features").add_argument
    add("--features", metavar="CSV", help="MS-DIAL export or rt (minutes), mz, name (default: the data's features.csv)")
    add("--query", help="pandas query on the cleaned column names, such as '460 < average_mz < 500'")
    add("--drift", type=number(float, 0), default=0.3, metavar="MINUTES", help="of retention: half a box's width")
    add("--top", type=number(int, 0), default=50, help="features of the ranking to confirm by blanking")
    add("--seed", type=number(int, 0), default=2643, help="of the pictures drawn, of chance and of the control boxes")
    return parser.parse_args(argv)


def main():
    explain(parse_arguments())


if __name__ == "__main__":
    run_script(main)
