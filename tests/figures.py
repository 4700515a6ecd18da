"""Draw one raw file becoming a picture (for README) and views of that picture (for EXPERIMENTS).

    python tests/figures.py FILE.mzML [FOLDER]

Writes raw_file_to_picture.png (the steps of `deeplcms.make_picture`) and augmentation.png.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import convert  # noqa: E402
import deeplcms  # noqa: E402
import train  # noqa: E402


def save(figure, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    with deeplcms.whole_file(path) as temporary:
        figure.savefig(temporary, dpi=110)
    print(path)


def draw_steps(run, box, path):
    """Draw one scan, all scans, their histogram and the picture."""
    scans, recipe = list(deeplcms.read_raw(run)[1]), deeplcms.Recipe(*box)
    rt, mz, intensity = max(scans, key=lambda scan: scan[2].sum())
    counts, _ = deeplcms.make_histogram(run, recipe)
    figure, axes = plt.subplots(1, 4, figsize=(17, 4.6), layout="constrained")

    axes[0].vlines(mz, 0, intensity, linewidth=0.8)
    axes[0].set(xlabel="m/z", ylabel="intensity", ylim=(0, None), xlim=box[2:])
    axes[0].set_title(f"1. One scan: a mass spectrum at {rt:.2f} min")

    peaks = np.concatenate([np.stack([np.full(len(m), t), m, i]) for t, m, i in scans], axis=1)
    peaks = peaks[:, np.argsort(peaks[2])]  # the strongest on top
    axes[1].scatter(*peaks[:2], c=np.log10(peaks[2] + 1), s=0.2, cmap="viridis", rasterized=True)
    axes[1].set_title(f"2. The raw file: {len(scans):,} scans, {peaks.shape[1]:,} peaks")

    axes[2].imshow(np.log10(counts.T[::-1] + 1), extent=box, aspect="auto", cmap="viridis")
    axes[2].set_title(f"3. Intensity summed in {recipe.bins[0]} x {recipe.bins[1]} bins")

    picture = deeplcms.render_histogram(counts, recipe)
    axes[3].imshow(deeplcms.colours(picture, recipe.colormap), extent=box, aspect="auto")
    axes[3].set_title("4. The picture: filtered, divided by a\nquantile of this file, logarithm, jet")
    for axis in axes[1:]:
        axis.set(xlabel="retention time (min)", ylabel="m/z", xlim=box[:2], ylim=box[2:])
    save(figure, path)


def draw_augmentation(run, box, path):
    """Draw one picture and three views of it for each augmentation."""
    recipe, shown = deeplcms.Recipe(*box), {"physical": "as instruments vary", "article": "as photographs vary"}
    picture, _ = deeplcms.make_picture(run, recipe)
    figure, axes = plt.subplots(2, 4, figsize=(14, 7), sharex=True, sharey=True, layout="constrained")
    model = train.Classifier("pixels", 1, image_size=500)
    for line, (name, source) in zip(axes, shown.items(), strict=True):
        args = train.parse_arguments(["--backbone", "pixels", "--data", "any", "--augmentation", name])
        transform = train.training_transform(model, recipe, train.fill_augmentation(args))
        torch.manual_seed(1)
        draws = [(transform(picture) / 2 + 0.5).permute(1, 2, 0).numpy() for _ in range(3)]
        for axis, image in zip(line, [deeplcms.colours(picture, recipe.colormap), *draws], strict=True):
            axis.imshow(image, extent=box, aspect="auto", interpolation="antialiased")
        line[0].set(title="the picture", ylabel="m/z")
        line[2].set_title(f"--augmentation {name}: {source}")
    for axis in axes[1]:
        axis.set_xlabel("retention time (min)")
    save(figure, path)


def main():
    if len(sys.argv) not in (2, 3):
        raise deeplcms.InputError("needs FILE.mzML; a folder is optional")
    run, folder = Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) == 3 else ROOT / ".github/figures")
    statistics = convert.read_statistics(run, 0)
    box = [statistics[side] for side in ("rt_first", "rt_last", "mz_low", "mz_high")]
    draw_steps(run, box, folder / "raw_file_to_picture.png")
    draw_augmentation(run, box, folder / "augmentation.png")


if __name__ == "__main__":
    deeplcms.run_script(main)
