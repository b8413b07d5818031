"""Find where MediaPipe's 478 face landmarks lie on a head model and write `pipeline/heads/HEAD_landmarks.npz`.

    python tools/make_landmark_embedding.py anny        # about a minute

How: see `pipeline/landmark_embedding.py`. The file is committed; run this again when a head's mesh changes.
"""

import argparse
from pathlib import Path

import numpy as np

from pipeline.assets import asset_path
from pipeline.faces import Detector
from pipeline.heads import load_head
from pipeline.landmark_embedding import embed, render_and_detect

OUTPUT_FOLDER = Path(__file__).parents[1] / "pipeline" / "heads"
EMBEDDING_VERSION = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("head", help="name of the head model")
    parser.add_argument("--landmarker", type=Path, help="MediaPipe's face_landmarker.task; the asset by default")
    parser.add_argument("--renders", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="default: pipeline/heads/HEAD_landmarks.npz")
    arguments = parser.parse_args()

    head = load_head(arguments.head)
    with Detector(arguments.landmarker or asset_path("face_landmarker")) as landmarker:
        renders = render_and_detect(head, landmarker, arguments.renders, np.random.default_rng(arguments.seed))
    embedding = embed(head, renders)
    output = arguments.output or OUTPUT_FOLDER / f"{arguments.head}_landmarks.npz"
    np.savez_compressed(output, version=EMBEDDING_VERSION, **embedding)  # type: ignore[arg-type]
    spread_mm = 1e3 * embedding["spread"]
    print(
        f"wrote {output}: {len(renders)} of {arguments.renders} renders, hits a landmark "
        f"{embedding['hits'].min()} to {embedding['hits'].max()}, spread median {np.median(spread_mm):.2f} mm, "
        f"95th percentile {np.percentile(spread_mm, 95):.2f} mm"
    )


if __name__ == "__main__":
    main()
