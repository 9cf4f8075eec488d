"""Which of the given keys change nothing in this run, and why."""

from __future__ import annotations

from alignment.arguments import device
from alignment.arguments.spec import Spec
from alignment.arguments.stage_arguments import Arguments


def unused(args: Arguments) -> dict[str, str]:
    """Return ``{key: reason}`` for every given key whose value asks for something that does not happen here."""
    from alignment.arguments.parser import find

    result = {}
    for key in sorted(args.given):
        spec = find(type(args), key)
        assert spec is not None, key  # an unknown key has been refused before
        own = key in args.specs()
        value = getattr(args, key) if own else args.passthrough[key]
        reason = _reason(args, spec)
        # An own flag that is on by default asks for something when the user wrote it.
        asks = not spec.is_neutral(value) or (own and value is True)
        if reason and asks:
            result[key] = reason
    if args.device == "gpu" and "device" in args.given and not device.gpu_available():
        result["device"] = "no GPU that the installed Paddle can use was found; the CPU is used"
    return result


def _reason(args: Arguments, spec: Spec) -> str:
    if spec.no_effect:
        return spec.no_effect
    if spec.on_cpu and args.on_cpu:
        return spec.on_cpu
    return spec.alone if device.world_size() == 1 else spec.together
