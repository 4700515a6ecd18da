"""How a raw LC-MS file becomes a picture, and the helpers that all scripts share. Read this first.

Article, "Creating the pseudo images": x is retention time, y is m/z, colour is log intensity.
`make_picture` is that recipe, and `Recipe` its settings. This file has no command. It imports no
torch, so that convert.py's workers start fast.
"""

import argparse
import bz2
import gzip
import io
import json
import os
import re
import sys
import time
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

RANK, WORLD = 0, 1  # under torchrun: number of this process, number of processes
if "TORCHELASTIC_RUN_ID" in os.environ:  # some schedulers set the two below without it
    RANK = int(os.environ["RANK"])
    WORLD = int(os.environ["WORLD_SIZE"])
SPLITS = ("train", "val", "test")
NORMALIZE = ("quantile", "rt", "global")
RAW_FILE = re.compile(r"([^.].*)\.(mzml|mzxml|cdf)(\.gz|\.bz2)?", re.IGNORECASE)
POLARITY = {"positive": "+", "negative": "-"}
NO_RAW_FILE = "no mzML, mzXML or CDF; msconvert converts instrument formats to mzML"
# Numbers that describe a raw file: saved in samples.csv, its PNG and, for training pictures, the checkpoint.
STATISTICS = "n_scans scan_kinds n_peaks total_intensity outside rt_first rt_last rt_gap mz_low mz_high".split()


# ---------------------------------------------------------------- a raw file becomes a picture
@dataclass(frozen=True)
class Recipe:
    """The settings of a picture. A new field is saved, compared and restored automatically."""

    rt_min: float  # minutes
    rt_max: float
    mz_min: float
    mz_max: float
    bins: tuple = (500, 500)  # along retention time, along m/z
    normalize: str = "quantile"  # intensity scale, see render_histogram
    min_intensity: float = 0.0  # weaker peaks are dropped
    sigma: float = 2.0  # width of the Gaussian filter, in bins
    colormap: str = "jet"
    only_polarity: str = ""  # positive or negative: scans of the other polarity are dropped

    def to_text(self):
        """The recipe as text chunks of a PNG; str() keeps every digit of the axes."""
        text = {name: str(value) for name, value in vars(self).items()}
        return text | {"bins": "{} {}".format(*self.bins)}

    @classmethod
    def from_text(cls, text):
        """The recipe from such text; KeyError or ValueError if it is of another version."""
        if text["normalize"] not in NORMALIZE:
            raise ValueError(f"normalize {text['normalize']} is no longer supported")
        read = {tuple: lambda value: tuple(map(int, value.split())), bool: lambda value: value == "True"}
        return cls(**{field.name: read.get(field.type, field.type)(text[field.name]) for field in fields(cls)})

    def to_fraction(self, rt, mz):
        """Minutes and m/z -> position from the left and top, 0 to 1, at any size of the picture."""
        x = (rt - self.rt_min) / (self.rt_max - self.rt_min)
        return x, 1 - (mz - self.mz_min) / (self.mz_max - self.mz_min)

    def from_fraction(self, x, y):
        """Position from the left and top, 0 to 1 -> minutes and m/z."""
        rt = self.rt_min + x * (self.rt_max - self.rt_min)
        return rt, self.mz_min + (1 - y) * (self.mz_max - self.mz_min)

    def bin_size(self):
        """Minutes and m/z of one bin."""
        return (self.rt_max - self.rt_min) / self.bins[0], (self.mz_max - self.mz_min) / self.bins[1]


def make_picture(path, recipe):
    """Raw file -> picture uint8 (n_mz, n_rt) and {statistic: value}; InputError if it is empty."""
    histogram, statistics = make_histogram(path, recipe)
    if not histogram.any():
        axes = "{rt_min:.2f}-{rt_max:.2f} min, m/z {mz_min:.2f}-{mz_max:.2f}".format(**vars(recipe))
        peaks = "{rt_first:.2f}-{rt_last:.2f} min, m/z {mz_low:.2f}-{mz_high:.2f}".format(**statistics)
        raise InputError(f"{path.name}: no peak inside the axes, {axes}; its peaks: {peaks}")
    picture = render_histogram(histogram, recipe)
    if picture.shape != recipe.bins[::-1]:  # a fork's other shape would give wrong minutes and m/z
        raise InputError(f"a picture has the shape {picture.shape}, and its recipe has bins {recipe.bins}")
    return picture, statistics


def make_histogram(path, recipe):
    """Raw file -> intensity summed in bins, float (n_rt, n_mz), and {statistic: value}.

    The bins are those of numpy.histogram2d. `outside` is the share of intensity outside the axes.
    """
    rt_edges = np.linspace(recipe.rt_min, recipe.rt_max, recipe.bins[0] + 1)
    mz_edges = np.linspace(recipe.mz_min, recipe.mz_max, recipe.bins[1] + 1)
    for edges in (rt_edges, mz_edges):
        edges[-1] = np.nextafter(edges[-1], np.inf)  # the last bin includes its right edge
    sums = np.zeros(np.add(recipe.bins, 2))  # with a border for what is outside the axes
    metadata, scans = read_raw(path, recipe.min_intensity, recipe.only_polarity)
    n_peaks, rts, mzs = 0, [], []
    for rt, mz, intensity in scans:
        low, high = mz.min(), mz.max()
        if not (0 <= rt < np.inf and 0 < low <= high < np.inf):
            place = f"{60 * rt:g} s (-1: no time), m/z {low:g} to {high:g}"
            raise InputError(f"{path.name}: a scan has an impossible time or m/z: {place}")
        n_peaks += len(mz)
        rts.append(rt)
        mzs += [low, high]
        column = np.searchsorted(rt_edges, rt, side="right")
        rows = np.searchsorted(mz_edges, mz, side="right")
        sums[column] += np.bincount(rows, intensity, minlength=len(mz_edges) + 1)
    if n_peaks == 0:
        wanted = f"min_intensity {recipe.min_intensity:g}, polarity {recipe.only_polarity or 'any'}"
        raise InputError(f"{path.name}: no MS1 peaks ({wanted})")
    histogram, total = sums[1:-1, 1:-1], sums.sum()
    outside = max(0.0, 1 - histogram.sum() / total)
    statistics = {"n_peaks": n_peaks, "total_intensity": total, "outside": outside}
    statistics |= {"rt_first": min(rts), "rt_last": max(rts), "rt_gap": np.diff(sorted(rts)).max(initial=0)}
    statistics |= {"mz_low": min(mzs), "mz_high": max(mzs)}
    return histogram, metadata | statistics


def render_histogram(histogram, recipe):
    """Histogram (n_rt, n_mz) -> picture uint8 (n_mz, n_rt): log intensity in 256 levels, m/z up.

    quantile: divide by the 0.85 quantile of the histogram after a wide filter; 255 such quantiles are
    the top level. A compound keeps its level whatever elutes beside it. The wide filter spreads peaks
    over empty bins, so that weak noise hardly moves the quantile, however many bins it fills.
    The article divides by the highest bin of each retention time (rt) or of the file (global); its
    top level is the highest value of the picture.
    """
    if recipe.normalize == "rt":
        highest = histogram.max(axis=1, keepdims=True)
        histogram = histogram / np.where(highest == 0, 1, highest)
    values = gaussian_filter(histogram, recipe.sigma)
    unit = values.max() / 255  # global: the highest bin cancels out
    if recipe.normalize == "quantile":
        wide = gaussian_filter(histogram, np.divide(recipe.bins, 125))
        unit = np.quantile(wide, 0.85) or unit  # 0 if the file is nearly empty
    values /= unit
    values = np.log1p(values) / np.log(256)  # log, as most metabolites are weak
    levels = np.minimum(256 * values, 255).astype(np.uint8)
    return np.ascontiguousarray(levels.T[::-1])


def colours(picture, colormap):
    """Picture uint8 (height, width) -> colours in a matplotlib colormap, uint8 (height, width, 3)."""
    table = matplotlib.colormaps[colormap]((np.arange(256) + 0.5) / 256, bytes=True)[:, :3]
    return np.take(table, picture, axis=0)


# ---------------------------------------------------------------- raw files
def read_raw(path, min_intensity=0.0, only_polarity=""):
    """Metadata of a raw file, and an iterator over its MS1 scans (minutes, m/z, intensity).

    Metadata: polarity ("+", "-" or, if unknown, ""), n_scans, scan_kinds and, if known, start_time.
    For ion mobility or MS2 change this function. A new format needs a reader here and its extension
    in RAW_FILE. InputError if the file cannot be read.
    """
    size = path.stat().st_size
    name = RAW_FILE.fullmatch(path.name)
    if not name:
        raise InputError(f"{path}: {NO_RAW_FILE}")
    if size == 0:
        raise InputError(f"{path.name}: is empty (zero bytes)")
    read = read_netcdf if name[2].lower() == "cdf" else read_openms
    polarities = {"", *POLARITY.get(only_polarity, "+-")}  # "": unknown
    metadata, all_scans = read(path, polarities)

    def scans():
        for rt, mz, intensity in all_scans:
            strong = (intensity > 0) & (intensity >= min_intensity) & (intensity < np.inf)
            if strong.any():
                yield rt, mz[strong], intensity[strong]

    return metadata, scans()


def read_openms(path, polarities):
    """Metadata and scans of mzML or mzXML. OpenMS unpacks and knows the unit of time."""
    experiment = load_experiment(path)
    kept, found, kinds = [], set(), Counter()
    for i, spectrum in enumerate(experiment):
        settings = spectrum.getInstrumentSettings()
        mode = settings.getScanMode().name
        polarity = POLARITY.get(settings.getPolarity().name.lower(), "")
        if mode in ("EMR", "ABSORPTION", "EMISSION") or polarity not in polarities:
            continue  # UV/Vis, or the other polarity
        kept.append(i)
        found.add(polarity)
        # Full scans, SIM, BoxCar, lock mass and MSe differ in these; frames of ion mobility do not.
        function = re.findall(r"(?:function|experiment)=\d+", spectrum.getNativeID())  # Waters, Sciex
        windows = [(window.begin, window.end) for window in settings.getScanWindows()]
        is_faims = spectrum.getDriftTimeUnit().name == "FAIMS_COMPENSATION_VOLTAGE"
        faims = is_faims and spectrum.getDriftTime()
        kinds[mode, faims, *function, *windows] += 1
    if found >= {"+", "-"}:
        way = 'choose with convert.py --polarity, or with msconvert --filter "polarity positive"'
        raise InputError(f"{path.name}: has positive and negative scans; {way}")
    recurring = sum(n > 1 for n in kinds.values())  # a window seen once follows the data
    metadata = {"polarity": "".join(found), "n_scans": len(kept), "scan_kinds": max(recurring, 1)}
    if experiment.getDateTime().isValid():
        metadata["start_time"] = experiment.getDateTime().get()  # YYYY-MM-DD hh:mm:ss
    spectra = (experiment[i] for i in kept)
    return metadata, ((spectrum.getRT() / 60, *spectrum.get_peaks()) for spectrum in spectra)


def load_experiment(path):
    """MS1 spectra of mzML or mzXML as pyopenms.MSExperiment; InputError if it cannot be parsed."""
    import pyopenms  # slow import: --help does without

    pyopenms.LogConfigHandler.getInstance().setLogLevel("NONE")  # errors are raised anyway
    options = pyopenms.PeakFileOptions()
    options.setMSLevels([1])
    handler = pyopenms.FileHandler()
    handler.setOptions(options)
    experiment = pyopenms.MSExperiment()
    try:
        handler.loadExperiment(str(path), experiment)
    except RuntimeError:  # OpenMS names a line of its C++; expat tells where the file breaks
        reason = "the XML is complete, but OpenMS cannot read it"
        try:
            with open_unpacked(path) as file:
                expat.ParserCreate().ParseFile(file)
        except Exception as error:  # expat, gzip or bz2 raises it
            reason = f"damaged, cut off, or in another encoding than declared? {first_line(error)}"
        raise InputError(f"{path.name}: cannot be parsed as mzML or mzXML; {reason}") from None
    return experiment


def read_netcdf(path, polarities):
    """Metadata and scans of ANDI-MS (netCDF 3, .CDF), which GC-MS and older LC-MS software exports."""
    from scipy.io import netcdf_file  # slow import

    try:
        with open_unpacked(path) as file:
            netcdf = netcdf_file(io.BytesIO(file.read()), maskandscale=True)
        names = "scan_index point_count scan_acquisition_time mass_values intensity_values".split()
        columns = (np.asarray(netcdf.variables[name][:], float) for name in names)
        starts, counts, seconds, mz, intensity = columns
        starts[counts == 0] = 0  # an empty scan may point anywhere
        ends = starts + counts
        if np.any((starts < 0) | (counts < 0) | (ends > min(len(mz), len(intensity)))):
            raise ValueError("scan_index and point_count point outside the peaks")
        scans = list(zip(seconds / 60, starts.astype(int), ends.astype(int), strict=True))
    except Exception as error:  # scipy, gzip or bz2 raises it
        reason = f"damaged, cut off, or another format? {type(error).__name__}: {first_line(error)}"
        raise InputError(f"{path.name}: cannot be read as ANDI-MS (netCDF 3); {reason}") from None

    said = getattr(netcdf, "test_ionization_polarity", b"").decode("latin-1")  # Positive Polarity
    polarity = POLARITY.get(said.lower()[:8], "")
    if polarity not in polarities:
        polarity, scans = "", []
    metadata = {"polarity": polarity, "n_scans": len(scans), "scan_kinds": 1}
    stamp = getattr(netcdf, "experiment_date_time_stamp", b"")[:14].decode("latin-1")
    started = pd.to_datetime(stamp, format="%Y%m%d%H%M%S", errors="coerce")
    if pd.notna(started):
        metadata["start_time"] = str(started)
    return metadata, ((rt, mz[start:end], intensity[start:end]) for rt, start, end in scans)


def open_unpacked(path):
    """Open a file for reading bytes; .gz and .bz2 are unpacked."""
    opener = {".gz": gzip.open, ".bz2": bz2.open}.get(path.suffix.lower(), open)
    return opener(path, "rb")


def find_raw_files(folder):
    """{sample name: path} of the raw files in a folder; InputError if two have the same name."""
    raw_files = {}
    for path in list_files([folder]):
        name = RAW_FILE.fullmatch(path.name)
        if not name:
            found = first_few(os.listdir(folder)) or "nothing"
            raise InputError(f"{folder}: {NO_RAW_FILE} (found: {found})")
        other = raw_files.setdefault(name[1], path)
        if other != path:
            raise InputError(f"{path}: {other.name} is the same sample, '{name[1]}': keep one")
    return raw_files


def list_files(paths):
    """[Path] of files; a folder stands for the raw files in it."""
    files = []
    for path in map(Path, paths):
        inside = [file for file in sorted(path.glob("*")) if RAW_FILE.fullmatch(file.name)]
        files += inside or [path]
    return files


# ---------------------------------------------------------------- how raw files differ
def slow_waves(at):
    """Smooth waves (6, n) at positions (n,), 0 to 1, of an axis, to imitate instrument drift.

    For six random numbers c of standard deviation s, c @ waves is a smooth random curve of standard
    deviation s everywhere: sin^2 + cos^2 = 1, and pair k has the weight 1 / k.
    """
    phase = np.pi * np.asarray(at)
    waves = []
    for k in (1, 2, 3):
        waves += [np.sin(k * phase) / k**0.5, np.cos(k * phase) / k**0.5]
    return np.array(waves) / (1 + 1 / 2 + 1 / 3) ** 0.5


def compute_chromatogram(picture):
    """Picture uint8 (n_mz, n_rt) -> mean log intensity (n_rt,) at each retention time, 0 to 1."""
    return picture.mean(axis=0) / 255


def measure_rt_shift(chromatogram, typical, recipe):
    """Retention shift of a chromatogram (n_rt,) in minutes, positive if later.

    It is the lag, up to a tenth of the axis, that correlates best with the typical one (n_rt,).
    """
    n = len(chromatogram)
    max_lag = n // 10
    middle = typical[max_lag : n - max_lag]
    windows = np.lib.stride_tricks.sliding_window_view(chromatogram, len(middle))  # (lag, time)
    windows = windows - windows.mean(axis=1, keepdims=True)  # centring one of the two is enough
    correlation = windows @ middle / np.maximum(np.linalg.norm(windows, axis=1), 1e-12)
    correlation[max_lag] += 1e-6  # ties: prefer lag 0
    return float((correlation.argmax() - max_lag) * recipe.bin_size()[0])


def summarize_cohort(pictures, recipe):
    """Typical chromatogram (n_rt,) and {statistic: list} of training pictures (see find_pictures)."""
    chromatograms = [np.array(text.split(), float) for text in pictures["chromatogram"]]
    typical = np.mean(chromatograms, axis=0)
    shifts = [measure_rt_shift(one, typical, recipe) for one in chromatograms]
    cohort = pictures[STATISTICS].astype(float)
    cohort = cohort.assign(polarity=pictures["polarity"], rt_shift=shifts)
    return typical, cohort.to_dict("list")


def find_anomalies(statistics, cohort, recipe, others="training files"):
    """One line on statistics far outside the 5-95 % range of a cohort ({statistic: list}), or "".

    The margins are wide, as a small cohort of one batch varies less than instruments do.
    """
    cohort = pd.DataFrame(cohort)
    low = cohort.quantile(0.05, numeric_only=True)
    high = cohort.quantile(0.95, numeric_only=True)
    rt = 0.1 * (high["rt_last"] - low["rt_first"])  # a tenth of the axis
    mz = 0.1 * (high["mz_high"] - low["mz_low"])
    margins = {"rt_first": rt, "rt_last": rt, "rt_gap": rt, "mz_low": mz, "mz_high": mz, "outside": 0.05}
    margins |= {"scan_kinds": 0, "rt_shift": 2 * recipe.bin_size()[0]}
    factors = {"total_intensity": 3, "n_peaks": 3, "n_scans": 1.5}
    limits = {name: (low[name] / factor, high[name] * factor) for name, factor in factors.items()}
    for name in low.index.intersection([*margins]):
        limits[name] = (low[name] - margins[name], high[name] + margins[name])
    warnings = []
    for name, (least, most) in limits.items():
        if not least <= statistics[name] <= most:
            usual = f"{low[name]:.4g}"
            if low[name] < high[name]:
                usual += f" to {high[name]:.4g}"
            warnings.append(f"{name} is {statistics[name]:.4g} ({others}: {usual})")
    if statistics["polarity"] not in set(cohort["polarity"]):
        warnings.append(f"polarity is {statistics['polarity'] or 'unknown'}, unlike the {others}")
    return "; ".join(warnings)


# ---------------------------------------------------------------- the pictures of a data set
def find_pictures(data_dir, splits=None):
    """Table of the pictures of a data set, in these splits or all, and their Recipe; reads no pixels.

    Columns: path, split, phenotype, sample_name, copy (is it a shifted copy?), chromatogram, digest
    (of the pixels), the statistics of the raw file, and the columns of samples.csv.
    """
    data_dir = Path(data_dir)
    if not (data_dir / "samples.csv").is_file():
        raise InputError(f"{data_dir}: no such data set (--data), or unfinished: run convert.py again")
    columns = ["path", "split", "phenotype", "sample_name", "chromatogram", "digest"]
    columns += [*STATISTICS, "polarity", "copy"]
    rows, expected = [], None
    for split in splits or SPLITS:
        paths = sorted(data_dir.glob(f"{split}/[!.]*/[!.]*.png"))
        if splits and not paths:
            raise InputError(f"{data_dir}: no pictures in {split}/<phenotype>/*.png")
        for path in paths:
            text, recipe = read_header(path)
            expected = expected or recipe
            check_recipe(recipe, expected, path)
            place = {"path": path, "split": split, "phenotype": path.parent.name}
            rows.append(text | place | {"copy": text["shift"] != "0 0"})
    if not rows:
        raise InputError(f"{data_dir}: no pictures in train, val or test/<phenotype>/*.png")
    table = pd.DataFrame(rows, columns=columns)
    samples = read_table(data_dir / "samples.csv")
    check_pictures(table[~table["copy"]], samples, data_dir)
    samples = samples.drop(columns=table.columns.drop("sample_name"), errors="ignore")
    return table.merge(samples, on="sample_name", how="left"), expected


def check_pictures(originals, samples, data_dir):
    """Refuse what convert.py refuses: people move pictures, and spreadsheets rewrite samples.csv."""
    names, listed = originals["sample_name"], samples["sample_name"]
    expected = listed[samples["status"].eq("ok") & samples["split"].isin(originals["split"])]
    n_splits = originals.groupby("digest")["split"].transform("nunique")
    problems = {
        "a sample in two splits or phenotypes": names[names.duplicated()],
        "two rows of samples.csv for one sample": listed[listed.duplicated()],
        "one phenotype in two spellings": find_spellings(originals["phenotype"]),
        "the same picture in two splits": names[n_splits > 1],
        "samples.csv has rows without pictures": set(expected) - set(names),
        "samples.csv has no rows for pictures": set(names) - set(listed),
    }
    for problem, concerned in problems.items():
        if len(concerned):
            raise InputError(f"{data_dir}: {problem}: {first_few(concerned)}")


def find_spellings(names):
    """Names of a column that differ from another only in capitals or in the form of an accent."""
    names = names.drop_duplicates()
    folded = names.str.normalize("NFC").str.casefold()
    return names[folded.duplicated(keep=False)]


def digest_pictures(pictures, recipe):
    """Number that identifies a data set by pictures, names and labels, on any path or system."""
    rows = pictures[["sample_name", "phenotype", "split", "group", "digest"]].agg("\t".join, axis=1)
    return zlib.crc32("\n".join([repr(recipe), *sorted(rows)]).encode())


def check_recipe(recipe, expected, path):
    """Refuse a picture of other settings: on other axes the same pixel is another compound."""
    if differing := first_difference(vars(recipe), vars(expected)):
        difference = "{} is {}, not {}".format(*differing)
        raise InputError(f"{path}: its recipe is not that of the others or of the run: {difference}")


def read_header(path):
    """(text chunks, Recipe) of a PNG made by convert.py; its pixels are not read."""
    with open_png(path) as image:
        recipe = Recipe.from_text(image.info)
        needed = {"sample_name", "chromatogram", "digest", "shift", "polarity", *STATISTICS}
        if image.mode != "P" or image.size != recipe.bins or not needed <= set(image.info):
            raise ValueError("its pixels or text do not match its recipe")
        return image.info, recipe


def read_picture(path):
    """Picture uint8 (height, width) of a PNG: log intensity in 256 levels; its palette is not used."""
    with open_png(path) as image:
        return np.array(image)


@contextmanager
def open_png(path):
    """Yield an open PNG; InputError if it cannot be read or is not one of convert.py."""
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, SyntaxError, KeyError, ValueError) as error:
        raise InputError(f"{path}: not a complete picture of this convert.py ({error}); make it again") from None


# ---------------------------------------------------------------- labels and metrics
def make_labels(pictures, classes):
    """Label (N,) of each row of find_pictures: the index of its phenotype among the classes."""
    return pictures["phenotype"].map(classes.index).to_numpy()


def to_probabilities(logits):
    """Logits (N, 1) of class 1, or logits or log p (N, K) of each -> probabilities (N, 2 or K)."""
    logits = np.asarray(logits, float)
    if logits.shape[1] == 1:
        logits = np.hstack([np.zeros_like(logits), logits])
    return softmax(logits, axis=1)


def predict_classes(probabilities, threshold=0.5):
    """Predicted class (N,). Two: class 1 if its probability >= threshold; more: the most probable."""
    if probabilities.shape[1] > 2:
        return probabilities.argmax(axis=1)
    return (probabilities[:, 1] >= threshold).astype(int)


def compute_metrics(labels, logits, threshold=0.5):
    """{metric: value} of labels (N,) and logits (N, 1 or K); nan if undefined.

    Metrics of a class are those of class 1 of two, else the mean. Names are keys of metrics.json and,
    after train_ or val_, columns of epochs.csv and comparison.csv; training shows the first three.
    """
    probabilities = to_probabilities(logits)
    n_classes = probabilities.shape[1]
    actual = np.eye(n_classes)[labels]  # one-hot (N, K)
    predicted = np.eye(n_classes)[predict_classes(probabilities, threshold)]
    n_actual, n_predicted, n_correct = actual.sum(0), predicted.sum(0), (actual * predicted).sum(0)
    scored = [1] if n_classes == 2 else range(n_classes)
    with np.errstate(invalid="ignore"):  # 0 / 0 is nan
        return {
            "accuracy": n_correct.sum() / len(labels),
            "f1": (2 * n_correct / (n_actual + n_predicted))[scored].mean(),
            "roc_auc": np.mean([roc_auc(labels == k, probabilities[:, k]) for k in scored]),
            "balanced_accuracy": (n_correct / n_actual).mean(),
            "precision": (n_correct / n_predicted)[scored].mean(),
            "recall": (n_correct / n_actual)[scored].mean(),
            "specificity": (1 - (n_predicted - n_correct) / (len(labels) - n_actual))[scored].mean(),
            "brier": ((probabilities - actual) ** 2)[:, scored].sum(1).mean(),
        }


def roc_auc(positive, score):
    """Share of pairs in which the positive scores higher, ties counting half; nan for one class."""
    n_positive = positive.sum()
    n_negative = len(positive) - n_positive
    least = n_positive * (n_positive + 1) / 2  # smallest possible sum of the positives' ranks
    with np.errstate(invalid="ignore"):
        return (rankdata(score)[positive].sum() - least) / (n_positive * n_negative)


# ---------------------------------------------------------------- files and command lines
class InputError(ValueError):
    """A user error: its message, one line, names the file, flag or column and says what to do."""


def run_script(main):
    """Call main. A user error ends in one line and exit status 1, another error in a traceback.

    Under torchrun process 0 prints, and the first process that fails ends all.
    """
    script = Path(sys.argv[0]).name
    if WORLD > 1 and script in ("evaluate.py", "explain.py"):
        sys.exit(f"{script}: needs one process only, start it without torchrun" if RANK == 0 else 1)
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
        argparse.ArgumentParser.error = lambda parser, message: sys.exit(2)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a locale may lack letters
    try:
        sys.exit(main())
    except (InputError, OSError) as error:
        reason = str(error).rpartition("InputError: ")[2].strip()  # a DataLoader adds a traceback
        time.sleep(3 if RANK > 0 else 0)  # if process 0 has the same error, it prints and ends this one
        sys.exit(f"{script}: {reason}")
    except KeyboardInterrupt:
        sys.exit("interrupted; run the same command again to continue")


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Print the docstring as it is, and the default of every flag that has one."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, "") else super()._get_help_string(action)


def cores():
    """Number of cores for this process; a scheduler may allot few, and torchrun's processes share them."""
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, n // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def probability(text):
    """Type of a flag that is a probability, 0 to 1."""
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return float(text)


def count(text):
    """Type of a flag that is a whole number, at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return int(text)


@contextmanager
def whole_file(path):
    """Yield a temporary path, renamed to `path` if the block succeeds: no half file remains."""
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
    """A CSV (comma, semicolon or tab) as text, titles cleaned; options go to pandas.read_csv."""
    options = {"dtype": str, "keep_default_na": False} | options
    try:
        text = Path(path).read_text(encoding="utf-8-sig").split("\n", skiprows)[skiprows]
        text = re.sub(r"\Asep=.*\n", "", text)  # Excel's own first line
        header = re.match(r'("[^"]*"|[^"\n])*', text)[0]  # a quoted title may contain a line break
        separator = max(",;\t", key=header.count)
        table = pd.read_csv(io.StringIO(text), sep=separator, **options)
    except (ValueError, IndexError, OSError) as error:  # ragged lines, no columns, not UTF-8
        raise InputError(f"{path}: cannot be read as a table ({first_line(error)})") from None
    if not table.index.equals(pd.RangeIndex(len(table))):  # pandas made row names of the first fields
        raise InputError(f"{path}: its rows have more fields than its header; name or delete columns")
    titles = table.columns.map(clean_title)
    if titles.has_duplicates:
        same = first_few(table.columns[titles.duplicated(keep=False)])
        raise InputError(f"{path}: titles become the same: {same}")
    return table.set_axis(titles, axis=1)


def clean_title(title):
    """'Average Rt(min)' -> 'average_rt_min_', as pyjanitor does."""
    return re.sub(r"[\W_]+", "_", title.strip().strip('"').lower())


def first_difference(before, now):
    """(name, value before, value now) of the first setting in `now` that differs, or None."""
    for name, value in now.items():
        if before.get(name) != value:
            return name, before.get(name), value


def first_line(error):
    """First line of an exception's message, as libraries may print pages."""
    return str(error).strip().partition("\n")[0][:150] or type(error).__name__


def first_few(names):
    """'a, b, c, d, e and 7 more'"""
    names = sorted(map(str, names))
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
