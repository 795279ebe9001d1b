"""`catlib serve`: what the verdict of a run says behind HTTP, or a tuned model behind an OpenAI-compatible URL by an engine."""

import argparse
import logging
import runpy
import shlex
import sys
from typing import TYPE_CHECKING

from catlib.commands.options import say
from catlib.errors import InputError, MissingExtra
from catlib.files import read_json
from catlib.parameters import parse_value
from catlib.paths import application_file, resolve
from catlib.settings import DECODINGS, DEVICES, all_options
from catlib.signals import ENDINGS, handling

if TYPE_CHECKING:
    from catlib.serving.engine_process import Command, Where

log = logging.getLogger(__name__)
EPILOG = """Engines: service answers by catlib's own service in this process (a page at /, photos to /breed); vllm and llama.cpp are
programs: the command that is run is printed first, what follows -- is added to it, and the served model is asked by catlib
predict --model endpoint:URL#NAME. Exit codes: 0 stopped by Ctrl-C, SIGTERM or SIGHUP, 1 the engine failed, 2 wrong input."""
RUN = "what the verdict of this run says; --model NAME: another of its models"
FAULTY = (
    "when this model was exported, llama.cpp (%s) read the class token of its CLIP tower as a patch (issue 25814), and gave "
    "the right answer for %d of %d photos; unless this build has the fix, expect the same"
)


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--engine", choices=["service", "vllm", "llama.cpp"], help="default with --run: service")
    add("--run", dest="of_run", metavar="RUN", help=RUN)
    add("--checkpoint", metavar="DIR", help="service, vllm: adapter, served unmerged on its base")
    add("--model", metavar="DIR", help="vllm: plain or merged model; llama.cpp: folder of catlib export gguf")
    add("--base-model", default="", metavar="REF", help="base of the adapter; default: as the checkpoint says")
    add("--decoding", default="score", choices=DECODINGS, help="service: of a checkpoint (default: score)")
    add("--device", default="auto", help=f"service: where it computes: {', '.join(DEVICES)} (default: auto)")
    add("--name", default="cats", help="engines: name to ask for the model by (default: cats)")
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine alone)")
    add("--port", type=int, default=8000, help="port (default: 8000; 0: any that is free)")
    add("--dtype", default="auto", help="vllm: weights (default: the model's own)")
    add("--context", type=int, default=0, metavar="N", help="longest prompt and answer, tokens (default: the model's)")
    add("--python", default="", metavar="PATH", help="vllm: interpreter of its environment, or CATLIB_VLLM_PYTHON")
    add("--binary", default="", metavar="PATH", help="llama.cpp: its llama-server, or CATLIB_LLAMA_SERVER")
    add("--timeout", type=float, default=600, metavar="S", help="longest time to wait for an answer (default: 600)")
    add("--print", dest="print_only", action="store_true", help="print the command and run nothing")
    add("extra", nargs="*", metavar="-- OPTION", help="options of the engine itself, after --")


def run(args: argparse.Namespace) -> None:
    """Serve until it is interrupted."""
    from catlib.serving.engine_process import free_port, running

    args.engine = args.engine or ("service" if args.of_run else None)
    if args.engine is None:
        raise InputError("serve what, and by which engine? give --run RUN, or --engine with --checkpoint or --model")
    parse_value(all_options()["device"], args.device, "--device")  # raises InputError
    if not 0 <= args.port < 65536 or args.context < 0:
        raise InputError(f"--port {args.port} or --context {args.context} is out of range")
    if not args.host:
        raise InputError("--host: which address? 127.0.0.1 is this machine alone, 0.0.0.0 every address that it has")
    args.port = args.port or free_port()
    if args.engine == "service":
        _serve_here(args)
        return
    command = build(args)
    say(command)
    if args.print_only:
        return
    try:
        with handling(*ENDINGS), running(command, args.timeout) as engine:
            say(
                f"answers after {engine.start_s:.1f} s at {command.url}/v1, model {command.model}; Ctrl-C stops it\n"
                f"ask it: catlib predict --checkpoint {shlex.quote(args.checkpoint or args.model)} "
                f"--model 'endpoint:{command.url}/v1#{command.model}' PHOTO"
            )
            engine.wait()
    except KeyboardInterrupt:
        print("catlib: the engine is stopped", file=sys.stderr)


def _serve_here(args: argparse.Namespace) -> None:
    """The service in this process, behind HTTP."""
    from catlib.serving.engine_process import Command, refuse_taken_port
    from catlib.serving.service import VLMService
    from catlib.vlm.checkpoint import find_checkpoint

    try:
        import uvicorn

        example = runpy.run_path(str(application_file()))
    except ImportError as error:
        raise MissingExtra(error.name or "fastapi", "serve", "serving by catlib's own service") from None
    if args.extra or args.print_only or bool(args.of_run) == bool(args.checkpoint) or (args.model and not args.of_run):
        raise InputError(
            "--engine service takes either --run RUN (with --model NAME) or --checkpoint DIR, and no options after --"
        )
    where = Command("service", (), args.name, args.host, args.port)
    refuse_taken_port(where)
    with handling(*ENDINGS), VLMService(decoding=args.decoding) as service:
        try:
            if args.of_run:
                service.load_run(args.of_run, args.model or "", args.device)
            else:
                service.load(find_checkpoint(resolve(args.checkpoint), base_model=args.base_model), args.device)
            loaded = service.classifier
            say(f"answers at {where.url}/ with {loaded.name if loaded else ''}; Ctrl-C stops it")
            uvicorn.run(example["application"](service), host=args.host, port=args.port, log_level="warning")
        except KeyboardInterrupt:
            print("catlib: the service is stopped", file=sys.stderr)


def build(args: argparse.Namespace) -> "Command":
    """The engine's command for the options. Raises InputError when they do not add up."""
    from catlib.serving.engine_process import Where

    if args.of_run:
        _name_the_checkpoint(args)
    if bool(args.checkpoint) == bool(args.model):
        raise InputError("which model? give either --checkpoint DIR or --model DIR")
    if own := [text for text in args.extra if text.partition("=")[0] in ("--host", "--port")]:
        raise InputError(f"{own[0].partition('=')[0]} after --: give it before, where catlib reads it as well")
    where = Where(args.host, args.port, args.name, tuple(args.extra))
    if args.engine == "llama.cpp":
        return _llama(args, where)
    from catlib.gguf.engines import vllm_command
    from catlib.vlm.checkpoint import find_checkpoint

    found = find_checkpoint(resolve(args.checkpoint) if args.checkpoint else args.model, base_model=args.base_model)
    found.check_engines()
    given = {"python": args.python, "dtype": args.dtype, "max_model_len": args.context}
    return vllm_command(found.base, where, adapter=found.adapter, **given)


def _name_the_checkpoint(args: argparse.Namespace) -> None:
    """Put the folder of the VLM that a run says to use where an engine finds it."""
    from catlib.serving.winner import adapter_of, choose, sidecar_of

    if args.checkpoint:
        raise InputError("which model? give either --run RUN or --checkpoint DIR")
    folder, use = choose(args.of_run, args.model or "")
    about = {} if "+" in use else sidecar_of(folder, use)
    if about.get("decoding") not in DECODINGS:
        raise InputError(
            f"{folder.name}: {use} is no single VLM, and {args.engine} serves nothing else: --engine service serves it"
        )
    args.checkpoint, args.model = str(adapter_of(folder, about) or about["base_model"]), None


def _llama(args: argparse.Namespace, where: "Where") -> "Command":
    """llama.cpp's command; what the export has found out about llama.cpp with this model is said again."""
    from catlib.gguf.engines import llama_command
    from catlib.serving.export import EXPORT

    if args.checkpoint:
        raise InputError(
            f"llama.cpp reads no checkpoints: catlib export gguf --checkpoint {args.checkpoint} --out GGUF, then serve --model GGUF"
        )
    folder = resolve(args.model).resolve()
    command = llama_command(folder, where, binary=args.binary, context=args.context)
    facts = read_json(folder / EXPORT) if (folder / EXPORT).is_file() else {}
    if facts.get("with_class_token_defect"):
        log.warning(FAULTY, facts["engine"], facts["verified"]["same"], facts["verified"]["photos"])
    return command
