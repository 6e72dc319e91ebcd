"""The maths of rows: reductions that combine. Nothing here knows of models."""
