"""A kit from export to table: run by a Python that has NumPy and the runtime alone, killed and gone on with, and over ssh."""

from __future__ import annotations

import contextlib
import getpass
import importlib.metadata
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

from nascompile import cli, latency_table, network, plugins, profiler, records, remote, space as spaces, targets
from nascompile.kit import KitManifest
from nascompile.records import LatencyTable, load

SECONDS = "0.5"
"""Timing in all: enough for numbers, not for good ones."""
TOY = ("--model", "toy", "--backend", "onnxruntime", "--networks", "10")


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def export(out: Path, *arguments: object) -> KitManifest:
    done = invoke("kit", "export", "--out", out, "--seconds", SECONDS, "-q", *arguments)
    assert done.exit_code == 0, done.output
    return load(out / "manifest.json", KitManifest)


@pytest.fixture(scope="session")
def toy_kit(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "kit"
    export(folder, *TOY)
    return folder


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory: Any) -> Callable[..., list[str]]:
    """bare_python(script, …): a command whose Python sees the standard library, NumPy and a runtime, and no other package."""
    folder = tmp_path_factory.mktemp("packages")

    def command(*words: object, runtime: str = "onnxruntime") -> list[str]:
        there = folder / runtime
        if not there.exists():
            there.mkdir()
            for package in ("numpy", runtime):
                found = importlib.metadata.distribution(package)
                for top in {Path(str(path)).parts[0] for path in found.files or ()} - {"..", "__pycache__"}:
                    (there / top).symlink_to(Path(str(found.locate_file(top))))
        begin = f"import sys; sys.path.insert(0, {str(there)!r}); sys.argv = sys.argv[1:]"
        run = "import runpy; runpy.run_path(sys.argv[0], run_name='__main__')"
        return [sys.executable, "-I", "-S", "-c", f"{begin}; {run}", *map(str, words)]

    return command


@pytest.fixture
def kit(toy_kit: Path, elsewhere: Path) -> Path:
    """A copy to run."""
    shutil.copytree(toy_kit, elsewhere / "there")
    return elsewhere / "there"


def timed(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd="/")


def table_of(*arguments: object) -> LatencyTable:
    done = invoke("kit", "import", *arguments, "--json", "-q")
    assert done.exit_code == 0, done.output
    return load(Path(json.loads(done.stdout)["table"]), LatencyTable)


# ---------------------------------------------------------------------------------------------- there and back


def test_the_bare_python_is_bare(bare_python: Any, tmp_path: Path) -> None:
    script = tmp_path / "look.py"
    script.write_text(
        "import importlib.util as u, json, sys\n"
        "print(json.dumps({n: u.find_spec(n) is not None for n in ('numpy', 'onnxruntime', 'nascompile', 'onnx', 'torch', 'msgspec')}))"
    )
    found = json.loads(timed(bare_python(script)).stdout)
    assert {name for name, there in found.items() if there} == {"numpy", "onnxruntime"}


def test_a_kit_is_run_elsewhere_and_its_table_predicts(kit: Path, toy_kit: Path, bare_python: Any) -> None:
    done = timed(bare_python(kit / "run_kit.py"))
    assert done.returncode == 0, done.stdout + done.stderr
    for word in ("processor", "runtime    onnxruntime", "1 thread(s)", "left", "done:"):
        assert word in done.stdout
    manifest = load(toy_kit / "manifest.json", KitManifest)
    table = table_of(kit / "results.json", "--kit", toy_kit)
    family, config = plugins.get("families", "toy"), _config(manifest)
    wanted = network.operators(family, config, manifest.space, manifest.target)
    assert {row.operator for row in table.rows} == set(wanted)
    for r in (*table.calibration, *table.validation):
        found = latency_table.predict(table, network.graph(family, config, manifest.space, r.candidate, table.target))
        assert 0 < found.low < found.value < found.high
    assert {row.latency.kind for row in table.rows} == {"measured"}

    here = targets.device("cpu").environment(table.target, plugins.get("backends", "onnxruntime").versions())
    assert latency_table.differences(table.environment, here) == (), "made on this machine, so it is this machine's"


def _config(manifest: KitManifest) -> Any:
    from nascompile.families.toy import ToyConfig

    return ToyConfig(**manifest.config)


def test_a_kit_holds_what_the_profiler_would_time(toy_kit: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The profiler's own graphs, built here, are the kit's but for the weights' values; so are its windows."""
    from nascompile import kit_template

    manifest = load(toy_kit / "manifest.json", KitManifest)
    backend, config = plugins.get("backends", "onnxruntime"), _config(manifest)
    family = plugins.get("families", "toy")
    seen: dict[str, Any] = {}

    class Bench(profiler.Bench):
        def _job(self, name: str, model: Any, scratch: Path) -> Any:
            seen[f"{name} {len(seen)}"] = model
            return super()._job(name, model, scratch)

    bench = Bench(family, config, manifest.space, manifest.target, backend, elsewhere / "bench", manifest.seed)
    graphs = [g for g in manifest.graphs if g.operator]
    wanted = set(network.operators(family, config, manifest.space, manifest.target))
    assert {g.operator for g in graphs} == {*wanted, profiler.CALL}
    assert (manifest.operators, manifest.rows) == (wanted, len(wanted)), "a call is no row"
    own = [g for g in graphs if g.operator == profiler.CALL] + graphs[::5] + [g for g in manifest.graphs if g.candidate][::4]
    monkeypatch.setattr(kit_template, "HERE", toy_kit)
    for graph in own:
        if graph.operator:
            bench.operator(graph.operator, graph.repeat, elsewhere)
        else:
            assert graph.candidate is not None
            bench.network(graph.candidate, elsewhere)
        model = list(seen.values())[-1]
        (part,) = json.loads(records.encode(graph.parts))
        kit_template.restore(part, elsewhere, 0)
        restored = onnx.load(elsewhere / "model.onnx")
        assert restored.graph.node == model.graph.node
        tensors = [{t.name: (t.data_type, tuple(t.dims)) for t in m.graph.initializer} for m in (restored, model)]
        assert tensors[0] == tensors[1]
    repeats = {g.operator: g.repeat for g in graphs if g.id in manifest.windows[1].graphs and g.operator}
    assert all(repeats[o] == bench.copies(o) for o in repeats)
    call, *_, depths, _ = [[g for name in w.graphs for g in manifest.graphs if g.id == name] for w in manifest.windows]
    assert [(g.operator, g.repeat) for g in call] == [(profiler.CALL, 1)]
    for precision in ("fp32", "int8"):
        stacks = [g for g in depths if g.operator and g.operator.precision.name == precision]
        assert len({g.operator for g in stacks}) == 1 < len({g.repeat for g in stacks}) == len(stacks)


def test_whole_networks_are_spread_over_their_size(toy_kit: Path) -> None:
    manifest = load(toy_kit / "manifest.json", KitManifest)
    family, config = plugins.get("families", "toy"), _config(manifest)
    found = [g.candidate for g in manifest.graphs if g.candidate]

    def ms(candidate: Any) -> float:
        """A microsecond for each operator, and 20 ps for each product of float32."""
        graph = network.graph(family, config, manifest.space, candidate, manifest.target)
        return sum(1e-3 + 2e-8 * node.macs * node.operator.precision.weights.bits / 32 for node in graph.nodes)

    def spread(found: Any) -> float:
        return float(np.abs(np.sort([ms(c) for c in found]) - places).mean() / (high - low))

    assert len(found) == len(set(found)) == 10
    blocks = [{name for _, genes in c.precision for _, name in genes} for c in found]
    assert min(blocks.count({"fp32"}), blocks.count({"int8"})) >= 3, "a third for each precision, a third for mixed ones"
    low, high = ms(spaces.smallest(manifest.space, "int8")), ms(spaces.largest(manifest.space))
    places = np.sort([low + (high - low) * (i + 0.5) / n for n in (3, 3, 4) for i in range(n)])
    assert spread(found) < 0.075, "0.068, since there are few depths; of forty random tens the best has 0.08, and typical is 0.13"


def test_a_kit_of_openvino(elsewhere: Path, bare_python: Any) -> None:
    export(elsewhere / "kit", "--model", "toy", "--backend", "openvino", "--processor", "here", "--networks", "4")
    done = timed(bare_python(elsewhere / "kit" / "run_kit.py", runtime="openvino"))
    assert done.returncode == 0, done.stdout + done.stderr
    table = table_of(elsewhere / "kit")
    assert dict(table.environment.must_match)["openvino"] == importlib.metadata.version("openvino")
    here = targets.device("cpu").environment(table.target, plugins.get("backends", "openvino").versions())
    assert latency_table.differences(table.environment, here) == ()


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_kit_for_a_gpu_has_standard_graphs_that_run(provider: str, elsewhere: Path, bare_python: Any) -> None:
    """By the processor's provider: there is no GPU here. What is shown is that they load and give numbers."""
    manifest = export(elsewhere / "kit", "--model", "toy", "--backend", "onnxruntime", "--provider", provider, "--networks", "4")
    assert {p.name for p in manifest.space.precisions} == {"fp16", "int8-symmetric"}
    assert dict(manifest.target.session)["provider"] == provider
    assert manifest.packages[0] == "onnxruntime-gpu"
    call, stacks = [[g for g in manifest.graphs if g.id in w.graphs] for w in manifest.windows if not w.reference]
    assert [g.operator for g in call] == [profiler.CALL]
    assert {g.operator.precision.name for g in stacks if g.operator} == {"fp16", "int8-symmetric"}
    done = timed(bare_python(elsewhere / "kit" / "run_kit.py", "--check", "--provider", "cpu"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": runs") == len(manifest.graphs)
    refused = timed(bare_python(elsewhere / "kit" / "run_kit.py"))
    assert refused.returncode == 1
    assert "has no " in refused.stderr
    assert "pip install onnxruntime-gpu numpy" in refused.stderr


def test_a_zip_of_a_kit_is_its_folder(toy_kit: Path, elsewhere: Path) -> None:
    done = invoke("kit", "export", "--out", "kit.zip", "--seconds", SECONDS, "-q", *TOY, "--json")
    assert done.exit_code == 0, done.output
    with zipfile.ZipFile("kit.zip") as packed:
        assert packed.testzip() is None
        content = {name.partition("/")[2]: packed.read(name) for name in packed.namelist()}
    folder = {p.relative_to(toy_kit).as_posix(): p.read_bytes() for p in toy_kit.rglob("*") if p.is_file()}
    assert content == folder, "and making one again gives the same bytes, which is what makes a run over ssh resumable"
    said = json.loads(done.stdout)
    assert (said["graphs"], said["bytes"]) == (len(json.loads(content["manifest.json"])["data"]["graphs"]), said["bytes"])
    assert said["bytes"] < 2_000_000


# ---------------------------------------------------------------------------------------------- on the device


def lines(kit: Path) -> list[str]:
    path = kit / "results.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def test_a_killed_run_goes_on_where_it_was(kit: Path, toy_kit: Path, bare_python: Any) -> None:
    process = subprocess.Popen(bare_python(kit / "run_kit.py"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(lines(kit)) < 2 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = lines(kit)
    assert 2 <= len(kept) <= 4, "killed in the middle, not at its end"
    assert not (kit / "results.json").exists()
    with (kit / "results.jsonl").open("a") as stream:
        stream.write('{"window": 1, "first": {"a"')  # in the middle of a line
    done = timed(bare_python(kit / "run_kit.py"))
    assert done.returncode == 0, done.stderr
    assert f"going on after {len(kept) - 1} of 4 windows" in done.stdout
    assert lines(kit)[: len(kept)] == kept
    assert len(lines(kit)) == 5
    table_of(kit / "results.json", "--kit", toy_kit)


def test_a_second_process_is_turned_away(kit: Path, bare_python: Any) -> None:
    fcntl = pytest.importorskip("fcntl")
    with (kit / "results.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = timed(bare_python(kit / "run_kit.py"))
    assert done.returncode == 3
    assert "another process is timing this kit" in done.stderr


def test_a_journal_of_another_machine_is_not_gone_on_with(kit: Path, bare_python: Any) -> None:
    assert timed(bare_python(kit / "run_kit.py")).returncode == 0
    head, *rest = lines(kit)
    other = json.loads(head)
    other["versions"] = [["onnxruntime", "1.0"]]
    (kit / "results.jsonl").write_text("\n".join([json.dumps(other), *rest]) + "\n")
    done = timed(bare_python(kit / "run_kit.py"))
    assert done.returncode == 1
    assert "begun with another versions" in done.stderr
    assert "hint: remove" in done.stderr


def edited(kit: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    body = json.loads((kit / "manifest.json").read_text())
    edit(body["data"])
    (kit / "manifest.json").write_text(json.dumps(body))


def test_what_a_device_lacks_is_said_with_a_remedy(kit: Path, bare_python: Any, tmp_path: Path) -> None:
    plain = [sys.executable, "-I", "-S", str(kit / "run_kit.py")]
    assert "pip install numpy" in timed(plain).stderr
    script = bare_python(kit / "run_kit.py")
    done = timed(bare_python(kit / "run_kit.py", runtime="openvino"))
    assert done.returncode == 1
    assert "onnxruntime cannot be imported here" in done.stderr
    assert "-m pip install onnxruntime numpy" in done.stderr
    edited(kit, lambda data: data.update(wanted=[["onnxruntime", "99.0"]]))
    assert "is too old for this kit: 99.0" in timed(script).stderr
    graph = next(kit.glob("graphs/*/*"))
    graph.write_bytes(graph.read_bytes()[:-1])
    assert "1 files of the kit are damaged or missing, such as graphs/" in timed(script).stderr


def test_emulated_times_stay_what_they_are(kit: Path, bare_python: Any) -> None:
    done = timed(bare_python(kit / "run_kit.py", "--emulated"))
    assert done.returncode == 0, done.stderr
    said = invoke("kit", "import", kit, "--tables", "mine", "-q")
    assert "EMULATED" in said.stderr
    (path,) = Path("mine/cpu").glob("*.json")
    assert {row.latency.kind for row in load(path, LatencyTable).rows} == {"simulated"}


@pytest.mark.slow
def test_a_vision_transformer_in_an_environment_made_by_pip(elsewhere: Path) -> None:
    """A fresh virtual environment with what a user would install and nothing else."""
    manifest = export(elsewhere / "kit", "--model", "demo", "--backend", "onnxruntime", "--seconds", "5")
    subprocess.run([sys.executable, "-m", "venv", "fresh"], check=True)
    wanted = [f"{name}=={importlib.metadata.version(name)}" for name in ("numpy", "onnxruntime")]
    subprocess.run(["fresh/bin/pip", "install", "-q", *wanted], check=True)
    done = timed([str(elsewhere / "fresh/bin/python"), str(elsewhere / "kit/run_kit.py")])
    assert done.returncode == 0, done.stdout + done.stderr
    table = table_of(elsewhere / "kit")
    assert {row.operator for row in table.rows} == {g.operator for g in manifest.graphs if g.operator}
    assert len(table.rows) > 10
    assert table.relative_error < 1


# ---------------------------------------------------------------------------------------------- over ssh


@pytest.fixture
def board(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A device `board` behind an ssh server on the loopback: keys, configuration and home folder of its own."""
    server = shutil.which("sshd") or "/usr/sbin/sshd"
    if not Path(server).is_file() or shutil.which("ssh") is None:
        reason = "no ssh server here: apt install openssh-server"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    folder = elsewhere / "ssh"
    folder.mkdir(mode=0o700)
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    (folder / "authorized").write_bytes((folder / "user.pub").read_bytes())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = elsewhere / "home"
    home.mkdir()
    (folder / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1\nPort {port}\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/authorized\nStrictModes no\n"
        f"PasswordAuthentication no\nUsePAM no\nPidFile none\nForceCommand cd {home} && sh -c \"$SSH_ORIGINAL_COMMAND\"\n"
    )
    (folder / "config").write_text(
        f"Host 127.0.0.1\n  IdentityFile {folder}/user\n  IdentitiesOnly yes\n  UserKnownHostsFile {folder}/known\n"
        "  StrictHostKeyChecking accept-new\n  LogLevel ERROR\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where a server run by root wants to lock its children in
    process = subprocess.Popen([server, "-D", "-e", "-f", folder / "sshd_config"], stderr=(folder / "log").open("wb"))
    monkeypatch.setenv(remote.CONFIG, str(folder / "config"))
    monkeypatch.setattr(remote, "PAUSES", (0.2, 0.5, 1, 2))
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            break
        time.sleep(0.05)
    Path("profiles").mkdir()

    def profile(transport: str = f"ssh://{getpass.getuser()}@127.0.0.1:{port}", python: str = sys.executable) -> None:
        text = f'kind = "cpu"\nbackends = ["onnxruntime"]\ntransport = "{transport}"\npython = "{python}"\n'
        Path("profiles/board.toml").write_text(text)

    profile()
    yield type("Board", (), {"home": home, "profile": staticmethod(profile), "port": port, "server": process})
    process.terminate()
    process.wait()


def there(board: Any) -> Path:
    (found,) = (board.home / remote.FOLDER).iterdir()
    return Path(found)


PROFILE = ("profile", "--model", "toy", "--device", "board", "--backend", "onnxruntime", "--max-drop", "5", "--tables", "mine")
RUN = ("--out", "run")


def test_a_transport_is_said_and_a_wrong_one_refused(elsewhere: Path) -> None:
    Path("profiles").mkdir()
    for name, transport in (("board", "ssh://me@board.lan:2222"), ("odd", "ssh://-oProxyCommand=evil@x"), ("http", "http://x")):
        Path(f"profiles/{name}.toml").write_text(f'kind = "cpu"\nbackends = ["onnxruntime"]\ntransport = "{transport}"\n')
    said = {d["name"]: d for d in json.loads(invoke("devices", "--json").stdout)}
    assert (said["board"]["runs_here"], said["board"]["reason"]) == (
        False, "not here: `nascompile profile` reaches it by ssh as me@board.lan:2222",
    )  # fmt: skip
    for name in ("odd", "http"):
        assert said[name]["reason"].startswith("not a transport")
    done = invoke("run", "--model", "toy", "--device", "board", "--max-drop", "5", "--out", "run")
    assert done.exit_code == 1
    assert "its engines cannot be measured from here yet" in done.stderr


def test_without_ssh_there_is_no_way(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(elsewhere))
    with pytest.raises(remote.UnsupportedError, match="ssh is not installed here"):
        remote.Connection("ssh://board", "python3", None)  # type: ignore[arg-type]


@pytest.mark.slow
def test_one_command_profiles_over_ssh_and_copies_only_what_is_missing(board: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    done = invoke(*PROFILE, *RUN)
    assert done.exit_code == 0, done.output
    (path,) = Path("mine/board").glob("*.json")
    table = load(path, LatencyTable)
    assert dict(table.environment.must_match)["cpu"] == dict(targets.device("cpu").environment(table.target, ()).must_match)["cpu"]
    assert load(Path("run/table.json"), LatencyTable) == table
    assert "copying" in done.stderr
    (folder,) = (board.home / remote.FOLDER).iterdir()

    monkeypatch.setattr(profiler, "CANARY", 0.9)  # a server, a client and a test share the processor
    again = invoke(*PROFILE, "--out", "second")
    assert again.exit_code == 0, again.output
    assert "timing 5 operators again" in again.stderr
    assert "using the latency table" in again.stderr, "what is stored is found again by what the device says of itself"

    shutil.rmtree("mine")
    shutil.rmtree("run")
    changed = sorted(folder.glob("graphs/*/*"))[:2]
    changed[0].write_bytes(b"damaged")
    changed[1].unlink()
    third = invoke(*PROFILE, *RUN)
    assert third.exit_code == 0, third.output
    assert "copying 2 of " in third.stderr
    assert "going on after 4 of 4 windows" in third.stderr


@pytest.mark.slow
def test_a_dropped_connection_is_survived(board: Any) -> None:
    """The server's process for the session is killed in the middle; the run there is the same one afterwards."""
    command = [sys.executable, "-m", "nascompile.cli", *PROFILE, *RUN]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline, dropped = time.monotonic() + 120, 0
        while process.poll() is None and time.monotonic() < deadline and dropped < 2:
            running = list((board.home / remote.FOLDER).glob("*/results.jsonl"))
            if running and not list((board.home / remote.FOLDER).glob("*/results.json")):
                sessions = children(board.server.pid)
                for pid in sessions:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                dropped += bool(sessions)
                time.sleep(1.5)
            time.sleep(0.05)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    assert dropped, said
    assert process.returncode == 0, said
    assert "connection lost, trying again" in said
    log = (there(board) / "run.log").read_text()
    assert log.count("kit        ") == 1, "it was started once"
    assert len(list(Path("mine/board").glob("*.json"))) == 1


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_an_interrupted_command_is_gone_on_with(board: Any) -> None:
    command = [sys.executable, "-m", "nascompile.cli", *PROFILE, *RUN]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what a shell starts in the background ignores it
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if list((board.home / remote.FOLDER).glob("*/results.jsonl")):
            break
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    done = invoke(*PROFILE, *RUN)
    assert done.exit_code == 0, done.output
    assert "copying" not in done.stderr, "the kit was there"


@pytest.mark.slow
def test_what_stands_in_the_way_there_is_said(board: Any, elsewhere: Path) -> None:
    board.profile(python="no-such-python")
    done = invoke(*PROFILE, *RUN)
    assert done.exit_code == 1
    assert "has no no-such-python" in done.stderr
    empty = elsewhere / "bare"
    empty.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    empty.chmod(0o755)
    board.profile(python=str(empty))
    done = invoke(*PROFILE, *RUN)
    assert "has no onnxruntime and no numpy" in done.stderr
    assert "-m pip install onnxruntime numpy" in done.stderr
    board.profile(transport=f"ssh://{getpass.getuser()}@127.0.0.1:1")
    done = invoke(*PROFILE, *RUN)
    assert "cannot reach" in done.stderr
    assert "must work without a question first" in done.stderr


@pytest.mark.slow
def test_a_table_is_tried_again_on_the_device_it_is_of(board: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By `table validate` and by everything that uses it; each time anew."""
    assert invoke(*PROFILE, *RUN, "-q").exit_code == 0
    (path,) = Path("mine/board").glob("*.json")
    plain = invoke("table", "validate", path, "--json")
    assert plain.exit_code == 0, plain.output
    assert json.loads(plain.stdout)["canary"] is None

    monkeypatch.setattr(profiler, "CANARY", 0.9)
    monkeypatch.setattr(profiler, "CANARY_SECONDS", 0.2)
    before = set((board.home / remote.FOLDER).iterdir())
    canary = ("table", "validate", path, "--canary")
    for source in (("--model", "toy"), ("--model", "toy"), ("--run", "run")):
        done = invoke(*canary, *source, "--json")
        assert done.exit_code == 0, done.output
        assert 0.1 < json.loads(done.stdout)["canary"] < 1.9
    logs = [(place / "run.log").read_text() for place in set((board.home / remote.FOLDER).iterdir()) - before]
    assert sum(log.count("[1/1] 5 operators") for log in logs) == 3, "timed every time"
    assert len(logs) < 3, "and copied once for what is the same"
    assert not any("going on after" in log for log in logs)

    table = load(path, LatencyTable)
    assert table.call
    call = latency_table.rescaled(table.call, 0.1)
    rows = tuple(records.TableRow(operator=r.operator, latency=latency_table.rescaled(r.latency, 0.1)) for r in table.rows)
    fast = msgspec.structs.replace(table, rows=rows, call=call, relative_error=9.0)
    records.save(fast, path)
    for command in ((*canary, "--model", "toy"), (*PROFILE, "--out", "second")):
        done = invoke(*command)
        assert done.exit_code == 1
        assert "board is not as fast as when its latency table was made" in done.stderr
        assert "nascompile profile --fresh" in done.stderr
    elsewhere = records.Environment(must_match=(("cpu", "Another"), *table.environment.must_match[1:]))
    records.save(msgspec.structs.replace(table, environment=elsewhere), path)
    done = invoke("table", "validate", path)
    assert done.exit_code == 1
    assert "cpu: table has Another" in done.stderr


@pytest.mark.slow
def test_a_fresh_table_over_ssh_is_timed_and_not_fetched_again(board: Any) -> None:
    assert invoke(*PROFILE, *RUN, "-q").exit_code == 0
    (place,) = (board.home / remote.FOLDER).iterdir()
    first = lines(place)
    done = invoke(*PROFILE, *RUN, "--fresh")
    assert done.exit_code == 0, done.output
    assert "copying" not in done.stderr
    assert "going on after" not in done.stderr
    assert len(list(Path("mine/board").glob("*.json"))) == 2
    assert lines(place)[1:] != first[1:], "other times"
    assert not Path("run/profiling-fresh").exists()
    token = (place / "agent.token").read_text()
    assert invoke(*PROFILE, *RUN, "--fresh", "-q").exit_code == 0
    assert (place / "agent.token").read_text() != token
    refused = invoke(*PROFILE, "--out", "new", "--add-missing", "--threads", "2")
    assert refused.exit_code == 1
    assert "no latency table of this environment to add operators to: board, onnxruntime" in refused.stderr


@pytest.mark.slow
def test_a_search_for_this_machine_and_one_over_ssh_makes_the_tables_of_both(board: Any) -> None:
    done = invoke(
        "search", "--model", "toy", "--device", "cpu:onnxruntime", "--device", "board", "--max-drop", "50", "--evaluations", "4",
        "--epochs", "1", "--teacher-epochs", "1", "--tables", "mine", *RUN,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    front = load(Path("run/front.json"), records.Front)
    assert [target.device for target in (front.target, *front.also)] == ["cpu", "board"]
    assert [device for device, _ in front.absent] == [front.also[0].id]
    stored = {p.parent.name for p in Path("mine").glob("*/*.json")}
    assert stored == {"cpu", "board"}
    assert load(Path("run/tables/board-onnxruntime-t1.json"), LatencyTable).target.device == "board"
