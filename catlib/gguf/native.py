"""llama.cpp's own HTTP server out of the package xllamacpp, whose wheels need no compiler but bring no command line.

The options are llama-server's, by name; it knows no others.
"""

import argparse
import signal
import sys
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "mmproj", "alias", "host"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--ctx-size", type=int, default=0)
    parser.add_argument("--jinja", action="store_true", help="always on")
    args = parser.parse_args()

    import xllamacpp

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(0))
    params = xllamacpp.CommonParams()
    params.model.path, params.mmproj.path = args.model, args.mmproj
    params.model_alias = {args.alias}
    params.hostnames, params.port = [args.host], args.port
    params.use_jinja = True
    params.n_ctx = args.ctx_size  # 0: the model's own
    server = xllamacpp.Server(params)  # it listens, in threads of its own, for as long as the object lives
    while server is not None:
        time.sleep(3600)


if __name__ == "__main__":
    main()
