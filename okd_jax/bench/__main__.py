from okd_jax import bench, cli

if __name__ == "__main__":
  cli.run(bench.main)
