"""All photos of a cat stay in one part, whatever its table looks like, and what was not understood is said."""

import json
from collections import defaultdict

import pytest
from photo_makers import jpeg

from catlib.cli import main
from catlib.data.cats import MOST_PHOTOS, id_in_name, ids_in_names
from catlib.data.check import check
from catlib.data.dataset import Dataset, load_dataset
from catlib.data.findings import Finding
from catlib.data.petfinder import read_petfinder
from catlib.data.prepare import prepare
from catlib.settings import DataSettings

IDS = [46001234 + 7 * i for i in range(18)]
BREED_OF = {id: "Bengal" if i < 9 else "Manx" for i, id in enumerate(IDS)}


def settings(tmp_path, **more) -> DataSettings:
    values = {"photos": str(tmp_path / "pet"), "data_dir": str(tmp_path / "data"), "run_dir": str(tmp_path / "run")}
    return DataSettings(**{**values, **more})


def cats(tmp_path, table: bytes | None = None, per_cat: int = 2, name: str = "{id}_{n}.jpg"):
    """18 cats in the petfinder layout, and their table."""
    root = tmp_path / "pet"
    for i, (id, breed) in enumerate(BREED_OF.items()):
        (root / "images" / breed).mkdir(parents=True, exist_ok=True)
        for n in range(per_cat):
            (root / "images" / breed / name.format(id=id, n=n + 1)).write_bytes(jpeg(100 * i + n))
    if table is not None:
        (root / "data").mkdir()
        (root / "data" / "cats.csv").write_bytes(table)
    return root


def rows(line: str = "{id},Senior,{breed}", header: str = "id,age,breed", number=str) -> str:
    return "\n".join([header, *(line.format(id=number(id), breed=breed) for id, breed in BREED_OF.items())]) + "\n"


def in_two_parts(dataset: Dataset) -> list[str]:
    """The cats, by the names of their files, that stand in more than one part."""
    where = defaultdict(set)
    for part in ("train", "val", "test"):
        for sample in dataset.part(part):
            where[sample.image.rsplit("/")[-1].rsplit("_")[0]].add(part)
    assert len(where) == 18
    return [cat for cat, parts in where.items() if len(parts) > 1]


def exponent(id: int) -> str:
    return f"{id / 10**7:.7f}E+07"


READ = {  # tables that are understood: what they say goes into the samples
    "as documented": rows().encode(),
    "semicolons": rows("{id};Senior;{breed}", "id;age;breed").encode(),
    "tabs in UTF-16": rows("{id}\t Senior\t{breed}", "id\tage\tbreed").encode("utf-16"),
    "bars, byte order mark": rows("{id}|Senior|{breed}", "ID|Age|Breed").encode("utf-8-sig"),
    "Excel's own line": b"sep=;\r\n" + rows("{id};Senior;{breed}", "Id;Age;Breed").encode(),
    "header case": rows(header="Id,Age,Breed").encode(),
    "header of words": rows(header="Pet ID,AGE,Primary_Breed").encode(),
    "no breed column": rows(header="id,age,remark").encode(),
    "decimal point": rows(number=lambda id: f"{id}.0").encode(),
    "decimal comma": rows("{id};Senior;{breed}", "id;age;breed", lambda id: f"{id},00").encode(),
    "thousands": rows('"{id}",Senior,{breed}', number=lambda id: f"{id:,}").encode(),
    "points for thousands": rows("{id};Senior;{breed}", "id;age;breed", lambda i: f"{i:,}".replace(",", ".")).encode(),
    "texts by a formula": rows('"=""{id}""",Senior,{breed}').encode(),
    "texts by an apostrophe": rows("'{id},Senior,{breed}").encode(),
    "whole exponents": rows(number=exponent).encode(),
    "leading zeros": rows(number=lambda id: f"{id:012d}").encode(),
    "Windows text": rows("{id},Senior,{breed},Müller", "id,age,breed,Halter").encode("cp1252"),
    "a field of 140,000 characters": rows("{id},Senior,{breed}," + 140_000 * "x", "id,age,breed,text").encode(),
    "photos with backslashes": "".join(
        ["Photo;Age;Id\n", *(f"images\\{b}\\{i}_{n}.jpg;Senior;{i}\n" for i, b in BREED_OF.items() for n in (1, 2))]
    ).encode(),
}
DOUBTED = {  # tables that are not, and what is said of them
    "rounded": (rows(number=lambda id: f"{id / 10**7:.2f}E+07").encode(), "18 ids are rounded"),
    "of other cats": (rows(number=lambda id: str(id + 5_000_000)).encode(), "none of its rows"),
    "no known column": (b"colour,mood\nred,good\n", "no column names the photo"),
    "empty": (b"", "no column names the photo"),
    "no text": (bytes(range(256)) * 20, "no column names the photo"),
    "a workbook": (b"PK\3\4" + 400 * b"\0", "no column names the photo"),
    "contradictory": ((rows() + rows().replace("Bengal", "Korat").replace("Manx", "Korat")).encode(), "contradict"),
    "one id for all": (
        ("photo,id\n" + "".join(f"{i}_{n}.jpg,1\n" for i in IDS for n in (1, 2))).encode(),
        "more than 30 photos",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", READ)
def test_tables_are_read_whatever_their_form(tmp_path, kind):
    cats(tmp_path, READ[kind])
    dataset = prepare(settings(tmp_path))
    assert in_two_parts(dataset) == []
    about = [s.metadata["cat"] for part in ("train", "val", "test") for s in dataset.part(part)]
    assert len(about) == 36 and {cat["age"] for cat in about} == {"Senior"}
    assert {cat["id"] for cat in about} == set(map(str, IDS))
    assert check(tmp_path / "data" / "vlm").problems == ()


@pytest.mark.slow
@pytest.mark.parametrize("kind", DOUBTED)
def test_tables_that_say_nothing_are_said_and_names_group(tmp_path, capsys, kind):
    table, words = DOUBTED[kind]
    cats(tmp_path, table)
    dataset = prepare(settings(tmp_path))
    assert in_two_parts(dataset) == []
    assert [line for line in dataset.card["cats"]["said"] if words in line and "cats.csv" in line]
    out = tmp_path / "data" / "vlm"
    assert main(["data", "check", str(out)]) == 0
    assert words in capsys.readouterr().out


def test_a_relabelled_photo_does_not_cost_its_cat_the_id(tmp_path):
    cats(tmp_path)
    prepare(settings(tmp_path))
    (tmp_path / "data" / "vlm" / "corrections.csv").write_text(
        f"image,action,to\nimages/Bengal/{IDS[0]}_1.jpg,relabel,Manx\n"
    )
    dataset = prepare(settings(tmp_path))
    assert in_two_parts(dataset) == [] and dataset.card["cats"]["no_ids"] == []
    assert check(tmp_path / "data" / "vlm").problems == ()


def test_a_table_that_may_not_be_read_or_is_no_text_table_is_said(tmp_path):
    root = cats(tmp_path)
    (root / "Cats.XLSX").write_bytes(b"PK")
    assert "export it as cats.csv" in read_petfinder(root).doubts[0]
    (root / "cats.csv").mkdir()
    (root / "Cats.XLSX").unlink()
    assert "not used" in read_petfinder(root).doubts[0]


def test_names_group_without_a_table_in_every_layout_and_a_split_of_others_is_checked_by_them(tmp_path):
    root = cats(tmp_path)
    assert in_two_parts(prepare(settings(tmp_path))) == []
    for breed in ("Bengal", "Manx"):
        (root / "images" / breed).rename(root / breed)
    (root / "images").rmdir()
    dataset = prepare(settings(tmp_path, data_dir=str(tmp_path / "plain")))
    assert dataset.card["source"] == "folders" and in_two_parts(dataset) == []
    assert dataset.card["cats"]["said"] == [
        "36 photos show 18 cats by the id in their names; all of one cat stay in one part"
    ]
    out = tmp_path / "plain" / "vlm"
    lines = [json.loads(line) for line in (out / "test.jsonl").read_text().splitlines()]
    for name in ("dataset.json", "groups.csv"):
        (out / name).unlink()
    for line in lines:
        del line["metadata"]["cat"], line["metadata"]["group"]
    for breed in ("Bengal", "Manx"):
        (root / breed).rename(tmp_path / "plain" / breed)
    (out / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[1:]))
    with (out / "train.jsonl").open("a") as stream:
        stream.write(json.dumps(lines[0]) + "\n")
    assert [problem for problem in check(out).problems if "by the id in their names" in problem]
    assert load_dataset(out).card == {}


def test_a_key_that_spans_breeds_or_has_many_photos_is_no_id():
    def photos(breed: str, *names: str) -> list[Finding]:
        return [Finding(f"{breed}/{name}.jpg", breed) for name in names]

    mixed = photos("Bengal", "7_1", "7_2", "12_1") + photos("Manx", "12_2", *(f"5_{i}" for i in range(MOST_PHOTOS)))
    ids, refused, said = ids_in_names(mixed)
    assert refused == ["12"] and ids[:4] == ["7", "7", "", ""] and set(ids[4:]) == {"5"}
    assert "12" in said[0] and "several breeds" in said[0]
    ids, refused, said = ids_in_names(mixed + photos("Manx", "5_99"))
    assert set(ids) == {""} and refused == ["12", "5", "7"] and "most photos" in said[2]
    few = photos("Bengal", *(f"{id}_{n}" for id in range(100, 120) for n in range(2)))
    ids, refused, said = ids_in_names(few + photos("Manx", *(f"5_{i}" for i in range(MOST_PHOTOS + 1))))
    assert refused == ["5"] and ids[0] == ids[1] == "100" and f"more than {MOST_PHOTOS}" in said[0]
    known = [Finding(f"{breed}/12_{n}.jpg", breed, animal="12") for n, breed in enumerate(("Bengal", "Manx"))]
    assert ids_in_names(known) == (["12", "12"], [], [])


@pytest.mark.parametrize(
    ("name", "id"),
    [
        ("46001234_1.jpg", "46001234"),
        ("0046_01.JPG", "46"),
        ("7003_1 (1).jpg", "7003"),
        ("7003_1_small.jpg", "7003"),
        ("bengal_12.jpg", ""),
        ("IMG_0001.jpg", ""),
        ("IMG_2020_1.jpg", ""),
        ("12.jpg", ""),
        ("12_a.jpg", ""),
        ("12-1.jpg", ""),
    ],
)
def test_the_id_in_a_name(name, id):
    assert id_in_name(f"Bengal/{name}") == id
