"""``python -m alignment.kernels``: compile the CPU kernels now, or say why they cannot be had."""

import sys

from alignment import runtime


def main() -> int:
    """Compile or find the library and say where it is; 0 even without a compiler, since everything works without."""
    with runtime.quiet_import():
        import paddle  # noqa: F401

    from alignment.kernels.build import BuildError, library

    try:
        print(f"CPU kernels: {library()}")
    except BuildError as error:
        print(f"CPU kernels: none, {error}; Paddle's own operators are used, which are slower")
    return 0


if __name__ == "__main__":
    sys.exit(main())
