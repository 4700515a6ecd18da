"""Facts about training, on the command line and in its parts."""

import argparse
import csv
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import optuna
import pytest
import timm
import torch
from conftest import ROOT, TINY, call

import deeplcms
import train
from convert import Problem, run_script


def rows_of(path):
    return list(csv.DictReader(open(path)))


def without_seconds(run):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows_of(run / "epochs.csv")]


def weights_of(run, name="best.pt"):
    return torch.load(run / name, weights_only=True)["model"]


def test_best_pt_is_the_epoch_of_lowest_validation_loss_and_gives_its_figures_back(run, demo):
    rows = rows_of(run / "epochs.csv")
    best = min(rows, key=lambda row: float(row["val_loss"]))
    model, checkpoint = deeplcms.load_run(run)
    assert checkpoint["epoch"] == int(best["epoch"])
    data = deeplcms.Pictures(
        deeplcms.find_pictures(demo, ("val",))["val"],
        checkpoint["classes"],
        deeplcms.evaluation_transform(model.image_size, model.mean, model.std),
    )
    logits, labels = deeplcms.predict(model, torch.utils.data.DataLoader(data, 3), torch.device("cpu"))
    assert deeplcms.loss_of(logits, labels).item() == pytest.approx(float(best["val_loss"]), abs=1e-5)
    metrics = deeplcms.metrics_of(labels, deeplcms.probabilities_of(logits))
    assert metrics["accuracy"] == pytest.approx(float(best["val_accuracy"]), abs=1e-5)


def test_a_run_folder_holds_what_the_next_scripts_need(run):
    names = {path.name for path in run.iterdir()}
    assert names >= {"config.json", "epochs.csv", "curves.png", "transformed_grid.png", "best.pt", "last.pt"}
    config = json.loads((run / "config.json").read_text())
    assert config["status"] == "finished" and config["weights_origin"] == "random initialisation"
    checkpoint = deeplcms.load_run(run)[1]
    assert checkpoint["recipe"].rt_max == 10.0 and len(checkpoint["cohort"]["total_intensity"]) > 20


def test_the_same_seed_gives_the_same_figures_with_any_number_of_workers(run, demo, tmp_path):
    arguments = ["--backbone", "test_resnet", "--data", demo, "--grid", 3, "--epochs", 2, "--lr", 0.01, *TINY]
    done = call("train.py", *arguments, "--workers", 2, "--out", tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert without_seconds(tmp_path / "demo/test_resnet/seed2643") == without_seconds(run)


def test_the_range_test_leaves_no_trace(demo, tmp_path):
    arguments = ["--backbone", "test_resnet", "--data", demo, "--grid", 3, "--epochs", 1, *TINY]
    done = call("train.py", *arguments, "--out", tmp_path / "auto", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    auto = tmp_path / "auto/demo/test_resnet/seed2643"
    assert (auto / "lr_find.png").exists() and len(rows_of(auto / "lr_find.csv")) > 10
    lr = json.loads((auto / "config.json").read_text())["lr"]
    call("train.py", *arguments, "--lr", repr(lr), "--out", tmp_path / "given", cwd=tmp_path)
    assert without_seconds(auto) == without_seconds(tmp_path / "given/demo/test_resnet/seed2643")


def test_the_suggested_rate_lies_on_the_first_slope():
    rates = np.geomspace(1e-7, 1, 100)
    slope = 0.7 - 0.5 / (1 + np.exp(-6 * (np.log10(rates) + 2)))
    rise = 5 * np.maximum(0, np.log10(rates) + 0.7)
    noise = np.where(rates > 0.5, -3.0, 0)  # a network shaken by too high a rate may score well by chance
    for losses in (slope + rise, slope + rise + noise):
        lr, reason, _ = train.suggest_lr(rates, losses)
        assert 10**-2.5 < lr < 10**-1.5 and reason == "steepest descent"


def test_where_nothing_descends_the_rate_is_the_usual_one():
    rates = np.geomspace(1e-7, 1, 100)
    for losses in (0.7 + 0.3 * np.maximum(0, np.log10(rates) + 2), np.full(100, 0.7)):
        lr, reason, _ = train.suggest_lr(rates, losses)
        assert lr == 1e-3 and "no descent" in reason


def test_killed_and_resumed_equals_uninterrupted(demo, tmp_path):
    arguments = ["--backbone", "test_resnet", "--data", demo, "--grid", 3, "--epochs", 8, "--lr", 0.01, *TINY]
    whole = call("train.py", *arguments, "--out", "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    command = [sys.executable, ROOT / "train.py", *arguments, "--out", "killed"]
    process = subprocess.Popen(list(map(str, command)), cwd=tmp_path, stdout=subprocess.DEVNULL)
    killed = tmp_path / "killed/demo/test_resnet/seed2643"
    for _ in range(600):
        if (killed / "epochs.csv").exists() and len(rows_of(killed / "epochs.csv")) >= 2:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(rows_of(killed / "epochs.csv")) < 8
    done = call("train.py", "--resume", killed, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = tmp_path / "whole/demo/test_resnet/seed2643"
    assert without_seconds(killed) == without_seconds(expected)
    for name in ("best.pt", "last.pt"):
        for key, value in weights_of(expected, name).items():
            assert torch.equal(weights_of(killed, name)[key], value), (name, key)


def main_with(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["train.py", *map(str, arguments)])
    assert train.main() == 0


def head_of(demo, run, *flags):
    """(tiny network with the weights of `run`, three pictures to be stored, arguments)."""
    arguments = ["--backbone", "test_resnet", "--data", demo, "--finetune", "head", *TINY, "--weights", run / "best.pt"]
    args = train.parse_arguments([*map(str, arguments), *map(str, flags)])
    args.sweep = False
    model, _ = train.build_model(args, "test_resnet", 2)
    pictures = deeplcms.find_pictures(demo, ("val",))["val"][:3]
    return model, train.training_pictures(model, pictures, ["control", "exposed"], args), args


def test_stored_features_equal_fresh_draws(demo, tmp_path, monkeypatch):
    """With as many stored draws as epochs the losses and validation logits of every epoch are those of fresh draws."""
    arguments = ["--backbone", "test_resnet", "--data", demo, "--finetune", "head", "--epochs", 3, "--lr", 0.03, *TINY]
    arguments += ["--erase", 0.5, "--grid", 2, "--seed", train.DRAW_SEED]
    logits, losses, predict = {0: [], 3: []}, {}, deeplcms.predict
    for views, seen in logits.items():
        monkeypatch.setattr(deeplcms, "predict", lambda *a, seen=seen: seen.append(predict(*a)) or seen[-1])
        main_with(monkeypatch, *arguments, "--views", views, "--out", tmp_path / str(views))
        rows = rows_of(tmp_path / str(views) / "demo/test_resnet/seed2643/epochs.csv")
        losses[views] = [float(row[name]) for row in rows for name in ("train_loss", "val_loss")]
    assert losses[3] == pytest.approx(losses[0], abs=1e-4)
    for (fresh, _), (stored, _) in zip(logits[0], logits[3], strict=True):
        torch.testing.assert_close(stored, fresh, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["mobileone_s0", "repvgg_a0", "fastvit_t8", "repvit_m0_9"])
def test_branches_are_fused_for_extraction_alone_and_give_the_same_features(demo, run, name):
    _, pictures, args = head_of(demo, run)
    model = deeplcms.Classifier(name, 2, image_size=64).freeze()
    parts = len(list(model.modules()))
    [stored] = train.extract_features(model, pictures, 1, args, torch.device("cpu"))
    model.eval()
    with torch.inference_mode():
        expected = model.features(torch.stack([x for x, _ in pictures]))
    torch.testing.assert_close(stored, expected, rtol=0, atol=1e-4 * expected.std().item())
    assert len(list(model.modules())) == parts


def test_stored_features_are_named_by_all_that_changes_them(demo, run, tmp_path):
    state = torch.load(run / "best.pt", weights_only=True)["model"]
    state["backbone.conv1.0.weight"][0, 0, 0, 0] += 1e-6
    torch.save(state, tmp_path / "other.pt")

    def name(*flags):
        model, pictures, args = head_of(demo, run, "--views", 2, *flags)
        return train.features_file(model, pictures, args.views, args, torch.device("cpu"))

    assert name("--seed", 1, "--epochs", 9, "--lr", 1, "--batch-size", 4, "--folds", 2) == name()
    changes = [("--rotate", 4), ("--color-jitter", 0.1), ("--erase", 0.5), ("--image-size", 96), ("--grid", 2)]
    changes += [("--views", 3), ("--weights", tmp_path / "other.pt"), ("--amp",)]
    assert len({name(), *(name(*flags) for flags in changes)}) == 1 + len(changes)


def test_stored_features_are_never_those_of_another_picture(demo, tmp_path, monkeypatch, capsys):
    data = tmp_path / "demo"
    shutil.copytree(demo, data, ignore=shutil.ignore_patterns("raw"))
    arguments = ["--backbone", "test_resnet", "--data", data, "--finetune", "head", "--epochs", 1, "--lr", 0.03, *TINY]
    main_with(monkeypatch, *arguments, "--out", tmp_path)
    one, other = sorted((data / "train" / "control").glob("*.png"))[:2]
    shutil.copyfile(other, one)
    capsys.readouterr()
    main_with(monkeypatch, *arguments, "--out", tmp_path)
    said = capsys.readouterr().out
    assert said.count("extracting features") == 1 and "stored features" in said  # validation is unchanged


def test_folds_seeds_and_trials_share_one_extraction(tmp_path, run, monkeypatch, capsys):
    data = tmp_path / "demo"
    done = call("convert.py", "--demo", data, "--runs", 20, "--bins", 32, "--augment", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    arguments = ["--backbone", "test_resnet", "--data", data, "--finetune", "head", "--epochs", 1, "--lr", 0.03, *TINY]
    arguments += ["--weights", run / "best.pt", "--out", tmp_path]
    for flags, extractions in [
        (["--folds", 2, "--repeats", 2], 2),  # training and validation pictures
        (["--repeats", 2], 2),
        (["--tune", 2], 0),
    ]:
        main_with(monkeypatch, *arguments, *flags)
        assert capsys.readouterr().out.count("extracting features") == extractions, flags


def test_an_extraction_that_is_stopped_leaves_no_file_and_a_damaged_file_is_made_again(
    demo, run, tmp_path, monkeypatch, capsys
):
    model, pictures, args = head_of(demo, run, "--out", tmp_path)

    def store():
        return train.stored_features(model, pictures, pictures.pictures, 2, "training", args, torch.device("cpu"))

    def stopped(contents, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(torch, "save", stopped)
        store()
    assert not list((tmp_path / "features").iterdir())
    whole = store().features
    [path] = (tmp_path / "features").iterdir()
    contents = path.read_bytes()
    for damaged in (b"", contents[: len(contents) // 2]):
        path.write_bytes(damaged)
        assert torch.equal(store().features, whole) and "is damaged and made again" in capsys.readouterr().out
    assert torch.equal(store().features, whole) and "stored features of 3" in capsys.readouterr().out


def test_folds_keep_samples_and_their_copies_together(demo):
    class Fake:
        def __init__(self, name, phenotype, copy=False, group=""):
            self.sample_name, self.phenotype, self.is_copy, self.group = name, phenotype, copy, group

    pictures = [Fake(f"s{i}", "AB"[i % 2], copy) for i in range(30) for copy in (False, True)]
    folds = train.fold_of(pictures, 5, seed=1)
    assert len(folds) == 30
    for fold in range(5):
        members = [p for p in pictures if folds[p.sample_name] == fold and not p.is_copy]
        assert sorted(p.phenotype for p in members) == ["A"] * 3 + ["B"] * 3
    grouped = [Fake(f"s{i}", "AB"[i % 2], group=f"person{i // 3}") for i in range(30)]
    folds = train.fold_of(grouped, 5, seed=1)
    for person in range(10):
        assert len({folds[f"s{i}"] for i in range(3 * person, 3 * person + 3)}) == 1


def test_batches_hold_every_picture_once_and_never_one_alone():
    batches = train.EpochBatches(33, 8, seed=3)
    first = list(batches)
    assert sorted(i for batch in first for i, _ in batch) == list(range(33)) and min(map(len, first)) > 1
    batches.epoch = 1
    assert [i for batch in batches for i, _ in batch] != [i for batch in first for i, _ in batch]
    assert {draw for batch in batches for _, draw in batch} == {1}
    assert min(map(len, train.EpochBatches(19, 2, seed=3))) == 2


def test_pretrained_weights_come_from_the_local_cache(tmp_path, monkeypatch):
    """A Hub cache that the test fills: `pretrained` loads exactly these weights, without network."""
    import safetensors.torch

    source = timm.create_model("test_resnet", pretrained=False)
    repository = tmp_path / "models--timm--test_resnet.r160_in1k"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    safetensors.torch.save_file(source.state_dict(), snapshot / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    args = train.parse_arguments(["--backbone", "test_resnet", "--weights", "pretrained", "--data", "x"])
    args.sweep = False
    model, origin = train.build_model(args, "test_resnet", 2)
    assert "pretrained" in origin and model.frozen
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name])


def test_without_the_hub_auto_starts_where_random_does(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    weights = []
    for choice in ("auto", "random"):
        args = train.parse_arguments(["--backbone", "test_resnet", "--weights", choice, "--data", "x"])
        args.sweep = False
        torch.manual_seed(args.seed)
        model, origin = train.build_model(args, "test_resnet", 2)
        assert origin == "random initialisation" and not model.frozen
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    assert "warning: no pretrained weights of test_resnet could be had" in capsys.readouterr().out


def test_weights_from_files_with_a_classifier_of_another_size(run, tmp_path):
    import safetensors.torch

    source = timm.create_model("test_resnet", num_classes=17)
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    safetensors.torch.save_file(source.state_dict(), tmp_path / "weights.safetensors")
    for path in (tmp_path / "weights.pt", tmp_path / "weights.safetensors"):
        model = deeplcms.Classifier("test_resnet", 2, image_size=64)
        train.load_weights(model, path)
        assert torch.equal(model.backbone.state_dict()["conv1.0.weight"], source.state_dict()["conv1.0.weight"])
    train.load_weights(model, run / "best.pt")
    assert torch.equal(model.backbone.conv1[0].weight, weights_of(run)["backbone.conv1.0.weight"])
    with pytest.raises(Problem, match="same --backbone"):
        train.load_weights(deeplcms.Classifier("test_vit", 2), tmp_path / "weights.pt")


def test_two_processes_take_the_steps_of_one_with_twice_the_batch(demo, tmp_path):
    """A frozen backbone has no batch statistics that move: the figures agree within float tolerance."""
    arguments = ["--backbone", "test_resnet", "--data", demo, "--finetune", "head", "--views", 0, "--epochs", 2]
    arguments += [*TINY, "--lr", 0.05, "--workers", 0]
    one = call("train.py", *arguments, "--batch-size", 10, "--out", "one", cwd=tmp_path)
    assert one.returncode == 0, one.stderr
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29631"]
    command += [str(ROOT / "train.py"), *map(str, arguments), "--batch-size", "5", "--out", "two"]
    for folder in ("seed2643", "seed2643-2"):  # the same command again goes to another folder, in both processes
        two = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert two.returncode == 0, two.stderr
        assert (tmp_path / "two/demo/test_resnet" / folder / "best.pt").exists()
    for a, b in zip(
        *(rows_of(tmp_path / f"{n}/demo/test_resnet/seed2643/epochs.csv") for n in ("one", "two")), strict=True
    ):
        for name in ("train_loss", "val_loss", "val_accuracy"):
            assert float(a[name]) == pytest.approx(float(b[name]), abs=1e-5)


def test_a_sweep_started_again_skips_what_is_done_and_goes_on_after_a_failure(demo, tmp_path):
    backbones = ["inception_v3", "test_resnet", "pixels"]  # the first cannot do with pictures of 64 pixels
    arguments = ["--backbone", *backbones, "--data", demo, "--epochs", 1, "--lr", 0.01, *TINY]
    first = call("train.py", *arguments, cwd=tmp_path)
    assert first.returncode == 1 and "Traceback" not in first.stderr
    assert "left out: inception_v3, seed 2643: inception_v3 cannot do with pictures of 64 x 64" in first.stderr
    again = call("train.py", *arguments, cwd=tmp_path)
    assert again.stdout.count("is finished already") == 2
    assert len(list(tmp_path.glob("runs/demo/*/seed*/best.pt"))) == 2


def test_without_data_the_demo_trains_at_its_own_settings_and_stops_early(demo):
    arguments = ["--backbone", "test_resnet", "--weights", "random", "--image-size", 64, "--shuffle-labels"]
    done = call("train.py", *arguments, "--epochs", 30, "--patience", 1, cwd=demo.parent)
    assert done.returncode == 0, done.stderr
    folder = demo.parent / "runs/demo/test_resnet/seed2643-shuffled"
    config = json.loads((folder / "config.json").read_text())
    assert config["shuffle_labels"] and config["grid"] == train.DEMO["grid"] and config["lr"] == train.DEMO["lr"]
    assert len(rows_of(folder / "epochs.csv")) == config["best"]["epoch"] + 1 < 30


def test_pixels_keep_a_grid_of_their_own_beside_networks_and_in_the_demo():
    grids = []
    for flags in ("pixels", "pixels --grid 7", "pixels vit --grid 7", "pixels --data x", "pixels --grid 7 --data x"):
        args = train.parse_arguments(["--backbone", *flags.split()])
        grids.append(train.describe(args, "pixels", None)["grid"])
    assert grids == [None, 7, None, None, 7]


def test_patterns_keep_the_backbones_of_a_size():
    assert train.expand_backbones(["regnetx_0*"], (6, 8)) == ["regnetx_006", "regnetx_008"]
    assert len(train.expand_backbones(["article", "regnetx_002"], None)) == 31


def test_tuning_covers_the_eight_combinations_in_eight_trials(demo, tmp_path):
    arguments = ["--backbone", "pixels", "--data", demo, "--epochs", 2, "--lr", 0.01, "--tune", 8, *TINY]
    done = call("train.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    trials = rows_of(tmp_path / "runs/demo/pixels/tune/trials.csv")
    assert len({(t["params_optimizer"], t["params_scheduler"]) for t in trials}) == 8 == len(trials)
    # The command that it prints trains with the settings of the best trial, all else as given.
    winner = train.parse_arguments(shlex.split(done.stdout.splitlines()[-1])[2:])
    best = min(trials, key=lambda trial: float(trial["value"]))
    assert (winner.optimizer, winner.scheduler) == (best["params_optimizer"], best["params_scheduler"])
    assert (winner.image_size, winner.erase, winner.weights, winner.epochs, winner.lr) == (64, 0, "random", 2, 0.01)
    # More trials go on with the same study and try the combinations again, with the pictures in another order.
    assert call("train.py", *arguments, "--tune", 9, cwd=tmp_path).returncode == 0
    trials = rows_of(tmp_path / "runs/demo/pixels/tune/trials.csv")
    again = next(trial for trial in trials[:8] if trial["params_optimizer"] == trials[8]["params_optimizer"])
    assert len(trials) == 9 and trials[8]["params_scheduler"] == again["params_scheduler"]
    assert int(trials[8]["user_attrs_seed"]) == int(again["user_attrs_seed"]) + 1
    assert trials[8]["value"] != again["value"]


def test_two_processes_share_one_study_without_losing_a_trial(demo, tmp_path):
    arguments = ["--backbone", "pixels", "--data", demo, "--epochs", 2, "--lr", 0.01, "--tune", 8, *TINY]
    arguments += ["--storage", "sqlite:///shared.db"]
    command = [sys.executable, str(ROOT / "train.py"), *map(str, arguments)]
    options = {"cwd": tmp_path, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **options) for _ in range(2)]
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path}/shared.db")
    finished = [trial for trial in study.trials if trial.state.is_finished()]
    assert len(finished) >= 8 and not [trial for trial in finished if trial.state.name == "FAIL"]
    assert {trial.number for trial in study.trials} == set(range(len(study.trials)))
    assert len({tuple(trial.params.values()) for trial in finished}) == 8


def test_shuffled_labels_follow_the_parent_and_keep_the_counts(demo):
    pictures = deeplcms.find_pictures(demo, ("train",))["train"]
    before = [p.phenotype for p in pictures]
    after = [p.phenotype for p in train.shuffled_labels(pictures, 1)]
    assert sorted(before) == sorted(after) and before != after


def test_shuffled_labels_change_something_and_leave_groups_whole(demo):
    pictures = deeplcms.find_pictures(demo, ("train",))["train"]
    few = [pictures[0], pictures[-1]]  # one of each phenotype: half of all deals would change nothing
    assert all(train.shuffled_labels(few, seed)[0].phenotype == few[1].phenotype for seed in range(5))
    for picture in pictures:
        picture.group = picture.phenotype[0] + picture.sample_name[-1]  # up to five runs a person
    after = train.shuffled_labels(pictures, 1)
    assert len({(p.group, p.phenotype) for p in after}) == len({p.group for p in pictures})
    assert [p.phenotype for p in after] != [p.phenotype for p in pictures]


def test_shuffled_labels_of_folds_are_dealt_among_all_of_them(demo):
    pictures = deeplcms.find_pictures(demo, ("train", "val"))
    args = argparse.Namespace(shuffle_labels=True, seed=1, folds=3, positive=None)
    split = {name: train.split_pictures(pictures, args, fold) for fold, name in enumerate("abc")}
    dealt = [{p.sample_name: p.phenotype for p in part[0] + part[1]} for part in split.values()]
    assert dealt[0] == dealt[1] == dealt[2]  # one deal for all folds, over training and validation together
    assert Counter(dealt[0].values()) == Counter(p.phenotype for part in pictures.values() for p in part)
    args.folds = 30
    with pytest.raises(Problem, match="--folds 30: .*samples or groups of"):
        train.split_pictures(pictures, args, 0)


@pytest.mark.parametrize(
    "arguments, status, words",
    [
        (["--backbone", "mobilone_s3", "--data", "demo"], 2, "mobileone_s3"),
        (["--backbone", "test_resnet", "--data", "nowhere"], 2, "nowhere: no such data set"),
        (["--backbone", "test_resnet", "--data", "empty"], 2, "no pictures in train"),
        (["--backbone", "test_resnet", "--data", "demo", "--positive", "ill"], 2, "control, exposed"),
        (["--backbone", "test_resnet", "--data", "demo", "--weights", "gone.pt"], 2, "gone.pt: no such file"),
        (["--backbone", "test_resnet", "--data", "demo", "--weights", "pretrained"], 1, "--weights FILE or random"),
        (["--backbone", "test_resnet", "--data", "demo", "--views", "3", *TINY], 2, "--finetune head"),
        (["--backbone", "test_resnet", "--data", "demo", "--erase", "2"], 2, "--erase: 2 must be a number from 0 to 1"),
        (["--backbone", "test_resnet", "--data", "demo", "--views", "-1"], 2, "--views: -1 must be"),
        (["--resume", "empty"], 2, "no config.json"),
        (["--backbone", "test_resnet", "--data", "demo", "--lr", "1e30", "--epochs", "2", *TINY], 1, "--lr"),
        (["--data", "demo"], 2, "--backbone"),
    ],
)
def test_wrong_use_ends_in_one_clear_line(demo, tmp_path, monkeypatch, capsys, arguments, status, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "demo").symlink_to(demo)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        run_script(train.main)
    assert end.value.code == status
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("train.py: ") and words in lines[-1]
    assert not list(tmp_path.glob("runs/demo/*/seed*/best.pt"))


@pytest.mark.skipif("DEEPLCMS_SLOW" not in os.environ, reason="takes minutes; set DEEPLCMS_SLOW=1 to run it")
@pytest.mark.parametrize("name", train.ARTICLE)
def test_every_architecture_of_the_articles_table_1_trains(name):
    """Built from its name, one step forward and one backward on two pictures, at a finite loss."""
    model = deeplcms.Classifier(name, 2).train()
    x = torch.rand(2, 3, model.image_size, model.image_size)
    loss = deeplcms.loss_of(model(x), torch.tensor([0, 1]))
    loss.backward()
    assert torch.isfinite(loss) and model.head.weight.grad.abs().sum() > 0
