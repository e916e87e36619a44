"""HTML pages that need no network: style, tables, figures, and images with drawn boxes."""

import base64
import io
from collections.abc import Sequence
from html import escape

from matplotlib.figure import Figure
from PIL import Image

from geodistill.evaluate.metrics import boxes_of
from geodistill.language import box_corners

# The figures are transparent with dark text; a dark page inverts their lightness and keeps their hues.
STYLE = """
:root{color-scheme:light dark;--ink:#1f2328;--soft:#59636e;--line:#d8dee4;--page:#f6f7f9;--card:#fff;--good:#1a7f37;--bad:#cf222e}
@media (prefers-color-scheme:dark){:root{--ink:#e6e9ee;--soft:#9aa4af;--line:#333b45;--page:#0f1318;--card:#181d24;
--good:#4cc26a;--bad:#ff7b72}img.plot{filter:invert(1) hue-rotate(180deg)}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1180px;padding:1.6rem 1.1rem 3rem;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:1.7rem;line-height:1.2;margin:0;overflow-wrap:anywhere}h2{font-size:1.2rem;margin:2.2rem 0 .7rem}
.soft,figcaption{color:var(--soft);font-size:.87rem}figcaption{margin-top:.5rem}ul{padding-left:1.2rem;margin:.8rem 0}
.card,details{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:.9rem 1rem;margin:0 0 .9rem}
.scroll{overflow-x:auto}img.plot{display:block;width:100%;height:auto}.scroll>img.plot{min-width:660px}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;width:100%}caption{text-align:left;padding-bottom:.4rem}
th,td{padding:.32rem .7rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left;padding-left:0}
thead th{vertical-align:bottom}th[colspan]{text-align:center}th small{font-weight:400;color:var(--soft)}
tbody tr:last-child>*{border-bottom:0}.delta td{color:var(--soft)}
summary{cursor:pointer;font-weight:600}details table{margin-top:.6rem}
.grid{display:grid;gap:.9rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,var(--min)),1fr))}.grid>*{margin:0}
.sample svg{display:block;width:100%;height:auto;border-radius:6px;background:#000}
.sample polygon{fill:none;vector-effect:non-scaling-stroke;filter:drop-shadow(0 0 1px #000a)}
.sample dl{margin:.6rem 0 0;font-size:.88rem}.sample dt{color:var(--soft);margin-top:.35rem}
.sample dd{margin:0;overflow-wrap:anywhere;font-size:.9rem}.question{margin:.6rem 0 0;overflow-wrap:anywhere;font-weight:600}
.one{white-space:nowrap}.sample>.soft{margin-top:.5rem;overflow-wrap:anywhere}.sample{min-width:0}
i.key{display:inline-block;width:1.5em;border-top:3px solid;vertical-align:.28em;margin-right:.45em}
@media (max-width:600px){th,td{padding:.32rem .45rem}.card,details{padding:.8rem}}
.right{color:var(--good);font-weight:600}.wrong{color:var(--bad);font-weight:600}code{font-size:.87em;overflow-wrap:anywhere}
"""


def data_url(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def plot(figure: Figure, caption: str, scroll: bool = True) -> str:
    """A figure as a card: SVG in a data URL, and a caption (plain text)."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", pad_inches=0.04, metadata={"Date": None})
    image = f'<img class="plot" alt="{escape(caption)}" src="{data_url(buffer.getvalue(), "svg+xml")}">'
    body = f'<div class="scroll">{image}</div>' if scroll else image
    return f'<figure class="card">{body}<figcaption>{escape(caption)}</figcaption></figure>'


def table(head: list[str], rows: list[list[str]], css: str = "", groups: Sequence[tuple[str, int]] = ()) -> str:
    """Cells are HTML already. css: class of the last row. groups: a head above: (name, columns), from the second column on."""
    lines = ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows]
    if css:
        lines[-1] = lines[-1].replace("<tr>", f'<tr class="{css}">', 1)
    header = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    above = "".join(f'<th scope="colgroup" colspan="{count}">{name}</th>' for name, count in groups)
    above = f"<tr><td></td>{above}</tr>" if above else ""
    return f'<div class="scroll"><table><thead>{above}<tr>{header}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def picture(data: bytes) -> tuple[str, int, int]:
    """Encoded image -> (data URL, width, height in pixels); a large one is reduced to 512 pixels."""
    image: Image.Image = Image.open(io.BytesIO(data))
    if image.format in ("PNG", "JPEG") and len(data) < 200_000:
        return data_url(data, image.format.lower()), image.width, image.height
    image = image.convert("RGB")
    image.thumbnail((512, 512))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return data_url(buffer.getvalue(), "jpeg"), image.width, image.height


def drawing(image: bytes, shapes: list[tuple[str, str, str, str]], counter_clockwise: bool = True) -> str:
    """SVG of an image with boxes. shapes: (box text, colour, name, further attributes); nonsense sizes are not drawn."""
    url, width, height = picture(image)
    polygons = []
    for text, color, name, look in shapes:
        for box in boxes_of(text):
            if max(map(abs, vars(box).values())) > 10_000:
                continue
            points = " ".join(f"{x:.2f},{y:.2f}" for x, y in box_corners(box, width, height, counter_clockwise))
            polygons.append(f'<polygon points="{points}" stroke="{color}" {look}><title>{escape(name)}</title></polygon>')
    head = f'<svg viewBox="0 0 {width} {height}" role="img"><image href="{url}" width="{width}" height="{height}"/>'
    return f"{head}{''.join(polygons)}</svg>"


def page(title: str, kicker: str, notes: list[str], sections: dict[str, str]) -> str:
    """A whole page: title, notes as a list, and sections (HTML already; empty: nothing recorded)."""
    bullets = f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in notes)}</ul>" if notes else ""
    body = "".join(f"<section><h2>{k}</h2>{v or '<p class=soft>Nothing recorded.</p>'}</section>" for k, v in sections.items())
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>GeoDistill: '
        f'{escape(title)}</title><meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style></head>'
        f'<body><header><div class="soft">{escape(kicker)}</div><h1>{escape(title)}</h1>{bullets}</header>{body}</body></html>'
    )
