"""The Prefect wiring and nothing else."""
