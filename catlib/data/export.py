"""A split for Hugging Face datasets: parquet files with the images in them, the features' types, and a dataset card."""

import json
from pathlib import Path
from typing import Any

from catlib.data.dataset import Dataset, load_dataset
from catlib.data.images import inside
from catlib.data.records import PARTS, Sample
from catlib.errors import InputError
from catlib.files import write_bytes, write_text
from catlib.folders import whole_folder

SHARD = 1000  # photos in a parquet file


def export_hf(vlm_dir: Path, to: Path, force: bool = False) -> Path:
    """Write the split in `vlm_dir` as `to`/data/PART-*.parquet with a README.md that datasets reads the parts from.
    Each row has the image as its file's bytes, id, breed (a class label), group, sha256, question, answer and
    conversations. Raises InputError where the extra is not installed or `to` is taken (but for `force`)."""
    datasets, pyarrow = _libraries()
    dataset = load_dataset(vlm_dir)
    features = datasets.Features(
        {
            "image": datasets.Image(),
            **{name: datasets.Value("string") for name in ("id", "group", "sha256", "question", "answer")},
            "breed": datasets.ClassLabel(names=list(dataset.breeds)),
            "conversations": [{"from": datasets.Value("string"), "value": datasets.Value("string")}],
        }
    )
    keep = (vlm_dir, dataset.image_root)
    with whole_folder(to, force, keep, ours=lambda folder: (folder / "data").is_dir()) as new:
        (new / "data").mkdir()
        for part in PARTS:
            samples = dataset.part(part)
            for n, first in enumerate(range(0, len(samples), SHARD)):
                rows = [_row(dataset, sample) for sample in samples[first : first + SHARD]]
                shard = f"{part}-{n:05d}-of-{-(-len(samples) // SHARD):05d}.parquet"
                table = pyarrow.Table.from_pylist(rows, schema=features.arrow_schema)
                pyarrow.parquet.write_table(table, new / "data" / shard)
        write_text(new / "README.md", _card(dataset))
    return to


def read_parquet(file: Path, to: Path) -> None:
    """Add the photos and conversations of one parquet file to the folder `to`, as LLaVA JSONL that is split already.
    Raises InputError where the extra is not installed or the file was not made by `export_hf`."""
    (datasets, pyarrow), part = _libraries(), file.name.partition("-")[0]
    try:
        table = pyarrow.parquet.read_table(file)
        features = datasets.Features.from_arrow_schema(table.schema)
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise InputError(f"{file}: cannot be read: {error}") from None
    if missing := {"image", "id", "breed", "group", "conversations"} - set(table.column_names):
        others = "only what catlib data export hf has written is read"
        raise InputError(f"{file}: no columns {', '.join(sorted(missing))}; {others}")
    lines = []
    for n, row in enumerate(table.to_pylist()):
        image = f"images/{file.stem}/{n:05d}{Path(row['image']['path'] or '').suffix}"
        write_bytes(to / image, row["image"]["bytes"])
        metadata = {"breed": features["breed"].int2str(row["breed"]), "group": row["group"]}
        sample = {"id": row["id"], "image": image, "conversations": row["conversations"], "metadata": metadata}
        lines.append(json.dumps(sample) + "\n")
    with (to / f"{part}.jsonl").open("a", encoding="utf-8") as stream:
        stream.writelines(lines)


def _libraries() -> tuple[Any, Any]:
    try:
        import datasets
        import pyarrow.parquet
    except ImportError:
        raise InputError("parquet files need Hugging Face datasets: pip install 'catlib[datasets]'") from None
    return datasets, pyarrow


def _row(dataset: Dataset, sample: Sample) -> dict[str, Any]:
    photo = inside(dataset.image_root, sample.image)
    return {
        "image": {"bytes": photo.read_bytes(), "path": photo.name},
        **{name: getattr(sample, name) for name in ("id", "group", "question", "answer")},
        "breed": dataset.breeds.index(sample.breed),
        "sha256": str(sample.metadata.get("sha256") or ""),
        "conversations": [{"from": turn["from"], "value": turn["value"]} for turn in sample.conversations],
    }


def _card(dataset: Dataset) -> str:
    given = [part for part in PARTS if dataset.part(part)]
    files = "".join(f"  - split: {part}\n    path: data/{part}-*.parquet\n" for part in given)
    counts = ", ".join(f"{len(dataset.part(part)):,} {part}" for part in given)
    listed = "".join(f"- {breed}\n" for breed in dataset.breeds)
    return (
        f"---\ntask_categories:\n- image-classification\n- image-text-to-text\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n"
        f"# Cat breeds\n{counts} photos of {len(dataset.breeds)} breeds, split by catlib so that no group of photos (one cat, "
        "near-duplicates) is in two parts: the column `group` says which photos are not independent. The rights in the photos are "
        f"their owners'.\n\n{listed}"
    )
