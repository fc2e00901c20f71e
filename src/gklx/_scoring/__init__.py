"""Scoring logits at any size: what `gklx.score` and the command `gklx score` do.

`files` (with `file_formats`) and `arrays` hold the rows, `inputs` cuts them into chunks, `pools` has them worked off on
a `backend` (what a sample comes to is in `samples`), `run` collects the records in a `work_file`. `statistics` makes
the score of them; `report`, `sample_files` and `plot` write it down. `import gklx` imports none of this.
"""
