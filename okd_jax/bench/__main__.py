from okd_jax import bench
from okd_jax.runtime import cli

if __name__ == "__main__":
  cli.run(bench.main)
