"""Shared nouns: types, configuration, metrics, engine, checkpoints. Imports neither `model` nor `dataset`."""
