"""Measurements that are no tests: speed, and comparisons with TRL 1.12, which needs an environment of its own."""
