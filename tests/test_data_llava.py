"""LLaVA files of other people: what is unambiguous is read, for the rest the line and its conversion are named."""

import json
from pathlib import Path

import pytest
from photo_makers import fill

from catlib.cli import main
from catlib.data.conversations import QUESTION
from catlib.data.dataset import Dataset
from catlib.data.prepare import prepare
from catlib.data.records import image_root_of, read_samples
from catlib.errors import InputError
from catlib.settings import DataSettings


def line(number: int, breed: str, **more) -> dict:
    turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": f"This is a {breed}."}]
    return {"id": f"{breed} {number}", "image": f"images/{breed}/{number:03d}.jpg", "conversations": turns} | more


def lines(**more) -> list[dict]:
    return [line(i, breed, **more) for breed in ("Bengal", "Manx") for i in range(12)]


@pytest.fixture
def data(tmp_path) -> Path:
    """`data/images/<Breed>/NNN.jpg`, for files in `data/vlm`."""
    fill(tmp_path / "data" / "images", {"Bengal": 12, "Manx": 12})
    (tmp_path / "data" / "vlm").mkdir()
    return tmp_path / "data"


def made(data: Path, photos: Path) -> Dataset:
    run = data.parent / "run"
    return prepare(DataSettings(photos=str(photos), data_dir=str(data.parent / "out"), run_dir=str(run)))


def jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def numbered(rows: list[dict]) -> list[dict]:
    return [row | {"id": 7 + i} for i, row in enumerate(rows)]


def windows(rows: list[dict]) -> list[dict]:
    return [row | {"image": row["image"].replace("/", "\\")} for row in rows]


def longer(rows: list[dict]) -> list[dict]:
    """A question before the one about the breed, and one after it."""
    before = [{"from": "human", "value": "<image>\nWhat is on the coat?"}, {"from": "gpt", "value": "Spots."}]
    after = [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Quite."}]
    asked = [{"from": "human", "value": QUESTION}]
    return [row | {"conversations": [*before, *asked, row["conversations"][1], *after]} for row in rows]


def spoken(rows: list[dict]) -> list[dict]:
    """As the chat interfaces have it."""
    pieces = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    return [
        {"images": [row["image"]]}
        | {
            "messages": [
                {"role": "system", "content": "You know cats."},
                {"role": "user", "content": pieces},
                {"role": "assistant", "content": row["conversations"][1]["value"]},
            ]
        }
        for row in rows
    ]


def unplaced(rows: list[dict]) -> list[dict]:
    return [row | {"conversations": [{"from": "human", "value": QUESTION}, row["conversations"][1]]} for row in rows]


def with_texts(rows: list[dict]) -> list[dict]:
    turns = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hello, a Bengal asks?"}]
    return [rows[0], {"id": "text", "conversations": turns}, *rows[1:]]


FORMS = {
    "as documented": ("train.jsonl", jsonl(lines()).encode()),
    "a JSON list": ("train.json", json.dumps(lines()).encode()),
    "a JSON list, indented, with a byte order mark": ("train.json", json.dumps(lines(), indent=2).encode("utf-8-sig")),
    "a JSON list that is called jsonl": ("train.jsonl", json.dumps(lines()).encode()),
    "a byte order mark": ("train.jsonl", jsonl(lines()).encode("utf-8-sig")),
    "Windows paths and line ends": ("train.jsonl", jsonl(windows(lines())).replace("\n", "\r\n").encode()),
    "numbers as ids": ("train.json", json.dumps(numbered(lines())).encode()),
    "longer conversations": ("train.jsonl", jsonl(longer(lines())).encode()),
    "roles": ("train.jsonl", jsonl(spoken(lines())).encode()),
    "photos that no turn places": ("train.jsonl", jsonl(unplaced(lines())).encode()),
    "lines without a photo": ("train.jsonl", jsonl(with_texts(lines())).encode()),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("whole", ["folder", "file"])
def test_what_is_unambiguous_is_read(data, form, whole):
    name, content = FORMS[form]
    path = data / "vlm" / name
    path.write_bytes(content)
    dataset = made(data, path.parent if whole == "folder" else path)
    samples = [sample for part in ("train", "val", "test") for sample in dataset.part(part)]
    assert sorted(sample.image for sample in samples) == sorted(row["image"] for row in lines())
    for sample in samples:
        assert sample.image.split("/")[1] == sample.breed and sample.answer == f"This is a {sample.breed}."
        assert sample.question == QUESTION and sample.conversations[0]["value"].startswith("<image>\n")
    notes = " ".join(dataset.card["notes"])
    assert ("longer conversations" in notes) == (form in ("longer conversations", "roles"))
    assert ("1 lines without a photo" in notes and f"{path}:2" in notes) == (form == "lines without a photo")


@pytest.mark.parametrize("form", [form for form in FORMS if form not in ("roles", "longer conversations")])
def test_training_reads_the_same_forms_and_names_the_conversion_of_the_rest(data, form):
    name, content = FORMS[form]
    path = data / "vlm" / name
    rows = content.replace(b'"image":', b'"metadata": {"breed": "Bengal"}, "image":')
    path.write_bytes(rows)
    if form == "lines without a photo":
        with pytest.raises(InputError, match=r"train.jsonl:2: no photo in it; convert the file by `catlib data"):
            read_samples(path, image_root_of(path))
    else:
        assert [s.image for s in read_samples(path, image_root_of(path))] == [row["image"] for row in lines()]


def turns(*values: str) -> dict:
    return {"conversations": [{"from": ("human", "gpt")[i % 2], "value": v} for i, v in enumerate(values)]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (turns("<image>\nColour?", "Spots."), ("no 'breed'", "Spots.", '"metadata"')),
        (turns("<image>\nColour?", "Spots.", "Age?", "Old."), ("none of its 2 answers", '"metadata"')),
        (
            turns("<image>\nThis?", "Bengal", "That?", "Manx"),
            ("answers name Bengal and Manx", "leave the one question"),
        ),
        (turns("<image>\nThis?", "Bengal", "And <image>?", "Tail"), ("more than once", "a line for each photo")),
        (
            turns("<image>\nWhat?", "Spots.", "Age?", "Old.") | {"metadata": {"breed": "Manx"}},
            ("names the breed 'Manx'",),
        ),
        (turns("<image>\nWhat?", "Bengal", "Sure?"), ("one human turn and one gpt turn",)),
        (turns("<image>\n<image>\nWhat?", "Bengal"), ("exactly once",)),
        ({"image": ["a.jpg", "b.jpg"]}, ("lists 2 photos", "a line for each photo")),
        ({"image": "C:\\cats\\a.jpg"}, ("below the image root",)),
        ({"image": "https://example.org/a.jpg"}, ("below the image root",)),
        ({"image": "../../a.jpg"}, ("leaves its image root",)),
        ({"id": True}, ("'id'",)),
    ],
)
@pytest.mark.parametrize("ending", [".json", ".jsonl"])
def test_for_the_rest_the_line_and_the_conversion_are_named(data, change, words, ending):
    path = data / "vlm" / f"train{ending}"
    rows = [json.dumps(row) for row in (line(0, "Manx"), line(1, "Bengal") | change)]
    path.write_text("[\n" + ",\n".join(rows) + "\n]\n" if ending == ".json" else "\n".join(rows) + "\n")
    with pytest.raises(InputError) as error:
        made(data, path)
    assert f"{path}:{3 if ending == '.json' else 2}: " in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("content", ["[1]", '[{"id": 1},]', "[", '[{"id": NaN}]', "[]", '{"a": 1}', ""])
def test_what_is_no_list_of_samples_is_one_error(data, capsys, content):
    path = data / "vlm" / "train.json"
    path.write_text(content)
    assert main(["data", str(path), "--out", str(data.parent / "out" / "vlm")]) == 2
    assert str(path) in capsys.readouterr().err


def test_photos_under_a_link_are_refused_with_the_link_and_the_conversion_works(data):
    disk = data.parent / "disk"
    (data / "images").rename(disk)
    (data / "images").symlink_to(disk)
    path = data / "vlm" / "train.jsonl"
    path.write_text(jsonl(lines()))
    with pytest.raises(InputError, match=r"train.jsonl:1: .*link images,.*image_root") as error:
        made(data, path)
    assert str(disk) in str(error.value)
    path.write_text(jsonl([row | {"image": row["image"].removeprefix("images/")} for row in lines()]))
    (path.parent / "dataset.json").write_text(json.dumps({"image_root": str(disk)}))
    assert made(data, path.parent).image_root == disk
