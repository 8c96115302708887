#!/bin/sh
# Run `make check` beside the tests, which leave it a part of a core: tools/tests_beside_checks.sh COMMAND [ARGUMENT ...]
# Fails if either does.
make --no-print-directory check &
checks=$!
# What a script starts in the background does not hear Ctrl-C.
trap 'kill "$checks" 2>/dev/null; exit 130' INT TERM
"$@"
tests=$?
if ! wait "$checks"; then
    echo "make check found faults, see above" >&2
    exit 1
fi
exit "$tests"
