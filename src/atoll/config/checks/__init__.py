"""What a run.toml says that cannot be: values that the schema, this version, or each other refuse."""
