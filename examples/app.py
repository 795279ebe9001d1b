"""A tuned model in a web application: a photo comes in as the body of a request; breed, probabilities and words go out.

CHECKPOINT=outputs/vlm_checkpoints/llava-cat-breeds uvicorn examples.app:app     or RUN=NAME: what the verdict of a run says
curl --data-binary @cat.jpg localhost:8000/breed       {"answer":"Maine Coon","breed":"Maine Coon","sure":true,"probabilities":…}

http://localhost:8000/ is a page to drop photos on; `catlib serve --run NAME` runs this application, too.
"""

import asyncio
import gc
import io
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from matplotlib import colormaps
from PIL import Image
from starlette.requests import ClientDisconnect

from catlib.breeds import describe, find
from catlib.classifiers.base import Classifier
from catlib.classifiers.explain import seen_photo
from catlib.classifiers.vlm import VLMClassifier
from catlib.errors import CatlibError, InputError
from catlib.serving.service import Busy, VLMService, read_photo
from catlib.vlm.attribution import patch_gradients
from catlib.vlm.prompting import label_tokens

PAGE = Path(__file__).with_name("page.html")
LARGEST = 20_000_000  # bytes of a photo
WITHIN_S = 60.0  # for a photo to arrive
SHOWN = {"Content-Security-Policy": "default-src 'self' 'unsafe-inline'; img-src blob:", "X-Frame-Options": "DENY"}


def application(service: VLMService, load: Callable[[], Awaitable[None]] | None = None) -> FastAPI:
    """The web application around `service`; `load`, if given, is awaited when it starts. It closes the service when it ends."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            if load:
                await load()
            gc.freeze()  # or Python's cycle collector walks over all of torch and stops the loop meanwhile
            yield
        finally:
            await asyncio.to_thread(service.close)

    app, drawing = FastAPI(lifespan=lifespan, title="Cat breeds"), asyncio.Lock()

    @app.exception_handler(CatlibError)
    async def told(_: Request, error: CatlibError) -> JSONResponse:
        status = 422 if isinstance(error, InputError) else 503
        return JSONResponse({"detail": str(error)}, status, {"Retry-After": "1"} if status == 503 else None)

    @app.get("/")
    async def page() -> Response:
        return Response(PAGE.read_bytes(), media_type="text/html; charset=utf-8", headers=SHOWN)

    @app.get("/health")
    async def health(response: Response) -> dict[str, Any]:
        loaded = service.classifier
        response.status_code = 200 if loaded else 503
        return {"ready": loaded is not None, "model": loaded.name if loaded else None}

    @app.post("/breed")
    async def breed(request: Request) -> dict[str, Any]:
        answer = await service.predict_finetuned_async(await body_of(request))
        named = answer.breed or next(iter(answer.probabilities or ()), "")
        traits = f"{named}: {describe(named)}" if find(named) else ""
        return {"answer": answer.answer, "breed": answer.breed, "sure": answer.sure} | {
            "probabilities": answer.probabilities,
            "traits": traits,
        }

    @app.post("/heat")
    async def heat(request: Request, breed: str, over: str = "") -> Response:
        photo = await asyncio.to_thread(read_photo, await body_of(request))
        if drawing.locked():
            raise Busy("another heat map is being drawn; try again later")
        async with drawing:
            png = await asyncio.wrap_future(service.with_model(lambda model: heat_map(model, photo, breed, over)))
        return Response(png, media_type="image/png")

    return app


async def body_of(request: Request) -> bytes:
    """The photo in a request. Raises HTTPException 413 beyond LARGEST bytes, 408 when it takes longer than WITHIN_S seconds."""
    body = bytearray()
    try:
        async with asyncio.timeout(WITHIN_S):
            async for block in request.stream():
                body += block
                if len(body) > LARGEST:
                    raise HTTPException(413, f"a photo of more than {LARGEST:,} bytes", {"Connection": "close"})
    except ClientDisconnect:
        raise HTTPException(400, "the photo broke off") from None
    except TimeoutError:
        raise HTTPException(408, f"the photo did not arrive within {WITHIN_S:g} s") from None
    return bytes(body)


def heat_map(model: Classifier, photo: Image.Image, breed: str, over: str = "") -> bytes:
    """The photo as the model saw it, red where it speaks for `breed` (rather than for `over`), blue where against; a PNG.

    Raises InputError for breeds that are not in the list, and for models that are no VLM.
    """
    if not isinstance(model, VLMClassifier):
        raise InputError(f"{model.name} has no heat maps: they need a vision-language model")
    wanted = [breed, over] if over else [breed]
    if unknown := [name for name in wanted if name not in model.breeds]:
        raise InputError(f"not among the breeds of this model: {', '.join(unknown)[:100]}")
    labels = [label_tokens(model.vlm, model.prompt, name, model.spelled) for name in wanted]
    own, *other = (patch_gradients(model.vlm, photo, model.prompt, label) for label in labels)
    heat = own - other[0] if other else own
    seen = seen_photo(model.vlm, photo)
    limit = float(np.quantile(np.abs(heat), 0.99)) or 1.0  # a single extreme patch would leave all others pale
    wide = np.array(Image.fromarray((heat / limit).astype(np.float32)).resize(seen.size, Image.Resampling.BICUBIC))
    colors = colormaps["RdBu_r"](np.clip(wide, -1, 1) / 2 + 0.5)[..., :3] * 255
    strength = np.clip(np.abs(wide), 0, 1)[..., None] * 0.8
    mixed = np.asarray(seen.convert("RGB")) * (1 - strength) + colors * strength
    stream = io.BytesIO()
    Image.fromarray(mixed.round().astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


RUN = os.environ.get("RUN", "")
CHECKPOINT = os.environ.get("CHECKPOINT", "outputs/vlm_checkpoints/llava-cat-breeds")
service = VLMService(decoding="score", reasons=True)


async def load() -> None:
    """What this application answers with."""
    if RUN:
        await asyncio.to_thread(service.load_run, RUN)
    else:
        await service.load_finetuned_model(checkpoint_path=CHECKPOINT)


app = application(service, load)
