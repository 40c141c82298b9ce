"""A result in the forms that servers read, and what is said of it beside."""
