"""Where the torso is, seen in the frames: image registration of the clothes and shoulders below the head.

Head pose does not predict the torso: it stays when the head nods, and moves when the head does not. Each frame's torso
is registered to that of one reference frame by a rotation and shift in the image that maximise the correlation of
brightness (Evangelidis & Psarakis, "Parametric image alignment using enhanced correlation coefficient maximization",
PAMI 2008). Depth and turns out of the image plane are not looked for: they hardly show in shoulders.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from pipeline.cameras import crop_intrinsics
from pipeline.geometry import matrix_to_rotvec, rotvec_to_matrix, transform_points
from pipeline.mesh_render import silhouette

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.heads import HeadModel

# A torso that shows on less than this share of the picture, or that correlates less, cannot be followed.
MIN_SHARE = 0.01
SIDE_PX = 256
MIN_CORRELATION = 0.8
ITERATIONS = 30
PRECISION = 1e-4
BLUR_PX = 5
# Room between the head's silhouette and what is taken for torso, as a share of the picture's side.
HEAD_ROOM = 0.03


def follow_torso(
    image: Callable[[int], NDArray[np.uint8]],
    head: HeadModel,
    K: NDArray[np.float64],
    crop: tuple[int, int, int],
    Ts_cam_head: NDArray[np.float64],
    Ts_cam_torso: NDArray[np.float64],
    identity: NDArray[np.floating],
    usable: NDArray[np.bool_],
    on_frame: Callable[[], None] = lambda: None,
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Ts_cam_torso [T,4,4] as the frames show it, and [T] whether each frame's can be trusted.

    Args:
        image: gives frame i, RGB [H,W,3]; each is asked for about once.
        head: the fitted head model, with `identity` [S].
        K: [3,3] of the frames. crop: (x0, y0, side) of the training crop, where the torso is looked for.
        Ts_cam_head: [T,4,4]. Ts_cam_torso: [T,4,4] a guess, kept for the reference frame, and for all when the torso
            is out of sight.
        usable: [T]; the reference is the usable frame of the most typical pose.
        on_frame: called after each frame.
    """
    import cv2
    import torch

    def picture(index: int) -> NDArray[np.uint8]:
        x0, y0, side = crop
        scale = SIDE_PX / side
        # A warp instead of a slice: the crop may reach over the frame's edge. Area averaging when it is reduced much.
        frame = cv2.cvtColor(image(index), cv2.COLOR_RGB2GRAY)
        reduce = max(int(1 / scale), 1)
        if reduce > 1:
            frame = cv2.resize(frame, None, fx=1 / reduce, fy=1 / reduce, interpolation=cv2.INTER_AREA)
            scale *= reduce
        shift = (np.array([x0, y0]) / reduce - 0.5) * scale + 0.5
        warp = np.array([[scale, 0, -shift[0]], [0, scale, -shift[1]]])
        grey = cv2.warpAffine(frame, warp, (SIDE_PX, SIDE_PX), borderMode=cv2.BORDER_REPLICATE)
        return np.asarray(grey, np.uint8)

    typical = np.median(Ts_cam_head[usable], 0)
    # A turn by a radian counts like a move by a third of a metre.
    far = np.linalg.norm((Ts_cam_head - typical)[:, :3, 3], axis=1)
    far = far + 0.3 * np.linalg.norm((Ts_cam_head - typical)[:, :3, :3], axis=(1, 2))
    reference = int(np.where(usable, far, np.inf).argmin())
    neck = matrix_to_rotvec(Ts_cam_torso[reference, :3, :3].T @ Ts_cam_head[reference, :3, :3])
    with torch.no_grad():
        vertices = head.vertices(
            torch.as_tensor(identity, dtype=torch.float32),
            torch.zeros(1, len(head.expression_names)),
            torch.as_tensor(neck[None], dtype=torch.float32),
            torch.zeros(1, 2, 3),
        )[0]
    vertices_cam = transform_points(Ts_cam_head[reference], vertices.numpy().astype(np.float64))
    K_crop = crop_intrinsics(K, crop, SIDE_PX)
    mask = torso_mask(head, vertices_cam, K_crop, SIDE_PX)
    if mask.mean() < MIN_SHARE:
        return Ts_cam_torso, np.zeros(len(Ts_cam_torso), bool)
    warps, trusted = register(picture, len(Ts_cam_head), reference, mask, on_frame)
    return torso_poses(warps, K_crop, Ts_cam_torso[reference]), trusted


def torso_mask(
    head: HeadModel, vertices_cam: NDArray[np.floating], K: NDArray[np.float64], size: int
) -> NDArray[np.bool_]:
    """[R,R] what of a square picture shows the torso and cannot be covered by a head that moves a little.

    Args:
        head: the head model. vertices_cam: [V,3] posed, in the camera's coordinates.
        K: [3,3] of the picture. size: R.
    """
    import cv2

    torso = silhouette(vertices_cam, head.faces, K, size, size, head.regions["torso"])
    skull = silhouette(vertices_cam, head.faces, K, size, size, head.regions["head"]).astype(np.uint8)
    reach = 2 * round(HEAD_ROOM * size) + 1
    mask: NDArray[np.bool_] = torso & (cv2.dilate(skull, np.ones((reach, reach), np.uint8)) == 0)
    return mask


def register(
    picture: Callable[[int], NDArray[np.uint8]],
    count: int,
    reference: int,
    mask: NDArray[np.bool_],
    on_frame: Callable[[], None] = lambda: None,
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Warps [T,2,3] from the reference picture's pixels to every frame's, and [T] whether each can be trusted.

    Pixel coordinates have their origin at the picture's corner, centres at +0.5. A warp that cannot be trusted is
    interpolated between its neighbours in time.

    Args:
        picture: gives frame i as grey [R,R].
        count: T.
        reference: the frame all others are compared with.
        mask: [R,R] where the reference shows the torso.
        on_frame: called after each frame, by one thread at a time: what comes before and what comes after the reference
            are followed side by side.
    """
    import cv2

    template = picture(reference)
    where = mask.astype(np.uint8)
    angle_shift = np.zeros((count, 3))
    trusted = np.zeros(count, bool)
    trusted[reference] = True
    stop = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, ITERATIONS, PRECISION)
    one_at_a_time = threading.Lock()

    def follow(frames: range) -> None:
        warp = np.eye(2, 3, dtype=np.float32)
        for frame in frames:
            try:
                correlation, found = cv2.findTransformECC(
                    template, picture(frame), warp.copy(), cv2.MOTION_EUCLIDEAN, stop, where, BLUR_PX
                )
            except cv2.error:  # it found nothing to correlate
                correlation = 0.0
            if correlation >= MIN_CORRELATION:
                warp, trusted[frame] = found, True
                angle_shift[frame] = _angle_and_shift(warp, mask)
            with one_at_a_time:
                on_frame()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(follow, (range(reference + 1, count), range(reference - 1, -1, -1))))
    times = np.arange(count)
    for column in range(3):
        angle_shift[:, column] = np.interp(times, times[trusted], angle_shift[trusted, column])
    return _warps(angle_shift, mask), trusted


def torso_poses(
    warps: NDArray[np.float64], K: NDArray[np.float64], T_cam_torso: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Ts_cam_torso [T,4,4] of warps [T,2,3] from a reference picture, at the depth of the reference's `T_cam_torso`."""
    depth = T_cam_torso[2, 3]
    pivot = (K @ T_cam_torso[:3, 3] / depth)[:2]
    moved = warps[:, :, :2] @ pivot + warps[:, :, 2]
    rays = np.linalg.solve(K, np.concatenate([moved, np.ones((len(warps), 1))], 1).T).T
    angles = np.arctan2(warps[:, 1, 0], warps[:, 0, 0])
    poses = np.tile(T_cam_torso, (len(warps), 1, 1))
    poses[:, :3, 3] = rays * depth
    poses[:, :3, :3] = rotvec_to_matrix(angles[:, None] * np.array([0.0, 0.0, 1.0])) @ T_cam_torso[:3, :3]
    return poses


def _middle(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    rows, columns = np.nonzero(mask)
    return np.array([columns.mean(), rows.mean()]) + 0.5


def _angle_and_shift(warp: NDArray[np.float32], mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """OpenCV's warp, whose pixel centres are whole numbers, as an angle and the shift of the mask's middle."""
    rotation = warp[:, :2].astype(np.float64)
    middle = _middle(mask)
    shift = rotation @ (middle - 0.5) + warp[:, 2] + 0.5 - middle
    return np.array([np.arctan2(rotation[1, 0], rotation[0, 0]), *shift])


def _warps(angle_shift: NDArray[np.float64], mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    cosine, sine = np.cos(angle_shift[:, 0]), np.sin(angle_shift[:, 0])
    rotations = np.stack([np.stack([cosine, -sine], -1), np.stack([sine, cosine], -1)], 1)
    middle = _middle(mask)
    return np.concatenate([rotations, (angle_shift[:, 1:] + middle - rotations @ middle)[..., None]], 2)
