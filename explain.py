"""Where does the network look, and which compounds are there? Article, "Explaining the model" (Figures 6-8, Table 3).

    python explain.py                                              # newest run, its test pictures, positive class
    python explain.py runs/golestan/mobileone_s3/seed2643 --features alignment.csv --query "3.5 < average_rt_min_ < 5"
    python explain.py --class control --layers layer2 --n 4
    python explain.py --input pooled.mzML new_run.mzML.gz

Three answers, in minutes and m/z. Heat (LayerCAM) shows where a picture's evidence lies, roughly: a network looks at
every second or fourth cell of a map, so that heat gathers on a lattice of spots beside the peak. Evidence ranks the
features, as heat also lights whatever is bright: a pixel counts that the network answers to (its gradient) and that
goes with the network's calls from picture to picture (its covariance with the probability). Blanking confirms the first
of the ranking and gives the direction: the logit drops when the box of a compound that speaks for the class is painted
in the colour of zero. None of them proves a cause: a network needs only some of the compounds that differ, a bright
neighbour in the same box looks the same to it, and what goes with its calls need not be what they are made of.

Pictures that are all called alike, as pooled runs are, have no calls to go with: for them the mean difference from a
blank picture stands in for the covariance, and a line says so.

Written to RUN/explain/: cam_grid.png, class_maps.png, overlay.png, regions.csv (boxes around the smoothed evidence),
features.csv, and faithfulness.json: by how much the probability drops on average when a picture is seen through its map
(avg_drop) and in what share of pictures it rises (conf_increase), for the map and, as control, for its cells shuffled.
Flags that choose other pictures, class, layers or features add a folder named after them below it.
"""

import ast
import contextlib
import csv
import difflib
import math
import re
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy import ndimage
from torch import nn
from torch.nn import functional as F
from torchcam.methods import LayerCAM
from torchcam.metrics import ClassificationMetric
from tqdm import tqdm

from convert import (
    RUN_SUFFIXES,
    SPLITS,
    Parser,
    Problem,
    bounded,
    colours,
    find_runs,
    first_line,
    picture_of_run,
    run_script,
    whole_file,
    write_csv,
)
from deeplcms import (
    Picture,
    called_class,
    choose_device,
    evaluation_transform,
    figure,
    find_pictures,
    find_run,
    load_run,
    probabilities_of,
    to_channels_first,
    write_json,
)

BATCH = 16
EVIDENCE = {"cmap": "YlOrRd", "vmin": 0}  # its colours in every figure

# ---------------------------------------------------------------- scores, layers, and where their units look


class Scores(nn.Module):
    """Score of each class (N, K) of pictures (N, 3, size, size) from which the colour of zero intensity is subtracted.

    So 0 means "nothing measured": a picture times a map (torchcam.metrics) fades to that and not to grey. One logit z
    stands for the pair (-z, z), which makes the negative class explainable like any other.
    """

    def __init__(self, model, recipe):
        super().__init__()
        self.model = model
        zero = torch.tensor(recipe.zero_colour() / 255, dtype=torch.float32)
        self.register_buffer("zero", ((zero - torch.tensor(model.mean)) / torch.tensor(model.std))[:, None, None])
        for module in model.modules():
            if getattr(module, "inplace", False):
                module.inplace = False  # it would overwrite the activation that a hook keeps

    def forward(self, u):
        z = self.model(u + self.zero)
        return torch.cat([-z, z], 1) if z.shape[1] == 1 else z

    def probabilities(self, z):
        """Scores (N, K) -> probabilities (N, K); the pair (-z, z) is twice as far apart as its one logit."""
        return torch.softmax(z / (2 if self.model.head.out_features == 1 else 1), 1)


def choose_layers(model, names=None):
    """Modules of the backbone to explain, [(name, module)]; none for `pixels`, whose picture is its own feature map.

    Default: the deepest layer (of those that timm lists) whose map is at least a quarter of the picture's side, or the
    last of the finest where none is (a vision transformer's last block). Deeper layers mix retention times and masses.
    Raises Problem with the nearest matches of an unknown name.
    """
    backbone = model.backbone
    if isinstance(backbone, nn.Identity):
        if names:
            raise Problem(f"--layers {names[0]!r}: the backbone 'pixels' has no layers", 2)
        return []
    modules = {name: module for name, module in backbone.named_modules() if name}
    if names:
        for name in names:
            if name not in modules:
                near = difflib.get_close_matches(name, modules, 5, cutoff=0.4) or list(modules)[:5]
                raise Problem(f"--layers {name!r} is no layer of this backbone; the nearest: {', '.join(near)}", 2)
        return [(name, modules[name]) for name in names]
    sizes = {}  # layer -> height of its map, in the order of the forward pass
    stages = [stage["module"] for stage in getattr(backbone, "feature_info", []) if stage.get("module") in modules]
    candidates = list(dict.fromkeys(stages)) or [name for name, _ in backbone.named_children()]

    def record(name):
        def hook(_, inputs, output):
            with contextlib.suppress(AttributeError, RuntimeError, ValueError, IndexError):
                sizes[name] = to_channels_first(output, backbone).shape[2]

        return hook

    hooks = [modules[name].register_forward_hook(record(name)) for name in candidates]
    try:
        with torch.inference_mode():
            model(torch.zeros(1, 3, model.image_size, model.image_size, device=next(model.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()
    if not sizes:
        raise Problem("found no layer with a map in this backbone; name one with --layers", 2)
    fine = min(max(sizes.values()), model.image_size // 4)
    name = [name for name, size in sizes.items() if size >= fine][-1]
    return [(name, modules[name])]


def receptive_centres(scores, module, size, n_units=9, n_noise=4, seed=0):
    """Where the units of a layer look: ((offset, scale) of y, (offset, scale) of x), in fractions of the picture.

    Unit i of n looks at offset + scale * (i + 0.5) / n. A convolution of stride 2 with padding 1 puts its units half a
    pixel too far left and up, and strides multiply it: the last layer of a ResNet looks 7 % of the axis away from where
    plain upsampling paints it. Measured from the gradient of single units with respect to noise; (0, 1) where a layer
    looks everywhere at once and has no measurable place.
    """
    generator = torch.Generator().manual_seed(seed)
    device, kept = scores.zero.device, {}
    hook = module.register_forward_hook(lambda _, inputs, output: kept.update(map=output))
    try:
        energies, units = 0, None
        for _ in range(n_noise):
            u = torch.rand(n_units, 3, size, size, generator=generator).to(device).requires_grad_(True)
            scores(u)
            map_ = to_channels_first(kept["map"], scores.model.backbone)  # (n_units, C, h, w)
            shape = map_.shape[2:]
            # One unit a picture, off the border, where padding cuts its view; rows and columns go in step.
            units = [np.linspace(n // 6, n - 1 - n // 6, n_units).round().astype(int) for n in shape]
            weight = torch.randn(n_units, map_.shape[1], generator=generator).to(device)
            picked = map_[torch.arange(n_units), :, units[0], units[1]]
            (gradient,) = torch.autograd.grad((picked * weight).sum(), u)
            energies = energies + gradient.square().sum(1).double().cpu().numpy()  # (n_units, size, size)
    finally:
        hook.remove()
    fits = []
    for axis, n in enumerate(shape):
        profile = energies.sum(2 - axis)  # (n_units, size)
        stride = size / n
        smooth = ndimage.gaussian_filter1d(profile, stride / 2, axis=1, mode="constant")
        # The power keeps the centre of the view and drops its tails, which the border of the picture cuts unevenly.
        weights = smooth**4 / (smooth**4).sum(1, keepdims=True).clip(1e-300)
        seen = weights @ ((np.arange(size) + 0.5) / size)
        plain = (units[axis] + 0.5) / n
        scale, offset = np.polyfit(plain, seen, 1) if len(set(units[axis])) > 3 else (1.0, np.mean(seen - plain))
        if not (0.9 < scale < 1.1):
            scale, offset = 1.0, float(np.median(seen - plain))
        # Half a unit plus half a pixel is as far as strides can shift it; more means that the unit looks everywhere.
        sound = np.abs(offset + (scale - 1) / 2) <= 0.5 / n + 1.5 / size
        fits.append((float(offset), float(scale)) if sound else (0.0, 1.0))
    return tuple(fits)


def resample(maps, shape, centres=((0.0, 1.0), (0.0, 1.0))):
    """Maps (N, h, w) -> (N, *shape): the value at the middle of each bin, units placed where they look."""
    grids = []
    for n, (offset, scale) in zip(shape, centres, strict=True):
        fraction = (torch.arange(n, device=maps.device) + 0.5) / n
        grids.append(2 * (fraction - offset) / scale - 1)  # half-pixel convention: -1 and 1 are the outer edges
    grid = torch.stack(torch.meshgrid(*grids, indexing="ij")[::-1], -1)  # (H, W, (x, y))
    grid = grid.expand(len(maps), *grid.shape).to(maps.dtype)
    return F.grid_sample(maps[:, None], grid, align_corners=False, padding_mode="border")[:, 0]


# ---------------------------------------------------------------- heat and evidence


def heat_maps(scores, layers, u, k, shape):
    """LayerCAM of class k, unnormalised, for pictures u (N, 3, size, size) -> (N, *shape) in numpy.

    Several layers are fused as torchcam does. Without layers: gradient x picture at the picture itself, its channels
    summed before the ReLU (in jet a peak is more red and less blue at once).
    """
    centres = [receptive_centres(scores, module, u.shape[-1]) for _, module in layers]
    to_map = lambda y: to_channels_first(y, scores.model.backbone)  # noqa: E731
    maps = []
    context = LayerCAM(scores, [m for _, m in layers], reshape_transform=to_map) if layers else contextlib.nullcontext()
    with context as cam:
        for batch in tqdm(u.split(BATCH), desc="heat", unit="batch", disable=None):
            batch = batch.to(scores.zero.device).clone().requires_grad_(True)  # a path for gradients if all is frozen
            out = scores(batch)
            if layers:
                found = cam(k, out, normalized=False)
                found = [resample(m.float(), shape, c) for m, c in zip(found, centres, strict=True)]
                maps.append((found[0] if len(found) == 1 else cam.fuse_cams(found)).cpu())
            else:
                (gradient,) = torch.autograd.grad(out[:, k].sum(), batch)
                maps.append(resample(torch.relu((gradient * batch).sum(1)).detach(), shape).cpu())
    return torch.cat(maps).numpy()


def evidence_map(scores, u, k):
    """What the network answers to and what goes with its calls: mean |gradient| x |covariance|, (size, size) in numpy.

    Both are taken over the pictures u (N, 3, size, size): the gradient of score k with respect to each pixel, and the
    covariance of each pixel with the probability of class k. The gradient alone is as large where all runs are alike;
    the covariance alone is what the calls go with, wherever the network looks. Phenotypes do not enter, so a network
    that calls at random has random evidence. Pictures that are all called alike (one run, pooled runs) have no calls to
    go with: their mean difference from the blank picture stands for the covariance then.
    """
    gradient, p = 0, []
    for batch in tqdm(u.split(BATCH), desc="evidence", unit="batch", disable=None):
        batch = batch.to(scores.zero.device).clone().requires_grad_(True)
        z = scores(batch)
        gradient = gradient + torch.autograd.grad(z[:, k].sum(), batch)[0].abs().sum(0).double().cpu() / len(u)
        p.append(scores.probabilities(z.detach().double()).cpu())
    p = torch.cat(p)
    alike = len(set(called_class(p.numpy()).tolist())) == 1
    weight = torch.ones(len(u), dtype=torch.double) if alike else p[:, k] - p[:, k].mean()
    covariance = torch.einsum("n,ncyx->cyx", weight, u.double()) / len(u)
    return (gradient * covariance.abs()).sum(0).numpy()


class Stored:
    """Maps that were computed before, in the shape of a torchcam extractor, for torchcam.metrics."""

    def __init__(self, model):
        self.model, self.maps = model, None

    def __call__(self, class_idx=None, scores=None, normalized=True, **_):
        return [self.maps]

    def fuse_cams(self, cams):
        return cams[0]

    def _hooks_off(self):
        return contextlib.nullcontext()


def faithfulness(scores, u, maps, k, seed=0):
    """Average drop and increase in confidence (Chattopadhay et al. 2018) when a picture is seen through its map.

    The control shuffles each map's cells (16 on a side): as much of the picture remains, in other places.
    """
    size = u.shape[-1]
    cell = max(1, size // 16)
    side = size // cell * cell
    order = torch.randperm((side // cell) ** 2, generator=torch.Generator().manual_seed(seed))
    result = {}
    for name in ("map", "random_map"):
        metric = ClassificationMetric(Stored(scores), scores.probabilities)
        for batch, m in zip(u.split(BATCH), torch.from_numpy(maps).float().split(BATCH), strict=True):
            if name == "random_map":
                cells = F.unfold(resample(m, (side, side))[:, None], cell, stride=cell)  # (N, pixels, cells)
                m = F.fold(cells[..., order], side, cell, stride=cell)[:, 0]
            metric.cam_extractor.maps = LayerCAM._normalize(resample(m, (size, size))).to(scores.zero.device)
            metric.update(batch.to(scores.zero.device), k)
        result[name] = {key: float(value) for key, value in metric.summary().items()}
    return result


# ---------------------------------------------------------------- features: positions, names, queries


def clean_name(column):
    """pyjanitor's clean_names: "Average Rt(min)" -> average_rt_min_."""
    return re.sub(r"[^0-9a-z]+", "_", column.strip().lower())


COLUMNS = {
    "rt": ("average_rt_min_", "rt_min_", "rt", "retention_time", "retention_time_min_"),
    "mz": ("average_mz", "precursor_m_z", "mz", "m_z", "precursor_mz"),
    "name": ("metabolite_name", "title", "name", "compound", "compound_name"),
}


def read_features(path):
    """Table of features (DataFrame, cleaned column names) with rt in minutes, mz and name found by the usual titles.

    An alignment or peak export of MS-DIAL (four lines before the header or none) or any table with rt, mz and name;
    commas, semicolons or tabs. Annotation tags stay text. Raises Problem naming the file and the column or line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise Problem(f"{path}: {getattr(error, 'strerror', None) or 'is not UTF-8 text'}", 2) from None
    lines = text.splitlines()

    def find(columns, kind):
        return next((name for name in COLUMNS[kind] if name in columns), None)

    for header, line in enumerate(lines[:10]):  # noqa: B007 (where the table begins)
        for delimiter in "\t;,":
            columns = [clean_name(cell) for cell in next(csv.reader([line], delimiter=delimiter), [])]
            if find(columns, "rt") and find(columns, "mz"):
                break
        else:
            continue
        break
    else:
        raise Problem(
            f"{path}: no header with a retention time ('Average Rt(min)', 'rt') and an m/z ('Average Mz', 'mz')", 2
        )
    cells = list(csv.reader(lines[header + 1 :], delimiter=delimiter))
    rows = [(j, row) for j, row in enumerate(cells, header + 2) if any(cell.strip() for cell in row)]
    for j, row in rows:
        if len(row) != len(columns):
            advice = " (decimal commas need semicolons between the cells)" if delimiter == "," else ""
            raise Problem(f"{path}, line {j}: {len(row)} cells where the header has {len(columns)}{advice}", 2)
    unique = [name if name not in columns[:j] else f"{name}_{j}" for j, name in enumerate(columns)]
    table = pd.DataFrame([[cell.strip() for cell in row] for _, row in rows], columns=unique, dtype=object)
    if table.empty:
        raise Problem(f"{path}: has a header but no feature", 2)
    for column in table:
        if column.startswith("annotation_tag"):
            table[column] = table[column].str.replace(r"\.0$", "", regex=True)
        elif set(table[column].str.lower()) <= {"true", "false"}:
            table[column] = table[column].str.lower() == "true"
        else:
            filled = table[column].replace("", np.nan)
            with contextlib.suppress(ValueError, TypeError):
                table[column] = pd.to_numeric(filled)
    for kind in ("rt", "mz"):
        source = find(columns, kind)
        values = pd.to_numeric(table[source], errors="coerce")
        if values.isna().any():
            at = int(np.flatnonzero(values.isna())[0])
            raise Problem(f"{path}, line {rows[at][0]}: {source} {table[source].iloc[at]!r} is not a number", 2)
        table[kind] = values.astype(float)
    source = find(columns, "name")
    table["name"] = [row[columns.index(source)].strip() for _, row in rows] if source else ""
    return table


STRING_METHODS = ("contains", "startswith", "endswith", "lower", "upper", "strip", "len", "match", "fullmatch")
# What a comparison of columns needs and no more: pandas would run any Python that it is given.
ALLOWED = (ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.Invert, ast.USub, ast.UAdd, ast.BinOp)
ALLOWED += (ast.BitAnd, ast.BitOr, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Compare, ast.cmpop, ast.Name, ast.Load)
ALLOWED += (ast.Constant, ast.List, ast.Tuple, ast.Call, ast.Attribute, ast.keyword)


def select(table, query):
    """Rows that a pandas query selects, e.g. "3.5 < average_rt_min_ < 5 and annotation_tag_vs1_0_ == 430".

    Comparisons, and/or/not, arithmetic, in, and the methods .str.contains(...) and alike on columns; nothing else.
    A number compared with a text column is taken for text. Raises Problem with the offending part.
    """
    try:
        tree = ast.parse(query.strip(), mode="eval")
    except (SyntaxError, ValueError) as error:
        part = (getattr(error, "text", None) or query).strip()
        at = max(0, (getattr(error, "offset", None) or 1) - 1)
        raise Problem(f"--query {query!r} cannot be read at {part[at : at + 20] or part[-20:]!r}", 2) from None

    def refuse(node, reason):
        raise Problem(f"--query: {ast.get_source_segment(query.strip(), node) or query!r} {reason}", 2)

    for node in ast.walk(tree):
        if not isinstance(node, ALLOWED):
            refuse(node, "is not a comparison of columns")
        if isinstance(node, ast.Name) and node.id not in table:
            near = difflib.get_close_matches(node.id, list(table), 3, cutoff=0.3) or list(table)
            refuse(node, f"is no column; the nearest: {', '.join(near)}")
        if isinstance(node, ast.Call) and not isinstance(node.func, ast.Attribute):
            refuse(node, "is a call, which a query may not make")
        if isinstance(node, ast.Attribute) and not (
            (node.attr == "str" and isinstance(node.value, (ast.Name, ast.Call)))
            or (node.attr in STRING_METHODS and isinstance(node.value, ast.Attribute) and node.value.attr == "str")
        ):
            refuse(node, f"is not one of the string methods {', '.join(STRING_METHODS)}")

    def text_of(node):
        for constant in ast.walk(node):
            if isinstance(constant, ast.Constant) and type(constant.value) in (int, float):
                constant.value = f"{constant.value:.15g}"

    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            names = [side.id for side in sides if isinstance(side, ast.Name)]
            if any(not pd.api.types.is_numeric_dtype(table[name]) for name in names):
                for side in sides:
                    text_of(side)
    try:
        selected = table.query(ast.unparse(tree), engine="python")
    except Exception as error:
        raise Problem(f"--query {query!r} does not choose rows ({first_line(error)})", 2) from None
    if not isinstance(selected, pd.DataFrame):
        raise Problem(f"--query {query!r} does not choose rows", 2)
    if selected.empty:
        raise Problem(f"--query {query!r} selects none of the {len(table)} features", 2)
    return selected


def peak_weights(centres, n, spread):
    """Gaussian of unit height around each centre (fraction of the axis), in n bins: (F, n). spread: fraction."""
    at = (np.arange(n) + 0.5) / n
    return np.exp(-0.5 * ((at - np.asarray(centres)[:, None]) / max(spread, 0.5 / n)) ** 2)


def over_peaks(map_, x, y, recipe, mean):
    """Sum (or mean) of a map (h, w) over the place of each feature at fractions x, y.

    The place is a Gaussian of 1.5 times the picture's own filter: a feature's retention time is the cohort's average,
    and a run's own peak drifts by about a bin and tails.
    """
    spread = 1.5 * max(recipe.sigma, 1)
    wx, wy = (peak_weights(c, n, spread / b) for c, n, b in zip((x, y), map_.shape[::-1], recipe.bins, strict=True))
    sums = np.einsum("fy,yx,fx->f", wy, map_, wx, optimize=True)
    return sums / (wx.sum(1) * wy.sum(1)) if mean else sums


def rank_features(table, evidence, heats, recipe):
    """The table in the order of evidence, with rank, evidence, and the mean of each of `heats` {column: map}."""
    table = table.drop(columns=["rank", "drop", "drop_se"], errors="ignore")  # of an earlier answer
    x, y = recipe.to_fraction(table["rt"].to_numpy(), table["mz"].to_numpy())
    own = {"evidence": over_peaks(evidence, x, y, recipe, mean=False)}
    own |= {name: over_peaks(map_, x, y, recipe, mean=True) for name, map_ in heats.items()}
    table = table.assign(**own).sort_values("evidence", ascending=False, kind="stable")
    table.insert(0, "rank", np.arange(1, len(table) + 1))
    first = ["rank", "rt", "mz", "name", *own]
    return table[first + [column for column in table if column not in first]]


@torch.inference_mode()
def blanking(scores, u, k, rt, mz, recipe):
    """Mean drop of score k over the pictures u, and its standard error, when a feature's box is blank: (F,), (F,).

    The box reaches twice the width of the picture's own filter to each side.
    """
    device, size = scores.zero.device, u.shape[-1]
    at = (torch.arange(size) + 0.5) / size
    x, y = recipe.to_fraction(rt, mz)
    half = [max(2 * max(recipe.sigma, 1) / bins, 0.5 / size) for bins in recipe.bins]
    score = lambda u: torch.cat([scores(batch.to(device))[:, k].cpu() for batch in u.split(2 * BATCH)])  # noqa: E731
    whole, drops = score(u), np.zeros((len(x), len(u)))
    for i in tqdm(range(len(x)), desc="blanking", unit="feature", disable=None):
        box = ((at - y[i]).abs() <= half[1])[:, None] & ((at - x[i]).abs() <= half[0])
        drops[i] = (whole - score(u.masked_fill(box, 0))).numpy()
    error = drops.std(1, ddof=1) / len(u) ** 0.5 if len(u) > 1 else np.full(len(x), np.nan)
    return drops.mean(1), error


# ---------------------------------------------------------------- regions and figures


def regions(map_, recipe, share=0.1, most=20):
    """Boxes (rt_min, rt_max, mz_min, mz_max, heat) around what exceeds a share of the map's maximum, hottest first.

    The map is the smoothed evidence, which puts its spots on the peaks; heat is its highest value in the box.
    """
    if not map_.max() > 0:
        return []
    found = []
    spots, _ = ndimage.label(map_ >= share * map_.max())
    h, w = map_.shape
    for rows, columns in ndimage.find_objects(spots):
        (rt_min, rt_max), (mz_max, mz_min) = recipe.from_fraction(
            np.array([columns.start, columns.stop]) / w, np.array([rows.start, rows.stop]) / h
        )
        found.append([rt_min, rt_max, mz_min, mz_max, map_[rows, columns].max()])
    return sorted(([float(value) for value in row] for row in found), key=lambda row: -row[-1])[:most]


def show(axis, map_, recipe, **options):
    """A map or picture on its axes in minutes and m/z."""
    extent = [recipe.rt_min, recipe.rt_max, recipe.mz_min, recipe.mz_max]
    return axis.imshow(map_, extent=extent, aspect="auto", **options)


def intensity_of(rgb, recipe):
    """The picture's log intensity (0 ... 255) read back from its colours: jet in grey would draw rings around peaks."""
    code = np.array([1 << 16, 1 << 8, 1])
    table = colours(np.arange(256) / 255, recipe.colormap).astype(int) @ code
    order = np.argsort(table, kind="stable")
    return order[np.searchsorted(table, rgb.astype(int) @ code, sorter=order).clip(0, 255)]


def cam_grid(path, items, maps, recipe, title):
    """Article Figure 6: pictures with their phenotype and probability, map over picture."""
    columns = math.ceil(math.sqrt(len(items)))
    rows = math.ceil(len(items) / columns)
    grid = {"nrows": rows, "ncols": columns, "sharex": True, "sharey": True, "squeeze": False}
    with figure(path, title, (max(6, 3.4 * columns + 0.6), 3 * rows + 0.6), **grid) as axes:
        for axis, item, map_ in zip(axes.flat, items, maps, strict=False):
            show(axis, intensity_of(item["rgb"], recipe), recipe, cmap="gray")
            heat = np.sqrt((map_ - map_.min()) / (np.ptp(map_) or 1))  # the root shows weaker spots, too
            show(axis, heat, recipe, cmap="inferno", alpha=np.clip(0.15 + heat, 0, 0.9), vmin=0, vmax=1)
            axis.set_title(f"{item['name']}: {item['phenotype'] or 'unlabelled'}\n{item['caption']}", fontsize=9)
        for axis in axes.flat[len(items) :]:
            axis.axis("off")
        axes[0, 0].figure.supxlabel("retention time (min)")
        axes[0, 0].figure.supylabel("m/z")


def class_maps(path, heats, evidence, recipe, title):
    """Mean heat of each group of pictures {title: map} on one scale, their difference, and the evidence."""
    highest = max(heat.max() for heat in heats.values()) or 1
    panels = [(name, heat, {"cmap": "inferno", "vmin": 0, "vmax": highest}) for name, heat in heats.items()]
    if len(heats) == 2:
        difference = np.subtract(*heats.values())
        limit = np.quantile(np.abs(difference), 0.999) or 1
        panels.append(
            ("difference of the heats, first - second", difference, {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit})
        )
    panels.append(("evidence, smoothed", evidence, EVIDENCE | {"vmax": np.quantile(evidence, 0.999) or 1}))
    rows = math.ceil(len(panels) / 2)
    with figure(path, title, (10.5, 4.2 * rows), nrows=rows, ncols=2, squeeze=False) as axes:
        for axis, (name, map_, options) in zip(axes.flat, panels, strict=False):
            axis.figure.colorbar(show(axis, map_, recipe, **options), ax=axis)
            axis.set_title(name, fontsize=10)
            axis.set(xlabel="retention time (min)", ylabel="m/z")
        for axis in axes.flat[len(panels) :]:
            axis.axis("off")


def overlay(path, evidence, table, recipe, title, n_names=10):
    """Article Figures 7 and 8: features as points over the evidence, the first of the ranking by name.

    Names stand in a column beside the map, in the order of m/z, each joined to its point: they cannot overlap.
    """
    with figure(path, title, (11, 6.5)) as axis:
        shown = show(axis, evidence, recipe, **EVIDENCE, vmax=np.quantile(evidence, 0.999) or 1)
        axis.figure.colorbar(shown, ax=axis, label="evidence, smoothed", location="bottom", shrink=0.9, aspect=40)
        first = table.head(n_names).sort_values("mz").reset_index(drop=True)
        circle = {"linestyle": "", "marker": "o", "markerfacecolor": "none"}
        axis.plot(table["rt"], table["mz"], markersize=3, color="0.45", label="feature", **circle)
        axis.plot(first["rt"], first["mz"], markersize=9, color="black", label=f"first {len(first)}", **circle)
        for i, row in first.iterrows():
            name = re.sub(r"^$|^unknown$", f"m/z {row['mz']:.4f}", str(row["name"]).strip(), flags=re.IGNORECASE)
            axis.annotate(
                f"{row['rank']}. {name[:34]}\n    {row['rt']:.2f} min, m/z {row['mz']:.3f}",
                (row["rt"], row["mz"]),
                xytext=(1.03, (i + 0.5) / len(first)),
                textcoords="axes fraction",
                va="center",
                fontsize=8,
                arrowprops={"arrowstyle": "-", "color": "0.4", "lw": 0.6, "relpos": (0, 0.5)},
                annotation_clip=False,
            )
        axis.set(xlim=(recipe.rt_min, recipe.rt_max), ylim=(recipe.mz_min, recipe.mz_max))
        axis.set(xlabel="retention time (min)", ylabel="m/z")
        axis.legend(loc="upper left", fontsize=8)


# ---------------------------------------------------------------- one command


def load_items(args, checkpoint):
    """[{name, phenotype, rgb (bins picture)}] of --input or of the split, and the data set's folder."""
    recipe, classes = checkpoint["recipe"], checkpoint["classes"]
    data = Path(args.data or checkpoint["config"]["data"])
    if not args.input:
        if not (args.data or data.is_dir()):
            raise Problem(f"{data}: this run's data set is not there any more; say where it is with --data", 2)
        pictures = [p for p in find_pictures(data, (args.split,))[args.split] if not p.is_copy]
    else:
        pictures = []
        given = [path for f in map(Path, args.input) for path in (find_runs(f).values() if f.is_dir() else [f])]
        for path in given:
            if not path.is_file():
                raise Problem(f"--input {path}: no such file", 2)
            if path.name.lower().endswith(RUN_SUFFIXES):
                pictures.append(path)
            elif path.suffix.lower() == ".png":
                pictures.append(Picture(path, path.resolve().parent.name))
            else:
                raise Problem(f"--input {path}: neither a PNG of convert.py nor {', '.join(RUN_SUFFIXES)}", 2)
    items = []
    for picture in tqdm(pictures, desc="reading", unit="picture", disable=None):
        if isinstance(picture, Path):
            rgb, statistics = picture_of_run(picture, recipe)
            if statistics["outside"] > 0.01:
                tqdm.write(f"{picture.name}: {statistics['outside']:.0%} of the intensity lies outside the axes")
            items.append({"name": picture.name.partition(".")[0], "phenotype": "", "rgb": rgb})
            continue
        if picture.recipe != recipe:
            ours, theirs = recipe.to_text(), picture.recipe.to_text()
            what = next(key for key in ours if ours[key] != theirs[key])
            raise Problem(f"{picture.path}: its {what} is {theirs[what]}, the run was trained with {ours[what]}", 2)
        known = picture.phenotype if picture.phenotype in classes else ""
        items.append({"name": picture.sample_name, "phenotype": known, "rgb": picture.load().permute(1, 2, 0).numpy()})
    return items, data


def output_folder(run, args, checkpoint):
    """RUN/explain, or below it a folder named after the flags that ask another question."""

    def digest(items):  # two files of one name are two questions
        items = [str(item.resolve() if isinstance(item, Path) else item) for item in items]
        return f"-{zlib.crc32(repr(items).encode()):08x}"

    parts = []
    if args.input:
        more = f"+{len(args.input) - 1}" if args.input[1:] else ""
        parts.append("input-" + Path(args.input[0]).name.partition(".")[0] + more + digest(map(Path, args.input)))
    elif args.split != "test":
        parts.append(args.split)
    if args.data:
        parts.append(f"data-{Path(args.data).resolve().name}")
    if args.class_name and args.class_name != checkpoint["classes"][-1]:
        parts.append(f"class-{args.class_name}")
    if args.layers:
        parts.append("layers-" + "+".join(args.layers))
    if args.features:
        parts.append(f"features-{Path(args.features).stem}{digest([Path(args.features)])}")
    if args.query:
        parts.append("query" + digest([args.query]))
    return Path(run) / "explain" / "_".join(parts)


def features_inside(args, data, recipe):
    """The features of --features, or of the data set's own list, that --query selects inside the axes; None without."""
    path = args.features or data / "features.csv"
    if not args.features:
        if not path.is_file():
            if args.query:
                raise Problem("--query needs --features", 2)
            return None
        print(f"features: {path}, found in the data set's folder")
    table = read_features(path)
    if args.query:
        table = select(table, args.query)
    x, y = recipe.to_fraction(table["rt"], table["mz"])
    here = np.asarray((x >= 0) & (x <= 1) & (y >= 0) & (y <= 1))
    print(f"{here.sum()} features inside the axes, {(~here).sum()} outside")
    if not here.any():
        axes = f"{recipe.rt_min:.2f}-{recipe.rt_max:.2f} minutes, m/z {recipe.mz_min:.2f}-{recipe.mz_max:.2f}"
        raise Problem(f"{path}: none of its {len(table)} features lies inside the axes of the pictures, {axes}", 2)
    return table[here]


def write_features(out, table, drops):
    """features.csv: the ranked table with the drop of the logit of its first features, which are also printed."""
    at = table.columns.get_loc("heat_difference") + 1
    for i, (name, values) in enumerate(zip(("drop", "drop_se"), drops, strict=True)):
        table.insert(at + i, name, np.r_[values, np.full(len(table) - len(values), np.nan)])
    with whole_file(out / "features.csv") as temporary:
        table.to_csv(temporary, index=False, float_format="%.6g")
    print("rank  min     m/z       evidence   drop of the logit  name")
    for row in table.head(10).itertuples():
        drop = "-" if math.isnan(row.drop) else f"{row.drop:7.3f}"
        drop += "" if math.isnan(row.drop_se) else f" ± {row.drop_se:.3f}"
        print(f"{row.rank:4d}  {row.rt:5.2f}  {row.mz:9.4f}  {row.evidence:9.3g}  {drop:17s}  {row.name}")


def choose_pictures(of_class, n, seed):
    """Indices of n pictures for the grid, both groups as evenly as they allow, drawn with the seed."""
    rng = np.random.default_rng(seed)
    sides = [list(rng.permutation(np.flatnonzero(side))) for side in (of_class, ~of_class)]
    chosen = []
    while len(chosen) < min(n, len(of_class)):
        for side in sides:
            if side and len(chosen) < n:
                chosen.append(int(side.pop()))
    return chosen


def explain(args):
    run = find_run(args.run)
    model, checkpoint = load_run(run)
    classes, recipe = checkpoint["classes"], checkpoint["recipe"]
    if args.class_name and args.class_name not in classes:
        raise Problem(f"--class {args.class_name!r} is not one of {', '.join(classes)}", 2)
    class_name = args.class_name or classes[-1]
    k = classes.index(class_name)
    layers = choose_layers(model, args.layers)
    items, data = load_items(args, checkpoint)
    table = features_inside(args, data, recipe)  # before the work: a bad table should not cost two minutes

    device = choose_device()
    scores = Scores(model, recipe).to(device).eval()
    transform = evaluation_transform(checkpoint["image_size"], model.mean, model.std)
    to_tensor = lambda rgb: transform(torch.from_numpy(rgb).permute(2, 0, 1).contiguous())  # noqa: E731
    u = (torch.stack([to_tensor(item["rgb"]) for item in items]) - scores.zero.cpu()).contiguous()  # (N, 3, size, size)
    with torch.inference_mode():
        logits = torch.cat([model(batch.to(device) + scores.zero).cpu() for batch in u.split(BATCH)])
    probabilities = probabilities_of(logits).numpy()
    called = called_class(probabilities)
    if len(set(called)) == 1:
        print(f"all are called {classes[called[0]]}: evidence is what differs from a blank picture, not covariance")
    for item, p, c in zip(items, probabilities, called, strict=True):
        item["group"] = item["phenotype"] or classes[c]  # a run that nobody labelled counts as what it is called
        item["caption"] = f"P({class_name}) = {p[k]:.2f}"
    of_class = np.array([item["group"] == class_name for item in items])
    other = classes[1 - k] if len(classes) == 2 else f"not {class_name}"
    groups = {name: chosen for name, chosen in ((class_name, of_class), (other, ~of_class)) if chosen.any()}

    shape = recipe.bins[::-1]  # (n_mz, n_rt)
    maps = heat_maps(scores, layers, u, k, shape)
    heats = {name: maps[chosen].mean(0) for name, chosen in groups.items()}
    evidence = evidence_map(scores, u, k)
    if evidence.max() < 1e-9:  # the demo's has 0.03
        print(f"warning: the evidence is {evidence.max():.1g} at most: the network answers to nothing, this is noise")
    # As weights of a sum the pixels stay as they are; for the eye they are spread as wide as a peak.
    smooth = resample(torch.from_numpy(evidence)[None], shape)[0].numpy()
    smooth = ndimage.gaussian_filter(smooth, 1.5 * max(recipe.sigma, 1))

    out = output_folder(run, args, checkpoint)
    out.mkdir(parents=True, exist_ok=True)
    method = f"LayerCAM at {', '.join(name for name, _ in layers)}" if layers else "Gradient x picture"
    origin = checkpoint["config"].get("weights_origin", "unknown weights")
    title = f"{checkpoint['backbone']} ({origin}), class '{class_name}'"
    chosen = choose_pictures(of_class, args.n, args.seed)
    grid_title = f"{method}, each from its minimum to its maximum; {title}"
    cam_grid(out / "cam_grid.png", [items[i] for i in chosen], maps[chosen], recipe, grid_title)
    called_only = "" if any(item["phenotype"] for item in items) else "called "
    named = {f"mean heat, {called_only}{name} (pictures: {groups[name].sum()})": heat for name, heat in heats.items()}
    class_maps(out / "class_maps.png", named, smooth, recipe, f"{method}, and evidence; {title}")
    columns = ("rt_min", "rt_max", "mz_min", "mz_max", "heat")
    rows = [[f"{value:.6g}" for value in row] for row in regions(smooth, recipe)]
    write_csv(out / "regions.csv", [columns, *rows])
    called_so = np.flatnonzero(called == k)
    result = {"class": class_name, "layers": [name for name, _ in layers], "pictures": len(called_so)}
    if len(called_so):
        result |= faithfulness(scores, u[called_so], maps[called_so], k, args.seed)
    write_json(out / "faithfulness.json", result)
    if table is not None:
        columns = {f"heat_{name}": heat for name, heat in heats.items()}
        columns["heat_difference"] = np.subtract(*heats.values()) if len(heats) == 2 else np.full(shape, np.nan)
        table = rank_features(table, evidence, columns, recipe)
        top = table.head(args.top)
        members = u[of_class] if of_class.any() else u
        drops = blanking(scores, members, k, top["rt"].to_numpy(), top["mz"].to_numpy(), recipe)
        write_features(out, table, drops)
        overlay(out / "overlay.png", smooth, table, recipe, f"Features over the evidence; {title}")
    print(f"{len(items)} pictures explained in {out}")
    return 0


def parse_arguments(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("run", nargs="?", help="run folder of train.py (default: the newest under runs/)")
    add = parser.add_argument_group("pictures").add_argument
    add("--split", choices=SPLITS, default="test", help="which pictures of the run's data set")
    add("--data", metavar="DIR", help="the data set, if it is no longer where the run was trained")
    text = "pictures of convert.py, raw runs, or folders of raw runs, in place of a split"
    add("--input", nargs="+", metavar="FILE", help=text)
    add("--n", type=bounded(int, 1), default=9, help="pictures in cam_grid.png")
    add = parser.add_argument_group("map").add_argument
    add("--class", dest="class_name", metavar="NAME", help="phenotype to explain (default: the positive one)")
    add("--layers", nargs="+", metavar="NAME", help="layers of the backbone (default: the deepest that is not coarse)")
    add = parser.add_argument_group("features").add_argument
    text = "MS-DIAL export or table with rt (minutes), mz, name (default: the data set's features.csv, if any)"
    add("--features", metavar="CSV", help=text)
    add("--query", help="pandas query on the cleaned column names, such as '460 < average_mz < 500'")
    add("--top", type=bounded(int, 0), default=50, help="features of the ranking to confirm by blanking")
    add("--seed", type=bounded(int, 0), default=2643, help="of the pictures in the grid and the random map")
    return parser.parse_args(argv)


def main():
    return explain(parse_arguments())


if __name__ == "__main__":
    run_script(main)
