"""What training, evaluation and explanation share: the pictures of a data set, the model, checkpoints, metrics.

No command of its own. `Pictures` is what goes into the network, `Classifier` the network (article, "Model
architecture": a pretrained backbone and a new classification head), `load_run` brings one back, `metrics_of` says how
good it is. What a picture is (axes, recipe) is defined where pictures are made: `Recipe` in convert.py.
"""

import difflib
import json
import math
import pickle
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import timm
import torch
from matplotlib.figure import Figure
from PIL import Image
from scipy.stats import rankdata
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import v2

from convert import SPLITS, Problem, Recipe, first_few, first_line, read_table, whole_file

# ---------------------------------------------------------------- pictures


class Picture:
    """One PNG of a data set: path, phenotype, sample_name, group, is_copy, and what its text chunks say."""

    def __init__(self, path, phenotype="", group=""):
        self.path, self.phenotype, self.group = Path(path), phenotype, group
        try:
            with Image.open(path) as image:
                self.size, self.text = image.size, dict(getattr(image, "text", {}))
            self.recipe = Recipe.from_text(self.text)
        except (OSError, SyntaxError) as error:
            raise Problem(f"{path}: not a readable PNG ({error})") from None
        except (KeyError, ValueError):
            raise Problem(f"{path}: has no axes in its text chunks; was it made by convert.py?") from None
        self.sample_name = self.text.get("sample_name", self.path.stem)
        self.is_copy = self.text.get("shift", "0 0") != "0 0"

    def load(self):
        """RGB picture as uint8 tensor (3, height, width)."""
        try:
            with Image.open(self.path) as image:
                return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
        except (OSError, SyntaxError) as error:
            raise Problem(f"{self.path}: cannot be decoded ({error}); delete it and run convert.py again") from None


def find_pictures(data_dir, splits=SPLITS):
    """{split: [Picture]} of an image folder that convert.py made: data_dir/<split>/<phenotype>/*.png.

    Raises Problem where a split is missing or the pictures do not share one size and one recipe: on other
    axes the same pixel is another compound.
    """
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise Problem(f"{data_dir}: no such data set; make one with convert.py", 2)
    if (data_dir / "settings.json").exists() and not (data_dir / "samples.csv").exists():
        raise Problem(f"{data_dir}: its conversion did not finish; run the same convert.py command again")
    groups = {}
    if (data_dir / "samples.csv").exists():
        groups = {row["sample_name"]: row.get("group") or "" for row in read_table(data_dir / "samples.csv")}
    pictures = {}
    for split in splits:
        paths = sorted(p for p in data_dir.glob(f"{split}/*/*.png") if not p.name.startswith("."))
        if not paths:
            raise Problem(f"{data_dir}: no pictures in {split}/<phenotype>/*.png", 2)
        pictures[split] = [Picture(path, path.parent.name) for path in paths]
    every = [picture for split in splits for picture in pictures[split]]
    for picture in every:
        picture.group = groups.get(picture.sample_name, "")
        if (picture.size, picture.recipe) != (every[0].size, every[0].recipe):
            raise Problem(f"{data_dir}: {picture.path.name} and {every[0].path.name} differ in size, axes or settings")
    return pictures


def classes_of(pictures, positive=None):
    """Sorted phenotypes of {split: [Picture]}; with two of them class 1 is `positive`, or else the last."""
    classes = sorted({picture.phenotype for split in pictures.values() for picture in split})
    if len(classes) < 2:
        raise Problem(f"one phenotype only ({classes[0]!r}); a classifier needs two", 2)
    for split, members in pictures.items():
        if missing := set(classes) - {picture.phenotype for picture in members}:
            raise Problem(f"the {split} split has no picture of {first_few(missing)}", 2)
    if positive is not None:
        if positive not in classes:
            raise Problem(f"--positive {positive!r} is not one of {', '.join(classes)}", 2)
        classes = [name for name in classes if name != positive] + [positive]
    return classes


def evaluation_transform(size, mean, std):
    """uint8 (3, H, W) -> float (3, size, size): squashed, never cropped, as position is the measurement."""
    return v2.Compose(
        [v2.Resize((size, size), antialias=True), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    )


def training_transform(size, mean, std, zero_colour, rotate=5.0, color_jitter=0.25, erase=1.0):
    """The evaluation transform with the article's augmentation ("Evaluating the final model", Figure 4) in between.

    Rotation by up to `rotate` degrees and erasing with probability `erase` uncover 0. Colours are therefore measured
    from the colour of zero intensity meanwhile: uncovered means "nothing measured", not a peak. The jitter (strength,
    not a probability) comes last, so that it changes that colour like the rest of the picture.
    """
    zero = tuple(float(channel) / 255 for channel in zero_colour)
    squash, scale, normalise = evaluation_transform(size, mean, std).transforms
    return v2.Compose(
        [
            squash,
            scale,
            v2.Normalize(zero, (1.0, 1.0, 1.0)),
            v2.RandomRotation(rotate, v2.InterpolationMode.BILINEAR),
            v2.RandomErasing(erase),
            v2.Normalize([-channel for channel in zero], (1.0, 1.0, 1.0)),
            v2.ColorJitter(color_jitter, color_jitter, color_jitter),
            normalise,
        ]
    )


class Pictures(torch.utils.data.Dataset):
    """Pictures as (float tensor (3, size, size), class index). Item (i, draw): random draw `draw` of picture i.

    A draw depends on seed, draw and file name alone: not on worker, order, or what was drawn before. So the figures
    are the same with any number of workers, after a restart, and for stored features.
    """

    def __init__(self, pictures, classes, transform, seed=0):
        self.pictures, self.transform, self.seed = pictures, transform, seed
        self.labels = [classes.index(picture.phenotype) if picture.phenotype in classes else -1 for picture in pictures]

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, key):
        i, draw = key if isinstance(key, tuple) else (key, 0)
        return self.draws(i, [draw])[0], self.labels[i]

    def draws(self, i, draws):
        """Several random draws of picture i, decoded once: float (len(draws), 3, size, size)."""
        pixels, name = self.pictures[i].load(), zlib.crc32(self.pictures[i].path.name.encode())
        drawn = []
        with torch.random.fork_rng(devices=[]):
            for draw in draws:
                torch.manual_seed(int(np.random.SeedSequence([self.seed, draw, name]).generate_state(1, np.uint64)[0]))
                drawn.append(self.transform(pixels))
        return torch.stack(drawn).contiguous()


# ---------------------------------------------------------------- model


def check_backbone(name):
    """Raise Problem with the nearest names unless `name` is a timm model or 'pixels'."""
    if name != "pixels" and not timm.is_model(name):
        near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), 3, cutoff=0.3)
        raise Problem(f"--backbone {name!r} is not a timm model; the nearest: {', '.join(near)}", 2)


class Classifier(nn.Module):
    """Backbone -> feature map (N, C, H, W) -> mean of each cell of a grid -> standardise -> linear -> logits (N, K).

    Two classes have one logit (of class 1), more have one each. Grid 1 is the article's global pooling; with a larger
    grid the head knows where on the retention-time and m/z axes a pattern lies. `pixels` has no backbone: its feature
    map is the picture itself. A tensor of two dimensions is taken for pooled features, as `features` returns them.
    """

    def __init__(self, backbone, n_classes, grid=None, image_size=None, pretrained=False):
        super().__init__()
        check_backbone(backbone)
        self.frozen = False
        if backbone == "pixels":
            self.backbone = nn.Identity()
            self.image_size, self.mean, self.std = image_size or 224, (0.5,) * 3, (0.5,) * 3
            self.grid = grid or 56
        else:
            default = timm.get_pretrained_cfg(backbone) or timm.models.PretrainedCfg()
            self.image_size = image_size or default.input_size[-1]
            # Backbones with a position embedding are built for one size; the others take any and know no img_size.
            sized = (
                {"img_size": self.image_size}
                if default.fixed_input_size and self.image_size != default.input_size[-1]
                else {}
            )
            try:
                self.backbone = timm.create_model(backbone, pretrained=pretrained, num_classes=0, **sized)
            except TypeError:  # a fixed input size that cannot be changed
                self.image_size = default.input_size[-1]
                self.backbone = timm.create_model(backbone, pretrained=pretrained, num_classes=0)
            config = timm.data.resolve_model_data_config(self.backbone)
            self.mean, self.std = config["mean"], config["std"]
            self.grid = grid or 1
        self.backbone.eval()
        try:
            with torch.no_grad():
                n_features = self.features(torch.zeros(1, 3, self.image_size, self.image_size)).shape[1]
        except Exception as error:  # every architecture has its own
            size = f"{self.image_size} x {self.image_size}"
            raise Problem(f"{backbone} cannot do with pictures of {size}: {first_line(error)}") from None
        self.backbone.train()
        self.standardize = nn.BatchNorm1d(n_features, affine=False)
        self.head = nn.Linear(n_features, 1 if n_classes == 2 else n_classes)
        nn.init.zeros_(self.head.weight)  # every picture starts at even odds
        nn.init.zeros_(self.head.bias)

    def freeze(self):
        """Train the head alone: the backbone and the standardisation keep their state, in training mode too."""
        self.frozen = True
        self.backbone.requires_grad_(False)
        return self.train(self.training)

    def train(self, mode=True):
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
            self.standardize.eval()
        return self

    @torch.no_grad()
    def fit_standardize(self, batches):
        """Mean and variance of the features of a frozen backbone, from batches (N, F) of the training pictures.

        A feature that hardly varies here is not blown up when it does later: its deviation counts as at least a tenth
        of the typical one.
        """
        features = torch.cat([batch.double().cpu() for batch in batches])
        variance, mean = torch.var_mean(features, 0, correction=0)
        self.standardize.running_mean.copy_(mean)
        self.standardize.running_var.copy_(variance.clamp(min=0.01 * variance.mean()))

    def feature_map(self, x):
        """Pictures (N, 3, size, size) -> feature map (N, C, H, W), whatever layout the backbone uses inside."""
        if isinstance(self.backbone, nn.Identity):
            return x
        y = self.backbone.forward_features(x)
        return to_channels_first(y, self.backbone)

    def features(self, x):
        """Pictures (N, 3, size, size) -> pooled features (N, C * grid * grid)."""
        return F.adaptive_avg_pool2d(self.feature_map(x), self.grid).flatten(1)

    def forward(self, x):
        if x.ndim == 4:
            x = self.features(x)
        # Divided by the square root of their number, F standardised features have length 1: one learning rate then
        # suits a head of 100 inputs and one of 100,000, and the backbone below is not shaken by the first steps.
        return self.head(self.standardize(x) / x.shape[1] ** 0.5)


def to_channels_first(y, backbone):
    """Tokens (N, L, C) of a ViT or channels-last maps (N, H, W, C) of a Swin -> (N, C, H, W)."""
    if isinstance(y, list):
        y = y[-1]  # of several scales (CoaT) the coarsest
    if y.ndim == 3:
        n_odd = y.shape[1] - math.isqrt(y.shape[1]) ** 2
        y = y[:, getattr(backbone, "num_prefix_tokens", n_odd) :]  # class and register tokens have no place
        height, width = (
            getattr(getattr(backbone, "patch_embed", None), "grid_size", None) or (math.isqrt(y.shape[1]),) * 2
        )
        return y.transpose(1, 2).unflatten(2, (height, width)).contiguous()
    if getattr(backbone, "output_fmt", "NCHW") == "NHWC":
        return y.permute(0, 3, 1, 2).contiguous()
    return y


def loss_of(logits, labels, reduction="mean"):
    """Binary cross-entropy for one logit, cross-entropy for one a class."""
    if logits.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(logits[:, 0], labels.to(logits.dtype), reduction=reduction)
    return F.cross_entropy(logits, labels, reduction=reduction)


def probabilities_of(logits):
    """Logits (N, 1 or K) -> probability of each class (N, K)."""
    if logits.shape[1] == 1:
        p = torch.sigmoid(logits.double())
        return torch.cat([1 - p, p], 1)
    return torch.softmax(logits.double(), 1)


@torch.inference_mode()
def predict(model, loader, device):
    """Logits (N, 1 or K) in float32 and labels (N,), on the CPU, of every picture of the loader, in its order."""
    model.eval()
    logits, labels = [], []
    for x, y in loader:
        logits.append(model(x.to(device, non_blocking=True)).float().cpu())
        labels.append(y)
    return torch.cat(logits), torch.cat(labels)


# ---------------------------------------------------------------- metrics


def roc_auc(positive, score):
    """Chance that a positive scores above a negative, ties counting half (Mann-Whitney); nan with one class only."""
    positive = np.asarray(positive, bool)
    n, m = positive.sum(), (~positive).sum()
    if n == 0 or m == 0:
        return math.nan
    return float((rankdata(score)[positive].sum() - n * (n + 1) / 2) / (n * m))


def called_class(probabilities, threshold=0.5):
    """Class index (N,) of probabilities (N, K): of two, class 1 from `threshold` on; of more, the most probable."""
    return (probabilities[:, 1] >= threshold).astype(int) if probabilities.shape[1] == 2 else probabilities.argmax(1)


def metrics_of(labels, probabilities, threshold=0.5):
    """Confusion counts and metrics of probabilities (N, K); undefined ones are nan.

    Two classes: precision, recall and F1 are of class 1. More: macro-averaged.
    """
    labels, probabilities = np.asarray(labels), np.asarray(probabilities)
    n_classes = probabilities.shape[1]
    confusion = np.zeros((n_classes, n_classes), int)  # (true, called)
    np.add.at(confusion, (labels, called_class(probabilities, threshold)), 1)
    with np.errstate(invalid="ignore"):
        hits = np.diag(confusion)
        recall, precision = hits / confusion.sum(1), hits / confusion.sum(0)
        f1 = 2 * hits / (confusion.sum(0) + confusion.sum(1))
    of_interest = slice(1, 2) if n_classes == 2 else slice(None)
    aucs = [roc_auc(labels == k, probabilities[:, k]) for k in range(n_classes)]
    return {
        "confusion": confusion.tolist(),
        "accuracy": float(hits.sum() / len(labels)) if len(labels) else math.nan,
        "balanced_accuracy": float(recall.mean()),
        "precision": float(precision[of_interest].mean()),
        "recall": float(recall[of_interest].mean()),
        "f1": float(f1[of_interest].mean()),
        "roc_auc": float(np.mean(aucs[of_interest])),
        "brier": float(((probabilities - np.eye(n_classes)[labels]) ** 2).sum(1).mean() / (2 if n_classes == 2 else 1)),
    }


# ---------------------------------------------------------------- figures, runs and checkpoints


@contextmanager
def figure(path, title, size, **subplots):
    """Yield the axes of a figure (inches); the PNG is written when the block ends well. "; " in the title breaks it."""
    drawing = Figure(figsize=size, layout="constrained")
    axes = drawing.subplots(**subplots)
    drawing.suptitle(title.replace("; ", "\n"), fontsize=11)
    yield axes
    with whole_file(path) as temporary:
        drawing.savefig(temporary, dpi=150)


def save_checkpoint(path, contents):
    """torch.save, whole or not at all."""
    try:
        with whole_file(path) as temporary:
            torch.save(contents, temporary)
    except RuntimeError as error:  # torch's word for a full disk
        raise Problem(f"{path} could not be written; is the disk full? ({first_line(error)})") from None


def load_checkpoint(path, mmap=False):
    """The contents of a checkpoint: tensors, numbers and text only, so that nothing in it can run."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise Problem(f"{path}: no such checkpoint", 2) from None
    except pickle.UnpicklingError:  # torch's own message is a page about how to run it all the same
        raise Problem(f"{path}: not a checkpoint that can be trusted: not only tensors, numbers and text") from None
    except (zipfile.BadZipFile, RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        raise Problem(f"{path}: not a checkpoint that can be read ({first_line(error)})") from None


def find_run(run=None):
    """The run folder named, or the newest one under runs/; raises Problem if it has no best.pt."""
    if run is None:
        checkpoints = sorted(Path("runs").glob("**/best.pt"), key=lambda path: path.stat().st_mtime)
        if not checkpoints:
            raise Problem("no trained run under runs/; start with: python train.py --backbone mobileone_s3", 2)
        return checkpoints[-1].parent
    run = Path(run)
    run = run.parent if run.name.endswith(".pt") else run
    if not (run / "best.pt").is_file():
        raise Problem(f"{run}: no best.pt in this folder; is it a run of train.py?", 2)
    return run


def load_run(run):
    """(model in eval mode, checkpoint) of a run folder; the checkpoint holds classes, recipe, transform and more."""
    checkpoint = load_checkpoint(Path(run) / "best.pt")
    try:
        model = Classifier(
            checkpoint["backbone"], len(checkpoint["classes"]), checkpoint["grid"], checkpoint["image_size"]
        )
        model.load_state_dict(checkpoint["model"])
        model.mean, model.std = checkpoint["mean"], checkpoint["std"]
        checkpoint["recipe"] = Recipe.from_text(checkpoint["recipe"])
    except (KeyError, RuntimeError, TypeError, AttributeError, ValueError) as error:
        raise Problem(f"{run}/best.pt: not a checkpoint of train.py ({first_line(error)})") from None
    return model.eval(), checkpoint


def write_json(path, contents):
    """JSON with nan as null."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(plain(contents), indent=2) + "\n", encoding="utf-8")


def choose_device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
