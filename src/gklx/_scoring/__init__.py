"""Scoring logits in files.

`logit_files` opens and checks them, `backend` says where to compute, `score` computes, `report` prints. Only the
command imports this; `import gklx` does not.
"""
