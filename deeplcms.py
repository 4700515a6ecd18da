"""What a picture is, and the few things that all scripts share. Read this file first.

Article, "Creating the pseudo images": a raw LC-MS run becomes a picture, x retention time, y m/z, colour log intensity.
`picture_of_run` is that recipe, `Recipe` its settings, which every PNG and every checkpoint carries. `find_pictures`
is the table of a data set; `label_of` and `metrics_of` say what is learned and how well. No command of its own, and no
torch: this is all that a worker of convert.py loads.
"""

import argparse
import json
import math
import os
import re
import sys
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.special import softmax

SPLITS = ("train", "val", "test")
RUN = re.compile(r"([^.].*)\.(mzml|mzxml)(\.gz|\.bz2)?", re.IGNORECASE)  # the name of a raw run's file


# ---------------------------------------------------------------- one run -> one picture
@dataclass(frozen=True)
class Recipe:
    """How a run becomes a picture. A new field is in every PNG, comparison and checkpoint without being listed."""

    rt_min: float  # minutes
    rt_max: float
    mz_min: float
    mz_max: float
    bins: tuple = (500, 500)  # of retention time, of m/z
    normalize: str = "rt"  # divided by the highest bin of each retention time ("rt") or of the run ("global")
    min_intensity: float = 0.0  # weaker peaks are left out
    sigma: float = 2.0  # of the Gaussian filter, in bins
    colormap: str = "jet"

    def to_text(self):
        """The recipe as the text chunks of a PNG; str keeps every digit of the axes."""
        text = {name: str(value) for name, value in asdict(self).items()}
        return text | {"bins": "{} {}".format(*self.bins)}

    @classmethod
    def from_text(cls, text):
        """The recipe in the text chunks of a PNG or in a checkpoint; KeyError where a setting is missing."""
        read = {tuple: lambda t: tuple(map(int, t.split())), bool: lambda t: t == "True"}
        read |= {int: int, float: float, str: str}
        return cls(**{field.name: read[field.type](text[field.name]) for field in fields(cls)})

    def to_fraction(self, rt, mz):
        """Minutes and m/z -> fraction of the picture from the left and from the top: it survives every resize."""
        x = (np.asarray(rt) - self.rt_min) / (self.rt_max - self.rt_min)
        return x, 1 - (np.asarray(mz) - self.mz_min) / (self.mz_max - self.mz_min)

    def from_fraction(self, x, y):
        """Fraction of the picture from the left and from the top -> minutes and m/z."""
        rt = self.rt_min + np.asarray(x) * (self.rt_max - self.rt_min)
        return rt, self.mz_min + (1 - np.asarray(y)) * (self.mz_max - self.mz_min)

    def bin_size(self):
        """Minutes and m/z of one bin."""
        return (self.rt_max - self.rt_min) / self.bins[0], (self.mz_max - self.mz_min) / self.bins[1]

    def zero_colour(self):
        """RGB (3,) uint8 of zero intensity, dark blue in jet: what "nothing measured" looks like."""
        return colours(np.zeros((1, 1)), self.colormap)[0, 0]


def picture_of_run(path, recipe):
    """Raw run -> picture uint8 (n_mz, n_rt, 3) and the statistics of the run; InputError if there is nothing to see."""
    counts, statistics = histogram_of_run(path, recipe)
    if not counts.any():
        own = "{rt_first:.2f}-{rt_last:.2f} min, m/z {mz_low:.2f}-{mz_high:.2f}".format(**statistics)
        axes = f"{recipe.rt_min:.2f}-{recipe.rt_max:.2f} min, m/z {recipe.mz_min:.2f}-{recipe.mz_max:.2f}"
        raise InputError(f"{path.name}: no peak inside the axes, {axes}; its own are {own}")
    return picture_of_counts(counts, recipe), statistics


def histogram_of_run(path, recipe):
    """Intensity summed in bins, float (n_rt, n_mz), and the statistics of the run.

    The edges and the last bin are those of numpy.histogram2d. As the m/z of a scan ascend, its bins are slices: one
    binary search an edge instead of one a peak. `outside` is the share of intensity that lies off the axes.
    """
    rt_edges = np.linspace(recipe.rt_min, recipe.rt_max, recipe.bins[0] + 1)
    mz_edges = np.linspace(recipe.mz_min, recipe.mz_max, recipe.bins[1] + 1)
    counts = np.zeros(recipe.bins)  # (n_rt, n_mz)
    n_scans, n_peaks, total = 0, 0, 0.0
    rts, mzs = [], []
    start_time, scans = read_run(path, recipe.min_intensity)
    for rt, mz, intensity in scans:
        n_scans += 1
        if len(mz) == 0:
            continue
        n_peaks += len(mz)
        total += intensity.sum(dtype=np.float64)
        rts.append(rt)
        mzs += [mz[0], mz[-1]]
        column = np.searchsorted(rt_edges, rt, side="right") - 1
        column -= rt == rt_edges[-1]  # the last bin includes its right edge
        if 0 <= column < len(counts):
            cuts = np.searchsorted(mz, mz_edges)
            cuts[-1] = np.searchsorted(mz, mz_edges[-1], side="right")
            sums = np.add.reduceat(np.append(intensity, 0.0), cuts)[:-1]  # append also makes it float64
            sums[cuts[:-1] == cuts[1:]] = 0  # reduceat gives an empty slice its first element
            counts[column] += sums
    if n_peaks == 0:
        raise InputError(f"{path.name}: holds no MS1 peaks of intensity {recipe.min_intensity:g} or more")
    statistics = {"n_scans": n_scans, "n_peaks": n_peaks, "total_intensity": total}
    statistics |= {"rt_first": min(rts), "rt_last": max(rts), "mz_low": min(mzs), "mz_high": max(mzs)}
    statistics["outside"] = max(0.0, 1 - counts.sum() / (total or 1))
    if start_time:
        statistics["start_time"] = start_time
    return counts, statistics


def picture_of_counts(counts, recipe):
    """Histogram (n_rt, n_mz) -> picture uint8 (n_mz, n_rt, 3), retention time to the right and m/z up."""
    highest = counts.max(axis=1, keepdims=True) if recipe.normalize == "rt" else counts.max()
    values = counts / np.where(highest > 0, highest, 1)
    if recipe.sigma > 0:
        values = gaussian_filter(values, recipe.sigma)
    values = np.log1p(255 * values / (values.max() or 1)) / np.log(256)  # weak compounds are most of the metabolome
    return colours(values.T[::-1], recipe.colormap)


def colours(values, colormap):
    """Values in 0 ... 1 -> uint8 RGB (height, width, 3) of a matplotlib colormap."""
    return np.ascontiguousarray(matplotlib.colormaps[colormap](values, bytes=True)[..., :3])


def intensity_of(picture, colormap):
    """Read back from the colours, uint8 (height, width, 3): the log intensity, float32 (height, width) in 0 ... 1."""
    code = np.array([1 << 16, 1 << 8, 1])
    table = colours(np.arange(256) / 255, colormap).astype(int) @ code
    order = np.argsort(table, kind="stable")
    place = np.searchsorted(table, picture.astype(int) @ code, sorter=order)
    return (order[place.clip(0, 255)] / 255).astype(np.float32)


def profiles_of(picture, recipe):
    """Mean log intensity of a picture at each retention time (n_rt,) and at each m/z (n_mz,), both ascending."""
    map_ = intensity_of(picture, recipe.colormap)
    return map_.mean(0), map_[::-1].mean(1)


def shift_of(profile, usual):
    """By how many bins, a tenth of all at most, a profile (n,) lies later than the usual one: highest correlation."""
    n, most = len(profile), len(profile) // 10
    likeness = {}
    for lag in sorted(range(-most, most + 1), key=abs):  # of equal ones the smallest wins
        a, b = profile[max(0, lag) : n + min(0, lag)], usual[max(0, -lag) : n + min(0, -lag)]
        a, b = a - a.mean(), b - b.mean()
        likeness[lag] = round(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-12), 6)
    return max(likeness, key=likeness.get)


def shifts_of(profiles, usual, recipe):
    """{"rt_shift": minutes, "mz_shift": m/z} by which the profiles of a picture lie beyond the usual ones."""
    rt_bin, mz_bin = recipe.bin_size()
    return {"rt_shift": rt_bin * shift_of(profiles[0], usual[0]), "mz_shift": mz_bin * shift_of(profiles[1], usual[1])}


def slow_waves(at):
    """Waves (6, n) at fractions of an axis. c @ waves, c six normal numbers of deviation s, deviates by s everywhere.

    So do retention time along the gradient and sensitivity along m/z drift from run to run.
    """
    phase = np.pi * np.asarray(at)
    return np.array([wave(k * phase) / k**0.5 for k in (1, 2, 3) for wave in (np.sin, np.cos)]) / (11 / 6) ** 0.5


def read_run(path, min_intensity=0.0):
    """When a run was started, "YYYY-MM-DD hh:mm:ss" or "", and an iterator over its MS1 scans, weaker peaks left out.

    A scan is (retention time in minutes, m/z ascending, intensity). pyopenms tells mzML from mzXML, unpacks .gz and
    .bz2 and knows the time's unit. For another instrument's format, ion mobility or MS2, change this function alone.
    """
    import pyopenms  # not at the top: --help need not wait for it

    with open(path, "rb") as file:
        if not file.read(1):
            raise InputError(f"{path.name}: is empty (zero bytes)")
    pyopenms.LogConfigHandler.getInstance().setLogLevel("NONE")  # what is wrong comes as an exception, too
    options, handler, experiment = pyopenms.PeakFileOptions(), pyopenms.FileHandler(), pyopenms.MSExperiment()
    options.setMSLevels([1])
    handler.setOptions(options)
    try:
        handler.loadExperiment(str(path), experiment)
    except RuntimeError:  # its message names a line of C++
        raise InputError(f"{path.name}: cannot be parsed as mzML or mzXML; is it damaged or cut off?") from None

    def scans():
        for spectrum in experiment:
            if not spectrum.isSorted():
                spectrum.sortByPosition()
            mz, intensity = spectrum.get_peaks()
            strong = intensity >= min_intensity
            yield spectrum.getRT() / 60, mz[strong], intensity[strong]

    started = experiment.getDateTime()
    return started.get() if started.isValid() else "", scans()


# ---------------------------------------------------------------- raw runs and pictures of a data set
def find_runs(folder):
    """{sample name: path} of the mzML and mzXML files in a folder, packed or not."""
    runs = {}
    for path in filter(is_run, sorted(Path(folder).iterdir())):
        name = RUN.fullmatch(path.name)[1]
        if name in runs:
            raise InputError(f"{folder}: {runs[name].name} and {path.name} are both sample '{name}': keep one")
        runs[name] = path
    return runs


def is_run(path):
    return RUN.fullmatch(path.name) is not None


def files_of(paths):
    """[Path] of files, and of the runs in those that are folders."""
    files = []
    for path in map(Path, paths):
        files += sorted(filter(is_run, path.glob("*"))) or [path]
    return files


def find_pictures(data_dir, splits=SPLITS):
    """Table of the pictures of a data set, a row each, and the Recipe that all of them share.

    Columns: path, split, phenotype, sample_name, copy (a shifted one?), and those of samples.csv, group among them.
    """
    data_dir, rows, expected = Path(data_dir), [], None
    if not (data_dir / "samples.csv").is_file():
        raise InputError(f"{data_dir}: no such data set (--data), or an unfinished one: run convert.py to its end")
    for split in splits:
        paths = sorted(data_dir.glob(f"{split}/*/[!.]*.png"))
        if not paths:
            raise InputError(f"{data_dir}: no pictures in {split}/<phenotype>/*.png")
        for path in paths:
            text, recipe = read_text(path)
            expected = expected or recipe
            check_recipe(recipe, expected, path)
            row = {"path": path, "split": split, "phenotype": path.parent.name, "sample_name": text["sample_name"]}
            rows.append(row | {"copy": text["shift"] != "0 0"})
    samples = read_table(data_dir / "samples.csv").drop(columns=["split", "phenotype"])
    return pd.DataFrame(rows).merge(samples, on="sample_name", how="left"), expected


def in_turn(pictures, n, seed):
    """n rows for a figure, drawn at random with the seed, phenotypes in turn."""
    drawn = pictures.sample(frac=1, random_state=seed)
    turn = drawn.groupby("phenotype").cumcount()
    return drawn.loc[turn.sort_values(kind="stable").index].head(n)


def check_recipe(recipe, expected, path):
    """Refuse pictures of another kind: on other axes the same pixel is another compound."""
    if differing := first_difference(asdict(recipe), asdict(expected)):
        other = "{} is {}, not {}".format(*differing)
        raise InputError(f"{path}: another kind of picture than the others or the run's: {other}")


def read_text(path):
    """(text chunks, Recipe) of a PNG that convert.py made."""
    try:
        with Image.open(path) as image:
            return image.text, Recipe.from_text(image.text)
    except (OSError, SyntaxError, AttributeError, KeyError, ValueError) as error:
        raise InputError(f"{path}: not a whole picture of this convert.py ({error}); make it again") from None


def read_picture(path):
    """Pixels of a PNG, uint8 (height, width, 3)."""
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


# ---------------------------------------------------------------- what is learned, and how well
def label_of(pictures, classes):
    """Label (N,) of each row of find_pictures: the index of its phenotype among the classes."""
    return pictures["phenotype"].map(classes.index).to_numpy()


def probabilities_of(logits):
    """Logits (N, 1) of class 1, or (N, K), -> probability of each class (N, 2 or K)."""
    logits = np.asarray(logits, float)
    if logits.shape[1] == 1:
        logits = np.concatenate([np.zeros_like(logits), logits], axis=1)
    return softmax(logits, axis=1)


def called_class(probabilities, threshold=0.5):
    """Class (N,) of probabilities (N, K): of two, class 1 from `threshold` on; of more, the most probable."""
    return (probabilities[:, 1] >= threshold).astype(int) if probabilities.shape[1] == 2 else probabilities.argmax(1)


def confusion_of(labels, called, n_classes):
    """Number of pictures of each class (row) that are called each class (column)."""
    confusion = np.zeros((n_classes, n_classes), int)
    np.add.at(confusion, (labels, called), 1)
    return confusion


def metrics_of(labels, logits, threshold=0.5):
    """{name: value} of logits (N, 1 or K); nan where undefined. Two classes: of class 1; more: means over them.

    A name here is a column of epochs.csv and a line of every table; the first three are shown while training.
    Specificity is the share of all others that are not called the class.
    """
    probabilities = probabilities_of(logits)
    n_classes = probabilities.shape[1]
    confusion = confusion_of(labels, called_class(probabilities, threshold), n_classes)
    hits, actual, called = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    with np.errstate(invalid="ignore"):
        recall = hits / actual
        precision = hits / called
        f1 = 2 * hits / (actual + called)
        specificity = 1 - (called - hits) / (len(labels) - actual)
    auc = np.array([roc_auc(labels == k, probabilities[:, k]) for k in range(n_classes)])
    squared_error = ((probabilities - np.eye(n_classes)[labels]) ** 2).sum(1).mean()
    shown = [1] if n_classes == 2 else range(n_classes)
    return {
        "accuracy": hits.sum() / len(labels),
        "f1": f1[shown].mean(),
        "roc_auc": auc[shown].mean(),
        "balanced_accuracy": recall.mean(),
        "precision": precision[shown].mean(),
        "recall": recall[shown].mean(),
        "specificity": specificity[shown].mean(),
        "brier": squared_error / 2 if n_classes == 2 else squared_error,
    }


def roc_auc(positive, score):
    """Chance that a positive scores above a negative, ties counting half (Mann-Whitney); nan with one class only."""
    rank, n, m = pd.Series(score).rank().to_numpy(), positive.sum(), (~positive).sum()
    return (rank[positive].sum() - n * (n + 1) / 2) / (n * m or np.nan)


# ---------------------------------------------------------------- files, figures, command lines
class InputError(ValueError):
    """Something the user can put right: its message, one line, names the file, flag or column."""


def run_script(main):
    """Call main; what the user can put right ends in one line and exit status 1, anything else in a traceback."""
    try:
        sys.exit(main())
    except (InputError, OSError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on where it stopped")


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The docstring as it stands, and the default of every flag that has one."""

    def _get_help_string(self, action):
        return super()._get_help_string(action) if action.default not in (None, "") else action.help


class Parser(argparse.ArgumentParser):
    """Such help; and a wrong flag is answered with one line, without the usage, which would hide it."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=Help)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def number(kind, low, word=None, high=math.inf):
    """Type of a flag: an int or float from `low` to `high`, or that word."""

    def parse(text):
        if text == word:
            return text
        if not low <= kind(text) <= high:
            limits = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text} must be {limits}")
        return kind(text)

    return parse


@contextmanager
def whole_file(path):
    """Yield a temporary path that becomes `path` when the block ends well: a file is whole or not there."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    with whole_file(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def write_json(path, contents):
    write_text(path, json.dumps(contents, indent=1, ensure_ascii=False, default=str))


def write_table(path, table):
    with whole_file(path) as temporary:
        table.to_csv(temporary, index=False)


def read_table(path, skiprows=0, **options):
    """DataFrame of text: commas, semicolons or tabs, with or without byte-order mark. options: of pandas.read_csv."""
    options = {"dtype": str, "keep_default_na": False, "encoding": "utf-8-sig"} | options
    try:
        with open(path, encoding="utf-8-sig") as file:
            header = file.readlines()[skiprows]
        separator = max(",;\t", key=header.count)
        return pd.read_csv(path, sep=separator, skiprows=skiprows, **options)
    except (ValueError, IndexError, OSError) as error:  # of pandas, too: ragged lines, no columns, not UTF-8
        raise InputError(f"{path}: is no table of text ({first_line(error)})") from None


def first_difference(before, now):
    """(name, value before, value now) of the first setting that differs, None if all of `now` are the same."""
    return next(((name, before.get(name), now[name]) for name in now if before.get(name) != now[name]), None)


def first_line(error):
    """Of an exception's message: libraries like to write pages."""
    return str(error).strip().partition("\n")[0][:150] or type(error).__name__


def first_few(names, n=5):
    """'a, b, c and 7 more'"""
    names = sorted(map(str, names))
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")


@contextmanager
def figure(path, title, size, **subplots):
    """Yield the axes of a figure (inches); the PNG is written when the block ends well. "; " in the title breaks it."""
    drawing = Figure(figsize=size, layout="constrained")
    axes = drawing.subplots(**subplots)
    drawing.suptitle(title.replace("; ", "\n"), fontsize=11)
    yield axes
    with whole_file(path) as temporary:
        drawing.savefig(temporary, dpi=150)


def show(axis, map_, recipe, **options):
    """A map or picture on its axes in minutes and m/z."""
    extent = recipe.rt_min, recipe.rt_max, recipe.mz_min, recipe.mz_max
    return axis.imshow(map_, extent=extent, aspect="auto", **options)


def label_axes(axes):
    """Retention time and m/z, for a figure of pictures."""
    for axis in axes.flat:
        axis.set_axis_on() if axis.images else axis.set_axis_off()
    axes.flat[0].figure.supxlabel("retention time (min)")
    axes.flat[0].figure.supylabel("m/z")
