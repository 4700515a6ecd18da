"""What a picture is, and the few things that all scripts share. Read this file first.

Article, "Creating the pseudo images": a raw LC-MS run becomes a picture, x retention time, y m/z, colour log intensity.
`make_picture` is that recipe, `Recipe` its settings. It has no command of its own and needs no torch: a worker of
convert.py loads nothing else.
"""

import argparse
import json
import os
import re
import sys
import unicodedata
import zlib
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from xml.parsers import expat

import matplotlib
import numpy as np
import pandas as pd
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.special import softmax
from scipy.stats import rankdata

SPLITS = ("train", "val", "test")
NORMALIZE = ("quantile", "rt", "global")
RAW_FILE = re.compile(r"([^.].*)\.(mzml|mzxml)(\.gz|\.bz2)?", re.IGNORECASE)  # the name of a raw run's file
# The numbers known of every run: columns of samples.csv, text of a PNG, and of training runs part of a checkpoint.
STATISTICS = "n_scans scan_kinds n_peaks total_intensity outside rt_first rt_last rt_gap mz_low mz_high".split()


# ---------------------------------------------------------------- one run -> one picture
@dataclass(frozen=True)
class Recipe:
    """How a run becomes a picture. A new field is in every PNG, comparison and checkpoint without being listed."""

    rt_min: float  # minutes
    rt_max: float
    mz_min: float
    mz_max: float
    bins: tuple = (500, 500)  # of retention time, of m/z
    normalize: str = "quantile"  # by what a run is divided: see render_histogram
    min_intensity: float = 0.0  # weaker peaks are left out
    sigma: float = 2.0  # of the Gaussian filter, in bins
    colormap: str = "jet"
    only_polarity: str = ""  # positive or negative: scans of the other one are left out

    def to_text(self):
        """The recipe as the text chunks of a PNG; str keeps every digit of the axes."""
        text = {name: str(value) for name, value in vars(self).items()}
        return text | {"bins": "{} {}".format(*self.bins)}

    @classmethod
    def from_text(cls, text):
        """The recipe in the text chunks of a PNG or in a checkpoint; KeyError or ValueError where it is another one."""
        if text["normalize"] not in NORMALIZE:
            raise ValueError(f"normalize {text['normalize']} is no longer made")
        read = {tuple: lambda t: tuple(map(int, t.split())), bool: lambda t: t == "True"}
        return cls(**{field.name: read.get(field.type, field.type)(text[field.name]) for field in fields(cls)})

    def to_fraction(self, rt, mz):
        """Minutes and m/z -> fraction of the picture from the left and from the top: it survives every resize."""
        x = (rt - self.rt_min) / (self.rt_max - self.rt_min)
        return x, 1 - (mz - self.mz_min) / (self.mz_max - self.mz_min)

    def from_fraction(self, x, y):
        """Fraction of the picture from the left and from the top -> minutes and m/z."""
        rt = self.rt_min + x * (self.rt_max - self.rt_min)
        return rt, self.mz_min + (1 - y) * (self.mz_max - self.mz_min)

    def bin_size(self):
        """Minutes and m/z of one bin."""
        return (self.rt_max - self.rt_min) / self.bins[0], (self.mz_max - self.mz_min) / self.bins[1]


def make_picture(path, recipe):
    """Raw run -> picture uint8 (n_mz, n_rt) and the statistics of the run; InputError if there is nothing to see."""
    counts, statistics = make_histogram(path, recipe)
    if not counts.any():
        own = "{rt_first:.2f}-{rt_last:.2f} min, m/z {mz_low:.2f}-{mz_high:.2f}".format(**statistics)
        axes = f"{recipe.rt_min:.2f}-{recipe.rt_max:.2f} min, m/z {recipe.mz_min:.2f}-{recipe.mz_max:.2f}"
        raise InputError(f"{path.name}: no peak inside the axes, {axes}; its own are {own}")
    picture = render_histogram(counts, recipe)
    if picture.shape != recipe.bins[::-1]:  # in a fork: each place in minutes and m/z would be wrong
        raise InputError(f"a picture has the shape {picture.shape}, and its recipe has the bins {recipe.bins}")
    return picture, statistics


def make_histogram(path, recipe):
    """Intensity summed in bins, float (n_rt, n_mz), and the statistics of the run.

    The edges and the last bin are those of numpy.histogram2d. `outside` is the share of intensity off the axes.
    """
    rt_edges = np.linspace(recipe.rt_min, recipe.rt_max, recipe.bins[0] + 1)
    mz_edges = np.linspace(recipe.mz_min, recipe.mz_max, recipe.bins[1] + 1)
    mz_edges[-1] = np.nextafter(recipe.mz_max, np.inf)  # the last bin includes its right edge
    counts = np.zeros(recipe.bins)  # (n_rt, n_mz)
    said, scans = read_raw(path, recipe.min_intensity, recipe.only_polarity)
    n_peaks, total, rts, mzs = 0, 0.0, [], []
    for rt, mz, intensity in scans:
        if not (0 <= rt < np.inf and mz[0] > 0 and np.isfinite(mz.sum())):
            place = f"{60 * rt:g} s (-1: without a time) and m/z {mz[0]:g} to {mz[-1]:g}"
            raise InputError(f"{path.name}: holds a scan at {place}, which cannot be")
        n_peaks += len(mz)
        total += intensity.sum(dtype=np.float64)
        rts.append(rt)
        mzs += [mz[0], mz[-1]]
        if recipe.rt_min <= rt <= recipe.rt_max:
            column = np.searchsorted(rt_edges[:-1], rt, side="right") - 1  # its last bin, too
            # The m/z ascend, so that the peaks of a bin are a slice: one search an edge instead of one a peak.
            starts = np.searchsorted(mz, mz_edges)
            padded = np.append(intensity, 0.0)  # float64; and a slice may start behind the last peak
            sums = np.add.reduceat(padded, starts)[:-1]
            counts[column] += np.where(np.diff(starts) > 0, sums, 0)  # reduceat gives an empty slice its first element
    if n_peaks == 0:
        least = f"{recipe.min_intensity:g} or more" if recipe.min_intensity else "above 0"
        raise InputError(f"{path.name}: holds no MS1 peaks of intensity {least} {recipe.only_polarity}".rstrip())
    statistics = {"n_peaks": n_peaks, "total_intensity": total, "outside": max(0.0, 1 - counts.sum() / total)}
    statistics |= {"rt_first": min(rts), "rt_last": max(rts), "rt_gap": np.diff(sorted(rts)).max(initial=0)}
    statistics |= {"mz_low": min(mzs), "mz_high": max(mzs)}
    return counts, said | statistics


def render_histogram(counts, recipe):
    """Histogram (n_rt, n_mz) -> picture uint8 (n_mz, n_rt): log intensity in 256 levels, time to the right, m/z up.

    quantile: divided by the 0.85 quantile of the histogram after a wide filter; 255 times that is the last colour, in
    every run. A compound keeps its level whatever elutes beside it. The wide filter spreads peaks over empty bins, so
    that weak noise hardly moves the quantile, however many bins it reaches. The article divides by the highest bin of
    each retention time (rt) or of the run (global); its last colour is the highest value of the picture.
    """
    if recipe.normalize == "quantile":
        values = gaussian_filter(counts, recipe.sigma)
        wide = gaussian_filter(counts, np.divide(recipe.bins, 125))
        values /= np.quantile(wide, 0.85) or values.max() / 255  # 0 where a run is nearly empty
    else:
        scale = counts.max(axis=1, keepdims=True) if recipe.normalize == "rt" else counts.max()
        values = gaussian_filter(counts / np.where(scale == 0, 1, scale), recipe.sigma)
        values = 255 * values / values.max()
    values = np.log1p(values) / np.log(256)  # weak compounds are most of the metabolome
    levels = np.minimum(256 * values, 255).astype(np.uint8)
    return np.ascontiguousarray(levels.T[::-1])


def colours(picture, colormap):
    """Picture uint8 (height, width) -> its colours in a matplotlib colormap, uint8 (height, width, 3)."""
    table = matplotlib.colormaps[colormap]((np.arange(256) + 0.5) / 256, bytes=True)[:, :3]
    return np.take(table, picture, axis=0)


def read_raw(path, min_intensity=0.0, only_polarity=""):
    """What a run says of itself, and an iterator over its MS1 scans (retention time in minutes, m/z, intensity).

    It says its polarity ("+", "-" or, unknown, ""), n_scans, scan_kinds and, if known, start_time. pyopenms tells mzML
    from mzXML, unpacks .gz and .bz2, knows the time's unit and sorts the m/z. For ion mobility or MS2 change this
    function alone; for another instrument's format RUN, too, the names of its files.
    """
    import pyopenms  # not at the top: --help need not wait for it

    if path.exists() and not is_raw_file(path):
        raise InputError(f"{path}: no mzML or mzXML; msconvert makes mzML of what instruments write")
    with open(path, "rb") as file:
        if not file.read(1):
            raise InputError(f"{path.name}: is empty (zero bytes)")
    pyopenms.LogConfigHandler.getInstance().setLogLevel("NONE")  # what is wrong comes as an exception, too
    options, handler, experiment = pyopenms.PeakFileOptions(), pyopenms.FileHandler(), pyopenms.MSExperiment()
    options.setMSLevels([1])
    handler.setOptions(options)
    try:
        handler.loadExperiment(str(path), experiment)
    except RuntimeError:  # its message names a line of C++; a parser of XML says where it ended
        reason = "it is whole, but of a kind that OpenMS does not read"
        try:
            with matplotlib.cbook.open_file_cm(path, "rb") as file:  # it unpacks, too
                expat.ParserCreate().ParseFile(file)
        except Exception as error:  # of the parser, and of what unpacks
            reason = f"damaged, cut off, or in another encoding than it declares? {first_line(error)}"
        raise InputError(f"{path.name}: cannot be parsed as mzML or mzXML; {reason}") from None

    unwanted = {"positive": "-", "negative": "+"}.get(only_polarity)
    taken, polarities, kinds = [], set(), Counter()
    for i, spectrum in enumerate(experiment):
        settings = spectrum.getInstrumentSettings()
        mode = settings.getScanMode().name
        polarity = {"POSITIVE": "+", "NEGATIVE": "-"}.get(settings.getPolarity().name, "")
        if mode in ("EMR", "ABSORPTION", "EMISSION") or polarity == unwanted:
            continue  # wavelengths are no masses
        taken.append(i)
        polarities.add(polarity)
        # Full scans, SIM, BoxCar, lock mass or MSe; frames of ion mobility have a drift time, too, but are one kind.
        function = re.findall(r"function=\d+|experiment=\d+", spectrum.getNativeID())  # Waters, Sciex
        windows = [(window.begin, window.end) for window in settings.getScanWindows()]
        faims = spectrum.getDriftTimeUnit().name == "FAIMS_COMPENSATION_VOLTAGE" and spectrum.getDriftTime()
        kinds[mode, faims, *function, *windows] += 1
    if polarities >= {"+", "-"}:
        way = 'take one with convert.py --polarity, or with msconvert --filter "polarity positive"'
        raise InputError(f"{path.name}: holds positive and negative scans; {way}")
    recurring = sum(n > 1 for n in kinds.values())  # windows may follow the data of each scan
    said = {"polarity": "".join(sorted(polarities)), "n_scans": len(taken), "scan_kinds": max(recurring, 1)}

    started = experiment.getDateTime()
    if started.isValid():
        said["start_time"] = started.get()  # YYYY-MM-DD hh:mm:ss

    def scans():
        for i in taken:
            spectrum = experiment[i]
            mz, intensity = spectrum.get_peaks()
            strong = (intensity > 0) & (intensity >= min_intensity) & (intensity < np.inf)
            if strong.any():
                yield spectrum.getRT() / 60, mz[strong], intensity[strong]

    return said, scans()


# ---------------------------------------------------------------- drift: the same sample on another day
def slow_waves(at):
    """Waves (6, n) at fractions (n,) of an axis, as retention drifts along the gradient and sensitivity along m/z.

    Six normal random numbers c of standard deviation s make a random curve, c @ waves, whose standard deviation is s at
    each place: the squares of sine and cosine add up to 1, and pair k has the weight 1 / k.
    """
    phase = np.pi * np.asarray(at)
    waves = []
    for k in (1, 2, 3):
        waves += [np.sin(k * phase) / k**0.5, np.cos(k * phase) / k**0.5]
    return np.array(waves) / (1 + 1 / 2 + 1 / 3) ** 0.5


def compute_chromatogram(picture):
    """Mean log intensity (n_rt,), 0 ... 1, of a picture uint8 (n_mz, n_rt) at each retention time."""
    return picture.mean(axis=0) / 255


def measure_rt_shift(profile, typical, recipe):
    """Minutes by which a profile (n_rt,) lies later than the typical one, a tenth of the axis at most.

    It is the lag at which the middle of the typical profile and what lies there in this one correlate best.
    """
    n, most = len(profile), len(profile) // 10
    windows = np.lib.stride_tricks.sliding_window_view(profile, n - 2 * most)  # row `most` has no lag
    windows = windows - windows.mean(axis=1, keepdims=True)  # so that the typical one need not have mean 0
    likeness = windows @ typical[most : n - most] / np.maximum(np.linalg.norm(windows, axis=1), 1e-12)
    likeness[most] += 1e-6  # of equals, no lag
    return float((likeness.argmax() - most) * recipe.bin_size()[0])


def summarize_cohort(pictures, recipe):
    """(typical profile (n_rt,), {statistic: a value a run}) of training pictures, the rows of find_pictures."""
    profiles = [np.array(text.split(), float) for text in pictures["chromatogram"]]
    typical = np.mean(profiles, axis=0)
    cohort = pictures[STATISTICS].astype(float).to_dict("list")
    cohort["polarity"] = pictures["polarity"].tolist()
    cohort["rt_shift"] = [measure_rt_shift(profile, typical, recipe) for profile in profiles]
    return typical, cohort


def find_anomalies(statistics, cohort, recipe, others="training runs"):
    """What lies far beyond nine of ten other runs in the statistics of a run, as one line; '' if nothing does.

    The margins are wide, as a small cohort of one batch varies less than instruments do.
    """
    cohort = pd.DataFrame(cohort)
    low, high = (cohort.quantile(share, numeric_only=True) for share in (0.05, 0.95))
    rt = 0.1 * (high["rt_last"] - low["rt_first"])  # a tenth of the axis
    mz = 0.1 * (high["mz_high"] - low["mz_low"])
    margins = {"outside": 0.05, "rt_first": rt, "rt_last": rt, "rt_gap": rt, "mz_low": mz, "mz_high": mz}
    margins |= {"scan_kinds": 0, "rt_shift": 2 * recipe.bin_size()[0]}
    limits = {name: (low[name] - margin, high[name] + margin) for name, margin in margins.items() if name in low}
    for name, factor in {"total_intensity": 3, "n_peaks": 3, "n_scans": 1.5}.items():
        limits[name] = low[name] / factor, high[name] * factor
    warnings = []
    for name, (least, most) in limits.items():
        if not least <= statistics[name] <= most:
            usual = f"{low[name]:.4g} to {high[name]:.4g}" if low[name] < high[name] else f"{low[name]:.4g}"
            warnings.append(f"{name} is {statistics[name]:.4g} ({others}: {usual})")
    if statistics["polarity"] not in set(cohort["polarity"]):
        warnings.append(f"polarity is {statistics['polarity'] or 'unknown'}, unlike the {others}")
    return "; ".join(warnings)


# ---------------------------------------------------------------- raw runs and pictures of a data set
def find_raw_files(folder):
    """{sample name: path} of the mzML and mzXML files in a folder, packed or not."""
    runs = {}
    for path in filter(is_raw_file, sorted(Path(folder).iterdir())):
        name = RAW_FILE.fullmatch(path.name)[1]
        if name in runs:
            raise InputError(f"{folder}: {runs[name].name} and {path.name} are both sample '{name}': keep one")
        runs[name] = path
    if not runs:
        found = first_few(os.listdir(folder)) or "nothing"
        raise InputError(f"{folder}: no mzML or mzXML (found: {found}); msconvert makes mzML of what instruments write")
    return runs


def is_raw_file(path):
    return RAW_FILE.fullmatch(path.name)


def list_files(paths):
    """[Path] of files, and of the runs in those that are folders."""
    files = []
    for path in map(Path, paths):
        files += sorted(filter(is_raw_file, path.glob("*"))) or [path]
    return files


def find_pictures(data_dir, splits=None):
    """Table of the pictures of a data set, of these splits or all it has, and the Recipe of all; reads no pixels.

    Its columns are path, split, phenotype, sample_name, copy (is it shifted?), profile, digest (of its pixels), the
    statistics of the run, and those of samples.csv.
    """
    data_dir, rows, expected = Path(data_dir), [], None
    if not (data_dir / "samples.csv").is_file():
        raise InputError(f"{data_dir}: no such data set (--data), or an unfinished one: run convert.py to its end")
    for split in splits or [split for split in SPLITS if any(data_dir.glob(f"{split}/[!.]*/[!.]*.png"))] or SPLITS:
        paths = sorted(data_dir.glob(f"{split}/[!.]*/[!.]*.png"))
        if not paths:
            raise InputError(f"{data_dir}: no pictures in {split}/<phenotype>/*.png")
        for path in paths:
            text, recipe = read_header(path)
            expected = expected or recipe
            check_recipe(recipe, expected, path)
            row = {"path": path, "split": split, "phenotype": path.parent.name, "sample_name": text["sample_name"]}
            row |= {"copy": text["shift"] != "0 0", "chromatogram": text["chromatogram"], "digest": text["digest"]}
            rows.append(row | {name: text.get(name, "") for name in (*STATISTICS, "polarity")})
    table, samples = pd.DataFrame(rows), read_table(data_dir / "samples.csv")
    check_pictures(table[~table["copy"]], samples, data_dir)
    samples = samples.drop(columns=table.columns.drop("sample_name"), errors="ignore")
    return table.merge(samples, on="sample_name", how="left"), expected


def check_pictures(originals, samples, data_dir):
    """Refuse what convert.py refuses, as people move pictures by hand and spreadsheets rewrite samples.csv."""
    names, listed = originals["sample_name"], samples["sample_name"]
    for several in (names[names.duplicated()], listed[listed.duplicated()]):
        if len(several):
            raise InputError(
                f"{data_dir}: in two splits or phenotypes, or two rows of samples.csv: {first_few(several)}"
            )
    phenotypes = set(originals["phenotype"])
    if len(phenotypes) > len(set(map(normalize_name, phenotypes))):
        raise InputError(f"{data_dir}: one phenotype in two spellings: {first_few(phenotypes)}")
    in_splits = originals.groupby("digest")["split"].transform("nunique")
    if (in_splits > 1).any():
        raise InputError(f"{data_dir}: the same picture in two splits: {first_few(names[in_splits > 1])}")
    made = samples["status"].eq("ok") & samples["split"].isin(originals["split"])
    problems = {"rows without pictures": set(listed[made]) - set(names)}
    problems["pictures without rows"] = set(names) - set(listed)
    for what, concerned in problems.items():
        if concerned:
            raise InputError(f"{data_dir}/samples.csv has {what}: {first_few(concerned)}")


def normalize_name(name):
    """The same text for spellings of a name that look alike: capitals, and the two forms of an accent."""
    return unicodedata.normalize("NFC", name).casefold()


def digest_pictures(pictures, recipe):
    """What data set is this? A number of its pictures and what they are named and labelled, on any system and path."""
    rows = pictures[["sample_name", "phenotype", "split", "group", "digest"]].agg("\t".join, axis=1)
    return zlib.crc32("\n".join([repr(recipe), *sorted(rows)]).encode())


def check_recipe(recipe, expected, path):
    """Refuse pictures of another kind: on other axes the same pixel is another compound."""
    if differing := first_difference(vars(recipe), vars(expected)):
        other = "{} is {}, not {}".format(*differing)
        raise InputError(f"{path}: another kind of picture than the others or the run's: {other}")


def read_header(path):
    """(text chunks, Recipe) of a PNG that convert.py made; its pixels are not read."""
    try:
        with Image.open(path) as image:
            recipe = Recipe.from_text(image.info)
            if image.mode != "P" or image.size != recipe.bins or not {"chromatogram", "digest"} <= set(image.info):
                raise ValueError("other pixels than its recipe says")
            return image.info, recipe
    except (OSError, SyntaxError, KeyError, ValueError) as error:
        raise InputError(f"{path}: not a whole picture of this convert.py ({error}); make it again") from None


def read_picture(path):
    """Picture uint8 (height, width) of a PNG: its log intensity in 256 levels, whose colours are the PNG's palette."""
    try:
        with Image.open(path) as image:
            return np.array(image)
    except (OSError, SyntaxError) as error:
        raise InputError(f"{path}: not a whole picture ({error}); make it again") from None


# ---------------------------------------------------------------- what is learned, and how well
def make_labels(pictures, classes):
    """Label (N,) of each row of find_pictures: the index of its phenotype among the classes."""
    return pictures["phenotype"].map(classes.index).to_numpy()


def to_probabilities(logits):
    """Logits (N, 1) of class 1, or (N, K), -> probability of each class (N, 2 or K). From log p (N, K) it is p."""
    logits = np.asarray(logits, float)
    if logits.shape[1] == 1:
        logits = np.hstack([np.zeros_like(logits), logits])
    return softmax(logits, axis=1)


def predict_classes(probabilities, threshold=0.5):
    """Class (N,) of probabilities (N, K): of two, class 1 from `threshold` on; of more, the most probable."""
    if probabilities.shape[1] > 2:
        return probabilities.argmax(axis=1)
    return (probabilities[:, 1] >= threshold).astype(int)


def count_confusions(labels, called, n_classes):
    """Number of pictures of each class (row) that are called each class (column)."""
    confusion = np.zeros((n_classes, n_classes), int)
    np.add.at(confusion, (labels, called), 1)
    return confusion


def compute_metrics(labels, logits, threshold=0.5):
    """{name: value} of logits (N, 1 or K); nan where undefined. Two classes: of class 1; more: means over them.

    A name here is a column of epochs.csv and a line of every table; the first three are shown while training.
    """
    probabilities = to_probabilities(logits)
    n_classes = probabilities.shape[1]
    confusion = count_confusions(labels, predict_classes(probabilities, threshold), n_classes)
    hits, actual, called = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    shown = [1] if n_classes == 2 else range(n_classes)
    squared_error = ((probabilities - np.eye(n_classes)[labels]) ** 2).sum(1).mean()
    with np.errstate(invalid="ignore"):  # 0 / 0 is nan
        return {
            "accuracy": hits.sum() / len(labels),
            "f1": (2 * hits / (actual + called))[shown].mean(),
            "roc_auc": np.mean([roc_auc(labels == k, probabilities[:, k]) for k in shown]),
            "balanced_accuracy": (hits / actual).mean(),
            "precision": (hits / called)[shown].mean(),
            "recall": (hits / actual)[shown].mean(),
            "specificity": (1 - (called - hits) / (len(labels) - actual))[shown].mean(),
            "brier": squared_error / 2 if n_classes == 2 else squared_error,
        }


def roc_auc(positive, score):
    """Chance that a positive scores above a negative, ties counting half (Mann-Whitney); nan with one class only."""
    n_positive = positive.sum()
    n_negative = len(positive) - n_positive
    least = n_positive * (n_positive + 1) / 2  # sum of their ranks if all positives came last
    with np.errstate(invalid="ignore"):
        return (rankdata(score)[positive].sum() - least) / (n_positive * n_negative)


# ---------------------------------------------------------------- files and command lines
class InputError(ValueError):
    """Something the user can put right: its message, one line, names the file, flag or column."""


def run_script(main):
    """Call main; what the user can put right ends in one line and exit status 1, anything else in a traceback."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a locale may lack a letter of a name
    try:
        sys.exit(main())
    except (InputError, OSError) as error:
        # A loader's worker puts its traceback before the message.
        reason = str(error).rpartition("InputError: ")[2].strip()
        sys.exit(f"{Path(sys.argv[0]).name}: {reason}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on where it stopped")


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The docstring as it stands, and the default of every flag that has one."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, "") else super()._get_help_string(action)


def cores():
    """How many cores this process may use; a scheduler may allot a few of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def share(text):
    """Type of a flag that is a share or a probability, 0 to 1."""
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return float(text)


def count(text):
    """Type of a flag that counts: 1, 2, 3 and so on."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return int(text)


@contextmanager
def whole_file(path):
    """Yield a temporary path that becomes `path` when the block ends well: a file is whole or not there."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)  # the error of a full disk names no file
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    with whole_file(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def write_json(path, contents):
    write_text(path, json.dumps(contents, indent=1, ensure_ascii=False, default=str))


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: cut off or damaged ({error})") from None


def write_table(path, table):
    with whole_file(path) as temporary:
        table.to_csv(temporary, index=False)


def read_table(path, skiprows=0, **options):
    """DataFrame of text, titles cleaned; commas, semicolons or tabs, byte-order mark or none. options: of read_csv."""
    options = {"dtype": str, "keep_default_na": False, "encoding": "utf-8-sig"} | options
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = file.readlines()
        skiprows += lines[skiprows].startswith("sep=")  # Excel's own first line
        header = re.match(r'("[^"]*"|[^"\n])*', "".join(lines[skiprows:]))[0]  # a quoted title may hold a line break
        separator = max(",;\t", key=header.count)
        table = pd.read_csv(path, sep=separator, skiprows=skiprows, **options)
    except (ValueError, IndexError, OSError) as error:  # of pandas, too: ragged lines, no columns, not UTF-8
        raise InputError(f"{path}: is no table of text ({first_line(error)})") from None
    if not table.index.equals(pd.RangeIndex(len(table))):  # pandas took the first fields for names of the rows
        raise InputError(f"{path}: its rows have more fields than its header; name each column, or delete empty ones")
    titles = table.columns.map(clean_title)
    if titles.has_duplicates:
        raise InputError(f"{path}: two columns mean the same: {first_few(table.columns[titles.duplicated(False)])}")
    return table.set_axis(titles, axis=1)


def clean_title(title):
    """'Average Rt(min)' -> 'average_rt_min_', as pyjanitor does."""
    return re.sub(r"[\W_]+", "_", title.strip().strip('"').lower())


def first_difference(before, now):
    """(name, value before, value now) of the first setting that differs, None if all of `now` are the same."""
    for name, value in now.items():
        if before.get(name) != value:
            return name, before.get(name), value


def first_line(error):
    """Of an exception's message: libraries like to write pages."""
    return str(error).strip().partition("\n")[0][:150] or type(error).__name__


def first_few(names):
    """'a, b, c, d, e and 7 more'"""
    names = sorted(map(str, names))
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
