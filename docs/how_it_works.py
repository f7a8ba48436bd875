"""Draws how_it_works.svg, the picture in README.md: ``python docs/how_it_works.py``."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

INK, PAPER, SHADE = "#24292f", "#ffffff", "#eef1f4"
LABEL, DRAWN, TAIL = "#c0392b", "#1f6fb2", "#2e8b57"

pyplot.rcParams.update({"font.family": "DejaVu Sans", "svg.hashsalt": "torch_slide", "text.color": INK})
figure, axes = pyplot.subplots(figsize=(11, 4.9), facecolor=PAPER)
axes.set_xlim(0, 110)
axes.set_ylim(0, 49)
axes.set_axis_off()
figure.subplots_adjust(0, 0, 1, 1)


def box(x: float, y: float, width: float, height: float, title: str, text: str) -> None:
    axes.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=1", facecolor=SHADE, edgecolor=INK)
    )
    axes.text(x + width / 2, y + height - 2.4, title, ha="center", va="center", fontsize=10.5, weight="bold")
    axes.text(x + width / 2, y + (height - 4) / 2, text, ha="center", va="center", fontsize=8.8, linespacing=1.4)


def arrow(start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=14, color=INK, linewidth=1.3))


box(2, 30, 15, 12, "hidden vectors", "[B, d]\nfrom the layers\nbefore")
box(22, 30, 15, 12, "hash table", "of the softmax, what\ndo these buckets of\nsimilar rows hold?")
box(42, 30, 20, 12, "candidates", "")
kinds = (
    ("labels, from the loss", LABEL),
    ("drawn by what they hold", DRAWN),
    ("drawn uniformly", TAIL),
)
for line, (kind, color) in enumerate(kinds):
    axes.add_patch(Rectangle((43.2, 36.1 - 2.2 * line), 1.6, 1.0, color=color))
    axes.text(45.5, 36.6 - 2.2 * line, kind, va="center", fontsize=8.8)
box(89, 30, 19, 12, "loss", "of the candidates'\nlogits and\nthe targets")

x, top, bottom, rows = 68, 43.5, 7, 74
colors = ["#dfe3e8"] * rows
for color, where in ((LABEL, (11, 46)), (DRAWN, (5, 14, 15, 16, 33, 35, 58, 61)), (TAIL, (21, 69))):
    for row in where:
        colors[row] = color
height = (top - bottom) / rows
for row, color in enumerate(colors):
    axes.add_patch(Rectangle((x, top - (row + 1) * height), 14, 0.72 * height, color=color))
axes.text(x + 7, 45.7, "weight [N, d]", ha="center", va="center", fontsize=10.5, weight="bold")
axes.text(x + 7, 4.4, "only these rows are read,\nmultiplied and updated", ha="center", va="center", fontsize=8.8)

box(89, 8, 19, 12, "row gradients", "of a few thousand\nrows, not of\nN = 1,000,000")
box(42, 8, 20, 12, "row optimiser", "LazyAdam, RowwiseAdagrad,\nRowSGD, or torch's own\nby convert(optimizer=...)")
box(22, 8, 15, 12, "dirty rows", "are hashed again\non a schedule")

arrow((17, 36), (22, 36))
arrow((37, 36), (42, 36))
arrow((62, 36), (67.6, 36))
arrow((82.4, 36), (89, 36))
arrow((98.5, 30), (98.5, 20))
arrow((89, 14), (82.4, 14))
arrow((67.6, 14), (62, 14))
arrow((42, 14), (37, 14))
arrow((29.5, 20), (29.5, 30))
axes.text(9.5, 14, "eval():\nall rows,\nas nn.Linear", ha="center", va="center", fontsize=8.8, style="italic")

out = Path(__file__).with_suffix(".svg")
figure.savefig(out, metadata={"Date": None})
