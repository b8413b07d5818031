"""Features on planes: each group is read at its own point, bilinearly, from a grid or from hash grids."""

from __future__ import annotations

import pytest
import torch

from pipeline.avatars.triplane import HashPlanes, TriPlane

GROUPS, CHANNELS = 4, 2


def planes(kind: str) -> TriPlane | HashPlanes:
    """Small random planes of one kind or the other."""
    made = TriPlane(GROUPS, CHANNELS, 8) if kind == "grid" else HashPlanes(GROUPS, CHANNELS, 2, 4, 16, 64)
    made.start(torch.Generator().manual_seed(1))
    return made


def points(n: int = 50) -> torch.Tensor:
    """[N,G,3] in the box."""
    return torch.rand(n, GROUPS, 3, generator=torch.Generator().manual_seed(2)) * 2 - 1


@pytest.mark.parametrize("kind", ["grid", "hash"])
def test_doppelganger_k_reads_group_k_alone(kind: str) -> None:
    made, at = planes(kind), points()
    before = made(at)
    assert before.shape == (50, GROUPS * CHANNELS)
    for group in range(GROUPS):
        moved = at.clone()
        moved[:, group] = moved[:, group] * 0.5 + 0.1
        changed = (made(moved) != before).view(50, GROUPS, CHANNELS)
        assert changed[:, group].any(0).all()
        assert not changed[:, [g for g in range(GROUPS) if g != group]].any()


@pytest.mark.parametrize("kind", ["grid", "hash"])
def test_every_channel_of_every_group_and_plane_learns_from_its_own_features(kind: str) -> None:
    made, at = planes(kind), points(2000)
    for group in range(GROUPS):
        made.zero_grad()
        made(at).view(-1, GROUPS, CHANNELS)[:, group].sum().backward()
        for parameter in made.parameters():
            assert parameter.grad is not None
            by_channel = parameter.grad.view(3, GROUPS, parameter.shape[1], -1).abs().sum(3)
            assert (by_channel[:, group] > 0).all()
            assert (by_channel[:, [g for g in range(GROUPS) if g != group]] == 0).all()


def test_planes_keep_two_axes_each_are_bilinear_and_multiply() -> None:
    made = TriPlane(1, 1, 5)
    along = torch.linspace(-1, 1, 5)
    with torch.no_grad():
        # Plane (a, b) holds 2 + a + 3 b; in a grid the first axis runs along a row.
        made.planes.copy_((2 + along[None, :] + 3 * along[:, None]).expand(3, 1, 5, 5))
    at = points()[:, :1]
    x, y, z = at[:, 0].unbind(1)
    expected = (2 + x + 3 * y) * (2 + y + 3 * z) * (2 + z + 3 * x)
    torch.testing.assert_close(made(at)[:, 0], expected)
    torch.testing.assert_close(made(torch.full((1, 1, 3), 7.0)), made(torch.ones(1, 1, 3)))


def test_a_hash_grid_with_room_for_every_point_is_a_grid() -> None:
    dense, hashed = TriPlane(GROUPS, CHANNELS, 8), HashPlanes(GROUPS, CHANNELS, 1, 8, 8, 64)
    dense.start(torch.Generator().manual_seed(0))
    with torch.no_grad():
        hashed.tables[0].copy_(dense.planes.flatten(2))
    torch.testing.assert_close(hashed(points()), dense(points()))


def test_hash_grids_keep_no_more_than_their_entries_and_use_them_all() -> None:
    made = HashPlanes(GROUPS, 4, 4, 16, 128, 2048)
    assert [table.shape[2] for table in made.tables] == [256, 1024, 2048, 2048]
    finest = made.get_buffer("hash_3")
    assert finest.shape == (128 * 128,)
    counts = torch.bincount(finest, minlength=2048)
    assert counts.min() > 0
    assert counts.max() <= 3 * 128 * 128 / 2048


def test_levels_share_the_channels_evenly() -> None:
    with pytest.raises(ValueError, match="3 levels cannot share"):
        HashPlanes(GROUPS, 4, 3, 16, 128, 2048)
