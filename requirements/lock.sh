#!/bin/sh
# Resolve the .in files anew into build.txt and lock.txt, for Python 3.10-3.12 at once. For maintainers: needs uv (UV names it).
# Plain pip installs the result; see the Makefile. Registry addresses stay out of the files, so any mirror will do.
set -eu
cd "$(dirname "$0")"
compile() {
    "${UV:-uv}" pip compile --quiet --universal --python-version 3.10 --generate-hashes \
        --no-header --no-emit-index-url --no-annotate --upgrade "$@"
}
compile build.in --unsafe-package none --output-file build.txt
compile base.in dev.in build.in --constraint build.txt --override overrides.txt --output-file lock.txt
