"""Hand-written CPU kernels for what training and rollout spend their time on, as Paddle custom operators.

:func:`alignment.kernels.ops.kernels` gives them, or None where they cannot be had (no C++ compiler, another device,
``ALIGNMENT_KERNELS=0``); whoever asks has a way to do without. What they compute and how is in ``csrc/``, one header
for each matter.
"""
