"""Tests of train.py: its functions and its command line."""

import argparse
import copy
import functools
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import pytest
import safetensors.torch
import timm
import torch
from conftest import ROOT, TINY, call, run

import deeplcms
import train
from deeplcms import InputError, Recipe
from train import Classifier, Pictures


HERE = argparse.Namespace(workers=0, amp=False)  # features are extracted in this process


def read_epochs(folder):
    return pd.read_csv(folder / "epochs.csv").drop(columns="seconds")


def tiny(data, *flags, backbone="test_resnet"):
    return ["--backbone", backbone, "--data", data, *TINY, *flags]


def train_in(tmp_path, data, *flags, backbone="test_resnet", out="runs"):
    """Train once in this process; returns the run folder."""
    arguments = tiny(data, "--out", out, *flags, backbone=backbone)
    assert run("train.py", *arguments, cwd=tmp_path) == (0, "")
    [folder] = (tmp_path / out / data.name / backbone).glob("seed*")
    return folder


def read_labelled(data, *splits):
    """(table with labels, recipe) of pictures of the demo cohort."""
    pictures, recipe = deeplcms.find_pictures(data, splits)
    return pictures.assign(label=deeplcms.make_labels(pictures, ["control", "exposed"])), recipe


# ---------------------------------------------------------------- pictures


JET = Recipe(0, 1, 0, 1)
PLAIN = argparse.Namespace(
    image_size=60, mean=(0, 0, 0), std=(1, 1, 1)
)  # the attributes of a network that a transform reads


def augmentation_settings(augmentation, **values):
    """Settings with the values of an augmentation preset, some of them replaced."""
    args = train.parse_arguments(["--backbone", "pixels", "--data", "x", "--augmentation", augmentation])
    return argparse.Namespace(**vars(train.fill_augmentation(args)) | values)


def test_pixels_in_the_corners_of_a_picture_remain_in_the_input():
    picture = np.zeros((100, 140), np.uint8)
    picture[:2, :2] = picture[:2, -2:] = picture[-2:, :2] = picture[-2:, -2:] = 255
    squashed = train.to_input(PLAIN, replace(JET, colormap="gray"))(picture)
    assert squashed.shape == (3, 60, 60) and squashed[0, 10:50, 10:50].max() == 0
    assert squashed[0, [0, 0, -1, -1], [0, -1, 0, -1]].min() > 0.5


def test_uncovered_and_erased_pixels_have_the_colour_of_zero_intensity():
    zero = deeplcms.colours(np.zeros((1, 1), np.uint8), "jet")[0, 0]  # dark blue
    for args in (augmentation_settings("article", color_jitter=0), augmentation_settings("physical", erase=1, warp=9)):
        transform = train.training_transform(PLAIN, JET, args)
        for level, least in ((0, 1.0), (200, 1e-4)):
            for _ in range(5):
                x = transform(np.full((60, 60), level, np.uint8))
                seen = (255 * x).round().byte().permute(1, 2, 0).numpy()
                assert (seen == zero).all(axis=2).mean() >= least


def test_none_changes_no_level_and_physical_moves_spots_along_time_only():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(train.augment(levels, augmentation_settings("none")), levels)
    picture = np.zeros((60, 60), np.uint8)
    picture[18:21, 28:33] = picture[40:43, 28:33] = 150
    places = set()
    for _ in range(5):
        lit = train.augment(picture, augmentation_settings("physical", warp=5, gain=0, erase=0)) > 75
        assert set(np.flatnonzero(lit.any(axis=1))) == {18, 19, 20, 40, 41, 42}
        assert np.array_equal(lit[19], lit[41])  # both masses are shifted equally
        places.add(int(np.flatnonzero(lit[19]).mean()))
    assert len(places) > 1


def test_warp_retention_equals_grid_sample_on_a_grid_shifted_along_time():
    x = torch.rand(1, 40, 60)
    torch.manual_seed(1)
    warped = train.warp_retention(x, 0.05)
    torch.manual_seed(1)
    grid = torch.nn.functional.affine_grid(torch.eye(2, 3)[None], (1, 1, 40, 60), align_corners=False)
    grid[..., 0] += 2 * train.draw_wave(60, 0.05)  # grid coordinates are from -1 to 1
    expected = torch.nn.functional.grid_sample(x[None], grid, padding_mode="border", align_corners=False)[0]
    torch.testing.assert_close(warped, expected, rtol=0, atol=1e-5)
    assert not torch.equal(warped, x)


def make_demo_loaders(data, *flags):
    """(loaders, settings) of the pixels baseline; the label of each picture is its row number."""
    args = train.parse_arguments(["--backbone", "pixels", "--data", str(data), "--batch-size", "8", *flags])
    args = train.fill_augmentation(args)
    pictures, recipe = deeplcms.find_pictures(data, ("train", "val"))
    table, model = pictures.assign(label=range(len(pictures))), Classifier("pixels", 1, image_size=64)
    args = argparse.Namespace(**vars(args) | {"pictures": 0})
    cache = train.cache_features(model, table, recipe, args) if args.views else None
    return train.make_loaders(model, table, recipe, args, cache), args


@pytest.mark.parametrize("workers", ["0", "2"])
def test_order_and_views_of_an_epoch_do_not_depend_on_earlier_epochs(demo, workers):
    """An epoch has one view of every picture. Order and views differ between epochs."""
    loaders, args = make_demo_loaders(demo, "--views", "0", "--workers", workers)
    epochs = []
    for epoch in (2, 1, 2):
        batches = list(train.draw_batches(loaders["train"], epoch, args))
        # Channels-last batches corrupt the heap in the backward pass of some backbones.
        assert all(x.is_contiguous() and x.stride()[1] == 64 * 64 for x, _ in batches)
        epochs.append([torch.cat(part) for part in zip(*batches, strict=True)])
    (x, order), (other_x, other_order), (again_x, again_order) = epochs
    assert torch.equal(x, again_x) and torch.equal(order, again_order) and not torch.equal(order, other_order)
    assert sorted(order.tolist()) == sorted(other_order.tolist()) == list(range(27))
    assert not torch.isclose(x[order.argsort()], other_x[other_order.argsort()]).flatten(1).all(dim=1).any()


def test_all_cached_views_differ_and_each_is_a_training_item(demo):
    cached, single = (make_demo_loaders(demo, "--views", views)[0] for views in ("3", "1"))
    features, labels = cached["train"].dataset.tensors
    assert labels.tolist() == 3 * single["train"].dataset.tensors[1].tolist()
    assert len(features.unique(dim=0)) == len(labels) and len(cached["val"].dataset) == len(single["val"].dataset)


# ---------------------------------------------------------------- model


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit", "swin_tiny_patch4_window7_224"])
def test_the_maps_of_every_kind_of_backbone_keep_positions(backbone):
    """Maps of convolutions, tokens or channels last change most where the picture was changed, on the right."""
    model = Classifier(backbone, 1, image_size=64 if backbone == "test_resnet" else None).eval()
    assert [scale for scale in model.scales if scale[0] > 1] == [(8, 7, 28), (16, 7, 14)][backbone == "test_vit" :]
    x = torch.zeros(1, 3, model.image_size, model.image_size)
    with torch.no_grad():
        plain = model.pool_maps(x)
        x[..., model.image_size * 7 // 8 :] = 3.0
        for block, before, (_, n_rt, n_mz) in zip(model.pool_maps(x), plain, model.scales, strict=True):
            change = (block - before).abs().unflatten(1, (-1, n_mz, n_rt)).mean((0, 1, 2))
            assert change[-1] > change[0]
        assert model(x).shape == (1, 1)


def test_a_head_uses_the_chosen_maps_with_equal_weight():
    model = Classifier("test_resnet", 1, ["last:1", "1:4", "8:2"], image_size=64).eval()
    assert model.scales == [(1, 4, 4), (8, 2, 2), (32, 1, 1)] and model.sizes == [3 * 16, 48 * 4, 96]
    features = torch.randn(200, 3 * 16 + 48 * 4 + 96)
    with torch.no_grad():
        model.fit_standardize(features)
        lengths = [part.square().sum(1).mean() for part in model.head_inputs(features).split(model.sizes, 1)]
    assert lengths == pytest.approx([1 / 3] * 3, rel=0.1)
    with pytest.raises(InputError, match="--scales 5:1: the strides of test_resnet are 1, 2, 4, 8, 16, 32"):
        Classifier("test_resnet", 1, ["5:1"])


def test_training_the_head_does_not_change_a_frozen_backbone(demo, tmp_path):
    folder = train_in(tmp_path, demo, "--finetune", "head", "--views", 0, "--epochs", 1)
    after = train.load_run(folder)[0].state_dict()
    torch.manual_seed(2643)
    before = Classifier("test_resnet", 1, image_size=64).state_dict()
    changed = {name.partition(".")[0] for name, t in before.items() if not torch.equal(t, after[name])}
    assert changed == {"standardize", "head"}


def test_features_near_1e7_of_a_random_frozen_backbone_are_standardised():
    model = Classifier("mobileone_s0", 1, image_size=64)
    with torch.no_grad():
        features = model.features(torch.rand(16, 3, 64, 64))
        model.fit_standardize(features)
        standardised = model.standardize(features)
    assert standardised.abs().max() < 20 and 0.5 < standardised.std() < 1.5


def test_pretrained_weights_come_from_the_hub_cache_and_auto_is_random_without_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def build(weights):
        [args] = train.expand_trainings(train.parse_arguments(["--backbone", "test_resnet", "--weights", weights]))
        args.finetune = None  # the demo trains the whole network
        return train.build_model(args, 1)

    (auto, origin), (random, _) = build("auto"), build("random")
    assert origin == "random initialisation" and not auto.frozen
    assert all(torch.equal(t, random.state_dict()[name]) for name, t in auto.state_dict().items())
    assert "warning: no pretrained weights of test_resnet could be had" in capsys.readouterr().out
    with pytest.raises(InputError, match="--weights FILE or random"):
        build("pretrained")

    source = timm.create_model("test_resnet", pretrained=False)
    repository = tmp_path / "models--timm--test_resnet.r160_in1k"
    (repository / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    safetensors.torch.save_file(source.state_dict(), repository / "snapshots" / ("0" * 40) / "model.safetensors")
    model, origin = build("pretrained")
    assert "pretrained" in origin and model.frozen
    assert all(torch.equal(t, source.state_dict()[name]) for name, t in model.backbone.state_dict().items())


def test_weight_files_are_loaded_without_their_classifier(trained, tmp_path):
    source = timm.create_model("test_resnet", num_classes=17)
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    safetensors.torch.save_file(source.state_dict(), tmp_path / "weights.safetensors")
    own = torch.load(trained / "best.pt", weights_only=True)["model"]["backbone.conv1.0.weight"]
    expected = {tmp_path / name: source.conv1[0].weight for name in ("weights.pt", "weights.safetensors")}
    for path, weight in (expected | {trained / "best.pt": own}).items():
        model = Classifier("test_resnet", 1, image_size=64)
        train.load_weights(model.backbone, path)
        assert torch.equal(model.backbone.conv1[0].weight, weight)
    with pytest.raises(InputError, match="does not fit this --backbone"):
        train.load_weights(Classifier("test_vit", 1).backbone, tmp_path / "weights.pt")


def test_a_hostile_checkpoint_is_refused_and_its_code_is_not_run(tmp_path):
    class Hostile:
        def __reduce__(self):
            return open, (str(tmp_path / "owned"), "w")

    for name, contents in {"hostile": {"model": Hostile()}, "other": {"conv1.weight": torch.ones(1)}}.items():
        (tmp_path / name).mkdir()
        torch.save(contents, tmp_path / name / "best.pt")
    (tmp_path / "half").mkdir()
    (tmp_path / "half/best.pt").write_bytes((tmp_path / "other/best.pt").read_bytes()[:100])
    for name in ("hostile", "other", "half"):
        with pytest.raises(InputError, match="not a checkpoint"):
            train.load_run(tmp_path / name)
    assert not (tmp_path / "owned").exists()


# ---------------------------------------------------------------- runs


def test_best_pt_has_the_kept_epoch_and_reproduces_its_metrics(trained, demo):
    names = {path.name for path in trained.iterdir()}
    assert names >= {"config.json", "epochs.csv", "curves.png", "transformed_grid.png", "best.pt", "last.pt"}
    epochs = read_epochs(trained)
    best = epochs.iloc[-1]
    model, checkpoint = train.load_run(trained)
    assert (
        checkpoint["epoch"] == best["epoch"] and checkpoint["config"]["settings"]["weights"] == "random initialisation"
    )
    pictures, recipe = deeplcms.find_pictures(demo, ("train",))
    typical, cohort = deeplcms.summarize_cohort(pictures[~pictures["copy"]], recipe)
    assert checkpoint["recipe"] == recipe and checkpoint["cohort"] == cohort
    assert checkpoint["chromatogram"].tolist() == typical.tolist() and len(typical) == 64
    data = Pictures(read_labelled(demo, "val")[0], train.to_input(model, recipe))
    logits, labels = train.collect(train.predict(model, torch.utils.data.DataLoader(data, 3)))
    assert train.compute_loss(logits, labels).item() == pytest.approx(best["val_loss"], abs=1e-5)
    assert deeplcms.compute_metrics(labels.numpy(), logits)["accuracy"] == pytest.approx(best["val_accuracy"])


def test_load_run_restores_the_input_mean_and_deviation_of_the_training(trained, tmp_path):
    checkpoint = torch.load(trained / "best.pt", weights_only=True)
    assert checkpoint["config"]["mean"] == list(train.load_run(trained)[0].mean)
    checkpoint["config"] |= {"mean": [0.1, 0.2, 0.3], "std": [1.0, 2.0, 4.0]}  # as in another version of timm
    torch.save(checkpoint, tmp_path / "best.pt")
    model, _ = train.load_run(tmp_path)
    x = train.to_input(model, replace(JET, colormap="gray"))(np.zeros((64, 64), np.uint8))
    assert x[:, 0, 0].tolist() == pytest.approx([-0.1, -0.1, -0.075])


def test_the_range_test_and_the_number_of_workers_do_not_affect_training(demo, tmp_path):
    flags = ["--scales", "last:3", "--epochs", 1]
    auto = train_in(tmp_path, demo, *flags, "--lr", "auto", out="auto")
    assert (auto / "lr_find.png").exists() and len(pd.read_csv(auto / "lr_find.csv")) > 10
    lr = float(read_epochs(auto)["lr"][0])
    given = train_in(tmp_path, demo, *flags, "--lr", lr, "--workers", 2, out="given")
    assert read_epochs(auto).equals(read_epochs(given))


def prepare_training(data, flags):
    """(loaders, model, settings, pictures, recipe) of one training with these flags."""
    [args] = train.expand_trainings(train.parse_arguments(list(map(str, flags))))
    pictures, recipe = read_labelled(data, "train", "val")
    model, settings, table = train.resolve_settings(args, pictures, recipe)
    cache = train.cache_features(model, pictures, recipe, settings) if settings.views else None
    return train.make_loaders(model, table, recipe, settings, cache), model, settings, pictures, recipe


@pytest.mark.parametrize("finetune", ["all", "head"])
def test_the_range_test_starts_each_learning_rate_from_the_initial_weights(demo, tmp_path, finetune):
    """The loss of each rate is that of 24 steps from the initial weights."""
    arguments = ["--backbone", "test_resnet", "--data", str(demo), *map(str, TINY)]
    arguments += ["--finetune", finetune, "--optimizer", "adamax", "--views", {"all": "0", "head": "1"}[finetune]]
    loaders, model, args, _, _ = prepare_training(demo, arguments)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    lr = train.find_lr(model, loaders, args, tmp_path)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    curve = pd.read_csv(tmp_path / "lr_find.csv")
    assert lr in curve["lr"].tolist() and len(curve) > 10
    optimizer, scaler = train.make_optimizer(model.train(not model.frozen), args, curve["lr"][9])
    loader = loaders["train"]
    epochs = (train.draw_batches(loader, epoch, args) for epoch in itertools.count(1))  # as `fit` counts
    batches = itertools.islice(itertools.chain.from_iterable(epochs), 24)
    outputs = [train.train_step(model, optimizer, scaler, x, y, args) for x, y in batches]
    evaluated = outputs[12:] if finetune == "all" else train.predict(model, loaders["val"])
    assert train.compute_loss(*train.collect(evaluated)).item() == pytest.approx(curve["loss"][9], abs=1e-5)
    epochs = [train.compute_loss(*train.collect(outputs[i : i + len(loader)])) for i in range(0, 24, len(loader))]
    assert max(epochs).item() == pytest.approx(curve["highest"][9], abs=1e-5) and len(epochs) > 1


def test_a_learning_rate_that_raises_the_loss_is_never_suggested():
    def curve_of(*rows):
        return pd.DataFrame(rows, columns=["lr", "loss", "highest"])

    learns = curve_of((1e-3, 0.69, 0.69), (1e-2, 0.5, 0.69), (2e-2, 0.52, 0.72), (4e-2, 0.65, 0.74), (1e-1, 0.4, 1.3))
    assert train.suggest_lr(learns, frozen=False) == (2e-2, "highest rate without harm")
    assert train.suggest_lr(learns, frozen=True) == (1e-2, "lowest without harm")
    slow = curve_of((1e-3, 0.69, 0.69), (1e-2, 0.68, 0.69), (2e-2, 0.7, 0.74), (4e-2, 0.7, 0.75), (1e-1, 0.6, 0.7))
    assert train.suggest_lr(slow, frozen=False) == (2e-2, "highest rate without harm")
    diverges = curve_of((1e-3, 0.69, 0.69), (1e-2, 0.68, 0.69), (2e-2, math.nan, math.nan))
    assert train.suggest_lr(diverges, frozen=False) == (1e-2, "highest rate without harm")


def test_the_head_of_a_frozen_backbone_is_at_the_optimum_of_logistic_regression(demo, tmp_path, monkeypatch):
    """The gradient of loss and L2 is zero for training and validation pictures together."""
    monkeypatch.setattr(train, "choose_shrinkage", lambda *_: 1.0)
    folder = train_in(tmp_path, demo, "--finetune", "head", "--scales", "last:2", "--optimizer", "auto")
    model, _ = train.load_run(folder)
    pictures, recipe = read_labelled(demo, "train", "val")  # with --augmentation none all views are equal
    features = train.extract_features(model, [Pictures(pictures, train.to_input(model, recipe))], HERE)
    loss = train.compute_loss(model(features), torch.tensor(list(pictures["label"])))
    gradient = torch.autograd.grad(loss, [model.head.weight, model.head.bias])
    assert (gradient[0] + train.L2 * model.head.weight).abs().max() < 1e-4 > gradient[1].abs().max()
    assert len(read_epochs(folder)) == 1 and not (folder / "last.pt").exists()


def test_the_validation_metrics_of_logistic_regression_are_out_of_fold(demo, tmp_path):
    """Shuffled labels of training pictures are memorised, but held-out pictures are predicted at chance level."""
    folder = train_in(tmp_path, demo, "--shuffle-labels", "--optimizer", "auto", backbone="pixels")
    row = read_epochs(folder).iloc[0]
    assert row["train_accuracy"] == 1 and row["val_accuracy"] < 0.75 and row["val_loss"] > 0.6
    assert "val: the run was fitted to" in run("evaluate.py", folder, "--split", "val", cwd=tmp_path)[1]


@pytest.mark.parametrize("n_features", [10, 100])
def test_the_kernel_basis_preserves_inner_products_and_maps_weights_back(n_features):
    torch.manual_seed(0)
    x = torch.randn(30, n_features)
    z, to_weights = train.compute_kernel_basis(x)
    assert z.shape == (30, min(30, n_features))
    torch.testing.assert_close(z @ z.T, (x @ x.T).double(), rtol=1e-3, atol=2e-3)
    weight = torch.randn(2, z.shape[1], dtype=z.dtype)
    torch.testing.assert_close(x @ to_weights(weight).T.float(), (z @ weight.T).float(), rtol=1e-2, atol=1e-2)


def test_a_killed_and_resumed_training_equals_an_uninterrupted_one(demo, tmp_path):
    flags = ["--scales", "last:3", "--epochs", 8, "--lr", "auto", "--augmentation", "physical"]
    flags += ["--workers", train.make_parser().get_default("workers")]
    arguments = tiny(demo, *flags, "--out", "killed")
    whole = train_in(tmp_path, demo, *flags, out="whole")
    command = [sys.executable, ROOT / "train.py", *arguments]
    process = subprocess.Popen(list(map(str, command)), cwd=tmp_path, stdout=subprocess.DEVNULL)
    killed = tmp_path / "killed/demo/test_resnet/seed2643"
    while not ((killed / "epochs.csv").exists() and len(read_epochs(killed)) >= 2) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(read_epochs(killed)) < 8 and not (killed / "best.pt").exists()
    assert run("train.py", *arguments, cwd=tmp_path) == (0, "")
    assert read_epochs(killed).equals(read_epochs(whole))
    for name in ("best.pt", "last.pt"):
        one, other = (torch.load(folder / name, weights_only=True)["model"] for folder in (whole, killed))
        assert all(torch.equal(other[key], value) for key, value in one.items())
    before = (killed / "best.pt").stat().st_mtime_ns
    assert run("train.py", *arguments, cwd=tmp_path) == (0, "")
    assert (killed / "best.pt").stat().st_mtime_ns == before
    arguments += ["--warp", 2]
    status, line = run("train.py", *arguments, cwd=tmp_path)
    assert status == 1 and "is a training with warp 1.0, not 2.0: give another --out or --name" in line
    arguments += ["--epochs", 1, "--lr", 0.01, "--name", "other"]
    assert run("train.py", *arguments, cwd=tmp_path) == (0, "")


def prepare_whole_network(data, *flags):
    """(train function, model, pictures, recipe, loaders) of a small network with batch norms, trained whole."""
    flags = tiny(data, "--scales", "last:3", "--finetune", "all", "--workers", 0, *flags)
    loaders, model, settings, pictures, recipe = prepare_training(data, flags)
    return functools.partial(train.fit, model, loaders, settings), model, pictures, recipe, loaders


def compute_validation_loss(model, pictures, recipe):
    """Loss of the validation pictures in batches of another size, as in evaluate.py."""
    table = pictures[(pictures["split"] == "val") & ~pictures["copy"]]
    loader = torch.utils.data.DataLoader(Pictures(table, train.to_input(model, recipe)), 3)
    return train.compute_loss(*train.collect(train.predict(model, loader))).item()


@pytest.mark.parametrize("patience", ["auto", 2])
def test_the_kept_weights_are_the_mean_over_recent_epochs(demo, capsys, patience):
    """The mean ends at the last epoch, or with --patience at the epoch with the lowest validation loss."""
    learn, model, pictures, recipe, _ = prepare_whole_network(demo, "--epochs", 3, "--patience", patience)
    epochs = []
    history, kept = learn(on_epoch=lambda row: epochs.append(train.copy_weights(model)))
    n = train.find_kept_epoch(history)["epoch"]
    losses = [row["val_loss"] for row in history]
    assert (
        n == (3 if patience == "auto" else 1 + np.argmin(losses)) > 1
        and [row["kept"] for row in history].count(True) > 1
    )
    for name, _ in model.named_parameters():
        torch.testing.assert_close(kept[name], torch.stack([weights[name] for weights in epochs[:n]]).mean(0))
    assert not torch.equal(kept["head.weight"], epochs[n - 1]["head.weight"])
    model.load_state_dict(kept)
    assert compute_validation_loss(model, pictures, recipe) == pytest.approx(history[n - 1]["val_loss"])
    assert capsys.readouterr().out.count("trains all 3 epochs and keeps the last") == (patience == "auto")


@pytest.mark.parametrize("seed", [2643, 3])
def test_the_loss_of_averaged_weights_is_at_most_10_percent_above_that_of_plain_weights(demo, seed):
    """Random weights and few steps per epoch: averaged batch norm statistics would fail here."""
    learn, model, pictures, recipe, loaders = prepare_whole_network(demo, "--epochs", 20, "--lr", 0.003, "--seed", seed)
    plain_losses = []

    def report(row):
        raw = copy.deepcopy(model)
        train.update_bn(loaders["statistics"], raw)
        plain_losses.append(compute_validation_loss(raw, pictures, recipe))

    history, _ = learn(on_epoch=report)
    assert len(history) == 20
    assert all(row["val_loss"] <= 1.1 * raw for row, raw in zip(history, plain_losses, strict=True))


@pytest.mark.parametrize(
    ("curve", "patience", "n_epochs", "kept"),
    [
        ([0.6] + [0.7] * 18 + [0.65], "auto", 20, 20),  # the cosine schedule does not stop early
        ([0.6] + [0.7] * 18 + [0.2], 10, 20, 20),  # the loss is highest in the middle
        ([0.6, 0.5] + [0.7] * 38, 10, 30, 2),  # ten epochs after the middle have no better loss
    ],
)
def test_patience_counts_from_the_middle_of_the_schedule(demo, monkeypatch, curve, patience, n_epochs, kept):
    split_metrics, losses = train.split_metrics, iter(curve)

    def metrics_on_the_curve(split, logits, labels):
        return split_metrics(split, logits, labels) | ({"val_loss": next(losses)} if split == "val" else {})

    monkeypatch.setattr(train, "split_metrics", metrics_on_the_curve)
    learn, *_ = prepare_whole_network(demo, "--epochs", len(curve), "--image-size", 32, "--patience", patience)
    history, _ = learn()
    assert (len(history), train.find_kept_epoch(history)["epoch"]) == (n_epochs, kept)


def test_with_amp_the_forward_pass_has_half_precision_and_weights_are_float32(demo):
    learn, model, *_, args = prepare_whole_network(demo, "--epochs", 1, "--amp", "--augmentation", "physical")
    seen = set()
    model.backbone.conv1[0].register_forward_hook(lambda layer, x, y: seen.add((layer.training, y.dtype)))
    _, kept = learn()
    assert seen == {(True, torch.float16 if train.CUDA else torch.bfloat16), (False, torch.float32)}
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert {t.dtype for t in kept.values() if t.is_floating_point()} == {torch.float32}
    assert train.make_parser().get_default("amp") == (train.CUDA or train.FAST_BFLOAT16)


def test_cached_features_and_fresh_pictures_give_the_same_losses_in_each_epoch(demo, tmp_path):
    flags = ["--finetune", "head", "--epochs", 3, "--scales", "last:2", "--optimizer", "adamax"]
    fresh = train_in(tmp_path, demo, *flags, "--views", 0, out="fresh")
    cached = train_in(tmp_path, demo, *flags, "--views", 1, out="stored")
    losses = [read_epochs(folder)[["train_loss", "val_loss"]] for folder in (cached, fresh)]
    np.testing.assert_allclose(*losses, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["mobileone_s0", "repvgg_a0", "fastvit_t8", "repvit_m0_9", "lambda_resnet26t"])
def test_extraction_with_fused_branches_gives_the_same_features(demo, name):
    pictures, recipe = read_labelled(demo, "val")
    model = Classifier(name, 1, image_size=64).eval()
    transform = train.to_input(model, recipe)
    parts = len(list(model.modules()))
    cached = train.extract_features(model, [Pictures(pictures[:3], transform)], HERE)
    with torch.inference_mode():
        expected = model.features(torch.stack([x for x, _ in Pictures(pictures[:3], transform)]))
    torch.testing.assert_close(cached, expected, rtol=0, atol=1e-4 * expected.std().item())
    assert len(list(model.modules())) == parts


def test_folds_seeds_and_trials_share_one_extraction_of_features(demo, trained, tmp_path, capsys):
    arguments = tiny(demo, "--finetune", "head", "--epochs", 1, "--weights", trained / "best.pt")
    for name, flags in {"f": ["--folds", 3, "--repeats", 2], "r": ["--repeats", 2], "t": ["--tune", 2]}.items():
        train.CACHE.clear()
        assert run("train.py", *arguments, *flags, "--name", name, cwd=tmp_path) == (0, "")
        assert capsys.readouterr().out.count("caching the features") == 1, name
    assert len(list(tmp_path.glob("runs/f/*/seed264[34]-fold[012]/best.pt"))) == 6


def test_every_picture_is_held_out_once_and_predicted_by_that_fold(demo, tmp_path):
    arguments = ["--backbone", "pixels", "--scales", "1:8", "--data", demo, "--folds", 4]
    assert run("train.py", *arguments, cwd=tmp_path) == (0, "")
    pictures, recipe = read_labelled(demo, "train", "val")
    names = []
    for fold, training in enumerate(train.expand_trainings(train.parse_arguments(list(map(str, arguments))))):
        folder = tmp_path / f"runs/demo/pixels/seed2643-fold{fold}"
        held_out = pd.read_csv(folder / "held_out.csv")
        table = train.make_training_table(pictures, training)
        parts = {split: set(rows["sample_name"]) for split, rows in table.groupby("split")}
        assert set(held_out["sample_name"]) == parts["held out"] and len(parts["val"]) == pytest.approx(8.5, abs=1)
        assert parts["held out"] | parts["val"] | parts["train"] == set(pictures["sample_name"])
        assert not parts["held out"] & (parts["train"] | parts["val"])
        names += list(held_out["sample_name"])
        model, _ = train.load_run(folder)
        rows = table[table["split"] == "held out"]
        x = train.make_inputs(model, recipe, map(deeplcms.read_picture, rows["path"]))
        assert held_out["logit_0"].tolist() == pytest.approx(model(x)[:, 0].tolist(), abs=1e-4)
    assert sorted(names) == sorted(pictures["sample_name"])


def test_logits_without_information_shrink_to_the_class_shares_and_correct_ones_do_not():
    rng = np.random.default_rng(0)
    labels = torch.tensor(rng.random(300) < 0.27).long()
    sure = torch.tensor(rng.normal(0, 20, (300, 1)))  # random logits
    _, baseline = train.fit_logistic(torch.empty(300, 0, dtype=torch.double), labels, 1)
    share = labels.double().mean()
    assert baseline.item() == pytest.approx(torch.log(share / (1 - share)).item(), abs=1e-4)
    assert train.choose_shrinkage(sure, baseline, labels) == 0.01
    shrunk = train.compute_loss(torch.lerp(baseline, sure, 0.01), labels)
    assert shrunk < 1.05 * train.compute_baseline_loss(labels, 1) < train.compute_loss(sure, labels)
    assert train.choose_shrinkage(9 * (2 * labels[:, None].double() - 1), baseline, labels) == 1


def test_the_baseline_auc_is_exceeded_by_one_of_twenty_shuffled_cohorts():
    rng = np.random.default_rng(0)
    labels, score = np.arange(96) < 30, rng.normal(size=96)
    aucs = [deeplcms.roc_auc(rng.permutation(labels), score) for _ in range(2000)]
    assert np.mean(np.array(aucs) > train.compute_baseline_auc(labels)) == pytest.approx(0.05, abs=0.015)


def test_a_model_no_better_than_chance_gives_a_warning(demo, tmp_path, capsys):
    entropy = -0.75 * np.log(0.75) - 0.25 * np.log(0.25)
    assert train.compute_baseline_loss(np.array([0, 0, 0, 1]), 1) == pytest.approx(entropy)
    train_in(tmp_path, demo, "--shuffle-labels", "--optimizer", "auto", backbone="pixels")
    assert "warning: no better than chance: 1 in 20 permutations has a ROC AUC above 0.6" in capsys.readouterr().out
    assert run("evaluate.py", cwd=tmp_path) == (0, "")
    assert "on validation pictures no better than chance" in capsys.readouterr().out


def start_two_processes(tmp_path, data, *flags):
    """Start a training in two processes of torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29631"]
    command += [str(ROOT / "train.py"), *map(str, tiny(data, *flags))]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)


def train_in_two_processes(tmp_path, data, *flags):
    process = start_two_processes(tmp_path, data, *flags)
    _, error = process.communicate(timeout=600)
    assert process.returncode == 0, error


def test_two_processes_end_within_seconds_if_one_fails_in_a_sweep(demo, tmp_path):
    """Only one process has the unreadable picture. If it caught the error, the other would wait for ever."""
    data = tmp_path / "cut"
    shutil.copytree(demo, data, ignore=shutil.ignore_patterns("raw"))
    cut = sorted(data.glob("train/exposed/*.png"))[0]
    cut.write_bytes(cut.read_bytes()[:-200])
    flags = ["--backbone", "test_resnet", "pixels", "--finetune", "all", "--epochs", 1, "--image-size", 32]
    process = start_two_processes(tmp_path, data, *flags)
    _, error = process.communicate(timeout=100)
    assert process.returncode == 1 and not list(tmp_path.glob("runs/cut/*/seed*/best.pt"))
    assert error.count(f"train.py: {cut}: not a") == 1


def test_two_processes_end_if_one_is_killed(demo, tmp_path):
    process = start_two_processes(tmp_path, demo, "--finetune", "all", "--epochs", 1000)
    while not list(tmp_path.glob("runs/demo/test_resnet/seed*/epochs.csv")) and process.poll() is None:
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == 1


def test_two_processes_share_the_extraction_and_fit_the_same_head_as_one(demo, tmp_path):
    flags = ["--finetune", "head", "--optimizer", "auto", "--augmentation", "physical", "--scales", "last:2"]
    train_in_two_processes(tmp_path, demo, *flags, "--out", "two")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one = train_in(tmp_path, demo, *flags, "--workers", 0, out="one")
    torch.set_num_threads(threads)
    folders = one, tmp_path / "two/demo/test_resnet/seed2643"
    expected, found = (torch.load(folder / "best.pt", weights_only=True)["model"] for folder in folders)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_two_processes_train_like_one_with_twice_the_batch_size(demo, tmp_path):
    """The batch statistics of a frozen backbone are constant, so losses agree within float tolerance."""
    pictures, _ = deeplcms.find_pictures(demo, ("train",))
    assert len(pictures) % 9 == 0  # both processes have the same number of pictures, none twice
    flags = ["--finetune", "head", "--views", 0, "--epochs", 2, "--workers", 0, "--lr", 0.05, "--seed", 7]
    train_in_two_processes(tmp_path, demo, *flags, "--batch-size", 7, "--out", "two")
    two = read_epochs(tmp_path / "two/demo/test_resnet/seed7")
    one = read_epochs(train_in(tmp_path, demo, *flags, "--batch-size", 14, out="one"))
    assert two["val_loss"].to_numpy() == pytest.approx(one["val_loss"].to_numpy(), abs=5e-3)
    assert (tmp_path / "two/demo/test_resnet/seed7/best.pt").exists()


def test_two_processes_save_the_validated_network(demo, tmp_path):
    """Batch norm statistics differ between the processes; both use those of the first."""
    train_in_two_processes(tmp_path, demo, "--epochs", 2, "--batch-size", 4)
    folder = tmp_path / "runs/demo/test_resnet/seed2643"
    model, checkpoint = train.load_run(folder)
    pictures, recipe = read_labelled(demo, "val")
    assert compute_validation_loss(model, pictures, recipe) == pytest.approx(checkpoint["val_loss"], abs=1e-5)
    assert checkpoint["val_loss"] == pytest.approx(read_epochs(folder)["val_loss"].iloc[-1])


def test_a_repeated_sweep_skips_finished_runs_and_continues_after_a_failure(demo, tmp_path):
    backbones = ["inception_v3", "test_resnet", "pixels"]  # inception_v3 does not accept 64 pixels
    arguments = ["--backbone", *backbones, *tiny(demo, "--scales", "last:3", "--epochs", 1)[2:]]
    first = call("train.py", *arguments, cwd=tmp_path)
    assert first.returncode == 1 and "Traceback" not in first.stderr
    assert "left out: runs/demo/inception_v3/seed2643: " in first.stderr
    again = call("train.py", *arguments, cwd=tmp_path)
    assert again.stdout.count("is finished") == 2
    assert len(list(tmp_path.glob("runs/demo/*/seed*/best.pt"))) == 2


def test_without_data_train_uses_the_settings_of_the_demo_and_stops_early(demo):
    arguments = ["--backbone", "test_resnet", "--weights", "random", "--image-size", 64, "--shuffle-labels", "--no-amp"]
    assert run("train.py", *arguments, "--epochs", 30, "--patience", 1, cwd=demo.parent) == (0, "")
    folder = demo.parent / "runs/demo/test_resnet/seed2643-shuffled"
    settings = json.loads((folder / "config.json").read_text())["settings"]
    assert settings["shuffle_labels"] and settings.items() >= (train.DEMO | {"image_size": 64, "epochs": 30}).items()
    assert settings.items() >= train.AUGMENTATION["physical"].items()
    epochs = read_epochs(folder)
    assert len(epochs) == max(epochs["val_loss"].idxmin() + 1, 15) + 1 < 30  # patience is one epoch


def test_without_data_train_makes_a_missing_demo_cohort(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(train.subprocess, "run", lambda command, **_: made.append(command[1:]))
    status, line = run("train.py", "--backbone", "pixels", cwd=tmp_path)
    assert status == 1 and "demo: no such data set" in line and made == [[ROOT / "tests/demo.py", "demo"]]


def test_pixels_use_their_default_grid_alongside_networks_and_in_the_demo():
    scales = []
    for flags in ("pixels", "pixels test_vit --scales last:7", "pixels --data x", "pixels --scales 1:7 --data x"):
        training, *_ = train.expand_trainings(train.parse_arguments(["--backbone", *flags.split()]))
        scales.append(training.scales)
    assert scales == [None, None, None, ["1:7"]]


def test_params_limits_the_backbones_of_a_pattern_to_a_size():
    assert train.expand_backbones(["regnetx_0*"], (6, 8)) == ["regnetx_006", "regnetx_008"]
    assert len(train.expand_backbones(["article", "regnetx_002"], None)) == 31
    tags = train.expand_backbones(["mobileone_s*apple_in1k"], None)
    assert "mobileone_s3.apple_in1k" in tags and len(tags) == 5


# ---------------------------------------------------------------- experiments


def make_pictures_table(n, n_groups):
    table = pd.DataFrame({"sample_name": [f"s{i}" for i in range(n)] * 2, "copy": [False] * n + [True] * n})
    table["phenotype"] = ["A" if i % n < n // 2 else "B" for i in range(2 * n)]
    return table.assign(group=[f"g{i % n * n_groups // n}" for i in range(2 * n)], label=table["phenotype"] == "B")


def test_folds_are_stratified_and_do_not_divide_groups_or_shifted_copies():
    for n_groups in (30, 10):
        table = make_pictures_table(30, n_groups)
        table["fold"] = train.assign_folds(table, 5, seed=1)
        assert (table.groupby("group")["fold"].nunique() == 1).all()
        assert (table.groupby("sample_name")["fold"].nunique() == 1).all()
        counts = table[~table["copy"]].groupby(["fold", "phenotype"]).size()
        assert (counts == 3).all() and len(counts) == 10


def test_shuffled_labels_keep_their_counts_and_are_equal_within_a_group():
    for n_groups in (30, 10):
        table = make_pictures_table(30, n_groups)
        after = table.assign(label=train.shuffle_labels(table, 1))
        assert after["label"].sum() == 30 and not after["label"].equals(table["label"])
        assert (after.groupby("group")["label"].nunique() == 1).all()


def test_two_processes_share_one_study_that_tries_all_combinations(demo, tmp_path):
    arguments = tiny(demo, "--epochs", 2, "--tune", 8, "--storage", "sqlite:///shared.db", backbone="pixels")
    command = [sys.executable, str(ROOT / "train.py"), *map(str, arguments)]
    options = {"cwd": tmp_path, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **options) for _ in range(2)]
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path}/shared.db")
    finished = [trial for trial in study.trials if trial.state.is_finished()]
    assert len(finished) >= 8 and not [trial for trial in finished if trial.state.name == "FAIL"]
    assert len({tuple(trial.params.values()) for trial in finished}) == 8
    trials = pd.read_csv(tmp_path / "runs/demo/pixels/tune/trials.csv")
    assert len(trials) >= 8
    # One more trial continues the same study.
    assert run("train.py", *arguments, "--tune", len(finished) + 1, cwd=tmp_path) == (0, "")
    assert len(pd.read_csv(tmp_path / "runs/demo/pixels/tune/trials.csv")) == len(finished) + 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--backbone mobilone_s3 --data demo", "mobileone_s3"),
        ("--backbone test_resnet --data nowhere", "nowhere: no such data set"),
        ("--backbone test_resnet --data empty", "or unfinished"),
        ("--backbone test_resnet --data demo --positive ill", "control, exposed"),
        ("--backbone test_resnet --data demo --views 3 --weights random", "--finetune head"),
        ("--backbone pixels --data demo --optimizer adam --lr 1e30 --epochs 5 --weight-decay 1e9", "--lr"),
        ("--backbone pixels --data demo --folds 30", "samples or groups, and each fold needs one"),
        ("--backbone pixels --data demo --scales fine", "--scales fine: the strides of pixels are 1; write STRIDE"),
        ("--backbone pixels --data demo --tune 1 --storage nonsense", "--storage nonsense: "),
    ],
)
def test_bad_input_gives_an_error_of_one_line(demo, tmp_path, flags, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "demo").symlink_to(demo)
    status, line = run("train.py", *flags.split(), cwd=tmp_path)
    assert status == 1 and message in line and line.startswith("train.py: ") and "\n" not in line
    assert not list(tmp_path.glob("runs/demo/*/seed*/best.pt"))


@pytest.mark.parametrize(
    "flags", ["--folds 2", "--weights gone.pt", "--lr -1", "--lr much", "--epochs 0", "--backbone"]
)
def test_a_wrong_flag_gives_exit_status_2_and_an_error_with_its_name(flags, capsys):
    with pytest.raises(SystemExit) as end:
        train.parse_arguments(["--backbone", "x", *flags.split()])
    assert end.value.code == 2 and flags.split()[0] in capsys.readouterr().err.splitlines()[-1]


@pytest.fixture(scope="module")
def compute_transfer_auc(tmp_path_factory):
    """Function of flags: trains a network on 48 files and returns its ROC AUC on 72 test files."""
    weights = os.environ.get("DEEPLCMS_WEIGHTS")
    if not weights:
        pytest.skip("DEEPLCMS_WEIGHTS is not set to a file with ImageNet weights of tf_efficientnet_lite0")
    folder = tmp_path_factory.mktemp("transfer")
    assert run("demo.py", "cohort", "--runs", 120, "--bins", 128, "--test", 0.6, cwd=folder) == (0, "")

    def train_and_compute_auc(name, *flags):
        flags = [weights if flag == "FILE" else flag for flag in flags]
        arguments = ["--backbone", "tf_efficientnet_lite0", "--data", "cohort", "--name", name, "--weights", *flags]
        assert run("train.py", *arguments, cwd=folder) == (0, "")
        assert run("evaluate.py", f"runs/{name}/tf_efficientnet_lite0/seed2643", "--out", name, cwd=folder) == (0, "")
        return json.loads((folder / name / "metrics.json").read_text())["metrics"]["roc_auc"]["value"]

    return train_and_compute_auc


def test_early_maps_on_a_fine_grid_give_a_higher_auc_than_the_last_map(compute_transfer_auc):
    scales = compute_transfer_auc("scales", "FILE", "--image-size", 128)
    last = compute_transfer_auc("last", "FILE", "--image-size", 128, "--scales", "last:1")
    assert scales > 0.9 and scales > last + 0.05


def test_a_whole_network_trains_better_from_imagenet_than_from_random_weights(compute_transfer_auc):
    flags = ["--finetune", "all", "--image-size", 64, "--lr", 0.01, "--epochs", 12]
    imagenet, random = (
        compute_transfer_auc("imagenet", "FILE", *flags),
        compute_transfer_auc("random", "random", *flags),
    )
    assert imagenet > random + 0.05


@pytest.mark.skipif("DEEPLCMS_SLOW" not in os.environ, reason="needs minutes; set DEEPLCMS_SLOW=1 to run it")
@pytest.mark.parametrize("name", train.ARTICLE)
def test_every_architecture_in_table_1_of_the_article_can_be_trained(name):
    """One forward and one backward pass of two pictures give a finite loss and gradients."""
    model = Classifier(name, 1, finetune="all").train()
    x = torch.rand(2, 3, model.image_size, model.image_size)
    loss = train.compute_loss(model(x), torch.tensor([0, 1]))
    loss.backward()
    assert torch.isfinite(loss) and model.head.weight.grad.abs().sum() > 0


# ---------------------------------------------------------------- identity of a training, and special cases


def test_a_training_is_identified_by_its_pictures_and_not_by_their_path(demo, tmp_path):
    flags = ["--backbone", "pixels", "--scales", "1:8", "--name", "one"]
    assert run("train.py", *flags, "--data", demo, cwd=tmp_path) == (0, "")
    before = (tmp_path / "runs/one/pixels/seed2643/best.pt").stat().st_mtime_ns
    shutil.copytree(demo, tmp_path / "copy", ignore=shutil.ignore_patterns("raw", "runs"))
    for spelling in (f"{demo}/", "copy", "./copy/"):
        assert run("train.py", *flags, "--data", spelling, cwd=tmp_path) == (0, "")
    assert (tmp_path / "runs/one/pixels/seed2643/best.pt").stat().st_mtime_ns == before
    picture = next((tmp_path / "copy").glob("train/exposed/*.png"))
    picture.unlink()
    table = pd.read_csv(tmp_path / "copy/samples.csv", dtype=str)
    table[table["sample_name"] != picture.stem].to_csv(tmp_path / "copy/samples.csv", index=False)
    status, line = run("train.py", *flags, "--data", "copy", cwd=tmp_path)
    assert status == 1 and "is a training with pictures" in line


def test_config_json_has_the_resolved_settings(demo, tmp_path):
    folder = train_in(tmp_path, demo, "--optimizer", "auto", backbone="pixels")
    settings = json.loads((folder / "config.json").read_text())["settings"]
    assert "auto" not in [value for name, value in settings.items() if name != "lr"]
    assert settings["optimizer"] == "lbfgs" and settings["views"] > 0 and settings["weights"] == "no network"
    assert settings["gain"] == 0 and "data" not in settings and "name" not in settings


def test_runs_in_a_linked_folder_are_found(demo, tmp_path):
    (tmp_path / "disk").mkdir()
    train_in(tmp_path / "disk", demo, "--optimizer", "auto", backbone="pixels")
    (tmp_path / "runs").symlink_to(tmp_path / "disk/runs")
    assert len(train.find_runs(tmp_path / "runs")) == 1


def test_a_trial_tries_a_combination_that_no_trial_has_finished(demo, tmp_path, monkeypatch):
    """A killed command leaves a trial that is never finished."""
    monkeypatch.setattr(train, "SEARCH", {"warp": [0.0, 1.0, 2.0]})
    flags = ["--backbone", "pixels", "--scales", "1:8", "--data", demo]
    assert run("train.py", *flags, "--tune", 1, cwd=tmp_path) == (0, "")
    storage = f"sqlite:///{tmp_path}/runs/demo/pixels/tune/study.db"
    assert run("train.py", *flags, "--tune", 1, "--out", "which?", cwd=tmp_path) == (0, "")
    assert (tmp_path / "which?/demo/pixels/tune/study.db").exists() and not (tmp_path / "which").exists()
    [name] = optuna.get_all_study_names(storage)
    study = optuna.load_study(study_name=name, storage=storage)
    study.enqueue_trial({"warp": 1.0})
    study.ask().suggest_categorical("warp", [0.0, 1.0, 2.0])  # this trial is never finished
    assert run("train.py", *flags, "--tune", 3, cwd=tmp_path) == (0, "")
    trials = pd.read_csv(tmp_path / "runs/demo/pixels/tune/trials.csv")
    assert sorted(trials["params_warp"][trials["state"] == "COMPLETE"]) == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("flags", ["--lr nan", "--seed -1", "--batch-size 1", "--tune 2 --folds 3", "--warp -1"])
def test_impossible_numbers_are_refused_with_the_name_of_the_flag(flags, capsys):
    with pytest.raises(SystemExit):
        train.parse_arguments(["--backbone", "pixels", "--data", "x", *flags.split()])
    assert flags.split()[0] in capsys.readouterr().err.splitlines()[-1]


def test_patch_14_uses_the_nearest_strides_and_an_unsupported_size_gives_an_error():
    assert train.parse_scales(None, train.SCALES["head"], [1, 14, 14], "vit") == [(1, 28, 224), (14, 7, 14)]
    assert train.parse_scales(None, train.SCALES["all"], [1, 32], "vit") == [(1, 56, 56), (32, 14, 14)]
    with pytest.raises(InputError, match="test_vit cannot take pictures of 100 pixels; its own is 160"):
        Classifier("test_vit", 1, image_size=100)


def test_weights_with_a_name_prefix_are_loaded_and_of_another_size_are_refused(tmp_path):
    small, large = (timm.create_model("test_vit", num_classes=0, img_size=size) for size in (64, 128))
    torch.save({f"model.{name}": tensor for name, tensor in large.state_dict().items()}, tmp_path / "large.pt")
    train.load_weights(large, tmp_path / "large.pt")
    with pytest.raises(InputError, match="size mismatch for pos_embed"):
        train.load_weights(small, tmp_path / "large.pt")


def test_a_rank_variable_of_a_job_scheduler_is_ignored_without_torchrun(demo, tmp_path):
    environment = os.environ | {"RANK": "3"}
    command = [sys.executable, ROOT / "train.py", "--backbone", "pixels", "--scales", "1:8", "--data", demo]
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "run folder: " in done.stdout


def test_a_full_disk_gives_an_error_with_the_path_and_leaves_no_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left on device: .*best.pt"):
        train.save_checkpoint(tmp_path / "best.pt", {"a": torch.zeros(3)})
    assert not list(tmp_path.iterdir())


def test_a_grid_has_a_number_of_cells_for_each_axis_and_pixels_keep_their_size():
    model = Classifier("pixels", 1, ["1:5x40"])
    picture = np.zeros((80, 50), np.uint8)  # (m/z, retention time)
    picture[2:4, 10:20] = 255  # cell 1 on both axes
    x = train.make_inputs(model, replace(JET, colormap="gray"), [picture])
    assert x.shape == (1, 3, 80, 50)
    [pooled] = model.pool_maps(x)
    cells = pooled.unflatten(1, (3, 40, 5))[0]
    assert (cells.argmax().item(), cells[0, 1, 1].item(), cells[0].mean().item()) == (
        6,
        1.0,
        pytest.approx(1 / 100 - 1),
    )
    assert Classifier("pixels", 1).scales == [(1, 28, 250)]
