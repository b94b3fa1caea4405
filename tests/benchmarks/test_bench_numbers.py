"""`foldkernels bench`: statistics, files, comparison, summary and plan, exactly, on rows that are made up."""

import csv
import json
import math
from dataclasses import replace

import pytest

from foldkernels.benchmarks.measure import statistics, timing
from foldkernels.benchmarks.report import comparison, drawing, page, plots, results, series, summary
from foldkernels.benchmarks.report.comparison import BROKEN, FASTER, MENDED, SAME, SLOWER, UNSURE, compare_results
from foldkernels.benchmarks.report.results import (
    BACKWARD,
    FAILED,
    FORWARD,
    MEASURED,
    NO_TIME,
    UNAVAILABLE,
    WRONG,
    Results,
    Row,
    read,
    write_csv,
    write_json,
)
from foldkernels.benchmarks.run.plan import CALLS_BESIDE, CHECK_CALLS, SAMPLE_S, Known, Plan, check_words, chosen
from foldkernels.errors import BadInput

MACHINE = {
    "cpu": "a CPU",
    "cores": 2,
    "flags": ["avx2"],
    "isa": "AVX2",
    "threads": 1,
    "torch": "2.13",
    "python": "3.11",
    "system": "Linux",
    "glibc_tunables": "",
    "accelerator": "",
}


def row(kernel="torch", ms=10.0, length=64, **more):
    """A row that was measured, its quartiles 5% away."""
    given = {
        "kind": "operation",
        "subject": "attention",
        "kernel": kernel,
        "mode": FORWARD,
        "length": length,
        "dtype": "float32",
        "device": "cpu",
        "status": MEASURED,
        "sizes": {"h": 4, "d": 64},
        "ms": ms,
        "low_ms": 0.95 * ms,
        "high_ms": 1.05 * ms,
        "fastest_ms": 0.9 * ms,
        "rounds": 7,
        "calls": 1,
        "baseline": "reference",
        "ratio": 20.0 / ms,
        "ratio_low": 19.0 / ms,
        "ratio_high": 21.0 / ms,
        "memory_mb": 8.0,
        "error": 1e-7,
        "plain_error": 1e-7,
        "allowed_error": 1.2e-6,
        "check": "output 0: error 1e-07",
        "machine": MACHINE,
        "versions": {"foldkernels": "0.1.0", "torch": "2.13"},
    }
    return Row(**{**given, **more})


def without_time(status, why, **more):
    empty = dict.fromkeys(("ms", "low_ms", "high_ms", "fastest_ms", "ratio", "ratio_low", "ratio_high", "memory_mb"))
    given = {**empty, "status": status, "why": why, "check": "", "error": None}
    return replace(row(), **{**given, **more})


# Statistics -----------------------------------------------------------------------------------------------------------


def test_quantiles_lie_between_neighbours():
    assert statistics.quantile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert statistics.quantile([4.0, 1.0, 3.0, 2.0], 0.25) == 1.75
    assert statistics.quantile([1.0, 2.0, 3.0, 4.0, 5.0], 0.75) == 4.0
    assert statistics.quantile([7.0], 0.25) == 7.0
    assert statistics.quantile([1.0, 9.0], 1.0) == 9.0
    with pytest.raises(ValueError, match="no values"):
        statistics.quantile([], 0.5)


def test_the_spread_of_seven_samples():
    found = statistics.spread([0.001 * x for x in (5, 1, 9, 2, 4, 3, 100)])
    assert found.median == pytest.approx(4.0)
    assert (found.low, found.high) == (pytest.approx(2.5), pytest.approx(7.0))
    assert found.fastest == pytest.approx(1.0)


def test_a_ratio_is_of_medians_and_what_slows_both_cancels_in_its_interval():
    busy = [1.0, 3.0, 1.0, 5.0, 1.0, 2.0, 1.0]
    middle, low, high = statistics.ratio([4.0 * x for x in busy], [2.0 * x for x in busy])
    assert middle == low == high == pytest.approx(2.0)
    middle, low, high = statistics.ratio([2.0, 2.2, 1.8, 2.0, 2.1, 1.9, 2.0], [1.0] * 7)
    assert middle == pytest.approx(2.0) and 1.8 <= low < 2.0 < high <= 2.2
    with pytest.raises(ValueError, match="rounds"):
        statistics.ratio([1.0, 2.0], [1.0])


def test_a_power_law_is_found_again():
    lengths = [64, 128, 256]
    fit = statistics.power_law(lengths, [3.0 * n**2.5 for n in lengths])
    assert fit.exponent == pytest.approx(2.5) and fit.scale == pytest.approx(3.0)
    assert fit.at(512) == pytest.approx(3.0 * 512**2.5)
    noisy = statistics.power_law([10, 100, 1000], [1.0, 10.0, 1000.0])
    assert noisy.exponent == pytest.approx(1.5)  # least squares in the logarithms
    assert statistics.power_law([64], [1.0]) is None
    assert statistics.power_law([64, 64], [1.0, 2.0]) is None
    assert statistics.power_law([64, 128, 256], [0.0, 1.0, 2.0]).exponent == pytest.approx(1.0)  # zero has no logarithm


def test_sides_take_turns_and_nobody_is_always_first():
    order = []
    sides = [lambda name=name: order.append(name) for name in "abc"]
    found = timing.interleave(sides, 6, [1, 1, 2])
    assert [len(side) for side in found] == [6, 6, 6]
    turns, rest = [], "".join(order)
    while rest:
        turn, rest = rest[:4], rest[4:]
        assert sorted(turn) == list("abcc")  # c is called twice in a sample
        turns.append(turn[0])
    assert set(turns) == set("abc")


def test_two_sides_alternate():
    order = []
    timing.interleave([lambda: order.append("a"), lambda: order.append("b")], 3, [1, 1])
    assert "".join(order) == "abbaba" or "".join(order) == "abbaab"
    assert order.count("a") == order.count("b") == 3


def test_short_functions_are_called_often():
    assert timing.calls_per_sample(0.004) == 5
    assert timing.calls_per_sample(3.0) == 1
    assert timing.calls_per_sample(0.0) == 1000


# Files ----------------------------------------------------------------------------------------------------------------


def test_rows_come_back_as_they_were(tmp_path):
    written = Results((row(), without_time(UNAVAILABLE, "no GPU")), "foldkernels bench", "2026-01-01T00:00:00Z", 12.5)
    write_json(written, tmp_path / "deep" / "rows.json")
    assert read(tmp_path / "deep" / "rows.json") == written
    assert read(tmp_path / "deep") == written  # the folder of a run
    assert not list(tmp_path.rglob("*.partial"))
    write_json(Results(()), tmp_path / "none.json")
    assert read(tmp_path / "none.json").rows == ()


def test_a_table_has_the_machine_in_every_row(tmp_path):
    write_csv([row(), without_time(UNAVAILABLE, "no GPU; no flash-attn, either")], tmp_path / "rows.csv")
    first, second = csv.DictReader((tmp_path / "rows.csv").open())
    assert first["ms"] == "10.0" and first["machine_cpu"] == "a CPU" and first["machine_flags"] == "avx2"
    assert first["sizes"] == "h=4 d=64" and "torch=2.13" in first["versions"]
    assert second["ms"] == "" and second["why"] == "no GPU; no flash-attn, either"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: [], "not a result"),
        (lambda data: {**data, "format": "foldkernels bench 2"}, "not a result"),
        (lambda data: {**data, "rows": [{"kind": "operation"}]}, "damaged"),
        (lambda data: {**data, "rows": [{**data["rows"][0], "ms": "10"}]}, "damaged"),
        (lambda data: {**data, "rows": [{**data["rows"][0], "ms": None}]}, "damaged"),
        (lambda data: {**data, "rows": [{**data["rows"][0], "status": "fine"}]}, "damaged"),
        (lambda data: {**data, "rows": [{**data["rows"][0], "length": 0}]}, "damaged"),
        (lambda data: {**data, "rows": [{**data["rows"][0], "machine": "mine"}]}, "damaged"),
        (lambda data: {**data, "rows": 3}, "damaged"),
    ],
)
def test_another_file_is_refused(tmp_path, change, said):
    path = tmp_path / "rows.json"
    write_json(Results((row(),)), path)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(BadInput, match=said):
        read(path)


def test_a_missing_or_broken_file_is_refused(tmp_path):
    with pytest.raises(BadInput, match="no such file"):
        read(tmp_path / "nowhere.json")
    (tmp_path / "half.json").write_text('{"format": "foldkern')
    with pytest.raises(BadInput, match="no JSON"):
        read(tmp_path / "half.json")


def test_what_a_later_version_adds_to_a_row_is_left_out(tmp_path):
    path = tmp_path / "rows.json"
    write_json(Results((row(),)), path)
    data = json.loads(path.read_text())
    data["rows"][0]["colour"] = "green"
    path.write_text(json.dumps(data))
    assert read(path).rows == (row(),)


# Comparison -----------------------------------------------------------------------------------------------------------


def compared(old, new, **more):
    return compare_results(Results(tuple(old)), Results(tuple(new)), **more)


@pytest.mark.parametrize(
    ("ms", "verdict"),
    [(10.0, SAME), (11.4, SAME), (11.6, SLOWER), (20.0, SLOWER), (8.75, SAME), (8.6, FASTER), (1.0, FASTER)],
)
def test_a_ratio_beyond_the_tolerance_counts(ms, verdict):
    found = compared([row(ms=10.0)], [row(ms=ms)], tolerance=0.15)
    (change,) = found.changes
    assert (change.verdict, change.ratio) == (verdict, pytest.approx(ms / 10.0))
    assert found.is_worse == (verdict == SLOWER)


def test_a_change_within_the_spread_is_no_change():
    found = compared([row(ms=10.0, high_ms=13.0)], [row(ms=12.0, low_ms=9.0)], tolerance=0.1)
    assert found.changes[0].verdict == UNSURE and not found.is_worse
    assert compared([row(ms=10.0, high_ms=11.3)], [row(ms=12.0)], tolerance=0.1).is_worse


def test_a_kernel_that_lost_its_time_is_worse():
    for status in (WRONG, FAILED, UNAVAILABLE):
        found = compared([row()], [without_time(status, "because")])
        assert found.changes[0].verdict == BROKEN and found.is_worse
        assert f"measured -> {status}: because" in comparison.as_text(found)
        back = compared([without_time(status, "because")], [row()])
        assert back.changes[0].verdict == MENDED and not back.is_worse
    assert not compared([row()], [without_time(NO_TIME, "no time")]).is_worse


def test_what_has_no_time_is_not_counted_as_the_same():
    """A kernel that can run in neither, and what a budget left out of one of them."""
    absent = [without_time(UNAVAILABLE, "no GPU", kernel="triton")]
    found = compared([row(), row("fast"), *absent], [row(), without_time(NO_TIME, "late", kernel="fast"), *absent])
    assert [change.new.kernel for change in found.changes] == ["torch"]
    assert [r.kernel for r in found.only_old] == ["fast"] and found.only_new == ()
    assert comparison.as_text(found).startswith("1 measurement in both files")


def test_rows_of_different_machines_are_refused_unless_told():
    other = row(machine={**MACHINE, "cpu": "another CPU"})
    with pytest.raises(BadInput, match="different machines: cpu: a CPU and another CPU") as refused:
        compared([row()], [other])
    assert "--any-machine" in str(refused.value)
    found = compared([row()], [other], any_machine=True)
    assert found.differences == ("cpu: a CPU and another CPU",)
    with pytest.raises(BadInput, match="threads: 1 and 8"):
        compared([row()], [row(machine={**MACHINE, "threads": 8})])


def test_other_versions_are_told_and_compared():
    newer = row(machine={**MACHINE, "torch": "2.14"}, versions={"foldkernels": "0.2.0", "torch": "2.14"})
    found = compared([row()], [newer])
    assert found.differences == ("torch: 2.13 and 2.14", "foldkernels: 0.1.0 and 0.2.0")
    assert "torch: 2.13 and 2.14" in comparison.as_text(found)


def test_only_the_same_measurement_is_compared():
    found = compared([row(), row(length=128)], [row(), row(mode=BACKWARD), row(sizes={"h": 8, "d": 64})])
    assert len(found.changes) == 1
    assert [r.length for r in found.only_old] == [128] and len(found.only_new) == 2
    with pytest.raises(BadInput, match="no measurement in common"):
        compared([row()], [row(length=128)])


def test_a_busier_machine_is_told_and_taken_out():
    old = [row("reference", 20.0, ratio=1.0, ratio_low=1.0, ratio_high=1.0), row("torch", 10.0)]
    new = [row("reference", 40.0, ratio=1.0, ratio_low=1.0, ratio_high=1.0)]
    new.append(row("torch", 20.0, ratio=2.0, ratio_low=1.9, ratio_high=2.1))
    plain = compared(old, new)
    assert plain.is_worse and plain.drift == pytest.approx(2.0)
    assert "took 2.00 times as long: the machine may have been busier" in comparison.as_text(plain)
    beside = compared(old, new, beside_baseline=True)
    assert not beside.is_worse and [change.ratio for change in beside.changes] == [1.0, 1.0]
    new[1] = row("torch", 40.0, ratio=1.0, ratio_low=0.9, ratio_high=1.1)
    slower = compared(old, new, beside_baseline=True).of(SLOWER)
    assert [(change.new.kernel, change.ratio) for change in slower] == [("torch", pytest.approx(2.0))]


@pytest.mark.parametrize(
    ("old", "new", "said"), [(8.0, 16.0, "more"), (16.0, 8.0, "less"), (8.0, 8.9, ""), (0.1, 0.9, ""), (None, 8.0, "")]
)
def test_memory_that_changed_is_told(old, new, said):
    found = compared([row(memory_mb=old)], [row(memory_mb=new)])
    assert found.changes[0].memory == said and not found.is_worse
    assert ("Memory:" in comparison.as_text(found)) == bool(said)


def test_an_error_that_changed_is_told():
    assert compared([row()], [row(error=9e-7)]).changes[0].error == "larger"
    assert compared([row(error=9e-7)], [row()]).changes[0].error == "smaller"
    assert compared([row()], [row(error=3e-7)]).changes[0].error == ""
    assert "Error:" in comparison.as_text(compared([row()], [row(error=9e-7)]))


def test_a_comparison_is_plain_data():
    found = comparison.as_dict(compared([row()], [row(ms=20.0, memory_mb=16.0)]))
    assert json.loads(json.dumps(found)) == found
    (change,) = found["changes"]
    assert found["worse"] and change["verdict"] == SLOWER and change["ratio"] == 2.0 and change["memory"] == "more"


def test_the_worst_comes_first():
    old = [row("a"), row("b"), row("c"), row("d")]
    new = [row("a", 5.0), row("b", 20.0), row("c", 40.0), without_time(FAILED, "x", kernel="d")]
    assert [change.new.kernel for change in compared(old, new).changes] == ["d", "c", "b", "a"]


# Words ----------------------------------------------------------------------------------------------------------------


NOT_HERE = "not installed (fix: pip install 'it<2'); no GPU"


def a_run():
    """Two operations, two lengths: torch clearly fastest of one, nobody of the other, and a kernel that cannot run."""
    found = []
    for length in (64, 128):
        slow = 20.0 * (length / 64) ** 2
        found += [
            row("reference", slow, length, ratio=1.0, ratio_low=1.0, ratio_high=1.0, memory_mb=32.0 * length / 64),
            row("torch", slow / 2, length, ratio=2.0, ratio_low=1.8, ratio_high=2.2),
            without_time(UNAVAILABLE, NOT_HERE, kernel="flash_attn", length=length),
            row("reference", slow, length, subject="edge <b>", ratio=1.0, ratio_low=1.0, ratio_high=1.0),
            row("torch", slow / 1.1, length, subject="edge <b>", ratio=1.1, ratio_low=0.9, ratio_high=1.3),
        ]
    return Results(tuple(found), "foldkernels bench", "2026-01-01T00:00:00Z", 3.0)


def test_the_first_sentence_says_what_was_fastest_and_by_how_much():
    words = summary.headline(a_run())
    assert words.startswith(
        "On a CPU, 1 thread: in the forward pass torch is the fastest for attention, 2.0x as fast as"
    )
    assert "no kernel is clearly the fastest for 1 of 2" in words
    assert "1 kernel cannot run here." in words
    assert "All 4 kernels that ran passed the check" in words
    assert "less memory" in words


def test_the_longest_length_decides():
    best = summary.bests(a_run().rows)[0]
    assert (best.row.kernel, best.row.length, best.baseline.kernel) == ("torch", 128, "reference")
    assert best.is_clear and best.memory_ratio == pytest.approx(8.0)
    assert [other.kernel for other in best.others] == ["reference"]


def test_wrong_numbers_are_said_and_nothing_measured_too():
    wrong = without_time(WRONG, "its numbers are wrong", kernel="fast", check="output 0: error 0.5", error=0.5)
    words = summary.headline(Results((row("reference"), wrong)))
    assert "1 of 2 kernels gave wrong numbers and got no time." in words
    nothing = summary.headline(Results((without_time(UNAVAILABLE, "no GPU"),)))
    assert nothing.startswith("Nothing was measured") and "1 kernel cannot run here" in nothing
    assert "Nothing was measured" in summary.headline(Results(()))


def test_a_reason_is_told_once():
    rest = [without_time(NO_TIME, f"about {n} s", kernel="torch", length=n) for n in (256, 512)]
    found = summary.problems([*a_run().rows, *rest])
    assert [(p.kernel, p.status) for p in found] == [("flash_attn", UNAVAILABLE), ("torch", NO_TIME)]
    assert found[0].where == "" and found[1].where == "forward float32 at L=256, 512"
    text = summary.table([*a_run().rows, *rest])
    assert "no GPU" not in text and "(and 1 more reason)" in text


@pytest.mark.parametrize(
    ("value", "said"), [(0.0123, "12.3 us"), (3.14159, "3.14 ms"), (123.4, "123 ms"), (12345.0, "12.3 s"), (None, "")]
)
def test_a_time_has_three_digits(value, said):
    assert summary.milliseconds(value) == said


@pytest.mark.parametrize(("value", "said"), [(0.873, "0.87x"), (1.5, "1.50x"), (2.44, "2.4x"), (38.2, "38x")])
def test_a_ratio_is_said_as_people_do(value, said):
    assert summary.times(value) == said


# Plots and report -----------------------------------------------------------------------------------------------------


def test_a_panel_for_time_and_memory_with_exponents_in_the_legend():
    first, second = series.figures_of(a_run().measured())
    assert (first.subject, second.subject) == ("attention", "edge <b>")
    time, memory = first.panels
    assert [curve.label for curve in time.curves] == ["reference ~ L^2.00", "torch ~ L^2.00"]
    assert [curve.label for curve in memory.curves] == ["reference ~ L^1.00", "torch ~ L^0.00"]
    assert time.x_label.endswith("(residues)") and time.y_label.endswith("(ms)") and memory.y_label.endswith("(MB)")
    assert time.curves[0].points[0] == (64, 20.0, 19.0, 21.0)


def test_memory_of_nothing_is_not_drawn():
    (figure,) = series.figures_of([row(memory_mb=0.0), row(memory_mb=-0.1, length=128)])
    assert [panel.title for panel in figure.panels] == ["forward: time"]


def test_a_drawing_says_what_it_shows():
    panel = series.figures_of(a_run().measured())[0].panels[0]
    text = drawing.svg(panel, "attention", plots.style_of(["reference", "torch"]), 3)
    assert 'role="img"' in text and '<title id="t3">attention: forward: time</title>' in text
    assert "64: 20 ms, 128: 80 ms; grows as L to the power 2.00" in text
    assert "length L (residues)" in text and "median time of a call (ms)" in text
    assert "reference ~ L^2.00" in text


@pytest.mark.parametrize("values", [[1.0, 1.0], [0.02, 3.0], [1.0, 90000.0], [5.0, 5.1], [1e-4, 2e4]])
def test_an_axis_has_room_and_ticks(values):
    axis = drawing._Axis(values, 0.0, 100.0)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 12 or values in ([1.0, 1.0], [5.0, 5.1])
    assert all(-1e-6 <= axis.at(tick) <= 100.0 for tick in ticks)
    assert 0.0 < axis.at(min(values)) <= axis.at(max(values)) < 100.0
    assert math.isfinite(axis.at(values[0]))


def test_pngs_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    results = a_run()
    files = plots.write_plots(series.figures_of(results.measured()), series.kernels_of(results.rows), tmp_path)
    assert [file.name for file in files] == ["attention_float32.png", "edge__b__float32.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def test_the_report_needs_nothing_from_outside():
    text = page.html(a_run())
    assert "http" not in text.replace("http-equiv", "")
    assert "src=" not in text and "@import" not in text and "url(" not in text
    assert text.count("<svg") == 4 and text.count("<title id=") == 4
    assert "edge <b>" not in text and "edge &lt;b&gt;" in text
    assert summary.headline(a_run()) in text.replace("&lt;", "<").replace("&gt;", ">")
    for anchor in ("fastest", "by-length", "correctness", "not-measured", "machine", "every-row"):
        assert f'id="{anchor}"' in text and f'href="#{anchor}"' in text
    assert "pip install &#x27;it&lt;2&#x27;" in text
    assert "a CPU" in text and "prefers-color-scheme:dark" in text


def test_a_report_of_nothing_is_a_page():
    text = page.html(Results(()))
    assert "Nothing was measured" in text and "<svg" not in text


def test_every_style_differs():
    assert len(set(plots.MARKERS)) == len(set(plots.DASHES)) == len(set(plots.COLOURS)) == 7
    assert plots.style_of(list("abcdefgh")) == {**{name: i for i, name in enumerate("abcdefg")}, "h": 0}


# The plan -------------------------------------------------------------------------------------------------------------

KNOWN = Known("attention", ["reference", "torch", "flash_attn"], why={"flash_attn": "no GPU"}, trial_s=0.01)


def test_a_plan_goes_from_short_to_long():
    points = list(Plan(subjects=(), lengths=(16, 32), dtypes=("bfloat16",)).points())
    assert [(point["length"], point["mode"]) for point in points] == [
        (16, FORWARD),
        (16, BACKWARD),
        (32, FORWARD),
        (32, BACKWARD),
    ]


def test_words_choose_kernels_presets_and_what_must_run():
    assert chosen("attention", KNOWN, [], "cpu") == (["reference", "torch", "flash_attn"], set())
    assert chosen("attention", KNOWN, ["torch"], "cpu") == (["torch"], set())
    assert chosen("attention", KNOWN, ["torch"], "cpu", "reference") == (["reference", "torch"], set())
    assert chosen("attention", KNOWN, ["auto"], "cpu") == (["torch"], set())
    ready = replace_why(KNOWN, {})
    assert chosen("attention", ready, ["flash"], "cuda:1") == (["flash_attn"], set())
    assert chosen("attention", KNOWN, ["flash"], "cuda") == (["torch"], set())  # its first choice cannot run
    assert chosen("attention", KNOWN, ["attention=flash_attn"], "cpu") == (["flash_attn"], {"flash_attn"})
    assert chosen("edge_features", KNOWN, ["attention=flash_attn"], "cpu") == ([], set())
    model = Known("multiflow", ["reference", "auto"], alike={"auto": ["torch", "flash"]})
    assert chosen("multiflow", model, ["flash", "reference"], "cpu")[0] == ["reference", "auto"]


def replace_why(known, why):
    return replace(known, why=why)


@pytest.mark.parametrize("word", ["tortch", "attentio=torch", "attention=tortch"])
def test_a_word_that_means_nothing_is_refused(word):
    with pytest.raises(BadInput, match="did you mean"):
        check_words([word], [KNOWN], ["attention", "edge_features"])


def test_words_that_mean_something_are_taken():
    check_words(["torch", "flash", "attention=torch", "edge_features=torch"], [KNOWN], ["attention", "edge_features"])


def test_an_estimate_grows_with_the_length_and_learns():
    known = replace(KNOWN, growth=3.0, trial_length=32)
    point = {"dtype": "float32", "mode": BACKWARD, "length": 256}
    first = known.estimate(point, 2, 7)
    each = 0.7 * 0.01 * 8**3
    assert first == pytest.approx(2 * (7 + CALLS_BESIDE) * each + CHECK_CALLS * 4 * 0.01)
    assert known.estimate({**point, "mode": FORWARD}, 2, 7) == pytest.approx(
        0.3 * 2 * (7 + CALLS_BESIDE) * each + CHECK_CALLS * 4 * 0.01
    )
    # Calls of 0.1 and 0.2 s, and 1 s of something else: the calls grow with the length's third power, the rest with it.
    calls = (7 + CALLS_BESIDE) * 0.3
    known.learn({**point, "length": 128}, [0.1, 0.2], 7, calls + 1.0)
    assert known.estimate(point, 2, 7) == pytest.approx(8 * calls + 2.0)
    # A short call is repeated until a sample lasts 20 ms.
    known.learn({**point, "length": 256}, [1e-5], 7, 0.0)
    assert known.estimate(point, 1, 7) == pytest.approx(7 * SAMPLE_S, rel=1e-2)


def test_rows_know_what_they_measure():
    assert row().key == row(ms=99.0, machine={}).key
    assert str(row()) == "attention torch forward L=64 float32 cpu"
    assert results.STATUSES[0] == MEASURED
