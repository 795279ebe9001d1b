"""A served model as a classifier: photos go to an OpenAI-compatible URL (vLLM, llama.cpp and others), answers come back."""

import base64
import io
import json
import logging
import random
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
from PIL.Image import Image, Resampling

from catlib.classifiers.base import Batch, BrokenOff, Classifier
from catlib.errors import CatlibError, InputError
from catlib.files import parse_json, read_json
from catlib.parsing import BreedParser
from catlib.paths import public_url, server_key
from catlib.transfer import LONGEST_PAUSE_S, Client, Reply, TransferError

MAX_NEW_TOKENS = 50  # the plan's, as in catlib.vlm.decoding
TRANSIENT = frozenset({408, 409, 425, 429, 500, 502, 503, 504})  # worth another try
log = logging.getLogger(__name__)


class EndpointError(CatlibError):
    """The server does not answer, or answers with something that is no chat completion."""


class EndpointClassifier(Classifier):
    """Asks the server about each photo by a chat completion at temperature 0 and reads the breed off the answer's text.

    `url`: up to and with `/v1`; a model other than the only one served is named behind `#`. Predictions carry no scores:
    chat completions give the likelihood of tokens that were written, and say nothing about a breed that was not.
    `decoding` constrained: the engine may only write one of the breeds as the model spells them (`spelled`), by vLLM's structured
    outputs or a grammar for llama.cpp; empty: constrained where the engine can be held to a list, else free.
    `crop`: photos are scaled and cropped to so many pixels first, as CLIP's processor does; 0 sends them whole. Either
    way as PNG, so that the server sees the pixels that a model in this process would. `concurrency`: requests at a time.

    A failed request is tried again after a pause that doubles each time. A server that stays away ends the batch with
    BrokenOff, which keeps the answers that had come by then. Other refusals (HTTP 4xx) are not tried again.
    """

    row_by_row = True

    def __init__(
        self,
        url: str,
        breeds: Sequence[str],
        prompt: str,
        *,
        name: str = "endpoint",
        concurrency: int = 4,
        crop: int = 0,
        decoding: str = "free",
        spelled: Mapping[str, str] | None = None,
        max_tokens: int = MAX_NEW_TOKENS,
        timeout_s: float = 120.0,
        tries: int = 6,
        pause_s: float = 0.5,
    ) -> None:
        if concurrency < 1 or tries < 1:
            raise InputError(f"concurrency and tries must be at least 1; found {concurrency} and {tries}")
        self.url, _, wanted = public_url(url, "endpoint").partition("#")
        self.url = self.url.rstrip("/")
        self.name, self.breeds, self.prompt = name, tuple(breeds), prompt
        self.concurrency, self.crop, self.tries, self.pause_s = concurrency, crop, tries, pause_s
        self.max_tokens, self.parser = max_tokens, BreedParser(self.breeds)
        self.choices = {(spelled or {}).get(b, b): b for b in self.breeds}  # what may be written, and its breed
        self.timeout_s, self._key = timeout_s, server_key()
        self._client = Client({"Authorization": f"Bearer {self._key}"} if self._key else {})
        try:
            self.model, self.engine = self._choose(wanted)
            self._special = self._special_tokens() if self.engine == "vllm" else {}
            held = held_to(list(self.choices), self.engine)
            self.decoding = decoding or ("constrained" if held else "free")
            if self.decoding == "constrained" and not held:
                what = f"only vLLM and llama.cpp can be held to a list of breeds, not {self.engine or 'this server'!r}"
                raise InputError(f"{self.url}: {what}")
            if self.decoding == "constrained":
                self._special |= held
            elif self.decoding != "free":
                raise InputError(f"an endpoint answers in words: decoding free or constrained, not {decoding!r}")
        except BaseException:
            self.close()
            raise

    def classify(self, images: Sequence[Image], ids: Sequence[str] | None = None) -> Batch:
        stop = threading.Event()
        done: dict[int, str] = {}
        problem: CatlibError | None = None
        with ThreadPoolExecutor(self.concurrency, thread_name_prefix="ask") as pool:
            calls = [pool.submit(self.ask, image, stop) for image in images]
            try:
                for i, call in enumerate(calls):
                    try:
                        done[i] = call.result()
                    except CatlibError as error:
                        stop.set()  # calls that wait for their turn give up, those on the wire may finish
                        which = f"photo {ids[i]!r}: " if ids is not None and isinstance(error, InputError) else ""
                        problem = problem or type(error)(f"{which}{error}")
            finally:
                stop.set()
        if problem is not None:
            found = {i: (self.read(text), text) for i, text in done.items()}
            raise BrokenOff(str(problem), found, problem.exit_code) from problem
        answers = [done[i] for i in range(len(images))]
        return Batch([self.read(answer) for answer in answers], None, answers)

    def read(self, answer: str) -> str | None:
        """The breed in an answer."""
        return self.parser.parse(answer) if self.decoding == "free" else self.choices.get(answer)

    def ask(self, image: Image, stop: threading.Event | None = None) -> str:
        """The answer about one photo. May be called from several threads. Raises EndpointError or InputError."""
        return self._ask(self.request(image), stop or threading.Event())

    def request(self, image: Image) -> dict[str, Any]:
        """The body of a chat completion about a photo."""
        stream = io.BytesIO()
        cropped(image, self.crop).save(stream, "PNG", compress_level=1)
        url = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
        photo = {"type": "image_url", "image_url": {"url": url}}
        turn = {"role": "user", "content": [photo, {"type": "text", "text": self.prompt}]}
        fixed = {"max_tokens": self.max_tokens, "temperature": 0, "seed": 0}
        return {"model": self.model, "messages": [turn], **fixed, **self._special}

    def describe(self) -> dict[str, Any]:
        served = {"base_model": self.model, "adapter": None, "endpoint": self.url, "engine": self.engine}
        asked = {"question": self.prompt, "decoding": self.decoding, "crop": self.crop}
        return {**served, **asked, "device": None, "dtype": None}

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _ask(self, body: dict[str, Any], stop: threading.Event) -> str:
        reply = self._send("POST", "/chat/completions", body, stop)
        try:
            text = reply["choices"][0]["message"]["content"] or ""
            answered = str(reply.get("model") or self.model)
            if not isinstance(text, str):
                raise TypeError
        except (KeyError, IndexError, TypeError, AttributeError):
            raise EndpointError(f"{self.url}: no chat completion in its reply: {json.dumps(reply)[:200]}") from None
        if not answered.startswith(self.model):  # behind the name may stand a version
            other = f"answers for another model, {answered[:100]!r}"
            raise EndpointError(f"{self.url} was asked for {self.model!r} and {other}")
        if self.decoding == "constrained" and text.strip() not in self.choices:
            raise EndpointError(
                f"{self.url}: {self.engine or 'the engine'} was held to {len(self.choices)} breeds and wrote {text[:100]!r}: it does "
                "not know this request (vLLM before 0.12, say); ask it with --decoding free"
            )
        return text.strip()

    def _choose(self, wanted: str) -> tuple[str, str]:
        """The model to ask and the engine behind the URL, from what the server says it serves."""
        listed = self._send("GET", "/models", None, threading.Event())
        try:
            served = {str(entry["id"]): str(entry.get("owned_by", "")) for entry in listed["data"]}
        except (KeyError, TypeError, AttributeError):
            raise EndpointError(f"{self.url}/models lists no models: no OpenAI-compatible server?") from None
        if not wanted and len(served) == 1:
            wanted = next(iter(served))
        if wanted not in served:
            said = f"serves no {wanted!r}" if wanted else "serves several models: add #MODEL to the URL"
            raise InputError(f"endpoint {self.url} {said}; it has {', '.join(served) or 'none'}")
        return wanted, served[wanted]

    def _special_tokens(self) -> dict[str, bool]:
        """What vLLM is told with each request: it leaves the tokenizer's <s> out of chats, and some templates write it already."""
        option = {"add_special_tokens": True}
        turn = {"role": "user", "content": [{"type": "text", "text": self.prompt}]}
        try:
            asked = {"model": self.model, "messages": [turn], **option}
            first, second, *_ = self._send("POST", "/tokenize", asked, threading.Event())["tokens"]
        except (CatlibError, KeyError, TypeError, ValueError) as error:
            log.info("%s does not say how it tokenizes a chat (%s): <s> is asked for", self.url, error)
            return option
        return {"add_special_tokens": first != second}

    def _send(self, method: str, path: str, body: dict[str, Any] | None, stop: threading.Event) -> Any:
        """A request's JSON reply; tried again, with longer and longer pauses, while the server seems to be away."""
        root = self.url.removesuffix("/v1") if path == "/tokenize" else self.url  # no part of OpenAI's interface
        for attempt in range(1, self.tries + 1):
            if stop.is_set():
                raise EndpointError("not asked: another photo of the batch had failed")
            try:
                reply = self._client.send(method, root + path, within_s=self.timeout_s, body=body)
            except TransferError as error:
                problem, wait = str(error), 0.0
            except httpx.InvalidURL as error:
                raise InputError(f"endpoint {self.url!r}: {error}") from None
            else:
                # Replies are logged and written down: without the key, should the server repeat it.
                text = reply.text.replace(self._key, "***") if self._key else reply.text
                if reply.ok:
                    try:
                        return parse_json(text, root + path, object)
                    except InputError as error:
                        raise EndpointError(f"{error}; it begins {text[:100]!r}") from None
                problem, wait = _refusal(reply, text), reply.retry_after
                if reply.status not in TRANSIENT:
                    raise InputError(f"endpoint {self.url}{path} refuses: {problem}")
            if attempt < self.tries:
                pause = min(LONGEST_PAUSE_S, max(wait, self.pause_s * 2 ** (attempt - 1) * random.uniform(0.8, 1.2)))
                log.warning("%s%s: %s; trying again in %.1f s", self.url, path, problem, pause)
                stop.wait(pause)
        raise EndpointError(
            f"endpoint {self.url} does not answer after {self.tries} tries ({problem}); what it had answered is kept: "
            "start it again and run the same command"
        )


def held_to(choices: Sequence[str], engine: str) -> dict[str, Any]:
    """What of a request holds an engine to `choices`; empty for one of which no such request is known. Most models learn answers
    that begin with a space, and without it spell another name than they would.
    """
    longest = max(MAX_NEW_TOKENS, *(len(choice.encode()) + 1 for choice in choices))  # a token is a byte at least
    if engine == "vllm":
        either = [f"{space}{choice}" for choice in choices for space in (" ", "")]
        return {"structured_outputs": {"choice": either}, "max_tokens": longest}
    if engine == "llamacpp":
        names = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
        return {"grammar": f'root ::= " "? ({names})', "max_tokens": longest}
    return {}


def _refusal(reply: Reply, text: str) -> str:
    """Status and what the server says about it, in one line."""
    with suppress(InputError):  # no JSON: the text as it is
        error = parse_json(text, "reply")
        error = error.get("error", error.get("message", error))
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    return f"HTTP {reply.status}: {' '.join(text.split())[:300]}"


def cropped(image: Image, side: int) -> Image:
    """The photo scaled so that its short side is `side` pixels, and its middle square of it: CLIP's preprocessing."""
    if not side:
        return image
    short = min(image.size)
    image = image.resize([side * length // short for length in image.size], Resampling.BICUBIC)
    left, top = ((length - side) // 2 for length in image.size)
    return image.crop((left, top, left + side, top + side))


def crop_side(folder: Path) -> int:
    """The side of the square that a checkpoint's processor cuts out of photos; 0 when it works otherwise."""
    for name, within in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        if (folder / name).is_file():
            config = read_json(folder / name)
            config = config.get(within, {}) if within else config
            crop, scale = config.get("crop_size") or {}, config.get("size") or {}
            if config.get("do_center_crop") and crop.get("height") == crop.get("width") == scale.get("shortest_edge"):
                return int(crop["height"] or 0)
    return 0
