"""Two figures for the README, of one run: how it becomes a picture, and what four data sets make of it.

    python tests/figures.py RUN.mzML [FOLDER]

Writes run_to_picture.png (the steps of `deeplcms.picture_of_run`) and picture_properties.png (the article's Figure 2:
500 and 1000 bins, each as it is and as a shifted copy, with both normalisations).
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import convert  # noqa: E402
import deeplcms  # noqa: E402

LABELS = {"rt": "each time divided by its highest bin (rt)", "global": "divided by the highest bin of the run (global)"}


def save(figure, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    with deeplcms.whole_file(path) as temporary:
        figure.savefig(temporary, dpi=110)
    print(path)


def draw_steps(run, box, path):
    """One scan, all scans, their histogram, the picture."""
    scans, recipe = list(deeplcms.read_run(run)), deeplcms.Recipe(*box)
    rt, mz, intensity = max(scans, key=lambda scan: scan[2].sum())
    counts, _ = deeplcms.histogram_of_run(run, recipe)
    figure, axes = plt.subplots(1, 4, figsize=(17, 4.6), layout="constrained")

    axes[0].vlines(mz, 0, intensity, linewidth=0.8)
    axes[0].set(xlabel="m/z", ylabel="intensity", ylim=(0, None), xlim=box[2:])
    axes[0].set_title(f"1. One scan: a mass spectrum at {rt:.2f} min")

    every = np.concatenate([np.stack([np.full(len(m), t), m, i]) for t, m, i in scans], axis=1)
    every = every[:, np.argsort(every[2])]  # the strongest on top
    axes[1].scatter(*every[:2], c=np.log10(every[2] + 1), s=0.2, cmap="viridis", rasterized=True)
    axes[1].set_title(f"2. The run: {len(scans):,} scans, {every.shape[1]:,} peaks")

    axes[2].imshow(np.log10(counts.T[::-1] + 1), extent=box, aspect="auto", cmap="viridis")
    axes[2].set_title(f"3. Intensity summed in {recipe.bins[0]} x {recipe.bins[1]} bins")

    axes[3].imshow(deeplcms.picture_of_counts(counts, recipe), extent=box, aspect="auto")
    axes[3].set_title("4. The picture: each time divided by its\nhighest bin, filtered, logarithm, jet")
    for axis in axes[1:]:
        axis.set(xlabel="retention time (min)", ylabel="m/z", xlim=box[:2], ylim=box[2:])
    save(figure, path)


def draw_properties(run, box, path):
    rt_shift, mz_shift = convert.draw_shifts(run.name.split(".")[0], 1, (5, 5), 2643)[0]
    figure, axes = plt.subplots(2, 4, figsize=(14, 7.4), sharex=True, sharey=True, layout="constrained")
    for line, (normalize, label) in zip(axes, LABELS.items(), strict=True):
        for pair, bins in ((0, 500), (2, 1000)):
            recipe = deeplcms.Recipe(*box, bins=(bins, bins), normalize=normalize)
            picture, _ = deeplcms.picture_of_run(run, recipe)
            copy = convert.shifted(picture, rt_shift, mz_shift, recipe.zero_colour())
            for axis, image in zip(line[pair:], (picture, copy), strict=False):
                axis.imshow(image, extent=box, aspect="auto", interpolation="antialiased")
            if normalize == "rt":
                line[pair].set_title(f"{bins} x {bins} bins")
                shift = f"{rt_shift:+d} (time) and {mz_shift:+d} (m/z) pixels"
                line[pair + 1].set_title(f"{bins} x {bins} bins, copy shifted by\n{shift}")
        line[0].set_ylabel(f"{label}\n\nm/z")
    for axis in axes[1]:
        axis.set_xlabel("retention time (min)")
    figure.suptitle(f"One run ({run.name.split('.')[0]}), the pictures of four data sets", fontsize=14)
    save(figure, path)


def main():
    if len(sys.argv) not in (2, 3):
        raise deeplcms.InputError("needs RUN.mzML, and a folder if you like")
    run, folder = Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) == 3 else ROOT / ".github/figures")
    statistics = convert.statistics_of_run(run, 0)
    box = [statistics[side] for side in ("rt_first", "rt_last", "mz_low", "mz_high")]
    draw_steps(run, box, folder / "run_to_picture.png")
    draw_properties(run, box, folder / "picture_properties.png")


if __name__ == "__main__":
    deeplcms.run_script(main)
