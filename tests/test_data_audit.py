"""The audit tells each kind of broken file apart and keeps every good one."""

import os
import struct
import zlib

import numpy as np
import pytest
from photo_makers import encoded, fill, jpeg, picture
from PIL import Image, ImageOps

from catlib.data.audit import MAX_BYTES, audit
from catlib.data.duplicates import close_pairs
from catlib.data.findings import KEPT, Finding, read_audit
from catlib.data.images import open_image
from catlib.data.prepare import prepare
from catlib.errors import InputError
from catlib.settings import DataSettings


def huge_png() -> bytes:
    """A PNG whose header promises 40,000 x 40,000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 40000, 40000, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"\0" * 100)
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, data)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def broken_files() -> dict[str, tuple[bytes, str, str]]:
    """Name -> bytes, verdict, remark: 64 files of every kind, none like another."""
    files: dict[str, tuple[bytes, str, str]] = {}
    turned = Image.Exif()
    turned[274] = 6
    for i in range(4):
        n = 5000 + 100 * i
        photo = picture(n, (96, 64))
        files[f"truncated{i}.jpg"] = (jpeg(n)[: -100 - 100 * i], "truncated", "")
        files[f"text{i}.jpg"] = (f"not a photo {i}".encode(), "not an image", "")
        files[f"empty{i}.jpg"] = (b"", "empty", "")
        files[f"small{i}.png"] = (encoded(picture(n, (20 + i, 90)), "PNG"), "too small", "")
        files[f"bomb{i}.png"] = (huge_png() + bytes([i]), "too large", "")
        files[f"cmyk{i}.jpg"] = (encoded(picture(n + 1).convert("CMYK"), "JPEG"), KEPT, "CMYK")
        files[f"palette{i}.png"] = (encoded(picture(n + 2).convert("P"), "PNG"), KEPT, "palette")
        alpha = picture(n + 3).convert("RGBA")
        files[f"alpha{i}.png"] = (encoded(alpha, "PNG"), KEPT, "alpha")
        files[f"turned{i}.jpg"] = (encoded(picture(n + 4, (96, 64)), "JPEG", exif=turned), KEPT, "EXIF rotation")
        files[f"cut{i}.png"] = (encoded(photo, "PNG")[: -500 - 100 * i], "truncated", "")
        spoilt = bytearray(encoded(photo, "PNG"))
        spoilt[60 + i] ^= 0xFF  # its checksum no longer fits
        files[f"spoilt{i}.png"] = (bytes(spoilt), "broken", "")
        files[f"page{i}.jpg"] = (f"<!DOCTYPE html><title>404 {i}</title>".encode(), "not an image", "")
        files[f"grey{i}.jpg"] = (encoded(picture(n + 7).convert("L"), "JPEG"), KEPT, "greyscale")
        files[f"flat{i}.png"] = (encoded(Image.new("RGB", (64, 64 + i), "navy"), "PNG"), KEPT, "flat")
        files[f"notes{i}.txt"] = (b"about the photos", "no photo ending", "")
        frames = [picture(n + 5 + k) for k in range(2)]
        files[f"moving{i}.gif"] = (encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), KEPT, "animated")
    return files


def settings(tmp_path, **more) -> DataSettings:
    values = {"photos": str(tmp_path / "photos"), "data_dir": str(tmp_path / "data"), "run_dir": str(tmp_path / "run")}
    return DataSettings(**{**values, **more})


@pytest.mark.slow
def test_broken_files_of_every_kind_are_told_apart_and_the_good_ones_kept(tmp_path):
    photos = fill(tmp_path / "photos", {"Bengal": 20, "Manx": 20})
    files = broken_files()
    assert len(files) == 64
    for name, (data, _, _) in files.items():
        (photos / "Bengal" / name).write_bytes(data)
    before = {path: path.read_bytes() for path in photos.rglob("*.*")}
    dataset = prepare(settings(tmp_path))
    table = {finding.image: finding for finding in read_audit(tmp_path / "run" / "audit.csv")}
    for name, (_, verdict, remark) in files.items():
        finding = table[f"Bengal/{name}"]
        assert finding.verdict == verdict, f"{name}: {finding.verdict} ({finding.detail})"
        assert remark in finding.remarks, name
    assert table["Bengal/turned0.jpg"].width == 64, "size after rotation"
    assert len(table) == 104
    kept = {sample.image for part in ("train", "val", "test") for sample in dataset.part(part)}
    good = {f"{breed}/{i:03d}.jpg" for breed in ("Bengal", "Manx") for i in range(20)}
    assert good | {f"Bengal/{name}" for name, file in files.items() if file[1] == KEPT} == kept
    assert {path: path.read_bytes() for path in photos.rglob("*.*")} == before, "the audit changed a file"


def test_every_mode_opens_as_the_same_upright_rgb(tmp_path):
    grey = np.tile(np.linspace(0, 255, 64, dtype=np.uint8), (48, 1))
    wide = grey.astype(np.uint16) * 257
    files = {
        "16.png": Image.fromarray(wide),
        "32.tif": Image.fromarray(wide.astype(np.int32)),
        "8.png": Image.fromarray(grey),
        "f.tif": Image.fromarray(grey / np.float32(255)),
        "la.png": Image.fromarray(grey).convert("LA"),
        "p.gif": Image.fromarray(grey),
        "cmyk.tif": Image.fromarray(grey).convert("RGB").convert("CMYK"),
    }
    for name, image in files.items():
        image.save(tmp_path / name)
        opened = open_image(tmp_path / name)
        assert opened.mode == "RGB" and np.abs(np.asarray(opened)[..., 0].astype(int) - grey).max() <= 2, name
    hashes = {f.phash for f in audit(tmp_path, [Finding(name, "cat") for name in files], 32)}
    assert len(hashes) == 1 and hashes != {""}
    turned = Image.Exif()
    turned[274] = 6  # to be turned clockwise by a quarter
    Image.fromarray(grey).save(tmp_path / "turned.png", exif=turned)
    assert (np.asarray(open_image(tmp_path / "turned.png"))[..., 0] == np.rot90(grey, -1)).all()


def test_copies_and_the_same_photo_under_two_breeds(tmp_path):
    photos = fill(tmp_path / "photos", {"Bengal": 8, "Manx": 8})
    (photos / "Bengal" / "zcopy.jpg").write_bytes((photos / "Bengal" / "000.jpg").read_bytes())
    (photos / "Manx" / "foreign.jpg").write_bytes((photos / "Bengal" / "001.jpg").read_bytes())
    prepare(settings(tmp_path))
    table = {finding.image: finding for finding in read_audit(tmp_path / "run" / "audit.csv")}
    assert table["Bengal/000.jpg"].kept and table["Bengal/zcopy.jpg"].verdict == "duplicate"
    assert "Bengal/000.jpg" in table["Bengal/zcopy.jpg"].detail
    assert table["Bengal/001.jpg"].verdict == table["Manx/foreign.jpg"].verdict == "two breeds"


def test_saved_again_is_one_group_and_a_pair_under_two_breeds_is_remarked(tmp_path):
    photos = fill(tmp_path / "photos", {"Bengal": 12, "Manx": 12})
    (photos / "Bengal" / "again.jpg").write_bytes(
        encoded(Image.open(photos / "Bengal" / "000.jpg"), "JPEG", quality=40)
    )
    mirrored = ImageOps.mirror(Image.open(photos / "Manx" / "002.jpg"))
    (photos / "Manx" / "mirrored.png").write_bytes(encoded(mirrored, "PNG"))
    (photos / "Manx" / "again.jpg").write_bytes(encoded(Image.open(photos / "Bengal" / "001.jpg"), "JPEG", quality=40))
    prepare(settings(tmp_path))
    table = {finding.image: finding for finding in read_audit(tmp_path / "run" / "audit.csv")}
    same, foreign = table["Bengal/again.jpg"], table["Manx/again.jpg"]
    assert same.kept and (same.group, same.part) == (table["Bengal/000.jpg"].group, table["Bengal/000.jpg"].part)
    assert foreign.part == table["Bengal/001.jpg"].part and "under another breed (Bengal / Manx)" in foreign.remarks
    assert table["Manx/mirrored.png"].group == table["Manx/002.jpg"].group
    pairs = {(a.image, b.image) for a, b, _ in close_pairs(table.values(), 6)}
    assert pairs == {
        ("Bengal/000.jpg", "Bengal/again.jpg"),
        ("Bengal/001.jpg", "Manx/again.jpg"),
        ("Manx/002.jpg", "Manx/mirrored.png"),
    }
    assert len({finding.group for finding in table.values()}) == 24


def test_photos_outside_the_breed_folders_pipes_and_files_beyond_memory_are_named_not_opened(tmp_path):
    photos = fill(tmp_path / "photos", {"Bengal": 8, "Manx": 8})
    (photos / "stray.jpg").write_bytes(jpeg(77))
    (photos / "README.txt").write_text("about the photos")
    os.mkfifo(photos / "Bengal" / "pipe.jpg")  # whoever reads it waits for ever
    with (photos / "Bengal" / "film.jpg").open("wb") as film:
        film.truncate(MAX_BYTES + 1)
    prepare(settings(tmp_path))
    table = {finding.image: finding for finding in read_audit(tmp_path / "run" / "audit.csv")}
    assert table["stray.jpg"].verdict == "no breed" and "README.txt" not in table
    assert table["Bengal/pipe.jpg"].verdict == "unreadable" and table["Bengal/film.jpg"].verdict == "too large"
    assert sum(finding.kept for finding in table.values()) == 16


def test_links_that_the_user_put_into_the_folder_are_followed_and_loops_are_not(tmp_path):
    photos = fill(tmp_path / "photos", {"Bengal": 8, "Manx": 8})
    outside = fill(tmp_path / "elsewhere", {"Cymric": 1}, start=700) / "Cymric" / "700.jpg"
    (photos / "Bengal" / "out.jpg").symlink_to(outside)
    (photos / "Bengal" / "gone.jpg").symlink_to(photos / "nothing.jpg")
    (photos / "Bengal" / "loop").symlink_to(photos)
    (photos / "Bengal" / "circle.jpg").symlink_to("circle.jpg")
    (photos / ".hidden").mkdir()
    (photos / ".hidden" / "x.jpg").write_bytes(jpeg(99_001))
    (photos / "Manx" / "in.jpg").symlink_to(photos / ".hidden" / "x.jpg")
    dataset = prepare(settings(tmp_path))
    table = {finding.link: finding for finding in read_audit(tmp_path / "run" / "audit.csv")}
    assert table["Bengal/out.jpg"].kept and table["Bengal/out.jpg"].image == "elsewhere/Cymric/700.jpg"
    assert dataset.image_root == tmp_path and "1 of 20 files are links" in dataset.card["notes"][-1]
    assert table["Bengal/gone.jpg"].verdict == "missing"
    assert table["Bengal/circle.jpg"].verdict in ("unreadable", "outside the root", "missing")
    assert table["Manx/in.jpg"].kept
    assert len(table) == 20, "the loop was walked, or a hidden file was taken"


@pytest.mark.parametrize("kind", ["missing", "empty", "one photo", "text only", "no folders"])
def test_wrong_folders_are_one_clear_error(tmp_path, kind):
    photos = tmp_path / "photos"
    if kind != "missing":
        photos.mkdir()
    if kind == "one photo":
        fill(photos, {"Bengal": 12, "Korat": 1})
    if kind == "no folders":
        fill(photos, {".": 8})
    if kind == "text only":
        for breed in ("Bengal", "Manx"):
            (photos / breed).mkdir()
            (photos / breed / "a.jpg").write_text("hello")
    with pytest.raises(InputError) as error:
        prepare(settings(tmp_path, small_breeds="refuse"))
    assert ("Korat" if kind == "one photo" else "audit.csv" if kind == "text only" else str(photos)) in str(error.value)
    assert "\n" not in str(error.value)
    if kind in ("one photo", "text only"):
        left_out = [finding.image for finding in read_audit(tmp_path / "run" / "audit.csv") if not finding.kept]
        assert left_out == (["Bengal/a.jpg", "Manx/a.jpg"] if kind == "text only" else [])
