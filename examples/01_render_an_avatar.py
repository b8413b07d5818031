# %% [markdown]
# # Render an avatar
#
# Needs a finished subject: `make demo` makes one, `headcast run VIDEO` makes yours. As a script:
# `python examples/01_render_an_avatar.py --data data --subject demo`. As a notebook: open it in VS Code or by jupytext.

# %%
import argparse

import numpy as np
from PIL import Image

import pipeline

parser = argparse.ArgumentParser()
parser.add_argument("--data", default="data", help="the dataset directory")
parser.add_argument("--subject", default="demo", help="whose avatar")
given, _ = parser.parse_known_args()  # a notebook's kernel has arguments of its own

# A soft edge: it fades out where the film cut it off. (`pipeline.load_avatar` loads it as it is, also without a clip.)
avatar = pipeline.load_subject(given.subject, given.data).avatar(soft_edge=True)
print(avatar)
print("driven by", ", ".join(avatar.expression_names[:5]), "...")

# %% [markdown]
# Expressions go by ARKit's names, 0 to 1; what is not named is at rest. Poses are degrees from rest. A picture is an
# array of bytes, [height, width, 3]; as an image, a notebook shows it.

# %%
happy = {"mouthSmileLeft": 0.8, "mouthSmileRight": 0.8, "cheekSquintLeft": 0.4, "cheekSquintRight": 0.4}
surprised = {"jawOpen": 0.5, "browInnerUp": 0.9, "eyeWideLeft": 0.6, "eyeWideRight": 0.6}
small = avatar.camera(size=320)
pictures = [
    avatar.render(camera=small),
    avatar.render(happy, camera=small),
    avatar.render(surprised, pipeline.Pose(pitch=4), small),
    avatar.render(pose=pipeline.Pose(yaw=6, gaze=(0, -6)), camera=small),
]
Image.fromarray(np.concatenate(pictures, axis=1)).save("expressions.png")

# %% [markdown]
# The camera can go round the head. What the clip never saw is a guess, and looks like one.

# %%
views = [avatar.render(happy, camera=avatar.camera(320, yaw, pitch)) for yaw, pitch in ((-10, 0), (0, 8), (10, 0))]
Image.fromarray(np.concatenate(views, axis=1)).save("views.png")

# %% [markdown]
# Without a background the picture has a fourth channel, alpha: ready to be laid over anything.

# %%
Image.fromarray(avatar.render(happy, camera=avatar.camera(512, zoom=1.3), background=None)).save("cutout.png")
