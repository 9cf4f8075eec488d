"""What a run takes, phase by phase and process by process, before it starts.

``alignment plan FILE`` prints it (:mod:`alignment.plan.run_plan`). :mod:`~alignment.plan.setting` is the run in plain
numbers, :mod:`~alignment.plan.shapes` and :mod:`~alignment.plan.activations` the sizes of models,
:mod:`~alignment.plan.memory` puts them together, :mod:`~alignment.plan.roofline` turns products, weights and messages
into seconds on a card of :mod:`~alignment.plan.cards`. Nothing here imports Paddle.
"""
