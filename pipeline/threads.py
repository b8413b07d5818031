"""How many threads the libraries underneath may use. Imports none of them: they read it when they start."""

from __future__ import annotations

import os


def one_blas_thread() -> None:
    """Have numpy's linear algebra work in one thread; to be called before numpy is first imported.

    The fit's systems are small: a second thread gains nothing, and on busy cores the two wait for each other, so that
    seconds become minutes. What the user has set stays.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
