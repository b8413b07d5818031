"""Find where MediaPipe's 478 face landmarks lie on a head model and write the embedding to where it is read from.

    python tools/make_landmark_embedding.py anny        # about a minute; writes pipeline/heads/anny_landmarks.npz
    python tools/make_landmark_embedding.py flame2023   # the user's file; writes to headcast's cache folder

How: see `pipeline/landmark_embedding.py`. anny's file is committed; run this again when its mesh changes. The other
models get theirs by the same code on first use, without this script.
"""

import argparse
from pathlib import Path

import numpy as np

from pipeline.assets import FACE_LANDMARKER, asset_path
from pipeline.dataset import sha256_file
from pipeline.faces import Detector
from pipeline.heads import head_file, head_names, load_head
from pipeline.heads.external import embedding_path
from pipeline.landmark_embedding import EMBEDDING_VERSION, RENDERS, find_landmarks

ANNY_OUTPUT = Path(__file__).parents[1] / "pipeline" / "heads" / "anny_landmarks.npz"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("head", choices=head_names(), help="name of the head model")
    parser.add_argument("--landmarker", type=Path, help="MediaPipe's face_landmarker.task; the asset by default")
    parser.add_argument("--renders", type=int, default=RENDERS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="another place to write to")
    arguments = parser.parse_args()

    head = load_head(arguments.head, report=print)
    with Detector(arguments.landmarker or asset_path(FACE_LANDMARKER)) as detector:
        embedding = find_landmarks(head, detector, arguments.renders, arguments.seed)
    output = arguments.output
    if output is None and head.name == "anny":
        output = ANNY_OUTPUT
    elif output is None:
        output = embedding_path(head.name, sha256_file(head_file(head.name).path))
    np.savez_compressed(output, version=EMBEDDING_VERSION, **embedding)  # type: ignore[arg-type]
    spread_mm = 1e3 * embedding["spread"]
    print(
        f"wrote {output}: {arguments.renders} renders, hits a landmark "
        f"{embedding['hits'].min()} to {embedding['hits'].max()}, spread median {np.median(spread_mm):.2f} mm, "
        f"95th percentile {np.percentile(spread_mm, 95):.2f} mm"
    )


if __name__ == "__main__":
    main()
