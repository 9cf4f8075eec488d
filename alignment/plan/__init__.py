"""A model of memory, work and messages: what a run takes, phase by phase and process by process, before it starts.

``alignment plan FILE`` prints it (:mod:`alignment.plan.run_plan`). Sizes come from :mod:`~alignment.plan.shapes` and
:mod:`~alignment.plan.activations`, :mod:`~alignment.plan.memory` puts them together, :mod:`~alignment.plan.work` counts
operators, :mod:`~alignment.plan.traffic` messages, :mod:`~alignment.plan.times` turns both into seconds on a card of
:mod:`~alignment.plan.hardware`. Nothing here imports Paddle.
"""
