"""convert.py: one run -> one exact picture, and a cohort that survives broken files, crashes and kill -9."""

import bz2
import csv
import gzip
import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyopenms
import pytest
from PIL import Image

import convert
from convert import Problem, Recipe

ROOT = Path(convert.__file__).parent
FAST = ["--rt-range", "0", "2", "--mz-range", "100", "300", "--bins", "32"]  # given axes: each file is read once


def run_convert(*arguments):
    command = [sys.executable, "convert.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def random_scans(seed, n_scans=40, n_peaks=200, spread=(100, 300)):
    rng = np.random.default_rng(seed)
    for i in range(n_scans):
        yield 3.0 * i, np.sort(rng.uniform(*spread, n_peaks)), rng.lognormal(8, 2, n_peaks)


def write_cohort(folder, names, header="sample_name,phenotype"):
    """folder/raw/*.mzML and folder/samples.csv; every second run is a case."""
    (folder / "raw").mkdir(parents=True)
    for seed, name in enumerate(names):
        convert.write_mzml(folder / "raw" / f"{name}.mzML", random_scans(seed))
    rows = [header.split(",")] + [[name, ("control", "case")[i % 2]] for i, name in enumerate(names)]
    convert.write_csv(folder / "samples.csv", rows)
    return folder / "raw", folder / "samples.csv"


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def status_of(out_dir):
    return {row["sample_name"]: row["status"] for row in convert.read_table(out_dir / "samples.csv")}


def peaks_of(path):
    """All MS1 peaks of a run as flat arrays (minutes, m/z, intensity), by pyopenms' own loader."""
    experiment = pyopenms.MSExperiment()
    pyopenms.FileHandler().loadExperiment(str(path), experiment)
    scans = [s for s in experiment if s.getMSLevel() == 1 and s.size()]
    rt = np.concatenate([np.full(s.size(), s.getRT() / 60) for s in scans])
    return rt, *(np.concatenate(arrays) for arrays in zip(*(s.get_peaks() for s in scans), strict=True))


def assert_histogram_is_numpys(path, recipe):
    rt, mz, intensity = peaks_of(path)
    limits = [(recipe.rt_min, recipe.rt_max), (recipe.mz_min, recipe.mz_max)]
    expected = np.histogram2d(rt, mz, recipe.bins, limits, weights=intensity.astype(np.float64))[0]
    counts, statistics = convert.histogram_of_run(path, recipe)
    np.testing.assert_allclose(counts, expected, rtol=1e-6)
    assert statistics["total_intensity"] == pytest.approx(intensity.sum(dtype=np.float64), rel=1e-9)
    assert statistics["outside"] == pytest.approx(1 - expected.sum() / intensity.sum(dtype=np.float64), abs=1e-9)
    assert statistics["n_peaks"] == len(mz)
    extent = (rt.min(), rt.max(), mz.min(), mz.max())
    assert [statistics[side] for side in convert.BOX] == pytest.approx(extent)
    return counts


# ---------------------------------------------------------------- one run


def test_histogram_is_numpys_on_edges_outside_and_unsorted(tmp_path):
    edges = np.linspace(100, 300, 33)
    scans = list(random_scans(0)) + [(0.0, edges, np.ones(33)), (120.0, edges[::-1], np.full(33, 2.0))]
    scans += [(60.0, np.array([99.0, 300.0, 301.0]), np.array([5.0, 7.0, 5.0])), (121.0, edges, np.ones(33))]
    convert.write_mzml(tmp_path / "run.mzML", scans)
    counts = assert_histogram_is_numpys(tmp_path / "run.mzML", Recipe(0, 2, 100, 300, bins=(24, 32)))
    assert counts[-1, -1] >= 4  # both peaks of the corner: the last bins include their right edges
    assert_histogram_is_numpys(tmp_path / "run.mzML", Recipe(0.5, 1.5, 150.5, 250.25, bins=(7, 11)))


def test_histogram_is_numpys_on_real_runs(real_runs, odd_files):
    for path in (real_runs / "ko15.mzML", odd_files / "lcms.mzML.gz"):
        statistics = convert.read_run(path, lambda *scan: None)
        assert_histogram_is_numpys(path, Recipe(*(statistics[side] for side in convert.BOX)))


def test_every_format_and_time_unit_gives_the_same_run(tmp_path):
    run = tmp_path / "run.mzML"
    convert.write_mzml(run, [(60.0 * i, *scan) for i, (_, *scan) in enumerate(random_scans(1, 5))])
    in_minutes = run.read_text().replace('unitAccession="UO:0000010" unitName="second"', 'unitAccession="UO:0000031"')
    assert in_minutes.count("UO:0000031") == 5
    for minute in range(5):
        in_minutes = in_minutes.replace(f'value="{60 * minute}', f'value="{minute}', 1)
    (tmp_path / "minutes.mzML").write_text(in_minutes)
    experiment = pyopenms.MSExperiment()
    pyopenms.MzMLFile().load(str(run), experiment)
    pyopenms.MzXMLFile().store(str(tmp_path / "run.mzXML"), experiment)
    (tmp_path / "run.mzML.gz").write_bytes(gzip.compress(run.read_bytes()))
    (tmp_path / "run.mzXML.bz2").write_bytes(bz2.compress((tmp_path / "run.mzXML").read_bytes()))
    expected = convert.read_run(run, lambda *scan: None)
    assert expected["rt_last"] == 4.0
    for name in ("minutes.mzML", "run.mzXML", "run.mzML.gz", "run.mzXML.bz2"):
        statistics = convert.read_run(tmp_path / name, lambda *scan: None)
        assert statistics == pytest.approx(expected, rel=1e-5), name


def test_ms2_is_left_out_and_time_order_and_empty_scans_do_not_matter(tmp_path):
    scans = list(random_scans(2, 6))
    convert.write_mzml(tmp_path / "plain.mzML", scans)
    mixed = pyopenms.MSExperiment()
    for level, (seconds, mz, intensity) in [(1, s) for s in scans[::-1]] + [(2, s) for s in scans] + [(1, (5, [], []))]:
        spectrum = pyopenms.MSSpectrum()
        spectrum.setMSLevel(level)
        spectrum.setRT(float(seconds))
        spectrum.set_peaks((np.array(mz, float), np.array(intensity, np.float32)))
        mixed.addSpectrum(spectrum)
    pyopenms.MzMLFile().store(str(tmp_path / "mixed.mzML"), mixed)
    pyopenms.MzXMLFile().store(str(tmp_path / "mixed.mzXML"), mixed)
    plain, _ = convert.histogram_of_run(tmp_path / "plain.mzML", Recipe(0, 1, 100, 300))
    for name in ("mixed.mzML", "mixed.mzXML"):
        counts, statistics = convert.histogram_of_run(tmp_path / name, Recipe(0, 1, 100, 300))
        assert statistics["n_peaks"] == 6 * 200
        assert counts.sum() == pytest.approx(plain.sum(), rel=1e-6)


def test_peak_at_437_min_and_mz_462175_lights_the_pixel_at_that_place(tmp_path):
    recipe = Recipe(0, 10, 100, 900, bins=(200, 320))
    convert.write_mzml(tmp_path / "m3g.mzML", [(4.37 * 60, np.array([462.175]), np.array([1e6]))])
    picture, _ = convert.picture_of_run(tmp_path / "m3g.mzML", recipe)
    assert picture.shape == (320, 200, 3)
    lit = (picture != recipe.zero_colour()).any(axis=2)
    y, x = np.argwhere(lit).mean(axis=0)
    rt, mz = recipe.from_fraction((x + 0.5) / 200, (y + 0.5) / 320)
    assert rt == pytest.approx(4.37, abs=0.05) and mz == pytest.approx(462.175, abs=2.5)
    assert recipe.to_fraction(rt, mz) == pytest.approx(((x + 0.5) / 200, (y + 0.5) / 320))
    assert list(recipe.zero_colour()) == [0, 0, 127]  # the dark blue end of jet
    assert not lit[0].any() and not lit[:, 0].any()


def test_normalisation_filter_and_colormap():
    counts = np.zeros((4, 4))
    counts[1, 1], counts[2, 2] = 10, 1000  # two times, the second a hundredfold
    plain = {"bins": (4, 4), "sigma": 0.0, "colormap": "gray"}
    rt = convert.picture_of_counts(counts, Recipe(0, 1, 0, 1, normalize="rt", **plain))[..., 0]
    both = convert.picture_of_counts(counts, Recipe(0, 1, 0, 1, normalize="global", **plain))[..., 0]
    assert rt[2, 1] == rt[1, 2] == 255 and (rt > 0).sum() == 2  # m/z points up: bin 1 of 4 is row 2 from the top
    assert both[1, 2] == 255 and both[2, 1] == pytest.approx(255 * np.log1p(2.55) / np.log(256), abs=1)
    smooth = convert.picture_of_counts(counts, Recipe(0, 1, 0, 1, sigma=1.0, bins=(4, 4), colormap="gray"))
    assert (smooth[..., 0] > 0).all()


def test_min_intensity_drops_weaker_peaks(tmp_path):
    convert.write_mzml(tmp_path / "run.mzML", [(60.0, np.array([150.0, 250.0]), np.array([99.0, 100.0]))])
    counts, statistics = convert.histogram_of_run(
        tmp_path / "run.mzML", Recipe(0, 2, 100, 300, (1, 2), min_intensity=100)
    )
    assert counts.tolist() == [[0, 100]] and statistics["n_peaks"] == 1
    with pytest.raises(Problem, match="no MS1 peaks of intensity 101"):
        convert.read_run(tmp_path / "run.mzML", lambda *scan: None, 101)


@pytest.mark.parametrize(("rt", "mz"), [(3, 0), (-3, 0), (0, 4), (0, -4), (2, 3), (-2, -3)])
def test_shifted_copy_moves_right_and_up_and_never_wraps(rt, mz):
    picture = np.arange(10 * 12 * 3, dtype=np.uint8).reshape(10, 12, 3)
    copy = convert.shifted(picture, rt, mz, (255, 255, 254))
    for y in range(10):
        for x in range(12):
            inside = 0 <= y + mz < 10 and 0 <= x - rt < 12
            assert copy[y, x].tolist() == (picture[y + mz, x - rt].tolist() if inside else [255, 255, 254])


def test_shifts_are_reproducible_and_differ_between_pictures_and_within_one():
    first, again, other = (convert.draw_shifts(name, 9, 5, 2643) for name in ("run1", "run1", "run2"))
    assert first == again != other and len(set(first)) == 9 and (0, 0) not in first
    every = convert.draw_shifts("run1", 8, 1, 0)
    assert Counter(every) == Counter((a, b) for a in (-1, 0, 1) for b in (-1, 0, 1) if (a, b) != (0, 0))


# ---------------------------------------------------------------- the table and the split


def test_218_and_80_runs_split_214_54_30_stratified():
    rows = [{"phenotype": "user"} for _ in range(218)] + [{"phenotype": "non-user"} for _ in range(80)]
    convert.assign_splits(rows, 0.1, 0.2, 2643)
    counts = Counter((row["split"], row["phenotype"]) for row in rows)
    assert {s: counts[s, "user"] + counts[s, "non-user"] for s in convert.SPLITS} == {
        "train": 214,
        "val": 54,
        "test": 30,
    }
    assert (counts["test", "user"], counts["val", "user"]) == (22, 39)
    again = [{"phenotype": row["phenotype"]} for row in rows]
    convert.assign_splits(again, 0.1, 0.2, 2643)
    assert again == [{"phenotype": row["phenotype"], "split": row["split"]} for row in rows]


def test_another_seed_gives_another_split_and_the_same_seed_the_same(tmp_path):
    raw, samples = tmp_path / "raw", tmp_path / "samples.csv"
    raw.mkdir()
    convert.write_csv(samples, [("sample_name", "phenotype"), *((f"r{i:02d}", "ab"[i % 2]) for i in range(40))])
    for i in range(40):
        (raw / f"r{i:02d}.mzML").touch()

    def split(*flags):
        _, present, _ = convert.read_cohort(convert.parse_arguments([str(raw), str(samples), "out", *flags]))
        return {row["sample_name"]: row["split"] for row in present}

    assert split("--seed", "1") == split("--seed", "1") != split("--seed", "2")
    assert split() == split("--seed", "2643")
    assert Counter(split("--seed", "1").values()) == Counter(split("--seed", "2").values())


def test_rows_of_one_group_land_in_one_split():
    rows = [{"sample_name": i, "phenotype": "ab"[i % 2], "subject": f"s{i // 3}"} for i in range(90)]
    convert.assign_splits(rows, 0.1, 0.2, 1, "subject")
    convert.check_splits(rows, "subject")
    homes = {(row["subject"], row["split"]) for row in rows}
    assert len(homes) == 30 and {split for _, split in homes} == set(convert.SPLITS)


@pytest.mark.parametrize(("encoding", "separator", "end"), [("utf-8-sig", ";", "\r\n"), ("utf-8", "\t", "\n")])
def test_tables_from_spreadsheets_read_the_same(tmp_path, encoding, separator, end):
    lines = (["sample_name", "phenotype"], ["Müller 1", "a"], ["-x", "b"])
    (tmp_path / "s.csv").write_bytes((end.join(separator.join(line) for line in lines) + end).encode(encoding))
    assert [tuple(row.values()) for row in convert.read_samples(tmp_path / "s.csv")] == [("Müller 1", "a"), ("-x", "b")]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("sample_name,phenotype\na,x\na,y\n", "1 sample names appear more than once: a"),
        ("sample_name,phenotype\na,User\nb,user\nc,no\n", "phenotype spelled ['User', 'user']"),
        ("sample_name,phenotype\na,x \nb,y\n", "phenotype spelled ['x ']"),
        ("sample_name,phenotype\na,x\nb,x\n", "one phenotype only"),
        ("sample_name,phenotype\na,x\n../b,y\n", "row 3: sample_name '../b' cannot name"),
        ("sample_name,phenotype\na,x\nb\n", "row 3: phenotype '' cannot name"),
        ("sample,phenotype\na,x\n", "needs a column 'sample_name' (found: sample, phenotype)"),
        ("", "found: no rows"),
        ("sample_name,phenotype\n\xe9,x\n".encode("latin-1"), "is not UTF-8 text"),
    ],
)
def test_bad_tables_end_in_a_clear_line(tmp_path, table, message):
    (tmp_path / "s.csv").write_bytes(table if isinstance(table, bytes) else table.encode())
    with pytest.raises(Problem) as caught:
        convert.read_samples(tmp_path / "s.csv")
    assert message in str(caught.value) and "s.csv" in str(caught.value) and caught.value.status == 2


def test_given_split_is_checked():
    rows = [{"sample_name": f"{s}{p}", "phenotype": p, "split": s, "subject": p} for s in convert.SPLITS for p in "ab"]
    convert.check_splits(rows, None)
    for change, group_by, message in (
        ({}, "subject", "2 groups of column 'subject' lie in more than one split: a, b"),
        ({"split": "Train"}, None, "is 'Train'; use train, val or test"),
        ({"split": "val"}, None, "the train split has no run of a"),
    ):
        with pytest.raises(Problem, match=message):
            convert.check_splits([rows[0] | change, *rows[1:]], group_by)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("r s", "needs RAW_DIR, SAMPLES.csv and OUT_DIR"),
        ("r s o --bins 1 2 3", "--bins takes one or two numbers"),
        ("r s o --bins 0", "--bins: 0 must be a whole number of at least 1"),
        ("r s o --rt-range 5 5", "--rt-range 5 5: MIN must lie below MAX"),
        ("r s o --mz-range nan 5", "--mz-range nan 5"),
        ("r s o --test 1.5", "--test 1.5 must lie between 0 and 1"),
        ("r s o --sigma -1", "--sigma: -1 must be a number of at least 0"),
        ("r s o --augment 9 --max-shift 1", "allows only 8 different shifts"),
        ("r s o --bins 4 --augment 1", "--max-shift 5 must be smaller than --bins"),
        ("r s o --colormap jett", "'jett' is not a matplotlib colormap"),
        ("r s o --demo", "--demo takes one folder"),
        ("r s o --bogus", "unrecognized arguments: --bogus (see --help)"),
    ],
)
def test_wrong_usage_names_the_flag(flags, message):
    with pytest.raises(Problem) as caught:
        convert.parse_arguments(flags.split())
    assert message in str(caught.value) and caught.value.status == 2


def test_demo_has_its_own_defaults_and_flags_still_win():
    args = convert.parse_arguments(["--demo", "d", "--test", "0.1"])
    assert (args.bins, args.test, args.mz_range, args.out_dir) == ([256, 256], 0.1, [100.0, 900.0], "d")
    args = convert.parse_arguments(["r", "s", "o", "--bins", "20", "30"])
    assert (args.bins, args.test, args.mz_range) == ([20, 30], 0.1, None)


# ---------------------------------------------------------------- whole cohorts


def test_runs_outside_the_axes_and_phenotypes_without_files_are_no_data_set(tmp_path):
    raw, samples = write_cohort(tmp_path, list("abcdefghij"))
    done = run_convert(raw, samples, tmp_path / "out", "--test", 0.2, "--rt-range", 60, 120, *FAST[3:])
    assert done.returncode == 1 and not list(tmp_path.glob("out/*/*/*.png"))
    assert "a.mzML: no peak inside the axes (60.00-120.00 min, m/z 100.00-300.00; its own: 0." in done.stderr
    for path in list(raw.iterdir()):
        if path.stem in "bdfhj":
            path.rename(path.with_name(f"case_{path.name}"))
    done = run_convert(raw, samples, tmp_path / "half", *FAST)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "5 of 10 samples" in done.stderr and "not two phenotypes among them: do the names match?" in done.stderr


def test_no_bad_file_costs_the_others_and_a_repaired_one_is_picked_up(tmp_path):
    good = ['Müller, "A" 1', "-dash", "it's", "d e", "f", "g", "h", "i", "j", "k"]
    raw, samples = write_cohort(tmp_path, [*good, "half", "empty", "folder", "absent"])
    whole = (raw / "half.mzML").read_bytes()
    (raw / "half.mzML").write_bytes(whole[: len(whole) // 2])
    (raw / "empty.mzML").write_bytes(b"")
    (raw / "folder.mzML").unlink()
    (raw / "folder.mzML").mkdir()
    (raw / "absent.mzML").rename(raw / "other.mzML")
    narrow = ["--rt-range", 0, 1, *FAST[3:], "--workers", 2]
    done = run_convert(raw, samples, tmp_path / "out", *narrow)
    assert done.returncode == 1
    reasons = [
        "left out: empty.mzML: is empty (zero bytes)",
        "left out: folder.mzML: Is a directory",
        "left out: half.mzML: parse error in line",
    ]
    lines = done.stderr.splitlines()  # nothing else, and nothing that pyopenms prints of its own accord
    assert len(lines) == 3 and all(line.startswith(r) for line, r in zip(sorted(lines), reasons, strict=True)), lines
    assert "1 files in" in done.stdout and ": other\n" in done.stdout
    assert "1 samples of" in done.stdout and ": absent\n" in done.stdout
    assert "warning: more than 1 % of the intensity (at most " in done.stdout
    status = status_of(tmp_path / "out")
    assert status["half"].startswith("failed: half.mzML: parse error") and status["absent"] == "no file"
    assert [name for name, text in status.items() if text == "ok"] == good
    pictures = {path.stem: path for path in (tmp_path / "out").glob("*/*/*.png")}
    assert pictures.keys() == set(good) and not list((tmp_path / "out").rglob("*tmp*"))
    with Image.open(pictures['Müller, "A" 1']) as image:
        assert image.text["sample_name"] == 'Müller, "A" 1' and image.text["source"] == 'Müller, "A" 1.mzML'
        assert image.size == (32, 32) and Recipe.from_text(image.text) == Recipe(0, 1, 100, 300, (32, 32))
        assert image.text["shift"] == "0 0" and image.text["n_scans"] == "40" and image.text["rt_last"] == "1.95"

    (raw / "half.mzML").write_bytes(whole)
    again = run_convert(raw, samples, tmp_path / "out", *narrow)
    assert "10 of 13 runs are already converted" in again.stdout and again.returncode == 1
    status = status_of(tmp_path / "out")
    assert status["half"] == "ok" and status["empty"] == "failed: empty.mzML: is empty (zero bytes)"


def test_odd_files_end_in_a_picture_or_a_reason(tmp_path, odd_files):
    reasons = {
        "zero_bytes.mzML": "is empty (zero bytes)",
        "no_spectra.mzML": "parse error in line 73",
        "chromatograms_only.mzML": "holds no MS1 peaks",
        "empty_spectra.mzML": "holds no MS1 peaks",
        "ms2_only_profile.mzML": "holds no MS1 peaks",
    }
    for path in odd_files.iterdir():
        try:
            picture, statistics = convert.picture_of_run(path, Recipe(0, 80, 0, 1000, (50, 50)))
            assert path.name not in reasons and picture.any() and statistics["n_peaks"] > 0
        except Problem as problem:
            assert str(problem).startswith(f"{path.name}: {reasons[path.name]}")
    assert {"lcms.mzML.gz", "small.mzML.bz2", "small.mzXML", "invalid.mzML"} < {
        path.name for path in odd_files.iterdir()
    }


def test_file_without_read_permission(tmp_path):
    convert.write_mzml(tmp_path / "run.mzML", random_scans(0, 2))
    (tmp_path / "run.mzML").chmod(0)
    me = os.geteuid()
    try:
        if me == 0:
            os.seteuid(65534)  # root may read everything, nobody may not
        with pytest.raises(Problem, match="run.mzML: Permission denied"):
            convert.read_run(tmp_path / "run.mzML", lambda *scan: None)
    finally:
        os.seteuid(me)


def test_shared_axes_hold_every_run_and_workers_do_not_change_a_byte(tmp_path):
    raw, samples = write_cohort(tmp_path, [f"r{i}" for i in range(10)])
    convert.write_mzml(
        raw / "r0.mzML", [(30.0, np.array([50.0, 700.0]), np.ones(2)), (600.0, np.array([60.0]), np.ones(1))]
    )
    flags = ["--bins", 20, 30, "--augment", 2, "--max-shift", 3, "--test", 0.2]
    one = run_convert(raw, samples, tmp_path / "one", *flags, "--workers", 1)
    assert one.returncode == 0, one.stderr
    run_convert(raw, samples, tmp_path / "two", *flags, "--workers", 2)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    pictures = list((tmp_path / "one").glob("*/*/*.png"))
    n_train = sum(row["split"] == "train" for row in convert.read_table(tmp_path / "one" / "samples.csv"))
    assert len(pictures) == 10 + 2 * n_train
    for path in pictures:
        with Image.open(path) as image:
            assert Recipe.from_text(image.text) == Recipe(0.0, 10.0, 50.0, 700.0, (20, 30)) and image.size == (20, 30)
            rt, mz = map(int, image.text["shift"].split())
            assert path.stem == image.text["sample_name"] + (f"_rt{rt:+d}_mz{mz:+d}" if (rt, mz) != (0, 0) else "")


def abort_on_bad(name):
    if name == "bad":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "wrong":
        raise ZeroDivisionError("no luck")
    return name.upper()


def test_a_reader_that_crashes_costs_one_run():
    names = ["a", "b", "bad", "c", "wrong", "d"]
    results = dict(convert.for_each(abort_on_bad, {name: (name,) for name in names}, 2, "crashing"))
    assert "bad: the reader crashed (exit code -9)" in str(results.pop("bad"))
    assert str(results.pop("wrong")) == "wrong: ZeroDivisionError: no luck"
    assert results == {name: name.upper() for name in "abcd"}


def processes_of(marker):
    """Process ids whose command or environment mentions the marker."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                if marker in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                continue
    return found


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for orphans in /proc")
def test_killed_and_resumed_equals_uninterrupted_and_leaves_no_orphans(tmp_path):
    raw, samples = write_cohort(tmp_path, [f"r{i:02d}" for i in range(24)])
    flags = [*FAST, "--augment", 2, "--workers", 2]
    command = [sys.executable, "convert.py", raw, samples, tmp_path / "killed", *flags]
    marker = f"DEEPLCMS_TEST={tmp_path}"
    process = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, env=os.environ | dict([marker.split("=")]), stdout=subprocess.DEVNULL
    )
    while not list((tmp_path / "killed").glob("*/*/r??.png")) and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while processes_of(marker.encode()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not processes_of(marker.encode())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("*/*/r??.png")}
    assert 0 < len(before) < 24
    (tmp_path / "killed" / "train" / "case" / ".r99.png.1.tmp.png").write_bytes(b"half a picture")

    resumed = run_convert(*command[2:])
    assert f"{len(before)} of 24 runs are already converted" in resumed.stdout and resumed.returncode == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert run_convert(raw, samples, tmp_path / "whole", *flags).returncode == 0
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")

    def refusal(*arguments):
        with pytest.raises(Problem) as caught:
            convert.convert(convert.parse_arguments([str(a) for a in arguments]))
        assert caught.value.status == 2
        return str(caught.value)

    assert "was converted with --sigma 2.0, not 1.0" in refusal(*command[2:], "--sigma", 1)
    no_axes = [raw, samples, tmp_path / "whole", "--bins", 32, "--augment", 2]
    assert "was converted with --rt-range 0.0 2.0, not unset" in refusal(*no_axes)
    with open(samples, "a") as file:
        file.write("r99,case\n")
    shutil.copy(raw / "r00.mzML", raw / "r99.mzML")
    assert "was converted from other samples or splits (r99)" in refusal(*command[2:])


def test_progress_bar_shows_files_done_failed_and_time_left(tmp_path):
    raw, samples = write_cohort(tmp_path, [f"r{i}" for i in range(8)])
    (raw / "r0.mzML").write_bytes(b"")
    screen, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    command = [sys.executable, "convert.py", raw, samples, tmp_path / "out", *FAST, "--test", 0.2, "--workers", 1]
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stderr=terminal, stdout=subprocess.DEVNULL)
    os.close(terminal)
    shown = b""
    with suppress(OSError):  # the terminal closes when the process ends
        while part := os.read(screen, 4096):
            shown += part
    assert process.wait() == 1
    assert b"8/8" in shown and b"failed=1" in shown and b"<00:0" in shown


def test_conversion_never_loads_torch(tmp_path):
    convert.write_mzml(tmp_path / "run.mzML", random_scans(0, 2))
    code = (
        f"import sys, convert; convert.picture_of_run({str(tmp_path / 'run.mzML')!r}, convert.Recipe(0, 1, 100, 300)); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_planted_compounds_differ_between_phenotypes_and_background_does_not():
    compounds = convert.demo_compounds(np.random.default_rng([7, 0]))
    heat = np.zeros((2, len(compounds["rt"])))
    for i in range(16):
        for seconds, mz, intensity in convert.simulate_run(
            np.random.default_rng([7, 1, i]), compounds, [], bool(i % 2)
        ):
            for k in np.flatnonzero(abs(compounds["rt"] * 60 - seconds) < 6):
                low, high = np.searchsorted(mz, compounds["mz"][k] * (1 + np.array([-2e-5, 2e-5])))
                heat[i % 2, k] += intensity[low:high].sum()
    ratio = heat[1] / np.maximum(heat[0], 1)
    assert np.median(ratio[compounds["planted"]]) > 20
    assert 0.5 < np.median(ratio[~compounds["planted"]]) < 2


def test_demo_files(tmp_path):
    convert.write_demo(tmp_path, 8, 5, 2)
    rows = convert.read_table(tmp_path / "raw" / "samples.csv")
    assert Counter(row["phenotype"] for row in rows) == {"control": 4, "exposed": 4}
    assert len(convert.find_runs(tmp_path / "raw")) == 8
    with open(tmp_path / "features.csv", newline="") as file:
        lines = list(csv.reader(file))
    table = [dict(zip(lines[4], line, strict=True)) for line in lines[5:]]
    assert Counter(row["Ontology"] for row in table) == {"planted": 30, "background": 210}
    assert table[0]["Metabolite name"].split()[0] in ("planted", "background")
