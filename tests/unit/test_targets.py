"""Finding devices and making targets."""

from __future__ import annotations

import pytest

from nascompile import places, targets
from nascompile.errors import RecipeError, UnsupportedError
from nascompile.records import Workload


class StubBackend:
    def __init__(self, reason: str = "", devices: tuple[str, ...] = ("cpu",)) -> None:
        self.reason, self.devices = reason, devices

    def unavailable(self) -> str:
        return self.reason

    def session(self) -> tuple[tuple[str, str], ...]:
        return (("optimization", "all"), ("arena", "on"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """An empty working folder, an empty user folder, and three backends of which one is installed."""
    stubs = {"absent": StubBackend("package missing"), "quick": StubBackend(), "fake": StubBackend(devices=("fake",))}
    names, get = targets.plugins.names, targets.plugins.get
    monkeypatch.setattr(targets.plugins, "names", lambda folder: tuple(sorted(stubs)) if folder == "backends" else names(folder))
    monkeypatch.setattr(targets.plugins, "get", lambda folder, name: stubs[name] if folder == "backends" else get(folder, name))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setattr(places.platformdirs, "user_data_path", lambda name: tmp_path / "user")
    return tmp_path


def write(folder, name, text):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.toml").write_text(text)


def test_this_machine_needs_no_profile_and_prefers_an_installed_backend():
    profile = targets.load_profile("cpu")
    assert profile.kind == "cpu"
    assert profile.backends == ("quick", "absent")
    assert profile.threads == 1
    assert targets.device("cpu").name == "cpu"


def test_a_target_takes_defaults_from_profile_and_backend(elsewhere):
    write(elsewhere / "mine", "board", 'kind = "cpu"\nbackends = ["quick", "absent"]\nthreads = 4')
    made = targets.make("board", "", Workload(), session={"arena": "off"}, profiles=elsewhere / "mine")
    assert (made.device, made.backend, made.threads) == ("board", "quick", 4)
    assert made.session == (("arena", "off"), ("optimization", "all"))
    assert targets.make("board", "absent", Workload(), threads=2, profiles=elsewhere / "mine").threads == 2


def test_a_target_has_the_compute_capability_of_its_profile(elsewhere):
    write(elsewhere / "mine", "card", 'kind = "cpu"\nbackends = ["quick"]\ncompute_capability = "8.9"')
    made = targets.make("card", "", Workload(), session={"arena": "off"}, profiles=elsewhere / "mine")
    assert made.session == (("arena", "off"), ("compute_capability", "8.9"), ("optimization", "all"))


@pytest.mark.parametrize(
    ("device", "backend", "threads", "error", "says"),
    [
        ("nothing", "", 0, UnsupportedError, "unknown device: nothing"),
        ("cpu", "fake", 0, UnsupportedError, "no backend named fake"),
        ("cpu", "", -1, RecipeError, "threads must be at least 1: -1"),
    ],
)
def test_a_target_that_cannot_be_is_refused(device, backend, threads, error, says):
    with pytest.raises(error, match=says) as caught:
        targets.make(device, backend, Workload(), threads=threads)
    assert caught.value.hint


def test_auto_is_the_first_backend_that_runs_here(elsewhere):
    write(elsewhere / "mine", "board", 'kind = "cpu"\nbackends = ["absent", "unheard-of", "quick", "fake"]')
    assert targets.runnable("board", elsewhere / "mine") == ("quick", "fake")
    assert targets.make("board", "auto", Workload(), profiles=elsewhere / "mine").backend == "quick"
    assert targets.make("board", "", Workload(), profiles=elsewhere / "mine").backend == "absent"
    assert targets.runnable("cpu") == ("quick",)


def test_auto_without_a_backend_that_runs_says_why_for_each(elsewhere):
    write(elsewhere / "mine", "board", 'kind = "cpu"\nbackends = ["absent", "unheard-of"]')
    with pytest.raises(UnsupportedError, match="no backend that builds for `board` runs here") as caught:
        targets.make("board", "auto", Workload(), profiles=elsewhere / "mine")
    assert caught.value.detail == "absent: package missing\nunheard-of: not installed"
    assert caught.value.hint


def test_the_nearest_profile_wins(elsewhere):
    folders = (elsewhere / "user" / "profiles", elsewhere / "cwd" / "profiles", elsewhere / "mine")
    for threads, folder in enumerate(folders, start=2):
        write(folder, "board", f'kind = "cpu"\nbackends = ["quick"]\nthreads = {threads}')
        assert targets.load_profile("board", elsewhere / "mine").threads == threads
    assert targets.load_profile("board").threads == 3, "without the explicit folder"


@pytest.mark.parametrize("text", ["kind = 3\nbackends = []", 'kind = "cpu"', 'kind = "cpu"\nbackends = []\nspeed = 1', "kind ="])
def test_a_file_that_is_no_profile_is_named(elsewhere, text):
    write(elsewhere / "mine", "bad", text)
    with pytest.raises(RecipeError, match=r"bad\.toml") as caught:
        targets.load_profile("bad", elsewhere / "mine")
    assert "backends" in caught.value.hint
    listed = {d.name: d for d in targets.known(elsewhere / "mine")}
    assert not listed["bad"].runs_here
    assert "bad.toml" in listed["bad"].reason


def test_known_devices_say_why_they_cannot_run(elsewhere):
    write(elsewhere / "mine", "slow", 'kind = "cpu"\nbackends = ["absent"]')
    write(elsewhere / "mine", "alien", 'kind = "quantum"\nbackends = ["quick"]')
    listed = {d.name: d for d in targets.known(elsewhere / "mine")}
    assert next(iter(listed)) == "cpu"
    assert listed["cpu"].runs_here
    assert "cores" in listed["cpu"].reason
    assert not listed["slow"].runs_here
    assert "package missing" in listed["slow"].reason
    assert not listed["alien"].runs_here
    assert "quantum" in listed["alien"].reason


def test_init_writes_a_profile_of_this_machine_once(elsewhere):
    path = targets.init_profile("desk")
    assert path == elsewhere / "cwd" / "profiles" / "desk.toml"
    assert targets.load_profile("desk").backends == ("quick", "absent")
    assert targets.make("desk", "", Workload()).device == "desk"
    with pytest.raises(RecipeError, match="already a device"):
        targets.init_profile("desk")
    for name in ("cpu", "../up", ""):
        with pytest.raises(RecipeError):
            targets.init_profile(name)


def test_the_packaged_simulated_device_is_known():
    profile = targets.load_profile("fake")
    assert (profile.kind, profile.backends) == ("fake", ("fake",))
