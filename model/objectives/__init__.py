"""Objectives: pure functions of tensors, each tested against a formula written out as a loop."""
