"""Tests of deeplcms.py and convert.py: exact pictures of raw files, bad files, and killed conversions."""

import bz2
import gzip
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from itertools import product
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pyopenms
import pytest
from conftest import PEAK, ROOT, folder_beside, call, random_scans, run
from demo import demo_cohort, demo_compounds, simulate_scans, write_mzml
from demo import write_cohort as write_demo
from PIL import Image, PngImagePlugin
from scipy.io import netcdf_file

import convert
import deeplcms
from deeplcms import InputError, Recipe, compute_chromatogram, compute_metrics, measure_rt_shift

FAST = ["--rt-range", 0, 2, "--mz-range", 100, 300, "--bins", 32]  # with given axes each file is read once


def write_cohort(folder, names):
    """Write folder/raw/*.mzML and folder/samples.csv; every second sample is a case."""
    (folder / "raw").mkdir(parents=True)
    for seed, name in enumerate(names):
        write_mzml(folder / "raw" / f"{name}.mzML", random_scans(seed))
    table = pd.DataFrame({"sample_name": names, "phenotype": [("control", "case")[i % 2] for i in range(len(names))]})
    table.to_csv(folder / "samples.csv", index=False)
    return folder / "raw", folder / "samples.csv"


def list_files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_histogram_equals_numpy(path, recipe):
    """Compare with numpy.histogram2d of all MS1 peaks, which pyopenms loads."""
    experiment = pyopenms.MSExperiment()
    pyopenms.FileHandler().loadExperiment(str(path), experiment)
    scans = [s for s in experiment if s.getMSLevel() == 1 and s.size()]
    rt = np.concatenate([np.full(s.size(), s.getRT() / 60) for s in scans])
    mz, intensity = (np.concatenate([s.get_peaks()[k] for s in scans]) for k in (0, 1))
    limits = [(recipe.rt_min, recipe.rt_max), (recipe.mz_min, recipe.mz_max)]
    expected = np.histogram2d(rt, mz, recipe.bins, limits, weights=intensity.astype(np.float64))[0]
    counts, statistics = deeplcms.make_histogram(path, recipe)
    np.testing.assert_allclose(counts, expected, rtol=1e-6)
    total = intensity.sum(dtype=np.float64)
    assert statistics["total_intensity"] == pytest.approx(total, rel=1e-9) and statistics["n_peaks"] == len(mz)
    assert statistics["outside"] == pytest.approx(1 - expected.sum() / total, abs=1e-9)
    extent = [statistics[side] for side in ("rt_first", "rt_last", "mz_low", "mz_high")]
    assert extent == pytest.approx([rt.min(), rt.max(), mz.min(), mz.max()])
    return counts


# ---------------------------------------------------------------- one raw file


def test_the_histogram_equals_numpys_for_edge_outside_and_unsorted_peaks(tmp_path):
    edges = np.linspace(100, 300, 33)
    scans = random_scans(0) + [(0.0, edges, np.ones(33)), (120.0, edges[::-1], np.full(33, 2.0))]
    scans += [(60.0, np.array([99.0, 300.0, 301.0]), np.array([5.0, 7.0, 5.0])), (121.0, edges, np.ones(33))]
    write_mzml(tmp_path / "run.mzML", scans)
    counts = assert_histogram_equals_numpy(tmp_path / "run.mzML", Recipe(0, 2, 100, 300, bins=(24, 32)))
    assert counts[-1, -1] >= 4  # both corner peaks: the last bins include their right edges
    assert_histogram_equals_numpy(tmp_path / "run.mzML", Recipe(0.5, 1.5, 150.5, 250.25, bins=(7, 11)))


@pytest.mark.parametrize("n", [1, 500])
def test_the_binned_sums_of_one_scan_equal_numpys_histogram(n, tmp_path):
    rng, edges = np.random.default_rng(n), np.linspace(100, 300, 33)
    mz = np.sort(np.append(rng.uniform(90, 310, n), edges[: n // 10]))
    intensity = rng.integers(1, 1000, len(mz)).astype(np.float32)
    write_mzml(tmp_path / "run.mzML", [(0.0, mz[:0], intensity[:0]), (60.0, mz, intensity)])
    counts, statistics = deeplcms.make_histogram(tmp_path / "run.mzML", Recipe(0, 2, 100, 300, bins=(2, 32)))
    assert (counts == [np.zeros(32), np.histogram(mz, edges, weights=intensity)[0]]).all()
    assert statistics["n_scans"] == 2 and statistics["n_peaks"] == len(mz)


def test_the_histogram_equals_numpys_for_real_files(real_files, odd_files):
    for path in (real_files / "ko15.mzML", odd_files / "lcms.mzML.gz"):
        statistics = convert.read_statistics(path, 0)
        axes = [statistics[side] for side in ("rt_first", "rt_last", "mz_low", "mz_high")]
        assert_histogram_equals_numpy(path, Recipe(*axes))


def test_all_formats_and_time_units_give_the_same_statistics(tmp_path):
    path = tmp_path / "run.mzML"
    write_mzml(path, [(60.0 * i, *scan) for i, (_, *scan) in enumerate(random_scans(1, 5))])
    in_minutes = path.read_text().replace('unitAccession="UO:0000010" unitName="second"', 'unitAccession="UO:0000031"')
    assert in_minutes.count("UO:0000031") == 5
    for minute in range(5):
        in_minutes = in_minutes.replace(f'value="{60 * minute}', f'value="{minute}', 1)
    (tmp_path / "minutes.mzML").write_text(in_minutes)
    experiment = pyopenms.MSExperiment()
    pyopenms.MzMLFile().load(str(path), experiment)
    pyopenms.MzXMLFile().store(str(tmp_path / "run.mzXML"), experiment)
    (tmp_path / "run.mzML.gz").write_bytes(gzip.compress(path.read_bytes()))
    (tmp_path / "run.mzXML.bz2").write_bytes(bz2.compress((tmp_path / "run.mzXML").read_bytes()))
    expected = convert.read_statistics(path, 0)
    assert expected.pop("polarity") == "" and expected["rt_last"] == 4.0
    for name in ("minutes.mzML", "run.mzXML", "run.mzML.gz", "run.mzXML.bz2"):
        statistics = convert.read_statistics(tmp_path / name, 0)
        assert statistics.pop("polarity") == "" and statistics == pytest.approx(expected, rel=1e-5), name


def write_cdf(path, scans, attributes=(), types=("d", "f"), scale=1):
    """Write an ANDI-MS file of scans (seconds, m/z, intensity). Stored intensities are divided by scale_factor."""
    counts = [len(mz) for _, mz, _ in scans]
    with netcdf_file(path, "w") as file:
        for name, value in dict(attributes).items():
            setattr(file, name, value)
        file.createDimension("point_number", None)  # the record dimension, as in many exports
        file.createDimension("scan_number", len(scans))

        def add(name, values, kind, dimension):
            variable = file.createVariable(name, kind, (dimension,))
            variable[:] = np.asarray(values)
            return variable

        add("scan_acquisition_time", [seconds for seconds, _, _ in scans], "d", "scan_number")
        add("scan_index", np.cumsum([0, *counts[:-1]]), "i", "scan_number")
        add("point_count", counts, "i", "scan_number")
        add("mass_values", np.concatenate([mz for _, mz, _ in scans]), types[0], "point_number")
        intensity = np.concatenate([intensity for _, _, intensity in scans]).astype(np.float32)
        add("intensity_values", intensity / scale, types[1], "point_number").scale_factor = float(scale)
    return path


def test_a_cdf_file_and_an_mzml_file_of_one_sample_give_the_same_picture(tmp_path):
    scans = [(7.5 * i, mz, np.round(intensity)) for i, (_, mz, intensity) in enumerate(random_scans(4, 12))]
    scans[5] = (37.5, scans[5][1][:0], scans[5][2][:0])  # an empty scan
    write_mzml(tmp_path / "run.mzML", scans)
    write_cdf(tmp_path / "run.CDF", scans)
    write_cdf(tmp_path / "scaled.cdf", scans, scale=4, types="df")
    write_cdf(tmp_path / "unsorted.Cdf", [(seconds, mz[::-1], intensity[::-1]) for seconds, mz, intensity in scans])
    packed = (tmp_path / "run.CDF").read_bytes()
    (tmp_path / "run.CDF.gz").write_bytes(gzip.compress(packed))
    (tmp_path / "run.cdf.BZ2").write_bytes(bz2.compress(packed))
    recipe = Recipe(0, 1.25, 100, 300, (24, 32))
    expected, statistics = deeplcms.make_picture(tmp_path / "run.mzML", recipe)
    for name in ("run.CDF", "scaled.cdf", "unsorted.Cdf", "run.CDF.gz", "run.cdf.BZ2"):
        picture, found = deeplcms.make_picture(tmp_path / name, recipe)
        assert (picture == expected).all() and found == statistics, name


def test_polarity_and_start_time_are_read_from_a_cdf_file(tmp_path):
    stated = {"test_ionization_polarity": "Negative Polarity", "experiment_date_time_stamp": "20140226103900+0100"}
    (tmp_path / "raw").mkdir()
    rows = ["sample_name,phenotype,split"]
    for i, split in enumerate(["train", "val", "test"] * 2):
        attributes = stated if i else {"experiment_date_time_stamp": "unknown"}
        write_cdf(tmp_path / f"raw/r{i}.CDF", random_scans(i, 5), attributes)
        rows.append(f"r{i}.CDF,{'AB'[i // 3]},{split}")
    (tmp_path / "samples.csv").write_text("\n".join(rows))
    assert run("convert.py", "raw", "samples.csv", "data", "--bins", 20, cwd=tmp_path) == (0, "")
    table = deeplcms.read_table(tmp_path / "data/samples.csv")
    assert table["sample_name"].tolist() == [f"r{i}" for i in range(6)]
    assert table["start_time"].tolist() == ["", *["2014-02-26 10:39:00"] * 5]
    assert table["polarity"].tolist() == ["", *["-"] * 5] and set(table["scan_kinds"]) == {"1"}
    path = tmp_path / "raw/r1.CDF"
    assert statistics_of(path, only_polarity="negative") == statistics_of(path)
    with pytest.raises(InputError, match="^r1.CDF: no MS1 peaks .*polarity positive"):
        statistics_of(path, only_polarity="positive")


def test_a_damaged_or_foreign_cdf_file_gives_an_error_of_one_line(tmp_path):
    scans = random_scans(0, 5)
    whole = write_cdf(tmp_path / "run.cdf", scans).read_bytes()
    damaged = {"half": whole[: len(whole) // 2], "short": whole[:-8], "hdf5": b"\x89HDF\r\n\x1a\n" + bytes(500)}
    damaged |= {"text": b"no netCDF at all", "renamed": whole.replace(b"mass_values", b"mess_values")}
    damaged["beyond"] = whole.replace(np.full(5, 200, ">i4").tobytes(), np.full(5, 201, ">i4").tobytes())
    damaged["negative"] = whole.replace(np.full(5, 200, ">i4").tobytes(), np.full(5, -200, ">i4").tobytes())
    for name, contents in damaged.items():
        assert contents != whole
        for pack, ending in ((bytes, ""), (gzip.compress, ".gz")):
            path = tmp_path / f"{name}.cdf{ending}"
            path.write_bytes(pack(contents))
            with pytest.raises(InputError, match=rf"^{path.name}: cannot be read as ANDI-MS \(netCDF 3\); ") as refusal:
                statistics_of(path)
            assert "\n" not in str(refusal.value)
    (tmp_path / "cut.cdf.gz").write_bytes(gzip.compress(whole)[:-100])
    with pytest.raises(InputError, match="^cut.cdf.gz: cannot be read as ANDI-MS .*; damaged, cut off"):
        statistics_of(tmp_path / "cut.cdf.gz")
    (tmp_path / "zero.cdf").write_bytes(b"")
    with pytest.raises(InputError, match=r"^zero.cdf: is empty \(zero bytes\)$"):
        statistics_of(tmp_path / "zero.cdf")


def test_a_real_cdf_file_becomes_a_picture(real_files):
    path = next(folder_beside(real_files, "wines").glob("*_03_vrb_alpha_seq_no6.CDF"))
    picture, statistics = deeplcms.make_picture(path, Recipe(5, 36, 35, 350, (100, 100)))
    assert (statistics["n_scans"], statistics["n_peaks"], statistics["polarity"]) == (8248, 145304, "+")
    assert statistics["start_time"] == "2014-02-26 10:39:00" and statistics["outside"] < 1e-5
    assert picture.shape == (100, 100) and picture.any()


def test_ms2_scans_empty_scans_and_the_order_of_scans_do_not_affect_the_histogram(tmp_path):
    scans = random_scans(2, 6)
    write_mzml(tmp_path / "plain.mzML", scans)
    mixed = pyopenms.MSExperiment()
    for level, (seconds, mz, intensity) in [(1, s) for s in scans[::-1]] + [(2, s) for s in scans] + [(1, (5, [], []))]:
        spectrum = pyopenms.MSSpectrum()
        spectrum.setMSLevel(level)
        spectrum.setRT(float(seconds))
        spectrum.set_peaks((np.array(mz, float), np.array(intensity, np.float32)))
        mixed.addSpectrum(spectrum)
    pyopenms.MzMLFile().store(str(tmp_path / "mixed.mzML"), mixed)
    pyopenms.MzXMLFile().store(str(tmp_path / "mixed.mzXML"), mixed)
    plain, _ = deeplcms.make_histogram(tmp_path / "plain.mzML", Recipe(0, 1, 100, 300))
    for name in ("mixed.mzML", "mixed.mzXML"):
        counts, statistics = deeplcms.make_histogram(tmp_path / name, Recipe(0, 1, 100, 300))
        assert statistics["n_peaks"] == 6 * 200
        assert counts.sum() == pytest.approx(plain.sum(), rel=1e-6)


def test_the_start_time_in_an_mzml_file_is_written_to_the_sample_table(tmp_path):
    (tmp_path / "raw").mkdir()
    rows = ["sample_name,phenotype,split,start_time"]
    for i, split in enumerate(["train", "val", "test"] * 2):
        path = tmp_path / f"raw/r{i}.mzML"
        write_mzml(path, random_scans(i))
        if i != 4:
            text = path.read_text().replace("<run ", f'<run startTimeStamp="2026-11-03T10:{i:02d}:00" ')
            path.write_text(text)
        rows.append(f"r{i},{'AB'[i // 3]},{split},never")
    (tmp_path / "samples.csv").write_text("\n".join(rows))
    command = "convert.py", "raw", "samples.csv", "data", "--bins", 20
    for _ in range(2):  # the second call reads the pictures
        assert run(*command, cwd=tmp_path) == (0, "")
        times = deeplcms.read_table(tmp_path / "data/samples.csv")["start_time"].tolist()
        assert times == [f"2026-11-03 10:{i:02d}:00" if i != 4 else "" for i in range(6)]


def test_a_peak_at_4_37_min_and_mz_462_175_lights_the_pixel_at_that_place(tmp_path):
    recipe = Recipe(0, 10, 100, 900, bins=(200, 320))
    write_mzml(tmp_path / "m3g.mzML", [(PEAK[0] * 60, np.array([PEAK[1]]), np.array([1e6]))])
    picture, _ = deeplcms.make_picture(tmp_path / "m3g.mzML", recipe)
    assert picture.shape == (320, 200)
    lit = picture > 0
    y, x = np.argwhere(lit).mean(axis=0)
    rt, mz = recipe.from_fraction((x + 0.5) / 200, (y + 0.5) / 320)
    assert rt == pytest.approx(PEAK[0], abs=0.05) and mz == pytest.approx(PEAK[1], abs=2.5)
    assert recipe.to_fraction(rt, mz) == pytest.approx(((x + 0.5) / 200, (y + 0.5) / 320))
    assert not lit[0].any() and not lit[:, 0].any()


def test_a_png_contains_the_levels_of_the_picture_and_displays_them_in_jet(tmp_path):
    write_mzml(tmp_path / "run.mzML", random_scans(3))
    recipe = Recipe(0, 2, 100, 300, bins=(24, 32), normalize="rt")
    convert.write_pictures(tmp_path / "run.mzML", [(tmp_path / "run.png", (0, 0))], recipe)
    picture, statistics = deeplcms.make_picture(tmp_path / "run.mzML", recipe)
    assert (deeplcms.read_picture(tmp_path / "run.png") == picture).all() and picture.max() == 255
    jet = matplotlib.colormaps["jet"](picture, bytes=True)[..., :3]
    with Image.open(tmp_path / "run.png") as image:
        assert (np.array(image.convert("RGB")) == jet).all() and (deeplcms.colours(picture, "jet") == jet).all()
    text, in_png = deeplcms.read_header(tmp_path / "run.png")
    assert in_png == recipe and text.items() >= {name: str(value) for name, value in statistics.items()}.items()
    assert np.array(text["chromatogram"].split(), float) == pytest.approx(compute_chromatogram(picture), abs=1e-4)


def test_normalize_rt_divides_by_the_maximum_of_each_time_and_global_by_that_of_the_file():
    counts = np.zeros((4, 4))
    counts[1, 1], counts[2, 2] = 10, 1000  # two times; the second bin is 100 times the first
    plain = Recipe(0, 1, 0, 1, bins=(4, 4), sigma=0.0, normalize="rt")
    rt = deeplcms.render_histogram(counts, plain)
    both = deeplcms.render_histogram(counts, replace(plain, normalize="global"))
    assert (
        rt[2, 1] == rt[1, 2] == 255 and (rt > 0).sum() == 2
    )  # the m/z axis points up: bin 1 of 4 is row 2 from the top
    assert both[1, 2] == 255 and both[2, 1] == pytest.approx(256 * np.log1p(2.55) / np.log(256), abs=1)
    assert (deeplcms.render_histogram(counts, replace(plain, sigma=1.0)) > 0).all()


def test_the_level_of_a_compound_does_not_depend_on_coeluting_compounds():
    counts = np.full((200, 200), 0.5)
    counts[40, 80] = 30
    plain = Recipe(0, 1, 0, 1, bins=(200, 200), sigma=0.0)
    before = deeplcms.render_histogram(counts, plain)
    assert np.array_equal(before, deeplcms.render_histogram(1024 * counts, plain))  # a larger amount of the same sample
    assert before[119, 40] == int(256 * np.log1p(30 / 0.5) / np.log(256))  # most bins are 0.5
    counts[40, 160] = 400  # a strong compound coelutes
    after = deeplcms.render_histogram(counts, plain)
    assert after[39, 40] == 255 and (after != before).sum() == 1
    by_time = replace(plain, normalize="rt")
    assert deeplcms.render_histogram(counts, by_time)[119, 40] < 160  # it was 255 before


@pytest.mark.parametrize(("bins", "sigma"), [(64, 0.0), (256, 2.0), (500, 2.0)])
def test_the_level_of_a_compound_does_not_depend_on_noise_threshold_or_scan_rate(bins, sigma, tmp_path):
    compounds, lines, batches = demo_cohort(1)
    recipe = Recipe(0, 10, 100, 900, bins=(bins, bins), sigma=sigma)

    def picture(**method):
        scans = simulate_scans(np.random.default_rng(1), compounds, lines, True, batches[0], **method)
        write_mzml(tmp_path / "run.mzML", scans)
        return deeplcms.make_picture(tmp_path / "run.mzML", recipe)[0].astype(int)

    before = picture()
    bright = before > np.quantile(before, 0.97)  # pixels of compounds
    for method in ({"noise": 400}, {"threshold": 5e3}, {"interval": 1.0}, {"gain": 10, "threshold": 1e4}):
        assert abs(np.median((picture(**method) - before)[bright])) <= 5, method  # 32 levels are a factor of two


def test_a_nearly_empty_file_becomes_a_picture_without_the_filter():
    counts = np.zeros((100, 100))
    counts[20, 30], counts[60, 70] = 1, 100
    picture = deeplcms.render_histogram(counts, Recipe(0, 1, 0, 1, bins=(100, 100), sigma=0.0))
    assert picture[29, 60] == 255 and picture[69, 20] == int(256 * np.log1p(2.55) / np.log(256))
    assert (picture > 0).sum() == 2


def test_pictures_with_an_old_normalisation_are_refused(tmp_path):
    write_mzml(tmp_path / "run.mzML", random_scans(3))
    recipe = Recipe(0, 2, 100, 300, bins=(24, 32), normalize="p90")
    convert.write_pictures(tmp_path / "run.mzML", [(tmp_path / "run.png", (0, 0))], recipe)
    with pytest.raises(InputError, match="normalize p90 is no longer supported"):
        deeplcms.read_header(tmp_path / "run.png")


def test_min_intensity_removes_weaker_peaks(tmp_path):
    write_mzml(tmp_path / "run.mzML", [(60.0, np.array([150.0, 250.0]), np.array([99.0, 100.0]))])
    recipe = Recipe(0, 2, 100, 300, (1, 2), min_intensity=100)
    counts, statistics = deeplcms.make_histogram(tmp_path / "run.mzML", recipe)
    assert counts.tolist() == [[0, 100]] and statistics["n_peaks"] == 1
    with pytest.raises(InputError, match=r"no MS1 peaks \(min_intensity 101, polarity any\)"):
        convert.read_statistics(tmp_path / "run.mzML", 101)


def test_every_setting_of_a_recipe_is_written_as_text_and_compared():
    typical = Recipe(0.1, 9.7, 100.123456789, 900.0)
    other = {int: 7, float: 0.25, str: "global", tuple: (3, 5), bool: True}
    for field in fields(Recipe):
        changed = replace(typical, **{field.name: other[field.type]})
        assert Recipe.from_text(changed.to_text()) == changed != typical
        with pytest.raises(InputError, match=f"{field.name} is "):
            deeplcms.check_recipe(changed, typical, "picture.png")
        with pytest.raises(KeyError, match=field.name):
            Recipe.from_text({name: text for name, text in typical.to_text().items() if name != field.name})


@pytest.mark.parametrize(("rt", "mz"), [(3, 0), (-3, 0), (0, 4), (0, -4), (2, 3), (-2, -3)])
def test_a_shifted_copy_moves_right_and_up_and_never_wraps(rt, mz):
    picture = np.arange(1, 121, dtype=np.uint8).reshape(10, 12)
    copy = convert.shift_picture(picture, rt, mz)
    for y in range(10):
        for x in range(12):
            inside = 0 <= y + mz < 10 and 0 <= x - rt < 12
            assert copy[y, x] == (picture[y + mz, x - rt] if inside else 0)


def test_the_shifts_of_a_picture_are_reproducible_and_all_different():
    first, again, other = (convert.draw_shifts(name, 9, (5, 5), 2643) for name in ("run1", "run1", "run2"))
    assert first == again != other and len(set(first)) == 9 and (0, 0) not in first
    assert len(set(convert.draw_shifts("run1", 8, (1, 1), 0))) == 8
    assert {mz for _, mz in convert.draw_shifts("run1", 9, (5, 0), 2643)} == {0}  # shifts along retention time only


# ---------------------------------------------------------------- retention shift and unusual files


@pytest.mark.parametrize("bins", [-10, -3, 0, 1, 10])
def test_the_retention_shift_of_a_moved_picture_is_measured_in_both_directions(bins):
    picture, recipe = np.random.default_rng(0).integers(0, 256, (32, 100), np.uint8), Recipe(5, 10, 100, 900, (100, 32))
    later = convert.shift_picture(picture, bins, 0)
    assert measure_rt_shift(compute_chromatogram(later), compute_chromatogram(picture), recipe) == pytest.approx(
        bins * 0.05
    )  # minutes
    assert measure_rt_shift(np.zeros(100), compute_chromatogram(picture), recipe) == 0


def test_statistics_far_from_the_training_cohort_give_a_warning():
    rng = np.random.default_rng(0)
    cohort = {"total_intensity": list(1e8 * rng.lognormal(0, 0.1, 50)), "outside": [0.0] * 50, "rt_first": [0.1] * 50}
    cohort |= {"rt_last": [10.0] * 50, "mz_low": [100.0] * 50, "mz_high": [900.0] * 50}
    cohort |= {"rt_shift": [0.0] * 40 + [0.1] * 9 + [5.0], "scan_kinds": [1.0] * 50, "polarity": ["+"] * 49 + [""]}
    cohort |= {"n_peaks": [1e5] * 50, "n_scans": [600] * 50, "rt_gap": [0.02] * 50}
    recipe = Recipe(0, 10, 100, 900, bins=(250, 250))
    typical = {"total_intensity": 1e8, "outside": 0.01, "rt_first": 0.2, "rt_last": 9.9}
    typical |= {"mz_low": 101.0, "mz_high": 880.0, "rt_shift": 0.17, "scan_kinds": 1, "polarity": "+"}
    typical |= {"n_peaks": 2e5, "n_scans": 500, "rt_gap": 0.5}
    for statistics in (typical, typical | {"total_intensity": 2e8}, typical | {"polarity": ""}):
        assert deeplcms.find_anomalies(statistics, cohort, recipe) == ""
    unusual = {"total_intensity": (1e7, 1e9, 0.0), "outside": (0.2,), "rt_first": (2.0,), "rt_last": (6.0,)}
    unusual |= {"mz_low": (300.0,), "mz_high": (1500.0,), "rt_shift": (0.2, -0.1), "scan_kinds": (2,)}
    unusual |= {"n_peaks": (1e6, 1e4), "n_scans": (300, 1200), "rt_gap": (3.0,)}
    other = deeplcms.find_anomalies(typical | {"polarity": "-", "rt_first": 2.0}, cohort, recipe)
    assert other.startswith("rt_first is 2 ") and other.endswith("; polarity is -, unlike the training files")
    for name, values in unusual.items():
        for value in values:
            assert deeplcms.find_anomalies(typical | {name: value}, cohort, recipe).startswith(f"{name} is {value:.4g}")


# ---------------------------------------------------------------- metrics


def test_tp_20_tn_7_fn_2_fp_1_give_the_metrics_of_the_article():
    labels = np.repeat([1, 0, 1, 0], [20, 7, 2, 1])  # TP, TN, FN, FP
    logits = np.repeat([2.0, -2.0, -2.0, 2.0], [20, 7, 2, 1])[:, None]
    metrics = compute_metrics(labels, logits)
    rounded = {name: round(float(metrics[name]), 3) for name in ("accuracy", "precision", "recall", "f1")}
    assert rounded == {"accuracy": 0.9, "precision": 0.952, "recall": 0.909, "f1": 0.930}


def test_undefined_metrics_are_nan():
    metrics = compute_metrics(np.array([0, 0]), np.array([[-2.0], [-1.0]]))
    assert np.isnan([metrics["recall"], metrics["precision"], metrics["roc_auc"]]).all() and metrics["accuracy"] == 1


def test_a_tie_counts_half_in_the_auc():
    assert deeplcms.roc_auc(np.array([False, True]), [0.5, 0.5]) == 0.5
    assert deeplcms.roc_auc(np.array([False, False, True, True]), [0.1, 0.4, 0.35, 0.8]) == 0.75


def test_precision_and_recall_of_three_classes_are_averaged_over_classes():
    labels, predicted = np.array([0, 0, 0, 0, 1, 1, 2, 2]), np.array([0, 0, 0, 1, 1, 2, 2, 2])
    metrics = compute_metrics(labels, np.eye(3)[predicted])
    assert metrics["recall"] == pytest.approx((3 / 4 + 1 / 2 + 1) / 3)
    assert metrics["precision"] == pytest.approx((1 + 1 / 2 + 2 / 3) / 3)


# ---------------------------------------------------------------- the table and the split


def rows(n, m):
    table = pd.DataFrame({"phenotype": ["user"] * n + ["non-user"] * m})
    return table.assign(group=[f"s{i}" for i in range(len(table))])


def test_218_and_80_samples_are_split_214_54_30_with_stratification():
    table = rows(218, 80)
    table["split"] = convert.assign_splits(table, 0.1, 0.2, 2643)
    assert table["split"].value_counts().to_dict() == {"train": 214, "val": 54, "test": 30}
    users = table["split"][table["phenotype"] == "user"].value_counts()
    assert (users["test"], users["val"]) == (22, 39)
    assert table["split"].equals(convert.assign_splits(table, 0.1, 0.2, 2643))
    assert not table["split"].equals(convert.assign_splits(table, 0.1, 0.2, 1))


def test_samples_of_one_group_are_in_one_split():
    table = rows(45, 45).sample(frac=1, random_state=0, ignore_index=True)
    table["group"] = [f"s{i // 3}" for i in range(90)]
    table["split"] = convert.assign_splits(table, 0.1, 0.2, 1)
    convert.check_splits(table)
    assert (table.groupby("group")["split"].nunique() == 1).all()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("sample_name,phenotype\na,x\na,y\n", "named more than once: a"),
        ("sample_name,phenotype\na,User\nb,user\n", "two spellings: User, user"),
        ("sample_name,phenotype\na,x \nb,y\n", "row 2: phenotype 'x ' cannot be used"),
        ("sample_name,phenotype\na,x\nb,x\n", "files of two phenotypes are needed"),
        ("sample_name,phenotype\na,x\nc,y\n", "do names and files match?"),
        ("sample_name,phenotype\na,x,,\nb,y,,\n", "its rows have more fields than its header"),
        ("sample_name,Phenotype,phenotype\na,x,y\nb,y,x\n", "titles become the same: Phenotype, phenotype"),
        ("sample_name,phenotype\n\n,\na,x\n../b,y\n", "row 5: sample_name '../b' cannot be used"),
        ("sample_name,phenotype\na,x\na.mzML,y\n", "named more than once: a"),
        ('sep=;\n"sample\nname";"phenotype"\na;x\na;y\n', "named more than once: a"),
        ("sample_name,phenotype\na,x\n../b,y\n", "row 3: sample_name '../b' cannot be used"),
        ("sample,phenotype\na,x\n", "needs a column sample_name (found: sample, phenotype)"),
        ("", "s.csv: cannot be read as a table"),
        ("sample_name,phenotype\n\xe9,x\n".encode("latin-1"), "s.csv: cannot be read as a table"),
        ("sample_name,phenotype,split\na,x,Train\nb,y,train\n", "the split column contains Train"),
        ("sample_name,phenotype,split\na,x,train\nb,y,train\n", "the val split has no x"),
    ],
)
def test_a_bad_sample_table_gives_an_error_of_one_line(tmp_path, table, message):
    write_cohort(tmp_path, ["a", "b"])
    (tmp_path / "s.csv").write_bytes(table if isinstance(table, bytes) else table.encode())
    status, line = run("convert.py", "raw", "s.csv", "out", cwd=tmp_path)
    assert status == 1 and message in line and "\n" not in line and not (tmp_path / "out").exists()


def test_all_encodings_and_separators_of_spreadsheets_give_the_same_table(tmp_path):
    lines = (["sample_name", "phenotype"], ["Müller 1", "a"], ["007", "b"])
    for encoding, separator, end in (("utf-8-sig", ";", "\r\n"), ("utf-8", "\t", "\n")):
        (tmp_path / "s.csv").write_bytes(end.join(separator.join(line) for line in lines).encode(encoding))
        assert deeplcms.read_table(tmp_path / "s.csv").to_numpy().tolist() == [["Müller 1", "a"], ["007", "b"]]


@pytest.mark.parametrize(
    ("flags", "flag"),
    [
        ("--bins 1 2 3", "--bins"),
        ("--bins 0", "--bins"),
        ("--rt-range 5 5", "MIN below MAX"),
        ("--test 1.5", "--test"),
        ("--augment 9 --max-shift 1", "--max-shift"),
        ("--bins 4 --augment 1", "--max-shift"),
        ("--workers 0", "--workers"),
    ],
)
def test_a_wrong_flag_gives_exit_status_2_and_an_error_with_its_name(flags, flag, capsys):
    with pytest.raises(SystemExit) as end:
        convert.parse_arguments(["raw", "samples.csv", "out", *flags.split()])
    assert end.value.code == 2 and flag in capsys.readouterr().err.partition("error: ")[2]


# ---------------------------------------------------------------- raw files and tables in practice


def write_scans(path, scans):
    """Write mzML of scans (seconds, m/z, intensity, *calls of methods of the spectrum or its settings)."""
    experiment = pyopenms.MSExperiment()
    for i, (seconds, mz, intensity, *calls) in enumerate(scans):
        spectrum, settings = pyopenms.MSSpectrum(), pyopenms.InstrumentSettings()
        spectrum.setMSLevel(1)
        spectrum.setNativeID(f"scan={i + 1}")
        spectrum.setRT(float(seconds))
        spectrum.set_peaks((np.array(mz, float), np.array(intensity, np.float32)))
        for name, value in calls:
            getattr(settings if hasattr(settings, name) else spectrum, name)(value)
        spectrum.setInstrumentSettings(settings)
        experiment.addSpectrum(spectrum)
    pyopenms.MzMLFile().store(str(path), experiment)
    return path


POSITIVE = ("setPolarity", pyopenms.IonSource.Polarity.POSITIVE)
NEGATIVE = ("setPolarity", pyopenms.IonSource.Polarity.NEGATIVE)


def window(low, high):
    """A call for write_scans that sets a scan window."""
    scan_window = pyopenms.ScanWindow()
    scan_window.begin, scan_window.end = low, high
    return "setScanWindows", [scan_window]


def statistics_of(path, **settings):
    return deeplcms.make_histogram(path, Recipe(0, 10, 0, 1000, (10, 10), **settings))[1]


def test_a_picture_has_scans_of_one_polarity(tmp_path):
    scans = [(60.0 * i, [200.0 + i % 2], [10.0 + i % 2], (POSITIVE, NEGATIVE)[i % 2]) for i in range(8)]
    both = write_scans(tmp_path / "both.mzML", scans)
    with pytest.raises(InputError, match="^both.mzML: has positive and negative scans; .*--polarity.*msconvert"):
        statistics_of(both)
    for polarity, sign, first in (("positive", "+", 0), ("negative", "-", 1)):
        one = write_scans(tmp_path / "one.mzML", scans[first::2])
        chosen = statistics_of(both, only_polarity=polarity)
        assert chosen["polarity"] == sign and chosen["n_scans"] == 4 and chosen["mz_low"] == 200 + first
        assert chosen == statistics_of(one) == statistics_of(one, only_polarity=polarity)
    with pytest.raises(InputError, match=r"^one.mzML: no MS1 peaks \(min_intensity 0, polarity positive\)$"):
        statistics_of(one, only_polarity="positive")
    write_mzml(tmp_path / "silent.mzML", random_scans(0))  # without polarity, so both are accepted
    assert statistics_of(tmp_path / "silent.mzML", only_polarity="negative")["polarity"] == ""


def test_pictures_record_the_requested_polarity_and_the_table_the_measured_one(tmp_path):
    (tmp_path / "raw").mkdir()
    rows = ["sample_name,phenotype,split"]
    for i, split in enumerate(["train", "val", "test"] * 2):
        scans = [(s, mz, h, (POSITIVE, NEGATIVE)[k % 2]) for k, (s, mz, h) in enumerate(random_scans(i, 8))]
        write_scans(tmp_path / f"raw/r{i}.mzML", scans if i < 3 else scans[1::2])
        rows.append(f"r{i},{'AB'[i // 3]},{split}")
    (tmp_path / "s.csv").write_text("\n".join(rows))
    status, line = run("convert.py", "raw", "s.csv", "out", "--bins", 20, cwd=tmp_path)
    assert status == 1
    command = "convert.py", "raw", "s.csv", "negative", "--bins", 20, "--polarity", "negative"
    for _ in range(2):  # the second call reads the pictures
        assert run(*command, cwd=tmp_path) == (0, "")
        table, recipe = deeplcms.find_pictures(tmp_path / "negative")
        assert recipe.only_polarity == "negative" and set(table["polarity"]) == {"-"} and set(table["n_scans"]) == {"4"}
    assert deeplcms.summarize_cohort(table, recipe)[1]["polarity"] == ["-"] * 6
    assert "with only_polarity negative, not " in run(*command[:-2], cwd=tmp_path)[1]


@pytest.mark.parametrize("mode", ["EMR", "ABSORPTION", "EMISSION"])
def test_scans_of_light_are_left_out_of_the_picture(tmp_path, mode):
    light = ("setScanMode", getattr(pyopenms.InstrumentSettings.ScanMode, mode))
    path = write_scans(tmp_path / "uv.mzML", [(0, [254.0], [1e9], light), (60, [450.0], [1.0])])
    assert statistics_of(path) == statistics_of(write_scans(tmp_path / "ms.mzML", [(60, [450.0], [1.0])]))


def test_zero_and_infinite_intensities_are_left_out(tmp_path):
    scans = [(0, [0.0], [0.0]), (60, [400.0, 450.0, 460.0, 470.0], [0.0, 5.0, np.inf, np.nan])]
    statistics = statistics_of(write_scans(tmp_path / "run.mzML", scans))
    assert (statistics["n_peaks"], statistics["total_intensity"]) == (1, 5.0)
    assert (statistics["mz_low"], statistics["mz_high"], statistics["rt_first"]) == (450.0, 450.0, 1.0)
    with pytest.raises(InputError, match="^zero.mzML: no MS1 peaks "):
        statistics_of(write_scans(tmp_path / "zero.mzML", scans[:1]))


@pytest.mark.parametrize(("seconds", "mz"), [(-1, 200), (-60, 200), (60, 0), (60, -5), (60, np.inf), (60, np.nan)])
def test_an_impossible_time_or_mass_gives_an_error_of_one_line(tmp_path, seconds, mz):
    path = write_scans(tmp_path / "run.mzML", [(30, [100.0], [1.0]), (seconds, [mz], [1.0])])
    with pytest.raises(InputError, match=f"^run.mzML: a scan has an impossible time or m/z: {seconds} s "):
        statistics_of(path)


def test_scan_modes_windows_and_functions_are_kinds_of_scan_and_moving_windows_are_not(tmp_path):
    sim = ("setScanMode", pyopenms.InstrumentSettings.ScanMode.SIM)

    def count_kinds(make_calls):
        scans = [(10.0 * i, [200.0], [1.0], *make_calls(i)) for i in range(12)]
        return statistics_of(write_scans(tmp_path / "run.mzML", scans))["scan_kinds"]

    assert count_kinds(lambda i: []) == 1
    assert count_kinds(lambda i: [sim] if i % 2 else []) == 2
    assert count_kinds(lambda i: [window(100 + 200 * (i % 3), 300 + 200 * (i % 3))]) == 3  # BoxCar
    assert count_kinds(lambda i: [window(100 + i, 300)]) == 1  # the window follows the data
    assert count_kinds(lambda i: [("setNativeID", f"function={i % 3 + 1} process=0 scan={i}")]) == 3  # Waters
    assert count_kinds(lambda i: [("setNativeID", f"sample=1 period=1 cycle={i} experiment={i % 2 + 1}")]) == 2  # Sciex


@pytest.mark.parametrize(("term", "values", "n_kinds"), [("1001581", (-45, -60), 2), ("1002476", (1, 2, 3), 1)])
def test_two_faims_voltages_are_two_kinds_of_scan_and_ion_mobility_frames_are_one(tmp_path, term, values, n_kinds):
    path = write_scans(tmp_path / "run.mzML", [(10.0 * i, [200.0], [1.0]) for i in range(12)])
    terms = (f'<cvParam cvRef="MS" accession="MS:{term}" name="" value="{value}"' for value in 12 * values)
    unit = ' unitCvRef="UO" unitAccession="UO:0000028" unitName="millisecond"/>'
    start = r'<cvParam [^>]*"scan start time"[^>]*/>'
    path.write_text(re.sub(start, lambda found: found[0] + next(terms) + unit, path.read_text()))
    assert statistics_of(path)["scan_kinds"] == n_kinds


def test_several_kinds_of_scan_odd_time_units_and_outlying_axes_give_warnings(tmp_path, capsys):
    raw, samples = write_cohort(tmp_path, list("abcdefghij"))
    functions = [
        (s, mz, h, ("setNativeID", f"function={i % 2 + 1} process=0 scan={i}"))
        for i, (s, mz, h) in enumerate(random_scans(0))
    ]
    write_scans(raw / "a.mzML", functions)
    write_mzml(raw / "b.mzML", [(1000 * s, mz, h) for s, mz, h in random_scans(1)])  # milliseconds
    write_mzml(raw / "c.mzML", [(s / 60, mz, h) for s, mz, h in random_scans(2)])  # minutes without a unit
    write_mzml(raw / "d.mzML", [*random_scans(3), (120.0, np.array([218039.0]), np.ones(1))])
    assert run("convert.py", raw, samples, "out", "--bins", 20, "--test", 0.2, cwd=tmp_path) == (0, "")
    printed = capsys.readouterr().out
    assert "axes: 0.00 to 1950.00 min, m/z 100" in printed
    assert re.search(r"warning: b: .*rt_last is 1950 \(other files: 1.95\)", printed)
    assert re.search(r"warning: d: .*mz_high is 2.18e\+05 \(other files: 300\)", printed)
    assert "is the time unit right?: b, c\n" in printed
    assert 'msconvert --filter "scanEvent 1"' in printed and "MSe and lock mass): a\n" in printed
    ordinary, samples = write_cohort(tmp_path / "ordinary", list("abcdefghij"))
    assert run("convert.py", ordinary, samples, "out2", "--bins", 20, "--test", 0.2, cwd=tmp_path) == (0, "")
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress])
def test_the_error_of_an_unreadable_file_gives_the_line_or_says_that_the_xml_is_complete(tmp_path, pack):
    write_mzml(tmp_path / "run.mzML", random_scans(0, 2))
    text = (tmp_path / "run.mzML").read_bytes()
    path = tmp_path / ("run.mzML" + {gzip.compress: ".gz", bz2.compress: ".bz2"}.get(pack, ""))
    lines = text.replace(b"ISO-8859-1", b"UTF-8").splitlines(keepends=True)
    cut, latin = b"".join(lines[:5]), b"".join([lines[0], b"<!-- \xe9 -->\n", *lines[1:]])
    reasons = {cut: "no element found: line 6, column 0", latin: r"not well-formed \(invalid token\): line 2, column 5"}
    integers = text.replace(b'"MS:1000521" name="32-bit float"', b'"MS:1000519" name="32-bit integer"')
    assert integers != text
    reasons[integers] = "the XML is complete, but OpenMS cannot read it"
    for contents, reason in reasons.items():
        path.write_bytes(pack(contents))
        with pytest.raises(InputError, match=f"cannot be parsed as mzML or mzXML; .*{reason}$"):
            statistics_of(path)


def test_instrument_formats_and_spectrum_lists_are_refused(tmp_path):
    write_cohort(tmp_path, ["a", "b"])
    for name in ("a.mzML", "b.mzML"):
        (tmp_path / "raw" / name).rename(tmp_path / "raw" / name.replace("mzML", "raw"))
    status, line = run("convert.py", "raw", "samples.csv", "out", cwd=tmp_path)
    assert (
        status == 1
        and "no mzML, mzXML or CDF; msconvert converts instrument formats to mzML (found: a.raw, b.raw)" in line
    )
    (tmp_path / "list.mgf").write_text("BEGIN IONS\nPEPMASS=300\n100 1\nEND IONS\n")
    (tmp_path / "run.d").mkdir()
    for path in (tmp_path / "list.mgf", tmp_path / "run.d", tmp_path / "raw/a.raw"):
        with pytest.raises(InputError, match=f"{path.name}: no mzML, mzXML or CDF; msconvert converts"):
            statistics_of(path)


def test_column_titles_and_sample_names_of_a_table_are_cleaned(tmp_path):
    raw, _ = write_cohort(tmp_path, ["2023.05.12_a", "b.d", "c", "d", "e", "f"])
    rows = ["Sample Name;Phenotype; Split ;Person ID"]
    names = ["2023.05.12_a.mzML", "b.d", "c.raw", "d.MZXML.gz", "e", "f"]
    for i, (name, split) in enumerate(zip(names, ["train", "val", "test"] * 2, strict=True)):
        rows += [f"{name};{'AB'[i // 3]};{split};p{i}", ";;;", ""]
    (tmp_path / "s.csv").write_text("\n".join(rows))
    done = run("convert.py", raw, "s.csv", "out", *FAST, "--group-by", "Person ID", cwd=tmp_path)
    assert done == (0, "")
    table = deeplcms.read_table(tmp_path / "out/samples.csv")
    assert table["sample_name"].tolist() == ["2023.05.12_a", "b.d", "c", "d", "e", "f"]
    assert table["split"].tolist() == ["train", "val", "test"] * 2
    assert table["group"].tolist() == table["person_id"].tolist() == [f"p{i}" for i in range(6)]


def test_a_group_column_of_the_user_is_never_overwritten(tmp_path):
    """Only the user knows whether the samples of a group belong together: it may be the arm of a trial."""
    raw, _ = write_cohort(tmp_path, list("abcdef"))
    rows = [f"{name},{'AB'[i % 2]},{['train', 'val', 'test'][i // 2]},g{i // 2}" for i, name in enumerate("abcdef")]
    (tmp_path / "s.csv").write_text("\n".join(["sample_name,phenotype,split,Group", *rows]))
    status, line = run("convert.py", raw, "s.csv", "out", *FAST, cwd=tmp_path)
    assert status == 1 and "s.csv: its column group would be lost: rename it" in line and "\n" not in line
    assert run("convert.py", raw, "s.csv", "out", *FAST, "--group-by", "Group", cwd=tmp_path) == (0, "")
    written = tmp_path / "out/samples.csv"
    assert deeplcms.read_table(written)["group"].tolist() == ["g0", "g0", "g1", "g1", "g2", "g2"]
    assert run("convert.py", raw, written, "again", *FAST, "--group-by", "group", cwd=tmp_path) == (0, "")


def test_files_as_instruments_write_them_give_the_right_statistics_or_an_error(as_written):
    def outcome(name, **settings):
        try:
            return statistics_of(as_written / f"{name}.mzML", **settings)
        except InputError as error:
            return str(error)

    plain = outcome("plain")
    assert plain["n_peaks"] == 600 and plain["scan_kinds"] == 1
    assert "positive and negative" in outcome("polarity_switching")
    for polarity, mz_low in (("positive", 100.27), ("negative", 200.21)):
        chosen = outcome("polarity_switching", only_polarity=polarity)
        assert chosen["n_scans"] == 10 and chosen["mz_low"] == pytest.approx(mz_low, abs=0.01)
    assert outcome("uv_beside_ms1")["mz_low"] > 400 and outcome("uv_without_ms_level")["n_peaks"] == 1
    count_kinds = [
        outcome(name)["scan_kinds"] for name in ("waters_mse_all_level_1", "waters_lock_mass", "sim_beside_full_scan")
    ]
    assert count_kinds == [3, 2, 2]
    assert outcome("infinite_intensity")["total_intensity"] == 3000
    assert outcome("zero_mz_zero_intensity")["mz_low"] == 450
    assert outcome("all_intensities_zero").endswith(": no MS1 peaks (min_intensity 0, polarity any)")
    assert outcome("cp1252_declared_utf8").endswith("line 5, column 44")
    assert outcome("int32_intensities").endswith("the XML is complete, but OpenMS cannot read it")
    with pytest.raises(InputError, match="more fields than its header"):
        deeplcms.read_table(as_written / "samples_rows_longer_than_header.csv")


# ---------------------------------------------------------------- whole cohorts


def test_bad_files_are_left_out_and_a_repaired_file_is_converted_later(tmp_path):
    good = ['Müller, "A" 1', "-dash", "it's", "d e", "f", "g", "h", "i", "j", "k"]
    raw, samples = write_cohort(tmp_path, [*good, "half", "empty", "folder", "absent"])
    whole = (raw / "half.mzML").read_bytes()
    (raw / "half.mzML").write_bytes(whole[: len(whole) // 2])
    (raw / "empty.mzML").write_bytes(b"")
    (raw / "folder.mzML").unlink()
    (raw / "folder.mzML").mkdir()
    (raw / "absent.mzML").rename(raw / "other.mzML")
    narrow = [raw, samples, "out", "--rt-range", 0, 1, *FAST[3:], "--workers", 2]
    done = call("convert.py", *narrow, cwd=tmp_path)
    assert done.returncode == 1
    lines = sorted(done.stderr.splitlines())  # without the messages of pyopenms
    assert len(lines) == 3 and lines[0] == "left out: empty.mzML: is empty (zero bytes)"
    assert lines[1].startswith("left out: folder.mzML: cannot be parsed") and "Is a directory" in lines[1]
    assert lines[2].startswith("left out: half.mzML: cannot be parsed")
    assert "13 of the 14 samples have a file in" in done.stdout
    assert "samples without a file: absent\nfiles without a sample: other\n" in done.stdout
    assert "warning: more than 1 % of the intensity is outside the axes" in done.stdout
    status = deeplcms.read_table(tmp_path / "out/samples.csv").set_index("sample_name")["status"]
    assert status["half"].startswith("failed: half.mzML: cannot be parsed") and status["absent"] == "no file"
    assert list(status.index[status == "ok"]) == good
    pictures = {path.stem: path for path in (tmp_path / "out").glob("*/*/*.png")}
    assert pictures.keys() == set(good) and not list((tmp_path / "out").rglob("*tmp*"))
    text, recipe = deeplcms.read_header(pictures['Müller, "A" 1'])
    assert text["sample_name"] == 'Müller, "A" 1' and text["source"] == 'Müller, "A" 1.mzML'
    assert recipe == Recipe(0, 1, 100, 300, (32, 32))
    assert text["shift"] == "0 0" and text["n_scans"] == "40" and text["rt_last"] == "1.95"

    (raw / "half.mzML").write_bytes(whole)
    again = call("convert.py", *narrow, cwd=tmp_path)
    assert "10 of 13 files are already converted" in again.stdout and again.returncode == 1
    status = deeplcms.read_table(tmp_path / "out/samples.csv").set_index("sample_name")["status"]
    assert status["half"] == "ok" and status["empty"].startswith("failed")


def test_a_retention_time_range_in_seconds_gives_an_error(tmp_path):
    raw, samples = write_cohort(tmp_path, list("abcdefghij"))
    done = call("convert.py", raw, samples, "out", "--test", 0.2, "--rt-range", 60, 120, *FAST[3:], cwd=tmp_path)
    assert done.returncode == 1 and not list(tmp_path.glob("out/*/*/*.png"))
    assert done.stderr.startswith("convert.py: no file became a picture; the first: ") and done.stderr.count("\n") == 1
    assert "no peak inside the axes, 60.00-120.00 min, m/z 100.00-300.00; its peaks: 0.00-1.95" in done.stderr
    assert run("convert.py", raw, samples, "out", "--test", 0.2, *FAST, cwd=tmp_path) == (0, "")  # corrected


def test_an_odd_file_gives_a_picture_or_an_error_with_the_reason(odd_files):
    reasons = {
        "zero_bytes.mzML": "is empty (zero bytes)",
        "no_spectra.mzML": "cannot be parsed",
        "chromatograms_only.mzML": "no MS1 peaks",
        "empty_spectra.mzML": "no MS1 peaks",
        "ms2_only_profile.mzML": "no MS1 peaks",
        "invalid.mzML": "a scan has an impossible time or m/z: 5.1 s (-1: no time), m/z 0 to 14",
    }
    paths = list(odd_files.iterdir())
    assert {"lcms.mzML.gz", "small.mzML.bz2", "small.mzXML", "invalid.mzML"} < {path.name for path in paths}
    for path in paths:
        try:
            picture, statistics = deeplcms.make_picture(path, Recipe(0, 80, 0, 1000, (50, 50)))
            assert path.name not in reasons and picture.any() and statistics["n_peaks"] > 0
        except InputError as error:
            assert str(error).startswith(f"{path.name}: {reasons[path.name]}")


def test_shared_axes_cover_all_files_and_the_number_of_workers_changes_no_byte(tmp_path):
    raw, samples = write_cohort(tmp_path, [f"r{i}" for i in range(10)])
    wide = [(30.0, np.array([50.0, 700.0]), np.ones(2)), (600.0, np.array([60.0]), np.ones(1))]
    write_mzml(raw / "r0.mzML", wide)
    flags = [raw, samples, "--bins", 20, 30, "--augment", 2, "--max-shift", 3, "--test", 0.2]
    for workers in (1, 2):
        done = run("convert.py", *flags[:2], f"w{workers}", *flags[2:], "--workers", workers, cwd=tmp_path)
        assert done == (0, "")
    assert list_files(tmp_path / "w1") == list_files(tmp_path / "w2")
    pictures, recipe = deeplcms.find_pictures(tmp_path / "w1")
    assert recipe == Recipe(0.0, 10.0, 50.0, 700.0, (20, 30)) and len(pictures) == 10 + pictures["copy"].sum()
    assert pictures["copy"].sum() == 2 * ((pictures["split"] == "train") & ~pictures["copy"]).sum()
    for path in pictures["path"]:
        text, _ = deeplcms.read_header(path)
        rt, mz = map(int, text["shift"].split())
        assert path.stem == text["sample_name"] + (f"_rt{rt:+d}_mz{mz:+d}" if (rt, mz) != (0, 0) else "")


def abort_on_bad(name):
    if name == "bad":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "wrong":
        raise ZeroDivisionError("no luck")
    return name.upper()


def test_a_crash_while_reading_one_file_does_not_affect_the_others():
    tasks = {name: (name,) for name in ["a", "bad", "c", "wrong", "d"]}
    results = convert.for_each(abort_on_bad, tasks, 2, "x")
    assert "terminated abruptly" in str(results.pop("bad"))
    assert str(results.pop("wrong")) == "no luck"
    assert results == {name: name.upper() for name in "acd"}


def find_processes(marker):
    """Ids of processes with the marker in their environment."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                if marker in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                continue
    return found


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc to find orphans")
def test_a_killed_and_resumed_conversion_equals_an_uninterrupted_one_without_orphans(tmp_path):
    raw, samples = write_cohort(tmp_path, [f"r{i:02d}" for i in range(24)])
    flags = [*FAST, "--augment", 2, "--workers", 2]
    command = [sys.executable, ROOT / "convert.py", raw, samples, tmp_path / "killed", *flags]
    environment = os.environ | {"DEEPLCMS_TEST": str(tmp_path)}
    process = subprocess.Popen(list(map(str, command)), env=environment, stdout=subprocess.DEVNULL)
    while not list((tmp_path / "killed").glob("*/*/r??.png")) and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    marker, deadline = f"DEEPLCMS_TEST={tmp_path}".encode(), time.monotonic() + 30
    while find_processes(marker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not find_processes(marker)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("*/*/r??.png")}
    assert 0 < len(before) < 24
    (tmp_path / "killed" / "train" / "case" / ".r99.png.1.tmp.png").write_bytes(b"half a picture")

    resumed = call("convert.py", *command[2:], cwd=tmp_path)
    assert f"{len(before)} of 24 files are already converted" in resumed.stdout and resumed.returncode == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert run("convert.py", raw, samples, "whole", *flags, cwd=tmp_path) == (0, "")
    assert list_files(tmp_path / "killed") == list_files(tmp_path / "whole")

    def refusal(*more):
        status, line = run("convert.py", raw, samples, "whole", *more, cwd=tmp_path)
        assert status == 1 and "another OUT_DIR" in line
        return line

    assert "with sigma 2.0, not 1.0" in refusal(*flags, "--sigma", 1)
    assert "with rt_range [0.0, 2.0], not None" in refusal(*flags[3:])
    samples.write_text(samples.read_text() + "r99,case\n")
    (raw / "r99.mzML").write_bytes((raw / "r00.mzML").read_bytes())
    assert "with other samples or splits" in refusal(*flags)


@pytest.mark.parametrize(
    ("change", "texts", "message"),
    [
        (Image.Image.copy, {"mz_max": "900.5"}, "its recipe is not that .*mz_max is 900.[05], not 900.[05]"),
        (lambda image: image.resize((32, 32)), {}, "make it again"),
        (lambda image: image.convert("RGB"), {}, "make it again"),  # as old versions of convert.py made them
        (Image.Image.copy, {"chromatogram": None}, "make it again"),
    ],
)
def test_a_data_set_with_pictures_of_two_kinds_is_refused(two, tmp_path, change, texts, message):
    shutil.copytree(two[0], tmp_path / "mixed")
    png = next((tmp_path / "mixed/train/user").glob("*.png"))
    with Image.open(png) as image:
        info = PngImagePlugin.PngInfo()
        for name, text in (image.text | texts).items():
            if text is not None:
                info.add_text(name, text)
        change(image).save(png, pnginfo=info)
    with pytest.raises(InputError, match=message) as refusal:
        deeplcms.find_pictures(tmp_path / "mixed")
    assert "\n" not in str(refusal.value)


def test_convert_does_not_import_torch(tmp_path):
    write_mzml(tmp_path / "run.mzML", random_scans(0, 2))
    code = f"import sys, convert; convert.read_statistics(convert.Path({str(tmp_path / 'run.mzML')!r}), 0); "
    done = subprocess.run([sys.executable, "-c", code + "sys.exit('torch' in sys.modules)"], cwd=ROOT)
    assert done.returncode == 0


def test_planted_compounds_differ_by_their_fold_and_background_compounds_do_not():
    compounds = demo_compounds(np.random.default_rng([7, 0]))
    intensities = np.zeros((2, len(compounds)))
    for i in range(24):
        rng = np.random.default_rng([7, 1, i])
        for seconds, mz, intensity in simulate_scans(rng, compounds, [], i % 2 == 1, np.zeros(6)):
            for k in np.flatnonzero(abs(compounds["rt"] * 60 - seconds) < 10):
                low, high = np.searchsorted(mz, compounds["mz"][k] * (1 + np.array([-2e-5, 2e-5])))
                intensities[i % 2, k] += intensity[low:high].sum()
    measured, fold = intensities[1] / np.maximum(intensities[0], 1), compounds["fold"]
    assert measured[np.isinf(fold)].min() > 20
    planted = compounds["planted"] & np.isfinite(fold)
    assert (fold[planted] > 1).sum() > 5 and (fold[planted] < 1).sum() > 5  # both directions
    assert np.corrcoef(np.log(measured[planted]), np.log(fold[planted]))[0, 1] > 0.8
    assert 0.7 < np.median(measured[~compounds["planted"]]) < 1.4


def test_the_retention_drift_of_batches_is_smooth_and_each_batch_has_both_phenotypes(demo):
    samples = deeplcms.read_table(demo / "raw/samples.csv")
    assert (pd.crosstab(samples["batch"], samples["phenotype"]) == 5).all(axis=None)
    at = np.linspace(0, 1, 200)
    drifts = np.random.default_rng(1).normal(0, 15, (500, 6)) @ deeplcms.slow_waves(at)
    assert np.allclose(drifts.std(0), 15, rtol=0.15)  # seconds, at every retention time, as documented
    assert abs(np.diff(drifts, axis=1)).max() < 4  # seconds between neighbouring points


def test_the_demo_files_do_not_depend_on_the_number_of_workers(tmp_path):
    for folder, seed, workers in (("one", 7, 1), ("two", 7, 2), ("other", 8, 2)):
        write_demo(tmp_path / folder, 4, seed, workers)
    one, two, other = (list_files(tmp_path / folder) for folder in ("one", "two", "other"))
    assert one == two and len(one) == 6 and not set(one.values()) & set(other.values())


def test_the_demo_lists_its_compounds_and_refuses_the_folder_of_another_cohort(demo, two):
    features = pd.read_csv(demo / "features.csv", skiprows=4)
    assert features["Ontology"].value_counts().to_dict() == {"background": 216, "planted": 24}
    for folder, content in ((demo, "cohort"), (two[0], "data set")):
        status, line = run("demo.py", folder, "--runs", 40, "--bins", 64, "--seed", 1, cwd=demo.parent)
        assert status == 1 and f"holds another {content}" in line


# ---------------------------------------------------------------- digests, mismatches and warnings


def make_small_data_set(folder, *flags):
    raw, samples = write_cohort(folder, [f"{i:03d}" for i in range(20)])
    assert run("convert.py", raw, samples, folder / "data", *FAST, "--test", 0.2, *flags, cwd=folder) == (0, "")
    return folder / "data"


def test_the_digest_of_a_data_set_depends_on_its_pictures_and_not_on_its_path(tmp_path, monkeypatch):
    data = make_small_data_set(tmp_path)
    digest = deeplcms.digest_pictures(*deeplcms.find_pictures(data))
    other = Path(shutil.copytree(data, tmp_path / "elsewhere"))
    monkeypatch.setattr(os, "linesep", "\r\n")
    assert deeplcms.digest_pictures(*deeplcms.find_pictures(other)) == digest
    (tmp_path / "raw/003.mzML").unlink()
    write_mzml(tmp_path / "raw/003.mzML", random_scans(99))  # exported again under the same name
    again = call("convert.py", tmp_path / "raw", tmp_path / "samples.csv", data, *FAST, "--test", 0.2, cwd=tmp_path)
    assert again.returncode == 0 and "19 of 20 files are already converted" in again.stdout
    assert deeplcms.digest_pictures(*deeplcms.find_pictures(data)) != digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d, t: t.assign(sample_name=t["sample_name"].astype(int)), "has rows without pictures: 0, 1"),
        (lambda d, t: t[5:], "has no rows for pictures: 000"),
        (lambda d, t: pd.concat([t, t[:1]]), "two rows of samples.csv for one sample: 000"),
        (lambda d, t: [shutil.copy(p, d / "val/case/000.png") for p in d.glob("*/*/000.png")] and t, "two splits"),
        (lambda d, t: [shutil.copy(p, d / "test/control/x.png") for p in d.glob("t*/*/002.png")] and t, "two"),
        (lambda d, t: [p.rename(p.parent / "Case") for p in d.glob("val/case")] and t, "spellings: Case, case"),
    ],
)
def test_pictures_that_do_not_match_the_sample_table_are_refused(tmp_path, change, message):
    data = make_small_data_set(tmp_path)
    change(data, pd.read_csv(data / "samples.csv", dtype=str)).to_csv(data / "samples.csv", index=False)
    with pytest.raises(InputError, match=message):
        deeplcms.find_pictures(data)


def test_a_sample_table_with_decimal_commas_gives_the_same_statistics(tmp_path):
    data = make_small_data_set(tmp_path)
    before, recipe = deeplcms.find_pictures(data)
    table = (data / "samples.csv").read_text().replace(",", ";").replace(".", ",")
    (data / "samples.csv").write_text(table)
    after, _ = deeplcms.find_pictures(data)
    assert deeplcms.summarize_cohort(after, recipe)[1] == deeplcms.summarize_cohort(before, recipe)[1]


def test_a_file_unlike_the_others_gives_a_warning(tmp_path):
    raw, samples = write_cohort(tmp_path, list("abcdefghijklmnopqrst"))
    write_mzml(raw / "c.mzML", random_scans(3)[:15])  # the measurement was stopped early
    done = call("convert.py", raw, samples, tmp_path / "data", *FAST, "--test", 0.2, cwd=tmp_path)
    warned = [line for line in done.stdout.splitlines() if line.startswith("warning: ") and "other files" in line]
    assert len(warned) == 1 and warned[0].startswith("warning: c: ") and "rt_last is" in warned[0]


def test_one_raw_file_under_two_names_in_two_splits_gives_a_warning(tmp_path, capsys):
    raw, samples = write_cohort(tmp_path, list("abcdef"))
    splits = ["train", "train", "val", "val", "test", "test"]
    pd.read_csv(samples).assign(split=splits).to_csv(samples, index=False)
    shutil.copy(raw / "a.mzML", raw / "c.mzML")
    for _ in range(2):  # the second call reads the pictures
        assert run("convert.py", raw, samples, "out", *FAST, cwd=tmp_path) == (0, "")
        assert (
            "warning: the same picture in two splits, which train.py refuses; remove one: a, c\n"
            in capsys.readouterr().out
        )
    with pytest.raises(InputError, match="the same picture in two splits: a, c"):
        deeplcms.find_pictures(tmp_path / "out")


def test_a_column_with_the_title_of_a_statistic_is_refused_unless_from_convert(tmp_path):
    raw, samples = write_cohort(tmp_path, list("abcdefghij"))
    pd.read_csv(samples).assign(n_peaks=7).to_csv(tmp_path / "own.csv", index=False)
    status, line = run("convert.py", raw, tmp_path / "own.csv", "refused", *FAST, "--test", 0.2, cwd=tmp_path)
    assert status == 1 and "own.csv: its column n_peaks would be lost: rename it" in line
    assert run("convert.py", raw, samples, "first", *FAST, "--test", 0.2, cwd=tmp_path) == (0, "")
    written = tmp_path / "first/samples.csv"
    assert run("convert.py", raw, written, "second", *FAST, "--group-by", "group", cwd=tmp_path) == (0, "")
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "second/samples.csv"), pd.read_csv(written))


def test_a_data_set_may_have_no_test_split_or_only_a_test_split(tmp_path):
    data = make_small_data_set(tmp_path, "--test", 0)
    assert set(deeplcms.find_pictures(data)[0]["split"]) == {"train", "val"}
    table = pd.DataFrame({"sample_name": [f"{i:03d}" for i in range(20)], "phenotype": "case", "split": "test"})
    table.to_csv(tmp_path / "test.csv", index=False)
    assert run("convert.py", tmp_path / "raw", tmp_path / "test.csv", "other", *FAST, cwd=tmp_path) == (0, "")
    for title, value in (("label", "x"), ("status", "cured")):
        table.assign(**{title: value}).to_csv(tmp_path / "test.csv", index=False)
        status, line = run("convert.py", tmp_path / "raw", tmp_path / "test.csv", "third", *FAST, cwd=tmp_path)
        assert status == 1 and f"its column {title} would be lost: rename it" in line


def test_figures_do_not_depend_on_the_matplotlib_settings_of_the_user(tmp_path):
    code = """
import sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path
import numpy as np, train, evaluate, deeplcms
with train.figure(Path("f.png"), "a $title$ of $5_", (4, 4), squeeze=False) as axes:
    evaluate.show(axes[0, 0], np.arange(12).reshape(3, 4), deeplcms.Recipe(0, 1, 0, 1))
    axes[0, 0].set_title("user_$x"); axes[0, 0].plot([0, 1], [0, 1], label=" _a"); axes[0, 0].legend()
    evaluate.label_axes(axes)
"""
    pictures = []
    for name, settings in (("plain", ""), ("odd", "image.origin: lower\ntext.usetex: True\nfont.size: 30\n")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "matplotlibrc").write_text(settings)
        done = subprocess.run([sys.executable, "-c", code, ROOT], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        pictures.append((folder / "f.png").read_bytes())
    assert pictures[0] == pictures[1]


def test_two_processes_of_torchrun_write_the_same_folder_as_one(two, tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    rows = ["sample_name,phenotype"]
    for i, phenotype in product(range(6), ("user", "non-user")):
        shutil.copy(two[0].parent / f"raw/{phenotype}{i:02d}.mzML", raw)
        rows.append(f"{phenotype}{i:02d},{phenotype}")
    (raw / "user00.mzML").write_text("<mzML")
    (raw / "samples.csv").write_text("\n".join(rows))
    command = ["convert.py", raw, raw / "samples.csv", "one", "--bins", 32, "--augment", 1, "--workers", 1]
    status, _ = run(*command, cwd=tmp_path)
    command[3] = "two"
    processes = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29641"]
    processes += [ROOT / command[0], *command[1:]]
    done = subprocess.run(list(map(str, processes)), cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert status == done.returncode == 1
    assert "terminate" not in done.stderr  # both processes end normally
    assert (
        done.stderr.count("left out: user00.mzML") == 1 and done.stdout.count("11 of 12 files are pictures in two") == 1
    )
    one, other = (
        {
            path.relative_to(tmp_path / name): path.read_bytes()
            for path in (tmp_path / name).rglob("*")
            if path.is_file()
        }
        for name in ("one", "two")
    )
    assert len(one) > 12 and one == other


@pytest.mark.parametrize("script", ["evaluate.py", "explain.py"])
def test_evaluate_and_explain_refuse_torchrun(script, tmp_path):
    environment = os.environ | {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "2"}
    done = call(script, cwd=tmp_path, env=environment)
    assert done.returncode == 1 and done.stderr == f"{script}: needs one process only, start it without torchrun\n"
