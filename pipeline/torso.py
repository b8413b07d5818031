"""Where the torso is, seen in the frames: image registration of the matted clothes and shoulders below the head.

Head pose does not predict the torso: it stays when the head nods, and moves when the head does not. So every frame's
torso is registered to a template, the robust mean of all of them, by Gauss-Newton steps with the template's own slopes
(Baker & Matthews, "Lucas-Kanade 20 years on", IJCV 2004) and Huber weights. Colours are premultiplied with alpha, and
alpha is a channel like them: the shoulders' outline counts and the background does not. First comes an affine warp,
from frame to frame. Then, on some frames, a grid of small displacements shows how shoulders and collar bend; its
principal modes, beside shift, turn and size, are what all frames are registered with in the end. Shift, turn and size
make a rigid pose; the modes' coefficients are the torso's shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pipeline.cameras import crop_intrinsics
from pipeline.frames import evenly
from pipeline.geometry import invert_rigid, make_rigid, matrix_to_rotvec, project_points, rotvec_to_matrix

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

SIDE_PX = 128
MODES = 4
# A torso that shows on less than this share of the picture, or of which less than this share of the template is in
# view, or that the template explains less of, cannot be followed.
MIN_SHARE, MIN_VISIBLE, MIN_CONFIDENCE = 0.01, 0.2, 0.5
# Room between the head's outline and what is taken for torso, as a share of the head's height; and how far beyond the
# torso's outline the template reaches, as a share of the picture's side.
HEAD_ROOM, OUTLINE_ROOM = 0.08, 0.03
MASK_ALPHA = 0.05
# Differences of colour and alpha, in [0,1], that count in full; larger ones are hair, hands and a failing matte.
HUBER = 0.06
STEPS, STEP_PX = 8, 0.02
TEMPLATE_FRAMES = 48
GRID = (6, 4)
# Squared difference, mean over the template, that a grid point's displacement by a pixel has to be worth; and a
# mode's coefficient of its usual size.
GRID_STIFFNESS, MODE_STIFFNESS = 1e-4, 1e-5
# How much a departure from what the head predicts costs against a measurement of full confidence: for its bending
# from frame to frame, and for being there at all, which tells in long gaps only.
BEND_WEIGHT, STAY_WEIGHT = 0.02, 1e-5
# A turn by a radian counts like a move by this many metres; and the move that says something about the torso.
TURN_M, RIDGE_M = 0.2, 0.001


class Torso(NamedTuple):
    """The torso's motion over T frames."""

    poses: Floats
    """[T,4,4] Ts_cam_torso."""
    shape: Floats
    """[T,M] metres by which each mode moves the torso's parts, root mean square over the torso."""
    confidence: Floats
    """[T] in [0,1]; 0 where the frame does not show it and neighbours and head tell where it is."""

    @staticmethod
    def unseen(guess: Floats) -> Torso:
        """Poses [T,4,4] that nothing speaks for."""
        return Torso(guess, np.zeros((len(guess), MODES)), np.zeros(len(guess)))


@dataclass(frozen=True)
class Views:
    """T matted square pictures of SIDE_PX, and what may be compared in them.

    Attributes:
        pictures: [T,R,R,4] uint8 premultiplied RGB and alpha.
        visible: [T,R,R] uint8, 1 inside the frame and away from the head.
        inside: [T,R,R] inside the frame.
        Ks: [T,3,3] of the pictures.
    """

    pictures: NDArray[np.uint8]
    visible: NDArray[np.uint8]
    inside: NDArray[np.bool_]
    Ks: Floats

    @staticmethod
    def load(
        picture: Callable[[int], tuple[NDArray[np.uint8], NDArray[np.uint8]]],
        heads: Iterable[NDArray[np.floating]],
        Ks: Floats,
        crops: NDArray[np.floating],
        threads: int,
    ) -> Views:
        """The torso's surroundings in all frames.

        Args:
            picture: gives frame i, RGB [H,W,3], and its alpha [H,W]; each is asked for once.
            heads: T times [V,3], the fitted head without the torso in the camera's coordinates.
            Ks: [T,3,3] of the frames. crops: [T,3] (x0, y0, side) of the training crops.
            threads: frames read at a time.
        """
        small = np.stack([crop_intrinsics(K, tuple(crop), SIDE_PX) for K, crop in zip(Ks, crops, strict=True)])
        pictures = np.empty((len(Ks), SIDE_PX, SIDE_PX, 4), np.uint8)
        visible = np.empty((len(Ks), SIDE_PX, SIDE_PX), np.uint8)
        inside = np.empty((len(Ks), SIDE_PX, SIDE_PX), bool)

        def load(row: int, head: NDArray[np.floating]) -> None:
            pictures[row], inside[row] = _small(*picture(row), crops[row])
            visible[row] = inside[row] & ~head_cover(head, small[row], SIDE_PX, SIDE_PX)

        with ThreadPoolExecutor(max(1, threads)) as pool:
            list(pool.map(load, range(len(Ks)), heads))
        return Views(pictures, visible, inside, small)


def _small(
    image: NDArray[np.uint8], alpha: NDArray[np.uint8], crop: NDArray[np.floating]
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """A crop of a frame, premultiplied and small, and where it is inside the frame."""
    import cv2

    x0, y0, side = (float(value) for value in crop)
    scale = SIDE_PX / side
    matted = np.dstack([cv2.multiply(image, cv2.cvtColor(alpha, cv2.COLOR_GRAY2RGB), scale=1 / 255), alpha])
    # Area averaging when it is reduced much; then a warp, for the crop may reach over the frame's edge.
    reduce = max(int(1 / scale), 1)
    matted = cv2.resize(matted, None, fx=1 / reduce, fy=1 / reduce, interpolation=cv2.INTER_AREA)
    scale *= reduce
    shift = (np.array([x0, y0]) / reduce - 0.5) * scale + 0.5
    warp = np.array([[scale, 0, -shift[0]], [0, scale, -shift[1]]])
    size = (SIDE_PX, SIDE_PX)
    whole = np.full(matted.shape[:2], 255, np.uint8)
    small = cv2.warpAffine(matted, warp, size, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(small, np.uint8), np.asarray(cv2.warpAffine(whole, warp, size)) > 250


def head_cover(head: NDArray[np.floating], K: Floats, width: int, height: int) -> NDArray[np.bool_]:
    """[H,W] what a head may hide of a picture: the hull of its vertices [V,3] (camera space), grown for hair."""
    import cv2

    pixels = project_points(head.astype(np.float64), K)
    # The mesh may lie far outside of a picture that is not of it.
    far = 8 * max(width, height)
    hull = cv2.convexHull(np.clip(pixels, -far, far).astype(np.float32))
    cover = np.zeros((height, width), np.uint8)
    cv2.fillConvexPoly(cover, np.rint(hull).astype(np.int32), 1)
    reach = 2 * round(HEAD_ROOM * min(float(np.ptp(pixels[:, 1])), height)) + 1
    return np.asarray(cv2.dilate(cover, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (reach, reach)))) > 0


def torso_mask(
    alpha: NDArray[np.floating], cover: NDArray[np.bool_], T_cam_torso: Floats, K: Floats
) -> NDArray[np.bool_]:
    """[H,W] pixels of the torso: of the subject, outside what the head may hide, below the neck's pivot.

    Args:
        alpha: [H,W] in [0,1]. cover: [H,W] as `head_cover` gives it.
        T_cam_torso: [4,4]. K: [3,3] of the picture.
    """
    pivot = T_cam_torso[:3, 3]
    (x, y), (x_down, y_down) = project_points(np.stack([pivot, pivot - 0.1 * T_cam_torso[:3, 1]]), K)
    rows, columns = np.indices(alpha.shape) + 0.5
    below = (columns - x) * (x_down - x) + (rows - y) * (y_down - y) > 0
    return np.asarray((alpha > MASK_ALPHA) & ~cover & below)


def follow_torso(
    views: Views,
    Ts_cam_head: Floats,
    guess: Floats,
    usable: NDArray[np.bool_],
    shots: NDArray[np.int64],
    on_frame: Callable[[], None] = lambda: None,
) -> Torso:
    """The torso as the frames show it; the guess, with confidence 0, where it is out of sight.

    Args:
        views: the frames.
        Ts_cam_head: [T,4,4]. guess: [T,4,4] Ts_cam_torso, kept for the reference frame.
        usable: [T]; the reference is the usable frame of the most typical pose.
        shots: [T] within a shot motion is steady.
        on_frame: called twice for each frame.
    """
    count = len(guess)
    reference = typical_frame(Ts_cam_head, usable)
    alpha = views.pictures[reference, ..., 3] / 255
    mask = torso_mask(alpha, views.visible[reference] == 0, guess[reference], views.Ks[reference])
    if mask.mean() < MIN_SHARE:
        return Torso.unseen(guess)
    first = _Template.of(views, reference, mask)
    camera = _Camera(views.Ks[reference], guess[reference], first.centre)
    starts = np.zeros((count, 6), np.float32)
    starts[:, :4] = first.parameters(*camera.similarities(guess, views.Ks))

    affine = _Motion(first, first.linear(6), np.zeros(6))
    found, confidence = affine.follow(views, _order(Ts_cam_head, reference, shots), starts, on_frame)
    seen = np.flatnonzero(confidence)
    seen = seen[evenly(len(seen), TEMPLATE_FRAMES)]
    motion = _with_modes(affine.refined(views, found, seen), found, seen, views)
    # The affine warp's shift, turn and size; what else it does is left to the modes.
    starts = np.zeros((count, 4 + MODES), np.float32)
    starts[:, :4] = found[:, :4]
    found, confidence = motion.follow(views, [(frame, None) for frame in range(count)], starts, on_frame)
    poses = camera.poses(*first.similarities(found[:, :4]), views.Ks)
    shape = found[:, 4:] * camera.depth / views.Ks[reference, 0, 0]
    return steady(Torso(poses, shape.astype(np.float64), confidence), Ts_cam_head, shots)


class _Template(NamedTuple):
    """What the torso looks like where it is in the reference picture: P pixels."""

    canvas: NDArray[np.float32]
    """[R,R,4] the reference picture, in [0,1], with `values` in it."""
    where: tuple[NDArray[np.int64], NDArray[np.int64]]
    """Rows and columns of the pixels."""

    @staticmethod
    def of(views: Views, reference: int, mask: NDArray[np.bool_]) -> _Template:
        """The reference picture's torso with a rim around it, so that its outline counts."""
        import cv2

        reach = 2 * round(OUTLINE_ROOM * SIDE_PX) + 1
        grown = cv2.dilate(mask.astype(np.uint8), np.ones((reach, reach), np.uint8))
        rows, columns = np.nonzero(grown & views.visible[reference])
        return _Template(views.pictures[reference].astype(np.float32) / 255, (rows, columns))

    @property
    def points(self) -> NDArray[np.float32]:
        """[P,2] pixels, centres at +0.5."""
        return np.stack([self.where[1], self.where[0]], 1).astype(np.float32) + np.float32(0.5)

    @property
    def centre(self) -> Floats:
        """[2] the torso's middle."""
        return self.points.mean(0).astype(np.float64)

    @property
    def reach(self) -> float:
        """Pixels from the middle to the farthest coordinate: the unit of turns and sizes."""
        return float(np.abs(self.points - self.centre).max())

    def linear(self, size: int) -> NDArray[np.float32]:
        """[P,2,size] displacements: shift right, shift down, turn, growth, and for an affine warp two shears."""
        x, y = ((self.points - self.centre) / self.reach).T.astype(np.float32)
        one, none = np.ones_like(x), np.zeros_like(x)
        right, down = (one, none, -y, x, x, y), (none, one, x, y, -y, x)
        return np.stack([np.stack(right[:size], 1), np.stack(down[:size], 1)], 1)

    def parameters(self, scales: Floats, angles: Floats, centres: Floats) -> NDArray[np.float32]:
        """[T,4] amounts of the first four displacements: sizes [T], angles [T], where the middle goes [T,2]."""
        turn, growth = scales * np.sin(angles) * self.reach, (scales * np.cos(angles) - 1) * self.reach
        return np.column_stack([centres - self.centre, turn, growth]).astype(np.float32)

    def similarities(self, parameters: NDArray[np.float32]) -> tuple[Floats, Floats, Floats]:
        """The inverse of `parameters`."""
        values = parameters.astype(np.float64)
        turn, growth = values[:, 2] / self.reach, values[:, 3] / self.reach + 1
        return np.hypot(turn, growth), np.arctan2(turn, growth), self.centre + values[:, :2]

    def grid(self) -> NDArray[np.float32]:
        """[P,2,2G] displacements of a grid's points over the torso, bilinear between them."""
        low, high = self.points.min(0), self.points.max(0)
        places = (self.points - low) / (high - low) * (np.array(GRID) - 1)
        hats = [np.maximum(1 - np.abs(places[:, axis, None] - np.arange(GRID[axis])), 0) for axis in range(2)]
        weights = (hats[0][:, :, None] * hats[1][:, None]).reshape(len(places), -1)
        none = np.zeros_like(weights)
        return np.stack([np.hstack([weights, none]), np.hstack([none, weights])], 1).astype(np.float32)


class _Motion:
    """A template and the displacements, linear in D parameters, that take it to a frame.

    Args:
        template: P pixels.
        basis: [P,2,D] pixels of displacement.
        stiffness: [D] what a parameter's square is worth in squared difference, mean over the template.
    """

    def __init__(self, template: _Template, basis: NDArray[np.float32], stiffness: Floats) -> None:
        self.template, self.basis, self.stiffness = template, basis, stiffness
        self._points, self._values = template.points, template.canvas[template.where]
        slopes = np.stack([np.gradient(template.canvas, axis=axis)[template.where] for axis in (1, 0)], -1)
        self._slopes = np.einsum("pci,pid->pcd", slopes, basis).reshape(-1, basis.shape[2])
        self._energy = float(np.square(self._values - self._values.mean(0)).sum(1).mean())

    def sample(
        self, views: Views, frame: int, parameters: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Colours [P,4] of a frame where the parameters put the template, and how visible [P] it is there."""
        import cv2

        # OpenCV's pixel centres are whole numbers.
        at = (self._points + self.basis @ parameters - np.float32(0.5))[None]
        picture = cv2.remap(views.pictures[frame], at, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        seen = cv2.remap(views.visible[frame], at, None, cv2.INTER_NEAREST, borderMode=cv2.BORDER_CONSTANT)
        return picture[0].astype(np.float32) / 255, seen.reshape(-1).astype(np.float32)

    def register(self, views: Views, frame: int, start: NDArray[np.float32]) -> tuple[NDArray[np.float32], float]:
        """Parameters [D] of a frame, and how far they can be trusted."""
        parameters, count = start, len(self._values)
        for _ in range(STEPS):
            weights, difference = self._compare(views, frame, parameters)
            rows = np.repeat(weights, 4)[:, None] * self._slopes
            prior = self.stiffness * max(float(weights.sum()), 1.0)
            curvature = rows.T @ self._slopes + np.diag(prior + 1e-6 * count)
            step = np.linalg.solve(curvature, rows.T @ difference.ravel() + prior * parameters).astype(np.float32)
            parameters = parameters - step
            if np.abs(self.basis @ step).max() < STEP_PX:
                break
        weights, difference = self._compare(views, frame, parameters)
        visible = float((weights > 0).mean())
        unexplained = float(weights @ np.square(difference).sum(1)) / max(float(weights.sum()) * self._energy, 1e-9)
        confidence = min(1 - unexplained, float(weights.sum()) / max(visible * count, 1.0))
        good = visible >= MIN_VISIBLE and confidence >= MIN_CONFIDENCE
        return parameters, confidence if good else 0.0

    def _compare(
        self, views: Views, frame: int, parameters: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Huber weights [P], 0 where nothing can be compared, and differences [P,4] to the template."""
        colors, seen = self.sample(views, frame, parameters)
        difference = colors - self._values
        length = np.sqrt(np.square(difference).sum(1))
        return seen * np.minimum(1, HUBER / np.maximum(length, 1e-6)), difference

    def follow(
        self,
        views: Views,
        order: list[tuple[int, int | None]],
        starts: NDArray[np.float32],
        on_frame: Callable[[], None],
    ) -> tuple[NDArray[np.float32], Floats]:
        """Parameters [T,D] and confidence [T] of all frames.

        Args:
            order: frames, each with one before it in the order that it starts from, where that one is to be trusted.
            starts: [T,D] where a frame starts from otherwise.
        """
        found, confidence = starts.copy(), np.zeros(len(starts))
        for frame, neighbour in order:
            if neighbour is not None and confidence[neighbour] > 0:
                found[frame], confidence[frame] = self.register(views, frame, found[neighbour])
            if confidence[frame] == 0:
                found[frame], confidence[frame] = self.register(views, frame, starts[frame])
            on_frame()
        return found, confidence

    def refined(self, views: Views, found: NDArray[np.float32], frames: NDArray[np.int64]) -> _Template:
        """The template as the robust mean of these frames, each brought back by its parameters."""
        samples = [self.sample(views, frame, found[frame]) for frame in frames]
        colors, seen = (np.stack(column) for column in zip(*samples, strict=True))
        mean = self._values
        for _ in range(3):
            length = np.sqrt(np.square(colors - mean).sum(2))
            weights = (seen * np.minimum(1, HUBER / np.maximum(length, 1e-6)) + 1e-6)[..., None]
            mean = (weights * colors).sum(0) / weights.sum(0)
        canvas = self.template.canvas.copy()
        canvas[self.template.where] = mean
        return self.template._replace(canvas=canvas)


def _with_modes(template: _Template, found: NDArray[np.float32], frames: NDArray[np.int64], views: Views) -> _Motion:
    """A similarity and the principal modes of how the torso bends beside it.

    Args:
        template: as the affine warps `found` [T,6] made it.
        frames: those that are looked at.
    """
    affine, similarity = template.linear(6), template.linear(4)
    grid = template.grid()
    bending = _Motion(
        template,
        np.concatenate([affine, grid], 2),
        np.concatenate([np.zeros(6), np.full(grid.shape[2], GRID_STIFFNESS)]),
    )
    start = np.zeros(bending.basis.shape[2] - 6, np.float32)
    bent = [bending.register(views, frame, np.concatenate([found[frame], start]))[0] for frame in frames]
    bent_all = np.zeros((len(found), bending.basis.shape[2]), np.float32)
    bent_all[frames] = bent
    template = bending.refined(views, bent_all, frames)
    fields = (bending.basis @ np.stack(bent).T).reshape(-1, len(frames)).astype(np.float64)
    rigid = similarity.reshape(-1, 4).astype(np.float64)
    fields -= rigid @ np.linalg.lstsq(rigid, fields, rcond=None)[0]
    modes, sizes, _ = np.linalg.svd(fields, full_matrices=False)
    modes = np.pad(modes[:, :MODES], ((0, 0), (0, max(MODES - len(frames), 0))))
    sizes = np.pad(sizes, (0, MODES))[:MODES]
    # Root mean square over the torso of a mode at 1, and over the frames of its coefficient, in pixels.
    points = len(modes) / 2
    usual = sizes / np.sqrt(points * len(frames))
    basis = (modes * np.sqrt(points)).reshape(-1, 2, MODES).astype(np.float32)
    stiffness = MODE_STIFFNESS / np.maximum(usual, 1e-3) ** 2
    return _Motion(template, np.concatenate([similarity, basis], 2), np.concatenate([np.zeros(4), stiffness]))


class _Camera(NamedTuple):
    """Between poses of the torso and similarities of its picture."""

    K: Floats
    """[3,3] of the reference picture."""
    T_cam_torso: Floats
    """[4,4] in the reference frame."""
    centre: Floats
    """[2] pixel of the reference picture about which similarities turn and grow, at the depth of the torso's pivot."""

    @property
    def depth(self) -> float:
        """Metres."""
        return float(self.T_cam_torso[2, 3])

    @property
    def middle(self) -> Floats:
        """[3] where the centre lies."""
        return self.depth * np.linalg.solve(self.K, [*self.centre, 1.0])

    def poses(self, scales: Floats, angles: Floats, centres: Floats, Ks: Floats) -> Floats:
        """Ts_cam_torso [T,4,4] of sizes [T], angles [T] and places of the centre [T,2] in pictures of `Ks` [T,3,3]."""
        depths = self.depth / scales * Ks[:, 0, 0] / self.K[0, 0]
        rays = np.linalg.solve(Ks, np.concatenate([centres, np.ones((len(Ks), 1))], 1)[..., None])[..., 0]
        turns = rotvec_to_matrix(angles[:, None] * np.array([0.0, 0.0, 1.0]))
        shifts = depths[:, None] * rays + turns @ (self.T_cam_torso[:3, 3] - self.middle)
        return make_rigid(turns @ self.T_cam_torso[:3, :3], shifts)

    def similarities(self, poses: Floats, Ks: Floats) -> tuple[Floats, Floats, Floats]:
        """The inverse of `poses`, for poses that turn in the image plane only; other turns are left out."""
        moved = (poses @ invert_rigid(self.T_cam_torso))[:, :3]
        middles = moved[..., :3] @ self.middle + moved[..., 3]
        scales = self.depth / middles[:, 2] * Ks[:, 0, 0] / self.K[0, 0]
        centres = (Ks @ middles[..., None])[:, :2, 0] / middles[:, 2:]
        return scales, np.arctan2(moved[:, 1, 0], moved[:, 0, 0]), centres


def typical_frame(Ts_cam_head: Floats, usable: NDArray[np.bool_]) -> int:
    """The usable frame whose head pose is nearest to the median."""
    far = _distances(Ts_cam_head, np.median(Ts_cam_head[usable], 0))
    return int(np.where(usable, far, np.inf).argmin())


def _distances(poses: Floats, pose: Floats) -> Floats:
    """[T] metres from a pose, a radian's turn counted as a third of a metre."""
    difference = poses - pose
    return np.linalg.norm(difference[:, :3, 3], axis=1) + 0.3 * np.linalg.norm(difference[:, :3, :3], axis=(1, 2))


def _order(Ts_cam_head: Floats, reference: int, shots: NDArray[np.int64]) -> list[tuple[int, int | None]]:
    """Frames with the neighbour they start from: in each shot both ways from the head pose nearest the reference's."""
    far = _distances(Ts_cam_head, Ts_cam_head[reference])
    order: list[tuple[int, int | None]] = []
    for shot in np.unique(shots):
        rows = np.flatnonzero(shots == shot)
        first = int(rows[far[rows].argmin()])
        order += [(first, None)]
        order += [(frame, frame - 1) for frame in range(first + 1, int(rows[-1]) + 1)]
        order += [(frame, frame + 1) for frame in range(first - 1, int(rows[0]) - 1, -1)]
    return order


class TorsoPredictor(NamedTuple):
    """The torso of a head pose, linear in the head's departure from its mean."""

    T_cam_head: Floats
    """[4,4] the mean head."""
    T_cam_torso: Floats
    """[4,4] the mean torso."""
    shape: Floats
    """[M] the mean shape."""
    weights: Floats
    """[6,6+M] from the head's turn and move to the torso's and to its shape; turns as metres, see `TURN_M`."""

    @staticmethod
    def fit(Ts_cam_head: Floats, torso: Torso) -> TorsoPredictor:
        """Ridge regression over T frames, weighted by confidence."""
        trust = torso.confidence / max(float(torso.confidence.sum()), 1e-9)
        head, body = (mean_pose(poses, trust) for poses in (Ts_cam_head, torso.poses))
        shape = trust @ torso.shape
        inputs = _departures(Ts_cam_head, head)
        outputs = np.concatenate([_departures(torso.poses, body), torso.shape - shape], 1)
        curvature = inputs.T @ (trust[:, None] * inputs) + RIDGE_M**2 * np.eye(6)
        return TorsoPredictor(head, body, shape, np.linalg.solve(curvature, inputs.T @ (trust[:, None] * outputs)))

    def predict(self, Ts_cam_head: Floats) -> tuple[Floats, Floats]:
        """Ts_cam_torso [T,4,4] and shape [T,M] for head poses [T,4,4]."""
        moved = _departures(Ts_cam_head, self.T_cam_head) @ self.weights
        rotations = rotvec_to_matrix(moved[:, :3] / TURN_M) @ self.T_cam_torso[:3, :3]
        return make_rigid(rotations, moved[:, 3:6] + self.T_cam_torso[:3, 3]), moved[:, 6:] + self.shape


def mean_pose(poses: Floats, weights: Floats) -> Floats:
    """The weighted mean [4,4] of poses [T,4,4]; weights [T] add up to 1."""
    mean = np.tensordot(weights, poses, 1)
    U, _, Vt = np.linalg.svd(mean[:3, :3])
    return make_rigid(U @ np.diag([1, 1, np.linalg.det(U @ Vt)]) @ Vt, mean[:3, 3])


def _departures(poses: Floats, mean: Floats) -> Floats:
    """[T,6] turns (as metres) and moves of poses [T,4,4] from a mean pose [4,4]."""
    turns = TURN_M * matrix_to_rotvec(poses[:, :3, :3] @ mean[:3, :3].T)
    moves = poses[:, :3, 3] - mean[:3, 3]
    return np.concatenate([turns, moves], 1)


def steady(torso: Torso, Ts_cam_head: Floats, shots: NDArray[np.int64]) -> Torso:
    """The torso smoothed over time without delay, where it was not seen filled from its neighbours and the head.

    What is smoothed is the departure from what the head predicts: the sum of squared errors, weighted by confidence, of
    squared second differences and, hardly, of squares is the least it can be in each shot (Whittaker 1923).
    """
    from scipy.sparse import diags_array
    from scipy.sparse.linalg import spsolve

    if not torso.confidence.any():
        return torso
    predictor = TorsoPredictor.fit(Ts_cam_head, torso)
    poses, shape = predictor.predict(Ts_cam_head)
    turns = matrix_to_rotvec(torso.poses[:, :3, :3] @ np.swapaxes(poses[:, :3, :3], 1, 2))
    departures = np.concatenate([turns, torso.poses[:, :3, 3] - poses[:, :3, 3], torso.shape - shape], 1)
    for shot in np.unique(shots):
        rows = shots == shot
        trust = torso.confidence[rows]
        bends = diags_array([1.0, -2.0, 1.0], offsets=[0, 1, 2], shape=(max(len(trust) - 2, 0), len(trust)))
        normal = (BEND_WEIGHT * bends.T @ bends + diags_array(trust + STAY_WEIGHT)).tocsc()
        departures[rows] = spsolve(normal, trust[:, None] * departures[rows]).reshape(len(trust), -1)
    rotations = rotvec_to_matrix(departures[:, :3]) @ poses[:, :3, :3]
    moved = make_rigid(rotations, departures[:, 3:6] + poses[:, :3, 3])
    return Torso(moved, departures[:, 6:] + shape, torso.confidence)
