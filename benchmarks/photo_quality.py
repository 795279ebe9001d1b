"""What the audit's limits of quality and cleanvision find of defects that were planted among real photos, and what each costs.

    pip install cleanvision==0.3.7
    python benchmarks/photo_quality.py --photos FOLDER --each 12

For each kind so many photos are spoilt: made dark or light, blurred, cut to a strip, emptied, framed. Found: the tool reports the planted kind.
Others: photos that were not spoilt and are reported as that kind. CPU seconds cover all threads and child processes.
"""

import argparse
import contextlib
import io
import json
import random
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from catlib.data.audit import audit
from catlib.data.findings import Finding
from catlib.data.images import open_image
from catlib.settings import DataSettings

SPOILT: dict[str, tuple[str, str, Callable[[Image.Image], Image.Image]]] = {  # kind → ours, cleanvision's, how
    "dark": ("dark", "dark", lambda p: ImageEnhance.Brightness(p).enhance(0.12)),
    "light": ("light", "light", lambda p: p.point(lambda v: 225 + v // 9)),
    "blurred": ("blurred", "blurry", lambda p: p.filter(ImageFilter.GaussianBlur(min(p.size) / 25))),
    "aspect": ("extreme aspect", "odd_aspect_ratio", lambda p: ImageOps.fit(p, (p.width, p.width // 4))),
    "empty": ("little information", "low_information", lambda p: ImageOps.expand(p.resize((20, 20)), 140, "white")),
    "framed": ("border", "", lambda p: ImageOps.expand(p, min(p.size) // 4, "black")),
}


def cpu() -> float:
    """CPU seconds of this process and of its finished children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--each", type=int, default=12)
    args = parser.parse_args()
    paths = sorted(args.photos.glob("*.jpg"))
    chosen = iter(random.Random(0).sample(paths, args.each * len(SPOILT)))
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        planted = {kind: [next(chosen).name for _ in range(args.each)] for kind in SPOILT}
        change = {name: SPOILT[kind][2] for kind, names in planted.items() for name in names}
        for path in paths:
            if path.name in change:
                change[path.name](open_image(path)).save(root / path.name, quality=90)
            else:
                (root / path.name).write_bytes(path.read_bytes())
        start = cpu()
        found = audit(root, [Finding(path.name, "cat") for path in paths], 32, DataSettings().quality)
        mid = cpu()
        ours = {kind: {f.image for f in found if SPOILT[kind][0] in f.quality.split(", ")} for kind in SPOILT}
        from cleanvision import Imagelab

        with contextlib.redirect_stdout(io.StringIO()):
            lab = Imagelab(data_path=str(root), verbose=False)
            lab.find_issues(n_jobs=1)
        end = cpu()
        issues = lab.issues
        theirs = {
            kind: {Path(p).name for p in issues.index[issues[f"is_{name}_issue"]]}
            if (name := SPOILT[kind][1])
            else set()
            for kind in SPOILT
        }
    spoilt = {name for names in planted.values() for name in names}
    for kind, names in planted.items():
        row = {"kind": kind, "planted": args.each}
        for tool, reported in (("audit", ours[kind]), ("cleanvision", theirs[kind])):
            row |= {tool: len(reported & set(names)), f"{tool}_others": len(reported - spoilt)}
        print(json.dumps(row))
    print(
        json.dumps(
            {"photos": len(paths), "audit_cpu_s": round(mid - start, 2), "cleanvision_cpu_s": round(end - mid, 2)}
        )
    )


if __name__ == "__main__":
    main()
