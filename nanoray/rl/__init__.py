"""Reinforcement learning: a pool of rollout engines, their rewards, and a learner."""
