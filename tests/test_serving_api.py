"""The application in examples/, under concurrent requests."""

import asyncio
import gc
import importlib.util
from pathlib import Path

import httpx
import pytest
from serving_cases import BROKEN, jpeg, one_thread, save_tuned  # noqa: F401

from catlib.serving.service import VLMService

pytest.importorskip("fastapi", reason="fastapi comes with the extra 'test'")
EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "app.py"


@pytest.mark.slow
def test_the_example_application(tmp_path, monkeypatch):
    checkpoint = save_tuned(tmp_path)
    monkeypatch.setenv("CHECKPOINT", str(checkpoint))
    spec = importlib.util.spec_from_file_location("example", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    app, service = example.app, example.service

    async def crowd():
        async with app.router.lifespan_context(app):  # what a server does on start and at the end
            transport = httpx.ASGITransport(app=app)
            async with httpx.AsyncClient(transport=transport, base_url="http://cats") as client:
                bodies = [BROKEN if n % 8 == 3 else jpeg(n) for n in range(16)]
                return await asyncio.gather(*(client.post("/breed", content=body) for body in bodies))

    try:
        responses = asyncio.run(crowd())
    finally:
        gc.unfreeze()  # what the application froze would stay so for the other tests
    assert not service.is_loaded
    alone = VLMService(max_batch=1)
    alone.load(checkpoint)
    for number, response in enumerate(responses):
        if number % 8 == 3:
            assert response.status_code == 422 and f"photo of {len(BROKEN)} bytes" in response.json()["detail"]
        else:
            expected = alone.predict_finetuned(jpeg(number))
            assert response.status_code == 200
            assert response.json() == {"answer": expected.answer, "breed": expected.breed}
    alone.close()
