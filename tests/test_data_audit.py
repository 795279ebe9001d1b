"""The audit tells each kind of broken file apart and keeps every good one."""

import io
import struct
import zlib

import pytest
from photo_makers import fill, jpeg, picture
from PIL import Image

from catlib.data.audit import KEPT, read_audit
from catlib.data.prepare import prepare
from catlib.errors import InputError
from catlib.settings import DataSettings


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def huge_png() -> bytes:
    """A PNG whose header promises 40,000 x 40,000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 40000, 40000, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"\0" * 100)
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, data)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def broken_files() -> dict[str, tuple[bytes, str, str]]:
    """Name -> bytes, verdict, remark: 40 files of every kind."""
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
        frames = [picture(n + 5 + k) for k in range(2)]
        files[f"moving{i}.gif"] = (encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), KEPT, "animated")
    return files


def settings(tmp_path, **more) -> DataSettings:
    values = {"photos": str(tmp_path / "photos"), "data_dir": str(tmp_path / "data"), "run_dir": str(tmp_path / "run")}
    return DataSettings(**{**values, **more})


def test_forty_broken_files_are_told_apart_and_the_good_ones_kept(tmp_path):
    photos = fill(tmp_path / "photos", {"Bengal": 20, "Manx": 20})
    files = broken_files()
    assert len(files) == 40
    for name, (data, _, _) in files.items():
        (photos / "Bengal" / name).write_bytes(data)
    before = {path: path.read_bytes() for path in photos.rglob("*.*")}
    dataset = prepare(settings(tmp_path))
    audit = {finding.image: finding for finding in read_audit(tmp_path / "run" / "audit.csv")}
    for name, (_, verdict, remark) in files.items():
        finding = audit[f"Bengal/{name}"]
        assert finding.verdict == verdict, f"{name}: {finding.verdict} ({finding.detail})"
        assert remark in finding.remarks, name
    assert audit["Bengal/turned0.jpg"].width == 64, "size after rotation"
    assert len(audit) == 80
    kept = {sample.image for part in ("train", "val", "test") for sample in dataset.part(part)}
    good = {f"{breed}/{i:03d}.jpg" for breed in ("Bengal", "Manx") for i in range(20)}
    assert good | {f"Bengal/{name}" for name, file in files.items() if file[1] == KEPT} == kept
    assert {path: path.read_bytes() for path in photos.rglob("*.*")} == before, "the audit changed a file"


def test_copies_and_the_same_photo_under_two_breeds(tmp_path):
    photos = fill(tmp_path / "photos", {"Bengal": 8, "Manx": 8})
    (photos / "Bengal" / "zcopy.jpg").write_bytes((photos / "Bengal" / "000.jpg").read_bytes())
    (photos / "Manx" / "foreign.jpg").write_bytes((photos / "Bengal" / "001.jpg").read_bytes())
    prepare(settings(tmp_path))
    audit = {finding.image: finding for finding in read_audit(tmp_path / "run" / "audit.csv")}
    assert audit["Bengal/000.jpg"].kept and audit["Bengal/zcopy.jpg"].verdict == "duplicate"
    assert "Bengal/000.jpg" in audit["Bengal/zcopy.jpg"].detail
    assert audit["Bengal/001.jpg"].verdict == audit["Manx/foreign.jpg"].verdict == "two breeds"


def test_links_inside_are_followed_and_links_that_leave_are_left_out(tmp_path):
    photos = fill(tmp_path / "photos", {"Bengal": 8, "Manx": 8})
    outside = fill(tmp_path / "elsewhere", {"Cymric": 1}, start=700) / "Cymric" / "700.jpg"
    (photos / "Bengal" / "out.jpg").symlink_to(outside)
    (photos / "Bengal" / "gone.jpg").symlink_to(photos / "nothing.jpg")
    (photos / "Bengal" / "loop").symlink_to(photos)
    (photos / "Bengal" / "circle.jpg").symlink_to("circle.jpg")
    (photos / ".hidden").mkdir()
    (photos / ".hidden" / "x.jpg").write_bytes(jpeg(99_001))
    (photos / "Manx" / "in.jpg").symlink_to(photos / ".hidden" / "x.jpg")
    prepare(settings(tmp_path))
    audit = {finding.image: finding for finding in read_audit(tmp_path / "run" / "audit.csv")}
    assert audit["Bengal/out.jpg"].verdict == "outside the root"
    assert audit["Bengal/gone.jpg"].verdict == "missing"
    assert audit["Bengal/circle.jpg"].verdict in ("unreadable", "outside the root", "missing")
    assert audit["Manx/in.jpg"].kept
    assert len(audit) == 20, "the loop was walked, or a hidden file was taken"


@pytest.mark.parametrize("kind", ["missing", "empty", "one photo", "text only"])
def test_wrong_folders_are_one_clear_error(tmp_path, kind):
    photos = tmp_path / "photos"
    if kind != "missing":
        photos.mkdir()
    if kind == "one photo":
        fill(photos, {"Bengal": 12, "Korat": 1})
    if kind == "text only":
        (photos / "Bengal").mkdir()
        (photos / "Bengal" / "a.jpg").write_text("hello")
    with pytest.raises(InputError) as error:
        prepare(settings(tmp_path))
    assert ("Korat" if kind == "one photo" else "audit.csv" if kind == "text only" else str(photos)) in str(error.value)
    assert "\n" not in str(error.value)
