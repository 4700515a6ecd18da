"""Turn raw LC-MS files into pictures on shared axes, split into training, validation and test.

Article, "Creating the pseudo images" and "Image augmentation". deeplcms.py makes one picture.

    python convert.py raw/ samples.csv data/golestan                # axes: the ranges of all files
    python convert.py raw/ samples.csv data/golestan_1000 --bins 1000 --augment 9 --workers 8
    torchrun --nnodes 4 ... convert.py raw/ samples.csv data/golestan     # four machines share the files

After an interruption run the same command again. A file that cannot be read is left out: its reason
is in OUT_DIR/samples.csv, and the next run of the command tries it again.
"""

import argparse
import atexit
import math
import os
import random
import signal
import sys
import threading
import zlib
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from datetime import timedelta
from itertools import product
from multiprocessing import get_context, parent_process
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from PIL import Image, PngImagePlugin
from tqdm import tqdm

from deeplcms import NORMALIZE, RANK, SPLITS, STATISTICS, WORLD, Help, InputError, Recipe
from deeplcms import clean_title, colours, compute_chromatogram, cores, count, find_anomalies
from deeplcms import find_raw_files, find_spellings, first_difference, first_few, make_histogram
from deeplcms import make_picture, read_header, read_json, read_table, run_script, whole_file
from deeplcms import write_json, write_table

NOT_SETTINGS = ("raw_dir", "samples", "out_dir", "workers")  # flags that do not affect pictures
WRITTEN = ("status", *STATISTICS, "polarity")  # columns that this script adds to samples.csv
RESERVED = {*WRITTEN, "path", "copy", "label", "chromatogram", "digest", "rt_shift"}


# ---------------------------------------------------------------- a whole data set
def convert(args):
    """Convert the raw files listed in args.samples into args.out_dir; returns the exit status."""
    out_dir = Path(args.out_dir)
    table = read_samples(args)
    present = table.dropna(subset="path").set_index("sample_name", drop=False)
    settings = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    settings["samples"] = (present["split"] + "/" + present["phenotype"]).to_dict()
    axes, failures = read_axes(out_dir, settings), {}
    if axes is None:
        axes, failures = find_axes(present["path"], args)
    fields = {name: value for name, value in settings.items() if name in Recipe.__annotations__}
    recipe = Recipe(*axes, **fields | {"bins": tuple(args.bins)})

    for leftover in out_dir.glob("*/*/.*.tmp.png"):  # a killed command left it
        leftover.unlink()
    statistics, tasks = {}, {}
    for row in present.itertuples():
        pngs = list_pngs(out_dir, row, args)
        pngs[0][0].parent.mkdir(parents=True, exist_ok=True)
        if all(png.exists() for png, _ in pngs):
            header, _ = read_header(pngs[-1][0])
            if header.get("source_state") == read_file_state(row.path):
                statistics[row.sample_name] = header
                continue
        if row.sample_name not in failures:
            tasks[row.sample_name] = (row.path, pngs, recipe)
    gather({})  # barrier: all processes list the folder before one writes
    if RANK == 0:
        write_json(out_dir / "settings.json", settings | {"axes": axes})
    if statistics:
        print(f"{len(statistics)} of {len(present)} files are already converted; the axes stay")
    for name, result in for_each(write_pictures, tasks, args.workers, "converting").items():
        (failures if isinstance(result, Exception) else statistics)[name] = result
    if not statistics:
        (out_dir / "settings.json").unlink(missing_ok=True)  # so that other settings can be tried
        raise InputError(f"no file became a picture; the first: {next(iter(failures.values()))}")
    if RANK == 0:
        found = pd.DataFrame.from_dict(statistics, orient="index")
        write_samples(out_dir, table, found, failures)
        print(f"{len(found)} of {len(present)} files are pictures in {out_dir}: {recipe}")
        print_summary(table, found, recipe)
    gather({})
    return 1 if failures else 0


def read_axes(out_dir, settings):
    """The axes of an earlier run of this command, or None; InputError if it had other settings."""
    if not (out_dir / "settings.json").exists():
        if any(out_dir.glob("*/*/*.png")):
            raise InputError(f"{out_dir} has pictures without settings.json: use another OUT_DIR")
        return None
    before = read_json(out_dir / "settings.json")
    if differing := first_difference(before, settings):
        what = "other samples or splits" if differing[0] == "samples" else "{} {}, not {}".format(*differing)
        raise InputError(f"{out_dir} was converted with {what}: use another OUT_DIR, or delete it")
    return before["axes"]


def find_axes(paths, args):
    """[rt_min, rt_max, mz_min, mz_max], given or of all files, and {name: exception} of bad ones."""
    if args.rt_range and args.mz_range:
        return [*args.rt_range, *args.mz_range], {}
    tasks = {name: (path, args.min_intensity, args.only_polarity) for name, path in paths.items()}
    found, failures = {}, {}
    for name, result in for_each(read_statistics, tasks, args.workers, "finding axes").items():
        (failures if isinstance(result, Exception) else found)[name] = result
    if not found:
        raise InputError(f"no file could be read; the first: {next(iter(failures.values()))}")
    found = pd.DataFrame.from_dict(found, orient="index")
    rt_range = args.rt_range or [found["rt_first"].min(), found["rt_last"].max()]
    mz_range = args.mz_range or [found["mz_low"].min(), found["mz_high"].max()]
    axes = []
    for low, high in (rt_range, mz_range):
        margin = 0.5 if low == high else 0  # one scan or one m/z: as numpy.histogram2d does
        axes += [float(low - margin), float(high + margin)]
    print("axes: {:.2f} to {:.2f} min, m/z {:.2f} to {:.2f}".format(*axes))
    return axes, failures


def read_statistics(path, min_intensity, polarity=""):
    """Statistics of a raw file, with its ranges; its histogram of one bin is not used."""
    recipe = Recipe(0, 1, 0, 1, (1, 1), min_intensity=min_intensity, only_polarity=polarity)
    return make_histogram(path, recipe)[1]


# ---------------------------------------------------------------- the samples and their splits
def read_samples(args):
    """The sample table with the columns group, path (of the raw file, or nan) and split."""
    table = read_table(args.samples, skip_blank_lines=False)
    table = table[table.map(str.strip).any(axis=1)]  # drop blank rows; the index keeps row numbers
    group_by = clean_title(args.group_by or "sample_name")
    no_name = r"^$|^\s|\s$|^\.|/"  # cannot name a file or a folder
    patterns = {group_by: r"^\s*$", "sample_name": no_name, "phenotype": no_name}
    for column, pattern in patterns.items():
        if column not in table:
            raise InputError(f"{args.samples}: needs a column {column} (found: {', '.join(table)})")
        bad = table[column].str.contains(pattern)
        if bad.any():
            row = bad.idxmax()
            raise InputError(f"{args.samples}, row {row + 2}: {column} {table[column][row]!r} cannot be used")
    if "status" in table and table["status"].str.fullmatch("ok|no file|failed: .*").all():
        table = table.drop(columns=list(WRITTEN), errors="ignore")  # convert.py wrote them
    if taken := RESERVED & set(table):
        raise InputError(f"{args.samples}: its column {first_few(taken)} would be lost: rename it")

    raw_files = find_raw_files(args.raw_dir)
    names = table["sample_name"]
    extension = r"(?i)\.(mzml|mzxml|cdf|raw|d|wiff)(\.gz|\.bz2)?$"
    stems = names.str.replace(extension, "", regex=True)
    names = names.where(names.isin(raw_files), stems)  # a table may list file names
    repeated = names[names.duplicated()]
    if len(repeated):
        raise InputError(f"{args.samples}: named more than once: {first_few(repeated)}")
    spellings = find_spellings(table["phenotype"])
    if len(spellings):
        raise InputError(f"{args.samples}: one phenotype in two spellings: {first_few(spellings)}")
    table = table.assign(sample_name=names, path=names.map(raw_files))
    if "group" in table and not table["group"].equals(table[group_by]):
        raise InputError(f"{args.samples}: its column group would be lost: rename it, or pass --group-by group")
    table["group"] = table[group_by]

    present = table.dropna(subset="path")
    print(f"{len(present)} of the {len(table)} samples have a file in {args.raw_dir}")
    if absent := set(names) - set(raw_files):
        print(f"samples without a file: {first_few(absent)}")
    if unknown := set(raw_files) - set(names):
        print(f"files without a sample: {first_few(unknown)}")
    only_test = set(present.get("split", [])) == {"test"}  # a cohort that is only for testing
    if present["phenotype"].nunique() < (1 if only_test else 2):
        raise InputError(f"{args.samples}: files of two phenotypes are needed; do names and files match?")
    if "split" not in table:
        table["split"] = assign_splits(present, args.test, args.val, args.seed)
    check_splits(table.loc[present.index])
    return table


def assign_splits(table, test, val, seed):
    """Split of each row, stratified by phenotype: a test share of all, then a val share of the rest.

    218 + 80 rows at 0.1 and 0.2 give 214 / 54 / 30. Groups stay together: the largest group first,
    each in the split that most lacks its phenotypes.
    """
    one_hot = pd.get_dummies(table["phenotype"], dtype=int)  # (row, phenotype)
    sizes = one_hot.sum()
    n_test = apportion(sizes, test)
    n_val = apportion(sizes - n_test, val)
    wanted = pd.DataFrame([sizes - n_test - n_val, n_val, n_test], SPLITS)  # (split, phenotype)
    missing = wanted.copy()
    groups = list(table.groupby("group", sort=False).groups.values())
    random.Random(seed).shuffle(groups)
    split = pd.Series(index=table.index, dtype=object)
    for rows in sorted(groups, key=len, reverse=True):
        phenotypes = one_hot.loc[rows].sum()
        lack = (missing / wanted.clip(lower=1) * phenotypes).sum(axis=1)  # (split,)
        split[rows] = lack.idxmax()
        missing.loc[lack.idxmax()] -= phenotypes
    return split


def apportion(sizes, fraction):
    """Share out ceil(fraction * total) over phenotypes by largest remainder: Series like sizes."""
    n = math.ceil(fraction * sizes.sum() - 1e-9)
    exact = n * sizes / max(sizes.sum(), 1)
    counts = exact.astype(int)
    counts[(exact - counts).nlargest(n - counts.sum()).index] += 1
    return counts


def check_splits(table):
    """Refuse splits that are misspelled, divide a group or lack a phenotype; test may be all or empty."""
    if wrong := set(table["split"]) - set(SPLITS):
        raise InputError(f"the split column contains {first_few(wrong)}; use train, val or test")
    splits = table.groupby("group")["split"].nunique()
    if splits.max() > 1:
        raise InputError(f"groups in more than one split: {first_few(splits.index[splits > 1])}")
    counts = pd.crosstab(table["split"], table["phenotype"])
    if list(counts.index) == ["test"]:
        return
    counts = counts.reindex(counts.index.union(["train", "val"]), fill_value=0)
    if counts.min(axis=None) == 0:
        split, phenotype = counts.stack().idxmin()
        raise InputError(f"the {split} split has no {phenotype}: change --test or --val, or add a split column")


# ---------------------------------------------------------------- the PNGs of one raw file
def write_pictures(path, pngs, recipe):
    """Write the picture of a raw file and its shifted copies (list_pngs); returns its text chunks."""
    picture, statistics = make_picture(path, recipe)
    palette = colours(np.arange(256), recipe.colormap).tobytes()
    text = recipe.to_text() | {"source": path.name, "source_state": read_file_state(path)}
    text |= {"sample_name": pngs[-1][0].stem} | statistics
    for png, (rt, mz) in pngs:
        copy = shift_picture(picture, rt, mz)
        text["shift"] = f"{rt} {mz}"
        text["digest"] = f"{zlib.crc32(copy):08x}"
        text["chromatogram"] = " ".join(f"{value:.4f}" for value in compute_chromatogram(copy))
        chunks = PngImagePlugin.PngInfo()
        for name, value in text.items():
            chunks.add_text(name, str(value))
        image = Image.fromarray(copy)
        image.putpalette(palette)  # the indices stay, and viewers show colours
        with whole_file(png) as temporary:
            image.save(temporary, pnginfo=chunks, compress_level=1)
    return text


def list_pngs(out_dir, row, args):
    """[(path, (rt, mz) shift in pixels)]: shifted copies (training only), then the picture."""
    path = out_dir / row.split / row.phenotype / row.sample_name
    n_copies = args.augment if row.split == "train" else 0
    shifts = draw_shifts(row.sample_name, n_copies, args.max_shift, args.seed)
    copies = [(Path(f"{path}_rt{rt:+d}_mz{mz:+d}.png"), (rt, mz)) for rt, mz in shifts]
    return [*copies, (Path(f"{path}.png"), (0, 0))]


def draw_shifts(sample_name, n, max_shift, seed):
    """n different (rt, mz) shifts in pixels, never (0, 0); they depend on seed and name alone."""
    shifts = list(product(*(range(-largest, largest + 1) for largest in max_shift)))
    shifts.remove((0, 0))
    rng = np.random.default_rng([seed, zlib.crc32(sample_name.encode())])
    return [shifts[i] for i in rng.choice(len(shifts), n, replace=False)]


def shift_picture(picture, rt_shift, mz_shift):
    """Copy of a picture moved by pixels to the right and up; zero-filled, without wrap-around."""
    return np.asarray(Image.fromarray(picture).rotate(0, translate=(rt_shift, -mz_shift)))


def read_file_state(path):
    """Size and time of a file, which tell whether it has been exported again."""
    return f"{path.stat().st_size} {int(path.stat().st_mtime)}"


# ---------------------------------------------------------------- worker processes
def for_each(function, tasks, workers, title):
    """{name: result or exception} of function(*arguments) for each of {name: arguments}.

    Under torchrun the processes take the tasks in turn.
    """
    tasks = dict(list(tasks.items())[RANK::WORLD])
    results = run_pool(function, tasks, workers)
    hidden = None if RANK == 0 else True  # None: hidden unless on a terminal
    return gather(dict(tqdm(results, title, len(tasks), unit="file", disable=hidden)))


def gather(results):
    """{name: result} of all processes of torchrun; every process waits here for the others."""
    if WORLD == 1:
        return results
    from torch import distributed  # slow import, which only torchrun needs

    if not distributed.is_initialized():
        distributed.init_process_group("gloo", timeout=timedelta(days=10))
        atexit.register(distributed.destroy_process_group)
    parts = [None] * WORLD
    distributed.all_gather_object(parts, results)
    return {name: result for part in parts for name, result in part.items()}


def run_pool(function, tasks, workers):
    """Yield (name, result or exception) of each task.

    A worker that dies (a crash, no memory left) breaks its pool. The unfinished tasks then run one
    by one, each in a pool of its own, so that only the culprit fails.
    """
    unfinished = {}
    context = get_context("spawn")  # a forked copy of a process with OpenMP threads can hang
    pool = ProcessPoolExecutor(workers, context, start_worker, (workers,))
    try:
        futures = {pool.submit(function, *arguments): name for name, arguments in tasks.items()}
        for future in as_completed(futures):
            name, error = futures[future], future.exception()
            if isinstance(error, BrokenProcessPool) and len(tasks) > 1:
                unfinished[name] = tasks[name]
            else:
                yield name, error or future.result()
    finally:
        pool.shutdown(cancel_futures=True)
    for name, arguments in unfinished.items():
        yield from run_pool(function, {name: arguments}, 1)


def start_worker(workers):
    """A worker ignores Ctrl-C, writes no stderr (pyopenms does), and dies with its parent."""
    # pyopenms decodes one file with several threads: divide the cores among the workers.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // workers)))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


# ---------------------------------------------------------------- samples.csv and the summary
def write_samples(out_dir, table, found, failures):
    """Write samples.csv, a row per sample with status and statistics; print which files failed."""
    status = dict.fromkeys(found.index, "ok")
    for name, error in failures.items():
        reason = error if isinstance(error, InputError) else f"{name}: {type(error).__name__}: {error}"
        status[name] = f"failed: {reason}"
        print(f"left out: {reason}", file=sys.stderr)
    table["status"] = table["sample_name"].map(status).fillna("no file")
    found = found.reindex(columns=[*STATISTICS, "polarity", "start_time"]).dropna(axis=1, how="all")
    table = table.drop(columns=["path", *found], errors="ignore").join(found, on="sample_name")
    write_table(out_dir / "samples.csv", table)


def print_summary(table, found, recipe):
    """Print the size of each split, and warn of files that may spoil a training."""
    found = found.astype(dict.fromkeys(STATISTICS, float))
    samples = table.set_index("sample_name").loc[found.index]
    print(pd.crosstab(samples["split"], samples["phenotype"]).to_string())
    n_splits = samples["split"].groupby(found["digest"]).transform("nunique")
    separate = 'msconvert --filter "scanEvent 1" keeps one (Waters: function 1, no MSe and lock mass)'
    warnings = {
        "the same picture in two splits, which train.py refuses; remove one": n_splits > 1,
        "more than 1 % of the intensity is outside the axes": found["outside"] > 0.01,
        "ends before 0.5 or after 300 min; is the time unit right?": ~found["rt_last"].between(0.5, 300),
        f"several kinds of MS1 scan in one picture; {separate}": found["scan_kinds"] > 1,
    }
    for warning, is_so in warnings.items():
        if is_so.any():
            print(f"warning: {warning}: {first_few(found.index[is_so])}")
    # A cohort of one row: its range is the median.
    typical = pd.DataFrame([found[STATISTICS].median()]).assign(polarity=found["polarity"].mode())
    anomalies = found.apply(find_anomalies, axis=1, args=(typical, recipe, "other files"))
    anomalies = anomalies[anomalies != ""]
    for name, anomaly in anomalies[:5].items():
        print(f"warning: {name}: {anomaly}")
    if len(anomalies) > 5:
        print(f"warning: {len(anomalies)} files are unlike the others: {first_few(anomalies.index)}")


# ---------------------------------------------------------------- command line
def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("raw_dir", help="folder of <sample_name>.mzML, .mzXML or .CDF, also as .gz or .bz2")
    add("samples", metavar="samples.csv", help="table: sample_name, phenotype and, optionally, split")
    add("out_dir", help="folder for the pictures")
    add("--workers", type=count, default=cores(), help="number of processes")
    # A flag named like a field of Recipe is copied into it automatically.
    add = parser.add_argument_group("picture").add_argument
    add("--bins", type=count, nargs="+", default=[500], help="one number, or one for time and one for m/z")
    limits = {"type": float, "nargs": 2, "metavar": ("MIN", "MAX")}
    add("--rt-range", **limits, help="minutes (default: of all files)")
    add("--mz-range", **limits, help="m/z (default: of all files)")
    scale = "divide by a quantile, or by the highest bin of each retention time or of the file"
    add("--normalize", choices=NORMALIZE, default="quantile", help=scale)
    add("--min-intensity", type=float, default=0.0, help="drop weaker peaks")
    polarity = "keep scans of one polarity; without it a file with both is refused"
    add("--polarity", dest="only_polarity", choices=["positive", "negative"], default="", help=polarity)
    add("--sigma", type=float, default=2.0, help="width of the Gaussian filter in bins; 0: none")
    add("--colormap", default="jet", choices=list(matplotlib.colormaps), metavar="NAME", help="matplotlib's name")
    add = parser.add_argument_group("shifted copies of training pictures").add_argument
    add("--augment", type=int, default=0, metavar="N", help="copies of each picture (article: 9)")
    shift = "largest shift: one number, or time and m/z (time only: 5 0)"
    add("--max-shift", type=int, nargs="+", default=[5], metavar="PIXELS", help=shift)
    add = parser.add_argument_group("split, for tables without a split column").add_argument
    add("--test", type=float, default=0.1, help="share of all samples for the test split")
    add("--val", type=float, default=0.2, help="share of the other samples for validation")
    add("--group-by", metavar="COLUMN", help="samples that share this value stay in one split")
    add("--seed", type=int, default=2643, help="random seed of splits and shifts")
    args = parser.parse_args(argv)

    if max(len(args.bins), len(args.max_shift)) > 2:
        parser.error("--bins and --max-shift take one or two numbers")
    args.bins = (args.bins * 2)[:2]  # one number: for both axes
    args.max_shift = (args.max_shift * 2)[:2]
    for low, high in filter(None, (args.rt_range, args.mz_range)):
        if not low < high:
            parser.error(f"--rt-range and --mz-range need MIN below MAX, not {low:g} {high:g}")
    if not (0 <= args.test < 1 and 0 < args.val < 1):
        parser.error("--test and --val are shares, 0 to 1 (--test 0: no test split, for train.py --folds)")
    if not args.sigma >= 0:
        parser.error("--sigma must be at least 0")
    n_shifts = math.prod(2 * largest + 1 for largest in args.max_shift) - 1
    if not 0 <= args.augment <= n_shifts or max(args.max_shift) >= min(args.bins):
        parser.error(f"--max-shift {args.max_shift} does not allow {args.augment} different copies of {args.bins} bins")
    return args


def main():
    return convert(parse_arguments())


if __name__ == "__main__":
    run_script(main)
