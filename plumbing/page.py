"""Pieces of an HTML page that is one file: no scripts, nothing from outside. Parts of elements are HTML.

    scores = page.table([["what", "mIoU"], ["maps", "71.2"]])
    sections = {"scores": page.section("scores", "Scores", "What they mean.", scores)}
    path.write_text(page.document("runs/toy", "8 classes", sections))
"""
import base64
import html
import io

import numpy as np
from PIL import Image

from plumbing import files
from plumbing.maps import heat
from plumbing.masks import IGNORE, palette

SIDE = 240                      # longer side of an embedded image: twice what is shown, for fine screens
STYLE = files.ROOT / "plumbing" / "page.css"


def esc(text):
    return html.escape(str(text))


def tag(name, *parts, **attributes):
    """An HTML element. `kind` is its class."""
    pairs = [("class" if key == "kind" else key, value) for key, value in attributes.items() if value != ""]
    words = "".join(f' {key}="{value}"' for key, value in pairs)
    return f"<{name}{words}>{''.join(map(str, parts))}</{name}>"


def heading(text):
    return tag("h3", esc(text), kind="list")


def table(rows, kind=""):
    """Rows of cells. The first row and the first cell of each are headings; a <td> of one's own stays."""
    lines = []
    for n, cells in enumerate(rows):
        names = ["th" if n == 0 or m == 0 else "td" for m in range(len(cells))]
        parts = [cell if cell.startswith("<td") else tag(name, cell) for name, cell in zip(names, cells)]
        lines.append(tag("tr", *parts))
    return tag("div", tag("table", *lines, kind=kind), kind="scroll")


def section(name, title, note, *parts):
    return tag("section", tag("h2", title), tag("p", note, kind="note"), *parts, id=name)


def document(title, facts, sections):
    """The page: a title, a line of facts, links to the sections {name: HTML}."""
    links = "".join(tag("a", name.capitalize(), href=f"#{name}") for name in sections)
    head = ('<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
            f"<title>{esc(title)}</title><style>{STYLE.read_text()}</style>")
    top = tag("header", tag("small", "SemPLeS and VPL: segmentation from image labels"),
              tag("h1", esc(title)), tag("p", esc(facts), kind="note"))
    body = tag("body", top, tag("nav", tag("div", links)), *sections.values())
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n{body}</html>\n'


# ---------------------------------------------------------------- images

def figure(image, caption, area="", kind=""):
    """A PIL image inside the page; `area` is its place in a row of tiles."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85, subsampling=0)
    code = base64.b64encode(buffer.getvalue()).decode()
    size = f'width="{image.width}" height="{image.height}"'
    img = f'<img src="data:image/jpeg;base64,{code}" {size} alt="{esc(caption)}">'
    style = f"grid-area:{area}" if area else ""
    return tag("figure", img, tag("figcaption", esc(caption)), kind=kind, style=style)


def tiles(parts, columns):
    return tag("div", *parts, kind="row", style=f"--columns:{columns}")


def shrink(image):
    """The image at SIDE."""
    return image.resize([max(1, round(n * SIDE / max(image.size))) for n in image.size], Image.BICUBIC)


def show_map(image, cam):
    """A map (h, w) from its smallest to its largest value, in colour over the image."""
    cam = np.float32(cam)
    return heat(image, (cam - cam.min()) / max(cam.max() - cam.min(), 1e-8))


def show_mask(image, mask):
    """A label map in VOC's colours over the image, grey and light where it is background; 255 is dotted."""
    mask = np.asarray(Image.fromarray(mask).resize(image.size, Image.NEAREST))[..., None]
    grey = np.asarray(image.convert("L"))[..., None]
    shown = np.where(mask == 0, 175 + 0.3 * grey, 0.15 * grey + 0.85 * palette()[mask[..., 0]])
    y, x = np.indices(mask.shape[:2])
    dots = np.where((y // 3 + x // 3) % 2, 255, 90)[..., None]
    return Image.fromarray(np.uint8(np.where(mask == IGNORE, dots, shown).clip(0, 255)))


# ---------------------------------------------------------------- classes and curves

def colour(k):
    """VOC's colour of class k."""
    return f"rgb{tuple(palette()[k + 1].tolist())}"


def chip(name, k):
    """The name of class k with its colour."""
    return tag("span", tag("i", style=f"background:{colour(k)}"), esc(name), kind="chip")


def chart(name, points, kind=""):
    """A curve through (step, value): its range on the left, its last value above."""
    width, height = (340, 124) if kind else (170, 60)
    steps, values = zip(*points)
    low, high, first, last = min(values), max(values), min(steps), max(steps)
    x = [46 + (step - first) / max(last - first, 1) * (width - 52) for step in steps]
    y = [6 + (high - value) / max(high - low, 1e-12) * (height - 22) for value in values]
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y))
    end = {"x": width - 4, "y": height - 3, "kind": "end"}
    svg = tag("svg", tag("path", d=f"M46 4V{height - 14}H{width - 4}"), tag("polyline", points=line),
              tag("circle", cx=f"{x[-1]:.1f}", cy=f"{y[-1]:.1f}", r=2.5),
              tag("text", f"{high:.3g}", x=42, y=12, kind="end"),
              tag("text", f"{low:.3g}", x=42, y=height - 14, kind="end"),
              tag("text", first, x=46, y=height - 3), tag("text", last, **end),
              viewBox=f"0 0 {width} {height}")
    caption = tag("figcaption", esc(name), " ", tag("b", f"{values[-1]:.4g}"))
    return tag("figure", caption, svg, kind=f"chart {kind}")


def scatter(points, owners, marks, names):
    """Points (n, 2) of the classes `owners` (n,), and a diamond for each class in `marks` (C, 2)."""
    everything = np.concatenate([points, marks])
    low, high = everything.min(0), everything.max(0)
    scale = (np.array([310, 225]) / np.maximum(high - low, 1e-8)).min()               # the same on both axes

    def place(xy):
        return ((xy - (low + high) / 2) * scale * [1, -1] + [180, 132]).round(1).tolist()

    parts = [tag("circle", tag("title", esc(names[k])), cx=x, cy=y, r=3.5, fill=colour(k), opacity=.6)
             for (x, y), k in zip(place(points), owners)]
    labels = []                                                                       # on top of all points
    for k in np.unique(owners):
        (x, y), (px, py) = place(np.stack([points[owners == k].mean(0), marks[k]]))
        diamond = {"d": f"M{px} {py - 6}l6 6l-6 6l-6 -6z", "fill": "#fff", "stroke": colour(k)}
        parts.append(tag("path", tag("title", "W of ", esc(names[k])), **diamond))
        labels.append(tag("text", esc(names[k]), kind="name", x=min(max(x, 40), 320), y=y - 7))
    return tag("svg", *parts, *labels, viewBox="0 0 360 260")
