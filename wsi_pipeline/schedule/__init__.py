"""Blocks of work on dask workers: in this process by default, or wherever a cluster runs."""
