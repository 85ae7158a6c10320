"""What everything stands on: files, devices, the command line."""
