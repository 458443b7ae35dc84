"""Image-text pairs of your own: awkward files and hostile paths."""

import io
import json
import os
import struct
import warnings
import zlib

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from umm_kit.data import imagetext
from umm_kit.data.imagetext import ImageText, read_image
from umm_kit.models.base import collate

RED, GREEN, BLUE, WHITE, GREY = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (128, 128, 128)


def quarters(width=64, height=64, colours=(RED, GREEN, BLUE, WHITE)):
    """An image of four flat quarters: top left, top right, bottom left, bottom right."""
    image = Image.new("RGB", (width, height))
    for k, colour in enumerate(colours):
        image.paste(colour, (k % 2 * width // 2, k // 2 * height // 2, (k % 2 + 1) * width // 2, (k // 2 + 1) * height // 2))
    return image


def saved(image, suffix="PNG", **options):
    file = io.BytesIO()
    image.save(file, suffix, **options)
    file.seek(0)
    return file


def pixel(tensor, x, y):
    return tuple(round(float(v) * 255) for v in tensor[:, y, x])


def write_folder(root, rows, kind="csv"):
    """A folder of (file name, text, extra fields) rows with one 40 x 40 picture for each name that is not there yet."""
    root.mkdir(parents=True, exist_ok=True)
    for k, row in enumerate(rows):
        file = root / row["file_name"]
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            quarters(40, 40, (RED, GREEN, BLUE, (20 * k % 256, 7, 99))).save(file)
    if kind == "jsonl":
        (root / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    else:
        columns = list(rows[0])
        lines = [",".join(columns)] + [",".join('"' + str(row[c]).replace('"', '""') + '"' for c in columns) for row in rows]
        (root / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


ROWS = [
    {"file_name": "a.png", "text": "four quarters"},
    {"file_name": "sub/b.png", "text": "ein Käfer, 猫 und 🦊"},
    {"file_name": "c.png", "text": 'a "c"'},
]


def same_items(a, b, ids=True):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert set(x) == set(y) == {"id", "images", "texts"}
        assert torch.equal(x["images"], y["images"]) and x["texts"] == y["texts"]
        assert not ids or x["id"] == y["id"]


# --- pixels --------------------------------------------------------------------------------------------------------------


def test_an_image_of_the_right_size_is_kept_to_the_byte():
    values = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    out = read_image(saved(Image.fromarray(values)))
    assert out.shape == (3, 32, 32) and out.dtype == torch.float32 and out.is_contiguous()
    assert torch.equal(out, torch.from_numpy(values).permute(2, 0, 1).float() / 255)


def test_crop_keeps_the_centred_square_and_pad_the_whole():
    # 3 bands of 32 columns: the crop of a 96 x 32 image is exactly the green one.
    bands = Image.new("RGB", (96, 32))
    for k, colour in enumerate((RED, GREEN, BLUE)):
        bands.paste(colour, (32 * k, 0, 32 * k + 32, 32))
    wide = read_image(saved(bands), 32)
    assert torch.equal(wide, torch.tensor([0.0, 1.0, 0.0])[:, None, None].expand(3, 32, 32))
    padded = read_image(saved(bands), 32, fit="pad")  # 32 x 11 in the middle, rows 10 to 20
    assert [pixel(padded, 5, y) for y in (0, 9, 10, 20, 21, 31)] == [GREY, GREY, RED, RED, GREY, GREY]
    assert pixel(padded, 16, 15) == GREEN and pixel(padded, 27, 15) == BLUE
    tall = read_image(saved(bands.transpose(Image.Transpose.TRANSPOSE)), 32)
    assert torch.equal(tall, wide)


def test_the_resize_is_anti_aliased():
    checks = np.indices((256, 256)).sum(0) % 2 * 255  # without a filter some pixels would be 0 and others 1
    out = read_image(saved(Image.fromarray(checks.astype(np.uint8))))
    assert (out - 0.5).abs().max() < 0.02
    corners = read_image(saved(quarters(200, 200)))
    assert [pixel(corners, x, y) for y in (4, 27) for x in (4, 27)] == [RED, GREEN, BLUE, WHITE]


def test_cropping_first_is_the_same_as_resizing_first():
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 128, 3), dtype=np.uint8))
    reference = np.asarray(noise.resize((64, 32), Image.Resampling.BICUBIC).crop((16, 0, 48, 32)))
    assert np.abs(read_image(saved(noise)).permute(1, 2, 0).numpy() * 255 - reference).max() <= 1


@pytest.mark.parametrize("size", [(5000, 1), (1, 5000), (3, 2), (1, 1)])
@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_extreme_aspect_ratios(size, fit):
    out = read_image(saved(Image.new("RGB", size, RED)), fit=fit)
    assert out.shape == (3, 32, 32) and pixel(out, 16, 16) in (RED, GREY)
    assert (out[0] > 0.9).any()


def palette():
    image = quarters().quantize(8)
    return saved(image)


def transparent_palette():
    image = Image.new("P", (64, 64), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.paste(1, (32, 0, 64, 64))
    return saved(image, transparency=1)


def sixteen_bit():
    return saved(Image.fromarray(np.full((64, 64), 32896, dtype=np.uint16)))  # 32896 / 65535 = 128 / 255


MODES = {
    "RGBA, half transparent red": (saved(Image.new("RGBA", (64, 64), (255, 0, 0, 128))), (192, 64, 64)),
    "RGBA, transparent": (saved(Image.new("RGBA", (64, 64), (255, 0, 0, 0))), GREY),
    "LA": (saved(Image.new("LA", (64, 64), (200, 255))), (200, 200, 200)),
    "L": (saved(Image.new("L", (64, 64), 77)), (77, 77, 77)),
    "1": (saved(Image.new("1", (64, 64), 1)), WHITE),
    "P": (palette(), RED),
    "P with a transparent colour": (transparent_palette(), RED),
    "I;16": (sixteen_bit(), GREY),
    "I;16B TIFF": (saved(Image.fromarray(np.full((64, 64), 32896, dtype=">u2")), "TIFF"), GREY),
    "F TIFF": (saved(Image.fromarray(np.full((64, 64), 0.2, dtype=np.float32)), "TIFF"), (51, 51, 51)),
    "CMYK TIFF": (saved(Image.new("CMYK", (64, 64), (0, 255, 255, 0)), "TIFF"), RED),
    "CMYK JPEG": (saved(Image.new("CMYK", (64, 64), (0, 255, 255, 0)), "JPEG", quality=100), RED),
    "animation, first frame": (saved(quarters(), "GIF", save_all=True, append_images=[Image.new("RGB", (64, 64), BLUE)]), RED),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_becomes_rgb(name):
    file, expected = MODES[name]
    file.seek(0)
    assert np.abs(np.subtract(pixel(read_image(file), 4, 4), expected)).max() <= 2
    if name == "P with a transparent colour":
        file.seek(0)
        assert pixel(read_image(file), 27, 4) == GREY


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    out = read_image(saved(quarters(), "JPEG", exif=exif, quality=100, subsampling=0))
    corners = [pixel(out, x, y) for y in (4, 27) for x in (4, 27)]
    assert np.abs(np.subtract(corners, (BLUE, RED, WHITE, GREEN))).max() <= 3


def test_a_large_jpeg_reads_like_the_same_png():
    ramp = np.linspace(0, 255, 1600).astype(np.uint8)
    bands = np.tile(ramp, (1200, 1)), np.tile(ramp[:1200, None], (1, 1600)), np.full((1200, 1600), 90, np.uint8)
    image = Image.fromarray(np.stack(bands, 2))
    difference = read_image(saved(image, "JPEG", quality=95)) - read_image(saved(image))
    assert difference.abs().max() < 0.02


def png_of_declared_size(width, height):
    """A PNG whose header promises an enormous image and whose body is a few bytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + body)


def test_decompression_bombs_are_refused_by_their_header():
    for side in (9_000, 60_000):  # below and above Pillow's own limit
        with pytest.raises(ValueError, match=r"too large .* limit is 67108864 pixels"):
            read_image(png_of_declared_size(side, side))


def test_what_is_not_an_image_is_refused():
    jpeg = saved(quarters(), "JPEG").getvalue()
    for data, reason in {
        b"": "not an image",
        b"hello": "not an image",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n": "not an image",  # its decoder would start Ghostscript
        jpeg[: len(jpeg) // 2]: "cannot be decoded",
        saved(Image.fromarray(np.full((9, 9), 300, np.float32)), "TIFF").getvalue(): "expected 0 to 1",
    }.items():
        with pytest.raises(ValueError, match=reason):
            read_image(io.BytesIO(data))


# --- folders and data sets -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_folder(tmp_path, kind):
    data = ImageText(write_folder(tmp_path / "pairs", ROWS, kind), image_size=16)
    assert [item["texts"] for item in data] == [row["text"] for row in ROWS] == data.texts
    assert [item["id"] for item in data] == ["a.png", "sub/b.png", "c.png"] == data.ids
    assert "n=3" in repr(data) and "pairs" in repr(data) and data.skipped == []
    assert data[0]["images"].shape == (3, 16, 16)
    assert not torch.equal(data[0]["images"], data[1]["images"])


def test_pictures_alone_are_taken_when_asked_for(tmp_path):
    folder = write_folder(tmp_path / "f", ROWS)
    (folder / "metadata.csv").write_text("file_name,text\na.png,four quarters\nc.png,\n")
    with pytest.raises(ValueError, match=r"(?s)2 of 3 items .*no caption"):
        ImageText(folder)
    some = ImageText(folder, captions=False)
    assert dict(zip(some.ids, some.texts, strict=True)) == {"a.png": "four quarters", "c.png": "", "sub/b.png": ""}
    (folder / "metadata.csv").unlink()
    (folder / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="pictures alone: captions=False, or umm-kit drift --start image"):
        ImageText(folder)
    with pytest.raises(ValueError, match=r"(?s)1 of 4 items .*broken.png"):
        ImageText(folder, captions=False)
    with pytest.warns(UserWarning, match="skipped"):
        bare = ImageText(folder, captions=False, on_error="skip")
    assert bare.ids == ["a.png", "c.png", "sub/b.png"] and set(bare.texts) == {""}


def test_an_item_is_the_same_by_every_way_to_it(tmp_path):
    data = ImageText(write_folder(tmp_path, ROWS))
    same_items([data[i] for i in range(3)], data.__getitems__(range(3)))
    same_items([data[i - 3] for i in range(3)], list(data))
    loaded = torch.utils.data.DataLoader(data, batch_size=2, collate_fn=collate, num_workers=1)
    assert torch.equal(torch.cat([batch["images"] for batch in loaded]), collate(list(data))["images"])
    for outside in (3, -4):
        with pytest.raises(IndexError, match="outside this data set of 3"):
            data[outside]


def test_folder_data_set_and_saved_data_set_agree(tmp_path):
    rows = [row | {"id": f"item {k}"} for k, row in enumerate(ROWS)]
    folder = write_folder(tmp_path / "folder", rows)
    table = datasets.Dataset.from_dict(
        {"image": [str(folder / r["file_name"]) for r in rows], "text": [r["text"] for r in rows], "id": [r["id"] for r in rows]}
    ).cast_column("image", datasets.Image())
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=table, test=table.select([1])).save_to_disk(tmp_path / "splits")
    reference = ImageText(folder)
    same_items(reference, ImageText(table))
    same_items(reference, ImageText(tmp_path / "saved"))
    same_items(reference, ImageText(str(tmp_path / "splits"), split="train"))
    same_items(reference, ImageText(datasets.DatasetDict(train=table), split="train"))
    renamed = table.rename_columns({"image": "picture", "text": "words"})
    same_items(reference, ImageText(renamed, text_column="words", image_column="picture"))
    same_items(reference, ImageText(table.remove_columns("id")), ids=False)
    assert ImageText(table.remove_columns("id")).ids == ["0", "1", "2"]


def test_splits_are_subfolders(tmp_path):
    write_folder(tmp_path / "train", ROWS)
    write_folder(tmp_path / "test", ROWS[:1])
    assert len(ImageText(tmp_path, split="train")) == 3 and len(ImageText(tmp_path, split="test")) == 1
    with pytest.raises(ValueError, match=r"no split 'dev'; it has \['test', 'train'\]"):
        ImageText(tmp_path, split="dev")
    with pytest.raises(ValueError, match="choose one with split="):
        ImageText(tmp_path)


def broken_folder(root):
    """One good pair and one of each kind of offender."""
    names = ("good", "twin", "silent", "cut", "empty", "fake")
    rows = [{"file_name": f"{name}.png", "text": name, "id": "twin" if name == "twin" else name} for name in names]
    rows += [{"file_name": "good.png", "text": "again", "id": "twin"}]
    write_folder(root, rows)
    (root / "cut.png").write_bytes((root / "cut.png").read_bytes()[:60])
    (root / "empty.png").write_bytes(b"")
    (root / "fake.png").write_text("not an image")
    quarters().save(root / "unnamed.jpg")
    with (root / "metadata.csv").open("a", encoding="utf-8") as file:
        file.write("gone.png,no such file,gone\n,no file name,nameless\ngood.png,three, fields,more\n")
    text = (root / "metadata.csv").read_text(encoding="utf-8")
    (root / "metadata.csv").write_text(text.replace('"silent.png","silent"', '"silent.png","  "'), encoding="utf-8")
    return root


OFFENDERS = {
    "twin": "metadata.csv line 8: the id is already that of metadata.csv line 3",
    "silent": "no caption",
    "cut": "cannot be decoded",
    "empty": "is empty",
    "fake": "not an image in a known format",
    "gone": "the file 'gone.png' does not exist",
    "nameless": "no file name",
    "metadata.csv line 11": "more fields than the header names",
    "unnamed.jpg": "no line names this image",
}


def test_one_error_lists_all_offenders(tmp_path):
    with pytest.raises(ValueError) as caught:
        ImageText(broken_folder(tmp_path))
    message = str(caught.value)
    assert "9 of 11 items" in message and "on_error='skip'" in message
    for name, reason in OFFENDERS.items():
        assert any(line.startswith(f"  {name}: ") and reason in line for line in message.splitlines()), (name, message)


def test_skipping_keeps_an_account(tmp_path):
    with pytest.warns(UserWarning, match="9 of 11 items"):
        data = ImageText(broken_folder(tmp_path), on_error="skip")
    assert data.ids == ["good", "twin"] and "skipped=9" in repr(data)
    assert {name for name, _ in data.skipped} == set(OFFENDERS)
    assert all(OFFENDERS[name] in reason for name, reason in data.skipped)


def test_a_long_list_of_offenders_is_capped(tmp_path):
    rows = [{"file_name": "a.png", "text": ""} | {"id": str(k)} for k in range(30)]
    with pytest.raises(ValueError, match=r"30 of 30 items[\s\S]*and 10 more") as caught:
        ImageText(write_folder(tmp_path, rows))
    assert str(caught.value).count("no caption") == 20
    with pytest.raises(ValueError, match="Nothing is left"):
        ImageText(tmp_path, on_error="skip")


def test_paths_that_leave_the_folder_are_never_read(tmp_path, monkeypatch):
    secret = tmp_path / "secret.png"
    quarters().save(secret)
    root = write_folder(tmp_path / "inside", ROWS[:1])
    (root / "link.png").symlink_to(secret)
    (root / "door").symlink_to(tmp_path)
    (root / "loop.png").symlink_to("loop.png")
    (root / "friend.png").symlink_to("a.png")  # stays inside: allowed
    os.mkfifo(root / "pipe.png")  # opening it would wait for ever
    hostile = ["../secret.png", str(secret), "sub/../../secret.png", "..\\secret.png", "C:\\secret.png", "link.png"]
    hostile += ["door/secret.png", "file:///etc/passwd", "https://example.org/a.png", "loop.png", "pipe.png", "a\0.png"]
    lines = [json.dumps({"file_name": name, "text": "x"}) for name in ("a.png", "friend.png", *hostile)]
    (root / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (root / "metadata.csv").unlink()
    read = []
    monkeypatch.setattr(imagetext, "read_image", lambda file, *options: read.append(file) or read_image(file, *options))
    with pytest.raises(ValueError, match="12 of 14 items") as caught:
        ImageText(root)
    assert str(caught.value).count("leaves the folder: refused, not read") == 5
    assert str(caught.value).count("leaves the folder through a link: refused, not read") == 2
    assert "'pipe.png' is not a regular file" in str(caught.value)
    with pytest.warns(UserWarning):
        data = ImageText(root, on_error="skip")
    assert data.ids == ["a.png", "friend.png"] and [name for name, _ in data.skipped] == hostile
    assert set(read) == {(root / "a.png").resolve()}


def test_metadata_and_saved_data_sets_may_not_leave_the_folder_either(tmp_path):
    other = write_folder(tmp_path / "other", ROWS)
    root = tmp_path / "root"
    root.mkdir()
    (root / "metadata.csv").symlink_to(other / "metadata.csv")
    with pytest.raises(ValueError, match="through a link"):
        ImageText(root)
    (tmp_path / "outer").mkdir()
    (tmp_path / "outer" / "train").symlink_to(other)
    with pytest.raises(ValueError, match="through a link"):
        ImageText(tmp_path / "outer", split="train")
    # A saved data set may name a path instead of holding bytes, and its state may name Arrow files elsewhere.
    rows = {"image": [{"bytes": None, "path": str(other / "a.png")}], "text": ["a secret"]}
    cell = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = datasets.Features({"image": cell, "text": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    info = json.loads((tmp_path / "saved" / "dataset_info.json").read_text())
    info["features"]["image"] = {"_type": "Image"}
    (tmp_path / "saved" / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match="leaves the saved data set: refused"):
        ImageText(tmp_path / "saved")
    state = json.loads((tmp_path / "saved" / "state.json").read_text())
    state["_data_files"][0]["filename"] = "../other.arrow"
    (tmp_path / "saved" / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="leaves the folder"):
        ImageText(tmp_path / "saved")


def test_nothing_is_fetched():
    cells = [{"bytes": None, "path": "https://example.org/a.png"}, None]
    table = datasets.Dataset.from_dict({"image": cells, "text": ["x", "y"]})
    table = table.cast_column("image", datasets.Image())
    with pytest.raises(ValueError, match=r"'https://example.org/a.png' does not exist on this machine[\s\S]*no image"):
        ImageText(table)


def test_metadata_in_awkward_shapes(tmp_path):
    write_folder(tmp_path, ROWS[:1])
    # As spreadsheets write it, with a byte order mark.
    (tmp_path / "metadata.csv").write_bytes(b"\xef\xbb\xbffile_name,text\r\na.png, two words \r\n")
    assert ImageText(tmp_path).texts == ["two words"]
    (tmp_path / "metadata.csv").unlink()
    name = {"file_name": "a.png"}
    lines = [name | {"text": "x"}, ["a.png"], name | {"text": 3, "id": 7}, name | {"text": "\ud800", "id": 8}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n{oops\n", encoding="utf-8")
    with pytest.raises(ValueError, match="4 of 5") as caught:
        ImageText(tmp_path)
    reasons = ("not a JSON object", "the caption is of type int", "the caption is not valid Unicode", "not JSON")
    for line, reason in enumerate(reasons, 2):
        assert f"line {line}: {reason}" in str(caught.value)


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda root: None, "is empty"),
        (lambda root: quarters().save(root / "a.png"), "has no metadata.csv or metadata.jsonl"),
        (lambda root: (root / "metadata.csv").write_text("file_name,text\n"), "has no rows"),
        (lambda root: (root / "metadata.csv").write_text("image,caption\na.png,x\n"), "expected 'file_name' .*image_column"),
        (lambda root: (root / "metadata.csv").write_bytes(b"file_name,text\na.png,\xff\n"), "cannot be read as UTF-8"),
        (lambda root: [(root / m).write_text("") for m in imagetext.METADATA], "has both"),
        (lambda root: (root / "state.json").write_text("{"), "cannot be loaded as a saved data set"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, make, reason):
    make(tmp_path)
    with pytest.raises(ValueError, match=reason):
        ImageText(tmp_path)


def test_mistaken_arguments_are_refused(tmp_path):
    write_folder(tmp_path, ROWS[:1])
    for option, value in {"on_error": "ignore", "fit": "stretch", "image_size": 0, "split": "x"}.items():
        with pytest.raises(ValueError, match=rf"{option} (is )?'?{value}"):
            ImageText(tmp_path, **{option: value})
    words = datasets.Dataset.from_dict({"image": ["a.png"], "text": ["x"]})
    sources = [tmp_path / "no", tmp_path / "a.png", words, [1, 2]]
    for source, reason in zip(sources, ("does not exist", "is a file", "expected exactly one", "type list"), strict=True):
        with pytest.raises(ValueError, match=reason):
            ImageText(source)
    with pytest.raises(ValueError, match="has no splits"):
        ImageText(words, split="train")
    with pytest.raises(ValueError, match=r"has \['train'\]"):
        ImageText(datasets.DatasetDict(train=words))


def test_a_file_that_breaks_later_is_named(tmp_path):
    data = ImageText(write_folder(tmp_path, ROWS))
    (tmp_path / "a.png").write_bytes(b"gone bad")
    with pytest.raises(ValueError, match=r"item 'a.png' .* has become unreadable"):
        data[0]


def test_a_clean_folder_does_not_warn(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ImageText(write_folder(tmp_path, ROWS), on_error="skip")
