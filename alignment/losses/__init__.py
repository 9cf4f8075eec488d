"""The maths of RLHF as pure functions: no I/O, no state, no model.

Notation used in every docstring of this folder:

======== =================================================================================
``B``    rows (samples) of a batch
``R``    the longest response of the batch; index ``t`` refers to the ``t``-th response token
mask     ``[B, R]``, 1 for the response's tokens that the policy chose (its EOS included), 0 behind its end and where
         a tool or an environment wrote
logprobs ``[B, R]`` log pi(token_t | what came before), natural logarithm
values   ``[B, R]`` V(state before token ``t``)
======== =================================================================================

What needs no gradient (KL, rewards, advantages) works on NumPy arrays on the host: these arrays are small, and the same
numbers come out on every device. What needs one (log-probs, losses) works on Paddle tensors.

Registries, each a :class:`~alignment.named.Named` to which a user's file can add: ``policy.POLICY_LOSSES``,
``estimators.ADVANTAGES``, ``aggregation.AGGREGATIONS``, ``kl.KL_ESTIMATORS``, ``kl.KL_CONTROLLERS``,
``correction.CORRECTIONS``, ``vocabulary_mask.VOCABULARY_MASKS``. Nothing here loads Paddle before it is used.
"""
