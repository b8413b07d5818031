"""A head model made one person's own: what a fit found at the landmarks, spread over the surface."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import splu

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.heads import HeadModel

# Bending and size of the displacement against its misfit at the landmarks. Their ratio's fourth root is how many edges
# away from the last landmark the displacement dies out: about 6, 2 cm on the face.
BENDING = 0.05
RETURN = 4e-5


def personalise(
    head: HeadModel, landmark_offsets: NDArray[np.floating], expression_offsets: NDArray[np.floating]
) -> HeadModel:
    """The head model with a fit's landmark offsets built into its template and expressions.

    Every displacement is the smoothest over the surface (least squared Laplacian; Sorkine et al., "Laplacian surface
    editing", 2004) that about meets the offsets and dies out away from them. Eyeballs, teeth and tongue stay.

    Args:
        head: the model.
        landmark_offsets: [L, 3] metres, `landmark_offsets` of `fit.npz`.
        expression_offsets: [E, L, 3] metres, `expression_offsets` of `fit.npz`.
    """
    V, L = len(head.template), len(head.landmark_faces)
    still = head.regions["eyes"] | head.regions["teeth"] | head.regions["tongue"]
    rows = np.repeat(np.arange(L), 3)
    columns = head.faces[head.landmark_faces].ravel()
    at_landmarks = sparse.csr_matrix((head.landmark_bary.ravel().astype(np.float64), (rows, columns)), (L, V))
    on_skin = ~still[head.faces[head.landmark_faces]].any(1)
    at_landmarks = at_landmarks[on_skin]

    edges = np.concatenate([head.faces[:, [0, 1]], head.faces[:, [1, 2]], head.faces[:, [2, 0]]])
    edges = np.unique(np.concatenate([edges, edges[:, ::-1]]), axis=0)
    neighbours = sparse.csr_matrix((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), (V, V))
    degree = np.maximum(np.asarray(neighbours.sum(1)).ravel(), 1)
    laplacian = sparse.identity(V) - sparse.diags(1 / degree) @ neighbours
    system = BENDING * laplacian.T @ laplacian + RETURN * sparse.identity(V) + at_landmarks.T @ at_landmarks
    offsets = np.concatenate([landmark_offsets[None], expression_offsets])[:, on_skin].astype(np.float64)
    wanted = at_landmarks.T @ offsets.transpose(1, 0, 2).reshape(len(offsets[0]), -1)
    moved = splu(system.tocsc()).solve(wanted).reshape(V, len(offsets), 3).transpose(1, 0, 2).astype(np.float32)
    moved[:, still] = 0
    return replace(head, template=head.template + moved[0], expression_basis=head.expression_basis + moved[1:])
