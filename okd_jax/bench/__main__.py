from okd_jax.bench.command import command

if __name__ == "__main__":
  command()
