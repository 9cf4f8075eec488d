"""The random-walk task: reach a goal in a directed graph by the shortest path, after having seen random walks only.

The task is trlX's (Chen et al. 2021, Decision Transformer, has its origin): the language model first learns the edges
from random walks, then reinforcement learning with a reward of at most 1 has to find the shortest ways. Graph, walks
and reward are made here.
"""

from __future__ import annotations

import os
from collections import deque

import numpy as np

NODES, STEPS, GOAL = 21, 10, 0
NAMES = "abcdefghijklmnopqrstu"


def make_graph(seed: int) -> list[list[int]]:
    """Successors of each node; every node has at least two, and the goal is absorbing (it has none)."""
    rng = np.random.default_rng(seed)
    while True:
        edges = [sorted({int(j) for j in rng.choice(NODES, 3, replace=False)} - {i}) for i in range(NODES)]
        edges[GOAL] = []
        if len(shortest_ways(edges)) == NODES:
            return edges


def shortest_ways(edges: list[list[int]]) -> dict[int, int]:
    """Steps from each node that can reach the goal, by breadth-first search backwards."""
    distance, queue = {GOAL: 0}, deque([GOAL])
    while queue:
        node = queue.popleft()
        for before in range(NODES):
            if node in edges[before] and before not in distance:
                distance[before] = distance[node] + 1
                queue.append(before)
    return distance


def random_walk(edges: list[list[int]], start: int, rng: np.random.Generator) -> str:
    """The nodes after ``start``, until the goal or ``STEPS`` steps."""
    node, walk = start, ""
    while node != GOAL and len(walk) < STEPS:
        node = int(rng.choice(edges[node]))
        walk += NAMES[node]
    return walk


def optimality(edges: list[list[int]], start: str, walk: str) -> float:
    """Shortest way by way taken, in (0, 1]; 0 for one that does not arrive, -1 for one that leaves the edges.

    Args:
        edges: the graph.
        start: the name of the first node.
        walk: the names of the further nodes.
    """
    node = NAMES.index(start)
    best = shortest_ways(edges)[node]
    for step, name in enumerate(walk, 1):
        following = NAMES.find(name)
        if len(name) != 1 or following not in edges[node]:
            return -1.0
        node = following
        if node == GOAL:
            return best / step if step == len(walk) else -1.0
    return 0.0


def reward(prompts: list[str], responses: list[str]) -> list[float]:
    """The reward that PPO sees; the graph's seed comes from the environment."""
    edges = make_graph(int(os.environ["RANDOM_WALK_SEED"]))
    return [optimality(edges, prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
