"""The application in examples/, over HTTP, under concurrent requests and hostile ones; its page in a browser."""

import asyncio
import gc
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from PIL import Image
from serving_cases import BROKEN, jpeg, one_thread, save_tuned  # noqa: F401
from tiny_models import BREEDS

from catlib.cli import main
from catlib.serving.engine_process import free_port
from catlib.serving.service import VLMService
from catlib.vlm.attribution import patch_gradients

pytest.importorskip("fastapi", reason="fastapi comes with the extra 'test'")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tuned(tmp_path_factory.mktemp("api"))


def loaded():
    spec = importlib.util.spec_from_file_location("example", ROOT / "examples" / "app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_has_its_routes():
    assert {"/", "/health", "/breed", "/heat"} <= {route.path for route in loaded().app.routes}


@pytest.fixture
def example(checkpoint, monkeypatch):
    monkeypatch.setenv("CHECKPOINT", str(checkpoint))
    monkeypatch.delenv("RUN", raising=False)
    yield loaded()
    gc.unfreeze()  # what the application froze would stay so for the other tests


def asked(app, talk):
    """What `talk(client)` gives, while the application runs."""

    async def session():
        async with app.router.lifespan_context(app):  # what a server does on start and at the end
            transport = httpx.ASGITransport(app=app)
            async with httpx.AsyncClient(transport=transport, base_url="http://cats", timeout=60) as client:
                return await talk(client)

    return asyncio.run(session())


@pytest.mark.slow
def test_the_example_application(example, checkpoint):
    async def crowd(client):
        assert (await client.get("/health")).json() == {"ready": True, "model": "vlm-tuned"}
        bodies = [BROKEN if n % 8 == 3 else jpeg(n) for n in range(16)]
        return await asyncio.gather(*(client.post("/breed", content=body) for body in bodies))

    responses = asked(example.app, crowd)
    assert not example.service.is_loaded
    with VLMService(max_batch=1, decoding="score", reasons=True) as alone:
        alone.load(checkpoint)
        for number, response in enumerate(responses):
            if number % 8 == 3:
                assert response.status_code == 422 and f"photo of {len(BROKEN)} bytes" in response.json()["detail"]
                continue
            expected, found = alone.predict_finetuned(jpeg(number)), response.json()
            assert response.status_code == 200
            assert (found["answer"], found["breed"], found["sure"]) == (expected.answer, expected.breed, None)
            assert found["probabilities"] == pytest.approx(expected.probabilities) and len(
                found["probabilities"]
            ) == len(BREEDS)
            assert next(iter(found["probabilities"])) == found["breed"] and found["traits"].startswith(found["breed"])


@pytest.mark.slow
def test_hostile_requests_are_refused_and_none_waits(example, monkeypatch):
    monkeypatch.setattr(example, "LARGEST", 100_000)
    monkeypatch.setattr(example, "WITHIN_S", 0.5)

    async def slowly():
        for _ in range(100):
            yield b"x"
            await asyncio.sleep(0.1)

    async def talk(client):
        found = [await client.post("/breed", content=b"x" * 100_001), await client.post("/breed", content=slowly())]
        found += [await client.post("/breed", content=body) for body in (b"", b"%!PS {} loop", jpeg(0)[:300])]
        found += [await client.post(f"/heat?breed={name}", content=jpeg(0)) for name in ("Dog", "", "x" * 9000)]
        found += [
            await client.post("/heat", content=jpeg(0)),
            await client.get("/breed"),
            await client.get("/../etc/passwd"),
        ]
        return found, await client.post("/breed", content=jpeg(0))

    found, last = asked(example.app, talk)
    assert [reply.status_code for reply in found] == [413, 408, 422, 422, 422, 422, 422, 422, 422, 405, 404]
    assert last.status_code == 200 and all(len(reply.text) < 1000 for reply in found)


@pytest.mark.slow
def test_the_heat_map_is_that_of_the_breed(example, monkeypatch):
    maps = []

    def kept(*arguments):
        maps.append(patch_gradients(*arguments))
        return maps[-1]

    monkeypatch.setattr(example, "patch_gradients", kept)

    async def talk(client):
        one = await client.post(f"/heat?breed={BREEDS[0]}&over={BREEDS[1]}", content=jpeg(1))
        other = await client.post(f"/heat?breed={BREEDS[1]}&over={BREEDS[0]}", content=jpeg(1))
        return one, other

    one, other = asked(example.app, talk)
    assert one.status_code == 200 and one.headers["content-type"] == "image/png" and len(maps) == 4
    pictures = [Image.open(io.BytesIO(reply.content)) for reply in (one, other)]
    assert pictures[0].size == (28, 28) and pictures[0].tobytes() != pictures[1].tobytes()  # red and blue change places


@pytest.mark.slow
def test_a_full_queue_is_503(example, monkeypatch):
    async def talk(client):
        monkeypatch.setattr(example.service._worker, "max_waiting", 0)
        return await client.post("/breed", content=jpeg(0))

    reply = asked(example.app, talk)
    assert reply.status_code == 503 and reply.headers["retry-after"] == "1"


@pytest.fixture
def served(checkpoint):
    """`catlib serve --engine service` as a process: its URL."""
    port = free_port()
    line = [sys.executable, "-m", "catlib.cli", "serve", "--engine", "service", "--checkpoint", str(checkpoint)]
    with subprocess.Popen(
        [*line, "--port", str(port), "--device", "cpu"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert f"http://127.0.0.1:{port}/" in process.stdout.readline()
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:
                try:
                    assert httpx.get(f"http://127.0.0.1:{port}/health").json()["ready"]
                    break
                except httpx.TransportError:
                    time.sleep(0.05)
            yield f"http://127.0.0.1:{port}", process
        finally:
            process.kill()


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_serve_answers_says_that_its_port_is_taken_and_ends(served, checkpoint, capsys, number):
    url, process = served
    found = httpx.post(f"{url}/breed", content=jpeg(3)).json()
    assert found["breed"] in BREEDS and len(found["probabilities"]) == len(BREEDS)
    again = ["serve", "--engine", "service", "--checkpoint", str(checkpoint), "--port", url.rpartition(":")[2]]
    assert main(again) == 2 and "is taken" in capsys.readouterr().err
    process.send_signal(number)
    assert process.wait(20) in (0, -number)


@pytest.mark.long
@pytest.mark.slow
def test_the_page_shows_answer_breeds_and_heat_map_in_a_browser(served, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no Chromium here")
    url, _ = served
    page = httpx.get(f"{url}/").text
    assert "http://" not in page and "https://" not in page  # nothing is fetched from elsewhere
    # A photo cannot be dropped without a driver, so a copy of the page is handed one by the handler that a drop calls.
    photo = ",".join(map(str, jpeg(3)))
    script = f"<script>look(new Blob([new Uint8Array([{photo}])], {{type: 'image/jpeg'}}))</script>"
    copy = tmp_path / "page.html"
    copy.write_text(page.replace("fetch(path", f'fetch("{url}/" + path') + script)
    line = [
        chromium,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-web-security",
        f"--user-data-dir={tmp_path}/u",
    ]
    line += ["--virtual-time-budget=15000", "--window-size=900,900", "--dump-dom", copy.as_uri()]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    found = httpx.post(f"{url}/breed", content=jpeg(3)).json()
    assert f'<h2 id="breed">{found["breed"]}</h2>' in done.stdout, done.stdout[-2000:]
    assert done.stdout.count('class="bar"') == 3 and "Red speaks for" in done.stdout and 'id="map"' in done.stdout
    if target := os.environ.get("CATLIB_SCREENSHOT"):
        line[-2:] = [f"--screenshot={target}", copy.as_uri()]
        subprocess.run(line, capture_output=True, timeout=120)
    json.dumps(found)


def test_serve_refuses_a_device_that_is_none(capsys):
    for wrong in ("gpu", "cuda:x", "cuda:N"):
        assert main(["serve", "--engine", "service", "--checkpoint", "x", "--device", wrong]) == 2
        assert "one of auto, cpu, cuda, cuda:N, mps" in capsys.readouterr().err
