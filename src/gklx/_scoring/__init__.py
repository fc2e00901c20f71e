"""Scoring logits at any size: what `gklx.score` and the command `gklx score` do.

`files` (with `file_formats`) reads rows, `inputs` cuts these and arrays into chunks, and `pools` computes the chunks on
a `backend`. `samples` has the values of a sample; `run` collects them as records in a `work_file`. `values` gives the
losses of all samples, `statistics` what follows from them; `report`, `sample_files` and `plot` write it. `comparison`
runs all of it. `import gklx` imports none of this.
"""
