"""Turn raw LC-MS runs into pseudo-images: x retention time, y m/z, colour log intensity.

Article, "Creating the pseudo images". One run becomes one picture, and every picture of a data set shares one pair of
axes, so that a pixel means the same retention time and m/z in every run. Start reading at `picture_of_run`, the recipe;
everything below it finds files, splits them and keeps going when one of them is broken.

    python convert.py raw/ samples.csv data/golestan                      # the smallest box that holds every run
    python convert.py raw/ samples.csv data/golestan_1000 --bins 1000 --augment 9 --workers 8
    python convert.py --demo                                              # a synthetic cohort with planted compounds

Stopped, by Ctrl-C or worse, the same command goes on where it was. A run that cannot be read is left out, named in
OUT_DIR/samples.csv with the reason, and tried again by the next run of the command.
"""

import argparse
import csv
import io
import json
import math
import os
import random
import re
import signal
import sys
import tempfile
import zlib
from collections import Counter, defaultdict
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from multiprocessing import connection, get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image, PngImagePlugin
from tqdm import tqdm

SPLITS = ("train", "val", "test")
RUN_SUFFIXES = tuple(kind + packing for kind in (".mzml", ".mzxml") for packing in ("", ".gz", ".bz2"))
BOX = ("rt_first", "rt_last", "mz_low", "mz_high")  # extent of a run's peaks, minutes and m/z
STATISTICS = ("n_scans", "n_peaks", "total_intensity", "outside", *BOX)


# ---------------------------------------------------------------- problems, and files that are whole or not there


class Problem(Exception):
    """Something the user can put right, in one line that names the file, flag or column; status is the exit status."""

    def __init__(self, message, status=1):
        super().__init__(message)
        self.status = status


def run_script(main):
    """Call main and turn a Problem into one line on stderr; any other traceback means the program is at fault."""
    try:
        sys.exit(main())
    except Problem as problem:
        line, status = str(problem), problem.status
    except OSError as error:  # a full disk, a folder that may not be written
        line, status = f"{error.filename or 'input or output'}: {error.strerror or error}", 1
    except KeyboardInterrupt:
        line, status = "interrupted", 130
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    sys.exit(status)


@contextmanager
def whole_file(path):
    """Yield a temporary path that becomes `path` when the block ends well and vanishes when it does not."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)  # for the message: a full disk names no file, others the temporary one
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_csv(path, rows):
    """Write rows (the first holds the column names) as a table that is whole or not there."""
    with whole_file(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def write_rows(path, rows):
    """Write dicts as such a table; the keys of the first one are its columns."""
    write_csv(path, [rows[0].keys(), *([row[column] for column in rows[0]] for row in rows)])


def first_line(error):
    """The first line of an exception's message, or its name: libraries like to write pages."""
    return str(error).strip().partition("\n")[0][:150] or type(error).__name__


def first_few(names, n=5):
    """'a, b, c and 7 more'"""
    names = sorted(map(str, names))
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")


# ---------------------------------------------------------------- one run -> one picture


@dataclass(frozen=True)
class Recipe:
    """How a run becomes a picture. Written into every PNG and checkpoint, so that new runs can be treated the same.

    Retention times in minutes. `bins` is (number of retention-time bins, number of m/z bins).
    """

    rt_min: float
    rt_max: float
    mz_min: float
    mz_max: float
    bins: tuple = (500, 500)
    normalize: str = "rt"
    min_intensity: float = 0.0
    sigma: float = 2.0
    colormap: str = "jet"

    def to_text(self):
        """The recipe as the strings of a PNG's text chunks; str keeps every digit of the axes."""
        return {name: str(value) for name, value in asdict(self).items()} | {"bins": "{} {}".format(*self.bins)}

    @classmethod
    def from_text(cls, text):
        """The recipe in the text chunks of a PNG (or in a checkpoint); KeyError or ValueError if it is not there."""
        floats = ("rt_min", "rt_max", "mz_min", "mz_max", "min_intensity", "sigma")
        bins = tuple(int(n) for n in text["bins"].split())
        numbers = {name: float(text[name]) for name in floats}
        return cls(bins=bins, normalize=text["normalize"], colormap=text["colormap"], **numbers)

    def to_fraction(self, rt, mz):
        """Minutes and m/z -> fraction of the picture from the left and from the top: it survives every resize."""
        x = (np.asarray(rt) - self.rt_min) / (self.rt_max - self.rt_min)
        return x, 1 - (np.asarray(mz) - self.mz_min) / (self.mz_max - self.mz_min)

    def from_fraction(self, x, y):
        """Fraction of the picture from the left and from the top -> minutes and m/z."""
        rt = self.rt_min + np.asarray(x) * (self.rt_max - self.rt_min)
        return rt, self.mz_min + (1 - np.asarray(y)) * (self.mz_max - self.mz_min)

    def zero_colour(self):
        """The RGB colour (uint8) of zero intensity: what "nothing measured" looks like (dark blue in jet)."""
        return colours(np.zeros((1, 1)), self.colormap)[0, 0]


def picture_of_run(path, recipe):
    """Raw run -> (uint8 RGB picture (n_mz, n_rt, 3), its statistics). Raises Problem if the file is unreadable."""
    counts, statistics = histogram_of_run(path, recipe)
    return picture_of_counts(counts, recipe), statistics


def histogram_of_run(path, recipe):
    """Intensity summed in each bin, as numpy.histogram2d(rt, mz, weights=intensity) does, edges and last bin included.

    Returns counts (n_rt, n_mz) and the statistics of the run, the share of its intensity outside the axes among them.
    As the m/z of a scan ascend, its bins are slices: one binary search an edge instead of one a peak.
    """
    rt_edges = np.linspace(recipe.rt_min, recipe.rt_max, recipe.bins[0] + 1)
    mz_edges = np.linspace(recipe.mz_min, recipe.mz_max, recipe.bins[1] + 1)
    counts = np.zeros(recipe.bins)  # (n_rt, n_mz)

    def add(rt, mz, intensity):
        column = np.searchsorted(rt_edges, rt, side="right") - 1
        column -= rt == rt_edges[-1]  # the last bin includes its right edge
        if 0 <= column < len(counts):
            cuts = np.searchsorted(mz, mz_edges)
            cuts[-1] = np.searchsorted(mz, mz_edges[-1], side="right")
            sums = np.add.reduceat(np.append(intensity, 0.0), cuts)[:-1]  # append also makes it float64
            sums[cuts[:-1] == cuts[1:]] = 0  # reduceat gives an empty slice its first element
            counts[column] += sums

    statistics = read_run(path, add, recipe.min_intensity)
    total = statistics["total_intensity"]
    if total > 0 and not counts.any():
        own = "{:.2f}-{:.2f} min, m/z {:.2f}-{:.2f}".format(*(statistics[side] for side in BOX))
        axes = f"{recipe.rt_min:.2f}-{recipe.rt_max:.2f} min, m/z {recipe.mz_min:.2f}-{recipe.mz_max:.2f}"
        raise Problem(f"{path.name}: no peak inside the axes ({axes}; its own: {own})")
    return counts, statistics | {"outside": max(0.0, 1 - float(counts.sum()) / total) if total > 0 else 0.0}


def picture_of_counts(counts, recipe):
    """Histogram (n_rt, n_mz) -> uint8 RGB picture (n_mz, n_rt, 3), retention time to the right and m/z up."""
    from scipy.ndimage import gaussian_filter  # not at the top, like pyopenms and matplotlib: --help need not wait

    highest = counts.max(axis=1, keepdims=True) if recipe.normalize == "rt" else counts.max()
    values = counts / np.where(highest > 0, highest, 1)
    if recipe.sigma > 0:
        values = gaussian_filter(values, recipe.sigma)
    values = np.log1p(255 * values / (values.max() or 1))  # weak compounds are most of the metabolome
    return colours(values.T[::-1] / np.log(256), recipe.colormap)


def colours(values, colormap):
    """Values in 0 ... 1 -> uint8 RGB (height, width, 3) of a matplotlib colormap."""
    import matplotlib

    return np.ascontiguousarray(matplotlib.colormaps[colormap](values, bytes=True)[..., :3])


def read_run(path, add, min_intensity=0.0):
    """Call add(retention time in minutes, m/z ascending, intensity) for every MS1 scan; returns the run's statistics.

    pyopenms tells mzML from mzXML, unpacks .gz and .bz2 and knows the time's unit. It hands over one scan at a time, so
    that a run of any size fits in memory. Raises Problem if the file is unreadable or has no MS1 peak that strong.
    """
    import pyopenms

    path = Path(path)
    seen, interrupted = dict.fromkeys(("n_scans", "n_peaks", "total_intensity"), 0), []
    low, high = np.full(2, np.inf), np.full(2, -np.inf)  # minutes, m/z

    def take(spectrum):
        try:
            if not spectrum.isSorted():
                spectrum.sortByPosition()
            rt, (mz, intensity) = spectrum.getRT() / 60, spectrum.get_peaks()
            kept = intensity >= min_intensity
            if not kept.all():
                mz, intensity = mz[kept], intensity[kept]
            seen["n_scans"] += 1
            if len(mz):
                seen["n_peaks"] += len(mz)
                seen["total_intensity"] += float(intensity.sum(dtype=np.float64))
                np.minimum(low, (rt, mz[0]), out=low)
                np.maximum(high, (rt, mz[-1]), out=high)
                add(rt, mz, intensity)
        except BaseException as error:  # pyopenms would swallow it, Ctrl-C included
            interrupted.append(error)
            raise

    ignored = ("consumeChromatogram", "setExpectedSize", "setExperimentalSettings")
    consumer = SimpleNamespace(consumeSpectrum=take, **dict.fromkeys(ignored, lambda *_: None))
    options = pyopenms.PeakFileOptions()
    options.setMSLevels([1])
    options.setSortSpectraByMZ(False)  # done above, where it is needed
    with quiet_pyopenms() as said:
        try:
            with open(path, "rb") as file:  # the system's reasons are clearer than the parser's
                if not file.read(1):
                    raise Problem(f"{path.name}: is empty (zero bytes)")
            is_mzxml = pyopenms.FileHandler.getTypeByContent(str(path)) == pyopenms.FileType.MZXML
            reader = pyopenms.MzXMLFile() if is_mzxml else pyopenms.MzMLFile()
            reader.setOptions(options)
            reader.transform(str(path), consumer, skip_full_count=True)
        except OSError as error:
            raise Problem(f"{path.name}: {error.strerror or error}") from None
        except RuntimeError as error:
            if interrupted:
                raise interrupted[0] from None
            raise Problem(f"{path.name}: {reason_of(error, said())}") from None
    if not seen["n_peaks"]:
        raise Problem(f"{path.name}: holds no MS1 peaks of intensity {min_intensity:g} or more")
    return seen | dict(zip(BOX, map(float, (low[0], high[0], low[1], high[1])), strict=True))


@contextmanager
def quiet_pyopenms():
    """Keep what pyopenms prints from C++ off the screen; yields a function that returns it."""
    import pyopenms

    pyopenms.LogConfigHandler.getInstance().setLogLevel("FATAL_ERROR")
    with tempfile.TemporaryFile() as file:
        screen = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield lambda: file.seek(0) or file.read().decode(errors="replace")
        finally:
            os.dup2(screen, 2)
            os.close(screen)


def reason_of(error, said):
    """The useful part of a pyopenms error, whose exception says that parsing failed and whose print says why."""
    if found := re.search(r"While loading '.*': (.+?)(?:\s*\( in (line \d+).*)?$", said, re.MULTILINE):
        return f"parse error in {found[2] or 'the file'}: {found[1]}"
    return str(error).split(" in: ")[0].strip("-: ")


# ---------------------------------------------------------------- shifted copies, and the PNGs of one run


def shifted(picture, rt_shift, mz_shift, fill):
    """Copy of a picture moved by whole pixels (right, up); what it uncovers is filled, nothing wraps around."""
    height, width = picture.shape[:2]
    padded = np.empty((height + 2 * abs(mz_shift), width + 2 * abs(rt_shift), 3), np.uint8)
    padded[:] = fill
    padded[abs(mz_shift) :, abs(rt_shift) :][:height, :width] = picture
    return padded[abs(mz_shift) + mz_shift :, abs(rt_shift) - rt_shift :][:height, :width]


def draw_shifts(sample_name, n, max_shift, seed):
    """n different (rt, mz) shifts in whole pixels, never (0, 0); the draw depends on nothing but seed and name."""
    side = range(-max_shift, max_shift + 1)
    shifts = [(rt, mz) for rt in side for mz in side if (rt, mz) != (0, 0)]
    rng = np.random.default_rng([seed, zlib.crc32(sample_name.encode())])
    return [shifts[i] for i in rng.choice(len(shifts), n, replace=False)]


def write_pictures(path, pngs, recipe):
    """Write the picture of one run and its shifted copies; returns the statistics of the run.

    pngs: list of (PNG path, (rt shift, mz shift)). The last is the picture itself: where it exists, the run is done.
    """
    picture, statistics = picture_of_run(path, recipe)
    text = recipe.to_text() | {"source": path.name, "sample_name": pngs[-1][0].stem} | statistics
    for png, shift in pngs:
        info = PngImagePlugin.PngInfo()
        for key, value in (text | {"shift": f"{shift[0]} {shift[1]}"}).items():
            info.add_text(key, str(value))
        image = Image.fromarray(shifted(picture, *shift, recipe.zero_colour()))
        with whole_file(png) as temporary:
            image.save(temporary, pnginfo=info, compress_level=1)
    return statistics


def extent_of_run(path, min_intensity):
    """(rt_min, rt_max, mz_min, mz_max): the smallest box around the peaks of a run."""
    statistics = read_run(path, lambda *scan: None, min_intensity)
    return [statistics[side] for side in BOX]


# ---------------------------------------------------------------- worker processes


def work(pipe, function):
    """Worker process: receive arguments, send back the result or its Problem, until the parent hangs up or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent answers it
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # pyopenms prints to the screen once more when it ends
    with suppress(EOFError, OSError):
        while True:
            arguments = pipe.recv()
            try:
                result = function(*arguments)
            except Problem as problem:
                result = problem
            except Exception as error:  # whatever it is, it must not cost the other runs
                result = Problem(f"{Path(arguments[0]).name}: {type(error).__name__}: {error}")
            pipe.send(result)


def for_each(function, tasks, workers, title):
    """Yield (name, result or Problem) of function(*arguments) for each {name: arguments}, in worker processes.

    A worker that dies (a reader that crashes, no memory left) costs the run in its hands and is replaced.
    """
    waiting, busy, failed = list(tasks.items())[::-1], {}, 0
    context = get_context("spawn")  # a forked copy of a process with OpenMP threads can hang

    def start_worker():
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, function), daemon=True)
        process.start()
        theirs.close()  # now the pipe ends when the worker does
        return ours, process

    def hand_out(pipe, process):
        name, arguments = waiting.pop()
        busy[pipe] = name, process
        with suppress(BrokenPipeError):  # it died already; the pipe will say so
            pipe.send(arguments)

    try:
        with tqdm(total=len(tasks), desc=title, unit="run", postfix={"failed": 0}, disable=None) as bar:
            for _ in range(min(workers, len(tasks))):
                hand_out(*start_worker())
            while busy:
                for pipe in connection.wait(busy):
                    name, process = busy.pop(pipe)
                    try:
                        result, died = pipe.recv(), False
                    except (EOFError, ConnectionResetError):
                        process.join()
                        result, died = Problem(f"{name}: the reader crashed (exit code {process.exitcode})"), True
                    if waiting:
                        hand_out(*(start_worker() if died else (pipe, process)))
                    failed += isinstance(result, Problem)
                    bar.set_postfix(failed=failed, refresh=False)
                    bar.update()
                    yield name, result
    finally:
        for _, process in busy.values():
            process.terminate()


# ---------------------------------------------------------------- the cohort: samples, files, splits


def read_table(path):
    """Rows of a text table as dicts of text: commas, semicolons or tabs, with or without byte-order mark."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise Problem(f"{path}: {getattr(error, 'strerror', None) or 'is not UTF-8 text'}", 2) from None
    header = text.partition("\n")[0]
    return list(csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count)))


def read_samples(path, group_by=None):
    """Rows of samples.csv as dicts of text. Raises Problem for anything that would end in a wrong picture folder."""
    rows = read_table(path)
    columns = list(rows[0]) if rows else []
    for column in ("sample_name", "phenotype", *filter(None, [group_by])):
        if column not in columns:
            found = ", ".join(map(str, columns)) or "no rows"
            raise Problem(f"{path}: needs a column '{column}' (found: {found})", 2)
    for line, row in enumerate(rows, 2):
        for column in ("sample_name", "phenotype"):
            value = row[column] or ""
            if not value.strip() or "/" in value or "\0" in value or value.startswith("."):
                raise Problem(f"{path}, row {line}: {column} {value!r} cannot name a file or folder", 2)
        if group_by and not (row[group_by] or "").strip():
            raise Problem(f"{path}, row {line}: no value in --group-by column '{group_by}'", 2)
    if twice := [name for name, n in Counter(row["sample_name"] for row in rows).items() if n > 1]:
        raise Problem(f"{path}: {len(twice)} sample names appear more than once: {first_few(twice)}", 2)
    spellings = defaultdict(set)
    for row in rows:
        spellings[row["phenotype"].strip().casefold()].add(row["phenotype"])
    for variants in spellings.values():
        if len(variants) > 1 or variants != {v.strip() for v in variants}:
            raise Problem(f"{path}: phenotype spelled {sorted(variants)}: use one spelling without blanks around it", 2)
    if len(spellings) < 2:
        raise Problem(f"{path}: one phenotype only ({rows[0]['phenotype']!r}); a classifier needs two", 2)
    return rows


def find_runs(raw_dir):
    """{sample name: path} of the mzML and mzXML files in raw_dir, packed or not."""
    raw_dir = Path(raw_dir)
    if not raw_dir.is_dir():
        raise Problem(f"{raw_dir}: no such folder of raw runs", 2)
    runs = {}
    for path in sorted(raw_dir.iterdir()):
        suffix = next((s for s in RUN_SUFFIXES if path.name.lower().endswith(s)), None)
        if suffix is None or path.name.startswith("."):
            continue
        name = path.name[: -len(suffix)]
        if name in runs:
            raise Problem(f"{raw_dir}: {runs[name].name} and {path.name} are both sample '{name}': keep one", 2)
        runs[name] = path
    if not runs:
        raise Problem(f"{raw_dir}: no .mzML or .mzXML file (packed as .gz or .bz2 or not) in this folder", 2)
    return runs


def split_counts(sizes, fraction):
    """How many of each class to take: ceil(fraction * all) in all, shared out by largest remainder."""
    n = math.ceil(fraction * sizes.total() - 1e-9)
    exact = {label: n * size / sizes.total() for label, size in sizes.items()}
    counts = Counter({label: int(share) for label, share in exact.items()})
    by_remainder = sorted(exact, key=lambda label: (counts[label] - exact[label], label))
    counts.update(by_remainder[: n - counts.total()])
    return counts


def assign_splits(rows, test, val, seed, group_by=None):
    """Set row["split"]: test portion first, then validation portion of the rest, stratified by phenotype.

    218 + 80 rows at 0.1 and 0.2 give 214 / 54 / 30. Rows that share a group go together: the largest group first, to
    the split that is shortest of its phenotypes. Without group_by every row is a group of its own.
    """
    sizes = Counter(row["phenotype"] for row in rows)
    wanted = {"test": split_counts(sizes, test)}
    rest = sizes - wanted["test"]
    wanted["val"] = split_counts(rest, val)
    wanted["train"] = rest - wanted["val"]
    missing = {split: Counter(counts) for split, counts in wanted.items()}

    groups = defaultdict(list)
    for i, row in enumerate(rows):
        groups[row[group_by] if group_by else i].append(row)
    groups = list(groups.values())
    random.Random(seed).shuffle(groups)
    for group in sorted(groups, key=len, reverse=True):
        labels = [row["phenotype"] for row in group]
        need = {split: sum(missing[split][p] / max(wanted[split][p], 1) for p in labels) for split in SPLITS}
        split = max(SPLITS, key=need.get)
        for row in group:
            row["split"] = split
            missing[split][row["phenotype"]] -= 1


def check_splits(rows, group_by):
    """Refuse a given split column that is misspelled or tears a group apart, and any split that leaves a class out."""
    homes = defaultdict(set)
    for row in rows:
        if row["split"] not in SPLITS:
            raise Problem(f"split of sample {row['sample_name']!r} is {row['split']!r}; use train, val or test", 2)
        if group_by:
            homes[row[group_by]].add(row["split"])
    if torn := [group for group, splits in homes.items() if len(splits) > 1]:
        raise Problem(f"{len(torn)} groups of column '{group_by}' lie in more than one split: {first_few(torn)}", 2)
    for split in SPLITS:
        if absent := {row["phenotype"] for row in rows} - {row["phenotype"] for row in rows if row["split"] == split}:
            advice = "lower --test or --val" if split == "train" else f"raise --{split}"
            advice += ", or give a 'split' column" + "; a phenotype needs three groups or more" * bool(group_by)
            raise Problem(f"the {split} split has no run of {first_few(absent)} ({len(rows)} runs in all): {advice}", 2)


# ---------------------------------------------------------------- a whole data set

PICTURE_SETTINGS = ("normalize", "min_intensity", "sigma", "colormap")
OTHER_SETTINGS = ("bins", "rt_range", "mz_range", "augment", "max_shift", "test", "val", "group_by", "seed")


def png_paths(out_dir, row, args):
    """[(path, (rt shift, mz shift))] of a sample's copies (training only) and, last, of its picture."""
    folder, name = out_dir / row["split"] / row["phenotype"], row["sample_name"]
    shifts = draw_shifts(name, args.augment, args.max_shift, args.seed) if row["split"] == "train" else []
    copies = [(folder / f"{name}_rt{rt:+d}_mz{mz:+d}.png", (rt, mz)) for rt, mz in shifts]
    return [*copies, (folder / f"{name}.png", (0, 0))]


def check_settings(out_dir, settings):
    """The axes of the conversion in out_dir that this one continues, or None. Raises Problem if any setting differs.

    The samples are a setting too: one row more changes the random split and the axes, so it makes another data set.
    """
    path = out_dir / "settings.json"
    if not path.exists():
        if any(out_dir.glob("*/*/*.png")):
            raise Problem(f"{out_dir} already holds pictures that convert.py did not make: use another OUT_DIR", 2)
        return None
    before = json.loads(path.read_text(encoding="utf-8"))
    advice = "use another OUT_DIR, or delete this one to start again"
    for key, value in settings.items():
        was = before.get(key)
        if key == "samples" and was != value:
            differ = was.keys() ^ value.keys() or [name for name in was if was[name] != value[name]]
            raise Problem(f"{out_dir} was converted from other samples or splits ({first_few(differ)}): {advice}", 2)
        if was != value:
            before, now = (" ".join(map(str, np.ravel("unset" if v is None else v))) for v in (was, value))
            raise Problem(f"{out_dir} was converted with --{key.replace('_', '-')} {before}, not {now}: {advice}", 2)
    return before["axes"]


def find_axes(runs, args):
    """([rt_min, rt_max, mz_min, mz_max] as given or else around every run, {name: Problem} of what cannot be read)."""
    given = [*(args.rt_range or (None, None)), *(args.mz_range or (None, None))]
    if None not in given:
        return given, {}
    tasks = {name: (path, args.min_intensity) for name, path in runs.items()}
    results = dict(for_each(extent_of_run, tasks, args.workers, "finding axes"))
    failures = {name: result for name, result in results.items() if isinstance(result, Problem)}
    boxes = np.array([results[name] for name in results.keys() - failures.keys()])
    if not len(boxes):
        raise Problem(f"none of the {len(runs)} runs could be read; the first: {next(iter(failures.values()))}")
    box = []
    for low, high in zip(boxes.min(axis=0).tolist()[::2], boxes.max(axis=0).tolist()[1::2], strict=True):
        box += [low, high] if low < high else [low - 0.5, high + 0.5]  # one scan or one m/z: as numpy.histogram2d does
    return [found if value is None else value for value, found in zip(given, box, strict=True)], failures


def read_cohort(args):
    """(rows of the sample table, those that have a file, with their splits, {sample name: path}).

    What has no partner is counted and named.
    """
    rows, runs = read_samples(args.samples, args.group_by), find_runs(args.raw_dir)
    names = {row["sample_name"] for row in rows}
    if extra := runs.keys() - names:
        print(f"{len(extra)} files in {args.raw_dir} are not in {args.samples}: {first_few(extra)}")
    if absent := names - runs.keys():
        print(f"{len(absent)} samples of {args.samples} have no file in {args.raw_dir}: {first_few(absent)}")
    present = [row for row in rows if row["sample_name"] in runs]
    if len({row["phenotype"] for row in present}) < 2:
        found = f"{len(present)} of {len(rows)} samples of {args.samples} have a file in {args.raw_dir}"
        raise Problem(f"{found}, and not two phenotypes among them: do the names match?", 2)
    if "split" not in rows[0]:
        assign_splits(present, args.test, args.val, args.seed, args.group_by)
    check_splits(present, args.group_by)
    return rows, present, {row["sample_name"]: runs[row["sample_name"]] for row in present}


def convert(args):
    """Convert the runs of args.raw_dir listed in args.samples into args.out_dir; returns the exit status."""
    out_dir = Path(args.out_dir)
    rows, present, runs = read_cohort(args)
    settings = {key: getattr(args, key) for key in (*PICTURE_SETTINGS, *OTHER_SETTINGS)}
    settings["samples"] = {row["sample_name"]: f"{row['split']}/{row['phenotype']}" for row in present}
    axes, failures = check_settings(out_dir, settings), {}
    if axes is None:
        axes, failures = find_axes(runs, args)
    recipe = Recipe(*axes, bins=tuple(args.bins), **{key: settings[key] for key in PICTURE_SETTINGS})
    for row in present:
        (out_dir / row["split"] / row["phenotype"]).mkdir(parents=True, exist_ok=True)
    for leftover in out_dir.glob("*/*/.*.tmp.png"):  # of a conversion that was killed
        leftover.unlink()
    with whole_file(out_dir / "settings.json") as temporary:
        temporary.write_text(json.dumps(settings | {"axes": axes}, indent=1, ensure_ascii=False), encoding="utf-8")

    statistics, tasks = {}, {}
    for row in present:
        pngs, name = png_paths(out_dir, row, args), row["sample_name"]
        if all(png.exists() for png, _ in pngs):
            with Image.open(pngs[-1][0]) as image:
                statistics[name] = {key: image.text[key] for key in STATISTICS}
        elif name not in failures:
            tasks[name] = (runs[name], pngs, recipe)
    if statistics:
        print(f"{len(statistics)} of {len(present)} runs are already converted in {out_dir}; its axes stay as they are")
    for name, result in for_each(write_pictures, tasks, args.workers, "converting"):
        (failures if isinstance(result, Problem) else statistics)[name] = result
    report(out_dir, rows, recipe, statistics, failures, args.group_by)
    return 1 if failures else 0


def report(out_dir, rows, recipe, statistics, failures, group_by):
    """Write samples.csv, one line a row of the sample table, and print the summary."""
    columns, table = ("sample_name", "phenotype", "split", "group", "status", *STATISTICS), []
    for row in rows:
        name = row["sample_name"]
        status = "ok" if name in statistics else f"failed: {failures[name]}" if name in failures else "no file"
        values = row | {"group": row[group_by] if group_by else "", "status": status} | statistics.get(name, {})
        table.append({column: values.get(column, "") for column in columns})
    write_rows(out_dir / "samples.csv", table)

    box = f"{recipe.rt_min:.2f}-{recipe.rt_max:.2f} min, m/z {recipe.mz_min:.2f}-{recipe.mz_max:.2f}"
    n_bins = f"{recipe.bins[0]} x {recipe.bins[1]} bins"
    print(f"{len(statistics)} of {len(statistics) + len(failures)} runs in {out_dir}: {box}, {n_bins}")
    for split in SPLITS:
        members = Counter(row["phenotype"] for row in table if row["split"] == split and row["status"] == "ok")
        print(f"  {split}: " + ", ".join(f"{n} {phenotype}" for phenotype, n in sorted(members.items())))
    outside = {name: float(values["outside"]) for name, values in statistics.items()}
    if cut := [name for name, share in outside.items() if share > 0.01]:
        share = f"more than 1 % of the intensity (at most {max(outside.values()):.0%})"
        print(f"warning: {share} lies outside the axes in {len(cut)} runs: {first_few(cut)}")
    for name in sorted(failures):
        print(f"left out: {failures[name]}", file=sys.stderr)


# ---------------------------------------------------------------- demo: a cohort whose truth is known

DEMO_PHENOTYPES = ("control", "exposed")  # the planted compounds occur in exposed runs only
DEMO_MINUTES, DEMO_MZ = 10.0, (100.0, 900.0)
DEMO_DEFAULTS = {"bins": [256], "test": 0.15, "rt_range": [0.0, DEMO_MINUTES], "mz_range": list(DEMO_MZ)}


def demo_compounds(rng, n_planted=30, n_background=210):
    """A made-up metabolome: planted and background compounds drawn from the same distributions.

    `frequency` is the chance that a run holds the compound; for planted ones that a run of an exposed person does.
    """
    n = n_planted + n_background
    rt = rng.uniform(0.9, 9.0, n)
    return {
        "planted": np.arange(n) < n_planted,
        "rt": rt,  # minutes
        "mz": np.clip(rng.uniform(110, 700, n) + 20 * rt, *DEMO_MZ),  # later means larger, as on a C18 column
        "log10_height": np.clip(rng.normal(5.8, 0.5, n), 5.0, 7.3),
        "width": rng.uniform(2.5, 5.0, n),  # seconds, one standard deviation of the rising side
        "tailing": rng.uniform(1.2, 3.0, n),  # falling side / rising side
        "frequency": rng.uniform(0.6, 0.9, n),
    }


def simulate_run(rng, compounds, lines, exposed):
    """Scans [(seconds, m/z, intensity)] of one synthetic centroided run; m/z ascending."""
    times = np.arange(0, 60 * DEMO_MINUTES, 2.0)
    n = len(times)
    scan, mz, height = [], [], []  # of all peaks

    def add(scans, masses, heights):
        scans, masses, heights = np.broadcast_arrays(scans, masses, heights)
        scan.append(scans), mz.append(masses), height.append(heights)

    # Every run drifts: retention by a shift and a stretch, mass by a few ppm, sensitivity by some per cent.
    shift, stretch, ppm = rng.normal(0, 0.03), rng.normal(1, 0.003), rng.normal(0, 3)
    sensitivity = rng.lognormal(0, 0.2)
    here = rng.random(len(compounds["rt"])) < compounds["frequency"] * (exposed | ~compounds["planted"])
    for k in np.flatnonzero(here):
        apex = 60 * (compounds["rt"][k] * stretch + shift) + rng.normal(0, 0.5)
        rise = compounds["width"][k]
        near = np.flatnonzero((times > apex - 4 * rise) & (times < apex + 4 * rise * compounds["tailing"][k]))
        sides = np.where(times[near] < apex, rise, rise * compounds["tailing"][k])
        top = 10 ** compounds["log10_height"][k] * sensitivity * rng.lognormal(0, 0.4)
        profile = top * np.exp(-0.5 * ((times[near] - apex) / sides) ** 2) * rng.lognormal(0, 0.1, len(near))
        carbons = compounds["mz"][k] / 20
        for isotope, share in enumerate((1, 0.011 * carbons, (0.011 * carbons) ** 2 / 2)):
            add(near, compounds["mz"][k] + 1.00336 * isotope, profile * share)
    # Solvent and plasticiser ions in every scan: the horizontal lines of the article's Figure 2.
    for line, level in lines:
        wander = np.exp(np.cumsum(rng.normal(0, 0.05, n)))
        add(np.arange(n), line, level * sensitivity * wander / wander.mean())
    # Dead volume: all that the column does not hold. Wash: all that it held too long, a polymer among it.
    for start, end, n_ions, low, level in ((0.5, 0.75, 60, 100, 2e5), (9.3, 9.8, 150, 300, 1e5)):
        window = np.flatnonzero((times > 60 * start) & (times < 60 * end))
        for ion in rng.uniform(low, low + 400, n_ions):
            add(window, ion, level * rng.lognormal(0, 1) * np.hanning(len(window) + 2)[1:-1])
    window = np.flatnonzero(times > 60 * 9.2)
    for unit in range(12):
        level = 4e5 * np.exp(-0.5 * ((unit - 5) / 3) ** 2)
        add(window, 327.2 + 44.0262 * unit, level * rng.lognormal(0, 0.1, len(window)))
    m = 40 * n  # electronic noise
    add(rng.integers(0, n, m), rng.uniform(*DEMO_MZ, m), rng.lognormal(np.log(2e3), 0.7, m))

    scan, mz, height = map(np.concatenate, (scan, mz, height))
    mz = mz * (1 + 1e-6 * (ppm + rng.normal(0, 2, len(mz))))
    kept = height > 1e3  # the detector sees four decades
    order = np.lexsort((mz[kept], scan[kept]))
    scan, mz, height = scan[kept][order], mz[kept][order], height[kept][order]
    cuts = np.searchsorted(scan, np.arange(n + 1))
    return [(times[i], mz[a:b], height[a:b]) for i, (a, b) in enumerate(zip(cuts[:-1], cuts[1:], strict=True))]


def write_mzml(path, scans):
    """Write MS1 scans [(seconds, m/z, intensity)] as mzML: zlib, m/z in 64 bits, intensity in 32."""
    import pyopenms

    experiment = pyopenms.MSExperiment()
    for seconds, mz, intensity in scans:
        spectrum = pyopenms.MSSpectrum()
        spectrum.setMSLevel(1)
        spectrum.setRT(float(seconds))
        spectrum.set_peaks((mz, intensity.astype(np.float32)))
        experiment.addSpectrum(spectrum)
    options, file = pyopenms.PeakFileOptions(), pyopenms.MzMLFile()
    options.setCompression(True)
    file.setOptions(options)
    with whole_file(path) as temporary:
        file.store(str(temporary), experiment)


def write_demo_run(path, seed, index, exposed):
    """One run of the demo cohort; cohort and run have their own random numbers, so any worker writes the same file."""
    cohort = np.random.default_rng([seed, 0])
    compounds = demo_compounds(cohort)
    lines = list(zip(cohort.uniform(*DEMO_MZ, 15), cohort.lognormal(np.log(2e4), 0.8, 15), strict=True))
    write_mzml(path, simulate_run(np.random.default_rng([seed, 1, index]), compounds, lines, exposed))


def write_demo(out_dir, n_runs, seed, workers):
    """Write OUT_DIR/raw/*.mzML and samples.csv, and OUT_DIR/features.csv in the form of an MS-DIAL alignment export."""
    out_dir, raw_dir = Path(out_dir), Path(out_dir) / "raw"
    print(f"making the demo cohort: {n_runs} synthetic runs in {raw_dir}, their compounds in {out_dir}/features.csv")
    raw_dir.mkdir(parents=True, exist_ok=True)
    made, asked = raw_dir / "cohort.json", json.dumps({"runs": n_runs, "seed": seed})
    if made.exists() and made.read_text() != asked:
        raise Problem(f"{raw_dir} holds another cohort, {made.read_text()}: use another folder or delete this one", 2)
    made.write_text(asked)
    paths = [raw_dir / f"run{i:03d}.mzML" for i in range(n_runs)]
    tasks = {path.name: (path, seed, i, bool(i % 2)) for i, path in enumerate(paths) if not path.exists()}
    for _, result in for_each(write_demo_run, tasks, workers, "writing mzML"):
        if isinstance(result, Problem):
            raise result
    samples = [{"sample_name": path.stem, "phenotype": DEMO_PHENOTYPES[i % 2]} for i, path in enumerate(paths)]
    write_rows(raw_dir / "samples.csv", samples)

    compounds = demo_compounds(np.random.default_rng([seed, 0]))
    columns = ["Alignment ID", "Average Rt(min)", "Average Mz", "Metabolite name", "Adduct type", "Fill %"]
    columns += ["MS/MS matched", "Ontology", "Annotation tag (VS1.0)"]
    lines = [[""] * (len(columns) - 1) + [title] for title in ("Class", "File type", "Injection order", "Batch ID")]
    lines.append(columns)
    for k in np.argsort(compounds["rt"]):
        planted, rt, mz, frequency = (compounds[key][k] for key in ("planted", "rt", "mz", "frequency"))
        kind, known = "planted" if planted else "background", k % 3 == 0
        lines.append([k, f"{rt:.3f}", f"{mz:.5f}", f"{kind} {k:03d}", "[M+H]+", f"{frequency / (1 + planted):.2f}"])
        lines[-1] += [known, kind, 430 if known else 530]
    write_csv(out_dir / "features.csv", lines)


# ---------------------------------------------------------------- command line


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The docstring as it stands, and the default of every flag that has one."""

    def _get_help_string(self, action):
        shown = action.default is not None and "default" not in action.help
        return super()._get_help_string(action) if shown else action.help


class Parser(argparse.ArgumentParser):
    """A parser with such help, whose errors are one line like any other: without the usage, which hides the reason."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=HelpFormatter)

    def error(self, message):
        raise Problem(f"{message.removeprefix('argument ')} (see --help)", 2)


def bounded(kind, low, high=math.inf, word=None):
    """A type of flags: an int or a finite float (`kind`) from low to high, or that word."""

    def parse(text):
        if text == word:
            return word
        with suppress(ValueError):
            if low <= kind(text) <= high and kind(text) < math.inf:
                return kind(text)
        limits = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
        name = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text} must be {name} {limits}" + (f", or {word}" if word else ""))

    return parse


def parse_arguments(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("raw_dir", nargs="?", help="folder of <sample_name>.mzML or .mzXML, packed (.gz, .bz2) or not")
    add("samples", nargs="?", metavar="samples.csv", help="table with sample_name, phenotype and, if you like, split")
    add("out_dir", nargs="?", help="folder for the pictures")
    add = parser.add_argument_group("picture").add_argument
    text = "one number for both axes, or time and m/z"
    add("--bins", type=bounded(int, 1), nargs="+", default=[500], metavar="N", help=text)
    add("--rt-range", type=float, nargs=2, metavar=("MIN", "MAX"), help="minutes (default: holds every run)")
    add("--mz-range", type=float, nargs=2, metavar=("MIN", "MAX"), help="m/z (default: holds every run)")
    text = "divide by the highest bin of a time, or of the run"
    add("--normalize", choices=["rt", "global"], default="rt", help=text)
    add("--min-intensity", type=bounded(float, 0), default=0.0, metavar="I", help="leave weaker peaks out")
    add("--sigma", type=bounded(float, 0), default=2.0, metavar="BINS", help="width of the Gaussian filter; 0 = off")
    add("--colormap", default="jet", metavar="NAME", help="any matplotlib colormap")
    add = parser.add_argument_group("shifted copies of training pictures").add_argument
    add("--augment", type=bounded(int, 0), default=0, metavar="N", help="copies of each training picture (article: 9)")
    add("--max-shift", type=bounded(int, 0), default=5, metavar="PIXELS", help="largest shift on either axis")
    add = parser.add_argument_group("split", "for tables without a split column").add_argument
    add("--test", type=float, default=0.1, metavar="SHARE", help="share of all runs for the test split")
    add("--val", type=float, default=0.2, metavar="SHARE", help="share of the other runs for validation")
    add("--group-by", metavar="COLUMN", help="rows that share this column's value stay in one split")
    add("--seed", type=bounded(int, 0), default=2643, help="of splits, shifts and the demo cohort")
    add = parser.add_argument_group("demo and machine").add_argument
    text = "make a synthetic cohort in OUT_DIR (demo) and convert it; defaults then: --bins 256 --test 0.15"
    add("--demo", nargs="?", const="demo", metavar="OUT_DIR", help=text + " --rt-range 0 10 --mz-range 100 900")
    add("--runs", type=bounded(int, 8), default=280, metavar="N", help="size of the demo cohort")
    text = "processes; one file each at a time"
    add("--workers", type=bounded(int, 1), default=os.cpu_count(), metavar="N", help=text)
    args = parser.parse_args(argv)
    if args.demo:
        if args.raw_dir:
            raise Problem("--demo takes one folder and no RAW_DIR or SAMPLES.csv", 2)
        parser.set_defaults(**DEMO_DEFAULTS)
        args = parser.parse_args(argv)
        args.raw_dir, args.samples, args.out_dir = f"{args.demo}/raw", f"{args.demo}/raw/samples.csv", args.demo
    check_arguments(args)
    return args


def check_arguments(args):
    """Raise Problem for values no conversion can use; --bins becomes two numbers."""
    import matplotlib

    args.bins = args.bins * 2 if len(args.bins) == 1 else args.bins
    if args.out_dir is None:
        raise Problem("needs RAW_DIR, SAMPLES.csv and OUT_DIR (or --demo); see --help", 2)
    if len(args.bins) != 2:
        raise Problem(f"--bins takes one or two numbers, not {' '.join(map(str, args.bins))}", 2)
    for flag in ("rt_range", "mz_range"):
        limits = getattr(args, flag)
        if limits and not -math.inf < limits[0] < limits[1] < math.inf:
            raise Problem(f"--{flag.replace('_', '-')} {limits[0]:g} {limits[1]:g}: MIN must lie below MAX", 2)
    for flag in ("test", "val"):
        if not 0 < getattr(args, flag) < 1:
            raise Problem(f"--{flag} {getattr(args, flag):g} must lie between 0 and 1", 2)
    max_shift, n_shifts = f"--max-shift {args.max_shift}", (2 * args.max_shift + 1) ** 2 - 1
    if args.augment > n_shifts:
        raise Problem(f"--augment {args.augment}: {max_shift} allows only {n_shifts} different shifts", 2)
    if args.augment and args.max_shift >= min(args.bins):
        raise Problem(f"{max_shift} must be smaller than --bins {min(args.bins)}", 2)
    if args.colormap not in matplotlib.colormaps:
        raise Problem(f"--colormap {args.colormap!r} is not a matplotlib colormap", 2)


def main():
    args = parse_arguments()
    # pyopenms decodes one file with several threads: share the cores out, so that the workers do not fight.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.workers)))
    if args.demo:
        write_demo(args.demo, args.runs, args.seed, args.workers)
    try:
        return convert(args)
    except KeyboardInterrupt:
        raise Problem("interrupted; the same command goes on from here", 130) from None


if __name__ == "__main__":
    run_script(main)
