"""A stand-in for an engine's server: /health says 503 for a while and then 200, and a child process runs beside it.

    python fake_engine.py --port PORT [--loading N] [--die-after S] [--stubborn] [any other option]

It writes its arguments and the child's process id into the file that FAKE_ENGINE_NOTES names.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer


def option(name: str, default: float) -> float:
    return float(sys.argv[sys.argv.index(name) + 1]) if name in sys.argv else default


class Handler(BaseHTTPRequestHandler):
    asked = 0

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        Handler.asked += 1
        self.send_response(503 if Handler.asked <= option("--loading", 2) else 200)
        self.end_headers()


def main() -> None:
    if "--broken" in sys.argv:
        sys.exit("error: the model file is broken")
    if "--stubborn" in sys.argv:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with open(os.environ["FAKE_ENGINE_NOTES"], "w", encoding="utf-8") as notes:
        json.dump({"arguments": sys.argv[1:], "child": child.pid, "own": os.getpid()}, notes)
    if seconds := option("--die-after", 0):
        threading.Thread(target=lambda: (time.sleep(seconds), os._exit(3)), daemon=True).start()
    HTTPServer(("127.0.0.1", int(option("--port", 0))), Handler).serve_forever()


if __name__ == "__main__":
    main()
