"""PPO and what the three stages share: data, models, the engine."""
