"""From a configuration to a trained student: build, loop, step."""
