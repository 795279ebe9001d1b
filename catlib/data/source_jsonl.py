"""Photos that come with conversations: LLaVA's own JSON or JSONL files."""

from pathlib import Path

from catlib.data.findings import Finding, Source
from catlib.data.llava import one_question, plain_row, read_rows, slashed, without_photo
from catlib.data.records import DATASET_CARD, PARTS, Sample, image_root_of, parse_sample, placed
from catlib.errors import InputError

ENDINGS = (".jsonl", ".json")


def is_jsonl(photos: Path) -> bool:
    """Whether this is a .jsonl or .json file, or a folder with train.jsonl (or .json) in it (or in its folder `vlm`)."""
    return photos.suffix in ENDINGS if photos.is_file() else jsonl_folder(photos) is not None


def jsonl_folder(photos: Path) -> Path | None:
    """The folder that holds train.jsonl or train.json."""
    return next((folder for folder in (photos, photos / "vlm") if _part(folder, "train")), None)


def _part(folder: Path, part: str) -> Path | None:
    return next((path for ending in ENDINGS if (path := folder / f"{part}{ending}").is_file()), None)


def read_jsonl_source(photos: Path) -> Source:
    """The photos and samples of one file, or of a folder's three; lines without a photo are left out, and that is said.

    Raises InputError naming file, line and key.
    """
    folder = photos.parent if photos.is_file() else jsonl_folder(photos)
    if folder is None:
        raise InputError(f"{photos}: no train.jsonl in it, nor in its folder 'vlm'")
    paths = [path for part in PARTS if (path := _part(folder, part))] if photos.is_dir() else [photos]
    root = _root(paths[0])
    # with no validation file the validation photos come out of train, so train is not fixed then
    fixed_parts = PARTS if any(path.stem == "val" for path in paths) else ("val", "test")
    findings: list[Finding] = []
    samples: dict[str, Sample] = {}
    ids: dict[str, str] = {}
    texts, longer = [], []
    for fixed, (where, row) in ((path.stem, entry) for path in paths for entry in read_rows(path)):
        if without_photo(row):
            texts.append(where)
            continue
        asked = one_question(plain := plain_row(row, where), where)
        longer += [where] * (asked.get("conversations") != plain.get("conversations"))
        sample = placed(parse_sample(asked, where), where, ids, root)
        if sample.image in samples:
            raise InputError(f"{where}: photo {sample.image!r} stands in two lines; one conversation a photo")
        samples[sample.image] = sample
        part, together = fixed if fixed in fixed_parts else "", str(sample.metadata.get("group") or sample.animal)
        findings.append(Finding(sample.image, "", source_name=sample.breed, official=part, animal=together))
    if not findings:
        raise InputError(f"{paths[0]}: no samples in it" + " that name a photo by the key 'image'" * bool(texts))
    notes = [f"conversations taken from {', '.join(path.name for path in paths)} as they are"]
    if texts:
        notes.append(f"{len(texts):,} lines without a photo are left out, the first is {texts[0]}")
    if longer:
        notes.append(
            f"of {len(longer):,} longer conversations only the question about the breed is used; first {longer[0]}"
        )
    return Source("llava-jsonl", root, tuple(findings), tuple(notes), samples=samples)


def _root(path: Path) -> Path:
    """The image root: the card's, else the first of the folder above (`data/` of `data/vlm`) and the folder itself that fits."""
    if (path.parent / DATASET_CARD).is_file():
        return image_root_of(path)
    image = next((row["image"] for where, raw in read_rows(path) if (row := plain_row(raw, where)).get("image")), "")
    roots = (path.resolve().parent.parent, path.resolve().parent)
    return next((root for root in roots if (root / slashed(root, str(image))).is_file()), image_root_of(path))
