from okd_jax import bench
from okd_jax.runtime import cli


def command() -> None:
  """The console script."""
  cli.run(bench.main)


if __name__ == "__main__":
  command()
