"""headcast's library: from a video of one person to a head avatar that can be driven. Knows no Prefect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.api import Avatar, LoadedSubject, Pose, load_avatar, load_subject
    from pipeline.viewpoint import Camera

__version__ = "0.1.0"
__all__ = ["Avatar", "Camera", "LoadedSubject", "Pose", "load_avatar", "load_subject"]


def __getattr__(name: str) -> Any:
    """What notebooks use, imported when asked for: the command line must not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module 'pipeline' has no attribute '{name}'")
    from pipeline import api

    return getattr(api, name)
