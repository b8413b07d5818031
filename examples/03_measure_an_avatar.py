# %% [markdown]
# # Measure an avatar
#
# How like the film is it, on frames that training never saw? `headcast run` measures that too; here by hand.
# Needs a finished subject: `make demo` makes one, `headcast run VIDEO` makes yours. As a script:
# `python examples/03_measure_an_avatar.py --data data --subject demo`

# %%
import argparse
import csv

import numpy as np
from PIL import Image

import pipeline
from pipeline.evaluation_figures import side_by_side
from pipeline.metrics import flip_map, psnr, ssim

parser = argparse.ArgumentParser()
parser.add_argument("--data", default="data", help="the dataset directory")
parser.add_argument("--subject", default="demo", help="who")
given, _ = parser.parse_known_args()  # a notebook's kernel has arguments of its own

subject = pipeline.load_subject(given.subject, given.data)
print(subject, f"trained on {len(subject.train_frames)} frames, held out {len(subject.test_frames)}")

# %% [markdown]
# `picture` is a frame's matted crop over white, `render` the avatar in it through the same camera.

# %%
rows = []
for frame in subject.test_frames:
    truth, shown = subject.picture(frame) / 255, subject.render(frame) / 255
    figures = {"psnr": psnr(truth, shown), "ssim": ssim(truth, shown), "flip": flip_map(truth, shown).mean()}
    rows.append({"frame": frame, **figures})
with open("measured.csv", "w", newline="") as file:
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows(rows)

# %% [markdown]
# What is that worth? As much as it is above a training frame shown unchanged: the best of twenty, by the answer.

# %%
pictures = [subject.picture(frame) / 255 for frame in subject.train_frames[:: max(1, len(subject.train_frames) // 20)]]
truths = [subject.picture(row["frame"]) / 255 for row in rows]
gains = [r["psnr"] - max(psnr(truth, p) for p in pictures) for r, truth in zip(rows, truths, strict=True)]
print(
    f"avatar {np.mean([row['psnr'] for row in rows]):.1f} dB, {np.mean(gains):+.1f} dB beside the best training frame"
)

# %% [markdown]
# The worst frame: truth, avatar, and where the eye would see the difference.

# %%
worst = min(rows, key=lambda row: row["psnr"])
truth, shown = subject.picture(worst["frame"]), subject.render(worst["frame"])
title = f"avatar, {worst['psnr']:.1f} dB"
Image.fromarray(side_by_side(truth, shown, flip_map(truth / 255, shown / 255), "worst frame", title)).save("worst.png")
