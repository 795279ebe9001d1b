"""A tuned model in a web application: a photo comes in as the body of a request, its breed goes out.

CHECKPOINT=outputs/vlm_checkpoints/llava-cat-breeds uvicorn examples.app:app
curl --data-binary @cat.jpg localhost:8000/breed        {"answer":"Maine Coon","breed":"Maine Coon"}
"""

import gc
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException, Request

from catlib.errors import InputError
from catlib.serving.service import BreedAnswer, VLMService

CHECKPOINT = os.environ.get("CHECKPOINT", "outputs/vlm_checkpoints/llava-cat-breeds")
service = VLMService()


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    await service.load_finetuned_model(checkpoint_path=CHECKPOINT)
    gc.freeze()  # or Python's cycle collector walks over all of torch and stops the loop meanwhile
    yield
    service.close()


app = FastAPI(lifespan=lifespan)


@app.post("/breed")
async def breed(request: Request) -> BreedAnswer:
    try:
        return await service.predict_finetuned_async(await request.body())
    except InputError as error:
        raise HTTPException(422, str(error)) from None
