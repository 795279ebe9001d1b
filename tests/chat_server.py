"""A small OpenAI-compatible server for tests: it names the breed by the photo's mean colour, logs whom it has answered,
and can die.

    python chat_server.py PORT LOG [--die-after N] [--delay S] [--fail-first N] [--engine vllm] [--begins 1,1,9]

LOG gets a line of JSON for each answered photo: the digest of its pixels and what the request asked for.
"""

import argparse
import base64
import hashlib
import io
import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image, ImageStat

BREEDS = ("Manx", "Persian", "Siamese")


def answer_about(image: Image.Image) -> str:
    """The breed of the strongest colour, in a sentence."""
    means = ImageStat.Stat(image).sum
    return f"This is a {BREEDS[means.index(max(means))]}."


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    counter, lock = 0, threading.Lock()

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, status: int, content: dict, **headers: str) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        models = [{"id": name, "owned_by": args.engine} for name in args.models.split(",")]
        self.reply(200, {"object": "list", "data": models})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize" and args.begins:
            tokens = [int(token) for token in args.begins.split(",")]
            self.reply(200, {"count": len(tokens), "tokens": tokens if body["add_special_tokens"] else tokens[1:]})
            return
        if self.path == "/tokenize":
            self.reply(404, {"error": {"message": "no such path"}})
            return
        with Handler.lock:
            Handler.counter += 1
            number = Handler.counter
        if number <= args.fail_first:
            self.reply(503, {"error": {"message": "loading the model"}}, Retry_After="0.01")
            return
        if args.die_after and number > args.die_after:
            os._exit(1)
        time.sleep(args.delay)
        picture, question = body["messages"][0]["content"]
        raw = base64.b64decode(picture["image_url"]["url"].split(",", 1)[1])
        image = Image.open(io.BytesIO(raw))
        if max(image.size) == 1:
            self.reply(400, {"error": {"message": "the image is too small"}})
            return
        facts = {key: value for key, value in body.items() if key != "messages"}
        facts |= {
            "pixels": hashlib.sha256(image.tobytes()).hexdigest(),
            "size": image.size,
            "question": question["text"],
        }
        facts["key"] = self.headers.get("Authorization")
        with Handler.lock, open(args.log, "a", encoding="utf-8") as log:
            log.write(json.dumps(facts) + "\n")
        said, held = answer_about(image), body.get("structured_outputs", {}).get("choice") or body.get("grammar", "")
        if held and not args.deaf:  # the choice that names the breed
            choices = (
                held if isinstance(held, list) else json.loads(f"[{held.partition('(')[2][:-1].replace(' | ', ',')}]")
            )
            said = next(choice for choice in choices if any(breed in choice and breed in said for breed in BREEDS))
        self.reply(200, {"choices": [{"message": {"role": "assistant", "content": said}}]})


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("log")
    parser.add_argument("--die-after", type=int, default=0)
    parser.add_argument("--fail-first", type=int, default=0)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--engine", default="test")
    parser.add_argument("--begins", default="")
    parser.add_argument("--models", default="cats")
    parser.add_argument("--deaf", action="store_true", help="write freely, whatever list it is held to")
    args = parser.parse_args()
    server = ThreadingHTTPServer(("127.0.0.1", args.port), Handler)
    server.daemon_threads = True
    print(server.server_address[1], flush=True)
    server.serve_forever()
