# %% [markdown]
# # Drive an avatar
#
# Two films: from numbers of our own, and from the subject's own clip, seen from where no camera was.
# Needs a finished subject: `make demo` makes one, `headcast run VIDEO` makes yours. As a script:
# `python examples/02_drive_an_avatar.py --data data --subject demo`

# %%
import argparse
import math
from pathlib import Path

from PIL import Image

import pipeline
from pipeline.video import write_video

parser = argparse.ArgumentParser()
parser.add_argument("--data", default="data", help="the dataset directory")
parser.add_argument("--subject", default="demo", help="who")
parser.add_argument("--seconds", default=2.0, type=float, help="of each film")
given, _ = parser.parse_known_args()  # a notebook's kernel has arguments of its own

subject = pipeline.load_subject(given.subject, given.data)
avatar = subject.avatar()
frames = min(len(subject), round(given.seconds * subject.fps))
print(subject, avatar, f"{float(subject.fps):.2f} frames a second")

# %% [markdown]
# Numbers of our own: the head sways, the mouth opens twice a second, the eyes blink once.


# %%
def performance(seconds: float) -> tuple[dict[str, float], pipeline.Pose]:
    """What drives the avatar at a moment."""
    jaw = 0.35 * (0.5 - 0.5 * math.cos(4 * math.pi * seconds))
    blink = max(0.0, 1 - abs(seconds % 1 - 0.5) / 0.1)
    pose = pipeline.Pose(yaw=4 * math.sin(math.pi * seconds), roll=2 * math.sin(2 * math.pi * seconds))
    return {"jawOpen": jaw, "eyeBlinkLeft": blink, "eyeBlinkRight": blink}, pose


front = avatar.camera(384)
film = (avatar.render(*performance(frame / float(subject.fps)), camera=front) for frame in range(frames))
write_video(Path("own_numbers.mp4"), film, subject.fps)

# %% [markdown]
# The subject's own performance: `condition(frame)` is all that drives the avatar in a frame. The camera moves too.

# %%
steps = [frame / max(frames - 1, 1) for frame in range(frames)]
film = (avatar.render(subject.condition(i), camera=avatar.camera(384, yaw=16 * s - 8)) for i, s in enumerate(steps))
write_video(Path("own_clip.mp4"), film, subject.fps)

# %% [markdown]
# Parts of it: the expressions at half strength, the head as it was held.

# %%
half = {name: value / 2 for name, value in subject.expression(frames // 2).items()}
Image.fromarray(avatar.render(half, subject.pose(frames // 2), subject.camera())).save("subdued.png")
