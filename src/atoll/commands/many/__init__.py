"""Many runs of one run.toml, side by side."""
