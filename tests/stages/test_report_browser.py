"""The report as a browser shows it: charts, hover, colours, widths, and that nothing is fetched."""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import json
import os
import re
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from nascompile import explain, fronts, journal
from nascompile.progress import Silent
from nascompile.records import Candidate, Choice, Elsewhere, EngineManifest, Evaluation, Front, load, save
from nascompile.report import report

ROOT = Path(__file__).parents[2]
NARROW, WIDE = (390, 844), (1440, 900)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip


class Browser:
    """One Chromium page, spoken to over its debugging pipe; every request and every complaint of the page is kept."""

    def __init__(self, executable: str, profile: Path) -> None:
        (self.ours_in, theirs_out), (theirs_in, self.ours_out) = os.pipe(), os.pipe()
        # Chromium reads commands from descriptor 3 and writes answers to 4
        launch = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self.process = subprocess.Popen(
            ["bash", "-c", launch, executable, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        self.buffer, self.count, self.session = b"", 0, ""
        self.requests: list[str] = []
        self.complaints: list[str] = []
        page = next(t for t in self.send("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self.send("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The command's result."""
        self.count += 1
        body = {"id": self.count, "method": method, "params": parameters} | ({"sessionId": self.session} if self.session else {})
        os.write(self.ours_out, json.dumps(body).encode() + b"\0")
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            message = self.receive(deadline)
            if message.get("id") == self.count:
                assert "error" not in message, f"{method}: {message['error']}"
                return dict(message["result"])
        raise AssertionError(f"Chromium did not answer {method} within 60 s")

    def receive(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.ours_in], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "Chromium went silent"
            part = os.read(self.ours_in, 1 << 20)
            assert part, f"Chromium ended: {self.process.wait()}"
            self.buffer += part
        line, _, self.buffer = self.buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        match message.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])
            case "Runtime.exceptionThrown":
                self.complaints.append(str(message["params"]["exceptionDetails"]))
            case "Log.entryAdded":
                self.complaints.append(message["params"]["entry"]["text"])
        return message

    def evaluate(self, expression: str) -> Any:
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, expression: str) -> Any:
        """The expression's first true value; fails after 30 s."""
        for _ in range(300):
            if value := self.evaluate(expression):
                return value
            time.sleep(0.1)
        raise AssertionError(f"never true in the page: {expression}")

    def open(self, page: Path, size: tuple[int, int], scheme: str) -> None:
        """Show a file; returns when the charts are drawn."""
        self.requests.clear()
        self.complaints.clear()
        self.send("Emulation.setDeviceMetricsOverride", width=size[0], height=size[1], deviceScaleFactor=1, mobile=size[0] < 640)
        self.send("Emulation.setEmulatedMedia", media="", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.send("Page.navigate", url=page.as_uri())
        here = json.dumps(page.as_uri())
        self.until(f"location.href === {here} && document.readyState === 'complete' && document.documentElement.dataset.drawn")

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        answer = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))

    def close(self) -> None:
        with contextlib.suppress(AssertionError, OSError):
            self.session = ""
            self.send("Browser.close")
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.ours_in)
        os.close(self.ours_out)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    executable = shutil.which("chromium")
    if executable is None:
        reason = "no `chromium` on PATH: the report's browser tests need it (apt-get install -y chromium)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    found = Browser(executable, tmp_path_factory.mktemp("chromium"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = importlib.util.spec_from_file_location("sample_run", ROOT / "tools" / "sample_run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return report(module.write(tmp_path_factory.mktemp("runs") / "sample"))[0]


@pytest.fixture(scope="module")
def shared_page(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run as if it had been for two devices, the second of which is not here and twice as fast without depth."""
    run = Path(shutil.copytree(page.parent, tmp_path_factory.mktemp("runs") / "shared"))
    front = load(run / "front.json", Front)
    other = msgspec.structs.replace(front.target, device="pi4-in-the-cellar", threads=4)

    def both(e: Evaluation) -> Evaluation:
        ms = e.latency.value * (2.5 - 0.3 * e.candidate.value("depth"))
        latency = msgspec.structs.replace(e.latency, value=ms, low=0.9 * ms, high=1.1 * ms)
        there = Elsewhere(target=other.id, score=e.score, latency=latency, size_bytes=e.size_bytes)
        return msgspec.structs.replace(e, elsewhere=(there,))

    scored = [both(e) for e in journal.read(run / "journal.jsonl", Evaluation)]
    (run / "journal.jsonl").unlink()
    for e in scored:
        journal.append(run / "journal.jsonl", e)
    evaluations, absent = tuple(map(both, front.evaluations)), ((other.id, "its tables were taken on Cortex-A72, this is another"),)
    save(msgspec.structs.replace(front, also=(other,), absent=absent, evaluations=evaluations), run / "front.json")
    choice = load(run / "choice.json", Choice)
    candidate = load(run / "engines" / choice.engine / "manifest.json", EngineManifest).candidate
    assert candidate
    save(candidate, run / "subnets" / choice.engine / "candidate.json")
    return report(run)[0]


@pytest.fixture(scope="module")
def explained_page(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run with what its search has learned; latencies of two made-up devices."""
    run = Path(shutil.copytree(page.parent, tmp_path_factory.mktemp("runs") / "explained"))
    front = load(run / "front.json", Front)
    scored = fronts.scored(run / "journal.jsonl", front)

    def latencies(point: Candidate) -> tuple[float, float]:
        widths = sum(value for name, value in point.architecture if name != "depth")
        return 0.001 * widths, 0.2 * point.value("depth")

    found = explain.explain(front.space, front, scored, latencies, 0, Silent())
    save(msgspec.structs.replace(found, targets=("here", "<i>pi4</i>")), run / "explain.json")
    return report(run)[0]


CHARTS = {"plot-front", "plot-prediction", "plot-operators", "plot-agreement", "plot-search"}
SCREENS = [(size, scheme) for size in (NARROW, WIDE) for scheme in ("light", "dark")]


@pytest.mark.parametrize(("size", "scheme"), SCREENS, ids=[f"{size[0]}-{scheme}" for size, scheme in SCREENS])
def test_charts_are_drawn_without_complaint_overflow_or_request(browser: Browser, page: Path, size: tuple[int, int], scheme: str) -> None:
    check_page(browser, page, size, scheme, CHARTS)


@pytest.mark.parametrize("size", [NARROW, WIDE], ids=["narrow", "wide"])
def test_so_are_those_of_two_devices(browser: Browser, shared_page: Path, size: tuple[int, int]) -> None:
    check_page(browser, shared_page, size, "light", CHARTS | {"plot-device-0", "plot-device-1"})
    names = browser.evaluate("document.getElementById('plot-device-1').data.map(t => t.name)")
    assert names == ["scored", "front of this device", "shared front", "chosen network"]
    facts = json.loads((shared_page.parent / "report.json").read_text())["devices"]["devices"][1]
    assert browser.evaluate("document.getElementById('plot-device-1').data[1].x") == [p["latency_ms"] for p in facts["front"]]
    assert [d["chosen"]["kind"] for d in json.loads((shared_page.parent / "report.json").read_text())["devices"]["devices"]] == [
        "measured", "predicted",
    ]  # fmt: skip
    assert "not here, so predicted: its tables were taken on Cortex-A72" in browser.evaluate("document.body.textContent")


@pytest.mark.parametrize("size", [NARROW, WIDE], ids=["narrow", "wide"])
def test_so_are_those_of_what_was_learned(browser: Browser, explained_page: Path, size: tuple[int, int]) -> None:
    check_page(browser, explained_page, size, "light", CHARTS | {"plot-genes", "plot-thinned"})
    facts = json.loads((explained_page.parent / "report.json").read_text())["explain"]
    bars = browser.evaluate("document.getElementById('plot-genes').data.map(t => t.x.length)")
    assert bars == [min(24, len(facts["genes"]))] * 3
    largest = browser.evaluate("document.getElementById('plot-genes').data.map(t => Math.max(...t.x))")
    assert largest == [max(g["points"] for g in facts["genes"]), *(max(g["ms"][i] for g in facts["genes"]) for i in (0, 1))]
    points = browser.evaluate("document.getElementById('plot-thinned').data.flatMap(t => t.y)")
    assert sorted(points) == sorted(t["points"] for t in facts["layers"])
    assert browser.evaluate("document.querySelector('#explain i')") is None


def check_page(browser: Browser, page: Path, size: tuple[int, int], scheme: str, charts: set[str]) -> None:
    """Every chart drawn, nothing wider than the window, no complaint, no request."""
    browser.open(page, size, scheme)
    if folder := os.environ.get("REPORT_SCREENSHOTS"):
        browser.screenshot(Path(folder) / f"{page.parent.name}-{size[0]}-{scheme}.png")
    drawn = browser.evaluate(
        """[...document.querySelectorAll('[id^=plot-]')].map(
        p => [p.id, p.querySelectorAll('svg.main-svg').length, p.querySelectorAll('.point, .js-line').length])"""
    )
    assert {name for name, _, _ in drawn} == charts
    assert all(layers and marks for _, layers, marks in drawn), drawn
    assert browser.complaints == []
    assert [url for url in browser.requests if not url.startswith(("file:", "data:", "blob:"))] == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= size[0]
    wider = browser.evaluate(
        """[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, pre, svg, .plot'))
        .filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"""
    )
    assert wider == []
    if size == WIDE:
        assert browser.evaluate("[...document.querySelectorAll('section > .scroll')].every(e => e.scrollWidth <= e.clientWidth)")
    # a chart must stay inside its box as well
    assert browser.evaluate(
        "[...document.querySelectorAll('.plot')].every(p => p.querySelector('.svg-container').offsetWidth <= p.offsetWidth + 1)"
    )


def test_light_and_dark_differ_and_text_can_be_read_in_both(browser: Browser, page: Path) -> None:
    seen = {}
    for scheme in ("light", "dark"):
        browser.open(page, WIDE, scheme)
        seen[scheme] = browser.evaluate(
            """(() => { const of = (q, p) => getComputedStyle(document.querySelector(q))[p];
            return {page: of('body', 'backgroundColor'), card: of('section', 'backgroundColor'),
                    ink: of('body', 'color'), soft: of('.lead', 'color'), accent: of('nav a', 'color'), note: of('.note', 'color'),
                    chosen: of('tr.chosen > *', 'backgroundColor'),
                    tick: of('#plot-front .xtick text', 'fill'), mark: of('#plot-search .js-line', 'stroke')}; })()"""
        )
        colours = seen[scheme]
        for text in ("ink", "soft", "accent", "note"):
            assert contrast(colours[text], colours["page"]) >= 4.5, (scheme, text)
        for text in ("ink", "soft", "tick", "accent"):
            assert contrast(colours[text], colours["card"]) >= 4.5, (scheme, text)
        assert contrast(colours["soft"], colours["chosen"]) >= 4.5, scheme
        assert contrast(colours["mark"], colours["card"]) >= 3, scheme
    assert luminance(seen["light"]["page"]) > 0.8
    assert luminance(seen["dark"]["page"]) < 0.05
    for part in ("tick", "mark"):
        assert seen["light"][part] != seen["dark"][part]


def test_charts_follow_a_change_of_scheme_while_the_page_is_open(browser: Browser, page: Path) -> None:
    browser.open(page, WIDE, "light")
    colour = "getComputedStyle(document.querySelector('#plot-search .js-line')).stroke"
    light = browser.evaluate(colour)
    browser.send("Emulation.setEmulatedMedia", media="", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    browser.until(f"{colour} !== {json.dumps(light)}")


def test_hovering_the_front_names_the_candidate(browser: Browser, page: Path) -> None:
    facts = json.loads((page.parent / "report.json").read_text())
    first = facts["front"]["points"][0]
    browser.open(page, WIDE, "light")
    x, y = browser.evaluate(
        """(() => { const plot = document.getElementById('plot-front'); plot.scrollIntoView({block: 'center', behavior: 'instant'});
        const trace = plot.data.find(t => t.name.startsWith('front')), a = plot._fullLayout;
        const box = plot.querySelector('.nsewdrag').getBoundingClientRect();
        return [box.left + a.xaxis.d2p(trace.x[0]), box.top + a.yaxis.d2p(trace.y[0])]; })()"""
    )
    browser.send("Input.dispatchMouseEvent", type="mouseMoved", x=x - 30, y=y + 4)
    browser.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    shown = browser.until(
        f"(t => t?.includes('{first['id']}') && t)(document.querySelector('#plot-front .hoverlayer .hovertext')?.textContent)"
    )
    if folder := os.environ.get("REPORT_SCREENSHOTS"):
        browser.screenshot(Path(folder) / "report-hover.png", whole=False)
    for expected in (f"{first['latency_ms']:.2f} ms", f"{first['score']:.2f}", "depth"):
        assert expected in shown


def test_printing_gives_pages(browser: Browser, page: Path, tmp_path: Path) -> None:
    browser.open(page, WIDE, "dark")
    pdf = base64.b64decode(browser.send("Page.printToPDF", printBackground=True)["data"])
    if folder := os.environ.get("REPORT_SCREENSHOTS"):
        (Path(folder) / "report.pdf").write_bytes(pdf)
    assert pdf.startswith(b"%PDF")
    assert browser.complaints == []


def luminance(colour: str) -> float:
    """Relative luminance of `rgb(r, g, b)` by WCAG 2."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(a: str, b: str) -> float:
    bright, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)
