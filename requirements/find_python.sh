#!/bin/sh
# Print the command of a Python 3.10-3.12 that can make virtual environments. An argument names the only candidate.
# Every candidate is run, because a shim of a version manager may stand on the PATH and still fail.
check='import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))'
for python in ${1:-python3.11 python3.12 python3.10 python3 python}; do
    if "$python" -c "$check" >/dev/null 2>&1; then
        command -v "$python"
        exit 0
    fi
done
if [ -n "${1:-}" ]; then
    found=$("$1" --version 2>&1) || found="it does not run"
    echo "PYTHON=$1 cannot be used ($found): it must be Python 3.10, 3.11 or 3.12 with the venv and ensurepip modules." >&2
else
    echo "No Python 3.10, 3.11 or 3.12 with the venv and ensurepip modules was found on the PATH." >&2
    echo "Install one (on Debian and Ubuntu: apt install python3-venv), or name it: make PYTHON=/path/to/python3.11 ..." >&2
fi
exit 1
