"""Blocks of work: in threads of this process by default, or wherever a dask cluster runs."""
