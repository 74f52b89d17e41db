"""The report of a mixture with images: pictures in the page itself, what is trained marked, figures of the pixel cap."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_report import EVIL, Page

from anabranch.artifacts import AuditPart, AuditRow, Exclusion, Mixture, MixtureVision, Unit
from anabranch.errors import CorruptedError
from anabranch.report import write_report
from anabranch.rows import RowImages, Rows, images_file, save_images, save_unit
from vision_models import encoded, picture


def unit_with_images(run: Path, name: str, number: int, images: list[bytes]) -> Unit:
    """A unit of one training row that shows all of `images`."""
    path = run / "mixture" / "units" / f"u{number}.safetensors"
    hashes = save_images(images_file(path), [len(i) for i in images], lambda i: images[i])
    shown = RowImages((images_file(path),), np.zeros(len(images), np.int32), np.arange(len(images), dtype=np.int32),
                      np.array([0, len(images)], np.int64))
    rows = Rows.of([([1, 2, 3], [0, 0, 1])])
    sha = save_unit(path, Rows(rows.input_ids, rows.response, rows.offsets, shown), Rows.of([]), hashes)
    return Unit(name=name, source="a.json", format="messages", file=f"units/u{number}.safetensors", sha256=sha, rows=1,
                epochs=1.0, samples=1, tokens=300, response_tokens=3, held_out_rows=1, held_out_tokens=9,
                held_out_response_tokens=2, images_file=f"units/u{number}.images.safetensors", images=len(images),
                image_tokens=196 * len(images))


def audit(unit: Unit, prompt: str = "What colour?", answer: str = "red<|im_end|>", images: list[int] | None = None) -> AuditRow:
    numbers = list(range(unit.images)) if images is None else images
    return AuditRow(unit=unit.name, where="a.json:1", images_file=unit.images_file or "", images=numbers, parts=[
        *(AuditPart(kind="image", text="<image>", tokens=196) for _ in numbers),
        AuditPart(kind="prompt", text=prompt, tokens=8), AuditPart(kind="trained", text=answer, tokens=3)])


def write_mixture(run: Path, units: list[Unit], rows: list[AuditRow], max_pixels: int | None = 614_656) -> Path:
    vision = MixtureVision(placeholder="<image>", max_pixels=max_pixels, images=11, scaled_down=4, image_tokens=600,
                           image_tokens_uncapped=1000, smallest=16, median=196, largest=784)
    excluded = [Exclusion(unit=units[0].name, rule=rule, rows=i + 2, split="train", example="a.json:9: x.png")
                for i, rule in enumerate(("missing_image", "broken_image", "huge_image", "animated_image"))]
    Mixture(units=units, transfer=[], retention=[], excluded=excluded, duplicates_in_train=0, duplicates_across=0,
            max_length=1024, chat_template="tokenizer", examples=[], vision=vision, audit=rows,
            ).save(run / "mixture" / "mixture.json")
    return write_report(run)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    run = tmp_path_factory.mktemp("vision") / "run"
    large = Image.effect_noise((900, 600), 90).convert("RGB")
    files = [[encoded(picture("red", size=(56, 28)))], [encoded(large, "JPEG"), encoded(picture("blue"), "BMP")],
             [encoded(picture("green", size=(28, 28)))]]
    units = [unit_with_images(run, name, i, f) for i, (name, f) in enumerate(zip(["colour", "pair", EVIL], files, strict=True))]
    rows = [audit(units[0]), audit(units[1], "Same?\nSay yes or no. " + "x" * 5000), audit(units[2], EVIL, EVIL)]
    return run, write_mixture(run, units, rows).read_text()


def pictures(source: str) -> list[Image.Image]:
    return [Image.open(io.BytesIO(base64.b64decode(data)))
            for data in re.findall(r'<img src="data:image/(?:png|jpeg);base64,([^"]+)"', source)]


def test_every_unit_shows_its_pictures_small_and_as_they_are(page):
    found = pictures(page[1])
    assert [p.size for p in found] == [(56, 28), (160, 107), (56, 56), (28, 28)]
    first = np.asarray(found[0].convert("RGB"), dtype=int)
    assert np.abs(first[10, 6] - (220, 30, 30)).max() < 12 and np.abs(first[3, 50] - 128).max() < 12
    assert "900 × 600" in page[1]
    assert 'alt="Image 2 of a training row of pair"' in page[1]


def test_only_answers_are_marked(page):
    marked = re.findall(r"<mark title=[^>]*>(.*?)</mark>", page[1], re.S)
    assert marked[0] == "red&lt;|im_end|&gt;" and len(marked) == 3
    assert not any("colour?" in m or "<image>" in m for m in marked)
    assert "tokens: 8 prompt, 392 image, 3 trained" in page[1] and page[1].count("image, 196 tokens") == 4


def test_what_data_says_is_inert_and_long_rows_are_cut(page):
    read = Page(page[1])
    assert "script" not in read.tags and not [k for k, _ in read.attributes if k.startswith("on")]
    assert '<script>alert("1")</script>' in read.text and "\x1b" not in page[1] and "\u202e" not in page[1]
    assert "x" * 800 not in page[1] and "letters …" in page[1]
    assert all(v.startswith(("#", "data:image/")) for k, v in read.attributes if k in ("src", "href", "xlink:href"))


def test_the_mixture_table_counts_images_and_the_cap_is_told(page):
    read = " ".join(Page(page[1]).text.split())
    text = (page[0] / "report.md").read_text()
    for words in ("image tokens", "614,656 pixels", "40.0%", "images, each once", "image missing", "image broken",
                  "image too large to open", "image animated"):
        assert words in read, words
    assert not re.search(r"\| training rows \|", text)  # beside images of every pass they would be two images a row
    assert re.search(r"\| samples \|.*\| images \| +image tokens \|", text) and re.search(r"pair +\|.*\| +2 \| +392 \|", text)
    assert "8 prompt, 392 image, 3 trained" in " ".join(text.split())
    assert re.search(r"\| 614,656 pixels +\| +11 \| +4 \| +196 \| +600 \| +66\.7% \| +40\.0% \|", text)


def test_without_a_cap_nothing_is_said_of_one_and_without_images_nothing_of_images(tmp_path):
    run = tmp_path / "run"
    unit = unit_with_images(run, "colour", 0, [encoded(picture("red"))])
    assert "pixels" not in Page(write_mixture(run, [unit], [audit(unit)], None).read_text()).text
    mixture = Mixture.load(run / "mixture" / "mixture.json")
    mixture.model_copy(update={"vision": None, "audit": []}).save(run / "mixture" / "mixture.json")
    read = Page(write_report(run).read_text())
    assert "image tokens" not in read.text and "img" not in read.tags


def test_many_units_of_noise_stay_within_bounds_and_are_the_same_again(tmp_path):
    """Noise is what compresses worst."""
    run = tmp_path / "run"
    noise = [encoded(Image.effect_noise((400, 400), 120).convert("RGB"), "JPEG") for _ in range(6)]
    one = unit_with_images(run, "u", 0, noise)
    units = [one.model_copy(update={"name": f"unit_{i:03d}"}) for i in range(230)]
    path = write_mixture(run, units, [audit(u) for u in units])
    source = path.read_text()
    assert len(source) < 4_000_000 and "and 5 more" in source and "The first 200 of 230 units" in source
    assert len(pictures(source)) == 200
    assert write_report(run).read_text() == source


def test_images_that_are_not_there_are_said_and_changed_ones_refused(tmp_path):
    run = tmp_path / "run"
    unit = unit_with_images(run, "colour", 0, [encoded(picture("red"))])
    path = run / "mixture" / (unit.images_file or "")
    data = bytearray(path.read_bytes())
    data[-30] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CorruptedError, match="image 0"):
        write_mixture(run, [unit], [audit(unit)])
    path.unlink()
    assert "is not in this folder" in write_report(run).read_text()


@pytest.mark.parametrize(("file", "images"), [
    ("../secret.images.safetensors", [0]), ("/etc/x.images.safetensors", [0]), ("units/other.images.safetensors", [0]),
    ("units/u0.images.safetensors", [-1]), ("units/u0.images.safetensors", [7])])
def test_an_audit_that_points_elsewhere_is_refused(tmp_path, file, images):
    run = tmp_path / "run"
    unit = unit_with_images(run, "colour", 0, [encoded(picture("red"))])
    strange = unit.model_copy(update={"images_file": file}) if file.startswith((".", "/")) else unit
    with pytest.raises(CorruptedError):
        write_mixture(run, [strange], [audit(unit, images=images).model_copy(update={"images_file": file})])


def test_a_row_of_hundreds_of_turns_is_cut_in_the_middle(tmp_path):
    unit = unit_with_images(tmp_path / "run", "talk", 0, [encoded(picture("red"))])
    turns = [AuditPart(kind=kind, text=f"{kind} {i} ", tokens=2) for i in range(300) for kind in ("prompt", "trained")]
    source = write_mixture(tmp_path / "run", [unit], [audit(unit).model_copy(update={"parts": turns})]).read_text()
    assert "… 560 more parts …" in source and source.count('title="trained: 2 tokens"') == 20
    assert "prompt 0 " in source and "trained 299 " in source and "prompt 150 " not in source


def test_a_thin_picture_is_not_drawn_as_high_as_a_page(page):
    """A strip of 1 x 160 pixels would be 72 wide, and so 11,520 high."""
    (rule,) = re.findall(r"\.pictures img\{([^}]*)\}", page[1])
    assert "max-height:240px" in rule and "object-fit:contain" in rule
