"""Carole beside the libraries that people use instead, on the same machine, in the same minutes.

- `workloads`: what is done, as data; `targets`: how fast it is meant to be, as data.
- `libraries`: one file for each library, all with the face of `libraries.Library`.
- `worker`: a rank; holds one library and does what the runner orders. `pattern`: values whose sums are known.
- `jobs` starts the ranks of one library and talks to them; `runner` goes round the libraries in short blocks.
- `install` gets everything; `report` and `plot` show what was found.
"""
