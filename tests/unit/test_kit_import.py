"""What a kit's results must be like to be believed, and what a table is made of."""

from __future__ import annotations

import json
import os
import re
import stat
import zipfile
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from nascompile import beside, cli, kit, kit_import, latency_table, network, profiler, records, remote
from nascompile.errors import RecordError, TableError, UnsupportedError
from nascompile.kit import KitManifest
from nascompile.progress import Silent
from nascompile.settings import toy_recipe

CPU = {"cpu": "Board", "isa": "neon", "machine": "aarch64"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A kit of the toy network; it was not run."""
    folder = tmp_path_factory.mktemp("kits")
    recipe = msgspec.structs.replace(toy_recipe(), device="cpu", backend="onnxruntime")
    beside.export_kit(recipe, None, folder / "kit", processor="arm")
    return folder / "kit"


@pytest.fixture(scope="module")
def manifest(exported):
    return records.load(exported / "manifest.json", KitManifest)


def ms(graph) -> float:
    """A made-up latency of a graph that no other has; a network's is that of its blocks."""
    if graph is None:
        return 1.0
    if graph.operator == profiler.CALL:
        return 0.3
    if graph.operator:
        return 0.3 + graph.repeat * block_ms(graph.operator)
    return 0.0


def block_ms(operator) -> float:
    return 0.01 + 0.001 * sum(size for _, size in operator.dims) / (2 if operator.precision.name == "int8" else 1)


def timing(value, noisy=False):
    factors = (0.99, 1, 1.3 if noisy else 1.02, 1.5, 2)  # a lower quartile is what counts
    return {"n": 40, "quantiles": [[level, value * f] for level, f in zip((0.1, 0.25, 0.5, 0.9, 0.99), factors, strict=True)]}


def results(exported, manifest, noisy=()):
    """What the script would have written."""
    graphs = {g.id: g for g in manifest.graphs}
    values = {name: ms(g) for name, g in graphs.items()}
    for name, g in graphs.items():
        if g.candidate:
            nodes = network.graph(*family(manifest), manifest.space, g.candidate, manifest.target).nodes
            values[name] = 1.1 * (0.3 + sum(block_ms(node.operator) for node in nodes))
    windows = []
    for i, window in enumerate(manifest.windows):
        first = {name: timing(values[name], name in noisy) for name in window.graphs}
        if window.reference:
            first["reference"] = timing(1.0)
        disturbed = window.again_seconds and sum(name in noisy for name in first) > manifest.method.disturbed * len(first)
        again = {name: timing(0.99 * values.get(name, 1.0)) for name in first if disturbed}
        windows.append({"window": i, "seconds": 2.0, "first": first, "again": again})
    environment = {
        "device": [["cpu", CPU["cpu"]], ["isa", CPU["isa"]]], "versions": [["onnxruntime", "1.22.1"]],
        "recorded": [["machine", CPU["machine"]], ["cores", 4], ["load_average", 0.1]],
    }  # fmt: skip
    sha = kit.kit_digest((exported / "manifest.json").read_bytes())
    data = {"kit": sha, "emulated": False, "environment": environment, "windows": windows, "seconds": 6.0}
    return {"record": "KitResults", "version": 1, "data": data}


def family(manifest):
    from nascompile.families.toy import PLUGIN, ToyConfig

    return PLUGIN, ToyConfig(**manifest.config)


@pytest.fixture
def good(exported, manifest):
    return results(exported, manifest)


def imported(body, exported, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(body if isinstance(body, str) else json.dumps(body))
    return kit_import.table_of(path, exported, Silent())


def test_rows_are_what_the_profiler_makes_of_the_times(good, exported, manifest, tmp_path):
    table = imported(good, exported, tmp_path)
    wanted = network.operators(*family(manifest), manifest.space, manifest.target)
    assert {row.operator for row in table.rows} == set(wanted)
    assert table.call.value == pytest.approx(0.3)
    for row in table.rows:
        assert row.latency.value == pytest.approx(block_ms(row.operator), rel=1e-9)
        assert (row.latency.kind, row.noisy) == ("measured", False)
    assert table.scale == pytest.approx(1.1)
    assert table.relative_error == latency_table.FLOOR
    assert len({r.candidate for r in (*table.calibration, *table.validation)}) == manifest.networks
    assert (table.seconds, table.drift) == (6.0, 0.0)
    assert table.target == manifest.target


def test_the_environment_is_the_devices(good, exported, manifest, tmp_path):
    table = imported(good, exported, tmp_path)
    match = dict(table.environment.must_match)
    assert list(match) == [
        "cpu", "isa", "threads", *(f"session.{name}" for name, _ in manifest.target.session), "onnxruntime", "lowering",
    ]  # fmt: skip
    assert (match["cpu"], match["onnxruntime"], match["lowering"]) == ("Board", "1.22.1", latency_table.lowering_digest())
    assert dict(table.environment.recorded)["cores"] == 4


def test_a_form_that_would_not_be_built_there_makes_another_environment(good, exported, manifest, tmp_path):
    good["data"]["environment"]["recorded"][0] = ["machine", "x86_64"]
    assert dict(imported(good, exported, tmp_path).environment.must_match)["integers"] == "u8s8"
    good["data"]["environment"]["device"][1] = ["isa", "avx2 avx512_vnni"]
    assert "integers" not in dict(imported(good, exported, tmp_path).environment.must_match)


def test_emulated_times_are_not_measured_ones(good, exported, tmp_path):
    good["data"]["emulated"] = True
    table = imported(good, exported, tmp_path)
    assert {row.latency.kind for row in table.rows} == {"simulated"}
    assert dict(table.environment.must_match)["emulated"] is True


def some_of(manifest, part):
    """So many of the second window's graphs, the reference counted among all, that they are that part of them."""
    names = manifest.windows[1].graphs
    return set(names[: int(part * (len(names) + 1))])


@pytest.mark.parametrize(("part", "again"), [(0.25, False), (0.3, True)])
def test_a_disturbed_window_counts_as_it_was_timed_again(part, again, exported, manifest, tmp_path):
    """All of its rows, also those that were quiet; a few noisy rows are flagged and stay as they are."""
    noisy, graphs = some_of(manifest, part), {g.id: g for g in manifest.graphs}
    table = imported(results(exported, manifest, noisy), exported, tmp_path)
    rows = {row.operator: row for row in table.rows}
    for name in manifest.windows[1].graphs:
        graph, row = graphs[name], rows[graphs[name].operator]
        assert row.latency.value == pytest.approx(((0.99 if again else 1.0) * ms(graph) - 0.3) / graph.repeat)
        assert row.noisy == (name in noisy and not again)


def put(path, value):
    """An edit of the results: `put("windows.1.first.ID.n", 3)`; ID is a graph of the second window, REF the reference."""

    def edit(body, manifest):
        *keys, last = path.replace("ID", manifest.windows[1].graphs[0]).replace("REF", "reference").split(".")
        where = body["data"]
        for key in keys:
            where = where[int(key) if isinstance(where, list) else key]
        if value is None:
            del where[int(last) if isinstance(where, list) else last]
        else:
            where[int(last) if isinstance(where, list) else last] = value

    return edit


ASCENT = [[0.1, 5.0], [0.25, 4.0], [0.5, 6.0], [0.9, 7.0], [0.99, 8.0]]
BAD = {
    "another kit": (put("kit", "0" * 64), TableError, "belong to another kit: 0000"),
    "missing job": (put("windows.1.first.ID", None), RecordError, "was not timed"),
    "missing reference": (put("windows.1.first.REF", None), RecordError, "reference was not timed"),
    "unknown job": (put("windows.1.first.other", timing(1.0)), RecordError, "'other' was timed and not asked for"),
    "unknown second timing": (put("windows.1.again.other", timing(1.0)), RecordError, "'other' was timed again and not asked for"),
    "missing window": (put("windows.2", None), RecordError, r"windows \[2\] are missing"),
    "windows in disorder": (put("windows.0.window", 1), RecordError, r"windows \[0\] are missing"),
    "negative": (put("windows.1.first.ID.quantiles.0.1", -1.0), RecordError, "-1.0 ms is not possible"),
    "zero": (put("windows.1.first.ID.quantiles.0.1", 0.0), RecordError, "0.0 ms is not possible"),
    "absurd": (put("windows.1.first.ID.quantiles.4.1", 1e9), RecordError, "1000000000.0 ms is not possible"),
    "descending": (put("windows.1.first.ID.quantiles", ASCENT), RecordError, "quantiles do not ascend"),
    "other levels": (put("windows.1.first.ID.quantiles.0.0", 0.2), RecordError, r"quantiles \[0.2, 0.25"),
    "a level less": (put("windows.1.first.ID.quantiles.4", None), RecordError, r"quantiles \[0.1, 0.25, 0.5, 0.9\]"),
    "no samples": (put("windows.1.first.ID.n", 0), RecordError, "0 samples"),
    "negative seconds": (put("seconds", -1.0), RecordError, "seconds: -1.0"),
    "negative seconds of a window": (put("windows.1.seconds", -1.0), RecordError, "window 1: seconds: -1.0"),
    "control characters": (put("environment.device.0.1", "a\x1b[2Jb"), RecordError, "'cpu' is no plain word"),
    "a long word": (put("environment.device.0.1", "x" * 501), RecordError, "'cpu' is no plain word"),
    "a field of its own": (put("environment.device.0.0", "lowering"), RecordError, "unknown field 'lowering'"),
    "no device": (put("environment.device", []), RecordError, "does not say what device"),
    "wrong type": (put("windows.1.first.ID.n", "many"), RecordError, "does not have the form"),
    "unknown entry": (put("more", 1), RecordError, "does not have the form"),
}


@pytest.mark.parametrize("name", BAD)
def test_results_that_cannot_be_are_refused(name, good, exported, manifest, tmp_path):
    edit, error, says = BAD[name]
    edit(good, manifest)
    with pytest.raises(error, match=says) as caught:
        imported(good, exported, tmp_path)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"n": 40', '"n": NaN', "results.json is damaged"),
        ('"n": 40', '"n": Infinity', "results.json is damaged"),
        ("1.01", "1e999", "is damaged|not a number"),
        ('"KitResults"', '"Other"', "not a KitResults of version 1: .'Other', 1"),
        ('"version": 1,', '"version": 2,', "not a KitResults of version 1: .'KitResults', 2"),
        ("{", "[" * 100_000 + "{", "results.json is damaged"),
    ],
)
def test_files_that_are_no_results_are_refused(old, new, says, good, exported, tmp_path):
    text = json.dumps(good)
    assert old in text
    with pytest.raises(RecordError, match=says):
        imported(text.replace(old, new, 1), exported, tmp_path)


def test_a_disturbed_window_without_a_second_timing_of_all_is_refused(exported, manifest, tmp_path):
    body = results(exported, manifest, some_of(manifest, 0.3))
    again = body["data"]["windows"][1]["again"]
    del again["reference"]
    with pytest.raises(RecordError, match="window 1: reference was not timed again with the others"):
        imported(body, exported, tmp_path)
    again.clear()
    with pytest.raises(RecordError, match="window 1: it was disturbed and not timed again") as caught:
        imported(body, exported, tmp_path)
    assert "run the kit again" in caught.value.hint


def test_a_kit_of_another_lowering_is_refused(good, exported, tmp_path, monkeypatch):
    monkeypatch.setattr(latency_table, "lowering_digest", lambda: "f" * 16)
    with pytest.raises(TableError, match="not those that this version makes"):
        imported(good, exported, tmp_path)


# ---------------------------------------------------------------------------------------------- manifests that came back


@pytest.fixture
def changed(good, exported, tmp_path):
    """changed(edit): importing the results with a manifest that somebody has edited, both fitting together."""

    def run(edit):
        body = json.loads((exported / "manifest.json").read_bytes())
        edit(body["data"])
        (tmp_path / "kit").mkdir()
        (tmp_path / "kit" / "manifest.json").write_text(json.dumps(body))
        good["data"]["kit"] = kit.kit_digest((tmp_path / "kit" / "manifest.json").read_bytes())
        return imported(good, tmp_path / "kit", tmp_path)

    return run


def wide(data):
    for gene in data["space"]["genes"]:
        if gene["kind"] == "architecture" and gene["name"] != "depth":
            gene["choices"] = list(range(1, gene["choices"][-1] + 1))


HOSTILE = {
    "layers": (lambda d: d["config"].update(layers=10**9), r"'layers' = 1,000,000,000: at most 64"),
    "labels": (lambda d: d["config"].update(num_labels=10**12), r"'num_labels' = 1,000,000,000,000: at most 1,048,576"),
    "choices": (wide, r"its genes name 524,352 operators: at most 20,000"),
    "networks": (lambda d: d.update(networks=10**9), r"calibrated and validated by 1,000,000,000 whole networks: at most 100"),
    "precision": (lambda d: d["space"]["precisions"][0]["weights"].update(bits=2), "precision 'fp32': none of this version"),
    "gene": (lambda d: d["space"]["genes"][1].update(name="layers.9.width"), "'layers.9.width': no architecture gene of the model"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_manifest_that_names_too_much_is_refused_before_anything_is_expanded(name, changed, monkeypatch):
    def expanded(*_):
        raise AssertionError("the space was expanded")

    for function in ("operators", "graph"):
        monkeypatch.setattr(network, function, expanded)
    edit, says = HOSTILE[name]
    with pytest.raises(RecordError) as caught:
        changed(edit)
    assert re.search(says, caught.value.detail)
    assert "your own copy of the kit with --kit" in caught.value.hint


@pytest.mark.parametrize("value", ["wide", None, [1], {}])
def test_a_configuration_that_no_model_can_be_made_of_is_an_error_that_says_so(value, changed):
    with pytest.raises(RecordError, match="does not fit together") as caught:
        changed(lambda data: data["config"].update(hidden=value))
    assert "export the kit again" in caught.value.hint


def test_an_unchanged_manifest_is_taken(changed):
    assert changed(lambda data: None).rows


def test_a_kit_of_a_gpu_makes_a_table_of_it(tmp_path):
    recipe = msgspec.structs.replace(toy_recipe(), device="cpu", backend="onnxruntime")
    made = beside.export_kit(recipe, None, tmp_path / "gpu", provider="cuda", networks=4)
    body = results(tmp_path / "gpu", made)
    gpu = [["gpu", "NVIDIA H100 80GB HBM3"], ["compute_capability", "9.0"], ["driver", "13.0"]]
    body["data"]["environment"]["device"] = gpu
    table = imported(body, tmp_path / "gpu", tmp_path)
    assert [list(pair) for pair in table.environment.must_match[:3]] == gpu
    assert dict(table.environment.must_match)["session.provider"] == "cuda"
    assert {row.operator.precision.name for row in table.rows} == {"fp16", "int8-symmetric"}
    assert {row.operator for row in table.rows} == set(network.operators(*family(made), made.space, made.target))


# ---------------------------------------------------------------------------------------------- where results are


def archive(path, files, **options):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        for name, content in files.items():
            made.writestr(name, content)
    return path


@pytest.fixture
def files(good, exported):
    return {"kit/results.json": json.dumps(good), "kit/manifest.json": (exported / "manifest.json").read_bytes()}


def test_results_are_found_in_a_folder_and_in_an_archive(files, exported, tmp_path):
    there = tmp_path / "kit"
    there.mkdir()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    packed = archive(tmp_path / "back.zip", files)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "results.json").write_text(files["kit/results.json"])
    expected = kit_import.table_of(there, None, Silent())
    for found in (there / "results.json", packed):
        assert kit_import.table_of(found, None, Silent()) == expected
    for place in (exported, packed):
        assert kit_import.table_of(bare / "results.json", place, Silent()) == expected
    with pytest.raises(RecordError, match="no such file") as caught:
        kit_import.table_of(bare, None, Silent())
    assert "--kit" in caught.value.hint
    (there / "results.json").unlink()
    with pytest.raises(RecordError, match="no such file") as caught:
        kit_import.table_of(there, None, Silent())
    assert "run_kit.py" in caught.value.hint


@pytest.mark.parametrize("name", ["../evil", "kit/../../evil", "/etc/evil", "C:/evil", "kit\\..\\..\\evil"])
def test_an_archive_that_leads_outside_is_refused(name, files, tmp_path):
    with pytest.raises(RecordError, match="outside of its folder"):
        kit_import.table_of(archive(tmp_path / "bad.zip", {**files, name: "x"}), None, Silent())


def test_an_archive_with_a_link_is_refused(files, tmp_path):
    path = archive(tmp_path / "bad.zip", files)
    with zipfile.ZipFile(path, "a") as made:
        link = zipfile.ZipInfo("kit/link")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        made.writestr(link, "/etc/passwd")
    with pytest.raises(RecordError, match="has a link: 'kit/link'"):
        kit_import.table_of(path, None, Silent())


def test_archives_that_would_unpack_to_too_much_are_refused(files, tmp_path, monkeypatch):
    path = archive(tmp_path / "back.zip", files)
    monkeypatch.setattr(kit_import, "RATIO", 2)
    with pytest.raises(RecordError, match="unpacks to"):
        kit_import.table_of(path, None, Silent())
    monkeypatch.setattr(kit_import, "RATIO", 2000)
    for limit, says in (("ARCHIVE_BYTES", "would unpack to"), ("ARCHIVE_FILES", "too many files: 2"), ("FILE_BYTES", "too large")):
        with monkeypatch.context() as patch:
            patch.setattr(kit_import, limit, 1)
            with pytest.raises(RecordError, match=says):
                kit_import.table_of(path, None, Silent())


def test_a_header_that_says_less_than_there_is_is_not_believed(files, tmp_path, monkeypatch):
    path = archive(tmp_path / "bad.zip", files)
    entries = zipfile.ZipFile.infolist

    def lying(self):
        for entry in entries(self):
            entry.file_size = 10
        return entries(self)

    monkeypatch.setattr(zipfile.ZipFile, "infolist", lying)
    with pytest.raises(RecordError, match=r"cannot read the archive|is damaged"):
        kit_import.table_of(path, None, Silent())


def test_a_file_that_is_too_large_is_not_read(good, exported, tmp_path, monkeypatch):
    monkeypatch.setattr(kit_import, "FILE_BYTES", 1000)
    with pytest.raises(RecordError, match=r"too large for a results.json"):
        imported(good, exported, tmp_path)


def test_a_damaged_archive_is_refused(tmp_path):
    (tmp_path / "bad.zip").write_bytes(b"PK\x03\x04" + os.urandom(100))
    with pytest.raises(RecordError, match="cannot read the archive"):
        kit_import.table_of(tmp_path / "bad.zip", None, Silent())


# ---------------------------------------------------------------------------------------------- the commands


def invoke(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def test_the_command_stores_the_table(good, exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("results.json").write_text(json.dumps(good))
    done = invoke("kit", "import", "results.json", "--kit", exported, "--tables", "mine", "--json", "-q")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    table = records.load(Path(said["table"]), records.LatencyTable)
    assert Path(said["table"]).parent == Path("mine/cpu")
    assert said["rows"] == len(table.rows)
    assert invoke("kit", "import", "results.json", "--kit", exported).stdout.strip().endswith(".json")
    assert invoke("kit", "import", "nothing.json").exit_code == 1


def test_a_kit_needs_a_device_that_is_known_and_a_backend_that_has_kits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cases = [
        (("--model", "toy", "--device", "board"), "nascompile devices --init board"),
        (("--model", "toy", "--device", "fake"), "there are no kits for fake"),
        (("--model", "toy", "--provider", "rocm"), "unknown provider: rocm"),
        (("--model", "toy", "--backend", "openvino", "--provider", "cuda"), "has no provider cuda"),
        (("--model", "toy", "--processor", "z80"), "unknown processor: z80"),
        ((), "a kit is for one model"),
        (("--model", "toy", "--networks", "0"), "out of range: --networks 0"),
    ]
    for arguments, says in cases:
        done = invoke("kit", "export", "--out", "kit", *arguments)
        assert done.exit_code == 1, done.output
        assert says in done.stderr
        assert not Path("kit").exists()
    Path("kit").mkdir()
    assert "there is something already: kit" in invoke("kit", "export", "--out", "kit", "--model", "toy").stderr


def test_what_a_login_shell_prints_is_no_answer(monkeypatch):
    monkeypatch.setattr(remote.shutil, "which", lambda name: "/usr/bin/ssh")
    connection = remote.Connection("ssh://me@board", "python3", Silent())
    monkeypatch.setattr(connection, "ask", lambda *words, **payload: b"Welcome to board\n{}")
    with pytest.raises(UnsupportedError, match="me@board prints something of its own") as caught:
        connection.probe("onnxruntime")
    assert "Welcome to board" in caught.value.detail
    assert ".bashrc" in caught.value.hint
