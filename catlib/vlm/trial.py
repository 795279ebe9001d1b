"""Run in a process of its own, as a script: what comes with a model and may take for ever or all memory (see processors).

Reads one JSON object from standard input: `template`, a chat template, or `tokenizer`, the path of a tokenizer.json. Exit code 1
where the memory does not suffice; errors are others' business.
"""

import json
import re
import sys
from contextlib import suppress

TEXT = "What breed is the cat in this photo? " + "a" * 60 + "!"


def main() -> int:
    """Try what is named."""
    with suppress(ImportError, ValueError, OSError):  # Windows has no such limit
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]) * 10**9,) * 2)
    data = json.load(sys.stdin)
    try:
        if template := data.get("template"):
            _render(template)
        if path := data.get("tokenizer"):
            from tokenizers import Tokenizer

            Tokenizer.from_file(path).encode(TEXT)
    except MemoryError:
        return 1
    except Exception as error:
        return int("memory" in str(error).lower())
    return 0


def _render(template: str) -> None:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    template = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", template)  # transformers' own tag
    loops = ["jinja2.ext.loopcontrols"]
    world = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=loops)
    world.globals |= {"raise_exception": str, "strftime_now": str}
    content = [{"type": "image"}, {"type": "text", "text": TEXT}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": content[1:]}]
    more = {"bos_token": "<s>", "eos_token": "</s>", "tools": None, "documents": None}
    for messages, asks in ((turns[:1], True), (turns, False)):
        for part in world.from_string(template).generate(messages=messages, add_generation_prompt=asks, **more):
            del part  # never the whole text, which may be endless


if __name__ == "__main__":
    sys.exit(main())
