"""A figure for the README, in the style of the article's Figure 2: what the data sets make of one run.

    python tests/figures.py RUN.mzML [OUT.png]

Columns: 500 and 1000 bins, each as it is and as one of its shifted copies. Rows: both normalisations.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from convert import BOX, Problem, Recipe, draw_shifts, picture_of_run, read_run, run_script, shifted, whole_file  # noqa: E402

LABELS = {"rt": "each time divided by its highest bin (rt)", "global": "divided by the highest bin of the run (global)"}


def main():
    if len(sys.argv) not in (2, 3):
        raise Problem("needs RUN.mzML, and OUT.png if you like", 2)
    run, out = (
        Path(sys.argv[1]),
        Path(sys.argv[2] if len(sys.argv) == 3 else ROOT / ".github/figures/picture_properties.png"),
    )
    statistics = read_run(run, lambda *scan: None)
    axes_of_run = [statistics[side] for side in BOX]
    rt_shift, mz_shift = draw_shifts(run.name.split(".")[0], 1, 5, 2643)[0]
    figure, axes = plt.subplots(2, 4, figsize=(14, 7.4), sharex=True, sharey=True, layout="constrained")
    for line, (normalize, label) in zip(axes, LABELS.items(), strict=True):
        for pair, bins in ((0, 500), (2, 1000)):
            recipe = Recipe(*axes_of_run, bins=(bins, bins), normalize=normalize)
            picture, _ = picture_of_run(run, recipe)
            copy = shifted(picture, rt_shift, mz_shift, recipe.zero_colour())
            for axis, image in zip(line[pair:], (picture, copy), strict=False):
                axis.imshow(image, extent=axes_of_run, aspect="auto", interpolation="antialiased")
            if normalize == "rt":
                line[pair].set_title(f"{bins} x {bins} bins")
                line[pair + 1].set_title(
                    f"{bins} x {bins} bins, copy shifted by\n{rt_shift:+d} (time) and {mz_shift:+d} (m/z) pixels"
                )
        line[0].set_ylabel(f"{label}\n\nm/z")
    for axis in axes[1]:
        axis.set_xlabel("retention time (min)")
    figure.suptitle(f"One run ({run.name.split('.')[0]}), the pictures of four data sets", fontsize=14)
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out) as temporary:
        figure.savefig(temporary, dpi=110)
    print(out)


if __name__ == "__main__":
    run_script(main)
