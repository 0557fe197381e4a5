"""RLHF on plain Accelerate: supervised fine-tuning, a scalar reward model and PPO, handed on through one directory."""

__version__ = "0.1.0"
