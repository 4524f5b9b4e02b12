"""`distft evaluate`: what the fine-tune changed, measured on base and adapter side by side.

`request` parses what is asked, `run` carries it out, and `tasks` holds one module per task and says how to add one.
Results are in the run folder's `evaluation.json`, raw outputs in `evaluation/<task>/`.
"""
