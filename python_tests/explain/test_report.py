"""Reports are one file that needs nothing else, escape what they show, and cope with half a run folder."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from fgvc_ext.explain import document
from fgvc_ext.explain.confusions import confused_pairs, write_confusions_csv
from fgvc_ext.explain.figures import curves_figure
from fgvc_ext.explain.report import Report, Section, read_rows, save_figure, save_table, write_run_report

EVIL = "<script>alert('x')</script> & \"quotes\""
METRICS = "stage,epoch,lr,train_loss,train_accuracy,test_accuracy,images_per_second\n"


class Outline(HTMLParser):
    """Tags, attributes and text of a page; counts that each tag is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.texts)


def photo(seed: int, width: int = 1000, height: int = 700) -> bytes:
    noise = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    file = io.BytesIO()
    Image.fromarray(noise.numpy()).save(file, "PNG")
    return file.getvalue()


def headings(file: Path) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", file.read_text())


def embedded(page: str) -> list[Image.Image]:
    found = re.findall(r'src="data:image/(?:png|jpeg);base64,([^"]+)"', page)
    return [Image.open(io.BytesIO(base64.b64decode(data, validate=True))) for data in found]


@pytest.fixture
def run(tmp_path):
    """The folder of a finished run with two stages."""
    folder = tmp_path / "run"
    folder.mkdir()
    facts = {
        "status": "finished",
        "sessions": [
            {"command": ["python", "train/subtle_differences.py", "demo"], "versions": {"torch": "2.15.0"}},
        ],
        "seed": 3,
        "data": {"name": EVIL, "fingerprint": "f00d", "classes": 20, "train_images": 600, "test_images": 400},
        "stages": [
            {
                "name": "plain",
                "status": "done",
                "epoch": 2,
                "accuracy": {"last": 0.5, "best_test": 0.625, "best_val": None},
            },
            {
                "name": "ours",
                "status": "done",
                "epoch": 2,
                "accuracy": {"last": 0.71234, "best_test": 0.75, "five_crop": 0.73},
            },
        ],
    }
    (folder / "run.json").write_text(json.dumps(facts))
    (folder / "config.json").write_text(json.dumps({"optim": {"lr": 0.01}, "note": EVIL}))
    lines = "".join(f"{s},{e},0.1,1.5,0.{e},0.{e},120.5\n" for s in ("plain", "ours") for e in (1, 2))
    (folder / "metrics.csv").write_text(METRICS + lines)
    matrix = torch.tensor([[5, 3], [1, 7]])
    write_confusions_csv(folder / "confusions.csv", confused_pairs(matrix, [EVIL, "tit"]))
    return folder


def test_run_report_says_what_the_run_gave(run):
    save_figure(run, "cam", curves_figure([]), title="Where it looks", caption=EVIL)
    extra = Section("Measures").table(["model", "area"], [["plain", 0.123456], ["ours", None]])
    page = Outline(write_run_report(run, [extra]).read_text())
    tiles = re.findall(r"<b>(.*?)</b><span>(.*?)</span>", (run / "report.html").read_text())
    assert [tile[0] for tile in tiles] == ["71.2 %", "73.0 %", "5 %", "600 / 400"]
    assert "“ours”, last epoch" in tiles[0][1]
    for expected in (
        "50.0 %",
        "62.5 %",
        "75.0 %",
        "train/subtle_differences.py demo",
        "f00d",
        "2.15.0",
        "optim.lr",
        "0.1235",
    ):
        assert expected in page.text, expected
    assert "no result" in page.text  # what "best on test" is worth
    assert "best on validation" not in page.text  # there was none
    assert "left out" not in tiles[3][1]
    order = [page.text.index(title) for title in ("Training curves", "Measures", "Where it looks", "Most confused")]
    assert order == sorted(order)
    assert len(embedded((run / "report.html").read_text())) == 2
    assert Image.open(run / "curves.png").width > 1000


def test_run_report_says_how_many_test_images_were_left_out(run):
    facts = json.loads((run / "run.json").read_text())
    facts["data"]["test_images_left_out"] = 3
    (run / "run.json").write_text(json.dumps(facts))
    assert "training / test images (3 more that cannot be read are left out)" in write_run_report(run).read_text()


def test_report_is_self_contained_and_escaped(run):
    save_figure(run, "cam", curves_figure([]), title=EVIL, caption=EVIL)
    section = Section(EVIL).text(EVIL).note(EVIL).code(EVIL).table([EVIL], [[EVIL]], caption=EVIL, fold=EVIL)
    text = write_run_report(run, [section]).read_text()
    page = Outline(text)
    assert not {"script", "link", "iframe", "base"} & set(page.tags)
    assert not re.search(r"https?:|//cdn|@import|url\(", text)
    assert all(value.startswith("data:") for name, value in page.attributes if name in ("src", "href"))
    assert page.text.count("alert('x')") == 13
    assert "<script" not in text
    assert "prefers-color-scheme: dark" in text


FILES = ("run.json", "config.json", "metrics.csv", "confusions.csv")


@pytest.mark.parametrize("missing", FILES)
def test_a_missing_file_leaves_out_its_part(run, missing):
    (run / missing).unlink()
    Outline(write_run_report(run).read_text())


@pytest.mark.parametrize("damage", ["", "{", "[1, 2]", "\x00\xff,,\n,", '{"stages": 3, "data": [], "versions": 1}'])
def test_damaged_files_make_half_a_report(run, damage):
    for name in FILES:
        (run / name).write_bytes(damage.encode("latin-1"))
    Outline(write_run_report(run).read_text())


def test_empty_folder_and_no_folder(tmp_path):
    page = Outline(write_run_report(tmp_path).read_text())
    assert "section" not in page.tags
    assert not (tmp_path / "curves.png").exists()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_run_report(tmp_path / "nowhere")


def test_unfinished_run_says_so(run):
    facts = json.loads((run / "run.json").read_text())
    facts["status"], facts["stages"][1] = "preempted", {"name": "ours", "status": "running", "accuracy": {"last": None}}
    (run / "run.json").write_text(json.dumps(facts))
    text = write_run_report(run).read_text()
    assert "not finished (status: preempted)" in text
    assert "<b>50.0 %</b><span>test accuracy of “plain”" in text


def test_measures_of_any_task_are_shown(run):
    """A localiser has an intersection over union, dual attention five accuracies and losses of its parts."""
    accuracies = {f"{head}_accuracy": 0.5 + n / 100 for n, head in enumerate(("fused", "one", "two", "three", "four"))}
    stages = [
        {
            "name": "localiser",
            "status": "done",
            "epoch": 2,
            "headline": "iou",
            "iou": {"last": 0.61234, "best_test": 0.65, "last_val": 0.5556, "tight_crop": 0.4},
            "measures": {"test": {"iou": 0.61234, "hit_rate": 0.987654}, "tight_crop": {"iou": 0.4}},
        },
        {
            "name": "student",
            "status": "done",
            "epoch": 2,
            "headline": "fused_accuracy",
            "fused_accuracy": {"last": 0.5},
            "measures": {"test": {**accuracies, "n": None}},
        },
    ]
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**facts, "stages": stages}))
    (run / "metrics.csv").write_text(
        "stage,epoch,lr,train_loss,test_iou,train_orthogonal,train_box_iou\nlocaliser,1,0.1,9,0.2,7,\n"
        "localiser,2,0.1,1.25,0.6,0.0625,0.123\nstudent,1,0.1,2.5,,,\n"
    )
    text = write_run_report(run).read_text()
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", line) for line in re.findall(r"<tr>(.*?)</tr>", text)]
    assert ["localiser", "done", "iou", "0.6123", "0.65", "0.5556", "0.4"] in cells
    assert ["student", "done", "fused_accuracy", "50.0 %", "–", "–", "–"] in cells
    assert re.search(r"best on test</th>.*last val</th>.*tight crop</th>", text)
    for expected in (
        ["localiser", "test", "hit_rate", "0.9877"],
        ["localiser", "tight_crop", "iou", "0.4"],
        ["localiser", "train", "orthogonal", "0.0625"],
        ["localiser", "train", "box_iou", "0.123"],
        ["localiser", "train", "loss", "1.25"],
        ["student", "test", "four_accuracy", "54.0 %"],
        ["student", "train", "loss", "2.5"],
        ["student", "test", "n", "–"],
    ):
        assert expected in cells, expected
    assert not any(line[:3] == ["student", "train", "orthogonal"] for line in cells)
    assert "<b>50.0 %</b><span>test fused_accuracy of “student”, last epoch</span>" in text


def test_damaged_and_uncaptioned_figures(tmp_path):
    good = save_figure(tmp_path, "good", curves_figure([]), title="Good", caption="")
    good.with_name("cut.png").write_bytes(good.read_bytes()[:500])
    good.with_name("class_means.png").write_bytes(photo(0, 20, 10))
    assert headings(write_run_report(tmp_path)) == ["Good", "Class means"]


def test_saving_a_figure_again_replaces_it_in_place(tmp_path):
    for name, title in (("a", "Old"), ("b", "Second"), ("a", "New")):
        save_figure(tmp_path, name, curves_figure([]), title=title, caption="")
    assert headings(write_run_report(tmp_path)) == ["New", "Second"]


def test_large_figures_are_shrunk_until_the_page_fits(tmp_path, monkeypatch):
    monkeypatch.setattr(document, "SIZE_LIMIT", 900_000)
    report = Report("large")
    for seed in range(3):
        report.section("photos").figure(photo(seed), "noise")
    file = report.write(tmp_path / "report.html")
    assert 300_000 < file.stat().st_size <= 900_000
    shown = embedded(file.read_text())
    assert len(shown) == 3
    assert all(image.width >= 300 for image in shown)
    assert list(tmp_path.iterdir()) == [file]


def test_small_figures_keep_every_pixel():
    content = photo(1, 30, 20)
    report = Report("small")
    report.section("one").figure(content, "noise")
    (image,) = embedded(report.html())
    assert image.format == "PNG"
    assert image.tobytes() == Image.open(io.BytesIO(content)).tobytes()


def test_figure_that_is_no_png_is_refused(tmp_path):
    (tmp_path / "x.png").write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match=r"x\.png: expected a complete PNG"):
        Section("s").figure(tmp_path / "x.png")


def test_numbers_stand_right_and_missing_values_are_dashes():
    report = Report("t")
    rows = [["a", "62.1 %", 3, None], ["b", None, float("nan"), None]]
    report.section("s").table(["name", "share", "count", "none"], rows)
    text = report.html()
    assert '<td>a</td><td class="number">62.1 %</td><td class="number">3</td><td>–</td>' in text
    assert text.count("–</td>") == 4


def test_rows_cut_short_are_left_out(tmp_path):
    (tmp_path / "metrics.csv").write_text("stage,epoch,lr\nplain,1,0.1\nplain,2")
    assert read_rows(tmp_path / "metrics.csv") == [{"stage": "plain", "epoch": "1", "lr": "0.1"}]
    assert read_rows(tmp_path / "none.csv") == []


def test_saved_tables_stand_before_the_figures_in_the_order_of_their_first_saving(tmp_path):
    save_figure(tmp_path, "figure", curves_figure([]), title="A figure", caption="")
    for name, value in (("b", "old"), ("a", EVIL), ("b", "new")):
        save_table(tmp_path, name, [{"x": value, "y": 1.5}], title=f"Table {name}", caption=EVIL)
    (tmp_path / "tables/gone.csv").write_text("")
    page = write_run_report(tmp_path)
    assert headings(page) == ["Table b", "Table a", "A figure"]
    outline = Outline(page.read_text())
    assert "new" in outline.text
    assert "old" not in outline.text
    assert outline.text.count(EVIL) == 3, "escaped: a cell and two captions"
    assert read_rows(tmp_path / "tables/b.csv") == [{"x": "new", "y": "1.5"}]


def test_the_headline_of_an_artefact_has_no_epoch(tmp_path):
    entry = {"name": "ensemble", "status": "done", "headline": "accuracy", "accuracy": {"last": 0.5}}
    (tmp_path / "run.json").write_text(json.dumps({"status": "finished", "stages": [entry]}))
    text = Outline(write_run_report(tmp_path).read_text()).text
    assert "test accuracy, single crop" in text
    (tmp_path / "run.json").write_text(json.dumps({"status": "finished", "stages": [{**entry, "epoch": 2}]}))
    assert "test accuracy, last epoch, single crop" in Outline(write_run_report(tmp_path).read_text()).text
