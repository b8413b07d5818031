"""Threads of the libraries underneath, set before they start."""

from __future__ import annotations

import os
import subprocess
import sys


def test_a_run_has_one_blas_thread_unless_told_otherwise() -> None:
    code = (
        "import sys, pipeline.cli\n"
        "assert 'numpy' not in sys.modules, 'too late: numpy has started'\n"
        "pipeline.cli.one_blas_thread()\n"
        "import numpy, os\n"
        "print(os.environ['OPENBLAS_NUM_THREADS'])\n"
    )
    for chosen, expected in ((None, "1"), ("2", "2")):
        environment = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
        if chosen:
            environment["OPENBLAS_NUM_THREADS"] = chosen
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=60
        )
        assert done.stdout.strip() == expected
