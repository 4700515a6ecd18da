"""Speed and memory, as ratios measured in one run, so that they mean the same on any machine.

python tests/benchmark.py convert                # about five minutes: a run of 140 MB, converted several times
python tests/benchmark.py convert --repeats 3 --scans 600
python tests/benchmark.py views                  # about five minutes: fresh views against stored features
python tests/benchmark.py views --backbone mobileone_s3 --image-size 128
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import convert  # noqa: E402
import deeplcms  # noqa: E402

RECIPE = deeplcms.Recipe(0.0, 20.0, 100.0, 1200.0)


def seconds(function, *arguments):
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def row(what, figure, target=""):
    print(f"{what:<72} {figure:>12}  {target}", flush=True)


# ---------------------------------------------------------------- convert


def write_run(path, n_scans, n_peaks=4000):
    """A centroided run: zlib, m/z in 64 bits, intensity in 32; 2,400 scans make about 140 MB."""
    rng = np.random.default_rng(0)
    scans = (
        (0.5 * i, np.sort(rng.uniform(100, 1200, n_peaks)), rng.lognormal(8, 1.5, n_peaks)) for i in range(n_scans)
    )
    convert.write_mzml(path, scans)


def load(path):
    """What pyopenms needs to read the file, MS1 only: the yardstick of everything else."""
    import pyopenms

    options, handler, experiment = pyopenms.PeakFileOptions(), pyopenms.FileHandler(), pyopenms.MSExperiment()
    options.setMSLevels([1])
    handler.setOptions(options)
    handler.loadExperiment(str(path), experiment)
    return experiment


def article_recipe(path, png, n_bins=500):
    """The recipe as the article's text describes it: flat peak arrays, histogram2d, a figure saved at 300 dpi."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from scipy.ndimage import gaussian_filter

    rt, mz, intensity = [], [], []
    for spectrum in load(path):
        peaks = spectrum.get_peaks()
        rt.append(np.full(len(peaks[0]), spectrum.getRT() / 60))
        mz.append(peaks[0])
        intensity.append(peaks[1])
    rt, mz, intensity = map(np.concatenate, (rt, mz, intensity))
    counts, _, _ = np.histogram2d(rt, mz, n_bins, [(0, 20), (100, 1200)], weights=intensity)
    counts = gaussian_filter(counts / np.maximum(counts.max(axis=1, keepdims=True), 1e-9), 2)
    figure = Figure()
    FigureCanvasAgg(figure)
    axes = figure.add_axes([0, 0, 1, 1])
    axes.imshow(np.log1p(255 * counts / counts.max()).T, cmap="jet", origin="lower", aspect="auto")
    axes.axis("off")
    figure.savefig(png, dpi=300)


def convert_and_weigh(path, png):
    """In a worker: convert one run; returns the worker's peak memory in MB (Linux)."""
    convert.write_pictures(path, [(png, (0, 0))], RECIPE)
    return (
        int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
    )  # ru_maxrss is inherited


def seconds_with_threads(path, n):
    """Seconds of wall and of processor time of one load in a fresh process with n OpenMP threads."""
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); import benchmark; benchmark.load(sys.argv[2]); "
        "wall, cpu = time.perf_counter(), time.process_time(); benchmark.load(sys.argv[2]); "
        "print(time.perf_counter() - wall, time.process_time() - cpu)"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": str(n)}
    return tuple(map(float, subprocess.run(command, env=environment, capture_output=True, check=True).stdout.split()))


def benchmark_convert(args):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        path, png = folder / "run0.mzML", folder / "run.png"
        write_run(path, args.scans)
        print(f"{path.stat().st_size / 1e6:.0f} MB, {args.scans} scans; median of {args.repeats} repeats\n")
        article_recipe(path, png)  # imports and page cache
        convert.write_pictures(path, [(png, (0, 0))], RECIPE)

        times = {name: [] for name in ("load", "read", "bin", "filter", "write", "conversion", "article")}
        for _ in range(args.repeats):  # interleaved, so that a busy moment hits all of them
            times["load"].append(seconds(load, path))
            times["conversion"].append(seconds(convert.write_pictures, path, [(png, (0, 0))], RECIPE))
            times["article"].append(seconds(article_recipe, path, png))
            times["read"].append(seconds(lambda: list(deeplcms.read_run(path)[1])))
            times["bin"].append(seconds(deeplcms.histogram_of_run, path, RECIPE))
            counts = np.random.default_rng(0).lognormal(8, 2, RECIPE.bins)
            times["filter"].append(seconds(deeplcms.picture_of_counts, counts, RECIPE))
        cost = {name: median(values) for name, values in times.items() if values}
        cost["bin"] -= cost["read"]
        cost["write"] = max(0, cost["conversion"] - cost["read"] - cost["bin"] - cost["filter"])
        row("one conversion / pyopenms' load of the file", f"{cost['conversion'] / cost['load']:.2f}", "at most 1.35")
        row("the article's recipe / one conversion", f"{cost['article'] / cost['conversion']:.2f}", "at least 2.5")

        memory = next(convert.for_each(convert_and_weigh, {"run": (path, png)}, 1, "one worker"))[1]
        row("peak memory of one worker", f"{memory:.0f} MB", "at most 400 MB")

        n = 2 * args.repeats
        runs = [folder / f"run{i}.mzML" for i in range(n)]
        for run in runs[1:]:
            os.link(path, run)
        tasks = {run.name: (run, [(run.with_suffix(".png"), (0, 0))], RECIPE) for run in runs}
        both = seconds(lambda: list(convert.for_each(convert.write_pictures, tasks, 2, "two workers")))
        serial = sum(seconds(article_recipe, run, png) for run in runs)
        row(
            f"{n} files with two workers, start included, against the article's recipe",
            f"{serial / both:.2f}",
            "at least 3",
        )

        print("\nWhere the time of one conversion goes")
        for name, what in (
            ("read", "read: unpack, parse, decode, hand over scan by scan"),
            ("bin", "bin"),
            ("filter", "normalise, filter, colour"),
            ("write", "write the PNG"),
        ):
            row(f"  {what}", f"{1000 * cost[name]:.0f} ms", f"{cost[name] / cost['conversion']:.0%}")
        print("\nThreads of pyopenms within one file")
        for threads in (1, os.cpu_count()):
            wall, cpu = seconds_with_threads(path, threads)
            row(f"  {threads} OpenMP threads: wall, processor time / wall", f"{wall:.2f} s", f"{cpu / wall:.2f}")


# ---------------------------------------------------------------- stored features


def benchmark_views(args):
    import timm
    import torch

    import train

    root, epochs, fresh_epochs = Path(train.__file__).parent, 50, 3
    with tempfile.TemporaryDirectory() as folder:
        data, weights, runs = (Path(folder) / name for name in ("demo", "weights.pt", "runs"))
        command = [root / "convert.py", "--demo", data, "--runs", args.runs, "--augment", 9, "--bins", 128]
        subprocess.run([sys.executable, *map(str, command)], check=True, capture_output=True)
        torch.save(timm.create_model(args.backbone).state_dict(), weights)  # the same backbone for every seed
        flags = ["--backbone", args.backbone, "--data", data, "--weights", weights, "--out", runs]
        flags += ["--lr", "0.006", "--optimizer", "adamax"]
        flags += ["--image-size", args.image_size, "--finetune", "head", "--patience", epochs]

        def training(*more):
            """Seconds of one command, start included."""
            command = [sys.executable, root / "train.py", *flags, "--name", "".join(map(str, more)).strip("-"), *more]
            return seconds(lambda: subprocess.run([*map(str, command)], check=True, capture_output=True))

        settings, *_ = train.trainings_of(train.parse_arguments([*map(str, flags), "--views", "4"]))
        pictures, recipe = deeplcms.find_pictures(data, ("train", "val"))
        n_train = (pictures["split"] == "train").sum()
        n = 4 * n_train + (~pictures["copy"] & (pictures["split"] == "val")).sum()
        print(f"{args.backbone}, {args.image_size} x {args.image_size}, {n_train} training pictures\n")
        classes = train.classes_of(pictures)
        pictures["label"] = deeplcms.label_of(pictures, classes)
        extraction = seconds(train.prepare, settings, pictures, classes, recipe, {})

        model, _ = train.build_model(settings, 1)
        fast = timm.utils.reparameterize_model(model).to(memory_format=torch.channels_last).eval()
        batch = torch.rand(32, 3, model.image_size, model.image_size, device=train.DEVICE)
        batch = batch.contiguous(memory_format=torch.channels_last)

        def forward(n_batches):
            with torch.inference_mode(), train.autocast(settings):
                for _ in range(n_batches):
                    fast.features(batch).float().cpu()

        forward(1)
        bare = seconds(forward, n // 64) / (n // 64 * 32)
        row("pictures a second through the extraction, decoding and draws included", f"{n / extraction:.1f}")
        row("  / through a bare forward loop over tensors in memory", f"{n * bare / extraction:.2f}")

        fresh = training("--views", 0, "--epochs", fresh_epochs)
        [table] = runs.glob("**/epochs.csv")
        per_epoch = pd.read_csv(table)["seconds"].mean()
        fresh += (epochs - fresh_epochs) * per_epoch
        stored = training("--views", 4, "--epochs", epochs)
        what = f"{epochs} epochs of fresh views ({fresh_epochs} run, scaled) / of 4 stored, with extraction"
        row(what, f"{fresh / stored:.1f}", "at least 10")
        for what, more in (
            ("8 Optuna trials", ["--tune", 8]),
            ("5 folds x 5 repeats", ["--folds", 5, "--repeats", 5]),
        ):
            after = training("--views", 4, "--epochs", 20, *more)
            row(f"{what} of 20 epochs on stored features / one extraction", f"{after / extraction:.2f}", "below 2")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("convert", help="conversion against pyopenms' load and the article's recipe")
    command.add_argument("--repeats", type=int, default=5)
    command.add_argument("--scans", type=int, default=2400)
    command.set_defaults(function=benchmark_convert)
    command = commands.add_parser("views", help="training on stored features against fresh views")
    command.add_argument("--backbone", default="resnet18", help="timm name; its weights are random")
    command.add_argument("--image-size", type=int, default=224)
    command.add_argument("--runs", type=int, default=60, help="of the demo, each training run with 9 copies")
    command.set_defaults(function=benchmark_views)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # as in convert.py with a worker a core; for everything that is compared
    args.function(args)


if __name__ == "__main__":
    main()
