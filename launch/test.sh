#!/usr/bin/env bash
# Makes the environment and runs the tests, a worker per core; arguments go to pytest (default: all tests, the slowest listed).
#
#   launch/test.sh
#   REFUSION_EXTRAS=test,tpu launch/test.sh      compiles for TPUs too
#   launch/test.sh tests/test_step.py -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
REFUSION_EXTRAS="${REFUSION_EXTRAS:-test}" source launch/env.sh
[ $# -gt 0 ] || set -- tests -q --numprocesses=auto --dist=loadfile --timeout=900 --durations=20
exec python -m pytest "$@"
