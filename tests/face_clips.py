"""Frames of one real face to build test clips from, and subjects made of given frames."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.assets import asset_path
from pipeline.config import Config
from pipeline.dataset import Subject, write_json
from pipeline.frames import SCHEMA, frame_file, save_image
from pipeline.stage import StageRun
from pipeline.synthetic import Look, make_clip
from pipeline.video import read_frames

Image = NDArray[np.uint8]


@cache
def face_frames() -> tuple[Image, ...]:
    """72 frames [360, 640, 3] of one man who talks; the asset is fetched if it is not there."""
    return tuple(frame.rgb() for frame in read_frames(asset_path("single_face")))


PEOPLE = (
    Look(),
    Look(skin=(0.3, 0.3, 0.85), hair=(0.75, 0.6, 0.35), cloth=(0.2, 0.5, 0.3)),
    Look(skin=(0.92, 0.8, 0.35), hair=(0.55, 0.2, 0.1), cloth=(0.7, 0.2, 0.2)),
)


@cache
def person_frames(number: int, count: int = 24) -> tuple[Image, ...]:
    """Frames [200, 200, 3] of one of three synthetic people, unlike in colours and features."""
    clip = make_clip(count, 200, 200, seed=number, look=PEOPLE[number], identity_scale=0.6, background="plain")
    return tuple(clip.images)


def write_recognition_model(file: Path) -> Path:
    """A face recognition network with ArcFace's input that only looks at coarse colours."""
    import onnx
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("AveragePool", ["data"], ["coarse"], kernel_shape=[16, 16], strides=[16, 16]),
        helper.make_node("Flatten", ["coarse"], ["embedding"]),
    ]
    data = helper.make_tensor_value_info("data", TensorProto.FLOAT, [1, 3, 112, 112])
    embedding = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, [1, 147])
    graph = helper.make_graph(nodes, "coarse", [data], [embedding])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 8
    file.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(file))
    return file


@cache
def empty_room() -> Image:
    """A frame [360, 640, 3] of smooth colours with no face in it."""
    y, x = np.mgrid[:360, :640].astype(np.float32)
    return np.stack([90 + x / 9, 120 + y / 9, 150 - x / 12], axis=-1).astype(np.uint8)


def decoded_subject(
    root: Path,
    images: list[Image],
    fps: float = 30,
    shots: list[int] | None = None,
    clips: list[int] | None = None,
    contents: list[tuple[int, int]] | None = None,
) -> Subject:
    """A subject whose decode stage holds these images; shots and clips number them, by default all 0.

    Args:
        contents: width and height of each clip's picture, by default the images' size.
    """
    subject = Subject(root)
    folder = subject.stage("decode")
    (folder / "frames").mkdir(parents=True)
    entries = []
    shots, clips = shots or [0] * len(images), clips or [0] * len(images)
    height, width = images[0].shape[:2]
    for index, image in enumerate(images):
        save_image(folder / frame_file(index), image)
        entries.append(
            {
                "index": index,
                "file": frame_file(index),
                "time": index / fps + clips[index],
                "clip": clips[index],
                "shot": shots[index],
                "source_frame": index,
                "sharpness": 1.0,
            }
        )
    sizes = contents or [(width, height)] * (clips[-1] + 1)
    record = {
        "schema": SCHEMA,
        "width": width,
        "height": height,
        "fps": str(fps),
        "count": len(images),
        "frames": entries,
        "clips": [{"name": f"{number}.mp4", "scale": 1.0, "content": list(size)} for number, size in enumerate(sizes)],
    }
    write_json(folder / "frames.json", record)
    return subject


def stage_run(subject: Subject, work: Path, config: Config | None = None, **changes: object) -> StageRun:
    """A run of a stage in a work folder."""
    work.mkdir(exist_ok=True)
    return dataclasses.replace(StageRun(subject, work, config or Config(), "cpu", 2), **changes)


def padded(image: Image, left: int = 0, top: int = 0, right: int = 0, bottom: int = 0) -> Image:
    """An image with its border repeated outwards."""
    return np.asarray(cv2.copyMakeBorder(image, top, bottom, left, right, cv2.BORDER_REPLICATE), np.uint8)
