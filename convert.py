"""Turn raw LC-MS runs into pictures on shared axes, split into training, validation and test.

Article, "Creating the pseudo images" and "Image augmentation". How one run becomes one picture is in deeplcms.py.

    python convert.py raw/ samples.csv data/golestan                      # axes: the smallest box that holds every run
    python convert.py raw/ samples.csv data/golestan_1000 --bins 1000 --augment 9 --workers 8

Stopped, by Ctrl-C or worse, the same command goes on where it was. A run that cannot be read is left out, named in
OUT_DIR/samples.csv with the reason, and tried again by the next run of the command.
"""

import argparse
import math
import os
import random
import signal
import sys
import threading
import zlib
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from itertools import product
from multiprocessing import get_context, parent_process
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from PIL import Image, PngImagePlugin
from tqdm import tqdm

from deeplcms import NORMALIZE, SPLITS, STATISTICS, Help, InputError, Recipe, clean_title, colours, cores, count
from deeplcms import (
    find_raw_files,
    first_difference,
    first_few,
    make_histogram,
    normalize_name,
    make_picture,
    compute_chromatogram,
)
from deeplcms import read_header, read_json, read_table, run_script, find_anomalies, whole_file, write_json, write_table

NOT_SETTINGS = ("raw_dir", "samples", "out_dir", "workers")  # flags that change no picture
# Titles that the tables of pictures use.
RESERVED = set("path copy label chromatogram digest status rt_shift".split())


# ---------------------------------------------------------------- the cohort and its splits
def read_samples(args):
    """The table of samples, with the columns group, path (of the raw run, nan without one) and split."""
    table, runs = read_table(args.samples, skip_blank_lines=False), find_raw_files(args.raw_dir)
    table = table[table.map(str.strip).any(axis=1)]  # without blank rows; the index still counts them
    group_by = clean_title(args.group_by or "sample_name")
    no_name = r"^$|^\s|\s$|^\.|/"  # of a file or a folder
    patterns = {group_by: r"^\s*$", "sample_name": no_name, "phenotype": no_name}
    for column, pattern in patterns.items():
        if column not in table:
            raise InputError(f"{args.samples}: needs a column '{column}' (found: {', '.join(table)})")
        bad = table[column].str.contains(pattern)
        if bad.any():
            row = bad.idxmax()
            raise InputError(f"{args.samples}, row {row + 2}: {column} {table[column][row]!r} cannot be used")
    names = table["sample_name"]
    without = names.str.replace(r"(?i)\.(mzml|mzxml|raw|d|wiff)(\.gz|\.bz2)?$", "", regex=True)
    names = names.where(names.isin(runs), without)  # a table may name the files, with their extension
    if names.duplicated().any():
        raise InputError(f"{args.samples}: named more than once: {first_few(names[names.duplicated()])}")
    if table["phenotype"].nunique() > table["phenotype"].map(normalize_name).nunique():
        raise InputError(f"{args.samples}: one phenotype in two spellings: {first_few(set(table['phenotype']))}")

    if "status" in table and table["status"].str.fullmatch("ok|no file|failed: .*").all():
        table = table.drop(columns="status")  # convert.py wrote this column itself
    if taken := RESERVED & set(table):
        raise InputError(f"{args.samples}: its column {first_few(taken)} would be lost: rename it")
    table = table.assign(sample_name=names, path=names.map(runs))
    if not table.get("group", table[group_by]).equals(table[group_by]):
        raise InputError(f"{args.samples}: its column 'group' would be lost: rename it, or pass --group-by group")
    table["group"] = table[group_by]
    present = table.dropna(subset="path")
    absent, unknown = set(names) - set(runs), set(runs) - set(names)
    print(f"{len(present)} of the {len(table)} samples have a file in {args.raw_dir}", end="")
    print(f"; without one: {first_few(absent)}" if absent else "", end="")
    print(f"; without a sample: {first_few(unknown)}" if unknown else "")
    of_another_lab = set(present.get("split", [])) == {"test"}
    if present["phenotype"].nunique() < (1 if of_another_lab else 2):
        raise InputError(f"{args.samples}: a classifier needs runs of two phenotypes; do the names match the files?")
    if "split" not in table:
        table["split"] = assign_splits(present, args.test, args.val, args.seed)
    check_splits(table.loc[present.index])
    return table


def apportion(sizes, fraction):
    """How many of each phenotype make ceil(fraction * all), by largest remainder: Series like sizes."""
    n = math.ceil(fraction * sizes.sum() - 1e-9)
    exact = n * sizes / max(sizes.sum(), 1)
    counts = exact.astype(int)
    counts[(exact - counts).nlargest(n - counts.sum()).index] += 1
    return counts


def assign_splits(table, test, val, seed):
    """Split of each row: the test portion first, then the validation portion of the rest, stratified by phenotype.

    218 + 80 rows at 0.1 and 0.2 give 214 / 54 / 30. Rows of one group go together: the largest group first, to the
    split that is shortest of its phenotypes.
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
        home = (missing / wanted.clip(lower=1) * phenotypes).sum(axis=1).idxmax()
        split[rows] = home
        missing.loc[home] -= phenotypes
    return split


def check_splits(table):
    """Refuse splits that are misspelled, tear a group apart, or leave a phenotype out.

    There may be no test split. There may be nothing else: another laboratory's cohort, for evaluate.py --data.
    """
    if wrong := set(table["split"]) - set(SPLITS):
        raise InputError(f"the split column holds {first_few(wrong)}; use train, val or test")
    splits = table.groupby("group")["split"].nunique()
    if splits.max() > 1:
        raise InputError(f"these groups lie in more than one split: {first_few(splits.index[splits > 1])}")
    counts = pd.crosstab(table["split"], table["phenotype"])
    if list(counts.index) == ["test"]:
        return
    counts = counts.reindex([split for split in SPLITS if split != "test" or split in counts.index], fill_value=0)
    if counts.min(axis=None) == 0:
        split, phenotype = counts.stack().idxmin()
        raise InputError(f"the {split} split has no run of {phenotype}: change --test or --val, or give a split column")


# ---------------------------------------------------------------- the PNGs of one run
def shift_picture(picture, rt_shift, mz_shift):
    """Copy of a picture moved by whole pixels (right, up); what it uncovers is 0, nothing wraps around."""
    return np.asarray(Image.fromarray(picture).rotate(0, translate=(rt_shift, -mz_shift)))


def draw_shifts(sample_name, n, max_shift, seed):
    """n different (rt, mz) shifts in whole pixels, never (0, 0); the draw depends on nothing but seed and name."""
    shifts = list(product(*(range(-most, most + 1) for most in max_shift)))
    shifts.remove((0, 0))
    rng = np.random.default_rng([seed, zlib.crc32(sample_name.encode())])
    return [shifts[i] for i in rng.choice(len(shifts), n, replace=False)]


def png_paths(out_dir, row, args):
    """[(path, (rt shift, mz shift))] of a sample's copies (training only) and, last, of its picture."""
    folder, name = out_dir / row.split / row.phenotype, row.sample_name
    shifts = draw_shifts(name, args.augment, args.max_shift, args.seed) if row.split == "train" else []
    copies = [(folder / f"{name}_rt{rt:+d}_mz{mz:+d}.png", (rt, mz)) for rt, mz in shifts]
    return [*copies, (folder / f"{name}.png", (0, 0))]


def write_pictures(path, pngs, recipe):
    """Write the picture of one run and its shifted copies (see png_paths); returns the statistics of the run."""
    picture, statistics = make_picture(path, recipe)
    palette = colours(np.arange(256), recipe.colormap).tobytes()
    text = recipe.to_text() | {
        "source": path.name,
        "source_state": read_file_state(path),
        "sample_name": pngs[-1][0].stem,
    }
    text |= statistics
    for png, (rt, mz) in pngs:
        copy = shift_picture(picture, rt, mz)
        text["shift"] = f"{rt} {mz}"
        text["digest"] = f"{zlib.crc32(copy):08x}"
        text["chromatogram"] = " ".join(f"{value:.4f}" for value in compute_chromatogram(copy))
        chunks = PngImagePlugin.PngInfo()
        for name, value in text.items():
            chunks.add_text(name, str(value))
        image = Image.fromarray(copy)
        image.putpalette(palette)  # so the indices are kept, and every viewer shows the colours
        with whole_file(png) as temporary:
            image.save(temporary, pnginfo=chunks, compress_level=1)
    return statistics


def read_file_state(path):
    """Size and time of a raw run's file: exported again under its name, it is another one."""
    return f"{path.stat().st_size} {int(path.stat().st_mtime)}"


def read_statistics(path, min_intensity, polarity=""):
    """Statistics of a run, its extent among them: for them it does not matter where the bins lie."""
    return make_histogram(path, Recipe(0, 1, 0, 1, (1, 1), min_intensity=min_intensity, only_polarity=polarity))[1]


# ---------------------------------------------------------------- worker processes
def start_worker(workers):
    """A worker leaves Ctrl-C to its parent, is silent (pyopenms prints once more when it ends), and ends with it."""
    # pyopenms decodes one file with several threads: share the cores out, so that the workers do not fight.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // workers)))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


def for_each(function, tasks, workers, title):
    """Yield (name, result or exception) of function(*arguments) for each {name: arguments}, in worker processes.

    A worker that dies (a reader that crashes, no memory left) takes the pool with it: what was unfinished is then done
    one by one, which names the culprit.
    """
    context = get_context("spawn")  # a forked copy of a process with OpenMP threads can hang
    rounds = [tasks]  # and one for each that was unfinished
    with tqdm(total=len(tasks), desc=title, unit="run", disable=None) as bar:
        for unfinished in rounds:
            pool = ProcessPoolExecutor(workers, context, start_worker, (workers,))
            try:
                futures = {pool.submit(function, *arguments): name for name, arguments in unfinished.items()}
                for future in as_completed(futures):
                    name, error = futures[future], future.exception()
                    if isinstance(error, BrokenProcessPool) and len(unfinished) > 1:
                        rounds.append({name: tasks[name]})
                    else:
                        bar.update()
                        yield name, error or future.result()
            finally:
                pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------- a whole data set
def find_axes(out_dir, settings, runs, args):
    """The axes (as before, as given, or else around every run), and {name: exception} of those that cannot be read."""
    if (out_dir / "settings.json").exists():
        before = read_json(out_dir / "settings.json")
        if differing := first_difference(before, settings):
            what = "other samples or splits" if differing[0] == "samples" else "{} {}, not {}".format(*differing)
            raise InputError(f"{out_dir} was converted with {what}: use another OUT_DIR, or delete this one")
        return before["axes"], {}
    if any(out_dir.glob("*/*/*.png")):
        raise InputError(f"{out_dir} already holds pictures that convert.py did not make: use another OUT_DIR")
    if args.rt_range and args.mz_range:
        return [*args.rt_range, *args.mz_range], {}
    tasks = {name: (path, args.min_intensity, args.only_polarity) for name, path in runs.items()}
    found, failures = {}, {}
    for name, result in for_each(read_statistics, tasks, args.workers, "finding axes"):
        (failures if isinstance(result, Exception) else found)[name] = result
    if not found:
        raise InputError(f"none of the {len(runs)} runs could be read; the first: {next(iter(failures.values()))}")
    found = pd.DataFrame.from_dict(found, orient="index")
    axes = []
    for given, first, last in ((args.rt_range, "rt_first", "rt_last"), (args.mz_range, "mz_low", "mz_high")):
        low, high = given or (float(found[first].min()), float(found[last].max()))
        if low == high:  # one scan or one m/z: as numpy.histogram2d does
            low, high = low - 0.5, high + 0.5
        axes += [low, high]
        ends = found[[first, last]]  # (run, 2)
        if not given and (ends[last] - ends[first] < (high - low) / 2).mean() > 0.5:
            away = (ends - ends.median()).abs().max(axis=1)
            far = first_few(away.index[away >= away.max() / 2])
            print(f"warning: most runs cover less than half of {first} to {last}; those that stretch it: {far}")
    print("axes: {:.2f} to {:.2f} min, m/z {:.2f} to {:.2f}".format(*axes))
    return axes, failures


def convert(args):
    """Convert the runs of args.raw_dir listed in args.samples into args.out_dir; returns the exit status."""
    out_dir, table = Path(args.out_dir), read_samples(args)
    present = table.dropna(subset="path").set_index("sample_name", drop=False)
    folders = present["split"] + "/" + present["phenotype"]
    settings = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    settings["samples"] = folders.to_dict()
    axes, failures = find_axes(out_dir, settings, present["path"].to_dict(), args)
    of_picture = {name: value for name, value in settings.items() if name in Recipe.__annotations__}
    recipe = Recipe(*axes, **of_picture | {"bins": tuple(args.bins)})
    for leftover in out_dir.glob("*/*/.*.tmp.png"):  # of a command that was killed
        leftover.unlink()

    statistics, tasks = {}, {}
    for row in present.itertuples():
        pngs = png_paths(out_dir, row, args)
        pngs[0][0].parent.mkdir(parents=True, exist_ok=True)
        if all(png.exists() for png, _ in pngs):
            header, _ = read_header(pngs[-1][0])
            if header.get("source_state") == read_file_state(row.path):
                statistics[row.sample_name] = header
                continue
        if row.sample_name not in failures:
            tasks[row.sample_name] = (row.path, pngs, recipe)
    write_json(out_dir / "settings.json", settings | {"axes": axes})
    if statistics:
        print(f"{len(statistics)} of {len(present)} runs are already converted in {out_dir}; its axes stay as they are")
    for name, result in for_each(write_pictures, tasks, args.workers, "converting"):
        (failures if isinstance(result, Exception) else statistics)[name] = result
    if not statistics:
        (out_dir / "settings.json").unlink()  # they were wrong: the next command need not keep to them
        raise InputError(f"no run became a picture; the first: {next(iter(failures.values()))}")
    write_summary(out_dir, table, recipe, statistics, failures)
    return 1 if failures else 0


def write_summary(out_dir, table, recipe, statistics, failures):
    """Write samples.csv, one line a row of the sample table, and print the summary."""
    status = dict.fromkeys(statistics, "ok")
    for name, error in failures.items():
        reason = error if isinstance(error, InputError) else f"{name}: {type(error).__name__}: {error}"
        status[name] = f"failed: {reason}"
        print(f"left out: {reason}", file=sys.stderr)
    table["status"] = table["sample_name"].map(status).fillna("no file")
    found = pd.DataFrame.from_dict(statistics, orient="index")
    found = found.reindex(columns=[*STATISTICS, "polarity", "start_time"]).dropna(axis=1, how="all")
    table = table.drop(columns=["path", *found], errors="ignore").join(found, on="sample_name")
    write_table(out_dir / "samples.csv", table)

    print(f"{len(statistics)} of {len(status)} runs in {out_dir}: {recipe}")
    done = table[table["status"] == "ok"]
    print(pd.crosstab(done["split"], done["phenotype"]).to_string())
    numbers = done[["outside", "rt_last", "scan_kinds"]].astype(float)
    separate = 'msconvert --filter "scanEvent 1" keeps one kind (Waters: function 1, without MSe and lock mass)'
    warnings = {
        "more than 1 % of the intensity is outside the axes": numbers["outside"] > 0.01,
        "ends within half a minute, or after 300; is the unit of time right?": ~numbers["rt_last"].between(0.5, 300),
        f"several kinds of MS1 scan lie in one picture; {separate}": numbers["scan_kinds"] > 1,
    }
    for warning, is_so in warnings.items():
        if is_so.any():
            print(f"warning: {warning}: {first_few(done['sample_name'][is_so])}")
    found = found.astype(dict.fromkeys(STATISTICS, float))
    typical = found[STATISTICS].median().to_frame().T.assign(polarity=found["polarity"].mode())
    unlike = {name: find_anomalies(row, typical, recipe, "other runs") for name, row in found.iterrows()}
    unlike = {name: text for name, text in unlike.items() if text}
    for name in list(unlike)[:5]:
        print(f"warning: {name}: {unlike[name]}")
    if len(unlike) > 5:
        print(f"warning: {len(unlike)} runs are unlike the others: {first_few(unlike)}")


# ---------------------------------------------------------------- command line
def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("raw_dir", help="folder of <sample_name>.mzML or .mzXML, packed (.gz, .bz2) or not")
    add("samples", metavar="samples.csv", help="table with sample_name, phenotype and, if you like, split")
    add("out_dir", help="folder for the pictures")
    add("--workers", type=count, default=cores(), help="processes, each with one file at a time")
    # A flag that is a setting of the picture has the name of its field in Recipe, and goes there by itself.
    add = parser.add_argument_group("picture").add_argument
    add("--bins", type=count, nargs="+", default=[500], help="one number for both axes, or time and m/z")
    add("--rt-range", type=float, nargs=2, metavar=("MIN", "MAX"), help="minutes (default: holds every run)")
    add("--mz-range", type=float, nargs=2, metavar=("MIN", "MAX"), help="m/z (default: holds every run)")
    scale = "divide by a quantile of the run's bins, by the highest bin of each retention time, or by that of the run"
    add("--normalize", choices=NORMALIZE, default="quantile", help=scale)
    add("--min-intensity", type=float, default=0.0, help="leave weaker peaks out")
    polarity = "leave the scans of the other polarity out; without this a run of both is refused"
    add("--polarity", dest="only_polarity", choices=["positive", "negative"], default="", help=polarity)
    add("--sigma", type=float, default=2.0, help="of the Gaussian filter, in bins; 0: none")
    add("--colormap", default="jet", choices=list(matplotlib.colormaps), metavar="NAME", help="of matplotlib")
    add = parser.add_argument_group("shifted copies of training pictures").add_argument
    add("--augment", type=int, default=0, metavar="N", help="copies of each training picture (article: 9)")
    shift = "largest shift, one number for both axes, or time and m/z (instruments drift in time: 5 0)"
    add("--max-shift", type=int, nargs="+", default=[5], metavar="PIXELS", help=shift)
    add = parser.add_argument_group("split, for tables without a split column").add_argument
    add("--test", type=float, default=0.1, help="share of all runs for the test split")
    add("--val", type=float, default=0.2, help="share of the other runs for validation")
    add("--group-by", metavar="COLUMN", help="rows that share this column's value stay in one split")
    add("--seed", type=int, default=2643, help="of splits and shifts")
    args = parser.parse_args(argv)

    if max(len(args.bins), len(args.max_shift)) > 2:
        parser.error("--bins and --max-shift take one or two numbers")
    args.bins, args.max_shift = (args.bins * 2)[:2], (args.max_shift * 2)[:2]  # one number: of both axes
    for low, high in filter(None, (args.rt_range, args.mz_range)):
        if not low < high:
            parser.error(f"--rt-range and --mz-range need MIN below MAX, not {low:g} {high:g}")
    if not (0 <= args.test < 1 and 0 < args.val < 1):
        parser.error("--test and --val are shares between 0 and 1 (--test 0: no test split, for train.py --folds)")
    if not args.sigma >= 0:
        parser.error("--sigma is 0 or more")
    n_shifts = math.prod(2 * most + 1 for most in args.max_shift) - 1
    if not 0 <= args.augment <= n_shifts or max(args.max_shift) >= min(args.bins):
        parser.error(f"--max-shift {args.max_shift} does not allow {args.augment} different copies of {args.bins} bins")
    return args


def main():
    return convert(parse_arguments())


if __name__ == "__main__":
    run_script(main)
