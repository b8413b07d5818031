"""`python -m stages`: stages without an orchestrator.

Given a file descriptor it is the child of `pipeline.isolation.StageProcess`; given a request as JSON
(`pipeline.run.RunRequest`) it carries it out, which is what `headcast bench faults` kills.
"""

from __future__ import annotations

import sys

from pipeline.threads import one_blas_thread

if __name__ == "__main__":
    one_blas_thread()
    from pipeline.errors import HeadcastError
    from pipeline.isolation import serve
    from pipeline.logs import set_up_logging
    from pipeline.progress import PlainReporter
    from pipeline.run import RunRequest, carry_out
    from stages import STAGES

    set_up_logging()
    if sys.argv[1].isdigit():
        serve(STAGES, int(sys.argv[1]))
    try:
        carry_out(RunRequest.model_validate_json(sys.argv[1]), STAGES, PlainReporter())
    except HeadcastError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
