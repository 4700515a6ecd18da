"""Train a classifier of pseudo-images: a timm backbone, a new head, one visible loop.

Article, "Transfer learning", "Hyperparameter optimisation" and "Evaluating the final model". The heart is `fit`, the
training loop; what is fed into it (fresh pictures or stored features, all of them or a fold, a share of them in each
of several processes) is decided before it, in `make_loaders`.

    python train.py --backbone mobileone_s3                       # the demo cohort, made first if it is not there
    python train.py --backbone mobileone_s3 --data data/golestan --repeats 5
    python train.py --backbone article --data data/golestan       # Table 1; then: python evaluate.py runs/golestan
    python train.py --backbone convnext_nano pixels --data data/golestan --folds 5
    python train.py --backbone mobileone_s3 --data data/golestan --tune 8
    torchrun --nproc-per-node 4 train.py --backbone convnext_large --data data/golestan --finetune all

Under torchrun every process takes its share of each batch and gradients are averaged, so that W processes with batch
size B take the steps of one process with batch size W x B - but for batch statistics: a batch norm that is being
trained sees the share of its own process only, and process 0's running statistics are the ones that are saved.
"""

import argparse
import contextlib
import copy
import functools
import hashlib
import itertools
import json
import math
import os
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
import zlib
from collections import Counter, defaultdict
from importlib.metadata import version
from pathlib import Path

import huggingface_hub
import matplotlib
import numpy as np
import optuna
import sqlalchemy
import timm
import torch
import torch.distributed as dist
from scipy.ndimage import gaussian_filter1d
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import deeplcms
from convert import STATISTICS, Parser, Problem, bounded, first_line, run_script, whole_file, write_csv, write_rows
from deeplcms import Classifier, Pictures, choose_device, figure, load_checkpoint, loss_of, metrics_of, probabilities_of

# The 30 distinct names among the 32 rows of the article's Table 1: one model of 10-20 million parameters a family.
ARTICLE = """
    mobileone_s3.apple_in1k densenet169.tv_in1k mobilevitv2_150.cvnets_in22k_ft_in1k_384 convnext_nano.in12k_ft_in1k
    repvit_m3.dist_in1k cait_xxs24_224.fb_dist_in1k repvgg_a1.rvgg_in1k efficientformer_l1.snap_dist_in1k
    hrnet_w18_small.gluon_in1k gmlp_s16_224.ra3_in1k fastvit_sa12.apple_dist_in1k lambda_resnet26t.c1_in1k
    efficientvit_m5.r224_in1k eca_resnext26ts.ch_in1k ghostnetv2_160.in1k nf_regnet_b1.ra2_in1k
    coatnet_nano_rw_224.sw_in1k legacy_seresnet18.in1k haloregnetz_b.ra3_in1k xcit_tiny_24_p8_384.fb_dist_in1k
    resmlp_12_224.fb_distilled_in1k gcvit_xxtiny.in1k resnest14d.gluon_in1k edgenext_base.in21k_ft_in1k
    maxvit_nano_rw_256.sw_in1k coat_mini.in1k tf_efficientnetv2_b2.in1k fbnetv3_d.ra2_in1k rexnet_200.nav_in1k
    mixnet_xl.ra_in1k""".split()

# What takes the place of the defaults when no --data is given, so that two CPU cores need minutes, not hours. In so few
# and small batches MobileOne's loss has no descent yet that a range test could find: the rate is given. The whole
# network is trained, with pretrained weights too: what was measured to work with and without a network.
DEMO = {"image_size": 128, "grid": 3, "batch_size": 8, "epochs": 20, "lr": 0.03, "erase": 0.0, "finetune": "all"}

OPTIMIZERS = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adamax": torch.optim.Adamax,
    "rmsprop": torch.optim.RMSprop,
}
SCHEDULERS = ("cosine", "plateau")
FINISHED = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
DRAW_SEED = 2643  # of stored draws

# ---------------------------------------------------------------- the processes of torchrun

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def say(text):
    if RANK == 0:
        tqdm.write(text)
        sys.stdout.flush()  # into a log file too, line by line


def gathered(value):
    """The list of every process's value, in every process."""
    if WORLD == 1:
        return [value]
    values = [None] * WORLD
    dist.all_gather_object(values, value)
    return values


# ---------------------------------------------------------------- weights


@functools.cache
def offline_if_unreachable():
    """One quick question to the Hub of pretrained weights; without an answer only its local cache is used."""
    try:
        urllib.request.urlopen(huggingface_hub.constants.ENDPOINT, timeout=5).close()
    except urllib.error.HTTPError:
        pass  # it answered
    except OSError:
        huggingface_hub.constants.HF_HUB_OFFLINE = True


def grid_of(args, backbone):
    """--grid is meant for networks: pixels beside them, or at the demo's settings, keep the grid of their own."""
    others = len(args.backbone) > 1 or (args.demo and args.grid == DEMO["grid"])
    return None if backbone == "pixels" and others else args.grid


def build_model(args, backbone, n_classes):
    """(model, where its weights come from); frozen or not, as --weights and --finetune ask."""
    options = {"grid": grid_of(args, backbone), "image_size": args.image_size}
    if backbone == "pixels":
        return Classifier(backbone, n_classes, **options).freeze(), "no network"
    origin = "random initialisation"
    if args.weights in ("auto", "pretrained"):
        offline_if_unreachable()
        try:
            model = Classifier(backbone, n_classes, pretrained=True, **options)
            origin = f"pretrained ({timm.get_pretrained_cfg(backbone).hf_hub_id or backbone})"
        except Problem:
            raise
        except Exception as error:  # the Hub, its cache and timm each have their own exceptions
            missing = f"no pretrained weights of {backbone} could be had ({type(error).__name__})"
            if args.weights == "pretrained":
                raise Problem(f"{missing}: connect to the network once, or give --weights FILE or random") from None
            whole = ", and the whole network is trained" if args.finetune != "head" else ""
            say(f"warning: {missing}: {origin}{whole}")
            torch.manual_seed(args.seed)  # the attempt has used random numbers: start where --weights random does
            model = Classifier(backbone, n_classes, **options)
    else:
        model = Classifier(backbone, n_classes, **options)
        if args.weights != "random":
            load_weights(model, args.weights)
            origin = f"file {args.weights}"
    frozen = (args.finetune or ("all" if origin == "random initialisation" else "head")) == "head"
    if args.views not in ("auto", 0) and not frozen:
        raise Problem("--views stores the features of a frozen backbone; this one is trained: use --finetune head", 2)
    return model.freeze() if frozen else model, origin


def load_weights(model, path):
    """Load a backbone from a state dict (.pt, .safetensors) or from the best.pt of another run; drop its classifier."""
    if str(path).endswith(".safetensors"):
        import safetensors.torch

        try:
            state = safetensors.torch.load_file(path)
        except (OSError, safetensors.SafetensorError) as error:
            raise Problem(f"--weights {path}: {error}", 2) from None
    else:
        state = load_checkpoint(path)
    if not isinstance(state, dict):
        raise Problem(f"--weights {path}: not a state dict", 2)
    state = state.get("model", state.get("state_dict", state))
    if any(name.startswith("backbone.") for name in state):
        state = {name.removeprefix("backbone."): t for name, t in state.items() if name.startswith("backbone.")}
    own = model.backbone.state_dict()
    wrong = [name for name in own if name not in state or state[name].shape != own[name].shape]
    if wrong:
        raise Problem(
            f"--weights {path}: {len(wrong)} of {len(own)} tensors of this backbone are missing or of another shape, "
            f"{wrong[0]} first: is it the same --backbone?",
            2,
        )
    model.backbone.load_state_dict({name: state[name] for name in own})


# ---------------------------------------------------------------- batches, fresh or stored


class EpochBatches:
    """Batches of (picture, draw) for the epoch in `.epoch`: shuffled, nearly equal in size, shared by the processes.

    Order and draws follow from seed and epoch alone, so a restart needs no memory of the past. A batch is never a
    leftover of one, which batch norm could not standardise.
    """

    def __init__(self, n, batch_size, seed):
        self.n, self.seed, self.epoch = n, seed, 0
        self.n_batches = max(1, min(math.ceil(n / (batch_size * WORLD)), n // (2 * WORLD)))

    def __len__(self):
        return self.n_batches

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        for batch in torch.tensor_split(torch.randperm(self.n, generator=generator), self.n_batches):
            yield [(i, self.epoch) for i in batch[RANK::WORLD].tolist()]


class StoredFeatures(Dataset):
    """Pooled features (K, pool, F) in place of the pictures in these rows. Item (i, draw): (features (F,), class).

    After K draws the first comes again. Folds and trials pick their rows from one array, which a file that was there is
    mapped to: nothing is copied.
    """

    def __init__(self, features, rows, labels):
        self.features, self.rows, self.labels = features, rows, labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, key):
        i, draw = key if isinstance(key, tuple) else (key, 0)
        return self.features[draw % len(self.features), self.rows[i]], self.labels[i]


class AllDraws(Dataset):
    """Draws 0 ... K-1 of each picture (K, 3, size, size): decoded once for all of them."""

    def __init__(self, pictures, n_draws):
        self.pictures, self.n_draws = pictures, n_draws

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, i):
        return self.pictures.draws(i, range(self.n_draws))


def features_file(model, pictures, n_draws, args, device):
    """Path of the stored features of `pictures` (a Pictures): a digest of all that changes them.

    That is pictures, transform, draws, architecture, weights, grid and versions - not labels, seed, fold or trial.
    """
    digest = hashlib.sha256()
    for picture in pictures.pictures:
        digest.update(picture.path.name.encode() + picture.path.read_bytes())
    for name, tensor in model.backbone.state_dict().items():
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    settings = (model.backbone, model.image_size, model.grid, pictures.transform, pictures.seed, n_draws)
    digest.update(repr((settings, args.amp, str(device), torch.__version__, timm.__version__)).encode())
    return Path(args.out) / "features" / f"{digest.hexdigest()[:32]}.pt"


def inference_copy(model):
    """A copy for the forward pass alone: branches fused (MobileOne, RepVGG, FastViT, ...), channels-last layout.

    Twice as fast for MobileOne-S3 on a CPU, the fused layers a third faster again for the layout.
    """
    return timm.utils.reparameterize_model(model).to(memory_format=torch.channels_last).eval()


def extract_features(model, pictures, n_draws, args, device):
    """Pooled features (n_draws, N, F) of random draws of `pictures` (a Pictures), each decoded once."""
    fast = inference_copy(model)
    features = torch.empty(n_draws, len(pictures), model.head.in_features)
    n = max(1, max(args.batch_size, 32) // n_draws)
    loader = DataLoader(AllDraws(pictures, n_draws), n, num_workers=args.workers, pin_memory=device.type == "cuda")
    with torch.inference_mode(), autocast(args, device):
        for part, draws in zip(features.split(n, dim=1), progress(loader, "extracting"), strict=True):
            draws = draws.to(device, non_blocking=True)  # (n, n_draws, 3, size, size)
            batch = fast.features(draws.flatten(0, 1).contiguous(memory_format=torch.channels_last))
            part.copy_(batch.unflatten(0, draws.shape[:2]).transpose(0, 1))
    return features


def stored_features(model, pictures, pool, n_draws, what, args, device):
    """The pooled features of a frozen backbone in place of `pictures` (a Pictures), n_draws random draws of each.

    They are extracted for every picture of `pool` and kept in a file, which is used again where it is there.
    """
    everything = Pictures(pool, [], pictures.transform, pictures.seed)
    path = features_file(model, everything, n_draws, args, device)
    features = None
    amount = f"features of {len(pool)} {what} pictures x {n_draws} draws"
    if path.exists():
        try:
            features = load_checkpoint(path, mmap=True)
            say(f"stored {amount}: {path}")
        except Problem:
            say(f"{path} is damaged and made again")
    if features is None:
        size = 4 * n_draws * len(pool) * model.head.in_features / 1e6
        say(f"extracting {amount}: {size:.1f} MB in {path}")
        features = extract_features(model, everything, n_draws, args, device)
        if RANK == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            deeplcms.save_checkpoint(path, features)
    row = {picture.path: i for i, picture in enumerate(pool)}
    return StoredFeatures(features, [row[picture.path] for picture in pictures.pictures], pictures.labels)


def training_pictures(model, pictures, classes, args):
    """A list of Picture as the network sees them in training, augmented as the flags ask.

    Draws that are stored have a seed of their own, so that repeats, folds and trials share them.
    """
    zero, strengths = pictures[0].recipe.zero_colour(), (args.rotate, args.color_jitter, args.erase)
    transform = deeplcms.training_transform(model.image_size, model.mean, model.std, zero, *strengths)
    return Pictures(pictures, classes, transform, DRAW_SEED if model.frozen and args.views else args.seed)


def make_loaders(model, train, val, pictures, classes, args, device):
    """{"train", "val"} data loaders of pictures, or with --views K of stored features; the loop does not see which.

    train and val: lists of Picture, out of those of the data set. Fits the standardisation of a frozen backbone on
    draw 0 of the training pictures.
    """
    views = args.views
    if views == "auto":
        views = 4 if model.frozen else 0
        if model.frozen:
            say("--views auto: the backbone is frozen, so 4 draws of each picture are run through it once and stored")
    train_set = training_pictures(model, train, classes, args)
    val_set = Pictures(val, classes, deeplcms.evaluation_transform(model.image_size, model.mean, model.std))
    if views:
        # All folds share the features of all pictures.
        pools = [pictures["train"] + pictures["val"]] * 2 if args.folds else [pictures["train"], pictures["val"]]
        held_out = [picture for picture in pools[1] if not picture.is_copy]
        train_set = stored_features(model, train_set, pools[0], views, "training", args, device)
        val_set = stored_features(model, val_set, held_out, 1, "validation", args, device)
    options = {"num_workers": 0 if views else args.workers, "pin_memory": device.type == "cuda"}
    options["persistent_workers"] = options["num_workers"] > 0
    batches = EpochBatches(len(train_set), args.batch_size, args.seed)
    mine = torch.utils.data.Subset(val_set, range(RANK, len(val_set), WORLD))
    loaders = {
        "train": DataLoader(train_set, batch_sampler=batches, **options),
        "val": DataLoader(mine, max(args.batch_size, 32), **options),
    }
    if model.frozen:
        everything = DataLoader(train_set, 32, num_workers=options["num_workers"])
        model.fit_standardize(
            x if x.ndim == 2 else model.features(x.to(device)) for x, _ in progress(everything, "standardising")
        )
    return loaders


# ---------------------------------------------------------------- the loop


def progress(batches, title):
    return tqdm(batches, desc=title, unit="batch", leave=False, disable=None if RANK == 0 else True)


def autocast(args, device):
    """Mixed precision: float16 on CUDA (default there), bfloat16 on the CPU with --amp."""
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=args.amp)


def make_optimizer(model, args, lr):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return OPTIMIZERS[args.optimizer](trained, lr=lr, weight_decay=args.weight_decay)


def make_scheduler(optimizer, args):
    if args.scheduler == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=max(1, args.patience // 3))


def train_batch(model, optimizer, scaler, x, y, args, device):
    """One step of gradient descent. Returns (summed loss of the whole batch, logits and labels of this process)."""
    x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
    optimizer.zero_grad()
    with autocast(args, device):
        logits = model(x)
    loss = loss_of(logits.float(), y, reduction="sum")
    totals = torch.stack([loss.detach(), loss.new_tensor(len(y))])
    if WORLD > 1:
        dist.all_reduce(totals)
    scaler.scale(loss / totals[1]).backward()
    if WORLD > 1:
        for parameter in model.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
    scaler.step(optimizer)
    scaler.update()
    return totals[0].item(), logits.detach().float().cpu(), y.cpu()


def validate(model, loader, args, device):
    """(loss, metrics) of the whole validation set, each process having seen its share."""
    with autocast(args, device):
        logits, labels = deeplcms.predict(model, loader, device)
    logits, labels = map(torch.cat, zip(*gathered((logits, labels)), strict=True))
    return loss_of(logits, labels).item(), metrics_of(labels, probabilities_of(logits))


def fit(model, loaders, args, device, lr, run=None, facts=None, start=None, after_epoch=lambda row: None):
    """The training loop: epochs of batches, validation, schedule, early stopping, checkpoints. Returns its history.

    run: folder for best.pt, last.pt, epochs.csv (None: nothing is written); facts: what the checkpoints hold besides
    weights; start: contents of a last.pt to go on from.
    """
    optimizer = make_optimizer(model, args, lr)
    scheduler = make_scheduler(optimizer, args)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp and device.type == "cuda")
    history, best_weights = [], None
    if start:
        model.load_state_dict(start["model"], strict=not model.frozen)
        best_weights = start["best_weights"]
        optimizer.load_state_dict(start["optimizer"])
        scheduler.load_state_dict(start["scheduler"])
        scaler.load_state_dict(start["scaler"])
        history = start["history"]

    for epoch in range(len(history) + 1, args.epochs + 1):
        best = best_of(history)
        if best and epoch - 1 - best["epoch"] >= args.patience:
            say(f"no better validation loss for {args.patience} epochs: stopped")
            break
        began = time.time()
        torch.manual_seed(args.seed * 1_000_003 + epoch)  # dropout and the like
        loaders["train"].batch_sampler.epoch = epoch - 1
        model.train()
        total, logits, labels = 0.0, [], []
        bar = progress(loaders["train"], f"epoch {epoch}/{args.epochs}")
        for x, y in bar:
            loss, batch_logits, batch_labels = train_batch(model, optimizer, scaler, x, y, args, device)
            total += loss
            logits.append(batch_logits)
            labels.append(batch_labels)
            bar.set_postfix(loss=f"{loss / (len(y) * WORLD):.3f}")
        logits, labels = map(torch.cat, zip(*gathered((torch.cat(logits), torch.cat(labels))), strict=True))
        train_loss = total / len(labels)
        val_loss, val = validate(model, loaders["val"], args, device)
        if not (math.isfinite(train_loss) and math.isfinite(val_loss)):
            kept = f"; the last good epoch is in {run}/last.pt" if run and history else ""
            bad = val_loss if math.isfinite(train_loss) else train_loss
            raise Problem(f"the loss became {bad} in epoch {epoch}: try a lower --lr than {lr:.2g}{kept}")
        row = {"epoch": epoch, "train_loss": train_loss, "val_loss": val_loss}
        row["train_accuracy"] = metrics_of(labels, probabilities_of(logits))["accuracy"]
        row |= {f"val_{name}": val[name] for name in ("accuracy", "precision", "recall", "f1", "roc_auc")}
        row |= {"lr": optimizer.param_groups[0]["lr"], "seconds": round(time.time() - began, 2)}
        history.append(row)
        scheduler.step(*([val_loss] if args.scheduler == "plateau" else []))
        improved = best is None or val_loss < best["val_loss"]
        if run and RANK == 0:
            # best.pt before last.pt: killed in between, the epoch is run again and best.pt written again, the same.
            if improved and not model.frozen:
                deeplcms.save_checkpoint(run / "best.pt", facts | {"model": model.state_dict(), "epoch": epoch})
            elif improved:  # an epoch on stored features is shorter than writing a backbone: that follows at the end
                best_weights = copy.deepcopy(trained_weights(model))
            states = {"optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
            states = {name: part.state_dict() for name, part in states.items()}
            states |= {"model": trained_weights(model), "best_weights": best_weights, "history": history}
            deeplcms.save_checkpoint(run / "last.pt", states)
            write_rows(run / "epochs.csv", history)
        say(
            f"epoch {epoch:3d}/{args.epochs}  train loss {train_loss:.3f}  validation loss {val_loss:.3f}  "
            f"accuracy {val['accuracy']:.3f}  F1 {val['f1']:.3f}  AUC {val['roc_auc']:.3f}  {row['seconds']:.1f} s"
            + ("  *" if improved else "")
        )
        after_epoch(row)
    if run and RANK == 0 and model.frozen:
        model.load_state_dict(best_weights, strict=False)
        epoch = best_of(history)["epoch"]
        deeplcms.save_checkpoint(run / "best.pt", facts | {"model": model.state_dict(), "epoch": epoch})
    return history


def best_of(history):
    """The epoch of lowest validation loss, None before the first."""
    return min(history, key=lambda row: row["val_loss"], default=None)


def trained_weights(model):
    """The part of the state that training changes: all of it, or what is not the backbone of a frozen one."""
    state = model.state_dict()
    return {name: t for name, t in state.items() if not (model.frozen and name.startswith("backbone."))}


# ---------------------------------------------------------------- learning-rate range test


def find_lr(model, loader, args, device, run=None):
    """Learning rate of steepest descent (Smith 2017, arXiv:1506.01186); leaves everything else as it was.

    The rate grows geometrically from 1e-7 to 1 over 100 batches, until the running mean of the loss exceeds
    four times its best. Writes lr_find.csv and lr_find.png into `run`.
    """
    before = copy.deepcopy(model.state_dict())
    rates = np.geomspace(1e-7, 1, 100)
    optimizer = make_optimizer(model, args, rates[0])
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp and device.type == "cuda")
    losses, means, average = [], [], 0.0
    model.train()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), progress(rates, "learning-rate range test") as bar:
        torch.manual_seed(args.seed)
        batches = endless(loader)
        for i, rate in enumerate(bar):
            optimizer.param_groups[0]["lr"] = rate
            x, y = next(batches)
            loss, logits, _ = train_batch(model, optimizer, scaler, x, y, args, device)
            losses.append(loss / (len(logits) * WORLD))
            average = 0.8 * average + 0.2 * losses[-1]
            means.append(average / (1 - 0.8 ** (i + 1)))  # corrected for its start at 0, as Adam does
            bar.set_postfix(lr=f"{rate:.1e}", loss=f"{means[-1]:.3f}")
            if not math.isfinite(losses[-1]) or means[-1] > 4 * min(means):
                break
    model.load_state_dict(before)
    model.zero_grad(set_to_none=True)
    lr, reason, smooth = suggest_lr(rates, losses)
    if run and RANK == 0:
        write_csv(run / "lr_find.csv", [("lr", "loss", "smoothed_loss"), *zip(rates, losses, smooth, strict=False)])
        with figure(run / "lr_find.png", "Learning-rate range test", (6, 4)) as axes:
            axes.plot(rates[: len(losses)], losses, color="0.8", label="loss of the batch")
            axes.plot(rates[: len(smooth)], smooth, label="smoothed")
            axes.axvline(lr, color="tab:red", linestyle="--", label=f"{lr:.2g}: {reason}")
            axes.set(xscale="log", xlabel="learning rate", ylabel="loss", ylim=(0, 4 * losses[0]))
            axes.legend(loc="upper left")
    say(f"learning-rate range test: {lr:.2g} ({reason})")
    return lr


def suggest_lr(rates, losses):
    """(learning rate, why, smoothed loss): where the smoothed loss falls fastest along log(rate).

    Smoothed with a Gaussian of half a decade: centred, for a running mean lags behind and suggests too high a rate.
    Only the first fall counts: what comes after the loss has risen again is the noise of a shaken network. A network
    that starts at random may need more batches than these to learn anything: where no fall exceeds 2 %, it is 1e-3.
    """
    losses = np.array([loss for loss in losses if math.isfinite(loss)])
    per_decade = (len(rates) - 1) / math.log10(rates[-1] / rates[0])
    smooth = gaussian_filter1d(losses, per_decade / 2, mode="nearest")
    lowest = np.minimum.accumulate(smooth)
    risen = np.flatnonzero(smooth - lowest > np.maximum((smooth[0] - lowest) / 2, 0.02 * smooth[0]))
    valley = int(smooth[: risen[0] if len(risen) else None].argmin())
    if smooth[0] - smooth[valley] > 0.02 * smooth[0]:
        return float(rates[np.gradient(smooth)[: valley + 1].argmin()]), "steepest descent", smooth
    return 1e-3, "no descent; the usual rate", smooth


def endless(loader):
    epoch = 0
    while True:
        loader.batch_sampler.epoch = epoch
        yield from loader
        epoch += 1


# ---------------------------------------------------------------- what a run leaves behind


def draw_curves(run, history, title):
    epochs, best = [row["epoch"] for row in history], best_of(history)
    with figure(run / "curves.png", title, (10, 4), ncols=2) as (left, right):
        for name, label in (("train_loss", "training"), ("val_loss", "validation")):
            left.plot(epochs, [row[name] for row in history], marker=".", label=label)
        for name, label in (("val_accuracy", "accuracy"), ("val_f1", "F1"), ("val_roc_auc", "ROC AUC")):
            right.plot(epochs, [row[name] for row in history], marker=".", label=label)
        for axes in (left, right):
            axes.axvline(best["epoch"], color="0.6", linestyle="--", label=f"best epoch ({best['epoch']})")
            axes.set_xlabel("epoch")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.legend()
        left.set(ylabel="loss", ylim=(0, 1.05 * left.get_ylim()[1]), title="Loss")
        right.set(ylim=(-0.02, 1.02), title="Validation")


def draw_transformed(run, pictures, classes, model, args):
    """Article, Figure 4: training pictures as the network sees them, draw 0."""
    shown = pictures[:: max(1, len(pictures) // 9)][:9]
    data = training_pictures(model, shown, classes, args)
    with figure(run / "transformed_grid.png", "Training pictures as the network sees them", (8, 8.6)) as axes:
        axes.axis("off")  # one for all pictures: this is drawn for every fold
        for k, (picture, (x, _)) in enumerate(zip(shown, data, strict=False)):
            image = x.permute(1, 2, 0).numpy() * np.array(model.std) + np.array(model.mean)
            left, top = 1.05 * (k % 3), 1.1 * (k // 3)
            axes.imshow(image.clip(0, 1), extent=(left, left + 1, top + 1, top))
            title = f"{picture.sample_name[:24]} ({picture.phenotype})"
            axes.text(left + 0.5, top - 0.02, title, ha="center", fontsize=9)
        axes.set(xlim=(0, 3.1), ylim=(3.2, 0))


# ---------------------------------------------------------------- one training


def describe(args, backbone, fold):
    """The settings that make two trainings the same one; config.json holds them and a sweep compares them."""
    names = """image_size epochs patience batch_size lr optimizer scheduler weights finetune rotate
        weight_decay color_jitter erase views folds seed positive shuffle_labels amp""".split()
    settings = {"backbone": backbone, "fold": fold, "data": str(args.data), "grid": grid_of(args, backbone)}
    return settings | {name: getattr(args, name) for name in names}


def run_folder(args, backbone, fold, settings):
    """(folder, config or None). In a sweep a training that has the same settings is gone on with, or is finished."""
    base = Path(args.out) / Path(args.data).resolve().name / backbone / f"seed{args.seed}"
    suffix = ("-shuffled" if args.shuffle_labels else "") + (f"-fold{fold}" if fold is not None else "")
    base = base.with_name(base.name + suffix)
    for number in itertools.count(1):
        run = base if number == 1 else base.with_name(f"{base.name}-{number}")
        config = read_config(run) if args.sweep else None
        if config and config["settings"] == settings:
            return run, config
        with contextlib.suppress(FileExistsError):
            run.mkdir(parents=True)
            return run, None


def read_config(run):
    try:
        return json.loads((run / "config.json").read_text())
    except (OSError, ValueError):
        return None


def shuffled_labels(pictures, seed):
    """The control: these pictures (of two phenotypes or more) with phenotypes dealt out anew among groups or samples.

    What belongs together stays together: the copies of a sample, and the samples of a group that have one phenotype.
    """

    def owner(picture):
        return picture.group or picture.sample_name, picture.phenotype

    owners = sorted(set(map(owner, pictures)))
    rng, changed = np.random.default_rng(seed), 0
    while not changed:  # of a few samples all may get their own phenotype back
        phenotypes = {one: owners[j][1] for one, j in zip(owners, rng.permutation(len(owners)), strict=True)}
        changed = sum(phenotypes[one] != one[1] for one in owners)
    say(f"--shuffle-labels: {changed} of {len(owners)} samples or groups have another phenotype now")
    shuffled = [copy.copy(picture) for picture in pictures]
    for picture in shuffled:
        picture.phenotype = phenotypes[owner(picture)]
    return shuffled


def fold_of(pictures, n_folds, seed):
    """{sample name: fold}: stratified by phenotype, a group (or a sample and its copies) never torn apart."""
    groups = defaultdict(set)
    for picture in pictures:
        groups[picture.group or picture.sample_name].add((picture.sample_name, picture.phenotype))
    names = sorted(groups)
    np.random.default_rng(seed).shuffle(names)
    filled = [Counter() for _ in range(n_folds)]
    folds = {}
    for name in sorted(names, key=lambda name: -len(groups[name])):
        members = Counter(phenotype for _, phenotype in groups[name])
        fold = min(range(n_folds), key=lambda k: (sum(filled[k][p] for p in members), sum(filled[k].values())))
        filled[fold] += members
        folds |= {sample: fold for sample, _ in groups[name]}
    return folds


def split_pictures(pictures, args, fold=None):
    """(training pictures, validation pictures, classes) of {"train", "val"}, or of one fold of both together."""
    classes = deeplcms.classes_of(pictures, args.positive)
    train, val = pictures["train"], [p for p in pictures["val"] if not p.is_copy]
    if args.shuffle_labels and fold is None:
        train, val = shuffled_labels(train, args.seed), shuffled_labels(val, args.seed)
    if fold is not None:
        everything = shuffled_labels(train + val, args.seed) if args.shuffle_labels else train + val
        folds = fold_of(everything, args.folds, args.seed)
        if len({(folds[p.sample_name], p.phenotype) for p in everything}) < args.folds * len(classes):
            owners = {(p.group or p.sample_name, p.phenotype) for p in everything}
            n, rarest = min((n, phenotype) for phenotype, n in Counter(phenotype for _, phenotype in owners).items())
            few = f"{n} samples or groups of {rarest} in training and validation"
            raise Problem(f"--folds {args.folds}: not every fold has every phenotype ({few}); use fewer folds", 2)
        train = [p for p in everything if folds[p.sample_name] != fold]
        val = [p for p in everything if folds[p.sample_name] == fold and not p.is_copy]
    if len(train) < 2 * WORLD or len(val) < WORLD:
        raise Problem(f"{len(train)} training and {len(val)} validation pictures are too few for {WORLD} processes", 2)
    return train, val, classes


def train_once(args, backbone, pictures, fold=None):
    """One training from pictures to checkpoints; returns (run folder, config). The output of `python train.py`."""
    # The pictures' text chunks tell another cohort or conversion in the same folder.
    texts = sorted((p.path.name, sorted(p.text.items())) for split in pictures.values() for p in split)
    settings = describe(args, backbone, fold) | {"pictures": zlib.crc32(repr(texts).encode())}
    if args.resume:
        run, config = Path(args.resume), read_config(Path(args.resume))
    else:  # one process finds the folder for all
        run, config = gathered(run_folder(args, backbone, fold, settings) if RANK == 0 else None)[0]
    if config and config.get("status") == "finished":
        say(f"{run} is finished already")
        return run, config
    try:
        return run, train_in(run, args, backbone, pictures, fold, settings, config or {})
    except Problem:
        if RANK == 0 and run.is_dir() and not any(run.iterdir()):
            run.rmdir()  # a training that never began leaves no folder
        raise
    except KeyboardInterrupt:
        if (run / "config.json").exists():
            say(f"to go on: python train.py --resume {run}")
        raise


def train_in(run, args, backbone, pictures, fold, settings, before):
    """The training itself, in its folder; `before` is the config.json of an interrupted one. Returns config.json."""
    began, device = time.time(), choose_device()
    train, val, classes = split_pictures(pictures, args, fold)
    torch.manual_seed(args.seed)
    model, origin = build_model(args, backbone, len(classes))
    model.to(device)
    originals = [picture for picture in train if not picture.is_copy]
    n_parameters = sum(p.numel() for p in model.parameters())
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    config = {name: settings[name] for name in ("backbone", "data", "seed", "fold", "shuffle_labels")}
    config |= {"settings": settings, "data_set": Path(args.data).resolve().name, "classes": classes}
    config |= {"weights_origin": origin, "finetune": "head" if model.frozen else "all", "grid": model.grid}
    config |= {"image_size": model.image_size, "parameters": n_parameters, "trained_parameters": n_trained}
    config |= {"pictures": {"train": len(train), "val": len(val)}, "device": str(device)}
    say(
        f"{backbone} ({origin}, {config['finetune']} trained, {n_trained:,} of {n_parameters:,} parameters), "
        f"grid {model.grid}, {model.image_size} x {model.image_size} pictures: {len(train)} for training, "
        f"{len(val)} for validation, classes {', '.join(classes)}"
    )
    if RANK == 0:
        deeplcms.write_json(run / "config.json", before or config)
        draw_transformed(run, originals, classes, model, args)
    loaders = make_loaders(model, train, val, pictures, classes, args, device)
    lr = args.lr
    if lr == "auto":
        lr = before.get("lr") or find_lr(model, loaders["train"], args, device, run)
    config["lr"] = lr
    if RANK == 0:
        deeplcms.write_json(run / "config.json", config)
    facts = {name: config[name] for name in ("backbone", "classes", "grid", "image_size")} | {
        "mean": list(model.mean),
        "std": list(model.std),
        "recipe": train[0].recipe.to_text(),
        "config": config,
        "cohort": {s: [float(p.text[s]) for p in originals if s in p.text] for s in STATISTICS[2:]},
        "versions": {name: version(name) for name in ("torch", "torchvision", "timm", "numpy")},
    }
    start = load_checkpoint(run / "last.pt") if (run / "last.pt").exists() else None
    history = fit(model, loaders, args, device, lr, run, facts, start)
    best = best_of(history)
    config |= {"status": "finished", "best": best, "total_seconds": round(time.time() - began, 1)}
    if RANK == 0:
        write_rows(run / "epochs.csv", history)
        draw_curves(run, history, f"{backbone}, {origin}" + (", shuffled labels" if args.shuffle_labels else ""))
        deeplcms.write_json(run / "config.json", config)
    say(
        f"best epoch {best['epoch']}: validation loss {best['val_loss']:.3f}, accuracy {best['val_accuracy']:.3f}, "
        f"F1 {best['val_f1']:.3f}\nrun folder: {run}"
    )
    return config


# ---------------------------------------------------------------- tuning


def command_of(settings):
    """The command that trains with these settings (of `describe`): every flag that is not at its default."""
    usual = vars(make_parser().parse_args([])) | {"backbone": None, "fold": None, "amp": torch.cuda.is_available()}
    command = "python train.py"
    for name, value in settings.items():
        if value != usual[name]:
            flag = "--" + ("no-" if value is False else "") + name.replace("_", "-")
            command += f" {flag}" + ("" if isinstance(value, bool) else f" {shlex.quote(str(value))}")
    return command


class EveryCombination(optuna.samplers.RandomSampler):
    """Optuna's sampler of random values, but each trial takes the combination that was finished the fewest times.

    Of several it is the one whose turn the number of the trial says, so that processes that share the study take
    different ones: eight trials are the eight combinations of optimizer and scheduler.
    """

    combinations = [{"optimizer": o, "scheduler": s} for o in OPTIMIZERS for s in SCHEDULERS]

    def sample_independent(self, study, trial, name, distribution):
        if not trial.params:  # asked for the first of both
            tried, n = finished_of(study), len(self.combinations)
            turns = {i: (tried.count(c), (i - trial.number) % n) for i, c in enumerate(self.combinations)}
            self.chosen = self.combinations[min(turns, key=turns.get)]
        return self.chosen[name]


def finished_of(study):
    """Parameters of each trial that was completed or pruned, in any process."""
    return [trial.params for trial in study.get_trials(deepcopy=False, states=FINISHED)]


def open_study(storage, name, sampler, pruner):
    """The study of that name in the database, made if it is not there; Problem if there is no such database."""
    for attempt in range(5):
        try:
            options = {"sampler": sampler, "pruner": pruner, "load_if_exists": True}
            return optuna.create_study(storage=storage, study_name=name, **options)
        except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError, ImportError) as error:
            reason = first_line(error)
            if isinstance(error, (sqlalchemy.exc.ArgumentError, ImportError)):
                break  # a wrong URL stays wrong
            time.sleep(attempt)  # two processes that make one database at the same time get in each other's way
    raise Problem(f"--storage {storage}: {reason}", 2)


def tune(args, backbone, pictures):
    """Optuna over optimizer x scheduler (article, "Hyperparameter optimisation"), best validation loss as objective.

    Eight trials are all combinations; the next eight repeat them with the pictures in another order, which tells how
    much of a difference is luck. Trials are pruned at the median, share the stored features of a frozen backbone, and
    write no checkpoints: the command printed at the end does.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    train, val, classes = split_pictures(pictures, args)
    folder = Path(args.out) / Path(args.data).resolve().name / backbone / "tune"
    folder.mkdir(parents=True, exist_ok=True)
    settings = describe(args, backbone, None)
    question = [item for item in settings.items() if item[0] not in ("optimizer", "scheduler")]
    study = open_study(
        args.storage or f"sqlite:///{folder}/study.db",
        f"{Path(args.data).resolve().name}-{backbone}-seed{args.seed}-{zlib.crc32(repr(question).encode()):08x}",
        EveryCombination(),
        optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=max(3, args.epochs // 5)),
    )

    device = choose_device()
    torch.manual_seed(args.seed)
    model, _ = build_model(args, backbone, len(classes))
    model.to(device)
    loaders = make_loaders(model, train, val, pictures, classes, args, device)
    fresh = copy.deepcopy(model.state_dict())

    def objective(trial):
        trial_args = copy.copy(args)
        trial_args.optimizer = trial.suggest_categorical("optimizer", list(OPTIMIZERS))
        trial_args.scheduler = trial.suggest_categorical("scheduler", list(SCHEDULERS))
        trial_args.seed = args.seed + finished_of(study).count(trial.params)
        loaders["train"].batch_sampler.seed = trial_args.seed
        model.load_state_dict(fresh)
        lr = find_lr(model, loaders["train"], trial_args, device) if args.lr == "auto" else args.lr
        trial.set_user_attr("lr", lr)
        trial.set_user_attr("seed", trial_args.seed)
        say(f"trial {trial.number}: {trial_args.optimizer}, {trial_args.scheduler}, learning rate {lr:.2g}")

        def report(row):
            trial.report(row["val_loss"], row["epoch"])
            if trial.should_prune():
                raise optuna.TrialPruned

        try:
            history = fit(model, loaders, trial_args, device, lr, after_epoch=report)
        except Problem as problem:
            say(f"trial {trial.number} is given up: {problem}")
            raise optuna.TrialPruned from None  # a failed trial would not count, and --tune never end
        return best_of(history)["val_loss"]

    if len(finished_of(study)) < args.tune:
        study.optimize(objective, callbacks=[optuna.study.MaxTrialsCallback(args.tune, states=FINISHED)])
    if not study.get_trials(states=(optuna.trial.TrialState.COMPLETE,)):
        raise Problem("--tune: the loss became infinite in every trial; try a lower --lr")
    write_study(study, folder)
    best = study.best_trial
    found = f"best validation loss {best.value:.3f}, trial {best.number}"
    winner = settings | best.params | {"lr": float(f"{best.user_attrs['lr']:.3g}")}
    winner["seed"] = best.user_attrs.get("seed", args.seed)
    say(f"{len(study.trials)} trials in {folder}; {found}. Train it:\n  {command_of(winner)}")


def write_study(study, folder):
    """trials.csv, and Optuna's figures of it."""
    matplotlib.use("Agg")  # they are made for a screen
    import optuna.visualization.matplotlib as draw

    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)  # of every figure
    with whole_file(folder / "trials.csv") as temporary:
        study.trials_dataframe().to_csv(temporary, index=False)
    importance = optuna.importance.PedAnovaImportanceEvaluator()
    figures = {
        "history": lambda: draw.plot_optimization_history(study),
        "importances": lambda: draw.plot_param_importances(study, evaluator=importance),
        "parallel_coordinates": lambda: draw.plot_parallel_coordinate(study),
    }
    for name, plot in figures.items():
        try:
            drawn = plot().figure
            drawn.set_layout_engine("tight")
            with whole_file(folder / f"{name}.png") as temporary:
                drawn.savefig(temporary, dpi=150)
        except (ValueError, RuntimeError, ZeroDivisionError) as error:  # too few finished trials to say anything
            say(f"{name}.png is left out: {error}")


# ---------------------------------------------------------------- command line


def expand_backbones(names, params):
    """Names, patterns and 'article' -> model names; patterns keep those within `params` million parameters."""
    chosen = []
    for name in names:
        if name == "article":
            chosen += ARTICLE
        elif any(letter in name for letter in "*?["):
            matches = timm.list_models(name)
            if params:
                with torch.device("meta"):
                    sizes = {m: sum(p.numel() for p in timm.create_model(m).parameters()) / 1e6 for m in matches}
                matches = [m for m, size in sizes.items() if params[0] <= size <= params[1]]
            if not matches:
                raise Problem(
                    f"--backbone {name!r} matches no timm model" + (f" of {params} M parameters" if params else ""), 2
                )
            chosen += matches
        else:
            deeplcms.check_backbone(name)
            chosen.append(name)
    return list(dict.fromkeys(chosen))


def make_parser():
    parser = Parser(__doc__)
    add = parser.add_argument_group("what to train").add_argument
    names = "timm names, patterns such as 'convnext*', 'article' (Table 1), or 'pixels' (no network: the baseline)"
    add("--backbone", nargs="+", metavar="NAME", help=names)
    matches = "keep pattern matches of MIN-MAX million parameters"
    add("--params", nargs=2, type=float, metavar=("MIN", "MAX"), help=matches)
    add("--data", metavar="DIR", help="data set of convert.py (without it: the demo, at settings of its own)")
    weights = "auto: pretrained, or random where the Hub cannot be reached; FILE: a state dict or a best.pt"
    add("--weights", default="auto", metavar="auto|pretrained|random|FILE", help=weights)
    trained = "what is trained (default: head with weights, all with random ones)"
    add("--finetune", choices=["head", "all"], help=trained)
    cells = "pool the feature map to N x N cells (default: 1; pixels: 56)"
    add("--grid", type=bounded(int, 1), metavar="N", help=cells)
    add("--image-size", type=bounded(int, 1), metavar="N", help="pixels a side (default: the backbone's own)")
    add("--positive", metavar="CLASS", help="phenotype that is class 1 (default: the last in sorted order)")
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=bounded(int, 1), default=50, help="at most")
    add("--patience", type=bounded(int, 1), default=10, help="stop after so many without a better validation loss")
    add("--batch-size", type=bounded(int, 1), default=32, help="pictures a step, of each process")
    add("--lr", type=bounded(float, 1e-12, word="auto"), default="auto", help="learning rate, or auto: range test")
    add("--optimizer", choices=list(OPTIMIZERS), default="adamax", help="the article's best is adamax")
    add("--scheduler", choices=SCHEDULERS, default="cosine", help="the article's best is cosine")
    add("--weight-decay", type=bounded(float, 0), default=2e-5, help="L2 penalty (adamw: decoupled)")
    add("--amp", action=argparse.BooleanOptionalAction, help="mixed precision (default: on CUDA only)")
    add = parser.add_argument_group("augmentation of training pictures").add_argument
    add("--rotate", type=bounded(float, 0, 180), default=5.0, metavar="DEGREES", help="largest rotation")
    jitter = "strength of brightness, contrast and saturation changes"
    add("--color-jitter", type=bounded(float, 0), default=0.25, help=jitter)
    add("--erase", type=bounded(float, 0, 1), default=1.0, metavar="P", help="probability of erasing a rectangle")
    views = "frozen backbone: store the features of K draws of each picture (auto: 4); 0: fresh draws every epoch"
    add("--views", type=bounded(int, 0, word="auto"), default="auto", metavar="auto|K", help=views)
    add = parser.add_argument_group("experiments").add_argument
    add("--repeats", type=bounded(int, 1), default=1, metavar="N", help="trainings with seeds SEED, SEED + 1, ...")
    folds = "cross-validation over training and validation together"
    add("--folds", type=bounded(int, 0), default=0, metavar="K", help=folds)
    add("--tune", type=bounded(int, 0), default=0, metavar="N", help="Optuna trials over optimizer x scheduler")
    add("--storage", metavar="URL", help="Optuna database that several processes share (default: in the tune folder)")
    add("--shuffle-labels", action="store_true", help="control: must fall to chance")
    add = parser.add_argument_group("machine and output").add_argument
    add("--seed", type=bounded(int, 0), default=2643, help="of initial weights, order and draws")
    add("--workers", type=bounded(int, 0), default=default_workers(), help="processes that load pictures")
    add("--out", default="runs", metavar="DIR", help="runs go to DIR/<data set>/<backbone>/seed<seed>/")
    add("--resume", metavar="RUN", help="go on with a training that was interrupted")
    return parser


def default_workers():
    """Loader processes: with a GPU all cores can load; on a CPU the network needs most of them."""
    return min(16, os.cpu_count() or 1) if torch.cuda.is_available() else max(1, (os.cpu_count() or 1) // 4)


def parse_arguments(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    demo = not args.data and not args.resume
    if args.resume:
        config = read_config(Path(args.resume))
        if not config or "settings" not in config:
            raise Problem(f"--resume {args.resume}: no config.json of train.py in this folder", 2)
        resumed = config["settings"]
        for name in vars(args).keys() & resumed.keys() - {"backbone"}:
            setattr(args, name, resumed[name])
        args.backbone, args.resume_fold = [resumed["backbone"]], resumed["fold"]
    elif not args.backbone:
        raise Problem("needs --backbone (try: --backbone mobileone_s3) or --resume", 2)
    if demo:
        parser.set_defaults(**DEMO)
        args = parser.parse_args(argv)
        args.data = "demo"
    args.demo = demo
    args.amp = torch.cuda.is_available() if args.amp is None else args.amp
    if args.folds == 1:
        raise Problem("--folds must be 0 or at least 2", 2)
    if args.tune and WORLD > 1:
        raise Problem("--tune is one process; start several, each with the same --storage", 2)
    if args.weights not in ("auto", "pretrained", "random") and not Path(args.weights).is_file():
        raise Problem(f"--weights {args.weights}: no such file (nor auto, pretrained or random)", 2)
    return args


def main():
    args = parse_arguments()
    backbones = expand_backbones(args.backbone, args.params)
    folds = [None] if not args.folds else list(range(args.folds))
    seeds = range(args.seed, args.seed + args.repeats)
    args.sweep = len(backbones) * len(folds) * len(seeds) > 1
    if WORLD > 1:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if args.demo:
        given = ", ".join(f"--{name.replace('_', '-')} {getattr(args, name)}" for name in DEMO)
        say(f"no --data: the demo cohort, at settings that two CPU cores can manage ({given})")
        if RANK == 0 and not (Path(args.data) / "samples.csv").exists():
            done = subprocess.run([sys.executable, Path(__file__).with_name("convert.py"), "--demo", args.data])
            if done.returncode:
                return done.returncode
        gathered(None)  # the others wait for the cohort
    pictures = deeplcms.find_pictures(args.data, ("train", "val"))  # read once for all trainings
    if args.tune:
        for backbone in backbones:
            tune(args, backbone, pictures)
        return 0
    if args.resume:
        train_once(args, backbones[0], pictures, args.resume_fold)
        return 0
    failures, results = {}, []
    for backbone, seed, fold in itertools.product(backbones, seeds, folds):
        args.seed = seed
        try:
            results.append(train_once(args, backbone, pictures, fold))
        except Exception as problem:  # out of memory, an operator that is missing, a size that does not suit
            if not args.sweep or getattr(problem, "status", 1) == 2:
                raise
            name = f"{backbone}, seed {seed}" + (f", fold {fold}" if fold is not None else "")
            failures[name] = first_line(problem)
            say(f"failed: {name}: {failures[name]}")
    for backbone in backbones:
        losses = np.array([config["best"]["val_loss"] for _, config in results if config["backbone"] == backbone])
        if len(losses) > 1:
            spread = f"{losses.mean():.3f} +- {losses.std(ddof=1):.3f}"
            say(f"{len(losses)} trainings of {backbone}: best validation loss {spread} (mean, standard deviation)")
    if results:
        folders = " ".join(str(run) for run, _ in results) if len(results) < 4 else str(results[0][0].parents[1])
        say(f"next:\n  python evaluate.py {folders}\n  python explain.py {results[0][0]}")
    for name, reason in failures.items():
        print(f"left out: {name}: {reason}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    run_script(main)
