"""The configuration of a run: its schema (`configs.schema`) and the shipped YAML files."""
