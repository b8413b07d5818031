"""The pictures of an evaluation: truth, render and error side by side, and the curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.frames import save_image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D
    from numpy.typing import NDArray

MIN_PANEL_PX = 256
"""Panels of smaller crops are enlarged to this, so that their captions can be read."""
BAR_PX, GAP_PX = 26, 8
FLIP_FULL_SCALE = 0.5
"""The FLIP error that the colour map's bright end stands for."""
INK, PAPER, BAR = (32, 36, 44), (255, 255, 255), (238, 240, 243)
# Okabe and Ito's colours, told apart by everyone; the avatar's is the strongest.
COLOURS = {
    "avatar": "#0072b2",
    "nearest_train_frame": "#d55e00",
    "nearest_by_parameters": "#cc79a7",
    "mean_frame": "#999999",
}
DASHES = {"avatar": "-", "nearest_train_frame": "-", "nearest_by_parameters": "--", "mean_frame": "-"}
LABELS = {
    "avatar": "avatar",
    "nearest_train_frame": "best training frame (knows the answer)",
    "nearest_by_parameters": "nearest by parameters",
    "mean_frame": "mean training frame",
}
TRAINING_CURVES = (
    ("psnr_train", "training frames", "#0072b2"),
    ("psnr_val", "frames kept back from training", "#e69f00"),
)
LOSS_COLOUR = "#bbbbbb"


def side_by_side(
    truth: NDArray[np.uint8], image: NDArray[np.uint8], flip: NDArray[np.floating[Any]], caption: str, figure: str
) -> NDArray[np.uint8]:
    """Truth, render and error in a row under a bar of captions.

    Args:
        truth, image: [R,R,3] RGB.
        flip: [R,R] FLIP's error in [0, 1].
        caption: what the truth is called, for example `frame 203`.
        figure: what stands over the render, for example `render, 31.2 dB`.
    """
    import cv2

    shown = (np.clip(flip / FLIP_FULL_SCALE, 0, 1) * 255).astype(np.uint8)
    error = cv2.cvtColor(cv2.applyColorMap(shown, cv2.COLORMAP_MAGMA), cv2.COLOR_BGR2RGB)
    return titled({caption: truth, figure: image, f"error (FLIP, bright = {FLIP_FULL_SCALE})": np.asarray(error)})


def titled(panels: Mapping[str, NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Square RGB images in a row under a bar of their titles, all as large as the first, or larger to be readable."""
    import cv2
    from PIL import Image, ImageDraw, ImageFont

    side = max(MIN_PANEL_PX, len(next(iter(panels.values()))))
    row = [cv2.resize(image, (side, side), interpolation=cv2.INTER_LINEAR) for image in panels.values()]
    canvas = np.full((side + BAR_PX, len(row) * side, 3), BAR, np.uint8)
    canvas[BAR_PX:] = np.concatenate(row, 1)
    picture = Image.fromarray(canvas)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    for place, title in enumerate(panels):
        draw.text((place * side + 8, BAR_PX / 2), title, INK, font, anchor="lm")
    return np.asarray(picture)


def write_sheet(path: Path, columns: Sequence[Sequence[NDArray[np.uint8]]]) -> None:
    """Write side-by-side pictures of one size as columns beside each other; empty columns are left out."""
    columns = [column for column in columns if column]
    height, width, _ = columns[0][0].shape
    y_step, x_step = height + GAP_PX, width + GAP_PX
    lines = max(len(column) for column in columns)
    sheet = np.full((lines * y_step - GAP_PX, len(columns) * x_step - GAP_PX, 3), PAPER, np.uint8)
    for x, column in enumerate(columns):
        for y, picture in enumerate(column):
            sheet[y * y_step : y * y_step + height, x * x_step : x * x_step + width] = picture
    save_image(path, sheet, quality=90)


def write_curves(
    path: Path, frames: Sequence[int], psnr: dict[str, Sequence[float | None]], training: Sequence[dict[str, Any]]
) -> None:
    """Plot the PSNR of every held-out frame, and training's PSNR and loss.

    Args:
        path: the PNG to write.
        frames: the held-out frames' numbers.
        psnr: dB of each frame, for the avatar and the baselines.
        training: rows of `log.json`: `step`, `loss`, `psnr_train`, and `psnr_val` where it was measured.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    held_out, trained = figure.subplots(1, 2)
    for name, values in psnr.items():
        width = 2.4 if name == "avatar" else 1.4
        numbers = [np.nan if value is None else value for value in values]
        held_out.plot(
            frames,
            numbers,
            DASHES[name],
            color=COLOURS[name],
            label=LABELS[name],
            linewidth=width,
            marker=".",
            zorder=width,
        )
    _dress(held_out, "Held-out frames", "frame", "PSNR (dB)")
    _legend(held_out, held_out.get_lines())
    for name, label, colour in TRAINING_CURVES:
        rows = [row for row in training if row.get(name) is not None]
        if rows:
            trained.plot([row["step"] for row in rows], [row[name] for row in rows], color=colour, label=label)
    _dress(trained, "Training", "step", "PSNR (dB)")
    loss = trained.twinx()
    loss.plot([row["step"] for row in training], [row["loss"] for row in training], color=LOSS_COLOUR, label="loss")
    _dress(loss, "", "", "loss")
    loss.grid(False)
    _legend(trained, [*trained.get_lines(), *loss.get_lines()])
    temporary = path.with_name(f".{path.name}")
    # Without the program's version, equal figures give equal bytes.
    figure.savefig(temporary, format="png", metadata={"Software": None})
    temporary.replace(path)


def _legend(axes: Axes, lines: Sequence[Line2D]) -> None:
    """Below the axes, where it hides nothing."""
    labels = [str(line.get_label()) for line in lines]
    axes.legend(lines, labels, fontsize=8, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.13))


def _dress(axes: Axes, title: str, x: str, y: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    axes.set_title(title, fontsize=10, loc="left", fontweight="bold")
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8, length=0)
    axes.grid(color="#e4e6ea", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
