"""Train a classifier of pictures: a timm backbone, a new head, one visible loop.

Article, "Transfer learning", "Hyperparameter optimisation" and "Evaluating the final model". Read `Classifier`, then
`fit`, the loop of every mode; what is fed into it, fresh pictures or stored features, `make_loaders` decides.

    python train.py --backbone mobileone_s3                       # the demo cohort, made first if it is not there
    python train.py --backbone mobileone_s3 --data data/golestan --repeats 5
    python train.py --backbone article --data data/golestan       # Table 1; then: python evaluate.py runs/golestan
    python train.py --backbone convnext_nano pixels --data data/golestan --folds 10
    python train.py --backbone mobileone_s3 --data data/golestan --tune 8
    torchrun --nproc-per-node 4 train.py --backbone convnext_large --data data/golestan --finetune all

The same command goes on where it was stopped, or says that it is finished; other settings need another --out or --name.
Under torchrun W processes with batch size B take the steps of one with W x B, but for statistics of batch norms; it is
for networks that learn as a whole, as each process stores features and solves heads by itself.
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
import time
import zlib
from contextlib import contextmanager
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

from deeplcms import Help, InputError, Recipe, summarize_cohort, colours, cores, count, digest_pictures, find_pictures
from deeplcms import (
    first_difference,
    first_few,
    first_line,
    make_labels,
    compute_metrics,
    read_json,
    read_picture,
    run_script,
)
from deeplcms import slow_waves, whole_file, write_json, write_table


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

# Defaults when no --data is given, so that two CPU cores need minutes, not hours.
DEMO = {"image_size": 112, "lr": 0.01, "finetune": "all", "epochs": 12}

OPTIMIZERS = {"adam": Adam, "adamw": AdamW, "adamax": Adamax, "rmsprop": RMSprop}
SCHEDULERS = {
    "cosine": lambda optimizer, args: CosineAnnealingLR(optimizer, args.epochs),
    "plateau": lambda optimizer, args: ReduceLROnPlateau(optimizer, patience=max(1, args.patience // 3)),
}

# What happens to a training picture, for a fork to edit: what an instrument does, and what the article does to
# photographs, for its final model and for those before. warp: drift of retention, percent of its axis; gain: of the
# logarithm of sensitivity along m/z (deviations). erase: chance of a blank rectangle, erase_size: the largest, a share
# of the picture. rotate: degrees at most. color_jitter: of brightness, contrast and saturation.
AUGMENTATION = {
    "physical": {"warp": 1.0, "gain": 0.3, "erase": 0.5, "erase_size": 0.01, "rotate": 0, "color_jitter": 0},
    "article": {"warp": 0, "gain": 0, "erase": 1.0, "erase_size": 0.33, "rotate": 5, "color_jitter": 0.25},
    "article-early": {"warp": 0, "gain": 0, "erase": 0.05, "erase_size": 0.33, "rotate": 5, "color_jitter": 0.05},
    "none": {"warp": 0, "gain": 0, "erase": 0, "erase_size": 0, "rotate": 0, "color_jitter": 0},
}

# Which maps a head sees by default, STRIDE:GRID: stride 1 is the picture, a grid of N pools a map to N x N cells. The
# head of a network sees those of its strides that are listed.
SCALES = {"pixels": ["1:56"], "network": ["1:56", "8:14", "16:14"]}
L2, OUT_OF_FOLD = 1e-6, 5  # of a head that is solved: L2, and folds for its validation figures
STATISTICS_FROM = 200  # training pictures, as they are, that give batch norms of averaged weights mean and variance
CACHED_VIEWS = 1000  # draws of all pictures together that --views auto stores, but 1 to 16 of each
# What --tune tries, every combination of it: flags and their values (of AUGMENTATION --warp alone is one).
SEARCH = {"optimizer": list(OPTIMIZERS), "scheduler": list(SCHEDULERS)}
# Flags that change no training. Any other is a setting of it by itself, a new one of a fork, too.
NOT_SETTINGS = ("params", "repeats", "tune", "storage", "workers", "data", "name", "out", "demo")
VIEWS_SEED = 2643  # of stored views, so that repeats, folds and trials share them
CHANNELS = 3  # of an input: red, green and blue of the colormap

RANK, WORLD = 0, 1
if dist.is_torchelastic_launched():  # by torchrun; a scheduler may leave some of its variables behind
    RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
FAST_BFLOAT16 = getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)  # older torch does not know


def say(text):
    if RANK == 0:
        print(text, flush=True)  # into a log file too, line by line


def progress(batches, title, total=None):
    return tqdm(batches, desc=title, total=total, unit="batch", leave=False, disable=None if RANK == 0 else True)


@contextmanager
def figure(path, title, size, **subplots):
    """Yield the axes of a figure (inches); the PNG is written when the block ends well. "; " in the title breaks it."""
    with style.context(["default", {"text.parse_math": False}]):  # no matplotlibrc, and a $ in a name is a $
        drawing = Figure(figsize=size, layout="constrained")
        axes = drawing.subplots(**subplots)
        drawing.suptitle(title.replace("; ", "\n"), fontsize=11)
        yield axes
        with whole_file(path) as temporary:
            drawing.savefig(temporary, dpi=150)


# ---------------------------------------------------------------- pictures
def to_input(model, recipe, jitter=0):
    """The one way of a picture, uint8 (H, W), into a network: float (CHANNELS, size, size), coloured and normalised.

    It is squashed to the size, never cropped, as position is the measurement. jitter: of photographs, in the article's
    augmentation. For one grey channel in place of three colours change CHANNELS and the first step.
    """
    steps = [v2.Lambda(functools.partial(colours, colormap=recipe.colormap)), v2.ToImage()]
    if jitter:
        steps.append(v2.ColorJitter(jitter, jitter, jitter))
    steps += [v2.Resize((model.image_size, model.image_size)), v2.ToDtype(torch.float32, scale=True)]
    return v2.Compose([*steps, v2.Normalize(model.mean, model.std), v2.ToPureTensor()])


def make_inputs(model, recipe, pictures):
    """Pictures [uint8 (H, W)] as the model takes them, float (N, CHANNELS, size, size)."""
    return torch.stack(list(map(to_input(model, recipe), pictures))).contiguous()


def training_transform(model, recipe, args):
    """The same for the picture of a run that an instrument, or a camera, could have measured instead."""
    draw = v2.Lambda(functools.partial(augment, args=args))
    return v2.Compose([draw, to_input(model, recipe, args.color_jitter)])


def augment(picture, args):
    """A random draw of a picture, uint8 (H, W): the same sample on another day, or what --augmentation makes of it.

    What is moved or erased is log intensity: uncovered or erased means "nothing measured" in any colormap.
    """
    x = torch.from_numpy(picture)[None] / 255  # (1, H, W) log intensity, 0 ... 1
    if args.warp:
        x = warp_retention(x, args.warp / 100)
    if args.gain:
        x = vary_sensitivity(x, args.gain)
    if args.rotate:
        x = v2.RandomRotation(args.rotate, v2.InterpolationMode.BILINEAR)(x)
    if args.erase:
        x = v2.RandomErasing(args.erase, scale=(args.erase_size / 16, args.erase_size))(x)
    return (256 * x[0]).clamp(max=255).byte().numpy()


def draw_wave(n, deviation):
    """Random smooth curve (n,) along an axis, of that standard deviation at each point."""
    waves = slow_waves(np.linspace(0, 1, n)).astype(np.float32)
    return deviation * torch.randn(6) @ torch.from_numpy(waves)


def warp_retention(x, deviation):
    """Log intensity (1, H, W) whose retention drifts along its axis, W; deviation: a fraction of it.

    Mass does not drift: a thousandth of a unit is nothing at these bins.
    """
    n = x.shape[2]
    source = torch.arange(n) + n * draw_wave(n, deviation)  # the column, with fraction, that each column shows
    source = source.clamp(0, n - 1)
    left = source.long()
    right = (left + 1).clamp(max=n - 1)
    columns_left, columns_right = (x.gather(2, column.expand_as(x)) for column in (left, right))
    return torch.lerp(columns_left, columns_right, source - left)


def vary_sensitivity(x, deviation):
    """Log intensity (1, H, W) with another sensitivity along m/z, H; deviation: of the logarithm of intensity."""
    factor = draw_wave(x.shape[1], deviation).exp()[:, None]
    intensity = torch.exp2(8 * x) - 1  # 256 ** x
    return (torch.log1p(factor * intensity) / math.log(256)).clamp(max=1)


class Pictures(Dataset):
    """(input (CHANNELS, size, size), label) of each row of a table of pictures."""

    def __init__(self, table, transform):
        self.paths, self.labels, self.transform = list(table["path"]), list(table["label"]), transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return self.transform(read_picture(self.paths[i])).contiguous(), self.labels[i]


# ---------------------------------------------------------------- model
class Classifier(nn.Module):
    """Maps of a backbone -> mean of each cell of a grid -> standardise -> linear -> logits (N, K).

    scales: [(stride, grid)]. Stride 1 is the picture itself, all that `pixels` has; the last map pooled to one cell is
    the article's way. An early map on a fine grid keeps a spot and its place on the retention-time and m/z axes. The
    model takes pictures or their stored features.
    """

    def __init__(self, backbone, n_outputs, scales=None, image_size=None, finetune="head", pretrained=False):
        super().__init__()
        self.frozen, self.n_outputs, strides = finetune == "head", n_outputs, [1]
        if backbone == "pixels":
            self.backbone, self.image_size = nn.Identity(), image_size or 224
            self.mean = self.std = (0.5,) * CHANNELS
        else:
            own = timm.get_pretrained_cfg(backbone) or timm.models.PretrainedCfg()
            self.image_size = image_size or own.input_size[-1]
            resize_maps = own.fixed_input_size and self.image_size != own.input_size[-1]
            options = (
                {"img_size": self.image_size} if resize_maps else {}
            )  # the others take any size and no such option
            options |= {"num_classes": 0, "in_chans": CHANNELS}
            self.backbone = timm.create_model(backbone, pretrained=pretrained, **options)
            self.mean, self.std = own.mean[:CHANNELS], own.std[:CHANNELS]
            strides += [stage["reduction"] for stage in self.backbone.feature_info]
        self.scales = parse_scales(scales, strides, backbone)
        last_of = {stride: i - 1 for i, stride in enumerate(strides)}  # of several maps of one stride the last
        self.maps = [last_of[stride] for stride, _ in self.scales if stride > 1]
        self.taps = nn.ModuleList(nn.Identity() for _ in self.maps)  # explain.py listens to the maps there
        blocks = self.count_features(backbone)
        self.blocks, self.n_features = blocks, sum(blocks)
        self.standardize = nn.BatchNorm1d(self.n_features, affine=False, momentum=None)
        self.head = nn.Linear(self.n_features, n_outputs)
        nn.init.zeros_(self.head.weight)  # every picture starts at even odds
        nn.init.zeros_(self.head.bias)
        if self.frozen:
            self.backbone.requires_grad_(False)

    def fit_standardize(self, features):
        """Mean and variance of the features (N, F) of pictures.

        A variance below a hundredth of its map's mean is raised to that: what hardly varies in these pictures, but does
        in others, would become huge.
        """
        variance, mean = torch.var_mean(features, 0, correction=0)
        variance = torch.cat([part.clamp(min=0.01 * part.mean()) for part in variance.split(self.blocks)])
        self.standardize.running_mean.copy_(mean)
        self.standardize.running_var.copy_(variance)

    def count_features(self, backbone):
        """Number of features of each scale; InputError for a size that the backbone does not take."""
        blank = torch.zeros(2, CHANNELS, self.image_size, self.image_size)
        try:
            with torch.no_grad():
                sizes = [block.shape[1] for block in self.eval().pool_maps(blank)]
        except Exception as error:  # each family of timm raises another type
            own = timm.get_pretrained_cfg(backbone)
            own = f"; its own is {own.input_size[-1]}" if own else ""
            size = f"{backbone} cannot take pictures of {self.image_size} pixels{own}"
            raise InputError(f"--image-size: {size} ({first_line(error)})") from None
        for i, size, (stride, grid) in zip([None, *self.maps][-len(sizes) :], sizes, self.scales, strict=True):
            channels = CHANNELS if i is None else self.backbone.feature_info[i]["num_chs"]
            if size != channels * grid**2:
                raise InputError(f"{backbone}: its map of stride {stride} has not the channels of its feature_info")
        return sizes

    def pool_maps(self, x):
        """Inputs (N, CHANNELS, size, size) -> a block (N, C * grid * grid) of pooled features for each scale."""
        maps = [x] if self.scales[0][0] == 1 else []
        if self.maps:
            early = {"stop_early": True, "intermediates_only": True}
            found = self.backbone.forward_intermediates(x, indices=self.maps, **early)
            maps += [tap(map_) for tap, map_ in zip(self.taps, found, strict=True)]
        return [F.adaptive_avg_pool2d(m, grid).flatten(1) for m, (_, grid) in zip(maps, self.scales, strict=True)]

    def features(self, x):
        """Inputs (N, CHANNELS, size, size) -> pooled features (N, F)."""
        return torch.cat(self.pool_maps(x), dim=1)

    def head_inputs(self, x):
        """Features (N, F) as the head takes them: standardised, each scale of the same weight, all of length 1.

        So one learning rate or penalty suits a head of 100 inputs and one of 100,000.
        """
        weight = torch.cat([x.new_full((n,), (n * len(self.blocks)) ** -0.5) for n in self.blocks])
        return self.standardize(x) * weight

    def forward(self, x):
        if x.ndim == 4:
            x = self.features(x)
        return self.head(self.head_inputs(x))


def parse_scales(scales, strides, backbone):
    """[(stride, grid)], strides ascending, of ["STRIDE:GRID"], where a stride may be called last; None: the default.

    For a stride of the default that the backbone lacks stands the nearest that it has.
    """
    known, chosen = [str(stride) for stride in dict.fromkeys(strides)], {}
    for text in scales or SCALES["pixels" if backbone == "pixels" else "network"]:
        stride, _, grid = text.replace("last", known[-1]).partition(":")
        if not scales and stride not in known:
            stride = min((abs(math.log2(int(other) / int(stride))), other) for other in known[1:])[1]
        if stride not in known or not grid.isdigit() or int(grid) == 0:
            raise InputError(f"--scales {text}: the strides of {backbone} are {', '.join(known)}; give STRIDE:GRID")
        chosen[int(stride)] = int(grid)
    return sorted(chosen.items())


def compute_loss(logits, labels):
    """Binary cross-entropy for one logit, cross-entropy for one a class."""
    if logits.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(logits[:, 0], labels.to(logits.dtype))
    return F.cross_entropy(logits, labels)


def compute_baseline_loss(labels, n_outputs):
    """The lowest loss of logits that are the same for all pictures."""
    labels = torch.tensor(list(labels))
    _, bias = fit_logistic(torch.empty(len(labels), 0, dtype=torch.float64), labels, n_outputs)
    return compute_loss(bias.expand(len(labels), -1), labels).item()


def score_epoch(row):
    """How bad is an epoch? What is kept, when to stop, the plateau, tuning and the order of a comparison go by this."""
    return row["val_loss"] if math.isfinite(row["val_loss"]) else math.inf


def compute_baseline_auc(labels):
    """The ROC AUC that labels dealt out anew exceed in one of twenty cases (Mann and Whitney 1947, rarest class)."""
    counts = np.unique(labels, return_counts=True)[1]
    n = len(labels)
    return float(0.5 + norm.ppf(0.95) * np.sqrt((n + 1) / (12 * counts * (n - counts))).max())


@functools.cache
def offline_if_unreachable():
    """One quick question a command to the Hub of pretrained weights; without an answer only its local cache is used."""
    try:
        huggingface_hub.utils.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except Exception:  # of the library that it asks with
        huggingface_hub.constants.HF_HUB_OFFLINE = True


def build_model(args, n_outputs):
    """(model, where its weights come from), frozen or not, as --weights and --finetune ask."""

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
            own = timm.get_pretrained_cfg(args.backbone)
            return model, f"pretrained ({own and own.hf_hub_id or args.backbone})"
        except InputError:
            raise
        except Exception as error:  # the Hub, its cache and timm each have their own
            missing = f"no pretrained weights of {args.backbone} could be had ({type(error).__name__})"
            if args.weights == "pretrained":
                raise InputError(f"{missing}: connect to the network once, or give --weights FILE or random") from None
            say(f"warning: {missing}: random initialisation")
    elif args.weights != "random":
        model = build(args.finetune or "head")
        load_weights(model.backbone, args.weights)
        return model, f"file {Path(args.weights).name} {zlib.crc32(Path(args.weights).read_bytes()):08x}"
    return build(args.finetune or "all"), "random initialisation"


def load_weights(backbone, path):
    """Load a backbone from a state dict (.pt, .safetensors) or from the best.pt of another run, without its head."""
    try:
        state = timm.models.load_state_dict(path, use_ema=False, weights_only=True)
        state = {re.sub(r"^(module\.|model\.|backbone\.)+", "", name): tensor for name, tensor in state.items()}
        backbone.load_state_dict({name: state[name] for name in backbone.state_dict()})
    except Exception as error:  # of torch, pickle and safetensors; KeyError: no such tensor
        reason = f"{type(error).__name__}: {explain_mismatch(error)}"
        raise InputError(f"--weights {path}: no weights of this --backbone can be read from it ({reason})") from None


def explain_mismatch(error):
    """Why weights cannot be loaded, in one line; torch begins its message with a line that does not say it."""
    return " ".join(str(error).split()).rpartition("loading state_dict for ")[2][:250]


def save_checkpoint(path, contents):
    """Write what load_checkpoint reads; a full disk is an OSError here, and no error of torch's own."""
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    with whole_file(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_checkpoint(path):
    """The contents of a checkpoint: tensors, numbers and text only, so that nothing in it can run."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of torch, pickle and zipfile
        raise InputError(f"{path}: not a checkpoint that can be read or trusted ({type(error).__name__})") from None


def find_run(run=None):
    """The run folder named, or the newest one under runs/."""
    found = [Path(run)] if run else sorted(find_runs("runs"), key=lambda run: os.path.getmtime(run / "best.pt"))
    if not found or not (found[-1] / "best.pt").is_file():
        raise InputError(f"{run or 'runs/'}: no best.pt; is it a run of train.py that came to its end?")
    return found[-1]


def find_runs(folder):
    """Folders of the finished runs in a folder and below it. Symbolic links are followed."""
    return [Path(folder, path).parent for path in sorted(glob("**/best.pt", root_dir=folder, recursive=True))]


def load_run(run):
    """(model in eval mode, checkpoint) of a run folder; the checkpoint holds config, recipe, cohort and versions."""
    checkpoint = load_checkpoint(Path(run) / "best.pt")
    try:
        config, checkpoint["recipe"] = checkpoint["config"], Recipe.from_text(checkpoint["recipe"])
        checkpoint["chromatogram"] = np.array(checkpoint["chromatogram"])
    except (KeyError, ValueError) as error:
        raise InputError(f"{run}/best.pt: not a checkpoint of this train.py ({error})") from None
    settings = argparse.Namespace(**config["settings"])
    try:
        options = settings.scales, settings.image_size, settings.finetune
        model = Classifier(settings.backbone, config["n_outputs"], *options)
        model.load_state_dict(checkpoint["model"])
    except Exception as error:  # timm and torch raise several types
        made = f"made with timm {checkpoint['versions']['timm']}, and this is {version('timm')}"
        raise InputError(f"{run}/best.pt: its network cannot be built ({made}; {explain_mismatch(error)})") from None
    same_timm = all(checkpoint["versions"][name] == version(name) for name in ("timm", "torch"))
    if same_timm and settings.architecture != digest_architecture(model):
        raise InputError(f"{run}/best.pt: the layers of {settings.backbone} were others when it was trained")
    model.mean, model.std = config["mean"], config["std"]  # another timm may have others
    return model.to(DEVICE).eval(), checkpoint


# ---------------------------------------------------------------- batches, fresh or stored
def extract_features(model, table, transform, n_views, args):
    """Features (n_views, N, F) of random views of the N pictures of a table, by a frozen backbone."""
    # A copy for the forward pass alone: branches fused (MobileOne, RepVGG, FastViT); with channels-last twice as fast.
    fast = timm.utils.reparameterize_model(model).eval()
    torch.manual_seed(VIEWS_SEED)
    dataset = ConcatDataset([Pictures(table, transform)] * n_views)
    features = torch.empty(len(dataset), model.n_features)
    parts = features.split(32)
    loader = DataLoader(dataset, 32, num_workers=args.workers)
    with torch.inference_mode():
        for part, (x, _) in zip(parts, progress(loader, "extracting features"), strict=True):
            part.copy_(fast.features(x.to(DEVICE, memory_format=torch.channels_last)))
    return features.unflatten(0, (n_views, len(table)))


def store_features(model, pictures, recipe, args):
    """{"views": features of random draws of all pictures of the command, "clean": of the originals as they are}."""
    say(f"storing the features of {len(pictures)} pictures x {args.views}, and of the originals as they are")
    originals = pictures[~pictures["copy"]]
    views = extract_features(model, pictures, training_transform(model, recipe, args), args.views, args)
    clean = extract_features(model, originals, to_input(model, recipe), 1, args)[0]
    return {"views": views, "originals": originals.index, "clean": clean}


def stored(store, table):
    """(views (K, N, F), their labels (K * N,)) of the rows of a table, and of its originals (clean (n, F), labels)."""
    originals = table[~table["copy"]]
    views = store["views"][:, list(table.index)]  # the index counts all pictures of the command
    clean = store["clean"][store["originals"].get_indexer(originals.index)]
    return views, torch.tensor(list(table["label"])).repeat(len(views)), clean, torch.tensor(list(originals["label"]))


def make_loaders(model, table, recipe, args, store):
    """{"train", "val"} data loaders of pictures, or with --views K of stored features; the loop does not see which.

    table: the pictures of this training; each view of one is an item of its own. Fits the standardisation of a frozen
    backbone; any other has a third loader, "statistics": training pictures without augmentation, for its batch norms.
    """
    part = {split: table[table["split"] == split] for split in ("train", "val")}
    if args.views:
        views, labels, clean, _ = stored(store, part["train"])
        train = TensorDataset(views.flatten(0, 1), labels)
        val = TensorDataset(*stored(store, part["val"])[2:])
    else:
        train = Pictures(part["train"], training_transform(model, recipe, args))
        val = Pictures(part["val"], to_input(model, recipe))
        clean = extract_features(model, part["train"], to_input(model, recipe), 1, args)[0] if model.frozen else None
    if model.frozen:
        model.fit_standardize(clean)
    options = {"num_workers": 0 if args.views else args.workers, "pin_memory": CUDA}
    sampler = DistributedSampler(train, WORLD, RANK, seed=args.seed)
    alone, mine = leaves_one(sampler, args.batch_size), range(RANK, len(val), WORLD)
    loaders = {
        "train": DataLoader(train, args.batch_size, sampler=sampler, drop_last=alone, **options),
        "val": DataLoader(val, max(args.batch_size, 32), sampler=mine, **options),
    }
    if not model.frozen:
        some = part["train"].iloc[:: math.ceil(len(part["train"]) / STATISTICS_FROM)]
        some = Pictures(some, to_input(model, recipe))
        loaders["statistics"] = DataLoader(some, 32, drop_last=leaves_one(some, 32), **options)
    return loaders


def leaves_one(data, batch_size):
    """Is the last batch a single picture? It has no batch statistics."""
    return len(data) % batch_size == 1 and len(data) > 1


def draw_batches(loader, epoch, args):
    """The training batches of an epoch: with the same seed the same order and draws, whatever came before."""
    torch.manual_seed(1000 * args.seed + epoch + 10**9 * RANK)  # of draws, each process its own, and of dropout
    loader.sampler.set_epoch(epoch)
    yield from loader


# ---------------------------------------------------------------- the loop
def autocast(args):
    """Mixed precision for a forward pass: float16 on CUDA, bfloat16 on the CPU. Weights and gradients stay float32."""
    return torch.autocast(DEVICE.type, torch.float16 if CUDA else torch.bfloat16, enabled=args.amp)


def make_optimizer(model, args, lr):
    """(optimizer of what is trained, scaler of its gradients under float16)."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = OPTIMIZERS[args.optimizer](trained, lr=lr, weight_decay=args.weight_decay)
    return optimizer, torch.amp.GradScaler(DEVICE.type, enabled=args.amp and CUDA)


def wrap_distributed(model):
    """The model, or under torchrun one that averages its gradients over the processes."""
    # Some backbones have layers that forward_features does not use.
    return DistributedDataParallel(model, find_unused_parameters=True) if WORLD > 1 else model


def train_batch(network, optimizer, scaler, x, y, args):
    """One step of gradient descent; returns logits and labels on the CPU."""
    x, y = x.to(DEVICE, non_blocking=True), y.to(DEVICE, non_blocking=True)
    optimizer.zero_grad()
    with autocast(args):
        logits = network(x).float()
    loss = compute_loss(logits, y)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return logits.detach().cpu(), y.cpu()


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
        outputs = [batch for part in parts for batch in part]
    return torch.cat([logits for logits, _ in outputs]), torch.cat([labels for _, labels in outputs])


def split_metrics(split, outputs):
    """Loss and metrics of the batches of every process, {"<split>_<name>": value}."""
    logits, labels = collect(outputs)
    values = {"loss": compute_loss(logits, labels).item(), **compute_metrics(labels.numpy(), logits)}
    return {f"{split}_{name}": float(value) for name, value in values.items()}


def find_kept_epoch(history):
    """The epoch whose weights are kept: the last, or with a lower --patience the one of lowest validation loss."""
    return [row for row in history if row["kept"]][-1]


def copy_weights(model):
    """A copy of what training changes: everything, or all but a frozen backbone."""
    state = model.state_dict()
    return {n: t.clone() for n, t in state.items() if not (model.frozen and n.startswith("backbone."))}


def fit(model, loaders, args, run=None, report=lambda row: None):
    """Train to the end of the schedule, or until --patience epochs have brought nothing better: the one loop.

    What is validated and kept is a mean of the weights over about the last tenth of the epochs (Izmailov et al. 2018,
    arXiv:1803.05407), as one epoch alone is good or bad by luck. Its batch norms take their statistics from training
    pictures without augmentation. Returns the history, a dict an epoch, and the weights to keep. With a run folder
    it writes last.pt and epochs.csv after each epoch, and continues from a last.pt. It calls report(row) each epoch.
    """
    last, history, best_weights, lr = None, [], None, args.lr
    if run and (run / "last.pt").exists():
        last = load_checkpoint(run / "last.pt")
        history, best_weights, lr = last["history"], last["best_weights"], last["history"][0]["lr"]
    elif lr == "auto":
        lr = find_lr(model, loaders, args, run)
    clean = [] if model.frozen else list(loaders["statistics"])
    network, window = wrap_distributed(model), max(3, args.epochs // 10)

    def recent_mean(mean, new, n):  # n: epochs before this one
        return mean + (new - mean) / (n + 1).clamp(max=window)

    averaged, to_the_end = AveragedModel(model, avg_fn=recent_mean), args.patience >= args.epochs
    optimizer, scaler = make_optimizer(model, args, lr)
    scheduler = SCHEDULERS[args.scheduler](optimizer, args)
    states = {"optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    if last:
        model.load_state_dict(last["model"], strict=False)
        averaged.module.load_state_dict(last["averaged"], strict=False)
        averaged.n_averaged.fill_(len(history))
        for name, part in states.items():
            part.load_state_dict(last[name])

    for epoch in range(len(history) + 1, args.epochs + 1):
        # Large steps of the first half say little of the end: patience counts from the middle on.
        if history and epoch - max(find_kept_epoch(history)["epoch"], args.epochs // 2) > args.patience:
            say(f"no better epoch in the last {args.patience}: stopped")
            break
        began = time.time()
        model.train(not model.frozen)  # a frozen backbone keeps its state
        outputs, batches = [], draw_batches(loaders["train"], epoch, args)
        for x, y in progress(batches, f"epoch {epoch}/{args.epochs}", len(loaders["train"])):
            outputs.append(train_batch(network, optimizer, scaler, x, y, args))
        averaged.update_parameters(model)
        if not model.frozen:  # the mean of several epochs' statistics does not fit the mean of their weights
            with autocast(args):
                update_bn(clean, averaged.module, DEVICE)

        row = {
            "epoch": epoch,
            **split_metrics("train", outputs),
            **split_metrics("val", predict(averaged.module, loaders["val"])),
        }
        row["kept"] = to_the_end or not history or score_epoch(row) < score_epoch(find_kept_epoch(history))
        if not math.isfinite(row["train_loss"] + row["val_loss"]):
            raise InputError(f"the loss became infinite in epoch {epoch}: try a lower --lr than {lr:.2g}")
        row |= {"lr": optimizer.param_groups[0]["lr"], "seconds": round(time.time() - began, 2)}
        if args.scheduler == "plateau":
            scheduler.step(score_epoch(row))
        else:
            scheduler.step()
        best_weights = recorded(row, f"epoch {epoch:3d}/{args.epochs}", history, best_weights, averaged.module, run)
        if run and RANK == 0:
            contents = {name: part.state_dict() for name, part in states.items()}
            contents |= {"model": copy_weights(model), "averaged": copy_weights(averaged.module)}
            contents |= {"best_weights": best_weights, "history": history}
            save_checkpoint(run / "last.pt", contents)
        report(row)
    return history, best_weights


def recorded(row, what, history, best_weights, model, run):
    """Add a row to the history and to epochs.csv, and say it; returns the best weights so far."""
    history.append(row)
    if run and RANK == 0:
        write_table(run / "epochs.csv", pd.DataFrame(history))
    values = "  ".join(f"{name} {row[name]:.3f}" for name in ("train_loss", "val_loss", *shown_metrics(row)))
    say(f"{what}  {values}  {row['seconds']:.1f} s{'  *' * row['kept']}")
    return copy_weights(model) if row["kept"] else best_weights


def shown_metrics(columns):
    """The first three metrics of the validation pictures: what is shown while training, and in curves.png."""
    return [name for name in columns if name.startswith("val_") and name != "val_loss"][:3]


# ---------------------------------------------------------------- the head of a frozen backbone, solved
def solve_head(model, table, args, store, run=None, report=lambda row: None):
    """What `fit` returns, with one row: logistic regression on stored features of training and validation pictures.

    The head of a frozen backbone is a convex problem, so there is no rate, no order of batches and no epoch to choose;
    and the penalty is fixed, so no picture need be kept apart. Validation figures are out of fold: each picture, as it
    is, is judged by a head that was fitted without it and its group.
    """
    began = time.time()
    table = table[table["split"] != "held out"]
    views, labels, clean, val_labels = stored(store, table)
    model.eval().fit_standardize(clean)
    with torch.no_grad():
        x = torch.cat([model.head_inputs(part.to(DEVICE)).cpu() for part in (*views, clean)])
    z, to_weights = compute_kernel_basis(x)
    n = len(labels)
    weight, bias = fit_logistic(z[:n], labels, model.n_outputs)
    train_logits = z[:n] @ weight.T + bias

    fold = assign_folds(table, OUT_OF_FOLD, args.seed)
    fold_of_views, fold_of_clean = torch.tensor(fold).repeat(len(views)), torch.tensor(fold[~table["copy"]])
    val_logits = torch.empty(len(clean), model.n_outputs, dtype=z.dtype)
    for k in progress(range(OUT_OF_FOLD), "out of fold"):
        others = fold_of_views != k
        fold_weight, fold_bias = fit_logistic(z[:n][others], labels[others], model.n_outputs)
        held_out = fold_of_clean == k
        val_logits[held_out] = z[n:][held_out] @ fold_weight.T + fold_bias
    # With weak signal such a head is too sure: its logits shrink towards those of the class shares.
    _, baseline = fit_logistic(z[n:, :0], val_labels, model.n_outputs)
    share = choose_shrinkage(val_logits, baseline, val_labels)
    val_logits, train_logits = (torch.lerp(baseline, logits, share) for logits in (val_logits, train_logits))
    model.head.weight.data.copy_(share * to_weights(weight))
    model.head.bias.data.copy_(torch.lerp(baseline, bias, share))

    row = {"epoch": 1, "kept": True, **split_metrics("train", [(train_logits.float(), labels)])}
    row |= split_metrics("val", [(val_logits.float(), val_labels)])
    row["seconds"] = round(time.time() - began, 2)
    history = []
    best_weights = recorded(row, "solved; validation figures are out of fold:", history, None, model, run)
    report(row)
    return history, best_weights


def choose_shrinkage(logits, baseline, labels):
    """The share s, 0.01 to 1, for which s x logits + (1 - s) x baseline has the lowest out-of-fold loss."""
    return min(np.linspace(0.01, 1, 100), key=lambda s: compute_loss(torch.lerp(baseline, logits, s), labels).item())


def compute_kernel_basis(x):
    """(z (n, d), function) of pictures x (n, F): coordinates with the same inner products, and weights of them -> of x.

    The best weights are a weighted sum of the pictures. Where these are fewer than features, d is their number, and the
    problem is small.
    """
    if x.shape[0] >= x.shape[1]:
        return x.double(), lambda weight: weight
    gram = (x @ x.T).double()
    gram.diagonal().add_(1e-5 * gram.diagonal().mean())  # the rounding of float32
    z = torch.linalg.cholesky(gram)
    return z, lambda weight: torch.linalg.solve_triangular(z.T, weight.T, upper=True).T.float() @ x


def fit_logistic(z, labels, n_outputs):
    """(weight (K, d), bias (K,)) of lowest loss and penalty on pictures z (n, d), by L-BFGS."""
    weight = torch.zeros(n_outputs, z.shape[1], dtype=z.dtype, requires_grad=True)
    bias = torch.zeros(n_outputs, dtype=z.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=300, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        loss = compute_loss(z @ weight.T + bias, labels) + L2 / 2 * weight.square().sum()  # the bias goes free
        loss.backward()
        return loss

    optimizer.step(objective)
    return weight.detach(), bias.detach()


# ---------------------------------------------------------------- learning-rate range test
def find_lr(model, loaders, args, run=None):
    """Learning rate whose first steps lower the loss and shake nothing; leaves everything else as it was.

    Smith's range test (2017, arXiv:1506.01186) raises the rate from step to step; on small data sets that shows the
    progress of the steps, not of the rate. Here every rate, four a decade, starts from the same weights and takes the
    first 24 steps of the training that follows. `highest` is the highest training loss of their epochs, `loss` that of
    the later half of the steps, but of a head, which learns few pictures by heart, the validation loss after them.
    """
    loader, n_steps, before = loaders["train"], 24, copy_weights(model)
    epochs = (draw_batches(loader, epoch, args) for epoch in itertools.count(1))
    batches = list(itertools.islice(itertools.chain.from_iterable(epochs), n_steps))
    network, rows = wrap_distributed(model), []
    for rate in progress(np.logspace(-5, 0, 21), "learning-rate range test"):
        model.load_state_dict(before, strict=False)
        model.train(not model.frozen)
        optimizer, scaler = make_optimizer(model, args, rate)
        torch.manual_seed(args.seed)
        outputs = [train_batch(network, optimizer, scaler, x, y, args) for x, y in batches]
        late = predict(model, loaders["val"]) if model.frozen else outputs[n_steps // 2 :]
        loss = compute_loss(*collect(late)).item()
        by_epoch = [outputs[i : i + len(loader)] for i in range(0, n_steps, len(loader))]
        highest = np.max([compute_loss(*collect(of_one)).item() for of_one in by_epoch])
        rows.append({"lr": rate, "loss": loss, "highest": highest})
        if not loss < 2 * min(row["loss"] for row in rows):
            break
    model.load_state_dict(before, strict=False)
    model.zero_grad()
    curve = pd.DataFrame(rows)
    lr, reason = suggest_lr(curve, model.frozen)
    if run and RANK == 0:
        write_table(run / "lr_find.csv", curve)
        with figure(run / "lr_find.png", "Learning-rate range test", (6, 4)) as axes:
            curve.plot("lr", ax=axes, logx=True, marker=".", xlabel="learning rate", ylabel="loss")
            axes.axvline(lr, color="tab:red", linestyle="--")
            axes.xaxis.set_major_formatter("{x:g}")
            what = "validation loss" if model.frozen else f"steps {n_steps // 2 + 1} to {n_steps}"
            axes.legend([what, "highest epoch", f"{lr:.2g}: {reason}"])
    say(f"learning-rate range test: {lr:.2g} ({reason})")
    return lr


def suggest_lr(curve, frozen):
    """(learning rate, why) of the columns lr, ascending, loss and highest of the range test.

    Drops the first rate whose worst epoch exceeds the starting loss by 8 %, and all higher ones. Of the others a head
    takes the one of lowest loss, a whole network the highest whose loss is at most a fifth of the start above that.
    """
    start = curve["highest"][0]
    harmful = ~(curve["highest"] <= 1.08 * start)  # nan is harm, too
    if harmful.any():
        curve = curve.iloc[: harmful.argmax()]
    margin = 0 if frozen else 0.2 * start
    good = curve[curve["loss"] <= curve["loss"].min() + margin]
    return float(good["lr"].max()), "lowest without harm" if frozen else "highest rate without harm"


# ---------------------------------------------------------------- one training
def find_classes(pictures, positive=None):
    """Sorted phenotypes of find_pictures; class 1 of two is `positive`, or else the last."""
    counts = pd.crosstab(pictures["split"], pictures["phenotype"])
    classes = sorted(counts.columns)
    if len(classes) < 2:
        raise InputError(f"one phenotype only ({classes[0]}); a classifier needs two")
    if positive and positive not in classes:
        raise InputError(f"--positive {positive!r} is not one of {', '.join(classes)}")
    for split, row in counts.iterrows():
        if row.min() == 0:
            raise InputError(f"the {split} split has no picture of {first_few(row.index[row == 0])}")
    return sorted(classes, key=lambda name: name == positive)


def shuffle_labels(table, seed):
    """Labels dealt out anew, as a control. What belongs together (copies, a group of one label) stays together."""
    owner = table.groupby(["group", "label"]).ngroup().to_numpy()
    labels = table["label"].groupby(owner).first().to_numpy()
    return np.random.default_rng(seed).permutation(labels)[owner]


def assign_folds(pictures, n_folds, seed):
    """Fold (N,) of each picture: dealt out like cards, label by label; a group and all copies stay together."""
    owners = pictures.drop_duplicates("group").sample(frac=1, random_state=seed)
    owners = owners.sort_values("label", kind="stable")
    fold = pd.Series(np.arange(len(owners)) % n_folds, index=owners["group"])
    return pictures["group"].map(fold).to_numpy()


def make_training_table(pictures, args):
    """The pictures of one training, with the labels of --shuffle-labels and the splits of --folds; copies only train.

    A fold is held out; the next one is for validation.
    """
    table = pictures.copy()
    if args.shuffle_labels:
        table["label"] = shuffle_labels(table, args.seed)
    if args.fold is not None:
        turn = (assign_folds(table, args.folds, args.seed) - args.fold) % args.folds
        table["split"] = np.select([turn == 0, turn == 1], ["held out", "val"], "train")
    return table[(table["split"] == "train") | ~table["copy"]]


def resolve_settings(args, model, origin, pictures, recipe):
    """The settings of a training, whole and final: what its flags mean for this model and these pictures.

    config.json keeps them, features are cached by them, and trainings whose settings are equal are the same one. Flags
    that are `auto` or not given have their values here, and nothing changes them afterwards. The head is solved where
    it can be. origin: where the weights come from.
    """
    settings = with_augmentation(args)
    settings.pictures, settings.weights = digest_pictures(pictures, recipe), origin
    settings.finetune = "head" if model.frozen else "all"
    settings.scales = [f"{stride}:{grid}" for stride, grid in model.scales]
    settings.image_size, settings.architecture = model.image_size, digest_architecture(model)
    if args.views == "auto":
        settings.views = min(16, max(1, CACHED_VIEWS // len(pictures))) if model.frozen else 0
    if args.optimizer == "auto":
        settings.optimizer = "lbfgs" if settings.views else "adamax"
    if (settings.views and not model.frozen) or (settings.optimizer == "lbfgs" and not settings.views):
        raise InputError("--views and --optimizer lbfgs are for a frozen backbone: use --finetune head --views auto")
    n_train = (make_training_table(pictures, args)["split"] == "train").sum()
    if args.batch_size == "auto":
        settings.batch_size = 8 if n_train < 1000 else 32
    if args.epochs == "auto":  # 400 steps, as few pictures make few steps an epoch
        n_steps = math.ceil(n_train / settings.batch_size / WORLD)
        settings.epochs = min(100, max(20, math.ceil(400 / n_steps)))
    if args.patience == "auto":
        # The lowest validation loss chose no better epoch than the last of a cosine schedule (EXPERIMENTS).
        settings.patience = settings.epochs if args.scheduler == "cosine" else max(10, settings.epochs // 4)
    return settings


def with_augmentation(args):
    """A copy of arguments with the values of their --augmentation, but for a --warp that was given."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    return argparse.Namespace(**vars(args) | AUGMENTATION[args.augmentation] | given)


def digest_architecture(model):
    """A number of the layers of a backbone: a network of one's own may change under its name."""
    return zlib.crc32(repr(model.backbone).encode())


def select_compared(settings):
    """{name: value} of the settings that make two trainings the same one, as JSON has them."""
    chosen = {name: value for name, value in vars(settings).items() if name not in NOT_SETTINGS}
    return json.loads(json.dumps(chosen))


def prepare(settings, model, pictures, recipe, store):
    """learn(run, report), which trains the model as its settings say and returns (history, best weights)."""
    table = make_training_table(pictures, settings)
    if settings.views:
        of = ["backbone", "weights", "scales", "image_size", "views", *AUGMENTATION[settings.augmentation]]
        same = [getattr(settings, name) for name in of]
        if settings.weights == "random initialisation":
            same.append(settings.seed)
        if store.get("of") != same:  # they are features of another backbone, or of other draws
            store.clear()
            store |= {"of": same, **store_features(model, pictures, recipe, settings)}
    if settings.optimizer == "lbfgs":
        return functools.partial(solve_head, model, table, settings, store)
    if settings.patience >= settings.epochs:
        say(f"all {settings.epochs} epochs are trained and the last is kept; a lower --patience keeps the best instead")
    return functools.partial(fit, model, make_loaders(model, table, recipe, settings, store), settings)


def describe(model, settings, pictures, classes):
    """(facts of a training for config.json and its checkpoint, pictures that the model is fitted to)."""
    table = make_training_table(pictures, settings)
    solved = settings.optimizer == "lbfgs"
    fitted = table[table["split"].isin(("train", "val") if solved else ("train",))]
    judged_on = (fitted if solved else table[table["split"] == "val"]).query("not copy")["label"]
    facts = {
        "data_set": run_folder(settings).parents[1].name,
        "data": settings.data,
        "classes": classes,
        "n_outputs": model.n_outputs,
        "mean": list(model.mean),
        "std": list(model.std),
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "baseline_loss": compute_baseline_loss(judged_on, model.n_outputs),
        "baseline_auc": compute_baseline_auc(judged_on),
        "n_pictures": table["split"].value_counts().to_dict(),
    }
    return facts, fitted


def run_folder(args):
    """runs/<data set>/<backbone>/seed<seed>[-shuffled][-fold<k>]"""
    suffix = "-shuffled" * args.shuffle_labels + (f"-fold{args.fold}" if args.fold is not None else "")
    return Path(args.out) / (args.name or Path(args.data).resolve().name) / args.backbone / f"seed{args.seed}{suffix}"


def train_once(args, pictures, classes, recipe, store):
    """One training from pictures to checkpoints: what `python train.py` is about. Returns the run folder."""
    model, origin = build_model(args, 1 if len(classes) == 2 else len(classes))
    settings = resolve_settings(args, model, origin, pictures, recipe)
    run = run_folder(settings)
    if (run / "config.json").exists():
        before = read_json(run / "config.json")["settings"]
        if differing := first_difference(before, select_compared(settings)):
            other = "{} {}, not {}".format(*differing)
            raise InputError(f"{run} is a training with {other}: give another --out or --name")
    if (run / "best.pt").exists():
        say(f"{run} is finished")
        return run
    facts, fitted = describe(model, settings, pictures, classes)
    config = facts | {"settings": select_compared(settings)}
    shown = {name: value for name, value in (config | config["settings"]).items() if value is not None}
    del shown["settings"], shown["mean"], shown["std"]
    say(f"{run}: " + ", ".join(f"{name} {value}" for name, value in shown.items()))
    learn = prepare(settings, model, pictures, recipe, store)
    originals = pictures[(pictures["split"] == "train") & ~pictures["copy"]]
    run.mkdir(parents=True, exist_ok=True)
    if RANK == 0:
        write_json(run / "config.json", config)
        draw_transformed(run, originals, model, recipe, settings)
    history, best_weights = learn(run)
    if RANK > 0:
        return run

    best = find_kept_epoch(history)
    model.load_state_dict(best_weights, strict=False)
    if settings.fold is not None:
        write_held_out(run, model, make_training_table(pictures, settings), recipe, settings.fold)
    typical, cohort = summarize_cohort(originals, recipe)
    contents = {
        "model": model.state_dict(),
        "epoch": best["epoch"],
        "val_loss": best["val_loss"],
        "by_chance": best.get("val_roc_auc", 1) < facts["baseline_auc"],
        "config": config,
        "fitted": fitted["digest"].tolist(),
        "recipe": recipe.to_text(),
        "chromatogram": typical.tolist(),
        "cohort": cohort,
        "versions": {name: version(name) for name in ("torch", "torchvision", "timm", "numpy")},
    }
    save_checkpoint(run / "best.pt", contents)
    control = ", shuffled labels" * settings.shuffle_labels
    if settings.optimizer != "lbfgs":
        draw_curves(run, history, f"{settings.backbone}, {settings.weights}{control}")
    n, n_epochs = best["epoch"], len(history)
    say(f"kept: epoch {n} of {n_epochs}, validation loss {best['val_loss']:.3f}\nrun folder: {run}")
    if n <= n_epochs / 10:
        say(f"warning: epoch {n} is among the first tenth: what came later was no better; try a lower --lr")
    if contents["by_chance"]:
        say(f"warning: no better than chance: 1 in 20 shuffled labels has a ROC AUC above {facts['baseline_auc']:.3f}")
    return run


def write_held_out(run, model, table, recipe, fold):
    """held_out.csv: the logits that a fold's model gives to the pictures that took no part in its training."""
    table = table[table["split"] == "held out"].assign(training=str(run).rpartition("-fold")[0], fold=fold)
    outputs = predict(model, DataLoader(Pictures(table, to_input(model, recipe)), 32))
    logits = torch.cat([logits for logits, _ in outputs]).numpy()
    logits = pd.DataFrame(logits, index=table.index).add_prefix("logit_")
    columns = ["training", "fold", "sample_name", "group", "phenotype", "label"]
    write_table(run / "held_out.csv", table[columns].join(logits))


def draw_curves(run, history, title):
    table, best = pd.DataFrame(history), find_kept_epoch(history)
    with figure(run / "curves.png", title, (10, 4), ncols=2) as (left, right):
        table.plot("epoch", ["train_loss", "val_loss"], ax=left, marker=".", title="Loss")
        table.plot("epoch", shown_metrics(table), ax=right, marker=".", title="Validation")
        for axes in (left, right):
            axes.axvline(best["epoch"], color="0.6", linestyle="--", label=f"kept ({best['epoch']})")
            axes.legend()
            axes.xaxis.get_major_locator().set_params(integer=True)
        # One epoch that went astray does not flatten the others.
        top = max(1.5 * table["train_loss"][0], 1.2 * table["val_loss"].median())
        left.set_ylim(0, min(top, 1.05 * left.get_ylim()[1]))


def draw_transformed(run, originals, model, recipe, args):
    """Article, Figure 4: training pictures as the network sees them, a draw of each."""
    shown = originals.iloc[:: max(1, len(originals) // 9)].head(9)
    seen = Pictures(shown, training_transform(model, recipe, args))
    grid = make_grid([x for x, _ in seen], nrow=3, padding=4, pad_value=math.inf)
    image = grid.permute(1, 2, 0).numpy() * model.std + model.mean
    with figure(run / "transformed_grid.png", "Training pictures as the network sees them", (8, 8.3)) as axes:
        axes.imshow(image.clip(0, 1))  # what lies between them becomes white
        axes.axis("off")


# ---------------------------------------------------------------- tuning
FINISHED = TrialState.COMPLETE, TrialState.PRUNED


class EveryCombination(optuna.samplers.RandomSampler):
    """A trial takes a combination of SEARCH that the fewest trials have finished, beside those that run at once.

    So neither a command that was killed nor several processes leave a combination out.
    """

    def before_trial(self, study, trial):
        combinations = [dict(zip(SEARCH, values, strict=True)) for values in itertools.product(*SEARCH.values())]
        trials = study.get_trials()
        finished = [other.params for other in trials if other.state in FINISHED]
        fewest = min(map(finished.count, combinations))
        left = [combination for combination in combinations if finished.count(combination) == fewest]
        before = [other for other in trials if other.state == TrialState.RUNNING and other.number < trial.number]
        self.chosen = left[len(before) % len(left)]

    def sample_independent(self, study, trial, name, distribution):
        return self.chosen[name]


def tune(args, pictures, classes, recipe, store):
    """Optuna over every combination of SEARCH (article, "Hyperparameter optimisation"); writes trials.csv.

    The objective is the best validation loss of a trial, not the last; trials are pruned at the median. Any number of
    processes with the same command and --storage share the work.
    """

    def objective(trial):
        chosen = {name: trial.suggest_categorical(name, values) for name, values in SEARCH.items()}
        say(f"trial {trial.number}: {chosen}")
        trial_args = argparse.Namespace(**vars(args) | chosen)
        model, origin = build_model(trial_args, 1 if len(classes) == 2 else len(classes))
        settings = resolve_settings(trial_args, model, origin, pictures, recipe)
        learn = prepare(settings, model, pictures, recipe, store)

        def report(row):
            trial.report(score_epoch(row), row["epoch"])
            if trial.should_prune():
                raise optuna.TrialPruned

        try:
            history, _ = learn(report=report)
        except InputError as error:
            say(f"trial {trial.number} is given up: {error}")
            raise optuna.TrialPruned from None  # a failed trial would not count, and --tune never end
        return min(map(score_epoch, history))

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder = run_folder(args).parent / "tune"
    folder.mkdir(parents=True, exist_ok=True)
    question = select_compared(args) | SEARCH | {"pictures": digest_pictures(pictures, recipe)}
    storage = args.storage or URL.create("sqlite", database=f"{folder}/study.db").render_as_string()
    name = f"{args.backbone}-{zlib.crc32(json.dumps(question).encode()):08x}"
    options = {"storage": storage, "sampler": EveryCombination(), "load_if_exists": True}
    options["pruner"] = optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=5)
    for attempt in range(5):
        try:
            study = optuna.create_study(study_name=name, **options)
            break
        except Exception as error:  # of Optuna and of each kind of database
            if attempt == 4:
                raise InputError(f"--storage {storage}: {first_line(error)}") from None
            time.sleep(attempt / 2)  # two processes that make one database at once get in each other's way
    while len(study.get_trials(states=FINISHED)) < args.tune:
        study.optimize(objective, n_trials=1)
    if not study.get_trials(states=[TrialState.COMPLETE]):
        raise InputError("--tune: no trial came to its end; try a lower --lr")
    write_table(folder / "trials.csv", study.trials_dataframe())
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in study.best_params.items())
    say(f"{args.tune} trials in {folder}; best value {study.best_value:.3f}: train it with {flags}")


# ---------------------------------------------------------------- command line
def expand_backbones(names, params):
    """Names, patterns and 'article' -> model names; patterns keep those within `params` million parameters."""
    chosen = []
    for name in names:
        if name in ("article", "pixels") or timm.is_model(name):
            chosen += ARTICLE if name == "article" else [name]
            continue
        matches = timm.list_models(name) or timm.list_pretrained(name) if set(name) & set("*?[") else []
        if not matches:
            near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), 3, cutoff=0.3)
            raise InputError(f"--backbone {name!r} is not a timm model; the nearest: {', '.join(near) or 'none'}")
        if params:
            with torch.device("meta"):
                sizes = [sum(p.numel() for p in timm.create_model(match).parameters()) / 1e6 for match in matches]
            matches = [m for m, millions in zip(matches, sizes, strict=True) if params[0] <= millions <= params[1]]
        chosen += matches
    return list(dict.fromkeys(chosen))


def or_auto(kind):
    """Type of a flag: a number of that kind, or the word auto."""

    def number(text):
        return text if text == "auto" else kind(text)

    return number


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument_group("what to train").add_argument
    add("--backbone", nargs="+", required=True, metavar="NAME", help="timm names or patterns, article, pixels")
    add("--params", nargs=2, type=float, metavar=("MIN", "MAX"), help="of patterns keep those of MIN-MAX million")
    add("--data", metavar="DIR", help="data set of convert.py (without it: the demo, at settings of its own)")
    add("--weights", default="auto", help="auto: pretrained, or random without the Hub; pretrained; random; or a file")
    add("--finetune", choices=["head", "all"], help="what is trained (default: head; all where weights are random)")
    scales = f"maps that the head sees, and their grids (default: {SCALES})"
    add("--scales", nargs="+", metavar="STRIDE:GRID", help=scales)
    add("--image-size", type=count, metavar="N", help="pixels a side (default: the backbone's own)")
    add("--positive", metavar="CLASS", help="phenotype that is class 1 (default: the last in sorted order)")
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=or_auto(count), default="auto", help="at most; auto: for 400 steps, 20 to 100")
    patience = (
        "keep the epoch of lowest validation loss, stop after so many others; auto: all of a cosine, its last kept"
    )
    add("--patience", type=or_auto(count), default="auto", help=patience)
    add("--batch-size", type=or_auto(count), default="auto", help="of each process; auto: 8, from 1,000 pictures on 32")
    add("--lr", type=or_auto(float), default="auto", help="learning rate, or auto: range test")
    solved = "auto: lbfgs, which solves a head on stored features; else adamax"
    add("--optimizer", choices=["auto", "lbfgs", *OPTIMIZERS], default="auto", help=solved)
    add("--scheduler", choices=list(SCHEDULERS), default="cosine", help="the article's best is cosine")
    add("--weight-decay", type=float, default=2e-5, help="L2 penalty (adamw: decoupled)")
    amp = "mixed precision, the default on CUDA and on CPUs with bfloat16 (avx512_bf16)"
    add("--amp", action=argparse.BooleanOptionalAction, default=CUDA or FAST_BFLOAT16, help=amp)
    add = parser.add_argument_group("training pictures").add_argument
    add("--augmentation", choices=list(AUGMENTATION), default="physical", help="how they are varied: AUGMENTATION")
    add("--warp", type=float, metavar="PERCENT", help="drift of retention (default: of the augmentation)")
    views = "frozen backbone: features of K draws of each are stored; 0: fresh draws every epoch"
    add("--views", type=or_auto(int), default="auto", metavar="K", help=views)
    add = parser.add_argument_group("experiments").add_argument
    add("--repeats", type=count, default=1, metavar="N", help="trainings with seeds SEED, SEED + 1, ...")
    add("--folds", type=int, default=0, metavar="K", help="cross-validation over train and val together")
    add("--tune", type=int, default=0, metavar="N", help="Optuna trials over the combinations of SEARCH")
    add("--storage", metavar="URL", help="Optuna database that processes share (default: in the tune folder)")
    add("--shuffle-labels", action="store_true", help="control: must fall to chance")
    add = parser.add_argument_group("machine and output").add_argument
    add("--seed", type=int, default=2643, help="of initial weights, order and draws")
    workers = cores() if CUDA else max(1, cores() // 4)  # on a CPU the network needs most of them
    add("--workers", type=int, default=workers, help="processes that load pictures; draws depend on how many")
    add("--out", default="runs", metavar="DIR", help="runs go to DIR/<data set>/<backbone>/seed<seed>/")
    add("--name", help="in place of the data set's name")
    return parser


def parse_arguments(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    if not args.data:
        parser.set_defaults(demo=True, data="demo", **DEMO)
        args = parser.parse_args(argv)
    if args.lr != "auto" and not 0 < args.lr < math.inf:
        parser.error("--lr is a number above 0, or auto")
    if min(args.workers, args.seed, args.weight_decay, args.warp or 0, 0 if args.views == "auto" else args.views) < 0:
        parser.error("--views, --workers, --seed, --weight-decay and --warp are 0 or more")
    if args.batch_size == 1:
        parser.error("--batch-size is 2 or more: one picture has no batch statistics")
    if args.tune and (args.folds or args.repeats > 1 or WORLD > 1):
        parser.error("--tune is one training's: without --folds, --repeats and torchrun (processes share --storage)")
    if 0 < args.folds < 3:
        parser.error("--folds takes at least 3: one is held out, one chooses the epoch, the others train")
    if args.weights not in ("auto", "pretrained", "random") and not Path(args.weights).is_file():
        parser.error(f"--weights {args.weights}: no such file (nor auto, pretrained or random)")
    return args


def expand_trainings(args):
    """[arguments of each training]: one backbone, one seed, one fold each."""
    backbones = expand_backbones(args.backbone, args.params)
    folds = range(args.folds) if args.folds else [None]
    trainings = []
    for backbone, i, fold in itertools.product(backbones, range(args.repeats), folds):
        own = {"backbone": backbone, "seed": args.seed + i, "fold": fold}
        if backbone == "pixels" and len(backbones) > 1:
            own["scales"] = None  # --scales are meant for the networks
        trainings.append(argparse.Namespace(**vars(args) | own))
    return trainings


def make_demo(args):
    say(f"no --data: the demo cohort, at settings that two CPU cores can manage: {DEMO}")
    if RANK == 0 and not (Path(args.data) / "samples.csv").exists():
        subprocess.run([sys.executable, Path(__file__).with_name("tests") / "demo.py", args.data], check=True)
    if WORLD > 1:
        dist.barrier()  # the others wait for the cohort


def main():
    args = parse_arguments()
    if WORLD > 1:
        dist.init_process_group("nccl" if CUDA else "gloo")
        if CUDA:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    trainings = expand_trainings(args)
    if "demo" in args:
        make_demo(args)
    pictures, recipe = find_pictures(trainings[0].data, ("train", "val"))
    classes = find_classes(pictures, trainings[0].positive)
    pictures["label"] = make_labels(pictures, classes)
    groups = pictures.groupby("phenotype")["group"].nunique()
    if args.folds > groups.min():
        few = f"{groups.idxmin()} has {groups.min()} samples or groups, and each fold needs one"
        raise InputError(f"--folds {args.folds}: {few} (3 folds at least)")
    failures, results, store = [], [], {}
    for training in trainings:
        if args.tune:
            tune(training, pictures, classes, recipe, store)
            continue
        try:
            results.append(train_once(training, pictures, classes, recipe, store))
        except Exception as error:  # out of memory, an operator that is missing, a size that does not suit
            if len(trainings) == 1 or WORLD > 1:  # caught in one process, it would leave the others waiting for ever
                raise
            failures.append(f"{run_folder(training)}: {first_line(error)}")
            say(f"failed: {failures[-1]}")
    if WORLD > 1:
        dist.destroy_process_group()
    if results:
        say(f"next:\n  python evaluate.py {results[0] if len(results) == 1 else results[0].parents[1]}")
        say(f"  python explain.py {results[0]}")
    for failure in failures:
        print(f"left out: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    run_script(main)
