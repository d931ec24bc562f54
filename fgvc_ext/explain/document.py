"""Reports: one HTML file that holds everything it shows.

It loads nothing from elsewhere, runs no script, and reads well on light and dark screens, on paper and by e-mail.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

SIZE_LIMIT = 5_000_000
"""Bytes of a report. Figures are made smaller, the largest first, until it fits."""
LARGE_FIGURE = 400_000
"""Bytes of a PNG above which the page holds the picture as JPEG."""

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2933; --quiet: #5f6c7b; --line: #dfe4e9; --back: #ffffff; --card: #f6f8fa;
  --accent: #1768ac; --note: #fff8ea; --note-line: #e0a63a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaef; --quiet: #9aa7b5; --line: #333c47; --back: #14181d;
  --card: #1d232a; --accent: #6bb3f0; --note: #2a2417; --note-line: #b98a33; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 860px; margin: 0 auto; padding: 40px 24px 72px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 44px 0 12px; padding-top: 20px; border-top: 1px solid var(--line); }
p { margin: 10px 0; max-width: 72ch; } .subtitle { color: var(--quiet); margin-bottom: 26px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 20px 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 16px; }
.tile b { display: block; font-size: 24px; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tile:first-child b { color: var(--accent); } .tile span { color: var(--quiet); font-size: 13.5px; }
.scroll { overflow-x: auto; margin: 14px 0; }
table { border-collapse: collapse; width: 100%; font-size: 14.5px; font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; text-align: left; color: var(--quiet); font-size: 13.5px; padding-top: 8px; }
th, td { text-align: left; padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: break-word; }
thead th { color: var(--quiet); font-weight: 600; font-size: 13.5px; } td.number, th.number { text-align: right; }
figure { margin: 18px 0; } figure img { width: 100%; height: auto; display: block; background: #fff; padding: 10px;
  border: 1px solid var(--line); border-radius: 10px; }
figcaption { color: var(--quiet); font-size: 14px; margin-top: 8px; max-width: 80ch; }
.note { background: var(--note); border-left: 4px solid var(--note-line); border-radius: 6px; padding: 8px 14px;
  margin: 14px 0; font-size: 15px; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; overflow-x: auto;
  font: 13.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
details summary { cursor: pointer; color: var(--accent); margin: 14px 0 4px; }
@media print { main { max-width: none; padding: 0; } h2, figure, table { break-inside: avoid; } }
"""


@dataclass
class _Picture:
    """An image on its way into the page: a PNG, or a JPEG where photographs make a PNG needlessly large."""

    content: bytes
    caption: str
    alt: str
    kind: str = "png"

    def __post_init__(self) -> None:
        if len(self.content) > LARGE_FIGURE:
            self._encode(1.0)

    def html(self) -> str:
        with Image.open(io.BytesIO(self.content)) as image:
            width, height = image.size
        caption = f"<figcaption>{escape(self.caption)}</figcaption>" if self.caption else ""
        data = base64.b64encode(self.content).decode()
        return (
            f'<figure><img alt="{escape(self.alt)}" width="{width}" height="{height}" '
            f'src="data:image/{self.kind};base64,{data}">{caption}</figure>'
        )

    def shrink(self) -> None:
        self._encode(0.75)

    def _encode(self, scale: float) -> None:
        with Image.open(io.BytesIO(self.content)) as image:
            size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            pixels = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        file = io.BytesIO()
        pixels.save(file, "JPEG", quality=88, subsampling=0)
        self.content, self.kind = file.getvalue(), "jpeg"


class Section:
    """A heading and what stands under it. Every method escapes its texts and returns the section, to be chained."""

    def __init__(self, heading: str) -> None:
        self.heading = heading
        self._blocks: list[str | _Picture] = []

    def __bool__(self) -> bool:
        return bool(self._blocks)

    def text(self, text: str) -> Section:
        """Paragraphs; an empty line starts a new one."""
        return self._add("".join(f"<p>{escape(part)}</p>" for part in text.split("\n\n") if part.strip()))

    def note(self, text: str) -> Section:
        """A paragraph that is set apart: a limit of the result, something that the reader must know."""
        return self._add(f'<div class="note">{escape(text)}</div>')

    def code(self, text: str) -> Section:
        """A command or file, kept as it is."""
        return self._add(f"<pre>{escape(text)}</pre>")

    def table(
        self, header: Sequence[str], rows: Sequence[Sequence[object]], *, caption: str = "", fold: str = ""
    ) -> Section:
        """A table; None is an empty cell, numbers stand right. With `fold`, behind a line of this text to click."""
        numeric = [_is_numeric([row[column] for row in rows if column < len(row)]) for column in range(len(header))]
        kinds = [' class="number"' if right else "" for right in numeric]
        head = "".join(f"<th{kind}>{escape(str(name))}</th>" for kind, name in zip(kinds, header, strict=True))
        body = "".join(
            f"<tr>{''.join(f'<td{kind}>{_cell(value)}</td>' for kind, value in zip(kinds, row, strict=True))}</tr>"
            for row in rows
        )
        below = f"<caption>{escape(caption)}</caption>" if caption else ""
        whole = f'<div class="scroll"><table>{below}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        return self._add(f"<details><summary>{escape(fold)}</summary>{whole}</details>" if fold else whole)

    def figure(self, figure: Figure | Path | bytes, caption: str = "", *, alt: str = "") -> Section:
        """A picture with its caption: a matplotlib figure, or a PNG file's path or content."""
        return self._add(_Picture(png(figure), caption, alt or caption))

    def _add(self, block: str | _Picture) -> Section:
        self._blocks.append(block)
        return self


class Report:
    """An HTML report under construction: numbers in large type, then sections."""

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title = title
        self.subtitle = subtitle
        self.sections: list[Section] = []
        self._tiles: list[tuple[str, str]] = []

    def headline(self, value: str, label: str) -> Report:
        """A number in large type at the top; the first one is the result."""
        self._tiles.append((value, label))
        return self

    def section(self, heading: str) -> Section:
        """Adds a section and returns it, to be filled. One that stays empty is not shown."""
        self.sections.append(Section(heading))
        return self.sections[-1]

    def add(self, section: Section) -> Report:
        """Adds a section that was made elsewhere."""
        self.sections.append(section)
        return self

    def write(self, path: Path) -> Path:
        """Writes the report in one step (a reader never sees half a file), smaller than `SIZE_LIMIT` bytes."""
        path = Path(path)
        pictures = [block for section in self.sections for block in section._blocks if isinstance(block, _Picture)]
        page = self.html()
        while len(page.encode()) > SIZE_LIMIT and any(len(picture.content) > 10_000 for picture in pictures):
            max(pictures, key=lambda picture: len(picture.content)).shrink()
            page = self.html()
        scratch = path.with_name(path.name + ".tmp")
        scratch.write_text(page, encoding="utf-8")
        os.replace(scratch, path)
        return path

    def html(self) -> str:
        """The page as text."""
        tiles = "".join(f'<div class="tile"><b>{escape(v)}</b><span>{escape(k)}</span></div>' for v, k in self._tiles)
        body = [f"<h1>{escape(self.title)}</h1>"]
        body += [f'<p class="subtitle">{escape(self.subtitle)}</p>'] if self.subtitle else []
        body += [f'<div class="tiles">{tiles}</div>'] if tiles else []
        for section in filter(None, self.sections):
            blocks = (block.html() if isinstance(block, _Picture) else block for block in section._blocks)
            body += [f"<section><h2>{escape(section.heading)}</h2>", *blocks, "</section>"]
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(self.title)}</title><style>{_STYLE}</style></head>\n"
            "<body><main>\n" + "\n".join(body) + "\n</main></body></html>\n"
        )


def png(figure: Figure | Path | bytes) -> bytes:
    """A figure as PNG: matplotlib's, or a file's path or content, which is checked."""
    if isinstance(figure, Figure):
        canvas: Any = FigureCanvasAgg(figure)  # drawn once; savefig would lay it out and resample its images twice
        canvas.draw()
        file = io.BytesIO()
        Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").save(file, "PNG")
        return file.getvalue()
    content = figure if isinstance(figure, bytes) else Path(figure).read_bytes()
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            image.load()
    except Exception as error:  # Pillow raises many types for a damaged file: all mean the same here
        where = "" if isinstance(figure, bytes) else f" {figure}"
        raise ValueError(f"figure{where}: expected a complete PNG image: {error}") from error
    return content


def save_figure(run: Path, name: str, figure: Figure, *, title: str, caption: str) -> Path:
    """Keeps a figure for the report: `figures/<name>.png`, its title and caption in `figures/captions.json`.

    The report shows the figures in the order in which they were first saved; saving a name again replaces it.
    """
    folder = Path(run) / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.png"
    path.write_bytes(png(figure))
    _caption(path, title, caption)
    return path


def save_table(run: Path, name: str, rows: Sequence[Mapping[str, object]], *, title: str, caption: str) -> Path:
    """Keeps a table for the report: `tables/<name>.csv`, its title and caption in `tables/captions.json`.

    Its columns are those of the first row. The report shows the tables in the order in which they were first saved,
    before the figures; saving a name again replaces it.
    """
    path = Path(run) / "tables" / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    _caption(path, title, caption)
    return path


def _caption(path: Path, title: str, caption: str) -> None:
    captions = read_json(path.with_name("captions.json"))
    captions[path.name] = {"title": title, "caption": caption}
    text = json.dumps(captions, indent=2) + "\n"
    path.with_name("captions.json").write_text(text, encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The object of a JSON file; empty where the file is missing, damaged or something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_numeric(values: Sequence[object]) -> bool:
    """Whether a column holds numbers (with a percent sign, say), so that it is set right."""
    texts = [_cell(value).rstrip("%").replace(",", "").strip() for value in values]
    texts = [text for text in texts if text not in ("", "–")]
    return bool(texts) and all(text.replace(".", "", 1).removeprefix("-").isdigit() for text in texts)


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "–"
    return escape(str(value))
