"""A PaddlePaddle alignment toolkit: supervised fine-tuning, reward models and PPO.

Importing the package prepares the CPU runtime (threads, math library, allocator), which must happen before Paddle
loads; see :mod:`alignment.runtime`. Nothing heavy is imported here.
"""

from alignment import runtime as runtime

__version__ = "0.1.0"

runtime.prepare()
