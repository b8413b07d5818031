"""Whether a container does its work: exit code 0 or 1, one line that says why. Standard library only.

A service names an address that answers while it works in `HEADCAST_HEALTH_URL`. Without one the container makes
avatars itself, which it can while the dataset and the models' folder take files.
"""

from __future__ import annotations

import os
import sys
import tempfile
import urllib.request

TIMEOUT_SECONDS = 5


def main() -> None:
    url = os.environ.get("HEADCAST_HEALTH_URL")
    folders = [os.getcwd(), os.environ.get("HEADCAST_CACHE", tempfile.gettempdir())]  # noqa: PTH109
    try:
        if url:
            with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer:
                answer.read()
        else:
            for folder in folders:
                with tempfile.TemporaryFile(dir=folder) as file:
                    file.write(b"headcast")
    except (OSError, ValueError) as error:
        sys.exit(f"unhealthy: {url or ', '.join(folders)}: {error}")
    sys.stdout.write(f"healthy: {url or ', '.join(folders)}\n")


if __name__ == "__main__":
    main()
