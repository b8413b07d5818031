"""Dumps of MediaPipe's landmarks: every layout gives the same faces, and what is wrong is told in one message."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from messages import check_messages

from pipeline.errors import UserError
from pipeline.faces import Face
from pipeline.frames import FrameSet
from pipeline.geometry import rotvec_to_matrix
from pipeline.heads import EXPRESSIONS
from pipeline.interchange.mediapipe_dump import completed, read_dump
from pipeline.interchange.tracking import find_tracked

COUNT, W, H = 6, 200, 120
EMPTY = 2


def seen() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Landmarks [T,478,3] in shares of the picture, NaN where no face is; scores [T,52]; matrices [T,4,4]."""
    rng = np.random.default_rng(0)
    points = np.stack([rng.uniform(0.3, 0.6, (COUNT, 478)), rng.uniform(0.2, 0.8, (COUNT, 478))], 2)
    points = np.concatenate([points, rng.uniform(-0.1, 0.1, (COUNT, 478, 1))], 2)
    points[:, 33, 0], points[:, 263, 0], points[:, 10, 1], points[:, 152, 1] = 0.35, 0.55, 0.2, 0.8
    points[EMPTY] = np.nan
    matrices = np.tile(np.eye(4), (COUNT, 1, 1))
    matrices[:, :3, :3] = rotvec_to_matrix(rng.uniform(-0.3, 0.3, (COUNT, 3)))
    matrices[:, :3, 3] = [1.0, -2.0, -40.0]
    return points, rng.uniform(0, 1, (COUNT, 52)), matrices


def frame_set(bars: tuple[int, int, int, int] = (0, 0, 0, 0)) -> FrameSet:
    content = [W - bars[0] - bars[2], H - bars[1] - bars[3]]
    clip = {"source_size": [W, H], "bars": list(bars), "scale": 1.0, "content": content, "shots": [[0, COUNT - 1]]}
    numbers = np.arange(COUNT)
    return FrameSet(
        folder=Path(),
        width=content[0],
        height=content[1],
        fps=Fraction(25),
        files=("",) * COUNT,
        times=numbers / 25,
        clips=numbers * 0,
        shots=numbers * 0,
        contents=np.tile(content, (COUNT, 1)),
        source_frames=numbers,
        sharpness=np.ones(COUNT, np.float32),
        clip_names=("a",),
        record={"clips": [clip]},
    )


def objects(points: np.ndarray, how: Callable[[np.ndarray], Any], **more: Any) -> list[dict[str, Any]]:
    return [
        {"index": i, "landmarks": None if np.isnan(p).all() else how(p), **{k: v[i] for k, v in more.items()}}
        for i, p in enumerate(points)
    ]


def layouts(folder: Path) -> dict[str, Path]:
    """The same faces in every layout."""
    points, scores, matrices = seen()
    pixels = points * (W, H, W)
    categories = [
        [{"index": 0, "score": 0.5, "category_name": "_neutral"}]
        + [{"score": float(s), "category_name": n} for n, s in zip(EXPRESSIONS, row, strict=True)]
        for row in scores
    ]
    named = [dict(zip(EXPRESSIONS, row.tolist(), strict=True)) for row in scores]
    as_points = lambda p: [dict(zip("xyz", q, strict=True)) for q in p.tolist()]  # noqa: E731
    texts = {
        "objects.json": objects(
            points, as_points, blendshapes=categories, facial_transformation_matrix=matrices.tolist()
        ),
        "frames.json": {"fps": 25, "frames": objects(points, np.ndarray.tolist, blendshapes=named)},
        # As MediaPipe's result is: lists of faces; the browser's matrix goes by columns.
        "result.json": [
            {
                "timestamp_ms": 40 * i,
                "faceLandmarks": [] if np.isnan(p).all() else [as_points(p)],
                "faceBlendshapes": [{"categories": [{"categoryName": n, "score": s} for n, s in named[i].items()]}],
                "facialTransformationMatrixes": [{"rows": 4, "columns": 4, "data": matrices[i].T.ravel().tolist()}],
            }
            for i, p in enumerate(points)
        ],
        "pixels.json": objects(pixels, np.ndarray.tolist),
        "one_based.json": [{**item, "index": item["index"] + 1} for item in objects(points, np.ndarray.tolist)],
        "sparse.json": [item for item in objects(points, np.ndarray.tolist) if item["landmarks"]],
        "mirrored.json": objects(points * (-1, 1, 1) + (1, 0, 0), np.ndarray.tolist),
        "y_up.json": objects(points * (1, -1, 1) + (0, 1, 0), np.ndarray.tolist),
    }
    for name, content in texts.items():
        (folder / name).write_text(json.dumps(content))
    lines = [
        json.dumps({"time": i / 25, "landmarks": item["landmarks"]}) for i, item in enumerate(texts["pixels.json"])
    ]
    (folder / "lines.jsonl").write_text("\n".join(lines))
    np.save(folder / "plain.npy", points)
    names = np.array(EXPRESSIONS)
    np.savez(folder / "all.npz", landmarks=points, blendshapes=scores, blendshape_names=names, matrices=matrices)
    header = ",".join(["frame", *(f"{axis}{n}" for n in range(478) for axis in "xyz")])
    cells = [["" if np.isnan(x) else repr(float(x)) for x in row.ravel()] for row in points]
    (folder / "wide.csv").write_text("\n".join([header, *(f"{i}," + ",".join(row) for i, row in enumerate(cells))]))
    long = [
        f"{i},{n},{x!r},{y!r},{z!r}"
        for i, row in enumerate(points.tolist())
        if i != EMPTY
        for n, (x, y, z) in enumerate(row)
    ]
    (folder / "long.csv").write_text("\n".join(["frame,landmark,x,y,z", *long]))
    return {path.name: path for path in folder.iterdir()}


def test_every_layout_gives_the_same_faces(tmp_path: Path) -> None:
    points, scores, matrices = seen()
    for name, path in layouts(tmp_path).items():
        dump = read_dump(path)
        dump.check_video((W, H), COUNT, COUNT / 25)
        faces, _ = dump.faces(frame_set(), EXPRESSIONS)
        assert [len(here) for here in faces] == [int(i != EMPTY) for i in range(COUNT)], name
        for i in [i for i in range(COUNT) if i != EMPTY]:
            face = faces[i][0]
            np.testing.assert_allclose(face.landmarks, points[i] * (W, H, W), atol=1e-3, err_msg=name)
            if name in ("objects.json", "frames.json", "result.json", "all.npz"):
                np.testing.assert_allclose(face.scores, scores[i], atol=1e-6, err_msg=name)
            if name in ("objects.json", "result.json", "all.npz"):
                np.testing.assert_allclose(face.pose, matrices[i], atol=1e-5, err_msg=name)
        assert dump.whole == (name in ("objects.json", "result.json", "all.npz")), name


def test_bars_that_decode_cut_off_are_taken_away(tmp_path: Path) -> None:
    points, *_ = seen()
    path = layouts(tmp_path)["plain.npy"]
    faces, _ = read_dump(path).faces(frame_set((10, 4, 0, 8)), EXPRESSIONS)
    np.testing.assert_allclose(faces[0][0].landmarks, points[0] * (W, H, W) - (10, 4, 0), atol=1e-3)


def face(points: np.ndarray, filled: bool = True) -> Face:
    value = np.zeros if filled else lambda shape: np.full(shape, np.nan)
    return Face((points * (W, H, W)).astype(np.float32), np.asarray(value(52)), np.asarray(value((4, 4))))


def test_what_a_dump_lacks_comes_from_the_faces_in_the_frames(tmp_path: Path) -> None:
    points, *_ = seen()
    dumped = [[face(points[0], filled=False)], [face(points[1], filled=False)], []]
    faces, notes, misfit = completed(dumped, [[face(points[0])], [], []], "a.json", W)
    assert [len(here) for here in faces] == [1, 0, 0] and misfit == 0
    assert np.isfinite(faces[0][0].scores).all() and len(notes) == 2


def test_folders_with_a_video_and_a_dump_are_told(tmp_path: Path) -> None:
    np.save(tmp_path / "landmarks.npy", seen()[0])
    assert find_tracked(tmp_path) is None
    (tmp_path / "a.mp4").touch()
    found = find_tracked(tmp_path)
    assert found is not None and (found.kind, found.video.name, found.file.name) == (
        "mediapipe",
        "a.mp4",
        "landmarks.npy",
    )


def bad_inputs(folder: Path) -> dict[str, Callable[[], Any]]:
    """What is wrong -> a call that must refuse it."""
    points, scores, matrices = seen()
    good = objects(points, np.ndarray.tolist)
    written: dict[str, Any] = {}

    def reading(case: str, content: Any, name: str = "a.json") -> None:
        path = folder / case / name
        path.parent.mkdir()
        if isinstance(content, dict) and name.endswith(".npz"):
            np.savez(path, **content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        written[case] = lambda: read_dump(path)

    def changed(**values: Any) -> list[dict[str, Any]]:
        return [{**good[0], **values}, *good[1:]]

    def checked(case: str, items: list[dict[str, Any]], size: tuple[int, int], count: int, seconds: float) -> None:
        reading(case, items)
        read = written[case]
        written[case] = lambda: read().check_video(size, count, seconds)

    nan, far = points[0].copy(), points[0] * (9, 9, 1)
    nan[5, 1] = np.nan
    mirrors = np.diag([1.0, 1, -1, 1]).tolist()
    reading("no JSON", "{")
    reading("no frames", {"a": 1})
    reading("no landmarks", [{"a": 1}])
    reading("nobody", [{"index": 0, "landmarks": None}])
    reading("468", changed(landmarks=points[0, :468].tolist()))
    reading("477", changed(landmarks=points[0, :477].tolist()))
    reading("ragged", changed(landmarks=[[1, 2, 3], [1, 2]]))
    reading("NaN", changed(landmarks=nan.tolist()))
    reading("twice", [good[0], good[0]])
    reading("some numbers", [good[0], {"landmarks": good[1]["landmarks"]}])
    reading("half a number", changed(index=0.5))
    reading("score of another", changed(blendshapes={"smile": 0.5}))
    reading("score too high", changed(blendshapes={"jawOpen": 40}))
    reading("matrix mirrors", changed(facial_transformation_matrix=mirrors))
    reading("matrix shape", changed(facial_transformation_matrix=[[1, 2], [3, 4]]))
    reading("arrays without landmarks", {"a": points}, "a.npz")
    reading("arrays of a pickle", {"landmarks": np.array([{"a": 1}], object)}, "a.npz")
    reading("scores without names", {"landmarks": points, "blendshapes": scores}, "a.npz")
    reading("scores of other frames", {"landmarks": points, "matrices": matrices[:2]}, "a.npz")
    reading("CSV of others", "frame,smile\n0,1\n", "a.csv")
    reading("CSV cut off", "frame,landmark,x,y,z\n0,0,1,2\n", "a.csv")
    reading("another ending", "a", "a.txt")
    counted = [{"landmarks": item["landmarks"]} for item in good]
    checked("other frames", counted, (W, H), 60, 2.4)
    checked("frame beyond", changed(index=99), (W, H), COUNT, 0.24)
    checked("other pictures", changed(landmarks=(far * (W, H, W)).tolist()), (W, H), COUNT, 0.24)
    checked("too late", [{"time": 5.0, "landmarks": good[0]["landmarks"]}], (W, H), COUNT, 0.24)
    reading("upside down", objects(points * (-1, -1, 1) + (1, 1, 0), np.ndarray.tolist))
    read = written["upside down"]
    written["upside down"] = lambda: read().faces(frame_set(), EXPRESSIONS)
    elsewhere = [[face(points[0] + (0.3, 0, 0))]]
    written["mirrored video"] = lambda: completed(elsewhere, [[face(points[0] - (0.2, 0, 0))]], "a.json", W)
    written["elsewhere"] = lambda: completed(
        [[face(points[0] + (0.3, 0, 0))]], [[face(points[0] - (0.2, 0, 0))]], "a.json", 2 * W
    )
    return written


def test_what_is_wrong_is_told_in_one_message(tmp_path: Path) -> None:
    found = {}
    for case, call in bad_inputs(tmp_path).items():
        with pytest.raises(UserError) as error:
            call()
        found[case] = str(error.value).replace(str(tmp_path), "")
    check_messages("mediapipe_dump", found)
