"""Measure speed and memory. Most figures are ratios within one call, so machines can be compared.

python tests/benchmark.py convert    # five minutes: convert a raw file of 140 MB several times
python tests/benchmark.py views      # five minutes: fresh views and cached features
python tests/benchmark.py views --backbone mobileone_s3 --image-size 128
python tests/benchmark.py processes  # five minutes: one process and two processes of torchrun
python tests/benchmark.py lightning  # on a GPU: an epoch of train.py and of a minimal Lightning module
python tests/benchmark.py pictures   # five minutes: time and memory per picture
python tests/benchmark.py pictures --before ../older-checkout  # seven minutes: also ratios to that code
"""

import argparse
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import pandas as pd
from PIL import Image, PngImagePlugin

ROOT = Path(os.environ.get("CHECKOUT", Path(__file__).resolve().parents[1]))  # the measured code, see `answer`
sys.path.insert(0, str(ROOT))
import convert  # noqa: E402
import deeplcms  # noqa: E402

RECIPE = deeplcms.Recipe(0.0, 20.0, 100.0, 1200.0)


def seconds(function, *arguments, clock=time.perf_counter):
    start = clock()
    function(*arguments)
    return clock() - start


def peak_memory():
    """Peak memory of this process in MB (Linux only; ru_maxrss would be inherited)."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def script(*command):
    """Run a script of the project as a user does; returns the last printed line."""
    done = subprocess.run([sys.executable, ROOT / command[0], *map(str, command[1:])], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout.strip().rpartition("\n")[2]


def row(title, figure, target=""):
    print(f"{title:<80} {figure:>12}  {target}", flush=True)


# ---------------------------------------------------------------- convert


def write_raw_file(path, n_scans, n_peaks=4000):
    """Write a centroided mzML file: zlib, 64-bit m/z, 32-bit intensity; 2,400 scans are about 140 MB."""
    from demo import write_mzml  # not at the top, as it imports the present code

    rng = np.random.default_rng(0)
    masses = (np.sort(rng.uniform(100, 1200, n_peaks)) for _ in range(n_scans))
    write_mzml(path, ((0.5 * i, mz, rng.lognormal(8, 1.5, n_peaks)) for i, mz in enumerate(masses)))


def load(path):
    """Load the MS1 scans of a file with pyopenms: the reference for all other times."""
    import pyopenms

    options, handler, experiment = pyopenms.PeakFileOptions(), pyopenms.FileHandler(), pyopenms.MSExperiment()
    options.setMSLevels([1])
    handler.setOptions(options)
    handler.loadExperiment(str(path), experiment)
    return experiment


def article_recipe(path, png, n_bins=500):
    """Make a picture as the article's text describes it: flat arrays, histogram2d, a figure at 300 dpi."""
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


def convert_and_measure_memory(path, png):
    """Convert one file in a worker process; returns the peak memory of the worker."""
    convert.write_pictures(path, [(png, (0, 0))], RECIPE)
    return peak_memory()


def benchmark_convert(args):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        path, png = folder / "run0.mzML", folder / "run.png"
        write_raw_file(path, args.scans)
        print(f"{path.stat().st_size / 1e6:.0f} MB, {args.scans} scans; median of {args.repeats} repeats\n")
        article_recipe(path, png)  # warm up imports and the page cache
        convert.write_pictures(path, [(png, (0, 0))], RECIPE)

        times = {name: [] for name in ("load", "conversion", "article")}
        for _ in range(args.repeats):  # interleaved, so that a busy moment affects all of them
            times["load"].append(seconds(load, path))
            times["conversion"].append(seconds(convert.write_pictures, path, [(png, (0, 0))], RECIPE))
            times["article"].append(seconds(article_recipe, path, png))
        cost = {name: median(values) for name, values in times.items()}
        row(
            "one conversion / loading the file with pyopenms",
            f"{cost['conversion'] / cost['load']:.2f}",
            "at most 1.35",
        )
        row("the article's recipe / one conversion", f"{cost['article'] / cost['conversion']:.2f}", "at least 2.5")

        memory = convert.for_each(convert_and_measure_memory, {"run": (path, png)}, 1, "one worker")["run"]
        row("peak memory of one worker", f"{memory:.0f} MB", "at most 400 MB")

        n = 2 * args.repeats
        runs = [folder / f"run{i}.mzML" for i in range(n)]
        for run in runs[1:]:
            os.link(path, run)
        tasks = {run.name: (run, [(run.with_suffix(".png"), (0, 0))], RECIPE) for run in runs}
        both = seconds(lambda: convert.for_each(convert.write_pictures, tasks, 2, "two workers"))
        serial = sum(seconds(article_recipe, run, png) for run in runs)
        title = f"the article's recipe / conversion by two workers with their start, {n} files"
        row(title, f"{serial / both:.2f}", "at least 3")


# ---------------------------------------------------------------- cached features


def benchmark_views(args):
    import timm
    import torch

    import train

    epochs, fresh_epochs = 50, 3
    with tempfile.TemporaryDirectory() as folder:
        data, weights, runs = (Path(folder) / name for name in ("demo", "weights.pt", "runs"))
        script("tests/demo.py", data, "--runs", args.runs, "--augment", 9, "--bins", 128)
        torch.save(timm.create_model(args.backbone).state_dict(), weights)  # all seeds have the same backbone
        flags = ["--backbone", args.backbone, "--data", data, "--weights", weights, "--out", runs]
        flags += ["--lr", "0.006", "--optimizer", "adamax"]
        flags += ["--image-size", args.image_size, "--finetune", "head", "--patience", epochs]

        def training(*more):
            """Seconds of one command with its start."""
            return seconds(script, "train.py", *flags, "--name", "".join(map(str, more)).strip("-"), *more)

        [settings] = train.expand_trainings(train.parse_arguments([*map(str, flags), "--views", "4"]))
        pictures, recipe = deeplcms.find_pictures(data, ("train", "val"))
        n_train = (pictures["split"] == "train").sum()
        n = 4 * n_train + (~pictures["copy"] & (pictures["split"] == "val")).sum()
        print(f"{args.backbone}, {args.image_size} x {args.image_size}, {n_train} training pictures\n")
        classes = train.find_classes(pictures)
        pictures["label"] = deeplcms.make_labels(pictures, classes)
        model, settings, _ = train.resolve_settings(settings, pictures, recipe)
        extraction = seconds(train.cache_features, model, pictures, recipe, settings)
        fast = timm.utils.reparameterize_model(model).to(memory_format=torch.channels_last).eval()
        batch = torch.rand(32, 3, model.image_size, model.image_size, device=train.DEVICE)
        batch = batch.contiguous(memory_format=torch.channels_last)

        def forward(n_batches):
            with torch.inference_mode(), train.autocast(settings):
                for _ in range(n_batches):
                    fast.features(batch).float().cpu()

        forward(1)
        bare = seconds(forward, n // 64) / (n // 64 * 32)
        row("pictures per second: extraction with decoding and augmentation", f"{n / extraction:.1f}")
        row("  / pictures per second: forward passes over tensors in memory", f"{n * bare / extraction:.2f}")

        fresh = training("--views", 0, "--epochs", fresh_epochs)
        [table] = runs.glob("**/epochs.csv")
        per_epoch = pd.read_csv(table)["seconds"].mean()
        fresh += (epochs - fresh_epochs) * per_epoch
        cached = training("--views", 4, "--epochs", epochs)
        title = f"{epochs} epochs of fresh views ({fresh_epochs} measured) / of 4 cached views with extraction"
        row(title, f"{fresh / cached:.1f}", "at least 10")
        for title, more in (
            ("8 Optuna trials", ["--tune", 8]),
            ("5 folds x 5 repeats", ["--folds", 5, "--repeats", 5]),
        ):
            total = training("--views", 4, "--epochs", 20, *more)
            row(f"{title} of 20 epochs on cached features / one extraction", f"{total / extraction:.2f}", "below 2")


# ---------------------------------------------------------------- one process against two of torchrun
def benchmark_processes(args):
    """Seconds per additional raw file and per additional view, without the start of commands."""
    launchers = {1: [sys.executable], 2: [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        raw = folder / "raw"
        raw.mkdir()
        write_raw_file(raw / "run0.mzML", args.scans)
        names = [f"run{i}" for i in range(12)]
        for name in names[1:]:
            os.link(raw / "run0.mzML", raw / f"{name}.mzML")
        samples = pd.DataFrame({"sample_name": names, "phenotype": ["a", "b"] * 6, "split": "test"})
        script("tests/demo.py", folder / "demo", "--runs", args.runs)
        flags = ["--backbone", args.backbone, "--weights", "random", "--finetune", "head", "--out", folder / "runs"]
        flags += ["--data", folder / "demo", "--workers", 0]

        def slope(n, few, many):
            """Difference in seconds between two commands, each the lowest of the repeats."""
            lowest = []
            for command in (few, many):
                words = list(map(str, [*launchers[n], ROOT / command[0], *command[1:]]))
                times = []
                for repeat in range(args.repeats):
                    out = ["--name", f"{n}-{repeat}"] if command[0] == "train.py" else []
                    work = [word.replace("OUT", f"{folder}/out{n}{len(lowest)}{repeat}") for word in words]
                    done = {"check": True, "capture_output": True}
                    times.append(seconds(lambda: subprocess.run([*work, *out], **done)))  # noqa: B023
                lowest.append(min(times))
                shutil.rmtree(folder / "runs", ignore_errors=True)
            return lowest[1] - lowest[0]

        tables = []
        for count in (2, 12):
            tables.append(folder / f"{count}.csv")
            samples[:count].to_csv(tables[-1], index=False)
        commands = [["convert.py", raw, table, "OUT", "--workers", 1] for table in tables]
        conversion = {n: slope(n, *commands) for n in launchers}
        row(f"seconds per raw file of {(raw / 'run0.mzML').stat().st_size / 1e6:.0f} MB", f"{conversion[1] / 10:.2f}")
        row("  one process / two", f"{conversion[1] / conversion[2]:.2f}", "at least 1.7")
        commands = [["train.py", *flags, "--views", views] for views in (1, 9)]
        extraction = {n: slope(n, *commands) for n in launchers}
        n_pictures = len(deeplcms.find_pictures(folder / "demo", ("train", "val"))[0])
        title = f"milliseconds per view through {args.backbone}, with logistic regression"
        row(title, f"{1000 * extraction[1] / (8 * n_pictures):.1f}")
        row("  one process / two", f"{extraction[1] / extraction[2]:.2f}", "at least 1.7")


# ---------------------------------------------------------------- the loop and a minimal Lightning module
def benchmark_lightning(args):
    """Seconds of the fastest epoch after the first: train.py's loop with averaged weights, and Lightning's."""
    import lightning
    import timm
    import torch

    import train

    class Plain(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = timm.create_model(args.backbone, num_classes=1)
            if args.finetune == "head":
                self.network.requires_grad_(False)
                self.network.get_classifier().requires_grad_(True)
            self.began, self.times = 0, []

        def training_step(self, batch, _):
            x, y = batch
            return train.compute_loss(self.network(x), y)

        def validation_step(self, batch, _):
            x, y = batch
            self.log("val_loss", train.compute_loss(self.network(x), y))

        def configure_optimizers(self):
            return torch.optim.Adamax(filter(lambda p: p.requires_grad, self.parameters()), lr=0.001)

        def on_train_epoch_start(self):
            self.began = time.perf_counter()

        def on_train_epoch_end(self):
            self.times.append(time.perf_counter() - self.began)

    with tempfile.TemporaryDirectory() as folder:
        data, runs = Path(folder, "demo"), Path(folder, "runs")
        script("tests/demo.py", data, "--runs", args.runs)
        flags = ["--backbone", args.backbone, "--weights", "random", "--finetune", args.finetune, "--data", data]
        flags += ["--optimizer", "adamax", "--views", 0, "--lr", 0.001, "--augmentation", "none", "--batch-size", 32]
        flags += ["--epochs", args.epochs, "--image-size", args.image_size, "--workers", args.workers, "--out", runs]
        script("train.py", *flags)
        [history] = runs.glob("**/epochs.csv")
        loop_seconds = pd.read_csv(history)["seconds"][1:].min()
        model = train.Classifier(args.backbone, 1, image_size=args.image_size, finetune=args.finetune)
        pictures, recipe = deeplcms.find_pictures(data, ("train", "val"))
        pictures["label"] = deeplcms.make_labels(pictures, train.find_classes(pictures))
        loaders = []
        for split in ("train", "val"):
            table = pictures[pictures["split"] == split]
            dataset = train.Pictures(table, train.to_input(model, recipe))
            options = {"num_workers": args.workers, "shuffle": split == "train"}
            loaders.append(torch.utils.data.DataLoader(dataset, 32, **options))
        plain = Plain()
        quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
        precision = "16-mixed" if train.CUDA else "bf16-mixed" if train.FAST_BFLOAT16 else "32"
        lightning.Trainer(max_epochs=args.epochs, precision=precision, **quiet).fit(plain, *loaders)
        title = f"seconds per epoch of {args.backbone} ({args.finetune}), {args.image_size} pixels, {train.DEVICE}"
        row(title, f"{loop_seconds:.2f}")
        row("  a minimal Lightning module / train.py", f"{min(plain.times[1:]) / loop_seconds:.2f}")


# ---------------------------------------------------------------- time and memory per picture
def answer(args):
    """Print the processor seconds of each task read from stdin. Runs in its own process with the code of CHECKOUT.

    It uses only functions whose names are old, so it also works with older checkouts.
    """
    import torch

    import train

    torch.set_num_threads(1)
    folder, recipe = Path(args.arguments[0]), deeplcms.Recipe(0.0, 10.0, 100.0, 900.0)
    pngs = [(folder / f"{i}.png", (i, 0)) for i in range(9, -1, -1)]
    (folder / "test" / "a").mkdir(parents=True)
    convert.write_pictures(folder.with_name("demo.mzML"), pngs, recipe)
    image = Image.open(pngs[-1][0])
    samples = [f"{i},a,test,{i},ok" for i in range(10_000)]
    (folder / "samples.csv").write_text("\n".join(["sample_name,phenotype,split,group,status", *samples]))
    for i in range(len(samples)):
        text = PngImagePlugin.PngInfo()
        for name, value in (image.info | {"sample_name": f"{i}"}).items():
            text.add_text(name, value)
        image.save(folder / "test" / "a" / f"{i}.png", pnginfo=text, compress_level=1)
    network = SimpleNamespace(image_size=224, mean=(0.5,) * 3, std=(0.5,) * 3)
    settings = train.parse_arguments(["--backbone", "pixels", "--data", str(folder), "--augmentation", "physical"])
    settings = train.fill_augmentation(settings)
    table = pd.DataFrame({"path": [png for png, _ in pngs] * 5, "label": 0})
    pictures = train.Pictures(table, train.training_transform(network, recipe, settings))
    copies = [(png.with_suffix(".copy.png"), shift) for png, shift in pngs]
    tasks = {
        "draw": lambda: [pictures[i] for i in range(len(table))],
        "find": lambda: deeplcms.find_pictures(folder, ("test",)),
        "small": lambda: convert.write_pictures(folder.with_name("small.mzML"), copies, RECIPE),
        "large": lambda: convert.write_pictures(folder.with_name("large.mzML"), copies, RECIPE),
    }
    for line in sys.stdin:
        print(seconds(tasks[line.strip()], clock=time.process_time), flush=True)


def benchmark_times(folder, before):
    """Print the lowest processor time of several rounds, on one thread, and ratios to the older checkout."""
    from demo import write_demo_file

    write_demo_file(folder / "demo.mzML", 1, 0)
    write_raw_file(folder / "small.mzML", 1280, 190)  # like the faahKO files
    write_raw_file(folder / "large.mzML", 2400)
    servers = []
    for name, checkout in (("now", ROOT), ("before", before)):
        if checkout:
            command = [sys.executable, __file__, "answer", folder / name]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            servers.append(subprocess.Popen(command, env=os.environ | {"CHECKOUT": str(checkout)}, **pipes))
    for task, n_items, rounds, title, target in (
        ("draw", 50, 9, "a training picture of 500 bins, read and augmented", "at most 0.33"),
        ("small", 1, 9, "a file of 5 MB and nine shifted copies", "at most 0.50"),
        ("large", 1, 5, "a file of 140 MB and nine shifted copies", ""),
        ("find", 10_000, 1, "find_pictures on 10,000 pictures, per picture", "at most 0.033"),
    ):
        best = [np.inf] * len(servers)
        for _ in range(rounds):
            for i, server in enumerate(servers):
                print(task, file=server.stdin, flush=True)
                best[i] = min(best[i], 1000 * float(server.stdout.readline()) / n_items)
        row(f"{title}: {' / '.join(map('{:.3g}'.format, best))} ms", f"{best[0] / best[-1]:.3f}", target)
    for server in servers:
        server.communicate()


def weigh(args):
    """Run a script in its own process, then print its peak memory as the last line."""
    sys.argv = [str(ROOT / args.arguments[0]), *args.arguments[1:]]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        print(peak_memory())


def benchmark_memory(folder):
    """Print peak memory of explain.py and evaluate.py, and the increase per picture or raw file."""
    data = folder / "demo"
    script("tests/demo.py", data, "--runs", 40, "--bins", 500)
    rt_min, rt_max, mz_min, mz_max = deeplcms.read_json(data / "settings.json")["axes"]
    axes = ["--rt-range", rt_min, rt_max, "--mz-range", mz_min, mz_max]
    originals = list(deeplcms.find_pictures(data, ("test",))[0].itertuples())
    for n in (200, 400, 600, 1200):  # the same files under other names
        raw = folder / f"{n}"
        raw.mkdir()
        samples = ["sample_name,phenotype,split"]
        for i in range(n):
            original = originals[i % len(originals)]
            samples.append(f"{i},{original.phenotype},test")
            (raw / f"{i}.mzML").hardlink_to(data / "raw" / f"{original.sample_name}.mzML")
        (folder / "samples.csv").write_text("\n".join(samples))
        script("convert.py", raw, folder / "samples.csv", folder / f"{n}-pictures", "--bins", 500, *axes)
    for backbone, more in (("pixels", []), ("test_resnet", ["--weights", "random", "--finetune", "head"])):
        where = ["--data", data, "--out", folder, "--name", "runs"]
        script("train.py", "--backbone", backbone, "--views", 1, *where, *more)
        run = folder / "runs" / backbone / "seed2643"
        explain = ["explain.py", run, "--features", data / "features.csv", "--split", "test", "--data"]
        evaluate, predict = (["evaluate.py", run, flag] for flag in ("--data", "--predict"))
        for sizes, command in (((600, 1200), explain), ((200, 400), evaluate), ((200, 400), predict)):
            kind = "" if command == predict else "-pictures"
            few, many = (float(script(__file__, "weigh", *command, folder / f"{n}{kind}")) for n in sizes)
            slope = (many - few) / (sizes[1] - sizes[0])
            title = f"{command[0]} {command[-1]} {backbone}, {sizes[0]} and {sizes[1]}: {few:.0f} and {many:.0f} MB"
            row(f"{title}; per item", f"{slope:.2f} MB", "at most 1 MB")
            row("  extrapolated to 10,000", f"{(many + slope * (10_000 - sizes[1])) / 1024:.1f} GB", "at most 16 GB")


def benchmark_pictures(args):
    with tempfile.TemporaryDirectory() as folder:
        benchmark_times(Path(folder), args.before)
        benchmark_memory(Path(folder))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("convert", help="conversion, compared with pyopenms and the article's recipe")
    command.add_argument("--repeats", type=int, default=5)
    command.add_argument("--scans", type=int, default=2400)
    command.set_defaults(function=benchmark_convert)
    command = commands.add_parser("views", help="training on cached features, compared with fresh views")
    command.add_argument("--backbone", default="resnet18", help="timm name; its weights are random")
    command.add_argument("--image-size", type=int, default=224)
    command.add_argument(
        "--runs", type=int, default=60, help="files of the demo cohort; training files get 9 shifted copies"
    )
    command.set_defaults(function=benchmark_views)
    command = commands.add_parser("processes", help="conversion and extraction by one process and by two")
    command.add_argument("--backbone", default="resnet18", help="timm name; its weights are random")
    command.add_argument("--scans", type=int, default=1000)
    command.add_argument("--runs", type=int, default=60, help="files of the demo cohort")
    command.add_argument("--repeats", type=int, default=2)
    command.set_defaults(function=benchmark_processes)
    command = commands.add_parser("lightning", help="the loop and a Lightning module (needs: pip install lightning)")
    command.add_argument("--backbone", default="mobileone_s3", help="timm name; its weights are random")
    command.add_argument("--finetune", choices=["head", "all"], default="all")
    command.add_argument("--image-size", type=int, default=224)
    command.add_argument("--runs", type=int, default=300, help="files of the demo cohort")
    command.add_argument("--epochs", type=int, default=4)
    command.add_argument("--workers", type=int, default=deeplcms.cores())
    command.set_defaults(function=benchmark_lightning)
    command = commands.add_parser("pictures", help="time and memory per picture")
    command.add_argument("--before", metavar="CHECKOUT", help="an older checkout, for ratios")
    command.set_defaults(function=benchmark_pictures)
    for name, function in (("answer", answer), ("weigh", weigh)):  # processes started by `pictures`
        command = commands.add_parser(name)
        command.add_argument("arguments", nargs=argparse.REMAINDER)
        command.set_defaults(function=function)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # as in convert.py with one worker per core
    args.function(args)


if __name__ == "__main__":
    main()
