"""A person's own head: what was found at the landmarks is in the mesh."""

from __future__ import annotations

import functools

import numpy as np

from pipeline.fitting import reduce_to_landmarks
from pipeline.heads import HeadModel, load_head
from pipeline.personal import personalise


@functools.cache
def offsets() -> np.ndarray:
    """[1 + E, L, 3] smooth over the face, up to 3 mm."""
    head = load_head("anny")
    generator = np.random.default_rng(0)
    places = reduce_to_landmarks(head).mean
    waves = generator.normal(size=(1 + len(head.expression_names), 3, 3)) * 30
    return 3e-3 * np.sin(np.einsum("eij,lj->eli", waves, places))


@functools.cache
def own_head() -> HeadModel:
    return personalise(load_head("anny"), offsets()[0], offsets()[1:])


def test_landmarks_move_by_their_offsets() -> None:
    before, after = reduce_to_landmarks(load_head("anny")), reduce_to_landmarks(own_head())
    face = before.face
    moved = np.concatenate([(after.mean - before.mean)[None], after.expression - before.expression])[:, face]
    missed = np.linalg.norm(moved - offsets()[:, face], axis=2)
    assert np.median(missed) < 0.1e-3
    assert np.percentile(missed, 95) < 0.6e-3


def test_eyes_teeth_and_the_back_of_the_head_stay() -> None:
    head, own = load_head("anny"), own_head()
    for name in ("eyes", "teeth", "tongue"):
        np.testing.assert_array_equal(own.template[head.regions[name]], head.template[head.regions[name]])
    back = head.regions["head"] & (head.template[:, 2] < -0.05)
    assert np.abs(own.template - head.template)[back].max() < 0.5e-3


def test_no_offsets_change_nothing() -> None:
    head = load_head("anny")
    same = personalise(head, np.zeros((478, 3)), np.zeros((52, 478, 3)))
    np.testing.assert_array_equal(same.template, head.template)
    np.testing.assert_array_equal(same.expression_basis, head.expression_basis)
