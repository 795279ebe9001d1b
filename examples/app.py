"""A tuned model in a web application: a photo comes in as the body of a request; breed, probabilities and words go out.

CHECKPOINT=outputs/vlm_checkpoints/llava-cat-breeds uvicorn examples.app:app     or RUN=NAME: what the verdict of a run says
curl --data-binary @cat.jpg localhost:8000/breed       {"answer":"Maine Coon","breed":"Maine Coon","sure":true,"probabilities":…}

http://localhost:8000/ is a page to drop photos on. The routes are those of `catlib.serving.application`, which an application
of your own may mount, or leave aside: `service` is all that it needs.
"""

import asyncio
import os

from catlib.serving.application import application
from catlib.serving.service import VLMService

RUN = os.environ.get("RUN", "")
CHECKPOINT = os.environ.get("CHECKPOINT", "outputs/vlm_checkpoints/llava-cat-breeds")
service = VLMService(decoding="score", reasons=True)


async def load() -> None:
    if RUN:
        await asyncio.to_thread(service.load_run, RUN)
    else:
        await service.load_finetuned_model(checkpoint_path=CHECKPOINT)


app = application(service, load)
