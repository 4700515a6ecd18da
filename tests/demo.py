"""Make the demo cohort: synthetic mzML files of two phenotypes with planted compounds, and their pictures.

    python tests/demo.py                              # the default of train.py: 600 raw files, in demo/
    python tests/demo.py cohort1 --seed 1 --runs 280  # other flags are passed to convert.py

The pictures look like the article's Figure 2: a dead volume, lines of chemical noise, a wash at the end, tailing peaks,
retention and mass drift, and intensities over four decades. DIR/raw/ contains the raw files and samples.csv.
DIR/features.csv lists planted and background compounds in the format of an MS-DIAL export. Existing files are kept, as
each file has its own random numbers.
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import convert  # noqa: E402
from deeplcms import Help, InputError, count, read_table, run_script, slow_waves, whole_file  # noqa: E402
from deeplcms import write_table, write_text  # noqa: E402

PHENOTYPES = ("control", "exposed")
BATCHES, MINUTES, MZ = 4, 10.0, (100.0, 900.0)
FEATURES = """\
,,,,,,,Class
,,,,,,,File type
,,,,,,,Injection order
,,,,,,,Batch ID
Alignment ID,Average Rt(min),Average Mz,Metabolite name,Ontology,Fold change,MS/MS matched,Annotation tag (VS1.0)
"""


def demo_compounds(rng, n_planted=24, n_background=216):
    """Table of simulated compounds; `fold` is the ratio of a compound's levels in exposed people and in controls.

    Planted compounds have a fold of 2-10, up or down. Three are in exposed people only (infinity), like a drug. All
    other columns have the same distributions for planted and background compounds. `frequency` is the probability that
    a file contains the compound.
    """
    n = n_planted + n_background
    compounds = pd.DataFrame({"planted": np.arange(n) < n_planted, "rt": rng.uniform(0.9, 9.0, n)})  # minutes
    # Larger molecules elute later, as on a C18 column.
    compounds["mz"] = rng.uniform(110, 700, n) + 20 * compounds["rt"]
    others = rng.integers(0, n, n - 2 * n // 3)  # the last third of the compounds overlaps with these
    for axis, spread in (("rt", 0.1), ("mz", 6)):
        beside = compounds[axis][others] + rng.normal(0, spread, len(others))
        compounds.loc[2 * n // 3 :, axis] = beside.to_numpy()
    compounds["log10_height"] = np.clip(rng.normal(5.8, 0.5, n), 5.0, 7.3)
    compounds["width"] = rng.uniform(2.5, 5.0, n)  # seconds, standard deviation of the rising side
    compounds["tailing"] = rng.uniform(1.2, 3.0, n)  # falling side / rising side
    compounds["frequency"] = rng.uniform(0.6, 0.95, n)
    fold = np.exp(rng.uniform(np.log(2), np.log(10), n)) ** rng.choice([-1, 1], n)
    fold[:3] = np.inf
    compounds["fold"] = np.where(compounds["planted"], fold, 1.0)
    return compounds


def simulate_scans(rng, compounds, lines, exposed, batch, interval=2.0, noise=40, threshold=1e3, gain=1.0):
    """Scans [(seconds, m/z ascending, intensity)] of one synthetic centroided file.

    interval: seconds between scans; noise: noise peaks per scan; gain: factor for all peaks but noise. Other values
    simulate another method.

    The faahKO files (Saghatelian 2004) have peaks 33 s wide at half height. Their retention times differ by 2-24 s
    between days, slowly along the gradient, and by 2 s within a day. Their sensitivity differs by 20 %. Here peaks are
    6-24 s wide and batches drift by 15 s (standard deviation), as between columns. The levels of people differ by a
    factor of 2.2, a guess for human blood.
    """
    times = np.arange(0, 60 * MINUTES, interval)
    n = len(times)
    peaks = []  # (scan, m/z, intensity) arrays
    mass_error, sensitivity = rng.normal(0, 3), rng.lognormal(0, 0.3)
    waves = batch + rng.normal(0, 3, 6)
    drift = waves @ slow_waves(compounds["rt"] / MINUTES) + rng.normal(0, 0.5, len(compounds))
    level = compounds["fold"] ** (0.5 if exposed else -0.5)
    level = level.replace(np.inf, 1.0) * sensitivity * rng.lognormal(0, 0.8, len(compounds))
    drawn = compounds.assign(apex=60 * compounds["rt"] + drift, top=10 ** compounds["log10_height"] * level)
    for compound in drawn[rng.random(len(drawn)) < drawn["frequency"]].itertuples():
        rise, fall = compound.width, compound.width * compound.tailing
        near = np.flatnonzero((times > compound.apex - 4 * rise) & (times < compound.apex + 4 * fall))
        sides = np.where(times[near] < compound.apex, rise, fall)
        shape = np.exp(-0.5 * ((times[near] - compound.apex) / sides) ** 2)
        profile = compound.top * shape * rng.lognormal(0, 0.1, len(near))
        carbon_13 = 0.011 * (compound.mz / 20)  # carbon-13 atoms per molecule
        for isotope, share in enumerate((1, carbon_13, carbon_13**2 / 2)):
            peaks.append((near, compound.mz + 1.00336 * isotope, profile * share))
    # Solvent and plasticiser ions are in every scan: they are the horizontal lines of the article's Figure 2.
    for line, level in lines:
        fluctuation = np.exp(np.cumsum(rng.normal(0, 0.05, n)))
        peaks.append((np.arange(n), line, level * sensitivity * fluctuation / fluctuation.mean()))
    # The dead volume contains unretained ions. The wash contains strongly retained ions, including a polymer.
    for start, end, n_ions, low, level in ((0.5, 0.75, 60, 100, 2e5), (9.3, 9.8, 150, 300, 1e5)):
        window = np.flatnonzero((times > 60 * start) & (times < 60 * end))
        rise_and_fall = np.hanning(len(window) + 2)[1:-1]
        for ion in rng.uniform(low, low + 400, n_ions):
            peaks.append((window, ion, level * rng.lognormal(0, 1) * rise_and_fall))
    window = np.flatnonzero(times > 60 * 9.2)
    for unit in range(12):
        level = 4e5 * np.exp(-0.5 * ((unit - 5) / 3) ** 2)
        peaks.append((window, 327.2 + 44.0262 * unit, level * rng.lognormal(0, 0.1, len(window))))
    peaks = [(scan, mz, gain * height) for scan, mz, height in peaks]
    m = noise * n  # electronic noise
    peaks.append((rng.integers(0, n, m), rng.uniform(*MZ, m), rng.lognormal(np.log(2e3), 0.7, m)))

    scan, mz, height = np.concatenate([np.broadcast_arrays(*part) for part in peaks], axis=1)
    mz = mz * (1 + 1e-6 * (mass_error + rng.normal(0, 2, len(mz))))
    order = np.lexsort((mz, scan))
    order = order[height[order] > threshold]  # the detector covers four decades
    starts = np.searchsorted(scan[order], np.arange(1, n))
    return list(zip(times, np.split(mz[order], starts), np.split(height[order], starts), strict=True))


def write_mzml(path, scans):
    """Write MS1 scans [(seconds, m/z, intensity)] as mzML: zlib, 64-bit m/z, 32-bit intensity."""
    import pyopenms

    experiment = pyopenms.MSExperiment()
    for seconds, mz, intensity in scans:
        spectrum = pyopenms.MSSpectrum()
        spectrum.setMSLevel(1)
        spectrum.setRT(float(seconds))
        spectrum.set_peaks((mz, intensity.astype(np.float32)))
        experiment.addSpectrum(spectrum)
    options, file = pyopenms.PeakFileOptions(), pyopenms.MzMLFile()
    options.setCompression(True)
    file.setOptions(options)
    with whole_file(path) as temporary:
        file.store(str(temporary), experiment)


def demo_cohort(seed, **sizes):
    """Properties that all files share: compounds, [(m/z, intensity)] of lines, drift (BATCHES, 6) of batches."""
    rng = np.random.default_rng([seed, 0])
    compounds = demo_compounds(rng, **sizes)
    lines = np.transpose([rng.uniform(*MZ, 15), rng.lognormal(np.log(2e4), 0.8, 15)])
    return compounds, lines, rng.normal(0, 15, (BATCHES, 6))


def write_demo_file(path, seed, index):
    """Write one file of the demo cohort. Its content depends on seed and index alone, in any worker process."""
    compounds, lines, batches = demo_cohort(seed)
    run = np.random.default_rng([seed, 1, index])
    write_mzml(path, simulate_scans(run, compounds, lines, index % 2 == 1, batches[batch_of(index)]))


def batch_of(index):
    """Batch of a file. Each batch has files of both phenotypes, in turn."""
    return index // 2 % BATCHES


def write_cohort(folder, n_runs, seed, workers):
    """Write folder/raw/*.mzML, samples.csv, and folder/features.csv in the format of an MS-DIAL alignment export."""
    raw_dir, indices = folder / "raw", range(n_runs)
    if (folder / "settings.json").exists() and not raw_dir.exists():
        raise InputError(f"{folder} holds another data set: use another folder")
    print(f"the demo cohort: {n_runs} synthetic raw files in {raw_dir}, their compounds in {folder}/features.csv")
    raw_dir.mkdir(parents=True, exist_ok=True)
    samples = pd.DataFrame({"sample_name": [f"run{i:03d}" for i in indices], "cohort": str(seed)})
    samples["phenotype"] = [PHENOTYPES[i % 2] for i in indices]
    samples["batch"] = [f"{batch_of(i) + 1}" for i in indices]
    table = raw_dir / "samples.csv"
    if table.exists() and not read_table(table).equals(samples):
        raise InputError(f"{raw_dir} holds another cohort: use another folder or delete this one")
    for leftover in raw_dir.glob(".*.tmp.mzML"):  # left by a killed command
        leftover.unlink()
    write_table(table, samples)
    paths = [raw_dir / f"{name}.mzML" for name in samples["sample_name"]]
    tasks = {i: (paths[i], seed, i) for i in indices if not paths[i].exists()}
    for result in convert.for_each(write_demo_file, tasks, workers, "writing mzML").values():
        if isinstance(result, Exception):
            raise result

    features = demo_cohort(seed)[0].sort_values("rt").round({"rt": 3, "mz": 5, "fold": 2})
    features["kind"] = np.where(features["planted"], "planted", "background")
    features["name"] = features["kind"] + features.index.map(" {:03d}".format)
    features["matched"] = features.index % 3 == 0
    features["tag"] = np.where(features["matched"], 430, 530)
    columns = features[["rt", "mz", "name", "kind", "fold", "matched", "tag"]].to_csv(header=False)
    write_text(folder / "features.csv", FEATURES + columns)


# ---------------------------------------------------------------- command line
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path("demo"), metavar="DIR", help="folder for the cohort"
    )
    parser.add_argument("--runs", type=count, default=600, help="number of raw files, half of each phenotype")
    parser.add_argument("--seed", type=int, default=2643, help="random seed of compounds, files and splits")
    parser.add_argument("--workers", type=count, default=os.cpu_count(), help="number of processes")
    args, convert_flags = parser.parse_known_args()
    raw_dir = args.folder / "raw"
    flags = ["--bins", 256, "--test", 0.2, "--rt-range", 0, MINUTES, "--mz-range", *MZ]
    flags += ["--seed", args.seed, "--workers", args.workers, *convert_flags]
    conversion = convert.parse_arguments(
        [str(text) for text in (raw_dir, raw_dir / "samples.csv", args.folder, *flags)]
    )
    write_cohort(args.folder, args.runs, args.seed, args.workers)
    return convert.convert(conversion)


if __name__ == "__main__":
    run_script(main)
