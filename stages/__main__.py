"""`python -m stages DESCRIPTOR`: the child of `pipeline.isolation.StageProcess`."""

from __future__ import annotations

import sys

from pipeline.threads import one_blas_thread

if __name__ == "__main__":
    one_blas_thread()
    from pipeline.isolation import serve
    from pipeline.logs import set_up_logging
    from stages import STAGES

    set_up_logging()
    serve(STAGES, int(sys.argv[1]))
