"""Facts about pictures, transforms, model and metrics."""

import math

import numpy as np
import pytest
import timm
import torch
from torch.utils.data import DataLoader

import deeplcms
from convert import Problem, Recipe
from deeplcms import Classifier, Pictures, metrics_of


def test_the_articles_confusion_counts_give_the_articles_metrics():
    labels = np.repeat([1, 0, 1, 0], [20, 7, 2, 1])  # TP, TN, FN, FP
    probability = np.repeat([0.9, 0.1, 0.1, 0.9], [20, 7, 2, 1])
    metrics = metrics_of(labels, np.stack([1 - probability, probability], 1))
    assert metrics["confusion"] == [[7, 1], [2, 20]]
    rounded = {name: round(metrics[name], 3) for name in ("accuracy", "precision", "recall", "f1")}
    assert rounded == {"accuracy": 0.9, "precision": 0.952, "recall": 0.909, "f1": 0.930}


def test_what_is_undefined_is_nan_and_not_zero():
    metrics = metrics_of([0, 0], np.array([[0.9, 0.1], [0.8, 0.2]]))
    assert math.isnan(metrics["recall"]) and math.isnan(metrics["precision"]) and math.isnan(metrics["roc_auc"])
    assert metrics["accuracy"] == 1


def test_auc_counts_ties_half():
    assert deeplcms.roc_auc([0, 1], [0.5, 0.5]) == 0.5
    assert deeplcms.roc_auc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]) == 0.75


def test_a_pixel_in_each_corner_is_still_there_after_the_evaluation_transform():
    picture = torch.zeros(3, 100, 140, dtype=torch.uint8)
    picture[:, :2, :2] = picture[:, :2, -2:] = picture[:, -2:, :2] = picture[:, -2:, -2:] = 255
    squashed = deeplcms.evaluation_transform(50, (0, 0, 0), (1, 1, 1))(picture)
    assert squashed.shape == (3, 50, 50)
    for row in (0, -1):
        for column in (0, -1):
            assert squashed[0, row, column] > 0.5
    assert squashed[0, 10:40, 10:40].max() == 0


def test_augmentation_uncovers_the_colour_of_zero_intensity():
    zero = Recipe(0, 1, 0, 1).zero_colour()  # dark blue in jet
    picture = torch.tensor(zero).view(3, 1, 1).expand(3, 60, 60).contiguous()
    transform = deeplcms.training_transform(60, (0, 0, 0), (1, 1, 1), zero, rotate=30, color_jitter=0, erase=1)
    expected = torch.tensor(zero / 255).view(3, 1, 1)
    for _ in range(5):
        assert (transform(picture) - expected).abs().max() < 0.01


def test_a_draw_depends_on_seed_draw_and_file_alone(demo):
    pictures = deeplcms.find_pictures(demo, ("train",))["train"]
    transform = deeplcms.training_transform(64, (0.5,) * 3, (0.5,) * 3, pictures[0].recipe.zero_colour())
    data, fewer = (Pictures(part, ["control", "exposed"], transform, 7) for part in (pictures, pictures[3:]))
    first = data[3, 2][0]
    assert torch.equal(first, fewer[0, 2][0]) and torch.equal(first, data.draws(3, [1, 2])[1])
    assert not torch.equal(first, data[3, 1][0]) and not torch.equal(first, data[4, 2][0])
    keys = [[(3, 2), (0, 1)]]
    for workers in (0, 2):
        x, _ = next(iter(DataLoader(data, batch_sampler=keys, num_workers=workers)))
        assert torch.equal(x[0], first)
        # a batch that is channels-last corrupts the heap in the backward pass of some backbones
        assert x.is_contiguous() and x.stride()[1] == 64 * 64


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit", "swin_tiny_patch4_window7_224"])
def test_every_kind_of_backbone_gives_a_map_with_place(backbone):
    """Convolutions, tokens and channels-last: what is bright on the right is seen on the right of the map."""
    size = 64 if backbone == "test_resnet" else None
    model = Classifier(backbone, 2, grid=2, image_size=size).eval()
    x = torch.zeros(1, 3, model.image_size, model.image_size)
    with torch.no_grad():
        plain = model.feature_map(x)
        assert plain.ndim == 4 and plain.shape[1] * 4 == model.head.in_features
        x[..., model.image_size * 7 // 8 :] = 3.0
        change = (model.feature_map(x) - plain).abs().mean((0, 1, 2))
        assert change[-1] > change[0]
        assert model(x).shape == (1, 1)


def test_a_frozen_backbone_stays_as_it_is_while_the_head_learns():
    model = Classifier("test_resnet", 2, grid=1, image_size=64).freeze().train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    deeplcms.loss_of(model(torch.randn(4, 3, 64, 64)), torch.tensor([0, 1, 0, 1])).backward()
    optimizer.step()
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert changed <= {"head.weight", "head.bias"} and changed


def test_random_frozen_features_near_1e7_are_standardised():
    model = Classifier("mobileone_s0", 2, grid=1, image_size=64).freeze()
    x = torch.rand(16, 3, 64, 64)
    with torch.no_grad():
        model.fit_standardize([model.features(x)])
        standardised = model.standardize(model.features(x))
    assert standardised.abs().max() < 20 and 0.5 < standardised.std() < 1.5


def test_an_unknown_backbone_names_the_nearest():
    with pytest.raises(Problem, match="mobileone_s3"):
        Classifier("mobilone_s3", 2)
    assert timm.is_model("mobileone_s3")


def test_pictures_of_other_axes_in_one_data_set_are_refused(demo, tmp_path):
    import shutil

    from PIL import Image, PngImagePlugin

    shutil.copytree(demo, tmp_path / "mixed", ignore=shutil.ignore_patterns("raw"))
    png = next((tmp_path / "mixed" / "train" / "control").glob("*.png"))
    with Image.open(png) as image:
        info = PngImagePlugin.PngInfo()
        for key, value in image.text.items():
            info.add_text(key, "900.5" if key == "mz_max" else value)
        image.save(png, pnginfo=info)
    with pytest.raises(Problem, match="differ in size, axes or settings"):
        deeplcms.find_pictures(tmp_path / "mixed")


def test_a_hostile_checkpoint_is_refused_and_does_not_run(tmp_path):
    class Hostile:
        def __reduce__(self):
            return open, (str(tmp_path / "owned"), "w")

    torch.save({"model": Hostile()}, tmp_path / "best.pt")
    with pytest.raises(Problem, match="trusted"):
        deeplcms.load_run(tmp_path)
    assert not (tmp_path / "owned").exists()
