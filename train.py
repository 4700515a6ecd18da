"""Train a classifier of pictures: a timm backbone with a new head.

With a frozen backbone, the default, the head is L2 logistic regression on cached features: see
`fit_head`. With `--finetune all` a loop trains the whole network: see `fit`. Article, "Transfer
learning", "Hyperparameter optimisation" and "Evaluating the final model".

    python train.py --backbone mobileone_s3             # the demo cohort, made if it is missing
    python train.py --backbone mobileone_s3 --data data/golestan --repeats 5
    python train.py --backbone article --data data/golestan  # Table 1; then evaluate.py runs/golestan
    python train.py --backbone convnext_nano pixels --data data/golestan --folds 10
    python train.py --backbone mobileone_s3 --data data/golestan --tune 8
    torchrun --nproc-per-node 4 train.py --backbone convnext_large --data data/golestan --finetune all

Rerun the same command to resume. Changed settings need another --out or --name. Under torchrun, W
processes with batch size B train as one with W x B, apart from batch norms' statistics. They share
the extraction of features.
"""

import argparse
import difflib
import functools
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
import textwrap
import time
import zlib
from contextlib import contextmanager
from datetime import timedelta
from glob import glob
from importlib.metadata import version
from pathlib import Path

import huggingface_hub
import numpy as np
import optuna
import pandas as pd
import timm
import torch
import torch.distributed as dist
from matplotlib import style
from matplotlib.figure import Figure
from optuna.trial import TrialState
from scipy.stats import norm
from sqlalchemy import URL
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adam, Adamax, AdamW, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, DistributedSampler, TensorDataset
from torchvision.transforms import v2
from torchvision.utils import make_grid
from tqdm import tqdm

from deeplcms import RANK, WORLD, Help, InputError, Recipe, colours, compute_metrics, cores, count
from deeplcms import digest_pictures, find_pictures, first_difference, first_few, first_line
from deeplcms import make_labels, read_json, read_picture, run_script, slow_waves, summarize_cohort
from deeplcms import whole_file, write_json, write_table


# The 30 distinct names among the 32 rows of the article's Table 1: 10-20 million parameters each.
ARTICLE = """
    mobileone_s3.apple_in1k densenet169.tv_in1k mobilevitv2_150.cvnets_in22k_ft_in1k_384
    convnext_nano.in12k_ft_in1k repvit_m3.dist_in1k cait_xxs24_224.fb_dist_in1k repvgg_a1.rvgg_in1k
    efficientformer_l1.snap_dist_in1k hrnet_w18_small.gluon_in1k gmlp_s16_224.ra3_in1k
    fastvit_sa12.apple_dist_in1k lambda_resnet26t.c1_in1k efficientvit_m5.r224_in1k
    eca_resnext26ts.ch_in1k ghostnetv2_160.in1k nf_regnet_b1.ra2_in1k coatnet_nano_rw_224.sw_in1k
    legacy_seresnet18.in1k haloregnetz_b.ra3_in1k xcit_tiny_24_p8_384.fb_dist_in1k
    resmlp_12_224.fb_distilled_in1k gcvit_xxtiny.in1k resnest14d.gluon_in1k
    edgenext_base.in21k_ft_in1k maxvit_nano_rw_256.sw_in1k coat_mini.in1k
    tf_efficientnetv2_b2.in1k fbnetv3_d.ra2_in1k rexnet_200.nav_in1k mixnet_xl.ra_in1k""".split()

# Defaults without --data: two CPU cores then need minutes, not hours.
DEMO = {"image_size": 112, "lr": 0.01, "finetune": "all", "epochs": 12}

OPTIMIZERS = {"adam": Adam, "adamw": AdamW, "adamax": Adamax, "rmsprop": RMSprop}
SCHEDULERS = {
    "cosine": lambda optimizer, settings: CosineAnnealingLR(optimizer, settings.epochs),
    "plateau": lambda optimizer, settings: ReduceLROnPlateau(optimizer, patience=max(1, settings.patience // 3)),
}

# Augmentation presets: physical variation, the article's for its final model and for earlier ones.
#   warp: standard deviation of the retention shift, % of the axis
#   gain: standard deviation of the logarithm of sensitivity along m/z
#   erase: probability of an erased rectangle; erase_size: its largest area, share of the picture
#   rotate: largest angle, degrees; color_jitter: of brightness, contrast and saturation
AUGMENTATION = {
    "physical": {"warp": 1.0, "gain": 0.3, "erase": 0.5, "erase_size": 0.01, "rotate": 0, "color_jitter": 0},
    "article": {"warp": 0, "gain": 0, "erase": 1.0, "erase_size": 0.33, "rotate": 5, "color_jitter": 0.25},
    "article-early": {"warp": 0, "gain": 0, "erase": 0.05, "erase_size": 0.33, "rotate": 5, "color_jitter": 0.05},
    "none": {"warp": 0, "gain": 0, "erase": 0, "erase_size": 0, "rotate": 0, "color_jitter": 0},
}

# Default inputs of the head, STRIDE:GRID. Stride 1 is the picture; a grid N has N x N cells.
SCALES = {
    "pixels": ["1:28x250"],
    "head": ["1:28x224", "8:7x28", "16:7x14"],  # the backbone is frozen
    "all": ["1:56", "8:14", "16:14"],  # the whole network is trained
}
L2 = 1e-6  # weight of the L2 penalty of logistic regression
HEAD_FOLDS = 5  # folds of its cross-validation
CACHED_VIEWS = 1000  # --views auto: about this many in total, 1 to 16 per picture
VIEWS_SEED = 2643  # not --seed: repeats, folds and trials share the cached views
STATISTICS_FROM = 200  # training pictures for the batch norms of averaged weights
SEARCH = {"optimizer": list(OPTIMIZERS), "scheduler": list(SCHEDULERS)}  # flags that --tune combines
# Flags that do not affect training. All other flags, also new ones, are settings of the run.
NOT_SETTINGS = ("params", "repeats", "tune", "storage", "workers", "data", "name", "out", "demo")
# Settings of `fit` that `fit_head` does not use.
LOOP_SETTINGS = ("epochs", "patience", "batch_size", "lr", "scheduler", "weight_decay", "amp")
CHANNELS = 3  # an input has red, green and blue of the colormap

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
FAST_BFLOAT16 = getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)  # missing in older torch

say = functools.partial(print, flush=True)  # line by line, also into a log file


def progress(batches, title, total=None, unit="batch"):
    hidden = None if RANK == 0 else True  # None: hidden unless on a terminal
    return tqdm(batches, title, total, leave=False, unit=unit, disable=hidden)


# ---------------------------------------------------------------- the loop
def fit(model, loaders, settings, run=None, on_epoch=lambda row: None):
    """Train to the end of the schedule, or until --patience epochs have brought no better one.

    Single epochs are noisy, so a running mean of the weights over about a tenth of the epochs is
    validated and kept (Izmailov et al. 2018, arXiv:1803.05407). Returns (history: one dict per
    epoch, weights of the kept epoch). With a run folder it writes epochs.csv and last.pt after each
    epoch, and resumes from last.pt. Calls on_epoch(row) after each epoch.
    """
    last = load_checkpoint(run / "last.pt") if run and (run / "last.pt").exists() else {}
    history = last.get("history", [])
    best_weights = last.get("best_weights")
    lr = history[0]["lr"] if history else settings.lr
    if lr == "auto":
        lr = find_lr(model, loaders, settings, run)
    to_the_end = settings.patience >= settings.epochs
    if to_the_end:
        say(f"trains all {settings.epochs} epochs and keeps the last (a lower --patience keeps the best)")

    network = distribute(model)
    window = max(3, settings.epochs // 10)
    averaged = AveragedModel(model, avg_fn=lambda mean, new, n: mean + (new - mean) / (n + 1).clamp(max=window))
    optimizer, scaler = make_optimizer(model, settings, lr)
    scheduler = SCHEDULERS[settings.scheduler](optimizer, settings)
    states = {"optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    if last:
        model.load_state_dict(last["model"], strict=False)
        averaged.module.load_state_dict(last["averaged"], strict=False)
        averaged.n_averaged.fill_(len(history))
        for name, part in states.items():
            part.load_state_dict(last[name])
    unaugmented = list(loaders.get("statistics", []))

    for epoch in range(len(history) + 1, settings.epochs + 1):
        if history:
            # Patience counts from the middle, as the large steps of the first half say little.
            best = max(find_kept_epoch(history)["epoch"], settings.epochs // 2)
            if epoch - best > settings.patience:
                say(f"no better epoch in the last {settings.patience}: stopped")
                break

        began = time.time()
        model.train(not model.frozen)
        outputs = []
        batches = draw_batches(loaders["train"], epoch, settings)
        for x, y in progress(batches, f"epoch {epoch}/{settings.epochs}", len(loaders["train"])):
            outputs.append(train_step(network, optimizer, scaler, x, y, settings))

        averaged.update_parameters(model)
        if unaugmented:  # averaged weights need batch norms' statistics of their own
            with autocast(settings):
                update_bn(unaugmented, averaged.module, DEVICE)
        row = {"epoch": epoch, **split_metrics("train", *collect(outputs))}
        row |= split_metrics("val", *collect(predict(averaged.module, loaders["val"])))
        row["kept"] = to_the_end or not history or score_epoch(row) < score_epoch(find_kept_epoch(history))
        row["lr"] = optimizer.param_groups[0]["lr"]
        row["seconds"] = round(time.time() - began, 2)
        if not math.isfinite(row["train_loss"] + row["val_loss"]):
            raise InputError(f"the loss became infinite in epoch {epoch}: try a lower --lr than {lr:.2g}")
        history.append(row)
        say_epoch(f"epoch {epoch:3d}/{settings.epochs}", row)

        if row["kept"]:
            best_weights = copy_weights(averaged.module)
        if settings.scheduler == "plateau":
            scheduler.step(score_epoch(row))
        else:
            scheduler.step()
        if run and RANK == 0:
            write_table(run / "epochs.csv", pd.DataFrame(history))
            contents = {name: part.state_dict() for name, part in states.items()}
            contents |= {"model": copy_weights(model), "averaged": copy_weights(averaged.module)}
            contents |= {"best_weights": best_weights, "history": history}
            save_checkpoint(run / "last.pt", contents)
        on_epoch(row)
    return history, best_weights


def draw_batches(loader, epoch, settings):
    """The training batches of an epoch, reproducible from seed and epoch alone."""
    torch.manual_seed(1000 * settings.seed + epoch + 10**9 * RANK)  # augmentation and dropout
    loader.sampler.set_epoch(epoch)
    yield from loader


def train_step(network, optimizer, scaler, x, y, settings):
    """One step of gradient descent; returns logits and labels on the CPU."""
    x = x.to(DEVICE, non_blocking=True)
    y = y.to(DEVICE, non_blocking=True)
    optimizer.zero_grad()
    with autocast(settings):
        logits = network(x).float()
    loss = compute_loss(logits, y)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return logits.detach().cpu(), y.cpu()


def autocast(settings):
    """Mixed precision for a forward pass; weights and gradients stay float32."""
    return torch.autocast(DEVICE.type, torch.float16 if CUDA else torch.bfloat16, enabled=settings.amp)


def make_optimizer(model, settings, lr):
    """(optimizer of the trainable parameters, GradScaler, which float16 needs)"""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = OPTIMIZERS[settings.optimizer](trainable, lr=lr, weight_decay=settings.weight_decay)
    return optimizer, torch.amp.GradScaler(DEVICE.type, enabled=settings.amp and CUDA)


def distribute(model):
    """The model, or under torchrun one that averages its gradients over the processes."""
    # The head does not use all layers of a backbone.
    return DistributedDataParallel(model, find_unused_parameters=True) if WORLD > 1 else model


@torch.inference_mode()
def predict(model, loader):
    """[(logits, labels)] of the batches of a loader, on the CPU."""
    model.eval()
    return [(model(x.to(DEVICE, non_blocking=True)).float().cpu(), y) for x, y in loader]


def collect(outputs):
    """[(logits, labels)] of the batches of every process -> logits (N, 1 or K), labels (N,)."""
    if WORLD > 1:
        parts = [None] * WORLD
        dist.all_gather_object(parts, outputs)
        outputs = itertools.chain.from_iterable(parts)
    logits, labels = zip(*outputs, strict=True)
    return torch.cat(logits), torch.cat(labels)


def split_metrics(split, logits, labels):
    """{"<split>_<name>": value}: loss and metrics of logits (N, 1 or K) and labels (N,)."""
    values = {"loss": compute_loss(logits, labels).item(), **compute_metrics(labels.numpy(), logits)}
    return {f"{split}_{name}": float(value) for name, value in values.items()}


def score_epoch(row):
    """Lower is better: for the kept epoch, patience, plateau, tuning and comparisons."""
    return row["val_loss"] if math.isfinite(row["val_loss"]) else math.inf


def find_kept_epoch(history):
    """Row of the kept epoch: the last, or with a lower --patience the one with the best score."""
    return [row for row in history if row["kept"]][-1]


def copy_weights(model):
    """A copy of the weights, without those of a frozen backbone."""
    left_out = ("backbone.",) if model.frozen else ()
    state = model.state_dict()
    return {name: tensor.clone() for name, tensor in state.items() if not name.startswith(left_out)}


def say_epoch(title, row):
    values = "  ".join(f"{name} {row[name]:.3f}" for name in ("train_loss", "val_loss", *shown_metrics(row)))
    say(f"{title}  {values}  {row['seconds']:.1f} s{'  *' * row['kept']}")


def shown_metrics(columns):
    """The first three metrics of the validation pictures, for the printed line and curves.png."""
    return [name for name in columns if name.startswith("val_") and name != "val_loss"][:3]


# ---------------------------------------------------------------- what feeds it
def make_loaders(model, table, recipe, settings, cache=None):
    """{"train", "val"} data loaders of pictures, or of cached features, one item for each view.

    Also fits the standardisation of a frozen backbone. Any other backbone has a third loader,
    "statistics": training pictures without augmentation, for its batch norms.
    """
    train_table = table[table["split"] == "train"]
    val_table = table[table["split"] == "val"]
    plain = to_input(model, recipe)
    if cache:
        (views, labels), (clean, _) = look_up_features(cache, train_table)
        train = TensorDataset(views.flatten(0, 1), labels)
        val = TensorDataset(*look_up_features(cache, val_table)[1])
    else:
        train = Pictures(train_table, training_transform(model, recipe, settings))
        val = Pictures(val_table, plain)
        if model.frozen:
            clean = extract_features(model, [Pictures(train_table, plain)], settings)
    if model.frozen:
        model.fit_standardize(clean)

    size = settings.batch_size
    options = {"num_workers": 0 if cache else settings.workers, "pin_memory": CUDA}
    sampler = DistributedSampler(train, WORLD, RANK, seed=settings.seed)
    last_is_single = len(sampler) % size == 1  # one picture has no batch statistics
    every_nth = range(RANK, len(val), WORLD)
    loaders = {
        "train": DataLoader(train, size, sampler=sampler, drop_last=last_is_single, **options),
        "val": DataLoader(val, max(size, 32), sampler=every_nth, **options),
    }
    if not model.frozen:
        some = Pictures(train_table.iloc[:: math.ceil(len(train_table) / STATISTICS_FROM)], plain)
        loaders["statistics"] = DataLoader(some, 32, drop_last=len(some) % 32 == 1, **options)
    return loaders


class Pictures(Dataset):
    """(input (CHANNELS, size, size), label) of each row of a table of pictures.

    With a seed, randomness in the transform depends on the seed and the row alone, in any process.
    """

    def __init__(self, table, transform, seed=None):
        self.paths = list(table["path"])
        self.labels = list(table["label"])
        self.transform = transform
        self.seed = seed

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        if self.seed is not None:
            torch.manual_seed(self.seed + i)
        return self.transform(read_picture(self.paths[i])).contiguous(), self.labels[i]


CACHE = {}  # features of all pictures of the command; repeats, folds and trials share them


def cache_features(model, table, recipe, settings):
    """CACHE with features of N pictures: "views" (K, N, F), augmented, and "clean" (N, F).

    Extracts them anew for another backbone or other views. Shifted copies have no clean features.
    """
    names = ["pictures", "backbone", "weights", "scales", "image_size", "views"]
    names += AUGMENTATION[settings.augmentation]
    if settings.weights == "random initialisation":
        names.append("seed")
    key = [getattr(settings, name) for name in names]
    if CACHE.get("key") == key:
        return CACHE
    say(f"caching the features of {settings.views} views of each of {len(table)} pictures")
    CACHE.clear()  # before the new ones need memory
    transform = training_transform(model, recipe, settings)
    views = [Pictures(table, transform, VIEWS_SEED + k * len(table)) for k in range(settings.views)]
    is_original = ~table["copy"].to_numpy()
    originals = Pictures(table[is_original], to_input(model, recipe))
    CACHE["views"] = extract_features(model, views, settings).unflatten(0, (len(views), len(table)))
    CACHE["clean"] = torch.empty(len(table), model.n_features)
    CACHE["clean"][is_original] = extract_features(model, [originals], settings)
    CACHE["key"] = key
    return CACHE


def extract_features(model, datasets, settings):
    """Features (N, F) of the pictures of all datasets; processes take batches in turn."""
    fast = timm.utils.reparameterize_model(model).eval()  # a copy with fused branches, faster
    dataset = ConcatDataset(datasets)
    n = len(dataset)
    batches = [range(i, min(i + 32, n)) for i in range(0, n, 32)][RANK::WORLD]
    features = torch.zeros(n, model.n_features)
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=settings.workers)
    with torch.inference_mode():
        for batch, (x, _) in zip(batches, progress(loader, "extracting features"), strict=True):
            x = x.to(DEVICE, memory_format=torch.channels_last)
            features[batch.start : batch.stop] = fast.features(x).cpu()
    if WORLD > 1:
        dist.all_reduce(features)  # the others' rows are 0 here
    return features


def look_up_features(cache, table):
    """Cached features of a table: (views (K, N, F), labels (K * N,)), (clean (n, F), labels (n,))."""
    originals = table[~table["copy"]]
    views = cache["views"][:, list(table.index)]  # the index counts all pictures of the command
    clean = cache["clean"][list(originals.index)]
    labels = torch.tensor(list(table["label"])).repeat(len(views))
    return (views, labels), (clean, torch.tensor(list(originals["label"])))


def to_input(model, recipe, jitter=0):
    """The only path from a picture, uint8 (H, W), to a network: float (CHANNELS, size, size).

    The picture is squashed to the size, never cropped: position is the measurement. jitter: the
    article's colour jitter. For one grey channel change CHANNELS and the first step.
    """
    steps = [v2.Lambda(functools.partial(colours, colormap=recipe.colormap)), v2.ToImage()]
    if jitter:
        steps.append(v2.ColorJitter(jitter, jitter, jitter))
    if model.image_size:
        steps.append(v2.Resize((model.image_size, model.image_size)))
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(model.mean, model.std)]
    return v2.Compose([*steps, v2.ToPureTensor()])


def make_inputs(model, recipe, pictures):
    """Pictures [uint8 (H, W)] -> inputs of the model, float (N, CHANNELS, size, size)."""
    return torch.stack(list(map(to_input(model, recipe), pictures))).contiguous()


def training_transform(model, recipe, settings):
    """`to_input` after a random augmentation."""
    view = v2.Lambda(functools.partial(augment, settings=settings))
    return v2.Compose([view, to_input(model, recipe, settings.color_jitter)])


def augment(picture, settings):
    """A random view of a picture, uint8 (H, W): as if the sample had been measured on another day.

    It works before the colormap, so that erased and uncovered bins have zero intensity.
    """
    x = torch.from_numpy(picture)[None] / 255  # (1, H, W) log intensity, 0 ... 1
    if settings.warp:
        x = warp_retention(x, settings.warp / 100)
    if settings.gain:
        x = vary_sensitivity(x, settings.gain)
    if settings.rotate:
        x = v2.RandomRotation(settings.rotate, v2.InterpolationMode.BILINEAR)(x)
    if settings.erase:
        largest = settings.erase_size
        x = v2.RandomErasing(settings.erase, scale=(largest / 16, largest))(x)
    return (256 * x[0]).clamp(max=255).byte().numpy()


def warp_retention(x, deviation):
    """Shift the columns of log intensity (1, H, W) smoothly; deviation: fraction of the axis."""
    n = x.shape[2]  # the rows stay: m/z shifts by far less than a bin
    source = torch.arange(n) + n * draw_wave(n, deviation)  # fractional source of each column
    source = source.clamp(0, n - 1)
    left = source.long()
    right = (left + 1).clamp(max=n - 1)
    return torch.lerp(x[:, :, left], x[:, :, right], source - left)


def vary_sensitivity(x, deviation):
    """Apply a smooth gain along m/z to log intensity (1, H, W); deviation: that of the gain's logarithm."""
    gain = draw_wave(x.shape[1], deviation).exp()[:, None]
    intensity = torch.exp2(8 * x) - 1  # 256 ** x
    return (torch.log1p(gain * intensity) / math.log(256)).clamp(max=1)


def draw_wave(n, deviation):
    """Random smooth curve (n,) with this standard deviation at every point."""
    waves = slow_waves(np.linspace(0, 1, n)).astype(np.float32)
    return deviation * torch.randn(6) @ torch.from_numpy(waves)


# ---------------------------------------------------------------- the model
class Classifier(nn.Module):
    """Maps of a backbone -> average-pool to grids -> standardise -> linear -> logits (N, K).

    scales: ["STRIDE:GRID"]. Stride 1 is the picture itself, the only one of `pixels`. The article
    pools the last map to one cell; an early map on a fine grid keeps a spot and its place on the
    retention-time and m/z axes. Inputs: (N, CHANNELS, size, size), or their cached features (N, F).
    """

    def __init__(self, backbone, n_outputs, scales=None, image_size=None, finetune="head", pretrained=False):
        super().__init__()
        self.frozen = finetune == "head"
        self.n_outputs = n_outputs
        strides = [1]
        if backbone == "pixels":
            self.backbone = nn.Identity()
            self.image_size = image_size  # None: as the pictures are
            self.mean = self.std = (0.5,) * CHANNELS
        else:
            cfg = timm.get_pretrained_cfg(backbone) or timm.models.PretrainedCfg()
            self.image_size = image_size or cfg.input_size[-1]
            options = {"num_classes": 0, "in_chans": CHANNELS}
            if cfg.fixed_input_size and self.image_size != cfg.input_size[-1]:
                options["img_size"] = self.image_size  # other models accept any size without it
            self.backbone = timm.create_model(backbone, pretrained=pretrained, **options)
            self.mean = cfg.mean[:CHANNELS]
            self.std = cfg.std[:CHANNELS]
            strides += [stage["reduction"] for stage in self.backbone.feature_info]
        # A digest of the layers, as their code may change under the same name.
        self.architecture = zlib.crc32(repr(self.backbone).encode())
        default = SCALES["pixels" if backbone == "pixels" else finetune]
        self.scales = parse_scales(scales, default, strides, backbone)
        index_of = {stride: i - 1 for i, stride in enumerate(strides)}  # last map of each stride
        self.map_indices = [index_of[stride] for stride, _, _ in self.scales if stride > 1]
        self.taps = nn.ModuleList(nn.Identity() for _ in self.map_indices)  # explain.py hooks these
        self.sizes = self.count_features(backbone)
        self.n_features = sum(self.sizes)
        self.standardize = nn.BatchNorm1d(self.n_features, affine=False, momentum=None)
        self.head = nn.Linear(self.n_features, n_outputs)
        nn.init.zeros_(self.head.weight)  # start at p = 0.5
        nn.init.zeros_(self.head.bias)
        if self.frozen:
            self.backbone.requires_grad_(False)

    def count_features(self, backbone):
        """Number of features of each scale; InputError if the backbone refuses the image size."""
        size = self.image_size or 224
        blank = torch.zeros(2, CHANNELS, size, size)
        try:
            with torch.no_grad():
                sizes = [pooled.shape[1] for pooled in self.eval().pool_maps(blank)]
        except Exception as error:  # each family of timm raises another type
            own = getattr(timm.get_pretrained_cfg(backbone), "input_size", ["unknown"])[-1]
            refused = f"{backbone} cannot take pictures of {self.image_size} pixels; its own is {own}"
            raise InputError(f"--image-size: {refused} ({first_line(error)})") from None
        channels = [CHANNELS] * (self.scales[0][0] == 1)
        channels += [self.backbone.feature_info[i]["num_chs"] for i in self.map_indices]
        for n_channels, size, (stride, n_rt, n_mz) in zip(channels, sizes, self.scales, strict=True):
            if size != n_channels * n_rt * n_mz:
                raise InputError(f"{backbone}: its map of stride {stride} has not the channels of its feature_info")
        return sizes

    def pool_maps(self, x):
        """Inputs (N, CHANNELS, size, size) -> [pooled features (N, C * cells) of each scale]."""
        maps = [x] if self.scales[0][0] == 1 else []
        if self.map_indices:
            early = {"stop_early": True, "intermediates_only": True}
            found = self.backbone.forward_intermediates(x, indices=self.map_indices, **early)
            maps += [tap(map_) for tap, map_ in zip(self.taps, found, strict=True)]
        pooled = []
        for map_, (_, n_rt, n_mz) in zip(maps, self.scales, strict=True):
            pooled.append(F.adaptive_avg_pool2d(map_, (n_mz, n_rt)).flatten(1))
        return pooled

    def features(self, x):
        """Inputs (N, CHANNELS, size, size) -> pooled features (N, F)."""
        return torch.cat(self.pool_maps(x), dim=1)

    def fit_standardize(self, features):
        """Set mean and variance to those of features (N, F)."""
        variance, mean = torch.var_mean(features, 0, correction=0)
        # Raise small variances, as nearly constant features would explode on new pictures.
        parts = [part.clamp(min=0.01 * part.mean()) for part in variance.split(self.sizes)]
        self.standardize.running_mean.copy_(mean)
        self.standardize.running_var.copy_(torch.cat(parts))

    def head_inputs(self, x):
        """Features (N, F), standardised; scales have equal weights; the expected squared norm is 1.

        One learning rate or L2 penalty then suits heads of 100 and of 100,000 inputs.
        """
        weight = torch.cat([x.new_full((n,), (n * len(self.sizes)) ** -0.5) for n in self.sizes])
        return self.standardize(x) * weight

    def forward(self, x):
        if x.ndim == 4:
            x = self.features(x)
        return self.head(self.head_inputs(x))


def parse_scales(scales, default, strides, backbone):
    """["STRIDE:GRID"] -> [(stride, cells in retention time, cells in m/z)] by stride.

    A grid is N (N x N cells) or TIMExMZ; "last" is the stride of the last map. In default scales
    the nearest stride replaces a missing one.
    """
    known = sorted(set(strides))
    chosen = {}
    for text in scales or default:
        text = text.replace("last", str(strides[-1]))
        found = re.fullmatch(r"(\d+):([1-9]\d*)(?:x([1-9]\d*))?", text)
        stride = int(found[1]) if found else 0
        if not scales and stride not in known:
            stride = min(known[1:], key=lambda other: abs(math.log2(other / stride)))
        if stride not in known:
            listed = ", ".join(map(str, known))
            raise InputError(f"--scales {text}: the strides of {backbone} are {listed}; write STRIDE:GRID")
        n_rt = int(found[2])
        chosen[stride] = (stride, n_rt, int(found[3] or n_rt))
    return [chosen[stride] for stride in sorted(chosen)]


def compute_loss(logits, labels):
    """Binary cross-entropy for one logit, cross-entropy for one per class."""
    if logits.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(logits[:, 0], labels.to(logits.dtype))
    return F.cross_entropy(logits, labels)


def build_model(args, n_outputs):
    """(model, text on the origin of its weights), from --weights and --finetune."""

    def build(finetune, pretrained=False):
        torch.manual_seed(args.seed)
        model = Classifier(args.backbone, n_outputs, args.scales, args.image_size, finetune, pretrained)
        return model.to(DEVICE)

    if args.backbone == "pixels":
        return build("head"), "no network"
    if args.weights in ("auto", "pretrained"):
        offline_if_unreachable()
        try:
            model = build(args.finetune or "head", pretrained=True)
            cfg = timm.get_pretrained_cfg(args.backbone)
            return model, f"pretrained ({cfg and cfg.hf_hub_id or args.backbone})"
        except InputError:
            raise
        except Exception as error:  # from the Hub, its cache, or timm
            missing = f"no pretrained weights of {args.backbone} could be had ({type(error).__name__})"
            if args.weights == "pretrained":
                raise InputError(f"{missing}: connect to the network, or give --weights FILE or random") from None
            say(f"warning: {missing}: random initialisation")
    elif args.weights != "random":
        model = build(args.finetune or "head")
        load_weights(model.backbone, args.weights)
        path = Path(args.weights)
        return model, f"file {path.name} {zlib.crc32(path.read_bytes()):08x}"
    return build(args.finetune or "all"), "random initialisation"


@functools.cache
def offline_if_unreachable():
    """Ask the Hugging Face Hub once per command; if it does not answer, use its cache only."""
    try:
        huggingface_hub.utils.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except Exception:  # any error of its HTTP library
        huggingface_hub.constants.HF_HUB_OFFLINE = True


def load_weights(backbone, path):
    """Load a backbone, without its head, from a state dict or from the best.pt of another run."""
    try:
        state = timm.models.load_state_dict(path, use_ema=False, weights_only=True)
        prefix = re.compile(r"^(module\.|model\.|backbone\.)+")
        state = {prefix.sub("", name): tensor for name, tensor in state.items()}
        backbone.load_state_dict({name: state[name] for name in backbone.state_dict()})
    except Exception as error:  # unreadable, or a tensor is missing or of another shape
        reason = " ".join(str(error).split())[:250]  # torch's message has several lines
        raise InputError(f"--weights {path}: does not fit this --backbone ({type(error).__name__}: {reason})") from None


# ---------------------------------------------------------------- checkpoints and run folders
def save_checkpoint(path, contents):
    """Write a checkpoint through a buffer, so that a full disk is an OSError."""
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    with whole_file(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_checkpoint(path):
    """The tensors, numbers and text of a checkpoint; no code in it can run."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # from torch, pickle or zipfile
        raise InputError(f"{path}: not a checkpoint that can be trusted ({type(error).__name__})") from None


def load_run(run):
    """(model in eval mode, checkpoint with config, recipe, cohort and versions) of a run folder."""
    path = Path(run) / "best.pt"
    checkpoint = load_checkpoint(path)
    try:
        config = checkpoint["config"]
        checkpoint["recipe"] = Recipe.from_text(checkpoint["recipe"])
        checkpoint["chromatogram"] = np.array(checkpoint["chromatogram"])
    except (KeyError, ValueError) as error:
        raise InputError(f"{path}: not a checkpoint of this train.py ({error})") from None
    settings = argparse.Namespace(**config["settings"])
    versions = checkpoint["versions"]
    try:
        options = settings.scales, settings.image_size, settings.finetune
        model = Classifier(settings.backbone, config["n_outputs"], *options)
        model.load_state_dict(checkpoint["model"])
    except Exception as error:  # timm and torch raise several types
        reason = " ".join(str(error).split())[:250]
        timms = f"made with timm {versions['timm']}, this is {version('timm')}"
        raise InputError(f"{path}: cannot build its network ({timms}; {reason})") from None
    same_versions = all(versions[name] == version(name) for name in ("timm", "torch"))
    if same_versions and settings.architecture != model.architecture:
        raise InputError(f"{path}: the layers of {settings.backbone} have changed since its training")
    model.mean = config["mean"]  # those of timm may change with its version
    model.std = config["std"]
    return model.to(DEVICE).eval(), checkpoint


def find_run(run=None):
    """The given run folder, or the newest one below runs/."""
    if not run:
        found = find_runs("runs")
        run = max(found, key=lambda one: os.path.getmtime(one / "best.pt"), default="runs/")
    if not Path(run, "best.pt").is_file():
        raise InputError(f"{run}: no best.pt; did train.py finish?")
    return Path(run)


def find_runs(folder):
    """Folders of the finished runs in a folder and below it, also behind symbolic links."""
    return [Path(folder, path).parent for path in sorted(glob("**/best.pt", root_dir=folder, recursive=True))]


# ---------------------------------------------------------------- the head of a frozen backbone
def fit_head(model, table, cache, settings):
    """Fit the head as L2 logistic regression on cached features, training and validation together.

    The problem is convex: there is no learning rate, batch order or epoch to choose. The penalty is
    fixed, so no validation set is needed. Validation metrics are cross-validated: each unaugmented
    picture is predicted by a head fitted without its group. Returns the same as `fit`, one row long.
    """
    began = time.time()
    table = table[table["split"] != "held out"]
    (views, labels), (clean, clean_labels) = look_up_features(cache, table)
    model.eval().fit_standardize(clean)
    with torch.no_grad():
        x = torch.cat([model.head_inputs(part.to(DEVICE)).cpu() for part in (*views, clean)])
    z, to_weights = compute_kernel_basis(x)
    z_train, z_clean = z.split([len(labels), len(clean)])
    weight, bias = fit_logistic(z_train, labels, model.n_outputs)

    folds = assign_folds(table, HEAD_FOLDS, settings.seed)
    fold_of_view = torch.tensor(folds).repeat(len(views))
    fold_of_clean = torch.tensor(folds[~table["copy"]])
    val_logits = torch.empty(len(clean), model.n_outputs, dtype=z.dtype)
    for k in progress(range(HEAD_FOLDS), "cross-validation"):
        others = fold_of_view != k
        held_out = fold_of_clean == k
        fold_weight, fold_bias = fit_logistic(z_train[others], labels[others], model.n_outputs)
        val_logits[held_out] = z_clean[held_out] @ fold_weight.T + fold_bias

    # A head with a weak signal is overconfident: shrink its logits towards the class frequencies.
    _, baseline = fit_logistic(z_clean[:, :0], clean_labels, model.n_outputs)
    share = choose_shrinkage(val_logits, baseline, clean_labels)
    model.head.weight.data.copy_(share * to_weights(weight))
    model.head.bias.data.copy_(torch.lerp(baseline, bias, share))
    train_logits = torch.lerp(baseline, z_train @ weight.T + bias, share)
    val_logits = torch.lerp(baseline, val_logits, share)

    row = {"epoch": 1, "kept": True, **split_metrics("train", train_logits.float(), labels)}
    row |= split_metrics("val", val_logits.float(), clean_labels)
    row["seconds"] = round(time.time() - began, 2)
    say_epoch("logistic regression; validation metrics are cross-validated:", row)
    return [row], copy_weights(model)


def fit_logistic(z, labels, n_outputs):
    """(weight (K, d), bias (K,)) that minimise loss and L2 penalty on features z (n, d)."""
    weight = torch.zeros(n_outputs, z.shape[1], dtype=z.dtype, requires_grad=True)
    bias = torch.zeros(n_outputs, dtype=z.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=300, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        loss = compute_loss(z @ weight.T + bias, labels) + L2 / 2 * weight.square().sum()  # bias is not penalised
        loss.backward()
        return loss

    optimizer.step(objective)
    return weight.detach(), bias.detach()


def compute_kernel_basis(x):
    """Kernel trick: if n < F, replace features x (n, F) by z (n, n) with equal inner products.

    Returns (z, function that maps weights on z to weights on x). The smaller problem has the same
    solution, as the best weights are a weighted sum of the rows of x.
    """
    if x.shape[0] >= x.shape[1]:
        return x.double(), lambda weight: weight
    gram = (x @ x.T).double()
    gram.diagonal().add_(1e-5 * gram.diagonal().mean())  # against the rounding of float32
    z = torch.linalg.cholesky(gram)
    return z, lambda weight: torch.linalg.solve_triangular(z.T, weight.T, upper=True).T.float() @ x


def choose_shrinkage(logits, baseline, labels):
    """The share s, 0.01 to 1, for which s * logits + (1 - s) * baseline has the lowest loss."""
    shares = np.linspace(0.01, 1, 100)
    return min(shares, key=lambda s: compute_loss(torch.lerp(baseline, logits, s), labels).item())


def compute_baseline_loss(labels, n_outputs):
    """Loss of always predicting the class frequencies; it follows a fork's compute_loss."""
    labels = torch.tensor(list(labels))
    _, bias = fit_logistic(torch.empty(len(labels), 0, dtype=torch.float64), labels, n_outputs)
    return compute_loss(bias.expand(len(labels), -1), labels).item()


def compute_baseline_auc(labels):
    """ROC AUC that 1 in 20 permutations of labels exceeds (Mann and Whitney 1947), for the rarest class."""
    counts = np.unique(labels, return_counts=True)[1]
    n = len(labels)
    return float(0.5 + norm.ppf(0.95) * np.sqrt((n + 1) / (12 * counts * (n - counts))).max())


# ---------------------------------------------------------------- learning-rate range test
def find_lr(model, loaders, settings, run=None):
    """The learning rate whose first steps lower the loss most and stay stable; restores the model.

    Smith's range test (2017, arXiv:1506.01186) raises the rate at each step; on few pictures more
    steps alone lower the loss. Here each rate, four per decade, takes the first 24 steps of
    the training from the same weights. Columns of lr_find.csv: `highest` is the training loss of the
    worst epoch; `loss` is that of the second half of the steps, or for a head, which overfits, the
    validation loss after them.
    """
    loader = loaders["train"]
    n_steps = 24
    before = copy_weights(model)
    epochs = (draw_batches(loader, epoch, settings) for epoch in itertools.count(1))
    batches = list(itertools.islice(itertools.chain.from_iterable(epochs), n_steps))
    network = distribute(model)
    rows = []
    for lr in progress(np.logspace(-5, 0, 21), "learning-rate range test"):
        model.load_state_dict(before, strict=False)
        model.train(not model.frozen)
        optimizer, scaler = make_optimizer(model, settings, lr)
        torch.manual_seed(settings.seed)
        outputs = [train_step(network, optimizer, scaler, x, y, settings) for x, y in batches]
        later = predict(model, loaders["val"]) if model.frozen else outputs[n_steps // 2 :]
        loss = compute_loss(*collect(later)).item()
        by_epoch = [outputs[i : i + len(loader)] for i in range(0, n_steps, len(loader))]
        highest = np.max([compute_loss(*collect(of_epoch)).item() for of_epoch in by_epoch])
        rows.append({"lr": lr, "loss": loss, "highest": highest})
        if not loss < 2 * min(row["loss"] for row in rows):
            break
    model.load_state_dict(before, strict=False)
    model.zero_grad()
    curve = pd.DataFrame(rows)
    lr, reason = suggest_lr(curve, model.frozen)
    say(f"learning-rate range test: {lr:.2g} ({reason})")
    if run and RANK == 0:
        write_table(run / "lr_find.csv", curve)
        with figure(run / "lr_find.png", "Learning-rate range test", (6, 4)) as axes:
            curve.plot("lr", ax=axes, logx=True, marker=".", xlabel="learning rate", ylabel="loss")
            axes.axvline(lr, color="tab:red", linestyle="--")
            axes.xaxis.set_major_formatter("{x:g}")
            measured = "validation loss" if model.frozen else "second half of the steps"
            axes.legend([measured, "worst epoch", f"{lr:.2g}: {reason}"])
    return lr


def suggest_lr(curve, frozen):
    """(learning rate, reason) from the columns lr, ascending, loss and highest of the range test.

    Rates from the first whose worst epoch exceeds the starting loss by 8 % are dropped. A head then
    uses the rate of lowest loss. A whole network uses the highest rate whose loss is at most a
    fifth of the starting loss above the lowest.
    """
    start = curve["highest"][0]
    harmful = ~(curve["highest"] <= 1.08 * start)  # nan counts as harmful
    curve = curve[harmful.cumsum() == 0]
    margin = 0 if frozen else 0.2 * start
    good = curve[curve["loss"] <= curve["loss"].min() + margin]
    return float(good["lr"].max()), "lowest without harm" if frozen else "highest rate without harm"


# ---------------------------------------------------------------- one training
def train_once(args, pictures, classes, recipe):
    """One training, from pictures to best.pt; returns the run folder."""
    model, settings, table = resolve_settings(args, pictures, recipe)
    run = run_folder(settings)
    if (run / "config.json").exists():
        before = read_json(run / "config.json")["settings"]
        if differing := first_difference(before, list_settings(settings)):
            other = "{} {}, not {}".format(*differing)
            raise InputError(f"{run} is a training with {other}: give another --out or --name")
    if (run / "best.pt").exists():
        say(f"{run} is finished")
        return run
    by_regression = settings.optimizer == "lbfgs"
    fit_table = table[table["split"].isin(["train", "val"] if by_regression else ["train"])]
    val_table = fit_table if by_regression else table[table["split"] == "val"]
    labels = val_table["label"][~val_table["copy"]]
    facts = {
        "data_set": run.parents[1].name,
        "data": settings.data,
        "classes": classes,
        "n_outputs": model.n_outputs,
        "mean": list(model.mean),
        "std": list(model.std),
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "baseline_loss": compute_baseline_loss(labels, model.n_outputs),
        "baseline_auc": compute_baseline_auc(labels),
        "n_pictures": table["split"].value_counts().to_dict(),
    }
    config = facts | {"settings": list_settings(settings)}
    shown = [f"{name} {value}" for name, value in (facts | config["settings"]).items() if value is not None]
    say(f"{run}:\n{textwrap.fill(', '.join(shown), 120)}")
    originals = pictures[(pictures["split"] == "train") & ~pictures["copy"]]
    if RANK == 0:
        run.mkdir(parents=True, exist_ok=True)
        write_json(run / "config.json", config)
        draw_transformed(run, originals, model, recipe, settings)
    history, best_weights = learn(model, settings, table, pictures, recipe, run)
    if RANK > 0:
        return run

    best = find_kept_epoch(history)
    model.load_state_dict(best_weights, strict=False)
    if settings.fold is not None:
        write_held_out(run, model, table, recipe, settings.fold)
    if by_regression:  # `fit` writes it after each epoch
        write_table(run / "epochs.csv", pd.DataFrame(history))
    else:
        control = ", shuffled labels" * settings.shuffle_labels
        draw_curves(run, history, f"{settings.backbone}, {settings.weights}{control}")
    chromatogram, cohort = summarize_cohort(originals, recipe)
    by_chance = best.get("val_roc_auc", 1) < facts["baseline_auc"]
    contents = {
        "model": model.state_dict(),
        "epoch": best["epoch"],
        "val_loss": best["val_loss"],
        "by_chance": by_chance,
        "config": config,
        "fitted": fit_table["digest"].tolist(),
        "recipe": recipe.to_text(),
        "chromatogram": chromatogram.tolist(),
        "cohort": cohort,
        "versions": {name: version(name) for name in ("torch", "torchvision", "timm", "numpy")},
    }
    save_checkpoint(run / "best.pt", contents)
    say(f"kept: epoch {best['epoch']} of {len(history)}, validation loss {best['val_loss']:.3f}")
    say(f"run folder: {run}")
    if best["epoch"] <= len(history) / 10:
        say("warning: the kept epoch is among the first tenth; try a lower --lr")
    if by_chance:
        say(f"warning: no better than chance: 1 in 20 permutations has a ROC AUC above {facts['baseline_auc']:.3f}")
    return run


def learn(model, settings, table, pictures, recipe, run=None, on_epoch=lambda row: None):
    """Train by `fit` or `fit_head`; returns (history, weights of the kept epoch) on rank 0."""
    cache = cache_features(model, pictures, recipe, settings) if settings.views else None
    if settings.optimizer != "lbfgs":
        return fit(model, make_loaders(model, table, recipe, settings, cache), settings, run, on_epoch)
    if RANK > 0:
        return [], None
    return fit_head(model, table, cache, settings)


def resolve_settings(args, pictures, recipe):
    """(model, settings, table) of a training: each flag has its final value for this model and data.

    config.json saves the settings. They identify cached features and decide if trainings are equal.
    """
    n_outputs = len(set(pictures["phenotype"]))
    model, origin = build_model(args, 1 if n_outputs == 2 else n_outputs)
    table = make_training_table(pictures, args)
    settings = fill_augmentation(args)
    settings.pictures = digest_pictures(pictures, recipe)
    settings.weights = origin
    settings.finetune = "head" if model.frozen else "all"
    settings.scales = [f"{s}:{n_rt}" + f"x{n_mz}" * (n_mz != n_rt) for s, n_rt, n_mz in model.scales]
    settings.image_size = model.image_size
    settings.architecture = model.architecture
    if args.views == "auto":
        settings.views = min(16, max(1, CACHED_VIEWS // len(pictures))) if model.frozen else 0
    if args.optimizer == "auto":
        settings.optimizer = "lbfgs" if settings.views else "adamax"
    if (settings.views and not model.frozen) or (settings.optimizer == "lbfgs" and not settings.views):
        raise InputError("--views and --optimizer lbfgs need --finetune head; lbfgs also needs --views")
    if settings.optimizer == "lbfgs":
        vars(settings).update(dict.fromkeys(LOOP_SETTINGS))  # all None
        return model, settings, table
    n_train = (table["split"] == "train").sum()
    if args.batch_size == "auto":
        settings.batch_size = 8 if n_train < 1000 else 32
    if args.epochs == "auto":  # aim at 400 steps
        n_steps = math.ceil(n_train / settings.batch_size / WORLD)
        settings.epochs = min(100, max(20, math.ceil(400 / n_steps)))
    if args.patience == "auto":
        # The last epoch of a cosine schedule was as good as the best one (EXPERIMENTS).
        to_the_end = args.scheduler == "cosine"
        settings.patience = settings.epochs if to_the_end else max(10, settings.epochs // 4)
    return model, settings, table


def fill_augmentation(args):
    """A copy of arguments with the values of their --augmentation, except a given --warp."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    return argparse.Namespace(**vars(args) | AUGMENTATION[args.augmentation] | given)


def list_settings(settings):
    """{name: value} of the settings that identify a training."""
    return {name: value for name, value in vars(settings).items() if name not in NOT_SETTINGS}


def run_folder(args):
    """runs/<data set>/<backbone>/seed<seed>[-shuffled][-fold<k>]"""
    seed = f"seed{args.seed}" + "-shuffled" * args.shuffle_labels
    if args.fold is not None:
        seed += f"-fold{args.fold}"
    return Path(args.out, args.name or Path(args.data).resolve().name, args.backbone, seed)


def make_training_table(pictures, settings):
    """Apply --shuffle-labels and --folds (k is held out, k + 1 validates); shifted copies only train."""
    table = pictures.copy()
    if settings.shuffle_labels:
        table["label"] = shuffle_labels(table, settings.seed)
    if settings.fold is not None:
        folds = assign_folds(table, settings.folds, settings.seed)
        offset = (folds - settings.fold) % settings.folds
        table["split"] = np.select([offset == 0, offset == 1], ["held out", "val"], "train")
    return table[(table["split"] == "train") | ~table["copy"]]


def shuffle_labels(table, seed):
    """Permuted labels, a control. Copies, and rows of one group and label, keep a common label."""
    unit = table.groupby(["group", "label"]).ngroup().to_numpy()
    labels = table["label"].groupby(unit).first().to_numpy()
    return np.random.default_rng(seed).permutation(labels)[unit]


def assign_folds(table, n_folds, seed):
    """Fold (N,) of each row, round-robin within labels; a group and its copies stay together."""
    groups = table.drop_duplicates("group").sample(frac=1, random_state=seed)
    groups = groups.sort_values("label", kind="stable")
    fold = pd.Series(np.arange(len(groups)) % n_folds, index=groups["group"])
    return table["group"].map(fold).to_numpy()


def find_classes(pictures, positive=None):
    """Sorted phenotypes of find_pictures; class 1 of two is `positive`, or else the last."""
    counts = pd.crosstab(pictures["split"], pictures["phenotype"])
    classes = list(counts)
    if len(classes) < 2:
        raise InputError(f"one phenotype only ({classes[0]}); a classifier needs two")
    if positive and positive not in classes:
        raise InputError(f"--positive {positive!r} is not one of {', '.join(classes)}")
    for split, row in counts.iterrows():
        if row.min() == 0:
            raise InputError(f"the {split} split has no picture of {first_few(row.index[row == 0])}")
    return sorted(classes, key=lambda name: name == positive)  # positive last; the order stays


def write_held_out(run, model, table, recipe, fold):
    """held_out.csv: the logits of the fold's held-out pictures."""
    table = table[table["split"] == "held out"].assign(fold=fold)
    outputs = predict(model, DataLoader(Pictures(table, to_input(model, recipe)), 32))
    logits = torch.cat([batch for batch, _ in outputs]).numpy()
    logits = pd.DataFrame(logits, index=table.index).add_prefix("logit_")
    columns = ["fold", "sample_name", "group", "phenotype", "label"]
    write_table(run / "held_out.csv", table[columns].join(logits))


@contextmanager
def figure(path, title, size, **subplots):
    """Yield the axes of a figure (inches), then save it as PNG. "; " in the title breaks the line."""
    with style.context(["default", {"text.parse_math": False}]):  # no matplotlibrc; a $ is a $
        drawing = Figure(figsize=size, layout="constrained")
        axes = drawing.subplots(**subplots)
        drawing.suptitle(title.replace("; ", "\n"), fontsize=11)
        yield axes
        with whole_file(path) as temporary:
            drawing.savefig(temporary, dpi=150)


def draw_curves(run, history, title):
    table = pd.DataFrame(history)
    kept = find_kept_epoch(history)["epoch"]
    with figure(run / "curves.png", title, (10, 4), ncols=2) as (left, right):
        table.plot("epoch", ["train_loss", "val_loss"], ax=left, marker=".", title="Loss")
        table.plot("epoch", shown_metrics(table), ax=right, marker=".", title="Validation")
        for axes in (left, right):
            axes.axvline(kept, color="0.6", linestyle="--", label=f"kept ({kept})")
            axes.legend()
            axes.xaxis.get_major_locator().set_params(integer=True)
        top = max(1.5 * table["train_loss"][0], 1.2 * table["val_loss"].median())  # one bad epoch must not dominate
        left.set_ylim(0, min(top, 1.05 * left.get_ylim()[1]))


def draw_transformed(run, originals, model, recipe, settings):
    """Article, Figure 4: training pictures as the network sees them, one view of each."""
    shown = originals.iloc[:: max(1, len(originals) // 9)].head(9)
    views = Pictures(shown, training_transform(model, recipe, settings))
    # The infinite padding is clipped to white.
    grid = make_grid([x for x, _ in views], nrow=3, padding=4, pad_value=math.inf)
    image = grid.permute(1, 2, 0).numpy() * model.std + model.mean
    with figure(run / "transformed_grid.png", "Training pictures as the network sees them", (8, 8.3)) as axes:
        axes.imshow(image.clip(0, 1))
        axes.axis("off")


# ---------------------------------------------------------------- tuning
FINISHED = TrialState.COMPLETE, TrialState.PRUNED


def tune(args, pictures, recipe):
    """Optuna over every combination of SEARCH (article, "Hyperparameter optimisation").

    Minimises a trial's best validation loss, with median pruning; writes trials.csv. Any number of
    processes with the same command and --storage share the work.
    """

    def objective(trial):
        chosen = {name: trial.suggest_categorical(name, values) for name, values in SEARCH.items()}
        say(f"trial {trial.number}: {chosen}")
        arguments = argparse.Namespace(**vars(args) | chosen)
        model, settings, table = resolve_settings(arguments, pictures, recipe)

        def prune(row):
            trial.report(score_epoch(row), row["epoch"])
            if trial.should_prune():
                raise optuna.TrialPruned

        try:
            history, _ = learn(model, settings, table, pictures, recipe, on_epoch=prune)
        except InputError as error:
            say(f"trial {trial.number} is given up: {error}")
            raise optuna.TrialPruned from None  # a pruned trial counts, a failed one is repeated
        return min(map(score_epoch, history))

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder = run_folder(args).parent / "tune"
    folder.mkdir(parents=True, exist_ok=True)
    default = URL.create("sqlite", database=f"{folder}/study.db").render_as_string()
    storage = args.storage or default
    identity = list_settings(args) | SEARCH | {"pictures": digest_pictures(pictures, recipe)}
    name = f"{args.backbone}-{zlib.crc32(json.dumps(identity).encode()):08x}"
    pruner = optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=5)
    options = {"study_name": name, "load_if_exists": True, "pruner": pruner}
    for attempt in range(5):
        try:
            study = optuna.create_study(storage=storage, sampler=EveryCombination(), **options)
            break
        except Exception as error:  # depends on the database
            if attempt == 4:
                raise InputError(f"--storage {storage}: {first_line(error)}") from None
            time.sleep(attempt / 2)  # another process may be creating the same database
    while len(study.get_trials(states=FINISHED)) < args.tune:
        study.optimize(objective, n_trials=1)
    if not study.get_trials(states=[TrialState.COMPLETE]):
        raise InputError("--tune: no trial was completed; try a lower --lr")
    write_table(folder / "trials.csv", study.trials_dataframe())
    best = [f"--{flag.replace('_', '-')} {value}" for flag, value in study.best_params.items()]
    say(f"{args.tune} trials in {folder}; best value {study.best_value:.3f}: train it with {' '.join(best)}")


class EveryCombination(optuna.samplers.RandomSampler):
    """Each trial tries the combination of SEARCH that the fewest trials have finished.

    So neither a killed command nor several processes leave a combination out.
    """

    def before_trial(self, study, trial):
        combinations = [dict(zip(SEARCH, values, strict=True)) for values in itertools.product(*SEARCH.values())]
        trials = study.get_trials()
        finished = [other.params for other in trials if other.state in FINISHED]
        fewest = min(map(finished.count, combinations))
        left = [combination for combination in combinations if finished.count(combination) == fewest]
        n_running = sum(other.state == TrialState.RUNNING for other in trials[: trial.number])
        self.chosen = left[n_running % len(left)]

    def sample_independent(self, study, trial, name, distribution):
        return self.chosen[name]


# ---------------------------------------------------------------- command line
def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument_group("what to train").add_argument
    add("--backbone", nargs="+", required=True, metavar="NAME", help="timm names or patterns, article, pixels")
    add("--params", nargs=2, type=float, metavar=("MIN", "MAX"), help="limit patterns to MIN-MAX million parameters")
    add("--data", metavar="DIR", help="folder made by convert.py (default: the demo)")
    add("--weights", default="auto", help="auto (pretrained, if available), pretrained, random, or a file")
    add("--finetune", choices=["head", "all"], help="what to train (default: head; all if weights are random)")
    scales = "inputs of the head; GRID: N or TIMExMZ cells (default: SCALES)"
    add("--scales", nargs="+", metavar="STRIDE:GRID", help=scales)
    add("--image-size", type=count, metavar="N", help="pixels a side (default: the backbone's own)")
    add("--positive", metavar="CLASS", help="phenotype of class 1 (default: the last by name)")
    add = parser.add_argument_group("optimisation").add_argument
    optimizer = "auto: lbfgs (logistic regression) for a head on cached features, else adamax"
    add("--optimizer", choices=["auto", "lbfgs", *OPTIMIZERS], default="auto", help=optimizer)
    add("--epochs", type=or_auto(count), default="auto", help="maximum; auto: about 400 steps")
    patience = "stop after N worse epochs and keep the best; auto with cosine: train all, keep the last"
    add("--patience", type=or_auto(count), default="auto", help=patience)
    add("--batch-size", type=or_auto(count), default="auto", help="per process; auto: 8, or 32 for 1,000+ pictures")
    add("--lr", type=or_auto(float), default="auto", help="learning rate, or auto: range test")
    add("--scheduler", choices=list(SCHEDULERS), default="cosine", help="the article's is cosine")
    add("--weight-decay", type=float, default=2e-5, help="L2 penalty (adamw: decoupled)")
    add("--amp", action=argparse.BooleanOptionalAction, default=CUDA or FAST_BFLOAT16, help="mixed precision")
    add = parser.add_argument_group("training pictures").add_argument
    presets = "preset: physical varies as instruments do"
    add("--augmentation", choices=list(AUGMENTATION), default="physical", help=presets)
    add("--warp", type=float, metavar="PERCENT", help="retention shift (default: the preset's)")
    views = "frozen backbone: cache K augmented views per picture; 0: augment every epoch"
    add("--views", type=or_auto(int), default="auto", metavar="K", help=views)
    add = parser.add_argument_group("experiments").add_argument
    add("--repeats", type=count, default=1, metavar="N", help="trainings with seeds SEED, SEED + 1, ...")
    add("--folds", type=int, default=0, metavar="K", help="cross-validation over train and val")
    add("--tune", type=int, default=0, metavar="N", help="Optuna trials of optimizer and scheduler")
    add("--storage", metavar="URL", help="Optuna database that processes share (default: in the tune folder)")
    add("--shuffle-labels", action="store_true", help="permute labels, as a control")
    add = parser.add_argument_group("machine and output").add_argument
    add("--seed", type=int, default=2643, help="seed of initial weights, order and augmentation")
    workers = cores() if CUDA else max(1, cores() // 4)  # leave cores for the network
    add("--workers", type=int, default=workers, help="processes that load pictures; augmentation depends on how many")
    add("--out", default="runs", metavar="DIR", help="writes DIR/<data set>/<backbone>/seed<seed>/")
    add("--name", help="name that replaces <data set>")
    return parser


def or_auto(kind):
    """Type of a flag: a number of that kind, or the word auto."""

    def number(text):
        return text if text == "auto" else kind(text)

    return number


def parse_arguments(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    if not args.data:
        parser.set_defaults(demo=True, data="demo", **DEMO)
        args = parser.parse_args(argv)
    numbers = [args.views, args.workers, args.seed, args.weight_decay, args.warp]
    negative = [number for number in numbers if number not in (None, "auto") and number < 0]
    several = args.folds or args.repeats > 1 or WORLD > 1  # trainings or processes
    known_weights = args.weights in ("auto", "pretrained", "random") or Path(args.weights).is_file()
    problems = {
        "--lr must be a number above 0, or auto": args.lr != "auto" and not 0 < args.lr < math.inf,
        "--views, --workers, --seed, --weight-decay and --warp must be 0 or more": negative,
        "--batch-size must be 2 or more: one picture has no batch statistics": args.batch_size == 1,
        "--tune excludes --folds, --repeats and torchrun (share a --storage)": args.tune and several,
        "--folds must be at least 3: held out, validation and training": 0 < args.folds < 3,
        f"--weights {args.weights}: not a file, auto, pretrained or random": not known_weights,
    }
    for problem, found in problems.items():
        if found:
            parser.error(problem)
    return args


def expand_trainings(args):
    """[arguments of each training]: one backbone, one seed, one fold each."""
    backbones = expand_backbones(args.backbone, args.params)
    folds = range(args.folds) if args.folds else [None]
    trainings = []
    for backbone, i, fold in itertools.product(backbones, range(args.repeats), folds):
        training = vars(args) | {"backbone": backbone, "seed": args.seed + i, "fold": fold}
        if backbone == "pixels" and (len(backbones) > 1 or "demo" in args):
            training |= {"scales": None, "image_size": None}  # these are for networks
        trainings.append(argparse.Namespace(**training))
    return trainings


def expand_backbones(names, params):
    """Names, patterns and 'article' -> model names; params limits those of patterns (millions)."""
    chosen = []
    for name in names:
        if name == "article":
            chosen += ARTICLE
        elif name == "pixels" or timm.is_model(name):
            chosen.append(name)
        elif matches := timm.list_models(name) or timm.list_pretrained(name):
            chosen += [match for match in matches if not params or params[0] <= count_millions(match) <= params[1]]
        else:
            near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), 3, cutoff=0.3)
            raise InputError(f"--backbone {name!r} is not a timm model; the nearest: {', '.join(near) or 'none'}")
    return list(dict.fromkeys(chosen))


def count_millions(name):
    """Million parameters of a timm model."""
    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(name).parameters()) / 1e6


def make_demo(args):
    say(f"no --data: the demo cohort, with settings for two CPU cores: {DEMO}")
    if RANK == 0 and not Path(args.data, "samples.csv").exists():
        script = Path(__file__).with_name("tests") / "demo.py"
        alone = os.environ.copy()
        alone.pop("TORCHELASTIC_RUN_ID", None)
        subprocess.run([sys.executable, script, args.data], check=True, env=alone)
    if WORLD > 1:
        dist.barrier()  # the others wait for the cohort


def main():
    args = parse_arguments()
    if WORLD > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if CUDA else "gloo", timeout=timedelta(days=1))
        if CUDA:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    trainings = expand_trainings(args)
    if "demo" in args:
        make_demo(args)
    pictures, recipe = find_pictures(args.data, ("train", "val"))
    classes = find_classes(pictures, args.positive)
    pictures["label"] = make_labels(pictures, classes)
    groups = pictures.groupby("phenotype")["group"].nunique()
    if args.folds > groups.min():
        few = f"{groups.idxmin()} has {groups.min()} samples or groups, and each fold needs one"
        raise InputError(f"--folds {args.folds}: {few}")
    results = []
    failures = []
    for training in trainings:
        if args.tune:
            tune(training, pictures, recipe)
            continue
        try:
            results.append(train_once(training, pictures, classes, recipe))
        except Exception as error:  # for example out of memory, or an unsupported size
            if len(trainings) == 1 or WORLD > 1:  # else the others would wait for ever
                raise
            failures.append(f"{run_folder(training)}: {first_line(error)}")
            say(f"failed: {failures[-1]}")
    if WORLD > 1:
        dist.destroy_process_group()
    if results:
        evaluated = results[0] if len(results) == 1 else results[0].parents[1]
        say(f"next:\n  python evaluate.py {evaluated}")
        say(f"  python explain.py {results[0]}")
    for failure in failures:
        print(f"left out: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    run_script(main)
