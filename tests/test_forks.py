"""Tests of the forks in the README: each change is made in one place of a copy of the scripts, then run."""

import json
import re
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import torch
from conftest import ROOT

FLAGS = ["--backbone", "pixels", "--scales", "1:8", "--image-size", 64, "--epochs", 2, "--lr", 0.1, "--data"]


# Runs commands from stdin in one process, so that torch loads once. The scripts are imported anew for each command.
SERVER = """
import io, json, os, runpy, sys, traceback
for line in sys.stdin:
    folder, command = json.loads(line)
    for name in ("deeplcms", "convert", "train", "evaluate", "explain", "small"):
        sys.modules.pop(name, None)
    os.chdir(folder)
    sys.path[0] = folder
    sys.argv = command
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    code = 0
    try:
        runpy.run_path(os.path.join(folder, command[0]), run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
        if isinstance(code, str):
            code = print(code, file=sys.stderr) or 1
    except BaseException:
        code = 1
        traceback.print_exc()
    texts = [stream.buffer.getvalue().decode() for stream in (sys.stdout, sys.stderr)]
    print(json.dumps([code, *texts]), file=sys.__stdout__, flush=True)
"""


@pytest.fixture(scope="module")
def server():
    """Function call(folder, script, *arguments) -> (exit status, stdout, stderr) of a command in a fork."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", SERVER], text=True, **pipes) as process:

        def call(folder, *command):
            print(json.dumps([str(folder), list(map(str, command))]), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield call
        process.stdin.close()


@pytest.fixture()
def fork(tmp_path, server):
    """(copy of the scripts, and the functions edit(script, old, new), works(*command), refused(*command))."""
    for script in ROOT.glob("*.py"):
        shutil.copy(script, tmp_path)

    def edit(script, old, new):
        text = (tmp_path / script).read_text()
        assert text.count(old) == 1, f"{script} contains {old!r} {text.count(old)} times"
        (tmp_path / script).write_text(text.replace(old, new))

    def works(*command):
        code, printed, error = server(tmp_path, *command)
        assert code == 0, error
        return printed

    def refused(*command):
        code, _, error = server(tmp_path, *command)
        assert code == 1
        return error

    return tmp_path, edit, works, refused


def test_a_fork_can_replace_the_logarithm_by_the_square_root(fork, two):
    folder, edit, works, refused = fork
    edit("deeplcms.py", '    colormap: str = "jet"\n', '    colormap: str = "jet"\n    scale: str = "log"\n')
    logarithm = "values = np.log1p(values) / np.log(256)"
    assert logarithm in (folder / "deeplcms.py").read_text()
    root = 'if recipe.scale == "root":\n        values = np.sqrt(values / 255)\n    else:\n        '
    edit("deeplcms.py", logarithm, root + logarithm)
    edit("convert.py", '    add("--colormap"', '    add("--scale", default="log")\n    add("--colormap"')
    raw = two[0].parent / "raw"
    command = ["convert.py", raw, raw / "samples.csv", "root", "--bins", 64]
    works(*command, "--scale", "root")
    assert "with scale root, not log" in refused(*command)
    works("train.py", *FLAGS, "root")
    works("evaluate.py")
    run = folder / "runs/root/pixels/seed2643"
    names = pd.read_csv(run / "predictions.csv").set_index("sample_name")["probability_user"]
    works("evaluate.py", "--predict", *(raw / f"{name}.mzML" for name in names.index), "--out", "new.csv")
    new = pd.read_csv(folder / "new.csv")
    assert new["probability_user"].tolist() == pytest.approx(names.tolist(), abs=1e-6)
    works(*command[:3], "log", *command[4:])
    assert "scale is log, not root" in refused("evaluate.py", "--data", "log")


def test_a_fork_can_add_mixup_as_a_setting_of_the_run(fork, two):
    folder, edit, works, refused = fork
    edit("train.py", '    add("--warp"', '    add("--mixup", type=float, default=0.0)\n    add("--warp"')
    mixed = "    if settings.mixup:\n        x = x + settings.mixup * (x[torch.randperm(len(x))] - x)\n"
    step = "    optimizer.zero_grad()\n    with autocast"
    edit("train.py", step, mixed + step)
    flags = ["--optimizer", "adamax", *FLAGS]  # logistic regression has no steps
    works("train.py", *flags, two[0])
    assert "is a training with mixup 0.0, not 0.2" in refused("train.py", *flags, two[0], "--mixup", 0.2)
    works("train.py", *flags, two[0], "--mixup", 0.2, "--name", "mixup")
    run = folder / "runs/mixup/pixels/seed2643"
    assert json.loads((run / "config.json").read_text())["settings"]["mixup"] == 0.2
    losses = [pd.read_csv(path / "epochs.csv")["train_loss"][0] for path in (run, folder / "runs/data/pixels/seed2643")]
    assert losses[0] != losses[1]


def test_a_fork_can_replace_the_head(fork, two):
    folder, edit, works, refused = fork
    text = (folder / "train.py").read_text()
    old = re.search(r"        self.head = nn.Linear.*?\n(?:        nn.init.*\n)+", text).group()
    layers = "nn.Linear(self.n_features, 16), nn.ReLU(), nn.Linear(16, n_outputs)"
    edit("train.py", old, f"        self.head = nn.Sequential({layers})\n")
    works("train.py", *FLAGS, two[0], "--optimizer", "adamax", "--epochs", 30, "--lr", 0.03)
    works("evaluate.py")
    works("explain.py")


def test_a_fork_can_use_one_grey_channel(fork, two):
    folder, edit, works, refused = fork
    edit("train.py", "CHANNELS = 3", "CHANNELS = 1")
    edit("train.py", "v2.Lambda(functools.partial(colours, colormap=recipe.colormap))", "v2.Lambda(np.atleast_3d)")
    works("train.py", "--backbone", "test_resnet", "--weights", "random", *FLAGS[4:], two[0])
    state = torch.load(folder / "runs/data/test_resnet/seed2643/best.pt")["model"]
    assert next(weight.shape[1] for weight in state.values() if weight.ndim == 4) == 1
    works("evaluate.py")
    works("explain.py")


def test_a_fork_can_tune_another_setting(fork, two):
    folder, edit, works, refused = fork
    edit("train.py", '"scheduler": list(SCHEDULERS)}', '"scheduler": ["cosine"], "warp": [0.0, 9.0]}')
    printed = works("train.py", *FLAGS, two[0], "--tune", 8)
    trials = pd.read_csv(folder / "runs/data/pixels/tune/trials.csv")
    assert trials.groupby(["params_optimizer", "params_warp"]).ngroups == 8 and "--warp" in printed
    assert (trials.groupby("params_optimizer")["value"].nunique() == 2).all()  # features are cached anew for each warp


def test_a_fork_can_train_regression(fork, two):
    """The labels are the ages in samples.csv. Labels, loss and metrics have one place each."""
    folder, edit, works, refused = fork
    edit(
        "deeplcms.py",
        '    return pictures["phenotype"].map(classes.index).to_numpy()\n',
        '    return pictures["age"].astype(float).to_numpy()\n',
    )
    text = (folder / "train.py").read_text()
    old = re.search(r"    if logits.shape\[1\] == 1:\n        return F.binary.*?\n\n", text, re.DOTALL).group()
    edit("train.py", old, "    return F.mse_loss(logits[:, 0], labels.float())\n\n")
    edit(
        "deeplcms.py",
        "    probabilities = to_probabilities(logits)\n    n_classes",
        '    return {"rmse": np.sqrt(np.mean((np.asarray(logits)[:, 0] - labels) ** 2))}\n'
        "    probabilities = to_probabilities(logits)\n    n_classes",
    )
    assert "val_rmse" in works("train.py", *FLAGS, two[0], "--repeats", 2)
    epochs = pd.read_csv(folder / "runs/data/pixels/seed2643/epochs.csv")
    assert (epochs["val_rmse"] ** 2).tolist() == pytest.approx(epochs["val_loss"].tolist(), rel=1e-5)
    works("evaluate.py", "runs")
    assert "val_rmse" in pd.read_csv(next(folder.glob("runs/**/comparison.csv")))


def test_a_fork_can_combine_two_polarities_in_a_picture(fork, two):
    """Negative scans are 11 minutes later than positive scans, so both are side by side in one picture."""
    folder, edit, works, refused = fork
    both = """def read_raw(path, *options):
    (said, positive), (_, negative) = read_one(path, *options), read_one(path, *options)
    return said, itertools.chain(positive, ((rt + 11, *peaks) for rt, *peaks in negative))


"""
    edit("deeplcms.py", "def read_raw(", f"{both}def read_one(")
    edit("deeplcms.py", "import json\n", "import itertools\nimport json\n")
    raw = two[0].parent / "raw"
    works("convert.py", raw, raw / "samples.csv", "modes", "--bins", 96, 64, "--sigma", 1)
    works("train.py", *FLAGS, "modes")
    (folder / "features.csv").write_text("rt,mz,name\n4.0,400,first\n15.0,400,second\n")
    works("explain.py", "--features", "features.csv")
    edit("deeplcms.py", "return np.ascontiguousarray(levels.T[::-1])", "return np.hstack([levels.T[::-1]] * 2)")
    error = refused("convert.py", raw, raw / "samples.csv", "wide", "--bins", 64)
    assert "a picture has the shape (64, 128)" in error


NETWORK = """
import torch
from timm.models import register_model
from torch import nn


class Small(nn.Module):
    feature_info = [{"num_chs": 8, "reduction": 4, "module": "one"}, {"num_chs": 16, "reduction": 8, "module": "two"}]

    def __init__(self):
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(8, 16, 2, stride=2), nn.ReLU())

    def forward_intermediates(self, x, indices=None, **_):
        maps = [self.one(x)]
        maps.append(self.two(maps[0]))
        return [maps[i] for i in indices]


@register_model
def small(pretrained=False, **options):
    return Small()
"""


def test_a_fork_can_add_a_backbone(fork, two):
    folder, edit, works, refused = fork
    (folder / "small.py").write_text(NETWORK)
    edit("train.py", "import timm\n", "import small\nimport timm\n")
    flags = ["--backbone", "small", "--weights", "random", *FLAGS[4:], two[0]]
    works("train.py", *flags)
    works("evaluate.py")
    works("explain.py")
    (folder / "small.py").write_text(NETWORK.replace("ReLU", "GELU"))
    assert "is a training with architecture" in refused("train.py", *flags)
    assert "the layers of small have changed since its training" in refused("evaluate.py")
    (folder / "small.py").write_text(NETWORK.replace('"num_chs": 16', '"num_chs": 32'))
    error = refused("train.py", *flags, "--name", "wrong")
    assert "its map of stride 8 has not the channels of its feature_info" in error


def test_a_fork_can_choose_the_kept_epoch_by_another_metric(fork, two):
    folder, edit, works, refused = fork
    old = 'row["val_loss"] if math.isfinite(row["val_loss"]) else math.inf'
    edit("train.py", f"return {old}", 'return 1 - row["val_f1"]')
    flags = ["--optimizer", "adamax", *FLAGS, two[0], "--epochs", 6, "--patience", 3, "--lr", 0.01]
    works("train.py", *flags)
    epochs = pd.read_csv(folder / "runs/data/pixels/seed2643/epochs.csv")
    kept = epochs[epochs["kept"]].iloc[-1]
    assert kept["val_f1"] == epochs["val_f1"].max()


def test_a_fork_can_weight_the_classes(fork, two):
    folder, edit, works, refused = fork
    edit("train.py", "labels.to(logits.dtype))", "labels.to(logits.dtype), pos_weight=torch.tensor(3.0))")
    works("train.py", *FLAGS, two[0], "--folds", 3)
    works("evaluate.py", "runs")
    table = pd.read_csv(next(folder.glob("runs/**/comparison.csv")))
    assert (table["baseline_loss"] > 1).all()  # 0.69 without weights
