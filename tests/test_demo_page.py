"""The demo's page in a real browser: headless Chromium, driven by chromedriver's HTTP interface (W3C WebDriver).

The interface is a handful of JSON requests, so no package is needed for it. Both programs are Debian's ``chromium`` and
``chromium-driver``.
"""

import base64
import json
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from torchtitan.audio.codec import FRAME_SIZE
from torchtitan.audio.waveform import SAMPLE_RATE
from torchtitan.checkpoint.speech_lm import SpeechLM
from torchtitan.demo.server import DemoServer

DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(DRIVER is None, reason="chromedriver is not installed (apt-get install chromium-driver)"),
]

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key that the standard gives to references to elements
CHROMIUM = [
    *("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--window-size=1280,900"),
    *("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream", "--mute-audio"),
    "--autoplay-policy=no-user-gesture-required",
]


class Browser:
    """A headless Chromium."""

    def __init__(self, driver: str, downloads: Path):
        self._process = subprocess.Popen(
            [driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self._process.stdout is not None
        port = next(line.split()[-1].rstrip(".") for line in self._process.stdout if "started successfully" in line)
        self._address = f"http://127.0.0.1:{port}/session"
        options = {"args": CHROMIUM, "prefs": {"download.default_directory": str(downloads)}}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        answer = self._call("POST", "", {"capabilities": {"alwaysMatch": wanted}})
        self._address += f"/{answer['sessionId']}"

    def close(self) -> None:
        try:
            self._call("DELETE", "")
        finally:
            self._process.terminate()
            self._process.wait()
            self._process.stdout.close()

    def _call(self, method: str, path: str, value: Any = None) -> Any:
        data = None if method != "POST" else json.dumps(value or {}).encode()
        request = urllib.request.Request(
            self._address + path, data, {"Content-Type": "application/json"}, method=method
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=60) as response:
                return json.load(response)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(json.load(error)["value"]["message"]) from None

    def open(self, address: str) -> None:
        self._call("POST", "/url", {"url": address})

    def _find(self, selector: str) -> str:
        return self._call("POST", "/element", {"using": "css selector", "value": selector})[ELEMENT]

    def click(self, selector: str) -> None:
        self._call("POST", f"/element/{self._find(selector)}/click")

    def type(self, selector: str, text: str) -> None:
        """Type into an element, a file input's path for one."""
        self._call("POST", f"/element/{self._find(selector)}/value", {"text": text})

    def run(self, script: str, *arguments: Any) -> Any:
        """What a JavaScript function's body returns."""
        return self._call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def wait(self, script: str, seconds: float = 30.0) -> Any:
        """What a function's body returns, as soon as that is something."""
        deadline = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < deadline, f"{script}: not within {seconds} s; {self.run(PAGE_TEXT)}"
            time.sleep(0.1)
        return value

    def devtools(self, command: str, **parameters: Any) -> Any:
        return self._call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def look(self, width: int, height: int, dark: bool = False, phone: bool = False) -> None:
        """Take the size of a window or of a phone, and a colour scheme."""
        self.devtools(
            "Emulation.setDeviceMetricsOverride",
            **{"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone},
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self) -> bytes:
        return base64.b64decode(self._call("GET", "/screenshot"))

    def errors(self) -> list[str]:
        """What the console has said since the last call, warnings and errors."""
        entries = self._call("POST", "/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] in ("WARNING", "SEVERE")]


SHORT = "document.querySelector('#max_seconds').value = 3"
PAGE_TEXT = "return document.body.innerText"
DURATIONS = "return [...document.querySelectorAll('.sample audio')].map((audio) => audio.duration)"
ALL_DONE = """const samples = [...document.querySelectorAll('.run:first-child .sample')];
return samples.length && samples.every((sample) => ['done', 'failed'].includes(sample.dataset.state))
  && samples.every((sample) => sample.querySelector('audio').duration > 0)"""


@pytest.fixture
def browser(tmp_path) -> Iterator[Browser]:
    assert DRIVER is not None
    browser = Browser(DRIVER, tmp_path)
    yield browser
    browser.close()


@pytest.fixture
def server(tmp_path, mimi_folder, save_speech_model, make_sound) -> Iterator[DemoServer]:
    """A tiny random model on a free port, with an example prompt of 0.5 s, that can speak for 200 s."""
    lm = SpeechLM.load(str(save_speech_model(tmp_path / "model", mimi_folder, context=10_240)), device="cpu")
    example = tmp_path / "example.flac"
    example.write_bytes(make_sound(1, 0.5))
    with DemoServer(lm, max_seconds=200.0, example=example) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.should_exit = True
        thread.join()


def test_upload_generate_hear(browser, server, tmp_path, make_sound):
    path = tmp_path / "speech.wav"
    path.write_bytes(make_sound(2, 0.9, 16_000, "WAV"))
    browser.open(server.address)
    browser.wait("return document.querySelector('#model').textContent.includes('model on cpu')")
    browser.type("#file", str(path))
    assert browser.wait("return document.querySelector('#preview').duration") == pytest.approx(0.9, abs=0.01)
    browser.run(SHORT)
    browser.click("#generate")
    browser.wait(ALL_DONE)
    durations = browser.run(DURATIONS)
    lengths = browser.run("return runs[0].samples.map((sample) => [sample.boundary, sample.length])")
    assert len(durations) == 2
    for duration, (boundary, length) in zip(durations, lengths, strict=True):
        assert boundary == 12 * FRAME_SIZE
        assert boundary < length <= 37 * FRAME_SIZE
        assert duration == pytest.approx(length / SAMPLE_RATE, abs=1e-3)
    # What was heard while it was made, then a sample of its own accord; one at a time.
    browser.wait("return live === null")
    browser.click(".sample:nth-child(2) .player button")
    browser.wait("return !document.querySelector('.sample:nth-child(2) audio').paused")
    assert browser.run("return document.querySelector('.sample:nth-child(2) audio').currentTime") >= 0.95
    # The boundary stands where the prompt ends.
    seconds = browser.run("""const area = document.querySelector('.area').getBoundingClientRect();
        const boundary = document.querySelector('.boundary').getBoundingClientRect();
        return (boundary.left - area.left) / area.width * runs[0].span""")
    assert seconds == pytest.approx(0.96, abs=0.02)
    for canvas in ("waveform", "spectrogram"):
        colors = browser.run(f"""const canvas = document.querySelector('.{canvas}');
            return new Set(new Uint32Array(canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height)
              .data.buffer)).size""")
        assert colors > (2 if canvas == "waveform" else 50)
    assert browser.errors() == []


def test_a_bad_file_is_an_error_in_one_sentence(browser, server, tmp_path):
    path = tmp_path / "text.wav"
    path.write_text("this is not audio")
    browser.open(server.address)
    browser.type("#file", str(path))
    browser.click("#generate")
    text = browser.wait("return document.querySelector('#error span')?.textContent")
    assert text.startswith("text.wav: not a readable audio file")
    assert browser.run("return document.querySelectorAll('.sample').length") == 0
    # Chromium itself notes the status 400; nothing else went wrong.
    assert all("400" in line for line in browser.errors())
    browser.click("#example")
    browser.wait("return prompt && prompt.name === 'the example prompt'")
    browser.run(SHORT)
    browser.click("#generate")
    browser.wait(ALL_DONE)
    assert browser.run("return document.querySelector('#error').hidden")


def test_a_large_file_is_not_sent(browser, server):
    browser.open(server.address)
    browser.wait("return info !== null")
    browser.run("""const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(21e6)], 'dropped.wav'));
        window.dispatchEvent(new DragEvent('drop', {dataTransfer: data, cancelable: true}))""")
    text = browser.wait("return document.querySelector('#error span')?.textContent")
    assert all(fact in text for fact in ("dropped.wav", "21.0 MB", "20 MB"))
    assert browser.run("return prompt") is None
    assert browser.errors() == []


def test_record(browser, server):
    browser.open(server.address)
    browser.wait("return info !== null")
    browser.run(SHORT)
    browser.click("#record")
    browser.wait("return recording && recording.length / recording.context.sampleRate > 1.1")
    browser.click("#record")
    assert browser.wait("return document.querySelector('#preview').duration") > 1
    browser.click("#generate")
    browser.wait(ALL_DONE)
    assert browser.run("return runs[0].samples[0].boundary") >= 13 * FRAME_SIZE
    browser.click("#remove")
    browser.run("document.querySelector('#samples').value = 4")
    browser.click("#generate")
    browser.wait(ALL_DONE)
    assert browser.run("return runs[0].samples.map((sample) => sample.boundary)") == [0, 0, 0, 0]
    assert browser.errors() == []


def test_fewer_places_than_samples(browser, server):
    with server.place(), server.place(), server.place():
        browser.open(server.address)
        browser.wait("return info !== null")
        browser.run(SHORT + "; document.querySelector('#samples').value = 3")
        browser.click("#generate")
        browser.wait(ALL_DONE)
        assert browser.run("return runs[0].samples.map((sample) => sample.node.dataset.state)") == ["done"] * 3
        with server.place():
            browser.click("#generate")
            text = browser.wait("return document.querySelector('#error span')?.textContent")
            assert "all 4 places are taken" in text


def test_stop(browser, server):
    browser.open(server.address)
    browser.wait("return info !== null")
    browser.run("document.querySelector('#temperature').value = 3")
    browser.click("#generate")
    # Heard while it is made: the clock of what is played goes on before the sample is done.
    browser.wait("return live && live.position() > 0.2")
    assert browser.run("return runs[0].samples[0].node.dataset.state") == "speaking"
    browser.click("#stop")
    browser.wait("return !document.querySelector('#generate').disabled && live === null")
    assert browser.run("return runs[0].samples.map((sample) => sample.node.dataset.state)") == ["failed"] * 2
    assert browser.wait("return document.querySelector('.sample audio').duration") > 0.2
    deadline = time.monotonic() + 10
    while not server.service.engine.idle:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert browser.run("return document.querySelector('#error').hidden")
    assert browser.errors() == []
