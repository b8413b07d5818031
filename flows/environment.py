"""Prefect's settings for a machine that keeps to itself: quiet, offline, nothing reported to anyone."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

_SETTINGS = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
    "PREFECT_TELEMETRY_ENABLE_RESOURCE_METRICS": "false",
    # The embedded server serves no page; a cold start on a busy machine takes longer than the default allows.
    "PREFECT_SERVER_UI_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
    # A stage's error is a message of ours; Prefect's traceback goes to the run's log, not to the terminal.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
}


def quiet_prefect() -> None:
    """Set the environment before the first `import prefect`; what the user has set stays.

    Without a server of the user's own, Prefect's home is headcast's, so that an embedded server never migrates the
    database of another installation.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    if not {"PREFECT_API_URL", "PREFECT_PROFILE", "PREFECT_HOME"} & set(os.environ):
        os.environ["PREFECT_HOME"] = str(_own_home())


def _own_home() -> Path:
    """A folder for the embedded server's database; a passing one where the user's data folder cannot be written."""
    import platformdirs

    home = platformdirs.user_data_path("headcast", appauthor=False) / "prefect"
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="headcast-prefect-"))
    return home
