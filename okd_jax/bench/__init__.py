"""Measures how fast this machine runs a part of the package, and prints a table.

    python -m okd_jax.bench generate --model=M --batch_size=8 --max_new_tokens=128
    python -m okd_jax.bench speculate --model=TEACHER --draft=STUDENT
    python -m okd_jax.bench step --method=okd --teacher=8x512 --student=4x256
    python -m okd_jax.bench loss --method=okd --vocab_size=50257
    python -m okd_jax.bench compile --layers=4,48

All but the first two also take --config=RECIPE (by default `default`) and
--config.key=value: the method's knobs, the modules, dtype, chunks and row lengths.
`benchmarks/` compares with other libraries and methods with each other; what was
measured is in BENCHMARKS.md.
"""
